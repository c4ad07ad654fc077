"""A replica of the model as child processes of this one, fed over a pipe.

For a process that hands out records but computes none: an actor of a cluster, a server. The ranks are
fresh interpreters, whatever ``__main__`` is here. If one ends, all do; if this process ends, by whatever
cause, they end with it. Knows records and processes; nothing of files, or of who hands out the work.
"""

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any

from tprt.distributed import rendezvous
from tprt.errors import PeerLost, TprtError, out_of_memory
from tprt.host_limits import usable_cpus
from tprt.job.records import Record
from tprt.job.replica import Replica
from tprt.job.work_queue import Result
from tprt.llm import LLM
from tprt.log import setup_cli_logging
from tprt.sampling_params import SamplingParams

# What rank 0 tells of itself may arrive this much later than its end is known.
WORD_SECONDS = 1.0
CLOSE_SECONDS, KILL_SECONDS = 20.0, 10.0
IDLE_SECONDS = 1.0


class ReplicaProcess:
    """Starts at once and loads in the background; ``wait_until_ready`` tells when that is done.

    Its methods are one thread's.

    Args:
        ranks: processes that share the model.
        llm: arguments of ``LLM``, plain values as JSON has them, ``model`` among them.
        number: of this replica, which its results carry.
        threads: of each rank on a CPU; None is a fair share of this process's cores.
        log_level: of what the ranks write to stderr.
    """

    def __init__(
        self,
        ranks: int,
        llm: Mapping[str, Any],
        number: int = 0,
        threads: int | None = None,
        log_level: str = "warning",
    ) -> None:
        self.ranks = ranks
        self._results = queue.SimpleQueue[Result | None]()
        self._ready, self._all_read = threading.Event(), threading.Event()
        self._error: TprtError | None = None  # once it is known
        self._told: TprtError | None = None  # by rank 0
        self._over, self._lock = False, threading.Lock()
        self._pipe, theirs = Pipe()
        # Nothing is ever sent: only this process holds the other end, so it closes when we are gone.
        life, self._life = Pipe(duplex=False)
        task = {"llm": dict(llm), "number": number, "log_level": log_level}
        environment = _environment(ranks, threads)
        with theirs, life, socket.create_server((rendezvous.LOOPBACK, 0)) as store:
            self._processes = [
                _start(rank, environment, task, life, theirs, store) for rank in range(ranks)
            ]
        for rank in range(ranks):
            threading.Thread(target=self._wait_for, args=(rank,), daemon=True).start()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        return [process.pid for process in self._processes]

    def wait_until_ready(self, timeout: float | None = None) -> bool:
        """Whether the model is loaded on all ranks and computes; False after ``timeout`` seconds.

        Raises:
            TprtError: it could not be loaded, or a rank has ended (``PeerLost``).
        """
        if not self._ready.wait(timeout):
            return False
        if self._error is not None:
            raise self._error
        return True

    def put(self, record: Record) -> None:
        """Hand over a record; its result comes out of ``collect``, unless a rank ends before."""
        with contextlib.suppress(OSError):  # the ranks have ended, as ``collect`` will say
            self._pipe.send(record)

    def collect(self, timeout: float = 0.0) -> list[Result]:
        """What has come since the last call; waits up to ``timeout`` seconds for the first of it.

        Raises:
            TprtError: a rank has ended, and all results sent before are collected.
        """
        found: list[Result] = []
        until = time.monotonic() + timeout
        with contextlib.suppress(queue.Empty):
            while True:
                wait = 0.0 if found else max(0.0, until - time.monotonic())
                result = self._results.get(timeout=wait)
                if result is None:
                    self._results.put(None)  # for the next call
                    break
                found.append(result)
        if not found and self._error is not None:
            raise self._error
        return found

    def close(self) -> None:
        """End the ranks; what they have not finished is dropped. Safe to call twice."""
        with self._lock:
            self._over = True
        # On a thread: a rank that hangs reads nothing, and the pipe may be full.
        threading.Thread(target=self._say_end, daemon=True).start()
        until = time.monotonic() + CLOSE_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._kill()
        for end in (self._pipe, self._life):
            end.close()

    def __enter__(self) -> "ReplicaProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _say_end(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)

    def _read(self) -> None:
        """On a thread: what rank 0 sends."""
        with contextlib.suppress(OSError, EOFError):
            while True:
                kind, value = self._pipe.recv()
                if kind == "result":
                    self._results.put(value)
                elif kind == "ready":
                    self._ready.set()
                else:
                    self._told = TprtError.from_json(value)
        self._all_read.set()

    def _wait_for(self, rank: int) -> None:
        """On a thread for each rank."""
        code = self._processes[rank].wait()
        with self._lock:
            if self._over:
                return
            self._over = True
        self._all_read.wait(WORD_SECONDS)
        self._kill()
        told = self._told
        ended = _ended(rank, self._processes[rank])
        if told is not None and code < 0:
            ended.what += f"; rank 0: {told.what}"
        self._error = ended if told is None or code < 0 else told
        self._ready.set()
        self._results.put(None)

    def _kill(self) -> None:
        """A rank whose peer is gone may hang in a collective, and holds memory of its GPU."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a driver
                process.wait(KILL_SECONDS)


def _ended(rank: int, process: "subprocess.Popen[bytes]") -> PeerLost:
    code = process.returncode
    how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    return PeerLost(
        f"rank {rank} {how}",
        where=f"process {process.pid} of host {socket.gethostname()}",
        hint="its own message, if it had time for one, is on stderr",
    )


def _environment(ranks: int, threads: int | None) -> dict[str, str]:
    """Of every rank. Whatever launched this process does not concern them."""
    threads = threads or max(1, usable_cpus() // ranks)
    known = {name: value for name, value in os.environ.items() if name[:13] != "TORCHELASTIC_"}
    return known | {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": rendezvous.LOOPBACK,
        # Ranks only connect: the store is made below, and listens on loopback alone.
        "TORCHELASTIC_USE_AGENT_STORE": str(True),
        "OMP_NUM_THREADS": str(threads),
        # Of a lost peer torch prints a stack of C++ where this process says which one it was.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "1"),
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }


def _start(
    rank: int,
    environment: dict[str, str],
    task: dict[str, Any],
    life: Connection,
    pipe: Connection,
    store: socket.socket,
) -> "subprocess.Popen[bytes]":
    port = str(store.getsockname()[1])
    # No copy of the pipe stays elsewhere: that it closes must mean that rank 0 has ended.
    own = {"pipe": pipe.fileno(), "store": store.fileno()} if rank == 0 else {}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, json.dumps(task | own | {"life": life.fileno()})],
        env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port},
        stdin=subprocess.DEVNULL,
        pass_fds=(life.fileno(), *own.values()),
        start_new_session=True,  # what a terminal sends is this process's business
    )


# ---------------------------------------------------------------- the ranks


class PipeQueue:
    """A replica's end of a queue, over a pipe."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.ended = False
        self._records = deque[Record]()

    def take(self) -> Record | None:
        self.receive()
        return self._records.popleft() if self._records else None

    def receive(self, timeout: float = 0.0) -> None:
        """Take in all that has come; wait up to ``timeout`` seconds for the first of it."""
        while not self.ended and self.pipe.poll(timeout):
            try:
                record = self.pipe.recv()
            except EOFError:
                record = None
            if record is None:
                self.ended = True
            else:
                self._records.append(record)
            timeout = 0.0

    def give(self, result: Result) -> None:
        self.pipe.send(("result", result))


