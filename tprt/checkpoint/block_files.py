"""Reads blocks of raw elements out of files, from several threads at once.

Knows where bytes lie and how they get into memory; no layouts, no devices, no names of weights.
"""

import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tprt.checkpoint.reader import READ_HINT, FileBlock, file_stamp
from tprt.checkpoint.torch_file import AGAIN_HINT, INTEGERS
from tprt.distributed.sharding import Slices
from tprt.errors import CheckpointError

# One call per run of bytes pays above this; below, its cost in Python does, and a mapping is faster.
MIN_RUN = 64 << 10


def split(shape: Sequence[int], limit: int) -> Iterator[Slices]:
    """Blocks of at most ``limit`` elements, in row order, that make up ``shape``."""
    if prod(shape) <= limit:
        yield tuple(slice(0, n) for n in shape)
        return
    row = prod(shape[1:])
    step = max(1, limit // row)
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        if row <= limit:
            yield (rows, *(slice(0, n) for n in shape[1:]))
        else:
            yield from ((rows, *inner) for inner in split(shape[1:], limit))


def run_bytes(block: FileBlock, out: "np.ndarray[Any, Any]") -> int:
    """Bytes that lie side by side in the file and in ``out``."""
    run = block.dtype.itemsize
    for n, there, here in reversed(
        list(zip(block.shape, block.strides, out.strides, strict=True))
    ):  # fmt: skip
        if n != 1 and not there == here == run:
            break
        run *= n
    return run


class BlockFiles:
    """The files that blocks lie in, each opened once. Safe to use from several threads.

    ``close`` lets go of all of them; nobody may be reading then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fds: dict[Path, int] = {}
        self._maps: dict[Path, mmap.mmap] = {}

    def read(self, name: str, block: FileBlock, out: "np.ndarray[Any, Any]") -> None:
        """Fill ``out`` with the bits of ``block``.

        Args:
            name: of the tensor, for errors.
            out: integers of the block's width and shape, at any strides.

        Raises:
            CheckpointError: the file cannot be read, has changed since its header was checked, or
                ends before the block does.
        """
        try:
            fd = self._fd(name, block)
            run = run_bytes(block, out)
            if MIN_RUN <= run or run == block.nbytes:
                self._read_runs(fd, name, block, out, run)
            else:
                np.copyto(out, self._mapped(block))
        except OSError as error:
            raise CheckpointError(
                f"'{name}' cannot be read: {error.strerror or error}",
                where=str(block.path),
                hint=READ_HINT,
            ) from error

    def close(self) -> None:
        for mapping in self._maps.values():
            mapping.close()
        for fd in self._fds.values():
            os.close(fd)
        self._maps.clear()
        self._fds.clear()

    def __enter__(self) -> "BlockFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fd(self, name: str, block: FileBlock) -> int:
        with self._lock:
            if block.path not in self._fds:
                self._fds[block.path] = os.open(block.path, os.O_RDONLY | os.O_CLOEXEC)
            fd = self._fds[block.path]
            if file_stamp(fd) != block.stamp:
                raise CheckpointError(
                    f"the file was changed after its header was checked; '{name}' was to be read",
                    where=str(block.path),
                    hint="load it again when nothing writes to it",
                )
            return fd

    def _mapped(self, block: FileBlock) -> "np.ndarray[Any, Any]":
        with self._lock:
            mapping = self._maps.get(block.path)
            if mapping is None:
                mapping = mmap.mmap(self._fds[block.path], 0, access=mmap.ACCESS_READ)
                self._maps[block.path] = mapping
        kind = INTEGERS[block.dtype.itemsize]
        return np.ndarray(block.shape, kind, mapping, block.offset, block.strides)

    def _read_runs(
        self, fd: int, name: str, block: FileBlock, out: "np.ndarray[Any, Any]", run: int
    ) -> None:
        inner = len(block.shape)
        while inner and prod(block.shape[inner - 1 :]) * block.dtype.itemsize <= run:
            inner -= 1
        for index in np.ndindex(*block.shape[:inner]):
            at = block.offset + sum(i * n for i, n in zip(index, block.strides, strict=False))
            target = out[(*index, ...)].reshape(-1).view(np.uint8).data
            while target:
                count = os.preadv(fd, [target], at)
                if not count:
                    raise CheckpointError(
                        f"the file ends inside '{name}', at byte {at}",
                        where=str(block.path),
                        hint=AGAIN_HINT,
                    )
                target, at = target[count:], at + count
