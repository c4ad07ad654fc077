"""Linear layers cut over ranks. They take sizes and a ``TPGroup``, never a model's config."""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from tprt.distributed.communication import all_reduce, one_shot_for
from tprt.distributed.sharding import ShardSpec, cut, divide, padded_cut, replicated
from tprt.distributed.tp_group import TPGroup
from tprt.kernels import Activations as Activations
from tprt.kernels import Norm, SparseWeight, kernels_for


def sharded_parameter(spec: ShardSpec, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter of ``spec``'s local shape that carries the spec."""
    data = torch.empty(spec.parameter_shape, dtype=dtype, device=device)
    parameter = nn.Parameter(data, requires_grad=False)
    parameter.shard_spec = spec  # type: ignore[attr-defined]
    return parameter


class ParallelLinear(nn.Module):
    """What column- and row-parallel layers share: a matrix that can be laid out for its kernel."""

    weight: torch.Tensor

    def __init__(self, tp: TPGroup) -> None:
        super().__init__()
        self.tp, self.kernels = tp, kernels_for(tp.device)

    def finish_loading(self) -> None:
        """Lay the weight out as this device reads it fastest. It is no parameter any more."""
        packed = self.kernels.pack_weight(self.weight)
        if packed is not self.weight:
            del self.weight
            self.weight = packed


class ColumnParallelLinear(ParallelLinear):
    """y = x W^T + b with the output features cut over ranks.

    Args:
        in_features, out_features: of the whole layer; weight on disk is [out_features, in_features].
        activation: what y goes through; in float16 the square is taken in float32 and capped.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: TPGroup,
        dtype: torch.dtype,
        activation: Literal["squared_relu"] | None = None,
    ) -> None:
        super().__init__(tp)
        kernels = self.kernels
        self.linear = kernels.linear if activation is None else kernels.linear_squared_relu
        weight = cut((out_features, in_features), 0, tp.rank, tp.size)
        bias = cut((out_features,), 0, tp.rank, tp.size)
        self.weight = sharded_parameter(weight, dtype, tp.device)
        self.bias = sharded_parameter(bias, dtype, tp.device)

    def forward(self, x: Activations) -> torch.Tensor:
        """[T, in_features] -> [T, out_features / size]."""
        return self.linear(x, self.weight, self.bias)


class ColumnShard(nn.Module):
    """Weight, and perhaps bias, of output features that ``MergedColumnParallelLinear`` computes.

    Args:
        in_features, out_features: of the whole model; weight on disk is [out_features, in_features].
        part: output features of this rank, those past the end of the whole being zeros; None is an
            equal cut. Of the whole where ``replicate``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: TPGroup,
        dtype: torch.dtype,
        *,
        part: int | None = None,
        bias: bool = True,
        replicate: bool = False,
    ) -> None:
        super().__init__()

        def parameter(shape: tuple[int, ...]) -> nn.Parameter:
            if replicate:
                return sharded_parameter(replicated(shape), dtype, tp.device)
            rows = divide(shape[0], tp.size, "output features") if part is None else part
            return sharded_parameter(padded_cut(shape, 0, tp.rank, rows), dtype, tp.device)

        self.weight = parameter((out_features, in_features))
        self.bias = parameter((out_features,)) if bias else None


class MergedColumnParallelLinear(ParallelLinear):
    """Several column-parallel layers of one input as one product; parameters are those of ``shards``.

    Args:
        shards: in the order of their results; all with a bias or all without.
        activation: "gelu_gate" for gelu of the first half times the second, else None.
    """

    def __init__(
        self,
        shards: tuple[ColumnShard, ...],
        tp: TPGroup,
        activation: Literal["gelu_gate"] | None = None,
    ) -> None:
        super().__init__(tp)
        # In a tuple: attributes of their own would give the parameters a second name.
        self.shards, self.gated = shards, activation == "gelu_gate"
        self.merged: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def finish_loading(self) -> None:
        """Put the matrices one below the other; the shards give theirs up."""
        weight, bias = self._merge()
        for shard in self.shards:
            del shard.weight, shard.bias
        self.merged = self.kernels.pack_weight(weight), bias

    def _merge(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        biases = [shard.bias for shard in self.shards if shard.bias is not None]
        weight = torch.cat(tuple(shard.weight for shard in self.shards))
        return weight, torch.cat(tuple(biases)) if biases else None

    def forward(self, x: Activations) -> torch.Tensor:
        """[T, in_features] -> [T, all output features of this rank], half of them where gated."""
        weight, bias = self.merged or self._merge()
        if self.gated:
            assert bias is not None
            return self.kernels.linear_gelu_gate(x, weight, bias)
        return self.kernels.linear(x, weight, bias)


class RowParallelLinear(ParallelLinear):
    """y = x W^T + b with the input features cut over ranks; the bias enters once, after the sum.

    Args:
        in_features, out_features: of the whole layer; weight on disk is [out_features, in_features].
        sparse_input: x is mostly exactly 0, as squared ReLU leaves it. The weight is then held as
            [in_features / size, out_features], and few rows of x read only what meets something else.
        part: input features of this rank, those past the end of the whole being zeros; None is an equal
            cut.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: TPGroup,
        dtype: torch.dtype,
        sparse_input: bool = False,
        part: int | None = None,
    ) -> None:
        super().__init__(tp)
        part = divide(in_features, tp.size, "input features") if part is None else part
        weight = padded_cut((out_features, in_features), 1, tp.rank, part)
        weight = replace(weight, transposed=sparse_input)
        self.weight = sharded_parameter(weight, dtype, tp.device)
        self.bias = sharded_parameter(replicated((out_features,)), dtype, tp.device)
        self.sparse = SparseWeight(self.weight, None) if sparse_input else None

    def finish_loading(self) -> None:
        """As ``ParallelLinear``; what is read row by row stays a parameter, and what is not goes."""
        if self.sparse is None:
            return super().finish_loading()
        # 0 times inf would not be 0, but the loader lets only finite values in.
        self.sparse = self.kernels.pack_sparse(self.weight)
        if self.sparse.rows is not self.weight:
            del self.weight
            self.weight = self.sparse.rows

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, Activations]:
        """[T, in_features / size] -> ``residual`` + y and its LayerNorm, on every rank.

        Args:
            residual: what y is added to, [T, out_features].
            norm: of the layer that comes next: it belongs to the same kernel, or to the next one.
        """
        kernels, bias, sparse = self.kernels, self.bias, self.sparse
        if self.tp.size == 1:
            if sparse is not None:
                return kernels.sparse_linear_add_layer_norm(x, sparse, bias, residual, norm)
            return kernels.linear_add_layer_norm(x, self.weight, bias, residual, norm)
        if sparse is not None:
            partial = kernels.sparse_linear(x, sparse)
        else:
            partial = kernels.linear(x, self.weight)
        fused = one_shot_for(partial, self.tp) if norm.bias is not None else None
        if fused is not None:
            return fused.all_reduce_add_layer_norm(partial, bias, residual, norm)
        return kernels.add_layer_norm(all_reduce(partial, self.tp), bias, residual, norm)
