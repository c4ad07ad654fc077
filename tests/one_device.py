"""Finds what brings a value from the host to the device, without a device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NUMBERS = ("aten.scalar_tensor.default", "aten.lift_fresh.default")  # a number becomes a tensor


class OneDevice(TorchDispatchMode):
    """Fails on an operation that brings a value from the host: on a GPU that would be a copy that waits.

    Assigning a number through an index is one: older versions of torch make it a tensor on the host.
    """

    def __init__(self, device):
        super().__init__()
        self.device, self.names = device, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        elsewhere = [a for a in found if a.device.type != self.device]
        number = any(name in NUMBERS for name in self.names[-2:])
        written = str(op) in ("aten.index_put_.default", "aten.copy_.default")
        assert not elsewhere and not (number and written), f"{op} takes a value from the host"
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))
