"""Many prompts of mixed length at once: generated tokens per second."""

import random
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tprt.bench.report import Report, Run, Say, compare, device_name, median_ratio
from tprt.bench.synthetic import (
    greedy,
    make_engine,
    random_model,
    random_prompt,
    require_length,
    run_requests,
)
from tprt.bench.transformers_peer import TransformersPeer, Work, fastest
from tprt.config import EngineConfig, PersimmonConfig
from tprt.distributed.tp_group import TPGroup
from tprt.engine.llm_engine import LLMEngine

PROMPT_TOKENS, NEW_TOKENS = (16, 512), (16, 128)
BATCH_SIZES = (8, 16, 32)


def make_work(count: int, vocab_size: int, seed: int) -> list[tuple[list[int], int]]:
    rng = random.Random(seed)
    sizes = [(rng.randint(*PROMPT_TOKENS), rng.randint(*NEW_TOKENS)) for _ in range(count)]
    return [(random_prompt(rng, length, vocab_size), new) for length, new in sizes]


def run_work(engine: LLMEngine, work: Work) -> float:
    began = time.perf_counter()
    sequences = run_requests(engine, [greedy(ids, new) for ids, new in work])
    seconds = time.perf_counter() - began
    assert [len(s.token_ids) for s in sequences] == [new for _, new in work]
    return seconds


def throughput(
    config: PersimmonConfig,
    name: str,
    engine_config: EngineConfig,
    tp: TPGroup,
    *,
    vs: str | None,
    pairs: int,
    requests: int,
    say: Say,
) -> Report | None:
    """``requests`` prompts of 16 to 512 random tokens, 16 to 128 new ones each, greedy."""
    settings = replace(engine_config, enable_prefix_caching=False)
    require_length(config, settings, PROMPT_TOKENS[1] + NEW_TOKENS[1])
    dtype: torch.dtype = getattr(torch, settings.dtype)
    engine = make_engine(random_model(config, tp, dtype, settings.seed), settings)
    if tp.rank != 0:
        engine.serve("bench")
        engine.close()
        return None
    work = make_work(requests, config.vocab_size, settings.seed)
    new_tokens = sum(new for _, new in work)
    say(f"{requests} requests, {sum(len(ids) for ids, _ in work)} prompt tokens, {new_tokens} new")
    engine.begin_call("bench")
    run_work(engine, work[:2])  # first calls pick their kernels
    runs: dict[str, Run] = {"tprt": lambda: run_work(engine, work)}
    details: dict[str, Any] = {}
    if vs is not None:
        peer = TransformersPeer(config, dtype, tp.device, settings.seed)
        details["logit_difference"] = peer.logit_difference(engine, work[0][0])
        peer.generate(work[:2], 2, "new")
        candidates: dict[str, Run] = {
            f"generate, batches of {size} sorted by {key}": partial(peer.generate, work, size, key)
            for size in BATCH_SIZES
            for key in ("prompt", "new")
        }
        for tokens in (512, 2048):
            name_of_it = f"continuous batching, {tokens} tokens per step"
            candidates[name_of_it] = partial(peer.continuous, work, tokens)
        best, details["peer_settings_s"] = fastest(candidates, say)
        details["peer_best"] = best
        runs["transformers"] = candidates[best]
    seconds = compare(runs, pairs, say)
    engine.end_call()
    engine.close()
    ours = seconds.pop("tprt")
    return Report(
        bench="throughput",
        model=name,
        device=device_name(tp.device),
        dtype=settings.dtype,
        tp=tp.size,
        tokens_per_s=round(new_tokens / statistics.median(ours), 1),
        ratio={peer: median_ratio(ours, theirs) for peer, theirs in seconds.items()},
        settings={
            "requests": requests,
            "prompt_tokens": sum(len(ids) for ids, _ in work),
            "new_tokens": new_tokens,
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": settings.max_num_batched_tokens,
            "pairs": pairs,
        },
        details={**details, "seconds": {"tprt": ours, **seconds}},
    )
