"""LayerNorm or RMSNorm of rows, and the sum that ends a row-parallel layer with the norm after it.

One program holds a whole row in registers: the mean first, then the variance of what is left, both in
float32. The order of every sum depends on the width alone, not on how many threads take part: a product
that computes the LayerNorm of what it reads gets the same bits (``statistics``, ``normalize``).

Legend: T tokens, P partial sums.
"""

import torch
import triton
import triton.language as tl

from tprt.kernels.interface import Norm, Tensors
from tprt.kernels.triton_ops.numerics import round_to
from tprt.kernels.triton_ops.pdl import pdl_launch_dependents, pdl_options, pdl_wait


def layer_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """[T, width], its rows contiguous, -> the same shape and dtype; see ``interface.Norm``."""
    assert x.stride(1) == 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight, bias, rms = _parameters(norm)
    _layer_norm_kernel[(len(x),)](
        x, weight, bias, out, x.shape[1], x.stride(0), norm.eps,
        RMS=rms, **row_launch(x.shape[1]), **pdl_options(x.device),
    )  # fmt: skip
    return out


def add_layer_norm(
    x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, norm: Norm
) -> Tensors:
    """``residual`` + (x + bias), rounded once, and the norm of what that was rounded to.

    Args:
        x: [T, width] in any dtype, or a stack of partial sums [P, T, width], added up in their order.
        bias: [width]. residual: [T, width]. Rows are contiguous.

    Returns:
        Two tensors [T, width] in the dtype of ``residual``.
    """
    parts = x if x.dim() == 3 else x.unsqueeze(0)
    assert parts.shape[1:] == residual.shape and parts.stride(2) == residual.stride(1) == 1
    rows, width = residual.shape
    total, out = (torch.empty_like(residual, memory_format=torch.contiguous_format) for _ in "12")
    norm_weight, norm_bias, rms = _parameters(norm)
    _add_layer_norm_kernel[(rows,)](
        parts, bias, residual, norm_weight, norm_bias, total, out,
        width, len(parts), parts.stride(0), parts.stride(1), residual.stride(0), norm.eps,
        # Loads of so many parts are under way together; wide rows need the registers themselves.
        AT_ONCE=4 if width <= 8192 else 2,
        RMS=rms, **row_launch(width), **pdl_options(x.device),
    )  # fmt: skip
    return total, out


def _parameters(norm: Norm) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Weight, bias and whether it is an RMSNorm, whose bias is never read."""
    rms = norm.bias is None
    return norm.weight, norm.weight if norm.bias is None else norm.bias, rms


def row_launch(width: int) -> dict[str, int]:
    """For a program per row: eight elements per thread up to 4096, as a decode step has few rows."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


@triton.jit
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, width, x_stride, eps,
    RMS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    bias = weight if RMS else tl.load(bias_ptr + columns, mask=inside, other=0.0)
    pdl_wait(PDL)
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if RMS:
        y = rms_normalize(x, weight, width, eps, BLOCK, out_ptr.dtype.element_ty)
    else:
        mean, scale = statistics(x, width, eps, BLOCK)
        y = normalize(x, mean, scale, weight, bias, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + columns, y, mask=inside)


@triton.jit
def _add_layer_norm_kernel(
    parts_ptr, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, total_ptr, out_ptr,
    width, num_parts, part_stride, row_stride, residual_stride, eps,
    AT_ONCE: tl.constexpr, RMS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
    if BLOCK <= 8192:  # wider ones have no registers for what is used last
        norm_weight = tl.load(norm_weight_ptr + columns, mask=inside, other=0.0)
        if not RMS:
            norm_bias = tl.load(norm_bias_ptr + columns, mask=inside, other=0.0)
    pdl_wait(PDL)
    residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
    parts_ptr += row * row_stride + columns
    x = tl.load(parts_ptr, mask=inside, other=0.0).to(tl.float32)
    for first in range(1, num_parts, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            parts_ptr += part_stride
            end = tl.where(num_parts > first + i, width, 0)
            x += tl.load(parts_ptr, mask=columns < end, other=0.0).to(tl.float32)
    x = residual.to(tl.float32) + (x + bias.to(tl.float32))
    total = round_to(x, total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * width + columns, total, mask=inside)
    total = total.to(tl.float32)
    if BLOCK > 8192:
        norm_weight = tl.load(norm_weight_ptr + columns, mask=inside, other=0.0)
        if not RMS:
            norm_bias = tl.load(norm_bias_ptr + columns, mask=inside, other=0.0)
    if RMS:
        y = rms_normalize(total, norm_weight, width, eps, BLOCK, out_ptr.dtype.element_ty)
    else:
        mean, scale = statistics(total, width, eps, BLOCK)
        y = normalize(total, mean, scale, norm_weight, norm_bias, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + columns, y, mask=inside)


@triton.jit
def statistics(x, width, eps, BLOCK: tl.constexpr):
    """Mean of a row and 1 / its deviation; ``x`` is float32 [BLOCK], 0 from ``width`` on."""
    mean = row_sum(x, BLOCK) / width
    centered = tl.where(tl.arange(0, BLOCK) < width, x - mean, 0.0)
    # Squares as they are: fused with the first additions they would not be the same everywhere.
    squares = tl.fma(centered, centered, tl.zeros_like(centered))
    return mean, tl.rsqrt(row_sum(squares, BLOCK) / width + eps)


@triton.jit
def normalize(x, mean, scale, weight, bias, dtype: tl.constexpr):
    """Elements of the LayerNorm of a row, float32 ``x`` of any shape, rounded to ``dtype``."""
    y = tl.fma((x - mean) * scale, weight.to(tl.float32), bias.to(tl.float32))
    return round_to(y, dtype)


@triton.jit
def rms_normalize(x, weight, width, eps, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """Elements of the RMSNorm of a row, float32 ``x`` [BLOCK], 0 from ``width`` on."""
    squares = tl.fma(x, x, tl.zeros_like(x))
    scale = tl.rsqrt(row_sum(squares, BLOCK) / width + eps)
    return round_to(x * scale * (1.0 + weight.to(tl.float32)), dtype)


@triton.jit
def row_sum(x, BLOCK: tl.constexpr):
    """The sum of [BLOCK], a power of two, in an order that no layout changes past 256 elements.

    Those are what a warp loads at a time; beyond them, halves are added, two numbers at a time.
    """
    SPAN: tl.constexpr = 256 if BLOCK > 256 else BLOCK
    x = tl.sum(tl.reshape(x, (BLOCK // SPAN, SPAN)), axis=1)
    for level in tl.static_range(1, 24):
        if BLOCK // SPAN >> level > 0:
            x = tl.sum(tl.reshape(x, (2, BLOCK // SPAN >> level)), axis=0)
    return tl.sum(x, axis=0)
