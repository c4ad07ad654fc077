"""``tprt doctor``: what each probe makes of a machine, the ranks it starts, and what it never tells."""

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, run_ranks

from tprt.cli import doctor
from tprt.cli.doctor_probes import collectives, disk, gpu, machine, network, ranks
from tprt.cli.doctor_probes.check import GIB, MASK, MIB, Check, hide, look
from tprt.cli.doctor_probes.network import Resolved
from tprt.distributed.tp_group import TPGroup
from tprt.errors import ConfigError
from tprt.host_limits import cgroup_limits, usable_cpus


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("TPRT_", "NCCL_", "GLOO_", "MASTER_")):
            monkeypatch.delenv(name)


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    return doctor.run(parser.parse_args(["doctor", *argv]))


def checks(*statuses: str) -> list[Check]:
    """One for each status, the last that of the ranks."""
    names = ["cpu", "disk", "ranks"][-len(statuses) :]
    advice = {"ok": {}, "warn": {"warnings": ["do this"]}, "fail": {"failures": ["do that"]}}
    return [Check(n, "facts", **advice[s]) for n, s in zip(names, statuses, strict=True)]


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


# ---------------------------------------------------------------- the ranks


def test_two_ranks_on_cpus(tmp_path, capsys):
    """The real thing, whose every other part is faked below."""
    before = set(children())
    assert run("--nproc", "2", "--device", "cpu", "--dir", str(tmp_path), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == 0
    found = {check["name"]: check for check in told["checks"]}
    assert list(found) == [*doctor._probes(tmp_path), "ranks"]
    assert found["ranks"]["status"] == "ok", found["ranks"]
    facts = found["ranks"]["facts"]
    assert facts["size"] == 2 and len(facts["ranks"]) == 2
    assert set(facts["us"]) == {case.name for case in collectives.cases(2)}
    assert all(us > 0 for us in facts["us"].values())
    assert facts["ranks"]["1"]["backend"] == "gloo"
    assert found["versions"]["facts"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert found["disk"]["facts"]["written"] > 0
    assert not list(tmp_path.iterdir()), "the disk probe left something behind"
    assert set(children()) <= before, "a rank outlived the test"


def test_a_rank_that_hangs_is_named_and_ended(tmp_path, capsys, monkeypatch):
    """Negative control: without the watch this would wait for ever."""
    monkeypatch.setenv("TPRT_FAULT", "doctor:sleep:rank=1,hit=4")
    monkeypatch.setattr(doctor, "_probes", lambda folder: {})
    before = set(children())
    flags = ("--nproc", "3", "--device", "cpu", "--set", "engine.step_timeout=6")
    assert run(*flags, "--dir", str(tmp_path)) == 6
    shown = capsys.readouterr().out
    name = collectives.cases(3)[3].name
    stuck = rf"rank 1 has not answered for \d+ s, last at 'before {name}': it is stuck"
    assert re.search(stuck, shown), shown
    assert "rank 0 has" not in shown and "rank 2 has" not in shown, "a rank that waits was blamed"
    assert "injected fault" in shown, "the output of the rank is missing"
    assert set(children()) <= before, "a rank outlived the test"


def _under_a_launcher(folder: str) -> int:
    sys.stdout = open(Path(folder, os.environ["RANK"]), "w")
    return run("--dir", folder, "--device", "cpu")


def test_under_a_launcher_its_ranks_are_used(tmp_path):
    assert run_ranks(_under_a_launcher, 2, str(tmp_path)) == [0, 0]
    assert "2 on cpu over gloo" in (tmp_path / "0").read_text()
    assert not (tmp_path / "1").read_text(), "rank 1 has told something, too"


def test_a_rank_of_a_launcher_that_stops_is_named_and_ended(tmp_path):
    """Rank 0 must be able to tell before the launcher ends all, and a launcher is slow to end what is
    stopped."""
    script = tmp_path / "main.py"
    script.write_text(
        "import argparse, sys\nfrom tprt.cli import doctor\np = argparse.ArgumentParser()\n"
        "doctor.add_parser(p.add_subparsers())\nsys.exit(doctor.run(p.parse_args(sys.argv[1:])))\n"
    )
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    flags = ("doctor", "--device", "cpu", "--set", "engine.step_timeout=6", "--dir", str(tmp_path))
    env = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TPRT_FAULT": "doctor:stop:rank=1,hit=2",
    }
    before = set(children())
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), *flags],
        env=os.environ | env, check=False, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr  # torchrun's, whatever the ranks' is
    assert "exitcode: 6" in done.stderr or "exitcode: -9" in done.stderr, done.stderr
    assert re.search(r"-> rank 1 has not answered .*: it is stopped", done.stdout), done.stdout
    assert done.stdout.count("```") == 2, "the report is not whole, or there are several"
    assert set(children()) <= before


