"""RecurrentGemma against transformers and against our own sequential oracle, cut in every way.

transformers restarts its convolution at every pass of several tokens and has no tensor parallelism: it
is an oracle of whole prompts alone. The other one, recurrent_oracle.py, is right everywhere, and slow.
"""

from pathlib import Path

import pytest
import torch
from conftest import run_ranks
from recurrent_models import CONFIG, WINDOW, random_weights, write_folder
from recurrent_oracle import oracle_logits

from tprt import LLM, SamplingParams
from tprt.batch import ForwardBatch, Segments
from tprt.cache import allocate_caches
from tprt.distributed.sharding import shard_spec
from tprt.distributed.tp_group import TPGroup
from tprt.kernels import use_kernels
from tprt.kernels.recurrence import scan_by_step, scan_in_tiles
from tprt.models.recurrent_gemma import RecurrentGemmaForCausalLM

TOLERANCE = 2e-5  # of logits, which are capped at 30
CPU = torch.device("cpu")


def token_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, CONFIG.vocab_size, (count,), generator=generator).tolist()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights(CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, weights) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "recurrent", weights)


# ---------------------------------------------------------------- the model by itself


def test_the_oracle_is_transformers(weights):
    """At any length, where its own rule of the window is asked for."""
    transformers = pytest.importorskip("transformers")
    raw = {k: v for k, v in CONFIG.to_hf().items() if k not in ("architectures", "model_type")}
    theirs = transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**raw)).eval()
    theirs.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    narrow = CONFIG.with_overrides({"window_keys": WINDOW})
    for count in (2, WINDOW - 1, WINDOW, WINDOW + 1, 60):
        ids = token_ids(count, count)
        with torch.no_grad():
            expected = theirs(torch.tensor([ids]), use_cache=False).logits[0]
        found = oracle_logits(weights, narrow, ids)
        assert (found - expected).abs().max() < TOLERANCE, count
    # Negative control: as trained, a query sees one key more.
    trained = oracle_logits(weights, CONFIG, ids)
    assert (trained[:WINDOW] - expected[:WINDOW]).abs().max() < TOLERANCE
    assert (trained[WINDOW:] - expected[WINDOW:]).abs().max() > 100 * TOLERANCE


def load(weights: dict[str, torch.Tensor], kernels: str) -> RecurrentGemmaForCausalLM:
    with use_kernels(kernels):
        model = RecurrentGemmaForCausalLM(CONFIG, TPGroup(), torch.float32).eval()
    for name, parameter in model.named_parameters():
        whole = weights[name]
        shard_spec(parameter).load(parameter, lambda slices, whole=whole: whole[slices])
    model.finish_loading()
    return model


def poisoned_caches(model: RecurrentGemmaForCausalLM, slots: int) -> list:
    caches = allocate_caches(model.cache_spec(), 1, 16, slots, torch.float32, CPU)
    for cache in caches:
        for tensor in vars(cache).values():
            tensor.fill_(float("nan"))
    return caches


def forward(model, caches, rows: list[tuple[int, int, list[int]]], decode: bool) -> torch.Tensor:
    """Logits of (slot, position of the first token, tokens) laid end to end."""
    positions = torch.cat([torch.arange(start, start + len(ids)) for _, start, ids in rows])
    counts = tuple(len(ids) for _, _, ids in rows)
    segments = Segments(
        slots=torch.tensor([slot for slot, _, _ in rows]),
        positions=positions,
        query_lens=counts,
        starts=None if decode else tuple(start for _, start, _ in rows),
    )
    batch = ForwardBatch(
        input_ids=torch.tensor([i for _, _, ids in rows for i in ids]),
        positions=positions,
        query_lens=counts,
        logits_rows=None,
        paged=None,
        segments=segments,
    )
    return model.compute_logits(model(batch, caches))


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("chunk", [1, 2, 7, 23, 100])
@pytest.mark.parametrize("prompt", [3, WINDOW, WINDOW + 1, 5 * WINDOW])
@torch.inference_mode()
def test_chunks_and_cached_steps(weights, kernels, chunk, prompt):
    """Prompts in chunks, then one token at a time, in memory that another sequence left as NaN."""
    ids = token_ids(prompt + 64, prompt)
    expected = oracle_logits(weights, CONFIG, ids)
    model = load(weights, kernels)
    caches, found, at = poisoned_caches(model, 3), [], 0
    while at < len(ids):
        decode = at >= prompt
        count = 1 if decode else min(chunk, prompt - at)
        found.append(forward(model, caches, [(1, at, ids[at : at + count])], decode))
        at += count
    assert (torch.cat(found) - expected).abs().max() < TOLERANCE


