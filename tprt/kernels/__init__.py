"""The operations layers call, and which body serves them: decided once, where a layer is made.

``reference`` is plain torch, for any device, and the oracle of the others; ``cpu`` is what CPUs run,
``triton`` what GPUs run. The latter also runs on a CPU in Triton's interpreter, for tests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from tprt.errors import ConfigError
from tprt.kernels.cpu import CPUKernels
from tprt.kernels.interface import (
    Activations,
    AttentionPlan,
    AttentionPlanner,
    HeadNorms,
    Kernels,
    Noise,
    Norm,
    SparseWeight,
)
from tprt.kernels.recurrence import RecurrenceWeights
from tprt.kernels.reference import ReferenceKernels, prepare_rms

__all__ = [
    "Activations",
    "AttentionPlan",
    "AttentionPlanner",
    "HeadNorms",
    "Kernels",
    "Noise",
    "Norm",
    "RecurrenceWeights",
    "SparseWeight",
    "kernels_for",
    "prepare_rms",
    "use_kernels",
]


@dataclass(frozen=True)
class _Choice:
    name: str
    sparse_rows: int | None = None
    fused: bool = True
    made: dict[str, Kernels] = field(default_factory=dict)  # by device; layers share one


_choice: ContextVar[_Choice | None] = ContextVar("kernels", default=None)


@contextmanager
def use_kernels(name: str, sparse_rows: int | None = None, fused: bool = True) -> Iterator[None]:
    """Layers made inside share one body.

    Args:
        name: "auto", "reference" or "triton".
        sparse_rows: as in ``Kernels``. fused: as in ``TritonKernels``.
    """
    token = _choice.set(_Choice(name, sparse_rows, fused))
    try:
        yield
    finally:
        _choice.reset(token)


def kernels_for(device: torch.device) -> Kernels:
    """The body for tensors on ``device``: what ``use_kernels`` says, else the fastest one there.

    Raises:
        ConfigError: Triton was asked for where it cannot run.
    """
    choice = _choice.get() or _Choice("auto")
    if str(device) not in choice.made:
        choice.made[str(device)] = _make(choice, device)
    return choice.made[str(device)]


def _make(choice: _Choice, device: torch.device) -> Kernels:
    if choice.name == "reference" or device.type == "meta":
        return ReferenceKernels()
    if choice.name == "auto" and device.type == "cpu":
        return CPUKernels(choice.sparse_rows)
    return _triton(choice, device)


def _triton(choice: _Choice, device: torch.device) -> Kernels:
    try:
        from tprt.kernels.triton_ops import TritonKernels
    except ImportError as error:
        raise ConfigError(
            f"Triton cannot be imported: {error}",
            hint="pip install triton, or engine.kernels=reference",
        ) from error
    return TritonKernels(device, choice.sparse_rows, choice.fused)
