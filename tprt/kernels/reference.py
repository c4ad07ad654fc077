"""Plain-torch bodies of every operation: they run on the CPU and any GPU, and are the oracle.

Legend: T tokens, B sequences, H heads of this rank, D head width, r rotary width, L cached length.
Knows tensors only: no ranks, no models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tprt.batch import Segments
from tprt.kernels.interface import (
    Activations,
    AttentionPlan,
    AttentionPlanner,
    HeadNorms,
    Noise,
    Norm,
    PendingNorm,
    SparseWeight,
    Tensors,
)
from tprt.kernels.noise import gumbel, token_table
from tprt.kernels.recurrence import RecurrenceWeights, recurrence, scan_by_step
from tprt.kernels.window import GATHERED, window_attention

FP16_MAX = 65504.0
NEG_INF = float("-inf")


class ReferenceKernels:
    """See ``interface.Kernels``."""

    name = "reference"
    sparse_rows: int | None = 0
    window_decode = GATHERED

    def pack_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def layer_norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        if norm.bias is None:
            return rms_norm(x, norm)
        return torch.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)

    def add_layer_norm(
        self, x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, norm: Norm
    ) -> Tensors:
        total = residual + (x + bias).to(residual.dtype)
        return total, self.layer_norm(total, norm)

    def normed(self, x: Activations) -> torch.Tensor:
        return self.layer_norm(*x) if isinstance(x, PendingNorm) else x

    def linear(
        self, x: Activations, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.linear(self.normed(x), weight, bias)

    def linear_squared_relu(
        self, x: Activations, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        return squared_relu(self.linear(x, weight, bias))

    def linear_gelu_gate(
        self, x: Activations, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        gate, up = self.linear(x, weight, bias).chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up

    def linear_add_layer_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor,
        norm: Norm,
    ) -> Tensors:
        total = residual + self.linear(x, weight, bias)
        return total, self.layer_norm(total, norm)

    def pack_sparse(self, rows: torch.Tensor) -> SparseWeight:
        return SparseWeight(rows, None)

    def sparse_linear(self, x: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
        return x @ weight.rows

    def sparse_linear_add_layer_norm(
        self,
        x: torch.Tensor,
        weight: SparseWeight,
        bias: torch.Tensor,
        residual: torch.Tensor,
        norm: Norm,
    ) -> Tensors:
        return self.add_layer_norm(self.sparse_linear(x, weight), bias, residual, norm)

    def qk_norm_rotary_store(
        self,
        qkv: torch.Tensor,
        norms: HeadNorms | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        qk = qk_norm_rotary(qkv[:, :, :2], norms, cos, sin)
        store_kv(qk[:, :, 1], qkv[:, :, 2], kv_cache, slot_mapping)
        return qk[:, :, 0]

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
        return recurrence(xy, weights, state, conv, segments, scan_by_step)

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
        rotated = rotate(qkv[:, :-1], cos, sin)
        q, k, v = rotated[:, :-1], rotated[:, -1], qkv[:, -1]
        return window_attention(q, k, v, kv, segments, keys, scale, self.window_decode)

    def logits(
        self, x: torch.Tensor, weight: torch.Tensor, soft_cap: float | None = None
    ) -> torch.Tensor:
        logits = self.linear(x, weight).float()
        return logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap

    def linear_argmax(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        noise: Noise,
        ids: torch.Tensor,
        num_valid: int,
        soft_cap: float | None = None,
    ) -> Tensors:
        return self.argmax(self.logits(x, weight, soft_cap), noise, ids, num_valid)

    def argmax(
        self, logits: torch.Tensor, noise: Noise, ids: torch.Tensor, num_valid: int
    ) -> Tensors:
        scores = logits
        if not noise.all_greedy:
            drawn = gumbel(noise.keys, noise.positions, token_table(ids))
            drawn = drawn.masked_fill(noise.greedy.unsqueeze(1), 0.0)
            scores = logits / noise.temperature.unsqueeze(1) + drawn
        if num_valid < logits.shape[1]:
            outside = torch.arange(logits.shape[1], device=logits.device) >= num_valid
            scores = scores.masked_fill(outside, NEG_INF)
        best, index = scores.max(dim=1)
        return best, ids.index_select(0, index)

    def attention(
        self, block_size: int, num_heads: int, head_dim: int, dtype: torch.dtype
    ) -> AttentionPlanner:
        return ReferenceAttention()


def qk_norm_rotary(
    qk_THQD: torch.Tensor, norms: HeadNorms | None, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """LayerNorm of each head's query and key, then rotation of the first r of D dimensions.

    [T, H, 2, D] -> the same shape and dtype, a new tensor; the rest as in ``qk_norm_rotary_store``.
    """
    if norms is None:
        return rotate(qk_THQD, cos, sin)
    x = torch.layer_norm(qk_THQD.float(), (qk_THQD.shape[-1],), None, None, norms.eps)
    return rotate(torch.addcmul(norms.bias, x, norms.weight), cos, sin).to(qk_THQD.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The first r dimensions turned, in float32; a new tensor of the same shape and dtype."""
    turned, rotary_dim = x.float(), cos.shape[-1]
    if turned is x:
        turned = x.clone()
    turning = turned[..., :rotary_dim]
    other_half = turning.roll(rotary_dim // 2, -1)
    turning.mul_(cos).addcmul_(other_half, sin)
    return turned.to(x.dtype)


def rms_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """In float32 up to the result: 1 + weight would lose bits in a narrower dtype."""
    scale, least = norm.prepared or prepare_rms(norm.weight, norm.eps)
    y = x.float()
    y = y.clone() if y is x else y
    # In place: torch.rms_norm is twice as many operations on a CPU, each with a new tensor.
    length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    return y.div_(length.hypot_(least)).mul_(scale).to(x.dtype)


def prepare_rms(weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 s [width] and e: x / sqrt(mean(x^2) + eps) * (1 + weight) is x / hypot(|x|, e) * s."""
    width = len(weight)
    least = torch.full((), (width * eps) ** 0.5, dtype=torch.float32, device=weight.device)
    return (1 + weight.float()) * width**0.5, least


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2. In float16 the square is taken in float32 and capped: 256^2 is past its range."""
    if x.dtype == torch.float16:
        return x.float().relu().square().clamp(max=FP16_MAX).to(torch.float16)
    return x.relu().square()


def store_kv(
    k_THD: torch.Tensor, v_THD: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write each token's key and value; ``slot_mapping`` is [2, T] as in ``ForwardBatch``."""
    rows = kv_cache.view(-1, *kv_cache.shape[-2:])
    rows.index_copy_(0, slot_mapping[0], k_THD)
    rows.index_copy_(0, slot_mapping[1], v_THD)


def paged_attention(
    q_THD: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """Causal attention of each sequence's new tokens over its cached ones and themselves.

    The new keys and values are already in the cache [blocks, 2, block_size, H, D]. ``block_tables`` is
    [B, N]; sequence i has ``context_lens[i]`` older tokens and ``query_lens[i]`` new ones. Returns
    [T, H, D].
    """
    block_size, out, start = kv_cache.shape[2], torch.empty_like(q_THD), 0
    for i, (new, old) in enumerate(zip(query_lens, context_lens, strict=True)):
        length = new + old
        blocks = block_tables[i, : -(-length // block_size)]
        k, v = gather_kv(kv_cache, blocks, length)
        q = q_THD[start : start + new].transpose(0, 1)
        mask = causal_mask(new, old, q.device)
        ctx = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)
        out[start : start + new] = ctx[0].transpose(0, 1)
        start += new
    return out


def gather_kv(
    kv_cache: torch.Tensor, blocks: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one sequence, [H, length, D] each."""
    k, v = kv_cache[blocks].unbind(1)  # [blocks, block_size, H, D]
    return k.flatten(0, 1)[:length].transpose(0, 1), v.flatten(0, 1)[:length].transpose(0, 1)


def causal_mask(new: int, old: int, device: torch.device) -> torch.Tensor:
    """bool [new, old + new]: which positions each new token attends to."""
    rows = torch.arange(old, old + new, device=device).unsqueeze(1)
    return torch.arange(old + new, device=device) <= rows


@dataclass(frozen=True)
class ReferencePlan:
    block_tables: torch.Tensor
    query_lens: Sequence[int]
    context_lens: Sequence[int]

    def __call__(self, q_THD: torch.Tensor, kv_cache: torch.Tensor, scale: float) -> torch.Tensor:
        return paged_attention(
            q_THD, kv_cache, self.block_tables, self.query_lens, self.context_lens, scale
        )


@dataclass(frozen=True)
class ReferenceDecodePlan:
    block_tables: torch.Tensor
    lengths: torch.Tensor

    def __call__(self, q_THD: torch.Tensor, kv_cache: torch.Tensor, scale: float) -> torch.Tensor:
        # Padded to the longest table, since lengths are not to be read here. What lies past an end may
        # be NaN, and 0 x NaN is NaN: it is replaced, not only masked.
        k, v = kv_cache[self.block_tables].unbind(2)  # [B, N, block_size, H, D]
        k, v = k.flatten(1, 2), v.flatten(1, 2)
        inside = torch.arange(k.shape[1], device=k.device) < self.lengths.unsqueeze(1)  # [B, L]
        kept = inside[:, :, None, None]
        k, v = k.where(kept, 0.0).transpose(1, 2), v.where(kept, 0.0).transpose(1, 2)
        mask = inside[:, None, None]
        q = q_THD.unsqueeze(2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).squeeze(2)


class ReferenceAttention:
    """See ``interface.AttentionPlanner``."""

    def plan(
        self, block_tables: torch.Tensor, query_lens: Sequence[int], context_lens: Sequence[int]
    ) -> ReferencePlan:
        return ReferencePlan(block_tables, query_lens, context_lens)

    def plan_decode(self, block_tables: torch.Tensor, lengths: torch.Tensor) -> ReferenceDecodePlan:
        return ReferenceDecodePlan(block_tables, lengths)
