"""Programmatic dependent launch: a kernel may start while the one before it still runs.

Such a kernel waits, by ``pdl_wait``, until everything before it has ended and can be seen. What it does
ahead of that must be true whatever earlier kernels do: it may read weights, which nobody writes, and
must write nothing, since an earlier kernel may still read what is there. Every kernel launched with
these options waits, without exception: one that did not would let its successor run while its
predecessors still do.

The variable TPRT_PDL=0 launches kernels one after the other, to tell whose fault something is.
"""

import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl


@cache
def pdl_options(device: torch.device) -> dict[str, Any]:
    """For a launch on ``device``: the kernel's PDL, and what tells the driver; from Hopper on."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    able = able and os.environ.get("TPRT_PDL") != "0"
    return {"PDL": True, "launch_pdl": True} if able else {"PDL": False}


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """What kernels before this one wrote is there from here on, and they read nothing any more."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def pdl_launch_dependents(PDL: tl.constexpr):
    """The next kernel may start as soon as all programs of this one have come here."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
