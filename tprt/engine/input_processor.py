"""From what a user passes to a validated ``Request``: text to ids, limits, seeds, bad words.

Runs on rank 0 before anything is scheduled, so that what can never run is refused with its numbers.
Knows a tokenizer and limits: no blocks, no other rank.
"""

from collections.abc import Sequence
from typing import Any

from tprt.distributed.vocabulary import Vocabulary, show_ranges
from tprt.engine.sequence import Request
from tprt.errors import ConfigError
from tprt.kernels.noise import arrival_seed
from tprt.log import get_logger, warn_once
from tprt.sampling_params import SamplingParams
from tprt.tokenizer import Tokenizer

logger = get_logger(__name__)

Prompt = str | dict[str, Any]


class InputProcessor:
    """Args:
    num_valid_ids: ids from here on do not exist.
    max_request_len: most tokens of prompt and completion that model and cache can hold.
    seed: the engine's; requests without a seed get theirs from it and their arrival number.
    vocabulary: which ids have rows; None means all.
    trained_len: tokens of the longest prompt that the model has seen in training; None if unknown.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_valid_ids: int,
        max_request_len: int,
        seed: int,
        vocabulary: Vocabulary | None = None,
        trained_len: int | None = None,
    ) -> None:
        self.tokenizer, self.num_valid_ids = tokenizer, num_valid_ids
        self.vocabulary = vocabulary or Vocabulary(num_valid_ids)
        self.max_request_len, self.seed = max_request_len, seed
        self.trained_len = trained_len

    def request(self, prompt: Prompt, params: SamplingParams, arrival: int) -> Request:
        """A request to generate. Raises ConfigError (see ``LLM.make_request``)."""
        ids = self._with_rows(self.prompt_ids(prompt))
        if not ids:
            raise ConfigError("the prompt has no tokens", hint="a text, or bos_policy=bos")
        limit = self.max_request_len
        room = limit - len(ids)
        max_tokens = room if params.max_tokens is None else params.max_tokens
        if room < 1 or max_tokens > room:
            wanted = "" if params.max_tokens is None else f" and max_tokens {params.max_tokens}"
            raise ConfigError(
                f"{len(ids)} prompt tokens{wanted} are more than the {limit} that fit",
                hint="a shorter prompt, fewer max_tokens, or a larger engine.max_model_len or KV cache",
            )
        self._warn_past_training(ids)
        self.check_ids([i for i, _ in params.logit_bias])
        self.check_ids([*params.stop_token_ids, *(params.allowed_token_ids or ())])
        bad_words = self._spellings(params.bad_words)
        self._check_allowed(params, bad_words)
        seed = params.seed if params.seed is not None else arrival_seed(self.seed, arrival)
        return Request(ids, params, max_tokens, seed, bad_words)

    def _check_allowed(self, params: SamplingParams, bad_words: tuple[list[int], ...]) -> None:
        """Raises ConfigError when every id that is allowed is forbidden or was trimmed away."""
        self._check_some_kept("allowed_token_ids", params.allowed_token_ids or ())
        self._check_some_kept("logit_bias", [i for i, _ in params.logit_bias])
        banned = {ids[0] for ids in bad_words if len(ids) == 1}
        gone = self.vocabulary.removed_of(params.allowed_token_ids or ())
        banned.update(gone)
        if params.min_tokens > 0:
            banned |= {*self.tokenizer.end_ids, *params.stop_token_ids}
        if params.allowed_token_ids is not None and banned.issuperset(params.allowed_token_ids):
            options = (
                "min_tokens, bad_words and model.trim_vocab" if gone else "min_tokens and bad_words"
            )
            raise ConfigError(
                f"{options} forbid every one of the {len(params.allowed_token_ids)} allowed_token_ids",
                hint="allow another id, or drop one of these options",
            )

    def _check_some_kept(self, option: str, ids: Sequence[int]) -> None:
        if ids and len(self.vocabulary.removed_of(ids)) == len(ids):
            raise ConfigError(
                f"{option} names only ids that model.trim_vocab removes, {ids[0]} first: "
                f"{show_ranges(self.vocabulary.removed)} have no rows",
                hint="another id, or model.trim_vocab=off",
            )

    def _with_rows(self, ids: list[int]) -> list[int]:
        """``ids``. Raises ConfigError for one that has no row in the embedding."""
        if gone := self.vocabulary.removed_of(ids):
            raise ConfigError(
                f"token id {gone[0]} was trimmed away, as model.trim_vocab says: "
                f"{show_ranges(self.vocabulary.removed)} have no rows",
                hint="a prompt without it, or model.trim_vocab=off",
            )
        return ids

    def given(self, token_ids: Any, prompt_logprobs: int | None = None) -> Request:
        """A request that only computes its ids. Raises ConfigError when they do not fit."""
        ids = self._with_rows(self.check_ids(token_ids))
        if not 1 <= len(ids) <= self.max_request_len:
            raise ConfigError(
                f"{len(ids)} tokens were given, allowed are 1 to {self.max_request_len}",
                hint="a shorter text, or a larger engine.max_model_len or kv_cache_memory",
            )
        self._warn_past_training(ids)
        return Request(ids, SamplingParams(prompt_logprobs=prompt_logprobs), 0, 0)

    def _warn_past_training(self, ids: list[int]) -> None:
        # Without the length of this one: a job may have thousands, which are to give one warning.
        if self.trained_len is not None and len(ids) > self.trained_len:
            warn_once(
                logger,
                f"prompts of more than {self.trained_len} tokens are longer than what the model was "
                "trained on; they are answered, how well is not known",
            )

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._text_ids(prompt)
        if isinstance(prompt, dict) and len(prompt) == 1:
            (kind, value), *_ = prompt.items()
            if kind == "prompt" and isinstance(value, str):
                return self._text_ids(value)
            if kind == "messages":
                return self.tokenizer.encode_chat(value)
            if kind == "prompt_token_ids":
                return self.check_ids(value)
        raise ConfigError(
            f"a prompt must be a text or a mapping, not {str(prompt)[:80]!r}",
            hint='a text, or {"prompt": ...}, {"prompt_token_ids": ...} or {"messages": ...}',
        )

    def _text_ids(self, text: str) -> list[int]:
        found = [marker for marker in self.tokenizer.turn_markers if marker in text]
        if found:
            warn_once(
                logger,
                f"a prompt holds {found[0]}, which is read as any other text and begins no turn; what "
                'the chat format is for goes into "messages"',
            )
        return self.tokenizer.encode(text)

    def check_ids(self, ids: Any) -> list[int]:
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(ids, list | tuple) or not all(type(i) is int for i in ids):
            raise ConfigError(
                f"token ids must be a list of whole numbers, not {str(ids)[:80]!r}",
                hint="for example [5, 6, 7]",
            )
        wrong = [i for i in ids if not 0 <= i < self.num_valid_ids]
        if wrong:
            raise ConfigError(
                f"token id {wrong[0]} is outside the vocabulary of {self.num_valid_ids}",
                hint="ids of this model's own tokenizer",
            )
        return list(ids)

    def _spellings(self, words: Sequence[str]) -> tuple[list[int], ...]:
        """Each word as it begins a text and as it goes on after a letter, without repeats."""
        found: list[list[int]] = []
        # Behind a newline sentencepiece puts no blank in front.
        newline = self.tokenizer.encode("\n", add_bos=False) if words else []
        for word in words:
            begun = self.tokenizer.encode(word.lstrip(" "), add_bos=False)
            inner = self.tokenizer.encode("\n" + word.lstrip(" "), add_bos=False)
            found.append(begun)
            if inner[: len(newline)] == newline:
                found.append(inner[len(newline) :])
            if not any(found[-2:]):
                raise ConfigError(
                    f"bad_words has {word!r}, which no token stands for",
                    hint="a word, or leave it out",
                )
        unique = {tuple(ids): ids for ids in found if ids}
        return tuple(unique.values())
