"""Gumbel noise that is a pure function of (seed, sample index, position, token id).

The draw of a row therefore depends on nothing else: not on the batch, not on how the vocabulary is
cut over ranks. argmax(logits / T + noise) is an exact sample of softmax(logits / T).
"""

import torch

# Stands for the next token of a row whose logits are NaN or infinite.
NON_FINITE = -1

_MASK = 2**64 - 1
# Odd constants of splitmix64 and of Stafford's mixers, as signed 64-bit numbers: torch's int64
# arithmetic wraps, Python's does not.
GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(x: int) -> int:
    x &= _MASK
    return x - 2**64 if x >= 2**63 else x


def _splitmix(x: int) -> int:
    x = (x + GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * MIX_2) & _MASK
    return x ^ (x >> 31)


def sequence_key(seed: int, index: int) -> int:
    """Signed 64-bit key of one completion: its request's seed and its index among ``n``."""
    return signed(_splitmix(_splitmix(seed & _MASK) ^ (index & _MASK)))


def arrival_seed(engine_seed: int, arrival: int) -> int:
    """The seed of a request that brought none: from the engine's seed and its arrival number."""
    return _splitmix(_splitmix(engine_seed & _MASK) + arrival) >> 1


def token_table(ids: torch.Tensor) -> torch.Tensor:
    """int64 [V]: the ids of the columns, int64 [V], spread over 64 bits."""
    return (ids + 1) * signed(GOLDEN)


def gumbel(keys: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32 [R, V].

    Args:
        keys: int64 [R] of ``sequence_key``; positions: int64 [R], of the token being drawn.
        table: int64 [V] of ``token_table``.
    """
    row = (keys ^ (positions * signed(MIX_2))) * signed(MIX_1)
    row = row ^ (row >> 32)
    x = (table ^ row.unsqueeze(1)) * signed(MIX_1)
    x = (x ^ (x >> 32)) * signed(MIX_2)
    bits = (x >> 32) + 2**31  # a uniform 32-bit number; the shift is arithmetic
    # u in (0, 1): exact where small, so that -log(1 - u), and with it the noise's upper tail, is
    # exact too. The factor keeps the largest u below 1 in float32.
    u = (bits.float() + 0.5) * ((1 - 2**-24) * 2**-32)
    return -torch.log(-torch.log1p(-u))
