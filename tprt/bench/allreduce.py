"""How long ranks take to sum a few rows: the backend's all-reduce, and the one-shot kernel where it
runs.

A rank's time is that of a call among many in a CUDA graph; the slowest rank counts. On CPUs the
same calls go through gloo and are timed by the host.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tprt.bench.report import Report, Say, device_name
from tprt.distributed.communication import all_reduce, gather_json
from tprt.distributed.symmetric_memory import SymmetricBuffers, make_symmetric_buffers
from tprt.distributed.tp_group import TPGroup
from tprt.kernels import Norm

Call = Callable[[], object]


@dataclass(frozen=True)
class AllReduceSizes:
    """Args:
    width: of a row, bfloat16. rows: of each message.
    calls: in a graph. replays: of the graph. Fixed: a rank that calls once more waits for ever.
    """

    width: int = 4096
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 512)
    calls: int = 50
    replays: int = 20


TOY = AllReduceSizes(width=64, rows=(1, 4), calls=3, replays=3)
MOST_ONE_SHOT_ROWS = 128


def allreduce(tp: TPGroup, *, sizes: AllReduceSizes, say: Say) -> Report | None:
    """A line for each message size. Collective."""
    with torch.inference_mode():
        one_shot, buffers, reason = _one_shot(tp, sizes)
        lines = []
        for rows in sizes.rows:
            line = _line(rows, tp, sizes, one_shot)
            lines.append(line)
            if tp.rank == 0:
                times = ", ".join(f"{name} {us:.1f} us" for name, us in line["us"].items())
                say(f"{line['bytes']:9} bytes: {times}")
        if buffers is not None:
            buffers.close()
    if tp.rank != 0:
        return None
    if reason:
        say(f"one-shot: not here, {reason}")
    return Report(
        bench="allreduce",
        model="none",
        device=device_name(tp.device),
        dtype="bfloat16",
        tp=tp.size,
        settings={
            "width": sizes.width,
            "calls": sizes.calls,
            "replays": sizes.replays,
            "backend": "gloo" if tp.device_group is tp.cpu_group else "nccl",
        },
        details={"lines": lines, "one_shot_missing": reason or None},
    )


def _line(rows: int, tp: TPGroup, sizes: AllReduceSizes, one_shot: Any) -> dict[str, Any]:
    x, residual = (torch.randn(rows, sizes.width, device=tp.device).bfloat16() for _ in range(2))
    calls: dict[str, Call] = {"all-reduce": lambda: all_reduce(x, tp)}
    if one_shot is not None and one_shot.fits(rows, sizes.width, x.dtype):
        bias = residual[0].clone()
        norm = Norm(bias, bias, 1e-5)
        calls["one-shot"] = lambda: one_shot.all_reduce(x)
        calls["one-shot with LayerNorm"] = lambda: one_shot.all_reduce_add_layer_norm(
            x, bias, residual, norm
        )
    us = {name: round(_slowest(call, tp, sizes) * 1e6, 2) for name, call in calls.items()}
    return {"bytes": x.nbytes, "us": us}


def _slowest(call: Call, tp: TPGroup, sizes: AllReduceSizes) -> float:
    timed = _by_graph if tp.device_group is not tp.cpu_group else _by_host
    return max(float(s) for s in gather_json(timed(call, tp, sizes), tp))


def _by_host(call: Call, tp: TPGroup, sizes: AllReduceSizes) -> float:
    seconds = []
    for _ in range(sizes.replays):
        began = time.perf_counter()
        for _ in range(sizes.calls):
            call()
        if tp.device.type == "cuda":
            torch.cuda.synchronize(tp.device)
        seconds.append((time.perf_counter() - began) / sizes.calls)
    return statistics.median(seconds)


def _by_graph(call: Call, tp: TPGroup, sizes: AllReduceSizes) -> float:
    stream = torch.cuda.Stream(tp.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(tp.device))
    with torch.cuda.device(tp.device), torch.cuda.stream(stream):
        for _ in range(2):
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(sizes.calls):
                call()
        seconds = []
        for _ in range(sizes.replays):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            began.record(stream)
            graph.replay()
            ended.record(stream)
            ended.synchronize()
            seconds.append(began.elapsed_time(ended) / 1e3 / sizes.calls)
        graph.reset()
    return statistics.median(seconds)


def _one_shot(tp: TPGroup, sizes: AllReduceSizes) -> tuple[Any, SymmetricBuffers | None, str]:
    """The kernel and the memory it works in, or why there is none; the same on every rank."""
    if tp.device.type != "cuda":
        return None, None, "ranks compute on CPUs"
    from tprt.kernels.triton_ops.one_shot import OneShot, buffer_bytes

    row_bytes = sizes.width * torch.bfloat16.itemsize
    buffers, reason = make_symmetric_buffers(tp, buffer_bytes(MOST_ONE_SHOT_ROWS, row_bytes))
    if buffers is None:
        return None, None, reason
    kernel = OneShot(buffers.addresses, tp.rank, MOST_ONE_SHOT_ROWS, row_bytes)
    return kernel, buffers, ""
