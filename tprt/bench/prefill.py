"""Prompts alone, and prompts beside sequences that decode: time to first token, and what mixing costs.

A step that mixes chunks with decode rows runs without a graph. What that costs shows against a step
of as many prompt tokens and against a decode step of as many rows.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tprt.bench.costs import prefill_operations
from tprt.bench.device_timing import measure_ceilings
from tprt.bench.filled import WARM_UP_STEPS, decode_seconds, fill_cache, prompts_of, start, stop
from tprt.bench.report import Report, Run, Say, compare, device_name, median_ratio
from tprt.bench.synthetic import cache_memory, greedy, random_engine, random_prompt
from tprt.bench.transformers_peer import TransformersPeer
from tprt.config import EngineConfig, ModelConfig
from tprt.distributed.tp_group import TPGroup
from tprt.engine.llm_engine import LLMEngine

CHECKED_TOKENS = 24  # of the prompt on which the peer must give our logits


@dataclass(frozen=True)
class PrefillSizes:
    """Args:
    prompts: tokens of prompts that run alone.
    rows, context: sequences that decode beside a prompt, and tokens each has cached.
    chunks: steps, one more of which the prompt beside them takes.
    repeats: runs of each. budget: most tokens of a step; None leaves the engine's own.
    """

    prompts: Sequence[int] = (2048, 16384)
    rows: Sequence[int] = (1, 16)
    context: int = 512
    chunks: int = 4
    repeats: int = 5
    budget: int | None = None


TOY = PrefillSizes((20, 50), rows=(1, 3), context=16, chunks=2, repeats=2, budget=24)


def prefill(
    config: ModelConfig,
    name: str,
    engine_config: EngineConfig,
    tp: TPGroup,
    *,
    sizes: PrefillSizes,
    vs: str | None,
    pairs: int,
    toy: bool,
    say: Say,
) -> Report | None:
    """A line for each prompt length, and for each number of rows that decode beside one."""
    dtype: torch.dtype = getattr(torch, engine_config.dtype)
    ceilings = measure_ceilings(tp.device, toy) if tp.rank == 0 else None
    if tp.device.type == "cuda":
        torch.cuda.empty_cache()
    settings = _settings(config, engine_config, sizes, tp.size)
    engine = random_engine(config, tp, settings)
    fill_cache(engine.runner)
    if tp.rank != 0:
        engine.serve("prefill")
        engine.close()
        return None
    assert ceilings is not None
    say(", ".join(f"{key} {value}" for key, value in ceilings.to_json().items()))
    engine.begin_call("prefill")
    measure = _Measure(engine, sizes, random.Random(settings.seed), config.vocab_size)
    peer = None
    details: dict[str, Any] = {"ceilings": ceilings.to_json()}
    if vs is not None:
        peer = TransformersPeer(config, dtype, tp.device, settings.seed)
        details["logit_difference"] = peer.logit_difference(engine, measure.prompt(CHECKED_TOKENS))
    alone = []
    for length in sizes.prompts:
        # The model has to have room for the token that is drawn.
        asked, length = length, min(length, engine.runner.max_model_len - 1)
        if length < asked:
            say(f"{asked} tokens are shortened to {length}: the model has no more positions")
        line = measure.alone(length, peer, pairs, say)
        if length < asked:
            line["shortened_from"] = asked
        operations = prefill_operations(config, length)
        seconds = line["ttft_ms"] / 1e3
        line["TFLOP_per_s"] = round(operations / seconds / 1e12, 2)
        line["share_of_gemm"] = round(operations / seconds / ceilings.gemm / tp.size, 4)
        alone.append(line)
        say(
            f"{length:6} tokens: first token after {line['ttft_ms']:9.2f} ms, "
            f"{line['TFLOP_per_s']:.1f} TFLOP/s, {line['share_of_gemm']:.1%} of a large product"
        )
    details["alone"] = alone
    details["mixed"] = [measure.mixed(rows, say) for rows in sizes.rows]
    engine.end_call()
    engine.close()
    ratio = alone[0].get("ratio")
    return Report(
        bench="prefill",
        model=name,
        device=device_name(tp.device),
        dtype=settings.dtype,
        tp=tp.size,
        ratio={"transformers": ratio} if ratio is not None else {},
        settings={
            "prompts": [min(length, engine.runner.max_model_len - 1) for length in sizes.prompts],
            "max_num_batched_tokens": settings.max_num_batched_tokens,
            "rows": list(sizes.rows),
            "context": sizes.context,
            "repeats": sizes.repeats,
            "kernels": engine.runner.sampler.kernels.name,
        },
        details=details,
    )


def _settings(
    config: ModelConfig, engine: EngineConfig, sizes: PrefillSizes, tp_size: int
) -> EngineConfig:
    limit = engine.resolve_max_model_len(config)
    if not config.is_bounded and engine.max_model_len is None:
        limit = max(limit, (sizes.chunks + 1) * engine.max_num_batched_tokens + 1)
    # The model has to have positions for a prompt of so many steps, and for the token it draws.
    most = max(1, (limit - 1) // (sizes.chunks + 1))
    budget = min(sizes.budget or engine.max_num_batched_tokens, most)
    longest = max(*sizes.prompts, (sizes.chunks + 1) * budget, sizes.context + 64) + 1
    length = min(limit, longest)
    size, rows = engine.block_size, max(sizes.rows)
    blocks = -(-length // size) + 1 + rows * (-(-(sizes.context + 64) // size) + 1)
    engine = replace(engine, max_num_seqs=max(sizes.rows) + 1)
    return replace(
        engine,
        max_num_batched_tokens=budget,
        max_model_len=length,
        kv_cache_memory=engine.kv_cache_memory or cache_memory(config, engine, tp_size, blocks),
        # How contexts are entered where a cache is paged; every prompt is a new one. Elsewhere a prompt
        # would stop on its way for snapshots of it.
        enable_prefix_caching=config.is_bounded,
    )


@dataclass
class _Measure:
    """Rank 0, within a call."""

    engine: LLMEngine
    sizes: PrefillSizes
    rng: random.Random
    vocab_size: int

    def prompt(self, length: int) -> list[int]:
        return random_prompt(self.rng, length, self.vocab_size)

    def first_token(self, length: int) -> float:
        """Seconds until the first token of a new prompt is on the host."""
        prompt = self.prompt(length)
        began = time.perf_counter()
        (sequence,) = self.engine.add(greedy(prompt, 1))
        while not sequence.token_ids:
            self.engine.step()
        seconds = time.perf_counter() - began
        while not self.engine.idle:
            self.engine.step()
        return seconds

    def alone(
        self, length: int, peer: TransformersPeer | None, pairs: int, say: Say
    ) -> dict[str, Any]:
        self.first_token(length)
        found: dict[str, Any] = {"tokens": length}
        if peer is None:
            seconds = [self.first_token(length) for _ in range(self.sizes.repeats)]
        else:
            peer.first_token(self.prompt(length))
            both = {
                "tprt": lambda: self.first_token(length),
                "transformers": lambda: peer.first_token(self.prompt(length)),
            }
            times = compare(both, pairs, say)
            seconds = times["tprt"]
            found["ratio"] = median_ratio(seconds, times["transformers"])
            found["peer_ttft_ms"] = round(statistics.median(times["transformers"]) * 1e3, 3)
        found["ttft_ms"] = round(statistics.median(seconds) * 1e3, 3)
        found["seconds"] = seconds
        return found

    def mixed(self, rows: int, say: Say) -> dict[str, Any]:
        """Milliseconds of a full step with ``rows`` decode rows in it, and of the steps it joins."""
        budget, sizes = self.engine.config.max_num_batched_tokens, self.sizes
        prompts = prompts_of(sizes.context, rows, self.vocab_size, self.engine.config.seed)
        steps = sizes.chunks + WARM_UP_STEPS
        runs: dict[str, Run] = {
            "mixed": lambda: self._chunk_steps(budget - rows, prompts),
            "chunk": lambda: self._chunk_steps(budget, []),
            "decode": lambda: decode_seconds(self.engine, prompts, steps) / steps,
        }
        for run in runs.values():
            run()
        ms = {
            kind: statistics.median(run() for _ in range(sizes.repeats)) * 1e3
            for kind, run in runs.items()
        }
        added = ms["mixed"] - ms["chunk"]
        found = {
            "rows": rows,
            "step_tokens": budget,
            **{f"{kind}_ms": round(value, 3) for kind, value in ms.items()},
            "mixed_over_chunk_ms": round(added, 3),
        }
        say(
            f"{rows:3} rows decode in a step of {budget} tokens: {ms['mixed']:.2f} ms; the same step of "
            f"prompt tokens alone {ms['chunk']:.2f} ms, of the rows alone {ms['decode']:.2f} ms"
        )
        return found

    def _chunk_steps(self, chunk: int, beside: list[list[int]]) -> float:
        """Seconds of a step that holds ``chunk`` tokens of a prompt and a row of each of ``beside``.

        From the end of the first such step to the end of the last one: what was queued before and how
        long the host takes to queue stays out.
        """
        engine, steps = self.engine, self.sizes.chunks
        sequences = start(engine, beside, steps + 2 * WARM_UP_STEPS) if beside else []
        (sequence,) = engine.add(greedy(self.prompt((steps + 1) * chunk), 1))
        engine.step()
        if engine.runner.stream is not None:
            engine.step()  # on a GPU this queues the second and waits for the first
        began = time.perf_counter()
        while not sequence.token_ids:
            engine.step()
        seconds = time.perf_counter() - began
        stop(engine, sequences)
        return seconds / steps
