"""Many prompts of mixed length at once: generated tokens per second."""

import random
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tprt.bench.report import Report, Run, Say, compare, device_name, median_ratio
from tprt.bench.synthetic import (
    cache_memory,
    greedy,
    random_engine,
    random_prompt,
    require_length,
    run_requests,
)
from tprt.bench.transformers_peer import TransformersPeer, Work, fastest
from tprt.config import EngineConfig, ModelConfig
from tprt.distributed.tp_group import TPGroup
from tprt.engine.llm_engine import LLMEngine


@dataclass(frozen=True)
class WorkSizes:
    """Args:
    prompt, new: least and most tokens of a request.
    batches, step_tokens: settings of the peer that are tried.
    """

    prompt: tuple[int, int] = (16, 512)
    new: tuple[int, int] = (16, 128)
    batches: tuple[int, ...] = (8, 16, 32)
    step_tokens: tuple[int, ...] = (512, 2048)


FULL, TOY = WorkSizes(), WorkSizes((4, 30), (2, 8), (2,), (64,))
ON_GPU = WorkSizes(batches=(32, 64), step_tokens=(2048, 8192))


def make_work(
    count: int, vocab_size: int, seed: int, sizes: WorkSizes = FULL
) -> list[tuple[list[int], int]]:
    rng = random.Random(seed)
    lengths = [(rng.randint(*sizes.prompt), rng.randint(*sizes.new)) for _ in range(count)]
    return [(random_prompt(rng, prompt, vocab_size), new) for prompt, new in lengths]


def run_work(engine: LLMEngine, work: Work) -> float:
    began = time.perf_counter()
    sequences = run_requests(engine, [greedy(ids, new) for ids, new in work])
    seconds = time.perf_counter() - began
    assert [len(s.token_ids) for s in sequences] == [new for _, new in work]
    return seconds


def throughput(
    config: ModelConfig,
    name: str,
    engine_config: EngineConfig,
    tp: TPGroup,
    *,
    vs: str | None,
    pairs: int,
    requests: int,
    toy: bool,
    say: Say,
) -> Report | None:
    """``requests`` prompts of 16 to 512 random tokens, 16 to 128 new ones each, greedy."""
    sizes = TOY if toy else ON_GPU if tp.device.type == "cuda" else FULL
    longest = sizes.prompt[1] + sizes.new[1]
    settings = replace(engine_config, enable_prefix_caching=False)
    require_length(config, settings, longest)
    if vs is not None and settings.kv_cache_memory is None:
        blocks = min(requests, settings.max_num_seqs) * (-(-longest // settings.block_size) + 1)
        settings = replace(settings, kv_cache_memory=cache_memory(config, settings, 1, blocks))
    dtype: torch.dtype = getattr(torch, settings.dtype)
    engine = random_engine(config, tp, settings)
    if tp.rank != 0:
        engine.serve("bench")
        engine.close()
        return None
    work = make_work(requests, config.vocab_size, settings.seed, sizes)
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
            for size in sizes.batches
            for key in ("prompt", "new")
        }
        for tokens in sizes.step_tokens:
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
