"""Settings of a run: one strict YAML file, the environment, ``--set`` and flags, checked at once.

Later sources win: defaults of the dataclasses, the YAML file, ``TPRT_SECTION__KEY`` in the
environment, ``--set section.key=value``, explicit flags. All mistakes are reported together, each
with where it stands, what is wrong and the nearest valid key. Relative paths are relative to the
current directory, not to the YAML file.

This file knows the names of settings and nothing of YAML's syntax, models, ranks or engines; it
imports no torch.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from tprt.cli.strict_yaml import Entry, Mistake, Origin, read_yaml_file, read_yaml_value
from tprt.config import DTYPE_ALIASES, DTYPES, EngineConfig, TrimVocab, parse_trim_vocab
from tprt.errors import ConfigError
from tprt.sampling_params import MAX_SEED, SamplingParams

MAX_SIZE, MAX_MEMORY = 2**31 - 1, 2**50
SHOWN_MISTAKES = 20
ENV_PREFIX = "TPRT_"

_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)([kKmMgG])")
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_DEFAULTS = EngineConfig()


def parse_size(value: object) -> object:
    """``16K`` is 16 * 1024, ``2k`` is 2 * 1000, as in vLLM; what is no such text passes unchanged.

    Raises:
        ValueError: text that is no size, or no whole number (``0.5K`` has a binary suffix).
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if not match:
        raise ValueError("must be a whole number or a size such as 16K (16384) or 2k (2000)")
    number, unit = match.groups()
    step = 1024 if unit.isupper() else 1000
    power = "kmg".index(unit.lower()) + 1
    digits, _, decimals = number.partition(".")
    if decimals and unit.isupper():
        raise ValueError("has decimals before a binary unit; 1.5k is 1500, 1536 is 1.5 * 1024")
    whole, rest = divmod(int(digits + decimals) * step**power, 10 ** len(decimals))
    if rest:
        raise ValueError("is not a whole number")
    return whole


def expand_variables(value: object) -> object:
    """``${NAME}`` in a path becomes the environment variable.

    Raises:
        ValueError: the variable is unset or empty, or there is a NUL in the path.
    """
    if not isinstance(value, str):
        return value
    if "\0" in value:
        raise ValueError("contains NUL")

    def replacement(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if not found:  # an empty one would turn ${DIR}/x into /x
            raise ValueError(f"needs the environment variable {match[1]}, which is not set")
        return found

    return _VARIABLE.sub(replacement, value)


def _dtype(value: object) -> object:
    return DTYPE_ALIASES.get(value, value) if isinstance(value, str) else value


Dtype = Annotated[Literal["bfloat16", "float32", "float16"], BeforeValidator(_dtype)]
ExpandedPath = Annotated[str, BeforeValidator(expand_variables)]
Size = Annotated[int, BeforeValidator(parse_size), Field(ge=1, le=MAX_SIZE)]
Memory = Annotated[int, BeforeValidator(parse_size), Field(ge=1, le=MAX_MEMORY)]
Share = Annotated[float, Field(gt=0, le=1)]


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
    verify: Literal["sizes", "full"] = "sizes"
    bos_policy: Literal["none", "bos"] = "none"
    trim_vocab: Annotated[TrimVocab, PlainValidator(parse_trim_vocab)] = "off"
    device: Literal["auto", "cpu", "cuda"] = "auto"


class ParallelSettings(_Section):
    """``tensor``: ranks that share the model; None is the number of ranks launched."""

    tensor: Annotated[int, Field(ge=1, le=4096)] | None = None


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
    step_timeout: Annotated[float, Field(gt=0, lt=1e9)] = _DEFAULTS.step_timeout
    seed: Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED)] = _DEFAULTS.seed


class JobSettings(_Section):
    """Files of a batch job."""

    input: ExpandedPath | None = None
    output: ExpandedPath | None = None


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
PATH_KEYS = {"model.path", "model.tokenizer", "job.input", "job.output"}


def load_settings(
    config_path: str | None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings from all sources, later ones winning.

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
    return settings


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
    if job.input and job.output and os.path.realpath(job.input) == os.path.realpath(job.output):
        note("job.output", f"is the input file {job.input!r}, which would be overwritten")


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
