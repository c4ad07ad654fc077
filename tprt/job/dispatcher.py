"""Hands records out and takes results in, on rank 0; with several replicas on a thread of its own.

Every record that goes out is noted in the journal first, every result that comes back is written there.
Records that were in flight at a crash go out alone, before all others. Knows records, a queue and a
journal; no model.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable

from tprt.job.input_file import InputFile, Shard
from tprt.job.journal import Journal
from tprt.job.records import Record
from tprt.job.replica import error_result
from tprt.job.work_queue import Outlet, Result
from tprt.log import get_logger
from tprt.sampling_params import SamplingParams

logger = get_logger(__name__)

PUMP_SECONDS = 0.01
QUARANTINED = (
    "given up: the job crashed again and again while this record was computed alone; "
    "--restart tries it once more"
)


class Dispatcher:
    """Args:
    window: sequences handed out and not yet come back, at most.
    tick: called now and then while the input is read.

    Attributes:
        retried, quarantined: records tried alone, and those given up.
        records, new_tokens: by replica.
        first_error: of the records that failed, in one line.
        error: what the thread has met.
    """

    def __init__(
        self,
        source: InputFile,
        defaults: SamplingParams,
        job_seed: int,
        shard: Shard | None,
        journal: Journal,
        queue: Outlet,
        window: int,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.journal, self.queue, self.window = journal, queue, window
        self._special = {*journal.suspects, *journal.quarantined}
        self._alone = source.records(defaults, job_seed, shard, self._special.__contains__, tick)
        self._rest = source.records(defaults, job_seed, shard, self._is_due, tick)
        self._out: dict[int, int] = {}  # line -> sequences
        self._sequences = 0
        self._over = False
        self.error: BaseException | None = None
        self.retried = self.quarantined = self.prompt_tokens = self.tokens = 0
        self.first_error = ""
        self.records, self.new_tokens = Counter[int](), Counter[int]()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    @property
    def running(self) -> int:
        """Records in flight."""
        return len(self._out)

    @property
    def over(self) -> bool:
        """Whether every record has its result. Raises what the thread has met."""
        if self.error is not None:
            raise self.error
        return self._over

    def pump(self) -> None:
        """Take in what has come and hand out what there is room for."""
        while (result := self.queue.collect()) is not None:
            self._keep(result)
        if not self._over and not self._special and self._hand_out_many():
            self._over = True
            self.queue.end()
        elif self._special and not self._out:
            self._hand_out_alone()

    def start(self) -> None:
        """Pump on a thread until all is done."""

        def run() -> None:
            try:
                while not self._over and not self._stop.is_set():
                    self.pump()
                    time.sleep(PUMP_SECONDS)
            except BaseException as error:
                self.error = error

        self._thread = threading.Thread(target=run, name="tprt-dispatch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(1.0)

    def _is_due(self, line: int) -> bool:
        return not self.journal.is_done(line)

    def _hand_out_alone(self) -> None:
        quarantined = set(self.journal.quarantined)
        while (record := next(self._alone, None)) is not None:
            self._special.discard(record.line)
            if record.line in quarantined:
                logger.warning("record %s (line %d) is given up", record.id, record.line)
                self.quarantined += 1
                cause = self.journal.crash_cause(record.line)
                self._keep(error_result(record.failed(f"{QUARANTINED}; last: {cause}")))
                continue
            self.retried += 1
            self._put([record], alone=True)
            return
        self._special.clear()

    def _hand_out_many(self) -> bool:
        """Fill the window; whether there is nothing left and nothing in flight."""
        records: list[Record] = []
        room = self.window - self._sequences
        while room > 0 and (record := next(self._rest, None)) is not None:
            records.append(record)
            room -= max(1, record.params.n)
        if records:
            self._put(records, alone=False)
        return room > 0 and not self._out

    def _put(self, records: list[Record], alone: bool) -> None:
        self.journal.begin([record.line for record in records], alone=alone)
        for record in records:
            self._out[record.line] = max(1, record.params.n)
            self._sequences += self._out[record.line]
            self.queue.put(record)

    def _keep(self, result: Result) -> None:
        self._sequences -= self._out.pop(result.line, 0)
        self.journal.finish(result.line, result.text, result.tokens, bool(result.error))
        self.records[result.replica] += 1
        self.new_tokens[result.replica] += result.tokens
        self.prompt_tokens += result.prompt_tokens
        self.tokens += result.tokens
        if result.error:
            self.first_error = self.first_error or result.error
