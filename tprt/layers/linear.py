"""Linear layers cut over ranks. They take sizes and a ``TPGroup``, never a model's config."""

import torch
from torch import nn

from tprt import kernels
from tprt.distributed.communication import all_reduce
from tprt.distributed.sharding import ShardSpec, cut, replicated
from tprt.distributed.tp_group import TPGroup


def sharded_parameter(spec: ShardSpec, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter of ``spec``'s local shape that carries the spec."""
    data = torch.empty(spec.parameter_shape, dtype=dtype, device=device)
    parameter = nn.Parameter(data, requires_grad=False)
    parameter.shard_spec = spec  # type: ignore[attr-defined]
    return parameter


class ParallelLinear(nn.Module):
    """What column- and row-parallel layers share: a matrix that can be laid out for its kernel."""

    weight: torch.Tensor

    def finish_loading(self) -> None:
        """Lay the weight out as this device reads it fastest. It is no parameter any more."""
        packed = kernels.pack_weight(self.weight)
        if packed is not self.weight:
            del self.weight
            self.weight = packed


class ColumnParallelLinear(ParallelLinear):
    """y = x W^T + b with the output features cut over ranks.

    Args:
        in_features, out_features: of the whole layer; weight on disk is [out_features, in_features].
    """

    def __init__(
        self, in_features: int, out_features: int, tp: TPGroup, dtype: torch.dtype
    ) -> None:
        super().__init__()
        weight = cut((out_features, in_features), 0, tp.rank, tp.size)
        bias = cut((out_features,), 0, tp.rank, tp.size)
        self.weight = sharded_parameter(weight, dtype, tp.device)
        self.bias = sharded_parameter(bias, dtype, tp.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features] -> [T, out_features / size]."""
        return kernels.linear(x, self.weight, self.bias)


class RowParallelLinear(ParallelLinear):
    """y = x W^T + b with the input features cut over ranks; the bias enters once, after the sum."""

    def __init__(
        self, in_features: int, out_features: int, tp: TPGroup, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.tp = tp
        weight = cut((out_features, in_features), 1, tp.rank, tp.size)
        self.weight = sharded_parameter(weight, dtype, tp.device)
        self.bias = sharded_parameter(replicated((out_features,)), dtype, tp.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features / size] -> [T, out_features], the same on every rank."""
        if self.tp.size == 1:
            return kernels.linear(x, self.weight, self.bias)
        partial = kernels.linear(x, self.weight)
        return all_reduce(partial, self.tp) + self.bias
