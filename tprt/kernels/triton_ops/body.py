"""``TritonKernels``: every operation of ``interface.Kernels``, from the kernels beside this file."""

import torch

from tprt.kernels.reference import ReferenceKernels


class TritonKernels(ReferenceKernels):
    """See ``interface.Kernels``. What is not overridden runs as plain torch.

    Args:
        device: a GPU, or the CPU under TRITON_INTERPRET=1.
    """

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
