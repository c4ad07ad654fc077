"""What ranks settle before a model runs: the same settings, or the same error.

Knows checkpoints, configs and ranks; the library face puts it together.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

import torch
from torch.distributed.distributed_c10d import PrefixStore

from tprt.checkpoint import CheckpointReader
from tprt.config import CONFIG_CLASSES, EngineConfig, ModelConfig, parse_trim_vocab
from tprt.distributed.communication import gather_json
from tprt.distributed.failure import Failure
from tprt.distributed.self_test import check_captured_collectives
from tprt.distributed.tp_group import TPGroup
from tprt.distributed.verdict import Limits
from tprt.distributed.vocabulary import Vocabulary
from tprt.distributed.watch import Watch
from tprt.engine.digest import FIELDS
from tprt.engine.step_record import MAX_BUCKET
from tprt.errors import (
    ConfigError,
    OutputError,
    RankMismatch,
    TokenizerError,
    TprtError,
    out_of_memory,
)
from tprt.log import get_logger
from tprt.tokenizer import Tokenizer

logger = get_logger(__name__)

# Up to here one kernel beats NCCL on 8 GPUs of one host and below; its programs, one per row, must all
# be on the GPU at once.
ONE_SHOT_BYTES, ONE_SHOT_ROWS = 512 * 2**10, 64
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
T = TypeVar("T")


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is set of the engine, and of the model's own config, where "auto" and None set nothing."""
    own = {name for cls in CONFIG_CLASSES.values() for name in cls.overrides}
    engine = {name: value for name, value in options.items() if name not in own}
    overrides = {
        name: value
        for name, value in options.items()
        if name in own and value is not None and value != "auto"
    }
    return engine, overrides


def engine_config(dtype: str, engine: dict[str, Any]) -> EngineConfig:
    try:
        return EngineConfig(dtype=dtype, **engine)
    except TypeError as error:
        what = str(error).replace("EngineConfig.__init__()", "LLM()")
        known = ", ".join(EngineConfig.__dataclass_fields__)
        hint = f"the arguments of LLM, or engine settings: {known}"
        raise ConfigError(what, hint=hint) from None


def resolve_config(reader: CheckpointReader, options: dict[str, Any]) -> ModelConfig:
    """The model as it is going to run: as asked, else as the checkpoint says, else as its layout's own
    code has it.

    Args:
        options: fields of the model's config among other things; see ``split_options``.

    Raises:
        ConfigError: this model has no such field, or not with this value.
    """
    overrides = split_options(options)[1]
    return reader.config.with_overrides(overrides).settled(reader.layout)


def open_tokenizer(
    reader: CheckpointReader, path: str | Path | None, bos_policy: Literal["auto", "none", "bos"]
) -> Tokenizer:
    """The tokenizer at ``path``, or the one beside the checkpoint."""
    found = Path(path) if path is not None else reader.tokenizer_path
    if found is None:
        raise TokenizerError(
            "no sentencepiece model beside the checkpoint",
            where=str(reader.path),
            hint="put the sentencepiece model there, or name it with --tokenizer",
        )
    return Tokenizer(found, bos_policy=bos_policy)


def resolve_vocabulary(vocab_size: int, tokenizer: Tokenizer | None, asked: object) -> Vocabulary:
    """Which ids have rows, where ``model.trim_vocab`` is ``asked``.

    Args:
        vocab_size: rows on disk.
        tokenizer: None where there is none, which leaves ranges unchecked against its pieces.

    Raises:
        ConfigError: ``asked`` is malformed, names ids that are not there or must stay, or is
            ``reserved`` and the tokenizer proves no id unused.
    """
    try:
        trim = parse_trim_vocab(asked)
    except ValueError as error:
        raise ConfigError(f"trim_vocab {error}, not {asked!r:.80}", hint="off") from None
    if trim == "off":
        return Vocabulary(vocab_size)
    if trim == "reserved":
        if tokenizer is None:
            raise ConfigError(
                "model.trim_vocab=reserved needs the tokenizer, and there is none here",
                hint="model.tokenizer=FILE, or ranges such as model.trim_vocab=[[3, 70002]]",
            )
        return Vocabulary(vocab_size, (tokenizer.reserved_block(),))
    vocabulary = Vocabulary(vocab_size, trim)
    if tokenizer is not None:
        tokenizer.check_removable(vocabulary.removed)
    return vocabulary


def start_watch(tp: TPGroup, engine: EngineConfig, on_failure: Callable[[Failure], None]) -> Watch:
    """A watch over the ranks of ``tp`` alone, for a library: it raises, and ends no process."""
    store = PrefixStore("watch", tp.store.clone())
    limits = Limits(engine.step_timeout, engine.load_timeout)
    return Watch(store, tp.rank, tp.size, limits, on_failure, progress=tp.progress).start()


