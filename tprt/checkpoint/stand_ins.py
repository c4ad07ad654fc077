"""What names in a pickle may mean: an allow-list of inert stand-ins.

A pickle names Python objects. Here a name is looked up in a closed list and becomes a dead value: a
dtype tag, an empty shell that remembers its arguments, a descriptor of a tensor. Nothing is imported
and no foreign callable is ever called. This file knows no file and no layout.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, Literal, TypeGuard

import torch

from tprt.errors import CheckpointError

Kind = Literal["tensor", "parameter", "storage", "dtype", "size", "ordered_dict", "object"]

CONVERT_HINT = "a checkpoint from a source you trust, converted to safetensors there"
MAX_DIMS = 8
MAX_COUNT = 1 << 48  # elements; far above any model, far below what overflows an int64

_STORAGES: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8",
        "bool",
    )
}  # fmt: skip
_HARMLESS_BUILTINS = (
    "set", "frozenset", "bytearray", "bytes", "complex", "int", "float", "bool", "str", "list",
    "dict", "tuple", "object", "range", "slice",
)  # fmt: skip
_OBJECTS = frozenset(
    [("argparse", "Namespace"), ("types", "SimpleNamespace"), ("_codecs", "encode")]
    + [("torch", "device"), ("pathlib", "PosixPath"), ("signal", "Signals")]
    + [("numpy", "ndarray"), ("numpy", "dtype")]
    + [(f"numpy.{c}.multiarray", n) for c in ("core", "_core") for n in ("_reconstruct", "scalar")]
    + [(module, n) for module in ("builtins", "__builtin__") for n in _HARMLESS_BUILTINS]
)
_STUB_PACKAGES = ("megatron", "tool_use")


@dataclass(frozen=True)
class Global:
    """A name in a pickle that the allow-list knows; never the object behind it."""

    module: str
    name: str
    kind: Kind
    dtype: torch.dtype | None = None

    @property
    def full_name(self) -> str:
        return f"{self.module}.{self.name}"


class Inert:
    """An instance of a class that is not there: remembers what it was made with, does nothing."""

    __slots__ = ("args", "state", "type_name")

    def __init__(self, type_name: str, args: tuple[object, ...] = ()) -> None:
        self.type_name = type_name
        self.args = args
        self.state: dict[str, object] = {}

    def __repr__(self) -> str:
        # Arguments may be nested a million deep; printing them would overflow the stack.
        return f"<{self.type_name}>"


class OrderedStandIn(dict[Any, Any]):
    """An OrderedDict of a pickle. Unlike a plain dict it may carry attributes, which are dropped."""


@dataclass(frozen=True)
class StoredStorage:
    """One storage member of a file: ``numel`` elements of ``dtype`` under ``data/<key>``."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file. It holds no bytes; shape and stride count elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_key: str
    storage_offset: int
    storage_numel: int


def shown(text: str) -> str:
    """``text`` of a stranger, fit for one line of a message."""
    return repr(text[:120])[1:-1] + ("..." if len(text) > 120 else "")


def resolve(module: str, name: str, where: str) -> Global:
    """The stand-in for ``module.name``.

    Raises:
        CheckpointError: the name is not in the allow-list; the message names it.
    """
    if module == "torch._utils" and name == "_rebuild_tensor_v2":
        return Global(module, name, "tensor")
    if module == "torch._utils" and name == "_rebuild_parameter":
        return Global(module, name, "parameter")
    if module == "collections" and name == "OrderedDict":
        return Global(module, name, "ordered_dict")
    if module in ("torch", "torch.storage") and name in _STORAGES:
        return Global(module, name, "storage", _STORAGES[name])
    if module == "torch" and name in _DTYPES:
        return Global(module, name, "dtype", _DTYPES[name])
    if module == "torch" and name == "Size":
        return Global(module, name, "size")
    if (module, name) in _OBJECTS or module.split(".")[0] in _STUB_PACKAGES:
        return Global(module, name, "object")
    raise CheckpointError(
        f"the pickle asks for '{shown(module)}.{shown(name)}', which no checkpoint of weights needs",
        where=where,
        hint=CONVERT_HINT,
    )


def storage_of(persistent_id: object, where: str) -> StoredStorage:
    """The storage a persistent id of torch stands for: ("storage", type, key, location, numel)."""
    match persistent_id:
        case ("storage", Global(kind="storage", dtype=torch.dtype() as dtype), str(key), str(), n):
            # Keys are counters; anything else would be a path inside the zip file.
            if key.isascii() and key.isdigit() and len(key) <= 12 and is_count(n):
                return StoredStorage(key, dtype, n)
    raise CheckpointError(
        "the pickle holds a persistent id that is not a tensor's storage",
        where=where,
        hint=CONVERT_HINT,
    )


def rebuild_tensor(args: tuple[Any, ...], where: str) -> StoredTensor:
    """The tensor torch._utils._rebuild_tensor_v2 would make: dense and inside its storage, or an error.

    Raises:
        CheckpointError: arguments of another form, elements that overlap, or a tensor that reaches
            past its storage.
    """
    if not 6 <= len(args) <= 7 or not isinstance(args[0], StoredStorage):
        raise CheckpointError("a tensor in the pickle is malformed", where=where, hint=CONVERT_HINT)
    storage, offset, shape, stride, _, hooks = args[:6]
    metadata = args[6] if len(args) == 7 else None
    if hooks or metadata:
        raise CheckpointError(
            "a tensor in the pickle carries hooks or metadata", where=where, hint=CONVERT_HINT
        )
    where = f"{where}, storage {storage.key}"
    if not (_counts(shape) and _counts(stride) and len(shape) == len(stride) and is_count(offset)):
        raise CheckpointError(
            "a tensor's shape, stride or offset is malformed", where=where, hint=CONVERT_HINT
        )
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if prod(shape) and last >= storage.numel:
        raise CheckpointError(
            f"a tensor of shape {tuple(shape)} and stride {tuple(stride)} at offset {offset} "
            f"reaches past its storage of {storage.numel} elements",
            where=where,
            hint="the file again from its source",
        )
    # Sorted by stride, each dimension must step over all of the one before: no element twice.
    steps = sorted((s, n) for n, s in zip(shape, stride, strict=True) if n > 1)
    if any(s < 1 for s, _ in steps) or any(b[0] < a[0] * a[1] for a, b in pairwise(steps)):
        raise CheckpointError(
            f"a tensor of shape {tuple(shape)} and stride {tuple(stride)} is not dense",
            where=where,
            hint="save contiguous tensors",
        )
    return StoredTensor(
        storage.dtype, tuple(shape), tuple(stride), storage.key, offset, storage.numel
    )


def is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def _counts(value: object) -> bool:
    return isinstance(value, tuple) and len(value) <= MAX_DIMS and all(map(is_count, value))
