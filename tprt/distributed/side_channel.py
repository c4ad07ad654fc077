"""What ranks say to one another beside the collectives: signs of life, and who failed first.

It goes through the rendezvous store, over a connection of its own. A call may block when the store's
host is out of reach, so one thread posts and others ask with a limit. Knows a store; judges nothing.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tprt.distributed.failure import Failure
from tprt.distributed.liveness import PeerProcesses, host_identity, host_name, process_state
from tprt.distributed.verdict import Peer, Post

LOCK_SECONDS = 1.0
ASK_SECONDS = 0.05


class SideChannel:
    """Args:
    store: a connection of its own, under a prefix of this attempt.
    post: makes this rank's sign of life, given its number.
    timeout: seconds a call may wait for the store.

    Attributes:
        peers: the other ranks as they are known here.
        processes: those of this host.
        failure: the first-error record, once known; ``known`` is then set.
        error: why the store cannot be had any more; empty while it can.
        exchanged: when it last answered, on the monotonic clock.
    """

    def __init__(
        self, store: Any, rank: int, size: int, post: Callable[[int], Post], timeout: float
    ) -> None:
        self.rank, self.host = rank, host_name()
        self._store, self._lock, self._make_post = store, threading.RLock(), post
        store.set_timeout(timedelta(seconds=timeout))
        self.exchanged = now = time.monotonic()
        self.peers = {r: Peer(r, heard=now) for r in range(size) if r != rank}
        self.processes = PeerProcesses()
        self.failure: Failure | None = None
        self.known = threading.Event()
        self.error = ""
        self._identity, self._number = host_identity(), 0
        self._closed = False

    def join(self) -> None:
        """Tell the others which process this is."""
        state = process_state(os.getpid())
        mine = {
            "pid": os.getpid(),
            "started": state.started if state else 0,
            "identity": self._identity,
            "host": self.host,
        }
        self._store.set(f"id/{self.rank}", json.dumps(mine))

    @property
    def all_joined(self) -> bool:
        return all(peer.joined for peer in self.peers.values())

    @property
    def all_done(self) -> bool:
        return all(peer.done for peer in self.peers.values())

    def exchange(self, seconds: float = -1) -> None:
        """Post, and read what the others have posted.

        Args:
            seconds: to wait at most for a thread that is doing so already; -1 is for ever.
        """
        if self.error or not self._lock.acquire(timeout=seconds):
            return
        try:
            self._set_post()
            if self._store.check(["failure"]):
                self.learn(Failure.from_json(self._store.get("failure")))
            for peer in self.peers.values():
                if not peer.done:
                    self._read(peer)
            self.exchanged = time.monotonic()
        except RuntimeError as error:
            if not self._closed:
                self.error = str(error).splitlines()[0]
        finally:
            self._lock.release()

    def _set_post(self) -> None:
        self._number += 1
        self._store.set(f"post/{self.rank}", self._make_post(self._number).to_json())

    def _read(self, peer: Peer) -> None:
        key = f"post/{peer.rank}"
        if not peer.joined:
            if not self._store.check([key, f"id/{peer.rank}"]):
                return
            found = json.loads(self._store.get(f"id/{peer.rank}"))
            peer.host, peer.local = found["host"], found["identity"] == self._identity
            if peer.local:
                self.processes.add(peer.rank, found["pid"], found["started"])
        post = Post.from_json(self._store.get(key))
        if post.number != peer.post.number or not peer.joined:
            peer.post, peer.heard = post, time.monotonic()
        peer.joined = True  # last: from here on its silence counts
        if post.phase == "done" or peer.rank in self.processes.ended:
            peer.done = bool(self._store.check([f"done/{peer.rank}"]))

    def declare(self, failure: Failure) -> Failure:
        """Write the first-error record, unless there is one; what it says."""
        if self.failure is None and not self.error and self._lock.acquire(timeout=LOCK_SECONDS):
            try:
                first = self._store.compare_set("failure", "", failure.to_json())
                failure = Failure.from_json(first)
            except RuntimeError:
                pass  # nobody can be told
            finally:
                self._lock.release()
        return self.learn(failure)

    def learn(self, failure: Failure) -> Failure:
        """Keep the first failure that is known here."""
        if self.failure is None:
            self.failure = failure
            self.known.set()
        return self.failure

    def tell(self, key: str, value: str) -> None:
        with self._lock:
            self._store.set(f"told/{key}", value)

    def ask(self, key: str) -> str | None:
        """What another rank told, if it has."""
        with self._lock:
            if not self._store.check([f"told/{key}"]):
                return None
            return str(self._store.get(f"told/{key}").decode())

    def close(self, done: bool) -> None:
        """Args: whether this rank's end is to be taken for a good one."""
        self._closed = True
        if done and not self.error and self._lock.acquire(timeout=LOCK_SECONDS):
            try:
                self._store.set(f"done/{self.rank}", "1")
                self._set_post()
                self._store.check([f"done/{self.rank}"])  # an answer: the word has arrived
            except RuntimeError:
                pass  # the store has ended before us: so has the launch
            finally:
                self._lock.release()
