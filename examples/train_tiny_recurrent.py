"""Train the tiny RecurrentGemma of ``examples/tiny-recurrentgemma/`` from nothing, on a CPU.

    python examples/train_tiny_recurrent.py --output examples/tiny-recurrentgemma

writes ``tokenizer.model`` (a sentencepiece model with Gemma's special pieces, trained on the same text),
``config.json`` and ``model.safetensors`` in Hugging Face's layout, in bfloat16, and a ``training.json``
with what was measured.

The model here is written on its own, in plain torch, and shares no code with ``tprt``: the checkpoint
is an oracle only as long as that holds. Same seed, same number of threads and same torch build give
the same weights.
"""

import argparse
import io
import json
import math
import random
import time
from pathlib import Path

import sentencepiece as spm
import torch
import torch.nn.functional as F
from recurrent_tasks import KNOWN, PLACES, TASKS, THINGS, Turn, conversation, held_out_turns
from safetensors.torch import save_file
from train_tiny import learning_rate

VOCAB, HIDDEN, FFN, HEADS, WINDOW = 520, 160, 320, 10, 64
PATTERN = ("recurrent", "recurrent", "attention")
LAYERS = 5
HEAD_DIM = BLOCK = HIDDEN // HEADS
ROTARY_DIM, THETA, EPS, TAPS, SOFT_CAP = HEAD_DIM // 2, 10000.0, 1e-6, 4, 30.0
QK_GAIN, WIRES = 1.5, slice(0, HEAD_DIM)
PAD, EOS, BOS, UNK = range(4)
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"


# ---------------------------------------------------------------- tokenizer


def train_tokenizer(seed: int) -> bytes:
    rng = random.Random(seed)
    lines = []
    for _ in range(6000):
        turn = conversation(rng, held_out=False).turn(rng.choice(TASKS), rng.randint(1, 12))
        lines += [*turn.question.split("\n"), turn.answer, "user", "model"]
    # The trainer proposes only strings that occur inside two distinct space-separated words, and keeps
    # those that are frequent.
    words = [*THINGS, *PLACES, *(word for kind in KNOWN.values() for word in kind), *KNOWN]
    words += "is in the and your my what".split()
    lines += 20 * [f" {w}: {w}? {w}, {w}." for w in words]
    lines += 20 * [f"{w}: {w}? {w}, {w}." for w in "Put My Where What The Your user model".split()]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCAB,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        pad_id=PAD,
        eos_id=EOS,
        bos_id=BOS,
        unk_id=UNK,
        user_defined_symbols=[START_OF_TURN, END_OF_TURN, "\n"],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


# ---------------------------------------------------------------- model


class Scan(torch.autograd.Function):
    """h[t] = a[t] * h[t - 1] + u[t] from zero, all [time, rows, width] in float32."""

    @staticmethod
    def forward(ctx, a: torch.Tensor, u: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        h = torch.empty_like(u)
        at, ut, ht = a.unbind(), u.unbind(), h.unbind()
        ht[0].copy_(ut[0])
        for t in range(1, len(ut)):
            torch.addcmul(ut[t], at[t], ht[t - 1], out=ht[t])
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override,no-untyped-def]
        a, h = ctx.saved_tensors
        g = grad.contiguous().clone()
        at, gt = a.unbind(), g.unbind()
        for t in range(len(gt) - 2, -1, -1):
            gt[t].addcmul_(at[t + 1], gt[t + 1])
        grad_a = torch.zeros_like(a)
        torch.mul(g[1:], h[:-1], out=grad_a[1:])
        return grad_a, g


class RMSNorm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (1 + self.weight)


class Gates(torch.nn.Module):
    """The block-diagonal gates and the recurrence of an RG-LRU; weights are [heads, in, out]."""

    def __init__(self) -> None:
        super().__init__()
        for gate in ("input_gate", "recurrent_gate"):
            weight = torch.randn(HEADS, BLOCK, BLOCK) / math.sqrt(BLOCK)
            self.register_parameter(f"{gate}_weight", torch.nn.Parameter(weight))
            self.register_parameter(f"{gate}_bias", torch.nn.Parameter(torch.zeros(HEADS, BLOCK)))
        # A fully open gate forgets between 20% and 0.01% in a step.
        forget = torch.linspace(math.log(0.2), math.log(1e-4), BLOCK).exp().repeat(HEADS)
        self.recurrent_param = torch.nn.Parameter(forgetting(forget))

    def forward(self, c: torch.Tensor) -> torch.Tensor:
        b, s, _ = c.shape
        blocks = c.view(b, s, HEADS, BLOCK)
        opened = torch.sigmoid(
            torch.einsum("bshi,hio->bsho", blocks, self.input_gate_weight) + self.input_gate_bias
        ).flatten(2)
        forgets = torch.sigmoid(
            torch.einsum("bshi,hio->bsho", blocks, self.recurrent_gate_weight)
            + self.recurrent_gate_bias
        ).flatten(2)
        log_a = -8 * forgets * F.softplus(self.recurrent_param)
        kept = -torch.expm1(2 * log_a)
        scale = kept.clamp_min(1e-7).sqrt()
        first = torch.zeros(s, 1)
        first[0] = 1.0
        scale = scale * (1 - first) + first
        u = scale * c * opened
        h = Scan.apply(log_a.exp().transpose(0, 1).contiguous(), u.transpose(0, 1).contiguous())
        return h.transpose(0, 1)


