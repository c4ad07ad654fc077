"""An output file that appears whole or not at all.

Knows nothing of records: it takes text lines.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tprt.errors import OutputError


class AtomicOutput:
    """Writes beside ``path`` under a temporary name and renames at the end.

    Made before any work, so that a folder that cannot be written is found out at once. An output
    that exists already stays as it is until the new one is complete.

    Raises:
        OutputError: the folder is missing or not writable, or the disk is full.
    """

    def __init__(self, path: Path) -> None:
        path = path.resolve()  # the file behind a link is replaced, not the link
        self.path = path
        if path.exists() and not path.is_file():
            raise OutputError(
                f"the output {str(path)!r} is a folder, device or pipe", hint="name a plain file"
            )
        try:
            handle, name = tempfile.mkstemp(
                prefix=f".{path.name}.", suffix=".tmp", dir=path.parent or Path(".")
            )
        except OSError as error:
            raise self._failed(error) from error
        self.temporary = Path(name)
        self._file = os.fdopen(handle, "w", encoding="utf-8", newline="\n")

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"the output cannot be written: {error.strerror or error}",
            where=str(self.path),
            hint="an existing folder with room and permission to write",
        )

    def write(self, lines: Iterable[str]) -> None:
        """Write all lines, make them durable and give the file its name."""
        try:
            with self._file:
                self._file.writelines(f"{line}\n" for line in lines)
                self._file.flush()
                os.fsync(self._file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            self.temporary.chmod(0o666 & ~umask)
            self.temporary.replace(self.path)
            folder = os.open(self.path.parent or ".", os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise self._failed(error) from error

    def discard(self) -> None:
        """Remove the temporary file if it is still there."""
        with contextlib.suppress(OSError):
            self._file.close()
        self.temporary.unlink(missing_ok=True)
