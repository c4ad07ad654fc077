"""Who is at fault: the judgements of the watch, without threads, stores and clocks."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tprt.distributed import verdict
from tprt.distributed.failure import Failure
from tprt.distributed.progress import RESTING, Progress
from tprt.distributed.verdict import Limits, Peer, Post
from tprt.errors import PeerLost, RankMismatch, StepTimeout

LIMITS = Limits(step_timeout=4.0, load_timeout=30.0, interval=0.5)
WORKING = ["load", "warm-up", "prefill", "decode", "write", "schedule", "records", "generate"]

working = st.sampled_from(WORKING)
phases = st.sampled_from([*WORKING, *sorted(RESTING)])
seconds = st.floats(0, 1000)
waits = st.sampled_from(["all_reduce", "all_gather", "record", "the device"])
trails = st.lists(st.sampled_from(["all_reduce", "all_gather"]), max_size=5)
posts = st.builds(
    Post,
    number=st.integers(0, 1000),
    phase=phases,
    step=st.integers(-1, 1000),
    waiting=st.sampled_from(["", "all_reduce", "record"]),
    idle=seconds,
    trail=trails,
)


# ---------------------------------------------------------------- a rank that does not move


@given(phase=working, idle=seconds)
def test_who_owes_movement_has_the_limit_of_its_phase(phase, idle):
    limit = 30.0 if phase in ("load", "warm-up", "write") else 4.0
    found = verdict.stalled(3, "h", Post(phase=phase, step=7, idle=idle, stack=["x"]), LIMITS)
    assert (found is not None) == (idle > limit)
    if found is not None:
        assert (found.kind, found.rank, found.host, found.code) == ("stalled", 3, "h", 6)
        assert (found.phase, found.step, found.stack) == (phase, 7, ["x"])
        setting = "load_timeout" if limit == 30.0 else "step_timeout"
        assert setting in found.hint and f"{limit:g} s" in found.hint
        assert isinstance(found.as_error(), StepTimeout) and "rank 3" in found.as_error().what


@given(post=posts)
def test_waiting_and_resting_are_never_a_stall(post):
    assume(post.waiting or post.phase in RESTING)
    assert verdict.stalled(0, "h", post, LIMITS) is None


# ---------------------------------------------------------------- a rank that is not heard


def peer(**known) -> Peer:
    usual = {"rank": 2, "host": "far", "joined": True, "heard": 100.0}
    return Peer(**usual | {"post": Post(phase="decode", step=5)} | known)


@given(quiet=seconds, post=posts, stopped=st.booleans(), local=st.booleans())
def test_silence_counts_whatever_the_rank_was_doing(quiet, post, stopped, local):
    """The limits of phases are for movement; the thread that posts has nothing else to do."""
    seen = peer(post=post, stopped=stopped, local=local)
    found = verdict.silent(seen, 100.0 + quiet, LIMITS)
    assert (found is not None) == (100.0 + quiet - 100.0 > 4.0)
    if found is not None:
        assert found.kind == ("stopped" if stopped else "stalled" if local else "silent")
        assert (found.rank, found.host, found.phase, found.step) == (
            2,
            "far",
            post.phase,
            post.step,
        )
        assert "rank 2" in found.what and found.hint


@given(quiet=seconds)
def test_a_rank_that_is_done_may_be_silent(quiet):
    assert verdict.silent(peer(done=True), 100.0 + quiet, LIMITS) is None


@pytest.mark.parametrize("limits", [LIMITS, Limits(step_timeout=60.0, load_timeout=5.0)])
def test_a_rank_that_never_came_has_the_longer_limit(limits):
    limit = max(limits.step_timeout, limits.load_timeout)
    missing = peer(joined=False, host="", post=Post())
    assert verdict.silent(missing, 100.0 + limit, limits) is None
    found = verdict.silent(missing, 100.0 + limit + 0.1, limits)
    assert found is not None and found.kind == "silent" and "has not come" in found.what


@given(heard=st.lists(st.floats(0, 10), min_size=1, max_size=5))
def test_a_broken_connection_is_blamed_on_who_has_been_silent_longest(heard):
    """Two posts missed, not one: they come every half second."""
    peers = [peer(rank=r, heard=100.0 - quiet) for r, quiet in enumerate(heard)]
    found = verdict.likely_gone(peers, 100.0, LIMITS)
    quiet = max(100.0 - p.heard for p in peers)
    assert (found is not None) == (quiet > 2.5 * LIMITS.interval)
    if found is not None:
        assert 100.0 - found.heard == quiet
        told = verdict.connections_broke(found, 100.0)
        assert told.kind == "silent" and told.rank == found.rank
    silent = [replace(p, done=True) for p in peers] + [peer(rank=9, joined=False, heard=0.0)]
    assert verdict.likely_gone(silent, 100.0, LIMITS) is None


# ---------------------------------------------------------------- a rank that has ended


@pytest.mark.parametrize(
    "status, kind, words",
    [
        (9, "killed", "signal 9 (SIGKILL)"),
        (11, "died", "signal 11 (SIGSEGV)"),
        (0, "exited", "left with code 0 before the work was over"),
        (3 << 8, "exited", "left with code 3"),
        (None, "killed", "has died"),
    ],
)
def test_how_a_rank_has_ended(status, kind, words):
    found = verdict.died(peer(), Post(phase="prefill", step=8), status)
    assert (found.kind, found.rank, found.phase, found.step, found.code) == (
        kind,
        2,
        "prefill",
        8,
        6,
    )
    assert words in found.what and "rank 2" in found.what
    assert isinstance(found.as_error(), PeerLost)


# ---------------------------------------------------------------- ranks that all wait


def waiting(at: str, step: int = 7, trail: tuple[str, ...] = (), **known) -> Post:
    return Post(phase="decode", step=step, waiting=at, idle=5.0, trail=[*trail, at], **known)


def judged(*of_ranks: Post) -> Failure | None:
    hosts = {rank: f"host{rank}" for rank in range(len(of_ranks))}
    return verdict.deadlock(dict(enumerate(of_ranks)), hosts, LIMITS)


@given(everyone=st.lists(posts, min_size=2, max_size=5))
def test_no_deadlock_while_anybody_works_rests_or_has_just_moved(everyone):
    resting = everyone[0].phase in RESTING
    limit = LIMITS.of(everyone[0].phase)
    stuck = all(post.waiting and post.idle > limit for post in everyone)
    assert (judged(*everyone) is not None) == (stuck and not resting)


def test_a_rank_alone_has_nobody_to_wait_for():
    assert judged(waiting("all_reduce")) is None


def test_the_rank_that_is_elsewhere_is_told_by_comparison():
    here, there = waiting("all_reduce"), waiting("all_gather", trail=("all_reduce",))
    for odd in range(4):
        found = judged(*(there if rank == odd else here for rank in range(4)))
        assert found is not None and (found.kind, found.rank, found.code) == ("deadlock", odd, 6)
        assert found.host == f"host{odd}"
        for rank in range(4):
            assert f"rank {rank} waits in" in found.what, "where each of them is"


@given(
    size=st.integers(2, 6), odd=st.integers(0, 5), step=st.integers(0, 3), trail=trails, at=waits
)
def test_one_against_a_majority_is_always_found(size, odd, step, trail, at):
    assume(odd < size and size > 2)
    others = waiting("all_reduce", trail=("all_gather",))
    alone = waiting(at, step, tuple(trail))
    same = (others.step, others.trail, others.waiting)
    assume((alone.step, alone.trail, alone.waiting) != same)
    found = judged(*(alone if rank == odd else others for rank in range(size)))
    assert found is not None and found.rank == odd


def test_in_a_tie_rank_0_is_the_measure():
    """It decides what is done, so who is elsewhere has not followed."""
    found = judged(waiting("record", -1), waiting("all_reduce"))
    assert found is not None and found.rank == 1


def test_where_all_are_at_one_place_no_rank_above_0_is_blamed():
    found = judged(waiting("all_reduce"), waiting("all_reduce"))
    assert found is not None and found.rank == 0 and "link" in found.what


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("odd", [0, 1])
def test_a_rank_that_knows_it_deviates_is_named_before_any_majority(size, odd):
    why = "at its collective 2 of step 7 stood all_gather, usual is all_reduce"
    ranks = [waiting("all_reduce") for _ in range(size)]
    ranks[odd] = waiting("all_gather", deviates=why)
    found = judged(*ranks)
    assert found is not None and (found.kind, found.rank, found.code) == ("mismatch", odd, 7)
    assert why in found.what and isinstance(found.as_error(), RankMismatch)


def test_the_limit_of_a_deadlock_is_that_of_the_phase():
    loading = [replace(waiting("gather", -1), phase="load", idle=20.0) for _ in range(2)]
    assert judged(*loading) is None
    assert judged(*(replace(post, idle=31.0) for post in loading)) is not None


# ---------------------------------------------------------------- what a rank knows of itself


def step(progress: Progress, number: int, *collectives: str, kind: str = "decode") -> None:
    progress.enter("decode", number, kind=kind)
    for name in collectives:
        progress.wait_for(name)
        progress.go_on()


@given(
    trail=st.lists(st.sampled_from("abc"), max_size=6),
    other=st.lists(st.sampled_from("abc"), max_size=6),
)
def test_a_step_deviates_from_others_of_its_kind_as_soon_as_it_shows(trail, other):
    progress = Progress()
    step(progress, 0, *trail)
    step(progress, 1, *other)
    assert bool(progress.deviates) == (other != trail[: len(other)])
    progress.enter("idle")
    assert bool(progress.deviates) == (other != trail)
    if progress.deviates:
        assert "of step 1" in progress.deviates
        step(progress, 2, *trail)
        progress.enter("idle")
        assert "of step 1" in progress.deviates, "the first is what counts"


def test_steps_of_other_kinds_and_of_none_are_not_compared():
    progress = Progress()
    step(progress, 0, "a", "b")
    step(progress, 1, "b", kind="with options")
    step(progress, 2, "c", "c", kind="")
    step(progress, 3, kind="")
    progress.enter("idle")
    assert progress.deviates == ""


def test_a_record_is_no_part_of_a_step():
    progress = Progress()
    step(progress, 0, "a")
    progress.enter("schedule")
    progress.wait_for("record", collective=False)
    assert (progress.waiting, progress.trail) == ("record", [])


@given(st.lists(st.sampled_from(["enter", "move", "wait", "go on"]), min_size=1))
def test_whatever_a_rank_does_is_a_movement(does):
    progress = Progress()
    for what in does:
        before = progress.moves
        {
            "enter": lambda: progress.enter("decode", 1),
            "move": progress.move,
            "wait": lambda: progress.wait_for("all_reduce"),
            "go on": progress.go_on,
        }[what]()
        assert progress.moves > before


def test_a_wait_ends_with_the_failure_of_the_ranks():
    progress = Progress()
    progress.check()
    progress.failure = Failure("killed", 1, "rank 1, which was ended by signal 9 (SIGKILL)")
    with pytest.raises(PeerLost, match="because of rank 1, which was ended by signal 9"):
        progress.check()


# ---------------------------------------------------------------- on the wire


texts = st.text(max_size=20)


@given(
    st.builds(
        Failure,
        kind=texts,
        rank=st.integers(-1, 100),
        what=texts,
        code=st.integers(0, 255),
        host=texts,
        phase=texts,
        step=st.integers(-1, 2**40),
        where=texts,
        hint=texts,
        stack=st.lists(texts, max_size=24),
    )
)
def test_a_failure_survives_the_store(failure):
    assert Failure.from_json(failure.to_json()) == failure
    assert Failure.from_json(failure.to_json().encode()) == failure


@given(posts)
def test_a_post_survives_the_store(post):
    assert Post.from_json(post.to_json().encode()) == post


def test_a_long_stack_is_cut_at_its_outer_end():
    stack = [f"line {i}" for i in range(1000)]
    kept = Failure.from_json(Failure("exception", 0, "x", stack=stack).to_json()).stack
    assert 10 < len(kept) < 100 and kept[-1] == "line 999"
