"""The self-test of collectives: ranks are started, or met, and the one that does not answer is named.

Ranks run on this host as processes of this one, or were started by a launcher. What each does is in
``collectives``. Knows processes and the store through which ranks meet.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore

from tprt.cli.doctor_probes.collectives import take_part
from tprt.distributed.liveness import host_identity
from tprt.distributed.rendezvous import LOOPBACK, listening_store
from tprt.distributed.tp_group import launch_store
from tprt.host_limits import usable_cpus

NAME = "doctor"  # of the store's prefix
START_SECONDS = 60.0  # for a rank to import torch and show itself, on a busy machine
# A rank that shows no sign of life for this long is not merely waiting.
BEAT_LOST = 5.0
POLL_SECONDS, GRACE_SECONDS, LEAVE_SECONDS, TELL_SECONDS = 0.05, 1.5, 5.0, 60.0
SHOWN_LINES = 4
_PR_SET_PDEATHSIG = 1

Ended = Callable[[int], int | None]


@dataclass(frozen=True)
class Outcome:
    """What came of a self-test.

    Args:
        size: of the launch.
        answers: of the ranks that have ended the test, by rank.
        failures: sentences, those of the first cause.
        stuck: whether ranks may still hang in a collective.
        silent: ranks without a sign of life.
        said: last lines of output of ranks without an answer.
    """

    size: int
    answers: dict[int, dict[str, Any]]
    failures: list[str]
    stuck: bool = False
    silent: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    @property
    def microseconds(self) -> dict[str, float]:
        """Of each case the median time on the slowest rank."""
        told = [answer["us"] for answer in self.answers.values() if "us" in answer]
        return {name: max(us[name] for us in told) for name in told[0]} if told else {}


def start_ranks(size: int, device: str | None, limit: float) -> Outcome:
    """Test ``size`` ranks on this host; none of them is left afterwards.

    Args:
        device: ``cpu``, ``cuda``, or None for a GPU each where there is one.
        limit: seconds in which some rank must get on.
    """
    store = listening_store(LOOPBACK)
    with tempfile.TemporaryDirectory() as folder, _processes() as started:
        for rank in range(size):
            said = Path(folder, f"{rank}")
            started.append(_start(rank, size, device, store.port, said))
        outcome = watch(
            PrefixStore(f"tprt/0/{NAME}", store), size, limit, lambda rank: started[rank].poll()
        )
        if outcome.failures:
            return replace(outcome, said=_last_words(outcome, Path(folder)))
        _leave(started)
    return outcome


@contextlib.contextmanager
def joined_ranks(device: str | None, limit: float) -> Iterator[Outcome]:
    """Test the ranks of a launcher, of which this is one; all get the same outcome. Collective.

    The block is to tell it. A launcher ends all ranks as soon as one has failed, so the others wait
    until rank 0 has left its block; stopped ranks of its host it ends, for which launchers take long.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = launch_store(NAME)
    part = threading.Thread(target=take_part, args=(launch_store(NAME), rank, device), daemon=True)
    part.start()
    outcome = watch(store, size, limit)
    yield outcome
    with contextlib.suppress(RuntimeError):  # the store is gone, and so is rank 0
        store.set(f"left/{rank}", "")
        if rank == 0:
            _end_stopped(store, outcome)
            # The store may live in this process.
            others = [f"left/{other}" for other in range(1, size)]
            _wait_for(store, others, 0 if outcome.failures else LEAVE_SECONDS)
        elif outcome.failures:
            _wait_for(store, ["left/0"], TELL_SECONDS)


def _wait_for(store: Any, keys: list[str], seconds: float) -> None:
    until = time.monotonic() + seconds
    while keys and not store.check(keys) and time.monotonic() < until:
        time.sleep(POLL_SECONDS)


def _end_stopped(store: Any, outcome: Outcome) -> None:
    for rank in outcome.silent:
        if store.check([f"who/{rank}"]):
            pid, host = json.loads(store.get(f"who/{rank}"))
            if host == host_identity() and pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def rank_main() -> None:
    """A rank that ``start_ranks`` started. Its arguments: the device, and who started it."""
    # Whoever started this may be killed, or have been.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() == int(sys.argv[2]):
        take_part(launch_store(NAME), int(os.environ["RANK"]), sys.argv[1] or None)


