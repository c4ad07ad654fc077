"""The text on which the tiny RecurrentGemma is trained and judged: facts told long ago and just now.

A conversation begins with facts about the user, goes on with many lines that put things into places, and
asks now and then: for a fact of the beginning (*far*), for the place of a thing put away a few lines ago
(*near*), or for both in one sentence. Far facts lie outside the attention window, so only the recurrent
state can carry them; near ones are inside it.

A conversation is *held out* when the hash of its opening facts says so, so training and evaluation can
never share one. This file knows nothing of tokenizers, tensors or training.
"""

import hashlib
import random
from dataclasses import dataclass

from tiny_tasks import NOUNS, VALUES

FACTS = {
    "name": """Ben Carl Dora Fay Gus Hana Ivan Jane Karl Lena Milo Nora Otto Paul Rosa Sam
        Vera""",
    "town": """Athens Bergen Cairo Dakar Essen Fargo Genoa Hanoi Izmir Jaipur Kyoto Lima Malmo Nice
        Paris Quito Rome Seoul Turin""",
    "pet": "bat bee calf cat cub dog eel elk emu ewe gnu hare hen hog lamb mule newt pup",
    "color": " ".join(word for word in VALUES[:20] if word not in ("copper", "khaki")),
    "drink": """ale beer broth coffee cola juice latte lemonade milk mocha punch rum sake
        soda syrup tea wine""",
}
KNOWN = {kind: words.split() for kind, words in FACTS.items()}
THINGS = NOUNS[60:124]
PLACES = """attic bakery bank bath cellar chapel closet court den garage hall hotel inn kitchen lab
    library lobby lounge market museum office pantry park porch school shed shop stable studio tower
    vault yard""".split()
TASKS = ("far", "near", "both")
REACH = 5  # near things are among the last so many lines: 65 keys hold them, question and answer


@dataclass(frozen=True)
class Turn:
    """One question of a conversation and its one right answer."""

    task: str
    question: str
    answer: str


class Conversation:
    """Draws turns one after the other; what was told last holds.

    Args:
        rng: draws everything.
        facts: bounds of the number of facts told in the first turn.
    """

    def __init__(self, rng: random.Random, facts: tuple[int, int] = (1, len(KNOWN))) -> None:
        self.rng = rng
        kinds = rng.sample(list(KNOWN), rng.randint(*facts))
        self.facts = {kind: rng.choice(KNOWN[kind]) for kind in kinds}
        self.opening = " ".join(f"My {kind} is {value}." for kind, value in self.facts.items())
        self.told = False

    @property
    def held_out(self) -> bool:
        """True for the tenth of all openings that training never sees."""
        return hashlib.sha256(self.opening.encode()).digest()[0] % 10 == 0

    def turn(self, task: str, lines: int) -> Turn:
        """The next question after so many new lines; ``near`` and ``both`` need one line at least."""
        rng, text = self.rng, []
        if not self.told:
            text.append(self.opening)
            self.told = True
        put = [(rng.choice(THINGS), rng.choice(PLACES)) for _ in range(lines)]
        text += [f"Put {thing} in {place}." for thing, place in put]
        kind = rng.choice(list(self.facts))
        fact = f"your {kind} is {self.facts[kind]}."
        if task == "far":
            return Turn(task, "\n".join([*text, f"What is my {kind}?"]), f"Y{fact[1:]}")
        thing, _ = rng.choice(put[-REACH:])
        found = f"The {thing} is in {dict(put)[thing]}"
        if task == "near":
            return Turn(task, "\n".join([*text, f"Where is {thing}?"]), f"{found}.")
        text.append(f"Where is {thing}, and what is my {kind}?")
        return Turn(task, "\n".join(text), f"{found}, and {fact}")


def conversation(
    rng: random.Random, held_out: bool, facts: tuple[int, int] = (1, 5)
) -> Conversation:
    """Draw until the conversation is one of the held-out ones, or one of the others."""
    while True:
        drawn = Conversation(rng, facts)
        if drawn.held_out == held_out:
            return drawn


def held_out_turns(count: int, seed: int, lines: tuple[int, int]) -> list[Turn]:
    """``count`` first turns of held-out conversations, the tasks taken in turn.

    Every fact lies ``lines`` lines of six tokens before its question, so outside the window of 65 keys
    from 12 lines on.
    """
    rng = random.Random(seed)
    drawn = (conversation(rng, held_out=True, facts=(2, 5)) for _ in range(count))
    return [c.turn(TASKS[i % len(TASKS)], rng.randint(*lines)) for i, c in enumerate(drawn)]
