"""Rotary position embedding of part of a head, in the two precisions Persimmon is run in."""

from typing import Literal

import torch
from torch import nn

from tprt import kernels


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
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
        inv_freq = 1.0 / (theta ** (exponents / rotary_dim))
        positions = torch.arange(max_positions, dtype=torch.float32, device=device)
        if precision == "bf16":
            inv_freq, positions = inv_freq.bfloat16(), positions.bfloat16()
        angles = positions.unsqueeze(1) * inv_freq  # [max_positions, rotary_dim / 2]
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k [T, heads, head_dim] at int64 positions [T]."""
        cos, sin = self.cos[positions], self.sin[positions]
        return kernels.rotary(q, cos, sin), kernels.rotary(k, cos, sin)
