"""Fake kernels: the outputs' shapes and dtypes from the inputs', with symbolic sizes, after the same checks."""

import torch

from . import dispatch
from .arguments import Dequantize, FusedMoe, Preshuffle, Quantize, QuantizePreshuffle


def quantize_1x32(x, *, scale_rounding="rceil"):
    call = Quantize(x, scale_rounding).check()
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(call.scale_shape, dtype=torch.uint8)


def quantize_1x32_out(x, *, scale_rounding="rceil", out_data, out_scale):
    Quantize(x, scale_rounding, out_data, out_scale).check(writes_out=True)


def dequantize_1x32(data, scale, *, dtype):
    Dequantize(data, scale, dtype).check()
    return data.new_empty(data.shape, dtype=dtype)


def preshuffle(weight, scale, *, layout, gate_up, pad_to=1):
    call = Preshuffle(weight, scale, layout, gate_up, pad_to).check()
    return weight.new_empty(call.weight_shape), scale.new_empty(call.scale_shape, dtype=torch.uint8)


def preshuffle_out(weight, scale, *, layout, gate_up, pad_to=1, out_weight, out_scale):
    Preshuffle(weight, scale, layout, gate_up, pad_to, out_weight, out_scale).check(writes_out=True)


def quantize_preshuffle(x, *, scale_rounding="rceil", layout, gate_up, pad_to=1):
    call = QuantizePreshuffle(x, layout, gate_up, scale_rounding, pad_to).check()
    weight = x.new_empty(call.weight_shape, dtype=torch.float8_e4m3fn)
    return weight, x.new_empty(call.scale_shape, dtype=torch.uint8)


def quantize_preshuffle_out(x, *, scale_rounding="rceil", layout, gate_up, pad_to=1, out_weight, out_scale):
    QuantizePreshuffle(x, layout, gate_up, scale_rounding, pad_to, out_weight, out_scale).check(writes_out=True)


def fused_moe(*args, **kwargs):
    call = FusedMoe(*args, **kwargs).check()
    dispatch.known_backend(call)
    return call.hidden_states.new_empty((call.tokens, call.hidden), dtype=call.result_dtype)


def fused_moe_out(*args, **kwargs):
    dispatch.known_backend(FusedMoe(*args, **kwargs).check(writes_out=True))
