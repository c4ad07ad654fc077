"""Memory of sequences: what a layer asks for, and what it gets."""

import torch

from tprt.cache.kv_cache import KVCache, PagedKVSpec, allocate_kv_cache
from tprt.cache.slot_cache import SlotCache, SlotSpec, allocate_slot_cache

CacheSpec = PagedKVSpec | SlotSpec
LayerCache = KVCache | SlotCache

__all__ = ["CacheSpec", "LayerCache", "allocate_caches"]


def allocate_caches(
    specs: list[CacheSpec],
    num_blocks: int,
    block_size: int,
    num_slots: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[LayerCache]:
    """One zeroed cache per layer; block ids, and slots, are shared by all layers."""

    def allocate(spec: CacheSpec) -> LayerCache:
        if isinstance(spec, PagedKVSpec):
            return allocate_kv_cache([spec], num_blocks, block_size, dtype, device)[0]
        return allocate_slot_cache(spec, num_slots, dtype, device)

    return [allocate(spec) for spec in specs]