def test_another_number_than_launched_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="2 ranks are asked for, but 4"):
        run("--nproc", "2", "--dir", str(tmp_path))


def test_ranks_end_with_who_started_them(tmp_path):
    """Guards against ranks that a killed ``tprt doctor`` leaves behind."""
    code = "from tprt.cli.doctor_probes.ranks import start_ranks; start_ranks(2, 'cpu', 100)"
    env = os.environ | {"TPRT_FAULT": "doctor:sleep", "PYTHONPATH": str(ROOT)}
    starter = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL)
    started: list[psutil.Process] = []
    try:
        until = time.monotonic() + 60
        while len(started) < 2 and time.monotonic() < until:
            started = psutil.Process(starter.pid).children()
            time.sleep(0.05)
        assert len(started) == 2
    finally:
        starter.kill()
        starter.wait()
    _, left = psutil.wait_procs(started, timeout=60)
    assert not left


class Posts:
    """A store as the ranks of a test have left it."""

    def __init__(self, **keys: object) -> None:
        self.store = dist.HashStore()
        for key, value in keys.items():
            self.store.set(key.replace("_", "/"), json.dumps(value))

    def watch(self, size: int, limit: float = 0.3, codes: dict[int, int] | None = None):
        return ranks.watch(self.store, size, limit, (codes or {}).get)


GOOD = {"wrong": [], "us": {"a": 2.0}, "versions": {"torch": "2"}}
GOOD |= {"device": "cpu", "backend": "gloo", "host": "h"}
LOST = {"error": "a collective failed", "doing": "all_reduce", "victim": True}


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(ranks, "START_SECONDS", 0.3)
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.2)


def test_the_slowest_rank_counts():
    outcome = Posts(answer_0=GOOD, answer_1=GOOD | {"us": {"a": 5.0}}).watch(2)
    assert not outcome.failures and not outcome.stuck
    assert outcome.microseconds == {"a": 5.0}


@pytest.mark.parametrize(
    ("posts", "codes", "words"),
    [
        ({"answer_0": LOST, "doing_1": [4, "x"]}, {1: -9}, ["rank 1 was ended by SIGKILL", "'x'"]),
        ({"answer_0": LOST, "doing_1": [4, "x"]}, {1: 3}, ["rank 1 left with code 3"]),
        ({"answer_0": LOST, "doing_1": [4, "x"]}, {}, ["rank 1 has not answered", "has died"]),
        ({"answer_0": LOST, "answer_1": LOST | {"error": "E: 1", "victim": False}}, {},
         ["rank 1 failed at 'all_reduce' with E: 1"]),
        ({"doing_0": [4, "x"], "doing_1": [3, "y"]}, {}, ["rank 1 has not answered", "'y'"]),
        ({"doing_0": [4, "x"], "doing_1": [4, "x"]}, {}, ["no rank got through 'x' within 0.3 s"]),
        ({"doing_0": [4, "x"]}, {}, ["rank 1 has not begun"]),
        ({"answer_0": GOOD, "answer_1": GOOD | {"wrong": ["sum: 3 instead of 4"]}}, {},
         ["rank 1 got a wrong result: sum: 3 instead of 4"]),
        ({"answer_0": GOOD, "answer_1": GOOD | {"versions": {"torch": "3"}}}, {},
         ["rank 1 runs torch 3, rank 0 2"]),
    ],
)  # fmt: skip
def test_the_first_cause_is_named(hasty, posts, codes, words):
    """Guards against blaming the ranks that merely wait for the one that failed."""
    outcome = Posts(**posts).watch(2, codes=codes)
    assert len(outcome.failures) == 1, outcome.failures
    assert all(word in outcome.failures[0] for word in words), outcome.failures
    check = doctor._ranks_check(outcome)
    assert check.status == "fail" and doctor.exit_code([check]) == 6


