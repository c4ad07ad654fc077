"""Runs every operation once on empty tensors, so that what has to be compiled is, while weights load.

Knows sizes only. A kernel that is missed here is compiled at its first use, which is part of the start.
"""

import torch

from tprt.batch import Segments
from tprt.kernels.interface import Activations, HeadNorms, Kernels, Noise, Norm, PendingNorm
from tprt.kernels.recurrence import RecurrenceWeights
from tprt.sizes import KernelSizes, PagedAttentionSizes, RecurrenceSizes, WindowAttentionSizes

# Triton compiles one kernel for 1, for multiples of 16 and for other numbers; tiles depend on rows too.
ROWS = (1, 2, 4, 8, 16, 24, 32)
CHUNKS = (16, 64, 512)  # lengths of chunks that have tiles of their own
VOCAB_ROWS = 8192  # of the head: so many are cut into tiles as any larger number is


@torch.inference_mode()
def compile_kernels(kernels: Kernels, sizes: KernelSizes, device: torch.device) -> None:
    """Call each operation at each class of sizes, on the current stream."""
    warm = _WarmUp(kernels, sizes, device)
    for rows in ROWS:
        warm.layer(rows)
        warm.head(rows)
    for tokens in CHUNKS:
        warm.layer(tokens)
    if sizes.attention is not None:
        warm.attend_prompts(sizes.attention)
    warm.prompts_in_slots()


