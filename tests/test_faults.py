"""Ranks that die, hang, raise or leave the sequence, launchers that die, signals: to jobs that run.

The table is in fault_cases.py. What every case must show: the job's exit code, the right rank in the
message of every survivor and in ``OUT.status.json``, nothing left behind, an output that is as it was,
and the same command, without the fault, finishing with the output of an undisturbed run.
"""

import os
import re
import shutil
import signal
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import fault_results
import pytest
from fault_cases import (
    ANY_RANK,
    CASES,
    DEATH_LIMIT,
    IN_CI,
    LAUNCHER,
    LOAD_TIMEOUT,
    LONG_TIMEOUT,
    PLACES,
    STEP_TIMEOUT,
    Case,
)
from launched_jobs import (
    FAULT_SAID,
    LaunchedJob,
    answer_here,
    command,
    generate,
    status_of,
    write_prompts,
)

from tprt.distributed.watch import Watch

RECORDS = 24
# Waves of 8 records, 24 tokens each.
FLAGS = (
    *("--max-tokens", "24"),
    *("--set", "sampling.ignore_eos=true"),
    *("--set", "engine.max_num_seqs=8"),
    *("--set", "engine.kv_cache_memory=16M"),
)
BEFORE = "what was there before\n"
CI_SLACK = 30.0  # seconds; figures count where the machine is quiet
AT_ONCE = 2  # cases that run side by side: most wait


@dataclass
class Outcome:
    """What a case came to.

    Args:
        code: of the launcher.
        seconds: from the fault to the end of the last process.
    """

    code: int
    seconds: float
    text: str
    left: list[str]
    out: Path
    status: dict = field(default_factory=dict)


def timeouts(case: Case) -> list[str]:
    step, load = (STEP_TIMEOUT, LOAD_TIMEOUT) if case.waits else (LONG_TIMEOUT, LONG_TIMEOUT)
    return ["--set", f"engine.step_timeout={step}", "--set", f"engine.load_timeout={load}"]


def job_of(case: Case, folder: Path) -> tuple[Path, list[str]]:
    """Its output and its arguments."""
    prompts, out = folder / "in", folder / "out"
    if not prompts.exists():
        write_prompts(prompts, RECORDS)
    return out, generate(prompts, out, *FLAGS, *timeouts(case))


def hit(case: Case, job: LaunchedJob) -> float:
    """Let the fault happen; when it did."""
    at = job.wait_for(FAULT_SAID)
    job.note_sockets()
    if case.hit_with is None:
        return at
    time.sleep(0.3)  # so that the others have come to wait for the one that is held
    target = job.process.pid if case.rank == LAUNCHER else job.rank(case.rank)
    os.kill(target, case.hit_with)
    return time.monotonic()


def run_case(
    case: Case, folder: Path, seconds: float = 120.0, without: frozenset[str] = frozenset()
) -> Outcome:
    """Raises TimeoutError where processes are left ``seconds`` after the fault."""
    folder.mkdir(parents=True, exist_ok=True)
    out, arguments = job_of(case, folder)
    out.write_text(BEFORE)
    env = {"TPRT_FAULT": case.fault}
    if without:
        env["TPRT_WATCH"] = ",".join(sorted(Watch.ALL - without))
    with LaunchedJob(command(case.launcher, 2, arguments), env) as job:
        at = hit(case, job)
        ended = job.wait(seconds)
        return Outcome(job.code, ended - at, job.text, job.leftovers(out), out, status_of(out))


# ---------------------------------------------------------------- what must be seen


def check(case: Case, seen: Outcome) -> None:
    assert seen.left == [], seen.text
    assert seen.out.read_text() == BEFORE
    status, told = seen.status, seen.status["error"]
    if case.rank == LAUNCHER and case.hit_with == signal.SIGKILL:
        assert seen.code == -signal.SIGKILL
    else:
        assert seen.code == (1 if case.launcher == "torchrun" else case.code), seen.text
    assert status["exit_code"] == case.code, seen.text
    assert status["state"] == ("interrupted" if case.is_signal else "failed")
    assert told["kind"] in case.kinds, seen.text
    if not case.is_signal:
        check_place(case, told, seen.text)
        check_messages(case, told["rank"], seen.text)
    else:
        assert "tprt: ended by SIG" in seen.text or "tprt: interrupted" in seen.text


