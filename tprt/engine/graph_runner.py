"""Decode steps of fixed shapes: buckets of rows, static buffers, CUDA graphs captured at start.

A step of n rows runs in the smallest bucket that holds it; the rows past n are padding, which write to a
scratch slot and to block 0 and whose tokens nobody reads. On a CPU the same buckets, buffers and padding
are used and the step is simply called, so the logic is tested everywhere. Which bucket and kind serve a
step follows from its record alone, hence all ranks replay the same graph.

Knows shapes, buffers and graphs: no models, no sampling.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tprt.distributed.capture import capture_graph
from tprt.engine.step_record import MAX_BANS, MAX_BUCKET, Ints, StepRecord, bucket_of
from tprt.engine.transfer import staged
from tprt.errors import TprtError, out_of_memory

# Warm-up before a capture: kernels are compiled, cuBLAS and NCCL set themselves up.
WARM_UP_RUNS = 2


class DecodeBuffers:
    """What a decode step reads and writes, at fixed addresses.

    Args:
        max_rows: rows of the largest bucket.
        num_digests: int64 words of the digests of all ranks.
        scratch_slot: slot of the padding rows.
    """

    def __init__(
        self, max_rows: int, num_digests: int, scratch_slot: int, device: torch.device
    ) -> None:
        self.device, self.scratch_slot = device, scratch_slot
        words = 1 + 3 * max_rows + 2 * MAX_BANS
        self._in = torch.zeros(words, dtype=torch.int64, device=device)
        self._out = torch.zeros(max_rows + num_digests, dtype=torch.int64, device=device)
        self.tokens, self.digests = self._out[:max_rows], self._out[max_rows:]
        # float32 [max_rows, part of the vocabulary], raw logits of a step of the full kind; made by
        # the first one, which on a GPU is part of the start.
        self.logits: torch.Tensor | None = None

    @property
    def checksum(self) -> torch.Tensor:
        """int64 [1], the CRC this rank found in the record."""
        return self._in[:1]

    def rows(self, bucket: int) -> torch.Tensor:
        """int64 [3, bucket]: slot, position, and token or DEVICE_TOKEN."""
        return self._in[1 : 1 + 3 * bucket].view(3, bucket)

    def bans(self, bucket: int) -> torch.Tensor:
        """int64 [MAX_BANS, 2]: row, -1 in entries that ban nothing, and id."""
        start = 1 + 3 * bucket
        return self._in[start : start + 2 * MAX_BANS].view(MAX_BANS, 2)

    def load(self, record: StepRecord, checksum: int, bucket: int, full: bool) -> None:
        """Fill in a decode step; rows past its own are padding."""
        words = pack_step(record, checksum, bucket, full, self.scratch_slot)
        self._in[: len(words)].copy_(staged(words, self.device), non_blocking=True)

    def keep_logits(self, logits: torch.Tensor) -> None:
        """Copy float32 [bucket, part] to where it outlives the step."""
        if self.logits is None:
            shape = (len(self.tokens), logits.shape[1])
            self.logits = torch.zeros(shape, dtype=logits.dtype, device=self.device)
        self.logits[: len(logits)].copy_(logits)

    @property
    def results(self) -> torch.Tensor:
        """int64 [max_rows + num_digests]: ``tokens``, then ``digests``."""
        return self._out


def pack_step(
    record: StepRecord, checksum: int, bucket: int, full: bool, scratch_slot: int
) -> Ints:
    """The words of ``DecodeBuffers.load``: checksum, [3, bucket] rows, for ``full`` [MAX_BANS, 2]."""
    count = len(record.rows)
    words = np.zeros(1 + 3 * bucket + (2 * MAX_BANS if full else 0), dtype=np.int64)
    words[0] = checksum
    rows = words[1 : 1 + 3 * bucket].reshape(3, bucket)
    rows[0, count:] = scratch_slot  # at position 0, with id 0: one key in block 0
    rows[0, :count], rows[1, :count], rows[2, :count] = *record.rows[:, :2].T, record.tokens
    if full:
        bans = words[1 + 3 * bucket :].reshape(MAX_BANS, 2)
        bans[: len(record.bans)] = record.bans
        bans[len(record.bans) :, 0] = -1
    return words


DecodeStep = Callable[[int, bool], None]  # rows of the bucket, full kind


class GraphRunner:
    """Args:
    step: computes one step from static buffers into static buffers; on a GPU it is only called at
        start, so it may read nothing on the host that changes later.
    max_rows: rows of the largest step; buckets up to it and no further than MAX_BUCKET are made.
    stream: where a GPU's work is queued; None on a CPU.
    drain: waits, with a deadline, until the device has done all that was queued: a peer that is gone
        must not be waited for inside a capture.
    limit: rows of the largest bucket that collectives allow.
    full: whether steps of the full kind can be captured too.
    """

    def __init__(
        self,
        step: DecodeStep,
        max_rows: int,
        stream: torch.cuda.Stream | None,
        drain: Callable[[], None],
        limit: int = MAX_BUCKET,
        full: bool = True,
    ) -> None:
        self._kinds = (True, False) if full else (False,)
        buckets = {bucket_of(n) for n in range(1, min(max_rows, MAX_BUCKET) + 1)}
        self.buckets = sorted(bucket for bucket in buckets if bucket <= limit)
        self._step, self._stream, self._drain = step, stream, drain
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph | None] = {}

    @property
    def keys(self) -> set[tuple[int, bool]]:
        """(bucket, full kind) of what can be run."""
        return set(self._graphs)

    def serves(self, record: StepRecord) -> bool:
        """Whether a graph holds this step; the same answer on every rank."""
        kind = record.full or record.logprobs >= 0
        if record.graph_key == 0 or kind not in self._kinds:
            return False
        return bucket_of(len(record.rows)) <= self.buckets[-1]

    def capture(self) -> None:
        """Make a graph of every bucket and kind, largest first so that all share its memory.

        Collective: every rank captures in the same order, and NCCL is warm after the first run.

        Raises:
            TprtError: a step cannot be captured here.
        """
        order = [(bucket, full) for bucket in reversed(self.buckets) for full in self._kinds]
        if self._stream is None:
            self._graphs = dict.fromkeys(order)
            return
        pool = torch.cuda.graph_pool_handle()
        # cuBLAS keeps what it works in; made anew inside the first capture, it belongs to the pool.
        torch._C._cuda_clearCublasWorkspaces()
        with _no_garbage_collection():
            for bucket, full in order:
                for _ in range(WARM_UP_RUNS):
                    self._step(bucket, full)
                self._graphs[bucket, full] = self._capture(bucket, full, pool)

    def _capture(self, bucket: int, full: bool, pool: Any) -> torch.cuda.CUDAGraph:
        assert self._stream is not None
        self._drain()
        try:
            return capture_graph(lambda: self._step(bucket, full), self._stream, pool)
        except RuntimeError as error:
            if out_of_memory(error) is not None:
                raise
            raise TprtError(
                f"a decode step of {bucket} rows ({'full' if full else 'plain'} sampling) cannot be "
                f"captured: {str(error).splitlines()[0]}",
                hint="engine.enforce_eager=true runs without CUDA graphs",
            ) from error

    def run(self, bucket: int, full: bool) -> None:
        """One step, from what the buffers hold. Never captures: a key it does not know is a bug."""
        graph = self._graphs[bucket, full]
        if graph is None:
            self._step(bucket, full)
        else:
            graph.replay()

    def close(self) -> None:
        """Destroy the graphs, which must happen before the communicators they use go."""
        for graph in self._graphs.values():
            if graph is not None:
                graph.reset()
        self._graphs.clear()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    # Collections walk every Python object at each of thousands of launches, and one that frees a
    # tensor of another stream would end a capture.
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
