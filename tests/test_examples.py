"""The examples run as their docstrings say and print what they should."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


def run_example(name: str, ranks: int) -> str:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, f"examples/{name}"],
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_single_process():
    lines = run_example("library_single.py", 1).splitlines()
    assert lines[0] == "42 (stop)" and lines[1] == "apple castle drum moon (stop)"
    assert lines[2].split() == ["streamed:", "cheese", "frog", "canoe", "lamp"]
    assert len(lines) == 7 and lines[-1].startswith("log-probability of the last token: -")


def test_two_replicas_on_a_mesh():
    lines = run_example("library_mesh.py", 4).splitlines()
    sums = [f"What is {a} + {b}? {a + b}" for a in (7, 30, 58) for b in (4, 41)]
    assert lines == sums


@pytest.mark.parametrize("ranks", [1, 2])
def test_replay(ranks):
    (line,) = run_example("replay_records.py", ranks).splitlines()
    assert line.startswith("generate: ") and line.endswith("differences: []")
