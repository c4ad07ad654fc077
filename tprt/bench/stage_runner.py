"""Runs stages of commands, each stage within a time limit, and writes what they gave as JSON.

A stage's file begins with what was not run: what the kind of run leaves out, steps that failed or
were cut off, and tests that were skipped. Knows processes and files; what the stages are,
``gpu_check`` says.
"""

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

KILL_AFTER = 15  # seconds between being asked to end and being killed
TIMED_OUT = (124, 137)  # exit codes of ``timeout``


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        name: of the step within its stage.
        command: what runs, without the interpreter in front.
        kind: "bench" prints a report as its last line; "tests" is pytest.
    """

    name: str
    command: tuple[str, ...]
    kind: Literal["bench", "tests"] = "bench"


@dataclass(frozen=True)
class Stage:
    """Args:
    limit: seconds for all steps together.
    not_run: what this stage does not show.
    environment: variables of its steps.
    """

    name: str
    limit: int
    steps: Sequence[Step]
    not_run: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class Interrupted(Exception):
    """Args:
    told: of the stage that was under way, as ``run_stage`` returns it.
    """

    def __init__(self, told: dict[str, Any]) -> None:
        super().__init__("interrupted")
        self.told = told


def run_stage(
    stage: Stage,
    folder: Path,
    facts: Mapping[str, Any],
    log: TextIO,
    working_folder: Path | None = None,
) -> dict[str, Any]:
    """Run every step, whatever became of the one before; what ``<folder>/<stage>.json`` then holds.

    Args:
        facts: of the machine and the code, as they shall stand in the file.
        working_folder: where commands run; None is the current one.

    Raises:
        Interrupted: a KeyboardInterrupt came; the step has been ended, the file written.
    """
    began = time.monotonic()
    not_run, results = list(stage.not_run), []
    interrupted: KeyboardInterrupt | None = None
    for step in stage.steps:
        left = stage.limit - (time.monotonic() - began)
        if interrupted is not None or left < 1:
            why = "interrupted" if interrupted else f"no time was left of {stage.limit} s"
            not_run.append(f"{step.name}: {why}")
            continue
        print(f"--- {stage.name}: {step.name}", flush=True)
        environment = {**os.environ, **stage.environment}
        try:
            result = _run_step(step, left, environment, log, folder, working_folder)
        except KeyboardInterrupt as error:
            interrupted = error
            not_run.append(f"{step.name}: interrupted")
            continue
        results.append(result)
        not_run += _missing(step, result)
    ok = len(results) == len(stage.steps) and all(result["ok"] for result in results)
    told = {
        "not_run": not_run,
        "stage": stage.name,
        "ok": ok,
        **facts,
        "seconds": round(time.monotonic() - began, 1),
        "limit_s": stage.limit,
        "results": results,
    }
    (folder / f"{stage.name}.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    if interrupted is not None:
        raise Interrupted(told) from interrupted
    return told


def _run_step(
    step: Step,
    seconds: float,
    environment: dict[str, str],
    log: TextIO,
    folder: Path,
    working_folder: Path | None,
) -> dict[str, Any]:
    report = folder / f".{step.name}.xml"
    command = [sys.executable, *step.command]
    if step.kind == "tests":
        command += [f"--junitxml={report}", "-o", "junit_family=xunit2"]
    began, last = time.monotonic(), ""
    # ``timeout`` ends the children of its command too.
    limited = ["timeout", f"--kill-after={KILL_AFTER}", f"{seconds:.0f}", *command]
    log.write(f"\n$ {' '.join(command)}\n")
    with subprocess.Popen(
        limited,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=working_folder,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                if line.startswith('{"bench"'):
                    last = line
                else:
                    print(line, end="", flush=True)
        except KeyboardInterrupt:
            process.terminate()  # which ``timeout`` hands on, and repeats as a kill
            process.wait()
            raise
    log.flush()
    code = process.returncode
    result: dict[str, Any] = {
        "step": step.name,
        "ok": code == 0,
        "command": " ".join(["python", *step.command]),
        "exit_code": code,
        "timed_out": code in TIMED_OUT,
        "seconds": round(time.monotonic() - began, 1),
    }
    if step.kind == "tests":
        result["tests"] = read_junit(report) if report.exists() else None
        report.unlink(missing_ok=True)
    else:
        result["report"] = json.loads(last) if last else None
        result["ok"] = result["ok"] and bool(last)
        if last and result["report"]["details"].get("failed"):
            result["ok"] = False  # parts of a measurement that went wrong
    return result


def read_junit(path: Path) -> dict[str, Any]:
    """Numbers of tests, and names or reasons of those that did not pass."""
    found: dict[str, Any] = {"passed": 0, "failed": [], "skipped": {}}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            found["failed"].append(name)
        elif skipped is not None:
            reason = str(skipped.get("message") or "no reason given")
            found["skipped"][reason] = found["skipped"].get(reason, 0) + 1
        else:
            found["passed"] += 1
    return found


def _missing(step: Step, result: Mapping[str, Any]) -> list[str]:
    told = []
    if result["timed_out"]:
        told.append(f"{step.name}: cut off after {result['seconds']:.0f} s")
    elif not result["ok"]:
        told.append(f"{step.name}: failed with exit code {result['exit_code']}")
    report = result.get("report") or {}
    if skipped := report.get("details", {}).get("skipped"):
        told.append(f"{step.name}: {skipped}")
    tests = result.get("tests") or {}
    for reason, count in tests.get("skipped", {}).items():
        told.append(f"{step.name}: {count} tests skipped: {reason}")
    return told


def summary(stages: Sequence[Mapping[str, Any]]) -> str:
    """A short table: a line per stage, below it its steps and their main figures."""
    lines, told_once = [], set[str]()
    for told in stages:
        state = "ok" if told["ok"] else "FAILED"
        lines.append(f"{told['stage']:11} {state:6} {told['seconds']:6.0f} s")
        for result in told["results"]:
            state = "" if result["ok"] else "FAILED "
            lines.append(f"  {result['step']:22} {state}{headline(result)}")
            lines += [f"    {text}" for text in figures(result.get("report"))]
            lines += [
                f"    failed: {name}" for name in (result.get("tests") or {}).get("failed", ())
            ]
        lines += [f"  not run: {text}" for text in told["not_run"] if text not in told_once]
        told_once.update(told["not_run"])
    return "\n".join(lines)


def headline(result: Mapping[str, Any]) -> str:
    """The few figures of a step that a table has room for."""
    if tests := result.get("tests"):
        skipped = sum(tests["skipped"].values())
        return f"{tests['passed']} passed, {len(tests['failed'])} failed, {skipped} skipped"
    report = result.get("report")
    if not report:
        return f"nothing within {result['seconds']:.0f} s"
    parts = [f"{report['model']} {report['dtype']} TP {report['tp']}"]
    if report["tokens_per_s"] is not None:
        parts.append(f"{report['tokens_per_s']} tokens/s")
    if report["share_of_bandwidth"] is not None:
        parts.append(f"{report['share_of_bandwidth']:.1%} of the read bandwidth")
    parts += [f"{ratio} times {peer}" for peer, ratio in report["ratio"].items()]
    details = report["details"]
    parts += [
        f"{name} {details[name]}" for name in ("warm_seconds", "share_of_limit") if name in details
    ]
    return ", ".join(parts)


def figures(report: Mapping[str, Any] | None) -> list[str]:
    """The lines of a measurement that belong into a table, its kernels at their first shape alone."""
    details = report["details"] if report else {}
    lines = []
    for cell in details.get("cells", ()):
        if "skipped" not in cell:
            lines.append(
                f"batch {cell['batch']:3} context {cell['context']:6}: {cell['ms_per_step']:9.3f} ms, "
                f"{cell['tokens_per_s']:9.1f} tokens/s, {cell['share_of_bandwidth']:.1%}"
                + (_beside_dense(cell) if "zeros" in cell else "")
            )
    if "num_kernels" in details:
        needed = details["closed_form"]["bytes"]
        lines.append(
            f"{details['num_kernels']} kernels read {details['bytes']} bytes, {details['ratio']} times "
            f"the closed form of {needed}"
        )
    if trace := details.get("trace"):
        waits, idle = trace["waits_per_step"] or "none", trace["idle_share"]
        lines.append(f"waits per step {waits}, kernels {trace['kernels_per_step']}, idle {idle}")
    for line in details.get("alone", ()):
        lines.append(f"{line['tokens']:6} tokens: {line['ttft_ms']:9.2f} ms")
    for line in details.get("mixed", ()):
        kinds = ", ".join(
            f"{kind} {line[f'{kind}_ms']:.2f} ms" for kind in ("mixed", "chunk", "decode")
        )
        lines.append(f"{line['rows']:3} rows in a step of {line['step_tokens']}: {kinds}")
    for line in details.get("projection", {}).get("lines", ()):
        rates = ", ".join(
            f"{k} {v['tokens_per_s']}" for k, v in line.items() if isinstance(v, dict)
        )
        lines.append(
            f"projection: batch {line['batch']} context {line['context']}: {rates} tokens/s"
        )
    seen = set()
    for line in details.get("lines", ()):
        if "operation" not in line:
            lines.append(f"{line['bytes']:9} bytes: {line['us']}")
        elif (key := (line["operation"], line["body"])) not in seen:
            seen.add(key)
            lines.append(
                f"{line['operation']:21} {line['shape']:22} {line['body']:9} {line['us']:9.2f} us "
                f"{line['share']:6.1%}"
            )
    for part in details.get("failed", ()):
        lines.append(f"FAILED {part['group']} of {part['body']}: {part['error']}")
    for start in details.get("starts", ()):
        lines.append(f"{start['kind']:10} {start['seconds']:.2f} s: {start['phases']}")
    return lines


def _beside_dense(cell: Mapping[str, Any]) -> str:
    """Of a cell of ``decode --zeros``."""
    above = "above" if cell["above_dense_limit"] else "below"
    return (
        f", zeros {cell['zeros_measured']:.1%}: {cell['ratio']['dense']['median']} times dense, {above} "
        f"the dense limit of {cell['dense_limit_tokens_per_s']}"
    )
