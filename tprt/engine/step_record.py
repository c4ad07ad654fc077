"""The one message ranks get: what to run in a step, as whole numbers of a fixed layout.

A record is a 64-word int64 header and typed sections behind it. No Python object travels in it, so
it can be checked, digested, written to a file and run again. Knows numbers only: no sequences, no
tensors of a model, no sockets.

Header words: 0 magic, 1 version, 2 step, 3 kind, 4 graph key, 5 payload words, 6 CRC-32 of the
record with this word 0, 7 full sampler, 8 and 9 most logprobs of a row, 10 look-ahead,
16 + i length of section i in words.
"""

import zlib
from dataclasses import dataclass, field, fields
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

MAGIC = 0x7470_7274_7265_6331  # "tprtrec1"
VERSION = 2
HEADER_WORDS = 64
FIRST_LENGTH = 16
MAX_PAYLOAD_WORDS = 2**27

# Flags of a row: draw a token after it; return the logits of all its tokens; return the
# log-probabilities of the ids in ``targets`` and of the likeliest ones at all its tokens.
DRAW, ALL_LOGITS, PROMPT_LOGPROBS = 1, 2, 4
DEVICE_TOKEN = -1  # the token this slot drew last, which may not have reached the host yet

# Limits of what a graph holds: rows, and bans of all rows together.
MAX_BUCKET, MAX_BANS = 256, 1024


def bucket_of(rows: int) -> int:
    """Rows of the graph that runs a decode step of ``rows``; 0 where none does.

    1, 2, 4, 8, then multiples of 8 up to 64 and of 32 up to MAX_BUCKET: little is padded, and few
    graphs are captured at start.
    """
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step if rows <= MAX_BUCKET else 0


class Kind(IntEnum):
    """What a record asks for."""

    STEP = 1  # run rows
    CALL = 2  # a call begins; ``text`` names it
    RETURN = 3  # the call ends; ``text`` holds its results as JSON bytes, or the error
    HEARTBEAT = 4  # nothing to run; results are read as far as look_ahead says
    CLOSE = 5  # leave ``follow``
    OPEN = 6  # first in a file: what engine wrote it, as JSON bytes; never sent to a rank


class RecordLayoutError(ValueError):
    """A record is damaged, of another version, or not a record."""


def _empty(width: int = 0) -> Ints:
    return np.zeros((0, width) if width else 0, dtype=np.int64)


