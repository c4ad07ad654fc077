"""What a journal's lines say together: which records are done, and which may have ended a run.

Plain values in little memory: a bit per input line, 8 bytes per record when offsets are asked for. Knows
no files.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

INTERRUPTED, FINISHED, CRASH, KILLED = "interrupted", "finished", "crash", "killed"
END_KINDS = (FINISHED, INTERRUPTED, CRASH, KILLED)
_QUARTERS = {CRASH: 2, KILLED: 1}
_QUARANTINED = 4

_BITS_SET = np.array([value.bit_count() for value in range(256)], np.uint8)


class LineSet:
    """A set of line numbers."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def add(self, line: int) -> bool:
        """Whether it was not in the set before."""
        byte, bit = line >> 3, 1 << (line & 7)
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1 - len(self._bits)))
        if self._bits[byte] & bit:
            return False
        self._bits[byte] |= bit
        self._count += 1
        return True

    def __contains__(self, line: int) -> bool:
        byte = line >> 3
        return byte < len(self._bits) and bool(self._bits[byte] & 1 << (line & 7))

    def __len__(self) -> int:
        return self._count

    def order(self, found: Iterable[tuple[int, int]]) -> Iterator[int]:
        """The second of each (line, value) in the order of the lines; the first pair of a line counts.

        ``found`` is read to its end first; its values are above 0. Other lines are skipped.

        Raises:
            ValueError: a line of the set was not found.
        """
        bits = bytes(self._bits)
        # Where a line stands in the order: lines in earlier bytes, then lower bits of its own.
        earlier = np.zeros(len(bits) + 1, np.int64)
        np.cumsum(_BITS_SET[np.frombuffer(bits, np.uint8)], out=earlier[1:])
        values = array("q", bytes(8 * self._count))
        for line, value in found:
            if line not in self:
                continue
            byte = line >> 3
            place = int(earlier[byte]) + (bits[byte] & (1 << (line & 7)) - 1).bit_count()
            values[place] = values[place] or value
        if not all(values):
            raise ValueError("a result is missing")
        return iter(values)


class CrashLedger:
    """Which records were in flight when attempts of a job ended badly.

    A record that was in flight then is a suspect: it may have been the cause, so it is retried alone.
    When it is in flight alone and the attempt ends badly again, that counts half if the program failed
    (an exception, memory, a stall, a signal of its own) and a quarter if it was killed from outside or
    left no word of its end, as SIGKILL or a power failure says less of a record than an exception does.
    At one in sum the record is given up: it is quarantined. Two crashes suffice, four kills do.
    """

    def __init__(self) -> None:
        self._in_flight: dict[int, bool] = {}
        self._running = False
        self._weights: Counter[int] = Counter()  # in quarters
        self._causes: dict[int, str] = {}  # of suspects

    @property
    def suspects(self) -> list[int]:
        """Lines to retry alone, in order."""
        return sorted(line for line in self._causes if not self._given_up(line))

    @property
    def quarantined(self) -> list[int]:
        """Lines that are given up and not finished, in order."""
        return sorted(filter(self._given_up, self._causes))

    def cause(self, line: int) -> str:
        """What ended the last attempt in which a suspect was in flight."""
        return self._causes[line]

    def attempt(self) -> None:
        """An attempt begins. One before it without an end was killed."""
        self.end(KILLED, "the run ended without a word, as after SIGKILL or a power failure")
        self._in_flight.clear()
        self._running = True

    def begin(self, lines: Iterable[int], alone: bool) -> None:
        self._in_flight.update(dict.fromkeys(lines, alone))

    def finish(self, line: int) -> None:
        self._in_flight.pop(line, None)
        self._weights.pop(line, None)
        self._causes.pop(line, None)

    def end(self, kind: str, cause: str) -> None:
        """The attempt ends; a second end says nothing more."""
        if self._running and kind in _QUARTERS:
            self._causes.update(dict.fromkeys(self._in_flight, cause))
            if list(self._in_flight.values()) == [True]:
                self._weights.update(dict.fromkeys(self._in_flight, _QUARTERS[kind]))
        self._running = False
        self._in_flight.clear()

    def _given_up(self, line: int) -> bool:
        return self._weights[line] >= _QUARANTINED
