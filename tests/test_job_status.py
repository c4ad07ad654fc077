"""What a job says of itself in its status file, and what can be told of a job from outside."""

import argparse
import errno
import fcntl
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tprt.cli import job
from tprt.distributed.failure import Failure
from tprt.errors import ConfigError
from tprt.job.generate import end_status
from tprt.job.status_file import (
    MAX_BYTES,
    JobStatus,
    StatusFile,
    StatusUpdater,
    read_status,
    status_path,
)
from tprt.job.status_report import describe

ROOT = Path(__file__).resolve().parent.parent
HOLD_LOCK = """
import fcntl, sys, time
journal = open(sys.argv[1], "a")
fcntl.flock(journal, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(600)
"""
KILLED = {
    "kind": "killed", "rank": 1, "host": "node7", "phase": "decode", "step": 812,
    "what": "rank 1 was killed (signal 9)", "where": "", "hint": "look for the OOM killer",
    "code": 6, "stack": ["a", "b"],
}  # fmt: skip


def status(**known) -> JobStatus:
    figures = {"total": 50, "finished": 12, "failed": 3, "running": 8, "tokens": 3456}
    return JobStatus.begin(**({"state": "running", "attempt": 2, "ranks": 4} | figures | known))


def store(output: Path, **known) -> JobStatus:
    said = status(**known)
    StatusFile(status_path(output)).write(said)
    return said


def ended(output: Path, state: str, code: int, **known) -> None:
    StatusUpdater(StatusFile(status_path(output)), status()).end(state, code, **known)


