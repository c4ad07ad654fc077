"""Device memory that the ranks of one host read and signal in directly: mapped once, at start.

The only file that touches torch's symmetric memory, an interface torch calls alpha. All ranks come to
the same answer, the memory or why there is none, so that they take the same other way together. Knows
addresses and groups, not what is done with them.
"""

import ctypes
import itertools
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import PrefixStore

from tprt.distributed.communication import gather_json
from tprt.distributed.tp_group import TPGroup

# A rank that fails between the two agreements below leaves the others waiting for this long.
RENDEZVOUS_TIMEOUT = timedelta(seconds=60)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_P2P_NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED

_names = itertools.count()


class SymmetricBuffers:
    """Zeroed device memory of every rank, mapped by every rank. Made by ``make_symmetric_buffers``.

    Attributes:
        addresses: int64 [size] on this rank's device: where the memory of each rank begins, as this
            device addresses it; aligned to 16 bytes. Of no use after ``close``.
    """

    def __init__(self, addresses: torch.Tensor, held: list[Any], group_name: str) -> None:
        self.addresses, self._held, self._group_name = addresses, held, group_name

    def close(self) -> None:
        """Unmap the memory. Graphs that use it must be gone before.

        Peers keep what they have mapped until they close too. Waits for the device, so it is not for
        the failure path, where a kernel may wait for a rank that is gone.
        """
        if self._held:
            from torch._C._distributed_c10d import _unregister_process_group

            _unregister_process_group(self._group_name)  # type: ignore[arg-type]
            self._held.clear()


def make_symmetric_buffers(tp: TPGroup, num_bytes: int) -> tuple[SymmetricBuffers | None, str]:
    """``num_bytes`` on each rank; every rank of the group calls this with the same number.

    Ranks that share one GPU, as in tests, need TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1.

    Returns:
        The buffers and "", or None and the reason: the same kind of answer and the same reason on
        every rank.
    """
    if tp.size == 1:
        return None, "a single rank has no peers"
    facts = gather_json(_facts(tp.device), tp)
    if reason := _agree(_objection(facts, tp.rank, _has_atomic_link), tp):
        return None, reason
    memory, reason = _attempt(lambda: _allocate(tp.device, num_bytes))
    if reason := _agree(reason, tp):
        return None, reason
    buffers, reason = _attempt(lambda: _map(memory, tp))
    if reason := _agree(reason, tp):
        if buffers is not None:
            buffers.close()
        return None, reason
    return buffers, ""


def _agree(reason: str, tp: TPGroup) -> str:
    """The first rank's reason, on every rank; "" where none has one."""
    reasons = gather_json(reason, tp)
    return next((f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason), "")


def _attempt(make: Callable[[], Any]) -> tuple[Any, str]:
    """What ``make`` makes, or None and why not: whatever fails here, there is another way."""
    try:
        return make(), ""
    except Exception as error:
        return None, " ".join(str(error).split("\n", 1)[0].split()) or type(error).__name__


def _facts(device: torch.device) -> dict[str, str]:
    """What decides about this rank: where it computes, on which host, and its GPU's name for good."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    return {"device": str(device), "host": f"{socket.gethostname()} {boot}", "gpu": gpu}


def _objection(
    facts: list[dict[str, str]], rank: int, has_atomic_link: Callable[[str, str], bool]
) -> str:
    """Why ``rank`` cannot share memory with ranks of these ``facts``; "" if it can.

    Args:
        has_atomic_link: of this rank's GPU to another.
    """
    mine = facts[rank]
    for peer, fact in enumerate(facts):
        if not fact["gpu"]:
            return f"rank {peer} computes on the device {fact['device']}"
        if fact["host"] != mine["host"]:
            return f"rank {peer} is on another host"
        if fact["gpu"] != mine["gpu"] and not has_atomic_link(mine["gpu"], fact["gpu"]):
            return f"no NVLink to the GPU of rank {peer}"
    return ""


def _has_atomic_link(mine: str, other: str) -> bool:
    """Whether one GPU can do atomics in the memory of the other; both by uuid.

    Signals are atomics. Over PCIe loads and stores may work where these do not.
    """
    count = torch.cuda.device_count()
    order = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(count)}
    if other not in order:
        return False  # hidden from this process: nothing can be asked about it
    value = ctypes.c_int(0)
    driver = ctypes.CDLL("libcuda.so.1")
    failed = driver.cuDeviceGetP2PAttribute(
        ctypes.byref(value), _P2P_NATIVE_ATOMICS, order[mine], order[other]
    )
    return not failed and value.value == 1


def _allocate(device: torch.device, num_bytes: int) -> torch.Tensor:
    from torch._C._distributed_c10d import _SymmetricMemory

    backend = _SymmetricMemory.get_backend(device)
    if backend != "CUDA":
        raise RuntimeError(f"torch's symmetric memory uses {backend or 'no backend'}, not CUDA")
    memory = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
    memory.zero_()
    torch.cuda.synchronize(device)  # before any peer can signal
    return memory


def _map(memory: torch.Tensor, tp: TPGroup) -> SymmetricBuffers:
    from torch._C._distributed_c10d import (
        ProcessGroup,
        _register_process_group,
        _SymmetricMemory,
        _unregister_process_group,
    )

    # A connection of its own: the timeout is that of a store and all its prefixes.
    store = PrefixStore("symmetric_memory", tp.store.clone())
    store.set_timeout(RENDEZVOUS_TIMEOUT)
    # The rendezvous finds rank, size and store by the name of a group; it uses no backend of it.
    name: Any = f"tprt/symmetric_memory/{next(_names)}"
    group = ProcessGroup(store, tp.rank, tp.size)
    _register_process_group(name, group)
    try:
        handle = _SymmetricMemory.rendezvous(memory, name)
        pointers = list(handle.buffer_ptrs)
        if pointers[tp.rank] != memory.data_ptr():
            raise RuntimeError("symmetric memory does not begin where it was allocated")
        addresses = torch.tensor(pointers, dtype=torch.int64, device=memory.device)
    except BaseException:
        _unregister_process_group(name)
        raise
    return SymmetricBuffers(addresses, [handle, memory, group], name)
