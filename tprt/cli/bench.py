"""``tprt bench``: measurements on random weights, beside a peer where one is asked for."""

import argparse
import os
import sys
from typing import Any

from tprt.bench.command import BENCHES, add_flags, check_flags, named_config, run_bench
from tprt.bench.named_models import CONFIGS
from tprt.cli.common import add_model_flags, add_settings_flags, llm_options, settings_from
from tprt.errors import EXIT_OK


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure, on random weights for the most part",
        description="Measure, on random weights but for sparsity; the last line is one JSON object. "
        + "; ".join(f"{name}: {text}" for name, text in BENCHES.items())
        + f". --model also takes a model of random weights by its name: {', '.join(CONFIGS)}.",
    )
    add_flags(parser)
    parser.add_argument("--nproc", type=int, metavar="N", help="start N ranks on this host")
    add_model_flags(parser, "model", "dtype", "device")
    add_settings_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    settings = settings_from(args)
    ranks = settings.parallel.tensor or int(os.environ.get("WORLD_SIZE", "1"))
    check_flags(args, ranks)
    if ranks > 1 and "RANK" not in os.environ:
        from tprt.cli.launch import launch_local

        return launch_local(ranks, args.arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    model = None
    if path := settings.model.path:
        from tprt.cli.plan import read_config

        model = named_config(path) or read_config(settings), path
    device = None if settings.model.device == "auto" else settings.model.device
    options = llm_options(settings.model)
    if options["trim_vocab"] != "off" and args.bench != "sparsity":
        say("model.trim_vocab is left aside, as weights are random; decode and bytes take --trim")
    report = run_bench(args, settings.engine_config(), model, device, say, options)
    if report is not None:
        print(report.to_json(args.arguments), flush=True)
    return EXIT_OK
