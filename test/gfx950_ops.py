"""The package's ops on gfx950, in the simulator: the launches of the Triton backend, on memory where only the inputs of
a call hold anything."""

import torch
from gfx950_simulator import launch

from torch_mxfp8moe.arguments import FusedMoe, Preshuffle, Quantize, QuantizePreshuffle
from torch_mxfp8moe.backends.triton import fused_moe as fused_moe_launches
from torch_mxfp8moe.backends.triton import preshuffle as preshuffle_launches
from torch_mxfp8moe.backends.triton import quantize as quantize_launches
from torch_mxfp8moe.backends.triton.targets import Target

TARGET = Target("gfx950")
CPU = torch.device("cpu")


def run(plan, inputs: dict, outputs: dict, texts: dict[int, str] | None = None) -> None:
    """Execute a plan; texts: assembly to execute instead of what launch i compiles to."""
    launch.simulate(plan.bind(inputs | outputs, CPU), TARGET, inputs.values(), texts=texts)


def quantize_1x32(x: torch.Tensor, scale_rounding: str, texts=None) -> tuple[torch.Tensor, torch.Tensor]:
    call = Quantize(x, scale_rounding).check()
    data, scale = torch.empty(x.shape, dtype=torch.float8_e4m3fn), torch.empty(call.scale_shape, dtype=torch.uint8)
    rows = quantize_launches.rows(x, quantize_launches.STRIDES)
    run(quantize_launches.quantize(rows, scale_rounding), dict(x=rows), dict(data=data, scale=scale), texts)
    return data, scale


def dequantize_1x32(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(data.shape, dtype=dtype)
    run(quantize_launches.dequantize(data, scale, dtype), dict(data=data, scale=scale), dict(out=out))
    return out


def preshuffle(call: Preshuffle) -> None:
    inputs, outputs = ({name: getattr(call, prefix + name) for name in ("weight", "scale")} for prefix in ("", "out_"))
    run(preshuffle_launches.preshuffle(call), inputs, {f"out_{name}": x for name, x in outputs.items()})


def quantize_preshuffle(call: QuantizePreshuffle, texts=None) -> None:
    outputs = dict(out_weight=call.out_weight, out_scale=call.out_scale)
    run(preshuffle_launches.quantize_preshuffle(call), dict(x=call.x), outputs, texts)


def moe_call(inputs: dict, out_dtype: torch.dtype | None = None, **options) -> FusedMoe:
    x = inputs["hidden_states"]
    dtype = out_dtype or (torch.bfloat16 if "hidden_states_scale" in inputs else x.dtype)
    return FusedMoe(**inputs, **options, out=torch.empty(x.shape, dtype=dtype)).check()


def fused_moe(call: FusedMoe, tiles=None, texts=None) -> torch.Tensor:
    """tiles: instead of the configured ones."""
    run(fused_moe_launches.plan(call, TARGET, tiles), call.inputs, dict(out=call.out), texts)
    return call.out


def bound_launches(call: FusedMoe, tiles=None) -> list:
    """The launches of a call, on its tensors, which may be on ``meta``."""
    return fused_moe_launches.plan(call, TARGET, tiles).bind(call.inputs | {"out": call.out}, call.device)
