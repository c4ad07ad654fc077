"""A file that only grows: what is appended is the kernel's at once and the disk's soon after.

A thread makes appends durable in groups, so that no caller waits for a disk. Knows bytes; what they mean
is the journal's matter.
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tprt.errors import OutputError
from tprt.faults import fault_point
from tprt.job.output_file import write_failed

SYNC_SECONDS, SYNC_RECORDS = 0.5, 64  # what a power failure can take at most
SYNC_TIMEOUT = 30.0


class AppendFile:
    """Appends to a descriptor, which it owns from now on. Safe to use from several threads.

    After the first error of a write or a sync every call raises it again, as OutputError. What a write
    left half done is cut off again, so the file stays what it was before.

    Args:
        fd: open for reading and writing.
        path: for messages.
        end: bytes that it holds.
    """

    def __init__(self, fd: int, path: Path, end: int) -> None:
        self.fd, self.path, self.end = fd, path, end
        self._changed = threading.Condition(threading.Lock())
        self._durable = 0
        self._half_done = False  # bytes beyond `end` may be in the file
        self._records, self._since = 0, 0.0  # not yet durable; when the first of them came
        self._hurry = self._closing = self._stopped = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="tprt-journal-sync", daemon=True)
        self._thread.start()

    def append(
        self,
        data: bytes,
        records: int = 0,
        *,
        timeout: float = SYNC_TIMEOUT,
        after_error: bool = False,
    ) -> None:
        """Write ``data`` to the kernel, whole or not at all.

        Args:
            records: it counts as, of those that must become durable soon.
            timeout: seconds to wait for another thread that is writing.
            after_error: try even so when an earlier call failed.
        """
        with self._locked(timeout):
            if self._error is not None and not after_error:
                raise self._failed(self._error)
            try:
                self._write(data)
            except OSError as error:
                self._error = self._error or error
                with contextlib.suppress(OSError):
                    self._cut_back()
                raise self._failed(error) from error
            if records and not self._records:
                self._since = time.monotonic()
            waiting, self._records = self._records, self._records + records
            if records and (not waiting or self._records >= SYNC_RECORDS):
                self._changed.notify_all()  # in between the thread sleeps on until its time has come

    def _write(self, data: bytes) -> None:
        # A signal handler of the program may raise between any two of these lines. What it leaves is
        # cut off by the next call: `end` moves last.
        self._cut_back()
        self._half_done = True
        rest, at = memoryview(data), self.end
        while rest:
            written = os.pwrite(self.fd, rest, at)
            rest, at = rest[written:], at + written
        self.end = at
        self._half_done = False

    def _cut_back(self) -> None:
        if self._half_done:
            os.ftruncate(self.fd, self.end)
            self._half_done = False

    def sync(self, timeout: float = SYNC_TIMEOUT) -> None:
        """Return when all that was appended is durable.

        Raises:
            OutputError: it could not be made so, or not within ``timeout`` seconds.
        """
        until = time.monotonic() + timeout
        with self._locked(timeout):
            target = self.end
            while self._durable < target and not self._stopped:
                self._hurry = True
                self._changed.notify_all()
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            if self._error is not None:
                raise self._failed(self._error)
            if self._durable < target:
                raise self._too_slow(timeout)

    def close(self, sync: bool = True, timeout: float = SYNC_TIMEOUT) -> None:
        """Make all durable unless told otherwise, stop the thread, let go of the descriptor."""
        if self.fd < 0:
            return
        try:
            if sync:
                self.sync(timeout)
        finally:
            with self._locked(timeout):
                self._closing = True
                self._changed.notify_all()
            self._thread.join(timeout)
            if (
                not self._thread.is_alive()
            ):  # else the disk has the descriptor, and closing would hang
                self._close_descriptor()

    def _close_descriptor(self) -> None:
        fd, self.fd = self.fd, -1
        try:
            if self._half_done:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, self.end)
            os.close(fd)
        except OSError as error:  # some network file systems speak of a full disk only here
            raise self._failed(error) from error

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due():
                    self._changed.wait(self._patience())
                if self._closing:
                    return
                target, self._records, self._hurry = self.end, 0, False
            error = self._sync_now()
            with self._changed:
                if error is None:
                    self._durable = target
                else:  # the kernel forgets what it could not write: a later success would prove nothing
                    self._error, self._stopped = self._error or error, True
                self._changed.notify_all()
                if self._stopped:
                    return

    def _sync_now(self) -> Exception | None:
        try:
            fault_point("journal.fsync")
            if os.fstat(self.fd).st_size < self._durable:
                return OSError(errno.EIO, "somebody has cut it off")
            os.fsync(self.fd)
        except Exception as error:
            return error
        return None

    def _due(self) -> bool:
        waited = self._records and time.monotonic() >= self._since + SYNC_SECONDS
        return bool(self._closing or self._hurry or waited or self._records >= SYNC_RECORDS)

    def _patience(self) -> float | None:
        return max(0.0, self._since + SYNC_SECONDS - time.monotonic()) if self._records else None

    @contextlib.contextmanager
    def _locked(self, timeout: float) -> Iterator[None]:
        if not self._changed.acquire(timeout=timeout):
            raise self._too_slow(timeout)
        try:
            yield
        finally:
            self._changed.release()

    def _failed(self, error: Exception) -> OutputError:
        return write_failed(error if isinstance(error, OSError) else OSError(str(error)), self.path)

    def _too_slow(self, timeout: float) -> OutputError:
        return OutputError(
            f"the disk did not take the journal within {timeout:g} s",
            where=str(self.path),
            hint="look at the disk or the file server; the same command goes on from what it has",
        )
