"""Collectives of a few rows over memory that ranks read from one another: one launch, no library.

Each rank owns a buffer that all ranks can address. To sum or to gather, a rank writes its part into its
own buffer, tells every rank so, waits until every rank has told it, and reads all parts. Sums run in
float32 over ranks 0, 1, 2, ... on every rank, so all ranks hold the same bits. Knows tensors and
addresses only; ``distributed.symmetric_memory`` makes the buffers.

How the ranks keep in step. A buffer begins with flags, one per (place, rank), that only count up; one
program serves a place and talks to the programs of the same place elsewhere. The n-th time it runs, it

1. writes its part into slot n mod 2 of its place,
2. stores n into flag (place, its own rank) of every rank's buffer, released to the whole system,
3. waits until all flags of this place in its own buffer have reached n, acquired from the whole system,
4. reads slot n mod 2 of this place from every rank.

A rank that arrives late finds the parts it needs: whoever writes the same slot again does so at n + 2,
after waiting at n + 1 for this rank, which said n + 1 only after it had read everything of n. Two slots
are therefore enough, and nobody waits for readers. A program takes n from the flag it set itself, so
counting happens on the device: a captured graph is replayed as it is, and nothing is ever reset. Counts
belong to places, so calls may have different numbers of rows.

A rank that never calls leaves the others spinning. Noticing that is the step deadline's business;
``abort`` then ends the wait, from the host, by a word in this rank's own buffer.

What callers owe: buffers zeroed before the first call of any rank; the same calls with the same shapes
in the same order on every rank; on each rank one call after the other (one stream, or ordered by
events). All programs of a call have to be on the GPU together, which is why rows are few.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from tprt.kernels.interface import Norm, Tensors
from tprt.kernels.triton_ops.norm import row_launch
from tprt.kernels.triton_ops.numerics import round_to

MAX_SIZE = 16
_LINE = tl.constexpr(16)  # int64 flags of one place: a cache line of its own
_ALIGNMENT = 16


def buffer_bytes(max_rows: int, row_bytes: int) -> int:
    """What each rank's buffer must hold for a ``OneShot`` of these sizes."""
    places = max_rows + 1
    return (places + 1) * _LINE.value * 8 + 2 * places * row_bytes


