"""Carries step records from rank 0 to the others, and to a file when one is given.

While rank 0 has nothing to say to ranks that follow it, a thread sends heartbeats, so that they run
into no timeout and learn of a rank 0 that has stopped. Records go over gloo on one host too: sending
takes rank 0 some 60 us (``tprt bench record``), a step ahead of a device, where shared memory would
save nothing that anybody waits for. Knows ranks and record layout; what a record asks for is the
engine's business.
"""

import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import BinaryIO

import numpy as np
import torch

from tprt.distributed.communication import broadcast_record
from tprt.distributed.progress import Progress
from tprt.distributed.tp_group import TPGroup
from tprt.engine.step_record import (
    HEADER_WORDS,
    Ints,
    Kind,
    RecordLayoutError,
    StepRecord,
    payload_words,
)
from tprt.errors import ConfigError, OutputError, PeerLost, RankMismatch

# The first message has this length whatever it carries, so that most records need no second one.
FIRST_WORDS = 512
HEARTBEAT_SECONDS = 10.0
# Silence of so many intervals is a lost peer. Generous, since a long call that keeps Python's lock
# keeps heartbeats back too.
LOST_AFTER_INTERVALS = 6
JOIN_SECONDS = 5.0


class ControlChannel:
    """Args:
    record_file: gets every record sent, as little-endian int64; rank 0 only.

    A heartbeat of the thread repeats number and look-ahead of the last record, so that it changes
    nothing, and says in ``text`` within how many seconds the next one comes. It is no part of a run:
    no file gets it.
    """

    def __init__(self, tp: TPGroup, record_file: BinaryIO | None = None) -> None:
        self.tp, self.record_file = tp, record_file
        # What the heartbeat thread waits for is no movement of this rank.
        self._beating = replace(tp, progress=Progress())
        self.lost = False  # ``send`` has raised PeerLost: nobody can be told anything any more
        self._failure: PeerLost | None = None
        # Held over all messages of one record, and over no other collective.
        self._lock = threading.Lock()
        self._step = self._look_ahead = 0  # of the last record
        self._sent_at, self._in_call = time.monotonic(), False
        self._followed = self._store_gone = False
        self._interval, self._stop = HEARTBEAT_SECONDS, threading.Event()
        self._thread: threading.Thread | None = None
        if tp.rank == 0 and tp.control_group is not None:
            # Weak: the thread must not keep an engine that nobody uses any more.
            self._thread = threading.Thread(
                target=_beat_until,
                args=(self._stop, weakref.ref(self), self._interval),
                name="tprt-heartbeat",
                daemon=True,
            )
            self._thread.start()
            # At exit too: a daemon thread that wakes up while Python ends may take it down.
            self._end_thread = weakref.finalize(self, _end_thread, self._thread, self._stop)

    # ------------------------------------------------------------ rank 0

    def send(self, record: StepRecord, timeout: timedelta | None = None) -> int:
        """From rank 0 to all; returns the record's checksum, 0 where nobody reads it.

        Raises:
            PeerLost: a rank is gone, or has not taken a heartbeat since the last record.
        """
        if self.tp.size == 1 and self.record_file is None:
            return 0
        with self._lock:
            try:
                if (lost := self._failure) is not None:
                    raise PeerLost(lost.what, where=lost.where, hint=lost.hint) from lost
                words = self.keep(record)
                self._broadcast(words, timeout, self.tp)
            except PeerLost:
                self.lost = True
                raise
            self._step, self._look_ahead = record.step, record.look_ahead
            if record.kind in (Kind.CALL, Kind.RETURN):
                self._in_call = record.kind == Kind.CALL
            self._sent_at = time.monotonic()
        return int(words[6])

    def _broadcast(self, words: Ints, timeout: timedelta | None, tp: TPGroup) -> None:
        if self.tp.size == 1:
            return
        first = np.zeros(FIRST_WORDS, dtype=np.int64)
        first[: min(len(words), FIRST_WORDS)] = words[:FIRST_WORDS]
        try:
            broadcast_record(torch.from_numpy(first), tp, timeout)
            if len(words) > FIRST_WORDS:
                broadcast_record(torch.from_numpy(words[FIRST_WORDS:].copy()), tp, timeout)
        except PeerLost as error:
            self._failure = error
            raise
        except BaseException as error:
            # An interrupt, say. What came next would be taken for the rest of this record.
            self._failure = PeerLost(
                f"a record was not sent whole: {type(error).__name__}",
                where=f"rank 0 of {self.tp.size}",
                hint="close this LLM and make another one",
            )
            raise

    def keep(self, record: StepRecord) -> Ints:
        """Into the file alone, where there is one; the record's words."""
        words = record.encode()
        if self.record_file is not None:
            try:
                self.record_file.write(words.astype("<i8", copy=False).data)
            except OSError as error:
                raise OutputError(
                    f"the record file cannot be written: {error.strerror}",
                    where=str(getattr(self.record_file, "name", "record file")),
                    hint="room on that disk, or another engine.record_path",
                ) from error
        return words

    def followed(self) -> bool:
        """Whether every other rank has said in the store that it sits in ``follow``."""
        if self.tp.size > 1 and not self._store_gone:
            keys = [following_key(rank) for rank in range(1, self.tp.size)]
            try:
                self._followed = bool(self.tp.store.check(keys))
            except RuntimeError:  # its host has ended: the last answer holds
                self._store_gone = True
        return self._followed

    def beat(self) -> float:
        """Send a heartbeat if one is due; in how many seconds the next may be."""
        due = self._sent_at + self._interval
        if time.monotonic() < due:
            return due - time.monotonic()
        if not self.followed():
            return self._interval
        with self._lock:
            sent_meanwhile = self._sent_at + self._interval > due
            if sent_meanwhile or self._failure is not None or self._stop.is_set():
                return self._interval
            record = StepRecord(
                step=self._step,
                kind=Kind.HEARTBEAT,
                look_ahead=self._look_ahead,
                text=str(self._interval).encode(),
            )
            # Between calls the others do nothing but listen; in a call their step may take long.
            timeout = None if self._in_call else silence_limit(record)
            try:
                self._broadcast(record.encode(), timeout, self._beating)
            except Exception:
                self._stop.set()  # ``send`` raises what happened
            self._sent_at = time.monotonic()
        return self._interval

    def end_heartbeats(self) -> None:
        """Raises PeerLost when one is still under way, because a rank does not take it."""
        if self._thread is not None:
            self._end_thread()
            if self._thread.is_alive():
                self.lost = True
                raise PeerLost(
                    f"a heartbeat was not taken within {JOIN_SECONDS:g} s",
                    where=f"rank 0 of {self.tp.size}",
                    hint="another rank is stuck; look for its own message",
                )

    # ------------------------------------------------------------ the others

    def receive(self, timeout: timedelta | None = None) -> tuple[StepRecord, int]:
        """The next record and its checksum, on ranks above 0.

        Args:
            timeout: how long to wait; None is the group's limit.

        Raises:
            RankMismatch: it is damaged or of another version.
            PeerLost: rank 0 is gone or silent.
        """
        first = self._words(FIRST_WORDS, timeout)
        try:
            size = HEADER_WORDS + payload_words(first)
            if size > FIRST_WORDS:
                first = np.concatenate([first, self._words(size - FIRST_WORDS, timeout)])
            return StepRecord.decode(first[:size]), int(first[6])
        except RecordLayoutError as error:
            raise RankMismatch(
                str(error),
                where=f"rank {self.tp.rank} of {self.tp.size}",
                hint="run the same version on every rank",
            ) from error

    def _words(self, count: int, timeout: timedelta | None) -> Ints:
        began = time.monotonic()
        try:
            words = broadcast_record(torch.zeros(count, dtype=torch.int64), self.tp, timeout)
        except PeerLost as error:
            if timeout is None or time.monotonic() - began < timeout.total_seconds():
                raise
            raise PeerLost(
                f"rank 0 has sent nothing for {timeout.total_seconds():g} s, not even a heartbeat",
                where=error.where,
                hint="rank 0 is stopped or out of reach; look for its own message",
            ) from error
        return words.numpy()


