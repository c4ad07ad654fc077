"""The table of faults: what is done to a running job, and what must come of it. Plain values.

``test_faults.py`` runs the cases, docs/reliability.md shows what was measured. A rank is made to fail
from within (``TPRT_FAULT``, see tprt/faults.py), or held at a place and then hit from outside.
"""

import signal
from dataclasses import dataclass

STEP_TIMEOUT, LOAD_TIMEOUT = 4, 5  # seconds, in cases that wait for them
LONG_TIMEOUT = 60  # in all others, so that nothing else can end the job
DEATH_LIMIT, STALL_LIMIT, SIGNAL_LIMIT = 3.0, 10.0, 5.0  # seconds; of a stall beyond its deadline
LAUNCHER = -1  # as a target, and as the rank of a failure that is no rank's
ANY_RANK = -2  # as the rank of a failure

# Where a rank is: (rank, phase) -> the fault point, and which time it is reached. With the records of
# ``test_faults.FLAGS`` some of them are finished at the 30th decode step.
PLACES = {
    (0, "load"): "load:{}:rank=0,hit=3",
    (1, "load"): "load:{}:rank=1,hit=3",
    (0, "prefill"): "prefill:{}:rank=0,hit=2",
    (1, "prefill"): "prefill:{}:rank=1,hit=2",
    (0, "decode"): "decode:{}:rank=0,hit=30",
    (1, "decode"): "decode:{}:rank=1,hit=30",
    (0, "write"): "output.write:{}:rank=0",
    (1, "write"): "call.write:{}:rank=1",
}
PHASES = ("load", "prefill", "decode", "write")


@dataclass(frozen=True)
class Case:
    """One fault.

    Args:
        name: of the fault, for people.
        phase, rank: what is hit where; ``rank`` may be LAUNCHER.
        fault: for TPRT_FAULT.
        hit_with: a signal from outside, once ``fault`` has been reached; None where it does it all.
        kinds: of the first-error record, any of them.
        code: of the job.
        named: rank of the first-error record; None is ``rank``, ANY_RANK if either may be.
        deadline: seconds after which it can be noticed at the earliest.
        limit: seconds from then to the end of the last process.
        launcher: "nproc" or "torchrun".
        runs: in the long run.
        detectors: of ``Watch.ALL``; without them it is not noticed, or not for what it is.
    """

    name: str
    phase: str
    rank: int
    fault: str
    kinds: frozenset[str]
    code: int
    hit_with: signal.Signals | None = None
    named: int | None = None
    deadline: float = 0.0
    limit: float = DEATH_LIMIT
    launcher: str = "nproc"
    runs: int = 2
    detectors: frozenset[str] = frozenset()

    @property
    def id(self) -> str:
        what = self.name.replace(" ", "-")
        return f"{what}-{self.phase}-{self.target.replace(' ', '')}-{self.launcher}".replace(
            ",", ""
        )

    @property
    def target(self) -> str:
        return "launcher" if self.rank == LAUNCHER else f"rank {self.rank}"

    @property
    def named_rank(self) -> int:
        return self.rank if self.named is None else self.named

    @property
    def waits(self) -> bool:
        return self.deadline > 0

    @property
    def is_signal(self) -> bool:
        return self.code in (130, 143)


# name: action, kinds, code, whether only a deadline shows it, detector
INNER = {
    "exception": ("raise", {"exception"}, 6, False, ()),
    "kill -9": ("kill", {"killed"}, 6, False, ("death",)),
    # A launcher collects ranks that end, so sometimes nobody can read any more how one did.
    "segmentation fault": ("segv", {"died", "killed"}, 6, False, ("death",)),
    "exit 0": ("exit", {"exited", "killed"}, 6, False, ("death",)),
    "out of memory": ("memory", {"exception"}, 8, False, ()),
    "SIGSTOP": ("stop", {"stopped"}, 6, True, ("silence",)),
    "sleep": ("sleep", {"stalled"}, 6, True, ("stall",)),
}
MAIN = {"exception", "kill -9", "SIGSTOP", "sleep"}  # measured most often, in decode
SIGNALS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}


