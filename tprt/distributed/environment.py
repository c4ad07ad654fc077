"""Environment variables: what a launcher tells its ranks in them, and setting some for a while."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tprt.errors import FINAL_CODES
from tprt.faults import ATTEMPT_VARIABLES

# How many new starts of its ranks a launcher was asked for: torch's, ours.
MAX_RESTARTS_VARIABLES = ("TORCHELASTIC_MAX_RESTARTS", "TPRT_MAX_RESTARTS")


def launch_attempt() -> int:
    """How often the launcher, torch's or ours, has started these ranks before."""
    return _sum(ATTEMPT_VARIABLES)


def max_restarts() -> int:
    """How often the launcher was asked to start these ranks again; 0 without a launcher."""
    return _sum(MAX_RESTARTS_VARIABLES)


def restarts_left(code: int) -> int:
    """How often the launcher may still start these ranks, after they have ended with ``code``."""
    return 0 if code in FINAL_CODES else max(0, max_restarts() - launch_attempt())


def _sum(names: tuple[str, ...]) -> int:
    return sum(int(os.environ.get(name, "0")) for name in names)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Variables that torch or a child reads; what was there before is back afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
