"""Text to token ids and back, over a sentencepiece model file; the chat format of Persimmon.

Text of users is data: the special pieces in it are ordinary characters unless a caller asks for
them. sentencepiece sees that otherwise (it matches USER_DEFINED pieces in raw text), so the model is
loaded with the types of its special pieces changed. Nothing here normalises text.

This file knows no model, no rank and no tensor.

What counts as a special piece:

- a piece of type CONTROL or UNUSED;
- ``|ENDOFTEXT|``, ``|SPEAKER|`` and ``|NEWLINE|``, of whatever type;
- a bracketed piece whose name says ``unused`` or ``reserved``;
- a USER_DEFINED piece of the form ``|NAME|``, ``<|name|>`` or ``<name>``, except ``<name>`` beside a
  ``</name>``, which is markup (Gemma has ``<table>`` and ``</table>``).

Other USER_DEFINED pieces (a newline, a run of spaces, digits) are text and stay so.
"""

import codecs
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import sentencepiece as spm

from tprt.errors import ConfigError, TokenizerError

BosPolicy = Literal["none", "bos"]

END_OF_TEXT = "|ENDOFTEXT|"
NAMED_SPECIALS = frozenset({END_OF_TEXT, "|SPEAKER|", "|NEWLINE|"})
MAX_MODEL_BYTES = 256 * 2**20
MEGATRON_VOCAB_MULTIPLE = 128

_SPACE = "\u2581"  # sentencepiece's visible blank
_SPECIAL_FORM = re.compile(r"\|[A-Z][A-Z0-9_]*\||<\|[^\s]+\|>|<[A-Za-z0-9][^<>\s/]*>")
_RESERVED_NAME = re.compile(r"[<\[|][^\s]*(unused|reserved)[^\s]*[>\]|]", re.IGNORECASE)
_NUMBERED = re.compile(r".*\d+[>\]|]")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# SentencePiece.Type of sentencepiece_model.proto
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


