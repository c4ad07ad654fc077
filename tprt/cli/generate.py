"""``tprt generate``: batch generation, alone, with ``--nproc N`` or under torchrun."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tprt.cli.common import (
    add_model_flags,
    add_sampling_flags,
    add_settings_flags,
    make_llm,
    ranks_to_start,
    settings_from,
)
from tprt.cli.settings import Settings
from tprt.errors import EXIT_FAILED_RECORDS, EXIT_OK, ConfigError
from tprt.log import get_logger

if TYPE_CHECKING:
    from tprt.job.generate import JobReport

logger = get_logger(__name__)

SHOWN_RECORDS = 20


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="answer a JSONL file of prompts",
        description="Answer every line of a JSONL file. Start it alone, with --nproc N, or as "
        "torchrun --nproc-per-node N -m tprt generate ...",
    )
    add_model_flags(parser)
    parser.add_argument("--input", metavar="IN.jsonl", help="one JSON object per line")
    parser.add_argument("--output", metavar="OUT.jsonl", help="appears when all is done")
    parser.add_argument("--nproc", type=int, metavar="N", help="start N ranks on this host")
    add_sampling_flags(parser, "most tokens per completion (16)")
    parser.add_argument(
        "--show", action="store_true", help="print a table of prompts and texts at the end"
    )
    add_settings_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    settings = settings_from(args)
    missing = [
        f"--{flag}"
        for flag, value in (
            ("model", settings.model.path),
            ("input", settings.job.input),
            ("output", settings.job.output),
        )
        if not value
    ]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} missing", hint="give the flag, or the setting in --config"
        )
    for flag, value in (("input", settings.job.input), ("output", settings.job.output)):
        if value == "-":
            raise ConfigError(f"--{flag} is '-'", hint="the path of a file")
    ranks = ranks_to_start(settings)
    if ranks > 1:
        from tprt.cli.launch import check_start, launch_local

        check_start(settings, ranks)
        return launch_local(ranks, args.arguments)
    return _run_here(settings, args.show)


def _run_here(settings: Settings, show: bool) -> int:
    from tprt.job.generate import run_job

    report = run_job(
        lambda: make_llm(settings),
        Path(settings.job.input or ""),
        Path(settings.job.output or ""),
        settings.sampling_params(),
        settings.engine.seed,
    )
    if report is None:
        return EXIT_OK
    total, rate = len(report.records), report.tokens / max(report.seconds, 1e-9)
    said = (
        f"{total} records, {report.failed} failed; {report.tokens} tokens in "
        f"{report.seconds:.2f} s, {rate:.1f} tokens/s -> {settings.job.output}"
    )
    if (first := next((r for r in report.records if r.error), None)) is not None:
        logger.warning("first of %d failed records: %s: %s", report.failed, first.id, first.error)
    with contextlib.suppress(BrokenPipeError):  # the job is done; who reads this may be gone
        if show:
            _show(report)
        print(said, flush=True)
    return EXIT_FAILED_RECORDS if report.failed else EXIT_OK


def _show(report: "JobReport") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("prompt", "text", show_lines=True)
    for record in report.records[:SHOWN_RECORDS]:
        output = report.outputs.get(record.id)
        text = record.error if output is None else output.outputs[0].text.strip()
        table.add_row(_printable(shorten(record.shown, 300)), _printable(text or ""))
    Console().print(table)
    if len(report.records) > SHOWN_RECORDS:
        print(f"({len(report.records) - SHOWN_RECORDS} more records are not shown)")


def _printable(text: str) -> str:
    from rich.markup import escape

    return escape(text.encode("utf-8", "replace").decode())


def shorten(text: str, most: int) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
