"""The operations layers call, and which body serves them: decided once, where a layer is made.

``reference`` is plain torch, for any device, and the oracle of the others; ``cpu`` is what CPUs run,
``triton`` what GPUs run. The latter also runs on a CPU in Triton's interpreter, for tests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from tprt.errors import ConfigError
from tprt.kernels.cpu import CPUKernels
from tprt.kernels.interface import AttentionPlan, AttentionPlanner, HeadNorms, Kernels, Noise, Norm
from tprt.kernels.reference import ReferenceKernels

__all__ = [
    "AttentionPlan",
    "AttentionPlanner",
    "HeadNorms",
    "Kernels",
    "Noise",
    "Norm",
    "kernels_for",
    "use_kernels",
]

_choice: ContextVar[str] = ContextVar("kernels", default="auto")


@contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """Layers made inside get the body ``name``: "auto", "reference" or "triton"."""
    token = _choice.set(name)
    try:
        yield
    finally:
        _choice.reset(token)


def kernels_for(device: torch.device) -> Kernels:
    """The body for tensors on ``device``: what ``use_kernels`` says, else the fastest one there.

    Raises:
        ConfigError: Triton was asked for where it cannot run.
    """
    name = _choice.get()
    if name == "reference" or device.type == "meta":
        return ReferenceKernels()
    if name == "auto" and device.type == "cpu":
        return CPUKernels()
    return _triton(device)


def _triton(device: torch.device) -> Kernels:
    try:
        from tprt.kernels.triton_ops import TritonKernels
    except ImportError as error:
        raise ConfigError(
            f"Triton cannot be imported: {error}",
            hint="pip install triton, or engine.kernels=reference",
        ) from error
    return TritonKernels(device)