class Tokenizer:
    """A sentencepiece model: ``encode``, ``decode`` and what its pieces mean.

    Args:
        path: the model file (``adept_vocab.model``, ``tokenizer.model``).
        bos_policy: ``none`` as Adept's inference, ``bos`` as Hugging Face, which puts the end-of-text
            id in front of every prompt (BOS, EOS and EOD are one piece in Persimmon).

    Raises:
        TokenizerError: the file is missing, damaged, too large or no sentencepiece model, or has
            neither ``|ENDOFTEXT|`` nor an end-of-sentence piece.
    """

    def __init__(self, path: str | Path, bos_policy: BosPolicy = "none") -> None:
        if bos_policy not in ("none", "bos"):
            raise ConfigError(f"bos_policy is {bos_policy!r}", hint="none or bos")
        self.path, self.bos_policy = Path(path), bos_policy
        self._proto = _read_model(self.path)
        try:
            self._read_pieces()
        except (_Malformed, UnicodeDecodeError) as error:
            raise _damaged(self.path, str(error)) from error
        self._plain = _load(self._proto, self.path)
        self.vocab_size = len(self._pieces)
        if self._plain.get_piece_size() != self.vocab_size:
            raise _damaged(self.path, "its list of pieces reads in two ways")
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        self.eod_id = self._find_eod()
        self.unused_ids = self._find_unused()
        self.special_ids = self._find_specials()
        # Two more copies of the model differ from the file in the types of special pieces alone: in
        # `_inert` none can come from text, in `_parsing` all can.
        inert = {i for i in self.special_ids if self._kinds[i] in (_NORMAL, _USER_DEFINED)}
        self._inert = self._plain
        if inert:
            self._inert = _load(_retype(self._proto, dict.fromkeys(inert, _CONTROL)), self.path)

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.path)!r}, {self.vocab_size} pieces, eod {self.eod_id})"

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the model file, for fingerprints."""
        return hashlib.sha256(self._proto).hexdigest()

    def id_to_piece(self, token_id: int) -> str:
        """The piece as the model spells it. Raises ConfigError for an id outside the vocabulary."""
        return self._pieces[self._checked(token_id)]

    def piece_to_id(self, piece: str) -> int | None:
        """The id of exactly this piece, or None."""
        return self._ids.get(piece)

    def encode(
        self, text: str, add_bos: bool | None = None, parse_special: bool = False
    ) -> list[int]:
        """Ids of ``text``; the first word gets sentencepiece's blank in front if the model says so.

        Args:
            text: any text that can be UTF-8, NUL included.
            add_bos: put the end-of-text id in front; None follows the tokenizer's ``bos_policy``.
            parse_special: let special pieces in the text become their ids. Without it no id of
                ``special_ids`` comes out of text. Special pieces at the very start stand before the
                text proper, so ``"|ENDOFTEXT|" + t`` gives the ids of ``t`` with BOS.

        Raises:
            ConfigError: ``text`` is no string or holds a lone surrogate.
        """
        if not isinstance(text, str):
            raise ConfigError(f"a prompt must be text, not {type(text).__name__}")
        _refuse_surrogates(text)
        use_bos = self.bos_policy == "bos" if add_bos is None else add_bos
        ids = [self.eod_id] if use_bos else []
        model = self._inert
        if parse_special:
            model, pattern = self._parsing
            while match := pattern.match(text):
                ids.append(self._ids[match[0]])
                text = text[match.end() :]
        encoded: list[int] = model.encode(text) if text else []
        return ids + encoded

    def decode(
        self,
        ids: Iterable[int],
        skip_special_tokens: bool = True,
        strip_leading_space: bool = True,
    ) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD, one for each byte.

        Args:
            ids: token ids.
            skip_special_tokens: leave ``special_ids`` out; else they show as the model spells them.
            strip_leading_space: take off the one blank that encoding put in front of a whole text.
                False for a completion, whose first blank belongs between prompt and answer.

        Raises:
            ConfigError: an id lies outside the vocabulary.
        """
        detokenizer = Detokenizer(
            self,
            continuation=not strip_leading_space,
            skip_special_tokens=skip_special_tokens,
        )
        return detokenizer.push(ids) + detokenizer.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 of one token as it stands inside a text; a byte piece gives its byte."""
        return self._surfaces[self._checked(token_id)]

    def _checked(self, token_id: int) -> int:
        if 0 <= token_id < self.vocab_size:
            return token_id
        raise ConfigError(
            f"token id {token_id} lies outside the vocabulary, allowed are 0 to {self.vocab_size - 1}",
            where=str(self.path),
        )

    @cached_property
    def _surfaces(self) -> list[bytes]:
        # 0.2 s for 262,144 pieces, so only on first use.
        table = []
        for piece, kind in zip(self._pieces, self._kinds, strict=True):
            if kind == _BYTE:
                table.append(bytes([int(piece[3:5], 16)]))
            else:
                table.append(piece.replace(_SPACE, " ").encode())
        unknown: str = self._plain.decode([self._unk_id])
        table[self._unk_id] = unknown.encode()
        return table

    @cached_property
    def _parsing(self) -> tuple[Any, re.Pattern[str]]:
        ids = [i for i in self.special_ids if i not in self.unused_ids]
        ids = [i for i in ids if self._kinds[i] != _UNUSED and self._pieces[i]]
        model = _load(_retype(self._proto, dict.fromkeys(ids, _USER_DEFINED)), self.path)
        names = sorted((self._pieces[i] for i in ids), key=len, reverse=True)
        # An empty alternation would match everywhere; "(?!)" matches nowhere.
        return model, re.compile("|".join(map(re.escape, names)) or "(?!)")

    def _read_pieces(self) -> None:
        pieces: list[str] = []
        kinds = bytearray()
        specs: dict[int, dict[int, int]] = {}
        for number, wire, _, payload, end in _fields(self._proto, 0, len(self._proto)):
            if number == 1 and wire == 2:
                piece, kind = _read_piece(self._proto, payload, end)
                pieces.append(piece)
                kinds.append(kind)
            elif number in (2, 3) and wire == 2:
                specs[number] = _varint_fields(self._proto, payload, end)
        if not pieces or len(specs) < 2:
            # Pieces come first in the file, so a file cut between two fields lacks the specs.
            raise _Malformed(f"{len(pieces)} pieces and {len(specs)} of 2 specifications")
        self._pieces, self._kinds = pieces, bytes(kinds)
        normalizer = specs[3]
        self.adds_dummy_prefix = bool(normalizer.get(3, 1))
        self.removes_extra_whitespace = bool(normalizer.get(4, 1))

    @property
    def _unk_id(self) -> int:
        return self._kinds.index(_UNKNOWN)

    def _find_eod(self) -> int:
        found = self._ids.get(END_OF_TEXT)
        if found is not None:
            return found
        eos: int = self._plain.eos_id()
        if eos < 0:
            raise TokenizerError(
                f"the tokenizer has no end-of-text id: neither a piece {END_OF_TEXT} nor an "
                "end-of-sentence piece",
                where=str(self.path),
                hint="the tokenizer that came with the checkpoint",
            )
        return eos

    def _find_unused(self) -> range:
        """The longest run of pieces that no text was ever trained on.

        Unused are pieces of type UNUSED, bracketed names that say so, and numbered CONTROL pieces;
        the model's own unknown, begin, end and pad pieces and the end of text are not.
        """
        plain = self._plain
        kept = {self.eod_id, plain.unk_id(), plain.bos_id(), plain.eos_id(), plain.pad_id()}

        def unused(i: int) -> bool:
            piece, kind = self._pieces[i], self._kinds[i]
            if i in kept or piece in NAMED_SPECIALS or kind == _BYTE:
                return False
            numbered = kind == _CONTROL and _NUMBERED.fullmatch(piece) is not None
            return kind == _UNUSED or numbered or _RESERVED_NAME.fullmatch(piece) is not None

        best, start = range(0), 0
        for i in range(self.vocab_size + 1):
            if i == self.vocab_size or not unused(i):
                best = max(best, range(start, i), key=len)
                start = i + 1
        return best

    def _find_specials(self) -> frozenset[int]:
        return frozenset(i for i in range(self.vocab_size) if self._is_special(i)) | {self.eod_id}

    def _is_special(self, i: int) -> bool:
        piece, kind = self._pieces[i], self._kinds[i]
        if kind in (_CONTROL, _UNUSED) or piece in NAMED_SPECIALS:
            return True
        if kind in (_UNKNOWN, _BYTE):
            return False
        if _RESERVED_NAME.fullmatch(piece):
            return True
        if kind != _USER_DEFINED or not _SPECIAL_FORM.fullmatch(piece):
            return False
        return not (piece.startswith("<") and f"</{piece[1:]}" in self._ids)


class Detokenizer:
    """Turns a growing row of ids into text, piece by piece.

    All pushes and ``finish`` joined equal ``Tokenizer.decode`` of all ids. Text is held back only
    while the bytes of a character are incomplete.

    Args:
        tokenizer: whose ids they are.
        continuation: the ids go on from a prompt, so a blank in front belongs to the text. False
            takes off the one blank that encoding put in front of a whole text.
        skip_special_tokens: as in ``Tokenizer.decode``.
    """

    def __init__(
        self, tokenizer: Tokenizer, continuation: bool = True, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(_ERROR_HANDLER)
        strips = tokenizer.adds_dummy_prefix or tokenizer.removes_extra_whitespace
        self._at_start = strips and not continuation

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain. Raises ConfigError for an id outside the vocabulary."""
        return "".join(self._text(token_id) for token_id in ids)

    def finish(self) -> str:
        """The rest: U+FFFD for every byte of a character that never became whole."""
        return self._utf8.decode(b"", final=True)

    def _text(self, token_id: int) -> str:
        tokenizer = self._tokenizer
        surface = tokenizer.token_bytes(token_id)
        if tokenizer._kinds[token_id] == _BYTE:
            self._at_start = False
            return self._utf8.decode(surface)
        # A character never spans byte pieces with another piece between them: sentencepiece decodes
        # each run of byte pieces on its own.
        head = self.finish()
        if token_id in self._skip:
            return head
        text = surface.decode()
        if self._at_start:
            if tokenizer._pieces[token_id].startswith(_SPACE):
                text = text[1:]
                self._at_start = tokenizer.removes_extra_whitespace and not text
            else:
                self._at_start = not text
        return head + text


