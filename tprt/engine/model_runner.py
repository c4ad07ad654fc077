"""Carries out step records on one rank: resolves them against its own state, runs the model, draws.

Rank 0 and the others do exactly the same here. Owns the KV cache and the slots' state. Knows records
and tensors: not how sequences are chosen, no text, no files.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from tprt.batch import ForwardBatch
from tprt.cache.kv_cache import allocate_kv_cache
from tprt.distributed.communication import all_gather
from tprt.distributed.sharding import padded_part
from tprt.distributed.tp_group import TPGroup
from tprt.engine.digest import check_digests, digest
from tprt.engine.logprobs import MAX_LOGITS, Logprobs, token_logprobs
from tprt.engine.sampler import DrawRows, Sampler
from tprt.engine.slot_state import SlotState
from tprt.engine.step_record import ALL_LOGITS, DRAW, PROMPT_LOGPROBS, SlotOptions, StepRecord
from tprt.kernels import kernels_for
from tprt.models.persimmon import PersimmonForCausalLM


@dataclass
class StepResult:
    """What a step gave; its tensors may still be under way until ``check`` has returned.

    Args:
        step: number of the record.
        tokens: int64 [rows that draw].
        digests: int64 [ranks, fields of ``digest``].
        logprobs: of the drawn tokens; None where no row wants any.
        prompt_logprobs: of each PROMPT_LOGPROBS row, in the order of the record.
        logits: float32 [tokens, vocab_size] on the host of each ALL_LOGITS row, in that order.
    """

    step: int
    tokens: torch.Tensor
    digests: torch.Tensor
    logprobs: Logprobs | None = None
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def check(self) -> list[int]:
        """The tokens, once every rank is known to have computed the same step.

        Raises:
            RankMismatch: the digests differ.
        """
        check_digests(self.step, self.digests)
        return self.tokens.tolist()


class ModelRunner:
    """Args:
    num_blocks: KV blocks on this rank; must be the same on every rank.
    max_num_seqs: slots.
    max_model_len: longest sequence.
    num_valid: ids from here on are padding of the vocabulary.
    """

    def __init__(
        self,
        model: PersimmonForCausalLM,
        tp: TPGroup,
        dtype: torch.dtype,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        num_valid: int,
    ) -> None:
        self.model, self.tp, self.block_size = model, tp, block_size
        specs = model.cache_spec()
        self.caches = allocate_kv_cache(specs, num_blocks, block_size, dtype, tp.device)
        (spec,) = set(specs)  # one kind of attention layer
        kernels = kernels_for(tp.device)
        self.attention = kernels.attention(block_size, spec.num_heads, spec.head_dim, dtype)
        self.no_digest = torch.empty(0, dtype=torch.int64, device=tp.device)
        self.vocab_size = model.config.vocab_size
        part = padded_part(self.vocab_size, tp.size)
        self.sampler = Sampler(tp, part, num_valid)
        self.max_model_len, longest = max_model_len, -(-max_model_len // block_size)
        self.state = SlotState(max_num_seqs, longest, part * tp.size, tp.device)

    @torch.inference_mode()
    def execute(self, record: StepRecord, checksum: int) -> StepResult:
        """Run one STEP record. ``checksum`` is the CRC this rank found in it."""
        self._apply(record)
        batch, draws = self._prepare(record)
        mine = self.no_digest
        if self.tp.size > 1:
            tables = self.state.block_tables[batch.slots]
            mine = digest(checksum, [batch.input_ids, batch.positions, tables])
        hidden = self.model(batch, self.caches)
        count = len(draws.slots)
        result = self._draw(record, hidden[:count], draws, mine)
        if len(hidden) > count:
            self._score(record, hidden[count:], result)
        return result

    def _apply(self, record: StepRecord) -> None:
        for cache in self.caches if len(record.clears) else ():
            cache.kv[record.clears] = 0
        for source, target in record.copies.tolist():
            for cache in self.caches:
                cache.kv[target] = cache.kv[source]
        for options in SlotOptions.decode_all(record.options):
            self.state.begin(options)
        if len(record.blocks):
            slots, index, blocks = self._tensor(record.blocks).unbind(1)
            self.state.block_tables[slots, index] = blocks

    def _tensor(self, words: np.ndarray) -> torch.Tensor:
        # A copy: the words are a view of a record that may be read-only or reused.
        return torch.tensor(words, dtype=torch.int64, device=self.tp.device)

    def _prepare(self, record: StepRecord) -> tuple[ForwardBatch, DrawRows]:
        """Resolve ids, positions and places; every value is derived from the record and the state."""
        slots, starts, counts, flags = record.rows.T
        ends, size = np.cumsum(counts), self.block_size
        positions = np.arange(len(record.tokens)) + np.repeat(starts - (ends - counts), counts)
        token_slots = np.repeat(slots, counts)
        host = np.stack(
            [positions, token_slots, positions // size, positions % size, record.tokens]
        )
        flat_positions, flat_slots, index, offset, tokens = self._tensor(host)
        slot_index = self._tensor(slots)
        input_ids = tokens
        if (record.tokens < 0).any():
            # A token that is still on the device: what its slot drew last. A broken row drew none.
            drawn = self.state.last_tokens[flat_slots].clamp(min=0)
            input_ids = torch.where(tokens < 0, drawn, tokens)
        keys = torch.add(offset, self.state.block_tables[flat_slots, index], alpha=2 * size)
        drawing, scored = (flags & DRAW) != 0, (flags & ~DRAW) != 0
        wanted = ends[drawing] - 1
        if scored.any():
            spans = zip(ends[scored], counts[scored], strict=True)
            wanted = np.concatenate([wanted, *(np.arange(e - c, e) for e, c in spans)])
        longest = -(-int((starts + counts).max()) // size)
        tables = self.state.block_tables[slot_index, :longest]
        query_lens, context_lens = tuple(counts.tolist()), tuple(starts.tolist())
        batch = ForwardBatch(
            input_ids=input_ids,
            positions=flat_positions,
            slot_mapping=torch.stack([keys, keys + size]),
            block_tables=tables,
            slots=slot_index,
            query_lens=query_lens,
            logits_rows=self._tensor(wanted),
            attention=self.attention.plan(tables, query_lens, context_lens),
        )
        draws = DrawRows(
            slots=slots[drawing].tolist(),
            slot_index=slot_index if drawing.all() else self._tensor(slots[drawing]),
            positions=self._tensor((starts + counts)[drawing]),
            bans=self._tensor(record.bans),
            all_greedy=self.state.sampled.isdisjoint(slots[drawing].tolist()),
        )
        return batch, draws

    def _draw(
        self, record: StepRecord, hidden: torch.Tensor, draws: DrawRows, mine: torch.Tensor
    ) -> StepResult:
        if not draws.slots:
            tokens = torch.empty(0, dtype=torch.int64, device=self.tp.device)
            return StepResult(record.step, tokens, all_gather(mine, self.tp))
        sampler, logits = self.sampler, None
        if record.full or record.logprobs >= 0:
            logits = sampler.mask_padding(self.model.compute_logits(hidden))
        if record.full:
            assert logits is not None
            tokens, digests = sampler.full(logits, draws, self.state, mine)
        else:
            if logits is None:
                noise = sampler.noise(draws, self.state)
                best, ids = self.model.argmax(hidden, noise, sampler.num_valid)
            else:
                best, ids = sampler.local_argmax(logits, draws, self.state)
            tokens, digests = sampler.plain(best, ids, mine)
        self.state.take(draws.slot_index, draws.slots, tokens)
        result = StepResult(record.step, tokens, digests)
        if record.logprobs >= 0:
            assert logits is not None
            result.logprobs = token_logprobs(
                logits, tokens, record.logprobs, sampler.first, self.tp
            )
        return result

    def _score(self, record: StepRecord, hidden: torch.Tensor, result: StepResult) -> None:
        """Rows that want more than a token: logits of all positions, or log-probabilities of them."""
        at = target = 0
        for _, _, count, flags in record.rows.tolist():
            if flags & ~DRAW == 0:
                continue
            row = hidden[at : at + count]
            at += count
            if flags & ALL_LOGITS:
                local = self.model.compute_logits(row)
                whole = all_gather(local, self.tp).transpose(0, 1).flatten(1)
                result.logits.append(whole[:, : self.vocab_size].cpu())
            if flags & PROMPT_LOGPROBS:
                wanted = self._tensor(record.targets[target : target + count])
                target += count
                result.prompt_logprobs.append(self._score_row(row, wanted, record.prompt_logprobs))

    def _score_row(self, hidden: torch.Tensor, targets: torch.Tensor, k: int) -> Logprobs:
        rows = max(1, MAX_LOGITS // self.sampler.part)
        parts = []
        chunks = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
        for chunk, wanted in chunks:
            logits = self.sampler.mask_padding(self.model.compute_logits(chunk))
            parts.append(token_logprobs(logits, wanted, k, self.sampler.first, self.tp))
        return Logprobs.cat(parts)
