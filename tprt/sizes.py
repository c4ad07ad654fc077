"""Sizes of what one rank's layers compute, from which kernels can be compiled before there are weights.

Knows numbers only. A model says them, the warm-up of kernels reads them.
"""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class PagedAttentionSizes:
    """Of attention over a paged cache.

    Args:
        num_heads: of this rank, each with keys and values of its own.
        head_norms: whether queries and keys have LayerNorms.
    """

    num_heads: int
    head_dim: int
    rotary_dim: int
    block_size: int
    head_norms: bool


@dataclass(frozen=True)
class WindowAttentionSizes:
    """Of attention over a sliding window.

    Args:
        num_heads: of queries, on this rank; one head of keys and values serves all.
        keys: that a query sees, its own included.
        ring: places for them, at least as many.
    """

    num_heads: int
    head_dim: int
    rotary_dim: int
    keys: int
    ring: int


@dataclass(frozen=True)
class RecurrenceSizes:
    """Of a gated linear recurrence behind a short convolution.

    Args:
        num_heads: of this rank. block_width: channels of each.
        taps: of the convolution.
    """

    num_heads: int
    block_width: int
    taps: int


@dataclass(frozen=True)
class KernelSizes:
    """Of everything that one rank's layers and its head call.

    Args:
        intermediate_size: of an MLP on this rank.
        norm: of the hidden size. activation: of the MLPs; the inputs of what follows a squared ReLU are
            mostly 0.
        soft_cap: of the logits, if any.
        attention, window, recurrence: None where the model has no such layers.
    """

    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    norm: Literal["layer", "rms"]
    activation: Literal["squared_relu", "gelu_gate"]
    soft_cap: float | None = None
    attention: PagedAttentionSizes | None = None
    window: WindowAttentionSizes | None = None
    recurrence: RecurrenceSizes | None = None
