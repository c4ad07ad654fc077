"""Host to device and back without making the host wait. Knows tensors and devices only."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tprt.errors import StepTimeout

SPIN_SECONDS = 0.002  # a step that ends within this is not worth a sleep


def staged(words: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """A copy of ``words`` on the host from which ``device`` can be filled without waiting."""
    host = torch.from_numpy(np.array(words, dtype=np.int64, order="C"))
    # Pageable memory would make the copy wait for everything before it. torch keeps pinned memory
    # until the copies from it are over.
    return host.pin_memory() if device.type == "cuda" else host


def upload(words: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """``words`` on ``device``, in stream order; the host may go on, and reuse ``words``."""
    return staged(words, device).to(device, non_blocking=True)


@dataclass(frozen=True)
class Download:
    """Tensors on their way to the host; valid once ``wait`` has returned."""

    tensors: tuple[torch.Tensor, ...]
    done: torch.cuda.Event | None

    def wait(self, what: str, seconds: float, check: Callable[[], None] | None = None) -> None:
        """Raises StepTimeout, naming ``what``, when the device has not come this far in ``seconds``.

        Args:
            check: called while there is time; what it raises ends the wait.
        """
        if self.done is None or self.done.query():  # type: ignore[no-untyped-call]
            return
        began = time.monotonic()
        while not self.done.query():  # type: ignore[no-untyped-call]
            waited = time.monotonic() - began
            if waited > seconds:
                raise StepTimeout(
                    f"{what} is not done after {seconds:g} s",
                    hint="another rank is stuck or gone, or the step is really that long: "
                    "a larger engine.step_timeout",
                )
            if waited > SPIN_SECONDS:
                time.sleep(50e-6)
                if check is not None:
                    check()


def download(tensors: tuple[torch.Tensor, ...]) -> Download:
    """Copies of ``tensors`` on the host, in stream order: what is written to them later stays out."""
    if all(tensor.device.type != "cuda" for tensor in tensors):
        return Download(tuple(tensor.clone() for tensor in tensors), None)
    # With non_blocking torch takes pinned memory, and keeps it until the copy is over.
    host = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()
    return Download(host, done)
