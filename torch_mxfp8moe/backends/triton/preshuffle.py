"""``preshuffle``: one pass over the bytes, for any layout."""

import torch
import triton
import triton.language as tl

from ...arguments import Preshuffle
from ...formats import SCALE_ONE
from .launch import Launch, Operand, Plan
from .memory import offset, order

ROWS_PER_PROGRAM = 32
COLUMNS_PER_PROGRAM = 256


@triton.jit
def preshuffle_kernel(
    source, out, FILL: tl.constexpr, GATE_UP: tl.constexpr,
    SOURCE_ROWS: tl.constexpr, SOURCE_COLUMNS: tl.constexpr, OUT_ROWS: tl.constexpr, OUT_COLUMNS: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, ROWS: tl.constexpr, ROW_DIGITS: tl.constexpr, COLUMNS: tl.constexpr,
    COLUMN_DIGITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """source [E, SOURCE_ROWS, SOURCE_COLUMNS] bytes -> their places in out, OUT_ROWS x OUT_COLUMNS an expert; what the
    source does not have is FILL. GATE_UP: the rows are two halves, each padded at its end."""
    row_tiles: tl.constexpr = (OUT_ROWS + BLOCK_R - 1) // BLOCK_R
    column_tiles: tl.constexpr = (OUT_COLUMNS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    expert = (pid // (row_tiles * column_tiles)).to(tl.int64)
    row = pid // column_tiles % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    column = pid % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    halves: tl.constexpr = 2 if GATE_UP else 1
    half = row // (OUT_ROWS // halves)
    within = row % (OUT_ROWS // halves)
    source_row = half * (SOURCE_ROWS // halves) + within
    there = (within < SOURCE_ROWS // halves)[:, None] & (column < SOURCE_COLUMNS)[None, :]
    mask = (row < OUT_ROWS)[:, None] & (column < OUT_COLUMNS)[None, :]
    source += expert * (SOURCE_ROWS * SOURCE_COLUMNS)
    data = tl.load(source + source_row[:, None] * SOURCE_COLUMNS + column[None, :], mask=mask & there, other=FILL)
    to = offset(row, ROWS, ROW_DIGITS)[:, None] + offset(column, COLUMNS, COLUMN_DIGITS)[None, :]
    tl.store(out + expert * EXPERT_STRIDE + to, data, mask=mask)


def preshuffle(call: Preshuffle) -> Plan:
    """What writes ``call.out_weight`` and ``call.out_scale`` of a call with experts."""
    layout, (experts, rows, columns) = call.arrangement, call.weight_shape
    scale_shape = (experts, rows, layout.padded_scale_columns(columns))
    parts = (
        ("weight", layout.weight[call.gate_up], call.weight_shape, 0),
        ("scale", layout.scale[call.gate_up], scale_shape, SCALE_ONE),
    )
    launches = []
    for name, permutation, shape, fill in parts:
        source = getattr(call, name).shape
        block_c = min(COLUMNS_PER_PROGRAM, triton.next_power_of_2(shape[2]))
        tiles = triton.cdiv(shape[1], ROWS_PER_PROGRAM) * triton.cdiv(shape[2], block_c)
        arguments = dict(
            source=Operand(name, torch.uint8), out=Operand(f"out_{name}", torch.uint8), FILL=fill, GATE_UP=call.gate_up,
            SOURCE_ROWS=source[1], SOURCE_COLUMNS=source[2], OUT_ROWS=shape[1], OUT_COLUMNS=shape[2],
            **order("", permutation, shape), BLOCK_R=ROWS_PER_PROGRAM, BLOCK_C=block_c,
        )  # fmt: skip
        launches.append(Launch(preshuffle_kernel, (experts * tiles,), arguments))
    return Plan(launches)
