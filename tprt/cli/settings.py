"""Settings of a run: one strict YAML file, the environment, ``--set`` and flags, checked at once.

Later sources win: defaults of the dataclasses, the YAML file, ``TPRT_SECTION__KEY`` in the
environment, ``--set section.key=value``, explicit flags. All mistakes are reported together, each
with where it stands, what is wrong and the nearest valid key. Relative paths are relative to the
current directory, not to the YAML file.

Of YAML only the data is read: mappings with text keys, lists, text, numbers, true, false and null,
as YAML 1.2's core schema has them (so ``on``, ``no``, ``010`` and ``1:30`` are not what YAML 1.1
makes of them). Tags, aliases, merge keys, duplicate keys and large files are refused.

This file knows the names of settings and nothing of models, ranks or engines; it imports no torch.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tprt.config import DTYPE_ALIASES, DTYPES, EngineConfig
from tprt.errors import ConfigError
from tprt.sampling_params import MAX_SEED, SamplingParams

MAX_SIZE, MAX_MEMORY = 2**31 - 1, 2**50
SHOWN_MISTAKES = 20
ENV_PREFIX = "TPRT_"
MAX_YAML_BYTES = 2**20
MAX_YAML_VALUES = 20_000
MAX_YAML_DEPTH = 32

_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)([kKmMgG])")
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_DEFAULTS = EngineConfig()
_INT = re.compile(r"[-+]?[0-9]{1,40}|0x[0-9a-fA-F]{1,32}|0o[0-7]{1,40}")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(inf|nan)", re.IGNORECASE)
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULL = {"", "~", "null", "Null", "NULL"}


class Origin(NamedTuple):
    """Where a value was given: a file with a line, or a flag or variable (line 0)."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


class Mistake(NamedTuple):
    origin: Origin
    message: str


