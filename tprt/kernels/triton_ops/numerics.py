"""Rounding, products and activations as GPUs do them, also where Triton's interpreter runs a kernel."""

import triton
import triton.language as tl

# Whether kernels defined from here on are interpreted: on the CPU, with numpy.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 -> ``dtype``, to nearest, ties to even. The interpreter cuts bfloat16 off instead."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        nearest = nearest.to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)  # the carry would turn some NaN into a number
    return x.to(dtype)


@triton.jit
def dot(x, y):
    """x y in float32. The interpreter would multiply the bit patterns of bfloat16."""
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def gelu(x):
    """In its form with tanh, tanh(u) as 2 sigmoid(2 u) - 1."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * sigmoid(2.0 * u)
