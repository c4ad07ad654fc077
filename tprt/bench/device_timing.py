"""Seconds of single operations, and the ceilings of the same device in the same minutes.

On a GPU the calls are captured in a CUDA graph, so that the host's launches stay out of the
figures, and its replays are timed with events. Input sets are taken in turn, so that L2 does not
hold what an operation reads from memory. On a CPU the same calls are timed with the host's clock.
Knows tensors and devices only.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]

BUDGET = 0.3  # seconds of repeats
READ_BUDGET = 0.05  # of a read between other runs
WARM_UP_CALLS = 3  # compile, pick algorithms, allocate work spaces
MIN_REPEATS, MAX_REPEATS = 7, 50
GRAPH_SECONDS = 2e-3  # one replay; far above what an event costs
MAX_NODES = 512  # calls in one graph
ROTATION_OF_L2 = 4  # bytes that pass between two reads of the same address, in sizes of L2
MAX_SETS = 32


@dataclass(frozen=True)
class Timing:
    """Args:
    seconds: of one call, the median over repeats.
    spread: distance of the quartiles over the median; differences below it are noise.
    """

    seconds: float
    spread: float


def time_calls(calls: Sequence[Call], device: torch.device, budget: float = BUDGET) -> Timing:
    """Time calls that do the same on different inputs, one after the other.

    Args:
        calls: on a GPU they must be fit for a CUDA graph.
        budget: seconds to spend on repeats, of which there are some at least; 0 makes two.
    """
    passes = _host_passes if device.type != "cuda" else _graph_passes
    seconds = passes(calls, device, budget)
    low, middle, high = statistics.quantiles(seconds, n=4)
    return Timing(middle, (high - low) / middle)


def num_sets(nbytes: int, device: torch.device) -> int:
    """How many input sets of ``nbytes`` it takes so that none is in L2 when its turn comes."""
    if device.type != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MAX_SETS, math.ceil(ROTATION_OF_L2 * l2 / max(1, nbytes))))


def _repeats(once: float, budget: float) -> int:
    if budget == 0:
        return 2
    return max(MIN_REPEATS, min(MAX_REPEATS, int(budget / max(once, 1e-9))))


def _host_passes(calls: Sequence[Call], device: torch.device, budget: float) -> list[float]:
    def one_pass() -> float:
        began = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - began) / len(calls)

    once = one_pass() * len(calls)
    return [one_pass() for _ in range(_repeats(once, budget))]


def _graph_passes(calls: Sequence[Call], device: torch.device, budget: float) -> list[float]:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for call in (*calls, *calls[:WARM_UP_CALLS]):
            call()

        def launched() -> None:
            for call in calls:
                call()

        # Launches included, so an upper bound: a graph may end up shorter than wished, never too long.
        once = _elapsed(launched, stream)
        rounds = max(1, min(MAX_NODES // len(calls), math.ceil(GRAPH_SECONDS / once)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(rounds):
                launched()
        first = _elapsed(graph.replay, stream)
        count = _repeats(first, budget)
        seconds = [_elapsed(graph.replay, stream) / (rounds * len(calls)) for _ in range(count)]
        graph.reset()
    return seconds


def _elapsed(work: Callable[[], None], stream: torch.cuda.Stream) -> float:
    began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    began.record(stream)
    work()
    ended.record(stream)
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


# ---------------------------------------------------------------- ceilings


@dataclass(frozen=True)
class Ceilings:
    """What this device reached at nothing but one thing.

    Args:
        copy: bytes per second, read plus written, of a copy in its memory.
        read: bytes per second of a reduction.
        gemm: operations per second of a large matrix product of random numbers.
        node: seconds of a kernel that does nothing, one of many in a graph; 0 on a CPU.
    """

    copy: float
    read: float
    gemm: float
    node: float

    def floor(self, read: float, written: float, operations: float) -> tuple[float, str]:
        """The least seconds a kernel can take, and what sets them: memory, compute or launch.

        Work that writes a fifth of its bytes or more is held against the copy.
        """
        moved = read + written
        memory = moved / (self.copy if written > moved / 5 else self.read)
        bounds = {"memory": memory, "compute": operations / self.gemm, "launch": self.node}
        name = max(bounds, key=lambda key: bounds[key])
        return bounds[name], name

    def to_json(self) -> dict[str, Any]:
        return {
            "copy_GB_per_s": round(self.copy / 1e9, 1),
            "read_GB_per_s": round(self.read / 1e9, 1),
            "gemm_TFLOP_per_s": round(self.gemm / 1e12, 2),
            "node_us": round(self.node * 1e6, 3),
        }


@dataclass(frozen=True)
class CeilingSizes:
    """Bytes of the copy's source and of the read, side of the matrices, nodes of the empty graph."""

    copy_bytes: int = 4 * 2**30
    read_bytes: int = 4 * 2**30
    gemm_side: int = 8192
    nodes: int = 256


