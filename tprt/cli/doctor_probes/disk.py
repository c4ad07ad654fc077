"""Room and speed of the folder that outputs go to. Leaves nothing behind: its file never has a name."""

import fcntl
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tprt.cli.doctor_probes.check import GIB, MIB, Check, size

MOST_BYTES, MOST_SECONDS = 256 * MIB, 2.0
BLOCK, SYNC_BYTES = MIB, 16 * MIB
SHARE = 10  # of the free room, at most one in so many bytes is written
APPENDS, APPEND_BYTES, APPEND_SECONDS = 50, 4096, 1.0
LITTLE_ROOM, FEW_INODES = GIB, 1000
SLOW_WRITE, SLOW_SYNC = 20 * MIB, 0.1  # bytes per second, seconds
NETWORK = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "fuse",
    "9p",
    "afs",
    "glusterfs",
)


@dataclass(frozen=True)
class Speeds:
    """Measured on one file.

    Args:
        written: bytes. write, read: bytes per second, with an fsync every 16 MiB.
        sync: seconds of a small append with its fsync, the median; what a journal does all the time.
        wrong: bytes read back differ from those written.
        locks: why the file cannot be locked; empty where it can.
    """

    written: int
    write: float
    read: float
    sync: float
    wrong: bool
    locks: str


def disk(folder: Path) -> Check:
    """Free room and inodes, kind of file system, and the speed of writing, syncing and reading.

    What cannot be written to is a failure.
    """
    folder = folder.resolve()
    usage, inodes = shutil.disk_usage(folder), os.statvfs(folder).f_favail
    kind = file_system(folder)
    found = f"{folder}: {size(usage.free)} of {size(usage.total)} free on {kind}"
    facts: dict[str, Any] = {"folder": str(folder), "free": usage.free, "total": usage.total}
    facts |= {"inodes": inodes, "file_system": kind}
    try:
        speeds = measure(folder, min(MOST_BYTES, usage.free // SHARE))
    except OSError as error:
        said = error.strerror or error
        advice = f"cannot write in {folder} ({said}): --dir another folder, or make room"
        return Check("disk", found, failures=[advice], facts=facts)
    warnings, failures = _judge(usage.free, inodes, kind, speeds)
    if speeds.written:
        found += f", write {size(speeds.write)}/s, read {size(speeds.read)}/s"
    found += f", append with fsync {speeds.sync * 1e3:.2f} ms"
    return Check("disk", found, warnings, failures, facts=facts | asdict(speeds))


def measure(folder: Path, most: int, seconds: float = MOST_SECONDS) -> Speeds:
    """Write, sync and read one file of at most ``most`` bytes, each for ``seconds`` at most.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    block = os.urandom(BLOCK)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        handle = file.fileno()
        locks = ""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            locks = error.strerror or str(error)
        sync = _append(handle)
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        write, written = _write(handle, block, most, seconds)
        # What is still in memory would be read at its speed.
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(handle, 0, os.SEEK_SET)
        read, wrong = _read(handle, block, written, seconds)
    return Speeds(written, write, read, sync, wrong, locks)


def _write(handle: int, block: bytes, most: int, seconds: float) -> tuple[float, int]:
    """Bytes per second and bytes. Memory takes far more than a slow disk in the time there is, so an
    fsync follows every 16 MiB."""
    began, written = time.monotonic(), 0
    while written + SYNC_BYTES <= most and time.monotonic() - began < seconds:
        until = written + SYNC_BYTES
        while written < until:
            written += os.write(handle, block[written % BLOCK :])
        os.fsync(handle)
    return written / max(1e-9, time.monotonic() - began), written


def _read(handle: int, block: bytes, written: int, seconds: float) -> tuple[float, bool]:
    """Bytes per second, and whether anything else comes back than was written."""
    began, done = time.monotonic(), 0
    while done < written and time.monotonic() - began < seconds:
        at = done % BLOCK
        there = os.read(handle, BLOCK - at)
        if not there or there != block[at : at + len(there)]:
            return 0.0, True
        done += len(there)
    return done / max(1e-9, time.monotonic() - began), False


def file_system(folder: Path) -> str:
    """Its kind, ``nfs4`` or ``ext4``, where the system tells."""
    here = str(folder)
    best, kind = "", "unknown"
    for part in psutil.disk_partitions(all=True):
        inside = here == part.mountpoint or here.startswith(part.mountpoint.rstrip("/") + "/")
        if inside and len(part.mountpoint) >= len(best):
            best, kind = part.mountpoint, part.fstype
    return kind


def _append(handle: int) -> float:
    data = b"x" * APPEND_BYTES
    began, times = time.monotonic(), []
    for _ in range(APPENDS):
        at = time.monotonic()
        os.write(handle, data)
        os.fsync(handle)
        times.append(time.monotonic() - at)
        if time.monotonic() - began > APPEND_SECONDS:
            break
    return statistics.median(times)


def _judge(free: int, inodes: int, kind: str, speeds: Speeds) -> tuple[list[str], list[str]]:
    warnings, failures = [], []
    if speeds.wrong:
        failures.append("bytes read back differ from those written: do not use this disk")
    if speeds.locks:
        failures.append(
            f"files cannot be locked ({speeds.locks}), which a job's journal needs: --dir another "
            "folder, or mount with locks"
        )
    if free < LITTLE_ROOM:
        warnings.append(f"only {size(free)} are free: make room before a large job")
    if 0 < inodes < FEW_INODES:  # some file systems do not count them and say 0
        warnings.append(f"only {inodes} more files can be made: remove some")
    if speeds.written and speeds.write < SLOW_WRITE:
        warnings.append(f"writes at {size(speeds.write)}/s: put outputs on a faster disk")
    if speeds.sync > SLOW_SYNC:
        warnings.append(
            f"an append with fsync takes {speeds.sync * 1e3:.0f} ms, and a journal does two per second: "
            "put outputs on a local disk"
        )
    if kind.lower().startswith(NETWORK):
        warnings.append(
            f"{kind} is a network file system: one job per output, unless its locks work between hosts"
        )
    return warnings, failures
