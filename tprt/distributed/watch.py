"""The watch over the ranks: names the first that died, raised, stopped or left the common sequence.

Every rank posts what it does to a side channel, looks at its peers, and at itself: a thread for the
store, which may block, and one that never does. Whoever finds a failure writes the first-error record,
so that all ranks tell the same. What follows from it (leave the process, raise in the library) is the
callback's business. Knows ranks and processes; no models and no files.
"""

import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

from tprt.distributed import verdict
from tprt.distributed.failure import INTERRUPTED, MOST_STACK_LINES, Failure
from tprt.distributed.liveness import process_state
from tprt.distributed.progress import OF_THE_LEADER, RESTING, Progress
from tprt.distributed.side_channel import ASK_SECONDS, LOCK_SECONDS, SideChannel
from tprt.distributed.verdict import Limits, Peer, Post
from tprt.log import get_logger

logger = get_logger(__name__)

LOOK_SECONDS = 0.2
# How long an ended process may be known before its own word, or that of a rank that deviated, arrives.
WORD_SECONDS = 0.3
STACK_AFTER_SECONDS = 2.0
EXPLAIN_SECONDS = 2.5
JOIN_SECONDS = 1.0
SELF_SECONDS = 4.0


class Watch:
    """Args:
    store: a connection of its own to the launcher's store, under a prefix of this attempt.
    rank: of the launch.
    size: ranks of the launch.
    limits: how long a rank may be still.
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
        self.progress, self.on_failure, self.detect = progress or Progress(), on_failure, detect
        # As long as a rank may be silent: who waits longer for the store is cut off from it.
        self._channel = SideChannel(store, rank, size, self._post, limits.step_timeout)
        self.host = self._channel.host
        self._moves, self._moved = -1, time.monotonic()
        self._warned = self._told = False
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    # ------------------------------------------------------------ main thread

    @property
    def failure(self) -> Failure | None:
        """The first-error record, once this rank knows it."""
        return self._channel.failure

    def start(self) -> "Watch":
        self._channel.join()
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
        self._channel.close(done=not failed)
        _end_threads(self._stop, self._threads)
        self._channel.processes.close()

    def tell(self, key: str, value: str) -> None:
        """Rank 0 decides something that the others ``ask`` for, outside of any group."""
        self._channel.tell(key, value)

    def ask(self, key: str) -> str:
        """What rank 0 told, waiting for it as long as the ranks live.

        Raises:
            PeerLost, RankMismatch: a rank has failed meanwhile.
        """
        while (told := self._channel.ask(key)) is None:
            self.progress.check()
            time.sleep(ASK_SECONDS)
        return told

    def wait_for_others(self, seconds: float) -> None:
        """Until all others have closed their watch, or the time is over."""
        until = time.monotonic() + seconds
        while not self._channel.all_done and time.monotonic() < until:
            self._channel.exchange(LOCK_SECONDS)
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
        found, peers = getattr(error, "rank", None), self._channel.peers
        rank = found if found in peers else self.rank  # another's, where all ranks raise it
        return Failure(
            "exception",
            rank,
            f"rank {rank}: {what}",
            code,
            self.host if rank == self.rank else peers[rank].host,
            phase,
            step,
            getattr(error, "where", "") or detail,
            getattr(error, "hint", ""),
            "".join(traceback.format_exception(error)).rstrip().splitlines(),
        )

    def explain(self, seconds: float = EXPLAIN_SECONDS) -> Failure | None:
        """For a rank that lost a peer: the failure behind it, waiting a moment for it to be known."""
        if self.failure is None and (odd := self.progress.deviates):
            return self._declare(self._own_mismatch(odd))
        if not self._channel.known.wait(seconds):
            peers = [peer for peer in self._channel.peers.values() if not peer.local]
            now = time.monotonic()
            gone = verdict.likely_gone(peers, now, self.limits)
            if gone is not None:
                return self._declare(verdict.connections_broke(gone, now))
        return self.failure

    def interrupted(self, what: str, code: int) -> Failure:
        """A signal asks this rank to end: the failure that caused it, else the interrupt itself."""
        if self._launcher_is_gone:
            return self._declare(self._launcher_lost("has ended before its ranks"))
        self._channel.exchange(LOCK_SECONDS)
        if self.failure is None and self._channel.processes.any_ended:
            self._channel.known.wait(2 * WORD_SECONDS + LOOK_SECONDS)
        place = (self.host, self.progress.phase, self.progress.step)
        return self.failure or self._declare(Failure(INTERRUPTED, self.rank, what, code, *place))

    def end_stuck_peer(self) -> None:
        """Kill the failed rank if it is a process of this host that will not end by itself."""
        failure = self.failure
        if failure is not None and failure.kind in ("stopped", "silent", "stalled", "deadlock"):
            # Its own watch ends it, and saves its work, where its threads still run.
            patience = SELF_SECONDS if failure.kind in ("stalled", "deadlock") else 0.0
            self._channel.processes.end(failure.rank, patience)

    # ------------------------------------------------------------ threads

    def _post_loop(self) -> None:
        channel = self._channel
        while not (self._stop.is_set() or channel.error or channel.failure):
            try:
                channel.exchange()
            except Exception as error:  # else this rank would fall silent for no reason it tells
                channel.error = f"{type(error).__name__}: {error}"
            self._stop.wait(self.limits.interval if channel.all_joined else 2 * ASK_SECONDS)

    def _watch_loop(self) -> None:
        last = time.monotonic()
        while not (self._stop.is_set() or self._told):
            self._channel.processes.wait(LOOK_SECONDS)
            now = time.monotonic()
            if now - last > 10 * LOOK_SECONDS:
                self._forgive(now)  # this process itself was stopped, or its host asleep
            last = now
            try:
                if self.failure is None and not self._stop.is_set():
                    found = self._look(now)
                    if found is not None:
                        self._declare(found)
            except Exception:
                logger.exception("the watch over the ranks has an error of its own")
            if self.failure is not None:
                self._told = True
                self.progress.failure = self.failure
                if self.on_failure is not None:
                    self.on_failure(self.failure)

    def _declare(self, failure: Failure) -> Failure:
        self.progress.failure = first = self._channel.declare(failure)
        return first

    def _post(self, number: int) -> Post:
        """Of this rank as it is now; number 0 is for its own eyes."""
        progress, idle = self.progress, time.monotonic() - self._moved
        frame = self._frame()
        stack: list[str] = []
        trail: list[str] = []
        deviates = ""
        if idle > STACK_AFTER_SECONDS:
            trail, deviates = list(progress.trail), progress.deviates
            stack = [] if frame is None else _stack(frame)
        return Post(
            number,
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

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self.progress.thread)

    def _forgive(self, now: float) -> None:
        self._moved = self._channel.exchanged = now
        for peer in self._channel.peers.values():
            peer.heard = now

    # ------------------------------------------------------------ the look around

    def _look(self, now: float) -> Failure | None:
        if (moves := self.progress.moves) != self._moves:
            self._moves, self._moved, self._warned = moves, now, False
        if "launcher" in self.detect and self._launcher_is_gone:
            return self._launcher_lost("has ended before its ranks")
        if "death" in self.detect and (found := self._deaths(now)) is not None:
            return found
        if "store" in self.detect and (found := self._store_lost(now)) is not None:
            return found
        if "silence" in self.detect and (found := self._silence(now)) is not None:
            return found
        found = self._still(now)
        # What was looked at piece by piece may have moved meanwhile.
        return found if self.progress.moves == moves else None

    def _still(self, now: float) -> Failure | None:
        """This rank, or the group it leads, does not move."""
        post = self._post(0)
        if "stall" in self.detect:
            self._warn(post)
            if (found := verdict.stalled(self.rank, self.host, post, self.limits)) is not None:
                return found
            first = self._channel.peers.get(0)
            if first is not None and first.done and now - first.heard > self.limits.step_timeout:
                return verdict.left_behind(self.rank, self.host, post, now - first.heard)
        group = self.progress.group
        if "deadlock" in self.detect and group[:1] == (self.rank,):
            others = [self._channel.peers[rank] for rank in group[1:]]
            posts = {self.rank: post} | {peer.rank: peer.post for peer in others}
            hosts = {self.rank: self.host} | {peer.rank: peer.host for peer in others}
            return verdict.deadlock(posts, hosts, self.limits)
        return None

    def _deaths(self, now: float) -> Failure | None:
        ended = self._channel.processes.ended
        for rank, (seen, status) in list(ended.items()):
            peer = self._channel.peers[rank]
            self._channel.exchange(LOCK_SECONDS)
            if peer.done:
                del ended[rank]
            elif self.failure is not None:
                return None
            # A launcher that is killed takes its ranks along before its own end can be seen.
            elif now - seen >= (LOOK_SECONDS if status == 9 else WORD_SECONDS):
                if odd := self.progress.deviates:
                    return self._own_mismatch(odd)
                return verdict.died(peer, self._last_of(peer), status)
        return None

    def _last_of(self, peer: Peer) -> Post:
        """Its last post. Who steps together with this rank was no further back than this rank is."""
        post, mine = peer.post, self.progress
        here = mine.phase, mine.step
        if peer.rank not in mine.group or mine.phase in RESTING | OF_THE_LEADER:
            return post
        if (post.phase, post.step) == here or post.step > mine.step >= 0:
            return post
        return replace(post, phase=mine.phase, step=mine.step, at="", detail="")

    def _silence(self, now: float) -> Failure | None:
        if self._channel.error:
            return None  # then all are silent
        stopped: list[int] | None = None
        for peer in self._channel.peers.values():
            overdue = now - peer.heard > self.limits.step_timeout and not peer.done
            if overdue and stopped is None:
                stopped = self._channel.processes.stopped()
            peer.stopped = overdue and peer.rank in (stopped or ())
            seen = replace(peer, post=self._last_of(peer))
            if (found := verdict.silent(seen, now, self.limits)) is not None:
                return found
        return None

    def _store_lost(self, now: float) -> Failure | None:
        channel, quiet = self._channel, now - self._channel.exchanged
        post, first = self._post(0), self._channel.peers.get(0)
        if channel.error:
            if channel.processes.ended or quiet < 2 * WORD_SECONDS + self.limits.interval:
                return None  # a rank that held the store may have died with it: name that
            if first is not None and first.joined and not first.local:
                return verdict.store_went_with(first, self._last_of(first), channel.error)
            why = f"has lost the rendezvous store: {channel.error}"
            hint = "the launcher or the host that holds the store has ended"
            return verdict.store_lost(self.rank, self.host, post, why, hint)
        if quiet <= self.limits.step_timeout:
            return None
        if (found := self._who_holds_the_store_is_stopped(now)) is not None:
            return found
        why = f"has had no answer from the rendezvous store for {quiet:.0f} s"
        hint = "the network between this host and the store's is cut, or that host is down"
        return verdict.store_lost(self.rank, self.host, post, why, hint)

    def _who_holds_the_store_is_stopped(self, now: float) -> Failure | None:
        state = process_state(self.parent) if self.parent is not None else None
        if state is not None and state.stopped:
            return self._launcher_lost("is stopped, and with it the rendezvous store")
        for rank in self._channel.processes.stopped():
            peer = self._channel.peers[rank]
            seen = replace(peer, post=self._last_of(peer), stopped=True)
            return verdict.silent(seen, now, self.limits)
        return None

    @property
    def _launcher_is_gone(self) -> bool:
        return self.parent is not None and os.getppid() != self.parent

    def _launcher_lost(self, how: str) -> Failure:
        return verdict.launcher_lost(self.parent, self.host, self._post(0), how)

    def _own_mismatch(self, odd: str) -> Failure:
        return verdict.left_sequence(self.rank, self.host, self._post(0), odd)

    def _warn(self, post: Post) -> None:
        limit = self.limits.of(post.phase)
        if post.phase in RESTING or post.waiting or self._warned or post.idle <= limit / 2:
            return
        self._warned = True
        logger.warning(
            "rank %d has not moved in %s for %.0f s, %s; it is given up after %g s",
            self.rank, post.phase, post.idle, post.where, limit,
        )  # fmt: skip


def _end_threads(stop: threading.Event, threads: list[threading.Thread]) -> None:
    stop.set()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(JOIN_SECONDS)


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
