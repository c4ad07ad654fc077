"""How much of its host this process may use: by affinity and by cgroup, as in a container."""

import math
import os
from pathlib import Path
from typing import Any

UNLIMITED = 2**60  # cgroups of version 1 write a number near 2**63


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may keep busy: by its affinity and its cgroup's quota."""
    quota = cgroup_limits(root)["cpus"]
    allowed = len(os.sched_getaffinity(0))
    return min(allowed, max(1, math.ceil(quota))) if quota else allowed


def cgroup_limits(root: Path = Path("/")) -> dict[str, Any]:
    """``memory`` and ``memory_used`` in bytes, ``cpus``, ``pids``; None where there is no limit.

    The tightest along the path of this process' cgroup counts. Both versions of cgroups are read.
    """
    found: dict[str, Any] = dict.fromkeys(("memory", "memory_used", "cpus", "pids"))
    mount = root / "sys/fs/cgroup"
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        for name in controllers.split(",") if controllers else [""]:
            base = mount / name if name else mount
            for folder in _upwards(base, path):
                _tighten(found, folder)
    return found


def _upwards(base: Path, path: str) -> list[Path]:
    """``base / path`` and the folders above it, down to ``base``, as far as they are there."""
    here = base / path.strip("/")
    chain = [here, *here.parents]
    return [folder for folder in chain if folder == base or base in folder.parents]


def _tighten(found: dict[str, Any], folder: Path) -> None:
    def number(name: str) -> int | None:
        text = (read_text(folder / name) or "").split()
        value = int(text[0]) if text and text[0].lstrip("-").isdecimal() else None
        return value if value is not None and 0 <= value < UNLIMITED else None

    def least(key: str, value: float | None) -> bool:
        tighter = value is not None and (found[key] is None or value < found[key])
        if tighter:
            found[key] = value
        return tighter

    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        if least("memory", number(limit)):
            found["memory_used"] = number(used)
    least("pids", number("pids.max"))
    quota = (read_text(folder / "cpu.max") or "").split()  # "200000 100000" or "max 100000"
    if len(quota) == 2 and quota[0].isdecimal() and quota[1].isdecimal():
        least("cpus", int(quota[0]) / int(quota[1]))
    old, period = number("cpu.cfs_quota_us"), number("cpu.cfs_period_us")
    if old and period:
        least("cpus", old / period)


def read_text(path: Path) -> str | None:
    """Of a file of the kernel; None where it is not there."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return None
