"""Settings of a run: one strict YAML file, the environment, ``--set`` and flags, checked at once.

Later sources win: defaults of the dataclasses, the YAML file, ``TPRT_SECTION__KEY`` in the
environment, ``--set section.key=value``, explicit flags. All mistakes are reported together, each
with where it stands, what is wrong and the nearest valid key. Relative paths are relative to the
current directory, not to the YAML file.

This file knows the names of settings and nothing of YAML's syntax, models, ranks or engines; it
imports no torch. Kinds of values that several settings share are in ``setting_types``.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from tprt.cli.setting_types import (
    Dtype,
    ExpandedPath,
    Memory,
    Seconds,
    Seed,
    Shard,
    Share,
    Size,
)
from tprt.cli.strict_yaml import Entry, Mistake, Origin, read_yaml_file, read_yaml_value
from tprt.config import DTYPE_ALIASES, DTYPES, EngineConfig, TrimVocab, parse_trim_vocab
from tprt.errors import ConfigError
from tprt.sampling_params import SamplingParams

MAX_RANKS, MAX_RESTARTS = 4096, 100
SHOWN_MISTAKES = 20
ENV_PREFIX = "TPRT_"

_DEFAULTS = EngineConfig()


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=False
    )


class ModelSettings(_Section):
    """Which checkpoint, and how it is read. ``path`` is empty where no model was named."""

    path: ExpandedPath = ""
    tokenizer: ExpandedPath | None = None
    dtype: Dtype = "bfloat16"
    rotary_precision: Literal["auto", "bf16", "fp32"] = "auto"
    window_keys: Annotated[int, Field(ge=2)] | None = None
    verify: Literal["sizes", "full"] = "sizes"
    bos_policy: Literal["auto", "none", "bos"] = "auto"
    trim_vocab: Annotated[TrimVocab, PlainValidator(parse_trim_vocab)] = "off"
    device: Literal["auto", "cpu", "cuda"] = "auto"


class ParallelSettings(_Section):
    """``tensor``: ranks that share a model; None is the number of ranks launched, over ``data``.

    ``data``: replicas of the model, each of ``tensor`` ranks, which share the records of a job.
    """

    tensor: Annotated[int, Field(ge=1, le=MAX_RANKS)] | None = None
    data: Annotated[int, Field(ge=1, le=MAX_RANKS)] = 1

    @property
    def world_size(self) -> int | None:
        """Ranks of all replicas; None where ``tensor`` follows from what was launched."""
        return None if self.tensor is None else self.tensor * self.data


class EngineSettings(_Section):
    """The fields of ``EngineConfig`` except ``dtype``, which is the model's."""

    max_num_seqs: Size = _DEFAULTS.max_num_seqs
    max_num_batched_tokens: Size = _DEFAULTS.max_num_batched_tokens
    max_model_len: Size | None = _DEFAULTS.max_model_len
    block_size: Size = _DEFAULTS.block_size
    kv_cache_memory: Memory | None = _DEFAULTS.kv_cache_memory
    gpu_memory_utilization: Share = _DEFAULTS.gpu_memory_utilization
    enable_prefix_caching: bool = _DEFAULTS.enable_prefix_caching
    look_ahead: Annotated[int, Field(ge=0, le=1)] = _DEFAULTS.look_ahead
    record_path: ExpandedPath | None = _DEFAULTS.record_path
    kernels: Literal["auto", "reference", "triton"] = "auto"
    sparse_rows: Annotated[int, Field(ge=0)] | None = _DEFAULTS.sparse_rows
    fuse_kernels: bool = _DEFAULTS.fuse_kernels
    enforce_eager: bool = _DEFAULTS.enforce_eager
    one_shot_all_reduce: bool = _DEFAULTS.one_shot_all_reduce
    step_timeout: Seconds = _DEFAULTS.step_timeout
    load_timeout: Seconds = _DEFAULTS.load_timeout
    seed: Seed = _DEFAULTS.seed


