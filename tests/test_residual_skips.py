"""SiD2's residual skips: one for each level of a UNet, added on the way up, with every factor a policy may give."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scalelong.model.architectures import load_backbone
from scalelong.model.diffusers_export import save_as_unet2d
from scalelong.model.residual_skips import ResidualJoin
from scalelong.model.skip_scale import ConstantScale, GivenScale, LongSkip, make_skip_scale
from scalelong.model.unet import Embedding, UNet, UNetConfig

CONFIG = UNetConfig(
    img_size=8,
    in_channels=1,
    model_channels=16,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    num_groups=8,
    skip="residual",
)
BATCH = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8), torch.tensor([1.0, 500.0])
STEP = 32


def make(policy: Any = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    return UNet(replace(CONFIG, **changes), skip_scale=policy).double().eval()


def batch() -> tuple[Tensor, Tensor]:
    return BATCH[0].double(), BATCH[1]


def alive(network: Any) -> Any:
    """With branches that do something: they begin as zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("kappa", [None, 1.0, 0.3, torch.tensor(0.3), torch.rand(2, 4)])
def test_levels_below_that_change_nothing_give_back_the_skip(kappa):
    join = ResidualJoin(nn.Upsample(scale_factor=2))
    a, b = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 6, 6)
    k = 1.0 if kappa is None else kappa if not isinstance(kappa, Tensor) or kappa.dim() == 0 else kappa[..., None, None]
    found = join(a, None, LongSkip(b, kappa, 1), a)
    torch.testing.assert_close(found, (1 - k) * join.up(a) + k * b)


@pytest.mark.parametrize(("policy", "updown"), [(ConstantScale(0.5), False), (make_skip_scale("ls"), True)])
def test_a_network_is_the_formula_written_out(policy, updown):
    network = alive(make(policy, resblock_updown=updown))
    assert len(network.skips) == network.config.num_skips == 2
    x, t = batch()
    emb: Embedding = network._embed(x, t, None)
    encoded = [network.input_blocks[0](x, emb)]
    for stage in network.input_blocks[1:]:
        encoded.append(stage(encoded[-1], emb))
    h = network.middle_block(encoded[-1], emb)
    # Two blocks a level; the lowest level's features are 4 and 5, brought down from 3, as 2 is from 1.
    for level, (b, a) in enumerate([(encoded[3], encoded[4]), (encoded[1], encoded[2])]):
        for stage in network.output_blocks[2 * level :][:2]:
            h = stage(h, emb)
        kappa = policy.scale(2 - level, 2, b, network.skip_gates)
        k = kappa[:, :, None, None] if isinstance(kappa, Tensor) else kappa
        up = network.joins[level].up
        h = (up(h - k * a, emb) if updown else up(h - k * a)) + k * b
    for stage in network.output_blocks[4:]:
        h = stage(h, emb)
    torch.testing.assert_close(network(x, t), network.out(h), rtol=0, atol=1e-12)


def test_features_flops_and_watchers_know_the_joins():
    network = alive(make(ConstantScale(0.5)))
    names = [name for name, _ in network.named_blocks()]
    assert names.index("joins.0") == names.index("output_blocks.2") - 1
    found = network.features(*batch(), blocks=["joins.0", "joins.1", -1])
    assert [x.shape[1:] for x in found.values()] == [(32, 4, 4), (16, 8, 8), (16, 8, 8)]
    seen: list[tuple[int, Any]] = []
    stop = network.watch_skips(lambda skip, output: seen.append((skip.i, skip.scale)))
    network(*batch())
    stop()
    assert seen == [(2, 0.5), (1, 1.0)]
    gradients = []
    for recompute in ("none", "blocks"):
        network.recompute = recompute
        network.zero_grad()
        network(*batch()).square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.float().to("meta")(*(x.to("meta") for x in BATCH))
    assert network.flops(2) == counter.get_total_flops()


def test_a_network_is_saved_and_loaded_but_not_as_one_of_diffusers(tmp_path):
    network = alive(make(ConstantScale(0.5)))
    network.float().save_pretrained(tmp_path)
    assert torch.equal(load_backbone(tmp_path)(*BATCH), network(*BATCH))
    with pytest.raises(ValueError, match="no skip 'residual'"):
        save_as_unet2d(network, tmp_path / "diffusers")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip": "added"}, "skip must be concatenated or residual, got 'added'"),
        ({"channel_mult": (1,), "attention_resolutions": ()}, "needs at least two"),
        ({"skip_position": "after-norm"}, "enters no norm"),
    ],
)
def test_bad_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize("policy", ["geometric", "profiled"])
def test_policies_of_concatenations_are_refused(policy):
    with pytest.raises(ValueError, match=f"'{policy}' is of concatenations, and skip 'residual' has none"):
        make(make_skip_scale(policy))
    with pytest.raises(ValueError, match="'given' has 1 factors, the network has 2 long skips"):
        make(GivenScale((1.0,)))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_two_ranks_go_on_bit_for_bit_for_fifty_steps(tmp_path):
    pytest.importorskip("deepspeed")
    from running import train_on_ranks
    from safetensors.torch import load_file

    small = ["--model.model-channels", 32, "--images-per-step", STEP, "--optimizer.warmup-images", 64]
    small += ["--sample.num-images", 1, "--sample.steps", 1, "--num-validation-images", 0, "--model.skip", "residual"]
    for run, stops in (("straight", [50]), ("resumed", [25, 50])):
        for steps in stops:
            flags = ["--zero-stage", 2, "--total-images", steps * STEP, "--run", tmp_path / run]
            train_on_ranks(2, "digits-unet", *small, *flags)

    def weights(run: str, name: str) -> dict[str, Tensor]:
        return load_file(Path(tmp_path) / run / "checkpoints" / str(50 * STEP) / f"{name}.safetensors")

    for name in ("model", "ema", "optimizer"):
        found, expected = weights("resumed", name), weights("straight", name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