@contextmanager
def owner(output: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the lock of the journal, as a job does."""
    command = [sys.executable, "-c", HOLD_LOCK, f"{output}.journal"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def job_command(*argv) -> int:
    parser = argparse.ArgumentParser()
    command = job.add_parser(parser.add_subparsers())
    command.add_argument("--debug", action="store_true")
    return job.run(parser.parse_args(["job", "status", *map(str, argv)]))


def strict_json(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(autouse=True)
def warnings_reach_caplog(monkeypatch):
    """Also after a test of the program, which keeps its log to itself."""
    monkeypatch.setattr(logging.getLogger("tprt"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("tprt"), "handlers", [logging.NullHandler()])


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out.jsonl"


# --- the file


def test_a_status_comes_back_as_it_was(out):
    said = store(out, error=KILLED, fingerprint={"model": "m", "seed": 3}, eta_s=1.5)
    found = read_status(out)
    assert found is not None and found.updated >= said.updated
    assert found.to_json() | {"updated": 0} == said.to_json() | {"updated": 0}
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl.status.json"]
    raw = strict_json(status_path(out).read_text())
    assert raw["host"] and raw["pid"] == os.getpid() and raw["error"]["stack"] == ["a", "b"]


def test_unknown_fields_are_ignored_and_missing_ones_have_defaults(out, caplog):
    status_path(out).write_text('{"state": "running", "finished": 7, "of_a_later_version": [1]}')
    found = read_status(out)
    assert found == JobStatus(state="running", finished=7) and not caplog.records


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"{", b"null", b"[1]", b'"running"', b"\xff\xfe", b'{"state": "odd"}',
        b'{"finished": 3}', b'{"state": ["running"]}', b"[" * 100_000,
        b'{"state": "running", "total": -1}', b'{"state": "running", "total": 1.5}',
        b'{"state": "running", "total": true}', b'{"state": "running", "total": 1e400}',
        b'{"state": "running", "finished": null}', b'{"state": "running", "eta_s": NaN}',
        b'{"state": "running", "tokens": ' + b"9" * 400 + b"}",
        b'{"state": "running", "tokens": ' + b"9" * 5000 + b"}",
        b'{"state": "running", "updated": 1e300}', b'{"state": "running", "error": "x"}',
        b'{"state": "running", "host": 3}', b'{"state": "running"}' + b" " * MAX_BYTES,
    ],
    ids=lambda data: data[:40],
)  # fmt: skip
def test_a_damaged_status_is_none_with_a_warning(out, damage, caplog):
    status_path(out).write_bytes(damage)
    assert read_status(out) is None
    assert len(caplog.records) == 1 and "is no status of a job" in caplog.text


@pytest.mark.parametrize("cut", range(0, 600, 37))
def test_a_status_that_is_cut_off_is_none(out, cut):
    store(out, error=KILLED)
    data = status_path(out).read_bytes()
    status_path(out).write_bytes(data[: min(cut, len(data) - 3)])
    assert read_status(out) is None


def test_a_folder_or_pipe_in_its_place_is_none(tmp_path):
    status_path(tmp_path / "a").mkdir()
    os.mkfifo(status_path(tmp_path / "b"))
    assert read_status(tmp_path / "a") is None and read_status(tmp_path / "b") is None
    assert read_status(tmp_path / "c") is None


def test_a_reader_never_sees_a_part(out):
    """Not even with an error that makes the new file longer and shorter in turn."""
    file, stop, seen = StatusFile(status_path(out)), threading.Event(), []
    file.write(status())

    def read() -> None:
        while not stop.is_set():
            seen.append(read_status(out))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(300):
        stack = ["frame"] * (400 if number % 2 else 0)
        file.write(status(finished=number, error=KILLED | {"stack": stack}))
    stop.set()
    reader.join()
    assert seen and None not in seen


def test_a_status_is_as_readable_as_any_file(out):
    before = os.umask(0o027)
    try:
        store(out)
    finally:
        os.umask(before)
    assert status_path(out).stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_written_warns_once_and_never_raises(tmp_path, caplog):
    file = StatusFile(tmp_path / "missing" / "out.status.json")
    file.write(status())
    file.write(status(finished=13))
    assert len(caplog.records) == 1 and "No such file or directory" in caplog.text
    (tmp_path / "missing").mkdir()
    file.write(status(state="finished", exit_code=0))  # it tries again
    assert read_status(tmp_path / "missing" / "out") is not None


def test_values_that_json_lacks_do_not_stop_a_job(out, caplog):
    store(out, tokens_per_s=float("nan"), eta_s=float("inf"), fingerprint={"input": out})
    raw = strict_json(status_path(out).read_text())
    assert raw["tokens_per_s"] is None and raw["eta_s"] is None
    assert raw["fingerprint"] == {"input": str(out)}
    StatusFile(status_path(out)).write(status(fingerprint={("a", "b"): 1}))
    assert "keys must be" in caplog.text


def test_the_first_final_state_stays(out):
    file = StatusFile(status_path(out))
    updater = StatusUpdater(file, status())
    file.write(status(state="failed", exit_code=6, error=KILLED))  # as a watch thread does
    updater.update(finished=20)
    updater.enter("writing")
    updater.end("interrupted", 143)
    found = read_status(out)
    assert found is not None and (found.state, found.exit_code) == ("failed", 6)
    assert found.error == KILLED and found.finished == 12
    ended = updater.status
    assert (ended.state, ended.exit_code, ended.finished) == ("interrupted", 143, 20)
    updater.enter("running", finished=21)
    updater.update(finished=22)
    assert updater.status == ended


def test_threads_that_update_do_not_overrule_the_one_that_ends(out):
    updater = StatusUpdater(StatusFile(status_path(out)), status(), every_s=0.0)
    go = threading.Barrier(5)

    def update(first: int) -> None:
        go.wait()
        for number in range(60):
            updater.update(finished=first + number)

    threads = [threading.Thread(target=update, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    go.wait()
    updater.end("failed", 6, error=KILLED)
    for thread in threads:
        thread.join()
    found = read_status(out)
    assert found is not None and (found.state, found.running, found.eta_s) == ("failed", 0, None)
    assert updater.status.is_final
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl.status.json"]


SPEAKS_FOR_RANK_0 = """
import sys
from pathlib import Path
from tprt.job.status_file import StatusFile, StatusUpdater, read_status, status_path
out = Path(sys.argv[1])
updater = StatusUpdater(StatusFile(status_path(out)), read_status(out))
print("ready", flush=True)
sys.stdin.readline()
updater.end("failed", 6, {"what": "x" * int(sys.argv[2])})
"""


def test_several_processes_may_speak_for_a_dead_one_at_once(out):
    store(out)
    before = status_path(out).stat()
    speakers = [
        subprocess.Popen(
            [sys.executable, "-c", SPEAKS_FOR_RANK_0, str(out), str(1000 * n)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        )
        for n in range(4)
    ]  # fmt: skip
    for process in speakers:
        assert process.stdout.readline() == b"ready\n"
    now = status_path(out).stat()
    assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    for process in speakers:
        process.stdin.write(b"go\n")
        process.stdin.flush()
    assert [process.communicate()[1] for process in speakers] == [b""] * 4
    found = read_status(out)
    assert found is not None and (found.state, found.exit_code) == ("failed", 6)
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl.status.json"]


def test_what_a_killed_attempt_left_is_removed(out):
    left, others = ".out.jsonl.status.json.0a1b2c3d.tmp", [".out.jsonl.0a1b2c3d.tmp", ".x.tmp"]
    for name in (left, *others):
        (out.parent / name).touch()
    store(out)
    assert {path.name for path in out.parent.iterdir()} == {*others, "out.jsonl.status.json"}


def test_a_final_state_that_did_not_reach_the_disk_is_tried_again(out, monkeypatch, caplog):
    file = StatusFile(status_path(out))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails_with(errno.EIO))
        file.write(status(state="failed", exit_code=5))
    assert "Input/output error" in caplog.text and read_status(out) is None
    file.write(status(finished=40))
    found = read_status(out)
    assert found is not None and (found.state, found.finished) == ("failed", 12)


def test_the_last_word_finds_room_on_a_full_disk(out, monkeypatch):
    """A second file does not fit beside the first; the blocks of the first are there."""
    file = StatusFile(status_path(out))
    file.write(status(error=KILLED))
    node = status_path(out).stat().st_ino
    monkeypatch.setattr(Path, "replace", fails_with(errno.ENOSPC))
    file.write(status(finished=13))  # an update is not worth the risk of half a file
    assert read_status(out).finished == 12
    file.write(status(state="failed", exit_code=5, error=KILLED | {"stack": ["x"] * 9999}))
    found = read_status(out)
    assert found is not None and (found.state, found.exit_code) == ("failed", 5)
    assert found.error == {k: v for k, v in KILLED.items() if k != "stack"}
    assert status_path(out).stat().st_ino == node and status_path(out).stat().st_size < 4096
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl.status.json"]


ON_A_FULL_DISK = """
import contextlib, sys
from pathlib import Path
from tprt.job.status_file import JobStatus, StatusFile, StatusUpdater, status_path
out = Path(sys.argv[1], "out")
updater = StatusUpdater(StatusFile(status_path(out)), JobStatus.begin(state="running"))
with contextlib.suppress(OSError), open(out, "wb", 0) as file:
    while file.write(bytes(4096)):
        pass
updater.enter("writing")
updater.end("failed", 5, error={"what": "No space left on device", "stack": ["x" * 100] * 100})
print(status_path(out).read_text())
"""


def test_the_last_word_on_a_disk_that_is_really_full(tmp_path):
    own_mounts = ["unshare", "-rm"]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    script = f"""mount -t tmpfs -o size=64k none {shlex.quote(str(tmp_path))} || exit 77
        exec {shlex.quote(sys.executable)} -c {shlex.quote(ON_A_FULL_DISK)} {tmp_path}"""
    command = [*own_mounts, "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no right to mount a small disk")
    assert done.returncode == 0, done.stderr
    said = strict_json(done.stdout)
    assert (said["state"], said["exit_code"]) == ("failed", 5)
    assert said["error"] == {"what": "No space left on device"}


def fails_with(number: int):
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fails


def test_an_interrupt_within_a_write_leaves_no_temporary_file(out, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    file = StatusFile(status_path(out))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            file.write(status())
    assert not list(out.parent.iterdir())
    file.write(status())
    assert read_status(out) is not None


def test_figures_are_written_every_two_seconds_and_states_at_once(out):
    class Counting(StatusFile):
        def write(self, status: JobStatus) -> None:
            written.append(status)

    now, written = [100.0], []
    updater = StatusUpdater(Counting(status_path(out)), status(), clock=lambda: now[0])
    assert len(written) == 1
    for step in range(100):  # ten seconds
        now[0] = 100 + 0.1 * step
        updater.update(finished=step)
    assert [s.finished for s in written[1:]] == [20, 40, 60, 80]
    updater.enter("writing", running=0)
    assert written[-1].state == "writing" and written[-1].finished == 99
    updater.end("finished", 0, output_size=7)
    assert written[-1].output_size == 7 and len(written) == 7


# --- seen from outside


@pytest.mark.parametrize("state", ["loading", "running", "writing"])
def test_a_job_whose_journal_is_locked_runs(out, state, capsys):
    with owner(out) as process:
        store(out, state=state, eta_s=90.0, tokens_per_s=812.3)
        found = describe(out)
        assert found["state"] == state and found["exit_code"] is None and found["percent"] == 24.0
        assert job_command(out) == 0
        assert process.poll() is None
    said = capsys.readouterr().out
    for words in (
        f"{out}: {state}", "12 of 50 (24.0 %), 3 failed, 8 running", "3,456, 812.3 tokens/s",
        "0:01:30", "attempt 2", f"{os.getpid()} on ", "4 ranks", "SIGTERM (kill",
    ):  # fmt: skip
        assert words in said, said


def test_a_job_that_was_killed_is_dead(out, capsys):
    with owner(out) as process:
        store(out, eta_s=90.0)
        assert describe(out)["state"] == "running"
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = describe(out)
    assert found["state"] == "dead" and found["exit_code"] is None
    assert found["running"] == 0 and found["eta_s"] is None and found["finished"] == 12
    assert job_command(out) == 0
    said = capsys.readouterr().out
    assert f"{out}: dead" in said and "kill -9 or a power cut; the same command resumes" in said
    assert "12 of 50" in said and "left" not in said


def test_finished(out, capsys):
    out.write_text("12 bytes ...")
    ended(out, "finished", 0, finished=50, failed=0, output_size=12, output_sha256="ab")
    found = describe(out)
    assert (found["state"], found["meaning"], found["next"]) == ("finished", "all good", "")
    assert found["percent"] == 100 and found["notes"] == []
    assert job_command(out) == 0
    said = capsys.readouterr().out
    assert "0: all good" in said and "12 bytes" in said and "next" not in said
    out.write_text("more than 12 bytes ...")
    assert describe(out)["notes"] == ["the output has changed since"]
    out.unlink()
    assert describe(out)["notes"] == ["the output is no longer there"]


def test_finished_with_failed_records(out, capsys):
    out.touch()
    ended(out, "finished", 4, finished=50, failed=3)
    assert job_command(out) == 0
    said = capsys.readouterr().out
    assert "4: finished with failed records" in said and 'under "error"' in said


def test_interrupted(out, capsys):
    (out.parent / "out.jsonl.journal").touch()
    ended(out, "interrupted", 143)
    assert job_command(out) == 0
    said = capsys.readouterr().out
    assert "interrupted" in said and "143: ended by a signal" in said
    assert "the same command resumes" in said


def test_failed_names_the_first_error(out, capsys):
    ended(out, "failed", 6, error=KILLED | {"what": "killed\x1b[2J\nby signal 9"})
    assert job_command(out) == 0
    said = capsys.readouterr().out
    for words in (
        "6: a rank failed or hung", "killed\\x1b[2J by signal 9",
        "rank 1, host node7, decode step 812", "look for the OOM killer", "resumes",
    ):  # fmt: skip
        assert words in said, said
    assert "\x1b" not in said
    assert describe(out)["error"]["stack"] == ["a", "b"]


def test_an_error_record_of_other_contents_is_shown_as_far_as_it_goes(out, capsys):
    ended(out, "failed", 99, error={"rank": "x", "step": None, "what": ["list"], "phase": 3})
    assert job_command(out) == 0
    said = capsys.readouterr().out
    assert "99: not one of tprt" in said and "['list']" in said


def test_only_a_journal(out, capsys):
    with owner(out):
        found = describe(out)
        assert found["state"] == "running" and found["total"] is None
    found = describe(out)
    assert found["state"] == "dead" and "only the journal" in found["notes"][0]
    status_path(out).write_text("{damaged")
    assert describe(out)["state"] == "dead"
    assert job_command(out) == 0 and job_command("--json", out) == 0
    assert "the same command resumes" in capsys.readouterr().out


def said_before(out: Path, seconds: float) -> None:
    raw = json.loads(status_path(out).read_text())
    status_path(out).write_text(json.dumps(raw | {"updated": time.time() - seconds}))


def test_a_new_attempt_that_has_not_written_yet_runs(out, capsys):
    """Above all the last attempt's process id is not offered to be killed."""
    ended(out, "failed", 6, error=KILLED)
    with owner(out):
        said_before(out, 60)
        found = describe(out)
        assert job_command(out) == 0
    assert found["state"] == "running" and found["exit_code"] is found["error"] is None
    assert found["pid"] is None and str(os.getpid()) not in capsys.readouterr().out
    assert "attempt before" in found["notes"][0] and found["finished"] == 12


def test_a_failure_that_its_launcher_cures_is_not_the_end(out, capsys, monkeypatch):
    """Until the launcher would have done it: it may have been killed meanwhile."""
    ended(out, "failed", 6, error=KILLED, restarts_left=2)
    found = describe(out)
    assert (found["state"], found["exit_code"], found["error"]["rank"]) == ("restarting", 6, 1)
    assert "2 more times" in found["next"]
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            said_before(out, 600)

    monkeypatch.setattr("tprt.cli.job.time.sleep", sleep)
    assert job_command(out, "--watch") == 0
    said = capsys.readouterr().out
    assert said.count("restarting") == len(naps) == 2 and f"{out}: failed" in said


@pytest.mark.parametrize(
    ("kind", "code", "asked", "done", "left"),
    [
        ("killed", 6, 3, 1, 2),
        ("killed", 6, 3, 3, 0),
        ("exception", 2, 3, 0, 0),
        ("launcher", 6, 3, 0, 0),
        ("killed", 6, None, None, 0),
    ],
)
def test_a_failure_says_how_often_the_launcher_may_try_again(
    out, monkeypatch, kind, code, asked, done, left
):
    for name, value in (("TPRT_MAX_RESTARTS", asked), ("TPRT_RESTART_COUNT", done)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))
    updater = StatusUpdater(StatusFile(status_path(out)), status())
    end_status(updater, Failure(kind, 1, "what", code))
    assert json.loads(status_path(out).read_text())["restarts_left"] == left


