"""Who computes x W^T for how many rows, and with which tile: measured per device, else by reasoning.

The choice is a pure function of the device's table and the sizes, so all ranks and all runs make the
same one. A tile serves every number of rows its variant is used for: the order of sums is that of the
tile, and a row's bits must not depend on the other rows.

Tables lie in the folder ``tiles`` beside this file, ``<device name>.json``; ``tune`` makes one. Its key
"sparse_rows", where somebody adds it, says how many rows of x skip neurons in ``sparse_linear``.

Legend: weight [n, k].
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, get_args

import torch
import triton

from tprt.errors import ConfigError

Variant = Literal["fma", "dot"]

FOLDER = Path(__file__).with_suffix("")
MAX_ROWS = 16  # the narrow side of a tensor-core product
MAX_FMA_ROWS = 4  # beyond, multiplying on CUDA cores takes longer than reading the weight
SPARSE_ROWS = 8  # of 16 rows with a tenth alive each, four neurons in five are alive in some
MEASURED_ROWS = (1, 2, 4, 8, 16)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_PROCESSORS = 132  # of an H100 or H200
_NO_CACHE = 2**28  # bytes of weights, read in turn, that no L2 holds
_MAX_COPIES = 64


class Tile(NamedTuple):
    """Rows of the weight and columns of it that one program takes at a time, and how.

    Args:
        variant: "fma" multiplies on CUDA cores, at most ``MAX_FMA_ROWS`` rows; "dot" on tensor cores,
            at most ``MAX_ROWS``.
        block_n, block_k, num_warps: powers of two.
        num_stages: 1 loads into registers; from 2 on loads go through shared memory, and all stages
            but one are under way.
    """

    variant: Variant
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """The tiles of one shape: ``fma`` up to ``fma_rows`` rows, ``dot`` up to ``max_rows``, then cuBLAS.

    ``fma_rows`` 0 gives a row the same bits for any number of rows up to ``max_rows``.
    """

    fma: Tile
    dot: Tile
    fma_rows: int
    max_rows: int

    def tile(self, rows: int) -> Tile | None:
        if not 0 < rows <= self.max_rows:
            return None
        return self.fma if rows <= self.fma_rows else self.dot


Shape = tuple[int, int, torch.dtype]


class Tiles:
    """The plans of one device; shapes without a measured one get ``default_plan``.

    Args:
        sparse_rows: most rows for which skipping neurons is faster than reading all of a matrix.
    """

    def __init__(
        self, plans: Mapping[Shape, Plan] | None = None, sparse_rows: int = SPARSE_ROWS
    ) -> None:
        self._plans = dict(plans or {})
        self.sparse_rows = sparse_rows

    def choose(self, rows: int, n: int, k: int, dtype: torch.dtype) -> Tile | None:
        """The tile for x [rows, k]; None where cuBLAS serves."""
        shape = n, k, dtype
        if shape not in self._plans:
            self._plans[shape] = default_plan(*shape)
        return self._plans[shape].tile(rows)


def table_path(device: torch.device, folder: Path = FOLDER) -> Path:
    """Where the table of this kind of GPU lies, if somebody made one."""
    return folder / f"{torch.cuda.get_device_name(device).replace(' ', '_')}.json"


def load(device: torch.device, folder: Path = FOLDER) -> Tiles:
    """The table of this device; no plans if there is none.

    Raises:
        ConfigError: the table is damaged.
    """
    if device.type == "cuda" and (path := table_path(device, folder)).exists():
        return parse(path.read_text("utf-8"), str(path))
    return Tiles()


def parse(text: str, where: str) -> Tiles:
    """A table as ``tune`` makes it, from JSON.

    Raises:
        ConfigError: it is not one; ``where`` says which.
    """
    try:
        table = json.loads(text)
        entries = [dict(entry) for entry in table["shapes"]]
        sparse_rows = table.get("sparse_rows", SPARSE_ROWS)
        if not (isinstance(sparse_rows, int) and 0 <= sparse_rows <= MAX_ROWS):
            raise ValueError(f"sparse_rows is {sparse_rows!r}")
        return Tiles(dict(_parse_entry(**entry) for entry in entries), sparse_rows)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"not a table of tiles: {type(error).__name__}: {error}",
            where=where,
            hint="measure it again: tprt bench kernels --tune; or delete it",
        ) from error


def _parse_entry(
    n: int,
    k: int,
    dtype: str,
    fma: dict[str, Any],
    dot: dict[str, Any],
    fma_rows: int,
    max_rows: int,
) -> tuple[Shape, Plan]:
    if not 0 <= fma_rows <= min(max_rows, MAX_FMA_ROWS) or max_rows > MAX_ROWS:
        raise ValueError(f"[{n}, {k}]: fma_rows {fma_rows} and max_rows {max_rows}")
    plan = Plan(_parse_tile("fma", **fma), _parse_tile("dot", **dot), fma_rows, max_rows)
    return (n, k, DTYPES[dtype]), plan


def _parse_tile(variant: Variant, **sizes: Any) -> Tile:
    tile = Tile(variant, **sizes)
    limits = Tile(variant, block_n=256, block_k=4096, num_warps=16, num_stages=8)
    for name, size in sizes.items():
        power = name == "num_stages" or size & (size - 1) == 0
        if not (1 <= size <= getattr(limits, name) and power):
            raise ValueError(f"{name} is {size}")
    if variant == "dot" and min(tile.block_n, tile.block_k) < 16:
        raise ValueError(f"{tile}: a tensor core takes 16 by 16")
    return tile


def default_plan(n: int, k: int, dtype: torch.dtype) -> Plan:
    """What should be fast on an H200, where nothing was measured.

    An H200 delivers 4.3 TB/s some 700 ns after it is asked, so 23 KB must be on their way to each of
    132 processors, and each of those must have a program.

    fma: threads lie along k, 16 bytes each, so that weights and x meet in a thread without an exchange.
    Two of three stages under way are 32 KB per program. (With one stage ptxas spreads the loads among
    the arithmetic, and few are under way at a time.) Every program reads all of x: with 8 columns, two
    rows are a quarter on top of the weight, all of it out of L2. From three rows on the 16 or 32
    columns of dot cost less; its three of four stages are 24 to 48 KB of weights per program.
    """
    vector = 16 // dtype.itemsize
    span = triton.next_power_of_2(k)
    warps = max(1, min(4, span // (32 * vector)))
    return Plan(
        fma=Tile("fma", _block_n(n, 4, 8), warps * 32 * vector, warps, 3),
        dot=Tile("dot", _block_n(n, 16, 32), max(16, min(32 * vector, span)), 4, 4),
        fma_rows=2 if k % 8 == 0 else 0,  # loads of single elements take too many registers
        max_rows=MAX_ROWS,
    )


def _block_n(n: int, small: int, large: int) -> int:
    return large if triton.cdiv(n, large) >= _PROCESSORS else small


def candidates(dtype: torch.dtype) -> list[Tile]:
    """What ``tune`` tries."""
    vector = 16 // dtype.itemsize
    fma = [
        Tile("fma", block_n, warps * 32 * vector, warps, stages)
        for warps in (2, 4)
        for block_n in (4, 8, 16)
        for stages in (1, 3, 5)
    ]
    dot = [
        Tile("dot", block_n, spread * vector, 4, stages)
        for block_n in (16, 32, 64)
        for spread in (16, 32)
        for stages in (4, 6)
    ]
    return fma + dot


# x [rows, k], weight [n, k], None for cuBLAS -> x W^T: ``linear.product``.
Product = Callable[[torch.Tensor, torch.Tensor, Tile | None], torch.Tensor]
# Launches one after the other -> microseconds of one of them.
Timer = Callable[[Sequence[Callable[[], object]]], float]


def graph_time(launches: Sequence[Callable[[], object]], replays: int = 20) -> float:
    """Microseconds of one launch: the median over replays of a CUDA graph of all of them."""
    for launch in launches:
        launch()  # compiles outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(launches))
    return median(times)


def tune(
    shapes: Sequence[Shape], device: torch.device, product: Product, timer: Timer = graph_time
) -> dict[str, Any]:
    """Time every candidate against cuBLAS, for each shape and number of rows.

    Returns:
        The table of this device, to be written as JSON to ``table_path``.
    """
    entries = []
    for n, k, dtype in shapes:
        copies = min(_MAX_COPIES, math.ceil(_NO_CACHE / (n * k * dtype.itemsize)))
        weights = [torch.randn(n, k, device=device, dtype=dtype) for _ in range(copies)]
        times = {rows: _time_all(rows, weights, product, timer) for rows in MEASURED_ROWS}
        entries.append(_entry(n, k, dtype, decide(times)))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    made_with = {"torch": torch.__version__, "triton": triton.__version__}
    return {"device": name, **made_with, "shapes": entries}


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The table ``new`` with what only ``old`` has, if that was measured on this device and software."""
    made_by = ("device", "torch", "triton")
    if any(old.get(key) != new[key] for key in made_by):
        return dict(new)

    def shape(entry: Mapping[str, Any]) -> tuple[Any, ...]:
        return entry["n"], entry["k"], entry["dtype"]

    measured = {shape(entry) for entry in new["shapes"]}
    kept = [entry for entry in old["shapes"] if shape(entry) not in measured]
    return {**old, **new, "shapes": [*kept, *new["shapes"]]}


