"""The watch over the ranks: on one rank with peers made up, and in a user's own program on two.

What it does to a whole job stands in test_faults.py.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from conftest import ROOT, TINY
from torch.distributed import HashStore, TCPStore

from tprt.distributed.failure import Failure
from tprt.distributed.liveness import host_identity, process_state
from tprt.distributed.verdict import Limits, Post
from tprt.distributed.watch import Watch
from tprt.errors import PeerLost, RankMismatch, StepTimeout

QUICK = Limits(step_timeout=1.0, load_timeout=2.0, interval=0.1)
PATIENT = Limits(step_timeout=60.0, load_timeout=60.0, interval=0.1)
SOON = 20.0  # seconds; what takes a second may take longer on a busy machine
FIRST = Failure("exception", 1, "rank 1: ValueError: x")


@pytest.fixture
def store() -> HashStore:
    return HashStore()


@pytest.fixture
def watching(store) -> Iterator[Callable[..., Watch]]:
    """Starts watches, and closes them at the end."""
    with contextlib.ExitStack() as stack:

        def start(rank: int = 0, size: int = 2, limits: Limits = PATIENT, **options: Any) -> Watch:
            of = options.pop("store", store)
            watch = Watch(of, rank, size, limits, **options).start()
            stack.callback(watch.close, failed=True)
            return watch

        yield start


@pytest.fixture
def child() -> Iterator[subprocess.Popen]:
    """A process of this host that could be a rank."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def join(store: Any, rank: int, pid: int, post: Post, identity: str = "") -> None:
    """Say what a rank says."""
    state = process_state(pid)
    who = {"pid": pid, "started": state.started if state else 0, "host": f"host{rank}"}
    who["identity"] = identity or host_identity()
    store.set(f"id/{rank}", json.dumps(who))
    store.set(f"post/{rank}", post.to_json())


def failure_of(watch: Watch, seconds: float = SOON) -> Failure:
    until = time.monotonic() + seconds
    while watch.failure is None:
        assert time.monotonic() < until, "no failure was found"
        time.sleep(0.01)
    return watch.failure


def joined(watch: Watch) -> Watch:
    until = time.monotonic() + SOON
    while not watch._channel.all_joined:
        assert time.monotonic() < until
        time.sleep(0.01)
    return watch


def finds_nothing(watch: Watch, seconds: float = 1.8) -> bool:
    time.sleep(seconds)
    return watch.failure is None


# ---------------------------------------------------------------- the first-error record


