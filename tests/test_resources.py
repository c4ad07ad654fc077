"""What an ``LLM`` takes it gives back, in numbers; and its KV cache is as large as planned."""

import ctypes
import gc
import os
import threading
import time
import warnings
from dataclasses import dataclass

import pytest
import torch
from conftest import TINY, run_ranks
from torch.distributed import TCPStore

from tprt import LLM, SamplingParams
from tprt.cli.plan import make_plan, read_config
from tprt.cli.settings import load_settings
from tprt.errors import ConfigError, OutOfMemoryPlan, TprtError

PROMPTS = ["human: Reverse: lamp canoe frog cheese\n\nadept:", "human: Repeat: key door\n\nadept:"]
WORDS = [["cheese", "frog", "canoe", "lamp"], ["key", "door"]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
KV_BYTES = 2**26
RSS_BOUND = 2**24  # a quarter of one engine's cache


def open_tiny(**settings) -> LLM:
    # As many slots as it takes to use all of the cache's memory.
    sizes = {"kv_cache_memory": KV_BYTES, "max_num_seqs": 64}
    return LLM(str(TINY), **{"dtype": "float32", **sizes, **settings})


def words(outputs) -> list[list[str]]:
    return [out.outputs[0].text.split() for out in outputs]


def only_rank_0(value):
    return value if os.environ["RANK"] == "0" else None


@dataclass
class Held:
    """What this process holds now."""

    python_threads: int
    threads: int
    files: int
    tensor_bytes: int
    rss: int

    @classmethod
    def now(cls) -> "Held":
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        return cls(
            threading.active_count(),
            count("task"),
            count("fd"),
            tensor_bytes(),
            pages * os.sysconf("SC_PAGE_SIZE"),
        )

    def again(self) -> "Held":
        """``now``, but sockets and their threads get a moment to close after their peers."""
        gc.collect()  # pytest's own hold on a caught error, and with it on an engine
        for _ in range(40):
            if count("task") <= self.threads and count("fd") <= self.files:
                break
            time.sleep(0.05)
        return Held.now()

    def check(self, now: "Held", when: str) -> None:
        """Raises AssertionError when ``now`` holds more."""
        said = when, self, now
        assert now.python_threads == self.python_threads, said
        assert now.threads <= self.threads, said
        assert now.files <= self.files, said
        assert now.tensor_bytes <= self.tensor_bytes, said
        assert now.rss - self.rss < RSS_BOUND, said


def count(what: str) -> int:
    return len(os.listdir(f"/proc/self/{what}"))


def tensor_bytes() -> int:
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of torch's own objects warn when looked at
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor):
                found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(found.values())


def _rounds(ways: list[str], record: str, port: str) -> None:
    # As under torchrun: the store outlives every group, and what they wrote stays in it.
    os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    closed, streams = [], []  # what is closed holds nothing, even if somebody still holds it
    before, baseline = Held.now(), None
    for how in ways:
        time.sleep(0.1 * int(os.environ["RANK"]))  # who is first must not find the last group's
        llm = open_tiny(record_path=record)
        assert tensor_bytes() - before.tensor_bytes > KV_BYTES
        streams += use(llm, how)
        llm.close()
        closed.append(llm)
        if baseline is None:  # the first round also loads code and fills caches
            time.sleep(0.3)
            baseline = Held.now()
            assert baseline.tensor_bytes == before.tensor_bytes
        else:
            baseline.check(baseline.again(), how)
    assert len(closed) == len(ways)
    for stream in streams:
        with pytest.raises(ConfigError, match="closed"):
            list(stream)


def use(llm: LLM, how: str) -> list:
    """Use it in one way; a stream that a caller has not read to its end."""
    rank, sized = llm.tp.rank, llm.tp.size > 1
    mine = only_rank_0(PROMPTS)
    if how == "good":
        assert words(llm.generate(mine, GREEDY)) == WORDS
        assert llm.logits([80, 81, 82]).shape[0] == 3
        llm.score([[80, 81, 82]])
    elif how == "refused":
        with pytest.raises(OutOfMemoryPlan):
            open_tiny(kv_cache_memory=1)
        for _ in range(2):
            with pytest.raises(ConfigError, match="more than the"):
                llm.generate(mine, SamplingParams(max_tokens=10**6))
        assert words(llm.generate(mine, GREEDY)) == WORDS
    elif how == "failed":
        execute, steps = llm._engine.runner.execute, iter(range(100))

        def broken(*args):
            if next(steps) == 3:
                raise MemoryError("no more")
            return execute(*args)

        llm._engine.runner.execute = broken
        with pytest.raises((MemoryError, TprtError), match="no more"):
            if rank:  # the others hear of it when this rank is gone
                try:
                    llm.generate(None)
                finally:
                    llm.close()
            llm.generate(mine, GREEDY)
        if not sized:
            llm._engine.runner.execute = execute
            assert words(llm.generate(mine, GREEDY)) == WORDS
    elif how == "left":
        for event in llm.stream(mine, GREEDY):
            assert event.text
            break
        assert words(llm.generate(mine, GREEDY)) == WORDS
        assert llm._engine.blocks.num_free == llm._engine.blocks.capacity
    else:
        assert how == "held" and not sized
        stream = llm.stream(PROMPTS, GREEDY)
        next(stream)
        with pytest.raises(ConfigError, match=r"generate\(\) while stream\(\)"):
            llm.generate(PROMPTS)
        return [stream]
    return []


