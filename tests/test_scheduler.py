"""Scheduler and block manager against a memory that is really written, without a model.

``Machine`` stands for the device: it applies each plan's clears, copies and block changes, writes every
token's whole history into its slot of memory, and draws the next token from what it reads back. A
leaked, shared or stale block therefore shows as a wrong token, not only as a broken count.
"""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tprt.cache.block_manager import BlockManager, extend_block_keys
from tprt.cache.snapshots import SnapshotPool
from tprt.engine.scheduler import Scheduler, StepPlan
from tprt.engine.sequence import Request, Sequence
from tprt.kernels.noise import NON_FINITE
from tprt.sampling_params import SamplingParams

EOD = 0


def draw(history: tuple[int, ...], key: int) -> int:
    """The next token after a history: a pure function, as the model's is; now and then the end."""
    return hash((history, key)) % 23


class Machine:
    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.memory = [[None] * block_size for _ in range(blocks)]
        self.tables: dict[int, list[int]] = {}
        self.last: dict[int, int] = {}

    def run(self, plan: StepPlan) -> list[int]:
        for block in plan.clears:
            self.memory[block] = [None] * self.block_size
        for source, target in plan.copies:
            self.memory[target] = list(self.memory[source])
        for seq in plan.begun:
            self.tables[seq.slot] = []
        for slot, index, block in plan.blocks:
            table = self.tables[slot]
            table[index : index + 1] = [block]
        for row in plan.rows:
            self._write(row)
        return [self._draw(row) for row in plan.rows if row.draws]

    def _write(self, row) -> None:
        table, seq = self.tables[row.seq.slot], row.seq
        assert table == seq.block_table, "the changes sent do not add up to the block table"
        history = self._read(table, row.start)
        for position in range(row.start, row.start + row.count):
            known = position < len(seq.ids)
            history += (seq.ids[position] if known else self.last[seq.slot],)
            block, offset = divmod(position, self.block_size)
            self.memory[table[block]][offset] = history

    def _read(self, table: list[int], length: int) -> tuple[int, ...]:
        if length == 0:
            return ()
        block, offset = divmod(length - 1, self.block_size)
        history = self.memory[table[block]][offset]
        for i in range(length):  # every earlier position must still hold this very history
            block, offset = divmod(i, self.block_size)
            assert self.memory[table[block]][offset] == history[: i + 1], f"stale position {i}"
        return history

    def _draw(self, row) -> int:
        history = self._read(self.tables[row.seq.slot], row.start + row.count)
        self.last[row.seq.slot] = token = draw(history, row.seq.seed_key)
        return token


def alone(seq: Sequence) -> list[int]:
    """What the sequence must become, whatever ran beside it."""
    ids = list(seq.request.prompt_token_ids)
    while len(ids) < seq.most_tokens and (len(ids) == seq.num_prompt_tokens or ids[-1] != EOD):
        ids.append(draw(tuple(ids), seq.seed_key))
    return ids


