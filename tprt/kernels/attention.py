"""What all attention bodies have in common: a plan per pass, the same for every layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tprt.kernels.cpu import CPUAttention
from tprt.kernels.reference import paged_attention


class AttentionPlan(Protocol):
    """How the tokens of one pass attend."""

    def __call__(self, q_THD: torch.Tensor, kv_cache: torch.Tensor, scale: float) -> torch.Tensor:
        """Causal attention over a cache [blocks, 2, block_size, H, D]; queries and result [T, H, D].

        The keys and values of these tokens are in the cache already.
        """
        ...


class AttentionPlanner(Protocol):
    """Makes the plan of a pass; lives as long as the engine."""

    def plan(
        self,
        block_tables: torch.Tensor,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
    ) -> AttentionPlan:
        """Args: as in ``ForwardBatch``."""
        ...


@dataclass(frozen=True)
class ReferencePlan:
    block_tables: torch.Tensor
    query_lens: Sequence[int]
    context_lens: Sequence[int]

    def __call__(self, q_THD: torch.Tensor, kv_cache: torch.Tensor, scale: float) -> torch.Tensor:
        return paged_attention(
            q_THD, kv_cache, self.block_tables, self.query_lens, self.context_lens, scale
        )


class ReferenceAttention:
    def plan(
        self,
        block_tables: torch.Tensor,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
    ) -> ReferencePlan:
        return ReferencePlan(block_tables, query_lens, context_lens)


def attention_planner(
    device: torch.device, block_size: int, num_heads: int, head_dim: int, dtype: torch.dtype
) -> AttentionPlanner:
    """The body for ``device``; decided once, where the engine is made."""
    if device.type == "cpu":
        return CPUAttention(block_size, num_heads, head_dim, dtype)
    return ReferenceAttention()