# ---------------------------------------------------------------- chat


def render_chat(messages: Sequence[Mapping[str, Any]]) -> str:
    """``human: {text}\\n\\nadept:``, the format Persimmon's chat model was tuned on.

    Texts are stripped and there is no blank at the end: the model writes it. The format has no
    escapes, so ``\\n\\nadept:`` inside a message reads like a turn of its own.

    Args:
        messages: ``{"role": "user" | "human" | "assistant" | "adept", "content": str}`` in turns,
            from a user's to a user's.

    Raises:
        ConfigError: no messages, another role, content that is no text, or turns out of order.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ConfigError(
            f"messages must be a list with one message at least, not {messages!r:.80}"
        )
    names = {"user": "human", "human": "human", "assistant": "adept", "adept": "adept"}
    turns = []
    for number, message in enumerate(messages, start=1):
        where = f"message {number} of {len(messages)}"
        if not isinstance(message, Mapping):
            raise ConfigError(f"a message must be an object, not {message!r:.80}", where=where)
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in names:
            raise ConfigError(
                f"role is {role!r:.80}; Persimmon was tuned on user and assistant turns only",
                where=where,
                hint="put instructions into the first user message"
                if role in ("system", "developer")
                else "user or assistant",
            )
        wanted = "human" if number % 2 else "adept"
        if names[role] != wanted:
            raise ConfigError(
                f"role is {role!r} where a turn of {'user' if number % 2 else 'assistant'} is due",
                where=where,
                hint="turns alternate and begin and end with user",
            )
        if not isinstance(content, str):
            raise ConfigError(f"content must be text, not {content!r:.80}", where=where)
        turns.append(f"{wanted}: {content.strip()}")
    if len(messages) % 2 == 0:
        raise ConfigError(
            "the last message is the assistant's; there is nothing to answer",
            where=f"message {len(messages)} of {len(messages)}",
            hint="turns alternate and begin and end with user",
        )
    return "\n\n".join([*turns, "adept:"])


# ---------------------------------------------------------------- tokenizer against model


def check_vocab(tokenizer: Tokenizer, rows: int, padding_multiple: int, where: str) -> int:
    """The number of ids that mean something, when the tokenizer can be this model's.

    Megatron pads the vocabulary up to a multiple of 128 x TP, so a model may have fewer than
    max(128, ``padding_multiple``) rows beyond the tokenizer's pieces; more, or fewer rows than
    pieces, means another model's tokenizer.

    Args:
        tokenizer: the tokenizer found with the checkpoint or given by the user.
        rows: rows of the embedding on disk.
        padding_multiple: what the checkpoint says its vocabulary was padded to (1 when silent).
        where: the checkpoint, for the message.

    Raises:
        TokenizerError: tokenizer and model do not belong together.
    """
    pieces, slack = tokenizer.vocab_size, max(MEGATRON_VOCAB_MULTIPLE, padding_multiple)
    if pieces <= rows < pieces + slack:
        return pieces
    raise TokenizerError(
        f"the tokenizer has {pieces} pieces and the model {rows} embedding rows; "
        f"a tokenizer of this model has {max(1, rows - slack + 1)} to {rows}",
        where=f"{tokenizer.path} with {where}",
        hint="the tokenizer that came with this checkpoint (--set model.tokenizer=FILE)",
    )


def eos_warnings(tokenizer: Tokenizer, eos_token_id: int | None) -> list[str]:
    """What to tell a user whose model config names another end than the tokenizer has.

    The scan wins: self-converted checkpoints say 2 and pruned ones 71013, and neither ever stops.
    """
    if eos_token_id is None or eos_token_id == tokenizer.eod_id:
        return []
    return [
        f"eos in config differs from the piece scan: {eos_token_id} in the model's config, "
        f"{tokenizer.eod_id} is {tokenizer.id_to_piece(tokenizer.eod_id)} in {tokenizer.path}; "
        f"using {tokenizer.eod_id}"
    ]


# ---------------------------------------------------------------- the model file


class _Malformed(Exception):
    """The bytes are no sentencepiece ModelProto."""


def _damaged(path: Path, detail: str) -> TokenizerError:
    return TokenizerError(
        f"not a whole sentencepiece model: {detail}",
        where=str(path),
        hint="copy or download the file again; compare its size with the source",
    )


def _read_model(path: Path) -> bytes:
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


def _load(proto: bytes, path: Path) -> Any:
    processor = spm.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto)
    except RuntimeError as error:
        raise _damaged(path, str(error)) from error
    return processor


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


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
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
        for number, wire, _, payload, stop in _fields(data, at, end)
        if wire == 0
    }


def _read_piece(data: bytes, at: int, end: int) -> tuple[str, int]:
    piece, kind = "", _NORMAL
    for number, wire, _, payload, stop in _fields(data, at, end):
        if number == 1 and wire == 2:
            piece = data[payload:stop].decode()
        elif number == 3 and wire == 0:
            kind, _ = _varint(data, payload, stop)
    if not _NORMAL <= kind <= _BYTE:
        raise _Malformed(f"piece {piece!r} is of type {kind}")
    if kind == _BYTE and not _BYTE_PIECE.fullmatch(piece):
        raise _Malformed(f"byte piece {piece!r}")
    return piece, kind


def _retype(proto: bytes, kinds: Mapping[int, int]) -> bytes:
    """The model with the types of some pieces changed, byte for byte the same elsewhere."""
    out, copied, index = [], 0, -1
    for number, wire, start, payload, end in _fields(proto, 0, len(proto)):
        if number != 1 or wire != 2:
            continue
        index += 1
        if index in kinds:
            # The last value of a protobuf field wins, so appending one overrides it.
            message = proto[payload:end] + bytes([3 << 3, kinds[index]])
            out += [proto[copied:start], b"\x0a", _encode_varint(len(message)), message]
            copied = end
    return b"".join([*out, proto[copied:]])


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


# ---------------------------------------------------------------- UTF-8

_ERROR_HANDLER = "tprt.one_replacement_per_byte"


def _one_replacement_per_byte(error: UnicodeError) -> tuple[str, int]:
    # Python's "replace" gives one U+FFFD per maximal broken part, sentencepiece one per byte.
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_ERROR_HANDLER, _one_replacement_per_byte)


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which no UTF-8 can hold",
            hint="repair the JSON escape (surrogates come in pairs) or remove it",
        ) from None
