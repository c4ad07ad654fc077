"""Log-probabilities of raw logits that are cut over ranks, without gathering whole rows.

Knows tensors and ranks: no sequences.
"""

from dataclasses import dataclass

import torch

from tprt.distributed.communication import all_gather
from tprt.distributed.tp_group import TPGroup

# Rows are taken in chunks so that no more logits than this exist at once on a rank.
MAX_LOGITS = 2**24


@dataclass(frozen=True)
class Logprobs:
    """Legend: R rows, k likeliest ids.

    Args:
        target: float32 [R], of the given ids; rank: int64 [R], how many ids are likelier, plus 1.
        top: float32 [R, k], best first; top_ids: int64 [R, k]. Of equal ones the lower id is first.
    """

    target: torch.Tensor
    rank: torch.Tensor
    top: torch.Tensor
    top_ids: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All four, in the order of the arguments."""
        return self.target, self.rank, self.top, self.top_ids

    def to_lists(self) -> "LogprobLists":
        """All numbers at once: one by one, each would wait for the device."""
        return LogprobLists(
            self.target.tolist(), self.rank.tolist(), self.top.tolist(), self.top_ids.tolist()
        )

    @staticmethod
    def cat(parts: list["Logprobs"]) -> "Logprobs":
        names = ("target", "rank", "top", "top_ids")
        return Logprobs(*(torch.cat([getattr(p, name) for p in parts]) for name in names))


@dataclass(frozen=True)
class LogprobLists:
    """``Logprobs`` on the host, in plain numbers."""

    target: list[float]
    rank: list[int]
    top: list[list[float]]
    top_ids: list[list[int]]


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, k: int, ids: torch.Tensor, tp: TPGroup
) -> Logprobs:
    """``log_softmax`` over the whole vocabulary, at ``targets`` and at the ``k`` likeliest ids.

    Args:
        logits: float32 [R, part] of this rank; padding is -inf.
        targets: int64 [R], the same on every rank; rows with -1 get any value.
        ids: int64 [part], ascending, of this rank's columns; an id without one has a logit of -inf.
    """
    column = torch.searchsorted(ids, targets.contiguous()).clamp(max=len(ids) - 1)
    here = ids[column] == targets
    at_target = logits.gather(1, column.unsqueeze(1)).squeeze(1)
    at_target = at_target.masked_fill(~here, float("-inf"))
    best, order = logits.sort(dim=1, descending=True, stable=True)
    best, order = best[:, :k], ids[order[:, :k]]
    head = torch.stack([logits.logsumexp(dim=1), at_target], dim=1)
    # float64 holds a float32 and an id exactly, so one gather carries both.
    sent = torch.cat([head.double(), best.double(), order.double()], dim=1)
    gathered = all_gather(sent, tp)  # [size, R, 2 + 2k]
    total = gathered[:, :, 0].logsumexp(dim=0)
    target = gathered[:, :, 1].max(dim=0).values
    count = best.shape[1]
    values = gathered[:, :, 2 : 2 + count].transpose(0, 1).flatten(1)
    ids = gathered[:, :, 2 + count :].transpose(0, 1).flatten(1)
    values, order = values.sort(dim=1, descending=True, stable=True)  # ranks hold ascending ids
    values, ids = values[:, :k], ids.gather(1, order[:, :k])
    likelier = (logits.double() > target.unsqueeze(1)).sum(dim=1)
    rank = all_gather(likelier, tp).sum(dim=0) + 1
    return Logprobs(
        (target - total).float(), rank, (values - total.unsqueeze(1)).float(), ids.long()
    )
