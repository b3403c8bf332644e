"""``--init-from``: a new run that starts from weights of a file, an export, a run or a folder of diffusers."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("deepspeed")

from running import losses, run_on_ranks, small_config
from test_train_bad_input import ten_classes

from scalelong.model.architectures import make_backbone
from scalelong.model.skip_scale import LearnedScale
from scalelong.train.checks import check_before_training
from scalelong.train.commands.export import write_export
from scalelong.train.config import DataConfig, TrainConfig
from scalelong.train.errors import UserError
from scalelong.train.hosts.processes import join_processes
from scalelong.train.initial_weights import read_weights
from scalelong.train.loop import train
from scalelong.train.recipes import RECIPES
from scalelong.train.run import start_run
from scalelong.train.run_folder import read_config
from scalelong.train.zero import shards

STEP = 32


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """Four steps, of which the checkpoints after the second and the fourth are there."""
    config = small_config(tmp_path_factory.mktemp("origin") / "run", images_per_checkpoint=2 * STEP)
    assert train(replace(config, total_images=4 * STEP)) == 0
    return config.run


@pytest.fixture(scope="module")
def averages(origin) -> dict[str, torch.Tensor]:
    return load_file(origin / "checkpoints" / str(4 * STEP) / "ema.safetensors")


@pytest.fixture(params=["run", "run@images", "export", "pth", "safetensors"])
def path(request, tmp_path, origin, averages) -> str:
    """What ``--init-from`` names, all of the same weights."""
    if request.param.startswith("run"):
        return str(origin) if request.param == "run" else f"{origin}@{4 * STEP}"
    if request.param == "export":
        config = read_config(origin)
        model = make_backbone(config.model, skip_scale=config.skip_scale)
        model.load_state_dict(averages)
        write_export(model, tmp_path / "export")
        return str(tmp_path / "export")
    if request.param == "pth":
        torch.save({f"module.{name}": tensor for name, tensor in averages.items()}, tmp_path / "nnet_ema.pth")
        return str(tmp_path / "nnet_ema.pth")
    save_file(averages, tmp_path / "weights@5.safetensors")
    return str(tmp_path / "weights@5.safetensors")


def weights_at_start(config: TrainConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and averages of a run before its first step."""
    run = start_run(check_before_training(config, join_processes()))
    weights = {name: x.detach().clone() for name, x in run.engine.module.state_dict().items()}
    averaged = {name: x.clone() for name, x in shards.whole_tensors(run.engine, run.ema.averages["ema"])}
    run.free()
    return weights, averaged


@pytest.mark.slow
def test_a_run_starts_with_exactly_these_bits(tmp_path, path, averages):
    weights, averaged = weights_at_start(small_config(tmp_path / "new", init_from=path))
    assert weights.keys() == averages.keys()
    assert all(torch.equal(x, averages[name]) for name, x in weights.items())
    assert averaged.keys() == averages.keys()
    assert all(torch.equal(x, averages[name]) for name, x in averaged.items())
    assert not (tmp_path / "new").exists()  # all is checked before anything is written


@pytest.mark.slow
def test_what_was_taken_is_said_and_recorded_and_not_read_again(tmp_path, origin, capsys):
    weights = Path(shutil.copytree(origin, tmp_path / "weights"))
    file = weights / "checkpoints" / str(4 * STEP) / "ema.safetensors"
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    straight = small_config(tmp_path / "straight", init_from=str(weights), images_per_checkpoint=STEP)
    assert train(replace(straight, total_images=4 * STEP)) == 0
    out = capsys.readouterr().out
    assert f"starting from weights: {make_backbone(straight.model).num_params():,} parameters" in out
    assert f"weights of {weights}, the averages at {4 * STEP} images, SHA-256 {sha256}\n  taken: " in out
    recorded = json.loads((straight.run / "config.json").read_text())
    assert recorded["init_from"] == f"{weights}@{4 * STEP}"
    assert recorded["init_sha256"] == sha256

    stopped = replace(straight, run=tmp_path / "stopped")
    assert train(replace(stopped, total_images=STEP)) == 0
    shutil.rmtree(weights)
    assert train(replace(stopped, init_from=None, total_images=2 * STEP)) == 0
    assert train(replace(stopped, total_images=4 * STEP)) == 0
    assert losses(stopped.run) == losses(straight.run)
    assert read_config(stopped.run).init_from == f"{weights}@{4 * STEP}"
    more = replace(stopped, total_images=6 * STEP)
    with pytest.raises(UserError, match=f"was started from the weights of {weights}@{4 * STEP}, not of {origin}"):
        train(replace(more, init_from=str(origin)))
    with pytest.raises(UserError, match=f"SHA-256 {sha256}, not 12"):
        train(replace(more, init_sha256="12"))
    with pytest.raises(UserError, match="was not started from weights"):
        train(small_config(origin, init_from=str(straight.run), total_images=6 * STEP))


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path, origin):
    file = tmp_path / "weights.safetensors"
    shutil.copy(origin / "checkpoints" / str(4 * STEP) / "ema.safetensors", file)
    config = small_config(tmp_path / "run", init_from=str(file), images_per_checkpoint=2 * STEP, total_images=2 * STEP)
    assert train(config) == 0
    first = losses(config.run)
    shutil.rmtree(config.run / "checkpoints")
    other = load_file(file)
    save_file({name: x + 1 for name, x in other.items()}, file)
    with pytest.raises(UserError, match=r"weights.safetensors has the SHA-256 \w{64}, not "):
        train(replace(config, init_from=None))
    save_file(other, file)
    assert train(replace(config, init_from=None)) == 0
    assert losses(config.run)[-2:] == first


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.exhaustive), pytest.param(2, marks=pytest.mark.exhaustive), 3]
)
def test_two_ranks_and_every_stage_start_alike(tmp_path, origin, stage):
    images = ten_classes(tmp_path / "images")
    config = small_config(
        tmp_path / "alone",
        init_from=str(origin),
        data=DataConfig(path=str(images)),
        total_images=2 * STEP,
        skip_scale=LearnedScale(),
    )
    assert train(config) == 0
    arguments = ["--model.width", 32, "--model.depth", 2, "--images-per-step", STEP, "--total-images", 2 * STEP]
    arguments += ["--optimizer.warmup-images", 64, "--sample.num-images", 10, "--sample.steps", 3, "--skip-scale", "ls"]
    arguments += ["--data.path", images, "--init-from", origin, "--images-per-log", 0, "--zero-stage", stage]
    outputs = run_on_ranks(2, "-m", "scalelong.train", "digits-uvit", *arguments, "--run", tmp_path / "two")
    assert outputs[0].count("  new: gates of the skips") == 1
    assert outputs[1].count("gates") == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(config.run), rel=1e-4)
    assert read_config(tmp_path / "two").init_sha256 == read_config(config.run).init_sha256


