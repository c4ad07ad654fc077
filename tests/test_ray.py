"""Replicas elsewhere: ranks fed over a pipe, the pool that outlives them, and a job on a real Ray.

Only the last part needs Ray; the pool is driven by actors that live in this process.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY

from tprt.errors import CheckpointError, OutOfMemoryPlan, PeerLost, TprtError
from tprt.job.ray_replica import MAX_DEATHS, MAX_FAILED_STARTS, RayReplicas
from tprt.job.records import Record, parse_record
from tprt.job.replica_process import ReplicaProcess
from tprt.job.work_queue import Result
from tprt.sampling_params import SamplingParams

LLM_OPTIONS = {"model": str(TINY), "device": "cpu", "dtype": "float32"}
RANK_PROGRAM = "tprt.job.replica_process"


def record(line: int, n: int = 1) -> Record:
    return Record(line, f"r{line}", {"prompt": "x"}, SamplingParams(n=n))


def until(what: str, condition, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    pytest.fail(f"{what} did not come within {seconds:g} s")


def gone(pids: list[int]) -> bool:
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return False
    return True


# ---------------------------------------------------------------- the pool


class RayError(Exception):
    pass


class FakeActor:
    """Answers all it was given at the second call after; dies when it holds a line of ``deadly``."""

    def __init__(self, world: "FakeRay", number: int) -> None:
        self.world, self.number = world, number
        self.held: list[Record] = []
        self.wait_until_ready = types.SimpleNamespace(remote=lambda: self._ready)
        self.exchange = types.SimpleNamespace(remote=self._call)
        self.close = types.SimpleNamespace(remote=lambda: world.closed.append(self))

    def _ready(self):
        self.world.starts += 1
        if self.world.fails_to_start(self.world.starts):
            raise RayError("The actor is dead. It was not well.")
        return [], self.world.start_error and self.world.start_error.to_json()

    def _call(self, records: list[Record]):
        self.world.sent.append((self.number, [r.line for r in records]))
        self.held += records
        self.world.most = max(self.world.most, sum(r.params.n for r in self.held))
        return self._exchange

    def _exchange(self):
        held = [r.line for r in self.held]
        deadly = self.world.deadly & set(held)
        if deadly:
            self.world.deaths.append(held)
            raise RayError("The actor is dead. It was killed.")
        done, self.held = self.held, []
        return [Result(r.line, f"text {r.line}", 1, replica=self.number) for r in done], None


class FakeRay(types.ModuleType):
    """As much of Ray as the pool uses: calls are functions, answered when they are asked for."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.exceptions = types.SimpleNamespace(RayError=RayError)
        self.deadly: set[int] = set()
        self.fails_to_start = lambda start: False
        self.start_error: TprtError | None = None
        self.starts = self.most = 0
        self.answering: int | None = None  # how many of the calls; None is all
        self.sent: list[tuple[int, list[int]]] = []
        self.deaths: list[list[int]] = []
        self.killed: list[FakeActor] = []
        self.closed: list[FakeActor] = []

    def wait(self, calls, num_returns, timeout):
        return calls[: self.answering], calls[self.answering :]

    def get(self, call, timeout=None):
        return call if isinstance(call, list) else call()

    def kill(self, actor):
        self.killed.append(actor)


@pytest.fixture
def fake(monkeypatch) -> FakeRay:
    world = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", world)
    return world


def run_pool(fake: FakeRay, lines: int, count: int = 2, window: int = 4) -> dict[int, Result]:
    """All results by line; each has come once."""
    pool = RayReplicas(lambda number: FakeActor(fake, number), count, window)
    for line in range(1, lines + 1):
        pool.put(record(line))
    found: list[Result] = []
    for _ in range(100 * lines):
        if len(found) == lines:
            break
        pool.feed()
        pool.receive(0.0)
        while (result := pool.collect()) is not None:
            found.append(result)
    assert Counter(r.line for r in found) == Counter(range(1, lines + 1))
    return {r.line: r for r in found}


