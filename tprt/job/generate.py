"""The batch job: JSONL in, JSONL out, on every rank of the launch, resumable at any moment.

Global rank 0 alone reads the input, keeps the journal and writes; the leader of each replica runs its
engine; the others follow. Knows no flags and no YAML.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tprt.distributed.environment import restarts_left
from tprt.distributed.failure import Failure
from tprt.distributed.progress import Progress
from tprt.distributed.tp_group import launch_store
from tprt.distributed.watch import Watch
from tprt.errors import EXIT_FAILED_RECORDS, EXIT_OK, ConfigError
from tprt.job.dispatcher import Dispatcher
from tprt.job.fingerprint import difference
from tprt.job.input_file import InputFacts, InputFile, Shard, scan_input
from tprt.job.journal import Journal, journal_path
from tprt.job.output_file import AtomicOutput, Written, remove_leftovers, resolved
from tprt.job.progress import JobProgress
from tprt.job.replica import Replica, window_of
from tprt.job.status_file import JobStatus, StatusFile, StatusUpdater, read_status, status_path
from tprt.job.summary import JobSummary, ReplicaShare
from tprt.job.work_queue import LocalQueue, StoreQueue
from tprt.llm import LLM
from tprt.log import get_logger
from tprt.sampling_params import SamplingParams

logger = get_logger(__name__)

IDLE_SECONDS = 0.005
LINES_PER_MOVE = 1000
FAILURE_SYNC_SECONDS = 2.0
RUN, SKIP = "run", "skip"


@dataclass(frozen=True)
class Job:
    """What is to be done, the same on every rank.

    Args:
        output: of the whole job; a shard writes beside it.
        defaults, seed: parameters of records that bring none.
        fingerprint: from what the input is, everything the texts depend on (``make_fingerprint``).
        ranks, tensor: of the launch, and those that share one replica of the model.
        max_num_seqs: of the engine.
        restart: drop what an earlier attempt has done.
    """

    input: Path
    output: Path
    defaults: SamplingParams
    fingerprint: Callable[[InputFacts], dict[str, Any]]
    max_num_seqs: int
    seed: int = 0
    shard: Shard | None = None
    ranks: int = 1
    tensor: int = 1
    restart: bool = False
    log_format: str = "text"

    @property
    def own_output(self) -> Path:
        """With all that lies beside it where the file itself is, if this is a link."""
        path = self.output if self.shard is None else self.shard.path(self.output)
        return resolved(path) if path.is_symlink() else path

    @property
    def replicas(self) -> int:
        return self.ranks // self.tensor


@dataclass
class JobReport:
    """What rank 0 knows of a job at its end.

    Args:
        first_error: of the records that failed in this attempt.
    """

    summary: JobSummary
    first_error: str = ""

    @property
    def exit_code(self) -> int:
        return EXIT_FAILED_RECORDS if self.summary.failed else EXIT_OK


def run_job(
    job: Job,
    make_llm: Callable[[list[int] | None], LLM],
    watch: Watch | None = None,
    at_failure: Callable[[Callable[[Failure], None]], None] = lambda _: None,
) -> JobReport | None:
    """Answer every record of ``job.input`` in its output; the report on rank 0, else None.

    Args:
        make_llm: called once, after input and output were found usable, with the ranks of this rank's
            replica, None for all.
        watch: over the ranks of the launch; None where this process is alone.
        at_failure: takes what is to be called before a process leaves because of a failure.

    Raises:
        ConfigError: the input cannot be read or holds an id twice, the output belongs to another job or
            to one that is running.
        OutputError: the output cannot be written; what was finished is kept.
    """
    if watch is not None and watch.rank != 0:
        at_failure(lambda failure: _speak_for_rank_0(job, failure))
        if watch.ask("job") == RUN:
            _take_part(job, make_llm, watch)
        return None
    running = JobRun(job, watch)
    at_failure(running.failed)
    return running.run(make_llm)


def _take_part(job: Job, make_llm: Callable[[list[int] | None], LLM], watch: Watch) -> None:
    """On ranks above 0: lead a replica, or follow its leader."""
    replica, place = divmod(watch.rank, job.tensor)
    with make_llm(_ranks_of(job, replica)) as llm:
        if place:
            llm.follow()
            return
        lead = Replica(llm, StoreQueue(launch_store("job")), replica, shared=True)
        while not lead.over:
            if not lead.turn():
                watch.progress.check()
                time.sleep(IDLE_SECONDS)


def _ranks_of(job: Job, replica: int) -> list[int] | None:
    if job.replicas == 1:
        return None
    return list(range(replica * job.tensor, (replica + 1) * job.tensor))


def _speak_for_rank_0(job: Job, failure: Failure) -> None:
    """Where rank 0 can say nothing any more, another rank that sees its files does."""
    if failure.rank == 0 and failure.kind not in ("exception", "interrupted"):
        status = read_status(job.own_output)
        if status is not None and not status.is_final:
            end_status(StatusUpdater(StatusFile(status_path(job.own_output)), status), failure)
        remove_leftovers(job.own_output)


def end_status(updater: StatusUpdater, failure: Failure) -> None:
    error = {k: v for k, v in asdict(failure).items() if v or k in ("rank", "step", "code")}
    state = "interrupted" if failure.interrupted else "failed"
    # A launcher that was lost starts nothing again.
    left = 0 if failure.kind == "launcher" else restarts_left(failure.code)
    updater.end(state, failure.code, error, restarts_left=left)


class JobRun:
    """One attempt at a job, on rank 0."""

    def __init__(self, job: Job, watch: Watch | None) -> None:
        self.job, self.watch = job, watch
        self.progress = Progress() if watch is None else watch.progress
        self.output = AtomicOutput(job.own_output)
        self.journal: Journal | None = None
        self.status: StatusUpdater | None = None
        self.seconds: dict[str, float] = {}
        self.has_begun = False  # in this attempt or an earlier one
        self._resumed = 0

    def run(self, make_llm: Callable[[list[int] | None], LLM]) -> JobReport:
        job = self.job
        facts = scan_input(job.input)
        total = facts.records if job.shard is None else job.shard.num_records(facts.records)
        if not total:
            logger.warning("%s holds no records: %s will be empty", job.input, job.own_output)
        fingerprint = job.fingerprint(facts)
        self.journal = journal = Journal.open(
            journal_path(job.own_output), fingerprint, restart=job.restart
        )
        # Asked with the lock held: it may have been finished while this process waited for that.
        if not job.restart and (report := self._finished_before(fingerprint)) is not None:
            journal.close(remove=True)
            self._tell(SKIP)
            return report
        self._resumed = journal.num_done
        self.has_begun = journal.attempt > 1
        self._begin_status(total, fingerprint)
        if journal.attempt > 1:
            logger.info(
                "attempt %d: %d of %d records are done already%s",
                journal.attempt, journal.num_done, total,
                f", {len(journal.suspects)} that were in flight at a crash are tried one by one first"
                if journal.suspects
                else "",
            )  # fmt: skip
        source = InputFile(job.input, facts)
        if journal.num_done == total:
            self._tell(SKIP)
            return self.finish(self.write(), Dispatched())
        self._tell(RUN)
        return self.compute(make_llm, source, total)

    def _tell(self, what: str) -> None:
        if self.watch is not None:
            self.watch.tell("job", what)

    def compute(
        self, make_llm: Callable[[list[int] | None], LLM], source: InputFile, total: int
    ) -> JobReport:
        job, journal = self.job, self.journal
        assert journal is not None and self.status is not None
        began = time.monotonic()
        with make_llm(_ranks_of(job, 0)) as llm:
            self.seconds["loading"] = time.monotonic() - began
            queue = LocalQueue() if job.replicas == 1 else StoreQueue(launch_store("job"))
            window = window_of(job.max_num_seqs) * job.replicas
            work = Dispatcher(
                source,
                job.defaults,
                job.seed,
                job.shard,
                journal,
                queue,
                window,
                self.progress.move,
            )
            self.status.enter("running")
            began = time.monotonic()
            with JobProgress(
                total,
                journal.num_done,
                resumed_tokens=journal.tokens,
                log_format=job.log_format,
                status=self.status,
            ) as shown:
                try:
                    self._generate(work, Replica(llm, queue, shared=job.replicas > 1), shown)
                finally:
                    work.stop()
            self.seconds["generating"] = time.monotonic() - began
            with llm.calling("write"):
                written = self.write()
        return self.finish(written, Dispatched.of(work))

    def _generate(self, work: Dispatcher, replica: Replica, shown: JobProgress) -> None:
        journal, progress = self.journal, self.progress
        assert journal is not None
        self.has_begun = True
        if self.job.replicas > 1:
            work.start()
        while not work.over:
            progress.check()
            if self.job.replicas == 1:
                progress.enter("records")  # reading, tokenizing, the journal
                work.pump()
            if not replica.turn():
                progress.enter("idle")
                time.sleep(IDLE_SECONDS if self.job.replicas > 1 else 0)
            tokens = journal.tokens + replica.live_tokens
            shown.update(journal.num_done, journal.num_failed, work.running, tokens)

    def write(self) -> Written:
        assert self.journal is not None and self.status is not None
        journal, began = self.journal, time.monotonic()
        self.status.enter("writing")
        self.progress.enter("write")
        journal.sync()

        def lines() -> Iterator[str]:
            for number, (_, text) in enumerate(journal.results(self.progress.move)):
                if number % LINES_PER_MOVE == 0:
                    self.progress.move()
                yield text

        written = self.output.write(lines())
        self.seconds["writing"] = time.monotonic() - began
        return written

    def finish(self, written: Written, done: "Dispatched") -> JobReport:
        journal, status = self.journal, self.status
        assert journal is not None and status is not None
        summary = JobSummary(
            records=journal.num_done,
            failed=journal.num_failed,
            new_tokens=done.new_tokens,
            output=self.job.own_output,
            seconds_loading=self.seconds.get("loading", 0.0),
            seconds_generating=self.seconds.get("generating", 0.0),
            seconds_writing=self.seconds.get("writing", 0.0),
            prompt_tokens=done.prompt_tokens,
            resumed=self._resumed,
            retried=done.retried,
            quarantined=done.quarantined,
            output_bytes=written.size,
            replicas=done.shares,
        )
        report = JobReport(summary, done.first_error)
        journal.end("finished", "")
        # The status before the journal goes: whoever comes between the two finds one of them.
        status.end(
            "finished",
            report.exit_code,
            total=journal.num_done,
            finished=journal.num_done,
            failed=journal.num_failed,
            tokens=journal.tokens,
            tokens_per_s=summary.tokens_per_s,
            output_sha256=written.sha256,
            output_size=written.size,
        )
        journal.close(remove=True)
        return report

    def _begin_status(self, total: int, fingerprint: dict[str, Any]) -> None:
        assert self.journal is not None
        journal = self.journal
        status = JobStatus.begin(
            total=total,
            finished=journal.num_done,
            failed=journal.num_failed,
            resumed=journal.num_done,
            tokens=journal.tokens,
            attempt=journal.attempt,
            ranks=self.job.ranks,
            fingerprint=fingerprint,
        )
        self.status = StatusUpdater(StatusFile(status_path(self.job.own_output)), status)

    def _finished_before(self, fingerprint: dict[str, Any]) -> JobReport | None:
        """The report of a job that is complete, with the output it wrote still in place."""
        job, status = self.job, read_status(self.job.own_output)
        assert self.journal is not None
        if self.journal.attempt > 1 or status is None or status.state != "finished":
            return None
        if status.output_sha256 != _digest(job.own_output):
            return None
        if different := difference(status.fingerprint, fingerprint):
            self.journal.close(remove=True)
            raise ConfigError(
                "the output is that of another job: " + "; ".join(different),
                where=str(job.own_output),
                hint="another --output, or --restart, which replaces it",
            )
        logger.info("%s is finished already; --restart computes it again", job.own_output)
        summary = JobSummary(
            records=status.finished,
            failed=status.failed,
            new_tokens=0,
            output=job.own_output,
            seconds_generating=0.0,
            resumed=status.finished,
            output_bytes=status.output_size or 0,
        )
        return JobReport(summary)

    def failed(self, failure: Failure) -> None:
        """Save what can be saved; on whatever thread knows that the process is about to leave."""
        if self.journal is None or (self.status is not None and self.status.status.is_final):
            return
        kind = "killed" if failure.kind == "killed" else "crash"
        if failure.from_outside or failure.code in NOT_THE_RECORDS:
            kind = "interrupted"
        try:
            self.journal.end(kind, failure.what)
            self.journal.sync(FAILURE_SYNC_SECONDS)
        finally:
            self.output.discard()
            if self.status is not None:
                done = self.journal
                self.status.update(
                    finished=done.num_done, failed=done.num_failed, tokens=done.tokens
                )
                end_status(self.status, failure)
                if self.has_begun:
                    self._say_how_far(self.status.status)
                else:
                    self.journal.close(remove=True)  # nothing to go on from

    def _say_how_far(self, status: JobStatus) -> None:
        left = "is as it was" if self.job.own_output.exists() else "was not written"
        logger.warning(
            "%d of %d records are done; %s %s. The same command resumes",
            status.finished, status.total, self.job.own_output, left,
        )  # fmt: skip


# Exit codes of failures that no record can be the cause of: usage, checkpoint, output.
NOT_THE_RECORDS = (2, 3, 5)


@dataclass(frozen=True)
class Dispatched:
    """What an attempt has computed."""

    new_tokens: int = 0
    prompt_tokens: int = 0
    retried: int = 0
    quarantined: int = 0
    first_error: str = ""
    shares: list[ReplicaShare] = field(default_factory=list)

    @classmethod
    def of(cls, work: Dispatcher) -> "Dispatched":
        shares = [
            ReplicaShare(replica, work.records[replica], work.new_tokens[replica])
            for replica in sorted(work.records)
        ]
        return cls(
            work.tokens,
            work.prompt_tokens,
            work.retried,
            work.quarantined,
            work.first_error,
            shares,
        )


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
