"""The bench counts what it says it counts; how fast anything is, no test asks."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tprt.bench import kernels as kernels_bench
from tprt.bench import startup as startup_bench
from tprt.bench.allreduce import AllReduceSizes, _by_graph
from tprt.bench.costs import prefill_operations, step_bytes
from tprt.bench.device_timing import Ceilings, num_sets, time_calls
from tprt.bench.filled import start, stop
from tprt.bench.full_memory import limit_seconds
from tprt.bench.kernel_cases import Cases
from tprt.bench.named_models import PERSIMMON_8B, PERSIMMON_100M, PERSIMMON_400M, TOY
from tprt.bench.one_rank import lone_rank
from tprt.bench.projection import project
from tprt.bench.report import Report, commit, compare, median_ratio
from tprt.bench.step_trace import STEPS_RANGE, count_steps
from tprt.bench.synthetic import (
    greedy,
    random_engine,
    random_model,
    random_tensor,
    run_requests,
)
from tprt.bench.synthetic_checkpoint import tokenizer_model, write_checkpoint
from tprt.bench.throughput import make_work
from tprt.bench.transformers_peer import fastest
from tprt.checkpoint import open_checkpoint
from tprt.cli import main
from tprt.config import EngineConfig, PersimmonConfig
from tprt.distributed.communication import all_gather, all_reduce
from tprt.distributed.tp_group import TPGroup
from tprt.errors import ConfigError
from tprt.tokenizer import Tokenizer, check_vocab

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
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


@pytest.mark.parametrize("bench", ["throughput", "latency", "prefill", "decode"])
def test_beside_transformers_the_same_model_runs(bench, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("tprt.bench.report.READ_BYTES", 2**20)
    flags = ["--toy", "--pairs", "2", "--requests", "5", "--dtype", "float32", "--batch", "2"]
    found, _ = run(capsys, bench, "--vs", "transformers", *flags)
    details = found["details"]
    assert found["ratio"].keys() == {"transformers"}
    assert found["versions"].keys() >= {"transformers", "torch", "tprt"}
    assert details["logit_difference"] < 1e-3
    if bench in ("throughput", "latency"):
        assert details["peer_best"] in details["peer_settings_s"]
        assert len(details["seconds"]["tprt"]) == 2
    if bench == "decode":
        for cell in details["cells"]:
            tried = cell["peer"]["settings_s"]
            assert tried.keys() == {"dynamic cache", "static cache, torch.compile"}
            assert cell["ratio"]["transformers"] > 0
    if bench != "prefill":
        assert found["tokens_per_s"] > 0


def test_another_model_is_not_compared(small, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(
        "tprt.bench.transformers_peer.random_tensor",
        lambda name, shape, seed, device: random_tensor(name, shape, seed + 1, device),
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
    assert torch.equal(torch.cat(parts).T, whole)  # held by neuron


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
        raise RuntimeError("not here")

    said, warm = [], iter([9.0, 1.0])
    best, seconds = fastest({"x": lambda: 2.0, "y": lambda: 1.0, "z": fails}, said.append)
    assert best == "y" and seconds == {"x": 2.0, "y": 1.0}
    assert any("not here" in line for line in said)
    assert fastest({"compiles": lambda: next(warm)}, said.append, warm_up=True)[1] == {
        "compiles": 1.0
    }
    with pytest.raises(ConfigError, match="none of its settings"):
        fastest({"z": fails}, said.append)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["prefix", "--vs", "transformers"], "no peer"),
        (["throughput", "--pairs", "0"], "--pairs is 0"),
        (["decode", "--batch", "4,0"], "--batch holds 0"),
        (["scheduler", "--nproc", "2"], "one process"),
        (["kernels", "--nproc", "2"], "one process"),
        (["latency", "--nproc", "2", "--vs", "transformers"], "--vs with 2 ranks"),
        (["decode", "--shard", "2", "--vs", "transformers"], "--vs with --shard 2"),
        (["prefill", "--shard", "2"], "--shard"),
        (["allreduce"], "--nproc 2 or more"),
        (["throughput", "--context", "512,2048"], "one --context"),
        (["throughput", "--context", "20000", "--toy"], "the limit is 160"),
        (["throughput", "--set", "engine.max_model_len=100"], "sequences of 640 tokens"),
        (["kernels", "--toy", "--only", "nothing of the kind"], "no operation is called"),
        (["decode", "--toy", "--set", "engine.kv_cache_memory=17000"], "none of the cells fits"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, said, capsys):
    assert main(["bench", *flags]) == 2
    assert said in capsys.readouterr().err


def test_report_is_json_with_the_named_keys():
    found = json.loads(Report("x", "m", "cpu", "bfloat16", 1).to_json())
    assert found.keys() >= KEYS and found["ratio"] == {}


def test_the_commit_may_be_told(monkeypatch):
    monkeypatch.setenv("TPRT_COMMIT", "abc123")
    assert commit() == "abc123"


def test_runs_where_pydantic_is_not_installed():
    """As on a bare GPU machine; the program users call needs it for its settings."""
    code = (
        "import sys; sys.modules['pydantic'] = None\n"
        "from tprt.bench.__main__ import main\n"
        "sys.exit(main(['decode', '--toy', '--device', 'cpu', '--batch', '1', '--set', "
        "'kernels=reference', '--set', 'max_num_batched_tokens=64']))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["settings"]["kernels"] == "reference"
    assert [cell["context"] for cell in found["details"]["cells"]] == [16, 40]


# ---------------------------------------------------------------- contexts that were never computed


@pytest.fixture
def toy_engine():
    config = EngineConfig(dtype="float32", max_num_seqs=3, max_model_len=128)
    engine = random_engine(TOY, TPGroup(), config)
    yield engine
    engine.close()


def test_contexts_are_found_and_not_computed(toy_engine):
    computed, execute = [], toy_engine.runner.execute

    def counting(record, checksum):
        computed.append(len(record.tokens))
        return execute(record, checksum)

    toy_engine.runner.execute = counting
    prompts = [[i, *range(48)] for i in range(3)]
    for _ in range(2):  # what was known stays known
        sequences = start(toy_engine, prompts, 20)
        assert [s.num_cached_tokens for s in sequences] == [48] * 3
        for _ in range(5):
            toy_engine.step()
        stop(toy_engine, sequences)
    assert set(computed) == {3}, "every step, the first one too, has one token of each"
    assert toy_engine.blocks.num_free == toy_engine.blocks.capacity


def test_what_lies_in_the_cache_is_attended_to(toy_engine):
    """Other keys and values under the same prompt give other tokens."""
    drawn = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        for cache in toy_engine.runner.caches:
            cache.kv.normal_(generator=generator)
        (sequence,) = start(toy_engine, [[5] * 49], 20)
        while len(sequence.token_ids) < 10:
            toy_engine.step()
        drawn.append(sequence.token_ids[:10])
        stop(toy_engine, [sequence])
    assert drawn[0] == drawn[1] != drawn[2]


def test_too_many_sequences_are_refused(toy_engine):
    with pytest.raises(ConfigError, match="KV blocks"):
        start(toy_engine, [[i] * 100 for i in range(4)], 20)


def test_decode_counts_bytes_and_keeps_its_trace(capsys, tmp_path):
    trace = tmp_path / "sub" / "trace.json"
    flags = ["--toy", "--dtype", "float32", "--profile", str(trace)]
    found, rest = run(capsys, "decode", *flags)
    cells = found["details"]["cells"]
    assert [(c["batch"], c["context"]) for c in cells] == [(1, 16), (1, 40), (3, 16), (3, 40)]
    assert found["tokens_per_s"] == cells[0]["tokens_per_s"]
    each = step_bytes(TOY, torch.float32, 1)
    assert each.kv_per_token == 2 * 2 * 64 * 4
    assert each.of(3, 50) == each.weights + 3 * 50 * 1024
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event["name"] == STEPS_RANGE for event in events)
    assert found["details"]["trace"]["waits_per_step"] == {}
    assert len(rest) >= 6


@pytest.mark.parametrize("context", [1, 15, 16, 17, 31, 32])
def test_every_context_fits_the_cache_made_for_it(context, capsys):
    flags = ["--batch", "1,3", "--context", str(context), "--steps", "1", "--repeats", "1"]
    found, _ = run(capsys, "decode", "--toy", "--device", "cpu", *flags, "--json")
    assert [cell.get("skipped") for cell in found["details"]["cells"]] == [None, None]


def test_full_size_is_that_of_persimmon():
    known = json.loads((ROOT / "configs" / "persimmon-8b.json").read_text())
    own = PersimmonConfig.from_hf(known)
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
        "num_attention_heads", "max_position_embeddings", "rope_theta",
    )  # fmt: skip
    for name in names:
        assert getattr(own, name) == getattr(PERSIMMON_8B, name)
    dense = step_bytes(PERSIMMON_8B, torch.bfloat16, 1)
    assert round(dense.weights / 1e9, 2) == 16.65 and dense.kv_per_token == 589_824


def test_one_rank_alone_has_the_shapes_of_one_of_many():
    tp = lone_rank(4, CPU)
    x = torch.arange(3)
    assert torch.equal(all_gather(x, tp), x.expand(4, 3)) and torch.equal(all_reduce(x, tp), x)
    model = random_model(TOY, tp, torch.float32, 0)
    assert model.model.layers[0].self_attn.query_key_value.weight.shape == (48, 64)
    assert lone_rank(1, CPU) == TPGroup()


def test_a_share_is_projected_and_never_reported_as_measured(capsys):
    found, rest = run(capsys, "decode", "--toy", "--shard", "2", "--batch", "1")
    projection = found["details"]["projection"]
    assert found["tokens_per_s"] is None and found["tp"] == 1
    assert "not measured" in projection["label"] and "latency" in projection["formula"]
    for line, cell in zip(projection["lines"], found["details"]["cells"], strict=True):
        assert line["shard_ms"] == cell["ms_per_step"]
    assert all("not measured" in line for line in rest if "tokens/s, fused" in line)


def test_projection_adds_its_collectives():
    found = project(2.0, ranks=4, layers=36, batch=2, row_bytes=8192)
    assert found["nccl"]["ms_per_step"] == round(2.0 + 74 * 0.015, 3)
    assert found["fused one-shot"]["tokens_per_s"] == round(2 / (2.0 + 74 * 0.006) * 1e3, 1)
    assert project(2.0, 4, 36, batch=17, row_bytes=8192) is None, "latencies are of 128 KB at most"
    assert project(2.0, 3, 36, batch=1, row_bytes=8192) is None


# ---------------------------------------------------------------- traces and ceilings


def event(name, cat, ts, dur):
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur}


def test_trace_counts_waits_and_gaps(tmp_path):
    events = [
        event(STEPS_RANGE, "user_annotation", 100.0, 100.0),
        event(STEPS_RANGE, "gpu_user_annotation", 0.0, 500.0),
        event("cudaStreamSynchronize", "cuda_runtime", 50.0, 5.0),  # before the steps
        event("cudaStreamSynchronize", "cuda_runtime", 110.0, 5.0),
        event("cudaGraphLaunch", "cuda_runtime", 120.0, 5.0),
        event("cudaMalloc", "cuda_runtime", 130.0, 5.0),
        event("gemv", "kernel", 100.0, 40.0),
        event("copy", "gpu_memcpy", 120.0, 10.0),  # beside the kernel
        event("gemv", "kernel", 150.0, 40.0),
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = count_steps(path, 2)
    assert found["waits_per_step"] == {"cudaStreamSynchronize": 0.5}
    assert found["allocations_per_step"] == {"cudaMalloc": 0.5}
    assert found["kernels_per_step"] == 1.0
    assert found["device_ms_per_step"] == 0.045
    assert found["idle_share"] == round(10 / 90, 4)
    assert found["top_kernels"][0] == {"name": "gemv", "us_per_step": 40.0, "calls_per_step": 1.0}


def test_floor_is_the_tightest_bound():
    ceilings = Ceilings(copy=4e12, read=5e12, gemm=800e12, node=1e-6)
    assert ceilings.floor(1e9, 0, 0) == (1e9 / 5e12, "memory")
    assert ceilings.floor(1e9, 1e9, 0) == (2e9 / 4e12, "memory")
    assert ceilings.floor(1e3, 0, 8e12) == (8e12 / 800e12, "compute")
    assert ceilings.floor(8, 8, 8) == (1e-6, "launch")


def test_limit_at_full_memory_is_the_formula():
    """107 sequences of 2,048 tokens at 4.3 TB/s take some 30 ms of reading keys and values."""
    ceilings = Ceilings(copy=4.3e12, read=4.3e12, gemm=750e12, node=1e-6)
    seconds = limit_seconds(step_bytes(PERSIMMON_8B, torch.bfloat16, 1), 2, 107, 2048, ceilings)
    assert 0.030 < 107 * 2048 * 589_824 / 4.3e12 < seconds < 0.036


class _FakeCuda:
    """As much of torch.cuda as timing uses: every pair of events is 1 ms apart."""

    def __init__(self, monkeypatch):
        self.captured = self.replays = 0
        self.capturing = False
        outer = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                assert stream is outer.stream

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return 1.0

        class Graph:
            def replay(self):
                outer.replays += 1

            def reset(self):
                pass

        class Stream:
            def wait_stream(self, other):
                pass

            def synchronize(self):
                pass

        @contextmanager
        def capture(graph, stream, capture_error_mode):
            assert stream is outer.stream
            outer.capturing = True
            yield
            outer.capturing = False

        self.stream = Stream()
        fakes = {
            "Event": Event, "CUDAGraph": Graph, "Stream": lambda device: self.stream,
            "current_stream": lambda device: Stream(), "device": lambda device: nullcontext(),
            "stream": lambda stream: nullcontext(), "graph": capture,
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def call(self):
        self.captured += self.capturing


def test_replays_are_divided_by_the_calls_they_hold(monkeypatch):
    """Three calls took 1 ms when launched, so a graph of 2 ms holds each twice."""
    cuda = _FakeCuda(monkeypatch)
    timing = time_calls([cuda.call] * 3, torch.device("cuda"), budget=0.02)
    assert cuda.captured == 6 and cuda.replays == 1 + 20
    assert timing.seconds == pytest.approx(1e-3 / 6) and timing.spread == 0
    tp, sizes = TPGroup(device=torch.device("cuda")), AllReduceSizes(calls=4, replays=5)
    cuda.captured = cuda.replays = 0
    assert _by_graph(cuda.call, tp, sizes) == pytest.approx(1e-3 / 4)
    assert cuda.captured == 4 and cuda.replays == 5


def test_input_sets_take_turns():
    order = []
    timing = time_calls([lambda: order.append("a"), lambda: order.append("b")], CPU, budget=0)
    assert order == ["a", "b"] * 3 and timing.seconds > 0
    assert num_sets(10**9, CPU) == 2


@pytest.mark.parametrize("tokens", [1, 13])
def test_operations_of_a_prompt(tokens):
    """Against torch's own count of matrix products; attention is half a square."""
    config = EngineConfig(dtype="float32", kernels="reference", max_num_seqs=2)
    engine = random_engine(TOY, TPGroup(), config)
    with FlopCounterMode(display=False) as counter:
        run_requests(engine, [greedy(list(range(tokens)), 1)])
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    matrices = counts["aten.mm"] + counts.get("aten.addmm", 0)
    attention = 4 * TOY.num_hidden_layers * TOY.hidden_size * tokens * (tokens + 1) // 2
    assert prefill_operations(TOY, tokens) == matrices + attention
    engine.close()


