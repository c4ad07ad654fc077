"""What a gated MLP does between its projections: GELU of one half of the columns times the other."""

import torch
import triton
import triton.language as tl

from tprt.kernels.triton_ops.numerics import gelu, round_to
from tprt.kernels.triton_ops.pdl import pdl_launch_dependents, pdl_options, pdl_wait

COLUMNS = 1024  # of a program


def gelu_gate(x: torch.Tensor) -> torch.Tensor:
    """[T, 2 F] -> gelu(x[:, :F]) * x[:, F:], rounded once."""
    rows, width = len(x), x.shape[1] // 2
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    block = min(COLUMNS, triton.next_power_of_2(width))
    _gelu_gate_kernel[(rows, triton.cdiv(width, block))](
        x, out, width, x.stride(0), BLOCK=block, num_warps=4, **pdl_options(x.device)
    )
    return out


@triton.jit
def _gelu_gate_kernel(
    x_ptr, out_ptr, width, row_stride, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    pdl_launch_dependents(PDL)
    pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(x_ptr + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * row_stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    y = round_to(gelu(gate) * up, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + columns, y, mask=inside)
