"""Hugging Face and presharded folders, and conversions between all layouts."""

import json
import os
import shutil
import struct
from dataclasses import replace

import pytest
import torch
from folders import CONFIG, assert_same, hf_folder, megatron_source
from megatron_writer import random_model
from safetensors.torch import load_file, save_file
from toy_model import Toy, specs_of

import tprt.checkpoint.writers as writers
from tprt.checkpoint import (
    load_weights,
    open_checkpoint,
    write_huggingface,
    write_megatron,
    write_presharded,
)
from tprt.errors import CheckpointError, ConfigError, OutputError


@pytest.mark.parametrize("form", ["safetensors", "bin", "safetensors shards", "bin shards"])
def test_hugging_face_forms(tmp_path, form):
    """Guards all four file forms, dropped inv_freq, and slices that count their bytes."""
    model = random_model(dtype=torch.bfloat16)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    reader = open_checkpoint(hf_folder(tmp_path, model | extra, form=form), verify="full")
    assert reader.layout == "huggingface" and reader.dtype == torch.bfloat16
    assert reader.tokenizer_path == tmp_path / "tokenizer.model"
    start = reader.bytes_read
    block = reader.read("lm_head.weight", (slice(10, 20), slice(3, 5)))
    assert torch.equal(block, model["lm_head.weight"][10:20, 3:5])
    assert reader.bytes_read - start == 10 * 2 * 2
    assert reader.read("lm_head.weight", (slice(4, 4), slice(None))).shape == (0, 32)
    assert_same(reader, model)
    assert ("no checksums" in " ".join(reader.warnings)) == form.startswith("safetensors")


def test_state_dict_with_metadata(tmp_path):
    """Guards .bin files of module.state_dict(): an OrderedDict that carries _metadata."""
    model = random_model(layers=1)
    specs = specs_of(replace(CONFIG, num_hidden_layers=1))(0, 1)
    toy = Toy({n: s for n, s in specs.items() if "layernorm" not in n and not s.transposed})
    state = toy.state_dict()
    assert hasattr(state, "_metadata")
    state.update(model)
    hf_folder(tmp_path, state, replace(CONFIG, num_hidden_layers=1), form="bin")
    assert_same(open_checkpoint(tmp_path), model)


def test_trimmed_vocabulary_and_config_of_transformers_5(tmp_path):
    model = random_model(vocab=37)
    raw = {
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        "rotary_precision": "bf16",
    }
    hf_folder(tmp_path, model, replace(CONFIG, vocab_size=37), **raw)
    reader = open_checkpoint(tmp_path)
    assert reader.config.rope_theta == 1e4 and reader.config.rotary_precision == "bf16"
    assert_same(reader, model)


def rewrite_header(path, change):
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header = change(raw[8 : 8 + n].decode())
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + raw[8 + n :])


def duplicate_name(text):
    return text.replace('"model.final_layernorm.bias"', '"model.final_layernorm.weight"')


def drop(name):
    def damage(path):
        tensors = load_file(path / "model.safetensors")
        del tensors[name]
        save_file(tensors, path / "model.safetensors")

    return damage


def shards(change):
    def damage(path):
        hf_folder(path, load_file(path / "model.safetensors"), form="safetensors shards")
        (path / "model.safetensors").unlink()
        change(path)

    return damage


def edit_index(change):
    def damage(path):
        file = path / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))

    return shards(damage)


