"""Filling parameters: strict both ways, only a rank's own bytes, and no more memory than needed."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import hf_folder, megatron_source
from megatron_writer import random_model, write_release
from toy_model import Toy, specs_of

import tprt
from tprt.checkpoint import load_weights, open_checkpoint, write_huggingface, write_presharded
from tprt.errors import CheckpointError


@pytest.mark.parametrize("kind", ["megatron", "huggingface", "presharded"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_rank_gets_its_part_and_reads_only_that(tmp_path, kind, tp):
    """Guards specs with padding, broadcasting and transposition, and bytes read per rank."""
    reader, model = megatron_source(tmp_path, tp=2)
    config = reader.config
    if kind == "huggingface":
        write_huggingface(reader, tmp_path / "d")
        reader = open_checkpoint(tmp_path / "d")
    if kind == "presharded":
        write_presharded(reader, tmp_path / "d", 2, specs_of(config))
        reader = open_checkpoint(tmp_path / "d")
    whole = {n: torch.zeros_like(t, dtype=torch.float32) for n, t in model.items()}
    for rank in range(tp):
        specs = specs_of(config)(rank, tp)
        before = reader.bytes_read
        toy = Toy(specs)
        load_weights(toy, reader)
        assert reader.bytes_read - before == sum(s.needed_bytes(2) for s in specs.values())
        for name, p in toy.named_parameters():
            specs[name].store(p.detach(), whole[name])
    assert all(torch.equal(whole[n], t.float()) for n, t in model.items())


def test_loading_is_strict_both_ways(tmp_path):
    reader, model = megatron_source(tmp_path)
    specs = specs_of(reader.config)(0, 1)
    less = {n: s for n, s in specs.items() if n != "model.final_layernorm.bias"}
    with pytest.raises(
        CheckpointError, match=r"1 tensors have no parameter: model.final_layernorm"
    ):
        load_weights(Toy(less), reader)
    with pytest.raises(CheckpointError, match=r"1 parameters have no tensor: odd\.weight"):
        load_weights(Toy(specs | {"odd.weight": specs["lm_head.weight"]}), reader)
    other = specs | {
        "lm_head.weight": specs_of(replace(reader.config, vocab_size=50))(0, 1)["lm_head.weight"]
    }
    with pytest.raises(CheckpointError, match=r"lm_head.weight \[48, 32\] instead of \[50, 32\]"):
        load_weights(Toy(other), reader)
    assert model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers(tmp_path, value):
    model = random_model()
    model["model.layers.1.mlp.dense_h_to_4h.weight"][3, 4] = value
    reader = open_checkpoint(hf_folder(tmp_path, model))
    toy = Toy(specs_of(reader.config)(0, 2))
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.dense_h_to_4h.weight holds NaN"):
        load_weights(toy, reader)


def test_float16_overflow_is_told_from_damage(tmp_path):
    model = random_model(dtype=torch.bfloat16)
    model["model.layers.0.input_layernorm.weight"][0] = 1e6
    reader = open_checkpoint(hf_folder(tmp_path, model))
    toy = Toy(specs_of(reader.config)(0, 1), torch.float16)
    with pytest.raises(CheckpointError, match=r"past 65504[\s\S]*--dtype bfloat16"):
        load_weights(toy, reader)


# Memory

CHILD = """
import sys, threading, time
sys.path[:0] = [sys.argv[2]]
import torch
from toy_model import Toy, specs_of
from tprt.checkpoint import load_weights, open_checkpoint
def anon():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
peak, stop = anon(), False
def sample():
    global peak
    while not stop:
        peak = max(peak, anon())
        time.sleep(0.002)
thread = threading.Thread(target=sample); thread.start()
reader = open_checkpoint(sys.argv[1])
toy = Toy(specs_of(reader.config)(1, 4), torch.bfloat16)
load_weights(toy, reader)
stop = True; thread.join()
print(peak, sum(p.numel() * 2 for p in toy.parameters()), reader.bytes_read)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_of_a_loading_rank(tmp_path):
    """Guards against reading whole files: 1 GB on disk at TP=1, loaded by rank 1 of 4."""
    sizes = {"vocab": 65536, "hidden": 2048, "ffn": 8192, "layers": 9, "heads": 16}
    h, f, v = sizes["hidden"], sizes["ffn"], sizes["vocab"]
    model = random_model(**(sizes | {"hidden": 32, "ffn": 32, "vocab": 32}))
    grown = {}
    for name, t in model.items():
        grow = {32: h, 96: 3 * h, 2: h // sizes["heads"]}
        shape = [grow[n] for n in t.shape]
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            shape[0] = v
        if "h_to_4h" in name:
            shape[0] = f
        if name.endswith("4h_to_h.weight"):
            shape[1] = f
        grown[name] = torch.full(shape, 0.5, dtype=torch.bfloat16)
    write_release(tmp_path, grown, heads=sizes["heads"])
    del grown
    start = time.monotonic()
    try:
        assert sum(p.stat().st_size for p in tmp_path.rglob("*.pt")) > 1e9
        out = subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path), str(Path(__file__).parent)],
            env=os.environ | {"PYTHONPATH": str(Path(tprt.__file__).parents[1])},
            capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
    finally:
        shutil.rmtree(tmp_path / "iter_0001251")
    peak, shard, read = map(int, out)
    assert peak <= 1.25 * shard + 400e6, (peak, shard)
    assert read < 1.05 * shard
    assert time.monotonic() - start < 60