def test_a_rank_without_a_sign_of_life_is_told_from_those_that_wait(hasty):
    """All stand at the same collective; the process that was stopped no longer beats."""
    posts = Posts(doing_0=[4, "x"], doing_1=[4, "x"])
    counts = iter(range(1000))

    def beats(rank: int) -> None:  # asked for each rank in each look
        posts.store.set("beat/0", str(next(counts)))

    outcome = ranks.watch(posts.store, 2, 0.5, beats)
    assert outcome.silent == [1]
    assert outcome.failures[0].startswith("rank 1 has not answered")
    assert outcome.failures[0].endswith("it is stopped, or its host is gone")


def test_a_store_that_is_gone_is_a_failure():
    class Gone:
        def check(self, keys):
            raise RuntimeError("Connection reset by peer\nmore")

    outcome = ranks.watch(Gone(), 2, 5)
    assert "is gone (Connection reset by peer)" in outcome.failures[0] and outcome.stuck


@pytest.mark.parametrize("size", [2, 3, 8, 64, 200])
def test_sums_are_exact_in_any_order(size):
    """Guards against a rounding that would be taken for a broken network."""
    for case in collectives.cases(size):
        if case.collective != "all_reduce" or case.elements > 4096:
            continue
        values = [collectives._values(case, rank, size) for rank in range(size)]
        total = collectives._expected(case, size)
        backwards = values[-1].clone()
        for value in reversed(values[:-1]):
            backwards += value
        assert torch.equal(backwards, total), case.name
        assert case.elements == 1 or len(set(total.tolist())) > 1, "a constant hides a shift"
    reduced = {case.dtype for case in collectives.cases(size)}
    assert {"float32", "int64"} <= reduced and ("bfloat16" in reduced) == (size <= 128)


@pytest.mark.parametrize("dtype", collectives.EXACT)
def test_wrong_bits_are_seen(dtype, monkeypatch):
    """Negative control: one element of a sum is off by the least there is."""
    case, tp = collectives.Case("all_reduce", dtype, 4096), TPGroup(rank=1, size=2)
    right = collectives._expected(case, 2)
    monkeypatch.setitem(collectives.COLLECTIVES, "all_reduce", lambda x, tp: right.clone())
    assert collectives._run(case, tp)[0] == ""
    wrong = right.clone()
    wrong[7] += 1
    assert not torch.equal(wrong, right)
    monkeypatch.setitem(collectives.COLLECTIVES, "all_reduce", lambda x, tp: wrong)
    assert collectives._run(case, tp)[0].startswith("element 7 is ")
    monkeypatch.setitem(collectives.COLLECTIVES, "all_reduce", lambda x, tp: right[:5].float())
    assert "instead of" in collectives._run(case, tp)[0]


def test_more_ranks_than_cpus_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "usable_cpus", lambda: 1)
    found = doctor._ranks_check(ranks.Outcome(2, {0: GOOD, 1: GOOD}, []))
    assert found.status == "warn" and "2 ranks share 1 CPUs" in found.advice[0]


def test_how_many_ranks(monkeypatch):
    """--nproc, else the settings' tensor x data, else the GPUs, else 2."""
    asked = []

    def start(size, device, limit):
        asked.append((size, device, limit))
        return ranks.Outcome(size, {}, ["not really"])

    monkeypatch.setattr(ranks, "start_ranks", start)
    monkeypatch.setattr(doctor, "_probes", lambda folder: {})
    monkeypatch.setattr(gpu, "count_gpus", lambda: 4)
    replicas = ("--set", "parallel.tensor=1", "--set", "parallel.data=3")
    limit = ("--set", "engine.step_timeout=7")
    for flags in ((), ("--nproc", "2"), replicas, (*limit, "--device", "cpu")):
        assert run(*flags) == 6
    assert asked == [(4, None, 60.0), (2, None, 60.0), (3, None, 60.0), (2, "cpu", 7.0)]
    with pytest.raises(ConfigError, match="8 ranks, but there are 4 GPUs"):
        run("--nproc", "8")
    with pytest.raises(ConfigError, match="--nproc is 0"):
        run("--nproc", "0")