def test_a_job_that_has_said_its_last_word_is_believed_before_it_lets_go(out):
    with owner(out):
        ended(out, "failed", 6, error=KILLED)
        found = describe(out)
    assert (found["state"], found["exit_code"], found["notes"]) == ("failed", 6, [])
    assert found["pid"] == os.getpid()


def test_a_silent_job_and_one_of_another_host_are_noted(out):
    with owner(out):
        store(out)
        said_before(out, 100)
        assert "said nothing for 0:01:40" in describe(out)["notes"][0]
    store(out, host="node9")
    found = describe(out)
    assert found["state"] == "dead" and "locks of node9" in found["notes"][0]


def test_looking_does_not_disturb_the_lock(out):
    journal = Path(f"{out}.journal")
    journal.touch()
    store(out)
    assert describe(out)["state"] == "dead"
    with journal.open("a") as file:  # nothing is left of the probe
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert describe(out)["state"] == "running"
        with journal.open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the job still has it


def test_a_job_that_starts_between_two_looks_is_not_dead(out, monkeypatch):
    """The probe finds no lock, then the job takes it and writes its status, which is then read."""
    from tprt.job import status_report

    store(out)
    real, calls = status_report._has_owner, []

    def has_owner(journal: Path) -> bool:
        calls.append(journal)
        return len(calls) > 1 or real(journal)

    monkeypatch.setattr(status_report, "_has_owner", has_owner)
    assert describe(out)["state"] == "running" and len(calls) == 2


