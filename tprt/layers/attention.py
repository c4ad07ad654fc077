"""Multi-head attention over a paged KV cache. Works on this rank's heads only and reduces nothing."""

import torch
from torch import nn

from tprt import kernels
from tprt.batch import ForwardBatch
from tprt.cache.kv_cache import KVCache, PagedKVSpec
from tprt.distributed.sharding import divide
from tprt.distributed.tp_group import TPGroup
from tprt.layers.norm import HeadLayerNorm

Angles = tuple[torch.Tensor, torch.Tensor]


class Attention(nn.Module):
    """Args:
    num_heads: of the whole model.
    """

    def __init__(self, num_heads: int, head_dim: int, tp: TPGroup) -> None:
        super().__init__()
        self.num_heads = divide(num_heads, tp.size, "attention heads")
        self.head_dim, self.scale = head_dim, head_dim**-0.5

    def cache_spec(self) -> PagedKVSpec:
        return PagedKVSpec(self.num_heads, self.head_dim)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: ForwardBatch, cache: KVCache
    ) -> torch.Tensor:
        """q, k, v [T, local heads, head_dim] -> [T, local heads * head_dim]; k and v are cached."""
        kernels.store_kv(k, v, cache.kv, batch.slot_mapping)
        return batch.attention(q, cache.kv, self.scale).flatten(1)


class QKNormRotary(nn.Module):
    """LayerNorm of queries and keys, head by head, and their rotation.

    Args:
        norms: of queries and of keys, which have their names elsewhere in the model; None for none.
    """

    def __init__(self, norms: tuple[HeadLayerNorm, HeadLayerNorm] | None, eps: float) -> None:
        super().__init__()
        # In a tuple: an attribute of its own would give the parameters a second name.
        self.norms, self.eps = norms, eps
        self.affine: tuple[torch.Tensor, torch.Tensor] | tuple[None, None] | None = None

    def finish_loading(self) -> None:
        self.affine = self._stacked()

    def _stacked(self) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Weights and biases of queries and keys, float32 [local heads, 2, head_dim]."""
        if self.norms is None:
            return None, None
        weight = torch.stack([norm.weight.float() for norm in self.norms], dim=1)
        return weight, torch.stack([norm.bias.float() for norm in self.norms], dim=1)

    def forward(self, qk: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, local heads, 2, head_dim] -> queries and keys, [T, local heads, head_dim] each."""
        weight, bias = self.affine or self._stacked()
        turned = kernels.qk_norm_rotary(qk, weight, bias, self.eps, *angles)
        return turned[:, :, 0], turned[:, :, 1]
