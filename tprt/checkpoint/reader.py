"""What every checkpoint reader answers, and the checks that all layouts share.

Names are Hugging Face's, shapes are those of the whole model. This file knows no layout and no model
class; sizes come from the config.
"""

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch

from tprt.config import ModelConfig
from tprt.distributed.sharding import Slices
from tprt.errors import CheckpointError

AnyConfig = TypeVar("AnyConfig", bound=ModelConfig)
Layout = Literal["megatron", "huggingface", "presharded"]
FLOAT_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
LISTED = 20  # names an error shows before it only counts
TensorHeader = tuple[tuple[int, ...], torch.dtype]  # shape and dtype
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENIZER_NAMES = ("adept_vocab.model", "tokenizer.model")
READ_HINT = "check the path, its permissions and the disk"
_ROWS = 1024  # compared at a time


@dataclass(frozen=True)
class FileBlock:
    """Elements of a tensor as they lie in a file: raw, little-endian, at any strides.

    Args:
        stamp: of the file when its header was checked (see ``file_stamp``).
        offset: of the first element, in bytes from the start of the file.
        shape, strides: of the block; strides count bytes and may be 0.
    """

    path: Path
    stamp: tuple[int, int]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, slices: Slices) -> "FileBlock":
        """A block of this block; the slices have both ends and a step of 1."""
        before = sum(s.start * n for s, n in zip(slices, self.strides, strict=True))
        shape = tuple(s.stop - s.start for s in slices)
        return replace(self, offset=self.offset + before, shape=shape)


PlacedBlock = tuple[FileBlock, Slices]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, as ``tprt inspect`` shows it.

    ``cut_dim`` is the dimension along which ``files`` rank files share it; None: each holds all.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    cut_dim: int | None
    files: int


