"""Starts N ranks of this program on this host through torch's own launcher."""

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tprt.checkpoint import open_checkpoint
from tprt.cli.common import LAUNCHER
from tprt.cli.settings import Settings
from tprt.distributed.launcher import find_nodes, launch
from tprt.errors import EXIT_OK, EXIT_SIGINT, EXIT_SIGTERM, PeerLost
from tprt.llm import open_tokenizer, resolve_vocabulary

SECONDS_TO_END = 10
ENDING = "SIGTERM,SIGHUP,SIGQUIT"  # what torch's launcher ends the ranks on, but for Ctrl-C


def check_start(settings: Settings, ranks: int) -> None:
    """Find what is wrong with a checkpoint before any rank starts."""
    model = settings.model
    reader = open_checkpoint(model.path)
    reader.config.validate_parallel(ranks)
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
    if not interactive:
        return launch(find_nodes(1), ranks, ["-m", "tprt", *arguments], max_restarts)
    return _launch_interactive(ranks, arguments)


def _launch_interactive(ranks: int, arguments: list[str]) -> int:
    # Ranks that each take every core slow one another down many times over.
    threads = max(1, (os.cpu_count() or 1) // ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        metrics_cfg={},
        signals_to_handle=ENDING,
    )
    try:
        with _terminal_signals_handed_on(ranks):
            elastic_launch(config, sys.executable)("-m", "tprt", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == -signal.SIGINT:  # before it had a handler
            return EXIT_SIGINT
        if failure.exitcode < 0:
            raise PeerLost(
                f"rank {rank} was ended by signal {-failure.exitcode}",
                where=f"process {failure.pid}",
                hint="the same command starts the job again",
            ) from error
        return int(failure.exitcode)
    except SignalException as error:
        return EXIT_SIGINT if error.sigval.name == "SIGINT" else EXIT_SIGTERM
    return EXIT_OK


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
