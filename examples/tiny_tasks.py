"""The text on which the tiny example checkpoint is trained and judged.

Each task is a question in Persimmon's chat format with one right answer. A question is *held out*
when the hash of its text says so, so training and evaluation can never share one. This file knows
nothing of tokenizers, tensors or training.
"""

import hashlib
import random
from dataclasses import dataclass

# Words that occur as keys, list items and counted things; all short, all distinct.
NOUNS = """
acorn alley anchor angle apple apron arch atlas axle badge bagel banjo barn basin basket beach
bead beak beam bear beetle bell belt bench berry bird blade block board boat bolt bone book boot
bowl branch bread brick bridge brook broom brush bucket bulb bush button cabin cable cactus camel
canal candle canoe cape card cargo carp carrot cart castle cave cedar cello chain chair chalk
cheese cherry chest chin circle cliff clock cloth cloud clover coach coat cobra coin comb comet
coral cord cork corn cotton crab crane crow crown cube cup curtain daisy deer desk dish dock dome
donkey door dove drawer dress drum duck earth easel elbow engine fan farm feast feather fence fern
ferry fiddle field finch fish flag flame fleet flute foam forest fox frog garden gate ghost giant
glass globe glove goat goose grain grape grass gravel guitar gull hammer harbor hawk hedge helmet
heron hill hinge honey hood hook horn horse house igloo ink iris island ivory jacket jar jelly
jewel kettle key kite knee knife knot ladder lake lamp lantern lark leaf lemon lens lever lily
lion lizard llama lock locket log loom lotus magnet mango maple marble mask meadow medal melon
metal mill mirror mitten moon moose moth mouse nail needle nest net oak oar onion oven owl oyster
paddle pail palm panda parrot pear pearl pen pencil piano pillow pine pipe plane plate plow pond
pony pot quill quilt rabbit radio raft rail rain reef ring river road robe
""".split()

# Values of the look-up task. Disjoint from NOUNS.
VALUES = """
amber azure beige black blue bronze brown coral2 cream crimson cyan ebony gold gray green indigo
jade khaki lilac lime maroon mauve navy ochre olive orange peach pink plum purple red ruby rust
salmon scarlet sepia silver teal violet white yellow
""".replace("coral2", "copper").split()

SHORT_TASKS = ("add", "reverse", "sort", "repeat", "count", "lookup")


@dataclass(frozen=True)
class Example:
    task: str
    question: str
    answer: str


def held_out(question: str) -> bool:
    """True for the tenth of all questions that training never sees."""
    return hashlib.sha256(question.encode()).digest()[0] % 10 == 0


def table(keys: list[str], values: list[str]) -> str:
    return "".join(f"- {value} {key}\n" for key, value in zip(keys, values, strict=True))


def make_example(task: str, rng: random.Random, lookup_lines: tuple[int, int] = (4, 40)) -> Example:
    """Draw one question of ``task``; ``lookup_lines`` bounds the lines of a look-up table."""
    if task == "add":
        a, b = rng.randrange(100), rng.randrange(100)
        return Example(task, f"What is {a} + {b}?", str(a + b))
    if task == "reverse":
        words = rng.sample(NOUNS, rng.randint(2, 8))
        return Example(task, f"Reverse: {' '.join(words)}", " ".join(reversed(words)))
    if task == "sort":
        words = rng.sample(NOUNS, rng.randint(2, 6))
        return Example(task, f"Sort: {' '.join(words)}", " ".join(sorted(words)))
    if task == "repeat":
        if rng.random() < 0.5:
            word, times = rng.choice(NOUNS), rng.randint(2, 6)
            return Example(task, f"Repeat {times} times: {word}", " ".join([word] * times))
        words = rng.choices(NOUNS, k=rng.randint(2, 10))
        return Example(task, f"Repeat: {' '.join(words)}", " ".join(words))
    if task == "count":
        word, times = rng.choice(NOUNS), rng.randint(1, 5)
        others = [noun for noun in rng.sample(NOUNS, 9) if noun != word][: 8 - times]
        words = [word] * times + others
        rng.shuffle(words)
        return Example(task, f"Count {word}: {' '.join(words)}", str(times))
    if task == "lookup":
        n = rng.randint(*lookup_lines)
        keys, values = rng.sample(NOUNS, n), rng.choices(VALUES, k=n)
        i = rng.randrange(n)
        question = f"{table(keys, values)}What is {keys[i]}?"
        return Example(task, question, f"{keys[i]} {values[i]}")
    raise ValueError(f"unknown task {task!r}; known: {', '.join(SHORT_TASKS)}")


def make_training_example(
    task: str, rng: random.Random, lookup_lines: tuple[int, int] = (4, 40)
) -> Example:
    """Draw until the question is not held out.

    Half of the operands of additions are single digits: sums of units are learnt there first.
    """
    while True:
        if task == "add":
            a, b = (rng.randrange(rng.choice((10, 100))) for _ in range(2))
            example = Example(task, f"What is {a} + {b}?", str(a + b))
        else:
            example = make_example(task, rng, lookup_lines)
        if not held_out(example.question):
            return example


def held_out_examples(
    tasks: tuple[str, ...], count: int, seed: int, lookup_lines: tuple[int, int] = (4, 40)
) -> list[Example]:
    """``count`` distinct held-out questions, the tasks taken in turn."""
    rng = random.Random(seed)
    found: dict[str, Example] = {}
    while len(found) < count:
        example = make_example(tasks[len(found) % len(tasks)], rng, lookup_lines)
        if held_out(example.question):
            found.setdefault(example.question, example)
    return list(found.values())


def chat_prompt(question: str) -> str:
    return f"human: {question}\n\nadept:"