class JobSettings(_Section):
    """A batch job.

    ``shard``: ``i/N``, the part of the input that this job answers; None is all of it. ``seed``: of
    records that bring none; None is ``engine.seed``. ``log_format``: of the progress on stderr.
    ``max_restarts``: how often the launcher starts the ranks again after a failure; the job resumes.
    """

    input: ExpandedPath | None = None
    output: ExpandedPath | None = None
    shard: Shard | None = None
    seed: Seed | None = None
    log_format: Literal["text", "json"] = "text"
    max_restarts: Annotated[int, Field(ge=0, le=MAX_RESTARTS)] = 0


class ServerSettings(_Section):
    """Empty: this version has no server."""


class Settings(_Section):
    """All sections, checked. Made by ``load_settings``."""

    model: ModelSettings = ModelSettings()
    parallel: ParallelSettings = ParallelSettings()
    engine: EngineSettings = EngineSettings()
    sampling: SamplingParams = SamplingParams()
    job: JobSettings = JobSettings()
    server: ServerSettings = ServerSettings()

    def engine_config(self) -> EngineConfig:
        return EngineConfig(dtype=self.model.dtype, **self.engine.model_dump())

    def sampling_params(self) -> SamplingParams:
        """What a request gets that says nothing of its own."""
        return self.sampling

    @property
    def job_seed(self) -> int:
        """What the seeds of records come from that bring none."""
        return self.engine.seed if self.job.seed is None else self.job.seed

    def plain(self) -> dict[str, dict[str, Any]]:
        """Section -> key -> value as JSON and YAML have it, in the order of their definition.

        Read as a settings file it gives the same settings.
        """
        sections = self.model_dump()
        return {name: _listed(keys) for name, keys in sections.items() if keys}

    def digest(self) -> str:
        """12 hex digits of a SHA-256 over all values: the same for equal ones, whatever their source."""
        text = json.dumps(_canonical(self.plain()), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _listed(value: Any) -> Any:
    """With lists where there are tuples."""
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _canonical(value: Any) -> Any:
    """1.0 and 1 are one number; all else stays."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class ResolvedSettings:
    """Settings, and where those that somebody gave were given.

    Args:
        settings: checked.
        origins: ``section.key`` -> file with line, variable, ``--set`` or flag. A key that is not here
            has its default.
    """

    settings: Settings
    origins: Mapping[str, Origin]


SECTIONS: dict[str, type[_Section]] = {
    "model": ModelSettings,
    "parallel": ParallelSettings,
    "engine": EngineSettings,
    "job": JobSettings,
    "server": ServerSettings,
}
KEYS = {name: frozenset(section.model_fields) for name, section in SECTIONS.items()}
KEYS["sampling"] = frozenset(f.name for f in fields(SamplingParams))
SHOWN_SECTIONS = sorted(name for name, keys in KEYS.items() if keys)
PATH_KEYS = {"model.path", "model.tokenizer", "engine.record_path", "job.input", "job.output"}


def load_settings(
    config_path: str | None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings of ``resolve_settings``, for whom their origins are of no interest."""
    return resolve_settings(config_path, overrides, flags).settings


def resolve_settings(
    config_path: str | None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> ResolvedSettings:
    """Settings from all sources, later ones winning, with the source of each.

    Args:
        config_path: a YAML file, or None.
        overrides: ``section.key=value`` each, the value read as YAML (``[a, b]`` is a list).
        flags: dotted key to the value of an explicit flag; None means that it was not given.

    Raises:
        ConfigError: naming every mistake found, with file and line, variable or flag.
    """
    mistakes: list[Mistake] = []
    values: dict[str, Entry] = {}
    if config_path is not None:
        values |= _from_file(config_path, mistakes)
    values |= _from_environment(os.environ, mistakes)
    values |= _from_overrides(overrides, mistakes)
    values |= {
        key: Entry(value, Origin(f"flag for {key}"))
        for key, value in (flags or {}).items()
        if value is not None and _known(key, Origin(f"flag for {key}"), mistakes)
    }
    settings = _validate(values, mistakes)
    if not mistakes:
        _check_combinations(settings, values, mistakes)
    if mistakes:
        raise _report(mistakes, config_path)
    return ResolvedSettings(settings, {key: entry.origin for key, entry in values.items()})


# ---------------------------------------------------------------- sources


def _from_file(path: str, mistakes: list[Mistake]) -> dict[str, Entry]:
    document = read_yaml_file(path, mistakes)
    if document.value is None:
        return {}
    if not isinstance(document.value, dict):
        raise ConfigError(
            f"the settings file holds {document.plain()!r:.60} where sections are due",
            where=str(document.origin),
            hint="lines such as 'model:' with indented 'path: ...' below",
        )
    values: dict[str, Entry] = {}
    for section, entry in document.value.items():
        if section not in KEYS:
            _known(section, entry.origin, mistakes)
        elif isinstance(entry.value, dict):
            for name, item in entry.value.items():
                key = f"{section}.{name}"
                if _known(key, item.origin, mistakes):
                    values[key] = Entry(item.plain(), item.origin)
        elif entry.value is not None:
            shown = _shown(entry.plain())
            message = f"{section}: a section holds keys with values, not {shown}"
            mistakes.append(Mistake(entry.origin, message))
    return values


def _from_environment(environ: Mapping[str, str], mistakes: list[Mistake]) -> dict[str, Entry]:
    values = {}
    for name in sorted(environ):
        # Variables without "__" are not settings (TPRT_DEBUG and the like).
        if not name.startswith(ENV_PREFIX) or "__" not in name:
            continue
        key = name.removeprefix(ENV_PREFIX).lower().replace("__", ".", 1)
        origin = Origin(f"environment {name}")
        if _known(key, origin, mistakes):
            values[key] = Entry(_parse_text(key, environ[name]), origin)
    return values


def _from_overrides(overrides: Iterable[str], mistakes: list[Mistake]) -> dict[str, Entry]:
    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        origin = Origin(f"--set {key}")
        if not equals:
            message = f"{_shown(override)} has no '='; the form is section.key=value"
            mistakes.append(Mistake(Origin("--set"), message))
        elif _known(key, origin, mistakes):
            values[key] = Entry(_parse_text(key, text), origin)
    return values


def _parse_text(key: str, text: str) -> Any:
    if key in PATH_KEYS:  # a folder may be called 2024 or true
        return text or None
    return read_yaml_value(text)


def _known(key: str, origin: Origin, mistakes: list[Mistake]) -> bool:
    """Whether ``key`` is a setting; else the mistake is noted with the nearest valid key."""
    section, dot, name = key.partition(".")
    if dot and name in KEYS.get(section, ()):
        return True
    if section == "server" and dot:
        message = f"{key}: this version has no server, so the section must be empty"
        mistakes.append(Mistake(origin, message))
        return False
    everywhere = [f"{s}.{n}" for s in KEYS for n in sorted(KEYS[s])]
    last = name or section
    hits = [full for full in everywhere if full.endswith(f".{last}")]
    if not hits and section in KEYS:
        hits = [f"{section}.{n}" for n in get_close_matches(name, KEYS[section], 1)]
    elif not hits and not dot:
        hits = get_close_matches(section, SHOWN_SECTIONS, 1)
    hits = hits or get_close_matches(key, everywhere, 1, cutoff=0.75)
    if hits:
        hint = f"did you mean {hits[0]}?"
    elif section in KEYS:
        hint = f"{section} has {', '.join(sorted(KEYS[section]))}"
    else:
        hint = f"sections are {', '.join(SHOWN_SECTIONS)}"
    mistakes.append(Mistake(origin, f"{key}: unknown {'key' if dot else 'section'}; {hint}"))
    return False


# ---------------------------------------------------------------- checks


def _validate(values: Mapping[str, Entry], mistakes: list[Mistake]) -> Settings:
    built: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        given = {k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{name}.")}
        try:
            built[name] = section(**{key: item.value for key, item in given.items()})
        except ValidationError as error:
            seen: set[str] = set()
            for detail in error.errors(include_url=False):
                key = str(detail["loc"][0])
                if key not in seen:
                    seen.add(key)
                    message = f"{name}.{key}: {_explain(detail, given[key].value)}"
                    mistakes.append(Mistake(given[key].origin, message))
    given = {k.partition(".")[2]: v for k, v in values.items() if k.startswith("sampling.")}
    built["sampling"] = _sampling(given, mistakes)
    return Settings() if mistakes else Settings(**built)


def _sampling(given: Mapping[str, Entry], mistakes: list[Mistake]) -> SamplingParams:
    """One field at a time first, so that each mistake gets its own line; then all together."""
    before = len(mistakes)
    for name, item in given.items():
        try:
            # On its own a minimum must not meet the default maximum.
            alone = {"max_tokens": None} | {name: item.value}
            SamplingParams.from_dict(alone)
        except (ConfigError, TypeError, ValueError) as error:
            what = error.what if isinstance(error, ConfigError) else str(error)
            what = what.removeprefix("bad sampling parameters: ")
            what = what.removeprefix(name).lstrip()
            mistakes.append(Mistake(item.origin, f"sampling.{name}: {what}"))
    if len(mistakes) == before:
        try:
            return SamplingParams.from_dict({name: item.value for name, item in given.items()})
        except ConfigError as error:
            origin = next(iter(given.values())).origin
            for name, item in given.items():
                if name in error.what:
                    origin = item.origin
            mistakes.append(Mistake(origin, f"sampling: {error.what}"))
    return SamplingParams()


def _explain(detail: Any, value: object) -> str:
    kind, context, shown = detail["type"], detail.get("ctx", {}), _shown(value)
    if kind == "value_error":
        said = str(context["error"])
        return f"{said}, not {shown}" if said.startswith("must be") else f"{shown} {said}"
    if kind == "literal_error":
        allowed: list[str] = re.findall(r"'([^']+)'", context["expected"])
        if set(allowed) == set(DTYPES):
            allowed += DTYPE_ALIASES
        near = get_close_matches(value, allowed, 1) if isinstance(value, str) else []
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"must be one of {', '.join(allowed)}, not {shown}{hint}"
    limits = {
        "greater_than_equal": "allowed is no less than {ge}",
        "less_than_equal": "allowed is no more than {le}",
        "greater_than": "allowed is more than {gt}",
        "less_than": "allowed is less than {lt}",
    }
    if kind in limits:
        return f"is {shown}, {limits[kind].format(**context)}"
    wanted = {
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "string_type": "must be text",
        "bool_type": "must be true or false",
    }.get(kind, detail["msg"])
    return f"{wanted}, not {shown}"


def _check_combinations(
    settings: Settings, values: Mapping[str, Entry], mistakes: list[Mistake]
) -> None:
    engine, sampling, job = settings.engine, settings.sampling, settings.job
    parallel = settings.parallel

    def note(key: str, message: str) -> None:
        if key in values:  # defaults do not contradict what the user said
            mistakes.append(Mistake(values[key].origin, f"{key}: {message}"))

    longest = engine.max_model_len
    if longest is not None and sampling.max_tokens is not None and sampling.max_tokens >= longest:
        note(
            "sampling.max_tokens",
            f"{sampling.max_tokens} new tokens and a prompt do not fit into "
            f"engine.max_model_len {longest}",
        )
    if job.input and job.output:
        # Of a shard, and of all shards joined.
        shard = job.output + (f".{job.shard.replace('/', '-of-')}" if job.shard else "")
        written = {os.path.realpath(path) for path in (job.output, shard)}
        if os.path.realpath(job.input) in written:
            note("job.output", f"is the input file {job.input!r}, which would be overwritten")
    if engine.record_path and parallel.data > 1:
        note("engine.record_path", f"{parallel.data} replicas (parallel.data) would write one file")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _report(mistakes: list[Mistake], config_path: str | None) -> ConfigError:
    mistakes = sorted(mistakes, key=lambda m: (m.origin.line == 0, m.origin.line))
    lines = [f"{m.origin}: {m.message}" for m in mistakes[:SHOWN_MISTAKES]]
    if len(mistakes) == 1:
        return ConfigError(mistakes[0].message, where=str(mistakes[0].origin))
    if len(mistakes) > SHOWN_MISTAKES:
        lines.append(f"and {len(mistakes) - SHOWN_MISTAKES} more")
    what = f"{len(mistakes)} mistakes in the settings:\n" + "\n".join(f"  {x}" for x in lines)
    return ConfigError(what, where=config_path or "", hint="correct all of them, then start again")
