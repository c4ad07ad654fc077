"""Whether processes of this host live, are stopped, or how they ended. Linux only; knows no ranks."""

import os
import select
import signal
import socket
from dataclasses import dataclass
from pathlib import Path


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
        self.pid, self.fd = pid, -1
        self._status: int | None = None
        state = process_state(pid)
        if state is not None and state.started == started:
            try:
                self.fd = os.pidfd_open(pid)
            except OSError:  # ended just now
                self.fd = -1

    @property
    def gone(self) -> bool:
        return self.fd < 0

    def ended(self) -> int | None:
        """Call when ``fd`` is readable: the wait status where it can still be read; lets go."""
        state = process_state(self.pid)
        if state is not None and state.state == "Z":
            self._status = state.exit_status
        self.close()
        return self._status

    @property
    def stopped(self) -> bool:
        state = process_state(self.pid) if not self.gone else None
        return state is not None and state.stopped

    def wait(self, seconds: float) -> None:
        """Until it has ended, at most so long."""
        if not self.gone:
            select.select([self.fd], [], [], seconds)

    def kill(self) -> None:
        if not self.gone:
            try:
                signal.pidfd_send_signal(self.fd, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