@dataclass(frozen=True)
class Entry:
    """One YAML value: a scalar, or a dict or list of entries."""

    value: Any
    origin: Origin

    def plain(self) -> Any:
        """The value without its origins."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [entry.plain() for entry in self.value]
        return self.value


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
    values: dict[str, Entry] = {}
    for section, entry in document.items():
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
        hits = get_close_matches(section, KEYS, 1)
    hits = hits or get_close_matches(key, everywhere, 1, cutoff=0.75)
    if hits:
        hint = f"did you mean {hits[0]}?"
    elif section in KEYS:
        hint = f"{section} has {', '.join(sorted(KEYS[section]))}"
    else:
        hint = f"sections are {', '.join(sorted(KEYS))}"
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


# ---------------------------------------------------------------- YAML


def read_yaml_file(path: str, mistakes: list[Mistake]) -> dict[str, Entry]:
    """The top-level mapping of a file; an empty file is an empty mapping.

    Duplicate keys, keys that are no text and foreign tags are added to ``mistakes``; the first value
    of a duplicate key stands.

    Raises:
        ConfigError: the file cannot be read at all: missing, too large, not UTF-8, not YAML, with
            aliases, too deep or with another top level than a mapping.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read the settings file: {error}", where=path, hint="check --config"
        ) from error
    if len(data) > MAX_YAML_BYTES:
        raise ConfigError(
            f"the settings file has more than {MAX_YAML_BYTES} bytes",
            where=path,
            hint="is this the settings file?",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError("the settings file is not UTF-8", where=f"{path}:{line}") from error
    node = _compose(text, path)
    if node is None:
        return {}
    entry = _convert(node, path, "", mistakes)
    if entry.value is None:
        return {}
    if not isinstance(entry.value, dict):
        raise ConfigError(
            f"the settings file holds {entry.plain()!r:.60} where sections are due",
            where=str(entry.origin),
            hint="lines such as 'model:' with indented 'path: ...' below",
        )
    return entry.value


def read_yaml_value(text: str) -> Any:
    """The value of a flag or variable: a scalar, a ``[list]`` or a ``{mapping}``; else the text itself.

    Unlike in a file, plain text is taken as it stands, with its colons, hashes and line breaks: the
    shell has quoted it already.
    """
    mistakes: list[Mistake] = []
    try:
        node = _compose(text, "")
    except ConfigError:
        return text
    if node is None:
        return None
    quoted = isinstance(node, yaml.ScalarNode) and node.style in ("'", '"')
    flow = isinstance(node, yaml.CollectionNode) and node.flow_style
    entry = _convert(node, "", "", mistakes)
    if mistakes or (not quoted and not flow and (isinstance(entry.value, str | dict | list))):
        return text
    return entry.plain()


class _Loader(yaml.SafeLoader):
    """Stops a hostile file while it is parsed, before anything is built from it."""

    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise _refusal("aliases (*name) are not allowed; write the value out", event)
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.depth > MAX_YAML_DEPTH:
            raise _refusal(f"more than {MAX_YAML_DEPTH} levels of nesting", event)
        if self.nodes > MAX_YAML_VALUES:
            raise _refusal(f"more than {MAX_YAML_VALUES} values", event)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


# YAML 1.1's own idea of what plain text means; `_scalar` decides instead.
_Loader.yaml_implicit_resolvers = {}


def _refusal(problem: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _compose(text: str, path: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        node: yaml.Node | None = loader.get_single_node()
        return node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        what = " ".join(part for part in (error.context, error.problem) if part)
        # PyYAML's text for a tab is about tokens; say what to do.
        hint = "indent with blanks, not tabs" if r"'\t'" in what else ""
        raise ConfigError(f"not valid YAML: {what}", where=f"{path}{line}", hint=hint) from error
    except yaml.reader.ReaderError as error:
        line = f":{text.count(chr(10), 0, error.position) + 1}"
        raise ConfigError(
            f"not valid YAML: character U+{ord(text[error.position]):04X} is not allowed",
            where=f"{path}{line}",
        ) from error


def _convert(node: yaml.Node, path: str, key: str, mistakes: list[Mistake]) -> Entry:
    origin = Origin(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        _refuse_tag(node, "map", key, origin, mistakes)
        return Entry(_mapping(node, path, key, mistakes), origin)
    if isinstance(node, yaml.SequenceNode):
        _refuse_tag(node, "seq", key, origin, mistakes)
        items = (_convert(item, path, f"{key}[{i}]", mistakes) for i, item in enumerate(node.value))
        return Entry(list(items), origin)
    assert isinstance(node, yaml.ScalarNode)
    _refuse_tag(node, "str", key, origin, mistakes)
    return Entry(node.value if node.style else _scalar(node.value), origin)


def _mapping(
    node: yaml.MappingNode, path: str, key: str, mistakes: list[Mistake]
) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for name_node, value_node in node.value:
        origin = Origin(path, name_node.start_mark.line + 1)
        name = name_node.value
        if not isinstance(name_node, yaml.ScalarNode):
            mistakes.append(Mistake(origin, f"{key or 'top level'}: a key must be text"))
            continue
        dotted = f"{key}.{name}" if key else name
        entry = _convert(value_node, path, dotted, mistakes)
        if name in found:
            first = found[name].origin.line
            mistakes.append(
                Mistake(origin, f"{dotted}: duplicate key, first given on line {first}")
            )
            continue
        found[name] = Entry(entry.value, origin)
    return found


def _refuse_tag(
    node: yaml.Node, kind: str, key: str, origin: Origin, mistakes: list[Mistake]
) -> None:
    if node.tag != f"tag:yaml.org,2002:{kind}":
        message = f"{key or 'top level'}: tags ({node.tag}) are not allowed"
        mistakes.append(Mistake(origin, message))


def _scalar(text: str) -> Any:
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        # int(text, 0) refuses the leading zeros that YAML 1.2 reads as decimal.
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if match := _INFINITE.fullmatch(text):  # read as numbers, so that validation can refuse them
        return float(match[1] + match[2])
    return text
