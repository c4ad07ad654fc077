"""``tprt generate``: batch generation, alone, with ``--nproc N`` or under torchrun; it resumes."""

import argparse
import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tprt import __version__
from tprt.cli.common import (
    add_model_flags,
    add_sampling_flags,
    add_settings_flags,
    make_llm,
    ranks_to_start,
    settings_from,
    tensor_parallel_size,
)
from tprt.cli.settings import Settings
from tprt.errors import EXIT_FAILED_RECORDS, EXIT_OK, ConfigError
from tprt.log import event_line, get_logger, setup_cli_logging

if TYPE_CHECKING:
    from tprt.cli.ranks import Ending
    from tprt.job.generate import Job
    from tprt.job.input_file import InputFacts
    from tprt.tokenizer import Tokenizer

logger = get_logger(__name__)

SHOWN_RECORDS = 20


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="answer a JSONL file of prompts",
        description="Answer every line of a JSONL file. Start it alone, with --nproc N, or as "
        "torchrun --nproc-per-node N -m tprt generate ... The same command resumes a job that was "
        "stopped or killed; tprt job status OUT tells how far it is.",
    )
    add_model_flags(parser)
    parser.add_argument("--input", metavar="IN.jsonl", help="one JSON object per line")
    parser.add_argument("--output", metavar="OUT.jsonl", help="appears when all is done")
    parser.add_argument("--nproc", type=int, metavar="N", help="start N ranks on this host")
    add_sampling_flags(parser, "most tokens per completion (16)")
    add_job_flags(parser)
    parser.add_argument(
        "--max-restarts", type=int, metavar="K", help="start the ranks again after a failure (0)"
    )
    parser.add_argument(
        "--merge", action="store_true", help="join the outputs of all shards of OUT, and end"
    )
    parser.add_argument(
        "--show", action="store_true", help="print a table of prompts and texts at the end"
    )
    add_settings_flags(parser)
    return parser


def add_job_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every command that runs a batch job."""
    parser.add_argument("--shard", metavar="I/N", help="answer part I of N, counted from 0")
    parser.add_argument(
        "--restart", action="store_true", help="drop what an earlier run of this job has done"
    )
    parser.add_argument(
        "--log-format", choices=("text", "json"), help="of what goes to stderr (text)"
    )


def run(args: argparse.Namespace) -> int:
    settings = settings_from(args)
    setup_cli_logging("debug" if args.debug else "info", settings.job.log_format)
    if args.merge:
        return _merge(settings)
    check_job(settings)
    ranks = ranks_to_start(settings)
    if ranks > 1:
        from tprt.cli.launch import check_start, launch_local

        check_start(settings, settings.parallel.tensor or 1)
        return launch_local(ranks, args.arguments, max_restarts=settings.job.max_restarts)
    return _run_here(settings, args)


def check_job(settings: Settings) -> None:
    """Raises ConfigError for files that were not named."""
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


def make_job(settings: Settings, ranks: int, tensor: int, restart: bool) -> "Job":
    """Args: ranks of the launch, and those that share one replica."""
    from tprt.job.generate import Job
    from tprt.job.input_file import Shard

    job = settings.job
    return Job(
        input=Path(job.input or ""),
        output=Path(job.output or ""),
        defaults=settings.sampling_params(),
        fingerprint=lambda facts: _fingerprint(settings, facts),
        max_num_seqs=settings.engine.max_num_seqs,
        seed=settings.job_seed,
        shard=None if job.shard is None else Shard.parse(job.shard),
        ranks=ranks,
        tensor=tensor,
        restart=restart,
        log_format=job.log_format,
    )


def _fingerprint(settings: Settings, facts: "InputFacts") -> dict[str, Any]:
    """Of a job: everything its texts depend on, as it is in effect."""
    from tprt.checkpoint import open_checkpoint
    from tprt.job.fingerprint import make_fingerprint
    from tprt.job.input_file import Shard
    from tprt.llm import open_tokenizer, resolve_config, resolve_vocabulary

    model = settings.model
    with open_checkpoint(model.path) as reader:
        tokenizer = open_tokenizer(reader, model.tokenizer, model.bos_policy)
        vocabulary = resolve_vocabulary(reader.config.vocab_size, tokenizer, model.trim_vocab)
        config = resolve_config(reader, vars(model))
        in_effect = {name: getattr(config, name) for name in config.overrides} | {
            "dtype": model.dtype,
            "bos_policy": tokenizer.bos_policy,
            "trim_vocab": [list(block) for block in vocabulary.removed],
            "max_model_len": settings.engine_config().resolve_max_model_len(config),
        }
        return make_fingerprint(
            input=facts,
            model=reader.fingerprint(),
            tokenizer=tokenizer.sha256,
            sampling=settings.sampling_params(),
            job_seed=settings.job_seed,
            version=__version__,
            settings=in_effect,
            shard=None if settings.job.shard is None else Shard.parse(settings.job.shard),
        )


def _run_here(settings: Settings, args: argparse.Namespace) -> int:
    from tprt.cli.ranks import run_together
    from tprt.distributed.environment import launch_attempt
    from tprt.distributed.tp_group import launched_size
    from tprt.distributed.verdict import Limits
    from tprt.job.generate import run_job
    from tprt.job.summary import print_summary

    limits = Limits(settings.engine.step_timeout, settings.engine.load_timeout)
    _warn_of_restarts(settings)
    restart = args.restart and launch_attempt() == 0  # ranks started once more go on
    job = make_job(settings, launched_size(), tensor_parallel_size(settings), restart)

    def work(ending: "Ending") -> int:
        report = run_job(
            job,
            lambda group: make_llm(settings, group, ending.watch),
            ending.watch,
            ending.before_end.append,
        )
        if report is None:
            return EXIT_OK
        if report.first_error:
            logger.warning(
                "first of %d failed records: %s", report.summary.failed, report.first_error
            )
        if args.show:
            # The job is done; who reads may be gone.
            with contextlib.suppress(OSError, ConfigError):
                _show(settings, job, report.summary.records)
        print_summary(report.summary, job.log_format)
        return report.exit_code

    return run_together(limits, args.debug, work)


def _warn_of_restarts(settings: Settings) -> None:
    """Ranks cannot start themselves again: that was their launcher's to know."""
    from tprt.distributed.environment import max_restarts

    if settings.job.max_restarts > max_restarts():
        logger.warning(
            "job.max_restarts is %d, but %s: nothing will be started again",
            settings.job.max_restarts,
            "the launcher was not told" if "RANK" in os.environ else "one process has no launcher",
        )


