"""Memory: the plan is known before anything is loaded, and says which setting would fit."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tprt.llm.llm as face
import tprt.llm.memory as memory
from tprt import LLM
from tprt.bench.named_models import PERSIMMON_8B, RECURRENTGEMMA_2B
from tprt.cli import main
from tprt.config import EngineConfig
from tprt.distributed.vocabulary import Vocabulary
from tprt.engine.memory_plan import plan_runtime
from tprt.errors import ConfigError, OutOfMemoryPlan
from tprt.llm.memory import in_gib, largest_that_fits, plan_memory

GIB = 2**30


def test_parts_of_the_plan_follow_from_shapes():
    engine = EngineConfig(max_num_seqs=64, max_num_batched_tokens=2048)
    plan = plan_memory(PERSIMMON_8B, engine, 1, "cuda")
    assert plan.block == 16 * 589_824, "0.5625 MiB a token"
    # The norms of queries and keys are held once per head.
    assert plan.rank.weights == 2 * (9_397_175_296 + 36 * 4 * 63 * 64)
    # 65 slots: a count of 4 bytes, a flag and a bias of 4 bytes for each id, and the kept logits.
    tables = 65 * 262_144 * 9 + 64 * 262_144 * 4
    assert 0 < plan.runtime.state - tables < 2**20
    # The up projection and its square alone are 2 x 2048 x 16384 in bfloat16.
    assert plan.runtime.workspace > 2 * 2048 * 16384 * 2
    eager = plan_memory(PERSIMMON_8B, replace(engine, enforce_eager=True), 1, "cuda")
    assert eager.runtime.graphs == 0 < plan.runtime.graphs
    assert plan.runtime.state - eager.runtime.state > 64 * 262_144 * 4
    cpu = plan_memory(PERSIMMON_8B, engine, 1, "cpu")
    assert cpu.runtime.graphs == cpu.runtime.libraries == cpu.runtime.context == 0
    for dtype, copies in (("bfloat16", 1), ("float16", 0), ("float32", 0)):
        down = copies * 36 * 4096 * 16384 * 2
        either = replace(engine, dtype=dtype)
        assert plan_memory(PERSIMMON_8B, either, 2, "cpu").runtime.copies == down // 2
        assert plan_memory(PERSIMMON_8B, either, 2, "cuda").runtime.copies == 0
        # A head tied to the embedding: its rows, and packed.
        head = copies * 128_000 * 2560 * 2
        assert plan_memory(RECURRENTGEMMA_2B, either, 2, "cpu").runtime.copies == head
        assert plan_memory(RECURRENTGEMMA_2B, either, 2, "cuda").runtime.copies == 0
        trimmed = plan_runtime(
            RECURRENTGEMMA_2B, 2, either, "cpu", Vocabulary(256_000, ((6_000, 255_999),))
        )
        assert trimmed.copies == copies * 3_000 * 2560 * 2
    never = plan_memory(PERSIMMON_8B, replace(engine, sparse_rows=0), 1, "cpu")
    assert cpu.fixed - never.fixed == 36 * 4096 * 16384 * 2
    few = replace(engine, max_num_batched_tokens=256, max_num_seqs=1)
    room = plan_memory(PERSIMMON_8B, few, 1, "cpu").needed(few) - GIB
    assert "engine.sparse_rows=0" in largest_that_fits(PERSIMMON_8B, few, 1, "cpu", room)
    longer = plan_memory(PERSIMMON_8B, replace(engine, max_num_batched_tokens=8192), 1, "cuda")
    # Attention decides while one sequence of 16,384 tokens is gathered beside it.
    assert longer.runtime.workspace - plan.runtime.workspace == 6144 * 10 * 4096 * 2


@settings(max_examples=60, deadline=None)
@given(
    room=st.integers(1, 60 * GIB),
    seqs=st.integers(1, 300),
    tokens=st.integers(1, 20_000),
    kv=st.none() | st.integers(1, 50 * GIB),
    tp=st.sampled_from([1, 2, 4, 8]),
    device=st.sampled_from(["cuda", "cpu"]),
)
def test_the_advice_really_fits_and_is_the_largest(room, seqs, tokens, kv, tp, device):
    engine = EngineConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, kv_cache_memory=kv)

    def fits(size=tp, **changed):
        tried = replace(engine, **changed)
        return plan_memory(PERSIMMON_8B, tried, size, device).needed(tried) <= room

    if fits():
        return
    advice = largest_that_fits(PERSIMMON_8B, engine, tp, device, room)
    if advice.startswith("engine.sparse_rows=0"):
        assert fits(sparse_rows=0) and device == "cpu"
    elif setting := re.match(r"engine\.(\w+)=(\d+)", advice):
        name, value = setting[1], int(setting[2])
        assert fits(**{name: value}), advice
        step = plan_memory(PERSIMMON_8B, engine, tp, device).block if name.startswith("kv") else 1
        assert value + step >= getattr(engine, name) or not fits(**{name: value + step}), advice
    elif advice.startswith("engine.enforce_eager"):
        assert fits(enforce_eager=True)
    elif ranks := re.match(r"(\d+) ranks", advice):
        assert fits(int(ranks[1])) and int(ranks[1]) > tp
    else:
        assert "more memory" in advice
        assert not any(fits(size) for size in PERSIMMON_8B.tp_sizes() if size > tp)


def test_too_little_memory_is_said_before_anything_is_loaded(tiny, monkeypatch):
    monkeypatch.setattr(face, "load_weights", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(memory, "host_memory_available", lambda: 256 * 2**20)
    with pytest.raises(OutOfMemoryPlan) as caught:
        LLM(str(tiny), dtype="float32", kv_cache_memory=2**30)
    assert "1.00 GiB" in caught.value.what and "room for 0.25 GiB" in caught.value.what
    assert caught.value.where == "rank 0 of 1, cpu" and caught.value.exit_code == 8
    monkeypatch.undo()
    value = int(re.search(r"engine\.kv_cache_memory=(\d+)", caught.value.hint)[1])
    monkeypatch.setattr(memory, "host_memory_available", lambda: 256 * 2**20)
    with LLM(str(tiny), dtype="float32", kv_cache_memory=value) as llm:
        assert llm.generate({"prompt_token_ids": [5, 6]})[0].outputs


def test_a_system_that_does_not_say_how_much_is_free_is_not_asked(tiny, monkeypatch):
    monkeypatch.setattr(memory, "host_memory_available", lambda: None)
    with LLM(str(tiny), dtype="float32", kv_cache_memory=2**22) as llm:
        assert llm._engine.blocks.capacity > 0


def test_plan_names_what_fits(capsys):
    code = main(["plan", "--model", "configs/persimmon-8b.json", "--memory", "16"])
    shown = capsys.readouterr()
    assert code == 8 and "2 ranks" in shown.err
    assert "workspace" in shown.out and "graphs" in shown.out


@pytest.mark.parametrize(
    "settings",
    [
        {"kernels": "cuda"},
        {"enforce_eager": 1},
        {"step_timeout": 0},
        {"step_timeout": float("nan")},
    ],
)
def test_wrong_settings_are_named(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
        EngineConfig(**settings)


def test_sizes_are_shown_in_gib():
    assert in_gib(3 * GIB // 2) == "1.50 GiB"
