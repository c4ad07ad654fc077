"""safetensors files: a strict look at the header before the library opens them, and a writer that
streams.

The library accepts duplicate names (the last one wins) and any number of tensors; the look before
does not. The library's own writer wants all tensors in memory at once. This file knows no names of
weights and no layouts.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from tprt.checkpoint.reader import READ_HINT, FileBlock, TensorHeader, file_stamp
from tprt.checkpoint.torch_file import AGAIN_HINT, integer_view
from tprt.distributed.sharding import Slices
from tprt.errors import CheckpointError

MAX_HEADER_BYTES = 64 << 20
MAX_TENSORS = 100_000
MAX_JSON_BYTES = 64 << 20
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        CheckpointError: it is missing, too large, no JSON object, or has a key twice.
    """
    try:
        if path.stat().st_size > limit:
            raise CheckpointError(
                f"the file has {path.stat().st_size} bytes; the limit is {limit}",
                where=str(path),
                hint=AGAIN_HINT,
            )
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror or error}", where=str(path), hint=READ_HINT
        ) from error
    return parse_json(raw, str(path))


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``raw``; a key that is there twice is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"'{twice}' is there twice", where=where, hint=AGAIN_HINT)
        return made

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON ({error})", where=where, hint=AGAIN_HINT) from error
    if not isinstance(value, dict):
        raise CheckpointError("the JSON is not an object", where=where, hint=AGAIN_HINT)
    return value


class SafetensorsFile:
    """One safetensors file: ``tensors`` maps names to (shape, dtype).

    Raises:
        CheckpointError: the file is missing, truncated, or its header lies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        try:
            with open(path, "rb") as file:
                self._stamp = file_stamp(file.fileno())
                self.size = self._stamp[0]
                self._starts: dict[str, int] = {}
                self.tensors = self._check_header(file)
        except OSError as error:
            raise CheckpointError(
                f"cannot be read: {error.strerror or error}", where=str(path), hint=READ_HINT
            ) from error
        try:
            self._open: Any = safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise self._error(str(error)) from error

    def read(self, name: str, slices: Slices) -> torch.Tensor:
        """A block of ``name`` in the dtype on disk."""
        shape, dtype = self.tensors[name]
        lengths = [len(range(*s.indices(n))) for s, n in zip(slices, shape, strict=True)]
        self.bytes_read += math.prod(lengths) * dtype.itemsize
        if not math.prod(lengths):  # the library refuses empty slices
            return torch.empty(lengths, dtype=dtype)
        block: torch.Tensor = self._open.get_slice(name)[slices]
        return block

    def locate(self, name: str, slices: Slices) -> FileBlock:
        """Where ``read`` would find the block; it counts as read."""
        shape, dtype = self.tensors[name]
        strides = [dtype.itemsize * math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        start = self._starts[name]
        whole = FileBlock(self.path, self._stamp, start, shape, tuple(strides), dtype)
        block = whole.part(slices)
        self.bytes_read += block.nbytes
        return block

    def checksums(self) -> list[object]:
        """Safetensors carry none: the name and size of the file stand in."""
        return [self.path.name, self.size]

    def close(self) -> None:
        self._open = None

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{what} (the file has {self.size} bytes)", where=str(self.path), hint=AGAIN_HINT
        )

    def _check_header(self, file: BinaryIO) -> dict[str, TensorHeader]:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise self._error("the file is cut off inside its first 8 bytes")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise self._error(f"its header claims {length} bytes; the limit is {MAX_HEADER_BYTES}")
        if 8 + length > self.size:
            raise self._error(f"its header claims {length} bytes, which the file does not have")
        header = parse_json(file.read(length), f"{self.path}: header")
        header.pop("__metadata__", None)
        if len(header) > MAX_TENSORS:
            raise self._error(f"its header lists {len(header)} tensors; the limit is {MAX_TENSORS}")
        tensors: dict[str, TensorHeader] = {}
        spans = []
        for name, entry in header.items():
            match entry:
                case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(a), int(b)]}:
                    pass
                case _:
                    raise self._error(f"the header's entry of '{name}' is malformed")
            if kind not in DTYPES:
                raise self._error(f"'{name}' has dtype {kind!r}, which is not supported")
            if len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
                raise self._error(f"'{name}' has shape {shape!r}")
            expected = math.prod(shape) * DTYPES[kind].itemsize
            if not 0 <= a <= b or b - a != expected:
                raise self._error(
                    f"'{name}' should have {expected} bytes for its shape {shape}, its offsets "
                    f"span {b - a}"
                )
            spans.append((a, b))
            self._starts[name] = 8 + length + a
            tensors[name] = (tuple(shape), DTYPES[kind])
        end = 0
        for a, b in sorted(spans):
            if a != end:
                raise self._error("its tensors overlap or leave gaps")
            end = b
        if 8 + length + end != self.size:
            raise self._error(f"the file should have {8 + length + end} bytes")
        return tensors


class SafetensorsWriter:
    """Writes one file tensor by tensor; only one tensor is in memory at a time.

    Args:
        entries: name to (shape, dtype), in the order in which ``add`` is called.
    """

    def __init__(self, path: Path, entries: Mapping[str, TensorHeader]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in entries.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end],
            }  # fmt: skip
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)  # the data starts at a multiple of 8
        self._pending = dict(entries)
        self._file = open(path, "xb")
        self._file.write(struct.pack("<Q", len(raw)) + raw)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        expected = next(iter(self._pending))
        assert name == expected, (name, expected)
        assert (tuple(tensor.shape), tensor.dtype) == self._pending.pop(name), name
        self._file.write(raw_bytes(tensor))

    def close(self) -> None:
        assert not self._pending, list(self._pending)
        self._file.close()

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor in row order, without a copy when it is contiguous."""
    flat = integer_view(tensor.contiguous().reshape(-1))
    return flat.data.cast("B")


def total_bytes(headers: Iterable[TensorHeader]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in headers)
