"""One way to capture a CUDA graph, for all who do. Knows streams and torch only."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch


def capture_graph(
    step: Callable[[], None], stream: torch.cuda.Stream, pool: Any = None
) -> torch.cuda.CUDAGraph:
    """What ``step`` queues, as a graph. Warm-up is the caller's: it must have run on ``stream`` before.

    Nothing may be under way on the device that waits for a peer: the capture begins by waiting for it.

    Args:
        pool: of ``torch.cuda.graph_pool_handle``, where graphs share their memory.

    Raises:
        RuntimeError: it cannot be captured; the caller's stream is current again all the same.
    """
    pool = pool or torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its stream current, and the allocator in its pool.
    with torch.cuda.stream(stream):
        try:
            # Other threads, the caller's and NCCL's, may use CUDA meanwhile.
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                step()
        except BaseException:
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(stream.device_index, pool)
            raise
    return graph
