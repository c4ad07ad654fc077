"""Every kernel compiled for an H100 or H200, without one: no spills, wide reads, the same order of sums.

A process of its own compiles, as this one may interpret. There ``CALLS`` are made with tensors that have
no memory, and a launch compiles what it would have run: a new kernel needs a call here, nothing else.
"""

import json
import os
import re
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton

ROOT = Path(__file__).resolve().parent.parent
SM_90 = 90
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
I32, I64 = torch.int32, torch.int64
# Persimmon-8B.
HIDDEN, MLP, VOCAB, NUM_HEADS, HEAD_DIM, ROTARY = 4096, 16384, 262144, 64, 64, 32
BLOCK_SIZE, BLOCKS = 16, 1000
MATRICES = {
    "query_key_value": (3 * HIDDEN, HIDDEN),
    "dense": (HIDDEN, HIDDEN),
    "dense_h_to_4h": (MLP, HIDDEN),
    "dense_4h_to_h": (HIDDEN, MLP),
    "lm_head": (VOCAB, HIDDEN),
}
CALLS: dict[str, Callable[[], object]] = {}
WRITES = r"\b(?:st|atom|red|cp\.reduce)\S*\.global\S*|\batom\S*|\bred\.\S*"


def t(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm_of(width: int) -> Any:
    from tprt.kernels import Norm

    return Norm(t(width), t(width), 1e-5)


def call(function: Callable[[], object]) -> Callable[[], object]:
    CALLS[function.__name__] = function
    return function


@call
def layer_norm() -> None:
    from tprt.kernels.triton_ops import norm

    norm.layer_norm(t(3, HIDDEN), norm_of(HIDDEN))


@call
def add_layer_norm() -> None:
    from tprt.kernels.triton_ops import norm

    for x in (t(3, HIDDEN, dtype=F32), t(3, HIDDEN), t(32, 3, HIDDEN, dtype=F32)):
        norm.add_layer_norm(x, t(HIDDEN), t(3, HIDDEN), norm_of(HIDDEN))


@call
def wide_norms() -> None:
    from tprt.kernels.triton_ops import norm

    norm.add_layer_norm(t(9, 2, MLP, dtype=F32), t(MLP), t(2, MLP), norm_of(MLP))


@call
def qk_norm_rotary_store() -> None:
    from tprt.kernels import HeadNorms
    from tprt.kernels.triton_ops import rotary

    for dim, rotary_dim in ((HEAD_DIM, ROTARY), (128, 64), (80, 80)):
        vectors = t(NUM_HEADS, 2, dim, dtype=F32)
        angles = t(2, 1, 1, rotary_dim, dtype=F32)
        cache = t(BLOCKS, 2, BLOCK_SIZE, NUM_HEADS, dim)
        norms = HeadNorms(vectors, vectors, 1e-5)
        for each in (norms, None) if dim == HEAD_DIM else (norms,):
            rotary.qk_norm_rotary_store(
                t(2, NUM_HEADS, 3, dim), each, angles, angles, cache, t(2, 2, dtype=I64)
            )


def product(n: int, k: int, rows: int, dtype: torch.dtype = BF16) -> None:
    from tprt.kernels.triton_ops import linear, tiles

    linear.linear(t(rows, k, dtype=dtype), t(n, k, dtype=dtype), None, tiles.Tiles())


# Without a bias there is nothing to read but weights and x.
PRODUCTS = {
    f"{name}_{rows}": partial(product, n, k, rows)
    for name, (n, k) in MATRICES.items()
    for rows in (1, 2, 16)
}
PRODUCTS |= {f"float32_{rows}": partial(product, HIDDEN, HIDDEN, rows, F32) for rows in (1, 2, 16)}
CALLS |= PRODUCTS


@call
def fma_of_four_rows() -> None:
    from tprt.kernels.triton_ops import linear, tiles

    tile = tiles.default_plan(HIDDEN, HIDDEN, BF16).fma
    linear.product(t(tiles.MAX_FMA_ROWS, HIDDEN), t(HIDDEN, HIDDEN), tile)


@call
def linear_squared_relu() -> None:
    from tprt.kernels.triton_ops import linear, tiles

    for rows, dtype in ((1, BF16), (16, BF16), (2, F16), (16, F16), (17, F16)):
        x, weight, bias = (
            t(rows, HIDDEN, dtype=dtype),
            t(MLP, HIDDEN, dtype=dtype),
            t(MLP, dtype=dtype),
        )
        linear.linear_squared_relu(x, weight, bias, tiles.Tiles())


@call
def linear_unrounded() -> None:
    from tprt.kernels.triton_ops import linear, tiles

    for rows in (1, 16):
        linear.linear_unrounded(t(rows, HIDDEN), t(HIDDEN, HIDDEN), tiles.Tiles())


@call
def products_with_norms_and_sums() -> None:
    """Of one row; of as many as LayerNorm and residual leave registers for; and of few columns."""
    from tprt.kernels.interface import PendingNorm
    from tprt.kernels.triton_ops import linear, tiles

    for rows, k, dtype in ((1, HIDDEN, BF16), (2, HIDDEN, F16), (2, 512, BF16), (1, HIDDEN, F32)):
        weight, bias = t(MLP, k, dtype=dtype), t(MLP, dtype=dtype)
        norm = norm_of(k)._replace(weight=t(k, dtype=dtype), bias=t(k, dtype=dtype))
        pending = PendingNorm(t(rows, k, dtype=dtype), norm)
        linear.linear(pending, weight, bias, tiles.Tiles())
        linear.linear_squared_relu(pending, weight, bias, tiles.Tiles())
    for rows in (1, 2, 16):
        x, residual = t(rows, HIDDEN), t(rows, HIDDEN)
        linear.linear_add(x, t(HIDDEN, HIDDEN), t(HIDDEN), residual, tiles.Tiles())


def sparse_product(rows: int, skip: bool = True, dtype: torch.dtype = BF16) -> None:
    from tprt.kernels.triton_ops import sparse_linear

    x, weight, counters = t(rows, MLP, dtype=dtype), t(MLP, HIDDEN, dtype=dtype), t(4096, dtype=I32)
    sparse_linear.product(x, weight, counters, skip)


SPARSE = {f"sparse_{rows}": partial(sparse_product, rows) for rows in (1, 2, 4, 8, 16)}
CALLS |= SPARSE | {f"not_skipping_{n}": partial(sparse_product, n, False) for n in (1, 8)}


@call
def sparse_product_with_sums() -> None:
    from tprt.kernels.triton_ops import sparse_linear

    counters = t(4096, dtype=I32)
    for rows, neurons, width in ((1, MLP, HIDDEN), (8, MLP, HIDDEN), (8, 1633, 409)):
        sums = t(width), t(rows, width)
        sparse_linear.product(t(rows, neurons), t(neurons, width), counters, True, *sums)
    sparse_product(8, dtype=F32)


def noise_of(rows: int, all_greedy: bool) -> Any:
    from tprt.kernels import Noise

    fields = (t(rows, dtype=dtype) for dtype in (F32, torch.bool, I64, I64))
    return Noise(*fields, all_greedy=all_greedy)


@call
def head() -> None:
    from tprt.kernels.triton_ops import head

    for all_greedy in (True, False):
        noise = noise_of(2, all_greedy)
        ids = t(VOCAB, dtype=I64)
        head.linear_argmax(t(2, HIDDEN), t(VOCAB, HIDDEN), noise, ids, VOCAB)
        head.argmax(t(2, VOCAB, dtype=F32), noise, ids, VOCAB)


def attention(dim: int, dtype: torch.dtype) -> tuple[Any, Callable[[int, Any], None]]:
    """A planner, and what runs its plan for a number of tokens."""
    from tprt.kernels.triton_ops.attention import TritonAttention

    planner = TritonAttention(BLOCK_SIZE, NUM_HEADS, dim, dtype, torch.device("meta"))
    cache = t(BLOCKS, 2, BLOCK_SIZE, NUM_HEADS, dim, dtype=dtype)
    return planner, lambda tokens, plan: plan(t(tokens, NUM_HEADS, dim, dtype=dtype), cache, 0.125)


@call
def decode_attention() -> None:
    for dim, dtype in ((HEAD_DIM, BF16), (HEAD_DIM, F32), (128, F16)):
        planner, run = attention(dim, dtype)
        run(2, planner.plan_decode(t(2, BLOCKS, dtype=I64), t(2, dtype=I64)))
        if dtype == BF16:
            run(2, planner.plan_decode(t(2, 1, dtype=I64), t(2, dtype=I64)))  # a single chunk
            run(2, planner.plan(t(2, BLOCKS, dtype=I64), (1, 1), (5000, 60)))


@call
def fused_attention() -> None:
    from tprt.kernels import HeadNorms

    for dim, dtype in ((HEAD_DIM, BF16), (HEAD_DIM, F32), (128, F16), (128, F32)):
        planner, _ = attention(dim, dtype)
        cache = t(BLOCKS, 2, BLOCK_SIZE, NUM_HEADS, dim, dtype=dtype)
        vectors, angles = t(NUM_HEADS, 2, dim, dtype=F32), t(2, 1, 1, dim // 2, dtype=F32)
        qkv, slots = t(2, NUM_HEADS, 3, dim, dtype=dtype), t(2, 2, dtype=I64)
        norms = HeadNorms(vectors, vectors, 1e-5)
        for blocks in (BLOCKS, 1) if dtype == BF16 else (BLOCKS,):
            plan = planner.plan_decode(t(2, blocks, dtype=I64), t(2, dtype=I64))
            plan.fused(qkv, norms, angles, angles, cache, slots, 0.125)
    plan.fused(qkv, None, angles, angles, cache, slots, 0.125)


@call
def prefill_attention() -> None:
    for dim, dtype in ((HEAD_DIM, BF16), (128, F16), (HEAD_DIM, F32)):
        planner, run = attention(dim, dtype)
        for tokens in (5, 50, 500) if dtype == BF16 else (500,):
            run(tokens, planner.plan(t(1, BLOCKS, dtype=I64), (tokens,), (100,)))


@call
def one_shot() -> None:
    from tprt.kernels.triton_ops.one_shot import OneShot

    group = OneShot(t(8, dtype=I64), rank=1, max_rows=32, row_bytes=4 * HIDDEN)
    for partial_sum in (t(3, HIDDEN), t(3, HIDDEN, dtype=F32)):
        group.all_reduce(partial_sum)
        group.all_reduce_add_layer_norm(partial_sum, t(HIDDEN), t(3, HIDDEN), norm_of(HIDDEN))
    group.publish(t(3, HIDDEN))
    group.all_gather(t(64, dtype=I64))


# RecurrentGemma, its two sizes: width, heads, of channels and of queries alike.
RECURRENT = {"2b": (2560, 10), "9b": (4096, 16)}


def segments(lengths: tuple[int, ...], decode: bool) -> Any:
    from tprt.batch import Segments

    starts = None if decode else (0,) * len(lengths)
    slots, positions = t(len(lengths), dtype=I64), t(sum(lengths), dtype=I64)
    return Segments(slots=slots, positions=positions, query_lens=lengths, starts=starts)


def recurrence(
    size: str, lengths: tuple[int, ...], decode: bool, dtype: torch.dtype = BF16
) -> None:
    from tprt.kernels import RecurrenceWeights
    from tprt.kernels.triton_ops import recurrence

    width, heads = RECURRENT[size]
    block = width // heads
    weights = RecurrenceWeights(
        t(width, 4, dtype=dtype),
        t(width, dtype=dtype),
        t(heads, block, 2 * block, dtype=dtype),
        t(heads, 2 * block, dtype=F32),
        t(width, dtype=F32),
    )
    caches = t(5, width, dtype=F32), t(5, 4, width, dtype=dtype)
    xy = t(sum(lengths), 2 * width, dtype=dtype)
    recurrence.recurrence(xy, weights, *caches, segments(lengths, decode))


def window(size: str, lengths: tuple[int, ...], decode: bool, dtype: torch.dtype = BF16) -> None:
    from tprt.kernels.triton_ops import window

    _, heads = RECURRENT[size]
    tokens, angles = sum(lengths), t(sum(lengths), 1, 128, dtype=F32)
    qkv, kv = t(tokens, heads + 2, 256, dtype=dtype), t(5, 2, 2176, 256, dtype=dtype)
    window.window_attend(qkv, angles, angles, kv, segments(lengths, decode), 2049, 1 / 16)


for _size in RECURRENT:
    for _rows in (1, 17):
        CALLS[f"recurrent_step_{_size}_{_rows}"] = partial(recurrence, _size, (1,) * _rows, True)
    CALLS[f"recurrent_prompt_{_size}"] = partial(recurrence, _size, (300, 2), False)
    CALLS[f"window_step_{_size}"] = partial(window, _size, (1, 1), True)
    CALLS[f"window_prompt_{_size}"] = partial(window, _size, (300, 2), False)
CALLS["recurrent_step_float16"] = partial(recurrence, "9b", (1,), True, F16)
CALLS["recurrent_step_float32"] = partial(recurrence, "2b", (1,), True, F32)
CALLS["recurrent_prompt_float32"] = partial(recurrence, "2b", (30,), False, F32)
CALLS["window_step_float32"] = partial(window, "2b", (1,), True, F32)
CALLS["window_prompt_float32"] = partial(window, "2b", (30,), False, F32)


@call
def gelu_gate() -> None:
    from tprt.kernels.triton_ops import gate

    for width in (7680, 12288):
        gate.gelu_gate(t(3, 2 * width))


@call
def rms_norms() -> None:
    from tprt.kernels import Norm
    from tprt.kernels.triton_ops import norm

    for width, _ in RECURRENT.values():
        rms = Norm(t(width), None, 1e-6)
        norm.layer_norm(t(3, width), rms)
        norm.add_layer_norm(t(3, width, dtype=F32), t(width), t(3, width), rms)


def ptxas() -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    return get_ptxas(SM_90).path


class NoDevice:
    """A driver that can name a device, for code that compiles and never launches."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", SM_90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def compile_all() -> dict[str, Any]:
    """Of each call its kernels, as ``describe`` does, or the traceback of what went wrong."""
    triton.runtime.driver.set_active(NoDevice())
    launch_as_dependents()
    kernels: list[Any] = []
    run = triton.runtime.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append((self.fn.__name__, kernel))
        return kernel

    triton.runtime.JITFunction.run = compile_only
    described: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    for name, function in CALLS.items():
        kernels.clear()
        try:
            function()
            for kernel_name, kernel in kernels:
                if kernel.hash not in described:
                    described[kernel.hash] = describe(kernel_name, kernel)
            found[name] = [described[kernel.hash] for _, kernel in kernels]
        except Exception:
            found[name] = traceback.format_exc()
    return found


def launch_as_dependents() -> None:
    """What ``pdl_options`` gives on this GPU, also for tensors without memory."""
    import tprt.kernels.triton_ops as kernels

    for name, module in list(sys.modules.items()):
        if name.startswith(kernels.__name__) and hasattr(module, "pdl_options"):
            module.pdl_options = lambda _: {"PDL": True, "launch_pdl": True}


def describe(name: str, kernel: Any) -> dict[str, Any]:
    ptx, layouts = kernel.asm["ptx"], kernel.asm["ttgir"]
    command = [ptxas(), "-v", f"-arch=sm_{SM_90}a", "-o", os.devnull, "/dev/stdin"]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True)
    counts = [int(n) for n in re.findall(r"(\d+) bytes (?:spill|stack)", done.stderr)]
    assert len(counts) >= 2, done.stderr
    return {
        "kernel": name,
        "spilled": sum(counts),
        "registers": int(re.findall(r"Used (\d+) registers", done.stderr)[0]),
        "shared": kernel.metadata.shared,
        "reads": Counter(read_widths(ptx)),
        "reductions": sorted(set(reduction_layouts(layouts))),
        "dependent": kernel.metadata.launch_pdl,
        "waits": "griddepcontrol.wait" in ptx,
        "barriers_among_products": ptx[ptx.find("fma.rn.f32") : ptx.rfind("fma.rn.f32")].count(
            "bar.sync"
        ),
        "reads_ahead": Counter(read_widths(ptx.partition("griddepcontrol.wait")[0])),
        "writes_ahead": re.findall(WRITES, ptx.partition("griddepcontrol.wait")[0]),
    }


def read_widths(ptx: str) -> list[int]:
    """Bytes that one thread gets of each load from global memory in the text of a kernel."""
    plain = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\s", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global\S* \[[^\]]*\], \[[^\]]*\], (\w+)", ptx)
    return [int(n or 1) * int(bits) // 8 for n, bits in plain] + [int(n, 0) for n in copies]


def reduction_layouts(ttgir: str) -> list[str]:
    """Of each reduction, in full: over which axis of what, and how that lies in threads."""
    aliases = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    found = re.findall(
        r'"tt\.reduce"\(.*?<\{axis = (\d)[^>]*>.*?\}\) : \((tensor<.*?)\) ->', ttgir, re.DOTALL
    )
    return [
        f"axis {axis} of " + re.sub(r"#\w+\b(?!\.)", lambda m: aliases.get(m[0], m[0]), of)
        for axis, of in found
    ]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    try:
        ptxas()
    except Exception as error:  # each release of Triton has one of its own
        pytest.skip(f"this Triton brings no ptxas: {error}")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__],
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CALLS)
def test_kernels_compile_and_spill_nothing(name, compiled):
    kernels = compiled[name]
    assert not isinstance(kernels, str), kernels
    assert kernels
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= 227 * 1024, kernel


@pytest.mark.parametrize("name", CALLS)
def test_dependent_kernels_write_nothing_before_they_wait(name, compiled):
    for kernel in compiled[name]:
        assert not kernel["dependent"] or (kernel["waits"] and not kernel["writes_ahead"]), kernel
    if ("attention" in name and "prefill" not in name) or name in (*SPARSE, "add_layer_norm"):
        assert all(kernel["dependent"] for kernel in compiled[name])


def test_fused_attention_streams_and_sums_as_its_three_kernels(compiled):
    """Two programs of 256 threads fit an SM; keys and values come 16 bytes at a time."""
    fused, apart = compiled["fused_attention"], compiled["decode_attention"]
    assert {kernel["kernel"] for kernel in fused} == {"_qk_rope_attend"}
    for kernel in fused:
        assert kernel["registers"] <= 128 and kernel["reads"]["16"] >= 16, kernel
    merging = [kernel for kernel in apart if kernel["kernel"] == "_merge_chunks"]
    for mine, attend, merge in ((0, 0, 0), (2, -2, -2), (3, -1, -1)):
        streaming = [kernel for kernel in apart if kernel["kernel"] == "_attend_chunks"]
        expected = streaming[attend]["reductions"] + merging[merge]["reductions"]
        assert set(expected) <= set(fused[mine]["reductions"])


@pytest.mark.parametrize("name", PRODUCTS)
def test_weights_are_read_16_bytes_at_a_time(name, compiled):
    (kernel,) = compiled[name]
    assert set(kernel["reads"]) == {"16"}, kernel
    weights_in_flight = 3 if name.endswith("_16") else 8
    assert kernel["reads"]["16"] >= weights_in_flight


@pytest.mark.parametrize("name", SPARSE)
def test_live_rows_are_read_16_bytes_at_a_time(name, compiled):
    """A row of W takes one load of each thread, and two turns of them are written out."""
    (kernel,) = compiled[name]
    rows = int(name.removeprefix("sparse_"))
    of_weights, of_sums = 2 * (4 if rows <= 4 else 2), 8 * rows
    assert kernel["reads"]["16"] == of_weights + of_sums, kernel
    assert set(kernel["reads"]) <= {"16", "4", "2"}, kernel
    assert kernel["barriers_among_products"] == 0, "each warp goes its own way"


def test_a_sparse_sum_has_one_order_skipping_or_not_and_for_any_number_of_rows(compiled):
    kernels = [compiled[name][0] for name in CALLS if name.startswith(("sparse_", "not_skip"))]
    orders = [{r for r in kernel["reductions"] if "xf32" in r} for kernel in kernels]
    assert len(orders[0]) == 2, "over the warps of a program, then over groups of neurons"
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize("name", PRODUCTS)
def test_weights_are_asked_for_before_the_wait(name, compiled):
    (kernel,) = compiled[name]
    assert kernel["dependent"]
    ahead = 0 if name == "float32_16" else 4  # whose registers are all taken
    assert kernel["reads_ahead"].get("16", 0) >= ahead, kernel


def test_a_row_is_summed_in_the_same_order_among_any_number_of_rows(compiled):
    one, two = compiled["dense_1"][0], compiled["dense_2"][0]
    four = compiled["fma_of_four_rows"][0]
    assert len(one["reductions"]) == 2, "within a thread, then over all of them"
    assert one["reductions"] == two["reductions"] == four["reductions"]
    first, *others = compiled["layer_norm"] + compiled["add_layer_norm"]
    assert len(others) == 3 and first["reductions"]
    assert all(other["reductions"] == first["reductions"] for other in others)


if __name__ == "__main__":
    print(json.dumps(compile_all()))
