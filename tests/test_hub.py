"""Models on the Hugging Face hub, over a local stand-in of its HTTP interface: put there, fetched, what goes wrong."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("huggingface_hub")
pytest.importorskip("PIL")
pytest.importorskip("tyro")

from hub_stand_in import StandIn, stand_in
from test_pipeline import CONFIG, network

from scalelong.train.commands.export import main as export_main
from scalelong.train.errors import UserError
from scalelong.train.sampling.pipeline import Pipeline

TOKEN = "hf_aVerySecretToken"


@pytest.fixture
def export(tmp_path) -> Path:
    Pipeline(network(), CONFIG).save_pretrained(tmp_path / "insects-model")
    return tmp_path / "insects-model"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    with stand_in() as hub:
        # What HF_ENDPOINT, HF_HOME and HF_TOKEN say is read when huggingface_hub is imported, which has happened.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_a_model_is_put_onto_the_hub_and_fetched_and_no_token_is_printed(export, hub: StandIn, capfd):
    pipe = Pipeline.from_pretrained(export)
    address = pipe.push_to_hub("me/insects", private=True)
    assert address == f"{hub.url}/me/insects/commit/{hub.commit('me/insects')}"
    assert hub.models["me/insects"].keys() == {"README.md", "config.json", "model.safetensors"}
    assert hub.models["me/insects"] == {path.name: path.read_bytes() for path in export.iterdir()}
    assert hub.private == {"me/insects": True}
    assert hub.tokens
    assert set(hub.tokens) == {f"Bearer {TOKEN}"}
    fetched = Pipeline.from_pretrained("me/insects")
    np.testing.assert_array_equal(np.asarray(fetched("bee", seed=4)[0]), np.asarray(pipe("bee", seed=4)[0]))
    assert pipe.push_to_hub("me/insects") == address  # what is there already is no error
    with pytest.raises(ValueError, match="called OWNER/NAME, got 'insects'"):
        pipe.push_to_hub("insects")
    with pytest.raises(ConnectionError, match="cannot fetch me/other from the hub: "):
        Pipeline.from_pretrained("me/other")
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_hub_that_refuses_or_does_not_answer_is_one_line_without_the_token(export, hub: StandIn, monkeypatch, capfd):
    pipe = Pipeline.from_pretrained(export)
    hub.refuses = True
    said = []
    for url in (hub.url, "http://127.0.0.1:9"):  # where nobody listens
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        with pytest.raises(ConnectionError, match="cannot put me/insects onto the hub: ") as raised:
            pipe.push_to_hub("me/insects", token="hf_another1")
        said.append(str(raised.value))
        with pytest.raises(ConnectionError, match="cannot fetch me/insects from the hub: ") as raised:
            Pipeline.from_pretrained("me/insects", token="hf_another1")
        said.append(str(raised.value))
    assert not any("\n" in line for line in said)
    assert "401" in said[0]
    assert "refused" in said[2]
    printed = "".join((*said, *capfd.readouterr()))
    assert TOKEN not in printed
    assert "hf_another1" not in printed
    assert hub.models == {}


def test_an_export_for_a_hub_that_does_not_answer_writes_nothing(export, hub: StandIn, tmp_path):
    hub.refuses = True
    line = [str(export), "--out", str(tmp_path / "again"), "--push-to-hub", "me/insects"]
    with pytest.raises(UserError, match=r"^cannot put me/insects onto the hub: .*; nothing is written$"):
        export_main(line)
    assert not (tmp_path / "again").exists()
    hub.refuses = False
    export_main(line)
    assert hub.models["me/insects"].keys() == {path.name for path in (tmp_path / "again").iterdir()}


def test_a_path_below_a_folder_that_is_here_is_not_looked_for_on_the_hub(hub: StandIn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match="no such folder of an export: runs/mine"):
        Pipeline.from_pretrained("runs/mine")
