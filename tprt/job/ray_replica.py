"""Replicas of the model on a Ray cluster: one actor each, which owns its GPUs and starts its ranks.

The actor is the only thing that Ray schedules, so a replica is all there or not at all. Ray restarts
nothing by itself: what was in flight on a replica that died is known here alone, and so is whether a
record is to blame. Ray is imported where it is used, so that the module can be read without it. Knows
records, actors and results; no files.
"""

import contextlib
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tprt.errors import CheckpointError, ConfigError, OutOfMemoryPlan, PeerLost, TprtError
from tprt.job.records import Record
from tprt.job.replica import error_result
from tprt.job.replica_process import ReplicaProcess
from tprt.job.work_queue import Result
from tprt.log import get_logger

logger = get_logger(__name__)

# A call of `exchange` lasts so long when there is no result.
EXCHANGE_SECONDS = 1.0
CLOSE_SECONDS = 30.0
# A replica that dies so often in a row, with no result in between, is no record's doing. A record that
# kills it gets its error record at the fourth time: two in company, two alone.
MAX_DEATHS = 8
DEATHS_IN_COMPANY, DEATHS_ALONE = 2, 2
# At its start; every one of these costs the loading of a model.
MAX_FAILED_STARTS = 2
# What a new start would not change.
FINAL = (ConfigError, CheckpointError, OutOfMemoryPlan)

Reply = tuple[list[Result], list[str] | None]


class ReplicaActor:
    """What runs as an actor: a ``ReplicaProcess``, and the end of this process when a rank ends.

    Args:
        number: of the replica.
        ranks, llm, threads: as ``ReplicaProcess`` takes them.
    """

    def __init__(
        self, number: int, ranks: int, llm: Mapping[str, Any], threads: int | None
    ) -> None:
        self._process = ReplicaProcess(ranks, llm, number, threads)

    def wait_until_ready(self) -> Reply:
        """Nothing, once the model is loaded, or the error."""
        try:
            self._process.wait_until_ready()
        except TprtError as error:
            return self._lost(error)
        return [], None

    def exchange(self, records: list[Record]) -> Reply:
        """Take records, give results; the error when the replica is lost."""
        for record in records:
            self._process.put(record)
        try:
            return self._process.collect(EXCHANGE_SECONDS), None
        except TprtError as error:
            return self._lost(error)

    def close(self) -> None:
        self._process.close()

    def _lost(self, error: TprtError) -> Reply:
        # When the reply is on its way: a process that is left holds GPUs.
        threading.Timer(EXCHANGE_SECONDS, os._exit, (error.exit_code,)).start()
        return [], error.to_json()


@dataclass
class _Slot:
    """One replica, whichever actor it is just now.

    Args:
        call: to it, not yet answered.
        records: in flight, by line.
        alone: one record that is suspected to kill it.
        deaths: in a row, with no result in between.
    """

    number: int
    actor: Any = None
    call: Any = None
    ready: bool = False
    records: dict[int, Record] = field(default_factory=dict)
    alone: bool = False
    deaths: int = 0
    failed_starts: int = 0


