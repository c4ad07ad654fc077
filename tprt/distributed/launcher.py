"""Starts this host's ranks of a job, alone or with those of other hosts; what launch/torchrun.sh runs.

As torchrun, with three differences. The stores through which ranks meet listen on one address, loopback
for a single host. The exit code is the job's own instead of 1. A failure that a new start may cure
starts the ranks again, as new processes that share nothing with the old; one that it cannot cure ends
the launch. Knows processes and hosts; what a rank does is its command's business.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tprt.distributed import rendezvous
from tprt.distributed.environment import MAX_RESTARTS_VARIABLES, environment
from tprt.errors import (
    EXIT_OK,
    EXIT_SIGINT,
    EXIT_SIGTERM,
    FINAL_CODES,
    ConfigError,
    PeerLost,
    TprtError,
)
from tprt.faults import ATTEMPT_VARIABLES
from tprt.host_limits import usable_cpus
from tprt.log import report

DEFAULT_PORT = 29400
RESTART_COUNT = ATTEMPT_VARIABLES[1]
LAUNCHER_PID, MAX_RESTARTS = "TPRT_LAUNCHER_PID", MAX_RESTARTS_VARIABLES[1]
TORCH_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"  # which torch sets, and would leave set
RUN_ID = "tprt-attempt-{}"  # ranks know by it that the launcher is this one
MEETING_TIMEOUT = timedelta(minutes=10)
# torch hands these on to the ranks, and kills those that have not ended SHUTDOWN_SECONDS later.
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
SHUTDOWN_SECONDS = "15"


@dataclass(frozen=True)
class Nodes:
    """The hosts of a launch as this one sees them.

    Args:
        rank, count: which node of how many this is.
        address, port: where they meet, on the node with rank 0.
        interface: over which the ranks of this node speak to others.
    """

    rank: int
    count: int
    address: str
    port: int
    interface: str


def find_nodes(
    count: int, rank: int | None = None, head: str | None = None, interface: str | None = None
) -> Nodes:
    """Args:
        rank: None is SLURM_NODEID, or 0 where ``head`` is this host and 1 for the other of two.
        head: ``HOST[:PORT]`` of the node with rank 0, by which all know it; only for several nodes.
        interface: over which ranks speak to one another; None is the one that leads to the head,
            loopback for a single node.

    Raises:
        ConfigError: a name or number is wrong, or more has to be said.
    """
    if count == 1:
        name = interface or rendezvous.interface_towards(rendezvous.LOOPBACK)
        return Nodes(0, 1, rendezvous.interface_address(name), 0, name)
    if not head:
        raise ConfigError(f"{count} nodes need --head", hint="the host name of the first node")
    host, port = _split(head)
    address = rendezvous.resolve(host)
    if rank is None:
        rank = _guess_rank(count, address)
    if not 0 <= rank < count:
        raise ConfigError(f"--node-rank is {rank}, allowed are 0 to {count - 1} (--nnodes)")
    named = host == "localhost" or host[:1].isdecimal() or ":" in host
    if rendezvous.is_loopback(address) and not named:
        # As Debian's /etc/hosts has it for a host's own name. Others would knock at their own door.
        if rank > 0 or not interface:
            raise ConfigError(
                f"the head's name {host!r} leads to {address} here, where no other host is heard",
                hint="the head's address as --head, or --interface on the head",
            )
        address = rendezvous.interface_address(interface)
    if rank == 0 and not rendezvous.is_own_address(address):
        raise ConfigError(
            f"this is node 0, but the head {host!r} has address {address}, which is another host's",
            hint="node 0 must run on the head",
        )
    return Nodes(rank, count, address, port, interface or rendezvous.interface_towards(address))


def _guess_rank(count: int, head: str) -> int:
    if "SLURM_NODEID" in os.environ:
        return int(os.environ["SLURM_NODEID"])
    if rendezvous.is_own_address(head):
        return 0
    if count == 2:
        return 1
    raise ConfigError("which node is this?", hint=f"--node-rank, 1 to {count - 1} off the head")


def _split(head: str) -> tuple[str, int]:
    """``HOST[:PORT]``, with an IPv6 address in brackets where a port follows."""
    host, colon, port = head.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        return head.strip("[]"), DEFAULT_PORT
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"the port in --head {head!r} is {port!r}, allowed are 1 to 65535")
    return host.strip("[]"), int(port)


def launch(
    nodes: Nodes,
    ranks: int,
    command: Sequence[str],
    max_restarts: int = 0,
    signals: Sequence[str] = SIGNALS,
) -> int:
    """Run ``python *command`` as ``ranks`` ranks on this node; the job's exit code.

    A rank ended by a signal counts as a rank failure (6).

    Args:
        max_restarts: how often to start again after a code that is not in ``FINAL_CODES``.
        signals: that end the ranks when they come to this process.

    Raises:
        ConfigError: the store cannot be made here.
        PeerLost: the other nodes could not be met.
    """
    # Reports of 30 lines, each of which says less than the rank or node that failed.
    for name in ("", ".agent.server.api"):  # the second has a level of its own
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    rendezvous.register()
    own = {MAX_RESTARTS: str(max_restarts), TORCH_SIGNALS: ",".join(signals)}
    environ = _environment(nodes, ranks) | own
    attempt = 0
    try:
        with _handlers_kept(signals):
            meeting = _meet(nodes)
            while True:
                with environment(**environ, **{RESTART_COUNT: str(attempt)}):
                    code = _run_once(
                        nodes, ranks, command, RUN_ID.format(attempt), meeting, signals
                    )
                if code in FINAL_CODES or attempt == max_restarts:
                    return code
                attempt += 1
                report(
                    f"tprt: the ranks ended with {code}; starting them again "
                    f"({attempt} of {max_restarts})",
                    "restart",
                )
    except (RendezvousError, DistError) as error:
        raise PeerLost(
            f"the nodes could not meet: {str(error).splitlines()[0]}",
            where=f"node {nodes.rank} of {nodes.count}, head {nodes.address} port {nodes.port}",
            hint="check that every node was started, with the same --nnodes and --head",
        ) from error


def _meet(nodes: Nodes) -> Any:
    if nodes.count == 1:
        return None
    if nodes.rank == 0:
        return rendezvous.listening_store(nodes.address, nodes.port, MEETING_TIMEOUT)
    return rendezvous.connected_store(nodes.address, nodes.port, MEETING_TIMEOUT)


def _environment(nodes: Nodes, ranks: int) -> dict[str, str]:
    """What the ranks inherit; what the user has set stays."""
    defaults = {
        # Ranks that each take every core slow one another down many times over.
        "OMP_NUM_THREADS": str(max(1, usable_cpus() // ranks)),
        "GLOO_SOCKET_IFNAME": nodes.interface,
        "NCCL_SOCKET_IFNAME": nodes.interface,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SHUTDOWN_SECONDS,
    }
    given = {name: value for name, value in os.environ.items() if name in defaults}
    return defaults | given | {LAUNCHER_PID: str(os.getpid())}


@contextlib.contextmanager
def _handlers_kept(signals: Sequence[str]) -> Iterator[None]:
    """For who goes on in this process: torch leaves its own handlers behind."""
    before = {name: signal.getsignal(signal.Signals[name]) for name in signals}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(signal.Signals[name], handler or signal.SIG_DFL)


def _run_once(
    nodes: Nodes,
    ranks: int,
    command: Sequence[str],
    run_id: str,
    meeting: Any,
    signals: Sequence[str],
) -> int:
    config = LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=ranks,
        run_id=run_id,
        rdzv_backend=rendezvous.BACKEND,
        rdzv_endpoint=nodes.address,
        rdzv_configs={
            "node_rank": nodes.rank,
            "num_nodes": nodes.count,
            "meeting": meeting,
            "timeout": MEETING_TIMEOUT,
        },
        max_restarts=0,
        monitor_interval=0.1,
        metrics_cfg={},
        signals_to_handle=",".join(signals),
    )
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        return _code_of(error)
    except SignalException as error:
        return EXIT_SIGINT if error.sigval == signal.SIGINT else EXIT_SIGTERM
    finally:
        # Between two attempts a signal ends this process at once: a wait for other nodes is one of
        # torch's, which no handler written in Python would interrupt.
        for name in signals:
            signal.signal(signal.Signals[name], signal.SIG_DFL)
    return EXIT_OK


def _code_of(error: ChildFailedError) -> int:
    """What the ranks agreed on; one that a signal ended can say nothing."""
    rank, first = error.get_first_failure()
    if first.exitcode == -signal.SIGINT:  # before it had a handler
        return EXIT_SIGINT
    if first.exitcode > 0:
        return int(first.exitcode)
    report(f"tprt: rank {rank} was ended by signal {-first.exitcode}")
    codes = [int(failure.exitcode) for failure in error.failures.values()]
    # A rank that had not met the others knows no more than that this launcher asks it to end.
    told = (code for code in codes if code > 0 and code not in (EXIT_SIGINT, EXIT_SIGTERM))
    return next(told, PeerLost.exit_code)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/torchrun.sh",
        allow_abbrev=False,
        usage="%(prog)s [options] --nproc M -- COMMAND [ARGUMENT ...]",
        description="Run a tprt command (after --) as M ranks on this host, or on each of N hosts.",
    )
    add = parser.add_argument
    add("--nproc", type=int, required=True, metavar="M", help="ranks on this host")
    add("--nnodes", type=int, default=1, metavar="N", help="hosts (1); start this on each of them")
    add(
        "--node-rank",
        type=int,
        metavar="R",
        help="which host this is, 0 for the head (SLURM_NODEID, else by the head's address)",
    )
    add(
        "--head",
        metavar="HOST[:PORT]",
        help=f"the first host, as the others know it ({DEFAULT_PORT})",
    )
    add(
        "--interface",
        metavar="IFACE",
        help="network between ranks (the one that leads to the head; loopback for one host)",
    )
    add(
        "--max-restarts",
        type=int,
        default=0,
        metavar="K",
        help="start the ranks again so often after a rank failure (0); the job resumes by itself",
    )
    add("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command; for example: --nproc 2 -- generate --config ... --output ...")
    for name in ("nproc", "nnodes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, allowed are 1 or more")
    if args.max_restarts < 0:
        parser.error(f"--max-restarts is {args.max_restarts}, allowed are 0 or more")
    try:
        nodes = find_nodes(args.nnodes, args.node_rank, args.head, args.interface)
        return launch(nodes, args.nproc, ["-m", "tprt", *command], args.max_restarts)
    except TprtError as error:
        report(f"tprt: error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_SIGINT


if __name__ == "__main__":
    sys.exit(main())
