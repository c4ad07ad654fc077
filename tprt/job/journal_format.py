"""The journal's lines: how they are written, and how a file is read that may be damaged anywhere.

Each line is the CRC-32 of its payload in 8 hex digits, a blank, the payload:

    fingerprint {"format": 1, "fingerprint": {...}}        the first line, durable before any other
    attempt {"attempt": 2, "host": "a", "pid": 71, "started": 1790000000.0}
    begin {"lines": [4, 5], "alone": false}                these records went in flight
    finish 4 240 0 {"id": "x", ...}                        line, tokens, whether it failed, output line
    end {"kind": "crash", "cause": "..."}                  how the attempt ended

The output line is the output's own, byte for byte. Knows neither what the lines mean together nor who
writes them.
"""

import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

FORMAT = 1
LINES_PER_TICK = 1000
HEAD_BYTES = 2**20  # of a line that recovery holds; only results are longer
_PREFIX = 9  # CRC and blank


class Result(NamedTuple):
    """A ``finish`` line."""

    line: int
    tokens: int
    failed: bool
    text: bytes


class Entry(NamedTuple):
    """A line as it stands in the file.

    Args:
        offset, size: bytes, CRC and line end included.
        payload: its first MiB; None for a line that is torn or damaged.
    """

    offset: int
    size: int
    payload: bytes | None

    def holds(self, kind: str) -> bool:
        return self.payload is not None and self.payload.startswith(kind.encode() + b" ")

    @property
    def result(self) -> Result | None:
        """What a ``finish`` line says, the beginning of its text at least; None for other lines."""
        if self.payload is None or not self.payload.startswith(b"finish "):
            return None
        _, line, tokens, failed, text = self.payload.split(b" ", 4)
        return Result(int(line), int(tokens), failed == b"1", text)

    @property
    def values(self) -> dict[str, Any]:
        """What a line of any other kind says."""
        assert self.payload is not None
        found: dict[str, Any] = json.loads(self.payload.partition(b" ")[2])
        return found


def encode(kind: str, values: dict[str, Any]) -> bytes:
    """A line of any kind but ``finish``."""
    line = _line(f"{kind} {json.dumps(values)}".encode())
    assert len(line) <= HEAD_BYTES, "recovery reads these lines whole"
    return line


def encode_result(line: int, tokens: int, failed: bool, text: str) -> bytes:
    """A ``finish`` line. ``text`` must be UTF-8 without line ends, as JSON in one line is."""
    payload = f"finish {line} {tokens} {failed:d} {text}".encode()
    assert b"\n" not in payload, "an output line is one line"
    return _line(payload)


def _line(payload: bytes) -> bytes:
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


def read_entries(file: BinaryIO, tick: Callable[[], None] = lambda: None) -> Iterator[Entry]:
    """All lines from the start, damaged ones too. Holds a MiB at a time, however long a line is.

    Args:
        tick: called every few lines.
    """
    file.seek(0)
    offset = number = 0
    while head := file.readline(HEAD_BYTES):
        last, size = head, len(head)
        crc = zlib.crc32(head[_PREFIX:].removesuffix(b"\n"))
        while not last.endswith(b"\n") and (last := file.readline(HEAD_BYTES)):
            size += len(last)
            crc = zlib.crc32(last.removesuffix(b"\n"), crc)
        whole = last.endswith(b"\n") and head[:_PREFIX] == b"%08x " % crc
        yield Entry(offset, size, head[_PREFIX:].removesuffix(b"\n") if whole else None)
        offset, number = offset + size, number + 1
        if number % LINES_PER_TICK == 0:
            tick()


def read_result(file: BinaryIO, offset: int) -> Result:
    """The ``finish`` line at ``offset``, whole. Raises ValueError when it is damaged."""
    file.seek(offset)
    line = file.readline()
    payload = line[_PREFIX:].removesuffix(b"\n")
    result = Entry(offset, len(line), payload).result
    if result is None or line != _line(payload):
        raise ValueError(f"damaged at byte {offset}")
    return result


def reader(fd: int, end: int) -> BinaryIO:
    """Reads the first ``end`` bytes of a descriptor, at a position of its own, and leaves it open."""
    return io.BufferedReader(_Window(fd, end), 2**16)


class _Window(io.RawIOBase):
    # open(fd) would share one position among all readers of the descriptor, and a second open of the
    # path may find another file.
    def __init__(self, fd: int, end: int) -> None:
        self._fd, self._end, self._at = fd, end, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._end - self._at)]
        count = os.preadv(self._fd, [view], self._at) if view else 0
        self._at += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence != os.SEEK_END
        self._at = offset if whence == os.SEEK_SET else self._at + offset
        return self._at
