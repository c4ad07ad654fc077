"""Where the ranks of a launch meet: a store that listens on one address, and torch's agent over it.

torch's own stores, and so torchrun's, listen on every address of a host whatever address they are
given, and whoever reaches one may write into it. Here the socket is bound first and handed over. Knows
hosts and torch's agent; nothing of models or of what the ranks do.
"""

import contextlib
import ipaddress
import socket
from datetime import timedelta
from typing import Any

import psutil
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from tprt.errors import ConfigError

BACKEND = "tprt"  # the name for LaunchConfig.rdzv_backend
LOOPBACK = "127.0.0.1"
BACKLOG = 1024


def listening_store(address: str, port: int = 0, timeout: timedelta | None = None) -> Any:
    """A ``TCPStore`` server that listens on ``address`` alone; the system chooses port 0.

    Raises:
        ConfigError: the address is not this host's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listener = socket.create_server((address, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"the store cannot listen on {address} port {port}: {error.strerror}",
            hint="another port, or an address of this host",
        ) from error
    return store_on(listener, timeout)


def store_on(listener: socket.socket, timeout: timedelta | None = None) -> Any:
    """A ``TCPStore`` server on a socket that listens; the store takes the socket over."""
    address, port = listener.getsockname()[:2]
    return TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        **_timeout(timeout),
    )


def connected_store(address: str, port: int, timeout: timedelta | None = None) -> Any:
    """A client of the store there, which may come up only later.

    Raises:
        RuntimeError: torch's; nothing answered before ``timeout``.
    """
    return TCPStore(address, port, is_master=False, wait_for_workers=False, **_timeout(timeout))


def _timeout(timeout: timedelta | None) -> dict[str, Any]:
    return {} if timeout is None else {"timeout": timeout}


# ---------------------------------------------------------------- addresses


def resolve(host: str) -> str:
    """The address of a host name, IPv4 where it has one.

    Raises:
        ConfigError: nobody knows the name.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"host {host!r} has no address: {error}", hint="a name that every node knows"
        ) from error
    best = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return str(best[4][0])


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interface_address(name: str) -> str:
    """The address of a network interface, IPv4 where it has one.

    Raises:
        ConfigError: there is no such interface, or it has no address.
    """
    interfaces = _interfaces()
    if not interfaces.get(name):
        raise ConfigError(
            f"interface {name!r} is not here or has no address",
            hint=f"one of {', '.join(sorted(n for n, found in interfaces.items() if found))}",
        )
    return min(interfaces[name], key=lambda address: ":" in address)


def interface_towards(address: str) -> str:
    """The interface from which this host reaches ``address``; no packet is sent.

    Raises:
        ConfigError: there is no way there.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        own = probe.getsockname()[0]
        for name, found in _interfaces().items():
            # All of 127.0.0.0/8 is local, though the interface names 127.0.0.1 alone.
            if own in found or (is_loopback(own) and any(map(is_loopback, found))):
                return name
    raise ConfigError(f"this host has no way to {address}", hint="name an --interface")


def is_own_address(address: str) -> bool:
    """Whether ``address`` is one of this host's."""
    return is_loopback(address) or any(address in found for found in _interfaces().values())


def _interfaces() -> dict[str, list[str]]:
    kinds = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [a.address.partition("%")[0] for a in addresses if a.family in kinds]
        for name, addresses in psutil.net_if_addrs().items()
    }


# ---------------------------------------------------------------- torch's agent


class StaticRendezvous(RendezvousHandler):
    """The nodes of one launch, numbered from the start, for torch's elastic agent.

    The node with rank 0 makes a store for each round, so that no rank reads the addresses of an
    earlier attempt, and tells its port through ``meeting``.

    Args:
        address: of the node with rank 0; its stores listen there and nowhere else.
        node_rank, num_nodes: which node of how many this is.
        meeting: what all nodes share for the whole launch; None for one node.
        timeout: how long nodes wait for one another.
    """

    def __init__(
        self,
        run_id: str,
        address: str,
        node_rank: int,
        num_nodes: int,
        meeting: Any,
        timeout: timedelta,
    ) -> None:
        self.run_id, self.address, self.timeout = run_id, address, timeout
        self.node_rank, self.num_nodes, self.meeting = node_rank, num_nodes, meeting
        self._round = 0
        self._server: Any = None

    @classmethod
    def from_parameters(cls, parameters: RendezvousParameters) -> "StaticRendezvous":
        return cls(parameters.run_id, parameters.endpoint, **{k: parameters.get(k) for k in _KEYS})

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True  # ranks only connect; else rank 0 would make a store that listens everywhere

    def next_rendezvous(self) -> RendezvousInfo:
        key = f"{self.run_id}/{self._round}/port"
        self._round += 1
        if self.node_rank == 0:
            self._server = listening_store(self.address, timeout=self.timeout)
            port = self._server.port
            if self.meeting is not None:
                self.meeting.set(key, str(port))
        else:
            port = int(self.meeting.get(key))
        store = PrefixStore("agent", connected_store(self.address, port, self.timeout))
        there = RendezvousStoreInfo(self.address, port)
        return RendezvousInfo(store, self.node_rank, self.num_nodes, there)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0  # nodes neither join nor leave

    def get_run_id(self) -> str:
        return self.run_id

    def shutdown(self) -> bool:
        self._server = None
        return True


_KEYS = ("node_rank", "num_nodes", "meeting", "timeout")


def register() -> None:
    """Make ``LaunchConfig(rdzv_backend=BACKEND, ...)`` known to torch.

    Its ``rdzv_endpoint`` is the address of the node with rank 0, its ``rdzv_configs`` hold the other
    arguments of ``StaticRendezvous``.
    """
    rendezvous_handler_registry.register(BACKEND, StaticRendezvous.from_parameters)
