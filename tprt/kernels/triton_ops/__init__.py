"""The bodies for GPUs, in Triton: sums in float32 in a fixed order, the same bits in every run.

Without a GPU they run in Triton's interpreter (TRITON_INTERPRET=1), which shows what they compute and
nothing about races or speed.
"""

from tprt.kernels.triton_ops.body import TritonKernels

__all__ = ["TritonKernels"]
