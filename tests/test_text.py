"""Text with the shipped tokenizer: forbidden words stay out, and a stream is the text, bit by bit."""

import pytest
import sentencepiece as spm
from conftest import TINY, run_ranks
from fakes import HashModel, fake_engine
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tprt import LLM, SamplingParams
from tprt.engine.input_processor import InputProcessor
from tprt.engine.streaming import RequestStream
from tprt.tokenizer import Detokenizer, Tokenizer

TOKENIZER = Tokenizer(TINY / "adept_vocab.model")
ORACLE = spm.SentencePieceProcessor(model_file=str(TOKENIZER.path))
BYTES = [i for i in range(TOKENIZER.vocab_size) if TOKENIZER.is_byte(i)]
ORDINARY = [i for i in range(TOKENIZER.vocab_size) if i not in TOKENIZER.special_ids]
REPLACEMENT = "\ufffd"

# ---------------------------------------------------------------- bad words

PROMPTS = ["human: Sort: lamp canoe frog cheese\n\nadept:", "human: What is 30 + 12?\n\nadept:"]
SEEDS = range(6)
CASES = [
    ["lamp"],
    ["frog", "cheese"],
    ["42"],
    ["frog lamp", "lamp frog"],
    ["frog", "2", "cheese frog"],
]


def _answers(cases: list[list[str]]) -> list[list[str]]:
    """For each list of bad words: long texts at temperature 1, one per prompt and seed.

    Nothing ends them, nor stands unseen between two words, as an ignored end-of-text would.
    """
    prompts = [prompt for prompt in PROMPTS for _ in SEEDS]
    with LLM(str(TINY), dtype="float32", kv_cache_memory=2**25) as llm:
        found = []
        for bad_words in cases:
            params = [
                SamplingParams(
                    seed=seed,
                    max_tokens=30,
                    logit_bias={TOKENIZER.eod_id: -100.0},
                    bad_words=bad_words,
                )
                for _ in PROMPTS
                for seed in SEEDS
            ]
            found.append([out.outputs[0].text for out in llm.generate(prompts, params)])
        return found


@pytest.fixture(scope="module")
def answers() -> list[list[str]]:
    """Without bad words, then one list of texts per case."""
    return _answers([[], *CASES])


def test_words_used_are_of_one_token_and_of_more():
    lengths = {word: len(TOKENIZER.encode(word)) for case in CASES for word in case}
    assert lengths["lamp"] == lengths["frog"] == 1
    assert lengths["frog lamp"] == lengths["2"] == 2 and lengths["42"] == 3


@pytest.mark.parametrize("case", range(len(CASES)))
def test_bad_words_stay_out_of_the_text(answers, case):
    free, kept = answers[0], answers[case + 1]
    for word in CASES[case]:
        assert sum(word in text for text in free) >= 3, "it comes where it may"
        assert not [text for text in kept if word in text]
    assert len(set(kept)) > len(SEEDS), "many different texts"


def test_no_more_than_the_bad_words_is_forbidden(answers):
    """Both words of a phrase still come, as does text that has nothing to do with them."""
    phrases = "\n".join(answers[1 + CASES.index(["frog lamp", "lamp frog"])])
    assert all(word in phrases for word in ("frog", "lamp"))
    numbers = answers[1 + CASES.index(["42"])]
    assert numbers[: len(SEEDS)] == answers[0][: len(SEEDS)]


def test_bad_words_on_two_ranks(answers):
    for found in run_ranks(_answers, 2, [[], *CASES]):
        assert found == answers


# ---------------------------------------------------------------- streams

PIECES = [
    "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇯🇵", "e\u0301", "日本語", "안녕",
    "漢字かな", "𝔘𠜎", "\u200b", "lamp", " ", "\n",
]  # fmt: skip
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join),
    st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), min_size=1, max_size=12),
    st.text(st.characters(min_codepoint=0x1F300, max_codepoint=0x1FAFF), min_size=1, max_size=8),
    st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=1, max_size=12),
)
# Byte pieces of any kind, and ordinary ones between them.
IDS = st.lists(
    st.one_of(st.sampled_from(BYTES), st.sampled_from(ORDINARY)), min_size=1, max_size=40
)
BROKEN = [BYTES[0xF0], BYTES[0x9F], ORDINARY[300], BYTES[0x91], BYTES[0xA9], BYTES[0xE2]]


def whole(ids: list[int]) -> str:
    """What sentencepiece makes of ids that go on from a prompt."""
    x = TOKENIZER.piece_to_id("x")
    text = ORACLE.decode([x, *ids])
    assert text[0] == "x"
    return text[1:]


def pushed(ids: list[int]) -> list[str]:
    """What a reader has after each id, and at the end."""
    detokenizer, seen = Detokenizer(TOKENIZER), [""]
    for token_id in ids:
        seen.append(seen[-1] + detokenizer.push([token_id]))
    return [*seen[1:], seen[-1] + detokenizer.finish()]


@settings(deadline=None, max_examples=300)
@given(ids=IDS)
@example(ids=BROKEN)
def test_pushed_one_by_one_any_ids_give_the_whole_text(ids):
    *growing, final = pushed(ids)
    assert final == whole(ids) == TOKENIZER.decode(ids, strip_leading_space=False)
    for i, text in enumerate(growing, start=1):
        assert final.startswith(text), "nothing shown is ever taken back, no U+FFFD either"
        # What is held back are the bytes of one character at most.
        assert len(whole(ids[:i])) - len(text) <= 3


@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
def test_characters_come_whole(text):
    ids = TOKENIZER.encode(text)
    *growing, final = pushed(ids)
    assert REPLACEMENT not in final or REPLACEMENT in text
    assert growing[-1] == final == whole(ids), "all of a whole text is out before its end is known"
    assert final.removeprefix(" ") == TOKENIZER.decode(ids)
    for seen in growing:
        assert final.startswith(seen)


@settings(deadline=None, max_examples=100)
@given(
    ids=st.one_of(IDS, TEXTS.map(TOKENIZER.encode)),
    stop=st.sampled_from([[], ["lamp"], ["本"], ["👧‍"], [REPLACEMENT]]),
)
@example(ids=BROKEN, stop=[])
@example(ids=TOKENIZER.encode("👩‍👩‍👧‍👦 family"), stop=["👧‍"])
def test_the_engine_streams_the_text_it_returns(ids, stop):
    """From the drawn ids to the events, with the real tokenizer in an engine whose model recites."""
    engine = fake_engine(HashModel({7: [*ids, TOKENIZER.eod_id]}, vocab=TOKENIZER.vocab_size))
    engine.tokenizer = TOKENIZER
    inputs = InputProcessor(TOKENIZER, TOKENIZER.vocab_size, 10**6, 0)
    params = SamplingParams(temperature=0.0, max_tokens=len(ids) + 1, stop=stop, seed=0)
    sequences = engine.add(inputs.request({"prompt_token_ids": [7]}, params, 0))
    stream, seen, final = RequestStream(0, sequences), [""], None
    while not engine.idle:
        engine.step()
        for event in stream.events(engine.collect(sequences) if stream.finished else None):
            seen.append(seen[-1] + event.text)
            final = event.output or final
    text = whole(ids)
    if stop and stop[0] in text:
        text = text[: text.index(stop[0])]
    assert final.outputs[0].text == seen[-1] == text
    assert all(text.startswith(part) for part in seen)
