"""The watch over the ranks: a side channel beside the collectives that names the first rank that failed.

Every rank posts what it does to the rendezvous store, looks at its peers, and at itself: a thread for
the store, which may block, and one that never does. Whoever finds a failure writes the first-error
record, compare-and-set, so that all ranks tell the same. What follows from it (leave the process, raise
in the library) is the callback's business. Knows ranks, processes and a store; no models and no files.
"""

import json
import os
import select
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from types import FrameType
from typing import Any

from tprt.distributed.failure import INTERRUPTED, MOST_STACK_LINES, Failure
from tprt.distributed.liveness import (
    PeerProcess,
    host_identity,
    host_name,
    how_it_ended,
    process_state,
)
from tprt.distributed.progress import OF_THE_LEADER, RESTING, Progress
from tprt.distributed.verdict import Limits, Peer, Post, deadlock, likely_gone, silent, stalled
from tprt.errors import PeerLost, RankMismatch
from tprt.log import get_logger

logger = get_logger(__name__)

LOOK_SECONDS = 0.2
# How long an ended process may be known before its own word, or that of a rank that deviated, arrives.
WORD_SECONDS = 0.3
STACK_AFTER_SECONDS = 2.0
ASK_SECONDS = 0.05
JOIN_SECONDS = 1.0
SELF_SECONDS = 4.0
_LOST = Failure("unreachable", -1, "the rendezvous store, which does not answer any more")


