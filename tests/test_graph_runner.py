"""Decode steps in buckets, as the CPU runs them: the discipline of CUDA graphs without a GPU."""

import random

import numpy as np
import pytest
import torch
from fakes import HashModel, fake_engine
from hypothesis import given
from hypothesis import strategies as st
from one_device import OneDevice
from recurrent_models import BYTES, WINDOW, byte_engine
from test_engine import mixed_requests, request, run, tokens

from tprt.bench.synthetic import make_engine, random_model
from tprt.config import EngineConfig, PersimmonConfig
from tprt.distributed.progress import Progress
from tprt.distributed.tp_group import TPGroup
from tprt.distributed.vocabulary import Vocabulary
from tprt.engine import graph_runner, transfer
from tprt.engine.graph_runner import GraphRunner, pack_step
from tprt.engine.model_runner import ModelRunner, warm_up_shapes
from tprt.engine.step_record import DRAW, MAX_BANS, MAX_BUCKET, Kind, StepRecord, bucket_of
from tprt.errors import StepTimeout
from tprt.models import get_model_class

TOY = PersimmonConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=8,
    max_position_embeddings=128,
)
ENGINES = pytest.mark.parametrize("make", [fake_engine, byte_engine], ids=["paged", "slots"])


def decode_record(rows: list[tuple[int, int, int]], **more) -> StepRecord:
    """A step of (slot, position, token) rows."""
    table = np.array([(slot, position, 1, DRAW) for slot, position, _ in rows])
    ids = np.array([token for *_, token in rows])
    return StepRecord(step=7, kind=Kind.STEP, rows=table, tokens=ids, **more)


def toy_engine(**settings):
    config = EngineConfig(dtype="float32", block_size=4, max_num_seqs=12, **settings)
    return make_engine(random_model(TOY, TPGroup(), torch.float32, seed=1), config)


@given(st.integers(1, 400))
def test_a_bucket_holds_its_rows_and_little_more(rows):
    bucket = bucket_of(rows)
    if rows > MAX_BUCKET:
        assert bucket == 0
    else:
        assert rows <= bucket <= max(2 * rows - 1, 1) or bucket - rows < 8
        assert bucket_of(bucket) == bucket, "a full bucket is its own"
        assert bucket >= bucket_of(max(1, rows - 1))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("count", [1, 3, 5, 7, 11])
