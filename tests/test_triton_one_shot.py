"""Sums and gathers over memory that ranks share, with N ranks that take turns in one process.

Triton's interpreter runs one program after another, so a rank cannot wait for a later one: there each
call is made in its two halves, in any order the protocol allows. On a GPU the ranks run side by side.
"""

import random

import pytest
import torch

pytest.importorskip("triton")

from tprt.kernels import Norm
from tprt.kernels.triton_ops import norm as single_rank
from tprt.kernels.triton_ops.one_shot import OneShot, buffer_bytes

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def make_ranks(size, max_rows=4, row_bytes=512):
    """The ranks of one group in one process, and their buffers."""
    count = buffer_bytes(max_rows, row_bytes)
    buffers = [torch.zeros(count, dtype=torch.uint8, device=DEVICE) for _ in range(size)]
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], device=DEVICE)
    return [OneShot(addresses, rank, max_rows, row_bytes) for rank in range(size)], buffers


def flags(buffers, places):
    """int64 [rank that holds them, place, rank that set them]."""
    size = len(buffers)
    return torch.stack([b[: places * 128].view(torch.int64).view(places, 16) for b in buffers])[
        :, :, :size
    ]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def norm_of(width, dtype):
    return Norm(randn(width, seed=7, dtype=dtype), randn(width, seed=8, dtype=dtype), 1e-5)


@pytest.mark.parametrize(
    ("size", "partial", "dtype"),
    [
        (2, torch.float32, torch.float32),
        (3, torch.float16, torch.float16),
        (4, torch.bfloat16, torch.bfloat16),
        (8, torch.bfloat16, torch.bfloat16),
        (8, torch.float32, torch.bfloat16),
    ],
)
def test_sum_with_bias_residual_and_norm(size, partial, dtype):
    """The bits of float32 sums in rank order, on every rank."""
    ranks, _ = make_ranks(size, max_rows=3, row_bytes=512)
    for rows, width in ((3, 96), (1, 128), (2, 77)):
        parts = randn(size, rows, width, seed=rows, dtype=partial)
        bias, residual = randn(width, dtype=dtype), randn(rows, width, seed=9, dtype=dtype)
        norm = norm_of(width, dtype)
        for rank, part in zip(ranks, parts, strict=True):
            rank.publish(part)
        found = [
            rank.all_reduce_add_layer_norm(part, bias, residual, norm, published=True)
            for rank, part in zip(ranks, parts, strict=True)
        ]
        summed = parts[0].float()
        for part in parts[1:]:
            summed = summed + part.float()
        total = (residual.float() + (summed + bias.float())).to(dtype)
        assert torch.equal(found[0][0], total) and found[0][0].dtype == dtype
        expected = torch.layer_norm(
            total.double(), (width,), norm.weight.double(), norm.bias.double(), norm.eps
        )
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found[0][1].double(), expected, rtol=tolerance, atol=tolerance)
        for other in found[1:]:
            assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_sum_is_rounded_once(dtype):
    ranks, _ = make_ranks(4)
    parts = randn(4, 2, 100, dtype=dtype)
    wide = torch.stack([torch.cat([part, part], 1) for part in parts])
    for rank, part in zip(ranks, wide, strict=True):
        rank.publish(part[:, 100:])  # rows apart
    found = [r.all_reduce(p[:, 100:], published=True) for r, p in zip(ranks, wide, strict=True)]
    expected = ((parts[0].float() + parts[1].float()) + parts[2].float()) + parts[3].float()
    assert all(torch.equal(x, expected.to(dtype)) and x.is_contiguous() for x in found)


@pytest.mark.parametrize("count", [1, 5, 64])
def test_gathered_words_are_ordered_by_rank(count):
    ranks, _ = make_ranks(3)
    for step in range(3):
        words = torch.arange(3 * count, device=DEVICE).view(3, count) * (2**55 + step) - 2**60
        for rank, mine in zip(ranks, words, strict=True):
            rank.publish_words(mine)
        found = [r.all_gather(mine, published=True) for r, mine in zip(ranks, words, strict=True)]
        assert all(torch.equal(x, words) for x in found)


