"""LayerNorm and RMSNorm over the hidden size, LayerNorm over the width of each head."""

import torch
from torch import nn

from tprt.distributed.sharding import broadcast_rows, cut, replicated
from tprt.distributed.tp_group import TPGroup
from tprt.kernels import Norm as Norm
from tprt.kernels import kernels_for, prepare_rms
from tprt.layers.linear import sharded_parameter


class LayerNorm(nn.Module):
    """Mean-subtracting LayerNorm with weight and bias, the same on every rank."""

    def __init__(self, hidden_size: int, eps: float, tp: TPGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.kernels = eps, kernels_for(tp.device)
        self.weight = sharded_parameter(replicated((hidden_size,)), dtype, tp.device)
        self.bias = sharded_parameter(replicated((hidden_size,)), dtype, tp.device)

    @property
    def norm(self) -> Norm:
        """For the operations that end in a LayerNorm."""
        return Norm(self.weight, self.bias, self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> the same shape and dtype."""
        return self.kernels.layer_norm(x, self.norm)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + weight), in float32, the same on every rank."""

    def __init__(self, hidden_size: int, eps: float, tp: TPGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.kernels = eps, kernels_for(tp.device)
        self.weight = sharded_parameter(replicated((hidden_size,)), dtype, tp.device)
        self.finished: Norm | None = None

    def finish_loading(self) -> None:
        weight = self.weight.detach()
        self.finished = Norm(weight, None, self.eps, prepare_rms(weight, self.eps))

    @property
    def norm(self) -> Norm:
        """For the operations that end in a norm."""
        return self.finished or Norm(self.weight, None, self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> the same shape and dtype."""
        return self.kernels.layer_norm(x, self.norm)


class HeadLayerNorm(nn.Module):
    """Weight and bias of a LayerNorm over the width of one head.

    Held per local head whatever the checkpoint shares; ``Attention`` applies it.

    Args:
        num_heads: of the whole model.
        per_head: on disk each head has a pair of its own, [num_heads, head_dim]; else one pair
            [head_dim] serves all heads.
    """

    def __init__(
        self, num_heads: int, head_dim: int, tp: TPGroup, dtype: torch.dtype, per_head: bool
    ) -> None:
        super().__init__()
        if per_head:
            spec = cut((num_heads, head_dim), 0, tp.rank, tp.size)
        else:
            spec = broadcast_rows(num_heads // tp.size, (head_dim,))
        self.weight = sharded_parameter(spec, dtype, tp.device)
        self.bias = sharded_parameter(spec, dtype, tp.device)