@pytest.mark.parametrize("ranks", [1, 2])
def test_close_gives_everything_back(ranks, tmp_path):
    ways = ["good", "refused", "failed", "left", "good"] + ["held", "good"] * (ranks == 1)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    run_ranks(_rounds, ranks, ways, str(tmp_path / "record"), str(store.port))


def _side_by_side() -> list:
    """Every rank has an LLM on its row of a 2 x 2 mesh, one on its column, and two alone."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "tp"))
    row, column = mesh.get_local_rank("replica"), mesh.get_local_rank("tp")
    small = {"kv_cache_memory": 2**22}
    open_tiny(group=mesh["tp"], **small).close()  # loads code
    time.sleep(0.3)
    before, found = Held.now(), []

    def ask(llm: LLM, which: int) -> None:
        found.append(words(llm.generate(PROMPTS if llm.tp.rank == 0 else None, GREEDY)))
        found.append(llm.generate([PROMPTS[which]], HOT)[0].outputs[0].text)

    first = open_tiny(group=mesh["tp"], **small)
    ask(first, row)
    second = open_tiny(group=mesh["replica"], **small)
    ask(first, row)
    ask(second, column)
    if row == 0:  # one replica ends, the other goes on
        first.close()
    ask(second, column)
    if row == 1:
        ask(first, row)
        first.close()
    third = open_tiny(group=mesh["tp"], **small)  # one after another
    second.close()
    ask(third, row)
    third.close()
    before.check(before.again(), "side by side")
    dist.destroy_process_group()
    return found


HOT = SamplingParams(temperature=1.5, seed=5, max_tokens=10, ignore_eos=True)


def test_engines_side_by_side_and_one_after_another():
    with open_tiny() as llm, open_tiny() as other:
        alone = [out.outputs[0].text for out in llm.generate(PROMPTS, HOT)]
        assert words(other.generate(PROMPTS, GREEDY)) == WORDS
        llm.close()
        assert [out.outputs[0].text for out in other.generate(PROMPTS, HOT)] == alone
    for rank, found in enumerate(run_ranks(_side_by_side, 4)):
        row, column = alone[rank // 2], alone[rank % 2]
        texts = [row, row, column, column, *([row] if rank // 2 else []), row]
        assert found == [part for text in texts for part in (WORDS, text)]


def _kv_use(settings: dict) -> dict:
    """Bytes of the KV cache that this rank holds, and has in use step by step."""
    # Different beginnings, lengths on and beside the edges of blocks; chunks of prompts too.
    lengths = [1, 6, 7, 8, 13, 14, 26, 40]
    prompts = [{"prompt_token_ids": [80 + n, *range(100, 99 + n)]} for n in lengths]
    answers = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    with open_tiny(max_num_batched_tokens=31, **settings) as llm:
        engine = llm._engine
        tensors = [t for cache in engine.runner.caches for t in vars(cache).values()]
        held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        one = sum(tensor[0].nbytes for tensor in tensors)
        steps, blocks, scheduler = [], engine.blocks, engine.scheduler
        if llm.tp.rank == 0:
            for prompt in prompts:
                llm.add_request(prompt, answers)
            while llm._requests:
                llm.step()
                lengths_now = [s.num_computed for s in scheduler.running + scheduler._leaving]
                steps.append((lengths_now, (blocks.capacity - blocks.num_free) * one))
            while not engine.control.followed() and llm.tp.size > 1:
                time.sleep(0.01)
        else:
            llm.follow()
        # Memory was zero and nothing was used twice: what is not zero now was in use.
        written = [bool(tensors[0][block].any()) for block in range(1, blocks.num_blocks)]
        return {
            "held": held,
            "steps": steps,
            "written": sum(written) * one,
            "texts": [n + answers.max_tokens - 1 for n in lengths],
        }


SIZES = {"kv_cache_memory": 3_000_000, "max_model_len": 99}
KINDS = [("float32", 7), ("bfloat16", 13)]


def _kv_uses() -> list[dict]:
    return [_kv_use({"dtype": dtype, "block_size": size, **SIZES}) for dtype, size in KINDS]


@pytest.fixture(scope="module")
def kv_uses() -> dict[int, list[list[dict]]]:
    """By number of ranks and by rank, one per kind."""
    return {1: [_kv_uses()], 2: run_ranks(_kv_uses, 2)}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_kv_bytes_are_those_of_the_plan(kv_uses, ranks, kind):
    """What ``tprt plan --json`` says, to the byte: allocated, and in use while sequences run."""
    dtype, block_size = KINDS[kind]
    engine = {"block_size": block_size, **SIZES}
    overrides = [f"engine.{name}={value}" for name, value in engine.items()]
    flags = {"model.path": str(TINY), "model.dtype": dtype, "parallel.tensor": ranks}
    settings = load_settings(None, [*overrides, "engine.max_num_seqs=64"], flags)
    plan = make_plan(settings, read_config(settings))
    block = plan["kv_bytes_per_block_per_rank"]

    def planned(lengths: list[int]) -> int:
        return sum(-(-n // block_size) * block for n in lengths)

    assert plan["kv_bytes_per_full_sequence_per_rank"] == planned([99])
    for rank, found in enumerate(uses[kind] for uses in kv_uses[ranks]):
        assert block == plan["per_rank"][rank]["kv_per_token"] * block_size
        assert found["held"] == plan["kv_cache_bytes_per_rank"]
        assert found["written"] == planned(found["texts"])
        assert bool(found["steps"]) == (rank == 0)
        for lengths, in_use in found["steps"]:
            assert in_use == planned(lengths)
        if rank == 0:
            assert max(in_use for _, in_use in found["steps"]) > 0.8 * planned(found["texts"])
