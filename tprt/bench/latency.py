"""One sequence alone: tokens per second of its decoding, and the share of the memory bandwidth."""

import random
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tprt.bench.costs import weight_bytes
from tprt.bench.report import Report, Run, Say, compare, device_name, median_ratio, read_bandwidth
from tprt.bench.synthetic import (
    cache_memory,
    greedy,
    random_engine,
    random_prompt,
    require_length,
    run_requests,
)
from tprt.bench.transformers_peer import TransformersPeer, fastest
from tprt.config import EngineConfig, ModelConfig
from tprt.distributed.tp_group import TPGroup
from tprt.engine.llm_engine import LLMEngine

PROMPT_TOKENS, NEW_TOKENS = 64, 128
TOY = 8, 6


def generate(engine: LLMEngine, prompt: list[int], new_tokens: int) -> float:
    """Seconds for ``new_tokens`` tokens, the prompt included, as the peer is measured."""
    began = time.perf_counter()
    run_requests(engine, [greedy(prompt, new_tokens)])
    return time.perf_counter() - began


def latency(
    config: ModelConfig,
    name: str,
    engine_config: EngineConfig,
    tp: TPGroup,
    *,
    vs: str | None,
    pairs: int,
    toy: bool,
    say: Say,
) -> Report | None:
    """64 prompt tokens, 128 new ones, greedy, nothing else running."""
    prompt_tokens, new_tokens = TOY if toy else (PROMPT_TOKENS, NEW_TOKENS)
    settings = replace(engine_config, enable_prefix_caching=False)
    require_length(config, settings, prompt_tokens + new_tokens)
    if vs is not None and settings.kv_cache_memory is None:
        blocks = -(-(prompt_tokens + new_tokens) // settings.block_size) + 1
        settings = replace(settings, max_num_seqs=1)
        settings = replace(settings, kv_cache_memory=cache_memory(config, settings, 1, blocks))
    dtype: torch.dtype = getattr(torch, settings.dtype)
    engine = random_engine(config, tp, settings)
    if tp.rank != 0:
        engine.serve("bench")
        engine.close()
        return None
    prompt = random_prompt(random.Random(settings.seed), prompt_tokens, config.vocab_size)
    work = [(prompt, new_tokens)]
    engine.begin_call("bench")
    generate(engine, prompt, new_tokens)
    runs: dict[str, Run] = {"tprt": lambda: generate(engine, prompt, new_tokens)}
    details: dict[str, Any] = {}
    if vs is not None:
        peer = TransformersPeer(config, dtype, tp.device, settings.seed)
        details["logit_difference"] = peer.logit_difference(engine, prompt)
        candidates: dict[str, Run] = {
            f"{cache} cache": partial(peer.generate, work, 1, "new", cache_implementation=cache)
            for cache in ("dynamic", "static")
        }
        best, details["peer_settings_s"] = fastest(candidates, say, warm_up=True)
        details["peer_best"] = best
        runs["transformers"] = candidates[best]
    bandwidth = read_bandwidth(tp.device)
    seconds = compare(runs, pairs, say)
    bandwidth = max(bandwidth, read_bandwidth(tp.device))
    engine.end_call()
    engine.close()
    ours = seconds.pop("tprt")
    rate = new_tokens / statistics.median(ours)
    return Report(
        bench="latency",
        model=name,
        device=device_name(tp.device),
        dtype=settings.dtype,
        tp=tp.size,
        tokens_per_s=round(rate, 1),
        ratio={peer: median_ratio(ours, theirs) for peer, theirs in seconds.items()},
        share_of_bandwidth=round(weight_bytes(config, dtype, tp.size) * rate / bandwidth, 3),
        settings={"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "pairs": pairs},
        details={
            **details,
            "read_bandwidth_GB_per_s": round(bandwidth / 1e9, 1),
            "weight_bytes_per_token": weight_bytes(config, dtype, tp.size),
            "seconds": {"tprt": ours, **seconds},
        },
    )