class CheckpointReader(ABC):
    """A checkpoint on disk.

    Opening it checks names, shapes, dtypes and sizes. Of the weights it reads only what must be
    compared: the small tensors that Megatron repeats in every rank file, and a head that lies beside
    the embedding it is tied to.
    """

    layout: ClassVar[Layout]
    path: Path
    config: ModelConfig
    dtype: torch.dtype
    disk_tp: int = 1
    tokenizer_path: Path | None = None
    warnings: list[str]

    @abstractmethod
    def names(self) -> list[str]:
        """Every tensor, by its Hugging Face name. Without ``lm_head.weight`` when the head is tied."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    @abstractmethod
    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype on disk."""

    @abstractmethod
    def read(self, name: str, slices: Slices) -> torch.Tensor:
        """A block of the whole tensor in its dtype on disk; only its bytes are asked of the file.

        Args:
            slices: one per dimension, with a step of 1.
        """

    def locate(self, name: str, slices: Slices) -> list[PlacedBlock] | None:
        """Where ``read`` would find the same bytes, which count as read: many threads can fetch them.

        Each block comes with its place in what was asked for; places do not overlap and leave
        nothing out. None: the layout keeps no raw elements, and only ``read`` can tell.
        """
        return None

    @abstractmethod
    def describe(self) -> list[TensorInfo]:
        """Every tensor with its cut on disk."""

    @abstractmethod
    def verify_full(self) -> None:
        """Read every byte and compare checksums, where the layout has any.

        Raises:
            CheckpointError: names the file and the member or tensor that is damaged.
        """

    @abstractmethod
    def checksums(self) -> list[list[object]]:
        """What names and headers say of the contents, without reading them."""

    def fingerprint(self) -> str:
        """Hash of names, shapes, dtypes and ``checksums``: equal for ranks that read one checkpoint.

        Megatron and .bin files carry a CRC-32 of every tensor and presharded folders a digest; of
        safetensors files only headers and sizes are known.
        """
        tensors = [list(vars(info).values()) for info in self.describe()]
        said = json.dumps([self.layout, tensors, self.checksums()], default=str)
        return hashlib.sha256(said.encode()).hexdigest()

    @property
    @abstractmethod
    def bytes_read(self) -> int:
        """Bytes of weights asked for so far, by opening too; not those of ``verify_full``."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files. Reading afterwards is an error."""

    def read_whole(self, name: str) -> torch.Tensor:
        return self.read(name, tuple(slice(0, n) for n in self.shape(name)))

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def listed(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(sorted(names)[:LISTED]) + more


def check_tensors(
    found: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    wanted: Mapping[str, tuple[int, ...]],
    where: str,
) -> None:
    """Compare what a file holds with what the config wants, both ways, all findings in one error.

    Raises:
        CheckpointError: tensors are missing, left over, of another shape or not floating point.
    """
    missing, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    both = sorted(wanted.keys() & found.keys())
    shapes = [
        f"{name} {list(found[name][0])} instead of {list(wanted[name])}"
        for name in both
        if tuple(found[name][0]) != tuple(wanted[name])
    ]
    dtypes = [f"{name} ({found[name][1]})" for name in both if found[name][1] not in FLOAT_DTYPES]
    problems = [
        f"{len(names)} {kind}: {listed(names)}"
        for kind, names in (
            ("missing", missing),
            ("not expected", extra),
            ("of a wrong shape", shapes),
            ("of a dtype that weights cannot have", dtypes),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            "the tensors are not those its configuration describes; " + "; ".join(problems),
            where=where,
            hint="the configuration and the weights of one and the same release",
        )


def check_spare_head(
    head: TensorHeader,
    embedding: TensorHeader,
    read_head: Callable[[Slices], torch.Tensor],
    read_embedding: Callable[[Slices], torch.Tensor],
    where: str,
) -> None:
    """A head beside the embedding it is tied to may be left out only when it is the same.

    Raises:
        CheckpointError: it differs in shape, dtype or any bit: either the head or the configuration
            is wrong, and leaving the head out would run another model.
    """
    rows, width = embedding[0]
    same = head == embedding
    for start in range(0, rows if same else 0, _ROWS):
        block = (slice(start, min(start + _ROWS, rows)), slice(0, width))
        same = torch.equal(
            read_head(block).view(torch.uint8), read_embedding(block).view(torch.uint8)
        )
        if not same:
            break
    if not same:
        raise CheckpointError(
            f"the configuration ties {HEAD} to {EMBEDDING}, but the file holds a head of its own "
            "that differs from it",
            where=where,
            hint="untie them in the configuration, or save the checkpoint without the head",
        )


def build_config(
    build: Callable[[dict[str, Any]], AnyConfig], raw: dict[str, Any], where: str
) -> AnyConfig:
    """``build(raw)``, with ``where`` in the error."""
    try:
        return build(raw)
    except CheckpointError as error:
        raise CheckpointError(
            error.what, where=f"{where} {error.where}".strip(), hint=error.hint
        ) from error


def differing_fields(a: ModelConfig, b: ModelConfig) -> list[str]:
    return [
        f"{f.name} ({getattr(a, f.name)!r} and {getattr(b, f.name)!r})"
        for f in fields(a)
        if getattr(a, f.name) != getattr(b, f.name)
    ]


def main_dtype(dtypes: Collection[torch.dtype]) -> torch.dtype:
    """The dtype most tensors have."""
    return Counter(dtypes).most_common(1)[0][0]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def find_tokenizer(folders: list[Path]) -> Path | None:
    """The sentencepiece model in the first folder that has one."""
    for folder in folders:
        for name in TOKENIZER_NAMES:
            if (folder / name).is_file():
                return folder / name
        models = sorted(folder.glob("*.model"))
        if len(models) == 1 and models[0].is_file():
            return models[0]
    return None


def file_stamp(fd: int) -> tuple[int, int]:
    """Size and modification time: a file that has another stamp now is not the one that was checked."""
    told = os.fstat(fd)
    return told.st_size, told.st_mtime_ns


def overlap(asked: slice, start: int, stop: int) -> tuple[int, int]:
    """The part of ``asked`` inside [start, stop); empty when the second is not above the first."""
    return max(asked.start, start), min(asked.stop, stop)


def normal(slices: Slices, shape: tuple[int, ...]) -> Slices:
    """Slices with both ends given, clipped to ``shape``."""
    assert len(slices) == len(shape), (slices, shape)
    ends = [s.indices(n) for s, n in zip(slices, shape, strict=True)]
    assert all(step == 1 for _, _, step in ends), slices
    return tuple(slice(start, max(start, stop)) for start, stop, _ in ends)
