import csv
import math
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from parity import assert_within_budget
from second_order import assert_transforms, assert_twice_differentiable
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from scalelong.bench.record import RESULTS, Row, append_rows, slug
from scalelong.kernels import attention as attention_module
from scalelong.kernels import attention_backends
from scalelong.kernels.attention import (
    BACKENDS,
    FASTEST,
    Fastest,
    Measurement,
    attention,
    attention_backend,
    attention_ref,
)
from scalelong.kernels.backend import use_backend

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


# What "auto" takes


def entry(**changes) -> Fastest:
    measured = Measurement(file="a-gpu.csv", date="2026-01-01", commit="abc", shape="B=2 T=257 D=128 H=2")
    any_entry = Fastest(
        backend="math",
        capability=None,
        dtype=torch.float32,
        head_dims=(64, 64),
        lengths=(257, 320),
        measured=measured,
    )
    return replace(any_entry, **changes)


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, "math"),
        ({"capability": (9, 0)}, "sdpa"),
        ({"dtype": torch.bfloat16}, "sdpa"),
        ({"head_dims": (65, 128)}, "sdpa"),
        ({"lengths": (258, 258)}, "sdpa"),
        ({"backend": "fa2"}, "sdpa"),
    ],
)
def test_auto_takes_the_entry_that_fits_and_can_run(monkeypatch, changes, taken):
    monkeypatch.setattr(attention_module, "FASTEST", (entry(**changes),))
    x = qkv(1, 257, 2, 64)
    assert attention_backend(x, 2) == taken
    torch.compiler.reset()
    compiled = torch.compile(partial(attention, num_heads=2), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), attention(x, 2, backend=taken))


def test_auto_is_the_choice_of_pytorch_where_nothing_was_measured(monkeypatch):
    monkeypatch.setattr(attention_module, "FASTEST", ())
    assert attention_backend(qkv(1, 1, 1, 8), 1) == "sdpa"


def test_auto_takes_only_deterministic_backends(monkeypatch, deterministic):
    monkeypatch.setattr(attention_module, "FASTEST", (entry(),))
    monkeypatch.setitem(BACKENDS, "math", replace(BACKENDS["math"], is_deterministic=lambda device: False))
    assert attention_backend(qkv(1, 257, 2, 64), 2) == "sdpa"


def flaw(entry: Fastest, folder: Path) -> str | None:
    """What is wrong with the row that an entry of the table cites."""
    measured, dtype = entry.measured, str(entry.dtype).removeprefix("torch.")
    path = folder / measured.file
    if not path.is_file():
        return f"no file {measured.file}"
    with path.open(newline="") as file:
        cited = (measured.date, measured.commit, "attention", measured.shape, dtype, "both")
        columns = ("date", "commit", "op", "shape", "dtype", "direction")
        ms = {
            row["provider"]: float(row["ms_median"])
            for row in csv.DictReader(file)
            if tuple(row[column] for column in columns) == cited and row["provider"] in BACKENDS
        }
    if not ms or min(ms, key=ms.__getitem__) != entry.backend:
        return f"{entry.backend} is not the fastest of {ms}"
    T, D, H = (int(re.search(rf"\b{letter}=(\d+)", measured.shape)[1]) for letter in "TDH")  # type: ignore[index]
    for name, value, (low, high) in (("length", T, entry.lengths), ("head dim", D // H, entry.head_dims)):
        if not low <= value <= high:
            return f"the {name} {value} of the row is outside of the entry"
    return None


def test_each_entry_cites_a_row():
    assert [flaw(entry, RESULTS) for entry in FASTEST if flaw(entry, RESULTS) is not None] == []


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, None),
        ({"backend": "flash"}, "flash is not the fastest"),
        ({"dtype": torch.float16}, "math is not the fastest"),
        ({"lengths": (258, 300)}, "the length 257 of the row is outside"),
        ({"head_dims": (72, 72)}, "the head dim 64 of the row is outside"),
    ],
)
def test_an_entry_without_its_row_is_caught(tmp_path, changes, found):
    def row(provider: str, ms: float) -> Row:
        where = {"date": "2026-01-01", "commit": "abc", "device": "A GPU", "torch": "2.13.0", "triton": "3.7.1"}
        what = {"op": "attention", "shape": "B=2 T=257 D=128 H=2", "dtype": "float32", "layout": "contiguous"}
        figures = {"ms_median": ms, "ms_p20": ms, "ms_p80": ms, "gb_per_s": 1.0, "percent_of_copy": 1.0, "peak_mb": 1.0}
        return Row(**where, **what, direction="both", provider=provider, **figures)  # type: ignore[arg-type]

    assert flaw(entry(), tmp_path) == "no file a-gpu.csv"
    append_rows([row("math", 1.0), row("flash", 2.0), row("compile", 0.5)], tmp_path)
    assert slug("A GPU") + ".csv" == astuple(entry().measured)[0]
    reason = flaw(entry(**changes), tmp_path)
    assert reason is None if found is None else found in str(reason)


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


