"""Requests that begin alike: how many prompt tokens are computed with and without prefix caching."""

import random
import time
from dataclasses import replace

import torch

from tprt.bench.report import Report, Say, device_name
from tprt.bench.synthetic import (
    greedy,
    make_engine,
    random_model,
    random_prompt,
    require_length,
    run_requests,
)
from tprt.config import EngineConfig, ModelConfig
from tprt.distributed.tp_group import TPGroup
from tprt.engine.step_record import StepRecord
from tprt.kernels import use_kernels
from tprt.models import CausalLM

REQUESTS, SHARED, OWN = 32, 1024, 16


def _run(
    model: CausalLM, settings: EngineConfig, prompts: list[list[int]]
) -> tuple[int, float, list[list[int]]]:
    """Prompt tokens that went through the model, counted in the records; seconds; what was drawn."""
    engine = make_engine(model, settings)
    if model.tp.rank != 0:
        engine.serve("bench")
        engine.close()
        return 0, 0.0, []
    computed, execute = 0, engine.runner.execute

    def counting(record: StepRecord, checksum: int) -> object:
        nonlocal computed
        computed += len(record.tokens)
        return execute(record, checksum)

    engine.runner.execute = counting  # type: ignore[method-assign, assignment]
    engine.begin_call("bench")
    began = time.perf_counter()
    sequences = run_requests(engine, [greedy(prompt, 1) for prompt in prompts])
    seconds = time.perf_counter() - began
    engine.end_call()
    engine.close()
    return computed, seconds, [sequence.token_ids for sequence in sequences]


def prefix(
    config: ModelConfig, name: str, engine_config: EngineConfig, tp: TPGroup, say: Say
) -> Report | None:
    """32 requests of 1,024 shared tokens and 16 of their own, one new token each."""
    require_length(config, engine_config, SHARED + OWN + 1)
    dtype: torch.dtype = getattr(torch, engine_config.dtype)
    with use_kernels(*engine_config.kernel_choice):
        model = random_model(config, tp, dtype, engine_config.seed)
    rng = random.Random(engine_config.seed)
    shared = random_prompt(rng, SHARED, config.vocab_size)
    prompts = [shared + random_prompt(rng, OWN, config.vocab_size) for _ in range(REQUESTS)]
    with_it = _run(model, replace(engine_config, enable_prefix_caching=True), prompts)
    without = _run(model, replace(engine_config, enable_prefix_caching=False), prompts)
    if tp.rank != 0:
        return None
    say(f"prompt tokens computed: {without[0]} without prefix caching, {with_it[0]} with it")
    return Report(
        bench="prefix",
        model=name,
        device=device_name(tp.device),
        dtype=engine_config.dtype,
        tp=tp.size,
        settings={"requests": REQUESTS, "shared_tokens": SHARED, "own_tokens": OWN},
        details={
            "computed_tokens": with_it[0],
            "computed_tokens_without_caching": without[0],
            "fewer": round(without[0] / with_it[0], 2),
            "seconds": with_it[1],
            "seconds_without_caching": without[1],
            "same_tokens": sum(a == b for a, b in zip(with_it[2], without[2], strict=True)),
        },
    )
