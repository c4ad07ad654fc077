"""The operations layers call: one signature each, whatever body serves it.

Legend: T tokens, R rows, H heads of this rank, D head width, r rotary width, F width of an MLP on this
rank. Knows tensors only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from tprt.batch import Segments
from tprt.kernels.recurrence import RecurrenceWeights

Tensors = tuple[torch.Tensor, torch.Tensor]


class Norm(NamedTuple):
    """Weight and bias [width] in the dtype of the model, and what keeps a norm from 1 / 0.

    With a bias it is a LayerNorm. Without one it is an RMSNorm that is multiplied by 1 + weight, in
    float32 up to its result: x / sqrt(mean(x^2) + eps) * (1 + weight). ``prepared`` may hold what
    ``reference.prepare_rms`` makes of it.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    prepared: tuple[torch.Tensor, torch.Tensor] | None = None


class PendingNorm(NamedTuple):
    """The LayerNorm of x [T, width], left to the product that reads it."""

    x: torch.Tensor
    norm: Norm


Activations = torch.Tensor | PendingNorm


class SparseWeight(NamedTuple):
    """The matrix of a product whose inputs are mostly exactly 0.

    Args:
        rows: [in_features, out_features], so that what a zero would meet is one row in memory; without
            rows where only ``dense`` is ever read.
        dense: the same matrix as ``linear`` reads it fastest, where that is worth its memory.
    """

    rows: torch.Tensor
    dense: torch.Tensor | None


