"""Kinds of values that settings have: sizes, shards, paths with variables, and their limits.

Texts are brought into one form here and refused with a sentence that begins with ``must be`` or goes
on after the value. Which settings there are is not known here.
"""

import os
import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tprt.config import DTYPE_ALIASES
from tprt.sampling_params import MAX_SEED

MAX_SIZE, MAX_MEMORY = 2**31 - 1, 2**50

_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)([kKmMgG])")
_SHARD = re.compile(r"(\d{1,6})/(\d{1,6})")
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def parse_size(value: object) -> object:
    """``16K`` is 16 * 1024, ``2k`` is 2 * 1000, as in vLLM; what is no such text passes unchanged.

    Raises:
        ValueError: text that is no size, or no whole number (``0.5K`` has a binary suffix).
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if not match:
        raise ValueError("must be a whole number or a size such as 16K (16384) or 2k (2000)")
    number, unit = match.groups()
    step = 1024 if unit.isupper() else 1000
    power = "kmg".index(unit.lower()) + 1
    digits, _, decimals = number.partition(".")
    if decimals and unit.isupper():
        raise ValueError("has decimals before a binary unit; 1.5k is 1500, 1536 is 1.5 * 1024")
    whole, rest = divmod(int(digits + decimals) * step**power, 10 ** len(decimals))
    if rest:
        raise ValueError("is not a whole number")
    return whole


def expand_variables(value: object) -> object:
    """``${NAME}`` in a path becomes the environment variable.

    Raises:
        ValueError: the variable is unset or empty, or there is a NUL in the path.
    """
    if not isinstance(value, str):
        return value
    if "\0" in value:
        raise ValueError("contains NUL")

    def replacement(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if not found:  # an empty one would turn ${DIR}/x into /x
            raise ValueError(f"needs the environment variable {match[1]}, which is not set")
        return found

    return _VARIABLE.sub(replacement, value)


def parse_shard(value: object) -> str:
    """``i/N``, part i of N counted from 0, without leading zeros.

    Raises:
        ValueError: another text, or i is not below N.
    """
    match = _SHARD.fullmatch(value.strip()) if isinstance(value, str) else None
    if not match:
        raise ValueError("must be i/N, part i of N counted from 0, such as 2/8")
    index, count = map(int, match.groups())
    if not index < count:
        last = f"0/{count} to {count - 1}/{count}" if count else "i/N with N from 1"
        raise ValueError(f"must be {last}, as parts are counted from 0")
    return f"{index}/{count}"


def _dtype(value: object) -> object:
    return DTYPE_ALIASES.get(value, value) if isinstance(value, str) else value


Dtype = Annotated[Literal["bfloat16", "float32", "float16"], BeforeValidator(_dtype)]
ExpandedPath = Annotated[str, BeforeValidator(expand_variables)]
Size = Annotated[int, BeforeValidator(parse_size), Field(ge=1, le=MAX_SIZE)]
Memory = Annotated[int, BeforeValidator(parse_size), Field(ge=1, le=MAX_MEMORY)]
Share = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(gt=0, lt=1e9)]
Seed = Annotated[int, Field(ge=-MAX_SEED, le=MAX_SEED)]
Shard = Annotated[str, BeforeValidator(parse_shard)]
