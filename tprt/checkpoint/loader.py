"""Fills the parameters of one rank from a reader, strictly.

Each parameter carries a ``ShardSpec`` that says which blocks of the whole tensor it holds. This file
knows nothing else of models and nothing of layouts; how bytes travel is the business of ``streaming``.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
from torch import nn

from tprt.checkpoint.block_files import split
from tprt.checkpoint.reader import EMBEDDING, HEAD, CheckpointReader, listed
from tprt.checkpoint.staging_ring import Part, StreamSettings
from tprt.checkpoint.streaming import LoadStats, NotFinite, Streamer
from tprt.distributed.sharding import Piece, ShardSpec, Slices, shard_spec
from tprt.errors import CheckpointError
from tprt.faults import fault_point


@dataclass(frozen=True)
class _Fill:
    """A parameter, and the name of the tensor it is filled from."""

    parameter: torch.Tensor
    source: str
    spec: ShardSpec


def load_weights(
    model: nn.Module,
    reader: CheckpointReader,
    settings: StreamSettings | None = None,
    tick: Callable[[str], None] | None = None,
) -> LoadStats:
    """Fill every parameter of ``model`` from ``reader``, converting to the parameter's dtype.

    Several threads read, each only bytes of this rank's blocks; all are gone when this returns.

    Args:
        model: its parameters have Hugging Face's names and a ``shard_spec`` each, and lie on one
            device.
        settings: None takes what suits the device and the size.
        tick: called before each part is read, with the names of tensor and file.

    Raises:
        CheckpointError: a parameter has no tensor, a tensor no parameter, the shapes of the whole
            tensors differ, a file cannot be read or has changed, or a value is NaN or infinite after
            conversion. Names are listed, 20 at most; of values and files, the first in the model's
            order.
    """
    parameters = dict(model.named_parameters())
    sources = {name: name for name in parameters}
    if reader.config.tie_word_embeddings and HEAD in parameters:
        sources[HEAD] = EMBEDDING
    on_disk = set(reader.names())
    _check_names(reader, sources, on_disk)
    _check_shapes(reader, {name: _spec(parameters[name], name) for name in sources}, sources)
    fills = [_Fill(p.detach(), sources[n], _spec(p, n)) for n, p in parameters.items()]
    return _Load(fills, reader, settings, tick or (lambda _: None)).run()


class _Load:
    """One load: cuts parameters into parts for the streamer, and tells its failures."""

    def __init__(
        self,
        fills: list[_Fill],
        reader: CheckpointReader,
        settings: StreamSettings | None,
        tick: Callable[[str], None],
    ) -> None:
        self.fills, self.reader, self.tick = fills, reader, tick
        devices = {fill.parameter.device for fill in fills}
        assert len(devices) == 1, devices
        self.device = devices.pop()
        sizes = [f.spec.needed_bytes(reader.stored_dtype(f.source).itemsize) for f in fills]
        self.settings = settings or StreamSettings.default(self.device, sum(sizes))

    def run(self) -> LoadStats:
        before = self.reader.bytes_read
        with Streamer(self.device, self.settings) as streamer:
            failure = streamer.run(self._parts())
            read_s, copy_s = streamer.read_s, streamer.ring.copy_s
        if failure is not None:
            order, error = failure
            if isinstance(error, NotFinite):
                _refuse_values(self.reader, self.fills[order])
            raise error
        return LoadStats(read_s, copy_s, self.reader.bytes_read - before)

    def _parts(self) -> Iterator[Part]:
        for order, fill in enumerate(self.fills):
            fault_point("load")
            local = fill.parameter.t() if fill.spec.transposed else fill.parameter
            blocks = [(piece, local[piece.local]) for piece in fill.spec.pieces]
            if sum(block.numel() for _, block in blocks) < local.numel():
                local.zero_()  # padding
            for piece, block in blocks:
                if block.numel():
                    yield from self._cut(order, fill, piece, block)

    def _cut(self, order: int, fill: _Fill, piece: Piece, local: torch.Tensor) -> Iterator[Part]:
        """What fills ``local``, which is a piece of the parameter, in parts of one buffer each."""
        located = self.reader.locate(fill.source, piece.canonical)
        path = located[0][0].path if located else self.reader.path
        said = f"reading {fill.source} from {path}"
        self.tick(said)
        if located is None:
            read = partial(self.reader.read, fill.source, piece.canonical)
            yield Part(order, fill.source, local, False, None, read)
            return
        in_place = (
            self.settings.in_place
            and self.device.type == "cpu"
            and not fill.spec.transposed
            and local.dim() == len(piece.canonical)
        )
        for block, place in located:
            direct = in_place and local.dtype == block.dtype
            target = _at(local, place)
            for inner in split(block.shape, self.settings.buffer_bytes // block.dtype.itemsize):
                self.tick(said)
                yield Part(order, fill.source, _at(target, inner), direct, block.part(inner))


def _at(tensor: torch.Tensor, slices: Slices) -> torch.Tensor:
    """A block of the last dimensions."""
    return tensor[(slice(None),) * (tensor.dim() - len(slices)) + slices]


def _spec(parameter: nn.Parameter, name: str) -> ShardSpec:
    spec = shard_spec(parameter)
    assert tuple(parameter.shape) == spec.parameter_shape, name
    return spec


def _check_names(reader: CheckpointReader, sources: dict[str, str], on_disk: set[str]) -> None:
    missing = [name for name, source in sources.items() if source not in on_disk]
    left_over = on_disk - set(sources.values())
    problems = []
    if missing:
        problems.append(f"{len(missing)} parameters have no tensor: {listed(missing)}")
    if left_over:
        problems.append(f"{len(left_over)} tensors have no parameter: {listed(left_over)}")
    if problems:
        raise CheckpointError(
            "model and checkpoint do not match; " + "; ".join(problems),
            where=str(reader.path),
            hint="tprt inspect shows what the checkpoint holds",
        )


def _check_shapes(
    reader: CheckpointReader, specs: dict[str, ShardSpec], sources: dict[str, str]
) -> None:
    wrong = [
        f"{name} {list(reader.shape(sources[name]))} instead of {list(spec.canonical_shape)}"
        for name, spec in specs.items()
        if tuple(reader.shape(sources[name])) != tuple(spec.canonical_shape)
    ]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors have another shape than the model: {listed(wrong)}",
            where=str(reader.path),
            hint="tprt inspect shows what the checkpoint holds",
        )


def _refuse_values(reader: CheckpointReader, fill: _Fill) -> NoReturn:
    name, dtype = fill.source, fill.parameter.dtype
    if all(_finite(reader.read(name, piece.canonical)) for piece in fill.spec.pieces):
        raise CheckpointError(
            f"{name} holds values past {torch.finfo(dtype).max:g}, the largest {dtype} can hold",
            where=str(reader.path),
            hint="--dtype bfloat16 or float32",
        )
    raise CheckpointError(
        f"{name} holds NaN or infinite values",
        where=str(reader.path),
        hint="the checkpoint again from its source; verify: full tells damage from bad training",
    )


def _finite(block: torch.Tensor) -> bool:
    """NaN and infinities show in the extremes."""
    return all(map(math.isfinite, torch.aminmax(block)))
