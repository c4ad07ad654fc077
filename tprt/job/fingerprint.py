"""What the texts of a job depend on: a journal goes on only where all of it is the same.

Plain JSON values, so that a difference can be named. Knows no files and no model.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from tprt.job.input_file import InputFacts, Shard
from tprt.sampling_params import SamplingParams

MAX_VALUE_LENGTH = 200  # as JSON; of longer values only the digest is kept
_ABSENT = object()


def make_fingerprint(
    *,
    input: InputFacts,
    model: str,
    tokenizer: str,
    sampling: SamplingParams,
    job_seed: int,
    version: str,
    settings: Mapping[str, Any],
    shard: Shard | None = None,
) -> dict[str, Any]:
    """The fingerprint of a job.

    The number of ranks and replicas, sizes of batches, memory and the choice of kernels are left out on
    purpose: a job may go on with other ranks, on another machine. In float32 the texts are the same; in
    bfloat16 they may differ where two logits are nearly equal.

    Args:
        model: ``CheckpointReader.fingerprint()``.
        tokenizer: ``Tokenizer.sha256``.
        sampling: defaults of records that say nothing.
        job_seed: of records that bring no seed.
        version: of this program.
        settings: others that change texts, as they are in effect and not as they were asked for: dtype,
            rotary_precision, bos_policy, trim_vocab, max_model_len. JSON values.
        shard: None for a job over all records.
    """
    known = {
        "sha256": input.sha256,
        "size": input.size,
        "lines": input.lines,
        "records": input.records,
    }
    whole = {
        "input": known,
        "model": model,
        "tokenizer": tokenizer,
        "sampling": asdict(sampling),
        "job_seed": job_seed,
        "shard": None if shard is None else str(shard),
        "settings": dict(settings),
        "version": version,
    }
    plain: dict[str, Any] = _short(json.loads(json.dumps(whole)))
    return plain


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], then: str = "then", now: str = "now"
) -> list[str]:
    """A line for each value that differs, as ``sampling.temperature: 0.0 then, 0.7 now``.

    Args:
        old, new: fingerprints, perhaps of other versions of this program.
        then, now: what the two are called.
    """
    olds, news = dict(_leaves(old)), dict(_leaves(new))
    pairs = [(key, olds.get(key, _ABSENT), news.get(key, _ABSENT)) for key in olds | news]
    return [f"{key}: {_shown(a)} {then}, {_shown(b)} {now}" for key, a, b in pairs if a != b]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    text = json.dumps(value)
    if len(text) <= MAX_VALUE_LENGTH:
        return value
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