# ---------------------------------------------------------------- telling


def test_exit_codes():
    assert doctor.exit_code(checks("ok", "ok", "ok")) == 0
    assert doctor.exit_code(checks("warn", "warn", "warn")) == 0
    assert doctor.exit_code(checks("fail", "ok", "ok")) == 2
    assert doctor.exit_code(checks("fail", "fail", "ok")) == 5
    assert doctor.exit_code(checks("fail", "fail", "fail")) == 6


def test_a_folder_that_is_none_is_a_usage_error(tmp_path):
    for path in (tmp_path / "absent", Path(__file__)):
        with pytest.raises(ConfigError, match="is no folder"):
            run("--dir", str(path))


def test_the_report_is_one_fenced_block_with_all_facts():
    told = checks("ok", "warn", "fail")
    text = doctor.report([*told, Check("more", "x ``` y", details=["a line"])])
    assert text.count("```") == 2 and text.rstrip().endswith("```")
    block = text.partition("```text\n")[2]
    assert block.startswith("tprt doctor: 2 ok, 1 warn, 1 fail\n")
    assert "[warn] disk: facts\n  -> do this\n[fail] ranks: facts\n  -> do that\n" in block
    assert "more: x ''' y\n  a line" in block


def test_nothing_private_is_told(tmp_path, capsys, monkeypatch):
    """Guards against a report in a bug tracker that gives away a key, a name or a home."""
    home = tmp_path / "alicexy"
    (home / "work").mkdir(parents=True)
    secrets = {
        "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwx",
        "TPRT_SERVER_API_KEY": "quite-short",
        "NCCL_COMMENT": "sk-proj0123456789abcdef",
        "GLOO_LOG": "https://bobby:hunter2@proxy.example/x",
        "TORCH_EXTRA": "Zm9vYmFyMTIzNDU2Nzg5MGFiY2RlZg==",
        "UNRELATED": "never-shown-value",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "alicexy")
    monkeypatch.setenv("TORCH_HOME", f"{home}/cache")
    monkeypatch.setenv("NCCL_TOPO_FILE", "/data/alicexy_models/topo.xml")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(ranks, "start_ranks", lambda *_: ranks.Outcome(2, {}, [str(home)]))
    for flags in ((), ("--json",)):
        run("--dir", str(home / "work"), *flags)
        shown = capsys.readouterr().out
        for name, value in secrets.items():
            assert value not in shown, name
        assert "hunter2" not in shown and "bobby" not in shown
        assert "alicexy" not in shown and "UNRELATED" not in shown
        assert "~/work" in shown and "~/cache" in shown and "HF_TOKEN" not in shown
        assert "TPRT_SERVER_API_KEY" in shown and "NCCL_SOCKET_IFNAME" in shown


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("/home/somebody/x", f"/home/{MASK}/x"),
        ("key AKIAIOSFODNN7EXAMPLE.", f"key {MASK}."),
        ("ghp_16C7e42F292c6912E7710c838347Ae178B4a", MASK),
        ("a version 2.13.0+cpu on /dev/shm", "a version 2.13.0+cpu on /dev/shm"),
        ({"a": ["/home/x1/y", 5, None]}, {"a": [f"/home/{MASK}/y", 5, None]}),
    ],
)
def test_hide(text, hidden, monkeypatch):
    monkeypatch.setenv("LOGNAME", "root")
    monkeypatch.setenv("HOME", "/")
    assert hide(text) == hidden


def test_a_probe_that_breaks_or_hangs_ends_nothing():
    def broken():
        raise ZeroDivisionError("by zero\nmore")

    found = look("gpus", broken)
    assert found.status == "warn" and "ZeroDivisionError: by zero" in found.found
    began = time.monotonic()
    found = look("disk", lambda: time.sleep(30), limit=0.2)
    assert found.status == "warn" and "no answer within 0.2 s" in found.found
    assert time.monotonic() - began < 20


# ---------------------------------------------------------------- software, CPU, memory, limits


def test_a_missing_package_is_a_failure(monkeypatch):
    monkeypatch.setattr(machine, "NEEDED", ("torch", "no-such-package-x"))
    found = machine.versions()
    assert found.failures == ["no-such-package-x is not installed: pip install no-such-package-x"]
    assert found.facts["torch"] and found.facts["tprt"]


