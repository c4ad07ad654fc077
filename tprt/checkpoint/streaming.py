"""Streams blocks of files into tensors, in several threads; each reads a batch and copies it on.

What lies in a file as it shall lie in memory is read in place; all else goes densely through a ring of
staging buffers. What has arrived is looked through for NaN and infinities. Knows no names of weights,
no layouts and no ``ShardSpec``.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tprt.checkpoint.block_files import BlockFiles
from tprt.checkpoint.staging_ring import ALIGN, Buffer, Busy, Part, StagingRing, StreamSettings
from tprt.checkpoint.torch_file import integer_view


@dataclass(frozen=True)
class LoadStats:
    """What a load took. Reads and copies overlap, so the seconds may add up to more than it lasted.

    Args:
        read_s: seconds in which at least one thread was reading a file.
        copy_s: seconds in which a GPU's copy stream, or at least one thread of a CPU, was copying,
            converting, transposing or looking for NaN. What is read in place is not copied.
        bytes_read: asked of the files.
    """

    read_s: float
    copy_s: float
    bytes_read: int


class _CallingThread(Executor):
    """Does what is submitted at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class NotFinite(Exception):
    """A NaN, an infinity, or a value that became one in the parameter's dtype."""


Failure = tuple[int, Exception]  # the order of the part, and what it met


class Streamer:
    """One load: its files, its threads and its ring, all gone when the block around it ends.

    Args:
        device: where all targets lie.
    """

    def __init__(self, device: torch.device, settings: StreamSettings) -> None:
        assert settings.buffers >= settings.threads and settings.buffer_bytes % ALIGN == 0
        self.settings = settings
        self.ring = StagingRing(device, settings)
        self._files = BlockFiles()
        self._reading = Busy()

    def __enter__(self) -> "Streamer":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
        self.ring.close()

    @property
    def read_s(self) -> float:
        return self._reading.seconds

    @torch.no_grad()
    def run(self, parts: Iterable[Part]) -> Failure | None:
        """Read and copy all ``parts``, begun in their order; iterates in the calling thread.

        Returns:
            The failure that comes first in the parts' order, else None. After a failure nothing new
            is begun.
        """
        failures: list[Failure] = []
        running: dict[Future[Failure | None], list[Part]] = {}

        def settle() -> None:
            """Wait until a batch is done; after a failure, cancel what can be."""
            nonlocal running
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                batch = running.pop(future)
                failure = future.result() or self._read_here(batch)
                if failure is not None:
                    failures.append(failure)
            if failures:
                # Batches are begun in order: those that have not come after any failure.
                running = {f: batch for f, batch in running.items() if not f.cancel()}

        with self._executor() as executor, self.ring.on_stream():
            try:
                for batch in _batches(parts, self.settings.buffer_bytes):
                    running[executor.submit(self._load, batch)] = batch
                    while len(running) >= 2 * self.settings.threads:
                        settle()
                    if failures:
                        break
                while running:
                    settle()
                failures += [(order, NotFinite()) for order in self.ring.synchronize()]
            finally:
                for future in running:
                    future.cancel()
        return min(failures, key=lambda failure: failure[0], default=None)

    def _executor(self) -> Executor:
        if self.settings.threads == 1:
            return _CallingThread()
        return ThreadPoolExecutor(self.settings.threads, thread_name_prefix="tprt-load")

    def _load(self, batch: list[Part]) -> Failure | None:
        """In a thread: bits to their place, or by way of a buffer."""
        with self.ring.buffer() if any(p.staged for p in batch) else nullcontext() as buffer:
            views = list(_views(batch, buffer))
            count, failure = self._read(batch, views)
            with self.ring.copying(buffer):
                for part, view in zip(batch[:count], views, strict=False):
                    if part.block is not None and not self.ring.fill(part, view):
                        return part.order, NotFinite()
        return failure

    def _read(
        self, batch: list[Part], views: list[torch.Tensor | None]
    ) -> tuple[int, Failure | None]:
        """How many parts were read, and what stopped it."""
        with self._reading:
            for index, (part, view) in enumerate(zip(batch, views, strict=True)):
                if part.block is None:
                    continue
                try:
                    out = integer_view(part.target if view is None else view)
                    self._files.read(part.name, part.block, out)
                except Exception as error:
                    return index, (part.order, error)
        return len(batch), None

    def _read_here(self, batch: list[Part]) -> Failure | None:
        """What only the calling thread can read."""
        for part in batch:
            if part.read is None:
                continue
            try:
                with self._reading:
                    block = part.read()
                with self.ring.copying():
                    if not self.ring.fill(part, block):
                        return part.order, NotFinite()
            except Exception as error:
                return part.order, error
        return None


def _batches(parts: Iterable[Part], limit: int) -> Iterator[list[Part]]:
    """Neighbours together up to ``limit`` bytes: most tensors are small."""
    batch: list[Part] = []
    size = 0
    for part in parts:
        if batch and size + part.nbytes > limit:
            yield batch
            batch, size = [], 0
        batch.append(part)
        size += part.nbytes
    if batch:
        yield batch


def _views(batch: list[Part], buffer: Buffer | None) -> Iterator[torch.Tensor | None]:
    """Where in the buffer each part is read to; None: nowhere there."""
    at = 0
    for part in batch:
        if part.block is None or part.in_place:
            yield None
            continue
        assert buffer is not None
        bits = buffer.memory[at : at + part.block.nbytes]
        yield bits.view(part.block.dtype).view(part.block.shape)
        at += part.nbytes
