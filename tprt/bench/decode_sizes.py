"""What decode steps are measured at: batches and contexts, and the cache they take.

Nothing here runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tprt.bench.filled import WARM_UP_STEPS, blocks_needed, steps_to_begin
from tprt.bench.report import Say
from tprt.bench.synthetic import cache_memory
from tprt.config import EngineConfig, ModelConfig
from tprt.engine.llm_engine import LLMEngine


@dataclass(frozen=True)
class DecodeSizes:
    """Args:
    batches, contexts: sequences that decode together, and tokens cached before the first step.
    steps: of one run. repeats: runs of a cell. traced: steps under the profiler.
    """

    batches: Sequence[int] = (1, 4, 16)
    contexts: Sequence[int] = (16, 512, 2048, 16384)
    steps: int = 64
    repeats: int = 5
    traced: int = 16

    @property
    def cells(self) -> list[tuple[int, int]]:
        return [(batch, context) for batch in self.batches for context in self.contexts]

    @property
    def new_tokens(self) -> int:
        """Of a sequence, so that none ends while it is measured or traced."""
        return max(self.steps, self.traced) + 2 * WARM_UP_STEPS + 2


TOY = DecodeSizes((1, 3), (16, 40), steps=6, repeats=2, traced=3)


def decode_settings(
    config: ModelConfig,
    engine: EngineConfig,
    sizes: DecodeSizes,
    alone: bool,
    room: float = math.inf,
) -> EngineConfig:
    """Slots and blocks for the largest cell.

    Args:
        alone: the cache may take all there is; else what the largest cell needs.
        room: bytes; a cell that needs more is not counted.
    """
    limit = engine.resolve_max_model_len(config)
    # A block more than tokens need, as admission asks for one.
    length = max(sizes.contexts) + sizes.new_tokens + 1 + engine.block_size
    if not config.is_bounded:
        # Contexts are computed, and the first sequences draw tokens meanwhile.
        length += steps_to_begin(engine, max(sizes.batches) * [range(max(sizes.contexts) + 1)])
    length = min(limit, length)
    memory = engine.kv_cache_memory
    if memory is None and not alone:
        needs = [
            batch * blocks_needed(min(context, length), sizes.new_tokens, engine.block_size)
            for batch, context in sizes.cells
        ]
        slots = replace(engine, max_num_seqs=max(sizes.batches))
        wanted = [cache_memory(config, slots, 1, need) for need in needs]  # one rank
        memory = max((m for m in wanted if m <= room), default=min(wanted))
    return replace(
        engine,
        max_num_seqs=max(sizes.batches),
        max_model_len=length,
        kv_cache_memory=memory,
        enable_prefix_caching=True,  # how contexts are entered
    )


def fitted(
    engine: LLMEngine, sizes: DecodeSizes, batch: int, context: int, say: Say
) -> dict[str, Any]:
    """The head of a cell: "batch", "context", and "shortened_from" or "skipped" with the reason."""
    # The last position of the model is within the last step.
    asked, context = context, min(context, engine.runner.max_model_len - sizes.new_tokens - 1)
    found: dict[str, Any] = {"batch": batch, "context": context}
    if context < asked:
        found["shortened_from"] = asked
        say(f"context {asked} is shortened to {context}: the model has no more positions")
    need = batch * blocks_needed(context, sizes.new_tokens, engine.config.block_size)
    if engine.runner.is_paged and need > engine.blocks.capacity:
        found["skipped"] = f"{need} KV blocks needed, {engine.blocks.capacity} there"
        say(f"batch {batch:3} context {context:6}: skipped, {found['skipped']}")
    return found
