"""Shared fixtures: the shipped tiny checkpoint and a way to run one function on N ranks."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny-persimmon"

# Ranks of one test share two cores with each other and with whatever else runs.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Read where a kernel is defined. Without a GPU the Triton kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What ranks and launchers are told.
OF_RANKS = (
    "TPRT_",
    "GLOO_",
    "NCCL_",
    "OMP_",
    "TORCHELASTIC_",
    "TORCH_ELASTIC_",
    "MASTER_",
    "LOCAL_",
    "RANK",
    "WORLD_",
)


@pytest.fixture(autouse=True)
def _environment_left_as_found():
    """What a test or the code under it sets must not reach the processes that later tests start."""
    before = _environment()
    yield
    after = _environment()
    for name in before.keys() | after.keys():
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    assert after == before


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(OF_RANKS)}


@pytest.fixture(scope="session")
def tiny() -> Path:
    return TINY


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(fn: Callable[..., Any], env: dict[str, str], args: tuple, results: Any) -> None:
    os.environ.update(env)
    rank = int(env["RANK"])
    try:
        results.put((rank, fn(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def run_ranks(fn: Callable[..., Any], n: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """``fn(*args)`` on ``n`` fresh processes with a launcher's environment; results by rank.

    The first rank that fails fails the test with its traceback, and no process outlives the call.
    ``fn`` must be a module's function; arguments and results are pickled.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    shared = {
        "WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [
        context.Process(
            target=_rank_main,
            args=(fn, shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, args, results),
        )
        for r in range(n)
    ]
    try:
        with pytest.MonkeyPatch.context() as patch:
            # Read when torch is imported, which is before _rank_main runs: it must be inherited.
            patch.setenv("OMP_NUM_THREADS", "1")
            for process in ranks:
                process.start()
        found: dict[int, Any] = {}
        for _ in range(n):
            try:
                rank, value, error = results.get(timeout=timeout)
            except Empty:
                missing = sorted(set(range(n)) - set(found))
                pytest.fail(f"no answer from ranks {missing} within {timeout:g} s")
            if error:
                pytest.fail(f"rank {rank} failed:\n{error}")
            found[rank] = value
        for process in ranks:
            process.join(timeout=30)
            assert process.exitcode == 0, "a rank hung or died after its work was done"
        return [found[r] for r in range(n)]
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            if process.pid is not None:
                process.join()
