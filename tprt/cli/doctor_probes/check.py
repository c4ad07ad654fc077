"""What a probe found, and how it is told without giving anything away.

Knows no machine: probes make checks, the command prints them.
"""

import getpass
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]
GIB, MIB = 2**30, 2**20
MASK = "***"
PROBE_SECONDS = 60.0

# Names of variables whose values are nobody's business.
_SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|COOKIE|PRIVATE|(API|ACCESS)_?KEY|_KEY$|_PAT$",
    re.IGNORECASE,
)
_TOKENS = re.compile(
    r"\b(hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AIza|eyJ[\w-]+\.)[\w.-]{8,}"
    r"|\bA[KS]IA[0-9A-Z]{12,}"
)
_CREDENTIALS = re.compile(r"(\w+://)[^/\s@]+@")  # of https://user:password@host
# Long, without a separator, of letters and digits: no setting looks so.
_RANDOM = re.compile(r"\b(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9+]{24,}={0,2}")
_HOMES = re.compile(r"/(home|Users)/[^/\s:'\",]+")


@dataclass(frozen=True)
class Check:
    """One part of the machine, looked at.

    Args:
        name: of the part.
        found: facts in one line.
        warnings, failures: sentences that say what to do.
        details: further lines of facts for the report.
        facts: the same for programs, JSON-able.
    """

    name: str
    found: str
    warnings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        return "fail" if self.failures else "warn" if self.warnings else "ok"

    @property
    def advice(self) -> list[str]:
        return [*self.failures, *self.warnings]

    def to_json(self) -> dict[str, Any]:
        told = {"name": self.name, "status": self.status, "found": self.found}
        return told | {"advice": self.advice, "facts": self.facts}


def look(name: str, probe: Callable[[], Check], limit: float = PROBE_SECONDS) -> Check:
    """What a probe returns, or a warning where it raises or does not end: the others may still tell.

    Args:
        limit: seconds. A driver or a network disk that is gone can hold a call for ever.
    """
    found: list[Check] = []

    def run() -> None:
        try:
            found.append(probe())
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            found.append(Check(name, f"could not be looked at: {said}", ["please report this"]))

    thread = threading.Thread(target=run, name=f"doctor-{name}", daemon=True)
    thread.start()
    thread.join(limit)
    if found:
        return found[0]
    return Check(
        name, f"no answer within {limit:g} s", [f"find out what holds it: {name} is stuck"]
    )


def size(count: float) -> str:
    """Bytes for people."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def hide(value: Any) -> Any:
    """``value`` without credentials, user names and the path of the home directory; deep."""
    if isinstance(value, dict):
        return {hide(key): hide(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide(item) for item in value]
    if not isinstance(value, str):
        return value
    text = _CREDENTIALS.sub(rf"\1{MASK}@", _TOKENS.sub(MASK, value))
    home = os.path.expanduser("~")
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    text = _HOMES.sub(rf"/\1/{MASK}", text)
    user = _user()
    if len(user) > 2 and user != "root":  # which is a word, too
        text = re.sub(rf"(?<![^\W_]){re.escape(user)}(?![^\W_])", MASK, text)
    return text


def shown_variable(name: str, value: str) -> str:
    """The value of an environment variable, or a mask where it may be a secret."""
    if _SECRET_NAME.search(name) or _RANDOM.search(value):
        return MASK
    return str(hide(value))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user that has no name
        return ""
