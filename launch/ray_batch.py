#!/usr/bin/env python
"""A batch job over the replicas of a Ray cluster: as ``tprt generate``, with the replicas elsewhere.

    python launch/ray_batch.py --config C.yaml --output OUT.jsonl --tp 4 --replicas 8 --address auto
    python launch/ray_batch.py --config configs/tiny.yaml --output OUT.jsonl --tp 2 --replicas 2

The second starts a Ray of its own on this host. Needs ``pip install 'tprt[ray]'``, on a cluster on every
node; this repository's code itself is sent there. Nodes must find the checkpoint under the same path;
the input is read here alone, and this process alone writes: the same journal, output, status file and
exit codes as ``tprt generate``, so either goes on with what the other has left. The same command
resumes, whatever has died.

Each replica is one actor with its GPUs (or CPUs), so its ranks are on one node. A replica that dies is
started again and what it had in flight is tried again; a record that was there at four such deaths, the
last two of them alone, gets an error. Wrong settings and damaged checkpoints end the job at once.

Ray's processes listen on every address of a host; what keeps others out is Ray's token. A Ray started
here makes one (~/.ray/auth_token). For a cluster named by its address, set RAY_AUTH_MODE=token and have
its token in that file or in RAY_AUTH_TOKEN.
"""

import argparse
import importlib.util
import math
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tprt.cli.common import (
    Terminated,
    add_model_flags,
    add_sampling_flags,
    add_settings_flags,
    llm_options,
    settings_from,
)
from tprt.cli.generate import add_job_flags, check_job, make_job
from tprt.cli.settings import Settings
from tprt.errors import EXIT_BUG, EXIT_SIGINT, EXIT_SIGTERM, ConfigError, TprtError
from tprt.log import get_logger, say, setup_cli_logging

logger = get_logger("tprt.ray")

OBJECT_STORE_BYTES = 256 * 2**20  # of a Ray started here; records and results pass through it


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ray_batch.py",
        allow_abbrev=False,
        description="Answer a JSONL file of prompts on the replicas of a Ray cluster; resumes.",
    )
    add = parser.add_argument
    add_model_flags(parser)
    add("--input", metavar="IN.jsonl", help="one JSON object per line")
    add("--output", metavar="OUT.jsonl", help="appears when all is done")
    add("--tp", type=int, metavar="N", help="ranks, and GPUs, of a replica (parallel.tensor, 1)")
    add("--replicas", type=int, metavar="N", help="copies of the model (parallel.data, 1)")
    add("--address", help="of a Ray cluster, or auto (RAY_ADDRESS, else a Ray is started here)")
    add(
        "--cpus-per-replica",
        type=float,
        metavar="N",
        help="that Ray sets aside for a replica (its ranks; on CPUs of this host a fair share)",
    )
    add_sampling_flags(parser, "most tokens per completion (16)")
    add_job_flags(parser)
    add_settings_flags(parser)
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_cli_logging("debug" if args.debug else "info")
    try:
        return run(args)
    except TprtError as error:
        message, code = f"error: {error}", error.exit_code
    except Terminated as name:
        message, code = f"ended by {name}", EXIT_SIGTERM
    except KeyboardInterrupt:
        message, code = "interrupted", EXIT_SIGINT
    except Exception as error:
        message, code = f"bug: {type(error).__name__}: {error}", EXIT_BUG
        traceback.print_exc()
    if args.debug and code != EXIT_BUG:
        traceback.print_exc()
    say(f"ray_batch: {message}")
    return code


def run(args: argparse.Namespace) -> int:
    if args.replicas is not None:
        args.set.append(f"parallel.data={args.replicas}")
    settings = settings_from(args)
    setup_cli_logging("debug" if args.debug else "info", settings.job.log_format)
    check_job(settings)
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("ray is not installed", hint="pip install 'tprt[ray]'")
    from tprt.cli.launch import check_start
    from tprt.cli.ranks import ending_together
    from tprt.distributed.verdict import Limits
    from tprt.job.ray_job import RayJob
    from tprt.job.summary import print_summary

    tensor, replicas = settings.parallel.tensor or 1, settings.parallel.data
    check_start(settings, tensor)
    address = args.address or os.environ.get("RAY_ADDRESS") or "local"
    start = _connect(settings, address, tensor, replicas, args.cpus_per_replica)
    _take_signals()
    job = make_job(settings, tensor * replicas, tensor, args.restart)
    with ending_together(Limits(), args.debug) as ending:
        attempt = RayJob(job, start)
        ending.before_end.append(attempt.failed)
        report = attempt.run(None)
        if report.first_error:
            logger.warning(
                "first of %d failed records: %s", report.summary.failed, report.first_error
            )
        print_summary(report.summary, job.log_format)
        return report.exit_code


def _connect(
    settings: Settings, address: str, tensor: int, replicas: int, cpus: float | None
) -> Any:
    """Join or start Ray; what makes the actor of a replica.

    Raises:
        ConfigError: there is no such cluster, or this host cannot hold the replicas.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    import tprt
    from tprt.job.ray_replica import ReplicaActor

    local = address == "local"
    cores = len(os.sched_getaffinity(0))
    if cpus is None:
        cpus = max(tensor, cores // replicas) if local else tensor
    known: dict[str, Any] = {"address": address, "logging_level": "warning"}
    if local:
        # Room beside the replicas, whatever they take, for what Ray itself may want to run.
        known |= {
            "num_cpus": max(cores, math.ceil(cpus * replicas) + 1),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    else:
        known["runtime_env"] = {"py_modules": [str(Path(tprt.__file__).parent)]}
    try:
        ray.init(**known)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"Ray at {address!r} cannot be reached or started: {str(error).splitlines()[0]}",
            hint="ask ray status there; a cluster with a token needs RAY_AUTH_MODE=token here",
        ) from error
    gpus = int(ray.cluster_resources().get("GPU", 0))
    device = settings.model.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda" and gpus < tensor * replicas:
        told = (
            f"{replicas} replicas of {tensor} ranks need {tensor * replicas} GPUs, Ray has {gpus}"
        )
        if local:
            raise ConfigError(told, hint="fewer --replicas, or --device cpu")
        logger.warning("%s; the rest wait until it has more", told)
    wanted = {"num_cpus": cpus, "num_gpus": tensor if device == "cuda" else 0}
    threads = None if device == "cuda" else max(1, int(cpus) // tensor)
    llm = _llm(settings, device)
    # Restarts are the pool's business: it knows what was in flight.
    actor = ray.remote(max_restarts=0, max_task_retries=0, **wanted)(ReplicaActor)
    logger.info("%d replicas of %d ranks (%s) on Ray at %s", replicas, tensor, device, address)
    return lambda number: actor.remote(number, tensor, llm, threads)


def _llm(settings: Settings, device: str) -> dict[str, Any]:
    """The arguments of ``LLM``, as they hold in another folder."""
    options = {"model": settings.model.path, **llm_options(settings.model)}
    options |= vars(settings.engine_config())
    for name in ("model", "tokenizer", "record_path"):
        if options[name] and Path(options[name]).exists():
            options[name] = str(Path(options[name]).resolve())
    return options | {"device": None if device == "cuda" else device}


def _take_signals() -> None:
    """After ``ray.init``, which has handlers of its own."""

    def raise_it(number: int, _: object) -> None:
        raise Terminated(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, raise_it)


if __name__ == "__main__":
    sys.exit(main())