class _Rank:
    """One rank, in its own process."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.llm, self.number = task["llm"], task["number"]
        self.pipe = Connection(task["pipe"]) if self.rank == 0 else None
        threading.Thread(target=_end_with, args=(Connection(task["life"]),), daemon=True).start()
        for library in ("GLOO", "NCCL"):
            loopback = rendezvous.interface_towards(rendezvous.LOOPBACK)
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
        if self.rank == 0:
            self.store = rendezvous.store_on(socket.socket(fileno=task["store"]))

    def run(self) -> None:
        with LLM(**self.llm) as llm:
            if self.pipe is None:
                llm.follow()
            else:
                self._lead(llm, self.pipe)

    def _lead(self, llm: LLM, pipe: Connection) -> None:
        work = PipeQueue(pipe)
        replica = Replica(llm, work, self.number)
        # Whoever is ready has computed something: if it dies later, it is not for a broken machine.
        llm.generate("a", SamplingParams(max_tokens=2, ignore_eos=True))
        pipe.send(("ready", None))
        while not work.ended:
            llm.tp.progress.check()  # another rank may hang while there is nothing to do
            if not replica.turn():
                work.receive(timeout=IDLE_SECONDS)

    def tell(self, error: TprtError) -> None:
        if self.pipe is not None:
            with contextlib.suppress(OSError):
                self.pipe.send(("error", error.to_json()))


def _end_with(life: Connection) -> None:
    """On a thread: the process that started this one is gone, nobody would read another result."""
    with contextlib.suppress(OSError, EOFError):
        life.recv_bytes()
    os._exit(PeerLost.exit_code)


def _main(text: str) -> int:
    task = json.loads(text)
    setup_cli_logging(task["log_level"])
    rank = _Rank(task)
    try:
        rank.run()
    except TprtError as error:
        rank.tell(error)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        told = out_of_memory(error) or TprtError(
            f"rank {rank.rank}: {type(error).__name__}: {error}", hint="please report it"
        )
        rank.tell(told)
        return told.exit_code
    return 0


if __name__ == "__main__":
    os._exit(_main(sys.argv[1]))  # threads and groups of a rank that failed may never end
