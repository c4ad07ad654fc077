"""Triton kernels that only measure: a pure read of memory, and a kernel that does nothing."""

import torch
import triton
import triton.language as tl

# 16 loads of 16 bytes in flight for each of 256 threads.
BLOCK, TILES, NUM_WARPS = 4096, 4, 8
READ_MULTIPLE = BLOCK * TILES  # elements


@triton.jit  # type: ignore[untyped-decorator]
def _sum_tiles(x_ptr, sums_ptr, BLOCK: tl.constexpr, TILES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program i: sum of BLOCK * TILES neighbours."""
    part = tl.program_id(0)
    offsets = part.to(tl.int64) * (BLOCK * TILES) + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.static_range(TILES):
        total += tl.load(x_ptr + offsets + i * BLOCK)
    tl.store(sums_ptr + part, tl.sum(total, axis=0))


@triton.jit
def _nothing(x_ptr):  # type: ignore[no-untyped-def]
    pass


def read_all(x: torch.Tensor, sums: torch.Tensor) -> None:
    """Read float32 [n], n a multiple of READ_MULTIPLE, into float32 [n / READ_MULTIPLE] sums."""
    _sum_tiles[(len(sums),)](x, sums, BLOCK=BLOCK, TILES=TILES, num_warps=NUM_WARPS)


def nothing(x: torch.Tensor) -> None:
    _nothing[(1,)](x, num_warps=1)
