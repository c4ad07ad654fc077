"""As many sequences of one length as the memory holds, decoding: tokens per second against the limit.

Without grouped queries each sequence reads its own keys and values in every step, so that at full
memory the step is a read of the cache, and of the weights once.
"""

import statistics
from dataclasses import dataclass, replace

import torch

from tprt.bench.costs import StepBytes, step_bytes
from tprt.bench.device_timing import Ceilings, measure_ceilings
from tprt.bench.filled import WARM_UP_STEPS, blocks_needed, decode_seconds, fill_cache, prompts_of
from tprt.bench.report import Report, Say, device_name
from tprt.bench.synthetic import random_engine
from tprt.config import EngineConfig, ModelConfig
from tprt.distributed.communication import gather_json
from tprt.distributed.tp_group import TPGroup
from tprt.engine.step_record import MAX_BUCKET
from tprt.errors import ConfigError
from tprt.llm.memory import CPU_KV_CACHE_MEMORY, plan_memory


@dataclass(frozen=True)
class FullSizes:
    """Args: steps of a run; its repeats."""

    steps: int = 32
    repeats: int = 3

    @property
    def new_tokens(self) -> int:
        return self.steps + WARM_UP_STEPS + 2


TOY = FullSizes(steps=4, repeats=2)
FORMULA = (
    "s per step = batch x context x KV bytes per token / read bandwidth + the larger of weight bytes / "
    "read bandwidth and 2 x weights x batch / rate of a large product"
)


def limit_seconds(
    bytes_: StepBytes, itemsize: int, batch: int, context: float, ceilings: Ceilings
) -> float:
    """The least time of a step, by FORMULA."""
    kv = batch * context * bytes_.kv_per_token / ceilings.read
    weights = bytes_.weights / ceilings.read
    return kv + max(weights, 2 * bytes_.weights / itemsize * batch / ceilings.gemm)


def full_memory(
    config: ModelConfig,
    name: str,
    engine_config: EngineConfig,
    tp: TPGroup,
    *,
    context: int,
    sizes: FullSizes,
    toy: bool,
    say: Say,
) -> Report | None:
    """``tprt bench throughput --context N``."""
    dtype: torch.dtype = getattr(torch, engine_config.dtype)
    ceilings = measure_ceilings(tp.device, toy) if tp.rank == 0 else None
    if tp.device.type == "cuda":
        torch.cuda.empty_cache()
    if not config.is_bounded:
        raise ConfigError(
            "--context: this model's memory does not grow with it",
            hint="tprt bench decode --batch N --context M",
        )
    limit = engine_config.resolve_max_model_len(config)
    if context + 1 + sizes.new_tokens > limit:
        raise ConfigError(
            f"--context {context} and {sizes.new_tokens + 1} more tokens; the limit is {limit}",
            hint=f"--context {limit - 1 - sizes.new_tokens}",
        )
    settings = _settings(config, engine_config, tp, context, sizes)
    engine = random_engine(config, tp, settings)
    fill_cache(engine.runner)
    if tp.rank != 0:
        engine.serve("throughput")
        engine.close()
        return None
    assert ceilings is not None
    each = blocks_needed(context, sizes.new_tokens, settings.block_size)
    batch = min(settings.max_num_seqs, engine.blocks.capacity // each)
    if batch == 0:
        raise ConfigError(
            f"not one sequence of {context} tokens fits into {engine.blocks.capacity} KV blocks",
            hint="a smaller --context, or a larger engine.kv_cache_memory",
        )
    prompts = prompts_of(context, batch, config.vocab_size, settings.seed)
    engine.begin_call("throughput")
    seconds = [
        decode_seconds(engine, prompts, sizes.steps) / sizes.steps for _ in range(sizes.repeats)
    ]
    engine.end_call()
    engine.close()
    median = statistics.median(seconds)
    mean = context + 2 + WARM_UP_STEPS + sizes.steps / 2
    needed = step_bytes(config, dtype, tp.size)
    least = limit_seconds(needed, dtype.itemsize, batch, mean, ceilings)
    say(
        f"{batch} sequences of {context} tokens: {median * 1e3:.2f} ms per step, "
        f"{batch / median:.1f} tokens/s; the limit is {batch / least:.1f} ({least / median:.1%})"
    )
    return Report(
        bench="throughput",
        model=name,
        device=device_name(tp.device),
        dtype=settings.dtype,
        tp=tp.size,
        tokens_per_s=round(batch / median, 1),
        share_of_bandwidth=round(needed.of(batch, mean) / median / ceilings.read, 4),
        settings={
            "context": context,
            "batch": batch,
            "limited_by": "memory" if batch < MAX_BUCKET else "rows of the largest graph",
            "steps": sizes.steps,
            "repeats": sizes.repeats,
            "kv_tokens": engine.blocks.capacity * settings.block_size,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
        },
        details={
            "ceilings": ceilings.to_json(),
            "ms_per_step": round(median * 1e3, 3),
            "limit_tokens_per_s": round(batch / least, 1),
            "share_of_limit": round(least / median, 4),
            "limit_formula": FORMULA,
            "seconds_per_step": seconds,
        },
    )


def _settings(
    config: ModelConfig, engine: EngineConfig, tp: TPGroup, context: int, sizes: FullSizes
) -> EngineConfig:
    """As many slots as sequences can fit, since slots cost memory too. Collective."""
    limit = engine.resolve_max_model_len(config)
    # A block more than tokens need, as admission asks for one.
    length = min(limit, context + 1 + sizes.new_tokens + engine.block_size)
    wide = replace(
        engine, max_num_seqs=MAX_BUCKET, max_model_len=length, enable_prefix_caching=True
    )
    room = engine.kv_cache_memory or CPU_KV_CACHE_MEMORY
    if engine.kv_cache_memory is None and tp.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(tp.device)
        plan = plan_memory(config, wide, tp.size, tp.device.type)
        room = int(free - (1 - engine.gpu_memory_utilization) * total) - plan.fixed
    kv = step_bytes(config, getattr(torch, engine.dtype), tp.size).kv_per_token
    each = blocks_needed(context, sizes.new_tokens, engine.block_size) * engine.block_size * kv
    slots = min(int(offer) for offer in gather_json(room // each, tp))
    return replace(wide, max_num_seqs=max(1, min(slots, MAX_BUCKET)))
