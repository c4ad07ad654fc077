"""GPUs as torch and the driver see them. Makes no context on a device: its ranks may want it alone."""

import os
import subprocess
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from tprt.cli.doctor_probes.check import MIB, Check, size

SMI_SECONDS = 10
MUCH_USED = 0.05  # of a GPU's memory, by others
_QUERY = ("uuid", "name", "memory.total", "memory.used", "driver_version", "compute_mode")

Smi = Callable[[], list[dict[str, str]]]


def gpus(
    cuda: Any = None,
    build: str | None = None,
    smi: Smi | None = None,
    environ: Mapping[str, str] | None = None,
) -> Check:
    """Names, memory, driver, NCCL, and which GPUs read one another's memory.

    Args:
        cuda: ``torch.cuda``.
        build: the CUDA version torch was built with, None without CUDA; where ``cuda`` is given.
        smi: what ``nvidia-smi`` says, a mapping per GPU.
    """
    environ = os.environ if environ is None else environ
    if cuda is None:
        import torch

        cuda, build = torch.cuda, torch.version.cuda
    installed = (smi or nvidia_smi)()
    with warnings.catch_warnings(
        record=True
    ) as said:  # torch says here what is wrong with a driver
        warnings.simplefilter("always")
        available = cuda.is_available()
    if not available:
        return _none(build, installed, [str(w.message) for w in said], environ)
    return _found(cuda, build, installed)


def count_gpus() -> int:
    """GPUs that ranks of this process would find."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def nvidia_smi() -> list[dict[str, str]]:
    """A mapping for each GPU of the host; none where there is no such program or driver."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SMI_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(_QUERY, row, strict=True)) for row in rows if len(row) == len(_QUERY)]


def _none(
    build: str | None, installed: list[dict[str, str]], said: list[str], environ: Mapping[str, str]
) -> Check:
    facts: dict[str, Any] = {"count": 0, "installed": len(installed), "cuda": build}
    if not installed and not said:
        return Check("gpus", "none: ranks compute on the CPU, over gloo", facts=facts)
    driver = installed[0]["driver_version"] if installed else "unknown"
    facts["driver"] = driver
    found = f"torch sees none; nvidia-smi sees {len(installed)} (driver {driver})"
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if build is None:
        advice = (
            "this torch was built without CUDA: install the wheel for your driver's CUDA version"
        )
    elif visible is not None:
        advice = f"CUDA_VISIBLE_DEVICES is {visible!r}: unset it, unless ranks are to use the CPU"
    else:
        reason = said[0].splitlines()[0][:200] if said else "it gives no reason"
        advice = f"torch finds no GPU ({reason}): compare the driver with torch's CUDA {build}"
    return Check("gpus", found, [advice], facts=facts)


def _found(cuda: Any, build: str | None, installed: list[dict[str, str]]) -> Check:
    by_uuid = {row["uuid"].removeprefix("GPU-"): row for row in installed}
    devices, advice, failures = [], [], []
    for i in range(cuda.device_count()):
        facts = cuda.get_device_properties(i)
        row = by_uuid.get(str(getattr(facts, "uuid", "")).removeprefix("GPU-"), {})
        used = row.get("memory.used", "")
        devices.append(
            {
                "name": facts.name,
                "memory": facts.total_memory,
                "capability": f"{facts.major}.{facts.minor}",
                "used": int(used) * MIB if used.isdecimal() else None,
                "compute_mode": row.get("compute_mode"),
            }
        )
        if (devices[-1]["used"] or 0) > MUCH_USED * facts.total_memory:
            advice.append(
                f"{size(devices[-1]['used'])} of GPU {i} are in use by other programs: end them, or "
                "lower engine.gpu_memory_utilization"
            )
        if devices[-1]["compute_mode"] == "Prohibited":
            failures.append(f"GPU {i} is in compute mode Prohibited: nvidia-smi -i {i} -c DEFAULT")
    peers = _peers(cuda, len(devices))
    apart = [(i, j) for i, row in enumerate(peers) for j, there in enumerate(row) if not there]
    if apart:
        advice.append(
            f"GPU {apart[0][0]} cannot read the memory of GPU {apart[0][1]} ({len(apart)} pairs): NCCL "
            "goes through the host, and small sums are not done in one kernel"
        )
    if len({(d["name"], d["memory"]) for d in devices}) > 1:
        advice.append("the GPUs differ: the slowest and smallest decides for all ranks")
    driver = installed[0]["driver_version"] if installed else "unknown"
    nccl = _nccl(cuda)
    return Check(
        "gpus",
        f"{len(devices)} x {devices[0]['name']}, {size(devices[0]['memory'])}, driver {driver}, "
        f"CUDA {build}, NCCL {nccl}, {'no peer access' if apart else 'peer access'}"
        + (f"; the host has {len(installed)}" if len(installed) > len(devices) else ""),
        advice,
        failures,
        _details(devices, peers),
        {
            "count": len(devices),
            "installed": len(installed),
            "devices": devices,
            "driver": driver,
            "cuda": build,
            "nccl": nccl,
            "peers": peers,
        },
    )


def _peers(cuda: Any, count: int) -> list[list[bool]]:
    """Row i, column j: whether GPU i reads the memory of GPU j."""
    return [
        [i == j or bool(cuda.can_device_access_peer(i, j)) for j in range(count)]
        for i in range(count)
    ]


def _nccl(cuda: Any) -> str:
    try:
        return ".".join(map(str, cuda.nccl.version()))
    except (AttributeError, RuntimeError):  # a build without NCCL
        return "none"


def _details(devices: list[dict[str, Any]], peers: list[list[bool]]) -> list[str]:
    lines = []
    for i, device in enumerate(devices):
        used = "" if device["used"] is None else f", {size(device['used'])} in use"
        reads = "".join("x" if there else "." for there in peers[i])
        lines.append(
            f"GPU {i}: {device['name']}, {size(device['memory'])}{used}, capability "
            f"{device['capability']}, reads {reads}"
        )
    return lines
