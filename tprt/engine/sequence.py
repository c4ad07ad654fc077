"""One completion on its way: its ids, its blocks, and when it ends.

Every rank holds the same sequences. Text, and with it stop strings, exist on rank 0 only: the others
are told. Knows tokens and parameters, no tensors.
"""

from dataclasses import dataclass, field

from tprt.engine.noise import NON_FINITE, sequence_key
from tprt.sampling_params import SamplingParams
from tprt.tokenizer import Detokenizer


@dataclass(frozen=True)
class Request:
    """A validated prompt; ``max_tokens`` is resolved and prompt + max_tokens fits the model.

    ``seed`` is always set: the user's, or one derived from the engine's seed and arrival number.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int


@dataclass(eq=False)
class Sequence:
    """One of a request's ``n`` completions.

    Args:
        request_index, index: which request of the call, which of its completions.
        num_computed: tokens of prompt and completion whose keys and values are cached.
    """

    request: Request
    request_index: int
    index: int
    detokenizer: Detokenizer | None = None
    token_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def __post_init__(self) -> None:
        self.seed_key = sequence_key(self.request.seed, self.index)

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.token_ids)

    @property
    def most_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + self.request.max_tokens

    def token(self, position: int) -> int:
        prompt = self.request.prompt_token_ids
        return (
            prompt[position] if position < len(prompt) else self.token_ids[position - len(prompt)]
        )

    def append(self, token_id: int, eod_id: int) -> bool:
        """Take the next token; True when the sequence ends. Needs the text side (rank 0)."""
        assert self.detokenizer is not None, "only rank 0 decides where a sequence ends"
        if token_id == NON_FINITE:
            self.text += self.detokenizer.finish()
            self.finish_reason = "error"
            return True
        self.token_ids.append(token_id)
        params, count, before = self.request.params, len(self.token_ids), len(self.text)
        if token_id == eod_id and not params.ignore_eos:
            self.finish_reason = "stop"
        elif token_id in params.stop_token_ids:
            self.finish_reason, self.stop_reason = "stop", token_id
        if self.finish_reason is None or params.include_stop_str_in_output:
            self.text += self.detokenizer.push([token_id])
        last = self.finish_reason is not None or count == self.request.max_tokens
        if last:
            self.text += self.detokenizer.finish()
        if count > params.min_tokens:
            self._match_stop_strings(before)
        if last and self.finish_reason is None:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def _match_stop_strings(self, before: int) -> None:
        """Cut the text at the earliest match that ends past ``before``; of two, the longer one."""
        params = self.request.params
        found = [
            (self.text.find(stop, max(0, before - len(stop) + 1)), -len(stop), stop)
            for stop in params.stop
        ]
        found = [match for match in found if match[0] >= 0]
        if not found:
            return
        start, _, stop = min(found)
        self.text = self.text[: start + len(stop) if params.include_stop_str_in_output else start]
        self.finish_reason, self.stop_reason = "stop", stop
