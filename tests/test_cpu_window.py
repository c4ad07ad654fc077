"""Single tokens over rings that are read in place, against rings that are gathered and masked."""

import pytest
import torch

from tprt.kernels.cpu_window import IN_PLACE
from tprt.kernels.window import GATHERED

SLOTS, HEADS, DIM = 9, 3, 8


def rings(keys: int, ring: int, at: dict[int, int], dtype: torch.dtype) -> torch.Tensor:
    """What sequences at these positions, by slot, left; NaN where they have not been."""
    kv = torch.full((SLOTS, 2, ring, DIM), float("nan"), dtype=dtype)
    for slot, position in at.items():
        kept = torch.arange(max(0, position - ring), position) % ring
        kv[slot, :, kept] = torch.randn(2, len(kept), DIM).to(dtype)
    return kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [[0], [8], [2, 3, 4, 5], [5, 4, 3, 2], [1, 2, 7, 8, 0, 4, 3]])
@pytest.mark.parametrize(("keys", "ring"), [(5, 8), (8, 8), (2, 8), (17, 32)])
def test_reads_what_the_gathered_body_reads(slots, keys, ring, dtype):
    """Positions of each slot below, at and past the end of the first round, in every order."""
    torch.manual_seed(0)
    around = [0, 1, keys - 1, keys, ring - 1, ring, ring + 1, 3 * ring - 1, 5 * ring + 3]
    for first in range(len(around)):
        at = {slot: around[(first + 2 * i) % len(around)] for i, slot in enumerate(slots)}
        kv, scale = rings(keys, ring, at, dtype), DIM**-0.5
        q = torch.randn(len(slots), HEADS, DIM).to(dtype)
        k, v = torch.randn(2, len(slots), DIM).to(dtype)
        found = []
        for decode in (IN_PLACE, GATHERED):
            mine = kv.clone()
            index, positions = torch.tensor(slots), torch.tensor(list(at.values()))
            plan = decode.plan(index, positions, mine, keys)
            found.append((decode.attend(q, k, v, mine, plan, scale), mine))
        (out, kept), (expected, expected_kept) = found
        assert torch.equal(kept.nan_to_num(), expected_kept.nan_to_num())
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        assert (out - expected).abs().max() < tolerance


def test_slots_that_follow_one_another_are_one_call(monkeypatch):
    """And those that have not gone round one each, of the places they see alone."""
    called = []
    usual = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, **more):
        called.append(tuple(k.shape))
        return usual(q, k, v, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    slots, positions = torch.tensor([3, 4, 5, 0, 7, 8]), torch.tensor([9, 30, 8, 8, 2, 7])
    at = dict(zip(slots.tolist(), positions.tolist(), strict=True))
    kv = rings(5, 8, at, torch.float32)
    plan = IN_PLACE.plan(slots, positions, kv, 5)
    out = IN_PLACE.attend(
        torch.randn(6, HEADS, DIM), torch.randn(6, DIM), torch.randn(6, DIM), kv, plan, 1.0
    )
    assert called == [(3, 1, 8, DIM), (1, 1, 8, DIM), (1, 1, 3, DIM), (1, 1, 5, DIM)]
    assert out.isfinite().all()


def test_padding_rows_are_one_call_and_a_ring_without_room_to_spare_needs_no_mask():
    slots, positions = torch.tensor([2, 3, 8, 8, 8]), torch.tensor([8, 21, 0, 0, 0])
    kv = rings(8, 8, {2: 8, 3: 21}, torch.float32)
    plan = IN_PLACE.plan(slots, positions, kv, 8)
    assert [(g.first, g.last, g.slots, g.mask) for g in plan.groups] == [
        (0, 2, 2, None), (2, 5, 1, None),
    ]  # fmt: skip
    q, k, v = torch.randn(5, HEADS, DIM), torch.randn(5, DIM), torch.randn(5, DIM)
    theirs = kv.clone()
    out = IN_PLACE.attend(q, k, v, kv, plan, 1.0)
    expected = GATHERED.attend(q, k, v, theirs, GATHERED.plan(slots, positions, kv, 8), 1.0)
    assert (out - expected)[:2].abs().max() < 1e-6 and out.isfinite().all()
