"""Plain frozen values that describe a model and an engine.

Foreign configurations (Hugging Face's ``config.json``, Megatron's ``args``) are translated at the
door, here; nothing behind it asks a config for a key that may be missing. This file knows no tensor,
no file and no rank.
"""

from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

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
# Layers and heads are looped over, so a file must not choose them freely.
MAX_COUNTS = {"num_hidden_layers": 4096, "num_attention_heads": 65536}
MAX_COUNT = 2**31 - 1  # of any other size
DTYPES = ("bfloat16", "float32", "float16")
KERNELS = ("auto", "reference", "triton")
# Which ids get no rows in embedding and head: none, what the tokenizer says is unused, or ranges of a
# first and a last id.
TrimVocab = Literal["off", "reserved"] | tuple[tuple[int, int], ...]
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
            "num_attention_heads", "head_dim", "max_position_embeddings", "vocab_padding_multiple",
        ):  # fmt: skip
            _count(name, getattr(self, name))
        for name in ("layer_norm_eps", "rope_theta", "partial_rotary_factor"):
            object.__setattr__(self, name, _positive(name, getattr(self, name)))
        _one_of("qk_layernorm", self.qk_layernorm, get_args(QKLayerNorm))
        _one_of("rotary_precision", self.rotary_precision, (None, *get_args(RotaryPrecision)))
        if not isinstance(self.tie_word_embeddings, bool):
            _refuse_flag("tie_word_embeddings", self.tie_word_embeddings)
        if self.eos_token_id is not None and type(self.eos_token_id) is not int:
            raise CheckpointError(
                f"eos_token_id is {_shown(self.eos_token_id)}", hint="a whole number or null"
            )
        if self.num_attention_heads * self.head_dim != self.hidden_size:
            raise CheckpointError(
                f"{self.num_attention_heads} heads of width {self.head_dim} do not make up "
                f"hidden_size {self.hidden_size}",
                hint=_CONFIG_HINT,
            )
        factor = self.partial_rotary_factor
        if factor > 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise CheckpointError(
                f"the rotary width, partial_rotary_factor {factor:g} of head width "
                f"{self.head_dim}, is not an even number from 2 to {self.head_dim}",
                hint=_CONFIG_HINT,
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
        rope = _mapping(raw, "rope_parameters")
        _refuse_hf(raw, rope)
        heads = _count("num_attention_heads", _need(raw, "num_attention_heads"))
        hidden = _count("hidden_size", _need(raw, "hidden_size"))
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
            head_dim=hidden // heads,
            max_position_embeddings=_need(raw, "max_position_embeddings"),
            layer_norm_eps=raw.get("layer_norm_eps", 1e-5),
            rope_theta=theta,
            partial_rotary_factor=factor,
            qk_layernorm="per_layer" if _flag(raw, "qk_layernorm", True) else "none",
            tie_word_embeddings=_flag(raw, "tie_word_embeddings", False),
            rotary_precision=raw.get("rotary_precision"),
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
                raise CheckpointError(
                    f"args.{name} is {_shown(found)}; Persimmon has {value!r}",
                    hint="a checkpoint of the Persimmon architecture",
                )
        heads = _count("num_attention_heads", _need(args, "num_attention_heads"))
        hidden = _count("hidden_size", _need(args, "hidden_size"))
        mode = args.get("qk_layernorm")
        if mode not in _QK_MODES:
            known = ", ".join(str(m) for m in _QK_MODES if m)
            raise CheckpointError(f"args.qk_layernorm is {_shown(mode)}", hint=f"one of {known}")
        multiple, tp = (
            _count(name, args.get(name) or default)
            for name, default in (
                ("make_vocab_size_divisible_by", 128), ("tensor_model_parallel_size", 1),
            )
        )  # fmt: skip
        context = args.get("max_position_embeddings") or _need(args, "seq_length")
        return cls(
            vocab_size=_need(args, "padded_vocab_size"),
            hidden_size=hidden,
            intermediate_size=args.get("ffn_hidden_size") or 4 * hidden,
            num_hidden_layers=_need(args, "num_layers"),
            num_attention_heads=heads,
            head_dim=args.get("kv_channels") or hidden // heads,
            max_position_embeddings=context,
            layer_norm_eps=args.get("layernorm_epsilon") or 1e-5,
            rope_theta=args.get("rotary_emb_base") or 25000.0,
            partial_rotary_factor=args.get("rotary_pct") or 0.5,
            qk_layernorm=_QK_MODES[mode],
            tie_word_embeddings=not _flag(args, "untie_embeddings", True),
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


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs a model; independent of which model it is.

    Args:
        dtype: of weights, activations and KV cache: bfloat16, float32 or float16.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most tokens in one step, of prompts and completions together.
        max_model_len: most tokens of prompt and completion; None means the model's own limit.
        block_size: tokens per KV block.
        kv_cache_memory: bytes of KV cache per rank; None means 1 GiB on a CPU, and on a GPU what
            gpu_memory_utilization leaves after the weights.
        enable_prefix_caching: share KV blocks between requests that begin alike.
        look_ahead: steps that are planned before the last one's tokens are read: 1, or 0 to wait.
        record_path: file that gets every step record, for replay; None writes none.
        kernels: "auto" (Triton on a GPU, torch's own on a CPU), "reference" (plain torch) or "triton".
        sparse_rows: most rows of a step for which down projections read only what meets something
            other than 0; None as measured for the device, 0 for never. A GPU does it up to 16, a CPU
            in float16 never.
        fuse_kernels: on a GPU, fewer and larger kernels per layer; false for one per operation.
        enforce_eager: launch decode steps operation by operation, without CUDA graphs.
        one_shot_all_reduce: let ranks with NVLink sum small messages in one kernel of our own, fused
            with bias, residual and LayerNorm, instead of NCCL.
        step_timeout: seconds a step may take, on any device, before the ranks are given up.
        load_timeout: seconds without progress while weights are loaded before a rank is given up.
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
    enable_prefix_caching: bool = True
    look_ahead: int = 1
    record_path: str | None = None
    kernels: str = "auto"
    sparse_rows: int | None = None
    fuse_kernels: bool = True
    enforce_eager: bool = False
    one_shot_all_reduce: bool = True
    step_timeout: float = 60.0
    load_timeout: float = 600.0
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
                raise ConfigError(
                    f"{name} must be a positive whole number, not {value!r}", hint="1 or more"
                )
        if self.look_ahead not in (0, 1) or isinstance(self.look_ahead, bool):
            raise ConfigError(f"look_ahead is {self.look_ahead!r}", hint="0 or 1")
        flags = ("enable_prefix_caching", "enforce_eager", "one_shot_all_reduce", "fuse_kernels")
        for name in flags:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}", hint="true or false")
        if self.kernels not in KERNELS:
            raise ConfigError(f"kernels is {self.kernels!r}", hint=f"one of {', '.join(KERNELS)}")
        rows = self.sparse_rows
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 0):
            raise ConfigError(
                f"sparse_rows is {rows!r}", hint="a number of rows, 0 for never, or leave it out"
            )
        for name, usual in (("step_timeout", "60"), ("load_timeout", "600")):
            seconds = getattr(self, name)
            number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
            if not number or not 0 < seconds < 1e9:
                raise ConfigError(
                    f"{name} is {seconds!r}, allowed are above 0 to 1e9 seconds", hint=usual
                )
        if self.record_path is not None and not isinstance(self.record_path, str):
            raise ConfigError(f"record_path is {self.record_path!r}", hint="a file name")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed must be a whole number, not {self.seed!r}", hint="0")
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(
                f"gpu_memory_utilization is {share!r}, allowed are above 0 to 1", hint="0.9"
            )

    @property
    def kernel_choice(self) -> tuple[str, int | None, bool]:
        """What ``kernels.use_kernels`` is told."""
        return self.kernels, self.sparse_rows, self.fuse_kernels

    def resolve_max_model_len(self, limit: int) -> int:
        """max_model_len, or ``limit``, the model's own; ConfigError when it is above that."""
        if self.max_model_len is not None and self.max_model_len > limit:
            raise ConfigError(
                f"max_model_len is {self.max_model_len}; the model has positions for {limit}",
                hint=f"a value up to {limit}",
            )
        return self.max_model_len or limit


def default_rotary_precision(layout: str) -> RotaryPrecision:
    """What a layout's own code computes where a checkpoint does not say: Megatron rotates in bf16."""
    return "bf16" if layout == "megatron" else "fp32"


def parse_trim_vocab(value: object) -> TrimVocab:
    """``off``, ``reserved`` or a list of pairs as a ``TrimVocab``.

    Raises:
        ValueError: another value; says what it must be.
    """
    if value == "off" or value == "reserved":
        return value
    if isinstance(value, list | tuple) and value:
        pairs = [tuple(pair) if isinstance(pair, list | tuple) else () for pair in value]
        if all(len(pair) == 2 and all(type(i) is int for i in pair) for pair in pairs):
            return tuple((first, last) for first, last in pairs)
    raise ValueError(
        "must be off, reserved or ranges of a first and a last id such as [[3, 70002]]"
    )


_CONFIG_HINT = "the configuration as it came with the weights"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _need(raw: dict[str, Any], name: str) -> Any:
    if raw.get(name) is None:
        raise CheckpointError(f"the model's configuration has no {name!r}", hint=_CONFIG_HINT)
    return raw[name]


def _count(name: str, value: object) -> int:
    limit = MAX_COUNTS.get(name, MAX_COUNT)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"{name} must be a positive whole number, not {_shown(value)}", hint=_CONFIG_HINT
        )
    if value > limit:
        raise CheckpointError(f"{name} is {_shown(value)}; the limit is {limit}", hint=_CONFIG_HINT)
    return value


