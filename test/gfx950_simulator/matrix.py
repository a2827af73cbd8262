"""The matrix unit: MFMA, plain and with block scales.

Semantics: AMD, "CDNA4 Instruction Set Architecture" reference guide, chapter 7 (matrix arithmetic instructions), and
Triton's layouts (``chooseScaledMfmaScaleLayout`` and ``AMDMfmaEncodingAttr``, https://github.com/triton-lang/triton).
Products are summed in float64 and the sum with C rounded once: the order and rounding inside the unit are not modelled.
EXEC is ignored.
"""

import re

import numpy as np

from .assembly import AssemblyError, Instruction, Operand
from .formats import DECODE, FP4
from .operands import define

LANE = np.arange(64)


def _rows(m, operand: Operand) -> np.ndarray:
    """Registers of an operand as words [n, 64, count]."""
    block = m.v[operand.index : operand.index + operand.count, m.waves]
    return np.ascontiguousarray(np.moveaxis(block, 0, -1))


def output_map(dim: int) -> tuple[np.ndarray, np.ndarray]:
    """The row and column [registers, 64] of D that each register and lane holds."""
    groups = 64 // dim
    register = np.arange(dim * dim // 64)[:, None]
    row = register // 4 * 4 * groups + 4 * (LANE // dim) + register % 4
    return row, np.broadcast_to(LANE % dim, row.shape)


def _finish(m, instruction: Instruction, dim: int, product: np.ndarray) -> None:
    """D = product [n, dim, dim] + C."""
    dest, c = instruction.operands[0], instruction.operands[3]
    row, column = output_map(dim)
    values = product[:, row, column]  # [n, registers, 64]
    if c.kind == "v":
        values = values + m.vf[c.index : c.index + c.count, m.waves].swapaxes(0, 1)
    elif c.value != 0:
        raise AssemblyError(f"{instruction}: C is a constant other than 0")
    m.v[dest.index : dest.index + dest.count, m.waves] = values.astype(np.float32).view(np.uint32).swapaxes(0, 1)


_PLAIN = {
    "bf16": lambda words: (words.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32),
    "f16": lambda words: words.view(np.float16),
    "f32": lambda words: words.view(np.float32),
    "fp8": lambda words: DECODE["fp8"][words.view(np.uint8)],
    "bf8": lambda words: DECODE["bf8"][words.view(np.uint8)],
}
"""Words [n, 64, registers] -> elements [n, 64, k]."""


def _plain(name: str, dim: int, k: int, a: str, b: str) -> None:
    @define(name, "mfma")
    def _(instruction):
        """A lane holds k / groups neighbours along K of row (or column) lane % dim."""
        groups = 64 // dim
        if any(instruction.modifiers.get(key) for key in ("cbsz", "abid", "blgp")):
            raise AssemblyError(f"{instruction}: broadcasts are not modelled")

        def matrix(m, operand, convert):
            elements = convert(_rows(m, operand)).astype(np.float64)
            return elements.reshape(-1, groups, dim, k // groups).swapaxes(1, 2).reshape(-1, dim, k)

        def run(m):
            left, right = (matrix(m, x, _PLAIN[y]) for x, y in zip(instruction.operands[1:3], (a, b)))
            _finish(m, instruction, dim, left @ right.swapaxes(1, 2))

        instruction.dim, instruction.matrix_rows = dim, lambda lanes: lanes.reshape(-1, groups, dim).any(1)
        return run


for _type in ("bf16", "f16"):
    for _dim, _k in ((16, 16), (16, 32), (32, 8), (32, 16)):
        _plain(f"v_mfma_f32_{_dim}x{_dim}x{_k}_{_type}", _dim, _k, _type, _type)
for _dim, _k in ((16, 4), (32, 2)):
    _plain(f"v_mfma_f32_{_dim}x{_dim}x{_k}_f32", _dim, _k, "f32", "f32")
for _a in ("fp8", "bf8"):
    for _b in ("fp8", "bf8"):
        for _dim, _k in ((16, 32), (32, 16)):
            _plain(f"v_mfma_f32_{_dim}x{_dim}x{_k}_{_a}_{_b}", _dim, _k, _a, _b)

_FORMATS = {0: "fp8", 1: "bf8", 4: "fp4"}
"""By the value of cbsz (of A) and blgp (of B)."""


def operand_matrix(words: np.ndarray, dim: int, format_: str) -> np.ndarray:
    """An operand's registers [n, 64, 8 or 4] -> its rows [n, dim, k], float64.

    8-bit: 16-element chunks of K go to the lane groups in turn, then to the upper half of the registers. 4-bit: a lane
    holds the 32 values of one block.
    """
    n, groups = words.shape[0], 64 // dim
    if format_ == "fp4":
        octets = words[:, :, :4].copy().view(np.uint8)
        elements = FP4[np.stack((octets & 15, octets >> 4), -1)].reshape(n, groups, dim, 32)
        return elements.swapaxes(1, 2).reshape(n, dim, groups * 32)
    elements = DECODE[format_][np.ascontiguousarray(words).view(np.uint8)]  # [n, 64, 32]
    chunks = elements.reshape(n, groups, dim, 2, 16)  # chunk = half * groups + group
    return chunks.transpose(0, 2, 3, 1, 4).reshape(n, dim, groups * 32)


def block_scales(words: np.ndarray, dim: int, byte: int) -> np.ndarray:
    """A scale register [n, 64] -> factors [n, dim, k / 32]: block b of row i is in lane dim * b + i."""
    exponent = (words >> np.uint32(8 * byte) & np.uint32(255)).astype(np.int32)
    factor = np.where(exponent == 255, np.nan, np.ldexp(1.0, exponent - 127))
    return factor.reshape(-1, 64 // dim, dim).swapaxes(1, 2)


@define(
    "v_mfma_scale_f32_16x16x128_f8f6f4 v_mfma_scale_f32_32x32x64_f8f6f4 v_mfma_f32_16x16x128_f8f6f4 "
    "v_mfma_f32_32x32x64_f8f6f4",
    "mfma",
)
def _(instruction):
    """Bits of op_sel and op_sel_hi, low and high, choose the byte of each operand's scale register."""
    operands, modifiers = instruction.operands, instruction.modifiers
    dim = int(re.search(r"f32_(\d+)x", instruction.name).group(1))
    try:
        formats = [_FORMATS[modifiers.get(key, 0)] for key in ("cbsz", "blgp")]
    except KeyError as error:
        raise AssemblyError(f"{instruction}: 6-bit formats are not modelled") from error
    op_sel, op_sel_hi = modifiers.get("op_sel", (0, 0, 0)), modifiers.get("op_sel_hi", (0, 0, 0))
    scales = operands[4:6]
    if any(one.kind != "v" for one in scales):
        raise AssemblyError(f"{instruction}: scales that are not in VGPRs")

    def matrix(m, side):
        rows = operand_matrix(_rows(m, operands[1 + side]), dim, formats[side])
        if not scales:
            return rows
        factors = block_scales(m.v[scales[side].index, m.waves], dim, op_sel[side] | op_sel_hi[side] << 1)
        return (rows.reshape(*factors.shape, 32) * factors[..., None]).reshape(rows.shape)

    instruction.dim, instruction.matrix_rows = dim, lambda lanes: lanes.reshape(-1, 64 // dim, dim).any(1)
    return lambda m: _finish(m, instruction, dim, matrix(m, 0) @ matrix(m, 1).swapaxes(1, 2))
