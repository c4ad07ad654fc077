"""Loading by many threads: the same bits, bytes and errors as reading tensor after tensor."""

import errno
import gc
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from folders import CONFIG, hf_folder
from hypothesis import given
from hypothesis import strategies as st
from megatron_writer import random_model, write_release
from toy_model import Toy, specs_of

from tprt.checkpoint import (
    CheckpointReader,
    StreamSettings,
    block_files,
    load_weights,
    open_checkpoint,
    write_presharded,
)
from tprt.checkpoint.block_files import BlockFiles, run_bytes, split
from tprt.checkpoint.reader import FileBlock
from tprt.distributed.sharding import broadcast_rows, shard_spec
from tprt.errors import CheckpointError

PER_RANK = "weights_per_tensor_parallel_rank_and_layer"
PER_HEAD = "weights_per_attention_head_and_layer"
IN_PLACE = StreamSettings(3, 4096, 3)
# Every matrix of the small models is larger than this ring's buffers, most rows are not.
STAGED = StreamSettings(3, 1024, 4, in_place=False)
ALONE = StreamSettings(1, 1024, 2)
SETTINGS = {"in place": IN_PLACE, "staged": STAGED, "one thread": ALONE}


def one_by_one(model: torch.nn.Module, reader: CheckpointReader) -> None:
    """The oracle: each block through ``read``, in this thread."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spec = shard_spec(parameter)
            spec.load(parameter, lambda slices, name=name: reader.read(name, slices))


def assert_same_bits(got: torch.nn.Module, expected: torch.nn.Module) -> None:
    pairs = zip(got.named_parameters(), expected.named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        assert a.detach().view(torch.uint8).equal(b.detach().view(torch.uint8)), name


def megatron(disk_tp: int, qk: str = "weights_per_layer") -> Callable:
    def write(path):
        write_release(path, random_model(dtype=torch.bfloat16, qk=qk, tp=disk_tp), disk_tp, qk=qk)

    return write


def strided(path):
    """Tensors saved as views: their rows do not lie side by side."""
    model = random_model(dtype=torch.bfloat16)
    for name, tensor in model.items():
        if name.endswith(("dense.weight", "4h_to_h.weight")):
            model[name] = tensor.t().contiguous().t()
    write_release(path, model)


def views(path):
    """Tensors saved as the second half of their storage."""
    model = random_model(dtype=torch.bfloat16)
    hf_folder(path, {n: torch.cat([-t, t])[len(t) :] for n, t in model.items()}, form="bin")


def hugging_face(form: str) -> Callable:
    return lambda path: hf_folder(path, random_model(dtype=torch.bfloat16), form=form)


def odd_vocabulary(path):
    """Rows that do not divide by 2 or 4: the last ranks get padding."""
    hf_folder(path, random_model(dtype=torch.bfloat16, vocab=45), replace(CONFIG, vocab_size=45))


def presharded(path):
    hugging_face("safetensors")(path / "source")
    reader = open_checkpoint(path / "source")
    write_presharded(reader, path / "written", 2, specs_of(reader.config))
    for file in (path / "written").iterdir():
        file.rename(path / file.name)


LAYOUTS = {
    "megatron 1": megatron(1),
    "megatron 2": megatron(2),
    "megatron 4": megatron(4),
    "megatron, norms per rank": megatron(2, PER_RANK),
    "megatron, norms per head": megatron(2, PER_HEAD),
    "megatron, strided": strided,
    "safetensors": hugging_face("safetensors"),
    "safetensors shards": hugging_face("safetensors shards"),
    "bin": hugging_face("bin"),
    "bin shards": hugging_face("bin shards"),
    "bin, views": views,
    "odd vocabulary": odd_vocabulary,
    "presharded 2": presharded,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_and_bytes_as_one_by_one(tmp_path, layout, monkeypatch):
    """Guards every layout at 1, 2 and 4 ranks: padding, repeated norms, a transposed matrix, dtypes."""
    LAYOUTS[layout](tmp_path)
    with open_checkpoint(tmp_path) as reader, open_checkpoint(tmp_path) as other:
        specs = specs_of(reader.config)
        for rank, tp in ((0, 1), (0, 2), (1, 2), (2, 4), (3, 4)):
            for dtype in (torch.bfloat16, torch.float32):
                expected = Toy(specs(rank, tp), dtype)
                before = other.bytes_read
                one_by_one(expected, other)
                needed = other.bytes_read - before
                for label, settings in SETTINGS.items():
                    # Runs of any length by one call each, too.
                    monkeypatch.setattr(block_files, "MIN_RUN", 1 if label == "staged" else 1 << 16)
                    got = Toy(specs(rank, tp), dtype)
                    before = reader.bytes_read
                    stats = load_weights(got, reader, settings)
                    assert_same_bits(got, expected)
                    assert reader.bytes_read - before == stats.bytes_read == needed, label


def test_narrower_dtype_than_on_disk(tmp_path):
    hf_folder(tmp_path, random_model(dtype=torch.float32))
    reader = open_checkpoint(tmp_path)
    expected, got = (Toy(specs_of(reader.config)(1, 2), torch.bfloat16) for _ in range(2))
    one_by_one(expected, reader)
    load_weights(got, reader, STAGED)
    assert_same_bits(got, expected)


def test_block_repeated_along_a_new_dimension_in_a_small_ring(tmp_path):
    """Guards a repeated tensor that is cut into parts: each part is repeated."""
    hf_folder(tmp_path, random_model(dtype=torch.bfloat16))
    reader = open_checkpoint(tmp_path)
    name = "model.layers.0.mlp.dense_h_to_4h.weight"
    specs = specs_of(reader.config)(0, 1)
    specs[name] = broadcast_rows(3, reader.shape(name))
    expected, got = Toy(specs), Toy(specs)
    one_by_one(expected, reader)
    load_weights(got, reader, replace(STAGED, buffer_bytes=128))
    assert_same_bits(got, expected)


def test_host_copies_are_dense_where_a_device_transposes(tmp_path, monkeypatch):
    """Guards against a transposition element by element on the host."""
    reader = open_checkpoint(hf_folder(tmp_path, random_model(dtype=torch.bfloat16)))
    read, seen = BlockFiles.read, []

    def spy(files, name, block, out):
        if name.endswith("dense_4h_to_h.weight"):
            seen.append(out.flags.c_contiguous)
        read(files, name, block, out)

    monkeypatch.setattr(BlockFiles, "read", spy)
    specs = specs_of(reader.config)(1, 2)
    assert specs["model.layers.0.mlp.dense_4h_to_h.weight"].transposed
    load_weights(Toy(specs, torch.bfloat16), reader, IN_PLACE)
    assert seen and all(seen)


class NoLocations(CheckpointReader):
    """A layout that keeps no raw elements."""

    layout = "huggingface"

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self.path, self.config, self.warnings = reader.path, reader.config, []
        for name in ("names", "shape", "stored_dtype", "read", "describe", "verify_full"):
            setattr(self, name, getattr(reader, name))

    names = shape = stored_dtype = read = describe = None  # type: ignore[assignment]
    verify_full = checksums = close = None  # type: ignore[assignment]

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read


def test_reader_that_only_reads(tmp_path):
    model = random_model(dtype=torch.bfloat16)
    reader = open_checkpoint(hf_folder(tmp_path / "good", model))
    expected, got = (Toy(specs_of(reader.config)(1, 2)) for _ in range(2))
    one_by_one(expected, reader)
    stats = load_weights(got, NoLocations(reader), STAGED)
    assert_same_bits(got, expected)
    specs = specs_of(reader.config)(1, 2).values()
    assert stats.bytes_read == sum(spec.needed_bytes(2) for spec in specs)

    model["model.layers.1.mlp.dense_h_to_4h.bias"][-1] = math.inf
    reader = open_checkpoint(hf_folder(tmp_path / "bad", model))
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.dense_h_to_4h.bias holds NaN"):
        load_weights(Toy(specs_of(reader.config)(1, 2)), NoLocations(reader), STAGED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gets_the_bits_of_the_cpu(tmp_path):
    """Guards the copy stream: a ring that goes round many times, conversion and transposition."""
    sizes = {"hidden": 256, "ffn": 1024, "vocab": 4096, "heads": 4}
    model = random_model(dtype=torch.bfloat16, **sizes)
    config = replace(
        CONFIG, vocab_size=4096, hidden_size=256, intermediate_size=1024, head_dim=64
    )  # fmt: skip
    reader = open_checkpoint(hf_folder(tmp_path, model, config))
    for rank, tp in ((0, 1), (1, 2), (3, 4)):
        for dtype in (torch.bfloat16, torch.float32):
            for settings in (None, StreamSettings(4, 1 << 16, 6), StreamSettings(1, 1 << 12, 2)):
                expected = Toy(specs_of(reader.config)(rank, tp), dtype)
                one_by_one(expected, reader)
                got = Toy(specs_of(reader.config)(rank, tp), dtype).cuda()
                for name, parameter in got.named_parameters():
                    parameter.shard_spec = specs_of(reader.config)(rank, tp)[name]
                stats = load_weights(got, reader, settings)
                assert_same_bits(got.cpu(), expected)
                assert stats.read_s > 0 and stats.copy_s > 0
    model["model.layers.1.input_layernorm.bias"][3] = math.nan
    model["model.layers.2.input_layernorm.bias"][3] = math.nan
    reader = open_checkpoint(hf_folder(tmp_path / "bad", model, config))
    bad = Toy(specs_of(reader.config)(0, 1)).cuda()
    for name, parameter in bad.named_parameters():
        parameter.shard_spec = specs_of(reader.config)(0, 1)[name]
    with pytest.raises(CheckpointError, match=r"layers.1.input_layernorm.bias holds NaN"):
        load_weights(bad, reader)


# Failures


def held() -> tuple[int, int, int]:
    files, tasks = (len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task"))
    return files, threading.active_count(), tasks


@contextmanager
def nothing_left() -> Iterator[None]:
    """Neither threads nor open files outlive the block."""
    gc.collect()  # readers of earlier tests hold files open
    before = held()
    yield
    assert held()[:2] == before[:2]
    for _ in range(40):  # the system ends a thread a moment after Python does
        if held() == before:
            break
        time.sleep(0.05)
    assert held() == before


@pytest.fixture
def folder(tmp_path):
    return hf_folder(tmp_path, random_model(dtype=torch.bfloat16))


def place_of(reader: CheckpointReader, name: str) -> tuple[int, int]:
    """Where in the one file ``name`` lies."""
    shape = reader.shape(name)
    (block, _), *more = reader.locate(name, tuple(slice(0, n) for n in shape))
    assert not more
    return block.offset, block.offset + block.nbytes


def reading(change: Callable[[int, Callable[[], int]], int], monkeypatch) -> list[int]:
    """Put ``change(offset, read)`` in the place of each read; the offsets of all of them."""
    true, offsets = os.preadv, []

    def preadv(fd, buffers, offset):
        offsets.append(offset)
        return change(offset, lambda: true(fd, buffers, offset))

    monkeypatch.setattr(os, "preadv", preadv)
    return offsets


def test_reads_are_at_once(folder, monkeypatch):
    """Guards against threads that wait for one another: three must be inside a read together."""
    lock, together, inside = threading.Lock(), threading.Event(), set()

    def change(offset, read):
        with lock:
            inside.add(offset)
            if len(inside) == 3:
                together.set()
        assert together.wait(30)
        inside.discard(offset)
        return read()

    reading(change, monkeypatch)
    reader = open_checkpoint(folder)
    with nothing_left():
        load_weights(Toy(specs_of(reader.config)(0, 1), torch.bfloat16), reader, IN_PLACE)
    assert together.is_set()


def test_files_and_threads_are_gone(folder, monkeypatch):
    """Guards good loads of each kind, with mapped files among them."""
    reader = open_checkpoint(folder)
    for settings in SETTINGS.values():
        with nothing_left():
            load_weights(Toy(specs_of(reader.config)(1, 4)), reader, settings)


@pytest.mark.parametrize("settings", SETTINGS)
def test_disk_that_fails(folder, settings, monkeypatch):
    """Guards an I/O error in a thread: told by name, the rest not begun, nothing left behind."""
    reader = open_checkpoint(folder)
    names = reader.names()
    start, end = place_of(reader, names[4])

    def change(offset, read):
        if start <= offset < end:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read()

    offsets = reading(change, monkeypatch)
    toy = Toy(specs_of(reader.config)(0, 1), torch.bfloat16)
    with nothing_left(), pytest.raises(CheckpointError) as caught:
        load_weights(toy, reader, SETTINGS[settings])
    assert f"'{names[4]}' cannot be read: Input/output error" in caught.value.what
    assert caught.value.where == str(folder / "model.safetensors") and caught.value.hint
    last = place_of(reader, names[-1])
    assert not any(last[0] <= offset < last[1] for offset in offsets)


def test_first_failure_is_told_though_another_was_earlier(folder, monkeypatch):
    """Guards the order of the model: slow threads before a quick one that failed are heard out."""
    reader = open_checkpoint(folder)
    # In batches of their own.
    first, second = "model.embed_tokens.weight", "model.layers.0.self_attn.dense.weight"
    places = {name: place_of(reader, name) for name in (first, second)}
    failed = threading.Event()

    def change(offset, read):
        if places[first][0] <= offset < places[first][1]:
            assert failed.wait(30)
            time.sleep(0.05)
            raise OSError(errno.EIO, "slow")
        if places[second][0] <= offset < places[second][1]:
            failed.set()
            raise OSError(errno.EIO, "quick")
        return read()

    reading(change, monkeypatch)
    toy = Toy(specs_of(reader.config)(0, 1), torch.bfloat16)
    with nothing_left(), pytest.raises(CheckpointError, match=f"'{first}' cannot be read: slow"):
        load_weights(toy, reader, IN_PLACE)


@pytest.mark.parametrize("settings", SETTINGS)
def test_value_that_is_no_number_before_a_read_that_fails(tmp_path, settings, monkeypatch):
    """Guards a batch of small tensors: what was read of it before the failure is looked through."""
    model = random_model(dtype=torch.bfloat16)
    bad, failing = (f"model.layers.1.input_layernorm.{part}" for part in ("weight", "bias"))
    model[bad][5] = math.nan
    reader = open_checkpoint(hf_folder(tmp_path, model))
    start, end = place_of(reader, failing)

    def change(offset, read):
        if start <= offset < end:
            raise OSError(errno.EIO, "gone")
        return read()

    reading(change, monkeypatch)
    toy = Toy(specs_of(reader.config)(0, 1), torch.bfloat16)
    with nothing_left(), pytest.raises(CheckpointError, match=f"{bad} holds NaN"):
        load_weights(toy, reader, SETTINGS[settings])


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("damage", ["cut off", "longer", "rewritten"])
def test_file_changed_after_it_was_opened(tmp_path, form, damage):
    """Guards against offsets of an old header, and against a mapping past the end of a file."""
    model = random_model(dtype=torch.bfloat16)
    folder = hf_folder(tmp_path, model, form=form)
    reader = open_checkpoint(folder)
    file = next(folder.glob("*model.*[ns]"))
    if damage == "rewritten":
        stamp = file.stat().st_mtime_ns
        file.write_bytes(file.read_bytes()[::-1])
        os.utime(file, ns=(stamp, stamp + 1))  # the system's clock may not have ticked since
    else:
        os.truncate(file, file.stat().st_size + (-100 if damage == "cut off" else 100))
    with nothing_left(), pytest.raises(CheckpointError, match="was changed after") as caught:
        load_weights(Toy(specs_of(reader.config)(1, 2)), reader, STAGED)
    assert caught.value.where == str(file) and caught.value.hint


def test_file_that_ends_while_it_is_read(folder, monkeypatch):
    reader = open_checkpoint(folder)
    start, end = place_of(reader, "lm_head.weight")
    reading(lambda offset, read: 0 if start <= offset < end else read(), monkeypatch)
    toy = Toy(specs_of(reader.config)(0, 1), torch.bfloat16)
    with nothing_left(), pytest.raises(CheckpointError, match=r"ends inside 'lm_head.weight'"):
        load_weights(toy, reader, IN_PLACE)


def test_reads_that_return_less_than_asked(folder, monkeypatch):
    """Guards the loop: a file system may return any part of what was asked."""
    true = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, to, at: true(fd, [to[0][: min(7, len(to[0]))]], at)
    )
    reader = open_checkpoint(folder)
    expected, got = (Toy(specs_of(reader.config)(0, 1), torch.bfloat16) for _ in range(2))
    one_by_one(expected, reader)
    load_weights(got, reader, IN_PLACE)
    assert_same_bits(got, expected)


def test_file_that_is_gone(folder):
    reader = open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with nothing_left(), pytest.raises(CheckpointError, match=r"embed_tokens.*No such file"):
        load_weights(Toy(specs_of(reader.config)(0, 1)), reader, STAGED)


def test_interrupted_in_the_calling_thread(folder, monkeypatch):
    """Guards Ctrl-C: threads end with what they are at, files are closed."""
    reader = open_checkpoint(folder)
    locate = reader.locate

    def interrupted(name, slices):
        if "layers.1" in name:
            raise KeyboardInterrupt
        return locate(name, slices)

    monkeypatch.setattr(reader, "locate", interrupted)
    with nothing_left(), pytest.raises(KeyboardInterrupt):
        load_weights(Toy(specs_of(reader.config)(0, 1)), reader, STAGED)


# Pieces


@given(st.lists(st.integers(0, 7), min_size=1, max_size=3), st.integers(1, 60))
def test_split_makes_up_the_shape(shape, limit):
    seen = np.zeros(shape, int)
    blocks = list(split(shape, limit))
    for block in blocks:
        assert math.prod(s.stop - s.start for s in block) <= limit
        seen[block] += 1
    assert (seen == 1).all()
    starts = [tuple(s.start for s in block) for block in blocks]
    assert starts == sorted(starts)


def block(shape, strides, **more) -> FileBlock:
    defaults = {"path": None, "stamp": (0, 0), "offset": 0, "dtype": torch.bfloat16}
    return FileBlock(**(defaults | more), shape=shape, strides=strides)


@pytest.mark.parametrize(
    ("shape", "strides", "run"),
    [
        ((4, 8), (16, 2), 64),
        ((4, 8), (32, 2), 16),  # columns of a wider matrix
        ((4, 8), (2, 8), 2),  # transposed
        ((4, 8), (0, 2), 16),  # repeated
        ((1, 8), (999, 2), 16),  # strides of a single entry mean nothing
        ((3, 4, 8), (256, 16, 2), 64),
        ((8, 1), (2, 999), 16),
    ],
)
def test_bytes_side_by_side(shape, strides, run):
    assert run_bytes(block(shape, strides), np.empty(shape, np.int16)) == run
    wide = np.empty((*shape[:-1], 2 * shape[-1]), np.int16)[..., : shape[-1]]
    assert run_bytes(block(shape, strides), wide) == min(run, 2 * shape[-1])


@pytest.mark.parametrize("min_run", [1, 1 << 16])
def test_reads_into_strided_places(tmp_path, monkeypatch, min_run):
    monkeypatch.setattr(block_files, "MIN_RUN", min_run)
    numbers = np.arange(6 * 20, dtype=np.int16).reshape(6, 20)
    path = tmp_path / "numbers"
    path.write_bytes(b"head" + numbers.tobytes())
    stamp = path.stat().st_size, path.stat().st_mtime_ns
    there = block((6, 20), (40, 2), path=path, stamp=stamp, offset=4)
    for rows, columns in ((slice(1, 4), slice(5, 12)), (slice(0, 6), slice(3, 4))):
        for out in (np.zeros((6, 20), np.int16), np.zeros((20, 6), np.int16).T):
            with BlockFiles() as files:
                files.read("n", there.part((rows, columns)), out[rows, columns])
            expected = np.zeros_like(numbers)
            expected[rows, columns] = numbers[rows, columns]
            assert (out == expected).all()


def test_default_settings():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert StreamSettings.default(gpu, 1 << 20).threads == 1
    large = StreamSettings.default(gpu, 1 << 34)
    assert large.threads == min(8, len(os.sched_getaffinity(0))) < large.buffers
    assert StreamSettings.default(cpu, 1 << 34).threads == large.threads
