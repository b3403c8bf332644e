import copy
import math
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import assert_within_budget
from second_order import assert_transforms, assert_twice_differentiable
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from scalelong.kernels import attention_backends
from scalelong.kernels.attention import (
    BACKENDS,
    attention,
    attention_ref,
)
from scalelong.kernels.backend import Backends, get_backend, use_backend

PACKAGES = ("fa4", "fa3", "fa2")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Everything that this machine has, on each device.
each_present = pytest.mark.parametrize(
    ("device", "backend"),
    [
        pytest.param(device, name, marks=[pytest.mark.gpu] if device == "cuda" else [])
        for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
        for name, backend in BACKENDS.items()
        if name != "reference" and backend.missing(torch.device(device)) is None
    ],
)
each_package = pytest.mark.parametrize("name", PACKAGES)


def qkv(B: int, T: int, H: int, E: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(B, T, 3 * H * E).to(device, dtype)


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Parity


@each_present
@pytest.mark.parametrize("T", [1, 16, 257, 258, 334, 1025])
@pytest.mark.parametrize("E", [64, 72])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=tuple(DTYPES))
def test_as_exact_as_the_reference(device, backend, dtype, E, T):
    x = qkv(1 if T > 300 else 2, T, 2, E, dtype, device)
    reason = BACKENDS[backend].why_not(x, 2)
    if reason is not None:
        pytest.skip(reason)
    op = partial(attention, num_heads=2, backend=backend)
    assert_within_budget(op, partial(attention_ref, num_heads=2), {"qkv": x})


@pytest.mark.parametrize("backend", ["auto", "sdpa", "math", "reference"])
def test_takes_fp64(backend):
    x = qkv(2, 5, 2, 8, torch.float64)
    torch.testing.assert_close(attention(x, 2, backend=backend), attention_ref(x, 2))


@pytest.mark.parametrize("backend", ["auto", "flash", "math"])
def test_parity_holds_for_a_permuted_input(backend):
    def transposed(op, qkv):
        return op(qkv.transpose(0, 1), 2)

    inputs = {"qkv": qkv(17, 2, 2, 8)}
    op = partial(transposed, partial(attention, backend=backend))
    assert_within_budget(op, partial(transposed, attention_ref), inputs)


def test_reference_backend_is_the_reference():
    x = qkv(2, 16, 2, 8)
    assert torch.equal(attention(x, 2, backend="reference"), attention_ref(x, 2))


def test_reference_attends_head_by_head_in_the_published_layout():
    B, T, H, E = 2, 5, 3, 4
    x = qkv(B, T, H, E, torch.float64)
    q, k, v = x.split(H * E, dim=-1)
    for b in range(B):
        for h in range(H):
            head = slice(h * E, (h + 1) * E)
            weights = torch.softmax(q[b, :, head] @ k[b, :, head].T / math.sqrt(E), dim=-1)
            torch.testing.assert_close(attention_ref(x, H)[b, :, head], weights @ v[b, :, head])


