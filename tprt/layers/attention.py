"""Multi-head attention over a paged KV cache. Works on this rank's heads only and reduces nothing."""

import torch
from torch import nn

from tprt.batch import ForwardBatch
from tprt.cache.kv_cache import KVCache, PagedKVSpec
from tprt.distributed.sharding import divide
from tprt.distributed.tp_group import TPGroup
from tprt.kernels import HeadNorms, kernels_for
from tprt.layers.norm import HeadLayerNorm

Angles = tuple[torch.Tensor, torch.Tensor]
# Split attention: tokens of a part, and the most bytes that partial results take.
SPLIT_TOKENS, MAX_PARTIALS = 128, 128 * 2**20


def split_attention_bytes(rows: int, length: int, num_heads: int, head_dim: int) -> int:
    """Of float32 sums, maxima and weights of every part of ``rows`` sequences of ``length`` tokens."""
    parts = rows * -(-length // SPLIT_TOKENS) * num_heads
    return min(4 * parts * (head_dim + 2), MAX_PARTIALS)


class Attention(nn.Module):
    """LayerNorm of queries and keys head by head, their rotation, the cache, and the attention.

    Args:
        num_heads: of the whole model.
        norms: of queries and of keys, which have their names elsewhere in the model; None for none.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        tp: TPGroup,
        norms: tuple[HeadLayerNorm, HeadLayerNorm] | None,
        eps: float,
    ) -> None:
        super().__init__()
        self.num_heads = divide(num_heads, tp.size, "attention heads")
        self.head_dim, self.scale = head_dim, head_dim**-0.5
        self.kernels, self.eps = kernels_for(tp.device), eps
        # In a tuple: an attribute of its own would give the parameters a second name.
        self.norms = norms
        self.stacked: HeadNorms | None = None

    def finish_loading(self) -> None:
        """After the weights are in: put the norms of queries and keys side by side."""
        self.stacked = self._stack()

    def _stack(self) -> HeadNorms | None:
        if self.norms is None:
            return None
        weight = torch.stack([norm.weight.float() for norm in self.norms], dim=1)
        bias = torch.stack([norm.bias.float() for norm in self.norms], dim=1)
        return HeadNorms(weight, bias, self.eps)

    def cache_spec(self) -> PagedKVSpec:
        return PagedKVSpec(self.num_heads, self.head_dim)

    def forward(
        self, qkv: torch.Tensor, angles: Angles, batch: ForwardBatch, cache: KVCache
    ) -> torch.Tensor:
        """[T, local heads, 3, head_dim] -> [T, local heads * head_dim]; keys and values are cached."""
        norms, paged = self.stacked or self._stack(), batch.paged
        assert paged is not None
        context = self.kernels.attend(
            qkv, norms, *angles, cache.kv, paged.slot_mapping, paged.attention, self.scale
        )
        return context.flatten(1)