class OneShot:
    """One rank's access to the buffers of all ranks.

    Args:
        addresses: int64 [size] on this rank's device: where each rank's buffer lies, as this device
            addresses it; aligned to 16 bytes, zeroed, ``buffer_bytes`` long.
        rank: this rank.
        max_rows: most rows of one call; small enough for as many programs to run at once.
        row_bytes: most bytes of one row, and of one rank's words; a multiple of 16.
    """

    def __init__(self, addresses: torch.Tensor, rank: int, max_rows: int, row_bytes: int) -> None:
        assert len(addresses) <= MAX_SIZE and row_bytes % _ALIGNMENT == 0
        self.addresses, self.rank, self.size = addresses, rank, len(addresses)
        self.max_rows, self.row_bytes = max_rows, row_bytes
        self._stream: torch.cuda.Stream | None = None
        if addresses.device.type == "cuda":
            self._stream = torch.cuda.Stream(addresses.device)
            # Loads the kernel: to load one while another spins may never return.
            self._stop(0)

    def abort(self) -> None:
        """End every wait of this rank, now and from now on; what such calls return is of no use."""
        self._stop(1)

    def _stop(self, value: int) -> None:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            _stop_kernel[(1,)](self.addresses, self.rank, self.max_rows, value)

    def fits(self, rows: int, width: int, dtype: torch.dtype) -> bool:
        """Whether [rows, width] can be summed here; the same on every rank."""
        return rows <= self.max_rows and width * dtype.itemsize <= self.row_bytes

    def all_reduce(self, partial: torch.Tensor, *, published: bool = False) -> torch.Tensor:
        """The sum over ranks of [T, width], rounded once to its dtype; a new tensor.

        Args:
            published: ``partial`` was given to ``publish`` before, by every rank; only its shape and
                dtype are used.
        """
        out = torch.empty(partial.shape, dtype=partial.dtype, device=partial.device)
        self._reduce(partial, (out,) * 6, 0, 0.0, False, published)
        return out

    def all_reduce_add_layer_norm(
        self,
        partial: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor,
        norm: Norm,
        *,
        published: bool = False,
    ) -> Tensors:
        """``Kernels.add_layer_norm`` of the sum over ranks: what ends a row-parallel layer.

        Args:
            partial: [T, width] of this rank, in any floating dtype. bias: [width].
            residual: [T, width], the same on every rank. Rows are contiguous.
            published: as in ``all_reduce``.

        Returns:
            Two tensors [T, width] in the dtype of ``residual``, the same bits on every rank. Sums are
            float32, rounded once.
        """
        assert residual.shape == partial.shape and residual.stride(1) == 1
        total, out = (
            torch.empty_like(residual, memory_format=torch.contiguous_format) for _ in "12"
        )
        assert norm.bias is not None, "an RMSNorm is computed after the sum"
        tensors = total, out, bias, residual, norm.weight, norm.bias
        self._reduce(partial, tensors, residual.stride(0), norm.eps, True, published)
        return total, out

    def all_gather(self, words: torch.Tensor, *, published: bool = False) -> torch.Tensor:
        """int64 [n] of each rank -> [size, n] on every rank, ordered by rank.

        Args:
            published: as in ``all_reduce``, with ``publish_words``.
        """
        (count,) = words.shape
        assert (
            words.dtype == torch.int64 and words.stride(0) == 1 and self.fits(1, count, words.dtype)
        )
        out = torch.empty(self.size, count, dtype=torch.int64, device=words.device)
        block = triton.next_power_of_2(max(1, count))
        _all_gather_kernel[(1,)](
            words, out, self.addresses, self.rank, count, self.max_rows, self.row_bytes,
            PUBLISH=not published, **self._sizes, BLOCK=block,
            num_warps=min(8, max(1, block // 64)),
        )  # fmt: skip
        return out

    def publish(self, partial: torch.Tensor) -> None:
        """The first half of a sum, as a launch of its own; the second is told ``published=True``.

        For what is to run between the two, and for ranks that take turns in one process.
        """
        self._publish(partial, 0)

    def publish_words(self, words: torch.Tensor) -> None:
        """The first half of ``all_gather``."""
        self._publish(words.unsqueeze(0), self.max_rows)

    @property
    def _sizes(self) -> dict[str, int]:
        return {"SIZE": self.size, "PEERS": triton.next_power_of_2(self.size)}

    def _publish(self, rows: torch.Tensor, first_place: int) -> None:
        assert self.fits(len(rows), rows.shape[1], rows.dtype) and rows.stride(1) == 1
        _publish_kernel[(len(rows),)](
            rows, self.addresses, self.rank, first_place, rows.shape[1], rows.stride(0),
            self.max_rows, self.row_bytes, **self._sizes, **row_launch(rows.shape[1]),
        )  # fmt: skip

    def _reduce(
        self,
        partial: torch.Tensor,
        tensors: tuple[torch.Tensor, ...],
        residual_stride: int,
        eps: float,
        add_norm: bool,
        published: bool,
    ) -> None:
        rows, width = partial.shape
        assert self.fits(rows, width, partial.dtype) and partial.stride(1) == 1
        _all_reduce_kernel[(rows,)](
            partial, *tensors, self.addresses, self.rank, width, partial.stride(0),
            residual_stride, eps, self.max_rows, self.row_bytes,
            PUBLISH=not published, ADD_NORM=add_norm, **self._sizes, **row_launch(width),
        )  # fmt: skip


# One variant for all ranks: loading another while a peer's program already spins may never return.
@triton.jit(do_not_specialize=["rank"])
def _all_reduce_kernel(
    partial_ptr, total_ptr, out_ptr, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr,
    addresses_ptr, rank, width, stride, residual_stride, eps, max_rows, row_bytes,
    PUBLISH: tl.constexpr, ADD_NORM: tl.constexpr,
    SIZE: tl.constexpr, PEERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    if PUBLISH:
        mine = tl.load(partial_ptr + row * stride + columns, mask=inside)
        turn = _publish(
            mine, addresses_ptr, rank, row, width, max_rows, row_bytes, SIZE, PEERS, BLOCK
        )
    else:
        turn = tl.load(_flags(tl.load(addresses_ptr + rank), row) + rank)
    # All that does not come from a peer is asked for before the wait.
    slots = _slots(
        addresses_ptr, row, turn, max_rows, row_bytes, SIZE, partial_ptr.dtype.element_ty
    )
    if ADD_NORM:
        residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
        norm_weight = tl.load(norm_weight_ptr + columns, mask=inside, other=0.0)
        norm_bias = tl.load(norm_bias_ptr + columns, mask=inside, other=0.0)
    _wait(addresses_ptr, rank, row, turn, max_rows, SIZE, PEERS)
    x = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.static_range(SIZE):
        part = tl.load(slots[i] + columns, mask=inside, other=0.0, cache_modifier=".cg")
        x += part.to(tl.float32)
    if ADD_NORM:
        x = residual.to(tl.float32) + (x + bias.to(tl.float32))
    total = round_to(x, total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * width + columns, total, mask=inside)
    if ADD_NORM:
        x = total.to(tl.float32)
        centered = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
        variance = tl.sum(centered * centered, axis=0) / width
        y = centered * tl.rsqrt(variance + eps) * norm_weight.to(tl.float32)
        y = round_to(y + norm_bias.to(tl.float32), out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * width + columns, y, mask=inside)


@triton.jit(do_not_specialize=["rank"])
def _all_gather_kernel(
    words_ptr, out_ptr, addresses_ptr, rank, count, max_rows, row_bytes, PUBLISH: tl.constexpr,
    SIZE: tl.constexpr, PEERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < count
    if PUBLISH:
        mine = tl.load(words_ptr + columns, mask=inside)
        turn = _publish(
            mine, addresses_ptr, rank, max_rows, count, max_rows, row_bytes, SIZE, PEERS, BLOCK
        )
    else:
        turn = tl.load(_flags(tl.load(addresses_ptr + rank), max_rows) + rank)
    slots = _slots(addresses_ptr, max_rows, turn, max_rows, row_bytes, SIZE, tl.int64)
    _wait(addresses_ptr, rank, max_rows, turn, max_rows, SIZE, PEERS)
    for i in tl.static_range(SIZE):
        words = tl.load(slots[i] + columns, mask=inside, other=0, cache_modifier=".cg")
        tl.store(out_ptr + i * count + columns, words, mask=inside)


@triton.jit(do_not_specialize=["rank"])
def _publish_kernel(
    x_ptr, addresses_ptr, rank, first_place, width, stride, max_rows, row_bytes,
    SIZE: tl.constexpr, PEERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mine = tl.load(x_ptr + row * stride + columns, mask=columns < width)
    place = first_place + row
    _publish(mine, addresses_ptr, rank, place, width, max_rows, row_bytes, SIZE, PEERS, BLOCK)


@triton.jit(do_not_specialize=["rank", "value"])
def _stop_kernel(addresses_ptr, rank, max_rows, value):
    tl.store(_stop_word(addresses_ptr, rank, max_rows), value.to(tl.int64))


@triton.jit
def _stop_word(addresses_ptr, rank, max_rows):
    """Behind the flags of all places: not 0 once this rank waits for nobody any more."""
    return _flags(tl.load(addresses_ptr + rank), max_rows + 1)


@triton.jit
def _flags(address, place):
    """Flags of ``place`` in the buffer at ``address``: int64, one per rank."""
    return address.to(tl.pointer_type(tl.int64)) + place * _LINE


@triton.jit
def _slot(address, place, turn, max_rows, row_bytes, dtype: tl.constexpr):
    """The slot of ``turn`` in the buffer at ``address``, as a pointer to ``dtype``."""
    places = max_rows + 1
    address += (places + 1) * (_LINE * 8) + ((turn & 1) * places + place) * row_bytes
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _slots(
    addresses_ptr, place, turn, max_rows, row_bytes, SIZE: tl.constexpr, dtype: tl.constexpr
):
    """A pointer for each rank."""
    slots = ()
    for i in tl.static_range(SIZE):
        address = tl.load(addresses_ptr + i)
        slots += (_slot(address, place, turn, max_rows, row_bytes, dtype),)  # type: ignore[assignment]
    return slots


@triton.jit
def _publish(
    mine, addresses_ptr, rank, place, width, max_rows, row_bytes,
    SIZE: tl.constexpr, PEERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Steps 1 and 2; the turn, int64, that this makes."""
    columns, peers = tl.arange(0, BLOCK), tl.arange(0, PEERS)
    own = tl.load(addresses_ptr + rank)
    turn = tl.load(_flags(own, place) + rank) + 1
    slot = _slot(own, place, turn, max_rows, row_bytes, mine.dtype)
    tl.store(slot + columns, mine, mask=columns < width)
    # All threads have stored, and read the flag, before any of them signals.
    tl.debug_barrier()
    addresses = tl.load(addresses_ptr + peers, mask=peers < SIZE, other=0)
    turns = tl.zeros((PEERS,), dtype=tl.int64) + turn
    tl.atomic_xchg(
        _flags(addresses, place) + rank, turns, mask=peers < SIZE, sem="release", scope="sys"
    )
    return turn


@triton.jit
def _wait(
    addresses_ptr, rank, place, turn, max_rows, SIZE: tl.constexpr, PEERS: tl.constexpr
):  # fmt: skip
    """Step 3."""
    peers = tl.arange(0, PEERS)
    is_peer = peers < SIZE
    flags = _flags(tl.load(addresses_ptr + rank), place) + peers
    nothing = tl.zeros((PEERS,), dtype=tl.int64)
    stop_word = _stop_word(addresses_ptr, rank, max_rows)
    reached = turn - 1  # by the slowest
    while reached < turn:
        seen = tl.atomic_add(flags, nothing, mask=is_peer, sem="acquire", scope="sys")
        # A vector like the flags: the minimum makes all threads leave in the same round.
        stop = tl.load(stop_word + nothing, volatile=True)
        reached = tl.min(tl.where(is_peer & (stop == 0), seen, turn), axis=0)
    # No thread reads a peer's slot before the threads that saw the flags did.
    tl.debug_barrier()
