"""Public checkpoints give the published outputs: our model against a plain re-statement of the published network."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from scalelong.model.skip_scale import ConstantScale, LearnedScale, Unscaled
from scalelong.model.uvit import UViT
from scalelong.model.uvit_checkpoint import load_uvit_checkpoint

IMG_SIZE, PATCH_SIZE, CHANNELS, WIDTH, HEADS, NUM_SKIPS = 12, 2, 3, 32, 4, 3
NUM_PATCHES = (IMG_SIZE // PATCH_SIZE) ** 2
NUM_CLASSES, TEXT_TOKENS, TEXT_DIM = 7, 5, 12
KAPPA = 0.7
SIZES: dict[str, Any] = {"img_size": IMG_SIZE, "patch_size": PATCH_SIZE, "num_heads": HEADS}
SCALELONG_MODES = {
    "none": 0,
    "inv-sqrt2": 1,
    "cs": 2,
    "ls": 3,
    "ls-separate": 4,
}  # `scalelong` of the published configs
CONDITIONS = ("plain", "labels", "text")


def published_forward(
    state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor | None, mode: int, kappa: float
) -> Tensor:
    """The published U-ViT with ScaleLong's five modes, over a raw state dict."""

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, h: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attend(name: str, h: Tensor) -> Tensor:
        q, k, v = linear(f"{name}.qkv", h).chunk(3, dim=-1)
        heads = []
        for q_h, k_h, v_h in zip(q.chunk(HEADS, -1), k.chunk(HEADS, -1), v.chunk(HEADS, -1), strict=True):
            weights = torch.softmax(q_h @ k_h.transpose(1, 2) * (WIDTH // HEADS) ** -0.5, dim=-1)
            heads.append(weights @ v_h)
        return linear(f"{name}.proj", torch.cat(heads, dim=-1))

    def gelu(h: Tensor) -> Tensor:
        return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))

    def block(name: str, h: Tensor) -> Tensor:
        h = h + attend(f"{name}.attn", norm(f"{name}.norm1", h))
        return h + linear(f"{name}.mlp.fc2", gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", h))))

    def gate(name: str, skip: Tensor) -> Tensor:
        hidden = torch.relu(linear(f"{name}.layer1", skip.mean(dim=2)))
        return torch.sigmoid(linear(f"{name}.layer2", hidden))[:, :, None]

    patches = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH_SIZE)
    frequencies = torch.exp(-math.log(10000) * torch.arange(WIDTH // 2, dtype=x.dtype) / (WIDTH // 2))
    time = torch.cat([torch.cos(t[:, None] * frequencies), torch.sin(t[:, None] * frequencies)], dim=1)
    if "time_embed.0.weight" in state:
        time = linear("time_embed.2", F.silu(linear("time_embed.0", time)))
    sequence = [time[:, None], patches.flatten(2).transpose(1, 2)]
    if "label_emb.weight" in state:
        sequence = [state["label_emb.weight"][y][:, None], *sequence]
    if "context_embed.weight" in state:
        assert y is not None
        sequence = [sequence[0], linear("context_embed", y), sequence[1]]
    h = torch.cat(sequence, dim=1) + state["pos_embed"]

    skips = []
    for i in range(NUM_SKIPS):
        h = block(f"in_blocks.{i}", h)
        skips.append(h)
    h = block("mid_block", h)
    for c in range(NUM_SKIPS):
        skip = skips.pop()
        if mode == 1:
            skip = skip * 2**-0.5
        elif mode == 2:
            skip = skip * kappa ** (NUM_SKIPS - 1 - c)
        elif mode == 3:
            skip = skip * gate("se", skip)
        elif mode == 4:
            skip = skip * gate(f"se.{c}", skip)
        h = block(f"out_blocks.{c}", linear(f"out_blocks.{c}.skip_linear", torch.cat([h, skip], dim=-1)))

    h = linear("decoder_pred", norm("norm", h))[:, -NUM_PATCHES:]
    image = torch.zeros_like(x)
    per_side = IMG_SIZE // PATCH_SIZE
    for n in range(NUM_PATCHES):
        row, column = n // per_side * PATCH_SIZE, n % per_side * PATCH_SIZE
        patch = h[:, n].reshape(-1, PATCH_SIZE, PATCH_SIZE, CHANNELS).permute(0, 3, 1, 2)
        image[:, :, row : row + PATCH_SIZE, column : column + PATCH_SIZE] = patch
    if "final_layer.weight" in state:
        image = F.conv2d(image, state["final_layer.weight"], state["final_layer.bias"], padding=1)
    return image


def make_state(
    condition: str = "plain",
    *,
    final_conv: bool = True,
    mode: int = 0,
    hidden: int = 4 * WIDTH,
    qkv_bias: bool = False,
    time_mlp: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Random tensors under the published names, large enough that no part of the network is trivially zero."""
    num_tokens = NUM_PATCHES + 1 + {"plain": 0, "labels": 1, "text": TEXT_TOKENS}[condition]
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, num_tokens, WIDTH)}

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (WIDTH,)

    def gate(name: str) -> None:
        linear(f"{name}.layer1", num_tokens, num_tokens // 16)
        linear(f"{name}.layer2", num_tokens // 16, num_tokens)

    def block(name: str) -> None:
        norm(f"{name}.norm1")
        linear(f"{name}.attn.qkv", WIDTH, 3 * WIDTH, bias=qkv_bias)
        linear(f"{name}.attn.proj", WIDTH, WIDTH)
        norm(f"{name}.norm2")
        linear(f"{name}.mlp.fc1", WIDTH, hidden)
        linear(f"{name}.mlp.fc2", hidden, WIDTH)

    shapes["patch_embed.proj.weight"] = (WIDTH, CHANNELS, PATCH_SIZE, PATCH_SIZE)
    shapes["patch_embed.proj.bias"] = (WIDTH,)
    if time_mlp:
        linear("time_embed.0", WIDTH, 4 * WIDTH)
        linear("time_embed.2", 4 * WIDTH, WIDTH)
    if condition == "labels":
        shapes["label_emb.weight"] = (NUM_CLASSES, WIDTH)
    if condition == "text":
        linear("context_embed", TEXT_DIM, WIDTH)
    for i in range(NUM_SKIPS):
        block(f"in_blocks.{i}")
    block("mid_block")
    for i in range(NUM_SKIPS):
        linear(f"out_blocks.{i}.skip_linear", 2 * WIDTH, WIDTH)
        block(f"out_blocks.{i}")
    norm("norm")
    linear("decoder_pred", WIDTH, PATCH_SIZE**2 * CHANNELS)
    if final_conv:
        shapes["final_layer.weight"] = (CHANNELS, CHANNELS, 3, 3)
        shapes["final_layer.bias"] = (CHANNELS,)
    if mode == 3:
        gate("se")
    if mode == 4:
        for c in range(NUM_SKIPS):
            gate(f"se.{c}")

    state = {name: 0.2 * torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    for name in state:
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            state[name] += 1
    return state


def make_inputs(condition: str = "plain", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None]:
    x, t = torch.randn(2, CHANNELS, IMG_SIZE, IMG_SIZE, dtype=dtype), torch.tensor([3.0, 811.5], dtype=dtype)
    if condition == "labels":
        return x, t, torch.tensor([2, NUM_CLASSES - 1])
    if condition == "text":
        return x, t, torch.randn(2, TEXT_TOKENS, TEXT_DIM, dtype=dtype)
    return x, t, None


def assert_published_outputs(model: UViT, state: dict[str, Tensor], condition: str, mode: int) -> None:
    x, t, y = make_inputs(condition)
    with torch.no_grad():
        ours, published = model(x, t, y), published_forward(state, x, t, y, mode, KAPPA)
    assert published.std() > 0.1
    torch.testing.assert_close(ours, published, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("skip_scale", SCALELONG_MODES)
@pytest.mark.parametrize("final_conv", [True, False], ids=["conv", "no-conv"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_outputs_are_the_published_ones(condition, final_conv, skip_scale):
    mode = SCALELONG_MODES[skip_scale]
    state = make_state(condition, final_conv=final_conv, mode=mode)
    model = load_uvit_checkpoint(state, **SIZES, skip_scale=skip_scale, kappa=KAPPA)
    assert_published_outputs(model, state, condition, mode)


@pytest.mark.parametrize("options", [{"qkv_bias": True}, {"time_mlp": True}, {"hidden": 3 * WIDTH + 5}], ids=str)
def test_options_of_the_published_code_are_read_from_the_tensors(options):
    state = make_state("labels", **options)
    assert_published_outputs(load_uvit_checkpoint(state, **SIZES), state, "labels", mode=0)


def test_the_modes_differ():
    """Or the parity above would say nothing about them."""
    x, t, y = make_inputs()
    outputs = [
        published_forward(make_state(mode=mode) | shared, x, t, y, mode, KAPPA)
        for shared in [make_state()]
        for mode in SCALELONG_MODES.values()
    ]
    for i, a in enumerate(outputs):
        assert all((a - b).abs().max() > 1e-2 for b in outputs[:i])


def save_pth(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "nnet_ema.pth")
    return folder / "nnet_ema.pth"


def save_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize("prefix", ["", "module."], ids=["bare", "module"])
@pytest.mark.parametrize("save", [save_pth, save_safetensors])
def test_files_load_as_the_state_dict_does(tmp_path, save: Callable[[dict, Path], Path], prefix):
    state = make_state()
    path = save({prefix + name: tensor for name, tensor in state.items()}, tmp_path)
    for given in (path, str(path)):
        loaded = load_uvit_checkpoint(given, **SIZES).state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_dtype_of_the_tensors_is_kept(dtype):
    model = load_uvit_checkpoint(make_state("labels", mode=3, dtype=dtype), **SIZES)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(*make_inputs("labels", dtype)).dtype == dtype


def test_no_memory_is_shared_with_the_given_tensors():
    state = make_state(mode=4)
    model = load_uvit_checkpoint(state, **SIZES)
    pointers = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert not pointers & {p.untyped_storage().data_ptr() for p in model.parameters()}


def test_the_model_is_in_evaluation_mode_and_can_be_trained_on():
    model = load_uvit_checkpoint(make_state(), **SIZES)
    assert not model.training
    assert all(p.requires_grad and p.is_leaf and p.device.type == "cpu" for p in model.parameters())


def test_sizes_are_read_from_the_tensors():
    config = load_uvit_checkpoint(make_state("text", final_conv=False), **SIZES).config
    assert (config.width, config.depth, config.in_channels, config.mlp_ratio) == (WIDTH, 2 * NUM_SKIPS, CHANNELS, 4)
    assert (config.num_classes, config.context_tokens, config.context_dim) == (0, TEXT_TOKENS, TEXT_DIM)
    assert not config.final_conv


@pytest.mark.parametrize(("mode", "shared"), [(3, True), (4, False)])
def test_gates_make_a_checkpoint_ls_under_the_default(mode, shared):
    state = make_state(mode=mode)
    model = load_uvit_checkpoint(state, **SIZES)
    assert model.skip_scale == LearnedScale(reduction=16, shared=shared)
    assert_published_outputs(model, state, "plain", mode)


def test_kappa_is_that_of_cs_alone():
    assert load_uvit_checkpoint(make_state(), **SIZES, skip_scale="cs").skip_scale == ConstantScale(0.5)
    assert load_uvit_checkpoint(make_state(), **SIZES, kappa=KAPPA).skip_scale == Unscaled()


@pytest.mark.parametrize(
    ("mode", "arguments", "message"),
    [
        (0, {"img_size": 16}, "has 37 tokens, but img_size=16 and patch_size=2 make 65"),
        (0, {"img_size": 13}, "img_size 13 is no multiple of patch_size 2"),
        (0, {"patch_size": 4}, "patches of 2 pixels, not patch_size=4"),
        (0, {"num_heads": 5}, "width 32 is no multiple of num_heads 5"),
        (0, {"skip_scale": "magic"}, "unknown skip scale 'magic'"),
        (0, {"skip_scale": "cs", "kappa": 2.0}, "got 2.0"),
        (0, {"skip_scale": "ls"}, "skip_scale='ls', but the checkpoint has no gates"),
        (0, {"skip_scale": "ls-separate"}, "skip_scale='ls-separate', but the checkpoint has no gates"),
        (3, {"skip_scale": "cs"}, "skip_scale='cs', but the checkpoint has the gates of 'ls'"),
        (3, {"skip_scale": "ls-separate"}, "skip_scale='ls-separate', but .* the gates of 'ls'"),
        (4, {"skip_scale": "ls"}, "skip_scale='ls', but .* the gates of 'ls-separate'"),
    ],
    ids=str,
)
def test_arguments_that_contradict_the_tensors_are_refused(mode, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_uvit_checkpoint(make_state(mode=mode), **{**SIZES, **arguments})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: {"fc.weight": s["norm.weight"]}, "not a U-ViT checkpoint: it has no pos_embed, patch_embed"),
        (lambda s: {k: v for k, v in s.items() if k != "norm.bias"}, "not a U-ViT checkpoint: it lacks norm.bias"),
        (lambda s: s | {"extra": s["norm.bias"]}, "not a U-ViT checkpoint: it has the unknown extra"),
        (lambda s: s | {"norm.bias": s["norm.bias"][:-1]}, r"norm.bias has shape \(31,\), expected \(32,\)"),
        (lambda s: s | {"step": 7}, "expected a mapping from names to tensors"),
        (lambda s: {"model": s}, "expected a mapping from names to tensors"),
    ],
    ids=["another-network", "lacks", "unknown", "shape", "no-tensor", "nested"],
)
def test_a_state_dict_of_something_else_is_refused(spoil, message):
    with pytest.raises(ValueError, match=message):
        load_uvit_checkpoint(spoil(make_state()), **SIZES)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint: .*absent.pth"):
        load_uvit_checkpoint(tmp_path / "absent.pth", **SIZES)


class WritesAFile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    proof = tmp_path / "the code ran"
    torch.save(make_state() | {"payload": WritesAFile(proof)}, tmp_path / "bad.pth")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        load_uvit_checkpoint(tmp_path / "bad.pth", **SIZES)
    assert not proof.exists()
    # The payload is live: an unguarded load does run it.
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert proof.exists()
