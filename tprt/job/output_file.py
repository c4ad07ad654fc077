"""An output file that appears whole or not at all.

Written beside its place under a temporary name, made durable, renamed. Knows nothing of records: it
takes lines. What it uses to make files appear, the journal uses too.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tprt.errors import OutputError
from tprt.faults import fault_point

HINTS = {
    errno.ENOSPC: "make room there; what is in the journal is kept, and the same command goes on",
    errno.EDQUOT: "a larger quota, or files deleted; what is in the journal is kept",
    errno.EFBIG: "a larger limit of file sizes (ulimit -f); what is in the journal is kept",
    errno.EROFS: "a file system that can be written",
}


@dataclass(frozen=True)
class Written:
    """A file that was written: its digest in hex, and its bytes."""

    sha256: str
    size: int


class AtomicOutput:
    """Makes ``path`` from lines. An output that exists stays as it is until the new one is complete.

    Making one removes temporary files that a killed run left, and writes nothing.

    Raises:
        OutputError: ``path`` is a folder, device or pipe, or its folder is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = resolved(path)
        self._temporary: Path | None = None
        try:
            os.stat(f"{self.path.parent}/.")
            plain = self.path.is_file() or not self.path.exists()
        except OSError as error:
            raise write_failed(error, self.path) from error
        if not plain:
            raise OutputError(
                f"the output {str(self.path)!r} is a folder, device or pipe",
                hint="name a plain file",
            )
        remove_leftovers(self.path)

    def write(self, lines: Iterable[str | bytes]) -> Written:
        """Write all lines, make them durable and give the file its name.

        Leaves nothing behind when it fails, ``lines`` included.

        Args:
            lines: without line ends; bytes are copied as they are.

        Raises:
            OutputError: the folder cannot be written, or the disk is full.
        """
        digest, size = hashlib.sha256(), 0
        try:
            handle, self._temporary = create_temporary(self.path)
            with open(handle, "wb", buffering=2**20) as file:
                for line in lines:
                    data = (line.encode() if isinstance(line, str) else line) + b"\n"
                    digest.update(data)
                    size += file.write(data)
                fault_point("output.write")
                file.flush()
                os.fsync(handle)
            fault_point("output.rename")
            self._temporary.replace(self.path)
            fault_point("output.renamed")
            sync_folder(self.path.parent)
        except OSError as error:
            raise write_failed(error, self.path) from error
        finally:
            self.discard()
        return Written(digest.hexdigest(), size)

    def discard(self) -> None:
        """Remove the temporary file if it is still there."""
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)
            self._temporary = None


def write_failed(error: OSError, path: Path) -> OutputError:
    """For users, with the way out of this kind of failure."""
    return OutputError(
        f"the output cannot be written: {error.strerror or error}",
        where=str(path),
        hint=HINTS.get(error.errno or 0, "an existing folder with room and permission to write"),
    )


def resolved(path: Path) -> Path:
    """The file behind a link, as that is replaced, not the link."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # Python 3.11 says RuntimeError for a loop of links
        raise write_failed(OSError(errno.ELOOP, os.strerror(errno.ELOOP)), path) from error


def create_temporary(path: Path) -> tuple[int, Path]:
    """A new file beside ``path``, open for reading and writing and locked: its descriptor and name.

    The lock tells it from what a killed process left. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle, temporary


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of ``path`` that no living process holds.

    Those of ``path.2-of-8`` are another job's: hence no dot in the part that was drawn.
    """
    drawn = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-z_]{{8}}\.tmp")
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if not drawn.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError):
                handle = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)
                finally:
                    os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make names that were given or taken in ``folder`` durable. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
