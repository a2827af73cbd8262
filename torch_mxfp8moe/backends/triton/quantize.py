"""``quantize_1x32`` and ``dequantize_1x32``."""

import torch
import triton
import triton.language as tl

from ...arguments import Dequantize, Quantize
from ...formats import as_bytes
from .launch import Launch
from .numerics import BLOCK, block_amax, cast, decode, encode, factor, scale_byte

BLOCKS_PER_PROGRAM = 64


@triton.jit(do_not_specialize=["blocks", "row_blocks"])
def quantize_kernel(
    x, data, scale, blocks: "i64", row_blocks: "i64", row_stride: "i64", ROUNDING: tl.constexpr, N: tl.constexpr
):
    """x, rows of ``row_blocks`` blocks ``row_stride`` elements apart -> data, scale, contiguous; N blocks a program."""
    block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    within = block < blocks
    column = tl.arange(0, BLOCK)
    start = block // row_blocks * row_stride + block % row_blocks * BLOCK
    values = cast(tl.load(x + start[:, None] + column[None, :], mask=within[:, None], other=0.0), tl.float32)
    byte = scale_byte(block_amax(values), ROUNDING)
    code = encode(values, byte[:, None])
    tl.store(data + block[:, None] * BLOCK + column[None, :], code.to(tl.uint8), mask=within[:, None])
    tl.store(scale + block, byte.to(tl.uint8), mask=within)


@triton.jit(do_not_specialize=["blocks", "row_blocks"])
def dequantize_kernel(
    data, scale, out, blocks: "i64", row_blocks: "i64", data_stride: "i64", scale_stride: "i64", N: tl.constexpr
):
    """The inverse; data and scale rows are ``data_stride`` and ``scale_stride`` elements apart."""
    block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    within = block < blocks
    column = tl.arange(0, BLOCK)
    row, first = block // row_blocks, block % row_blocks
    start = row * data_stride + first * BLOCK
    code = tl.load(data + start[:, None] + column[None, :], mask=within[:, None], other=0).to(tl.int32)
    byte = tl.load(scale + row * scale_stride + first, mask=within, other=0).to(tl.int32)
    value = decode(code) * factor(byte)[:, None]
    tl.store(out + block[:, None] * BLOCK + column[None, :], cast(value, out.dtype.element_ty), mask=within[:, None])


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., C] as rows that one stride describes: a view, or a copy of a tensor that no single stride describes."""
    return x.reshape(-1, x.shape[-1])


def quantize(call: Quantize) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor]]:
    """What computes a call, and its outputs: data [..., C] e4m3fn, scale [..., C/32] uint8."""
    data = torch.empty(call.x.shape, dtype=torch.float8_e4m3fn, device=call.device)
    scale = torch.empty(call.scale_shape, dtype=torch.uint8, device=call.device)
    if scale.numel() == 0:
        return [], (data, scale)
    x = _rows(call.x)
    launch = Launch(
        quantize_kernel,
        (triton.cdiv(scale.numel(), BLOCKS_PER_PROGRAM),),
        dict(
            x=x, data=data.view(torch.uint8), scale=scale, blocks=scale.numel(), row_blocks=x.shape[1] // BLOCK.value,
            row_stride=x.stride(0), ROUNDING=call.scale_rounding, N=BLOCKS_PER_PROGRAM,
        ),
    )  # fmt: skip
    return [launch], (data, scale)


def dequantize(call: Dequantize) -> tuple[list[Launch], torch.Tensor]:
    """What computes a call, and its output [..., C]."""
    out = torch.empty(call.data.shape, dtype=call.dtype, device=call.device)
    if out.numel() == 0:
        return [], out
    data, scale = _rows(call.data.view(torch.uint8)), _rows(as_bytes(call.scale))
    launch = Launch(
        dequantize_kernel,
        (triton.cdiv(scale.numel(), BLOCKS_PER_PROGRAM),),
        dict(
            data=data, scale=scale, out=out, blocks=scale.numel(), row_blocks=scale.shape[1],
            data_stride=data.stride(0), scale_stride=scale.stride(0), N=BLOCKS_PER_PROGRAM,
        ),
    )  # fmt: skip
    return [launch], out
