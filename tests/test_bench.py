"""The bench counts what it says it counts; how fast anything is, no test asks."""

import json

import pytest
import torch

from tprt.bench.report import Report, compare, median_ratio
from tprt.bench.synthetic import PERSIMMON_100M, random_model, random_tensor
from tprt.bench.throughput import make_work
from tprt.bench.transformers_peer import fastest
from tprt.cli import main
from tprt.distributed.tp_group import TPGroup
from tprt.errors import ConfigError

SMALL = {
    "model_type": "persimmon",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 1280,
    "rope_theta": 25000.0,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": True,
}
KEYS = {
    "bench", "model", "device", "dtype", "tp", "tokens_per_s", "ratio", "share_of_bandwidth",
    "versions", "commit", "command",
}  # fmt: skip


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


def run(capsys, *arguments):
    """The JSON object of the last line, and everything else on stdout."""
    assert main(["bench", *arguments]) == 0
    *rest, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found.keys() >= KEYS
    return found, rest


def test_prefix_caching_computes_ten_times_fewer_prompt_tokens(small, capsys):
    found, rest = run(capsys, "prefix", "--model", small, "--dtype", "float32", "--json")
    details = found["details"]
    assert rest == []
    assert details["computed_tokens_without_caching"] == 32 * (1024 + 16)
    # The first two meet in one step, before the first has anything to share.
    assert details["computed_tokens"] == 2 * (1024 + 16) + 30 * 16
    assert details["fewer"] >= 10
    assert details["same_tokens"] == 32


def test_scheduler_prints_its_profile_and_every_part(capsys):
    found, rest = run(capsys, "scheduler")
    assert {"schedule", "build and encode", "decode", "retire", "step"} <= found["details"].keys()
    assert any("record_builder.py" in line for line in rest)


@pytest.mark.parametrize("bench", ["throughput", "latency"])
def test_beside_transformers_the_same_model_runs(bench, small, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("tprt.bench.throughput.BATCH_SIZES", (2,))
    monkeypatch.setattr("tprt.bench.throughput.PROMPT_TOKENS", (4, 9))
    monkeypatch.setattr("tprt.bench.throughput.NEW_TOKENS", (2, 5))
    monkeypatch.setattr("tprt.bench.latency.NEW_TOKENS", 4)
    monkeypatch.setattr("tprt.bench.report.READ_BYTES", 2**20)
    flags = ["--model", small, "--pairs", "2", "--requests", "5", "--dtype", "float32"]
    found, _ = run(capsys, bench, "--vs", "transformers", *flags)
    assert found["ratio"].keys() == {"transformers"}
    assert found["versions"].keys() >= {"transformers", "torch", "tprt"}
    assert found["details"]["logit_difference"] < 1e-3
    assert found["details"]["peer_best"] in found["details"]["peer_settings_s"]
    assert len(found["details"]["seconds"]["tprt"]) == 2
    assert found["tokens_per_s"] > 0


def test_another_model_is_not_compared(small, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(
        "tprt.bench.transformers_peer.random_tensor",
        lambda n, s, seed: random_tensor(n, s, seed + 1),
    )
    assert main(["bench", "latency", "--model", small, "--vs", "transformers"]) == 1
    assert "not the same model" in capsys.readouterr().err


def test_random_model_is_the_same_at_any_size_of_the_group():
    whole = random_tensor("model.layers.0.mlp.dense_4h_to_h.weight", (768, 3072), 0)
    parts = [
        random_model(PERSIMMON_100M, TPGroup(rank=rank, size=2), torch.float32, 0)
        .model.layers[0]
        .mlp.dense_4h_to_h.weight
        for rank in range(2)
    ]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_workload_has_the_stated_lengths():
    work = make_work(64, 1000, seed=0)
    assert all(16 <= len(ids) <= 512 and 16 <= new <= 128 for ids, new in work)
    assert work == make_work(64, 1000, seed=0) != make_work(64, 1000, seed=1)


def test_runs_alternate_and_ratios_are_of_neighbours():
    order = []

    def runner(name, seconds):
        values = iter(seconds)

        def one():
            order.append(name)
            return next(values)

        return one

    runs = {"tprt": runner("a", [1.0, 2.0, 4.0]), "peer": runner("b", [3.0, 4.0, 4.0])}
    seconds = compare(runs, 3, lambda text: None)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert median_ratio(seconds["tprt"], seconds["peer"]) == 2.0  # of 3, 2 and 1


def test_the_fastest_setting_wins_and_failures_are_told():
    def fails():
        raise ConfigError("not here")

    said = []
    best, seconds = fastest({"x": lambda: 2.0, "y": lambda: 1.0, "z": fails}, said.append)
    assert best == "y" and seconds == {"x": 2.0, "y": 1.0}
    assert any("not here" in line for line in said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["prefix", "--vs", "transformers"], "no peer"),
        (["throughput", "--pairs", "0"], "--pairs is 0"),
        (["scheduler", "--nproc", "2"], "one process"),
        (["latency", "--nproc", "2", "--vs", "transformers"], "--vs with 2 ranks"),
        (["throughput", "--set", "engine.max_model_len=100"], "sequences of 640 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, said, capsys):
    assert main(["bench", *flags]) == 2
    assert said in capsys.readouterr().err


def test_report_is_json_with_the_named_keys():
    found = json.loads(Report("x", "m", "cpu", "bfloat16", 1).to_json())
    assert found.keys() >= KEYS and found["ratio"] == {}
