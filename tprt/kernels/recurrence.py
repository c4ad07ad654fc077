"""Plain-torch bodies of recurrent layers: causal convolution, gates, linear recurrence.

Formulas: De et al., "Griffin" (2024), section 2.4, with the reset and the order of taps of the reference
code. Legend: T tokens of all sequences, B sequences, S slots, W channels of this rank, H heads of this
rank, K taps. Knows tensors only.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tprt.batch import Segments

Scan = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
TILE = 64  # steps of the tiled scan that are done one after the other


class RecurrenceWeights(NamedTuple):
    """Of one layer on this rank.

    Args:
        conv_weight, conv_bias: [W, K], the last tap is the token's own; [W].
        gate_weight, gate_bias: [H, W / H, 2 W / H], input gate before recurrence gate, stored
            [in, out]; float32 [H, 2 W / H].
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
    width = xy.shape[1] // 2
    z, y = xy[:, :width], xy[:, width:]
    c = causal_conv(z, weights, conv, segments)  # float32 [T, W]
    heads, block, _ = weights.gate_weight.shape
    blocks = c.to(xy.dtype).view(-1, heads, block).transpose(0, 1)  # [H, T, W / H]
    gates = torch.bmm(blocks, weights.gate_weight).float() + weights.gate_bias.unsqueeze(1)
    gates = gates.sigmoid_().transpose(0, 1)  # [T, H, 2 W / H]
    log_a = gates[..., block:].reshape(-1, width) * weights.log_decay
    x = c * gates[..., :block].reshape(-1, width)
    # sqrt(1 - a^2) where a is near 1, as 1 - exp(2 log a) would lose it.
    x *= torch.sqrt(-torch.expm1(2 * log_a)).masked_fill_(segments.is_start.unsqueeze(1), 1.0)
    a = log_a.exp_()
    # A sequence's carried state enters with its first token of the pass. Replaced, not multiplied by 0,
    # at a sequence's very first: the slot may hold another's, NaN included.
    first = segments.first_rows
    carried = a[first] * state[segments.slots]
    fresh = segments.is_start[first].unsqueeze(1)
    x[first] = x[first] + carried.masked_fill_(fresh, 0.0)
    a[first] = 0.0
    h = scan(a, x)
    state.index_copy_(0, segments.slots, h[segments.last_rows])
    return (h * F.gelu(y.float(), approximate="tanh")).to(xy.dtype)


def causal_conv(
    z: torch.Tensor, weights: RecurrenceWeights, conv: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """float32 [T, W]: b + sum over k of w[:, k] z[t - K + 1 + k], zeros before a sequence's start.

    Reads the inputs of tokens before this pass from ``conv`` and leaves there those of the last ones.
    """
    taps = conv.shape[1]
    before = segments.positions[segments.first_rows].unsqueeze(1) + torch.arange(
        1 - taps, 0, device=z.device
    )  # [B, K - 1]
    earlier = conv[segments.slots.unsqueeze(1), before % taps]
    earlier = earlier.masked_fill((before < 0).unsqueeze(2), 0.0)
    ext, rows = segments.extend(earlier, z)
    weight = weights.conv_weight.float()
    c = weights.conv_bias.float() + weight[:, 0] * ext[rows]
    for k in range(1, taps):
        c.addcmul_(weight[:, k], ext[rows + k].float())
    kept = segments.tail(taps)
    conv[segments.row_slots[kept], segments.positions[kept] % taps] = z[kept]
    return c


def scan_by_step(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """h[t] = a[t] h[t - 1] + x[t] from h = 0, float32 [T, W] each; the oracle of the others."""
    h = torch.empty_like(x)
    last = torch.zeros_like(x[0])
    for t in range(len(x)):
        last = torch.addcmul(x[t], a[t], last, out=h[t])
    return h


def scan_in_tiles(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """As ``scan_by_step``, of tiles of ``TILE`` steps side by side. Overwrites both arguments.

    Products of decays may underflow to 0, which is what they are then; nothing is divided by them.
    """
    length, width = x.shape
    if length <= TILE:
        for t in range(1, length):
            x[t].addcmul_(a[t], x[t - 1])
        return x
    tiles = -(-length // TILE)
    if length % TILE:
        a, x = (F.pad(t, (0, 0, 0, tiles * TILE - length)) for t in (a, x))
    a, x = a.view(tiles, TILE, width), x.view(tiles, TILE, width)
    for t in range(1, TILE):
        x[:, t].addcmul_(a[:, t], x[:, t - 1])
        a[:, t].mul_(a[:, t - 1])
    for tile in range(1, tiles):
        x[tile].addcmul_(a[tile], x[tile - 1, -1])
    return x.view(-1, width)[:length]
