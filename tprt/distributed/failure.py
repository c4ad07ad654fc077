"""What ended the ranks: which of them was first, where, why. Plain values that travel as JSON."""

import json
from dataclasses import asdict, dataclass, field

from tprt.errors import PeerLost, RankMismatch, StepTimeout, TprtError

INTERRUPTED = "interrupted"
# Kinds whose cause lies outside of the computation: nothing can be wrong with the records in flight.
FROM_OUTSIDE = frozenset({INTERRUPTED, "launcher", "unreachable", "silent", "stopped"})
MOST_STACK_LINES = 24


@dataclass(frozen=True)
class Failure:
    """The first-error record.

    Args:
        kind: ``exception``, ``killed`` (SIGKILL), ``died`` (of another signal), ``exited`` (with a
            code, before the work was over), ``stalled``, ``stopped`` (SIGSTOP), ``silent`` (on another
            host), ``deadlock``, ``mismatch``, ``launcher``, ``unreachable`` (the store, seen from
            ``rank``) or ``interrupted``.
        rank: of the launch; -1 where no rank is at fault.
        host: name of its host.
        what, where, hint: as in ``TprtError``.
        code: exit code of every rank.
        stack: where its main thread was, as far as is known.
    """

    kind: str
    rank: int
    what: str
    code: int = PeerLost.exit_code
    host: str = ""
    phase: str = ""
    step: int = -1
    where: str = ""
    hint: str = ""
    stack: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"stack": self.stack[-MOST_STACK_LINES:]})

    @classmethod
    def from_json(cls, text: str | bytes) -> "Failure":
        return cls(**json.loads(text))

    @property
    def interrupted(self) -> bool:
        return self.kind == INTERRUPTED

    @property
    def from_outside(self) -> bool:
        return self.kind in FROM_OUTSIDE

    @property
    def place(self) -> str:
        """For people: rank, host, phase and step."""
        parts = [f"rank {self.rank}" if self.rank >= 0 else "", self.host and f"host {self.host}"]
        phase = self.phase if self.step < 0 else f"{self.phase} of step {self.step}"
        return ", ".join(filter(None, [*parts, phase, self.where]))

    def as_error(self) -> TprtError:
        """For the ranks that did not fail."""
        kind = {7: RankMismatch}.get(self.code, StepTimeout if self.kind == "stalled" else PeerLost)
        return kind(f"ended because of {self.what}", where=self.place, hint=self.hint)
