"""Ranks in processes of their own that sum over shared memory, through the whole engine.

On a CPU the memory is a file in /dev/shm, the kernels are interpreted, and the waiting is real: two
processes spin on each other's flags.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_ranks

from tprt.bench.synthetic import greedy, make_engine, random_model, run_requests
from tprt.config import EngineConfig, PersimmonConfig
from tprt.distributed.tp_group import TPGroup, init_tp_group
from tprt.engine.digest import FIELDS
from tprt.kernels import use_kernels
from tprt.sampling_params import SamplingParams

TOY = PersimmonConfig(
    vocab_size=90,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=8,
    max_position_embeddings=64,
)
LONG = replace(TOY, head_dim=16, hidden_size=64, max_position_embeddings=256)
ROWS, ROW_BYTES = 4, 256


def share_memory(tp: TPGroup, folder: str) -> tuple[TPGroup, list[torch.Tensor]]:
    """``tp`` with one-shot collectives over files that every rank maps."""
    from tprt.distributed.communication import gather_json
    from tprt.kernels.triton_ops.one_shot import OneShot, buffer_bytes

    count, names = buffer_bytes(ROWS, ROW_BYTES), [f"{folder}/{rank}" for rank in range(tp.size)]
    torch.from_file(names[tp.rank], shared=True, size=count, dtype=torch.uint8).zero_()
    gather_json("made", tp)
    buffers = [torch.from_file(n, shared=True, size=count, dtype=torch.uint8) for n in names]
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers])
    return replace(tp, one_shot=OneShot(addresses, tp.rank, ROWS, ROW_BYTES)), buffers


def _generate(kernels: str, folder: str | None) -> tuple[list[list[int]], int]:
    """Tokens of three requests, one sampled and one of the full kind, and sums that went one-shot."""
    tp = init_tp_group(None, "cpu")
    calls, kept = [0], []
    if folder is not None:
        tp, kept = share_memory(tp, folder)
        sums = tp.one_shot._reduce
        tp.one_shot._reduce = lambda *a: calls.__setitem__(0, calls[0] + 1) or sums(*a)
    config = EngineConfig(
        dtype="float32", kernels=kernels, block_size=4, max_num_seqs=4, kv_cache_memory=2**20
    )
    with use_kernels(kernels):
        engine = make_engine(random_model(TOY, tp, torch.float32, seed=3), config)
    tokens = []
    if tp.rank == 0:
        engine.begin_call("bench")
        sampled = SamplingParams(temperature=0.9, max_tokens=5, seed=4, ignore_eos=True)
        requests = [greedy([5, 6, 7, 8, 9], 6), replace(greedy([1], 5), params=sampled)]
        requests.append(replace(requests[1], params=replace(sampled, top_k=9)))
        tokens = [seq.token_ids for seq in run_requests(engine, requests)]
        engine.end_call()
    else:
        engine.serve("bench")
    engine.close()
    tp.close()
    assert len(kept) in (0, tp.size)
    return tokens, calls[0]


@pytest.mark.slow
def test_two_ranks_over_shared_memory_draw_the_tokens_of_one(tmp_path):
    """Every LayerNorm behind a row-parallel layer, the embedding and the token exchange."""
    shm = Path("/dev/shm")
    folder = shm / f"test-{os.getpid()}" if shm.is_dir() else tmp_path / "shared"
    folder.mkdir()
    try:
        (alone, _), *_ = run_ranks(_generate, 1, "reference", None)
        (tokens, sums), (_, others) = run_ranks(_generate, 2, "triton", str(folder))
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert tokens == alone
    # Two for each layer and one for the embedding, in every step of at most ROWS tokens.
    assert sums == others and sums >= 5 * (2 * TOY.num_hidden_layers + 1)
    assert 8 * (ROWS + len(FIELDS)) <= ROW_BYTES


def _on_one_gpu(new_tokens: int) -> tuple[list[list[int]], int, bool]:
    """Greedy and sampled tokens, how many graphs there are, and whether sums went one-shot."""
    from tprt.llm.startup import settle_collectives

    config = EngineConfig(dtype="float32", block_size=16, max_num_seqs=4, kv_cache_memory=2**22)
    tp = init_tp_group(None, "cuda:0")
    tp, config = settle_collectives(tp, config, LONG.hidden_size)
    with use_kernels(config.kernels):
        engine = make_engine(random_model(LONG, tp, torch.float32, seed=3), config)
    tokens: list[list[int]] = []
    if tp.rank == 0:
        engine.begin_call("bench")
        sampled = SamplingParams(temperature=0.9, max_tokens=new_tokens, seed=4, ignore_eos=True)
        requests = [greedy([5, 6, 7], new_tokens)]
        requests.append(replace(greedy([1], new_tokens), params=sampled))
        tokens = [seq.token_ids for seq in run_requests(engine, requests)]
        engine.end_call()
    else:
        engine.serve("bench")
    graphs = len(engine.runner.graphs.keys) if engine.runner.graphs is not None else 0
    engine.close()
    tp.close()
    return tokens, graphs, tp.one_shot is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_ranks_on_one_gpu_draw_the_tokens_of_one(monkeypatch):
    """Control over gloo, data over symmetric memory, 220 replays: a mismatch would be an error."""
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    ((alone, _, _),) = run_ranks(_on_one_gpu, 1, 220)
    (tokens, graphs, one_shot), _ = run_ranks(_on_one_gpu, 2, 220, timeout=280)
    assert one_shot and graphs > 0
    assert tokens == alone
