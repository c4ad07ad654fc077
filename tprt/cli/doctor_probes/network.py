"""Interfaces, and whether names resolve as ranks need them to. Knows no ranks."""

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from tprt.cli.doctor_probes.check import Check

RESOLVE_SECONDS = 5.0  # a name server that does not answer takes longer
SLOW_SECONDS = 1.0


@dataclass(frozen=True)
class Resolved:
    """Args:
    addresses: of a name, in the resolver's order; empty where it has none.
    error: why; empty where there are addresses.
    """

    addresses: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0


Resolve = Callable[[str], Resolved]
Interfaces = dict[str, list[str]]  # name -> addresses of those that are up


def network(
    resolve: Resolve | None = None,
    interfaces: Interfaces | None = None,
    environ: Mapping[str, str] | None = None,
    hostname: str | None = None,
) -> Check:
    """Which interface gloo takes, and whether localhost, this host's name and MASTER_ADDR resolve."""
    environ = os.environ if environ is None else environ
    hostname = socket.gethostname() if hostname is None else hostname
    interfaces = up_interfaces() if interfaces is None else interfaces
    resolve = resolve or resolve_name
    local, own = resolve("localhost"), resolve(hostname)
    warnings, failures = [], []
    if not any(address == "::1" or address.startswith("127.") for address in local.addresses):
        failures.append(
            f"localhost does not resolve to this host ({local.error or local.addresses[0]}), where "
            "local ranks meet: add '127.0.0.1 localhost' to /etc/hosts"
        )
    chosen, address, why = gloo_interface(own, interfaces, environ.get("GLOO_SOCKET_IFNAME", ""))
    if not chosen:
        failures.append(f"{why}: unset GLOO_SOCKET_IFNAME or name one of {', '.join(interfaces)}")
    elif why:
        warnings.append(f"{why}: add it to /etc/hosts, or set GLOO_SOCKET_IFNAME to an interface")
    for name, found in (("localhost", local), ("this host's name", own)):
        if found.seconds > SLOW_SECONDS:
            warnings.append(
                f"{name} took {found.seconds:.1f} s to resolve, each time ranks meet: add it to "
                "/etc/hosts"
            )
    warnings += _nccl_interfaces(environ.get("NCCL_SOCKET_IFNAME", ""), interfaces)
    master = environ.get("MASTER_ADDR")
    if master and "RANK" in environ and not (there := resolve(master)).addresses:
        failures.append(f"MASTER_ADDR does not resolve ({there.error}): give an address")
    loopback = address.startswith("127.") or address == "::1"
    more = ", for this host alone" if loopback and len(interfaces) > 1 else ""
    return Check(
        "network",
        f"gloo takes {chosen or 'nothing'} ({address or 'no address'}{more}), localhost is "
        f"{local.addresses[0] if local.addresses else local.error}, this host's name is "
        f"{own.addresses[0] if own.addresses else own.error}",
        warnings,
        failures,
        [f"{name}: {', '.join(found) or 'no address'}" for name, found in interfaces.items()],
        {
            "interfaces": interfaces,
            "gloo": {"interface": chosen, "address": address},
            "localhost": local.addresses,
            "hostname": own.addresses,
            "seconds": round(max(local.seconds, own.seconds), 3),
        },
    )


def gloo_interface(own: Resolved, interfaces: Interfaces, wanted: str) -> tuple[str, str, str]:
    """What gloo binds to, as it decides it itself: the interfaces it is told, or else the first address
    of the host's name that belongs to this host, or else the loopback.

    Args:
        own: addresses of the host's name.
        wanted: value of GLOO_SOCKET_IFNAME.

    Returns:
        Interface and address, empty where gloo would fail, and what is wrong, empty for nothing.
    """
    if wanted:
        missing = [name for name in wanted.split(",") if not interfaces.get(name)]
        if missing:
            return "", "", f"GLOO_SOCKET_IFNAME names {missing[0]!r}, which is not up here"
        first = wanted.split(",")[0]
        return first, interfaces[first][0], ""
    for address in own.addresses:
        for name, there in interfaces.items():
            # All of 127.0.0.0/8 is this host, as 127.0.1.1 of some distributions.
            if address in there or (address.startswith("127.") and "127.0.0.1" in there):
                return name, address, ""
    name = next((name for name, there in interfaces.items() if "127.0.0.1" in there), "lo")
    reason = own.error or "to an address of another host"
    return (
        name,
        "127.0.0.1",
        f"this host's name does not resolve to one of its addresses ({reason})",
    )


def up_interfaces() -> Interfaces:
    """Interfaces that are up, with their IPv4 and IPv6 addresses."""
    stats = psutil.net_if_stats()
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [a.address.partition("%")[0] for f in families for a in addresses if a.family == f]
        for name, addresses in sorted(psutil.net_if_addrs().items())
        if name not in stats or stats[name].isup
    }


def resolve_name(name: str, limit: float = RESOLVE_SECONDS) -> Resolved:
    """Addresses of ``name``, given up after ``limit`` seconds."""
    answer: list[Resolved] = []
    began = time.monotonic()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
            answer.append(Resolved(addresses, seconds=time.monotonic() - began))
        except (OSError, UnicodeError) as error:
            said = getattr(error, "strerror", None) or str(error)
            answer.append(Resolved(error=said, seconds=time.monotonic() - began))

    # The resolver cannot be interrupted: the thread is left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(limit)
    return answer[0] if answer else Resolved(error=f"no answer within {limit:g} s", seconds=limit)


def _nccl_interfaces(wanted: str, interfaces: Interfaces) -> list[str]:
    """NCCL's rules: a list of beginnings of names, ``=`` for whole names, ``^`` for all others."""
    match = re.fullmatch(r"(\^?)(=?)(.+)", wanted)
    if not match:
        return []
    excluded, exact, listed = match.groups()

    def named(name: str) -> bool:
        return any(name == n if exact else name.startswith(n) for n in listed.split(","))

    left: list[Any] = [name for name in interfaces if named(name) != bool(excluded)]
    if left:
        return []
    return [f"NCCL_SOCKET_IFNAME={wanted} leaves no interface: name one of {', '.join(interfaces)}"]
