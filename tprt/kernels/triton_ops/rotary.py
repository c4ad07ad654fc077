"""LayerNorm of each head's query and key, their rotation, and the paged cache, in one kernel.

A head is read in three pieces, the two halves of what is rotated and the rest: pairs are (i, i + r/2),
so a thread finds both of one pair at the same place of its two halves. One program takes some heads of
one token.

Legend: T tokens, H heads of this rank, D head width, r rotary width.
"""

import torch
import triton
import triton.language as tl

from tprt.kernels.interface import HeadNorms
from tprt.kernels.triton_ops.numerics import round_to

HEADS = 4  # of one program: 64 heads of a single token are 16 programs


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
        BLOCK_DIM=triton.next_power_of_2(dim),
        BLOCK_HALF=triton.next_power_of_2(rotary_dim // 2),
        BLOCK_REST=triton.next_power_of_2(max(1, dim - rotary_dim)),
        num_warps=1,
    )  # fmt: skip
    return q


@triton.jit
def _qk_norm_rotary_store_kernel(
    qkv_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, cache_ptr, slots_ptr, q_ptr,
    num_heads, token_stride, head_stride, part_stride, slots_stride, eps,
    NORM: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    row = num_heads * DIM  # of the cache, and of the queries
    k_slot = tl.load(slots_ptr + token)
    v_slot = tl.load(slots_ptr + slots_stride + token)
    qkv_ptr += token * token_stride + heads[:, None] * head_stride
    angles = token * 2 * HALF
    _norm_rotate(
        qkv_ptr, weight_ptr, bias_ptr, cos_ptr + angles, sin_ptr + angles, q_ptr + token * row,
        heads, num_heads, eps, NORM, DIM, HALF, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    # Norms are [H, 2, D]: those of the keys lie D further on.
    _norm_rotate(
        qkv_ptr + part_stride, weight_ptr + DIM, bias_ptr + DIM, cos_ptr + angles, sin_ptr + angles,
        cache_ptr + k_slot * row,
        heads, num_heads, eps, NORM, DIM, HALF, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    inside = (heads < num_heads)[:, None] & (dims < DIM)
    v = tl.load(qkv_ptr + 2 * part_stride + dims, mask=inside)
    tl.store(cache_ptr + v_slot * row + heads[:, None] * DIM + dims, v, mask=inside)


@triton.jit
def _norm_rotate(
    x_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, out_ptr, heads, num_heads, eps,
    NORM: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """LayerNorm and rotation of some heads, from pointers [HEADS, 1] to rows [H, D] at ``out_ptr``."""
    is_head = (heads < num_heads)[:, None]
    i, rest = tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, BLOCK_REST)[None, :]
    in_half, in_rest = is_head & (i < HALF), is_head & (rest < DIM - 2 * HALF)
    rest += 2 * HALF
    x1 = tl.load(x_ptr + i, mask=in_half, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + i + HALF, mask=in_half, other=0.0).to(tl.float32)
    x3 = tl.load(x_ptr + rest, mask=in_rest, other=0.0).to(tl.float32)
    if NORM:
        mean = (tl.sum(x1, axis=1) + tl.sum(x2, axis=1) + tl.sum(x3, axis=1)) / DIM
        x1 = tl.where(in_half, x1 - mean[:, None], 0.0)
        x2 = tl.where(in_half, x2 - mean[:, None], 0.0)
        x3 = tl.where(in_rest, x3 - mean[:, None], 0.0)
        squares = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1) + tl.sum(x3 * x3, axis=1)
        scale = tl.rsqrt(squares / DIM + eps)[:, None]
        offset = heads[:, None] * (2 * DIM)
        x1 = _affine(x1 * scale, weight_ptr + offset + i, bias_ptr + offset + i, in_half)
        x2 = _affine(
            x2 * scale, weight_ptr + offset + i + HALF, bias_ptr + offset + i + HALF, in_half
        )
        x3 = _affine(x3 * scale, weight_ptr + offset + rest, bias_ptr + offset + rest, in_rest)
    turning = i < HALF
    cos1 = tl.load(cos_ptr + i, mask=turning)
    cos2 = tl.load(cos_ptr + i + HALF, mask=turning)
    sin1 = tl.load(sin_ptr + i, mask=turning)
    sin2 = tl.load(sin_ptr + i + HALF, mask=turning)
    out_ptr += heads[:, None] * DIM
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + i, round_to(x1 * cos1 + x2 * sin1, dtype), mask=in_half)
    tl.store(out_ptr + i + HALF, round_to(x2 * cos2 + x1 * sin2, dtype), mask=in_half)
    tl.store(out_ptr + rest, round_to(x3, dtype), mask=in_rest)


@triton.jit
def _affine(x, weight_ptrs, bias_ptrs, mask):
    weight = tl.load(weight_ptrs, mask=mask, other=0.0)
    return x * weight + tl.load(bias_ptrs, mask=mask, other=0.0)
