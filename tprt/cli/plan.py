"""``tprt plan``: what a model takes per rank, before anything is loaded. Needs no GPU."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tprt.cli.common import add_model_flags, add_settings_flags, llm_options, settings_from
from tprt.cli.settings import Settings
from tprt.errors import ConfigError, OutOfMemoryPlan

if TYPE_CHECKING:
    from tprt.config import ModelConfig
    from tprt.distributed.vocabulary import Vocabulary

GIB = 2**30


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
    result = make_plan(settings, read_config(settings), args.memory)
    print(json.dumps(result, indent=1) if args.json else _table(result))
    if result["fits_with"] is not None:
        first = result["per_rank"][0]
        raise OutOfMemoryPlan(
            f"{_size(first['weights'])} of weights per rank, what steps take and the KV cache do not "
            f"fit into {args.memory:g} GiB",
            hint=result["fits_with"],
        )
    return 0


def read_config(settings: Settings) -> "ModelConfig":
    """The config of the model as it would run, from a checkpoint folder or a bare ``config.json``."""
    from tprt.checkpoint import open_checkpoint
    from tprt.checkpoint.reader import build_config
    from tprt.checkpoint.safetensors_file import read_json
    from tprt.config import config_from_hf
    from tprt.llm import resolve_config, split_options

    path, options = settings.model.path, llm_options(settings.model)
    if not path.endswith(".json"):
        return resolve_config(open_checkpoint(path), options)
    config = build_config(config_from_hf, read_json(Path(path)), path)
    return config.with_overrides(split_options(options)[1])


def read_vocabulary(settings: Settings, config: "ModelConfig") -> "Vocabulary":
    """Which ids get rows. A bare ``config.json`` has no tokenizer, which ranges can do without."""
    from tprt.checkpoint import open_checkpoint
    from tprt.llm import resolve_vocabulary
    from tprt.tokenizer import Tokenizer

    model, tokenizer = settings.model, None
    if model.trim_vocab != "off":
        path: str | Path | None = model.tokenizer
        if path is None and not model.path.endswith(".json"):
            path = open_checkpoint(model.path).tokenizer_path
        tokenizer = Tokenizer(path) if path is not None else None
    return resolve_vocabulary(config.vocab_size, tokenizer, model.trim_vocab)


def make_plan(
    settings: Settings, config: "ModelConfig", memory_gib: float | None = None
) -> dict[str, Any]:
    """What ``--json`` prints. KV memory comes in whole blocks, as the engine allocates it."""
    import torch

    from tprt.engine.memory_plan import plan_ranks, whole_parameters
    from tprt.llm.memory import kv_blocks, largest_that_fits, plan_memory, snapshots_that_fit

    engine = settings.engine_config()
    tp_size = settings.parallel.tensor or 1
    kind = "cpu" if settings.model.device == "cpu" else "cuda"
    length = engine.resolve_max_model_len(config)
    vocabulary, dtype = read_vocabulary(settings, config), getattr(torch, engine.dtype)
    ranks = plan_ranks(config, tp_size, dtype, length, vocabulary)
    whole = plan_ranks(config, tp_size, dtype, length)[0]
    plan = plan_memory(config, engine, tp_size, kind, vocabulary)
    fit, memory, advice = None, engine.kv_cache_memory, None
    if memory_gib is not None:
        room = int(memory_gib * GIB * engine.gpu_memory_utilization) - plan.runtime.context
        left = max(0, room - plan.fixed)
        if plan.block:
            fit = max(0, left // plan.block - 1) * engine.block_size  # one block is for padding
        memory = memory or left + plan.slots
        if plan.needed(engine) > room:
            advice = largest_that_fits(config, engine, tp_size, kind, room, vocabulary)
    snapshots = snapshots_that_fit(plan, engine, kind, memory)
    cached = plan.slots + snapshots * plan.rank.state_per_slot or None
    if plan.block and memory:
        cached = kv_blocks([memory // plan.block], engine, length) * plan.block or None
    runtime = asdict(plan.runtime)
    return {
        "model": settings.model.path,
        "parameters": whole_parameters(config),
        "dtype": engine.dtype,
        "device": kind,
        "tp": tp_size,
        "tp_sizes": config.tp_sizes(),
        "vocabulary": {
            "ids": vocabulary.size,
            "removed": vocabulary.removed,
            "rows": vocabulary.num_kept,
            "rows_per_rank": vocabulary.part(tp_size),
            "saved_bytes_per_rank": whole.weights - ranks[0].weights,
        },
        "max_model_len": length,
        "block_size": engine.block_size,
        "per_rank": [asdict(rank) | runtime for rank in ranks],
        "kv_bytes_per_token": sum(rank.kv_per_token for rank in ranks),
        "kv_bytes_per_block_per_rank": plan.block,
        "kv_bytes_per_full_sequence_per_rank": -(-length // engine.block_size) * plan.block,
        "kv_cache_bytes_per_rank": cached,
        "state_bytes_per_sequence_per_rank": plan.rank.state_per_slot,
        "max_num_seqs": engine.max_num_seqs,
        "snapshots": snapshots,
        "tokens_that_fit": fit,
        "fits_with": advice,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
    }


def _table(result: dict[str, Any]) -> str:
    from tprt.distributed.vocabulary import show_ranges

    sizes = ", ".join(map(str, result["tp_sizes"]))
    sequence = f"KV per sequence of {result['max_model_len']}"
    if state := result["state_bytes_per_sequence_per_rank"]:
        sequence = "state per sequence"
    lines = [
        f"{result['model']}: {result['parameters']:,} parameters in {result['dtype']}, "
        f"TP={result['tp']} (works at {sizes})",
        f"{'rank':>4} {'weights':>12} {'tables':>12} {'read':>12} {'KV per token':>14} {sequence:>30}",
    ]
    full = _size(state or result["kv_bytes_per_full_sequence_per_rank"])
    for rank in result["per_rank"]:
        shown = [_size(rank[name]) for name in ("weights", "tables", "read", "kv_per_token")]
        lines.append("{:>4} {:>12} {:>12} {:>12} {:>14} {:>30}".format(rank["rank"], *shown, full))
    names = ("state", "workspace", "graphs", "libraries", "context", "copies")
    first = result["per_rank"][0]
    lines.append(
        f"beside these on each rank ({result['device']}): "
        + ", ".join(f"{name} {_size(first[name])}" for name in names if first[name])
    )
    ids = result["vocabulary"]
    if ids["removed"]:
        lines.append(
            f"{ids['rows']:,} of {ids['ids']:,} ids have rows ({show_ranges(ids['removed'])} are "
            f"trimmed away), {ids['rows_per_rank']:,} per rank, which saves "
            f"{_size(ids['saved_bytes_per_rank'])} of weights on each"
        )
    if result["tokens_that_fit"] is not None:
        share = result["gpu_memory_utilization"]
        lines.append(
            f"room for {result['tokens_that_fit']:,} tokens of KV cache per rank, in {share:.0%} of "
            "the memory (engine.gpu_memory_utilization)"
        )
    if state:
        lines.append(
            f"the state of {result['max_num_seqs']} sequences (engine.max_num_seqs), of padding and of "
            f"{result['snapshots']} snapshots takes {_size(result['kv_cache_bytes_per_rank'])} per "
            "rank, at any length"
        )
    elif result["kv_cache_bytes_per_rank"] is not None:
        lines.append(
            f"with these settings the KV cache takes {_size(result['kv_cache_bytes_per_rank'])} per "
            f"rank, in blocks of {result['block_size']} tokens"
        )
    return "\n".join(lines)


def _size(count: int) -> str:
    """Bytes in the largest unit that gives 1 or more."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{count} B" if units[0] == "B" else f"{value:.2f} {units[0]}"
