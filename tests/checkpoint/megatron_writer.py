"""An independent writer of Megatron checkpoints, from the layout's description alone.

It shares no code with the package: whole tensors are cut here by plain indexing, so that the readers
are tested against something that could disagree with them.
"""

import argparse
import enum
import random
import sys
import types

import numpy as np
import torch

SIZES = {"vocab": 48, "hidden": 32, "ffn": 64, "layers": 3, "heads": 4, "context": 64}


def random_model(seed=0, dtype=torch.float32, qk="weights_per_layer", tied=False, tp=1, **sizes):
    """Whole tensors under Hugging Face's names; per-rank norms are made for ``tp`` ranks."""
    s = SIZES | sizes
    g = torch.Generator().manual_seed(seed)
    h, f, d = s["hidden"], s["ffn"], s["hidden"] // s["heads"]

    def new(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    out = {"model.embed_tokens.weight": new(s["vocab"], h)}
    for i in range(s["layers"]):
        p = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[p + norm + ".weight"], out[p + norm + ".bias"] = new(h), new(h)
        out[p + "self_attn.query_key_value.weight"] = new(3 * h, h)
        out[p + "self_attn.query_key_value.bias"] = new(3 * h)
        out[p + "self_attn.dense.weight"], out[p + "self_attn.dense.bias"] = new(h, h), new(h)
        out[p + "mlp.dense_h_to_4h.weight"], out[p + "mlp.dense_h_to_4h.bias"] = new(f, h), new(f)
        out[p + "mlp.dense_4h_to_h.weight"], out[p + "mlp.dense_4h_to_h.bias"] = new(h, f), new(h)
        for norm in ("q_layernorm", "k_layernorm"):
            for part in ("weight", "bias"):
                name = f"{p}self_attn.{norm}.{part}"
                if qk == "weights_per_layer":
                    out[name] = new(d)
                elif qk == "weights_per_attention_head_and_layer":
                    out[name] = new(s["heads"], d)
                elif qk == "weights_per_tensor_parallel_rank_and_layer":
                    out[name] = new(tp, d).repeat_interleave(s["heads"] // tp, 0)
    out["model.final_layernorm.weight"], out["model.final_layernorm.bias"] = new(h), new(h)
    if not tied:
        out["lm_head.weight"] = new(s["vocab"], h)
    return out


def rows(t, rank, tp):
    n = t.shape[0] // tp
    return t[rank * n : (rank + 1) * n].clone()


def columns(t, rank, tp):
    n = t.shape[1] // tp
    return t[:, rank * n : (rank + 1) * n].clone()


def layer_tensors(model, layer, rank, tp, qk, attention="self_attention"):
    p = f"model.layers.{layer}."
    out = {}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        out[f"{norm}.weight"] = model[p + norm + ".weight"].clone()
        out[f"{norm}.bias"] = model[p + norm + ".bias"].clone()
    a = attention
    out[f"{a}.query_key_value.weight"] = rows(
        model[p + "self_attn.query_key_value.weight"], rank, tp
    )
    out[f"{a}.query_key_value.bias"] = rows(model[p + "self_attn.query_key_value.bias"], rank, tp)
    out[f"{a}.dense.weight"] = columns(model[p + "self_attn.dense.weight"], rank, tp)
    out[f"{a}.dense.bias"] = model[p + "self_attn.dense.bias"].clone()
    out[f"{a}.rotary_emb.inv_freq"] = torch.ones(4)
    out["mlp.dense_h_to_4h.weight"] = rows(model[p + "mlp.dense_h_to_4h.weight"], rank, tp)
    out["mlp.dense_h_to_4h.bias"] = rows(model[p + "mlp.dense_h_to_4h.bias"], rank, tp)
    out["mlp.dense_4h_to_h.weight"] = columns(model[p + "mlp.dense_4h_to_h.weight"], rank, tp)
    out["mlp.dense_4h_to_h.bias"] = model[p + "mlp.dense_4h_to_h.bias"].clone()
    if qk == "none":
        return out
    for norm in ("q_layernorm", "k_layernorm"):
        for part in ("weight", "bias"):
            t = model[f"{p}self_attn.{norm}.{part}"]
            if qk == "weights_per_layer":
                out[f"{a}.{norm}.{part}"] = t.clone()
            elif qk == "weights_per_tensor_parallel_rank_and_layer":
                out[f"{a}.{norm}.{part}"] = rows(t, rank, tp)[0].clone()
            else:
                for i, row in enumerate(rows(t, rank, tp)):
                    out[f"{a}.{norm}.layernorms.{i}.{part}"] = row.clone()
    return out


def megatron_enums():
    """The enums of a real file, under their real module names, only while it is written."""
    made = {}
    for module, name in (
        ("megatron.model.enums", "ModelType"),
        ("tool_use.megatron.megatron_utils", "ModelBackend"),
    ):
        cls = enum.Enum(name, {"encoder_or_decoder": 1}, module=module)
        parts = module.split(".")
        for n in range(1, len(parts) + 1):
            package = ".".join(parts[:n])
            if package not in sys.modules:
                sys.modules[package] = types.ModuleType(package)
        setattr(sys.modules[module], name, cls)
        made[module] = cls(1)
    return made


def write_release(
    root, model, tp=1, pp=1, qk="weights_per_layer", iteration=1251, file="model_optim_rng.pt",
    spelling="today", tied=False, tracker=None, optimizer=False, virtual=1, **args,
):  # fmt: skip
    """Writes ROOT/iter_*/mp_rank_*; ``spelling`` is today, nested or legacy."""
    vocab, hidden = model["model.embed_tokens.weight"].shape
    layers = 1 + max(int(n.split(".")[2]) for n in model if n.startswith("model.layers."))
    heads = args.pop("heads", SIZES["heads"])
    folder = root / f"iter_{iteration:07d}"
    per_chunk = layers // (pp * virtual)
    enums = megatron_enums()
    for stage in range(pp):
        for rank in range(tp):
            chunks = []
            for v in range(virtual):
                first, last = stage == v == 0, stage == pp - 1 and v == virtual - 1
                start = (v * pp + stage) * per_chunk
                chunks.append(
                    rank_model(model, rank, tp, qk, spelling, start, per_chunk, first, last, tied)
                )
            namespace = argparse.Namespace(**({
                "num_layers": layers, "encoder_num_layers": layers, "hidden_size": hidden,
                "ffn_hidden_size": model["model.layers.0.mlp.dense_h_to_4h.bias"].shape[0],
                "num_attention_heads": heads, "kv_channels": hidden // heads, "seq_length": 64,
                "max_position_embeddings": 64, "pos_emb": "rotary", "rotary_pct": 0.5,
                "rotary_emb_base": 25000, "untie_embeddings": not tied, "sq_relu": True, "bf16": True,
                "fp16": False, "layernorm_epsilon": 1e-5, "qk_layernorm": qk, "padded_vocab_size": vocab,
                "make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp, "params_dtype": torch.bfloat16,
                "data_path": ["a", "b"],
                "model_type": enums["megatron.model.enums"], "vocab_file": None,
                "backend": enums["tool_use.megatron.megatron_utils"], "rank": stage * tp + rank,
            } | args))  # fmt: skip
            contents = {
                "args": namespace,
                "checkpoint_version": 3.0,
                "iteration": iteration,
                "rng_state": [{
                    "random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
                    "torch_rng_state": torch.get_rng_state(), "cuda_rng_state": torch.get_rng_state(),
                    "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
                }],
            }  # fmt: skip
            if virtual == 1:
                contents["model"] = chunks[0]
            else:
                contents |= {f"model{i}": chunk for i, chunk in enumerate(chunks)}
            if optimizer:
                p = torch.nn.Parameter(torch.ones(3))
                adam = torch.optim.Adam([p])
                p.grad = torch.ones(3)
                adam.step()
                contents["optimizer"] = {"state": adam.state_dict(), "shard": {0: {1: 2.0}}}
                contents["opt_param_scheduler"] = {"num_steps": 7}
            place = folder / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
            place.mkdir(parents=True, exist_ok=True)
            torch.save(contents, place / file)
    for module in [m for m in sys.modules if m.split(".")[0] in ("megatron", "tool_use")]:
        del sys.modules[module]
    (root / "latest_checkpointed_iteration.txt").write_text(tracker or str(iteration))
    return folder


def rank_model(model, rank, tp, qk, spelling, start, count, first, last, tied):
    attention = "attention" if spelling == "legacy" else "self_attention"
    encoder = {}
    for i in range(count):
        for name, t in layer_tensors(model, start + i, rank, tp, qk, attention).items():
            encoder[f"layers.{i}.{name}"] = t
    if last:
        for part in ("weight", "bias"):
            encoder[f"final_layernorm.{part}"] = model[f"model.final_layernorm.{part}"].clone()
    embedding = {"weight": rows(model["model.embed_tokens.weight"], rank, tp)}
    if spelling == "nested":
        nested = {}
        for name, t in encoder.items():
            *path, leaf = name.split(".")
            at = nested
            for key in path:
                at = at.setdefault(key, {})
            at[leaf] = t
        encoder = nested
    language = {"transformer" if spelling == "legacy" else "encoder": encoder}
    if first and spelling == "legacy":
        language["word_embeddings.weight"] = embedding["weight"]
    elif first:
        language["embedding"] = {"word_embeddings": embedding}
    out = {"language_model": language}
    if last and not tied:
        out["word_embeddings_for_head"] = {"weight": rows(model["lm_head.weight"], rank, tp)}
    elif last and not first:
        out["word_embeddings_for_head"] = {"weight": embedding["weight"].clone()}
    return out
