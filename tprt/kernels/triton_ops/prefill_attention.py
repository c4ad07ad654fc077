"""Attention of chunks of prompts over a paged cache: a Triton kernel, and torch's SDPA.

The kernel takes a tile of one sequence's queries and one head, walks over the keys up to the tile's last
position with an online softmax, and reads them where they lie in the cache. SDPA (cuDNN, else flash) is
faster on long chunks but wants keys and values side by side, so they are gathered first.

Legend: T tokens, H heads, D head width, L cached length with the new tokens.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from tprt.kernels.reference import causal_mask

Ints = npt.NDArray[np.int32]

LOG2_E = 1.4426950408889634
# cuDNN may be faster, but makes a plan for every new length of prompt, which takes longer than it saves.
SDPA_BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@triton.jit
def _attend(
    q,
    kv_ptr,
    table_ptr,
    start,
    end,
    q_positions,
    scale_log2,
    largest,
    total,
    acc,
    MASKED: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Add keys ``start`` to ``start + BLOCK_N`` to the running softmax of a tile.

    Without MASKED every query sees all of them.
    """
    positions = start + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    mask = (dims < HEAD_DIM)[None, :]
    if MASKED:
        inside = positions < end
        blocks = tl.load(table_ptr + positions // BLOCK_SIZE, mask=inside, other=0)
        # What lies past the end may be NaN: it is not read, since 0 x NaN is NaN.
        mask = inside[:, None] & mask
    else:
        blocks = tl.load(table_ptr + positions // BLOCK_SIZE)
    slots = blocks * (2 * BLOCK_SIZE) + positions % BLOCK_SIZE
    places = (slots * (NUM_HEADS * HEAD_DIM))[:, None] + dims[None, :]
    k = tl.load(kv_ptr + places, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
    v = tl.load(kv_ptr + places + BLOCK_SIZE * NUM_HEADS * HEAD_DIM, mask=mask, other=0.0)
    if WIDEN:
        k = k.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if MASKED:
        seen = positions[None, :] <= q_positions[:, None]
        scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, axis=1))
    # Where every score so far is -inf the differences would be NaN.
    shift = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores - shift[:, None])
    kept = tl.exp2(largest - shift)
    total = total * kept + tl.sum(p, axis=1)
    weights = p.to(v.dtype)
    if WIDEN:
        weights, v = weights.to(tl.float32), v.to(tl.float32)
    acc = tl.dot(weights, v, acc * kept[:, None], input_precision=PRECISION)
    return new, total, acc


