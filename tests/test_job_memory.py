"""A job's memory does not grow with its input: the fake engine answers many records."""

import subprocess
import sys

import pytest
from conftest import ROOT

JOB = """
import resource, sys
from pathlib import Path
from test_replicas import EchoLLM
from tprt.job.dispatcher import Dispatcher
from tprt.job.input_file import InputFile, scan_input
from tprt.job.journal import Journal
from tprt.job.output_file import AtomicOutput
from tprt.job.replica import Replica
from tprt.job.work_queue import LocalQueue
from tprt.sampling_params import SamplingParams

count, folder = int(sys.argv[1]), Path(sys.argv[2])
source = folder / "in.jsonl"
with source.open("w") as file:
    for i in range(count):
        file.write('{"id": "record-%d", "prompt": "human: What is %d + %d?"}\\n' % (i, i, i))
facts = scan_input(source)
journal, queue = Journal.open(folder / "out.journal", {"job": 1}), LocalQueue()
work = Dispatcher(InputFile(source, facts), SamplingParams(), 0, None, journal, queue, 72)
replica = Replica(EchoLLM(max_num_seqs=64, steps=1), queue)
while not work.over:
    work.pump()
    replica.turn()
written = AtomicOutput(folder / "out").write(text for _, text in journal.results())
journal.close(remove=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
with (folder / "out").open() as lines:
    assert sum(1 for _ in lines) == count
"""


def peak_mib(count, folder):
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(count), str(folder)],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    for path in folder.iterdir():
        path.unlink()  # hundreds of megabytes
    return int(done.stdout)


@pytest.mark.parametrize(
    "count, most", [(100_000, 30), pytest.param(1_000_000, 60, marks=pytest.mark.long)]
)
def test_memory_of_a_long_job(tmp_path, count, most):
    small, large = peak_mib(10_000, tmp_path / "small"), peak_mib(count, tmp_path / "large")
    print(f"peak of 10,000 records {small} MiB, of {count:,} {large} MiB")
    assert large - small < most