def check_ranks_agree(tp: TPGroup, facts: dict[str, Any]) -> None:
    """Compare what every rank was given before the first collective that depends on it."""
    everyone = gather_json(facts, tp)
    for field, value in everyone[0].items():
        for rank, other in enumerate(everyone):
            if other[field] != value:
                raise RankMismatch(
                    f"ranks 0 and {rank} were started with different {field}: "
                    f"{value!r} and {other[field]!r}",
                    hint="start every rank with the same model and settings",
                )


def settle_collectives(
    tp: TPGroup, engine: EngineConfig, hidden_size: int
) -> tuple[TPGroup, EngineConfig]:
    """Which bodies the collectives get, and whether CUDA graphs may hold them. Collective.

    What falls away at start falls away on every rank, and the log names the reason.
    """
    if tp.device.type != "cuda" or tp.size == 1:
        return tp, engine
    with torch.cuda.device(tp.device):  # kernels are launched on the current one
        return _settle(tp, engine, hidden_size)


def _settle(tp: TPGroup, engine: EngineConfig, hidden_size: int) -> tuple[TPGroup, EngineConfig]:
    if not engine.enforce_eager and tp.graphs_hold_all:
        tp, reason = check_captured_collectives(tp)
        if reason:
            _say(tp, f"decode steps run without CUDA graphs: {reason}")
            engine = replace(engine, enforce_eager=True)
    if engine.one_shot_all_reduce and engine.kernels != "reference":
        shared, reason = _share_memory(tp, engine, hidden_size)
        if not reason and not engine.enforce_eager:
            shared, reason = check_captured_collectives(shared)
        if reason:
            _say(tp, f"small sums go through the communicator: {reason}")
            if shared.shared_memory is not None:
                shared.shared_memory.close()
            # With the communicator of the test, which may have replaced one that hung.
            tp = replace(shared, one_shot=None, shared_memory=None)
        else:
            tp = shared
    if tp.one_shot is None and not tp.graphs_hold_all and not engine.enforce_eager:
        _say(tp, "decode steps run without CUDA graphs: ranks that share a GPU have no NCCL")
        engine = replace(engine, enforce_eager=True)
    return tp, engine


def _say(tp: TPGroup, text: str) -> None:
    if tp.rank == 0:
        logger.warning("%s", text)


def _share_memory(tp: TPGroup, engine: EngineConfig, hidden_size: int) -> tuple[TPGroup, str]:
    from tprt.distributed.symmetric_memory import make_symmetric_buffers
    from tprt.kernels.triton_ops.one_shot import OneShot, buffer_bytes

    itemsize = DTYPE_BYTES[engine.dtype]
    # A row of the hidden size, or one rank's tokens and digests; whole 16 bytes.
    row_bytes = -(-max(hidden_size * itemsize, 8 * (MAX_BUCKET + len(FIELDS))) // 16) * 16
    rows = min(ONE_SHOT_ROWS, max(1, ONE_SHOT_BYTES // row_bytes))
    buffers, reason = make_symmetric_buffers(tp, buffer_bytes(rows, row_bytes))
    if buffers is None:
        return tp, reason
    one_shot = OneShot(buffers.addresses, tp.rank, rows, row_bytes)
    return replace(tp, one_shot=one_shot, shared_memory=buffers), ""


def together(tp: TPGroup, work: Callable[[], T]) -> T:
    """``work()`` on every rank; if it fails anywhere, all raise the error of the first rank."""
    value, error = attempt(work)
    if error is not None and tp.size > 1:
        error.where = ", ".join(filter(None, (f"rank {tp.launch_ranks[tp.rank]}", error.where)))
    for rank, failed in enumerate(gather_json(error and error.to_json(), tp)):
        if failed is not None:
            told = TprtError.from_json(failed)
            told.rank = tp.launch_ranks[rank]
            raise told from error
    return cast(T, value)


def attempt(work: Callable[[], T]) -> tuple[T | None, TprtError | None]:
    """The value or the error of ``work``, so that peers that wait can be told before it is raised."""
    try:
        return work(), None
    except Exception as error:
        told = as_tprt_error(error)
        if told is not error:
            told.__cause__ = error
        return None, told


def as_tprt_error(error: Exception) -> TprtError:
    if isinstance(error, TprtError):
        return error
    return out_of_memory(error) or TprtError(f"{type(error).__name__}: {error}")


def open_record_file(path: str | None) -> BinaryIO | None:
    if path is None:
        return None
    try:
        return open(path, "wb")
    except OSError as error:
        raise OutputError(
            f"the record file cannot be written: {error.strerror}",
            where=path,
            hint="another engine.record_path",
        ) from error


def close_record_file(file: BinaryIO) -> None:
    try:
        file.close()
    except OSError as error:
        raise OutputError(
            f"the end of the record file could not be written: {error.strerror}",
            where=file.name,
            hint="room on that disk, or another engine.record_path",
        ) from error


def same_file(one: str | Path, other: str | Path | None) -> bool:
    try:
        return os.path.samefile(one, str(other))
    except OSError:
        return False
