"""Which neurons of an MLP fire: what squared ReLU leaves of them, looked at from outside.

A forward hook on the first projection of each MLP; engine and model stay as they are. Hooks run where
Python does, so decode steps that are to be seen must not be a graph's: ``without_graphs``. Knows models,
runners and kernels; no files.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch

from tprt.engine.model_runner import ModelRunner
from tprt.errors import ConfigError
from tprt.kernels import Kernels
from tprt.models import CausalLM
from tprt.models.persimmon import PersimmonDecoderLayer, PersimmonForCausalLM

See = Callable[[int, torch.Tensor], None]


@contextmanager
def watched(model: CausalLM, see: See) -> Iterator[None]:
    """Inside, ``see`` gets each layer's number and its activations [T, neurons of this rank]."""

    def hook_of(number: int) -> Callable[[Any, Any, Any], None]:
        return lambda module, inputs, out: see(number, out)

    with ExitStack() as stack:
        for number, layer in enumerate(decoder_layers(model)):
            handle = layer.mlp.dense_h_to_4h.register_forward_hook(hook_of(number))
            stack.callback(handle.remove)
        yield


@contextmanager
def without_graphs(runner: ModelRunner) -> Iterator[None]:
    """Decode steps operation by operation, without rows of padding. No step may be in flight."""
    graphs, runner.graphs = runner.graphs, None
    try:
        yield
    finally:
        runner.graphs = graphs


class LiveShares:
    """Means over layers and steps; give ``see`` to ``watched``.

    Attributes:
        zeros: share of activations that are exactly 0.
        live: share of neurons that any row of a step left above 0, and which so must be read.
    """

    def __init__(self) -> None:
        self._zeros: list[torch.Tensor] = []
        self._live: list[torch.Tensor] = []

    def see(self, layer: int, activations: torch.Tensor) -> None:
        fires = activations != 0  # NaN does
        self._zeros.append((~fires).float().mean())
        self._live.append(fires.any(0).float().mean())

    @property
    def zeros(self) -> float:
        return float(torch.stack(self._zeros).mean())

    @property
    def live(self) -> float:
        return float(torch.stack(self._live).mean())


def decoder_layers(model: CausalLM) -> list[PersimmonDecoderLayer]:
    if not isinstance(model, PersimmonForCausalLM):
        raise ConfigError(
            f"a model of type {model.config.model_type} has no squared ReLU to look at",
            hint="a Persimmon model",
        )
    return cast("list[PersimmonDecoderLayer]", list(model.model.layers))


def kernels_of(model: CausalLM) -> Kernels:
    """The body that all layers share."""
    return decoder_layers(model)[0].mlp.dense_4h_to_h.kernels


@torch.inference_mode()
def skips(model: CausalLM, rows: int) -> bool:
    """Whether products of so many rows leave unread what meets zeros, as settings and device are now.

    Tried out: zeros times a matrix of NaN are NaN where the matrix was read.
    """
    weight = next(model.parameters())
    kernels, side = kernels_of(model), 64
    nan = torch.full((side, side), float("nan"), dtype=weight.dtype, device=weight.device)
    x = torch.zeros(rows, side, dtype=weight.dtype, device=weight.device)
    return bool(kernels.sparse_linear(x, kernels.pack_sparse(nan)).isfinite().all())
