"""How far a job is: a bar on a terminal, a plain line every few seconds elsewhere. stderr only."""

import contextlib
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0


class ProgressLine:
    """Args:
    total: completions to make.
    """

    def __init__(self, total: int) -> None:
        self.total, self.began, self.said = total, time.monotonic(), time.monotonic()
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("generate"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]} tok/s"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self.task = self.bar.add_task("generate", total=total, rate="-")

    def update(self, finished: int, tokens: int) -> None:
        """Args: completions finished and tokens generated so far."""
        now = time.monotonic()
        rate = f"{tokens / max(now - self.began, 1e-9):.0f}"
        if self.bar is not None:
            self.bar.update(self.task, completed=finished, rate=rate)
        elif now - self.said >= SECONDS_BETWEEN_LINES:
            self.said = now
            line = f"{finished}/{self.total} done, {tokens} tokens, {rate} tok/s"
            with contextlib.suppress(OSError):  # whoever read our stderr may be gone
                print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> "ProgressLine":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
