"""What can compute softmax attention, what each needs, and how each is called.

All take strided views of the projections: nothing is copied or cast on the way in.
Where PyTorch or a package can name its own limits, they are asked; only what they leave to a crash is written here.

Shapes: B batch, T tokens, S tokens attended to, H heads, D model width, E = D / H width of a head.
"""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

Projected = Tensor | tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of all heads: side by side, (B, T, 3D), or (B, T, D) and twice (B, S, D)."""


@dataclass(frozen=True)
class Backend:
    """One way to compute attention."""

    name: str
    call: Callable[[Projected, int, float | None], Tensor]
    """The projections, H and the scale of the logits (None: 1 / √E) to (B, T, D)."""
    missing: Callable[[torch.device], str | None] = lambda device: None
    """The device or package that this machine lacks and how to get it; None where all is there."""
    refuses: Callable[[Projected, int], str | None] = lambda qkv, num_heads: None
    """Why it cannot take this input on this machine; None where it can."""
    is_deterministic: Callable[[torch.device], bool] = lambda device: True
    """Whether its backward is, under torch.use_deterministic_algorithms(True)."""

    def why_not(self, qkv: Projected, num_heads: int) -> str | None:
        return self.missing(queries(qkv).device) or self.refuses(qkv, num_heads)


def queries(qkv: Projected) -> Tensor:
    """A tensor with the dtype and device of all: the queries, or the packed projection."""
    return qkv if isinstance(qkv, Tensor) else qkv[0]


def head_dim(qkv: Projected, num_heads: int) -> int:
    return queries(qkv).shape[-1] // (3 * num_heads if isinstance(qkv, Tensor) else num_heads)


def heads(qkv: Projected, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, E), k and v (B, S, H, E), views.

    The backward of the unbind is one stack, right into the layout of ``qkv``. Three selects would fill and add three
    tensors of its size; an unbind after the permutation stacks in another layout, and the way back copies that.
    """
    if isinstance(qkv, Tensor):
        q_BTHE, k_BTHE, v_BTHE = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    else:
        q_BTHE, k_BTHE, v_BTHE = (x_BTD.unflatten(-1, (num_heads, -1)) for x_BTD in qkv)
    return q_BTHE, k_BTHE, v_BTHE


