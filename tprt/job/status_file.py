"""``OUT.status.json``: what a job says of itself, while it runs and at its end.

Knows nothing of records, ranks or models: a status is plain values. Whether somebody still works on
the job is not to be had from the file alone: ``status_report`` tells that.
"""

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tprt.job.output_file import create_temporary, remove_leftovers, sync_folder
from tprt.log import get_logger

logger = get_logger(__name__)

ACTIVE_STATES = ("loading", "running", "writing")
FINAL_STATES = ("finished", "failed", "interrupted")
SECONDS_BETWEEN_UPDATES = 2.0
MAX_BYTES = 2**20  # of a file that is read as a status
MAX_SECONDS = 1e11  # of a time that is believed: the year 5138


@dataclass(frozen=True)
class JobStatus:
    """One state of a job; of a shard where the job is one.

    Args:
        state: one of ACTIVE_STATES or FINAL_STATES.
        exit_code: None until the state is final.
        total, finished, failed: records of the job, those with a result, and those of them whose
            result is an error; work of earlier attempts included.
        running: records in flight.
        resumed: of ``finished``, those that were done before this attempt.
        tokens: generated so far.
        tokens_per_s: lately; of the whole attempt once it is over.
        eta_s: seconds of generation left; None if that cannot be told.
        attempt: 1 for the first start, one more for each resume.
        started, updated: unix seconds; the start of this attempt, and the write of this status.
        error: the first error: ``kind, rank, host, phase, step, what, where, hint, code`` and
            perhaps ``stack`` (lines).
        restarts_left: how often the launcher may start the ranks again by itself.
        output_sha256, output_size: of the output, once it is finished.
    """

    state: str = "loading"
    exit_code: int | None = None
    total: int = 0
    finished: int = 0
    failed: int = 0
    running: int = 0
    resumed: int = 0
    tokens: int = 0
    tokens_per_s: float = 0.0
    eta_s: float | None = None
    attempt: int = 1
    started: float = 0.0
    updated: float = 0.0
    host: str = ""
    pid: int = 0
    ranks: int = 1
    error: dict[str, Any] | None = None
    restarts_left: int = 0
    fingerprint: dict[str, Any] = field(default_factory=dict)
    output_sha256: str | None = None
    output_size: int | None = None

    @classmethod
    def begin(cls, **known: Any) -> "JobStatus":
        """The first status of an attempt, by the process that calls this."""
        now = time.time()
        here: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": now,
            "updated": now,
        }
        return cls(**(here | known))

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES

    def to_json(self) -> dict[str, Any]:
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, raw: Any) -> "JobStatus":
        """Unknown fields are ignored, missing ones have their defaults.

        Raises:
            ValueError: ``raw`` is no status, or a field of it has an impossible value.
        """
        if not isinstance(raw, dict) or raw.get("state") not in ACTIVE_STATES + FINAL_STATES:
            raise ValueError("it has no state of a job")
        known = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
        for name, value in known.items():
            if not _is_possible(name, value):
                raise ValueError(f"its {name} is impossible")
        return cls(**known)


_NULLABLE = {"exit_code", "eta_s", "error", "output_sha256", "output_size"}
_TEXTS = {"state", "host", "output_sha256"}
_OBJECTS = {"error", "fingerprint"}
_NUMBERS = {"tokens_per_s", "eta_s", "started", "updated"}


def _is_possible(name: str, value: object) -> bool:
    if value is None:
        return name in _NULLABLE
    if name in _TEXTS:
        return isinstance(value, str)
    if name in _OBJECTS:
        return isinstance(value, dict)
    if isinstance(value, bool):
        return False
    if name in _NUMBERS:
        return isinstance(value, int | float) and 0 <= value < MAX_SECONDS
    return isinstance(value, int) and 0 <= value < 2**63


def status_path(output: Path) -> Path:
    """Where the status of an output is. For a link, ask for that of the file behind it."""
    return output.with_name(f"{output.name}.status.json")


