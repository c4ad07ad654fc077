"""Kernels of recurrent layers against their plain bodies; in the interpreter where there is no GPU."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from tprt.batch import Segments  # noqa: E402
from tprt.kernels import Norm, RecurrenceWeights  # noqa: E402
from tprt.kernels import recurrence as plain  # noqa: E402
from tprt.kernels.reference import ReferenceKernels  # noqa: E402
from tprt.kernels.triton_ops import recurrence as kernels  # noqa: E402
from tprt.kernels.triton_ops.gate import gelu_gate  # noqa: E402
from tprt.kernels.triton_ops.norm import add_layer_norm, layer_norm  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TAPS, SLOTS = 4, 24
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-2}


def make(heads: int, block: int, dtype: torch.dtype, seed: int = 0) -> RecurrenceWeights:
    generator = torch.Generator().manual_seed(seed)
    width = heads * block

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    decay = -8 * torch.nn.functional.softplus(randn(width) - 3)
    return RecurrenceWeights(
        randn(width, TAPS, scale=0.5).to(DEVICE, dtype),
        randn(width, scale=0.1).to(DEVICE, dtype),
        randn(heads, block, 2 * block, scale=block**-0.5).to(DEVICE, dtype),
        randn(heads, 2 * block, scale=0.5).to(DEVICE),
        decay.to(DEVICE),
    )


def caches(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What other sequences have left, NaN and all."""
    state = torch.full((SLOTS, width), float("nan"), device=DEVICE)
    return state, torch.full((SLOTS, TAPS, width), float("nan"), dtype=dtype, device=DEVICE)


def segments(rows: list[tuple[int, int, int]], decode: bool) -> Segments:
    """Of (slot, first position, tokens)."""
    return Segments(
        slots=torch.tensor([slot for slot, _, _ in rows], device=DEVICE),
        positions=torch.cat([torch.arange(p, p + n) for _, p, n in rows]).to(DEVICE),
        query_lens=tuple(n for _, _, n in rows),
        starts=None if decode else tuple(p for _, p, _ in rows),
    )


def run_both(passes, weights: RecurrenceWeights, dtype: torch.dtype) -> None:
    """The same passes through both bodies, each with caches of its own; all results and states agree."""
    width, tolerance = weights.log_decay.numel(), TOLERANCE[dtype]
    mine, theirs = caches(width, dtype), caches(width, dtype)
    generator = torch.Generator().manual_seed(1)
    for rows, decode in passes:
        seg = segments(rows, decode)
        xy = torch.randn(len(seg.positions), 2 * width, generator=generator).to(DEVICE, dtype)
        expected = plain.recurrence(xy, weights, *theirs, seg, plain.scan_by_step)
        found = kernels.recurrence(xy, weights, *mine, seg)
        assert found.dtype == dtype
        assert (found.float() - expected.float()).abs().max() < tolerance
        used = seg.slots
        assert torch.equal(mine[1][used].nan_to_num(7.0), theirs[1][used].nan_to_num(7.0))
        assert (mine[0][used] - theirs[0][used]).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "block"), [(3, 16), (2, 64), (1, 24)])
def test_prompts_and_steps(heads, block, dtype):
    """Chunks shorter than the convolution and longer than a tile of the scan; then single tokens."""
    rows = [(3, 0, 70), (7, 0, 1), (0, 0, 2), (20, 0, 33)]
    passes = [(rows, False)]
    at = {slot: n for slot, _, n in rows}
    for counts in ((1, 3, 1, 40), (5, 1, 65, 1)):
        rows = [(slot, at[slot], n) for (slot, _, _), n in zip(rows, counts, strict=True)]
        passes.append((rows, False))
        at |= {slot: p + n for slot, p, n in rows}
    for _ in range(TAPS + 1):
        rows = [(slot, p, 1) for slot, p in at.items()]
        passes.append((rows, True))
        at = {slot: p + 1 for slot, p in at.items()}
    run_both(passes, make(heads, block, dtype), dtype)


@pytest.mark.parametrize("rows", [1, 2, 16, 19])
def test_steps_from_the_first_token_on(rows):
    """Rows past a program's 16, each at a position of its own."""
    weights = make(2, 32, torch.float32)
    passes = [([(slot, 0, 1 + slot % 5) for slot in range(rows)], False)]
    for step in range(3):
        passes.append(([(slot, 1 + slot % 5 + step, 1) for slot in range(rows)], True))
    run_both(passes, weights, torch.float32)
    run_both([([(slot, 0, 1) for slot in range(rows)], True)], weights, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 96, 1500])
def test_gated_gelu(width, dtype):
    x = (4 * torch.randn(5, 2 * width, generator=torch.Generator().manual_seed(width))).to(
        DEVICE, dtype
    )
    gate, up = x.double().chunk(2, dim=1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    found = gelu_gate(x)
    error = (found.double() - expected).abs() / (1 + expected.abs())
    assert found.dtype == dtype and error.max() < TOLERANCE[dtype] / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [48, 2560])
def test_rms_norms(width, dtype):
    """Of a row, and of a sum; with weights near -1, where 1 + weight is what counts."""
    generator = torch.Generator().manual_seed(width)
    x, residual, bias = (torch.randn(n, width, generator=generator) for n in (3, 3, 1))
    x, residual, bias = (each.to(DEVICE, dtype) for each in (x, residual, bias[0]))
    weight = (torch.randn(width, generator=generator) - 1).to(DEVICE, dtype)
    norm = Norm(weight, None, 1e-6)
    reference = ReferenceKernels()
    assert torch.allclose(layer_norm(x, norm), reference.layer_norm(x, norm), 1e-2, 1e-6)
    total, normed = add_layer_norm(x.float(), bias, residual, norm)
    expected = (residual.float() + (x.float() + bias.float())).to(dtype)
    assert torch.equal(total, expected)
    assert torch.allclose(normed, reference.layer_norm(expected, norm), 1e-2, 1e-6)


@triton.jit
def one_minus_exp_kernel(y_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, kernels._one_minus_exp(tl.load(y_ptr + at)))


def test_decays_near_one_keep_their_digits():
    """1 - a^2 of slow channels, where the plain difference of float32 has none left."""
    y = -torch.logspace(-9, 1, 256, dtype=torch.float64)
    given = y.float().to(DEVICE)
    out = torch.empty_like(given)
    one_minus_exp_kernel[(1,)](given, out, SIZE=256)
    exact = -torch.expm1(given.cpu().double())
    assert ((out.cpu().double() - exact).abs() / exact).max() < 5e-7
