"""Scheduler and snapshots of state against a memory that is really copied, without a model.

A row of memory holds the history that its state stands for. A snapshot that is taken late, given away
while somebody is about to start from it, or of another text shows as a wrong history.
"""

import random

import pytest
from test_scheduler import PREFIXES, Engine, draw

from tprt.cache.block_manager import BlockManager
from tprt.cache.snapshots import SnapshotPool
from tprt.engine import scheduler as scheduler_module
from tprt.engine.scheduler import Scheduler, StepPlan
from tprt.engine.sequence import Request, Sequence
from tprt.sampling_params import SamplingParams

BLOCK = 4


class StateMemory:
    """Stands for the device: a history per row."""

    def __init__(self, rows: int) -> None:
        self.rows: list[tuple[int, ...] | None] = [None] * rows
        self.last: dict[int, int] = {}

    def run(self, plan: StepPlan) -> list[int]:
        for source, target in plan.states:
            self.rows[target] = self.rows[source]
        return [token for row in plan.rows for token in self._compute(row)]

    def _compute(self, row) -> list[int]:
        seq, slot = row.seq, row.seq.slot
        history = self.rows[slot] if row.start else ()
        known = tuple(seq.ids[: row.start])
        assert history[: len(known)] == known and len(history) == row.start, "another text's state"
        for position in range(row.start, row.start + row.count):
            history += (seq.ids[position] if position < len(seq.ids) else self.last[slot],)
        self.rows[slot] = history
        if not row.draws:
            return []
        self.last[slot] = draw(history, seq.seed_key)
        return [self.last[slot]]


class StateEngine(Engine):
    def __init__(self, rows=3, tokens=16, ahead=1, caching=True, snapshots=2) -> None:
        super().__init__(rows=rows, tokens=tokens, ahead=ahead, caching=caching)
        slots, pool = min(rows, tokens), SnapshotPool(range(rows + 1, rows + 1 + snapshots))
        self.blocks = BlockManager(1, caching)
        self.scheduler = Scheduler(self.blocks, BLOCK, slots, tokens, pool, is_paged=False)
        self.machine = StateMemory(rows + 1 + snapshots)


@pytest.mark.parametrize("snapshots", [0, 1, 2, 5])
def test_a_sequence_starts_from_the_state_of_its_own_text(snapshots, monkeypatch):
    """Texts that begin alike come and go, some dropped, some with several completions."""
    monkeypatch.setattr(scheduler_module, "SNAPSHOT_TOKENS", 8)
    found = 0
    for seed in range(60):
        rng = random.Random(seed)
        engine = StateEngine(
            rows=rng.randint(1, 4), tokens=rng.randint(4, 24), ahead=rng.randint(0, 1),
            caching=rng.random() < 0.8, snapshots=snapshots,
        )  # fmt: skip
        for _ in range(60):
            what = rng.random()
            if what < 0.4:
                prompt = rng.choice(PREFIXES) + rng.choices([1, 2], k=rng.randint(0, 14))
                engine.add(prompt, rng.randint(1, 6), n=rng.choice([1, 1, 3]), seed=seed)
            elif what < 0.5:
                if there := [s for s in engine.everyone if not s.finished]:
                    engine.abort(rng.choice(there))
            else:
                engine.step()
        engine.drain()
        found += sum(s.num_cached_tokens > 0 for s in engine.everyone)
    assert bool(found) == bool(snapshots), "what is never found cannot be wrong"


def test_a_row_that_is_started_from_is_not_given_away():
    """One row: a text is kept in it in the very step in which another would start from it."""
    pool = SnapshotPool(range(4, 5))
    scheduler = Scheduler(BlockManager(1), BLOCK, 3, 64, pool, is_paged=False)
    texts = list(range(1, 10)), list(range(101, 110))

    def add(text: int, arrival: int) -> Sequence:
        request = Request(texts[text], SamplingParams(max_tokens=5), 5, 0)
        scheduler.add(Sequence(request=request, arrival=arrival))
        return scheduler.waiting[-1]

    add(0, 0)
    scheduler.schedule()
    assert scheduler.schedule().states == [(0, 4)]
    add(1, 1)
    scheduler.schedule()
    again = add(0, 2)
    plan = scheduler.schedule()
    assert plan.states == [(1, 4)], "the second text has the row now"
    assert again.num_cached_tokens == 0


def test_states_are_forgotten_together():
    """Guards against a copy of a slot that a replayed record, or a step that failed, has overwritten."""
    pool = SnapshotPool(range(4, 8))
    scheduler = Scheduler(BlockManager(1), BLOCK, 3, 64, pool, is_paged=False)
    request = Request(list(range(1, 10)), SamplingParams(max_tokens=5), 5, 0)
    scheduler.add(seq := Sequence(request=request))
    plan = scheduler.schedule()
    seq.finish_reason = "abort"
    scheduler.abort(seq)
    assert not scheduler.schedule().rows, "its state has a row, and waits for a step that copies it"
    scheduler.forget_states()
    scheduler.retire(plan, [7], lambda seq, token: True)
    scheduler.add(Sequence(request=request, arrival=1))
    plan = scheduler.schedule()
    assert plan.states == [] and plan.rows[0].start == 0
