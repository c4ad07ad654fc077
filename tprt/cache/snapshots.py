"""Which rows of slot caches hold the state after the beginning of some text, so that it need not be
computed again.

State has no middle: one that was reached can be copied and gone on from, never cut short. Only rank 0
runs this; the others are told which row to copy where. Knows rows and keys: no tensors, no sequences.
"""

from collections import OrderedDict
from collections.abc import Sequence


class SnapshotPool:
    """Keys of texts, each with a row; the least recently used one gives its row up.

    Args:
        rows: beyond those of sequences.
    """

    def __init__(self, rows: range) -> None:
        self.capacity = len(rows)
        self._free = list(reversed(rows))
        self._row_of: OrderedDict[bytes, int] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._row_of

    def find(self, keys: Sequence[bytes]) -> tuple[int, int] | None:
        """(index, row) of the last of ``keys``, of ever longer beginnings, that is here."""
        for index in range(len(keys) - 1, -1, -1):
            row = self._row_of.get(keys[index])
            if row is not None:
                self._row_of.move_to_end(keys[index])
                return index, row
        return None

    def take(self, key: bytes) -> int | None:
        """A row for the state behind ``key``, to be copied there; None if it is here or there is no row.

        What the row held before is forgotten.
        """
        if key in self._row_of or not self.capacity:
            return None
        row = self._free.pop() if self._free else self._row_of.popitem(last=False)[1]
        self._row_of[key] = row
        return row

    def forget(self, keys: Sequence[bytes]) -> None:
        """Let nobody find these: what their rows hold is not to be trusted."""
        for key in keys:
            if (row := self._row_of.pop(key, None)) is not None:
                self._free.append(row)

    def clear(self) -> None:
        self.forget(list(self._row_of))
