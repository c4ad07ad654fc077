"""Products of few rows with a weight: bound by reading it, once, 16 bytes at a time.

Two variants. "fma" multiplies on CUDA cores: a thread adds up the products of what one of its loads
brings, then those over k, and at the end all threads of a program. "dot" pads the rows to the 16 of a
tensor core. Either adds up in an order that its tile fixes and the number of rows does not change.
More rows than ``tiles`` says go to cuBLAS.

Legend: T tokens, x [T, k], weight [n, k].
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from tprt.kernels.reference import FP16_MAX
from tprt.kernels.triton_ops import head
from tprt.kernels.triton_ops.numerics import INTERPRETED, round_to
from tprt.kernels.triton_ops.tiles import MAX_FMA_ROWS, MAX_ROWS, Tile, Tiles

_FP16_MAX = tl.constexpr(FP16_MAX)
_ROWS = tl.constexpr(MAX_ROWS)
_POINTWISE_BLOCK = 1024


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tiles: Tiles
) -> torch.Tensor:
    """See ``interface.Kernels``; here and below ``tiles`` says who computes it."""
    tile = _choose(x, weight, tiles)
    return F.linear(x, weight, bias) if tile is None else _skinny(x, weight, tile, bias)


def linear_squared_relu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, tiles: Tiles
) -> torch.Tensor:
    """See ``interface.Kernels``."""
    tile = _choose(x, weight, tiles)
    if tile is not None:
        return _skinny(x, weight, tile, bias, squared_relu=True)
    return add_squared_relu_(F.linear(x, weight), bias)


def linear_unrounded(x: torch.Tensor, weight: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """x W^T for who adds it to something: float32 from few rows, else in the dtype of ``x``."""
    tile = _choose(x, weight, tiles)
    return F.linear(x, weight) if tile is None else _skinny(x, weight, tile, dtype=torch.float32)


def logits(x: torch.Tensor, weight: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """x W^T, float32 [T, n], never rounded to the dtype of the model."""
    tile = _choose(x, weight, tiles)
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
        x, bias, n, BLOCK=_POINTWISE_BLOCK, num_warps=4
    )
    return x


def _choose(x: torch.Tensor, weight: torch.Tensor, tiles: Tiles) -> Tile | None:
    if weight.stride(1) != 1:
        return None  # a transposed weight: cuBLAS reads it as it lies
    n, k = weight.shape
    return tiles.choose(len(x), n, k, x.dtype)


def _skinny(
    x: torch.Tensor,
    weight: torch.Tensor,
    tile: Tile,
    bias: torch.Tensor | None = None,
    squared_relu: bool = False,
    dtype: torch.dtype | None = None,
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
        "SQUARED_RELU": squared_relu,
        "UNIT": unit,
        "EVEN": k % tile.block_k == 0,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.num_stages,
        "num_warps": tile.num_warps,
    }
    grid = (triton.cdiv(n, tile.block_n),)
    tensors = x, weight, weight if bias is None else bias, out
    if tile.variant == "fma":
        assert rows <= MAX_FMA_ROWS
        vector = min(16 // x.element_size(), tile.block_k)
        _fma_kernel[grid](*tensors, *sizes, ROWS=rows, VECTOR=vector, **options)
    else:
        assert rows <= MAX_ROWS
        _dot_kernel[grid](*tensors, *sizes, rows, **options)
    return out


@triton.jit
def _fma_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, n, k_units, x_units, weight_units,
    ROWS: tl.constexpr, VECTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr, SQUARED_RELU: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe = tl.minimum(columns, n - 1).to(tl.int64)  # what lies past the end is read, never stored
    i = tl.arange(0, BLOCK_K)
    width = k_units * UNIT
    weight_ptr += (safe * (weight_units * UNIT))[:, None] + i[None, :]
    x_ptr += i
    if HAS_BIAS:  # asked for now, there when the sums are
        bias = tl.load(bias_ptr + safe).to(tl.float32)
    zeros = tl.zeros((BLOCK_N, BLOCK_K // VECTOR), dtype=tl.float32)
    sums = (zeros,) * ROWS
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        # A weight is read once: it should leave the caches before x and everything else.
        if EVEN:
            w = tl.load(weight_ptr + start, eviction_policy="evict_first").to(tl.float32)
        else:
            inside = i < width - start
            w = tl.load(
                weight_ptr + start, mask=inside[None, :], other=0.0, eviction_policy="evict_first"
            ).to(tl.float32)
        next_sums: tl.tuple = ()
        for row in tl.static_range(ROWS):
            x_row = x_ptr + row * (x_units * UNIT) + start
            if EVEN:
                x = tl.load(x_row).to(tl.float32)
            else:
                x = tl.load(x_row, mask=inside, other=0.0).to(tl.float32)
            # Within a thread: the last dimension is what one of its loads brings.
            products = tl.reshape(w * x[None, :], (BLOCK_N, BLOCK_K // VECTOR, VECTOR))
            # Triton knows no (*next_sums, ...).
            next_sums = next_sums + (sums[row] + tl.sum(products, axis=2),)  # noqa: RUF005
        sums = next_sums
    for row in tl.static_range(ROWS):
        y = tl.sum(sums[row], axis=1)
        if HAS_BIAS:
            y += bias
        if SQUARED_RELU:
            y = _squared_relu(y, out_ptr.dtype.element_ty)
        y = round_to(y, out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * n + columns, y, mask=columns < n)


# One binary for any number of rows, 1 and 16 included.
@triton.jit(do_not_specialize=["num_rows"])
def _dot_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, n, k_units, x_units, weight_units, num_rows,
    HAS_BIAS: tl.constexpr, SQUARED_RELU: tl.constexpr, UNIT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe = tl.minimum(columns, n - 1).to(tl.int64)
    rows, i = tl.arange(0, _ROWS), tl.arange(0, BLOCK_K)
    is_row = (rows < num_rows)[:, None]
    width = k_units * UNIT
    weight_ptr += (safe * (weight_units * UNIT))[None, :] + i[:, None]
    x_ptr += (rows * (x_units * UNIT))[:, None] + i[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + safe).to(tl.float32)
    y = tl.zeros((_ROWS, BLOCK_N), dtype=tl.float32)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        if EVEN:
            w = tl.load(weight_ptr + start)
            x = tl.load(x_ptr + start, mask=is_row, other=0.0)
        else:
            inside = i < width - start
            w = tl.load(weight_ptr + start, mask=inside[:, None], other=0.0)
            x = tl.load(x_ptr + start, mask=is_row & inside[None, :], other=0.0)
        if INTERPRETED:  # it would multiply the bit patterns of bfloat16
            w, x = w.to(tl.float32), x.to(tl.float32)
        y = tl.dot(x, w, y, input_precision="ieee")
    if HAS_BIAS:
        y += bias[None, :]
    if SQUARED_RELU:
        y = _squared_relu(y, out_ptr.dtype.element_ty)
    y = round_to(y, out_ptr.dtype.element_ty)
    mask = is_row & (columns < n)[None, :]
    tl.store(out_ptr + rows[:, None] * n + columns[None, :], y, mask=mask)


@triton.jit
def _add_squared_relu_kernel(x_ptr, bias_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    x_ptr += row * n + columns
    x = tl.load(x_ptr, mask=inside).to(tl.float32)
    y = x + tl.load(bias_ptr + columns, mask=inside).to(tl.float32)
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
