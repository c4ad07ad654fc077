"""What a model costs on paper: bytes that a step reads, and operations of a prompt.

Knows the models; nothing here runs.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch

from tprt.cache.slot_cache import RecurrentSpec, WindowSpec
from tprt.config import ModelConfig, PersimmonConfig, RecurrentGemmaConfig
from tprt.distributed.tp_group import TPGroup
from tprt.distributed.vocabulary import Vocabulary
from tprt.engine.memory_plan import plan_rank
from tprt.layers.embedding import ParallelLMHead
from tprt.layers.linear import MergedColumnParallelLinear, ParallelLinear, RowParallelLinear
from tprt.models import CausalLM, get_model_class


def on_paper(
    config: ModelConfig, dtype: torch.dtype, tp_size: int, vocabulary: Vocabulary | None = None
) -> CausalLM:
    """The part of a rank: shapes without memory."""
    tp = TPGroup(0, tp_size, torch.device("meta"))
    return get_model_class(config.model_type)(config, tp, dtype, vocabulary=vocabulary)


def weight_bytes(
    config: ModelConfig, dtype: torch.dtype, tp_size: int, vocabulary: Vocabulary | None = None
) -> int:
    """Bytes of weights that a rank reads per token: all but the rows of an embedding that is no head."""
    parameters = dict(on_paper(config, dtype, tp_size, vocabulary).named_parameters())
    tied = "lm_head.weight" not in parameters
    read = (p for name, p in parameters.items() if tied or "embed_tokens" not in name)
    return sum(p.numel() for p in read) * dtype.itemsize


def matrix_shapes(config: ModelConfig, dtype: torch.dtype, tp_size: int) -> list[tuple[int, int]]:
    """[n, k] of each x W^T of a rank, once each; not of those that leave rows of W unread."""
    shapes: dict[tuple[int, int], None] = {}
    for module in on_paper(config, dtype, tp_size).modules():
        if isinstance(module, MergedColumnParallelLinear):
            weights = [shard.weight for shard in module.shards]
            shapes[sum(len(w) for w in weights), weights[0].shape[1]] = None
        elif isinstance(module, ParallelLMHead):
            shapes[module.part, config.hidden_size] = None
        elif isinstance(module, ParallelLinear):
            if not (isinstance(module, RowParallelLinear) and module.sparse is not None):
                n, k = module.weight.shape
                shapes[n, k] = None
    return list(shapes)


@dataclass(frozen=True)
class StepBytes:
    """What a rank reads in a decode step: every matrix once, and what it keeps of the batch.

    Args:
        kv_per_token: of one token in one sequence's cache.
        window: most tokens of a sequence that are read.
        state: of a sequence, whatever its length.
        down: of ``weights``, those of the down projections of squared ReLUs.
    """

    weights: int
    kv_per_token: int
    down: int = 0
    window: float = math.inf
    state: int = 0

    def of(self, batch: int, context: float, live: float = 1.0) -> float:
        """Args: live: share of the neurons that fire for any of the batch, where others are skipped."""
        kept = self.state + min(context, self.window) * self.kv_per_token
        return self.weights - (1 - live) * self.down + batch * kept


def step_bytes(
    config: ModelConfig, dtype: torch.dtype, tp_size: int, vocabulary: Vocabulary | None = None
) -> StepBytes:
    weights = weight_bytes(config, dtype, tp_size, vocabulary)
    if isinstance(config, PersimmonConfig):
        plan = plan_rank(config, 0, tp_size, dtype, config.max_position_embeddings)
        down = config.num_hidden_layers * config.hidden_size * config.intermediate_size // tp_size
        return StepBytes(weights, plan.kv_per_token, down * dtype.itemsize)
    specs = on_paper(config, dtype, tp_size).cache_spec()
    windows = [spec for spec in specs if isinstance(spec, WindowSpec)]
    state = sum(s.bytes_per_slot(dtype) for s in specs if isinstance(s, RecurrentSpec))
    per_token = sum(2 * spec.head_dim for spec in windows) * dtype.itemsize
    keys = max((spec.keys for spec in windows), default=0)
    return StepBytes(weights, per_token, window=keys, state=state)


def prefill_operations(config: ModelConfig, tokens: int) -> int:
    """Multiplications and additions of a prompt up to its first token, over all ranks.

    Matrices, attention's scores and values; norms, gates' functions and scans are left out. The last
    layer mixes every token and computes the rest for one row alone.
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    layers, vocab = config.num_hidden_layers, config.vocab_size
    if isinstance(config, PersimmonConfig):
        mixers, out = [3 * hidden * hidden] * layers, [hidden * hidden] * layers
        pairs, mlp = [tokens * (tokens + 1) // 2] * layers, 2 * hidden * ffn
    else:
        config = cast(RecurrentGemmaConfig, config)
        width, keys = config.lru_width, cast(int, config.window_keys)
        queries = config.num_attention_heads * config.head_dim
        gates = 2 * width * config.block_width
        recurrent = [kind == "recurrent" for kind in config.layer_types]
        mixers = [
            2 * hidden * width + gates if r else hidden * (queries + 2 * config.head_dim)
            for r in recurrent
        ]
        out = [hidden * (width if r else queries) for r in recurrent]
        full = min(tokens, keys)
        seen = full * (full + 1) // 2 + (tokens - full) * keys
        pairs, mlp = [0 if r else seen for r in recurrent], 3 * hidden * ffn
    heads_width = config.num_attention_heads * config.head_dim
    count = tokens * sum(mixers) + 2 * heads_width * sum(pairs)
    count += tokens * sum(o + mlp for o in out[:-1]) + out[-1] + mlp
    return 2 * (count + hidden * vocab)
