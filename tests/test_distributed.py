"""Groups and collectives on real ranks: meshes, groups made twice, and peers that go away."""

import os
import shutil

import pytest
import torch
from conftest import TINY, run_ranks

from tprt.errors import ConfigError, PeerLost
from tprt.llm.memory import uneven_offers


def _mesh_axis() -> list:
    """A 2 x 2 mesh; ranks may be in different numbers of groups, and groups are made again."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from tprt.distributed.communication import all_gather, all_reduce, broadcast_record, gather_json
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
        said = broadcast_record(torch.tensor([dist.get_rank()]), tp).item()
        everyone = gather_json({"é" * dist.get_rank(): dist.get_rank()}, tp)
        ranks = [next(iter(value.values())) for value in everyone]
        seen.append((tp.rank, tp.size, total, rows, said, ranks))
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


def _different_weights(other: str) -> str:
    from conftest import TINY

    from tprt import LLM
    from tprt.errors import RankMismatch

    try:
        LLM(other if os.environ["RANK"] == "1" else str(TINY), dtype="float32")
    except RankMismatch as error:
        return f"{error.exit_code} {error.what}"
    return "nothing noticed"


def test_ranks_with_different_weights_of_the_same_shape_are_refused(tmp_path):
    """One number of one tensor differs, and no tensor is hashed: the checksums on disk tell."""
    copy = tmp_path / "tiny"
    shutil.copytree(TINY, copy)
    (path,) = copy.glob("iter_*/mp_rank_01/*.pt")
    state = torch.load(path, weights_only=False)
    encoder = state["model"]["language_model"]["encoder"]
    encoder["layers.0.mlp.dense_h_to_4h.weight"].view(-1)[7] += 1
    torch.save(state, path)
    for said in run_ranks(_different_weights, 2, str(copy)):
        assert said.startswith("7 ranks 0 and 1 were started with different checkpoint")


def _in_somebodys_program() -> dict:
    """LLM beside a caller's mesh: what it returns, and what it must leave alone."""
    import contextlib
    import io
    import logging
    import signal

    import torch.distributed as dist
    from conftest import TINY
    from torch.distributed.device_mesh import init_device_mesh

    from tprt import LLM, SamplingParams

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))

    def state() -> tuple:
        handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        root = logging.getLogger()
        return (
            dict(os.environ), handlers, list(root.handlers), root.level,
            torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(),
        )  # fmt: skip

    before, said = state(), io.StringIO()
    prompts = ["human: Repeat: lamp canoe\n\nadept:", {"prompt_token_ids": [90, 91, 92]}]
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    found = {}
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        for dtype in ("float32", "bfloat16", "float16"):
            with LLM(str(TINY), dtype=dtype, group=mesh["tp"], kv_cache_memory=2**24) as llm:
                mine = prompts if dist.get_rank() == 0 else None  # only rank 0's prompts count
                texts = [o.outputs[0].text for o in llm.generate(mine, greedy)]
                stop = texts[0].strip().split()[0][:3] if texts[0].strip() else "x"
                stopping = SamplingParams(temperature=0.0, max_tokens=12, stop=[stop])
                cut = llm.generate(mine and mine[:1], stopping)[0].outputs[0]
                logits = llm.logits(torch.arange(80, 140))
                found[dtype] = {
                    "texts": texts,
                    "stop": [stop, cut.text, cut.finish_reason],
                    "logits": logits.flatten().tolist(),
                }
                with pytest.raises(ConfigError):  # a mistake of rank 0 is everybody's error
                    llm.generate(["x"] if dist.get_rank() else ["x", 5], greedy)
                with pytest.raises(ConfigError):
                    llm.generate(["x"], {"temperature": 0})
            with pytest.raises(ConfigError, match="closed"):
                llm.generate(prompts)
    assert state() == before
    assert said.getvalue() == ""
    assert dist.is_initialized(), "the caller's group is the caller's"
    dist.destroy_process_group()
    with LLM(str(TINY), dtype="float32", kv_cache_memory=2**24) as llm:  # now one of its own
        found["own"] = [o.outputs[0].text for o in llm.generate(prompts, greedy)]
    assert not dist.is_initialized()
    return found


@pytest.fixture(scope="module")
def program() -> list[dict]:
    return run_ranks(_in_somebodys_program, 2)


def test_llm_in_somebodys_program(program):
    first, second = program
    assert first == second, "every rank gets the same results"
    assert first["own"] == first["float32"]["texts"]


def test_stop_string_on_two_ranks(program):
    for dtype in ("float32", "bfloat16", "float16"):
        stop, text, reason = program[0][dtype]["stop"]
        assert reason == "stop" and stop not in text


def test_half_precision_is_close_to_float32(program):
    """bfloat16 is the default dtype: its logits follow float32's within a few of its roundings."""
    exact = torch.tensor(program[0]["float32"]["logits"])
    for dtype, share in (("bfloat16", 0.05), ("float16", 0.01)):
        off = torch.tensor(program[0][dtype]["logits"]) - exact
        assert torch.isfinite(off).all()
        assert 0 < off.std() < share * exact.std(), (dtype, off.std() / exact.std())


def test_ranks_with_uneven_room_are_named():
    assert uneven_offers([100, 96, 100]) == uneven_offers([7]) == ""
    assert uneven_offers([100, 94, 101]).startswith(
        "rank 1 has room for 94 KV blocks, rank 2 for 101"
    )


def _uneven_room() -> tuple[int, str]:
    import logging

    from conftest import TINY

    import tprt.llm.memory as memory
    from tprt import LLM

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("tprt").addHandler(handler)
    memory.CPU_KV_CACHE_MEMORY = 2**22 * (3 - int(os.environ["RANK"]))
    with LLM(str(TINY), dtype="float32") as llm:
        return llm._engine.blocks.capacity, "\n".join(line for line in lines if "room" in line)


def test_the_smallest_room_counts_and_rank_0_warns():
    (blocks, said), (others, silent) = run_ranks(_uneven_room, 2)
    # 3 layers x 2 x 4 heads of 32 in float32, 16 tokens a block, 8 MiB on rank 1
    assert blocks == others == 2**23 // (3 * 2 * 4 * 32 * 4 * 16) - 1, "one is for padding"
    assert said.startswith("rank 1 has room for") and silent == ""