def _merge(settings: Settings) -> int:
    from tprt.job.merge import merge_shards

    if not settings.job.output:
        raise ConfigError("--output missing", hint="that of the shards, without .I-of-N")
    report = merge_shards(Path(settings.job.output))
    if settings.job.log_format == "json":
        print(event_line("merge", **asdict(report)), flush=True)
    else:
        print(
            f"{report.records} records, {report.failed} failed, from {report.shards} shards "
            f"-> {settings.job.output}",
            flush=True,
        )
    return EXIT_FAILED_RECORDS if report.failed else EXIT_OK


def _show(settings: Settings, job: "Job", total: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("prompt", "text", show_lines=True)
    for prompt, text in itertools.islice(_answers(settings, job), SHOWN_RECORDS):
        table.add_row(_printable(shorten(prompt, 300)), _printable(text))
    Console().print(table)
    if total > SHOWN_RECORDS:
        print(f"({total - SHOWN_RECORDS} more records are not shown)")


def _answers(settings: Settings, job: "Job") -> Iterator[tuple[str, str]]:
    """Prompts as the model reads them, and their first texts or their errors."""
    from tprt.checkpoint import open_checkpoint
    from tprt.job.input_file import InputFile, scan_input
    from tprt.llm import open_tokenizer

    model = settings.model
    with open_checkpoint(model.path) as reader:
        tokenizer = open_tokenizer(reader, model.tokenizer, model.bos_policy)
    records = InputFile(job.input, scan_input(job.input)).records(job.defaults, 0, job.shard)
    with job.own_output.open(encoding="utf-8") as lines:
        for record, line in zip(records, lines, strict=False):
            yield _as_read(record.prompt or {}, tokenizer), _first_text(json.loads(line))


def _as_read(prompt: dict[str, Any], tokenizer: "Tokenizer") -> str:
    if "messages" in prompt:
        with contextlib.suppress(ConfigError):  # then its answer says why
            ids = tokenizer.encode_chat(prompt["messages"])
            return tokenizer.decode(ids, skip_special_tokens=False)
    return str(next(iter(prompt.values()), ""))


def _first_text(line: dict[str, Any]) -> str:
    if (response := line.get("response")) is not None:  # OpenAI's form
        body = response["body"]
        if "error" in body:
            return str(body["error"]["message"])
        choice = body["choices"][0]
        return str(choice.get("text", choice.get("message", {}).get("content", ""))).strip()
    if line["error"] is not None:
        return str(line["error"]["message"])
    return str(line["outputs"][0]["text"]).strip()


def _printable(text: str) -> str:
    from rich.markup import escape

    return escape(text.encode("utf-8", "replace").decode())


def shorten(text: str, most: int) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
