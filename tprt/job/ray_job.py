"""The batch job whose replicas are elsewhere, on Ray: one attempt at it, in the process that writes.

Reading, journal, status and output are those of ``tprt generate``; what differs is who computes. Knows
no flags and no YAML, and starts no Ray.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from tprt.job.dispatcher import Dispatcher
from tprt.job.generate import Dispatched, Job, JobReport, JobRun
from tprt.job.input_file import InputFile
from tprt.job.journal import Journal
from tprt.job.progress import JobProgress
from tprt.job.ray_replica import RayReplicas
from tprt.job.replica import window_of
from tprt.log import get_logger

logger = get_logger(__name__)

RECEIVE_SECONDS = 0.5
SECONDS_BETWEEN_REMINDERS = 60.0


class RayJob(JobRun):
    """Args:
    start: makes the actor of a replica (``ReplicaActor``), given its number.
    """

    def __init__(self, job: Job, start: Callable[[int], Any]) -> None:
        super().__init__(job, None)
        self.start = start

    def compute(self, make_llm: Any, source: InputFile, total: int) -> JobReport:
        job, journal = self.job, self.journal
        assert journal is not None
        self.has_begun = True
        window, began = window_of(job.max_num_seqs), time.monotonic()
        pool, clean = RayReplicas(self.start, job.replicas, window), False
        try:
            work = Dispatcher(
                source,
                job.defaults,
                job.seed,
                job.shard,
                cast(Journal, _WithoutBegins(journal)),
                pool,
                window * job.replicas,
            )
            with JobProgress(
                total,
                journal.num_done,
                resumed_tokens=journal.tokens,
                log_format=job.log_format,
                status=self.status,
            ) as shown:
                self._exchange(work, pool, shown)
            clean = True
        finally:
            pool.close(clean)
        loading = self.seconds.get("loading", 0.0)
        self.seconds["generating"] = time.monotonic() - began - loading
        return self.finish(self.write(), Dispatched.of(work))

    def _exchange(self, work: Dispatcher, pool: RayReplicas, shown: JobProgress) -> None:
        """Until every record has its result."""
        journal, status = self.journal, self.status
        assert journal is not None and status is not None
        began = reminded = time.monotonic()
        while not work.over:
            work.pump()
            pool.feed()
            pool.receive(RECEIVE_SECONDS)
            now = time.monotonic()
            if pool.num_ready and "loading" not in self.seconds:
                self.seconds["loading"] = now - began
                status.enter("running")
            elif not pool.num_ready and now - reminded > SECONDS_BETWEEN_REMINDERS:
                reminded = now
                logger.info("no replica is ready after %.0f s", now - began)
            shown.update(journal.num_done, journal.num_failed, work.running, journal.tokens)


class _WithoutBegins:
    """A journal that does not note what goes in flight, as no record can end this process.

    When it is killed, hundreds may be out on the replicas; the next attempt need not try them alone.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def begin(self, lines: Sequence[int], alone: bool = False) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._journal, name)
