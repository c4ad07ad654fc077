"""Rotary position embedding of part of a head: the angles of a pass, once for all layers.

From tables, in the two precisions Persimmon is run in, or computed for any position. Kernels turn by
them.
"""

from typing import Literal

import torch
from torch import nn


class RotaryAngles(nn.Module):
    """As ``RotaryEmbedding`` in float32, for positions without an end: computed anew for each pass."""

    inverse: torch.Tensor
    sign: torch.Tensor

    def __init__(self, rotary_dim: int, theta: float, device: torch.device) -> None:
        super().__init__()
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
        inverse = 1.0 / (theta ** (exponents / rotary_dim))
        sign = torch.ones_like(inverse)
        # Both halves of a pair, and the sign of its sum.
        self.register_buffer("inverse", torch.cat([inverse, inverse]), persistent=False)
        self.register_buffer("sign", torch.cat([-sign, sign]), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [T] -> cos and sin, float32 [T, 1, rotary_dim] each."""
        angles = (positions.unsqueeze(1) * self.inverse).unsqueeze(1)
        return angles.cos(), angles.sin().mul_(self.sign)


class RotaryEmbedding(nn.Module):
    """Turns the first ``rotary_dim`` dimensions of q and k by position * theta^(-2i / rotary_dim).

    ``fp32`` is Hugging Face's table. ``bf16`` is that of Adept's inference code, which keeps position,
    frequency and their product in bfloat16 and so gives neighbouring positions past 256 one angle.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        rotary_dim: int,
        max_positions: int,
        theta: float,
        precision: Literal["bf16", "fp32"],
        device: torch.device,
    ) -> None:
        super().__init__()
        if device.type == "meta":
            # A plan wants the sizes; computing them there would import torch's compiler.
            table = torch.empty(max_positions, rotary_dim, device=device)
            self.register_buffer("cos", table, persistent=False)
            self.register_buffer("sin", table.clone(), persistent=False)
            return
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
        inv_freq = 1.0 / (theta ** (exponents / rotary_dim))
        positions = torch.arange(max_positions, dtype=torch.float32, device=device)
        if precision == "bf16":
            inv_freq, positions = inv_freq.bfloat16(), positions.bfloat16()
        angles = positions.unsqueeze(1) * inv_freq  # [max_positions, rotary_dim / 2]
        cos, sin = angles.cos().float(), angles.sin().float()
        # Both halves of a pair, with the sign of the sum: a pass then only looks them up.
        self.register_buffer("cos", torch.cat([cos, cos], dim=1), persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], dim=1), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [T] -> cos and sin, float32 [T, 1, 1, rotary_dim] each.

        Dimension i becomes x[i] cos[i] + x[i +- rotary_dim / 2] sin[i].
        """
        return self.cos[positions][:, None, None], self.sin[positions][:, None, None]