def test_the_commit_is_that_of_a_checkout_alone(monkeypatch, tmp_path):
    """Guards against the commit of whatever repository a virtual environment lies in."""
    monkeypatch.setattr(machine.tprt, "__file__", str(tmp_path / "tprt" / "__init__.py"))
    assert machine.versions().facts["commit"] is None
    monkeypatch.setenv("TPRT_COMMIT", "abc")
    assert machine.versions().facts["commit"] == "abc"


def plant(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cgroups_of_version_2(tmp_path):
    root = plant(
        tmp_path,
        proc__self__cgroup="0::/a/b\n",
        sys__fs__cgroup__a__memory_dot_max=str(4 * GIB),
        sys__fs__cgroup__a__memory_dot_current=str(GIB),
        sys__fs__cgroup__a__b__memory_dot_max="max",
        sys__fs__cgroup__a__b__cpu_dot_max="150000 100000",
        sys__fs__cgroup__cpu_dot_max="max 100000",
        sys__fs__cgroup__a__pids_dot_max="300",
    )
    expected = {"memory": 4 * GIB, "memory_used": GIB, "cpus": 1.5, "pids": 300}
    assert usable_cpus(root) == min(2, len(os.sched_getaffinity(0)))
    assert usable_cpus(tmp_path / "nothing") == len(os.sched_getaffinity(0))
    assert cgroup_limits(root) == expected


def test_cgroups_of_version_1(tmp_path):
    root = plant(
        tmp_path,
        proc__self__cgroup="5:cpu,cpuacct:/x\n4:memory:/x\n3:pids:/\n",
        sys__fs__cgroup__memory__x__memory_dot_limit_in_bytes=str(2 * GIB),
        sys__fs__cgroup__memory__x__memory_dot_usage_in_bytes=str(MIB),
        sys__fs__cgroup__memory__memory_dot_limit_in_bytes=str(2**63 - 4096),
        sys__fs__cgroup__cpu__x__cpu_dot_cfs_quota_us="200000",
        sys__fs__cgroup__cpu__x__cpu_dot_cfs_period_us="100000",
        sys__fs__cgroup__cpu__cpu_dot_cfs_quota_us="-1",
        sys__fs__cgroup__pids__pids_dot_max="max",
    )
    expected = {"memory": 2 * GIB, "memory_used": MIB, "cpus": 2.0, "pids": None}
    assert cgroup_limits(root) == expected
    assert set(cgroup_limits(tmp_path / "nothing").values()) == {None}


def test_a_cpu_of_which_little_may_be_used(tmp_path, monkeypatch):
    """Guards against ranks that start 64 threads on 2 cores, as in a container."""
    root = plant(
        tmp_path,
        proc__cpuinfo="model name\t: Some CPU\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16\n\n",
        proc__self__cgroup="0::/\n",
        sys__fs__cgroup__cpu_dot_max="100000 100000",
    )
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.0, 0.0))
    found = machine.cpu({}, root)
    assert found.facts["usable"] == 1 and found.facts["affinity"] == 32
    assert found.facts["flags"] == ["amx_bf16", "avx512_bf16", "avx2"]
    assert found.status == "warn" and "OMP_NUM_THREADS" in found.advice[0]
    assert machine.cpu({"OMP_NUM_THREADS": "1"}, root).status == "ok"
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    assert "the load is 9" in machine.cpu({"OMP_NUM_THREADS": "1"}, root).advice[0]


def test_little_memory(tmp_path, monkeypatch):
    there = SimpleNamespace(total=64 * GIB, available=32 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there)
    assert machine.memory(tmp_path).status == "ok"
    plant(
        tmp_path,
        proc__self__cgroup="0::/\n",
        sys__fs__cgroup__memory_dot_max=str(4 * GIB),
        sys__fs__cgroup__memory_dot_current=str(3 * GIB),
        sys__kernel__mm__transparent_hugepage__enabled="always [madvise] never\n",
    )
    found = machine.memory(tmp_path)
    assert found.status == "warn" and "only 1.0 GiB" in found.advice[0]
    assert found.facts["left"] == GIB and found.facts["huge_pages"] == "madvise"


