"""A sentencepiece model file: its pieces, their types, and copies with other types; special pieces.

This file knows the protobuf wire format and no text of users: nothing here encodes or decodes.

What counts as a special piece:

- a piece of type CONTROL or UNUSED;
- ``|ENDOFTEXT|``, ``|SPEAKER|`` and ``|NEWLINE|``, of whatever type;
- a bracketed piece whose name says ``unused`` or ``reserved``;
- a USER_DEFINED piece of the form ``|NAME|``, ``<|name|>`` or ``<name>``, except ``<name>`` beside a
  ``</name>``, which is markup (Gemma has ``<table>`` and ``</table>``).

Other USER_DEFINED pieces (a newline, a run of spaces, digits) are text and stay so.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece as spm

from tprt.errors import TokenizerError

END_OF_TEXT = "|ENDOFTEXT|"
NAMED_SPECIALS = frozenset({END_OF_TEXT, "|SPEAKER|", "|NEWLINE|"})
MAX_MODEL_BYTES = 256 * 2**20
SPACE = "\u2581"  # sentencepiece's visible blank

# SentencePiece.Type of sentencepiece_model.proto
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_SPECIAL_FORM = re.compile(r"\|[A-Z][A-Z0-9_]*\||<\|[^\s]+\|>|<[A-Za-z0-9][^<>\s/]*>")
RESERVED_NAME = re.compile(r"[<\[|][^\s]*(unused|reserved)[^\s]*[>\]|]", re.IGNORECASE)
NUMBERED = re.compile(r".*\d+[>\]|]")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class ModelPieces:
    """What a model file says about its pieces; an id is an index into ``pieces`` and ``kinds``."""

    pieces: list[str]
    kinds: bytes
    adds_dummy_prefix: bool
    removes_extra_whitespace: bool


# ---------------------------------------------------------------- special pieces


def is_special(piece: str, kind: int, pieces: Collection[str]) -> bool:
    """Whether a piece is special, beside the other ``pieces`` of its model."""
    if kind in (CONTROL, UNUSED) or piece in NAMED_SPECIALS:
        return True
    if kind in (UNKNOWN, BYTE):
        return False
    if RESERVED_NAME.fullmatch(piece):
        return True
    if kind != USER_DEFINED or not _SPECIAL_FORM.fullmatch(piece):
        return False
    return not (piece.startswith("<") and f"</{piece[1:]}" in pieces)


# ---------------------------------------------------------------- the file


def damaged(path: Path, detail: str) -> TokenizerError:
    """The error for a file that was read but is no whole model."""
    return TokenizerError(
        f"not a whole sentencepiece model: {detail}",
        where=str(path),
        hint="copy or download the file again; compare its size with the source",
    )


def read_model(path: Path) -> bytes:
    """The bytes of the model file. Raises TokenizerError where there is none of a sane size."""
    try:
        if not path.is_file():  # a pipe or device would block or never end
            raise TokenizerError(
                "there is no tokenizer file here" if not path.exists() else "not a regular file",
                where=str(path),
                hint="the sentencepiece model of the checkpoint (--set model.tokenizer=FILE)",
            )
        size = path.stat().st_size
        if not 0 < size <= MAX_MODEL_BYTES:
            raise TokenizerError(
                f"the file has {size} bytes; a sentencepiece model has 1 to {MAX_MODEL_BYTES}",
                where=str(path),
                hint="is this the tokenizer, and was it copied whole?",
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise TokenizerError(
            f"cannot read the tokenizer: {error}", where=str(path), hint="check the path and rights"
        ) from error


def load(proto: bytes, path: Path) -> Any:
    """sentencepiece's own processor of a model. Raises TokenizerError where it refuses ``proto``."""
    processor = spm.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto)
    except RuntimeError as error:
        raise damaged(path, str(error)) from error
    return processor


def read_pieces(proto: bytes, path: Path) -> ModelPieces:
    """All pieces of the model. Raises TokenizerError naming ``path`` where ``proto`` is damaged."""
    try:
        return _parse_pieces(proto)
    except (_Malformed, UnicodeDecodeError) as error:
        raise damaged(path, str(error)) from error


def retype(proto: bytes, kinds: Mapping[int, int]) -> bytes:
    """The model with the types of some pieces changed, byte for byte the same elsewhere."""
    out, copied, index = [], 0, -1
    for number, wire, start, payload, end in fields(proto, 0, len(proto)):
        if number != 1 or wire != 2:
            continue
        index += 1
        if index in kinds:
            # The last value of a protobuf field wins, so appending one overrides it.
            message = proto[payload:end] + bytes([3 << 3, kinds[index]])
            out += [proto[copied:start], b"\x0a", _encode_varint(len(message)), message]
            copied = end
    return b"".join([*out, proto[copied:]])


# ---------------------------------------------------------------- the wire format


class _Malformed(Exception):
    """The bytes are no sentencepiece ModelProto."""


def _parse_pieces(proto: bytes) -> ModelPieces:
    pieces: list[str] = []
    kinds = bytearray()
    specs: dict[int, dict[int, int]] = {}
    for number, wire, _, payload, end in fields(proto, 0, len(proto)):
        if number == 1 and wire == 2:
            piece, kind = _read_piece(proto, payload, end)
            pieces.append(piece)
            kinds.append(kind)
        elif number in (2, 3) and wire == 2:
            specs[number] = _varint_fields(proto, payload, end)
    if not pieces or len(specs) < 2:
        # Pieces come first in the file, so a file cut between two fields lacks the specs.
        raise _Malformed(f"{len(pieces)} pieces and {len(specs)} of 2 specifications")
    normalizer = specs[3]
    return ModelPieces(
        pieces,
        bytes(kinds),
        adds_dummy_prefix=bool(normalizer.get(3, 1)),
        removes_extra_whitespace=bool(normalizer.get(4, 1)),
    )


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _Malformed(f"a number breaks off at byte {at}")


def fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(field number, wire type, field start, payload start, end) of one protobuf message."""
    while at < end:
        start = at
        tag, at = _varint(data, at, end)
        wire, payload = tag & 7, at
        if wire == 0:
            _, at = _varint(data, at, end)
        elif wire == 2:
            length, payload = _varint(data, at, end)
            at = payload + length
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise _Malformed(f"wire type {wire} at byte {start}")
        if at > end:
            raise _Malformed(f"a field of {at - start} bytes at byte {start} of {end}")
        yield tag >> 3, wire, start, payload, at


def _varint_fields(data: bytes, at: int, end: int) -> dict[int, int]:
    return {
        number: _varint(data, payload, stop)[0]
        for number, wire, _, payload, stop in fields(data, at, end)
        if wire == 0
    }


def _read_piece(data: bytes, at: int, end: int) -> tuple[str, int]:
    piece, kind = "", NORMAL
    for number, wire, _, payload, stop in fields(data, at, end):
        if number == 1 and wire == 2:
            piece = data[payload:stop].decode()
        elif number == 3 and wire == 0:
            kind, _ = _varint(data, payload, stop)
    if not NORMAL <= kind <= BYTE:
        raise _Malformed(f"piece {piece!r} is of type {kind}")
    if kind == BYTE and not _BYTE_PIECE.fullmatch(piece):
        raise _Malformed(f"byte piece {piece!r}")
    return piece, kind


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
