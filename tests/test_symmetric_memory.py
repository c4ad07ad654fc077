"""Memory shared by ranks: all of them get it or the same reason, and what is summed through it."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_ranks

from tprt.distributed import symmetric_memory
from tprt.distributed.symmetric_memory import make_symmetric_buffers
from tprt.distributed.tp_group import TPGroup, init_tp_group


def fact(**changes):
    return {"device": "cuda:0", "host": "here", "gpu": "GPU-a"} | changes


@pytest.mark.parametrize(
    ("peer", "reason"),
    [
        (fact(gpu="GPU-b"), ""),
        (fact(), ""),  # one GPU for both: for torch to allow or refuse
        (fact(gpu="", device="cpu"), "rank 1 computes on the device cpu"),
        (fact(gpu="GPU-b", host="there"), "rank 1 is on another host"),
        (fact(gpu="GPU-c"), "no NVLink to the GPU of rank 1"),
    ],
)
def test_what_keeps_ranks_from_sharing_memory(peer, reason):
    def has_link(mine, other):
        return (mine, other) == ("GPU-a", "GPU-b")

    assert symmetric_memory._objection([fact(), peer], 0, has_link) == reason


def test_single_rank_shares_nothing():
    assert make_symmetric_buffers(TPGroup(), 1024) == (None, "a single rank has no peers")


def _on_cpu() -> list:
    tp = init_tp_group(device="cpu")
    found = [make_symmetric_buffers(tp, 1024)]
    tp.close()
    return found


def test_ranks_without_gpus_are_told_so():
    reason = "rank 0: rank 0 computes on the device cpu"
    assert run_ranks(_on_cpu, 2) == [[(None, reason)]] * 2


class _Made:
    closed = False

    def close(self):
        self.closed = True


def _one_rank_fails() -> list:
    """Ranks as on GPUs, of which rank 1 fails at one step after the other."""
    tp, seen, failing = init_tp_group(device="cpu"), [], ""
    made = _Made()

    def step(name, value):
        def act(*_):
            if failing == name and tp.rank == 1:
                raise RuntimeError(f"out of\tmemory\nwhile trying to {name}")
            return value

        return act

    symmetric_memory._facts = lambda device: fact(gpu=f"GPU-{tp.rank}")
    symmetric_memory._has_atomic_link = lambda *_: failing != "link" or tp.rank != 1
    symmetric_memory._allocate = step("allocate", "memory")
    symmetric_memory._map = step("map", made)
    for name in ("link", "allocate", "map", ""):
        failing = name
        buffers, reason = make_symmetric_buffers(tp, 64)
        seen.append((buffers is made, reason, made.closed))
        made.closed = False
    tp.close()
    return seen


def test_what_one_rank_lacks_no_rank_uses():
    """A rank that sums through memory while another calls NCCL would wait for ever."""
    first, second = run_ranks(_one_rank_fails, 2)
    reasons = ["rank 1: no NVLink to the GPU of rank 0", *["rank 1: out of memory"] * 2, ""]
    assert [reason for _, reason, _ in first] == reasons
    assert [reason for _, reason, _ in second] == reasons
    assert [used for used, _, _ in first] == [used for used, _, _ in second] == [0, 0, 0, 1]
    assert [closed for _, _, closed in first] == [False, False, True, False], "mapped, then dropped"


def test_torch_keeps_its_alpha_interface_as_it_is_used_here():
    """What a torch update may change first; what it does is seen on a GPU only."""
    from torch._C import _distributed_c10d as c10d

    wanted = ("empty_strided_p2p", "rendezvous", "get_backend", "buffer_ptrs")
    assert all(hasattr(c10d._SymmetricMemory, name) for name in wanted)
    store = c10d.PrefixStore("a", c10d.HashStore())
    group = c10d.ProcessGroup(store, 1, 3)
    c10d._register_process_group("tprt/test", group)
    found = c10d._resolve_process_group("tprt/test")
    assert (found.rank(), found.size()) == (1, 3)
    c10d._unregister_process_group("tprt/test")


def test_nothing_else_touches_torchs_symmetric_memory():
    package = Path(symmetric_memory.__file__).parent.parent
    users = {p.name for p in package.rglob("*.py") if "_SymmetricMemory" in p.read_text("utf-8")}
    assert users == {"symmetric_memory.py"}


REPLAYS, LAYERS, ROWS, WIDTH = 200, 3, 4, 4096


def _sum_in_a_graph() -> dict:
    """Layers that end in a sum over ranks, in a replayed graph, beside a rank that has all parts."""
    from tprt.kernels import Norm
    from tprt.kernels.triton_ops import norm as single_rank
    from tprt.kernels.triton_ops.one_shot import OneShot, buffer_bytes

    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    # gloo alone: NCCL wants a GPU for each rank
    tp = replace(init_tp_group(device="cpu"), device=device)
    row_bytes = WIDTH * 2
    buffers, reason = make_symmetric_buffers(tp, buffer_bytes(16, row_bytes))
    assert buffers is not None, reason
    shared = OneShot(buffers.addresses, tp.rank, 16, row_bytes)

    def randn(*shape, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(device, dtype)

    bias, norm = randn(WIDTH, seed=1), Norm(randn(WIDTH, seed=2), randn(WIDTH, seed=3), 1e-5)
    factors = torch.linspace(0.2, 1.0, tp.size, device=device)
    x, residual = randn(ROWS, WIDTH, seed=4), randn(ROWS, WIDTH, seed=5)
    words = torch.arange(5, device=device) + 100 * tp.rank
    wrong = torch.zeros((), dtype=torch.int64, device=device)

    def forward():
        normed, total = x, residual
        for _ in range(LAYERS):
            before = total
            parts = (normed.float() * factors.view(-1, 1, 1)).to(dtype)
            total, normed = shared.all_reduce_add_layer_norm(parts[tp.rank], bias, before, norm)
            expected = single_rank.add_layer_norm(parts, bias, before, norm)
            far = (normed - expected[1]).abs() > 0.02 * (1 + expected[1].abs())
            wrong.add_((total != expected[0]).any()).add_(far.any())
        x.copy_(normed)
        residual.copy_(total * 0.5)
        words.add_(1)
        gathered = shared.all_gather(words)
        peers = torch.arange(tp.size, device=device).unsqueeze(1) * 100
        wrong.add_((gathered != words - 100 * tp.rank + peers).any())

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    for _ in range(REPLAYS):
        graph.replay()
    torch.cuda.synchronize()
    found = {
        "wrong": int(wrong),
        "x": x.float().cpu().numpy(),
        "residual": residual.float().cpu().numpy(),
        "words": words.tolist(),
    }
    del graph
    buffers.close()
    buffers.close()
    tp.close()
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_ranks_on_one_gpu_sum_in_a_replayed_graph():
    """They take turns by time slices, so every wait is a long one. The same bits on both."""
    first, second = run_ranks(_sum_in_a_graph, 2, timeout=240)
    assert first["wrong"] == second["wrong"] == 0
    assert (first["x"] == second["x"]).all() and (first["residual"] == second["residual"]).all()
    assert abs(first["x"]).max() > 1
    assert first["words"] == [i + REPLAYS + 1 for i in range(5)]
    assert second["words"] == [i + REPLAYS + 101 for i in range(5)]
