"""``tprt bench bytes``: what a GPU reads from DRAM for one token, beside what it has to read.

Nsight Compute counts it, kernel by kernel, around a process that runs one step (``one_token``). Where
ncu is missing or may not read the counters, the closed form is told, and that it stands alone. Knows
processes and text; no engine.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tprt.bench.named_models import require_persimmon
from tprt.bench.report import Report, Say, device_name
from tprt.config import EngineConfig, ModelConfig
from tprt.errors import TprtError

CONTEXT = 512
METRIC = "dram__bytes_read.sum"
MOST_OFF = 0.05  # of the closed form
# Of machines where nothing can be counted: without the right to, or without the driver's part of it.
NO_COUNTERS = "ERR_NVGPUCTRPERM", "Failed to initialize the profiler"
PLACES = "/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu"
# Caches and clocks as a step finds them; kernels of the range between start and stop alone.
FLAGS = (
    "--profile-from-start", "off", "--cache-control", "none", "--clock-control", "none",
    "--metrics", METRIC, "--csv", "--page", "raw", "--print-units", "base",
)  # fmt: skip


def dram_bytes(
    config: ModelConfig,
    name: str,
    engine: EngineConfig,
    device: str,
    *,
    zeros: float | None,
    trim: bool,
    context: int,
    say: Say,
) -> Report:
    """The bytes of one eager step of one sequence.

    Raises:
        ConfigError: the model is not a Persimmon.
        TprtError: the process that runs it failed, or ncu saw nothing.
    """
    require_persimmon(config, "bytes")
    step = {
        "config": asdict(config), "engine": asdict(engine), "device": device,
        "zeros": zeros, "trim": trim, "context": context,
    }  # fmt: skip
    on_gpu = torch.device(device).type == "cuda"
    ncu = find_ncu() if on_gpu else None
    command = [sys.executable, "-m", "tprt.bench.one_token", json.dumps(step)]
    missing = None
    if ncu is None:
        missing = "Nsight Compute (ncu) is not there" if on_gpu else "a CPU does not count them"
    ended = _run([ncu, *FLAGS, *command] if ncu else command)
    said = ended.stdout + ended.stderr
    if ncu and (why := next((text for text in NO_COUNTERS if text in said), None)):
        missing = f"ncu cannot read the GPU's counters here ({why})"
        ended = _run(command)
    lines = [line for line in ended.stdout.splitlines() if line.startswith('{"bytes"')]
    if ended.returncode != 0 or not lines:
        raise TprtError(f"the step could not be run:\n{_last_words(ended)}")
    details: dict[str, Any] = {"closed_form": json.loads(lines[-1])}
    say(f"closed form: {_gb(details['closed_form']['bytes'])} for one token")
    if missing is not None:
        details["skipped"] = f"bytes from DRAM: {missing}"
        say(f"skipped: {details['skipped']}")
    else:
        if not (kernels := parse_ncu(ended.stdout)):
            raise TprtError(f"ncu saw no kernel of the step:\n{_last_words(ended)}")
        details |= compare_bytes(details["closed_form"]["bytes"], kernels)
        say(f"{METRIC}: {_gb(details['bytes'])}, {details['ratio']:.3f} times the closed form")
    return Report(
        bench="bytes",
        model=name,
        device=device_name(torch.device(device)),
        dtype=engine.dtype,
        tp=1,
        settings={"zeros": zeros, "trim": trim, "context": context},
        details=details,
    )


def find_ncu() -> str | None:
    """The program's path: the first of PATH and of the places where CUDA puts it."""
    if found := shutil.which("ncu"):
        return found
    places = (sorted(Path("/").glob(pattern[1:])) for pattern in PLACES)
    return next((str(path) for paths in places for path in reversed(paths)), None)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # Numbers come with the language's separators.
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def _last_words(ended: subprocess.CompletedProcess[str]) -> str:
    return "\n".join((ended.stdout + ended.stderr).strip().splitlines()[-8:])


def parse_ncu(text: str) -> list[tuple[str, float]]:
    """Kernels and bytes of ``ncu --csv --page raw``: a header, a line of units, a line per kernel.

    What the program itself and ncu's progress print around it is left aside.

    Raises:
        TprtError: kernels without this metric, or in a unit other than bytes.
    """
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    rows = list(csv.DictReader(line for line in lines[first:] if line.startswith('"')))
    if not rows:
        return []
    if METRIC not in rows[0] or rows[0][METRIC] != "byte":
        raise TprtError(f"ncu gave no {METRIC} in bytes", hint="--page raw --print-units base")
    try:
        return [(row["Kernel Name"], float(row[METRIC].replace(",", ""))) for row in rows[1:]]
    except ValueError as error:
        raise TprtError(f"ncu: {error}", hint="a metric it could not count on this GPU") from None


def compare_bytes(expected: float, kernels: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """The sum over kernels and the largest of them; "failed" where it is off by more than 5%."""
    total = sum(count for _, count in kernels)
    by_name: dict[str, float] = {}
    for name, count in kernels:
        by_name[name] = by_name.get(name, 0.0) + count
    largest = sorted(by_name.items(), key=lambda item: -item[1])[:8]
    found: dict[str, Any] = {
        "bytes": round(total),
        "ratio": round(total / expected, 4),
        "num_kernels": len(kernels),
        "largest": [{"name": name[:80], "bytes": round(count)} for name, count in largest],
    }
    if abs(total / expected - 1) > MOST_OFF:
        off = f"{_gb(total)} read, {_gb(expected)} by the closed form, over {MOST_OFF:.0%} apart"
        found["failed"] = [{"group": "bytes", "body": METRIC, "error": off}]
    return found


def _gb(count: float) -> str:
    return f"{count / 1e9:.4f} GB"