@dataclass(kw_only=True)
class StepRecord:
    """Legend: R rows, T tokens of all rows, S slots.

    Args:
        step: counts records of one engine from 0.
        full: rows are drawn by the full sampler (see ``sampler``).
        logprobs: most log-probabilities wanted beside a drawn token in any row; -1 none.
        prompt_logprobs: the same beside a prompt token.
        look_ahead: once this step runs, the results of all but so many steps are read.
        rows: [R, 4] slot, position of the first token, tokens, flags.
        tokens: [T] ids laid end to end, DEVICE_TOKEN for one that is still on the device.
        blocks: [K, 3] slot, index in the slot's block table, block; applied before the step.
        copies: [C, 2] block to copy from, block to copy to; applied in order, before the step.
        clears: [D] blocks to fill with zeros, before the copies.
        states: [E, 2] row of slot caches to copy from, row to copy to; in order, before the step.
        options: packed ``SlotOptions`` of slots that begin a sequence.
        bans: [N, 2] index among the rows that draw, id that it may not draw in this step.
        targets: ids whose log-probabilities PROMPT_LOGPROBS rows want, one per token; -1 none.
        text: UTF-8 bytes of a CALL or RETURN, padded with zeros to whole words; of the heartbeat of an
            idle rank 0, the seconds within which the next one comes.
    """

    step: int
    kind: Kind
    full: bool = False
    logprobs: int = -1
    prompt_logprobs: int = -1
    look_ahead: int = 0
    rows: Ints = field(default_factory=lambda: _empty(4))
    tokens: Ints = field(default_factory=_empty)
    blocks: Ints = field(default_factory=lambda: _empty(3))
    copies: Ints = field(default_factory=lambda: _empty(2))
    clears: Ints = field(default_factory=_empty)
    states: Ints = field(default_factory=lambda: _empty(2))
    options: Ints = field(default_factory=_empty)
    bans: Ints = field(default_factory=lambda: _empty(2))
    targets: Ints = field(default_factory=_empty)
    text: bytes = b""

    @property
    def graph_key(self) -> int:
        """0 for a step that runs without a graph, else what names its graph.

        A pure function of the record: ``bucket_of`` its rows * 4 + full * 2 + wants logprobs. Only
        steps in which every row has one token and draws one have a graph.
        """
        count = len(self.rows)
        if self.kind != Kind.STEP or count == 0 or len(self.tokens) != count:
            return 0
        bucket = bucket_of(count)
        if bucket == 0 or len(self.bans) > MAX_BANS or (self.rows[:, 3] != DRAW).any():
            return 0
        return bucket * 4 + self.full * 2 + (self.logprobs >= 0)

    def encode(self) -> Ints:
        """int64 [HEADER_WORDS + payload]."""
        text = self.text + bytes(-len(self.text) % 8)
        sections = [
            self.rows, self.tokens, self.blocks, self.copies, self.clears, self.states, self.options,
            self.bans, self.targets,
        ]  # fmt: skip
        sections.append(np.frombuffer(text, dtype=np.int64))
        payload = sum(s.size for s in sections)
        record = np.empty(HEADER_WORDS + payload, dtype=np.int64)
        record[:HEADER_WORDS] = 0
        head = [MAGIC, VERSION, self.step, self.kind, self.graph_key, payload, 0]
        options = [self.full, self.logprobs, self.prompt_logprobs, self.look_ahead]
        record[:11] = [*head, *options]
        at = HEADER_WORDS
        for i, section in enumerate(sections):
            record[FIRST_LENGTH + i] = section.size
            record[at : at + section.size] = section.ravel()
            at += section.size
        record[FIRST_LENGTH + len(sections)] = len(self.text)
        record[6] = zlib.crc32(record.data)
        return record

    @classmethod
    def decode(cls, words: Ints) -> "StepRecord":
        """The record of ``words``; its sections are views into one copy of them.

        Raises:
            RecordLayoutError: too short or long, of another version, damaged, or inconsistent.
        """
        payload = payload_words(words[:HEADER_WORDS])
        if len(words) != HEADER_WORDS + payload:
            raise RecordLayoutError(
                f"a record of {HEADER_WORDS + payload} words came as {len(words)}"
            )
        crc = int(words[6])
        words = words.copy()
        words[6] = 0
        if zlib.crc32(words.data) != crc:
            raise RecordLayoutError(f"the record of step {words[2]} is damaged (CRC-32 differs)")
        words[6] = crc
        try:
            record = cls._from_words(words)
        except ValueError as error:
            raise RecordLayoutError(
                f"the record of step {words[2]} is inconsistent: {error}"
            ) from None
        if record.graph_key != words[4]:
            raise RecordLayoutError(
                f"step {record.step} has graph key {record.graph_key}, its header says {words[4]}"
            )
        return record

    @classmethod
    def _from_words(cls, words: Ints) -> "StepRecord":
        lengths = words[FIRST_LENGTH : FIRST_LENGTH + len(_SECTIONS)].tolist()
        if min(lengths) < 0 or sum(lengths) != words[5]:
            raise ValueError("its sections do not fill it")
        values, at = {}, HEADER_WORDS
        for (name, width), length in zip(_SECTIONS.items(), lengths, strict=True):
            section = words[at : at + length]
            values[name] = section.reshape(-1, width) if width > 1 else section
            at += length
        size = int(words[FIRST_LENGTH + len(_SECTIONS)])
        text = values.pop("text").tobytes()
        if not 0 <= len(text) - size < 8:
            raise ValueError(f"a text of {size} bytes in {len(text)}")
        counts, flags = values["rows"][:, 2], values["rows"][:, 3]
        if (counts < 1).any() or counts.sum() != len(values["tokens"]):
            raise ValueError("rows and tokens differ in length")
        if counts[(flags & PROMPT_LOGPROBS) != 0].sum() != len(values["targets"]):
            raise ValueError("rows and targets differ in length")
        return cls(
            step=int(words[2]), kind=Kind(int(words[3])), full=bool(words[7]),
            logprobs=int(words[8]), prompt_logprobs=int(words[9]), look_ahead=int(words[10]),
            text=text[:size], **values,
        )  # fmt: skip


