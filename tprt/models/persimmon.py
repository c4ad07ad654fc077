"""Persimmon (Adept, 2023), top to bottom. Parameter names are Hugging Face's.

Sequential pre-norm blocks; LayerNorm with bias on the queries and keys of each head, before a rotary
embedding of half the head; squared ReLU without a gate; head untied from the embedding. Two
all-reduces per layer: at the end of ``dense`` and of ``dense_4h_to_h``.
"""

import torch
from torch import nn

from tprt.batch import ForwardBatch
from tprt.cache.kv_cache import KVCache, PagedKVSpec
from tprt.config import PersimmonConfig, RotaryPrecision
from tprt.distributed.tp_group import TPGroup
from tprt.layers.activation import SquaredReLU
from tprt.layers.attention import Attention
from tprt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from tprt.layers.linear import ColumnParallelLinear, RowParallelLinear
from tprt.layers.norm import HeadLayerNorm, LayerNorm
from tprt.layers.rotary import RotaryEmbedding


class PersimmonAttention(nn.Module):
    def __init__(
        self, config: PersimmonConfig, rotary: RotaryEmbedding, tp: TPGroup, dtype: torch.dtype
    ) -> None:
        super().__init__()
        hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
        # Rows are ordered head by head with q, k, v inside a head: an even cut is whole heads.
        self.query_key_value = ColumnParallelLinear(hidden, 3 * hidden, tp, dtype)
        self.dense = RowParallelLinear(hidden, hidden, tp, dtype)
        self.q_layernorm: nn.Module = nn.Identity()
        self.k_layernorm: nn.Module = nn.Identity()
        if config.qk_layernorm != "none":
            per_head = config.qk_layernorm == "per_head"
            eps = config.layer_norm_eps
            self.q_layernorm = HeadLayerNorm(heads, head_dim, eps, tp, dtype, per_head)
            self.k_layernorm = HeadLayerNorm(heads, head_dim, eps, tp, dtype, per_head)
        self.rotary_emb = rotary
        self.attention = Attention(heads, head_dim, tp)

    def forward(self, x: torch.Tensor, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        local = (-1, self.attention.num_heads, 3, self.attention.head_dim)
        q, k, v = self.query_key_value(x).view(local).unbind(2)  # each [T, heads, head_dim]
        q, k = self.q_layernorm(q), self.k_layernorm(k)
        q, k = self.rotary_emb(q, k, batch.positions)
        context = self.attention(q, k, v, batch, cache)
        return self.dense(context)


class PersimmonMLP(nn.Module):
    def __init__(self, config: PersimmonConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.dense_h_to_4h = ColumnParallelLinear(hidden, ffn, tp, dtype)
        self.dense_4h_to_h = RowParallelLinear(ffn, hidden, tp, dtype)
        self.act = SquaredReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x)))


class PersimmonDecoderLayer(nn.Module):
    def __init__(
        self, config: PersimmonConfig, rotary: RotaryEmbedding, tp: TPGroup, dtype: torch.dtype
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.layer_norm_eps
        self.input_layernorm = LayerNorm(hidden, eps, tp, dtype)
        self.self_attn = PersimmonAttention(config, rotary, tp, dtype)
        self.post_attention_layernorm = LayerNorm(hidden, eps, tp, dtype)
        self.mlp = PersimmonMLP(config, tp, dtype)

    def forward(self, x: torch.Tensor, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), batch, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class PersimmonModel(nn.Module):
    def __init__(
        self,
        config: PersimmonConfig,
        tp: TPGroup,
        dtype: torch.dtype,
        rotary_precision: RotaryPrecision,
        max_positions: int,
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp, dtype)
        rotary = RotaryEmbedding(
            config.rotary_dim, max_positions, config.rope_theta, rotary_precision, tp.device
        )
        self.layers = nn.ModuleList(
            PersimmonDecoderLayer(config, rotary, tp, dtype)
            for _ in range(config.num_hidden_layers)
        )
        self.final_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, tp, dtype)

    def forward(self, batch: ForwardBatch, caches: list[KVCache]) -> torch.Tensor:
        """Hidden states [R, hidden_size] of the rows whose logits are wanted."""
        x = self.embed_tokens(batch.input_ids)  # [T, hidden_size]
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, batch, cache)
        return self.final_layernorm(x[batch.logits_rows])


class PersimmonForCausalLM(nn.Module):
    """One rank's part of a Persimmon model; parameters are uninitialised until loaded.

    Args:
        config: of the whole model.
        tp: which part this is; without process groups it cannot run but can be planned and loaded.
        dtype: of parameters, activations and cache.
        rotary_precision: how positions are turned into angles.
        max_positions: longest sequence the rotary table covers; None means the model's own limit.

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
    ) -> None:
        super().__init__()
        config.validate_parallel(tp.size)
        positions = max_positions or config.max_position_embeddings
        self.config, self.tp = config, tp
        self.model = PersimmonModel(config, tp, dtype, rotary_precision, positions)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, tp, dtype, tied)

    def forward(self, batch: ForwardBatch, caches: list[KVCache]) -> torch.Tensor:
        """Hidden states [R, hidden_size] after the last LayerNorm, the same on every rank."""
        return self.model(batch, caches)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] -> float32 [R, part of the vocabulary] of this rank."""
        return self.lm_head(hidden)

    def cache_spec(self) -> list[PagedKVSpec]:
        """What each layer keeps per token."""
        return [m.cache_spec() for m in self.modules() if isinstance(m, Attention)]
