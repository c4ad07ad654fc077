"""All of attention in a decode step, in one kernel: ``rotary``, ``decode_attention`` and its merge.

Programs are those of ``decode_attention``. Each makes its heads' query for itself, in registers. The one
whose chunk ends with the new token also writes that token's key and value into the cache; its threads
then read them there behind a barrier, as they read all others. Nobody else reads or writes that place,
so programs of a launch need no order before they merge. (Rows of padding share one: their results are of
no use and go nowhere.) Tiles, warps and helpers are those of the three kernels, hence so are the bits.

Merging. Programs of a (row, head group) that had a chunk count themselves in, and the last one merges.

1. All threads have stored their partial results before the barrier ahead of the count of thread 0.
2. Thread 0 adds 1 to the counter, acquiring and releasing at the scope of the GPU. Such additions are a
   release sequence: whoever adds last has acquired what all before it released, and that includes what
   other threads stored ahead of the barrier.
3. The sum reaches the other threads through a barrier. Those of the last program read the partial
   results from the L2 cache: of an earlier layer, L1 may still hold others.
4. The last program sets the counter to 0. Nobody else of this launch looks at it again, and kernels
   behind this one wait for its end before they touch anything. So graphs are replayed as they are.

Who merges differs from run to run; what is merged, and in which order, does not. No program waits for
another one, so it does not matter how many run at once.

Legend: R rows (one new token each), H heads, D head width, r rotary width.
"""

import torch
import triton
import triton.language as tl

from tprt.kernels.interface import HeadNorms
from tprt.kernels.triton_ops import decode_attention as decode
from tprt.kernels.triton_ops.decode_attention import attend_row, block_ids, merge_row
from tprt.kernels.triton_ops.pdl import pdl_launch_dependents, pdl_options, pdl_wait
from tprt.kernels.triton_ops.rotary import load_norms, load_queries_and_keys, norm_rotate

SM_REGISTERS = 65536


