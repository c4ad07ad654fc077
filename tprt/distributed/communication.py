"""The collectives the project uses. Each is the identity at size 1. Knows tensors and groups only."""

import json
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, BroadcastOptions

from tprt.distributed.progress import Progress
from tprt.distributed.tp_group import TPGroup
from tprt.errors import PeerLost
from tprt.faults import fault_point

# A wait for the host is done in slices, so that a signal, or what the watch found, ends it.
SLICE = timedelta(seconds=0.25)
_PEER_GONE = ("connection", "timed out", "timeout", "broken pipe", "reset by peer", "nccl")


def _wait(start: Callable[[], Any], tp: TPGroup, what: str, on_host: bool) -> None:
    """Start a collective and wait for it; a peer that is gone is a ``PeerLost``.

    Args:
        what: its name.
        on_host: on a GPU the wait is the stream's.
    """
    progress = tp.progress
    fault = fault_point("collective", what)
    if fault == "skip":
        return
    progress.wait_for(what, collective=what != "record")
    try:
        if fault == "extra":
            _finish(start(), progress, on_host)
            progress.wait_for(what, collective=what != "record")
        work = start()
        if work is not None:  # newer backends give none where nothing is left to wait for
            _finish(work, progress, on_host)
        progress.go_on()
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in _PEER_GONE):
            raise  # out of memory, a dtype the backend lacks: not a peer's doing
        raise PeerLost(
            f"a collective failed: {_short(error)}",
            where=f"rank {tp.rank} of {tp.size}",
            hint="another rank has died or is stuck; look for its own message",
        ) from error


def _short(error: RuntimeError) -> str:
    """Without the place in the backend's source, and its advice."""
    text = str(error).splitlines()[0]
    return re.sub(r"^\[\S+\] ", "", text).partition(". This is ")[0]


def _finish(work: Any, progress: Progress, on_host: bool) -> None:
    while on_host:
        try:
            work.wait(SLICE)
            return
        except RuntimeError:
            if work.is_completed():  # with an error, or just after the slice was over
                work.wait()
                return
            progress.check()
        finally:
            progress.stuck = not work.is_completed()
    work.wait()


class OneShot(Protocol):
    """Collectives of little data in one launch, over memory that every rank of a host can read."""

    def fits(self, rows: int, width: int, dtype: torch.dtype) -> bool: ...

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor: ...

    def all_gather(self, words: torch.Tensor) -> torch.Tensor: ...


def one_shot_for(x: torch.Tensor, tp: TPGroup) -> Any:
    """``tp.one_shot`` where it takes [rows, width] like ``x``, else None; the same on every rank."""
    if tp.one_shot is None or x.dim() != 2 or not tp.one_shot.fits(*x.shape, x.dtype):
        return None
    return tp.one_shot


def all_reduce(x: torch.Tensor, tp: TPGroup) -> torch.Tensor:
    """Sum over ranks in the dtype of ``x``; every rank gets the same bits. ``x`` may be changed."""
    if (small := one_shot_for(x, tp)) is not None:
        summed: torch.Tensor = small.all_reduce(x)
        return summed
    if tp.size > 1:
        options = AllreduceOptions()
        options.asyncOp = False  # NCCL then queues on the current stream, which a graph captures
        on_host = not x.is_cuda
        _wait(lambda: tp.device_group.allreduce([x], options), tp, "all_reduce", on_host)
    return x


def all_gather(x: torch.Tensor, tp: TPGroup) -> torch.Tensor:
    """[*shape] of each rank -> [size, *shape] on every rank, ordered by rank."""
    if tp.size == 1:
        return x.unsqueeze(0)
    if x.dtype == torch.int64 and (small := one_shot_for(x.view(1, -1), tp)) is not None:
        gathered: torch.Tensor = small.all_gather(x.flatten())
        return gathered.view(tp.size, *x.shape)
    out = torch.empty(tp.size * x.numel(), dtype=x.dtype, device=x.device)
    options = AllgatherOptions()
    options.asyncOp = False
    flat, on_host = x.flatten(), not x.is_cuda
    _wait(lambda: tp.device_group._allgather_base(out, flat, options), tp, "all_gather", on_host)
    return out.view(tp.size, *x.shape)


def broadcast_record(
    words: torch.Tensor, tp: TPGroup, timeout: timedelta | None = None
) -> torch.Tensor:
    """Rank 0's int64 host tensor to all ranks, in place, over the control group.

    Args:
        timeout: None is the group's. A rank that has run into one can use the group no more, and its
            peers soon find it gone.
    """
    if tp.size > 1:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        if timeout is not None:
            options.timeout = timeout
        _wait(lambda: tp.control_group.broadcast([words], options), tp, "record", on_host=True)
    return words


def gather_json(value: Any, tp: TPGroup) -> list[Any]:
    """Every rank's JSON-able value, ordered by rank, on every rank."""
    if tp.size == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = _gather_host(torch.tensor([data.numel()]), tp).tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: data.numel()] = data
    rows = _gather_host(padded, tp).view(tp.size, -1)
    return [json.loads(row[:n].numpy().tobytes()) for row, n in zip(rows, lengths, strict=True)]


def _gather_host(x: torch.Tensor, tp: TPGroup) -> torch.Tensor:
    """[n] of each rank -> [size * n], on the host."""
    out = torch.empty(tp.size * x.numel(), dtype=x.dtype)
    _wait(lambda: tp.cpu_group._allgather_base(out, x), tp, "gather", on_host=True)
    return out
