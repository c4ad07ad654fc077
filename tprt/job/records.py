"""Lines of a batch file: what comes in, what goes out.

One JSON object per line, in the project's own form or as an OpenAI batch line. A bad line becomes a
record with an error and never stops a job. Knows no files, no model and no tensors.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from tprt.engine.outputs import RequestOutput, TokenLogprobs
from tprt.errors import ConfigError, TprtError
from tprt.sampling_params import SamplingParams

MAX_LINE_BYTES = 32 * 2**20
MAX_ERROR_LENGTH = 2000  # an error may quote a line, and a line may be long
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
OWN_KEYS = {"id", "prompt", "prompt_token_ids", "messages", "params"}
PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
OPENAI_URLS = {"/v1/completions": "prompt", "/v1/chat/completions": "messages"}
# Fields of an OpenAI body that change nothing here.
OPENAI_IGNORED = {"model", "user", "metadata", "store"}
# Fields that are not implemented, at the value at which they change nothing.
OPENAI_NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0, "echo": False, "logprobs": False, "best_of": 1,
    "logit_bias": {}, "top_logprobs": 0, "suffix": "", "stream": False,
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One input line.

    Args:
        line: 1-based number in the input.
        id: the user's, or the line number as text.
        prompt: what ``LLM.make_request`` takes; None when ``error`` is set.
        openai_url: set for OpenAI batch lines, which are answered in their own form.
    """

    line: int
    id: str
    prompt: dict[str, Any] | None
    params: SamplingParams
    error: str | None = None
    openai_url: str | None = None

    def failed(self, error: str) -> "Record":
        if len(error) > MAX_ERROR_LENGTH:
            error = f"{error[:MAX_ERROR_LENGTH]} ... ({len(error)} characters)"
        return replace(self, error=error)


def record_seed(job_seed: int, record_id: str) -> int:
    """63-bit seed of a record that brings none: the same whenever and wherever it runs."""
    digest = hashlib.sha256(f"{job_seed}\0{record_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def parse_record(raw: bytes, number: int, defaults: SamplingParams, job_seed: int) -> Record:
    """The record of line ``number``, or what is wrong with it. Raises nothing."""
    record = Record(number, str(number), None, defaults)
    if len(raw) > MAX_LINE_BYTES:
        return long_record(len(raw), number, defaults)
    try:
        value = _json_object(raw)
        key = _id_key(value)
        record = replace(record, id=_id(value, number))
        if key == "custom_id":
            record = replace(record, openai_url=str(value.get("url", "/v1/completions")))
        prompt, own = _openai_body(value) if record.openai_url else _own_fields(value)
        seed = own.get("seed", defaults.seed)
        merged = vars(defaults) | own
        merged["seed"] = record_seed(job_seed, record.id) if seed is None else seed
        params = SamplingParams.from_dict(merged)
        return replace(record, prompt=prompt, params=params)
    except TprtError as error:
        return record.failed(error.one_line)
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
        return record.failed(f"a parameter cannot be read: {error}")


def long_record(size: int, number: int, defaults: SamplingParams) -> Record:
    """The record of a line of ``size`` bytes, which is too long to be read."""
    error = f"the line has {size} bytes, allowed are {MAX_LINE_BYTES}"
    return Record(number, str(number), None, defaults).failed(error)


def record_id(raw: bytes, number: int) -> str | None:
    """The id that ``parse_record`` gives line ``number``, for a fraction of its work.

    None for a line that cannot be read: its number only stands in for an id.
    """
    try:
        return _id(_json_object(raw), number)
    except (ConfigError, RecursionError):  # what could just be parsed may be too deep to be quoted
        return None


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        message = f"the line is not UTF-8: {error.reason} at byte {error.start}"
        raise ConfigError(message) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the line is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"the line must hold a JSON object, not {type(value).__name__}")
    return value


def _id_key(value: dict[str, Any]) -> str:
    return "custom_id" if "custom_id" in value else "id"


