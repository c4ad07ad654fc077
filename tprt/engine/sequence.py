"""One completion on its way: its ids, its blocks, and when it ends.

Rank 0 alone has sequences; the others are told what to compute. Knows tokens, text and parameters, no
model.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from tprt.engine.outputs import TokenLogprobs
from tprt.kernels.noise import NON_FINITE, sequence_key
from tprt.sampling_params import SamplingParams
from tprt.tokenizer import Detokenizer


@dataclass(frozen=True)
class Request:
    """A validated prompt; ``max_tokens`` is resolved and prompt + max_tokens fits the model.

    ``seed`` is always set: the user's, or one derived from the engine's seed and arrival number.
    ``bad_word_ids`` are the ways to spell ``params.bad_words``. With max_tokens 0 the prompt is only
    computed, for its log-probabilities or logits.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    bad_word_ids: tuple[list[int], ...] = ()


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One of a request's ``n`` completions.

    Args:
        arrival, index: which request, counted over the engine's life, and which of its completions.
        leader: the completion of the same request whose prompt this one shares; None for itself.
        ids: prompt and known completion.
        slot: its row of the per-sequence state; -1 while it waits.
        num_computed: tokens whose keys and values are cached once all planned steps have run.
        num_pending: tokens drawn in planned steps that have not been handed out yet.
        num_registered: full blocks that others may find by their keys.
        prompt_step, last_step: numbers of the steps that complete the prompt, and of the last one
            this sequence is part of.
        restricted: some ids are forbidden for a time; needs_host: which, depends on earlier ids.
        skips_prefix_cache: every position has to be computed.
        wants_logits: logits of all positions are collected in ``logits``.
        logprobs, prompt_logprobs: one entry per completion token, and per prompt token but the first.
        num_cached_tokens: tokens that were not computed because their blocks were known.
    """

    request: Request
    arrival: int = 0
    index: int = 0
    leader: "Sequence | None" = None
    detokenizer: Detokenizer | None = None
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    slot: int = -1
    num_computed: int = 0
    num_pending: int = 0
    num_registered: int = 0
    num_cached_tokens: int = 0
    prompt_step: int | None = None
    last_step: int = -1
    wants_logits: bool = False
    logits: list[torch.Tensor] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def __post_init__(self) -> None:
        self.seed_key = sequence_key(self.request.seed, self.index)
        self.ids = list(self.request.prompt_token_ids)
        self.num_prompt_tokens, self.max_tokens = len(self.ids), self.request.max_tokens
        params = self.request.params
        self._longest_stop = max(map(len, params.stop), default=0)
        self.restricted = params.min_tokens > 0 or bool(self.request.bad_word_ids)
        self.needs_host = any(len(ids) > 1 for ids in self.request.bad_word_ids)
        self.skips_prefix_cache = params.prompt_logprobs is not None or self.wants_logits
        self.most_tokens = self.num_prompt_tokens + self.max_tokens

    @property
    def token_ids(self) -> list[int]:
        """The known completion."""
        return self.ids[self.num_prompt_tokens :]

    @property
    def num_tokens(self) -> int:
        return len(self.ids) + self.num_pending

    @property
    def complete(self) -> bool:
        """Whether as many tokens have been drawn as it may have; the last may still be pending."""
        return len(self.ids) + self.num_pending == self.most_tokens and self.max_tokens > 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def append(self, token_id: int, end_ids: Collection[int]) -> bool:
        """Take the next token; True when the sequence ends. Needs the text side (rank 0)."""
        assert self.detokenizer is not None, "only rank 0 decides where a sequence ends"
        if token_id == NON_FINITE:
            self.end_text("error")
            return True
        self.ids.append(token_id)
        params, before = self.request.params, len(self.text)
        count = len(self.ids) - self.num_prompt_tokens
        if token_id in end_ids and not params.ignore_eos:
            self.finish_reason = "stop"
        elif token_id in params.stop_token_ids:
            self.finish_reason, self.stop_reason = "stop", token_id
        if self.finish_reason is None or params.include_stop_str_in_output:
            self.text += self.detokenizer.push([token_id])
        last = self.finish_reason is not None or count == self.max_tokens
        if last:
            self.text += self.detokenizer.finish()
        if count > params.min_tokens:
            self._match_stop_strings(before)
        if last and self.finish_reason is None:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def end_text(self, reason: str) -> None:
        """End here, for a reason that is no token."""
        if self.detokenizer is not None:
            self.text += self.detokenizer.finish()
        self.finish_reason = reason

    @property
    def certain_length(self) -> int:
        """Characters of ``text`` that no later token can take back.

        An end of the text that may grow into a stop string is not certain yet.
        """
        if self.finished:
            return len(self.text)
        for length in range(min(self._longest_stop - 1, len(self.text)), 0, -1):
            tail = self.text[-length:]
            if any(stop.startswith(tail) for stop in self.request.params.stop):
                return len(self.text) - length
        return len(self.text)

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
