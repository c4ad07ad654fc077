"""How records reach the replicas of the model and results come back to rank 0.

Within one process a pair of deques; between ranks queues in the rendezvous store, from which every
replica takes what it has room for, so that a slow one holds nobody up. Knows records and a store; no
model and no files.
"""

import json
import secrets
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


LONG = "long:"  # no JSON begins so


class StoreQueue:
    """Args:
    store: a connection of its own to torch's TCPStore, under a prefix of this attempt.
    """

    WORK, RESULTS, END = "work", "results", "end"
    # TCPStore drops a connection that sends a value of 8 MiB.
    MOST_BYTES = 4 * 2**20

    def __init__(self, store: Any) -> None:
        self.store = store

    def put(self, record: Record) -> None:
        self._push(self.WORK, json.dumps(_record_to_json(record)))

    def end(self) -> None:
        self.store.set(self.END, "1")

    def collect(self) -> Result | None:
        found = self._pop(self.RESULTS)
        return None if found is None else Result(**json.loads(found))

    def take(self) -> Record | None:
        found = self._pop(self.WORK)
        return None if found is None else _record_from_json(json.loads(found))

    def give(self, result: Result) -> None:
        self._push(self.RESULTS, json.dumps(asdict(result)))

    @property
    def ended(self) -> bool:
        # In this order: the end is set after the last record was put.
        return bool(self.store.check([self.END])) and self.store.queue_len(self.WORK) == 0

    def _push(self, key: str, text: str) -> None:
        """What is long lies under keys of its own, and only their names go into the queue."""
        if len(text) > self.MOST_BYTES:
            name = secrets.token_hex(8)
            pieces = [
                text[start : start + self.MOST_BYTES]
                for start in range(0, len(text), self.MOST_BYTES)
            ]
            for number, piece in enumerate(pieces):
                self.store.set(f"{name}/{number}", piece)
            text = f"{LONG}{name}/{len(pieces)}"
        self.store.queue_push(key, text)

    def _pop(self, key: str) -> str | None:
        try:
            found = self.store.queue_pop(key, False)
        except QueueEmptyError:
            return None
        text: str = found.decode()
        if not text.startswith(LONG):
            return text
        name, _, count = text.removeprefix(LONG).partition("/")
        keys = [f"{name}/{number}" for number in range(int(count))]
        pieces = [self.store.get(key).decode() for key in keys]
        for key in keys:
            self.store.delete_key(key)
        return "".join(pieces)


def _record_to_json(record: Record) -> dict[str, Any]:
    return vars(record) | {"params": vars(record.params)}


def _record_from_json(raw: dict[str, Any]) -> Record:
    params = raw["params"]
    params["logit_bias"] = dict(params["logit_bias"])  # pairs
    return Record(**raw | {"params": SamplingParams.from_dict(params)})
