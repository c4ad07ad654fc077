"""Picks the next token of each row from logits that are cut over ranks.

``plain`` (every row greedy or pure temperature): each rank takes its best (score, id), the pairs are
gathered and the best is taken in rank order; ``full`` (a row asks for top-k, top-p or min-p): the
rows are gathered first. Both add the same noise, so a row draws the same token in either. All ranks
decide from the same gathered bits and so agree by construction.
"""

from dataclasses import dataclass

import torch

from tprt.distributed.communication import all_gather
from tprt.distributed.tp_group import TPGroup
from tprt.engine.noise import NON_FINITE, gumbel, token_table
from tprt.engine.sequence import Sequence

NEG_INF = float("-inf")


@dataclass(frozen=True)
class SamplingTensors:
    """The options of R rows; a pure function of the sequences, so the same on every rank.

    ``banned`` holds the (row, id) pairs that ``min_tokens`` forbids for now.
    """

    full: bool
    greedy: torch.Tensor  # bool [R]
    temperature: torch.Tensor  # float32 [R], 1 where greedy
    top_k: torch.Tensor  # int64 [R], 0 keeps all
    top_p: torch.Tensor  # float32 [R]
    min_p: torch.Tensor  # float32 [R]
    keys: torch.Tensor  # int64 [R]
    positions: torch.Tensor  # int64 [R]
    banned: list[tuple[int, int]]

    @classmethod
    def of(cls, sequences: list[Sequence], eod_id: int, device: torch.device) -> "SamplingTensors":
        params = [s.request.params for s in sequences]

        def floats(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        banned = [
            (row, token)
            for row, s in enumerate(sequences)
            if len(s.token_ids) < s.request.params.min_tokens
            for token in (eod_id, *s.request.params.stop_token_ids)
        ]
        return cls(
            full=any(p.truncates for p in params),
            greedy=torch.tensor([p.greedy for p in params], device=device),
            temperature=floats([1.0 if p.greedy else p.temperature for p in params]),
            top_k=ints([max(p.top_k, 0) for p in params]),
            top_p=floats([p.top_p for p in params]),
            min_p=floats([p.min_p for p in params]),
            keys=ints([s.seed_key for s in sequences]),
            positions=ints([s.num_tokens for s in sequences]),
            banned=banned,
        )


class Sampler:
    """Args:
    part: entries of the vocabulary per rank, padding included.
    num_valid: ids from here on are padding rows and are never drawn.
    """

    def __init__(self, tp: TPGroup, part: int, num_valid: int) -> None:
        self.tp, self.part, self.num_valid = tp, part, num_valid
        self.first = tp.rank * part
        self.local_table = token_table(self.first, part, tp.device)
        self.full_table = token_table(0, part * tp.size, tp.device)

    def __call__(self, logits: torch.Tensor, options: SamplingTensors) -> torch.Tensor:
        """float32 [R, part] of this rank -> int64 [R], the same ids on every rank.

        A row with a NaN or an infinite logit gives NON_FINITE.
        """
        logits[:, max(0, self.num_valid - self.first) :] = NEG_INF
        for row, token in options.banned:
            if self.first <= token < self.first + self.part:
                logits[row, token - self.first] = NEG_INF
        return self._full(logits, options) if options.full else self._plain(logits, options)

    def _scores(
        self, logits: torch.Tensor, options: SamplingTensors, table: torch.Tensor
    ) -> torch.Tensor:
        """``logits`` already divided by temperature; noise where the row is not greedy."""
        if bool(options.greedy.all()):
            return logits
        noise = gumbel(options.keys, options.positions, table)
        return logits + noise.masked_fill(options.greedy.unsqueeze(1), 0.0)

    def _plain(self, logits: torch.Tensor, options: SamplingTensors) -> torch.Tensor:
        scaled = logits / options.temperature.unsqueeze(1)
        best, index = self._scores(scaled, options, self.local_table).max(dim=1)
        # float64 holds both a float32 score and an id exactly, so one gather carries the pair.
        pairs = all_gather(torch.stack([best.double(), (index + self.first).double()], 1), self.tp)
        winner = pairs[:, :, 0].argmax(dim=0)  # the first maximum: the lowest id on ties
        scores, ids = pairs[winner, torch.arange(len(winner), device=winner.device)].unbind(1)
        return ids.long().masked_fill(~scores.isfinite(), NON_FINITE)  # NaN counts as a maximum

    def _full(self, logits: torch.Tensor, options: SamplingTensors) -> torch.Tensor:
        whole = all_gather(logits, self.tp).transpose(0, 1).flatten(1)  # [R, part * size]
        scaled = truncate(whole / options.temperature.unsqueeze(1), options)
        ids = self._scores(scaled, options, self.full_table).argmax(dim=1)
        return ids.masked_fill(~whole.max(dim=1).values.isfinite(), NON_FINITE)


def truncate(logits: torch.Tensor, options: SamplingTensors) -> torch.Tensor:
    """-inf for what min-p, then top-k, then top-p drop; float32 [R, V] scaled by temperature.

    At least one id is kept per row. Of equal logits at a boundary the lower ids are kept.
    """
    probabilities = logits.softmax(dim=1)
    floor = probabilities.max(dim=1, keepdim=True).values * options.min_p.unsqueeze(1)
    logits = logits.masked_fill(probabilities < floor, NEG_INF)

    ordered, order = logits.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[1], device=logits.device)
    top_k = options.top_k.unsqueeze(1)
    ordered = ordered.masked_fill((top_k > 0) & (rank >= top_k), NEG_INF)

    probabilities = ordered.softmax(dim=1)
    before = probabilities.cumsum(dim=1) - probabilities
    # The id that crosses top_p is kept, and the first one always: a top_p below float32's range is 0
    # there. A row with top_p = 1 keeps all, whatever rounding says.
    top_p = options.top_p.unsqueeze(1)
    ordered = ordered.masked_fill((before >= top_p) & (rank > 0) & (top_p < 1.0), NEG_INF)
    return torch.full_like(logits, NEG_INF).scatter(1, order, ordered)
