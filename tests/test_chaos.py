"""A job that is killed again and again, at any moment, any of its processes, and ends as if undisturbed.

Each round starts the same command and kills -9 rank 0, rank 1 or the launcher. Places that are over in
milliseconds here, loading and writing, are held open a little so that kills land there too.
"""

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_results import keep_fact
from launched_jobs import (
    LaunchedJob,
    answer_here,
    command,
    generate,
    status_of,
    temporary_files,
    write_prompts,
)

from tprt.job.journal import journal_path
from tprt.job.journal_format import read_entries

RECORDS = 300
FLAGS = (
    *("--max-tokens", "16"),
    *("--set", "sampling.ignore_eos=true"),
    *("--set", "engine.max_num_seqs=8"),
    *("--set", "engine.kv_cache_memory=16M"),
)
SLOW = ";".join(
    (
        "load:sleep:hit=3,seconds=0.4",
        "output.write:sleep:rank=0,seconds=0.8",
        "journal.remove:sleep:rank=0,seconds=0.3",
    )
)
BEFORE = b"what was there before\n"
VICTIMS = ("rank 0", "rank 1", "launcher")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    prompts = write_prompts(folder / "in", RECORDS)
    assert answer_here(generate(prompts, folder / "out", *FLAGS)) == 0
    return (folder / "out").read_bytes()


@contextlib.contextmanager
def reader_of(path: Path) -> Iterator[set[bytes]]:
    """Reads the file all the time; what it has seen, each content once."""
    seen: set[bytes] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.wait(0.002):
            seen.add(path.read_bytes())

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


class Chaos:
    """One job and what was done to it.

    Attributes:
        hits: kills by what the job was doing, as its status said.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.out = folder / "out"
        self.arguments = generate(write_prompts(folder / "in", RECORDS), self.out, *FLAGS)
        self.hits: Counter[str] = Counter()
        self.victims: Counter[str] = Counter()
        self.longest = 0.0

    def run(self, aim: str | None = None) -> int | None:
        """Start the job and kill some of it; its exit code where it was faster.

        Args:
            aim: state of the job to hit, else at any time.
        """
        self.forget_status()
        launcher = self.random.choice(["nproc", "nproc", "torchrun"])
        with LaunchedJob(command(launcher, 2, self.arguments), {"TPRT_FAULT": SLOW}) as job:
            self.wait_until(job, aim)
            began = time.monotonic()
            self.kill(job)
            job.wait(60)
            self.longest = max(self.longest, time.monotonic() - began)
            # A temporary file stays where rank 0 dies when the other has nothing to do any more.
            left = set(job.leftovers(self.out)) - set(temporary_files(self.out))
            assert not left, job.text
            self.check_journal()
            return job.code

    def wait_until(self, job: LaunchedJob, aim: str | None) -> None:
        """Until the job is in a state, or for as long as chance says; and a moment more."""
        while self.state() == "" and job.process.poll() is None:
            time.sleep(0.005)
        if aim is None:
            time.sleep(self.random.uniform(0, 4))
            return
        while self.state() != aim and job.process.poll() is None:
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, {"loading": 0.5, "running": 1.0, "writing": 0.9}[aim]))

    def kill(self, job: LaunchedJob) -> None:
        victim = self.random.choice(VICTIMS)
        with contextlib.suppress(ProcessLookupError):
            pid = job.process.pid if victim == "launcher" else job.rank(int(victim[-1]))
            state = self.state()
            os.kill(pid, signal.SIGKILL)
            self.hits[state] += 1
            self.victims[victim] += 1

    def finish(self) -> None:
        with LaunchedJob(command("nproc", 2, self.arguments)) as job:
            job.wait()
            assert job.code == 0, job.text
            assert job.leftovers(self.out) == []

    # ------------------------------------------------------------ what it left

    def forget_status(self) -> None:
        """So that the state is that of the run to come."""
        self.out.with_name("out.status.json").unlink(missing_ok=True)

    def state(self) -> str:
        try:
            return str(status_of(self.out)["state"])
        except FileNotFoundError:
            return ""

    def check_journal(self) -> None:
        """No record has two results, and none was given up."""
        path = journal_path(self.out)
        if path.exists():
            with path.open("rb") as file:
                results = [entry.result for entry in read_entries(file) if entry.result]
            lines = [result.line for result in results]
            assert len(lines) == len(set(lines))
            assert not any(result.failed for result in results)

    def check_output(self, undisturbed: bytes) -> None:
        assert self.out.read_bytes() == undisturbed
        found = [json.loads(line) for line in undisturbed.splitlines()]
        assert [line["id"] for line in found] == [f"r{i}" for i in range(RECORDS)]
        assert all(line["error"] is None for line in found)
        status = status_of(self.out)
        assert (status["state"], status["finished"], status["failed"]) == ("finished", RECORDS, 0)
        names = {path.name for path in self.out.parent.iterdir()}
        assert names == {"in", "out", "out.status.json"}


def test_six_kills(tmp_path, undisturbed):
    """Two in each state of the job; where it is in the midst of records, in any of their steps."""
    chaos = Chaos(tmp_path, seed=6)
    chaos.out.write_bytes(BEFORE)
    with reader_of(chaos.out) as seen:
        for aim in ("loading", "running", "loading", "running", "running", "writing", "writing"):
            chaos.run(aim)
        chaos.finish()
        chaos.check_output(undisturbed)
    assert seen <= {BEFORE, undisturbed}, "a part of an output was seen"
    assert sum(chaos.hits.values()) >= 6
    assert {"loading", "running", "writing"} <= set(chaos.hits), chaos.hits


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_two_hundred_kills(tmp_path, undisturbed, capsys):
    """Jobs one after the other, each killed until it has ended, until 200 kills are counted."""
    hits: Counter[str] = Counter()
    victims: Counter[str] = Counter()
    jobs, longest = 0, 0.0
    while sum(hits.values()) < 200:
        folder = tmp_path / str(jobs)
        folder.mkdir()
        chaos = Chaos(folder, seed=jobs)
        chaos.out.write_bytes(BEFORE)
        with reader_of(chaos.out) as seen:
            while (
                chaos.run(chaos.random.choice([None, None, "loading", "running", "writing"])) != 0
            ):
                pass
            chaos.finish()
            chaos.check_output(undisturbed)
        assert seen <= {BEFORE, undisturbed}
        jobs, longest = jobs + 1, max(longest, chaos.longest)
        hits += chaos.hits
        victims += chaos.victims
    where = ", ".join(f"{count} while {state}" for state, count in hits.most_common())
    whom = ", ".join(f"{count} of {victim}" for victim, count in victims.most_common())
    said = (
        f"{sum(hits.values())} kills -9 in {jobs} jobs of {RECORDS} records ({where}; {whom}): no "
        f"record was lost, doubled or given up; the longest end of a killed job took {longest:.1f} s."
    )
    with capsys.disabled():
        print(f"\n{said}")
    assert set(victims) == set(VICTIMS) and set(hits) >= {"loading", "running", "writing"}
    keep_fact("chaos", said)
