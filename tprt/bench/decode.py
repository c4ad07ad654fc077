"""Decode steps at given batch sizes and contexts: tokens per second, and the share of the bandwidth.

Contexts are filled with random keys and values (``filled``), so that a long one costs no prefill; state
per sequence is computed. A trace of some steps then says whether the host was in the way.
"""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tprt.bench.costs import StepBytes, step_bytes
from tprt.bench.decode_sizes import DecodeSizes, decode_settings, fitted
from tprt.bench.device_timing import Ceilings, measure_ceilings
from tprt.bench.filled import WARM_UP_STEPS, decode_seconds, fill_cache, prompts_of, start, stop
from tprt.bench.one_rank import lone_rank
from tprt.bench.projection import FORMULA, SOURCES, project, shown
from tprt.bench.report import Report, Run, Say, compare, device_name, median_ratio
from tprt.bench.step_trace import count_steps, steps_range, trace_path, traced
from tprt.bench.synthetic import random_engine, trimmed
from tprt.bench.transformers_decode import DecodePeer
from tprt.bench.transformers_peer import TransformersPeer, fastest
from tprt.config import EngineConfig, ModelConfig
from tprt.distributed.tp_group import TPGroup
from tprt.engine.llm_engine import LLMEngine
from tprt.errors import ConfigError

CHECKED_TOKENS = 24  # of the prompt on which the peer must give our logits


def decode(
    config: ModelConfig,
    name: str,
    engine_config: EngineConfig,
    tp: TPGroup,
    *,
    sizes: DecodeSizes,
    vs: str | None,
    pairs: int,
    trim: bool,
    shard: int,
    profile: Path | None,
    toy: bool,
    say: Say,
) -> Report | None:
    """A line for each batch size and context.

    Args:
        trim: leave the rows of unused ids out of embedding and head.
        shard: above 1, the part of rank 0 of so many, alone and without collectives, and a projection.
        profile: where the trace goes; None keeps its counts alone.
    """
    device, dtype = tp.device, getattr(torch, engine_config.dtype)
    if shard > 1:
        if tp.size > 1:
            raise ConfigError("--shard with several ranks", hint="it needs one process: --nproc 1")
        tp = lone_rank(shard, device)
    ceilings = measure_ceilings(device, toy) if tp.rank == 0 else None
    if device.type == "cuda":
        torch.cuda.empty_cache()
    settings = decode_settings(config, engine_config, sizes, alone=vs is None)
    vocabulary = trimmed(config) if trim else None
    engine = random_engine(config, tp, settings, vocabulary=vocabulary)
    fill_cache(engine.runner)
    if tp.rank != 0:
        engine.serve("decode")
        if profile is not None:
            with traced(device, trace_path(profile, tp.rank, tp.size)):
                engine.serve("trace")
        else:
            engine.serve("trace")
        engine.close()
        return None
    assert ceilings is not None
    say(", ".join(f"{key} {value}" for key, value in ceilings.to_json().items()))
    peer = None
    details: dict[str, Any] = {"ceilings": ceilings.to_json()}
    engine.begin_call("decode")
    if vs is not None:
        peer = TransformersPeer(config, dtype, device, settings.seed)
        (prompt,) = prompts_of(CHECKED_TOKENS, 1, config.vocab_size, settings.seed, vocabulary)
        details["logit_difference"] = peer.logit_difference(engine, prompt)
    needed = step_bytes(config, dtype, tp.size, vocabulary)
    measure = _Measure(engine, ceilings, needed, sizes, peer, pairs, say)
    cells = measure.cells(in_turns=not engine.runner.is_paged and peer is None)
    engine.end_call()
    measured = [cell for cell in cells if "skipped" not in cell]
    if not measured:
        raise ConfigError("none of the cells fits into the KV cache", hint="a smaller --batch")
    first = measured[0]
    details["cells"] = cells
    details["trace"] = _trace(engine, first["batch"], first["context"], sizes, profile, say)
    engine.close()
    if shard > 1:
        details["projection"] = _projections(config, dtype, shard, measured, say)
    return Report(
        bench="decode",
        model=name,
        device=device_name(device),
        dtype=engine_config.dtype,
        tp=1 if shard > 1 else tp.size,
        tokens_per_s=first["tokens_per_s"] if shard == 1 else None,
        ratio=first.get("ratio", {}) if shard == 1 else {},
        share_of_bandwidth=first["share_of_bandwidth"],
        settings={
            "batches": list(sizes.batches),
            "contexts": sorted({cell["context"] for cell in cells}),
            "steps": sizes.steps,
            "repeats": sizes.repeats,
            "shard": shard,
            "trim": trim,
            "kernels": engine.runner.sampler.kernels.name,
            "enforce_eager": settings.enforce_eager,
            "one_shot": tp.one_shot is not None,
            "pairs": pairs if vs else None,
        },
        details=details,
    )