@triton.jit(do_not_specialize=["slots_stride", "width", "table_stride", "max_chunks"])
def _qk_rope_attend(
    qkv_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, kv_ptr, slots_ptr, tables_ptr, lengths_ptr,
    out_ptr, sums_ptr, stats_ptr, counters_ptr,
    token_stride, head_stride, part_stride, slots_stride, width, table_stride, max_chunks,
    eps, scale_log2,
    NORM: tl.constexpr, HALF: tl.constexpr, DIRECT: tl.constexpr, NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs (head group, row, part): chunks part, part + parts, ... of a row."""
    pdl_launch_dependents(PDL)
    group, part, parts = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    norms = load_norms(weight_ptr, bias_ptr, group, NUM_HEADS, NORM, HEAD_DIM, HALF, HEADS, BLOCK_D)
    pdl_wait(PDL)

    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + row).to(tl.int32)
    table_ptr = tables_ptr + row * table_stride
    blocks = block_ids(table_ptr, part, width, CHUNK, BLOCK_SIZE)  # [CHUNK]
    k_slot = tl.load(slots_ptr + row)
    v_slot = tl.load(slots_ptr + slots_stride + row)
    qkv_ptr += row * token_stride
    angles = row * 2 * HALF
    raw = load_queries_and_keys(
        qkv_ptr, head_stride, part_stride, group, NUM_HEADS, HEAD_DIM, HALF, HEADS, BLOCK_D
    )
    heads, dims = group * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK_D)
    in_head = (heads < NUM_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]  # [HEADS, BLOCK_D]
    head_offsets = heads[:, None] * HEAD_DIM + dims[None, :]
    v_offsets = heads[:, None] * head_stride + 2 * part_stride + dims[None, :]
    v = tl.load(qkv_ptr + v_offsets, mask=in_head)
    qk = norm_rotate(
        raw, norms, cos_ptr + angles, sin_ptr + angles, eps, NORM, HEAD_DIM, HALF, BLOCK_D
    )
    q, k = tl.split(tl.permute(tl.reshape(qk, (HEADS, 2, BLOCK_D)), (0, 2, 1)))
    count = tl.cdiv(length, CHUNK)
    if part == (count - 1) % parts:
        tl.store(kv_ptr + k_slot * (NUM_HEADS * HEAD_DIM) + head_offsets, k, mask=in_head)
        tl.store(kv_ptr + v_slot * (NUM_HEADS * HEAD_DIM) + head_offsets, v, mask=in_head)
        tl.debug_barrier()  # what some threads wrote, others of this program read

    first = row * max_chunks  # partial result
    scaled_q = q.to(tl.float32) * scale_log2
    attend_row(
        scaled_q, kv_ptr, table_ptr, blocks, part, parts, row, length, first, width,
        out_ptr, sums_ptr, stats_ptr, heads, head_offsets, in_head,
        DIRECT, NUM_HEADS, HEAD_DIM, BLOCK_SIZE, CHUNK,
    )  # fmt: skip

    if not DIRECT:
        if part < count:  # the others left nothing
            tl.debug_barrier()
            counter = counters_ptr + row * tl.num_programs(0) + group
            earlier = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if earlier == tl.minimum(parts, count) - 1:
                tl.store(counter, 0)
                merge_row(
                    sums_ptr, stats_ptr, out_ptr, row, first, count, group,
                    NUM_HEADS, HEAD_DIM, HEADS, AT_ONCE, BLOCK_D,
                )  # fmt: skip


def zero_counters(
    num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Zeros for the rows of any launch, there when this returns, whatever stream is current."""
    groups = decode.head_groups(num_heads, head_dim, dtype)
    return torch.zeros(decode.MAX_ROWS * groups.num_groups, dtype=torch.int32).to(device)


def qk_rope_attention(
    qkv: torch.Tensor,
    norms: HeadNorms | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    max_chunks: int,
    partials: decode.Partials | None,
    counters: torch.Tensor,
) -> torch.Tensor:
    """``qk_norm_rotary_store`` of R rows, then ``decode_attention``; contiguous [R, H, D].

    Args:
        qkv ... slot_mapping: as in ``qk_norm_rotary_store``, R tokens. A row's slots are those of the
            last of its ``lengths``; rows may share them if nobody reads their results.
        block_tables ... partials: as in ``decode_attention``; int64 [R] lengths.
        counters: of ``zero_counters``, 0 before and after; launches that use the same ones, or the
            same ``partials``, run one after the other.
    """
    rows, num_heads, _, head_dim = qkv.shape
    out = torch.empty((rows, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    step = rows if partials is None else len(partials.sums) // max_chunks
    for start in range(0, rows, step):
        part = slice(start, start + step)
        _launch(
            qkv[part], norms, cos[part], sin[part], kv_cache, slot_mapping[:, part],
            block_tables[part], lengths[part], out[part], scale, max_chunks, partials, counters,
        )  # fmt: skip
    return out


def _launch(
    qkv: torch.Tensor,
    norms: HeadNorms | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    max_chunks: int,
    partials: decode.Partials | None,
    counters: torch.Tensor,
) -> None:
    _, _, block_size, num_heads, head_dim = kv_cache.shape
    rotary_dim, rows = cos.shape[-1], len(lengths)
    assert qkv.stride(3) == 1 and kv_cache.is_contiguous() and qkv.dtype == kv_cache.dtype
    assert rotary_dim % 2 == 0 and 2 <= rotary_dim <= head_dim
    assert cos.is_contiguous() and sin.is_contiguous() and lengths.is_contiguous()
    assert slot_mapping.stride(1) == 1 and block_tables.stride(1) == 1
    assert (partials is None) == (max_chunks == 1)
    groups = decode.head_groups(num_heads, head_dim, kv_cache.dtype)
    assert partials is None or rows * groups.num_groups <= len(counters)
    parts = decode.num_parts(rows * groups.num_groups, max_chunks, qkv.device)
    sums, stats = partials or (out, out)  # not touched where one chunk is all there is
    weight, bias, eps = norms or (cos, sin, 0.0)  # not read where there are none
    _qk_rope_attend[groups.num_groups, rows, parts](
        qkv, weight, bias, cos, sin, kv_cache, slot_mapping, block_tables, lengths,
        out, sums, stats, counters,
        qkv.stride(0), qkv.stride(1), qkv.stride(2), slot_mapping.stride(0),
        block_tables.shape[1], block_tables.stride(0), max_chunks, eps, scale * decode.LOG2_E,
        NORM=norms is not None, HALF=rotary_dim // 2, DIRECT=partials is None,
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, CHUNK=decode.CHUNK,
        HEADS=groups.heads, AT_ONCE=decode.MERGED_AT_ONCE, BLOCK_D=groups.block_d,
        num_warps=groups.num_warps, num_stages=1, **pdl_options(qkv.device),
        # Of up to 8 warps two programs fit an SM, as when they only stream; of more, one.
        maxnreg=min(255, SM_REGISTERS // (32 * max(groups.num_warps, min(16, 2 * groups.num_warps)))),
    )  # fmt: skip
