"""Ranks in ``follow`` outlive any pause of rank 0, and notice soon when it is gone."""

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
from conftest import ROOT, TINY, free_port, run_ranks
from test_lockstep import damage

from tprt import LLM, SamplingParams
from tprt.distributed.failure import Failure
from tprt.distributed.watch import EXPLAIN_SECONDS
from tprt.engine import control
from tprt.engine.step_record import Kind
from tprt.errors import PeerLost, RankMismatch

PROMPTS = ["human: Reverse: lamp canoe frog cheese\n\nadept:", "human: Repeat: key door\n\nadept:"]
WORDS = [["cheese", "frog", "canoe", "lamp"], ["key", "door"]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
NEVER = 3600.0


def open_tiny(interval: float, **settings) -> LLM:
    control.HEARTBEAT_SECONDS = interval
    return LLM(str(TINY), dtype="float32", kv_cache_memory=2**24, **settings)


def rank() -> int:
    return int(os.environ["RANK"])


def words(outputs) -> list[list[str]]:
    return [out.outputs[0].text.split() for out in outputs]


def lost(work, *args) -> tuple[str, float]:
    """What the ``PeerLost`` says that ``work`` must raise, and the seconds it took."""
    began = time.monotonic()
    with pytest.raises(PeerLost) as caught:
        work(*args)
    return caught.value.what, time.monotonic() - began


def count_heartbeats(llm: LLM) -> list[int]:
    """Fills up with the step numbers of the heartbeats of rank 0's thread, on another rank."""
    channel, seen = llm._engine.control, []
    receive = channel.receive

    def counting(*args):
        record, checksum = receive(*args)
        if record.kind == Kind.HEARTBEAT and record.text:
            seen.append(record.step)
        return record, checksum

    channel.receive = counting
    return seen


def _pause(interval: float) -> object:
    with open_tiny(interval) as llm:
        llm.tp.control_group._set_default_timeout(timedelta(seconds=1))
        if rank():
            if interval == NEVER:
                return lost(llm.follow)
            return llm.follow()
        time.sleep(1.5)
        if interval == NEVER:
            return lost(llm.generate, PROMPTS, GREEDY)
        events = llm.stream(PROMPTS, GREEDY)
        first = next(events)
        time.sleep(1.5)  # in the middle of a call
        assert first.text + "".join(e.text for e in events if e.request_id == first.request_id)
        return words(llm.generate(PROMPTS, GREEDY))


def test_heartbeats_carry_followers_over_a_long_pause():
    """The group's limit is 1 s here; rank 0 says nothing for 1.5 s, twice."""
    answers, nothing = run_ranks(_pause, 2, 0.2)
    assert answers == WORDS and nothing is None


def test_without_heartbeats_the_same_pause_loses_them():
    """The negative control of the test above."""
    (_, _), (said, seconds) = run_ranks(_pause, 2, NEVER)
    # Its own limit, or that of rank 0 behind it, which has given up on this rank meanwhile.
    assert ("1000ms" in said or "because of rank 0" in said) and seconds < 5


def _interrupted(path: str, interval: float) -> object:
    """Calls with records of every size, and heartbeats in every gap between them."""
    long = {"prompt_token_ids": [80 + i % 500 for i in range(900)]}  # its record takes two messages
    mixed = [
        GREEDY,
        SamplingParams(seed=1, max_tokens=9, n=2),
        SamplingParams(max_tokens=3, seed=2),
    ]
    control.LOST_AFTER_INTERVALS = 10**6
    with open_tiny(interval, record_path=path, max_num_seqs=4) as llm:
        if rank():
            seen = count_heartbeats(llm)
            llm.follow()
            return len(seen), len(set(seen))
        found = []
        for _ in range(2):
            found += [out.to_json() for out in llm.generate([*PROMPTS, long], mixed)]
            found.append(llm.score([[80, 81, 82]]))
            for event in llm.stream(PROMPTS, GREEDY):
                found.append(event.text)
                time.sleep(0.01)
        return found


def test_heartbeats_change_nothing(tmp_path):
    """Not the answers, not the record file, and no record has a heartbeat within it."""
    path = tmp_path / "run"
    calm, (none, _) = run_ranks(_interrupted, 2, str(path), NEVER)
    recorded = path.read_bytes()
    busy, (many, numbers) = run_ranks(_interrupted, 2, str(path), 0.0005)
    assert none == 0 and many > 100 and numbers > 20
    assert busy == calm and path.read_bytes() == recorded


def _pause_before_a_mismatch() -> tuple[str, bool]:
    with open_tiny(0.05) as llm:
        if rank():
            damage(llm, "token", at_step=3)
            seen = count_heartbeats(llm)
            with pytest.raises(RankMismatch) as caught:
                llm.follow()
            return caught.value.what, 4 in seen
        llm.add_request(PROMPTS[0], GREEDY)
        with pytest.raises(RankMismatch) as caught:
            for _ in range(10):
                llm.step()
                time.sleep(0.2)
        return caught.value.what, True


def test_a_pause_with_a_step_in_flight_hides_no_mismatch():
    """A heartbeat makes nobody read results sooner: else one rank leaves before rank 0 knows why."""
    (said, _), (heard, paused) = run_ranks(_pause_before_a_mismatch, 2)
    assert said == heard and "token ids of step 4" in said and paused


def _slow_step() -> list[list[str]] | None:
    with open_tiny(0.1) as llm:
        if rank() == 0:
            for number, _ in enumerate(llm.stream(PROMPTS, GREEDY)):
                time.sleep(0.3 if number < 6 else 0)
            return words(llm.generate(PROMPTS, GREEDY))
        runner, steps = llm._engine.runner, iter(range(10**6))
        execute = runner.execute

        def slow(*args):
            result = execute(*args)
            time.sleep(1.5 if next(steps) == 2 else 0)
            return result

        runner.execute = slow
        return llm.follow()


def test_a_rank_that_is_slow_within_a_step_is_not_lost():
    """A heartbeat has to wait for it longer than for one that only listens: 0.6 s here."""
    assert run_ranks(_slow_step, 2) == [WORDS, None]


def _stopped() -> tuple[str, float]:
    with open_tiny(0.2) as llm:
        if rank() == 0:
            llm.tp.store.set("pid", str(os.getpid()))
            llm.tp.store.clone().wait(["continued"])
            return lost(llm.generate, PROMPTS, GREEDY)
        pid = int(llm.tp.store.get("pid"))
        seen = count_heartbeats(llm)

        def stop() -> None:
            while not seen:
                time.sleep(0.01)
            os.kill(pid, signal.SIGSTOP)

        threading.Thread(target=stop, daemon=True).start()
        try:
            return lost(llm.follow)
        finally:
            os.kill(pid, signal.SIGCONT)
            llm.tp.store.set("continued", "1")


def test_a_stopped_rank_0_is_noticed():
    """Its sockets stay open, so only the silence tells: 6 intervals, where the group's limit is 1 h."""
    (said, seconds), (heard, waited) = run_ranks(_stopped, 2, timeout=30)
    assert heard == "rank 0 has sent nothing for 1.2 s, not even a heartbeat" and waited < 4
    assert said.startswith("a collective failed") and seconds < 2 + EXPLAIN_SECONDS


def wait_for_failure(llm: LLM) -> None:
    """Until rank 0's thread has met one, without any call."""
    began = time.monotonic()
    while llm._engine.control._failure is None:
        assert time.monotonic() - began < 20
        time.sleep(0.05)


def _deaf_followers() -> str:
    """Two that say they follow: one does not listen, one is gone."""
    llm = open_tiny(0.2)
    llm.tp.store.set("following/1", "1")
    if rank() == 0:
        wait_for_failure(llm)
        said, seconds = lost(llm.generate, PROMPTS, GREEDY)
        assert seconds < 0.5 + EXPLAIN_SECONDS
        assert lost(llm.generate, PROMPTS, GREEDY)[0] == said
        llm.tp.store.set("known", "1")
        llm.close()  # nothing new to say, and nobody to wait for
    else:
        llm.tp.store.clone().wait(["known"])
        said, _ = lost(llm.follow)
        llm.close()
    llm = open_tiny(0.2)
    llm.tp.store.set("following/1", "1")
    if rank() == 0:
        wait_for_failure(llm)
        assert lost(llm.close)[1] < 1
        assert threading.active_count() == 1
    llm.close()
    return said


def test_what_a_heartbeat_meets_is_raised_by_the_next_call_or_by_close():
    said, _ = run_ranks(_deaf_followers, 2)
    assert "1200ms for send" in said


kept = []


def _ends_without_close() -> tuple[str, float] | None:
    control.LOST_AFTER_INTERVALS = 10**6  # so that silence alone is no sign
    llm = open_tiny(0.05)
    if rank() == 0:
        kept.append(llm)  # so that nothing is tidied up before the process ends
        time.sleep(0.5)
        return words(llm.generate(PROMPTS, GREEDY))
    return lost(llm.follow)


def test_rank_0_that_ends_without_close_is_noticed():
    """``run_ranks`` also checks that its process ends at once, and in peace, for all its thread."""
    answers, (said, seconds) = run_ranks(_ends_without_close, 2)
    assert answers == WORDS and seconds < 20
    assert said.startswith("ended because of rank 0, which ")  # its code may be gone already


def _closes_because_of_a_failure() -> str:
    llm = open_tiny(0.2)
    if rank() == 0:
        llm.generate(PROMPTS, GREEDY)
        time.sleep(0.5)  # the other is in ``follow``
        llm.tp.progress.failure = Failure("killed", 2, "rank 2, which was killed")
        llm.close()
        return ""
    return lost(llm.follow)[0]


def test_a_rank_0_that_closes_because_of_a_failure_lets_nobody_leave_in_peace():
    """Guards against a follower that ends with 0 and says nothing, as its leader heard of it first."""
    assert run_ranks(_closes_because_of_a_failure, 2)[1]


def _own_calls() -> bool | list[list[str]]:
    with open_tiny(0.1) as llm:
        seen = count_heartbeats(llm)
        if rank() in (1, 2):
            llm.follow()
            return 0 in seen  # the number of the first record, so one before any call
        if rank() == 0:
            time.sleep(1)
        found = words(llm.generate(PROMPTS if rank() == 0 else None, GREEDY))
        if rank() == 3:
            llm.follow()
        while rank() == 0 and not llm._engine.control.followed():
            time.sleep(0.01)
        return found


def test_ranks_in_calls_of_their_own_wait_as_long_as_they_must():
    """No duty to send heartbeats while one rank is not in ``follow``: no deadline for the others."""
    assert run_ranks(_own_calls, 4) == [WORDS, False, False, WORDS]


def test_one_process_has_no_thread():
    before = threading.active_count()
    with open_tiny(0.01) as llm:
        assert words(llm.generate(PROMPTS, GREEDY)) == WORDS
        assert threading.active_count() == before


DIES_BETWEEN_CALLS = """
import os, signal
from tprt import LLM, SamplingParams
from tprt.errors import PeerLost

with LLM({model!r}, dtype="float32", kv_cache_memory=2**24) as llm:
    llm.generate(["x"], SamplingParams(max_tokens=2))
    if llm.tp.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        {call}
    except PeerLost as error:
        print(error.what, "|", error.where)
"""


@pytest.mark.parametrize(
    "call", ['llm.generate(["y"])', 'llm.add_request("y"); llm.step(); llm.step()']
)
def test_a_rank_that_died_between_calls_is_named(call):
    """Rank 0 meets it in the first word of the next call, which belongs to no step."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = DIES_BETWEEN_CALLS.format(model=str(TINY), call=call)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    try:
        said, _ = ranks[0].communicate(timeout=60)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert "ended because of rank 1" in said and "| rank 1, host" in said
