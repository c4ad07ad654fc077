"""Starts N ranks of this program on this host through torch's own launcher."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from tprt.checkpoint import open_checkpoint
from tprt.cli.common import LAUNCHER, llm_options
from tprt.cli.settings import Settings
from tprt.distributed.launcher import find_nodes, launch
from tprt.llm import open_tokenizer, resolve_config, resolve_vocabulary

SECONDS_TO_END = 10
ENDING = ("SIGTERM", "SIGHUP", "SIGQUIT")  # what torch's launcher ends the ranks on, but for Ctrl-C


def check_start(settings: Settings, ranks: int) -> None:
    """Find what is wrong with a checkpoint, or with what is asked of it, before any rank starts."""
    model = settings.model
    reader = open_checkpoint(model.path)
    resolve_config(reader, llm_options(model)).validate_parallel(ranks)
    tokenizer = open_tokenizer(reader, model.tokenizer, model.bos_policy)
    resolve_vocabulary(reader.config.vocab_size, tokenizer, model.trim_vocab)


def launch_local(
    ranks: int, arguments: list[str], *, interactive: bool = False, max_restarts: int = 0
) -> int:
    """Run ``python -m tprt *arguments`` on ``ranks`` local ranks; their exit code.

    A rank ended by a signal counts as a rank failure (6).

    Args:
        interactive: hand Ctrl-C on to the ranks instead of ending them.
        max_restarts: how often to start them again after a failure that a new start may cure; not
            for what is interactive.
    """
    command = ["-m", "tprt", *arguments]
    if not interactive:
        return launch(find_nodes(1), ranks, command, max_restarts)
    with _terminal_signals_handed_on(ranks):
        return launch(find_nodes(1), ranks, command, signals=ENDING)


@contextlib.contextmanager
def _terminal_signals_handed_on(ranks: int) -> Iterator[None]:
    """Ranks live in sessions of their own, so what the terminal sends reaches this process alone.

    Ctrl-Z would stop it while rank 0 goes on reading the terminal, so it is ignored. Torch gives a
    rank that does not end half a minute; after a Ctrl-C those that outlive another get less.
    """

    def hand_on(number: int, _: FrameType | None) -> None:
        there = list(_children())
        if not there and number == signal.SIGINT:
            raise KeyboardInterrupt
        if len(there) < ranks and number != signal.SIGWINCH:
            number = signal.SIGKILL
        if number == signal.SIGINT:
            signal.alarm(SECONDS_TO_END)
        for rank in there if number != signal.SIGALRM else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, number)

    numbers = signal.SIGINT, signal.SIGALRM, signal.SIGWINCH
    before = {number: signal.signal(number, hand_on) for number in numbers}
    before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[LAUNCHER]
        signal.alarm(0)
        for known, handler in before.items():
            signal.signal(known, handler)


def _children() -> Iterator[int]:
    """Child processes in sessions of their own; torch's launcher does not tell their ids."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                # The name of the program, in brackets, may itself hold blanks and brackets.
                fields = (folder / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
                parent, session = int(fields[1]), int(fields[3])
                if parent == os.getpid() and session != os.getsid(0):
                    yield int(folder.name)
