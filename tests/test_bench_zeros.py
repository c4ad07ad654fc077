"""Measurements of skipped zeros count what they say: shares, bytes, intervals, a user's checkpoint."""

import json
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tprt.bench import dram_bytes, one_token, picture, zeros
from tprt.bench.__main__ import make_parser
from tprt.bench.command import _default_model
from tprt.bench.costs import step_bytes
from tprt.bench.decode_sizes import TOY as TOY_SIZES
from tprt.bench.decode_sizes import decode_settings
from tprt.bench.filled import prompts_of, start, stop
from tprt.bench.live import LiveShares, kernels_of, skips, watched
from tprt.bench.named_models import PERSIMMON_8B, PERSIMMON_400M, TOY
from tprt.bench.report import ratio_interval
from tprt.bench.sparsity import SparsitySizes, _groups, _Layer, read_prompts
from tprt.bench.synthetic import (
    greedy,
    random_engine,
    random_model,
    run_requests,
    set_zeros,
    trimmed,
    zeros_bias,
)
from tprt.bench.transformers_peer import TransformersPeer
from tprt.cli import main
from tprt.config import EngineConfig
from tprt.distributed.tp_group import TPGroup
from tprt.engine.model_runner import ModelRunner
from tprt.errors import ConfigError, TprtError
from tprt.kernels import use_kernels

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
BF16 = torch.bfloat16
FLOAT32 = EngineConfig(dtype="float32", max_num_seqs=3, max_model_len=160)


