"""One rank's part of the self-test of collectives.

It makes groups as every command does, runs collectives on values whose result is known to the last bit,
and posts what it is about to do to the store through which the ranks met. Who reads that, and what a
silence means, is ``ranks``' business.
"""

import contextlib
import functools
import itertools
import json
import os
import platform
import socket
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._distributed_c10d import BroadcastOptions

import tprt
from tprt.distributed.communication import all_gather, all_reduce, broadcast_record
from tprt.distributed.liveness import host_identity
from tprt.distributed.tp_group import TPGroup, init_tp_group
from tprt.errors import PeerLost, TprtError
from tprt.faults import fault_point

FAULT_POINT = "doctor"
# Of messages: a lone number, a row of a large model, and the rows of a long prompt.
ELEMENTS = (1, 4096, 2**20)
ROUNDS = 8  # the first is not timed
# Whole numbers below these are exact, so that a sum has the same bits in any order.
EXACT = {"bfloat16": 2**8, "float32": 2**24, "int64": 2**24}
BEAT_SECONDS = 0.5


@dataclass(frozen=True)
class Case:
    """``all_reduce``, ``all_gather``, ``broadcast``, or ``record``: words over the control group."""

    collective: str
    dtype: str
    elements: int

    @property
    def name(self) -> str:
        return f"{self.collective} {self.dtype} x {self.elements}"


def cases(size: int) -> list[Case]:
    """The same on every rank of ``size``."""
    found = []
    for collective in ("all_reduce", "all_gather", "broadcast"):
        for dtype, limit in EXACT.items():
            if limit // size < 2:
                continue  # too many ranks for sums that are exact
            # What all ranks together hold of a gather grows with the square of their number.
            most = ELEMENTS[-1] if collective == "all_reduce" else ELEMENTS[-1] // size
            sizes = dict.fromkeys(min(n, max(most, 1)) for n in ELEMENTS)
            found += [Case(collective, dtype, elements) for elements in sizes]
    return found + [Case("record", "int64", elements) for elements in (64, 4096)]


class _Posts:
    """What this rank is about to do, told to the store, with a number that grows."""

    def __init__(self, store: Any, rank: int) -> None:
        self.store, self.rank, self.step, self.doing = store, rank, 0, ""

    def __call__(self, doing: str) -> None:
        self.step, self.doing = self.step + 1, doing
        self.store.set(f"doing/{self.rank}", json.dumps([self.step, doing]))


def take_part(store: Any, rank: int, device: str | None) -> None:
    """This rank's part of the test; what comes of it goes to ``store``."""
    done, post = threading.Event(), _Posts(store, rank)
    store.set(f"who/{rank}", json.dumps([os.getpid(), host_identity()]))
    threading.Thread(target=_beat, args=(store.clone(), rank, done), daemon=True).start()
    try:
        answer = _test(device, post)
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = "" if isinstance(error, TprtError) else f"{type(error).__name__}: "
        victim = isinstance(error, PeerLost)
        answer = {"error": f"{kind}{said}", "doing": post.doing, "victim": victim}
    finally:
        done.set()
    store.set(f"answer/{rank}", json.dumps(answer))


def _beat(store: Any, rank: int, done: threading.Event) -> None:
    """Shows that this process runs, whatever its main thread waits for."""
    with contextlib.suppress(RuntimeError):  # the store is gone: so is who reads this
        for count in itertools.count():
            store.set(f"beat/{rank}", str(count))
            if done.wait(BEAT_SECONDS):
                return


def _test(device: str | None, post: Callable[[str], None]) -> dict[str, Any]:
    post("meeting the other ranks")
    tp = init_tp_group(None, device)
    post(f"computing on {tp.device}")
    torch.ones(64, 64, device=tp.device).matmul(torch.ones(64, 64, device=tp.device)).sum().item()
    wrong, us = [], {}
    for case in cases(tp.size) if tp.size > 1 else []:
        # Twice, so that a rank that does not come to a collective is behind those that wait in it.
        post(f"before {case.name}")
        fault_point(FAULT_POINT, case.name)
        post(case.name)
        differs, us[case.name] = _run(case, tp)
        wrong += [f"{case.name}: {differs}"] if differs else []
    nccl = tp.size > 1 and tp.device_group is not tp.cpu_group
    post("closing")
    tp.close()
    return {
        "wrong": wrong,
        "us": us,
        "backend": "none" if tp.size == 1 else "nccl" if nccl else "gloo",
        "device": tp.device.type,
        "host": socket.gethostname(),
        "versions": {
            "tprt": tprt.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _run(case: Case, tp: TPGroup) -> tuple[str, float]:
    """What is wrong with the result, empty for nothing, and the median in microseconds."""
    own = _values(case, tp.rank, tp.size).to(tp.device)
    expected, wrong, seconds = _expected(case, tp.size), "", []
    for _ in range(ROUNDS):
        x = own.clone()
        _synchronize(tp)
        began = time.perf_counter()
        found = COLLECTIVES[case.collective](x, tp)
        _synchronize(tp)
        seconds.append(time.perf_counter() - began)
        wrong = wrong or _difference(found.cpu(), expected)
    return wrong, round(statistics.median(seconds[1:]) * 1e6, 1)


def _broadcast(x: torch.Tensor, tp: TPGroup) -> torch.Tensor:
    options = BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    tp.device_group.broadcast([x], options).wait()
    return x


COLLECTIVES: dict[str, Callable[[torch.Tensor, TPGroup], torch.Tensor]] = {
    "all_reduce": all_reduce,
    "all_gather": all_gather,
    "broadcast": _broadcast,
    # Records live on the host.
    "record": lambda x, tp: broadcast_record(x.cpu(), tp),
}


def _values(case: Case, rank: int, size: int) -> torch.Tensor:
    """What ``rank`` contributes: whole numbers so mixed that no shift has the same sum."""
    limit = max(2, EXACT[case.dtype] // size)
    mixed = torch.arange(1, case.elements + 1) * (rank + 1) * 2654435761 % 2**32
    values = mixed // 2**11 % limit
    if case.dtype == "int64":
        values = values * 2**32 + rank  # the upper half of the words counts, too
    return values.to(getattr(torch, case.dtype))


def _expected(case: Case, size: int) -> torch.Tensor:
    if case.collective in ("broadcast", "record"):
        return _values(case, 0, size)
    every = (_values(case, rank, size) for rank in range(size))
    if case.collective == "all_gather":
        return torch.stack(list(every))
    return functools.reduce(torch.add, every)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return (
            f"{found.dtype} {list(found.shape)} instead of {expected.dtype} {list(expected.shape)}"
        )
    if torch.equal(found, expected):
        return ""
    places = (found != expected).flatten().nonzero().flatten()
    first = int(places[0])
    values = (t.flatten()[first].item() for t in (found, expected))
    return "element {} is {} instead of {}, {} are wrong".format(first, *values, len(places))


def _synchronize(tp: TPGroup) -> None:
    if tp.device.type == "cuda":
        torch.cuda.synchronize(tp.device)
