"""What a model takes on each rank, computed from shapes alone: no file is read, no GPU is needed."""

from dataclasses import dataclass
from math import prod

import torch

from tprt.config import PersimmonConfig
from tprt.distributed.sharding import shard_spec
from tprt.distributed.tp_group import TPGroup
from tprt.models import get_model_class


@dataclass(frozen=True)
class RankPlan:
    """Bytes of one rank.

    Args:
        weights: parameters as held in memory, vocabulary padding included.
        tables: rotary tables, float32.
        read: what the rank needs from the checkpoint, in the dtype of the plan.
        kv_per_token: keys and values of one token over all layers.
    """

    rank: int
    parameters: int
    weights: int
    tables: int
    read: int
    kv_per_token: int


def plan_ranks(
    config: PersimmonConfig, tp_size: int, dtype: torch.dtype, max_model_len: int | None = None
) -> list[RankPlan]:
    """One ``RankPlan`` per rank. Raises ConfigError when ``tp_size`` does not divide the model."""
    return [_plan(config, rank, tp_size, dtype, max_model_len) for rank in range(tp_size)]


def whole_parameters(config: PersimmonConfig) -> int:
    """Parameters of the uncut model as it stands on disk."""
    meta = TPGroup(device=torch.device("meta"))
    model = get_model_class(config.model_type)(config, meta, torch.bfloat16)
    return sum(prod(shard_spec(p).canonical_shape) for p in model.parameters())


def _plan(
    config: PersimmonConfig, rank: int, size: int, dtype: torch.dtype, max_len: int | None
) -> RankPlan:
    tp = TPGroup(rank, size, torch.device("meta"))
    model = get_model_class(config.model_type)(config, tp, dtype, "fp32", max_len)
    parameters = sum(p.numel() for p in model.parameters())
    # One rotary table serves every layer; buffers() yields it once.
    tables = sum(b.numel() * b.element_size() for b in model.buffers())
    return RankPlan(
        rank=rank,
        parameters=parameters,
        weights=parameters * dtype.itemsize,
        tables=tables,
        read=sum(shard_spec(p).needed_bytes(dtype.itemsize) for p in model.parameters()),
        kv_per_token=sum(spec.bytes_per_token(dtype) for spec in model.cache_spec()),
    )