def test_kernels_of_every_body_and_those_that_fail(capsys, monkeypatch):
    """A kernel that fails costs its own lines, not the table."""
    matrices = Cases.matrices

    def one_fails(self):
        if self.body == "reference":
            raise RuntimeError("illegal instruction\nat somewhere")
        yield from matrices(self)

    monkeypatch.setattr(Cases, "matrices", one_fails)
    monkeypatch.setattr(Cases, "groups", ("norms", "matrices", "down"))
    monkeypatch.setattr(kernels_bench, "bodies_on", lambda device: ("auto", "reference"))
    found, _ = run(capsys, "kernels", "--toy", "--shard", "2", "--json")
    lines = found["details"]["lines"]
    bodies = {(line["operation"], line["body"]) for line in lines}
    assert bodies == {
        *((op, body) for op in ("layer_norm", "add_layer_norm") for body in ("cpu", "reference")),
        *((op, "cpu") for op in ("qkv", "o", "up", "down", "sparse down")),
        ("down", "reference"),
    }
    shapes = {line["operation"]: line["shape"] for line in lines if line["shape"].startswith("1 x")}
    assert shapes == {
        "qkv": "1 x 64 -> 96", "o": "1 x 32 -> 64", "up": "1 x 64 -> 64",
        "down": "1 x 64 -> 64", "sparse down": "1 x 64 -> 64",
    }  # fmt: skip
    (failed,) = found["details"]["failed"]
    assert failed["group"] == "matrices" and failed["error"] == "RuntimeError: illegal instruction"


