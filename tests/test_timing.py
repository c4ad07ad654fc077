"""Where the time of a start goes, and what runs beside it."""

import logging
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import TINY, run_ranks

from tprt import LLM
from tprt.checkpoint import LoadStats
from tprt.kernels import kernels_for, use_kernels
from tprt.llm.timing import StartupTimes, beside, log_startup, seconds_since_start

CPU = torch.device("cpu")


def test_phases_leave_the_rest_to_init():
    times = StartupTimes(imported=2.0)
    with times.phase("load"):
        time.sleep(0.05)
        times.load = LoadStats(read_s=0.5, copy_s=0.25, bytes_read=2_000_000_000)
    for _ in range(2):
        with times.phase("warm-up"):
            time.sleep(0.05)
    with times.phase("init"):  # the builder's own; it is init as all else is
        time.sleep(0.05)
    with pytest.raises(ValueError), times.phase("capture"):
        raise ValueError
    report = times.report()
    phases = report["phases"]
    assert list(phases) == ["import", "init", "read", "copy", "warm-up", "capture"]
    assert (phases["import"], phases["read"], phases["copy"]) == (2.0, 0.5, 0.25)
    assert phases["warm-up"] >= 0.1 > phases["capture"]
    # Reading and copying are inside the load; the whole is import and what passed since.
    assert phases["init"] >= 0.05
    rest = report["total"] - 2.0 - phases["init"] - phases["warm-up"] - phases["capture"]
    assert 0.05 <= rest < 0.3


def test_line_of_a_rank(caplog, monkeypatch):
    class Group:
        rank, size = 0, 1

    times = StartupTimes(imported=None)
    monkeypatch.setattr(times, "report", lambda: {
        "phases": {"init": 0.84, "read": 1.9, "copy": 0.4}, "bytes_read": 18.8e9, "total": 3.1,
    })  # fmt: skip
    with caplog.at_level(logging.INFO, "tprt"):
        assert log_startup(Group(), times) == [times.report()]  # type: ignore[arg-type]
    assert caplog.messages == [
        "rank 0: init 0.8 s, read 1.9 s (9.9 GB/s), copy 0.4 s; 3.1 s in all"
    ]


def test_age_of_a_process():
    """Guards the clock: it counts from before the interpreter started, not from an import."""
    code = (
        "import time; time.sleep(0.5); from tprt.llm.timing import seconds_since_start as age;"
        "first = age(); time.sleep(0.2); print(first, age())"
    )
    began = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    first, second = map(float, out.stdout.split())
    assert 0.5 <= first < second - 0.19
    assert second < time.monotonic() - began + 0.05  # a clock tick or two


def test_age_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_: "1 (a) R")
    assert seconds_since_start() is None


def _lines() -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tprt.llm.timing")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    LLM(str(TINY), dtype="float32").close()
    return lines


def test_rank_0_tells_of_every_rank():
    first, second = run_ranks(_lines, 2)
    assert not second
    assert [line.split(":")[0] for line in first] == ["rank 0", "rank 1"]
    for line in first:
        for phase in ("import", "init", "read", "copy", "warm-up", "capture"):
            assert f" {phase} " in line
        assert "GB/s" in line and line.endswith(" s in all")


# Beside loading


def test_work_and_block_run_at_once():
    """Guards against one after the other: each waits for the other's sign."""
    here, there = threading.Event(), threading.Event()
    waited, chosen = [], []

    def work():
        chosen.append(kernels_for(CPU).name)
        there.set()
        assert here.wait(30)
        time.sleep(0.1)

    times = StartupTimes(None)
    before = threading.active_count()
    with use_kernels("reference"), beside(work, CPU, times.phase("warm-up")):
        assert there.wait(30)
        here.set()
        waited.append(threading.active_count() - before)
    assert waited == [1] and threading.active_count() == before
    assert chosen == ["reference"]  # as the thread that started it has chosen
    assert 0.05 < times.report()["phases"]["warm-up"] < 5


def test_failure_beside_is_a_warning(caplog):
    def work():
        raise RuntimeError("no compiler")

    with caplog.at_level(logging.WARNING, "tprt"), beside(work, CPU):
        pass
    assert caplog.messages == ["kernels could not be compiled ahead: no compiler"]


def test_failure_of_the_block_waits_for_what_is_beside():
    ended = []

    def work():
        time.sleep(0.1)
        ended.append(True)

    with pytest.raises(ValueError), beside(work, CPU):
        raise ValueError
    assert ended


def test_nothing_beside():
    before = threading.active_count()
    with beside(None, CPU):
        assert threading.active_count() == before
