"""The activations of the Triton kernels and their derivatives, in fp32."""
# pyright: reportGeneralTypeIssues=false
# (to a type checker, a call of one jitted function by another never returns)

import os

import triton
import triton.language as tl

# The interpreter knows no assembly.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def sigmoid(z):
    """By the two instructions that a GPU has for it, accurate to about 1e-7; tl.sigmoid takes thirteen."""
    if INTERPRETED:
        return tl.sigmoid(z)
    power = tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [z * -1.4426950408889634], tl.float32, is_pure=True, pack=1
    )
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [power + 1.0], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def normal_cdf(z):
    return 0.5 + 0.5 * tl.math.erf(z * 0.7071067811865476)


@triton.jit
def activate(z, ACT: tl.constexpr):
    if ACT == "silu":
        return z * sigmoid(z)
    elif ACT == "gelu":
        return z * normal_cdf(z)
    elif ACT == "gelu-tanh":  # 1 + tanh(u) = 2 sigmoid(2 u)
        return z * sigmoid(z * (1.5957691216057308 + 0.07135481627260025 * z * z))
    else:
        return z


@triton.jit
def activation_slope(z, ACT: tl.constexpr):
    if ACT == "silu":
        sigma = sigmoid(z)
        return sigma + sigma * (z - z * sigma)  # with fused multiply-adds two instructions
    elif ACT == "gelu":
        return normal_cdf(z) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == "gelu-tanh":
        # Beyond 10 the slope is 0 or 1. By sigmoid(-w) instead of 1 - sigmoid(w), which would lose its digits.
        z = tl.clamp(z, -10.0, 10.0, propagate_nan=tl.PropagateNan.ALL)
        square = z * z
        w = z * (1.5957691216057308 + 0.07135481627260025 * square)
        slope_of_w = 1.5957691216057308 + 0.21406444881780073 * square
        return sigmoid(w) * (1 + z * slope_of_w * sigmoid(-w))
    else:
        return tl.full(z.shape, 1.0, tl.float32)