class Engine:
    """The loop of one step of look-ahead (or none) around scheduler and machine."""

    def __init__(self, blocks=12, block_size=4, rows=4, tokens=8, ahead=1, caching=True) -> None:
        self.blocks = BlockManager(blocks + 1, caching)
        self.scheduler = Scheduler(self.blocks, block_size, rows, tokens)
        self.machine = Machine(blocks + 1, block_size)
        self.tokens, self.ahead, self.in_flight = tokens, ahead, []
        self.everyone: list[Sequence] = []
        self.arrivals = self.computed = 0
        self.waited: dict[Sequence, int] = {}

    def add(self, prompt, max_tokens, n=1, seed=0) -> list[Sequence]:
        params = SamplingParams(max_tokens=max_tokens or None, n=n)
        request = Request(prompt, params, max_tokens, seed)
        made: list[Sequence] = []
        for index in range(n):
            leader = made[0] if made else None
            made.append(
                Sequence(request=request, arrival=self.arrivals, index=index, leader=leader)
            )
            self.scheduler.add(made[-1])
        self.arrivals += 1
        self.everyone += made
        return made

    def step(self) -> None:
        if not self.in_flight:
            self.scheduler.release_idle()
        decoding = [s for s in self.scheduler.running if 0 < s.num_computed == s.num_tokens - 1]
        before = self.scheduler.num_preemptions
        plan = self.scheduler.schedule()
        if plan.rows:
            self._check_plan(plan, decoding if self.scheduler.num_preemptions == before else [])
            self.in_flight.append((plan, self.machine.run(plan)))
        while len(self.in_flight) > (self.ahead if plan.rows else 0):
            self._retire()
        assert plan.rows or self.in_flight or self.scheduler.idle or not self.scheduler._leaving

    def _retire(self) -> None:
        plan, tokens = self.in_flight.pop(0)
        self.scheduler.retire(plan, tokens, self._take)

    def _take(self, seq: Sequence, token: int) -> bool:
        if seq.max_tokens == 0:
            seq.finish_reason = "length"
            return True
        seq.ids.append(token)
        if token == EOD:
            seq.finish_reason = "stop"
        elif len(seq.ids) == seq.most_tokens:
            seq.finish_reason = "length"
        return seq.finished

    def abort(self, seq: Sequence) -> None:
        seq.finish_reason = "abort"
        self.scheduler.abort(seq)

    def _check_plan(self, plan: StepPlan, decoding: list[Sequence]) -> None:
        assert sum(row.count for row in plan.rows) <= self.tokens
        assert len({row.seq for row in plan.rows}) == len(plan.rows)
        self.computed += sum(row.count for row in plan.rows)
        # The fairness bound: what decodes is part of every step, whatever prompt is waiting.
        ran = {row.seq for row in plan.rows}
        for seq in decoding:
            if not seq.complete and not self.scheduler._leaving:
                assert seq in ran, "a running decode was held up"

    def check_blocks(self) -> None:
        holders = [0] * self.blocks.num_blocks
        held = [*self.scheduler.running, *self.scheduler._leaving]
        for seq in held:
            assert len(set(seq.block_table)) == len(seq.block_table)
            for block in seq.block_table:
                holders[block] += 1
        assert holders == [self.blocks.references(b) for b in range(self.blocks.num_blocks)]
        assert holders[0] == 0
        assert self.blocks.num_free + sum(h > 0 for h in holders) == self.blocks.capacity
        for seq in held:  # only whole blocks of computed tokens may have a second holder
            for i, block in enumerate(seq.block_table):
                if holders[block] > 1:
                    assert (i + 1) * self.scheduler.block_size <= seq.num_computed
        slots = [seq.slot for seq in held]
        assert len(set(slots)) == len(slots) and min(slots, default=0) >= 0
        assert all(seq.slot < 0 and not seq.block_table for seq in self.scheduler.waiting)

    def drain(self, limit=10_000) -> None:
        while not self.scheduler.idle or self.in_flight:
            self.step()
            self.check_blocks()
            limit -= 1
            assert limit, "it does not end"
        assert self.blocks.num_free == self.blocks.capacity
        for seq in self.everyone:
            assert seq.finished
            assert seq.ids == alone(seq)[: len(seq.ids)]
            if seq.finish_reason != "abort":
                assert seq.ids == alone(seq)


