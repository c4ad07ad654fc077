"""Pictures of what was measured: every number comes out of a report's JSON, none is typed in.

python -m tprt.bench.picture docs/bench/FILE.json ... -o docs/bench/decode-zeros.svg

Reports of ``tprt bench decode --zeros`` become speed against the share of zeros; those of ``tprt bench
decode`` with several contexts the time of a step against the context, all in one panel.

Needs matplotlib (``pip install tprt[plot]``). A picture of the same reports is the same file. Knows
reports; no engine.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tprt.errors import EXIT_OK, ConfigError, OutputError, TprtError

SUFFIXES = ".svg", ".png"
COLOURS = {
    "sparse": "#0b7285",
    "dense": "#868e96",
    "transformers": "#e8590c",
    "limit": "#212529",
}
LINES = "#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e"
NAMES = {"sparse": "tprt, zeros skipped", "dense": "tprt, everything read"}


def check_picture(path: Path) -> None:
    """Before anything is measured for it: whether ``path`` can become a picture here.

    Raises:
        ConfigError: its name is none of a picture, or matplotlib is missing.
        OutputError: there is no such folder.
    """
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}", hint="a folder that exists")
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"{path} is no name of a picture", hint=f"one ending in {' or '.join(SUFFIXES)}"
        )
    try:
        import_module("matplotlib")
    except ImportError:
        raise ConfigError(
            "matplotlib is not installed", hint="pip install 'tprt[plot]', or leave the picture out"
        ) from None


def draw_zeros(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens per second against the share of zeros: a row for each report, a panel for each batch.

    Args:
        reports: of ``tprt bench decode --zeros``; of each its smallest context is shown.

    Raises:
        ConfigError: a report is another one, or matplotlib is missing.
        OutputError: ``path`` cannot be written.
    """
    check_picture(path)
    rows = [_panels(report) for report in reports]
    figure, axes = _figure(len(rows), max(map(len, rows)))
    for report, panels, line in zip(reports, rows, axes, strict=True):
        for axis, cells in zip(line, panels, strict=False):
            _panel(axis, report, cells)
        for axis in line[len(panels) :]:
            axis.set_visible(False)
    _save(figure, path)


