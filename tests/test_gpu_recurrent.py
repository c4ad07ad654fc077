"""RecurrentGemma in the engine on a GPU: the oracle's tokens from every body, with and without graphs.

As in test_gpu.py each check takes a device. On a CPU, unmarked, it runs with the Triton bodies
interpreted, on as few tokens as go past the window in chunks and in steps.
"""

from dataclasses import replace

import pytest
import torch
from conftest import run_ranks
from recurrent_models import BYTES, CONFIG, byte_engine, telling_weights, write_folder
from recurrent_oracle import oracle_logits
from test_engine import request, tokens
from test_engine import run as run_engine
from test_gpu import GPU_SETTINGS, long_requests, needs_gpu, needs_two

from tprt import LLM, SamplingParams
from tprt.bench.synthetic import greedy
from tprt.engine.step_record import bucket_of

pytest.importorskip("triton")

# A query of the small model sees 17 keys, one of the large model 201, in a ring of several parts.
SMALL = replace(BYTES, vocab_size=CONFIG.vocab_size)
MANY = {
    "hidden_size": 320,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "head_dim": 64,
    "lru_width": 320,
    "layer_types": ("recurrent", "attention", "recurrent", "recurrent"),
    "attention_window_size": 200,
    "window_keys": None,
}
LARGE, LARGE_BYTES = replace(SMALL, **MANY), replace(BYTES, **MANY)
LENGTHS, STEPS = (1, 7, 190, 450), 32
SMALL_LENGTHS, SMALL_STEPS = (37, 1), 2
# Of log-probabilities: float32 sums in another order; bfloat16 activations over four layers.
FLOAT32_ERROR, BFLOAT16_ERROR = 1e-4, 0.1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By device, a folder of the model that is run there."""
    path, found = tmp_path_factory.mktemp("recurrent"), {}
    for device, config in (("cpu", SMALL), ("cuda", LARGE)):
        found[device] = write_folder(path / device, telling_weights(config), config), config
    return found


def prompt_of(length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, SMALL.vocab_size, (length,), generator=generator).tolist()


def completions(folder, device, lengths, steps, logprobs=None, times=1, **settings):
    """Of greedy requests, all at once; their slots held another sequence's NaN before."""
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 16 if device == "cpu" else 128}
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True, logprobs=logprobs)
    requests = [{"prompt_token_ids": prompt_of(length)} for length in lengths]
    with LLM(str(folder), device=device, **{"dtype": "float32", **sizes, **settings}) as llm:
        for cache in llm._engine.runner.slot_caches:
            for tensor in vars(cache).values():
                tensor.fill_(float("nan"))
        outputs = [llm.generate(requests, params) for _ in range(times)]
    return [[output.outputs[0] for output in found] for found in outputs]


def oracle_of(config, prompt, token_ids):
    """float32 [tokens, vocab_size]: what each of ``token_ids`` was drawn from."""
    logits = oracle_logits(telling_weights(config), config, prompt + token_ids)
    return logits[len(prompt) - 1 : -1]


def check_tokens(folders, device, lengths, steps, times=1, **settings):
    """Greedy tokens are those of the oracle; later ``times`` go on from snapshots of prompts."""
    folder, config = folders["cpu" if device == "cpu" else "cuda"]
    found = completions(folder, device, lengths, steps, times=times, **settings)
    first = [completion.token_ids for completion in found[0]]
    for length, ids in zip(lengths, first, strict=True):
        assert ids == oracle_of(config, prompt_of(length), ids).argmax(1).tolist(), settings
    assert all([completion.token_ids for completion in again] == first for again in found)
    return first


def logprob_error(folders, device, lengths, steps, **settings):
    """The largest difference of log-probabilities from the oracle's, in the steps of a text."""
    folder, config = folders[device]
    (found,) = completions(folder, device, lengths, steps, logprobs=3, **settings)
    errors = []
    for length, completion in zip(lengths, found, strict=True):
        exact = oracle_of(config, prompt_of(length), completion.token_ids).log_softmax(1)
        for row, top in zip(exact, completion.logprobs, strict=True):
            errors += [abs(entry.logprob - float(row[token])) for token, entry in top.items()]
    return max(errors)


# ---------------------------------------------------------------- tokens and log-probabilities


def test_the_soft_cap_bends_logits():
    """Else nobody would miss it below."""
    for config in (SMALL, LARGE):
        uncapped = replace(config, logits_soft_cap=1e6)
        weights = telling_weights(config)
        logits = [oracle_logits(weights, c, prompt_of(20)) for c in (config, uncapped)]
        assert logits[1].abs().max() > 0.5 * config.logits_soft_cap
        difference = logits[0].log_softmax(1) - logits[1].log_softmax(1)
        assert difference.abs().max() > 100 * FLOAT32_ERROR


def test_triton_bodies_interpreted_give_the_tokens_of_the_oracle(folders):
    check_tokens(folders, "cpu", SMALL_LENGTHS, SMALL_STEPS, kernels="triton")


def test_triton_bodies_interpreted_give_the_log_probabilities_of_the_oracle(folders):
    """Tokens alone would forgive what flips none of them."""
    error = logprob_error(folders, "cpu", (18,), 3, kernels="triton")
    assert error < FLOAT32_ERROR


