"""The one argument of a forward pass. Passed along, never kept in a global."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeVar, cast

import torch

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Segments:
    """The tokens of a pass, sequence by sequence, for what keeps state in slots.

    Legend: T tokens, B sequences.

    Args:
        slots: int64 [B], no slot twice but that of padding.
        positions: int64 [T], the absolute position of each token.
        query_lens: tokens of each sequence, known on the host.
        starts: position of each sequence's first token in this pass, known on the host; None for a
            decode step, where each has one token and the host is not to look.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    query_lens: tuple[int, ...]
    starts: tuple[int, ...] | None

    @cached_property
    def is_start(self) -> torch.Tensor:
        """bool [T]: the first token of its sequence, whatever its slot holds."""
        return self.positions == 0

    @cached_property
    def first_rows(self) -> torch.Tensor:
        """int64 [B], the row of each sequence's first token in this pass."""
        return self._rows(accumulate(self.query_lens, initial=0))[: len(self.query_lens)]

    @cached_property
    def last_rows(self) -> torch.Tensor:
        """int64 [B]."""
        return self._rows(end - 1 for end in accumulate(self.query_lens))

    @cached_property
    def row_slots(self) -> torch.Tensor:
        """int64 [T], the slot of each token's sequence."""
        return self.slots if self.starts is None else self.slots[self.index]

    @cached_property
    def index(self) -> torch.Tensor:
        """int64 [T], which sequence each token is of."""
        return self._rows(i for i, count in enumerate(self.query_lens) for _ in range(count))

    def extend(
        self, before: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``before`` [B, K, W] put in front of each sequence's rows of ``x`` [T, W].

        Returns:
            [T + B K, W], and int64 [T]: where in it the K + 1 rows begin that end with each token's own;
            None for one after the other from the first on.
        """
        count, extra = len(before), before.shape[1]
        if count == 1:
            return torch.cat([before[0], x]), None
        rows = torch.arange(len(x), device=x.device) + self.index * extra
        ext = x.new_empty(len(x) + count * extra, x.shape[1])
        ext[rows + extra] = x
        begins = self.first_rows + torch.arange(count, device=x.device) * extra
        ext[(begins.unsqueeze(1) + torch.arange(extra, device=x.device)).flatten()] = (
            before.flatten(0, 1)
        )
        return ext, rows

    def tail(self, count: int) -> torch.Tensor:
        """int64: rows of the last ``count`` tokens of each sequence, of all where it has fewer."""
        pairs = zip(accumulate(self.query_lens), self.query_lens, strict=True)
        rows = (row for end, n in pairs for row in range(end - min(n, count), end))
        return self.once(("tail", count), lambda: self._rows(rows))

    def once(self, key: object, make: Callable[[], Made]) -> Made:
        """What every layer asks for again, made by the first."""
        if key not in self._made:
            self._made[key] = make()
        return cast(Made, self._made[key])

    @cached_property
    def _made(self) -> dict[object, object]:
        return {}

    def _rows(self, values: Iterable[int]) -> torch.Tensor:
        if self.starts is None:  # one row each, and nothing may come from the host
            return torch.arange(len(self.query_lens), device=self.slots.device)
        host, device = torch.tensor(list(values), dtype=torch.int64), self.slots.device
        # Pageable memory would make the copy wait for all that was launched before.
        return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """How the tokens of a pass lie in a paged KV cache.

    Args:
        slot_mapping: int64 [2, T], where each token's key (0) and value (1) go, as rows of a KV cache
            seen as [num_blocks * 2 * block_size, H, D].
        block_tables: int64 [B, N], the KV blocks of each sequence, unused entries 0.
        attention: how these tokens attend over it, planned once for all layers; see
            ``kernels.AttentionPlan``.
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    attention: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """Tokens of several sequences laid end to end; prefill chunks and decode rows may mix.

    Legend: T tokens of all sequences, B sequences.

    Args:
        input_ids: int64 [T].
        positions: int64 [T], the absolute position of each token.
        query_lens: tokens of each sequence in this pass (host side, B entries).
        logits_rows: int64 [R], the flat rows whose logits are wanted; None for all, in order.
        paged: for layers that keep something per token; None where the model has none.
        segments: for layers that keep something per sequence.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    query_lens: tuple[int, ...]
    logits_rows: torch.Tensor | None
    paged: PagedBatch | None
    segments: Segments
