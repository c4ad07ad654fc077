"""The operations layers call. Each has one signature; which body serves it is decided here, once.

Today every operation has its plain-torch body in ``reference``.
"""

from tprt.kernels.reference import (
    head_layer_norm,
    layer_norm,
    paged_attention,
    rotary,
    squared_relu,
    store_kv,
)

__all__ = [
    "head_layer_norm",
    "layer_norm",
    "paged_attention",
    "rotary",
    "squared_relu",
    "store_kv",
]
