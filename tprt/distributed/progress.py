"""What a rank is doing, as its watch and those of its peers see it. Knows no ranks and no clocks.

The main thread writes, a watch thread reads. Everything is a plain attribute that is replaced or a list
that only grows, so there is no lock, and writing costs less than a microsecond.
"""

import threading

from tprt.distributed.failure import Failure

# Phases in which a rank owes no movement: it has nothing to do.
RESTING = frozenset({"start", "idle", "done"})
# Phases of rank 0 while the others wait for a record.
OF_THE_LEADER = frozenset({"schedule", "records"})


class Progress:
    """Args:
    phase: ``start``, ``load``, ``warm-up``, ``prefill``, ``decode``, ``write``, the name of another
        call, ``idle`` or ``done``.

    Attributes:
        step: number of the record that is carried out; -1 outside steps.
        detail: more about the phase for people, as the file being read.
        moves: grows with whatever happens.
        waiting: the collective, record or device this rank waits for; empty while it works.
        trail: collectives entered since ``enter``, in order.
        group: ranks of the launch that step together with this one, the leader first.
        thread: that works, by its identifier.
        failure: what ended the ranks, once the watch knows; raised out of waits.
        last: phase, step and detail of when it last did not rest.
        stuck: a wait was left while its collective goes on: its group cannot be destroyed in peace.
    """

    def __init__(self, phase: str = "start") -> None:
        self.phase, self.step, self.detail = phase, -1, ""
        self.moves = 0
        self.waiting = ""
        self.kind = ""
        self.trail: list[str] = []
        self.usual: dict[str, list[str]] = {}  # trail of a whole step of each kind
        self.group: tuple[int, ...] = ()
        self._deviated, self.stuck = "", False
        self.failure: Failure | None = None
        self.last = phase, -1, ""
        self.thread = threading.main_thread().ident or 0

    def enter(self, phase: str, step: int = -1, detail: str = "", kind: str = "") -> None:
        """A phase or step begins.

        Args:
            kind: steps of one kind enter the same collectives, in the same order; empty where that is
                not so.
        """
        if self.kind:
            self._deviated = self._deviated or self._compare(whole=True)
            self.usual.setdefault(self.kind, self.trail)
        self.trail = []
        if self.phase not in RESTING:
            self.last = self.phase, self.step, self.detail
        self.phase, self.step, self.detail, self.kind = phase, step, detail, kind
        self.thread = threading.get_ident()
        self.moves += 1

    def move(self, detail: str | None = None) -> None:
        """Something got done within the phase."""
        if detail is not None:
            self.detail = detail
        self.moves += 1

    def wait_for(self, what: str, collective: bool = True) -> None:
        if collective:
            self.trail.append(what)
        self.waiting = what
        self.moves += 1

    def go_on(self) -> None:
        self.waiting = ""
        self.moves += 1

    def check(self) -> None:
        """Raise what ended the ranks, if anything has."""
        if self.failure is not None:
            raise self.failure.as_error()

    @property
    def deviates(self) -> str:
        """How the collectives of a step differed from those of others of its kind; else empty."""
        return self._deviated or self._compare(whole=False)

    def _compare(self, whole: bool) -> str:
        usual, trail = self.usual.get(self.kind), list(self.trail)
        if usual is None or not self.kind:
            return ""
        if trail == (usual if whole else usual[: len(trail)]):
            return ""
        pairs = enumerate(zip(trail, usual, strict=False))
        place = next((i for i, (one, other) in pairs if one != other), min(len(trail), len(usual)))
        here = trail[place] if place < len(trail) else "the end of the step"
        there = usual[place] if place < len(usual) else "the end of the step"
        return f"at its collective {place + 1} of step {self.step} stood {here}, usual is {there}"
