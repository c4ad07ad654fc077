"""The batch job: JSONL in, JSONL out, on every rank of the launch.

Rank 0 alone reads the input, decides and writes; the others take part in the model. Knows no flags
and no YAML.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tprt.engine.outputs import RequestOutput
from tprt.errors import ConfigError, TprtError
from tprt.job.output_file import AtomicOutput
from tprt.job.progress import ProgressLine
from tprt.job.records import Record, read_records, result_line
from tprt.llm import LLM
from tprt.log import get_logger
from tprt.sampling_params import SamplingParams

logger = get_logger(__name__)


@dataclass
class JobReport:
    """What rank 0 knows of a job.

    Args:
        total, finished: completions to make, and made so far.
        seconds: of generation only, without start-up.
    """

    records: list[Record] = field(default_factory=list)
    outputs: dict[str, RequestOutput] = field(default_factory=dict)
    total: int = 0
    finished: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def failed(self) -> int:
        return sum(record.error is not None for record in self.records)


def run_job(
    make_llm: Callable[[], LLM],
    input_path: Path,
    output_path: Path,
    defaults: SamplingParams,
    job_seed: int = 0,
) -> JobReport | None:
    """Answer every record of ``input_path`` in ``output_path``; the report on rank 0, else None.

    Args:
        make_llm: called once, after input and output were found usable.

    An interrupt (an exception that is no error) is raised again, after a line about what was done.

    Raises:
        ConfigError: the input cannot be read or holds an id twice.
        OutputError: the output cannot be written; an existing output is untouched.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        with make_llm() as llm:
            llm.generate(None)
        return None
    report = JobReport(load_records(input_path, defaults, job_seed))
    if not report.records:
        logger.warning("%s holds no records: %s will be empty", input_path, output_path)
    output = AtomicOutput(output_path)
    try:
        with make_llm() as llm:
            _answer(llm, report)
        lines = (result_line(r, report.outputs.get(r.id)) for r in report.records)
        output.write(map(_dump, lines))
    except BaseException as reason:
        if not isinstance(reason, Exception) and output.temporary.exists():
            _say_interrupted(report, output_path)
        raise
    finally:
        output.discard()
    return report


def load_records(path: Path, defaults: SamplingParams, job_seed: int) -> list[Record]:
    try:
        with path.open("rb") as lines:
            return list(read_records(lines, defaults, job_seed))
    except OSError as error:
        raise ConfigError(
            f"the input cannot be read: {error.strerror or error}",
            where=str(path),
            hint="an existing file with one JSON object per line",
        ) from error
    except ConfigError as error:
        error.where = f"{path}, {error.where}"
        raise


def _dump(line: dict[str, Any]) -> str:
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, legal as a JSON escape but not as UTF-8
        return json.dumps(line)
    return text


def _answer(llm: LLM, report: JobReport) -> None:
    """Complete what can be completed of ``report.records``; the rest get their errors."""
    checked = [_check(llm, record) for record in report.records]
    good = [record for record in checked if record.error is None]
    report.total = sum(record.params.n for record in good)
    began = time.perf_counter()
    with ProgressLine(report.total) as line:

        def progress(finished: int, tokens: int) -> None:
            report.finished, report.tokens = finished, tokens
            line.update(finished, tokens)

        prompts = [record.prompt for record in good if record.prompt is not None]
        outputs = llm.generate(prompts, [r.params for r in good], progress=progress)
    answers = dict(zip((r.id for r in good), outputs, strict=True))
    for i, record in enumerate(checked):
        if record.id in answers and any(
            o.finish_reason == "error" for o in answers[record.id].outputs
        ):
            del answers[record.id]
            checked[i] = record.failed(
                f"the logits became NaN or infinite in {llm.engine_config.dtype}; "
                "bfloat16 and float32 have more range than float16"
            )
    report.records, report.outputs = checked, answers
    report.seconds = time.perf_counter() - began
    report.tokens = sum(len(o.token_ids) for out in outputs for o in out.outputs)


def _say_interrupted(report: JobReport, output_path: Path) -> None:
    done = f"{report.finished} of {report.total} completions" if report.total else "nothing"
    left = "is as it was" if output_path.exists() else "was not written"
    with contextlib.suppress(OSError):  # whoever read our stderr may be gone
        print(
            f"{done} done when it was stopped; {output_path} {left}. "
            "The same command starts again from the beginning",
            file=sys.stderr,
            flush=True,
        )


def _check(llm: LLM, record: Record) -> Record:
    """The record with its prompt as ids, or with what is wrong with it."""
    if record.prompt is None:
        return record
    try:
        request = llm.make_request(record.prompt, record.params)
    except TprtError as error:
        return record.failed(error.one_line)
    return replace(record, prompt={"prompt_token_ids": request.prompt_token_ids})
