"""Attention over a sliding window, one head of keys and values for all queries of a token.

All heads of a token are rows of one matrix product with the keys they share. For a decode step the ring
of a slot is cut into parts, a program for each, whose partial results a second kernel merges in order:
the same programs at any context length, as a graph needs it. For a prompt a program has the heads of a
few tokens and goes over the keys they see, first those of the ring, then those of the chunk itself.

Legend: T tokens, B sequences, S slots, H query heads, D head width, r rotary width, R places of a ring.
"""

import torch
import triton
import triton.language as tl

from tprt.batch import Segments
from tprt.errors import ConfigError
from tprt.kernels.triton_ops.numerics import dot, round_to
from tprt.kernels.triton_ops.pdl import pdl_launch_dependents, pdl_options, pdl_wait

# By bytes of an element. Places of a partial result, as plans of memory have them; keys, and queries
# times heads, of a program of a prompt.
PART = {2: 128, 4: 32}
KEYS_AT_ONCE, ROWS_AT_ONCE = {2: 32, 4: 16}, {2: 64, 4: 32}
LOG2_E = 1.4426950408889634


def window_attend(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    segments: Segments,
    keys: int,
    scale: float,
) -> torch.Tensor:
    """See ``interface.Kernels``.

    Raises:
        ConfigError: heads have another width than a power of two.
    """
    if (dim := qkv.shape[2]) & (dim - 1):
        raise ConfigError(
            f"heads are {dim} wide; the Triton kernels of window attention take powers of two",
            hint="engine.kernels=reference runs any width",
        )
    cos, sin = cos.flatten(1), sin.flatten(1)
    if segments.starts is None:
        return _step(qkv, cos, sin, kv, segments, keys, scale)
    return _prompt(qkv, cos, sin, kv, segments, keys, scale)


def _step(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    segments: Segments,
    keys: int,
    scale: float,
) -> torch.Tensor:
    rows, heads, dim = len(qkv), qkv.shape[1] - 2, qkv.shape[2]
    ring, padded = kv.shape[2], max(16, triton.next_power_of_2(heads))
    part = min(PART[kv.itemsize], triton.next_power_of_2(ring))
    parts = triton.cdiv(ring, part)
    sums = torch.empty(rows, parts, padded, dim, dtype=torch.float32, device=qkv.device)
    stats = torch.empty(rows, parts, 2, padded, dtype=torch.float32, device=qkv.device)
    out = torch.empty(rows, heads, dim, dtype=qkv.dtype, device=qkv.device)
    _step_kernel[(parts, rows)](
        qkv, cos, sin, segments.slots, segments.positions, kv, sums, stats,
        qkv.stride(0), ring, keys, scale * LOG2_E,
        HEADS=heads, PADDED=padded, DIM=dim, ROTARY=cos.shape[1], PART=part,
        num_warps=8 if dim >= 128 else 4, **pdl_options(qkv.device),
    )  # fmt: skip
    _merge_kernel[(rows, heads)](
        sums, stats, out, parts,
        HEADS=heads, PADDED=padded, DIM=dim, PARTS=triton.next_power_of_2(parts),
        num_warps=4 if parts <= 32 else 8, **pdl_options(qkv.device),
    )  # fmt: skip
    return out


def _prompt(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    segments: Segments,
    keys: int,
    scale: float,
) -> torch.Tensor:
    tokens, heads, dim = len(qkv), qkv.shape[1] - 2, qkv.shape[2]
    ring, padded = kv.shape[2], max(16, triton.next_power_of_2(heads))
    queries = max(1, ROWS_AT_ONCE[kv.itemsize] // padded)
    rotated = torch.empty(tokens, heads + 1, dim, dtype=qkv.dtype, device=qkv.device)
    _rotate_kernel[(tokens, heads + 1)](
        qkv, cos, sin, rotated, qkv.stride(0),
        DIM=dim, ROTARY=cos.shape[1], num_warps=1, **pdl_options(qkv.device),
    )  # fmt: skip
    out = torch.empty(tokens, heads, dim, dtype=qkv.dtype, device=qkv.device)
    positions = segments.positions
    begins = positions[segments.first_rows]
    longest = max(segments.query_lens)
    _prompt_kernel[(triton.cdiv(longest, queries), len(begins))](
        rotated, qkv, kv, out, segments.slots, begins, segments.first_rows, segments.last_rows,
        qkv.stride(0), ring, keys, scale * LOG2_E,
        HEADS=heads, PADDED=padded, DIM=dim, QUERIES=queries, KEYS=KEYS_AT_ONCE[kv.itemsize],
        num_warps=8 if dim >= 128 else 4, **pdl_options(qkv.device),
    )  # fmt: skip
    # After everybody has read the ring.
    kept = segments.tail(ring)
    slots, places = segments.row_slots[kept], positions[kept] % ring
    kv[slots, 0, places], kv[slots, 1, places] = rotated[kept, -1], qkv[kept, -1]
    return out


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, dims, mask, ROTARY: tl.constexpr, dtype: tl.constexpr):
    """Elements ``dims`` of heads at ``x_ptr``, the first ROTARY turned; rounded to ``dtype``."""
    x = tl.load(x_ptr + dims, mask=mask, other=0.0).to(tl.float32)
    turned = dims < ROTARY
    half: tl.constexpr = ROTARY // 2
    other = tl.where(dims < half, dims + half, dims - half)
    partner = tl.load(x_ptr + other, mask=mask & turned, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + dims, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + dims, mask=turned, other=0.0)
    return round_to(x * cos + partner * sin, dtype)


