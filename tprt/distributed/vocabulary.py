"""Which ids of a vocabulary have rows in memory, and how those are cut over ranks.

Ids keep their numbers everywhere; only the rows of embedding and head, and the columns of logits, leave
the removed ones out. Knows numbers: no tokenizer, no model, no weights.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from tprt.errors import ConfigError

SHOWN_RANGES = 4
IdRange = tuple[int, int]  # the first and the last id, both inside


@dataclass(frozen=True)
class Vocabulary:
    """Columns are the kept ids in ascending order; rank r of n has columns r * part to (r + 1) * part.

    Columns past the last kept id are padding of that cut and stand for ids from ``size`` on, so that ids
    ascend with columns on every rank.

    Args:
        size: ids in all, rows of the tensors on disk.
        removed: ids without rows, as ranges in any order.

    Raises:
        ConfigError: a range is empty, reaches outside the vocabulary or into another one, or nothing
            is left.
    """

    size: int
    removed: tuple[IdRange, ...] = ()

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.removed))
        object.__setattr__(self, "removed", ordered)
        previous = -1
        for first, last in ordered:
            if first > last:
                raise ConfigError(
                    f"model.trim_vocab names ids {first} to {last}, which are none",
                    hint=f"the smaller one first: [{last}, {first}]",
                )
            if not 0 <= first <= last < self.size:
                raise ConfigError(
                    f"model.trim_vocab names ids {first} to {last}; the vocabulary has 0 to "
                    f"{self.size - 1}",
                    hint="ranges [first, last] of this model's ids",
                )
            if first <= previous:
                raise ConfigError(
                    f"model.trim_vocab names id {first} twice", hint="ranges that do not overlap"
                )
            previous = last
        if not self.num_kept:
            raise ConfigError(
                f"model.trim_vocab removes all {self.size} ids", hint="ranges that leave some"
            )

    @property
    def num_removed(self) -> int:
        return sum(last - first + 1 for first, last in self.removed)

    @property
    def num_kept(self) -> int:
        return self.size - self.num_removed

    def part(self, ranks: int) -> int:
        """Columns of each of ``ranks``, padding at the end of the last ones included."""
        return -(-self.num_kept // ranks)

    def removed_of(self, ids: Iterable[int]) -> list[int]:
        """Those of ``ids`` that have no row, in their order."""
        if not self.removed:
            return []
        firsts = [first for first, _ in self.removed]
        found = ((i, bisect_left(firsts, i + 1) - 1) for i in ids)
        return [i for i, at in found if at >= 0 and i <= self.removed[at][1]]

    def valid_columns(self, num_valid: int, rank: int = 0, ranks: int = 1) -> int:
        """Columns of ``rank`` whose ids are below ``num_valid``; they are its first ones."""
        num_valid = min(num_valid, self.size)
        gone = sum(max(0, min(last + 1, num_valid) - first) for first, last in self.removed)
        part = self.part(ranks)
        return min(max(0, num_valid - gone - rank * part), part)

    def runs(self, rank: int, ranks: int) -> list[range]:
        """Ids of the columns of ``rank``, as ascending ranges without its padding."""
        part = self.part(ranks)
        start, stop = rank * part, (rank + 1) * part
        found, column, begin = [], 0, 0
        for first, last in (*self.removed, (self.size, self.size)):
            low, high = max(start, column), min(stop, column + first - begin)
            if low < high:
                found.append(range(begin + low - column, begin + high - column))
            column, begin = column + first - begin, last + 1
        return found

    def column_ids(self, rank: int, ranks: int, device: torch.device) -> torch.Tensor:
        """int64 [part], ascending: the id of each column of ``rank``."""
        part = self.part(ranks)
        if device.type == "meta":  # a plan, of as many ids as its config likes
            return torch.empty(part, dtype=torch.int64, device=device)
        start, stop = rank * part, (rank + 1) * part
        padding = range(self.size + max(start - self.num_kept, 0), self.size + stop - self.num_kept)
        runs = [np.arange(run.start, run.stop) for run in (*self.runs(rank, ranks), padding)]
        return torch.from_numpy(np.concatenate(runs)).to(device)

    @cached_property
    def columns(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """int64 [size]: the column of each id on a single rank, -1 where it has none."""
        kept = np.ones(self.size, dtype=np.int64)
        for first, last in self.removed:
            kept[first : last + 1] = 0
        return np.where(kept, kept.cumsum() - 1, -1)

    def column_table(self, device: torch.device) -> torch.Tensor | None:
        """``columns`` on the device; None where nothing is removed and ids are columns themselves."""
        return torch.from_numpy(self.columns).to(device) if self.removed else None

    def row_of(self, rank: int, ranks: int, device: torch.device) -> torch.Tensor:
        """int64 [size]: where each id lies among the columns of ``rank``; ``part`` for ids elsewhere."""
        if device.type == "meta":
            return torch.empty(self.size, dtype=torch.int64, device=device)
        part = self.part(ranks)
        local = self.columns - rank * part
        local[(self.columns < 0) | (local < 0) | (local >= part)] = part
        return torch.from_numpy(local).to(device)


def show_ranges(ranges: Sequence[IdRange]) -> str:
    """For people: "3-70002, 71000"; the first few."""
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in ranges[:SHOWN_RANGES]]
    return ", ".join(shown + ["..."] * (len(ranges) > SHOWN_RANGES))
