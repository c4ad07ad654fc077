"""What meets only zeros is not read, and nothing else changes: products, layers, whole models."""

import contextlib
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run_ranks
from safetensors.torch import load_file, save_file

from tprt import LLM, SamplingParams
from tprt.checkpoint import open_checkpoint
from tprt.checkpoint.writers import write_huggingface
from tprt.config import EngineConfig
from tprt.distributed.sharding import shard_spec
from tprt.distributed.tp_group import TPGroup
from tprt.errors import CheckpointError, ConfigError
from tprt.kernels import Norm, SparseWeight, cpu
from tprt.layers.linear import RowParallelLinear

sys.path.insert(0, str(ROOT / "examples"))
from tiny_tasks import SHORT_TASKS, chat_prompt, held_out_examples

NAN = float("nan")
NEVER = cpu.CPUKernels(0)
ALWAYS = cpu.CPUKernels(10**6)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def activations(rows, neurons, live, dtype=torch.float32, seed=0):
    """What squared ReLU leaves when about ``live`` of all neurons fire."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, neurons, generator=generator) + 0.1
    return (x * (torch.rand(rows, neurons, generator=generator) < live)).to(dtype)


def matrix(neurons, out, dtype=torch.float32, seed=1):
    return torch.randn(neurons, out, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "neurons", "out"), [(1, 96, 32), (3, 77, 40), (8, 5, 7), (2, 1, 1)]
)
@pytest.mark.parametrize("live", [0.0, 0.1, 0.6, 1.0])
def test_skipping_is_the_dense_product(dtype, rows, neurons, out, live):
    x, rows_of_weight = activations(rows, neurons, live, dtype), matrix(neurons, out, dtype)
    exact = x.double() @ rows_of_weight.double()
    for kernels in (ALWAYS, NEVER):
        weight = kernels.pack_sparse(rows_of_weight)
        found = kernels.sparse_linear(x, weight)
        assert found.dtype == dtype and found.shape == exact.shape
        rounding = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=8 * rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_meet_zeros_alone_are_not_read(dtype):
    x, weight = activations(4, 200, 0.1, dtype), matrix(200, 24, dtype)
    x[1] = 0
    x[2] = 0
    x[2, 17] = 3
    dead = ~x.bool().any(0)
    assert 0 < dead.sum() < 200
    expected = ALWAYS.sparse_linear(x, SparseWeight(weight, None))
    poisoned = weight.masked_fill(dead.unsqueeze(1), NAN)
    found = ALWAYS.sparse_linear(x, SparseWeight(poisoned, None))
    assert torch.equal(found, expected) and not found[1].any()
    torch.testing.assert_close(found[2], 3 * weight[17])
    dense = NEVER.sparse_linear(x, SparseWeight(poisoned, None))
    assert dense.isnan().all(), "the dense product reads them, or this test shows nothing"


def test_no_sum_leaves_the_range_of_float16():
    x = torch.zeros(1, 64, dtype=torch.float16)
    x[0, [0, 63]] = 60000
    weight = torch.full((64, 2), 2, dtype=torch.float16)
    weight[63] = -2
    assert not ALWAYS.sparse_linear(x, ALWAYS.pack_sparse(weight)).any(), "neither inf nor NaN"


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_what_is_not_a_number_stays_alive(value):
    x, weight = activations(3, 60, 0.1), SparseWeight(matrix(60, 8), None)
    expected = ALWAYS.sparse_linear(x, weight)
    x[1, 33] = value
    found = ALWAYS.sparse_linear(x, weight)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_row_are_its_own_and_always_the_same(dtype):
    x = activations(6, 3000, 0.2, dtype)
    weight = SparseWeight(matrix(3000, 64, dtype), None)
    together = ALWAYS.sparse_linear(x, weight)
    for row in range(6):
        assert torch.equal(ALWAYS.sparse_linear(x[row : row + 1], weight)[0], together[row])
    assert all(torch.equal(ALWAYS.sparse_linear(x, weight), together) for _ in range(1000))


def test_how_many_rows_skip_follows_from_their_number(monkeypatch):
    seen = []
    live_rows = cpu.CPUKernels._live_rows
    monkeypatch.setattr(
        cpu.CPUKernels, "_live_rows", lambda *args: (seen.append(len(args[1])), live_rows(*args))[1]
    )
    weight = matrix(30, 8)
    for most, kernels in ((0, NEVER), (3, cpu.CPUKernels(3)), (None, cpu.CPUKernels())):
        seen.clear()
        for rows in range(1, 12):
            kernels.sparse_linear(activations(rows, 30, 0.0), SparseWeight(weight, None))
        most = cpu.SPARSE_ROWS_PLAIN if most is None else most
        assert seen == list(range(1, most + 1))
    if cpu.can_pack(weight.bfloat16()):
        seen.clear()
        packed = cpu.CPUKernels().pack_sparse(weight.bfloat16())
        assert packed.dense is not None and packed.dense.is_mkldnn
        for rows in range(1, 12):
            x = activations(rows, 30, 0.5, torch.bfloat16)
            cpu.CPUKernels().sparse_linear(x, packed)
        assert seen == list(range(1, cpu.SPARSE_ROWS_PACKED + 1))


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_products_of_16_bits_never_read_by_rows(dtype, packs, monkeypatch):
    """Guards against prompts that take a hundred times as long where oneDNN does not pack."""
    if not packs:
        monkeypatch.setattr(cpu, "can_pack", lambda _: False)
    x, weight = activations(20, 30, 0.5, dtype), matrix(30, 8, dtype)
    expected = x.double() @ weight.double()
    for kernels in (cpu.CPUKernels(), NEVER):
        packed = kernels.pack_sparse(weight)
        assert (packed.dense is None) == (dtype == torch.float32)
        copies = dtype == torch.float16 or (packed.dense is not None and kernels is NEVER)
        assert len(packed.rows) == (0 if copies else 30), "never skipping needs no second copy"
        if packed.dense is not None:
            packed = packed._replace(rows=torch.full_like(packed.rows, NAN))
        found = kernels.sparse_linear(x, packed).double()
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-5)
    if packed.dense is not None and not packed.dense.is_mkldnn:
        assert packed.dense.is_contiguous()
    layer = RowParallelLinear(30, 8, TPGroup(), dtype, sparse_input=True)
    layer.kernels, bytes_before = NEVER, layer.weight.nbytes
    layer.weight.copy_(weight)
    layer.finish_loading()
    assert sum(p.nbytes for p in layer.parameters()) - layer.bias.nbytes == (
        bytes_before if dtype == torch.float32 else 0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_the_end_of_the_layer_is_that_of_other_layers(dtype, rows):
    x, weight = activations(rows, 64, 0.2, dtype), matrix(64, 16, dtype)
    bias, residual = matrix(1, 16, dtype)[0], matrix(rows, 16, dtype, seed=4)
    norm = Norm(matrix(1, 16, dtype, seed=5)[0], bias, 1e-5)
    exact = residual.double() + x.double() @ weight.double() + bias.double()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for kernels in (cpu.CPUKernels(), NEVER):
        packed = kernels.pack_sparse(weight)
        stream, h = kernels.sparse_linear_add_layer_norm(x, packed, bias, residual, norm)
        assert stream.dtype == h.dtype == dtype
        torch.testing.assert_close(stream.double(), exact, rtol=tolerance, atol=tolerance)
        assert torch.equal(h, kernels.layer_norm(stream, norm))


def test_the_weight_lies_by_neuron():
    layer = RowParallelLinear(6, 4, TPGroup(), torch.float32, sparse_input=True)
    assert layer.weight.shape == (6, 4)
    assert shard_spec(layer.weight).canonical_shape == (4, 6)
    layer.finish_loading()
    assert layer.sparse.rows is layer.weight and layer.sparse.dense is None


@pytest.mark.parametrize("value", [float("inf"), NAN])
def test_weights_that_times_zero_are_not_zero_are_refused(tmp_path, value):
    folder, name = tmp_path / "hf", "model.layers.1.mlp.dense_4h_to_h.weight"
    with contextlib.closing(open_checkpoint(str(TINY))) as reader:
        write_huggingface(reader, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name][7, 9] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        LLM(str(folder), dtype="float32")


@pytest.mark.parametrize(
    "settings",
    [{"sparse_rows": -1}, {"sparse_rows": True}, {"sparse_rows": "auto"}, {"fuse_kernels": 1}],
)
def test_settings_are_checked(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        EngineConfig(**settings)


def _sparse_and_dense(sizes: list[int], count: int) -> dict[int, list]:
    """On each rank of 4: greedy ids of held-out prompts and some logits, with and without skipping."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    prompts = [chat_prompt(e.question) for e in held_out_examples(SHORT_TASKS, count, seed=99)]
    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    found: dict[int, list] = {}
    for size in sizes:
        group = dist.new_group(list(range(size)), backend="gloo")
        if dist.get_rank() < size:
            for rows in (256, 0):
                options = {"sparse_rows": rows, "max_num_seqs": 256, "max_num_batched_tokens": 256}
                with LLM(str(TINY), dtype="float32", group=group, **options) as llm:
                    outs = llm.generate(prompts, greedy)
                    ids = [out.outputs[0].token_ids for out in outs]
                    logits = llm.logits(outs[0].prompt_token_ids).numpy()
                    found.setdefault(size, []).append((ids, logits))
        dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.slow
def test_same_tokens_over_500_prompts_at_every_tp_size():
    found = run_ranks(_sparse_and_dense, 4, [1, 2, 4], 500, timeout=280)[0]
    for size, ((ids, logits), (dense_ids, dense_logits)) in found.items():
        assert len(ids) == 500 and ids == dense_ids, size
        assert ids == found[1][0][0], f"TP {size}"
        assert (logits != dense_logits).any(), "two ways"
        scale = abs(dense_logits).max()
        np.testing.assert_allclose(logits / scale, dense_logits / scale, rtol=0, atol=1e-5)
