"""Places where a test can make a process fail, by ``TPRT_FAULT`` in the environment.

    TPRT_FAULT=POINT:ACTION[:KEY=VALUE,...][;...]

for example ``decode:kill:rank=1,hit=5``: the fifth time that rank 1 comes to ``decode`` it kills itself.
Without the variable, read when this file is imported, a fault point is a call that does nothing. Knows
nothing else of the project.
"""

import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

VARIABLE = "TPRT_FAULT"
# How often torch's launcher, and ours, have started this rank's launch before.
ATTEMPT_VARIABLES = ("TORCHELASTIC_RESTART_COUNT", "TPRT_RESTART_COUNT")


class InjectedFault(RuntimeError):
    """What the action ``raise`` raises."""


@dataclass
class Fault:
    """One planted fault.

    Args:
        point: of ``fault_point``.
        action: ``raise``, ``memory`` (an allocation that fails), ``kill``, ``segv``, ``abort``, ``stop``
            (SIGSTOP), ``sleep`` (``seconds``, an hour unless told), ``exit`` (with 0, no clean-up), or a
            word that only the caller can carry out: ``skip`` or ``extra`` of a collective.
        options: ``rank`` (of the world; all unless told), ``hit`` (which time, from 1; 1 unless told),
            ``attempt`` (of the launcher, from 0), ``detail`` (what the caller says beside the point),
            ``seconds``.
    """

    point: str
    action: str
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Fault":
        point, action, *rest = text.strip().split(":", 2)
        pairs = [pair.partition("=") for pair in "".join(rest).split(",") if pair]
        return cls(point, action, {key.strip(): value for key, _, value in pairs})

    def concerns(self, point: str, detail: str) -> bool:
        here = {
            "rank": os.environ.get("RANK", "0"),
            "attempt": str(sum(int(os.environ.get(name, "0")) for name in ATTEMPT_VARIABLES)),
            "detail": detail,
        }
        return point == self.point and all(
            self.options.get(key, value) == value for key, value in here.items()
        )

    def happen(self) -> str:
        said = f"injected fault: {self.action} at {self.point}"
        print(f"[rank {os.environ.get('RANK', '0')}] {said}", file=sys.stderr, flush=True)
        match self.action:
            case "raise":
                raise InjectedFault(said)
            case "memory":
                raise MemoryError(said)
            case "kill" | "segv" | "abort" | "stop":
                name = {"stop": "SIGSTOP", "abort": "SIGABRT"}.get(
                    self.action, f"SIG{self.action.upper()}"
                )
                os.kill(os.getpid(), signal.Signals[name])
            case "sleep":
                time.sleep(float(self.options.get("seconds", "3600")))
            case "exit":
                os._exit(0)
            case other:
                return other
        return ""


_FAULTS = [Fault.parse(text) for text in os.environ.get(VARIABLE, "").split(";") if text.strip()]
_hits: Counter[int] = Counter()


def _nothing(point: str, detail: str = "") -> str:
    return ""


def _look(point: str, detail: str = "") -> str:
    for number, fault in enumerate(_FAULTS):
        if fault.concerns(point, detail):
            _hits[number] += 1
            if _hits[number] == int(fault.options.get("hit", "1")):
                return fault.happen()
    return ""


# ``fault_point(point, detail="")``: what the caller is to do, empty for nothing.
fault_point = _look if _FAULTS else _nothing