@triton.jit
def _rotate_kernel(
    qkv_ptr, cos_ptr, sin_ptr, out_ptr, row_stride,
    DIM: tl.constexpr, ROTARY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A head of a token: queries, and the key."""
    pdl_launch_dependents(PDL)
    pdl_wait(PDL)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, DIM)
    angles = row * ROTARY
    x = _rotated(
        qkv_ptr + row * row_stride + head * DIM, cos_ptr + angles, sin_ptr + angles, dims,
        dims < DIM, ROTARY, out_ptr.dtype.element_ty,
    )  # fmt: skip
    tl.store(out_ptr + (row * tl.num_programs(1) + head) * DIM + dims, x)


# One binary wherever slots and positions lie in what a step sends to the device; so too below.
@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"])
def _step_kernel(
    qkv_ptr, cos_ptr, sin_ptr, slots_ptr, positions_ptr, kv_ptr, sums_ptr, stats_ptr,
    row_stride, ring, keys, scale,
    HEADS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    PART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_launch_dependents(PDL)
    pdl_wait(PDL)
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot, position = tl.load(slots_ptr + row), tl.load(positions_ptr + row)
    heads, dims = tl.arange(0, PADDED), tl.arange(0, DIM)
    dtype: tl.constexpr = kv_ptr.dtype.element_ty
    token, angles = qkv_ptr + row * row_stride, row * ROTARY
    is_head = heads[:, None] < HEADS
    q = _rotated(
        token + heads[:, None] * DIM, cos_ptr + angles, sin_ptr + angles, dims[None, :], is_head,
        ROTARY, dtype,
    )  # fmt: skip
    # The program that has the new token's place writes it, and reads it with all the others.
    place = position % ring
    owner = place // PART + 0 * dims == part
    new_k = _rotated(
        token + HEADS * DIM, cos_ptr + angles, sin_ptr + angles, dims, dims < DIM, ROTARY, dtype
    )
    new_v = tl.load(token + (HEADS + 1) * DIM + dims)
    slab = kv_ptr + slot * (2 * ring * DIM)
    tl.store(slab + place * DIM + dims, new_k, mask=owner)
    tl.store(slab + (ring + place) * DIM + dims, new_v, mask=owner)
    tl.debug_barrier()
    places = part * PART + tl.arange(0, PART)
    back = (position - places + ring) % ring  # tokens from the place's back to this one
    # What is not seen may be NaN, and 0 x NaN is NaN: it is not read.
    seen = (back <= position) & (back < keys) & (places < ring)
    at = slab + places[:, None] * DIM + dims[None, :]
    k = tl.load(at, mask=seen[:, None], other=0.0)
    v = tl.load(at + ring * DIM, mask=seen[:, None], other=0.0)
    scores = dot(q, tl.trans(k)) * scale
    scores = tl.where(seen[None, :], scores, float("-inf"))
    largest = tl.max(scores, axis=1)
    # Where every score is -inf the difference would be NaN.
    p = tl.exp2(scores - tl.where(largest == float("-inf"), 0.0, largest)[:, None])
    values = dot(round_to(p, dtype), v)
    partial = row * tl.num_programs(0) + part
    tl.store(sums_ptr + (partial * PADDED + heads)[:, None] * DIM + dims[None, :], values)
    tl.store(stats_ptr + partial * (2 * PADDED) + heads, largest)
    tl.store(stats_ptr + partial * (2 * PADDED) + PADDED + heads, tl.sum(p, axis=1))


@triton.jit
def _merge_kernel(
    sums_ptr, stats_ptr, out_ptr, parts,
    HEADS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, PARTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    pdl_launch_dependents(PDL)
    pdl_wait(PDL)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index, dims = tl.arange(0, PARTS), tl.arange(0, DIM)
    there = index < parts
    stats = stats_ptr + (row * parts + index) * (2 * PADDED) + head
    largest = tl.load(stats, mask=there, other=float("-inf"))
    total = tl.load(stats + PADDED, mask=there, other=0.0)
    weight = tl.exp2(largest - tl.max(largest, axis=0))  # the token itself is always seen
    sums = tl.load(
        sums_ptr + ((row * parts + index) * PADDED + head)[:, None] * DIM + dims[None, :],
        mask=there[:, None], other=0.0,
    )  # fmt: skip
    result = tl.sum(sums * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    at = out_ptr + (row * HEADS + head) * DIM + dims
    tl.store(at, round_to(result, out_ptr.dtype.element_ty))


@triton.jit
def _attend(q, k, v, visible, largest, total, values, scale):
    """One more block of keys [KEYS, DIM] for queries [ROWS, DIM]; visible [ROWS, KEYS]."""
    scores = tl.where(visible, dot(q, tl.trans(k)) * scale, float("-inf"))
    above = tl.maximum(largest, tl.max(scores, axis=1))
    shift = tl.where(above == float("-inf"), 0.0, above)
    p, keep = tl.exp2(scores - shift[:, None]), tl.exp2(largest - shift)
    total = total * keep + tl.sum(p, axis=1)
    values = values * keep[:, None] + dot(round_to(p, v.dtype), v)
    return above, total, values


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _prompt_kernel(
    rotated_ptr, qkv_ptr, kv_ptr, out_ptr, slots_ptr, begins_ptr, first_rows_ptr, last_rows_ptr,
    row_stride, ring, keys, scale,
    HEADS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The heads of QUERIES tokens of a sequence."""
    pdl_launch_dependents(PDL)
    pdl_wait(PDL)
    tile, sequence = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(first_rows_ptr + sequence), tl.load(last_rows_ptr + sequence)
    if first + tile * QUERIES > last:
        return
    slot, begin = tl.load(slots_ptr + sequence), tl.load(begins_ptr + sequence)
    ROWS: tl.constexpr = QUERIES * PADDED
    index, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    heads, rows = index % PADDED, first + tile * QUERIES + index // PADDED
    exists = (heads < HEADS) & (rows <= last)
    positions = begin + rows - first
    at = rows * ((HEADS + 1) * DIM) + heads * DIM
    q = tl.load(rotated_ptr + at[:, None] + dims[None, :], mask=exists[:, None], other=0.0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total, values = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, DIM], tl.float32)
    lowest = tl.maximum(begin + tile * QUERIES - keys + 1, 0)
    highest = tl.minimum(begin + tile * QUERIES + QUERIES - 1, begin + last - first)
    steps = tl.arange(0, KEYS)
    for start in range(lowest, begin, KEYS):  # kept by earlier passes
        there = start + steps
        seen = there < begin
        place = slot * (2 * ring * DIM) + (there % ring)[:, None] * DIM + dims[None, :]
        k = tl.load(kv_ptr + place, mask=seen[:, None], other=0.0)
        v = tl.load(kv_ptr + place + ring * DIM, mask=seen[:, None], other=0.0)
        visible = seen[None, :] & (positions[:, None] - there[None, :] < keys)
        largest, total, values = _attend(q, k, v, visible, largest, total, values, scale)
    for start in range(tl.maximum(lowest, begin), highest + 1, KEYS):  # of this pass
        there = start + steps
        seen = there <= highest
        row = first + there - begin
        k = tl.load(
            rotated_ptr + (row * ((HEADS + 1) * DIM) + HEADS * DIM)[:, None] + dims[None, :],
            mask=seen[:, None], other=0.0,
        )  # fmt: skip
        v = tl.load(
            qkv_ptr + (row * row_stride + (HEADS + 1) * DIM)[:, None] + dims[None, :],
            mask=seen[:, None], other=0.0,
        )  # fmt: skip
        back = positions[:, None] - there[None, :]
        visible = seen[None, :] & (back >= 0) & (back < keys)
        largest, total, values = _attend(q, k, v, visible, largest, total, values, scale)
    result = round_to(values / total[:, None], out_ptr.dtype.element_ty)
    out = out_ptr + (rows * (HEADS * DIM) + heads * DIM)[:, None] + dims[None, :]
    tl.store(out, result, mask=exists[:, None])
