"""How one request is sampled. Field names and meanings are vLLM's. Knows no tensor and no tokenizer."""

import math
from dataclasses import dataclass, fields
from typing import Any

from tprt.errors import ConfigError

MIN_TEMPERATURE = 1e-5  # below it the division by it leaves float32's range: greedy
MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20
MAX_BIAS = 100.0
MAX_LISTED_IDS = 10_000  # of logit_bias and allowed_token_ids; they travel to every rank


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Options of one request, checked when made.

    Args:
        n: completions per prompt, each with noise of its own.
        max_tokens: most tokens to generate; None means up to the model's length.
        min_tokens: no end-of-text, stop id or stop string counts before this many tokens.
        temperature: 0 (or below 1e-5) is greedy; else logits are divided by it.
        top_p: keep the smallest set of ids whose probability reaches this (0 < top_p <= 1).
        top_k: keep the k likeliest ids; 0 or -1 keeps all.
        min_p: drop ids less likely than min_p times the likeliest.
        seed: makes the draw repeatable; None takes one from the engine's seed and arrival number.
        stop: strings that end the text; the text ends before the match.
        stop_token_ids: ids that end the text.
        ignore_eos: generate on past the end-of-text id.
        repetition_penalty: above 1 makes ids of prompt and completion less likely, below 1 more:
            positive logits are divided by it, negative ones multiplied.
        presence_penalty: subtracted from the logit of every id of the completion (-2 to 2).
        frequency_penalty: subtracted once per occurrence in the completion (-2 to 2).
        logit_bias: {id: value added to its logit}, -100 to 100; kept as a tuple of pairs.
        allowed_token_ids: the only ids that may be drawn; None allows all.
        bad_words: texts that must not be generated. A text of several tokens is kept out by forbidding
            its last one after the others.
        logprobs: log-probabilities of the drawn token and of this many likeliest ones at each step, of
            the raw logits; None for none.
        prompt_logprobs: the same for every prompt token but the first.
        include_stop_str_in_output: keep the matched stop string in the text.
        skip_special_tokens: leave end-of-text and other special pieces out of the text.

    Raises:
        ConfigError: a value has the wrong type or lies outside its limits; all are named at once.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in (
            "stop",
            "stop_token_ids",
            "bad_words",
        ):  # JSON and callers bring lists, a lone text, null
            value: object = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            if value is None or isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(value or ()))
        allowed: object = self.allowed_token_ids
        if isinstance(allowed, list):
            object.__setattr__(self, "allowed_token_ids", tuple(allowed))
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        wrong = [message for message in self._complaints() if message]
        if wrong:
            raise ConfigError("bad sampling parameters: " + "; ".join(wrong))

    def _complaints(self) -> list[str]:
        return [
            _integer("n", self.n, 1, MAX_N),
            "" if self.max_tokens is None else _integer("max_tokens", self.max_tokens, 1, 10**7),
            _integer("min_tokens", self.min_tokens, 0, self._most_tokens()),
            _number("temperature", self.temperature, 0.0, 100.0),
            _number("top_p", self.top_p, 0.0, 1.0, open_low=True),
            _integer("top_k", self.top_k, -1, 10**7),
            _number("min_p", self.min_p, 0.0, 1.0),
            "" if self.seed is None else _integer("seed", self.seed, -MAX_SEED, MAX_SEED),
            _strings("stop", self.stop),
            _ids("stop_token_ids", self.stop_token_ids),
            _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True),
            _number("presence_penalty", self.presence_penalty, -2.0, 2.0),
            _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            _bias(self.logit_bias),
            _allowed(self.allowed_token_ids),
            _strings("bad_words", self.bad_words),
            "" if self.logprobs is None else _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS),
            ""
            if self.prompt_logprobs is None
            else _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS),
            *(
                "" if isinstance(getattr(self, name), bool) else f"{name} must be true or false"
                for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
            ),
        ]

    def _most_tokens(self) -> int:
        return self.max_tokens if isinstance(self.max_tokens, int) else 10**7

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1

    @property
    def truncates(self) -> bool:
        """Whether the draw needs the whole row at once (top-k, top-p or min-p are on)."""
        return not self.greedy and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)

    @property
    def penalizes(self) -> bool:
        """Whether the draw depends on which tokens came before."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def needs_whole_row(self) -> bool:
        """Whether the draw needs all logits of a row in one place (see ``engine.sampler``)."""
        biased = bool(self.logit_bias) or self.allowed_token_ids is not None
        return self.truncates or self.penalizes or biased

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SamplingParams":
        """From JSON or YAML. Raises ConfigError for a name that is no field."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"unknown sampling parameter {unknown[0]!r}",
                hint=f"one of {', '.join(sorted(known))}",
            )
        return cls(**values)


def _integer(name: str, value: object, low: int, high: int) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        return f"{name} must be a whole number, not {value!r}"
    return (
        "" if low <= value <= high else f"{name} is {str(value)[:40]}, allowed are {low} to {high}"
    )


def _number(name: str, value: object, low: float, high: float, open_low: bool = False) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{name} must be a number, not {str(value)[:80]!r}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} must be a finite number, not {value!r}"
    if low <= value <= high and not (open_low and value == low):
        return ""
    shown = str(value)[:40]
    return f"{name} is {shown}, allowed are {'above ' if open_low else ''}{low} to {high}"


def _strings(name: str, value: object) -> str:
    if not isinstance(value, tuple) or not all(isinstance(s, str) and s for s in value):
        return f"{name} must be a list of non-empty strings, not {str(value)[:80]!r}"
    return (
        "" if len(value) <= MAX_STOP_STRINGS else f"{name} has more than {MAX_STOP_STRINGS} strings"
    )


def _ids(name: str, value: object) -> str:
    good = isinstance(value, tuple) and all(type(i) is int and i >= 0 for i in value)
    return "" if good else f"{name} must be a list of token ids, not {value!r}"


def _pairs(value: Any) -> Any:
    """A mapping from ids (in JSON, texts) as a tuple of pairs; anything else as it came."""
    if value is None:
        return ()
    if isinstance(value, dict):
        value = list(value.items())
    if not isinstance(value, list | tuple):
        return value
    pairs = [tuple(pair) if isinstance(pair, list) else pair for pair in value]
    return tuple(
        (int(pair[0]), pair[1])
        if isinstance(pair, tuple) and pair and isinstance(pair[0], str) and pair[0].isdecimal()
        else pair
        for pair in pairs
    )


def _bias(value: object) -> str:
    good = isinstance(value, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and type(pair[0]) is int and pair[0] >= 0
        for pair in value
    )
    if not good:
        return f"logit_bias must map token ids to numbers, not {str(value)[:80]!r}"
    assert isinstance(value, tuple)
    if len(value) > MAX_LISTED_IDS:
        return f"logit_bias has {len(value)} ids, allowed are {MAX_LISTED_IDS}"
    wrong = (_number(f"logit_bias of {i}", v, -MAX_BIAS, MAX_BIAS) for i, v in value)
    return next((message for message in wrong if message), "")


def _allowed(value: object) -> str:
    if value is None:
        return ""
    if value == ():
        return "allowed_token_ids is empty, so that nothing could be drawn"
    if isinstance(value, tuple) and len(value) > MAX_LISTED_IDS:
        return f"allowed_token_ids has {len(value)} ids, allowed are {MAX_LISTED_IDS}"
    return _ids("allowed_token_ids", value)
