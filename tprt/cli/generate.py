"""``tprt generate``: batch generation, alone, with ``--nproc N`` or under torchrun."""

import argparse
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tprt.cli.common import add_model_flags, add_settings_flags, settings_from
from tprt.cli.settings import Settings
from tprt.errors import EXIT_FAILED_RECORDS, EXIT_OK, ConfigError

if TYPE_CHECKING:
    from tprt.job.generate import JobReport

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
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="most tokens per completion (16)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (1.0)")
    parser.add_argument("--top-p", type=float, metavar="P", help="0 to 1 (1.0, off)")
    parser.add_argument("--top-k", type=int, metavar="K", help="0 is off (0)")
    parser.add_argument("--seed", type=int, metavar="SEED", help="of the whole job")
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
    ranks = settings.parallel.tensor or 1
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ:
        if ranks > 1:
            return _launch(settings, ranks, args.arguments)
    elif settings.parallel.tensor not in (None, launched):
        raise ConfigError(
            f"parallel.tensor is {ranks}, but {launched} ranks were started",
            hint=f"--nproc-per-node {ranks}, or leave parallel.tensor out",
        )
    return _run_here(settings, args.show)


def _launch(settings: Settings, ranks: int, arguments: list[str]) -> int:
    """Find what is wrong before any rank starts, then start them with the same command line."""
    from tprt.checkpoint import open_checkpoint
    from tprt.cli.launch import launch_local
    from tprt.llm import open_tokenizer

    model = settings.model
    reader = open_checkpoint(model.path)
    reader.config.validate_parallel(ranks)
    open_tokenizer(reader, model.tokenizer, model.bos_policy)
    return launch_local(ranks, arguments)


def _run_here(settings: Settings, show: bool) -> int:
    from tprt.job.generate import run_job
    from tprt.llm import LLM

    model, engine = settings.model, settings.engine_config()

    def make_llm() -> LLM:
        return LLM(
            model.path,
            tokenizer=model.tokenizer,
            rotary_precision=model.rotary_precision,
            verify=model.verify,
            bos_policy=model.bos_policy,
            device=None if model.device == "auto" else model.device,
            **vars(engine),
        )

    report = run_job(
        make_llm,
        Path(settings.job.input or ""),
        Path(settings.job.output or ""),
        settings.sampling_params(),
        engine.seed,
    )
    if report is None:
        return EXIT_OK
    total, rate = len(report.records), report.tokens / max(report.seconds, 1e-9)
    said = (
        f"{total} records, {report.failed} failed; {report.tokens} tokens in "
        f"{report.seconds:.2f} s, {rate:.1f} tokens/s -> {settings.job.output}"
    )
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