def check_place(case: Case, told: dict, text: str) -> None:
    if case.named_rank != ANY_RANK:
        assert told["rank"] == case.named_rank, text
    assert told["phase"] == case.phase, text
    assert (told["step"] >= 0) == (case.phase in ("prefill", "decode")), told


def check_messages(case: Case, culprit: int, text: str) -> None:
    """Every rank that outlives the fault tells whose it was, and no other name is told."""
    who = "the launcher" if culprit == LAUNCHER else f"rank {culprit}"
    blamed = set(re.findall(r"ended because of (the launcher|rank \d)", text))
    assert blamed <= {who}, text
    if "exception" in case.kinds and case.phase == "load":
        # All ranks learn of it in the same exchange, and one of them tells.
        assert f"where: {who}" in text, text
        return
    if "exception" in case.kinds and (case.phase, case.rank) == ("write", 0):
        # The engine was well: rank 0 has closed it, and the other rank has ended in peace.
        assert "tprt: error: " in text, text
        return
    survivors = {0} if culprit == LAUNCHER else {0, 1} - {culprit}
    for rank in survivors:
        assert f"[rank {rank}] tprt: error: ended because of {who}" in text, text


def check_resume(seen: Outcome, undisturbed: bytes, code: int) -> None:
    assert code == 0
    assert seen.out.read_bytes() == undisturbed
    names = {path.name for path in seen.out.parent.iterdir()}
    assert names == {"in", "out", "out.status.json"}
    status = status_of(seen.out)
    assert (status["state"], status["exit_code"], status["error"]) == ("finished", 0, None)
    # A job that had not come to its first record leaves nothing to go on with.
    assert status["finished"] == RECORDS and status["attempt"] in (1, 2)
    assert status["resumed"] >= seen.status["finished"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    out = folder / "out"
    assert answer_here(generate(write_prompts(folder / "in", RECORDS), out, *FLAGS)) == 0
    return out.read_bytes()


# ---------------------------------------------------------------- with every change


@pytest.fixture(scope="module")
def started(request, tmp_path_factory) -> Iterator[dict[str, Future]]:
    """What the selected tests wait for, by the ids of the tests: jobs that run side by side."""
    folder = tmp_path_factory.mktemp("faults")
    work = {"test_fault": run_case, "test_a_detector_that_is_off_finds_nothing": is_noticed}
    wanted = [
        (item.name, work[item.originalname], item.callspec.params["case"])
        for item in request.session.items
        if item.path == request.path and item.originalname in work
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        # Those that wait first, so that others can use the cores meanwhile.
        wanted.sort(key=lambda each: -each[2].deadline)
        yield {name: pool.submit(do, case, folder / name) for name, do, case in wanted}
        pool.shutdown(cancel_futures=True)


def some(ids: set[str]) -> pytest.MarkDecorator:
    cases = [case for case in CASES if case.id in ids]
    assert len(cases) == len(ids)
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


@some(IN_CI)
def test_fault(case, started, request, undisturbed):
    seen = started[request.node.name].result()
    check(case, seen)
    assert seen.seconds < case.deadline + case.limit + CI_SLACK
    # Here, alone and without the fault; with two ranks again in the long run.
    check_resume(seen, undisturbed, answer_here(job_of(case, seen.out.parent)[1]))


def test_each_fault_phase_and_rank_is_tested_with_every_change():
    chosen = [case for case in CASES if case.id in IN_CI]
    assert {case.name for case in chosen} == {case.name for case in CASES} - LONG_ONLY
    for aspect in ("phase", "target", "launcher"):
        assert {getattr(c, aspect) for c in chosen} == {getattr(c, aspect) for c in CASES}


def test_the_document_shows_every_case():
    """Its table is made from the cases and what was measured of them, and nothing else."""
    found, document = fault_results.load_results(), fault_results.DOCUMENT.read_text()
    assert fault_results.with_section(document, found) == document, "run tests/fault_results.py"
    for name, target, launcher in fault_results.rows():
        start = "`--nproc 2`" if launcher == "nproc" else "torchrun"
        assert document.count(f"| {name} | {target} | {start} |") == 1
    if fault_results.RESULTS.exists():  # before the first long run the table says "not measured"
        assert set(found["cases"]) == {case.id for case in CASES}, "run launch/test.sh --long"
        assert "not measured" not in document[document.index(fault_results.BEGIN) :]


LONG_ONLY = {"collective of another size", "kill -9, rank 0 busy"}
CONTROLLED_IN_CI = {
    "sleep-write-rank0-nproc",
    "exit-0-decode-rank0-torchrun",
    "SIGSTOP-decode-rank1-nproc",
}
CONTROL_SECONDS = 3.0  # longer than it takes where the detector is on


def is_noticed(case: Case, folder: Path) -> bool:
    """Whether it is still found for what it is, without its detectors."""
    try:
        seen = run_case(case, folder, case.deadline + CONTROL_SECONDS, without=case.detectors)
    except TimeoutError:
        return False
    told = seen.status.get("error") or {}
    return told.get("kind") in case.kinds and told["rank"] == case.named_rank


@some(CONTROLLED_IN_CI)
def test_a_detector_that_is_off_finds_nothing(case, started, request):
    """The negative control: the same fault is found by this detector, not by chance."""
    assert not started[request.node.name].result()


# ---------------------------------------------------------------- before anybody watches


def kill_at_the_start(folder: Path, launcher: str, target: int, delay: float) -> None:
    """While the ranks import what they need: nothing is left, and the code calls for a new start."""
    out = folder / "out"
    job_arguments = generate(write_prompts(folder / "in", RECORDS), out, *FLAGS)
    with LaunchedJob(command(launcher, 2, job_arguments)) as job:
        job.wait_for_ranks(2)
        time.sleep(delay)
        os.kill(job.process.pid if target == LAUNCHER else job.rank(target), signal.SIGKILL)
        killed = time.monotonic()
        assert job.wait() - killed < DEATH_LIMIT + CI_SLACK
        failed = 1 if launcher == "torchrun" else 6
        assert job.code == (-signal.SIGKILL if target == LAUNCHER else failed), job.text
        assert job.leftovers(out) == [] and not out.exists()


@pytest.mark.parametrize("target", [LAUNCHER, 0, 1])
def test_killed_before_the_ranks_have_met(tmp_path, target):
    kill_at_the_start(tmp_path, "nproc", target, 0.3)


# ---------------------------------------------------------------- restarts


def test_restarts_of_its_own_until_the_poison_is_out(tmp_path):
    """A record at which the program crashes each time: with its batch, twice alone, then given up."""
    out = tmp_path / "out"
    prompts = write_prompts(tmp_path / "in", RECORDS)
    assert answer_here(generate(prompts, tmp_path / "good", *FLAGS)) == 0
    argv = command("nproc", 2, generate(prompts, out, *FLAGS), restarts=3)
    with LaunchedJob(argv, {"TPRT_FAULT": "record:raise:detail=r13"}) as job:
        job.wait()
        assert job.code == 4, job.text
        assert job.text.count("starting them again") == 3
        assert job.leftovers(out) == []
    good, found = (tmp_path / "good").read_text().splitlines(), out.read_text().splitlines()
    assert len(found) == RECORDS
    assert [line for i, line in enumerate(found) if i != 13] == [
        line for i, line in enumerate(good) if i != 13
    ]
    assert '"id": "r13"' in found[13] and "injected fault" in found[13] and "given up" in found[13]
    status = status_of(out)
    assert (status["state"], status["exit_code"], status["failed"]) == ("finished", 4, 1)
    assert status["attempt"] == 4


def kill_again_and_again(tmp_path: Path, launcher: str, times: int) -> None:
    """One launch that starts its ranks again after each kill, and ends right."""
    out = tmp_path / "out"
    prompts = write_prompts(tmp_path / "in", RECORDS)
    assert answer_here(generate(prompts, tmp_path / "good", *FLAGS)) == 0
    argv = command(launcher, 2, generate(prompts, out, *FLAGS), restarts=times)
    # Held while loading, where no record is in flight: one that dies again and again alone is given up.
    env = {"TPRT_FAULT": "load:sleep:rank=1,hit=3,seconds=0.5"}
    with LaunchedJob(argv, env) as job:
        for attempt in range(times):
            victim = job.wait_for_rank(attempt % 2, FAULT_SAID, attempt + 1)
            os.kill(victim, signal.SIGKILL)
        job.wait()
        assert job.code == 0, job.text
        assert job.leftovers(out) == []
    assert out.read_bytes() == (tmp_path / "good").read_bytes()


def test_killed_ranks_are_started_again(tmp_path):
    """By torchrun; the test above is of our own launcher."""
    kill_again_and_again(tmp_path, "torchrun", 1)


# ---------------------------------------------------------------- the long run


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_fault(case, tmp_path, undisturbed):
    """All of the table, alone on the machine, with figures for docs/reliability.md."""
    seconds = []
    for number in range(case.runs):
        folder = tmp_path / str(number)
        seen = run_case(case, folder)
        check(case, seen)
        seconds.append(seen.seconds)
        if number == 0:
            with LaunchedJob(command(case.launcher, 2, job_of(case, folder)[1])) as again:
                again.wait()
                check_resume(seen, undisturbed, again.code)
        shutil.rmtree(folder)
    fault_results.keep_result(case, seconds, seen.text, seen.status)
    assert statistics.median(seconds) < case.deadline + case.limit


@pytest.mark.long
@pytest.mark.parametrize("case", [c for c in CASES if c.detectors], ids=lambda case: case.id)
def test_every_detector_is_needed(case, tmp_path):
    assert not is_noticed(case, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["nproc", "torchrun"])
@pytest.mark.parametrize("target", [LAUNCHER, 0, 1])
def test_killed_at_any_time_of_the_start(tmp_path, launcher, target):
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        kill_at_the_start(folder, launcher, target, 0.05 * number)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["nproc", "torchrun"])
def test_twenty_restarts_in_a_row(tmp_path, launcher):
    kill_again_and_again(tmp_path, launcher, 20)


@pytest.mark.long
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("action", ["kill", "raise", "stop", "sleep", "exit"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_four_ranks_name_the_one(tmp_path, rank, action, replicas):
    """All survivors of four ranks, that share the model or have two replicas of it."""
    out = tmp_path / "out"
    prompts = write_prompts(tmp_path / "in", RECORDS)
    assert answer_here(generate(prompts, tmp_path / "good", *FLAGS)) == 0
    short = ["--set", f"engine.step_timeout={STEP_TIMEOUT}", "--set", f"parallel.data={replicas}"]
    argv = command("nproc", 4, generate(prompts, out, *FLAGS, *short))
    with LaunchedJob(argv, {"TPRT_FAULT": f"decode:{action}:rank={rank},hit=15"}) as job:
        job.wait()
        assert job.code == 6 and job.leftovers(out) == [], job.text
    for survivor in {0, 1, 2, 3} - {rank}:
        assert f"[rank {survivor}] tprt: error: ended because of rank {rank}" in job.text, job.text
    assert status_of(out)["error"]["rank"] == rank
    with LaunchedJob(argv) as job:
        job.wait()
        assert job.code == 0, job.text
    assert out.read_bytes() == (tmp_path / "good").read_bytes()


@pytest.mark.long
def test_a_host_that_sleeps_blames_nobody(tmp_path):
    """All processes stand still for longer than any limit, as a laptop's do, and go on."""
    out = tmp_path / "out"
    prompts = write_prompts(tmp_path / "in", RECORDS)
    case = next(case for case in CASES if case.waits)
    assert answer_here(generate(prompts, tmp_path / "good", *FLAGS)) == 0
    held = {"TPRT_FAULT": PLACES[1, "decode"].format("sleep") + ",seconds=1"}
    with LaunchedJob(command("nproc", 2, job_of(case, tmp_path)[1]), held) as job:
        job.wait_for(FAULT_SAID)
        everybody = job.alive()
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in everybody:
                os.kill(pid, number)
            time.sleep(2 * STEP_TIMEOUT if number == signal.SIGSTOP else 0)
        job.wait()
        assert job.code == 0, job.text
    assert out.read_bytes() == (tmp_path / "good").read_bytes()