@pytest.mark.parametrize(("size", "calls"), [(2, 60), (4, 50), (8, 50)])
def test_fast_and_slow_ranks_in_any_order_the_protocol_allows(size, calls):
    """A rank may run ahead by a whole call, and its peers still find what it wrote before.

    Sums of changing numbers of rows and gathers take turns, as in a model whose batches change.
    """
    ranks, buffers = make_ranks(size, max_rows=2, row_bytes=64)
    order = random.Random(size)
    rows = [order.choice([0, 1, 1, 2]) for _ in range(calls)]  # 0: words instead
    made = torch.arange(calls * size).view(calls, size)

    def given(call, rank):
        value = int(made[call, rank])
        if not rows[call]:
            return torch.full((3,), value, dtype=torch.int64, device=DEVICE)
        return torch.full((rows[call], 16), value, dtype=torch.float32, device=DEVICE)

    published, done, results = [0] * size, [0] * size, [[] for _ in range(size)]
    ahead = 0
    while min(done) < calls:
        rank = order.randrange(size)
        call = done[rank]
        if published[rank] == call < calls:
            x = given(call, rank)
            ranks[rank].publish(x) if rows[call] else ranks[rank].publish_words(x)
            published[rank] += 1
        elif call < calls and min(published) > call:  # else it would wait
            x = given(call, rank)
            make = ranks[rank].all_reduce if rows[call] else ranks[rank].all_gather
            results[rank].append(make(x, published=True))
            done[rank] += 1
        ahead = max(ahead, max(published) - min(done))
    assert ahead == 2, "a rank wrote its next part while another had yet to read the last one"
    for call in range(calls):
        whole = made[call].to(DEVICE)
        if rows[call]:
            expected = torch.full((rows[call], 16), float(whole.sum()), device=DEVICE)
        else:
            expected = whole.unsqueeze(1).expand(size, 3)
        assert all(torch.equal(found[call], expected) for found in results), f"call {call}"
    # Each place has counted its own calls, the same everywhere.
    expected = [sum(n > place for n in rows) for place in range(2)] + [rows.count(0)]
    counted = flags(buffers, 3)
    assert all(counted[:, place].eq(n).all() for place, n in enumerate(expected))


def test_counts_go_on_where_they_stand():
    """Nothing is reset: a place in its 2^40th call works as in its first."""
    ranks, buffers = make_ranks(2)
    for buffer in buffers:
        buffer[: 5 * 128].view(torch.int64).view(5, 16)[:, :2] = 2**40 + 1
    for turn in range(3):
        parts = randn(2, 4, 32, seed=turn)
        for rank, part in zip(ranks, parts, strict=True):
            rank.publish(part)
        found = [r.all_reduce(p, published=True) for r, p in zip(ranks, parts, strict=True)]
        assert all(torch.equal(x, parts[0] + parts[1]) for x in found)
    assert (
        flags(buffers, 5)[:, :4].eq(2**40 + 4).all() and flags(buffers, 5)[:, 4].eq(2**40 + 1).all()
    )


def test_neighbours_in_memory_are_left_alone():
    """The longest rows of the last place end where the buffer ends."""
    count = buffer_bytes(2, 64)
    memory = torch.zeros(2, count + 256, dtype=torch.uint8, device=DEVICE)
    memory[:, count:] = 77
    addresses = torch.tensor([row.data_ptr() for row in memory], device=DEVICE)
    ranks = [OneShot(addresses, rank, 2, 64) for rank in range(2)]
    for _ in range(2):
        for rank in ranks:
            rank.publish(randn(2, 16))
            rank.publish_words(torch.arange(8, device=DEVICE))
        for rank in ranks:
            rank.all_reduce(randn(2, 16), published=True)
            rank.all_gather(torch.arange(8, device=DEVICE), published=True)
    assert memory[:, count:].eq(77).all() and memory[:, count - 64 : count].any()


