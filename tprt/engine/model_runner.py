"""Runs one forward pass: lays sequences out as a ``ForwardBatch``, owns the KV cache, samples.

Knows nothing of files, text or how sequences are chosen.
"""

import torch

from tprt.batch import ForwardBatch
from tprt.cache.kv_cache import allocate_kv_cache
from tprt.distributed.communication import all_gather
from tprt.distributed.sharding import padded_part
from tprt.distributed.tp_group import TPGroup
from tprt.engine.sampler import Sampler, SamplingTensors
from tprt.engine.sequence import Sequence
from tprt.models.persimmon import PersimmonForCausalLM


class ModelRunner:
    """Args:
    num_blocks: KV blocks on this rank; must be the same on every rank.
    num_valid: ids from here on are padding of the vocabulary.
    """

    def __init__(
        self,
        model: PersimmonForCausalLM,
        tp: TPGroup,
        dtype: torch.dtype,
        num_blocks: int,
        block_size: int,
        num_valid: int,
        eod_id: int,
    ) -> None:
        self.model, self.tp, self.block_size, self.eod_id = model, tp, block_size, eod_id
        self.caches = allocate_kv_cache(
            model.cache_spec(), num_blocks, block_size, dtype, tp.device
        )
        self.vocab_size = model.config.vocab_size
        self.sampler = Sampler(tp, padded_part(self.vocab_size, tp.size), num_valid)

    def prepare(self, chunks: list[tuple[Sequence, int]], all_rows: bool = False) -> ForwardBatch:
        """Lay out the next ``length`` uncomputed tokens of each sequence.

        Logits are wanted of every row, or else of the last row of each sequence that is then
        complete.
        """
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        for seq, length in chunks:
            span = range(seq.num_computed, seq.num_computed + length)
            ids += [seq.token(i) for i in span]
            positions += span
            slots += [
                seq.block_table[i // self.block_size] * self.block_size + i % self.block_size
                for i in span
            ]
            if all_rows:
                rows += range(len(ids) - length, len(ids))
            elif span.stop == seq.num_tokens:
                rows.append(len(ids) - 1)
        longest = max(len(seq.block_table) for seq, _ in chunks)
        tables = [seq.block_table + [0] * (longest - len(seq.block_table)) for seq, _ in chunks]

        def tensor(values: list[int] | list[list[int]]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self.tp.device)

        return ForwardBatch(
            input_ids=tensor(ids),
            positions=tensor(positions),
            slot_mapping=tensor(slots),
            block_tables=tensor(tables),
            query_lens=tuple(length for _, length in chunks),
            context_lens=tuple(seq.num_computed for seq, _ in chunks),
            logits_rows=tensor(rows),
        )

    @torch.inference_mode()
    def run(self, chunks: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """Advance each sequence by its chunk; returns a next token for those now complete."""
        batch = self.prepare(chunks)
        done = [seq for seq, n in chunks if seq.num_computed + n == seq.num_tokens]
        hidden = self.model(batch, self.caches)
        for seq, length in chunks:
            seq.num_computed += length
        if not done:
            return []
        options = SamplingTensors.of(done, self.eod_id, self.tp.device)
        tokens = self.sampler(self.model.compute_logits(hidden), options)
        return list(zip(done, tokens.tolist(), strict=True))

    @torch.inference_mode()
    def logits(self, chunk: tuple[Sequence, int]) -> torch.Tensor:
        """float32 [chunk length, vocab_size] on the host, the same on every rank."""
        hidden = self.model(self.prepare([chunk], all_rows=True), self.caches)
        chunk[0].num_computed += chunk[1]
        gathered = all_gather(self.model.compute_logits(hidden), self.tp)
        return gathered.transpose(0, 1).flatten(1)[:, : self.vocab_size].cpu()
