"""Train the tiny Persimmon of ``examples/tiny-persimmon/`` from nothing, on a CPU.

    python examples/train_tiny.py --output /tmp/tiny-hf

writes ``adept_vocab.model`` (a sentencepiece unigram model trained on the same text), ``config.json``
and ``model.safetensors`` in Hugging Face's layout, in bfloat16, and a ``training.json`` with what was
measured. ``tprt convert`` then cuts it into Adept's layout; the README beside the checkpoint gives
the two commands and the time they take.

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
from safetensors.torch import save_file
from tiny_tasks import (
    NOUNS,
    SHORT_TASKS,
    VALUES,
    Example,
    chat_prompt,
    held_out_examples,
    make_training_example,
)

VOCAB, HIDDEN, FFN, LAYERS, HEADS, CONTEXT = 672, 256, 768, 3, 8, 2048
HEAD_DIM = HIDDEN // HEADS
ROTARY_DIM, THETA, EPS = HEAD_DIM // 2, 25000.0, 1e-5
INIT_STD, QK_GAIN = 0.06, 1.7
MATCHING_HEADS = HEADS // 2
WEIGHTS = (4, 1, 2, 1, 1, 1)  # of SHORT_TASKS; adding and sorting are learnt last
RESERVED, SPECIALS = 64, ("|SPEAKER|", "|NEWLINE|", "|ENDOFTEXT|")


# ---------------------------------------------------------------- tokenizer


def train_tokenizer(seed: int) -> bytes:
    rng = random.Random(seed)
    lines: list[str] = []
    for _ in range(6000):
        example = make_training_example(rng.choice(SHORT_TASKS), rng)
        text = chat_prompt(example.question) + " " + example.answer
        lines += [line for line in text.split("\n") if line]
    # The trainer proposes only strings that occur inside two distinct space-separated words.
    template = "human adept What is Reverse Sort Repeat times Count".split()
    lines += [f"{w}: {w}? {w}, {w}." for w in NOUNS + VALUES + template]
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
        split_digits=True,
        control_symbols=[f"<unused_{i}>" for i in range(RESERVED)],
        user_defined_symbols=list(SPECIALS),
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


# ---------------------------------------------------------------- model


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = torch.nn.LayerNorm(HIDDEN, eps=EPS)
        self.query_key_value = torch.nn.Linear(HIDDEN, 3 * HIDDEN)
        self.q_layernorm = torch.nn.LayerNorm(HEAD_DIM, eps=EPS)
        self.k_layernorm = torch.nn.LayerNorm(HEAD_DIM, eps=EPS)
        self.dense = torch.nn.Linear(HIDDEN, HIDDEN)
        self.post_attention_layernorm = torch.nn.LayerNorm(HIDDEN, eps=EPS)
        self.dense_h_to_4h = torch.nn.Linear(HIDDEN, FFN)
        self.dense_4h_to_h = torch.nn.Linear(FFN, HIDDEN)
        self.zeros = self.seen = 0

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        qkv = self.query_key_value(self.input_layernorm(x)).view(b, s, HEADS, 3, HEAD_DIM)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(3))  # [b, heads, s, head_dim]
        q, k = rotate(self.q_layernorm(q), cos, sin), rotate(self.k_layernorm(k), cos, sin)
        ctx = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        x = x + self.dense(ctx.transpose(1, 2).reshape(b, s, HIDDEN))
        hidden = F.relu(self.dense_h_to_4h(self.post_attention_layernorm(x))).square()
        if not self.training:
            self.zeros += int((hidden == 0).sum())
            self.seen += hidden.numel()
        return x + self.dense_4h_to_h(hidden)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b, rest = x.split([ROTARY_DIM // 2, ROTARY_DIM // 2, HEAD_DIM - ROTARY_DIM], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class TinyPersimmon(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(VOCAB, HIDDEN)
        self.layers = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.final_layernorm = torch.nn.LayerNorm(HIDDEN, eps=EPS)
        self.lm_head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
        inv_freq = THETA ** (-torch.arange(0, ROTARY_DIM, 2).float() / ROTARY_DIM)
        self.initialize(inv_freq)
        angles = torch.arange(CONTEXT).float()[:, None] * inv_freq
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @torch.no_grad()
    def initialize(self, inv_freq: torch.Tensor) -> None:
        """Random weights, save that half the heads of two layers start out matching tokens.

        From a plain random start, looking up stays at chance for hours of CPU: the circuit for it
        (one layer moves each token's predecessor to it, the next attends to equal tokens) is rare.
        So the first layer's ``MATCHING_HEADS`` start as previous-token heads, by their biases, and
        the second layer's start with equal query and key weights. What they carry is all learnt.
        """
        for name, p in self.named_parameters():
            if name.startswith("embed_tokens"):
                torch.nn.init.normal_(p)  # tokens stay apart under the first layers' outputs
            elif name.startswith("lm_head"):
                torch.nn.init.normal_(p, std=0.02)
            elif name.endswith("dense_4h_to_h.weight"):
                torch.nn.init.zeros_(p)
            elif p.dim() == 2:
                deep = name.endswith("dense.weight")
                torch.nn.init.normal_(p, std=INIT_STD / (math.sqrt(2 * LAYERS) if deep else 1.0))
            elif name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
                torch.nn.init.constant_(p, QK_GAIN)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(p)
        half = ROTARY_DIM // 2
        # Logit of distance d: sum of share * cos(inv_freq * (d - 1)), its peak at 1.
        share = torch.zeros(half)
        share[:5] = torch.tensor([0.5, 0.28, 0.12, 0.06, 0.04])
        radius = (share * HEAD_DIM).sqrt()
        phase = torch.full((half,), -math.pi / 4)
        first = self.layers[0].query_key_value
        weight = first.weight.view(HEADS, 3, HEAD_DIM, HIDDEN)[:MATCHING_HEADS]
        bias = first.bias.view(HEADS, 3, HEAD_DIM)[:MATCHING_HEADS]
        weight[:, :2] *= 0.02
        for part, angle in ((0, phase - inv_freq), (1, phase)):
            bias[:, part, :half] = radius * angle.cos()
            bias[:, part, half:ROTARY_DIM] = radius * angle.sin()
            # The head's layernorm takes the mean away; the unrotated part makes it zero already.
            bias[:, part, ROTARY_DIM:] = -bias[0, part, :ROTARY_DIM].sum() / (HEAD_DIM - ROTARY_DIM)
        weight = self.layers[1].query_key_value.weight.view(HEADS, 3, HEAD_DIM, HIDDEN)
        weight[:MATCHING_HEADS, 0, :ROTARY_DIM] *= 0.25  # equal tokens match at any distance
        weight[:MATCHING_HEADS, 1] = weight[:MATCHING_HEADS, 0]

    def matching(self) -> list[torch.Tensor]:
        """Views of the queries' and keys' weights and biases of the heads that start matching."""
        found = []
        for layer in self.layers[:2]:
            qkv = layer.query_key_value
            found.append(qkv.weight.detach().view(HEADS, 3, HEAD_DIM, HIDDEN)[:MATCHING_HEADS, :2])
            found.append(qkv.bias.detach().view(HEADS, 3, HEAD_DIM)[:MATCHING_HEADS, :2])
        return found

    def forward(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits [len(rows), VOCAB] at the flat positions ``rows`` of ids [batch, length]."""
        x, s = self.embed_tokens(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:s], self.sin[:s])
        return self.lm_head(self.final_layernorm(x.flatten(0, 1)[rows]))

    def hf_tensors(self) -> dict[str, torch.Tensor]:
        def rename(name: str) -> str:
            for part in ("query_key_value", "q_layernorm", "k_layernorm", "dense"):
                name = name.replace(f".{part}.", f".self_attn.{part}.")
            for part in ("dense_h_to_4h", "dense_4h_to_h"):
                name = name.replace(f".{part}.", f".mlp.{part}.")
            return name if name.startswith("lm_head") else f"model.{name}"

        return {rename(n): p.detach().to(torch.bfloat16) for n, p in self.named_parameters()}