def test_what_does_not_fit_is_told_by_shape_alone():
    (rank, _), _ = make_ranks(2, max_rows=4, row_bytes=512)
    assert rank.fits(4, 128, torch.float32) and rank.fits(1, 256, torch.bfloat16)
    assert not rank.fits(5, 8, torch.float32) and not rank.fits(1, 129, torch.float32)
    with pytest.raises(AssertionError):
        rank.publish(randn(5, 8))
    with pytest.raises(AssertionError):
        OneShot(torch.zeros(2, dtype=torch.int64), 0, 4, 100)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_side_by_side_in_a_graph_replayed_ten_thousand_times(size):
    """Each rank on a stream of its own, one launch per call; two layers and an exchange per replay."""
    rows, width, replays, dtype = 4, 4096, 10_000, torch.bfloat16
    ranks, buffers = make_ranks(size, max_rows=16, row_bytes=2 * width)
    bias, norm = randn(width, dtype=dtype), norm_of(width, dtype)
    parts = randn(size, rows, width, dtype=dtype)
    residuals, outs = (torch.zeros(size, rows, width, dtype=dtype, device=DEVICE) for _ in "12")
    words = torch.arange(size, device=DEVICE).unsqueeze(1).repeat(1, 8)
    gathered = torch.zeros(size, size, 8, dtype=torch.int64, device=DEVICE)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    streams = [torch.cuda.Stream() for _ in ranks]

    def next_part(i, layer, normed):
        return (normed * (0.1 * (i + 1) + layer)).to(dtype)

    def forward(i):
        """What rank i does in one replay; its parts change with what it computed before."""
        x = parts[i]
        for layer in range(2):
            total, normed = ranks[i].all_reduce_add_layer_norm(x, bias, residuals[i], norm)
            residuals[i].copy_(total * 0.5)
            outs[i].copy_(normed)
            x = next_part(i, layer, normed)
        parts[i].copy_(x)
        words[i].add_(size)
        gathered[i].copy_(ranks[i].all_gather(words[i]))

    def side_by_side():
        for i, stream in enumerate(streams):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                forward(i)
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)

    # Compiling and loading must not meet a rank that spins: here none waits, as its peers' flags are
    # there already.
    begin = parts.clone(), words.clone()
    for holder, buffer in enumerate(buffers):
        told = buffer[: 17 * 128].view(torch.int64).view(17, 16)
        told[:, :size] = 2**50
        told[:, holder] = 0
    for i, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            forward(i)
        torch.cuda.synchronize()
    for buffer in buffers:
        buffer.zero_()
    parts.copy_(begin[0])
    words.copy_(begin[1])
    residuals.zero_()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side_by_side()
        wrong.add_((residuals != residuals[0]).any())
        wrong.add_((outs != outs[0]).any())
        wrong.add_((gathered != words).any())
    for _ in range(replays - 1):
        graph.replay()
    stack, residual = parts.clone(), residuals[0].clone()
    graph.replay()
    for layer in range(2):
        total, normed = single_rank.add_layer_norm(stack, bias, residual, norm)
        residual = total * 0.5
        stack = torch.stack([next_part(i, layer, normed) for i in range(size)])
    assert int(wrong) == 0
    torch.testing.assert_close(outs[0], normed, rtol=4e-2, atol=4e-2)
    torch.testing.assert_close(residuals[0], residual, rtol=4e-2, atol=4e-2)
    assert normed.isfinite().all() and normed.float().std() > 0.1
    counted = flags(buffers, 17)
    assert counted[:, :rows].eq(2 * replays).all() and counted[:, 16].eq(replays).all()
    assert int(words[0, 0]) == size * replays


def test_abort_ends_the_wait_for_a_rank_that_never_comes():
    """Without it this call would spin for ever, here as on a GPU."""
    ranks, _buffers = make_ranks(2, max_rows=2, row_bytes=64)
    ranks[0].abort()
    found = ranks[0].all_reduce(torch.ones(2, 8))
    assert found.shape == (2, 8)
