"""Every refusal of a checkpoint, provoked from the command line, beyond those of test_cli_errors.

Each must end with exit code 3 and one message that names what, where and a way out, without a
traceback, without output, and without having run anything: CANARY is what an attack would leave.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from folders import hf_folder
from hostile import call, cases, entry, glob, pkl, text, zipped
from megatron_writer import random_model, write_release
from test_cli_errors import expect, generate, rank_file

from tprt.cli import main

PER_HEAD = "weights_per_attention_head_and_layer"
RANK_1 = "rank_01_of_02.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "CANARY"
    yield path
    assert not path.exists(), "the attack was run"


@pytest.fixture(scope="module")
def presharded_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("presharded") / "model"
    assert main(["convert", str(TINY), str(path), "--format", "presharded", "--tp", "2"]) == 0
    return path


@pytest.fixture
def presharded(presharded_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(presharded_source, tmp_path / "model"))


def refused(capsys, model: Path, *words: str, flags: tuple[str, ...] = ()) -> None:
    argv, out = generate(model, *flags)
    expect(capsys, argv, 3, "where:", *words, out=out)


# Files of strangers

HOSTILE = [
    "system as storage key", "system as storage type", "build into a class", "build into a list",
    "reduce numpy.load", "reduce numpy.testing._private.utils.runstring", "reduce numpy.fromfile",
    "reduce torch.load", "reduce torch.storage._load_from_bytes", "reduce torch.hub.load",
    "reduce torch._dynamo.guards.GuardBuilder.get", "reduce builtins.eval", "memoized name", "INST",
    "memo bomb", "memo bomb, get", "string bomb", "opcode bomb", "path traversal", "absolute",
    "duplicate member", "compressed", "overlapping members", "two top folders", "legacy magic",
    "legacy tar", "pickle in front", "expanded a billion times", "past its storage",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_rank_file(model, capsys, canary, name):
    raw, message = next((raw, message) for n, raw, message in cases(canary) if n == name)
    rank_file(model, 1).write_bytes(raw)
    refused(capsys, model, message, "mp_rank_01")


def build_gadget(canary: Path) -> bytes:
    """State with an attack in it, built into an ``args`` that is otherwise Megatron's own."""
    system = call(glob("os", "system"), text(f"touch {canary}"))
    args = glob("argparse", "Namespace") + b")\x81" + entry("hidden_size", system) + b"b"
    return zipped(pkl(entry("args", args)))


def test_build_gadget_in_args(model, capsys, canary):
    rank_file(model, 0).write_bytes(build_gadget(canary))
    refused(capsys, model, "os.system", "mp_rank_00")


@pytest.mark.parametrize("verb", ["inspect", "plan", "convert"])
def test_other_commands_refuse_alike(model, capsys, canary, verb):
    rank_file(model, 1).write_bytes(build_gadget(canary))
    target = model.parent / "converted"
    argv = {
        "inspect": ["inspect", str(model), "--json"],
        "plan": ["plan", "--model", str(model)],
        "convert": ["convert", str(model), str(target), "--format", "presharded"],
    }[verb]
    expect(capsys, argv, 3, "os.system", "mp_rank_01", "where:", out=target)


def test_inspect_of_a_contradictory_folder(model, capsys):
    shutil.rmtree(rank_file(model, 1).parent)
    expect(capsys, ["inspect", str(model)], 3, "mp_rank_01", "where:")


# Megatron's folders


def test_swapped_rank_files(model, capsys):
    first, second = rank_file(model, 0), rank_file(model, 1)
    first.rename(model / "x")
    second.rename(first)
    (model / "x").rename(second)
    refused(capsys, model, "mp_rank_00 was saved by rank 1", "swapped")


def test_missing_pipeline_stage(tmp_path, capsys):
    folder = write_release(tmp_path / "model", random_model(), tp=2, pp=3)
    shutil.rmtree(folder / "mp_rank_01_001")
    refused(capsys, tmp_path / "model", "missing rank folders: mp_rank_01_001")


def test_missing_last_pipeline_stage(tmp_path, capsys):
    """No gap in the folders' numbers shows it; args do."""
    folder = write_release(tmp_path / "model", random_model(), tp=1, pp=3)
    shutil.rmtree(folder / "mp_rank_00_002")
    refused(capsys, tmp_path / "model", "missing rank folders: mp_rank_00_002")


def test_convert_refuses_norms_that_differ_by_head(tmp_path, capsys):
    write_release(tmp_path / "model", random_model(qk=PER_HEAD), tp=2, qk=PER_HEAD)
    target = tmp_path / "converted"
    argv = ["convert", str(tmp_path / "model"), str(target), "--format", "hf"]
    words = ("self_attn.q_layernorm", "differ between heads", "--format megatron")
    expect(capsys, argv, 3, "where:", *words, out=target)


def test_tied_head_that_differs(tmp_path, capsys):
    write_release(tmp_path / "model", random_model(), tp=2, untie_embeddings=False)
    refused(capsys, tmp_path / "model", "ties lm_head.weight", "mp_rank_00")


