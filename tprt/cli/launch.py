"""Starts N ranks of this program on this host through torch's own launcher."""

import logging
import os
import sys
import uuid

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tprt.errors import EXIT_OK, EXIT_SIGINT, EXIT_SIGTERM, PeerLost


def launch_local(ranks: int, arguments: list[str]) -> int:
    """Run ``python -m tprt *arguments`` on ``ranks`` local ranks; their exit code.

    The first rank to fail decides the code; a rank ended by a signal counts as a rank failure (6).
    """
    # Ranks that each take every core slow one another down many times over.
    threads = max(1, (os.cpu_count() or 1) // ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        metrics_cfg={},
    )
    try:
        elastic_launch(config, sys.executable)("-m", "tprt", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            raise PeerLost(
                f"rank {rank} was ended by signal {-failure.exitcode}",
                where=f"process {failure.pid}",
                hint="the same command starts the job again",
            ) from error
        return int(failure.exitcode)
    except SignalException as signal:
        return EXIT_SIGINT if signal.sigval.name == "SIGINT" else EXIT_SIGTERM
    return EXIT_OK