@triton.jit(do_not_specialize=["table_stride"])
def _prefill_tiles(
    q_ptr,
    kv_ptr,
    tables_ptr,
    tiles_ptr,
    out_ptr,
    q_row_stride,
    q_head_stride,
    table_stride,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Programs (tile, head). Tiles of one head run side by side and share its keys in the L2 cache."""
    tile_ptr, head = tiles_ptr + 4 * tl.program_id(0), tl.program_id(1)
    first_row = tl.load(tile_ptr).to(tl.int64)
    sequence = tl.load(tile_ptr + 1).to(tl.int64)
    first_position, count = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)

    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None] & (dims < HEAD_DIM)[None, :]
    q_ptr += first_row * q_row_stride + head * q_head_stride
    q = tl.load(q_ptr + rows[:, None] * q_row_stride + dims[None, :], mask=mask, other=0.0)

    if WIDEN:
        q = q.to(tl.float32)

    table_ptr = tables_ptr + sequence * table_stride
    kv_ptr += head * HEAD_DIM
    q_positions, end = first_position + rows, first_position + count
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole = (first_position + 1) // BLOCK_N * BLOCK_N  # seen by the first query, hence by all
    for start in range(0, whole, BLOCK_N):
        largest, total, acc = _attend(
            q, kv_ptr, table_ptr, start, end, q_positions, scale_log2, largest, total, acc,
            False, NUM_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D, PRECISION, WIDEN,
        )  # fmt: skip
    for start in range(whole, end, BLOCK_N):
        largest, total, acc = _attend(
            q, kv_ptr, table_ptr, start, end, q_positions, scale_log2, largest, total, acc,
            True, NUM_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D, PRECISION, WIDEN,
        )  # fmt: skip

    result = acc / total[:, None]
    out_ptr += first_row * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM
    out_offsets = rows[:, None] * (NUM_HEADS * HEAD_DIM) + dims[None, :]
    tl.store(out_ptr + out_offsets, result.to(out_ptr.dtype.element_ty), mask=mask)


class Tiling(NamedTuple):
    """How the kernel is cut; by it and by the chunk alone the bits of a chunk are settled."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int


def tiling(num_queries: int, dtype: torch.dtype) -> Tiling:
    """For a chunk of ``num_queries``: no more tile than it fills."""
    if dtype == torch.float32:
        # Plain multiply-adds, whose operands all sit in registers: larger tiles spill them.
        return Tiling(16 if num_queries <= 16 else 32, 16, 4)
    if num_queries <= 16:
        return Tiling(16, 64, 4)
    # From 64 queries on Hopper multiplies per group of four warps. Two groups a tile and two tiles an SM
    # let the softmax of one run beside the products of another.
    return Tiling(64, 64, 4) if num_queries <= 64 else Tiling(128, 64, 8)


def make_tiles(first_row: int, sequence: int, new: int, old: int, block_m: int) -> Ints:
    """int32 [tiles, 4] of one chunk: first row, sequence, first position, queries."""
    starts = np.arange(0, new, block_m, dtype=np.int32)
    tiles = np.empty((len(starts), 4), dtype=np.int32)
    tiles[:, 0], tiles[:, 1] = first_row + starts, sequence
    tiles[:, 2], tiles[:, 3] = old + starts, np.minimum(new - starts, block_m)
    return tiles


def longest_first(tiles: Ints) -> Ints:
    """The tiles with most keys come first, so that none of them is what the GPU waits for at the end."""
    return tiles[np.argsort(-(tiles[:, 2] + tiles[:, 3]), kind="stable")]


def prefill_attention(
    q_THD: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    tiles: torch.Tensor,
    how: Tiling,
    out_THD: torch.Tensor,
    scale: float,
) -> None:
    """Causal attention of chunks over their cached tokens and themselves, written into ``out_THD``.

    Args:
        q_THD: any strides but the last.
        kv_cache: contiguous [blocks, 2, block_size, H, D].
        block_tables: int64 [sequences, N]; entries past the end of a sequence may be any number.
        tiles: int32 [tiles, 4] of ``make_tiles`` with ``how.block_m``.
        out_THD: contiguous; rows of no tile are left alone.
    """
    _, _, block_size, num_heads, head_dim = kv_cache.shape
    assert kv_cache.is_contiguous() and out_THD.is_contiguous() and tiles.is_contiguous()
    assert q_THD.stride(2) == 1 and block_tables.stride(1) == 1 and q_THD.dtype == kv_cache.dtype
    _prefill_tiles[len(tiles), num_heads](
        q_THD,
        kv_cache,
        block_tables,
        tiles,
        out_THD,
        q_THD.stride(0),
        q_THD.stride(1),
        block_tables.stride(0),
        scale * LOG2_E,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=how.block_m,
        BLOCK_N=how.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        PRECISION="ieee" if q_THD.dtype == torch.float32 else "tf32",
        # The interpreter multiplies the bits of bfloat16 as if they were integers.
        WIDEN=q_THD.device.type == "cpu",
        num_warps=how.num_warps,
        num_stages=3,
    )


def gather_places(blocks: torch.Tensor) -> torch.Tensor:
    """int64 [2 n]: n blocks' keys, then their values, in a cache seen as [blocks * 2, ...]."""
    return torch.cat([blocks * 2, blocks * 2 + 1])


def sdpa_attention(
    q_THD: torch.Tensor,
    kv_cache: torch.Tensor,
    places: torch.Tensor,
    length: int,
    out_THD: torch.Tensor,
    scale: float,
) -> None:
    """``prefill_attention`` of one chunk by torch's fused kernels.

    Args:
        q_THD: the last T of the sequence's ``length`` tokens.
        places: int64 of ``gather_places`` for the blocks that hold them.
    """
    new, device = len(q_THD), q_THD.device
    _, _, block_size, num_heads, head_dim = kv_cache.shape
    gathered = kv_cache.view(-1, block_size * num_heads * head_dim).index_select(0, places)
    # Views [H, L, D] of [L, H, D], which the kernels take as they are.
    k, v = gathered.view(2, -1, num_heads, head_dim)[:, :length].transpose(1, 2).split(1)
    q = q_THD.transpose(0, 1)[None]
    mask = None
    if new < length:
        # Fused kernels know this mask by its shape and need not read it.
        fused = device.type == "cuda"
        mask = causal_lower_right(new, length) if fused else causal_mask(new, length - new, device)
    with sdpa_kernel(SDPA_BACKENDS, set_priority=True):
        context = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    out_THD.copy_(context[0].transpose(0, 1))
