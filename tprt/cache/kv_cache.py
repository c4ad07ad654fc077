"""Memory for keys and values, in blocks of a fixed number of tokens.

Allocated once and written in place at fixed addresses. Knows sizes and devices, not layers or models.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PagedKVSpec:
    """What one attention layer keeps per token on this rank."""

    num_heads: int
    head_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * self.num_heads * self.head_dim * dtype.itemsize


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer: each [num_blocks, block_size, num_heads, head_dim]."""

    k: torch.Tensor
    v: torch.Tensor


def allocate_kv_cache(
    specs: list[PagedKVSpec],
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[KVCache]:
    """One zeroed ``KVCache`` per layer; block ids are shared by all layers."""

    def zeros(spec: PagedKVSpec) -> torch.Tensor:
        shape = (num_blocks, block_size, spec.num_heads, spec.head_dim)
        return torch.zeros(shape, dtype=dtype, device=device)

    return [KVCache(zeros(spec), zeros(spec)) for spec in specs]
