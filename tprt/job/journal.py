"""The journal of a batch job: what is done, kept so that a run may die at any moment.

One process writes it, under an exclusive lock, beside the output that it is the memory of. To open it is
to go on from what an earlier run left (``journal_recovery``); ``journal_format`` says what stands in it.
Knows records by their line numbers and results as lines of text.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tprt.errors import OutputError
from tprt.faults import fault_point
from tprt.job.append_file import SYNC_TIMEOUT, AppendFile
from tprt.job.journal_format import encode, encode_result, read_entries, read_result, reader
from tprt.job.journal_index import END_KINDS
from tprt.job.journal_recovery import Recovered, create, lock, recover
from tprt.job.output_file import remove_leftovers, resolved, sync_folder, write_failed

END_TIMEOUT = 2.0  # of `end`, which the failure path calls
MAX_CAUSE_LENGTH = 2000
LINES_PER_BEGIN = 10_000


def journal_path(output: Path) -> Path:
    """Where the journal of an output is. For a link, ask for that of the file behind it."""
    return output.with_name(f"{output.name}.journal")


class Journal:
    """An open journal; made by ``Journal.open``.

    ``finish``, ``end`` and ``sync`` may be called from any thread, but not from a signal handler.

    Attributes:
        path: of the file.
        attempt: how many times the job was started, this time included.
        num_failed: finished records that are error records.
        tokens: generated for the finished records.
    """

    def __init__(self, file: AppendFile, found: Recovered) -> None:
        self.path, self.attempt = file.path, found.attempts + 1
        self.num_failed, self.tokens = found.failed, found.tokens
        self._file, self._done, self._ledger = file, found.done, found.ledger
        self._lock = threading.Lock()  # of the counts; writing has a lock of its own
        self._ended = False

    @classmethod
    def open(
        cls,
        path: Path,
        fingerprint: dict[str, Any],
        *,
        restart: bool = False,
        wait_s: float = 10.0,
    ) -> "Journal":
        """Create a journal or go on with one, and note that an attempt begins.

        A last line that is torn or damaged is dropped: it was not durable.

        Args:
            path: of ``journal_path``.
            fingerprint: plain JSON values, of ``make_fingerprint``.
            restart: replace what is there, whatever it is; it is gone once the new one is durable.
            wait_s: seconds to wait for another process that has it open.

        Raises:
            ConfigError: another process has it open, or it belongs to a job that differs.
            OutputError: it cannot be written, or is damaged elsewhere than at its end.
        """
        path = resolved(path)
        fd = lock(path, wait_s)
        try:
            remove_leftovers(path)
            if restart or os.fstat(fd).st_size == 0:
                fd = create(fd, path, fingerprint)
            found = recover(fd, path, fingerprint)
            found.ledger.attempt()
        except BaseException as error:
            with contextlib.suppress(OSError):
                if os.fstat(fd).st_size == 0:
                    path.unlink()
                os.close(fd)
            if isinstance(error, OSError):
                raise write_failed(error, path) from error
            raise
        file = AppendFile(fd, path, found.end)
        try:
            journal = cls(file, found)
            host, pid = socket.gethostname(), os.getpid()
            said = {"attempt": journal.attempt, "host": host, "pid": pid, "started": time.time()}
            file.append(encode("attempt", said))
            file.sync()
        except BaseException:
            file.close(sync=False)
            raise
        return journal

    @property
    def num_done(self) -> int:
        return len(self._done)

    @property
    def suspects(self) -> list[int]:
        """Lines that were in flight when an attempt ended badly, to be retried alone, in this order,
        before the rest."""
        return self._ledger.suspects

    @property
    def quarantined(self) -> list[int]:
        """Lines that ended attempts while they were alone in flight (``CrashLedger`` says how often).
        They are not to be tried again; the caller finishes them with an error."""
        return self._ledger.quarantined

    def crash_cause(self, line: int) -> str:
        """What ended the last attempt that had this suspect or quarantined line in flight."""
        return self._ledger.cause(line)

    def is_done(self, line: int) -> bool:
        return line in self._done

    def begin(self, lines: Sequence[int], alone: bool = False) -> None:
        """Note that records go in flight. This survives the process, not a power failure.

        Args:
            lines: of the input.
            alone: nothing else is in flight.

        Raises:
            OutputError: the journal cannot be written, now or since an earlier call.
        """
        for start in range(0, len(lines), LINES_PER_BEGIN):
            part = list(lines[start : start + LINES_PER_BEGIN])
            self._file.append(encode("begin", {"lines": part, "alone": alone}))

    def finish(self, line: int, result: str, tokens: int, failed: bool) -> None:
        """Keep the output line of a record. Durable within half a second, without waiting for it.

        A record that is finished already stays as it is.

        Args:
            line: of the input.
            result: one line without its end, as UTF-8 can hold it.
            tokens: generated for it.
            failed: whether it is an error record.

        Raises:
            OutputError: as for ``begin``. What was finished before is kept.
        """
        with self._lock:
            if line in self._done:
                return
            fault_point("journal.append")
            self._file.append(encode_result(line, tokens, failed, result), records=1)
            self._done.add(line)
            self._ledger.finish(line)
            self.num_failed += failed
            self.tokens += tokens

    def sync(self, timeout: float = SYNC_TIMEOUT) -> None:
        """Return when all that was finished is durable.

        Raises:
            OutputError: it cannot be made so, or not within ``timeout`` seconds.
        """
        self._file.sync(timeout)

    def end(self, kind: str, cause: str) -> None:
        """Note how this attempt ends; only the first call counts. Call ``sync`` or ``close`` after it.

        It is tried after a failed write too: the end is short and the disk may have room for it.

        Args:
            kind: ``finished``; ``interrupted``, where no record can be the cause: a stop that was asked
                for, an output that cannot be written; ``crash``, where a rank raised, ran out of memory,
                stalled or died of a signal of its own; ``killed``, where one was killed from outside.
            cause: for people.

        Raises:
            OutputError: it cannot be written within 2 s.
        """
        assert kind in END_KINDS, kind
        if not self._ended:  # two threads may both come here: recovery too takes the first end
            line = encode("end", {"kind": kind, "cause": cause[:MAX_CAUSE_LENGTH]})
            self._file.append(line, timeout=END_TIMEOUT, after_error=True)
            self._ended = True

    def results(self, tick: Callable[[], None] = lambda: None) -> Iterator[tuple[int, str]]:
        """(line, output line) of all finished records in the order of their lines.

        Args:
            tick: called now and then while the file is read, before the first line comes.

        Reads the file, and holds 8 bytes per record. Nothing may be finished meanwhile.

        Raises:
            OutputError: what was written cannot be read any more.
        """
        try:
            with reader(self._file.fd, self._file.end) as file:
                pairs = ((entry.result, entry.offset) for entry in read_entries(file, tick))
                found = ((result.line, offset) for result, offset in pairs if result)
                for offset in self._done.order(found):
                    result = read_result(file, offset)
                    yield result.line, result.text.decode()
        except (OSError, ValueError) as error:
            raise OutputError(
                f"the journal cannot be read any more: {error}",
                where=str(self.path),
                hint="look at the disk; the same command says what is left",
            ) from error

    def close(self, remove: bool = False) -> None:
        """Make all durable and let go of the file and its lock.

        Args:
            remove: the output is durable, so the journal has done its work.

        Raises:
            OutputError: it cannot be made durable, or not be removed.
        """
        try:
            if remove:
                fault_point("journal.remove")
                self._remove()
        finally:
            self._file.close(sync=not remove)

    def _remove(self) -> None:
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self._file.fd)):
                os.unlink(self.path)
                sync_folder(self.path.parent)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise OutputError(
                f"the output is complete, but its journal cannot be removed: {error.strerror}",
                where=str(self.path),
                hint="remove it",
            ) from error
