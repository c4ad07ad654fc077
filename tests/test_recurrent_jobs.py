"""A RecurrentGemma checkpoint at the command line: what it says, converts, answers, resumes, replays."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from launched_jobs import answer_here
from recurrent_models import CONFIG, TOKENIZER, WINDOW, random_weights
from safetensors.torch import load_file, save_file
from test_cli_errors import expect
from test_generate_cli import launch, lines
from test_recurrent_config import COMMON, CYCLE, SIZES, SPELLING_4, SPELLING_5
from test_recurrent_gemma import write_folder_with_turns

from tprt import LLM, SamplingParams
from tprt.checkpoint import open_checkpoint
from tprt.cli import main
from tprt.engine.control import read_records
from tprt.tokenizer import Tokenizer

LONG = "the quick brown fox jumps over the lazy dog and " * 8  # several windows
QUESTION = "quick<end_of_turn>\n<start_of_turn>model\nfox"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_folder_with_turns(tmp_path_factory.mktemp("models") / "model")


# ---------------------------------------------------------------- what is said before it runs


def test_inspect_says_what_the_model_is(model, capsys):
    assert main(["inspect", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["model_type"] == "recurrent_gemma" and found["warnings"] == []
    assert found["parameters"] == sum(
        t.numel() for t in load_file(model / "model.safetensors").values()
    )
    assert found["tp_sizes"] == [1, 2, 4, 8]
    assert found["in_words"] == "4 recurrent and 1 attention layers, window of 17 keys"
    assert found["tokenizer"]["eod_id"] == 1
    # Of ten heads four ranks have three each: the last has one to read.
    *full, last = found["bytes_per_rank"]["4"]
    assert full == [full[0]] * 3 and last < full[0]
    assert main(["inspect", str(model)]) == 0
    assert "tensor-parallel sizes that work: 1, 2, 4, 8" in capsys.readouterr().out


@pytest.mark.parametrize(("tp", "channels"), [(1, 160), (4, 48), (8, 32)])
def test_plan_counts_the_state_of_a_sequence(model, capsys, tp, channels):
    """The same at any length: 4 layers of state and 4 inputs, and one ring of 32 keys and values."""
    state = 4 * channels * (4 + 4 * 4) + 2 * 32 * 16 * 4
    argv = ["plan", "--model", str(model), "--tp", str(tp), "--dtype", "fp32"]
    for length in ("100", "8192", "100000"):
        assert main([*argv, "--set", f"engine.max_model_len={length}", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["state_bytes_per_sequence_per_rank"] == state
        assert plan["kv_bytes_per_token"] == 0
        rows = plan["max_num_seqs"] + 1 + plan["snapshots"]
        assert plan["snapshots"] == 2 * 64 and plan["kv_cache_bytes_per_rank"] == rows * state
    weights = {rank["weights"] for rank in plan["per_rank"]}
    assert len(weights) == 1, "heads of zeros make the ranks alike"
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "state per sequence" in said and "at any length" in said


def test_ranks_that_cannot_share_the_heads_are_refused(model, tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(COMMON | SIZES["2b"] | SPELLING_4))
    words = ("3 ranks cannot share 10 heads", "1, 2, 4, 5, 8, 10")
    expect(capsys, ["plan", "--model", str(config), "--tp", "3"], 2, *words)
    (tmp_path / "in").write_text('{"prompt": "fox"}\n')
    files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    argv = ["generate", "--model", str(model), *files, "--nproc", "3"]
    expect(capsys, argv, 2, words[0], "1, 2, 4, 8", out=tmp_path / "out")
    argv = ["convert", str(model), str(tmp_path / "to"), "--format", "presharded", "--tp", "3"]
    expect(capsys, argv, 2, words[0], "1, 2, 4, 8", out=tmp_path / "to")


# ---------------------------------------------------------------- conversions


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize(
    ("spelling", "key"), [(SPELLING_4, "_block_types"), (SPELLING_5, "block_types")]
)
def test_presharded_and_back_keeps_every_bit(tmp_path, tp, spelling, key):
    """With heads of zeros, which no file holds, and without."""
    source = tmp_path / "source"
    source.mkdir()
    raw = CONFIG.to_hf() | {"window_keys": WINDOW, "torch_dtype": "bfloat16"}
    for name in (*SPELLING_4, "block_types", "_block_types"):
        del raw[name]
    raw |= spelling | {key: list(CYCLE)}
    (source / "config.json").write_text(json.dumps(raw))
    weights = {name: t.bfloat16() for name, t in random_weights(CONFIG).items()}
    weights["model.layers.0.temporal_block.rg_lru.input_gate_weight"][-1, -1, -1] = -0.0
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
              source / "model.safetensors")  # fmt: skip
    shutil.copy(TOKENIZER, source / "tokenizer.model")
    there, back = tmp_path / "there", tmp_path / "back"
    assert (
        main(["convert", str(source), str(there), "--format", "presharded", "--tp", str(tp)]) == 0
    )
    assert main(["convert", str(there), str(back), "--format", "hf", "--verify", "full"]) == 0
    found = load_file(back / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
    with open_checkpoint(source) as one, open_checkpoint(back) as other:
        assert one.config == other.config and other.config.window_keys == WINDOW
    assert (back / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()


# ---------------------------------------------------------------- jobs


def write_records(path: Path) -> Path:
    """Prompts and messages, some with a beginning in common, which is kept as state."""
    records = []
    for i in range(6):
        records.append({"id": f"p{i}", "prompt": LONG + "brown " * i})
        question = {"role": "user", "content": f"{QUESTION} {i}"}
        turns = (
            [question, {"role": "assistant", "content": LONG}, question] if i % 2 else [question]
        )
        records.append({"id": f"m{i}", "messages": turns, "params": {"n": 1 + i % 3}})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def job(model: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    files = ["--model", str(model), "--input", str(prompts), "--output", str(out)]
    small = ["--set", "engine.max_num_seqs=3", "--set", "engine.max_num_batched_tokens=40"]
    sampled = ["--temperature", "0.8", "--seed", "3", "--max-tokens", "20"]
    return ["generate", *files, "--dtype", "float32", *small, *sampled, *more]


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory) -> Path:
    """A job's folder: its input ``in``, what it answered ``out``, and the record of its steps."""
    folder = tmp_path_factory.mktemp("job")
    record = f"engine.record_path={folder / 'steps'}"
    argv = job(model, write_records(folder / "in"), folder / "out", "--set", record)
    assert answer_here(argv) == 0
    return folder


