"""``quantize_1x32`` and ``dequantize_1x32``."""

import torch
import triton
import triton.language as tl

from .launch import Launch, Operand, Plan
from .numerics import BLOCK, block_amax, cast, decode, encode, factor, scale_byte

BLOCKS_PER_PROGRAM = 64

STRIDES = 3
"""How many strides the rows that ``quantize`` reads may have."""


@triton.jit(do_not_specialize=["blocks", "row_blocks", "middle", "inner"])
def quantize_kernel(
    x, data, scale, blocks: "i64", row_blocks: "i64", middle: "i32", inner: "i32",
    outer_stride: "i64", middle_stride: "i64", row_stride: "i64",
    ONE_STRIDE: tl.constexpr, ROUNDING: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """x, rows of ``row_blocks`` blocks -> data, scale, contiguous; N blocks a program. The rows lie ``row_stride``
    elements apart if ONE_STRIDE; if not, they are [_, middle, inner] with a stride for each of the three."""
    block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    within = block < blocks
    column = tl.arange(0, BLOCK)
    start = block % row_blocks * BLOCK
    row = block // row_blocks
    if ONE_STRIDE:
        start += row * row_stride
    else:
        row = row.to(tl.int32)  # fewer than 2^31, and quicker to divide
        group = row // inner
        start += group // middle * outer_stride + group % middle * middle_stride + row % inner * row_stride
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


def rows(x: torch.Tensor, strides: int) -> torch.Tensor:
    """x [..., C], not empty -> its rows with 1 to ``strides`` dimensions for them: a view, or a copy with one of a
    tensor that takes more strides to describe, or several for 2^31 rows and more."""
    lead: list[list[int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if size == 1:
            continue
        if lead and lead[-1][1] == size * stride:
            lead[-1] = [lead[-1][0] * size, stride]
        else:
            lead.append([size, stride])
    columns = x.shape[-1]
    if len(lead) > strides or (len(lead) > 1 and x.numel() // columns >= 2**31):
        return x.reshape(-1, columns)
    sizes, steps = zip(*lead or [(1, columns)])
    return x.as_strided((*sizes, columns), (*steps, 1))


def quantize(x: torch.Tensor, scale_rounding: str) -> Plan:
    """x with blocks, as :func:`rows` makes it for ``STRIDES`` -> data and scale, contiguous."""
    row_blocks = x.shape[-1] // BLOCK.value
    blocks = x.numel() // BLOCK.value
    one_stride = x.dim() == 2
    _, middle, inner = (1,) * (4 - x.dim()) + x.shape[:-1]
    outer_stride, middle_stride, row_stride = (0,) * (4 - x.dim()) + x.stride()[:-1]
    arguments = dict(
        x=Operand("x", x.dtype), data=Operand("data", torch.uint8), scale=Operand("scale", torch.uint8), blocks=blocks,
        row_blocks=row_blocks, middle=middle, inner=1 if one_stride else inner, outer_stride=outer_stride,
        middle_stride=middle_stride, row_stride=row_stride, ONE_STRIDE=one_stride, ROUNDING=scale_rounding,
        N=BLOCKS_PER_PROGRAM,
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
