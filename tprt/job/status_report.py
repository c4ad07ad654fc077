"""A job seen from outside: does it run, how far is it, what became of it, what is to be done next.

Reads ``OUT.status.json``, the lock of ``OUT.journal`` and the same of shards, never the contents of a
journal. Returns JSON-able mappings; how they look is the command line's business.
"""

import contextlib
import fcntl
import os
import re
import shlex
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tprt.errors import EXIT_FAILED_RECORDS, ConfigError
from tprt.job.progress import duration
from tprt.job.status_file import ACTIVE_STATES, JobStatus, read_status

EXIT_MEANINGS = {
    0: "all good",
    1: "a bug",
    2: "usage or configuration",
    3: "checkpoint or tokenizer",
    4: "finished with failed records",
    5: "the output could not be written",
    6: "a rank failed or hung",
    7: "the ranks disagree",
    8: "it does not fit into memory",
    130: "interrupted, resumable",
    143: "ended by a signal, resumable",
}
SILENT_SECONDS = 30.0  # a running job says something every 2 s unless its main thread is stuck
LEAVING_SECONDS = 5.0  # a job that has said its last word may hold its lock so long
INCOMPLETE, NOT_STARTED = "incomplete", "not started"  # of shards
RESTARTING = "restarting"  # failed, and about to be started again
RESTARTING_SECONDS = 120.0  # in which new ranks say their first word, or are not to come
GOES_ON = (*ACTIVE_STATES, RESTARTING)
SHOWN_SHARDS = 10
MAX_SHARDS = 10_000


@dataclass(frozen=True)
class JobView:
    """A job seen from outside.

    Args:
        status: None where there is none, or none that can be read.
        is_locked: a process holds the lock of the journal, so the job runs.
    """

    output: Path
    status: JobStatus | None
    is_locked: bool

    @property
    def has_begun_again(self) -> bool:
        """The end of the last attempt still stands in the file, but a new one has begun."""
        if self.status is None or not self.status.is_final or not self.is_locked:
            return False
        return abs(time.time() - self.status.updated) > LEAVING_SECONDS

    @property
    def state(self) -> str:
        """A state of ``JobStatus``; ``dead``: it ended without a word; ``restarting``: its launcher
        is about to start it again."""
        status = self.status
        if status is not None and status.is_final and not self.has_begun_again:
            recent = time.time() - status.updated < RESTARTING_SECONDS
            return RESTARTING if status.restarts_left and recent else status.state
        if not self.is_locked:
            return "dead"
        return "running" if self.status is None or self.has_begun_again else self.status.state


def look_at(output: Path) -> JobView | None:
    """The job that writes ``output``; None if there is neither a journal nor a status of one.

    Raises:
        ConfigError: there is a journal that may not be read.
    """
    view = _look(output)
    if view is not None and view.state == "dead":
        # Lock, then file: a job that took its lock between the two looks seems dead.
        view = _look(output)
    return view


def _look(output: Path) -> JobView | None:
    journal = output.with_name(f"{output.name}.journal")
    is_locked = _has_owner(journal)
    status = read_status(output)
    if status is None and not journal.exists():
        return None
    return JobView(output, status, is_locked)


