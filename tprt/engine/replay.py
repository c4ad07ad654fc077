"""Runs a recorded file of steps again: the same blocks, rows and draws, and so the same tokens.

The records hold every decision of rank 0, so no scheduler takes part. Knows records and engines; the
file was opened by somebody else.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tprt.engine.llm_engine import LLMEngine
from tprt.engine.step_record import DRAW, Kind, SlotOptions, StepRecord
from tprt.errors import ConfigError

HINT = "the settings that the recorded run had, and a file of this version"


@dataclass
class ReplayedCall:
    """One recorded call.

    Args:
        name: generate, stream, score, logits or step.
        tokens: drawn ids per (arrival number, index of the completion), overrun included.
        recorded: what the call returned then: for ``generate`` a list of ``RequestOutput`` as JSON;
            None where the file ends before its end or nothing was returned.
        finished: the file goes on to the end of this call. One cut off does not.
    """

    name: str
    tokens: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    recorded: Any = None
    finished: bool = False

    @property
    def differences(self) -> list[tuple[int, int]]:
        """(prompt, completion) of every recorded completion whose tokens came out different."""
        if self.name != "generate" or self.recorded is None:
            return []
        arrivals = sorted({arrival for arrival, _ in self.tokens})
        return [
            (i, completion["index"])
            for i, (arrival, output) in enumerate(zip(arrivals, self.recorded, strict=True))
            for completion in output["outputs"]
            if self.tokens[arrival, completion["index"]][: len(completion["token_ids"])]
            != completion["token_ids"]
        ]


def replay(engine: LLMEngine, records: Iterable[StepRecord], num_valid: int) -> list[ReplayedCall]:
    """On rank 0 of an idle engine; the others are in ``serve("replay")``.

    Raises:
        ConfigError: the records need more slots, blocks or ids than this engine has.
        RankMismatch: the ranks do not compute the same.
    """
    assert engine.idle, "records of another run would overwrite its blocks"
    engine.blocks.forget(range(engine.blocks.num_blocks))
    engine.scheduler.forget_states()
    calls: list[ReplayedCall] = []
    owners: dict[int, tuple[int, int]] = {}
    for record in records:
        if record.kind == Kind.OPEN:
            _check_open(engine, _read_json(record))
        elif record.kind == Kind.CALL:
            calls.append(ReplayedCall(record.text.decode("utf-8", "replace")))
        elif record.kind == Kind.RETURN and calls:
            calls[-1].finished = True
            if record.text:
                calls[-1].recorded = _read_json(record).get("value")
        elif record.kind == Kind.STEP:
            if not calls:
                raise ConfigError(f"step {record.step} comes before any call", hint=HINT)
            _check_step(engine, record, num_valid)
            for options in SlotOptions.decode_all(record.options):
                owners[options.slot] = options.arrival, options.index
            drawing = record.rows[(record.rows[:, 3] & DRAW) != 0, 0].tolist()
            if not owners.keys() >= set(drawing):
                raise ConfigError(
                    f"step {record.step} draws for a slot that no step before it began", hint=HINT
                )
            for slot, token in zip(drawing, engine.run_record(record), strict=True):
                calls[-1].tokens.setdefault(owners[slot], []).append(token)
    return calls


def _read_json(record: StepRecord) -> dict[str, Any]:
    try:
        found = json.loads(record.text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"record {record.step} holds no JSON object", hint=HINT)
    return found


def _check_open(engine: LLMEngine, then: dict[str, Any]) -> None:
    now = engine.facts()
    for name in ("model", "block_size", "max_num_seqs"):
        # Rows of snapshots lie behind those of slots: only with as many are they the same rows.
        if name == "max_num_seqs" and engine.runner.is_paged:
            continue
        if then.get(name) != now[name]:
            raise ConfigError(
                f"the file was recorded with {name} {then.get(name)!r}, this engine has {now[name]!r}",
                hint=HINT,
            )


def _check_step(engine: LLMEngine, record: StepRecord, num_valid: int) -> None:
    """A file may come from anywhere: nothing in it may index outside this engine's memory."""
    state, blocks = engine.runner.state, engine.blocks.num_blocks
    slots, width = state.block_tables.shape
    longest = engine.runner.max_model_len
    positions = record.rows[:, 1] + record.rows[:, 2]
    draws = int(((record.rows[:, 3] & DRAW) != 0).sum())
    limits = [
        ("slot", record.rows[:, 0], 0, slots),
        ("position", record.rows[:, 1], 0, longest),
        ("position", positions, 0, longest + 1),
        ("token id", record.tokens, -1, num_valid),
        ("slot", record.blocks[:, 0], 0, slots),
        ("block table index", record.blocks[:, 1], 0, width),
        ("block", record.blocks[:, 2], 0, blocks),
        ("block", record.copies, 0, blocks),
        ("block", record.clears, 0, blocks),
        ("row of state", record.states, 0, engine.runner.num_states),
        ("row of a ban", record.bans[:, 0], 0, draws),
        ("token id", record.bans[:, 1], 0, num_valid),
        ("token id", record.targets, -1, num_valid),
    ]
    options = SlotOptions.decode_all(record.options)
    limits.append(("slot", np.array([o.slot for o in options]), 0, slots))
    listed = [i for o in options for i in (*o.history, *o.allowed, *(i for i, _ in o.bias))]
    limits.append(("token id", np.array(listed), 0, num_valid))
    if gone := engine.runner.model.vocabulary.removed_of(
        [*record.tokens.tolist(), *record.targets.tolist()]
    ):
        raise ConfigError(
            f"step {record.step} names token id {gone[0]}, which model.trim_vocab has removed here",
            hint="the ranges that the recorded run had, or model.trim_vocab=off",
        )
    for name, values, low, high in limits:
        if values.size and not (low <= values.min() and values.max() < high):
            wrong = int(values.min()) if values.min() < low else int(values.max())
            raise ConfigError(
                f"step {record.step} names {name} {wrong}; this engine has {low} to {high - 1}",
                hint=HINT,
            )
