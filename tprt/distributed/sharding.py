"""How one parameter of one rank is cut out of the whole tensor on disk.

A ``ShardSpec`` is set where the parameter is made and is the only place that knows the cut: loading,
saving, re-sharding, planning and tests all read it. It knows sizes, not models or files.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch

from tprt.errors import ConfigError

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Piece:
    """Where one block of the canonical tensor lies in the local one.

    The local block may have one leading dimension more: the canonical block is then repeated along it.
    """

    canonical: Slices
    local: Slices


@dataclass(frozen=True)
class ShardSpec:
    """Maps the canonical (Hugging Face) tensor to the local one of a rank.

    Args:
        canonical_shape: shape of the whole tensor on disk.
        local_shape: shape of this rank's parameter, before ``transposed``.
        pieces: blocks that are copied; local elements outside all of them are zero padding.
        transposed: the parameter is stored as the transpose of ``local_shape`` (two dimensions).
    """

    canonical_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    transposed: bool = False

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return self.local_shape[::-1] if self.transposed else self.local_shape

    def load(self, parameter: torch.Tensor, read: Callable[[Slices], torch.Tensor]) -> None:
        """Fill ``parameter`` in place; ``read`` returns a block of the canonical tensor."""
        local = parameter.t() if self.transposed else parameter
        if sum(prod(_lengths(p.local, self.local_shape)) for p in self.pieces) < local.numel():
            local.zero_()
        for piece in self.pieces:
            local[piece.local].copy_(read(piece.canonical))

    def store(self, parameter: torch.Tensor, canonical: torch.Tensor) -> None:
        """Copy this rank's blocks into the whole tensor; the inverse of ``load``."""
        local = parameter.t() if self.transposed else parameter
        for piece in self.pieces:
            block = local[piece.local]
            if block.dim() > canonical.dim():
                block = block[0]
            canonical[piece.canonical].copy_(block)

    def needed_bytes(self, itemsize: int) -> int:
        """Bytes of the canonical tensor this rank reads."""
        blocks = (prod(_lengths(p.canonical, self.canonical_shape)) for p in self.pieces)
        return sum(blocks) * itemsize


def shard_spec(parameter: torch.Tensor) -> ShardSpec:
    """The spec a parameter was made with."""
    spec = getattr(parameter, "shard_spec", None)
    if not isinstance(spec, ShardSpec):
        raise TypeError("the parameter was made without a shard_spec")
    return spec


def _lengths(slices: Slices, shape: Sequence[int]) -> list[int]:
    return [len(range(*s.indices(n))) for s, n in zip(slices, shape, strict=True)]


def whole(shape: Sequence[int]) -> Slices:
    return tuple(slice(0, n) for n in shape)


def replicated(shape: Sequence[int]) -> ShardSpec:
    """Every rank holds all of it."""
    full = tuple(shape)
    return ShardSpec(full, full, (Piece(whole(full), whole(full)),))


def broadcast_rows(rows: int, shape: Sequence[int]) -> ShardSpec:
    """Every rank holds ``rows`` copies of a tensor of ``shape``: local [rows, *shape]."""
    full = tuple(shape)
    return ShardSpec(full, (rows, *full), (Piece(whole(full), whole((rows, *full))),))


def cut(shape: Sequence[int], dim: int, rank: int, size: int) -> ShardSpec:
    """Rank ``rank`` of ``size`` holds an equal part along ``dim``."""
    part = divide(shape[dim], size, f"dimension {dim} of {tuple(shape)}")
    return padded_cut(shape, dim, rank, part)


def padded_cut(shape: Sequence[int], dim: int, rank: int, part: int) -> ShardSpec:
    """Rank ``rank`` holds ``part`` entries along ``dim``; those past the end are padding."""
    full = tuple(shape)
    start, stop = min(rank * part, full[dim]), min((rank + 1) * part, full[dim])
    local_shape = (*full[:dim], part, *full[dim + 1 :])
    canonical, local = list(whole(full)), list(whole(full))
    canonical[dim], local[dim] = slice(start, stop), slice(0, stop - start)
    pieces = (Piece(tuple(canonical), tuple(local)),) if stop > start else ()
    return ShardSpec(full, local_shape, pieces)


def selected_rows(shape: Sequence[int], runs: Iterable[range], rows: int) -> ShardSpec:
    """The rows of ``runs``, one run behind the other; what is left of ``rows`` is padding."""
    full, start, pieces = tuple(shape), 0, []
    for run in runs:
        stop = start + len(run)
        local = (slice(start, stop), *whole(full[1:]))
        pieces.append(Piece((slice(run.start, run.stop), *whole(full[1:])), local))
        start = stop
    return ShardSpec(full, (rows, *full[1:]), tuple(pieces))


def divide(n: int, size: int, what: str) -> int:
    """``n // size``, or ConfigError when it does not come out even."""
    if n % size:
        raise ConfigError(f"{what} ({n}) does not divide over {size} ranks")
    return n // size


def padded_part(n: int, size: int) -> int:
    """Entries per rank when ``n`` are spread over ``size`` ranks with padding at the end."""
    return -(-n // size)
