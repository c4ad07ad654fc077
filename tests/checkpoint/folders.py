"""Small checkpoint folders of each layout, and the comparison bit by bit."""

import json

import torch
from megatron_writer import random_model, write_release
from safetensors.torch import save_file

from tprt.checkpoint import open_checkpoint
from tprt.config import PersimmonConfig

CONFIG = PersimmonConfig(
    vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
    num_attention_heads=4, head_dim=8, max_position_embeddings=64, eos_token_id=5,
)  # fmt: skip


def hf_folder(path, model, config=CONFIG, form="safetensors", **extra):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config.to_hf() | extra))
    (path / "tokenizer.model").write_bytes(b"pieces")
    if form == "safetensors":
        save_file(model, path / "model.safetensors")
    elif form == "bin":
        torch.save(model, path / "pytorch_model.bin")
    else:
        names, kind = sorted(model), form.removesuffix(" shards")
        stem, save = (
            ("model", save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
        )
        halves = {f"{stem}-{i}.{kind}": names[i::2] for i in (0, 1)}
        for file, part in halves.items():
            save({n: model[n] for n in part}, path / file)
        weight_map = {n: f for f, part in halves.items() for n in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (path / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return path


def assert_same(reader, model):
    assert sorted(reader.names()) == sorted(model)
    for name, expected in model.items():
        got = reader.read_whole(name)
        assert got.dtype == expected.dtype, name
        # Bits, not values: -0.0 and NaN payloads must survive too.
        assert got.contiguous().view(torch.uint8).equal(expected.contiguous().view(torch.uint8)), (
            name
        )


def megatron_source(tmp_path, tp=1, **kw):
    model = random_model(dtype=torch.bfloat16, **kw)
    write_release(tmp_path / "src", model, tp=tp, qk=kw.get("qk", "weights_per_layer"))
    (tmp_path / "src" / "adept_vocab.model").write_bytes(b"pieces")
    return open_checkpoint(tmp_path / "src"), model
