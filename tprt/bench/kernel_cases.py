"""Every operation of ``kernels.interface`` on inputs of a model's sizes, ready to be timed.

A case is one operation at one shape; its calls read different weights or keys, so that none of them
is in a cache when its turn comes. Activations of a few rows do stay in a cache, as they do between
the kernels of a model. All numbers are random.

Legend: T tokens, R rows, B sequences, H heads of one rank, D head width, N blocks of a sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from tprt.bench.device_timing import Call, num_sets
from tprt.config import PersimmonConfig
from tprt.distributed.sharding import padded_part
from tprt.kernels import HeadNorms, Kernels, Noise, Norm, SparseWeight
from tprt.layers.rotary import RotaryEmbedding

BLOCK_SIZE = 16
LIVE_SHARE = 0.1  # of the neurons behind squared ReLU, independent of one another
MOST_SPARSE_ROWS = 16  # beyond, no body skips anything


@dataclass(frozen=True)
class Case:
    """Args:
    operation, shape, body: what is timed, in words.
    calls: one per input set; all do the same.
    read, written: bytes that pass through memory. operations: multiplications and additions.
    """

    operation: str
    shape: str
    body: str
    calls: Sequence[Call]
    read: float
    written: float
    operations: float = 0.0


@dataclass(frozen=True)
class Shapes:
    """Args:
    rows: of the matrices and the head. norm_rows: of LayerNorms, rotation and store.
    contexts, batches: of decode attention. prompts: tokens of prefill attention.
    """

    rows: Sequence[int]
    norm_rows: Sequence[int]
    contexts: Sequence[int]
    batches: Sequence[int]
    prompts: Sequence[int]


FULL = Shapes(
    (1, 2, 4, 8, 16, 32), (1, 16, 2048), (512, 2048, 16384), (1, 4, 16), (2048, 8192, 16384)
)
TOY = Shapes((1, 3, 17), (1, 3), (16, 150), (1, 3), (20,))


class CaseMaker:
    """What the cases of all models share, for one body of the kernels at the sizes of a rank.

    Each of ``groups`` is a method that makes cases one by one: what the last one held is free by then.

    Args:
        body: how ``kernels`` is called in the result.
        shard: ranks that share the model.
    """

    groups: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        kernels: Kernels,
        body: str,
        shard: int,
        dtype: torch.dtype,
        device: torch.device,
        shapes: Shapes,
    ) -> None:
        self.kernels, self.body, self.shard = kernels, body, shard
        self.dtype, self.device, self.shapes = dtype, device, shapes

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def case(
        self,
        operation: str,
        shape: str,
        calls: Sequence[Call],
        read: float,
        written: float,
        operations: float = 0.0,
        body: str | None = None,
    ) -> Case:
        """``read`` and ``written`` are words of the model's dtype."""
        size = self.dtype.itemsize
        return Case(
            operation, shape, body or self.body, calls, read * size, written * size, operations
        )

    def norm_cases(self, width: int, norm: Norm) -> Iterator[Case]:
        for rows in self.shapes.norm_rows:
            xs = [self.randn(rows, width) for _ in range(num_sets(rows * width * 6, self.device))]
            residual, bias = self.randn(rows, width), self.randn(width)
            yield self.case(
                "layer_norm",
                f"{rows} rows",
                [partial(self.kernels.layer_norm, x, norm) for x in xs],
                rows * width,
                rows * width,
            )
            added = [partial(self.kernels.add_layer_norm, x, bias, residual, norm) for x in xs]
            yield self.case(
                "add_layer_norm", f"{rows} rows", added, 2 * rows * width, 2 * rows * width
            )

    def column_cases(self, name: str, inputs: int, outputs: int, product: str) -> Iterator[Case]:
        """``product`` of the kernels on a weight [outputs, inputs] and a bias."""
        bias = self.randn(outputs)
        call = getattr(self.kernels, product)
        yield from self._products(
            name, inputs, outputs, lambda x, weight: partial(call, x, weight, bias)
        )

    def row_cases(self, name: str, inputs: int, outputs: int, norm: Norm) -> Iterator[Case]:
        """A product that ends in bias, residual and norm, where no all-reduce comes first."""
        bias = self.randn(outputs)

        def call(x: torch.Tensor, weight: torch.Tensor) -> Call:
            if self.shard > 1:
                return partial(self.kernels.linear, x, weight)
            residual = self.randn(len(x), outputs)
            product = self.kernels.linear_add_layer_norm
            return partial(product, x, weight, bias, residual, norm)

        yield from self._products(name, inputs, outputs, call)

    def _products(
        self,
        name: str,
        inputs: int,
        outputs: int,
        call: Callable[[torch.Tensor, torch.Tensor], Call],
    ) -> Iterator[Case]:
        count = num_sets(inputs * outputs * self.dtype.itemsize, self.device)
        weights = [
            self.kernels.pack_weight(self.randn(outputs, inputs).mul_(0.02)) for _ in range(count)
        ]
        for rows in self.shapes.rows:
            x = self.randn(rows, inputs)
            yield self.case(
                name,
                f"{rows} x {inputs} -> {outputs}",
                [call(x, weight) for weight in weights],
                inputs * outputs + rows * inputs,
                rows * outputs,
                2 * rows * inputs * outputs,
            )

    def head_cases(self, hidden: int, part: int) -> Iterator[Case]:
        """Every other row greedy, the rest with noise: what a graph always computes."""
        count = num_sets(hidden * part * self.dtype.itemsize, self.device)
        weights = [
            self.kernels.pack_weight(self.randn(part, hidden).mul_(0.02)) for _ in range(count)
        ]
        ids = torch.arange(part, device=self.device)
        for rows in self.shapes.rows:
            index = torch.arange(rows, device=self.device)
            noise = Noise(
                temperature=torch.ones(rows, device=self.device),
                greedy=index % 2 == 0,
                keys=index * 7919,
                positions=index + 100,
            )
            x = self.randn(rows, hidden)
            yield self.case(
                "linear_argmax",
                f"{rows} x {hidden} -> {part}",
                [partial(self.kernels.linear_argmax, x, w, noise, ids, part) for w in weights],
                hidden * part + rows * hidden,
                0,
                2 * rows * hidden * part,
            )


