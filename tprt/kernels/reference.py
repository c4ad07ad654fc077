"""Plain-torch bodies of every operation: they run on the CPU and any GPU, and are the oracle.

Legend: T tokens, B sequences, H heads of this rank, D head width, r rotary width, L cached length.
Knows tensors only: no ranks, no models.
"""

import torch
import torch.nn.functional as F

FP16_MAX = 65504.0


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """LayerNorm over the last dimension; statistics in float32, result in the dtype of ``x``."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def head_layer_norm(
    x_THD: torch.Tensor, weight_HD: torch.Tensor, bias_HD: torch.Tensor, eps: float
) -> torch.Tensor:
    """LayerNorm over the width of one head, each head with a weight and bias of its own."""
    normed = F.layer_norm(x_THD.float(), (x_THD.shape[-1],), None, None, eps)
    return (normed * weight_HD.float() + bias_HD.float()).to(x_THD.dtype)


def rotary(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first r of D dimensions; pairs are (i, i + r/2), as in GPT-NeoX.

    Args:
        cos, sin: float32 [T, r/2]. Computed in float32, returned in the dtype of ``x_THD``.
    """
    half = cos.shape[-1]
    a, b = x_THD[..., :half].float(), x_THD[..., half : 2 * half].float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned.to(x_THD.dtype), x_THD[..., 2 * half :]], dim=-1)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2. In float16 the square is taken in float32 and capped: 256^2 is past its range."""
    if x.dtype == torch.float16:
        return x.float().relu().square().clamp(max=FP16_MAX).to(torch.float16)
    return x.relu().square()


def store_kv(
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write each token's key and value into its slot; caches are [blocks, block_size, H, D]."""
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, k_THD)
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v_THD)


def paged_attention(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    scale: float,
) -> torch.Tensor:
    """Causal attention of each sequence's new tokens over its cached ones and themselves.

    The new keys and values are already in the cache. ``block_tables`` is [B, N]; sequence i has
    ``context_lens[i]`` older tokens and ``query_lens[i]`` new ones. Returns [T, H, D].
    """
    if len(query_lens) == q_THD.shape[0]:
        return _decode_attention(q_THD, k_cache, v_cache, block_tables, context_lens, scale)
    block_size, out, start = k_cache.shape[1], torch.empty_like(q_THD), 0
    decodes: list[tuple[int, int]] = []  # sequence, row: taken together, and not one by one
    for i, (new, old) in enumerate(zip(query_lens, context_lens, strict=True)):
        if new == 1:
            decodes.append((i, start))
            start += 1
            continue
        length = new + old
        blocks = block_tables[i, : -(-length // block_size)]
        k = k_cache[blocks].flatten(0, 1)[:length].transpose(0, 1)  # [H, L, D]
        v = v_cache[blocks].flatten(0, 1)[:length].transpose(0, 1)
        q = q_THD[start : start + new].transpose(0, 1)
        mask = None
        if old:
            rows = torch.arange(old, length, device=q.device)
            mask = torch.arange(length, device=q.device) <= rows.unsqueeze(1)
        ctx = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=not old, scale=scale
        )
        out[start : start + new] = ctx[0].transpose(0, 1)
        start += new
    if decodes:
        which = torch.tensor(decodes, device=q_THD.device)
        tables, old_lens = block_tables[which[:, 0]], tuple(context_lens[i] for i, _ in decodes)
        rows = which[:, 1]
        out[rows] = _decode_attention(q_THD[rows], k_cache, v_cache, tables, old_lens, scale)
    return out


def _decode_attention(
    q_BHD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: tuple[int, ...],
    scale: float,
) -> torch.Tensor:
    longest, block_size = max(context_lens) + 1, k_cache.shape[1]
    blocks = block_tables[:, : -(-longest // block_size)]
    k = k_cache[blocks].flatten(1, 2)[:, :longest].transpose(1, 2)  # [B, H, L, D]
    v = v_cache[blocks].flatten(1, 2)[:, :longest].transpose(1, 2)
    lengths = torch.tensor(context_lens, device=q_BHD.device).view(-1, 1)
    mask = torch.arange(longest, device=q_BHD.device) <= lengths
    # Masked slots may hold NaN of an earlier sequence: NaN - inf and 0 x NaN are both NaN.
    stale = ~mask[:, None, :, None]
    k, v = k.masked_fill(stale, 0), v.masked_fill(stale, 0)
    ctx = F.scaled_dot_product_attention(
        q_BHD[:, :, None], k, v, attn_mask=mask[:, None, None], scale=scale
    )
    return ctx[:, :, 0]
