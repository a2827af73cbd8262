"""The plain-PyTorch definition as a backend: every call, every device, slow."""

import torch

from ... import reference
from ...arguments import Call, Dequantize, FusedMoe, Preshuffle, Quantize, QuantizePreshuffle
from .. import Backend


def _copy(values: tuple[torch.Tensor, torch.Tensor], outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Data and scale bytes -> where a call wants them."""
    (data, scale), (out_data, out_scale) = values, outputs
    out_data.copy_(data)
    out_scale.view(scale.dtype).copy_(scale)


class Reference(Backend):
    name = "reference"
    priority = 0
    description = "plain PyTorch, the definition; any device, slow"

    def why_unavailable(self) -> str | None:
        return None

    def why_not(self, call: Call) -> str | None:
        return None

    def quantize_1x32(self, call: Quantize) -> None:
        _copy(reference.quantize_1x32(call.x, call.scale_rounding), call.outputs)

    def dequantize_1x32(self, call: Dequantize):
        return reference.dequantize_1x32(call.data, call.scale, call.dtype)

    def preshuffle(self, call: Preshuffle) -> None:
        options = dict(layout=call.layout, gate_up=call.gate_up, pad_to=call.pad_to)
        _copy(reference.preshuffle(call.weight, call.scale, **options), call.outputs)

    def quantize_preshuffle(self, call: QuantizePreshuffle) -> None:
        options = dict(layout=call.layout, gate_up=call.gate_up, pad_to=call.pad_to)
        _copy(reference.quantize_preshuffle(call.x, call.scale_rounding, **options), call.outputs)

    def fused_moe(self, call: FusedMoe) -> None:
        result = reference.fused_moe(
            **call.inputs,
            swiglu_alpha=call.swiglu_alpha,
            swiglu_beta=call.swiglu_beta,
            swiglu_limit=call.swiglu_limit,
            apply_router_weight_on_input=call.apply_router_weight_on_input,
            layout=call.layout,
            activation_dtype=call.activation_dtype,
            out_dtype=call.result_dtype,
        )
        assert call.out is not None
        call.out.copy_(result)


BACKEND = Reference()
