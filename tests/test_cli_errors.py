"""Every way a checkpoint, tokenizer, setting or file can be wrong, provoked from the command line.

Each case checks the documented exit code, one message that names what is wrong and the way out, no
traceback, and that no output file is left.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

from tprt.cli import main

RANK_FILE = "model_optim_rng.pt"
WAYS_OUT = ("  try:", "did you mean", "must be one of")


class Attack:
    def __reduce__(self):
        return os.system, ("touch CANARY",)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def rank_file(model: Path, rank: int) -> Path:
    (found,) = model.glob(f"iter_*/mp_rank_{rank:02d}/{RANK_FILE}")
    return found


def edit(model: Path, rank: int, change: Callable[[dict], None]) -> None:
    """Rewrite one rank file of our own (trusted) checkpoint."""
    path = rank_file(model, rank)
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def encoder(state: dict) -> dict:
    return state["model"]["language_model"]["encoder"]


def generate(model: Path, *extra: str) -> tuple[list[str], Path]:
    out = model.parent / "out.jsonl"
    prompts = ROOT / "examples" / "prompts.jsonl"
    flags = ["--model", str(model), "--input", str(prompts), "--output", str(out)]
    return ["generate", *flags, "--dtype", "float32", *extra], out


def expect(capsys, argv: list[str], code: int, *words: str, out: Path | None = None) -> None:
    assert main(argv) == code, capsys.readouterr().err
    err = capsys.readouterr().err
    assert err.count("tprt: error:") == 1, err
    assert "Traceback" not in err
    assert any(way in err for way in WAYS_OUT), f"no way out in:\n{err}"
    for word in words:
        assert word in err, f"{word!r} is not in:\n{err}"
    assert out is None or nothing_left(out)


def nothing_left(out: Path) -> bool:
    """But the status, which says what went wrong."""
    left = [p.name for p in out.parent.iterdir() if out.name in p.name]
    assert set(left) <= {f"{out.name}.status.json"}, f"left behind: {left}"
    return True


def _change_a_replica(state: dict) -> None:
    encoder(state)["layers.0.input_layernorm.weight"] += 1


def _wrong_shape(state: dict) -> None:
    encoder(state)["layers.1.mlp.dense_h_to_4h.bias"] = torch.zeros(5, dtype=torch.bfloat16)


def _missing_tensor(state: dict) -> None:
    del encoder(state)["final_layernorm.bias"]


def _extra_tensor(state: dict) -> None:
    encoder(state)["layers.0.mlp.gate.weight"] = torch.zeros(2, 2)


def _other_iteration(state: dict) -> None:
    state["iteration"] += 1


def _nan(state: dict) -> None:
    encoder(state)["layers.0.self_attention.dense.weight"][0, 0] = float("nan")


def _attack_args(state: dict) -> None:
    state["args"] = Namespace(**vars(state["args"]), extra=Attack())


def _attack_rng(state: dict) -> None:
    state["rng_state"] = [{"random_rng_state": Attack()}]


def _other_architecture(state: dict) -> None:
    state["args"].sq_relu = False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_change_a_replica, ("input_layernorm.weight", "rank")),
        (_wrong_shape, ("dense_h_to_4h.bias",)),
        (_missing_tensor, ("final_layernorm.bias", "missing")),
        (_extra_tensor, ("gate.weight",)),
        (_other_iteration, ("iteration",)),
        (_nan, ("self_attn.dense.weight",)),
        (_attack_args, ("system",)),
        (_attack_rng, ("system",)),
        (_other_architecture, ("sq_relu",)),
    ],
)
def test_wrong_rank_file(copy, capsys, monkeypatch, change, words):
    monkeypatch.chdir(copy.parent)
    edit(copy, 1, change)
    argv, out = generate(copy)
    expect(capsys, argv, 3, *words, out=out)
    assert not (copy.parent / "CANARY").exists(), "the attack was run"


def test_missing_rank_folder(copy, capsys):
    shutil.rmtree(rank_file(copy, 1).parent)
    argv, out = generate(copy)
    expect(capsys, argv, 3, "mp_rank_01", out=out)


def test_rank_folder_too_many(copy, capsys, tmp_path):
    """A third rank folder: the folder count and args disagree."""
    shutil.copytree(rank_file(copy, 1).parent, rank_file(copy, 1).parent.parent / "mp_rank_02")
    argv, out = generate(copy)
    expect(capsys, argv, 3, "rank folders for 3", out=out)


@pytest.mark.parametrize("keep", [0, 3, 10, 200, 0.5, -1])
def test_truncated_file(copy, capsys, keep):
    path = rank_file(copy, 1)
    size = path.stat().st_size
    kept = int(size * keep) if isinstance(keep, float) else size + keep if keep < 0 else keep
    os.truncate(path, kept)
    argv, out = generate(copy)
    expect(capsys, argv, 3, "mp_rank_01", RANK_FILE, out=out)


@pytest.mark.parametrize("content", [None, "", "soon", "-4", "99"])
def test_tracker(copy, capsys, content):
    tracker = copy / "latest_checkpointed_iteration.txt"
    tracker.unlink() if content is None else tracker.write_text(content)
    argv, out = generate(copy)
    expect(
        capsys, argv, 3, "latest_checkpointed_iteration.txt" if content != "99" else "99", out=out
    )


def test_flipped_bit_is_found_under_full(copy, capsys):
    path = rank_file(copy, 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    argv, out = generate(copy, "--verify", "full")
    expect(capsys, argv, 3, "mp_rank_00", out=out)


def test_foreign_archives(copy, capsys):
    path = rank_file(copy, 0)
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    argv, out = generate(copy)
    expect(capsys, argv, 3, "mp_rank_00", out=out)
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    expect(capsys, argv, 3, "TorchScript", out=out)


@pytest.mark.parametrize("kind", ["missing", "garbage", "other"])
def test_tokenizer(copy, capsys, kind, tmp_path):
    path = copy / "adept_vocab.model"
    if kind == "missing":
        path.unlink()
    elif kind == "garbage":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        import io

        import sentencepiece as spm

        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d e f g h"] * 20),
            model_writer=model,
            vocab_size=20,
            model_type="char",
            minloglevel=2,
        )
        path.write_bytes(model.getvalue())
    argv, out = generate(copy)
    words = {"missing": "sentencepiece model", "other": "12 pieces"}.get(kind, "adept_vocab.model")
    expect(capsys, argv, 3, words, out=out)


def test_tp_that_does_not_divide(capsys, tmp_path, copy):
    argv, out = generate(copy, "--nproc", "3")
    expect(capsys, argv, 2, "3 ranks", "1, 2, 4, 8", out=out)
    expect(capsys, ["plan", "--model", str(copy), "--tp", "5"], 2, "1, 2, 4, 8")


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    assert main(["convert", str(TINY), str(tmp_path / "hf"), "--format", "hf"]) == 0
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("rope_scaling", {"type": "yarn", "factor": 2.0}, "yarn"),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4}, "dynamic"),
        ("quantization_config", {"quant_method": "gptq"}, "gptq"),
        ("hidden_act", "gelu", "gelu"),
        ("model_type", "llama", "llama"),
        ("hidden_size", None, "hidden_size"),
        ("vocab_size", 600, "embed_tokens"),
        ("num_attention_heads", 7, "7 heads"),
    ],
)
def test_hf_config_that_is_not_run(hf, capsys, key, value, word):
    path = hf / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    argv, out = generate(hf)
    expect(capsys, argv, 3, word, out=out)


def test_hf_without_its_weights(hf, capsys):
    for weights in hf.glob("*.safetensors"):
        weights.unlink()
    argv, out = generate(hf)
    expect(capsys, argv, 3, "safetensors", out=out)


def test_no_such_model(tmp_path, capsys):
    argv, out = generate(tmp_path / "nowhere")
    expect(capsys, argv, 3, "nowhere", out=out)
    (tmp_path / "empty").mkdir()
    argv, out = generate(tmp_path / "empty")
    expect(capsys, argv, 3, "empty", out=out)


def test_usage_and_config(copy, capsys, tmp_path):
    argv, out = generate(copy, "--set", "engine.max_num_seq=4")
    expect(capsys, argv, 2, "max_num_seqs", out=out)
    argv, out = generate(copy, "--dtype", "int8")
    expect(capsys, argv, 2, "int8", out=out)
    argv, out = generate(copy, "--set", "engine.max_model_len=4096")
    expect(capsys, argv, 2, "4096", "2048", out=out)
    expect(capsys, ["generate", "--model", str(copy)], 2, "--input", "--output")
    missing = ["generate", "--model", str(copy), "--input", "no.jsonl", "--output", str(out)]
    expect(capsys, missing, 2, "no.jsonl", out=out)
    double = tmp_path / "double.jsonl"
    double.write_text('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n')
    same = ["generate", "--model", str(copy), "--input", str(double), "--output", str(out)]
    expect(capsys, same, 2, "lines 1 and 2", out=out)


def test_output_that_cannot_be_written(capsys, tmp_path):
    argv, _ = generate(TINY)
    argv[argv.index("--output") + 1] = str(tmp_path / "no" / "out.jsonl")
    expect(capsys, argv, 5, "no/out.jsonl")


def test_cache_too_small(copy, capsys):
    argv, out = generate(copy, "--set", "engine.kv_cache_memory=1000")
    expect(capsys, argv, 8, "KV cache", out=out)


def test_convert_refuses_a_wrong_target(tmp_path, capsys):
    expect(
        capsys, ["convert", str(TINY), str(tmp_path / "o"), "--format", "hf", "--tp", "2"], 2, "hf"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    expect(capsys, ["convert", str(TINY), str(tmp_path / "full"), "--format", "hf"], 5, "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["file"]


def expect_of_two_ranks(model: Path, *words: str) -> None:
    """``generate --nproc 2`` ends with 3 and says so once."""
    argv, out = generate(model, "--nproc", "2")
    done = subprocess.run(
        [sys.executable, "-m", "tprt", *argv],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("tprt: error:") == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert done.stderr.count(word) == 1, done.stderr
    assert nothing_left(out)


def test_one_message_from_several_ranks(copy):
    """Under --nproc the error is found before any rank starts: one message, the right code."""
    edit(copy, 1, _missing_tensor)
    expect_of_two_ranks(copy, "final_layernorm.bias")


def test_error_found_by_the_ranks_keeps_its_code(copy):
    """NaN weights show only when read: the ranks fail, and the launcher passes their code on."""
    edit(copy, 1, _nan)
    expect_of_two_ranks(copy, "self_attn.dense.weight")


def test_sigterm_leaves_only_what_a_resume_needs(copy):
    """A scheduler's SIGTERM ends the job with 143 and takes the temporary output along."""
    prompts = copy.parent / "many.jsonl"
    prompts.write_text('{"prompt": "human: Repeat: lamp"}\n' * 4000)
    argv, out = generate(copy, "--set", "sampling.ignore_eos=true", "--max-tokens", "100")
    argv[argv.index("--input") + 1] = str(prompts)
    journal = out.parent / f"{out.name}.journal"
    process = subprocess.Popen([sys.executable, "-m", "tprt", *argv], cwd=ROOT)
    try:
        for _ in range(600):
            assert process.poll() is None, "it ended by itself"
            if journal.exists() and b" finish " in journal.read_bytes():
                break
            time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=60) == 143
    finally:
        process.kill()
    left = {p.name for p in out.parent.iterdir() if out.name in p.name}
    assert left == {journal.name, f"{out.name}.status.json"}


def test_plan_of_odd_configs(tmp_path, capsys):
    path = tmp_path / "config.json"
    good = json.loads((ROOT / "configs" / "persimmon-8b.json").read_text())
    for change in ({"hidden_size": "32"}, {"num_hidden_layers": 10**7}, {"vocab_size": True}):
        path.write_text(json.dumps(good | change))
        expect(capsys, ["plan", "--model", str(path)], 3, "config.json")
    path.write_text("{")
    expect(capsys, ["plan", "--model", str(path)], 3, "config.json")
    path.write_text(json.dumps(good))
    for memory in ("nan", "inf", "-1"):
        expect(capsys, ["plan", "--model", str(path), "--memory", memory], 2, "--memory")
    longer = ["plan", "--model", str(path), "--set", "engine.max_model_len=64K"]
    expect(capsys, longer, 2, "65536", "16384")
