"""Given factors of skips, and such as are measured: by one batch, of any network, and by a run when it starts."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scalelong.model.architectures import load_backbone
from scalelong.model.dit import DiT, DiTConfig
from scalelong.model.skip_profile import profile_skips
from scalelong.model.skip_scale import ConstantScale, GivenScale, LongSkip, ProfiledScale, make_skip_scale
from scalelong.model.unet import UNet, UNetConfig
from scalelong.model.uvit import UViT, UViTConfig

SIZES: dict[str, Any] = {"img_size": 8, "in_channels": 1}
TRANSFORMER: dict[str, Any] = {**SIZES, "patch_size": 2, "width": 32, "num_heads": 2}
NETWORKS: dict[str, Any] = {
    "uvit": (UViT, UViTConfig(**TRANSFORMER, depth=6)),
    "dit": (DiT, DiTConfig(**TRANSFORMER, depth=4, skip="plain")),
    "unet": (UNet, UNetConfig(**SIZES, model_channels=16, channel_mult=(1, 2), num_res_blocks=1, num_groups=8)),
}
STEP = 32
BATCH = torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8), torch.tensor([1.0, 500.0, 900.0])


def make(name: str, policy: Any = None) -> Any:
    torch.manual_seed(0)
    kind, config = NETWORKS[name]
    return kind(config, skip_scale=policy)


def shares_of(network: Any) -> list[float]:
    """Of the energy of each concatenation, the skip's, i = 1 first."""
    found: dict[int, float] = {}

    def look(_block: Any, inputs: tuple[Any, ...]) -> None:
        skip: Any = next(x for x in inputs if isinstance(x, LongSkip))
        of_h, of_s = (x.double().square().sum().item() for x in (inputs[0], skip.scale * skip.features))
        found[skip.i] = of_s / (of_h + of_s)

    for _, block in network.skip_blocks():
        block.register_forward_pre_hook(look)
    network(*BATCH)
    return [found[i] for i in sorted(found)]


@pytest.mark.parametrize(("name", "share"), [("uvit", 0.2), ("dit", 0.5), ("unet", 0.3)])
def test_each_skip_makes_up_the_share_that_is_asked_for(name, share):
    measured, plain = make(name, ConstantScale(0.5)), make(name, ConstantScale(0.5))
    factors = profile_skips(measured, lambda: measured(*BATCH), share=share)
    assert len(factors) == len(measured.skips)
    assert torch.equal(measured(*BATCH), plain(*BATCH))  # nothing of it stays
    shares = shares_of(make(name, GivenScale(factors)))
    assert shares == pytest.approx([share] * len(factors), rel=1e-4)


def test_given_factors_are_those_of_the_skips_and_are_saved(tmp_path):
    by_power, given = make("uvit", ConstantScale(0.5)), make("uvit", GivenScale((1.0, 0.5, 0.25)))
    assert torch.equal(given(*BATCH), by_power(*BATCH))
    given.save_pretrained(tmp_path)
    assert load_backbone(tmp_path).skip_scale == GivenScale((1.0, 0.5, 0.25))
    assert make_skip_scale("given", factors=(0.5,)) == GivenScale((0.5,))
    unmeasured = make("uvit", ProfiledScale(share=0.3))
    assert torch.equal(unmeasured(*BATCH), make("uvit")(*BATCH))


def test_bad_factors_and_networks_are_refused():
    with pytest.raises(ValueError, match="'given' has 2 factors, the network has 3 long skips"):
        make("uvit", GivenScale((1.0, 0.5)))
    with pytest.raises(ValueError, match=r"'given' has no factors \(skip-scale.factors\), the network has 3"):
        make("uvit", GivenScale())
    with pytest.raises(ValueError, match="'profiled' has 1 factors"):
        make("uvit", ProfiledScale((1.0,)))
    for factor in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="finite and not negative"):
            GivenScale((1.0, factor))
    with pytest.raises(ValueError, match=r"share of a skip must lie in \(0, 1\), got 1"):
        ProfiledScale(share=1)
    without = DiT(DiTConfig(**TRANSFORMER, depth=4))
    with pytest.raises(ValueError, match="no long skips to measure"):
        profile_skips(without, lambda: without(*BATCH))
    network = make("uvit")
    with pytest.raises(ValueError, match="0 of 3 long skips were run"):
        profile_skips(network, lambda: None)
    with pytest.raises(ValueError, match="'given', but this DiT has no long skips"):
        DiT(DiTConfig(**TRANSFORMER, depth=4), skip_scale=GivenScale((1.0,)))


