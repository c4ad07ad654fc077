"""The product that reads only rows of W which meet something else than zeros: against its dense twin.

On a GPU the compiled kernel is tested, elsewhere the interpreted one.
"""

import pytest
import torch

pytest.importorskip("triton")

from tprt.kernels.triton_ops import sparse_linear as sparse

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
ROUNDING = {F32: 1e-5, BF16: 2**-8 * 1.02, F16: 2**-11 * 1.02}
NAN, INF = float("nan"), float("inf")
COUNTERS = sparse.make_counters(DEVICE)


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Memory that a kernel does not write is NaN; and every call leaves the counters at 0."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(NAN))
    yield
    assert not COUNTERS.any()


def randn(*shape, dtype=F32, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def activations(rows, neurons, live, dtype=F32, seed=5):
    """What squared ReLU leaves: of each row a share of ``live`` is not 0."""
    chance = torch.rand(rows, neurons, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return randn(rows, neurons, dtype=dtype, seed=seed).square() * (chance < live)


def both(x, weight, *more):
    """The product with skipping and without: one tensor, as they are the same."""
    found, dense = (sparse.product(x, weight, COUNTERS, skip, *more) for skip in (True, False))
    torch.testing.assert_close(found, dense, rtol=0, atol=0, equal_nan=True)
    return found


@DTYPES
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("neurons, width", [(1, 1), (70, 24), (300, 300), (7, 600)])
def test_product(neurons, width, rows, dtype):
    """Sizes that divide by nothing, several groups of neurons and blocks of columns among them."""
    x, weight = activations(rows, neurons, 0.2, dtype), randn(neurons, width, dtype=dtype)
    found, exact = both(x, weight), x.double() @ weight.double()
    assert found.dtype == dtype
    allowed = ROUNDING[dtype] * exact.abs() + 1e-5 * neurons**0.5
    assert ((found.double() - exact).abs() <= allowed).all()
    unrounded = both(x, weight, None, None, F32)
    assert unrounded.dtype == F32
    assert torch.equal(unrounded.to(dtype), found)


@pytest.mark.parametrize("neurons_per_warp", [8, 64])
def test_groups_of_any_size(neurons_per_warp, monkeypatch):
    """40 groups: more than are read at once, and all bits of a number in use."""
    monkeypatch.setattr(sparse, "_neurons_per_warp", lambda neurons, blocks: neurons_per_warp)
    neurons = 39 * 8 * neurons_per_warp + 5
    x, weight = activations(2, neurons, 0.05), randn(neurons, 8)
    x[0, 63], x[0, 511], x[1, neurons - 1] = 1.0, -2.0, 3.0
    torch.testing.assert_close(both(x, weight), x @ weight, rtol=1e-5, atol=1e-4)


def test_live_shares_from_none_to_all():
    weight = randn(100, 40, dtype=BF16)
    for rows in range(1, sparse.MAX_ROWS + 1):
        x = activations(rows, 100, 0.1, BF16, seed=rows)
        x[-1] = 0
        if rows > 2:
            x[0], x[1] = randn(100, seed=rows), 0
            x[1, 99] = 2.0
        found = both(x, weight)
        assert not found[-1].any()
        assert rows <= 2 or torch.equal(found[1], 2 * weight[99])


def test_dead_rows_are_not_read_and_never_added():
    """NaN in W shows who was read; an element that is 0 meets none, though another row is alive."""
    x, weight = activations(3, 500, 0.1, BF16), randn(500, 30, dtype=BF16)
    expected = both(x, weight)
    dead = (x == 0).all(dim=0)
    assert dead.any()
    weight[dead] = NAN
    assert torch.equal(both(x, weight), expected)
    weight[(x[1] == 0) & (x[0] != 0)] = INF
    found = both(x, weight)
    assert torch.equal(found[1], expected[1]) and not found[0].isfinite().any()


def test_what_is_not_a_number_is_alive():
    x, weight = activations(2, 200, 0.1), randn(200, 24)
    expected = both(x, weight)
    for value in (NAN, INF):
        x[1, 77] = value
        found = both(x, weight)
        assert torch.equal(found[0], expected[0]) and not found[1].isfinite().any()
    assert torch.equal(both(-x[:1], weight), -expected[:1]), "less than 0 is alive as well"


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_a_row_has_the_same_bits_alone_and_among_others(dtype):
    x, weight = activations(16, 200, 0.3, dtype), randn(200, 40, dtype=dtype)
    together = both(x, weight)
    for rows in (1, 3, 15):
        for first in {0, 16 - rows}:
            alone = sparse.product(x[first : first + rows], weight, COUNTERS, True)
            assert torch.equal(alone, together[first : first + rows])


@DTYPES
def test_bias_and_residual_enter_before_the_only_rounding(dtype):
    x, weight = activations(3, 130, 0.2, dtype), randn(130, 44, dtype=dtype)
    bias = randn(44, dtype=dtype, seed=3)
    residual = torch.full((3, 60), NAN, dtype=dtype, device=DEVICE)[:, 7:51]
    residual.copy_(randn(3, 44, dtype=dtype, seed=4))
    y = both(x, weight, None, None, F32)
    expected = (residual.float() + (y + bias.float())).to(dtype)
    assert torch.equal(both(x, weight, bias, residual), expected)


def test_repeated_calls_agree_and_leave_the_counters_at_0():
    x, weight = activations(2, 130, 0.2, BF16), randn(130, 520, dtype=BF16)
    expected = both(x, weight)
    for _ in range(10 if DEVICE.type == "cpu" else 1000):
        assert torch.equal(sparse.product(x, weight, COUNTERS, True), expected)
        assert not COUNTERS.any()


@pytest.mark.parametrize("sparse_rows", [0, 4, 16, 100])
def test_who_computes_follows_from_the_number_of_rows(sparse_rows):
    weight = randn(40, 24)
    for rows in range(19):
        dense = False if 0 < rows <= sparse.MAX_DENSE_ROWS else None
        skips = 0 < rows <= min(sparse_rows, 16)
        assert sparse.skips(rows, weight, sparse_rows) is (True if skips else dense)
