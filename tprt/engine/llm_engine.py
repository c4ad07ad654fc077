"""The generation loop: admits sequences, alternates prefill and decode passes, ends sequences.

All ranks run this loop over the same requests. Rank 0 alone looks at text and says which sequences
have ended; every other decision is a pure function of requests and agreed tokens. A sequence is
admitted only when blocks for all its tokens are free, so it can never run out on the way.
"""

from collections import deque
from collections.abc import Callable

import torch

from tprt.cache.kv_cache import BlockAllocator
from tprt.config import EngineConfig
from tprt.distributed.communication import broadcast_ints
from tprt.distributed.tp_group import TPGroup
from tprt.engine.model_runner import ModelRunner
from tprt.engine.noise import NON_FINITE
from tprt.engine.outputs import CompletionOutput, RequestOutput
from tprt.engine.sequence import Request, Sequence
from tprt.sampling_params import SamplingParams
from tprt.tokenizer import Detokenizer, Tokenizer

# Called on rank 0 after each pass: finished sequences, tokens generated so far.
Progress = Callable[[int, int], None]


class LLMEngine:
    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        config: EngineConfig,
        num_blocks: int,
        tp: TPGroup,
    ) -> None:
        self.runner, self.tokenizer, self.config, self.tp = runner, tokenizer, config, tp
        self.allocator = BlockAllocator(num_blocks)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def generate(
        self, requests: list[Request], progress: Progress | None = None
    ) -> list[RequestOutput] | None:
        """Outputs in the order of ``requests`` on rank 0, None on the others."""
        everyone = [
            Sequence(request, i, index, self._detokenizer(request))
            for i, request in enumerate(requests)
            for index in range(request.params.n)
        ]
        waiting, running = deque(everyone), list[Sequence]()
        finished = tokens = 0
        try:
            while waiting or running:
                self._admit(waiting, running)
                produced = self.runner.run(self._next_chunks(running))
                tokens += len(produced)
                ended = self._end(produced)
                for seq in ended:
                    self.allocator.free(seq.block_table)
                    running.remove(seq)
                finished += len(ended)
                if progress is not None:
                    progress(finished, tokens)
        finally:  # an interrupted call must not keep its blocks
            for seq in running:
                self.allocator.free(seq.block_table)
        return collect(requests, everyone) if self.tp.rank == 0 else None

    def _detokenizer(self, request: Request) -> Detokenizer | None:
        if self.tp.rank != 0:
            return None
        return Detokenizer(self.tokenizer, skip_special_tokens=request.params.skip_special_tokens)

    def _admit(self, waiting: deque[Sequence], running: list[Sequence]) -> None:
        """First come, first served, while rows and blocks last."""
        while waiting and len(running) < self.config.max_num_seqs:
            need = self.blocks_for(waiting[0].most_tokens)
            if need > self.allocator.num_free:
                break
            seq = waiting.popleft()
            seq.block_table = self.allocator.allocate(need)
            running.append(seq)
        assert running, "requests that can never fit must be refused before generate"

    def _next_chunks(self, running: list[Sequence]) -> list[tuple[Sequence, int]]:
        """Prompts first, at most ``max_num_batched_tokens`` of them; else one token of each row."""
        budget = self.config.max_num_batched_tokens
        chunks: list[tuple[Sequence, int]] = []
        for seq in running:
            left = seq.num_tokens - seq.num_computed
            if not seq.token_ids and budget > 0:
                chunks.append((seq, min(left, budget)))
                budget -= chunks[-1][1]
        return chunks or [(seq, 1) for seq in running]

    def _end(self, produced: list[tuple[Sequence, int]]) -> list[Sequence]:
        """Append the new tokens; rank 0 judges, all ranks drop the same sequences."""
        flags = torch.zeros(len(produced), dtype=torch.int64)
        for i, (seq, token) in enumerate(produced):
            if self.tp.rank == 0:
                flags[i] = seq.append(token, self.tokenizer.eod_id)
            elif token != NON_FINITE:
                seq.token_ids.append(token)
        if produced:
            broadcast_ints(flags, self.tp)
        return [seq for (seq, _), flag in zip(produced, flags.tolist(), strict=True) if flag]

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """float32 [T, vocab_size] on the host, the same on every rank."""
        request = Request(token_ids, SamplingParams(), 0, 0)
        seq = Sequence(request, 0, 0)
        seq.block_table = self.allocator.allocate(self.blocks_for(len(token_ids)))
        try:
            parts = []
            while seq.num_computed < len(token_ids):
                left = len(token_ids) - seq.num_computed
                parts.append(
                    self.runner.logits((seq, min(left, self.config.max_num_batched_tokens)))
                )
            return torch.cat(parts)
        finally:
            self.allocator.free(seq.block_table)


def collect(requests: list[Request], sequences: list[Sequence]) -> list[RequestOutput]:
    outputs = [RequestOutput(request.prompt_token_ids, []) for request in requests]
    for seq in sequences:
        assert seq.finish_reason is not None
        outputs[seq.request_index].outputs.append(
            CompletionOutput(seq.index, seq.text, seq.token_ids, seq.finish_reason, seq.stop_reason)
        )
    return outputs
