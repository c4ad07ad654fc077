"""What ranks settle about memory: whether the plan fits before loading, and how much KV cache.

Knows configs, plans and ranks; no checkpoints.
"""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from tprt.config import EngineConfig, ModelConfig
from tprt.distributed.communication import gather_json
from tprt.distributed.tp_group import TPGroup
from tprt.distributed.vocabulary import Vocabulary
from tprt.engine.memory_plan import RankPlan, RuntimePlan, plan_rank, plan_runtime
from tprt.errors import OutOfMemoryPlan
from tprt.log import get_logger

logger = get_logger(__name__)

GIB, MIB = 2**30, 2**20
CPU_KV_CACHE_MEMORY, CPU_SNAPSHOT_MEMORY = 1 * GIB, 256 * MIB
SNAPSHOTS_PER_SEQUENCE = 2  # more would hardly be found again before they give way
# With fewer tokens in a step prompts crawl: then something else has to give way.
LEAST_TOKENS = 256
# What is measured at start and what was planned may differ by this much, KV cache aside.
TOLERANCE = 256 * MIB


@dataclass(frozen=True)
class MemoryPlan:
    """What one rank is going to take, in bytes.

    Args:
        rank: of any rank.
        block: one KV block over all layers; 0 for a model without any.
        slots: state of as many sequences as run together, and of padding rows.
        room: what this rank may take beside the driver's context; None where that is not known.
        used: of the device before anything was loaded, by anybody; None on a CPU.
    """

    rank: RankPlan
    runtime: RuntimePlan
    block: int
    slots: int = 0
    room: int | None = None
    used: int | None = None

    @property
    def fixed(self) -> int:
        """All but the context, KV blocks and snapshots of state."""
        return self.rank.weights + self.rank.tables + self.runtime.added + self.slots

    def needed(self, engine: EngineConfig) -> int:
        """With the KV cache that was asked for, else with the smallest that serves anything."""
        return self.fixed + max((engine.kv_cache_memory or 0) - self.slots, 2 * self.block)

    @property
    def unit(self) -> int:
        """What is allocated beyond ``fixed``, as much as memory allows: a block, or a snapshot."""
        return self.block or self.rank.state_per_slot


def plan_memory(
    config: ModelConfig,
    engine: EngineConfig,
    tp_size: int,
    device_type: str,
    vocabulary: Vocabulary | None = None,
) -> MemoryPlan:
    """The plan of ``tp_size`` ranks on devices of this type; needs none."""
    dtype = getattr(torch, engine.dtype)
    length = engine.resolve_max_model_len(config)
    # Cuts are padded: all ranks are alike.
    rank = plan_rank(config, 0, tp_size, dtype, length, vocabulary)
    runtime = plan_runtime(config, tp_size, engine, device_type, vocabulary)
    slots = rank.state_per_slot * (engine.max_num_seqs + 1)
    return MemoryPlan(rank, runtime, rank.kv_per_token * engine.block_size, slots)


