"""Ranks end with their launcher, from their first moment on. Imports nothing that takes time."""

import ctypes
import os
import signal

# The launcher's process id, told by ours; torch's tells nothing, and may itself be a child of ours.
LAUNCHER_PID = "TPRT_LAUNCHER_PID"
RUN_ID, OURS = "TORCHELASTIC_RUN_ID", "tprt-"
# Kinds of failure that are looked for; tests switch single ones off.
DETECT = "TPRT_WATCH"
PR_SET_PDEATHSIG = 1
LOST = 6


def launcher_pid() -> int:
    """Of the process that started this rank, which may have ended meanwhile."""
    ours = os.environ.get(RUN_ID, "").startswith(OURS)
    return int(os.environ.get(LAUNCHER_PID) or os.getppid()) if ours else os.getppid()


def end_with_launcher() -> None:
    """The kernel ends this rank with its launcher; rank 0 by a signal that lets it save its work.

    Under a launcher of torch's kind only: another starter may do it from a thread that ends.
    """
    wanted = "launcher" in os.environ.get(DETECT, "launcher")
    if RUN_ID not in os.environ or not wanted:
        return
    number = signal.SIGTERM if os.environ.get("RANK") == "0" else signal.SIGKILL
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent or launcher_pid() != parent:  # it has ended before
        os._exit(LOST)
