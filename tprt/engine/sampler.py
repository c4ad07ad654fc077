"""Picks the next token of each row from logits that are cut over ranks.

``plain`` (every row greedy or pure temperature): each rank takes its best (score, id), the pairs are
gathered and the best is taken; ``full`` (any other option in the step): whole rows are gathered first.
Both add the same noise, so a row draws the same token in either. All ranks decide from the same
gathered bits and so agree by construction. Digests travel in the same gather.
"""

from dataclasses import dataclass

import torch

from tprt.distributed.communication import all_gather
from tprt.distributed.tp_group import TPGroup
from tprt.engine.noise import NON_FINITE, gumbel, token_table
from tprt.engine.slot_state import NEG_INF, SlotState

_LOW_32 = 2**32 - 1


@dataclass(frozen=True)
class DrawRows:
    """The rows that draw in one step, in the order of the step.

    Args:
        slots: of each row, on the host; ``slot_index`` is the same as int64 [R] on the device.
        positions: int64 [R], of the token being drawn.
        bans: int64 [N, 2], pairs of row and id that are forbidden in this step alone.
        full: whether a row has an option that ``plain`` does not know.
    """

    slots: list[int]
    slot_index: torch.Tensor
    positions: torch.Tensor
    bans: torch.Tensor
    full: bool


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

    def mask_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 [R, part] of this rank with -inf for ids that do not exist, in place."""
        logits[:, max(0, self.num_valid - self.first) :] = NEG_INF
        return logits

    def __call__(
        self, logits: torch.Tensor, rows: DrawRows, state: SlotState, digest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one id per row.

        Args:
            logits: float32 [R, part] of this rank, padding masked; they are changed.
            digest: int64 [D] of this rank; empty where there is no other.

        Returns:
            int64 [R], the same ids on every rank, NON_FINITE for a row with a NaN or infinite logit;
            and all digests, int64 [ranks, D].
        """
        draw = self._full if rows.full else self._plain
        return draw(logits, rows, state, digest)

    def _scaled(self, logits: torch.Tensor, rows: DrawRows, state: SlotState) -> torch.Tensor:
        """Logits divided by temperature, which is 1 where the row is greedy."""
        if state.sampled.isdisjoint(rows.slots):
            return logits
        return logits / state.temperature[rows.slot_index].unsqueeze(1)

    def _scores(
        self, scaled: torch.Tensor, rows: DrawRows, state: SlotState, table: torch.Tensor
    ) -> torch.Tensor:
        """What ``_scaled`` gave, plus noise where the row is not greedy."""
        if state.sampled.isdisjoint(rows.slots):
            return scaled
        greedy = state.greedy[rows.slot_index]
        noise = gumbel(state.keys[rows.slot_index], rows.positions, table)
        return scaled + noise.masked_fill(greedy.unsqueeze(1), 0.0)

    def _ban(self, logits: torch.Tensor, rows: DrawRows, first: int) -> None:
        """-inf at the banned ids among those from ``first`` on, in place."""
        if len(rows.bans):
            row, token = rows.bans.unbind(1)
            here = (token >= first) & (token < first + logits.shape[1])
            logits[row[here], token[here] - first] = NEG_INF

    def _plain(
        self, logits: torch.Tensor, rows: DrawRows, state: SlotState, digest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._ban(logits, rows, self.first)
        scaled = self._scaled(logits, rows, state)
        best, index = self._scores(scaled, rows, state, self.local_table).max(dim=1)
        if self.tp.size == 1:
            return index.masked_fill(~best.isfinite(), NON_FINITE), digest.unsqueeze(0)
        gathered = all_gather(torch.cat([pack(best, index + self.first), digest]), self.tp)
        ids, finite = unpack(gathered[:, : len(best)].max(dim=0).values)
        return ids.masked_fill(~finite, NON_FINITE), gathered[:, len(best) :]

    def _full(
        self, logits: torch.Tensor, rows: DrawRows, state: SlotState, digest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The digest's bits travel as floats; a gather copies them whatever they stand for.
        bits = digest.view(torch.float32)
        gathered = all_gather(torch.cat([bits, logits.flatten()]), self.tp)
        # A copy: viewed as int64, the storage has to begin at a whole number of words.
        digests = gathered[:, : len(bits)].clone(memory_format=torch.contiguous_format)
        digests = digests.view(torch.int64) if len(bits) else digest.unsqueeze(0)
        rest = gathered[:, len(bits) :].reshape(self.tp.size, -1, self.part)
        whole = rest.transpose(0, 1).flatten(1)  # [R, part * size]
        finite = whole.max(dim=1).values.isfinite()
        state.adjust(whole, rows.slots)
        self._ban(whole, rows, 0)
        index = rows.slot_index
        scaled = self._scaled(whole, rows, state)
        scaled = truncate(scaled, state.top_k[index], state.top_p[index], state.min_p[index])
        best, ids = self._scores(scaled, rows, state, self.full_table).max(dim=1)
        return ids.masked_fill(~(finite & best.isfinite()), NON_FINITE), digests


def pack(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """One int64 per (float32 score, id below 2^32): larger scores, then lower ids, compare greater.

    NaN compares above everything, so that it is seen.
    """
    scores = scores.masked_fill(scores.isnan(), float("nan"))  # one NaN of many, a positive one
    bits = scores.float().view(torch.int32)
    # Negative floats order backwards as integers: flip all their bits but the sign.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (_LOW_32 - ids)


def unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids, and whether the score was finite."""
    ordered = (packed >> 32).int()
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return _LOW_32 - (packed & _LOW_32), scores.isfinite()


def truncate(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """-inf for what min-p, then top-k, then top-p drop; float32 [R, V] scaled by temperature.

    At least one id is kept per row. Of equal logits at a boundary the lower ids are kept.

    Args:
        top_k: int64 [R], 0 keeps all; top_p, min_p: float32 [R].
    """
    probabilities = logits.softmax(dim=1)
    floor = probabilities.max(dim=1, keepdim=True).values * min_p.unsqueeze(1)
    logits = logits.masked_fill(probabilities < floor, NEG_INF)

    ordered, order = logits.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[1], device=logits.device)
    top_k = top_k.unsqueeze(1)
    ordered = ordered.masked_fill((top_k > 0) & (rank >= top_k), NEG_INF)

    probabilities = ordered.softmax(dim=1)
    before = probabilities.cumsum(dim=1) - probabilities
    # The id that crosses top_p is kept, and the first one always: a top_p below float32's range is 0
    # there. A row with top_p = 1 keeps all, whatever rounding says.
    top_p = top_p.unsqueeze(1)
    ordered = ordered.masked_fill((before >= top_p) & (rank > 0) & (top_p < 1.0), NEG_INF)
    return torch.full_like(logits, NEG_INF).scatter(1, order, ordered)
