"""Who is at fault, from what the ranks have posted. Pure functions: no threads, no store, no clocks.

A rank that waits for others is never at fault for waiting, however long. One that owes movement and does
not move has stalled; one that does not even post is stopped or out of reach; ranks that all wait have
left the common sequence of collectives, and the one that did says so or is told by comparison.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from tprt.distributed.failure import Failure
from tprt.distributed.liveness import how_it_ended
from tprt.distributed.progress import RESTING
from tprt.errors import PeerLost, RankMismatch

BUG = "this is a bug of the program on that rank, or its memory is damaged; please report it"


@dataclass(frozen=True)
class Limits:
    """Seconds.

    Args:
        step_timeout: without movement in a step, a call or a final write, or without any sign of life.
        load_timeout: without movement while weights are loaded, kernels prepared, the output written.
        interval: between posts.
    """

    step_timeout: float = 60.0
    load_timeout: float = 600.0
    interval: float = 0.5

    def of(self, phase: str) -> float:
        return self.load_timeout if phase in ("load", "warm-up", "write") else self.step_timeout


@dataclass(frozen=True)
class Post:
    """One sign of life.

    Args:
        number: grows with every post.
        idle: seconds since the main thread last moved.
        at: where in the program it is.
        stack, trail, deviates: once it has not moved for a while.
    """

    number: int = 0
    phase: str = "start"
    step: int = -1
    detail: str = ""
    waiting: str = ""
    idle: float = 0.0
    at: str = ""
    stack: list[str] = field(default_factory=list)
    trail: list[str] = field(default_factory=list)
    deviates: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Post":
        return cls(**json.loads(text))

    @property
    def where(self) -> str:
        return ", ".join(filter(None, [self.detail, self.at and f"at {self.at}"]))


@dataclass
class Peer:
    """Another rank, as this one knows it.

    Args:
        heard: when its last post came, on the clock of this rank.
        local: whether its process can be seen from here.
        stopped: whether it is known to be stopped (SIGSTOP, a debugger).
    """

    rank: int
    host: str = ""
    post: Post = field(default_factory=Post)
    heard: float = 0.0
    joined: bool = False
    done: bool = False
    local: bool = False
    stopped: bool = False


def stalled(rank: int, host: str, post: Post, limits: Limits) -> Failure | None:
    """This rank's own judgement of itself."""
    limit = limits.of(post.phase)
    if post.phase in RESTING or post.waiting or post.idle <= limit:
        return None
    setting = "engine.load_timeout" if limit == limits.load_timeout else "engine.step_timeout"
    hint = f"if it only needs longer: a larger {setting}; allowed are {limit:g} s without progress"
    what = f"rank {rank}, which has not moved for {post.idle:.0f} s"
    return _of(rank, "stalled", what, host, post, hint)


def died(peer: Peer, post: Post, status: int | None) -> Failure:
    """A rank whose process has ended before it had said that its work is done.

    Args:
        post: the last known of it.
        status: as of ``wait``, where known.
    """
    kind, words = how_it_ended(status)
    hint = "look for its own message"
    if kind == "killed":
        hint = "the same command resumes the job; out of host memory is a common reason"
    return _of(peer.rank, kind, f"rank {peer.rank}, which {words}", peer.host, post, hint)


def launcher_lost(parent: int | None, host: str, post: Post, how: str) -> Failure:
    what = f"the launcher (process {parent}), which {how}"
    return _of(
        -1, "launcher", what, host, replace(post, stack=[]), "the same command resumes the job"
    )


def store_lost(rank: int, host: str, post: Post, why: str, hint: str) -> Failure:
    """Seen from a rank that cannot tell whose fault it is."""
    return _of(
        rank, "unreachable", f"rank {rank}, which {why}", host, replace(post, stack=[]), hint
    )


def store_went_with(first: Peer, post: Post, error: str) -> Failure:
    """The store lies on rank 0's host, as a rule."""
    what = f"rank 0, whose host took the rendezvous store with it: {error}"
    hint = "look at that host, for the message of its ranks or launcher"
    return _of(0, "silent", what, first.host, post, hint)


