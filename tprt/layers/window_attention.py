"""Attention over a sliding window, one head of keys and values for all queries. Reduces nothing."""

import torch
from torch import nn

from tprt.batch import ForwardBatch
from tprt.cache.slot_cache import WindowCache, WindowSpec
from tprt.distributed.tp_group import TPGroup
from tprt.kernels import kernels_for
from tprt.layers.attention import Angles

# Places of a ring that a part of split attention covers, by bytes of an element.
SPLIT_PLACES = {2: 128, 4: 32}


def split_window_bytes(rows: int, spec: WindowSpec, num_heads: int, dtype: torch.dtype) -> int:
    """Of float32 sums, maxima and weights of every part of ``rows`` rings in a step."""
    parts = -(-spec.ring // SPLIT_PLACES[dtype.itemsize])
    padded = max(16, 1 << (num_heads - 1).bit_length())  # what a matrix product takes
    return 4 * rows * parts * padded * (spec.head_dim + 2)


class WindowAttention(nn.Module):
    """Args:
    num_heads: of queries, on this rank.
    keys: that a query sees, its own included.
    """

    def __init__(self, num_heads: int, head_dim: int, keys: int, tp: TPGroup) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.keys = num_heads, head_dim, keys
        self.scale, self.kernels = head_dim**-0.5, kernels_for(tp.device)

    def cache_spec(self) -> WindowSpec:
        return WindowSpec(self.head_dim, self.keys)

    def forward(
        self, qkv: torch.Tensor, angles: Angles, batch: ForwardBatch, cache: WindowCache
    ) -> torch.Tensor:
        """[T, (heads + 2) * head_dim], queries before key and value -> [T, heads * head_dim]."""
        qkv = qkv.view(len(qkv), self.num_heads + 2, self.head_dim)
        segments = batch.segments
        context = self.kernels.window_attend(
            qkv, *angles, cache.kv, segments, self.keys, self.scale
        )
        return context.flatten(1)
