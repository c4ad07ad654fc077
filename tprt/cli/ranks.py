"""How the ranks of this program watch one another, and how they end: together, by name, within seconds.

Knows the watch, signals and the terminal; what is to be done before a process leaves, as closing a
journal, is handed in.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from tprt.cli.common import Terminated
from tprt.cli.parent import DETECT, launcher_pid
from tprt.cli.signals import AGAIN_SECONDS
from tprt.distributed.failure import INTERRUPTED, Failure
from tprt.distributed.tp_group import launch_store, launched_size
from tprt.distributed.verdict import Limits
from tprt.distributed.watch import Watch
from tprt.errors import EXIT_BUG, EXIT_SIGINT, EXIT_SIGTERM, PeerLost, TprtError, out_of_memory
from tprt.log import report

# The main thread is given this long to end by itself: after a failure elsewhere, after a signal.
FAILURE_GRACE, SIGNAL_GRACE, LEAVE_SECONDS = 1.0, 3.0, 8.0
DONE_SECONDS = 5.0
CONNECT_SECONDS = 10.0
ENDING = (signal.SIGTERM, signal.SIGUSR1)
SHOWN_STACK_LINES = 12


class Ending:
    """How a process that has no peers ends: it saves its work, also when its main thread is stuck.

    Attributes:
        watch: over the ranks; None without peers.
        before_end: called once with the failure before the process leaves; must not block long.
    """

    def __init__(self) -> None:
        self.watch: Watch | None = None
        self.before_end: list[Callable[[Failure], None]] = []
        self._claimed = threading.Lock()

    def begin(self) -> None:
        """From here on signals are heard."""

    def close(self) -> None:
        """The work is done."""

    def end(self, error: BaseException) -> None:
        """Save what can be saved; the caller goes on to tell of ``error``."""
        if self._claimed.acquire(blocking=False):
            self._save(_alone(error))

    def on_signal(self, number: int) -> None:
        """On a thread of its own: the main thread may be where no Python handler runs."""
        time.sleep(SIGNAL_GRACE)
        _leave_in(
            LEAVE_SECONDS, EXIT_SIGTERM
        )  # also where the main thread saves, or speaks to nobody
        if self._claimed.acquire(blocking=False):
            name = signal.Signals(number).name
            self._save(_alone(Terminated(name)))
            _say(f"tprt: ended by {name}")
            os._exit(EXIT_SIGTERM)

    def _save(self, failure: Failure) -> None:
        for hook in self.before_end:
            with contextlib.suppress(Exception):  # what failed has been told; the code stays
                hook(failure)


class RankEnding(Ending):
    """How a rank among others ends: with all of them, and with the name of the first that failed.

    Args:
        debug: print tracebacks.
    """

    def __init__(self, limits: Limits, debug: bool) -> None:
        super().__init__()
        self.limits, self.debug = limits, debug

    def begin(self) -> None:
        rank, parent = int(os.environ["RANK"]), launcher_pid()
        detect = frozenset(filter(None, os.environ.get(DETECT, ",".join(Watch.ALL)).split(",")))
        if "launcher" in detect:
            _check_launcher_lives()
        store, size = launch_store("watch"), launched_size()
        self.watch = Watch(store, rank, size, self.limits, self._on_failure, parent, detect).start()

    def close(self) -> None:
        """The work of this rank is done. Rank 0, whose code counts, leaves last."""
        assert self.watch is not None
        if self.watch.rank == 0:
            self.watch.wait_for_others(DONE_SECONDS)
        self.watch.close()

    def end(self, error: BaseException) -> None:
        """Leave because of ``error``, or of what is behind it; from the main thread.

        Comes back only where the ranks have not met yet.
        """
        watch = self.watch
        if watch is None:
            return
        _deaf_to_signals()
        if self.debug:
            traceback.print_exception(error)
        if isinstance(error, Exception) and (told := out_of_memory(error)) is not None:
            error = told
        if isinstance(error, Terminated):
            failure = watch.interrupted(f"ended by {error}", EXIT_SIGTERM)
        elif isinstance(error, KeyboardInterrupt):
            failure = watch.interrupted("interrupted", EXIT_SIGINT)
        elif isinstance(error, PeerLost):
            if watch.failure is None:
                _say(f"[rank {watch.rank}] {error.what}; asking which rank was first")
            failure = watch.explain() or watch.fail(watch.of(error, error.exit_code))
        else:
            failure = watch.fail(watch.of(error, _code(error, PeerLost.exit_code)))
        self._leave(watch, failure, error)

    def _on_failure(self, failure: Failure) -> None:
        """On the watch's thread. The main thread, told by its waits, may come to ``end`` itself."""
        time.sleep(FAILURE_GRACE)
        assert self.watch is not None
        self._leave(self.watch, failure, None)

    def on_signal(self, number: int) -> None:
        """On a thread of its own: the main thread may be where no Python handler runs."""
        if (
            self.watch is None
        ):  # the main thread waits for the others, in C code, perhaps for minutes
            _say(f"tprt: ended by {signal.Signals(number).name}")
            os._exit(EXIT_SIGTERM)
        time.sleep(SIGNAL_GRACE)
        what = f"ended by {signal.Signals(number).name}"
        self._leave(self.watch, self.watch.interrupted(what, EXIT_SIGTERM), None)

    def _leave(self, watch: Watch, failure: Failure, error: BaseException | None) -> NoReturn:
        if not self._claimed.acquire(blocking=False):
            time.sleep(3600)  # another thread of this process is leaving
        _leave_in(LEAVE_SECONDS, failure.code)  # a disk or a reader of stderr may keep us for ever
        watch.end_stuck_peer()  # first: what speaks for it must not meet it
        self._save(failure)
        _say(self._message(watch.rank, failure, error))
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(failure.code)

    def _message(self, rank: int, failure: Failure, error: BaseException | None) -> str:
        if failure.interrupted:
            return f"tprt: {failure.what}" if rank == failure.rank else ""
        own = getattr(error, "what", None)
        if own is not None and rank != failure.rank and failure.what.endswith(own):
            return ""  # every rank has found the same
        if rank == failure.rank and failure.kind == "exception" and error is not None:
            if isinstance(error, TprtError):
                return f"tprt: error: {error}"
            lines = [f"tprt: error: {failure.what}", *failure.stack[-SHOWN_STACK_LINES:]]
            return "\n".join(
                [*lines, "  try:   the same command resumes; if it happens again, report it"]
            )
        told = [f"tprt: error: ended because of {failure.what}"]
        if failure.kind == "exception":
            return f"[rank {rank}] {told[0]}"  # the rank itself says the rest
        told += [f"  where: {failure.place}"] if failure.place else []
        told += [f"  try:   {failure.hint}"] if failure.hint else []
        if (
            failure.kind != "exception"
            and failure.stack
            and (rank == 0 or failure.rank in (0, rank))
        ):
            told += ["  its last known stack:", *failure.stack[-SHOWN_STACK_LINES:]]
        return "\n".join(f"[rank {rank}] {line}" for line in told if line)


