"""Single operations at a model's sizes: time, rate, and share of what this device can do at all."""

import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tprt.bench.costs import matrix_shapes
from tprt.bench.device_timing import Call, Ceilings, measure_ceilings, time_calls, triton_interprets
from tprt.bench.kernel_cases import FULL, TOY, Case, CaseMaker, Cases, Shapes
from tprt.bench.named_models import require_persimmon
from tprt.bench.recurrent_cases import RecurrentCases
from tprt.bench.report import Report, Say, device_name
from tprt.config import EngineConfig, ModelConfig, RecurrentGemmaConfig
from tprt.errors import ConfigError
from tprt.kernels import Kernels, kernels_for, use_kernels

BUDGET, TOY_BUDGET = 0.15, 0.0  # seconds of repeats per line


def bodies_on(device: torch.device) -> tuple[str, ...]:
    """What ``use_kernels`` can choose here."""
    if device.type == "cuda":
        return "triton", "reference"
    return ("auto", "reference", "triton") if triton_interprets() else ("auto", "reference")


def kernels(
    config: ModelConfig,
    name: str,
    engine_config: EngineConfig,
    device: torch.device,
    *,
    shard: int,
    toy: bool,
    only: str | None,
    tune: Path | None,
    say: Say,
) -> Report:
    """A line for each operation, shape and body.

    Args:
        shard: sizes are those of rank 0 of so many.
        only: operations whose name contains this.
        tune: where tile sizes found for this device are written, beside those of other shapes that
            are there and were found with the same software; None tunes nothing.

    Raises:
        ConfigError: no operation is called ``only``; or what lies at ``tune`` is no table.
    """
    config.validate_parallel(shard)
    dtype: torch.dtype = getattr(torch, engine_config.dtype)
    ceilings = measure_ceilings(device, toy)
    shown = ", ".join(f"{key} {value}" for key, value in ceilings.to_json().items())
    say(f"ceilings of this run: {shown}")
    details: dict[str, Any] = {"ceilings": ceilings.to_json()}
    if tune is not None:
        details["tuned"] = tune_tiles(config, shard, dtype, device, tune, toy, say)
    say(f"{'operation':21} {'shape':24} {'body':10} {'us':>10} {'rate':>14} {'of floor':>9}")
    lines = []
    with torch.inference_mode():
        everything = []
        for body in bodies_on(device):
            with use_kernels(body):
                chosen = kernels_for(device)
            shapes = TOY if toy else FULL
            everything.append(_cases(chosen, config, shard, dtype, device, shapes))
        failed: list[dict[str, str]] = []
        for group, cases in product(everything[0].groups, everything):
            try:
                for case in getattr(cases, group)():
                    if only is None or only in case.operation:
                        lines.append(measure(case, device, ceilings, TOY_BUDGET if toy else BUDGET))
                        say(shown_line(lines[-1]))
            except (
                Exception
            ) as error:  # one kernel that fails must not cost the table of the others
                text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                failed.append({"group": group, "body": cases.body, "error": text})
                say(f"FAILED {group} of {cases.body}, the rest of it left out: {text}")
    if not lines and not failed:
        raise ConfigError(f"no operation is called {only!r}", hint="leave --only out to see all")
    return Report(
        bench="kernels",
        model=name,
        device=device_name(device),
        dtype=engine_config.dtype,
        tp=1,
        settings={"shard": shard, "toy": toy, "only": only},
        details={**details, "lines": lines, "failed": failed},
    )


def _cases(
    kernels: Kernels,
    config: ModelConfig,
    shard: int,
    dtype: torch.dtype,
    device: torch.device,
    shapes: Shapes,
) -> CaseMaker:
    if isinstance(config, RecurrentGemmaConfig):
        return RecurrentCases(kernels, kernels.name, config, shard, dtype, device, shapes)
    config = require_persimmon(config, "kernels")
    return Cases(kernels, kernels.name, config, shard, dtype, device, shapes)


def measure(case: Case, device: torch.device, ceilings: Ceilings, budget: float) -> dict[str, Any]:
    """One line of the table; its share is the floor of ``Ceilings.floor`` over the time it took."""
    timing = time_calls(case.calls, device, budget)
    floor, bound = ceilings.floor(case.read, case.written, case.operations)
    return {
        "operation": case.operation,
        "shape": case.shape,
        "body": case.body,
        "us": round(timing.seconds * 1e6, 2),
        "spread": round(timing.spread, 3),
        "GB_per_s": round((case.read + case.written) / timing.seconds / 1e9, 1),
        "TFLOP_per_s": round(case.operations / timing.seconds / 1e12, 3),
        "floor_us": round(floor * 1e6, 2),
        "share": round(floor / timing.seconds, 3),
        "bound": bound,
    }


def shown_line(line: dict[str, Any]) -> str:
    unit = "TFLOP_per_s" if line["bound"] == "compute" else "GB_per_s"
    rate = f"{line[unit]:.1f} {unit.replace('_per_', '/')}"
    return (
        f"{line['operation']:21} {line['shape']:24} {line['body']:10} {line['us']:10.2f} "
        f"{rate:>14} {line['share']:9.1%} {line['bound']}"
    )


def tune_tiles(
    config: ModelConfig,
    shard: int,
    dtype: torch.dtype,
    device: torch.device,
    path: Path,
    toy: bool,
    say: Say,
) -> dict[str, Any]:
    """Measure tiles of a layer's matrices and of the head; their table, also written to ``path``."""
    from tprt.kernels.triton_ops import TritonKernels, linear, tiles

    TritonKernels(device)  # says so where Triton does not run
    before = path.read_text("utf-8") if path.exists() else None
    if before is not None:
        tiles.parse(before, str(path))
    shapes = matrix_shapes(config, dtype, shard)
    if toy:
        shapes = shapes[1:2]

    def timer(launches: Sequence[Call]) -> float:
        if not toy:
            return time_calls(launches, device).seconds * 1e6
        began = time.perf_counter()  # of toys there are thousands, and their times say nothing
        launches[0]()
        return (time.perf_counter() - began) * 1e6

    say(f"tuning {len(shapes)} shapes ...")
    sizes = [(n, k, dtype) for n, k in shapes]
    table: dict[str, Any] = tiles.tune(sizes, device, linear.product, timer)
    if before is not None:
        merged = tiles.merge(json.loads(before), table)
        if merged == table:
            say(
                "nothing of the table that was there is kept: other software, or these shapes alone"
            )
        table = merged
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    say(f"tiles written to {path}")
    return table


def tiles_path(device: torch.device) -> Path:
    """Where the table of ``device`` is looked for."""
    from tprt.kernels.triton_ops import tiles

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return tiles.FOLDER / f"{name.replace(' ', '_')}.json"