def following_key(rank: int) -> str:
    """What a rank sets in the store while it sits in ``follow``."""
    return f"following/{rank}"


def silence_limit(record: StepRecord) -> timedelta | None:
    """How long rank 0 may be silent after ``record``, a heartbeat of its thread; else None."""
    if record.kind != Kind.HEARTBEAT or not record.text:
        return None
    return timedelta(seconds=LOST_AFTER_INTERVALS * float(record.text))


def _beat_until(
    stop: threading.Event, channel: "weakref.ref[ControlChannel]", seconds: float
) -> None:
    while not stop.wait(seconds):
        alive = channel()
        if alive is None:
            return
        seconds = alive.beat()
        del alive


def _end_thread(thread: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(JOIN_SECONDS)


def read_records(file: BinaryIO, name: str) -> Iterator[StepRecord]:
    """The records of a file that ``ControlChannel`` wrote.

    A file cut off in the middle of a record, as a killed job leaves it, ends before that record.

    Raises:
        ConfigError: ``name`` is not a record file, or a record in it is damaged.
    """
    number, header = 0, file.read(8 * HEADER_WORDS)
    if len(header) < 8 * HEADER_WORDS:
        raise ConfigError(
            f"{len(header)} bytes are no record file, which begins with a header of {8 * HEADER_WORDS}",
            where=name,
            hint="a file written with engine.record_path by this version",
        )
    while len(header) == 8 * HEADER_WORDS:
        try:
            size = payload_words(_as_words(header))
            payload = file.read(8 * size)
            if len(payload) < 8 * size:
                return
            yield StepRecord.decode(_as_words(header + payload))
        except RecordLayoutError as error:
            raise ConfigError(
                f"record {number} cannot be read: {error}",
                where=name,
                hint="a file written with engine.record_path by this version",
            ) from None
        number, header = number + 1, file.read(8 * HEADER_WORDS)


def _as_words(data: bytes) -> Ints:
    return np.frombuffer(data, dtype="<i8").astype(np.int64, copy=False)
