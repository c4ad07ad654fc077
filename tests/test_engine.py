"""The engine without weights: records, look-ahead, sampling options and streams, end to end."""

import random

import pytest
import torch
from fakes import EOD, ByteTokenizer, HashModel, fake_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from tprt.engine.input_processor import InputProcessor
from tprt.engine.sequence import Request
from tprt.engine.streaming import RequestStream
from tprt.errors import ConfigError
from tprt.sampling_params import SamplingParams


def request(prompt, seed=0, **params) -> Request:
    params = SamplingParams(**{"max_tokens": 12, "seed": seed, **params})
    return InputProcessor(ByteTokenizer(), EOD + 1, 10**6, 0).request(
        {"prompt_token_ids": prompt}, params, 0
    )


def run(engine, requests, between=lambda step: None):
    added = [engine.add(r) for r in requests]
    step = 0
    while not engine.idle:
        engine.step()
        between(step)
        step += 1
        assert step < 5000
    assert engine.blocks.num_free == engine.blocks.capacity
    return [engine.collect(sequences) for sequences in added]


def logprob_values(outputs):
    """Ids, ranks and rounded values of all log-probabilities, of completions and of prompts."""

    def plain(entries):
        return [
            e and [(t, v.rank, round(v.logprob, 4)) for t, v in e.items()] for e in entries or []
        ]

    return [
        [plain(out.prompt_logprobs), *(plain(c.logprobs) for c in out.outputs)] for out in outputs
    ]


def tokens(outputs):
    return [[c.token_ids for c in out.outputs] for out in outputs]


def mixed_requests(seed: int, count: int = 12) -> list[Request]:
    rng = random.Random(seed)
    options = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "n": 2},
        {"temperature": 1.2, "top_k": 20, "min_p": 0.02},
        {"temperature": 0.9, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
        {"temperature": 0.7, "logit_bias": {65: 4.0, 66: -3.0}, "min_tokens": 3},
        {"temperature": 1.0, "allowed_token_ids": list(range(60, 90))},
        {"temperature": 1.0, "bad_words": ["a", "bc"], "allowed_token_ids": [97, 98, 99, EOD]},
        {"temperature": 1.0, "logprobs": 2, "prompt_logprobs": 1},
    ]
    shared = [rng.randrange(256) for _ in range(14)]
    return [
        request(
            shared[: rng.randint(1, 14)] + [rng.randrange(256) for _ in range(rng.randint(0, 9))],
            seed=rng.randrange(100),
            max_tokens=rng.randint(1, 14),
            **rng.choice(options),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_tokens_do_not_depend_on_company(seed):
    """Chunks, preemption, prefix hits, look-ahead and neighbours change no token of anybody."""
    requests = mixed_requests(seed)
    outputs = [run(fake_engine(), [r])[0] for r in requests]
    alone, values = tokens(outputs), logprob_values(outputs)
    for sizes in (
        {},
        {"blocks": 16},
        {"max_num_batched_tokens": 5, "max_num_seqs": 3},
        {"look_ahead": 0},
        {"enable_prefix_caching": False, "blocks": 18},
    ):
        engine = fake_engine(**sizes)
        found = run(engine, requests)
        assert tokens(found) == alone, sizes
        assert logprob_values(found) == values, sizes
        assert tokens(run(engine, requests[::-1])) == alone[::-1], sizes


def test_small_memory_really_preempts_and_prefixes_are_really_hit():
    engine = fake_engine(blocks=16)
    run(engine, mixed_requests(0))
    assert engine.scheduler.num_preemptions > 0
    outputs = run(engine, [request(list(range(40)), max_tokens=1) for _ in range(2)])
    outputs += run(engine, [request(list(range(40)), max_tokens=1)])
    assert outputs[-1].num_cached_tokens == 36


@pytest.mark.parametrize("scored", [None, 1])
def test_what_a_preemption_computes_again_is_counted_and_scored_once(scored):
    engine = fake_engine(blocks=9)
    params = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True, "logprobs": 1}
    requests = [request([i] * 5, **params, prompt_logprobs=scored) for i in range(3)]
    outputs = run(engine, requests)
    assert engine.scheduler.num_preemptions > 0
    assert [out.num_cached_tokens for out in outputs] == [0] * 3, "its own tokens are no hit"
    alone = [run(fake_engine(), [r])[0] for r in requests]
    assert logprob_values(outputs) == logprob_values(alone)


def test_a_block_is_found_only_behind_the_same_beginning():
    a, b, x, y = [1] * 4, [2] * 4, [3] * 4, [4] * 4
    engine = fake_engine()
    run(engine, [request([*a, *x, 9])])
    run(engine, [request([*b, *y, 9])])
    (out,) = run(engine, [request([*b, *x, 9])])
    assert out.num_cached_tokens == 4, "x behind a is not x behind b"


@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_step_that_failed_is_not_taken_for_computed(at, ahead):
    """Its blocks would otherwise be found by the next request that begins alike."""
    prompt = request(list(range(40)), temperature=0.0, max_tokens=9)
    wanted = tokens(run(fake_engine(), [prompt]))
    engine = fake_engine(max_num_batched_tokens=24, look_ahead=ahead)
    execute, steps = engine.runner.execute, iter(range(1, 100))

    def fails(*arguments):
        if next(steps) == at:
            raise KeyboardInterrupt
        return execute(*arguments)

    engine.runner.execute = fails
    with pytest.raises(KeyboardInterrupt):
        run(engine, [prompt])
    engine.abort_all()
    assert engine.idle and engine.blocks.num_free == engine.blocks.capacity
    assert tokens(run(engine, [prompt])) == wanted


def test_clears_of_a_step_that_failed_are_made_up_for():
    engine = fake_engine(HashModel(broken=5))
    run(engine, [request([5] * 9)])
    waiting = list(engine.scheduler._clears)
    execute = engine.runner.execute
    engine.runner.execute = None
    with pytest.raises(TypeError):
        run(engine, [request([6], max_tokens=1)])
    engine.runner.execute = execute
    engine.abort_all()
    assert set(waiting) <= set(engine.scheduler._clears)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"stop_token_ids": [10**6], "min_tokens": 1}, "token id 1000000 is outside"),
        ({"stop_token_ids": [2**70]}, "is outside the vocabulary"),
        ({"min_tokens": 2, "allowed_token_ids": [EOD]}, "forbid every one"),
        ({"allowed_token_ids": [97], "bad_words": ["a"]}, "forbid every one"),
        ({"bad_words": [" "]}, "no token stands for"),
    ],
)
def test_options_that_cannot_be_met_are_refused(params, said):
    with pytest.raises(ConfigError, match=said):
        request([1, 2], **params)


