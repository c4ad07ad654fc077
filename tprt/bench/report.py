"""What a measurement says, and how two programs are compared on a machine that others use too.

Knows no model and no engine.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import tprt

# Far past any cache of a CPU, so that reading it reads memory.
READ_BYTES = 512 * 2**20
PACKAGES = ("transformers", "triton")  # whose version is told where a measurement used them
# Names the commit where the code was copied without its repository.
COMMIT = "TPRT_COMMIT"


@dataclass
class Report:
    """One measurement; its JSON is the last line that ``tprt bench`` prints.

    Args:
        tokens_per_s: generated tokens per second, median of our runs; None where none are generated.
        ratio: per peer, the median over interleaved pairs of ours / theirs in tokens per second.
        share_of_bandwidth: bytes of weights per second over the read bandwidth of the same run.
        settings, details: what was run, and what else was seen.
    """

    bench: str
    model: str
    device: str
    dtype: str
    tp: int
    tokens_per_s: float | None = None
    ratio: dict[str, float] = field(default_factory=dict)
    share_of_bandwidth: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self, arguments: Sequence[str] = ()) -> str:
        """Args: of the command line that made it."""
        made_by = {
            "versions": versions(),
            "commit": commit(),
            "command": " ".join(["tprt", *arguments]),
        }
        return json.dumps({**asdict(self), **made_by})


Say = Callable[[str], None]
Run = Callable[[], float]  # seconds it took


def compare(runs: Mapping[str, Run], pairs: int, say: Say) -> dict[str, list[float]]:
    """Run everything ``pairs`` times in turn, in alternating order; the seconds each reported.

    Memory bandwidth and clock of a shared machine drift over minutes: only neighbours compare.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(pairs):
        for name in runs if i % 2 == 0 else reversed(list(runs)):
            seconds[name].append(runs[name]())
            say(f"  {i + 1}/{pairs} {name}: {seconds[name][-1]:.3f} s")
    return seconds


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times faster we are: the median over pairs of their seconds / ours."""
    return round(statistics.median(b / a for a, b in zip(ours, theirs, strict=True)), 3)


def ratio_interval(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """``median_ratio`` with what is known about it.

    Returns:
        "median", "min" and "max" of the pairs; "low" and "high", between which the true median lies with
        "confidence" by the sign test, so whatever the distribution: 95% or more, and less only where
        fewer than six pairs cannot give it.
    """
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    pairs = len(ratios)

    def confidence(cut: int) -> float:
        """That fewer than ``cut`` pairs do not all fall on one side of the median by chance."""
        return 1 - 2 * sum(math.comb(pairs, i) for i in range(cut)) / 2**pairs

    cut = max((c for c in range(1, pairs // 2 + 1) if confidence(c) >= 0.95), default=1)
    return {
        "median": round(statistics.median(ratios), 3),
        "min": round(ratios[0], 3),
        "max": round(ratios[-1], 3),
        "low": round(ratios[cut - 1], 3),
        "high": round(ratios[-cut], 3),
        "confidence": round(confidence(cut), 3),
        "pairs": pairs,
    }


def read_bandwidth(device: torch.device, repeats: int = 7) -> float:
    """Bytes per second that a sum over a large tensor reads; the median of some passes."""
    words = torch.ones(READ_BYTES // 8, dtype=torch.int64, device=device)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        words.sum().item()
        seconds.append(time.perf_counter() - began)
    return READ_BYTES / statistics.median(seconds)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    name = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    found = {
        "tprt": tprt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    found |= {name: metadata.version(name) for name in PACKAGES if name in sys.modules}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str | None:
    """The commit this code stands at, with "-dirty" when files differ; None where nobody knows."""
    if told := os.environ.get(COMMIT):
        return told
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
