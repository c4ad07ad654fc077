"""A Hugging Face folder with random weights and a tokenizer of as many pieces, for measuring a start.

Weights are those of ``synthetic.random_tensor``, drawn on a GPU where there is one. The tokenizer has
Persimmon's form: unigram with byte fallback, |ENDOFTEXT| ends a text; its words are numbers. Knows
checkpoints and configs; no engine.
"""

import struct
import time
from pathlib import Path

import torch

from tprt.bench.synthetic import random_tensor
from tprt.checkpoint.reader import CheckpointReader, TensorInfo, dtype_name
from tprt.checkpoint.writers import write_huggingface
from tprt.config import ModelConfig
from tprt.distributed.sharding import Slices
from tprt.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    END_OF_TEXT,
    NORMAL,
    SPACE,
    UNKNOWN,
)


def write_checkpoint(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[int, float]:
    """Make ``folder``, which must not hold anything; bytes of weights, and seconds it took."""
    began = time.perf_counter()
    tokenizer = folder.with_name(f"{folder.name}.tokenizer")
    tokenizer.write_bytes(tokenizer_model(config.vocab_size))
    try:
        reader = _RandomReader(config, dtype, device, seed, tokenizer)
        write_huggingface(reader, folder)
    finally:
        tokenizer.unlink()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return reader.bytes_read, time.perf_counter() - began


class _RandomReader(CheckpointReader):
    """A checkpoint that is nowhere: ``writers`` store it tensor by tensor."""

    layout = "huggingface"

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        tokenizer: Path,
    ) -> None:
        self.config, self.dtype, self.tokenizer_path = config, dtype, tokenizer
        self.path, self.warnings = tokenizer.parent, []
        self._device, self._seed, self._shapes = device, seed, config.tensor_shapes()
        self._read = 0

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def stored_dtype(self, name: str) -> torch.dtype:
        return self.dtype

    def read(self, name: str, slices: Slices) -> torch.Tensor:
        whole = random_tensor(name, self._shapes[name], self._seed, self._device)
        part = whole[slices].to(self.dtype).cpu()
        self._read += part.nbytes
        return part

    def describe(self) -> list[TensorInfo]:
        told = dtype_name(self.dtype)
        return [TensorInfo(name, shape, told, None, 1) for name, shape in self._shapes.items()]

    def verify_full(self) -> None:
        return None

    def checksums(self) -> list[list[object]]:
        return []

    @property
    def bytes_read(self) -> int:
        return self._read

    def close(self) -> None:
        return None


def tokenizer_model(num_pieces: int) -> bytes:
    """A sentencepiece ModelProto of ``num_pieces``, 259 or more: unknown, end, blank, bytes, numbers."""
    assert num_pieces >= 259, "the bytes alone are 256"
    pieces = [("<unk>", 0.0, UNKNOWN), (END_OF_TEXT, 0.0, CONTROL), (SPACE, -9.0, NORMAL)]
    pieces += [(f"<0x{byte:02X}>", -100.0, BYTE) for byte in range(256)]
    pieces += [(f"{SPACE}{i}", -1.0 - i * 1e-6, NORMAL) for i in range(num_pieces - len(pieces))]
    proto = b"".join(_message(1, _piece(*piece)) for piece in pieces)
    # TrainerSpec: unigram, size, byte fallback; unknown is 0, begin and end are 1, no padding.
    numbers = {3: 1, 4: num_pieces, 35: 1, 40: 0, 41: 1, 42: 1, 43: 2**64 - 1}
    proto += _message(2, b"".join(_number(key, value) for key, value in numbers.items()))
    # NormalizerSpec: nothing is normalised; a blank goes in front of a text, and blanks show.
    normalizer = _message(1, b"identity") + _number(3, 1) + _number(4, 0) + _number(5, 1)
    return proto + _message(3, normalizer)


def _piece(text: str, score: float, kind: int) -> bytes:
    return _message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind)


def _message(field: int, payload: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(payload)) + payload


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
