"""Plain-torch bodies of every operation: they run on the CPU and any GPU, and are the oracle.

Legend: T tokens, B sequences, H heads of this rank, D head width, r rotary width, L cached length.
Knows tensors only: no ranks, no models.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

FP16_MAX = 65504.0


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """LayerNorm over the last dimension; statistics in float32, result in the dtype of ``x``."""
    return torch.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def qk_norm_rotary(
    qk_THQD: torch.Tensor,
    weight_HQD: torch.Tensor | None,
    bias_HQD: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """LayerNorm of each head's query and key, then rotation of the first r of D dimensions.

    All of it in float32; the result has the dtype of ``qk_THQD``.

    Args:
        qk_THQD: queries (0) and keys (1) of T tokens and H heads, [T, H, 2, D].
        weight_HQD, bias_HQD: float32 [H, 2, D]; None leaves the LayerNorm out.
        cos, sin: float32 [T, 1, 1, r], as ``RotaryEmbedding`` gives them; pairs are (i, i + r/2), as in
            GPT-NeoX.
    """
    x, rotary_dim = qk_THQD.float(), cos.shape[-1]
    if weight_HQD is not None:
        assert bias_HQD is not None
        x = torch.addcmul(
            bias_HQD, torch.layer_norm(x, (x.shape[-1],), None, None, eps), weight_HQD
        )
    elif x is qk_THQD:
        x = x.clone()
    turning = x[..., :rotary_dim]
    other_half = turning.roll(rotary_dim // 2, -1)
    turning.mul_(cos).addcmul_(other_half, sin)
    return x.to(qk_THQD.dtype)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2. In float16 the square is taken in float32 and capped: 256^2 is past its range."""
    if x.dtype == torch.float16:
        return x.float().relu().square().clamp(max=FP16_MAX).to(torch.float16)
    return x.relu().square()


def store_kv(
    k_THD: torch.Tensor, v_THD: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write each token's key and value; ``slot_mapping`` is [2, T] as in ``ForwardBatch``."""
    rows = kv_cache.view(-1, *kv_cache.shape[-2:])
    rows.index_copy_(0, slot_mapping[0], k_THD)
    rows.index_copy_(0, slot_mapping[1], v_THD)


def paged_attention(
    q_THD: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """Causal attention of each sequence's new tokens over its cached ones and themselves.

    The new keys and values are already in the cache [blocks, 2, block_size, H, D]. ``block_tables`` is
    [B, N]; sequence i has ``context_lens[i]`` older tokens and ``query_lens[i]`` new ones. Returns
    [T, H, D].
    """
    block_size, out, start = kv_cache.shape[2], torch.empty_like(q_THD), 0
    for i, (new, old) in enumerate(zip(query_lens, context_lens, strict=True)):
        length = new + old
        blocks = block_tables[i, : -(-length // block_size)]
        k, v = gather_kv(kv_cache, blocks, length)
        q = q_THD[start : start + new].transpose(0, 1)
        mask = causal_mask(new, old, q.device)
        ctx = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)
        out[start : start + new] = ctx[0].transpose(0, 1)
        start += new
    return out


def gather_kv(
    kv_cache: torch.Tensor, blocks: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one sequence, [H, length, D] each."""
    k, v = kv_cache[blocks].unbind(1)  # [blocks, block_size, H, D]
    return k.flatten(0, 1)[:length].transpose(0, 1), v.flatten(0, 1)[:length].transpose(0, 1)


def causal_mask(new: int, old: int, device: torch.device) -> torch.Tensor:
    """bool [new, old + new]: which positions each new token attends to."""
    rows = torch.arange(old, old + new, device=device).unsqueeze(1)
    return torch.arange(old + new, device=device) <= rows
