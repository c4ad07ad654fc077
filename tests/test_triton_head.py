"""The LM head of the Triton body: products, noise, draws and ties against the plain body."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from tprt.kernels import Noise
from tprt.kernels.noise import gumbel, sequence_key, token_table
from tprt.kernels.reference import ReferenceKernels
from tprt.kernels.triton_ops import head

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = ReferenceKernels()
INF, NAN = float("inf"), float("nan")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ids_from(first, count):
    return torch.arange(first, first + count, device=DEVICE)


def noise_of(rows, seed=0, greedy=(), all_greedy=False):
    """Rows with temperatures, keys and positions of their own, some of them greedy."""
    temperature = torch.linspace(0.3, 2.0, rows)
    is_greedy = torch.zeros(rows, dtype=torch.bool)
    is_greedy[list(greedy)] = True
    temperature[is_greedy] = 1.0
    keys = torch.tensor([sequence_key(seed, i) for i in range(rows)], dtype=torch.int64)
    positions = torch.arange(rows) * 37 + 5
    fields = (field.to(DEVICE) for field in (temperature, is_greedy, keys, positions))
    return Noise(*fields, all_greedy=all_greedy)


def rows_of(noise, chosen):
    fields = noise.temperature, noise.greedy, noise.keys, noise.positions
    return Noise(*(field[chosen] for field in fields), all_greedy=noise.all_greedy)


@triton.jit
def _uniforms(keys_ptr, positions_ptr, ids_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    keys, positions = tl.load(keys_ptr + rows), tl.load(positions_ptr + rows)
    u = head._uniform(keys[:, None], positions[:, None], tl.load(ids_ptr + columns)[None, :])
    tl.store(out_ptr + rows[:, None] * COLUMNS + columns[None, :], u)


@triton.jit
def _gumbels(u_ptr, out_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + index, mask=index < count, other=0.5)
    tl.store(out_ptr + index, head._gumbel(u), mask=index < count)


def test_uniforms_are_those_of_the_plain_noise_bit_for_bit():
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), sequence_key(1, 2), -12345, 7 << 40])
    positions = torch.tensor([0, 1, -7, 2**31, 2**62, -(2**63), 2**63 - 1, 4095])
    ids = torch.cat([torch.arange(60), torch.tensor([262143, 2**31, 2**40, 2**62])])
    found = torch.empty(len(keys), len(ids), device=DEVICE)
    _uniforms[(1,)](
        keys.to(DEVICE), positions.to(DEVICE), ids.to(DEVICE), found, ROWS=8, COLUMNS=64
    )
    # What noise.gumbel does before its logarithms, in Python's whole numbers.
    mask = 2**64 - 1
    mix_1, mix_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

    def signed_shift(x):
        return ((x - 2**64 if x >= 2**63 else x) >> 32) & mask

    expected = torch.empty(len(keys), len(ids))
    for i, (key, position) in enumerate(zip(keys.tolist(), positions.tolist(), strict=True)):
        row = ((key ^ (position * mix_2)) * mix_1) & mask
        row ^= signed_shift(row)
        for j, token in enumerate(ids.tolist()):
            x = (((token + 1) * 0x9E3779B97F4A7C15 ^ row) * mix_1) & mask
            x = ((x ^ signed_shift(x)) * mix_2) & mask
            bits = ((x >> 32) + 2**31) & 0xFFFFFFFF
            expected[i, j] = (torch.tensor(bits).float() + 0.5) * ((1 - 2**-24) * 2**-32)
    assert torch.equal(found.cpu(), expected)
    assert len(found.unique()) > 500


def test_logarithms_are_exact_to_a_few_units_everywhere():
    """Near 0, where the upper tail lives; near 1; where the formula changes; at its zero, 1 - 1/e."""
    step = 2.0**-24
    around = torch.cat(
        [torch.arange(-40, 41) * step + x for x in (0.33, 1 / 3, 0.5, 2 / 3, 0.6321)]
    )
    u = torch.cat(
        [
            (torch.arange(300).float() + 0.5) * ((1 - step) * 2**-32),
            torch.logspace(-9.9, 0, 4000).clamp(max=1 - step),
            1 - torch.logspace(-7.2, -0.3, 4000).clamp(min=step),
            around,
            torch.rand(8000, generator=torch.Generator().manual_seed(0)).clamp(min=2**-33),
        ]
    ).float()
    assert u.min() > 0 and u.max() == 1 - step and u.min() < 2**-32
    found, at = torch.empty_like(u, device=DEVICE), u.to(DEVICE)
    _gumbels[(triton.cdiv(len(u), 1024),)](at, found, len(u), BLOCK=1024)
    exact = -torch.log(-torch.log1p(-u.double()))
    error = (found.cpu().double() - exact).abs() / exact.abs().clamp(min=1)
    assert error.max() < head.GUMBEL_ERROR, f"{error.max():.3g} at u = {u[error.argmax()]:.9g}"


def test_draws_are_those_of_the_plain_body():
    """The same ids for hundreds of keys, so the same distribution too."""
    rows, vocab = 300, 700
    logits, noise = randn(rows, vocab) * 2, noise_of(rows, greedy=range(0, rows, 5))
    noise.keys[:4] = torch.tensor([-1, 2**63 - 1, -(2**63), 0])
    noise.positions[4:8] = torch.tensor([-1, 2**40, -(2**63), 2**63 - 1])
    scores, ids = head.argmax(logits, noise, ids_from(1000, vocab), vocab)
    expected_scores, expected_ids = REFERENCE.argmax(logits, noise, ids_from(1000, vocab), vocab)
    assert ids.dtype == torch.int64 and scores.dtype == torch.float32
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(scores, expected_scores, rtol=2e-6, atol=2e-6)
    greedy = logits.max(dim=1)
    assert torch.equal(scores[::5], greedy.values[::5]), "a greedy row's score is its logit"
    assert torch.equal(ids[::5], greedy.indices[::5] + 1000)
    assert (ids != greedy.indices + 1000).sum() > rows // 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "vocab", "width"), [(1, 300, 64), (16, 257, 128), (5, 131, 77), (3, 1, 1), (2, 7, 192)]
)
def test_head_draws_what_its_logits_say(dtype, rows, vocab, width):
    x, weight = randn(rows, width).to(dtype), randn(vocab, width, seed=1).to(dtype)
    noise = noise_of(rows, greedy=range(0, rows, 3))
    scores, ids = head.linear_argmax(x, weight, noise, ids_from(40, vocab), vocab)
    logits = x.double() @ weight.double().t()
    drawn = gumbel(noise.keys, noise.positions, token_table(ids_from(40, vocab)))
    drawn[noise.greedy] = 0.0
    expected = logits / noise.temperature.unsqueeze(1) + drawn
    torch.testing.assert_close(scores.double(), expected.amax(dim=1), rtol=1e-5, atol=1e-4)
    # Only a tie within rounding may be drawn otherwise.
    chosen = expected.gather(1, (ids - 40).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, expected.amax(dim=1), rtol=1e-5, atol=1e-4)


def test_head_does_not_round_logits():
    """Two logits that bfloat16 cannot tell apart."""
    weight = torch.zeros(40, 64, dtype=torch.bfloat16, device=DEVICE)
    weight[3, 0] = weight[30, 0] = 256.0
    weight[30, 1] = 0.25
    x = torch.zeros(2, 64, dtype=torch.bfloat16, device=DEVICE)
    x[:, :2] = 1.0
    for rows in (x, x.repeat(10, 1)):
        scores, ids = head.linear_argmax(
            rows, weight, noise_of(len(rows), all_greedy=True), ids_from(0, 40), 40
        )
        assert ids.tolist() == [30] * len(rows) and scores.tolist() == [256.25] * len(rows)


def test_row_has_the_same_bits_however_many_there_are():
    x, weight, noise = randn(16, 96), randn(200, 96, seed=1), noise_of(16, greedy=(2, 9))
    scores, ids = head.linear_argmax(x, weight, noise, ids_from(0, 200), 200)
    for rows in (1, 2, 7, 15):
        some = head.linear_argmax(
            x[:rows], weight, rows_of(noise, slice(rows)), ids_from(0, 200), 200
        )
        assert torch.equal(some[0], scores[:rows]) and torch.equal(some[1], ids[:rows])
    x = x.repeat(2, 1)[:18]
    fields = (field.repeat(2)[:18] for field in (noise.temperature, noise.greedy, noise.keys,
                                                 noise.positions))  # fmt: skip
    many = head.linear_argmax(x, weight, Noise(*fields), ids_from(0, 200), 200)
    torch.testing.assert_close(many[0][:16], scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(many[1], ids.repeat(2)[:18])


def test_rank_of_a_cut_vocabulary_draws_the_same():
    """The best over the parts of two ranks is that of the whole, scores included."""
    x, weight, noise = randn(6, 64), randn(256, 64, seed=1), noise_of(6)
    scores, ids = head.linear_argmax(x, weight, noise, ids_from(0, 250), 250)
    low = head.linear_argmax(x, weight[:128], noise, ids_from(0, 128), 128)
    high = head.linear_argmax(x, weight[128:], noise, ids_from(128, 122), 122)
    torch.testing.assert_close(torch.maximum(low[0], high[0]), scores, rtol=0, atol=0)
    assert torch.equal(torch.where(low[0] >= high[0], low[1], high[1]), ids)
    assert (ids < 128).any() and (ids >= 128).any()


@pytest.mark.parametrize("all_greedy", [False, True])
@pytest.mark.parametrize("rows", [5, 18])
def test_ids_without_columns_change_nothing_else(rows, all_greedy):
    """A table with holes draws, bit for bit, what the whole head does without the ids in the holes."""
    x, weight = randn(rows, 64), randn(400, 64, seed=1)
    noise = noise_of(rows, greedy=range(0, rows, 3), all_greedy=all_greedy)
    kept = torch.cat([ids_from(0, 3), ids_from(130, 70), ids_from(256, 140)])
    masked = torch.full((rows, 400), -INF, device=DEVICE)
    columns = head.logits(x, weight[kept])
    masked[:, kept] = columns
    expected = head.argmax(masked, noise, ids_from(0, 400), 400)
    for scores, ids in (
        head.argmax(columns, noise, kept, len(kept)),
        REFERENCE.argmax(columns, noise, kept, len(kept)),
        head.linear_argmax(x, weight[kept], noise, kept, len(kept)),
    ):
        assert torch.equal(ids, expected[1])
        torch.testing.assert_close(scores, expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(head.argmax(columns, noise, kept, len(kept))[0], expected[0])
    scores, ids = head.linear_argmax(x, weight, noise, ids_from(0, 400), 400)
    same = torch.isin(ids, kept)
    trimmed = head.linear_argmax(x, weight[kept], noise, kept, len(kept))
    assert torch.equal(trimmed[1][same], ids[same]) and not same.all()
    if rows <= head.MAX_ROWS:
        assert torch.equal(trimmed[0][same], scores[same])


@pytest.mark.parametrize("rows", [2, 18])
def test_of_equal_scores_the_lowest_id_wins(rows):
    """Inside a program's part, in different parts, and where all are equal."""
    vocab, noise = 5000, noise_of(rows, all_greedy=True)
    weight = torch.zeros(vocab, 32, device=DEVICE)
    x = torch.ones(rows, 32, device=DEVICE)
    assert head.linear_argmax(x, weight, noise, ids_from(9, vocab), vocab)[1].tolist() == [9] * rows
    for equal in ([17, 18], [63, 64], [70, 4999], [2047, 2048, 4096]):
        weight.zero_()
        weight[equal] = 1.0
        scores, ids = head.linear_argmax(x, weight, noise, ids_from(9, vocab), vocab)
        assert ids.tolist() == [9 + equal[0]] * rows and scores.tolist() == [32.0] * rows