def test_shared_memory_matters_where_there_are_gpus(monkeypatch, tmp_path):
    small = SimpleNamespace(total=64 * MIB, free=64 * MIB)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: small)
    assert machine.shared_memory(0).status == "ok" == machine.shared_memory(1).status
    assert "--shm-size" in machine.shared_memory(2).advice[0]
    monkeypatch.undo()
    absent = str(tmp_path / "absent")
    assert machine.shared_memory(2, absent).status == "warn"
    assert machine.shared_memory(0, absent).status == "ok"


def test_limits(monkeypatch, tmp_path):
    values: dict[int, int] = {}
    infinite = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (values.get(kind, infinite), infinite))
    assert machine.limits(tmp_path).status == "ok"
    for kind, word in (
        ("NOFILE", "ulimit -n"), ("NPROC", "ulimit -u"), ("FSIZE", "ulimit -f"), ("AS", "ulimit -v"),
    ):  # fmt: skip
        values = {getattr(resource, f"RLIMIT_{kind}"): 100}
        found = machine.limits(tmp_path)
        assert len(found.advice) == 1 and word in found.advice[0], found.advice
        assert found.facts[kind.lower()] == [100, None]


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"NCCL_P2P_DISABLE": "1"}, "through the host"),
        ({"TORCH_DISTRIBUTED_DEBUG": "detail"}, "several times"),
        ({"TPRT_FAULT": "x:raise"}, "injected"),
        ({"MASTER_ADDR": "h"}, "no launcher"),
        ({"OMP_NUM_THREADS": "many"}, "a number"),
        ({"OMP_NUM_THREADS": "0"}, "a number"),
    ],
)
def test_suspicious_variables(environ, words):
    found = machine.environment(environ)
    assert len(found.advice) == 1 and words in found.advice[0], found.advice
    harmless = {"OMP_NUM_THREADS": "2", "NCCL_P2P_DISABLE": "0", "MASTER_ADDR": "h", "RANK": "0"}
    found = machine.environment(harmless)
    assert found.status == "ok" and "RANK" not in found.facts
    assert found.details == ["MASTER_ADDR=h", "NCCL_P2P_DISABLE=0", "OMP_NUM_THREADS=2"]


# ---------------------------------------------------------------- GPUs


class Cuda:
    """What ``torch.cuda`` says of ``count`` GPUs; ``apart`` are pairs without peer access."""

    def __init__(self, count: int = 2, apart: tuple = (), names: tuple = ("GPU X",)) -> None:
        self.count, self.apart, self.names = count, apart, names
        self.nccl = SimpleNamespace(version=lambda: (2, 30, 1))

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def get_device_properties(self, i: int) -> SimpleNamespace:
        name = self.names[i % len(self.names)]
        return SimpleNamespace(name=name, total_memory=80 * GIB, major=9, minor=0, uuid=f"u{i}")

    def can_device_access_peer(self, i: int, j: int) -> bool:
        assert i != j, "torch refuses to be asked this"
        return (i, j) not in self.apart


def smi(count: int = 2, used: int = 3, mode: str = "Default"):
    row = {"name": "GPU X", "memory.total": "81920", "memory.used": str(used)}
    row |= {"driver_version": "600.1", "compute_mode": mode}
    return lambda: [row | {"uuid": f"GPU-u{i}"} for i in range(count)]


def test_good_gpus():
    found = gpu.gpus(Cuda(), "13.0", smi(8), {})
    assert found.status == "ok", found.advice
    for word in ("2 x GPU X", "80.0 GiB", "driver 600.1", "NCCL 2.30.1", "the host has 8"):
        assert word in found.found
    assert found.facts["peers"] == [[True, True], [True, True]] and len(found.details) == 2


@pytest.mark.parametrize(
    ("cuda", "there", "status", "words"),
    [
        (Cuda(apart=((0, 1),)), smi(), "warn", "GPU 0 cannot read the memory of GPU 1"),
        (Cuda(names=("GPU X", "GPU Y")), smi(), "warn", "the GPUs differ"),
        (Cuda(1), smi(1, used=40000), "warn", "39.1 GiB of GPU 0 are in use"),
        (Cuda(1), smi(1, mode="Prohibited"), "fail", "nvidia-smi -i 0"),
    ],
)
def test_gpus_with_something_wrong(cuda, there, status, words):
    found = gpu.gpus(cuda, "13.0", there, {})
    assert found.status == status and len(found.advice) == 1 and words in found.advice[0]


