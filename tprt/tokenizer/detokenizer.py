"""Ids to text while they still arrive: whole characters only, the same text as all at once.

This file asks a tokenizer for its pieces through ``Vocabulary``; it knows neither the model file nor
how text becomes ids.
"""

import codecs
from collections.abc import Iterable
from typing import Protocol

from tprt.tokenizer.sentencepiece_model import SPACE

_ERROR_HANDLER = "tprt.one_replacement_per_byte"


def _one_replacement_per_byte(error: UnicodeError) -> tuple[str, int]:
    # Python's "replace" gives one U+FFFD per maximal broken part, sentencepiece one per byte.
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_ERROR_HANDLER, _one_replacement_per_byte)


class Vocabulary(Protocol):
    """What a detokenizer asks of a ``Tokenizer``."""

    special_ids: frozenset[int]
    adds_dummy_prefix: bool
    removes_extra_whitespace: bool

    def id_to_piece(self, token_id: int) -> str: ...
    def is_byte(self, token_id: int) -> bool: ...
    def token_bytes(self, token_id: int) -> bytes: ...


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
        self, tokenizer: Vocabulary, continuation: bool = True, skip_special_tokens: bool = True
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
        if tokenizer.is_byte(token_id):
            self._at_start = False
            return self._utf8.decode(surface)
        # A character never spans byte pieces with another piece between them: sentencepiece decodes
        # each run of byte pieces on its own.
        head = self.finish()
        if token_id in self._skip:
            return head
        text = surface.decode()
        if self._at_start:
            if tokenizer.id_to_piece(token_id).startswith(SPACE):
                text = text[1:]
                self._at_start = tokenizer.removes_extra_whitespace and not text
            else:
                self._at_start = not text
        return head + text
