"""A vocabulary without some of its rows: the same tokens, as if those ids were forbidden.

The removed ids are live pieces, many short ranges of them, so that a row in the wrong place, an id that
shifted or a column that was counted twice changes what is drawn.
"""

import itertools
import json
import os

import pytest
import torch
from conftest import ROOT, TINY, run_ranks

from tprt import LLM, SamplingParams
from tprt.cli import main
from tprt.config import PersimmonConfig
from tprt.distributed.tp_group import TPGroup
from tprt.distributed.vocabulary import Vocabulary
from tprt.errors import ConfigError, RankMismatch
from tprt.kernels import Noise
from tprt.models.persimmon import PersimmonForCausalLM
from tprt.tokenizer import Tokenizer

PROMPTS = ["human: Reverse: lamp canoe frog cheese\n\nadept:", "human: Repeat: key door\n\nadept:"]
TOKENIZER = Tokenizer(TINY / "adept_vocab.model")
SIZE, EOD = TOKENIZER.vocab_size, TOKENIZER.eod_id
USED = {token for prompt in PROMPTS for token in TOKENIZER.encode(prompt)}
FIRST_ORDINARY = 70 + 256
GONE = [i for i in range(SIZE) if 3 <= i < 67 or (i >= FIRST_ORDINARY and i % 7 < 3)]
GONE = [i for i in GONE if i not in USED]
KEPT = sorted(set(range(SIZE)) - set(GONE))
RANGES = [
    (run[0][1], run[-1][1])
    for _, group in itertools.groupby(enumerate(GONE), key=lambda pair: pair[1] - pair[0])
    for run in [list(group)]
]
BIASED = {KEPT[-1]: 14.0, KEPT[300]: 13.0, GONE[-1]: 50.0}

GREEDY = {"temperature": 0.0}
DRAWN = {"temperature": 1.7, "seed": 5, "n": 3}
OPTIONS = [
    GREEDY,
    DRAWN,
    DRAWN | {"top_k": 40, "top_p": 0.97, "logit_bias": BIASED},
    DRAWN | {"repetition_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": 0.3},
    DRAWN | {"min_tokens": 9, "bad_words": ["lamp", "key"]},
    {"temperature": 1.7, "seed": 8, "logprobs": 4, "prompt_logprobs": 2},
]


def open_tiny(trim="off", **settings) -> LLM:
    settings = {"dtype": "float32", "kv_cache_memory": 2**24} | settings
    return LLM(str(TINY), trim_vocab=trim, **settings)


def draws(llm: LLM, **more) -> list[list[list[int]]]:
    """Token ids of every prompt and completion, of all OPTIONS."""
    found = []
    for options in OPTIONS:
        params = SamplingParams(max_tokens=14, ignore_eos=True, **(options | more))
        outs = llm.generate(PROMPTS, params)
        found.append([list(o.token_ids) for out in outs for o in out.outputs])
    return found


def trimmed_here() -> dict:
    """What a trimmed model gives, on any number of ranks; only rank 0's is looked at."""
    with open_tiny(RANGES) as llm:
        ids = TOKENIZER.encode(PROMPTS[0])
        scored = SamplingParams(max_tokens=6, ignore_eos=True, **OPTIONS[-1])
        (out,) = llm.generate(PROMPTS[:1], scored)
        return {
            "tokens": draws(llm),
            "logits": llm.logits(ids).numpy(),  # a tensor between processes needs both alive
            "score": llm.score([ids])[0],
            "prompt": [e and {i: p.logprob for i, p in e.items()} for e in out.prompt_logprobs],
            "drawn": list(out.outputs[0].token_ids),
            "logprobs": [{i: p.logprob for i, p in e.items()} for e in out.outputs[0].logprobs],
            "part": llm._engine.runner.sampler.part,
        }


def on_a_rank() -> dict:
    """``trimmed_here``, then a start with another setting on each rank."""
    found = trimmed_here()
    with pytest.raises(RankMismatch) as caught:
        open_tiny("off" if os.environ["RANK"] == "1" else RANGES)
    return found | {"mismatch": caught.value.what}


@pytest.fixture(scope="module")
def whole() -> dict:
    """The untrimmed model with the same ids forbidden, and its raw logits."""
    with open_tiny() as llm:
        drawn = draws(llm, allowed_token_ids=KEPT)
        return {
            "tokens": drawn,
            "logits": llm.logits(TOKENIZER.encode(PROMPTS[0])),
            "llm": draws(llm),
        }


