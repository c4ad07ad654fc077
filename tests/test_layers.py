"""Sharded layers against the whole layer: every rank is built in one process, on paper.

The collectives themselves run in test_parity.py; here the cut, the padding and the place of the bias
are checked with plain sums.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tprt.batch import Segments
from tprt.distributed.sharding import (
    ShardSpec,
    broadcast_rows,
    cut,
    padded_cut,
    padded_part,
    replicated,
    selected_rows,
)
from tprt.distributed.tp_group import TPGroup
from tprt.distributed.vocabulary import Vocabulary
from tprt.errors import ConfigError
from tprt.kernels import Norm, reference
from tprt.kernels.cpu import can_pack
from tprt.layers.attention import Attention
from tprt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from tprt.layers.linear import ColumnParallelLinear, RowParallelLinear
from tprt.layers.norm import HeadLayerNorm
from tprt.layers.rotary import RotaryEmbedding

F32 = torch.float32


def ranks(size: int) -> list[TPGroup]:
    return [TPGroup(rank, size) for rank in range(size)]


def fill(module: torch.nn.Module, whole: dict[str, torch.Tensor]) -> torch.nn.Module:
    for name, parameter in module.named_parameters():
        parameter.shard_spec.load(parameter, lambda s, t=whole[name]: t[s])
    return module


def forward_on_paper(monkeypatch, module: str, forwards: list) -> list[torch.Tensor]:
    """Run each rank's forward with an all-reduce that really sums over the ranks.

    The first round collects what each rank would send, the second hands everyone the sum.
    """
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(f"{module}.all_reduce", lambda x, tp: sent.append(x.clone()) or x)
    for forward in forwards:
        forward()
    if sent:
        monkeypatch.setattr(f"{module}.all_reduce", lambda x, tp: torch.stack(sent).sum(0))
    return [forward() for forward in forwards]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_column_then_row_is_the_whole_layer(size, monkeypatch):
    """A bias added on every rank, or a cut along the wrong side, shows here at sizes above 1."""
    torch.manual_seed(0)
    up = {"weight": torch.randn(24, 8), "bias": torch.randn(24)}
    down = {"weight": torch.randn(8, 24), "bias": torch.randn(8)}
    x = torch.randn(5, 8)
    r = torch.randn(5, 8)
    norm = Norm(torch.randn(8), torch.randn(8), 1e-5)
    expected = r + F.linear(F.linear(x, **up), **down)
    normed = F.layer_norm(expected, (8,), norm.weight, norm.bias, norm.eps)
    forwards = []
    for tp in ranks(size):
        column = fill(ColumnParallelLinear(8, 24, tp, F32), up)
        row = fill(RowParallelLinear(24, 8, tp, F32), down)
        assert column.weight.shape == (24 // size, 8)
        forwards.append(lambda column=column, row=row: row(column(x), r, norm))
    for out, h in forward_on_paper(monkeypatch, "tprt.layers.linear", forwards):
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(h, normed)


@pytest.mark.parametrize("removed", [(), ((2, 4),), ((0, 0), (3, 3), (8, 9))])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_embedding_and_head_with_a_vocabulary_that_needs_padding(size, tied, removed, monkeypatch):
    torch.manual_seed(0)
    table, ids, x = torch.randn(10, 6), torch.arange(10), torch.randn(3, 6)
    vocabulary = Vocabulary(10, removed)
    kept = [i for i in range(10) if not vocabulary.removed_of([i])]
    embeddings, logits, columns = [], [], []
    for tp in ranks(size):
        embedding = fill(VocabParallelEmbedding(vocabulary, 6, tp, F32), {"weight": table})
        embeddings.append(lambda embedding=embedding: embedding(ids))
        head = ParallelLMHead(vocabulary, 6, tp, F32, embedding if tied else None)
        head = fill(head, {"weight": table})
        assert len(head(x)[0]) == len(head.ids) == vocabulary.part(size)
        logits.append(head(x))
        columns += head.ids.tolist()
    for rows in forward_on_paper(monkeypatch, "tprt.layers.embedding", embeddings):
        assert torch.equal(rows[kept], table[kept])
        assert sum(map(bool, rows.any(1).tolist())) == len(kept)
    together = torch.cat(logits, 1)
    torch.testing.assert_close(together[:, : len(kept)], (x @ table.T)[:, kept])
    assert not together[:, len(kept) :].any(), "padding rows must be zero, not uninitialised memory"
    assert columns[: len(kept)] == kept and columns == sorted(set(columns))
    assert all(i >= 10 for i in columns[len(kept) :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_is_packed_beside_the_rows_of_the_embedding(dtype):
    """The second rank of two, whose rows end in padding; without a layout for this dtype, no copy."""
    torch.manual_seed(0)
    table, x = torch.randn(37, 64).to(dtype), torch.randn(3, 64).to(dtype)
    tp, vocabulary = ranks(2)[1], Vocabulary(37)
    embedding = fill(VocabParallelEmbedding(vocabulary, 64, tp, dtype), {"weight": table})
    head = ParallelLMHead(vocabulary, 64, tp, dtype, embedding)
    before = head(x)
    head.finish_loading()
    packed = head.packed
    assert (packed is not None) == can_pack(table)
    assert torch.equal(embedding.weight[:18], table[19:]), "the embedding keeps its rows"
    assert head.copied_elements() == 19 * 64
    torch.testing.assert_close(head(x), before, atol=0.07, rtol=0.01)
    torch.testing.assert_close(head(x)[:, :18], (x @ table[19:].T).float(), atol=0.07, rtol=0.01)
    assert not head(x)[:, 18:].any()


@pytest.mark.parametrize("per_head", [False, True])
def test_queries_and_keys_have_norms_of_their_own_per_head(per_head):
    torch.manual_seed(0)
    shape = (4, 6) if per_head else (6,)
    pairs = [{"weight": torch.randn(shape), "bias": torch.randn(shape)} for _ in "qk"]
    x = torch.randn(3, 4, 2, 6)
    still = torch.ones(3, 1, 1, 2), torch.zeros(3, 1, 1, 2)  # no rotation
    expected = [
        F.layer_norm(x[:, :, i], (6,), eps=1e-5) * pair["weight"] + pair["bias"]
        for i, pair in enumerate(pairs)
    ]
    out = []
    for tp in ranks(2):
        norms = [fill(HeadLayerNorm(4, 6, tp, F32, per_head), pair) for pair in pairs]
        assert norms[0].weight.shape == (2, 6)
        layer = Attention(4, 6, tp, (norms[0], norms[1]), 1e-5)
        assert not list(layer.parameters()), "they have their names elsewhere"
        mine = x[:, 2 * tp.rank : 2 * tp.rank + 2]
        before = reference.qk_norm_rotary(mine, layer._stack(), *still)
        layer.finish_loading()
        after = reference.qk_norm_rotary(mine, layer.stacked, *still)
        assert torch.equal(before, after)
        out.append(after)
    for i in range(2):
        torch.testing.assert_close(torch.cat([o[:, :, i] for o in out], 1), expected[i])


def test_bf16_rotary_rounds_positions_and_products():
    """Independent emulation of reference precision: P, inv_freq and P x inv_freq in bfloat16."""
    rotary_dim, theta = 8, 25000.0
    table = RotaryEmbedding(rotary_dim, 4096, theta, "bf16", torch.device("cpu"))
    inv_freq = torch.tensor([theta ** (-2 * i / rotary_dim) for i in range(4)]).to(torch.bfloat16)
    for position in (0, 1, 255, 256, 257, 1995, 4095):
        angle = torch.tensor(float(position)).to(torch.bfloat16) * inv_freq
        assert angle.dtype == torch.bfloat16
        assert torch.equal(table.cos[position], angle.cos().float().repeat(2))
        signed = torch.cat([-angle.sin(), angle.sin()]).float()
        assert torch.equal(table.sin[position], signed)
    assert torch.equal(table.cos[257], table.cos[256]), "257 rounds to 256 in bfloat16"
    exact = RotaryEmbedding(rotary_dim, 4096, theta, "fp32", torch.device("cpu"))
    assert not torch.equal(exact.cos[257], exact.cos[256])


def test_rotary_turns_half_split_pairs_and_leaves_the_rest():
    x = torch.randn(3, 2, 2, 10)
    kept = x.clone()
    table = RotaryEmbedding(4, 8, 100.0, "fp32", torch.device("cpu"))
    positions = torch.tensor([0, 5, 7])
    turned = reference.qk_norm_rotary(x, None, *table(positions))
    for t, position in enumerate(positions.tolist()):
        for i in range(2):  # pairs are (i, i + 2), not (2i, 2i + 1)
            angle = torch.tensor(position * 100.0 ** (-2 * i / 4))
            a, b = x[t, ..., i], x[t, ..., i + 2]
            torch.testing.assert_close(turned[t, ..., i], a * angle.cos() - b * angle.sin())
            torch.testing.assert_close(turned[t, ..., i + 2], b * angle.cos() + a * angle.sin())
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(x, kept), "the argument is not changed"


def test_squared_relu_in_float16_does_not_overflow():
    x = torch.tensor([-3.0, 0.0, 2.0, 255.0, 300.0, 60000.0, float("nan")], dtype=torch.float16)
    y = reference.squared_relu(x)
    assert y[:3].tolist() == [0.0, 0.0, 4.0]
    assert torch.isfinite(y[:6]).all() and y[4] == 65504.0
    assert torch.isnan(y[6]), "a NaN must stay visible"


@given(
    n=st.integers(1, 40),
    other=st.integers(1, 5),
    size=st.integers(1, 8),
    transposed=st.booleans(),
    data=st.data(),
)
def test_shards_put_together_are_the_tensor(n, other, size, transposed, data):
    """Property: load on every rank, store from every rank, and nothing is lost, moved or added."""
    dim = data.draw(st.integers(0, 1))
    shape = (n, other) if dim == 0 else (other, n)
    whole = torch.arange(n * other, dtype=F32).view(shape) + 1
    back = torch.zeros(shape)
    for rank in range(size):
        plain = padded_cut(shape, dim, rank, padded_part(n, size))
        spec = ShardSpec(plain.canonical_shape, plain.local_shape, plain.pieces, transposed)
        parameter = torch.full(spec.parameter_shape, float("nan"))
        spec.load(parameter, lambda s: whole[s])
        assert torch.isfinite(parameter).all(), "padding must be zeroed"
        spec.store(parameter, back)
    assert torch.equal(back, whole)


@given(st.integers(1, 40), st.integers(1, 8), st.data())
def test_columns_of_all_ranks_are_the_kept_ids(n, size, data):
    """Property: runs, tables and counts of a trimmed vocabulary all describe one list of ids."""
    flags = data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    kept = [i for i in range(n) if flags[i]]
    gone = [(i, i) for i in range(n) if not flags[i]]
    vocabulary = Vocabulary(n, tuple(reversed(gone)))
    part, whole = vocabulary.part(size), torch.arange(1, n + 1).unsqueeze(1)
    assert part == padded_part(len(kept), size) and vocabulary.num_kept == len(kept)
    assert vocabulary.removed_of(range(n)) == [i for i, _ in gone]
    cpu, back = torch.device("cpu"), torch.zeros_like(whole)
    for rank in range(size):
        mine = kept[rank * part : (rank + 1) * part]
        runs = vocabulary.runs(rank, size)
        assert [i for run in runs for i in run] == mine and all(runs)
        ids = vocabulary.column_ids(rank, size, cpu).tolist()
        assert ids[: len(mine)] == mine and len(ids) == part and ids == sorted(set(ids))
        rows = [ids.index(i) if i in mine else part for i in range(n)]
        assert vocabulary.row_of(rank, size, cpu).tolist() == rows
        num_valid = data.draw(st.integers(0, n + 3))
        valid = vocabulary.valid_columns(num_valid, rank, size)
        assert valid == sum(i < num_valid for i in mine)
        spec = selected_rows((n, 1), runs, part + 1)
        parameter = torch.full(spec.parameter_shape, -1)
        spec.load(parameter, lambda s: whole[s])
        assert parameter.flatten().tolist() == [i + 1 for i in mine] + [0] * (part + 1 - len(mine))
        spec.store(parameter, back)
        assert spec.needed_bytes(8) == 8 * len(mine)
    assert back.flatten().tolist() == [(i + 1) * flags[i] for i in range(n)]


def test_replicated_and_broadcast_specs_round_trip():
    whole = torch.randn(5)
    for spec in (replicated((5,)), broadcast_rows(3, (5,))):
        parameter, back = torch.empty(spec.parameter_shape), torch.zeros(5)
        spec.load(parameter, lambda s: whole[s])
        spec.store(parameter, back)
        assert torch.equal(back, whole)
        assert spec.needed_bytes(4) == 20


def test_uneven_cut_is_refused():
    with pytest.raises(ConfigError, match="does not divide over 3 ranks"):
        cut((8, 4), 0, 0, 3)


def test_rows_of_a_pass_are_sent_to_the_device_once_for_all_layers():
    """Each copy from the host costs a launch, and layers ask for the same rows."""
    slots, positions = torch.tensor([1, 0]), torch.tensor([0, 1, 2, 7, 8])
    chunks = Segments(slots=slots, positions=positions, query_lens=(3, 2), starts=(0, 7))
    assert chunks.tail(2).tolist() == [1, 2, 3, 4] and chunks.tail(9).tolist() == [0, 1, 2, 3, 4]
    assert chunks.tail(2) is chunks.tail(2) and chunks.index is chunks.index
    steps = Segments(slots=slots, positions=slots, query_lens=(1, 1), starts=None)
    assert steps.tail(4).tolist() == steps.last_rows.tolist() == [0, 1]
