"""RecurrentGemma one token after the other, uncut and without a cache: what every other path must give.

Plain float32 tensor operations on a dict of weights under Hugging Face's names. Slow on purpose: the
recurrence is a loop over positions, attention looks at all earlier keys through a mask. Nothing here is
shared with the program but the names of the config.

Legend: T tokens, D hidden_size, W width of the recurrence, H heads, d head_dim.
"""

import math

import torch
from torch.nn.functional import gelu, linear, softplus

Weights = dict[str, torch.Tensor]


def oracle_logits(weights: Weights, config, token_ids: list[int]) -> torch.Tensor:
    """float32 [T, vocab_size] of one sequence from its first token on."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    table = w["model.embed_tokens.weight"]
    # Rounded before it is used, whatever the dtype of the model: 50.5 for a hidden_size of 2560.
    scale = torch.tensor(math.sqrt(config.hidden_size)).to(torch.bfloat16).float()
    x = table[torch.tensor(token_ids)] * scale
    for i, kind in enumerate(config.layer_types):
        names = f"model.layers.{i}."
        own = {name.removeprefix(names): t for name, t in w.items() if name.startswith(names)}
        u = rms_norm(x, own["temporal_pre_norm.weight"], config)
        mixed = (
            recurrent_block(u, own, config) if kind == "recurrent" else attention(u, own, config)
        )
        x = x + mixed
        x = x + mlp(rms_norm(x, own["channel_pre_norm.weight"], config), own)
    x = rms_norm(x, w["model.final_norm.weight"], config)
    logits = linear(x, w.get("lm_head.weight", table))
    return config.logits_soft_cap * torch.tanh(logits / config.logits_soft_cap)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, config) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * (1 + weight)


def recurrent_block(u: torch.Tensor, w: Weights, config) -> torch.Tensor:
    """[T, D] -> [T, D]."""
    name = "temporal_block."
    y = gelu(linear(u, w[f"{name}linear_y.weight"], w[f"{name}linear_y.bias"]), approximate="tanh")
    z = linear(u, w[f"{name}linear_x.weight"], w[f"{name}linear_x.bias"])  # [T, W]
    taps, bias = w[f"{name}conv_1d.weight"][:, 0], w[f"{name}conv_1d.bias"]  # [W, K], [W]
    kernel, heads = taps.shape[1], config.num_attention_heads
    a_param = w[f"{name}rg_lru.recurrent_param"]
    h, out = torch.zeros_like(bias), []
    for t in range(len(z)):
        c = bias.clone()
        for k in range(kernel):  # the last tap is the token's own
            if t - (kernel - 1) + k >= 0:
                c = c + taps[:, k] * z[t - (kernel - 1) + k]
        # One block per head, stored [in, out].
        gates = [
            torch.sigmoid(
                torch.einsum("hi,hio->ho", c.view(heads, -1), w[f"{name}rg_lru.{gate}_weight"])
                + w[f"{name}rg_lru.{gate}_bias"]
            ).flatten()
            for gate in ("input_gate", "recurrent_gate")
        ]
        log_a = -8 * gates[1] * softplus(a_param)
        if t == 0:
            h = c * gates[0]
        else:
            h = torch.exp(log_a) * h + torch.sqrt(-torch.expm1(2 * log_a)) * (c * gates[0])
        out.append(h)
    mixed = torch.stack(out) * y
    return linear(mixed, w[f"{name}linear_out.weight"], w[f"{name}linear_out.bias"])


def attention(u: torch.Tensor, w: Weights, config) -> torch.Tensor:
    """[T, D] -> [T, D]; a query sees itself and ``window_keys - 1`` keys before it."""
    name, d = "temporal_block.", config.head_dim
    q, k, v = (
        linear(u, w[f"{name}{x}_proj.weight"], w.get(f"{name}{x}_proj.bias")).view(len(u), -1, d)
        for x in "qkv"
    )  # [T, H, d], [T, kv heads, d]
    q, k = rotate(q, config), rotate(k, config)
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(d)
    distance = torch.arange(len(u)).unsqueeze(1) - torch.arange(len(u))
    hidden = (distance < 0) | (distance >= config.window_keys)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    mixed = torch.einsum("hij,jhd->ihd", weights, v).flatten(1)
    return linear(mixed, w[f"{name}o_proj.weight"], w[f"{name}o_proj.bias"])


def rotate(x: torch.Tensor, config) -> torch.Tensor:
    """[T, H, d] with its first ``rotary_dim`` of d turned; pairs (i, i + rotary_dim / 2)."""
    width = config.rotary_dim
    inverse = config.rope_theta ** (-torch.arange(0, width, 2).double() / width)
    angles = torch.outer(torch.arange(len(x)).double(), inverse).unsqueeze(1).float()
    first, second, rest = x.split([width // 2, width // 2, x.shape[-1] - width], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def mlp(v: torch.Tensor, w: Weights) -> torch.Tensor:
    name = "mlp_block."
    gate = gelu(
        linear(v, w[f"{name}gate_proj.weight"], w[f"{name}gate_proj.bias"]), approximate="tanh"
    )
    up = linear(v, w[f"{name}up_proj.weight"], w[f"{name}up_proj.bias"])
    return linear(gate * up, w[f"{name}down_proj.weight"], w[f"{name}down_proj.bias"])
