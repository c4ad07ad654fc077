"""The way of a block from a file to a device: parts, staging buffers, and copies that are measured.

On a GPU buffers are pinned, and a stream of its own copies, converts, transposes and repeats what was
read into them. On a CPU the same ring works without streams and events. Knows no threads but those
that share a ring, no names of weights and no layouts.
"""

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tprt.checkpoint.block_files import split
from tprt.checkpoint.reader import FileBlock

MAX_THREADS = 8
TINY = 32 << 20  # bytes that one thread reads before others have started
GPU_BUFFER, CPU_BUFFER = 32 << 20, 4 << 20  # a CPU converts what still lies in its cache
ALIGN = 64
# From 32768 elements on torch splits an operation over threads of its own. They would wait for cores
# that the threads which load keep busy: many times slower.
_SERIAL = 32767


@dataclass(frozen=True)
class StreamSettings:
    """How many threads read, and into what.

    Args:
        threads: that read at once. 1: the calling thread reads, none is started.
        buffer_bytes: of a staging buffer, and the most that is read or copied as one.
        buffers: in the ring, ``threads`` at least; more of them overlap copies to a GPU with reads.
        in_place: read straight into parameters in the host's memory where nothing is converted.
    """

    threads: int
    buffer_bytes: int
    buffers: int
    in_place: bool = True

    @classmethod
    def default(cls, device: torch.device, nbytes: int) -> "StreamSettings":
        """For ``nbytes`` in all, by the CPUs that this process may use."""
        threads = min(MAX_THREADS, len(os.sched_getaffinity(0))) if nbytes > TINY else 1
        gpu = device.type == "cuda"
        return cls(threads, GPU_BUFFER if gpu else CPU_BUFFER, threads + (4 if gpu else 0))


@dataclass(frozen=True)
class Part:
    """A block that is read and copied as one; at most a staging buffer large.

    Args:
        order: of its parameter.
        name: of the tensor, for errors.
        target: where it goes, at any strides and in any dtype. It may have leading dimensions more
            than the block, which is repeated along them.
        in_place: ``target`` lies on the host with the block's shape and dtype.
        block: where its bits are.
        read: what to do instead, in the calling thread, where ``block`` is None.
    """

    order: int
    name: str
    target: torch.Tensor
    in_place: bool
    block: FileBlock | None
    read: Callable[[], torch.Tensor] | None = None

    @property
    def staged(self) -> bool:
        return self.block is not None and not self.in_place

    @property
    def nbytes(self) -> int:
        """In a buffer."""
        return 0 if self.block is None else -(-self.block.nbytes // ALIGN) * ALIGN


class Busy:
    """``seconds`` in which at least one thread was inside."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside, self._began = 0, 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._began = time.perf_counter()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self.seconds += time.perf_counter() - self._began


@dataclass
class Buffer:
    memory: torch.Tensor
    copied: torch.cuda.Event | None = None  # when what was in it last has arrived


class StagingRing:
    """Buffers between files and a device. On a CPU the same ring works without streams and events.

    Threads share it. ``copy_s`` is the time copies took, once ``synchronize`` has returned.
    """

    def __init__(self, device: torch.device, settings: StreamSettings) -> None:
        self.device, self.settings = device, settings
        self._lock = threading.Lock()
        self._free: deque[Buffer] = deque()
        self._made = 0
        self._busy = Busy()
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._finite: list[tuple[int, torch.Tensor]] = []  # order of a part, and a bool on the GPU
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # Whoever made the parameters may still be writing to them.
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @property
    def copy_s(self) -> float:
        return self._busy.seconds + sum(a.elapsed_time(b) for a, b in self._spans) / 1e3

    def on_stream(self) -> AbstractContextManager[Any]:
        """Operations of this thread go to the copy stream; on a CPU it does nothing."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @contextmanager
    def buffer(self) -> Iterator[Buffer]:
        """The buffer that has been free longest, empty; free again afterwards.

        There is one for each thread at least, so that none waits for another.
        """
        with self._lock:
            make = self._made < self.settings.buffers
            self._made += make
            taken = None if make else self._free.popleft()
        if taken is None:
            nbytes, pinned = self.settings.buffer_bytes, self._stream is not None
            with self.on_stream():  # on another GPU than this rank's, pinning would wake that one
                taken = Buffer(torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned))
        elif taken.copied is not None:
            taken.copied.synchronize()
        yield taken
        with self._lock:
            self._free.append(taken)

    @contextmanager
    def copying(self, buffer: Buffer | None = None) -> Iterator[None]:
        """Around copies, here out of ``buffer``; measures them."""
        if self._stream is None:
            with self._busy:
                yield
            return
        first, last = (
            torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        # One thread at a time, or spans would overlap. To enqueue takes a thread no time.
        with self._lock, self.on_stream():
            first.record()
            yield
            last.record()
            self._spans.append((first, last))
        if buffer is not None:
            buffer.copied = last

    def fill(self, part: Part, source: torch.Tensor | None) -> bool:
        """Copy ``source``, a dense tensor on the host, to the part's target; None: it is there already.

        Returns:
            False when the target holds a value that is not finite. A GPU is not waited for:
            ``synchronize`` tells.
        """
        target = part.target
        if self._stream is None:
            fine = True
            for block in split(target.shape, _SERIAL):
                chunk = target[block]
                if source is not None:
                    chunk.copy_(source.expand_as(target)[block])
                low, high = torch.aminmax(chunk)
                fine &= math.isfinite(low) and math.isfinite(high)
            return fine
        assert source is not None
        plain = target.is_contiguous() and target.dtype == source.dtype
        if not plain or target.shape != source.shape:
            # Else torch would convert, repeat and transpose on the host.
            source = source.to(self.device, non_blocking=True)
        target.copy_(source, non_blocking=True)
        low, high = torch.aminmax(target)
        self._finite.append((part.order, torch.isfinite(low) & torch.isfinite(high)))
        return True

    def synchronize(self) -> list[int]:
        """Until all copies are done; any stream may use what they wrote.

        Returns:
            The orders of parts on a GPU with a value that is not finite.
        """
        if self._stream is None or not self._finite:
            return []
        self._stream.synchronize()
        orders, flags = zip(*self._finite, strict=True)
        finite = torch.stack(flags).tolist()
        return [order for order, fine in zip(orders, finite, strict=True) if not fine]

    def close(self) -> None:
        """Free the buffers, and what torch would keep of them in its caches."""
        self._free.clear()
        if self._stream is not None:
            self._stream.synchronize()
            torch.cuda.empty_cache()
            empty_host_cache = getattr(torch._C, "_host_emptyCache", None)
            if empty_host_cache is not None:
                empty_host_cache()
