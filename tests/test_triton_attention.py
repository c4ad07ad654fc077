"""Triton's attention over a paged cache against the plain one, in memory full of NaN."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tprt.kernels import HeadNorms, reference
from tprt.kernels.triton_ops import TritonKernels, decode_attention
from tprt.kernels.triton_ops.attention import TritonAttention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
NOT_A_BLOCK = 10**6
SCALE = 0.3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}

_empty = torch.empty


@pytest.fixture(scope="module", autouse=True)
def poisoned():
    """What kernels do not write is NaN: results as well as partial results."""

    def empty(*args, **kwargs):
        out = _empty(*args, **kwargs)
        return out.fill_(NAN) if out.is_floating_point() else out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield


@contextmanager
def constants(**values):
    """Constants of ``decode_attention``: with small chunks short sequences have several."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(decode_attention, name, value)
        yield


def paged(lengths, dtype, block_size=4, heads=2, dim=16, width=0, seed=0):
    """A cache whose unused places hold NaN, and tables that name no block past each length."""
    generator = torch.Generator().manual_seed(seed)
    widths = [-(-length // block_size) for length in lengths]
    order = (torch.randperm(sum(widths), generator=generator) + 1).tolist()
    cache = torch.full((sum(widths) + 1, 2, block_size, heads, dim), NAN, dtype=dtype)
    tables = torch.full((len(lengths), max(*widths, width)), NOT_A_BLOCK, dtype=torch.int64)
    for row, (length, count) in enumerate(zip(lengths, widths, strict=True)):
        blocks = [order.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(blocks)
        values = torch.randn(2, count * block_size, heads, dim, generator=generator)
        values[:, length:] = NAN
        values = values.view(2, count, block_size, heads, dim).transpose(0, 1)
        cache[blocks] = values.to(dtype)
    return cache.to(DEVICE), tables.to(DEVICE)


def queries(count, cache, seed=1):
    heads, dim = cache.shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, heads, dim, generator=generator).to(cache)


def planner_for(cache):
    return TritonAttention(cache.shape[2], *cache.shape[-2:], cache.dtype, DEVICE)


def exact(q, cache, tables, new, old):
    """What the plain body gives on a CPU in float32."""
    q, cache = q.float().cpu(), cache.float().cpu()
    return reference.paged_attention(q, cache, tables.cpu(), new, old, SCALE).to(DEVICE)


def check(cache, tables, new, old, body="triton"):
    """One pass, twice, against the reference in float32."""
    q = queries(sum(new), cache)
    planner = planner_for(cache)
    planner.prefill_body = body
    plan = planner.plan(tables, new, old)
    found = plan(q, cache, SCALE)
    assert torch.equal(found, plan(q, cache, SCALE)), "the same bits every time"
    assert found.dtype == q.dtype and found.is_contiguous()
    expected = exact(q, cache, tables, new, old)
    torch.testing.assert_close(found.float(), expected, **TOLERANCE[q.dtype])
    return plan


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.one_of(st.just(1), st.integers(2, 21)), st.integers(0, 40)),
        min_size=1,
        max_size=4,
    ),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from([1, 4, 16, 24, 32]),
    heads=st.sampled_from([1, 2, 3]),
    dim=st.sampled_from([16, 24, 64]),
    chunk=st.sampled_from([16, 128]),
    sdpa=st.booleans(),
)
def test_any_mix_of_chunks_and_single_tokens(rows, dtype, block_size, heads, dim, chunk, sdpa):
    new, old = [n for n, _ in rows], [o for _, o in rows]
    cache, tables = paged([a + b for a, b in rows], dtype, block_size, heads, dim)
    with constants(CHUNK=chunk):
        check(cache, tables, new, old, "sdpa" if sdpa else "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "heads"), [(80, 2), (96, 1), (128, 3)])
def test_wide_heads(dtype, dim, heads):
    new, old = [1, 18, 1], [33, 20, 0]
    cache, tables = paged([a + b for a, b in zip(new, old, strict=True)], dtype, 16, heads, dim)
    with constants(CHUNK=16):
        check(cache, tables, new, old)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("body", ["triton", "sdpa"])
def test_chunks_of_every_tiling(dtype, body):
    """Several tiles of each size, whole keys before the diagonal and none, ends inside a tile."""
    new, old = [16, 2, 64, 17, 140], [70, 0, 0, 130, 75]
    cache, tables = paged([a + b for a, b in zip(new, old, strict=True)], dtype, 16, 1)
    plan = check(cache, tables, new, old, body)
    sizes = {group.how.block_m for group in plan.tiles}
    small = {16, 32} if dtype == torch.float32 else {16, 64, 128}
    assert sizes == (small if body == "triton" else set())
    assert len(plan.chunks) == (0 if body == "triton" else len(new))


def test_which_chunks_torch_takes():
    def takes(device, body, new, old):
        planner = TritonAttention(16, 2, 64, torch.bfloat16, DEVICE)
        planner.device, planner.prefill_body = torch.device(device), body
        return planner._takes_sdpa(new, old)

    assert takes("cuda", "auto", 512, 0)
    assert not takes("cuda", "auto", 511, 0) and not takes("cuda", "auto", 512, 1)
    assert not takes("cpu", "auto", 512, 0)
    assert takes("cuda", "sdpa", 2, 9) and not takes("cuda", "triton", 512, 0)


LENGTHS = [5, 100, 1, 16, 17, 64]


def decode(planner, cache, tables, q, lengths):
    lengths = torch.tensor(lengths, device=DEVICE)
    return planner.plan_decode(tables, lengths)(q, cache, SCALE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(dtype):
    """And in any table, and however many programs, launches and merges share the work."""
    cache, tables = paged(LENGTHS, dtype, 4, 3, 24, width=40)
    q = queries(len(LENGTHS), cache)
    ones, old = [1] * len(LENGTHS), [length - 1 for length in LENGTHS]
    planner = planner_for(cache)
    with constants(CHUNK=16, MERGED_AT_ONCE=4):
        expected = planner.plan(tables, ones, old)(q, cache, SCALE)
        plain = exact(q, cache, tables, ones, old)
        torch.testing.assert_close(expected.float(), plain, **TOLERANCE[dtype])
        assert torch.equal(decode(planner, cache, tables, q, LENGTHS), expected)
        for row, length in enumerate(LENGTHS):
            rows = slice(row, row + 1)
            for width in (-(-length // 4), 40):
                table = tables[rows, :width].contiguous()
                found = decode(planner, cache, table, q[rows], [length])
                assert torch.equal(found, expected[rows]), (length, width)
        order = [3, 1, 5, 0]
        few = decode(planner, cache, tables[order], q[order], [LENGTHS[i] for i in order])
        assert torch.equal(few, expected[order])
    partials = 4 * 4 * 10 * 3 * 26  # room for four of the six rows
    for other in ({"MIN_PROGRAMS": 1}, {"MIN_PROGRAMS": 9}, {"MAX_PARTIAL_BYTES": partials}):
        with constants(CHUNK=16, MERGED_AT_ONCE=4, **other):
            assert torch.equal(decode(planner, cache, tables, q, LENGTHS), expected), other


def test_one_chunk_needs_no_merge():
    """What is written at once has the bits of what is merged from one chunk."""
    cache, tables = paged([9, 16], torch.bfloat16, 4, 2, 16, width=20)
    q, planner = queries(2, cache), planner_for(cache)
    with constants(CHUNK=16):
        short = tables[:, :4].contiguous()
        plan = planner.plan_decode(short, torch.tensor([9, 16], device=DEVICE))
        assert plan.rows.partials is None
        merged = decode(planner, cache, tables, q, [9, 16])
        assert torch.equal(plan(q, cache, SCALE), merged)


def test_a_chunk_has_the_same_bits_beside_any_other():
    new, old = [17, 3, 70], [5, 40, 0]
    cache, tables = paged([a + b for a, b in zip(new, old, strict=True)], torch.bfloat16)
    q, planner, start = queries(sum(new), cache), planner_for(cache), 0
    together = planner.plan(tables, new, old)(q, cache, SCALE)
    for i, count in enumerate(new):
        rows = slice(start, start + count)
        alone = planner.plan(tables[i : i + 1], [count], [old[i]])(q[rows], cache, SCALE)
        assert torch.equal(alone, together[rows])
        start += count


@pytest.mark.parametrize("body", ["triton", "sdpa"])
def test_queries_may_be_views(body):
    new, old = [1, 9, 1], [20, 4, 0]
    cache, tables = paged([a + b for a, b in zip(new, old, strict=True)], torch.float32)
    q, planner = queries(sum(new), cache), planner_for(cache)
    planner.prefill_body = body
    wide = torch.full((sum(new) + 1, 2, 3, 16), NAN, device=DEVICE)
    wide[1:, :, 1] = q
    plan = planner.plan(tables, new, old)
    assert torch.equal(plan(wide[1:, :, 1], cache, SCALE), plan(q, cache, SCALE))


@pytest.mark.parametrize("dtype", DTYPES)
def test_very_large_scores(dtype):
    """Their exponentials overflow unless the largest is subtracted first."""
    new, old = [1, 20], [70, 30]
    cache, tables = paged([71, 50], dtype)
    cache *= 100
    planner = planner_for(cache)
    q = queries(21, cache) * 100
    with constants(CHUNK=16):
        found = planner.plan(tables, new, old)(q, cache, SCALE)
    expected = exact(q, cache, tables, new, old)
    assert expected.isfinite().all() and expected.abs().max() > 50
    tolerance = TOLERANCE[dtype] | {"atol": 100 * TOLERANCE[dtype]["atol"]}
    torch.testing.assert_close(found.float(), expected, **tolerance)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_keys_whose_scores_are_minus_infinity_count_for_nothing():
    """A whole chunk of them, and whole steps of a tile's loop: -inf - -inf is NaN."""
    new, old = [1, 20], [70, 30]
    cache, tables = paged([71, 50], torch.float32)
    for row in tables:
        cache[row[:5], 0] = 1e30  # the first 20 positions
    q = queries(21, cache).abs()
    q[:, :, 0] = -1e30
    with constants(CHUNK=16):
        found = planner_for(cache).plan(tables, new, old)(q, cache, SCALE)
    expected = exact(q, cache, tables, new, old)
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.float32])


def test_nan_of_one_sequence_stays_in_it():
    """It is not hidden either: the sampler looks for it."""
    new, old = [1, 1, 20, 20], [40, 40, 9, 9]
    cache, tables = paged([41, 41, 29, 29], torch.float32)
    q, planner = queries(sum(new), cache), planner_for(cache)
    with constants(CHUNK=16):
        before = planner.plan(tables, new, old)(q, cache, SCALE)
        cache[tables[0, 5], 0, 1, 0, 3] = NAN  # position 21, a key of head 0
        cache[tables[2, 1], 0, 1, 1, 3] = NAN  # position 5, a key of head 1
        after = planner.plan(tables, new, old)(q, cache, SCALE)
    assert after[0, 0].isnan().all() and after[2:22, 1].isnan().all()
    after[0, 0], after[2:22, 1] = before[0, 0], before[2:22, 1]
    assert torch.equal(after, before)


# ---------------------------------------------------------------- a decode step in one kernel


class Step:
    """New tokens of rows whose cache does not hold them yet; ``padding`` rows more share one slot."""

    def __init__(self, lengths, dtype, block_size, heads, dim, width=0, padding=0, norms=True):
        self.cache, self.tables = paged(lengths, dtype, block_size, heads, dim, width)
        self.count, rows = len(lengths), len(lengths) + padding
        self.tables = torch.cat([self.tables, self.tables.new_zeros(padding, self.tables.shape[1])])
        self.lengths = torch.tensor([*lengths, *[1] * padding], device=DEVICE)
        last = self.lengths - 1
        blocks = self.tables.gather(1, (last // block_size).unsqueeze(1)).squeeze(1)
        keys = blocks * (2 * block_size) + last % block_size
        self.slots = torch.stack([keys, keys + block_size])
        self.cache.view(-1, heads, dim)[self.slots] = NAN
        generator = torch.Generator().manual_seed(7)
        randn = partial(torch.randn, generator=generator)
        memory = torch.full((rows, heads + 1, 3, dim + 8), NAN, dtype=dtype, device=DEVICE)
        self.qkv = memory[:, :heads, :, :dim]
        self.qkv.copy_(randn(rows, heads, 3, dim) * 2 + 1)
        weight, bias = randn(2, heads, 2, dim).to(DEVICE)
        self.norms = HeadNorms(weight, bias, 1e-5) if norms else None
        rotary_dim = dim // 4 * 2
        self.cos, self.sin = randn(2, rows, 1, 1, rotary_dim).to(DEVICE)

    def rows(self, order):
        """The same with some of its rows, and a cache of its own."""
        few = object.__new__(Step)
        few.__dict__.update(self.__dict__, cache=self.cache.clone(), count=len(order))
        for name in ("tables", "lengths", "qkv", "cos", "sin"):
            setattr(few, name, getattr(self, name)[order])
        few.slots = self.slots[:, order]
        return few

    def run(self, plan, fused):
        """Results of the rows that count, and the cache after the step."""
        cache, body = self.cache.clone(), TritonKernels(DEVICE, fused=fused)
        cos, sin, slots = self.cos, self.sin, self.slots
        out = body.attend(self.qkv, self.norms, cos, sin, cache, slots, plan, SCALE)
        assert out.is_contiguous() and out.dtype == cache.dtype
        return out[: self.count], cache

    def plain(self):
        """Results of the rows that count, from the plain body on a CPU in float32."""
        body, rows = reference.ReferenceKernels(), slice(self.count)
        old = [length - 1 for length in self.lengths[rows].tolist()]
        plan = reference.ReferenceAttention().plan(self.tables.cpu(), [1] * self.count, old)
        qkv, cos, sin = (x[rows].float().cpu() for x in (self.qkv, self.cos, self.sin))
        norms = HeadNorms(self.norms.weight.cpu(), self.norms.bias.cpu(), self.norms.eps)
        cache, slots = self.cache.clone().float().cpu(), self.slots[:, rows].cpu()
        return body.attend(qkv, norms, cos, sin, cache, slots, plan, SCALE).to(DEVICE)


def bits_of(found):
    """Comparable, NaN included."""
    kind = {2: torch.int16, 4: torch.int32}[found.element_size()]
    return found.contiguous().view(kind)


def check_step(step, planner):
    """One kernel against three, twice with the same plan; nothing is left in the counters."""
    plan = planner.plan_decode(step.tables, step.lengths)
    assert plan.fuses
    expected, cache = step.run(plan, fused=False)
    assert expected.isfinite().all()
    for _ in range(2):
        found, written = step.run(plan, fused=True)
        assert torch.equal(bits_of(found), bits_of(expected))
        # Padding rows write to block 0, in any order.
        assert torch.equal(bits_of(written[1:]), bits_of(cache[1:]))
        assert not planner.counters.any()
    return expected


@pytest.mark.parametrize(
    ("dtype", "heads", "dim", "block_size", "padding"),
    [
        (torch.float32, 3, 48, 8, 0),
        (torch.bfloat16, 3, 64, 16, 2),
        (torch.bfloat16, 5, 48, 8, 3),
        (torch.float16, 1, 20, 4, 0),
        (torch.float16, 2, 80, 24, 1),
    ],
)
def test_one_kernel_has_the_bits_of_three(dtype, heads, dim, block_size, padding):
    """At the ends of chunks, among others and alone, beside rows that share a slot."""
    lengths = [1, 15, 16, 17, 70]
    step = Step(lengths, dtype, block_size, heads, dim, 14, padding)
    with constants(CHUNK=16, MERGED_AT_ONCE=2):
        planner = planner_for(step.cache)
        expected = check_step(step, planner)
        for order in ([4], [2, 0, 3]):
            found, _ = step.rows(order).run(
                planner.plan_decode(step.tables[order], step.lengths[order]), fused=True
            )
            assert torch.equal(found, expected[order]), order
    torch.testing.assert_close(expected.float(), step.plain(), **TOLERANCE[dtype])


@pytest.mark.parametrize("norms", [True, False])
def test_a_single_chunk_is_written_at_once(norms):
    step = Step([1, 9, 127, 128], torch.bfloat16, 16, 2, 64, norms=norms)
    planner = planner_for(step.cache)
    assert planner.plan_decode(step.tables, step.lengths).rows.partials is None
    check_step(step, planner)


def test_passes_of_chunks_take_several_kernels_of_the_same_bits():
    step = Step([5, 40], torch.bfloat16, 8, 3, 48)
    with constants(CHUNK=16):
        planner = planner_for(step.cache)
        listed = planner.plan(step.tables, [1, 1], [4, 39])
        assert not listed.fuses
        found, cache = step.run(listed, fused=True)
        expected, written = step.run(planner.plan_decode(step.tables, step.lengths), fused=True)
    assert torch.equal(found, expected) and torch.equal(bits_of(cache), bits_of(written))


def test_launches_of_few_rows_and_other_numbers_of_programs_change_no_bit():
    step = Step([70, 3, 33, 16, 64], torch.float32, 8, 3, 16, width=10)
    partials = 4 * 5 * 3 * 18  # of one row
    with constants(CHUNK=16):
        expected = check_step(step, planner_for(step.cache))
    few = {"MAX_PARTIAL_BYTES": 3 * partials}
    for other in (few, {"MIN_PROGRAMS": 1}, {"MIN_PROGRAMS": 3}, {"MAX_ROWS": 2}):
        with constants(CHUNK=16, **other):
            assert torch.equal(check_step(step, planner_for(step.cache)), expected), other


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the order of programs is the GPU's own")
@pytest.mark.parametrize("order", [(3, 2, 1, 0), (2, 0, 3, 1)])
def test_who_comes_last_merges_whoever_it_is(order, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    step = Step([70, 3, 33], torch.float32, 8, 3, 16, width=10)
    with constants(CHUNK=16):
        planner = planner_for(step.cache)
        expected = check_step(step, planner)
        place, come = interpreter_builder.set_grid_idx, []

        def shuffled(x, y, z):
            come.append((x, y, z))
            place(x, y, order[z] if interpreter_builder.grid_dim[2] == 4 else z)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", shuffled)
        assert torch.equal(check_step(step, planner), expected)
        assert max(z for *_, z in come) == 3, "four programs of each row"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_replays_of_one_kernel_have_the_bits_of_three():
    """Many of them, in layers that follow each other: counters are used again at once."""
    step = Step([700, 1, 300, 129, 5], torch.bfloat16, 16, 8, 64, width=64)
    planner, body = planner_for(step.cache), TritonKernels(DEVICE)
    lengths, caches = step.lengths.clone(), [step.cache.clone() for _ in range(8)]
    plan = planner.plan_decode(step.tables, lengths)

    def layers(body, caches):
        qkv = step.qkv
        for cache in caches:
            arguments = step.norms, step.cos, step.sin, cache, step.slots, plan, SCALE
            out = body.attend(qkv, *arguments)
            qkv = out.unsqueeze(2) + step.qkv
        return out

    layers(body, caches)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layers(body, caches)
    expected = layers(TritonKernels(DEVICE, fused=False), [step.cache.clone() for _ in range(8)])
    for _ in range(50):
        graph.replay()
        assert torch.equal(out, expected)
    assert not planner.counters.any()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_a_graph_sees_the_lengths_and_tables_of_its_replay():
    first, second = [1, 300, 40], [700, 5, 129]
    longest = [max(pair) for pair in zip(first, second, strict=True)]
    cache, tables = paged(longest, torch.bfloat16, 16, 8, 64, width=64)
    q, planner = queries(3, cache), planner_for(cache)
    lengths, given = torch.tensor(first, device=DEVICE), tables.clone()
    planner.plan_decode(given, lengths)(q, cache, SCALE)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = planner.plan_decode(given, lengths)(q, cache, SCALE)
    for order, values in (([0, 1, 2], first), ([0, 1, 2], second), ([2, 0, 1], [40, 700, 5])):
        given.copy_(tables[order])
        lengths.copy_(torch.tensor(values, device=DEVICE))
        graph.replay()
        eager = planner.plan(tables[order], [1] * 3, [value - 1 for value in values])
        assert torch.equal(out, eager(q, cache, SCALE))