def forgetting(share: torch.Tensor) -> torch.Tensor:
    """The ``recurrent_param`` with which a fully open gate forgets this share in a step."""
    return torch.log(torch.expm1(-torch.log1p(-share) / 8))


class RecurrentBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_x = torch.nn.Linear(HIDDEN, HIDDEN)
        self.linear_y = torch.nn.Linear(HIDDEN, HIDDEN)
        self.linear_out = torch.nn.Linear(HIDDEN, HIDDEN)
        self.conv_1d = torch.nn.Conv1d(HIDDEN, HIDDEN, TAPS, groups=HIDDEN, padding=TAPS - 1)
        self.rg_lru = Gates()

    def forward(self, u: torch.Tensor, angles: tuple[torch.Tensor, ...]) -> torch.Tensor:
        s = u.shape[1]
        y = F.gelu(self.linear_y(u), approximate="tanh")
        z = F.pad(self.linear_x(u).float(), (0, 0, TAPS - 1, 0))  # [b, s + 3, width]
        taps = self.conv_1d.weight[:, 0]
        c = sum(taps[:, k] * z[:, k : k + s] for k in range(TAPS)) + self.conv_1d.bias
        return self.linear_out(self.rg_lru(c) * y)


class AttentionBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.k_proj = torch.nn.Linear(HIDDEN, HEAD_DIM, bias=False)
        self.v_proj = torch.nn.Linear(HIDDEN, HEAD_DIM, bias=False)
        self.o_proj = torch.nn.Linear(HIDDEN, HIDDEN)

    def forward(self, u: torch.Tensor, angles: tuple[torch.Tensor, ...]) -> torch.Tensor:
        b, s, _ = u.shape
        cos, sin, mask = angles
        q = rotate(self.q_proj(u).view(b, s, HEADS, HEAD_DIM).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(u).view(b, s, 1, HEAD_DIM).transpose(1, 2), cos, sin)
        v = self.v_proj(u).view(b, s, 1, HEAD_DIM).transpose(1, 2)
        k, v = (t.expand(b, HEADS, s, HEAD_DIM).to(v.dtype) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q.to(v.dtype), k, v, attn_mask=mask)
        return self.o_proj(mixed.transpose(1, 2).reshape(b, s, HIDDEN))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b, rest = x.split([ROTARY_DIM // 2, ROTARY_DIM // 2, HEAD_DIM - ROTARY_DIM], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(HIDDEN, FFN)
        self.up_proj = torch.nn.Linear(HIDDEN, FFN)
        self.down_proj = torch.nn.Linear(FFN, HIDDEN)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.gelu(self.gate_proj(v), approximate="tanh") * self.up_proj(v))


class Block(torch.nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.temporal_pre_norm = RMSNorm()
        self.temporal_block = RecurrentBlock() if kind == "recurrent" else AttentionBlock()
        self.channel_pre_norm = RMSNorm()
        self.mlp_block = Mlp()

    def forward(self, x: torch.Tensor, angles: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x = x + self.temporal_block(self.temporal_pre_norm(x), angles)
        return x + self.mlp_block(self.channel_pre_norm(x))


class TinyRecurrentGemma(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(VOCAB, HIDDEN)
        self.layers = torch.nn.ModuleList(Block(PATTERN[i % len(PATTERN)]) for i in range(LAYERS))
        self.final_norm = RMSNorm()
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Random weights, but that attention starts out matching what stood two tokens before.

        From a plain random start, near things stay at chance for hours of CPU: the first layer has to
        move each token's predecessors to it while attention learns to compare them. So the first block
        of the first layer starts as a shift by two tokens, into ``WIRES`` of the stream that nothing
        else writes, and queries and keys start as those. What else they carry is all learnt.
        """
        self.embed_tokens.weight.normal_(std=HIDDEN**-0.5)
        self.embed_tokens.weight[:, WIRES] = 0.0
        for name, p in self.layers.named_parameters():
            if name.endswith("proj.bias") or (".linear_" in name and name.endswith("bias")):
                p.zero_()
            elif name.endswith(("linear_out.weight", "o_proj.weight", "down_proj.weight")):
                p.normal_(std=0.5 / math.sqrt(p.shape[1] * LAYERS))
                p[WIRES] = 0.0
            elif p.dim() == 2:
                p.normal_(std=1 / math.sqrt(p.shape[1]))
        first = self.layers[0].temporal_block
        first.conv_1d.weight[WIRES] = 0.0
        first.conv_1d.weight[WIRES, 0, TAPS - 1 - 2] = 1.0
        first.conv_1d.bias[WIRES] = 0.0
        first.rg_lru.recurrent_gate_bias[0] = 4.0  # the first head forgets at once
        first.rg_lru.input_gate_bias[0] = 4.0
        first.rg_lru.recurrent_param[WIRES] = forgetting(torch.tensor(0.97))
        first.linear_y.weight[WIRES] *= 0.3
        first.linear_y.bias[WIRES] = 1.0  # and is let through
        wires = torch.eye(HIDDEN)[WIRES]
        first.linear_out.weight[WIRES] = 2 * wires
        for layer in self.layers:
            if isinstance(layer.temporal_block, AttentionBlock):
                block = layer.temporal_block
                block.k_proj.weight.copy_(QK_GAIN * wires)
                # Pairs that turn fast match at one distance alone.
                fast = [0, 1, ROTARY_DIM // 2, ROTARY_DIM // 2 + 1]
                block.k_proj.weight[fast] = 0.0
                block.q_proj.weight.copy_(block.k_proj.weight.repeat(HEADS, 1))
                block.o_proj.weight.normal_(std=1 / math.sqrt(HIDDEN))
                block.o_proj.weight[WIRES] = 0.0

    def matching(self) -> list[torch.nn.Parameter]:
        """What starts out as wires; at full speed it is lost before its use is found."""
        found = list(self.layers[0].temporal_block.parameters())
        for layer in self.layers:
            if isinstance(layer.temporal_block, AttentionBlock):
                found += [layer.temporal_block.q_proj.weight, layer.temporal_block.k_proj.weight]
        return found

    def forward(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits [len(rows), VOCAB] at the flat positions ``rows`` of ids [batch, length]."""
        s = ids.shape[1]
        inverse = THETA ** (-torch.arange(0, ROTARY_DIM, 2).double() / ROTARY_DIM)
        turns = torch.outer(torch.arange(s).double(), inverse).float()
        distance = torch.arange(s)[:, None] - torch.arange(s)
        mask = (distance >= 0) & (distance <= WINDOW)
        angles = turns.cos(), turns.sin(), mask
        scale = torch.tensor(math.sqrt(HIDDEN)).to(torch.bfloat16).float()
        x = self.embed_tokens(ids) * scale
        for layer in self.layers:
            x = layer(x, angles)
        x = self.final_norm(x.flatten(0, 1)[rows])
        return SOFT_CAP * torch.tanh(F.linear(x, self.embed_tokens.weight).float() / SOFT_CAP)

    def hf_tensors(self) -> dict[str, torch.Tensor]:
        named = self.named_parameters()
        return {f"model.{name}": p.detach().to(torch.bfloat16) for name, p in named}


# ---------------------------------------------------------------- data


class Data:
    """Draws rows of one conversation each; only answers, and the end of their turn, carry loss."""

    def __init__(self, tokenizer: spm.SentencePieceProcessor, seed: int) -> None:
        self.tokenizer, self.rng = tokenizer, random.Random(seed)
        self.start, self.end = (tokenizer.piece_to_id(p) for p in (START_OF_TURN, END_OF_TURN))
        self.newline = tokenizer.encode("\n")
        self.answer_head = [self.start, *tokenizer.encode("model\n")]
        assert len(self.newline) == 1 and len(self.answer_head) == 3

    def turn(self, turn: Turn, ids: list[int], targets: list[int]) -> None:
        before = self.newline if ids else [BOS]
        question = self.tokenizer.encode(f"user\n{turn.question}")
        prompt = [*before, self.start, *question, self.end, *self.newline, *self.answer_head]
        answer = [*self.tokenizer.encode(turn.answer), self.end]
        ids += prompt + answer
        targets += [-1] * (len(prompt) - 1) + answer + [-1]

    def row(self, length: int, most_lines: int) -> tuple[list[int], list[int]]:
        """One conversation; its first turn, or a later one, may have up to ``most_lines`` lines."""
        rng, ids, targets = self.rng, [], []  # type: ignore[var-annotated]
        talk = conversation(rng, held_out=False)
        long = rng.randrange(3)
        for number in range(100):
            lines = rng.randint(1, most_lines if number == long else 6)
            before = len(ids)
            self.turn(talk.turn(rng.choice(TASKS), lines), ids, targets)
            if len(ids) > length and before:
                return ids[:before], targets[:before]
        raise AssertionError("rows are shorter than a hundred turns")

    def batch(self, length: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids [rows, <= length], flat positions that carry loss, and their targets."""
        drawn = [self.row(length, length // 8) for _ in range(rows)]
        longest = max(len(ids) for ids, _ in drawn)
        x = torch.full((rows, longest), PAD)
        y = torch.full((rows, longest), -1)
        for i, (ids, targets) in enumerate(drawn):
            x[i, : len(ids)] = torch.tensor(ids)
            y[i, : len(ids)] = torch.tensor(targets)
        flat = y.flatten()
        positions = (flat >= 0).nonzero().squeeze(1)
        return x, positions, flat[positions]


# ---------------------------------------------------------------- training and judging


@torch.no_grad()
def judge(model: TinyRecurrentGemma, data: Data, count: int) -> dict[str, float]:
    """Share of right answers: every token of it and the end of the turn are the argmax."""
    report = {}
    for name, lines in (("short", (12, 40)), ("long", (160, 330))):
        right: dict[str, list[bool]] = {}
        for turn in held_out_turns(count, seed=17, lines=lines):
            ids: list[int] = []
            targets: list[int] = []
            data.turn(turn, ids, targets)
            rows = [i for i, t in enumerate(targets) if t >= 0]
            logits = model(torch.tensor([ids]), torch.tensor(rows))
            wanted = torch.tensor([targets[i] for i in rows])
            right.setdefault(turn.task, []).append(bool((logits.argmax(-1) == wanted).all()))
        report |= {f"{name}_{task}": round(sum(r) / len(r), 3) for task, r in right.items()}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=50)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    vocab = train_tokenizer(args.seed)
    (args.output / "tokenizer.model").write_bytes(vocab)
    data = Data(spm.SentencePieceProcessor(model_proto=vocab), args.seed + 1)
    model = TinyRecurrentGemma()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters", flush=True)

    slow = {id(p) for p in model.matching()}
    matrices = [p for p in model.layers.parameters() if p.dim() == 2 and id(p) not in slow]
    chosen = slow | {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adam = {"betas": (0.9, 0.98), "weight_decay": 0.0}
    peaks = [args.lr, args.lr / 10, args.lr / 50]
    optimizers = [
        torch.optim.Muon(matrices, lr=peaks[0], weight_decay=0.01),
        torch.optim.AdamW(rest, lr=peaks[1], **adam),
        torch.optim.AdamW(model.matching(), lr=peaks[2], **adam),
    ]
    began, tokens, shown = time.perf_counter(), 0, 0.0
    for step in range(args.steps):
        # Short rows first; then a quarter of the batches are long ones.
        long = step > args.steps // 4 and step % 4 == 0
        x, rows, y = data.batch(*((1536, 5) if long else (256, 32)))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, peak)
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x, rows)
        loss = F.cross_entropy(logits.float(), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        tokens += x.numel()
        shown = loss.item() if step == 0 else 0.95 * shown + 0.05 * loss.item()
        if (step + 1) % args.log_every == 0:
            seconds = time.perf_counter() - began
            print(f"step {step + 1} loss {shown:.4f} tokens/s {tokens / seconds:.0f}", flush=True)
        if (step + 1) % (10 * args.log_every) == 0 or step + 1 == args.steps:
            print(f"step {step + 1} {json.dumps(judge(model, data, count=60))}", flush=True)
            save(args.output, model)

    rounded = TinyRecurrentGemma()  # judge what is stored: bfloat16 values, computed in float32
    state = {n: p.detach().to(torch.bfloat16).float() for n, p in model.named_parameters()}
    rounded.load_state_dict(state)
    report: dict[str, object] = {"accuracy": judge(rounded, data, count=150)}
    report |= {"parameters": parameters, "steps": args.steps, "tokens": tokens}
    report |= {"minutes": round((time.perf_counter() - began) / 60, 1), "seed": args.seed}
    (args.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def save(folder: Path, model: TinyRecurrentGemma) -> None:
    config = {
        "architectures": ["RecurrentGemmaForCausalLM"], "model_type": "recurrent_gemma",
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 2 * FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 1,
        "head_dim": HEAD_DIM, "lru_width": HIDDEN, "conv1d_width": TAPS, "block_types": PATTERN,
        "attention_window_size": WINDOW, "partial_rotary_factor": 0.5, "rope_theta": THETA,
        "rms_norm_eps": EPS, "logits_soft_cap": SOFT_CAP, "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
        "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(model.hf_tensors(), folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
