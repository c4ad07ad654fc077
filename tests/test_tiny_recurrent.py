"""The shipped RecurrentGemma answers, at every TP size, with the same text.

Its questions are about facts from far outside the window, which only the recurrent state can carry, and
about lines inside it, which attention has to find.
"""

import json
import random
import sys

import pytest
from conftest import ROOT, run_ranks

sys.path.insert(0, str(ROOT / "examples"))
from evaluate_tiny_recurrent import GREEDY, evaluate, turns
from recurrent_tasks import KNOWN, PLACES, THINGS, Conversation, conversation

from tprt import LLM

FOLDER = ROOT / "examples" / "tiny-recurrentgemma"
MAX_FOLDER_BYTES = 6 * 10**6
SIZES = [1, 2, 4]  # 4 ranks share 10 heads with two of zeros


def _answers(sizes: list[int]) -> dict[int, tuple[dict, list[str]]]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = {}
    for size in sizes:
        group = dist.new_group(list(range(size)), backend="gloo")
        if dist.get_rank() < size:
            with LLM(str(FOLDER), dtype="float32", group=group) as llm:
                found[size] = evaluate(llm)
        dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def answers() -> dict[int, tuple[dict, list[str]]]:
    return run_ranks(_answers, max(SIZES), SIZES, timeout=280)[0]


@pytest.fixture(scope="module")
def llm():
    with LLM(str(FOLDER), dtype="float32") as made:
        yield made


def ask(llm: LLM, *questions: str) -> list[str]:
    prompts = [{"messages": [{"role": "user", "content": text}]} for text in questions]
    return [o.outputs[0].text.strip() for o in llm.generate(prompts, GREEDY)]


@pytest.mark.slow
def test_accuracy_on_held_out_conversations(answers):
    for size, (report, _) in answers.items():
        for length, least in (("short", 0.9), ("long", 0.9), ("longest", 0.7)):
            for task in ("far", "near", "both"):
                assert report[f"{length}_{task}"] >= least, (size, report)
        assert report["short_prompt_tokens"][0] > 65, "keys of the window"
        assert report["long_prompt_tokens"][0] > 900
        assert report["longest_prompt_tokens"][0] > 6000


@pytest.mark.slow
def test_same_text_at_every_tp_size(answers):
    assert answers[1][1] == answers[2][1] == answers[4][1]


def test_an_answer_follows_the_fact_that_was_told(llm):
    """The same conversation of some 500 tokens with one word of its beginning changed."""
    rng = random.Random(4)
    lines = [f"Put {rng.choice(THINGS)} in {rng.choice(PLACES)}." for _ in range(80)]
    towns = KNOWN["town"]
    openings = [f"My pet is cat. My town is {town}." for town in towns]
    found = ask(llm, *("\n".join([first, *lines, "What is my town?"]) for first in openings))
    right = [text == f"Your town is {town}." for town, text in zip(towns, found, strict=True)]
    assert sum(right) >= 0.85 * len(right)


def test_what_is_near_is_found_by_attention(llm):
    """With a window too short for the line that is asked for, only what the state carries is right."""
    wanted = [t for t in turns()["short"] if t.task in ("far", "near")]
    with LLM(str(FOLDER), dtype="float32", window_keys=8) as short:
        found = ask(short, *(t.question for t in wanted))
    right: dict[str, list[bool]] = {}
    for turn, text in zip(wanted, found, strict=True):
        right.setdefault(turn.task, []).append(text == turn.answer)
    near, far = (sum(right[task]) / len(right[task]) for task in ("near", "far"))
    assert near < 0.6 and far > near + 0.2, (near, far)


def test_no_conversation_is_both_trained_on_and_judged():
    rng = random.Random(0)
    trained = {conversation(rng, held_out=False).opening for _ in range(2000)}
    judged = {t.question.split("\n")[0] for group in turns().values() for t in group}
    assert not trained & judged
    for opening in judged:
        made = Conversation(rng)
        made.opening = opening
        assert made.held_out


def test_files_are_hugging_face_s_and_small():
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["model_type"] == "recurrent_gemma" and config["attention_window_size"] == 64
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "README.md", "config.json", "evaluation.json", "model.safetensors", "tokenizer.model",
        "training.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MAX_FOLDER_BYTES


def test_card_says_what_was_measured():
    """The card's figures are those of the committed measurements, not typed by hand."""
    card = (FOLDER / "README.md").read_text()
    training = json.loads((FOLDER / "training.json").read_text())
    report = json.loads((FOLDER / "evaluation.json").read_text())
    assert f"{training['steps']} steps, {training['tokens']:,} tokens" in card
    for length in ("short", "long", "longest"):
        shares = " | ".join(f"{report[f'{length}_{task}']:.1%}" for task in ("far", "near", "both"))
        assert shares in card
