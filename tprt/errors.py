"""Errors a user can act on, and the exit codes of the command line.

Every error names the value, the limit and the way out. `assert` is for our own invariants and ends
as exit code 1. This file knows nothing else of the project.
"""


class TprtError(Exception):
    """Base of all errors meant for users.

    Args:
        what: what happened, with the offending value and the limit, one sentence.
        where: the file, rank, key or tensor concerned.
        hint: what to do about it.
    """

    exit_code = 1
    rank: int | None = None  # of the launch: that met it, where all ranks raise it

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.hint = what, where, hint

    def to_json(self) -> list[str]:
        return [type(self).__name__, self.what, self.where, self.hint]

    @staticmethod
    def from_json(raw: list[str]) -> "TprtError":
        """The error another rank met, of the same class."""
        kind, what, where, hint = raw
        known = {c.__name__: c for c in _subclasses(TprtError)}
        return known.get(kind, TprtError)(what, where=where, hint=hint)

    @property
    def one_line(self) -> str:
        """For places that hold one line of text."""
        parts = [
            self.what,
            self.where and f"where: {self.where}",
            self.hint and f"try: {self.hint}",
        ]
        return " ".join("; ".join(part for part in parts if part).split())

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  try:   {self.hint}")
        return "\n".join(lines)


def _subclasses(cls: type[TprtError]) -> list[type[TprtError]]:
    return [cls, *(c for sub in cls.__subclasses__() for c in _subclasses(sub))]


class ConfigError(TprtError):
    """A flag, a YAML value, a parameter or their combination is wrong."""

    exit_code = 2


class CheckpointError(TprtError):
    """A checkpoint is missing, damaged, hostile, or not what its names and headers say."""

    exit_code = 3


class TokenizerError(CheckpointError):
    """A tokenizer is missing, damaged, or of another model."""


class OutputError(TprtError):
    """An output file cannot be written."""

    exit_code = 5


class PeerLost(TprtError):
    """Another rank died or cannot be reached."""

    exit_code = 6


class StepTimeout(PeerLost):
    """A rank did not finish a step before its deadline."""


class RankMismatch(TprtError):
    """Ranks disagree, about their configuration at start or about a call or state later."""

    exit_code = 7


class OutOfMemoryPlan(TprtError):
    """Model, cache or request does not fit into the memory there is."""

    exit_code = 8


def out_of_memory(error: BaseException) -> OutOfMemoryPlan | None:
    """The error to show when an allocation failed in Python, on the host or on a GPU; else None.

    Looks at names and texts, so that this file needs no torch.
    """
    text = str(error)
    host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text
    if not (host or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"):
        return None
    return OutOfMemoryPlan(
        f"out of memory: {text.splitlines()[0][:200] if text else type(error).__name__}",
        hint="more ranks, a smaller engine.kv_cache_memory, max_num_seqs or max_num_batched_tokens",
    )


EXIT_OK, EXIT_BUG, EXIT_FAILED_RECORDS, EXIT_SIGINT, EXIT_SIGTERM = 0, 1, 4, 130, 143
# Codes after which the same start would end the same way, or is not wanted.
FINAL_CODES = {
    EXIT_OK,
    ConfigError.exit_code,
    CheckpointError.exit_code,
    EXIT_FAILED_RECORDS,
    OutputError.exit_code,
    EXIT_SIGINT,
    EXIT_SIGTERM,
}
