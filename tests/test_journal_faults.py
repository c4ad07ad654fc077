"""The journal on slow, full and failing disks and under kills, and how much memory it takes."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from journals import assert_whole, contents, finish, opened, result, run

from tprt.errors import OutputError
from tprt.job import append_file
from tprt.job.journal import Journal, journal_path


@pytest.fixture
def path(tmp_path) -> Path:
    return journal_path(tmp_path / "out")


# ---------------------------------------------------------------- durable


def test_records_become_durable_by_themselves(path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), real(fd)))
    journal = opened(path)
    finish(journal, 1)
    until = time.monotonic() + 30
    while not synced or synced[-1] < path.stat().st_size:
        assert time.monotonic() < until, "half a second after the record"
        time.sleep(0.01)
    monkeypatch.setattr(append_file, "SYNC_SECONDS", 3600.0)
    finish(journal, *range(2, 2 + append_file.SYNC_RECORDS - 1))
    count = len(synced)
    time.sleep(0.2)
    assert len(synced) == count, "one record is missing for a group"
    finish(journal, 1000)
    while len(synced) == count:
        assert time.monotonic() < until, "a group is durable at once"
        time.sleep(0.01)
    journal.close()


def test_begin_is_written_and_not_synced(path, monkeypatch):
    journal = opened(path)
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    journal.begin([1, 2, 3])
    assert b'begin {"lines": [1, 2, 3], "alone": false}' in path.read_bytes()
    time.sleep(append_file.SYNC_SECONDS + 0.2)
    assert synced == []
    journal.sync()
    assert len(synced) == 1
    journal.close()
    assert len(synced) == 1, "all was durable"


def test_a_slow_disk_stops_neither_records_nor_the_failure_path(path, monkeypatch):
    journal = opened(path)
    stuck, real = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (stuck.wait(60), real(fd)))
    finish(journal, *range(1, 300))
    journal.end("crash", "a rank stalled")
    began = time.monotonic()
    with pytest.raises(OutputError, match=r"did not take the journal within 0\.3 s"):
        journal.sync(timeout=0.3)
    assert time.monotonic() - began < 10
    stuck.set()
    journal.sync()
    journal.close()


def test_a_stuck_write_does_not_stop_the_failure_path(path, monkeypatch):
    """The main thread hangs in the kernel with the file's lock; the watch thread wants to end."""
    journal = opened(path)
    stuck, inside, real = threading.Event(), threading.Event(), os.pwrite
    monkeypatch.setattr("tprt.job.journal.END_TIMEOUT", 0.2)
    monkeypatch.setattr(os, "pwrite", lambda *args: (inside.set(), stuck.wait(60), real(*args))[2])
    writer = threading.Thread(target=finish, args=(journal, 1))
    writer.start()
    assert inside.wait(30)
    for call in (lambda: journal.end("crash", "x"), lambda: journal.sync(0.2)):
        with pytest.raises(OutputError, match=r"within 0\.2 s"):
            call()
    stuck.set()
    writer.join()
    assert list(contents(journal)) == [1]
    journal.close()


def test_threads_may_finish_and_sync_at_once(path):
    journal = opened(path)
    with contextlib.ExitStack() as stack:
        for start in range(4):
            lines = range(start + 1, 401, 4)
            thread = threading.Thread(target=finish, args=(journal, *lines))
            thread.start()
            stack.callback(thread.join)
        for _ in range(20):
            journal.sync()
    assert contents(journal) == {line: result(line) for line in range(1, 401)}
    journal.close()
    assert_whole(path)


# ---------------------------------------------------------------- failing disks


def fails(number: int, after: int = 0):
    """A ``pwrite`` that takes ``after`` bytes and then fails."""
    real = os.pwrite

    def pwrite(fd, data, offset):
        nonlocal after
        if after <= 0:
            raise OSError(number, os.strerror(number))
        written = real(fd, data[:after], offset)
        after -= written
        return written

    return pwrite


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO]
)
def test_a_failed_write_loses_nothing_that_was_written(path, monkeypatch, number):
    journal = opened(path)
    finish(journal, 1)
    size = path.stat().st_size
    monkeypatch.setattr(os, "pwrite", fails(number, after=17))
    with pytest.raises(OutputError, match=os.strerror(number)) as caught:
        finish(journal, 2)
    assert caught.value.exit_code == 5 and str(path) in caught.value.where and caught.value.hint
    assert path.stat().st_size == size, "the torn line is cut off"
    monkeypatch.undo()
    for call in (
        lambda: finish(journal, 3),
        lambda: journal.begin([4]),
        journal.sync,
        journal.close,
    ):
        with pytest.raises(OutputError, match=os.strerror(number)):
            call()
    journal = opened(path)
    assert list(contents(journal)) == [1]
    journal.close()


