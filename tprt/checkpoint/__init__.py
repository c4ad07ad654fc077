"""Checkpoints on disk: one reader per layout, strict loading, and conversion between layouts.

Layouts are recognised by their files. Names are Hugging Face's, whatever the layout. Nothing here
executes a pickle, and nothing knows a model class.
"""

import re
from pathlib import Path
from typing import Literal

from tprt.checkpoint.huggingface import BIN, CONFIG, SAFETENSORS, HuggingFaceReader
from tprt.checkpoint.loader import load_weights
from tprt.checkpoint.megatron import MegatronReader
from tprt.checkpoint.megatron_folders import TRACKER
from tprt.checkpoint.presharded import MANIFEST, PreshardedReader
from tprt.checkpoint.reader import READ_HINT, CheckpointReader, TensorInfo
from tprt.checkpoint.staging_ring import StreamSettings
from tprt.checkpoint.streaming import LoadStats
from tprt.checkpoint.writers import write_huggingface, write_megatron, write_presharded
from tprt.errors import CheckpointError

__all__ = [
    "CheckpointReader",
    "LoadStats",
    "StreamSettings",
    "TensorInfo",
    "load_weights",
    "open_checkpoint",
    "write_huggingface",
    "write_megatron",
    "write_presharded",
]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_checkpoint(
    path: str | Path, verify: Literal["sizes", "full"] = "sizes"
) -> CheckpointReader:
    """A reader for the checkpoint at ``path``: a folder of any known layout, or a hub id org/name.

    Args:
        verify: "sizes" checks names, headers and sizes; "full" also reads every byte and compares
            the checksums the layout has.

    Raises:
        CheckpointError: there is nothing readable at ``path``, or it is damaged or contradictory.
    """
    folder = Path(path)
    if not folder.exists():
        folder = _from_hub(str(path))
    reader = _open_folder(folder)
    if verify == "full":
        reader.verify_full()
    return reader


def _open_folder(folder: Path) -> CheckpointReader:
    if not folder.is_dir():
        raise CheckpointError(
            "a file, not a folder", where=str(folder), hint="the folder around it"
        )
    try:
        if (folder / MANIFEST).is_file():
            return PreshardedReader(folder)
        if (folder / TRACKER).is_file() or any(folder.glob("mp_rank_*")):
            return MegatronReader(folder)
        if any((folder / name).is_file() for name in (CONFIG, *SAFETENSORS, *BIN)):
            return HuggingFaceReader(folder)
        if any(folder.glob("iter_*")):
            return MegatronReader(folder)
        shown = _shown_names(folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror or error}",
            where=str(error.filename or folder),
            hint=READ_HINT,
        ) from error
    hint = f"a folder with {TRACKER}, {CONFIG} or {MANIFEST} in it"
    if re.fullmatch(r"mp_rank_\d+(_\d+)?", folder.name):
        hint = "the iteration folder above it"
    raise CheckpointError(f"no checkpoint here; found {shown}", where=str(folder), hint=hint)


def _shown_names(folder: Path) -> str:
    inside = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(inside[:10]) + (", ..." if len(inside) > 10 else "") if inside else "nothing"


def _from_hub(name: str) -> Path:
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            "no such folder", where=name, hint="an existing path, or a hub id org/name"
        )
    near = Path(name).parent
    if near.exists():  # a mistyped path must not become a question to the network
        inside = _shown_names(near) if near.is_dir() else "it is a file"
        raise CheckpointError(
            f"no such folder; '{near}' is here and holds {inside}",
            where=name,
            hint="an existing path (a hub id must not begin with the name of something here)",
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            "no such folder here, and hub ids need the package huggingface_hub",
            where=name,
            hint="check the path; if it is a hub id, pip install huggingface_hub",
        ) from error
    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model"])
        )
    except Exception as error:
        # The hub client raises errors of its own, of its HTTP library and of the OS.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise CheckpointError(
            f"no such folder, and it could not be downloaded from the hub: {reason}",
            where=name,
            hint="an existing path, or check name, network and access rights (hf auth login)",
        ) from error
