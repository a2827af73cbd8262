"""Mixture-of-experts layers on MXFP8 expert weights, as PyTorch ops: ``torch.ops.mxfp8moe``.

>>> data, scale = torch_mxfp8moe.quantize_1x32(weight)
>>> out = torch_mxfp8moe.fused_moe(hidden_states, w1, w1_scale, w2, w2_scale, topk_weights, topk_ids)
>>> experts = torch_mxfp8moe.Mxfp8Experts.from_weights(gate_up_weights, down_weights)
>>> print(torch_mxfp8moe.explain(hidden_states, w1, w1_scale, w2, w2_scale, topk_weights, topk_ids))
"""

from . import reference
from .dispatch import BackendStatus, Explanation, backends
from .experts import Mxfp8Experts, SharedExpert
from .layouts import LAYOUTS
from .ops import dequantize_1x32, explain, fused_moe, preshuffle, quantize_1x32, quantize_preshuffle, warmup
from .sharding import expert_parallel_map, tensor_parallel_range

__version__ = "0.1.0"

__all__ = [
    "LAYOUTS",
    "BackendStatus",
    "Explanation",
    "Mxfp8Experts",
    "SharedExpert",
    "backends",
    "dequantize_1x32",
    "expert_parallel_map",
    "explain",
    "fused_moe",
    "preshuffle",
    "quantize_1x32",
    "quantize_preshuffle",
    "reference",
    "tensor_parallel_range",
    "warmup",
]