@pytest.mark.parametrize("num_valid", [0, 1, 64, 100, 128, 129])
def test_columns_past_the_valid_ones_never_win(num_valid):
    """Neither by a large logit nor by NaN, which is what padding may hold."""
    x, weight = randn(3, 64).abs(), randn(150, 64, seed=1)
    for filler in (100.0, NAN, INF):
        weight[num_valid:] = filler
        for noise in (noise_of(3), noise_of(3, all_greedy=True)):
            found = head.linear_argmax(x, weight, noise, ids_from(5, 150), num_valid)
            logits = x @ weight.t()
            plain = head.argmax(logits, noise, ids_from(5, 150), num_valid)
            expected = REFERENCE.argmax(logits, noise, ids_from(5, 150), num_valid)
            for scores, ids in (found, plain):
                torch.testing.assert_close(scores, expected[0], rtol=1e-5, atol=1e-5)
                assert torch.equal(ids, expected[1])
            assert found[0].isfinite().all() == (num_valid > 0)


@pytest.mark.parametrize("all_greedy", [False, True])
def test_bad_logits_show_in_the_score_of_their_row_alone(all_greedy):
    logits = randn(7, 2500)
    noise = noise_of(7, greedy=range(7) if all_greedy else (1, 4), all_greedy=all_greedy)
    fine = head.argmax(logits, noise, ids_from(0, 2500), 2500)
    logits[1, 2400], logits[2, 3], logits[3, 0], logits[4] = NAN, INF, -INF, -INF
    logits[5, 77] = -NAN
    logits[6, 2499] = NAN
    scores, ids = head.argmax(logits, noise, ids_from(0, 2499), 2499)
    assert scores.isfinite().tolist() == [True, False, False, True, False, False, True]
    good = [0, 3, 6]
    assert torch.equal(scores[good], fine[0][good]) and torch.equal(ids[good], fine[1][good])
    assert (ids >= 0).all() and (ids < 2500).all()


