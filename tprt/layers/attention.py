"""Multi-head attention over a paged KV cache. Works on this rank's heads only and reduces nothing."""

import torch
from torch import nn

from tprt import kernels
from tprt.batch import ForwardBatch
from tprt.cache.kv_cache import KVCache, PagedKVSpec
from tprt.distributed.sharding import divide
from tprt.distributed.tp_group import TPGroup


class Attention(nn.Module):
    def __init__(self, num_heads: int, head_dim: int, tp: TPGroup) -> None:
        super().__init__()
        self.num_heads = divide(num_heads, tp.size, "attention heads")
        self.head_dim, self.scale = head_dim, head_dim**-0.5

    def cache_spec(self) -> PagedKVSpec:
        return PagedKVSpec(self.num_heads, self.head_dim)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: ForwardBatch,
        cache: KVCache,
    ) -> torch.Tensor:
        """q, k, v [T, local heads, head_dim] -> [T, local heads * head_dim]; k and v are cached."""
        kernels.store_kv(k, v, cache.k, cache.v, batch.slot_mapping)
        ctx = kernels.paged_attention(
            q,
            cache.k,
            cache.v,
            batch.block_tables,
            batch.query_lens,
            batch.context_lens,
            self.scale,
        )
        return ctx.flatten(1)
