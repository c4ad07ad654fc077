"""The engine: rank 0 decides step by step, every rank carries out the same records.

Rank 0 schedules, sends the record of a step, runs it, and reads its tokens one step late, so that on a
device the next step is planned while this one computes. What a stop condition makes superfluous is
dropped. The other ranks sit in ``serve``. Knows sequences, records and text: no files, no prompts.
"""

import json
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from typing import Any, BinaryIO

import torch

from tprt.cache.block_manager import BlockManager
from tprt.cache.snapshots import SnapshotPool
from tprt.config import EngineConfig
from tprt.distributed.communication import gather_json
from tprt.distributed.tp_group import TPGroup
from tprt.engine.control import ControlChannel, silence_limit
from tprt.engine.logprobs import LogprobLists
from tprt.engine.model_runner import ModelRunner
from tprt.engine.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs
from tprt.engine.record_builder import build_record
from tprt.engine.scheduler import Scheduler, StepPlan
from tprt.engine.sequence import Request, Sequence
from tprt.engine.step_record import Kind, StepRecord
from tprt.engine.step_result import StepResult
from tprt.errors import PeerLost, RankMismatch, TprtError
from tprt.faults import fault_point
from tprt.kernels.noise import NON_FINITE
from tprt.tokenizer import Detokenizer, Tokenizer

CLOSE_TIMEOUT = timedelta(seconds=60)  # ranks in ``follow`` listen, or end a step


