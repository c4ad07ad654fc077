"""Groups and collectives on real ranks: meshes, groups made twice, and peers that go away."""

import os

import pytest
import torch
from conftest import run_ranks

from tprt.errors import ConfigError, PeerLost


def _mesh_axis() -> list:
    """A 2 x 2 mesh; ranks may be in different numbers of groups, and groups are made again."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from tprt.distributed.communication import all_gather, all_reduce, broadcast_json, gather_json
    from tprt.distributed.tp_group import init_tp_group

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    if dist.get_rank() == 0:  # rank 0 alone is in one group more than its peers
        dist.new_group([0], use_local_synchronization=True)
    with pytest.raises(ConfigError, match="2 dimensions"):
        init_tp_group(mesh)
    seen = []
    for _ in range(3):
        tp = init_tp_group(mesh["tp"])
        mine = torch.tensor([float(dist.get_rank())])
        total = all_reduce(mine.clone(), tp).item()
        rows = all_gather(mine, tp).flatten().tolist()
        said = broadcast_json({"from": dist.get_rank(), "text": "é" * (dist.get_rank() + 1)}, tp)
        seen.append((tp.rank, tp.size, total, rows, said["from"], gather_json(dist.get_rank(), tp)))
        tp.close()
    dist.destroy_process_group()
    return seen


def test_axis_of_a_mesh():
    for rank, seen in enumerate(run_ranks(_mesh_axis, 4)):
        first = rank // 2 * 2
        rows = [first, first + 1]
        assert seen == [(rank % 2, 2, sum(rows), [*map(float, rows)], first, rows)] * 3


def _lost_peer() -> str:
    from tprt.distributed.communication import all_reduce
    from tprt.distributed.tp_group import init_tp_group

    tp = init_tp_group()
    all_reduce(torch.ones(1), tp)
    if tp.rank == 1:
        return "left"
    try:
        for _ in range(1000):
            all_reduce(torch.ones(1), tp)
    except PeerLost as error:
        return error.what
    return "nothing noticed"


def test_a_peer_that_leaves_is_named_as_lost():
    lost, left = run_ranks(_lost_peer, 2)
    assert left == "left" and lost.startswith("a collective failed")


def _different_settings() -> str:
    from conftest import TINY

    from tprt import LLM
    from tprt.errors import RankMismatch

    rank = int(os.environ["RANK"])
    try:
        LLM(str(TINY), dtype="float32", max_num_seqs=8 + rank)
    except RankMismatch as error:
        return f"{error.exit_code} {error.what}"
    return "nothing noticed"


def test_ranks_with_different_settings_are_refused():
    for said in run_ranks(_different_settings, 2):
        assert said.startswith("7 ") and "engine" in said and "max_num_seqs=9" in said