class Watch:
    """Args:
    store: a connection of its own to the launcher's store, under a prefix of this attempt.
    rank: of the launch.
    size: ranks of the launch.
    on_failure: called once, on a thread of the watch, when a failure is known.
    parent: process id of the launcher whose end ends the ranks; None where there is none.
    progress: of this rank; None makes one.
    detect: kinds of failure that are looked for; tests switch single ones off.
    """

    ALL = frozenset({"death", "launcher", "stall", "silence", "deadlock", "store"})

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        limits: Limits,
        on_failure: Callable[[Failure], None] | None = None,
        parent: int | None = None,
        detect: frozenset[str] = ALL,
        progress: Progress | None = None,
    ) -> None:
        self.rank, self.size, self.limits, self.parent = rank, size, limits, parent
        self.progress, self.host = progress or Progress(), host_name()
        self.on_failure, self.detect = on_failure, detect
        self._store, self._store_lock = store, threading.RLock()
        # As long as a rank may be silent: who waits longer for the store is cut off from it.
        store.set_timeout(timedelta(seconds=limits.step_timeout))
        now = time.monotonic()
        self._peers = {r: Peer(r, heard=now) for r in range(size) if r != rank}
        self._processes: dict[int, PeerProcess] = {}
        self._poll, self._fds = select.poll(), dict[int, int]()
        self._ended: dict[int, tuple[float, int | None]] = {}  # rank -> when seen, wait status
        self._identity = host_identity()
        self._main = threading.main_thread().ident
        self._number, self._moves, self._moved = 0, -1, now
        self._exchanged, self._store_error = now, ""
        self._failure: Failure | None = None
        self._warned = self._told = False
        self._stop, self._known = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    # ------------------------------------------------------------ main thread

    @property
    def failure(self) -> Failure | None:
        """The first-error record, once this rank knows it."""
        return self._failure

    def start(self) -> "Watch":
        state = process_state(os.getpid())
        mine = {
            "pid": os.getpid(),
            "started": state.started if state else 0,
            "identity": self._identity,
            "host": self.host,
        }
        self._store.set(f"id/{self.rank}", json.dumps(mine))
        for name, loop in (("post", self._post_loop), ("watch", self._watch_loop)):
            thread = threading.Thread(target=loop, name=f"tprt-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()
        # At exit without ``close`` too: a daemon thread that is in the store while Python ends takes
        # the process down.
        weakref.finalize(self, _end_threads, self._stop, self._threads)
        return self

    def close(self, failed: bool = False) -> None:
        """This rank has done its work; its end is no failure, unless ``failed`` says so."""
        if self._stop.is_set():
            return
        if not failed:
            self.progress.enter("done")
        self._stop.set()
        if self._store_lock.acquire(timeout=JOIN_SECONDS):
            try:
                if not (self._store_error or failed):
                    self._number += 1
                    self._store.set(f"done/{self.rank}", "1")
                    self._store.set(f"post/{self.rank}", self._post().to_json())
                    self._store.check([f"done/{self.rank}"])  # an answer: the word has arrived
            except RuntimeError:
                pass  # the store has ended before us: so has the launch
            finally:
                self._store_lock.release()
        _end_threads(self._stop, self._threads)
        for process in self._processes.values():
            process.close()

    def tell(self, key: str, value: str) -> None:
        """Rank 0 decides something that the others ``ask`` for, outside of any group."""
        with self._store_lock:
            self._store.set(f"told/{key}", value)

    def ask(self, key: str) -> str:
        """What rank 0 told, waiting for it as long as the ranks live.

        Raises:
            PeerLost, RankMismatch: a rank has failed meanwhile.
        """
        while True:
            self.progress.check()
            with self._store_lock:
                if self._store.check([f"told/{key}"]):
                    return str(self._store.get(f"told/{key}").decode())
            time.sleep(ASK_SECONDS)

    def wait_for_others(self, seconds: float) -> None:
        """Until all others have closed their watch, or the time is over."""
        until = time.monotonic() + seconds
        while not all(peer.done for peer in self._peers.values()) and time.monotonic() < until:
            self._exchange(JOIN_SECONDS)
            time.sleep(ASK_SECONDS)

    def fail(self, failure: Failure) -> Failure:
        """Say that this rank has failed; the first-error record, which may be another's."""
        return self._declare(failure)

    def of(self, error: BaseException, code: int) -> Failure:
        """A failure of kind ``exception`` of this rank, where it stands now."""
        progress = self.progress
        # An error that has left a call is told when the call is over already.
        place = progress.phase, progress.step, progress.detail
        phase, step, detail = progress.last if progress.phase in RESTING else place
        what = getattr(error, "what", "") or f"{type(error).__name__}: {error}"
        return Failure(
            "exception",
            self.rank,
            f"rank {self.rank}: {what}",
            code,
            self.host,
            phase,
            step,
            getattr(error, "where", "") or detail,
            getattr(error, "hint", ""),
            "".join(traceback.format_exception(error)).rstrip().splitlines(),
        )

    def explain(self, seconds: float = 2.5) -> Failure | None:
        """For a rank that lost a peer: the failure behind it, waiting a moment for it to be known."""
        if self._failure is None and (odd := self.progress.deviates):
            return self._declare(self._own_mismatch(odd))
        if not self._known.wait(seconds):
            peers = [peer for peer in self._peers.values() if not peer.local]
            gone = likely_gone(peers, time.monotonic(), self.limits)
            if gone is not None:
                post, since = gone.post, time.monotonic() - gone.heard
                what = f"rank {gone.rank}, whose connections broke and which is silent for {since:.1f} s"
                hint = "look at its host and the network"
                place = (gone.host, post.phase, post.step, post.where, hint, post.stack)
                return self._declare(Failure("silent", gone.rank, what, PeerLost.exit_code, *place))
        return self._failure

    def interrupted(self, what: str, code: int) -> Failure:
        """A signal asks this rank to end: the failure that caused it, else the interrupt itself."""
        if self.parent is not None and os.getppid() != self.parent:
            return self._declare(self._launcher_lost())
        self._exchange(JOIN_SECONDS)
        ended = select.poll()  # the other one is in use by its thread
        for fd in list(self._fds):
            ended.register(fd, select.POLLIN)
        if (self._ended or ended.poll(0)) and self._failure is None:
            self._known.wait(2 * WORD_SECONDS + LOOK_SECONDS)
        place = (self.host, self.progress.phase, self.progress.step)
        failure = Failure(INTERRUPTED, self.rank, what, code, *place)
        return self._failure or self._declare(failure)

    def end_stuck_peer(self) -> None:
        """Kill the failed rank if it is a process of this host that will not end by itself."""
        failure = self._failure
        if failure is not None and failure.kind in ("stopped", "silent", "stalled", "deadlock"):
            process = self._processes.get(failure.rank)
            if process is not None:
                if failure.kind in ("stalled", "deadlock"):
                    process.wait(SELF_SECONDS)  # its own watch ends it, and saves its work
                process.kill()

    # ------------------------------------------------------------ the store

    def _post_loop(self) -> None:
        while not self._stop.is_set():
            self._exchange()
            if self._store_error or self._failure is not None:
                return
            all_known = all(peer.joined for peer in self._peers.values())
            self._stop.wait(self.limits.interval if all_known else 2 * ASK_SECONDS)

    def _exchange(self, seconds: float = -1) -> None:
        """Post, and read what the others have posted. Waits ``seconds`` for the other thread at most."""
        if self._store_error or not self._store_lock.acquire(timeout=seconds):
            return
        try:
            self._number += 1
            self._store.set(f"post/{self.rank}", self._post().to_json())
            if self._store.check(["failure"]):
                self._learn(Failure.from_json(self._store.get("failure")))
            for peer in self._peers.values():
                if not peer.done:
                    self._read(peer)
            self._exchanged = time.monotonic()
        except RuntimeError as error:
            if not self._stop.is_set():
                self._store_error = str(error).splitlines()[0]
        finally:
            self._store_lock.release()

    def _read(self, peer: Peer) -> None:
        key = f"post/{peer.rank}"
        if not peer.joined:
            if not self._store.check([key, f"id/{peer.rank}"]):
                return
            found = json.loads(self._store.get(f"id/{peer.rank}"))
            peer.host, peer.local = found["host"], found["identity"] == self._identity
            if peer.local:
                process = PeerProcess(found["pid"], found["started"])
                self._processes[peer.rank] = process
                if process.gone:
                    self._ended[peer.rank] = time.monotonic(), None
                else:
                    self._fds[process.fd] = peer.rank
                    self._poll.register(process.fd, select.POLLIN)
            peer.joined = True
        post = Post.from_json(self._store.get(key))
        if post.number != peer.post.number:
            peer.post, peer.heard = post, time.monotonic()
        if post.phase == "done" or peer.rank in self._ended:
            peer.done = bool(self._store.check([f"done/{peer.rank}"]))

    def _declare(self, failure: Failure) -> Failure:
        if self._failure is None and not self._store_error:
            if self._store_lock.acquire(timeout=JOIN_SECONDS):
                try:
                    failure = Failure.from_json(
                        self._store.compare_set("failure", "", failure.to_json())
                    )
                except RuntimeError:
                    pass  # nobody can be told
                finally:
                    self._store_lock.release()
        self._learn(failure)
        assert self._failure is not None
        return self._failure

    def _learn(self, failure: Failure) -> None:
        if self._failure is None:
            self._failure = failure
            self.progress.failure = failure
            self._known.set()

    def _post(self) -> Post:
        progress, idle = self.progress, time.monotonic() - self._moved
        frame = sys._current_frames().get(self._main or 0)
        stack: list[str] = []
        trail: list[str] = []
        deviates = ""
        if idle > STACK_AFTER_SECONDS:
            trail, deviates = list(progress.trail), progress.deviates
            stack = [] if frame is None else _stack(frame)
        return Post(
            self._number,
            progress.phase,
            progress.step,
            progress.detail,
            progress.waiting,
            idle,
            _place(frame),
            stack,
            trail,
            deviates,
        )

    # ------------------------------------------------------------ the look around

    def _watch_loop(self) -> None:
        last = time.monotonic()
        while not self._stop.is_set():
            for fd, _ in self._poll.poll(LOOK_SECONDS * 1000):
                self._see_end(fd)
            now = time.monotonic()
            if now - last > 10 * LOOK_SECONDS:
                self._forgive(now)  # this process itself was stopped, or its host asleep
            last = now
            if self._failure is None and not self._stop.is_set():
                found = self._look(now)
                if found is not None:
                    self._declare(found)
            if self._failure is not None and not self._told:
                self._told = True
                if self.on_failure is not None:
                    self.on_failure(self._failure)
                return

    def _forgive(self, now: float) -> None:
        self._moved = self._exchanged = now
        for peer in self._peers.values():
            peer.heard = now

    def _see_end(self, fd: int) -> None:
        rank = self._fds.pop(fd, None)
        if rank is not None:
            self._poll.unregister(fd)
            self._ended[rank] = time.monotonic(), self._processes[rank].ended()

    def _look(self, now: float) -> Failure | None:
        if (moves := self.progress.moves) != self._moves:
            self._moves, self._moved, self._warned = moves, now, False
        detect = self.detect
        if self.parent is not None and os.getppid() != self.parent and "launcher" in detect:
            return self._launcher_lost()
        if (found := self._deaths(now)) is not None:
            return found
        if "store" in detect and (found := self._store_lost(now)) is not None:
            return found
        if "silence" in detect and not self._store_error:
            for peer in self._peers.values():
                overdue = now - peer.heard > self.limits.step_timeout and not peer.done
                peer.stopped = overdue and peer.local and self._processes[peer.rank].stopped
                seen = replace(peer, post=self._last_of(peer))
                if (found := silent(seen, now, self.limits)) is not None:
                    return found
        if "stall" in detect:
            self._warn(now)
            post = self._post()
            if (found := stalled(self.rank, self.host, post, self.limits)) is not None:
                return found
            if (found := self._left_behind(now)) is not None:
                return found
        if "deadlock" in detect and self.progress.group[:1] == (self.rank,):
            posts = {self.rank: self._post()}
            posts |= {r: self._peers[r].post for r in self.progress.group[1:]}
            hosts = {r: self._peers[r].host for r in self.progress.group[1:]}
            return deadlock(posts, hosts | {self.rank: self.host}, self.limits)
        return None

    def _deaths(self, now: float) -> Failure | None:
        if "death" not in self.detect:
            return None
        for rank, (seen, status) in list(self._ended.items()):
            peer = self._peers[rank]
            self._exchange(JOIN_SECONDS)
            if peer.done:
                del self._ended[rank]
            elif self._failure is not None:
                return None
            elif now - seen >= WORD_SECONDS or status == 9:
                if odd := self.progress.deviates:
                    return self._own_mismatch(odd)
                kind, words = how_it_ended(status)
                post = self._last_of(peer)
                return Failure(
                    kind,
                    rank,
                    f"rank {rank}, which {words}",
                    host=peer.host,
                    phase=post.phase,
                    step=post.step,
                    where=post.where,
                    hint="the same command resumes the job; out of host memory is a common reason"
                    if kind == "killed"
                    else "look for its own message",
                    stack=post.stack,
                )
        return None

    def _last_of(self, peer: Peer) -> Post:
        """Its last post. Who steps together with this rank was no further back than this rank is."""
        post, mine = peer.post, self.progress
        here = mine.phase, mine.step
        if peer.rank not in mine.group or mine.phase in RESTING | OF_THE_LEADER:
            return post
        if (post.phase, post.step) == here or post.step > mine.step >= 0:
            return post
        return replace(post, phase=mine.phase, step=mine.step, at="")

    def _store_lost(self, now: float) -> Failure | None:
        if self._store_error:
            if self._ended or now - self._exchanged < 2 * WORD_SECONDS + self.limits.interval:
                return None  # a rank that held the store may have died with it: name that
            first = self._peers.get(0)
            if first is not None and first.joined and not first.local:
                # The store lies on its host, as a rule.
                post = self._last_of(first)
                return Failure(
                    "silent",
                    0,
                    f"rank 0, whose host took the rendezvous store with it: {self._store_error}",
                    host=first.host,
                    phase=post.phase,
                    step=post.step,
                    hint="look at that host, for the message of its ranks or launcher",
                )
            return Failure(
                _LOST.kind,
                self.rank,
                f"rank {self.rank} has lost the rendezvous store: {self._store_error}",
                host=self.host,
                phase=self.progress.phase,
                step=self.progress.step,
                hint="the launcher or the host that holds the store has ended",
            )
        if now - self._exchanged > self.limits.step_timeout:
            if (found := self._who_holds_the_store_is_stopped(now)) is not None:
                return found
            return Failure(
                _LOST.kind,
                self.rank,
                f"rank {self.rank} has had no answer from the rendezvous store for "
                f"{now - self._exchanged:.0f} s",
                host=self.host,
                phase=self.progress.phase,
                step=self.progress.step,
                hint="the network between this host and the store's is cut, or that host is down",
            )
        return None

    def _who_holds_the_store_is_stopped(self, now: float) -> Failure | None:
        state = process_state(self.parent) if self.parent is not None else None
        if state is not None and state.stopped:
            return self._launcher_lost("is stopped, and with it the rendezvous store")
        for rank, process in self._processes.items():
            if process.stopped:
                peer = self._peers[rank]
                seen = replace(peer, post=self._last_of(peer), stopped=True)
                return silent(seen, now, self.limits)
        return None

    def _left_behind(self, now: float) -> Failure | None:
        first = self._peers.get(0)
        if first is None or not first.done or now - first.heard <= self.limits.step_timeout:
            return None
        return Failure(
            "stalled",
            self.rank,
            f"rank {self.rank}, which does not end {now - first.heard:.0f} s after rank 0",
            host=self.host,
            phase=self.progress.phase,
            stack=_stack(frame) if (frame := _main_frame(self._main)) else [],
        )

    def _launcher_lost(self, how: str = "has ended before its ranks") -> Failure:
        return Failure(
            "launcher",
            -1,
            f"the launcher (process {self.parent}), which {how}",
            host=self.host,
            phase=self.progress.phase,
            step=self.progress.step,
            hint="the same command resumes the job",
        )

    def _own_mismatch(self, odd: str) -> Failure:
        return Failure(
            "mismatch",
            self.rank,
            f"rank {self.rank}, which left the common sequence: {odd}",
            RankMismatch.exit_code,
            self.host,
            self.progress.phase,
            self.progress.step,
            hint="this is a bug of the program on that rank, or its memory is damaged; please report it",
        )

    def _warn(self, now: float) -> None:
        progress, limit = self.progress, self.limits.of(self.progress.phase)
        if progress.phase in RESTING or progress.waiting or self._warned:
            return
        if now - self._moved > limit / 2:
            self._warned = True
            logger.warning(
                "rank %d has not moved in %s for %.0f s, %s; it is given up after %g s",
                self.rank, progress.phase, now - self._moved, _place(_main_frame(self._main)), limit,
            )  # fmt: skip


def _end_threads(stop: threading.Event, threads: list[threading.Thread]) -> None:
    stop.set()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(JOIN_SECONDS)


def _main_frame(thread: int | None) -> FrameType | None:
    return sys._current_frames().get(thread or 0)


def _stack(frame: FrameType) -> list[str]:
    lines = traceback.format_stack(frame)[-MOST_STACK_LINES // 2 :]
    return [line for entry in lines for line in entry.rstrip().splitlines()]


def _place(frame: FrameType | None) -> str:
    """The innermost line of this package."""
    while frame is not None:
        name = frame.f_code.co_filename
        if "/tprt/" in name and not name.endswith("faults.py"):
            short = name[name.rindex("/tprt/") + 1 :]
            return f"{short}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
