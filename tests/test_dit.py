from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import assert_networks_within_budget
from samples import each_value_once
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scalelong.bench.published_dit import as_published
from scalelong.bench.timing import peak_bytes
from scalelong.model.dit import TOLD, DiT, DiTConfig, position_embedding
from scalelong.model.dit_config import MODULATIONS
from scalelong.model.presets import DIT_PRESETS
from scalelong.model.recompute import kept_parts
from scalelong.model.skip_scale import SKIP_SCALE_NAMES, Unscaled, make_skip_scale

# fmt: off
PUBLISHED = {  # width, depth, heads, tokens, parameters / 1e6 (without the positions), multiply-adds / 1e9
    "imagenet256-dit-s2":  ( 384, 12,  6,  256,   "33",   6.06),
    "imagenet256-dit-s4":  ( 384, 12,  6,   64,   "33",   1.41),
    "imagenet256-dit-s8":  ( 384, 12,  6,   16,   "33",   0.36),
    "imagenet256-dit-b2":  ( 768, 12, 12,  256,  "130",  23.01),
    "imagenet256-dit-b4":  ( 768, 12, 12,   64,  "130",   5.56),
    "imagenet256-dit-b8":  ( 768, 12, 12,   16,  "131",   1.42),
    "imagenet256-dit-l2":  (1024, 24, 16,  256,  "458",  80.71),
    "imagenet256-dit-l4":  (1024, 24, 16,   64,  "458",  19.70),
    "imagenet256-dit-l8":  (1024, 24, 16,   16,  "459",   5.01),
    "imagenet256-dit-xl2": (1152, 28, 16,  256,  "675", 118.64),
    "imagenet256-dit-xl4": (1152, 28, 16,   64,  "675",  29.05),
    "imagenet256-dit-xl8": (1152, 28, 16,   16,  "676",   7.39),
    "imagenet512-dit-xl2": (1152, 28, 16, 1024,  "675", 524.60),
}
# fmt: on

PLAIN = DiTConfig(img_size=16, patch_size=2, width=64, depth=4, num_heads=4, num_classes=7)
NORMED, PROJECTED = replace(PLAIN, skip="layer-norm"), replace(PLAIN, skip="plain")
each_skip = pytest.mark.parametrize("config", [NORMED, PROJECTED], ids=lambda config: config.skip)
each_form = pytest.mark.parametrize("config", [PLAIN, NORMED, PROJECTED], ids=lambda config: config.skip)
each_modulation = pytest.mark.parametrize("modulation", MODULATIONS)
each_mode = pytest.mark.parametrize("mode", SKIP_SCALE_NAMES)


def make_model(config: DiTConfig, mode: str = "none", **more: Any) -> DiT:
    """No parameter at 0, so that every one matters."""
    model = DiT(config, skip_scale=make_skip_scale(mode, 0.7), **more)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def make_batch(config: DiTConfig = PLAIN, B: int = 3) -> tuple[Tensor, ...]:
    x, t = torch.randn(B, config.in_channels, config.img_size, config.img_size), torch.linspace(0, 999, B)
    return (x, t, torch.arange(B) % config.num_classes) if config.num_classes else (x, t)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    *shape, millions, gmacs = PUBLISHED[name]
    config = DIT_PRESETS[name]
    with torch.device("meta"):
        model = DiT(config)
    assert [config.width, config.depth, config.num_heads, config.num_tokens] == shape
    assert f"{model.num_params() / 1e6:.0f}" == millions
    assert model.flops() / 2e9 == pytest.approx(gmacs, rel=0.006)


def test_the_largest_has_the_published_number_of_parameters():
    """675,129,632 with the fixed positions, which the published network counts."""
    with torch.device("meta"):
        model = DiT(DIT_PRESETS["imagenet256-dit-xl2"])
    assert model.num_params() + model.pos_embed.numel() == 675_129_632


