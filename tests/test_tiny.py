"""The shipped checkpoint answers, at every TP size, with the same text.

A wrong position, cache, rotary embedding or cut shows up here as wrong answers: the look-ups read
one line of about two hundred.
"""

import json
import sys

import pytest
from conftest import ROOT, TINY, run_ranks

sys.path.insert(0, str(ROOT / "examples"))
from evaluate_tiny import LONG_LINES, evaluate, examples

MAX_FOLDER_BYTES = 10 * 10**6


def _answers(sizes: list[int]) -> dict[int, tuple[dict, list[str]]]:
    """On each rank of 4: evaluate at the given sizes; ranks outside a smaller group sit it out."""
    import torch.distributed as dist

    from tprt import LLM

    dist.init_process_group("gloo")
    found = {}
    for size in sizes:
        group = dist.new_group(list(range(size)), backend="gloo")
        if dist.get_rank() < size:
            with LLM(str(TINY), dtype="float32", group=group) as llm:
                found[size] = evaluate(llm)
        dist.barrier()
    assert dist.is_initialized(), "LLM must leave the caller's groups alone"
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def answers() -> dict[int, tuple[dict, list[str]]]:
    return run_ranks(_answers, 4, [1, 2, 4], timeout=280)[0]


@pytest.mark.slow
def test_accuracy_on_held_out_prompts(answers):
    for size, (report, _) in answers.items():
        assert report["short"] >= 0.95, (size, report)
        assert report["long"] >= 0.80, (size, report)
        assert report["short_prompt_tokens"][1] <= 256
        assert 900 <= report["long_prompt_tokens"][0] <= report["long_prompt_tokens"][1] <= 1100


@pytest.mark.slow
def test_same_text_at_every_tp_size(answers):
    assert answers[1][1] == answers[2][1] == answers[4][1]


def test_held_out_questions_are_never_trained_on():
    from tiny_tasks import SHORT_TASKS, held_out, make_training_example
    from tiny_tasks import random as tasks_random

    judged = {e.question for group in examples().values() for e in group}
    assert all(held_out(question) for question in judged)
    rng = tasks_random.Random(0)
    drawn = {make_training_example(t, rng).question for t in SHORT_TASKS for _ in range(300)}
    drawn |= {make_training_example("lookup", rng, LONG_LINES).question for _ in range(50)}
    assert not drawn & judged and not any(held_out(question) for question in drawn)


def test_layout_is_adepts_and_small():
    assert (TINY / "latest_checkpointed_iteration.txt").read_text().strip().isdigit()
    ranks = sorted(p.parent.name for p in TINY.glob("iter_*/mp_rank_*/model_optim_rng.pt"))
    assert ranks == ["mp_rank_00", "mp_rank_01"]
    assert (TINY / "adept_vocab.model").is_file()
    size = sum(p.stat().st_size for p in TINY.rglob("*") if p.is_file())
    assert size < MAX_FOLDER_BYTES


def test_card_says_what_was_measured():
    """The card's figures are those of the committed measurements, not typed by hand."""
    training = json.loads((TINY / "training.json").read_text())
    measured = json.loads((TINY / "evaluation.json").read_text())
    card = (TINY / "README.md").read_text()
    assert len(training["zeros_per_layer"]) == 3
    for zeros in training["zeros_per_layer"]:
        assert f"{zeros:.1%}" in card
    tasks = {k: v for k, v in measured.items() if k.startswith("short_") and "tokens" not in k}
    assert len(tasks) == 6
    for task, share in tasks.items():
        assert f"| {task.removeprefix('short_')} | {share:.1%} |" in card
    assert f"| look-up of about 1,000 tokens | {measured['long']:.1%} |" in card


@pytest.mark.slow
def test_card_is_what_the_checkpoint_does(answers):
    measured = json.loads((TINY / "evaluation.json").read_text())
    assert {k: answers[1][0][k] for k in ("short", "long")} == {
        k: measured[k] for k in ("short", "long")
    }
