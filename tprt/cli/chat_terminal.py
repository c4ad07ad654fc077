"""The terminal side of a chat: lines in, text out as it comes, and what Ctrl-C means.

Whatever a model writes is text here: no markup is read from it and no control character reaches the
terminal. stdout gets the text of answers, and on a terminal their figures while they grow; everything
else goes to stderr. Knows no model and no conversation.
"""

import contextlib
import io
import math
import os
import re
import select
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from tprt.errors import EXIT_SIGINT, EXIT_SIGTERM

TWICE_SECONDS = 2.0  # a second Ctrl-C within this time ends the chat
END_SECONDS = 5.0  # how long an end may take where the main thread waits for a peer
FRAME_SECONDS = 0.05
BLOCK = '"""'
RESET = b"\x1b[?25h\x1b[?2004l"  # cursor shown, pastes not marked

# C0 but newline and tab, DEL, C1, the marks that reorder text, and halves of surrogate pairs.
_ACTING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def neutral(text: str) -> str:
    """The text with every character that a terminal would act on as its escape (``\\x1b``)."""
    return _ACTING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def forgive_encoding() -> None:
    """Bytes that are no text, and characters the terminal's encoding lacks, must not end a chat."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def terminal_keeper() -> Callable[[], None]:
    """What puts the terminal's settings back as they are now, however a line's reader left them."""
    try:
        before = termios.tcgetattr(0)
    except (termios.error, OSError):
        return lambda: None

    def restore() -> None:
        with contextlib.suppress(termios.error, OSError):
            termios.tcsetattr(0, termios.TCSANOW, before)
            if os.isatty(1) and os.environ.get("TERM", "dumb") != "dumb":
                os.write(1, RESET)

    return restore


# ---------------------------------------------------------------- Ctrl-C


class Interrupts:
    """What Ctrl-C does: where it may, it raises; elsewhere it asks for a stop; twice it ends the chat.

    A step of a model must not be torn, so in an answer only flags are set, which are looked at
    between steps. Where the main thread cannot look, because it waits for a peer that is gone, a
    thread ends the process ``END_SECONDS`` after an end was asked for.

    Args:
        enabled: False leaves Ctrl-C as Python has it, for launchers that end all ranks on it.
        restore: called before the process is ended that way.
    """

    def __init__(self, enabled: bool = True, restore: Callable[[], None] = lambda: None) -> None:
        self.enabled, self._restore = enabled, restore
        self.stop = False  # the answer
        self.leave = False  # the chat
        self._raises = self._warned = False
        self._last = -math.inf

    def __enter__(self) -> "Interrupts":
        if self.enabled:
            self._before: Any = signal.signal(signal.SIGINT, self._on_interrupt)
            self._read_end, write_end = os.pipe()
            os.set_blocking(write_end, False)
            # C code writes to it at once; Python's handlers wait until the main thread is back.
            signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="end-watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            os.close(signal.set_wakeup_fd(-1))  # the watch reads an end of file and returns
            signal.signal(signal.SIGINT, self._before)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Ctrl-C raises KeyboardInterrupt in here; an input that came to its end resets it."""
        self._raises, self.stop = True, False
        try:
            yield
            self._warned = False
        finally:
            self._raises = False

    @contextlib.contextmanager
    def every(self, seconds: float, tick: Callable[[], None]) -> Iterator[None]:
        """Call ``tick`` in the main thread that often, while it sits in ``raising``.

        A Ctrl-C during a tick is raised after it; what a tick raises, the reading of the line raises.
        """

        def on_alarm(_: int, __: FrameType | None) -> None:
            if self._raises:
                self._raises = False
                tick()
                self._raises = True
                if self.stop:
                    self._interrupt()

        before = signal.signal(signal.SIGALRM, on_alarm)
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _on_interrupt(self, _: int, __: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last < TWICE_SECONDS or (self._raises and self._warned):
            self.leave = True
        self._last = now
        self.stop = True
        if self._raises:
            self._interrupt()

    def _interrupt(self) -> NoReturn:
        self._raises, self._warned = False, True
        raise KeyboardInterrupt

    def _watch(self) -> None:
        last, end, code = -math.inf, math.inf, 0
        while True:
            left = max(0.0, end - time.monotonic()) if code else None
            if not select.select([self._read_end], [], [], left)[0]:
                self._restore()
                os._exit(code)
            numbers = os.read(self._read_end, 64)
            if not numbers:
                os.close(self._read_end)
                return
            for number in numbers:
                now = time.monotonic()
                twice = number == signal.SIGINT and now - last < TWICE_SECONDS
                last = now if number == signal.SIGINT else last
                self.leave = self.leave or twice  # the handler may run late and not see it
                if not code and (twice or number == signal.SIGTERM):
                    code = EXIT_SIGINT if twice else EXIT_SIGTERM
                    end = now + END_SECONDS


# ---------------------------------------------------------------- input


class Reader:
    """Lines of stdin, joined to messages. Line editing and input history where both ends are terminals.

    Args:
        words: completed with Tab at the beginning of a line.
    """

    def __init__(self, interrupts: Interrupts, words: Sequence[str] = ()) -> None:
        self._interrupts = interrupts
        self.is_terminal = sys.stdin.isatty()
        self._edits = self.is_terminal and sys.stdout.isatty()
        if self._edits:
            _set_up_readline(words)

    def message(self) -> tuple[str, bool]:
        """The next message, and whether it is a text whatever it begins with.

        Raises:
            EOFError: there is no more input.
            KeyboardInterrupt: Ctrl-C; what had been typed is dropped.
        """
        line = self._line("> ")
        if line.startswith(BLOCK):
            lines = [line.removeprefix(BLOCK)]
            with contextlib.suppress(EOFError):
                while not lines[-1].rstrip().endswith(BLOCK):
                    lines.append(self._line(". "))
            text = "\n".join(lines).rstrip()
            return text.removesuffix(BLOCK).strip("\n"), True
        with contextlib.suppress(EOFError):
            while line.endswith("\\"):
                line = f"{line[:-1]}\n"
                line += self._line(". ")
        return line, False

    def _line(self, prompt: str) -> str:
        try:
            with self._interrupts.raising():
                return input(prompt) if self._edits else self._plain_line(prompt)
        except (EOFError, KeyboardInterrupt):
            if self.is_terminal:  # what comes next must not stand behind the prompt
                print(file=sys.stderr, flush=True)
            raise

    def _plain_line(self, prompt: str) -> str:
        if self.is_terminal:
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except OSError:  # the terminal is gone
            line = ""
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


def _set_up_readline(words: Sequence[str]) -> None:
    import readline

    def complete(text: str, state: int) -> str | None:
        found = [word for word in words if word.startswith(text)]
        return found[state] if readline.get_begidx() == 0 and text and state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("tab: complete")
        # A pasted text of many lines comes as one line of input.
        readline.parse_and_bind("set enable-bracketed-paste on")


# ---------------------------------------------------------------- output


class Figures:
    """How many tokens, how fast, and how full the context is. The rate is that of the tokens after
    the first, whose time is that of the prompt.
    """

    def __init__(self, prompt_tokens: int, limit: int) -> None:
        self.prompt_tokens, self.limit, self.tokens = prompt_tokens, limit, 0
        self._first = self._last = 0.0

    def add(self, tokens: int) -> None:
        if tokens:
            self._last = time.perf_counter()
            self._first = self._first or self._last
            self.tokens += tokens

    def __str__(self) -> str:
        seconds = self._last - self._first
        rate = f", {(self.tokens - 1) / seconds:.1f} tokens/s" if seconds > 0 else ""
        many = "" if self.tokens == 1 else "s"
        return (
            f"{self.tokens} token{many}{rate}, "
            f"context {self.prompt_tokens + self.tokens}/{self.limit}"
        )


class Screen:
    """Where text goes. ``console`` is stdout's; tests pass their own."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._notes = Console(stderr=True, highlight=False)
        # Not console.is_terminal, which an environment variable can set: a pipe gets text only.
        self._is_live = self._console.file.isatty() and not self._console.is_dumb_terminal

    def say(self, text: str, style: str = "dim") -> None:
        """Something for the user that is no model text."""
        if sys.stderr.isatty():
            self._notes.print(Text(neutral(text), style=style), soft_wrap=True)
        else:
            with contextlib.suppress(OSError):  # whoever read our stderr may be gone
                print(neutral(text), file=sys.stderr, flush=True)

    def answer(self, figures: Figures) -> "PlainAnswer | LiveAnswer":
        return LiveAnswer(self._console, figures) if self._is_live else PlainAnswer(figures)


class PlainAnswer:
    """An answer on a pipe or a file: text only, as it comes; figures go to stderr."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._begun = self._mid_line = False

    def __enter__(self) -> "PlainAnswer":
        return self

    def add(self, text: str, tokens: int) -> None:
        self._figures.add(tokens)
        text = text if self._begun else text.lstrip()
        if text:
            self._begun, self._mid_line = True, not text.endswith("\n")
            print(neutral(text), end="", flush=True)

    def __exit__(self, *_: object) -> None:
        if self._mid_line or not self._begun:  # an empty answer is a line too
            print(flush=True)


class LiveAnswer:
    """An answer on a terminal. Rows are printed for good as they fill up; only the row that grows
    and a line of figures below it are drawn again, so that an answer may be longer than the screen.
    """

    def __init__(self, console: Console, figures: Figures) -> None:
        self._console, self._figures = console, figures
        self._row, self._begun, self._drawn = "", False, 0.0
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> "LiveAnswer":
        self._live.start()
        self._draw()
        return self

    def add(self, text: str, tokens: int) -> None:
        self._figures.add(tokens)
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        *lines, row = (self._row + neutral(text)).split("\n")
        done = [part for line in lines for part in self._wrapped(line)]
        *more, self._row = self._wrapped(row)
        done += more
        if done:
            self._draw(refresh=False)  # printing draws it again, below
            self._console.print(Text("\n".join(done)))
        elif time.perf_counter() - self._drawn > FRAME_SECONDS:
            self._draw()

    def _wrapped(self, line: str) -> list[str]:
        rows = Text(line).wrap(self._console, self._console.width, overflow="fold")
        return [row.plain for row in rows] or [""]

    def _draw(self, refresh: bool = True) -> None:
        self._drawn = time.perf_counter()
        figures = Text(str(self._figures), style="dim", no_wrap=True, overflow="ellipsis")
        self._live.update(Group(Text(self._row), figures), refresh=refresh)

    def __exit__(self, *_: object) -> None:
        self._live.update(Text(""))
        self._live.stop()
        if self._row or not self._begun:
            self._console.print(Text(self._row))
