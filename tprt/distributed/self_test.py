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

import torch

from tprt.distributed.communication import all_gather, all_reduce, gather_json
from tprt.distributed.tp_group import TPGroup, new_device_group
from tprt.errors import TprtError

# Of the all-reduce and of the gather: a row, and the tokens of a step.
ELEMENTS, WORDS = 1024, 64
REPLAYS = 3
PATIENCE = timedelta(seconds=20)  # a communicator's first use takes seconds on many GPUs

# Captures a function without arguments: what replays it, and whether what was replayed is done.
Capture = Callable[[Callable[[], None]], tuple[Callable[[], None], Callable[[], bool]]]


def check_captured_collectives(
    tp: TPGroup, capture: Capture | None = None, patience: timedelta = PATIENCE
) -> tuple[TPGroup, str]:
    """Compare captured all-reduce and all-gather with eager ones. Collective.

    Args:
        capture: how to capture; None makes CUDA graphs.
        patience: for each replay.

    Returns:
        The group to go on with, which has a new communicator where the old one hangs, and why graphs
        must not be used: "" where they may. The same on every rank.
    """
    test = _SelfTest(tp, patience)
    # Ranks agree after each part, over the host's group: one that stopped alone would leave the others
    # in a collective.
    parts = [partial(test.capture, capture or _cuda_capture(tp))]
    parts += [partial(test.compare, round_) for round_ in range(1, REPLAYS + 1)]
    for part in parts:
        everyone = gather_json(part(), tp)
        found = [f"rank {rank}: {why}" for rank, (why, _) in enumerate(everyone) if why]
        if any(hangs for _, hangs in everyone):
            tp.abort()
            tp = replace(tp, device_group=new_device_group(tp, "after-self-test"))
        if found:
            return tp, found[0]
    return tp, ""


class _SelfTest:
    """Each part says what is wrong on this rank, "" for nothing, and whether the communicator hangs."""

    def __init__(self, tp: TPGroup, patience: timedelta) -> None:
        self.tp, self.patience = tp, patience
        self.source = torch.zeros(1, ELEMENTS, device=tp.device)
        self.words = torch.zeros(WORDS, dtype=torch.int64, device=tp.device)
        self.summed = torch.zeros_like(self.source)
        self.gathered = torch.zeros(tp.size, WORDS, dtype=torch.int64, device=tp.device)

    def step(self) -> None:
        self.summed.copy_(all_reduce(self.source.clone(), self.tp))
        self.gathered.copy_(all_gather(self.words, self.tp))

    def capture(self, capture: Capture) -> tuple[str, bool]:
        try:
            self.step()  # the communicator is made by its first use, which no graph can hold
            self.replay, self.done = capture(self.step)
        except (RuntimeError, TprtError) as error:
            return f"collectives cannot be captured: {str(error).splitlines()[0]}", True
        return "", False

    def compare(self, round_: int) -> tuple[str, bool]:
        # Whole numbers: a sum in any order has the same bits.
        values = torch.arange(ELEMENTS, dtype=torch.float32) % 251 + 1000 * round_ + self.tp.rank
        self.source.copy_(values)
        self.words.copy_(values[:WORDS] * 2**40)
        self.step()
        eager = self.summed.clone(), self.gathered.clone()
        for found in (self.summed, self.gathered):
            found.fill_(-1)
        self.replay()
        began = time.monotonic()
        while not self.done():
            if time.monotonic() - began > self.patience.total_seconds():
                limit = self.patience.total_seconds()
                return f"a captured collective did not end within {limit:g} s", True
            time.sleep(1e-4)
        results = {"all-reduce": self.summed, "all-gather": self.gathered}
        for (name, found), expected in zip(results.items(), eager, strict=True):
            if not torch.equal(found, expected):
                return f"a captured {name} differs from the eager one", False
        return "", False


def _cuda_capture(tp: TPGroup) -> Capture:
    def capture(step: Callable[[], None]) -> tuple[Callable[[], None], Callable[[], bool]]:
        stream = torch.cuda.Stream(tp.device)  # type: ignore[no-untyped-call]
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(tp.device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            step()  # warm on the stream that captures
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
        torch.cuda.current_stream(tp.device).wait_stream(stream)

        def replay() -> None:
            with torch.cuda.device(tp.device):
                graph.replay()
                event.record()

        return replay, event.query

    return capture