def _inner(name: str, phase: str, rank: int, launcher: str = "nproc") -> Case:
    action, kinds, code, waits, detectors = INNER[name]
    slow = phase in ("load", "write") and action == "sleep"
    deadline = (LOAD_TIMEOUT if slow else STEP_TIMEOUT) * waits
    return Case(
        name,
        phase,
        rank,
        PLACES[rank, phase].format(action),
        frozenset(kinds),
        code,
        deadline=deadline,
        limit=STALL_LIMIT if waits else DEATH_LIMIT,
        launcher=launcher,
        runs=20 if name in MAIN and phase == "decode" and launcher == "nproc" else 3,
        detectors=frozenset(detectors),
    )


def _sequence(action: str, phase: str, rank: int) -> Case:
    """A rank that leaves out one collective of a step, or enters one more than the others."""
    name = {"skip": "collective left out", "extra": "collective too many"}[action]
    # Seven all-reduces a step. In both steps all that follow have the same size, and steps of this kind
    # have been seen whole before.
    hit = {"prefill": 174, "decode": 150}[phase]
    return Case(
        name,
        phase,
        rank,
        f"collective:{action}:rank={rank},hit={hit},detail=all_reduce",
        frozenset({"mismatch"}),
        7,
        deadline=STEP_TIMEOUT,
        limit=STALL_LIMIT,
        runs=3,
        detectors=frozenset({"deadlock"}),
    )


def _other_size(rank: int) -> Case:
    """As before, but the next all-reduce is of fewer rows: gloo ends the rank that gets too much."""
    return Case(
        "collective of another size",
        "prefill",
        rank,
        f"collective:extra:rank={rank},hit=171,detail=all_reduce",
        frozenset({"died", "killed"}),
        6,
        named=ANY_RANK,
        runs=3,
        detectors=frozenset({"death"}),
    )


def _launcher_killed(phase: str, launcher: str) -> Case:
    held = 0 if phase == "write" else 1
    return Case(
        "kill -9",
        phase,
        LAUNCHER,
        PLACES[held, phase].format("sleep"),
        frozenset({"launcher"}),
        6,
        hit_with=signal.SIGKILL,
        launcher=launcher,
        runs=10 if phase == "decode" else 3,
        detectors=frozenset({"launcher", "store"}),
    )


def _interrupt(number: signal.Signals, phase: str, target: int, launcher: str = "nproc") -> Case:
    held = 0 if phase == "write" else 1
    return Case(
        number.name,
        phase,
        target,
        PLACES[held, phase].format("sleep"),
        frozenset({"interrupted"}),
        SIGNALS[number],
        hit_with=number,
        limit=SIGNAL_LIMIT,
        launcher=launcher,
    )


def _killed_while_rank_0_writes() -> Case:
    """Rank 0 is in the midst of the output, not in any collective."""
    held = PLACES[0, "write"].format("sleep")
    return Case(
        "kill -9, rank 0 busy",
        "write",
        1,
        held,
        frozenset({"killed"}),
        6,
        hit_with=signal.SIGKILL,
        runs=3,
        detectors=frozenset({"death"}),
    )


CASES: list[Case] = [
    *(_inner(n, phase, rank) for n in INNER for phase in PHASES for rank in (0, 1)),
    *(_inner(n, "decode", rank, "torchrun") for n in INNER for rank in (0, 1)),
    *(_sequence(a, p, r) for a in ("skip", "extra") for p in ("prefill", "decode") for r in (0, 1)),
    *(_other_size(rank) for rank in (0, 1)),
    _killed_while_rank_0_writes(),
    *(_launcher_killed(phase, how) for phase in PHASES for how in ("nproc", "torchrun")),
    *(_interrupt(n, p, t) for n in SIGNALS for p in PHASES for t in (LAUNCHER, 0, 1)),
    *(_interrupt(n, "decode", LAUNCHER, "torchrun") for n in SIGNALS),
]

# What every change is tested with: each fault, all phases, both ranks, and not for long.
IN_CI = {
    "exception-prefill-rank0-nproc",
    "kill--9-load-rank1-nproc",
    "kill--9-write-rank0-nproc",
    "segmentation-fault-prefill-rank1-nproc",
    "exit-0-decode-rank0-torchrun",
    "out-of-memory-load-rank1-nproc",
    "SIGSTOP-decode-rank1-nproc",
    "sleep-write-rank0-nproc",
    "collective-left-out-decode-rank0-nproc",
    "collective-too-many-decode-rank1-nproc",
    "kill--9-decode-launcher-nproc",
    "kill--9-load-launcher-torchrun",
    "SIGTERM-decode-launcher-nproc",
    "SIGUSR1-write-rank0-nproc",
    "SIGINT-prefill-rank1-nproc",
}
