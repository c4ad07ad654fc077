"""``tprt doctor``: is this machine fit for ranks? Looks at it, tries the collectives, says what to do.

Each check is a probe of ``doctor_probes``; here they are put in order, told, and turned into an exit
code. What is printed holds no credentials, no user names, and ``~`` for the home directory.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tprt.cli.common import add_model_flags, add_settings_flags, settings_from
from tprt.cli.doctor_probes import disk, gpu, machine, network
from tprt.cli.doctor_probes.check import Check, hide, look
from tprt.cli.settings import Settings
from tprt.errors import EXIT_OK, ConfigError, OutputError, PeerLost, TprtError
from tprt.host_limits import usable_cpus

if TYPE_CHECKING:
    from tprt.cli.doctor_probes.ranks import Outcome

RANKS_WITHOUT_GPUS = 2
# Of what fails; all else is a matter of configuration.
EXIT_CODES = {"ranks": PeerLost.exit_code, "disk": OutputError.exit_code}
SHOWN_CASE = "all_reduce bfloat16 x 4096"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="what this machine has, whether its ranks can talk, and a report to paste",
        description="Look at software, CPU, memory, GPUs, network and disk, start ranks that run "
        "collectives on known values, and say what to do about what is wrong. Ends with a report for "
        "a bug tracker, without credentials and user names. Under torchrun its ranks are tested. "
        "Exit code 0: nothing failed; 6: the ranks failed; 5: the folder cannot be written to; 2: "
        "something else is missing.",
    )
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="ranks to start (the number of GPUs, else 2)"
    )
    parser.add_argument(
        "--dir", default=".", metavar="PATH", help="folder whose disk is measured (this one)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_flags(parser, "device")
    add_settings_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    settings = settings_from(args)
    folder = Path(args.dir)
    if not folder.is_dir():
        raise ConfigError(f"--dir {args.dir!r} is no folder", hint="a folder that outputs go to")
    launched = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not launched:
        ranks = partial(_ranks_here, args.nproc, settings)
        checks = _told(_probes(folder), ranks, args.json)
        return _finish(checks, args.json)
    with _joined(args.nproc, settings) as outcome:
        code = PeerLost.exit_code if outcome.failures else EXIT_OK
        if int(os.environ["RANK"]) == 0:
            checks = _told(_probes(folder), lambda: _ranks_check(outcome), args.json)
            code = _finish(checks, args.json)
    if outcome.stuck:  # threads hang in collectives, which an orderly end would wait for
        sys.stdout.flush()
        os._exit(code)
    return code


def _probes(folder: Path) -> dict[str, Callable[[], Check]]:
    """In the order in which they are told; the disk is not measured beside anything else."""
    return {
        "versions": machine.versions,
        "torch": machine.torch_build,
        "system": machine.system,
        "cpu": machine.cpu,
        "memory": machine.memory,
        "shm": lambda: machine.shared_memory(gpu.count_gpus()),
        "limits": machine.limits,
        "environment": machine.environment,
        "gpus": gpu.gpus,
        "network": network.network,
        "disk": partial(disk.disk, folder),
    }


def _told(
    probes: dict[str, Callable[[], Check]], ranks: Callable[[], Check], silent: bool
) -> list[Check]:
    """All checks, each told as soon as it is known; that of the ranks comes last."""
    checks: list[Check] = []
    for name, probe in probes.items():
        checks.append(look(name, probe))
        if not silent:
            print(_line(checks[-1]), flush=True)
    checks.append(ranks())
    if not silent:
        print(_line(checks[-1]), flush=True)
    return checks


def _line(check: Check) -> str:
    lines = [f"{check.status:<4}  {check.name:<11}  {check.found}"]
    return hide("\n".join([*lines, *(f"      -> {sentence}" for sentence in check.advice)]))


def _finish(checks: list[Check], as_json: bool) -> int:
    code = exit_code(checks)
    if as_json:
        told = {"exit_code": code, "checks": [check.to_json() for check in checks]}
        print(json.dumps(hide(told), indent=1), flush=True)
    else:
        print(report(checks), flush=True)
    return code


def exit_code(checks: list[Check]) -> int:
    """0 unless a check failed; that of the ranks decides before others."""
    failed = [check.name for check in reversed(checks) if check.failures]
    return EXIT_CODES.get(failed[0], ConfigError.exit_code) if failed else EXIT_OK


def report(checks: list[Check]) -> str:
    """A fenced block for a bug tracker."""
    counts = {s: sum(check.status == s for check in checks) for s in ("ok", "warn", "fail")}
    lines = ["tprt doctor: " + ", ".join(f"{count} {status}" for status, count in counts.items())]
    for check in checks:
        mark = "" if check.status == "ok" else f"[{check.status}] "
        lines.append(f"{mark}{check.name}: {check.found}")
        lines += [f"  -> {sentence}" for sentence in check.advice]
        lines += [f"  {line}" for line in check.details]
    text = hide("\n".join(lines)).replace("```", "'''")
    return f"\nTo paste into a report:\n\n```text\n{text}\n```"


# ---------------------------------------------------------------- the ranks


def _device(settings: Settings) -> str | None:
    return None if settings.model.device == "auto" else settings.model.device


def _ranks_here(nproc: int | None, settings: Settings) -> Check:
    try:
        from tprt.cli.doctor_probes.ranks import start_ranks
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return Check("ranks", "not tested", failures=[f"install torch, which failed with {said}"])
    device = _device(settings)
    gpus = 0 if device == "cpu" else gpu.count_gpus()
    size = nproc or settings.parallel.world_size or gpus or RANKS_WITHOUT_GPUS
    if gpus and size > gpus:
        raise ConfigError(
            f"{size} ranks, but there are {gpus} GPUs", hint=f"--nproc {gpus}, or --device cpu"
        )
    try:
        return _ranks_check(start_ranks(size, device, settings.engine.step_timeout))
    except TprtError as error:
        return Check("ranks", "could not be started", failures=[error.one_line])


def _joined(nproc: int | None, settings: Settings) -> AbstractContextManager["Outcome"]:
    from tprt.cli.doctor_probes.ranks import joined_ranks

    wanted, launched = nproc or settings.parallel.world_size, int(os.environ["WORLD_SIZE"])
    if wanted not in (None, launched):
        raise ConfigError(
            f"{wanted} ranks are asked for, but {launched} were started", hint="leave --nproc out"
        )
    return joined_ranks(_device(settings), settings.engine.step_timeout)


def _ranks_check(outcome: "Outcome") -> Check:
    size, us = outcome.size, outcome.microseconds
    told = ("backend", "device", "versions", "us")
    each = {rank: {key: a[key] for key in told} for rank, a in outcome.answers.items()}
    facts = {"size": size, "us": us, "ranks": each, "said": outcome.said}
    if outcome.failures:
        found = f"{len(outcome.answers)} of {size} ranks ended the test"
        details = [line[:200] for line in outcome.said]
        return Check("ranks", found, failures=outcome.failures, details=details, facts=facts)
    first = outcome.answers[0]
    hosts = len({answer["host"] for answer in outcome.answers.values()})
    found = f"{size} on {first['device']}"
    if size == 1:
        return Check(
            "ranks", f"{found}: nothing to sum; --nproc 2 --device cpu tests gloo", facts=facts
        )
    found += f" over {first['backend']}" + (f" on {hosts} hosts" if hosts > 1 else "")
    found += (
        f": {len(us)} collectives right to the bit, {SHOWN_CASE} in {us.get(SHOWN_CASE, 0):.0f} us"
    )
    warnings = []
    cpus = usable_cpus()
    if first["device"] == "cpu" and hosts == 1 and size > cpus:
        warnings.append(f"{size} ranks share {cpus} CPUs: start no more than {cpus} here")
    return Check("ranks", found, warnings, details=_times(us), facts=facts)


def _times(us: dict[str, float]) -> list[str]:
    """Microseconds on the slowest rank: a line per collective and dtype, by elements."""
    rows: dict[str, list[str]] = {}
    for name, value in us.items():
        what, _, elements = name.partition(" x ")
        rows.setdefault(what, []).append(f"{elements}: {value:.0f}")
    return [f"{what} us by elements  {', '.join(row)}" for what, row in rows.items()]