class LLMEngine:
    """Args:
    num_blocks: KV blocks, block 0 included; the same on every rank.
    record_file: gets every record; rank 0 only.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        config: EngineConfig,
        num_blocks: int,
        tp: TPGroup,
        record_file: BinaryIO | None = None,
    ) -> None:
        self.runner, self.tokenizer, self.config, self.tp = runner, tokenizer, config, tp
        self.blocks = BlockManager(num_blocks, config.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.blocks,
            config.block_size,
            runner.max_num_seqs,
            config.max_num_batched_tokens,
            SnapshotPool(range(runner.max_num_seqs + 1, runner.num_states)),
            runner.is_paged,
        )
        self.control = ControlChannel(tp, record_file)
        self.num_records = self.num_arrivals = 0
        self.broken = False  # the ranks are in different states; nothing here is to be trusted
        self._in_flight: deque[tuple[StepPlan, StepResult]] = deque()  # rank 0
        self._begun: list[StepPlan] = []  # the plan that is being sent and run
        self._following: deque[StepResult] = deque()  # the others
        if record_file is not None:
            text = json.dumps(self.facts()).encode()
            self.control.keep(StepRecord(step=0, kind=Kind.OPEN, text=text))

    # ------------------------------------------------------------ rank 0: sequences and steps

    def add(self, request: Request, wants_logits: bool = False) -> list[Sequence]:
        """Queue a request that fits; its completions, in the order of ``index``."""
        made: list[Sequence] = []
        for index in range(request.params.n):
            made.append(
                Sequence(
                    request=request,
                    arrival=self.num_arrivals,
                    index=index,
                    leader=made[0] if made else None,
                    detokenizer=Detokenizer(
                        self.tokenizer, skip_special_tokens=request.params.skip_special_tokens
                    ),
                    wants_logits=wants_logits,
                )
            )
            self.scheduler.add(made[-1])
        self.num_arrivals += 1
        return made

    @property
    def capacity(self) -> str:
        """For people: what sequences can take."""
        if self.runner.is_paged:
            return f"{self.blocks.capacity} KV blocks of {self.config.block_size} tokens"
        snapshots = self.scheduler.snapshots.capacity
        return f"state of {self.runner.max_num_seqs} sequences, {snapshots} snapshots"

    @property
    def idle(self) -> bool:
        return self.scheduler.idle and not self._in_flight

    def step(self) -> list[Sequence]:
        """Plan, send and run one step, and read an earlier one; the sequences that have ended."""
        self.tp.progress.enter("schedule")
        ended = self._step()
        self.tp.progress.enter("idle")  # what the caller does between steps is its own business
        return ended

    def _step(self) -> list[Sequence]:
        ahead = self._look_ahead(self.scheduler.running)
        ended = self._read_all() if len(self._in_flight) > ahead else []
        if not self._in_flight:
            self.scheduler.release_idle()
        plan = self.scheduler.schedule()
        if not plan.rows:
            return ended + self._read_all()
        ahead = self._look_ahead(row.seq for row in plan.rows)
        record = build_record(plan, self._next_number(), self.tokenizer.end_ids, ahead)
        self._begun = [plan]
        self._in_flight.append((plan, self._execute(record, self.control.send(record))))
        self._begun = []
        while len(self._in_flight) > ahead:
            ended += self._retire()
        return ended

    def _look_ahead(self, sequences: Iterable[Sequence]) -> int:
        return 0 if any(seq.needs_host for seq in sequences) else self.config.look_ahead

    def _read_all(self) -> list[Sequence]:
        """Read every step in flight, on all ranks: where one finds a mismatch, all do."""
        ended: list[Sequence] = []
        if self._in_flight and self.tp.size > 1:
            self.control.send(StepRecord(step=self._next_number(), kind=Kind.HEARTBEAT))
        while self._in_flight:
            ended += self._retire()
        return ended

    def abort(self, sequences: list[Sequence]) -> None:
        """End sequences where they stand; their blocks return once no step uses them."""
        for seq in sequences:
            if not seq.finished:
                seq.end_text("abort")
                self.scheduler.abort(seq)

    def abort_all(self) -> None:
        """After an interrupted call: nothing of it may remain, nor be taken for computed."""
        self.scheduler.abandon([plan for plan, _ in self._in_flight] + self._begun)
        self._in_flight.clear()
        self._begun = []
        self.abort([*self.scheduler.waiting, *self.scheduler.running])
        self.scheduler.release_idle()

    def _next_number(self) -> int:
        self.num_records += 1
        return self.num_records - 1

    def _retire(self) -> list[Sequence]:
        plan, result = self._in_flight.popleft()
        tokens = self._check(result)
        self._keep_logprobs(plan, result, tokens)
        return self.scheduler.retire(plan, tokens, self._take)

    def _check(self, result: StepResult) -> list[int]:
        try:
            return result.check(self.tp.progress)
        except RankMismatch:
            self.broken = True
            raise
        except PeerLost:
            self.broken = True
            self.tp.abort()  # a kernel that waits for a peer would never give the device back
            raise

    def _take(self, seq: Sequence, token: int) -> bool:
        if seq.max_tokens == 0:
            seq.finish_reason = "length"
            return True
        return seq.append(token, self.tokenizer.end_ids)

    def _keep_logprobs(self, plan: StepPlan, result: StepResult, tokens: list[int]) -> None:
        logits = iter(result.logits)
        scored = (found.to_lists() for found in result.prompt_logprobs)
        found = result.logprobs.to_lists() if result.logprobs is not None else None
        drawn = 0
        for row in plan.rows:
            seq, params = row.seq, row.seq.request.params
            if row.draws:
                if params.logprobs is not None and not seq.finished:
                    assert found is not None
                    token = tokens[drawn]
                    if token != NON_FINITE:
                        entry = self._entry(token, found, drawn, params.logprobs)
                        seq.logprobs.append(entry)
                drawn += 1
            if seq.wants_logits:
                seq.logits.append(next(logits))
            wanted = params.prompt_logprobs
            if wanted is not None and seq.index == 0 and row.start < seq.num_prompt_tokens - 1:
                self._keep_prompt(seq, row.start, row.count, next(scored), wanted)

    def _keep_prompt(
        self, seq: Sequence, start: int, count: int, found: LogprobLists, wanted: int
    ) -> None:
        del seq.prompt_logprobs[start:]  # computed again after a preemption
        for i in range(min(count, seq.num_prompt_tokens - 1 - start)):
            token = seq.ids[start + i + 1]
            seq.prompt_logprobs.append(self._entry(token, found, i, wanted))

    def _entry(self, token: int, found: LogprobLists, row: int, wanted: int) -> TokenLogprobs:
        def one(token: int, value: float, rank: int) -> Logprob:
            # As a part of a text: with its blank in front, and special pieces by their name.
            piece = Detokenizer(self.tokenizer, skip_special_tokens=False)
            return Logprob(value, rank, piece.push([token]) + piece.finish())

        entry = {token: one(token, found.target[row], found.rank[row])}
        likeliest = zip(found.top_ids[row][:wanted], found.top[row][:wanted], strict=True)
        for rank, (other, value) in enumerate(likeliest, start=1):
            if other not in entry:
                entry[other] = one(other, value, rank)
        return entry

    def facts(self) -> dict[str, Any]:
        """What a recorded run depends on, for the head of a record file."""
        return {
            "model": repr(self.runner.model.config),
            "engine": repr(self.config),
            "block_size": self.config.block_size,
            "max_num_seqs": self.runner.max_num_seqs,
            "num_blocks": self.blocks.num_blocks,
            "tensor_parallel_size": self.tp.size,
        }

    def run_record(self, record: StepRecord) -> list[int]:
        """Rank 0: send a STEP record that was made elsewhere, run it, and wait for its tokens."""
        record = replace(record, step=self._next_number(), look_ahead=0)
        return self._check(self.runner.execute(record, self.control.send(record)))

    # ------------------------------------------------------------ calls

    def begin_call(self, name: str) -> None:
        """Rank 0 opens a call; the others must be in the same one, or in ``serve(None)``.

        Raises:
            RankMismatch: on every rank, when another rank is in a different call.
        """
        if self.tp.rank == 0:
            text = name.encode()
            self._enter_call(name)
            self.control.send(StepRecord(step=self._next_number(), kind=Kind.CALL, text=text))
        self._agree_on_call(name)

    def _enter_call(self, name: str) -> None:
        self.tp.progress.enter(name)
        fault_point(f"call.{name}")

    def _agree_on_call(self, name: str | None) -> None:
        for rank, other in enumerate(calls := gather_json(name, self.tp)):
            if other is not None and other != calls[0]:
                raise RankMismatch(
                    f"rank 0 is in {calls[0]}() and rank {rank} in {other}()",
                    hint="make the same calls in the same order on every rank, "
                    "or let ranks above 0 sit in follow()",
                )

    @property
    def wants_answer(self) -> bool:
        """Whether anybody reads what a call returns: other ranks, or the record file."""
        return self.tp.size > 1 or self.control.record_file is not None

    def end_call(self, value: Any = None, error: TprtError | None = None) -> None:
        """Rank 0 closes a call and hands its results, JSON-able, or its error to the others."""
        answer = {"value": value, "error": error and error.to_json()}
        text = json.dumps(answer).encode() if self.wants_answer else b""
        self.control.send(StepRecord(step=self._next_number(), kind=Kind.RETURN, text=text))
        self.tp.progress.enter("idle")

    def close(self) -> None:
        """Rank 0 lets the others leave ``follow``, where all are in it; every rank destroys its graphs.

        Raises:
            PeerLost: they could not be told, and no call has said so yet.
        """
        try:
            if self.tp.rank == 0:
                self._dismiss()
        finally:
            self.runner.close()

    def _dismiss(self) -> None:
        self.control.end_heartbeats()
        # After a mismatch they have left ``follow``: nobody would receive anything. After any other
        # failure they are to end because of it, not in peace.
        well = not self.broken and not self.control.lost and self.tp.progress.failure is None
        if well and self.control.followed():
            record = StepRecord(step=self._next_number(), kind=Kind.CLOSE)
            self.control.send(record, CLOSE_TIMEOUT)

    def serve(self, name: str | None) -> tuple[Any, list[torch.Tensor]]:
        """Ranks above 0: carry out records until call ``name`` returns; its value and logits.

        With ``name`` None any call is served, until rank 0 closes.

        Raises:
            RankMismatch: rank 0 is in another call, or computes something else.
            TprtError: what rank 0's call ended with.
        """
        logits: list[torch.Tensor] = []
        timeout: timedelta | None = None  # of a follower that has heard a heartbeat
        call = "idle"
        while True:
            self.tp.progress.enter(call)
            record, checksum = self.control.receive(timeout)
            if name is None:
                timeout = silence_limit(record) or timeout
            if record.kind == Kind.CALL:
                self._enter_call(call := record.text.decode())
                self._agree_on_call(name)
            elif record.kind == Kind.STEP:
                self._following.append(self._execute(record, checksum))
                self._flush(keep=record.look_ahead, logits=logits)
            else:
                self._flush(keep=record.look_ahead, logits=logits)
                if record.kind == Kind.CLOSE:
                    if name is None:
                        return None, []
                    raise RankMismatch(
                        f"rank 0 was closed while rank {self.tp.rank} is in {name}()",
                        hint="make the same calls in the same order on every rank",
                    )
                if record.kind == Kind.HEARTBEAT:
                    continue
                call = "idle"
                answer = json.loads(record.text)
                if name is not None:
                    self.tp.progress.enter("idle")
                    if answer["error"] is not None:
                        raise TprtError.from_json(answer["error"])
                    return answer["value"], logits
                logits.clear()

    def _execute(self, record: StepRecord, checksum: int) -> StepResult:
        try:
            return self.runner.execute(record, checksum)
        except BaseException:
            self.broken = self.tp.size > 1  # this rank has left the others in the middle of a step
            raise

    def _flush(self, keep: int, logits: list[torch.Tensor]) -> None:
        while len(self._following) > keep:
            result = self._following.popleft()
            self._check(result)
            logits += result.logits

    # ------------------------------------------------------------ results

    def collect(self, sequences: list[Sequence]) -> RequestOutput:
        """The output of one request, from all of its finished completions."""
        leader = sequences[0]
        request = leader.request
        outputs = []
        for seq in sequences:
            assert seq.finish_reason is not None
            logprobs = seq.logprobs if request.params.logprobs is not None else None
            outputs.append(
                CompletionOutput(
                    seq.index, seq.text, seq.token_ids, seq.finish_reason, seq.stop_reason, logprobs
                )
            )
        prompt = None
        if request.params.prompt_logprobs is not None:
            prompt = [None, *leader.prompt_logprobs]
        return RequestOutput(request.prompt_token_ids, outputs, prompt, leader.num_cached_tokens)