class HeadNorms(NamedTuple):
    """LayerNorms of each head's query (0) and key (1): float32 [H, 2, D]."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Noise:
    """How each row draws: the id with the largest logit / temperature + keyed Gumbel noise.

    Args:
        temperature: float32 [R], 1 where greedy.
        greedy: bool [R]; such a row gets no noise.
        keys: int64 [R] of ``noise.sequence_key``.
        positions: int64 [R], of the token being drawn.
        all_greedy: known on the host: no row needs noise or temperature.
    """

    temperature: torch.Tensor
    greedy: torch.Tensor
    keys: torch.Tensor
    positions: torch.Tensor
    all_greedy: bool = False


class AttentionPlan(Protocol):
    """How the tokens of one pass attend; the same for every layer."""

    def __call__(
        self, q_THD: torch.Tensor, kv_cache: torch.Tensor, scale: float, /
    ) -> torch.Tensor:
        """Causal attention over a cache [blocks, 2, block_size, H, D]; queries and result [T, H, D].

        The keys and values of these tokens are in the cache already. What lies in a block past the end
        of a sequence is never used, NaN included.
        """
        ...


class AttentionPlanner(Protocol):
    """Makes the plan of a pass; lives as long as the engine and owns what attention needs to work in."""

    def plan(
        self, block_tables: torch.Tensor, query_lens: Sequence[int], context_lens: Sequence[int]
    ) -> AttentionPlan:
        """A pass of prompts' chunks and single tokens, their lengths known on the host.

        Args:
            block_tables: int64 [B, N], the blocks of each sequence, any number in unused entries.
            query_lens: new tokens of each sequence. context_lens: tokens cached before.
        """
        ...

    def plan_decode(self, block_tables: torch.Tensor, lengths: torch.Tensor) -> AttentionPlan:
        """One new token for each of B sequences; nothing is read on the host, so a graph can hold it.

        Args:
            block_tables: int64 [B, N]. lengths: int64 [B], cached tokens with the new one, at least 1
                and at most N blocks.
        """
        ...


class Kernels(Protocol):
    """One body of every operation. Made by ``kernels.kernels_for``."""

    # Most rows for which ``sparse_linear`` skips what is 0; None as measured for this body, 0 for never.
    sparse_rows: int | None

    @property
    def name(self) -> str: ...

    def pack_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """A matrix [out_features, in_features] as the products read it fastest; itself, or a copy."""
        ...

    def layer_norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """LayerNorm over the last dimension of [T, width]; statistics in float32."""
        ...

    def add_layer_norm(
        self, x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, norm: Norm
    ) -> Tensors:
        """``residual`` + (x + bias), [T, width] in the dtype of ``residual``, and the LayerNorm of that.

        ``x`` may be float32 where the others are not.
        """
        ...

    def normed(self, x: Activations) -> torch.Tensor:
        """What a ``PendingNorm`` stands for, for who needs it in memory; others as they are."""
        ...

    def linear(
        self, x: Activations, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x W^T + b, [T, in_features] -> [T, out_features]; sums in float32, rounded once.

        ``weight`` [out_features, in_features] plain or from ``pack_weight``, here and below.
        """
        ...

    def linear_squared_relu(
        self, x: Activations, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """relu(x W^T + b)^2. In float16 the square is capped at 65504: 256^2 is past its range."""
        ...

    def linear_gelu_gate(
        self, x: Activations, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """gelu(x G^T + g) * (x U^T + u), of weight [2 F, in_features], G before U, and bias [2 F].

        GELU in its form with tanh. Returns [T, F].
        """
        ...

    def linear_add_layer_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor,
        norm: Norm,
    ) -> tuple[torch.Tensor, Activations]:
        """``add_layer_norm`` of ``linear``: what ends a row-parallel layer on a single rank."""
        ...

    def pack_sparse(self, rows: torch.Tensor) -> SparseWeight:
        """[in_features, out_features], kept as it is if it is read, and a copy for dense products where
        one helps."""
        ...

    def sparse_linear(self, x: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
        """x W, [T, in_features] -> [T, out_features]; few rows read no row of W that meets only zeros.

        An element that is 0 contributes nothing, whatever W holds there, and every other one, NaN too,
        does what it does in a dense product. How many rows of x are few is ``sparse_rows``, so which
        body runs follows from sizes, never from values.
        """
        ...

    def sparse_linear_add_layer_norm(
        self,
        x: torch.Tensor,
        weight: SparseWeight,
        bias: torch.Tensor,
        residual: torch.Tensor,
        norm: Norm,
    ) -> tuple[torch.Tensor, Activations]:
        """``add_layer_norm`` of ``sparse_linear``."""
        ...

    def qk_norm_rotary_store(
        self,
        qkv: torch.Tensor,
        norms: HeadNorms | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """LayerNorm and rotation of queries and keys in float32; keys and values into the cache.

        Args:
            qkv: queries, keys and values of T tokens, [T, H, 3, D].
            norms: None leaves the LayerNorm out.
            cos, sin: float32 [T, 1, 1, r], as ``RotaryEmbedding`` gives them: dimension i of the first r
                becomes x[i] cos[i] + x[i +- r/2] sin[i]; pairs are (i, i + r/2), as in GPT-NeoX.
            kv_cache: [blocks, 2, block_size, H, D]. slot_mapping: int64 [2, T] as in ``ForwardBatch``.

        Returns:
            The queries, [T, H, D] in the dtype of ``qkv``.
        """
        ...

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
        """``qk_norm_rotary_store``, then ``plan`` of its queries: [T, H, D]; one kernel or several.

        Args:
            qkv ... slot_mapping: as in ``qk_norm_rotary_store``.
            plan: of this body's planner, for these tokens. Where rows share slots, as padding does,
                nobody may read their results.
        """
        ...

    def pack_recurrence(self, weights: RecurrenceWeights) -> RecurrenceWeights:
        """The weights as ``recurrence`` reads them fastest; the only form that is kept."""
        ...

    def recurrence(
        self,
        xy: torch.Tensor,
        weights: RecurrenceWeights,
        state: torch.Tensor,
        conv: torch.Tensor,
        segments: Segments,
    ) -> torch.Tensor:
        """A recurrent layer between its projections; see ``kernels.recurrence.recurrence``."""
        ...

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
        """Rotation, then attention over a window; see ``kernels.window.window_attention``.

        Args:
            qkv: [T, H + 2, D]: queries, and the one key and value that all heads share.
            cos, sin: float32 [T, 1, r], as in ``qk_norm_rotary_store``.

        Returns:
            [T, H, D].
        """
        ...

    def logits(
        self, x: torch.Tensor, weight: torch.Tensor, soft_cap: float | None = None
    ) -> torch.Tensor:
        """x W^T in float32, [R, width] -> [R, rows of ``weight``].

        Args:
            soft_cap: c, if any, for c tanh(logits / c).
        """
        ...

    def linear_argmax(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        noise: Noise,
        ids: torch.Tensor,
        num_valid: int,
        soft_cap: float | None = None,
    ) -> Tensors:
        """``argmax`` of ``logits``; a body need not write them anywhere."""
        ...

    def argmax(
        self, logits: torch.Tensor, noise: Noise, ids: torch.Tensor, num_valid: int
    ) -> Tensors:
        """The best of each row of float32 [R, V]; of equal scores the lowest id.

        Args:
            ids: int64 [V], ascending: the id of each column.
            num_valid: columns from here on stand for no id.

        Returns:
            float32 [R], its score, which is NaN or infinite where a valid logit is NaN or +inf or all
            are -inf; and int64 [R], its id.
        """
        ...

    def attention(
        self, block_size: int, num_heads: int, head_dim: int, dtype: torch.dtype
    ) -> AttentionPlanner:
        """A planner for a cache of these sizes."""
        ...
