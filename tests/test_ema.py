"""Averages of the weights: their shards, the profiles of power functions, and averages made after the run."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

from running import run_on_ranks, small_config

from scalelong.model.architectures import make_backbone
from scalelong.model.presets import MODEL_PRESETS
from scalelong.model.uvit import UViT
from scalelong.train.checkpoint import _sha256
from scalelong.train.commands.ema_posthoc import main, posthoc_average
from scalelong.train.errors import UserError
from scalelong.train.loop import train
from scalelong.train.optimizer_config import LARGEST_STD
from scalelong.train.run_folder import averages_folder
from scalelong.train.zero import averages, shards
from scalelong.train.zero.averages import Profile, compose, exponent_of_std, share_of_newest


def discrete_profile(profile: Profile, num_steps: int) -> np.ndarray:
    """(num_steps,): the weight of every step in the average, by the recursion that training uses."""
    weights = np.zeros(num_steps)
    for step in range(1, profile.step + 1):
        share = share_of_newest(profile.exponent, step)
        weights *= 1 - share
        weights[step - 1] = share
    return weights


# The exponents are those that the paper's text gives for its two widths.
@pytest.mark.parametrize(("std", "exponent"), [(0.05, 16.97), (0.10, 6.94), (LARGEST_STD, 0.0)])
def test_the_exponent_of_a_width(std, exponent):
    assert exponent_of_std(std) == pytest.approx(exponent, abs=5e-3)


def test_an_averaged_network_lies_where_its_weights_do(monkeypatch):
    """Of a magnitude-preserving network also the frequencies, which are no weights."""

    def make_network():
        return make_backbone(replace(MODEL_PRESETS["digits-mpdit"], width=32, depth=2, num_heads=2))

    meta = torch.device("meta")
    with meta:
        weights = dict(make_network().named_parameters())
    monkeypatch.setattr(shards, "gathered", lambda engine, parts: weights.items())
    ema = SimpleNamespace(engine=SimpleNamespace(device=meta), averages={averages.FIXED_DECAY: []})
    network = averages.averaged_network(ema, make_network)  # pyright: ignore[reportArgumentType]
    assert len(list(network.buffers())) > 0
    assert {x.device for x in (*network.parameters(), *network.buffers())} == {meta}


def test_a_ramp_up_forgets_the_initial_weights(tmp_path):
    """Half-lives of half the steps so far: 0.5, 1, 1.5 steps, and then the decay."""
    config = small_config(tmp_path / "run", total_images=4 * 32, images_per_checkpoint=32, keep_checkpoints=6)
    optimizer = replace(config.optimizer, ema_decay=0.6, ema_rampup=0.5)
    assert train(replace(config, optimizer=optimizer)) == 0
    weights, averages = (
        [load_file(config.run / "checkpoints" / str(32 * n) / f"{name}.safetensors") for n in (1, 2, 3, 4)]
        for name in ("model", "ema")
    )
    for step, decay in ((2, 0.5), (3, 0.6), (4, 0.6)):
        for name, before in averages[step - 2].items():
            expected = torch.lerp(before, weights[step - 1][name], 1 - decay)
            torch.testing.assert_close(averages[step - 1][name], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.25])
def test_an_average_has_the_width_it_is_called_by(std):
    steps = np.arange(1, 5001)
    weights = discrete_profile(Profile(5000, exponent_of_std(std)), 5000)
    mean = weights @ steps
    assert weights.sum() == pytest.approx(1)
    assert np.sqrt(weights @ (steps - mean) ** 2) / 5000 == pytest.approx(std, rel=1e-3)


def test_each_step_has_its_part_of_the_profile_exactly():
    exponent = exponent_of_std(0.1)
    steps = np.arange(1, 101)
    expected = (steps / 100) ** (exponent + 1) - ((steps - 1) / 100) ** (exponent + 1)
    np.testing.assert_allclose(discrete_profile(Profile(100, exponent), 100), expected, rtol=1e-10, atol=1e-18)


def kept_profiles(num_times: int, num_steps: int = 400) -> list[Profile]:
    times = [num_steps * (i + 1) // num_times for i in range(num_times)]
    return [Profile(time, exponent_of_std(std)) for time in times for std in (0.05, 0.1)]


@pytest.mark.parametrize(("std", "largest"), [(0.05, 1e-6), (0.06, 0.003), (0.08, 0.003), (0.1, 1e-6), (0.15, 0.01)])
def test_twenty_times_of_two_widths_span_other_widths(std, largest):
    kept = kept_profiles(20)
    wanted = Profile(400, exponent_of_std(std))
    coefficients, error = compose(kept, wanted)
    made = sum(c * discrete_profile(p, 400) for c, p in zip(coefficients, kept, strict=True))
    expected = discrete_profile(wanted, 400)
    assert coefficients.sum() == pytest.approx(1, abs=1e-9)
    assert error < largest
    # The steps' weights are integrals of the profiles over the steps, which can only be closer.
    assert np.linalg.norm(made - expected) / np.linalg.norm(expected) < 1.05 * error + 1e-6


def test_the_error_of_a_profile_out_of_reach_is_told():
    assert compose(kept_profiles(4), Profile(400, exponent_of_std(0.01)))[1] > 0.3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Forty steps that keep the averages of two widths twenty times, and a third width as the one to compare with."""
    base = small_config(tmp_path_factory.mktemp("ema") / "run")
    optimizer = replace(base.optimizer, ema_stds=(0.05, 0.1, 0.08), learning_rate=1e-2)
    assert train(replace(base, total_images=40 * 32, images_per_average=64, optimizer=optimizer)) == 0
    return base.run


