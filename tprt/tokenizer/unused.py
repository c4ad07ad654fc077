"""Which pieces nothing was trained on: what a model file proves, what it suggests, what must stay.

Proof is what the file itself says: a piece of type UNUSED, or a numbered one in brackets whose name says
``unused`` or ``reserved``. No text becomes such a piece (sentencepiece never makes one of type UNUSED or
CONTROL from text, and ``Tokenizer.encode`` none that is special). Other numbered special pieces, such as
``<extra_id_7>``, look the same and may well be what a model writes.

Knows pieces and types as ``sentencepiece_model`` reads them; no text and no tensor.
"""

import re
from collections.abc import Callable, Collection, Iterable, Sequence

from tprt.errors import ConfigError
from tprt.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    NAMED_SPECIALS,
    NUMBERED,
    RESERVED_NAME,
    UNUSED,
)

SHOWN_PIECES = 3
# A word of its own at the front: ``<preserved_7>`` says nothing of the kind.
_SAYS_UNUSED = re.compile(r"[<\[|]\S*(?<![A-Za-z])(unused|reserved)\S*\d[>\]|]", re.IGNORECASE)


def says_unused(piece: str, kind: int) -> bool:
    """Whether the model file itself says that a piece is unused."""
    if piece in NAMED_SPECIALS or kind == BYTE:
        return False
    return kind == UNUSED or _SAYS_UNUSED.fullmatch(piece) is not None


def looks_unused(piece: str, kind: int) -> bool:
    """``says_unused``, or any numbered CONTROL piece or bracketed name with such a word."""
    if piece in NAMED_SPECIALS or kind == BYTE:
        return False
    numbered = kind == CONTROL and NUMBERED.fullmatch(piece) is not None
    return kind == UNUSED or numbered or RESERVED_NAME.fullmatch(piece) is not None


def longest_run(
    pieces: Sequence[str], kinds: bytes, kept: Collection[int], test: Callable[[str, int], bool]
) -> range:
    """The longest run of pieces that pass ``test``, none of which is in ``kept``."""
    best, start = range(0), 0
    for i in range(len(pieces) + 1):
        if i == len(pieces) or i in kept or not test(pieces[i], kinds[i]):
            best = max(best, range(start, i), key=len)
            start = i + 1
    return best


def reserved_block(
    pieces: Sequence[str], kinds: bytes, kept: Collection[int], where: str
) -> tuple[int, int]:
    """The first and the last id of the longest block that is proven unused.

    Args:
        kept: ids that are never unused: unknown, begin, end and pad pieces, the end of text.
        where: the model file, for the message.

    Raises:
        ConfigError: nothing is proven; names the block that looks unused, where there is one.
    """
    block = longest_run(pieces, kinds, kept, says_unused)
    if block:
        return block[0], block[-1]
    suspects = longest_run(pieces, kinds, kept, looks_unused)
    what = "model.trim_vocab=reserved: nothing in this tokenizer says which ids are unused"
    if suspects:
        first, last = suspects[0], suspects[-1]
        what += (
            f"; ids {first} to {last} ({pieces[first]} to {pieces[last]}) look so and may be in use"
        )
        hint = f"model.trim_vocab=[[{first}, {last}]] if the model never writes them, or off"
    else:
        hint = "ranges of ids that you know are never written, such as [[3, 70002]], or off"
    raise ConfigError(what, where=where, hint=hint)


def check_removable(
    pieces: Sequence[str],
    kinds: bytes,
    kept: Collection[int],
    special: Collection[int],
    ranges: Iterable[tuple[int, int]],
    where: str,
) -> None:
    """Raises ConfigError when ``ranges`` take a piece that no model can do without.

    These are ``kept``, byte pieces, and ``special`` ones that carry no number and do not say that they
    are unused.
    """

    def needed_here(i: int) -> bool:
        if i in kept or kinds[i] == BYTE:
            return True
        return i in special and not (
            looks_unused(pieces[i], kinds[i]) or NUMBERED.fullmatch(pieces[i])
        )

    ids = (i for first, last in ranges for i in range(first, min(last + 1, len(pieces))))
    if needed := [i for i in ids if needed_here(i)]:
        shown = ", ".join(f"{i} ({pieces[i]})" for i in needed[:SHOWN_PIECES])
        raise ConfigError(
            f"model.trim_vocab removes ids that must stay: {shown}"
            + (f" and {len(needed) - SHOWN_PIECES} more" if len(needed) > SHOWN_PIECES else ""),
            where=where,
            hint="ranges without control, byte and other special pieces",
        )
