"""Software, CPU, memory, limits and environment variables of this process. Knows no network, no GPU."""

import importlib.metadata
import math
import os
import platform
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

import tprt
from tprt.cli.doctor_probes.check import GIB, Check, shown_variable, size
from tprt.host_limits import cgroup_limits, read_text, usable_cpus

NEEDED = ("torch", "safetensors", "sentencepiece", "numpy")
OPTIONAL = ("triton", "transformers", "huggingface_hub")
# Of a CPU, as /proc/cpuinfo has them: what makes bfloat16 quick, and what to expect beside it.
CPU_FLAGS = ("amx_tile", "amx_bf16", "avx512_bf16", "avx512f", "avx2", "bf16", "sve", "asimd")
SHOWN_VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
SHOWN_PREFIXES = ("NCCL_", "TORCH_", "GLOO_", "TPRT_", "MASTER_")
LITTLE_MEMORY, LITTLE_SHARED = 2 * GIB, GIB
FEW_FILES, FEW_PROCESSES = 1024, 512

# Variable -> (values that are suspicious, what they do).
SLOW_VARIABLES = {
    "CUDA_LAUNCH_BLOCKING": ("1", "every kernel is waited for"),
    "NCCL_P2P_DISABLE": ("1", "GPUs exchange data through the host"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "collectives take several times as long"),
    "TPRT_FAULT": (None, "faults are injected into the program"),
}


def versions() -> Check:
    """Python, the packages that matter, and this program with its commit."""
    found = {"tprt": tprt.__version__, "python": platform.python_version()}
    failures = []
    for name in (*NEEDED, *OPTIONAL):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in NEEDED:
                failures.append(f"{name} is not installed: pip install {name}")
    commit = _commit()
    shown = [f"{name} {version}" for name, version in found.items()]
    if commit:
        shown[0] += f" ({commit[:12]}{'-dirty' if commit.endswith('-dirty') else ''})"
    facts = found | {"commit": commit}
    return Check("versions", ", ".join(shown), failures=failures, facts=facts)


def torch_build() -> Check:
    """Whether torch can be imported, and what it was built with."""
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:  # a library it needs may be missing: OSError, ImportError and others
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Check(
            "torch",
            f"cannot be imported: {said}",
            failures=["install torch again: pip install torch"],
        )
    backends = [
        name
        for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available()))
        if there
    ]
    facts = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "backends": backends,
        "threads": torch.get_num_threads(),
    }
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    failures = [] if "gloo" in backends else ["torch was built without gloo: install its wheel"]
    return Check(
        "torch",
        f"{torch.__version__}, {cuda}, {' and '.join(backends) or 'no backends'}, "
        f"{facts['threads']} threads",
        failures=failures,
        facts=facts,
    )


def system() -> Check:
    """Operating system, kernel, C library, and whether this is a container."""
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        name = platform.system()
    libc = " ".join(platform.libc_ver()).strip()
    container = any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv"))
    facts = {
        "os": name,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "libc": libc,
        "container": container,
    }
    parts = [name, f"kernel {facts['kernel']}", facts["machine"], libc, container and "container"]
    warnings = [] if platform.system() == "Linux" else ["tprt is made for Linux and tested there"]
    return Check("system", ", ".join(str(p) for p in parts if p), warnings, facts=facts)


def cpu(environ: Mapping[str, str] | None = None, root: Path = Path("/")) -> Check:
    """Model, cores, how many of them this process may use, and what it has for bfloat16.

    Args:
        root: of the file system.
    """
    environ = os.environ if environ is None else environ
    model, flags = _cpu_info(root / "proc/cpuinfo")
    logical = os.cpu_count() or 1
    allowed, quota = len(os.sched_getaffinity(0)), cgroup_limits(root)["cpus"]
    usable = usable_cpus(root)
    facts = {
        "model": model,
        "logical": logical,
        "cores": psutil.cpu_count(logical=False),
        "affinity": allowed,
        "cgroup_cpus": quota,
        "usable": usable,
        "flags": flags,
        "load": round(os.getloadavg()[0], 2),
    }
    warnings = []
    if usable < logical and "OMP_NUM_THREADS" not in environ:
        warnings.append(
            f"this process may use {usable} of {logical} CPUs: set OMP_NUM_THREADS to {usable} divided "
            "by the ranks of this host, else ranks take threads for all of them"
        )
    if facts["load"] > usable:
        warnings.append(
            f"the load is {facts['load']:g} on {usable} CPUs: other programs slow every rank down"
        )
    parts = [model, f"{usable} of {logical} CPUs usable", f"{facts['cores'] or '?'} cores"]
    parts += [f"cgroup {quota:g} CPUs"] if quota else []
    parts += [" ".join(flags) or "none of " + " ".join(CPU_FLAGS[:4]), f"load {facts['load']:g}"]
    return Check("cpu", ", ".join(parts), warnings, facts=facts)


