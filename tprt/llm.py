"""The library face: ``LLM`` opens a checkpoint, builds this rank's part of the model, generates.

Under a launcher every rank makes the same calls; only rank 0's requests count and results are
returned on every rank. It changes neither the caller's random state, environment, signal handlers,
root logger nor stdout. Knows no command line and no HTTP.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch

import tprt
from tprt.checkpoint import CheckpointReader, load_weights, open_checkpoint
from tprt.config import EngineConfig, RotaryPrecision, default_rotary_precision
from tprt.distributed.communication import broadcast_json, gather_json
from tprt.distributed.tp_group import init_tp_group, launched_size
from tprt.engine.llm_engine import LLMEngine, Progress
from tprt.engine.model_runner import ModelRunner
from tprt.engine.noise import arrival_seed
from tprt.engine.outputs import RequestOutput
from tprt.engine.sequence import Request
from tprt.errors import (
    ConfigError,
    OutOfMemoryPlan,
    RankMismatch,
    TokenizerError,
    TprtError,
    out_of_memory,
)
from tprt.log import get_logger
from tprt.models import get_model_class
from tprt.sampling_params import SamplingParams
from tprt.tokenizer import Tokenizer, check_vocab, eos_warnings, render_chat

logger = get_logger(__name__)
T = TypeVar("T")

Prompt = str | dict[str, Any]
GIB = 2**30
CPU_KV_CACHE_MEMORY = 1 * GIB


class LLM:
    """A model ready to generate, on this rank and its peers.

    Args:
        model: a release folder, an ``iter_*`` folder, a Hugging Face or presharded folder, or a hub id.
        tokenizer: path of the sentencepiece model; None takes the one beside the checkpoint.
        dtype: "bfloat16", "float32" or "float16".
        rotary_precision: "bf16" as Adept's inference, "fp32" as Hugging Face; "auto" takes what the
            checkpoint says, else bf16 for Megatron checkpoints and fp32 for Hugging Face folders.
        verify: "full" also checks checksums, "sizes" only what names and headers say.
        bos_policy: "none" as Adept, "bos" as Hugging Face, which begins every text with |ENDOFTEXT|.
        group: a process group or one-dimensional DeviceMesh to cut the model over; None is the world.
        device: where to compute; None is this rank's GPU, else the CPU.
        **engine: the other fields of ``EngineConfig``.

    Raises:
        ConfigError, CheckpointError, TokenizerError: before any process group is made, where names
            and headers suffice.
        RankMismatch: ranks were given different models or settings.
        OutOfMemoryPlan: no room for a KV cache.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        dtype: str = "bfloat16",
        rotary_precision: RotaryPrecision | Literal["auto"] = "auto",
        verify: Literal["sizes", "full"] = "sizes",
        bos_policy: Literal["none", "bos"] = "none",
        group: Any = None,
        device: torch.device | str | None = None,
        **engine: Any,
    ) -> None:
        began = time.perf_counter()
        self.engine_config = _engine_config(dtype, engine)
        reader = open_checkpoint(str(model), verify=verify)
        self.config = reader.config
        self.rotary_precision = resolve_rotary_precision(reader, rotary_precision)
        self.tokenizer = open_tokenizer(reader, tokenizer, bos_policy)
        self.num_valid_ids = check_vocab(
            self.tokenizer,
            self.config.vocab_size,
            self.config.vocab_padding_multiple,
            str(reader.path),
        )
        if group is None:
            self.config.validate_parallel(launched_size())
        self.max_model_len = self.engine_config.resolve_max_model_len(
            self.config.max_position_embeddings
        )

        self.tp = init_tp_group(group, device)
        try:
            self._check_ranks_agree(reader)
            self._build(reader)
        except BaseException:
            self.tp.close()
            raise
        self._arrivals = 0
        for warning in [*reader.warnings, *eos_warnings(self.tokenizer, self.config.eos_token_id)]:
            logger.warning("%s", warning)
        logger.info(
            "%s checkpoint (TP=%d on disk) on %d x %s in %s, rotary %s; %.1f MB read by rank 0; "
            "%d KV blocks of %d tokens; ready in %.1f s",
            reader.layout,
            reader.disk_tp,
            self.tp.size,
            self.tp.device.type,
            self.engine_config.dtype,
            self.rotary_precision,
            reader.bytes_read / 1e6,
            self._engine.allocator.capacity,
            self.engine_config.block_size,
            time.perf_counter() - began,
        )

    def _build(self, reader: CheckpointReader) -> None:
        dtype, block_size = getattr(torch, self.engine_config.dtype), self.engine_config.block_size

        def load() -> Any:
            model = get_model_class(self.config.model_type)(
                self.config, self.tp, dtype, self.rotary_precision, self.max_model_len
            ).eval()
            load_weights(model, reader)
            return model

        model = self._together(load)
        bytes_per_token = sum(spec.bytes_per_token(dtype) for spec in model.cache_spec())
        num_blocks = self._agree_on_blocks(bytes_per_token * block_size)
        runner = self._together(
            lambda: ModelRunner(
                model,
                self.tp,
                dtype,
                num_blocks,
                block_size,
                self.num_valid_ids,
                self.tokenizer.eod_id,
            )
        )
        self._running: LLMEngine | None = LLMEngine(
            runner, self.tokenizer, self.engine_config, num_blocks, self.tp
        )

    @property
    def _engine(self) -> LLMEngine:
        if self._running is None:
            raise ConfigError("this LLM is closed", hint="make another one")
        return self._running

    def _agree_on_blocks(self, bytes_per_block: int) -> int:
        """KV blocks every rank can hold: the minimum over ranks, at most what requests can use."""
        engine, block_size = self.engine_config, self.engine_config.block_size
        memory = engine.kv_cache_memory or CPU_KV_CACHE_MEMORY
        if engine.kv_cache_memory is None and self.tp.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.tp.device)
            memory = int(free - (1 - engine.gpu_memory_utilization) * total)
        usable = engine.max_num_seqs * -(-self.max_model_len // block_size)
        blocks = min([int(n) for n in gather_json(memory // bytes_per_block, self.tp)] + [usable])
        if blocks < 1:
            raise OutOfMemoryPlan(
                f"{memory / 1e6:.1f} MB for the KV cache hold no block of {block_size} tokens "
                f"({bytes_per_block / 1e6:.1f} MB)",
                hint="a larger kv_cache_memory, more ranks, or a smaller block_size",
            )
        return blocks + 1  # block 0 belongs to padding

    def _check_ranks_agree(self, reader: CheckpointReader) -> None:
        """Compare what every rank was given before the first collective that depends on it."""
        mine = {
            "model": repr(self.config),
            "layout": reader.layout,
            "rotary_precision": self.rotary_precision,
            "tokenizer": self.tokenizer.sha256,
            "engine": repr(self.engine_config),
            "num_valid_ids": self.num_valid_ids,
            "tprt": tprt.__version__,
            "torch": torch.__version__,
            "device": self.tp.device.type,
        }
        everyone = gather_json(mine, self.tp)
        for field, value in everyone[0].items():
            for rank, other in enumerate(everyone):
                if other[field] != value:
                    raise RankMismatch(
                        f"ranks 0 and {rank} were started with different {field}: "
                        f"{value!r} and {other[field]!r}",
                        hint="start every rank with the same model and settings",
                    )

    def _together(self, work: Callable[[], T]) -> T:
        """``work()`` on every rank; if it fails anywhere, all raise the error of the first rank."""
        value, error = _attempt(work)
        if error is not None and self.tp.size > 1:
            error.where = f"rank {self.tp.rank}, {error.where}"
        for failed in gather_json(error and error.to_json(), self.tp):
            if failed is not None:
                raise TprtError.from_json(failed) from error
        assert value is not None
        return value

    def _from_rank0(self, make: Callable[[], T]) -> T:
        """``make()`` of rank 0 on every rank; an error of rank 0 is raised on every rank."""
        value, error = _attempt(make) if self.tp.rank == 0 else (None, None)
        answer = broadcast_json({"value": value, "error": error and error.to_json()}, self.tp)
        if answer["error"] is not None:
            raise TprtError.from_json(answer["error"]) from error
        return answer["value"]

    @property
    def max_request_len(self) -> int:
        """Most tokens of prompt and completion that model and cache can hold."""
        cached = self._engine.allocator.capacity * self.engine_config.block_size
        return min(self.max_model_len, cached)

    def make_request(self, prompt: Prompt, params: SamplingParams, arrival: int = 0) -> Request:
        """Turn a prompt into ids and check that it can ever fit. Local to this rank.

        Args:
            prompt: a text, ``{"prompt": text}``, ``{"prompt_token_ids": [...]}`` or
                ``{"messages": [...]}``.

        Raises:
            ConfigError: the prompt has another form, no tokens, an id out of range, or together with
                max_tokens is longer than the model or the cache allows.
        """
        ids = self._prompt_ids(prompt)
        if not ids:
            raise ConfigError("the prompt has no tokens", hint="a text, or bos_policy=bos")
        limit = self.max_request_len
        room = limit - len(ids)
        max_tokens = room if params.max_tokens is None else params.max_tokens
        if room < 1 or max_tokens > room:
            wanted = "" if params.max_tokens is None else f" and max_tokens {params.max_tokens}"
            raise ConfigError(
                f"{len(ids)} prompt tokens{wanted} are more than the {limit} that fit",
                hint="a shorter prompt, fewer max_tokens, or a larger max_model_len or KV cache",
            )
        seed = params.seed
        if seed is None:
            seed = arrival_seed(self.engine_config.seed, arrival)
        return Request(ids, params, max_tokens, seed)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, dict) and len(prompt) == 1:
            (kind, value), *_ = prompt.items()
            if kind == "prompt" and isinstance(value, str):
                return self.tokenizer.encode(value)
            if kind == "messages":
                return self.tokenizer.encode(render_chat(value))
            if kind == "prompt_token_ids":
                return self._check_ids(value)
        raise ConfigError(
            f"a prompt must be a text or a mapping, not {str(prompt)[:80]!r}",
            hint='a text, or {"prompt": ...}, {"prompt_token_ids": ...} or {"messages": ...}',
        )

    def _check_ids(self, ids: Any) -> list[int]:
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(ids, list | tuple) or not all(type(i) is int for i in ids):
            raise ConfigError(
                f"token ids must be a list of whole numbers, not {str(ids)[:80]!r}",
                hint="for example [5, 6, 7]",
            )
        wrong = [i for i in ids if not 0 <= i < self.num_valid_ids]
        if wrong:
            raise ConfigError(
                f"token id {wrong[0]} is outside the vocabulary of {self.num_valid_ids}",
                hint="ids of this model's own tokenizer",
            )
        return list(ids)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; results in input order, the same on every rank.

        Args:
            prompts: one prompt or a list (see ``make_request``); ignored on ranks above 0.
            sampling_params: one for all prompts, or one for each; None means the defaults.
            progress: called on rank 0 after each pass with (finished sequences, tokens so far).

        Raises:
            ConfigError: a prompt or parameter is wrong; on every rank, and nothing was generated.
        """

        def make() -> list[list[Any]]:
            pairs = _pair(prompts, sampling_params)
            requests = [
                self.make_request(prompt, params, self._arrivals + i)
                for i, (prompt, params) in enumerate(pairs)
            ]
            return [[r.prompt_token_ids, vars(r.params), r.max_tokens, r.seed] for r in requests]

        rows = self._from_rank0(make)
        requests = [Request(i, SamplingParams.from_dict(p), m, s) for i, p, m, s in rows]
        self._arrivals += len(requests)
        outputs = self._engine.generate(requests, progress if self.tp.rank == 0 else None)
        sent = broadcast_json([o.to_json() for o in outputs or []], self.tp)
        return outputs if outputs is not None else [RequestOutput.from_json(o) for o in sent]

    def logits(self, token_ids: Sequence[int] | None) -> torch.Tensor:
        """Logits at every position, float32 [T, vocab_size], the same on every rank.

        Raises:
            ConfigError: no ids, an id out of range, or more than the model or cache can hold.
        """

        def make() -> list[int]:
            ids = self._check_ids(token_ids)
            if not 1 <= len(ids) <= self.max_request_len:
                raise ConfigError(
                    f"logits of {len(ids)} tokens asked, allowed are 1 to {self.max_request_len}",
                    hint="a shorter text, or a larger max_model_len or kv_cache_memory",
                )
            return ids

        return self._engine.logits(self._from_rank0(make))

    def close(self) -> None:
        """Free the model and cache, and the process groups made for it. Safe to call twice."""
        if self._running is not None:
            self._running = None
            self.tp.close()
            if self.tp.device.type == "cuda":
                torch.cuda.empty_cache()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _attempt(work: Callable[[], T]) -> tuple[T | None, TprtError | None]:
    """The value or the error of ``work``, so that peers that wait can be told before it is raised."""
    try:
        return work(), None
    except TprtError as error:
        return None, error
    except Exception as error:
        told = out_of_memory(error) or TprtError(f"{type(error).__name__}: {error}")
        told.__cause__ = error
        return None, told


def _engine_config(dtype: str, engine: dict[str, Any]) -> EngineConfig:
    try:
        return EngineConfig(dtype=dtype, **engine)
    except TypeError as error:
        known = ", ".join(EngineConfig.__dataclass_fields__)
        raise ConfigError(f"LLM: {error}", hint=f"engine settings are {known}") from None


def _pair(
    prompts: Prompt | Sequence[Prompt] | None,
    params: SamplingParams | Sequence[SamplingParams] | None,
) -> list[tuple[Prompt, SamplingParams]]:
    if isinstance(prompts, str | dict):
        prompts = [prompts]
    if not isinstance(prompts, list | tuple):
        raise ConfigError(
            f"rank 0 was given {type(prompts).__name__} for prompts", hint="one prompt, or a list"
        )
    if params is None or isinstance(params, SamplingParams):
        return [(prompt, params or SamplingParams()) for prompt in prompts]
    if not isinstance(params, list | tuple) or not all(
        isinstance(p, SamplingParams) for p in params
    ):
        raise ConfigError(
            f"sampling_params must be SamplingParams, not {str(params)[:80]!r}",
            hint="SamplingParams(temperature=0.0), or one for each prompt",
        )
    if len(params) != len(prompts):
        raise ConfigError(
            f"{len(params)} sampling parameters for {len(prompts)} prompts", hint="as many of each"
        )
    return list(zip(prompts, params, strict=True))


def resolve_rotary_precision(
    reader: CheckpointReader, asked: RotaryPrecision | Literal["auto"]
) -> RotaryPrecision:
    """What was asked, else what the checkpoint says, else what its layout's own code does."""
    if asked not in ("auto", "bf16", "fp32"):
        raise ConfigError(f"rotary_precision is {asked!r}", hint="auto, bf16 or fp32")
    if asked != "auto":
        return asked
    return reader.config.rotary_precision or default_rotary_precision(reader.layout)


def open_tokenizer(
    reader: CheckpointReader, path: str | Path | None, bos_policy: Literal["none", "bos"]
) -> Tokenizer:
    """The tokenizer at ``path``, or the one beside the checkpoint."""
    found = Path(path) if path is not None else reader.tokenizer_path
    if found is None:
        raise TokenizerError(
            "no sentencepiece model beside the checkpoint",
            where=str(reader.path),
            hint="put adept_vocab.model there, or name it with --tokenizer",
        )
    return Tokenizer(found, bos_policy=bos_policy)
