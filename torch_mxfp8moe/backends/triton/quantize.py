"""``quantize_1x32`` and ``dequantize_1x32``."""

import torch
import triton
import triton.language as tl

from .launch import Launch, Operand, Plan
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


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., C] as rows that one stride describes: a view, or a copy of a tensor that no single stride describes."""
    return x.reshape(-1, x.shape[-1])


def quantize(x: torch.Tensor, scale_rounding: str) -> Plan:
    """x [R, C] with blocks -> data [R, C], scale [R, C/32]."""
    row_blocks = x.shape[1] // BLOCK.value
    blocks = x.shape[0] * row_blocks
    arguments = dict(
        x=Operand("x", x.dtype), data=Operand("data", torch.uint8), scale=Operand("scale", torch.uint8), blocks=blocks,
        row_blocks=row_blocks, row_stride=x.stride(0), ROUNDING=scale_rounding, N=BLOCKS_PER_PROGRAM,
    )  # fmt: skip
    return Plan([Launch(quantize_kernel, (triton.cdiv(blocks, BLOCKS_PER_PROGRAM),), arguments)])


def dequantize(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Plan:
    """data [R, C], scale [R, C/32] with blocks -> out [R, C] ``dtype``."""
    blocks = scale.numel()
    arguments = dict(
        data=Operand("data", torch.uint8), scale=Operand("scale", torch.uint8), out=Operand("out", dtype),
        blocks=blocks, row_blocks=scale.shape[1], data_stride=data.stride(0), scale_stride=scale.stride(0),
        N=BLOCKS_PER_PROGRAM,
    )  # fmt: skip
    return Plan([Launch(dequantize_kernel, (triton.cdiv(blocks, BLOCKS_PER_PROGRAM),), arguments)])