def test_no_gpus():
    assert gpu.gpus(Cuda(0), None, list, {}).status == "ok"
    built = gpu.gpus(Cuda(0), None, smi(), {})
    assert "without CUDA" in built.advice[0] and built.facts["installed"] == 2
    hidden = gpu.gpus(Cuda(0), "13.0", smi(), {"CUDA_VISIBLE_DEVICES": ""})
    assert "CUDA_VISIBLE_DEVICES is ''" in hidden.advice[0]

    class Broken(Cuda):
        def is_available(self):
            import warnings

            warnings.warn("driver too old", stacklevel=1)
            return False

    assert "driver too old" in gpu.gpus(Broken(0), "13.0", smi(), {}).advice[0]


def test_nvidia_smi_is_asked_and_may_be_missing(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU-u, GPU X, 81920, 3, 600.1, Default'\necho '[N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (row,) = gpu.nvidia_smi()
    assert row["uuid"] == "GPU-u" and row["memory.used"] == "3" and row["driver_version"] == "600.1"
    program.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert gpu.nvidia_smi() == []
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert gpu.nvidia_smi() == []


# ---------------------------------------------------------------- network

HERE = {"eth0": ["10.0.0.5", "fd00::5"], "lo": ["127.0.0.1", "::1"]}


def names(local=("127.0.0.1",), own=("10.0.0.5",), seconds=0.0, error="Name not known"):
    def resolve(name: str) -> Resolved:
        known = {"localhost": local, "host-x": own}.get(name, ())
        return Resolved(list(known), "" if known else error, seconds)

    return resolve


def wired(environ=None, **changes) -> Check:
    return network.network(names(**changes), HERE, environ or {}, "host-x")


def test_a_good_network():
    found = wired()
    assert found.status == "ok" and "gloo takes eth0 (10.0.0.5)" in found.found
    assert found.details == ["eth0: 10.0.0.5, fd00::5", "lo: 127.0.0.1, ::1"]
    assert "host-x" not in str(found), "the host's name is nobody's business"
    debian = wired(own=("127.0.1.1",))
    assert debian.status == "ok" and "lo (127.0.1.1, for this host alone)" in debian.found


@pytest.mark.parametrize(
    ("environ", "changes", "status", "words"),
    [
        ({}, {"local": ()}, "fail", "localhost does not resolve"),
        (
            {},
            {"local": ("10.9.9.9",)},
            "fail",
            "localhost does not resolve to this host (10.9.9.9)",
        ),
        ({}, {"own": ()}, "warn", "Name not known"),
        ({}, {"own": ("10.1.1.1",)}, "warn", "address of another host"),
        ({}, {"seconds": 3.0}, "warn", "took 3.0 s"),
        ({"GLOO_SOCKET_IFNAME": "eth7"}, {}, "fail", "'eth7', which is not up"),
        ({"NCCL_SOCKET_IFNAME": "ib"}, {}, "warn", "leaves no interface"),
        ({"NCCL_SOCKET_IFNAME": "^eth,lo"}, {}, "warn", "leaves no interface"),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, {}, "warn", "leaves no interface"),
        ({"MASTER_ADDR": "head", "RANK": "1"}, {}, "fail", "MASTER_ADDR does not resolve"),
    ],
)
def test_a_network_with_something_wrong(environ, changes, status, words):
    found = wired(environ, **changes)
    assert found.status == status and words in found.advice[0], found.advice
    assert environ or "/etc/hosts" in found.advice[0], "what to do is missing"


def test_interfaces_that_are_named_and_there():
    assert wired({"GLOO_SOCKET_IFNAME": "lo,eth0"}).found.startswith("gloo takes lo (127.0.0.1")
    for value in ("eth", "=eth0", "^lo", "lo,ib"):
        assert wired({"NCCL_SOCKET_IFNAME": value}).status == "ok", value


def addresses_of_gloo() -> set[str]:
    """Local addresses of the connections that a group of two really makes."""
    store, groups = dist.HashStore(), {}

    def take_part(rank: int) -> None:
        groups[rank] = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))
        groups[rank].allreduce([torch.ones(1)]).wait()

    before = set(psutil.Process().net_connections("tcp"))
    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = set(psutil.Process().net_connections("tcp")) - before
    assert len(groups) == 2
    return {connection.laddr.ip for connection in made}


