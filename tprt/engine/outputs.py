"""What a finished request looks like. Plain values that travel as JSON."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one id, of the raw logits.

    Args:
        rank: 1 for the likeliest id of the vocabulary.
        decoded_token: the text of the id alone.
    """

    logprob: float
    rank: int
    decoded_token: str


# The ids asked for, the drawn (or given) one first, then the likeliest ones in order.
TokenLogprobs = dict[int, Logprob]


@dataclass(frozen=True)
class CompletionOutput:
    """One completion.

    Args:
        index: which of the request's ``n`` completions.
        text: decoded without special pieces (unless asked), cut before a matched stop string.
        token_ids: all generated ids, the ending one included.
        finish_reason: "stop" (end-of-text, stop id or stop string), "length", "abort", or "error" when
            the logits became NaN or infinite (float16 overflows where bfloat16 does not).
        stop_reason: the stop string or stop id that matched; None for end-of-text and "length".
        logprobs: one entry per token of ``token_ids``; None where none were asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """All completions of one prompt, in the order of ``index``.

    Args:
        prompt_logprobs: None for the first token, then one entry per prompt token; None where none
            were asked for.
        num_cached_tokens: prompt tokens of the first completion that the prefix cache spared.
    """

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "RequestOutput":
        outputs = [
            CompletionOutput(**o | {"logprobs": _entries(o["logprobs"])}) for o in raw["outputs"]
        ]
        prompt_logprobs = _entries(raw["prompt_logprobs"])
        return cls(**raw | {"outputs": outputs, "prompt_logprobs": prompt_logprobs})


def _entries(raw: list[Any] | None) -> Any:
    """JSON has only texts as keys."""
    if raw is None:
        return None
    return [entry and {int(i): Logprob(**value) for i, value in entry.items()} for entry in raw]


@dataclass(frozen=True)
class StreamEvent:
    """What one step added to one completion.

    Args:
        request_id: place of its prompt in the call, or what ``add_request`` returned.
        text: new text; all texts of a completion joined are its final text.
        token_ids: new ids.
        finish_reason: None until the completion ends.
        output: the whole request, with the event that ends its last completion.
    """

    request_id: int
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    output: RequestOutput | None = None
