"""Which rank of how many this is, and the process groups its tensor-parallel ranks share.

``TPGroup`` is a plain value that layers take; without process groups it describes a rank that only
exists on paper, so one process can build rank 3 of 4 in a test or for a plan. This file knows no
model.
"""

import ctypes
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, _get_default_store
from torch.distributed.rendezvous import rendezvous

from tprt.distributed.environment import environment, launch_attempt
from tprt.distributed.progress import Progress
from tprt.errors import ConfigError, PeerLost

CPU = torch.device("cpu")
# On the host ranks also wait for one another's reading and tokenizing; on a device only for a step.
HOST_TIMEOUT = timedelta(hours=1)
DEVICE_TIMEOUT = timedelta(minutes=5)
INIT_TIMEOUT, STORE_TIMEOUT = timedelta(minutes=10), timedelta(minutes=1)


@dataclass(frozen=True)
class TPGroup:
    """One rank's view of its tensor-parallel group.

    Args:
        rank: 0 to size - 1, within this group.
        size: number of ranks the model is cut over.
        device: where this rank computes.
        device_group: backend for ``device`` tensors (NCCL or gloo); None at size 1 or on paper.
        cpu_group: backend for host tensors (gloo); None at size 1 or on paper.
        control_group: backend for step records (gloo), which must not queue behind anything else.
        store: what the ranks met through, under a prefix of this group's own; None as above.
        owns_default_group: whether closing must also destroy torch's default group.
        one_shot: small sums and gathers over memory that ranks share, as ``communication.OneShot``;
            None where there is none.
        shared_memory: what ``one_shot`` works in, with a ``close``.
        progress: what this rank is doing, for the watch over the ranks.
        launch_ranks: of this group's ranks, their numbers in the launch.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    device_group: Any = None
    cpu_group: Any = None
    control_group: Any = None
    store: Any = None
    owns_default_group: bool = False
    one_shot: Any = None
    shared_memory: Any = None
    progress: Progress = field(default_factory=Progress, compare=False)
    launch_ranks: tuple[int, ...] = (0,)

    @property
    def graphs_hold_all(self) -> bool:
        """Whether a CUDA graph can hold any collective, not only those that ``one_shot`` does."""
        if self.size == 1 or self.device.type != "cuda":
            return True
        return self.device_group is not self.cpu_group

    def abort(self) -> None:
        """Give up the device's collectives: kernels that wait for a peer end, and nothing else works."""
        if self.one_shot is not None:
            self.one_shot.abort()
        if self.device.type == "cuda" and self.device_group is not self.cpu_group:
            self.device_group.abort()

    def abandon(self) -> None:
        """Instead of ``close`` after a failure: nothing waits for a peer that does not answer.

        To destroy a group whose collective hangs would take until its timeout, so the groups stay.
        """
        self.abort()
        for group in (self.device_group, self.cpu_group, self.control_group):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        self._destroy_default_group()  # in which nothing of ours is ever under way

    def close(self) -> None:
        """Shut down what ``init_tp_group`` made, and only that."""
        if self.shared_memory is not None:
            self.shared_memory.close()
        groups = self.device_group, self.cpu_group, self.control_group
        for group in {id(g): g for g in groups if g}.values():
            group.shutdown()
        self._destroy_default_group()

    def _destroy_default_group(self) -> None:
        if self.owns_default_group and dist.is_initialized():
            dist.destroy_process_group()


def launched_size() -> int:
    """Number of ranks the launcher started (1 without a launcher)."""
    return (
        dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    )


