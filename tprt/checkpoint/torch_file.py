"""Files of ``torch.save`` (.pt, .bin): zip checks, the restricted pickle, slices through a mapping.

Tensors stay descriptors until a slice is asked for; then only that slice is copied out of a
read-only mapping, so that anonymous memory never holds more than what was asked. This file knows no
names of weights and no layouts.
"""

import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tprt.checkpoint.pickle_reader import MAX_PICKLE_BYTES, load_pickle
from tprt.checkpoint.reader import READ_HINT, FileBlock, file_stamp
from tprt.checkpoint.stand_ins import StoredStorage, StoredTensor, shown
from tprt.distributed.sharding import Slices
from tprt.errors import CheckpointError

MAX_MEMBERS = 200_000
CONVERT_HINT = (
    "convert it once, on a machine that trusts it: torch.save(torch.load(FILE), NEW) with a "
    "current torch"
)
AGAIN_HINT = "download or copy the file again"
_STATE_HINT = "a file whose state dict maps names to tensors, as torch.save writes it"
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_END_RECORD = struct.Struct("<4s4H2IH")
INTEGERS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_TORCH_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def integer_view(tensor: torch.Tensor) -> "np.ndarray[Any, Any]":
    """The bits of a CPU tensor as integers: numpy has no bfloat16."""
    return tensor.view(_TORCH_INTEGERS[tensor.element_size()]).numpy()


