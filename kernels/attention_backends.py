"""What can compute softmax attention over a packed projection, what each needs, and how each is called.

All take strided views of the projection: nothing is copied or cast on the way in.
Where PyTorch or a package can name its own limits, they are asked; only what they leave to a crash is written here.

Shapes: B batch, T tokens, H heads, D model width, E = D / H width of a head.
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


@dataclass(frozen=True)
class Backend:
    """One way to compute attention."""

    name: str
    call: Callable[[Tensor, int], Tensor]
    """(B, T, 3D) and H to (B, T, D)."""
    missing: Callable[[torch.device], str | None] = lambda device: None
    """The device or package that this machine lacks and how to get it; None where all is there."""
    refuses: Callable[[Tensor, int], str | None] = lambda qkv, num_heads: None
    """Why it cannot take this input on this machine; None where it can."""
    is_deterministic: Callable[[torch.device], bool] = lambda device: True
    """Whether its backward is, under torch.use_deterministic_algorithms(True)."""

    def why_not(self, qkv: Tensor, num_heads: int) -> str | None:
        return self.missing(qkv.device) or self.refuses(qkv, num_heads)


def split_heads(qkv_BT3D: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of (B, H, T, E), views.

    The backward of the unbind is one stack, right into the layout of ``qkv``. Three selects would fill and add three
    tensors of its size; an unbind after the permutation stacks in another layout, and the way back copies that.
    """
    q_BTHE, k_BTHE, v_BTHE = qkv_BT3D.unflatten(-1, (3, num_heads, -1)).unbind(2)
    return q_BTHE.transpose(1, 2), k_BTHE.transpose(1, 2), v_BTHE.transpose(1, 2)


def join_heads(x_BHTE: Tensor) -> Tensor:
    return x_BHTE.transpose(1, 2).flatten(2)


# PyTorch's own: scaled_dot_product_attention.


def _sdpa(qkv_BT3D: Tensor, num_heads: int) -> Tensor:
    return join_heads(F.scaled_dot_product_attention(*split_heads(qkv_BT3D, num_heads)))


def _sdpa_on(kernel: SDPBackend, qkv_BT3D: Tensor, num_heads: int) -> Tensor:
    with sdpa_kernel(kernel):
        return _sdpa(qkv_BT3D, num_heads)


def _not_on(*device_types: str) -> Callable[[torch.device], str | None]:
    def missing(device: torch.device) -> str | None:
        if device.type in device_types:
            return None
        return f"it needs a tensor on {' or '.join(device_types)}, not on {device.type}"

    return missing


def _torch_refuses(can_use: Callable[..., bool], qkv_BT3D: Tensor, num_heads: int) -> str | None:
    if qkv_BT3D.device.type == "cpu":
        return None if qkv_BT3D.stride(-1) == 1 else "it needs features that lie side by side in memory"
    params = SDPAParams(*split_heads(qkv_BT3D, num_heads), None, 0.0, False, False)  # no mask, dropout, causality, GQA
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


def _package_refuses(max_head_dim: Callable[[torch.device], int], qkv_BT3D: Tensor, num_heads: int) -> str | None:
    if qkv_BT3D.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {str(qkv_BT3D.dtype).removeprefix('torch.')}"
    E, limit = qkv_BT3D.shape[-1] // (3 * num_heads), max_head_dim(qkv_BT3D.device)
    if E % 8 or limit < E:  # the packages would pad, which copies, or fail an assertion
        return f"it takes heads of a width that is a multiple of 8 up to {limit}, not {E}"
    return None if qkv_BT3D.numel() else "it takes no empty batch or sequence"


_modules: dict[str, Any] = {}


def _module(name: str) -> Any:
    _load(name)
    return _modules[name]


@torch.compiler.assume_constant_result  # torch.compile does not trace an import by name: it runs while it traces
def _load(name: str) -> None:
    _modules[name] = importlib.import_module(name)


# The packed calls of FlashAttention 2 and 3 write the gradients of q, k and v into one tensor: no concatenation.


def _fa2(qkv_BT3D: Tensor, num_heads: int) -> Tensor:
    attend = _module("flash_attn.flash_attn_interface").flash_attn_qkvpacked_func
    qkv_BT3HE = qkv_BT3D.unflatten(-1, (3, num_heads, -1))
    return attend(qkv_BT3HE, deterministic=torch.are_deterministic_algorithms_enabled()).flatten(2)