def test_the_journal_of_a_job_has_this_lock(out):
    from tprt.job.journal import Journal, journal_path

    journal = Journal.open(journal_path(out), {"model": "m"})
    store(out)
    assert describe(out)["state"] == "running"
    journal.close()
    assert describe(out)["state"] == "dead"


def test_the_name_may_be_a_link(tmp_path):
    """A job writes beside the file behind the link."""
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ended(tmp_path / "real", "interrupted", 130)
    assert describe(tmp_path / "link")["state"] == "interrupted"
    with owner(tmp_path / "real"):
        store(tmp_path / "real")
        assert describe(tmp_path / "link")["state"] == "running"
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with pytest.raises(ConfigError):
        describe(tmp_path / "round")


def test_no_such_job_is_code_2(out, tmp_path):
    for path in (out, tmp_path / "missing" / "out", Path("."), Path("/"), tmp_path / ("n" * 300)):
        with pytest.raises(ConfigError) as error:
            job_command(path)
        assert error.value.exit_code == 2
    out.write_text("{}")
    with pytest.raises(ConfigError, match="there is a file of that name, but no job"):
        describe(out)
    status_path(out).write_text("damaged")
    with pytest.raises(ConfigError, match="no status file and no journal"):
        describe(out)
    with pytest.raises(ConfigError, match="no output named"):
        job_command()