@torch.inference_mode()
def test_sequences_of_a_pass_do_not_meet(weights):
    """Chunks of several lengths and single tokens side by side, in any order of slots."""
    model = load(weights, "auto")
    caches = poisoned_caches(model, 5)
    texts = {slot: token_ids(60, slot) for slot in (4, 0, 2)}
    expected = {slot: oracle_logits(weights, CONFIG, ids) for slot, ids in texts.items()}
    at = dict.fromkeys(texts, 0)
    for counts in ((30, 1, 2), (1, 1, 1), (1, 40, 3), (20, 1, 1), (1, 1, 30)):
        rows = []
        for slot, count in zip(texts, counts, strict=True):
            rows.append((slot, at[slot], texts[slot][at[slot] : at[slot] + count]))
        found = forward(model, caches, rows, decode=False)
        for slot, start, ids in rows:
            mine, found = found[: len(ids)], found[len(ids) :]
            difference = (mine - expected[slot][start : start + len(ids)]).abs().max()
            assert difference < TOLERANCE, (slot, start)
            at[slot] += len(ids)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 8192])
def test_tiled_scan(length):
    """Decays as a trained model has them: most close to 1, some small, some exactly 0."""
    generator = torch.Generator().manual_seed(length)
    log_a = -8 * torch.rand(length, 32, generator=generator) * torch.logspace(-4, 0, 32)
    a, x = log_a.exp(), torch.randn(length, 32, generator=generator)
    x *= torch.sqrt(-torch.expm1(2 * log_a))
    a[length // 3] = 0.0
    by_step = scan_by_step(a, x)
    exact = scan_by_step(a.double(), x.double())
    tiled = scan_in_tiles(a.clone(), x.clone())
    scale = exact.abs().max()
    assert (tiled - by_step).abs().max() / scale < 2e-6
    assert (tiled - exact).abs().max() / scale < 2e-6


# ---------------------------------------------------------------- the engine


GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
LENGTHS = (5, 17, 33, 100, 130, 200, 201, 37)


def answers(llm: LLM, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    return [completion.token_ids for output in outputs for completion in output.outputs]


def poison(llm: LLM) -> None:
    for cache in llm._engine.runner.slot_caches:
        for tensor in vars(cache).values():
            tensor.fill_(float("nan"))


def test_greedy_text_is_the_oracles(folder, weights):
    prompt = token_ids(33, 5)
    with LLM(str(folder), dtype="float32", max_num_seqs=2) as llm:
        poison(llm)
        (found,) = answers(llm, [prompt])
    text = list(prompt)
    for _ in range(len(found)):
        text.append(int(oracle_logits(weights, CONFIG, text)[-1].argmax()))
    assert found == text[len(prompt) :]


def rank_answers(folder: str, lengths: tuple[int, ...]) -> dict:
    """On every rank: logits of long prompts, and texts in company and alone."""
    prompts = [token_ids(count, count) for count in lengths]
    sampled = SamplingParams(max_tokens=20, temperature=0.8, seed=5, n=3, ignore_eos=True)
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 48}
    with LLM(folder, dtype="float32", **small) as llm:
        if llm.tp.rank == 0:
            poison(llm)
        logits = llm.logits(token_ids(150, 1))
        found = {
            "logits": logits.numpy(),
            "company": answers(llm, prompts),
            "again": answers(llm, prompts),
            "sampled": answers(llm, prompts[3:5], sampled),
        }
        if llm.tp.rank == 0:
            found["steps"] = llm._engine.scheduler.num_steps
    with LLM(folder, dtype="float32", max_num_seqs=1, enable_prefix_caching=False) as llm:
        found["alone"] = [answers(llm, [prompt])[0] for prompt in prompts]
        found["sampled alone"] = [
            tokens for prompt in prompts[3:5] for tokens in answers(llm, [prompt], sampled)
        ]
    return found


@pytest.fixture(scope="module")
def on_ranks(folder) -> dict[int, list[dict]]:
    return {
        size: run_ranks(rank_answers, size, str(folder), LENGTHS, timeout=240) for size in (1, 2, 4)
    }


def test_every_cut_gives_the_logits_of_the_oracle(on_ranks, weights):
    expected = oracle_logits(weights, CONFIG, token_ids(150, 1))
    for size, ranks in on_ranks.items():
        for found in ranks:
            assert (torch.from_numpy(found["logits"]) - expected).abs().max() < TOLERANCE, size


def test_a_request_is_answered_alike_alone_and_in_company(on_ranks):
    """Among others in chunks, from snapshots of a prompt's beginning, and cut over any ranks."""
    alone = on_ranks[1][0]["alone"]
    for size, ranks in on_ranks.items():
        for found in ranks:
            assert found["alone"] == alone, size
            assert found["company"] == found["again"] == alone, size
            assert found["sampled"] == found["sampled alone"] == on_ranks[1][0]["sampled"], size


def test_a_known_beginning_is_not_computed_again(folder):
    prompt = token_ids(200, 7)
    with LLM(str(folder), dtype="float32", max_num_seqs=4) as llm:
        requests = [{"prompt_token_ids": prompt}]
        first, second = (llm.generate(requests, GREEDY)[0] for _ in "12")
        assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 192)
        assert first.outputs[0].token_ids == second.outputs[0].token_ids
        several = SamplingParams(max_tokens=5, temperature=1.0, seed=1, n=4)
        other = [{"prompt_token_ids": token_ids(90, 8)}]
        before = llm._engine.scheduler.num_steps
        llm.generate(other, several)
        assert llm._engine.scheduler.num_steps - before < 12, "the prompt was computed four times"