def default_device() -> torch.device:
    """This rank's GPU by LOCAL_RANK where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} has no GPU; this host shows {count}",
            hint=f"at most {count} ranks on this host, or CUDA_VISIBLE_DEVICES= to use the CPU",
        )
    return torch.device("cuda", local_rank)


def launch_store(name: str) -> Any:
    """What the ranks of the launch meet through: a connection of its own, under a prefix ``name``.

    Under a launcher only. A restarted launch meets under a prefix of its own.

    Raises:
        PeerLost: the store could not be reached.
    """
    if "store" not in _launch:
        _launch["store"] = _rendezvous()[0]
    return PrefixStore(f"tprt/{launch_attempt()}/{name}", _launch["store"].clone())


def init_tp_group(
    group: Any = None, device: torch.device | str | None = None, progress: Progress | None = None
) -> TPGroup:
    """Make this rank's ``TPGroup``, with child groups of its own over the ranks of ``group``.

    Args:
        group: a process group, a one-dimensional DeviceMesh, ranks of the launch in ascending order,
            or None for the world. Under a launcher without any group yet, the default group is made
            here and removed by ``close``.
        device: where to compute; None picks this rank's GPU, else the CPU.
        progress: that a watch reads; None makes one.

    Raises:
        ConfigError: ``group`` is of another kind, or this rank is not in it.
        PeerLost: the other ranks could not be met.
    """
    device = default_device() if device is None else torch.device(device)
    if str(device) == "cuda" and torch.cuda.is_available():
        device = default_device()  # "cuda" is this rank's GPU, not that of whoever is current
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device is {device}, but torch finds no GPU here", hint="device auto or cpu"
        )
    owns_default = False
    if (group is None or isinstance(group, list)) and not dist.is_initialized():
        if launched_size() == 1:
            return TPGroup(device=device, progress=progress or Progress())
        _init_default_group()
        owns_default = True
    try:
        tp = _child_groups(group, device, owns_default)
        return replace(tp, progress=progress or tp.progress)
    except BaseException:
        if owns_default:
            dist.destroy_process_group()
        raise


def _child_groups(group: Any, device: torch.device, owns_default: bool) -> TPGroup:
    ranks = _ranks_of(group)
    if dist.get_rank() not in ranks:
        raise ConfigError(
            f"rank {dist.get_rank()} is not in the given group of ranks {ranks}",
            hint="make the LLM only on the ranks of its group",
        )
    if len(ranks) == 1:
        return TPGroup(device=device, owns_default_group=owns_default, launch_ranks=tuple(ranks))
    rank, size = ranks.index(dist.get_rank()), len(ranks)
    # Backends of our own, not dist.new_group: that needs every rank of the world to take part, or,
    # with local synchronisation, names the group by how many groups this rank is in. Ranks of a mesh
    # may differ in that, and a name used before leads to the addresses of a group that is gone.
    key = "_".join(map(str, ranks))
    _made[key] += 1
    store = PrefixStore(f"tprt/{key}/{_made[key]}", _own_connection())
    cpu_group = ProcessGroupGloo(PrefixStore("cpu", store), rank, size, HOST_TIMEOUT)
    control_group = ProcessGroupGloo(PrefixStore("control", store), rank, size, HOST_TIMEOUT)
    tp = TPGroup(rank, size, device, cpu_group, cpu_group, control_group, store, owns_default)
    tp = replace(tp, launch_ranks=tuple(ranks))
    return replace(tp, device_group=new_device_group(tp, "device"))


def new_device_group(tp: TPGroup, name: str) -> Any:
    """A backend for tensors on ``tp.device``. Collective.

    Args:
        name: used once per group: ranks meet under it.
    """
    if tp.device.type != "cuda" or _shares_a_gpu(tp, name):
        return tp.cpu_group
    from torch.distributed.distributed_c10d import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = DEVICE_TIMEOUT
    # A step that does not end is our deadline's business: NCCL's own watch would end the whole process,
    # which may be somebody else's program.
    with environment(TORCH_NCCL_ASYNC_ERROR_HANDLING="0", TORCH_NCCL_ENABLE_MONITORING="0"):
        return ProcessGroupNCCL(PrefixStore(name, tp.store), tp.rank, tp.size, options)


def _shares_a_gpu(tp: TPGroup, name: str) -> bool:
    """Whether two ranks have the same GPU, which NCCL refuses: gloo then stages through the host."""
    own = str(torch.cuda.get_device_properties(tp.device).uuid)
    store = PrefixStore(f"{name}-gpu", tp.store)
    store.set(str(tp.rank), own)
    everyone = [store.get(str(rank)) for rank in range(tp.size)]
    return len(set(everyone)) < tp.size


def _own_connection() -> Any:
    """The default store over a connection of our own: who waits on one keeps all others off it."""
    store: Any = _get_default_store()  # torch's stubs lack clone()
    return store.clone()


_launch: dict[str, Any] = {}
_made: Counter[str] = Counter()  # groups made so far over the same ranks; members count alike


def _ranks_of(group: Any) -> list[int]:
    if group is None:
        return list(range(dist.get_world_size()))
    if isinstance(group, list):
        return group
    if isinstance(group, dist.ProcessGroup):
        return dist.get_process_group_ranks(group)
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise ConfigError(
                f"the DeviceMesh has {group.ndim} dimensions, allowed is 1",
                hint='pass one axis, for example mesh["tp"]',
            )
        return dist.get_process_group_ranks(group.get_group())
    raise ConfigError(
        f"group must be a process group or a DeviceMesh, not {type(group).__name__}",
        hint="on a rank outside the group, do not make the LLM",
    )


def _init_default_group() -> None:
    # A restarted job meets under a prefix of its own, and so does each default group of a process:
    # the store outlives them, and a rank that reads an old address waits for a peer that is gone.
    _made["default"] += 1
    if "store" in _launch:
        store, rank, size = _launch["store"], int(os.environ["RANK"]), launched_size()
    else:
        store, rank, size = _rendezvous()
    try:
        dist.init_process_group(
            "gloo",
            store=PrefixStore(f"tprt/{launch_attempt()}/{_made['default']}", store),
            rank=rank,
            world_size=size,
            timeout=HOST_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise _could_not_meet(error) from error


def _rendezvous() -> tuple[Any, int, int]:
    # A launcher's store is there before its ranks: if not now, then never again.
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return next(iter(rendezvous("env://", timeout=STORE_TIMEOUT if held else INIT_TIMEOUT)))
    except (RuntimeError, ValueError) as error:
        raise _could_not_meet(error) from error


def _could_not_meet(error: Exception) -> PeerLost:
    return PeerLost(
        f"the ranks could not meet: {str(error).splitlines()[0]}",
        where=f"rank {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')}",
        hint="check MASTER_ADDR and MASTER_PORT, and that every rank was started",
    )
