"""Which tokens of which sequences a step computes, and which blocks they are written to.

Rank 0 alone runs this; the others get the outcome as a ``StepRecord``. Continuous batching, first
come, first served: running sequences go before waiting ones, and their next tokens before any chunk of
a prompt, so a long prompt never holds up what runs. When blocks run out the youngest sequence gives up
its own and is computed again later; the oldest never does, so something always advances.

Knows numbers and blocks: no text, no tensors, no other rank. Steps are computed in the order in which
they are planned, one after the other; a plan may therefore rely on everything planned before it.
"""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

from tprt.cache.block_manager import BlockManager, extend_block_keys
from tprt.cache.snapshots import SnapshotPool
from tprt.engine.sequence import Sequence

SNAPSHOT_TOKENS = 1024  # of a prompt, between two states that are kept


@dataclass(slots=True)
class Row:
    """``count`` tokens of a sequence from position ``start``; ``draws`` when a new one follows."""

    seq: Sequence
    start: int
    count: int
    draws: bool


@dataclass
class StepPlan:
    """Args:
    begun: sequences that took a slot in this step.
    blocks: (slot, index in its block table, block) that are new in this step.
    copies, clears, states: as in ``StepRecord``.
    """

    number: int
    rows: list[Row] = field(default_factory=list)
    begun: list[Sequence] = field(default_factory=list)
    blocks: list[tuple[int, int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    clears: list[int] = field(default_factory=list)
    states: list[tuple[int, int]] = field(default_factory=list)


class Scheduler:
    """Args:
    max_num_seqs: sequences in one step; ``max_num_batched_tokens``: tokens in one step.
    snapshots: rows for the state of models that keep some per slot; without rows nothing is kept.
    is_paged: whether the model has layers that keep something per token, in blocks.
    """

    def __init__(
        self,
        blocks: BlockManager,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        snapshots: SnapshotPool | None = None,
        is_paged: bool = True,
    ) -> None:
        self.blocks, self.block_size = blocks, block_size
        self.snapshots, self.is_paged = snapshots or SnapshotPool(range(0)), is_paged
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Sequence] = []  # both by arrival
        self.running: list[Sequence] = []
        self.num_steps = self.num_preemptions = 0
        self._slots = list(range(self.max_num_seqs - 1, -1, -1))
        self._leaving: list[Sequence] = []
        self._filled: list[Sequence] = []  # their full blocks can be found from the next step on
        self._clears: list[int] = []
        # Slots whose state is to be kept, and at which position: they hold it until the next step.
        self._reached: list[tuple[int, Sequence, int]] = []
        self._kept: list[tuple[int, int]] = []  # (slot, row) for the next step to copy

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running and not self._leaving

    def add(self, seq: Sequence) -> None:
        """Queue a sequence that fits all blocks by itself (callers refuse what never can)."""
        assert self._blocks_for(seq.most_tokens) <= self.blocks.capacity
        insort(self.waiting, seq, key=_arrival)

    def schedule(self) -> StepPlan:
        """The next step; without rows when every sequence waits for a step in flight to retire."""
        self._register_filled()
        # Before anything is found: this may give away the row of an older text.
        self._keep_states()
        plan = StepPlan(self.num_steps)
        budget = self.max_num_batched_tokens
        decodes = sum(_wanted(seq) == 1 for seq in self.running)
        preempted = self.num_preemptions
        for seq in tuple(self.running):
            if seq.slot < 0:
                continue  # preempted for an older one in this very loop
            wanted = _wanted(seq)
            decodes -= wanted == 1
            count = self._up_to_snapshot(seq, min(wanted, budget - decodes))
            if count > 0 and self._grow(seq, count, plan):
                budget -= count
                self._plan_row(seq, count, plan)
        if self.num_preemptions == preempted:
            self._admit(budget, plan)
        if plan.rows:
            plan.clears, self._clears = self._clears, []
            plan.states, self._kept = self._kept + plan.states, []
            self.num_steps += 1
        return plan

    def _admit(self, budget: int, plan: StepPlan) -> None:
        at = 0  # nothing is copied: many thousands may wait
        while at < len(self.waiting) and budget > 0 and self._slots:
            seq = self.waiting[at]
            leader = seq.leader
            if leader is not None and leader.slot >= 0 and not self._prompt_is_cached(leader):
                at += 1  # its prompt is being computed by the first completion of its request
                continue
            held, computed, row = self._known_beginning(seq)
            if not self._has_room(seq, held) and (self.running or self._leaving or plan.rows):
                return
            self.blocks.share(held)
            del self.waiting[at]
            seq.slot, seq.block_table, seq.num_computed = self._slots.pop(), list(held), computed
            if seq.last_step < 0:  # not what it has computed itself before a preemption
                seq.num_cached_tokens = computed
            insort(self.running, seq, key=_arrival)
            plan.begun.append(seq)
            plan.blocks += [(seq.slot, i, block) for i, block in enumerate(held)]
            if row is not None:
                plan.states.append((row, seq.slot))
            count = self._up_to_snapshot(seq, min(seq.num_tokens - computed, budget))
            grown = self._grow(seq, count, plan)
            assert grown, "blocks were counted before admission"
            budget -= count
            self._plan_row(seq, count, plan)

    def _has_room(self, seq: Sequence, held: list[int]) -> bool:
        """Blocks for all its tokens, and one for each running sequence: any may want one at its next
        token, and without room for that the newcomer would be the first to go again."""
        if not self.is_paged:
            return True
        need = self._blocks_for(seq.num_tokens) - len(held) + 1 + len(self.running)
        return need <= self.blocks.num_free - self.blocks.num_unreferenced(held)

    def _prompt_is_cached(self, leader: Sequence) -> bool:
        """Whether a step before this one computed all of the prompt."""
        return (
            leader.num_computed >= leader.num_prompt_tokens
            and leader.prompt_step is not None
            and leader.prompt_step < self.num_steps
        )

    def _known_beginning(self, seq: Sequence) -> tuple[list[int], int, int | None]:
        """Blocks or a row of state that hold the first tokens of ``seq`` already, and how many tokens.

        At least the last token stays to be computed: its logits are wanted.
        """
        leader, prompt = seq.leader, seq.num_prompt_tokens
        if not self.is_paged:
            return self._known_state(seq)
        if leader is not None and leader.slot >= 0 and seq.num_tokens == prompt:
            return leader.block_table[: self._blocks_for(prompt - 1)], prompt - 1, None
        if not self.blocks.prefix_caching or seq.skips_prefix_cache:
            return [], 0, None
        extend_block_keys(seq.block_keys, seq.ids, self.block_size)
        held = self.blocks.match(seq.block_keys[: (seq.num_tokens - 1) // self.block_size])
        return held, len(held) * self.block_size, None

    # ------------------------------------------------------------ state of models that keep it per slot

    def _known_state(self, seq: Sequence) -> tuple[list[int], int, int | None]:
        """Completions of one request share the state of their prompt whatever is set of prefixes."""
        if seq.skips_prefix_cache or not (self.blocks.prefix_caching or seq.leader is not None):
            return [], 0, None
        extend_block_keys(seq.block_keys, seq.ids, self.block_size)
        found = self.snapshots.find(seq.block_keys[: (seq.num_tokens - 1) // self.block_size])
        if found is None:
            return [], 0, None
        index, row = found
        return [], (index + 1) * self.block_size, row

    def _next_kept(self, seq: Sequence, position: int) -> int:
        """The first position from ``position`` on whose state is to be kept; 0 where none is.

        Kept are every SNAPSHOT_TOKENS of a prompt, and its last full block.
        """
        wanted = self.blocks.prefix_caching or seq.request.params.n > 1
        last = (seq.num_prompt_tokens - 1) // self.block_size * self.block_size
        if not (wanted and self.snapshots.capacity and 0 < position <= last):
            return 0
        every = -(-SNAPSHOT_TOKENS // self.block_size) * self.block_size
        return min(-(-position // every) * every, last)

    def _up_to_snapshot(self, seq: Sequence, count: int) -> int:
        """The next ``count`` tokens, or as many as end where a state is to be kept."""
        kept = self._next_kept(seq, seq.num_computed + 1)
        return min(count, kept - seq.num_computed) if kept else count

    def _keep_states(self) -> None:
        """Give rows to states that the last step reached, before the next one moves them on.

        Wherever the sequence is by now: no step has run since.
        """
        for slot, seq, position in self._reached:
            if seq.finish_reason == "error":
                continue
            extend_block_keys(seq.block_keys, seq.ids, self.block_size)
            row = self.snapshots.take(seq.block_keys[position // self.block_size - 1])
            if row is not None:
                self._kept.append((slot, row))
        self._reached.clear()

    def forget_states(self) -> None:
        """No snapshot is to be found, and none made of what slots hold now."""
        self._reached.clear()
        self._kept.clear()
        self.snapshots.clear()

    # ------------------------------------------------------------ blocks

    def _grow(self, seq: Sequence, count: int, plan: StepPlan) -> bool:
        """Give ``seq`` blocks of its own for its next ``count`` tokens; False when it has to wait."""
        table, first = seq.block_table, seq.num_computed // self.block_size
        need = self._blocks_for(seq.num_computed + count) - len(table)
        shared = first < len(table) and self.blocks.references(table[first]) > 1
        if need <= 0 and not shared:
            return True
        while need + shared > self.blocks.num_free:
            if self._leaving:
                return False  # their blocks come back when the step in flight retires
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is seq:
                return False
        if shared:  # copy on write
            (own,) = self.blocks.allocate(1)
            plan.copies.append((table[first], own))
            plan.blocks.append((seq.slot, first, own))
            self.blocks.release([table[first]])
            table[first] = own
        if need > 0:
            for block in self.blocks.allocate(need):
                plan.blocks.append((seq.slot, len(table), block))
                table.append(block)
        return True

    def _plan_row(self, seq: Sequence, count: int, plan: StepPlan) -> None:
        start = seq.num_computed
        seq.num_computed += count
        if seq.prompt_step is None and seq.num_computed >= seq.num_prompt_tokens:
            seq.prompt_step = self.num_steps
        seq.last_step = self.num_steps
        draws = seq.num_computed == seq.num_tokens and seq.max_tokens > 0
        seq.num_pending += draws
        plan.rows.append(Row(seq, start, count, draws))
        if self.is_paged and seq.num_computed // self.block_size > seq.num_registered:
            self._filled.append(seq)
        if self._next_kept(seq, seq.num_computed) == seq.num_computed > 0:
            self._reached.append((seq.slot, seq, seq.num_computed))

    def _register_filled(self) -> None:
        if not self.blocks.prefix_caching:
            self._filled.clear()
            return
        for seq in self._filled:
            if seq.slot < 0:
                continue
            extend_block_keys(seq.block_keys, seq.ids, self.block_size)
            full = min(seq.num_computed // self.block_size, len(seq.block_keys))
            for i in range(seq.num_registered, full):
                self.blocks.register(seq.block_table[i], seq.block_keys[i])
            seq.num_registered = max(seq.num_registered, full)
        self._filled.clear()

    def _preempt(self, seq: Sequence) -> None:
        """Take a sequence out of the step; it keeps its tokens and waits at its old place."""
        self.num_preemptions += 1
        self.running.remove(seq)
        self._vacate(seq)
        seq.num_computed = seq.num_registered = 0
        seq.prompt_step = None
        insort(self.waiting, seq, key=_arrival)

    def _vacate(self, seq: Sequence) -> None:
        self.blocks.release(seq.block_table)
        self._slots.append(seq.slot)
        seq.block_table, seq.slot = [], -1

    def retire(
        self, plan: StepPlan, tokens: list[int], take: Callable[[Sequence, int], bool]
    ) -> list[Sequence]:
        """Hand the tokens drawn in ``plan`` to ``take``; the sequences it says have ended leave.

        ``tokens`` are in the order of the rows that draw. Tokens of sequences that ended before are
        dropped. Blocks of a sequence that is part of a step still in flight are released when that
        step retires.
        """
        ended = []
        drawn = iter(tokens)
        for row in plan.rows:
            seq = row.seq
            if row.draws:
                token = next(drawn)
                seq.num_pending -= 1
                if not seq.finished and take(seq, token):
                    ended.append(seq)
            elif seq.max_tokens == 0 and row.start + row.count == seq.num_tokens:
                if not seq.finished and take(seq, -1):
                    ended.append(seq)
        for seq in ended:
            self._leave(seq)
        self._release_left(plan.number)
        return ended

    def abort(self, seq: Sequence) -> None:
        """Drop a sequence that has been marked finished."""
        assert seq.finished
        self._leave(seq)

    def _leave(self, seq: Sequence) -> None:
        if seq.slot < 0:
            self.waiting.remove(seq)
            return
        self.running.remove(seq)
        self._leaving.append(seq)

    def abandon(self, plans: list[StepPlan]) -> None:
        """``plans`` may not have been computed, or in part: trust no block that a sequence holds."""
        self._filled.clear()
        self.forget_states()
        for seq in [*self.running, *self._leaving]:
            self.blocks.forget(seq.block_table)
        for plan in plans:
            self._clears += plan.clears

    def release_idle(self) -> None:
        """Nothing is in flight: release what aborted sequences hold."""
        self._release_left(self.num_steps)

    def _release_left(self, retired: int) -> None:
        self._register_filled()
        for seq in [s for s in self._leaving if s.last_step <= retired]:
            self._leaving.remove(seq)
            table = list(seq.block_table)
            if seq.finish_reason == "error":
                self.blocks.forget(table)
                self.snapshots.forget(seq.block_keys)
            self._vacate(seq)
            if seq.finish_reason == "error":
                self._clears += [b for b in table if self.blocks.references(b) == 0]

    def _blocks_for(self, num_tokens: int) -> int:
        if not self.is_paged:
            return 0
        return -(-num_tokens // self.block_size)


def _wanted(seq: Sequence) -> int:
    return 0 if seq.complete else seq.num_tokens - seq.num_computed


def _arrival(seq: Sequence) -> tuple[int, int]:
    return seq.arrival, seq.index
