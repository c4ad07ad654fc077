"""``tprt inspect``: what a checkpoint is, read from names and headers only."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from tprt.cli.common import add_model_flags, add_settings_flags, settings_from
from tprt.cli.settings import Settings
from tprt.errors import ConfigError, TokenizerError

SHOWN_SIZES = (1, 2, 4, 8)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="what a checkpoint holds",
        description="Show layout, config, tokenizer, tensors, the bytes each rank would read, and "
        "what looks wrong. Reads names, headers and the small tensors repeated in each rank file; "
        "all of it with --verify full.",
    )
    parser.add_argument("path", nargs="?", metavar="PATH", help="checkpoint folder or hub id")
    add_model_flags(parser, "model", "tokenizer", "rotary-precision", "verify")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_settings_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    args.model = args.path or args.model
    settings = settings_from(args)
    if not settings.model.path:
        raise ConfigError("no checkpoint named", hint="tprt inspect PATH")
    result = describe(settings)
    print(json.dumps(result, indent=1) if args.json else _text(result))
    return 0


def describe(settings: Settings) -> dict[str, Any]:
    """Everything ``inspect`` shows, as one JSON-able mapping."""
    from tprt.checkpoint import open_checkpoint
    from tprt.engine.memory_plan import plan_ranks, whole_parameters
    from tprt.llm import open_tokenizer, resolve_config
    from tprt.tokenizer import check_vocab, eos_warnings

    model = settings.model
    with open_checkpoint(model.path, verify=model.verify) as reader:
        config, warnings = resolve_config(reader, vars(model)), list(reader.warnings)
        tokenizer: dict[str, Any] | None = None
        try:
            found = open_tokenizer(reader, model.tokenizer, model.bos_policy)
            multiple = config.vocab_padding_multiple
            valid = check_vocab(found, config.vocab_size, multiple, str(reader.path))
            warnings += eos_warnings(found, config.eos_token_id)
            tokenizer = {
                "path": str(found.path),
                "pieces": found.vocab_size,
                "eod_id": found.eod_id,
                "special_ids": sorted(found.special_ids),
                "unused_ids": len(found.unused_ids),
                "valid_ids": valid,
            }
        except TokenizerError as error:
            warnings.append(error.one_line)
        sizes = [size for size in SHOWN_SIZES if size in config.tp_sizes()]
        return {
            "path": str(reader.path),
            "layout": reader.layout,
            "tp_on_disk": reader.disk_tp,
            "dtype": str(reader.dtype).removeprefix("torch."),
            "parameters": whole_parameters(config),
            "in_words": config.in_words,
            "config": {"model_type": config.model_type} | asdict(config),
            "tokenizer": tokenizer,
            "tp_sizes": config.tp_sizes(),
            "bytes_per_rank": {
                size: [rank.read for rank in plan_ranks(config, size, reader.dtype)]
                for size in sizes
            },
            "tensors": [asdict(tensor) for tensor in reader.describe()],
            "bytes_read": reader.bytes_read,
            "warnings": warnings,
        }


def _text(result: dict[str, Any]) -> str:
    config = result["config"]
    lines = [
        f"{result['path']}: {result['layout']}, TP={result['tp_on_disk']} on disk, "
        f"{result['parameters']:,} parameters in {result['dtype']}",
        f"  {config['model_type']}: {config['num_hidden_layers']} layers, hidden "
        f"{config['hidden_size']}, {config['num_attention_heads']} heads of "
        f"{config['head_dim']}, MLP {config['intermediate_size']}, vocabulary "
        f"{config['vocab_size']}, {config['max_position_embeddings']} positions",
        f"  rotary: theta {config['rope_theta']:g}, {config['partial_rotary_factor']:g} of a head, "
        f"{result['in_words']}",
    ]
    tokenizer = result["tokenizer"]
    if tokenizer:
        lines.append(
            f"  tokenizer: {tokenizer['pieces']} pieces, end of text {tokenizer['eod_id']}, "
            f"{tokenizer['unused_ids']} unused ids ({tokenizer['path']})"
        )
    lines.append(f"  tensor-parallel sizes that work: {', '.join(map(str, result['tp_sizes']))}")
    for size, ranks in result["bytes_per_rank"].items():
        lines.append(f"  TP={size}: a rank reads at most {max(ranks):,} bytes")
    lines.append(f"  {'tensor':<52} {'shape':<16} {'dtype':<9} cut on disk")
    for tensor in result["tensors"]:
        where = f"dim {tensor['cut_dim']} over" if tensor["cut_dim"] is not None else "whole in"
        lines.append(
            f"  {tensor['name']:<52} {list(tensor['shape'])!s:<16} {tensor['dtype']:<9} "
            f"{where} {tensor['files']} file(s)"
        )
    return "\n".join(lines + [f"  warning: {warning}" for warning in result["warnings"]])