def _positive(name: str, value: object) -> float:
    # The bound keeps infinities out, and whole numbers that no float can hold; NaN compares false.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e300:
        raise CheckpointError(
            f"{name} must be a positive number, not {_shown(value)}", hint=_CONFIG_HINT
        )
    return float(value)


def _one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        names = " or ".join(str(k) for k in known if k is not None)
        raise CheckpointError(f"{name} is {_shown(value)}", hint=names)


def _flag(raw: dict[str, Any], name: str, default: bool) -> bool:
    """None means what a missing key means."""
    value = raw.get(name)
    if value is None:
        return default
    return value if isinstance(value, bool) else _refuse_flag(name, value)


def _refuse_flag(name: str, value: object) -> NoReturn:
    raise CheckpointError(f"{name} is {_shown(value)}", hint="true or false")


def _mapping(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} must be a mapping, not {_shown(value)}", hint="{} or null")
    return value


def _single_id(value: object) -> int | None:
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _refuse_hf(raw: dict[str, Any], rope: dict[str, Any]) -> None:
    kind = raw.get("model_type", "persimmon")
    if kind != "persimmon":
        raise CheckpointError(
            f"model_type is {_shown(kind)}, which is not implemented", hint="persimmon"
        )
    if raw.get("hidden_act", "relu2") != "relu2":
        raise CheckpointError(
            f"hidden_act is {_shown(raw['hidden_act'])}; Persimmon has 'relu2'",
            hint="a checkpoint of the Persimmon architecture",
        )
    # Both spellings may stand in both mappings; one left unseen would be run unscaled.
    scaling = _mapping(raw, "rope_scaling")
    for name, mapping in (("rope_parameters", rope), ("rope_scaling", scaling)):
        for key in ("rope_type", "type"):
            kind = mapping.get(key)
            if kind is not None and kind != "default":
                raise CheckpointError(
                    f"rope scaling of kind {_shown(kind)} ({name}.{key}) is not implemented",
                    hint="a checkpoint trained without rope scaling",
                )
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            f"weights quantized by {_shown(method or quantization)} are not implemented",
            hint="the unquantized checkpoint",
        )