def left_sequence(rank: int, host: str, post: Post, odd: str) -> Failure:
    """This rank's own confession."""
    what = f"rank {rank}, which left the common sequence: {odd}"
    return _of(rank, "mismatch", what, host, replace(post, stack=[]), BUG, RankMismatch.exit_code)


def left_behind(rank: int, host: str, post: Post, seconds: float) -> Failure:
    what = f"rank {rank}, which does not end {seconds:.0f} s after rank 0"
    return _of(rank, "stalled", what, host, post, "see its stack")


def connections_broke(peer: Peer, now: float) -> Failure:
    """A rank of another host that is gone, as far as can be told from here."""
    what = f"rank {peer.rank}, whose connections broke and which is silent for {now - peer.heard:.1f} s"
    return _of(peer.rank, "silent", what, peer.host, peer.post, "look at its host and the network")


def _of(
    rank: int,
    kind: str,
    what: str,
    host: str,
    post: Post,
    hint: str,
    code: int = PeerLost.exit_code,
) -> Failure:
    return Failure(
        kind, rank, what, code, host, post.phase, post.step, post.where, hint, post.stack
    )


def silent(peer: Peer, now: float, limits: Limits) -> Failure | None:
    """A rank that has given no sign of life for too long."""
    limit = limits.step_timeout if peer.joined else max(limits.load_timeout, limits.step_timeout)
    if peer.done or now - peer.heard <= limit:
        return None
    seconds = now - peer.heard
    if not peer.joined:
        return Failure(
            "silent",
            peer.rank,
            f"rank {peer.rank}, which has not come within {seconds:.0f} s",
            hint="look for its own message; every rank must be started",
        )
    kind, why, hint = "silent", "has given no sign of life", "look at its host and the network"
    if peer.stopped:
        kind, why = "stopped", "is stopped (SIGSTOP or a debugger) and silent"
        hint = "see who stopped it"
    elif peer.local:
        kind = "stalled"  # not even its threads get to run
        hint = "its process is there: look at what it does (py-spy dump --pid)"
    what = f"rank {peer.rank}, which {why} for {seconds:.0f} s"
    return _of(peer.rank, kind, what, peer.host, peer.post, hint)


def deadlock(posts: Mapping[int, Post], hosts: Mapping[int, str], limits: Limits) -> Failure | None:
    """Ranks that step together and all wait: the one that left the common sequence.

    Args:
        posts: of every rank of the group, the leader first.
    """
    leader = next(iter(posts))
    limit = limits.of(posts[leader].phase)
    if posts[leader].phase in RESTING or len(posts) < 2:
        return None
    if any(not post.waiting or post.idle <= limit for post in posts.values()):
        return None
    rank, why = _odd_one(posts)
    post = posts[rank]
    waits = "; ".join(f"rank {r} waits in {p.waiting} of step {p.step}" for r, p in posts.items())
    kind, code = "deadlock", PeerLost.exit_code
    if post.deviates:
        kind, code = "mismatch", RankMismatch.exit_code
    return _of(rank, kind, f"rank {rank}, {why}: {waits}", hosts.get(rank, ""), post, BUG, code)


def _odd_one(posts: Mapping[int, Post]) -> tuple[int, str]:
    for rank, post in posts.items():
        if post.deviates:
            return rank, f"where {post.deviates}"
    groups = Counter(_sequence(post) for post in posts.values())
    leader = next(iter(posts))
    most, count = groups.most_common(1)[0]
    if list(groups.values()).count(count) > 1:
        most = _sequence(posts[leader])  # a tie: rank 0 decides what is done, so it is the measure
    for rank, post in posts.items():
        if _sequence(post) != most:
            return rank, "which is elsewhere than the others"
    return leader, "which waits like all others, as if the link between them were lost"


def _sequence(post: Post) -> tuple[int, tuple[str, ...], str]:
    return post.step, tuple(post.trail), post.waiting


def likely_gone(peers: Sequence[Peer], now: float, limits: Limits) -> Peer | None:
    """For a rank whose connection to a peer has broken: who has missed two posts already."""
    quiet = [p for p in peers if p.joined and not p.done and now - p.heard > 2.5 * limits.interval]
    return max(quiet, key=lambda p: now - p.heard, default=None)
