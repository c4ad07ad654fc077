"""``tprt bench decode --zeros``: decode steps that skip what meets zeros, beside ones that read it all.

Both are ours, on the same weights, in turn, and with ``--vs`` a peer in the same rotation. The zeros are
synthetic and independent (see ``synthetic.zeros_bias``): shares are chosen by biases that change in
place, and what comes out of them is measured with every cell. A read of plain memory is in the rotation
too: bytes per second of a step, and the limit of whatever reads every matrix, are held against it.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from tprt.bench.costs import StepBytes, step_bytes
from tprt.bench.decode import CHECKED_TOKENS
from tprt.bench.decode_sizes import DecodeSizes, decode_settings, fitted
from tprt.bench.device_timing import ReadTest, measure_ceilings
from tprt.bench.filled import WARM_UP_STEPS, decode_seconds, fill_cache, prompts_of, start, stop
from tprt.bench.live import LiveShares, kernels_of, skips, watched, without_graphs
from tprt.bench.named_models import require_persimmon
from tprt.bench.report import Report, Run, Say, compare, device_name, ratio_interval
from tprt.bench.synthetic import make_engine, random_model, set_zeros, trimmed
from tprt.bench.transformers_decode import DecodePeer
from tprt.bench.transformers_peer import TransformersPeer, fastest
from tprt.config import EngineConfig, ModelConfig
from tprt.distributed.tp_group import TPGroup
from tprt.engine.llm_engine import LLMEngine
from tprt.engine.step_record import bucket_of
from tprt.errors import ConfigError
from tprt.kernels import use_kernels
from tprt.models import CausalLM

KIND = "synthetic, independent"
# Four shares of these are some minutes on two cores, with a peer.
ON_CPU = DecodeSizes((1, 4), (16, 512), steps=32)
WATCHED_STEPS = 8
# Bytes of a GPU for graphs and steps of two engines and for reads of memory.
BESIDE = 12 * 2**30


def zeros_sweep(
    config: ModelConfig,
    name: str,
    engine_config: EngineConfig,
    tp: TPGroup,
    *,
    zeros: Sequence[float],
    sizes: DecodeSizes,
    vs: str | None,
    pairs: int,
    trim: bool,
    toy: bool,
    say: Say,
) -> Report:
    """A line for each batch size, context and share of zeros, on a single rank.

    Raises:
        ConfigError: ``engine_config`` forbids skipping, no cell fits into the KV cache, or the model's
            MLPs have no squared ReLU.
    """
    if engine_config.sparse_rows == 0:
        raise ConfigError("--zeros with engine.sparse_rows=0", hint="leave engine.sparse_rows out")
    require_persimmon(config, "--zeros")
    device, dtype = tp.device, getattr(torch, engine_config.dtype)
    ceilings = measure_ceilings(device, toy)
    say(", ".join(f"{key} {value}" for key, value in ceilings.to_json().items()))
    with use_kernels(*engine_config.kernel_choice):
        vocabulary = trimmed(config) if trim else None
        model = random_model(config, tp, dtype, engine_config.seed, zeros[0], vocabulary)
        peer = None
        if vs is not None:
            peer = TransformersPeer(config, dtype, device, engine_config.seed, zeros[0])
        room = _room(device, engine_config, peer)
        settings = decode_settings(config, engine_config, sizes, alone=False, room=room)
        paths = _paths(model, settings)
    details: dict[str, Any] = {"zeros": KIND, "ceilings": ceilings.to_json()}
    if peer is not None:
        (prompt,) = prompts_of(CHECKED_TOKENS, 1, config.vocab_size, settings.seed, vocabulary)
        details["logit_difference"] = peer.logit_difference(paths["sparse"].engine, prompt)
    read = step_bytes(config, dtype, 1, vocabulary)
    test = ReadTest(device, toy)
    sweep = _Sweep(paths, read, step_bytes(config, dtype, 1), sizes, peer, pairs, test, say)
    cells = [cell for group in sizes.cells for cell in sweep.group(*group, zeros)]
    for path in paths.values():
        path.close()
    measured = [cell for cell in cells if "skipped" not in cell]
    if not measured:
        raise ConfigError("none of the cells fits into the KV cache", hint="a smaller --batch")
    first = measured[0]
    details["cells"] = cells
    return Report(
        bench="decode",
        model=name,
        device=device_name(device),
        dtype=engine_config.dtype,
        tp=1,
        tokens_per_s=first["tokens_per_s"],
        ratio={peer: found["median"] for peer, found in first["ratio"].items()},
        share_of_bandwidth=first["share_of_bandwidth"],
        settings={
            "zeros": list(zeros),
            "batches": list(sizes.batches),
            "contexts": sorted({cell["context"] for cell in cells}),
            "steps": sizes.steps,
            "pairs": pairs,
            "trim": trim,
            "kernels": paths["sparse"].engine.runner.sampler.kernels.name,
            "sparse_rows": paths["sparse"].rows,
            "enforce_eager": settings.enforce_eager,
        },
        details=details,
    )


def _room(device: torch.device, config: EngineConfig, peer: TransformersPeer | None) -> float:
    """Bytes for the cache of one engine, where ours are two and the peer's as many."""
    if device.type != "cuda":
        return float("inf")
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    left = free - (1 - config.gpu_memory_utilization) * total - BESIDE
    return left / (2 if peer is None else 4)


