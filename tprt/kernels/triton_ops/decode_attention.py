"""Attention of one new token per sequence over a paged cache: a stream of keys and values.

Without grouped queries each cached number is used once, so there is nothing for tensor cores to do; what
counts is bytes in flight. Each sequence is cut into chunks of CHUNK tokens. One program reads a chunk of
a few heads at a time, all of it asked for at once, and leaves a partial result: the largest score, the
sum of exponentials, the weighted sum of values. A second kernel merges the chunks of a row in order.

Chunks begin at multiples of CHUNK whatever the batch, the table's width or the number of programs, so
the bits of a row depend on that row alone.

Legend: R rows (one new token each), H heads, D head width, N blocks of the longest table.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tprt.kernels.triton_ops.pdl import pdl_launch_dependents, pdl_options, pdl_wait

# Tokens of a partial result. Fewer make more programs of a short context, more make less to merge.
CHUNK = 128
# Bytes a program reads of each key: whole sectors of neighbouring heads, which lie side by side.
KEY_BYTES = 256
# 256 threads with 64 KiB of keys and values in flight fit an SM twice; the rest evens out lengths.
PROGRAMS_PER_SM = 8
# Programs that share a long sequence even where a large batch fills the GPU: its length is not known.
MIN_PROGRAMS = 4
MERGED_AT_ONCE = 32  # chunks
# A warp asks for 16 bytes per thread, 8 times for keys and 8 times for values: all the loads of a chunk.
WARP_BYTES = 8 * 32 * 16
# Of partial results: what graphs of large batches and long contexts may keep for themselves.
MAX_PARTIAL_BYTES = 128 * 2**20
MAX_ROWS = 1024  # of one launch
LOG2_E = 1.4426950408889634


@triton.jit
def _job(jobs_ptr, index, max_chunks, LISTED: tl.constexpr):
    """Row of the queries, sequence, length and first partial result of one row."""
    if LISTED:
        row = tl.load(jobs_ptr + 4 * index)
        sequence = tl.load(jobs_ptr + 4 * index + 1)
        length = tl.load(jobs_ptr + 4 * index + 2)
        first = tl.load(jobs_ptr + 4 * index + 3)
    else:
        row = index
        sequence = index
        length = tl.load(jobs_ptr + index).to(tl.int32)
        first = index * max_chunks
    return row.to(tl.int64), sequence.to(tl.int64), length, first.to(tl.int64)


@triton.jit
def block_ids(table_ptr, chunk, width, CHUNK: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Blocks of a chunk's tokens; any number for tokens past the end of the sequence."""
    index = (chunk * CHUNK + tl.arange(0, CHUNK)) // BLOCK_SIZE
    return tl.load(table_ptr + index, mask=index < width, other=0)


