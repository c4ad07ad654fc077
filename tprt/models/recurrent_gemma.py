"""RecurrentGemma (Google, 2024), top to bottom. Parameter names are Hugging Face's.

Pre-norm blocks whose first half is either a gated linear recurrence (RG-LRU) behind a short causal
convolution, or attention over a sliding window with one head of keys and values; then a gated MLP.
Embedding scaled by sqrt(hidden_size) and tied to the head, logits capped softly. Two all-reduces per
layer: at the end of ``linear_out`` or ``o_proj``, and of ``down_proj``. Cut by heads; where they do not
divide, heads of zeros are added, which add nothing to any sum.
"""

import math
from typing import cast

import torch
from torch import nn

from tprt.batch import ForwardBatch
from tprt.cache import CacheSpec
from tprt.cache.slot_cache import RecurrentCache, SlotCache, SlotSpec, WindowCache, WindowSpec
from tprt.config import RecurrentGemmaConfig
from tprt.distributed.tp_group import TPGroup
from tprt.distributed.vocabulary import Vocabulary
from tprt.layers.attention import Angles
from tprt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from tprt.layers.linear import (
    Activations,
    ColumnShard,
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from tprt.layers.norm import Norm, RMSNorm
from tprt.layers.recurrent import RGLRU, CausalConv1d, Recurrence
from tprt.layers.rotary import RotaryAngles
from tprt.layers.window_attention import WindowAttention, split_window_bytes
from tprt.models.base import CausalLM
from tprt.sizes import KernelSizes, RecurrenceSizes, WindowAttentionSizes

StreamAndNorm = tuple[torch.Tensor, Activations]


class RecurrentGemmaRecurrentBlock(nn.Module):
    def __init__(self, config: RecurrentGemmaConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, width, heads = config.hidden_size, config.lru_width, config.num_attention_heads
        part = config.padded_heads(tp.size) // tp.size
        channels = part * config.block_width
        self.linear_y = ColumnShard(hidden, width, tp, dtype, part=channels)
        self.linear_x = ColumnShard(hidden, width, tp, dtype, part=channels)
        self.linear_xy = MergedColumnParallelLinear((self.linear_x, self.linear_y), tp)
        self.conv_1d = CausalConv1d(width, config.conv1d_width, channels, tp, dtype)
        self.rg_lru = RGLRU(width, heads, part, tp, dtype)
        self.recurrence = Recurrence(self.conv_1d, self.rg_lru, tp)
        self.linear_out = RowParallelLinear(width, hidden, tp, dtype, part=channels)

    def forward(
        self, h: Activations, angles: Angles, batch: ForwardBatch, cache: SlotCache
    ) -> torch.Tensor:
        """[T, hidden_size] -> [T, channels of this rank]."""
        return self.recurrence(self.linear_xy(h), batch, cast(RecurrentCache, cache))

    @property
    def out(self) -> RowParallelLinear:
        return self.linear_out

    def cache_spec(self) -> SlotSpec:
        return self.recurrence.cache_spec()


class RecurrentGemmaAttention(nn.Module):
    def __init__(self, config: RecurrentGemmaConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        heads, width = (
            config.padded_heads(tp.size) // tp.size,
            config.num_attention_heads * head_dim,
        )
        self.q_proj = ColumnShard(hidden, width, tp, dtype, part=heads * head_dim, bias=False)
        # One head for all queries: every rank has all of it, computed alike.
        self.k_proj = ColumnShard(hidden, head_dim, tp, dtype, bias=False, replicate=True)
        self.v_proj = ColumnShard(hidden, head_dim, tp, dtype, bias=False, replicate=True)
        self.qkv_proj = MergedColumnParallelLinear((self.q_proj, self.k_proj, self.v_proj), tp)
        assert config.window_keys is not None
        self.attention = WindowAttention(heads, head_dim, config.window_keys, tp)
        self.o_proj = RowParallelLinear(width, hidden, tp, dtype, part=heads * head_dim)

    def forward(
        self, h: Activations, angles: Angles, batch: ForwardBatch, cache: SlotCache
    ) -> torch.Tensor:
        """[T, hidden_size] -> [T, local heads * head_dim]."""
        return self.attention(self.qkv_proj(h), angles, batch, cast(WindowCache, cache))

    @property
    def out(self) -> RowParallelLinear:
        return self.o_proj

    def cache_spec(self) -> SlotSpec:
        return self.attention.cache_spec()


class RecurrentGemmaMLP(nn.Module):
    def __init__(self, config: RecurrentGemmaConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.gate_proj = ColumnShard(hidden, ffn, tp, dtype)
        self.up_proj = ColumnShard(hidden, ffn, tp, dtype)
        self.gate_up = MergedColumnParallelLinear((self.gate_proj, self.up_proj), tp, "gelu_gate")
        self.down_proj = RowParallelLinear(ffn, hidden, tp, dtype)

    def forward(self, h: Activations, residual: torch.Tensor, norm: Norm) -> StreamAndNorm:
        return self.down_proj(self.gate_up(h), residual, norm)


class RecurrentGemmaDecoderLayer(nn.Module):
    def __init__(
        self, config: RecurrentGemmaConfig, index: int, tp: TPGroup, dtype: torch.dtype
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.temporal_pre_norm = RMSNorm(hidden, eps, tp, dtype)
        recurrent = config.layer_types[index] == "recurrent"
        block = RecurrentGemmaRecurrentBlock if recurrent else RecurrentGemmaAttention
        self.temporal_block = block(config, tp, dtype)
        self.channel_pre_norm = RMSNorm(hidden, eps, tp, dtype)
        self.mlp_block = RecurrentGemmaMLP(config, tp, dtype)

    def forward(
        self,
        x: torch.Tensor,
        h: Activations,
        angles: Angles,
        batch: ForwardBatch,
        cache: SlotCache,
        norm: Norm,
        rows: torch.Tensor | None = None,
    ) -> StreamAndNorm:
        """The residual stream [T, hidden_size] and this layer's first norm of it -> the next ones.

        Args:
            norm: the norm that comes after this layer.
            rows: int64 [R]; with it those rows only, [R, hidden_size].
        """
        mixed = self.temporal_block(h, angles, batch, cache)
        if rows is not None:
            mixed, x = mixed[rows], x[rows]
        x, h = self.temporal_block.out(mixed, x, self.channel_pre_norm.norm)
        return self.mlp_block(h, x, norm)


class RecurrentGemmaModel(nn.Module):
    def __init__(
        self,
        config: RecurrentGemmaConfig,
        tp: TPGroup,
        dtype: torch.dtype,
        vocabulary: Vocabulary,
    ) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(vocabulary, hidden, tp, dtype)
        # Rounded before it is used, whatever the dtype of the model: 50.5 for a width of 2560.
        self.scale = torch.tensor(math.sqrt(hidden)).bfloat16().item()
        self.rotary = RotaryAngles(config.rotary_dim, config.rope_theta, tp.device)
        self.layers = nn.ModuleList(
            RecurrentGemmaDecoderLayer(config, i, tp, dtype)
            for i in range(config.num_hidden_layers)
        )
        self.final_norm = RMSNorm(hidden, config.rms_norm_eps, tp, dtype)

    def forward(self, batch: ForwardBatch, caches: list[SlotCache]) -> torch.Tensor:
        """Hidden states [R, hidden_size] of the rows whose logits are wanted."""
        x = self.embed_tokens(batch.input_ids) * self.scale  # [T, hidden_size]
        angles = self.rotary(batch.positions)
        # Each norm belongs to the kernel that ends the layer before it.
        layers = cast("list[RecurrentGemmaDecoderLayer]", self.layers)
        h: Activations = layers[0].temporal_pre_norm(x)
        norms = [layer.temporal_pre_norm.norm for layer in layers[1:]]
        for layer, cache, norm in zip(layers[:-1], caches[:-1], norms, strict=True):
            x, h = layer(x, h, angles, batch, cache, norm)
        # No later layer looks at the other rows: most of a prompt skips the last MLP.
        final, rows = self.final_norm.norm, batch.logits_rows
        _, h = layers[-1](x, h, angles, batch, caches[-1], final, rows)
        return self.final_norm.kernels.normed(h)


class RecurrentGemmaForCausalLM(CausalLM):
    """See ``CausalLM``."""

    config: RecurrentGemmaConfig
    config_class = RecurrentGemmaConfig

    def __init__(
        self,
        config: RecurrentGemmaConfig,
        tp: TPGroup,
        dtype: torch.dtype,
        max_positions: int | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        super().__init__(config, tp, dtype, max_positions, vocabulary)
        self.model = RecurrentGemmaModel(config, tp, dtype, self.vocabulary)
        self.lm_head = ParallelLMHead(
            self.vocabulary,
            config.hidden_size,
            tp,
            dtype,
            self.model.embed_tokens,
            config.logits_soft_cap,
        )

    def forward(self, batch: ForwardBatch, caches: list[SlotCache]) -> torch.Tensor:
        return self.model(batch, caches)

    def cache_spec(self) -> list[CacheSpec]:
        layers = cast("list[RecurrentGemmaDecoderLayer]", self.model.layers)
        return [layer.temporal_block.cache_spec() for layer in layers]

    # ------------------------------------------------------------ for plans

    def activation_elements(self, tokens: int, length: int) -> int:
        config, size = self.config, self.tp.size
        hidden, ffn = config.hidden_size, config.intermediate_size // size
        channels = config.padded_heads(size) // size * config.block_width
        # Residual stream and its norm, before and after; x, y, and what the recurrence works on, most
        # of it in float32.
        recurrent = 4 * hidden + 3 * channels + 2 * 7 * channels
        mlp = 4 * hidden + 3 * ffn
        return tokens * max(recurrent, mlp)

    def partial_bytes(self, rows: int, length: int) -> int:
        heads = self.config.padded_heads(self.tp.size) // self.tp.size
        windows = {spec for spec in self.cache_spec() if isinstance(spec, WindowSpec)}
        return sum(split_window_bytes(rows, spec, heads, self.dtype) for spec in windows)

    def copied_elements(self, sparse: bool) -> int:
        return self.lm_head.copied_elements()

    def kernel_sizes(self, block_size: int) -> KernelSizes:
        config, size = self.config, self.tp.size
        heads, window, recurrence = config.padded_heads(size) // size, None, None
        for spec in self.cache_spec():
            if isinstance(spec, WindowSpec):
                window = WindowAttentionSizes(
                    heads, spec.head_dim, config.rotary_dim, spec.keys, spec.ring
                )
            else:
                recurrence = RecurrenceSizes(heads, config.block_width, config.conv1d_width)
        return KernelSizes(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size // size,
            dtype=self.dtype,
            norm="rms",
            activation="gelu_gate",
            soft_cap=config.logits_soft_cap,
            window=window,
            recurrence=recurrence,
        )