@pytest.mark.parametrize("ranks", [1, 2])
def test_draws_are_those_of_a_model_that_must_not_use_the_ids(whole, ranks):
    found = trimmed_here() if ranks == 1 else run_ranks(on_a_rank, ranks)[0]
    assert found["tokens"] == whole["tokens"] != whole["llm"], "the removed ids must matter here"
    assert found["part"] == -(-len(KEPT) // ranks)

    expected = whole["logits"].clone()
    expected[:, GONE] = -float("inf")
    torch.testing.assert_close(torch.from_numpy(found["logits"]), expected, rtol=1e-4, atol=1e-4)
    logprobs, ids = expected.log_softmax(dim=1), TOKENIZER.encode(PROMPTS[0])
    for at, (score, entry) in enumerate(zip(found["score"][1:], found["prompt"][1:], strict=True)):
        row, token = logprobs[at], ids[at + 1]
        assert score == pytest.approx(row[token].item(), abs=1e-4)
        top = dict(zip(*(t.tolist() for t in reversed(row.topk(2))), strict=True))
        assert entry == pytest.approx(top | {token: row[token].item()}, abs=1e-4)
    drawn, first = found["drawn"], found["logprobs"][0]
    assert drawn[0] in first and not set().union(*found["logprobs"]) & set(GONE)
    top = logprobs[-1].topk(4)
    assert first == pytest.approx(
        dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        | {drawn[0]: logprobs[-1, drawn[0]].item()},
        abs=1e-4,
    )
    if ranks == 2:
        assert "different trim_vocab" in found["mismatch"]


def test_reserved_is_exactly_what_the_tokenizer_proves():
    """Its 64 ``<unused_i>``; nothing else changes, not even what is drawn hot."""
    with open_tiny("reserved") as llm:
        assert llm.vocabulary == Vocabulary(SIZE, ((3, 66),))
        rows = {name: len(p) for name, p in llm._engine.runner.model.named_parameters()}
        assert rows["model.embed_tokens.weight"] == SIZE - 64 + 1
        assert llm._engine.runner.model.lm_head.part == SIZE - 64
        cold = SamplingParams(temperature=0.0, max_tokens=12)
        said = [out.outputs[0].text for out in llm.generate(PROMPTS, cold)]
    assert said == [" cheese frog canoe lamp", " key door"]


def test_what_a_request_may_name():
    gone, also = GONE[0], GONE[1]
    with open_tiny(RANGES, max_num_seqs=2) as llm:

        def refused(prompt=PROMPTS[0], **options) -> str:
            with pytest.raises(ConfigError) as caught:
                llm.generate([prompt], SamplingParams(max_tokens=2, **options))
            return str(caught.value)

        for said in (
            refused({"prompt_token_ids": [EOD, gone]}),
            refused(TOKENIZER.id_to_piece(GONE[-1]).replace("\u2581", " ") * 3),
        ):
            assert "trimmed away" in said and "model.trim_vocab" in said
        assert f"token id {gone} " in refused({"prompt_token_ids": [EOD, gone]})
        with pytest.raises(ConfigError, match=f"token id {gone} "):
            llm.score([[KEPT[5], gone]])
        assert "allowed_token_ids names only ids that" in refused(allowed_token_ids=[gone, also])
        assert "logit_bias names only ids that" in refused(logit_bias={gone: 1.0})
        assert "model.trim_vocab forbid" in refused(allowed_token_ids=[gone, EOD], min_tokens=1)
        kept = KEPT[300]
        some = SamplingParams(allowed_token_ids=[gone, kept], stop_token_ids=[also], max_tokens=3)
        (out,) = llm.generate([PROMPTS[0]], some)
        assert list(out.outputs[0].token_ids) == [kept] * 3


def test_recorded_steps_run_again_where_their_ids_have_rows(tmp_path):
    record, params = str(tmp_path / "steps"), SamplingParams(max_tokens=6, ignore_eos=True, **DRAWN)
    with open_tiny(RANGES, record_path=record) as llm:
        drawn = [list(o.token_ids) for o in llm.generate(PROMPTS[:1], params)[0].outputs]
    with open_tiny(RANGES) as llm:
        (call,) = llm.replay(record)
        assert call.differences == [] and [t[:6] for t in call.tokens.values()] == drawn
    with open_tiny(record_path=record) as llm:
        llm.generate([{"prompt_token_ids": [EOD, GONE[70]]}], params)
    with open_tiny(RANGES) as llm, pytest.raises(ConfigError, match=f"{GONE[70]}.*trim_vocab"):
        llm.replay(record)


def test_our_own_layout_holds_all_rows_and_is_trimmed_by_who_loads_it(tmp_path, whole, capsys):
    folder = tmp_path / "presharded"
    assert main(["convert", str(TINY), str(folder), "--format", "presharded", "--tp", "2"]) == 0
    ids = TOKENIZER.encode(PROMPTS[0])
    for trim, columns in (("off", range(SIZE)), (RANGES, KEPT)):
        with LLM(str(folder), dtype="float32", kv_cache_memory=2**24, trim_vocab=trim) as llm:
            found = llm.logits(ids)[:, list(columns)]
        torch.testing.assert_close(found, whole["logits"][:, list(columns)], rtol=1e-4, atol=1e-4)


def test_ranges_that_cannot_be_removed():
    pieces = {i: TOKENIZER.id_to_piece(i) for i in (0, 2, 68, EOD, 80)}
    for trim, *words in (
        ([(3, SIZE)], f"ids 3 to {SIZE}", f"0 to {SIZE - 1}"),
        ([(-1, 5)], "ids -1 to 5"),
        ([(9, 5)], "ids 9 to 5", "[5, 9]"),
        ([(400, 420), (410, 430)], "id 410 twice"),
        ([(3, EOD)], f"{EOD} ({pieces[EOD]})"),
        ([(0, 0)], f"0 ({pieces[0]})"),
        ([(2, 9)], f"2 ({pieces[2]})"),
        ([(68, 68)], f"68 ({pieces[68]})"),
        ([(80, 400)], f"80 ({pieces[80]})"),
        ("all", "'all'", "[[3, 70002]]"),
        ([3, 5], "[3, 5]", "[[3, 70002]]"),
        ([(3.0, 5)], "[[3, 70002]]"),
    ):
        with pytest.raises(ConfigError) as caught:
            open_tiny(trim)
        assert all(word in str(caught.value) for word in words), (trim, str(caught.value))
    with pytest.raises(ConfigError, match="all 9 ids"):
        Vocabulary(9, ((0, 4), (5, 8)))


@pytest.mark.parametrize("size", [1, 3])
def test_rows_past_the_tokenizer_stay_forbidden(size):
    """Padding of the vocabulary and of the cut, behind ids that are gone, never wins."""
    config = PersimmonConfig(
        vocab_size=40, hidden_size=12, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=3, head_dim=4, max_position_embeddings=8,
    )  # fmt: skip
    noise = Noise(torch.ones(4), torch.ones(4).bool(), *torch.zeros(2, 4).long(), all_greedy=True)
    vocabulary, hidden = Vocabulary(40, ((3, 12), (30, 30))), torch.randn(4, 12).abs()
    best = []
    for rank in range(size):
        model = PersimmonForCausalLM(config, TPGroup(rank, size), torch.float32, 8, vocabulary)
        weight = torch.arange(40.0).unsqueeze(1).expand(40, 12)  # the higher the id, the better
        model.lm_head.weight.shard_spec.load(model.lm_head.weight, lambda s, w=weight: w[s])
        best.append(model.argmax(hidden, noise, 31))
    scores, ids = (torch.stack(found) for found in zip(*best, strict=True))
    assert ids.gather(0, scores.argmax(0, keepdim=True)).flatten().tolist() == [29] * 4


def test_tables_of_a_plan_take_no_memory():
    """A config may name 2^31 ids: 16 GiB of them."""
    vocabulary, meta = Vocabulary(2**31 - 1, ((5, 9),)), torch.device("meta")
    assert vocabulary.column_ids(1, 2, meta).shape == (vocabulary.part(2),)
    assert vocabulary.row_of(1, 2, meta).shape == (vocabulary.size,)
    small = Vocabulary(40, ((5, 9),))
    for make in (small.column_ids, small.row_of):
        on_paper, real = make(1, 2, meta), make(1, 2, torch.device("cpu"))
        assert (on_paper.shape, on_paper.dtype) == (real.shape, real.dtype)


def test_plan_shows_what_is_saved(capsys):
    model = str(ROOT / "configs" / "persimmon-8b.json")

    def plan(*argv: str) -> dict:
        assert main(["plan", "--model", *argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    trim = ["--set", "model.trim_vocab=[[3, 70002]]"]
    off, on = plan(model, "--tp", "4"), plan(model, "--tp", "4", *trim)
    assert off["vocabulary"]["removed"] == [] and off["vocabulary"]["saved_bytes_per_rank"] == 0
    rows = on["vocabulary"]
    assert (rows["ids"], rows["rows"], rows["rows_per_rank"]) == (262144, 192144, 48036)
    assert rows["removed"] == [[3, 70002]]
    assert rows["saved_bytes_per_rank"] == 2 * (70000 // 4) * 4096 * 2
    first, before = on["per_rank"][0], off["per_rank"][0]
    assert before["weights"] - first["weights"] == before["read"] - first["read"]
    assert before["weights"] - first["weights"] == rows["saved_bytes_per_rank"]
    assert first["state"] < before["state"] and on["parameters"] == off["parameters"]
    assert main(["plan", "--model", model, *trim]) == 0
    said = capsys.readouterr().out
    assert "192,144 of 262,144 ids have rows (3-70002 " in said and "1.07 GiB" in said
    found = plan(str(TINY), "--set", "model.trim_vocab=reserved")
    assert found["vocabulary"]["removed"] == [[3, 66]]
    assert main(["plan", "--model", model, "--set", "model.trim_vocab=reserved"]) == 2
    assert "needs the tokenizer" in capsys.readouterr().err
