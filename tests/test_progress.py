"""What a running job shows: bar, lines or JSON, the time left, the table at the end, and the log."""

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tprt import log
from tprt.job.progress import JobProgress
from tprt.job.status_file import JobStatus, StatusFile, StatusUpdater, read_status, status_path
from tprt.job.summary import (
    JobSummary,
    ReplicaShare,
    json_line,
    one_line,
    print_summary,
    summary_rows,
)

ROOT = Path(__file__).resolve().parent.parent
BUFFERED = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
SUMMARY = JobSummary(
    records=50,
    failed=3,
    new_tokens=3000,
    output=Path("out.jsonl"),
    seconds_generating=4.0,
    seconds_loading=1.5,
    seconds_writing=0.25,
    prompt_tokens=1234,
    resumed=20,
    retried=2,
    quarantined=1,
    output_bytes=98765,
    replicas=(ReplicaShare(0, 18, 2000), ReplicaShare(1, 12, 1000)),
)


class Clock:
    """Seconds that pass when they are told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def program_log(monkeypatch):
    """The package logger, as it was afterwards."""
    logger = logging.getLogger("tprt")
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    level = logger.level
    yield logger
    logger.setLevel(level)


def said_lines(capsys) -> list[str]:
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()


# --- lines


def test_a_line_after_two_seconds_and_then_every_five(capsys, clock):
    with JobProgress(1000, clock=clock) as progress:
        for quarter in range(80):
            clock.now = 1000 + quarter / 4
            progress.update(quarter, failed=2, running=64, tokens=10 * quarter)
    lines = said_lines(capsys)
    assert [line.split("/")[0] for line in lines] == ["8", "28", "48", "68", "79"]
    assert lines[1] == (
        "28/1000 records (2.8 %), 2 failed, 64 running; 280 tokens, 40 tokens/s, 0:04:03 left"
    )


def test_a_short_job_says_nothing(capsys, clock):
    with JobProgress(4, clock=clock) as progress:
        for n in range(5):
            clock.now += 0.3
            progress.update(n, tokens=n)
    assert said_lines(capsys) == []


def test_empty_jobs_have_no_share(capsys, clock):
    with JobProgress(0, clock=clock) as progress:
        clock.now += 3
        progress.update(0)
    assert said_lines(capsys) == ["0/0 records, 0 failed, 0 running; 0 tokens, 0 tokens/s"]


def test_json_lines(capsys, clock):
    with JobProgress(100, 40, resumed_tokens=400, log_format="json", clock=clock) as progress:
        progress.update(40, running=8, tokens=400)
        clock.now += 4
        progress.update(50, failed=1, running=8, tokens=500)
        clock.now += 4
        progress.update(60, failed=1, running=8, tokens=600)
    first, last = map(json.loads, said_lines(capsys))
    assert list(first) == [
        "time", "event", "finished", "failed", "running", "total", "tokens", "tokens_per_s", "eta_s",
    ]  # fmt: skip
    assert datetime.fromisoformat(first["time"]).utcoffset() is not None
    assert (first["event"], first["finished"], first["total"]) == ("progress", 50, 100)
    assert (first["failed"], first["running"], first["tokens"]) == (1, 8, 500)
    assert (first["tokens_per_s"], first["eta_s"]) == (25.0, 20.0)
    assert (last["finished"], last["eta_s"]) == (60, 16.0)


# --- arithmetic


def test_work_of_earlier_attempts_counts_for_no_rate(clock):
    progress = JobProgress(1000, 900, resumed_tokens=90_000, clock=clock)
    clock.now += 10
    progress.update(910, tokens=91_000)
    assert progress.tokens_per_s == 100 and progress.eta_s == 90


def test_the_time_left_is_unknown_before_a_record_is_finished(clock):
    progress = JobProgress(1000, 900, clock=clock)
    assert progress.eta_s is None and progress.tokens_per_s == 0
    clock.now += 10
    progress.update(900, running=64, tokens=50)
    assert progress.eta_s is None and progress.tokens_per_s == 5


def test_the_first_sample_is_taken_where_generation_begins(clock):
    progress = JobProgress(100, clock=clock)
    clock.now += 3600  # loading
    with progress:
        clock.now += 10
        progress.update(10, tokens=100)
        assert progress.tokens_per_s == 10 and progress.eta_s == 90


def test_rates_are_of_the_recent_past(clock):
    """An hour at 10 tokens/s and a record per second, then an hour at ten times that."""
    progress = JobProgress(100_000, clock=clock)
    finished = tokens = 0
    for speed in (1, 10):
        for _ in range(3600):
            clock.now += 1
            finished, tokens = finished + speed, tokens + 10 * speed
            progress.update(finished, tokens=tokens)
        assert progress.tokens_per_s == 10 * speed
        assert progress.eta_s == (100_000 - finished) / speed
    for _ in range(15):
        clock.now += 1
        progress.update(finished, tokens=tokens)
    assert progress.tokens_per_s == 50  # half of the last 30 s
    assert progress.eta_s == pytest.approx((100_000 - finished) / (10 * 285 / 300))
    assert len(progress._samples) <= 302


def test_records_longer_than_the_recent_past_still_give_a_time(clock):
    progress = JobProgress(10, clock=clock)
    for minute in range(1, 50):
        clock.now += 60
        progress.update(minute // 20, running=1, tokens=100 * minute)
    assert progress.eta_s == pytest.approx(8 * 49 * 60 / 2)


def test_a_job_that_is_through_has_no_time_left(clock):
    progress = JobProgress(10, clock=clock)
    clock.now += 1
    progress.update(10)
    assert progress.eta_s == 0


def test_the_status_has_the_same_figures(tmp_path, clock):
    out = tmp_path / "out"
    updater = StatusUpdater(
        StatusFile(status_path(out)), JobStatus.begin(state="running", resumed=40), clock=clock
    )
    with JobProgress(100, 40, status=updater, clock=clock) as progress:
        clock.now += 4
        progress.update(50, failed=1, running=8, tokens=100)
        found = read_status(out)
        assert found is not None and (found.finished, found.failed, found.running) == (50, 1, 8)
        assert (found.total, found.resumed, found.tokens) == (100, 40, 100)
        assert (found.tokens_per_s, found.eta_s) == (25.0, 20.0)
        clock.now += 1
        progress.update(55, tokens=150)
        assert read_status(out).finished == 50
    clock.now += 2
    updater.enter("writing")
    assert read_status(out).finished == 55


# --- whoever reads stderr may be gone


class Broken(io.StringIO):
    def write(self, _):
        raise BrokenPipeError


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [Broken, closed, lambda: None])
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_progress_survives_a_closed_stderr(stream, log_format, monkeypatch, clock, capsys):
    monkeypatch.setattr("sys.stderr", stream())
    with JobProgress(4, log_format=log_format, clock=clock) as progress:
        clock.now += 10
        progress.update(1, tokens=30)
        clock.now += 10
        progress.update(2, tokens=60)
    assert progress.finished == 2 and capsys.readouterr().out == ""


class Terminal(io.StringIO):
    """One that stops taking what is written, as a terminal does that somebody made non-blocking."""

    is_full = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.is_full:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return super().write(text)


def test_a_terminal_that_takes_nothing_takes_only_the_bar(monkeypatch, clock):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with JobProgress(4, clock=clock) as progress:
        assert sys.stderr is not terminal  # the log goes above the bar
        assert "0/4" in terminal.getvalue()
        terminal.is_full = True
        clock.now += 1
        progress.update(1, tokens=30)
        assert sys.stderr is terminal
        terminal.is_full = False
        clock.now += 5
        progress.update(2, tokens=60)
        assert "2/4 records (50.0 %)" in terminal.getvalue()
    assert sys.stderr is terminal


ON_A_TERMINAL = """
import logging, sys, time
from tprt.job.progress import JobProgress
from tprt.log import get_logger, setup_cli_logging
setup_cli_logging("info", sys.argv[1])
stderr, now = sys.stderr, [0.0]
with JobProgress(200, 50, resumed_tokens=500, log_format=sys.argv[1], clock=lambda: now[0]) as progress:
    for n in range(50, 201):
        now[0] += 0.3
        progress.update(n, failed=n // 100, running=7, tokens=10 * n)
        if n == 100:
            get_logger("tprt.x").warning("a warning meanwhile")
            print("ready", flush=True)
            sys.stdin.readline()
assert sys.stderr is stderr
get_logger("tprt.x").warning("after the bar")
print("done")
"""


def on_a_terminal(log_format: str, hang_up: bool = False, term: str = "xterm") -> str:
    """What the program above shows on a terminal that may go away in its midst."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, log_format],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        cwd=ROOT,
        env=BUFFERED | {"TERM": term, "COLUMNS": "100", "NO_COLOR": "1"},
    )
    os.close(theirs)
    shown = bytearray()

    def read() -> None:
        try:
            while data := os.read(ours, 4096):
                shown.extend(data)
        except OSError:  # the other end is closed
            pass

    if hang_up:
        assert process.stdout.readline() == "ready\n"
        os.close(ours)
        out, _ = process.communicate("go\n", timeout=60)
        assert out == "done\n"
    else:
        reader = threading.Thread(target=read)
        reader.start()
        out, _ = process.communicate("go\n", timeout=60)
        reader.join()
        os.close(ours)
        assert out == "ready\ndone\n"
    assert process.returncode == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_a_bar_on_a_terminal_with_the_log_above():
    shown = on_a_terminal("text")
    frames = [frame for frame in re.split("[\r\n]+", shown) if "generate" in frame]
    assert len(frames) > 50 and all("failed" in f or "running" in f for f in frames[2:-2])
    assert re.search(r"generate .*50% 100/200 33 tok/s, 0:00:31 left, 7 running, 1 failed", shown)
    for words in ("a warning meanwhile", "after the bar"):
        line = next(line for line in re.split("[\r\n]+", shown) if words in line)
        assert "generate" not in line