def _time_all(
    rows: int, weights: Sequence[torch.Tensor], product: Product, timer: Timer
) -> dict[Tile | None, float]:
    x = torch.randn(rows, weights[0].shape[1], device=weights[0].device, dtype=weights[0].dtype)
    # A graph takes some time to start: it should hold several launches.
    turns = [weights[i % len(weights)] for i in range(max(8, len(weights)))]
    times: dict[Tile | None, float] = {}
    for tile in (None, *candidates(x.dtype)):
        if tile is not None and tile.variant == "fma" and rows > MAX_FMA_ROWS:
            continue
        try:
            times[tile] = timer([partial(product, x, weight, tile) for weight in turns])
        except triton.runtime.errors.OutOfResources:
            times[tile] = math.inf
    return times


def decide(times: Mapping[int, Mapping[Tile | None, float]]) -> Plan:
    """The best plan by these times, of rows and then of tiles, None standing for cuBLAS.

    Of each variant the tile with the least time over all rows; then each variant up to the last number
    of rows before it first loses to the next.
    """
    fma, dot = (_fastest(times, variant) for variant in get_args(Variant))
    fma_rows = max_rows = 0
    for rows in sorted(times):
        with_fma, with_dot = times[rows].get(fma, math.inf), times[rows][dot]
        library = times[rows][None]
        if fma_rows == max_rows and with_fma <= min(with_dot, library):
            fma_rows = max_rows = rows
        elif with_dot <= library:
            max_rows = rows
        else:
            break
    return Plan(fma, dot, fma_rows, max_rows)


def _fastest(times: Mapping[int, Mapping[Tile | None, float]], variant: Variant) -> Tile:
    sums: dict[Tile, float] = {}
    for of_rows in times.values():
        for tile, time in of_rows.items():
            if tile is not None and tile.variant == variant:
                sums[tile] = sums.get(tile, 0.0) + time
    return min(sums, key=lambda tile: sums[tile])


def _entry(n: int, k: int, dtype: torch.dtype, plan: Plan) -> dict[str, Any]:
    entry = {"n": n, "k": k, "dtype": str(dtype).removeprefix("torch."), **asdict(plan)}
    for variant in get_args(Variant):
        tile = getattr(plan, variant)._asdict()
        del tile["variant"]
        entry[variant] = tile
    return entry
