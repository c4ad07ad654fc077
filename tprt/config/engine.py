"""How an engine runs a model; independent of which model it is."""

from dataclasses import dataclass
from typing import Literal

from tprt.config.model import ModelConfig
from tprt.errors import ConfigError

DTYPES = ("bfloat16", "float32", "float16")
KERNELS = ("auto", "reference", "triton")
# Which ids get no rows in embedding and head: none, what the tokenizer says is unused, or ranges of a
# first and a last id.
TrimVocab = Literal["off", "reserved"] | tuple[tuple[int, int], ...]
DTYPE_ALIASES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs a model; independent of which model it is.

    Args:
        dtype: of weights, activations and KV cache: bfloat16, float32 or float16.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most tokens in one step, of prompts and completions together.
        max_model_len: most tokens of prompt and completion; None means the model's own limit.
        block_size: tokens per KV block; where state is kept per sequence, snapshots of it stand at
            whole blocks.
        kv_cache_memory: bytes of KV cache per rank, or of all state and its snapshots; None means, on
            a CPU, 1 GiB, or 256 MiB of snapshots, and on a GPU what gpu_memory_utilization leaves after
            the weights.
        enable_prefix_caching: requests that begin alike share KV blocks, or start from a snapshot.
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

    def resolve_max_model_len(self, model: ModelConfig) -> int:
        """max_model_len, or what the model was trained on; ConfigError when it has no such positions."""
        limit = model.max_position_embeddings
        if model.is_bounded and self.max_model_len is not None and self.max_model_len > limit:
            raise ConfigError(
                f"max_model_len is {self.max_model_len}; the model has positions for {limit}",
                hint=f"a value up to {limit}",
            )
        return self.max_model_len or limit


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
