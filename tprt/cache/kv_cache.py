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
    """Keys and values of one layer, [num_blocks, 2, block_size, num_heads, head_dim].

    Both in one tensor, keys before values in each block: gathering or copying a block is one access.
    """

    kv: torch.Tensor

    @property
    def k(self) -> torch.Tensor:
        """[num_blocks, block_size, num_heads, head_dim], a view."""
        return self.kv[:, 0]

    @property
    def v(self) -> torch.Tensor:
        """As ``k``."""
        return self.kv[:, 1]


def allocate_kv_cache(
    specs: list[PagedKVSpec],
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[KVCache]:
    """One zeroed ``KVCache`` per layer; block ids are shared by all layers."""

    def zeros(spec: PagedKVSpec) -> torch.Tensor:
        shape = (num_blocks, 2, block_size, spec.num_heads, spec.head_dim)
        return torch.zeros(shape, dtype=dtype, device=device)

    return [KVCache(zeros(spec)) for spec in specs]