@contextlib.contextmanager
def ending_together(limits: Limits, debug: bool) -> Iterator[Ending]:
    """Under a launcher of several ranks the block runs under a watch, and an error in it ends this
    process together with the others. Alone, an error is raised on after its work was saved.
    """
    ending = Ending() if launched_size() == 1 else RankEnding(limits, debug)
    with _signals_seen(ending.on_signal):
        try:
            ending.begin()
            yield ending
        except BaseException as error:
            ending.end(error)
            raise
        ending.close()


def run_together(limits: Limits, debug: bool, work: Callable[[Ending], int]) -> int:
    """``work`` in ``ending_together``; its exit code."""
    begun: list[Ending] = []
    try:
        with ending_together(limits, debug) as ending:
            begun.append(ending)
            return work(ending)
    except (Terminated, KeyboardInterrupt) as error:
        # Ranks come here when a signal's exception took the place of another, on that one's way to
        # ``end``: between two lines of contextlib, say.
        for ending in begun:
            ending.end(error)
        raise


@contextlib.contextmanager
def _signals_seen(tell: Callable[[int], None]) -> Iterator[None]:
    """Call ``tell`` on a thread for SIGTERM and SIGUSR1 even while the main thread is in C code."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the business of whoever has the main thread
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def read() -> None:
        while number := os.read(reading, 1):
            if number[0] in ENDING:
                tell(number[0])
        os.close(reading)

    threading.Thread(target=read, name="tprt-signals", daemon=True).start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)  # the thread reads the end and leaves


def _deaf_to_signals() -> None:
    """A launcher that sees a rank end asks the others to: what this one is about to say comes first."""
    while True:
        try:
            for number in (*ENDING, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            return
        except (Terminated, KeyboardInterrupt):
            pass  # it came just before


def _leave_in(seconds: float, code: int) -> None:
    """Whatever else happens: this process ends after so long."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()


def _check_launcher_lives() -> None:
    """One that ended while this rank began, before the kernel was asked to tell, leaves no other trace.

    Raises:
        PeerLost: nothing listens where its store has been from before this rank was started.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return  # rank 0 is about to make the store
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection(where, CONNECT_SECONDS).close()
    except ConnectionRefusedError as error:
        time.sleep(2 * AGAIN_SECONDS)  # for a signal that tells more
        hint = "the same command starts the job again"
        raise PeerLost("the launcher has ended before its ranks had begun", hint=hint) from error
    except OSError:
        pass  # a network that is slow to come up: who connects next has more patience


def _alone(error: BaseException) -> Failure:
    if isinstance(error, Terminated):
        return Failure(INTERRUPTED, 0, f"ended by {error}", EXIT_SIGTERM)
    if isinstance(error, KeyboardInterrupt):
        return Failure(INTERRUPTED, 0, "interrupted", EXIT_SIGINT)
    code = _code(error, EXIT_BUG)
    if isinstance(error, TprtError):
        return Failure("exception", 0, error.what, code, where=error.where, hint=error.hint)
    stack = "".join(traceback.format_exception(error)).splitlines()
    return Failure("exception", 0, f"{type(error).__name__}: {error}", code, stack=stack)


def _code(error: BaseException, otherwise: int) -> int:
    if isinstance(error, TprtError) and type(error) is not TprtError:  # that is another rank's bug
        return error.exit_code
    told = out_of_memory(error) if isinstance(error, Exception) else None
    return told.exit_code if told is not None else otherwise


def _say(text: str) -> None:
    if text:
        report(text)
