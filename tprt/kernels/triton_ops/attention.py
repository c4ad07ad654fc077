"""Which kernel serves which tokens of a pass over a paged cache.

Rows with one new token go to ``decode_attention``, or where a pass has nothing else to
``fused_attention``, which does what comes before as well; chunks of prompts go to ``prefill_attention``,
to its Triton kernel, or to torch's SDPA where that is faster. What kernels need to know of a pass is
laid out on the host once, for all layers, and uploaded in one copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from tprt.kernels.interface import HeadNorms
from tprt.kernels.triton_ops import decode_attention as decode
from tprt.kernels.triton_ops import fused_attention as fused
from tprt.kernels.triton_ops import prefill_attention as prefill

PrefillBody = Literal["auto", "triton", "sdpa"]
Ints = npt.NDArray[np.int32]

# New tokens from which on gathering keys and values for SDPA is worth its copy.
SDPA_MIN_TOKENS = 512


@dataclass(frozen=True)
class _DecodeRows:
    """See ``decode_attention``; with counters, rows that ``qk_rope_attention`` can serve."""

    jobs: torch.Tensor
    max_chunks: int
    partials: decode.Partials | None
    counters: torch.Tensor | None


@dataclass(frozen=True)
class _Tiles:
    """Chunks of one tiling. See ``prefill_attention``."""

    how: prefill.Tiling
    tiles: torch.Tensor


@dataclass(frozen=True)
class _Chunk:
    """Rows ``start`` to ``stop``, the last new tokens of a sequence, for ``sdpa_attention``."""

    start: int
    stop: int
    length: int
    places: torch.Tensor


@dataclass(frozen=True)
class TritonAttentionPlan:
    """How one pass attends; the same for every layer. Made by ``TritonAttention``."""

    block_tables: torch.Tensor
    rows: _DecodeRows | None
    tiles: tuple[_Tiles, ...] = ()
    chunks: tuple[_Chunk, ...] = ()

    def __call__(self, q_THD: torch.Tensor, kv_cache: torch.Tensor, scale: float) -> torch.Tensor:
        """As ``reference.paged_attention``; contiguous [T, H, D]."""
        out = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        tables = self.block_tables
        for chunk in self.chunks:
            rows = slice(chunk.start, chunk.stop)
            prefill.sdpa_attention(
                q_THD[rows], kv_cache, chunk.places, chunk.length, out[rows], scale
            )
        for group in self.tiles:
            prefill.prefill_attention(q_THD, kv_cache, tables, group.tiles, group.how, out, scale)
        if self.rows is not None:
            jobs, max_chunks, partials = self.rows.jobs, self.rows.max_chunks, self.rows.partials
            decode.decode_attention(q_THD, kv_cache, tables, jobs, out, scale, max_chunks, partials)
        return out

    @property
    def fuses(self) -> bool:
        """Whether each sequence has one new token, in order, so that one kernel does it all."""
        return self.rows is not None and self.rows.counters is not None

    def fused(
        self,
        qkv: torch.Tensor,
        norms: HeadNorms | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """As ``Kernels.attend``, of the same bits, in one kernel; ``fuses`` says whether it may."""
        rows = self.rows
        assert rows is not None and rows.counters is not None
        return fused.qk_rope_attention(
            qkv, norms, cos, sin, kv_cache, slot_mapping, self.block_tables, rows.jobs, scale,
            rows.max_chunks, rows.partials, rows.counters,
        )  # fmt: skip


class TritonAttention:
    """See ``interface.AttentionPlanner``.

    The result of a row with one new token has the same bits in any batch and from either method.

    Args:
        block_size: tokens per KV block. num_heads, head_dim, dtype: of the cache.
        device: a GPU, or the CPU under TRITON_INTERPRET=1.

    Attributes:
        prefill_body: what serves chunks. "auto" is "sdpa" on a GPU for chunks of SDPA_MIN_TOKENS or
            more with nothing cached before them, and else "triton".
    """

    def __init__(
        self,
        block_size: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size, self.num_heads, self.head_dim = block_size, num_heads, head_dim
        self.dtype, self.device = dtype, device
        self.prefill_body: PrefillBody = "auto"
        self.counters = fused.zero_counters(num_heads, head_dim, dtype, device)

    def plan(
        self, block_tables: torch.Tensor, query_lens: Sequence[int], context_lens: Sequence[int]
    ) -> TritonAttentionPlan:
        """Args: as in ``reference.paged_attention``."""
        jobs: list[tuple[int, int, int, int]] = []
        chunks: list[_Chunk] = []
        groups: dict[prefill.Tiling, list[Ints]] = {}
        start = num_partials = max_chunks = 0
        for i, (new, old) in enumerate(zip(query_lens, context_lens, strict=True)):
            if new == 1:
                jobs.append((start, i, old + 1, num_partials))
                count = -(-(old + 1) // decode.CHUNK)
                num_partials, max_chunks = num_partials + count, max(max_chunks, count)
            elif self._takes_sdpa(new, old):
                blocks = block_tables[i, : -(-(old + new) // self.block_size)]
                places = prefill.gather_places(blocks)
                chunks.append(_Chunk(start, start + new, old + new, places))
            else:
                how = prefill.tiling(new, self.dtype)
                groups.setdefault(how, []).append(
                    prefill.make_tiles(start, i, new, old, how.block_m)
                )
            start += new
        tiles = [prefill.longest_first(np.concatenate(each)) for each in groups.values()]
        words = self._upload(np.array(jobs, dtype=np.int32).reshape(-1, 4), *tiles)
        return TritonAttentionPlan(
            block_tables,
            self._rows(words[0], max_chunks, num_partials, None) if jobs else None,
            tuple(_Tiles(how, each) for how, each in zip(groups, words[1:], strict=True)),
            tuple(chunks),
        )

    def plan_decode(self, block_tables: torch.Tensor, lengths: torch.Tensor) -> TritonAttentionPlan:
        """As in ``interface.AttentionPlanner``; programs and memory for the longest the tables hold."""
        max_chunks = -(-block_tables.shape[1] * self.block_size // decode.CHUNK)
        at_once = decode.rows_at_once(len(lengths), max_chunks, self.num_heads, self.head_dim)
        return TritonAttentionPlan(
            block_tables, self._rows(lengths, max_chunks, at_once * max_chunks, self.counters)
        )

    def _rows(
        self,
        jobs: torch.Tensor,
        max_chunks: int,
        num_partials: int,
        counters: torch.Tensor | None,
    ) -> _DecodeRows:
        if max_chunks == 1:
            return _DecodeRows(jobs, 1, None, counters)
        # For all layers, which run one after the other; freed with the plan.
        partials = decode.empty_partials(num_partials, self.num_heads, self.head_dim, self.device)
        return _DecodeRows(jobs, max_chunks, partials, counters)

    def _takes_sdpa(self, new: int, old: int) -> bool:
        if self.prefill_body == "auto":
            return self.device.type == "cuda" and new >= SDPA_MIN_TOKENS and old == 0
        return self.prefill_body == "sdpa"

    def _upload(self, *parts: Ints) -> list[torch.Tensor]:
        """int32 [n, 4] each, in one copy; every row begins at a multiple of 16 bytes."""
        host = torch.from_numpy(np.concatenate(parts))
        if self.device.type == "cuda" and len(host):
            # Pageable memory would make the copy wait for everything before it.
            host = host.pin_memory().to(self.device, non_blocking=True)
        return list(host.split([len(part) for part in parts]))