ON_CPU = CeilingSizes(256 * 2**20, 256 * 2**20, 1024, 64)
TOY_CEILINGS = CeilingSizes(2**20, 2**20, 64, 8)


def measure_ceilings(device: torch.device, toy: bool = False) -> Ceilings:
    """Measured on random data: on zeros a matrix product runs faster than it ever will."""
    sizes = CeilingSizes() if device.type == "cuda" else ON_CPU
    if toy:
        sizes = TOY_CEILINGS
    # First, and for longer than the rest: it brings the clocks up.
    gemm = _gemm(device, sizes.gemm_side)
    return Ceilings(
        copy=_copy(device, sizes.copy_bytes),
        read=measure_read(device, toy),
        gemm=gemm,
        node=_node(device, sizes.nodes),
    )


def measure_read(device: torch.device, toy: bool = False) -> float:
    """Bytes per second of a reduction by all of the device, the median of 7 to 50 passes: torch's own or
    ours, whichever is faster."""
    nbytes = _read_bytes(device, toy)
    return max(_read_by_torch(device, nbytes), _read(device, nbytes))


class ReadTest:
    """Reads of one large tensor by torch's own reduction, to be taken between other runs."""

    def __init__(self, device: torch.device, toy: bool = False) -> None:
        self.device = device
        self.x = torch.randn(_read_bytes(device, toy) // 4, device=device)

    def __call__(self) -> float:
        """Bytes per second, the median of some passes; a few hundredths of a second."""
        return self.x.nbytes / time_calls([self.x.sum], self.device, READ_BUDGET).seconds


def _read_bytes(device: torch.device, toy: bool) -> int:
    sizes = CeilingSizes() if device.type == "cuda" else ON_CPU
    return (TOY_CEILINGS if toy else sizes).read_bytes


def _gemm(device: torch.device, side: int) -> float:
    shape = side, side
    a, b = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / time_calls([lambda: torch.mm(a, b)], device, budget=1.0).seconds


def _copy(device: torch.device, nbytes: int) -> float:
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / time_calls([lambda: target.copy_(source)], device).seconds


def _read_by_torch(device: torch.device, nbytes: int) -> float:
    x = torch.randn(nbytes // 4, device=device)
    return nbytes / time_calls([x.sum], device).seconds


def _read(device: torch.device, nbytes: int) -> float:
    """Bytes per second of our own reduction; 0 where Triton does not run."""
    kernels = _kernels(device)
    if kernels is None:
        return 0.0
    parts = max(1, nbytes // 4 // kernels.READ_MULTIPLE)
    x = torch.randn(parts * kernels.READ_MULTIPLE, device=device)
    sums = torch.full((parts,), float("nan"), device=device)
    found = x.nbytes / time_calls([lambda: kernels.read_all(x, sums)], device).seconds
    expected = x.view(parts, -1).sum(dim=1)
    assert torch.allclose(sums, expected, rtol=1e-3, atol=1e-1), "a read that missed something"
    return found


def _node(device: torch.device, nodes: int) -> float:
    kernels = _kernels(device)
    if kernels is None:
        return 0.0
    x = torch.zeros(1, device=device)
    seconds = time_calls([lambda: kernels.nothing(x)] * nodes, device).seconds
    return seconds if device.type == "cuda" else 0.0  # what the interpreter takes says nothing


def _kernels(device: torch.device) -> Any:
    try:
        from tprt.bench import stream_kernels
    except ImportError:
        return None
    interpreted = device.type == "cpu" and not triton_interprets()
    return None if interpreted else stream_kernels


def triton_interprets() -> bool:
    """Whether Triton kernels run in the interpreter, so on a CPU too."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)