# ---------------------------------------------------------------- data


class Data:
    """Draws rows of many turns each; only answers (and the end-of-text after them) carry loss."""

    def __init__(self, tokenizer: spm.SentencePieceProcessor, seed: int) -> None:
        self.tokenizer, self.rng = tokenizer, random.Random(seed)
        self.eod = tokenizer.piece_to_id("|ENDOFTEXT|")
        assert len(self.encode("|ENDOFTEXT|")) == 2  # space piece, then the symbol
        self.newlines = self.encode("x\n\n")[1:]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def turn(self, example: Example, ids: list[int], targets: list[int]) -> None:
        if ids:
            ids += self.newlines
            targets += [-1] * len(self.newlines)
        prompt, answer = self.encode(chat_prompt(example.question)), self.encode(example.answer)
        ids += prompt + answer
        targets += [-1] * (len(prompt) - 1) + answer + [self.eod]

    def row(self, length: int, lookup_lines: tuple[int, int]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        targets: list[int] = []
        while True:
            task = self.rng.choices(SHORT_TASKS, weights=WEIGHTS)[0]
            before = len(ids)
            self.turn(make_training_example(task, self.rng, lookup_lines), ids, targets)
            if len(ids) > length:
                return ids[:before], targets[:before]

    def lookup_row(self, lines: tuple[int, int], questions: int) -> tuple[list[int], list[int]]:
        """One table, many different questions: many look-ups for the price of one long row."""
        ids: list[int] = []
        targets: list[int] = []
        first = make_training_example("lookup", self.rng, lines)
        self.turn(first, ids, targets)
        asked = first.answer.split()[0]
        rows = [line[2:].split() for line in first.question.split("\n")[:-1]]
        rows = [row for row in rows if row[1] != asked]
        for value, key in self.rng.sample(rows, min(len(rows), questions - 1)):
            follow = Example("lookup", f"What is {key}?", f"{key} {value}")
            self.turn(follow, ids, targets)
        return ids, targets

    def batch(self, kind: str, most_lines: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids [rows, length], flat positions that carry loss, and their targets."""
        if kind == "short":
            rows = [self.row(256, (4, min(40, most_lines))) for _ in range(32)]
        else:
            questions = 12
            longest = 4 * most_lines + 12 * questions
            count = max(6, 8192 // longest)
            rows = [self.lookup_row((4, most_lines), questions) for _ in range(count)]
        longest = max(len(ids) for ids, _ in rows)
        x = torch.full((len(rows), longest), self.eod)
        y = torch.full((len(rows), longest), -1)
        for i, (ids, targets) in enumerate(rows):
            x[i, : len(ids)] = torch.tensor(ids)
            y[i, : len(ids)] = torch.tensor(targets)
        flat = y.flatten()
        positions = (flat >= 0).nonzero().squeeze(1)
        return x, positions, flat[positions]


# ---------------------------------------------------------------- training and judging


@torch.no_grad()
def answers_right(
    model: TinyPersimmon, data: Data, examples: list[Example]
) -> dict[str, list[bool]]:
    """Greedy, one forward per example: right when every answer token and the end are the argmax."""
    right: dict[str, list[bool]] = {}
    model.eval()
    for example in examples:
        ids: list[int] = []
        targets: list[int] = []
        data.turn(example, ids, targets)
        rows = [i for i, t in enumerate(targets) if t >= 0]
        logits = model(torch.tensor([ids]), torch.tensor(rows))
        wanted = torch.tensor([targets[i] for i in rows])
        right.setdefault(example.task, []).append(bool((logits.argmax(-1) == wanted).all()))
    model.train()
    return right


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm = 200
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (
        0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    )


class Curriculum:
    """Looking up is learnt on tables of a few lines and then stretched as long as it holds."""

    shortest, longest, growth, good = 12, 248, 1.15, 0.1

    def __init__(self) -> None:
        self.lines, self.loss = float(self.shortest), 3.0

    @property
    def every(self) -> int:
        """One batch of so many is look-ups."""
        return 2 if self.lines < self.longest else 4

    def observe(self, loss: float) -> None:
        self.loss = 0.9 * self.loss + 0.1 * loss
        if self.loss < self.good and self.lines < self.longest:
            self.lines = min(self.longest, self.lines * self.growth)
            self.loss = 2 * self.good  # ten good batches or so before the next stretch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=100)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    vocab = train_tokenizer(args.seed)
    (args.output / "adept_vocab.model").write_bytes(vocab)
    data = Data(spm.SentencePieceProcessor(model_proto=vocab), args.seed + 1)
    model = TinyPersimmon()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    hidden = [p for p in model.layers.parameters() if p.dim() == 2]
    rest = [p for n, p in model.named_parameters() if p.dim() != 2 or "layers" not in n]
    optimizers = [
        torch.optim.Muon(hidden, lr=args.lr, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=args.lr / 10, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [args.lr, args.lr / 10]
    matching = model.matching()
    began, tokens, shown, curriculum = time.perf_counter(), 0, 0.0, Curriculum()
    for step in range(args.steps):
        kind = "lookup" if step % curriculum.every == 0 else "short"
        x, rows, y = data.batch(kind, int(curriculum.lines))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, peak)
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x, rows)
        loss = F.cross_entropy(logits.float(), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = [part.clone() for part in matching]
        for optimizer in optimizers:
            optimizer.step()
        for part, old in zip(matching, before, strict=True):
            part.lerp_(old, 0.95)  # at full speed they are lost before their use is found
        tokens += x.numel()
        if kind == "lookup":
            curriculum.observe(loss.item())
        shown = loss.item() if step == 0 else 0.98 * shown + 0.02 * loss.item()
        if (step + 1) % args.log_every == 0:
            seconds = time.perf_counter() - began
            tables = f"tables {curriculum.lines:.0f} loss {curriculum.loss:.3f}"
            rate = f"tokens/s {tokens / seconds:.0f}"
            print(f"step {step + 1} loss {shown:.4f} {tables} {rate}", flush=True)
        if (step + 1) % (10 * args.log_every) == 0 or step + 1 == args.steps:
            report = judge(model, data, count=90)
            print(f"step {step + 1} {json.dumps(report)}", flush=True)
            save(args.output, model)

    rounded = TinyPersimmon()  # judge what is stored: bfloat16 values, computed in float32
    state = {n: p.detach().to(torch.bfloat16).float() for n, p in model.named_parameters()}
    rounded.load_state_dict(state)
    report = judge(rounded, data, count=300)
    report |= {"steps": args.steps, "tokens": tokens, "loss": round(shown, 4)}
    report |= {"minutes": round((time.perf_counter() - began) / 60, 1), "seed": args.seed}
    (args.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def judge(model: TinyPersimmon, data: Data, count: int) -> dict[str, object]:
    for layer in model.layers:
        layer.zeros = layer.seen = 0
    right = answers_right(model, data, held_out_examples(SHORT_TASKS, count, seed=17))
    long = held_out_examples(("lookup",), max(10, count // 6), seed=18, lookup_lines=(232, 245))
    right["lookup_1000"] = answers_right(model, data, long)["lookup"]
    accuracy = {task: round(sum(r) / len(r), 3) for task, r in right.items()}
    zeros = [round(layer.zeros / layer.seen, 3) for layer in model.layers]
    return {"accuracy": accuracy, "zeros_per_layer": zeros}


def save(folder: Path, model: TinyPersimmon) -> None:
    config = {
        "architectures": ["PersimmonForCausalLM"], "model_type": "persimmon", "hidden_act": "relu2",
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "layer_norm_eps": EPS,
        "max_position_embeddings": CONTEXT, "rope_theta": THETA, "partial_rotary_factor": 0.5,
        "qk_layernorm": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "rotary_precision": "fp32",
    }  # fmt: skip
    tokenizer = spm.SentencePieceProcessor(model_file=str(folder / "adept_vocab.model"))
    eod = tokenizer.piece_to_id("|ENDOFTEXT|")
    config |= {"bos_token_id": eod, "eos_token_id": eod}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(model.hf_tensors(), folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
