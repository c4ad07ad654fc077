"""The dense operations of the Triton body against float64 and the plain body; their tables of tiles.

On a GPU the compiled kernels are tested, elsewhere the interpreted ones.
"""

import json

import pytest
import torch

pytest.importorskip("triton")
import triton

from tprt.errors import ConfigError
from tprt.kernels import HeadNorms, Norm, SparseWeight, kernels_for, use_kernels
from tprt.kernels.interface import PendingNorm
from tprt.kernels.reference import FP16_MAX, ReferenceKernels
from tprt.kernels.triton_ops import TritonKernels, linear, norm, pdl, rotary, tiles
from tprt.kernels.triton_ops.tiles import Plan, Tile, Tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = ReferenceKernels()
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
# Relative: one rounding to the dtype, with a little for the float32 arithmetic before it.
ROUNDING = {F32: 1e-5, BF16: 2**-8 * 1.02, F16: 2**-11 * 1.02}
FMA, DOT = Tile("fma", 4, 64, 2, 1), Tile("dot", 16, 32, 4, 3)
TILES = pytest.mark.parametrize("tile", [FMA, DOT], ids=["fma", "dot"])
CUBLAS = Tiles({})
CUBLAS.choose = lambda *sizes: None
NAN = float("nan")
EPS = 1e-5


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel allocates and does not write is NaN, not the result of a call before.

    By then weights are there: kernels may read them before what was launched earlier has ended.
    """
    empty = torch.empty

    def filled(*args, **kwargs):
        out = empty(*args, **kwargs)
        out = out.fill_(NAN) if out.is_floating_point() else out
        wait_for_device()
        return out

    monkeypatch.setattr(torch, "empty", filled)


def wait_for_device():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def randn(*shape, dtype=F32, seed=0):
    """Values, and a dtype they fit in."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    wait_for_device()
    return values


def inside(*shape, dtype=F32, seed=0):
    """A view into memory that is NaN all around: beside each row, before the first, after the last."""
    rows, width = shape
    memory = torch.full((rows + 2, width + 5), NAN, dtype=dtype, device=DEVICE)
    view = memory[1:-1, 3 : 3 + width]
    view.copy_(randn(*shape, dtype=dtype, seed=seed))
    return view


def norm_of(width, dtype, seed=7):
    return Norm(randn(width, dtype=dtype, seed=seed), randn(width, dtype=dtype, seed=seed + 1), EPS)


def assert_rounded(found, exact, scale=1.0):
    """Within one rounding of ``exact``, float64; of sums that cancel, of ``scale`` instead."""
    assert found.isfinite().all()
    allowed = ROUNDING[found.dtype] * exact.abs() + 1e-5 * scale
    worst = ((found.double() - exact).abs() - allowed).max()
    assert worst <= 0, f"{worst} more than allowed"


def exact_norm(x, norm):
    x = x.double()
    return torch.layer_norm(x, (x.shape[1],), norm.weight.double(), norm.bias.double(), norm.eps)


@DTYPES
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 7), (2, 64), (1, 100), (3, 1000), (1, 5000)])
def test_layer_norm(rows, width, dtype):
    x, n = inside(rows, width, dtype=dtype), norm_of(width, dtype)
    found = norm.layer_norm(x, n)
    assert found.dtype == dtype and found.is_contiguous()
    assert_rounded(found, exact_norm(x, n), scale=10)


def test_layer_norm_of_values_far_from_zero():
    """The mean is taken off before squaring: E[x^2] - E[x]^2 of these is noise."""
    x, n = randn(2, 500) + 3000, norm_of(500, F32)
    assert_rounded(norm.layer_norm(x, n), exact_norm(x, n), scale=1000)


@DTYPES
@pytest.mark.parametrize("x_is_float32", [True, False])
@pytest.mark.parametrize("rows, width", [(1, 1), (2, 33), (3, 256)])
def test_residual_plus_layer_and_its_norm(rows, width, x_is_float32, dtype):
    x = inside(rows, width, dtype=F32 if x_is_float32 else dtype)
    bias, residual = randn(width, dtype=dtype, seed=1), inside(rows, width, dtype=dtype, seed=2)
    kept, n = residual.clone(), norm_of(width, dtype)
    total, normed = norm.add_layer_norm(x, bias, residual, n)
    assert total.dtype == normed.dtype == dtype
    exact = residual.double() + x.double() + bias.double()
    assert_rounded(total, exact)
    assert torch.equal(normed, norm.layer_norm(total, n)), "the norm is of what is passed on"
    assert torch.equal(residual, kept), "what is added to is not changed"