def _panels(report: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The cells of the smallest context, by batch and there by zeros."""
    cells = [c for c in _cells(report) if "dense_limit_tokens_per_s" in c]
    if report.get("bench") != "decode" or not cells:
        raise ConfigError(
            f"a report of {report.get('bench')!r} without zeros cannot be drawn",
            hint="the JSON line of tprt bench decode --zeros 0.5,0.9",
        )
    context = min(cell["context"] for cell in cells)
    batches = sorted({cell["batch"] for cell in cells})
    return [
        sorted(
            (c for c in cells if (c["batch"], c["context"]) == (batch, context)),
            key=lambda cell: cell["zeros_measured"],
        )
        for batch in batches
    ]


def _panel(axis: Any, report: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    x = [100 * cell["zeros_measured"] for cell in cells]
    for name in cells[0]["seconds"]:
        steps = report["settings"]["steps"] * cells[0]["batch"]
        rates = [(cell if name == "sparse" else cell[name])["tokens_per_s"] for cell in cells]
        spread = [
            [rate - steps / max(cell["seconds"][name]) for rate, cell in zip(rates, cells, strict=True)],
            [steps / min(cell["seconds"][name]) - rate for rate, cell in zip(rates, cells, strict=True)],
        ]  # fmt: skip
        # Rates are rounded: what is then below 0 is 0.
        bars = [[max(0.0, side) for side in sides] for sides in spread]
        axis.errorbar(
            x, rates, yerr=bars, marker="o", markersize=4, capsize=2, linewidth=1.5,
            color=COLOURS[name], label=NAMES.get(name, name),
        )  # fmt: skip
    limits = [cell["dense_limit_tokens_per_s"] for cell in cells]
    axis.plot(
        x, limits, linestyle="--", linewidth=1.2, color=COLOURS["limit"],
        label="limit of reading every matrix once",
    )  # fmt: skip
    batch, context = cells[0]["batch"], cells[0]["context"]
    axis.set_title(
        f"{report['model']}, {report['dtype']}, {report['device']}\n"
        f"synthetic zeros, batch {batch}, context {context}",
        fontsize=9,
    )
    axis.set_xlabel("zeros after squared ReLU, %")
    axis.set_ylabel("tokens per second")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    # Below: on some machines lines are everywhere inside.
    axis.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def draw_contexts(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """Milliseconds of a decode step against the tokens before it, a line for each report.

    Args:
        reports: of ``tprt bench decode``; of each its smallest batch is shown.

    Raises:
        ConfigError, OutputError: as ``draw_zeros``.
    """
    check_picture(path)
    figure, ((axis,),) = _figure(1, 1)
    for report, colour in zip(reports, itertools.cycle(LINES), strict=False):
        batch, cells = _by_context(report)
        steps = report["settings"]["steps"]
        ms = [cell["ms_per_step"] for cell in cells]
        # "spread" is (largest - smallest) / median: all runs lie within it on either side.
        bars = [value * cell["spread"] / 2 for value, cell in zip(ms, cells, strict=True)]
        axis.errorbar(
            [cell["context"] for cell in cells], ms, yerr=bars, marker="o", markersize=4,
            capsize=2, linewidth=1.5, color=colour,
            label=f"{report['model']}, batch {batch}, runs of {steps} steps",
        )  # fmt: skip
    axis.set_title(f"{reports[0]['dtype']}, {reports[0]['device']}", fontsize=9)
    axis.set_xlabel("tokens before the step")
    axis.set_ylabel("milliseconds per decode step")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, loc="upper left")
    _save(figure, path)


def _by_context(report: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """The smallest batch, and its cells by context."""
    cells = [c for c in _cells(report) if "ms_per_step" in c]
    if report.get("bench") != "decode" or not cells:
        raise ConfigError(
            f"a report of {report.get('bench')!r} without contexts cannot be drawn",
            hint="the JSON line of tprt bench decode --context 512,2048,8000",
        )
    batch = min(cell["batch"] for cell in cells)
    return batch, sorted((c for c in cells if c["batch"] == batch), key=lambda c: c["context"])


def _cells(report: dict[str, Any]) -> list[dict[str, Any]]:
    details = report.get("details")
    told = details.get("cells", ()) if isinstance(details, dict) else ()
    return [cell for cell in told if isinstance(cell, dict)]


def _contexts(report: dict[str, Any]) -> int:
    return len({cell.get("context") for cell in _cells(report)})


def _has_zeros(report: dict[str, Any]) -> bool:
    return any("dense_limit_tokens_per_s" in cell for cell in _cells(report))


def draw_sparsity(details: dict[str, Any], model: str, path: Path) -> None:
    """Zeros by layer, and what of a layer a batch needs beside what independent rows would.

    Raises:
        ConfigError, OutputError: as ``draw_zeros``.
    """
    check_picture(path)
    figure, ((left, right),) = _figure(1, 2)
    layers = details["layers"]
    numbers = [layer["layer"] for layer in layers]
    for kind, label in (("prompt", "prompts"), ("generated", "generated tokens")):
        shares = [layer[f"zeros_{kind}"] for layer in layers]
        if None not in shares:
            left.plot(numbers, [100 * share for share in shares], marker="o", label=label)
    left.set_title(f"{model}: zeros after squared ReLU", fontsize=9)
    left.set_xlabel("layer")
    left.set_ylabel("%")
    left.set_ylim(0, 100)
    left.xaxis.get_major_locator().set_params(integer=True)
    batches = details["mean"]["batches"]
    sizes = [batch["batch"] for batch in batches]
    for key, label, style in (("live", "measured", "-"), ("independent", "if independent", "--")):
        shares = [100 * batch[key] for batch in batches]
        right.plot(sizes, shares, style, marker="o", label=label)
    right.set_title(f"{model}: neurons that fire for any row of a batch", fontsize=9)
    right.set_xlabel("rows of the batch")
    right.set_ylabel("% of all, mean over layers")
    right.set_ylim(0, 100)
    right.set_xticks(sizes)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    _save(figure, path)


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure without a window, and its axes [rows][columns]."""
    import_module("matplotlib").rcParams["svg.hashsalt"] = "tprt"  # ids of the file, by chance else
    figure = import_module("matplotlib.figure").Figure(
        figsize=(4.6 * columns, 4.2 * rows), layout="constrained"
    )
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise OutputError(
            f"{path}: {error.strerror}", hint="another name for the picture"
        ) from None


def read_report(path: Path) -> dict[str, Any]:
    """The last line of a file that is a JSON object, as ``tprt bench`` prints it.

    Raises:
        ConfigError: there is none.
    """
    try:
        text = path.read_text("utf-8")
        try:
            found = json.loads(text)
        except ValueError:
            found = json.loads(text.strip().rpartition("\n")[2])
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: {why}", hint="a file with what tprt bench printed") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no report", hint="a file with what tprt bench printed")
    return found


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tprt.bench.picture", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "reports",
        type=Path,
        nargs="+",
        metavar="FILE.json",
        help="of tprt bench decode: with --zeros the smallest context of each is shown, else the "
        "smallest batch",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.svg")
    args = parser.parse_args(arguments)
    try:
        reports = [read_report(path) for path in args.reports]
        # Several cells without zeros have contexts to compare; anything else is told what it lacks.
        several = all(_contexts(report) > 1 and not _has_zeros(report) for report in reports)
        (draw_contexts if several else draw_zeros)(reports, args.output)
    except TprtError as error:
        print(f"tprt.bench.picture: error: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