def test_json_is_one_object_in_every_state(out, capsys):
    with owner(out):
        for known in ({}, {"eta_s": float("inf"), "tokens_per_s": float("nan")}):
            status_path(out).unlink(missing_ok=True)
            store(out, **known)
            assert job_command(out, "--json") == 0
            strict_json(capsys.readouterr().out)
    for state, code in (("finished", 0), ("failed", 6), ("interrupted", 130)):
        ended(out, state, code, error=KILLED)
        assert job_command(out, "--json") == 0
        said = strict_json(capsys.readouterr().out)
        assert said["state"] == state and said["exit_code"] == code and said["meaning"]
        assert said["error"]["rank"] == 1 and said["fingerprint"] == {}


def test_output_may_come_from_settings(out, tmp_path, capsys):
    ended(out, "interrupted", 130)
    (tmp_path / "x.yaml").write_text(f"job:\n  output: {out}\n")
    assert job_command("--config", tmp_path / "x.yaml") == 0
    assert job_command("--set", f"job.output={out}", "--debug") == 0
    assert capsys.readouterr().out.count("interrupted, resumable") == 2


def test_on_a_terminal_it_says_the_same(out, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    ended(out, "failed", 6, error=KILLED | {"what": "[bold]markup[/bold]\x1b[2J"})
    assert job_command(out) == 0
    plain = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    assert job_command(out) == 0
    assert capsys.readouterr().out.split() == plain.split()
    assert "[bold]markup[/bold]\\x1b[2J" in plain


# --- watching


def test_watch_looks_until_the_job_ends(out, capsys, monkeypatch):
    updater = StatusUpdater(StatusFile(status_path(out)), status())
    naps = []

    with owner(out) as process:

        def sleep(seconds: float) -> None:
            naps.append(seconds)
            if len(naps) == 2:
                updater.end("finished", 0, finished=50)
                process.kill()
                process.wait()

        monkeypatch.setattr("tprt.cli.job.time.sleep", sleep)
        assert job_command(out, "--json", "--watch", 7) == 0
    lines = [strict_json(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["state"] for line in lines] == ["running", "running", "finished"]
    assert naps == [7.0, 7.0]


def test_watch_ends_at_once_for_a_job_that_is_over_and_on_ctrl_c(out, capsys, monkeypatch):
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tprt.cli.job.time.sleep", interrupt)
    with owner(out):
        store(out)
        assert job_command(out, "--watch") == 0
    assert job_command(out, "--watch") == 0  # it does not come to sleep
    said = capsys.readouterr().out
    assert said.count(f"{out}: running") == 1 and said.count(f"{out}: dead") == 1


@pytest.mark.parametrize("seconds", ["0", "nan", "-1", "x", "1e9"])
def test_watch_refuses_odd_intervals(out, seconds, capsys):
    with pytest.raises(SystemExit) as end:
        job_command(out, f"--watch={seconds}")
    assert end.value.code == 2 and "0.1 to 86400" in capsys.readouterr().err


# --- shards


def shard(out: Path, index: int, count: int) -> Path:
    return out.with_name(f"{out.name}.{index}-of-{count}")


def test_shards_are_rows_with_sums(out, capsys):
    ended(shard(out, 0, 4), "finished", 0, finished=50, failed=0, output_size=None)
    shard(out, 0, 4).touch()
    ended(shard(out, 2, 4), "failed", 6, error=KILLED)
    with owner(shard(out, 1, 4)):
        store(shard(out, 1, 4), eta_s=90.0, tokens_per_s=10.0)
        found = describe(out)
        assert job_command(out) == 0
        said = capsys.readouterr().out
        assert job_command(out, "--json") == 0
    assert strict_json(capsys.readouterr().out)["state"] == "running"
    assert [s["state"] for s in found["shards"]] == ["finished", "running", "failed", "not started"]
    assert (found["total"], found["finished"], found["failed"]) == (150, 74, 6)
    assert (found["running"], found["tokens"], found["eta_s"]) == (8, 3 * 3456, 90.0)
    lines = [line.split() for line in said.splitlines()]
    assert ["1/4", "running", "12", "of", "50", "3", "3,456", "10.0", "0:01:30"] in lines
    assert ["3/4", "not", "started"] in lines and lines[6][:6] == "all running 74 of 150 6".split()
    assert "--shard starts or resumes 2/4, 3/4" in said
    assert "rank 1, host node7, decode step 812" in said and "--merge" not in said
    assert describe(out)["state"] == "failed"  # shard 1 has lost its owner, but 2 says why
    assert describe(shard(out, 2, 4))["state"] == "failed"


def test_finished_shards_are_to_be_merged(tmp_path, capsys):
    out = tmp_path / "an out.jsonl"
    for index in range(3):
        shard(out, index, 3).touch()
        ended(shard(out, index, 3), "finished", 0, finished=50)
    found = describe(out)
    assert found["state"] == "finished" and found["percent"] == 100
    assert found["next"] == f"tprt generate --merge --output '{out}'"
    assert job_command(out) == 0 and found["next"] in capsys.readouterr().out
    out.write_text("of before")
    os.utime(out, (1e9, 1e9))
    assert "--merge" in describe(out)["next"]
    out.write_text("merged")
    os.utime(out, (time.time() + 9, time.time() + 9))
    assert describe(out)["next"] == ""


def test_running_shards_are_to_be_waited_for(out):
    with owner(shard(out, 0, 2)), owner(shard(out, 1, 2)):
        found = describe(out)
    assert found["state"] == "running" and "when all are finished" in found["next"]


def test_shards_of_another_count_and_odd_names_are_no_rows(out):
    for name in ("0-of-3", "1-of-3", "1-of-2", "5-of-5", "00-of-0", "0-of-1000000000", "x-of-3"):
        Path(f"{out}.{name}.journal").touch()
    found = describe(out)
    assert [s["shard"] for s in found["shards"]] == ["0/3", "1/3", "2/3"]
    assert [s["state"] for s in found["shards"]] == ["dead", "dead", "not started"]
    assert found["notes"][-1] == "there are also shards of 2, which are not shown"
    assert found["state"] == "dead"


def test_a_damaged_shard_is_a_row_without_figures(out, capsys, caplog):
    with caplog.at_level(logging.WARNING):
        Path(f"{out}.0-of-2.journal").touch()
        status_path(shard(out, 0, 2)).write_text("damaged")
        ended(shard(out, 1, 2), "interrupted", 130)
        assert job_command(out) == 0
    said = capsys.readouterr().out
    assert "0/2    dead" in said and "only the journal" in said and "is no status" in caplog.text