_SECTIONS = {
    "rows": 4, "tokens": 1, "blocks": 3, "copies": 2, "clears": 1, "states": 2, "options": 1, "bans": 2,
    "targets": 1, "text": 1,
}  # fmt: skip


def payload_words(header: Ints) -> int:
    """Words behind a header. Raises RecordLayoutError when it is none of ours."""
    if len(header) < HEADER_WORDS or header[0] != MAGIC:
        raise RecordLayoutError("this is not a step record")
    if header[1] != VERSION:
        raise RecordLayoutError(f"a record of version {header[1]}; this is version {VERSION}")
    if not 0 <= header[5] <= MAX_PAYLOAD_WORDS:
        raise RecordLayoutError(f"a payload of {header[5]} words; the limit is {MAX_PAYLOAD_WORDS}")
    return int(header[5])


@dataclass(frozen=True, kw_only=True)
class SlotOptions:
    """How one slot draws, sent once when a sequence takes it.

    Args:
        slot: row of the persistent state.
        seed_key: of ``noise.sequence_key``.
        arrival, index: which completion of which request this is, for whoever reads the records.
        temperature: 0 is greedy.
        top_k: 0 keeps all.
        num_prompt_tokens: how many of ``history`` are the prompt; presence and frequency penalties
            count the others only.
        history: prompt and completion so far, where a penalty needs them; else empty.
        bias: (id, value added to its logit).
        allowed: the only ids that may be drawn; empty allows all.
    """

    slot: int
    seed_key: int
    temperature: float
    arrival: int = 0
    index: int = 0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_prompt_tokens: int = 0
    history: tuple[int, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] = ()

    def encode(self) -> Ints:
        ints = [getattr(self, name) for name in _INT_OPTIONS]
        floats = [getattr(self, name) for name in _FLOAT_OPTIONS]
        ids, values = [i for i, _ in self.bias], [v for _, v in self.bias]
        lengths = [len(self.history), len(self.bias), len(self.allowed)]
        tail = np.array(floats + values, dtype=np.float64).view(np.int64)
        head = np.array([*ints, *lengths, *self.history, *ids, *self.allowed], dtype=np.int64)
        return np.concatenate([[len(head) + len(tail)], head, tail])

    @classmethod
    def decode_all(cls, words: Ints) -> list["SlotOptions"]:
        """Every packed entry of a record's ``options``. Raises ValueError where they do not fit."""
        found, at = [], 0
        while at < len(words):
            size = int(words[at])
            entry = words[at + 1 : at + 1 + size]
            if size < _FIXED_OPTIONS or len(entry) != size:
                raise ValueError(f"slot options of {size} words in {len(words) - at - 1}")
            found.append(cls._decode(entry))
            at += 1 + size
        return found

    @classmethod
    def _decode(cls, entry: Ints) -> "SlotOptions":
        count = len(_INT_OPTIONS)
        values: dict[str, object] = dict(zip(_INT_OPTIONS, entry[:count].tolist(), strict=True))
        history, bias, allowed = entry[count : count + 3].tolist()
        if min(history, bias, allowed) < 0 or len(entry) != (
            _FIXED_OPTIONS + history + 2 * bias + allowed
        ):
            raise ValueError("slot options whose lists do not fill them")
        at = count + 3
        lists = np.split(entry[at:], np.cumsum([history, bias, allowed]))
        floats = lists[3].view(np.float64).tolist()
        values |= zip(_FLOAT_OPTIONS, floats, strict=False)
        values["history"], values["allowed"] = tuple(lists[0].tolist()), tuple(lists[2].tolist())
        values["bias"] = tuple(zip(lists[1].tolist(), floats[len(_FLOAT_OPTIONS) :], strict=True))
        return cls(**values)  # type: ignore[arg-type]


_FLOAT_OPTIONS = [f.name for f in fields(SlotOptions) if f.type is float]
_INT_OPTIONS = [f.name for f in fields(SlotOptions) if f.type is int]
_FIXED_OPTIONS = len(_INT_OPTIONS) + 3 + len(_FLOAT_OPTIONS)