def test_pool_gives_every_record_to_one_replica(fake):
    found = run_pool(fake, 21)
    assert [found[line].text for line in sorted(found)] == [f"text {i}" for i in range(1, 22)]
    assert {r.replica for r in found.values()} == {0, 1}
    assert fake.most == 4
    assert Counter(line for _, lines in fake.sent for line in lines) == Counter(range(1, 22))


def test_pool_counts_sequences_not_records(fake):
    pool = RayReplicas(lambda number: FakeActor(fake, number), 1, 4)
    for line in range(1, 5):
        pool.put(record(line, n=3))
    for _ in range(10):
        pool.feed()
        pool.receive(0.0)
    assert [lines for _, lines in fake.sent if lines] == [[1, 2], [3, 4]]
    assert sum(pool.collect() is not None for _ in range(9)) == 4


def test_pool_answers_bad_records_itself_and_ends_who_is_ready(fake):
    pool = RayReplicas(lambda number: FakeActor(fake, number), 2, 4)
    fake.answering = 1
    pool.put(parse_record(b"no JSON", 1, SamplingParams(), 0))
    assert "not JSON" in pool.collect().error
    pool.feed()
    pool.receive(0.0)
    assert pool.num_ready == 1 and not any(lines for _, lines in fake.sent)
    pool.close(clean=True)
    assert [actor.number for actor in fake.closed] == [0]
    assert [actor.number for actor in fake.killed] == [0, 1]


def test_pool_retries_and_gives_up_what_kills(fake):
    """Two records that kill whoever computes them. All others are answered, and once."""
    fake.deadly = {6, 7}
    found = run_pool(fake, 15)
    failed = {line for line, result in found.items() if result.error}
    assert failed == {6, 7}
    error = json.loads(found[6].text)["error"]
    assert "2 times while it computed this record alone" in error["message"]
    assert error["line"] == 6
    # No death was in vain: in company twice, then alone twice.
    alone = Counter(held[0] for held in fake.deaths if len(held) == 1)
    assert alone == {6: 2, 7: 2}
    assert len([held for held in fake.deaths if len(held) > 1]) <= 4
    assert len(fake.killed) == len(fake.deaths)


def test_pool_ends_when_every_record_kills(fake):
    """Nothing is retried for ever, even where there is no good record between the bad ones."""
    fake.deadly = set(range(1, 7))
    found = run_pool(fake, 6, count=1)
    assert all(result.error for result in found.values())
    assert len(fake.deaths) <= 2 + 2 * len(found) + 2


def test_pool_gives_up_a_replica_that_does_not_start(fake):
    fake.fails_to_start = lambda start: True
    with pytest.raises(PeerLost, match="replica 0 died") as caught:
        run_pool(fake, 3)
    assert "It was not well" not in str(caught.value)  # a sentence of Ray's is enough
    assert "while it loaded the model" in str(caught.value)
    assert fake.starts <= 2 * MAX_FAILED_STARTS
    assert MAX_FAILED_STARTS < MAX_DEATHS


def test_pool_survives_one_failed_start(fake):
    fake.fails_to_start = lambda start: start == 2
    assert len(run_pool(fake, 9)) == 9
    assert fake.starts == 3


@pytest.mark.parametrize("kind", [CheckpointError, OutOfMemoryPlan])
def test_pool_ends_with_an_error_that_a_new_start_would_not_change(fake, kind):
    fake.start_error = kind("it is broken", where="here", hint="mend it")
    with pytest.raises(kind, match="it is broken"):
        run_pool(fake, 3)
    assert fake.starts == 1


# ---------------------------------------------------------------- the ranks


@pytest.fixture(scope="module")
def replica():
    with ReplicaProcess(2, LLM_OPTIONS, number=3, threads=1) as process:
        assert process.wait_until_ready(60)
        yield process