@dataclass
class _Measure:
    """Rank 0, within a call."""

    engine: LLMEngine
    ceilings: Ceilings
    bytes: StepBytes
    sizes: DecodeSizes
    peer: TransformersPeer | None
    pairs: int
    say: Say

    def cells(self, in_turns: bool) -> list[dict[str, Any]]:
        """Args:
        in_turns: repeats go round all cells, so that a machine that slows down slows all of them. Only
            where a context is computed for every run anyway, not kept in the cache for the next one.
        """
        sizes, repeats = self.sizes, range(self.sizes.repeats)
        found = [fitted(self.engine, sizes, *cell, self.say) for cell in sizes.cells]
        measured = [cell for cell in found if "skipped" not in cell]
        runs = [self._run(cell) for cell in measured]
        if in_turns:
            rounds: list[list[float]] = []
            for _ in repeats:
                rounds.append([run() for run in runs])
                shown = ", ".join(f"{seconds / sizes.steps * 1e3:.3f}" for seconds in rounds[-1])
                self.say(f"round {len(rounds)} of {sizes.repeats}: {shown} ms per step")
            for i, cell in enumerate(measured):
                self._report(cell, [one_round[i] for one_round in rounds])
            return found
        for cell, run in zip(measured, runs, strict=True):
            if self.peer is None:
                self._report(cell, [run() for _ in repeats])
            else:
                seconds, cell["ratio"], cell["peer"] = self._beside(run, cell)
                self._report(cell, seconds)
        return found

    def _run(self, cell: dict[str, Any]) -> Run:
        engine, context, batch = self.engine, cell["context"], cell["batch"]
        vocab_size, vocabulary = engine.runner.vocab_size, engine.runner.model.vocabulary
        prompts = prompts_of(context, batch, vocab_size, engine.config.seed, vocabulary)
        return lambda: decode_seconds(engine, prompts, self.sizes.steps)

    def _report(self, found: dict[str, Any], seconds: Sequence[float]) -> None:
        """Add to a cell what its runs say."""
        sizes, batch, context = self.sizes, found["batch"], found["context"]
        median = statistics.median(seconds) / sizes.steps
        read = self.bytes.of(batch, context + 2 + WARM_UP_STEPS + sizes.steps / 2)
        found |= {
            "ms_per_step": round(median * 1e3, 4),
            "spread": round((max(seconds) - min(seconds)) / sizes.steps / median, 4),
            "tokens_per_s": round(batch / median, 1),
            "GB_per_step": round(read / 1e9, 3),
            "share_of_bandwidth": round(read / median / self.ceilings.read, 4),
        }
        self.say(
            f"batch {batch:3} context {context:6}: {found['ms_per_step']:8.3f} ms per step, "
            f"{found['tokens_per_s']:9.1f} tokens/s, {found['GB_per_step']:.2f} GB, "
            f"{found['share_of_bandwidth']:.1%} of the read bandwidth"
        )

    def _beside(
        self, ours: Run, cell: dict[str, Any]
    ) -> tuple[list[float], dict[str, float], dict[str, Any]]:
        assert self.peer is not None
        peer = DecodePeer(self.peer, cell["batch"], cell["context"], self.sizes.steps)
        candidates = peer.candidates()
        ours()
        best, tried = fastest(candidates, self.say, warm_up=True)
        seconds = compare({"tprt": ours, "transformers": candidates[best]}, self.pairs, self.say)
        ratio = median_ratio(seconds["tprt"], seconds["transformers"])
        told = {"best": best, "settings_s": tried, "seconds": seconds}
        return seconds["tprt"], {"transformers": ratio}, told


def _trace(
    engine: LLMEngine, batch: int, context: int, sizes: DecodeSizes, profile: Path | None, say: Say
) -> dict[str, Any]:
    """Counts of some steps of one cell; see ``step_trace.count_steps``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        if profile is not None:
            path = trace_path(profile, engine.tp.rank, engine.tp.size)
            path.parent.mkdir(parents=True, exist_ok=True)
        engine.begin_call("trace")
        vocab_size, vocabulary = engine.runner.vocab_size, engine.runner.model.vocabulary
        prompts = prompts_of(context, batch, vocab_size, engine.config.seed, vocabulary)
        sequences = start(engine, prompts, sizes.new_tokens)
        with traced(engine.tp.device, path):
            for _ in range(WARM_UP_STEPS):
                engine.step()
            with steps_range():
                for _ in range(sizes.traced):
                    engine.step()
        stop(engine, sequences)
        engine.end_call()
        found = count_steps(path, sizes.traced)
    found |= {"batch": batch, "context": context}
    say(
        f"trace of {sizes.traced} steps: {found['kernels_per_step']} kernels per step, "
        f"waits per step {found['waits_per_step'] or 'none'}, device idle {found['idle_share']}"
    )
    return found


def _projections(
    config: ModelConfig,
    dtype: torch.dtype,
    ranks: int,
    cells: list[dict[str, Any]],
    say: Say,
) -> dict[str, Any]:
    lines = []
    for cell in cells:
        batch, context, ms = cell["batch"], cell["context"], cell["ms_per_step"]
        row = config.hidden_size * dtype.itemsize
        found = project(ms, ranks, config.num_hidden_layers, batch, row)
        if found is not None:
            say(shown(ranks, batch, context, ms, found))
            lines.append({"batch": batch, "context": context, "shard_ms": ms, **found})
    label = "projection, not measured: one rank, no NVLink"
    return {"label": label, "formula": FORMULA, "sources": SOURCES, "ranks": ranks, "lines": lines}
