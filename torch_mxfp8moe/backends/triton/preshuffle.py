"""``preshuffle`` and ``quantize_preshuffle``: one pass over the bytes, for any layout."""

import torch
import triton
import triton.language as tl

from ...arguments import Preshuffle, QuantizePreshuffle
from ...formats import SCALE_ONE
from . import numerics
from .launch import Launch, Operand, Plan
from .memory import offset, order
from .numerics import BLOCK, block_amax, cast, encode, scale_byte

ROWS_PER_PROGRAM = 32
COLUMNS_PER_PROGRAM = 256
QUANTIZED_ROWS_PER_PROGRAM = 16
"""Of ``quantize_preshuffle``, whose values take more registers than bytes do."""


@triton.jit
def program_tile(
    OUT_ROWS: tl.constexpr, OUT_COLUMNS: tl.constexpr, HALVES: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Which part of a weight [E, OUT_ROWS, OUT_COLUMNS] a program writes -> expert, int64; rows [BLOCK_R], and for
    each its half of the HALVES and its row in there; the number of the tile along the columns."""
    row_tiles: tl.constexpr = (OUT_ROWS + BLOCK_R - 1) // BLOCK_R
    column_tiles: tl.constexpr = (OUT_COLUMNS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    expert = (pid // (row_tiles * column_tiles)).to(tl.int64)
    row = pid // column_tiles % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    return expert, row, row // (OUT_ROWS // HALVES), row % (OUT_ROWS // HALVES), pid % column_tiles


@triton.jit
def preshuffle_kernel(
    source, out, FILL: tl.constexpr, HALVES: tl.constexpr,
    SOURCE_ROWS: tl.constexpr, SOURCE_COLUMNS: tl.constexpr, OUT_ROWS: tl.constexpr, OUT_COLUMNS: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, ROWS: tl.constexpr, ROW_DIGITS: tl.constexpr, COLUMNS: tl.constexpr,
    COLUMN_DIGITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """source [E, HALVES * SOURCE_ROWS, SOURCE_COLUMNS] bytes -> their places in out, OUT_ROWS x OUT_COLUMNS an expert;
    what the source does not have is FILL. Each half of the rows is padded at its end."""
    expert, row, half, within, column_tile = program_tile(OUT_ROWS, OUT_COLUMNS, HALVES, BLOCK_R, BLOCK_C)
    column = column_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    source_row = half * SOURCE_ROWS + within
    there = (within < SOURCE_ROWS)[:, None] & (column < SOURCE_COLUMNS)[None, :]
    mask = (row < OUT_ROWS)[:, None] & (column < OUT_COLUMNS)[None, :]
    source += expert * (HALVES * SOURCE_ROWS * SOURCE_COLUMNS)
    data = tl.load(source + source_row[:, None] * SOURCE_COLUMNS + column[None, :], mask=mask & there, other=FILL)
    to = offset(row, ROWS, ROW_DIGITS)[:, None] + offset(column, COLUMNS, COLUMN_DIGITS)[None, :]
    tl.store(out + expert * EXPERT_STRIDE + to, data, mask=mask)


@triton.jit
def quantize_preshuffle_kernel(
    x, out_weight, out_scale, ROUNDING: tl.constexpr, HALVES: tl.constexpr, EXPERT_STRIDE: tl.constexpr,
    HALF_STRIDE: tl.constexpr, ROW_STRIDE: tl.constexpr, SOURCE_ROWS: tl.constexpr, SOURCE_COLUMNS: tl.constexpr,
    OUT_ROWS: tl.constexpr, OUT_COLUMNS: tl.constexpr, OUT_SCALE_COLUMNS: tl.constexpr,
    WEIGHT_EXPERT_STRIDE: tl.constexpr, WEIGHT_ROWS: tl.constexpr, WEIGHT_ROW_DIGITS: tl.constexpr,
    WEIGHT_COLUMNS: tl.constexpr, WEIGHT_COLUMN_DIGITS: tl.constexpr,
    SCALE_EXPERT_STRIDE: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_ROW_DIGITS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, SCALE_COLUMN_DIGITS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x [E, HALVES, SOURCE_ROWS, SOURCE_COLUMNS], strides as they are called -> codes, OUT_ROWS x OUT_COLUMNS an
    expert, and scale bytes, OUT_ROWS x OUT_SCALE_COLUMNS, in their places. What x does not have is 0, and the scale
    SCALE_ONE. Each half of the rows is padded at its end."""
    blocks: tl.constexpr = BLOCK_C // BLOCK
    expert, row, half, within, column_tile = program_tile(OUT_ROWS, OUT_SCALE_COLUMNS * BLOCK, HALVES, BLOCK_R, BLOCK_C)
    column = column_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    there = (row < OUT_ROWS) & (within < SOURCE_ROWS)
    start = expert * EXPERT_STRIDE + half.to(tl.int64) * HALF_STRIDE + within.to(tl.int64) * ROW_STRIDE
    mask = there[:, None] & (column < SOURCE_COLUMNS)[None, :]
    values = cast(tl.load(x + start[:, None] + column[None, :], mask=mask, other=0.0), tl.float32)
    values = tl.reshape(values, (BLOCK_R * blocks, BLOCK))
    byte = scale_byte(block_amax(values), ROUNDING)
    code = tl.reshape(encode(values, byte[:, None]).to(tl.uint8), (BLOCK_R, BLOCK_C))
    to = offset(row, WEIGHT_ROWS, WEIGHT_ROW_DIGITS)[:, None]
    to += offset(column, WEIGHT_COLUMNS, WEIGHT_COLUMN_DIGITS)[None, :]
    mask = (row < OUT_ROWS)[:, None] & (column < OUT_COLUMNS)[None, :]
    tl.store(out_weight + expert * WEIGHT_EXPERT_STRIDE + to, code, mask=mask)
    block = column_tile * blocks + tl.arange(0, blocks)
    byte = tl.reshape(byte, (BLOCK_R, blocks))
    byte = tl.where(there[:, None] & (block < SOURCE_COLUMNS // BLOCK)[None, :], byte, numerics.SCALE_ONE)
    to = offset(row, SCALE_ROWS, SCALE_ROW_DIGITS)[:, None]
    to += offset(block, SCALE_COLUMNS, SCALE_COLUMN_DIGITS)[None, :]
    mask = (row < OUT_ROWS)[:, None] & (block < OUT_SCALE_COLUMNS)[None, :]
    tl.store(out_scale + expert * SCALE_EXPERT_STRIDE + to, byte.to(tl.uint8), mask=mask)


def preshuffle(call: Preshuffle) -> Plan:
    """What writes ``call.out_weight`` and ``call.out_scale`` of a call with experts."""
    layout, experts = call.arrangement, call.weight_shape[0]
    parts = (
        ("weight", layout.weight[call.gate_up], call.weight_shape, 0),
        ("scale", layout.scale[call.gate_up], call.scale_matrix, SCALE_ONE),
    )
    launches, halves = [], 2 if call.gate_up else 1
    for name, permutation, shape, fill in parts:
        source = getattr(call, name).shape
        block_c = min(COLUMNS_PER_PROGRAM, triton.next_power_of_2(shape[2]))
        tiles = triton.cdiv(shape[1], ROWS_PER_PROGRAM) * triton.cdiv(shape[2], block_c)
        arguments = dict(
            source=Operand(name, torch.uint8), out=Operand(f"out_{name}", torch.uint8), FILL=fill, HALVES=halves,
            SOURCE_ROWS=source[1] // halves, SOURCE_COLUMNS=source[2], OUT_ROWS=shape[1], OUT_COLUMNS=shape[2],
            **order("", permutation, shape), BLOCK_R=ROWS_PER_PROGRAM, BLOCK_C=block_c,
        )  # fmt: skip
        launches.append(Launch(preshuffle_kernel, (experts * tiles,), arguments))
    return Plan(launches)


def quantize_preshuffle(call: QuantizePreshuffle) -> Plan:
    """What writes ``call.out_weight`` and ``call.out_scale`` of a call with experts."""
    layout, (experts, rows, columns) = call.arrangement, call.weight_shape
    _, halves, source_rows, source_columns = call.by_halves.shape
    expert_stride, half_stride, row_stride, _ = call.by_halves.stride()
    block_c = min(COLUMNS_PER_PROGRAM, BLOCK.value * triton.next_power_of_2(call.scale_matrix[2]))
    tiles = triton.cdiv(rows, QUANTIZED_ROWS_PER_PROGRAM) * triton.cdiv(call.scale_matrix[2] * BLOCK.value, block_c)
    arguments = dict(
        x=Operand("x", call.x.dtype), out_weight=Operand("out_weight", torch.uint8),
        out_scale=Operand("out_scale", torch.uint8), ROUNDING=call.scale_rounding, HALVES=halves,
        EXPERT_STRIDE=expert_stride, HALF_STRIDE=half_stride, ROW_STRIDE=row_stride, SOURCE_ROWS=source_rows,
        SOURCE_COLUMNS=source_columns, OUT_ROWS=rows, OUT_COLUMNS=columns, OUT_SCALE_COLUMNS=call.scale_matrix[2],
        **order("WEIGHT_", layout.weight[call.gate_up], call.weight_shape),
        **order("SCALE_", layout.scale[call.gate_up], call.scale_matrix),
        BLOCK_R=QUANTIZED_ROWS_PER_PROGRAM, BLOCK_C=block_c,
    )  # fmt: skip
    return Plan([Launch(quantize_preshuffle_kernel, (experts * tiles,), arguments)])
