"""Digests of what a rank is about to compute, to be compared with those of its peers.

Every rank hashes the record it got and what it resolved from its own state: token ids, positions and
block-table rows. Knows whole numbers only.
"""

import torch

from tprt.errors import RankMismatch
from tprt.kernels.noise import GOLDEN, MIX_1, MIX_2, signed

FIELDS = ("record", "token ids", "positions", "block tables")

_GOLDEN, _MIX_1, _MIX_2 = signed(GOLDEN), signed(MIX_1), signed(MIX_2)


def digest(checksum: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
    """int64 [1 + len(parts)]: ``checksum`` [1] and a hash of each int64 tensor, order included."""
    flat = [part.flatten() for part in parts]
    words = torch.cat(flat)
    # The index starts anew in each part, so that a part's digest does not depend on the others.
    index = torch.cat([torch.arange(len(f), device=words.device) for f in flat])
    words = (words ^ ((index + 1) * _GOLDEN)) * _MIX_1
    words = (words ^ (words >> 32)) * _MIX_2
    words = words ^ (words >> 29)
    sums = [part.sum() for part in torch.split(words, [len(f) for f in flat])]
    return torch.cat([checksum, torch.stack(sums)])


def check_digests(step: int, digests: torch.Tensor) -> None:
    """Compare int64 [ranks, len(FIELDS)] on the host.

    Raises:
        RankMismatch: naming the step, the field and both values.
    """
    first, *others = digests.tolist()
    for rank, other in enumerate(others, start=1):
        for name, mine, theirs in zip(FIELDS, first, other, strict=True):
            if mine != theirs:
                raise RankMismatch(
                    f"ranks 0 and {rank} disagree on the {name} of step {step}: "
                    f"{mine & (2**64 - 1):016x} and {theirs & (2**64 - 1):016x}",
                    hint="no token of this step was delivered; memory or network of one rank is at "
                    "fault, or its code differs. Start again; replay the record file if there is one",
                )
