"""The operations layers call. Each has one signature; which body serves it is decided here.

``reference`` is plain torch, for any device, and the oracle of the others; ``cpu`` is what CPUs run.
"""

import torch
import torch.nn.functional as F

from tprt.kernels import cpu
from tprt.kernels.attention import AttentionPlan, AttentionPlanner, attention_planner
from tprt.kernels.reference import layer_norm, qk_norm_rotary, squared_relu, store_kv

__all__ = [
    "AttentionPlan",
    "AttentionPlanner",
    "attention_planner",
    "layer_norm",
    "linear",
    "linear_add",
    "linear_squared_relu",
    "pack_weight",
    "qk_norm_rotary",
    "squared_relu",
    "store_kv",
]


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """A matrix [out_features, in_features] as ``linear`` reads it fastest here; itself, or a copy."""
    return cpu.pack(weight) if cpu.can_pack(weight) else weight


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, [T, in_features] -> [T, out_features]; ``weight`` plain or from ``pack_weight``."""
    if weight.is_mkldnn:
        return cpu.packed_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_squared_relu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``squared_relu`` of ``linear``."""
    if weight.is_mkldnn:
        return cpu.packed_linear_squared_relu(x, weight, bias)
    return squared_relu(F.linear(x, weight, bias))


def linear_add(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """``residual`` [T, out_features] + ``linear``; where it is one operation, rounded once."""
    if weight.is_mkldnn:
        return cpu.packed_linear_add(x, weight, bias, residual)
    return residual + F.linear(x, weight, bias)
