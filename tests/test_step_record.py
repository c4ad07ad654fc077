"""Step records: what is sent is what arrives, and damage is always noticed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tprt.engine.step_record import (
    HEADER_WORDS,
    PROMPT_LOGPROBS,
    Kind,
    RecordLayoutError,
    SlotOptions,
    StepRecord,
)

WORDS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False, width=64)
IDS = st.lists(st.integers(0, 2**31), max_size=5).map(tuple)


def table(width: int):
    return st.lists(st.tuples(*[WORDS] * width), max_size=6).map(
        lambda rows: np.array(rows, dtype=np.int64).reshape(-1, width)
    )


def flat():
    return st.lists(WORDS, max_size=6).map(lambda words: np.array(words, dtype=np.int64))


@st.composite
def records(draw) -> StepRecord:
    lengths = draw(st.lists(st.integers(1, 4), max_size=5))
    rows = [[i, 10 * i, n, draw(st.integers(0, 7))] for i, n in enumerate(lengths)]
    targets = sum(n for _, _, n, flags in rows if flags & PROMPT_LOGPROBS)
    return StepRecord(
        step=draw(st.integers(0, 2**40)),
        kind=draw(st.sampled_from(Kind)),
        full=draw(st.booleans()),
        logprobs=draw(st.integers(-1, 20)),
        rows=np.array(rows, dtype=np.int64).reshape(-1, 4),
        tokens=np.array(
            [draw(st.integers(-1, 2**20)) for _ in range(sum(lengths))], dtype=np.int64
        ),
        blocks=draw(table(3)),
        copies=draw(table(2)),
        clears=draw(flat()),
        options=draw(flat()),
        bans=draw(table(2)),
        targets=np.full(targets, 5, dtype=np.int64),
        prompt_logprobs=draw(st.integers(-1, 20)),
        text=draw(st.binary(max_size=40)),
    )


@settings(deadline=None)
@given(records())
def test_round_trip(record):
    words = record.encode()
    back = StepRecord.decode(words)
    for name, value in vars(record).items():
        assert np.array_equal(getattr(back, name), value), name
    assert np.array_equal(back.encode(), words)


@settings(deadline=None)
@given(records(), st.data())
def test_any_flipped_bit_is_noticed(record, data):
    words = record.encode()
    at = data.draw(st.integers(0, len(words) * 64 - 1))
    words.view(np.uint8)[at // 8] ^= 1 << (at % 8)
    with pytest.raises(RecordLayoutError):
        StepRecord.decode(words)


@settings(deadline=None)
@given(records(), st.data())
def test_any_cut_is_noticed(record, data):
    words = record.encode()
    with pytest.raises(RecordLayoutError):
        StepRecord.decode(words[: data.draw(st.integers(0, len(words) - 1))])
    with pytest.raises(RecordLayoutError):
        StepRecord.decode(np.concatenate([words, words[:1]]))


def test_another_version_is_named():
    words = StepRecord(step=0, kind=Kind.HEARTBEAT).encode()
    assert len(words) == HEADER_WORDS
    words[1] = 9
    with pytest.raises(RecordLayoutError, match="version 9"):
        StepRecord.decode(words)


def test_the_graph_key_follows_from_the_record():
    def key(rows: int, tokens: int, **more) -> int:
        table = np.ones((rows, 4), dtype=np.int64)
        table[0, 2] = tokens - rows + 1
        words = np.zeros(tokens, dtype=np.int64)
        return StepRecord(step=0, kind=Kind.STEP, rows=table, tokens=words, **more).graph_key

    assert [key(n, n) // 4 for n in (1, 2, 3, 5, 64, 65)] == [1, 2, 4, 8, 64, 96]
    assert key(3, 9) == 0  # a step with prefill runs without a graph
    assert len({key(3, 3), key(3, 3, full=True), key(3, 3, logprobs=0)}) == 3


options = st.builds(
    SlotOptions,
    slot=st.integers(0, 100),
    seed_key=WORDS,
    temperature=FLOATS,
    top_p=FLOATS,
    top_k=st.integers(0, 100),
    history=IDS,
    allowed=IDS,
    bias=st.lists(st.tuples(st.integers(0, 2**31), FLOATS), max_size=4).map(tuple),
)


@settings(deadline=None)
@given(st.lists(options, min_size=1, max_size=4))
def test_slot_options_round_trip(wanted):
    words = np.concatenate([o.encode() for o in wanted])
    assert SlotOptions.decode_all(words) == wanted
    with pytest.raises(ValueError):
        SlotOptions.decode_all(words[:-1])
    words[0] -= 1
    with pytest.raises(ValueError):
        SlotOptions.decode_all(words)
