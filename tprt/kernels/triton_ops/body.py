"""``TritonKernels``: every operation of ``interface.Kernels``, from the kernels beside this file."""

import torch
import triton

from tprt.errors import ConfigError
from tprt.kernels.interface import HeadNorms, Noise, Norm, Tensors
from tprt.kernels.triton_ops import head, linear, rotary, tiles
from tprt.kernels.triton_ops.attention import TritonAttention
from tprt.kernels.triton_ops.norm import add_layer_norm, layer_norm


class TritonKernels:
    """See ``interface.Kernels``.

    Args:
        device: a GPU, or the CPU under TRITON_INTERPRET=1.

    Raises:
        ConfigError: it is a CPU and Triton does not interpret; or the table of tiles is damaged.
    """

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        if device.type == "cpu" and not triton.knobs.runtime.interpret:
            raise ConfigError(
                "Triton compiles no kernels for a CPU",
                hint="engine.kernels=auto; TRITON_INTERPRET=1 interprets them, slowly, for tests",
            )
        self.device = device
        self.tiles = tiles.load(device)

    def pack_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Itself: rows as they are stored are what the products stream."""
        return weight

    def layer_norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return layer_norm(x, norm)

    def add_layer_norm(
        self, x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, norm: Norm
    ) -> Tensors:
        """``x`` may also be a stack of partial sums, float32 [P, T, width]."""
        return add_layer_norm(x, bias, residual, norm)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return linear.linear(x, weight, bias, self.tiles)

    def linear_squared_relu(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        return linear.linear_squared_relu(x, weight, bias, self.tiles)

    def linear_add_layer_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor,
        norm: Norm,
    ) -> Tensors:
        return add_layer_norm(linear.linear_unrounded(x, weight, self.tiles), bias, residual, norm)

    def qk_norm_rotary_store(
        self,
        qkv: torch.Tensor,
        norms: HeadNorms | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        return rotary.qk_norm_rotary_store(qkv, norms, cos, sin, kv_cache, slot_mapping)

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear.logits(x, weight, self.tiles)

    def linear_argmax(
        self, x: torch.Tensor, weight: torch.Tensor, noise: Noise, first_id: int, num_valid: int
    ) -> Tensors:
        return head.linear_argmax(x, weight, noise, first_id, num_valid)

    def argmax(self, logits: torch.Tensor, noise: Noise, first_id: int, num_valid: int) -> Tensors:
        return head.argmax(logits, noise, first_id, num_valid)

    def attention(
        self, block_size: int, num_heads: int, head_dim: int, dtype: torch.dtype
    ) -> TritonAttention:
        return TritonAttention(block_size, num_heads, head_dim, dtype, self.device)