FILE = "model.safetensors"
DAMAGE = {
    "empty": (lambda p: (p / FILE).write_bytes(b""), "cut off"),
    "header length": (lambda p: (p / FILE).write_bytes(struct.pack("<Q", 1 << 60)), "claims 115"),
    "header past the end": (lambda p: (p / FILE).write_bytes(struct.pack("<Q", 99)), "does not have"),
    "truncated": (lambda p: os.truncate(p / FILE, 20_000), "should have"),
    "one byte more": (lambda p: (p / FILE).write_bytes((p / FILE).read_bytes() + b"x"), "should have"),
    "duplicate name": (lambda p: rewrite_header(p / FILE, duplicate_name), "is there twice"),
    "lying shape": (
        lambda p: rewrite_header(p / FILE, lambda t: t.replace("[48,32]", "[49,32]")), "its shape"),
    "many tensors": (lambda p: rewrite_header(p / FILE, lambda _: json.dumps(
        {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)})),
        "limit is 100000"),
    "negative offset": (
        lambda p: rewrite_header(p / FILE, lambda t: t.replace("[0,", "[-4,")), "span"),
    "not json": (lambda p: rewrite_header(p / FILE, lambda t: t[1:]), "not valid JSON"),
    "deep json": (lambda p: rewrite_header(p / FILE, lambda t: "[" * 200_000), "not valid JSON"),
    "odd dtype": (lambda p: rewrite_header(p / FILE, lambda t: t.replace("F32", "F3")), "F3"),
    "missing tensor": (drop("lm_head.weight"), "1 missing: lm_head.weight"),
    "config missing": (lambda p: (p / "config.json").unlink(), "config.json"),
    "config no json": (lambda p: (p / "config.json").write_text("{,"), "not valid JSON"),
    "config of a wrong type": (
        lambda p: (p / "config.json").write_text(json.dumps(CONFIG.to_hf() | {"hidden_size": "x"})),
        "not 'x'"),
    "weights missing": (lambda p: (p / FILE).unlink(), "no weights here"),
    "shard missing": (shards(lambda p: (p / "model-1.safetensors").unlink()), "model-1.safetensors"),
    "index names a missing tensor": (
        edit_index(lambda m: m.update(odd="model-0.safetensors")), "odd"),
    "index lacks a tensor": (edit_index(lambda m: m.pop("lm_head.weight")), "lm_head.weight"),
    "index leaves the folder": (edit_index(lambda m: m.update(a="../x")), "outside its folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_hugging_face_folders(tmp_path, name):
    """Guards header and index checks the library does not make, each named with its file."""
    hf_folder(tmp_path, random_model())
    DAMAGE[name][0](tmp_path)
    with pytest.raises(CheckpointError, match=DAMAGE[name][1]) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in caught.value.where and caught.value.hint


# Conversion

QK_MODES = [
    "none", "weights_per_tensor_parallel_rank_and_layer", "weights_per_attention_head_and_layer",
]  # fmt: skip


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_round_trips_keep_every_bit(tmp_path, tp):
    """Megatron -> presharded -> Hugging Face -> Megatron -> presharded, at mixed TP sizes."""
    reader, model = megatron_source(tmp_path, tp=2)
    model["lm_head.weight"][0, 0] = -0.0
    specs = specs_of(reader.config)
    steps = [
        lambda r, d: write_presharded(r, d, tp, specs),
        write_huggingface,
        lambda r, d: write_megatron(r, d, tp),
        lambda r, d: write_presharded(r, d, 4 // tp, specs),
        lambda r, d: write_megatron(r, d, 4 // tp, iteration=3),
    ]
    model = {n: reader.read_whole(n) for n in reader.names()}
    for number, step in enumerate(steps):
        step(reader, tmp_path / f"step{number}")
        reader = open_checkpoint(tmp_path / f"step{number}", verify="full")
        assert_same(reader, model)
        assert reader.config.rotary_precision == "bf16"  # what Megatron's own code would do
        assert reader.tokenizer_path.read_bytes() == b"pieces"
    assert sorted(p.name for p in tmp_path.iterdir())[0] == "src"  # no partial folders left


@pytest.mark.parametrize(
    "qk",
    ["weights_per_attention_head_and_layer", "weights_per_tensor_parallel_rank_and_layer", "none"],
)
def test_norm_modes_survive_megatron_and_presharded(tmp_path, qk):
    reader, model = megatron_source(tmp_path, tp=2, qk=qk)
    model = {n: reader.read_whole(n) for n in reader.names()}
    write_megatron(reader, tmp_path / "m", 4)
    assert_same(open_checkpoint(tmp_path / "m"), model)
    write_presharded(reader, tmp_path / "p", 2, specs_of(reader.config))
    assert_same(open_checkpoint(tmp_path / "p", verify="full"), model)
    if qk != "none":
        with pytest.raises(CheckpointError, match="differ between heads"):
            write_huggingface(reader, tmp_path / "h")
        assert not (tmp_path / "h").exists()


def test_hugging_face_meaning_is_kept(tmp_path):
    """Guards fp32 rotary and the end token on the way through Megatron, which would say bf16."""
    model = random_model()
    reader = open_checkpoint(hf_folder(tmp_path / "hf", model))
    assert reader.config.rotary_precision is None
    write_megatron(reader, tmp_path / "m", 2)
    there = open_checkpoint(tmp_path / "m")
    assert (there.config.rotary_precision, there.config.eos_token_id) == ("fp32", 5)
    write_huggingface(there, tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["rotary_precision"] == "fp32" and back["eos_token_id"] == 5


def test_vocabulary_that_does_not_divide(tmp_path):
    """Guards padding rows: they are on Megatron's disk, and are gone when read back."""
    model = random_model(vocab=45)
    reader = open_checkpoint(hf_folder(tmp_path / "hf", model, replace(CONFIG, vocab_size=45)))
    write_megatron(reader, tmp_path / "m", 4)
    file = tmp_path / "m" / "iter_0000001" / "mp_rank_03" / "model_optim_rng.pt"
    raw = torch.load(file, weights_only=False)
    assert raw["args"].padded_vocab_size == 48
    assert raw["model"]["word_embeddings_for_head"]["weight"].shape == (12, 32)
    assert not raw["model"]["word_embeddings_for_head"]["weight"][-3:].any()
    there = open_checkpoint(tmp_path / "m")
    assert there.config.vocab_size == 45
    assert_same(there, model)
    write_presharded(there, tmp_path / "p", 4, specs_of(there.config))
    assert_same(open_checkpoint(tmp_path / "p"), model)


def test_written_megatron_file_is_adepts_form(tmp_path):
    """Guards the keys other readers look for, with torch's own loader as the witness."""
    reader, model = megatron_source(tmp_path)
    write_megatron(reader, tmp_path / "m", 2)
    file = tmp_path / "m" / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt"
    raw = torch.load(file, weights_only=False)
    assert raw["iteration"] == 1 and raw["checkpoint_version"] == 3.0
    assert set(raw["rng_state"][0]) == {
        "random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state",
        "rng_tracker_states",
    }  # fmt: skip
    encoder = raw["model"]["language_model"]["encoder"]
    got = encoder["layers.2.mlp.dense_4h_to_h.weight"]
    assert torch.equal(got, model["model.layers.2.mlp.dense_4h_to_h.weight"][:, 32:])
    assert raw["model"]["language_model"]["embedding"]["word_embeddings"]["weight"].shape == (
        24,
        32,
    )
    assert not (tmp_path / "m" / "scratch").exists()


def test_written_hugging_face_folder_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    reader, model = megatron_source(tmp_path)
    write_huggingface(reader, tmp_path / "h")
    theirs = transformers.PersimmonForCausalLM.from_pretrained(tmp_path / "h", dtype="auto")
    state = theirs.state_dict()
    assert all(torch.equal(state[n], t) for n, t in model.items())


def test_large_folders_get_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "MAX_SHARD_BYTES", 20_000)
    reader, model = megatron_source(tmp_path)
    write_huggingface(reader, tmp_path / "h")
    assert len(list((tmp_path / "h").glob("model-*-of-*.safetensors"))) > 2
    assert_same(open_checkpoint(tmp_path / "h"), model)


def test_tied_head(tmp_path):
    """Guards tied models: no head on disk or one too many, and no second copy when converted."""
    model = random_model(tied=True)
    tied = replace(CONFIG, tie_word_embeddings=True)
    head = {"lm_head.weight": model["model.embed_tokens.weight"].clone()}
    reader = open_checkpoint(hf_folder(tmp_path / "hf", model | head, tied))
    assert_same(reader, model)
    write_megatron(reader, tmp_path / "m", 2)
    there = open_checkpoint(tmp_path / "m")
    assert there.config.tie_word_embeddings
    assert_same(there, model)
    specs = specs_of(reader.config)(1, 2)
    specs["lm_head.weight"] = specs["model.embed_tokens.weight"]
    toy = Toy(specs)
    load_weights(toy, there)
    assert torch.equal(toy.lm_head.weight, model["model.embed_tokens.weight"][24:])


@pytest.mark.parametrize("form", ["safetensors", "bin shards"])
def test_head_that_is_not_the_embedding_it_is_tied_to(tmp_path, form):
    """Guards against a model run with a head that its weights do not have."""
    model = random_model(tied=True)
    model["lm_head.weight"] = model["model.embed_tokens.weight"].clone()
    model["lm_head.weight"][47, 31] += 1
    hf_folder(tmp_path, model, replace(CONFIG, tie_word_embeddings=True), form=form)
    with pytest.raises(CheckpointError, match=r"ties lm_head.weight") as caught:
        open_checkpoint(tmp_path)
    assert "config.json" in caught.value.where and caught.value.hint


def test_destinations(tmp_path, monkeypatch):
    """Guards what is there already, sizes that do not divide, and a conversion that dies midway."""
    reader, _ = megatron_source(tmp_path)
    with pytest.raises(OutputError, match="not an empty folder"):
        write_huggingface(reader, tmp_path / "src")
    with pytest.raises(ConfigError, match="3 ranks"):
        write_megatron(reader, tmp_path / "m", 3)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        write_huggingface(reader, tmp_path / "file" / "below")
    (tmp_path / "empty").mkdir()
    write_huggingface(reader, tmp_path / "empty")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers, "_write_json", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_presharded(reader, tmp_path / "p", 2, specs_of(reader.config))
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name or p.name == "p"]


def test_specs_that_leave_something_out(tmp_path):
    reader, _ = megatron_source(tmp_path)
    good = specs_of(reader.config)

    def only_first(rank, tp):
        return good(0, tp)

    with pytest.raises(CheckpointError, match="do not make up the whole"):
        write_presharded(reader, tmp_path / "p", 2, only_first)
    with pytest.raises(CheckpointError, match="name different tensors: lm_head"):
        write_presharded(
            reader, tmp_path / "p", 1,
            lambda r, t: {n: s for n, s in good(r, t).items() if n != "lm_head.weight"},
        )  # fmt: skip


# Presharded


@pytest.fixture
def presharded(tmp_path):
    reader, model = megatron_source(tmp_path)
    write_presharded(reader, tmp_path / "p", 2, specs_of(reader.config))
    return tmp_path / "p", model


def edit_manifest(change):
    def damage(path):
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))

    return damage


