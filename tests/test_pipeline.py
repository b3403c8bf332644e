"""``scalelong.Pipeline``: the images of an export, its labels and settings, and exports of other versions."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from programs import environment

import scalelong
from scalelong.model.architectures import FORMAT
from scalelong.model.backbone import Backbone
from scalelong.train.objective import make_objective
from scalelong.train.objective_config import ObjectiveConfig
from scalelong.train.sampling.generate import generate, labels_in_turn
from scalelong.train.sampling.pipeline import Pipeline
from scalelong.train.sampling.pipeline_config import PipelineConfig

NAMES = ("ant", "bee", "cat")
CONFIG = PipelineConfig(
    objective=ObjectiveConfig(prediction="v", noise="cosine"),
    null_label=3,
    class_names=NAMES,
    steps=2,
    guidance=1.5,
    training={"data": "insects", "images_seen": 640, "optimizer": {"learning_rate": 0.001, "clip_grad_norm": 0.0}},
)
SMALL: dict[str, Any] = {"img_size": 8, "patch_size": 2, "width": 16, "depth": 2, "num_heads": 2}


def network(**changes: Any) -> Backbone:
    torch.manual_seed(0)
    model = scalelong.UViT(scalelong.UViTConfig(**{**SMALL, "num_classes": 4, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "insects-model"
    Pipeline(network(), CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(export) -> Pipeline:
    return Pipeline.from_pretrained(export, device="cpu")


@pytest.fixture
def changed(export, tmp_path):
    """Makes a copy of the export whose ``config.json`` says something else."""

    def change(**changes: Any) -> Path:
        description = json.loads((export / "config.json").read_text())
        for name, value in changes.items():
            section, _, field = name.rpartition("__")
            holder = description[section] if section else description
            holder.pop(field, None)
            if value is not ...:
                holder[field] = value
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes((export / "model.safetensors").read_bytes())
        (folder / "config.json").write_text(json.dumps(description))
        return folder

    return change


def pixels(images: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_images_are_those_that_the_network_draws_by_what_the_export_says(pipe):
    drawn = generate(
        network(),
        make_objective(CONFIG.objective),
        labels_in_turn([2, 0]),
        range(5),
        null_condition=3,
        sampler="dpm-solver++",
        steps=2,
        guidance=1.5,
        seed=7,
    )
    found = pipe(labels=[2, 0], num_images=5, seed=7)
    assert {image.mode for image in found} == {"RGB"}
    np.testing.assert_array_equal(pixels(found), np.stack(list(drawn)))


def test_a_call_chooses_images_labels_and_settings(pipe):
    three = pixels(pipe(labels=[0, 1, 2], seed=1))
    assert len(three) == 3
    assert len(pipe()) == 1
    np.testing.assert_array_equal(pixels(pipe(labels=["ant", "bee", "cat"], seed=1)), three)
    np.testing.assert_array_equal(pixels(pipe(num_images=3, seed=1)), three)
    # Alone, but for the rounding of another batch.
    assert np.abs(pixels(pipe("cat", numbers=[2], seed=1)).astype(int) - three[2:]).max() <= 1
    different = ({"seed": 2}, {"steps": 3}, {"guidance": 0.0}, {"sampler": "heun"}, {"skip_tuning": (0.3, 1.0)})
    for changes in (*different, {"labels": [2, 1, 0]}):
        assert not np.array_equal(pixels(pipe(**{"labels": [0, 1, 2], "seed": 1, **changes})), three), changes


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"labels": 3}, r"no label 3: .* 0 to 2 \(ant, bee, cat\)"),
        ({"labels": ["ant", "dog"]}, "no label 'dog'"),
        ({"labels": []}, "labels are empty"),
        ({"steps": 0}, r"steps must be a whole number in 1 \.\. 1000, got 0"),
        ({"guidance": -1.0}, "guidance must be a number from 0 on"),
        ({"guidance_interval": (2.0, 1.0)}, "guidance_interval"),
        ({"skip_tuning": (0.0, 1.0)}, "skip_tuning must be two positive factors"),
        ({"skip_tuning": (0.5,)}, "skip_tuning"),
        ({"sampler": "magic"}, "unknown sampler 'magic'; there are dpm"),
        ({"sampler": "euler-maruyama"}, "needs a run with --objective vp-sde"),
        ({"seed": -1}, "must not be negative"),
        ({"numbers": [-1]}, "must not be negative"),
        ({"num_images": 0}, "there must be images"),
        ({"num_images": 2, "numbers": [4]}, "as many as numbers"),
        ({"contexts": torch.zeros(1, 2, 3)}, "takes no texts"),
    ],
    ids=str,
)
def test_a_call_that_the_network_cannot_serve_is_one_line(pipe, call, words):
    with pytest.raises(ValueError, match=words) as raised:
        pipe(**call)
    assert "\n" not in str(raised.value)


def test_a_network_without_labels_takes_none_and_draws_grey(tmp_path):
    config = PipelineConfig(steps=1)
    Pipeline(network(num_classes=0, in_channels=1), config).save_pretrained(tmp_path)
    pipe = Pipeline.from_pretrained(tmp_path)
    (image,) = pipe()
    assert (image.mode, image.size) == ("L", (8, 8))
    with pytest.raises(ValueError, match="none: it was trained without labels"):
        pipe(labels=[0])
    with pytest.raises(ValueError, match="not trained for guidance"):
        pipe(guidance=1.0)


def test_a_network_of_texts_takes_their_features_and_is_guided_by_the_empty_one(tmp_path):
    model = network(num_classes=0, context_tokens=3, context_dim=5)
    features, empty = torch.randn(2, 3, 5), torch.randn(3, 5)
    made = Pipeline(model, PipelineConfig(steps=1, guidance=2.0), empty_context=empty)
    made.save_pretrained(tmp_path)
    pipe = Pipeline.from_pretrained(tmp_path, device="cpu")
    found = pixels(pipe(contexts=features))
    np.testing.assert_array_equal(found, pixels(made(contexts=features)))
    assert not np.array_equal(found, pixels(pipe(contexts=features, guidance=0.0)))
    with pytest.raises(ValueError, match=r"give contexts, of features \(N, 3, 5\)"):
        pipe()
    with pytest.raises(ValueError, match=r"must be \(N, 3, 5\), got \(2, 5, 3\)"):
        pipe(contexts=features.transpose(1, 2))
    (tmp_path / "empty_context.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"no empty_context\.npy"):
        Pipeline.from_pretrained(tmp_path)


def test_an_export_of_the_first_format_loads_and_says_what_it_takes_for_granted(changed, capsys):
    old = changed(format=..., pipeline=...)
    assert scalelong.load_backbone(old).config == network().config
    (image,) = Pipeline.from_pretrained(old)(labels=1, steps=1)
    assert image.size == (8, 8)
    assert "says nothing of its training: taken to predict the noise under the VP-SDE" in capsys.readouterr().err
    given = Pipeline.from_pretrained(old, objective=CONFIG.objective)
    assert given.config.objective == CONFIG.objective


def test_an_export_of_a_newer_version_is_refused_in_one_line(changed):
    newer = changed(format=FORMAT + 1, surprise="something else")
    for load in (scalelong.load_backbone, Pipeline.from_pretrained):
        with pytest.raises(ValueError, match=f"format {FORMAT + 1}, which a newer .*--upgrade") as raised:
            load(newer)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "2"}, "no format of exports: '2'"),
        ({"pipeline": []}, r"describes no pipeline of this version: it is described by '\[\]'"),
        ({"pipeline__objective": ...}, "it has no 'objective'"),
        ({"pipeline__objective": {"prediction": "x1"}}, r"unknown objective\.prediction 'x1'"),
        ({"pipeline__objective": {"magic": 1}}, "its objective does not fit this version"),
        ({"pipeline__magic": 1}, "it has the unknown magic"),
        ({"pipeline__steps": "30"}, "steps must be a whole number"),
        ({"pipeline__null_label": 2}, "the null label 2 is not the last of 4 rows"),
        ({"pipeline__class_names": ["ant"]}, "1 class names, but the network has 3 classes"),
        ({"pipeline__class_names": 3}, "its class_names makes no sense"),
        ({"pipeline__guidance_interval": [1]}, "its guidance_interval makes no sense"),
        ({"pipeline__skip_tuning": ["a", 1]}, "its skip_tuning makes no sense"),
        ({"pipeline__autoencoder": "../elsewhere"}, "its autoencoder makes no sense"),
    ],
    ids=str,
)
def test_a_damaged_description_is_one_line(changed, changes, words):
    with pytest.raises(ValueError, match=words) as raised:
        Pipeline.from_pretrained(changed(**changes))
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_no_export_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder of an export"):
        Pipeline.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"optimizer": {}, "model": {}}))
    with pytest.raises(ValueError, match=r"is a run, not an export: scalelong export .* --out DIR"):
        Pipeline.from_pretrained(tmp_path)


def test_saving_what_was_loaded_writes_the_same_and_keeps_the_card(pipe, export, tmp_path):
    pipe.save_pretrained(tmp_path / "again")
    for path in export.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    (tmp_path / "again" / "README.md").write_text("# My insects\n")
    Pipeline.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "third")
    assert (tmp_path / "third" / "README.md").read_text() == "# My insects\n"


def test_the_model_card_says_how_to_load_it_and_what_it_is(export, tmp_path):
    card = (export / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: scalelong\n")
    for words in (
        "# insects-model",
        "trained on insects",
        "0 ant, 1 bee, 2 cat",
        "| images seen | 640 |",
        "guidance=1.5",
    ):
        assert words in card
    assert "clip grad norm" not in card
    assert "## Scores" not in card
    scores = {"settings": "40 samples", "features": "pixels", "samples": [{"guidance": 1.0, "kernel_distance": 0.25}]}
    with_scores = replace(CONFIG, training={**CONFIG.training, "scores": scores})
    Pipeline(network(), with_scores).save_pretrained(tmp_path)
    assert "| guidance | kernel distance |\n|---|---|\n| 1 | 0.25 |" in (tmp_path / "README.md").read_text()


def test_the_core_and_pillow_draw_a_picture(export, tmp_path):
    extras = "deepspeed nvidia diffusers tyro rich tensorboard sklearn skimage psutil pydantic huggingface_hub"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({extras!r}.split()))  # none of them can be imported
import scalelong
pipe = scalelong.Pipeline.from_pretrained({str(export)!r})
pipe(labels=["bee"], seed=3)[0].save({str(tmp_path / "bee.png")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "bee.png").read_bytes().startswith(b"\x89PNG")