def test_a_job_answers_prompts_and_messages(model, undisturbed):
    tokenizer = Tokenizer(model / "tokenizer.model")
    asked, answered = lines(undisturbed / "in"), lines(undisturbed / "out")
    for record, answer in zip(asked, answered, strict=True):
        assert answer["id"] == record["id"] and answer["error"] is None
        if "prompt" in record:
            wanted = tokenizer.encode(record["prompt"])
        else:
            wanted = tokenizer.encode_chat(record["messages"])
            start = tokenizer.piece_to_id("<start_of_turn>")
            assert wanted.count(start) == len(record["messages"]) + 1
        assert wanted[0] == 2 and answer["prompt_tokens"] == len(wanted)
        assert len(answer["outputs"]) == record.get("params", {}).get("n", 1)
    assert len({output["text"] for answer in answered for output in answer["outputs"]}) > 15


def test_a_killed_job_goes_on_on_other_ranks_to_the_same_bytes(model, undisturbed, tmp_path):
    argv = job(model, undisturbed / "in", tmp_path / "out")
    env = {"PYTHONPATH": str(ROOT), "TPRT_FAULT": "journal.append:kill:hit=6"}
    killed = subprocess.run(
        [sys.executable, "-m", "tprt", *argv], check=False, env=os.environ | env, timeout=120
    )
    assert killed.returncode == -9 and not (tmp_path / "out").exists()
    done = launch("-m", "tprt", *argv, "--nproc", "2")
    assert "5 of 12 records are done already" in done.stderr
    assert (tmp_path / "out").read_bytes() == (undisturbed / "out").read_bytes()


def test_the_record_of_a_job_runs_again(model, undisturbed):
    """Without its scheduler: which state is copied where is in the record."""
    with (undisturbed / "steps").open("rb") as file:
        assert sum(len(record.states) for record in read_records(file, "steps")) > 6
    settings = {"max_num_seqs": 3, "max_num_batched_tokens": 40}
    with LLM(str(model), dtype="float32", **settings) as llm:
        calls = llm.replay(undisturbed / "steps")
        tokens = [ids for call in calls for _, ids in sorted(call.tokens.items())]
        texts = {llm.tokenizer.decode(ids) for ids in tokens}
    outputs = [o for answer in lines(undisturbed / "out") for o in answer["outputs"]]
    whole = {o["text"] for o in outputs if o["finish_reason"] == "length"}
    assert len(tokens) == len(outputs) and len(whole) > 12 and whole <= texts


def test_window_keys_in_a_settings_file(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "in").write_text(json.dumps({"prompt": LONG}) + "\n")
    files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    (tmp_path / "narrow.yaml").write_text(
        f"model: {{path: {model}, dtype: float32, window_keys: 5}}\n"
        "sampling: {temperature: 0, max_tokens: 30}\n"
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=30)
    texts = []
    for keys in (5, None):
        with LLM(str(model), dtype="float32", window_keys=keys) as llm:
            texts.append(llm.generate(LONG, greedy)[0].outputs[0].text)
    assert answer_here(["generate", "--config", str(tmp_path / "narrow.yaml"), *files]) == 0
    (answer,) = lines(tmp_path / "out")
    assert answer["outputs"][0]["text"] == texts[0] != texts[1]
    argv = ["generate", "--config", str(tmp_path / "narrow.yaml"), *files]
    expect(capsys, [*argv, "--set", "model.window_keys=6"], 2, "window_keys", "--restart")
    expect(capsys, [*argv, "--set", "model.window_keys=18"], 2, "2 to 17", "17 as trained")
    monkeypatch.setattr("tprt.cli.launch.launch", lambda *args: pytest.fail("ranks were started"))
    argv += ["--nproc", "2", "--restart", "--set", "model.window_keys=18"]
    expect(capsys, argv, 2, "2 to 17", "17 as trained")
