"""Signals that ask this program to end become exceptions, at places where that is safe."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from tprt.cli.common import Terminated

AGAIN_SECONDS = 0.05


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise ``Terminated``, SIGINT KeyboardInterrupt, unless it is ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL):
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, _raise) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    if _is_importing(frame):
        # There it would be swallowed by some, and leave half a module behind in others.
        again = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        raise Terminated(signal.Signals(number).name)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
