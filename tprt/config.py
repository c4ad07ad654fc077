"""Plain frozen values that describe a model and an engine.

Foreign configurations (Hugging Face's ``config.json``, Megatron's ``args``) are translated at the
door, here; nothing behind it asks a config for a key that may be missing. This file knows no tensor,
no file and no rank.
"""

from dataclasses import dataclass
from typing import Any, Literal

from tprt.errors import CheckpointError, ConfigError

RotaryPrecision = Literal["bf16", "fp32"]
QKLayerNorm = Literal["none", "per_layer", "per_head"]
# Megatron's spelling of args.qk_layernorm. Per rank, the one row of a rank stands for all its heads.
QK_PER_LAYER = "weights_per_layer"
QK_PER_RANK = "weights_per_tensor_parallel_rank_and_layer"
QK_PER_HEAD = "weights_per_attention_head_and_layer"
_QK_MODES: dict[object, QKLayerNorm] = {
    None: "per_layer",
    "none": "none",
    QK_PER_LAYER: "per_layer",
    QK_PER_RANK: "per_head",
    QK_PER_HEAD: "per_head",
}
DTYPES = ("bfloat16", "float32", "float16")
DTYPE_ALIASES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class PersimmonConfig:
    """Sizes of a Persimmon model; all counts are of the whole model, never of one rank.

    Args:
        vocab_size: rows of embedding and head in the checkpoint, padding rows included.
        qk_layernorm: one (weight, bias) pair per layer, one per head, or no q/k LayerNorm.
        rotary_precision: what the checkpoint says of how it was trained; None when it does not say.
        eos_token_id: what the checkpoint's config claims; the tokenizer's scan decides.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-5
    rope_theta: float = 25000.0
    partial_rotary_factor: float = 0.5
    qk_layernorm: QKLayerNorm = "per_layer"
    tie_word_embeddings: bool = False
    rotary_precision: RotaryPrecision | None = None
    eos_token_id: int | None = None
    vocab_padding_multiple: int = 1

    model_type = "persimmon"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "head_dim", "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CheckpointError(f"{name} must be a positive whole number, not {value!r}")
        if self.num_attention_heads * self.head_dim != self.hidden_size:
            raise CheckpointError(
                f"{self.num_attention_heads} heads of width {self.head_dim} do not make up "
                f"hidden_size {self.hidden_size}"
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise CheckpointError(
                f"rotary width {self.rotary_dim} (partial_rotary_factor "
                f"{self.partial_rotary_factor} of head width {self.head_dim}) is not an even "
                f"number from 2 to {self.head_dim}"
            )

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def tp_sizes(self) -> list[int]:
        """Tensor-parallel sizes at which every rank gets whole heads and equal MLP parts."""
        heads, ffn = self.num_attention_heads, self.intermediate_size
        return [n for n in range(1, heads + 1) if heads % n == 0 and ffn % n == 0]

    def validate_parallel(self, tp_size: int) -> None:
        """Raises ConfigError with the sizes that work when ``tp_size`` does not."""
        if tp_size not in self.tp_sizes():
            sizes = ", ".join(map(str, self.tp_sizes()))
            raise ConfigError(
                f"{tp_size} ranks cannot share {self.num_attention_heads} heads and "
                f"{self.intermediate_size} MLP neurons evenly",
                hint=f"a tensor-parallel size of {sizes}",
            )

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "PersimmonConfig":
        """From ``config.json`` in the spelling of transformers 4.x or 5.x.

        Raises:
            CheckpointError: a key is missing or malformed, or asks for what is not implemented
                (another activation, a scaled rotary embedding, quantized weights).
        """
        rope = raw.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"rope_parameters must be a mapping, not {rope!r}")
        _refuse_hf(raw, rope)
        heads, hidden = _need(raw, "num_attention_heads"), _need(raw, "hidden_size")
        # 4.x spells theta and the rotated share at the top, 5.x inside rope_parameters. The class
        # default of 5.x (10000) is not Persimmon's, so a missing theta means 25000.
        theta = rope.get("rope_theta", raw.get("rope_theta", 25000.0))
        factor = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 0.5))
        return cls(
            vocab_size=_need(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_need(raw, "intermediate_size"),
            num_hidden_layers=_need(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            head_dim=hidden // heads if heads else 0,
            max_position_embeddings=_need(raw, "max_position_embeddings"),
            layer_norm_eps=float(raw.get("layer_norm_eps", 1e-5)),
            rope_theta=float(theta),
            partial_rotary_factor=float(factor),
            qk_layernorm="per_layer" if raw.get("qk_layernorm", True) else "none",
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            rotary_precision=_rotary_precision(raw.get("rotary_precision")),
            eos_token_id=_single_id(raw.get("eos_token_id")),
        )

    def to_hf(self) -> dict[str, Any]:
        """A ``config.json`` that both spellings of transformers read."""
        if self.qk_layernorm == "per_head":
            raise CheckpointError(
                "q/k LayerNorms that differ between heads cannot be held by the Hugging Face layout",
                where="self_attn.q_layernorm, self_attn.k_layernorm",
                hint="--format megatron or --format presharded",
            )
        raw: dict[str, Any] = {
            "architectures": ["PersimmonForCausalLM"],
            "model_type": "persimmon",
            "hidden_act": "relu2",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "layer_norm_eps": self.layer_norm_eps,
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": self.partial_rotary_factor,
            "qk_layernorm": self.qk_layernorm == "per_layer",
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }
        if self.rotary_precision is not None:
            raw["rotary_precision"] = self.rotary_precision
        if self.eos_token_id is not None:
            raw |= {"bos_token_id": self.eos_token_id, "eos_token_id": self.eos_token_id}
        return raw

    @classmethod
    def from_megatron(cls, args: dict[str, Any]) -> "PersimmonConfig":
        """From the ``args`` namespace of a Megatron checkpoint (as a dict).

        Raises:
            CheckpointError: a key is missing or malformed, or describes another architecture.
        """
        wanted = {"sq_relu": True, "pos_emb": "rotary", "swiglu": False, "num_experts": None}
        for name, value in wanted.items():
            found = args.get(name, value)
            if found is not None and found != value:
                raise CheckpointError(f"args.{name} is {found!r}; Persimmon has {value!r}")
        hidden, heads = _need(args, "hidden_size"), _need(args, "num_attention_heads")
        head_dim = args.get("kv_channels") or (hidden // heads if heads else 0)
        mode = args.get("qk_layernorm")
        if mode not in _QK_MODES:
            known = ", ".join(str(m) for m in _QK_MODES if m)
            raise CheckpointError(f"args.qk_layernorm is {mode!r}", hint=f"known are {known}")
        tp = args.get("tensor_model_parallel_size") or 1
        ffn = args.get("ffn_hidden_size") or 4 * hidden
        context = args.get("max_position_embeddings") or _need(args, "seq_length")
        return cls(
            vocab_size=_need(args, "padded_vocab_size"),
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=_need(args, "num_layers"),
            num_attention_heads=heads,
            head_dim=head_dim,
            max_position_embeddings=context,
            layer_norm_eps=float(args.get("layernorm_epsilon") or 1e-5),
            rope_theta=float(args.get("rotary_emb_base") or 25000.0),
            partial_rotary_factor=float(args.get("rotary_pct") or 0.5),
            qk_layernorm=_QK_MODES[mode],
            tie_word_embeddings=not args.get("untie_embeddings", True),
            rotary_precision=_rotary_precision(args.get("rotary_precision")),
            vocab_padding_multiple=(args.get("make_vocab_size_divisible_by") or 128) * tp,
        )

    def to_megatron(self, tp_size: int, dtype: str) -> dict[str, Any]:
        """The fields of ``args`` that readers of Adept's layout look at."""
        mode = {
            "none": "none",
            "per_layer": QK_PER_LAYER,
            "per_head": QK_PER_HEAD,
        }[self.qk_layernorm]
        args: dict[str, Any] = {
            "num_layers": self.num_hidden_layers,
            "encoder_num_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "kv_channels": self.head_dim,
            "seq_length": self.max_position_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "pos_emb": "rotary",
            "rotary_pct": self.partial_rotary_factor,
            "rotary_emb_base": self.rope_theta,
            "untie_embeddings": not self.tie_word_embeddings,
            "sq_relu": True,
            "bf16": dtype == "bfloat16",
            "fp16": dtype == "float16",
            "layernorm_epsilon": self.layer_norm_eps,
            "qk_layernorm": mode,
            "tokenizer_type": "_SentencePieceTokenizer",
            "padded_vocab_size": self.vocab_size,
            "make_vocab_size_divisible_by": max(1, self.vocab_padding_multiple // tp_size),
            "tensor_model_parallel_size": tp_size,
            "pipeline_model_parallel_size": 1,
        }
        if self.rotary_precision is not None:
            args["rotary_precision"] = self.rotary_precision
        return args


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs a model; independent of which model it is.

    Args:
        dtype: of weights, activations and KV cache: bfloat16, float32 or float16.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most prompt tokens computed in one forward pass.
        max_model_len: most tokens of prompt and completion; None means the model's own limit.
        block_size: tokens per KV block.
        kv_cache_memory: bytes of KV cache per rank; None means 1 GiB on a CPU, and on a GPU what
            gpu_memory_utilization leaves after the weights.
        gpu_memory_utilization: share of a GPU's memory that weights and KV cache may take.
        seed: feeds the draws of requests that bring no seed of their own.
    """

    dtype: str = "bfloat16"
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", DTYPE_ALIASES.get(self.dtype, self.dtype))
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}", hint=f"one of {', '.join(DTYPES)}")
        optional = ("max_model_len", "kv_cache_memory")
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", *optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive whole number, not {value!r}")
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization is {share!r}, allowed are above 0 to 1")


def default_rotary_precision(layout: str) -> RotaryPrecision:
    """What a layout's own code computes where a checkpoint does not say: Megatron rotates in bf16."""
    return "bf16" if layout == "megatron" else "fp32"


def _need(raw: dict[str, Any], name: str) -> Any:
    if raw.get(name) is None:
        raise CheckpointError(f"the model's configuration has no {name!r}")
    return raw[name]


def _single_id(value: object) -> int | None:
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _rotary_precision(value: object) -> RotaryPrecision | None:
    if value is None or value == "bf16" or value == "fp32":
        return value
    raise CheckpointError(f"the checkpoint's rotary_precision is {value!r}", hint="bf16 or fp32")


def _refuse_hf(raw: dict[str, Any], rope: dict[str, Any]) -> None:
    if raw.get("model_type", "persimmon") != "persimmon":
        raise CheckpointError(
            f"model_type is {raw['model_type']!r}, which is not implemented", hint="persimmon"
        )
    if raw.get("hidden_act", "relu2") != "relu2":
        raise CheckpointError(f"hidden_act is {raw['hidden_act']!r}; Persimmon has 'relu2'")
    scaling = raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise CheckpointError(f"rope_scaling must be a mapping, not {scaling!r}")
    kind = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default":
        raise CheckpointError(f"rope scaling of kind {kind!r} is not implemented")
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            f"weights quantized by {method or quantization!r} are not implemented",
            hint="the unquantized checkpoint",
        )
