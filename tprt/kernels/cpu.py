"""The bodies for CPUs: packed matrices, rows that meet zeros left unread, attention of many decode rows.

Rings of windows are ``cpu_window``'s.

Same results as ``reference`` up to the order of sums. Written for what torch's CPU kernels are good at:
bfloat16 products against a packed matrix run several times faster than against a plain one, an
``embedding_bag`` reads the rows it is told at the speed of memory, and attention of a single query runs
several times faster in float32 than in bfloat16, its conversion included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from tprt.batch import Segments
from tprt.kernels.cpu_window import IN_PLACE
from tprt.kernels.interface import Activations, Norm, SparseWeight, Tensors
from tprt.kernels.recurrence import RecurrenceWeights, recurrence, scan_in_tiles
from tprt.kernels.reference import ReferenceKernels, causal_mask, gather_kv

Ints = npt.NDArray[np.int64]

NEG_INF = float("-inf")
# Parts of a sum over neurons, whatever runs: more would keep more threads busy, and cost more to begin.
BAGS = 8
# Most rows for which reading live rows alone was faster, at 90% zeros, than a dense product that reads
# all of them once: against a packed matrix, and against a plain one.
SPARSE_ROWS_PACKED, SPARSE_ROWS_PLAIN = 2, 8
# Elements of one group's keys: what is gathered should still be in the cache when it is read.
GROUP_ELEMENTS = 3 * 2**19


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a packed layout for this matrix on this machine."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


_linear = torch.ops.mkldnn._linear_pointwise.default
_linear_binary = torch.ops.mkldnn._linear_pointwise.binary


class CPUKernels(ReferenceKernels):
    """See ``interface.Kernels``; what stands here is faster than the plain body on a CPU."""

    name = "cpu"
    window_decode = IN_PLACE

    def __init__(self, sparse_rows: int | None = None) -> None:
        super().__init__()
        self.sparse_rows = sparse_rows
        self._bags: dict[tuple[int, int], torch.Tensor] = {}

    def pack_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """An opaque tensor for oneDNN where it has a layout for this dtype; a copy."""
        if not can_pack(weight):
            return weight
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        return packed

    def linear(
        self, x: Activations, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not weight.is_mkldnn:
            return super().linear(x, weight, bias)
        out: torch.Tensor = _linear(self.normed(x), weight, bias, "none", [], "")
        return out

    def linear_squared_relu(
        self, x: Activations, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """Rounded before the square, as two operations would."""
        if not weight.is_mkldnn:
            return super().linear_squared_relu(x, weight, bias)
        out: torch.Tensor = _linear(self.normed(x), weight, bias, "relu", [], "")
        return out.square_()

    def linear_add_layer_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor,
        norm: Norm,
    ) -> Tensors:
        """Product, bias and residual are rounded once where they are one operation."""
        if not weight.is_mkldnn:
            return super().linear_add_layer_norm(x, weight, bias, residual, norm)
        total: torch.Tensor = _linear_binary(x, residual, weight, bias, "add")
        return total, self.layer_norm(total, norm)

    def pack_recurrence(self, weights: RecurrenceWeights) -> RecurrenceWeights:
        """In float32: products of blocks so small take longer in 16 bits."""
        return RecurrenceWeights(*(weight.float() for weight in weights))

    def recurrence(
        self,
        xy: torch.Tensor,
        weights: RecurrenceWeights,
        state: torch.Tensor,
        conv: torch.Tensor,
        segments: Segments,
    ) -> torch.Tensor:
        return recurrence(xy, weights, state, conv, segments, scan_in_tiles)

    def pack_sparse(self, rows: torch.Tensor) -> SparseWeight:
        """With a copy for dense products in 16 bits: they take twice as long of what lies by rows, and,
        where oneDNN has no layout of its own, up to a hundred times.

        Where nothing is ever skipped, as in float16, the copy is all that is kept.
        """
        if rows.itemsize != 2:
            return SparseWeight(rows, None)
        skips = self.sparse_rows != 0 and rows.dtype != torch.float16
        kept = rows if skips else rows.new_empty(0, rows.shape[1])
        return SparseWeight(kept, self.pack_weight(rows.t().contiguous()))

    def sparse_linear(self, x: torch.Tensor, weight: SparseWeight) -> torch.Tensor:
        if self._skips(x, weight):
            return self._live_rows(x, weight.rows).to(x.dtype)
        return self.linear(x, weight.dense) if weight.dense is not None else x @ weight.rows

    def sparse_linear_add_layer_norm(
        self,
        x: torch.Tensor,
        weight: SparseWeight,
        bias: torch.Tensor,
        residual: torch.Tensor,
        norm: Norm,
    ) -> Tensors:
        if self._skips(x, weight):
            total = self._live_rows(x, weight.rows).add_(bias).add_(residual).to(residual.dtype)
            return total, self.layer_norm(total, norm)
        if weight.dense is not None:
            return self.linear_add_layer_norm(x, weight.dense, bias, residual, norm)
        return self.add_layer_norm(x @ weight.rows, bias, residual, norm)

    def _skips(self, x: torch.Tensor, weight: SparseWeight) -> bool:
        if x.dtype == torch.float16:
            return False  # each bag's sum is rounded to the dtype, and may be past this one's range
        most = self.sparse_rows
        if most is None:
            packed = weight.dense is not None and weight.dense.is_mkldnn
            most = SPARSE_ROWS_PACKED if packed else SPARSE_ROWS_PLAIN
        return 0 < len(x) <= most

    def _live_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """float32 [T, out]. Sums are those of fixed ranges of neurons: other rows change no bit."""
        (num_rows, neurons), flat = x.shape, x.reshape(-1)
        first = self._bags.get((num_rows, neurons))
        if first is None:
            bounds = torch.arange(BAGS) * neurons // BAGS
            first = (torch.arange(num_rows).unsqueeze(1) * neurons + bounds).flatten()
            self._bags[num_rows, neurons] = first
        # By their bits, since no comparison of 16-bit floats is quick: all are 0 in 0 alone (in -0 too
        # but for one, and no square is -0). NaN has many.
        bits = flat.view(torch.int32 if flat.itemsize == 4 else torch.int16).numpy()
        live = torch.from_numpy(np.flatnonzero(bits != 0))
        # What torch.nn.functional.embedding_bag calls, without the checks that cost as much as a sum.
        sums = torch.embedding_bag(
            rows,
            live if num_rows == 1 else live % neurons,
            torch.searchsorted(live, first),
            per_sample_weights=flat.index_select(0, live),
        )[0]
        return sums.view(num_rows, BAGS, -1).sum(1, dtype=torch.float32)

    def attention(
        self, block_size: int, num_heads: int, head_dim: int, dtype: torch.dtype
    ) -> "CPUAttention":
        return CPUAttention(block_size, num_heads, head_dim, dtype)


@dataclass(frozen=True)
class _Chunk:
    """Rows ``start`` to ``stop`` of the queries: several new tokens of one sequence."""

    start: int
    stop: int
    length: int
    blocks: torch.Tensor
    mask: torch.Tensor | None  # None where nothing is cached: plainly causal


@dataclass(frozen=True)
class _Group:
    """Rows of like length with one new token each: ``first`` to ``last`` by ascending length.

    The tensors but ``blocks``, ``stale`` and ``mask`` are views of the planner's buffers.
    """

    first: int
    last: int
    blocks: torch.Tensor  # int64 [N], those of one row after the other
    mask: torch.Tensor  # float32 [B, 1, 1, L], 0 or -inf
    stale: torch.Tensor | None  # int64, rows of ``tokens`` past the end of their sequence
    gathered: torch.Tensor  # [N, 2 * block_size * H * D]
    tokens: torch.Tensor  # the same as [N * 2 * block_size, H * D]
    source: torch.Tensor  # the same as [B, 2, H, blocks of a row, block_size, D]
    target: torch.Tensor  # float32, of that shape
    k: torch.Tensor  # the target as [B, H, L, D]
    v: torch.Tensor


class CPUAttention:
    """Plans how the tokens of a pass attend, with buffers that live as long as the engine.

    Args:
        block_size: tokens per KV block.
        num_heads, head_dim, dtype: of the cache.
    """

    def __init__(self, block_size: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.block_size, self.num_heads, self.head_dim = block_size, num_heads, head_dim
        self._gathered = torch.empty(0, dtype=dtype)
        self._float = torch.empty(0)

    def plan(
        self, block_tables: torch.Tensor, query_lens: Sequence[int], context_lens: Sequence[int]
    ) -> "CPUAttentionPlan":
        """Args: as in ``reference.paged_attention``."""
        size = self.block_size
        chunks, rows, sequences, start = [], [], [], 0
        for i, (new, old) in enumerate(zip(query_lens, context_lens, strict=True)):
            if new == 1:
                rows.append(start)
                sequences.append(i)
            else:
                blocks = block_tables[i, : -(-(old + new) // size)]
                mask = causal_mask(new, old, block_tables.device) if old else None
                chunks.append(_Chunk(start, start + new, old + new, blocks, mask))
            start += new
        lengths = np.array(context_lens, dtype=np.int64)[sequences] + 1
        order = np.argsort(lengths, kind="stable")
        tables = block_tables.numpy()[np.array(sequences, dtype=np.int64)[order]]
        by_length = torch.from_numpy(np.array(rows, dtype=np.int64)[order])
        groups = self._groups(tables, lengths[order])
        return CPUAttentionPlan(chunks, groups, by_length, start)

    def plan_decode(self, block_tables: torch.Tensor, lengths: torch.Tensor) -> "CPUAttentionPlan":
        """Here the host is the device: lengths are read."""
        return self.plan(block_tables, [1] * len(lengths), (lengths - 1).tolist())

    def _groups(self, tables: Ints, lengths: Ints) -> list[_Group]:
        """Cut rows, which come by ascending length, so that little is padded and all stays close."""
        widths = -(-lengths // self.block_size)
        elements = self.block_size * self.num_heads * self.head_dim
        most, cuts = GROUP_ELEMENTS // elements, [0]
        for i, width in enumerate(widths.tolist()):
            if (i + 1 - cuts[-1]) * width > most and i > cuts[-1]:
                cuts.append(i)
        ranges = [(a, b) for a, b in pairwise([*cuts, len(lengths)]) if b > a]
        need = 2 * elements * max((int(widths[b - 1]) * (b - a) for a, b in ranges), default=0)
        if need > self._float.numel():
            self._gathered = torch.empty(need, dtype=self._gathered.dtype)
            self._float = torch.empty(need)
        return [self._group(tables, lengths, a, b, int(widths[b - 1])) for a, b in ranges]

    def _group(self, tables: Ints, lengths: Ints, first: int, last: int, width: int) -> _Group:
        size, heads, dim, rows = self.block_size, self.num_heads, self.head_dim, last - first
        blocks = torch.from_numpy(tables[first:last, :width].ravel())
        past = np.arange(width * size) >= lengths[first:last, None]
        mask = torch.from_numpy(np.where(past, np.float32(NEG_INF), np.float32(0)))
        stale = np.flatnonzero(past)
        stale = stale + stale // size * size  # as rows of [N, 2, block_size]: keys
        stale = np.concatenate([stale, stale + size])
        elements = 2 * rows * width * size * heads * dim
        gathered, target = self._gathered[:elements], self._float[:elements]
        shape = (rows, 2, heads, width * size, dim)
        return _Group(
            first,
            last,
            blocks,
            mask[:, None, None],
            torch.from_numpy(stale) if len(stale) else None,
            gathered.view(len(blocks), -1),
            gathered.view(-1, heads * dim),
            gathered.view(rows, width, 2, size, heads, dim).permute(0, 2, 4, 1, 3, 5),
            target.view(rows, 2, heads, width, size, dim),
            target.view(shape)[:, 0],
            target.view(shape)[:, 1],
        )


@dataclass(frozen=True)
class CPUAttentionPlan:
    """How one pass attends; the same for every layer. Made by ``CPUAttention.plan``."""

    chunks: list[_Chunk]
    groups: list[_Group]
    rows: torch.Tensor  # int64, the rows of all groups
    num_tokens: int

    def __call__(self, q_THD: torch.Tensor, kv_cache: torch.Tensor, scale: float) -> torch.Tensor:
        """As ``reference.paged_attention``; [T, H, D]."""
        if self.num_tokens == 1:
            return _decode(self.groups[0], q_THD, kv_cache, scale)
        out = torch.empty_like(q_THD)
        for chunk in self.chunks:
            q = q_THD[chunk.start : chunk.stop].transpose(0, 1)
            k, v = gather_kv(kv_cache, chunk.blocks, chunk.length)
            ctx = F.scaled_dot_product_attention(
                q[None], k[None], v[None],
                attn_mask=chunk.mask, is_causal=chunk.mask is None, scale=scale,
            )  # fmt: skip
            out[chunk.start : chunk.stop] = ctx[0].transpose(0, 1)
        if self.groups:
            q = q_THD[self.rows]
            parts = [_decode(g, q[g.first : g.last], kv_cache, scale) for g in self.groups]
            out.index_copy_(0, self.rows, torch.cat(parts))
        return out


def _decode(
    group: _Group, q_BHD: torch.Tensor, kv_cache: torch.Tensor, scale: float
) -> torch.Tensor:
    torch.index_select(kv_cache.flatten(1), 0, group.blocks, out=group.gathered)
    if group.stale is not None:
        # What an earlier sequence left there may be NaN: NaN - inf and 0 x NaN are both NaN.
        group.tokens.index_fill_(0, group.stale, 0)
    group.target.copy_(group.source)
    q = q_BHD.float().unsqueeze(2)
    ctx = F.scaled_dot_product_attention(q, group.k, group.v, attn_mask=group.mask, scale=scale)
    return ctx.squeeze(2).to(q_BHD.dtype)
