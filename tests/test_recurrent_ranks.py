"""RecurrentGemma cut over 2, 4, 5 and 8 ranks: ten heads, which 4 and 8 share with some of zeros.

Eight ranks start once; the first of them make up each smaller group. Logits are compared with those of
the sequential oracle on each rank, texts with those of a single rank.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_ranks
from recurrent_models import CONFIG as TINY
from recurrent_models import WINDOW, telling_weights, write_folder
from recurrent_oracle import oracle_logits
from safetensors.torch import load_file
from test_recurrent_gemma import (
    LENGTHS,
    TOLERANCE,
    answers,
    forward,
    load,
    poison_what_is_left,
    poisoned_caches,
    token_ids,
)

from tprt import LLM, SamplingParams
from tprt.cli import main
from tprt.distributed.tp_group import init_tp_group

CONFIG = replace(TINY, intermediate_size=80)  # which 5 ranks can share too
PROMPTS, CHUNKS, CACHED = (3, WINDOW, WINDOW + 1, 5 * WINDOW), (1, 2, 7, 23), 64
# Where a step takes long: one prompt past the window, and a few cached steps.
FEW_PROMPTS, FEW_CHUNKS, FEW_CACHED = (WINDOW + 5,), (7,), 4
LONG = 150  # tokens, which are several passes
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=8, temperature=0.8, seed=5, n=3, ignore_eos=True)


def text_of(prompt: int) -> list[int]:
    return token_ids(prompt + CACHED, prompt)


@torch.inference_mode()
def worst_error(model, expected, prompts, chunks, cached: int) -> float:
    """Of this rank's columns, over every prompt in chunks of every size, all in the same passes."""
    tp, part = model.tp, model.vocabulary.part(model.tp.size)
    mine = slice(tp.rank * part, min((tp.rank + 1) * part, CONFIG.vocab_size))
    rows = [(prompt, chunk) for prompt in prompts for chunk in chunks]
    caches = poisoned_caches(model, len(rows))
    at, worst = [0] * len(rows), 0.0
    for step in range(max(prompts) + cached):
        decode = all(done >= prompt for done, (prompt, _) in zip(at, rows, strict=True))
        batch = []
        for slot, (prompt, chunk) in enumerate(rows):
            count = 1 if decode else min(chunk, prompt - at[slot])
            if count > 0 and at[slot] < prompt + cached:
                batch.append((slot, at[slot], text_of(prompt)[at[slot] : at[slot] + count]))
                at[slot] += count
        if not batch:
            break
        found = forward(model, caches, batch, decode)
        for slot, start, ids in batch:
            wanted = expected[rows[slot][0]][start : start + len(ids), mine]
            here, found = found[: len(ids), : wanted.shape[1]], found[len(ids) :]
            worst = max(worst, (here - wanted).abs().max().item())
            assert not here.isnan().any(), (step, slot, start)
    assert at == [prompt + cached for prompt, _ in rows]
    return worst


def preempt_often(llm: LLM) -> None:
    """The youngest, where an older one asks for memory, which here never runs out by itself."""
    scheduler, calls = llm._engine.scheduler, 0
    grow = scheduler._grow

    def grow_at_a_price(seq, count, plan):
        nonlocal calls
        calls += 1
        if calls % 7 == 0 and scheduler.running[-1] is not seq:
            scheduler._preempt(scheduler.running[-1])
        return grow(seq, count, plan)

    scheduler._grow = grow_at_a_price


def busy_answers(folder: str, **more) -> dict:
    """Among others: in chunks, preempted, from snapshots, in slots that others have left as NaN."""
    prompts = [token_ids(count, count) for count in LENGTHS]
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 48}
    with (
        LLM(folder, dtype="float32", **settings, **more) as llm,
        pytest.MonkeyPatch.context() as patch,
    ):
        poison_what_is_left(llm, patch)
        preempt_often(llm)
        found = {"logits": llm.logits(token_ids(LONG, 1)).numpy()}
        found["greedy"] = [answers(llm, prompts, GREEDY) for _ in "12"]
        found["sampled"] = answers(llm, prompts[3:5], SAMPLED)
        found["preemptions"] = llm._engine.scheduler.num_preemptions
        (again,) = llm.generate([{"prompt_token_ids": prompts[5]}], GREEDY)
        found["cached"], found["again"] = again.num_cached_tokens, again.outputs[0].token_ids
    return found


def same_logits(folder: str, other: str, **more) -> bool:
    """Bit for bit."""
    ids = token_ids(60, 1)
    with LLM(folder, dtype="float32", **more) as llm:
        expected = llm.logits(ids)
    with LLM(other, dtype="float32", **more) as llm:
        return torch.equal(llm.logits(ids), expected)