def test_aborts_leave_the_others_alone():
    requests = mixed_requests(3)
    wanted = tokens(run(fake_engine(), requests))
    engine = fake_engine(blocks=18)
    added = [engine.add(r) for r in requests]
    for step in range(500):
        engine.step()
        if step in (2, 5, 9):
            engine.abort(added[step])
    assert engine.idle and engine.blocks.num_free == engine.blocks.capacity
    for i, sequences in enumerate(added):
        found = engine.collect(sequences)
        if i in (2, 5, 9) and any(c.finish_reason == "abort" for c in found.outputs):
            assert all(
                c.token_ids == full[: len(c.token_ids)]
                for c, full in zip(found.outputs, wanted[i], strict=True)
            )
        else:
            assert tokens([found])[0] == wanted[i]


def test_overrun_of_a_stop_is_invisible():
    """With look-ahead the token after the end is computed; nobody may see it."""
    script = {7: [*b"done", EOD, *b"never"]}
    for ahead in (0, 1):
        engine = fake_engine(HashModel(script), look_ahead=ahead)
        (out,) = run(engine, [request([7], temperature=0.0, max_tokens=30)])
        assert out.outputs[0].text == "done"
        assert out.outputs[0].token_ids == [*b"done", EOD]
        assert engine.runner.model.passes == 5 + ahead


def test_bad_words_never_appear():
    script = {7: list(b"xbadxbaadxbad"), 8: list(b"aaaa")}
    engine = fake_engine(HashModel(script))
    outputs = run(
        engine,
        [
            request([7], temperature=0.0, max_tokens=13, bad_words=["bad"]),
            request([8], temperature=0.0, max_tokens=4, bad_words=["a"]),
        ],
    )
    assert b"bad" not in bytes(t for t in outputs[0].outputs[0].token_ids if t != EOD)
    assert outputs[0].outputs[0].token_ids[:3] == list(b"xba")
    assert b"a" not in bytes(t for t in outputs[1].outputs[0].token_ids if t != EOD)


