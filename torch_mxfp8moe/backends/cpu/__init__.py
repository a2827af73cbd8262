"""The C++ kernels of ``csrc/cpu``.

CPU tensors reach them straight from PyTorch's dispatcher, without Python, and come to Python only with arguments that
the C++ kernel does not take, for the error message or another backend. What is served from here is ``preshuffle`` and
``quantize_preshuffle``, whose permutations :mod:`torch_mxfp8moe.layouts` holds.
"""

import math
from collections.abc import Sequence

import torch

from ... import extension
from ...arguments import Call, FusedMoe, Preshuffle, QuantizePreshuffle
from ...formats import BLOCK, SCALE_ONE, as_bytes
from ...layouts import ROW_MAJOR, Permutation
from .. import Backend


def _scatter(source: torch.Tensor, permutation: Permutation, shape: tuple[int, int, int], gate_up: bool, out) -> None:
    """source [E, R, C] bytes -> its places in ``out``, which holds a permuted tensor of ``shape`` (R, C or more)."""
    experts, source_rows, source_columns = source.shape
    if experts == 0:
        return
    rows, columns, run = permutation.offsets(shape)
    if shape[1] != source_rows:  # gate_up: each half of the rows was padded
        assert gate_up
        rows = rows.unflatten(1, (2, -1))[:, :, : source_rows // 2].reshape(experts, source_rows)
    if source_columns % run:  # the columns were padded: shorter runs, that end where the source does
        piece = math.gcd(run, source_columns)
        columns, run = (columns.unsqueeze(1) + torch.arange(0, run, piece)).flatten(), piece
    columns = columns[: source_columns // run]
    torch.ops.mxfp8moe._scatter_rows(source.view(-1, source_columns), rows.reshape(-1), columns, out)


def _arrange(
    call: Preshuffle | QuantizePreshuffle, source: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> None:
    """source: weight [N, R, C] and scale [N, R, C/32], bytes of N experts in checkpoint order -> the part of the call's
    outputs that is theirs."""
    (weight, scale), (out_weight, out_scale) = source, outputs
    layout, shape, gate_up = call.arrangement, (weight.shape[0], *call.weight_shape[1:]), call.gate_up
    scale_shape = (*shape[:2], layout.padded_scale_columns(shape[2]))
    if out_weight.numel() != weight.numel():
        out_weight.zero_()
    if out_scale.numel() != scale.numel():
        out_scale.fill_(SCALE_ONE)
    _scatter(weight, layout.weight[gate_up], shape, gate_up, out_weight)
    _scatter(scale, layout.scale[gate_up], scale_shape, gate_up, out_scale)


class Cpu(Backend):
    name = "cpu"
    priority = 100
    description = "C++ kernels for CPU tensors"

    def why_unavailable(self) -> str | None:
        if extension.MODULE is not None:
            extension.MODULE.capability()  # raises if MXFP8MOE_CPU_CAPABILITY names none of this processor's
        return extension.WHY_MISSING

    def why_not(self, call: Call) -> str | None:
        if call.device.type != "cpu":
            return f"the tensors are on {call.device}, not on the CPU"
        if isinstance(call, FusedMoe) and call.layout != "row_major":
            return f"it reads weights in layout 'row_major', not '{call.layout}'"
        return None

    def preshuffle(self, call: Preshuffle) -> None:
        source = call.weight.view(torch.uint8), as_bytes(call.scale)
        _arrange(call, source, [out.view(torch.uint8) for out in call.outputs])

    def quantize_preshuffle(self, call: QuantizePreshuffle) -> None:
        quantize, x = torch.ops.mxfp8moe.quantize_1x32.out, call.by_halves
        options = dict(scale_rounding=call.scale_rounding)
        out_weight, out_scale = (out.view(torch.uint8) for out in call.outputs)
        if call.arrangement is ROW_MAJOR and call.weight_shape == tuple(call.source_shape):  # nothing moves
            out_data, out_scale = (out.unflatten(1, x.shape[1:3]) for out in (out_weight, out_scale))
            quantize(x, **options, out_data=out_data.view(torch.float8_e4m3fn), out_scale=out_scale)
            return
        # An expert at a time through the same memory: new memory takes as long as the work does.
        data = torch.empty(x.shape[1:], dtype=torch.float8_e4m3fn, device=call.device)
        scale = torch.empty((*data.shape[:2], data.shape[2] // BLOCK), dtype=torch.uint8, device=call.device)
        quantized = [part.view(torch.uint8).flatten(0, 1).unsqueeze(0) for part in (data, scale)]
        out_scale = out_scale.view(call.scale_matrix)
        for of_expert, *outputs in zip(x, out_weight, out_scale):
            quantize(of_expert, **options, out_data=data, out_scale=scale)
            _arrange(call, quantized, outputs)

    def _reached_from_python(self, call: Call):
        raise RuntimeError(
            f"{call.op}: the C++ kernel refused arguments that Python accepts; please report this call: {call}"
        )

    quantize_1x32 = dequantize_1x32 = fused_moe = _reached_from_python


BACKEND = Cpu()