def run(capsys, *arguments):
    assert main(["bench", *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# ---------------------------------------------------------------- synthetic zeros and trimmed heads


def test_as_many_neurons_are_zero_as_were_asked_for():
    config = replace(TOY, vocab_size=1024, hidden_size=256, intermediate_size=1024, head_dim=64)
    engine = random_engine(config, TPGroup(), FLOAT32, zeros=0.7)
    assert zeros_bias(config, 1e-20) > 0.3 > -0.3 > zeros_bias(config, 1 - 2**-53)
    for share in (0.7, 0.5, 0.99, 0.9):  # in place, one model for all
        set_zeros(engine.runner.model, share)
        found = LiveShares()
        with watched(engine.runner.model, found.see):
            run_requests(engine, [greedy(list(range(i, 1000, 10)), 1) for i in range(2)])
        assert abs(found.zeros - share) < 0.02
        assert found.live > 1 - found.zeros
    seen = LiveShares()
    run_requests(engine, [greedy([1, 2, 3], 1)])
    with pytest.raises(RuntimeError):
        _ = seen.zeros  # nobody looks any more
    engine.close()


@pytest.mark.parametrize("trim", [False, True])
def test_the_peer_has_the_same_zeros(trim):
    pytest.importorskip("transformers")
    vocabulary = trimmed(TOY) if trim else None
    engine = random_engine(TOY, TPGroup(), FLOAT32, zeros=0.9, vocabulary=vocabulary)
    peer = TransformersPeer(TOY, torch.float32, CPU, FLOAT32.seed, zeros=0.9)
    (ids,) = prompts_of(20, 1, TOY.vocab_size, 0, vocabulary)
    assert peer.logit_difference(engine, ids) < 1e-3
    set_zeros(engine.runner.model, 0.6)
    with pytest.raises(TprtError, match="not the same model"):
        peer.logit_difference(engine, ids)
    peer.set_zeros(0.6)
    assert peer.logit_difference(engine, ids) < 1e-3
    engine.close()


def test_bytes_are_those_of_the_closed_form():
    full, small = (step_bytes(config, BF16, 1) for config in (PERSIMMON_8B, PERSIMMON_400M))
    ratios = [each.of(1, 0) / each.of(1, 0, live=0.1) for each in (full, small)]
    assert [round(ratio, 2) for ratio in ratios] == [1.35, 1.38]
    vocabulary = trimmed(PERSIMMON_8B)
    assert vocabulary.removed == ((3, 70002),)
    less = step_bytes(PERSIMMON_8B, BF16, 1, vocabulary)
    assert full.weights - less.weights == 70000 * 4096 * 2
    assert full.of(1, 0) / less.of(1, 0, live=0.1) == pytest.approx(1.42, abs=0.005)
    assert less.of(4, 100, live=0.5) == less.weights - less.down / 2 + 400 * less.kv_per_token


def test_what_is_removed_is_in_no_prompt(capsys, monkeypatch):
    vocabulary = trimmed(TOY)
    ((first, last),) = vocabulary.removed
    assert (first, last) == (3, 3 + 320 * 70000 // 262144 - 1)
    assert all(min(ids) > last for ids in prompts_of(50, 3, TOY.vocab_size, 0, vocabulary))
    made = []
    monkeypatch.setattr(
        "tprt.bench.decode.random_engine",
        lambda *args, **more: (made.append(random_engine(*args, **more)), made[-1])[1],
    )
    found = run(capsys, "decode", "--toy", "--device", "cpu", "--trim", "--batch", "1")
    assert found["settings"]["trim"] and made[0].runner.model.vocabulary == vocabulary


# ---------------------------------------------------------------- the sweep


def test_both_paths_draw_the_same_and_only_one_skips():
    settings = decode_settings(TOY, EngineConfig(dtype="float32"), TOY_SIZES, alone=False)
    with use_kernels(*settings.kernel_choice):
        model = random_model(TOY, TPGroup(), torch.float32, 0, zeros=0.9)
    paths = zeros._paths(model, settings)
    assert list(paths) == ["sparse", "dense"]
    prompts, drawn = prompts_of(16, 3, TOY.vocab_size, 0), {}
    for name, path in paths.items():
        path.choose()
        assert skips(model, 3) == (name == "sparse")
        sequences = start(path.engine, prompts, TOY_SIZES.new_tokens)
        for _ in range(6):
            path.engine.step()
        drawn[name] = [sequence.token_ids[:6] for sequence in sequences]
        stop(path.engine, sequences)
        path.close()
    assert drawn["sparse"] == drawn["dense"]
    kernels_of(model).sparse_rows = 2
    assert skips(model, 2) and not skips(model, 3)


@pytest.mark.parametrize("vs", [False, True])
def test_the_sweep_reports_bytes_limits_and_intervals(vs, capsys):
    if vs:
        pytest.importorskip("transformers")
    flags = ["--toy", "--device", "cpu", "--dtype", "float32", "--zeros", "0.5,0.9", "--pairs", "2"]
    flags += [
        "--trim",
        "--batch",
        "1,3",
        "--context",
        "16,300,400",
        *("--vs transformers".split() * vs),
    ]
    found = run(capsys, "decode", *flags)
    details, against = found["details"], {"dense"} | ({"transformers"} if vs else set())
    assert found["ratio"].keys() == against and found["settings"]["zeros"] == [0.5, 0.9]
    assert details["zeros"] == "synthetic, independent"
    assert not vs or details["logit_difference"] < 1e-3
    cells = details["cells"]
    # 300 and 400 are shortened to the same context, which is measured once.
    assert [(c["batch"], c["context"], c["zeros"]) for c in cells] == [
        (batch, context, share)
        for batch in (1, 3) for context in (16, cells[2]["context"]) for share in (0.5, 0.9)
    ]  # fmt: skip
    ours, full = (step_bytes(TOY, torch.float32, 1, v) for v in (trimmed(TOY), None))
    for cell in cells:
        assert cell["ratio"].keys() == against and cell["skips"]
        assert cell["seconds"].keys() == {"sparse"} | against
        assert len(cell["reads_GB_per_s"]) == 2
        assert abs(cell["zeros_measured"] - cell["zeros"]) < 0.1
        assert cell["live"] >= 1 - cell["zeros_measured"] - 1e-3
        length = cell["context"] + 2 + 4 + TOY_SIZES.steps / 2
        needed = ours.of(cell["batch"], length, cell["live"])
        assert cell["GB_per_step"] == pytest.approx(needed / 1e9, abs=1e-6)
        assert cell["dense"]["GB_per_step"] > cell["GB_per_step"] > 1e-4
        limit = cell["batch"] * cell["read_GB_per_s"] * 1e9 / full.of(cell["batch"], length)
        assert cell["dense_limit_tokens_per_s"] == pytest.approx(limit, rel=1e-2)
        assert cell["above_dense_limit"] == (cell["tokens_per_s"] > limit)
        assert cell["ratio"]["dense"]["pairs"] == 2


@pytest.mark.parametrize(
    ("flags", "device", "name"),
    [
        (["--zeros", "0.9"], "cpu", "persimmon-400m"),
        (["--zeros", "0.9"], "cuda", "persimmon-8b"),
        (["--zeros", "0.9", "--toy"], "cpu", "toy"),
        ([], "cpu", "persimmon-100m"),
    ],
)
def test_the_default_model_is_large_enough_for_what_is_measured(flags, device, name):
    args = make_parser().parse_args(["decode", *flags])
    assert _default_model(args, device)[1] == name


@pytest.mark.parametrize(
    ("pairs", "low", "high", "confidence"), [(1, 0, 0, 0), (5, 0, 4, 0.938), (9, 1, 7, 0.961)]
)
def test_intervals_are_those_of_the_sign_test(pairs, low, high, confidence):
    theirs = [1 + i / 10 for i in range(pairs)]
    found = ratio_interval([1.0] * pairs, theirs[::-1])
    assert (found["low"], found["high"]) == (theirs[low], theirs[high])
    assert found["confidence"] == confidence and found["median"] == theirs[pairs // 2]
    assert (found["min"], found["max"]) == (theirs[0], theirs[-1])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["decode", "--zeros", "0.5,1"], "--zeros holds 1"),
        (["decode", "--zeros", "0"], "--zeros holds 0"),
        (["latency", "--zeros", "0.5"], "--zeros with latency"),
        (["prefill", "--trim"], "--trim with prefill"),
        (["decode", "--zeros", "0.5", "--nproc", "2"], "--zeros with 2 ranks"),
        (["decode", "--zeros", "0.5", "--shard", "2"], "--zeros with --shard 2"),
        (["decode", "--zeros", "0.5", "--profile", "x.json"], "--profile with --zeros"),
        (["decode", "--toy", "--zeros", "0.5", "--set", "engine.sparse_rows=0"], "sparse_rows=0"),
        (["bytes", "--zeros", "0.5,0.9"], "several of --zeros"),
        (["sparsity", "--nproc", "2"], "one process"),
        (["decode", "--plot", "x.svg"], "--plot with decode"),
        (["sparsity", "--model", "persimmon-8b"], "random weights"),
        (["sparsity", "--plot", "x.jpg"], ".svg or .png"),
        (["sparsity", "--input", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["decode", "--input", "in.jsonl"], "--input with decode"),
        (["sparsity", "--set", "model.trim_vocab=[[3, 69]]"], "69 (|ENDOFTEXT|)"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, said, capsys):
    assert main(["bench", *flags, "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err


# ---------------------------------------------------------------- a user's checkpoint


def test_zeros_of_the_tiny_checkpoint_are_those_of_its_card(capsys, tmp_path):
    """Its card is about other prompts, of the same tasks."""
    path = tmp_path / "zeros.svg"
    found = run(capsys, "sparsity", "--dtype", "float32", "--device", "cpu", "--plot", str(path))
    card = json.loads((ROOT / "examples" / "tiny-persimmon" / "training.json").read_text())
    details = found["details"]
    assert details["prompts"] == 8 and details["generated_tokens"] > 16
    for layer, share in zip(details["layers"], card["zeros_per_layer"], strict=True):
        assert abs(layer["zeros_prompt"] - share) < 0.05
        assert abs(layer["zeros_generated"] - share) < 0.05
        live = [batch["live"] for batch in layer["batches"]]
        assert live == sorted(live) and abs(live[0] + layer["zeros_generated"] - 1) < 0.03
        assert [batch["batch"] for batch in layer["batches"]] == [1, 2, 4, 8, 16]
        for batch in layer["batches"]:
            assert batch["imbalance"].keys() == {"2", "4", "8"}
            assert 1 <= batch["imbalance"]["2"] <= batch["imbalance"]["8"]
    assert "generated tokens" in path.read_text()


def test_prompts_of_ones_own_even_of_a_single_token(capsys, tmp_path, monkeypatch):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "lamp"}\n')
    flags = ["--dtype", "float32", "--device", "cpu", "--steps", "1", "--input", str(path)]
    found = run(capsys, "sparsity", *flags, "--set", "model.bos_policy=bos")["details"]
    assert (found["prompts"], found["prompt_tokens"], found["generated_tokens"]) == (1, 2, 0)
    found = run(capsys, "sparsity", *flags, "--plot", str(tmp_path / "zeros.png"))["details"]
    assert (found["prompt_tokens"], found["generated_tokens"]) == (1, 0)
    assert 0.5 < found["mean"]["zeros_prompt"] < 1 and found["mean"]["zeros_generated"] is None
    monkeypatch.setattr("tprt.bench.sparsity.LLM", lambda *_, **__: pytest.fail("measured"))
    assert main(["bench", "sparsity", *flags, "--plot", str(tmp_path / "no" / "x.svg")]) == 5


def test_unions_and_imbalance_are_counted():
    layer = _Layer()
    fires = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]]).bool().numpy()
    layer.add(fires, 1, [1, 2, 3])
    found = layer.summary({1: [[0]], 2: [[0, 1], [1, 2]]}, (2, 3, 4))
    assert (found["zeros_prompt"], found["zeros_generated"]) == (0, round(7 / 12, 4))
    one, two = found["batches"]
    assert (one["live"], two["live"]) == (0.25, (0.5 + 0.75) / 2)
    # Neuron 0 alone: one rank of two has all. Then neurons 0 and 1 alike, and 0, 1 beside 2.
    assert one["imbalance"] == {"2": 2.0, "4": 4.0}
    assert two["imbalance"] == {"2": round((2 + 2 / 1.5) / 2, 3), "4": round((2 + 4 / 3) / 2, 3)}
    groups = _groups(5, SparsitySizes(groups=3), random.Random(0))
    assert groups.keys() == {1, 2, 4} and all(len(set(g)) == 4 for g in groups[4])


@pytest.mark.parametrize("line", ["[1]", "{", '{"id": 3}', '{"prompt": "a", "messages": []}'])
def test_lines_that_are_no_prompts_are_named(line, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "id": 1}\n\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 3"):
        read_prompts(path)
    path.write_text('{"prompt": "a", "id": 1}\n')
    assert read_prompts(path) == [{"prompt": "a"}]
    path.write_text(json.dumps({"prompt": "a\u2028b\u0085c"}, ensure_ascii=False), "utf-8")
    assert read_prompts(path) == [{"prompt": "a\u2028b\u0085c"}]
    path.write_text("\n")
    with pytest.raises(ConfigError, match="no prompt"):
        read_prompts(path)


# ---------------------------------------------------------------- pictures


def report(peer=True):
    """As ``decode --zeros`` prints it."""
    cells = []
    for batch, context in ((1, 16), (1, 99), (4, 16)):
        for share in (0.9, 0.5):
            seconds = {"sparse": [1.0, 2.0], "dense": [2.0, 2.0]}
            cell = {
                "batch": batch, "context": context, "zeros_measured": share, "tokens_per_s": 8.0,
                "dense": {"tokens_per_s": 5.0}, "dense_limit_tokens_per_s": 6.0, "seconds": seconds,
            }  # fmt: skip
            if peer:
                cell["transformers"] = {"tokens_per_s": 4.0}
                seconds["transformers"] = [3.0, 3.0]
            cells.append(cell)
    cells.append({"batch": 9, "context": 9, "skipped": "no room"})
    return {
        "bench": "decode", "model": "some-model", "dtype": "bfloat16", "device": "Some GPU",
        "settings": {"steps": 8}, "details": {"cells": cells},
    }  # fmt: skip


def test_the_picture_is_made_of_reports_alone(tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text("said before\n" + json.dumps(report()) + "\n")
    second.write_text(json.dumps(report(peer=False), indent=1))
    made = [tmp_path / f"{i}.svg" for i in range(2)]
    for path in made:
        assert picture.main([str(first), str(second), "-o", str(path)]) == 0
    text = made[0].read_text()
    assert text == made[1].read_text(), "no date, no chance"
    assert text.count("<!-- some-model, bfloat16, Some GPU -->") == 4  # two batches of each report
    assert "synthetic zeros, batch 4, context 16" in text and "context 99" not in text
    assert text.count("<!-- transformers -->") == 2


def test_other_reports_and_missing_packages_are_told(tmp_path, monkeypatch, capsys):
    other = tmp_path / "latency.json"
    other.write_text('{"bench": "latency", "details": {}}')
    assert picture.main([str(other), "-o", str(tmp_path / "x.svg")]) == 2
    assert "decode --zeros" in capsys.readouterr().err
    other.write_text('{"bench": "decode", "details": null}')
    assert picture.main([str(other), "-o", str(tmp_path / "x.svg")]) == 2
    (tmp_path / "empty.json").write_text("")
    assert picture.main([str(tmp_path / "empty.json"), "-o", "x.svg"]) == 2
    other.write_text(json.dumps(report()))
    assert picture.main([str(other), "-o", str(tmp_path / "no" / "x.svg")]) == 5
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert picture.main([str(other), "-o", "x.svg"]) == 2
    assert "tprt[plot]" in capsys.readouterr().err


# ---------------------------------------------------------------- bytes of a token


NCU = """==PROF== Connected to process 4242 (/usr/bin/python3.12)
==PROF== Profiling "_up": 0%....50%....100% - 1 pass
{"bytes": 4000000, "weights": 5000000}
==PROF== Disconnected from process 4242
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","dram__bytes_read.sum"
"","","","","","","","","","","","byte"
"0","4242","python3.12","127.0.0.1","_up","1","13","(128, 1, 1)","(2048, 1, 1)","0","9.0","3,000,064"
"1","4242","python3.12","127.0.0.1","void reduce<4, f(a, b)>(c)","1","13","(512, 1, 1)","(1, 1, 1)","0","9.0","0"
"2","4242","python3.12","127.0.0.1","_up","1","13","(128, 1, 1)","(2048, 1, 1)","0","9.0","1,100,000"
"""  # noqa: E501


def test_ncu_is_read():
    kernels = dram_bytes.parse_ncu(NCU)
    assert kernels == [("_up", 3000064.0), ("void reduce<4, f(a, b)>(c)", 0.0), ("_up", 1100000.0)]
    assert dram_bytes.parse_ncu("==ERROR== nothing was profiled\n") == []
    for damaged in (NCU.replace('"byte"', '"Mbyte"'), NCU.replace("1,100,000", "n/a")):
        with pytest.raises(TprtError, match="ncu"):
            dram_bytes.parse_ncu(damaged)


@pytest.mark.parametrize(
    ("text", "failed", "skipped"),
    [
        (NCU, False, False),
        (NCU.replace("1,100,000", "1,300,000"), True, False),
        ("==ERROR== ERR_NVGPUCTRPERM\n", False, True),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n", False, True),
    ],
)
def test_bytes_are_compared_with_the_closed_form(text, failed, skipped, monkeypatch):
    commands = []

    def fake(command):
        commands.append(command)
        out = text if command[0] == "ncu" else '{"bytes": 4000000}\n'
        return subprocess.CompletedProcess(command, 0, out, "")

    monkeypatch.setattr(dram_bytes, "_run", fake)
    monkeypatch.setattr(dram_bytes, "find_ncu", lambda: "ncu")
    monkeypatch.setattr(dram_bytes, "device_name", str)
    found = dram_bytes.dram_bytes(
        TOY, "toy", FLOAT32, "cuda", zeros=0.9, trim=True, context=16, say=print
    )
    assert commands[0][:3] == ["ncu", "--profile-from-start", "off"]
    assert json.loads(commands[0][-1])["config"] == asdict(TOY)
    details = found.details
    assert bool(details.get("failed")) == failed and bool(details.get("skipped")) == skipped
    if not failed and not skipped:
        assert details["ratio"] == round(4100064 / 4e6, 4) and details["num_kernels"] == 3
        assert details["largest"][0] == {"name": "_up", "bytes": 4100064}


@pytest.mark.parametrize(
    ("device", "code", "out", "said"),
    [
        ("cpu", 1, "Traceback\nValueError: no such thing\n", "no such thing"),
        ("cpu", 0, "nothing\n", "could not be run"),
        ("cuda", 0, NCU.partition('"ID"')[0], "no kernel"),  # the range was missed
    ],
)
def test_a_step_that_fails_is_told(device, code, out, said, monkeypatch):
    ended = subprocess.CompletedProcess([], code, out, "")
    monkeypatch.setattr(dram_bytes, "_run", lambda command: ended)
    monkeypatch.setattr(dram_bytes, "find_ncu", lambda: "ncu")
    with pytest.raises(TprtError, match=said):
        dram_bytes.dram_bytes(
            TOY, "toy", FLOAT32, device, zeros=None, trim=False, context=16, say=print
        )


def test_one_token_is_one_step(monkeypatch):
    steps, inside, execute = [], [], ModelRunner.execute
    monkeypatch.setattr(
        ModelRunner, "execute", lambda *args: (steps.append(args[1].tokens), execute(*args))[1]
    )

    def profiled(device, step):
        before = len(steps)
        step()
        inside.extend(steps[before:])

    monkeypatch.setattr(one_token, "_profile", profiled)
    made = {"dtype": "float32", "max_num_seqs": 4}
    found = one_token.main(asdict(TOY), made, "cpu", zeros=0.9, trim=True, context=16)
    assert [len(tokens) for tokens in inside] == [1]
    each = step_bytes(TOY, torch.float32, 1, trimmed(TOY))
    assert found["kv"] == (16 + 1 + one_token.STEPS_BEFORE + 1) * each.kv_per_token
    assert found["bytes"] == each.weights - found["skipped"] + found["kv"]
    share = found["skipped"] / each.down
    assert share == pytest.approx(found["zeros_measured"], abs=1e-3) and 0.8 < share < 1
    dense = one_token.main(asdict(TOY), {**made, "sparse_rows": 0}, "cpu", zeros=0.9, context=16)
    assert dense["skipped"] == 0 and dense["zeros_measured"] > 0.8
