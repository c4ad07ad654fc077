"""Decode steps of transformers at a context that was never computed, as for our own engine.

Keys and values are random; a model that keeps state computes its context before the clock starts. Tokens
stay on the device until the last step, which is more than its own ``generate`` allows itself: the peer
is measured without the host in its way.
"""

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from tprt.bench.report import Run
from tprt.bench.transformers_peer import TransformersPeer

CACHE_MULTIPLE = 64  # masks of other lengths keep SDPA from its fused kernels


class DecodePeer:
    """Args:
    steps: tokens of each of ``batch`` sequences that a run takes the time of.
    """

    def __init__(self, peer: TransformersPeer, batch: int, context: int, steps: int) -> None:
        self.model, self.device, self.steps = peer.model, peer.device, steps
        config = self.model.config
        heads = config.num_attention_heads
        shape = (batch, heads, context, config.hidden_size // heads)
        dtype = next(self.model.parameters()).dtype
        self.kv = [torch.randn(shape, dtype=dtype, device=self.device) for _ in range(2)]
        self.first = torch.randint(config.vocab_size, (batch, 1), device=self.device)
        self.context, self.stateful = (batch, context), getattr(self.model, "_is_stateful", False)
        self.caches: Any = import_module("transformers.cache_utils")
        length = -(-(context + steps) // CACHE_MULTIPLE) * CACHE_MULTIPLE
        self.static = self.caches.StaticCache(config=config, max_cache_len=length)
        self.compiled: Callable[..., Any] | None = None

    def candidates(self) -> dict[str, Run]:
        """Seconds of ``steps`` steps by each way that transformers has."""
        if self.stateful:  # torch.compile makes one more program for each position of it
            return {"dynamic cache": self.dynamic, "static cache": self.static_plain}
        return {"dynamic cache": self.dynamic, "static cache, torch.compile": self.static_compiled}

    def dynamic(self) -> float:
        cache = self.caches.DynamicCache(config=self.model.config)
        self._fill(cache)
        return self._run(self.model, cache)

    def static_plain(self) -> float:
        self.static.reset()
        self._fill(self.static)
        return self._run(self.model, self.static)

    def static_compiled(self) -> float:
        """CUDA graphs by torch.compile. On a CPU traced alike and run by torch, without a compiler."""
        if self.compiled is None:
            how: Any = (
                {"mode": "reduce-overhead"} if self.device.type == "cuda" else {"backend": "eager"}
            )
            torch.compiler.reset()  # shapes of an earlier cell would make this one a dynamic one
            self.compiled = torch.compile(self.model.forward, fullgraph=True, dynamic=False, **how)
        self.static.reset()
        self._fill(self.static)
        return self._run(self.compiled, self.static)

    @torch.no_grad()
    def _fill(self, cache: Any) -> None:
        if self.stateful:
            dtype = self.kv[0].dtype
            self.model._setup_cache(self.model.config, self.context[0], self.device, dtype)
            ids = torch.randint(self.model.config.vocab_size, self.context, device=self.device)
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return
        for layer in range(self.model.config.num_hidden_layers):
            cache.update(*self.kv, layer)

    @torch.no_grad()
    def _run(self, forward: Callable[..., Any], cache: Any) -> float:
        tokens = self.first
        self._wait()
        began = time.perf_counter()
        for _ in range(self.steps):
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            logits = forward(input_ids=tokens, past_key_values=cache, use_cache=True).logits
            tokens = logits[:, -1:].argmax(dim=-1)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
