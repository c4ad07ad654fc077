"""How one request is sampled. Field names and meanings are vLLM's. Knows no tensor and no tokenizer."""

import math
from dataclasses import dataclass, fields
from typing import Any

from tprt.errors import ConfigError

MIN_TEMPERATURE = 1e-5  # below it the division by it leaves float32's range: greedy
MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_SEED = 2**63 - 1


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
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):  # JSON and callers bring lists, a lone text, null
            value: object = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            if value is None or isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(value or ()))
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
        return f"{name} must be a list of non-empty strings, not {value!r}"
    return (
        "" if len(value) <= MAX_STOP_STRINGS else f"{name} has more than {MAX_STOP_STRINGS} strings"
    )


def _ids(name: str, value: object) -> str:
    good = isinstance(value, tuple) and all(type(i) is int and i >= 0 for i in value)
    return "" if good else f"{name} must be a list of token ids, not {value!r}"
