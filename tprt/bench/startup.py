"""From the start of a process to its first token, on a synthetic checkpoint, cold and warm.

Each start is a fresh process. "first ever" has neither the files in the page cache nor any compiled
kernel; "cold" has the kernels; "warm" has both. Knows processes and files.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tprt.bench.report import Report, Say, device_name
from tprt.bench.synthetic_checkpoint import write_checkpoint
from tprt.config import EngineConfig, ModelConfig
from tprt.errors import ConfigError, TprtError

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
KERNEL_CACHE = "TRITON_CACHE_DIR"
WARM_RUNS = 3


def startup(
    config: ModelConfig,
    name: str,
    engine_config: EngineConfig,
    device: torch.device,
    *,
    folder: Path | None,
    keep: bool,
    toy: bool,
    say: Say,
) -> Report:
    """Args:
    folder: where the checkpoint is made, or was made before; None takes a temporary one.
    keep: leave the checkpoint there.
    """
    dtype: torch.dtype = getattr(torch, engine_config.dtype)
    with tempfile.TemporaryDirectory(prefix="tprt-startup-") as scratch:
        place = Path(scratch if folder is None else folder)
        checkpoint = place / name.replace("/", "_")
        made = _checkpoint(checkpoint, config, dtype, device, engine_config.seed, say)
        filesystem = filesystem_of(checkpoint)
        try:
            whole_cache = not toy and os.geteuid() == 0
            kernels = Path(scratch) / "kernels"
            runs = _Runs(checkpoint, engine_config, device, kernels, whole_cache, say)
            starts = [runs.start("first ever", cold=True), runs.start("cold", cold=True)]
            starts += [runs.start("warm", cold=False) for _ in range(1 if toy else WARM_RUNS)]
        finally:
            if not keep:
                shutil.rmtree(checkpoint, ignore_errors=True)
                _stamp(checkpoint).unlink(missing_ok=True)
    warm = statistics.median(s["seconds"] for s in starts if s["kind"] == "warm")
    say(f"process start to first token, warm: {warm:.2f} s")
    return Report(
        bench="startup",
        model=name,
        device=device_name(device),
        dtype=engine_config.dtype,
        tp=1,
        settings={
            "cold_by": "all page caches dropped"
            if whole_cache
            else "the checkpoint's pages dropped",
            "filesystem": filesystem,
            "kernels": engine_config.kernels,
        },
        details={"checkpoint": made, "starts": starts, "warm_seconds": round(warm, 3)},
    )


def _checkpoint(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    say: Say,
) -> dict[str, Any]:
    """Make the checkpoint, unless the same one is there already."""
    identity = {"config": repr(config), "dtype": str(dtype), "seed": seed}
    stamp = _stamp(path)
    if path.exists():
        known = json.loads(stamp.read_text()) if stamp.exists() else {}
        if known.get("identity") != identity:
            raise ConfigError(
                "the folder holds something else than this model",
                where=str(path),
                hint="another --folder",
            )
        return {**known["made"], "reused": True}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbytes, seconds = write_checkpoint(path, config, dtype, device, seed)
    made = {"bytes": nbytes, "seconds": round(seconds, 2)}
    stamp.write_text(json.dumps({"identity": identity, "made": made}))
    say(f"a checkpoint of {nbytes / 1e9:.2f} GB written in {seconds:.1f} s")
    return {**made, "reused": False}


def _stamp(checkpoint: Path) -> Path:
    """Beside a checkpoint: of which model it is."""
    return checkpoint.with_name(f"{checkpoint.name}.json")


class _Runs:
    """Starts of one checkpoint. ``whole_cache``: may drop every page that the system has cached."""

    def __init__(
        self,
        checkpoint: Path,
        engine: EngineConfig,
        device: torch.device,
        kernels: Path,
        whole_cache: bool,
        say: Say,
    ) -> None:
        self.checkpoint, self.whole_cache, self.say = checkpoint, whole_cache, say
        self.arguments = {"model": str(checkpoint), "device": str(device), **vars(engine)}
        self.environment = {**os.environ, KERNEL_CACHE: str(kernels)}

    def start(self, kind: str, cold: bool) -> dict[str, Any]:
        if cold:
            self._forget_pages()
        command = [sys.executable, "-m", "tprt.bench.startup_child", json.dumps(self.arguments)]
        began = time.monotonic()
        ended = subprocess.run(
            command, check=False, capture_output=True, text=True, env=self.environment
        )
        whole = time.monotonic() - began
        if ended.returncode != 0:
            last = ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
            raise TprtError(f"a start failed: {last[0][:300]}", hint=" ".join(command)[:500])
        told = json.loads(ended.stdout.splitlines()[-1])
        found = {
            "kind": kind,
            "seconds": round(told["first_token"] - began, 3),
            "to_python_s": round(told["entered"] - began, 3),
            "to_ready_s": round(told["ready"] - began, 3),
            "first_token_s": round(told["first_token"] - told["ready"], 3),
            "process_s": round(whole, 3),
            "phases": told["phases"],
        }
        shown = ", ".join(f"{key} {value}" for key, value in found["phases"].items())
        self.say(f"{kind:10} {found['seconds']:7.2f} s to the first token; {shown}")
        return found

    def _forget_pages(self) -> None:
        for path in self.checkpoint.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # pages that are not on disk yet stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        if self.whole_cache:
            with suppress(OSError):
                DROP_CACHES.write_text("3\n")


def filesystem_of(path: Path) -> str | None:
    """Its type as the system names it: what is in a tmpfs is never cold. None where nobody says."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return None
    under = [(place, kind) for place, kind in mounts if path.resolve().is_relative_to(place)]
    return max(under, key=lambda mount: len(mount[0]))[1] if under else None
