"""The collectives the project uses. Each is the identity at size 1. Knows tensors and groups only."""

import json
from typing import Any

import torch
import torch.distributed as dist

from tprt.distributed.tp_group import TPGroup


def all_reduce(x: torch.Tensor, tp: TPGroup) -> torch.Tensor:
    """Sum over ranks, in place, in the dtype of ``x``; every rank gets the same bits."""
    if tp.size > 1:
        dist.all_reduce(x, group=tp.device_group)
    return x


def all_gather(x: torch.Tensor, tp: TPGroup) -> torch.Tensor:
    """[*shape] of each rank -> [size, *shape] on every rank, ordered by rank."""
    if tp.size == 1:
        return x.unsqueeze(0)
    out = torch.empty((tp.size, *x.shape), dtype=x.dtype, device=x.device)
    dist.all_gather_into_tensor(out, x.contiguous(), group=tp.device_group)
    return out


def broadcast_ints(values: torch.Tensor, tp: TPGroup) -> torch.Tensor:
    """Rank 0's int64 host tensor to all ranks, in place; the shape must already agree."""
    if tp.size > 1:
        dist.broadcast(values, group=tp.cpu_group, group_src=0)
    return values


def broadcast_json(value: Any, tp: TPGroup) -> Any:
    """Rank 0's JSON-able value on every rank; what the others pass is ignored.

    It travels as a length and UTF-8 bytes: no pickle, and no Python object is rebuilt from the wire.
    """
    if tp.size == 1:
        return value
    data = json.dumps(value).encode() if tp.rank == 0 else b""
    length = broadcast_ints(torch.tensor([len(data)]), tp)
    buffer = torch.empty(int(length.item()), dtype=torch.uint8)
    if tp.rank == 0 and data:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if buffer.numel():
        dist.broadcast(buffer, group=tp.cpu_group, group_src=0)
    return json.loads(buffer.numpy().tobytes())


def gather_json(value: Any, tp: TPGroup) -> list[Any]:
    """Every rank's JSON-able value, ordered by rank, on every rank."""
    if tp.size == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(tp.size)]
    dist.all_gather(lengths, torch.tensor([data.numel()]), group=tp.cpu_group)
    longest = max(int(n.item()) for n in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: data.numel()] = data
    rows = [torch.empty(longest, dtype=torch.uint8) for _ in range(tp.size)]
    dist.all_gather(rows, padded, group=tp.cpu_group)
    return [
        json.loads(row[: int(n)].numpy().tobytes()) for row, n in zip(rows, lengths, strict=True)
    ]
