"""Public checkpoints of ADM give the published outputs: our model against a plain re-statement of the network."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from scalelong.model.adm_checkpoint import load_adm_checkpoint
from scalelong.model.skip_scale import ConstantScale, LearnedScale

WIDTH, GROUPS = 32, 32
SIZES: dict[str, Any] = {
    "image_size": 16,
    "num_res_blocks": 2,
    "channel_mult": (1, 2, 3),
    "attention_resolutions": (2, 4),
    "num_head_channels": 16,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "imagenet-64": {},
    "new-attention-order": {"use_new_attention_order": True},
    "strided": {"use_scale_shift_norm": False, "resblock_updown": False},
    "heads-by-number": {"num_head_channels": -1, "num_heads": 4},
    "attention-at-full-size": {"channel_mult": (1, 1, 2), "attention_resolutions": (1,)},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


class Published:
    """guided-diffusion's UNetModel, written out over a raw state dict; without one, it makes one as it goes."""

    def __init__(self, options: dict[str, Any], state: dict[str, Tensor] | None = None, kappa: float | None = None):
        self.options = {"use_new_attention_order": False, "num_heads": 1, **options}
        self.is_new, self.state, self.kappa = state is None, state or {}, kappa

    def parameter(self, name: str, *shape: int) -> Tensor:
        if self.is_new:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 4
            self.state[name] = torch.randn(shape, dtype=torch.float64) / fan_in**0.5
        assert self.state[name].shape == shape, name
        return self.state[name]

    def linear(self, name: str, x: Tensor, width: int) -> Tensor:
        return x @ self.parameter(f"{name}.weight", width, x.shape[1]).T + self.parameter(f"{name}.bias", width)

    def conv(self, name: str, x: Tensor, channels: int, size: int = 3, stride: int = 1) -> Tensor:
        weight = self.parameter(f"{name}.weight", channels, x.shape[1], size, size)
        return F.conv2d(x, weight, self.parameter(f"{name}.bias", channels), stride=stride, padding=size // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        grouped = x.reshape(len(x), GROUPS, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        y = (centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
        over_space = (None, slice(None)) + (None,) * (x.dim() - 2)
        C = x.shape[1]
        return y * self.parameter(f"{name}.weight", C)[over_space] + self.parameter(f"{name}.bias", C)[over_space]

    def resblock(self, name: str, x: Tensor, emb: Tensor, channels: int, resample: str | None = None) -> Tensor:
        def resampled(h: Tensor) -> Tensor:
            if resample == "up":
                return h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            if resample == "down":
                return (h[:, :, ::2, ::2] + h[:, :, 1::2, ::2] + h[:, :, ::2, 1::2] + h[:, :, 1::2, 1::2]) / 4
            return h

        h = resampled(F.silu(self.norm(f"{name}.in_layers.0", x)))
        h = self.conv(f"{name}.in_layers.2", h, channels)
        if self.options["use_scale_shift_norm"]:
            gain, shift = self.linear(f"{name}.emb_layers.1", F.silu(emb), 2 * channels)[:, :, None, None].chunk(2, 1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + gain) + shift
        else:
            h = h + self.linear(f"{name}.emb_layers.1", F.silu(emb), channels)[:, :, None, None]
            h = self.norm(f"{name}.out_layers.0", h)
        h = self.conv(f"{name}.out_layers.3", F.silu(h), channels)
        x = resampled(x)
        return h + (x if x.shape[1] == channels else self.conv(f"{name}.skip_connection", x, channels, size=1))

    def attend(self, name: str, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        flat = x.reshape(B, C, H * W)
        normed = self.norm(f"{name}.norm", flat)
        qkv = torch.einsum("oc,bct->bot", self.parameter(f"{name}.qkv.weight", 3 * C, C, 1)[:, :, 0], normed)
        qkv = qkv + self.parameter(f"{name}.qkv.bias", 3 * C)[:, None]
        width = self.options["num_head_channels"]
        heads = self.options["num_heads"] if width == -1 else C // width
        if self.options["use_new_attention_order"]:
            q, k, v = (part.reshape(B, heads, C // heads, -1) for part in qkv.split(C, dim=1))
        else:
            q, k, v = qkv.reshape(B, heads, 3 * C // heads, -1).split(C // heads, dim=2)
        weights = torch.softmax(torch.einsum("bhct,bhcs->bhts", q, k) / math.sqrt(C // heads), dim=-1)
        mixed = torch.einsum("bhts,bhcs->bhct", weights, v).reshape(B, C, H * W)
        update = torch.einsum("oc,bct->bot", self.parameter(f"{name}.proj_out.weight", C, C, 1)[:, :, 0], mixed)
        return (flat + update + self.parameter(f"{name}.proj_out.bias", C)[:, None]).reshape(x.shape)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None, out_channels: int = 6, num_classes: int = 9) -> Tensor:
        o = self.options
        frequencies = torch.exp(-math.log(10000) * torch.arange(WIDTH // 2, dtype=torch.float64) / (WIDTH // 2))
        angles = t[:, None] * frequencies
        emb = self.linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=1), 4 * WIDTH)
        emb = self.linear("time_embed.2", F.silu(emb), 4 * WIDTH)
        if y is not None:
            emb = emb + self.parameter("label_emb.weight", num_classes, 4 * WIDTH)[y]
        h = self.conv("input_blocks.0.0", x, WIDTH * o["channel_mult"][0])
        skips, factor, place = [h], 1, 0
        for level, mult in enumerate(o["channel_mult"]):
            for _ in range(o["num_res_blocks"]):
                place += 1
                h = self.resblock(f"input_blocks.{place}.0", h, emb, WIDTH * mult)
                if factor in o["attention_resolutions"]:
                    h = self.attend(f"input_blocks.{place}.1", h)
                skips.append(h)
            if level < len(o["channel_mult"]) - 1:
                place, factor = place + 1, 2 * factor
                if o["resblock_updown"]:
                    h = self.resblock(f"input_blocks.{place}.0", h, emb, h.shape[1], "down")
                else:
                    h = self.conv(f"input_blocks.{place}.0.op", h, h.shape[1], stride=2)
                skips.append(h)
        h = self.resblock("middle_block.0", h, emb, h.shape[1])
        h = self.attend("middle_block.1", h)
        h = self.resblock("middle_block.2", h, emb, h.shape[1])
        place = 0
        for level, mult in reversed(list(enumerate(o["channel_mult"]))):
            for n in range(o["num_res_blocks"] + 1):
                skip = skips.pop()
                if self.kappa is not None:
                    skip = skip * self.kappa ** len(skips)
                h = self.resblock(f"output_blocks.{place}.0", torch.cat([h, skip], 1), emb, WIDTH * mult)
                last = 1
                if factor in o["attention_resolutions"]:
                    h, last = self.attend(f"output_blocks.{place}.1", h), 2
                if level > 0 and n == o["num_res_blocks"]:
                    factor //= 2
                    if o["resblock_updown"]:
                        h = self.resblock(f"output_blocks.{place}.{last}", h, emb, h.shape[1], "up")
                    else:
                        h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                        h = self.conv(f"output_blocks.{place}.{last}.conv", h, h.shape[1])
                place += 1
        return self.conv("out.2", F.silu(self.norm("out.0", h)), out_channels)


def make_batch(labels: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    t = torch.tensor([3.0, 977.0], dtype=torch.float64)
    return x, t, torch.tensor([8, 0]) if labels else None


def make_state(options: dict[str, Any], labels: bool = True) -> dict[str, Tensor]:
    published = Published(options)
    published(*make_batch(labels))
    return published.state


@each_variant
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no-labels"])
def test_outputs_are_the_published_ones(variant, labels):
    options = SIZES | VARIANTS[variant]
    state = make_state(options, labels)
    model, batch = load_adm_checkpoint(state, **options), make_batch(labels)
    assert (model.config.out_channels, model.config.num_classes, model.training) == (6, 9 if labels else 0, False)
    torch.testing.assert_close(model(*batch), Published(options, state)(*batch), rtol=1e-9, atol=1e-9)


@each_variant
def test_the_state_dict_is_the_published_one(variant):
    options = SIZES | VARIANTS[variant]
    state = make_state(options)
    ours = load_adm_checkpoint(state, **options).state_dict()
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], state[name]) for name in state)


def test_skips_are_scaled_where_asked():
    state, batch = make_state(SIZES), make_batch()
    model = load_adm_checkpoint(state, **SIZES, skip_scale="cs", kappa=0.7)
    assert model.skip_scale == ConstantScale(0.7)
    torch.testing.assert_close(model(*batch), Published(SIZES, state, kappa=0.7)(*batch), rtol=1e-9, atol=1e-9)


def test_learned_gates_are_made_anew_and_read_again():
    state, batch = make_state(SIZES), make_batch()
    model = load_adm_checkpoint(state, **SIZES, skip_scale="ls")
    assert model.skip_scale == LearnedScale()
    gates = {name: p for name, p in model.named_parameters() if name.startswith("skip_gates.")}
    assert gates
    assert all(p.dtype == torch.float64 and p.requires_grad and p.isfinite().all() for p in gates.values())
    again = load_adm_checkpoint(model.state_dict(), **SIZES, skip_scale="ls")
    assert torch.equal(again(*batch), model(*batch))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_are_read(tmp_path, suffix):
    state, path = make_state(SIZES), tmp_path / f"64x64_diffusion{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    for source in (path, str(path)):
        loaded = load_adm_checkpoint(source, **SIZES).state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_checkpoint_half_in_fp16_becomes_fp32():
    state = {name: x.half() if x.dim() > 2 else x.float() for name, x in make_state(SIZES).items()}
    model = load_adm_checkpoint(state, **SIZES)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_model_shares_no_memory_with_the_tensors():
    state = make_state(SIZES)
    model = load_adm_checkpoint(state, **SIZES)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert all(x.any() for x in state.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_mult": (1, 2, 4)}, "has shape"),
        ({"channel_mult": (1, 2), "attention_resolutions": (2,)}, "not a UNet checkpoint"),
        ({"num_res_blocks": 3}, "not a UNet checkpoint: it lacks"),
        ({"attention_resolutions": (2,)}, "unknown"),
        ({"attention_resolutions": (32,)}, "downsampling factors"),
        ({"attention_resolutions": "2,4"}, "sequence of numbers"),
        ({"resblock_updown": False}, "not a UNet checkpoint"),
        ({"use_scale_shift_norm": False}, "has shape"),
        ({"num_head_channels": -1}, "give num_heads"),
        ({"num_head_channels": 12}, "num_head_channels 12"),
        ({"skip_scale": "half"}, "unknown skip scale 'half'"),
        ({"skip_scale": "cs", "kappa": 1.5}, r"\(0, 1\]"),
    ],
    ids=str,
)
def test_options_that_contradict_the_tensors_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        load_adm_checkpoint(make_state(SIZES), **SIZES | changes)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_adm_checkpoint(Path("nowhere.pt"), **SIZES)
    with pytest.raises(ValueError, match="not an ADM checkpoint: it has no time_embed"):
        load_adm_checkpoint({"fc.weight": torch.ones(2, 2)}, **SIZES)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        load_adm_checkpoint(tmp_path / "empty.pt", **SIZES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"input_blocks.0.0.weight": torch.ones(5)},
            r"0.0.weight has shape \(5,\), expected 4 dimensions",
        ),
        ({"out.2.weight": torch.ones(())}, r"out.2.weight has shape \(\), expected 4 dimensions"),
        ({"time_embed.0.weight": torch.ones(3)}, "time_embed.0.weight has shape"),
        ({"out.0.bias": torch.ones(32, dtype=torch.int32)}, "out.0.bias is stored in int32"),
        ({3: torch.ones(1)}, "found the name 3"),
    ],
    ids=str,
)
def test_tensors_of_something_else_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        load_adm_checkpoint(make_state(SIZES) | change, **SIZES)


def test_what_training_puts_around_names_is_taken_off():
    state = make_state(SIZES)
    wrapped = {"state_dict": {f"module._orig_mod.{name}": x for name, x in state.items()}}
    assert load_adm_checkpoint(wrapped, **SIZES).state_dict().keys() == state.keys()  # type: ignore[arg-type]
