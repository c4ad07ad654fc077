"""``tprt job status OUT``: what a batch job does, or what became of it. Reads only; loads no model.

How it looks is settled here; what is known, in ``job.status_report``.
"""

import argparse
import json
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tprt.cli.common import add_settings_flags, settings_from
from tprt.errors import EXIT_OK, ConfigError
from tprt.job.progress import duration
from tprt.job.status_file import ACTIVE_STATES
from tprt.job.status_report import GOES_ON, describe

if TYPE_CHECKING:
    from rich.console import RenderableType

STYLES = {
    "finished": "green",
    "failed": "red",
    "dead": "red",
    "interrupted": "yellow",
    "restarting": "yellow",
}
Rows = list[tuple[str, str]]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "job", help="what a batch job does", description="Look at batch jobs."
    )
    verbs = parser.add_subparsers(dest="job_command", required=True, metavar="COMMAND")
    status = verbs.add_parser(
        "status",
        help="state, progress and errors of the job that writes OUT",
        description="Show state, progress and errors of the job that writes OUT, while it runs and "
        "afterwards, however it ended. With OUT in shards: all of them. Exits with 0 when it could "
        "tell, whatever the state, and with 2 where there is no such job; --json has exit_code.",
        allow_abbrev=False,
    )
    status.add_argument(
        "output", nargs="?", metavar="OUT", help="what --output of tprt generate names"
    )
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.add_argument(
        "--watch",
        nargs="?",
        type=_interval,
        const=2.0,
        metavar="SECONDS",
        help="look again every SECONDS (2) until the job no longer runs; write it behind OUT",
    )
    # The parser above has the flag too and its default: this one must not undo it.
    status.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the traceback of an error",
    )
    add_settings_flags(status)
    status.set_defaults(parser=status)
    return parser


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0.1 to 86400")
    return seconds


def run(args: argparse.Namespace) -> int:
    output = settings_from(args).job.output
    if not output:
        raise ConfigError("no output named", hint="tprt job status OUT")
    if args.watch is not None:
        return watch(Path(output), args.watch, args.json)
    result = describe(Path(output))
    if args.json:
        print(json.dumps(result, indent=1))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(_rich(result))
    else:
        print(_plain(result))
    return EXIT_OK


def watch(output: Path, seconds: float, as_json: bool = False) -> int:
    """Show the job again and again until it no longer runs, or until Ctrl-C.

    Raises:
        ConfigError: there is no such job.
    """
    result = describe(output)
    try:
        if as_json or not sys.stdout.isatty():
            while True:
                print(json.dumps(result) if as_json else f"{_plain(result)}\n", flush=True)
                if result["state"] not in GOES_ON:
                    return EXIT_OK
                time.sleep(seconds)
                result = describe(output)
        from rich.live import Live

        with Live(_rich(result), auto_refresh=False) as live:
            while result["state"] in GOES_ON:
                time.sleep(seconds)
                result = describe(output)
                live.update(_rich(result), refresh=True)
    except KeyboardInterrupt:  # the way to leave
        pass
    return EXIT_OK


def _rows(result: dict[str, Any]) -> Rows:
    """Name and value of what is known of one job."""
    is_active = result["state"] in ACTIVE_STATES
    rows: Rows = []
    if result["exit_code"] is not None:
        code = result["exit_code"]
        rows.append(("exit code", f"{code}: {result['meaning'] or 'not one of tprt'}"))
    if result["total"] is not None:
        rows += [("records", _records(result)), ("tokens", _tokens(result))]
    if result["resumed"]:
        rows.append(("resumed", f"{result['resumed']:,} were done by earlier attempts"))
    if is_active and result["eta_s"] is not None:
        rows.append(("time left", duration(result["eta_s"])))
    if result["updated"]:
        rows += _times(result, is_active)
    if result["pid"]:
        ranks = f"{result['ranks']} rank" + ("s" if result["ranks"] != 1 else "")
        rows.append(("process", f"{result['pid']} on {result['host']}, {ranks}"))
    if result["error"]:
        rows += _error_rows(result["error"])
    if result["state"] == "finished" and result["output_size"] is not None:
        rows.append(("output", f"{result['output']} ({result['output_size']:,} bytes)"))
    return rows + _last_rows(result)


def _last_rows(result: dict[str, Any]) -> Rows:
    next_step = [("next", result["next"])] if result["next"] else []
    return [*(("note", note) for note in result["notes"]), *next_step]