@pytest.mark.parametrize("parts, width", [(1, 21), (2, 21), (4, 21), (5, 21), (9, 21), (4, 9000)])
def test_partial_sums_are_added_in_their_order(parts, width):
    """Bit for bit, with magnitudes at which every other order gives something else."""
    rows = 2
    scales = (10.0 ** (torch.arange(parts) * 3 % 7)).to(DEVICE)
    x = randn(parts, rows, width) * scales[:, None, None]
    bias, residual, n = randn(width, seed=1), randn(rows, width, seed=2), norm_of(width, F32)
    expected = x[0]
    for part in x[1:]:
        expected = expected + part
    total, normed = norm.add_layer_norm(x, bias, residual, n)
    assert torch.equal(total, residual + (expected + bias))
    assert torch.equal(normed, norm.layer_norm(total, n))
    apart = torch.cat([x, x], dim=2)[:, :, :width]
    assert torch.equal(norm.add_layer_norm(apart, bias, residual, n)[0], total)


# T, H, D, r: rotary_dim that is not a power of two, all of D, and heads that fill no program.
HEADS = [
    (1, 4, 64, 32),
    (3, 5, 24, 6),
    (2, 1, 80, 80),
    (2, 6, 96, 24),
    (1, 3, 16, 2),
    (2, 4, 128, 64),
]


def qkv_case(tokens, heads, dim, rotary_dim, dtype):
    """Queries, keys and values as a view, angles, and a cache of NaN with places for the tokens."""
    memory = torch.full((tokens, heads + 1, 3, dim + 8), NAN, dtype=dtype, device=DEVICE)
    qkv = memory[:, :heads, :, :dim]
    qkv.copy_(randn(tokens, heads, 3, dim, dtype=dtype) * 3 + 1)
    cos, sin = (randn(tokens, 1, 1, rotary_dim, seed=seed) for seed in (1, 2))
    cache = torch.full((4, 2, 4, heads, dim), NAN, dtype=dtype, device=DEVICE)
    places = torch.randperm(32, generator=torch.Generator().manual_seed(3))[: 2 * tokens]
    return qkv, cos, sin, cache, places.view(2, tokens).to(DEVICE)


def head_norms(heads, dim):
    return HeadNorms(randn(heads, 2, dim, seed=4), randn(heads, 2, dim, seed=5), EPS)


@DTYPES
@pytest.mark.parametrize("with_norms", [True, False])
@pytest.mark.parametrize("tokens, heads, dim, rotary_dim", HEADS)
def test_queries_keys_and_values_of_heads(tokens, heads, dim, rotary_dim, with_norms, dtype):
    qkv, cos, sin, cache, slots = qkv_case(tokens, heads, dim, rotary_dim, dtype)
    norms = head_norms(heads, dim) if with_norms else None
    expected_cache = cache.clone()
    expected = REFERENCE.qk_norm_rotary_store(qkv, norms, cos, sin, expected_cache, slots)
    q = rotary.qk_norm_rotary_store(qkv, norms, cos, sin, cache, slots)
    assert q.dtype == dtype and q.is_contiguous()
    tolerance = {"rtol": 2 * ROUNDING[dtype], "atol": 1e-5}  # two roundings, one unit apart
    torch.testing.assert_close(q, expected, **tolerance)
    torch.testing.assert_close(cache, expected_cache, equal_nan=True, **tolerance)
    written = slots.flatten()
    assert cache.flatten(0, 2)[written].isfinite().all()
    if dtype != F32:
        same = (q == expected).double().mean()
        assert same > 0.98, "rounded once: twice would change every other value"


