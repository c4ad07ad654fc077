"""Fills the parameters of one rank from a reader, strictly.

Each parameter carries a ``ShardSpec`` that says which blocks of the whole tensor it holds. This file
knows nothing else of models and nothing of layouts.
"""

import torch
from torch import nn

from tprt.checkpoint.reader import EMBEDDING, HEAD, CheckpointReader, listed
from tprt.distributed.sharding import ShardSpec, shard_spec
from tprt.errors import CheckpointError


def load_weights(model: nn.Module, reader: CheckpointReader) -> None:
    """Fill every parameter of ``model`` from ``reader``, converting to the parameter's dtype.

    Args:
        model: its parameters have Hugging Face's names and a ``shard_spec`` each.

    Raises:
        CheckpointError: a parameter has no tensor, a tensor no parameter, the shapes of the whole
            tensors differ, or a value is NaN or infinite after conversion. Names are listed, 20 at
            most.
    """
    parameters = dict(model.named_parameters())
    sources = {name: name for name in parameters}
    if reader.config.tie_word_embeddings and HEAD in parameters:
        sources[HEAD] = EMBEDDING
    on_disk = set(reader.names())
    _check_names(reader, sources, on_disk)
    _check_shapes(reader, {name: _spec(parameters[name], name) for name in sources}, sources)
    for name, parameter in parameters.items():
        source = sources[name]
        spec = _spec(parameter, name)
        with torch.no_grad():
            spec.load(parameter, lambda slices, source=source: reader.read(source, slices))  # type: ignore[misc]
        if not _finite(parameter):
            _refuse_values(reader, source, spec, parameter.dtype)


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


def _finite(parameter: torch.Tensor) -> bool:
    """NaN and infinities show in the extremes; this makes no copy of the parameter."""
    if parameter.numel() == 0:
        return True
    low, high = torch.aminmax(parameter.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _refuse_values(
    reader: CheckpointReader, name: str, spec: ShardSpec, dtype: torch.dtype
) -> None:
    stored_finite = all(_finite(reader.read(name, piece.canonical)) for piece in spec.pieces)
    if stored_finite:
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