PREFIXES = [[7, 1, 2, 3, 4, 5, 6, 7, 8], [7, 1, 2, 3, 9, 9], [5]]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(8, 24), block_size=st.sampled_from([1, 2, 4]), rows=st.integers(1, 5),
        tokens=st.integers(1, 12), ahead=st.integers(0, 1), caching=st.booleans(),
    )  # fmt: skip
    def start(self, **sizes) -> None:
        self.engine = Engine(**sizes)

    @rule(
        prefix=st.sampled_from(PREFIXES), tail=st.lists(st.integers(1, 3), max_size=6),
        max_tokens=st.integers(0, 9), n=st.integers(1, 3), seed=st.integers(0, 3),
    )  # fmt: skip
    def add(self, prefix, tail, max_tokens, n, seed) -> None:
        capacity = self.engine.blocks.capacity * self.engine.scheduler.block_size
        prompt = (prefix + tail)[: capacity - max_tokens]
        if prompt and len(self.engine.scheduler.waiting) < 12:
            self.engine.add(prompt, max_tokens, n if max_tokens else 1, seed)

    @rule(steps=st.integers(1, 6))
    def step(self, steps) -> None:
        for _ in range(steps):
            self.engine.step()
            self.engine.check_blocks()
            COUNTED["steps"] += 1

    @precondition(lambda self: any(not s.finished for s in self.engine.everyone))
    @rule(data=st.data())
    def abort(self, data) -> None:
        alive = [s for s in self.engine.everyone if not s.finished]
        self.engine.abort(data.draw(st.sampled_from(alive)))

    @invariant()
    def blocks_add_up(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_blocks()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.drain()


COUNTED = {"steps": 0}


def test_any_order_of_add_step_abort(capsys):
    """At least 20,000 steps of random mixes; every request ends with the tokens it has alone."""
    from hypothesis.stateful import run_state_machine_as_test

    COUNTED["steps"] = 0
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=330,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert COUNTED["steps"] > 20_000


def run_mix(engine: Engine, seed: int = 0, count: int = 30) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        prompt = rng.choice(PREFIXES) + [rng.randint(1, 3) for _ in range(rng.randint(0, 4))]
        engine.add(prompt, rng.randint(1, 9), rng.randint(1, 3), seed=rng.randint(0, 5))
        for _ in range(rng.randint(0, 3)):
            engine.step()
    engine.drain()


@pytest.mark.parametrize(
    "method, broken",
    [
        ("references", lambda self, block: 1),  # writes into shared blocks
        ("match", lambda self, keys: list(self._block_of.values())[: len(keys)]),
        ("release", lambda self, blocks: None),
    ],
)
def test_the_machine_sees_a_broken_block_manager(method, broken, monkeypatch):
    run_mix(Engine())
    monkeypatch.setattr(BlockManager, method, broken)
    with pytest.raises(AssertionError):
        run_mix(Engine())


def test_look_ahead_and_chunks_change_no_token():
    for sizes in ({"ahead": 0}, {"ahead": 1}, {"tokens": 2, "rows": 2}, {"caching": False}):
        run_mix(Engine(**sizes))


def test_preemption_takes_the_youngest_and_both_end():
    engine = Engine(blocks=7, rows=4, tokens=16, caching=False)
    old, young = engine.add([1] * 6, 12)[0], engine.add([2] * 6, 12, seed=1)[0]
    old.seed_key, young.seed_key = _long_draws(old), _long_draws(young)
    engine.drain()
    assert engine.scheduler.num_preemptions > 0
    assert len(old.ids) == len(young.ids) == 18


def _long_draws(seq: Sequence) -> int:
    """A key with which the sequence does not meet an end of text."""
    for seq.seed_key in range(1000):
        if len(alone(seq)) == seq.most_tokens:
            return seq.seed_key
    raise AssertionError


def test_shared_prefix_is_computed_once():
    """32 requests with 1,024 tokens in common: ten times fewer tokens than without sharing."""
    computed = {}
    for caching in (False, True):
        engine = Engine(2400, 16, rows=32, tokens=2048, caching=caching)
        for i in range(32):
            engine.add([*range(1, 1025), 2000 + i], 1, seed=i)
        engine.drain()
        computed[caching] = engine.computed
    assert computed[False] == 32 * 1025
    assert computed[True] * 10 < computed[False]


def test_completions_of_one_request_share_its_prompt():
    engine = Engine(40, 4, rows=8, tokens=64, caching=False)
    engine.add([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2], 6, n=6)
    engine.step()
    engine.step()
    # 11 tokens are two full blocks, shared, and a third of which each has a copy.
    tables = [seq.block_table for seq in engine.everyone]
    assert all(table[:2] == tables[0][:2] for table in tables)
    assert len({table[2] for table in tables}) == 6
    assert engine.blocks.capacity - engine.blocks.num_free == 2 + 6
    engine.drain()


def test_a_long_prompt_does_not_hold_up_a_decode():
    engine = Engine(100, 4, rows=4, tokens=8)
    short = engine.add([1], 12)[0]
    short.seed_key = _long_draws(short)
    engine.step()
    long = engine.add([2] * 200, 1)[0]
    for drawn in range(2, 12):
        engine.step()
        assert len(short.ids) + short.num_pending == 1 + drawn
    assert 0 < long.num_computed < 200


def test_first_come_first_served():
    engine = Engine(100, 4, rows=1, tokens=8)
    sequences = [engine.add([i + 1] * 9, 2, seed=i)[0] for i in range(4)]
    order = []
    while not engine.scheduler.idle or engine.in_flight:
        engine.step()
        order += [s for s in sequences if s.finished and s not in order]
    assert order == sequences


def test_blocks_of_a_broken_row_are_cleared_and_never_found():
    engine = Engine(12, 4, rows=2, tokens=16)
    seq = engine.add([1] * 8, 4)[0]
    original = engine._take

    def take(seq, token):
        if seq.request.seed == 0 and not seq.finished:
            assert token != NON_FINITE
            seq.finish_reason = "error"
            return True
        return original(seq, token)

    engine._take = take
    while not engine.scheduler.idle or engine.in_flight:
        engine.step()
    held = set(engine.scheduler._clears)
    assert len(held) >= 2
    keys: list[bytes] = []
    extend_block_keys(keys, seq.ids, 4)
    assert engine.blocks.match(keys) == []
    engine.add([1] * 8, 2, seed=1)
    engine.step()
    assert not engine.scheduler._clears


def test_the_block_that_was_left_longest_ago_is_reused_first():
    blocks = BlockManager(5)
    first = blocks.allocate(2)
    second = blocks.allocate(2)
    for block in first + second:
        blocks.register(block, bytes([block]))
    blocks.release(first)
    blocks.release(second)
    # Of one text the end goes before the beginning, which more texts share.
    assert blocks.allocate(4) == [*reversed(first), *reversed(second)]


def test_state_is_kept_from_the_slot_that_had_it():
    """Guards against a snapshot of another slot, where a sequence was preempted and begins anew."""
    pool = SnapshotPool(range(3, 6))
    scheduler = Scheduler(BlockManager(1), 4, 2, 64, pool, is_paged=False)
    request = Request(list(range(1, 11)), SamplingParams(max_tokens=5), 5, 0)
    seq = Sequence(request=request)
    scheduler.add(seq)
    (row,) = scheduler.schedule().rows
    assert (row.start, row.count) == (0, 8), "up to the last full block of the prompt"
    before = seq.slot
    scheduler._preempt(seq)
    scheduler._slots.reverse()  # so that it gets the other slot
    plan = scheduler.schedule()
    assert seq.slot != before and pool.find(seq.block_keys) == (1, 3)
    assert plan.states == [(before, 3), (3, seq.slot)], "kept, and gone on from at once"
    assert (plan.rows[0].start, plan.rows[0].count) == (8, 2)
