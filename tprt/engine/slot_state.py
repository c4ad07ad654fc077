"""What every slot keeps on the device from one step to the next, at fixed addresses.

A slot is a row of these tensors; a sequence has one while it runs. Changed only by what step records
say, so it is the same on every rank. Knows tensors and options: no sequences, no text.

Legend: S slots, N blocks of the longest sequence, V columns of the logits of all ranks.
"""

from collections.abc import Sequence

import numpy as np
import torch

from tprt.distributed.vocabulary import Vocabulary
from tprt.engine.step_record import SlotOptions
from tprt.engine.transfer import upload

NEG_INF = float("-inf")


class SlotState:
    """Args:
    num_slots: S. num_blocks: N. num_columns: V.
    vocabulary: says which columns ids have.
    """

    def __init__(
        self,
        num_slots: int,
        num_blocks: int,
        num_columns: int,
        vocabulary: Vocabulary,
        device: torch.device,
    ) -> None:
        self.device, self.num_columns, self.vocabulary = device, num_columns, vocabulary
        self._columns = vocabulary.column_table(device)

        def filled(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((num_slots,), value, dtype=dtype, device=device)

        self.block_tables = torch.zeros(num_slots, num_blocks, dtype=torch.int64, device=device)
        self.last_tokens = filled(0, torch.int64)
        self.keys = filled(0, torch.int64)
        self.greedy = filled(1, torch.bool)
        self.temperature = filled(1, torch.float32)  # 1 where greedy
        self.top_k = filled(0, torch.int64)
        self.top_p = filled(1, torch.float32)
        self.min_p = filled(0, torch.float32)
        self.repetition = filled(1, torch.float32)
        self.presence = filled(0, torch.float32)
        self.frequency = filled(0, torch.float32)
        # [S, V], made when the first slot needs them: int32 counts of drawn ids, bool ids of prompt
        # and completion, float32 added to the logits (-inf forbids); each id in its column.
        self.counts: torch.Tensor | None = None
        self.seen: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self._true = torch.ones((), dtype=torch.bool, device=device)
        self.sampled: set[int] = set()  # slots that are not greedy
        self._biased: set[int] = set()  # slots whose row of ``bias`` is not zero

    def make_tables(self) -> None:
        """Allocate what penalties and bias need, so that graphs find it at fixed addresses."""
        self._make_counts()
        self._make_bias()

    def _make_counts(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.counts is None or self.seen is None:
            shape = (len(self.keys), self.num_columns)
            self.counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        return self.counts, self.seen

    def _make_bias(self) -> torch.Tensor:
        if self.bias is None:
            self.bias = torch.zeros(len(self.keys), self.num_columns, device=self.device)
        return self.bias

    def begin(self, options: SlotOptions) -> None:
        """A sequence takes ``options.slot``; nothing of the one before it remains."""
        slot = options.slot
        # fill_, here and below: to assign a number is a copy from the host that waits for the device.
        self.block_tables[slot].fill_(0)
        self.last_tokens[slot].fill_(0)
        self.keys[slot].fill_(options.seed_key)
        self.greedy[slot].fill_(options.temperature == 0.0)
        (self.sampled.discard if options.temperature == 0.0 else self.sampled.add)(slot)
        self.temperature[slot].fill_(options.temperature or 1.0)
        self.top_k[slot].fill_(options.top_k)
        self.top_p[slot].fill_(options.top_p)
        self.min_p[slot].fill_(options.min_p)
        self._begin_penalties(options)
        self._begin_bias(options)

    def _begin_penalties(self, options: SlotOptions) -> None:
        slot = options.slot
        values = options.repetition_penalty, options.presence_penalty, options.frequency_penalty
        for kept, value in zip(
            (self.repetition, self.presence, self.frequency), values, strict=True
        ):
            kept[slot].fill_(value)
        if values == (1.0, 0.0, 0.0):
            return  # they change nothing, whatever the tables hold
        counts, seen = self._make_counts()
        history = self._upload(options.history)
        drawn = self._upload(options.history[options.num_prompt_tokens :])
        counts[slot].fill_(0)
        counts[slot].index_add_(0, drawn, torch.ones_like(drawn, dtype=torch.int32))
        seen[slot].fill_(False)
        seen[slot].index_fill_(0, history, True)

    def _begin_bias(self, options: SlotOptions) -> None:
        slot = options.slot
        if slot in self._biased:
            self._make_bias()[slot].fill_(0.0)
            self._biased.remove(slot)
        if not options.bias and not options.allowed:
            return
        self._biased.add(slot)
        row = self._make_bias()[slot]
        if options.allowed:
            row.fill_(NEG_INF)
            row.index_fill_(0, self._upload(options.allowed), 0.0)
        for token, value in options.bias:
            if (column := int(self.vocabulary.columns[token])) >= 0:
                row[column] += value

    def _upload(self, ids: Sequence[int]) -> torch.Tensor:
        """The columns of ``ids`` that have one, int64 on the device."""
        columns = np.array(ids, dtype=np.int64)
        if self._columns is not None:
            columns = self.vocabulary.columns[columns]
            columns = columns[columns >= 0]
        return upload(columns, self.device)

    def take(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Remember the ids drawn for ``slots``, int64 [R] each.

        A slot occurs once, the scratch slot of padding rows excepted: nobody reads what it keeps.
        """
        self.last_tokens.index_copy_(0, slots, tokens)
        if self.counts is not None and self.seen is not None:
            tokens = tokens.clamp(min=0)  # NON_FINITE ends its sequence anyway
            if self._columns is not None:
                tokens = self._columns[tokens].clamp(min=0)
            self.counts[slots, tokens] += 1
            self.seen.index_put_((slots, tokens), self._true)

    def adjust(self, logits: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Penalties, then bias, on float32 [R, V] of slots int64 [R]. Formulas as in vLLM.

        repetition: l / p where l > 0, else l * p, for ids of prompt and completion; then
        l - frequency * count - presence * (count > 0) over the completion. A slot without these
        options has values that change nothing.
        """
        if self.counts is not None and self.seen is not None:
            counts = self.counts[slots]
            repetition = self.repetition[slots].unsqueeze(1)
            repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
            logits = torch.where(self.seen[slots], repeated, logits)
            logits = logits - self.frequency[slots].unsqueeze(1) * counts
            logits = logits - self.presence[slots].unsqueeze(1) * (counts > 0)
        return logits if self.bias is None else logits + self.bias[slots]
