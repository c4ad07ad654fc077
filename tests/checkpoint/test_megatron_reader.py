"""The Megatron reader against an independent writer: every mode, cut and spelling, and every mix-up."""

import shutil

import pytest
import torch
from megatron_writer import random_model, write_release

from tprt.checkpoint import open_checkpoint
from tprt.errors import CheckpointError

MODES = [
    "none", "weights_per_layer", "weights_per_tensor_parallel_rank_and_layer",
    "weights_per_attention_head_and_layer",
]  # fmt: skip


def assert_same(reader, model):
    assert sorted(reader.names()) == sorted(model)
    for name, expected in model.items():
        got = reader.read_whole(name)
        assert got.dtype == expected.dtype and torch.equal(got, expected), name


def part(n, k, of):
    return slice(k * n // of, (k + 1) * n // of)


@pytest.mark.parametrize("qk", MODES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_any_disk_tp_and_norm_mode_gives_the_source_tensors(tmp_path, tp, qk):
    """Guards the cut table, the head order of per-rank and per-head norms, and odd slices."""
    model = random_model(dtype=torch.bfloat16, qk=qk, tp=tp)
    write_release(tmp_path, model, tp=tp, qk=qk)
    reader = open_checkpoint(tmp_path, verify="full")
    assert (reader.layout, reader.disk_tp, reader.dtype) == ("megatron", tp, torch.bfloat16)
    assert_same(reader, model)
    for name, expected in model.items():
        for of in (2, 3, 4):
            for k in range(of):
                slices = tuple(part(n, k, of) for n in expected.shape)
                assert torch.equal(reader.read(name, slices), expected[slices]), (name, slices)


@pytest.mark.parametrize("spelling", ["nested", "legacy"])
def test_other_spellings(tmp_path, spelling):
    """Guards old names (transformer, attention, bare word_embeddings) and really nested encoders."""
    model = random_model()
    write_release(tmp_path, model, tp=2, spelling=spelling)
    assert_same(open_checkpoint(tmp_path), model)


@pytest.mark.parametrize("pp,virtual,tied", [(3, 1, False), (3, 1, True), (1, 3, False), (2, 2, 0)])
def test_pipeline_stages(tmp_path, pp, virtual, tied):
    """Guards the layer offset: each stage, and each virtual stage, counts its layers from 0."""
    layers = 4 if pp == 2 else 3
    model = random_model(tied=bool(tied), layers=layers)
    write_release(tmp_path, model, tp=2, pp=pp, virtual=virtual, tied=bool(tied))
    assert_same(open_checkpoint(tmp_path), model)


def test_other_file_name_optimizer_and_iteration_folder(tmp_path):
    """Guards model_rng.pt, ignored training state, and opening the iter_* folder itself."""
    model = random_model()
    folder = write_release(tmp_path, model, file="model_rng.pt", optimizer=True)
    (tmp_path / "adept_vocab.model").write_bytes(b"x")
    reader = open_checkpoint(folder)
    assert_same(reader, model)
    assert reader.tokenizer_path == tmp_path / "adept_vocab.model"
    assert reader.config.rotary_precision is None


def test_release_tracker(tmp_path):
    model = random_model()
    folder = write_release(tmp_path, model, tracker="release")
    with pytest.raises(CheckpointError, match="no folder release"):
        open_checkpoint(tmp_path)
    folder.rename(tmp_path / "release")
    assert_same(open_checkpoint(tmp_path), model)


def test_strided_and_float16_tensors(tmp_path):
    """Guards tensors saved as views: stride and offset come from the file."""
    model = random_model(dtype=torch.float16)
    name = "model.layers.1.self_attn.dense.weight"
    model[name] = model[name].t().contiguous().t()
    write_release(tmp_path, model)
    assert_same(open_checkpoint(tmp_path), model)


def test_describe_names_cuts(tmp_path):
    write_release(tmp_path, random_model(), tp=2)
    told = {t.name: t for t in open_checkpoint(tmp_path).describe()}
    assert told["model.layers.0.self_attn.dense.weight"].cut_dim == 1
    assert told["lm_head.weight"].cut_dim == 0 and told["lm_head.weight"].files == 2
    assert told["model.layers.0.self_attn.dense.bias"].cut_dim is None


def test_bytes_read_are_those_of_the_slice(tmp_path):
    """Guards the promise that a rank reads its own part only."""
    model = random_model()
    write_release(tmp_path, model, tp=2)
    reader = open_checkpoint(tmp_path)
    # Opening compares what both ranks repeat: 6 vectors and 4 of a head's width per layer, and 2.
    opened = reader.bytes_read
    assert opened == 2 * 4 * (3 * (6 * 32 + 4 * 8) + 2 * 32)
    reader.read("lm_head.weight", (slice(0, 12), slice(None)))
    assert reader.bytes_read - opened == 12 * 32 * 4


def edit(folder, rank, change):
    path = folder / rank / "model_optim_rng.pt"
    contents = torch.load(path, weights_only=False)
    change(contents)
    torch.save(contents, path)


def two(tmp_path, **kw):
    """Two ranks without the enums, so that the test can load and change the files."""
    return write_release(tmp_path, random_model(), tp=2, model_type=None, backend=None, **kw)


def swap(folder):
    (folder / "mp_rank_00").rename(folder / "x")
    (folder / "mp_rank_01").rename(folder / "mp_rank_00")
    (folder / "x").rename(folder / "mp_rank_01")


def encoder(c):
    return c["model"]["language_model"]["encoder"]


def set_args(**kw):
    return lambda c: c["args"].__dict__.update(kw)


BIAS = "layers.0.mlp.dense_4h_to_h.bias"
QKV = "layers.0.self_attention.query_key_value.weight"
MIX_UPS = {
    "rank missing": (lambda f: shutil.rmtree(f / "mp_rank_01"), "missing rank folders: mp_rank_01"),
    "rank 0 missing": (lambda f: shutil.rmtree(f / "mp_rank_00"), "missing.*mp_rank_00"),
    "rank extra": (
        lambda f: shutil.copytree(f / "mp_rank_01", f / "mp_rank_02"), "size is 2, but.*3"),
    "gap": (lambda f: (f / "mp_rank_01").rename(f / "mp_rank_03"), "mp_rank_01, mp_rank_02"),
    "odd folder": (lambda f: (f / "mp_rank_xx").mkdir(), "mp_rank_xx.*not a rank folder"),
    "two saves": (
        lambda f: shutil.copytree(f / "mp_rank_01", f / "mp_rank_01_000"), "two saves"),
    "swapped": (swap, "swapped"),
    "file missing": (
        lambda f: (f / "mp_rank_01" / "model_optim_rng.pt").unlink(), "neither model_optim_rng.pt"),
    "iteration": (
        lambda f: edit(f, "mp_rank_01", lambda c: c.update(iteration=7)), "iteration .1251 and 7."),
    "folder renamed": (lambda f: None, "named for iteration 9, the files are of 1251"),
    "tp in args": (
        lambda f: [edit(f, r, set_args(tensor_model_parallel_size=1))
                   for r in ("mp_rank_00", "mp_rank_01")], "size is 1, but"),
    "tp in args above": (
        lambda f: [edit(f, r, set_args(tensor_model_parallel_size=4))
                   for r in ("mp_rank_00", "mp_rank_01")], "mp_rank_02, mp_rank_03"),
    "pp in args": (
        lambda f: edit(f, "mp_rank_00", set_args(pipeline_model_parallel_size=2)), "missing"),
    "model field": (
        lambda f: edit(f, "mp_rank_01", set_args(rotary_emb_base=1e4)), "rope_theta"),
    "norm mode": (lambda f: edit(
        f, "mp_rank_01", set_args(qk_layernorm="weights_per_attention_head_and_layer")),
        "qk_layernorm"),
    "heads do not divide": (
        lambda f: [edit(f, r, set_args(num_attention_heads=1, kv_channels=32))
                   for r in ("mp_rank_00", "mp_rank_01")], "cannot be cut"),
    "tensor missing": (
        lambda f: edit(f, "mp_rank_01", lambda c: encoder(c).pop(BIAS)), "1 missing: .*" + BIAS),
    "tensor extra": (
        lambda f: edit(f, "mp_rank_01", lambda c: encoder(c).update(odd=torch.ones(2))),
        "1 not expected: .*odd"),
    "shape": (lambda f: edit(
        f, "mp_rank_01", lambda c: encoder(c).update({QKV: torch.ones(47, 32)})),
        r"wrong shape: .*\[47, 32\] instead of \[48, 32\]"),
    "integer dtype": (lambda f: [edit(
        f, r, lambda c: encoder(c).update({QKV: torch.ones(48, 32, dtype=torch.int32)}))
        for r in ("mp_rank_00", "mp_rank_01")], "dtype that weights cannot have"),
    "dtype of one rank": (lambda f: edit(
        f, "mp_rank_01", lambda c: encoder(c).update({QKV: torch.ones(48, 32).bfloat16()})),
        "several dtypes: bfloat16, float32"),
    "replica differs": (
        lambda f: edit(f, "mp_rank_01", lambda c: encoder(c)[BIAS].add_(1)),
        f"{BIAS}' should be the same.*mp_rank_00 and mp_rank_01 differ"),
    "no args": (lambda f: edit(f, "mp_rank_01", lambda c: c.pop("args")), "no 'args'"),
    "no model": (lambda f: edit(f, "mp_rank_01", lambda c: c.pop("model")), "no 'model'"),
    "args of a wrong type": (
        lambda f: edit(f, "mp_rank_00", set_args(hidden_size="wide")), "not 'wide'"),
    "heads of a wrong type": (
        lambda f: edit(f, "mp_rank_00", set_args(num_attention_heads="4", kv_channels=None)),
        "not '4'"),
    "a million layers": (
        lambda f: edit(f, "mp_rank_00", set_args(num_layers=10**12)), "limit is"),
    "args lack a size": (
        lambda f: edit(f, "mp_rank_00", set_args(padded_vocab_size=[48])), "padded_vocab_size"),
    "layer of a stranger": (
        lambda f: [edit(f, r, set_args(num_layers=2)) for r in ("mp_rank_00", "mp_rank_01")],
        "not expected: .*layers.2"),
}  # fmt: skip


HEAD_NORM = "layers.1.self_attention.k_layernorm.layernorms.{}.weight"


@pytest.mark.parametrize("head", [0, 1])
def test_heads_of_one_rank_have_one_dtype(tmp_path, head):
    """Guards per-head norms: a head of another dtype would be read as bits of the first."""
    qk = MODES[-1]
    folder = write_release(
        tmp_path, random_model(qk=qk), tp=2, qk=qk, model_type=None, backend=None
    )
    for rank in ("mp_rank_00", "mp_rank_01"):  # alike in both ranks
        edit(
            folder,
            rank,
            lambda c: encoder(c).update({HEAD_NORM.format(head): torch.ones(8).half()}),
        )
    with pytest.raises(CheckpointError, match=r"k_layernorm.*several dtypes: float16, float32"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("untie", [None, False])
def test_untie_embeddings(tmp_path, untie):
    """Guards the meaning of None, which is the default: a head of its own."""
    model = random_model()
    write_release(tmp_path, model, tp=2, untie_embeddings=untie)
    if untie is None:
        assert_same(open_checkpoint(tmp_path), model)
        return
    with pytest.raises(CheckpointError, match=r"ties lm_head.weight") as caught:
        open_checkpoint(tmp_path)
    assert "mp_rank_00" in caught.value.where and caught.value.hint


@pytest.mark.parametrize("pp", [1, 3])
@pytest.mark.parametrize("change", ["same", "one bit", "shape", "dtype"])
def test_head_beside_a_tied_embedding(tmp_path, pp, change):
    """Guards the head that is left out: it must be the embedding, on whatever stage that lies."""
    model = random_model(tied=True)
    folder = write_release(tmp_path, model, tp=2, pp=pp, tied=True, model_type=None, backend=None)
    head = model["model.embed_tokens.weight"][24:].clone()
    if change == "one bit":
        head.view(torch.int32)[23, 31] ^= 1
    elif change != "same":
        head = head[:23] if change == "shape" else head.double()
    last = "mp_rank_01" + ("_002" if pp > 1 else "")
    edit(folder, last, lambda c: c["model"].update(word_embeddings_for_head={"weight": head}))
    if change == "same":
        assert_same(open_checkpoint(tmp_path), model)
        return
    with pytest.raises(CheckpointError, match="differs from it") as caught:
        open_checkpoint(tmp_path)
    assert last in caught.value.where


@pytest.mark.parametrize("name", MIX_UPS)
def test_mix_ups_are_refused_at_open(tmp_path, name):
    """Guards against merging files that do not belong together: decided before weights are read."""
    folder = two(tmp_path)
    damage, message = MIX_UPS[name]
    damage(folder)
    if name == "folder renamed":
        folder.rename(tmp_path / "iter_0000009")
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("9")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.where and str(tmp_path) in caught.value.where and caught.value.hint


@pytest.mark.parametrize("text", ["", "0", "-3", "1e3", "99999999999999999", "../x", "7"])
def test_bad_tracker(tmp_path, text):
    two(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(CheckpointError, match="latest_checkpointed_iteration"):
        open_checkpoint(tmp_path)


def test_missing_tracker_and_wrong_level(tmp_path):
    folder = two(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CheckpointError, match="iter_0001251"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="folder above"):
        open_checkpoint(folder / "mp_rank_00")
    with pytest.raises(CheckpointError, match="a file, not a folder"):
        open_checkpoint(folder / "mp_rank_00" / "model_optim_rng.pt")


def test_per_rank_norms_may_differ(tmp_path):
    """The per-rank mode differs by design: it must not be taken for drifted replicas."""
    qk = "weights_per_tensor_parallel_rank_and_layer"
    model = random_model(qk=qk, tp=2)
    write_release(tmp_path, model, tp=2, qk=qk)
    w = open_checkpoint(tmp_path).read_whole("model.layers.0.self_attn.q_layernorm.weight")
    assert w.shape == (4, 8) and torch.equal(w[0], w[1]) and not torch.equal(w[1], w[2])


def test_no_such_path_and_hub(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "absent")
    import huggingface_hub

    def refuse(*_, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no route to the hub"):
        open_checkpoint("some/model")
    (tmp_path / "folder" / "model").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="'folder' is here and holds model"):
        open_checkpoint("folder/modle")
    model = random_model()
    write_release(tmp_path, model)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert_same(open_checkpoint("some/model"), model)


def test_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint here; found nothing"):
        open_checkpoint(tmp_path)
