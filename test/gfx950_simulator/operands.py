"""What operands mean: sources as functions of the machine, and the table of instructions that they feed.

A source for a vector instruction gives an array [waves, 64], or one that broadcasts to it; for a scalar instruction
[waves]. Types are written ``u32``, ``i32``, ``f32``, ``u64``, ``f16``, ..., and ``mask`` for 64 lanes in two SGPRs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .assembly import AGPR, AssemblyError, Instruction, Operand, float_bits

SGPR = 1000
"""Added to the number of an SGPR where registers of both kinds are listed together."""

DTYPES = {
    "u16": np.uint16, "i16": np.int16, "f16": np.float16, "u32": np.uint32, "i32": np.int32, "f32": np.float32,
    "u64": np.uint64, "i64": np.int64, "f64": np.float64,
}  # fmt: skip


@dataclass(frozen=True)
class Definition:
    """One entry of the table."""

    build: Callable[[Instruction], Callable]
    """Gives the function of the machine that executes an instruction."""
    unit: str
    """``valu``, ``trans``, ``mfma``, ``salu``, ``smem``, ``vmem``, ``ds``, ``scratch``, ``flow`` or ``none``."""
    dests: int = 1
    """How many of the operands, from the first on, are written."""
    reads_dest: bool = False
    writes_sources: bool = False
    """Whether the second operand is written too (swaps)."""
    writes_scc: bool = False
    implicit: tuple[int, ...] = ()
    """Registers read that are not in the text."""


TABLE: dict[str, Definition] = {}


def define(names: str, unit: str, **options) -> Callable:
    """Enter the decorated ``build`` function into the table under each of ``names``."""

    def enter(build):
        for name in names.split():
            if name in TABLE:
                raise AssertionError(f"{name} is defined twice")
            TABLE[name] = Definition(build, unit, **options)
        return build

    return enter


def lanes_of(masks: np.ndarray) -> np.ndarray:
    """Masks [n] uint64 -> lanes [n, 64] bool."""
    octets = np.ascontiguousarray(masks).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets, axis=1, bitorder="little").view(bool)


def masks_of(lanes: np.ndarray) -> np.ndarray:
    """The inverse."""
    return np.packbits(lanes, axis=1, bitorder="little").view(np.uint64)[:, 0]


def constant(operand: Operand, type_: str) -> np.generic:
    """A constant as a value of ``type_``: floats of the operand's size, integers sign- or zero-extended."""
    dtype = np.dtype(DTYPES[type_])
    value = operand.value
    bits = float_bits(value, dtype.itemsize) if isinstance(value, float) else value
    unsigned = np.dtype(f"u{dtype.itemsize}")
    return np.array(bits % (1 << 8 * dtype.itemsize), unsigned).view(dtype)[()]


def _combine(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))


def _signed(source: Callable, operand: Operand) -> Callable:
    """``source`` (of floats) with the operand's -x and |x|."""
    if operand.abs and operand.neg:
        return lambda m: -np.abs(source(m))
    if operand.abs:
        return lambda m: np.abs(source(m))
    if operand.neg:
        return lambda m: -source(m)
    return source


def vector_source(operand: Operand, type_: str, high: bool = False) -> Callable:
    """high: take the upper half of the register (op_sel); for 16-bit types."""
    register = operand.index
    if type_ == "mask":
        pair = register // 2
        return lambda m: lanes_of(m.s64[m.waves, pair])
    dtype = DTYPES[type_]
    size = np.dtype(dtype).itemsize
    if operand.kind == "imm":
        value = constant(operand, type_)
        return _signed(lambda m: value, operand)
    if operand.kind not in "vs":
        raise AssemblyError(f"operand {operand.value!r} is not known")
    vector = operand.kind == "v"
    if size == 4:
        name = {"u32": "v", "i32": "vi", "f32": "vf"}[type_]
        if vector:
            source = {
                "v": lambda m: m.v[register, m.waves],
                "vi": lambda m: m.vi[register, m.waves],
                "vf": lambda m: m.vf[register, m.waves],
            }[name]
        else:
            source = {
                "v": lambda m: m.s[m.waves, register, None],
                "vi": lambda m: m.si[m.waves, register, None],
                "vf": lambda m: m.sf[m.waves, register, None],
            }[name]
    elif size == 8:
        if vector:
            source = lambda m: _combine(m.v[register, m.waves], m.v[register + 1, m.waves]).view(dtype)
        else:
            source = lambda m: m.s64[m.waves, register // 2, None].view(dtype)
    else:
        shift = np.uint32(16 if high else 0)
        bits = vector_source(Operand(operand.kind, register), "u32")
        source = lambda m: (bits(m) >> shift).astype(np.uint16).view(dtype)
    if operand.neg or operand.abs:
        if type_ == "u32":  # of v_cndmask_b32 and v_mov_b32, which take the sign bit of 32-bit floats
            keep = np.uint32(0x7FFFFFFF if operand.abs else 0xFFFFFFFF)
            flip = np.uint32(0x80000000 if operand.neg else 0)
            return lambda m: source(m) & keep ^ flip
        if not type_.startswith("f"):
            raise AssemblyError(f"a sign modifier on an operand of type {type_}")
        return _signed(source, operand)
    return source


def scalar_source(operand: Operand, type_: str) -> Callable:
    register = operand.index
    if operand.kind == "imm":
        value = constant(operand, type_)
        return lambda m: value
    if operand.kind != "s":
        raise AssemblyError(f"operand {operand} of a scalar instruction")
    if np.dtype(DTYPES[type_]).itemsize == 8:
        dtype = DTYPES[type_]
        return lambda m: m.s64[m.waves, register // 2].view(dtype)
    name = {"u32": "s", "i32": "si", "f32": "sf"}[type_]
    return lambda m: getattr(m, name)[m.waves, register]


def scalar_dest(operand: Operand, size: int = 4) -> Callable:
    """A function (machine, values [n]) that writes one SGPR, or a pair."""
    register = operand.index
    executes = register in (126, 127)

    def write(m, values):
        if size == 8:
            m.s64[m.waves, register // 2] = values.view(np.uint64)
        else:
            m.s[m.waves, register] = values.view(np.uint32)
        if executes:
            m.exec_changed()

    return write


def registers(operand: Operand) -> list[int]:
    """Numbers of the registers in an operand, SGPRs from SGPR on."""
    if operand.kind not in ("v", "s"):
        return []
    return [number + SGPR * (operand.kind == "s") for number in operand.registers]


def register_name(number: int) -> str:
    if number >= SGPR:
        return f"s{number - SGPR}"
    return f"v{number}" if number < AGPR else f"a{number - AGPR}"