def without_width(run, name, tmp_path):
    """A copy of the run's averages that never kept one of the widths."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for folder in averages_folder(copy).iterdir():
        state = json.loads((folder / "state.json").read_text())
        del state["exponents"][name]
        (folder / "state.json").write_text(json.dumps(state))
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["sha256"][f"{name}.safetensors"]
        manifest["sha256"]["state.json"] = _sha256(folder / "state.json")
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / f"{name}.safetensors").unlink()
    return copy


def numbers_after(words: str, printed: str) -> list[int]:
    return [int(number) for found in re.findall(rf"{words} (.*)", printed) for number in found.split()]


def relative_distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], origin: dict[str, torch.Tensor]) -> float:
    """Of a from b, over how far b has moved from the origin."""
    a_flat, b_flat, origin_flat = (torch.cat([x[name].flatten() for name in sorted(b)]) for x in (a, b, origin))
    return float((a_flat - b_flat).norm() / (b_flat - origin_flat).norm())


@pytest.mark.slow
@pytest.mark.parametrize(("at", "largest"), [(None, 2e-3), (640, 2e-3)])
def test_an_average_made_after_the_run_is_the_one_kept_during_it(run, tmp_path, at, largest):
    made, error = posthoc_average(without_width(run, "ema-0.08", tmp_path), 0.08, at=at)
    kept = load_file(run / "averages" / str(at or 1280) / "ema-0.08.safetensors")
    other = load_file(run / "averages" / str(at or 1280) / "ema-0.1.safetensors")
    first = load_file(run / "averages" / "64" / "ema-0.1.safetensors")
    assert error < 0.02
    assert relative_distance(made, kept, first) < largest
    assert relative_distance(other, kept, first) > 10 * largest


@pytest.mark.slow
def test_averages_are_in_checkpoints_and_resuming_keeps_their_bits(run, tmp_path):
    base = small_config(tmp_path / "run")
    optimizer = replace(base.optimizer, ema_stds=(0.05, 0.1, 0.08), learning_rate=1e-2)
    config = replace(base, images_per_average=64, optimizer=optimizer)
    for steps, stage in ((15, 0), (40, 0)):
        train(replace(config, total_images=steps * 32, zero_stage=stage))
    for name in ("ema", "ema-0.05", "ema-0.1", "ema-0.08"):
        files = [r / "checkpoints/1280" / f"{name}.safetensors" for r in (run, config.run)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert (config.run / "averages/1280/ema-0.05.safetensors").read_bytes() == (
        run / "averages/1280/ema-0.05.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_the_command_writes_a_model(run, tmp_path, capsys):
    main([str(run), "--std", "0.07", "--out", str(tmp_path / "model")])
    assert re.search(r"profile met within 0\.\d+ %", capsys.readouterr().out)
    model = UViT.from_pretrained(tmp_path / "model")
    weights, _ = posthoc_average(run, 0.07)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    for arguments, words in (
        (["--std", "0.5"], "--std must be in"),
        (["--std", "0.002"], "miss the profile"),
        (["--std", "0.07", "--at", "65"], "no whole averages"),
    ):
        with pytest.raises(UserError, match=words):
            main([str(run), *arguments, "--out", str(tmp_path / "other")])


@pytest.mark.slow
def test_damaged_averages_are_passed_over(run, tmp_path, capsys):
    copy = without_width(run, "ema-0.08", tmp_path)
    damaged = copy / "averages/640/ema-0.05.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    _, error = posthoc_average(copy, 0.08)
    assert "averages/640: ema-0.05.safetensors is not what was written" in capsys.readouterr().err
    assert error < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_shards_of_an_average_have_the_bits_of_the_whole(stage):
    outputs = run_on_ranks(2, "sharded_ema.py", stage)
    num_tensors, whole, *_ = numbers_after("elements", outputs[0])
    held = [numbers_after(r"held \d", out) for out in outputs]
    for average in zip(*held, strict=True):
        if stage == 0:
            assert average == (whole, whole)
        else:
            # Stage 3 pads each tensor to a multiple of the ranks.
            assert whole <= sum(average) <= whole + (num_tensors if stage == 3 else 0)
            assert max(average) < 0.51 * whole