@triton.jit
def attend_row(
    q, kv_ptr, table_ptr, blocks, part, parts, row, length, first, width,
    out_ptr, sums_ptr, stats_ptr, heads, head_offsets, in_head,
    DIRECT: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Chunks part, part + parts, ... of a row: partial results, or with DIRECT the only chunk's result.

    Args:
        q: float32 [HEADS, BLOCK_D], scaled for scores in base 2.
        blocks: ``block_ids`` of the first chunk.
        heads, head_offsets, in_head: [HEADS]; [HEADS, BLOCK_D] of a token's row, and what exists of it.
    """
    for chunk in range(part, tl.cdiv(length, CHUNK), parts):
        positions = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = positions < length
        slots = blocks.to(tl.int64) * (2 * BLOCK_SIZE) + positions % BLOCK_SIZE
        blocks = block_ids(table_ptr, chunk + parts, width, CHUNK, BLOCK_SIZE)
        places = (slots * (NUM_HEADS * HEAD_DIM))[:, None, None] + head_offsets[None, :, :]
        mask = inside[:, None, None] & in_head[None, :, :]
        # What lies past the end may be NaN: it is not read, since 0 x NaN is NaN.
        k = tl.load(kv_ptr + places, mask=mask, other=0.0)  # [CHUNK, HEADS, BLOCK_D]
        v = tl.load(kv_ptr + places + BLOCK_SIZE * NUM_HEADS * HEAD_DIM, mask=mask, other=0.0)
        scores = tl.sum(k.to(tl.float32) * q[None, :, :], axis=2)  # [CHUNK, HEADS]
        scores = tl.where(inside[:, None], scores, float("-inf"))
        largest = tl.max(scores, axis=0)
        # Where every score is -inf the difference would be NaN.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        p = tl.exp2(scores - shift[None, :])
        total = tl.sum(p, axis=0)  # [HEADS]
        values = tl.sum(p[:, :, None] * v.to(tl.float32), axis=0)  # [HEADS, BLOCK_D]
        if DIRECT:
            result = (values / total[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row * (NUM_HEADS * HEAD_DIM) + head_offsets, result, mask=in_head)
        else:
            partial = (first + chunk) * NUM_HEADS
            tl.store(sums_ptr + partial * HEAD_DIM + head_offsets, values, mask=in_head)
            stats = stats_ptr + (partial + heads) * 2
            tl.store(stats, largest, mask=heads < NUM_HEADS)
            tl.store(stats + 1, total, mask=heads < NUM_HEADS)


@triton.jit
def merge_row(
    sums_ptr, stats_ptr, out_ptr, row, first, count, group,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The partial results of a row and head group, AT_ONCE at a time in order.

    They are read past the L1 cache, which may still hold what was there before.
    """
    heads = group * HEADS + tl.arange(0, HEADS)[None, :, None]
    dims = tl.arange(0, BLOCK_D)[None, None, :]
    is_head, in_head = heads < NUM_HEADS, (heads < NUM_HEADS) & (dims < HEAD_DIM)
    largest = tl.full([1, HEADS, 1], float("-inf"), tl.float32)
    total = tl.zeros([1, HEADS, 1], tl.float32)
    values = tl.zeros([1, HEADS, BLOCK_D], tl.float32)
    for start in range(0, count, AT_ONCE):
        chunks = start + tl.arange(0, AT_ONCE)[:, None, None]
        written = chunks < count
        partials = (first + chunks) * NUM_HEADS + heads  # [AT_ONCE, HEADS, 1]
        stats, places = stats_ptr + partials * 2, sums_ptr + partials * HEAD_DIM + dims
        mask = written & is_head
        each = tl.load(stats, mask=mask, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(stats + 1, mask=mask, other=0.0, cache_modifier=".cg")
        sums = tl.load(places, mask=written & in_head, other=0.0, cache_modifier=".cg")
        new = tl.maximum(largest, tl.max(each, axis=0, keep_dims=True))
        shift = tl.where(new == float("-inf"), 0.0, new)
        kept, weights = tl.exp2(largest - shift), tl.exp2(each - shift)
        total = total * kept + tl.sum(totals * weights, axis=0, keep_dims=True)
        values = values * kept + tl.sum(sums * weights, axis=0, keep_dims=True)
        largest = new
    result = (values / tl.where(is_head, total, 1.0)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row * NUM_HEADS + heads) * HEAD_DIM + dims, result, mask=in_head)


@triton.jit(do_not_specialize=["width", "table_stride", "max_chunks"])
def _attend_chunks(
    q_ptr, kv_ptr, tables_ptr, jobs_ptr, out_ptr, sums_ptr, stats_ptr,
    q_row_stride, q_head_stride, width, table_stride, max_chunks, scale_log2,
    LISTED: tl.constexpr, DIRECT: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Programs (head group, row, part): chunks part, part + parts, ... of a row.

    With DIRECT there is one chunk, and its result is the row's.
    """
    pdl_launch_dependents(PDL)
    pdl_wait(PDL)
    part, parts = tl.program_id(2), tl.num_programs(2)
    row, sequence, length, first = _job(jobs_ptr, tl.program_id(1), max_chunks, LISTED)
    table_ptr = tables_ptr + sequence * table_stride
    # Asked for before the length is here, and from then on one chunk ahead: a latency less each time.
    blocks = block_ids(table_ptr, part, width, CHUNK, BLOCK_SIZE)  # [CHUNK]

    heads = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, BLOCK_D)
    in_head = (heads < NUM_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]  # [HEADS, BLOCK_D]
    q_offsets = row * q_row_stride + heads[:, None] * q_head_stride + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=in_head, other=0.0).to(tl.float32) * scale_log2
    head_offsets = heads[:, None] * HEAD_DIM + dims[None, :]

    attend_row(
        q, kv_ptr, table_ptr, blocks, part, parts, row, length, first, width,
        out_ptr, sums_ptr, stats_ptr, heads, head_offsets, in_head,
        DIRECT, NUM_HEADS, HEAD_DIM, BLOCK_SIZE, CHUNK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["max_chunks"])
def _merge_chunks(
    jobs_ptr, sums_ptr, stats_ptr, out_ptr, max_chunks, LISTED: tl.constexpr,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs (head group, row)."""
    pdl_launch_dependents(PDL)
    pdl_wait(PDL)
    row, _, length, first = _job(jobs_ptr, tl.program_id(1), max_chunks, LISTED)
    merge_row(
        sums_ptr, stats_ptr, out_ptr, row, first, tl.cdiv(length, CHUNK), tl.program_id(0),
        NUM_HEADS, HEAD_DIM, HEADS, AT_ONCE, BLOCK_D,
    )  # fmt: skip


class Partials(NamedTuple):
    """Where chunks leave their results until they are merged; float32.

    Args:
        sums: [P, H, D], values weighted by 2^(score - largest score).
        stats: [P, H, 2], the largest score in base 2 and the sum of the weights.
    """

    sums: torch.Tensor
    stats: torch.Tensor


def empty_partials(count: int, num_heads: int, head_dim: int, device: torch.device) -> Partials:
    shape = (count, num_heads)
    sums = torch.empty(*shape, head_dim, dtype=torch.float32, device=device)
    return Partials(sums, torch.empty(*shape, 2, dtype=torch.float32, device=device))


def rows_at_once(num_rows: int, max_chunks: int, num_heads: int, head_dim: int) -> int:
    """Rows of one launch, so that MAX_PARTIAL_BYTES hold ``max_chunks`` of each."""
    row_bytes = 4 * max_chunks * num_heads * (head_dim + 2)
    return min(num_rows, MAX_ROWS, max(1, MAX_PARTIAL_BYTES // row_bytes))


class HeadGroups(NamedTuple):
    """How heads are cut: a program takes ``heads`` of them, in tiles ``block_d`` wide."""

    num_groups: int
    heads: int
    block_d: int
    num_warps: int


def head_groups(num_heads: int, head_dim: int, dtype: torch.dtype) -> HeadGroups:
    block_d = max(16, triton.next_power_of_2(head_dim))
    key_bytes = block_d * dtype.itemsize
    heads = min(max(1, KEY_BYTES // key_bytes), triton.next_power_of_2(num_heads))
    num_warps = max(1, CHUNK * heads * key_bytes // WARP_BYTES)
    return HeadGroups(triton.cdiv(num_heads, heads), heads, block_d, num_warps)


def decode_attention(
    q_RHD: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    jobs: torch.Tensor,
    out_RHD: torch.Tensor,
    scale: float,
    max_chunks: int,
    partials: Partials | None,
) -> None:
    """Attention of rows with one new token each, its key and value included, written into ``out_RHD``.

    Launched in as few parts as ``partials`` allows; nothing is read on the host.

    Args:
        q_RHD: [R or more, H, D]; any strides but the last.
        kv_cache: contiguous [blocks, 2, block_size, H, D].
        block_tables: int64 [sequences, N]; entries past the end of a sequence may be any number.
        jobs: int64 [R], lengths of the sequences, row by row; or int32 [R, 4] of row, sequence, length
            and first partial result.
        out_RHD: contiguous, like the queries; rows without a job are left alone.
        max_chunks: of CHUNK tokens, of the longest row.
        partials: room for ``rows_at_once`` rows of ``max_chunks``, or for all jobs; None where one
            chunk is all there is.
    """
    listed, step = jobs.dim() == 2, len(jobs)
    if not listed and partials is not None:
        step = len(partials.sums) // max_chunks
    if listed or step >= len(jobs):
        _launch(q_RHD, kv_cache, block_tables, jobs, out_RHD, scale, max_chunks, partials)
        return
    for start in range(0, len(jobs), step):
        rows = slice(start, start + step)
        _launch(
            q_RHD[rows], kv_cache, block_tables[rows], jobs[rows], out_RHD[rows],
            scale, max_chunks, partials,
        )  # fmt: skip


def _launch(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    jobs: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    max_chunks: int,
    partials: Partials | None,
) -> None:
    _, _, block_size, num_heads, head_dim = kv_cache.shape
    assert kv_cache.is_contiguous() and out.is_contiguous() and jobs.is_contiguous()
    assert q.stride(2) == 1 and block_tables.stride(1) == 1 and q.dtype == kv_cache.dtype
    assert (partials is None) == (max_chunks == 1)
    groups = head_groups(num_heads, head_dim, kv_cache.dtype)
    parts = num_parts(len(jobs) * groups.num_groups, max_chunks, q.device)
    # The kernels touch neither where one chunk is all there is.
    sums, stats = partials or (out, out)
    listed, pdl = jobs.dim() == 2, pdl_options(q.device)
    _attend_chunks[groups.num_groups, len(jobs), parts](
        q, kv_cache, block_tables, jobs, out, sums, stats,
        q.stride(0), q.stride(1), block_tables.shape[1], block_tables.stride(0), max_chunks,
        scale * LOG2_E,
        LISTED=listed, DIRECT=partials is None, NUM_HEADS=num_heads, HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size, CHUNK=CHUNK, HEADS=groups.heads, BLOCK_D=groups.block_d,
        num_warps=groups.num_warps, num_stages=1, **pdl,
    )  # fmt: skip
    if partials is not None:
        # As wide as what merges in the kernel that attends at once: the order of sums is the same.
        _merge_chunks[groups.num_groups, len(jobs)](
            jobs, sums, stats, out, max_chunks,
            LISTED=listed, NUM_HEADS=num_heads, HEAD_DIM=head_dim, CHUNK=CHUNK,
            HEADS=groups.heads, AT_ONCE=MERGED_AT_ONCE, BLOCK_D=groups.block_d,
            num_warps=groups.num_warps, **pdl,
        )  # fmt: skip


def num_parts(streams: int, max_chunks: int, device: torch.device) -> int:
    """Programs that share the chunks of one row and head group; changes no bit of the result."""
    multiprocessors = 1
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    filling = triton.cdiv(PROGRAMS_PER_SM * multiprocessors, streams)
    return min(max_chunks, max(filling, MIN_PROGRAMS))
