"""Hugging Face's layout: ``config.json`` beside safetensors or ``pytorch_model*.bin`` files.

Tensors stand there whole and under the names the project uses. This file knows which files and
indices there may be; zip files and headers are the business of ``torch_file`` and
``safetensors_file``.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from tprt.checkpoint.reader import (
    EMBEDDING,
    HEAD,
    CheckpointReader,
    FileBlock,
    PlacedBlock,
    TensorHeader,
    TensorInfo,
    build_config,
    check_spare_head,
    check_tensors,
    dtype_name,
    find_tokenizer,
    listed,
    main_dtype,
    normal,
)
from tprt.checkpoint.safetensors_file import SafetensorsFile, read_json
from tprt.checkpoint.stand_ins import StoredTensor
from tprt.checkpoint.torch_file import AGAIN_HINT, TorchFile, flatten
from tprt.config import config_from_hf
from tprt.distributed.sharding import Slices, whole
from tprt.errors import CheckpointError

CONFIG = "config.json"
# single file, index of several
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
BIN = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class BinShard:
    """A ``pytorch_model*.bin`` file with the face of a safetensors file."""

    def __init__(self, path: Path) -> None:
        self._file = TorchFile(path)
        self._stored: dict[str, StoredTensor] = flatten(self._file.contents, str(path))
        for tensor in self._stored.values():
            self._file.check_storage(tensor)
        self.tensors: dict[str, TensorHeader] = {
            name: (tensor.shape, tensor.dtype) for name, tensor in self._stored.items()
        }

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    def read(self, name: str, slices: Slices) -> torch.Tensor:
        return self._file.read(self._stored[name], slices)

    def locate(self, name: str, slices: Slices) -> FileBlock:
        return self._file.locate(self._stored[name], slices)

    def verify_crc(self) -> None:
        self._file.verify_crc()

    def checksums(self) -> list[object]:
        return self._file.checksums()

    def close(self) -> None:
        self._stored.clear()


Shard = SafetensorsFile | BinShard


@dataclass(frozen=True)
class _Place:
    shard: Shard
    shape: tuple[int, ...]
    dtype: torch.dtype


class HuggingFaceReader(CheckpointReader):
    """Reads a folder as ``save_pretrained`` writes it; safetensors win where both forms are there.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not those of config.json.
    """

    layout = "huggingface"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warnings: list[str] = []
        raw = read_json(path / CONFIG, limit=4 << 20)
        self.config = build_config(config_from_hf, raw, str(path / CONFIG))
        self._shards, owner = open_shards(path)
        found: dict[str, TensorHeader] = {}
        for name, shard in owner.items():
            if name.endswith("rotary_emb.inv_freq"):
                continue
            found[name] = shard.tensors[name]
        spare = found.pop(HEAD, None) if self.config.tie_word_embeddings else None
        shapes = self.config.tensor_shapes()
        check_tensors(found, shapes, str(path))
        if spare is not None:
            check_spare_head(
                spare,
                found[EMBEDDING],
                lambda block: owner[HEAD].read(HEAD, block),
                lambda block: owner[EMBEDDING].read(EMBEDDING, block),
                str(path / CONFIG),
            )
        self._places = {name: _Place(owner[name], *found[name]) for name in shapes}
        self.dtype = main_dtype([place.dtype for place in self._places.values()])
        self.tokenizer_path = find_tokenizer([path])

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def stored_dtype(self, name: str) -> torch.dtype:
        return self._places[name].dtype

    def read(self, name: str, slices: Slices) -> torch.Tensor:
        place = self._places[name]
        return place.shard.read(name, normal(slices, place.shape))

    def locate(self, name: str, slices: Slices) -> list[PlacedBlock]:
        place = self._places[name]
        block = place.shard.locate(name, normal(slices, place.shape))
        return [(block, whole(block.shape))]

    def describe(self) -> list[TensorInfo]:
        return [
            TensorInfo(name, p.shape, dtype_name(p.dtype), None, 1)
            for name, p in self._places.items()
        ]

    def verify_full(self) -> None:
        """CRC-32 of .bin files; safetensors carry no checksum, only their sizes are known."""
        unchecked = 0
        for shard in self._shards:
            if isinstance(shard, BinShard):
                shard.verify_crc()
            else:
                unchecked += 1
        if unchecked:
            self.warnings.append(
                f"{unchecked} safetensors files carry no checksums: only sizes were verified "
                "(tprt convert --format presharded adds digests)"
            )

    def checksums(self) -> list[list[object]]:
        return [shard.checksums() for shard in self._shards]

    @property
    def bytes_read(self) -> int:
        return sum(shard.bytes_read for shard in self._shards)

    def close(self) -> None:
        for shard in self._shards:
            shard.close()
        self._places.clear()


def open_shards(path: Path) -> tuple[list[Shard], dict[str, Shard]]:
    """All weight files of a folder, and which of them holds each tensor.

    Raises:
        CheckpointError: there are no weights, a shard is missing, or index and shards disagree.
    """
    for single, index in (SAFETENSORS, BIN):
        if (path / index).is_file():
            return _from_index(path, path / index)
        if (path / single).is_file():
            shard = _open(path / single)
            return [shard], dict.fromkeys(shard.tensors, shard)
    raise CheckpointError(
        f"no weights here: none of {', '.join((*SAFETENSORS, *BIN))}",
        where=str(path),
        hint="the whole folder, weights included (a clone without git-lfs has none)",
    )


def _from_index(path: Path, index: Path) -> tuple[list[Shard], dict[str, Shard]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(
            "the index has no weight_map of names to files", where=str(index), hint=AGAIN_HINT
        )
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name or name in (".", "..")]
    if outside:
        raise CheckpointError(
            f"the index names files outside its folder: {listed([ascii(n) for n in outside])}",
            where=str(index),
            hint="an index whose weight files lie beside it",
        )
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} weight files are missing: {listed(missing)}",
            where=str(path),
            hint="download the missing files",
        )
    shards = {name: _open(path / name) for name in names}
    absent = [f"{t} (in {f})" for t, f in weight_map.items() if t not in shards[f].tensors]
    unlisted = [
        f"{tensor} (in {file})"
        for file, shard in shards.items()
        for tensor in shard.tensors
        if weight_map.get(tensor) != file
    ]
    problems = []
    if absent:
        problems.append(f"{len(absent)} tensors are not where the index says: {listed(absent)}")
    if unlisted:
        problems.append(f"{len(unlisted)} tensors are not in the index: {listed(unlisted)}")
    if problems:
        raise CheckpointError(
            "; ".join(problems), where=str(index), hint="index and shards of one and the same save"
        )
    return list(shards.values()), {name: shards[file] for name, file in weight_map.items()}


def _open(path: Path) -> Shard:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else BinShard(path)
