"""Embedding and head, cut by vocabulary. Rows that only pad the cut stand for no id at all."""

import torch
import torch.nn.functional as F
from torch import nn

from tprt.distributed.communication import all_reduce
from tprt.distributed.sharding import selected_rows
from tprt.distributed.tp_group import TPGroup
from tprt.distributed.vocabulary import Vocabulary
from tprt.kernels import Noise as Noise
from tprt.layers.linear import ParallelLinear, sharded_parameter


class VocabParallelEmbedding(nn.Module):
    """Each rank holds the rows of its columns of ``vocabulary``; weight on disk is [size, hidden].

    Where ids may lie elsewhere, one row of zeros follows, and a table says which row an id has.
    """

    def __init__(
        self, vocabulary: Vocabulary, hidden_size: int, tp: TPGroup, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.tp = tp
        self.direct = tp.size == 1 and not vocabulary.removed
        rows = vocabulary.part(tp.size) + (not self.direct)
        runs = vocabulary.runs(tp.rank, tp.size)
        spec = selected_rows((vocabulary.size, hidden_size), runs, rows)
        self.weight = sharded_parameter(spec, dtype, tp.device)
        self.row_of: torch.Tensor
        if not self.direct:
            table = vocabulary.row_of(tp.rank, tp.size, tp.device)
            self.register_buffer("row_of", table, persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] -> [T, hidden_size], the same on every rank; zeros for an id without a row."""
        if self.direct:
            return F.embedding(input_ids, self.weight)
        return all_reduce(F.embedding(self.row_of[input_ids], self.weight), self.tp)


class ParallelLMHead(ParallelLinear):
    """Logits of this rank's columns of ``vocabulary``; weight on disk is [size, hidden], no bias.

    Args:
        tied_to: the embedding whose rows serve as head, or None for a weight of its own.
        soft_cap: c, if any, for logits of c tanh(logits / c).
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        hidden_size: int,
        tp: TPGroup,
        dtype: torch.dtype,
        tied_to: VocabParallelEmbedding | None = None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__(tp)
        self.soft_cap = soft_cap
        self.vocabulary, self.part = vocabulary, vocabulary.part(tp.size)
        self.tied = tied_to is not None
        self.packed: torch.Tensor | None = None  # of a tied weight
        self.ids: torch.Tensor
        ids = vocabulary.column_ids(tp.rank, tp.size, tp.device)
        self.register_buffer("ids", ids, persistent=False)
        if tied_to is not None:
            self.weight = tied_to.weight
            return
        runs = vocabulary.runs(tp.rank, tp.size)
        spec = selected_rows((vocabulary.size, hidden_size), runs, self.part)
        self.weight = sharded_parameter(spec, dtype, tp.device)

    def finish_loading(self) -> None:
        """As ``ParallelLinear``, but a tied weight stays: the embedding needs its rows."""
        if not self.tied:
            return super().finish_loading()
        rows = self._rows()
        packed = self.kernels.pack_weight(rows)
        self.packed = None if packed is rows else packed

    def _rows(self) -> torch.Tensor:
        if self.packed is not None:
            return self.packed
        # What else a tied weight has belongs to the embedding alone. A packed one cannot be sliced.
        return self.weight[: self.part] if self.tied else self.weight

    def copied_elements(self) -> int:
        """Of a tied weight, which the embedding reads by rows and the head as packed."""
        return self.part * self.weight.shape[1] if self.tied else 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] -> float32 [R, part]. Padding rows give 0; the sampler masks them."""
        return self.kernels.logits(hidden, self._rows(), self.soft_cap)

    def argmax(
        self, hidden: torch.Tensor, noise: Noise, num_valid: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best id of this rank's columns for each row, without the logits: score and id.

        Args:
            num_valid: ids from here on are padding of the vocabulary.

        Returns:
            float32 [R] and int64 [R], as ``Kernels.argmax``.
        """
        valid = self.vocabulary.valid_columns(num_valid, self.tp.rank, self.tp.size)
        return self.kernels.linear_argmax(
            hidden, self._rows(), noise, self.ids, valid, self.soft_cap
        )
