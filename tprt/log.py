"""Loggers under ``tprt.*``, and how the program's own lines reach stderr: as text or as JSON.

A library configures nothing: the package logger has a NullHandler. Only the command line calls
``setup_cli_logging``.
"""

import atexit
import contextlib
import json
import logging
import os
import sys
import time
from datetime import datetime
from functools import cache
from typing import Any

LOG_FORMATS = ("text", "json")
_format = {"of stderr": "text"}  # as the command line has it

logging.getLogger("tprt").addHandler(logging.NullHandler())


def get_logger(name: str) -> logging.Logger:
    return logging.getLogger(name)


@cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """A warning that this process gives no second time."""
    logger.warning("%s", message)


def setup_cli_logging(level: str = "info", log_format: str = "text") -> None:
    """Log to stderr; ranks above 0 from warning on.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        log_format: ``text``, with the rank in front where there is more than one, or ``json``: an
            object per line with ``time`` (ISO 8601 with its zone), ``level``, ``rank``, ``logger``,
            ``message`` and, where there is one, ``traceback``.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    handler = _StderrHandler()
    tag = f"[rank {rank}] " if size > 1 else ""
    handler.setFormatter(
        _JsonFormatter(rank)
        if log_format == "json"
        else logging.Formatter(f"%(asctime)s {tag}%(message)s", "%H:%M:%S")
    )
    logger = logging.getLogger("tprt")
    logger.handlers[:] = [handler]
    logger.propagate = False
    numeric = getattr(logging, level.upper())
    logger.setLevel(numeric if rank == 0 else max(numeric, logging.WARNING))
    _format["of stderr"] = log_format
    atexit.unregister(_forget_unwritten)
    atexit.register(_forget_unwritten)


def say(line: str) -> None:
    """A line on stderr. Whoever read it may be gone, which is no reason to stop."""
    stream = sys.stderr  # None where the process was started with fd 2 closed
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            stream.write(f"{line}\n")
            stream.flush()


def report(message: str, event: str = "error") -> None:
    """What ended the program or its ranks, on stderr: as it is, or as one JSON object."""
    as_json = _format["of stderr"] == "json"
    say(event_line(event, message=message) if as_json else message)


def _forget_unwritten() -> None:
    """Before Python ends: drop what stdout and stderr hold and nobody takes.

    It stays in their buffers when a write has failed. Python would fail on it once more and turn
    whatever exit code there is into 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def event_line(event: str, **fields: Any) -> str:
    """One JSON object with ``time``, ``event`` and the fields, for ``--log-format json``."""
    return json.dumps({"time": iso_time(time.time()), "event": event} | fields)


def iso_time(seconds: float) -> str:
    """Unix seconds in ISO 8601, local with its zone, to the millisecond."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="milliseconds")


class _StderrHandler(logging.Handler):
    """Looks up ``sys.stderr`` for each line: a progress bar puts itself there to stay below them."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # wrong arguments of a log call: logging's own way to report them
            self.handleError(record)
        else:
            say(line)


class _JsonFormatter(logging.Formatter):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": iso_time(record.created),
            "level": record.levelname.lower(),
            "rank": self.rank,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)