def _has_owner(journal: Path) -> bool:
    """Whether a process holds the exclusive lock of the journal.

    The probe holds a shared lock for some microseconds. A job that starts in just these waits for its
    lock for seconds, so it is not disturbed; a job that has its lock does not notice.
    """
    try:
        handle = os.open(journal, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigError(
            f"the journal cannot be read: {error.strerror or error}",
            where=str(journal),
            hint="ask as the user who runs the job",
        ) from error
    return False


def describe(output: Path) -> dict[str, Any]:
    """Everything ``job status`` shows, as one JSON-able mapping.

    Of a job: the fields of ``JobStatus`` (null where only the journal is left), and of shards their
    sums; ``state`` as in ``JobView``; ``meaning`` of the exit code; ``percent``; ``next``; ``notes``. Of
    shards also ``shards``, a list of such jobs.

    Raises:
        ConfigError: there is no such job.
    """
    candidates = dict.fromkeys((output, Path(os.path.realpath(output))))  # OUT may be a link
    for path in candidates if output.name else ():  # "." and "/" have no name
        if (view := look_at(path)) is not None:
            return _describe_job(view)
        if count := _count_of_shards(path):
            return _describe_shards(path, count)
    there = "there is a file of that name, but" if os.path.isfile(output) else "there is"
    raise ConfigError(
        f"{there} no job that writes {str(output)!r}: no status file and no journal beside it",
        where=str(output.absolute().parent),
        hint="what --output of tprt generate names; a job is known once it has looked at its input",
    )


def _describe_job(view: JobView) -> dict[str, Any]:
    known = asdict(JobStatus()) if view.status is None else view.status.to_json()
    if view.status is None:
        known = dict.fromkeys(known)
    result = {"output": str(view.output)} | known | {"state": view.state}
    if view.state not in ACTIVE_STATES:
        result |= {"running": 0, "eta_s": None}
    elif view.has_begun_again:
        # Of the attempt before; above all its process id may be somebody else's by now.
        gone = ("exit_code", "error", "started", "updated", "host", "pid", "ranks", "attempt")
        result |= dict.fromkeys((*gone, "eta_s", "output_sha256", "output_size"))
    result["meaning"] = EXIT_MEANINGS.get(result["exit_code"])
    result["percent"] = _percent(result["finished"], result["total"])
    return result | {"next": _next_step(result), "notes": _notes(view)}


def _percent(finished: int | None, total: int | None) -> float | None:
    """Rounded down: 100 means all."""
    return 1000 * (finished or 0) // total / 10 if total else None


def _next_step(job: dict[str, Any]) -> str:
    match job["state"]:
        case "finished" if job["exit_code"] == EXIT_FAILED_RECORDS:
            return 'the failed records say why under "error" in their lines of the output'
        case "finished":
            return ""
        case "interrupted":
            return "the same command resumes"
        case "restarting":
            return (
                f"nothing: its launcher starts it again ({job['restarts_left']} more times at most)"
            )
        case "failed" if job["exit_code"] in (2, 3):
            return "the command, put right, resumes"
        case "failed":
            return "the same command resumes, once the cause is gone"
        case "dead":
            return (
                "it ended without a word, as after kill -9 or a power cut; the same command resumes"
            )
    there = f" (kill {job['pid']} on {job['host']})" if job["pid"] else ""
    return f"SIGTERM{there} stops it cleanly; the same command then resumes"


def _notes(view: JobView) -> list[str]:
    """What is odd about a job."""
    status, notes = view.status, []
    if status is None:
        return ["there is no status file that can be read, only the journal"]
    here, silent = socket.gethostname(), time.time() - status.updated
    if view.has_begun_again:
        notes.append("the figures are the last of the attempt before; a new one has begun")
    elif view.state in ACTIVE_STATES and silent > SILENT_SECONDS:
        notes.append(f"it has said nothing for {duration(silent)}")
    elif view.state == "dead" and status.host not in ("", here):
        notes.append(f"seen from {here}; some file systems hide the locks of {status.host}")
    if view.state == "finished":
        try:
            if status.output_size not in (None, view.output.stat().st_size):
                notes.append("the output has changed since")
        except OSError:
            notes.append("the output is no longer there")
    return notes


def _shard_names(output: Path) -> dict[int, set[int]]:
    """Count of shards -> the shards of which there is a status file or a journal."""
    name = re.compile(
        rf"{re.escape(output.name)}\.([0-9]+)-of-([1-9][0-9]*)\.(?:status\.json|journal)"
    )
    found: dict[int, set[int]] = {}
    try:
        names = [path.name for path in output.absolute().parent.iterdir()]
    except OSError:
        return {}
    for match in filter(None, map(name.fullmatch, names)):
        index, count = int(match[1]), int(match[2])
        if index < count <= MAX_SHARDS:
            found.setdefault(count, set()).add(index)
    return found


def _count_of_shards(output: Path) -> int:
    """0 without shards; of several counts the one most shards of which are there."""
    found = _shard_names(output)
    return max(found, key=lambda count: (len(found[count]), count), default=0)


def _describe_shards(output: Path, count: int) -> dict[str, Any]:
    shards = []
    for index in range(count):
        path = output.with_name(f"{output.name}.{index}-of-{count}")
        view = look_at(path)
        job = _describe_job(view) if view else {"output": str(path), "state": NOT_STARTED}
        shards.append({"shard": f"{index}/{count}"} | job)
    sums: dict[str, Any] = {
        key: sum(shard.get(key) or 0 for shard in shards)
        for key in ("total", "finished", "failed", "running", "resumed", "tokens", "tokens_per_s")
    }
    state = _state_of_all({shard["state"] for shard in shards})
    notes = [f"{shard['shard']}: {note}" for shard in shards for note in shard.get("notes", ())]
    others = [str(n) for n in sorted(_shard_names(output)) if n != count]
    if others:
        notes.append(f"there are also shards of {', '.join(others)}, which are not shown")
    etas = [shard["eta_s"] for shard in shards if shard.get("eta_s") is not None]
    return {
        "output": str(output),
        "state": state,
        **sums,
        "percent": _percent(sums["finished"], sums["total"]),
        "eta_s": max(etas, default=None),
        "next": _next_step_of_shards(output, state, shards),
        "notes": notes,
        "shards": shards,
    }


def _state_of_all(states: set[str]) -> str:
    if states & set(GOES_ON):
        return "running"
    for state in ("failed", "dead", "interrupted"):
        if state in states:
            return state
    return INCOMPLETE if NOT_STARTED in states else "finished"


def _is_newer(path: Path, seconds: float) -> bool:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime > seconds
    return False


def _next_step_of_shards(output: Path, state: str, shards: list[dict[str, Any]]) -> str:
    if state == "finished":
        if _is_newer(output, max(shard["updated"] for shard in shards)):
            return ""  # merged
        return f"tprt generate --merge --output {shlex.quote(str(output))}"
    missing = [s["shard"] for s in shards if s["state"] not in (*GOES_ON, "finished")]
    if not missing:
        return "when all are finished: tprt generate --merge"
    named = ", ".join(missing[:SHOWN_SHARDS]) + (" ..." if len(missing) > SHOWN_SHARDS else "")
    return f"the same command with --shard starts or resumes {named}"
