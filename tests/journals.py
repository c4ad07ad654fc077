"""Journals for tests: open, fill and read them, also in a process of its own."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from conftest import ROOT

from tprt.job.journal import Journal
from tprt.job.journal_format import read_entries

FINGERPRINT = {"input": {"sha256": "ab"}, "sampling": {"temperature": 0.0}, "version": "1"}


def opened(path: Path, **options) -> Journal:
    return Journal.open(path, FINGERPRINT, **({"wait_s": 0.0} | options))


def finish(journal: Journal, *lines: int) -> None:
    for line in lines:
        journal.finish(line, result(line), tokens=line, failed=line % 5 == 0)


def result(line: int) -> str:
    return json.dumps({"id": str(line), "text": "é \u2028" * (line % 4)}, ensure_ascii=False)


def contents(journal: Journal) -> dict[int, str]:
    found = list(journal.results())
    assert [line for line, _ in found] == sorted({line for line, _ in found})
    return dict(found)


def assert_whole(path: Path) -> None:
    with path.open("rb") as file:
        assert all(entry.payload for entry in read_entries(file))


def run(code: str, *argv: object, fault: str = "", wrap: tuple[str, ...] = ()):
    env = os.environ | {"PYTHONPATH": str(ROOT), "TPRT_FAULT": fault}
    command = [*wrap, sys.executable, "-c", textwrap.dedent(code), *map(str, argv)]
    return subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=120, check=False
    )