def test_reference_gradients():
    x = qkv(2, 3, 2, 4, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(partial(attention_ref, num_heads=2), x, fast_mode=True)


def test_large_logits_stay_finite():
    assert attention(1e3 * qkv(1, 16, 2, 8), 2).isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flash", "math", "reference"])
def test_compiles_into_one_graph(backend):
    torch.compiler.reset()
    op = partial(attention, num_heads=2, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_within_budget(compiled, partial(attention_ref, num_heads=2), {"qkv": qkv(2, 16, 2, 8)})


def test_autocast_leaves_the_dtype_of_the_projection():
    x = qkv(2, 16, 2, 8, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(x, 2).dtype == torch.bfloat16


# Copies


def operators(f: Callable[[], object]) -> list[tuple[str, int]]:
    """All that ``f`` runs, operators inside of operators included, each with the size of its largest argument.

    Profilers give no sizes for lists of tensors: a stack and its cat count as 0.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        f()
    return [
        (event.name.removeprefix("aten::"), max((math.prod(shape) for shape in event.input_shapes if shape), default=0))
        for event in record.events() or ()
    ]


COPIES = {"clone", "copy_", "_to_copy", "select_backward", "add_"}


def published(qkv: Tensor, num_heads: int) -> Tensor:
    q_k_v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).float()
    return F.scaled_dot_product_attention(q_k_v[0], q_k_v[1], q_k_v[2]).transpose(1, 2).flatten(2)


def copies_of(op: Callable[..., Tensor], dtype: torch.dtype) -> tuple[set[str], set[str], int]:
    """In forward, in backward, and the concatenations of backward."""
    B, T, H, E = 2, 33, 2, 16
    x = qkv(B, T, H, E, dtype).requires_grad_()
    out: list[Tensor] = []
    in_forward = operators(lambda: out.append(op(x, H)))
    d_out = torch.ones_like(out[0])
    in_backward = operators(lambda: torch.autograd.grad(out[0], x, d_out))
    forward, backward = (
        {name for name, size in names if name in COPIES and size >= B * T * H * E}
        for names in (in_forward, in_backward)
    )
    return forward, backward, [name for name, _ in in_backward].count("cat")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=tuple(DTYPES))
@pytest.mark.parametrize("backend", ["auto", "flash"])
def test_nothing_is_copied_but_one_concatenation_in_backward(backend, dtype):
    assert copies_of(partial(attention, backend=backend), dtype) == (set(), set(), 1)


def test_the_copies_of_the_published_form_are_seen():
    forward, backward, num_concatenations = copies_of(published, torch.bfloat16)
    assert "copy_" in forward
    assert {"copy_", "select_backward"} <= backward
    assert num_concatenations == 0


# The scale of the logits, norms of queries and keys, and keys of another sequence


def layer_norms(E: int) -> tuple[nn.Module, nn.Module]:
    """With weights that are not their first ones."""
    norms = nn.RMSNorm(E), nn.LayerNorm(E)
    with torch.no_grad():
        for parameter in (*norms[0].parameters(), *norms[1].parameters()):
            parameter.normal_()
    return norms


cosine = partial(F.normalize, dim=-1)
OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "scale": lambda E: {"scale": 0.3},
    "one norm": lambda E: {"qk_norm": nn.RMSNorm(E)},
    "two norms": lambda E: {"qk_norm": layer_norms(E)},
    "cosine": lambda E: {"qk_norm": cosine, "scale": 7.0},
}
each_option = pytest.mark.parametrize("make_options", OPTIONS.values(), ids=tuple(OPTIONS))
each_packing = pytest.mark.parametrize("num_keys", [None, 17, 5], ids=["packed", "unpacked", "cross"])


def projections(num_keys: int | None, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
    """Of 17 queries to 2 heads of width 16."""
    if num_keys is None:
        return {"qkv": qkv(2, 17, 2, 16, dtype, device)}
    sizes = {"q": 17, "k": num_keys, "v": num_keys}
    return {name: torch.randn(2, size, 32).to(device, dtype) for name, size in sizes.items()}


def over_projections(op: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """A function of the packed projection, or of the three."""
    return lambda *x: op(x[0] if len(x) == 1 else x, 2, **options)


@each_packing
@each_option
@each_present
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=tuple(DTYPES))
def test_options_are_as_exact_as_the_reference(device, backend, dtype, make_options, num_keys):
    inputs, options = projections(num_keys, dtype, device), make_options(16)
    given: Any = inputs["qkv"] if num_keys is None else tuple(inputs.values())
    if (reason := BACKENDS[backend].why_not(given, 2)) is not None:
        pytest.skip(reason)
    norms = {False: options.get("qk_norm"), True: in_dtype(options.get("qk_norm"), torch.float64)}
    norms[False] = in_dtype(norms[False], dtype, device)

    def ref(*x: Tensor) -> Tensor:
        return over_projections(attention_ref, **{**options, "qk_norm": norms[x[0].dtype == torch.float64]})(*x)

    op = over_projections(attention, backend=backend, **{**options, "qk_norm": norms[False]})
    assert_within_budget(op, ref, inputs)


def in_dtype(norm: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    if isinstance(norm, tuple):
        return tuple(in_dtype(each, dtype, device) for each in norm)
    return copy.deepcopy(norm).to(device, dtype) if isinstance(norm, nn.Module) else norm


@each_packing
def test_the_reference_of_the_options_is_what_the_formula_says(num_keys):
    inputs = [x.double() for x in projections(num_keys).values()]
    q, k, v = inputs[0].split(32, dim=-1) if num_keys is None else inputs
    norm_q, norm_k = in_dtype(layer_norms(16), torch.float64)
    found = over_projections(attention_ref, scale=0.3, qk_norm=(norm_q, norm_k))(*inputs)
    for head in (slice(0, 16), slice(16, 32)):
        q_hat = q[..., head] / q[..., head].square().mean(-1, keepdim=True).add(torch.finfo(q.dtype).eps).sqrt()
        mean, var = k[..., head].mean(-1, keepdim=True), k[..., head].var(-1, correction=0, keepdim=True)
        k_hat = (k[..., head] - mean) / (var + 1e-5).sqrt() * norm_k.weight + norm_k.bias
        weights = (0.3 * (q_hat * norm_q.weight) @ k_hat.mT).softmax(-1)
        torch.testing.assert_close(found[..., head], weights @ v[..., head])


@pytest.mark.parametrize("backend", ["auto", "flash", "math", "reference"])
def test_the_three_by_themselves_are_as_packed(backend):
    packed = qkv(2, 17, 2, 16)
    separate: Any = tuple(x.contiguous() for x in packed.split(32, dim=-1))
    assert torch.equal(attention(separate, 2, backend=backend), attention(packed, 2, backend=backend))


def test_norms_are_layers_that_are_called_and_learn():
    norms, seen = layer_norms(16), []
    for norm in norms:
        norm.register_forward_hook(lambda module, inputs, output: seen.append((module, inputs[0].shape)))
    attention(qkv(2, 17, 2, 16), 2, qk_norm=norms).square().sum().backward()
    assert seen == [(norm, (2, 17, 2, 16)) for norm in norms]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for norm in norms for p in norm.parameters())


def test_autocast_takes_norms_in_fp32_and_projections_of_two_dtypes():
    q, k, v = projections(5).values()
    with torch.autocast("cpu", torch.bfloat16):
        y = attention((q, k.bfloat16(), v.bfloat16()), 2, qk_norm=nn.LayerNorm(16))
        packed = attention(qkv(2, 17, 2, 16, torch.bfloat16), 2, qk_norm=nn.LayerNorm(16))
    assert y.dtype == packed.dtype == torch.bfloat16
    expected = attention_ref((q, k, v), 2, qk_norm=nn.LayerNorm(16))
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.03)


@each_packing
@each_option
def test_options_compile_into_one_graph(make_options, num_keys):
    torch.compiler.reset()
    inputs, options = projections(num_keys), make_options(16)
    compiled = torch.compile(over_projections(attention, **options), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs.values()), over_projections(attention, **options)(*inputs.values()))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 5, 8), (2, 3, 8), (2, 4, 8)], r"got \(2, 5, 8\), \(2, 3, 8\), \(2, 4, 8\)"),
        ([(2, 5, 8), (1, 3, 8), (1, 3, 8)], r"\(B, T, D\), \(B, S, D\), \(B, S, D\), got \(2, 5, 8\), \(1, 3, 8\)"),
        ([(2, 5, 8), (2, 3, 6), (2, 3, 6)], r"got \(2, 5, 8\), \(2, 3, 6\)"),
        ([(5, 8), (3, 8), (3, 8)], r"got \(5, 8\), \(3, 8\)"),
        ([(2, 5, 8), (2, 3, 8)], "must hold q, k and v, got 2 tensors"),
        ([(2, 5, 9), (2, 3, 9), (2, 3, 9)], "2 heads do not divide the width 9"),
    ],
)
def test_projections_that_do_not_fit_are_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        attention(tuple(map(torch.zeros, shapes)), 2)  # type: ignore[arg-type]


def test_other_arguments_that_do_not_fit_are_named():
    q, k, v = projections(5).values()
    with pytest.raises(ValueError, match=r"q is \(2, 17, 32\) float32 on cpu but k is \(2, 5, 32\) bfloat16"):
        attention((q, k.bfloat16(), v.bfloat16()), 2)
    with pytest.raises(ValueError, match=r"scale is one number, not \(2,\) float32.*a factor in qk_norm"):
        attention((q, k, v), 2, scale=torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"qk_norm makes \(2, 17, 2, 8\) of \(2, 17, 2, 16\)"):
        attention((q, k, v), 2, qk_norm=lambda x: x[..., :8])
    with pytest.raises(ValueError, match=r"'flash' cannot take \(2, 17, 32\), \(2, 5, 32\), \(2, 5, 32\), 2 heads"):
        attention((q, k.mT.contiguous().mT, v), 2, backend="flash")


# Errors


@pytest.mark.parametrize(
    ("shape", "num_heads", "backend", "message"),
    [
        ((2, 12), 2, "auto", r"\(B, T, 3D\), got \(2, 12\)"),
        ((2, 5, 13), 1, "auto", r"\(B, T, 3D\), got \(2, 5, 13\)"),
        ((2, 5, 12), 3, "auto", "3 heads do not divide the width 4"),
        ((2, 5, 12), 0, "auto", "0 heads do not divide the width 4"),
        (
            (2, 5, 12),
            2,
            "fast",
            "unknown backend 'fast'; there are auto, fa4, fa3, fa2, sdpa, cudnn, flash, efficient, math, reference",
        ),
    ],
)
def test_bad_arguments_are_named(shape, num_heads, backend, message):
    with pytest.raises(ValueError, match=message):
        attention(torch.randn(shape), num_heads, backend=backend)


def test_an_integer_projection_is_an_error():
    with pytest.raises(ValueError, match=r"floating-point dtype, got torch\.int64"):
        attention(torch.zeros(1, 2, 12, dtype=torch.int64), 2)


@pytest.mark.parametrize(
    ("name", "lack"),
    [*((name, "needs an NVIDIA GPU, the tensor is on cpu") for name in PACKAGES)]
    + [(name, "needs a tensor on cuda, not on cpu") for name in ("cudnn", "efficient")],
)
def test_a_missing_device_is_named_with_what_can_run(name, lack):
    with pytest.raises(RuntimeError, match=rf"'{name}' cannot run here: it {lack}\. sdpa, flash, math, reference can"):
        attention(qkv(1, 2, 1, 8), 1, backend=name)


@pytest.mark.parametrize(
    ("name", "capability", "message"),
    [
        ("fa4", (9, 0), r"the module flash_attn\.cute\.interface is missing .*pip install 'scalelong\[flash\]'"),
        ("fa4", (8, 9), r"needs compute capability 9\.0 to 12\.x, this GPU has 8\.9"),
        ("fa3", (9, 0), r"the module flash_attn_interface is missing .*hopper/ of Dao-AILab"),
        ("fa3", (10, 0), r"needs compute capability 8\.0 to 9\.x, this GPU has 10\.0"),
        ("fa2", (8, 0), r"the module flash_attn\.flash_attn_interface is missing .*pip install flash-attn --no-build"),
        ("fa2", (7, 5), r"needs compute capability 8\.0 to 12\.x, this GPU has 7\.5"),
    ],
)
def test_a_missing_package_or_capability_is_named(monkeypatch, name, capability, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    # An entry of None makes the import fail, whatever is installed.
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    assert re.search(message, str(BACKENDS[name].missing(torch.device("cuda"))))


@each_package
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (qkv(1, 2, 1, 64), "float16 and bfloat16, not float32"),
        (qkv(1, 2, 1, 60, torch.float16), "multiple of 8 up to (128|256), not 60"),
        (qkv(1, 2, 1, 264, torch.float16), "multiple of 8 up to (128|256), not 264"),
        (qkv(1, 0, 1, 64, torch.float16), "no empty batch or sequence"),
    ],
    ids=["dtype", "odd-head", "wide-head", "empty"],
)
def test_what_a_package_cannot_take_is_named(name, x, message, monkeypatch):
    monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], missing=lambda device: None))
    with pytest.raises(ValueError, match=rf"'{name}' cannot take .*: it takes .*{message}.* sdpa, .*reference can"):
        attention(x, 1, backend=name)


def test_a_transposed_projection_is_refused_by_flash():
    x = qkv(2, 24, 1, 2).transpose(1, 2)[:, :, :6]
    with pytest.raises(ValueError, match=r"'flash' cannot take .* side by side in memory\. sdpa, math, reference can"):
        attention(x, 1, backend="flash")


def test_pytorch_says_itself_what_it_refuses(monkeypatch):
    def can_use(params, debug=False):
        if debug:
            warnings.warn("cuDNN takes no length of 1.", stacklevel=1)
        return False

    monkeypatch.setattr(attention_backends, "SDPAParams", lambda *args: args)
    x = torch.empty(1, 1, 24, device="meta")
    assert attention_backends._torch_refuses(can_use, x, 1) == "cuDNN takes no length of 1."


def test_a_backward_that_is_not_deterministic_is_an_error(monkeypatch, deterministic):
    cudnn = replace(BACKENDS["cudnn"], call=BACKENDS["sdpa"].call, missing=lambda device: None)
    monkeypatch.setitem(BACKENDS, "cudnn", cudnn)
    x = qkv(1, 2, 1, 8)
    attention(x, 1, backend="cudnn")
    x.requires_grad_()
    message = "'cudnn' has no deterministic backward.* sdpa, flash, math, reference have one"
    with pytest.raises(RuntimeError, match=message):
        attention(x, 1, backend="cudnn")
    with torch.no_grad():
        attention(x, 1, backend="cudnn")
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match=message):
        attention(x, 1, backend="cudnn")


# The FlashAttention packages, by stand-ins with their signatures: shapes, strides and arguments, not their kernels


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    heads = q.shape[2:]
    return attention_ref((q.flatten(2), k.flatten(2), v.flatten(2)), heads[0], scale=scale).unflatten(-1, heads)


class PackedStandIn(ModuleType):
    """The functions of FlashAttention 2 and 3, with the arguments that they share."""

    returns_tuple = False

    def flash_attn_qkvpacked_func(self, qkv, *, softmax_scale=None, causal=False, deterministic=False):
        out = attend(*qkv.unbind(2), scale=softmax_scale)
        self.seen = qkv, deterministic
        return (out, torch.empty(0)) if self.returns_tuple else out

    def flash_attn_func(self, q, k, v, *, softmax_scale=None, causal=False, deterministic=False):
        out = attend(q, k, v, softmax_scale)
        return (out, torch.empty(0)) if self.returns_tuple else out


class FA4StandIn(ModuleType):
    def flash_attn_func(self, q, k, v, *, softmax_scale=None, causal=False, deterministic=False, return_lse=False):
        self.seen, self.return_lse = (torch.stack([q, k, v], 2) if q.shape == k.shape else q, deterministic), return_lse
        self.strides = {x.stride() for x in (q, k, v)}
        B, T, H, _ = q.shape
        return attend(q, k, v, softmax_scale), q.new_zeros(B, H, T, dtype=torch.float32)

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, softmax_scale=None, causal=False, *, deterministic=False):
        # By hand, for an operator runs below autograd.
        self.deterministic = deterministic
        q, k, v, do = (x.transpose(1, 2) for x in (q, k, v, dout))
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        weights = (q @ k.mT * scale).softmax(-1)
        d_weights = do @ v.mT
        d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * scale
        return tuple(x.transpose(1, 2) for x in (d_logits @ k, d_logits.mT @ q, weights.mT @ do))


MODULES = {
    "fa4": "flash_attn.cute.interface",
    "fa3": "flash_attn_interface",
    "fa2": "flash_attn.flash_attn_interface",
}


@pytest.fixture
def stand_in(monkeypatch):
    def make(name: str):
        module = (FA4StandIn if name == "fa4" else PackedStandIn)(MODULES[name])
        monkeypatch.setitem(sys.modules, MODULES[name], module)
        return module

    return make


@each_package
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_a_package_gets_views_and_gives_the_gradient(name, stand_in, is_deterministic, request):
    if is_deterministic:
        request.getfixturevalue("deterministic")
    package, x = stand_in(name), qkv(2, 17, 3, 8)
    assert_within_budget(lambda x: BACKENDS[name].call(x, 3, None), partial(attention_ref, num_heads=3), {"qkv": x})
    BACKENDS[name].call(x, 3, None)
    seen, deterministic = package.seen
    assert seen.shape == (2, 17, 3, 3, 8)
    assert deterministic is is_deterministic
    if name == "fa4":
        assert package.return_lse
        assert package.strides == {(17 * 72, 72, 8, 1)}
    else:
        assert seen.data_ptr() == x.data_ptr()


def test_fa3_of_2024_returns_a_tuple(stand_in):
    stand_in("fa3").returns_tuple = True
    x = qkv(2, 5, 2, 8)
    assert torch.equal(BACKENDS["fa3"].call(x, 2, None), attention_ref(x, 2))


@each_packing
@each_package
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_a_package_takes_a_scale_and_keys_of_another_sequence(name, stand_in, compiles, num_keys):
    stand_in(name)
    inputs = projections(num_keys)
    op = over_projections(BACKENDS[name].call, scale=0.3)
    if compiles:
        torch.compiler.reset()
        op = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_within_budget(op, over_projections(attention_ref, scale=0.3), inputs)


@each_package
def test_a_package_compiles_into_one_graph(name, stand_in):
    stand_in(name)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: BACKENDS[name].call(x, 3, None), fullgraph=True, backend="aot_eager")
    assert_within_budget(compiled, partial(attention_ref, num_heads=3), {"qkv": qkv(2, 17, 3, 8)})


def test_the_operator_around_fa4_is_well_formed(stand_in):
    stand_in("fa4")
    q, k, v = (torch.randn(2, T, 2, 8).requires_grad_() for T in (5, 3, 3))
    torch.library.opcheck(torch.ops.scalelong.flash_attention_4.default, (q, k, v, 0.3, False))
    out, lse = torch.ops.scalelong.flash_attention_4(q.detach(), k.detach(), v.detach(), None, False)
    operator = torch.ops.scalelong.flash_attention_4_backward.default
    torch.library.opcheck(operator, (out, q.detach(), k.detach(), v.detach(), out, lse, None, False))


def test_fa4_is_deterministic_up_to_capability_11(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert not BACKENDS["fa4"].is_deterministic(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert BACKENDS["fa4"].is_deterministic(torch.device("cuda"))


# Derivatives of every kind


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flash", "math", "reference"])
def test_create_graph_takes_the_plain_formula(backend):
    def dependent(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return ((x @ weight).tanh() + x.mean(),)

    leaves = [torch.randn(2, 5, 16), torch.randn(16, 48) / 4]
    op, ref = partial(attention, num_heads=2, backend=backend), partial(attention_ref, num_heads=2)
    assert_twice_differentiable(op, ref, dependent, leaves)


@each_option
@pytest.mark.parametrize("backend", ["auto", "flash", "math", "reference"])
def test_create_graph_through_the_options(backend, make_options):
    """Queries, keys and values come from one another, and so do the weights of the norm."""
    norm_q, _ = layer_norms(16)

    def dependent(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return x, (x @ weight).tanh()[:, :3], x[:, :3] * x.mean(), weight[0, :16] + x.mean()

    def call(op: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, learned: Tensor, **options: Any) -> Tensor:
        if "qk_norm" in make_options(16):
            options["qk_norm"] = lambda y: norm_q(y) * learned
        return op((q, k, v), 2, **options)

    options = {name: value for name, value in make_options(16).items() if name != "qk_norm"}
    op, ref = partial(call, attention, backend=backend, **options), partial(call, attention_ref, **options)
    assert_twice_differentiable(op, ref, dependent, [torch.randn(2, 5, 32), torch.randn(32, 32) / 6])


def test_a_package_says_that_its_derivatives_end(monkeypatch):
    monkeypatch.setitem(BACKENDS, "fa3", replace(BACKENDS["sdpa"], name="fa3"))
    x = qkv(1, 4, 2, 8).requires_grad_()
    y = attention(x, 2, backend="fa3")
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"'fa3' has no second derivative.*sdpa, math, reference have one"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_transforms_take_the_reference():
    assert_transforms(partial(attention, num_heads=2), partial(attention_ref, num_heads=2), [qkv(2, 5, 2, 8)])


@each_packing
@each_option
def test_transforms_take_the_reference_of_the_options(make_options, num_keys):
    options = make_options(16)
    op, ref = over_projections(attention, **options), over_projections(attention_ref, **options)
    assert_transforms(op, ref, list(projections(num_keys).values()))


def test_a_forced_reference_is_what_auto_takes():
    with use_backend("reference"):
        assert get_backend(attention, qkv(1, 4, 2, 8), 2) == Backends("reference", "reference")


def test_create_graph_through_a_checkpoint():
    """Recomputed inside a checkpoint, attention has the same second derivative."""
    x = qkv(2, 5, 2, 8)

    def penalty_gradient(op: Callable[..., Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(op(leaf, 2).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    def recomputed(qkv: Tensor, num_heads: int) -> Tensor:
        return checkpoint(attention, qkv, num_heads, use_reentrant=False)

    torch.testing.assert_close(penalty_gradient(recomputed), penalty_gradient(attention))
