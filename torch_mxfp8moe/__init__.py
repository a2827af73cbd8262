"""Mixture-of-experts layers on MXFP8 expert weights, as PyTorch ops: ``torch.ops.mxfp8moe``.

>>> data, scale = torch_mxfp8moe.quantize_1x32(weight)
>>> out = torch_mxfp8moe.fused_moe(hidden_states, w1, w1_scale, w2, w2_scale, topk_weights, topk_ids)
>>> print(torch_mxfp8moe.explain(hidden_states, w1, w1_scale, w2, w2_scale, topk_weights, topk_ids))
"""

from . import reference
from .dispatch import BackendStatus, Explanation, backends
from .layouts import LAYOUTS
from .ops import dequantize_1x32, explain, fused_moe, preshuffle, quantize_1x32, warmup

__version__ = "0.1.0"

__all__ = [
    "LAYOUTS",
    "BackendStatus",
    "Explanation",
    "backends",
    "dequantize_1x32",
    "explain",
    "fused_moe",
    "preshuffle",
    "quantize_1x32",
    "reference",
    "warmup",
]
