"""Embedding and head, cut by vocabulary. Rows that only pad the cut stand for no id at all."""

import torch
import torch.nn.functional as F
from torch import nn

from tprt.distributed.communication import all_reduce
from tprt.distributed.sharding import padded_cut, padded_part
from tprt.distributed.tp_group import TPGroup
from tprt.kernels import Noise as Noise
from tprt.layers.linear import ParallelLinear, sharded_parameter


class VocabParallelEmbedding(nn.Module):
    """Rank r holds the rows of ids r * part to (r + 1) * part; weight on disk is [vocab, hidden]."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TPGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self.tp = tp
        self.part = padded_part(vocab_size, tp.size)
        spec = padded_cut((vocab_size, hidden_size), 0, tp.rank, self.part)
        self.weight = sharded_parameter(spec, dtype, tp.device)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] -> [T, hidden_size], the same on every rank."""
        if self.tp.size == 1:
            return F.embedding(input_ids, self.weight)
        local = input_ids - self.tp.rank * self.part
        elsewhere = (local < 0) | (local >= self.part)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return all_reduce(rows.masked_fill(elsewhere.unsqueeze(-1), 0), self.tp)


class ParallelLMHead(ParallelLinear):
    """Logits of this rank's part of the vocabulary; weight on disk is [vocab, hidden], no bias.

    Args:
        tied_to: the embedding whose rows serve as head, or None for a weight of its own.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        tp: TPGroup,
        dtype: torch.dtype,
        tied_to: VocabParallelEmbedding | None = None,
    ) -> None:
        super().__init__(tp)
        self.part = padded_part(vocab_size, tp.size)
        self.tied = tied_to is not None
        if tied_to is not None:
            self.weight = tied_to.weight
            return
        spec = padded_cut((vocab_size, hidden_size), 0, tp.rank, self.part)
        self.weight = sharded_parameter(spec, dtype, tp.device)

    def finish_loading(self) -> None:
        """As ``ParallelLinear``, but a tied weight stays: the embedding needs its rows."""
        if not self.tied:
            super().finish_loading()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] -> float32 [R, part]. Padding rows give 0; the sampler masks them."""
        return self.kernels.logits(hidden, self.weight)

    def argmax(
        self, hidden: torch.Tensor, noise: Noise, num_valid: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best id of this rank's part for each row, without the logits: score and id.

        Args:
            num_valid: ids from here on are padding of the vocabulary.

        Returns:
            float32 [R] and int64 [R], as ``Kernels.argmax``.
        """
        first = self.tp.rank * self.part
        valid = min(max(0, num_valid - first), self.part)
        return self.kernels.linear_argmax(hidden, self.weight, noise, first, valid)
