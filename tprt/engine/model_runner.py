"""Carries out step records on one rank: resolves them against its own state, runs the model, draws.

Rank 0 and the others do exactly the same here. A step in which every row has one token goes through
``GraphRunner``; steps with chunks of prompts, or with logits of prompts to return, are launched one
operation after the other. Both leave the drawn tokens on the device, where the next step finds them.
Owns the KV cache and the slots' state. Knows records and tensors: not how sequences are chosen, no text,
no files.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from tprt.batch import ForwardBatch, PagedBatch, Segments
from tprt.cache import allocate_caches
from tprt.cache.kv_cache import KVCache, PagedKVSpec
from tprt.distributed.communication import all_gather
from tprt.distributed.tp_group import TPGroup
from tprt.engine.digest import FIELDS, digest
from tprt.engine.graph_runner import DecodeBuffers, GraphRunner
from tprt.engine.logprobs import MAX_LOGITS, Logprobs, token_logprobs
from tprt.engine.sampler import DrawRows, Sampler
from tprt.engine.slot_state import SlotState
from tprt.engine.step_record import (
    ALL_LOGITS,
    DRAW,
    MAX_BUCKET,
    PROMPT_LOGPROBS,
    Ints,
    Kind,
    SlotOptions,
    StepRecord,
    bucket_of,
)
from tprt.engine.step_result import StepResult
from tprt.engine.transfer import download, upload
from tprt.errors import PeerLost, StepTimeout
from tprt.faults import fault_point
from tprt.kernels import AttentionPlanner, kernels_for
from tprt.log import get_logger
from tprt.models import CausalLM

logger = get_logger(__name__)

# For the largest steps, their kernels' compilation included, and for the last step to end.
START_SECONDS, CLOSE_SECONDS = 300.0, 10.0


def warm_up_shapes(max_tokens: int, max_model_len: int, max_rows: int) -> list[list[int]]:
    """Tokens of each row: of the most tokens, of chunks of each length class, of the most rows.

    Kernels for prompts are compiled for chunks of up to 16, up to 64 and more tokens.
    """
    longest = min(max_tokens, max_model_len)
    most = [longest] * min(max_tokens // longest, max_rows)
    if len(most) < max_rows and max_tokens % longest:
        most.append(max_tokens % longest)
    chunks = [[min(length, longest)] for length in (64, 16)]
    return [most, *chunks, [1] * min(max_rows, max_tokens)]


def _kind(record: StepRecord) -> str:
    """Of steps that enter the same collectives in the same order; empty where none are alike."""
    flags = record.rows[:, 3]
    if (flags & ~DRAW).any():
        return ""  # scores prompts, with a number of collectives of its own
    return f"{record.full} {record.logprobs >= 0} {bool((flags & DRAW).any())}"


class ModelRunner:
    """Args:
    num_blocks: KV blocks on this rank; must be the same on every rank.
    num_states: rows of slot caches; those past the slots and the one of padding are for snapshots.
    max_num_seqs: slots.
    max_model_len: longest sequence.
    num_valid: ids from here on are padding of the vocabulary.
    enforce_eager: run decode steps without buckets, buffers and graphs.
    step_timeout: seconds a GPU may take for a step.
    """

    def __init__(
        self,
        model: CausalLM,
        tp: TPGroup,
        dtype: torch.dtype,
        *,
        num_blocks: int,
        num_states: int = 0,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        num_valid: int,
        enforce_eager: bool = False,
        step_timeout: float = 60.0,
    ) -> None:
        self.model, self.tp, self.block_size = model, tp, block_size
        self.step_timeout, device = step_timeout, tp.device
        self.max_num_seqs, self.num_states = max_num_seqs, num_states
        specs = model.cache_spec()
        paged = {spec for spec in specs if isinstance(spec, PagedKVSpec)}
        self.is_paged = bool(paged)
        # A stream of our own: what is captured must not run on the default one, and nothing waits for
        # the caller's work. What was allocated so far was queued on the caller's.
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.stream.wait_stream(torch.cuda.current_stream(device))
        self.attention: AttentionPlanner | None = None
        if paged:
            (spec,) = paged  # one kind of attention layer
            planner = kernels_for(device).attention
            self.attention = planner(block_size, spec.num_heads, spec.head_dim, dtype)
        self.vocab_size = model.config.vocab_size
        self.sampler = Sampler(tp, model.vocabulary, num_valid)
        self.max_model_len = max_model_len
        longest = -(-max_model_len // block_size) if paged else 1
        self.num_digests = tp.size * len(FIELDS) if tp.size > 1 else 0
        with self._on_device():
            self.caches = allocate_caches(specs, num_blocks, block_size, num_states, dtype, device)
            self.kv_caches = [cache for cache in self.caches if isinstance(cache, KVCache)]
            self.slot_caches = [cache for cache in self.caches if not isinstance(cache, KVCache)]
            # One slot more than sequences: padding rows write there.
            columns = self.sampler.part * tp.size
            self.state = SlotState(max_num_seqs + 1, longest, columns, model.vocabulary, device)
            self.no_digest = torch.empty(0, dtype=torch.int64, device=device)
            most = min(max_num_seqs, MAX_BUCKET)
            self.buffers = DecodeBuffers(bucket_of(most), self.num_digests, max_num_seqs, device)
        self.graphs: GraphRunner | None = None
        if not enforce_eager:
            all_held = tp.graphs_hold_all
            limit = MAX_BUCKET if all_held else tp.one_shot.max_rows
            self.graphs = GraphRunner(
                self._decode, most, self.stream, self._drain, limit, full=all_held
            )

    @property
    def bodies(self) -> tuple[str, str]:
        """For people: whose kernels run, and how decode steps are launched."""
        if self.graphs is None:
            return self.sampler.kernels.name, "decode steps launched one operation at a time"
        how = "CUDA graphs" if self.stream is not None else "buckets"
        sizes = f"up to {self.graphs.buckets[-1]} rows"
        return self.sampler.kernels.name, f"decode steps in {len(self.graphs.keys)} {how} {sizes}"

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Work on this rank's GPU and stream; the caller's current ones are back afterwards."""
        if self.stream is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            yield

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every graph, after which no step allocates or compiles. Collective."""
        if self.graphs is None:
            return
        with self._on_device():
            if self.stream is not None:
                self.state.make_tables()
            self.graphs.capture()

    @torch.inference_mode()
    def warm_up(self, max_num_batched_tokens: int) -> None:
        """Run the largest steps there can be, on padding alone. Collective; nothing on a CPU.

        Afterwards kernels are compiled and libraries set up, and what such steps need has been
        allocated once, so that memory which does not suffice shows at start.
        """
        if self.stream is None:
            return
        scratch = self.buffers.scratch_slot  # which is also how many others there are
        for counts in warm_up_shapes(max_num_batched_tokens, self.max_model_len, scratch):
            for full in (False, True):
                table = np.array([(scratch, 0, count, DRAW) for count in counts])
                tokens = np.zeros(sum(counts), dtype=np.int64)
                record = StepRecord(step=0, kind=Kind.STEP, rows=table, tokens=tokens, full=full)
                with self._on_device():
                    self._launch(record, 0)
        self._drain()

    def _drain(self) -> None:
        """Wait until the device has done all that was queued.

        Raises:
            StepTimeout: it does not; what it waits for has been given up.
        """
        with self._on_device():
            last = download((self.no_digest,))
        try:
            last.wait("the start", START_SECONDS, self.tp.progress.check)
        except PeerLost:
            self.tp.abort()
            raise

    def close(self) -> None:
        """Destroy the graphs. Afterwards the communicators may go."""
        if self.stream is not None:
            with self._on_device():
                last = download((self.no_digest,))
            try:
                last.wait("the last step", CLOSE_SECONDS)
            except StepTimeout:
                # A kernel that waits for a peer never ends: what it runs in cannot be destroyed.
                logger.warning(
                    "the device does not finish its last step; its graphs are left behind"
                )
                return
        if self.graphs is not None:
            self.graphs.close()

    @torch.inference_mode()
    def execute(self, record: StepRecord, checksum: int) -> StepResult:
        """Queue one STEP record. ``checksum`` is the CRC this rank found in it."""
        phase = "decode" if (record.rows[:, 2] == 1).all() else "prefill"
        # On a device collectives lie in graphs and kernels, out of sight of the host.
        kind = _kind(record) if self.stream is None else ""
        self.tp.progress.enter(phase, record.step, kind=kind)
        fault_point(phase)
        with self._on_device():
            self._apply(record)
            if self.graphs is not None and self.graphs.serves(record):
                return self._replay(self.graphs, record, checksum)
            return self._launch(record, checksum)

    def _apply(self, record: StepRecord) -> None:
        for cache in self.kv_caches if len(record.clears) else ():
            cache.kv.index_fill_(0, upload(record.clears, self.tp.device), 0)
        for source, target in record.copies.tolist():
            for cache in self.kv_caches:
                cache.kv[target] = cache.kv[source]
        for source, target in record.states.tolist():
            for kept in self.slot_caches:
                kept.copy(source, target)
        for options in SlotOptions.decode_all(record.options):
            self.state.begin(options)
        if len(record.blocks):
            slots, index, blocks = upload(record.blocks.T, self.tp.device)
            self.state.block_tables[slots, index] = blocks

    # ------------------------------------------------------------ decode steps, in buckets

    def _replay(self, graphs: GraphRunner, record: StepRecord, checksum: int) -> StepResult:
        count = len(record.rows)
        # The full kind keeps its logits, which log-probabilities are taken from.
        bucket, full = bucket_of(count), record.full or record.logprobs >= 0
        self.buffers.load(record, checksum, bucket, full)
        graphs.run(bucket, full)
        logprobs = None
        if record.logprobs >= 0:
            assert self.buffers.logits is not None
            logits, tokens = self.buffers.logits[:count], self.buffers.tokens[:count]
            logprobs = token_logprobs(logits, tokens, record.logprobs, self.sampler.ids, self.tp)
        return self._result(record.step, count, self.buffers.results, logprobs)

    def _decode(self, bucket: int, full: bool) -> None:
        """One token for each row of the bucket: from ``buffers`` into ``buffers``, caches and state.

        On a GPU this runs at start alone, inside captures: it must not look at any value.
        """
        buffers, state = self.buffers, self.state
        slots, positions, tokens = buffers.rows(bucket).unbind(0)
        drawn = state.last_tokens.index_select(0, slots).clamp_(min=0)
        input_ids = torch.where(tokens < 0, drawn, tokens)
        tables = state.block_tables.index_select(0, slots)
        mine = self.no_digest
        if self.tp.size > 1:
            mine = digest(buffers.checksum, [input_ids, positions, tables])
        batch = ForwardBatch(
            input_ids=input_ids,
            positions=positions,
            query_lens=(1,) * bucket,
            logits_rows=None,
            paged=self._paged_decode(tables, positions),
            segments=Segments(
                slots=slots, positions=positions, query_lens=(1,) * bucket, starts=None
            ),
        )
        hidden = self.model(batch, self.caches)
        rows = DrawRows(
            slots=slots,
            positions=positions + 1,
            bans=buffers.bans(bucket),
            # What a graph computes must not depend on who is in it.
            all_greedy=self.stream is None and state.sampled.isdisjoint(slots.tolist()),
        )
        if full:
            logits = self.sampler.mask_padding(self.model.compute_logits(hidden))
            buffers.keep_logits(logits)
            drawn, digests = self.sampler.full(logits, rows, state, mine)
        else:
            noise = self.sampler.noise(rows, state)
            best, ids = self.model.argmax(hidden, noise, self.sampler.num_valid)
            drawn, digests = self.sampler.plain(best, ids, mine)
        state.take(slots, drawn)
        buffers.tokens[:bucket].copy_(drawn)
        buffers.digests.copy_(digests.flatten())

    def _paged_decode(self, tables: torch.Tensor, positions: torch.Tensor) -> PagedBatch | None:
        if self.attention is None:
            return None
        size = self.block_size
        blocks = tables.gather(1, (positions // size).unsqueeze(1)).squeeze(1)
        keys = blocks * (2 * size) + positions % size
        plan = self.attention.plan_decode(tables, positions + 1)
        return PagedBatch(
            slot_mapping=torch.stack([keys, keys + size]), block_tables=tables, attention=plan
        )

    # ------------------------------------------------------------ any other step

    def _launch(self, record: StepRecord, checksum: int) -> StepResult:
        batch, draws = self._prepare(record)
        mine = self.no_digest
        if self.tp.size > 1:
            tables = self.state.block_tables[batch.segments.slots]
            crc = upload(np.array([checksum]), self.tp.device)
            mine = digest(crc, [batch.input_ids, batch.positions, tables])
        hidden = self.model(batch, self.caches)
        count = len(draws.slots)
        words, logprobs = self._draw(record, hidden[:count], draws, mine)
        scored: list[Logprobs] = []
        logits: list[torch.Tensor] = []
        if len(hidden) > count:
            scored, logits = self._score(record, hidden[count:])
        result = self._result(record.step, count, words, logprobs, scored)
        result.logits = logits
        return result

    def _result(
        self,
        step: int,
        rows: int,
        words: torch.Tensor,
        logprobs: Logprobs | None = None,
        scored: Sequence[Logprobs] = (),
    ) -> StepResult:
        return StepResult.send(
            step, rows, words, self.num_digests, self.step_timeout, logprobs, scored
        )

    def _upload(self, *arrays: Ints) -> list[torch.Tensor]:
        """Several int64 arrays of one dimension, in one copy."""
        flat = upload(np.concatenate(arrays), self.tp.device)
        return list(torch.split(flat, [len(array) for array in arrays]))

    def _prepare(self, record: StepRecord) -> tuple[ForwardBatch, DrawRows]:
        """Resolve ids, positions and places; every value is derived from the record and the state."""
        slots, starts, counts, flags = record.rows.T
        ends, size, total = np.cumsum(counts), self.block_size, len(record.tokens)
        positions = np.arange(total) + np.repeat(starts - (ends - counts), counts)
        drawing, scored = (flags & DRAW) != 0, (flags & ~DRAW) != 0
        wanted = ends[drawing] - 1
        if scored.any():
            spans = zip(ends[scored], counts[scored], strict=True)
            wanted = np.concatenate([wanted, *(np.arange(e - c, e) for e, c in spans)])
        tokens, flat_positions, flat_slots, slot_index, rows, draw_slots, draw_at, bans = (
            self._upload(
                record.tokens,
                positions,
                np.repeat(slots, counts),
                slots,
                wanted,
                slots[drawing],
                (starts + counts)[drawing],
                record.bans.ravel(),
            )
        )
        input_ids = tokens
        if (record.tokens < 0).any():
            # A token that is still on the device: what its slot drew last. A broken row drew none.
            drawn = self.state.last_tokens[flat_slots].clamp(min=0)
            input_ids = torch.where(tokens < 0, drawn, tokens)
        query_lens, context_lens = tuple(counts.tolist()), tuple(starts.tolist())
        paged = None
        if self.attention is not None:
            blocks = self.state.block_tables[flat_slots, flat_positions // size]
            keys = blocks * (2 * size) + flat_positions % size
            longest = -(-int((starts + counts).max()) // size)
            tables = self.state.block_tables[slot_index, :longest]
            plan = self.attention.plan(tables, query_lens, context_lens)
            mapping = torch.stack([keys, keys + size])
            paged = PagedBatch(slot_mapping=mapping, block_tables=tables, attention=plan)
        batch = ForwardBatch(
            input_ids=input_ids,
            positions=flat_positions,
            query_lens=query_lens,
            # In order: every token is wanted.
            logits_rows=rows if len(wanted) < total or scored.any() else None,
            paged=paged,
            segments=Segments(
                slots=slot_index,
                positions=flat_positions,
                query_lens=query_lens,
                starts=context_lens,
            ),
        )
        draws = DrawRows(
            slots=draw_slots,
            positions=draw_at,
            bans=bans.view(-1, 2),
            all_greedy=self.state.sampled.isdisjoint(slots[drawing].tolist()),
        )
        return batch, draws

    def _draw(
        self, record: StepRecord, hidden: torch.Tensor, draws: DrawRows, mine: torch.Tensor
    ) -> tuple[torch.Tensor, Logprobs | None]:
        """Tokens and digests as ``StepResult.words``, and log-probabilities of the tokens."""
        if not len(draws.slots):
            return all_gather(mine, self.tp).flatten(), None
        sampler, logits = self.sampler, None
        if record.full or record.logprobs >= 0:
            logits = sampler.mask_padding(self.model.compute_logits(hidden))
        if record.full:
            assert logits is not None
            tokens, digests = sampler.full(logits, draws, self.state, mine)
        else:
            if logits is None:
                noise = sampler.noise(draws, self.state)
                best, ids = self.model.argmax(hidden, noise, sampler.num_valid)
            else:
                best, ids = sampler.local_argmax(logits, draws, self.state)
            tokens, digests = sampler.plain(best, ids, mine)
        self.state.take(draws.slots, tokens)
        logprobs = None
        if record.logprobs >= 0:
            assert logits is not None
            logprobs = token_logprobs(logits, tokens, record.logprobs, sampler.ids, self.tp)
        return torch.cat([tokens, digests.flatten()]), logprobs

    def _score(
        self, record: StepRecord, hidden: torch.Tensor
    ) -> tuple[list[Logprobs], list[torch.Tensor]]:
        """What rows want beyond a token: log-probabilities of their positions, or all logits."""
        at = target = 0
        scored: list[Logprobs] = []
        logits: list[torch.Tensor] = []
        for _, _, count, flags in record.rows.tolist():
            if flags & ~DRAW == 0:
                continue
            row = hidden[at : at + count]
            at += count
            if flags & ALL_LOGITS:
                logits.append(self._all_logits(row))
            if flags & PROMPT_LOGPROBS:
                wanted = upload(record.targets[target : target + count], self.tp.device)
                target += count
                scored.append(self._score_row(row, wanted, record.prompt_logprobs))
        return scored, logits

    def _all_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [tokens, vocab_size] on the host."""
        parts = []
        for chunk in torch.split(hidden, self._score_rows):
            local = self.model.compute_logits(chunk)
            whole = all_gather(local, self.tp).transpose(0, 1).flatten(1)
            parts.append(self.sampler.by_id(whole).cpu())
        return torch.cat(parts)

    @property
    def _score_rows(self) -> int:
        return max(1, MAX_LOGITS // self.sampler.part)

    def _score_row(self, hidden: torch.Tensor, targets: torch.Tensor, k: int) -> Logprobs:
        parts, rows = [], self._score_rows
        chunks = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
        for chunk, wanted in chunks:
            logits = self.sampler.mask_padding(self.model.compute_logits(chunk))
            parts.append(token_logprobs(logits, wanted, k, self.sampler.ids, self.tp))
        return Logprobs.cat(parts)
