"""Real weights: a request gives the tokens it gives alone, whatever runs beside it, at any TP size."""

import random
import sys

import pytest
from conftest import ROOT, TINY, run_ranks

from tprt import LLM, SamplingParams

sys.path.insert(0, str(ROOT / "examples"))
from tiny_tasks import SHORT_TASKS, chat_prompt, held_out_examples

ROOMY = {"kv_cache_memory": 2**25}
TIGHT = {"max_num_batched_tokens": 24, "max_num_seqs": 5, "block_size": 4, "max_model_len": 160}


def requests(seed: int, count: int) -> tuple[list[str], list[SamplingParams]]:
    rng = random.Random(seed)
    questions = held_out_examples(SHORT_TASKS, count, seed=seed, lookup_lines=(4, 12))
    options = [
        {"temperature": 0.0},
        {"temperature": 1.0, "n": 2},
        {"temperature": 0.9, "top_p": 0.8},
        {"temperature": 1.2, "top_k": 8, "presence_penalty": 0.5},
    ]
    params = [
        SamplingParams(
            seed=rng.randrange(99),
            max_tokens=rng.randint(2, 40),
            ignore_eos=True,
            **rng.choice(options),
        )
        for _ in questions
    ]
    return [chat_prompt(q.question) for q in questions], params


def _texts(settings: dict, one_by_one: bool, blocks: int | None) -> tuple[list, int, int]:
    prompts, params = requests(5, 18)
    with LLM(str(TINY), dtype="float32", **settings) as llm:
        engine = llm._engine
        if blocks is not None and engine.tp.rank == 0:
            # The same number of blocks at every TP size, so that preemption happens at each.
            engine.blocks.allocate(engine.blocks.num_free - blocks)
        calls = [([p], [o]) for p, o in zip(prompts, params, strict=True)]
        outputs = []
        for asked in calls if one_by_one else [(prompts, params)]:
            outputs += llm.generate(*asked)
        texts = [[(c.text, c.token_ids, c.finish_reason) for c in o.outputs] for o in outputs]
        return texts, engine.scheduler.num_preemptions, max(o.num_cached_tokens for o in outputs)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_company_changes_no_token(ranks):
    alone = run_ranks(_texts, 1, ROOMY, True, None)[0][0]
    roomy = run_ranks(_texts, ranks, ROOMY, False, None)
    assert all(texts == alone for texts, _, _ in roomy)
    tight = run_ranks(_texts, ranks, ROOMY | TIGHT, False, 36)
    assert all(texts == alone for texts, _, _ in tight)
    assert tight[0][1] > 0, "nothing was preempted: the test has lost its point"
