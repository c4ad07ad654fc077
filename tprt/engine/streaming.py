"""Turns growing completions into the events a reader of a stream sees.

Text that may still become part of a stop string is held back. Knows sequences, no ranks.
"""

from collections.abc import Iterator

from tprt.engine.outputs import RequestOutput, StreamEvent
from tprt.engine.sequence import Sequence


class RequestStream:
    """One request's completions and how much of them has been given out."""

    def __init__(self, request_id: int, sequences: list[Sequence]) -> None:
        self.request_id, self.sequences = request_id, sequences
        self._given = [(0, 0, False)] * len(sequences)  # characters, ids, end

    @property
    def finished(self) -> bool:
        return all(seq.finished for seq in self.sequences)

    def events(self, output: RequestOutput | None) -> Iterator[StreamEvent]:
        """What is new. ``output`` goes out with the last event, once all have finished."""
        changed = []
        for seq, (text, ids, ended) in zip(self.sequences, self._given, strict=True):
            certain, known = seq.certain_length, len(seq.ids) - seq.num_prompt_tokens
            if not ended and (certain > text or known > ids or seq.finished):
                changed.append((seq, text, ids))
                self._given[seq.index] = certain, known, seq.finished
        for i, (seq, text, ids) in enumerate(changed):
            last = i == len(changed) - 1
            yield StreamEvent(
                self.request_id,
                seq.index,
                seq.text[text : seq.certain_length],
                seq.ids[seq.num_prompt_tokens + ids :],
                seq.finish_reason,
                output if last else None,
            )
