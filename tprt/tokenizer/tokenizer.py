"""Text to ids and back, and whether a tokenizer belongs to a model.

Text of users is data: the special pieces in it are ordinary characters unless a caller asks for
them. sentencepiece sees that otherwise (it matches USER_DEFINED pieces in raw text), so the model is
loaded with the types of its special pieces changed. Nothing here normalises text.

This file knows no model, no rank, no tensor and not the wire format of the model file.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tprt.errors import ConfigError, TokenizerError
from tprt.tokenizer.chat import GEMMA, PERSIMMON, render_chat
from tprt.tokenizer.detokenizer import Detokenizer
from tprt.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    END_OF_TEXT,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    damaged,
    is_special,
    load,
    read_model,
    read_pieces,
    retype,
)
from tprt.tokenizer.unused import check_removable, longest_run, looks_unused, reserved_block

BosPolicy = Literal["auto", "none", "bos"]
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"  # of Gemma's chat format

MEGATRON_VOCAB_MULTIPLE = 128


class Tokenizer:
    """A sentencepiece model: ``encode``, ``decode`` and what its pieces mean.

    Args:
        path: the model file (``adept_vocab.model``, ``tokenizer.model``).
        bos_policy: ``bos`` puts ``bos_id`` in front of every prompt, as Hugging Face does; ``none`` does
            not, as Adept's inference; ``auto`` is what the model was tuned on: ``bos`` with Gemma's
            tokenizer, else ``none``.

    Attributes:
        eod_id, bos_id: end and beginning of a text; one piece in Persimmon.
        end_ids: ids that end an answer: ``eod_id``, and Gemma's end of a turn.

    Raises:
        TokenizerError: the file is missing, damaged, too large or no sentencepiece model, or has
            neither ``|ENDOFTEXT|`` nor an end-of-sentence piece.
    """

    def __init__(self, path: str | Path, bos_policy: BosPolicy = "auto") -> None:
        if bos_policy not in ("auto", "none", "bos"):
            raise ConfigError(f"bos_policy is {bos_policy!r}", hint="auto, none or bos")
        self.path = Path(path)
        self._proto = read_model(self.path)
        model = read_pieces(self._proto, self.path)
        self._pieces, self._kinds = model.pieces, model.kinds
        self.adds_dummy_prefix = model.adds_dummy_prefix
        self.removes_extra_whitespace = model.removes_extra_whitespace
        self._plain = load(self._proto, self.path)
        self.vocab_size = len(self._pieces)
        if self._plain.get_piece_size() != self.vocab_size:
            raise damaged(self.path, "its list of pieces reads in two ways")
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        self.eod_id = self._find_eod()
        plain = self._plain
        turn = [self._ids[piece] for piece in (START_OF_TURN, END_OF_TURN) if piece in self._ids]
        self._turn = turn if len(turn) == 2 else []
        self.bos_policy = bos_policy
        if bos_policy == "auto":
            self.bos_policy = "bos" if self._turn else "none"
        # Where one piece ends every text it also begins them.
        alike = END_OF_TEXT in self._ids or plain.bos_id() < 0
        self.bos_id: int = self.eod_id if alike else plain.bos_id()
        self.end_ids = frozenset({self.eod_id, *self._turn[1:]})
        self.turn_markers = tuple(self._pieces[i] for i in self._turn)
        self.chat_stop = (GEMMA if self._turn else PERSIMMON).stop
        ends = plain.unk_id(), plain.bos_id(), plain.eos_id(), plain.pad_id()
        self._kept = frozenset({self.eod_id, *ends})
        self.unused_ids = longest_run(self._pieces, self._kinds, self._kept, looks_unused)
        self.special_ids = self._find_specials()
        # Two more copies of the model differ from the file in the types of special pieces alone: in
        # `_inert` none can come from text, in `_parsing` all can.
        inert = {i for i in self.special_ids if self._kinds[i] in (NORMAL, USER_DEFINED)}
        self._inert = self._plain
        if inert:
            self._inert = load(retype(self._proto, dict.fromkeys(inert, CONTROL)), self.path)

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
            add_bos: put ``bos_id`` in front; None follows the tokenizer's ``bos_policy``.
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
        ids = [self.bos_id] if use_bos else []
        model = self._inert
        if parse_special:
            model, pattern = self._parsing
            while match := pattern.match(text):
                ids.append(self._ids[match[0]])
                text = text[match.end() :]
        encoded: list[int] = model.encode(text) if text else []
        return ids + encoded

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a prompt that asks for the next turn, in the format this tokenizer was made for.

        What stands in a message is text: a marker in it is spelled out, and begins no turn.

        Raises:
            ConfigError: see ``ChatFormat.turns``.
        """
        if not self._turn:
            return self.encode(render_chat(messages))
        start, end = self._turn
        ids = [self.bos_id] if self.bos_policy == "bos" else []
        for who, text in GEMMA.turns(messages):
            turn, newline = self.encode(f"{who}\n{text}", False), self.encode("\n", False)
            ids += [start, *turn, end, *newline]
        return [*ids, start, *self.encode(f"{GEMMA.assistant}\n", False)]

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

    def is_byte(self, token_id: int) -> bool:
        """Whether the piece stands for one byte. Raises ConfigError like ``id_to_piece``."""
        return self._kinds[self._checked(token_id)] == BYTE

    def reserved_block(self) -> tuple[int, int]:
        """The first and the last id of the block that the model file proves unused.

        Raises:
            ConfigError: it proves none; see ``unused.reserved_block``.
        """
        return reserved_block(self._pieces, self._kinds, self._kept, str(self.path))

    def check_removable(self, ranges: Collection[tuple[int, int]]) -> None:
        """Raises ConfigError when a range, both ends inside, takes a piece that must stay.

        The end of text, unknown, begin, end, pad and byte pieces must, and special ones, except those
        that carry a number or say that they are unused.
        """
        check_removable(
            self._pieces, self._kinds, self._kept, self.special_ids, ranges, str(self.path)
        )

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
            if kind == BYTE:
                table.append(bytes([int(piece[3:5], 16)]))
            else:
                table.append(piece.replace(SPACE, " ").encode())
        unknown: str = self._plain.decode([self._unk_id])
        table[self._unk_id] = unknown.encode()
        return table

    @cached_property
    def _parsing(self) -> tuple[Any, re.Pattern[str]]:
        ids = [i for i in self.special_ids if i not in self.unused_ids]
        ids = [i for i in ids if self._kinds[i] != UNUSED and self._pieces[i]]
        model = load(retype(self._proto, dict.fromkeys(ids, USER_DEFINED)), self.path)
        names = sorted((self._pieces[i] for i in ids), key=len, reverse=True)
        # An empty alternation would match everywhere; "(?!)" matches nowhere.
        return model, re.compile("|".join(map(re.escape, names)) or "(?!)")

    @property
    def _unk_id(self) -> int:
        return self._kinds.index(UNKNOWN)

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

    def _find_specials(self) -> frozenset[int]:
        typed = enumerate(zip(self._pieces, self._kinds, strict=True))
        specials = {i for i, (piece, kind) in typed if is_special(piece, kind, self._ids)}
        return frozenset(specials | {self.eod_id})


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
    if eos_token_id is None or eos_token_id in tokenizer.end_ids:
        return []
    return [
        f"eos in config differs from the piece scan: {eos_token_id} in the model's config, "
        f"{tokenizer.eod_id} is {tokenizer.id_to_piece(tokenizer.eod_id)} in {tokenizer.path}; "
        f"using {tokenizer.eod_id}"
    ]


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which no UTF-8 can hold",
            hint="repair the JSON escape (surrogates come in pairs) or remove it",
        ) from None
