"""Which files make up a Megatron checkpoint, and whether they belong together.

All of it is decided from folder names, zip directories and each file's ``args``, before any weight is
read and before any process group exists. This file knows no tensor names.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tprt.checkpoint.reader import build_config, differing_fields
from tprt.checkpoint.stand_ins import Inert
from tprt.checkpoint.torch_file import TorchFile
from tprt.config import PersimmonConfig
from tprt.errors import CheckpointError, ConfigError

TRACKER = "latest_checkpointed_iteration.txt"
FILE_NAMES = ("model_optim_rng.pt", "model_rng.pt")
_KIND_HINT = "a model_optim_rng.pt that Megatron saved, with args and model"
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3,5}))?")


@dataclass(frozen=True)
class RankFile:
    """One opened file: its ``args`` as a dict of scalars, its models (several when virtual stages)."""

    tp_rank: int
    stage: int
    file: TorchFile
    args: dict[str, Any]
    iteration: int | None
    models: tuple[object, ...]

    @property
    def folder(self) -> str:
        return self.file.path.parent.name


def find_iteration(path: Path) -> Path:
    """The folder that holds the ``mp_rank`` folders.

    Raises:
        CheckpointError: the tracker file is missing or malformed, or names a folder that is not
            there.
    """
    if any(path.glob("mp_rank_*")):
        return path
    found = ", ".join(sorted(p.name for p in path.glob("iter_*"))) or "none"
    tracker = path / TRACKER
    if not tracker.is_file():
        raise CheckpointError(
            f"no {TRACKER} here; iteration folders found: {found}",
            where=str(path),
            hint="the path of an iter_* folder itself",
        )
    text = tracker.read_bytes()[:64].decode("utf-8", errors="replace").strip()
    if text == "release":
        name = "release"
    elif re.fullmatch(r"\d{1,12}", text) and int(text) > 0:
        name = f"iter_{int(text):07d}"
    else:
        raise CheckpointError(
            f"{TRACKER} holds {text!r}, neither an iteration above 0 nor 'release'",
            where=str(tracker),
            hint="the path of an iter_* folder itself",
        )
    if not (path / name).is_dir():
        raise CheckpointError(
            f"{TRACKER} says {text!r}, but there is no folder {name}; found: {found}",
            where=str(path),
            hint="the path of an iter_* folder itself",
        )
    return path / name


def open_rank_files(folder: Path, warnings: list[str]) -> list[list[RankFile]]:
    """Every rank file of ``folder`` as [tensor-parallel rank][pipeline stage].

    Raises:
        CheckpointError: a rank folder is missing, left over or malformed, or a file cannot be read.
    """
    places: dict[tuple[int, int], Path] = {}
    with_stage = set()
    for place in sorted(folder.glob("mp_rank_*")):
        match = _RANK_FOLDER.fullmatch(place.name)
        if not match or not place.is_dir():
            raise CheckpointError(
                f"'{place.name}' is not a rank folder (mp_rank_XX or mp_rank_XX_YYY)",
                where=str(folder),
                hint="move it away, or give it the name it was saved with",
            )
        key = (int(match[1]), int(match[2] or 0))
        with_stage.add(match[2] is not None)
        if key in places or len(with_stage) > 1:
            raise CheckpointError(
                f"'{place.name}' and '{places[min(places)].name}' are rank folders of two saves",
                where=str(folder),
                hint="the rank folders of one save only",
            )
        places[key] = place
    if not places:
        raise CheckpointError(
            "no mp_rank_* folder here", where=str(folder), hint="the whole release, unpacked"
        )
    tp, pp = max(t for t, _ in places) + 1, max(p for _, p in places) + 1
    form = "mp_rank_{:02d}_{:03d}" if with_stage == {True} else "mp_rank_{:02d}"
    wanted = {(t, p) for t in range(tp) for p in range(pp)}
    _refuse_missing(folder, [form.format(*key) for key in sorted(wanted - places.keys())])
    opened = {key: _open(place, key, warnings) for key, place in sorted(places.items())}
    first = opened[0, 0]
    for name, found in (("tensor", tp), ("pipeline", pp)):
        claimed = first.args.get(f"{name}_model_parallel_size")
        if claimed is None or claimed == found:
            continue
        if type(claimed) is int and found < claimed <= 1024:
            sizes = (claimed, pp) if name == "tensor" else (tp, claimed)
            all_keys = {(t, p) for t in range(sizes[0]) for p in range(sizes[1])}
            _refuse_missing(folder, [form.format(*k) for k in sorted(all_keys - places.keys())])
        raise CheckpointError(
            f"args.{name}_model_parallel_size is {claimed!r}, but there are rank folders for "
            f"{found}",
            where=str(first.file.path),
            hint="the rank folders of one save only",
        )
    return [[opened[t, p] for p in range(pp)] for t in range(tp)]


def check_ranks_agree(
    grid: list[list[RankFile]], folder: Path
) -> tuple[PersimmonConfig, int, object]:
    """The model's config, TP size on disk and q/k LayerNorm mode that all rank files agree on.

    Raises:
        CheckpointError: iterations or args differ between files, the folder is of another
            iteration, rank files are swapped, or the sizes cannot be cut this way.
    """
    ranks = [rank for stages in grid for rank in stages]
    first = ranks[0]
    configs = [build_config(PersimmonConfig.from_megatron, r.args, str(r.file.path)) for r in ranks]
    for rank, config in zip(ranks, configs, strict=True):
        differing = differing_fields(configs[0], config)
        for name in (
            "qk_layernorm", "tensor_model_parallel_size", "pipeline_model_parallel_size",
            "unpadded_vocab_size",
        ):  # fmt: skip
            if rank.args.get(name) != first.args.get(name):
                differing.append(f"{name} ({first.args.get(name)!r} and {rank.args.get(name)!r})")
        if rank.iteration != first.iteration:
            differing.insert(0, f"iteration ({first.iteration} and {rank.iteration})")
        if differing:
            raise CheckpointError(
                f"{first.folder} and {rank.folder} are of two saves: they differ in "
                + ", ".join(differing),
                where=str(folder),
                hint="the rank folders of one save only",
            )
    named = re.fullmatch(r"iter_(\d{1,12})", folder.name)
    if named and first.iteration is not None and int(named[1]) != first.iteration:
        raise CheckpointError(
            f"the folder is named for iteration {int(named[1])}, the files are of {first.iteration}",
            where=str(folder),
            hint="the folder under the name it was saved with",
        )
    _refuse_swapped(grid, folder)
    tp = len(grid)
    try:
        configs[0].validate_parallel(tp)
        if configs[0].vocab_size % tp:
            raise ConfigError(f"{configs[0].vocab_size} vocabulary rows over {tp} ranks")
    except ConfigError as error:
        raise CheckpointError(
            f"the sizes in args cannot be cut over the rank folders: {error.what}",
            where=str(first.file.path),
            hint="the rank folders of one save only",
        ) from error
    return configs[0], tp, first.args.get("qk_layernorm")


def tokenizer_folders(path: Path, iteration: Path) -> list[Path]:
    """Where a tokenizer may lie: the folder given, the iteration, the release above it."""
    folders = [path, iteration]
    if iteration == path:
        folders.append(path.resolve().parent)
    return folders


def _refuse_missing(folder: Path, missing: list[str]) -> None:
    if missing:
        raise CheckpointError(
            f"missing rank folders: {', '.join(missing[:20])}",
            where=str(folder),
            hint="every rank folder of the save",
        )


def _refuse_swapped(grid: list[list[RankFile]], folder: Path) -> None:
    """``args.rank`` is the global rank that saved; tensor-parallel ranks are its fastest digit.

    Tools that cut checkpoints leave one rank in all files, which decides nothing.
    """
    ranks = [rank for stages in grid for rank in stages]
    saved_by = [rank.args.get("rank") for rank in ranks]
    if len(set(saved_by)) != len(ranks) or not all(type(r) is int for r in saved_by):
        return
    for rank, saved in zip(ranks, saved_by, strict=True):
        if isinstance(saved, int) and saved % len(grid) != rank.tp_rank:
            raise CheckpointError(
                f"{rank.folder} was saved by rank {saved}, which is tensor-parallel rank "
                f"{saved % len(grid)}: rank folders are swapped",
                where=str(folder),
                hint="the folders under the names they were saved with",
            )
    stages = [rank.args.get("rank") for rank in grid[0]]
    if stages != sorted(s for s in stages if isinstance(s, int)):
        raise CheckpointError(
            "pipeline stages were saved by ranks in another order: rank folders are swapped",
            where=str(folder),
            hint="the folders under the names they were saved with",
        )


def _open(place: Path, key: tuple[int, int], warnings: list[str]) -> RankFile:
    found = [place / name for name in FILE_NAMES if (place / name).is_file()]
    if not found:
        raise CheckpointError(
            f"neither {FILE_NAMES[0]} nor {FILE_NAMES[1]} here",
            where=str(place),
            hint="the whole release, unpacked",
        )
    if len(found) > 1:
        warnings.append(f"{place}: both {FILE_NAMES[0]} and {FILE_NAMES[1]}; took the first")
    file = TorchFile(found[0])
    contents = file.contents
    if not isinstance(contents, dict):
        raise CheckpointError("the file holds no dict", where=str(file.path), hint=_KIND_HINT)
    names = ["model"] if "model" in contents else []
    while not contents.get("model") and f"model{len(names)}" in contents:
        names.append(f"model{len(names)}")
    args, iteration = contents.get("args"), contents.get("iteration")
    if not names or not isinstance(args, Inert):
        lacks = "args" if names else "model"
        raise CheckpointError(
            f"the file has no '{lacks}'; Megatron's checkpoints do",
            where=str(file.path),
            hint=_KIND_HINT,
        )
    # Only scalars describe a model; anything else in args stays unlooked at.
    scalars = {
        name: value
        for name, value in args.state.items()
        if isinstance(name, str) and (value is None or isinstance(value, (bool, int, float, str)))
    }
    return RankFile(
        tp_rank=key[0],
        stage=key[1],
        file=file,
        args=scalars,
        iteration=iteration if type(iteration) is int else None,
        models=tuple(contents[name] for name in names),
    )
