"""Flags that several subcommands share, and how they meet the YAML settings."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from tprt.cli.settings import ENV_PREFIX, ModelSettings, Settings, load_settings
from tprt.cli.strict_yaml import read_yaml_file
from tprt.errors import ConfigError

if TYPE_CHECKING:
    from tprt.distributed.watch import Watch
    from tprt.llm import LLM

# Set for ranks by a launcher that hands on Ctrl-C to them: its process id.
LAUNCHER = "TPRT_LAUNCHER"

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
    "input": "job.input",
    "output": "job.output",
    "log_format": "job.log_format",
    "max_restarts": "job.max_restarts",
    "max_tokens": "sampling.max_tokens",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "seed": "engine.seed",
}


class Terminated(BaseException):
    """SIGTERM or SIGUSR1 arrived; raised where the program is, so that temporary files go away."""


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
        "of rotary tables: bf16, fp32, or auto (default) as the checkpoint says",
    ),
    "verify": ("HOW", "sizes (default) or full: checksums of all weights"),
    "bos-policy": (
        "POLICY",
        "auto (default) as the model was tuned, none, or bos before each text",
    ),
    "device": ("DEVICE", "auto (default: a GPU for each rank if there is one), cpu or cuda"),
}


def add_model_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """The named flags of MODEL_FLAGS, or all of them."""
    for name in names or MODEL_FLAGS:
        metavar, text = MODEL_FLAGS[name]
        parser.add_argument(f"--{name}", metavar=metavar, help=text)


def add_sampling_flags(parser: argparse.ArgumentParser, max_tokens: str) -> None:
    """Args: what help says of --max-tokens."""
    parser.add_argument("--max-tokens", type=int, metavar="N", help=max_tokens)
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (1.0)")
    parser.add_argument("--top-p", type=float, metavar="P", help="0 to 1 (1.0, off)")
    parser.add_argument("--top-k", type=int, metavar="K", help="0 is off (0)")
    parser.add_argument("--seed", type=int, metavar="SEED", help="of everything drawn")


def settings_from(args: argparse.Namespace) -> Settings:
    """Settings of the YAML file, the environment, ``--set`` and the flags, later ones winning."""
    return load_settings(args.config, args.set, given_flags(args))


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags were given for."""
    flags: dict[str, Any] = {}
    for flag, key in FLAGS.items():
        value = getattr(args, flag, None)
        if value is not None:
            flags[key] = value
    if isinstance(shard := getattr(args, "shard", None), str):  # a bench has a number of that name
        flags["job.shard"] = shard
    if "engine.seed" in flags and hasattr(args, "log_format"):
        flags["job.seed"] = flags["engine.seed"]  # a flag wins over the file for records too
    if (nproc := getattr(args, "nproc", None)) is not None:
        flags["parallel.tensor"] = _ranks_per_replica(args, flags, nproc)
    return flags


def _ranks_per_replica(args: argparse.Namespace, flags: dict[str, Any], nproc: int) -> int:
    """``--nproc`` counts all ranks; the replicas that the other settings ask for share them."""
    replicas = load_settings(args.config, args.set, flags).parallel.data
    if nproc < 1 or nproc % replicas:
        raise ConfigError(
            f"--nproc is {nproc}, for {replicas} replicas (parallel.data)",
            hint=f"a multiple of {replicas}, at least {replicas}",
        )
    return nproc // replicas


def is_given(args: argparse.Namespace, key: str) -> bool:
    """Whether the user gave setting ``key`` anywhere, perhaps at its default. Mistakes are not told."""
    flags = FLAGS | {"nproc": "parallel.tensor"}
    if any(getattr(args, flag, None) is not None for flag, known in flags.items() if known == key):
        return True
    variables = (
        name.removeprefix(ENV_PREFIX) for name in os.environ if name.startswith(ENV_PREFIX)
    )
    given = {name.lower().replace("__", ".", 1) for name in variables}
    given |= {override.partition("=")[0].strip() for override in args.set}
    if key not in given and args.config is not None:
        section, _, name = key.partition(".")
        document = read_yaml_file(args.config, []).plain()
        return name in ((document or {}).get(section) or {})
    return key in given


def ranks_to_start(settings: Settings) -> int:
    """How many ranks to start from here; 1 means that this process is all, or a rank of a launch.

    Raises:
        ConfigError: a launcher started another number than the settings say.
    """
    parallel = settings.parallel
    if "RANK" not in os.environ:
        return parallel.world_size or parallel.data
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if parallel.world_size not in (None, launched) or launched % parallel.data:
        asked = "" if parallel.tensor is None else f"parallel.tensor is {parallel.tensor}, "
        raise ConfigError(
            f"{asked}parallel.data is {parallel.data}, but {launched} ranks were started",
            hint=f"start {parallel.world_size or 'a multiple of parallel.data'} ranks, "
            "or change these settings",
        )
    return 1


def tensor_parallel_size(settings: Settings) -> int:
    """Ranks of one replica, on a rank of the launch."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    return settings.parallel.tensor or launched // settings.parallel.data


def make_llm(
    settings: Settings, group: list[int] | None = None, watch: "Watch | None" = None
) -> "LLM":
    """Args:
    group: ranks of the launch that share the model; None is all of them.
    """
    from tprt.llm import LLM

    model = settings.model
    return LLM(
        model.path,
        device=None if model.device == "auto" else model.device,
        group=group,
        watch=watch,
        **llm_options(model),
        **vars(settings.engine_config()),
    )


def llm_options(model: ModelSettings) -> dict[str, Any]:
    """What ``LLM`` is told of a checkpoint beside its path."""
    names = ("tokenizer", "rotary_precision", "window_keys", "verify", "bos_policy", "trim_vocab")
    return {name: getattr(model, name) for name in names}
