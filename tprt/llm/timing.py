"""Where the time of a start goes, by rank, and what is done beside the loading of weights.

Knows processes, clocks and ranks; no models and no kernels.
"""

import contextvars
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from tprt.checkpoint import LoadStats
from tprt.distributed.communication import gather_json
from tprt.distributed.tp_group import TPGroup
from tprt.log import get_logger

logger = get_logger(__name__)


def seconds_since_start() -> float | None:
    """The age of this process, the interpreter's own start included; None where unknown."""
    try:
        # The name of the program stands in parentheses, and may hold anything.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return age if age >= 0 else None


class StartupTimes:
    """Seconds this rank's start takes, from the moment this is made.

    Phases in the report:
        import: from the start of the process until the library was imported; what a caller did
            between then and making an ``LLM`` counts nowhere.
        init: all that is in no other phase: opening the checkpoint, ranks that meet, the model.
        read, copy: see ``LoadStats``; they overlap, so phases may add up to more than the whole.
        warm-up, capture: of the engine; waiting for kernels that were still being compiled when the
            weights were there is warm-up.

    Args:
        imported: ``seconds_since_start`` when the library was imported.
    """

    def __init__(self, imported: float | None) -> None:
        self.imported = imported
        self.load: LoadStats | None = None
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time spent inside counts for ``name``, each time more. Phases do not nest."""
        began = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - began
            self._seconds[name] = self._seconds.get(name, 0.0) + elapsed

    def report(self) -> dict[str, Any]:
        """Phases in the order in which they begin, bytes, and the whole until now. JSON-able."""
        lasted = time.perf_counter() - self._began
        told = {name: s for name, s in self._seconds.items() if name != "init"}
        phases: dict[str, float] = {}
        if self.imported is not None:
            phases["import"] = self.imported
        phases["init"] = lasted - sum(told.values())
        if self.load is not None:
            phases |= {"read": self.load.read_s, "copy": self.load.copy_s}
        phases |= {name: s for name, s in told.items() if name != "load"}
        return {
            "phases": phases,
            "bytes_read": 0 if self.load is None else self.load.bytes_read,
            "total": lasted + (self.imported or 0.0),
        }


def log_startup(tp: TPGroup, times: StartupTimes) -> list[dict[str, Any]]:
    """One line per rank, from rank 0; the reports of all ranks. Collective."""
    everyone = gather_json(times.report(), tp)
    if tp.rank == 0:
        for rank, report in enumerate(everyone):
            logger.info("rank %d: %s", rank, _in_words(report))
    return everyone


def _in_words(report: dict[str, Any]) -> str:
    shown = []
    for name, seconds in report["phases"].items():
        rate = ""
        if name == "read" and seconds > 0:
            rate = f" ({report['bytes_read'] / seconds / 1e9:.1f} GB/s)"
        shown.append(f"{name} {seconds:.1f} s{rate}")
    return f"{', '.join(shown)}; {report['total']:.1f} s in all"


@contextmanager
def beside(
    work: Callable[[], None] | None,
    device: torch.device,
    waiting: AbstractContextManager[object] | None = None,
) -> Iterator[None]:
    """Run ``work`` in a thread of its own while the block runs; both have ended afterwards.

    What it raises is logged, no more: it only does early what will be done again where it is needed.

    Args:
        work: None: there is nothing to do.
        device: current in that thread, where it is a GPU.
        waiting: entered while the block is over and ``work`` is not.
    """
    if work is None:
        yield
        return
    # Kernels are chosen by a context variable, and a thread begins with none.
    context = contextvars.copy_context()

    def run() -> None:
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                context.run(work)
        except Exception as error:
            logger.warning("kernels could not be compiled ahead: %s", error)

    thread = threading.Thread(target=run, name="tprt-beside")
    thread.start()
    try:
        yield
    finally:
        with waiting or nullcontext():
            thread.join()
