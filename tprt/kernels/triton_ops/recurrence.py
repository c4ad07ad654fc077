"""Recurrent layers: one kernel for a decode step, convolution and scan as kernels for prompts.

A decode step streams the gates' matrices, which are most of its bytes: a program has a tile of one
head's channels for up to 16 rows, and computes the convolution of the whole head anew, since that is
all the gates of its tile ask for. The place where a token's input is kept is never one that the token
reads, so programs of a head need not wait for each other.

A scan goes over a prompt in tiles of steps, from registers to registers: within a tile as a parallel
scan, from tile to tile through the last state, in float32. Products of decays may underflow; nothing is
divided by them.

Formulas are those of ``kernels.recurrence``. Legend: T tokens, B sequences, S slots, W channels,
H heads, K taps, b channels of a head.
"""

import torch
import triton
import triton.language as tl

from tprt.batch import Segments
from tprt.kernels.recurrence import RecurrenceWeights
from tprt.kernels.triton_ops.numerics import dot, gelu, round_to, sigmoid
from tprt.kernels.triton_ops.pdl import pdl_launch_dependents, pdl_options, pdl_wait

ROWS = 16  # of a step, at least: what a matrix product takes
# Of a program of a step, by bytes of a weight: columns of the gates' matrices, and their rows at a time;
# a product of float32 has all it reads in registers.
STEP_COLUMNS, STEP_INNER = {2: 64, 4: 16}, {2: 256, 4: 32}
SCAN_COLUMNS, SCAN_STEPS = 32, 32  # of a program of a scan, and of one of its tiles


def recurrence(
    xy: torch.Tensor,
    weights: RecurrenceWeights,
    state: torch.Tensor,
    conv: torch.Tensor,
    segments: Segments,
) -> torch.Tensor:
    """See ``kernels.recurrence.recurrence``."""
    if segments.starts is None:
        return _step(xy, weights, state, conv, segments)
    return _prompt(xy, weights, state, conv, segments)


def _step(
    xy: torch.Tensor,
    weights: RecurrenceWeights,
    state: torch.Tensor,
    conv: torch.Tensor,
    segments: Segments,
) -> torch.Tensor:
    rows, width = len(xy), state.shape[1]
    heads, block, _ = weights.gate_weight.shape
    padded = max(16, triton.next_power_of_2(block))
    columns = min(STEP_COLUMNS[xy.itemsize], padded)
    out = torch.empty(rows, width, dtype=xy.dtype, device=xy.device)
    grid = (triton.cdiv(block, columns), heads, triton.cdiv(rows, ROWS))
    _step_kernel[grid](
        xy, segments.slots, segments.positions, *weights, state, conv, out,
        rows, width, xy.stride(0),
        BLOCK=block, PADDED=padded, INNER=min(STEP_INNER[xy.itemsize], padded), COLUMNS=columns,
        TAPS=conv.shape[1], ROWS=ROWS, num_warps=4, **pdl_options(xy.device),
    )  # fmt: skip
    return out


def _prompt(
    xy: torch.Tensor,
    weights: RecurrenceWeights,
    state: torch.Tensor,
    conv: torch.Tensor,
    segments: Segments,
) -> torch.Tensor:
    tokens, width = len(xy), state.shape[1]
    heads, block, _ = weights.gate_weight.shape
    c = torch.empty(tokens, width, dtype=xy.dtype, device=xy.device)
    positions = segments.positions
    begins = positions[segments.first_rows]
    begin_of_row = begins[segments.index]
    _conv_kernel[(tokens, triton.cdiv(width, 256))](
        xy, segments.row_slots, positions, begin_of_row, weights.conv_weight, weights.conv_bias, conv, c,
        width, xy.stride(0),
        TAPS=conv.shape[1], COLUMNS=256, num_warps=4, **pdl_options(xy.device),
    )  # fmt: skip
    kept = segments.tail(conv.shape[1])
    conv[segments.row_slots[kept], positions[kept] % conv.shape[1]] = xy[kept, :width]
    gates = torch.bmm(c.view(tokens, heads, block).transpose(0, 1), weights.gate_weight)
    out = torch.empty_like(c)
    columns = min(SCAN_COLUMNS, block & -block)  # programs do not cross heads
    _scan_kernel[(len(begins), width // columns)](
        c, gates, xy, weights.gate_bias, weights.log_decay, state, out,
        segments.slots, begins, segments.first_rows, segments.last_rows,
        tokens, width, xy.stride(0),
        BLOCK=block, COLUMNS=columns, STEPS=SCAN_STEPS, num_warps=4, **pdl_options(xy.device),
    )  # fmt: skip
    return out


@triton.jit
def _one_minus_exp(y):
    """1 - exp(y) for y <= 0, exact to float32 where y is near 0 and the difference would lose it."""
    series = y * (1.0 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720))))))
    return tl.where(y > -0.25, -series, 1.0 - tl.exp(y))


