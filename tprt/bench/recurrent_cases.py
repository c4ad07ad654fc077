"""The operations of a RecurrentGemma layer on inputs of its sizes; see ``kernel_cases``.

Legend: T tokens, B sequences, S slots, W channels and H heads of one rank, D head width.
"""

from collections.abc import Iterator
from functools import partial

import torch

from tprt.batch import Segments
from tprt.bench.device_timing import num_sets
from tprt.bench.kernel_cases import Case, CaseMaker, Shapes
from tprt.cache.slot_cache import RecurrentSpec, WindowSpec, allocate_slot_cache
from tprt.config import RecurrentGemmaConfig
from tprt.distributed.sharding import padded_part
from tprt.kernels import Kernels, Norm
from tprt.kernels.recurrence import RecurrenceWeights
from tprt.layers.rotary import RotaryAngles


class RecurrentCases(CaseMaker):
    """Args: as of ``kernel_cases.Cases``."""

    groups = ("norms", "matrices", "head", "recurrence", "window")

    def __init__(
        self,
        kernels: Kernels,
        body: str,
        config: RecurrentGemmaConfig,
        shard: int,
        dtype: torch.dtype,
        device: torch.device,
        shapes: Shapes,
    ) -> None:
        super().__init__(kernels, body, shard, dtype, device, shapes)
        self.config = config
        self.heads = config.padded_heads(shard) // shard
        self.width = self.heads * config.block_width
        weight = self.randn(config.hidden_size)
        self.norm = Norm(weight, None, config.rms_norm_eps)

    def norms(self) -> Iterator[Case]:
        return self.norm_cases(self.config.hidden_size, self.norm)

    def head(self) -> Iterator[Case]:
        part = padded_part(self.config.vocab_size, self.shard)
        return self.head_cases(self.config.hidden_size, part)

    def matrices(self) -> Iterator[Case]:
        """All of both kinds of layers. On a single rank a row-parallel one ends in the norm."""
        config, hidden = self.config, self.config.hidden_size
        queries, ffn = self.heads * config.head_dim, config.intermediate_size // self.shard
        yield from self.column_cases("x and y", hidden, 2 * self.width, "linear")
        yield from self.column_cases("qkv", hidden, queries + 2 * config.head_dim, "linear")
        yield from self.column_cases("gate and up", hidden, 2 * ffn, "linear_gelu_gate")
        for name, inputs in (("out", self.width), ("o", queries), ("down", ffn)):
            yield from self.row_cases(name, inputs, hidden, self.norm)

    # ------------------------------------------------------------ state

    def segments(self, batch: int, tokens: int, before: int) -> Segments:
        """``tokens`` of each of ``batch`` sequences that have ``before``; single ones as decode rows."""
        positions = (torch.arange(tokens) + before).repeat(batch).to(self.device)
        starts = None if tokens == 1 else (before,) * batch
        slots = torch.arange(batch, device=self.device)
        return Segments(
            slots=slots, positions=positions, query_lens=(tokens,) * batch, starts=starts
        )

    def _shapes(self) -> Iterator[tuple[str, int, int]]:
        """In words, sequences, and tokens of each."""
        for rows in self.shapes.rows:
            yield f"{rows} decode rows", rows, 1
        for tokens in self.shapes.prompts:
            yield f"a prompt of {tokens}", 1, tokens

    def recurrence(self) -> Iterator[Case]:
        """Convolution, gates, scan and the product with the other branch."""
        config, width, block = self.config, self.width, self.config.block_width
        taps = config.conv1d_width
        words = width * (2 * block + taps)  # of weights
        count = num_sets(words * self.dtype.itemsize, self.device)
        weights = [
            RecurrenceWeights(
                self.randn(width, taps), self.randn(width),
                self.randn(self.heads, block, 2 * block).mul_(block**-0.5),
                torch.zeros(self.heads, 2 * block, device=self.device),
                -torch.rand(width, device=self.device),
            )
            for _ in range(count)
        ]  # fmt: skip
        spec = RecurrentSpec(width, taps)
        for shape, batch, tokens in self._shapes():
            cache = allocate_slot_cache(spec, batch, self.dtype, self.device)
            segments = self.segments(batch, tokens, before=4096)
            xy = self.randn(batch * tokens, 2 * width)
            calls = [
                partial(self.kernels.recurrence, xy, w, cache.state, cache.conv, segments)  # type: ignore[union-attr]
                for w in weights
            ]
            kept = batch * spec.bytes_per_slot(self.dtype) / self.dtype.itemsize
            rows = batch * tokens
            yield self.case(
                "recurrence", shape, calls, words + 2 * rows * width + kept, rows * width + kept,
                4 * rows * width * block,
            )  # fmt: skip

    def window(self) -> Iterator[Case]:
        """Rotation, the store and attention over a window that is full."""
        config, dim = self.config, self.config.head_dim
        assert config.window_keys is not None
        spec, keys = WindowSpec(dim, config.window_keys), config.window_keys
        rotary = RotaryAngles(config.rotary_dim, config.rope_theta, self.device)
        for shape, batch, tokens in self._shapes():
            count = num_sets(batch * spec.bytes_per_slot(self.dtype), self.device)
            rings = [self.randn(batch, 2, spec.ring, dim) for _ in range(count)]
            segments = self.segments(batch, tokens, before=2 * keys)
            cos, sin = rotary(segments.positions)
            qkv = self.randn(batch * tokens, self.heads + 2, dim)
            calls = [
                partial(self.kernels.window_attend, qkv, cos, sin, ring, segments, keys, dim**-0.5)
                for ring in rings
            ]
            rows = batch * tokens
            seen = batch * (keys - 1 + min(tokens, keys)) * 2 * dim
            yield self.case(
                "window attention", shape, calls, seen + rows * (self.heads + 2) * dim,
                rows * (self.heads + 2) * dim, 4 * rows * keys * self.heads * dim,
            )  # fmt: skip