def memory(root: Path = Path("/")) -> Check:
    """Memory of the machine, of the cgroup, and what of it is left."""
    there = psutil.virtual_memory()
    limits = cgroup_limits(root)
    limit, used = limits["memory"], limits["memory_used"]
    left = there.available
    if limit is not None:
        left = min(left, max(0, limit - (used or 0)))
    facts = {
        "total": there.total,
        "available": there.available,
        "cgroup_limit": limit,
        "cgroup_used": used,
        "left": left,
        "swap": psutil.swap_memory().total,
        "huge_pages": _huge_pages(root),
    }
    warnings = []
    if left < LITTLE_MEMORY:
        warnings.append(
            f"only {size(left)} are left, and the KV cache of a CPU rank takes 1 GiB unless told "
            "otherwise: --set engine.kv_cache_memory=256M, or close other programs"
        )
    parts = [f"{size(there.available)} of {size(there.total)} available"]
    if limit is not None:
        parts.append(f"cgroup {size(used or 0)} of {size(limit)} used")
    parts.append(f"huge pages {facts['huge_pages']}")
    return Check("memory", ", ".join(parts), warnings, facts=facts)


def shared_memory(gpus: int, folder: str = "/dev/shm") -> Check:
    """The file system through which NCCL lets GPUs of one host exchange data without peer access."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        needed = [f"{folder} is missing, which NCCL needs: mount a tmpfs there"]
        return Check("shm", f"{folder}: {error.strerror}", needed if gpus > 1 else [])
    warnings = []
    if gpus > 1 and usage.free < LITTLE_SHARED:
        warnings.append(
            f"{folder} has {size(usage.free)} free, and NCCL may need more for {gpus} GPUs: "
            "start the container with --shm-size=1g or more, or --ipc=host"
        )
    facts = {"total": usage.total, "free": usage.free}
    return Check("shm", f"{size(usage.free)} of {size(usage.total)} free", warnings, facts=facts)


def limits(root: Path = Path("/")) -> Check:
    """Of this process: open files, processes, locked memory, file size, address space."""
    facts: dict[str, Any] = {}
    for name in ("NOFILE", "NPROC", "MEMLOCK", "FSIZE", "AS"):
        both = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        facts[name.lower()] = [None if n == resource.RLIM_INFINITY else n for n in both]
    facts["cgroup_pids"] = cgroup_limits(root)["pids"]

    def soft(name: str) -> float:
        return math.inf if facts[name][0] is None else facts[name][0]

    warnings = []
    if soft("nofile") < FEW_FILES:
        warnings.append(f"only {soft('nofile')} files may be open: ulimit -n {FEW_FILES * 64}")
    pids = facts["cgroup_pids"]
    if min(soft("nproc"), math.inf if pids is None else pids) < FEW_PROCESSES:
        warnings.append(
            "few processes and threads are allowed (ulimit -u, pids.max of the cgroup): "
            f"{FEW_PROCESSES} or more, as every rank starts many threads"
        )
    if soft("fsize") < math.inf:
        warnings.append(
            f"files end at {size(soft('fsize'))}: ulimit -f unlimited, or outputs may fail"
        )
    if soft("as") < math.inf:
        warnings.append(
            "the address space is limited: ulimit -v unlimited, as checkpoints are mapped"
        )
    parts = [
        f"{label} {_number(facts[name][0])}"
        for label, name in (("open files", "nofile"), ("processes", "nproc"))
    ]
    locked = facts["memlock"][0]
    parts.append(f"locked memory {'unlimited' if locked is None else size(locked)}")
    parts.append(f"cgroup pids {_number(pids)}")
    return Check("limits", ", ".join(parts), warnings, facts=facts)


def environment(environ: Mapping[str, str] | None = None) -> Check:
    """Variables that torch, its backends and this program read. Values of others are never told."""
    environ = os.environ if environ is None else environ
    found = {
        name: shown_variable(name, environ[name])
        for name in sorted(environ)
        if name in SHOWN_VARIABLES or name.startswith(SHOWN_PREFIXES)
    }
    warnings = []
    for name, (value, what) in SLOW_VARIABLES.items():
        if environ.get(name) and value in (None, environ[name].upper()):
            warnings.append(f"{name} is set, so {what}: unset {name} unless you mean it")
    threads = environ.get("OMP_NUM_THREADS", "")
    if threads and not (threads.isdecimal() and int(threads) > 0):
        warnings.append(f"OMP_NUM_THREADS is {threads!r}: give a number of 1 or more")
    if "MASTER_ADDR" in environ and "RANK" not in environ:
        warnings.append(
            "MASTER_ADDR is set although no launcher started this process: unset it, or use torchrun"
        )
    shown = ", ".join(found) or "none of " + ", ".join([*SHOWN_VARIABLES, *SHOWN_PREFIXES])
    details = [f"{name}={value}" for name, value in found.items()]
    return Check("environment", shown, warnings, details=details, facts=found)


def _cpu_info(path: Path) -> tuple[str, list[str]]:
    model, flags = platform.machine(), set()
    for line in (read_text(path) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
        if not line.strip() and flags:  # one processor tells for all
            break
    return model, [flag for flag in CPU_FLAGS if flag in flags]


def _huge_pages(root: Path) -> str:
    text = read_text(root / "sys/kernel/mm/transparent_hugepage/enabled") or ""
    return text.partition("[")[2].partition("]")[0] or "unknown"


def _commit() -> str | None:
    """Of the checkout this program runs from; None where it was installed."""
    told = os.environ.get("TPRT_COMMIT")
    if told or not (Path(tprt.__file__).parent.parent / ".git").exists():
        return told
    try:
        from tprt.bench.report import commit
    except Exception:  # imports torch, which may be what is broken
        return None
    return commit()


def _number(value: int | None) -> str:
    return "unlimited" if value is None else str(value)