@triton.jit
def _decay_and_input(c, gate_in, gate_a, log_decay, is_start):
    """a and sqrt(1 - a^2) * (c * gate); at a sequence's first token 0 and c * gate."""
    log_a = log_decay * sigmoid(gate_a)
    scale = tl.where(is_start, 1.0, tl.sqrt(_one_minus_exp(2.0 * log_a)))
    return tl.where(is_start, 0.0, tl.exp(log_a)), scale * (c * sigmoid(gate_in))


@triton.jit
def _convolve(
    xy_ptr, conv_ptr, weight_ptr, bias_ptr, rows, slots, positions, channels, mask, width, row_stride,
    TAPS: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, channels] of rows' own inputs and their earlier ones in ``conv``; the own ones."""
    z = tl.load(xy_ptr + rows[:, None] * row_stride + channels[None, :], mask=mask, other=0.0)
    weight = tl.load(weight_ptr + channels * TAPS + TAPS - 1, mask=channels < width, other=0.0)
    bias = tl.load(bias_ptr + channels, mask=channels < width, other=0.0)
    c = bias.to(tl.float32)[None, :] + weight.to(tl.float32)[None, :] * z.to(tl.float32)
    for distance in tl.static_range(1, TAPS):
        there = positions >= distance
        place = tl.where(there, positions - distance, 0) % TAPS
        at = (slots * TAPS + place)[:, None] * width + channels[None, :]
        # Replaced where there is none: the slot may hold another sequence's, NaN included.
        before = tl.load(conv_ptr + at, mask=mask & there[:, None], other=0.0).to(tl.float32)
        weight = tl.load(
            weight_ptr + channels * TAPS + TAPS - 1 - distance, mask=channels < width, other=0.0
        )
        c += weight.to(tl.float32)[None, :] * before
    return c, z


