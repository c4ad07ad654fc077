"""What only a GPU can show, in stages of less than nine minutes: ``launch/gpu_check.sh``.

With ``--ranks N`` the stages are those of N GPUs: ``launch/multi_gpu_check.sh``. With ``--cpu`` the
same commands run at toy sizes, on CPUs and in Triton's interpreter: that shows that they run, and
nothing else. Each stage leaves a file in the folder $OUT; ``stage_runner`` says what is in it.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tprt.bench.report import commit
from tprt.bench.stage_runner import Interrupted, Stage, Step, run_stage, summary
from tprt.errors import EXIT_SIGINT, EXIT_SIGTERM

ROOT = Path(__file__).resolve().parents[2]
DRY = (
    "anything on a GPU: this is a dry run at toy sizes on a CPU, Triton kernels in the interpreter; no "
    "figure here says anything about speed"
)
ONE_GPU = (
    "anything on more than one GPU: nothing here went over NVLink; what stands under TP 2 to 8 is one "
    "rank's share alone, or a projection that says so"
)
# Torch's symmetric memory refuses ranks that share a GPU without it.
OVERLAP = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
INTERPRETED = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
OUT_OF_ALL = ("tune",)  # stages that are run by name alone

# A step by its name: the arguments of ``tprt bench`` on GPUs, and those of the dry run.
Benches = dict[str, tuple[str, str]]
MEMORY, TOY_MEMORY = "--set gpu_memory_utilization=0.95", "--set kv_cache_memory=2000000"
PEER = "--vs transformers"
FULL_MEMORY = {
    f"full memory, {context}": (
        f"throughput --context {context} {MEMORY}", f"throughput --context {toy} {TOY_MEMORY}"
    )
    for context, toy in ((2048, 32), (512, 16))
}  # fmt: skip
RG, RT = "recurrentgemma", "toy-recurrent"
RECURRENT_TOY = f"decode --model {RT} --steps 2 --repeats 1"
TUNE = "kernels --tune {out}/tiles.json --only norm"

# Estimates are for one H200: 4.3 TB/s, 2 s for Triton to compile a kernel, 40 s until an engine of 8B
# with random weights has captured its graphs. Limits leave room for half as much again.
ONE: dict[str, tuple[int, Benches]] = {
    # 105 lines of 0.4 s, 35 kernels to compile, ceilings 10 s: 120 s; the shard 90 s.
    "kernels": (480, {
        "kernels": ("kernels", "kernels"),
        "kernels of TP 4": ("kernels --shard 4", "kernels --shard 2 --only attention"),
    }),
    # 11 cells, each 5 runs of 70 steps of 4 to 20 ms: 100 s with the engine; the peer's compilation of
    # 36 layers 120 s, its runs 20 s, and an engine; a third engine without graphs 60 s.
    "decode": (530, {
        "decode": ("decode", "decode"),
        "without graphs": (
            "decode --batch 1 --context 512 --set enforce_eager=true",
            "decode --batch 1 --context 16 --steps 1 --repeats 1 --set enforce_eager=true "
            "--set kernels=triton",
        ),
        "beside transformers": (
            f"decode --batch 1 --context 512 {PEER}", f"decode --batch 1 {PEER}"
        ),
    }),
    # 11 cells of 5 shares, each 7 pairs of runs of 40 steps of 4 to 15 ms, and 8 watched ones: 250 s;
    # two engines on one model 80 s, reads between cells 10 s, the sparse kernels to compile 30 s.
    "sparse": (530, {
        "zeros": (
            "decode --zeros 0.7,0.8,0.9,0.95,0.99 --trim --pairs 7 --steps 32",
            "decode --zeros 0.5,0.9 --trim --pairs 1 --steps 2 --batch 1 --context 16",
        ),
    }),
    # Three eager engines 50 s each; Nsight Compute takes 10 ms for each of 300 kernels.
    "bytes": (400, {
        "dense": ("bytes --set sparse_rows=0", "bytes --set sparse_rows=0"),
        "90% zeros": ("bytes --zeros 0.9", "bytes --zeros 0.9"),
        "90% zeros, trimmed": ("bytes --zeros 0.9 --trim", "bytes --zeros 0.9 --trim"),
    }),
    # 7 prompts of 2,048 tokens of 50 ms, 7 of 16,384 of 0.7 s, as many by the peer: 20 s; 36 runs of 5
    # mixed steps of 50 ms; the engine and the peer's model 60 s.
    "prefill": (400, {"prefill": (f"prefill {PEER}", f"prefill {PEER}")}),
    # Full memory: engines of up to 250 slots 60 s each, 3 runs of 40 steps of 35 ms. Beside the peer:
    # its 6 settings take 5 to 30 s each, then 3 pairs of 15 s.
    "throughput": (530, {
        **FULL_MEMORY,
        "beside transformers": (
            f"throughput --model persimmon-8b {PEER}", f"throughput --requests 6 {PEER}"
        ),
    }),
    # 18.8 GB written at 300 MB/s 60 s, read cold twice at 1 GB/s 40 s, kernels compiled once 60 s, three
    # warm starts of 10 s.
    "startup": (530, {"startup": ("startup", "startup")}),
    # Three engines of a share, 6 cells each: 45 s each; the tests of two processes 60 s.
    "ranks": (480, {
        f"share of TP {n}": (f"decode --shard {n} --context 512,2048", "decode --shard 2 --batch 1")
        for n in (2, 4, 8)
    }),
    # Lines of kernels 75 s. Contexts are computed: 16 prompts of 8,000 tokens at 40,000 tokens/s 4 s, in
    # each of 5 runs; an engine of 2B 40 s, of 9B 60 s. The peer runs a loop in Python over the tokens of
    # a prompt: 64 of them 0.2 s, 2,048 of them 5 s, 6 times.
    "recurrent": (530, {
        "kernels of 2B": (f"kernels --model {RG}-2b", f"kernels --model {RT} --only window"),
        "2B": (
            f"decode --model {RG}-2b --batch 1,16 --context 512,2100,8000",
            f"{RECURRENT_TOY} --batch 1,3 --context 16,40",
        ),
        "9B": (f"decode --model {RG}-9b --batch 1 --context 2100,8000", f"{RECURRENT_TOY} --batch 1"),
        "2B beside transformers": (
            f"decode --model {RG}-2b --batch 1 --context 64 {PEER}", f"{RECURRENT_TOY} --batch 1 {PEER}"
        ),
        "prompts of 2B": (
            f"prefill --model {RG}-2b --prompt 2048 {PEER}", f"prefill --model {RT} {PEER}"
        ),
    }),
    # 24 tiles for up to 5 numbers of rows and 4 to 6 shapes, 0.3 s each, and 50 kernels to compile once.
    "tune": (530, {
        "tune": (TUNE, TUNE),
        "tune of 2B": (f"{TUNE} --model {RG}-2b", f"{TUNE} --model {RT}"),
    }),
}  # fmt: skip
# As on one GPU; an engine takes 20 s more to come up with NCCL.
SEVERAL: dict[str, tuple[int, Benches]] = {
    "allreduce": (200, {"all-reduce": ("allreduce", "allreduce")}),
    "decode": (400, {"decode": ("decode", "decode")}),
    "prefill": (300, {"prefill": ("prefill", "prefill")}),
    "throughput": (400, FULL_MEMORY),
}


def stages(cpu: bool, ranks: int, folder: Path) -> list[Stage]:
    """All stages, in the order in which they run.

    Args:
        cpu: a dry run. ranks: of a launcher; 1 takes plain processes. folder: where files go.
    """
    table = ONE if ranks == 1 else SEVERAL
    found = {"tests": _tests(cpu, ranks)}
    for name, (limit, benches) in table.items():
        steps = [
            _bench(step, dry if cpu else real, cpu, ranks, folder)
            for step, (real, dry) in benches.items()
        ]
        found[name] = _stage(name, limit, steps, cpu, ranks)
    if ranks == 1:
        files = "test_symmetric_memory.py", "test_triton_one_shot.py", "test_one_shot_ranks.py"
        shared = _pytest("tests of ranks", cpu, *files)
        steps = [shared, *(found["ranks"].steps[:1] if cpu else found["ranks"].steps)]
        found["ranks"] = _stage("ranks", found["ranks"].limit, steps, cpu, ranks, OVERLAP)
    return list(found.values())


def _stage(
    name: str,
    limit: int,
    steps: Sequence[Step],
    cpu: bool,
    ranks: int,
    more: dict[str, str] | None = None,
) -> Stage:
    not_run = [DRY] if cpu else [ONE_GPU] if ranks == 1 else []
    return Stage(name, limit, steps, not_run, {**(INTERPRETED if cpu else {}), **(more or {})})


def _bench(step: str, arguments: str, cpu: bool, ranks: int, folder: Path) -> Step:
    launch = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} " if ranks > 1 else ""
    more = " --toy --device cpu" if cpu else ""
    command = shlex.split(f"{launch}-m tprt.bench {arguments}{more}")
    return Step(step, tuple(part.replace("{out}", str(folder)) for part in command))


def _tests(cpu: bool, ranks: int) -> Stage:
    """Tests that a GPU alone can run, and on one the test files of Triton kernels, compiled.

    Tests marked gpu 240 s; some 650 variants of kernels, compiled in 4 processes, 120 s.
    """
    if cpu:
        steps = [_pytest("tests", cpu, "test_gpu.py", "test_gpu_recurrent.py")]
        if ranks == 1:
            collected = ("-m", "pytest", "--collect-only", "-q", *_files("test_triton_*.py"))
            steps.append(Step("Triton tests, collected", collected, "tests"))
    else:
        mark = "multi_gpu" if ranks > 1 else "gpu"
        pattern = re.compile(rf"\bmark\.{mark}\b")
        marked = [path for path in _files("test_*.py") if pattern.search((ROOT / path).read_text())]
        # A file that needs a package this machine lacks must not keep the others from running.
        every = "--continue-on-collection-errors"
        steps = [Step("tests", ("-m", "pytest", "-q", every, "-m", mark, *marked), "tests")]
        if ranks == 1:
            spread = ("-n", "4") if importlib.util.find_spec("xdist") else ()
            compiled = ("-m", "pytest", "-q", *spread, "-m", "not gpu and not multi_gpu")
            steps.append(Step("Triton tests", (*compiled, *_files("test_triton_*.py")), "tests"))
    return _stage("tests", 500, steps, cpu, ranks)


def _pytest(step: str, cpu: bool, *names: str) -> Step:
    files = [path for name in names for path in _files(name)]
    mark = "not gpu and not multi_gpu" if cpu else "not multi_gpu"
    return Step(step, ("-m", "pytest", "-q", "-m", mark, *files), "tests")


def _files(pattern: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob(pattern))]


FACTS = """
import json, torch
from tprt.bench.report import device_name, versions
import triton
there = torch.cuda.is_available()
device = torch.device("cuda" if there else "cpu")
memory = torch.cuda.get_device_properties(device).total_memory if there else None
print(json.dumps({
    "device": device_name(device), "device_memory": memory, "device_count": torch.cuda.device_count(),
    "versions": versions(),
}))
"""


def machine() -> dict[str, Any]:
    """The device and versions, asked in a process of its own: this one must not hold GPU memory."""
    ended = subprocess.run(
        [sys.executable, "-c", FACTS], check=False, capture_output=True, text=True, cwd=ROOT
    )
    if ended.returncode != 0:
        return {"device": None, "device_count": 0, "error": ended.stderr.strip()[-500:]}
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str], ask: Callable[[], dict[str, Any]] = machine) -> int:
    """Returns 0 when every stage that was asked for passed, 1 when one failed, 2 for wrong usage, 5
    where files cannot be written, 130 and 143 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="gpu_check",
        description=(__doc__ or "").split("\n")[0],
        epilog=f"Stages: {', '.join(ONE)}, tests; with several GPUs {', '.join(SEVERAL)}, tests. "
        f"'all' is every one but {', '.join(OUT_OF_ALL)}. Environment: OUT, the folder for files; "
        "PYTHON, the interpreter; TPRT_COMMIT, the commit where the repository's history is missing. "
        "launch/multi_gpu_check.sh takes the number of GPUs as a plain argument.",
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="all is the default")
    parser.add_argument("--cpu", action="store_true", help="dry run at toy sizes without a GPU")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="GPUs to run on")
    args = parser.parse_args(arguments)
    if args.ranks < 1:
        parser.error(f"--ranks is {args.ranks}; 1 or more")
    default = "out/multi_gpu_check" if args.ranks > 1 else "out/gpu_check"
    default += "_cpu" if args.cpu else ""  # a dry run must not replace what a GPU gave
    folder = ROOT / (os.environ.get("OUT") or default)
    known = {stage.name: stage for stage in stages(args.cpu, args.ranks, folder)}
    wanted = args.stages or ["all"]
    if unknown := [name for name in wanted if name not in (*known, "all")]:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(known)} and all")
    if "all" in wanted:
        wanted = [name for name in known if name in wanted or name not in OUT_OF_ALL]
    facts = ask()
    if not args.cpu and facts["device_count"] < args.ranks:
        print(
            f"gpu_check: {facts['device_count']} GPUs here, {args.ranks} needed; --cpu is a dry run",
            file=sys.stderr,
        )
        return 2
    facts |= {"commit": commit(), "command": shlex.join(["gpu_check", *arguments])}
    done: list[dict[str, Any]] = []
    code = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "gpu_check.log").open("a", encoding="utf-8") as log:
            for name in dict.fromkeys(wanted):
                done.append(run_stage(known[name], folder, facts, log, ROOT))
    except OSError as error:
        print(f"gpu_check: {folder}: {error.strerror}; name another folder in OUT", file=sys.stderr)
        code = 5
    except Interrupted as error:
        done.append(error.told)
        code = EXIT_SIGTERM if isinstance(error.__cause__, _Terminated) else EXIT_SIGINT
    print(f"\n{facts['device']}, commit {facts['commit']}, files in {folder}\n{summary(done)}")
    return code or (0 if all(stage["ok"] for stage in done) else 1)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def _terminate(*_: Any) -> None:
    raise _Terminated


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt as error:  # before the first stage
        sys.exit(EXIT_SIGTERM if isinstance(error, _Terminated) else EXIT_SIGINT)
