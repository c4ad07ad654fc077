"""Who holds which KV block: reference counts, and blocks found again by what they hold.

A full block may be named by a key, a hash of all tokens up to its end. A block that nobody holds
keeps its key until it is handed out again, least recently used first, so a later sequence with the
same beginning shares it instead of computing it. Only rank 0 runs this; the other ranks are told
block numbers. Knows numbers and token ids: no tensors, no sequences.
"""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np


def extend_block_keys(keys: list[bytes], token_ids: Sequence[int], block_size: int) -> None:
    """Append, in place, the keys of all full blocks of ``token_ids`` that ``keys`` still lacks.

    A key covers everything before it, since keys and values of a position depend on all earlier
    tokens. 128 bits: two different texts never meet in practice.
    """
    for start in range(len(keys) * block_size, len(token_ids) - block_size + 1, block_size):
        tokens = np.array(token_ids[start : start + block_size], dtype=np.int64).tobytes()
        keys.append(blake2b(tokens, digest_size=16, key=keys[-1] if keys else b"").digest())


class BlockManager:
    """Counts references to ``num_blocks`` blocks. Block 0 is never given: padding points at it.

    Args:
        prefix_caching: whether ``register`` and ``match`` do anything.
    """

    def __init__(self, num_blocks: int, prefix_caching: bool = True) -> None:
        self.num_blocks, self.prefix_caching = num_blocks, prefix_caching
        self._references = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # Unreferenced blocks, the next to be given first: those without a key, then those with one
        # by the time of their release.
        self._bare = list(range(num_blocks - 1, 0, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def capacity(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those that keep a key included."""
        return len(self._bare) + len(self._kept)

    def references(self, block: int) -> int:
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks with one reference each; their old contents are forgotten."""
        assert count <= self.num_free, "callers check num_free first"
        blocks = [self._bare.pop() if self._bare else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each; takes unreferenced ones back out of the free ones."""
        for block in blocks:
            if self._references[block] == 0:
                del self._kept[block]  # a block without a key cannot be known to anyone
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each, the last first: a text's end is reused before its beginning."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} was released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._kept[block] = None
                else:
                    self._bare.append(block)

    def register(self, block: int, key: bytes) -> None:
        """Let a full block be found by its key. The first block of a key keeps it."""
        if self.prefix_caching and key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning. They are not held until shared."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_unreferenced(self, blocks: Sequence[int]) -> int:
        """How many of ``blocks`` sharing would take out of the free ones."""
        return sum(self._references[block] == 0 for block in blocks)

    def forget(self, blocks: Sequence[int]) -> None:
        """Let nobody else find these blocks: what they hold is not to be trusted."""
        for block in blocks:
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]
                if self._references[block] == 0:
                    del self._kept[block]
                    self._bare.append(block)

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
