"""``TritonKernels``: every operation of ``interface.Kernels``, from the kernels beside this file."""

import torch
import triton

from tprt.batch import Segments
from tprt.errors import ConfigError
from tprt.kernels.interface import (
    Activations,
    AttentionPlan,
    HeadNorms,
    Noise,
    Norm,
    PendingNorm,
    SparseWeight,
    Tensors,
)
from tprt.kernels.recurrence import RecurrenceWeights
from tprt.kernels.triton_ops import head, linear, rotary, sparse_linear, tiles
from tprt.kernels.triton_ops.attention import TritonAttention, TritonAttentionPlan
from tprt.kernels.triton_ops.gate import gelu_gate
from tprt.kernels.triton_ops.norm import add_layer_norm, layer_norm
from tprt.kernels.triton_ops.recurrence import recurrence
from tprt.kernels.triton_ops.window import window_attend


class TritonKernels:
    """See ``interface.Kernels``.

    Args:
        device: a GPU, or the CPU under TRITON_INTERPRET=1.
        sparse_rows: as in ``Kernels``, 16 at most; None takes what the device's table says.
        fused: one kernel for several operations where there is one, of the same results.

    Raises:
        ConfigError: it is a CPU and Triton does not interpret; or the table of tiles is damaged.
    """

    name = "triton"

    def __init__(
        self, device: torch.device, sparse_rows: int | None = None, fused: bool = True
    ) -> None:
        if device.type == "cpu" and not triton.knobs.runtime.interpret:
            raise ConfigError(
                "Triton compiles no kernels for a CPU",
                hint="engine.kernels=auto; TRITON_INTERPRET=1 interprets them, slowly, for tests",
            )
        self.device = device
        self.tiles = tiles.load(device)
        self.sparse_rows, self.fused = sparse_rows, fused
        # At one address from the beginning: graphs hold it.
        self._counters = sparse_linear.make_counters(device)

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

    def normed(self, x: Activations) -> torch.Tensor:
        return layer_norm(*x) if isinstance(x, PendingNorm) else x

    def linear(
        self, x: Activations, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return linear.linear(x, weight, bias, self.tiles)

    def linear_squared_relu(
        self, x: Activations, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        return linear.linear_squared_relu(x, weight, bias, self.tiles)

    def linear_gelu_gate(
        self, x: Activations, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        return gelu_gate(self.linear(x, weight, bias))

    def linear_add_layer_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor,
        norm: Norm,
    ) -> tuple[torch.Tensor, Activations]:
        if self.fused and norm.bias is not None:  # the product that reads it knows LayerNorm alone
            total = linear.linear_add(x, weight, bias, residual, self.tiles)
            if total is not None:
                return total, PendingNorm(total, norm)
        return add_layer_norm(linear.linear_unrounded(x, weight, self.tiles), bias, residual, norm)

    def pack_sparse(self, rows: torch.Tensor) -> SparseWeight:
        """No copy: skipping or not, the rows themselves are streamed, and cuBLAS reads any layout."""
        return SparseWeight(rows, None)

    def sparse_linear(self, x: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
        skip = self._skips(x, weight)
        if skip is None:
            return x @ weight.rows
        return sparse_linear.product(x, weight.rows, self._counters, skip)

    def sparse_linear_add_layer_norm(
        self,
        x: torch.Tensor,
        weight: SparseWeight,
        bias: torch.Tensor,
        residual: torch.Tensor,
        norm: Norm,
    ) -> tuple[torch.Tensor, Activations]:
        skip = self._skips(x, weight)
        if skip is None:
            return add_layer_norm(x @ weight.rows, bias, residual, norm)
        arguments = x, weight.rows, self._counters, skip
        if self.fused:
            total = sparse_linear.product(*arguments, bias, residual)
            return total, PendingNorm(total, norm)
        y = sparse_linear.product(*arguments, dtype=torch.float32)
        return add_layer_norm(y, bias, residual, norm)

    def _skips(self, x: torch.Tensor, weight: SparseWeight) -> bool | None:
        rows = self.tiles.sparse_rows if self.sparse_rows is None else self.sparse_rows
        return sparse_linear.skips(len(x), weight.rows, rows)

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

    def attend(
        self,
        qkv: torch.Tensor,
        norms: HeadNorms | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        plan: AttentionPlan,
        scale: float,
    ) -> torch.Tensor:
        if self.fused and isinstance(plan, TritonAttentionPlan) and plan.fuses:
            return plan.fused(qkv, norms, cos, sin, kv_cache, slot_mapping, scale)
        q = self.qk_norm_rotary_store(qkv, norms, cos, sin, kv_cache, slot_mapping)
        return plan(q, kv_cache, scale)

    def pack_recurrence(self, weights: RecurrenceWeights) -> RecurrenceWeights:
        return weights

    def recurrence(
        self,
        xy: torch.Tensor,
        weights: RecurrenceWeights,
        state: torch.Tensor,
        conv: torch.Tensor,
        segments: Segments,
    ) -> torch.Tensor:
        return recurrence(xy, weights, state, conv, segments)

    def window_attend(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv: torch.Tensor,
        segments: Segments,
        keys: int,
        scale: float,
    ) -> torch.Tensor:
        return window_attend(qkv, cos, sin, kv, segments, keys, scale)

    def logits(
        self, x: torch.Tensor, weight: torch.Tensor, soft_cap: float | None = None
    ) -> torch.Tensor:
        logits = linear.logits(x, weight, self.tiles)
        return logits if soft_cap is None else logits.div_(soft_cap).tanh_().mul_(soft_cap)

    def linear_argmax(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        noise: Noise,
        ids: torch.Tensor,
        num_valid: int,
        soft_cap: float | None = None,
    ) -> Tensors:
        if soft_cap is not None:
            return self.argmax(self.logits(x, weight, soft_cap), noise, ids, num_valid)
        return head.linear_argmax(x, weight, noise, ids, num_valid)

    def argmax(
        self, logits: torch.Tensor, noise: Noise, ids: torch.Tensor, num_valid: int
    ) -> Tensors:
        return head.argmax(logits, noise, ids, num_valid)

    def attention(
        self, block_size: int, num_heads: int, head_dim: int, dtype: torch.dtype
    ) -> TritonAttention:
        return TritonAttention(block_size, num_heads, head_dim, dtype, self.device)
