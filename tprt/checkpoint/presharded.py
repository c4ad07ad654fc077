"""Our own layout: one safetensors file per rank and a manifest with shapes, cuts and digests.

``manifest.json`` says of every tensor in every rank file which blocks of the whole tensor lie where,
so any other number of ranks can read it too; each tensor has a sha256. This file knows the manifest's
fields; it does not decide how anything is cut.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from tprt.checkpoint.reader import (
    CheckpointReader,
    PlacedBlock,
    TensorInfo,
    build_config,
    check_tensors,
    dtype_name,
    find_tokenizer,
    listed,
    main_dtype,
    normal,
    overlap,
)
from tprt.checkpoint.safetensors_file import (
    DTYPES,
    SafetensorsFile,
    raw_bytes,
    read_json,
)
from tprt.checkpoint.torch_file import AGAIN_HINT
from tprt.config import ModelConfig, get_config_class
from tprt.distributed.sharding import Piece, ShardSpec, Slices
from tprt.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT, VERSION = "tprt-presharded", 1
_ANEW_HINT = "tprt convert writes it anew"
TensorShape = tuple[int, ...]
_DTYPES_BY_NAME = {dtype_name(dtype): dtype for dtype in DTYPES.values()}


def rank_file_name(rank: int, tp_size: int) -> str:
    return f"rank_{rank:02d}_of_{tp_size:02d}.safetensors"


def slices_to_json(slices: Slices) -> list[list[int]]:
    return [[s.start, s.stop] for s in slices]


def entry_to_json(spec: ShardSpec, dtype: torch.dtype, sha256: str) -> dict[str, Any]:
    """What the manifest says of one tensor in one rank file."""
    return {
        "dtype": dtype_name(dtype),
        "shape": list(spec.local_shape),
        "pieces": [
            {"canonical": slices_to_json(p.canonical), "local": slices_to_json(p.local)}
            for p in spec.pieces
        ],
        "sha256": sha256,
    }


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": config.model_type, **asdict(config)}


def covers(shape: tuple[int, ...], boxes: list[Slices]) -> bool:
    """Whether distinct ``boxes`` tile ``shape``: none overlaps another, nothing is left out."""
    if sum(prod(s.stop - s.start for s in box) for box in boxes) != prod(shape):
        return False
    # Sorted by rows, a box can only meet those that start before it ends: there may be hundreds.
    ordered = sorted((b for b in boxes if all(s.stop > s.start for s in b)), key=_rows)
    for index, box in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if box and other[0].start >= box[0].stop:
                break
            pairs = zip(box, other, strict=True)
            if all(max(x.start, y.start) < min(x.stop, y.stop) for x, y in pairs):
                return False
    return True


def _rows(box: Slices) -> int:
    return int(box[0].start) if box else 0


@dataclass(frozen=True)
class _Block:
    file: SafetensorsFile
    piece: Piece


class PreshardedReader(CheckpointReader):
    """Reads a folder written by ``write_presharded``, at any TP size.

    Raises:
        CheckpointError: the manifest is malformed, or the rank files are not those it describes.
    """

    layout = "presharded"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warnings: list[str] = []
        self._where = str(path / MANIFEST)
        manifest = read_json(path / MANIFEST)
        if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            raise self._error(
                f"format {manifest.get('format')!r} version {manifest.get('version')!r} is not "
                f"{FORMAT!r} version {VERSION}"
            )
        config = manifest.get("config")
        if not isinstance(config, dict):
            raise self._error("it has no config")
        self.config = build_config(_config_from_json, config, self._where)
        files = manifest.get("files")
        tp = manifest.get("tp_size")
        if type(tp) is not int or not isinstance(files, list) or len(files) != tp or tp < 1:
            raise self._error(f"tp_size is {tp!r}, which is not the number of its files")
        self.disk_tp = tp
        self._files: list[SafetensorsFile] = []
        self._digests: list[dict[str, str]] = []
        self._dtypes: dict[str, torch.dtype] = {}
        self._blocks: dict[str, dict[tuple[tuple[int, int], ...], _Block]] = {}
        self._cut: dict[str, int | None] = {}
        self._shapes = self.config.tensor_shapes()
        for rank, entry in enumerate(files):
            try:
                self._add_file(rank, entry)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise self._error(
                    f"what it says of rank {rank} is malformed ({type(error).__name__}: {error})"
                ) from error
        self._check_cover()
        self.dtype = main_dtype(list(self._dtypes.values()))
        self.tokenizer_path = find_tokenizer([path])

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def stored_dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read(self, name: str, slices: Slices) -> torch.Tensor:
        asked = normal(slices, self._shapes[name])
        lengths = [s.stop - s.start for s in asked]
        out: torch.Tensor | None = None
        for file, source, place in self._parts(name, asked):
            part = file.read(name, source)
            part = part[0] if part.dim() > len(lengths) else part
            if list(part.shape) == lengths:
                return part  # no second copy
            if out is None:
                out = torch.empty(lengths, dtype=self._dtypes[name])
            out[place] = part
        return torch.empty(lengths, dtype=self._dtypes[name]) if out is None else out

    def locate(self, name: str, slices: Slices) -> list[PlacedBlock]:
        found = []
        for file, source, place in self._parts(name, normal(slices, self._shapes[name])):
            block = file.locate(name, source)
            extra = len(source) - len(place)
            shape, strides = block.shape[extra:], block.strides[extra:]
            found.append((replace(block, shape=shape, strides=strides), place))
        return found

    def _parts(self, name: str, asked: Slices) -> Iterator[tuple[SafetensorsFile, Slices, Slices]]:
        """The files that hold a part of ``asked``, its slices there, and its place in the result.

        A local tensor with one leading dimension more repeats the block: its first copy will do.
        """
        blocks = self._blocks[name]
        exact = blocks.get(_key(asked))  # the same cut as on disk
        for block in blocks.values() if exact is None else (exact,):
            box, local = block.piece.canonical, block.piece.local
            spans = [overlap(a, b.start, b.stop) for a, b in zip(asked, box, strict=True)]
            if any(stop <= start for start, stop in spans):
                continue
            extra = len(local) - len(box)
            source = [slice(s.start, s.start + 1) for s in local[:extra]] + [
                slice(at.start + start - b.start, at.start + stop - b.start)
                for (start, stop), b, at in zip(spans, box, local[extra:], strict=True)
            ]
            place = [
                slice(start - a.start, stop - a.start)
                for (start, stop), a in zip(spans, asked, strict=True)
            ]
            yield block.file, tuple(source), tuple(place)

    def describe(self) -> list[TensorInfo]:
        return [
            TensorInfo(
                name, shape, dtype_name(self._dtypes[name]), self._cut_dim(name), self.disk_tp
            )
            for name, shape in self._shapes.items()
        ]

    def verify_full(self) -> None:
        for file, digests in zip(self._files, self._digests, strict=True):
            before = file.bytes_read
            for name, expected in digests.items():
                shape, _ = file.tensors[name]
                tensor = file.read(name, tuple(slice(0, n) for n in shape))
                found = hashlib.sha256(raw_bytes(tensor)).hexdigest()
                if found != expected:
                    raise CheckpointError(
                        f"'{name}' is damaged: sha256 {found[:16]}..., recorded {expected[:16]}...",
                        where=str(file.path),
                        hint=AGAIN_HINT,
                    )
            file.bytes_read = before

    def checksums(self) -> list[list[object]]:
        return [list[object](sorted(digests.items())) for digests in self._digests]

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self._files)

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._blocks.clear()

    def _error(self, what: str, hint: str = _ANEW_HINT) -> CheckpointError:
        return CheckpointError(what, where=self._where, hint=hint)

    def _add_file(self, rank: int, entry: dict[str, Any]) -> None:
        expected_name = rank_file_name(rank, self.disk_tp)
        if entry["name"] != expected_name:
            raise self._error(f"rank {rank} is in {entry['name']!r} instead of '{expected_name}'")
        if not (self.path / expected_name).is_file():
            raise CheckpointError(
                f"missing rank file '{expected_name}'", where=str(self.path), hint=AGAIN_HINT
            )
        file = SafetensorsFile(self.path / expected_name)
        tensors: dict[str, Any] = entry["tensors"]
        check_tensors(
            file.tensors, {n: tuple(t["shape"]) for n, t in tensors.items()}, str(file.path)
        )
        check_tensors(
            {n: (self._shapes.get(n, ()), torch.float32) for n in tensors},
            self._shapes,
            self._where,
        )
        for name, told in tensors.items():
            local_shape, dtype = file.tensors[name]
            known = self._dtypes.setdefault(name, dtype)
            if _DTYPES_BY_NAME.get(told["dtype"]) != dtype or dtype != known:
                raise self._error(f"'{name}' has {dtype_name(dtype)} in '{expected_name}'")
            for raw in told["pieces"]:
                piece = Piece(_slices(raw["canonical"]), _slices(raw["local"]))
                self._check_piece(name, piece, local_shape)
                known_blocks = self._blocks.setdefault(name, {})
                known_blocks.setdefault(_key(piece.canonical), _Block(file, piece))
        self._files.append(file)
        self._digests.append({name: str(told["sha256"]) for name, told in tensors.items()})

    def _check_piece(self, name: str, piece: Piece, local_shape: TensorShape) -> None:
        def lengths(slices: Slices) -> list[int]:
            return [s.stop - s.start for s in slices]

        def inside(slices: Slices, shape: TensorShape) -> bool:
            return len(slices) == len(shape) and all(
                0 <= s.start <= s.stop <= n for s, n in zip(slices, shape, strict=True)
            )

        shape = self._shapes[name]
        extra = len(piece.local) - len(shape)
        if (
            not inside(piece.canonical, shape)
            or not inside(piece.local, local_shape)
            or extra not in (0, 1)
            or lengths(piece.local)[extra:] != lengths(piece.canonical)
            or (extra and lengths(piece.local)[0] < 1)
        ):
            raise self._error(f"a piece of '{name}' lies outside its tensor")

    def _check_cover(self) -> None:
        for name, shape in self._shapes.items():
            boxes = [block.piece.canonical for block in self._blocks.get(name, {}).values()]
            if not covers(shape, boxes):
                raise self._error(f"the pieces of '{name}' do not make up its shape {list(shape)}")

    def _cut_dim(self, name: str) -> int | None:
        boxes = [block.piece.canonical for block in self._blocks[name].values()]
        shape = self._shapes[name]
        cut = [d for d, n in enumerate(shape) if any(b[d] != slice(0, n) for b in boxes)]
        return cut[0] if cut else None


def _key(slices: Slices) -> tuple[tuple[int, int], ...]:
    return tuple((s.start, s.stop) for s in slices)


def _slices(raw: list[list[int]]) -> Slices:
    for start, stop in raw:
        if type(start) is not int or type(stop) is not int:
            raise ValueError("a slice of what is not a whole number")
    return tuple(slice(start, stop) for start, stop in raw)


def _config_from_json(raw: dict[str, Any]) -> ModelConfig:
    values = dict(raw)
    kind = values.pop("model_type", None)
    cls = get_config_class(kind)
    known = {f.name: f.default is MISSING for f in fields(cls)}
    unknown = values.keys() - known
    missing = {name for name, needed in known.items() if needed} - values.keys()
    if unknown or missing:
        which = f"unknown: {listed([ascii(n) for n in unknown])}" if unknown else ""
        lacks = f"missing: {listed(missing)}" if missing else ""
        raise CheckpointError(
            f"the config has other fields than a model of type {kind}; "
            + "; ".join(filter(None, (which, lacks))),
            hint=_ANEW_HINT,
        )
    return cls(**values)