@pytest.mark.parametrize(
    "config",
    [
        *(*DIT_PRESETS.values(), NORMED, PROJECTED),
        replace(PLAIN, depth=5, skip="plain", mlp_ratio=2.5, num_classes=0),
        *(replace(PLAIN, modulation=modulation) for modulation in MODULATIONS[1:]),
    ],
    ids=[*DIT_PRESETS, "layer-norm", "plain", "odd-depth", *MODULATIONS[1:]],
)
def test_flops_are_those_that_torch_counts(config):
    with torch.device("meta"):
        model, inputs = DiT(config), make_batch(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    assert model.flops(batch_size=3) == counter.get_total_flops()


@each_skip
def test_flops_of_the_fused_operators_are_counted(config):
    model = DiT(config)
    # The kernel that attention takes on a CPU is not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*make_batch(B=2))
    assert counter.get_total_flops() == model.flops(batch_size=2)


PARAMETERS = {"adaln": 32.850, "scale-rot": 31.007, "rot": 27.320, "scale": 29.163}
"""Of DiT-S/4 on latents of 4 x 16 x 16 with 1,000 classes, in millions, as a magnitude-preserving network counts
(arXiv:2505.19122): no biases, weights of a constant among the inputs, a scalar gain for each part of a modulation and
for the output."""


@each_modulation
def test_parameters_of_each_modulation(modulation):
    config = replace(DIT_PRESETS["imagenet256-dit-s4"], img_size=16, modulation=modulation)
    assert (config.in_channels, config.channels_out, config.num_classes) == (4, 8, 1001)  # one row for the null label
    with torch.device("meta"):
        model = DiT(config)
        published = DiT(replace(config, modulation="adaln"))
    weights, num_parts = sum(p.numel() for p in model.parameters() if p.dim() > 1), len(TOLD[modulation])
    gains = 2 * config.depth * (num_parts + 1) + num_parts + 1
    assert f"{(weights + config.width + gains) / 1e6:.3f}" == f"{PARAMETERS[modulation]:.3f}"
    saved = {"adaln": 0, "scale-rot": 1, "rot": 3, "scale": 2}[modulation] * (config.width + 1) * config.width // 2
    assert published.num_params() - model.num_params() == (2 * config.depth + 1) * saved


def test_positions_are_those_of_the_column_then_of_the_row():
    side, width = 3, 16
    omega = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    for n, found in enumerate(position_embedding(side, width).numpy()):
        row, column = divmod(n, side)
        expected = [f(place * omega) for place in (column, row) for f in (np.sin, np.cos)]
        np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-7)


@each_value_once("skip, modulation", ("none", "layer-norm", "plain"), MODULATIONS)
def test_the_prediction_begins_as_zero_and_each_block_as_the_identity(skip, modulation):
    config = replace(PLAIN, skip=skip, modulation=modulation)
    model, batch = DiT(config), make_batch()
    assert not model(*batch).any()
    first = model.features(*batch, blocks=[0])[0]
    torch.testing.assert_close(first, model.x_embedder(batch[0]) + model.pos_embed)