class Cases(CaseMaker):
    """The cases of a Persimmon."""

    groups = (
        "norms", "rotary_and_store", "matrices", "down", "head", "decode_attention",
        "prefill_attention",
    )  # fmt: skip

    def __init__(
        self,
        kernels: Kernels,
        body: str,
        config: PersimmonConfig,
        shard: int,
        dtype: torch.dtype,
        device: torch.device,
        shapes: Shapes,
    ) -> None:
        super().__init__(kernels, body, shard, dtype, device, shapes)
        self.config = config
        self.heads, self.head_dim = config.num_attention_heads // shard, config.head_dim
        width = config.hidden_size
        self.norm = Norm(self.randn(width), self.randn(width), config.layer_norm_eps)

    # ------------------------------------------------------------ per token

    def norms(self) -> Iterator[Case]:
        return self.norm_cases(self.config.hidden_size, self.norm)

    def rotary_and_store(self) -> Iterator[Case]:
        heads, dim, config = self.heads, self.head_dim, self.config
        weight, bias = (torch.randn(heads, 2, dim, device=self.device) for _ in range(2))
        norms = HeadNorms(weight, bias, config.layer_norm_eps)
        most = max(self.shapes.norm_rows)
        rotary = RotaryEmbedding(config.rotary_dim, most, config.rope_theta, "fp32", self.device)
        blocks = -(-most // BLOCK_SIZE)
        cache = self.randn(blocks, 2, BLOCK_SIZE, heads, dim)
        for rows in self.shapes.norm_rows:
            positions = torch.arange(rows, device=self.device)
            cos, sin = rotary(positions)
            keys = positions // BLOCK_SIZE * (2 * BLOCK_SIZE) + positions % BLOCK_SIZE
            slots = torch.stack([keys, keys + BLOCK_SIZE])
            words = rows * heads * 3 * dim
            qkvs = [
                self.randn(rows, heads, 3, dim) for _ in range(num_sets(4 * words, self.device))
            ]
            calls = [
                partial(self.kernels.qk_norm_rotary_store, qkv, norms, cos, sin, cache, slots)
                for qkv in qkvs
            ]
            yield self.case("qk_norm_rotary_store", f"{rows} rows", calls, words, words)

    # ------------------------------------------------------------ matrices

    def matrices(self) -> Iterator[Case]:
        """All of a layer but ``down``. On a single rank a row-parallel one ends in the LayerNorm."""
        hidden, ffn = self.config.hidden_size, self.config.intermediate_size // self.shard
        local = hidden // self.shard
        yield from self.column_cases("qkv", hidden, 3 * local, "linear")
        yield from self.row_cases("o", local, hidden, self.norm)
        yield from self.column_cases("up", hidden, ffn, "linear_squared_relu")

    def down(self) -> Iterator[Case]:
        """The last matrix of a layer, read as a whole, and skipping with few of its inputs not 0."""
        config, kernels, usual = self.config, self.kernels, self.kernels.sparse_rows
        hidden, ffn = config.hidden_size, config.intermediate_size // self.shard
        bias = self.randn(hidden)
        count = num_sets(hidden * ffn * self.dtype.itemsize, self.device)
        weights = [kernels.pack_sparse(self.randn(ffn, hidden).mul_(0.02)) for _ in range(count)]

        def call(x: torch.Tensor, weight: SparseWeight, residual: torch.Tensor) -> Call:
            if self.shard > 1:
                return partial(kernels.sparse_linear, x, weight)
            product = kernels.sparse_linear_add_layer_norm
            return partial(product, x, weight, bias, residual, self.norm)

        for rows in self.shapes.rows:
            residual = self.randn(rows, hidden)
            for operation, sparse_rows in (("down", 0), ("sparse down", MOST_SPARSE_ROWS)):
                if sparse_rows and (rows > sparse_rows or usual == 0):
                    continue
                x = self.randn(rows, ffn).square()  # what squared ReLU leaves
                x.masked_fill_(torch.rand(x.shape, device=self.device) >= LIVE_SHARE, 0.0)
                read = ((x != 0).any(dim=0).double().mean().item() if sparse_rows else 1.0) * ffn
                kernels.sparse_rows = sparse_rows
                try:  # until the next case is asked for, this one is timed
                    yield self.case(
                        operation,
                        f"{rows} x {ffn} -> {hidden}",
                        [call(x, weight, residual) for weight in weights],
                        read * hidden + rows * ffn,
                        rows * hidden,
                        2 * rows * read * hidden,
                    )
                finally:
                    kernels.sparse_rows = usual

    def head(self) -> Iterator[Case]:
        part = padded_part(self.config.vocab_size, self.shard)
        return self.head_cases(self.config.hidden_size, part)

    # ------------------------------------------------------------ attention

    def decode_attention(self) -> Iterator[Case]:
        heads, dim = self.heads, self.head_dim
        planner = self.kernels.attention(BLOCK_SIZE, heads, dim, self.dtype)
        grid = [(b, c) for c in self.shapes.contexts for b in self.shapes.batches]

        def layout(batch: int, context: int) -> tuple[int, int, int]:
            """Input sets, sequences and blocks of each."""
            nbytes = batch * context * 2 * heads * dim * self.dtype.itemsize
            return num_sets(nbytes, self.device), batch, -(-context // BLOCK_SIZE)

        blocks = max(sets * b * n for sets, b, n in (layout(*cell) for cell in grid))
        cache = self.randn(blocks, 2, BLOCK_SIZE, heads, dim)
        order = torch.randperm(blocks, device=self.device)
        for batch, context in grid:
            sets, _, width = layout(batch, context)
            tables = order[: sets * batch * width].view(sets, batch, width)
            lengths = torch.full((batch,), context, device=self.device)
            q = self.randn(batch, heads, dim)
            plans = [planner.plan_decode(table, lengths) for table in tables]
            words = batch * context * heads * dim
            yield self.case(
                "decode attention",
                f"{batch} x context {context}",
                [partial(plan, q, cache, dim**-0.5) for plan in plans],
                2 * words,
                batch * heads * dim,
                4 * words,
            )

    def prefill_attention(self) -> Iterator[Case]:
        """The body's own choice, or each of them where it leaves one."""
        heads, dim = self.heads, self.head_dim
        planner = self.kernels.attention(BLOCK_SIZE, heads, dim, self.dtype)
        bodies = ("triton", "sdpa") if hasattr(planner, "prefill_body") else (None,)
        for tokens in self.shapes.prompts:
            blocks = -(-tokens // BLOCK_SIZE)
            cache = self.randn(blocks, 2, BLOCK_SIZE, heads, dim)
            table = torch.randperm(blocks, device=self.device).view(1, -1)
            q = self.randn(tokens, heads, dim)
            words = tokens * heads * dim
            for body in bodies:
                if body is not None:
                    setattr(planner, "prefill_body", body)  # noqa: B010
                plan = planner.plan(table, [tokens], [0])
                yield self.case(
                    "prefill attention",
                    f"{tokens} tokens",
                    [partial(plan, q, cache, dim**-0.5)],
                    3 * words,
                    words,
                    # Scores and values; a causal mask leaves half of them.
                    2 * words * (tokens + 1),
                    body,
                )