@triton.jit
def _of_head(
    xy_ptr, conv_ptr, weight_ptr, bias_ptr, rows, slots, positions, head, inner, there, width,
    row_stride, BLOCK: tl.constexpr, TAPS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """``_convolve`` of channels ``inner`` of a head, 0 past its end, rounded to what gates multiply."""
    in_head = inner < BLOCK
    c, _ = _convolve(
        xy_ptr, conv_ptr, weight_ptr, bias_ptr, rows, slots, positions, head * BLOCK + inner,
        there[:, None] & in_head[None, :], width, row_stride, TAPS,
    )  # fmt: skip
    return round_to(tl.where(in_head[None, :], c, 0.0), dtype)


@triton.jit
def _gate_weights(weight_ptr, head, inner, columns, BLOCK: tl.constexpr):
    """Rows ``inner`` and some columns of a head's matrices of both gates."""
    both = (inner < BLOCK)[:, None] & (columns < BLOCK)[None, :]
    at = weight_ptr + (head * BLOCK + inner)[:, None] * (2 * BLOCK) + columns[None, :]
    return tl.load(at, mask=both, other=0.0), tl.load(at + BLOCK, mask=both, other=0.0)


# One binary for any number of rows, and wherever slots and positions lie in what a step sends to the
# device; so too below.
@triton.jit(
    do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"]
)
def _step_kernel(
    xy_ptr, slots_ptr, positions_ptr,
    conv_weight_ptr, conv_bias_ptr, gate_weight_ptr, gate_bias_ptr, log_decay_ptr,
    state_ptr, conv_ptr, out_ptr,
    num_rows, width, row_stride,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr,
    TAPS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_launch_dependents(PDL)
    tile, head, group = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    inner = tl.arange(0, INNER)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    mine = columns < BLOCK
    # Weights first: nobody writes them, so they may be on their way before the last kernel has ended.
    input_gate, decay_gate = _gate_weights(gate_weight_ptr, head, inner, columns, BLOCK)
    biases = gate_bias_ptr + head * (2 * BLOCK) + columns
    input_bias = tl.load(biases, mask=mine, other=0.0)
    decay_bias = tl.load(biases + BLOCK, mask=mine, other=0.0)
    channels = head * BLOCK + columns
    log_decay = tl.load(log_decay_ptr + channels, mask=mine, other=0.0)
    pdl_wait(PDL)
    rows = group * ROWS + tl.arange(0, ROWS)
    there = rows < num_rows
    slots = tl.load(slots_ptr + rows, mask=there, other=0)
    positions = tl.load(positions_ptr + rows, mask=there, other=0)
    rows = rows.to(tl.int64)
    whole = _of_head(
        xy_ptr, conv_ptr, conv_weight_ptr, conv_bias_ptr, rows, slots, positions, head, inner, there,
        width, row_stride, BLOCK, TAPS, input_gate.dtype,
    )  # fmt: skip
    gate_in, gate_a = dot(whole, input_gate), dot(whole, decay_gate)
    for start in range(INNER, PADDED, INNER):
        input_gate, decay_gate = _gate_weights(gate_weight_ptr, head, start + inner, columns, BLOCK)
        whole = _of_head(
            xy_ptr, conv_ptr, conv_weight_ptr, conv_bias_ptr, rows, slots, positions, head,
            start + inner, there, width, row_stride, BLOCK, TAPS, input_gate.dtype,
        )  # fmt: skip
        gate_in += dot(whole, input_gate)
        gate_a += dot(whole, decay_gate)
    gate_in += input_bias[None, :]
    gate_a += decay_bias[None, :]
    mask = there[:, None] & mine[None, :]
    c, z = _convolve(
        xy_ptr, conv_ptr, conv_weight_ptr, conv_bias_ptr, rows, slots, positions,
        channels, mask, width, row_stride, TAPS,
    )  # fmt: skip
    is_start = (positions == 0)[:, None]
    a, x = _decay_and_input(c, gate_in, gate_a, log_decay[None, :], is_start)
    at = slots[:, None] * width + channels[None, :]
    before = tl.load(state_ptr + at, mask=mask & (positions > 0)[:, None], other=0.0)
    h = a * before + x
    y = tl.load(
        xy_ptr + rows[:, None] * row_stride + width + channels[None, :], mask=mask, other=0.0
    )
    out = round_to(h * gelu(y.to(tl.float32)), out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * width + channels[None, :], out, mask=mask)
    tl.store(state_ptr + at, h, mask=mask)
    place = (slots * TAPS + positions % TAPS)[:, None] * width + channels[None, :]
    tl.store(conv_ptr + place, z, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"])
def _conv_kernel(
    xy_ptr, slots_ptr, positions_ptr, begins_ptr, weight_ptr, bias_ptr, conv_ptr, out_ptr,
    width, row_stride,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A token of a prompt: inputs of this pass from ``xy``, earlier ones from ``conv``."""
    pdl_launch_dependents(PDL)
    pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = channels < width
    slot, position = tl.load(slots_ptr + row), tl.load(positions_ptr + row)
    here = position - tl.load(begins_ptr + row)  # tokens of the sequence before it in this pass
    c = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    for distance in tl.static_range(0, TAPS):
        # [COLUMNS], as what follows is: a scalar would be no mask everywhere.
        in_pass = inside & (here + 0 * channels >= distance)
        kept = inside & (here + 0 * channels < distance) & (position + 0 * channels >= distance)
        place = tl.where(position >= distance, position - distance, 0) % TAPS
        fresh = tl.load(xy_ptr + (row - distance) * row_stride + channels, mask=in_pass, other=0.0)
        earlier = tl.load(conv_ptr + (slot * TAPS + place) * width + channels, mask=kept, other=0.0)
        z = tl.where(in_pass, fresh, earlier).to(tl.float32)
        weight = tl.load(weight_ptr + channels * TAPS + TAPS - 1 - distance, mask=inside, other=0.0)
        c += weight.to(tl.float32) * z
    tl.store(out_ptr + row * width + channels, round_to(c, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _combine(a_1, x_1, a_2, x_2):
    return a_1 * a_2, a_2 * x_1 + x_2


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["slots_ptr"])
def _scan_kernel(
    c_ptr, gates_ptr, xy_ptr, gate_bias_ptr, log_decay_ptr, state_ptr, out_ptr,
    slots_ptr, begins_ptr, first_rows_ptr, last_rows_ptr,
    num_tokens, width, row_stride,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_launch_dependents(PDL)
    channels = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    head = (tl.program_id(1) * COLUMNS // BLOCK).to(tl.int64)
    columns = channels - head * BLOCK
    input_bias = tl.load(gate_bias_ptr + head * (2 * BLOCK) + columns)
    decay_bias = tl.load(gate_bias_ptr + head * (2 * BLOCK) + BLOCK + columns)
    log_decay = tl.load(log_decay_ptr + channels)
    pdl_wait(PDL)
    sequence = tl.program_id(0)
    slot, begin = tl.load(slots_ptr + sequence), tl.load(begins_ptr + sequence)
    first, last = tl.load(first_rows_ptr + sequence), tl.load(last_rows_ptr + sequence)
    carried = tl.load(state_ptr + slot * width + channels, mask=begin + 0 * channels > 0, other=0.0)
    steps = tl.arange(0, STEPS)
    for start in range(first, last + 1, STEPS):
        rows = start + steps
        inside = (rows <= last)[:, None]
        at = rows[:, None] * width + channels[None, :]
        c = tl.load(c_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(
            xy_ptr + rows[:, None] * row_stride + width + channels[None, :], mask=inside, other=0.0
        )
        gates = gates_ptr + (head * num_tokens + rows)[:, None] * (2 * BLOCK) + columns[None, :]
        gate_in = tl.load(gates, mask=inside, other=0.0).to(tl.float32) + input_bias[None, :]
        gate_a = tl.load(gates + BLOCK, mask=inside, other=0.0).to(tl.float32) + decay_bias[None, :]
        is_start = (begin + rows - first == 0)[:, None]
        a, x = _decay_and_input(c, gate_in, gate_a, log_decay[None, :], is_start)
        # Past the end the state stays as it is, so that the last row of a tile has it.
        a, x = tl.where(inside, a, 1.0), tl.where(inside, x, 0.0)
        product, sum_ = tl.associative_scan((a, x), 0, _combine)
        h = product * carried[None, :] + sum_
        out = round_to(h * gelu(y.to(tl.float32)), out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, out, mask=inside)
        carried = tl.sum(tl.where((steps == STEPS - 1)[:, None], h, 0.0), axis=0)
    tl.store(state_ptr + slot * width + channels, carried)