def run_factors(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())["model"]["skip_scale"]


@pytest.mark.slow
def test_a_run_measures_once_and_goes_on_bit_for_bit(tmp_path):
    """With other methods whose state has to come back: Muon, and singular values that are followed."""
    pytest.importorskip("deepspeed")
    from running import small_config
    from safetensors.torch import load_file

    from scalelong.train.errors import UserError
    from scalelong.train.loop import train

    def trained(run: str, steps: int, share: float = 0.25) -> dict[str, Tensor]:
        values = {"skip_scale": ProfiledScale(share=share), "num_validation_images": 0, "zero_stage": 3}
        config = small_config(tmp_path / run, total_images=STEP * steps, **values)
        config = replace(config, sample=replace(config.sample, num_images=1, steps=1))
        config = replace(config, optimizer=replace(config.optimizer, kind="muon"))
        assert train(replace(config, model=replace(config.model, linear="sigma-reparam"))) == 0
        folder = tmp_path / run / "checkpoints" / str(STEP * steps)
        files = ("model", "ema", "optimizer")
        return {f"{file} {n}": x for file in files for n, x in load_file(folder / f"{file}.safetensors").items()}

    straight = trained("straight", 2)
    found = run_factors(tmp_path / "straight")
    assert (found["kind"], found["share"], len(found["factors"])) == ("profiled", 0.25, 1)
    assert found["factors"][0] > 0
    trained("resumed", 1)
    resumed = trained("resumed", 2)
    assert run_factors(tmp_path / "resumed") == found
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())
    with pytest.raises(UserError, match=r"--skip-scale.share 0.25 -> 0.5"):
        trained("resumed", 3, share=0.5)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_two_ranks_measure_once_and_go_on_bit_for_bit_for_fifty_steps(tmp_path):
    pytest.importorskip("deepspeed")
    from running import SMALL, train_on_ranks
    from safetensors.torch import load_file

    for run, stops in (("straight", [50]), ("resumed", [25, 50])):
        for steps in stops:
            flags = ["--zero-stage", 2, "--total-images", steps * STEP, "--model.depth", 4, "--skip-scale", "profiled"]
            train_on_ranks(2, "digits-uvit", *SMALL, *flags, "--run", tmp_path / run)
    found = run_factors(tmp_path / "straight")
    assert run_factors(tmp_path / "resumed") == found
    assert len(set(found["factors"])) == 2
    for name in ("model", "ema", "optimizer"):
        resumed, straight = (
            load_file(tmp_path / run / "checkpoints" / str(50 * STEP) / f"{name}.safetensors")
            for run in ("resumed", "straight")
        )
        assert all(torch.equal(resumed[key], straight[key]) for key in straight)


def test_the_command_line_takes_factors_and_refuses_another_number(tmp_path):
    pytest.importorskip("deepspeed")
    from scalelong.train.command_line import parse_train_arguments
    from scalelong.train.errors import UserError

    def policy_of(*flags: str) -> Any:
        return parse_train_arguments(["digits-uvit", "--model.depth", "4", *flags]).skip_scale

    assert policy_of("--skip-scale", "given", "--skip-scale.factors", "1", "0.5") == GivenScale((1.0, 0.5))
    assert policy_of("--skip-scale", "profiled", "--skip-scale.share", "0.2") == ProfiledScale(share=0.2)
    with pytest.raises(UserError, match="'given' has 1 factors, the network has 2 long skips"):
        policy_of("--skip-scale", "given", "--skip-scale.factors", "1")
