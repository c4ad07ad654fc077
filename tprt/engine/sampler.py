"""Picks the next token of each row from logits that are cut over ranks.

``plain`` (every row greedy or pure temperature): each rank takes its best (score, id), the pairs are
gathered and the best is taken; ``full`` (any other option in the step): whole rows are gathered first.
Both add the same noise, so a row draws the same token in either. All ranks decide from the same
gathered bits and so agree by construction. Digests travel in the same gather. Logits have the columns of
a ``Vocabulary``: ids without rows in memory have none, which is as good as a logit of -inf.
"""

from dataclasses import dataclass

import torch

from tprt.distributed.communication import all_gather
from tprt.distributed.tp_group import TPGroup
from tprt.distributed.vocabulary import Vocabulary
from tprt.engine.slot_state import NEG_INF, SlotState
from tprt.kernels import Noise, kernels_for
from tprt.kernels.noise import NON_FINITE

_LOW_32 = 2**32 - 1
FULL_ROWS = 16  # rows that are sorted at once


@dataclass(frozen=True)
class DrawRows:
    """The rows that draw in one step, in the order of the step.

    Args:
        slots: int64 [R].
        positions: int64 [R], of the token being drawn.
        bans: int64 [N, 2], pairs of row and id that are forbidden in this step alone; a row of -1 bans
            nothing.
        all_greedy: no row is drawn with noise.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    bans: torch.Tensor
    all_greedy: bool


class Sampler:
    """Args:
    num_valid: ids from here on are padding rows and are never drawn.

    Attributes:
        part: columns of each rank, padding included.
        ids: int64 [part], of this rank's columns.
    """

    def __init__(self, tp: TPGroup, vocabulary: Vocabulary, num_valid: int) -> None:
        self.tp, self.vocabulary, self.num_valid = tp, vocabulary, num_valid
        self.part = vocabulary.part(tp.size)
        self.ids = vocabulary.column_ids(tp.rank, tp.size, tp.device)
        self._all_ids = torch.cat(
            [vocabulary.column_ids(rank, tp.size, tp.device) for rank in range(tp.size)]
        )
        self._valid = vocabulary.valid_columns(num_valid, tp.rank, tp.size)
        self._all_valid = vocabulary.valid_columns(num_valid)
        self._columns = vocabulary.column_table(tp.device)
        self.kernels = kernels_for(tp.device)

    def mask_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 [R, part] of this rank with -inf for ids that do not exist, in place."""
        logits[:, self._valid :] = NEG_INF
        return logits

    def by_id(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 [R, columns of all ranks] -> [R, vocab_size]; -inf for ids without a column."""
        kept = self.vocabulary.num_kept
        if self._columns is None:
            return logits[:, :kept]
        whole = logits.new_full((len(logits), self.vocabulary.size), NEG_INF)
        whole[:, self._all_ids[:kept]] = logits[:, :kept]
        return whole

    def noise(self, rows: DrawRows, state: SlotState) -> Noise:
        """How ``rows`` draw, from what their slots hold."""
        index = rows.slots
        return Noise(
            temperature=state.temperature.index_select(0, index),
            greedy=state.greedy.index_select(0, index),
            keys=state.keys.index_select(0, index),
            positions=rows.positions,
            all_greedy=rows.all_greedy,
        )

    def local_argmax(
        self, logits: torch.Tensor, rows: DrawRows, state: SlotState
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``plain`` takes, from this rank's logits; int64 and float32 [R]."""
        return self.kernels.argmax(logits, self.noise(rows, state), self.ids, self._valid)

    def plain(
        self, best: torch.Tensor, ids: torch.Tensor, digest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids to draw, where every rank knows the best of its part.

        Args:
            best, ids: float32 [R] and int64 [R] of this rank, as ``Kernels.argmax`` gives them.
            digest: int64 [D] of this rank; empty where there is no other.

        Returns:
            int64 [R], the same ids on every rank, NON_FINITE for a row with a NaN or infinite logit;
            and all digests, int64 [ranks, D].
        """
        if self.tp.size == 1:
            # NaN and infinity are what is not 0 less itself: fewer operations than isfinite.
            return ids.masked_fill((best - best) != 0, NON_FINITE), digest.unsqueeze(0)
        gathered = all_gather(torch.cat([pack(best, ids), digest]), self.tp)
        ids, finite = unpack(gathered[:, : len(best)].max(dim=0).values)
        return ids.masked_fill(~finite, NON_FINITE), gathered[:, len(best) :]

    def full(
        self, logits: torch.Tensor, rows: DrawRows, state: SlotState, digest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``plain``, from this rank's logits, float32 [R, part] with padding masked."""
        # The digest's bits travel as floats; a gather copies them whatever they stand for.
        bits = digest.view(torch.float32)
        gathered = all_gather(torch.cat([bits, logits.flatten()]), self.tp)
        # A copy: viewed as int64, the storage has to begin at a whole number of words.
        digests = gathered[:, : len(bits)].clone(memory_format=torch.contiguous_format)
        digests = digests.view(torch.int64) if len(bits) else digest.unsqueeze(0)
        rest = gathered[:, len(bits) :].reshape(self.tp.size, -1, self.part)
        whole = rest.transpose(0, 1).flatten(1)  # [R, part * size]
        finite = whole.max(dim=1).values.isfinite()
        whole = ban(whole, self._bans(rows.bans))
        noise = self.noise(rows, state)
        # In parts: sorting and sampling take several times the memory of their logits.
        starts = range(0, len(whole), FULL_ROWS)
        drawn = [self._draw_whole(whole, rows, state, noise, i, i + FULL_ROWS) for i in starts]
        best, ids = torch.cat([d[0] for d in drawn]), torch.cat([d[1] for d in drawn])
        return ids.masked_fill(~(finite & best.isfinite()), NON_FINITE), digests

    def _bans(self, bans: torch.Tensor) -> torch.Tensor:
        """Pairs of row and id as pairs of row and column; nothing is banned where there is none."""
        if self._columns is None:
            return bans
        row, column = bans[:, 0], self._columns[bans[:, 1]]
        return torch.stack([row.masked_fill(column < 0, -1), column.clamp(min=0)], dim=1)

    def _draw_whole(
        self,
        logits: torch.Tensor,
        rows: DrawRows,
        state: SlotState,
        noise: Noise,
        start: int,
        stop: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score and id of the rows from ``start`` on, of float32 [R, part * size]."""
        slots = rows.slots[start:stop]
        logits = state.adjust(logits[start:stop], slots)
        logits = logits / noise.temperature[start:stop].unsqueeze(1)
        logits = truncate(logits, state.top_k[slots], state.top_p[slots], state.min_p[slots])
        part = Noise(
            temperature=torch.ones_like(noise.temperature[start:stop]),  # it is in the logits
            greedy=noise.greedy[start:stop],
            keys=noise.keys[start:stop],
            positions=noise.positions[start:stop],
            all_greedy=noise.all_greedy,
        )
        return self.kernels.argmax(logits, part, self._all_ids, self._all_valid)


def ban(logits: torch.Tensor, bans: torch.Tensor) -> torch.Tensor:
    """float32 [R, V] with -inf at int64 [N, 2] pairs of row and column; a row of -1 bans nothing."""
    if len(bans) == 0:
        return logits
    row, column = bans.unbind(1)
    index = row.clamp(min=0) * logits.shape[1] + column
    limit = torch.where(row < 0, -NEG_INF, NEG_INF)
    return logits.flatten().scatter_reduce(0, index, limit, "amin").view_as(logits)


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

    # In whole numbers: a sum of floats in parallel may differ from run to run, and so between ranks.
    probabilities = (ordered.softmax(dim=1) * 2.0**40).long()
    before = probabilities.cumsum(dim=1) - probabilities
    # The id that crosses top_p is kept, and the first one always: a top_p below float32's range is 0
    # there. A row with top_p = 1 keeps all, whatever rounding says.
    top_p = top_p.unsqueeze(1)
    past = before >= (top_p * 2.0**40).long()
    ordered = ordered.masked_fill(past & (rank > 0) & (top_p < 1.0), NEG_INF)
    return torch.full_like(logits, NEG_INF).scatter(1, order, ordered)
