"""``tprt bench``: measurements on random weights, beside a peer where one is asked for."""

import argparse
import os
import sys
from typing import Any

from tprt.cli.common import add_model_flags, add_settings_flags, settings_from
from tprt.errors import EXIT_OK, ConfigError

BENCHES = {
    "throughput": "64 prompts of mixed length at once",
    "latency": "one sequence alone, decoding",
    "scheduler": "the host's work per step at 64 sequences, without a model",
    "record": "handing a step record to the other ranks of --nproc N",
    "prefix": "prompt tokens computed when 32 requests share 1,024 tokens",
}
PEERS = ("transformers",)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure on random weights",
        description="Measure on random weights; the last line is one JSON object. "
        + "; ".join(f"{name}: {text}" for name, text in BENCHES.items())
        + ".",
    )
    parser.add_argument("bench", choices=BENCHES, metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument("--vs", choices=PEERS, help="interleave with this peer, for a ratio")
    parser.add_argument("--json", action="store_true", help="nothing but the JSON line on stdout")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="interleaved runs (3)")
    parser.add_argument(
        "--requests", type=int, default=64, metavar="N", help="prompts of throughput (64)"
    )
    parser.add_argument("--nproc", type=int, metavar="N", help="start N ranks on this host")
    add_model_flags(parser, "model", "dtype", "device")
    add_settings_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    settings = settings_from(args)
    for flag in ("pairs", "requests"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag} is {getattr(args, flag)}", hint="1 or more")
    if args.vs is not None and args.bench not in ("throughput", "latency"):
        raise ConfigError(
            f"{args.bench} has no peer", hint="--vs goes with throughput and with latency"
        )
    ranks = settings.parallel.tensor or 1
    if args.vs is not None and ranks > 1:
        raise ConfigError(
            f"--vs with {ranks} ranks", hint="the peer runs in one process: --nproc 1"
        )
    if args.bench == "scheduler":
        if ranks > 1:
            raise ConfigError(f"scheduler with {ranks} ranks", hint="it runs in one process")
    elif args.bench == "record" and ranks == 1 and "RANK" not in os.environ:
        raise ConfigError("record with 1 rank", hint="--nproc 2 or more")
    elif ranks > 1 and "RANK" not in os.environ:
        from tprt.cli.launch import launch_local

        return launch_local(ranks, args.arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    engine = settings.engine_config()
    if args.bench == "scheduler":
        from tprt.bench.scheduler import scheduler

        print(scheduler(engine, say).to_json(args.arguments), flush=True)
        return EXIT_OK

    from tprt.bench.synthetic import PERSIMMON_100M
    from tprt.distributed.tp_group import init_tp_group

    config, name = PERSIMMON_100M, "persimmon-100m"
    if settings.model.path:
        from tprt.cli.plan import read_config

        config, name = read_config(settings.model.path), settings.model.path
    config.validate_parallel(ranks)
    tp = init_tp_group(None, None if settings.model.device == "auto" else settings.model.device)
    try:
        if args.bench == "throughput":
            from tprt.bench.throughput import throughput

            report = throughput(
                config, name, engine, tp,
                vs=args.vs, pairs=args.pairs, requests=args.requests, say=say,
            )  # fmt: skip
        elif args.bench == "latency":
            from tprt.bench.latency import latency

            report = latency(config, name, engine, tp, vs=args.vs, pairs=args.pairs, say=say)
        elif args.bench == "record":
            from tprt.bench.record import record

            report = record(engine, tp, say)
        else:
            from tprt.bench.prefix import prefix

            report = prefix(config, name, engine, tp, say)
    finally:
        tp.close()
    if report is not None:
        print(report.to_json(args.arguments), flush=True)
    return EXIT_OK