def test_mistyped_path_does_not_go_to_the_hub(tmp_path, capsys, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def fail(*_: object, **__: object) -> str:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    monkeypatch.chdir(ROOT)
    argv, out = generate(tmp_path / "model")
    argv[argv.index("--model") + 1] = "examples/tiny-persimon"
    expect(capsys, argv, 3, "'examples' is here", "where:", out=out)


# Our own layout


def manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        raw = json.loads((path / "manifest.json").read_text())
        change(raw)
        (path / "manifest.json").write_text(json.dumps(raw))

    return damage


def flip_a_bit(path: Path) -> None:
    raw = bytearray((path / RANK_1).read_bytes())
    raw[-1] ^= 1
    (path / RANK_1).write_bytes(raw)


def digest(raw: dict) -> None:
    raw["files"][1]["tensors"]["lm_head.weight"]["sha256"] = "0" * 64


PRESHARDED = {
    "bit": (flip_a_bit, ("is damaged: sha256", RANK_1)),
    "digest": (manifest(digest), ("'lm_head.weight' is damaged", "000000", RANK_1)),
    "rank file": (lambda p: (p / RANK_1).unlink(), (f"missing rank file '{RANK_1}'",)),
    "truncated": (lambda p: os.truncate(p / RANK_1, 9999), (RANK_1, "bytes")),
    "text": (lambda p: (p / "manifest.json").write_text("{,"), ("not valid JSON", "manifest.json")),
    "list": (lambda p: (p / "manifest.json").write_text("[]"), ("not an object", "manifest.json")),
    "version": (manifest(lambda m: m.update(version=9)), ("version 9",)),
    "files": (manifest(lambda m: m["files"].pop()), ("tp_size is 2",)),
    "entry": (manifest(lambda m: m["files"][1].pop("tensors")), ("rank 1 is malformed",)),
    "config": (manifest(lambda m: m["config"].update(odd=1)), ("unknown: 'odd'",)),
    "size": (manifest(lambda m: m["config"].update(vocab_size="9")), ("vocab_size", "not '9'")),
    "norms": (manifest(lambda m: m["config"].update(qk_layernorm="x")), ("qk_layernorm", "per_head")),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESHARDED)
def test_presharded(presharded, capsys, name):
    damage, words = PRESHARDED[name]
    damage(presharded)
    refused(capsys, presharded, *words, flags=("--verify", "full"))


# Hugging Face's layout


def index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (file,) = path.glob("*.index.json")
        raw = json.loads(file.read_text())
        change(raw["weight_map"])
        file.write_text(json.dumps(raw))

    return damage


SHARD = "pytorch_model-1.bin"
HUGGING_FACE = {
    "shard missing": (lambda p: (p / SHARD).unlink(), ("1 of 2 weight files", SHARD)),
    "shard cut off": (lambda p: os.truncate(p / SHARD, 1000), (SHARD, "cut off")),
    "tensor absent": (
        index(lambda m: m.update(ghost=SHARD)), ("not where the index says", f"ghost (in {SHARD})")),
    "tensor unlisted": (
        index(lambda m: m.pop("lm_head.weight")), ("not in the index", "lm_head.weight")),
    "outside": (index(lambda m: m.update(a="../b.bin")), ("outside its folder", "../b.bin")),
    "no map": (
        lambda p: (p / "pytorch_model.bin.index.json").write_text("{}"), ("weight_map",)),
    "index is text": (
        lambda p: (p / "pytorch_model.bin.index.json").write_text("no"), ("not valid JSON",)),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_bin_shards_and_their_index(tmp_path, capsys, name):
    damage, words = HUGGING_FACE[name]
    damage(hf_folder(tmp_path / "model", random_model(), form="bin shards"))
    refused(capsys, tmp_path / "model", *words)


def test_hostile_bin(tmp_path, capsys, canary):
    path = hf_folder(tmp_path / "model", random_model(), form="bin")
    for name in ("system at the top", "reduce torch.load", "path traversal", "memo bomb"):
        raw, message = next((raw, message) for n, raw, message in cases(canary) if n == name)
        (path / "pytorch_model.bin").write_bytes(raw)
        refused(capsys, path, message, "pytorch_model.bin")


def test_bin_of_other_tensors(tmp_path, capsys):
    weights = random_model()
    del weights["model.final_layernorm.bias"]
    path = hf_folder(tmp_path / "model", weights | {"odd.weight": torch.ones(2)}, form="bin")
    refused(capsys, path, "1 missing: model.final_layernorm.bias", "not expected: odd.weight")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"rope_parameters": {"type": "linear", "factor": 2.0}},
            ("linear", "rope_parameters.type"),
        ),
        ({"hidden_size": "wide"}, ("hidden_size", "not 'wide'")),
        ({"num_hidden_layers": 10**6}, ("num_hidden_layers", "the limit is 4096")),
        ({"tie_word_embeddings": True}, ("ties lm_head.weight",)),
    ],
)
def test_config_json(tmp_path, capsys, change, words):
    path = hf_folder(tmp_path / "model", random_model(), **change)
    refused(capsys, path, *words, "config.json")
    if "tie_word_embeddings" not in change:  # a bare config.json has no weights to contradict it
        expect(capsys, ["plan", "--model", str(path / "config.json")], 3, *words)
