"""Products x W whose x is mostly exact zeros, as squared ReLU leaves it: rows of W that meet zeros
alone are never read.

A row of W belongs to a neuron. A program takes a group of neurons and a block of columns; each of its
warps walks neurons of its own, in their order, 512 bytes of one at a time. Which of them are alive, that
is, not 0 in one of the rows of x, the warp holds as bits of one number, so it goes from one live neuron
to the next, and several rows of W are under way at a time. What a row of x adds up, and in which order,
follows from sizes alone: an element that is 0 is never added, whether or not its neuron was read for
another row. Skipping therefore changes no bit, nor do the other rows or their number.

Programs leave their sums in memory; the last one of a column block to arrive adds them up in the order
of the groups. All threads of a program have stored theirs (barrier) before one of them counts the
program (atomic, release). Who counts last has acquired what every other program released, hands that on
to its own threads with the count (barrier), and reads past L1. It sets the counter back to 0 for the
next call, which comes after this one: counters serve one stream, and graphs replayed on it.

Legend: T tokens, x [T, neurons], W [neurons, width].
"""

import torch
import triton
import triton.language as tl

from tprt.kernels.triton_ops.numerics import round_to
from tprt.kernels.triton_ops.pdl import pdl_launch_dependents, pdl_options, pdl_wait

MAX_ROWS = 16  # sums of more rows fit into no registers
# With nothing skipped, multiplying more rows on CUDA cores takes longer than cuBLAS does.
MAX_DENSE_ROWS = 8

_NUM_COUNTERS = 4096
_WARPS = 8
_PROGRAMS = 2 * 132  # at least two for each processor of an H100 or H200
_PARTS = 32  # sums of groups that are read at once
# By rows of x: registers of a thread, so that 4, 4, 2, 2 and 1 programs fit on a processor, and rows of
# W that a warp asks for at a time, which are 64, 64, 32, 16 and 8 KB under way there.
_REGISTERS = {1: (64, 4), 2: (64, 4), 4: (128, 4), 8: (128, 2), 16: (255, 2)}


def make_counters(device: torch.device) -> torch.Tensor:
    """What ``product`` counts arrivals in: zeros, and zeros again after each call."""
    return torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=device)