def attend(qkv_BT3HE: Tensor) -> Tensor:
    return attention_ref(qkv_BT3HE.flatten(2), qkv_BT3HE.shape[3]).unflatten(-1, qkv_BT3HE.shape[3:])


class PackedStandIn(ModuleType):
    """flash_attn_qkvpacked_func with the arguments that FlashAttention 2 and 3 share."""

    returns_tuple = False

    def flash_attn_qkvpacked_func(self, qkv, *, softmax_scale=None, causal=False, deterministic=False):
        self.seen = qkv, deterministic
        return (attend(qkv), torch.empty(0)) if self.returns_tuple else attend(qkv)


class FA4StandIn(ModuleType):
    def flash_attn_func(self, q, k, v, *, softmax_scale=None, causal=False, deterministic=False, return_lse=False):
        self.seen, self.return_lse = (torch.stack([q, k, v], 2), deterministic), return_lse
        self.strides = {x.stride() for x in (q, k, v)}
        B, T, H, _ = q.shape
        return attend(self.seen[0]), q.new_zeros(B, H, T, dtype=torch.float32)

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, softmax_scale=None, causal=False, *, deterministic=False):
        # By hand, for an operator runs below autograd.
        self.seen = torch.stack([q, k, v], 2), deterministic
        q, k, v, do = (x.transpose(1, 2) for x in (q, k, v, dout))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        d_weights = do @ v.mT
        d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
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
    assert_within_budget(lambda x: BACKENDS[name].call(x, 3), partial(attention_ref, num_heads=3), {"qkv": x})
    BACKENDS[name].call(x, 3)
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
    assert torch.equal(BACKENDS["fa3"].call(x, 2), attention_ref(x, 2))


@each_package
def test_a_package_compiles_into_one_graph(name, stand_in):
    stand_in(name)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: BACKENDS[name].call(x, 3), fullgraph=True, backend="aot_eager")
    assert_within_budget(compiled, partial(attention_ref, num_heads=3), {"qkv": qkv(2, 17, 3, 8)})


def test_the_operator_around_fa4_is_well_formed(stand_in):
    stand_in("fa4")
    x = qkv(2, 5, 2, 8).unflatten(-1, (3, 2, -1)).requires_grad_()
    torch.library.opcheck(torch.ops.scalelong.flash_attention_4.default, (x, False))
    out, lse = torch.ops.scalelong.flash_attention_4(x.detach(), False)
    operator = torch.ops.scalelong.flash_attention_4_backward.default
    torch.library.opcheck(operator, (out, x.detach(), out, lse, False))


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


def test_a_package_says_that_its_derivatives_end(monkeypatch):
    monkeypatch.setitem(BACKENDS, "fa3", replace(BACKENDS["sdpa"], name="fa3"))
    x = qkv(1, 4, 2, 8).requires_grad_()
    y = attention(x, 2, backend="fa3")
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"'fa3' has no second derivative.*sdpa, math, reference have one"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_transforms_take_the_reference():
    assert_transforms(partial(attention, num_heads=2), partial(attention_ref, num_heads=2), [qkv(2, 5, 2, 8)])


def test_a_forced_reference_is_what_auto_takes():
    with use_backend("reference"):
        assert attention_backend(qkv(1, 4, 2, 8), 2) == "reference"


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