class _WarmUp:
    def __init__(self, kernels: Kernels, sizes: KernelSizes, device: torch.device) -> None:
        self.kernels, self.sizes, self.device = kernels, sizes, device
        hidden, ffn = sizes.hidden_size, sizes.intermediate_size
        self.shapes = {
            "head": (VOCAB_ROWS, hidden),
            "up": (2 * ffn if sizes.activation == "gelu_gate" else ffn, hidden),
            "down": (hidden, ffn),
        }
        if (s := sizes.attention) is not None:
            self.shapes |= _projections(
                "attention", 3 * s.num_heads, s.num_heads, s.head_dim, hidden
            )
        if (w := sizes.window) is not None:
            self.shapes |= _projections("window", w.num_heads + 2, w.num_heads, w.head_dim, hidden)
        if (r := sizes.recurrence) is not None:
            heads = r.num_heads
            self.shapes |= _projections("recurrence", 2 * heads, heads, r.block_width, hidden)
        # One memory for all matrices: rows of any of them are as good as others'.
        self.memory = self.zeros(max(rows * columns for rows, columns in self.shapes.values()))
        self.sparse = kernels.pack_sparse(self.memory[: ffn * hidden].view(ffn, hidden))
        self.bias = self.zeros(hidden)
        rms = sizes.norm == "rms"
        self.norm = Norm(self.zeros(hidden), None if rms else self.bias, 1e-5)
        if (s := sizes.attention) is not None:
            blocks = -(-max(CHUNKS) // s.block_size)
            self.cache = self.zeros(blocks, 2, s.block_size, s.num_heads, s.head_dim)
            self.planner = kernels.attention(s.block_size, s.num_heads, s.head_dim, sizes.dtype)

    def zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.sizes.dtype, device=self.device)

    def numbers(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.device)

    def matrix(self, name: str) -> torch.Tensor:
        rows, columns = self.shapes[name]
        return self.memory[: rows * columns].view(rows, columns)

    def layer(self, tokens: int) -> None:
        """The operations of layers for one token of each sequence, with and without other ranks."""
        s, kernels, norm = self.sizes, self.kernels, self.norm
        x = self.zeros(tokens, s.hidden_size)
        inputs: list[Activations] = [kernels.layer_norm(x, norm)]
        if s.norm == "layer":
            inputs.append(PendingNorm(x, norm))
        for h in inputs:
            if s.attention is not None:
                self.end(self.attention(h, tokens, s.attention), "attention_out", x)
            if s.window is not None:
                qkv = kernels.linear(h, self.matrix("window"))
                self.end(self.window(qkv, s.window, self.segments(tokens)), "window_out", x)
            if s.recurrence is not None:
                matrix = self.matrix("recurrence")
                xy = kernels.linear(h, matrix, self.zeros(len(matrix)))
                out = self.recurrence(xy, s.recurrence, self.segments(tokens))
                self.end(out, "recurrence_out", x)
            self.mlp(h, x)

    def end(self, context: torch.Tensor, name: str, x: torch.Tensor) -> None:
        """Of what is row-parallel: the product and the sum, in one operation and in two."""
        rest = self.bias, x, self.norm
        self.kernels.linear_add_layer_norm(context, self.matrix(name), *rest)
        self.kernels.add_layer_norm(self.kernels.linear(context, self.matrix(name)), *rest)

    def mlp(self, h: Activations, x: torch.Tensor) -> None:
        kernels, up = self.kernels, self.matrix("up")
        bias, rest = self.zeros(len(up)), (self.bias, x, self.norm)
        if self.sizes.activation == "gelu_gate":
            self.end(kernels.linear_gelu_gate(h, up, bias), "down", x)
            return
        neurons = kernels.linear_squared_relu(h, up, bias)
        kernels.normed(kernels.sparse_linear_add_layer_norm(neurons, self.sparse, *rest)[1])
        kernels.add_layer_norm(kernels.sparse_linear(neurons, self.sparse), *rest)

    def head(self, rows: int) -> None:
        hidden, cap = self.zeros(rows, self.sizes.hidden_size), self.sizes.soft_cap
        weight, numbers = self.matrix("head"), self.numbers(rows)
        temperature = torch.ones(rows, device=self.device)
        ids = torch.arange(VOCAB_ROWS, device=self.device)
        logits = self.kernels.logits(hidden, weight, cap)
        for all_greedy in (False, True):
            noise = Noise(temperature, numbers.bool(), numbers, numbers, all_greedy)
            self.kernels.linear_argmax(hidden, weight, noise, ids, VOCAB_ROWS, cap)
            self.kernels.argmax(logits, noise, ids, VOCAB_ROWS)

    # ------------------------------------------------------------ a paged cache

    def attention(self, h: Activations, tokens: int, s: PagedAttentionSizes) -> torch.Tensor:
        kernels, matrix = self.kernels, self.matrix("attention")
        qkv = kernels.linear(h, matrix, self.zeros(len(matrix)))
        qkv = qkv.view(tokens, s.num_heads, 3, s.head_dim)
        angles = torch.zeros(tokens, 1, 1, s.rotary_dim, device=self.device)
        slots, norms = self.numbers(2, tokens), None
        if s.head_norms:
            weight = torch.zeros(s.num_heads, 2, s.head_dim, device=self.device)
            norms = HeadNorms(weight, weight, 1e-5)
        where = norms, angles, angles, self.cache, slots
        kernels.qk_norm_rotary_store(qkv, *where)
        plan = self.planner.plan_decode(
            self.numbers(tokens, len(self.cache)), self.numbers(tokens) + 1
        )
        return kernels.attend(qkv, *where, plan, 1.0).flatten(1)

    def attend_prompts(self, s: PagedAttentionSizes) -> None:
        """Chunks, at the beginning of their sequences and behind a token; single tokens beside them,
        behind few and behind many others."""
        blocks, longest = len(self.cache), len(self.cache) * s.block_size - 1
        passes = [([n], [cached], 2 * blocks) for n in CHUNKS for cached in (0, 1)]
        passes += [([1, 1], cached, blocks) for cached in ([1, 1], [longest, 1])]
        for query_lens, cached, columns in passes:
            q = self.zeros(sum(query_lens), s.num_heads, s.head_dim)
            tables = self.numbers(len(query_lens), columns)
            self.planner.plan(tables, query_lens, cached)(q, self.cache, 1.0)

    # ------------------------------------------------------------ state in slots

    def segments(self, tokens: int, chunk: bool = False) -> Segments:
        """All in the first slot: single tokens, or those of one chunk."""
        lens = (tokens,) if chunk else (1,) * tokens
        return Segments(
            slots=self.numbers(len(lens)),
            positions=self.numbers(tokens),
            query_lens=lens,
            starts=(0,) if chunk else None,
        )

    def window(
        self, qkv: torch.Tensor, s: WindowAttentionSizes, segments: Segments
    ) -> torch.Tensor:
        tokens = len(qkv)
        qkv = qkv.view(tokens, s.num_heads + 2, s.head_dim)
        angles = torch.zeros(tokens, 1, s.rotary_dim, device=self.device)
        kv = self.zeros(1, 2, s.ring, s.head_dim)
        context = self.kernels.window_attend(qkv, angles, angles, kv, segments, s.keys, 1.0)
        return context.flatten(1)

    def recurrence(self, xy: torch.Tensor, s: RecurrenceSizes, segments: Segments) -> torch.Tensor:
        heads, block, width = s.num_heads, s.block_width, s.num_heads * s.block_width
        numbers = torch.zeros(heads, 2 * block, device=self.device)
        weights = RecurrenceWeights(
            self.zeros(width, s.taps),
            self.zeros(width),
            self.zeros(heads, block, 2 * block),
            numbers,
            numbers.flatten()[:width],
        )
        state = torch.zeros(1, width, device=self.device)
        conv = self.zeros(1, s.taps, width)
        return self.kernels.recurrence(xy, weights, state, conv, segments)

    def prompts_in_slots(self) -> None:
        for tokens in CHUNKS:
            segments = self.segments(tokens, chunk=True)
            if (w := self.sizes.window) is not None:
                self.window(self.zeros(tokens, (w.num_heads + 2) * w.head_dim), w, segments)
            if (r := self.sizes.recurrence) is not None:
                self.recurrence(self.zeros(tokens, 2 * r.num_heads * r.block_width), r, segments)


def _projections(
    name: str, into: int, out: int, width: int, hidden: int
) -> dict[str, tuple[int, int]]:
    """Matrices around what mixes tokens: rows for ``into`` vectors of ``width``, columns for ``out``."""
    return {name: (into * width, hidden), f"{name}_out": (hidden, out * width)}
