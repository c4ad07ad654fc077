"""``tprt config``: which settings a command would run with, and who said so.

Prints what ``settings`` finds; knows no model and no rank, and imports no torch. The output depends on
the settings alone: no time, no terminal, no machine.
"""

import argparse
import json
import re
from typing import Any

import yaml

from tprt.cli.common import (
    add_model_flags,
    add_sampling_flags,
    add_settings_flags,
    given_flags,
)
from tprt.cli.generate import add_job_flags
from tprt.cli.settings import ResolvedSettings, resolve_settings
from tprt.cli.strict_yaml import read_yaml_value

_STR = "tag:yaml.org,2002:str"
# Text that YAML reads as the text itself; all else is quoted.
_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*", re.ASCII)
WIDEST = 44  # values up to here keep the last column straight


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "config",
        help="the settings in effect, and where each comes from",
        description="show: print the settings that 'tprt generate' would run with, as YAML that "
        "--config takes; with --resolved as a table of key, value and source. Later sources win: "
        "defaults, --config, TPRT_SECTION__KEY in the environment, --set, flags. The last line has a "
        "digest of all values, the same wherever they came from.",
    )
    parser.add_argument("action", choices=["show"], help="what to do")
    parser.add_argument(
        "--resolved", action="store_true", help="a line per setting, with its source"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_flags(parser)
    parser.add_argument("--input", metavar="IN.jsonl", help="one JSON object per line")
    parser.add_argument("--output", metavar="OUT.jsonl", help="appears when all is done")
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks on this host")
    add_sampling_flags(parser, "most tokens per completion (16)")
    add_job_flags(parser)
    parser.add_argument("--max-restarts", type=int, metavar="K", help="after a failure (0)")
    add_settings_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    resolved = resolve_settings(args.config, args.set, given_flags(args))
    if args.json:
        print(as_json(resolved, args.resolved))
    else:
        print(as_table(resolved) if args.resolved else as_yaml(resolved))
    return 0


def as_yaml(resolved: ResolvedSettings) -> str:
    """A settings file that gives the same settings, all written out."""
    lines = []
    for section, keys in resolved.settings.plain().items():
        lines.append(f"{section}:")
        lines += [f"  {key}: {_flow(value)}" for key, value in keys.items()]
    return "\n".join([*lines, f"# digest {resolved.settings.digest()}"])


def as_table(resolved: ResolvedSettings) -> str:
    """Key, value and source of every setting, and the digest."""
    rows = [(key, _flow(value), source(resolved, key)) for key, value in _dotted(resolved).items()]
    first = max(len(key) for key, _, _ in rows)
    second = max(len(value) for _, value, _ in rows if len(value) <= WIDEST)
    lines = [f"{key:<{first}}  {value:<{second}}  {where}" for key, value, where in rows]
    return "\n".join([*lines, f"digest {resolved.settings.digest()}"])


def as_json(resolved: ResolvedSettings, with_sources: bool) -> str:
    settings = resolved.settings
    result: dict[str, Any] = {"settings": settings.plain()}
    if with_sources:
        result["sources"] = {key: source(resolved, key) for key in _dotted(resolved)}
    return json.dumps(result | {"digest": settings.digest()}, indent=1)


def source(resolved: ResolvedSettings, key: str) -> str:
    """``default``, ``FILE:line``, ``environment NAME``, ``--set`` or ``flag``."""
    origin = resolved.origins.get(key)
    # The key stands in its own column.
    return (
        "default" if origin is None else str(origin).removesuffix(key).removesuffix(" for ").strip()
    )


def _dotted(resolved: ResolvedSettings) -> dict[str, Any]:
    sections = resolved.settings.plain()
    return {
        f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes more than PyYAML would, which has YAML 1.1 in mind and leaves ``1e5`` bare as text."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = _PLAIN.fullmatch(text) is not None and read_yaml_value(text) == text
    plain = plain and dumper.resolve(yaml.ScalarNode, text, (True, False)) == _STR  # type: ignore[no-untyped-call]
    return dumper.represent_scalar(_STR, text, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def _flow(value: Any) -> str:
    """One line of YAML, ASCII alone, so that it is the same on any terminal."""
    said: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=float("inf"))
    return said.removesuffix("\n").removesuffix("\n...")
