"""A stand-in for a model: parameters with ShardSpecs, cut as a tensor-parallel model would be."""

import torch
from torch import nn

from tprt.distributed.sharding import broadcast_rows, cut, padded_cut, padded_part, replicated

CUTS = {
    "query_key_value.weight": 0, "query_key_value.bias": 0, "self_attn.dense.weight": 1,
    "dense_h_to_4h.weight": 0, "dense_h_to_4h.bias": 0, "dense_4h_to_h.weight": 1,
}  # fmt: skip


def specs_of(config):
    """(rank, tp) to specs: vocabulary padded, norms shared by a layer broadcast over heads, MLP's
    second matrix stored transposed."""

    def specs(rank, tp):
        out = {}
        for name, shape in config.tensor_shapes().items():
            dim = next((d for end, d in CUTS.items() if name.endswith(end)), None)
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                out[name] = padded_cut(shape, 0, rank, padded_part(shape[0], tp))
            elif "q_layernorm" in name or "k_layernorm" in name:
                rows = config.num_attention_heads // tp
                per_layer = len(shape) == 1
                out[name] = broadcast_rows(rows, shape) if per_layer else cut(shape, 0, rank, tp)
            elif dim is None:
                out[name] = replicated(shape)
            else:
                out[name] = cut(shape, dim, rank, tp)
                if name.endswith("dense_4h_to_h.weight"):
                    spec = out[name]
                    out[name] = type(spec)(
                        spec.canonical_shape, spec.local_shape, spec.pieces, True
                    )
        return out

    return specs


class Toy(nn.Module):
    """Parameters of one rank, filled with garbage, under dotted names."""

    def __init__(self, specs, dtype=torch.float32):
        super().__init__()
        for name, spec in specs.items():
            at = self
            *path, leaf = name.split(".")
            for key in path:
                if not hasattr(at, key):
                    at.add_module(key, nn.Module())
                at = getattr(at, key)
            p = nn.Parameter(torch.full(spec.parameter_shape, 777.0, dtype=dtype))
            p.shard_spec = spec
            at.register_parameter(leaf, p)