def test_a_terminal_that_goes_away_takes_only_the_bar():
    on_a_terminal("text", hang_up=True)
    on_a_terminal("json", hang_up=True)


def test_json_is_no_bar_on_a_terminal_either():
    lines = [json.loads(line) for line in on_a_terminal("json").splitlines()]
    assert [line["message"] for line in lines if "message" in line][1:] == ["after the bar"]
    assert sum(line.get("event") == "progress" for line in lines) > 5


def test_no_bar_on_a_dumb_terminal():
    shown = on_a_terminal("text", term="dumb")
    assert "generate" not in shown and "/200 records (" in shown


# --- the end


def test_one_line_of_summary():
    assert one_line(SUMMARY) == (
        "50 records, 3 failed; 3000 tokens in 4.00 s, 750.0 tokens/s -> out.jsonl"
    )
    nothing = JobSummary(0, 0, 0, Path("out"), 0.0)
    assert one_line(nothing) == "0 records, 0 failed; 0 tokens in 0.00 s, 0.0 tokens/s -> out"


def test_the_table_ends_in_the_line(capsys):
    print_summary(SUMMARY)
    *table, last = capsys.readouterr().out.splitlines()
    assert last == one_line(SUMMARY)
    rows = dict(re.split(" {2,}", line, maxsplit=1) for line in table)
    assert rows == {
        "records": "50",
        "failed": "3",
        "done by earlier attempts": "20",
        "retried alone": "2",
        "quarantined": "1",
        "prompt tokens": "1,234",
        "new tokens": "3,000",
        "tokens/s": "750.0",
        "loading": "1.50 s",
        "generating": "4.00 s",
        "writing": "0.25 s",
        "replica 0": "18 records, 2,000 tokens (67 %)",
        "replica 1": "12 records, 1,000 tokens (33 %)",
        "output": "out.jsonl (98,765 bytes)",
    }
    assert len({len(line) - len(line.split("  ", 1)[1].lstrip()) for line in table}) == 1


