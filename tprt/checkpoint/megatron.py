"""Megatron's ``mp_rank`` folders, as Adept published Persimmon.

A checkpoint is ``iter_*/mp_rank_XX[_YYY]/model_optim_rng.pt``: one file per tensor-parallel rank XX
and pipeline stage YYY. This file knows Megatron's names and along which dimension each tensor is cut
on disk; that is the format's fact and stands nowhere else. Folders are the business of
``megatron_folders``, pickles and zip files that of ``torch_file``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tprt.checkpoint.megatron_folders import (
    RankFile,
    check_ranks_agree,
    find_iteration,
    open_rank_files,
    tokenizer_folders,
)
from tprt.checkpoint.reader import (
    EMBEDDING,
    HEAD,
    CheckpointReader,
    PlacedBlock,
    TensorInfo,
    check_spare_head,
    check_tensors,
    dtype_name,
    find_tokenizer,
    main_dtype,
    normal,
    overlap,
)
from tprt.checkpoint.stand_ins import StoredTensor
from tprt.checkpoint.torch_file import TorchFile, flatten, integer_view
from tprt.config import QK_PER_HEAD, QK_PER_RANK
from tprt.distributed.sharding import Slices
from tprt.errors import CheckpointError

_SAVE_HINT = "rank files of one and the same save"
_ENCODER = "language_model.encoder"
# Hugging Face's name, Megatron's name, dimension cut over tensor-parallel ranks (None: replicated)
_OUTER: tuple[tuple[str, str, int | None], ...] = (
    (EMBEDDING, "language_model.embedding.word_embeddings.weight", 0),
    (HEAD, "word_embeddings_for_head.weight", 0),
    ("model.final_layernorm.weight", f"{_ENCODER}.final_layernorm.weight", None),
    ("model.final_layernorm.bias", f"{_ENCODER}.final_layernorm.bias", None),
)
_CUT_IN_LAYER: dict[str, int] = {
    "self_attn.query_key_value.weight": 0,  # rows are [head, q|k|v, d]: a part is whole heads
    "self_attn.query_key_value.bias": 0,
    "self_attn.dense.weight": 1,
    "mlp.dense_h_to_4h.weight": 0,
    "mlp.dense_h_to_4h.bias": 0,
    "mlp.dense_4h_to_h.weight": 1,
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_QK_NORM = re.compile(r"self_attn\.[qk]_layernorm\.(weight|bias)")


def megatron_name(name: str) -> tuple[str, int | None]:
    """Megatron's name of a Hugging Face name, and the dimension cut over ranks."""
    for hf, megatron, dim in _OUTER:
        if hf == name:
            return megatron, dim
    match = _LAYER.fullmatch(name)
    assert match, name
    inner = match[2]
    megatron = inner.replace("self_attn.", "self_attention.")
    return f"{_ENCODER}.layers.{match[1]}.{megatron}", _CUT_IN_LAYER.get(inner)


def head_norm_name(megatron: str, local_head: int) -> str:
    """The name of one head's q/k LayerNorm in the per-head mode; heads count from 0 in each rank."""
    base, _, part = megatron.rpartition(".")
    return f"{base}.layernorms.{local_head}.{part}"


def is_qk_norm(name: str) -> bool:
    match = _LAYER.fullmatch(name)
    return bool(match and _QK_NORM.fullmatch(match[2]))


@dataclass(frozen=True)
class _Block:
    """One rank file's part of a tensor: ``tensor`` starts at ``start`` along the cut dimension."""

    file: TorchFile
    tensor: StoredTensor
    start: int


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    dim: int | None
    blocks: tuple[_Block, ...]


