"""Turns a plan of the scheduler into the record that every rank carries out.

Knows sequences and their options; the layout of a record is ``step_record``'s business.
"""

from collections.abc import Collection, Iterable

import numpy as np

from tprt.engine.scheduler import Row, StepPlan
from tprt.engine.sequence import Sequence
from tprt.engine.step_record import (
    ALL_LOGITS,
    DEVICE_TOKEN,
    DRAW,
    PROMPT_LOGPROBS,
    Ints,
    Kind,
    SlotOptions,
    StepRecord,
)


def build_record(
    plan: StepPlan, number: int, end_ids: Collection[int], look_ahead: int
) -> StepRecord:
    """``number`` counts records of any kind; ``end_ids`` are what ``min_tokens`` holds back."""
    rows: list[tuple[int, int, int, int]] = []
    tokens: list[int] = []
    bans: list[tuple[int, int]] = []
    targets: list[int] = []
    full, logprobs, prompt_logprobs, draws = False, -1, -1, 0
    for row in plan.rows:
        seq, end = row.seq, row.start + row.count
        flags = DRAW if row.draws else 0
        tokens += seq.ids[row.start : end]
        if end > len(seq.ids):
            tokens.append(DEVICE_TOKEN)
        if row.draws:
            params = seq.request.params
            full = full or params.needs_whole_row
            if params.logprobs is not None:
                logprobs = max(logprobs, params.logprobs)
            if seq.restricted:
                bans += [(draws, token) for token in banned_ids(row, end_ids)]
            draws += 1
        if seq.wants_logits:
            flags |= ALL_LOGITS
        wanted = seq.request.params.prompt_logprobs
        if wanted is not None and seq.index == 0 and row.start < seq.num_prompt_tokens - 1:
            flags |= PROMPT_LOGPROBS
            prompt_logprobs = max(prompt_logprobs, wanted)
            targets += prompt_targets(row)
        rows.append((seq.slot, row.start, row.count, flags))
    options = [slot_options(seq).encode() for seq in plan.begun]
    return StepRecord(
        step=number,
        kind=Kind.STEP,
        # Only the full sampler knows bans; it draws the same tokens as the plain one.
        full=full or bool(bans),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        look_ahead=look_ahead,
        rows=_table(rows, 4),
        tokens=np.array(tokens, dtype=np.int64),
        # A place that is written twice keeps the last: on a device the order is anybody's guess.
        blocks=_table(((*at, b) for at, b in {(s, i): b for s, i, b in plan.blocks}.items()), 3),
        copies=_table(plan.copies, 2),
        clears=np.array(plan.clears, dtype=np.int64),
        states=_table(plan.states, 2),
        options=np.concatenate(options) if options else np.empty(0, dtype=np.int64),
        bans=_table(bans, 2),
        targets=np.array(targets, dtype=np.int64),
    )


def _table(rows: Iterable[tuple[int, ...]], width: int) -> Ints:
    return np.array(list(rows), dtype=np.int64).reshape(-1, width)


def banned_ids(row: Row, end_ids: Collection[int]) -> set[int]:
    """What the token after ``row`` may not be: an early end, or the last token of a bad word."""
    seq, params = row.seq, row.seq.request.params
    found: set[int] = set()
    if row.start + row.count - seq.num_prompt_tokens < params.min_tokens:
        found = {*end_ids, *params.stop_token_ids}
    for *before, last in seq.request.bad_word_ids:
        # Longer words need all ids on the host, which the engine sees to (``needs_host``).
        completion = seq.ids[seq.num_prompt_tokens :]
        if not before or completion[-len(before) :] == before:
            found.add(last)
    return found


def prompt_targets(row: Row) -> list[int]:
    """The id after each of the row's tokens while that is a prompt token, else -1."""
    seq = row.seq
    following = seq.ids[row.start + 1 : min(row.start + row.count + 1, seq.num_prompt_tokens)]
    return following + [-1] * (row.count - len(following))


def slot_options(seq: Sequence) -> SlotOptions:
    params = seq.request.params
    return SlotOptions(
        slot=seq.slot,
        seed_key=seq.seed_key,
        arrival=seq.arrival,
        index=seq.index,
        temperature=0.0 if params.greedy else params.temperature,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        num_prompt_tokens=seq.num_prompt_tokens,
        history=tuple(seq.ids) if params.penalizes else (),
        bias=params.logit_bias,
        allowed=params.allowed_token_ids or (),
    )