@dataclass
class _Path:
    """One way to go: what ``sparse_rows`` of the kernels all layers share has to be."""

    engine: LLMEngine
    rows: int | None

    def seconds(self, prompts: list[list[int]], steps: int) -> float:
        self.choose()
        return decode_seconds(self.engine, prompts, steps)

    def choose(self) -> None:
        kernels_of(self.engine.runner.model).sparse_rows = self.rows

    def close(self) -> None:
        self.engine.end_call()
        self.engine.close()


def _paths(model: CausalLM, settings: EngineConfig) -> dict[str, _Path]:
    """Graphs keep the way they were captured with, so each has an engine of its own, on one model."""
    kernels = kernels_of(model)
    paths: dict[str, _Path] = {}
    for name, rows in (("dense", 0), ("sparse", kernels.sparse_rows)):
        kernels.sparse_rows = rows
        engine = make_engine(model, settings)
        # The same contexts, so that what is measured for one holds for the other.
        fill_cache(engine.runner, next((path.engine.runner for path in paths.values()), None))
        engine.begin_call("decode")
        paths[name] = _Path(engine, rows)
    return {name: paths[name] for name in ("sparse", "dense")}


@dataclass
class _Sweep:
    """Args:
    read: of our model. limit: of the same model with every row of its head.
    """

    paths: dict[str, _Path]
    read: StepBytes
    limit: StepBytes
    sizes: DecodeSizes
    peer: TransformersPeer | None
    pairs: int
    test: ReadTest
    say: Say
    done: set[tuple[int, int]] = field(default_factory=set)

    def group(self, batch: int, context: int, zeros: Sequence[float]) -> list[dict[str, Any]]:
        """Every share at one batch and context."""
        engine = self.paths["sparse"].engine
        head = fitted(engine, self.sizes, batch, context, self.say)
        context = head["context"]
        if "skipped" in head or (batch, context) in self.done:
            return [head] if "skipped" in head else []
        self.done.add((batch, context))
        model = engine.runner.model
        vocab_size, seed = engine.runner.vocab_size, engine.config.seed
        prompts = prompts_of(context, batch, vocab_size, seed, model.vocabulary)
        runs: dict[str, Run] = {
            name: partial(path.seconds, prompts, self.sizes.steps)
            for name, path in self.paths.items()
        }
        if self.peer is not None:
            candidates = DecodePeer(self.peer, batch, context, self.sizes.steps).candidates()
            best, head["peer_settings_s"] = fastest(candidates, self.say, warm_up=True)
            head["peer_best"] = best
            runs["transformers"] = candidates[best]
        self.paths["sparse"].choose()
        head["skips"] = skips(model, bucket_of(batch))  # as many rows as a step has
        cells = [head | self._measure(share, prompts, runs) for share in zeros]
        for cell in cells:
            self._tell(cell)
        return cells

    def _measure(
        self, share: float, prompts: list[list[int]], runs: dict[str, Run]
    ) -> dict[str, Any]:
        engine = self.paths["sparse"].engine
        set_zeros(engine.runner.model, share)
        if self.peer is not None:
            self.peer.set_zeros(share)
        if engine.runner.stream is not None:
            torch.cuda.synchronize(engine.tp.device)
        self.say(f"  zeros {share:.1%}, batch {len(prompts)}, context {len(prompts[0]) - 1}")
        found = self._watch(prompts)
        reads: list[float] = []

        def read() -> float:
            reads.append(self.test())
            return self.test.x.nbytes / reads[-1]

        seconds = compare(runs | {"read": read}, self.pairs, self.say)
        del seconds["read"]
        return {
            "zeros": share,
            "zeros_measured": round(found.zeros, 4),
            "live": round(found.live, 4),
            "ratio": {
                name: ratio_interval(seconds["sparse"], theirs)
                for name, theirs in seconds.items()
                if name != "sparse"
            },
            "seconds": seconds,
            "reads_GB_per_s": [round(r / 1e9, 4) for r in reads],
        }

    def _watch(self, prompts: list[list[int]]) -> LiveShares:
        """The zeros of some steps of the cell that is measured."""
        path, found = self.paths["sparse"], LiveShares()
        path.choose()
        with without_graphs(path.engine.runner):
            sequences = start(path.engine, prompts, self.sizes.new_tokens)
            with watched(path.engine.runner.model, found.see):
                for _ in range(WATCHED_STEPS):
                    path.engine.step()
            stop(path.engine, sequences)
        return found

    def _tell(self, cell: dict[str, Any]) -> None:
        """Fill in what follows from seconds, bytes and the read bandwidth, and say it."""
        batch, steps = cell["batch"], self.sizes.steps
        context = cell["context"] + 2 + WARM_UP_STEPS + steps / 2
        live = cell["live"] if cell["skips"] else 1.0
        bandwidths = [read * 1e9 for read in cell["reads_GB_per_s"]]
        bandwidth = statistics.median(bandwidths)
        needed = {
            "sparse": self.read.of(batch, context, live),
            "dense": self.read.of(batch, context),
        }
        for name, seconds in cell["seconds"].items():
            step = statistics.median(seconds) / steps
            found = {
                "ms_per_step": round(step * 1e3, 4),
                "spread": round((max(seconds) - min(seconds)) / steps / step, 4),
                "tokens_per_s": round(batch / step, 1),
            }
            if name in needed:
                found["GB_per_step"] = round(needed[name] / 1e9, 6)
                # Pair by pair, as the bandwidth of a shared machine drifts.
                shares = [
                    needed[name] * steps / each / read
                    for each, read in zip(seconds, bandwidths, strict=True)
                ]
                found["share_of_bandwidth"] = round(statistics.median(shares), 4)
            cell |= found if name == "sparse" else {name: found}
        limit = batch * bandwidth / self.limit.of(batch, context)
        cell |= {
            "read_GB_per_s": round(bandwidth / 1e9, 4),
            "dense_limit_GB_per_step": round(self.limit.of(batch, context) / 1e9, 6),
            "dense_limit_tokens_per_s": round(limit, 1),
            "above_dense_limit": cell["tokens_per_s"] > limit,
        }
        ratios = ", ".join(
            f"{r['median']} times {name} ({r['low']} to {r['high']})"
            for name, r in cell["ratio"].items()
        )
        self.say(
            f"batch {batch:3} context {cell['context']:6} zeros {cell['zeros_measured']:.1%}, live "
            f"{cell['live']:.1%}: {cell['tokens_per_s']:.1f} tokens/s, {cell['GB_per_step']:.3f} GB at "
            f"{cell['share_of_bandwidth']:.1%} of {cell['read_GB_per_s']:.1f} GB/s; {ratios}; "
            f"dense limit {limit:.1f} tokens/s{'' if cell['skips'] else '; so many rows skip nothing'}"
        )