def _id(value: dict[str, Any], number: int) -> str:
    key = _id_key(value)
    given = value.get(key, number)
    if not isinstance(given, str | int) or isinstance(given, bool):
        raise ConfigError(f"{key} must be a text or a whole number, not {given!r}")
    return str(given)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _own_fields(value: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    unknown = sorted(set(value) - OWN_KEYS)
    if unknown:
        raise ConfigError(f"unknown key {unknown[0]!r}; known are {', '.join(sorted(OWN_KEYS))}")
    params = value.get("params", {})
    if not isinstance(params, dict):
        raise ConfigError(f"params must be an object, not {params!r}")
    return _one_prompt(value), params


def _one_prompt(value: dict[str, Any]) -> dict[str, Any]:
    given = [key for key in PROMPT_KEYS if value.get(key) is not None]
    if len(given) != 1:
        raise ConfigError(f"exactly one of {', '.join(PROMPT_KEYS)} is needed, found {len(given)}")
    return {given[0]: value[given[0]]}


def _openai_body(value: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    url, body = value.get("url", "/v1/completions"), value.get("body")
    if not isinstance(url, str) or url not in OPENAI_URLS:
        raise ConfigError(f"url is {url!r}; known are {', '.join(OPENAI_URLS)}")
    if value.get("method", "POST") != "POST":
        raise ConfigError(f"method is {value['method']!r}; only POST is known")
    if not isinstance(body, dict):
        raise ConfigError("an OpenAI batch line needs an object 'body'")
    kind = OPENAI_URLS[url]
    if kind not in body:
        raise ConfigError(f"body has no {kind!r}")
    prompt = body[kind]
    if kind == "prompt" and isinstance(prompt, list):
        kind = "prompt_token_ids"  # a list is token ids here; many prompts are many lines
    given = {k: v for k, v in body.items() if v is not None and k not in OPENAI_IGNORED}
    params = {
        k: v
        for k, v in given.items()
        if k != OPENAI_URLS[url] and not (k in OPENAI_NEUTRAL and v == OPENAI_NEUTRAL[k])
    }
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        if params.get(name):
            raise ConfigError(f"{name} is not known in OpenAI lines; the native form has logprobs")
    if "max_completion_tokens" in params:
        params.setdefault("max_tokens", params.pop("max_completion_tokens"))
    return {kind: prompt}, params


def result_line(record: Record, output: RequestOutput | None) -> dict[str, Any]:
    """The output line of a record: its completions, or its error."""
    if record.openai_url:
        return _openai_result(record, output)
    if output is None:
        error = {"message": record.error, "line": record.line}
        return {"id": record.id, "prompt_tokens": 0, "outputs": [], "error": error}
    completions = []
    for o in output.outputs:
        completion: dict[str, Any] = {
            "index": o.index,
            "text": o.text,
            "finish_reason": o.finish_reason,
            "tokens": len(o.token_ids),
        }
        if o.logprobs is not None:
            completion["logprobs"] = [_logprobs(entry) for entry in o.logprobs]
        completions.append(completion)
    line: dict[str, Any] = {
        "id": record.id,
        "prompt_tokens": len(output.prompt_token_ids),
        "outputs": completions,
        "error": None,
    }
    if output.prompt_logprobs is not None:
        line["prompt_logprobs"] = [entry and _logprobs(entry) for entry in output.prompt_logprobs]
    return line


def _logprobs(entry: TokenLogprobs) -> dict[str, Any]:
    return {str(token): asdict(value) for token, value in entry.items()}


def _openai_result(record: Record, output: RequestOutput | None) -> dict[str, Any]:
    line: dict[str, Any] = {"id": f"batch_req_{record.line}", "custom_id": record.id}
    if output is None:
        error = {
            "message": record.error,
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        }
        response = {"status_code": 400, "request_id": line["id"], "body": {"error": error}}
        return line | {"response": response, "error": None}
    chat = record.openai_url == "/v1/chat/completions"
    choices = []
    for o in output.outputs:
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": o.text}} if chat else {"text": o.text}
        )
        choices.append(
            {"index": o.index, **said, "finish_reason": o.finish_reason, "logprobs": None}
        )
    prompt_tokens = len(output.prompt_token_ids)
    completion_tokens = sum(len(o.token_ids) for o in output.outputs)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{record.line}",
        "object": "chat.completion" if chat else "text_completion",
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    response = {"status_code": 200, "request_id": line["id"], "body": body}
    return line | {"response": response, "error": None}