def test_triton_bodies_interpreted_in_bfloat16(folders):
    error = logprob_error(folders, "cpu", (18,), 3, dtype="bfloat16", kernels="triton")
    assert 1e-3 < error < BFLOAT16_ERROR


def rank_tokens(folders, device, lengths, steps, settings):
    return check_tokens(folders, device, lengths, steps, **settings)


def test_triton_bodies_interpreted_give_the_same_on_two_ranks(folders):
    settings = {"kernels": "triton"}
    found = run_ranks(rank_tokens, 2, folders, "cpu", (19,), SMALL_STEPS, settings)
    assert found[0] == found[1]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("settings", GPU_SETTINGS, ids=str)
def test_greedy_tokens_on_a_gpu(folders, settings):
    check_tokens(folders, "cuda", LENGTHS, STEPS, times=2, **settings)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("settings", GPU_SETTINGS[:3], ids=str)
def test_log_probabilities_on_a_gpu(folders, settings):
    assert logprob_error(folders, "cuda", LENGTHS, STEPS, **settings) < FLOAT32_ERROR
    error = logprob_error(folders, "cuda", LENGTHS, STEPS, dtype="bfloat16", **settings)
    assert 1e-3 < error < BFLOAT16_ERROR


@pytest.mark.multi_gpu
@needs_two
@pytest.mark.parametrize("settings", GPU_SETTINGS[:2], ids=str)
def test_greedy_tokens_on_two_gpus(folders, settings):
    """Five heads: the second rank has one of zeros."""
    found = run_ranks(rank_tokens, 2, folders, None, LENGTHS, STEPS, settings, timeout=240)
    assert found[0] == found[1]


# ---------------------------------------------------------------- many steps


def recurrent_engine(device, **settings):
    config = BYTES if device == "cpu" else LARGE_BYTES
    return byte_engine(config, device, **{"max_num_seqs": 6, **settings})


@pytest.mark.gpu
@needs_gpu
def test_a_thousand_steps_of_mixed_sampling_in_graphs():
    """One graph for each bucket: its rows are at any position, within the window and past it."""
    found = []
    for enforce_eager in (False, True):
        engine = recurrent_engine("cuda", enforce_eager=enforce_eager, max_num_batched_tokens=64)
        requests = long_requests(12, 250)
        requests += [request([i] * 300, seed=i, max_tokens=250, ignore_eos=True) for i in range(12)]
        found.append(tokens(run_engine(engine, requests)))
        assert engine.scheduler.num_steps >= 1000
        engine.close()
    assert found[0] == found[1]
    assert len({token for output in found[0] for ids in output for token in ids}) > 50


@pytest.mark.gpu
@needs_gpu
def test_steps_in_graphs_allocate_nothing():
    engine = recurrent_engine("cuda")
    for i in range(5):
        engine.add(greedy([i + 1, 2, 3], 400))
    held = []
    for _ in range(300):
        engine.step()
        held.append(torch.cuda.memory_allocated())
    assert max(held[100:]) <= max(held[20:100]), "memory grows with steps"
    engine.abort_all()
    engine.close()


def check_replays(device, lengths, count, dtype="bfloat16"):
    """One decode step again and again, from the same state: its logits and the state it leaves."""
    settings = {"kernels": "triton", "look_ahead": 0, "enable_prefix_caching": False}
    engine = recurrent_engine(device, dtype=dtype, **settings)
    for i, length in enumerate(lengths):
        engine.add(greedy([(31 * i + j) % 256 for j in range(length)], 9))
    while engine.scheduler.num_steps < 2 or engine.scheduler.waiting:
        engine.step()
    runner, bucket, expected = engine.runner, bucket_of(len(lengths)), None
    rows = runner.buffers.rows(bucket)
    assert rows[1, : len(lengths)].tolist() == list(lengths), "positions"
    slots, scratch = rows[0, : len(lengths)].tolist(), runner.buffers.scratch_slot
    others = sorted({*range(scratch)} - {*slots})
    kept = [tensor for cache in runner.slot_caches for tensor in vars(cache).values()]
    with torch.inference_mode(), runner._on_device():
        before = [tensor.clone() for tensor in kept]
        for _ in range(count):
            for tensor, old in zip(kept, before, strict=True):
                tensor.copy_(old)
            runner.graphs.run(bucket, True)
            found = [runner.buffers.logits[: len(lengths)], *(tensor[slots] for tensor in kept)]
            expected = [tensor.clone() for tensor in found] if expected is None else expected
            assert all(map(torch.equal, found, expected))
        for tensor, old in zip(kept, before, strict=True):
            assert torch.equal(tensor[others], old[others])
            assert torch.equal(tensor[scratch + 1 :], old[scratch + 1 :]), "snapshots"
    assert expected[0].isfinite().all() and expected[0].std() > 0
    engine.abort_all()
    engine.close()


def test_replays_interpreted():
    check_replays("cpu", (18, 5, 1), 2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(300,), (300, 5, 201, 1, 200)], ids=len)
def test_a_thousand_replays_of_a_step(lengths, dtype):
    check_replays("cuda", lengths, 1000, dtype)