R1 = "rank_01_of_02.safetensors"
PIECE = "model.layers.0.mlp.dense_h_to_4h.bias"
PRESHARDED_DAMAGE = {
    "file missing": (lambda p: (p / R1).unlink(), R1),
    "files swapped": (
        lambda p: shutil.copy(p / "rank_00_of_02.safetensors", p / R1), None),
    "version": (edit_manifest(lambda m: m.update(version=2)), "version 2"),
    "tp_size": (edit_manifest(lambda m: m.update(tp_size=4)), "tp_size is 4"),
    "order": (edit_manifest(lambda m: m["files"].reverse()), "instead of"),
    "no config": (edit_manifest(lambda m: m.pop("config")), "no config"),
    "config list": (edit_manifest(lambda m: m.update(config=[1])), "no config"),
    "config kind": (edit_manifest(lambda m: m["config"].pop("model_type")), "model_type"),
    "config field": (edit_manifest(lambda m: m["config"].update(odd=1)), "unknown: 'odd'"),
    "config lacks": (
        edit_manifest(lambda m: m["config"].pop("vocab_size")), "missing: vocab_size"),
    "norm mode": (edit_manifest(lambda m: m["config"].update(qk_layernorm="x")), "qk_layernorm"),
    "piece outside": (edit_manifest(lambda m: m["files"][1]["tensors"][PIECE]["pieces"][0].update(
        canonical=[[40, 72]])), "outside"),
    "piece missing": (edit_manifest(lambda m: m["files"][1]["tensors"][PIECE].update(pieces=[])),
        "do not make up"),
    "piece doubled": (edit_manifest(lambda m: m["files"][1]["tensors"][PIECE]["pieces"][0].update(
        canonical=[[16, 48]])), "do not make up"),
    "piece of text": (edit_manifest(lambda m: m["files"][1]["tensors"][PIECE]["pieces"][0].update(
        canonical="ab")), "malformed"),
    "tensor missing": (edit_manifest(lambda m: m["files"][1]["tensors"].pop(PIECE)), PIECE),
    "dtype": (edit_manifest(lambda m: m["files"][1]["tensors"][PIECE].update(dtype="float32")),
        "bfloat16"),
    "no files": (edit_manifest(lambda m: m.update(files=[1, 2])), "malformed"),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESHARDED_DAMAGE)
def test_damaged_presharded_folders(presharded, name):
    path, _ = presharded
    damage, message = PRESHARDED_DAMAGE[name]
    damage(path)
    if message is None:
        open_checkpoint(path)  # same sizes: only digests can tell
    with pytest.raises(CheckpointError, match=message or "is damaged: sha256") as caught:
        open_checkpoint(path, verify="full")
    assert str(path) in caught.value.where


def test_bit_flips_in_presharded_name_tensor_and_file(presharded):
    path, _ = presharded
    raw = (path / R1).read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    for at in range(start, len(raw), max(1, (len(raw) - start) // 60)):
        damaged = bytearray(raw)
        damaged[at] ^= 16
        (path / R1).write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match=r"'[\w.]+' is damaged") as caught:
            open_checkpoint(path, verify="full")
        assert R1 in caught.value.where