class StatusFile:
    """Replaces the file at ``path`` as a whole, from any thread, and never raises an error.

    A job does not stop because its status cannot be written: the first failure is a warning. The
    first final state stays: whatever is written after it is dropped, so that the thread that knows
    why a job failed is not overruled by one that only notices.

    Only the process that holds the lock of the journal may write; a final state also one that speaks
    for it, since it is dead.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._is_first = True
        # Reentrant: a signal handler may write while the main thread, interrupted, is in here.
        self._lock = threading.RLock()
        self._final: JobStatus | None = None
        self._final_is_stored = False
        self._has_warned = False

    def write(self, status: JobStatus) -> None:
        """Store the status, stamped with the time; durable if its state is final."""
        with self._lock:
            if self._final is None:
                status = replace(status, updated=time.time())
                if status.is_final:
                    self._final = status
            elif self._final_is_stored:
                return
            else:
                status = self._final
            try:
                self._store(status)
            # Not only OSError: a value that JSON does not know must not stop the job either.
            except Exception as error:
                self._warn(error)
            else:
                self._final_is_stored = status.is_final

    def _store(self, status: JobStatus) -> None:
        data = (json.dumps(status.to_json(), indent=1, default=str) + "\n").encode()
        try:
            self._replace(data, durable=status.is_final)
        except OSError as error:
            if not status.is_final:
                raise
            try:
                self._overwrite(status)
            except OSError:
                raise error from None

    def _replace(self, data: bytes, durable: bool) -> None:
        if self._is_first and not durable:  # what a killed attempt may have left
            remove_leftovers(self.path)
        self._is_first = False
        handle, temporary = create_temporary(self.path)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(handle)
            temporary.replace(self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        if durable:
            sync_folder(self.path.parent)

    def _overwrite(self, status: JobStatus) -> None:
        """The last word in few bytes, into the file that is there.

        A disk without room for a second file has room in the blocks of the first. A kill in the midst
        would leave half a status, but without this the last word would be lost for certain.
        """
        raw = status.to_json()
        raw["error"] = {k: v for k, v in (status.error or {}).items() if k != "stack"} or None
        with self.path.open("r+b") as file:
            file.write(f"{json.dumps(raw, default=str)}\n".encode())
            file.truncate()
            file.flush()
            os.fsync(file.fileno())

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s cannot be written (%s); the job goes on without it",
                self.path,
                getattr(error, "strerror", None) or error,
            )


class StatusUpdater:
    """The current status of a running job, written to its file now and then.

    Args:
        status: written at once if this process began it; one that was read is there already.
        every_s: least seconds between two updates of figures.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        file: StatusFile,
        status: JobStatus,
        *,
        every_s: float = SECONDS_BETWEEN_UPDATES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.file, self.status, self.every_s, self.clock = file, status, every_s, clock
        self._lock = threading.RLock()
        self._due = 0.0
        if status.pid == os.getpid():
            self._change({}, at_once=True)

    def update(self, **changes: Any) -> None:
        """Take over figures; they reach the file within ``every_s`` if updates keep coming."""
        self._change(changes, at_once=False)

    def enter(self, state: str, **changes: Any) -> None:
        """A state begins; written at once."""
        self._change({"state": state} | changes, at_once=True)

    def end(
        self,
        state: str,
        exit_code: int,
        error: dict[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        """The job is over: the first call counts.

        Args:
            error: the first-error record where there is one (``JobStatus``).
        """
        over = {"state": state, "exit_code": exit_code, "error": error}
        self._change(over | {"running": 0, "eta_s": None} | changes, at_once=True)

    def _change(self, changes: dict[str, Any], at_once: bool) -> None:
        with self._lock:
            if not self.status.is_final:
                self.status = replace(self.status, **changes)
            now = self.clock()
            if at_once or now >= self._due:
                self._due = now + self.every_s
                self.file.write(self.status)


def read_status(output: Path) -> JobStatus | None:
    """What the job that writes ``output`` last said; None without a file, or, with a warning, if it
    is damaged or something else."""
    path = status_path(output)
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            return None
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is longer than {MAX_BYTES} bytes")
        return JobStatus.from_json(json.loads(data))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        logger.warning("%s is no status of a job, or damaged: %s", path, reason)
        return None