def test_the_first_of_many_failures_is_what_all_tell(watching):
    watches = [watching(rank, 3) for rank in range(3)]
    own = [Failure("exception", rank, f"rank {rank}: x") for rank in range(3)]
    told: list[Failure] = []
    threads = [
        threading.Thread(target=lambda w=w, f=f: told.append(w.fail(f)))
        for w, f in zip(watches, own, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 3 and len({f.to_json() for f in told}) == 1 and told[0] in own
    assert all(failure_of(watch) == told[0] for watch in watches)


def test_every_rank_learns_of_a_failure_and_is_told_once(watching):
    heard: list[tuple[int, Failure]] = []
    watches = [
        watching(rank, 3, on_failure=lambda failure, rank=rank: heard.append((rank, failure)))
        for rank in range(3)
    ]
    watches[1].fail(FIRST)
    for watch in watches:
        assert failure_of(watch) == FIRST
    until = time.monotonic() + SOON
    while len(heard) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.5)
    assert sorted(rank for rank, _ in heard) == [0, 1, 2]
    for watch in watches:
        with pytest.raises(PeerLost, match="rank 1: ValueError"):
            watch.progress.check()


def test_an_error_is_told_with_where_it_was(watching):
    watch = watching(1)
    watch.progress.enter("decode", 12)
    try:
        raise ValueError("nine")
    except ValueError as error:
        found = watch.of(error, 6)
        watch.progress.enter("idle")  # as the call does that the error leaves
        late = watch.of(error, 6)
    assert (found.kind, found.rank, found.phase, found.step) == ("exception", 1, "decode", 12)
    assert found.what == "rank 1: ValueError: nine" and "ValueError: nine" in found.stack[-1]
    assert (late.phase, late.step) == ("decode", 12)


def test_what_rank_0_tells_can_be_asked_for(watching):
    first, second = watching(0), watching(1)
    asked: list[str] = []
    thread = threading.Thread(target=lambda: asked.append(second.ask("job")))
    thread.start()
    time.sleep(0.2)
    first.tell("job", "run")
    thread.join(SOON)
    assert asked == ["run"]
    first.fail(FIRST)
    with pytest.raises(PeerLost, match="rank 1"):
        second.ask("what nobody tells")


# ---------------------------------------------------------------- ends of processes


@pytest.mark.parametrize(
    "how, kind", [(signal.SIGKILL, "killed"), (signal.SIGSEGV, "died"), (None, "exited")]
)
def test_a_process_that_ends_is_named_with_how(watching, store, child, how, kind):
    watch = watching()
    join(store, 1, child.pid, Post(1, phase="decode", step=3))
    joined(watch)
    began = time.monotonic()
    if how is None:
        child.communicate(b"\n")
    else:
        child.send_signal(how)
    found = failure_of(watch)
    assert (found.rank, found.host, found.phase, found.step) == (1, "host1", "decode", 3)
    # Popen may have collected it first: then nobody can say how it ended.
    assert found.kind in (kind, "killed") and time.monotonic() - began < SOON


def test_a_process_that_was_never_there_is_a_death(watching, store):
    watch = watching()
    with subprocess.Popen(["true"]) as gone:
        pass
    join(store, 1, gone.pid, Post(1))
    assert failure_of(watch).kind == "killed"


def test_an_end_after_the_work_is_none(watching, store, child):
    watch = watching()
    join(store, 1, child.pid, Post(1, phase="done"))
    store.set("done/1", "1")
    joined(watch)
    child.kill()
    assert finds_nothing(watch)
    watch.wait_for_others(SOON)


def test_nobody_is_missed_without_the_detector(watching, store, child):
    """The negative control."""
    watch = watching(detect=Watch.ALL - {"death"})
    join(store, 1, child.pid, Post(1, phase="decode", step=3))
    joined(watch)
    child.kill()
    assert finds_nothing(watch)


def test_a_dead_peer_was_where_this_rank_is(watching, store, child):
    """Its last post is half a second old; who steps together is at most one step apart."""
    watch = watching()
    watch.progress.group = (0, 1)
    join(store, 1, child.pid, Post(1, phase="decode", step=3))
    joined(watch)
    watch.progress.enter("prefill", 9)
    watch.progress.wait_for("all_reduce")
    child.kill()
    found = failure_of(watch)
    assert (found.phase, found.step) == ("prefill", 9)


def test_a_signal_that_follows_a_death_is_told_as_the_death(watching, store, child):
    """Launchers end all ranks when one has died; the signal may arrive before the watch has looked."""
    watch = watching()
    join(store, 1, child.pid, Post(1, phase="decode", step=3))
    joined(watch)
    child.kill()
    time.sleep(0.05)
    assert watch.interrupted("ended by SIGTERM", 143).rank == 1


def test_a_signal_alone_is_an_interrupt(watching):
    found = watching(1).interrupted("ended by SIGTERM", 143)
    assert (found.kind, found.rank, found.code, found.interrupted) == ("interrupted", 1, 143, True)


def test_a_launcher_that_is_not_the_parent_any_more_is_named(watching):
    found = failure_of(watching(parent=1 if os.getppid() != 1 else 2))
    assert (found.kind, found.rank) == ("launcher", -1) and "launcher" in found.what
    assert finds_nothing(watching(1, parent=os.getppid(), store=HashStore()), 1.0)


# ---------------------------------------------------------------- silence


def test_a_stopped_process_is_named_and_ended(watching, store, child):
    watch = watching(limits=QUICK)
    join(store, 1, child.pid, Post(1, phase="decode", step=3))
    child.send_signal(signal.SIGSTOP)
    found = failure_of(watch)
    assert (found.kind, found.rank) == ("stopped", 1) and "SIGSTOP" in found.what
    watch.end_stuck_peer()
    assert child.wait(SOON) == -signal.SIGKILL


def test_a_rank_of_another_host_that_falls_silent(watching, store):
    watch = watching(limits=QUICK)
    join(store, 1, os.getpid(), Post(1, phase="load"), identity="another host")
    found = failure_of(watch)
    assert (found.kind, found.rank, found.host) == ("silent", 1, "host1")


def test_a_rank_that_never_comes(watching):
    began = time.monotonic()
    found = failure_of(watching(limits=QUICK))
    assert found.kind == "silent" and found.rank == 1 and "has not come" in found.what
    assert time.monotonic() - began > QUICK.load_timeout


def test_signs_of_life_are_enough(watching):
    """Two ranks of which neither has anything to do."""
    watches = [watching(rank, limits=QUICK) for rank in (0, 1)]
    assert finds_nothing(watches[0], 2.2) and watches[1].failure is None


def test_a_watch_that_stood_still_itself_blames_nobody(watching, store, monkeypatch):
    """A laptop that slept, or a process that was stopped: others were silent for as long."""
    watch = watching(limits=QUICK)
    join(store, 1, os.getpid(), Post(1, phase="decode"), identity="another host")
    joined(watch)
    real = watch._channel.processes.wait
    still = threading.Event()

    def wait(seconds: float) -> None:
        time.sleep(0 if still.is_set() else 2.5)
        real(seconds)

    monkeypatch.setattr(watch._channel.processes, "wait", wait)
    assert finds_nothing(watch, 3.0)
    still.set()
    assert failure_of(watch).kind == "silent"


# ---------------------------------------------------------------- standing still


def test_a_main_thread_that_does_not_move_is_named_with_its_stack(watching):
    watch = watching(1, limits=Limits(step_timeout=3.0, load_timeout=2.0, interval=0.1))
    watching(0)
    watch.progress.enter("decode", 5)
    found = failure_of(watch)
    assert (found.kind, found.rank, found.phase, found.step) == ("stalled", 1, "decode", 5)
    assert any("failure_of" in line for line in found.stack), found.stack
    with pytest.raises(StepTimeout):
        watch.progress.check()


@pytest.mark.parametrize("state", ["moves", "waits", "rests", "undetected"])
def test_a_main_thread_that_moves_waits_or_rests_is_let_be(watching, state):
    detect = Watch.ALL - {"stall"} if state == "undetected" else Watch.ALL
    watch = watching(1, limits=QUICK, detect=detect)
    watching(0)
    watch.progress.enter("idle" if state == "rests" else "decode", 5)
    if state == "waits":
        watch.progress.wait_for("all_reduce")
    until = time.monotonic() + 1.8
    while time.monotonic() < until:
        if state == "moves":
            watch.progress.move()
        time.sleep(0.05)
    assert watch.failure is None


def test_ranks_that_wait_for_each_other_are_found(watching):
    limits = Limits(step_timeout=3.0, load_timeout=3.0, interval=0.1)  # trails are told after 2 s
    first, second = watching(0, limits=limits), watching(1, limits=limits)
    for watch, at in ((first, "all_gather"), (second, "all_reduce")):
        watch.progress.group = (0, 1)
        watch.progress.enter("decode", 1, kind="usual")
        watch.progress.wait_for("all_gather")
        watch.progress.go_on()
        watch.progress.enter("decode", 2, kind="usual")
        watch.progress.wait_for(at)
    found = failure_of(second)
    assert (found.kind, found.rank, found.code) == ("mismatch", 1, 7)
    assert "all_reduce" in found.what and "usual is all_gather" in found.what
    assert failure_of(first) == found


def test_who_has_left_the_sequence_says_so_when_its_connection_breaks(watching):
    watch = watching(1)
    for step, at in ((1, "all_gather"), (2, "all_reduce")):
        watch.progress.enter("decode", step, kind="usual")
        watch.progress.wait_for(at)
    found = watch.explain()
    assert found is not None and (found.kind, found.rank, found.code) == ("mismatch", 1, 7)
    with pytest.raises(RankMismatch):
        watch.progress.check()


def test_a_broken_connection_that_nobody_explains_stays_what_it_is(watching):
    watches = [watching(rank) for rank in (0, 1)]
    assert joined(watches[0]).explain(0.2) is None and watches[0].failure is None


def test_a_rank_that_does_not_end_after_rank_0_has(watching, store):
    watch = watching(1, limits=QUICK)
    join(store, 0, os.getpid(), Post(1, phase="done"))
    store.set("done/0", "1")
    found = failure_of(watch)
    assert (found.kind, found.rank) == ("stalled", 1) and "after rank 0" in found.what


# ---------------------------------------------------------------- the store


class BadStore(HashStore):
    """One that can be told to fail, or not to answer."""

    def __init__(self) -> None:
        super().__init__()
        self.fails, self.answers = False, threading.Event()
        self.answers.set()

    def check(self, keys: list[str]) -> bool:
        self.answers.wait(30)
        if self.fails:
            raise RuntimeError("Broken pipe\nand a long trace")
        return super().check(keys)


def test_a_store_that_is_gone_ends_the_ranks(watching):
    store = BadStore()
    watch = watching(1, store=store)
    watching(0, store=store)
    joined(watch)
    store.fails = True
    found = failure_of(watch)
    assert (found.kind, found.rank) == ("unreachable", 1) and "Broken pipe" in found.what
    assert "long trace" not in found.what and found.from_outside


def test_a_store_that_does_not_answer_ends_the_ranks_and_holds_up_nothing(watching):
    store = BadStore()
    watch = watching(1, limits=QUICK, store=store)
    store.answers.clear()
    found = failure_of(watch)
    assert found.kind == "unreachable" and "no answer" in found.what
    began = time.monotonic()
    watch.close()
    assert time.monotonic() - began < SOON
    store.answers.set()


def test_without_the_detector_a_lost_store_is_no_failure(watching):
    store = BadStore()
    watch = watching(1, limits=QUICK, store=store, detect=frozenset({"store"}) ^ Watch.ALL)
    watching(0, store=store)
    joined(watch)
    store.fails = True
    assert finds_nothing(watch)


def test_a_watch_leaves_no_thread_and_no_descriptor(store, child):
    def held() -> tuple[list[str], int]:
        names = [t.name for t in threading.enumerate() if t.name.startswith("tprt-")]
        return sorted(names), len(os.listdir("/proc/self/fd"))

    before = held()
    watch = Watch(store, 0, 2, PATIENT).start()
    join(store, 1, child.pid, Post(1))
    joined(watch)
    assert len(held()[0]) == len(before[0]) + 2
    watch.close()
    watch.close()
    assert held() == before


# ---------------------------------------------------------------- in a user's own program

LIBRARY_LIMITS = Limits(step_timeout=4.0, load_timeout=5.0)
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def library_rank(call: str) -> None:
    """What a user may write; runs as a rank, and says on stdout what it met."""
    from tprt import LLM, SamplingParams

    def say(**what: object) -> None:
        print(json.dumps({"at": time.monotonic(), **what}), flush=True)

    rank = int(os.environ["RANK"])
    handlers = [signal.getsignal(number) for number in HANDLED]
    limits = {
        "step_timeout": LIBRARY_LIMITS.step_timeout,
        "load_timeout": LIBRARY_LIMITS.load_timeout,
    }
    llm = LLM(str(TINY), dtype="float32", kv_cache_memory=2**24, **limits)
    prompts = ["human: Reverse: lamp canoe frog cheese\n\nadept:"] * 4 if rank == 0 else None
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    try:
        for _ in range(20):
            if call == "stream":
                for _ in llm.stream(prompts, params):
                    pass
            elif call == "follow" and rank:
                llm.follow()
            else:
                llm.generate(prompts, params)
        say(error="none", what="")
    except Exception as error:
        say(error=type(error).__name__, what=str(error), peer=isinstance(error, PeerLost))
    with contextlib.suppress(PeerLost):
        llm.close()
    same = [signal.getsignal(number) for number in HANDLED] == handlers
    say(closed=True, same_handlers=same)


def run_library(call: str, fault: str, victim: int) -> tuple[dict, float]:
    """What the rank that is not the victim met, and the seconds from the fault to it."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(server.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # as under torchrun: the store is the launcher's
        "TPRT_FAULT": fault,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, call],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for line in ranks[victim].stderr or ():
            if "injected fault" in line:
                break
        at = time.monotonic()
        out, err = ranks[1 - victim].communicate(timeout=60)
        assert ranks[1 - victim].returncode == 0, err
        met, closed = (json.loads(line) for line in out.splitlines())
        assert closed["closed"] and closed["same_handlers"]
        return met, met["at"] - at
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def check_library(call: str, action: str, victim: int) -> None:
    met, seconds = run_library(call, f"decode:{action}:rank={victim},hit=30", victim)
    assert met["peer"] and f"because of rank {victim}" in met["what"], met
    waits = LIBRARY_LIMITS.step_timeout if action in ("stop", "sleep") else 0.0
    assert seconds < waits + 10


IN_CI = [
    ("generate", "kill", 1),
    ("stream", "raise", 1),
    ("follow", "raise", 0),
    ("follow", "stop", 0),
    ("generate", "sleep", 1),
]


@pytest.fixture(scope="module", autouse=True)
def library(request) -> Iterator[dict[tuple[str, str, int], Future]]:
    """Programs that run while the other tests here wait."""
    wanted = [
        item.callspec.params["case"]
        for item in request.session.items
        if getattr(item, "originalname", "")
        == "test_a_library_raises_on_the_others_and_ends_nobody"
    ]
    with ThreadPoolExecutor(1) as pool:
        yield {case: pool.submit(check_library, *case) for case in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", IN_CI, ids=lambda case: "-".join(map(str, case)))
def test_a_library_raises_on_the_others_and_ends_nobody(case, library):
    library[case].result()


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("action", ["kill", "raise", "memory", "exit", "segv", "stop", "sleep"])
@pytest.mark.parametrize("call", ["generate", "stream", "follow"])
def test_every_call_of_a_library(call, action, victim):
    check_library(call, action, victim)


if __name__ == "__main__":
    library_rank(sys.argv[1])