def prompts(count: int, tokens: int = 12) -> list[Record]:
    texts = [f"human: Repeat {i % 4 + 1} times: kite{i}\n\nadept:" for i in range(count)]
    params = SamplingParams(max_tokens=tokens, temperature=0.8, ignore_eos=True)
    lines = [json.dumps({"id": f"r{i}", "prompt": text}).encode() for i, text in enumerate(texts)]
    return [parse_record(line, i + 1, params, 7) for i, line in enumerate(lines)]


def collect(process: ReplicaProcess, count: int, seconds: float = 60.0) -> list[Result]:
    found: list[Result] = []
    end = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < end:
        found += process.collect(1.0)
    assert len(found) == count
    return found


def test_replica_process_answers_as_one_process_does(replica):
    bad = (b"no JSON", b'{"prompt": "x", "params": {"max_tokens": 99999}}')
    records = prompts(9) + [
        parse_record(line, number, SamplingParams(), 0) for number, line in enumerate(bad, start=10)
    ]
    for each in records:
        replica.put(each)
    found = {result.line: result for result in collect(replica, len(records))}
    with ReplicaProcess(1, LLM_OPTIONS, threads=1) as alone:
        for each in records:
            alone.put(each)
        same = {result.line: result for result in collect(alone, len(records))}
    assert {line: r.text for line, r in found.items()} == {line: r.text for line, r in same.items()}
    assert {r.replica for r in found.values()} == {3} and {r.replica for r in same.values()} == {0}
    assert [line for line in sorted(found) if found[line].error] == [10, 11]
    assert replica.collect(0.0) == []


def test_replica_process_listens_on_loopback(replica):
    found = set()
    for pid in replica.pids:
        for socket in psutil.Process(pid).net_connections("tcp"):
            if socket.status == psutil.CONN_LISTEN:
                found.add(socket.laddr.ip)
    assert found and found <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_replica(rank):
    process = ReplicaProcess(2, LLM_OPTIONS, threads=1)
    assert process.wait_until_ready(60)
    pids = process.pids
    for each in prompts(4, tokens=1500):
        process.put(each)
    os.kill(pids[rank], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(PeerLost, match=f"rank {rank} was ended by signal 9"):
        while time.monotonic() - began < 30:
            process.collect(1.0)
    assert time.monotonic() - began < 10
    assert gone(pids)
    with pytest.raises(PeerLost):  # and it stays so
        process.collect(0.0)
    process.put(record(1))
    process.close()
    process.close()


def test_a_replica_that_cannot_load_says_why(tmp_path):
    with ReplicaProcess(2, LLM_OPTIONS | {"model": str(tmp_path)}, threads=1) as process:
        with pytest.raises(CheckpointError):
            process.wait_until_ready(60)
        with pytest.raises(CheckpointError):
            process.collect(1.0)


def test_ranks_do_not_outlive_their_parent():
    """SIGKILL: nobody can say goodbye."""
    code = (
        "import sys, time\n"
        "from tprt.job.replica_process import ReplicaProcess\n"
        f"process = ReplicaProcess(2, {LLM_OPTIONS!r}, threads=1)\n"
        "print(*process.pids, flush=True)\n"
        "process.wait_until_ready()\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and parent.stdout.readline() == "ready\n"
        parent.kill()
    until("the end of the ranks", lambda: gone(pids), 10)


# ---------------------------------------------------------------- Ray

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install '.[ray]')"
)


@pytest.fixture
def ray_environment(tmp_path):
    """Ray's files and its token stay out of the way. Sockets have short names, so not in tmp_path."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    known = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TPRT_"))}
    yield known | {
        "RAY_TMPDIR": folder,
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    shutil.rmtree(folder, ignore_errors=True)


def ranks_under(folder: Path) -> list[int]:
    """Ranks of replicas of a job with its files in ``folder``."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        command, known = process.info["cmdline"] or [], process.info["environ"] or {}
        if RANK_PROGRAM in command and known.get("HOME") == str(folder):
            found.append(process.pid)
    return found


