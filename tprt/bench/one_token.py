"""One decode token of an engine of its own, between the profiler's start and stop; prints its bytes.

ncu --profile-from-start off ... python -m tprt.bench.one_token '{"zeros": 0.9, "trim": true}'

A few steps go before, so that every kernel is compiled and caches hold what a step leaves there. The
step is eager: a profiler sees its kernels, one after the other. ``dram_bytes`` reads both.
"""

import json
import sys
from typing import Any

import torch

from tprt.bench.costs import step_bytes
from tprt.bench.decode_sizes import DecodeSizes, decode_settings
from tprt.bench.filled import fill_cache, prompts_of, start, stop
from tprt.bench.live import LiveShares, skips, watched
from tprt.bench.named_models import PERSIMMON_8B
from tprt.bench.synthetic import random_engine, trimmed
from tprt.config import EngineConfig, PersimmonConfig
from tprt.distributed.tp_group import TPGroup

STEPS_BEFORE = 4


def main(
    config: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    device: str = "cuda",
    zeros: float | None = None,
    trim: bool = False,
    context: int = 512,
) -> dict[str, Any]:
    """Args:
    config, engine: fields of ``PersimmonConfig`` and ``EngineConfig``.
    zeros, trim: as of ``tprt bench decode``.

    Returns:
        What the step has to read, in bytes, and the zeros it really had.
    """
    model_config = PERSIMMON_8B if config is None else PersimmonConfig(**config)
    sizes = DecodeSizes((1,), (context,), steps=STEPS_BEFORE + 1, traced=0)
    # Nothing is planned ahead: one call of ``step`` is one step of the device.
    fields = {**(engine or {}), "enforce_eager": True, "look_ahead": 0}
    settings = decode_settings(model_config, EngineConfig(**fields), sizes, alone=False)
    tp = TPGroup(device=torch.device(device))
    vocabulary = trimmed(model_config) if trim else None
    made = random_engine(model_config, tp, settings, zeros, vocabulary)
    fill_cache(made.runner)
    model, found = made.runner.model, LiveShares()
    kept: list[tuple[int, torch.Tensor]] = []
    prompts = prompts_of(context, 1, model_config.vocab_size, settings.seed, vocabulary)
    made.begin_call("one token")
    sequences = start(made, prompts, sizes.new_tokens)
    for _ in range(STEPS_BEFORE):
        made.step()
    # Kept and looked at later: counting here would be kernels of the step.
    with watched(model, lambda layer, activations: kept.append((layer, activations))):
        _profile(tp.device, made.step)
    for layer, activations in kept:
        found.see(layer, activations)
    # Tokens whose keys and values the step read, its own included: all but the one it drew.
    length = len(sequences[0].ids) - 1
    live = found.live if skips(model, 1) else 1.0
    needed = step_bytes(model_config, getattr(torch, settings.dtype), 1, vocabulary)
    stop(made, sequences)
    made.end_call()
    made.close()
    return {
        "bytes": round(needed.of(1, length, live)),
        "weights": needed.weights,
        "skipped": round((1 - live) * needed.down),
        "kv": length * needed.kv_per_token,
        "zeros_measured": round(found.zeros, 4),
        "kernels": made.runner.sampler.kernels.name,
    }


def _profile(device: torch.device, step: Any) -> None:
    if device.type != "cuda":
        step()
        return
    torch.cuda.synchronize(device)
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    step()
    torch.cuda.synchronize(device)
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}"))), flush=True)
