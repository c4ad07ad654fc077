"""What a model takes on each rank, computed from shapes alone: no file is read, no GPU is needed.

Legend: T tokens of the largest step, R rows of the largest step, V ids that have rows and the padding of
their cut, S slots.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from tprt.cache.kv_cache import PagedKVSpec
from tprt.config import EngineConfig, ModelConfig
from tprt.distributed.sharding import shard_spec
from tprt.distributed.tp_group import TPGroup
from tprt.distributed.vocabulary import Vocabulary
from tprt.engine.logprobs import MAX_LOGITS
from tprt.engine.sampler import FULL_ROWS
from tprt.engine.step_record import MAX_BANS, MAX_BUCKET, bucket_of
from tprt.models import CausalLM, get_model_class

# Estimates: these are the parts of a plan that no shape gives. The driver's context; the modules of
# torch's and our kernels with what cuBLAS works in; the channels and buffers of a NCCL communicator.
CONTEXT, MODULES, COMMUNICATOR = 512 * 2**20, 256 * 2**20, 256 * 2**20
# Bytes per logit while FULL_ROWS rows are penalised, sorted, truncated and drawn.
SORTED_LOGIT = 72


@dataclass(frozen=True)
class RankPlan:
    """Bytes of one rank.

    Args:
        weights: parameters as held in memory, vocabulary padding included.
        tables: rotary tables, float32, and ids of the vocabulary's rows, int64.
        read: what the rank needs from the checkpoint, in the dtype of the plan.
        kv_per_token: keys and values of one token over all layers that keep them.
        state_per_slot: what layers keep per sequence, whatever its length.
    """

    rank: int
    parameters: int
    weights: int
    tables: int
    read: int
    kv_per_token: int
    state_per_slot: int = 0


@dataclass(frozen=True)
class RuntimePlan:
    """Bytes of one rank beside weights, tables and KV cache.

    Args:
        state: what slots keep between steps, and the static buffers of decode steps.
        workspace: tensors of the largest step that runs without a graph, logits included.
        graphs: memory pool of all graphs; 0 where there are none.
        copies: weights that are held in two layouts where oneDNN has one of its own; CPU only.
        libraries: kernels' modules and what cuBLAS works in; 0 on a CPU.
        context: what the driver and NCCL take before all else; 0 on a CPU.
    """

    state: int
    workspace: int
    graphs: int
    libraries: int
    context: int
    copies: int = 0

    @property
    def added(self) -> int:
        """All but the context, which is there before anything can be measured."""
        return self.state + self.workspace + self.graphs + self.libraries + self.copies


def plan_runtime(
    config: ModelConfig,
    tp_size: int,
    engine: EngineConfig,
    device_type: str = "cuda",
    vocabulary: Vocabulary | None = None,
) -> RuntimePlan:
    """What steps of ``engine`` take on each of ``tp_size`` ranks; the same on all of them."""
    dtype: torch.dtype = getattr(torch, engine.dtype)
    itemsize = dtype.itemsize
    length = engine.resolve_max_model_len(config)
    part = (vocabulary or Vocabulary(config.vocab_size)).part(tp_size)
    vocab, slots = part * tp_size, engine.max_num_seqs + 1
    graphs = device_type == "cuda" and not engine.enforce_eager
    bucket = bucket_of(min(engine.max_num_seqs, MAX_BUCKET))

    paged = plan_rank(config, 0, tp_size, dtype, length, vocabulary).kv_per_token
    blocks = -(-length // engine.block_size) if paged else 1
    state = 8 * slots * (blocks + 8)  # block tables, and some numbers for each slot
    if device_type == "cuda":
        state += 9 * slots * vocab  # counts, ids seen, bias
    if graphs:
        state += 4 * bucket * part + 8 * (4 * bucket + 2 * MAX_BANS)
    tokens, rows = engine.max_num_batched_tokens, min(slots - 1, engine.max_num_batched_tokens)
    # Scores of prompts are taken in parts of MAX_LOGITS: float32, sorted with their order, float64.
    scores = 24 * min(MAX_LOGITS, tokens * part)
    sparse = engine.sparse_rows != 0
    need = _step_sizes(config, tp_size, dtype, tokens, rows, bucket, length, sparse, vocabulary)
    # One after the other: the layers, and what becomes of their last rows.
    layers = need.activations * itemsize + need.partials
    workspace = max(layers, _sampling(rows, part, tp_size), scores)
    pool = 0
    if graphs:
        pool = need.activations_of_graphs * itemsize + need.partials
        pool += _sampling(bucket, part, tp_size) + 8 * bucket * blocks
    if device_type != "cuda":
        copied = engine.kernels == "auto" and engine.dtype == "bfloat16"
        copies = need.copied * itemsize if copied else 0
        return RuntimePlan(state, workspace, pool, 0, 0, copies)
    context = CONTEXT + (COMMUNICATOR if tp_size > 1 else 0)
    return RuntimePlan(state, workspace, pool, MODULES, context)


class _StepSizes(NamedTuple):
    """Elements, and of partial results bytes; see ``CausalLM``."""

    activations: int
    activations_of_graphs: int
    partials: int
    copied: int


@lru_cache(maxsize=256)
def _step_sizes(
    config: ModelConfig,
    tp_size: int,
    dtype: torch.dtype,
    tokens: int,
    rows: int,
    bucket: int,
    length: int,
    sparse: bool,
    vocabulary: Vocabulary | None,
) -> _StepSizes:
    model = _on_paper(config, 0, tp_size, dtype, length, vocabulary)
    return _StepSizes(
        model.activation_elements(tokens, length),
        model.activation_elements(bucket, 0),
        model.partial_bytes(rows, length),
        model.copied_elements(sparse),
    )


def _sampling(rows: int, part: int, tp_size: int) -> int:
    """Bytes of logits and of their full sampling, rows of which are sorted FULL_ROWS at a time."""
    vocab = part * tp_size
    local = 4 * rows * part  # and, where ranks send them, the gathered rows and those side by side
    whole = 4 * rows * vocab * (3 if tp_size > 1 else 1)
    return local + whole + SORTED_LOGIT * min(rows, FULL_ROWS) * vocab


def plan_ranks(
    config: ModelConfig,
    tp_size: int,
    dtype: torch.dtype,
    max_model_len: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> list[RankPlan]:
    """One ``RankPlan`` per rank. Raises ConfigError when ``tp_size`` does not divide the model."""
    return [
        plan_rank(config, rank, tp_size, dtype, max_model_len, vocabulary)
        for rank in range(tp_size)
    ]


def whole_parameters(config: ModelConfig) -> int:
    """Parameters of the uncut model as it stands on disk."""
    model = _on_paper(config, 0, 1, torch.bfloat16)
    return sum(prod(shard_spec(p).canonical_shape) for p in model.parameters())


def _on_paper(
    config: ModelConfig,
    rank: int,
    size: int,
    dtype: torch.dtype,
    max_len: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> CausalLM:
    """The part of a rank that only exists on paper: shapes without memory."""
    tp = TPGroup(rank, size, torch.device("meta"))
    return get_model_class(config.model_type)(config, tp, dtype, max_len, vocabulary)


@lru_cache(maxsize=64)
def plan_rank(
    config: ModelConfig,
    rank: int,
    size: int,
    dtype: torch.dtype,
    max_len: int | None,
    vocabulary: Vocabulary | None = None,
) -> RankPlan:
    """Rank ``rank`` of ``size``; ``max_len`` positions in the rotary table, None for the model's own."""
    model = _on_paper(config, rank, size, dtype, max_len, vocabulary)
    parameters, specs = sum(p.numel() for p in model.parameters()), model.cache_spec()
    # One rotary table serves every layer; buffers() yields it once.
    tables = sum(b.numel() * b.element_size() for b in model.buffers())
    return RankPlan(
        rank=rank,
        parameters=parameters,
        weights=parameters * dtype.itemsize,
        tables=tables,
        read=sum(shard_spec(p).needed_bytes(dtype.itemsize) for p in model.parameters()),
        kv_per_token=sum(s.bytes_per_token(dtype) for s in specs if isinstance(s, PagedKVSpec)),
        state_per_slot=sum(
            s.bytes_per_slot(dtype) for s in specs if not isinstance(s, PagedKVSpec)
        ),
    )
