"""The whole engine on a GPU: the same tokens with and without graphs, from every body, and as
transformers.

Each check takes a device. On a CPU, unmarked, it runs with the Triton bodies interpreted, on as few
tokens as find a mistake in putting them together; on a GPU it runs at length.
"""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY, run_ranks
from fakes import EOD, ByteTokenizer
from test_engine import mixed_requests, request, tokens
from test_engine import run as run_engine
from test_parity import cached_logits, continuation, make_oracle, make_tokenizer

from tprt import LLM, SamplingParams
from tprt.bench.synthetic import greedy, random_engine
from tprt.config import EngineConfig, PersimmonConfig
from tprt.distributed.tp_group import TPGroup
from tprt.distributed.vocabulary import Vocabulary
from tprt.engine.step_record import bucket_of

LENGTHS, STEPS = (1, 7, 60, 300), 32
SMALL_LENGTHS, SMALL_STEPS = (1, 7), 2
GPU_SETTINGS = [{}, {"enforce_eager": True}, {"kernels": "reference"}, {"fuse_kernels": False}]
# Of the norm of all logits: float32 sums in another order; bfloat16 activations over three layers.
FLOAT32_ERROR, BFLOAT16_ERROR = 1e-5, 3e-2
BYTES = PersimmonConfig(
    vocab_size=EOD + 1,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=64,
    max_position_embeddings=512,
)
INTERPRETED = replace(
    BYTES, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=16
)  # of the same kernels, in seconds
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
pytest.importorskip("triton")


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """A Hugging Face folder, and beside it what transformers computes for its prompts, on a CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    model = make_oracle()
    model.save_pretrained(folder / "hf")
    (folder / "hf" / "adept_vocab.model").write_bytes(make_tokenizer())
    generator = torch.Generator().manual_seed(1)
    expected = []
    for length in LENGTHS if torch.cuda.is_available() else SMALL_LENGTHS:
        prompt = torch.randint(3, model.config.vocab_size, (length,), generator=generator).tolist()
        ids = continuation(model, prompt)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        expected.append({"prompt": prompt, "new": ids[length:], "ids": ids})
        torch.save(logits, folder / f"logits-{length}.pt")
    (folder / "expected.json").write_text(json.dumps(expected))
    return folder


def expected_of(folder, lengths):
    known = json.loads((folder / "expected.json").read_text())
    found = {len(entry["prompt"]): entry for entry in known}
    return [found[length] for length in lengths]


def open_oracle(folder, device, **settings):
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "kv_cache_memory": 2**24}
    return LLM(folder / "hf", device=device, **{"dtype": "float32", **sizes, **settings})


def check_tokens(folder, device, lengths, steps, **settings):
    """Greedy tokens of all prompts at once are those of transformers."""
    wanted = expected_of(folder, lengths)
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
    with open_oracle(folder, device, **settings) as llm:
        outputs = llm.generate([{"prompt_token_ids": e["prompt"]} for e in wanted], params)
    found = [output.outputs[0].token_ids for output in outputs]
    assert found == [entry["new"][:steps] for entry in wanted], settings
    return found


def logit_error(folder, device, length, count, cached=False, **settings):
    """Norm of what logits differ from transformers' in float32, over the norm of those.

    Args:
        cached: the prompt in one pass and a step for each token after it; else all in one pass.
    """
    (entry,) = expected_of(folder, [length])
    exact = torch.load(folder / f"logits-{length}.pt", weights_only=True)[:count]
    with open_oracle(folder, device, **settings) as llm:
        ids = entry["ids"][:count]
        found = cached_logits(llm, ids, length) if cached else llm.logits(ids)
    return float((found[:, : exact.shape[1]] - exact).norm() / exact.norm())


def rank_tokens(folder, device, lengths, steps, settings):
    return check_tokens(folder, device, lengths, steps, **settings)


# ---------------------------------------------------------------- tokens and logits


def test_triton_bodies_interpreted_give_transformers_tokens(oracle):
    check_tokens(oracle, "cpu", SMALL_LENGTHS, SMALL_STEPS, kernels="triton")


def test_triton_bodies_interpreted_give_transformers_logits(oracle):
    """A prompt and two cached steps: tokens alone would forgive what flips none of them."""
    assert logit_error(oracle, "cpu", 7, 9, cached=True, kernels="triton") < FLOAT32_ERROR


def test_triton_bodies_interpreted_give_the_same_on_two_ranks(oracle):
    settings = {"kernels": "triton"}
    found = run_ranks(rank_tokens, 2, oracle, "cpu", SMALL_LENGTHS[1:], SMALL_STEPS, settings)
    assert found[0] == found[1]


def test_triton_bodies_interpreted_in_bfloat16(oracle):
    error = logit_error(oracle, "cpu", 7, 6, dtype="bfloat16", kernels="triton")
    assert 1e-4 < error < BFLOAT16_ERROR


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("settings", GPU_SETTINGS, ids=str)
def test_greedy_tokens_on_a_gpu(oracle, settings):
    check_tokens(oracle, "cuda", LENGTHS, STEPS, **settings)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("settings", [{}, {"kernels": "reference"}], ids=str)
@pytest.mark.parametrize("length", [7, 300])
def test_logits_on_a_gpu(oracle, length, settings):
    count = length + STEPS
    assert logit_error(oracle, "cuda", length, count, **settings) < FLOAT32_ERROR
    assert logit_error(oracle, "cuda", length, count, cached=True, **settings) < FLOAT32_ERROR
    error = logit_error(oracle, "cuda", length, count, dtype="bfloat16", **settings)
    assert 1e-4 < error < BFLOAT16_ERROR


@pytest.mark.multi_gpu
@needs_two
@pytest.mark.parametrize("settings", GPU_SETTINGS[:2], ids=str)
def test_greedy_tokens_on_two_gpus(oracle, settings):
    found = run_ranks(rank_tokens, 2, oracle, None, LENGTHS, STEPS, settings, timeout=240)
    assert found[0] == found[1]


# ---------------------------------------------------------------- many steps


def long_requests(count, max_tokens):
    """Every kind of sampling in turn, each completion of full length."""
    kinds = [request_.params for request_ in mixed_requests(3, count=40)]
    options = [p for p in kinds if p.n == 1 and p.logprobs is None and not p.bad_words]
    made = []
    for i in range(count):
        params = options[i % len(options)]
        kept = {
            name: getattr(params, name)
            for name in (
                "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
                "frequency_penalty", "allowed_token_ids",
            )
        }  # fmt: skip
        prompt = [(7 * i + j) % 256 for j in range(1 + i % 9)]
        made.append(request(prompt, seed=i, max_tokens=max_tokens, ignore_eos=True, **kept))
    return made


def mixed_engine(device, config=BYTES, vocabulary=None, **settings):
    sizes = {"block_size": 16, "max_num_seqs": 6, "kv_cache_memory": 2**25}
    options = EngineConfig(**{"dtype": "float32", "seed": 5, **sizes, **settings})
    tp = TPGroup(device=torch.device(device))
    engine = random_engine(config, tp, options, vocabulary=vocabulary)
    engine.tokenizer = ByteTokenizer()
    return engine


def check_mixed_sampling(device, steps):
    """Tokens of at least ``steps`` decode steps, with graphs and without."""
    per_sequence = min(steps, 125)
    count = 6 * -(-steps // per_sequence)
    found = []
    for enforce_eager in (False, True):
        engine = mixed_engine(device, enforce_eager=enforce_eager)
        found.append(tokens(run_engine(engine, long_requests(count, per_sequence))))
        assert engine.scheduler.num_steps >= steps
        engine.close()
    assert found[0] == found[1]
    assert len({token for output in found[0] for ids in output for token in ids}) > 50


def test_mixed_sampling_in_buckets():
    check_mixed_sampling("cpu", 40)


@pytest.mark.gpu
@needs_gpu
def test_a_thousand_steps_of_mixed_sampling_in_graphs():
    check_mixed_sampling("cuda", 1000)


@pytest.mark.gpu
@needs_gpu
def test_steps_in_graphs_allocate_nothing():
    engine = mixed_engine("cuda")
    for i in range(5):
        engine.add(greedy([i + 1, 2, 3], 400))
    held = []
    for _ in range(300):
        engine.step()
        held.append(torch.cuda.memory_allocated())
    assert max(held[100:]) <= max(held[20:100]), "memory grows with steps"
    engine.abort_all()
    engine.close()


# ---------------------------------------------------------------- the same bits


def triton_engine(device, vocabulary=None, **settings):
    config = INTERPRETED if device == "cpu" else BYTES
    return mixed_engine(device, config, vocabulary, kernels="triton", **settings)


def check_bodies_agree(device, dtype, batches, steps):
    """Tokens and log-probabilities, bit for bit: kernels fused and apart, zeros skipped and read.

    Args:
        batches: lengths of prompts that decode together; more rows are summed in other orders.
    """
    found = []
    for settings in ({}, {"fuse_kernels": False}, {"sparse_rows": 0}):
        engine, drawn = triton_engine(device, dtype=dtype, **settings), []
        for lengths in batches:
            requests = [
                request([(31 * i + j) % 256 for j in range(length)], max_tokens=steps, seed=i,
                        ignore_eos=True, temperature=float(i % 2), logprobs=3)
                for i, length in enumerate(lengths)
            ]  # fmt: skip
            drawn += [output.outputs[0] for output in run_engine(engine, requests)]
        engine.close()
        assert all(len(completion.token_ids) == steps for completion in drawn)
        found.append([
            [[(token, entry.logprob) for token, entry in top.items()] for top in completion.logprobs]
            for completion in drawn
        ])  # fmt: skip
    assert found[0] == found[1] == found[2]


def test_bodies_agree_interpreted():
    check_bodies_agree("cpu", "bfloat16", [(1, 9)], 2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bodies_agree_on_a_gpu(dtype):
    check_bodies_agree("cuda", dtype, [(300,), (1, 140, 300), (5, 1, 129, 200, 300, 2)], 100)


def check_replays(device, lengths, count):
    """One decode step again and again: what it counts and leaves behind serves the next one."""
    engine = triton_engine(device, dtype="bfloat16", look_ahead=0)
    for i, length in enumerate(lengths):
        engine.add(greedy([(31 * i + j) % 256 for j in range(length)], 9))
    while engine.scheduler.num_steps < 2 or engine.scheduler.waiting:
        engine.step()
    runner, bucket, expected = engine.runner, bucket_of(len(lengths)), None
    assert runner.buffers.rows(bucket)[1, : len(lengths)].tolist() == list(lengths), "positions"
    with torch.inference_mode(), runner._on_device():
        for _ in range(count):
            runner.graphs.run(bucket, True)
            found = runner.buffers.logits[: len(lengths)]
            expected = found.clone() if expected is None else expected
            assert torch.equal(found, expected)
    assert expected.isfinite().all() and expected.std() > 0
    engine.abort_all()
    engine.close()


def test_replays_interpreted():
    check_replays("cpu", (5, 1), 2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("lengths", [(300,), (300, 5, 129, 1, 200)], ids=len)
def test_a_thousand_replays_of_a_step(lengths):
    check_replays("cuda", lengths, 1000)


def check_trimmed(device, steps, **settings):
    """A vocabulary without some rows draws what a whole one does that must not draw them."""
    trimmed, every = Vocabulary(BYTES.vocab_size, ((100, 139), (200, 219))), range(BYTES.vocab_size)
    kept = sorted(set(every) - set(trimmed.removed_of(every)))
    found = []
    for vocabulary, options in (
        (trimmed, {}), (None, {"allowed_token_ids": kept}), (None, {}),
    ):  # fmt: skip
        engine = triton_engine(device, vocabulary, **settings)
        requests = [
            request([i, 7 * i, 90], max_tokens=steps, ignore_eos=True, temperature=2.0 * (i % 2),
                    seed=i, **options)
            for i in range(5)
        ]  # fmt: skip
        found.append(tokens(run_engine(engine, requests)))
        engine.close()
    assert found[0] == found[1]
    assert found[2] != found[1], "the removed ids must matter here"


def test_trimmed_vocabulary_interpreted():
    check_trimmed("cpu", 2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("settings", GPU_SETTINGS[:2], ids=str)
def test_trimmed_vocabulary_on_a_gpu(settings):
    check_trimmed("cuda", 40, **settings)


# ---------------------------------------------------------------- the shipped checkpoint


def accuracy(device, dtype):
    sys.path.insert(0, str(ROOT / "examples"))
    from evaluate_tiny import evaluate

    with LLM(TINY, device=device, dtype=dtype) as llm:
        return evaluate(llm)[0]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("dtype", "short", "long"), [("float32", 0.95, 0.8), ("bfloat16", 0.9, 0.7)]
)
def test_tiny_checkpoint_answers_on_a_gpu(dtype, short, long):
    found = accuracy("cuda", dtype)
    assert found["short"] >= short and found["long"] >= long, found
