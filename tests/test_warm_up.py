"""Warm-up makes every kernel that steps launch: compared by what a compiler is asked for, without a GPU.

A process of its own collects, as this one may interpret. Tensors there have no memory, and what Triton
would compile is noted instead: the kernel and all that one binary of it depends on.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton
from one_device import OneDevice
from test_triton_compile import NoDevice

from tprt.config import ModelConfig, PersimmonConfig, RecurrentGemmaConfig
from tprt.distributed.tp_group import TPGroup

ROOT = Path(__file__).resolve().parent.parent
META = torch.device("meta")
BLOCK_SIZE, SEQUENCES = 16, 24
# Persimmon-8B and RecurrentGemma-2B, of each kind of layer one.
PERSIMMON = PersimmonConfig(
    vocab_size=262144,
    hidden_size=4096,
    intermediate_size=16384,
    num_hidden_layers=1,
    num_attention_heads=64,
    head_dim=64,
    max_position_embeddings=4096,
)
RECURRENT = RecurrentGemmaConfig(
    vocab_size=256000,
    hidden_size=2560,
    intermediate_size=7680,
    num_hidden_layers=2,
    num_attention_heads=10,
    head_dim=256,
    max_position_embeddings=8192,
    lru_width=2560,
    layer_types=("recurrent", "attention"),
    attention_window_size=2048,
)
MODELS: dict[str, tuple[ModelConfig, int]] = {
    "persimmon of 1": (PERSIMMON, 1),
    "persimmon of 2": (PERSIMMON, 2),
    "recurrent of 1": (RECURRENT, 1),
    "recurrent of 2": (RECURRENT, 2),  # five heads each
    "recurrent of 4": (RECURRENT, 4),  # three
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# What must be among the kernels of its steps and its prompts, or nothing was compared.
OWN = {
    "persimmon": ({"_qk_rope_attend", "_sparse_kernel"}, {"_prefill_tiles", "_attend_chunks"}),
    "recurrent": (
        {"_step_kernel", "_merge_kernel", "_gelu_gate_kernel", "_argmax_kernel"},
        {"_conv_kernel", "_scan_kernel", "_rotate_kernel", "_prompt_kernel", "_gelu_gate_kernel"},
    ),
}
# Chunks of prompts, among them single tokens and odd numbers of both.
PASSES = ((1,), (2,), (7,), (16,), (300,), (40, 1, 3), (1, 1), (1, 64, 1, 9), (512, 1))


@contextmanager
def asked_for() -> Iterator[dict[str, str]]:
    """Kernels that are to be compiled inside: their names by what one binary depends on."""
    found: dict[str, str] = {}
    before = triton.runtime.JITFunction._do_compile

    def note(self: Any, key: str, *_: Any) -> None:
        found[f"{self.fn.__name__} {key}"] = self.fn.__name__

    triton.runtime.JITFunction._do_compile = note
    try:
        yield found
    finally:
        triton.runtime.JITFunction._do_compile = before


def collect(config: ModelConfig, size: int, dtype: torch.dtype) -> dict[str, dict[str, str]]:
    """Of warm-up; of decode steps in every bucket, and of passes over prompts."""
    from tprt.engine.model_runner import ModelRunner
    from tprt.engine.step_record import DRAW, Kind, StepRecord
    from tprt.kernels import kernels_for
    from tprt.kernels.warm_up import compile_kernels
    from tprt.models import get_model_class

    model = get_model_class(config.model_type)(config, TPGroup(0, size, META), dtype).eval()
    found = {}
    with asked_for() as found["warm-up"]:
        compile_kernels(kernels_for(META), model.kernel_sizes(BLOCK_SIZE), META)
    model.finish_loading()
    runner = ModelRunner(
        model, model.tp, dtype, num_blocks=999, num_states=SEQUENCES + 1, block_size=BLOCK_SIZE,
        max_num_seqs=SEQUENCES, max_model_len=4096, num_valid=config.vocab_size,
    )  # fmt: skip
    runner.stream = object()  # as on a GPU, where hints of the host are not taken
    with asked_for() as found["decode"], OneDevice("meta"):
        for bucket in runner.graphs.buckets:
            for full in (False, True):
                runner._decode(bucket, full)
    with asked_for() as found["prompts"]:
        for counts in PASSES:
            for start in (0, 48):
                table = [(i, start, n, DRAW) for i, n in enumerate(counts)]
                tokens = np.zeros(sum(counts), dtype=np.int64)
                record = StepRecord(step=0, kind=Kind.STEP, rows=np.array(table), tokens=tokens)
                batch, draws = runner._prepare(record)
                hidden = runner.model(batch, runner.caches)
                model.argmax(hidden, runner.sampler.noise(draws, runner.state), config.vocab_size)
    return found


def collect_all() -> dict[str, Any]:
    import tprt.kernels
    from tprt.engine import model_runner, sampler
    from tprt.kernels import warm_up
    from tprt.kernels.triton_ops import TritonKernels
    from tprt.layers import embedding, linear

    triton.runtime.driver.set_active(NoDevice())
    triton.runtime.JITFunction.run = warm(triton.runtime.JITFunction.run)
    tprt.kernels._make = lambda choice, device: TritonKernels(device)
    for module in (embedding, linear):
        module.all_reduce = lambda x, tp: x
    for module in (model_runner, sampler):
        module.all_gather = lambda x, tp: x.expand(tp.size, *x.shape)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for name, (config, size) in MODELS.items():
            for dtype in DTYPES:
                found[f"{name}, {dtype}"] = collect(config, size, DTYPES[dtype])
        warm_up.ROWS = (1,)
        found["control"] = collect(RECURRENT, 1, torch.bfloat16)
    return found


def warm(run: Any) -> Any:
    """Launches that only compile."""

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    return only_compile


@pytest.fixture(scope="module")
def collected() -> dict[str, Any]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        command, env=env | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_to_compile_after_warm_up(name, dtype, collected):
    """Decode steps in every bucket, plain and full; chunks and single tokens of any number."""
    found = collected[f"{name}, {dtype}"]
    for steps, own in zip(("decode", "prompts"), OWN[name.split()[0]], strict=True):
        assert own <= set(found[steps].values()), "these must be launched"
        late = [asked for asked in found[steps] if asked not in found["warm-up"]]
        assert not late, "\n".join(late)


def test_a_step_that_needs_another_binary_is_seen(collected):
    """With the kernels of one row alone."""
    found = collected["control"]
    assert {found["decode"][asked] for asked in found["decode"].keys() - found["warm-up"].keys()}


if __name__ == "__main__":
    print(json.dumps(collect_all()))