def record(folder: str, path: str) -> list[list[int]]:
    """Several prompts, then the same once more, from snapshots; two completions each."""
    prompts = [token_ids(count, count) for count in LENGTHS[:4]]
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 48, "record_path": path}
    with LLM(folder, dtype="float32", **settings) as llm:
        return [ids for _ in "12" for ids in answers(llm, prompts, replace(SAMPLED, n=2))]


def replayed(folder: str, path: str, **more) -> list[list[int]]:
    with LLM(folder, dtype="float32", max_num_seqs=4, **more) as llm:
        return [ids for call in llm.replay(path) for _, ids in sorted(call.tokens.items())]


def rank_work(folder: str, presharded: str, steps: str, oracle: str) -> dict:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    expected, weights = torch.load(oracle), load_file(f"{folder}/model.safetensors")
    found: dict = {"errors": {}, "busy": {}, "presharded": {}, "replayed": {}}
    for size in (8, 5, 4, 2):
        group = list(range(size))
        if dist.get_rank() >= size:
            continue
        tp = init_tp_group(group)
        few = size in (5, 8)
        wanted = (FEW_PROMPTS, FEW_CHUNKS, FEW_CACHED) if few else (PROMPTS, CHUNKS, CACHED)
        found["errors"][size] = worst_error(load(weights, config=CONFIG, tp=tp), expected, *wanted)
        tp.close()
        if not few:
            found["busy"][size] = busy_answers(folder, group=group)
            found["replayed"][size] = replayed(folder, steps, group=group)
            found["presharded"][size] = same_logits(folder, presharded, group=group)
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return telling_weights(CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, weights) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "recurrent", weights, CONFIG)


@pytest.fixture(scope="module")
def presharded(folder) -> Path:
    path = folder.parent / "presharded"
    assert main(["convert", str(folder), str(path), "--format", "presharded", "--tp", "4"]) == 0
    return path


@pytest.fixture(scope="module")
def recorded(folder) -> list[list[int]]:
    return record(str(folder), str(folder.parent / "steps"))


@pytest.fixture(scope="module")
def on_ranks(folder, presharded, recorded, weights) -> list[dict]:
    oracle = folder.parent / "oracle.pt"
    wanted = {*PROMPTS, *FEW_PROMPTS}
    torch.save({p: oracle_logits(weights, CONFIG, text_of(p)) for p in wanted}, oracle)
    files = folder, presharded, folder.parent / "steps", oracle
    return run_ranks(rank_work, 8, *map(str, files), timeout=240)


@pytest.mark.parametrize("size", [2, 4, 5, 8])
def test_chunks_and_cached_steps_give_the_oracles_logits(on_ranks, size):
    """Prompts shorter than, equal to and several times the window; of 8 ranks three have only zeros."""
    errors = [found["errors"][size] for found in on_ranks[:size]]
    assert max(errors) < TOLERANCE, errors


@pytest.fixture(scope="module")
def busy(folder, on_ranks) -> dict[int, list[dict]]:
    several = {size: [found["busy"][size] for found in on_ranks[:size]] for size in (2, 4)}
    return {1: [busy_answers(str(folder))]} | several


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, list[list[int]]]:
    """One sequence at a time on one rank; only completions of one request share what was computed."""
    prompts = [token_ids(count, count) for count in LENGTHS]
    settings = {"max_num_seqs": 1, "enable_prefix_caching": False}
    with LLM(str(folder), dtype="float32", **settings) as llm:
        return {
            "greedy": [answers(llm, [prompt], GREEDY)[0] for prompt in prompts],
            "sampled": [ids for prompt in prompts[3:5] for ids in answers(llm, [prompt], SAMPLED)],
        }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_busy_engine_answers_as_one_request_at_a_time(busy, alone, size):
    for found in busy[size]:
        assert found["greedy"] == [alone["greedy"]] * 2
        assert found["sampled"] == alone["sampled"]
        assert found["again"] == alone["greedy"][5]
    assert busy[size][0]["preemptions"] > 5
    assert busy[size][0]["cached"] == 192, "no snapshot was in play"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_returns_the_oracles_logits(busy, weights, size):
    expected = oracle_logits(weights, CONFIG, token_ids(LONG, 1))
    for found in busy[size]:
        assert (torch.from_numpy(found["logits"]) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_presharded_folder_gives_the_very_same_logits(folder, presharded, on_ranks, size):
    """Cut for four ranks; read by as many, and by fewer."""
    if size == 1:
        assert same_logits(str(folder), str(presharded))
    else:
        assert all(found["presharded"][size] for found in on_ranks[:size])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_record_of_one_rank_runs_again(folder, recorded, on_ranks, size):
    """Copies of state, which each rank makes of its own part, are in the record."""
    if size == 1:
        found = replayed(str(folder), str(folder.parent / "steps"))
    else:
        found = on_ranks[0]["replayed"][size]
    assert found == recorded
    assert len(set(map(tuple, found))) == len(found) // 2, "from a snapshot as from the beginning"
