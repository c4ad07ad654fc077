"""How records reach the replicas of the model and results come back to rank 0.

Within one process a pair of deques; between ranks queues in the rendezvous store, from which every
replica takes what it has room for, so that a slow one holds nobody up. Knows records and a store; no
model and no files.
"""

import json
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch.distributed import QueueEmptyError

from tprt.job.records import Record
from tprt.sampling_params import SamplingParams


@dataclass(frozen=True)
class Result:
    """What became of a record.

    Args:
        line: of the input, from 1.
        text: the whole output line, without its end.
        tokens, prompt_tokens: generated, and of the prompt.
        error: of a failed record, in one line; else empty.
        replica: that computed it.
    """

    line: int
    text: str
    tokens: int = 0
    prompt_tokens: int = 0
    error: str = ""
    replica: int = 0


class Outlet(Protocol):
    """The end on rank 0: records go out, results come back."""

    def put(self, record: Record) -> None: ...

    def end(self) -> None:
        """Nothing more will be put."""

    def collect(self) -> Result | None:
        """A result that has come, else None."""


class Inlet(Protocol):
    """The end of a replica's leader."""

    def take(self) -> Record | None:
        """A record to work on, else None."""

    def give(self, result: Result) -> None: ...

    @property
    def ended(self) -> bool:
        """Whether ``take`` will never give anything again."""


class LocalQueue:
    """For the only replica."""

    def __init__(self) -> None:
        self._records, self._results = deque[Record](), deque[Result]()
        self._over = False

    def put(self, record: Record) -> None:
        self._records.append(record)

    def end(self) -> None:
        self._over = True

    def collect(self) -> Result | None:
        return self._results.popleft() if self._results else None

    def take(self) -> Record | None:
        return self._records.popleft() if self._records else None

    def give(self, result: Result) -> None:
        self._results.append(result)

    @property
    def ended(self) -> bool:
        return self._over and not self._records


class StoreQueue:
    """Args:
    store: a connection of its own to torch's TCPStore, under a prefix of this attempt.
    """

    WORK, RESULTS, END = "work", "results", "end"

    def __init__(self, store: Any) -> None:
        self.store = store

    def put(self, record: Record) -> None:
        self.store.queue_push(self.WORK, json.dumps(_record_to_json(record)))

    def end(self) -> None:
        self.store.set(self.END, "1")

    def collect(self) -> Result | None:
        found = self._pop(self.RESULTS)
        return found and Result(**json.loads(found))

    def take(self) -> Record | None:
        found = self._pop(self.WORK)
        return found and _record_from_json(json.loads(found))

    def give(self, result: Result) -> None:
        self.store.queue_push(self.RESULTS, json.dumps(asdict(result)))

    @property
    def ended(self) -> bool:
        # In this order: the end is set after the last record was put.
        return bool(self.store.check([self.END])) and self.store.queue_len(self.WORK) == 0

    def _pop(self, key: str) -> Any:
        try:
            return self.store.queue_pop(key, False)
        except QueueEmptyError:
            return None


def _record_to_json(record: Record) -> dict[str, Any]:
    return vars(record) | {"params": vars(record.params), "shown": ""}


def _record_from_json(raw: dict[str, Any]) -> Record:
    params = raw["params"]
    params["logit_bias"] = dict(params["logit_bias"])  # pairs
    return Record(**raw | {"params": SamplingParams.from_dict(params)})