def preempt_often(scheduler) -> None:
    """No memory ever runs out here: by hand, in the midst of prompts and of texts."""
    schedule, steps = scheduler.schedule, 0

    def with_preemptions():
        nonlocal steps
        steps += 1
        if steps % 9 == 0 and len(scheduler.running) > 1:
            scheduler._preempt(scheduler.running[steps // 9 % len(scheduler.running)])
        return schedule()

    scheduler.schedule = with_preemptions


@pytest.mark.parametrize("caching", [True, False])
def test_preempted_sequences_go_on_as_if_nothing_had_happened(folder, caching):
    prompts = [token_ids(count, count) for count in LENGTHS[:4]]
    settings = {"dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 48}
    with LLM(str(folder), **settings) as llm:
        expected = answers(llm, prompts)
    settings |= {"enable_prefix_caching": caching, "look_ahead": 0}
    with LLM(str(folder), **settings) as llm:
        preempt_often(llm._engine.scheduler)
        assert answers(llm, prompts) == expected
        assert answers(llm, prompts) == expected, "what was kept of a preempted one is another's"
        assert llm._engine.scheduler.num_preemptions > 3


def test_window_keys_as_hugging_face(folder, weights):
    ids = token_ids(60, 3)
    narrow = CONFIG.with_overrides({"window_keys": WINDOW})
    with LLM(str(folder), dtype="float32", window_keys=WINDOW) as llm:
        found = llm.logits(ids)
    assert (found - oracle_logits(weights, narrow, ids)).abs().max() < TOLERANCE
