"""Public checkpoints give the published outputs: our model against a plain re-statement of the published network."""

import argparse
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import scalelong
from scalelong.model.dit import position_embedding
from scalelong.model.dit_checkpoint import load_dit_checkpoint

IMG_SIZE, PATCH_SIZE, CHANNELS, WIDTH, HEADS, DEPTH, NUM_CLASSES = 12, 2, 4, 32, 4, 3, 7
SIZES: dict[str, Any] = {"img_size": IMG_SIZE, "patch_size": PATCH_SIZE, "num_heads": HEADS}
SIDE = IMG_SIZE // PATCH_SIZE


def make_state(
    *, channels_out: int = 2 * CHANNELS, hidden: int = 4 * WIDTH, num_classes: int = NUM_CLASSES, dtype=torch.float64
) -> dict[str, Tensor]:
    """Random tensors under the published names, large enough that no part of the network is trivially zero."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    shapes["x_embedder.proj.weight"] = (WIDTH, CHANNELS, PATCH_SIZE, PATCH_SIZE)
    shapes["x_embedder.proj.bias"] = (WIDTH,)
    linear("t_embedder.mlp.0", 256, WIDTH)
    linear("t_embedder.mlp.2", WIDTH, WIDTH)
    if num_classes:
        shapes["y_embedder.embedding_table.weight"] = (num_classes, WIDTH)
    for n in range(DEPTH):
        linear(f"blocks.{n}.attn.qkv", WIDTH, 3 * WIDTH)
        linear(f"blocks.{n}.attn.proj", WIDTH, WIDTH)
        linear(f"blocks.{n}.mlp.fc1", WIDTH, hidden)
        linear(f"blocks.{n}.mlp.fc2", hidden, WIDTH)
        linear(f"blocks.{n}.adaLN_modulation.1", WIDTH, 6 * WIDTH)
    linear("final_layer.linear", WIDTH, PATCH_SIZE**2 * channels_out)
    linear("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)
    state = {name: (0.2 * torch.randn(shape, dtype=torch.float64)).to(dtype) for name, shape in shapes.items()}
    return {"pos_embed": position_embedding(SIDE, WIDTH)[None].to(dtype), **state}


def published_forward(state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """The published DiT over a raw state dict."""

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return normed * (1 + scale[:, None]) + shift[:, None]

    def attend(name: str, h: Tensor) -> Tensor:
        q, k, v = linear(f"{name}.qkv", h).chunk(3, dim=-1)
        heads = []
        for q_h, k_h, v_h in zip(q.chunk(HEADS, -1), k.chunk(HEADS, -1), v.chunk(HEADS, -1), strict=True):
            heads.append(torch.softmax(q_h @ k_h.mT / math.sqrt(WIDTH // HEADS), dim=-1) @ v_h)
        return linear(f"{name}.proj", torch.cat(heads, dim=-1))

    def gelu(h: Tensor) -> Tensor:
        return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))

    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=x.dtype) / 128)
    angles = t[:, None] * frequencies
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    if y is not None:
        c = c + state["y_embedder.embedding_table.weight"][y]
    patches = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=PATCH_SIZE)
    h = patches.flatten(2).transpose(1, 2) + state["pos_embed"]
    for n in range(DEPTH):
        name = f"blocks.{n}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", F.silu(c)).chunk(6, 1)
        h = h + gate1[:, None] * attend(f"{name}.attn", norm(h, shift1, scale1))
        h = h + gate2[:, None] * linear(f"{name}.mlp.fc2", gelu(linear(f"{name}.mlp.fc1", norm(h, shift2, scale2))))
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, 1)
    h = linear("final_layer.linear", norm(h, shift, scale))
    image = x.new_zeros(x.shape[0], h.shape[-1] // PATCH_SIZE**2, IMG_SIZE, IMG_SIZE)
    for n in range(SIDE**2):
        row, column = n // SIDE * PATCH_SIZE, n % SIDE * PATCH_SIZE
        patch = h[:, n].reshape(x.shape[0], PATCH_SIZE, PATCH_SIZE, -1).permute(0, 3, 1, 2)
        image[:, :, row : row + PATCH_SIZE, column : column + PATCH_SIZE] = patch
    return image


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, CHANNELS, IMG_SIZE, IMG_SIZE, dtype=dtype)
    return x, torch.tensor([3.0, 811.0], dtype=dtype), torch.tensor([2, NUM_CLASSES - 1])


@pytest.mark.parametrize(
    "options", [{}, {"channels_out": CHANNELS}, {"hidden": 3 * WIDTH + 5}, {"num_classes": 0}], ids=str
)
@torch.no_grad()
def test_outputs_are_the_published_ones(options):
    state, (x, t, y) = make_state(**options), make_inputs()
    inputs = (x, t, None if options.get("num_classes") == 0 else y)
    ours, published = load_dit_checkpoint(state, **SIZES)(*inputs), published_forward(state, *inputs)
    assert published.std() > 0.1
    assert ours.shape[1] == options.get("channels_out", 2 * CHANNELS)
    torch.testing.assert_close(ours, published, rtol=1e-9, atol=1e-11)


def test_whole_times_are_taken_as_published():
    model, (x, t, y) = load_dit_checkpoint(make_state(), **SIZES), make_inputs()
    assert torch.equal(model(x, t.long(), y), model(x, t, y))


def test_the_loader_is_public():
    assert scalelong.load_dit_checkpoint is load_dit_checkpoint


@pytest.mark.parametrize("nested", [None, "ema", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_files_load_as_the_state_dict_does(tmp_path, prefix, nested):
    state = make_state(dtype=torch.float32)
    named: Any = {prefix + name: tensor for name, tensor in state.items()}
    if nested == "ema":  # as the published training keeps them
        other = {name: torch.zeros_like(tensor) for name, tensor in named.items()}
        named = {"model": other, "ema": named, "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-XL/2")}
    elif nested:
        named = {nested: named}
    torch.save(named, tmp_path / "DiT.pt")
    loaded = load_dit_checkpoint(tmp_path / "DiT.pt", **SIZES).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_dtype_of_the_tensors_is_kept(dtype):
    model = load_dit_checkpoint(make_state(dtype=dtype), **SIZES)
    assert {x.dtype for x in model.state_dict().values()} == {dtype}
    assert model(*make_inputs(dtype)).dtype == dtype


def test_the_model_shares_no_memory_and_can_be_trained_on():
    state = make_state()
    model = load_dit_checkpoint(state, **SIZES)
    pointers = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert not pointers & {x.untyped_storage().data_ptr() for x in model.state_dict().values()}
    assert not model.training
    assert all(p.requires_grad and p.is_leaf and p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 16}, "has 36 tokens, but img_size=16 and patch_size=2 make 64"),
        ({"img_size": 13}, "img_size 13 is no multiple of patch_size 2"),
        ({"patch_size": 4}, "patches of 2 pixels, not patch_size=4"),
        ({"num_heads": 5}, "width 32 is no multiple of num_heads 5"),
    ],
    ids=str,
)
def test_arguments_that_contradict_the_tensors_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_dit_checkpoint(make_state(), **{**SIZES, **arguments})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: {"fc.weight": s["pos_embed"]}, "not a DiT checkpoint: it has no pos_embed, x_embedder"),
        (lambda s: {k: v for k, v in s.items() if k != "pos_embed"}, "not a DiT checkpoint: it has no pos_embed"),
        (lambda s: s | {"extra": s["pos_embed"]}, "not a DiT checkpoint: it has the unknown extra"),
        (lambda s: {k: v for k, v in s.items() if "fc2" not in k}, "not a DiT checkpoint: it lacks blocks.0.mlp.fc2"),
        (lambda s: s | {"final_layer.linear.bias": torch.ones(3)}, r"final_layer.linear.bias has shape \(3,\)"),
        (lambda s: s | {"x_embedder.proj.weight": torch.ones(5)}, r"x_embedder.proj.weight has shape \(5,\)"),
        (lambda s: s | {"step": 7}, "expected a mapping from names to tensors"),
    ],
    ids=["another-network", "no-positions", "unknown", "lacks", "shape", "dimensions", "no-tensor"],
)
def test_a_state_dict_of_something_else_is_refused(spoil, message):
    with pytest.raises(ValueError, match=message):
        load_dit_checkpoint(spoil(make_state()), **SIZES)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint: .*absent.pt"):
        load_dit_checkpoint(tmp_path / "absent.pt", **SIZES)
