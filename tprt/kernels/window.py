"""Plain-torch body of attention over a sliding window whose keys and values lie in a ring per slot.

One head of keys and values serves all queries. Legend: T tokens, B sequences, S slots, H query heads of
this rank, D head width, R places of a ring. Knows tensors only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from tprt.batch import Segments

QUERIES = 256  # of a chunk at a time: more would look at more keys that none of them sees


class Decode(NamedTuple):
    """How sequences with one token each attend.

    Args:
        plan: slots and positions, int64 [B] each, rings [S, 2, R, D] and the keys that a query sees ->
            what is the same for all layers.
        attend: queries [B, H, D], keys and values [B, D], rings, plan and scale -> [B, H, D]; the keys
            and values are in the rings then.
    """

    plan: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], Any]
    attend: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Any, float], torch.Tensor
    ]


def window_attention(
    q_THD: torch.Tensor,
    k_TD: torch.Tensor,
    v_TD: torch.Tensor,
    kv: torch.Tensor,
    segments: Segments,
    keys: int,
    scale: float,
    decode: Decode | None = None,
) -> torch.Tensor:
    """Each token attends to itself and the ``keys`` - 1 tokens before it; [T, H, D].

    Args:
        q_THD, k_TD, v_TD: of the tokens of this pass, rotated.
        kv: [S, 2, R, D], R at least ``keys``; gets the keys and values of the last tokens.
        decode: for sequences with one token; None for what reads nothing on the host.
    """
    decode = decode or GATHERED
    which = "window", kv.shape[2], keys
    if segments.starts is None:
        plan = segments.once(
            which, lambda: decode.plan(segments.slots, segments.positions, kv, keys)
        )
        return decode.attend(q_THD, k_TD, v_TD, kv, plan, scale)
    out = torch.empty_like(q_THD)
    row = 0
    lengths = zip(segments.query_lens, segments.starts, strict=True)
    for i, (count, start) in enumerate(lengths):
        if count > 1:
            part = slice(row, row + count)
            mine = kv[segments.slots[i]]
            out[part] = _chunk(q_THD[part], k_TD[part], v_TD[part], mine, start, keys, scale)
            _store(k_TD[part], v_TD[part], kv, segments.slots[i], start)
        row += count
    if 1 in segments.query_lens:
        rows, plan = segments.once(which, lambda: _single(segments, kv, keys, decode))
        out[rows] = decode.attend(q_THD[rows], k_TD[rows], v_TD[rows], kv, plan, scale)
    return out


def _single(
    segments: Segments, kv: torch.Tensor, keys: int, decode: Decode
) -> tuple[torch.Tensor, Any]:
    """Rows of the sequences with one token, int64, and how they attend."""
    counts = torch.tensor(segments.query_lens)
    of = (counts == 1).nonzero().squeeze(1).to(segments.slots.device)
    rows = segments.first_rows[of]
    return rows, decode.plan(segments.slots[of], segments.positions[rows], kv, keys)


class _Places(NamedTuple):
    """Args: slots, at: int64 [B], where each token's key goes. seen: bool [B, R], what it sees then."""

    slots: torch.Tensor
    at: torch.Tensor
    seen: torch.Tensor


def _places(slots: torch.Tensor, positions: torch.Tensor, kv: torch.Tensor, keys: int) -> _Places:
    ring, p = kv.shape[2], positions.unsqueeze(1)
    # The position whose token has each place then.
    there = p - (p - torch.arange(ring, device=p.device)) % ring
    return _Places(slots, positions % ring, (there >= 0) & (p - there < keys))


def _decode(
    q_BHD: torch.Tensor,
    k_BD: torch.Tensor,
    v_BD: torch.Tensor,
    kv: torch.Tensor,
    places: _Places,
    scale: float,
) -> torch.Tensor:
    slots, at, seen = places
    kv[slots, 0, at], kv[slots, 1, at] = k_BD, v_BD
    k, v = kv[slots].unbind(1)  # [B, R, D]
    # What an earlier sequence left there may be NaN, and 0 x NaN is NaN: replaced, not only masked.
    hidden = ~seen.unsqueeze(2)
    k, v = k.masked_fill(hidden, 0.0).unsqueeze(1), v.masked_fill(hidden, 0.0).unsqueeze(1)
    mask = seen[:, None, None]
    # The heads of a token are the rows of one product with the keys they share.
    q = q_BHD.unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).squeeze(1)


GATHERED = Decode(_places, _decode)


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
