"""Benches of a model that keeps state per sequence: they run at toy size, and count what they should."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from test_bench import run

from tprt.bench import kernels as kernels_bench
from tprt.bench import picture
from tprt.bench.costs import matrix_shapes, prefill_operations, step_bytes
from tprt.bench.filled import decode_seconds, prompts_of, start, stop
from tprt.bench.named_models import (
    PERSIMMON_8B,
    RECURRENT_TOY,
    RECURRENTGEMMA_2B,
    RECURRENTGEMMA_9B,
)
from tprt.bench.synthetic import random_engine
from tprt.cli import main
from tprt.config import EngineConfig, RecurrentGemmaConfig
from tprt.distributed.tp_group import TPGroup

BF16 = torch.bfloat16


@pytest.mark.parametrize("bench", ["latency", "prefill", "decode"])
def test_beside_transformers_the_same_model_runs(bench, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("tprt.bench.report.READ_BYTES", 2**20)
    flags = ["--model", "toy-recurrent", "--toy", "--pairs", "1", "--dtype", "float32"]
    found, _ = run(capsys, bench, "--vs", "transformers", *flags, "--batch", "2")
    assert found["model"] == "toy-recurrent" and found["ratio"].keys() == {"transformers"}
    assert found["details"]["logit_difference"] < 1e-3
    if bench == "decode":
        for cell in found["details"]["cells"]:
            assert cell["peer"]["settings_s"].keys() == {"dynamic cache", "static cache"}


def test_kernels_of_both_kinds_of_layers(capsys, monkeypatch):
    monkeypatch.setattr(kernels_bench, "bodies_on", lambda device: ("auto", "reference"))
    found, _ = run(capsys, "kernels", "--model", "toy-recurrent", "--toy", "--shard", "2", "--json")
    lines, failed = found["details"]["lines"], found["details"]["failed"]
    assert failed == []
    shapes = {line["operation"]: line["shape"] for line in lines if line["shape"].startswith("1 x")}
    assert shapes == {
        "x and y": "1 x 64 -> 64", "qkv": "1 x 64 -> 64", "gate and up": "1 x 64 -> 128",
        "out": "1 x 32 -> 64", "o": "1 x 32 -> 64", "down": "1 x 64 -> 64",
        "linear_argmax": "1 x 64 -> 160",
    }  # fmt: skip
    told = {line["operation"] for line in lines} - shapes.keys()
    assert told == {"layer_norm", "add_layer_norm", "recurrence", "window attention"}


def test_tiles_are_measured_of_every_product():
    """Heads of zeros included; a down projection behind a squared ReLU has a kernel of its own."""
    of_2b = matrix_shapes(RECURRENTGEMMA_2B, torch.bfloat16, 4)
    width = 3 * 256  # ten heads and two of zeros, over four ranks
    assert set(of_2b) == {
        (2 * width, 2560), (2560, width), (2 * 1920, 2560), (2560, 1920),
        (width + 2 * 256, 2560), (64000, 2560),
    }  # fmt: skip
    of_8b = matrix_shapes(PERSIMMON_8B, torch.bfloat16, 2)
    assert set(of_8b) == {(6144, 4096), (4096, 2048), (8192, 4096), (131072, 4096)}


def test_what_only_squared_relu_has_is_refused(capsys):
    for flags in (["decode", "--zeros", "0.5"], ["bytes"]):
        assert main(["bench", *flags, "--model", "toy-recurrent", "--toy"]) == 2
        assert "recurrent_gemma" in capsys.readouterr().err
    assert main(["bench", "throughput", "--context", "16", "--model", "toy-recurrent"]) == 2
    assert "does not grow" in capsys.readouterr().err


def test_contexts_are_computed_once_and_found_as_snapshots():
    """Also by several that begin together, the first of which draws while the last is computed."""
    settings = EngineConfig(
        dtype="float32", max_num_seqs=3, max_num_batched_tokens=32, max_model_len=400,
        enable_prefix_caching=True,
    )  # fmt: skip
    engine = random_engine(RECURRENT_TOY, TPGroup(), settings)
    prompts = prompts_of(100, 3, RECURRENT_TOY.vocab_size, 0)
    engine.begin_call("test")
    assert decode_seconds(engine, prompts, 5) > 0
    sequences = start(engine, prompts, 8)
    assert [s.num_cached_tokens for s in sequences] == [96, 96, 96]
    stop(engine, sequences)
    engine.end_call()
    engine.close()


def test_full_sizes_are_those_of_the_releases():
    """Bytes of all weights in bfloat16, as the releases have them; the head is the embedding."""
    small, large = (step_bytes(c, BF16, 1) for c in (RECURRENTGEMMA_2B, RECURRENTGEMMA_9B))
    assert small.weights == 2 * 2_682_862_080 and large.weights == 2 * 8_579_977_216
    # 2,049 keys and values of 256 in 8 and in 12 layers.
    assert small.kv_per_token * small.window == 8 * 2 * 2049 * 256 * 2
    assert large.kv_per_token * large.window == 12 * 2 * 2049 * 256 * 2
    assert small.of(1, 2049) == small.of(1, 8000) > small.of(1, 2048)
    assert small.of(3, 0) - small.weights == 3 * 18 * 2560 * (4 + 4 * 2)
    # 10 heads over 4 ranks: 3 each.
    assert step_bytes(RECURRENTGEMMA_2B, BF16, 4).weights == pytest.approx(1.41e9, rel=0.005)


@pytest.mark.parametrize(("name", "own"), [("2b", RECURRENTGEMMA_2B), ("9b", RECURRENTGEMMA_9B)])
def test_plans_need_no_weights(name, own):
    known = RecurrentGemmaConfig.from_hf(
        json.loads((ROOT / "configs" / f"recurrentgemma-{name}.json").read_text())
    )
    assert replace(known, eos_token_id=None, max_position_embeddings=16384) == own


@pytest.mark.parametrize("tokens", [1, 20, 33, 50])
def test_operations_of_a_prompt(tokens):
    """Counted one matrix and one pair of positions at a time."""
    config = RECURRENT_TOY
    hidden, ffn, width, dim = 64, 128, 64, 16
    pairs = sum(min(i + 1, 33) for i in range(tokens))
    count = 0
    for i, kind in enumerate(config.layer_types):
        if kind == "recurrent":
            count += tokens * (hidden * 2 * width + 4 * 2 * dim * dim)
        else:
            count += tokens * hidden * (4 + 2) * dim + 2 * 4 * dim * pairs
        rest = 1 if i == len(config.layer_types) - 1 else tokens
        count += rest * (width * hidden + 3 * hidden * ffn)
    assert prefill_operations(config, tokens) == 2 * (count + hidden * config.vocab_size)


def test_a_picture_of_contexts(tmp_path, capsys):
    pytest.importorskip("matplotlib")

    def report(model: str, contexts: tuple[int, ...]) -> dict:
        cells = [
            {"batch": batch, "context": c, "ms_per_step": 2.0 * batch, "spread": 0.1}
            for c in contexts
            for batch in (4, 1)
        ]
        return {
            "bench": "decode", "model": model, "dtype": "bfloat16", "device": "Some CPU",
            "settings": {"steps": 8}, "details": {"cells": cells},
        }  # fmt: skip

    files = [tmp_path / name for name in ("a.json", "b.json")]
    files[0].write_text(json.dumps(report("flat", (16, 512))))
    files[1].write_text(json.dumps(report("growing", (16, 512, 2048))))
    made = [tmp_path / f"{i}.svg" for i in range(2)]
    for path in made:
        assert picture.main([*map(str, files), "-o", str(path)]) == 0
    text = made[0].read_text()
    assert text == made[1].read_text(), "no date, no chance"
    assert "flat, batch 1, runs of 8 steps" in text and "growing, batch 1" in text
    assert "batch 4" not in text
    files[0].write_text(json.dumps(report("alone", ())))
    assert picture.main([str(files[0]), "-o", str(made[0])]) == 2
    assert "tprt bench decode" in capsys.readouterr().err
