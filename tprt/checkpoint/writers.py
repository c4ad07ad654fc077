"""Writes a checkpoint that a reader holds in another layout or for another number of ranks.

Tensors pass through one at a time, in the dtype on disk, bit for bit. A folder appears under its name
only when it is complete. This file knows the three layouts' files, not how a model is cut: for the
presharded one the caller brings the ``ShardSpec`` of every rank.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tprt.checkpoint.megatron import head_norm_name, is_qk_norm, megatron_name
from tprt.checkpoint.megatron_folders import TRACKER
from tprt.checkpoint.presharded import (
    FORMAT,
    MANIFEST,
    VERSION,
    config_to_json,
    covers,
    entry_to_json,
    rank_file_name,
)
from tprt.checkpoint.reader import (
    EMBEDDING,
    HEAD,
    CheckpointReader,
    dtype_name,
    listed,
)
from tprt.checkpoint.safetensors_file import SafetensorsWriter, raw_bytes, total_bytes
from tprt.distributed.sharding import ShardSpec, Slices
from tprt.errors import CheckpointError, OutputError

SpecsOfRank = Callable[[int, int], dict[str, ShardSpec]]
MAX_SHARD_BYTES = 5_000_000_000  # of a Hugging Face file, as save_pretrained cuts them


def write_huggingface(reader: CheckpointReader, dst: str | Path) -> None:
    """``config.json``, safetensors (with an index above 5 GB) and the tokenizer, under ``dst``.

    Raises:
        CheckpointError: the layout cannot hold the model (q/k LayerNorms that differ by head).
        OutputError: ``dst`` is not empty or cannot be written.
    """
    raw = reader.config.settled(reader.layout).to_hf() | {"torch_dtype": dtype_name(reader.dtype)}
    shards: list[list[str]] = [[]]
    size = 0
    for name in reader.names():
        nbytes = total_bytes([(reader.shape(name), reader.stored_dtype(name))])
        if shards[-1] and size + nbytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    with _folder(dst) as folder:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            entries = {n: (reader.shape(n), reader.stored_dtype(n)) for n in names}
            with SafetensorsWriter(folder / file, entries) as writer:
                for name in names:
                    writer.add(name, reader.read_whole(name))
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            headers = [(reader.shape(n), reader.stored_dtype(n)) for n in reader.names()]
            index = {"metadata": {"total_size": total_bytes(headers)}, "weight_map": weight_map}
            _write_json(folder / "model.safetensors.index.json", index)
        _write_json(folder / "config.json", raw)
        _copy_tokenizer(reader, folder / "tokenizer.model")


def write_presharded(
    reader: CheckpointReader, dst: str | Path, tp: int, specs: SpecsOfRank
) -> None:
    """One file per rank, cut by the model's own specs, and the manifest.

    Args:
        specs: (rank, tp) to the ``ShardSpec`` of every parameter, by Hugging Face's names.

    Raises:
        ConfigError: ``tp`` ranks cannot share the model.
        CheckpointError: the specs leave out a tensor or a part of one.
        OutputError: ``dst`` is not empty or cannot be written.
    """
    reader.config.validate_parallel(tp)
    ranks = [specs(rank, tp) for rank in range(tp)]
    _check_specs(reader, ranks)
    config = reader.config.settled(reader.layout)
    with _folder(dst) as folder:
        files = []
        for rank, cut in enumerate(ranks):
            path = folder / rank_file_name(rank, tp)
            entries = {n: (cut[n].local_shape, reader.stored_dtype(n)) for n in reader.names()}
            told = {}
            with SafetensorsWriter(path, entries) as writer:
                for name, (shape, dtype) in entries.items():
                    # On disk a parameter lies as it is cut, never transposed.
                    local = torch.empty(shape, dtype=dtype)
                    spec = replace(cut[name], transposed=False)
                    spec.load(local, _reading(reader, name))
                    writer.add(name, local)
                    digest = hashlib.sha256(raw_bytes(local)).hexdigest()
                    told[name] = entry_to_json(spec, dtype, digest)
            files.append({"name": path.name, "tensors": told})
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "tp_size": tp,
            "dtype": dtype_name(reader.dtype),
            "config": config_to_json(config),
            "files": files,
        }
        _write_json(folder / MANIFEST, manifest)
        _copy_tokenizer(reader, folder / "tokenizer.model")


def write_megatron(reader: CheckpointReader, dst: str | Path, tp: int, iteration: int = 1) -> None:
    """A release folder as Adept published them: tracker, ``iter_*/mp_rank_XX``, tokenizer.

    The file holds one rank at a time; its tensors wait on disk beside it, not in memory. A
    vocabulary that does not divide by ``tp`` gets padding rows of zeros; ``unpadded_vocab_size`` in
    ``args`` lets this project's reader leave them out again.

    Raises:
        ConfigError: ``tp`` ranks cannot share the model.
        OutputError: ``dst`` is not empty or cannot be written.
    """
    reader.config.validate_parallel(tp)
    config = reader.config.settled(reader.layout)
    args = config.to_megatron(tp, dtype_name(reader.dtype))
    args["params_dtype"] = reader.dtype
    args["iteration"] = iteration
    if config.eos_token_id is not None:
        args["eos_token_id"] = config.eos_token_id
    if config.vocab_size % tp:
        multiple = args["make_vocab_size_divisible_by"] * tp
        args["padded_vocab_size"] = -(-config.vocab_size // multiple) * multiple
        args["unpadded_vocab_size"] = config.vocab_size
    with _folder(dst) as folder:
        for rank in range(tp):
            place = folder / f"iter_{iteration:07d}" / f"mp_rank_{rank:02d}"
            place.mkdir(parents=True)
            scratch = folder / "scratch"
            scratch.mkdir()
            contents = {
                "args": argparse.Namespace(**args, rank=rank),
                "checkpoint_version": 3.0,
                "iteration": iteration,
                "model": _rank_model(reader, rank, tp, args["padded_vocab_size"], scratch),
                "rng_state": [_rng_state()],
            }
            _save(contents, place / "model_optim_rng.pt")
            del contents
            shutil.rmtree(scratch)
        (folder / TRACKER).write_text(f"{iteration}\n")
        _copy_tokenizer(reader, folder / "adept_vocab.model")


# Parts of the Megatron layout


def _rank_model(
    reader: CheckpointReader, rank: int, tp: int, padded_vocab: int, scratch: Path
) -> dict[str, Any]:
    """The ``model`` of one rank file; every tensor is mapped from a file of its own."""
    encoder: dict[str, torch.Tensor] = {}
    model: dict[str, Any] = {"language_model": {"encoder": encoder}}
    for index, name in enumerate(reader.names()):
        shape = reader.shape(name)
        theirs, dim = megatron_name(name)
        wanted = list(shape)
        block = [slice(0, n) for n in shape]
        per_head = is_qk_norm(name) and len(shape) == 2
        if per_head:
            dim = 0
        if dim is not None:
            total = padded_vocab if name in (EMBEDDING, HEAD) else shape[dim]
            wanted[dim] = total // tp
            first = min(rank * wanted[dim], shape[dim])
            block[dim] = slice(first, min(first + wanted[dim], shape[dim]))
        tensor = _mapped(scratch / str(index), tuple(wanted), reader.stored_dtype(name))
        filled = tuple(slice(0, s.stop - s.start) for s in block)
        tensor[filled].copy_(reader.read(name, tuple(block)))
        if name == EMBEDDING:
            model["language_model"]["embedding"] = {"word_embeddings": {"weight": tensor}}
        elif name == HEAD:
            model["word_embeddings_for_head"] = {"weight": tensor}
        else:
            key = theirs.removeprefix("language_model.encoder.")
            if not per_head:
                encoder[key] = tensor
            for head in range(len(tensor) if per_head else 0):
                encoder[head_norm_name(key, head)] = tensor[head].clone()
    return model


def _save(contents: dict[str, Any], path: Path) -> None:
    try:
        torch.save(contents, path)
    except RuntimeError as error:  # what its zip writer raises on a full disk
        raise OutputError(
            f"cannot write the checkpoint: {str(error)[:200]}",
            where=str(path),
            hint="a disk with room",
        ) from error


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that live in a new file: pages leave memory when it gets short."""
    count = prod(shape)
    with open(path, "xb") as file:
        # A full disk must be an error here, not a SIGBUS at the first write to the mapping.
        os.posix_fallocate(file.fileno(), 0, max(1, count * dtype.itemsize))
    flat = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
    return flat.view(shape)