def num_finished(journal: Path) -> int:
    return journal.read_bytes().count(b" finish ") if journal.exists() else 0


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)  # Ray itself takes a minute and more to start on a busy machine
def test_a_job_on_ray(tmp_path, ray_environment):
    """Two replicas of two ranks. The driver is killed; in the second run a rank is killed, and one
    record kills whoever computes it: the file is that of ``tprt generate``, but for that record.
    One replica could do the whole job before the other begins: in the first run each waits a while."""
    output, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    with (tmp_path / "in.jsonl").open("w") as file:
        for i in range(80):
            params = {"max_tokens": 40 + i % 60, "ignore_eos": True, "temperature": 0.8}
            text = f"human: Repeat {i % 5 + 1} times: kite{i}\n\nadept:"
            file.write(json.dumps({"id": f"r{i}", "prompt": text, "params": params}) + "\n")
        file.write("no JSON\n")
    files = ["--input", str(tmp_path / "in.jsonl"), "--model", str(TINY), "--dtype", "float32"]
    same = [*files, "--device", "cpu", "--set", "engine.max_num_seqs=8"]
    whole = [sys.executable, "-m", "tprt", "generate", *same, "--output", str(tmp_path / "whole")]
    assert subprocess.run(whole, check=False, env=ray_environment, timeout=120).returncode == 4

    ray = [sys.executable, str(ROOT / "launch" / "ray_batch.py"), *same, "--output", str(output)]
    ray += ["--tp", "2", "--replicas", "2", "--cpus-per-replica", "0.2"]
    slow = ray_environment | {"TPRT_FAULT": "record:sleep:hit=1,seconds=6"}
    with subprocess.Popen(ray, env=slow) as driver:
        until("the ranks of both", lambda: len(ranks_under(tmp_path)) == 4, 240)
        until("a finished record", lambda: num_finished(journal) > 4, 120)
        ranks = ranks_under(tmp_path)
        assert len(ranks) == 4
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
    until("the end of the ranks", lambda: gone(ranks), 30)
    for process in family:  # some of Ray's own stay for a minute or so
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    left = num_finished(journal)
    assert 0 < left < 81 and not output.exists()

    poison = ray_environment | {"TPRT_FAULT": "record:kill:detail=r77"}
    with subprocess.Popen(ray, env=poison, stderr=subprocess.PIPE, text=True) as driver:
        until("another record", lambda: num_finished(journal) > left + 2, 240)
        os.kill(max(ranks_under(tmp_path)), signal.SIGKILL)
        errors = driver.communicate(timeout=240)[1]
    assert driver.returncode == 4, errors
    assert "replica" in errors and "was lost" in errors
    assert gone(ranks_under(tmp_path)) and not journal.exists()
    expected = (tmp_path / "whole").read_bytes().splitlines()
    found = output.read_bytes().splitlines()
    assert "given up" in json.loads(found.pop(77))["error"]["message"]
    del expected[77]
    assert found == expected
    status = json.loads((tmp_path / "out.jsonl.status.json").read_text())
    assert (status["state"], status["exit_code"], status["failed"]) == ("finished", 4, 2)
    assert status["attempt"] == 2 and status["resumed"] >= left


@needs_ray
def test_ray_batch_refuses_before_it_starts_anything(tmp_path, ray_environment):
    script = [
        sys.executable,
        str(ROOT / "launch" / "ray_batch.py"),
        "--output",
        str(tmp_path / "o"),
    ]
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    files = ["--input", str(tmp_path / "in.jsonl"), "--device", "cpu"]
    for more, code, told in (
        ([*files, "--model", str(tmp_path)], 3, "tmp"),
        ([*files, "--model", str(TINY), "--tp", "3"], 2, "3"),
        (["--model", str(TINY)], 2, "--input missing"),
    ):
        command = [*script, *more]
        done = subprocess.run(
            command, check=False, env=ray_environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code and told in done.stderr, done.stderr
    assert not os.listdir(ray_environment["RAY_TMPDIR"])
