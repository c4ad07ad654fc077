"""``tprt plan``: what a model takes per rank, before anything is loaded. Needs no GPU."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tprt.cli.common import add_model_flags, add_settings_flags, settings_from
from tprt.cli.settings import Settings
from tprt.errors import ConfigError, OutOfMemoryPlan

if TYPE_CHECKING:
    from tprt.config import PersimmonConfig

GIB, KIB = 2**30, 2**10


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="memory per rank, without loading anything",
        description="Show what weights and KV cache take on each rank. --model may also name a "
        "config.json in Hugging Face's spelling, so no weights are needed.",
    )
    add_model_flags(parser, "model", "dtype")
    parser.add_argument("--tp", type=int, metavar="N", help="ranks to cut the model over")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="memory of one device, to see what fits"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_settings_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    settings = settings_from(args)
    if not settings.model.path:
        raise ConfigError("--model missing", hint="give the flag, or model.path in --config")
    if args.memory is not None and not 0 < args.memory < 2**20:
        raise ConfigError(
            f"--memory is {args.memory:g} GiB, allowed are above 0 to {2**20}", hint="--memory 80"
        )
    result = make_plan(settings, read_config(settings.model.path), args.memory)
    print(json.dumps(result, indent=1) if args.json else _table(result))
    if result["tokens_that_fit"] is not None and result["tokens_that_fit"] < 1:
        raise OutOfMemoryPlan(
            f"{result['per_rank'][0]['weights'] / GIB:.2f} GiB of weights per rank leave no room "
            f"in {args.memory:g} GiB",
            hint="more ranks (--tp)",
        )
    return 0


def read_config(path: str) -> "PersimmonConfig":
    """The model's config from a checkpoint folder or a bare ``config.json``."""
    from tprt.checkpoint import open_checkpoint
    from tprt.checkpoint.reader import build_config
    from tprt.checkpoint.safetensors_file import read_json
    from tprt.config import PersimmonConfig

    if not path.endswith(".json"):
        return open_checkpoint(path).config
    return build_config(PersimmonConfig.from_hf, read_json(Path(path)), path)


def make_plan(
    settings: Settings, config: "PersimmonConfig", memory_gib: float | None
) -> dict[str, Any]:
    import torch

    from tprt.engine.memory_plan import plan_ranks, whole_parameters

    engine = settings.engine_config()
    tp_size = settings.parallel.tensor or 1
    length = engine.resolve_max_model_len(config.max_position_embeddings)
    ranks = plan_ranks(config, tp_size, getattr(torch, engine.dtype), length)
    most = max(ranks, key=lambda r: r.weights)
    fit = None
    if memory_gib is not None:
        room = memory_gib * GIB * engine.gpu_memory_utilization - most.weights - most.tables
        fit = max(0, int(room // most.kv_per_token))
    return {
        "model": settings.model.path,
        "parameters": whole_parameters(config),
        "dtype": engine.dtype,
        "tp": tp_size,
        "tp_sizes": config.tp_sizes(),
        "max_model_len": length,
        "per_rank": [asdict(rank) for rank in ranks],
        "kv_bytes_per_token": sum(rank.kv_per_token for rank in ranks),
        "kv_bytes_per_full_sequence_per_rank": most.kv_per_token * length,
        "tokens_that_fit": fit,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
    }


def _table(result: dict[str, Any]) -> str:
    sizes = ", ".join(map(str, result["tp_sizes"]))
    lines = [
        f"{result['model']}: {result['parameters']:,} parameters in {result['dtype']}, "
        f"TP={result['tp']} (works at {sizes})",
        f"{'rank':>4} {'weights':>12} {'tables':>12} {'read':>12} {'KV per token':>14} "
        f"{'KV per sequence of ' + str(result['max_model_len']):>30}",
    ]
    for rank in result["per_rank"]:
        sequence = rank["kv_per_token"] * result["max_model_len"]
        lines.append(
            f"{rank['rank']:>4} {rank['weights'] / GIB:>8.3f} GiB {rank['tables'] / GIB:>8.3f} GiB "
            f"{rank['read'] / GIB:>8.3f} GiB {rank['kv_per_token'] / KIB:>10.1f} KiB "
            f"{sequence / GIB:>26.3f} GiB"
        )
    if result["tokens_that_fit"] is not None:
        share = result["gpu_memory_utilization"]
        lines.append(
            f"room for {result['tokens_that_fit']:,} tokens of KV cache per rank, in {share:.0%} of "
            "the memory (engine.gpu_memory_utilization)"
        )
    return "\n".join(lines)