@pytest.mark.parametrize(("turning", "other"), [("scale-rot", "scale"), ("rot", None)])
@torch.no_grad()
def test_at_zero_angles_the_network_is_the_one_without(turning, other):
    """To the bit."""
    model = make_model(replace(PLAIN, modulation=turning))
    without = DiT(replace(PLAIN, modulation=other or "scale"))
    state = dict(model.state_dict())
    width, kept = PLAIN.width, ("gain", "gate")
    for name, p in model.named_parameters():
        if "adaLN_modulation" not in name:
            continue
        parts = (["gain"] if other else []) + ["angle"] + ([] if "final" in name else ["gate"])
        sizes = [width // 2 if part == "angle" else width for part in parts]
        halves = [dict(zip(parts, half.split(sizes), strict=True)) for half in p.chunk(1 if "final" in name else 2)]
        for half in halves:
            half["angle"].zero_()
            half.setdefault("gain", torch.zeros(width, *p.shape[1:]))
        order = [part for part in kept if part in halves[0]]
        state[name] = torch.cat([half[part] for half in halves for part in order])
    without.load_state_dict(state)
    batch = make_batch()
    assert torch.equal(model(*batch), without(*batch))
    model.get_parameter("blocks.0.adaLN_modulation.1.bias").add_(0.1)
    assert not torch.equal(model(*batch), without(*batch))


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
@each_skip
def test_each_block_of_the_second_half_takes_in_one_of_the_first(config, depth):
    model = make_model(replace(config, depth=depth), "cs")
    seen, batch = {}, make_batch()
    model.watch_skips(lambda skip, output: seen.update({skip.i: skip.features}))
    features = model.features(*batch, blocks=range(depth))
    num_skips = depth // 2
    assert [i for i, _ in model.skip_blocks()] == list(range(num_skips, 0, -1)) == list(seen)
    assert all(block is model.blocks[depth - i] for i, block in model.skip_blocks())
    assert all(torch.equal(seen[i], features[i - 1]) for i in seen)


@each_mode
@each_skip
@torch.no_grad()
def test_skips_are_what_the_policy_scales(config, mode):
    model, unscaled = make_model(config, mode), DiT(config)
    unscaled.load_state_dict(model.state_dict(), strict=False)
    batch = make_batch()
    assert torch.equal(model(*batch), unscaled(*batch)) == (mode == "none")
    if config.skip == "plain" and mode != "geometric":  # which scales the stream too
        for network in (model, unscaled):
            for _, block in network.skip_blocks():
                block.get_parameter("skip_linear.weight")[:, config.width :] = 0
        torch.testing.assert_close(model(*batch), unscaled(*batch))


@each_mode
@each_skip
def test_gradients_reach_every_parameter(config, mode):
    model = make_model(replace(config, qk_norm=True), mode)
    model(*make_batch()).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def output_and_gradients(model: nn.Module, batch: tuple[Tensor, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """By autocast in bf16, as in training; truths in fp64."""
    x, *others = batch
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    if dtype == torch.float64:
        leaves = {name: p.detach().double().requires_grad_() for name, p in leaves.items()}
        x, noise = x.double(), noise.double()
        model = model.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = functional_call(model, leaves, (x, *others))
        loss = F.mse_loss(output.to(noise.dtype), noise)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    model.float()
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        *((PLAIN, "none"), (NORMED, "ls"), (PROJECTED, "cs"), (PROJECTED, "ls")),
        (replace(PLAIN, modulation="rot"), "none"),
        (replace(PROJECTED, modulation="scale"), "geometric"),
        (replace(NORMED, modulation="scale-rot"), "cs"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.skip}-{value.modulation}",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_outputs_and_gradients_of_every_parameter_are_within_budget(dtype, config, mode):
    ours = make_model(config, mode)
    networks = {"ours": ours, "plain": as_published(ours)}
    batches = [make_batch() for _ in range(4 if dtype == torch.bfloat16 else 1)]
    assert_networks_within_budget(
        lambda name, batch, dtype: output_and_gradients(networks[name], batch, dtype),
        batches,
        dtype,
        gates="skip_gates.",
    )


@each_form
def test_a_step_needs_less_memory_than_the_plain_network(config):
    config = replace(config, img_size=32)
    model, batch = make_model(config), make_batch(config)
    mine, plain = (
        peak_bytes(lambda network=network: network(*batch).sum().backward(), (), "cpu")
        for network in (model, as_published(model))
    )
    assert mine < 0.85 * plain


@each_value_once("skip, modulation", ("none", "layer-norm", "plain"), MODULATIONS)
@torch.no_grad()
def test_saved_models_come_back_the_same(tmp_path, skip, modulation):
    config = replace(PLAIN, skip=skip, modulation=modulation)
    model = make_model(config, "none" if skip == "none" else "ls")
    model.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    assert (loaded.config, loaded.skip_scale, loaded.training) == (config, model.skip_scale, False)
    batch = make_batch()
    assert torch.equal(loaded(*batch), model(*batch))


@pytest.mark.parametrize("assign", [False, True])
@torch.no_grad()
def test_parameters_alone_are_a_whole_state(assign):
    """As a run's checkpoint has them: positions are made anew, also where the network has no memory yet."""
    model, batch = make_model(PLAIN), make_batch()
    with torch.device("meta" if assign else "cpu"):
        loaded = DiT(PLAIN)
    loaded.load_state_dict(dict(model.named_parameters()), assign=assign)
    assert torch.equal(loaded(*batch), model(*batch))
    with pytest.raises(RuntimeError, match=r"Missing key.*final_layer.linear.bias"):
        loaded.load_state_dict({k: v for k, v in model.state_dict().items() if k != "final_layer.linear.bias"})


@torch.no_grad()
def test_a_network_that_was_without_memory_begins_as_one_that_was_not():
    with torch.device("meta"):
        model = DiT(PLAIN)
    model.to_empty(device="cpu").init_weights()
    assert torch.equal(model.pos_embed, DiT(PLAIN).pos_embed)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_share_of_what_backward_reads_may_be_kept(share):
    model, batch = make_model(NORMED, "cs"), make_batch()
    expected = output_and_gradients(model, batch, torch.float32)
    model.recompute = share
    for name, x in output_and_gradients(model, batch, torch.float32).items():
        torch.testing.assert_close(x, expected[name])
    assert "attention" in kept_parts(share, PLAIN.block_memory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "img_size 16 is no multiple of patch_size 3"),
        ({"num_heads": 5}, "width 64 is no multiple of num_heads 5"),
        ({"width": 62, "num_heads": 2}, "width must be a multiple of 4 .* got 62"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"depth": 1, "skip": "plain"}, "long skips need a depth of at least 2, got 1"),
        (
            {"width": 63, "num_heads": 3, "modulation": "scale-rot"},
            "scale-rot rotates pairs: width must be even, got 63",
        ),
        ({"width": 63, "num_heads": 3, "modulation": "rot"}, "modulation rot rotates pairs"),
        ({"modulation": "turn"}, "modulation must be one of adaln, scale-rot, rot, scale, got 'turn'"),
        ({"skip": "add"}, "skip must be one of none, layer-norm, plain, got 'add'"),
        ({"context_tokens": 77}, "takes class labels, no text"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused_with_its_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **change)


def test_a_policy_on_a_network_without_skips_is_refused():
    with pytest.raises(ValueError, match=r"skip scale 'cs', but this DiT has no long skips \(model.skip\)"):
        DiT(PLAIN, skip_scale=make_skip_scale("cs"))
    assert DiT(PLAIN).skip_scale == DiT(PLAIN, skip_scale=Unscaled()).skip_scale


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.randn(2, 3, 8, 8), torch.ones(2), torch.zeros(2).long()), r"expected images of shape \(3, 16, 16\)"),
        ((torch.randn(2, 3, 16, 16), torch.ones(2)), "labels are missing"),
    ],
    ids=["image", "labels"],
)
def test_inputs_that_do_not_fit_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        DiT(PLAIN)(*batch)
    with pytest.raises(ValueError, match="takes no labels"):
        DiT(replace(PLAIN, num_classes=0))(*make_batch())
