"""Carries step records from rank 0 to the others, and to a file when one is given.

Knows ranks and record layout; what a record asks for is the engine's business.
"""

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import torch

from tprt.distributed.communication import broadcast_record
from tprt.distributed.tp_group import TPGroup
from tprt.engine.step_record import (
    HEADER_WORDS,
    Ints,
    RecordLayoutError,
    StepRecord,
    payload_words,
)
from tprt.errors import ConfigError, RankMismatch

# The first message has this length whatever it carries, so that most records need no second one.
FIRST_WORDS = 512


class ControlChannel:
    """Args:
    record_file: gets every record sent, as little-endian int64; rank 0 only.
    """

    def __init__(self, tp: TPGroup, record_file: BinaryIO | None = None) -> None:
        self.tp, self.record_file = tp, record_file

    def send(self, record: StepRecord) -> int:
        """From rank 0 to all; returns the record's checksum."""
        words = self.keep(record)
        if self.tp.size > 1:
            first = np.zeros(FIRST_WORDS, dtype=np.int64)
            first[: min(len(words), FIRST_WORDS)] = words[:FIRST_WORDS]
            broadcast_record(torch.from_numpy(first), self.tp)
            if len(words) > FIRST_WORDS:
                broadcast_record(torch.from_numpy(words[FIRST_WORDS:].copy()), self.tp)
        return int(words[6])

    def keep(self, record: StepRecord) -> Ints:
        """Into the file alone, where there is one; the record's words."""
        words = record.encode()
        if self.record_file is not None:
            self.record_file.write(words.astype("<i8", copy=False).data)
        return words

    def receive(self) -> tuple[StepRecord, int]:
        """The next record and its checksum, on ranks above 0.

        Raises:
            RankMismatch: it is damaged or of another version.
            PeerLost: rank 0 is gone.
        """
        first = broadcast_record(torch.zeros(FIRST_WORDS, dtype=torch.int64), self.tp).numpy()
        try:
            size = HEADER_WORDS + payload_words(first)
            if size > FIRST_WORDS:
                rest = torch.zeros(size - FIRST_WORDS, dtype=torch.int64)
                first = np.concatenate([first, broadcast_record(rest, self.tp).numpy()])
            return StepRecord.decode(first[:size]), int(first[6])
        except RecordLayoutError as error:
            raise RankMismatch(
                str(error),
                where=f"rank {self.tp.rank} of {self.tp.size}",
                hint="run the same version on every rank",
            ) from error


def read_records(file: BinaryIO, name: str) -> Iterator[StepRecord]:
    """The records of a file that ``ControlChannel`` wrote.

    A file cut off in the middle of a record, as a killed job leaves it, ends before that record.

    Raises:
        ConfigError: ``name`` is not a record file, or a record in it is damaged.
    """
    number = 0
    while len(header := file.read(8 * HEADER_WORDS)) == 8 * HEADER_WORDS:
        try:
            size = payload_words(_words(header))
            payload = file.read(8 * size)
            if len(payload) < 8 * size:
                return
            yield StepRecord.decode(_words(header + payload))
        except RecordLayoutError as error:
            raise ConfigError(
                f"record {number} cannot be read: {error}",
                where=name,
                hint="a file written with engine.record_path by this version",
            ) from None
        number += 1


def _words(data: bytes) -> Ints:
    return np.frombuffer(data, dtype="<i8").astype(np.int64, copy=False)
