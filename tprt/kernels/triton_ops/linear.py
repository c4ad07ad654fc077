"""Products of few rows with a weight: bound by reading it, once, 16 bytes at a time.

Two variants. "fma" multiplies on CUDA cores: a thread adds up the products of what one of its loads
brings, then those over k, and at the end all threads of a program. "dot" pads the rows to the 16 of a
tensor core. Either adds up in an order that its tile fixes and the number of rows does not change.
More rows than ``tiles`` says go to cuBLAS.

What surrounds a product belongs to it where that saves a kernel: the LayerNorm of x ahead (fma alone:
each program needs the statistics of all rows), bias and residual, or bias and activation, behind. Bits
are those of the separate kernels. The first weights of a program are asked for before it waits for the
kernels ahead of it, and used last.

Legend: T tokens, x [T, k], weight [n, k].
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from tprt.kernels.interface import Activations, Norm, PendingNorm
from tprt.kernels.reference import FP16_MAX
from tprt.kernels.triton_ops import head
from tprt.kernels.triton_ops.norm import layer_norm, normalize, statistics
from tprt.kernels.triton_ops.numerics import INTERPRETED, round_to
from tprt.kernels.triton_ops.pdl import pdl_launch_dependents, pdl_options, pdl_wait
from tprt.kernels.triton_ops.tiles import MAX_FMA_ROWS, MAX_ROWS, Tile, Tiles

_FP16_MAX = tl.constexpr(FP16_MAX)
_ROWS = tl.constexpr(MAX_ROWS)
_POINTWISE_BLOCK = 1024
_MAX_NORM_WIDTH = 8192  # a program of a product holds a whole row in the registers of few warps


def linear(
    x: Activations, weight: torch.Tensor, bias: torch.Tensor | None, tiles: Tiles
) -> torch.Tensor:
    """See ``interface.Kernels``; here and below ``tiles`` says who computes it."""
    x, norm, tile = _choose(x, weight, tiles)
    return F.linear(x, weight, bias) if tile is None else _skinny(x, weight, tile, bias, norm=norm)


def linear_squared_relu(
    x: Activations, weight: torch.Tensor, bias: torch.Tensor, tiles: Tiles
) -> torch.Tensor:
    """See ``interface.Kernels``."""
    x, norm, tile = _choose(x, weight, tiles)
    if tile is not None:
        return _skinny(x, weight, tile, bias, squared_relu=True, norm=norm)
    return add_squared_relu_(F.linear(x, weight), bias)


def linear_unrounded(x: torch.Tensor, weight: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """x W^T for who adds it to something: float32 from few rows, else in the dtype of ``x``."""
    x, _, tile = _choose(x, weight, tiles)
    return F.linear(x, weight) if tile is None else _skinny(x, weight, tile, dtype=torch.float32)


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    tiles: Tiles,
) -> torch.Tensor | None:
    """``residual`` + (x W^T + ``bias``), rounded once; None where cuBLAS serves."""
    x, _, tile = _choose(x, weight, tiles)
    if tile is None:
        return None
    return _skinny(x, weight, tile, bias, dtype=residual.dtype, residual=residual)


def logits(x: torch.Tensor, weight: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """x W^T, float32 [T, n], never rounded to the dtype of the model."""
    x, _, tile = _choose(x, weight, tiles)
    if tile is None:
        return head.logits(x, weight)
    return _skinny(x, weight, tile, dtype=torch.float32)


def product(x: torch.Tensor, weight: torch.Tensor, tile: Tile | None) -> torch.Tensor:
    """x W^T with one tile, or by cuBLAS: what ``tiles.tune`` times."""
    return F.linear(x, weight) if tile is None else _skinny(x, weight, tile)


def add_squared_relu_(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """relu(x + bias)^2 in place of contiguous [T, n]; float32 inside, capped in float16."""
    assert x.is_contiguous()
    rows, n = x.shape
    _add_squared_relu_kernel[(rows, triton.cdiv(n, _POINTWISE_BLOCK))](
        x, bias, n, BLOCK=_POINTWISE_BLOCK, num_warps=4, **pdl_options(x.device)
    )
    return x


def _choose(
    x: Activations, weight: torch.Tensor, tiles: Tiles
) -> tuple[torch.Tensor, Norm | None, Tile | None]:
    """What the product reads, the LayerNorm it takes of that, and how it is computed."""
    pending = x if isinstance(x, PendingNorm) else None
    x = x.x if isinstance(x, PendingNorm) else x
    n, k = weight.shape
    # Of a transposed weight there are no rows to stream: cuBLAS reads it as it lies.
    tile = tiles.choose(len(x), n, k, x.dtype) if weight.stride(1) == 1 else None
    if pending is None:
        return x, None, tile
    if tile is not None and tile.variant == "fma" and k <= _MAX_NORM_WIDTH:
        return x, pending.norm, tile
    return layer_norm(*pending), None, tile


def _skinny(
    x: torch.Tensor,
    weight: torch.Tensor,
    tile: Tile,
    bias: torch.Tensor | None = None,
    squared_relu: bool = False,
    dtype: torch.dtype | None = None,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, n] in ``dtype``, that of ``x`` unless given; rows of ``weight`` are contiguous."""
    assert x.dtype == weight.dtype
    rows, k = x.shape
    n = len(weight)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty((rows, n), dtype=dtype or x.dtype, device=x.device)
    x_stride = x.stride(0) if rows > 1 else k  # of a single row it may be anything
    # Triton notes of a number whether 16 divides it, no less; 16 bytes are 8 or 4 elements.
    unit = 8 if (k | x_stride | weight.stride(0)) % 8 == 0 else 1
    sizes = n, k // unit, x_stride // unit, weight.stride(0) // unit
    options = {
        "HAS_BIAS": bias is not None,
        "ADD": residual is not None,
        "SQUARED_RELU": squared_relu,
        "UNIT": unit,
        "EVEN": k % tile.block_k == 0,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.num_stages,
        "num_warps": tile.num_warps,
        **pdl_options(x.device),
    }
    grid = (triton.cdiv(n, tile.block_n),)
    add, stride = (x, 0) if residual is None else (residual, residual.stride(0))
    assert residual is None or residual.stride(1) == 1
    tensors = x, weight, weight if bias is None else bias, add, out
    if tile.variant == "fma":
        assert rows <= MAX_FMA_ROWS
        vector = min(16 // x.element_size(), tile.block_k)
        scale, shift, eps = (x, x, 0.0) if norm is None else norm[:3]
        width = 0 if norm is None else triton.next_power_of_2(k)
        _fma_kernel[grid](
            *tensors, scale, shift, *sizes, stride, eps,
            ROWS=rows, VECTOR=vector, NORM_BLOCK=width, **options,
        )  # fmt: skip
    else:
        assert rows <= MAX_ROWS and norm is None
        _dot_kernel[grid](*tensors, *sizes, stride, rows, **options)
    return out


@triton.jit(do_not_specialize=["residual_stride"])
def _fma_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, norm_weight_ptr, norm_bias_ptr,
    n, k_units, x_units, weight_units, residual_stride, eps,
    ROWS: tl.constexpr, VECTOR: tl.constexpr, NORM_BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, SQUARED_RELU: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``NORM_BLOCK`` 0 takes x as it is, otherwise its LayerNorm; it is a power of two, at least k."""
    pdl_launch_dependents(PDL)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe = tl.minimum(columns, n - 1).to(tl.int64)  # what lies past the end is read, never stored
    i = tl.arange(0, BLOCK_K)
    width = k_units * UNIT
    x_stride = x_units * UNIT
    weight_ptr += (safe * (weight_units * UNIT))[:, None] + i[None, :]
    # A weight is read once: it should leave the caches before x and everything else.
    if EVEN:
        first = tl.load(weight_ptr, eviction_policy="evict_first")
    else:
        first = tl.load(
            weight_ptr, mask=(i < width)[None, :], other=0.0, eviction_policy="evict_first"
        )
    if HAS_BIAS:  # asked for now, there when the sums are
        bias = tl.load(bias_ptr + safe).to(tl.float32)
    pdl_wait(PDL)
    means: tl.tuple = ()
    scales: tl.tuple = ()
    before: tl.tuple = ()
    for row in tl.static_range(ROWS):
        if ADD:
            before = before + (tl.load(residual_ptr + row * residual_stride + safe),)  # noqa: RUF005
        if NORM_BLOCK:
            whole = tl.arange(0, NORM_BLOCK)
            x_row = tl.load(x_ptr + row * x_stride + whole, mask=whole < width, other=0.0)
            mean, scale = statistics(x_row.to(tl.float32), width, eps, NORM_BLOCK)
            means = means + (mean,)  # noqa: RUF005
            scales = scales + (scale,)  # noqa: RUF005
    zeros = tl.zeros((BLOCK_N, BLOCK_K // VECTOR), dtype=tl.float32)
    sums = (zeros,) * ROWS
    for start in tl.range(BLOCK_K, width, BLOCK_K, num_stages=STAGES):
        if EVEN:
            w = tl.load(weight_ptr + start, eviction_policy="evict_first")
        else:
            w = tl.load(
                weight_ptr + start,
                mask=(i < width - start)[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
        sums = _add_products(
            sums, w, x_ptr + start, norm_weight_ptr + start, norm_bias_ptr + start, means, scales,
            width - start, x_stride, ROWS, VECTOR, NORM_BLOCK, EVEN, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    sums = _add_products(
        sums, first, x_ptr, norm_weight_ptr, norm_bias_ptr, means, scales,
        width, x_stride, ROWS, VECTOR, NORM_BLOCK, EVEN, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    for row in tl.static_range(ROWS):
        y = tl.sum(sums[row], axis=1)
        if HAS_BIAS:
            y += bias
        if ADD:
            y = before[row].to(tl.float32) + y
        if SQUARED_RELU:
            y = _squared_relu(y, out_ptr.dtype.element_ty)
        y = round_to(y, out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * n + columns, y, mask=columns < n)


@triton.jit
def _add_products(
    sums, weight, x_ptr, norm_weight_ptr, norm_bias_ptr, means, scales, left, x_stride,
    ROWS: tl.constexpr, VECTOR: tl.constexpr, NORM_BLOCK: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``sums`` of each row, float32 [BLOCK_N, BLOCK_K / VECTOR], with the products of one block of k."""
    i = tl.arange(0, BLOCK_K)
    w = weight.to(tl.float32)
    inside = i < left
    if NORM_BLOCK:
        if EVEN:
            norm_weight, norm_bias = tl.load(norm_weight_ptr + i), tl.load(norm_bias_ptr + i)
        else:
            norm_weight = tl.load(norm_weight_ptr + i, mask=inside, other=0.0)
            norm_bias = tl.load(norm_bias_ptr + i, mask=inside, other=0.0)
    next_sums: tl.tuple = ()
    for row in tl.static_range(ROWS):
        if EVEN:
            x = tl.load(x_ptr + row * x_stride + i)
        else:
            x = tl.load(x_ptr + row * x_stride + i, mask=inside, other=0.0)
        x = x.to(tl.float32)
        if NORM_BLOCK:  # past the end weight and bias are 0
            x = normalize(x, means[row], scales[row], norm_weight, norm_bias, weight.dtype)
            x = x.to(tl.float32)
        # Within a thread: the last dimension is what one of its loads brings.
        products = tl.reshape(w * x[None, :], (BLOCK_N, BLOCK_K // VECTOR, VECTOR))
        # Triton knows no (*next_sums, ...).
        next_sums = next_sums + (sums[row] + tl.sum(products, axis=2),)  # noqa: RUF005
    return next_sums


# One binary for any number of rows, 1 and 16 included.
@triton.jit(do_not_specialize=["num_rows", "residual_stride"])
def _dot_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    n, k_units, x_units, weight_units, residual_stride, num_rows,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr, SQUARED_RELU: tl.constexpr,
    UNIT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_launch_dependents(PDL)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe = tl.minimum(columns, n - 1).to(tl.int64)
    rows, i = tl.arange(0, _ROWS), tl.arange(0, BLOCK_K)
    is_row = (rows < num_rows)[:, None]
    width = k_units * UNIT
    weight_ptr += (safe * (weight_units * UNIT))[None, :] + i[:, None]
    x_ptr += (rows * (x_units * UNIT))[:, None] + i[None, :]
    inside = i < width
    # float32 is multiplied on CUDA cores, which takes all registers.
    AHEAD: tl.constexpr = weight_ptr.dtype.element_ty != tl.float32
    if AHEAD:
        first = tl.load(weight_ptr, mask=inside[:, None], other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + safe).to(tl.float32)
    pdl_wait(PDL)
    if ADD:
        before = residual_ptr + rows[:, None] * residual_stride + safe[None, :]
        before = tl.load(before, mask=is_row, other=0.0)
    y = tl.zeros((_ROWS, BLOCK_N), dtype=tl.float32)
    for start in tl.range(BLOCK_K, width, BLOCK_K, num_stages=STAGES):
        if EVEN:
            w = tl.load(weight_ptr + start)
            x = tl.load(x_ptr + start, mask=is_row, other=0.0)
        else:
            left = i < width - start
            w = tl.load(weight_ptr + start, mask=left[:, None], other=0.0)
            x = tl.load(x_ptr + start, mask=is_row & left[None, :], other=0.0)
        y = _dot(x, w, y)
    if not AHEAD:
        first = tl.load(weight_ptr, mask=inside[:, None], other=0.0)
    y = _dot(tl.load(x_ptr, mask=is_row & inside[None, :], other=0.0), first, y)
    if HAS_BIAS:
        y += bias[None, :]
    if ADD:
        y = before.to(tl.float32) + y
    if SQUARED_RELU:
        y = _squared_relu(y, out_ptr.dtype.element_ty)
    y = round_to(y, out_ptr.dtype.element_ty)
    mask = is_row & (columns < n)[None, :]
    tl.store(out_ptr + rows[:, None] * n + columns[None, :], y, mask=mask)


@triton.jit
def _dot(x, w, y):
    if INTERPRETED:  # it would multiply the bit patterns of bfloat16
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, y, input_precision="ieee")


@triton.jit
def _add_squared_relu_kernel(x_ptr, bias_ptr, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    pdl_launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    x_ptr += row * n + columns
    bias = tl.load(bias_ptr + columns, mask=inside).to(tl.float32)
    pdl_wait(PDL)
    y = tl.load(x_ptr, mask=inside).to(tl.float32) + bias
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tl.store(x_ptr, round_to(_squared_relu(y, dtype), dtype), mask=inside)


@triton.jit
def _squared_relu(x, dtype: tl.constexpr):
    """relu(x)^2 of float32, to be stored as ``dtype``; comparisons let NaN through."""
    x = tl.where(x < 0, 0.0, x)
    y = x * x
    if dtype == tl.float16:
        y = tl.where(y > _FP16_MAX, _FP16_MAX, y)
    return y