def _records(result: dict[str, Any]) -> str:
    share = "" if result["percent"] is None else f" ({result['percent']:.1f} %)"
    running = f", {result['running']:,} running" if result["running"] else ""
    done = f"{result['finished']:,} of {result['total']:,}{share}"
    return f"{done}, {result['failed']:,} failed{running}"


def _tokens(result: dict[str, Any]) -> str:
    return f"{result['tokens']:,}, {result['tokens_per_s']:,.1f} tokens/s"


def _times(result: dict[str, Any], is_active: bool) -> Rows:
    updated, started = result["updated"], result["started"]
    attempt = f" (attempt {result['attempt']})"
    ago = f"{duration(time.time() - updated)} ago"
    if is_active:
        return [("running for", duration(time.time() - started) + attempt), ("last word", ago)]
    when = datetime.fromtimestamp(updated).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    name = "last word" if result["state"] == "dead" else "ended"
    return [(name, f"{when}, {ago}, after {duration(updated - started)}{attempt}")]


def _error_rows(error: dict[str, Any]) -> Rows:
    rank, step = error.get("rank"), error.get("step")
    phase = str(error.get("phase") or "")
    if isinstance(step, int) and step >= 0:
        phase = f"{phase or 'in'} step {step}"
    place = [
        f"rank {rank}" if isinstance(rank, int) and rank >= 0 else "",
        f"host {error['host']}" if error.get("host") else "",
        phase,
        str(error.get("where") or ""),
    ]
    rows = [
        ("error", str(error.get("what") or error.get("kind") or "unknown")),
        ("where", ", ".join(filter(None, place))),
        ("try", str(error.get("hint") or "")),
    ]
    return [(name, " ".join(value.split())) for name, value in rows if value]


def _shard_cells(shard: dict[str, Any]) -> list[str]:
    """The cells of SHARD_COLUMNS; empty where nothing is known."""
    cells = [shard.get("shard", ""), shard["state"], "", "", "", "", "", ""]
    if shard.get("exit_code") is not None:
        cells[2] = str(shard["exit_code"])
    if shard.get("total") is not None:
        cells[3] = f"{shard['finished']:,} of {shard['total']:,}"
        cells[4] = f"{shard['failed']:,}"
        cells[5] = f"{shard['tokens']:,}"
        cells[6] = f"{shard['tokens_per_s']:,.1f}"
    if shard.get("eta_s") is not None:
        cells[7] = duration(shard["eta_s"])
    return cells


SHARD_COLUMNS = ("shard", "state", "code", "records", "failed", "tokens", "tokens/s", "time left")


def _shard_table(result: dict[str, Any]) -> list[list[str]]:
    total = {key: value for key, value in result.items() if key != "shards"} | {"shard": "all"}
    return [_shard_cells(shard) for shard in (*result["shards"], total)]


def _shard_errors(result: dict[str, Any]) -> Rows:
    failed = [shard for shard in result["shards"] if shard.get("error")]
    return [(s["shard"], value) for s in failed for _, value in _error_rows(s["error"])[:2]]


def _plain(result: dict[str, Any]) -> str:
    from tprt.cli.chat_terminal import neutral

    lines = [f"{result['output']}: {result['state']}"]
    if "shards" in result:
        table = [list(SHARD_COLUMNS), *_shard_table(result)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += [
            "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        rows = _shard_errors(result) + _last_rows(result)
    else:
        rows = _rows(result)
    width = max((len(name) for name, _ in rows), default=0)
    return neutral("\n".join([*lines, *(f"  {name:<{width}}  {value}" for name, value in rows)]))


def _rich(result: dict[str, Any]) -> "RenderableType":
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from tprt.cli.chat_terminal import neutral

    state = result["state"]
    title = Text.assemble(
        neutral(result["output"]), ": ", (state, f"bold {STYLES.get(state, 'cyan')}")
    )
    parts: list[RenderableType] = [title]
    rows = _rows(result) if "shards" not in result else _shard_errors(result) + _last_rows(result)
    if "shards" in result:
        table = Table(*SHARD_COLUMNS)
        for cells in _shard_table(result):
            table.add_row(*(Text(neutral(cell)) for cell in cells))
        parts.append(table)
    grid = Table.grid(padding=(0, 2))
    for name, value in rows:
        grid.add_row(Text(f"  {name}", style="dim"), Text(neutral(value)))
    return Group(*parts, grid)