def test_a_broken_row_ends_alone_and_its_blocks_are_cleared():
    healthy = [request([i, 9, 9], temperature=1.0, seed=i) for i in (1, 2, 3)]
    wanted = tokens(run(fake_engine(), healthy))
    engine = fake_engine(HashModel(broken=5))
    outputs = run(engine, [healthy[0], request([5] * 9), *healthy[1:]])
    assert outputs[1].outputs[0].finish_reason == "error"
    assert tokens([outputs[0], *outputs[2:]]) == wanted
    run(engine, [request([5] * 9)])  # alone, so that no later step clears its blocks at once
    cleared = list(engine.scheduler._clears)
    assert cleared, "the blocks of the broken row wait to be cleared"
    engine.runner.caches[0].k[cleared] = float("nan")
    run(engine, [request([6], max_tokens=1)])
    assert not engine.scheduler._clears
    assert engine.runner.caches[0].k.isfinite().all()


@settings(deadline=None, max_examples=60)
@given(
    text=st.one_of(
        st.binary(min_size=1, max_size=40),
        st.text(min_size=1, max_size=15).map(lambda t: t.encode("utf-8", "replace")),
        st.sampled_from(["日本語のテキスト", "👩‍👩‍👧‍👦 family 🏳️‍🌈", "naïve café"]).map(str.encode),
    ),
    stop=st.one_of(st.just([]), st.lists(st.text(min_size=1, max_size=3), max_size=2)),
    keep=st.booleans(),
)
def test_streamed_text_is_the_whole_text(text, stop, keep):
    params = {"stop": stop, "include_stop_str_in_output": keep, "max_tokens": len(text) + 1}
    engine = fake_engine(HashModel({7: [*text, EOD]}))
    sequences = engine.add(request([7], temperature=0.0, **params))
    stream, seen, ids, ends = RequestStream(0, sequences), "", [], []
    while not engine.idle:
        engine.step()
        done = engine.collect(sequences) if stream.finished else None
        for event in stream.events(done):
            seen += event.text
            ids += event.token_ids
            ends += [event.output] if event.output else []
            full = text.decode("utf-8", "replace")
            if not keep:
                assert not any(s in seen for s in stop), "a stop string leaked"
    (out,) = ends
    assert seen == out.outputs[0].text and ids == out.outputs[0].token_ids
    if not stop:
        assert seen == ByteTokenizer().decode(list(text)) or "�" in full


def test_logprobs_are_those_of_the_raw_logits():
    model = HashModel()
    engine = fake_engine(model)
    params = {"temperature": 0.7, "top_k": 3, "repetition_penalty": 1.5}
    prompt = [3, 1, 4, 1, 5]
    (out,) = run(engine, [request(prompt, logprobs=3, prompt_logprobs=2, **params)])
    completion = out.outputs[0]
    ids = prompt + completion.token_ids
    for position in range(1, len(ids)):
        expected = model._row(ids[:position]).log_softmax(0)
        if position < len(prompt):
            entry, k = out.prompt_logprobs[position], 2
        else:
            entry, k = completion.logprobs[position - len(prompt)], 3
        first, *_ = entry
        assert first == ids[position]
        assert entry[first].rank == int((expected > expected[first]).sum()) + 1
        assert set(expected.topk(k).indices.tolist()) <= set(entry) and len(entry) <= k + 1
        for token, value in entry.items():
            assert value.logprob == pytest.approx(expected[token].item(), abs=1e-5)
            whole = ByteTokenizer().decode([token])
            assert value.decoded_token == ("|ENDOFTEXT|" if token == EOD else whole)
    assert out.prompt_logprobs[0] is None and len(out.prompt_logprobs) == len(prompt)


def test_prompt_logprobs_in_small_chunks(monkeypatch):
    import tprt.engine.model_runner as runner

    wanted = run(fake_engine(), [request(list(range(30)), prompt_logprobs=1, max_tokens=1)])
    monkeypatch.setattr(runner, "MAX_LOGITS", 257 * 3)
    engine = fake_engine(max_num_batched_tokens=7)
    found = run(engine, [request(list(range(30)), prompt_logprobs=1, max_tokens=1)] * 2)
    for out in found:  # the second may not take the first one's blocks: it needs every position
        for mine, theirs in zip(
            out.prompt_logprobs[1:], wanted[0].prompt_logprobs[1:], strict=True
        ):
            assert list(mine) == list(theirs)
            assert torch.allclose(
                torch.tensor([v.logprob for v in mine.values()]),
                torch.tensor([v.logprob for v in theirs.values()]),
            )
