"""The one argument of a forward pass. Passed along, never kept in a global."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """Tokens of several sequences laid end to end; prefill chunks and decode rows may mix.

    Legend: T tokens of all sequences, B sequences, N blocks of the longest sequence.

    Args:
        input_ids: int64 [T].
        positions: int64 [T], the absolute position of each token.
        slot_mapping: int64 [2, T], where each token's key (0) and value (1) go, as rows of a KV cache
            seen as [num_blocks * 2 * block_size, H, D].
        block_tables: int64 [B, N], the KV blocks of each sequence, unused entries 0.
        slots: int64 [B], the row of each sequence in per-sequence state.
        query_lens: tokens of each sequence in this pass (host side, B entries).
        logits_rows: int64 [R], the flat rows whose logits are wanted; None for all, in order.
        attention: how these tokens attend over a paged cache, planned once for all layers; see
            ``kernels.AttentionPlan``.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    slots: torch.Tensor
    query_lens: tuple[int, ...]
    logits_rows: torch.Tensor | None
    attention: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