WITH_IPV4 = [name for name, found in network.up_interfaces().items() if "." in "".join(found)]


@pytest.mark.parametrize("wanted", ["", *WITH_IPV4])
def test_what_gloo_takes_is_what_is_told(wanted, monkeypatch):
    """The rule is gloo's own: here it is asked, for its own choice and for every interface."""
    if wanted:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", wanted)
    found = network.network()
    assert addresses_of_gloo() == {found.facts["gloo"]["address"]}


def test_resolving():
    here = network.resolve_name("localhost")
    assert set(here.addresses) & {"127.0.0.1", "::1"} and not here.error
    assert network.resolve_name("no-such-host.invalid").error
    assert network.resolve_name("a..b" * 100).error


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *a, **k: time.sleep(30) or [])
    began = time.monotonic()
    found = network.resolve_name("x", limit=0.2)
    assert found.error == "no answer within 0.2 s" and time.monotonic() - began < 20


# ---------------------------------------------------------------- disk


def test_a_disk_is_measured_within_bounds_and_left_clean(tmp_path):
    began = time.monotonic()
    found = disk.measure(tmp_path, 32 * MIB, seconds=30)
    assert found.written == 32 * MIB and found.write > 0 and found.read > 0 and found.sync > 0
    assert not found.wrong and not found.locks
    assert disk.measure(tmp_path, 10**12, seconds=0.0).written == 0
    assert not list(tmp_path.iterdir()) and time.monotonic() - began < 60


def test_a_killed_measurement_leaves_nothing(tmp_path):
    """Guards against a file that only a tidy end would remove."""
    code = (
        "import os, signal; from pathlib import Path; from tprt.cli.doctor_probes import disk\n"
        "disk._append = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"disk.measure(Path({str(tmp_path)!r}), 1 << 20)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=False)
    assert done.returncode == -signal.SIGKILL and not list(tmp_path.iterdir())


def test_a_disk_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    found = disk.disk(tmp_path)
    assert found.status == "fail" and "Read-only file system" in found.advice[0]
    assert doctor.exit_code([found]) == 5


def test_bytes_that_come_back_wrong(tmp_path, monkeypatch):
    """Negative control of the comparison."""
    real = os.read
    monkeypatch.setattr(disk.os, "read", lambda *a: real(*a)[:-1] + b"?")
    found = disk.disk(tmp_path)
    assert found.status == "fail" and "differ" in found.advice[0]


@pytest.mark.parametrize(
    ("free", "inodes", "kind", "changes", "status", "words"),
    [
        (10 * MIB, 9999, "ext4", {}, "warn", "only 10.0 MiB are free"),
        (GIB, 5, "ext4", {}, "warn", "only 5 more files"),
        (GIB, 0, "btrfs", {}, "ok", ""),
        (GIB, 9999, "nfs4", {}, "warn", "network file system"),
        (GIB, 9999, "ext4", {"write": 1e6}, "warn", "writes at"),
        (GIB, 9999, "ext4", {"sync": 0.5}, "warn", "500 ms"),
        (GIB, 9999, "ext4", {"locks": "No locks available"}, "fail", "cannot be locked"),
    ],
)
def test_what_is_made_of_a_disk(free, inodes, kind, changes, status, words):
    good = {"written": 1, "write": 1e9, "read": 1e9, "sync": 1e-3, "wrong": False, "locks": ""}
    warnings, failures = disk._judge(free, inodes, kind, disk.Speeds(**good | changes))
    found = Check("disk", "", warnings, failures)
    assert found.status == status and words in "".join(found.advice)


def test_the_kind_of_a_file_system(monkeypatch):
    parts = [("/", "ext4"), ("/data", "nfs4"), ("/data/fast", "xfs")]
    monkeypatch.setattr(
        psutil,
        "disk_partitions",
        lambda all: [SimpleNamespace(mountpoint=m, fstype=f) for m, f in parts],
    )
    kinds = {"/data": "nfs4", "/data/fast/x": "xfs", "/database": "ext4", "/data/slow": "nfs4"}
    assert {path: disk.file_system(Path(path)) for path in kinds} == kinds
