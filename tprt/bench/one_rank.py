"""Rank 0 of N without the others: what one rank's share of a step takes, collectives left out.

Their groups answer at once, as if every other rank had said what this one says. The numbers a model then
computes mean nothing; shapes, kernels and launches are those of the real rank. Knows tensors only.
"""

from typing import Any

import torch

from tprt.distributed.tp_group import TPGroup


class _Done:
    def wait(self, timeout: Any = None) -> None:
        return None

    def is_completed(self) -> bool:
        return True


class _Group:
    """What ``distributed.communication`` asks of a process group."""

    def allreduce(self, tensors: list[torch.Tensor], options: Any = None) -> _Done:
        return _Done()

    def _allgather_base(self, out: torch.Tensor, mine: torch.Tensor, options: Any = None) -> _Done:
        out.view(-1, mine.numel()).copy_(mine.flatten())
        return _Done()

    def broadcast(self, tensors: list[torch.Tensor], options: Any = None) -> _Done:
        return _Done()

    def shutdown(self) -> None:
        return None

    def abort(self) -> None:
        return None


class _Store:
    def check(self, keys: list[str]) -> bool:
        return False  # nobody follows


def lone_rank(size: int, device: torch.device) -> TPGroup:
    """Rank 0 of ``size`` on ``device``; the others exist on paper."""
    if size == 1:
        return TPGroup(device=device)
    return TPGroup(
        rank=0,
        size=size,
        device=device,
        device_group=_Group(),  # not the host's: what is shared with the host stays out of graphs
        cpu_group=_Group(),
        control_group=_Group(),
        store=_Store(),
    )