def test_the_end_is_noted_even_after_a_failed_write(path, monkeypatch):
    """A full disk is no fault of the records in flight; an end that says so is short and may fit."""
    journal = opened(path)
    journal.begin([1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails(errno.ENOSPC, after=17))
        with pytest.raises(OutputError):
            finish(journal, 1)
    journal.end("interrupted", "the disk is full")
    with pytest.raises(OutputError):
        journal.close()
    journal = opened(path)
    assert journal.suspects == []
    journal.close()


def test_a_torn_line_that_cannot_be_cut_off_is_the_last(path, monkeypatch):
    journal = opened(path)
    finish(journal, 1)

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails(errno.ENOSPC, after=17))
        patch.setattr(os, "ftruncate", refuse)
        for call in (
            lambda: finish(journal, 2),
            lambda: journal.end("interrupted", "x"),
            journal.close,
        ):
            with pytest.raises(OutputError):
                call()
    journal = opened(path)
    assert list(contents(journal)) == [1] and journal.attempt == 2
    journal.close()


@pytest.mark.parametrize("written", [40, 10_000])
def test_an_interrupt_within_a_write_leaves_a_journal_that_goes_on(path, monkeypatch, written):
    """Handlers of signals raise between any two operations, here when half a line is written, or all."""
    journal = opened(path)
    real = os.pwrite

    def interrupted(fd, data, offset):
        real(fd, data[:written], offset)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish(journal, 3)
    assert contents(journal) == {}, "nobody was told that it is done"
    journal.finish(1, "{}", 0, False)  # a shorter line than that one
    journal.end("interrupted", "SIGINT")
    assert contents(journal) == {1: "{}"}
    journal.close()
    assert_whole(path)


def test_a_failed_sync_is_told_and_stays_told(path, monkeypatch):
    """After a failed fsync the kernel calls the lost pages clean: a second one would succeed."""
    journal = opened(path)

    def fail(fd):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        finish(journal, 1)
        with pytest.raises(OutputError, match="Input/output error"):
            journal.sync()
    for call in (lambda: finish(journal, 2), journal.sync, journal.close):
        with pytest.raises(OutputError, match="Input/output error"):
            call()


def test_a_failing_close_is_told(path, monkeypatch):
    journal = opened(path)
    fd = journal._file.fd

    def fail(closed):
        if closed == fd:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", fail)
        with pytest.raises(OutputError, match="quota"):
            journal.close()
    os.close(fd)
    journal.close()


LIMITED = """
    import resource, sys
    from pathlib import Path
    from tprt.errors import OutputError
    from tprt.job.journal import Journal
    path, limit = Path(sys.argv[1]), int(sys.argv[2])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    journal = Journal.open(path, {})
    print("suspects", *journal.suspects, flush=True)
    try:
        for line in range(1, 1001):
            if not journal.is_done(line):
                journal.begin([line])
                journal.finish(line, "x" * 5000, 1, False)
                print(line, flush=True)
    except OutputError as error:
        print(error)
        try:
            journal.end("interrupted", "no room")
        finally:
            journal.close()
"""


def finished(stdout: str) -> list[int]:
    return [int(line) for line in stdout.splitlines() if line.isdigit()]


def test_a_limit_of_file_sizes(path):
    """The kernel takes a part of the last line and refuses the rest."""
    limit = 123_456
    first = run(LIMITED, path, limit)
    assert "File too large" in first.stdout and "ulimit -f" in first.stdout, first.stderr
    there = finished(first.stdout)
    assert 15 < len(there) < 25 and limit - 5100 < path.stat().st_size <= limit
    journal = Journal.open(path, {})
    assert list(contents(journal)) == there and journal.suspects == []
    journal.close()


def test_no_room_for_the_first_line_leaves_nothing(path):
    done = run(LIMITED, path, 10)
    assert "OutputError" in done.stderr and "File too large" in done.stderr
    assert list(path.parent.iterdir()) == []