def _fa3(qkv_BT3D: Tensor, num_heads: int) -> Tensor:
    attend = _module("flash_attn_interface").flash_attn_qkvpacked_func
    qkv_BT3HE = qkv_BT3D.unflatten(-1, (3, num_heads, -1))
    out_BTHE = attend(qkv_BT3HE, deterministic=torch.are_deterministic_algorithms_enabled())
    # Builds of 2024 return the log-sum-exp as well.
    return (out_BTHE[0] if isinstance(out_BTHE, tuple) else out_BTHE).flatten(2)


def _fa4_is_deterministic(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 12


def _fa4_max_head_dim(device: torch.device) -> int:
    return 256 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 else 128


def _fa4(qkv_BT3D: Tensor, num_heads: int) -> Tensor:
    deterministic = torch.are_deterministic_algorithms_enabled()
    qkv_BT3HE = qkv_BT3D.unflatten(-1, (3, num_heads, -1))
    if torch.compiler.is_compiling():
        return _fa4_operator(qkv_BT3HE, deterministic)[0].flatten(2)
    return _fa4_forward(qkv_BT3HE, deterministic)[0].flatten(2)


def _fa4_forward(qkv_BT3HE: Tensor, deterministic: bool) -> tuple[Tensor, Tensor]:
    """(B, T, H, E), and the log-sum-exp (B, H, T) in fp32."""
    attend = _module("flash_attn.cute.interface").flash_attn_func
    deterministic = deterministic and _fa4_is_deterministic(qkv_BT3HE.device)  # elsewhere it would fail an assertion
    out_BTHE, lse_BHT, *_ = attend(*qkv_BT3HE.unbind(2), deterministic=deterministic, return_lse=True)
    return out_BTHE, lse_BHT


# flash-attn-4 has no operator that torch.compile could trace; this one stands in for it there. Eager calls go round it.
@torch.library.custom_op("scalelong::flash_attention_4", mutates_args=())
def _fa4_operator(qkv_BT3HE: Tensor, deterministic: bool) -> tuple[Tensor, Tensor]:
    return _fa4_forward(qkv_BT3HE, deterministic)


@_fa4_operator.register_fake
def _(qkv_BT3HE: Tensor, deterministic: bool) -> tuple[Tensor, Tensor]:
    B, T, _, H, E = qkv_BT3HE.shape
    return qkv_BT3HE.new_empty(B, T, H, E), qkv_BT3HE.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("scalelong::flash_attention_4_backward", mutates_args=())
def _fa4_backward_operator(
    d_out_BTHE: Tensor, qkv_BT3HE: Tensor, out_BTHE: Tensor, lse_BHT: Tensor, deterministic: bool
) -> Tensor:
    backward = _module("flash_attn.cute.interface")._flash_attn_bwd
    deterministic = deterministic and _fa4_is_deterministic(qkv_BT3HE.device)
    dq_dk_dv = backward(*qkv_BT3HE.unbind(2), out_BTHE, d_out_BTHE, lse_BHT, deterministic=deterministic)[:3]
    return torch.stack(dq_dk_dv, dim=2)


@_fa4_backward_operator.register_fake
def _(d_out_BTHE: Tensor, qkv_BT3HE: Tensor, out_BTHE: Tensor, lse_BHT: Tensor, deterministic: bool) -> Tensor:
    return qkv_BT3HE.new_empty(qkv_BT3HE.shape)


def _fa4_save(ctx, inputs: tuple[Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    qkv_BT3HE, ctx.deterministic = inputs
    ctx.save_for_backward(qkv_BT3HE, *output)


def _fa4_backward(ctx, d_out_BTHE: Tensor, _: Tensor) -> tuple[Tensor, None]:
    return _fa4_backward_operator(d_out_BTHE, *ctx.saved_tensors, ctx.deterministic), None


_fa4_operator.register_autograd(_fa4_backward, setup_context=_fa4_save)


def _package(
    name: str,
    module: str,
    install: str,
    majors: range,
    call: Callable[[Tensor, int], Tensor],
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
