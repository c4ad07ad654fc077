"""Plain-torch bodies of recurrent layers: causal convolution, gates, linear recurrence.

Formulas: De et al., "Griffin" (2024), section 2.4, with the reset and the order of taps of the reference
code. Legend: T tokens of all sequences, B sequences, S slots, W channels of this rank, H heads of this
rank, K taps. Knows tensors only.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tprt.batch import Segments

Lengths = tuple[int, ...] | None
Scan = Callable[[torch.Tensor, torch.Tensor, Lengths], torch.Tensor]
TILE = 32  # steps of the tiled scan that are done one after the other


class RecurrenceWeights(NamedTuple):
    """Of one layer on this rank.

    Args:
        conv_weight, conv_bias: [W, K], the last tap is the token's own; [W].
        gate_weight, gate_bias: [H, W / H, 2 W / H], input gate before recurrence gate, stored
            [in, out], in the dtype in which it is multiplied; float32 [H, 2 W / H].
        log_decay: float32 [W], -8 softplus of the layer's parameter: log of the smallest decay.
    """

    conv_weight: torch.Tensor
    conv_bias: torch.Tensor
    gate_weight: torch.Tensor
    gate_bias: torch.Tensor
    log_decay: torch.Tensor


def recurrence(
    xy: torch.Tensor,
    weights: RecurrenceWeights,
    state: torch.Tensor,
    conv: torch.Tensor,
    segments: Segments,
    scan: Scan,
) -> torch.Tensor:
    """One recurrent layer between its projections; ``state`` and ``conv`` move on by the tokens.

    Args:
        xy: [T, 2 W], what is convolved and, behind it, the branch that gates the result.
        state: float32 [S, W]. conv: [S, K, W] as ``RecurrentCache.conv``.

    Returns:
        [T, W]: h * gelu(y), in the dtype of ``xy``.
    """
    z, y = xy.chunk(2, dim=1)
    c = causal_conv(z, weights, conv, segments)  # float32 [T, W]
    heads, block, _ = weights.gate_weight.shape
    of_heads = c.view(-1, heads, block)
    blocks = of_heads.to(weights.gate_weight.dtype).transpose(0, 1)  # [H, T, W / H]
    bias = weights.gate_bias.unsqueeze(1)
    if blocks.dtype == torch.float32:
        gates = torch.baddbmm(bias, blocks, weights.gate_weight)
    else:
        gates = torch.bmm(blocks, weights.gate_weight).float() + bias
    gates = gates.sigmoid_().transpose(0, 1)  # [T, H, 2 W / H]
    # In place from here on: of a long prompt new tensors take longer than the arithmetic.
    log_a = gates[..., block:].reshape(c.shape).mul_(weights.log_decay)
    of_heads.mul_(gates[..., :block])
    x = c
    # sqrt(1 - a^2) where a is near 1, as 1 - exp(2 log a) would lose it.
    start = segments.once("start", lambda: segments.is_start.unsqueeze(1))
    x.mul_((2 * log_a).expm1_().neg_().sqrt_().masked_fill_(start, 1.0))
    a = log_a.exp_()
    if segments.starts is None:
        h = x.addcmul_(a, state.index_select(0, segments.slots).masked_fill_(start, 0.0))
        state.index_copy_(0, segments.slots, h)
        return F.gelu(y.float(), approximate="tanh").mul_(h).to(xy.dtype)
    # A sequence's carried state enters with its first token of the pass. Replaced, not multiplied by 0,
    # at a sequence's very first: the slot may hold another's, NaN included.
    first = segments.first_rows
    carried = a[first] * state[segments.slots]
    fresh = segments.is_start[first].unsqueeze(1)
    x[first] = x[first] + carried.masked_fill_(fresh, 0.0)
    a.index_fill_(0, first, 0.0)  # to assign a number would copy it from the host
    h = scan(a, x, segments.query_lens)
    state.index_copy_(0, segments.slots, h[segments.last_rows])
    return F.gelu(y.float(), approximate="tanh").mul_(h).to(xy.dtype)


def causal_conv(
    z: torch.Tensor, weights: RecurrenceWeights, conv: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """float32 [T, W]: b + sum over k of w[:, k] z[t - K + 1 + k], zeros before a sequence's start.

    Reads the inputs of tokens before this pass from ``conv`` and leaves there those of the last ones.
    """
    taps, weight = conv.shape[1], weights.conv_weight.float()
    if segments.starts is None:
        last, own, missing = segments.once(("taps", taps), lambda: _last_places(segments, taps))
        places = conv.view(-1, z.shape[1])
        places.index_copy_(0, own, z)
        inputs = places.index_select(0, last).view(-1, taps, z.shape[1]).masked_fill_(missing, 0.0)
        return (inputs * weight.t()).sum(1).add_(weights.conv_bias)
    before = segments.positions[segments.first_rows].unsqueeze(1) + torch.arange(
        1 - taps, 0, device=z.device
    )  # [B, K - 1]
    earlier = conv[segments.slots.unsqueeze(1), before % taps]
    earlier = earlier.masked_fill((before < 0).unsqueeze(2), 0.0)
    ext, rows = segments.extend(earlier, z)
    ext = ext.float()

    def inputs_at(k: int) -> torch.Tensor:
        return ext[k : k + len(z)] if rows is None else ext[rows + k]

    c = weights.conv_bias.float() + weight[:, 0] * inputs_at(0)
    for k in range(1, taps):
        c.addcmul_(weight[:, k], inputs_at(k))
    kept = segments.tail(taps)
    conv[segments.row_slots[kept], segments.positions[kept] % taps] = z[kept]
    return c


def _last_places(segments: Segments, count: int) -> tuple[torch.Tensor, ...]:
    """Where rings of ``count`` places have the last inputs of a decode step's sequences.

    Returns:
        int64 [B * count], rows of all places of all slots, a sequence's own input last; those of the own
        ones, int64 [B]; and bool [B, count, 1] where the sequence has not been so long.
    """
    device = segments.positions.device
    at = segments.positions.unsqueeze(1) + torch.arange(1 - count, 1, device=device)
    rows = segments.slots.unsqueeze(1) * count + at % count
    return rows.flatten(), rows[:, -1], (at < 0).unsqueeze(2)


def scan_by_step(a: torch.Tensor, x: torch.Tensor, lengths: Lengths = None) -> torch.Tensor:
    """h[t] = a[t] h[t - 1] + x[t] from h = 0, float32 [T, W] each; the oracle of the others.

    Args:
        lengths: of the sequences that lie one behind the other; None for a single one. What one of
            them holds, NaN included, is not seen by another.
    """
    h = torch.empty_like(x)
    for part in _parts(lengths or (len(x),)):
        last = torch.zeros_like(x[0])
        for t in range(part.start, part.stop):
            last = torch.addcmul(x[t], a[t], last, out=h[t])
    return h


def scan_in_tiles(a: torch.Tensor, x: torch.Tensor, lengths: Lengths = None) -> torch.Tensor:
    """As ``scan_by_step``, of tiles of ``TILE`` steps side by side. Overwrites both arguments.

    Products of decays may underflow to 0, which is what they are then; nothing is divided by them.
    """
    lengths, width = lengths or (len(x),), x.shape[1]
    steps = min(TILE, max(lengths))
    packed = len(lengths) == 1 and len(x) % steps == 0
    if not packed:
        rows, tokens = _tiles(lengths, steps, x.device)
        a, x = a[rows], x[rows]
    a, x = a.view(-1, steps, width), x.view(-1, steps, width)
    # Views are made once: of small tensors they cost as much as the arithmetic.
    of_a, of_x = a.unbind(1), x.unbind(1)
    for t in range(1, steps):
        of_x[t].addcmul_(of_a[t], of_x[t - 1])
        of_a[t].mul_(of_a[t - 1])
    of_a, of_x, ends, tile = a.unbind(), x.unbind(), of_x[-1].unbind(), 0
    for length in lengths:
        end = tile - (-length // steps)
        for later in range(tile + 1, end):
            of_x[later].addcmul_(of_a[later], ends[later - 1])
        tile = end
    x = x.view(-1, width)
    return x if packed else x[tokens]


def _parts(lengths: tuple[int, ...]) -> Iterator[slice]:
    return (slice(end - n, end) for end, n in zip(accumulate(lengths), lengths, strict=True))


@lru_cache(maxsize=4)  # every layer of a pass asks for the same
def _tiles(
    lengths: tuple[int, ...], steps: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of T tokens as whole tiles of each sequence, its last row filling up the last one.

    Returns:
        int64 [tiles * steps], and int64 [T], where in it each row is.
    """
    rows, tokens, first = [], [], 0
    for part in _parts(lengths):
        count = part.stop - part.start
        filled = -(-count // steps) * steps
        rows.append(torch.arange(filled).clamp_(max=count - 1) + part.start)
        tokens.append(torch.arange(count) + first)
        first += filled
    return torch.cat(rows).to(device), torch.cat(tokens).to(device)
