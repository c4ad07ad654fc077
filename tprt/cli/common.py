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
    "device": "model.device",
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


MODEL_FLAGS = {
    "model": ("PATH", "checkpoint folder or hub id"),
    "tokenizer": ("FILE", "sentencepiece model, if elsewhere"),
    "dtype": ("DTYPE", "bfloat16 (default), float32 or float16"),
    "rotary-precision": (
        "PRECISION",
        "bf16 as Adept, fp32 as Hugging Face, auto (default) as the checkpoint says",
    ),
    "verify": ("HOW", "sizes (default) or full: checksums of all weights"),
    "bos-policy": ("POLICY", "none (default) as Adept, or bos as Hugging Face"),
    "device": ("DEVICE", "auto (default: a GPU for each rank if there is one), cpu or cuda"),
}


def add_model_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """The named flags of MODEL_FLAGS, or all of them."""
    for name in names or MODEL_FLAGS:
        metavar, text = MODEL_FLAGS[name]
        parser.add_argument(f"--{name}", metavar=metavar, help=text)


def settings_from(args: argparse.Namespace) -> Settings:
    """Settings of the YAML file, the environment, ``--set`` and the flags, later ones winning."""
    flags: dict[str, Any] = {}
    for flag, key in FLAGS.items():
        value = getattr(args, flag, None)
        if value is not None:
            flags[key] = value
    return load_settings(args.config, args.set, flags)