def test_nan_of_a_head_stays_in_it():
    qkv, cos, sin, cache, slots = qkv_case(2, 5, 16, 8, F32)
    norms, clean = head_norms(5, 16), cache.clone()
    expected = rotary.qk_norm_rotary_store(qkv, norms, cos, sin, clean, slots)
    qkv[1, 2, :2, 3] = NAN
    q = rotary.qk_norm_rotary_store(qkv, norms, cos, sin, cache, slots)
    assert q[1, 2].isnan().all()
    rows, clean_rows = cache.flatten(0, 2), clean.flatten(0, 2)
    assert rows[slots[0, 1], 2].isnan().all()
    q[1, 2], rows[slots[0, 1], 2] = expected[1, 2], clean_rows[slots[0, 1], 2]
    assert torch.equal(q, expected)
    torch.testing.assert_close(cache, clean, rtol=0, atol=0, equal_nan=True)


SHAPES = [(1, 1), (7, 33), (40, 24), (17, 200), (64, 64), (36, 130)]


def exact_product(x, weight, bias=None):
    out = x.double() @ weight.double().t()
    return out if bias is None else out + bias.double()


@DTYPES
@TILES
@pytest.mark.parametrize("n, k", SHAPES)
def test_products_of_few_rows(n, k, tile, dtype):
    """Rows and columns past the ends are NaN in memory and must not be seen."""
    rows = 3 if tile is FMA else 11
    x, weight, bias = (
        inside(rows, k, dtype=dtype),
        inside(n, k, dtype=dtype, seed=1),
        randn(n, seed=2),
    )
    bias = bias.to(dtype)
    one = Tiles({(n, k, dtype): Plan(tile, tile, fma_rows=0, max_rows=16)})
    found = linear.linear(x, weight, bias, one)
    assert found.shape == (rows, n) and found.dtype == dtype
    assert_rounded(found, exact_product(x, weight, bias), scale=k**0.5)
    assert_rounded(linear.linear(x, weight, None, one), exact_product(x, weight), scale=k**0.5)
    unrounded = linear.linear_unrounded(x, weight, one)
    assert unrounded.dtype == F32
    assert_rounded(unrounded, exact_product(x, weight), scale=k**0.5)
    torch.testing.assert_close(linear.logits(x, weight, one), unrounded, rtol=0, atol=0)


@pytest.mark.parametrize("k", [64, 72, 8])
@TILES
def test_rows_on_16_bytes_and_on_none_give_the_same(k, tile):
    """Wide loads are a promise about addresses: kept where a view breaks it, and k short of a block."""
    x, weight = randn(2, k, dtype=BF16), randn(9, k, dtype=BF16, seed=1)
    expected = linear.product(x, weight, tile)
    assert_rounded(expected, exact_product(x, weight), scale=8)
    for columns in (k + 8, k + 1):
        apart = torch.full((9, columns), NAN, dtype=BF16, device=DEVICE)[:, :k]
        apart.copy_(weight)
        found = linear.product(x, apart, tile)
        torch.testing.assert_close(found.double(), expected.double(), rtol=2**-8, atol=1e-5)
    assert torch.equal(linear.product(x.t().contiguous().t(), weight, tile), expected)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@TILES
def test_a_row_has_the_same_bits_alone_and_among_others(tile, dtype):
    """For any number of rows of one variant: the order of sums depends on the tile alone."""
    most = tiles.MAX_FMA_ROWS if tile is FMA else tiles.MAX_ROWS
    x, weight, bias = (randn(*s, dtype=dtype, seed=len(s)) for s in ((most, 136), (20, 136), (20,)))
    together = linear._skinny(x, weight, tile, bias)
    for rows in (1, 2, most - 1):
        for first in range(0, most - rows + 1, max(1, rows - 1)):
            alone = linear._skinny(x[first : first + rows], weight, tile, bias)
            expected = together[first : first + rows]
            if tile is DOT and DEVICE.type == "cpu":
                # numpy's product depends on where in the matrix a row stands.
                torch.testing.assert_close(alone, expected, rtol=2 * ROUNDING[dtype], atol=1e-5)
            else:
                assert torch.equal(alone, expected)


@pytest.mark.filterwarnings("ignore:invalid value")  # infinity times zero, in numpy
@TILES
def test_nan_and_infinity_stay_in_their_row_and_column(tile):
    x, weight = randn(3, 48, dtype=BF16), randn(10, 48, dtype=BF16, seed=1)
    clean = linear.product(x, weight, tile)
    x[1, 5], weight[7, 40] = NAN, float("inf")
    found = linear.product(x, weight, tile)
    assert found[1].isnan().all() and found[:, 7].isfinite().sum() == 0
    kept = torch.ones_like(found, dtype=torch.bool)
    kept[1], kept[:, 7] = False, False
    assert torch.equal(found[kept], clean[kept])


