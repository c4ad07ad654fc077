"""How a journal comes to be and is found again: its lock, its first line, what earlier runs left in it.

Knows descriptors, and the journal's lines as ``journal_format`` reads them.
"""

import contextlib
import fcntl
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tprt.errors import ConfigError, OutputError
from tprt.job.fingerprint import difference
from tprt.job.journal_format import FORMAT, Entry, encode, read_entries, reader
from tprt.job.journal_index import CrashLedger, LineSet
from tprt.job.output_file import create_temporary, sync_folder, write_failed
from tprt.log import get_logger

logger = get_logger(__name__)

POLL_SECONDS = 0.1


@dataclass
class Recovered:
    """What recovery read: up to byte ``end`` all is well."""

    done: LineSet = field(default_factory=LineSet)
    ledger: CrashLedger = field(default_factory=CrashLedger)
    attempts: int = 0
    failed: int = 0
    tokens: int = 0
    end: int = 0

    def take(self, entry: Entry) -> None:
        self.end = entry.offset + entry.size
        if (result := entry.result) is not None:
            if self.done.add(result.line):  # of two results of one record the first counts
                self.failed += result.failed
                self.tokens += result.tokens
            self.ledger.finish(result.line)
        elif entry.holds("attempt"):
            self.attempts += 1
            self.ledger.attempt()
        elif entry.holds("begin"):
            self.ledger.begin(**entry.values)
        elif entry.holds("end"):
            self.ledger.end(**entry.values)


def lock(path: Path, wait_s: float) -> int:
    """A descriptor of the file that has this name, locked; the file is empty if there was none."""
    until, said = time.monotonic() + wait_s, False
    while (fd := _try_lock(path)) is None:
        if time.monotonic() >= until:
            raise _busy(path)
        if not said:
            logger.info("%s is open in another run; waiting up to %g s for it", path, wait_s)
            said = True
        time.sleep(POLL_SECONDS)
    return fd


def _try_lock(path: Path) -> int | None:
    with contextlib.ExitStack() as undo:
        try:
            if path.exists() and not path.is_file():
                raise OutputError(
                    f"the journal {str(path)!r} is a folder, device or pipe",
                    hint="move it away, or another --output",
                )
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            undo.callback(os.close, fd)
            if _takes_lock(fd) and _has_name(fd, path):
                undo.pop_all()
                return fd
        except OSError as error:
            raise write_failed(error, path) from error
    return None


def _takes_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_name(fd: int, path: Path) -> bool:
    """Whether no other run has removed or replaced the file between its opening and its locking."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _busy(path: Path) -> ConfigError:
    who = "another run"
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for entry in read_entries(file):
            if entry.holds("attempt"):
                who = f"process {entry.values['pid']} on host {entry.values['host']}"
    return ConfigError(
        f"the output is being written by {who}",
        where=str(path),
        hint="wait for it or end it; the same command then goes on where it stopped",
    )


def create(old: int, path: Path, fingerprint: dict[str, Any]) -> int:
    """Put a journal that holds only its first line in the place of the one locked as ``old``.

    It gets the name when it is durable: under that name no journal was ever without a whole first line.
    """
    fd, temporary = create_temporary(path)
    try:
        header = encode("fingerprint", {"format": FORMAT, "fingerprint": fingerprint})
        with open(fd, "wb", closefd=False) as file:
            file.write(header)
        os.fsync(fd)
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        os.close(fd)
        raise
    os.close(old)
    return fd


def recover(fd: int, path: Path, fingerprint: dict[str, Any]) -> Recovered:
    """Read what is there and cut off a damaged end."""
    size = os.fstat(fd).st_size
    with reader(fd, size) as file:
        entries = read_entries(file)
        header = next(entries)
        found = Recovered(end=header.size)
        if not header.holds("fingerprint"):
            raise _damaged(path, 0, found)
        if (known := header.values["format"]) != FORMAT:
            raise _of_another_job(path, [f"format: {known} then, {FORMAT} now"], found)
        different = difference(header.values["fingerprint"], fingerprint)
        damaged_at = 0
        for entry in entries:
            if entry.payload is None:
                damaged_at = damaged_at or entry.offset
            elif damaged_at and not different:
                raise _damaged(path, damaged_at, found)
            else:
                found.take(entry)
    if different:
        raise _of_another_job(path, different, found)
    if found.end < size:
        logger.warning("%s: %d bytes of a torn end are dropped", path, size - found.end)
        os.ftruncate(fd, found.end)
    return found


def _of_another_job(path: Path, different: list[str], found: Recovered) -> ConfigError:
    return ConfigError(
        "\n    ".join(["a journal is there of a job that differs from this one:", *different]),
        where=str(path),
        hint=f"--restart begins again and drops {len(found.done) or 'all'} finished records, "
        "or another --output",
    )


def _damaged(path: Path, offset: int, found: Recovered) -> OutputError:
    """Damage that no torn write explains: there are whole lines behind it, or it is the first line."""
    kept = f"truncate -s {offset} {path} keeps the {len(found.done)} finished records before it, "
    return OutputError(
        f"the journal is damaged at byte {offset}",
        where=str(path),
        hint=(kept if offset else "") + "--restart begins again",
    )