def _start(
    rank: int, size: int, device: str | None, port: int, said: Path
) -> subprocess.Popen[bytes]:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    meeting = {
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    env = {"OMP_NUM_THREADS": str(max(1, usable_cpus() // size))} | os.environ
    env |= {name: str(value) for name, value in (here | meeting).items()}
    code = f"from {__name__} import rank_main; rank_main()"
    with said.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", code, device or "", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=env,
        )


@contextlib.contextmanager
def _processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that are gone when the block ends, however it ends."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield started
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def _leave(started: list[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + LEAVE_SECONDS
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))


def _last_words(outcome: Outcome, folder: Path) -> list[str]:
    """The end of what failed ranks printed."""
    lines = []
    for rank in sorted(set(range(outcome.size)) - set(outcome.answers))[:SHOWN_LINES]:
        text = (folder / f"{rank}").read_text("utf-8", "replace").strip().splitlines()
        lines += [f"rank {rank}: {line}" for line in text[-SHOWN_LINES:]]
    return lines


def watch(store: Any, size: int, limit: float, ended: Ended = lambda rank: None) -> Outcome:
    """Wait for the answers of all ranks, for at most ``limit`` seconds in which none of them gets on,
    and longer until all have begun.

    Args:
        ended: the code a rank's process has ended with; None while it runs or where nobody knows.
    """
    watched = _Watched(store, size, ended)
    while len(watched.answers) < size:
        try:
            watched.look()
        except RuntimeError as error:  # torch's, of a store
            lost = f"the store through which the ranks met is gone ({str(error).splitlines()[0]}): "
            return Outcome(size, {}, [lost + "its launcher or host has ended"], stuck=True)
        allowed = limit if watched.begun else max(limit, START_SECONDS)
        if watched.failed_for > GRACE_SECONDS or watched.still_for > allowed:
            break
        time.sleep(POLL_SECONDS)
    return watched.outcome(limit)


class _Watched:
    """What is known of the ranks, from what they posted."""

    def __init__(self, store: Any, size: int, ended: Ended) -> None:
        self.store, self.size, self.ended = store, size, ended
        self.answers: dict[int, dict[str, Any]] = {}
        self.codes: dict[int, int] = {}
        self.doing = dict.fromkeys(range(size), (0, "start"))
        self.moved = time.monotonic()
        self.beats = dict.fromkeys(range(size), ("", self.moved))
        self.failed: float | None = None

    @property
    def begun(self) -> bool:
        return all(step > 0 for step, _ in self.doing.values())

    @property
    def still_for(self) -> float:
        return time.monotonic() - self.moved

    @property
    def failed_for(self) -> float:
        """Since a rank was seen to fail: the others may still say more."""
        return 0.0 if self.failed is None else time.monotonic() - self.failed

    def look(self) -> None:
        for rank in range(self.size):
            if rank in self.answers:
                continue
            code = self.ended(rank)  # before its answer, which it gives first
            if answer := self._read(f"answer/{rank}"):
                self.answers[rank] = json.loads(answer)
                self.moved = time.monotonic()
                continue
            if code is not None:
                self.codes[rank] = code
            post = self._read(f"doing/{rank}")
            if post and (now := tuple(json.loads(post))) != self.doing[rank]:
                self.doing[rank], self.moved = now, time.monotonic()
            if (beat := self._read(f"beat/{rank}")) != self.beats[rank][0]:
                self.beats[rank] = beat, time.monotonic()
        bad = self.codes or any("error" in answer for answer in self.answers.values())
        if bad and self.failed is None:
            self.failed = time.monotonic()

    def _read(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def outcome(self, limit: float) -> Outcome:
        answers = {rank: a for rank, a in self.answers.items() if "error" not in a}
        failures = self._causes(limit) or [
            f"rank {rank} got a wrong result: {wrong}"
            for rank, answer in sorted(answers.items())
            for wrong in answer["wrong"]
        ]
        if not failures:
            failures = _differences(answers)
        waiting = [rank for rank in range(self.size) if rank not in self.answers]
        silent = self._silent(waiting, limit) if failures else []
        return Outcome(self.size, answers, failures, bool(waiting), silent)

    def _silent(self, waiting: list[int], limit: float) -> list[int]:
        lost, now = min(BEAT_LOST, limit / 2), time.monotonic()
        return [rank for rank in waiting if now - self.beats[rank][1] > lost]

    def _causes(self, limit: float) -> list[str]:
        """Why there is no answer: a rank that died, else one that raised, else the one behind all."""
        for rank, code in sorted(self.codes.items()):
            if rank not in self.answers:
                return [f"rank {rank} {_how(code)}, last at {self.doing[rank][1]!r}"]
        errors = {rank: a for rank, a in sorted(self.answers.items()) if "error" in a}
        own = {rank: a for rank, a in errors.items() if not a["victim"]}
        waiting = sorted(set(range(self.size)) - set(self.answers))
        if own or (errors and not waiting):
            return [
                f"rank {rank} failed at {answer['doing']!r} with {answer['error']}"
                for rank, answer in (own or errors).items()
            ]
        return self._behind(waiting, limit, lost=bool(errors)) if waiting else []

    def _behind(self, waiting: list[int], limit: float, lost: bool) -> list[str]:
        """Of the ranks without an answer those without a sign of life, else those that are behind."""
        silent = self._silent(waiting, limit)
        first = min(self.doing[rank][0] for rank in waiting)
        behind = [rank for rank in waiting if self.doing[rank][0] == first]
        named = silent if silent and len(silent) < len(waiting) else behind
        if len(named) == self.size > 1 and first:
            return [
                f"no rank got through {self.doing[named[0]][1]!r} within {limit:g} s: all wait there; "
                "look at the network or the links between them, with NCCL_DEBUG=INFO on GPUs"
            ]
        said = []
        for rank in named:
            step, doing = self.doing[rank]
            seconds = self.still_for
            if not step:
                said.append(f"rank {rank} has not begun within {seconds:.0f} s: was it started?")
                continue
            what = "it is stopped, or its host is gone" if rank in silent else "it is stuck"
            what = "others lost it, so it has died: look for its own message" if lost else what
            said.append(
                f"rank {rank} has not answered for {seconds:.0f} s, last at {doing!r}: {what}"
            )
        return said


def _how(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was ended by SIGKILL, as when the host runs out of memory (see dmesg)"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with code {code}"


def _differences(answers: dict[int, dict[str, Any]]) -> list[str]:
    """Ranks that run other versions than rank 0."""
    said = []
    for name, first in answers[0]["versions"].items():
        other = {r: a["versions"][name] for r, a in answers.items() if a["versions"][name] != first}
        if other:
            rank, version = next(iter(other.items()))
            said.append(
                f"rank {rank} runs {name} {version}, rank 0 {first}: install the same everywhere"
            )
    return said
