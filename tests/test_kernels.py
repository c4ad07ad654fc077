"""Every body of an operation against the plain one, on the same inputs."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tprt.batch import Segments
from tprt.kernels import Kernels, Norm, cpu, kernels_for, reference, use_kernels, warm_up
from tprt.kernels.reference import ReferenceAttention
from tprt.sizes import (
    KernelSizes,
    PagedAttentionSizes,
    RecurrenceSizes,
    WindowAttentionSizes,
)

KERNELS = cpu.CPUKernels()

BLOCK, HEADS, DIM = 4, 2, 8


def paged(lengths, dtype, seed=0, stale=float("nan")):
    """A cache whose every unused place holds ``stale``, and the block tables of ``lengths`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    widths = [-(-length // BLOCK) for length in lengths]
    order = (torch.randperm(sum(widths), generator=generator) + 1).tolist()
    cache = torch.full((sum(widths) + 1, 2, BLOCK, HEADS, DIM), stale, dtype=dtype)
    tables = torch.zeros(len(lengths), max(widths), dtype=torch.int64)
    for row, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        blocks = [order.pop() for _ in range(width)]
        tables[row, :width] = torch.tensor(blocks)
        for position in range(length):
            values = torch.randn(2, HEADS, DIM, generator=generator)
            cache[blocks[position // BLOCK], :, position % BLOCK] = values.to(dtype)
    return cache, tables


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.one_of(st.just(1), st.integers(1, 9)), st.integers(0, 40)),
        min_size=1,
        max_size=9,
    ),
    bf16=st.booleans(),
    small=st.booleans(),
)
def test_attention_of_the_cpu_is_that_of_the_reference(rows, bf16, small):
    """Any mix of chunks and single tokens, over memory in which others left NaN."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    new, old = [n for n, _ in rows], [o for _, o in rows]
    cache, tables = paged([a + b for a, b in rows], dtype)
    q = torch.randn(sum(new), HEADS, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = ReferenceAttention().plan(tables, new, old)(q, cache, 0.3)
    planner = cpu.CPUAttention(BLOCK, HEADS, DIM, dtype)
    before, cpu.GROUP_ELEMENTS = cpu.GROUP_ELEMENTS, 200 if small else cpu.GROUP_ELEMENTS
    try:
        plan = planner.plan(tables, new, old)
        found = plan(q, cache, 0.3), plan(q, cache, 0.3)
    finally:
        cpu.GROUP_ELEMENTS = before
    assert torch.equal(found[0], found[1]), "buffers are reused, results are not"
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if bf16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found[0], expected, **tolerance)


def test_attention_of_one_row_does_not_depend_on_its_neighbours():
    """float32, up to the last bits of its sums: the promise of equal text rests on it."""
    lengths = [5, 9, 33, 40, 17, 64]
    cache, tables = paged(lengths, torch.float32)
    q = torch.randn(len(lengths), HEADS, DIM)
    planner = cpu.CPUAttention(BLOCK, HEADS, DIM, torch.float32)
    old = [length - 1 for length in lengths]
    together = planner.plan(tables, [1] * len(lengths), old)(q, cache, 0.3)
    for row, length in enumerate(lengths):
        width = -(-length // BLOCK)
        plan = planner.plan(tables[row : row + 1, :width], [1], [length - 1])
        alone = plan(q[row : row + 1], cache, 0.3)[0]
        torch.testing.assert_close(alone, together[row], rtol=1e-6, atol=1e-6)


def test_attention_ignores_what_other_sequences_left_behind():
    """Blocks reused after a sequence with NaN must not leak it: 0 x NaN is NaN."""
    cache, tables = paged([5, 2], torch.float32)
    assert cache.isnan().any()
    out = reference.paged_attention(torch.randn(2, HEADS, DIM), cache, tables, (1, 1), (4, 1), 0.3)
    assert torch.isfinite(out).all()


def test_keys_and_values_go_where_the_mapping_says():
    cache = torch.zeros(3, 2, BLOCK, HEADS, DIM)
    k, v = torch.randn(2, HEADS, DIM), torch.randn(2, HEADS, DIM)
    keys = torch.tensor([2 * 2 * BLOCK + 3, 1 * 2 * BLOCK])  # block 2 offset 3, block 1 offset 0
    reference.store_kv(k, v, cache, torch.stack([keys, keys + BLOCK]))
    assert torch.equal(cache[2, 0, 3], k[0]) and torch.equal(cache[2, 1, 3], v[0])
    assert torch.equal(cache[1, 0, 0], k[1]) and torch.equal(cache[1, 1, 0], v[1])
    assert (cache != 0).sum() == 4 * HEADS * DIM


@pytest.mark.parametrize("rows", [1, 3, 16, 65])
@pytest.mark.parametrize("shape", [(48, 32), (7, 33), (1, 1), (130, 64)])
def test_packed_matrix_gives_the_product_of_the_plain_one(rows, shape):
    if not cpu.can_pack(torch.empty(shape, dtype=torch.bfloat16)):
        pytest.skip("this CPU has no bfloat16 kernels in oneDNN")
    torch.manual_seed(0)
    weight, bias = torch.randn(shape).bfloat16(), torch.randn(shape[0]).bfloat16()
    x = torch.randn(rows, shape[1]).bfloat16()
    packed = KERNELS.pack_weight(weight)
    assert packed is not weight
    for b in (bias, None):
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        found = KERNELS.linear(x, packed, b)
        assert found.shape == (rows, shape[0]) and found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 17])
def test_what_a_packed_product_takes_along_is_that_of_the_plain_operations(rows):
    if not cpu.can_pack(torch.empty(2, 2, dtype=torch.bfloat16)):
        pytest.skip("this CPU has no bfloat16 kernels in oneDNN")
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 24).bfloat16(), torch.randn(40).bfloat16()
    x, residual = torch.randn(rows, 24).bfloat16(), torch.randn(rows, 40).bfloat16()
    norm = Norm(torch.randn(40).bfloat16(), torch.randn(40).bfloat16(), 1e-5)
    kept, packed = residual.clone(), KERNELS.pack_weight(weight)
    squared = KERNELS.linear_squared_relu(x, packed, bias)
    assert torch.equal(squared, reference.squared_relu(KERNELS.linear(x, packed, bias)))
    assert (squared == 0).any() and (squared > 0).any()
    exact = residual.double() + F.linear(x.double(), weight.double(), bias.double())
    for matrix in (packed, weight):
        found, normed = KERNELS.linear_add_layer_norm(x, matrix, bias, residual, norm)
        torch.testing.assert_close(found.double(), exact, rtol=2**-6, atol=5e-2)
        assert torch.equal(normed, KERNELS.layer_norm(found, norm))
    assert torch.equal(residual, kept), "what is added to is not changed"


def test_float32_matrices_are_left_as_they_are():
    weight = torch.randn(8, 8)
    assert KERNELS.pack_weight(weight) is weight


# Of the two kinds of model there are, as small as the kernels allow.
PAGED = KernelSizes(
    32, 64, torch.float32, "layer", "squared_relu", attention=PagedAttentionSizes(2, 16, 8, 4, True)
)
SLOTTED = KernelSizes(
    32, 48, torch.float32, "rms", "gelu_gate", 30.0,
    window=WindowAttentionSizes(3, 16, 8, 17, 32), recurrence=RecurrenceSizes(3, 16, 4),
)  # fmt: skip


@pytest.mark.parametrize("name", ["auto", "reference", "triton"])
def test_warm_up_calls_every_operation(name, monkeypatch):
    """A size or an argument it gets wrong would show here and not before a start on a GPU."""
    monkeypatch.setattr(warm_up, "ROWS", (1, 2))
    monkeypatch.setattr(warm_up, "CHUNKS", (6,))
    monkeypatch.setattr(warm_up, "VOCAB_ROWS", 40)
    with use_kernels(name):
        body = kernels_for(torch.device("cpu"))
        assert kernels_for(torch.device("cpu")) is body, "layers share one body"
    called, in_slots = set(), []

    class Watched:
        def __getattr__(self, operation):
            called.add(operation)
            if operation in ("recurrence", "window_attend"):
                return partial(self.with_segments, getattr(body, operation))
            return getattr(body, operation)

        def with_segments(self, operation, *args):
            (segments,) = (a for a in args if isinstance(a, Segments))
            in_slots.append((operation.__name__, segments.starts is None))
            return operation(*args)

    for sizes in (PAGED, SLOTTED):
        warm_up.compile_kernels(Watched(), sizes, torch.device("cpu"))
    assert called == {n for n in vars(Kernels) if not n.startswith("_")} - {
        "name", "pack_weight", "pack_recurrence",
    }  # fmt: skip
    both = ((n, decode) for n in ("recurrence", "window_attend") for decode in (True, False))
    assert set(in_slots) == set(both), "steps and prompts have kernels of their own"