class MegatronReader(CheckpointReader):
    """Reads a release folder (with its tracker file) or one ``iter_*`` folder, at any TP size.

    Raises:
        CheckpointError: folders, names, headers or replicated tensors contradict one another.
    """

    layout = "megatron"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warnings: list[str] = []
        self.iteration_folder = find_iteration(path)
        grid = open_rank_files(self.iteration_folder, self.warnings)
        self.config, self.disk_tp, mode = check_ranks_agree(grid, self.iteration_folder)
        self.disk_pp = len(grid[0])
        self._files = [rank.file for stages in grid for rank in stages]
        self._spare_heads: list[tuple[int, TorchFile, StoredTensor]] = []
        ranks = [self._merge_stages(stages) for stages in grid]
        self._check_names(ranks, grid, mode)
        self._check_spare_heads(ranks)
        self._entries = {
            name: self._entry(name, shape, ranks, mode)
            for name, shape in self.config.tensor_shapes().items()
        }
        self._check_replicas(ranks, mode)
        self.dtype = main_dtype([self.stored_dtype(name) for name in self._entries])
        self.tokenizer_path = find_tokenizer(tokenizer_folders(path, self.iteration_folder))

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def stored_dtype(self, name: str) -> torch.dtype:
        return self._entries[name].blocks[0].tensor.dtype

    def read(self, name: str, slices: Slices) -> torch.Tensor:
        entry = self._entries[name]
        asked = normal(slices, entry.shape)
        out = torch.empty([s.stop - s.start for s in asked], dtype=self.stored_dtype(name))
        target = integer_view(out)
        for block, source, place in _parts(entry, asked):
            np.copyto(target[place], block.file.view(block.tensor, source))
        return out

    def locate(self, name: str, slices: Slices) -> list[PlacedBlock]:
        entry = self._entries[name]
        return [
            (block.file.locate(block.tensor, source), place)
            for block, source, place in _parts(entry, normal(slices, entry.shape))
        ]

    def describe(self) -> list[TensorInfo]:
        return [
            TensorInfo(name, e.shape, dtype_name(self.stored_dtype(name)), e.dim, self.disk_tp)
            for name, e in self._entries.items()
        ]

    def verify_full(self) -> None:
        for file in self._files:
            file.verify_crc()

    def checksums(self) -> list[list[object]]:
        return [file.checksums() for file in self._files]

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self._files)

    def close(self) -> None:
        self._entries.clear()
        self._files.clear()

    # Building the entries

    def _merge_stages(self, stages: list[RankFile]) -> dict[str, tuple[TorchFile, StoredTensor]]:
        """All tensors of one tensor-parallel rank, layers numbered through all pipeline stages."""
        chunks: list[list[tuple[RankFile, dict[str, StoredTensor]]]] = []
        for stage in stages:
            # model0, model1, ... are virtual stages: chunk v of every stage comes before v + 1.
            for index, model in enumerate(stage.models):
                if len(chunks) <= index:
                    chunks.append([])
                where = str(stage.file.path)
                chunks[index].append((stage, _standard_names(flatten(model, where), where)))
        merged: dict[str, tuple[TorchFile, StoredTensor]] = {}
        offset = 0
        for stage, tensors in (pair for row in chunks for pair in row):
            layers = 0
            for name, tensor in tensors.items():
                if self.config.tie_word_embeddings and name == megatron_name(HEAD)[0]:
                    # The last stage's copy of the embedding, which may be on another stage.
                    self._spare_heads.append((stages[0].tp_rank, stage.file, tensor))
                    continue
                match = re.fullmatch(rf"({_ENCODER}\.layers\.)(\d{{1,6}})(\..+)", name)
                if match:
                    layers = max(layers, int(match[2]) + 1)
                    name = f"{match[1]}{int(match[2]) + offset}{match[3]}"
                if name in merged:
                    raise CheckpointError(
                        f"'{name}' is in two pipeline stages",
                        where=str(stage.file.path),
                        hint=_SAVE_HINT,
                    )
                merged[name] = (stage.file, tensor)
            offset += layers
        return merged

    def _local_shape(self, name: str, mode: object) -> tuple[int, ...]:
        """Shape of a tensor in one rank file; per-head norms are one entry per head there."""
        shape = self.config.tensor_shapes()[name]
        _, dim = megatron_name(name)
        if is_qk_norm(name) and mode in (QK_PER_RANK, QK_PER_HEAD):
            return (self.config.head_dim,)
        if dim is None:
            return shape
        rows = self._padded_vocab if name in (EMBEDDING, HEAD) else shape[dim]
        return (*shape[:dim], rows // self.disk_tp, *shape[dim + 1 :])

    def _check_names(
        self,
        ranks: list[dict[str, tuple[TorchFile, StoredTensor]]],
        grid: list[list[RankFile]],
        mode: object,
    ) -> None:
        # A writer of ours may record how many rows of a padded vocabulary are real.
        self._padded_vocab = self.config.vocab_size
        args = grid[0][0].args
        real, eos = args.get("unpadded_vocab_size"), args.get("eos_token_id")
        if type(real) is int and 0 < real <= self._padded_vocab:
            self.config = replace(self.config, vocab_size=real)
        if type(eos) is int:
            self.config = replace(self.config, eos_token_id=eos)
        local_heads = self.config.num_attention_heads // self.disk_tp
        wanted: dict[str, tuple[int, ...]] = {}
        parts: dict[str, list[str]] = {}  # what one tensor of the model is in each rank file
        shapes = self.config.tensor_shapes()
        local = {}
        for name in shapes:
            key = re.sub(r"layers\.\d+\.", "layers.0.", name)
            if key not in local:
                local[key] = self._local_shape(name, mode)
            theirs, _ = megatron_name(name)
            parts[theirs] = [theirs]
            if is_qk_norm(name) and mode == QK_PER_HEAD:
                parts[theirs] = [head_norm_name(theirs, head) for head in range(local_heads)]
            wanted |= dict.fromkeys(parts[theirs], local[key])
        for rank, stages in zip(ranks, grid, strict=True):
            found = {name: (tensor.shape, tensor.dtype) for name, (_, tensor) in rank.items()}
            paths = [str(stage.file.path) for stage in stages]
            check_tensors(found, wanted, ", ".join(paths))
            for file, tensor in rank.values():
                file.check_storage(tensor)
        # Blocks of one tensor are copied as bits, so a second dtype would be read as the first.
        for theirs, names in parts.items():
            dtypes = {rank[name][1].dtype for rank in ranks for name in names}
            if len(dtypes) > 1:
                raise CheckpointError(
                    f"the parts of '{theirs}' in ranks and heads have several dtypes: "
                    + ", ".join(sorted(map(dtype_name, dtypes))),
                    where=str(self.iteration_folder),
                    hint=_SAVE_HINT,
                )

    def _check_spare_heads(self, ranks: list[dict[str, tuple[TorchFile, StoredTensor]]]) -> None:
        for rank, head_file, head in self._spare_heads:
            file, embedding = ranks[rank][megatron_name(EMBEDDING)[0]]
            if head_file is file and head == embedding:
                continue  # one storage under two names
            check_spare_head(
                (head.shape, head.dtype),
                (embedding.shape, embedding.dtype),
                partial(head_file.read, head),
                partial(file.read, embedding),
                str(head_file.path),
            )
        self._spare_heads.clear()  # they hold the files open

    def _entry(
        self,
        name: str,
        shape: tuple[int, ...],
        ranks: list[dict[str, tuple[TorchFile, StoredTensor]]],
        mode: object,
    ) -> _Entry:
        theirs, dim = megatron_name(name)
        if is_qk_norm(name) and mode in (QK_PER_RANK, QK_PER_HEAD):
            return _Entry(shape, 0, tuple(self._norm_blocks(theirs, ranks, mode)))
        if dim is None:
            return _Entry(shape, None, (_Block(*ranks[0][theirs], 0),))
        blocks, start = [], 0
        for rank in ranks:
            file, tensor = rank[theirs]
            blocks.append(_Block(file, tensor, start))
            start += tensor.shape[dim]
        return _Entry(shape, dim, tuple(blocks))

    def _norm_blocks(
        self, theirs: str, ranks: list[dict[str, tuple[TorchFile, StoredTensor]]], mode: object
    ) -> Iterator[_Block]:
        """Both modes are shown as [heads, head_dim]; a rank's one row stands for all its heads."""
        heads = self.config.num_attention_heads // self.disk_tp
        for index, rank in enumerate(ranks):
            if mode == QK_PER_RANK:
                file, tensor = rank[theirs]
                rows = replace(tensor, shape=(heads, *tensor.shape), stride=(0, *tensor.stride))
                yield _Block(file, rows, index * heads)
                continue
            for head in range(heads):
                file, tensor = rank[head_norm_name(theirs, head)]
                row = replace(tensor, shape=(1, *tensor.shape), stride=(1, *tensor.stride))
                yield _Block(file, row, index * heads + head)

    def _check_replicas(
        self, ranks: list[dict[str, tuple[TorchFile, StoredTensor]]], mode: object
    ) -> None:
        """LayerNorms and row-parallel biases must be the same in every rank file, to the bit.

        Megatron trained some models with copies that drifted apart; which copy would be right is
        not for a reader to guess.
        """
        for name, entry in self._entries.items():
            if entry.dim is not None or len(ranks) == 1:
                continue
            theirs, _ = megatron_name(name)
            first_file, first = ranks[0][theirs]
            whole = tuple(slice(0, n) for n in first.shape)
            expected = first_file.view(first, whole)
            for index, rank in enumerate(ranks[1:], 1):
                file, tensor = rank[theirs]
                if not np.array_equal(expected, file.view(tensor, whole)):
                    raise CheckpointError(
                        f"'{theirs}' should be the same in every rank, "
                        f"but mp_rank_00 and mp_rank_{index:02d} differ",
                        where=str(file.path),
                        hint="rank files of one and the same save; or average the copies once and "
                        "save them again",
                    )


def _parts(entry: _Entry, asked: Slices) -> Iterator[tuple[_Block, Slices, Slices]]:
    """The blocks that hold a part of ``asked``, its slices there, and its place in the result."""
    place = [slice(0, s.stop - s.start) for s in asked]
    if entry.dim is None:
        yield entry.blocks[0], asked, tuple(place)
        return
    source, along = list(asked), asked[entry.dim]
    for block in entry.blocks:
        end = block.start + block.tensor.shape[entry.dim]
        start, stop = overlap(along, block.start, end)
        if stop <= start:
            continue
        source[entry.dim] = slice(start - block.start, stop - block.start)
        place[entry.dim] = slice(start - along.start, stop - along.start)
        yield block, tuple(source), tuple(place)


def _standard_names(tensors: dict[str, StoredTensor], where: str) -> dict[str, StoredTensor]:
    """Today's spelling of every name, without what is computed rather than trained."""
    standard: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        name = name.removeprefix("module.")
        name = re.sub(r"^language_model\.transformer\.", f"{_ENCODER}.", name)
        name = name.replace(".attention.", ".self_attention.")
        name = re.sub(
            r"^(language_model\.)?(embedding\.)?word_embeddings\.weight$",
            "language_model.embedding.word_embeddings.weight",
            name,
        )
        if name in standard:
            raise CheckpointError(
                f"'{name}' is there in two spellings", where=where, hint=_SAVE_HINT
            )
        standard[name] = tensor
    return standard
