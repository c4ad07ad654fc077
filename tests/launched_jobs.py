"""A batch job as users start it, watched from outside: what it says and when, and what it leaves behind.

Everything a job starts carries a mark in its environment, by which it is found even when its parent is
gone. Knows nothing of what the job computes.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from conftest import ROOT, TINY

from tprt.cli import main

MARK = "TPRT_TEST_MARK"
OUTER_SECONDS = 120.0  # after which a job is taken for hung, whatever is tested
SHM = Path("/dev/shm")
FAULT_SAID = "injected fault:"

# Of signals it is not told of, torch's launcher dies without a word.
HANDLED = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
LAUNCHERS = {
    "nproc": (),
    "torchrun": ("-m", "torch.distributed.run", "--standalone", *HANDLED, "--nproc-per-node"),
}


def write_prompts(path: Path, count: int) -> Path:
    """Records whose answers differ in length and text."""
    with path.open("w") as file:
        for i in range(count):
            words = " ".join(("lamp", "canoe", "frog", "moon")[: i % 4 + 1])
            file.write(
                json.dumps({"id": f"r{i}", "prompt": f"human: Repeat: {words}\n\nadept:"}) + "\n"
            )
    return path


def generate(prompts: Path, out: Path, *flags: str) -> list[str]:
    """Arguments of ``tprt`` for a greedy job."""
    files = ["--input", str(prompts), "--output", str(out)]
    return [
        "generate",
        "--model",
        str(TINY),
        "--dtype",
        "float32",
        "--temperature",
        "0",
        *files,
        *flags,
    ]


def answer_here(arguments: list[str]) -> int:
    """Run ``tprt`` in this process, as one rank; its exit code."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many times as fast where the cores are not ours alone
    try:
        return main(arguments)
    finally:
        torch.set_num_threads(threads)


def command(launcher: str, ranks: int, arguments: list[str], restarts: int = 0) -> list[str]:
    """The whole command line of a job on ``ranks`` ranks."""
    again = ["--max-restarts", str(restarts)] if restarts else []
    if launcher == "nproc":
        return [sys.executable, "-m", "tprt", *arguments, "--nproc", str(ranks), *again]
    start = [sys.executable, *LAUNCHERS[launcher], str(ranks), *again]
    return [*start, "-m", "tprt", *arguments]


@dataclass
class LaunchedJob:
    """A running or ended launch. A context manager: nothing of it outlives the block.

    Args:
        argv: of the launcher.
        env: beside what this process has.
    """

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    lines: list[tuple[float, str]] = field(default_factory=list)

    def __enter__(self) -> "LaunchedJob":
        self.mark = f"{MARK}={uuid.uuid4().hex}"
        self.shm_before = _shared_memory()
        self.sockets: set[str] = set()
        name, _, value = self.mark.partition("=")
        usual = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self.argv,
            env=os.environ | usual | self.env | {name: value},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=ROOT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    # ------------------------------------------------------------ what goes on

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def said(self, words: str) -> float | None:
        """When ``words`` were first said; on the clock of ``time.monotonic``."""
        return next((at for at, line in list(self.lines) if words in line), None)

    def wait_for(self, words: str, seconds: float = OUTER_SECONDS) -> float:
        until = time.monotonic() + seconds
        while (at := self.said(words)) is None:
            assert self.process.poll() is None, f"ended without {words!r}:\n{self.text}"
            assert time.monotonic() < until, f"{words!r} was not said:\n{self.text}"
            time.sleep(0.01)
        return at

    def wait_for_rank(
        self, number: int, words: str, times: int, seconds: float = OUTER_SECONDS
    ) -> int:
        """The process of a rank once ``words`` have been said so many times."""
        until = time.monotonic() + seconds
        while sum(words in line for _, line in list(self.lines)) < times:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < until, self.text
            time.sleep(0.01)
        return self.rank(number)

    def wait_for_ranks(self, count: int) -> None:
        """Until their processes are there."""
        until = time.monotonic() + OUTER_SECONDS
        while time.monotonic() < until:
            with contextlib.suppress(ProcessLookupError):
                for number in range(count):
                    self.rank(number)
                return
            time.sleep(0.01)
        raise TimeoutError(f"no ranks:\n{self.text}")

    def alive(self) -> list[int]:
        return [
            pid for pid, environ in _environments() if self.mark.encode() in environ.split(b"\0")
        ]

    def rank(self, number: int) -> int:
        """The process that is a rank: the one of its environment that has no such parent."""
        key = f"RANK={number}".encode()
        for pid, environ in _environments():
            if self.mark.encode() in (words := environ.split(b"\0")) and key in words:
                return pid
        raise ProcessLookupError(f"rank {number} is not there:\n{self.text}")

    def note_sockets(self) -> None:
        """Remember what the job listens on now."""
        listening = {inode for inode, _ in _listening()}
        for pid in self.alive():
            with contextlib.suppress(OSError):
                for entry in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        target = os.readlink(entry)
                        if target.startswith("socket:[") and target[8:-1] in listening:
                            self.sockets.add(target[8:-1])

    # ------------------------------------------------------------ the end

    def wait(self, seconds: float = OUTER_SECONDS) -> float:
        """Until no process of the job is left; when that was."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None and not self.alive():
                ended = time.monotonic()
                self._reader.join(10)
                return ended
            time.sleep(0.02)
        raise TimeoutError(f"processes {self.alive()} are left after {seconds:g} s:\n{self.text}")

    @property
    def code(self) -> int:
        code = self.process.poll()
        assert code is not None
        return code

    def leftovers(self, out: Path) -> list[str]:
        """Processes, sockets, shared memory and temporary files that the job has left."""
        left = [f"process {pid}" for pid in self.alive()]
        left += [f"listening socket {inode}" for inode, _ in _listening() if inode in self.sockets]
        left += [f"/dev/shm/{name}" for name in sorted(self._shared_memory_left())]
        return left + temporary_files(out)

    def _shared_memory_left(self) -> set[str]:
        """New files there that stay, and that no living process, another job's, has open."""
        left = _shared_memory() - self.shm_before
        if left:
            held = _held_shared_memory()
            left = {name for name in left if _inode(SHM / name) not in held}
        if left:
            time.sleep(1)  # another job's, that is about to remove it
        return left & _shared_memory()


def temporary_files(out: Path) -> list[str]:
    return [path.name for path in out.parent.glob(".*") if path.name.startswith(f".{out.name}.")]


def status_of(out: Path) -> dict:
    return json.loads(out.with_name(f"{out.name}.status.json").read_text())


def _environments() -> Iterator[tuple[int, bytes]]:
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                yield int(entry.name), Path(entry.path, "environ").read_bytes()


def _listening() -> Iterator[tuple[str, str]]:
    """(inode, address) of every TCP socket of this host that listens."""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    yield fields[9], fields[1]


def _shared_memory() -> set[str]:
    """But for what tests beside this one use, and no job does: multiprocessing's semaphores, folders."""
    return {name for name in os.listdir(SHM) if not name.startswith(("sem.mp-", "test-"))}


def _held_shared_memory() -> set[int]:
    """Inodes of files in /dev/shm that some living process has open or mapped."""
    held = set()
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                for line in Path(entry.path, "maps").read_text().splitlines():
                    if str(SHM) in line:
                        held.add(int(line.split()[4]))
            with contextlib.suppress(OSError):
                for fd in Path(entry.path, "fd").iterdir():
                    with contextlib.suppress(OSError):
                        if os.readlink(fd).startswith(f"{SHM}/"):
                            held.add(fd.stat().st_ino)
    return held


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0
