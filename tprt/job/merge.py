"""Joins the outputs of all shards of a job into one, in input order.

Trusts nothing that it can check: every shard says in its status that it is finished, of which job, and
what its output must be. Knows files and lines; what stands in a line is copied.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tprt.errors import ConfigError
from tprt.job.fingerprint import difference
from tprt.job.input_file import Shard
from tprt.job.journal import journal_path
from tprt.job.output_file import AtomicOutput, resolved
from tprt.job.status_file import JobStatus, read_status

FINISH_IT = "run the command of that shard again; it goes on where it stopped"


@dataclass(frozen=True)
class MergeReport:
    """What was merged.

    Args:
        failed: error records among ``records``.
        sha256, size: of the output.
    """

    shards: int
    records: int
    failed: int
    tokens: int
    sha256: str
    size: int


@dataclass(frozen=True)
class _Part:
    """A shard that is finished."""

    shard: Shard
    path: Path
    status: JobStatus


def merge_shards(output: Path) -> MergeReport:
    """Write ``output`` from ``output.0-of-N`` to ``output.(N-1)-of-N``, which stay as they are.

    Record n of the input is line n // N of shard n % N.

    Raises:
        ConfigError: shards are missing, unfinished, of different jobs, or not what their status says.
        OutputError: the output cannot be written.
    """
    output = resolved(output)
    atomic = AtomicOutput(output)
    if journal_path(output).exists():
        raise ConfigError(
            "a job without shards is unfinished here",
            where=str(journal_path(output)),
            hint="finish it, or remove its journal if the shards are to take its place",
        )
    try:
        parts = [_finished(shard, output) for shard in _find_shards(output)]
        total = _check_one_job(parts)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(part.path.open("rb")) for part in parts]
            written = atomic.write(_in_input_order(parts, files, total))
    except OSError as error:
        raise _unreadable(error) from error
    return MergeReport(
        shards=len(parts),
        records=total,
        failed=sum(part.status.failed for part in parts),
        tokens=sum(part.status.tokens for part in parts),
        sha256=written.sha256,
        size=written.size,
    )


def _find_shards(output: Path) -> list[Shard]:
    """All shards of the one job whose outputs, journals or status files stand beside ``output``."""
    pattern = re.compile(
        rf"{re.escape(output.name)}\.([0-9]{{1,6}})-of-([0-9]{{1,6}})(\.journal|\.status\.json)?"
    )
    matches = (pattern.fullmatch(path.name) for path in output.parent.iterdir())
    # Not 7-of-4, which no shard is called.
    found = [match for match in matches if match and int(match[1]) < int(match[2])]
    counts = sorted({int(match[2]) for match in found})
    if not counts:
        raise ConfigError(
            "there are no shards to merge",
            where=f"{output}.0-of-N",
            hint="the --output that the jobs with --shard i/N had",
        )
    if len(counts) > 1:
        raise ConfigError(
            f"there are shards of {' and of '.join(map(str, counts))}",
            where=str(output.parent),
            hint="move those away that are not to be merged",
        )
    shards = [Shard(index, counts[0]) for index in range(counts[0])]
    known = {int(match[1]) for match in found}
    if missing := [shard for shard in shards if shard.index not in known]:
        raise ConfigError(
            f"{len(missing)} of {counts[0]} shards are missing: {_listed(missing)}",
            where=str(output.parent),
            hint=f"run them: the same command with --shard {missing[0]}",
        )
    return shards


def _listed(shards: list[Shard], most: int = 20) -> str:
    """Their numbers, the first of them where they are many."""
    text = ", ".join(str(shard.index) for shard in shards[:most])
    return text if len(shards) <= most else f"{text} and {len(shards) - most} more"


def _finished(shard: Shard, output: Path) -> _Part:
    """Raises ConfigError when the shard has no output that is complete, by all that can be seen."""
    path = shard.path(output)
    status = read_status(path)
    if journal_path(path).exists():
        state = f": {status.finished} of {status.total} records are done" if status else ""
        raise ConfigError(
            f"shard {shard} is not finished{state}", where=str(journal_path(path)), hint=FINISH_IT
        )
    if status is None or status.state != "finished":
        said = "has no status that can be read" if status is None else f"is {status.state}"
        raise ConfigError(f"shard {shard} {said}", where=str(path), hint=FINISH_IT)
    if not path.is_file():
        raise ConfigError(f"the output of shard {shard} is gone", where=str(path), hint=FINISH_IT)
    if status.fingerprint.get("shard") != str(shard):
        raise ConfigError(
            f"the status of shard {shard} is that of {status.fingerprint.get('shard')}",
            where=str(path),
            hint="give the files of the shards their own names again",
        )
    return _Part(shard, path, status)


def _check_one_job(parts: list[_Part]) -> int:
    """The number of records of the input. Raises ConfigError when the parts are not of one job."""
    first, *others = [part.status.fingerprint | {"shard": None} for part in parts]
    for part, fingerprint in zip(parts[1:], others, strict=True):
        names = f"in shard {parts[0].shard}", f"in shard {part.shard}"
        if different := difference(first, fingerprint, *names):
            raise ConfigError(
                "\n    ".join(["the shards are not of one job:", *different]),
                where=str(part.path),
                hint="run one of the two again with the settings and the input of the other",
            )
    try:
        return int(first["input"]["records"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "the status does not say how many records the input has",
            where=str(parts[0].path),
            hint=FINISH_IT,
        ) from error


def _in_input_order(parts: list[_Part], files: Sequence[BinaryIO], total: int) -> Iterator[bytes]:
    """The lines of all files in turn.

    What the files are is known only at the end. The caller gives its output a name after that.
    """
    digests = [hashlib.sha256() for _ in parts]
    try:
        for number in range(total):
            turn = number % len(parts)
            line = files[turn].readline()
            digests[turn].update(line)
            if not line.endswith(b"\n"):
                raise _not_as_written(parts[turn])
            yield line[:-1]
        for part, file, digest in zip(parts, files, digests, strict=True):
            if file.read(1) or digest.hexdigest() != part.status.output_sha256:
                raise _not_as_written(part)
    except OSError as error:
        raise _unreadable(error) from error


def _not_as_written(part: _Part) -> ConfigError:
    size = part.path.stat().st_size
    return ConfigError(
        f"the output of shard {part.shard} is not what was written: {size} bytes, "
        f"its status says {part.status.output_size} and another digest or number of lines",
        where=str(part.path),
        hint="bring the file back, or remove it with its status and run that shard again",
    )


def _unreadable(error: OSError) -> ConfigError:
    return ConfigError(
        f"the shards cannot be read: {error.strerror or error}",
        where=str(error.filename or ""),
        hint="files that may be read; for very many shards, ulimit -n above their number",
    )
