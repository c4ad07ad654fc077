"""Whether processes of this host live, are stopped, or how they ended. Linux only; knows no ranks."""

import contextlib
import os
import select
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS, KILLED_SECONDS = 0.02, 1.0


@dataclass(frozen=True)
class ProcessState:
    """One line of ``/proc/PID/stat``.

    Args:
        state: its letter: R, S, D run; T, t are stopped; Z has ended and is not yet collected.
        started: clock ticks after boot; tells a process from a later one with the same number.
        exit_status: as of ``wait``, known once the state is Z.
    """

    state: str
    started: int
    exit_status: int

    @property
    def stopped(self) -> bool:
        return self.state in "Tt"


def process_state(pid: int) -> ProcessState | None:
    """None when there is no such process any more."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    # The name of the program, in brackets, may itself hold blanks and brackets.
    fields = text.rpartition(")")[2].split()
    return ProcessState(fields[0], int(fields[19]), int(fields[49]))


def how_it_ended(status: int | None) -> tuple[str, str]:
    """(kind of ``Failure``, words) for a wait status; None where nobody could read it."""
    if status is None:
        return "killed", "has died"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        kind = "killed" if number == signal.SIGKILL else "died"
        return kind, f"was ended by signal {number} ({signal.Signals(number).name})"
    return "exited", f"left with code {os.WEXITSTATUS(status)} before the work was over"


def host_identity() -> str:
    """The same text for all processes that see one another's process ids and share a network."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "/".join([boot, *(str(os.stat(f"/proc/self/ns/{n}").st_ino) for n in ("pid", "net"))])


def host_name() -> str:
    return socket.gethostname()


class PeerProcess:
    """A process of this host, held by a file descriptor so that its number cannot come to mean another.

    Args:
        started: of ``ProcessState``, as the process itself said.
    """

    def __init__(self, pid: int, started: int) -> None:
        self.pid, self.started, self.fd = pid, started, -1
        self.gone = not self._is_there()
        if not self.gone:
            try:
                self.fd = os.pidfd_open(pid)
            except ProcessLookupError:  # ended just now
                self.gone = True
            except OSError:  # an old kernel, a sandbox, no descriptor left: /proc has to do
                self.fd = -1

    def _is_there(self) -> bool:
        state = process_state(self.pid)
        return state is not None and state.started == self.started and state.state not in "ZX"

    @property
    def has_ended(self) -> bool:
        if self.gone or self.fd < 0:
            return self.gone or not self._is_there()
        return _any_readable([self.fd], 0)

    def let_go(self) -> int | None:
        """Of one that has ended: its wait status, where that can still be read."""
        self.gone, state = True, process_state(self.pid)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if state is None or state.started != self.started or state.state != "Z":
            return None
        return state.exit_status

    @property
    def stopped(self) -> bool:
        state = process_state(self.pid) if not self.gone else None
        return state is not None and state.stopped

    def wait(self, seconds: float) -> None:
        """Until it has ended, at most so long."""
        until = time.monotonic() + seconds
        while not self.has_ended and time.monotonic() < until:
            time.sleep(POLL_SECONDS)

    def kill(self) -> None:
        if not self.has_ended:
            with contextlib.suppress(OSError):
                if self.fd >= 0:
                    signal.pidfd_send_signal(self.fd, signal.SIGKILL)
                else:
                    os.kill(self.pid, signal.SIGKILL)


def _any_readable(fds: list[int], seconds: float) -> bool:
    poll = select.poll()  # ``select.select`` ends at descriptor 1023
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class PeerProcesses:
    """The processes of the other ranks of this host, by rank.

    Attributes:
        ended: when each was seen to have ended, on the monotonic clock, and its wait status.
    """

    def __init__(self) -> None:
        self.ended: dict[int, tuple[float, int | None]] = {}
        self._running: dict[int, PeerProcess] = {}

    def add(self, rank: int, pid: int, started: int) -> None:
        self._running[rank] = PeerProcess(pid, started)

    def wait(self, seconds: float) -> None:
        """Until one ends, at most so long; on one thread only."""
        fds = [process.fd for process in self._running.values() if process.fd >= 0]
        _any_readable(fds, seconds)
        for rank, process in list(self._running.items()):
            if process.has_ended:
                del self._running[rank]
                self.ended[rank] = time.monotonic(), process.let_go()

    @property
    def any_ended(self) -> bool:
        """From any thread: also what ``wait`` has not come to yet."""
        return bool(self.ended) or any(p.has_ended for p in list(self._running.values()))

    def stopped(self) -> list[int]:
        """Ranks that are stopped, as by SIGSTOP."""
        return [rank for rank, process in list(self._running.items()) if process.stopped]

    def end(self, rank: int, patience: float) -> None:
        """Kill a rank that does not end by itself within ``patience`` seconds."""
        process = self._running.get(rank)
        if process is not None:
            process.wait(patience)
            process.kill()
            process.wait(KILLED_SECONDS)  # until then it holds its locks

    def close(self) -> None:
        for process in self._running.values():
            process.let_go()
        self._running.clear()
