"""What it costs rank 0 to hand a step record to the other ranks of its host."""

import statistics
import time

import torch

from tprt.bench.report import Report, Say, device_name
from tprt.bench.scheduler import RUNNING, decode_record
from tprt.config import EngineConfig
from tprt.distributed.communication import all_gather
from tprt.distributed.tp_group import TPGroup
from tprt.engine.control import ControlChannel
from tprt.engine.step_record import Kind, StepRecord

STEPS, WARM_UP = 1000, 100


def record(engine_config: EngineConfig, tp: TPGroup, say: Say) -> Report | None:
    """Microseconds that rank 0 spends to encode and send a record of 64 decode rows.

    The ranks meet after each record, as they do in every step, so that none runs ahead.
    """
    channel = ControlChannel(tp)
    message, token = decode_record(engine_config.block_size), torch.zeros(1, device=tp.device)
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        if tp.rank == 0:
            channel.send(message)
        else:
            received, _ = channel.receive()
            assert received.kind == Kind.STEP
        seconds.append(time.perf_counter() - began)
        all_gather(token, tp)
    if tp.rank != 0:
        return None
    seconds = seconds[WARM_UP:]
    median = round(statistics.median(seconds) * 1e6, 1)
    p90 = round(statistics.quantiles(seconds, n=10)[-1] * 1e6, 1)
    say(f"encode and send to {tp.size - 1} ranks: median {median} us, p90 {p90} us")
    return Report(
        bench="record",
        model="none",
        device=device_name(tp.device),
        dtype="none",
        tp=tp.size,
        settings={"rows": RUNNING, "words": len(StepRecord.encode(message)), "steps": STEPS},
        details={"send_median_us": median, "send_p90_us": p90},
    )