def test_a_full_disk_and_room_again(path):
    """On a small tmpfs of its own: the job goes on when a file is removed."""
    folder = path.parent
    inside = ("unshare", "--mount", "sh", "-c")
    mount = f"mount -t tmpfs -o size=256k tmpfs {folder} && cd {folder}"
    if not shutil.which("unshare") or subprocess.run([*inside, mount], check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    script = (
        f"{mount} && head -c 150000 /dev/zero > filler && echo old > out && "
        '"$@"; ls -A; rm filler; mount -o remount,size=8m .; "$@"; ls -A; cat out'
    )
    code = """
        import sys
        from pathlib import Path
        from tprt.errors import OutputError
        from tprt.job.journal import Journal
        from tprt.job.output_file import AtomicOutput
        journal, output = Journal.open(Path("out.journal"), {}), AtomicOutput(Path("out"))
        try:
            for line in range(1, 101):
                if not journal.is_done(line):
                    journal.finish(line, f"{line} " + "x" * 5000, 1, False)
                    print("finished", line, flush=True)
            output.write(text for _, text in journal.results())
            journal.close(remove=True)
        except OutputError as error:
            print(error, flush=True)
            journal.end("interrupted", str(error))
    """
    done = run(code, wrap=(*inside, script, "sh"))
    said = done.stdout.split("\n")
    assert done.returncode == 0, done.stderr
    assert "the output cannot be written: No space left on device" in said
    numbers = [int(line.split()[1]) for line in said if line.startswith("finished")]
    assert numbers == list(range(1, 101)), "each once, over both runs"
    full = said.index("the output cannot be written: No space left on device")
    assert {"filler", "out", "out.journal"} == set(said[full + 3 : full + 6])
    *_, listing, answers = "\n".join(said[full + 6 :]).partition("\nout\n")
    assert listing and [line.split()[0] for line in answers.splitlines()] == [
        str(n) for n in range(1, 101)
    ]


@pytest.mark.parametrize(
    "make", ["missing/out.journal", "folder", "pipe", "file/out.journal", "n" * 300]
)
def test_places_that_cannot_be_written(tmp_path, make):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError) as caught:
        opened(tmp_path / make)
    assert caught.value.exit_code == 5 and caught.value.hint


# ---------------------------------------------------------------- kills

JOB = """
    import sys
    from pathlib import Path
    from tprt.job.journal import Journal, journal_path
    from tprt.job.output_file import AtomicOutput
    path = Path(sys.argv[1])
    journal, output = Journal.open(journal_path(path), {}), AtomicOutput(path)
    for line in range(1, 151):
        if not journal.is_done(line):
            journal.begin([line])
            journal.finish(line, f"answer {line}", 1, False)
    journal.end("finished", "")
    journal.sync()
    output.write(text for _, text in journal.results())
    journal.close(remove=True)
"""


@pytest.mark.parametrize(
    "fault",
    [
        *(f"journal.append:kill:hit={n}" for n in (1, 150)),
        *(f"journal.fsync:kill:hit={n}" for n in (1, 2)),
        "output.write:kill",
        "output.rename:kill",
        "output.renamed:kill",
        "journal.remove:kill",
    ],
)
def test_killed_anywhere_the_same_command_completes(tmp_path, fault):
    out = tmp_path / "out"
    out.write_text("old\n")
    assert run(JOB, out, fault=fault).returncode == -9
    expected = "".join(f"answer {n}\n" for n in range(1, 151))
    renamed = fault in ("output.renamed:kill", "journal.remove:kill")
    assert out.read_text() == (expected if renamed else "old\n")
    assert journal_path(out).exists()
    done = run(JOB, out)
    assert done.returncode == 0, done.stderr
    assert out.read_text() == expected and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_fault_within_the_sync_is_an_error_and_no_hang(path):
    code = """
        import sys
        from pathlib import Path
        from tprt.errors import OutputError
        from tprt.job.journal import Journal
        try:
            Journal.open(Path(sys.argv[1]), {})
        except OutputError as error:
            print(error)
    """
    assert "injected fault" in run(code, path, fault="journal.fsync:raise").stdout


# ---------------------------------------------------------------- memory

MEASURED = """
    import re, sys
    from pathlib import Path
    from tprt.job.input_file import scan_input
    from tprt.job.journal import Journal
    from tprt.job.output_file import AtomicOutput
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    with (folder / "in").open("w") as file:
        for i in range(count):
            file.write('{"id": "record-%d", "prompt": "human: hi"}\\n' % i)
    assert scan_input(folder / "in").records == count
    journal = Journal.open(folder / "journal", {})
    for line in range(count, 0, -1):
        journal.finish(line, '{"id": "record-%d", "text": " hello"}' % (line - 1), 2, False)
    journal.close()
    journal = Journal.open(folder / "journal", {})
    assert journal.num_done == count
    output = AtomicOutput(folder / "out")
    output.write(text for _, text in journal.results())
    journal.close(remove=True)
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_memory_of_a_long_job_is_little(tmp_path):
    """300,000 lines against 10,000 through scan, journal, recovery and output: less than 10 MB more, as
    it would be 30 MB for 1,000,000, which take too long here."""
    peaks = []
    for count in (10_000, 300_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        done = run(MEASURED, folder, count)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1000)
        with (folder / "out").open() as file:
            ids = (json.loads(line)["id"] for line in file)
            assert all(found == f"record-{i}" for i, found in enumerate(ids))
    print(f"peak memory: {peaks[0]:.1f} and {peaks[1]:.1f} MB")
    assert peaks[1] - peaks[0] < 9
