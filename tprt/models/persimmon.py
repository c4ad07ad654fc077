"""Persimmon (Adept, 2023), top to bottom. Parameter names are Hugging Face's.

Sequential pre-norm blocks; LayerNorm with bias on the queries and keys of each head, before a rotary
embedding of half the head; squared ReLU without a gate; head untied from the embedding. Two
all-reduces per layer: at the end of ``dense`` and of ``dense_4h_to_h``.
"""

from typing import cast

import torch
from torch import nn

from tprt.batch import ForwardBatch
from tprt.cache import CacheSpec
from tprt.cache.kv_cache import KVCache
from tprt.config import PersimmonConfig
from tprt.distributed.tp_group import TPGroup
from tprt.distributed.vocabulary import Vocabulary
from tprt.layers.attention import Angles, Attention, split_attention_bytes
from tprt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from tprt.layers.linear import (
    Activations,
    ColumnParallelLinear,
    RowParallelLinear,
)
from tprt.layers.norm import HeadLayerNorm, LayerNorm, Norm
from tprt.layers.rotary import RotaryEmbedding
from tprt.models.base import CausalLM
from tprt.sizes import KernelSizes, PagedAttentionSizes

StreamAndNorm = tuple[torch.Tensor, Activations]


class PersimmonAttention(nn.Module):
    def __init__(self, config: PersimmonConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
        # Rows are ordered head by head with q, k, v inside a head: an even cut is whole heads.
        self.query_key_value = ColumnParallelLinear(hidden, 3 * hidden, tp, dtype)
        self.dense = RowParallelLinear(hidden, hidden, tp, dtype)
        norms = None
        if config.qk_layernorm != "none":
            per_head = config.qk_layernorm == "per_head"
            self.q_layernorm = HeadLayerNorm(heads, head_dim, tp, dtype, per_head)
            self.k_layernorm = HeadLayerNorm(heads, head_dim, tp, dtype, per_head)
            norms = self.q_layernorm, self.k_layernorm
        self.attention = Attention(heads, head_dim, tp, norms, config.layer_norm_eps)

    def forward(
        self,
        h: Activations,
        residual: torch.Tensor,
        angles: Angles,
        batch: ForwardBatch,
        cache: KVCache,
        norm: Norm,
        rows: torch.Tensor | None,
    ) -> StreamAndNorm:
        """[T, hidden_size] -> ``residual`` plus the attention, of ``rows`` alone if given; its norm."""
        local = (-1, self.attention.num_heads, 3, self.attention.head_dim)
        qkv = self.query_key_value(h).view(local)
        context = self.attention(qkv, angles, batch, cache)
        if rows is not None:
            context, residual = context[rows], residual[rows]
        return self.dense(context, residual, norm)


class PersimmonMLP(nn.Module):
    def __init__(self, config: PersimmonConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.dense_h_to_4h = ColumnParallelLinear(hidden, ffn, tp, dtype, "squared_relu")
        self.dense_4h_to_h = RowParallelLinear(ffn, hidden, tp, dtype, sparse_input=True)

    def forward(self, h: Activations, residual: torch.Tensor, norm: Norm) -> StreamAndNorm:
        return self.dense_4h_to_h(self.dense_h_to_4h(h), residual, norm)


class PersimmonDecoderLayer(nn.Module):
    def __init__(self, config: PersimmonConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.layer_norm_eps
        self.input_layernorm = LayerNorm(hidden, eps, tp, dtype)
        self.self_attn = PersimmonAttention(config, tp, dtype)
        self.post_attention_layernorm = LayerNorm(hidden, eps, tp, dtype)
        self.mlp = PersimmonMLP(config, tp, dtype)

    def forward(
        self,
        x: torch.Tensor,
        h: Activations,
        angles: Angles,
        batch: ForwardBatch,
        cache: KVCache,
        norm: Norm,
        rows: torch.Tensor | None = None,
    ) -> StreamAndNorm:
        """The residual stream [T, hidden_size] and this layer's input LayerNorm of it -> the next ones.

        Args:
            norm: the LayerNorm that comes after this layer.
            rows: int64 [R]; with it those rows only, [R, hidden_size].
        """
        middle = self.post_attention_layernorm.norm
        x, h = self.self_attn(h, x, angles, batch, cache, middle, rows)
        return self.mlp(h, x, norm)


class PersimmonModel(nn.Module):
    def __init__(
        self,
        config: PersimmonConfig,
        tp: TPGroup,
        dtype: torch.dtype,
        max_positions: int,
        vocabulary: Vocabulary,
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(vocabulary, config.hidden_size, tp, dtype)
        precision = config.rotary_precision or "fp32"
        self.rotary_emb = RotaryEmbedding(
            config.rotary_dim, max_positions, config.rope_theta, precision, tp.device
        )
        self.layers = nn.ModuleList(
            PersimmonDecoderLayer(config, tp, dtype) for _ in range(config.num_hidden_layers)
        )
        self.final_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, tp, dtype)

    def forward(self, batch: ForwardBatch, caches: list[KVCache]) -> torch.Tensor:
        """Hidden states [R, hidden_size] of the rows whose logits are wanted."""
        x = self.embed_tokens(batch.input_ids)  # [T, hidden_size]
        angles = self.rotary_emb(batch.positions)
        # Each LayerNorm belongs to the kernel that ends the layer before it.
        layers = cast("list[PersimmonDecoderLayer]", self.layers)
        h: Activations = layers[0].input_layernorm(x)
        norms = [layer.input_layernorm.norm for layer in layers[1:]]
        for layer, cache, norm in zip(layers[:-1], caches[:-1], norms, strict=True):
            x, h = layer(x, h, angles, batch, cache, norm)
        # No later layer looks at the other rows: most of a prompt skips the last MLP.
        final, rows = self.final_layernorm.norm, batch.logits_rows
        _, h = layers[-1](x, h, angles, batch, caches[-1], final, rows)
        return self.final_layernorm.kernels.normed(h)


class PersimmonForCausalLM(CausalLM):
    """See ``CausalLM``."""

    config: PersimmonConfig
    config_class = PersimmonConfig

    def __init__(
        self,
        config: PersimmonConfig,
        tp: TPGroup,
        dtype: torch.dtype,
        max_positions: int | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        super().__init__(config, tp, dtype, max_positions, vocabulary)
        self.model = PersimmonModel(config, tp, dtype, self.max_positions, self.vocabulary)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(self.vocabulary, config.hidden_size, tp, dtype, tied)

    def forward(self, batch: ForwardBatch, caches: list[KVCache]) -> torch.Tensor:
        return self.model(batch, caches)

    def cache_spec(self) -> list[CacheSpec]:
        return [m.cache_spec() for m in self.modules() if isinstance(m, Attention)]

    # ------------------------------------------------------------ for plans

    def activation_elements(self, tokens: int, length: int) -> int:
        hidden, ffn = self.config.hidden_size, self.config.intermediate_size // self.tp.size
        heads = self.config.hidden_size // self.tp.size
        # Residual stream and its norm, before and after; q, k, v, rotated queries, context.
        attention = 5 * hidden + 5 * heads
        # The same four; what goes up before and after the square; or that, the sum and its norm.
        mlp = 4 * hidden + max(2 * ffn, ffn + 3 * hidden)
        return max(tokens * attention + 2 * length * heads, tokens * mlp)

    def partial_bytes(self, rows: int, length: int) -> int:
        return split_attention_bytes(
            rows, length, self.config.num_attention_heads // self.tp.size, self.config.head_dim
        )

    def copied_elements(self, sparse: bool) -> int:
        """Down projections lie by neuron; many rows read them as other matrices."""
        config = self.config
        whole = config.num_hidden_layers * config.hidden_size * config.intermediate_size
        return self.lm_head.copied_elements() + (whole // self.tp.size if sparse else 0)

    def kernel_sizes(self, block_size: int) -> KernelSizes:
        config, size = self.config, self.tp.size
        return KernelSizes(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size // size,
            dtype=self.dtype,
            norm="layer",
            activation="squared_relu",
            attention=PagedAttentionSizes(
                num_heads=config.num_attention_heads // size,
                head_dim=config.head_dim,
                rotary_dim=config.rotary_dim,
                block_size=block_size,
                head_norms=config.qk_layernorm != "none",
            ),
        )
