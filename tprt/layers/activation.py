"""Activations."""

import torch
from torch import nn

from tprt import kernels


class SquaredReLU(nn.Module):
    """relu(x)^2; in float16 squared in float32 and capped at the largest float16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape -> the same shape and dtype."""
        return kernels.squared_relu(x)
