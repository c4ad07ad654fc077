"""Whether collectives give the same in a CUDA graph as outside one, found out before they are needed.

What a driver, a NCCL version or a link does inside a graph is not for us to know in advance: two small
collectives are captured and replayed at start, and where they differ or never end the engine runs
without graphs, and says why.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Protocol

import torch

from tprt.distributed.capture import capture_graph
from tprt.distributed.communication import all_gather, all_reduce, gather_json
from tprt.distributed.tp_group import TPGroup, new_device_group

# Of the all-reduce and of the gather: a row, and the tokens of a step.
ELEMENTS, WORDS = 1024, 64
REPLAYS = 3
PATIENCE = timedelta(seconds=20)  # a communicator's first use takes seconds on many GPUs

Done = Callable[[], bool]


class Device(Protocol):
    """What the test needs of a device; a CPU in tests stands for one that misbehaves."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """What replays ``step``."""
        ...

    def mark(self) -> Done:
        """Whether all that has been queued until now is done."""
        ...


def check_captured_collectives(
    tp: TPGroup, device: Device | None = None, patience: timedelta = PATIENCE
) -> tuple[TPGroup, str]:
    """Compare captured all-reduce and all-gather with eager ones. Collective; ``tp.device`` is current.

    Args:
        device: how to capture; None makes CUDA graphs.
        patience: for each round, launched and replayed.

    Returns:
        The group to go on with, which has a new communicator where the old one hangs, and why graphs
        must not be used: "" where they may. The same on every rank.
    """
    test = _SelfTest(tp, device or _CudaDevice(tp), patience)
    # Ranks agree after each part, over the host's group: one that stopped alone would leave the others
    # in a collective.
    parts: list[Callable[[], None]] = [test.warm_up, test.capture]
    parts += [partial(test.compare, round_) for round_ in range(1, REPLAYS + 1)]
    for part in parts:
        everyone = gather_json(_outcome(part), tp)
        found = [f"rank {rank}: {why}" for rank, (why, _) in enumerate(everyone) if why]
        if any(hangs for _, hangs in everyone):
            tp.abort()
            tp = replace(tp, device_group=new_device_group(tp, "after-self-test"))
        if found:
            return tp, found[0]
    return tp, ""


class _Differs(Exception):
    """A captured collective gave something else than the eager one."""


def _outcome(part: Callable[[], None]) -> tuple[str, bool]:
    """What is wrong on this rank, "" for nothing, and whether the communicator may hang."""
    try:
        part()
    except _Differs as error:
        return str(error), False
    except Exception as error:  # a rank that left here alone would leave the others waiting
        return str(error).splitlines()[0] if str(error) else type(error).__name__, True
    return "", False


class _SelfTest:
    def __init__(self, tp: TPGroup, device: Device, patience: timedelta) -> None:
        self.tp, self.device, self.patience = tp, device, patience.total_seconds()
        self.source = torch.zeros(1, ELEMENTS, device=tp.device)
        self.words = torch.zeros(WORDS, dtype=torch.int64, device=tp.device)
        self.summed = torch.zeros_like(self.source)
        self.gathered = torch.zeros(tp.size, WORDS, dtype=torch.int64, device=tp.device)

    def step(self) -> None:
        self.summed.copy_(all_reduce(self.source.clone(), self.tp))
        self.gathered.copy_(all_gather(self.words, self.tp))

    def warm_up(self) -> None:
        """The communicator is made by its first use, which no graph can hold."""
        self.step()
        self._wait("a collective")

    def capture(self) -> None:
        try:
            self.replay = self.device.capture(self.step)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RuntimeError(f"collectives cannot be captured: {reason}") from error
        self._wait("a collective")

    def compare(self, round_: int) -> None:
        # Whole numbers: a sum in any order has the same bits.
        values = torch.arange(ELEMENTS, dtype=torch.float32) % 251 + 1000 * round_ + self.tp.rank
        self.source.copy_(values)
        self.words.copy_(values[:WORDS] * 2**40)
        self.step()
        self._wait("a collective")
        eager = self.summed.clone(), self.gathered.clone()
        for found in (self.summed, self.gathered):
            found.fill_(-1)
        self.replay()
        self._wait("a captured collective")
        results = {"all-reduce": self.summed, "all-gather": self.gathered}
        for (name, found), expected in zip(results.items(), eager, strict=True):
            if not torch.equal(found, expected):
                raise _Differs(f"a captured {name} differs from the eager one")

    def _wait(self, what: str) -> None:
        """Nothing may be read before this: reading waits without a limit."""
        done, began = self.device.mark(), time.monotonic()
        while not done():
            if time.monotonic() - began > self.patience:
                raise TimeoutError(f"{what} did not end within {self.patience:g} s")
            time.sleep(1e-4)


class _CudaDevice:
    def __init__(self, tp: TPGroup) -> None:
        self.device = tp.device
        self.stream = torch.cuda.Stream(tp.device)  # type: ignore[no-untyped-call]

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step()  # warm on the stream that captures
        graph = capture_graph(step, self.stream)
        current.wait_stream(self.stream)
        return graph.replay

    def mark(self) -> Done:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event.query
