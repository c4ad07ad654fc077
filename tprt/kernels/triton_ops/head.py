"""The LM head with sampling in it: logits, temperature, keyed Gumbel noise and maximum in one pass.

Each program takes the best of its part of the vocabulary for every row and writes (score, column); a
second, small kernel takes the best of those and looks up its id. Of equal scores the lowest column, and
so the lowest id, wins in both: the result does not depend on how the vocabulary is cut into programs or
over ranks, nor on ids that have no column. At most ``MAX_ROWS`` rows read the weight once and write no
logits; more rows go through a matrix product first.

The noise is that of ``kernels.noise``: the same 32-bit uniforms, bit for bit; its two logarithms are
computed here and agree to a few units in the last place.
"""

import torch
import triton
import triton.language as tl

from tprt.kernels import noise as keyed
from tprt.kernels.interface import Noise, Tensors
from tprt.kernels.triton_ops.numerics import INTERPRETED

MAX_ROWS = 16  # the narrow side of one tensor-core product; all rows up to here cost the same
ARGMAX_BLOCK = 2048  # columns of one program where the logits are in memory
REDUCE_BLOCK = 1024
GUMBEL_ERROR = 6 * 2**-24  # of the noise g against the exact -log(-log(1 - u)), times max(1, |g|)

_GOLDEN = tl.constexpr(keyed.signed(keyed.GOLDEN))
_MIX_1 = tl.constexpr(keyed.signed(keyed.MIX_1))
_MIX_2 = tl.constexpr(keyed.signed(keyed.MIX_2))
_NO_COLUMN = tl.constexpr(2**31 - 1)


def linear_argmax(
    x: torch.Tensor, weight: torch.Tensor, noise: Noise, ids: torch.Tensor, num_valid: int
) -> Tensors:
    """``argmax`` of x W^T in float32; see ``interface.Kernels``.

    Args:
        x: [R, width]. weight: [V, width] of the same dtype. Its rows from ``num_valid`` on are not
            read where R is at most ``MAX_ROWS``.
        ids: int64 [V], ascending.

    Returns:
        float32 [R] and int64 [R]. A row's bits do not depend on the other rows, nor, up to
        ``MAX_ROWS``, on how many they are.
    """
    num_rows, width = x.shape
    if num_rows > MAX_ROWS or weight.stride(1) != 1:
        return argmax(logits(x, weight), noise, ids, num_valid)
    assert x.dtype == weight.dtype and ids.is_contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    x_stride = x.stride(0) if num_rows > 1 else width  # of a single row it may be anything
    block_v, block_k, stages = (128, 64, 4) if weight.element_size() == 2 else (64, 32, 3)
    even = width % block_k == 0
    if not even:
        block_v = 64  # element-wise loads: fewer at a time, or registers spill
    parts = max(1, triton.cdiv(num_valid, block_v))
    best, columns = _partials(num_rows, parts, x.device)
    _linear_argmax_kernel[(parts,)](
        x, weight, ids, *_rows_of(noise), best, columns,
        num_rows, width, num_valid, x_stride, weight.stride(0), parts,
        NOISY=not noise.all_greedy, EVEN=even,
        ROWS=MAX_ROWS, BLOCK_V=block_v, BLOCK_K=block_k,
        num_warps=4, num_stages=stages,
    )  # fmt: skip
    return _reduce(best, columns, ids)


def argmax(logits: torch.Tensor, noise: Noise, ids: torch.Tensor, num_valid: int) -> Tensors:
    """See ``interface.Kernels``; ``logits`` is float32 [R, V], its rows contiguous."""
    assert logits.dtype == torch.float32 and logits.stride(1) == 1 and ids.is_contiguous()
    num_rows = len(logits)
    parts = max(1, triton.cdiv(num_valid, ARGMAX_BLOCK))
    best, columns = _partials(num_rows, parts, logits.device)
    _argmax_kernel[(parts, num_rows)](
        logits, ids, *_rows_of(noise), best, columns,
        num_rows, num_valid, logits.stride(0), parts,
        NOISY=not noise.all_greedy, BLOCK=ARGMAX_BLOCK, num_warps=4,
    )  # fmt: skip
    return _reduce(best, columns, ids)


def logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T, [R, width] -> float32 [R, V]: never rounded to the dtype of the model."""
    if x.dtype == torch.float32:
        return x @ weight.t()
    if x.device.type == "cpu":
        return x.float() @ weight.float().t()
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


def _rows_of(noise: Noise) -> tuple[torch.Tensor, ...]:
    fields = noise.temperature, noise.greedy, noise.keys, noise.positions
    return tuple(field.contiguous() for field in fields)


def _partials(num_rows: int, parts: int, device: torch.device) -> Tensors:
    shape = num_rows, parts
    best = torch.empty(shape, dtype=torch.float32, device=device)
    return best, torch.empty(shape, dtype=torch.int32, device=device)


def _reduce(best: torch.Tensor, columns: torch.Tensor, ids: torch.Tensor) -> Tensors:
    """float32 and int32 [R, parts], and the ids of columns -> float32 and int64 [R]."""
    num_rows, parts = best.shape
    scores = best.new_empty(num_rows)
    drawn = torch.empty(num_rows, dtype=torch.int64, device=best.device)
    _reduce_kernel[(num_rows,)](
        best, columns, ids, scores, drawn, parts, BLOCK=REDUCE_BLOCK, num_warps=4
    )
    return scores, drawn


# One binary for any number of rows and programs, and wherever positions lie in what a step sends to the
# device: it may be the first with so many rows that draw.
@triton.jit(
    do_not_specialize=["num_rows", "parts"], do_not_specialize_on_alignment=["positions_ptr"]
)
def _linear_argmax_kernel(
    x_ptr, weight_ptr, ids_ptr, temperature_ptr, greedy_ptr, keys_ptr, positions_ptr, best_ptr,
    columns_ptr, num_rows, width, num_valid, x_stride, weight_stride, parts,
    NOISY: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    rows, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    local = tl.arange(0, BLOCK_V)
    columns = part * BLOCK_V + local
    is_row, is_valid = (rows < num_rows)[None, :], (columns < num_valid)[:, None]
    # The first row of a part may lie past 2^31 elements; within a part 32 bits do.
    weights = weight_ptr + part.to(tl.int64) * BLOCK_V * weight_stride
    weights += local[:, None] * weight_stride + k[None, :]
    xs = x_ptr + rows[None, :] * x_stride + k[:, None]
    acc = tl.zeros((BLOCK_V, ROWS), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN:
            w = tl.load(weights + start, mask=is_valid, other=0.0, eviction_policy="evict_first")
            x = tl.load(xs + start, mask=is_row, other=0.0)
        else:
            inside = k < width - start
            w = tl.load(weights + start, mask=is_valid & inside[None, :], other=0.0)
            x = tl.load(xs + start, mask=is_row & inside[:, None], other=0.0)
        if INTERPRETED:  # numpy would multiply the bit patterns of bfloat16
            w, x = w.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    _store_best(
        acc, columns, rows, part, ids_ptr, temperature_ptr, greedy_ptr, keys_ptr, positions_ptr,
        best_ptr, columns_ptr, num_rows, num_valid, parts, NOISY,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_rows", "parts"], do_not_specialize_on_alignment=["positions_ptr"]
)
def _argmax_kernel(
    logits_ptr, ids_ptr, temperature_ptr, greedy_ptr, keys_ptr, positions_ptr, best_ptr,
    columns_ptr, num_rows, num_valid, stride, parts, NOISY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row.to(tl.int64) * stride + columns, mask=columns < num_valid)
    rows = row + tl.arange(0, 1)
    _store_best(
        logits[:, None], columns, rows, part, ids_ptr, temperature_ptr, greedy_ptr, keys_ptr,
        positions_ptr, best_ptr, columns_ptr, num_rows, num_valid, parts, NOISY,
    )  # fmt: skip


@triton.jit
def _store_best(
    logits, columns, rows, part, ids_ptr, temperature_ptr, greedy_ptr, keys_ptr, positions_ptr,
    best_ptr, columns_ptr, num_rows, num_valid, parts, NOISY: tl.constexpr,
):  # fmt: skip
    """The best of logits [C, R] over its columns [C], for each of its rows [R]."""
    scores, is_row = logits, rows < num_rows
    if NOISY:
        greedy = tl.load(greedy_ptr + rows, mask=is_row, other=1).to(tl.int32)
        # Graphs are captured with noise; where nobody draws it is not worth computing.
        if tl.min(greedy, axis=0) == 0:
            temperature = tl.load(temperature_ptr + rows, mask=is_row, other=1.0)
            keys = tl.load(keys_ptr + rows, mask=is_row, other=0)
            positions = tl.load(positions_ptr + rows, mask=is_row, other=0)
            ids = tl.load(ids_ptr + columns, mask=columns < num_valid, other=0)
            uniform = _uniform(keys[None, :], positions[None, :], ids[:, None])
            drawn = tl.where((greedy != 0)[None, :], 0.0, _gumbel(uniform))
            scores = tl.div_rn(logits, tl.zeros_like(logits) + temperature[None, :]) + drawn
    # Comparisons pass over NaN, and so does tl.max on some devices: it wins as +inf, to be seen.
    scores = tl.where(scores == scores, scores, float("inf"))
    scores = tl.where((columns < num_valid)[:, None], scores, float("-inf"))
    best = tl.max(scores, axis=0)
    lowest = tl.min(tl.where(scores == best[None, :], columns[:, None], _NO_COLUMN), axis=0)
    tl.store(best_ptr + rows * parts + part, best, mask=is_row)
    tl.store(columns_ptr + rows * parts + part, lowest, mask=is_row)


@triton.jit(do_not_specialize=["parts"])
def _reduce_kernel(
    best_ptr, columns_ptr, ids_ptr, scores_ptr, drawn_ptr, parts, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    lowest = tl.full((BLOCK,), _NO_COLUMN, dtype=tl.int32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        inside = part < parts
        score = tl.load(best_ptr + row * parts + part, mask=inside, other=float("-inf"))
        column = tl.load(columns_ptr + row * parts + part, mask=inside, other=_NO_COLUMN)
        better = (score > best) | ((score == best) & (column < lowest))
        best = tl.where(better, score, best)
        lowest = tl.where(better, column, lowest)
    top = tl.max(best, axis=0)
    column = tl.min(tl.where(best == top, lowest, _NO_COLUMN), axis=0)
    tl.store(scores_ptr + row, top)
    tl.store(drawn_ptr + row, tl.load(ids_ptr + column))


@triton.jit
def _uniform(keys, positions, ids):
    """The u of ``noise.gumbel``, float32 in (0, 1), from int64 that broadcast: the same bits."""
    row = (keys ^ (positions * _MIX_2)) * _MIX_1
    row = row ^ (row >> 32)
    x = (((ids + 1) * _GOLDEN) ^ row) * _MIX_1
    x = (x ^ (x >> 32)) * _MIX_2
    bits = (x >> 32) + 2147483648
    return (bits.to(tl.float32) + 0.5) * ((1 - 2**-24) * 2**-32)


@triton.jit
def _gumbel(u):
    """-log(-log(1 - u)) of u in [2^-33, 1 - 2^-24]; ``GUMBEL_ERROR`` bounds its error.

    For small u the inner logarithm is taken of -u itself, as 1 - u has lost most of its digits.
    """
    return -_log(-tl.where(u < 0.33, _log1p(-u), _log(1.0 - u)))


@triton.jit
def _log(x):
    """The natural logarithm of normal x > 0, x = 2^e (1 + m) with 2/3 <= 1 + m < 4/3.

    Written out because what the compiler makes of tl.log has a bounded absolute error only, and that
    is no digit at all of a logarithm near 0.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000  # e 2^23; the constant is 2/3
    m = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    return exponent.to(tl.float32) * (0.6931471805599453 * 2**-23) + _log1p(m)


@triton.jit
def _log1p(m):
    """log(1 + m) of |m| <= 1/3 to a few units in the last place.

    It is 2 atanh(s), s = m / (2 + m), written as m - s (m - s^2 (2/3 + 2/5 s^2 + ...)): an error of
    the division then counts by a sixth at most. |s| <= 1/5: what the series leaves out is 2^-26.
    """
    s = m / (m + 2.0)
    z = s * s
    series = z * (0.6666666667 + z * (0.4 + z * (0.2857142857 + z * 0.2222222222)))
    return m - s * (m - series)
