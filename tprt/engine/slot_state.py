"""What every slot keeps on the device from one step to the next, at fixed addresses.

A slot is a row of these tensors; a sequence has one while it runs. Changed only by what step records
say, so it is the same on every rank. Knows tensors and options: no sequences, no text.

Legend: S slots, N blocks of the longest sequence, V vocabulary with its padding.
"""

import torch

from tprt.engine.step_record import SlotOptions

NEG_INF = float("-inf")


class SlotState:
    """Args:
    num_slots: S. num_blocks: N. vocab_size: V.
    """

    def __init__(
        self, num_slots: int, num_blocks: int, vocab_size: int, device: torch.device
    ) -> None:
        self.device, self.vocab_size = device, vocab_size

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
        # and completion, float32 added to the logits (-inf forbids).
        self.counts: torch.Tensor | None = None
        self.seen: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.sampled: set[int] = set()  # slots that are not greedy
        self.penalized: set[int] = set()
        self.biased: set[int] = set()

    def begin(self, options: SlotOptions) -> None:
        """A sequence takes ``options.slot``; nothing of the one before it remains."""
        slot = options.slot
        self.block_tables[slot] = 0
        self.last_tokens[slot] = 0
        self.keys[slot] = options.seed_key
        self.greedy[slot] = options.temperature == 0.0
        (self.sampled.discard if options.temperature == 0.0 else self.sampled.add)(slot)
        self.temperature[slot] = options.temperature or 1.0
        self.top_k[slot], self.top_p[slot] = options.top_k, options.top_p
        self.min_p[slot] = options.min_p
        self._begin_penalties(options)
        self._begin_bias(options)

    def _begin_penalties(self, options: SlotOptions) -> None:
        slot = options.slot
        values = options.repetition_penalty, options.presence_penalty, options.frequency_penalty
        self.repetition[slot], self.presence[slot], self.frequency[slot] = values
        self.penalized.discard(slot)
        if values == (1.0, 0.0, 0.0):
            return
        self.penalized.add(slot)
        if self.counts is None or self.seen is None:
            shape = (len(self.keys), self.vocab_size)
            self.counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        history = torch.tensor(options.history, dtype=torch.int64, device=self.device)
        drawn = history[options.num_prompt_tokens :]
        self.counts[slot] = torch.bincount(drawn, minlength=self.vocab_size).int()
        self.seen[slot] = False
        self.seen[slot, history] = True

    def _begin_bias(self, options: SlotOptions) -> None:
        slot = options.slot
        self.biased.discard(slot)
        if not options.bias and not options.allowed:
            return
        self.biased.add(slot)
        if self.bias is None:
            self.bias = torch.zeros(len(self.keys), self.vocab_size, device=self.device)
        self.bias[slot] = NEG_INF if options.allowed else 0.0
        self.bias[slot, list(options.allowed)] = 0.0
        for token, value in options.bias:
            self.bias[slot, token] += value

    def take(self, slots: torch.Tensor, host_slots: list[int], tokens: torch.Tensor) -> None:
        """Remember the ids drawn for ``slots``; each slot occurs once. int64 [R] each."""
        self.last_tokens[slots] = tokens
        if self.penalized.isdisjoint(host_slots):
            return
        assert self.counts is not None and self.seen is not None
        rows = [i for i, slot in enumerate(host_slots) if slot in self.penalized]
        slots, tokens = (
            slots[rows],
            tokens[rows].clamp(min=0),
        )  # NON_FINITE ends its sequence anyway
        self.counts[slots, tokens] += 1
        self.seen[slots, tokens] = True

    def adjust(self, logits: torch.Tensor, host_slots: list[int]) -> None:
        """Penalties, then bias, on float32 [R, V], in place. Formulas as in vLLM.

        repetition: l / p where l > 0, else l * p, for ids of prompt and completion; then
        l - frequency * count - presence * (count > 0) over the completion.
        """
        rows = [i for i, slot in enumerate(host_slots) if slot in self.penalized]
        if rows:
            assert self.counts is not None and self.seen is not None
            slots = [host_slots[i] for i in rows]
            part, counts = logits[rows], self.counts[slots]
            repetition = self.repetition[slots].unsqueeze(1)
            repeated = torch.where(part > 0, part / repetition, part * repetition)
            part = torch.where(self.seen[slots], repeated, part)
            part -= self.frequency[slots].unsqueeze(1) * counts
            part -= self.presence[slots].unsqueeze(1) * (counts > 0)
            logits[rows] = part
        rows = [i for i, slot in enumerate(host_slots) if slot in self.biased]
        if rows:
            assert self.bias is not None
            logits[rows] += self.bias[[host_slots[i] for i in rows]]