# ---------------------------------------------------------------- starts


def test_synthetic_checkpoint_is_read_as_any_other(tmp_path):
    nbytes, _ = write_checkpoint(tmp_path / "made", TOY, torch.bfloat16, CPU, seed=3)
    with open_checkpoint(str(tmp_path / "made"), verify="full") as reader:
        name = "model.layers.1.mlp.dense_4h_to_h.weight"
        whole = random_tensor(name, (64, 128), 3)
        assert torch.equal(reader.read_whole(name), whole.bfloat16())
        assert reader.config.vocab_size == TOY.vocab_size
        assert reader.bytes_read <= nbytes
        tokenizer = Tokenizer(reader.tokenizer_path)
    assert check_vocab(tokenizer, TOY.vocab_size, 1, "here") == TOY.vocab_size
    text = "7 12 and more"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made"]


def test_tokenizer_model_has_every_byte(tmp_path):
    path = tmp_path / "x.model"
    path.write_bytes(tokenizer_model(260))
    tokenizer = Tokenizer(path)
    assert tokenizer.eod_id == 1 and tokenizer.vocab_size == 260
    assert sum(tokenizer.is_byte(i) for i in range(260)) == 256


def test_starts_are_timed_and_the_checkpoint_kept(capsys, tmp_path, monkeypatch):
    flags = ["startup", "--toy", "--dtype", "float32", "--folder", str(tmp_path), "--device", "cpu"]
    found, _ = run(capsys, *flags, "--keep")
    starts = found["details"]["starts"]
    assert [start["kind"] for start in starts] == ["first ever", "cold", "warm"]
    for start_ in starts:
        assert 0 < start_["to_python_s"] < start_["to_ready_s"] < start_["seconds"]
        assert start_["phases"].keys() >= {"import", "init", "read"}
    monkeypatch.setattr(
        startup_bench._Runs, "start", lambda self, kind, cold: {"kind": kind, "seconds": 1.0}
    )
    found, _ = run(capsys, *flags)
    assert found["details"]["checkpoint"]["reused"]
    assert not any(tmp_path.iterdir()), "without --keep nothing stays"
    (tmp_path / "toy").mkdir()
    assert main(["bench", *flags]) == 2
    assert "something else" in capsys.readouterr().err


def test_ranks_sum_and_say_how_long(capfd):
    assert main(["bench", "allreduce", "--toy", "--nproc", "2", "--device", "cpu"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [line["bytes"] for line in found["details"]["lines"]] == [128, 512]
    assert all(line["us"]["all-reduce"] > 0 for line in found["details"]["lines"])
    assert "CPUs" in found["details"]["one_shot_missing"] and found["tp"] == 2
    assert os.environ.get("RANK") is None


def test_steps_of_a_prefill_fit_into_the_model():
    """A model of few positions gets smaller steps, so that the prompt beside decoding rows fits."""
    from tprt.bench.named_models import PERSIMMON_8B
    from tprt.bench.prefill import PrefillSizes, _settings

    sizes = PrefillSizes()
    for config, most in ((PERSIMMON_400M, 409), (PERSIMMON_8B, 2048)):
        found = _settings(config, EngineConfig(kv_cache_memory=2**30), sizes, 1)
        assert found.max_num_batched_tokens == most
        assert (sizes.chunks + 1) * most + 1 <= found.max_model_len