def test_what_did_not_happen_is_no_row():
    rows = dict(summary_rows(JobSummary(5, 0, 7, Path("o"), 3725.0, replicas=SUMMARY.replicas[:1])))
    assert not {"retried alone", "quarantined", "done by earlier attempts", "replica 0"} & set(rows)
    assert rows["failed"] == "0" and rows["generating"] == "1:02:05"


def test_the_table_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    print_summary(SUMMARY)
    *table, last = capsys.readouterr().out.splitlines()
    assert last == one_line(SUMMARY)
    cells = [[cell.strip() for cell in re.split("[│|]", line)[1:-1]] for line in table]
    assert ["prompt tokens", "1,234"] in cells and ["replica 1", rows_of("replica 1")] in cells


def rows_of(name: str) -> str:
    return dict(summary_rows(SUMMARY))[name]


def test_the_summary_as_json(capsys):
    print_summary(SUMMARY, "json")
    (line,) = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    assert said.keys() == json.loads(json_line(SUMMARY)).keys()
    assert said["event"] == "summary" and datetime.fromisoformat(said["time"]).tzinfo
    assert (said["records"], said["failed"], said["quarantined"]) == (50, 3, 1)
    assert said["output"] == "out.jsonl" and said["tokens_per_s"] == 750.0
    assert said["replicas"][1] == {"replica": 1, "records": 12, "tokens": 1000}


