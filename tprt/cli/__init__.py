"""The ``tprt`` program: one subcommand per file, errors turned into messages and exit codes.

Nothing heavy is imported until a subcommand runs, so that ``--help`` answers at once.
"""

import argparse
import difflib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from tprt import __version__
from tprt.cli import bench, chat, config, convert, doctor, generate, inspect, job, plan
from tprt.cli.common import Terminated
from tprt.cli.parent import end_with_launcher
from tprt.cli.signals import signals_as_exceptions
from tprt.errors import EXIT_BUG, EXIT_OK, EXIT_SIGINT, EXIT_SIGTERM, TprtError, out_of_memory
from tprt.log import report, setup_cli_logging

# An error found alike on every rank is printed by rank 0 alone. The others stay a moment longer: a
# launcher stops all ranks as soon as one has failed, rank 0 perhaps before it has said why.
GRACE_SECONDS = 2.0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tprt",
        allow_abbrev=False,
        description="Tensor-parallel inference for squared-ReLU and recurrent language models.",
        epilog="Exit codes: 0 good, 1 bug, 2 usage or config, 3 checkpoint or tokenizer, 4 finished "
        "with failed records, 5 output, 6 rank failure, 7 ranks disagree, 8 does not fit, "
        "130 and 143 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"tprt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (generate, job, chat, inspect, convert, plan, config, doctor, bench):
        command = module.add_parser(commands)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.allow_abbrev = False
        command.set_defaults(run=module.run, parser=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    end_with_launcher()
    # torch's own switch, read when it first allocates: on a CPU rows of weights are then looked up in
    # pages of 2 MiB. The program's to set, not the library's.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # A store that goes away with its launcher is told of by the watch, in fewer words than torch's 25.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args, unknown = build_parser().parse_known_args(arguments)
    if unknown:
        _refuse(args.parser, unknown)
    args.arguments = arguments
    setup_cli_logging("debug" if args.debug else "info")
    try:
        with signals_as_exceptions():
            return int(args.run(args))
    except TprtError as error:
        _report(f"tprt: error: {error}", args.debug)
        return error.exit_code
    except Terminated as signal_:
        _report(f"tprt: ended by {signal_}", args.debug)
        return EXIT_SIGTERM
    except KeyboardInterrupt:
        _report("tprt: interrupted", args.debug)
        return EXIT_SIGINT
    except BrokenPipeError:
        # The reader of our output went away (``tprt inspect ... | head``); closing stdout again at
        # exit would raise once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception as error:
        told = out_of_memory(error)
        if told is not None:
            _report(f"tprt: error: {told}", args.debug)
            return told.exit_code
        kind = type(error).__name__
        _report(
            f"tprt: bug: {kind}: {error}\n  try:   --debug shows the traceback; please report it",
            args.debug,
        )
        return EXIT_BUG


def _refuse(parser: argparse.ArgumentParser, unknown: list[str]) -> NoReturn:
    """Like argparse, but with the usage of the command itself."""
    flags = [flag for action in parser._actions for flag in action.option_strings]
    name = unknown[0].partition("=")[0]
    near = difflib.get_close_matches(name, flags, n=1)
    if name == "--tp" and "--nproc" in flags:
        near = ["--nproc, which starts that many ranks"]
    hint = f"; did you mean {near[0]}?" if near else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def _report(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or debug:
        report(message)
    else:
        time.sleep(GRACE_SECONDS)
        report(f"[rank {rank}] {message}")