@DTYPES
@pytest.mark.parametrize("table", [Tiles(), CUBLAS], ids=["skinny", "cublas"])
def test_squared_relu(table, dtype):
    """NaN stays, float16 is capped, and negative values are exactly 0."""
    x, weight = randn(3, 40, dtype=dtype), randn(24, 40, dtype=dtype, seed=1)
    bias = randn(24, dtype=dtype, seed=2)
    bias[3], bias[4], bias[5], bias[6] = 300.0, -300.0, NAN, float("inf")
    found = linear.linear_squared_relu(x, weight, bias, table)
    assert found.dtype == dtype
    assert (found[:, 4] == 0).all() and found[:, 5].isnan().all()
    top = FP16_MAX if dtype == F16 else float("inf")
    assert (found[:, 6] == top).all()
    rest = [i for i in range(24) if i not in (4, 5, 6)]
    y = exact_product(x, weight, bias)[:, rest].relu()
    exact = y.square().clamp(max=top)
    allowed = ROUNDING[dtype] * exact + 1e-4
    if table is CUBLAS:  # which rounds the product before the bias comes; squaring doubles that
        allowed += 2 * ROUNDING[dtype] * y * (y + bias.double().abs()[rest])
    assert ((found[:, rest].double() - exact).abs() <= allowed).all()
    assert dtype != F16 or (found[:, 3] == FP16_MAX).all()


def plan_of(tile, n, k, dtype):
    return Tiles({(n, k, dtype): Plan(tile, tile, fma_rows=0, max_rows=16)})


@DTYPES
@TILES
@pytest.mark.parametrize("n, k", [(7, 33), (9, 64), (17, 300), (5, 1100)])
def test_layer_norm_of_what_a_product_reads(n, k, tile, dtype):
    """The bits of a product of the LayerNorm that another kernel has made, and no NaN from around x."""
    table, x, scale = plan_of(tile, n, k, dtype), inside(3, k, dtype=dtype), norm_of(k, dtype)
    weight, bias = randn(n, k, dtype=dtype, seed=1), randn(n, dtype=dtype, seed=2)
    h = norm.layer_norm(x, scale)
    for product in (linear.linear, linear.linear_squared_relu):
        found = product(PendingNorm(x, scale), weight, bias, table)
        assert found.isfinite().all()
        assert torch.equal(found, product(h, weight, bias, table))


def test_only_few_rows_of_few_columns_are_normalized_by_their_product(monkeypatch):
    calls, layer_norm = [], linear.layer_norm
    monkeypatch.setattr(linear, "layer_norm", lambda *of: calls.append(1) or layer_norm(*of))
    for rows, k in ((2, 40), (3, 40), (17, 40), (1, 16384)):
        x, scale, weight = randn(rows, k), norm_of(k, F32), randn(4, k, seed=1)
        found = linear.linear(PendingNorm(x, scale), weight, None, Tiles())
        assert_rounded(found, exact_norm(x, scale) @ weight.double().t(), scale=10 * k**0.5)
    assert len(calls) == 3


@DTYPES
@TILES
@pytest.mark.parametrize("n, k", SHAPES)
def test_bias_and_residual_enter_a_product_before_its_only_rounding(n, k, tile, dtype):
    """The stream that ``add_layer_norm`` makes of the same product, bit for bit."""
    rows, table = 3 if tile is FMA else 11, plan_of(tile, n, k, dtype)
    x, weight = randn(rows, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1)
    bias, residual = randn(n, dtype=dtype, seed=2), inside(rows, n, dtype=dtype, seed=3)
    expected, _ = norm.add_layer_norm(
        linear.linear_unrounded(x, weight, table), bias, residual, norm_of(n, dtype)
    )
    found = linear.linear_add(x, weight, bias, residual, table)
    assert found.dtype == dtype and found.isfinite().all()
    assert torch.equal(found, expected)
    assert linear.linear_add(x, weight, bias, residual, CUBLAS) is None