SUMMARY_TO_NOBODY = """
import sys
from pathlib import Path
from tprt.job.summary import JobSummary, print_summary
from tprt.log import setup_cli_logging
setup_cli_logging()
sys.stdin.readline()
print_summary(JobSummary(1, 0, 1, Path("o"), 1.0), sys.argv[1])
"""


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("stdout", ["closed pipe", "/dev/full", "none"])
def test_a_summary_that_nobody_reads_changes_no_exit_code(stdout, log_format):
    """What stays in stdout's buffer would fail once more when Python ends, with code 120."""
    command = [sys.executable, "-c", SUMMARY_TO_NOBODY, log_format]
    if stdout == "none":
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=full if stdout == "/dev/full" else subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=BUFFERED,
            cwd=ROOT,
        )
    if process.stdout is not None:
        process.stdout.close()
    process.stdin.write(b"go\n")
    process.stdin.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0


# --- the log


def test_the_log_as_json(capsys, monkeypatch, program_log):
    monkeypatch.setenv("RANK", "1")
    log.setup_cli_logging("info", "json")
    logger = log.get_logger("tprt.x")
    logger.info("rank 0 says such things")
    logger.warning("%d lines\nand \ud800 and \x1b", 2)
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("it failed")
    first, second = map(json.loads, said_lines(capsys))
    assert list(first) == ["time", "level", "rank", "logger", "message"]
    assert (first["level"], first["rank"], first["logger"]) == ("warning", 1, "tprt.x")
    assert first["message"] == "2 lines\nand \ud800 and \x1b"
    age = datetime.now().astimezone() - datetime.fromisoformat(first["time"])
    assert timedelta(0) <= age + timedelta(milliseconds=1) < timedelta(minutes=5)
    assert second["level"] == "error" and second["traceback"].endswith("ValueError: why")


def test_the_log_as_text(capsys, monkeypatch, program_log):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    log.setup_cli_logging()
    log.get_logger("tprt.x").info("hello")
    log.get_logger("tprt.x").debug("not this")
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[rank 0\] hello\n", capsys.readouterr().err)


def test_the_log_goes_where_stderr_is_now(capsys, monkeypatch, program_log):
    """As a progress bar puts itself in the place of stderr."""
    log.setup_cli_logging()
    other = io.StringIO()
    monkeypatch.setattr("sys.stderr", other)
    log.get_logger("tprt.x").info("hello")
    assert "hello" in other.getvalue() and capsys.readouterr().err == ""
    for gone in (Broken(), closed(), None):
        monkeypatch.setattr("sys.stderr", gone)
        log.get_logger("tprt.x").warning("nobody hears")
