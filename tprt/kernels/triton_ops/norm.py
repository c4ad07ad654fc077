"""LayerNorm of rows, and the sum that ends a row-parallel layer together with the LayerNorm after it.

One program holds a whole row in registers: the mean first, then the variance of what is left, both in
float32. The layout, and with it the order of every sum, depends on the width alone.

Legend: T tokens, P partial sums.
"""

import torch
import triton
import triton.language as tl

from tprt.kernels.interface import Norm, Tensors
from tprt.kernels.triton_ops.numerics import round_to


def layer_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """[T, width], its rows contiguous, -> the same shape and dtype; see ``interface.Kernels``."""
    assert x.stride(1) == 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _layer_norm_kernel[(len(x),)](
        x, norm.weight, norm.bias, out, x.shape[1], x.stride(0), norm.eps, **row_launch(x.shape[1])
    )
    return out


def add_layer_norm(
    x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, norm: Norm
) -> Tensors:
    """``residual`` + (x + bias), rounded once, and the LayerNorm of what that was rounded to.

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
    _add_layer_norm_kernel[(rows,)](
        parts, bias, residual, norm.weight, norm.bias, total, out,
        width, len(parts), parts.stride(0), parts.stride(1), residual.stride(0), norm.eps,
        # Loads of so many parts are under way together; wide rows need the registers themselves.
        AT_ONCE=4 if width <= 8192 else 2,
        **row_launch(width),
    )  # fmt: skip
    return total, out


def row_launch(width: int) -> dict[str, int]:
    """For a program per row: eight elements per thread up to 4096, as a decode step has few rows."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


@triton.jit
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, width, x_stride, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + columns, mask=columns < width, other=0.0).to(tl.float32)
    _normalize(x, weight_ptr, bias_ptr, out_ptr + row * width, width, eps, BLOCK)


@triton.jit
def _add_layer_norm_kernel(
    parts_ptr, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, total_ptr, out_ptr,
    width, num_parts, part_stride, row_stride, residual_stride, eps,
    AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
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
    _normalize(total, norm_weight_ptr, norm_bias_ptr, out_ptr + row * width, width, eps, BLOCK)


@triton.jit
def _normalize(x, weight_ptr, bias_ptr, out_ptr, width, eps, BLOCK: tl.constexpr):
    """Store the LayerNorm of one row; ``x`` is float32 [BLOCK], 0 from ``width`` on."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    centered = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
    variance = tl.sum(centered * centered, axis=0) / width
    y = centered * tl.rsqrt(variance + eps) * weight + bias
    tl.store(out_ptr + columns, round_to(y, out_ptr.dtype.element_ty), mask=inside)
