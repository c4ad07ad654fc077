"""``python -m tprt.bench``: as ``tprt bench``, without settings files, so that torch alone is needed.

python -m tprt.bench decode --set block_size=32 --set kernels=reference
torchrun --nproc-per-node 4 -m tprt.bench decode
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tprt.bench.command import add_flags, check_flags, named_config, run_bench
from tprt.config import EngineConfig, ModelConfig, config_from_hf
from tprt.errors import EXIT_OK, ConfigError, TprtError
from tprt.log import setup_cli_logging


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tprt.bench", description=(__doc__ or "").split("\n")[0]
    )
    add_flags(parser)
    parser.add_argument(
        "--model", metavar="NAME", help="persimmon-8b, -400m, -100m, toy, a JSON or a checkpoint"
    )
    parser.add_argument("--dtype", default="bfloat16", metavar="DTYPE")
    parser.add_argument("--device", metavar="DEVICE", help="cuda or cpu")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of the engine"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    args = make_parser().parse_args(arguments)
    setup_cli_logging("info")

    def say(text: str) -> None:
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    try:
        check_flags(args, int(os.environ.get("WORLD_SIZE", "1")))
        engine = EngineConfig(dtype=args.dtype, **dict(map(_setting, args.set)))
        model = (_config(args.model), args.model) if args.model else None
        report = run_bench(args, engine, model, args.device, say)
    except TprtError as error:
        print(f"tprt.bench: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if report is not None:
        print(report.to_json(["bench", *arguments]), flush=True)
    return EXIT_OK


def _setting(text: str) -> tuple[str, Any]:
    """A field of ``EngineConfig`` and its value, JSON or plain text."""
    name, equals, value = text.partition("=")
    if not equals or name not in EngineConfig.__dataclass_fields__:
        known = ", ".join(EngineConfig.__dataclass_fields__)
        raise ConfigError(f"--set {text}", hint=f"KEY=VALUE with one of {known}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _config(name: str) -> ModelConfig:
    if (known := named_config(name)) is not None:
        return known
    if name.endswith(".json"):
        return config_from_hf(json.loads(Path(name).read_text("utf-8")))
    from tprt.checkpoint import open_checkpoint

    return open_checkpoint(name).config


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
