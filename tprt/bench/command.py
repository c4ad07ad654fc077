"""The flags of ``tprt bench`` and what they start. Imports no torch until something is measured.

``cli.bench`` is the program that users call; ``python -m tprt.bench`` is the same without the
settings file, for machines that have torch but not pydantic.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from tprt.config import EngineConfig, ModelConfig
from tprt.errors import ConfigError

if TYPE_CHECKING:
    from tprt.bench.report import Report
    from tprt.distributed.tp_group import TPGroup

BENCHES = {
    "throughput": "64 prompts of mixed length at once, or with --context as many as memory holds",
    "latency": "one sequence alone, decoding",
    "kernels": "single operations at a model's sizes, beside what the device can do at all",
    "decode": "steps at batch sizes and contexts, with a trace",
    "prefill": "time to first token, and what mixing prompts with decoding costs",
    "startup": "a process's start to its first token, cold and warm",
    "allreduce": "sums over ranks by message size",
    "scheduler": "the host's work per step at 64 sequences, without a model",
    "record": "handing a step record to the other ranks of --nproc N",
    "prefix": "prompt tokens computed when 32 requests share 1,024 tokens",
    "sparsity": "zeros that your own prompts leave in a checkpoint's layers",
    "bytes": "what a GPU reads from DRAM for one token, by Nsight Compute",
}
PEERS = ("transformers",)
WITH_PEER = ("throughput", "latency", "decode", "prefill")
ONE_PROCESS = ("scheduler", "kernels", "startup", "sparsity", "bytes")
WITH_ZEROS = ("decode", "bytes")
SEVERAL_RANKS = ("record", "allreduce")
WITHOUT_MODEL = ("record", "allreduce")
# Measured at full size on a GPU; on a CPU, and for the others, a model that fits any machine.
FULL_SIZE = ("kernels", "decode", "prefill", "startup", "bytes")

Say = Callable[[str], None]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What ``run_bench`` reads."""
    parser.add_argument("bench", choices=BENCHES, metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--vs", choices=PEERS, help="interleave with this peer, for a ratio")
    parser.add_argument("--json", action="store_true", help="nothing but the JSON line on stdout")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="interleaved runs (3)")
    parser.add_argument(
        "--requests", type=int, default=64, metavar="N", help="prompts of throughput (64)"
    )
    parser.add_argument("--toy", action="store_true", help="every step at sizes of milliseconds")
    parser.add_argument(
        "--batch", type=_numbers, metavar="N,...", help="of decode: sequences (1,4,16)"
    )
    parser.add_argument(
        "--context",
        type=_numbers,
        metavar="N,...",
        help="of decode: cached tokens (16,512,2048,16384); of throughput: one such number",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="of decode: steps of a run (64); of sparsity: tokens to generate per prompt (64)",
    )
    parser.add_argument(
        "--zeros",
        type=_shares,
        metavar="SHARE,...",
        help="of decode and bytes: synthetic shares of zeros after squared ReLU, between 0 and 1; with "
        "them decode compares steps that skip zeros with steps that do not",
    )
    parser.add_argument(
        "--trim",
        action="store_true",
        help="of decode and bytes: without embedding and head rows of ids that no text is made of",
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="runs of each measurement")
    parser.add_argument(
        "--prompt", type=_numbers, metavar="N,...", help="of prefill: tokens (2048,16384)"
    )
    parser.add_argument(
        "--shard",
        type=int,
        default=1,
        metavar="N",
        help="of kernels and decode: the part of rank 0 of N, alone, and a projection",
    )
    parser.add_argument("--only", metavar="TEXT", help="of kernels: operations named like this")
    parser.add_argument(
        "--tune",
        nargs="?",
        const="",
        metavar="FILE",
        help="of kernels: measure tiles for this device first, and write their table",
    )
    parser.add_argument(
        "--profile", type=Path, metavar="FILE.json", help="of decode: keep the trace, per rank"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="of startup: where the checkpoint is made"
    )
    parser.add_argument("--keep", action="store_true", help="of startup: leave it there")
    parser.add_argument(
        "--input",
        dest="prompts",  # or it would be the job's input
        type=Path,
        metavar="FILE.jsonl",
        help="of sparsity: prompts, as for tprt generate",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.svg", help="of sparsity: a picture too (.svg or .png)"
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def check_flags(args: argparse.Namespace, ranks: int) -> None:
    """Raises ConfigError for what cannot be measured. ``ranks``: how many there are, or will be."""
    for flag in ("pairs", "requests", "steps", "repeats", "shard"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} is {value}", hint="1 or more")
    for flag in ("batch", "context", "prompt"):
        for value in getattr(args, flag) or ():
            if value < 1:
                raise ConfigError(f"--{flag} holds {value}", hint="1 or more")
    if args.vs is not None and args.bench not in WITH_PEER:
        raise ConfigError(
            f"{args.bench} has no peer", hint=f"--vs goes with {', '.join(WITH_PEER)}"
        )
    if args.vs is not None and (ranks > 1 or args.shard > 1):
        what = f"{ranks} ranks" if ranks > 1 else f"--shard {args.shard}"
        raise ConfigError(f"--vs with {what}", hint="the peer runs in one process: --nproc 1")
    if args.bench == "throughput" and args.context is not None:
        if len(args.context) != 1:
            raise ConfigError("throughput takes one --context", hint="--context 2048")
        if args.vs is not None:
            raise ConfigError("--vs with --context", hint="decode --vs has contexts and a peer")
    if args.bench in ONE_PROCESS and ranks > 1:
        raise ConfigError(f"{args.bench} with {ranks} ranks", hint="it runs in one process")
    if args.shard > 1 and (args.bench not in ("kernels", "decode") or ranks > 1):
        raise ConfigError("--shard", hint="it goes with kernels and decode, in one process")
    _check_zeros(args, ranks)
    if args.bench in SEVERAL_RANKS and ranks == 1 and "RANK" not in os.environ:
        raise ConfigError(f"{args.bench} with 1 rank", hint="--nproc 2 or more")


def _check_zeros(args: argparse.Namespace, ranks: int) -> None:
    for share in args.zeros or ():
        if not 0 < share < 1:
            raise ConfigError(f"--zeros holds {share:g}", hint="shares between 0 and 1: 0.5,0.9")
    for flag, given in (("--zeros", args.zeros is not None), ("--trim", args.trim)):
        if given and args.bench not in WITH_ZEROS:
            raise ConfigError(
                f"{flag} with {args.bench}", hint=f"it goes with {', '.join(WITH_ZEROS)}"
            )
    if args.zeros is not None and (ranks > 1 or args.shard > 1):
        what = f"{ranks} ranks" if ranks > 1 else f"--shard {args.shard}"
        raise ConfigError(f"--zeros with {what}", hint="it is measured on one rank: --nproc 1")
    if args.zeros is not None and args.profile is not None:
        raise ConfigError("--profile with --zeros", hint="decode without --zeros keeps a trace")
    for flag in ("zeros", "context"):
        if args.bench == "bytes" and len(getattr(args, flag) or ()) > 1:
            raise ConfigError(f"bytes with several of --{flag}", hint="one at a time")
    for flag, path in (("--input", args.prompts), ("--plot", args.plot)):
        if path is not None and args.bench != "sparsity":
            raise ConfigError(f"{flag} with {args.bench}", hint="it goes with sparsity")


def named_config(name: str) -> ModelConfig | None:
    """The config of a model of ``named_models``; None for any other text."""
    from tprt.bench.named_models import CONFIGS

    return CONFIGS.get(name)


class Peer(TypedDict):
    vs: str | None
    pairs: int


class How(TypedDict):
    toy: bool
    say: Say


@dataclass(frozen=True)
class Job:
    """What is to be measured, on this rank."""

    args: argparse.Namespace
    engine: EngineConfig
    config: ModelConfig
    name: str
    tp: "TPGroup"
    say: Say

    @property
    def subject(self) -> "tuple[ModelConfig, str, EngineConfig, TPGroup]":
        return self.config, self.name, self.engine, self.tp

    @property
    def peer(self) -> "Peer":
        return {"vs": self.args.vs, "pairs": self.args.pairs}

    @property
    def how(self) -> "How":
        return {"toy": self.args.toy, "say": self.say}

    def sizes(self, full: Any, toy: Any, **flags: str) -> Any:
        """``full`` or ``toy``, but for the fields whose flags were given."""
        given = {field: getattr(self.args, flag) for field, flag in flags.items()}
        chosen = toy if self.args.toy else full
        return replace(chosen, **{k: v for k, v in given.items() if v is not None})


def run_bench(
    args: argparse.Namespace,
    engine: EngineConfig,
    given: tuple[ModelConfig, str] | None,
    device: str | None,
    say: Say,
    options: dict[str, Any] | None = None,
) -> "Report | None":
    """Measure; None on ranks above 0.

    Args:
        args: of ``add_flags``, checked.
        given: config and name of the model; None takes the measurement's own.
        device: None is this rank's GPU, else the CPU.
        options: of ``LLM`` beside the engine's, where a checkpoint is measured.
    """
    model = given
    if args.bench == "scheduler":
        from tprt.bench.scheduler import scheduler

        return scheduler(engine, say)
    if args.bench == "sparsity":
        from tprt.bench.sparsity import SparsitySizes, sparsity

        sizes = SparsitySizes() if args.steps is None else SparsitySizes(new_tokens=args.steps)
        how = {"input_file": args.prompts, "plot": args.plot, "options": options or {}}
        return sparsity(engine, model and model[1], device, **how, sizes=sizes, say=say)
    if args.bench == "bytes":
        return _bytes(args, engine, model, device, say)

    from tprt.distributed.tp_group import init_tp_group, launched_size

    if model is not None:
        # Before ranks meet: all of them find it, and none waits for another.
        model[0].validate_parallel(launched_size())
    from tprt.llm.startup import settle_collectives

    tp = init_tp_group(None, device)
    try:
        config, name = model or _default_model(args, tp.device.type)
        config.validate_parallel(tp.size)
        if args.bench not in WITHOUT_MODEL:
            tp, engine = settle_collectives(tp, engine, config.hidden_size)
        return _STARTERS[args.bench](Job(args, engine, config, name, tp, say))
    finally:
        tp.close()


def _default_model(args: argparse.Namespace, device_type: str) -> tuple[ModelConfig, str]:
    full = args.bench in FULL_SIZE and device_type == "cuda"
    # Of small matrices even a step that skips much is mostly something else.
    small = "persimmon-100m" if args.zeros is None else "persimmon-400m"
    name = "toy" if args.toy else "persimmon-8b" if full else small
    config = named_config(name)
    assert config is not None
    return config, name


def _bytes(
    args: argparse.Namespace,
    engine: EngineConfig,
    model: tuple[ModelConfig, str] | None,
    device: str | None,
    say: Say,
) -> "Report":
    """Without a group of ranks: another process has the GPU."""
    import torch

    from tprt.bench.dram_bytes import CONTEXT, dram_bytes

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config, name = model or _default_model(args, torch.device(device).type)
    (zeros,) = args.zeros or (None,)
    (context,) = args.context or (16 if args.toy else CONTEXT,)
    step = {"zeros": zeros, "trim": args.trim, "context": context}
    return dram_bytes(config, name, engine, device, **step, say=say)


def _throughput(job: Job) -> "Report | None":
    if job.args.context is not None:
        from tprt.bench import full_memory as full

        sizes = job.sizes(full.FullSizes(), full.TOY, steps="steps", repeats="repeats")
        return full.full_memory(*job.subject, context=job.args.context[0], sizes=sizes, **job.how)
    from tprt.bench.throughput import throughput

    return throughput(*job.subject, **job.peer, requests=job.args.requests, **job.how)


def _latency(job: Job) -> "Report | None":
    from tprt.bench.latency import latency

    return latency(*job.subject, **job.peer, **job.how)


def _decode(job: Job) -> "Report | None":
    from tprt.bench import decode, zeros
    from tprt.bench.decode_sizes import TOY, DecodeSizes

    args, on_cpu = job.args, job.tp.device.type == "cpu"
    sizes = job.sizes(
        zeros.ON_CPU if args.zeros is not None and on_cpu else DecodeSizes(), TOY,
        batches="batch", contexts="context", steps="steps", repeats="repeats",
    )  # fmt: skip
    common = {**job.peer, **job.how, "sizes": sizes, "trim": args.trim}
    if args.zeros is not None:
        return zeros.zeros_sweep(*job.subject, zeros=args.zeros, **common)
    return decode.decode(*job.subject, shard=args.shard, profile=args.profile, **common)


def _prefill(job: Job) -> "Report | None":
    from tprt.bench import prefill

    sizes = job.sizes(prefill.PrefillSizes(), prefill.TOY, prompts="prompt", repeats="repeats")
    return prefill.prefill(*job.subject, sizes=sizes, **job.peer, **job.how)


def _kernels(job: Job) -> "Report | None":
    from tprt.bench.kernels import kernels, tiles_path

    args, device = job.args, job.tp.device
    tune = None if args.tune is None else Path(args.tune or tiles_path(device))
    return kernels(
        job.config, job.name, job.engine, device,
        shard=args.shard, only=args.only, tune=tune, **job.how,
    )  # fmt: skip


def _startup(job: Job) -> "Report | None":
    from tprt.bench.startup import startup

    place = {"folder": job.args.folder, "keep": job.args.keep}
    return startup(job.config, job.name, job.engine, job.tp.device, **place, **job.how)


def _allreduce(job: Job) -> "Report | None":
    from tprt.bench import allreduce

    sizes = job.sizes(allreduce.AllReduceSizes(), allreduce.TOY)
    return allreduce.allreduce(job.tp, sizes=sizes, say=job.say)


def _record(job: Job) -> "Report | None":
    from tprt.bench.record import record

    return record(job.engine, job.tp, job.say)


def _prefix(job: Job) -> "Report | None":
    from tprt.bench.prefix import prefix

    return prefix(*job.subject, say=job.say)


_STARTERS: dict[str, Callable[[Job], "Report | None"]] = {
    "throughput": _throughput,
    "latency": _latency,
    "decode": _decode,
    "prefill": _prefill,
    "kernels": _kernels,
    "startup": _startup,
    "allreduce": _allreduce,
    "record": _record,
    "prefix": _prefix,
}
