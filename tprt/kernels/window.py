"""Plain-torch body of attention over a sliding window whose keys and values lie in a ring per slot.

One head of keys and values serves all queries. Legend: T tokens, B sequences, S slots, H query heads of
this rank, D head width, R places of a ring. Knows tensors only.
"""

import torch
import torch.nn.functional as F

from tprt.batch import Segments

QUERIES = 256  # of a chunk at a time: more would look at more keys that none of them sees


def window_attention(
    q_THD: torch.Tensor,
    k_TD: torch.Tensor,
    v_TD: torch.Tensor,
    kv: torch.Tensor,
    segments: Segments,
    keys: int,
    scale: float,
) -> torch.Tensor:
    """Each token attends to itself and the ``keys`` - 1 tokens before it; [T, H, D].

    Args:
        q_THD, k_TD, v_TD: of the tokens of this pass, rotated.
        kv: [S, 2, R, D], R at least ``keys``; gets the keys and values of the last tokens.
    """
    ring = kv.shape[2]
    if segments.starts is None:
        places = segments.once(
            ("window", ring, keys), lambda: _places(segments.positions, ring, keys)
        )
        return _decode(q_THD, k_TD, v_TD, kv, segments.slots, *places, scale)
    out = torch.empty_like(q_THD)
    single, row = [], 0
    lengths = zip(segments.query_lens, segments.starts, strict=True)
    for i, (count, start) in enumerate(lengths):
        if count == 1:
            single.append((i, row))
        else:
            part = slice(row, row + count)
            mine = kv[segments.slots[i]]
            out[part] = _chunk(q_THD[part], k_TD[part], v_TD[part], mine, start, keys, scale)
            _store(k_TD[part], v_TD[part], kv, segments.slots[i], start)
        row += count
    if single:
        of, rows = torch.tensor(single, device=q_THD.device).unbind(1)
        places = _places(segments.positions[rows], ring, keys)
        slots = segments.slots[of]
        out[rows] = _decode(q_THD[rows], k_TD[rows], v_TD[rows], kv, slots, *places, scale)
    return out


def _places(positions: torch.Tensor, ring: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each token's key goes, int64 [B], and which places it sees then, bool [B, R]."""
    p = positions.unsqueeze(1)
    # The position whose token has each place then.
    there = p - (p - torch.arange(ring, device=p.device)) % ring
    return positions % ring, (there >= 0) & (p - there < keys)


def _decode(
    q_BHD: torch.Tensor,
    k_BD: torch.Tensor,
    v_BD: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
    at: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One token for each sequence; nothing is read on the host. ``at``, ``seen``: of ``_places``."""
    kv[slots, 0, at], kv[slots, 1, at] = k_BD, v_BD
    k, v = kv[slots].unbind(1)  # [B, R, D]
    # What an earlier sequence left there may be NaN, and 0 x NaN is NaN: replaced, not only masked.
    hidden = ~seen.unsqueeze(2)
    k, v = k.masked_fill(hidden, 0.0).unsqueeze(1), v.masked_fill(hidden, 0.0).unsqueeze(1)
    mask = seen[:, None, None]
    # The heads of a token are the rows of one product with the keys they share.
    q = q_BHD.unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).squeeze(1)


def _chunk(
    q_THD: torch.Tensor,
    k_TD: torch.Tensor,
    v_TD: torch.Tensor,
    ring_2RD: torch.Tensor,
    start: int,
    keys: int,
    scale: float,
) -> torch.Tensor:
    """Several tokens of one sequence from position ``start``, over the ring and themselves."""
    count, device = len(q_THD), q_THD.device
    old = min(start, keys - 1)
    places = torch.arange(start - old, start, device=device) % ring_2RD.shape[1]
    k, v = torch.cat([ring_2RD[0, places], k_TD]), torch.cat([ring_2RD[1, places], v_TD])
    out = torch.empty_like(q_THD)
    for first in range(0, count, QUERIES):
        last = min(first + QUERIES, count)
        begin, end = max(0, old + first - (keys - 1)), old + last
        rows = torch.arange(old + first, end, device=device).unsqueeze(1)
        columns = torch.arange(begin, end, device=device)
        mask = (columns <= rows) & (rows - columns < keys)
        q = q_THD[first:last].transpose(0, 1)
        shape = (q.shape[0], end - begin, q.shape[2])
        part = F.scaled_dot_product_attention(
            q[None], k[begin:end].expand(shape)[None], v[begin:end].expand(shape)[None],
            attn_mask=mask, scale=scale,
        )  # fmt: skip
        out[first:last] = part[0].transpose(0, 1)
    return out


def _store(
    k_TD: torch.Tensor, v_TD: torch.Tensor, kv: torch.Tensor, slot: torch.Tensor, start: int
) -> None:
    ring, count = kv.shape[2], len(k_TD)
    kept = min(count, ring)
    at = torch.arange(start + count - kept, start + count, device=kv.device) % ring
    kv[slot, 0, at], kv[slot, 1, at] = k_TD[-kept:], v_TD[-kept:]
