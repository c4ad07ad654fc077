"""Kernels of window attention against their plain body; in the interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from test_triton_recurrence import segments

from tprt.cache.slot_cache import WindowSpec
from tprt.errors import ConfigError
from tprt.kernels.reference import rotate
from tprt.kernels.triton_ops import window
from tprt.kernels.triton_ops.window import window_attend
from tprt.kernels.window import window_attention
from tprt.layers.rotary import RotaryAngles
from tprt.layers.window_attention import split_window_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS = 8
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2}


def run_both(passes, heads: int, dim: int, keys: int, dtype: torch.dtype) -> None:
    """The same passes through both bodies, each with a ring of its own, full of NaN at first."""
    shape = (SLOTS, 2, WindowSpec(dim, keys).ring, dim)
    mine = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    theirs, scale = mine.clone(), dim**-0.5
    rotary = RotaryAngles(dim // 2, 10000.0, DEVICE)
    generator = torch.Generator().manual_seed(1)
    for rows, decode in passes:
        seg = segments(rows, decode)
        qkv = torch.randn(len(seg.positions), heads + 2, dim, generator=generator).to(DEVICE, dtype)
        cos, sin = rotary(seg.positions)
        turned = rotate(qkv[:, :-1], cos, sin)
        expected = window_attention(
            turned[:, :-1], turned[:, -1], qkv[:, -1], theirs, seg, keys, scale
        )
        found = window_attend(qkv, cos, sin, mine, seg, keys, scale)
        assert (found.float() - expected.float()).abs().max() < TOLERANCE[dtype]
        assert torch.equal(mine.isnan(), theirs.isnan())
        kept = (mine - theirs).float().nan_to_num(0.0)
        assert kept.abs().max() < TOLERANCE[dtype], "what is kept"


def growing(starts: dict[int, int], passes: list[tuple[int, ...]], steps: int) -> list:
    """Passes of so many tokens for each slot, then decode steps."""
    at, found = dict(starts), []
    for counts in passes:
        rows = [(slot, at[slot], n) for slot, n in zip(at, counts, strict=True)]
        found.append((rows, False))
        at = {slot: p + n for slot, p, n in rows}
    for _ in range(steps):
        found.append(([(slot, p, 1) for slot, p in at.items()], True))
        at = {slot: p + 1 for slot, p in at.items()}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [(10, 16), (1, 32), (16, 64)])
def test_a_window_of_17(heads, dim, dtype):
    """Shorter, as long as and longer than the window; chunks past the ring; steps over its end."""
    passes = growing({2: 0, 5: 0, 0: 0}, [(3, 17, 40), (1, 20, 1), (14, 1, 33)], 4)
    run_both(passes, heads, dim, 17, dtype)


def test_a_ring_of_several_parts():
    """As many keys as to need two partial results, a place each side of their border written."""
    passes = growing({1: 0, 3: 0}, [(200, 127), (57, 1)], 3)
    run_both(passes, 4, 16, 130, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ring_that_no_tile_divides(dtype):
    """48 places, of which tiles of 32 and of 64 cover more."""
    run_both(growing({2: 0, 5: 0}, [(40, 3), (1, 45)], 3), 4, 16, 40, dtype)


def test_other_widths_of_heads_are_refused_with_a_way_out():
    with pytest.raises(ConfigError, match="heads are 24 wide") as caught:
        run_both(growing({1: 0}, [(3,)], 1), 2, 24, 17, torch.float32)
    assert "engine.kernels=reference" in str(caught.value.hint)


def test_the_first_token():
    run_both(growing({4: 0}, [], 3), 4, 16, 17, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "keys"), [(10, 17), (3, 200), (16, 130)])
def test_partial_results_take_what_is_planned(heads, keys, dtype, monkeypatch):
    """Of a decode step of five rows: all it allocates in float32."""
    spec, taken = WindowSpec(16, keys), []

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *shape, **options):
            made = torch.empty(*shape, **options)
            taken.append((made.nbytes, len(shape)))
            return made

    class NotRun:
        def __getitem__(self, grid):
            return lambda *_, **__: None

    monkeypatch.setattr(window, "torch", Torch())
    for kernel in ("_step_kernel", "_merge_kernel"):
        monkeypatch.setattr(window, kernel, NotRun())
    ((rows, _),) = growing(dict.fromkeys(range(5), 3), [], 1)
    qkv = torch.empty(5, heads + 2, 16, dtype=dtype, device=DEVICE)
    kv = torch.empty(SLOTS, 2, spec.ring, 16, dtype=dtype, device=DEVICE)
    angles = torch.empty(5, 1, 8, device=DEVICE)
    window_attend(qkv, angles, angles, kv, segments(rows, True), keys, 1.0)
    partial = sum(count for count, dims in taken if dims == 4)  # the result has three
    assert partial == split_window_bytes(5, spec, heads, dtype)