class RayReplicas:
    """The dispatcher's end of a queue, with replicas behind it that come and go.

    When a replica dies, its records go to whichever has room. Those that were in flight at two deaths
    are suspects and wait until all else is done; then each is alone on a replica, and two deaths there
    give it an error record.

    Args:
        start: makes the actor of a replica.
        count: of replicas.
        window: sequences in flight on each.
        max_deaths: of a replica in a row, with no result in between, before the job is given up.
    """

    def __init__(
        self,
        start: Callable[[int], Any],
        count: int,
        window: int,
        max_deaths: int = MAX_DEATHS,
    ) -> None:
        self._start, self.window, self.max_deaths = start, window, max_deaths
        self._waiting, self._suspects = deque[Record](), deque[Record]()
        self._results = deque[Result]()
        self._deaths, self._deaths_alone = Counter[int](), Counter[int]()  # by line
        self.slots = [_Slot(number) for number in range(count)]
        for slot in self.slots:
            self._begin(slot)

    # ------------------------------------------------------------ of the dispatcher

    def put(self, record: Record) -> None:
        if record.prompt is None:  # bad, and no replica is needed to say so
            self._results.append(error_result(record))
        else:
            self._waiting.append(record)

    def end(self) -> None:
        """Nothing more will be put."""

    def collect(self) -> Result | None:
        return self._results.popleft() if self._results else None

    # ------------------------------------------------------------ the other side

    @property
    def num_ready(self) -> int:
        return sum(slot.ready for slot in self.slots)

    def feed(self) -> None:
        """Hand records to replicas that can take a call."""
        for slot in self.slots:
            if slot.call is None:
                records = self._share(slot)
                slot.records |= {record.line: record for record in records}
                slot.call = slot.actor.exchange.remote(records)

    def receive(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds for an answer; take in all there are.

        Raises:
            TprtError: what a new start of a replica would not change.
            PeerLost: a replica dies again and again.
        """
        import ray

        calls = [slot.call for slot in self.slots if slot.call is not None]
        answered, _ = ray.wait(calls, num_returns=1, timeout=timeout)
        if answered:  # and whoever else has answered by now
            answered, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        for slot in self.slots:
            if slot.call in answered:
                self._take_answer(slot)

    def close(self, clean: bool) -> None:
        """End the replicas.

        Args:
            clean: let those that are ready end by themselves; nothing is in flight.
        """
        import ray

        if clean:
            ended = [slot.actor.close.remote() for slot in self.slots if slot.ready]
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(ended, timeout=CLOSE_SECONDS)
        for slot in self.slots:
            ray.kill(slot.actor)  # its ranks see it go and end too

    def _begin(self, slot: _Slot) -> None:
        slot.actor, slot.ready, slot.alone = self._start(slot.number), False, False
        slot.call = slot.actor.wait_until_ready.remote()

    def _share(self, slot: _Slot) -> list[Record]:
        if slot.alone:
            return []
        room = self.window - sum(record.params.n for record in slot.records.values())
        found: list[Record] = []
        while room > 0 and self._waiting:
            found.append(self._waiting.popleft())
            room -= found[-1].params.n
        if not found and not slot.records and self._suspects:
            slot.alone = True
            return [self._suspects.popleft()]
        return found

    def _take_answer(self, slot: _Slot) -> None:
        import ray

        call, slot.call = slot.call, None
        try:
            results, raw = ray.get(call)
        except ray.exceptions.RayError as error:
            self._lost(slot, _cause(error))
            return
        if raw is not None:
            told = TprtError.from_json(raw)
            if not slot.ready and isinstance(told, FINAL):
                raise told
            self._lost(slot, told.what)
            return
        slot.ready, slot.failed_starts = True, 0
        for result in results:
            self._done(slot, result)

    def _done(self, slot: _Slot, result: Result) -> None:
        slot.deaths = 0
        slot.records.pop(result.line, None)
        slot.alone = slot.alone and bool(slot.records)
        for counts in (self._deaths, self._deaths_alone):
            del counts[result.line]
        self._results.append(result)

    def _lost(self, slot: _Slot, cause: str) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(slot.actor)  # it may be here still, unable to do anything
        slot.deaths += 1
        slot.failed_starts += not slot.ready
        if slot.deaths >= self.max_deaths or slot.failed_starts >= MAX_FAILED_STARTS:
            raise PeerLost(
                f"replica {slot.number} died {slot.deaths} times in a row; last: {cause}",
                where="while it loaded the model" if not slot.ready else "",
                hint="look at its node and the messages above; the same command resumes",
            )
        logger.warning(
            "replica %d was lost with %d records in flight, which are tried again: %s",
            slot.number, len(slot.records), cause,
        )  # fmt: skip
        records, slot.records = list(slot.records.values()), {}
        for record in reversed(records):
            self._try_again(slot, record, cause)
        self._begin(slot)

    def _try_again(self, slot: _Slot, record: Record, cause: str) -> None:
        if slot.alone:
            self._deaths_alone[record.line] += 1
            if self._deaths_alone[record.line] >= DEATHS_ALONE:
                logger.warning("record %s (line %d) is given up", record.id, record.line)
                given_up = record.failed(
                    f"given up: a replica died {DEATHS_ALONE} times while it computed this record "
                    f"alone; last: {cause}"
                )
                self._done(slot, error_result(given_up, slot.number))
            else:
                self._suspects.appendleft(record)
            return
        self._deaths[record.line] += 1
        if self._deaths[record.line] >= DEATHS_IN_COMPANY:
            self._suspects.append(record)
        else:
            self._waiting.appendleft(record)


def _cause(error: Exception) -> str:
    """Ray explains itself in paragraphs; the first sentence that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    told = next((line for line in lines if line.startswith("The actor is dead")), lines[0])
    return f"{type(error).__name__}: {told.partition('. ')[0][:300]}"
