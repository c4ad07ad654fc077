"""``tprt convert``: one checkpoint layout into another, tensors byte for byte."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tprt.errors import ConfigError

if TYPE_CHECKING:
    from tprt.config import ModelConfig
    from tprt.distributed.sharding import ShardSpec

FORMATS = ("megatron", "hf", "presharded")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="change the layout or the TP size on disk",
        description="Write a checkpoint in another layout. Tensors keep their bytes and dtype, the "
        "tokenizer is copied, and the rotary precision travels along.",
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint folder or hub id")
    parser.add_argument("target", metavar="DST", type=Path, help="a folder that is new or empty")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="rank files (default 1)")
    parser.add_argument("--verify", choices=("sizes", "full"), default="sizes")
    return parser


def run(args: argparse.Namespace) -> int:
    from tprt.checkpoint import (
        open_checkpoint,
        write_huggingface,
        write_megatron,
        write_presharded,
    )

    if args.format == "hf" and args.tp != 1:
        raise ConfigError(
            f"--tp {args.tp} with --format hf: that layout is not cut over ranks", hint="--tp 1"
        )
    with open_checkpoint(args.source, verify=args.verify) as reader:
        reader.config.validate_parallel(args.tp)
        if args.format == "megatron":
            write_megatron(reader, args.target, args.tp)
        elif args.format == "hf":
            write_huggingface(reader, args.target)
        else:
            write_presharded(reader, args.target, args.tp, _specs(reader.config))
        print(f"{args.target}: {len(reader.names())} tensors as {args.format}, TP={args.tp}")
    return 0


def _specs(config: "ModelConfig") -> Any:
    """(rank, size) -> the cut of each parameter, as the model itself makes it."""
    import torch

    from tprt.distributed.sharding import shard_spec
    from tprt.distributed.tp_group import TPGroup
    from tprt.models import get_model_class

    def specs(rank: int, size: int) -> "dict[str, ShardSpec]":
        tp = TPGroup(rank, size, torch.device("meta"))
        model = get_model_class(config.model_type)(config, tp, torch.bfloat16)
        return {name: shard_spec(p) for name, p in model.named_parameters()}

    return specs
