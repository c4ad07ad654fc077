"""The recurrent layers' inner part: causal convolution, gates, RG-LRU. Cut by heads; reduces nothing."""

import torch
from torch import nn

from tprt.batch import ForwardBatch
from tprt.cache.slot_cache import RecurrentCache, RecurrentSpec
from tprt.distributed.sharding import padded_cut
from tprt.distributed.tp_group import TPGroup
from tprt.kernels import RecurrenceWeights, kernels_for
from tprt.layers.linear import sharded_parameter

DECAY = -8.0  # a constant of the architecture


class CausalConv1d(nn.Module):
    """Weight and bias of a depthwise convolution over time, [width, 1, taps] on disk."""

    def __init__(self, width: int, taps: int, part: int, tp: TPGroup, dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = (padded_cut(s, 0, tp.rank, part) for s in ((width, 1, taps), (width,)))
        self.weight = sharded_parameter(weight, dtype, tp.device)
        self.bias = sharded_parameter(bias, dtype, tp.device)


class RGLRU(nn.Module):
    """Parameters of a real-gated linear recurrent unit; a block of each gate for every head.

    Args:
        width, heads: of the whole model. part: heads of this rank, those past the end being zeros.
    """

    def __init__(self, width: int, heads: int, part: int, tp: TPGroup, dtype: torch.dtype) -> None:
        super().__init__()
        block = width // heads

        def parameter(shape: tuple[int, ...], rows: int) -> nn.Parameter:
            return sharded_parameter(padded_cut(shape, 0, tp.rank, rows), dtype, tp.device)

        self.recurrent_param = parameter((width,), part * block)
        self.input_gate_weight = parameter((heads, block, block), part)
        self.input_gate_bias = parameter((heads, block), part)
        self.recurrent_gate_weight = parameter((heads, block, block), part)
        self.recurrent_gate_bias = parameter((heads, block), part)


class Recurrence(nn.Module):
    """What lies between the projections of a recurrent layer; parameters are those of its two parts."""

    def __init__(self, conv: CausalConv1d, rg_lru: RGLRU, tp: TPGroup) -> None:
        super().__init__()
        # In a tuple: attributes of their own would give the parameters a second name.
        self.parts = conv, rg_lru
        self.kernels = kernels_for(tp.device)
        self.width, _, self.taps = conv.weight.shape
        self.prepared: RecurrenceWeights | None = None

    def finish_loading(self) -> None:
        """After the weights are in: lay them out for the kernel, which reads no others."""
        self.prepared = self.kernels.pack_recurrence(self._prepare())
        for part in self.parts:
            for name in [name for name, _ in part.named_parameters()]:
                delattr(part, name)

    def _prepare(self) -> RecurrenceWeights:
        conv, unit = self.parts
        gates = torch.cat([unit.input_gate_weight, unit.recurrent_gate_weight], dim=2)
        biases = torch.cat([unit.input_gate_bias, unit.recurrent_gate_bias], dim=1)
        # In float32 from here on: in bfloat16 every decay above 0.998 would be 1, and stay.
        decay = DECAY * torch.nn.functional.softplus(unit.recurrent_param.float())
        return RecurrenceWeights(
            conv.weight.squeeze(1), conv.bias.clone(), gates, biases.float(), decay
        )

    def cache_spec(self) -> RecurrentSpec:
        return RecurrentSpec(self.width, self.taps)

    def forward(self, xy: torch.Tensor, batch: ForwardBatch, cache: RecurrentCache) -> torch.Tensor:
        """[T, 2 * width], what is convolved before what gates the result -> [T, width]."""
        weights = self.prepared or self._prepare()
        return self.kernels.recurrence(xy, weights, cache.state, cache.conv, batch.segments)