def test_padding_rows_never_touch_live_state(count, full):
    """A step of ``count`` rows in its bucket, against the same step without any padding."""
    engines = [toy_engine(), toy_engine(enforce_eager=True)]
    runners = [engine.runner for engine in engines]
    rng, order = (
        random.Random(count),
        torch.randperm(12, generator=torch.Generator().manual_seed(3)),
    )
    slots = order[:count].tolist()
    rows = [(slot, rng.randrange(5, 30), rng.randrange(96)) for slot in slots]
    results = []
    for runner in runners:
        generator = torch.Generator().manual_seed(5)
        for cache in runner.caches:
            cache.kv[1:] = torch.randn(cache.kv[1:].shape, generator=generator)
        # Eight blocks for each slot, none of them shared.
        tables = torch.arange(12 * 8).view(12, 8) + 1
        runner.state.block_tables[:12, :8] = tables
        runner.state.last_tokens[:12] = torch.arange(12)
        # A device token, and a token that the host knows.
        ids = [(s, p, -1 if i % 2 else t) for i, (s, p, t) in enumerate(rows)]
        before = [cache.kv.clone() for cache in runner.caches]
        result = runner.execute(decode_record(ids, full=full), 0)
        results.append((result.check(Progress()), before))
    assert bucket_of(count) > count or count == 1
    assert results[0][0] == results[1][0] and len(results[0][0]) == count
    for padded, plain, before in zip(
        runners[0].caches, runners[1].caches, results[0][1], strict=True
    ):
        torch.testing.assert_close(padded.kv[1:], plain.kv[1:], rtol=1e-5, atol=1e-6)
        changed = (padded.kv != before).flatten(2).any(2).any(1).nonzero().flatten().tolist()
        written = {int(runners[0].state.block_tables[slot, at // 4]) for slot, at, _ in rows}
        assert set(changed) - {0} == written, "padding is written to block 0 alone"
    state, other = runners[0].state, runners[1].state
    assert torch.equal(state.last_tokens[:12], other.last_tokens[:12])
    assert torch.equal(state.block_tables, other.block_tables)


def contents(caches) -> list[torch.Tensor]:
    """[slots, ...] of everything that layers keep in slots."""
    return [tensor for cache in caches for tensor in vars(cache).values()]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("count", [1, 3, 5, 7, 11])
def test_padding_rows_never_touch_the_state_of_others(count, full):
    """As above, of a model that keeps its state in slots; snapshots lie behind them."""
    engines = [byte_engine(max_num_seqs=12, enforce_eager=eager) for eager in (False, True)]
    rng, scratch = random.Random(count), 12
    slots = rng.sample(range(12), count)
    # At the beginning, over the end of the ring and far behind it; a sequence's first token too.
    places = [0, 1, WINDOW, 31, 32, 100, *(rng.randrange(60) for _ in slots)]
    rows = [(slot, place, rng.randrange(256)) for slot, place in zip(slots, places, strict=False)]
    results, before = [], []
    for runner in (engine.runner for engine in engines):
        generator = torch.Generator().manual_seed(5)
        for tensor in contents(runner.slot_caches):
            assert len(tensor) > scratch + 1, "there are snapshots"
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        runner.state.last_tokens[:12] = torch.arange(12)
        before = [tensor.clone() for tensor in contents(runner.slot_caches)]
        ids = [(s, p, -1 if i % 2 else t) for i, (s, p, t) in enumerate(rows)]
        results.append(runner.execute(decode_record(ids, full=full), 0).check(Progress()))
    assert results[0] == results[1] and len(results[0]) == count
    padded, plain = (engine.runner for engine in engines)
    others = [slot for slot in range(len(before[0])) if slot not in (*slots, scratch)]
    for found, expected, old in zip(
        contents(padded.slot_caches), contents(plain.slot_caches), before, strict=True
    ):
        assert torch.equal(found[others], old[others]), "neither other sequences nor snapshots"
        assert not torch.equal(found[slots], old[slots])
        torch.testing.assert_close(found[slots], expected[slots], rtol=1e-4, atol=1e-5)
    assert torch.equal(padded.state.last_tokens[:12], plain.state.last_tokens[:12])


def test_what_captures_leave_is_read_by_nobody():
    """A capture runs its step on buffers of zeros, which is slot 0, before any sequence is there."""
    requests, engine = mixed_requests(4), byte_engine()
    expected = tokens(run(byte_engine(), requests))
    runner = engine.runner
    for tensor in contents(runner.slot_caches):
        tensor.fill_(float("nan"))
    runner.state.make_tables()  # as ``capture`` does on a GPU
    with torch.inference_mode():
        for bucket, full in runner.graphs.keys:
            runner._decode(bucket, full)
    for tensor in contents(runner.slot_caches):
        assert tensor[1:].isnan().all() and not tensor[0].isnan().all()
    assert tokens(run(engine, requests)) == expected


@ENGINES
def test_buckets_change_no_token(make):
    """Every sampling option, chunks and preemption, with and without buckets."""
    few = {"blocks": 20} if make is fake_engine else {"max_num_batched_tokens": 20}
    for seed in range(3):
        requests = mixed_requests(seed)
        with_buckets = tokens(run(make(**few), requests))
        assert with_buckets == tokens(run(make(**few, enforce_eager=True), requests))


@ENGINES
def test_nothing_is_captured_after_the_start(make, monkeypatch):
    """All keys exist before the first step, and every decode step finds its own among them."""
    engine = make(max_num_seqs=8)
    graphs, used = engine.runner.graphs, []
    start = graphs.keys
    assert start == {(b, full) for b in (1, 2, 4, 8) for full in (False, True)}
    monkeypatch.setattr(GraphRunner, "capture", lambda self: pytest.fail("captured after start"))
    replay = graphs.run
    monkeypatch.setattr(graphs, "run", lambda *key: used.append(key) or replay(*key))
    run(engine, mixed_requests(1, count=20))
    run(engine, [request([i], temperature=0.0, max_tokens=3 + i) for i in range(7)])
    assert set(used) <= start and len(set(used)) > 4 and graphs.keys == start
    with pytest.raises(KeyError):
        graphs.run(16, False)


@ENGINES
def test_the_graph_follows_from_the_record_alone(make, monkeypatch):
    """The key in the header of each record is all that decides what runs."""
    engine, seen = make(), []
    execute, graphs = engine.runner.execute, engine.runner.graphs

    def watched(record, checksum):
        ran = []
        monkeypatch.setattr(graphs, "run", lambda *key: ran.append(key) or replay(*key))
        result = execute(record, checksum)
        seen.append((record.graph_key, ran))
        return result

    replay = graphs.run
    engine.runner.execute = watched
    run(engine, mixed_requests(2))
    for key, ran in seen:
        bucket, full, logprobs = key >> 2, bool(key & 2), bool(key & 1)
        assert ran == ([(bucket, full or logprobs)] if key else [])
    assert {bool(key) for key, _ in seen} == {True, False}


def test_more_rows_than_the_largest_bucket_run_without_one():
    rows = [(i, 0, 0) for i in range(MAX_BUCKET + 1)]
    assert decode_record(rows).graph_key == 0
    assert decode_record(rows[:-1]).graph_key == MAX_BUCKET * 4
    bans = np.zeros((MAX_BANS + 1, 2), dtype=np.int64)
    assert decode_record(rows[:2], bans=bans, full=True).graph_key == 0
    runner = GraphRunner(lambda *_: None, 5, None, lambda: None)
    assert runner.buckets == [1, 2, 4, 8]
    assert GraphRunner(print, 64, None, print, limit=51).buckets[-1] == 48
    assert not runner.serves(decode_record(rows[:9])) and runner.serves(decode_record(rows[:5]))


def test_words_of_a_step_pad_rows_and_bans():
    bans = np.array([[1, 40]])
    record = decode_record([(3, 9, -1), (5, 2, 17), (0, 4, 8)], bans=bans, full=True)
    words = pack_step(record, 99, 4, True, scratch_slot=12)
    assert words[0] == 99
    assert words[1:13].reshape(3, 4).tolist() == [[3, 5, 0, 12], [9, 2, 4, 0], [-1, 17, 8, 0]]
    found = words[13:].reshape(MAX_BANS, 2)
    assert found[0].tolist() == [1, 40] and (found[1:] == [-1, 0]).all()
    assert len(pack_step(record, 99, 4, False, 12)) == 13


def test_capture_is_largest_first_and_close_forgets():
    runner = GraphRunner(lambda *_: None, 64, None, lambda: None)
    runner.capture()
    order = list(runner._graphs)
    assert order == sorted(order, key=lambda k: (-k[0], not k[1]))
    runner.close()
    assert not runner.keys


def test_a_step_that_never_ends_is_an_error(monkeypatch):
    class Never:
        def query(self):
            return False

    with pytest.raises(StepTimeout, match=r"step 31 is not done after 0\.02 s"):
        transfer.Download((), Never()).wait("step 31", 0.02)


def test_results_are_read_one_step_late_and_not_overwritten():
    """Two steps in flight use the same output buffer; the first one's tokens must survive."""
    engine = fake_engine(HashModel(), look_ahead=1)
    runner, kept = engine.runner, []
    execute = runner.execute

    def keep(record, checksum):
        result = execute(record, checksum)
        if result.rows:
            kept.append((result, runner.state.last_tokens.clone()))
        return result

    runner.execute = keep
    run(engine, [request([3, 1, 4], max_tokens=9), request([1, 5], max_tokens=9)])
    assert len(kept) > 5
    for result, drawn in kept:
        assert set(result.check(Progress())) <= set(drawn.tolist())


def test_garbage_collection_is_off_during_capture_and_back_afterwards():
    import gc

    with graph_runner._no_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize("config", [TOY, BYTES], ids=["paged", "slots"])
@pytest.mark.parametrize("removed", [(), ((3, 20),)])
@pytest.mark.parametrize("full", [False, True])
def test_a_decode_step_looks_at_no_value(full, removed, config):
    """On the meta device there are none: an operation that needs one on the host raises here.

    What passes can be captured as far as torch's operations go; the kernels' launches are not covered.
    """
    tp = TPGroup(device=torch.device("meta"))
    vocabulary = Vocabulary(config.vocab_size, removed)
    model_class = get_model_class(config.model_type)
    model = model_class(config, tp, torch.float32, vocabulary=vocabulary)
    model.finish_loading()
    runner = ModelRunner(
        model, tp, torch.float32, num_blocks=9, num_states=9, block_size=4, max_num_seqs=6,
        max_model_len=32, num_valid=90,
    )  # fmt: skip
    runner.stream = object()  # as on a GPU, where hints of the host are not taken
    with torch.inference_mode(), OneDevice("meta") as seen:
        runner.state.make_tables()
        for bucket in (1, 8):
            runner._decode(bucket, full)
    assert len(seen.names) > 30
    assert runner.buffers.logits is None or runner.buffers.logits.shape == (8, vocabulary.num_kept)
    with pytest.raises(RuntimeError, match="meta"):
        runner.buffers.tokens.tolist()


def test_the_check_for_values_of_the_host_sees_one():
    slots = torch.zeros(2, dtype=torch.int64, device="meta")
    seen = torch.zeros(4, dtype=torch.bool, device="meta")
    with OneDevice("meta"), pytest.raises(AssertionError, match="value from the host"):
        seen[slots] = True


@given(st.integers(1, 3000), st.integers(1, 700), st.integers(1, 40))
def test_warm_up_takes_the_largest_steps_there_can_be(tokens, length, rows):
    shapes = warm_up_shapes(tokens, length, rows)
    assert max(map(sum, shapes)) == min(tokens, length * rows)
    assert max(map(len, shapes)) == min(tokens, rows)
    assert all(1 <= count <= length for counts in shapes for count in counts)
    assert all(sum(counts) <= tokens and len(counts) <= rows for counts in shapes)