def test_logits_are_never_rounded_to_the_dtype_of_the_model():
    weight = randn(30, 96, dtype=BF16, seed=1)
    for rows in (2, 9, 17):  # fma, dot, cuBLAS
        x = randn(rows, 96, dtype=BF16)
        found, exact = linear.logits(x, weight, Tiles()), exact_product(x, weight)
        assert found.dtype == F32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_transposed_weights_are_products_too():
    x, weight = randn(2, 40), randn(40, 24, seed=1).t()
    assert_rounded(linear.linear(x, weight, None, Tiles()), exact_product(x, weight), scale=8)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_the_body_is_the_plain_one(rows, fused):
    """Every dense operation of the interface, in float32, at sizes that divide by nothing."""
    with use_kernels("triton", fused=fused):
        body = kernels_for(DEVICE)
    assert body.name == "triton"
    x, weight, bias = randn(rows, 36), randn(52, 36, seed=1), randn(52, seed=2)
    residual, n = randn(rows, 52, seed=3), norm_of(52, F32)
    pending, sparse = PendingNorm(x, norm_of(36, F32)), SparseWeight(weight.t().contiguous(), None)
    assert body.pack_weight(weight) is weight and body.pack_sparse(sparse.rows) == sparse
    calls = [
        ("layer_norm", (residual, n)),
        ("add_layer_norm", (randn(rows, 52, seed=4), bias, residual, n)),
        ("normed", (x,)),
        ("normed", (pending,)),
        ("linear", (x, weight)),
        ("linear", (x, weight, bias)),
        ("linear", (pending, weight, bias)),
        ("linear_squared_relu", (x, weight, bias)),
        ("linear_squared_relu", (pending, weight, bias)),
        ("linear_add_layer_norm", (x, weight, bias, residual, n)),
        ("sparse_linear", (x.relu(), sparse)),
        ("sparse_linear_add_layer_norm", (x.relu(), sparse, bias, residual, n)),
        ("logits", (x, weight)),
    ]
    for name, arguments in calls:
        found, expected = (getattr(b, name)(*arguments) for b in (body, REFERENCE))
        if isinstance(found, tuple):
            assert isinstance(found[1], PendingNorm) == (
                fused and name != "add_layer_norm" and rows <= 16 - 8 * name.startswith("sparse")
            )
            found = found[0], body.normed(found[1])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5, msg=name)
    qkv, cos, sin, cache, slots = qkv_case(min(rows, 9), 3, 20, 10, F32)
    plain, norms = cache.clone(), head_norms(3, 20)
    q = body.qk_norm_rotary_store(qkv, norms, cos, sin, cache, slots)
    expected = REFERENCE.qk_norm_rotary_store(qkv, norms, cos, sin, plain, slots)
    torch.testing.assert_close(q, expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(cache, plain, rtol=1e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_fused_kernels_give_the_bits_of_separate_ones(rows):
    """From one LayerNorm to the next, both row-parallel products among them."""
    norms = [norm_of(64, BF16, seed) for seed in (20, 30)]
    up, down, bias = (randn(*s, dtype=BF16, seed=len(s)) for s in ((96, 64), (96, 64), (96,)))
    streams = []
    for fused in (True, False):
        body = TritonKernels(DEVICE, fused=fused)
        x = randn(rows, 64, dtype=BF16)
        h = PendingNorm(x, norms[0]) if fused else body.layer_norm(x, norms[0])
        hidden = body.linear_squared_relu(h, up, bias)
        x, h = body.sparse_linear_add_layer_norm(
            hidden, SparseWeight(down, None), bias[:64], x, norms[1]
        )
        x, h = body.linear_add_layer_norm(body.normed(h), up[:64], bias[:64], x, norms[0])
        streams.append((x, body.linear(h, up)))
    for found, expected in zip(*streams, strict=True):
        assert found.isfinite().all() and torch.equal(found, expected)


def test_no_rows_are_no_rows():
    table, n, weight = Tiles(), norm_of(8, F32), randn(5, 8)
    none = randn(0, 8)
    assert norm.layer_norm(none, n).shape == (0, 8)
    assert norm.add_layer_norm(none, n.bias, none, n)[1].shape == (0, 8)
    assert linear.linear(none, weight, None, table).shape == (0, 5)
    assert linear.linear_squared_relu(none, weight, randn(5), table).shape == (0, 5)
    assert linear.logits(none.bfloat16(), weight.bfloat16(), table).shape == (0, 5)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with use_kernels("triton"), pytest.raises(ConfigError, match="CPU"):
        kernels_for(torch.device("cpu"))


@DTYPES
@pytest.mark.parametrize("k", [4096, 16384, 512, 40])
@pytest.mark.parametrize("n", [4096, 12288, 262144, 512, 1])
def test_unmeasured_shapes_get_tiles_that_fill_the_device(n, k, dtype):
    plan = tiles.default_plan(n, k, dtype)
    for tile in (plan.fma, plan.dot):
        assert tiles._parse_tile(**tile._asdict()) == tile
        if n >= 4096:
            assert triton.cdiv(n, tile.block_n) >= 132
    assert plan.fma.block_k * dtype.itemsize == plan.fma.num_warps * 32 * 16
    assert [plan.tile(rows) for rows in (0, 1, 2, 3, 16, 17)] == [
        None, plan.fma, plan.fma, plan.dot, plan.dot, None,
    ]  # fmt: skip
    assert tiles.default_plan(n, k + 4, dtype).tile(1).variant == "dot"


def times_of(fma, dot, library):
    """Times by rows, one value per entry of ``MEASURED_ROWS``, of two tiles per variant."""
    slow = Tile("fma", 8, 64, 2, 1), Tile("dot", 32, 32, 4, 3)
    times = {}
    for rows, *values in zip(tiles.MEASURED_ROWS, fma, dot, library, strict=True):
        times[rows] = dict(zip((FMA, DOT, None), values, strict=True))
        times[rows] |= {slow[0]: values[0] + 1, slow[1]: values[1] + 1}
        if rows > tiles.MAX_FMA_ROWS:
            del times[rows][FMA], times[rows][slow[0]]
    return times


@pytest.mark.parametrize(
    "fma, dot, library, fma_rows, max_rows",
    [
        ([1, 1, 3, 9, 9], [2, 2, 2, 2, 2], [3, 3, 3, 3, 3], 2, 16),
        ([1, 1, 1, 9, 9], [2, 2, 2, 2, 2], [3, 3, 3, 3, 1], 4, 8),
        ([1, 1, 1, 9, 9], [2, 2, 2, 2, 2], [3, 3, 3, 1, 9], 4, 4),
        ([3, 1, 1, 9, 9], [2, 2, 2, 2, 2], [3, 3, 3, 3, 3], 0, 16),  # fma may not come back
        ([9, 9, 9, 9, 9], [4, 2, 2, 2, 2], [3, 3, 3, 3, 3], 0, 0),
        ([1, 9, 9, 9, 9], [4, 4, 4, 4, 4], [3, 3, 3, 3, 3], 1, 1),
    ],
)
def test_switch_points_are_where_a_variant_first_loses(fma, dot, library, fma_rows, max_rows):
    plan = tiles.decide(times_of(fma, dot, library))
    assert plan == Plan(FMA, DOT, fma_rows, max_rows)


def test_tuning_times_every_candidate_and_its_table_is_what_is_loaded():
    """With a clock of our own; every launch is made once, so all candidates run."""
    best, dtype = tiles.candidates(F32)[3], F32
    timed = []

    def timer(launches):
        (x, weight, tile), out = launches[0].args, launches[0]()
        assert_rounded(out, exact_product(x, weight), scale=8)
        assert all(launch.args[2] == tile for launch in launches) and len(launches) >= 8
        timed.append((len(x), tile))
        if tile is None:
            return 5.0 if len(x) < 16 else 0.5
        if tile.num_stages == 5:
            raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
        return 1.0 if tile == best else 2.0 + tile.block_n

    table = tiles.tune([(9, 16, dtype)], DEVICE, linear.product, timer)
    by_rows = {rows: {tile for r, tile in timed if r == rows} for rows in tiles.MEASURED_ROWS}
    everything = {None, *tiles.candidates(dtype)}
    assert by_rows[1] == by_rows[4] == everything
    assert by_rows[16] == {t for t in everything if t is None or t.variant == "dot"}
    loaded = tiles.parse(json.dumps(table), "table.json")
    assert loaded.choose(1, 9, 16, dtype) == loaded.choose(4, 9, 16, dtype) == best
    assert loaded.choose(8, 9, 16, dtype) is None, "the best dot takes longer than cuBLAS"
    assert loaded.choose(1, 9, 24, dtype) == tiles.default_plan(9, 24, dtype).fma


def test_a_table_keeps_shapes_that_are_not_measured_again():
    def table(*sizes, fma_rows=2, **made_by):
        return {
            "device": "some GPU", "torch": "2", "triton": "3",
            "shapes": [ENTRY | {"n": n, "fma_rows": fma_rows} for n in sizes], **made_by,
        }  # fmt: skip

    old, new = table(64, 96, sparse_rows=4), table(96, 128, fma_rows=1)
    found = tiles.merge(old, new)
    assert [(e["n"], e["fma_rows"]) for e in found["shapes"]] == [(64, 2), (96, 1), (128, 1)]
    assert found["sparse_rows"] == 4
    tiles.parse(json.dumps(found), "table.json")
    for other in ({"device": "another"}, {"triton": "2"}):
        assert tiles.merge(old | other, new) == new


ENTRY = {
    "n": 64, "k": 32, "dtype": "bfloat16", "fma_rows": 2, "max_rows": 8,
    "fma": {"block_n": 4, "block_k": 256, "num_warps": 1, "num_stages": 1},
    "dot": {"block_n": 16, "block_k": 32, "num_warps": 4, "num_stages": 3},
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"fma_rows": 5}, {"max_rows": 17}, {"fma_rows": 3, "max_rows": 2}, {"dtype": "int8"},
        {"dot": None}, {"extra": 1}, {"fma": {**ENTRY["fma"], "block_n": 6}},
        {"dot": {**ENTRY["dot"], "block_n": 8}}, {"fma": {**ENTRY["fma"], "num_stages": 0}},
        {"dot": {**ENTRY["dot"], "num_warps": "4"}}, {"fma": {"block_n": 4}},
    ],
)  # fmt: skip
def test_damaged_tables_are_refused(change):
    assert tiles.parse(json.dumps({"shapes": [ENTRY]}), "x").choose(8, 64, 32, BF16).block_n == 16
    with pytest.raises(ConfigError) as error:
        tiles.parse(json.dumps({"shapes": [{**ENTRY, **change}]}), "folder/device.json")
    assert error.value.where == "folder/device.json"