def _rng_state() -> dict[str, Any]:
    """The five keys a Megatron loader looks for, from generators of its own with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return {
        "random_rng_state": random.Random(0).getstate(),
        "np_rng_state": np.random.RandomState(0).get_state(),
        "torch_rng_state": generator.get_state(),
        "cuda_rng_state": generator.get_state(),
        "rng_tracker_states": {},
    }


# Shared parts


def _reading(reader: CheckpointReader, name: str) -> Callable[[Slices], torch.Tensor]:
    return lambda slices: reader.read(name, slices)


def _check_specs(reader: CheckpointReader, ranks: list[dict[str, ShardSpec]]) -> None:
    shapes = reader.config.tensor_shapes()
    for rank, cut in enumerate(ranks):
        # A tied head is the embedding; a spec for it needs no tensor of its own.
        different = cut.keys() ^ shapes.keys()
        if reader.config.tie_word_embeddings:
            different -= {HEAD}
        if different:
            raise CheckpointError(
                f"the specs of rank {rank} and the checkpoint name different tensors: "
                f"{listed(different)}",
                where=str(reader.path),
                hint="the specs of a model made from this checkpoint's config",
            )
    for name, shape in shapes.items():
        pieces = [piece.canonical for cut in ranks for piece in cut[name].pieces]
        boxes = list({str(box): box for box in pieces}.values())  # replicas count once
        if any(cut[name].canonical_shape != shape for cut in ranks) or not covers(shape, boxes):
            raise CheckpointError(
                f"the specs of {len(ranks)} ranks do not make up the whole of {name} {list(shape)}",
                where=str(reader.path),
                hint="specs made without pruning the vocabulary",
            )


def _copy_tokenizer(reader: CheckpointReader, target: Path) -> None:
    if reader.tokenizer_path is not None:
        shutil.copyfile(reader.tokenizer_path, target)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _folder(dst: str | Path) -> Iterator[Path]:
    """A sibling of ``dst`` to write into; it takes the name ``dst`` when everything is on disk."""
    dst = Path(dst).resolve()
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise OutputError(
            "the destination is not an empty folder", where=str(dst), hint="another path"
        )
    partial = dst.with_name(f".{dst.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in sorted(partial.rglob("*")):
            _sync(file)
        _sync(partial)
        os.rename(partial, dst)
        _sync(dst.parent)
    except OSError as error:
        raise OutputError(
            f"cannot write the checkpoint: {error.strerror or error}",
            where=str(error.filename or dst),
            hint=_output_hint(error),
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _output_hint(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "a disk with room" if full else "a path you may write to"
