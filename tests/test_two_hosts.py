"""Two hosts on one machine: network namespaces with addresses of their own, joined by a pair of links.

A link that is set down drops everything in silence, as a cut cable or a lost host does. Needs root.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from tprt.cli import main

STEP_TIMEOUT = 5
HEAD, OTHER = "10.211.7.1", "10.211.7.2"


def can_make_namespaces() -> bool:
    if os.geteuid() or not shutil.which("ip"):
        return False
    tried = subprocess.run(["ip", "netns", "add", "tprt-probe"], check=False, capture_output=True)
    subprocess.run(["ip", "netns", "del", "tprt-probe"], check=False, capture_output=True)
    return tried.returncode == 0


pytestmark = pytest.mark.skipif(not can_make_namespaces(), reason="needs root and `ip netns`")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Hosts:
    """Names of the namespaces; the link of each has the same name."""

    names: tuple[str, str]
    folder: Path

    def start(self, host: int, *argv: str) -> subprocess.Popen:
        # Torch's own launcher looks its host's name up, and there is nobody to ask: a file tells.
        script = (
            f'hostname host-{"ab"[host]}; printf "127.0.0.1 localhost\n'
            f'{HEAD} host-a\n{OTHER} host-b\n" >"$0"; mount --bind "$0" /etc/hosts; exec "$@"'
        )
        own = ["unshare", "--uts", "--mount", "sh", "-c", script, str(self.folder / f"hosts{host}")]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *own, *argv],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def cut(self) -> None:
        ip("-n", self.names[0], "link", "set", self.names[0], "down")

    def processes(self) -> list[int]:
        found = []
        for name in self.names:
            done = subprocess.run(
                ["ip", "netns", "pids", name], check=True, capture_output=True, text=True
            )
            found += [int(pid) for pid in done.stdout.split()]
        return found


@pytest.fixture
def hosts(tmp_path) -> Iterator[Hosts]:
    names = f"ta{os.getpid()}", f"tb{os.getpid()}"
    made = Hosts(names, tmp_path)
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for name, address in zip(names, (HEAD, OTHER), strict=True):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield made
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            for pid in made.processes():
                os.kill(pid, signal.SIGKILL)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def generate(out: Path, source: Path, *extra: str) -> list[str]:
    flags = ["--model", str(TINY), "--input", str(source), "--output", str(out)]
    settings = ["--dtype", "float32", "--temperature", "0", *extra]
    settings += ["--set", f"engine.step_timeout={STEP_TIMEOUT}", "--set", "engine.load_timeout=20"]
    return ["generate", *flags, *settings]


@pytest.fixture
def source(tmp_path) -> Path:
    """Some seconds of work on two ranks."""
    path = tmp_path / "in.jsonl"
    record = {"prompt": "human: Repeat 3 times: kite\n\nadept:", "params": {"ignore_eos": True}}
    path.write_text((json.dumps(record) + "\n") * 60)
    return path


def torchrun(node: int) -> list[str]:
    """Torch's own launcher and its c10d rendezvous."""
    head = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HEAD}:29400", "--rdzv-id", "job")
    counts = ("--nnodes", "2", "--nproc-per-node", "1", "--local-addr", (HEAD, OTHER)[node])
    return [sys.executable, "-m", "torch.distributed.run", *head, *counts, "-m", "tprt"]


def ours(hosts: Hosts, node: int) -> list[str]:
    return [
        *("env", f"PYTHON={sys.executable}", "bash", "launch/torchrun.sh", "--nproc", "1"),
        *("--nnodes", "2", "--node-rank", str(node), "--head", HEAD),
        *("--interface", hosts.names[node], "--"),
    ]


def with_interface(hosts: Hosts, node: int) -> list[str]:
    return ["env", f"GLOO_SOCKET_IFNAME={hosts.names[node]}", *torchrun(node)]


@pytest.mark.parametrize("launcher", [with_interface, ours])
def test_one_model_over_two_hosts(hosts, tmp_path, source, launcher):
    job = generate(tmp_path / "out", source, "--max-tokens", "8")
    nodes = [hosts.start(node, *launcher(hosts, node), *job) for node in (0, 1)]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "2 x cpu" in said[0]
    assert main(generate(tmp_path / "alone", source, "--max-tokens", "8")) == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "alone").read_bytes()
    assert not hosts.processes()


def wait_for(what, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def running(hosts, tmp_path, source):
    """A job over both hosts, in the midst of its records."""
    out = tmp_path / "out"
    job = generate(out, source, "--max-tokens", "150")
    nodes = [hosts.start(node, *ours(hosts, node), *job) for node in (0, 1)]

    def is_running() -> bool:
        assert all(node.poll() is None for node in nodes), [n.communicate() for n in nodes]
        with contextlib.suppress(OSError, ValueError):
            status = json.loads(Path(f"{out}.status.json").read_text())
            return status["state"] == "running"
        return False

    wait_for(is_running)
    time.sleep(1)
    yield nodes, out, job


def test_a_cut_link_is_named_on_both_sides(hosts, running, tmp_path):
    nodes, out, job = running
    hosts.cut()
    began = time.monotonic()
    said = [node.communicate(timeout=60)[0] for node in nodes]
    assert time.monotonic() - began < STEP_TIMEOUT + 10
    assert [node.returncode for node in nodes] == [6, 6], said
    assert "rank 1, which has given no sign of life" in said[0] and "host host-b" in said[0]
    assert "rank 1, which has had no answer from the rendezvous store" in said[1]
    assert "the network between this host and the store's is cut" in said[1]
    status = json.loads(Path(f"{out}.status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 6)
    assert (status["error"]["rank"], status["error"]["host"]) == (1, "host-b")
    assert not hosts.processes()
    # The host that is left goes on alone.
    assert main(job) == 0
    assert main([*job, "--output", str(tmp_path / "whole")]) == 0
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_on_another_host_is_named(hosts, running, victim):
    """No process of the other host can be seen: broken connections and missing posts tell."""
    nodes, _, _ = running
    name, began = hosts.names[victim], time.monotonic()
    pids = subprocess.run(["ip", "netns", "pids", name], check=True, capture_output=True, text=True)
    for pid in pids.stdout.split():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"tprt" in words and b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
            os.kill(int(pid), signal.SIGKILL)
    said = [node.communicate(timeout=60)[0] for node in nodes]
    assert time.monotonic() - began < 12
    assert [node.returncode for node in nodes] == [6, 6], said
    assert f"rank {victim}," in said[1 - victim] and f"host-{'ab'[victim]}" in said[1 - victim]
    assert not hosts.processes()
