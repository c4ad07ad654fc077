"""Figures of the long run: where they are kept, and the table in docs/reliability.md made of them.

python tests/fault_results.py      # writes the table again
"""

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path

from fault_cases import CASES, PHASES, Case

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "bench" / "cpu-faults.json"
DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: made by tests/fault_results.py -->", "<!-- faults: end -->"


def load_results() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}


def keep_result(case: Case, seconds: list[float], text: str, status: dict) -> None:
    """Put the figures of one case beside those of the others."""
    found = load_results()
    found["cases"][case.id] = {
        "fault": case.name,
        "phase": case.phase,
        "target": case.target,
        "launcher": case.launcher,
        "exit_code": status["exit_code"],
        "kind": status["error"]["kind"],
        "said": what_was_said(text),
        "deadline": case.deadline,
        "seconds": [round(value, 2) for value in seconds],
        "median": round(statistics.median(seconds), 2),
        "max": round(max(seconds), 2),
    }
    found |= {"machine": machine(), "commit": commit()}
    RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def keep_fact(name: str, text: str) -> None:
    """What else the long run has found, as a sentence."""
    found = load_results()
    found.setdefault("facts", {})[name] = text
    RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def machine() -> str:
    import torch

    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{os.cpu_count()} CPU cores, gloo, {versions}"


def commit() -> str:
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def what_was_said(text: str) -> str:
    """The first line that tells users why the job has ended."""
    for pattern in (r"tprt: error: (ended because of .*)", r"tprt: error: (.*)", r"(tprt: .*)"):
        if found := re.search(pattern, text):
            said = re.sub(r"process \d+", "process N", found[1])
            return re.sub(r"of step \d+", "of step N", said)
    return ""


# ---------------------------------------------------------------- the table


def rows() -> list[tuple[str, str, str]]:
    """What has a row: fault, target and launcher, in the order of the cases."""
    return list(dict.fromkeys((case.name, case.target, case.launcher) for case in CASES))


def table(found: dict) -> str:
    lines = [
        "| fault | of | started with | code | the others say | " + " | ".join(PHASES) + " |",
        "|---|---|---|---|---|" + "---|" * len(PHASES),
    ]
    for name, target, launcher in rows():
        cases = [c for c in CASES if (c.name, c.target, c.launcher) == (name, target, launcher)]
        kept = {case.phase: found["cases"].get(case.id) for case in cases}
        told = next((r for phase in ("decode", *PHASES) if (r := kept.get(phase))), None)
        cells = [figures(kept[phase]) if phase in kept else "" for phase in PHASES]
        said = told["said"] if told else ""
        start = "`--nproc 2`" if launcher == "nproc" else "torchrun"
        lines.append(
            f"| {name} | {target} | {start} | {cases[0].code} | {said} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def figures(result: dict | None) -> str:
    if result is None:
        return "not measured"
    return f"{result['median']:.1f} / {result['max']:.1f} ({len(result['seconds'])})"


def section(found: dict) -> str:
    runs = sum_of_runs(found["cases"].values())
    facts = [f"Measured on {found.get('machine', 'nothing yet')}; {runs} runs.", table(found)]
    facts += [f"- {text}" for _, text in sorted(found.get("facts", {}).items())]
    return "\n\n".join([BEGIN, *facts, END])


def sum_of_runs(results: Iterable[dict]) -> int:
    return sum(len(result["seconds"]) for result in results)


def with_section(document: str, found: dict) -> str:
    head, _, rest = document.partition(BEGIN)
    return head + section(found) + rest.partition(END)[2]


def write_document() -> None:
    DOCUMENT.write_text(with_section(DOCUMENT.read_text(), load_results()))


if __name__ == "__main__":
    write_document()
