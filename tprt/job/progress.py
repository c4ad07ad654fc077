"""How far a job is: a bar on a terminal, a plain line every few seconds elsewhere, or JSON lines.

stderr only, and never a reason to stop: whoever reads it may go away. Knows nothing of records but
their number.
"""

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from tprt.job.status_file import StatusUpdater
from tprt.log import event_line, say

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BEFORE_FIRST_LINE = 2.0
SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_FRAMES = 0.25
SECONDS_BETWEEN_SAMPLES = 1.0
RATE_SECONDS = 30.0  # tokens/s are of this long a past
ETA_SECONDS = 300.0  # longer: records end in bursts
LONGEST_ETA_SECONDS = 1e9  # more is as good as unknown


class _Sample(NamedTuple):
    time: float
    finished: int
    tokens: int


class JobProgress:
    """Shows and stores how far a job is; a context manager around the generation of one attempt.

    Args:
        total: records of the job.
        resumed, resumed_tokens: records done by earlier attempts, and their tokens. Neither rates
            nor the time left count them.
        log_format: ``text`` or ``json``.
        status: gets the same figures, at its own pace.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        total: int,
        resumed: int = 0,
        *,
        resumed_tokens: int = 0,
        log_format: str = "text",
        status: StatusUpdater | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.finished, self.tokens = total, resumed, resumed_tokens
        self.failed, self.running = 0, 0
        self.log_format, self.status, self.clock = log_format, status, clock
        self._bar: Progress | None = None
        self._begin()

    def _begin(self) -> None:
        now = self.clock()
        self._first = _Sample(now, self.finished, self.tokens)
        self._samples = deque([self._first])
        self._due = now
        self._line_due = now + SECONDS_BEFORE_FIRST_LINE
        self._said: dict[str, int] | None = None

    def __enter__(self) -> "JobProgress":
        self._begin()
        if self.log_format == "text" and _is_terminal():
            self._start_bar()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop_bar()
        if self._said not in (None, self._figures):  # who saw the job begin sees how far it came
            self._say_line()
        self._tell_status()

    def update(self, finished: int, failed: int = 0, running: int = 0, tokens: int = 0) -> None:
        """New figures; may be called as often as there are any.

        Args:
            finished: records with a result. failed: those of them whose result is an error.
            running: records in flight.
            tokens: generated. As ``finished`` it counts on from what the constructor was given.
        """
        self.finished, self.failed, self.running, self.tokens = finished, failed, running, tokens
        now = self.clock()
        if now < self._due:
            return
        self._due = now + SECONDS_BETWEEN_FRAMES
        if now - self._samples[-1].time >= SECONDS_BETWEEN_SAMPLES:
            self._samples.append(_Sample(now, finished, tokens))
            while len(self._samples) > 1 and self._samples[1].time <= now - ETA_SECONDS:
                self._samples.popleft()
        self._tell_status()
        if self._bar is not None:
            self._draw()
        elif now >= self._line_due:
            self._line_due = now + SECONDS_BETWEEN_LINES
            self._say_line()

    @property
    def tokens_per_s(self) -> float:
        """Of the last RATE_SECONDS of this attempt."""
        before = self._sample_before(RATE_SECONDS)
        return _rate(self.tokens - before.tokens, self.clock() - before.time)

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last record; None before this attempt has finished any."""
        now = self.clock()
        before = self._sample_before(ETA_SECONDS)
        if before.finished == self.finished:  # long records: none ended lately
            before = self._first
        rate = _rate(self.finished - before.finished, now - before.time)
        eta = (self.total - self.finished) / rate if rate > 0 else LONGEST_ETA_SECONDS
        return eta if eta < LONGEST_ETA_SECONDS else None

    def _sample_before(self, seconds: float) -> _Sample:
        """The latest sample that is at least this old, else the first."""
        limit = self.clock() - seconds
        return next((s for s in reversed(self._samples) if s.time <= limit), self._samples[0])

    @property
    def _figures(self) -> dict[str, int]:
        return {
            "finished": self.finished,
            "failed": self.failed,
            "running": self.running,
            "total": self.total,
            "tokens": self.tokens,
        }

    def _tell_status(self) -> None:
        if self.status is not None:
            rate = round(self.tokens_per_s, 1)
            self.status.update(**self._figures, tokens_per_s=rate, eta_s=self.eta_s)

    def _say_line(self) -> None:
        self._said = self._figures
        rate, eta = round(self.tokens_per_s, 1), self.eta_s
        if self.log_format == "json":
            left = None if eta is None else round(eta, 1)
            say(event_line("progress", **self._figures, tokens_per_s=rate, eta_s=left))
            return
        share = f" ({100 * self.finished / self.total:.1f} %)" if self.total else ""
        say(
            f"{self.finished}/{self.total} records{share}, {self.failed} failed, "
            f"{self.running} running; {self.tokens} tokens, {rate:.0f} tokens/s"
            + ("" if eta is None else f", {duration(eta)} left")
        )

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        # Drawn by update() alone: a thread of rich's own would draw while the job computes, and an
        # error of its writes would not come here. stdout may be a file and is not rich's business.
        self._bar = Progress(
            TextColumn("generate"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}% {task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
        )
        self._task = self._bar.add_task(
            "generate", total=self.total, completed=self.finished, figures=""
        )
        with self._losing_the_bar():
            self._bar.start()
            self._draw()

    def _draw(self) -> None:
        assert self._bar is not None
        eta = self.eta_s
        parts = [
            f"{self.tokens_per_s:.0f} tok/s",
            f"{'-:--:--' if eta is None else duration(eta)} left",
            f"{self.running} running",
            f"{self.failed} failed" if self.failed else "",
        ]
        with self._losing_the_bar():
            self._bar.update(
                self._task,
                completed=self.finished,
                figures=", ".join(filter(None, parts)),
                refresh=True,
            )

    @contextlib.contextmanager
    def _losing_the_bar(self) -> Iterator[None]:
        """Without its terminal the job goes on without its bar."""
        try:
            yield
        except (OSError, ValueError):
            self._stop_bar()

    def _stop_bar(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError):
                bar.stop()


def duration(seconds: float) -> str:
    """``0:12:30``, whole seconds; a clock that was set back counts as 0."""
    return str(timedelta(seconds=max(0, round(seconds))))


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


def _is_terminal() -> bool:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
        return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return False
