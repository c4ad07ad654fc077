"""Attention of single tokens over a sliding window on a CPU: rings are read where they lie.

Here the host is the device, so positions are looked at: of a ring that has not gone round a part is
seen, which needs no mask and reads nothing that another sequence left; one that has gone round holds
nothing of others, and is read as a whole. Knows tensors only.

Legend: B sequences, S slots, H query heads of this rank, D head width, R places of a ring.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from tprt.kernels.window import Decode


@dataclass(frozen=True)
class _Group:
    """Rows ``first`` to ``last`` of the batch, which read the rings of as many slots from ``slot`` on.

    Args:
        slots: as many as rows; or 1 for padding rows, which have one slot between them.
        begin, end: the places that are seen. mask: [rows, 1, 1, R] to add to the scores; None for 0.
    """

    first: int
    last: int
    slot: int
    slots: int
    begin: int
    end: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class _Plan:
    """Args: stores: int64 [B] each, rows for keys and values of rings seen as [S * 2 * R, D]."""

    stores: tuple[torch.Tensor, torch.Tensor]
    groups: list[_Group]


def _plan(slots: torch.Tensor, positions: torch.Tensor, kv: torch.Tensor, keys: int) -> _Plan:
    ring = kv.shape[2]
    rows = slots * (2 * ring) + positions % ring
    return _Plan((rows, rows + ring), _groups(slots.tolist(), positions.tolist(), kv, keys))


def _groups(
    slots: Sequence[int], positions: Sequence[int], kv: torch.Tensor, keys: int
) -> list[_Group]:
    ring, groups, row = kv.shape[2], [], 0
    while row < len(slots):
        first, position = row, positions[row]
        row += 1
        if position < ring:
            while row < len(slots) and (slots[row], positions[row]) == (slots[first], position):
                row += 1
            begin = max(0, position + 1 - keys)
            groups.append(_Group(first, row, slots[first], 1, begin, position + 1, None))
            continue
        while row < len(slots) and positions[row] >= ring and slots[row] == slots[row - 1] + 1:
            row += 1
        mask = None
        if keys < ring:
            whole = _masks(ring, keys, kv.dtype)
            newest = [position % ring for position in positions[first:row]]
            mask = torch.stack([whole[ring - 1 - at : 2 * ring - 1 - at] for at in newest])
            mask = mask[:, None, None]
        groups.append(_Group(first, row, slots[first], row - first, 0, ring, mask))
    return groups


@lru_cache(maxsize=4)
def _masks(ring: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """[2 R - 1]: from R - 1 - p on, values for the places of a ring whose newest token is in place p."""
    age = torch.arange(ring - 1, -ring, -1) % ring  # of the token in each place
    return torch.zeros(len(age), dtype=dtype).masked_fill_(age >= keys, float("-inf"))


def _attend(
    q_BHD: torch.Tensor,
    k_BD: torch.Tensor,
    v_BD: torch.Tensor,
    kv: torch.Tensor,
    plan: _Plan,
    scale: float,
) -> torch.Tensor:
    rows = kv.view(-1, kv.shape[3])
    for at, new in zip(plan.stores, (k_BD, v_BD), strict=True):
        rows.index_copy_(0, at, new)
    parts = []
    for group in plan.groups:
        seen = kv[group.slot : group.slot + group.slots, :, group.begin : group.end]
        if group.slots < (count := group.last - group.first):
            seen = seen.expand(count, -1, -1, -1)
        k, v = seen.unsqueeze(2).unbind(1)  # [rows, 1, places, D]
        # The heads of a token are the rows of one product with the keys they share.
        q = q_BHD[group.first : group.last].unsqueeze(1)
        part = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scale)
        parts.append(part.squeeze(1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


IN_PLACE = Decode(_plan, _attend)