def test_labels_and_sizes_may_differ_and_lines_say_so(tmp_path, origin, averages):
    base = small_config(tmp_path / "new", init_from=f"{origin}@{4 * STEP}")
    model = replace(base.model, num_classes=6, img_size=16)
    initial = read_weights(replace(base, model=model, skip_scale=LearnedScale()))
    num_taken = sum(x.numel() for x in averages.values()) - (11 + 18) * 32
    assert initial.lines[1:] == [
        f"  taken: {len(averages) - 2} tensors, {num_taken:,} parameters",
        "  skips: cs (kappa 0.5) before, ls (reduction 16) now",
        "  interpolated: positions of 4 x 4 patches to 8 x 8, bicubically",
        "  new: gates of the skips, 598 parameters",
        "  new: rows 0 to 4 of label_emb.weight are those of the same number, the null label's is the last, "
        "5 are not used",
    ]
    network = make_backbone(replace(base.model, num_classes=6))
    read_weights(replace(base, model=replace(base.model, num_classes=6))).put_into(
        network, replace(base, model=network.config)
    )
    rows = network.state_dict()["label_emb.weight"]
    assert torch.equal(rows, averages["label_emb.weight"][[0, 1, 2, 3, 4, 10]])


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, origin):
    run = tmp_path / "new"
    base = small_config(run, init_from=str(origin))
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty").mkdir()
    save_file({}, tmp_path / "none.safetensors")
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for config, words in (
        (
            replace(base, model=replace(base.model, width=64)),
            ["width 32 -> 64", "nearest to them is the UViT digits-uvit"],
        ),
        (replace(base, model=replace(base.model, in_channels=3)), ["in_channels 1 -> 3", "channels out 1 -> 3"]),
        (replace(base, init_from=f"{origin}@77"), [f"no such checkpoint; {origin} has {2 * STEP}, {4 * STEP}"]),
        (replace(base, init_from=str(tmp_path / "nothing")), ["nothing: no such file or folder"]),
        (replace(base, init_from=str(tmp_path / "empty")), ["is no export, no run and no folder of diffusers"]),
        (replace(base, init_from=str(tmp_path / "text.pth")), ["it is a text, not a checkpoint"]),
        (replace(base, init_from=str(tmp_path / "none.safetensors")), ["holds no tensors"]),
        (replace(base, init_from=str(tmp_path / "other.safetensors")), ["conv1.weight of them is not known"]),
        (replace(base, run=origin, total_images=10 * STEP), ["was not started from weights"]),
        (replace(base, init_sha256="12"), ["has the SHA-256", "not 12"]),
    ):
        with pytest.raises(UserError) as caught:
            train(config)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert "\n" not in str(caught.value)
        assert not run.exists()
    with pytest.raises(ValueError, match="give one"):
        replace(base, branch_from=str(origin))


@pytest.mark.parametrize("part", ["", "unet"])
def test_a_folder_of_diffusers_is_read_with_its_pipeline_or_alone(tmp_path, part):
    diffusers = pytest.importorskip("diffusers")
    blocks: dict = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    theirs = diffusers.UNet2DModel(8, 1, 1, block_out_channels=(32, 64), attention_head_dim=None, **blocks)
    theirs.save_pretrained(tmp_path / "model" / part)
    base = RECIPES["digits-unet"]
    model = replace(base.model, attention_resolutions=())
    config = replace(base, run=tmp_path / "run", init_from=str(tmp_path / "model"), model=model)
    initial = read_weights(config)
    assert initial.lines[0].startswith(f"weights of {tmp_path / 'model'} (diffusers), SHA-256 ")
    assert "  new: the embedding of labels, 1,408 parameters" in initial.lines
    network = make_backbone(config.model, skip_scale=config.skip_scale)
    initial.put_into(network, config)
    assert torch.equal(network.state_dict()["out.2.weight"], theirs.conv_out.weight)
    other = replace(config, init_from=str(tmp_path / "model"), model=base.model)
    with pytest.raises(
        UserError, match=r"attention_resolutions \(\) -> \(2,\); nearest to them is the UNet digits-unet"
    ):
        read_weights(other)