def skips(rows: int, weight: torch.Tensor, sparse_rows: int) -> bool | None:
    """Whether ``product`` of so many rows skips neurons; None where cuBLAS computes it.

    Args:
        sparse_rows: most rows for which neurons are skipped.
    """
    skip = rows <= min(sparse_rows, MAX_ROWS)
    # Places in the weight are 32 bits wide.
    if rows == 0 or weight.numel() >= 2**31 or not (skip or rows <= MAX_DENSE_ROWS):
        return None
    return skip


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    counters: torch.Tensor,
    skip: bool,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x W, [T, width], of at most MAX_ROWS rows.

    Args:
        weight: [neurons, width], contiguous.
        counters: of ``make_counters``.
        skip: False reads all of ``weight``, for the same bits.
        bias, residual: both or none; ``residual`` + (x W + ``bias``), rounded once.
        dtype: of the result, that of ``x`` unless given.
    """
    assert 0 < len(x) <= MAX_ROWS and x.dtype == weight.dtype
    assert weight.is_contiguous() and weight.numel() < 2**31
    rows, neurons = x.shape
    width = weight.shape[1]
    x = x.contiguous()
    block = 32 * 16 // x.element_size()
    blocks = triton.cdiv(width, block)
    assert blocks <= len(counters)
    per_warp = _neurons_per_warp(neurons, blocks)
    groups = triton.cdiv(neurons, _WARPS * per_warp)
    out = torch.empty((rows, width), dtype=dtype or x.dtype, device=x.device)
    partials = torch.empty((groups, rows, width), dtype=torch.float32, device=x.device)
    unit = 8 if width % 8 == 0 else 1  # Triton notes of a number whether 16 divides it, no less
    padded = triton.next_power_of_2(rows)  # one binary for several numbers of rows
    registers, at_once = _REGISTERS[padded]
    add, stride = (x, 0) if residual is None else (residual, residual.stride(0))
    _sparse_kernel[(blocks, groups)](
        x, weight, x if bias is None else bias, add, out, partials, counters,
        width // unit, groups, rows, stride,
        ROWS=padded, NEURONS=neurons, SKIP=skip, ADD=residual is not None, UNIT=unit,
        WARPS=_WARPS, PER_WARP=per_warp, BLOCK=block, AT_ONCE=at_once, PARTS=_PARTS,
        num_warps=_WARPS, maxnreg=registers if unit == 8 else 255, **pdl_options(x.device),
    )  # fmt: skip
    return out


def _neurons_per_warp(neurons: int, blocks: int) -> int:
    """As many as one number has bits, if that leaves every processor something to do."""
    per_warp = 64
    while per_warp > 8 and blocks * triton.cdiv(neurons, _WARPS * per_warp) < _PROGRAMS:
        per_warp //= 2
    return per_warp


@triton.jit(do_not_specialize=["num_groups", "num_rows", "residual_stride"])
def _sparse_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, partials_ptr, counters_ptr,
    width_units, num_groups, num_rows, residual_stride,
    ROWS: tl.constexpr, NEURONS: tl.constexpr, SKIP: tl.constexpr, ADD: tl.constexpr,
    UNIT: tl.constexpr, WARPS: tl.constexpr, PER_WARP: tl.constexpr, BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_launch_dependents(PDL)
    block, group = tl.program_id(0), tl.program_id(1)
    width = width_units * UNIT
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    # Two bits for each lane: so its warp's number lies where the loop needs it, without an exchange.
    bits = tl.arange(0, 64)
    first = group * (WARPS * PER_WARP) + tl.arange(0, WARPS) * PER_WARP  # neuron of each warp
    pdl_wait(PDL)
    neurons = first[:, None] + bits[None, :]
    exists = (bits < PER_WARP)[None, :] & (neurons < NEURONS)
    if SKIP:
        alive = neurons < 0
        for row in tl.static_range(ROWS):
            there = _of_row(exists, row, num_rows, ROWS)
            x_row = tl.load(x_ptr + row * NEURONS + neurons, mask=there, other=0.0)
            alive = alive | (x_row.to(tl.float32) != 0)  # NaN is not 0
    else:
        alive = exists
    left = tl.sum(alive.to(tl.int64) << bits[None, :], axis=1)
    steps = tl.max(tl.sum(alive.to(tl.int32), axis=1), axis=0)
    sums = (tl.zeros((WARPS, BLOCK), dtype=tl.float32),) * ROWS
    weight_ptr += columns[None, :]
    # Rows for the next turn are asked for before those of this one are used: within one turn ptxas
    # would spread the loads among the arithmetic, and few would be under way at a time.
    found, weights, left = _ask(weight_ptr, width, first, inside, left, AT_ONCE)
    for _ in range(0, steps, AT_ONCE):
        next_found, next_weights, left = _ask(weight_ptr, width, first, inside, left, AT_ONCE)
        for i in tl.static_range(AT_ONCE):
            w = weights[i].to(tl.float32)
            next_sums: tl.tuple = ()
            for row in tl.static_range(ROWS):
                is_live = _of_row(found[i] >= 0, row, num_rows, ROWS)
                x = tl.load(x_ptr + row * NEURONS + found[i], mask=is_live, other=0.0)
                x = x.to(tl.float32)[:, None]
                total = tl.where(x != 0, tl.fma(w, x, sums[row]), sums[row])
                next_sums = next_sums + (total,)  # noqa: RUF005
            sums = next_sums
        found, weights = next_found, next_weights
    for row in tl.static_range(ROWS):
        if num_rows > row:
            place = (group * num_rows + row).to(tl.int64) * width
            tl.store(partials_ptr + place + columns, tl.sum(sums[row], axis=0), mask=inside)
    tl.debug_barrier()
    arrived = tl.atomic_add(counters_ptr + block, 1, sem="acq_rel")
    if arrived == num_groups - 1:
        tl.store(counters_ptr + block, 0)
        if ADD:
            bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        # Two rows in one round trip, where the registers are there anyway.
        TOGETHER: tl.constexpr = 1 if ROWS <= 2 else 2
        for first_row in tl.static_range(0, ROWS, TOGETHER):
            ys = (tl.zeros((BLOCK,), dtype=tl.float32),) * TOGETHER
            for start in range(0, num_groups, PARTS):
                groups = start + tl.arange(0, PARTS)
                is_part = (groups < num_groups)[:, None] & inside[None, :]
                parts: tl.tuple = ()
                for i in tl.static_range(TOGETHER):
                    places = (groups * num_rows + first_row + i).to(tl.int64) * width
                    part = tl.load(
                        partials_ptr + places[:, None] + columns[None, :],
                        mask=_of_row(is_part, first_row + i, num_rows, ROWS),
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    parts = parts + (part,)  # noqa: RUF005
                next_ys: tl.tuple = ()
                for i in tl.static_range(TOGETHER):
                    next_ys = next_ys + (ys[i] + tl.sum(parts[i], axis=0),)  # noqa: RUF005
                ys = next_ys
            for i in tl.static_range(TOGETHER):
                y = ys[i]
                stored = _of_row(inside, first_row + i, num_rows, ROWS)
                if ADD:
                    before = residual_ptr + (first_row + i) * residual_stride + columns
                    before = tl.load(before, mask=stored, other=0.0).to(tl.float32)
                    y = before + (y + bias)
                y = round_to(y, out_ptr.dtype.element_ty)
                tl.store(out_ptr + (first_row + i) * width + columns, y, mask=stored)


@triton.jit
def _of_row(mask, row: tl.constexpr, num_rows, ROWS: tl.constexpr):
    """``mask`` where this row exists: ROWS serve any number of rows past their half."""
    if row > ROWS // 2:
        # The interpreter spreads numbers over a tensor, but no truth values.
        mask = mask & (tl.full(mask.shape, row, tl.int32) < num_rows)
    return mask


@triton.jit
def _ask(weight_ptr, width, first, inside, left, AT_ONCE: tl.constexpr):
    """Of each warp the next neurons that are alive, -1 past the last; their rows; and which are left."""
    found: tl.tuple = ()
    weights: tl.tuple = ()
    for _ in tl.static_range(AT_ONCE):
        lowest = left & -left
        left = left ^ lowest
        # The exponent of a power of two: which bit it is.
        bit = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
        neuron = tl.where(lowest != 0, first + bit, -1)
        w = tl.load(
            weight_ptr + (neuron * width)[:, None],
            mask=(neuron >= 0)[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        found = found + (neuron,)  # noqa: RUF005
        weights = weights + (w,)  # noqa: RUF005
    return found, weights, left
