"""Flags that several subcommands share, and how they meet the YAML settings."""

import argparse
from typing import Any

from tprt.cli.settings import Settings, load_settings

# Flag -> the setting it overrides. Values None mean the flag was not given.
FLAGS = {
    "model": "model.path",
    "tokenizer": "model.tokenizer",
    "dtype": "model.dtype",
    "rotary_precision": "model.rotary_precision",
    "verify": "model.verify",
    "bos_policy": "model.bos_policy",
    "tp": "parallel.tensor",
    "nproc": "parallel.tensor",
    "input": "job.input",
    "output": "job.output",
    "max_tokens": "sampling.max_tokens",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "seed": "engine.seed",
}


def add_settings_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE.yaml", help="settings file; flags win over it")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one setting, for example engine.max_num_seqs=16; may be repeated",
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", help="checkpoint folder or hub id")
    parser.add_argument("--tokenizer", metavar="FILE", help="sentencepiece model, if elsewhere")
    parser.add_argument("--dtype", metavar="DTYPE", help="bfloat16 (default), float32 or float16")
    parser.add_argument(
        "--rotary-precision",
        metavar="PRECISION",
        help="bf16 as Adept, fp32 as Hugging Face, auto (default) as the checkpoint says",
    )
    parser.add_argument(
        "--verify", metavar="HOW", help="sizes (default) or full: checksums of all weights"
    )
    parser.add_argument("--bos-policy", metavar="POLICY", help="none (default) or bos")


def settings_from(args: argparse.Namespace) -> Settings:
    """Settings of the YAML file, the environment, ``--set`` and the flags, later ones winning."""
    flags: dict[str, Any] = {}
    for flag, key in FLAGS.items():
        value = getattr(args, flag, None)
        if value is not None:
            flags[key] = value
    return load_settings(args.config, args.set, flags)
