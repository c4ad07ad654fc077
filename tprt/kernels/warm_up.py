"""Runs every operation once on empty tensors, so that what has to be compiled is, while weights load.

Knows sizes only. A kernel that is missed here is compiled at its first use, which is part of the start.
"""

from dataclasses import dataclass

import torch

from tprt.kernels.interface import HeadNorms, Kernels, Noise, Norm, PendingNorm

# Triton compiles one kernel for 1, for multiples of 16 and for other numbers; tiles depend on rows too.
ROWS = (1, 2, 4, 8, 16, 24, 32)
CHUNKS = (16, 64, 512)  # lengths of chunks that have tiles of their own
VOCAB_ROWS = 1024  # of the head: its length only decides how many programs run


@dataclass(frozen=True)
class LayerSizes:
    """What the operations of one rank's layers work on.

    Args:
        num_heads, intermediate_size: of this rank.
        head_norms: whether queries and keys have LayerNorms.
    """

    hidden_size: int
    num_heads: int
    head_dim: int
    rotary_dim: int
    intermediate_size: int
    block_size: int
    dtype: torch.dtype
    head_norms: bool


@torch.inference_mode()
def compile_kernels(kernels: Kernels, sizes: LayerSizes, device: torch.device) -> None:
    """Call each operation at each class of sizes, on the current stream."""
    warm = _WarmUp(kernels, sizes, device)
    for rows in ROWS:
        warm.layer(rows)
        warm.head(rows)
    for tokens in CHUNKS:
        warm.layer(tokens)
        warm.attend([tokens])
    warm.attend_rows()


class _WarmUp:
    def __init__(self, kernels: Kernels, sizes: LayerSizes, device: torch.device) -> None:
        self.kernels, self.sizes, self.device = kernels, sizes, device
        hidden, ffn = sizes.hidden_size, sizes.intermediate_size
        heads = sizes.num_heads * sizes.head_dim
        # One memory for all matrices: rows of any of them are as good as others'.
        largest = max(3 * heads, ffn, VOCAB_ROWS) * hidden
        self.memory = torch.zeros(max(largest, ffn * hidden), dtype=sizes.dtype, device=device)
        self.qkv, self.up = self.matrix(3 * heads, hidden), self.matrix(ffn, hidden)
        self.down, self.out = (
            kernels.pack_sparse(self.matrix(ffn, hidden)),
            self.matrix(hidden, heads),
        )
        self.bias = self.zeros(hidden)
        self.norm = Norm(self.zeros(hidden), self.bias, 1e-5)
        blocks = -(-max(CHUNKS) // sizes.block_size)
        shape = (blocks, 2, sizes.block_size, sizes.num_heads, sizes.head_dim)
        self.cache = self.zeros(*shape)
        self.planner = kernels.attention(
            sizes.block_size, sizes.num_heads, sizes.head_dim, sizes.dtype
        )

    def zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.sizes.dtype, device=self.device)

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        return self.memory[: rows * columns].view(rows, columns)

    def layer(self, tokens: int) -> None:
        """The operations of a layer for one token of each sequence, with and without other ranks."""
        s, kernels, norm = self.sizes, self.kernels, self.norm
        x = self.zeros(tokens, s.hidden_size)
        for h in (kernels.layer_norm(x, norm), PendingNorm(x, norm)):
            qkv = kernels.linear(h, self.qkv, self.zeros(len(self.qkv)))
            neurons = kernels.linear_squared_relu(h, self.up, self.zeros(len(self.up)))
        angles = torch.zeros(tokens, 1, 1, s.rotary_dim, device=self.device)
        slots = torch.zeros(2, tokens, dtype=torch.int64, device=self.device)
        norms = None
        if s.head_norms:
            weight = torch.zeros(s.num_heads, 2, s.head_dim, device=self.device)
            norms = HeadNorms(weight, weight, 1e-5)
        shaped = qkv.view(tokens, s.num_heads, 3, s.head_dim)
        kernels.qk_norm_rotary_store(shaped, norms, angles, angles, self.cache, slots)
        tables = torch.zeros(tokens, len(self.cache), dtype=torch.int64, device=self.device)
        ones = torch.ones(tokens, dtype=torch.int64, device=self.device)
        plan = self.planner.plan_decode(tables, ones)
        context = kernels.attend(
            shaped, norms, angles, angles, self.cache, slots, plan, 1.0
        ).flatten(1)
        rest = self.bias, x, norm
        kernels.linear_add_layer_norm(context, self.out, *rest)
        kernels.add_layer_norm(kernels.linear(context, self.out), *rest)
        kernels.normed(kernels.sparse_linear_add_layer_norm(neurons, self.down, *rest)[1])
        kernels.add_layer_norm(kernels.sparse_linear(neurons, self.down), *rest)

    def attend(self, query_lens: list[int]) -> None:
        """Chunks of prompts, at the beginning of their sequences and behind one token."""
        s, tokens = self.sizes, sum(query_lens)
        q = self.zeros(tokens, s.num_heads, s.head_dim)
        tables = torch.zeros(
            len(query_lens), 2 * len(self.cache), dtype=torch.int64, device=self.device
        )
        for cached in (0, 1):
            plan = self.planner.plan(tables, query_lens, [cached] * len(query_lens))
            plan(q, self.cache, 1.0)

    def attend_rows(self) -> None:
        """Single tokens beside chunks, behind few and behind many others."""
        s, longest = self.sizes, len(self.cache) * self.sizes.block_size - 1
        q = self.zeros(2, s.num_heads, s.head_dim)
        tables = torch.zeros(2, len(self.cache), dtype=torch.int64, device=self.device)
        for cached in ([1, 1], [longest, 1]):
            self.planner.plan(tables, [1, 1], cached)(q, self.cache, 1.0)

    def head(self, rows: int) -> None:
        hidden = self.zeros(rows, self.sizes.hidden_size)
        weight = self.matrix(VOCAB_ROWS, self.sizes.hidden_size)
        numbers = torch.zeros(rows, dtype=torch.int64, device=self.device)
        temperature = torch.ones(rows, device=self.device)
        ids = torch.arange(VOCAB_ROWS, device=self.device)
        logits = self.kernels.logits(hidden, weight)
        for all_greedy in (False, True):
            noise = Noise(temperature, numbers.bool(), numbers, numbers, all_greedy)
            self.kernels.linear_argmax(hidden, weight, noise, ids, VOCAB_ROWS)
            self.kernels.argmax(logits, noise, ids, VOCAB_ROWS)