class TorchFile:
    """One zip file of ``torch.save``, checked and mapped; ``contents`` is its pickle.

    Raises:
        CheckpointError: the file is missing, truncated, of another format, or its members are not
            what ``torch.save`` writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        try:
            with open(path, "rb") as file:
                self._stamp = file_stamp(file.fileno())
                self.size = self._stamp[0]
                self._check_magic(file.read(512))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._check_end()
                with zipfile.ZipFile(file) as archive:
                    infos = archive.infolist()
                    self._directory_start = int(getattr(archive, "start_dir", self.size))
        except OSError as error:
            raise CheckpointError(
                f"cannot be read: {error.strerror or error}", where=str(path), hint=READ_HINT
            ) from error
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise self._error(f"its zip directory is damaged ({error})") from error
        self._members = self._check_members(infos)
        name, start, length = self._pickle_member()
        self.top = name.rpartition("/")[0]
        byteorder = self._members.get(f"{self.top}/byteorder")
        if byteorder and self._map[byteorder[0] : byteorder[0] + byteorder[1]] != b"little":
            raise self._error("it was written with big-endian numbers", "write it little-endian")
        self.contents = load_pickle(self._map[start : start + length], f"{path}: {name}")

    # Reading

    def view(self, tensor: StoredTensor, slices: Slices) -> "np.ndarray[Any, Any]":
        """A block of ``tensor`` as read-only integers of its width, in place in the mapping.

        Raises:
            CheckpointError: its storage is not in the file or has another size.
        """
        start = self._storage_start(tensor)
        width = tensor.dtype.itemsize
        flat = np.frombuffer(
            self._map, INTEGERS[width], tensor.storage_numel, start
        )[tensor.storage_offset :]  # fmt: skip
        strides = tuple(s * width for s in tensor.stride)
        # Shape and stride were checked against the storage when the descriptor was made.
        whole = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
        block: np.ndarray[Any, Any] = whole[slices]
        self.bytes_read += block.nbytes
        return block

    def read(self, tensor: StoredTensor, slices: Slices | None = None) -> torch.Tensor:
        """A copy of a block of ``tensor``; all of it without ``slices``."""
        full = tuple(slice(0, n) for n in tensor.shape)
        block = np.array(self.view(tensor, full if slices is None else slices), order="C")
        return torch.from_numpy(block).view(tensor.dtype)

    def locate(self, tensor: StoredTensor, slices: Slices) -> FileBlock:
        """Where ``view`` would find the block; it counts as read. Raises as ``view`` does."""
        width = tensor.dtype.itemsize
        start = self._storage_start(tensor) + tensor.storage_offset * width
        strides = tuple(s * width for s in tensor.stride)
        whole = FileBlock(self.path, self._stamp, start, tensor.shape, strides, tensor.dtype)
        block = whole.part(slices)
        self.bytes_read += block.nbytes
        return block

    def check_storage(self, tensor: StoredTensor) -> None:
        """Raises CheckpointError unless the storage is there with the size the pickle claims."""
        self._storage_start(tensor)

    def verify_crc(self) -> None:
        """Read every member and compare its CRC-32.

        Raises:
            CheckpointError: names the first damaged member.
        """
        for name, (start, length, expected) in self._members.items():
            found = 0
            for at in range(start, start + length, 16 << 20):
                found = zlib.crc32(self._map[at : min(at + (16 << 20), start + length)], found)
            if found != expected:
                raise CheckpointError(
                    f"member '{shown(name)}' is damaged: CRC-32 {found:08x}, "
                    f"recorded {expected:08x}",
                    where=str(self.path),
                    hint=AGAIN_HINT,
                )

    def checksums(self) -> list[object]:
        """CRC-32 of every member, as the zip directory says."""
        return [[name, crc] for name, (_, _, crc) in sorted(self._members.items())]

    def _storage_start(self, tensor: StoredTensor) -> int:
        name = f"{self.top}/data/{tensor.storage_key}"
        expected = tensor.storage_numel * tensor.dtype.itemsize
        start, length, _ = self._members.get(name, (0, -1, 0))
        if length != expected:
            found = "it is missing" if length < 0 else f"found {length}"
            raise self._error(f"storage '{name}' should have {expected} bytes, {found}")
        return start

    # Checks before anything is read

    def _error(self, what: str, hint: str = AGAIN_HINT) -> CheckpointError:
        return CheckpointError(
            f"{what} (the file has {self.size} bytes)", where=str(self.path), hint=hint
        )

    def _check_magic(self, head: bytes) -> None:
        if not head:
            raise self._error("the file is empty")
        if head.startswith(b"PK\x03\x04"):
            return
        if head[257:262] == b"ustar":
            raise self._error("found a tar file, torch's format before 0.1.10", CONVERT_HINT)
        # Protocol marker, then LONG1 of torch's old magic number 0x1950a86a20f9469cfc6c.
        if head.startswith(b"\x80") and head[2:4] == b"\x8a\x0a":
            raise self._error("found torch's format before 1.6, a bare pickle", CONVERT_HINT)
        if head.startswith(b"\x80"):
            raise self._error("found a bare pickle, not a file of torch.save", CONVERT_HINT)
        if len(head) < 30:
            raise self._error("the file is cut off inside its first header")
        raise self._error(
            f"not a file of torch.save: it begins with {head[:8]!r}", "a .pt or .bin file"
        )

    def _check_end(self) -> None:
        """The zip directory must end the file, and be small: it is parsed into memory."""
        tail = self._map[max(0, self.size - 98) :]
        record = tail[-_END_RECORD.size :]
        if len(record) < _END_RECORD.size or record[:4] != b"PK\x05\x06":
            raise self._error("the file is cut off: the zip directory at its end is missing")
        _, disk, _, count_here, count, size, _, comment = _END_RECORD.unpack(record)
        if count == 0xFFFF or size == 0xFFFFFFFF:
            record64 = tail[-98:-42]
            if len(record64) < 56 or record64[:4] != b"PK\x06\x06":
                raise self._error("the file is cut off: its zip64 record is missing")
            count_here, count, size = struct.unpack_from("<3Q", record64, 24)
        if disk or comment or count_here != count:
            raise self._error("its zip directory is damaged (several disks or a comment)")
        if count > MAX_MEMBERS or size > self.size or size > MAX_MEMBERS * 512:
            raise self._error(f"its zip directory claims {count} members in {size} bytes")

    def _check_members(self, infos: list[zipfile.ZipInfo]) -> dict[str, tuple[int, int, int]]:
        """Name to (start, length, CRC-32) of each member, after all checks on names and places."""
        # Before the other checks: its members are compressed too, and that is not what is wrong.
        if any(i.filename.split("/")[1:2] in (["constants.pkl"], ["code"]) for i in infos):
            raise self._error(
                "found a TorchScript archive, which is a program",
                "save the state dict of the module with torch.save",
            )
        members: dict[str, tuple[int, int, int]] = {}
        ends = 0
        for info in sorted(infos, key=lambda i: i.header_offset):
            name = info.filename
            for bad, why in self._complaints(info):
                if bad:
                    raise self._error(f"zip member '{shown(name)}' {why}", CONVERT_HINT)
            if name in members:
                raise self._error(f"zip member '{shown(name)}' is there twice", CONVERT_HINT)
            start = self._data_start(info)
            if info.header_offset < ends or start + info.file_size > self._directory_start:
                raise self._error(f"zip member '{shown(name)}' reaches outside its place")
            ends = start + info.file_size
            members[name] = (start, info.file_size, info.CRC)
        tops = sorted({name.split("/")[0] for name in members})
        if len(tops) != 1:
            raise self._error(
                f"the zip file has {len(tops)} top folders, torch.save writes one", CONVERT_HINT
            )
        return members

    def _complaints(self, info: zipfile.ZipInfo) -> Iterator[tuple[bool, str]]:
        name = info.filename
        parts = name.split("/")
        yield info.compress_type != zipfile.ZIP_STORED, "is compressed"
        yield info.compress_size != info.file_size, "has two sizes"
        yield bool(info.flag_bits & 0x1), "is encrypted"
        yield info.is_dir(), "is a folder"
        yield name.startswith("/") or "\\" in name or ":" in name, "has an absolute name"
        yield any(p in ("", ".", "..") for p in parts), "has a path that leaves the file"
        yield len(parts) < 2, "lies outside the top folder"
        # zipfile cuts a name at a NUL byte; other readers do not.
        yield info.orig_filename != name or not name.isprintable(), "has unprintable signs"

    def _data_start(self, info: zipfile.ZipInfo) -> int:
        at = info.header_offset
        header = self._map[at : at + _LOCAL_HEADER.size]
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise self._error(f"zip member '{shown(info.filename)}' has no header where it should")
        _, _, flags, method, _, _, _, size, _, name_length, extra = _LOCAL_HEADER.unpack(header)
        start = at + _LOCAL_HEADER.size
        local_name = self._map[start : start + name_length]
        # Two readers must not see two files: the header and the directory have to agree.
        if local_name != info.filename.encode() or method or flags & 0x1:
            raise self._error(f"zip member '{shown(info.filename)}' has a header of another member")
        if size not in (0, info.file_size & 0xFFFFFFFF, 0xFFFFFFFF):
            raise self._error(f"zip member '{shown(info.filename)}' has two sizes")
        return start + name_length + extra

    def _pickle_member(self) -> tuple[str, int, int]:
        top = next(iter(self._members)).split("/")[0]
        name = f"{top}/data.pkl"
        if name not in self._members:
            raise self._error(f"the zip file has no '{shown(name)}'", "a file of torch.save")
        start, length, _ = self._members[name]
        if length > MAX_PICKLE_BYTES:
            raise self._error(f"its pickle has {length} bytes; the limit is {MAX_PICKLE_BYTES}")
        return name, start, length


def flatten(tree: object, where: str, limit: int = 1_000_000) -> dict[str, StoredTensor]:
    """Nested and dotted state dicts as one dict of dotted names; leaves that are no tensors go.

    Megatron's ``encoder`` is a flat dict with dotted keys inside nested ones; either form will do.

    Raises:
        CheckpointError: the tree is no dict of names, is nested over 32 deep or has over ``limit``
            entries.
    """
    found: dict[str, StoredTensor] = {}
    pending: list[tuple[str, object, int]] = [("", tree, 0)]
    visited = 0
    while pending:
        prefix, value, depth = pending.pop()
        visited += 1
        if visited > limit or depth > 32:
            raise CheckpointError(
                f"the state dict has more than {limit} entries or is nested more than 32 deep",
                where=where,
                hint=_STATE_HINT,
            )
        if isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str) or len(key) > 512:
                    raise CheckpointError(
                        f"the state dict has a key that is no name, under '{shown(prefix)}'",
                        where=where,
                        hint=_STATE_HINT,
                    )
                pending.append((f"{prefix}.{key}" if prefix else key, inner, depth + 1))
        elif isinstance(value, StoredTensor):
            if prefix in found:
                raise CheckpointError(
                    f"'{shown(prefix)}' is there twice", where=where, hint=_STATE_HINT
                )
            found[prefix] = value
        elif isinstance(value, StoredStorage):
            raise CheckpointError(
                f"'{shown(prefix)}' is a bare storage", where=where, hint=_STATE_HINT
            )
        elif depth == 0:
            raise CheckpointError(
                "it holds no state dict of names to tensors", where=where, hint=_STATE_HINT
            )
    return found
