"""Memory of a fixed size per sequence: recurrent state, and the keys and values of a window.

Allocated once and written in place at fixed addresses; a row belongs to a slot. Knows sizes and devices,
not layers or models.
"""

from dataclasses import dataclass

import torch

# Keys of a ring come in multiples of this, which attention reads at a time.
RING_TILE, SMALL_RING_TILE = 128, 16


@dataclass(frozen=True)
class RecurrentSpec:
    """What one recurrent layer keeps per sequence on this rank.

    Args:
        width: channels.
        conv_width: taps of the convolution before the recurrence; its last inputs are kept.
    """

    width: int
    conv_width: int

    def bytes_per_slot(self, dtype: torch.dtype) -> int:
        return self.width * (torch.float32.itemsize + self.conv_width * dtype.itemsize)


@dataclass(frozen=True)
class WindowSpec:
    """What one layer with a sliding window keeps per sequence on this rank.

    Args:
        head_dim: of the one head of keys and values that all queries share.
        keys: of the window, a query's own included.
    """

    head_dim: int
    keys: int

    @property
    def ring(self) -> int:
        """Places; a token has the one of its position modulo this."""
        tile = RING_TILE if self.keys >= RING_TILE else SMALL_RING_TILE
        return -(-self.keys // tile) * tile

    def bytes_per_slot(self, dtype: torch.dtype) -> int:
        return 2 * self.ring * self.head_dim * dtype.itemsize


@dataclass(frozen=True)
class RecurrentCache:
    """Of one layer.

    Args:
        state: float32 [slots, width]; rounded, a decay near 1 would become 1 and stay.
        conv: [slots, conv_width, width], the inputs of the last tokens, each at the row of its position
            modulo conv_width.
    """

    state: torch.Tensor
    conv: torch.Tensor

    def copy(self, source: int, target: int) -> None:
        self.state[target] = self.state[source]
        self.conv[target] = self.conv[source]


@dataclass(frozen=True)
class WindowCache:
    """Of one layer: keys, rotated, and values, [slots, 2, ring, head_dim]."""

    kv: torch.Tensor

    def copy(self, source: int, target: int) -> None:
        self.kv[target] = self.kv[source]


SlotSpec = RecurrentSpec | WindowSpec
SlotCache = RecurrentCache | WindowCache


def allocate_slot_cache(
    spec: SlotSpec, slots: int, dtype: torch.dtype, device: torch.device
) -> SlotCache:
    """Zeroed; no sequence reads what one before it has left."""

    def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    if isinstance(spec, WindowSpec):
        return WindowCache(zeros((slots, 2, spec.ring, spec.head_dim), dtype))
    state = zeros((slots, spec.width), torch.float32)
    return RecurrentCache(state, zeros((slots, spec.conv_width, spec.width), dtype))