def check_memory(
    tp: TPGroup,
    config: ModelConfig,
    engine: EngineConfig,
    loaded: int = 0,
    vocabulary: Vocabulary | None = None,
) -> MemoryPlan:
    """This rank's plan, once it is known that every rank's fits. Collective; before anything is loaded.

    Args:
        loaded: bytes of the plan that are on the device already, where it is not before.

    Raises:
        OutOfMemoryPlan: on every rank, where one has too little; it names the largest setting that
            fits there.
    """
    plan = plan_memory(config, engine, tp.size, tp.device.type, vocabulary)
    sharing = _ranks_here(tp)
    if tp.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(tp.device)
        room = int(free - (1 - engine.gpu_memory_utilization) * total)
        used = total - free - loaded if sharing == 1 else None
        plan = replace(plan, room=max(0, room) // sharing + loaded, used=used)
    elif (available := host_memory_available()) is not None:
        plan = replace(plan, room=available // sharing + loaded)
    rooms = gather_json(plan.room, tp)
    for rank, room in enumerate(rooms):
        if room is not None and plan.needed(engine) > room:
            raise _too_little(config, engine, tp, plan, rank, room, vocabulary)
    return plan


def _ranks_here(tp: TPGroup) -> int:
    """How many ranks share this rank's GPU, or its host where they compute on CPUs. Collective."""
    place = [socket.gethostname()]
    if tp.device.type == "cuda":
        place.append(str(torch.cuda.get_device_properties(tp.device).uuid))
    return gather_json(place, tp).count(place)


def host_memory_available() -> int | None:
    """Bytes that can be taken without swapping; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _too_little(
    config: ModelConfig,
    engine: EngineConfig,
    tp: TPGroup,
    plan: MemoryPlan,
    rank: int,
    room: int,
    vocabulary: Vocabulary | None,
) -> OutOfMemoryPlan:
    parts = {
        "weights": plan.rank.weights + plan.rank.tables,
        "steps and their state": plan.runtime.added,
        "KV cache": plan.needed(engine) - plan.fixed + plan.slots,
    }
    shown = ", ".join(f"{name} {in_gib(count)}" for name, count in parts.items())
    return OutOfMemoryPlan(
        f"{in_gib(plan.needed(engine))} are needed per rank ({shown}), and there is room for "
        f"{in_gib(room)}",
        where=f"rank {rank} of {tp.size}, {tp.device.type}",
        hint=largest_that_fits(config, engine, tp.size, tp.device.type, room, vocabulary),
    )


def largest_that_fits(
    config: ModelConfig,
    engine: EngineConfig,
    tp_size: int,
    device_type: str,
    room: int,
    vocabulary: Vocabulary | None = None,
) -> str:
    """The mildest change of settings after which the plan fits into ``room`` bytes, in words."""

    def fits(size: int = tp_size, **changed: int | bool | None) -> bool:
        tried = replace(engine, **changed)  # type: ignore[arg-type]
        return plan_memory(config, tried, size, device_type, vocabulary).needed(tried) <= room

    plan = plan_memory(config, engine, tp_size, device_type, vocabulary)
    if engine.kv_cache_memory is not None and fits(kv_cache_memory=None):
        units = (room - plan.fixed) // plan.unit
        return f"engine.kv_cache_memory={plan.slots + units * plan.unit} or less"
    for name, least in (("max_num_batched_tokens", LEAST_TOKENS), ("max_num_seqs", 1)):
        for value in _halves(getattr(engine, name), least):
            if fits(**{name: value}):
                return f"engine.{name}={_most(value, partial(_fits_with, fits, name))}"
    if plan.runtime.copies and fits(sparse_rows=0):
        return "engine.sparse_rows=0, which keeps no second copy of down projections"
    if device_type == "cuda" and not engine.enforce_eager and fits(enforce_eager=True):
        return "engine.enforce_eager=true, which keeps no graphs"
    for size in config.tp_sizes():
        if size > tp_size and fits(size):
            return f"{size} ranks, each on a device of its own"
    return "a device with more memory: at no number of ranks do these settings fit"


def _fits_with(fits: Callable[..., bool], name: str, value: int) -> bool:
    return fits(**{name: value})


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _most(value: int, fits: Callable[[int], bool]) -> int:
    """The largest number below 2 * ``value``, which fits, that fits too."""
    low, high = value, 2 * value
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def agree_on_cache(
    tp: TPGroup, engine: EngineConfig, plan: MemoryPlan, max_model_len: int
) -> tuple[int, int]:
    """KV blocks, and rows of state with those for snapshots, that every rank can hold. Collective.

    The minimum over ranks, at most what requests can use.

    Raises:
        OutOfMemoryPlan: no block, or not the state of ``max_num_seqs`` sequences; on every rank.
    """
    if engine.kv_cache_memory is not None:
        memory = engine.kv_cache_memory - plan.slots
    elif tp.device.type == "cuda":
        assert plan.room is not None
        memory = plan.room - plan.fixed
    else:
        memory = CPU_KV_CACHE_MEMORY if plan.block else CPU_SNAPSHOT_MEMORY
    if memory < 0:
        raise _too_little_for_slots(engine, plan)
    offers = [int(n) for n in gather_json(memory // plan.unit, tp)]
    if not plan.block:  # what lies beyond the most that is used is no difference
        offers = [min(n, SNAPSHOTS_PER_SEQUENCE * engine.max_num_seqs) for n in offers]
    warning = uneven_offers(offers, "KV blocks" if plan.block else "snapshots of state")
    if warning and tp.rank == 0:
        logger.warning("%s", warning)
    states = engine.max_num_seqs + 1 if plan.slots else 0
    if not plan.block:
        return 1, states + min(offers)
    blocks = kv_blocks(offers, engine, max_model_len)
    if not blocks:
        raise OutOfMemoryPlan(
            f"{memory} bytes for the KV cache hold no block of {engine.block_size} tokens and one for "
            f"padding, {plan.block} bytes each",
            hint="a larger kv_cache_memory, more ranks, or a smaller block_size",
        )
    return blocks, states


def snapshots_that_fit(
    plan: MemoryPlan, engine: EngineConfig, device_type: str, memory: int | None
) -> int:
    """Copies of state that ``agree_on_cache`` allots; the most there can be where that is open.

    Args:
        memory: bytes for all state; None where nobody has said.
    """
    if not plan.slots or plan.block:
        return 0
    most = SNAPSHOTS_PER_SEQUENCE * engine.max_num_seqs
    if memory is None and device_type == "cuda":
        return most
    spare = CPU_SNAPSHOT_MEMORY if memory is None else max(0, memory - plan.slots)
    return min(most, spare // plan.unit)


def _too_little_for_slots(engine: EngineConfig, plan: MemoryPlan) -> OutOfMemoryPlan:
    each, asked = plan.rank.state_per_slot, engine.kv_cache_memory
    assert asked is not None
    most = asked // each - 1
    hint = f"engine.max_num_seqs={most}, or " if most > 0 else ""
    return OutOfMemoryPlan(
        f"kv_cache_memory of {asked} bytes does not hold the state of {engine.max_num_seqs} sequences "
        f"and of padding, {each} bytes each",
        hint=f"{hint}engine.kv_cache_memory={plan.slots}",
    )


def kv_blocks(offers: list[int], engine: EngineConfig, max_model_len: int) -> int:
    """Blocks to allocate where ranks have room for ``offers``; 0 where one rank has too little.

    One of them is for padding, the others are no more than requests can ever use.
    """
    usable = engine.max_num_seqs * -(-max_model_len // engine.block_size)
    blocks = min([*offers, usable + 1])
    return blocks if blocks > 1 else 0


def uneven_offers(offers: list[int], what: str = "KV blocks") -> str:
    """What to say when ranks have room for numbers of ``what`` that differ by more than 5%."""
    low, high = min(offers), max(offers)
    if low >= 0.95 * high:
        return ""
    return (
        f"rank {offers.index(low)} has room for {low} {what}, rank {offers.index(high)} for {high}; "
        "all use the smaller number. Something else may hold memory there"
    )


def compare_with_plan(tp: TPGroup, plan: MemoryPlan, cache: int) -> None:
    """Log what the device now holds beside what was planned; rank 0 speaks for all. Collective.

    Args:
        cache: bytes of KV blocks, slots and snapshots.
    """
    measured, planned = None, plan.fixed - plan.slots
    if plan.used is not None:
        free, total = torch.cuda.mem_get_info(tp.device)
        measured = total - free - plan.used - cache
    everyone = gather_json(measured, tp)
    if tp.rank != 0:
        return
    weights = plan.rank.weights + plan.rank.tables
    logger.info(
        "memory per rank as planned: weights %s, steps and their state %s, KV cache %s",
        in_gib(weights),
        in_gib(plan.runtime.added),
        in_gib(cache),
    )
    for rank, found in enumerate(everyone):
        if found is None:
            continue
        level = logger.warning if abs(found - planned) > TOLERANCE else logger.info
        level(
            "rank %d: measured without the KV cache %s, planned %s",
            rank,
            in_gib(found),
            in_gib(planned),
        )


def in_gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"
