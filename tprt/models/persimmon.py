"""Persimmon (Adept, 2023), top to bottom. Parameter names are Hugging Face's.

Sequential pre-norm blocks; LayerNorm with bias on the queries and keys of each head, before a rotary
embedding of half the head; squared ReLU without a gate; head untied from the embedding. Two
all-reduces per layer: at the end of ``dense`` and of ``dense_4h_to_h``.
"""

from typing import cast

import torch
from torch import nn

from tprt.batch import ForwardBatch
from tprt.cache.kv_cache import KVCache, PagedKVSpec
from tprt.config import PersimmonConfig, RotaryPrecision
from tprt.distributed.tp_group import TPGroup
from tprt.distributed.vocabulary import Vocabulary
from tprt.layers.attention import Angles, Attention
from tprt.layers.embedding import Noise, ParallelLMHead, VocabParallelEmbedding
from tprt.layers.linear import (
    Activations,
    ColumnParallelLinear,
    ParallelLinear,
    RowParallelLinear,
)
from tprt.layers.norm import HeadLayerNorm, LayerNorm, Norm
from tprt.layers.rotary import RotaryEmbedding

Tensors = tuple[torch.Tensor, torch.Tensor]
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
        rotary_precision: RotaryPrecision,
        max_positions: int,
        vocabulary: Vocabulary,
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(vocabulary, config.hidden_size, tp, dtype)
        self.rotary_emb = RotaryEmbedding(
            config.rotary_dim, max_positions, config.rope_theta, rotary_precision, tp.device
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


class PersimmonForCausalLM(nn.Module):
    """One rank's part of a Persimmon model; parameters are uninitialised until loaded.

    Args:
        config: of the whole model.
        tp: which part this is; without process groups it cannot run but can be planned and loaded.
        dtype: of parameters, activations and cache.
        rotary_precision: how positions are turned into angles.
        max_positions: longest sequence the rotary table covers; None means the model's own limit.
        vocabulary: which ids have rows; None means all.

    Raises:
        ConfigError: the heads or the MLP do not divide over ``tp.size`` ranks.
    """

    def __init__(
        self,
        config: PersimmonConfig,
        tp: TPGroup,
        dtype: torch.dtype,
        rotary_precision: RotaryPrecision = "fp32",
        max_positions: int | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        super().__init__()
        config.validate_parallel(tp.size)
        positions = max_positions or config.max_position_embeddings
        self.config, self.tp = config, tp
        self.vocabulary = vocabulary or Vocabulary(config.vocab_size)
        self.model = PersimmonModel(config, tp, dtype, rotary_precision, positions, self.vocabulary)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(self.vocabulary, config.hidden_size, tp, dtype, tied)

    def finish_loading(self) -> None:
        """After the weights are in: lay them out as this device reads them fastest.

        Nothing can be loaded or saved any more. Without it the model runs, slower.
        """
        for module in self.modules():
            if isinstance(module, ParallelLinear | Attention):
                module.finish_loading()

    def forward(self, batch: ForwardBatch, caches: list[KVCache]) -> torch.Tensor:
        """Hidden states [R, hidden_size] after the last LayerNorm, the same on every rank."""
        return self.model(batch, caches)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] -> float32 [R, part], this rank's columns of ``vocabulary``."""
        return self.lm_head(hidden)

    def argmax(self, hidden: torch.Tensor, noise: Noise, num_valid: int) -> Tensors:
        """The best id of this rank's columns for each row; see ``ParallelLMHead.argmax``."""
        return self.lm_head.argmax(hidden, noise, num_valid)

    def cache_spec(self) -> list[PagedKVSpec]:
        """What each layer keeps per token."""
        return [m.cache_spec() for m in self.modules() if isinstance(m, Attention)]
