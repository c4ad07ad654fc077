"""LayerNorm of each head's query and key, their rotation, and the paged cache, in one kernel.

Pairs are (i, i + r/2): a head is read a second time with the two of each pair exchanged, and what a
head's statistics make of the one they make of the other. One program takes some heads of one token,
queries and keys in one tile.

``norm_rotate`` also begins the kernel that attends at once (``fused_attention``), where other threads
share a head and yet the bits should be the same. So sums are float64, in which the order does not show
once they are rounded, and where a product meets a sum the code says which is not rounded: that is else
the compiler's choice.

Legend: T tokens, H heads of this rank, D head width, r rotary width.
"""

import torch
import triton
import triton.language as tl

from tprt.kernels.interface import HeadNorms
from tprt.kernels.triton_ops.numerics import round_to
from tprt.kernels.triton_ops.pdl import pdl_launch_dependents, pdl_options, pdl_wait

HEADS = 2  # of one program: 64 heads of a single token are 32 programs


def qk_norm_rotary_store(
    qkv: torch.Tensor,
    norms: HeadNorms | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """See ``interface.Kernels``.

    Args:
        qkv: [T, H, 3, D]; any strides but the last. norms: contiguous. cos, sin: contiguous, r even.
        kv_cache: contiguous. slot_mapping: tokens may share only slots that nobody reads.
    """
    tokens, heads, _, dim = qkv.shape
    rotary_dim = cos.shape[-1]
    assert qkv.stride(3) == 1 and kv_cache.is_contiguous()
    assert rotary_dim % 2 == 0 and 2 <= rotary_dim <= dim and cos.stride() == sin.stride()
    assert cos.is_contiguous() and slot_mapping.stride(1) == 1
    q = torch.empty((tokens, heads, dim), dtype=qkv.dtype, device=qkv.device)
    weight, bias, eps = norms or (cos, sin, 0.0)  # not read where there are none
    _qk_norm_rotary_store_kernel[(tokens, triton.cdiv(heads, HEADS))](
        qkv, weight, bias, cos, sin, kv_cache, slot_mapping, q,
        heads, qkv.stride(0), qkv.stride(1), qkv.stride(2), slot_mapping.stride(0), eps,
        NORM=norms is not None, DIM=dim, HALF=rotary_dim // 2, HEADS=HEADS,
        BLOCK_D=triton.next_power_of_2(dim), num_warps=1, **pdl_options(qkv.device),
    )  # fmt: skip
    return q


@triton.jit
def _qk_norm_rotary_store_kernel(
    qkv_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, cache_ptr, slots_ptr, q_ptr,
    num_heads, token_stride, head_stride, part_stride, slots_stride, eps,
    NORM: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_launch_dependents(PDL)
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    norms = load_norms(weight_ptr, bias_ptr, group, num_heads, NORM, DIM, HALF, HEADS, BLOCK_D)
    pdl_wait(PDL)
    k_slot = tl.load(slots_ptr + token)
    v_slot = tl.load(slots_ptr + slots_stride + token)
    qkv_ptr += token * token_stride
    angles = token * 2 * HALF
    raw = load_queries_and_keys(
        qkv_ptr, head_stride, part_stride, group, num_heads, DIM, HALF, HEADS, BLOCK_D
    )
    heads = group * HEADS + tl.arange(0, HEADS)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    inside = (heads < num_heads) & (dims < DIM)
    v = tl.load(qkv_ptr + heads * head_stride + 2 * part_stride + dims, mask=inside)
    qk = norm_rotate(raw, norms, cos_ptr + angles, sin_ptr + angles, eps, NORM, DIM, HALF, BLOCK_D)
    row = num_heads * DIM  # of the cache, and of the queries
    tl.store(cache_ptr + v_slot * row + heads * DIM + dims, v, mask=inside)
    heads, parts = _heads_and_parts(group, HEADS)
    inside = (heads < num_heads) & (dims < DIM)
    tl.store(q_ptr + token * row + heads * DIM + dims, qk, mask=inside & (parts == 0))
    tl.store(cache_ptr + k_slot * row + heads * DIM + dims, qk, mask=inside & (parts == 1))


@triton.jit
def _heads_and_parts(group, HEADS: tl.constexpr):
    """Of a group's queries (part 0) and keys (part 1), which take turns: [2 * HEADS, 1]."""
    rows = tl.arange(0, 2 * HEADS)[:, None]
    return group * HEADS + rows // 2, rows % 2


@triton.jit
def _pairs(HALF: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dimensions of a head and, of those that turn, the other one of each pair; [1, BLOCK_D]."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    return dims, tl.where(dims < HALF, dims + HALF, dims - HALF)


@triton.jit
def load_norms(
    weight_ptr, bias_ptr, group, num_heads, NORM: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Weights and biases of a group's queries and keys, and both with each pair exchanged.

    [2 * HEADS, BLOCK_D] each. They are nobody's output: they may be read before ``pdl_wait``.
    """
    if NORM:
        dims, others = _pairs(HALF, BLOCK_D)
        heads, parts = _heads_and_parts(group, HEADS)
        inside, turning = (
            (heads < num_heads) & (dims < DIM),
            (heads < num_heads) & (dims < 2 * HALF),
        )
        row = (heads * 2 + parts) * DIM
        return (
            tl.load(weight_ptr + row + dims, mask=inside, other=0.0),
            tl.load(bias_ptr + row + dims, mask=inside, other=0.0),
            tl.load(weight_ptr + row + others, mask=turning, other=0.0),
            tl.load(bias_ptr + row + others, mask=turning, other=0.0),
        )
    else:  # behind a plain "if" Triton would compile what follows it all the same
        return (0.0, 0.0, 0.0, 0.0)


@triton.jit
def load_queries_and_keys(
    qkv_ptr, head_stride, part_stride, group, num_heads, DIM: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A group's of one token: [2 * HEADS, BLOCK_D], and the same with each pair exchanged."""
    dims, others = _pairs(HALF, BLOCK_D)
    heads, parts = _heads_and_parts(group, HEADS)
    inside, turning = (heads < num_heads) & (dims < DIM), (heads < num_heads) & (dims < 2 * HALF)
    row = qkv_ptr + heads * head_stride + parts * part_stride
    x = tl.load(row + dims, mask=inside, other=0.0)
    return x, tl.load(row + others, mask=turning, other=0.0)


@triton.jit
def norm_rotate(
    raw, norms, cos_ptr, sin_ptr, eps,
    NORM: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """LayerNorm and rotation of what the loads above gave: [2 * HEADS, BLOCK_D] in its dtype."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    turns = dims < 2 * HALF
    cos = tl.load(cos_ptr + dims, mask=turns, other=0.0)
    sin = tl.load(sin_ptr + dims, mask=turns, other=0.0)
    x, y = raw[0].to(tl.float32), raw[1].to(tl.float32)
    if NORM:
        weight, bias, y_weight, y_bias = norms
        mean = _row_sums(x.to(tl.float64)) / DIM
        x = tl.where(dims < DIM, x - mean, 0.0)
        wide = x.to(tl.float64)
        scale = tl.rsqrt(_row_sums(wide * wide) / DIM + eps)
        x = tl.fma(x * scale, weight, bias)
        y = tl.fma((y - mean) * scale, y_weight, y_bias)
    x = tl.where(turns, tl.fma(x, cos, y * sin), x)
    return round_to(x, raw[0].dtype)


@triton.jit
def _row_sums(x):
    """[ROWS, WIDTH] float64 -> [ROWS, 1] float32."""
    return tl.sum(x, axis=1).to(tl.float32)[:, None]
