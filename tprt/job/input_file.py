"""The input of a batch job: a JSONL file that is read several times and never held.

A first pass takes its digest and refuses ids that stand twice, later ones yield its records. A file that
changes between or under them is refused, because the answers would belong to no input at all. Knows
nothing of what lines mean beyond their ids, and nothing of outputs.
"""

import contextlib
import hashlib
import os
import re
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from tprt.errors import ConfigError
from tprt.job.records import (
    BYTE_ORDER_MARK,
    MAX_LINE_BYTES,
    Record,
    long_record,
    parse_record,
    record_id,
)
from tprt.sampling_params import SamplingParams

PIECE_BYTES = 2**20  # of a line that is too long, read at a time
LINES_PER_LOOK = 256  # lines between two looks at whether the file has changed
# How such files begin; no line of JSON does.
COMPRESSED = {
    "gzip": b"\x1f\x8b",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ",
    "zstd": b"\x28\xb5\x2f\xfd",
    "zip": b"PK\x03\x04",
}
COMPARED_IDS = 1024  # suspected duplicates looked at in one pass, which bounds its memory


@dataclass(frozen=True)
class InputFacts:
    """What one pass over an input found.

    Args:
        sha256: of all its bytes, in hex.
        size: bytes.
        lines: with blank ones.
        records: lines that are not blank.
        identity: size, time of change, inode and device, by which later passes know it again; empty
            where they are not to look.
    """

    sha256: str
    size: int
    lines: int
    records: int
    identity: tuple[int, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Shard:
    """Every ``count``-th record of an input, beginning with the one numbered ``index`` from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From ``2/8``. Raises ConfigError for anything that is no shard."""
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
        index, count = map(int, match.groups()) if match else (0, 0)
        if not 0 <= index < count:
            raise ConfigError(
                f"the shard is {text!r}; shards count from 0",
                hint="of 8 shards the first is 0/8 and the last 7/8",
            )
        return cls(index, count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def path(self, output: Path) -> Path:
        """The output of this shard of the job that writes ``output``."""
        return output.with_name(f"{output.name}.{self.index}-of-{self.count}")

    def num_records(self, records: int) -> int:
        """How many of ``records`` are this shard's."""
        return len(range(self.index, records, self.count))


class _Line(NamedTuple):
    number: int  # from 1
    size: int  # bytes, line end included
    text: bytes | None  # None for a line over MAX_LINE_BYTES

    @property
    def id(self) -> str | None:
        return None if self.text is None else record_id(self.text, self.number)


def scan_input(path: Path) -> InputFacts:
    """Read the whole input once.

    Takes 8 bytes of memory per record, whatever the lines hold.

    Raises:
        ConfigError: it is no regular file, cannot be read, is compressed, changes meanwhile, or holds an
            id twice; then both lines are named.
    """
    digest, ids = hashlib.sha256(), array("q")
    lines = records = 0
    with _opened(path) as file:
        identity = _identity(file)
        for line in _lines(file, digest):
            if line.number == 1:
                _refuse_compressed(line, path)
            lines = line.number
            if _blank(line):
                continue
            records += 1
            if (found := line.id) is not None:
                ids.append(_id_hash(found))
        _check_unchanged(file, identity, path)
    suspects = _repeated(ids)
    for start in range(0, len(suspects), COMPARED_IDS):
        _refuse_duplicates(path, set(suspects[start : start + COMPARED_IDS].tolist()), identity)
    return InputFacts(digest.hexdigest(), identity[0], lines, records, identity)


class InputFile:
    """An input that was scanned.

    Args:
        facts: of ``scan_input``.
    """

    def __init__(self, path: Path, facts: InputFacts) -> None:
        self.path, self.facts = path, facts

    def records(
        self,
        defaults: SamplingParams,
        job_seed: int,
        shard: Shard | None = None,
        wanted: Callable[[int], bool] | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> Iterator[Record]:
        """The records in input order, one at a time; bad lines among them, with their errors.

        Args:
            shard: yield only its records; None for all.
            wanted: yield only records of lines for which it is true; the others are not parsed.
            tick: called now and then, also where nothing is yielded for long.

        Raises:
            ConfigError: the file is not what was scanned. This is known by its size, time and inode
                while it is read, and by its digest at the end.
        """
        shard = shard or Shard(0, 1)
        digest, ordinal = hashlib.sha256(), 0
        with _opened(self.path) as file:
            identity = self.facts.identity or _identity(file)
            _check_unchanged(file, identity, self.path)
            for line in _lines(file, digest):
                if line.number % LINES_PER_LOOK == 0:
                    tick()
                    _check_unchanged(file, identity, self.path)
                if _blank(line):
                    continue
                mine = ordinal % shard.count == shard.index
                if mine and (wanted is None or wanted(line.number)):
                    yield _record(line, defaults, job_seed)
                ordinal += 1
            _check_unchanged(file, identity, self.path)
        if digest.hexdigest() != self.facts.sha256:
            raise _changed(self.path)


def _record(line: _Line, defaults: SamplingParams, job_seed: int) -> Record:
    if line.text is None:
        return long_record(line.size, line.number, defaults)
    return parse_record(line.text, line.number, defaults, job_seed)


def _lines(file: BinaryIO, digest: "hashlib._Hash") -> Iterator[_Line]:
    """All lines; of one that is too long only its beginning is ever held."""
    number = 0
    while piece := file.readline(MAX_LINE_BYTES + 1):
        number, size = number + 1, len(piece)
        digest.update(piece)
        text: bytes | None = piece
        if size > MAX_LINE_BYTES:
            text = None
            while not piece.endswith(b"\n") and (piece := file.readline(PIECE_BYTES)):
                size += len(piece)
                digest.update(piece)
        elif number == 1:
            text = piece.removeprefix(BYTE_ORDER_MARK)
        yield _Line(number, size, text)


def _refuse_compressed(first: _Line, path: Path) -> None:
    for name, magic in COMPRESSED.items():
        if (first.text or b"").startswith(magic):
            raise ConfigError(
                f"the input is compressed ({name})",
                where=str(path),
                hint="unpack it first: a job reads its input more than once",
            )


def _blank(line: _Line) -> bool:
    return line.text is not None and not line.text.strip()


def _id_hash(record_id: str) -> int:
    # Python's own hash: 64 bits, and quick. It differs from process to process, which nothing sees.
    return hash(record_id)


def _repeated(hashes: "array[int]") -> npt.NDArray[np.int64]:
    """Hashes that stand more than once, each once. Sorts ``hashes`` in place: no second copy."""
    if not hashes:
        return np.zeros(0, np.int64)
    values = np.frombuffer(hashes, np.int64)
    values.sort()
    return np.unique(values[1:][values[1:] == values[:-1]])


def _refuse_duplicates(path: Path, suspects: set[int], identity: tuple[int, ...]) -> None:
    """Compare the ids behind equal hashes. Raises ConfigError when two are one."""
    seen: dict[bytes, int] = {}  # digests, as an id may be as long as a line
    with _opened(path) as file:
        _check_unchanged(file, identity, path)
        for line in _lines(file, hashlib.sha256()):
            record_id = None if _blank(line) else line.id
            if record_id is None or _id_hash(record_id) not in suspects:
                continue
            key = hashlib.sha256(record_id.encode("utf-8", "surrogatepass")).digest()
            if key in seen:
                raise ConfigError(
                    f"id {record_id[:200]!r} stands twice",
                    where=f"{path}, lines {seen[key]} and {line.number}",
                    hint="give every record an id of its own; without one it is the line number",
                )
            seen[key] = line.number
        _check_unchanged(file, identity, path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        # Asked before opening: to open a pipe is to wait for its writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ConfigError(
                f"the input {str(path)!r} is a folder, device or pipe",
                hint="a regular file: a job reads its input more than once",
            )
        with path.open("rb", buffering=2**18) as file:
            yield file
    except OSError as error:
        raise ConfigError(
            f"the input cannot be read: {error.strerror or error}",
            where=str(path),
            hint="an existing file with one JSON object per line",
        ) from error


def _identity(file: BinaryIO) -> tuple[int, ...]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev


def _check_unchanged(file: BinaryIO, identity: tuple[int, ...], path: Path) -> None:
    if _identity(file) != identity:
        raise _changed(path)


def _changed(path: Path) -> ConfigError:
    return ConfigError(
        "the input changed while the job read it",
        where=str(path),
        hint="put it back as it was and run the same command again, or begin again with --restart",
    )