def test_bad_activations_show_in_the_score_of_their_row_alone():
    x, weight, noise = randn(4, 64), randn(100, 64, seed=1), noise_of(4, greedy=(0,))
    fine = head.linear_argmax(x, weight, noise, ids_from(0, 100), 100)
    x[1, 3], x[2, 5] = NAN, INF
    scores, ids = head.linear_argmax(x, weight, noise, ids_from(0, 100), 100)
    assert scores.isfinite().tolist() == [True, False, False, True]
    assert torch.equal(scores[::3], fine[0][::3]) and torch.equal(ids[::3], fine[1][::3])


def test_greedy_rows_are_the_same_with_and_without_the_hosts_knowing():
    """In a captured graph nothing is known on the host, and each row says so itself."""
    x, weight = randn(5, 64), randn(90, 64, seed=1)
    known = head.linear_argmax(
        x, weight, noise_of(5, all_greedy=True, greedy=range(5)), ids_from(0, 90), 90
    )
    unknown = head.linear_argmax(x, weight, noise_of(5, greedy=range(5)), ids_from(0, 90), 90)
    assert torch.equal(known[0], unknown[0]) and torch.equal(known[1], unknown[1])


def test_views_with_rows_apart_are_read_as_they_lie():
    wide, tall, noise = randn(6, 200), randn(500, 128, seed=1), noise_of(12)
    x, weight = wide[::2, :64], tall[:, 64:]
    some = rows_of(noise, slice(None, 6, 2))
    assert not some.keys.is_contiguous() and not x.is_contiguous()
    found = head.linear_argmax(x, weight, some, ids_from(0, 500), 500)
    expected = head.linear_argmax(x.contiguous(), weight.contiguous(), some, ids_from(0, 500), 500)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    turned = weight.t().contiguous().t(), x.t().contiguous().t()
    for w, rows in ((turned[0], x), (weight, turned[1])):
        scores, ids = head.linear_argmax(rows, w, some, ids_from(0, 500), 500)
        torch.testing.assert_close(scores, expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(ids, expected[1])
    logits = randn(3, 400)
    found = head.argmax(logits[:, 100:], some, ids_from(0, 300), 300)
    expected = REFERENCE.argmax(logits[:, 100:].contiguous(), some, ids_from(0, 300), 300)
    assert torch.equal(found[1], expected[1])


def test_no_rows_give_no_rows():
    scores, ids = head.linear_argmax(randn(0, 32), randn(10, 32), noise_of(0), ids_from(0, 10), 10)
    assert scores.shape == ids.shape == (0,) and ids.dtype == torch.int64
