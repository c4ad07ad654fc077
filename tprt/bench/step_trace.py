"""What happens in a decode step: a chrome trace, and what is counted in it.

A step that is to be free of the host shows no call that waits for the device, and kernels with next
to no time between them. Knows profiles and files; no engine.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

STEPS_RANGE = "tprt decode steps"
# Calls of the runtime and the driver in which the host waits for the device.
WAITS = frozenset({
    "cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy",
    "cudaMemcpy2D", "cudaMemset", "cuCtxSynchronize", "cuStreamSynchronize", "cuEventSynchronize",
    "cuMemcpyDtoH_v2", "cuMemcpyHtoD_v2",
})  # fmt: skip
# Calls that may wait for the device, and that a step in a graph has no use for.
ALLOCATIONS = frozenset(
    {"cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost", "cuMemAlloc_v2"}
)
ON_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
TOP_KERNELS = 12


@contextmanager
def traced(device: torch.device, path: Path) -> Iterator[None]:
    """Profile what runs inside, host and device, into a chrome trace at ``path``."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    found.export_chrome_trace(str(path))


def steps_range() -> record_function:
    """Marks the steps that ``count_steps`` looks at."""
    return record_function(STEPS_RANGE)


def trace_path(path: Path, rank: int, size: int) -> Path:
    """FILE.json of one rank, FILE.rank3.json of one of several."""
    return path if size == 1 else path.with_suffix(f".rank{rank}{path.suffix}")


def count_steps(path: Path, steps: int) -> dict[str, Any]:
    """What ``traced`` saw between the beginning and the end of ``steps_range``, per step.

    Returns:
        Waits and allocations by name, kernels, milliseconds of the device's span, the share of it in
        which nothing ran on the device, and the kernels that took longest. Times are those under the
        profiler.
    """
    events = json.loads(path.read_text())["traceEvents"]
    complete = [event for event in events if event.get("ph") == "X"]
    marks = [e for e in complete if e["name"] == STEPS_RANGE and "gpu" not in str(e.get("cat"))]
    assert marks, f"no range {STEPS_RANGE!r} in the trace"
    began = min(float(e["ts"]) for e in marks)
    ended = max(float(e["ts"]) + float(e["dur"]) for e in marks)
    inside = [e for e in complete if began <= float(e["ts"]) <= ended]
    on_device = [e for e in inside if e.get("cat") in ON_DEVICE]
    span, busy = _span_and_busy(
        (float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in on_device
    )
    return {
        "steps": steps,
        "waits_per_step": _per_step(inside, WAITS, steps),
        "allocations_per_step": _per_step(inside, ALLOCATIONS, steps),
        "kernels_per_step": round(sum(e["cat"] == "kernel" for e in on_device) / steps, 2),
        "device_ms_per_step": round(span / steps / 1e3, 4),
        "idle_share": round(1 - busy / span, 4) if span else None,
        "top_kernels": _top(on_device, steps),
    }


def _per_step(
    events: Iterable[dict[str, Any]], names: frozenset[str], steps: int
) -> dict[str, float]:
    counts: dict[str, int] = defaultdict(int)
    for event in events:
        if event["name"] in names:
            counts[event["name"]] += 1
    return {name: round(count / steps, 3) for name, count in sorted(counts.items())}


def _span_and_busy(intervals: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """From the first beginning to the last end, and how much of that any interval covers."""
    ordered = sorted(intervals)
    if not ordered:
        return 0.0, 0.0
    busy, first, reached = 0.0, ordered[0][0], ordered[0][0]
    for start, end in ordered:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return reached - first, busy


def _top(events: Iterable[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        found[event["name"]].append(float(event["dur"]))
    longest = sorted(found.items(), key=lambda item: -sum(item[1]))[:TOP_KERNELS]
    return [
        {
            "name": name[:80],
            "us_per_step": round(sum(times) / steps, 2),
            "calls_per_step": round(len(times) / steps, 2),
        }
        for name, times in longest
    ]
