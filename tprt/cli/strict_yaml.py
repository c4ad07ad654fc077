"""Strict YAML: text to plain values that know where they were given, and a list of mistakes.

Only the data is read: mappings with text keys, lists, text, numbers, true, false and null, as YAML
1.2's core schema has them (so ``on``, ``no``, ``010`` and ``1:30`` are not what YAML 1.1 makes of
them). Tags, aliases, merge keys, duplicate keys and large files are refused.

This file knows no setting: which keys there are and what they hold is the caller's business.
"""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from tprt.errors import ConfigError

MAX_YAML_BYTES = 2**20
MAX_YAML_VALUES = 20_000
MAX_YAML_DEPTH = 32

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


def read_yaml_file(path: str, mistakes: list[Mistake]) -> Entry:
    """The value of a whole file; that of an empty one is None.

    Duplicate keys, keys that are no text and foreign tags are added to ``mistakes``; the first value
    of a duplicate key stands.

    Raises:
        ConfigError: the file cannot be read at all: missing, too large, not UTF-8, not YAML, with
            aliases or too deep.
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
    return Entry(None, Origin(path)) if node is None else _convert(node, path, "", mistakes)


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