def test_a_table_may_say_how_many_rows_skip():
    assert tiles.parse('{"shapes": []}', "x").sparse_rows == tiles.SPARSE_ROWS
    assert tiles.parse('{"shapes": [], "sparse_rows": 12}', "x").sparse_rows == 12
    for wrong in ("17", "-1", "8.0", "null"):
        with pytest.raises(ConfigError, match="sparse_rows"):
            tiles.parse(f'{{"shapes": [], "sparse_rows": {wrong}}}', "x")


def test_the_table_of_a_device_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    device = torch.device("cuda", 0)
    assert (
        tiles.load(device, tmp_path).choose(3, 64, 32, BF16) == tiles.default_plan(64, 32, BF16).dot
    )
    (tmp_path / "NVIDIA_H200.json").write_text(json.dumps({"shapes": [ENTRY]}))
    assert tiles.load(device, tmp_path).choose(9, 64, 32, BF16) is None
    (tmp_path / "NVIDIA_H200.json").write_text("{")
    with pytest.raises(ConfigError, match="table of tiles"):
        tiles.load(device, tmp_path)


@pytest.mark.parametrize(
    ("device", "capability", "variable", "expected"),
    [
        ("cuda", (9, 0), None, True),
        ("cuda", (9, 0), "0", False),
        ("cuda", (8, 9), None, False),
        ("cpu", None, None, False),
    ],
)
def test_dependent_launches_begin_with_hopper(device, capability, variable, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.delenv("TPRT_PDL", raising=False)
    if variable is not None:
        monkeypatch.setenv("TPRT_PDL", variable)
    options = pdl.pdl_options.__wrapped__(torch.device(device))
    assert options == ({"PDL": True, "launch_pdl": True} if expected else {"PDL": False})