def split_heads(qkv: Projected, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, T, E), k and v (B, H, S, E), views."""
    q_BTHE, k_BTHE, v_BTHE = heads(qkv, num_heads)
    return q_BTHE.transpose(1, 2), k_BTHE.transpose(1, 2), v_BTHE.transpose(1, 2)


def join_heads(x_BHTE: Tensor) -> Tensor:
    return x_BHTE.transpose(1, 2).flatten(2)


# PyTorch's own: scaled_dot_product_attention.


def _sdpa(qkv: Projected, num_heads: int, scale: float | None) -> Tensor:
    return join_heads(F.scaled_dot_product_attention(*split_heads(qkv, num_heads), scale=scale))


def _sdpa_on(kernel: SDPBackend, qkv: Projected, num_heads: int, scale: float | None) -> Tensor:
    with sdpa_kernel(kernel):
        return _sdpa(qkv, num_heads, scale)


def _not_on(*device_types: str) -> Callable[[torch.device], str | None]:
    def missing(device: torch.device) -> str | None:
        if device.type in device_types:
            return None
        return f"it needs a tensor on {' or '.join(device_types)}, not on {device.type}"

    return missing


def _torch_refuses(can_use: Callable[..., bool], qkv: Projected, num_heads: int) -> str | None:
    if queries(qkv).device.type == "cpu":
        lie_side_by_side = all(x.stride(-1) == 1 for x in ((qkv,) if isinstance(qkv, Tensor) else qkv))
        return None if lie_side_by_side else "it needs features that lie side by side in memory"
    params = SDPAParams(*split_heads(qkv, num_heads), None, 0.0, False, False)  # no mask, dropout, causality, GQA
    if can_use(params):
        return None
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        can_use(params, debug=True)
    return " ".join(str(reason.message) for reason in reasons) or "PyTorch does not say why"


# The FlashAttention packages. Their limits as of flash-attn 2.8.3, flash_attn_3 3.0.0 and flash-attn-4 4.0.0b36.


def _package_missing(module: str, majors: range, install: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, the tensor is on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in majors:
        return f"it needs compute capability {majors[0]}.0 to {majors[-1]}.x, this GPU has {major}.{minor}"
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return f"the module {module} is missing ({error}); {install}"
    return None


def _package_refuses(max_head_dim: Callable[[torch.device], int], qkv: Projected, num_heads: int) -> str | None:
    q = queries(qkv)
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    E, limit = head_dim(qkv, num_heads), max_head_dim(q.device)
    if E % 8 or limit < E:  # the packages would pad, which copies, or fail an assertion
        return f"it takes heads of a width that is a multiple of 8 up to {limit}, not {E}"
    is_empty = any(x.numel() == 0 for x in ((qkv,) if isinstance(qkv, Tensor) else qkv))
    return "it takes no empty batch or sequence" if is_empty else None


_modules: dict[str, Any] = {}


def _module(name: str) -> Any:
    _load(name)
    return _modules[name]


@torch.compiler.assume_constant_result  # torch.compile does not trace an import by name: it runs while it traces
def _load(name: str) -> None:
    _modules[name] = importlib.import_module(name)


# The packed calls of FlashAttention 2 and 3 write the gradients of q, k and v into one tensor: no concatenation.


def _fa2(qkv: Projected, num_heads: int, scale: float | None) -> Tensor:
    return _flash("flash_attn.flash_attn_interface", qkv, num_heads, scale)


def _fa3(qkv: Projected, num_heads: int, scale: float | None) -> Tensor:
    return _flash("flash_attn_interface", qkv, num_heads, scale)


def _flash(module: str, qkv: Projected, num_heads: int, scale: float | None) -> Tensor:
    package = _module(module)
    options: dict[str, Any] = {"deterministic": torch.are_deterministic_algorithms_enabled()}
    if scale is not None:
        options["softmax_scale"] = scale
    if isinstance(qkv, Tensor):
        out_BTHE = package.flash_attn_qkvpacked_func(qkv.unflatten(-1, (3, num_heads, -1)), **options)
    else:
        out_BTHE = package.flash_attn_func(*heads(qkv, num_heads), **options)
    # Builds of FlashAttention 3 of 2024 return the log-sum-exp as well.
    return (out_BTHE[0] if isinstance(out_BTHE, tuple) else out_BTHE).flatten(2)


def _fa4_is_deterministic(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 12


def _fa4_max_head_dim(device: torch.device) -> int:
    return 256 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 else 128


def _fa4(qkv: Projected, num_heads: int, scale: float | None) -> Tensor:
    arguments = (*heads(qkv, num_heads), scale, torch.are_deterministic_algorithms_enabled())
    forward = _fa4_operator if torch.compiler.is_compiling() else _fa4_forward
    return forward(*arguments)[0].flatten(2)


def _fa4_forward(
    q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, scale: float | None, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """(B, T, H, E), and the log-sum-exp (B, H, T) in fp32."""
    attend = _module("flash_attn.cute.interface").flash_attn_func
    out_BTHE, lse_BHT, *_ = attend(
        q_BTHE, k_BSHE, v_BSHE, return_lse=True, **_fa4_options(q_BTHE, scale, deterministic)
    )
    return out_BTHE, lse_BHT


def _fa4_options(q_BTHE: Tensor, scale: float | None, deterministic: bool) -> dict[str, Any]:
    # Where it is not deterministic, it would fail an assertion.
    options: dict[str, Any] = {"deterministic": deterministic and _fa4_is_deterministic(q_BTHE.device)}
    return options if scale is None else options | {"softmax_scale": scale}


# flash-attn-4 has no operator that torch.compile could trace; this one replaces it there. Eager calls go round it.
@torch.library.custom_op("scalelong::flash_attention_4", mutates_args=())
def _fa4_operator(
    q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, scale: float | None, deterministic: bool
) -> tuple[Tensor, Tensor]:
    return _fa4_forward(q_BTHE, k_BSHE, v_BSHE, scale, deterministic)


@_fa4_operator.register_fake
def _(q_BTHE, k_BSHE, v_BSHE, scale, deterministic):
    B, T, H, _ = q_BTHE.shape
    out_BTHE = q_BTHE.new_empty(q_BTHE.shape)
    return out_BTHE, q_BTHE.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("scalelong::flash_attention_4_backward", mutates_args=())
def _fa4_backward_operator(
    d_out_BTHE: Tensor,
    q_BTHE: Tensor,
    k_BSHE: Tensor,
    v_BSHE: Tensor,
    out_BTHE: Tensor,
    lse_BHT: Tensor,
    scale: float | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    backward = _module("flash_attn.cute.interface")._flash_attn_bwd
    options = _fa4_options(q_BTHE, scale, deterministic)
    dq_BTHE, dk_BSHE, dv_BSHE, *_ = backward(q_BTHE, k_BSHE, v_BSHE, out_BTHE, d_out_BTHE, lse_BHT, **options)
    return dq_BTHE.contiguous(), dk_BSHE.contiguous(), dv_BSHE.contiguous()


@_fa4_backward_operator.register_fake
def _(d_out_BTHE, q_BTHE, k_BSHE, v_BSHE, out_BTHE, lse_BHT, scale, deterministic):
    return tuple(x.new_empty(x.shape) for x in (q_BTHE, k_BSHE, v_BSHE))


def _fa4_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *q_k_v, ctx.scale, ctx.deterministic = inputs
    ctx.save_for_backward(*q_k_v, *output)


def _fa4_backward(ctx: Any, d_out_BTHE: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_fa4_backward_operator(d_out_BTHE, *ctx.saved_tensors, ctx.scale, ctx.deterministic), None, None


_fa4_operator.register_autograd(_fa4_backward, setup_context=_fa4_save)


def _package(
    name: str,
    module: str,
    install: str,
    majors: range,
    call: Callable[[Projected, int, float | None], Tensor],
    *,
    max_head_dim: Callable[[torch.device], int] = lambda device: 256,
    is_deterministic: Callable[[torch.device], bool] = lambda device: True,
) -> Backend:
    return Backend(
        name,
        call,
        partial(_package_missing, module, majors, install),
        partial(_package_refuses, max_head_dim),
        is_deterministic,
    )


PACKAGES = ("fa4", "fa3", "fa2")
BACKENDS = {
    backend.name: backend
    for backend in (
        _package(
            "fa4",
            "flash_attn.cute.interface",
            "install it with: pip install 'scalelong[flash]'",
            range(9, 13),  # its forward runs on 8.x as well
            _fa4,
            max_head_dim=_fa4_max_head_dim,
            is_deterministic=_fa4_is_deterministic,
        ),
        _package(
            "fa3",
            "flash_attn_interface",
            "it is no package of PyPI, build it with: python setup.py install, in hopper/ of Dao-AILab/flash-attention",
            range(8, 10),
            _fa3,
        ),
        _package(
            "fa2",
            "flash_attn.flash_attn_interface",
            "compile it with: pip install flash-attn --no-build-isolation, which needs nvcc",
            range(8, 13),
            _fa2,
        ),
        # Under torch.use_deterministic_algorithms(True) it leaves cuDNN out by itself.
        Backend("sdpa", _sdpa),
        # cuDNN has a deterministic backward, PyTorch 2.13 does not reach it and refuses cuDNN instead.
        Backend(
            "cudnn",
            partial(_sdpa_on, SDPBackend.CUDNN_ATTENTION),
            _not_on("cuda"),
            partial(_torch_refuses, can_use_cudnn_attention),
            lambda device: False,
        ),
        Backend(
            "flash",
            partial(_sdpa_on, SDPBackend.FLASH_ATTENTION),
            _not_on("cuda", "cpu"),
            partial(_torch_refuses, can_use_flash_attention),
        ),
        Backend(
            "efficient",
            partial(_sdpa_on, SDPBackend.EFFICIENT_ATTENTION),
            _not_on("cuda"),
            partial(_torch_refuses, can_use_efficient_attention),
        ),
        Backend("math", partial(_sdpa_on, SDPBackend.MATH)),
    )
}
