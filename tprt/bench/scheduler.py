"""The host's work per step without any model: plan, record, bytes, back, and retire."""

import cProfile
import io
import platform
import pstats
import statistics
import time
from collections import defaultdict

from tprt.bench.report import Report, Say
from tprt.cache.block_manager import BlockManager
from tprt.config import EngineConfig
from tprt.engine.record_builder import build_record
from tprt.engine.scheduler import Scheduler
from tprt.engine.sequence import Request, Sequence
from tprt.engine.step_record import StepRecord
from tprt.sampling_params import SamplingParams

RUNNING, STEPS, WARM_UP = 64, 1000, 100
LIMIT_US = 300.0


def _scheduler(count: int, block_size: int) -> Scheduler:
    """64 requests of 20 prompt tokens that run for more than ``count`` steps."""
    per_sequence = -(-(count + 32) // block_size)
    scheduler = Scheduler(BlockManager(RUNNING * per_sequence + 8), block_size, RUNNING, 2048)
    params = SamplingParams(max_tokens=count + 8)
    for i in range(RUNNING):
        request = Request(list(range(i, i + 20)), params, count + 8, seed=i)
        scheduler.add(Sequence(request=request, arrival=i))
    return scheduler


def decode_record(block_size: int) -> StepRecord:
    """A step in which each of 64 sequences computes the token drawn before it."""
    scheduler = _scheduler(8, block_size)
    scheduler.schedule()
    return build_record(scheduler.schedule(), 1, end_ids=(), look_ahead=1)


def _take(sequence: Sequence, token: int) -> bool:
    sequence.ids.append(token)
    return False


def _steps(count: int, block_size: int) -> dict[str, list[float]]:
    """Seconds of each part of each of ``count`` decode steps."""
    scheduler = _scheduler(count, block_size)
    seconds: dict[str, list[float]] = defaultdict(list)
    before = None
    for number in range(count):
        at = [time.perf_counter()]
        plan = scheduler.schedule()
        at.append(time.perf_counter())
        words = build_record(plan, number, end_ids=(), look_ahead=1).encode()
        at.append(time.perf_counter())
        StepRecord.decode(words)
        at.append(time.perf_counter())
        if before is not None:
            scheduler.retire(before, [5] * len(before.rows), _take)
        at.append(time.perf_counter())
        before = plan
        for name, first, last in (
            ("schedule", 0, 1), ("build and encode", 1, 2), ("decode", 2, 3), ("retire", 3, 4),
            ("step", 0, 4),
        ):  # fmt: skip
            seconds[name].append(at[last] - at[first])
    return seconds


def scheduler(engine_config: EngineConfig, say: Say) -> Report:
    """Microseconds per step at 64 running sequences, and where they go."""
    seconds = {k: v[WARM_UP:] for k, v in _steps(STEPS, engine_config.block_size).items()}
    parts = {
        name: {
            "median_us": round(statistics.median(values) * 1e6, 1),
            "p90_us": round(statistics.quantiles(values, n=10)[-1] * 1e6, 1),
        }
        for name, values in seconds.items()
    }
    for name, values in parts.items():
        say(f"{name:18} median {values['median_us']:7.1f} us   p90 {values['p90_us']:7.1f} us")
    say(
        f"limit {LIMIT_US:.0f} us per step; the profile of as many steps, slower for being watched:"
    )
    profile = cProfile.Profile()
    profile.runcall(_steps, STEPS, engine_config.block_size)
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(10)
    say("\n".join(line for line in text.getvalue().splitlines()[4:] if line.strip()))
    return Report(
        bench="scheduler",
        model="none",
        device=platform.machine(),
        dtype="none",
        tp=1,
        settings={"running": RUNNING, "steps": STEPS, "block_size": engine_config.block_size},
        details={**parts, "limit_us": LIMIT_US},
    )
