"""What a finished request looks like. Plain values that travel as JSON."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CompletionOutput:
    """One completion.

    Args:
        index: which of the request's ``n`` completions.
        text: decoded without special pieces (unless asked), cut before a matched stop string.
        token_ids: all generated ids, the ending one included.
        finish_reason: "stop" (end-of-text, stop id or stop string), "length", or "error" when the
            logits became NaN or infinite (float16 overflows where bfloat16 does not).
        stop_reason: the stop string or stop id that matched; None for end-of-text and "length".
        logprobs: None; not computed yet.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: None = None


@dataclass(frozen=True)
class RequestOutput:
    """All completions of one prompt, in the order of ``index``."""

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "RequestOutput":
        return cls(raw["prompt_token_ids"], [CompletionOutput(**o) for o in raw["outputs"]])
