"""What a Persimmon model is, from Hugging Face's ``config.json`` or Megatron's ``args``."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from tprt.config.checks import (
    CONFIG_HINT,
    check_rotary,
    count,
    flag,
    mapping,
    need,
    one_of,
    positive,
    refuse_unsupported,
    shown,
    single_id,
)
from tprt.config.model import ModelConfig
from tprt.errors import CheckpointError

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


@dataclass(frozen=True, kw_only=True)
class PersimmonConfig(ModelConfig):
    """Sizes of a Persimmon model.

    Args:
        qk_layernorm: one (weight, bias) pair per layer, one per head, or no q/k LayerNorm.
        rotary_precision: how it was trained, or is to be run; None where nobody says.
    """

    layer_norm_eps: float = 1e-5
    rope_theta: float = 25000.0
    partial_rotary_factor: float = 0.5
    qk_layernorm: QKLayerNorm = "per_layer"
    rotary_precision: RotaryPrecision | None = None

    model_type: ClassVar[str] = "persimmon"
    overrides: ClassVar[dict[str, tuple[Any, ...]]] = {
        "rotary_precision": get_args(RotaryPrecision)
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layer_norm_eps", "rope_theta", "partial_rotary_factor"):
            object.__setattr__(self, name, positive(name, getattr(self, name)))
        one_of("qk_layernorm", self.qk_layernorm, get_args(QKLayerNorm))
        one_of("rotary_precision", self.rotary_precision, (None, *get_args(RotaryPrecision)))
        if self.num_attention_heads * self.head_dim != self.hidden_size:
            raise CheckpointError(
                f"{self.num_attention_heads} heads of width {self.head_dim} do not make up "
                f"hidden_size {self.hidden_size}",
                hint=CONFIG_HINT,
            )
        check_rotary(self.head_dim, self.partial_rotary_factor)

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def in_words(self) -> str:
        return f"rotary {self.rotary_precision or 'open'}, q/k LayerNorm {self.qk_layernorm}"

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """As in the base; q/k LayerNorms are [head_dim] when a layer shares them, [num_heads, head_dim]
        when heads differ."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        qk_shape: tuple[int, ...] = (self.head_dim,)
        if self.qk_layernorm == "per_head":
            qk_shape = (self.num_attention_heads, self.head_dim)
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "input_layernorm.bias": (hidden,),
            "self_attn.query_key_value.weight": (3 * hidden, hidden),
            "self_attn.query_key_value.bias": (3 * hidden,),
        }
        if self.qk_layernorm != "none":
            for norm in ("q_layernorm", "k_layernorm"):
                layer |= {f"self_attn.{norm}.{part}": qk_shape for part in ("weight", "bias")}
        layer |= {
            "self_attn.dense.weight": (hidden, hidden),
            "self_attn.dense.bias": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "post_attention_layernorm.bias": (hidden,),
            "mlp.dense_h_to_4h.weight": (ffn, hidden),
            "mlp.dense_h_to_4h.bias": (ffn,),
            "mlp.dense_4h_to_h.weight": (hidden, ffn),
            "mlp.dense_4h_to_h.bias": (hidden,),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden)
        }
        for index in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        shapes |= {f"model.final_layernorm.{part}": (hidden,) for part in ("weight", "bias")}
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def settled(self, layout: str) -> "PersimmonConfig":
        """With a rotary precision: what the checkpoint says, else what its layout's own code does."""
        return replace(
            self, rotary_precision=self.rotary_precision or default_rotary_precision(layout)
        )

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "PersimmonConfig":
        """From ``config.json`` in the spelling of transformers 4.x or 5.x.

        Raises:
            CheckpointError: a key is missing or malformed, or asks for what is not implemented
                (another activation, a scaled rotary embedding, quantized weights).
        """
        rope = mapping(raw, "rope_parameters")
        refuse_unsupported(raw, rope)
        if raw.get("hidden_act", "relu2") != "relu2":
            raise CheckpointError(
                f"hidden_act is {shown(raw['hidden_act'])}; Persimmon has 'relu2'",
                hint="a checkpoint of the Persimmon architecture",
            )
        heads = count("num_attention_heads", need(raw, "num_attention_heads"))
        hidden = count("hidden_size", need(raw, "hidden_size"))
        # 4.x spells theta and the rotated share at the top, 5.x inside rope_parameters. The class
        # default of 5.x (10000) is not Persimmon's, so a missing theta means 25000.
        theta = rope.get("rope_theta", raw.get("rope_theta", 25000.0))
        factor = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 0.5))
        return cls(
            vocab_size=need(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=need(raw, "intermediate_size"),
            num_hidden_layers=need(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            head_dim=hidden // heads,
            max_position_embeddings=need(raw, "max_position_embeddings"),
            layer_norm_eps=raw.get("layer_norm_eps", 1e-5),
            rope_theta=theta,
            partial_rotary_factor=factor,
            qk_layernorm="per_layer" if flag(raw, "qk_layernorm", True) else "none",
            tie_word_embeddings=flag(raw, "tie_word_embeddings", False),
            rotary_precision=raw.get("rotary_precision"),
            eos_token_id=single_id(raw.get("eos_token_id")),
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
                raise CheckpointError(
                    f"args.{name} is {shown(found)}; Persimmon has {value!r}",
                    hint="a checkpoint of the Persimmon architecture",
                )
        heads = count("num_attention_heads", need(args, "num_attention_heads"))
        hidden = count("hidden_size", need(args, "hidden_size"))
        mode = args.get("qk_layernorm")
        if mode not in _QK_MODES:
            known = ", ".join(str(m) for m in _QK_MODES if m)
            raise CheckpointError(f"args.qk_layernorm is {shown(mode)}", hint=f"one of {known}")
        multiple, tp = (
            count(name, args.get(name) or default)
            for name, default in (
                ("make_vocab_size_divisible_by", 128), ("tensor_model_parallel_size", 1),
            )
        )  # fmt: skip
        context = args.get("max_position_embeddings") or need(args, "seq_length")
        return cls(
            vocab_size=need(args, "padded_vocab_size"),
            hidden_size=hidden,
            intermediate_size=args.get("ffn_hidden_size") or 4 * hidden,
            num_hidden_layers=need(args, "num_layers"),
            num_attention_heads=heads,
            head_dim=args.get("kv_channels") or hidden // heads,
            max_position_embeddings=context,
            layer_norm_eps=args.get("layernorm_epsilon") or 1e-5,
            rope_theta=args.get("rotary_emb_base") or 25000.0,
            partial_rotary_factor=args.get("rotary_pct") or 0.5,
            qk_layernorm=_QK_MODES[mode],
            tie_word_embeddings=not flag(args, "untie_embeddings", True),
            rotary_precision=args.get("rotary_precision"),
            vocab_padding_multiple=multiple * tp,
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


def default_rotary_precision(layout: str) -> RotaryPrecision:
    """What a layout's own code computes where a checkpoint does not say: Megatron rotates in bf16."""
    return "bf16" if layout == "megatron" else "fp32"
