"""What a RecurrentGemma model is, from Hugging Face's ``config.json``."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from tprt.config.checks import (
    CONFIG_HINT,
    check_rotary,
    count,
    flag,
    mapping,
    need,
    positive,
    refuse_unsupported,
    shown,
    single_id,
)
from tprt.config.model import ModelConfig
from tprt.errors import CheckpointError

LayerType = Literal["recurrent", "attention"]
CYCLE: tuple[LayerType, ...] = ("recurrent", "recurrent", "attention")
TRAINED_POSITIONS = 8192
# More ranks than divide the heads, up to here, each with some heads of zeros.
PADDED_SIZES = (2, 4, 8)
MAX_CONV_WIDTH, MAX_WINDOW = 16, 2**20


@dataclass(frozen=True, kw_only=True)
class RecurrentGemmaConfig(ModelConfig):
    """Sizes of a RecurrentGemma model.

    Args:
        intermediate_size: width of the MLP between its gate and its output; half of what Hugging
            Face's file says.
        lru_width: channels of the recurrence, a gate block for each of ``num_attention_heads`` heads.
        conv1d_width: taps of the causal convolution.
        layer_types: of all layers, in order.
        attention_window_size: of the checkpoint's config.
        window_keys: keys that a query sees, its own included; None is ``attention_window_size`` + 1, as
            the model was trained. ``attention_window_size`` is what Hugging Face's code computes.
        max_position_embeddings: trained on so many positions; more are no error.
    """

    lru_width: int
    layer_types: tuple[LayerType, ...]
    conv1d_width: int = 4
    attention_window_size: int = 2048
    window_keys: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    logits_soft_cap: float = 30.0
    tie_word_embeddings: bool = True

    model_type: ClassVar[str] = "recurrent_gemma"
    is_bounded: ClassVar[bool] = False
    overrides: ClassVar[dict[str, tuple[Any, ...]]] = {"window_keys": ()}

    def __post_init__(self) -> None:
        super().__post_init__()
        count("lru_width", self.lru_width)
        limits = {"conv1d_width": MAX_CONV_WIDTH, "attention_window_size": MAX_WINDOW}
        for name, limit in limits.items():
            if count(name, getattr(self, name)) > limit:
                raise CheckpointError(
                    f"{name} is {getattr(self, name)}; the limit is {limit}", hint=CONFIG_HINT
                )
        for name in ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "logits_soft_cap"):
            object.__setattr__(self, name, positive(name, getattr(self, name)))
        trained = self.attention_window_size + 1
        if self.window_keys is None:
            object.__setattr__(self, "window_keys", trained)
        if type(self.window_keys) is not int or not 2 <= self.window_keys <= trained:
            raise CheckpointError(
                f"window_keys is {shown(self.window_keys)}, allowed are 2 to {trained}",
                hint=f"{trained} as trained, {trained - 1} as Hugging Face's code",
            )
        object.__setattr__(self, "layer_types", _kinds("layer_types", self.layer_types))
        if len(self.layer_types) != self.num_hidden_layers:
            raise CheckpointError(
                f"there are {len(self.layer_types)} layer types for {self.num_hidden_layers} layers",
                hint=CONFIG_HINT,
            )
        if not self.tie_word_embeddings:
            raise CheckpointError("the head is not tied to the embedding", hint=CONFIG_HINT)
        if self.lru_width % self.num_attention_heads:
            raise CheckpointError(
                f"lru_width {self.lru_width} is not made up of {self.num_attention_heads} blocks",
                hint=CONFIG_HINT,
            )
        check_rotary(self.head_dim, self.partial_rotary_factor)

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def in_words(self) -> str:
        recurrent = self.layer_types.count("recurrent")
        return (
            f"{recurrent} recurrent and {len(self.layer_types) - recurrent} attention layers, window of "
            f"{self.window_keys} keys"
        )

    @property
    def block_width(self) -> int:
        """Channels of one gate block."""
        return self.lru_width // self.num_attention_heads

    def tp_sizes(self) -> list[int]:
        """Sizes that divide the heads, and those for which heads of zeros are added."""
        heads, ffn = self.num_attention_heads, self.intermediate_size
        even = {n for n in range(1, heads + 1) if heads % n == 0}
        padded = {n for n in PADDED_SIZES if n <= heads}
        return sorted(n for n in even | padded if ffn % n == 0)

    def padded_heads(self, tp_size: int) -> int:
        """Heads of all ranks together, those of zeros included."""
        return -(-self.num_attention_heads // tp_size) * tp_size

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, ffn, width = self.hidden_size, self.intermediate_size, self.lru_width
        heads, block, head_dim = self.num_attention_heads, self.block_width, self.head_dim
        mixers: dict[str, dict[str, tuple[int, ...]]] = {
            "recurrent": {
                "linear_y.weight": (width, hidden),
                "linear_y.bias": (width,),
                "linear_x.weight": (width, hidden),
                "linear_x.bias": (width,),
                "linear_out.weight": (hidden, width),
                "linear_out.bias": (hidden,),
                "conv_1d.weight": (width, 1, self.conv1d_width),
                "conv_1d.bias": (width,),
                "rg_lru.recurrent_param": (width,),
                "rg_lru.input_gate_weight": (heads, block, block),
                "rg_lru.input_gate_bias": (heads, block),
                "rg_lru.recurrent_gate_weight": (heads, block, block),
                "rg_lru.recurrent_gate_bias": (heads, block),
            },
            "attention": {
                "q_proj.weight": (heads * head_dim, hidden),
                "k_proj.weight": (head_dim, hidden),
                "v_proj.weight": (head_dim, hidden),
                "o_proj.weight": (hidden, heads * head_dim),
                "o_proj.bias": (hidden,),
            },
        }
        rest: dict[str, tuple[int, ...]] = {
            "channel_pre_norm.weight": (hidden,),
            "mlp_block.gate_proj.weight": (ffn, hidden),
            "mlp_block.gate_proj.bias": (ffn,),
            "mlp_block.up_proj.weight": (ffn, hidden),
            "mlp_block.up_proj.bias": (ffn,),
            "mlp_block.down_proj.weight": (hidden, ffn),
            "mlp_block.down_proj.bias": (hidden,),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden)
        }
        for index, kind in enumerate(self.layer_types):
            mixer = {f"temporal_block.{name}": shape for name, shape in mixers[kind].items()}
            layer = {"temporal_pre_norm.weight": (hidden,)} | mixer | rest
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        return shapes | {"model.final_norm.weight": (hidden,)}

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "RecurrentGemmaConfig":
        """From ``config.json`` in the spelling of transformers 4.x or 5.x.

        Raises:
            CheckpointError: a key is missing or malformed, or asks for what is not implemented
                (several key heads, another activation, biases of q, k and v, quantized weights).
        """
        rope = mapping(raw, "rope_parameters")
        refuse_unsupported(raw, rope)
        layers = count("num_hidden_layers", need(raw, "num_hidden_layers"))
        heads = count("num_attention_heads", need(raw, "num_attention_heads"))
        hidden = count("hidden_size", need(raw, "hidden_size"))
        wanted = {
            # Hugging Face's class means as many as there are queries where it is missing.
            "num_key_value_heads": (raw.get("num_key_value_heads", heads), 1),
            "hidden_activation": (raw.get("hidden_activation"), "gelu_pytorch_tanh"),
            "attention_bias": (raw.get("attention_bias"), False),
            "embeddings_scale_by_sqrt_dim": (raw.get("embeddings_scale_by_sqrt_dim"), True),
        }
        for name, (found, known) in wanted.items():
            if found is not None and (found != known or type(found) is not type(known)):
                raise CheckpointError(
                    f"{name} is {shown(found)}, RecurrentGemma has {known!r}", hint=CONFIG_HINT
                )
        # The 2B and 9B releases hold twice the width: that of gate and up together.
        doubled = count("intermediate_size", need(raw, "intermediate_size"))
        if doubled % 2:
            raise CheckpointError(
                f"intermediate_size is {doubled}, not gate and up of one width", hint=CONFIG_HINT
            )

        def given(name: str, default: Any) -> Any:
            found = rope.get(name)
            found = raw.get(name) if found is None else found
            return default if found is None else found

        return cls(
            vocab_size=need(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=doubled // 2,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            head_dim=given("head_dim", hidden // heads),
            max_position_embeddings=given("max_position_embeddings", TRAINED_POSITIONS),
            lru_width=given("lru_width", hidden),
            layer_types=_layer_types(raw, layers),
            conv1d_width=given("conv1d_width", 4),
            attention_window_size=given("attention_window_size", 2048),
            window_keys=raw.get("window_keys"),
            rms_norm_eps=given("rms_norm_eps", 1e-6),
            rope_theta=given("rope_theta", 10000.0),
            partial_rotary_factor=given("partial_rotary_factor", 0.5),
            logits_soft_cap=given("logits_soft_cap", 30.0),
            tie_word_embeddings=flag(raw, "tie_word_embeddings", True),
            eos_token_id=single_id(raw.get("eos_token_id")),
        )

    def to_hf(self) -> dict[str, Any]:
        """A ``config.json`` that both spellings of transformers read."""
        raw: dict[str, Any] = {
            "architectures": ["RecurrentGemmaForCausalLM"],
            "model_type": self.model_type,
            "hidden_activation": "gelu_pytorch_tanh",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": 2 * self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": 1,
            "head_dim": self.head_dim,
            "lru_width": self.lru_width,
            "conv1d_width": self.conv1d_width,
            "attention_window_size": self.attention_window_size,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": self.partial_rotary_factor,
            "logits_soft_cap": self.logits_soft_cap,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "block_types": list(self.layer_types),
            "_block_types": list(self.layer_types),
        }
        if self.max_position_embeddings != TRAINED_POSITIONS:
            raw["max_position_embeddings"] = self.max_position_embeddings
        if self.window_keys != self.attention_window_size + 1:
            raw["window_keys"] = self.window_keys
        if self.eos_token_id is not None:
            raw["eos_token_id"] = self.eos_token_id
        return raw


def _layer_types(raw: dict[str, Any], layers: int) -> tuple[LayerType, ...]:
    """A cycle of kinds, repeated and cut off; the releases spell its name in two ways."""
    cycle = raw.get("block_types")
    if cycle is None:
        cycle = raw.get("_block_types")
    if cycle is None:
        cycle = list(CYCLE)
    kinds = _kinds("block_types", cycle)
    return tuple(kinds[i % len(kinds)] for i in range(layers))


def _kinds(name: str, value: object) -> tuple[LayerType, ...]:
    """Of layers; a list where they come from JSON."""
    known = get_args(LayerType)
    if not isinstance(value, list | tuple) or not value or any(k not in known for k in value):
        raise CheckpointError(f"{name} is {shown(value)}", hint=f"a list of {' and '.join(known)}")
    return tuple(value)
