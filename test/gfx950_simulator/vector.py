"""Vector instructions, but matrix and memory ones: VOP1, VOP2, VOP3, VOP3P and VOPC with their DPP and SDWA forms.

Semantics: AMD, "CDNA4 Instruction Set Architecture" reference guide, chapters 6 (vector ALU operations, DPP, SDWA) and
12 (instructions). Arithmetic is IEEE with the denormals kept (``.amdhsa_float_denorm_mode_32 3``, checked on launch);
transcendental functions, which hardware gives to about 1 ulp, are correctly rounded here, with denormals flushed.
"""

import operator
import re
from collections.abc import Callable

import numpy as np

from .assembly import VCC, AssemblyError, Instruction, Operand
from .formats import DECODE, LARGEST, encode
from .operands import (
    DTYPES, SGPR, TABLE, Definition, define, lanes_of, masks_of, scalar_dest, scalar_source, vector_source,
)  # fmt: skip

U32, I32, F32, U64, U16 = np.uint32, np.int32, np.float32, np.uint64, np.uint16
LANE = np.arange(64)


# --- encodings


def dpp_lanes(modifiers: dict) -> tuple[np.ndarray, np.ndarray]:
    """The lane [64] that each lane reads, and whether there is one (CDNA4 ISA, section on DPP)."""
    row, within = LANE // 16, LANE % 16
    if "quad_perm" in modifiers:
        return LANE // 4 * 4 + np.array(modifiers["quad_perm"])[LANE % 4], np.ones(64, bool)
    for name, value in modifiers.items():
        if name in ("row_shl", "row_shr"):
            source = within + value if name == "row_shl" else within - value
            return row * 16 + source % 16, (source >= 0) & (source < 16)
        if name == "row_ror":
            return row * 16 + (within - value) % 16, np.ones(64, bool)
        if name == "row_newbcast":
            return row * 16 + value, np.ones(64, bool)
        if name == "row_bcast" and value == 15:
            return np.maximum(row * 16 - 1, 0), row > 0
        if name == "row_bcast" and value == 31:
            return np.full(64, 31), LANE >= 32
        if name in ("wave_shl", "wave_shr"):
            source = LANE + 1 if name == "wave_shl" else LANE - 1
            return source % 64, (source >= 0) & (source < 64)
        if name in ("wave_rol", "wave_ror"):
            return (LANE + 1 if name == "wave_rol" else LANE - 1) % 64, np.ones(64, bool)
    if "row_mirror" in modifiers:
        return row * 16 + 15 - within, np.ones(64, bool)
    if "row_half_mirror" in modifiers:
        return LANE // 8 * 8 + 7 - LANE % 8, np.ones(64, bool)
    raise AssemblyError(f"DPP control {modifiers} is not known")


def _dpp(instruction: Instruction, source: Callable) -> tuple[Callable, Callable]:
    """Source 0 through DPP, and which lanes the instruction writes besides EXEC.

    A lane whose source is outside the row, or not active, gets 0 with bound_ctrl and is not written without.
    """
    modifiers = instruction.modifiers
    lanes, exists = dpp_lanes(modifiers)
    bound = bool(modifiers.get("bound_ctrl"))
    enabled = (modifiers.get("row_mask", 15) >> LANE // 16 & 1) & (modifiers.get("bank_mask", 15) >> LANE % 16 // 4 & 1)
    enabled = enabled.astype(bool)
    instruction.lane_map = lanes, exists, bound

    def valid(m):
        return exists if m.mask is None else exists & m.mask[:, lanes]

    def moved(m):
        values = np.broadcast_to(source(m), (m.n, 64))[:, lanes]
        return np.where(valid(m), values, values.dtype.type(0)) if bound else values

    def written(m):
        return np.broadcast_to(enabled if bound else enabled & valid(m), (m.n, 64))

    instruction.written = written
    return moved, written


_SELECT = {"BYTE_0": (0, 8), "BYTE_1": (8, 8), "BYTE_2": (16, 8), "BYTE_3": (24, 8), "WORD_0": (0, 16),
           "WORD_1": (16, 16), "DWORD": (0, 32)}  # fmt: skip


def _sdwa(source: Callable, select: str, sext: bool) -> Callable:
    """Bits of a register's byte or word, zero- or sign-extended to 32."""
    shift, width = _SELECT[select]
    if width == 32:
        return source
    if sext:
        left, right = U32(32 - width - shift), I32(32 - width)
        return lambda m: ((source(m) << left).view(I32) >> right).view(U32)
    shift, mask = U32(shift), U32((1 << width) - 1)
    return lambda m: source(m) >> shift & mask


_CONVERT = {"u32": lambda x: x, "i32": lambda x: x.view(I32), "f32": lambda x: x.view(F32)}
for _type in ("u16", "i16", "f16"):
    _CONVERT[_type] = lambda x, dtype=DTYPES[_type]: x.astype(U16).view(dtype)


def _sources(instruction: Instruction, operands: list[Operand], types: list[str]) -> tuple[list[Callable], Callable]:
    """Source functions, and which lanes are written besides EXEC (None: all)."""
    modifiers, encoding = instruction.modifiers, instruction.encoding
    if len(operands) != len(types):
        raise AssemblyError(f"{instruction}: {len(operands)} sources where {len(types)} are expected")
    op_sel = modifiers.get("op_sel", ())
    written, sources = None, []
    for i, (one, type_) in enumerate(zip(operands, types)):
        special = (encoding == "sdwa" and i < 2) or ("dpp" in encoding and i == 0)
        if type_ == "mask" or not special:
            sources.append(vector_source(one, type_, high=i < len(op_sel) and bool(op_sel[i])))
            continue
        source = vector_source(Operand(one.kind, one.index, value=one.value), "u32")
        if encoding == "sdwa":
            source = _sdwa(source, modifiers.get(f"src{i}_sel", "DWORD"), one.sext)
        else:
            source, written = _dpp(instruction, source)
        convert = _CONVERT[type_]
        if one.neg or one.abs:
            sign = (lambda x: -np.abs(x)) if one.neg and one.abs else np.abs if one.abs else operator.neg
            sources.append(lambda m, f=source, c=convert, s=sign: s(c(f(m))))
        elif type_ == "u32":
            sources.append(source)
        else:
            sources.append(lambda m, f=source, c=convert: c(f(m)))
    return sources, written


def _output(instruction: Instruction, type_: str) -> Callable:
    """(values) -> values with the output modifiers."""
    modifiers = instruction.modifiers
    scale = modifiers.get("mul") or (1 / modifiers["div"] if "div" in modifiers else None)
    clamp = modifiers.get("clamp")
    if clamp and re.match(r"v_(add|sub|subrev)_[ui]\d+$", instruction.name):
        return None  # saturates: see _saturating
    if (clamp or scale) and not type_.startswith("f"):
        raise AssemblyError(f"{instruction}: output modifiers on type {type_} are not modelled")
    dtype = DTYPES.get(type_)

    def change(x):
        if scale:
            x = x * dtype(scale)
        if clamp:
            x = np.fmin(np.fmax(x, dtype(0)), dtype(1))
        return x

    return change if clamp or scale else None


KEEPS_HIGH_HALF = {"v_bitop3_b16"}
"""16-bit instructions that leave the other half of the register; the others write zeros there (GFX9)."""


def _writer(instruction: Instruction, type_: str) -> Callable:
    """A function (machine, values, mask) for the destination."""
    dest, modifiers = instruction.operands[0], instruction.modifiers
    register, change = dest.index, _output(instruction, type_)
    size = 8 if type_ == "lanes" else np.dtype(DTYPES[type_]).itemsize
    op_sel = modifiers.get("op_sel", ())
    select = modifiers.get("dst_sel", "DWORD") if instruction.encoding == "sdwa" else "DWORD"
    high_half = size == 2 and len(op_sel) > len(instruction.operands) - 1 and bool(op_sel[-1])
    if dest.kind != "v":
        raise AssemblyError(f"{instruction}: a vector instruction that writes {dest}")
    if size == 8:

        def write(m, values, mask):
            values = np.broadcast_to(values, (m.n, 64)).view(U64)
            m.write_v(register, values.astype(U32), mask)
            m.write_v(register + 1, (values >> U64(32)).astype(U32), mask)

    elif select != "DWORD":
        shift, width = _SELECT[select]
        unused = modifiers.get("dst_unused", "UNUSED_PAD")
        field = ((1 << width) - 1) << shift
        if unused == "UNUSED_SEXT":
            raise AssemblyError(f"{instruction}: UNUSED_SEXT is not modelled")

        def write(m, values, mask):
            bits = values.view(f"u{size}").astype(U32) << U32(shift) & U32(field)
            if unused == "UNUSED_PRESERVE":
                bits = bits | m.v[register, m.waves] & U32(~field & 0xFFFFFFFF)
            m.write_v(register, bits, mask)

    elif size == 2:
        keeps = high_half or instruction.name in KEEPS_HIGH_HALF

        def write(m, values, mask):
            bits = values.view(U16).astype(U32)
            if keeps:
                old = m.v[register, m.waves]
                bits = bits << U32(16) | old & U32(0xFFFF) if high_half else bits | old & U32(0xFFFF0000)
            m.write_v(register, bits, mask)

    else:
        write = lambda m, values, mask: m.write_v(register, values, mask)
    if change is None:
        return write
    return lambda m, values, mask: write(m, change(values), mask)


def _saturating(function: Callable, dtype: type) -> Callable:
    """An integer sum or difference that stops at the ends of its type."""
    limits = np.iinfo(dtype)
    return lambda a, b: np.clip(function(a.astype(np.int64), b.astype(np.int64)), limits.min, limits.max).astype(dtype)


# --- the generic forms


def vector(names: str, signature: str, unit: str = "valu", reads_dest: bool = False) -> Callable:
    """Enter a function of arrays: ``signature`` is ``"f32 = f32, f32"``. reads_dest: the last source is the
    destination."""
    result, _, types = signature.partition(" = ")
    types = types.split(", ") if types else []

    def enter(function):
        def build(instruction):
            operands = list(instruction.operands[1:])
            if reads_dest:
                operands.append(instruction.operands[0])
            sources, written = _sources(instruction, operands, types)
            write = _writer(instruction, result)
            compute = function
            if instruction.modifiers.get("clamp") and result[0] in "ui":
                compute = _saturating(function, DTYPES[result])
            if written is None and len(sources) == 2:
                a, b = sources
                return lambda m: write(m, compute(a(m), b(m)), None)
            if written is None and len(sources) == 1:
                (a,) = sources
                return lambda m: write(m, compute(a(m)), None)
            mask = written or (lambda m: None)
            return lambda m: write(m, compute(*[source(m) for source in sources]), mask(m))

        for name in names.split():
            TABLE[name] = Definition(build, unit, reads_dest=reads_dest)
        return function

    return enter


def _compare(name: str, type_: str, function: Callable, exec_: bool = False) -> None:
    def build(instruction):
        dest, *operands = instruction.operands
        if instruction.encoding == "e32" and exec_:
            operands = instruction.operands[-2:]
        sources, _ = _sources(instruction, operands, [type_, type_ if name[:11] != "v_cmp_class" else "u32"])
        a, b = sources
        write = scalar_dest(dest, 8)
        write_exec = scalar_dest(Operand("s", 126, 2), 8)

        def run(m):
            lanes = np.broadcast_to(function(a(m), b(m)), (m.n, 64))
            if m.mask is not None:
                lanes = lanes & m.mask
            masks = masks_of(lanes)
            if not exec_ or dest.index != 126:
                write(m, masks)
            if exec_:
                write_exec(m, masks)

        return run

    TABLE[name] = Definition(build, "valu")


_INTEGER = {"lt": np.less, "eq": np.equal, "le": np.less_equal, "gt": np.greater, "ne": np.not_equal,
            "ge": np.greater_equal}  # fmt: skip
_FLOAT = {"lt": np.less, "eq": np.equal, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
          "lg": lambda a, b: (a < b) | (a > b), "o": lambda a, b: (a == a) & (b == b),
          "u": lambda a, b: (a != a) | (b != b), "neq": np.not_equal}  # fmt: skip
for _name in ("lt", "le", "gt", "ge", "lg"):
    _FLOAT["n" + _name] = lambda a, b, f=_FLOAT[_name]: ~f(a, b)


def _class(x: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """v_cmp_class: bit 0 signalling NaN, 1 quiet NaN, 2 -inf, 3 -normal, 4 -denormal, 5 -0, 6 +0, ... 9 +inf."""
    bits = x.view(U32)
    nan, quiet, negative = np.isnan(x), (bits & U32(1 << 22)) != 0, (bits >> U32(31)) != 0
    magnitude = np.abs(x)
    kind = np.where(np.isinf(x), 3, np.where(magnitude >= F32(2**-126), 2, np.where(magnitude > 0, 1, 0)))
    number = np.where(nan, np.where(quiet, 1, 0), np.where(negative, 5 - kind, 6 + kind))
    return (wanted >> number.astype(U32) & U32(1)).astype(bool)


for _prefix, _exec in (("v_cmp", False), ("v_cmpx", True)):
    for _type in ("u32", "i32", "u64", "i64", "u16", "i16"):
        for _name, _function in _INTEGER.items():
            _compare(f"{_prefix}_{_name}_{_type}", _type, _function, _exec)
    for _type in ("f32", "f16", "f64"):
        for _name, _function in _FLOAT.items():
            _compare(f"{_prefix}_{_name}_{_type}", _type, _function, _exec)
    _compare(f"{_prefix}_class_f32", "f32", _class, _exec)


# --- integers

for _name, _type, _function in (
    ("v_add_u32", "u32", np.add), ("v_sub_u32", "u32", np.subtract), ("v_subrev_u32", "u32", lambda a, b: b - a),
    ("v_add_i32", "i32", np.add), ("v_sub_i32", "i32", np.subtract),
    ("v_mul_lo_u32", "u32", np.multiply), ("v_and_b32", "u32", np.bitwise_and), ("v_or_b32", "u32", np.bitwise_or),
    ("v_xor_b32", "u32", np.bitwise_xor), ("v_xnor_b32", "u32", lambda a, b: ~(a ^ b)),
    ("v_min_u32", "u32", np.minimum), ("v_max_u32", "u32", np.maximum), ("v_min_i32", "i32", np.minimum),
    ("v_max_i32", "i32", np.maximum), ("v_min_u16", "u16", np.minimum), ("v_max_u16", "u16", np.maximum),
    ("v_min_i16", "i16", np.minimum), ("v_max_i16", "i16", np.maximum), ("v_add_u16", "u16", np.add),
    ("v_sub_u16", "u16", np.subtract), ("v_subrev_u16", "u16", lambda a, b: b - a),
    ("v_mul_lo_u16", "u16", np.multiply),
    ("v_lshlrev_b32", "u32", lambda a, b: b << (a & U32(31))),
    ("v_lshrrev_b32", "u32", lambda a, b: b >> (a & U32(31))),
    ("v_ashrrev_i32", "i32", lambda a, b: b >> (a & I32(31))),
    ("v_lshlrev_b16", "u16", lambda a, b: b << (a & U16(15))),
    ("v_lshrrev_b16", "u16", lambda a, b: b >> (a & U16(15))),
    ("v_ashrrev_i16", "i16", lambda a, b: b >> (a & np.int16(15))),
    ("v_bfm_b32", "u32", lambda a, b: ((U32(1) << (a & U32(31))) - U32(1)) << (b & U32(31))),
):  # fmt: skip
    vector(_name, f"{_type} = {_type}, {_type}")(_function)

vector("v_lshlrev_b64", "u64 = u32, u64")(lambda a, b: b << (a & U32(63)).astype(U64))
vector("v_lshrrev_b64", "u64 = u32, u64")(lambda a, b: b >> (a & U32(63)).astype(U64))
vector("v_ashrrev_i64", "i64 = u32, i64")(lambda a, b: b >> (a & U32(63)).astype(np.int64))
vector("v_mov_b32", "u32 = u32")(lambda a: a)
vector("v_mov_b64", "u64 = u64")(lambda a: a)
vector("v_accvgpr_read_b32 v_accvgpr_write_b32 v_accvgpr_mov_b32", "u32 = u32")(lambda a: a)
vector("v_not_b32", "u32 = u32")(lambda a: ~a)
vector("v_lshl_add_u32", "u32 = u32, u32, u32")(lambda a, b, c: (a << (b & U32(31))) + c)
vector("v_add_lshl_u32", "u32 = u32, u32, u32")(lambda a, b, c: (a + b) << (c & U32(31)))
vector("v_lshl_or_b32", "u32 = u32, u32, u32")(lambda a, b, c: a << (b & U32(31)) | c)
vector("v_and_or_b32", "u32 = u32, u32, u32")(lambda a, b, c: a & b | c)
vector("v_or3_b32", "u32 = u32, u32, u32")(lambda a, b, c: a | b | c)
vector("v_xad_u32", "u32 = u32, u32, u32")(lambda a, b, c: (a ^ b) + c)
vector("v_add3_u32", "u32 = u32, u32, u32")(lambda a, b, c: a + b + c)
vector("v_bfi_b32", "u32 = u32, u32, u32")(lambda a, b, c: a & b | ~a & c)
vector("v_lshl_add_u64", "u64 = u64, u32, u64")(lambda a, b, c: (a << (b & U32(7)).astype(U64)) + c)
vector("v_min3_u32", "u32 = u32, u32, u32")(lambda a, b, c: np.minimum(np.minimum(a, b), c))
vector("v_max3_u32", "u32 = u32, u32, u32")(lambda a, b, c: np.maximum(np.maximum(a, b), c))
vector("v_min3_i32", "i32 = i32, i32, i32")(lambda a, b, c: np.minimum(np.minimum(a, b), c))
vector("v_max3_i32", "i32 = i32, i32, i32")(lambda a, b, c: np.maximum(np.maximum(a, b), c))


def _median(a, b, c):
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


vector("v_med3_u32", "u32 = u32, u32, u32")(_median)
vector("v_med3_i32", "i32 = i32, i32, i32")(_median)


def _low24(a: np.ndarray) -> np.ndarray:
    return a & U32(0xFFFFFF)


def _signed24(a: np.ndarray) -> np.ndarray:
    return (a << U32(8)).view(I32) >> I32(8)


vector("v_mul_u32_u24", "u32 = u32, u32")(lambda a, b: _low24(a) * _low24(b))
vector("v_mul_hi_u32_u24", "u32 = u32, u32")(lambda a, b: (_low24(a).astype(U64) * _low24(b) >> U64(32)).astype(U32))
vector("v_mul_i32_i24", "i32 = u32, u32")(lambda a, b: _signed24(a) * _signed24(b))
vector("v_mad_u32_u24", "u32 = u32, u32, u32")(lambda a, b, c: _low24(a) * _low24(b) + c)
vector("v_mad_i32_i24", "i32 = u32, u32, i32")(lambda a, b, c: _signed24(a) * _signed24(b) + c)
vector("v_mul_hi_u32", "u32 = u32, u32")(lambda a, b: (a.astype(U64) * b.astype(U64) >> U64(32)).astype(U32))
vector("v_mul_hi_i32", "i32 = i32, i32")(lambda a, b: (a.astype(np.int64) * b.astype(np.int64) >> 32).astype(I32))


@vector("v_bfe_u32", "u32 = u32, u32, u32")
def _(a, offset, width):
    width = width & U32(31)
    return a >> (offset & U32(31)) & ((U32(1) << width) - U32(1))


@vector("v_bfe_i32", "i32 = u32, u32, u32")
def _(a, offset, width):
    offset, width = (offset & U32(31)).astype(U64), (width & U32(31)).astype(U64)
    field = (a.astype(U64) >> offset) << (U64(64) - np.maximum(width, U64(1)))
    signed = (field.view(np.int64) >> (U64(64) - np.maximum(width, U64(1))).astype(np.int64)).astype(I32)
    return np.where(width == 0, I32(0), signed)


@vector("v_bfrev_b32", "u32 = u32")
def _(a):
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F)):
        a = (a >> U32(shift) & U32(mask)) | (a & U32(mask)) << U32(shift)
    return np.asarray(a).byteswap()[()]


vector("v_alignbit_b32", "u32 = u32, u32, u32")(
    lambda a, b, c: ((a.astype(U64) << U64(32) | b) >> (c & U32(31)).astype(U64)).astype(U32)
)
vector("v_alignbyte_b32", "u32 = u32, u32, u32")(
    lambda a, b, c: ((a.astype(U64) << U64(32) | b) >> ((c & U32(3)) * U32(8)).astype(U64)).astype(U32)
)


@vector("v_perm_b32", "u32 = u32, u32, u32")
def _(a, b, select):
    """Byte i is chosen by byte i of select: 0-3 of b, 4-7 of a, 8-11 signs, 12 zero, 13 and up 0xFF."""
    both = np.asarray(a).astype(U64) << U64(32) | np.asarray(b).astype(U64)
    result = U32(0)
    for i in range(4):
        s = select >> U32(8 * i) & U32(255)
        byte = (both >> (np.minimum(s, U32(7)) * U32(8)).astype(U64)).astype(U32) & U32(255)
        if np.max(s) > 7:
            sign_of = (np.clip(s, 8, 11) - U32(8)) * U32(16) + U32(15)
            sign = (both >> sign_of.astype(U64) & U64(1)).astype(U32) * U32(255)
            byte = np.where(s < 8, byte, np.where(s < 12, sign, np.where(s == 12, U32(0), U32(255))))
        result = result | byte << U32(8 * i)
    return result


def _count(x: np.ndarray) -> np.ndarray:
    return np.bitwise_count(x).astype(U32)


def _leading(x: np.ndarray) -> np.ndarray:
    """Zero bits above the highest one; -1 for 0."""
    exponent = np.frexp(x.astype(np.float64))[1]
    return np.where(x == 0, I32(-1), (32 - exponent).astype(I32)).view(U32)


vector("v_bcnt_u32_b32", "u32 = u32, u32")(lambda a, b: _count(a) + b)
vector("v_ffbh_u32", "u32 = u32")(_leading)
vector("v_ffbl_b32", "u32 = u32")(lambda a: np.where(a == 0, U32(0xFFFFFFFF), U32(31) - _leading(a & (~a + U32(1)))))
vector("v_mbcnt_lo_u32_b32", "u32 = u32, u32")(
    lambda a, b: _count(a & ((U64(1) << np.minimum(LANE, 32).astype(U64)) - U64(1)).astype(U32)) + b
)
vector("v_mbcnt_hi_u32_b32", "u32 = u32, u32")(
    lambda a, b: _count(a & ((U64(1) << np.maximum(LANE - 32, 0).astype(U64)) - U64(1)).astype(U32)) + b
)


@define("v_bitop3_b32 v_bitop3_b16", "valu")
def _(instruction):
    """Bit by bit the entry (a, b, c) of an 8-entry truth table."""
    type_ = "u" + instruction.name[-2:]
    dtype = DTYPES[type_]
    table = instruction.modifiers.get("bitop3", 0)
    sources, written = _sources(instruction, list(instruction.operands[1:]), [type_] * 3)
    write = _writer(instruction, type_)

    def run(m):
        a, b, c = (source(m) for source in sources)
        result = dtype(0)
        for i in range(8):
            if table >> i & 1:
                result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        write(m, result, written and written(m))

    return run


vector("v_cndmask_b32", "u32 = u32, u32, mask")(lambda a, b, mask: np.where(mask, b, a))


# --- carries


def _carry(names: str, function: Callable, carry_in: bool) -> None:
    @define(names, "valu", dests=2)
    def _(instruction):
        sources, written = _sources(instruction, list(instruction.operands[2:]), ["u32", "u32"] + ["mask"] * carry_in)
        write, write_carry = _writer(instruction, "u32"), scalar_dest(instruction.operands[1], 8)

        def run(m):
            a, b, *carry = (source(m) for source in sources)
            wide = function(a.astype(np.int64), b.astype(np.int64), *[c.astype(np.int64) for c in carry])
            lanes = np.broadcast_to((wide < 0) | (wide > 0xFFFFFFFF), (m.n, 64)) & m.active()
            write(m, wide.astype(U32), written and written(m))
            write_carry(m, masks_of(lanes))

        return run


_carry("v_add_co_u32", lambda a, b: a + b, False)
_carry("v_sub_co_u32", lambda a, b: a - b, False)
_carry("v_subrev_co_u32", lambda a, b: b - a, False)
_carry("v_addc_co_u32", lambda a, b, c: a + b + c, True)
_carry("v_subb_co_u32", lambda a, b, c: a - b - c, True)
_carry("v_subbrev_co_u32", lambda a, b, c: b - a - c, True)


@define("v_mad_u64_u32 v_mad_i64_i32", "valu", dests=2)
def _(instruction):
    kind = "u" if "u64" in instruction.name else "i"
    types = [f"{kind}32", f"{kind}32", f"{kind}64"]
    sources, _ = _sources(instruction, list(instruction.operands[2:]), types)
    write, write_carry = _writer(instruction, types[2]), scalar_dest(instruction.operands[1], 8)
    wide = DTYPES[types[2]]

    def run(m):
        a, b, c = (source(m) for source in sources)
        product = a.astype(wide) * b.astype(wide)
        total = product + c
        if kind == "u":
            overflow = total < product
        else:
            overflow = ((product ^ total) & (c ^ total)) < 0
        write(m, total, None)
        write_carry(m, masks_of(np.broadcast_to(overflow, (m.n, 64)) & m.active()))

    return run


# --- floating point


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c rounded once. The product is exact in float64; the sum is rounded there to odd (the last bit set if it
    is inexact), from where rounding to float32 is the rounding of the exact sum."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = np.asarray(product + c)
    part = total - product
    error = (product - (total - part)) + (c - part)
    inexact = (error != 0) & np.isfinite(total)
    if inexact.any():
        bits = total.view(np.int64)
        step = np.where((error > 0) == (total > 0), 1, -1)
        total = np.where(inexact & (bits & 1 == 0), bits + step, bits).view(np.float64)
    return total.astype(F32)


def _flushed(function: Callable) -> Callable:
    """A transcendental function: computed in float64, denormal arguments and results become zeros."""

    def compute(a):
        a = np.where(np.abs(a) < F32(2**-126), np.copysign(F32(0), a), a)
        result = np.asarray(function(a.astype(np.float64))).astype(F32)
        return np.where(np.abs(result) < F32(2**-126), np.copysign(F32(0), result), result)

    return compute


for _name, _function in (
    ("add", np.add), ("sub", np.subtract), ("subrev", lambda a, b: b - a), ("mul", np.multiply), ("max", np.fmax),
    ("min", np.fmin),
):  # fmt: skip
    for _type in ("f32", "f16"):
        vector(f"v_{_name}_{_type}", f"{_type} = {_type}, {_type}")(_function)
for _name, _function in (("add", np.add), ("mul", np.multiply), ("max", np.fmax), ("min", np.fmin)):
    vector(f"v_{_name}_f64", "f64 = f64, f64")(_function)

vector("v_max3_f32", "f32 = f32, f32, f32")(lambda a, b, c: np.fmax(np.fmax(a, b), c))
vector("v_min3_f32", "f32 = f32, f32, f32")(lambda a, b, c: np.fmin(np.fmin(a, b), c))
vector("v_maximum3_f32", "f32 = f32, f32, f32")(lambda a, b, c: np.maximum(np.maximum(a, b), c))
vector("v_minimum3_f32", "f32 = f32, f32, f32")(lambda a, b, c: np.minimum(np.minimum(a, b), c))
vector("v_fma_f32", "f32 = f32, f32, f32")(fma32)
vector("v_fmac_f32 v_mac_f32", "f32 = f32, f32, f32", reads_dest=True)(fma32)
vector("v_fmamk_f32", "f32 = f32, f32, f32")(fma32)
vector("v_fmaak_f32", "f32 = f32, f32, f32")(fma32)


@define("v_fma_mix_f32", "valu")
def _(instruction):
    """a * b + c, rounded once, of float32 sources and, where op_sel_hi has a bit, of float16 ones: of that half of
    a register that op_sel chooses (ISA chapter 12, VOP3P; LLVM, "Syntax of AMDGPU Instruction Modifiers")."""
    modifiers, operands = instruction.modifiers, instruction.operands[1:]
    sources = []
    for one, high, narrow in zip(
        operands, modifiers.get("op_sel", (0, 0, 0)), modifiers.get("op_sel_hi", (0, 0, 0)), strict=True
    ):
        if not narrow:
            if high:
                raise AssemblyError(f"{instruction}: op_sel of a source of 32 bits")
            sources.append(vector_source(one, "f32"))
        elif one.kind == "imm":
            raise AssemblyError(f"{instruction}: a constant of 16 bits")
        else:
            half = vector_source(one, "f16", high=bool(high))
            sources.append(lambda m, f=half: f(m).astype(F32))
    a, b, c = sources
    write = _writer(instruction, "f32")
    return lambda m: write(m, fma32(a(m), b(m), c(m)), None)


@vector("v_med3_f32", "f32 = f32, f32, f32")
def _(a, b, c):
    nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
    return np.where(nan, np.fmin(np.fmin(a, b), c), _median(a, b, c))


vector("v_floor_f32", "f32 = f32")(np.floor)
vector("v_ceil_f32", "f32 = f32")(np.ceil)
vector("v_trunc_f32", "f32 = f32")(np.trunc)
vector("v_rndne_f32", "f32 = f32")(np.rint)
vector("v_fract_f32", "f32 = f32")(lambda a: np.minimum(a - np.floor(a), F32(1 - 2**-24)))
vector("v_rcp_f32 v_rcp_iflag_f32", "f32 = f32", unit="trans")(_flushed(lambda a: 1 / a))
vector("v_rsq_f32", "f32 = f32", unit="trans")(_flushed(lambda a: 1 / np.sqrt(a)))
vector("v_sqrt_f32", "f32 = f32", unit="trans")(_flushed(np.sqrt))
vector("v_exp_f32", "f32 = f32", unit="trans")(_flushed(np.exp2))
vector("v_log_f32", "f32 = f32", unit="trans")(_flushed(np.log2))
vector("v_sin_f32", "f32 = f32", unit="trans")(_flushed(lambda a: np.sin(2 * np.pi * a)))
vector("v_cos_f32", "f32 = f32", unit="trans")(_flushed(lambda a: np.cos(2 * np.pi * a)))
vector("v_ldexp_f32", "f32 = f32, i32")(lambda a, b: np.ldexp(a, np.clip(b, -500, 500)))
vector("v_frexp_mant_f32", "f32 = f32")(lambda a: np.where(np.isfinite(a), np.frexp(a)[0], a))
vector("v_frexp_exp_i32_f32", "i32 = f32")(lambda a: np.where(np.isfinite(a), np.frexp(a)[1], 0).astype(I32))

_SHIFT = 64


def _exponent(a: np.ndarray) -> np.ndarray:
    return (a.view(U32) >> U32(23) & U32(255)).astype(I32)


@define("v_div_scale_f32", "valu", dests=2)
def _(instruction):
    """Scales a denominator b or numerator c (a is one of them) so that the quotient's Newton steps neither overflow nor
    lose bits, and sets VCC where v_div_fmas has to undo it."""
    sources, _ = _sources(instruction, list(instruction.operands[2:]), ["f32"] * 3)
    write, write_mask = _writer(instruction, "f32"), scalar_dest(instruction.operands[1], 8)

    def run(m):
        a, b, c = (np.broadcast_to(source(m), (m.n, 64)) for source in sources)
        tiny = F32(2**-126)
        denormal_quotient = np.abs(c.astype(np.float64) / b) < tiny
        denormal_inverse = np.abs(1 / b.astype(np.float64)) < tiny
        up, down, is_b, is_c = np.ldexp(a, _SHIFT), np.ldexp(a, -_SHIFT), a == b, a == c
        conditions = [
            (b == 0) | (c == 0),
            _exponent(c) - _exponent(b) >= 96,
            np.abs(b) < tiny,
            denormal_inverse & denormal_quotient,
            denormal_inverse,
            denormal_quotient,
            _exponent(c) <= 23,
        ]
        values = [
            np.full_like(a, np.nan), np.where(is_b, up, a), up, np.where(is_b, down, a), down, np.where(is_c, up, a), up
        ]  # fmt: skip
        undone = [False, True, False, True, False, True, False]
        write(m, np.select(conditions, values, a), None)
        write_mask(m, masks_of(np.select(conditions, undone, False) & m.active()))

    return run


@define("v_div_fmas_f32", "valu", implicit=(1000 + VCC, 1001 + VCC))
def _(instruction):
    """fma(a, b, c), with v_div_scale undone where VCC says so: a quotient above 1 had its denominator scaled up, one
    below had its numerator scaled up."""
    sources, _ = _sources(instruction, list(instruction.operands[1:]), ["f32"] * 3)
    write = _writer(instruction, "f32")

    def run(m):
        a, b, c = (source(m) for source in sources)
        result = fma32(a, b, c)
        vcc = lanes_of(m.s64[m.waves, VCC // 2])
        if vcc.any():
            shift = np.where(_exponent(np.asarray(c)) > 127, _SHIFT, -_SHIFT)
            result = np.where(vcc, np.ldexp(result, shift), result)
        write(m, result, None)

    return run


@vector("v_div_fixup_f32", "f32 = f32, f32, f32")
def _(quotient, b, c):
    """The special cases of c / b: signs, zeros, infinities and NaN; a quotient beyond all scaling, which the steps
    before leave as NaN, is an overflow."""
    sign = np.signbit(b) ^ np.signbit(c)
    quotient = np.where(np.isnan(quotient), F32(np.inf), quotient)
    quotient = np.where(_exponent(c) - _exponent(b) < -150, F32(0), quotient)
    result = np.copysign(np.abs(quotient), np.where(sign, F32(-1), F32(1)))
    infinite = np.isinf(c) | (b == 0)
    zero = np.isinf(b) | (c == 0)
    result = np.where(zero, np.where(sign, F32(-0.0), F32(0)), result)
    result = np.where(infinite, np.where(sign, F32(-np.inf), F32(np.inf)), result)
    invalid = np.isnan(b) | np.isnan(c) | ((b == 0) & (c == 0)) | (np.isinf(b) & np.isinf(c))
    return np.where(invalid, F32(np.nan), result)


# --- conversions


def _to_integer(a: np.ndarray, low: int, high: int, dtype: type) -> np.ndarray:
    clipped = np.clip(np.nan_to_num(np.trunc(a.astype(np.float64)), nan=0, posinf=high, neginf=low), low, high)
    return clipped.astype(np.int64).astype(dtype)


def bf16_bits(a: np.ndarray) -> np.ndarray:
    """float32 -> bits of the nearest bfloat16, ties to even, as uint32."""
    bits = np.asarray(a).view(U32)
    rounded = (bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)
    return np.where(np.isnan(a), bits >> U32(16) | U32(0x40), rounded)


def _f16_bits(a: np.ndarray) -> np.ndarray:
    return np.asarray(a).astype(np.float16).view(U16).astype(U32)


vector("v_cvt_f32_u32", "f32 = u32")(lambda a: a.astype(F32))
vector("v_cvt_f32_i32", "f32 = i32")(lambda a: a.astype(F32))
vector("v_cvt_u32_f32", "u32 = f32")(lambda a: _to_integer(a, 0, 2**32 - 1, U32))
vector("v_cvt_i32_f32", "i32 = f32")(lambda a: _to_integer(a, -(2**31), 2**31 - 1, I32))
vector("v_cvt_f32_f16", "f32 = f16")(lambda a: a.astype(F32))
vector("v_cvt_f16_f32", "f16 = f32")(lambda a: a.astype(np.float16))
vector("v_cvt_f64_f32", "f64 = f32")(lambda a: a.astype(np.float64))
vector("v_cvt_f32_f64", "f32 = f64")(lambda a: a.astype(F32))
vector("v_cvt_f64_i32", "f64 = i32")(lambda a: a.astype(np.float64))
vector("v_cvt_f64_u32", "f64 = u32")(lambda a: a.astype(np.float64))
vector("v_cvt_pk_bf16_f32", "u32 = f32, f32")(lambda a, b: bf16_bits(a) | bf16_bits(b) << U32(16))
vector("v_cvt_pk_f16_f32", "u32 = f32, f32")(lambda a, b: _f16_bits(a) | _f16_bits(b) << U32(16))
for _i in range(4):
    vector(f"v_cvt_f32_ubyte{_i}", "f32 = u32")(lambda a, shift=U32(8 * _i): (a >> shift & U32(255)).astype(F32))


def _scale_of(bits: np.ndarray) -> np.ndarray:
    """The power of two that a scalef32 operand stands for: the exponent of a float32; 0xFF is NaN."""
    exponent = np.asarray(bits) >> U32(23) & U32(255)
    return np.where(exponent == 255, np.nan, np.ldexp(1.0, exponent.astype(I32) - 127))


def _from_fp8(names: str, format_: str, result: str, scaled: bool) -> None:
    """Two values of half a register (chosen by op_sel), times the scale."""

    @define(names, "valu")
    def _(instruction):
        operands, modifiers = instruction.operands, instruction.modifiers
        high = U32(16 * bool((modifiers.get("op_sel") or (0,))[0]))
        if instruction.encoding == "sdwa":
            high = U32(_SELECT[modifiers.get("src0_sel", "DWORD")][0])
        bits = vector_source(operands[1], "u32")
        scale = vector_source(operands[2], "u32") if scaled else lambda m: U32(127 << 23)
        dest, table = operands[0].index, DECODE[format_]

        def run(m):
            word, factor = bits(m) >> high, _scale_of(scale(m))
            low, up = ((table[word >> U32(8 * i) & U32(255)] * factor).astype(F32) for i in range(2))
            if result == "f32":
                m.write_v(dest, low)
                m.write_v(dest + 1, up)
            else:
                to_bits = bf16_bits if result == "bf16" else _f16_bits
                m.write_v(dest, to_bits(low) | to_bits(up) << U32(16))

        return run


for _format in ("fp8", "bf8"):
    _from_fp8(f"v_cvt_pk_f32_{_format}", _format, "f32", False)
    for _result in ("f32", "bf16", "f16"):
        _from_fp8(f"v_cvt_scalef32_pk_{_result}_{_format}", _format, _result, True)


def _to_fp8(names: str, format_: str, scaled: bool) -> None:
    """Two float32 values, divided by the scale, to the half of the register that op_sel chooses; the other stays."""

    @define(names, "valu", reads_dest=True)
    def _(instruction):
        operands = instruction.operands
        op_sel = instruction.modifiers.get("op_sel", ())
        shift = U32(16 * bool(op_sel and op_sel[-1]))
        a, b = (vector_source(one, "f32") for one in operands[1:3])
        scale = vector_source(operands[3], "u32") if scaled else lambda m: U32(127 << 23)
        dest = operands[0].index

        def run(m):
            factor = _scale_of(scale(m))
            values = [x(m).astype(np.float64) / factor for x in (a, b)]
            limit = np.where(m.saturates[m.waves], LARGEST[format_], np.inf)[:, None]
            values = [np.where(np.isinf(x), x, np.clip(x, -limit, limit)) for x in values]
            codes = [encode(x, format_).astype(U32) for x in values]
            word = (codes[0] | codes[1] << U32(8)) << shift
            m.write_v(dest, word | m.v[dest, m.waves] & U32(0xFFFF << (16 - int(shift))))

        return run


for _format in ("fp8", "bf8"):
    _to_fp8(f"v_cvt_pk_{_format}_f32", _format, False)
    _to_fp8(f"v_cvt_scalef32_pk_{_format}_f32", _format, True)


# --- packed


def _packed(names: str, element: str, count: int, plain: Callable, clamped: Callable | None = None) -> None:
    """One operation on two elements; op_sel and op_sel_hi choose each operand's element for the low and high result."""

    @define(names, "valu")
    def _(instruction):
        modifiers, sources = instruction.modifiers, instruction.operands[1:]
        function = clamped if modifiers.get("clamp") else plain
        if len(sources) != count or function is None:
            raise AssemblyError(f"{instruction}: form is not known")
        wide = np.dtype(DTYPES[element]).itemsize == 4
        halves = []
        for which, default, sign in (("op_sel", 0, "neg_lo"), ("op_sel_hi", 1, "neg_hi")):
            select = modifiers.get(which, (default,) * count)
            negative = modifiers.get(sign, (0,) * count)
            chosen = []
            for one, high, neg in zip(sources, select, negative):
                if one.kind == "imm":
                    if high and one.value:
                        if element not in ("u16", "i16") or isinstance(one.value, float) or one.value < 0:
                            raise AssemblyError(f"{instruction}: the high half of a constant")
                        one = Operand("imm", value=one.value >> 16)  # a constant has 32 bits
                    source = vector_source(one, element)
                elif wide:
                    source = vector_source(Operand(one.kind, one.index + bool(high)), element)
                else:
                    source = vector_source(Operand(one.kind, one.index), element, high=bool(high))
                chosen.append((lambda m, f=source: -f(m)) if neg else source)
            halves.append(chosen)
        dest = instruction.operands[0].index
        if wide:
            instruction.matters = tuple(
                one.index + bool(high) + SGPR * (one.kind == "s")
                for which, default in (("op_sel", 0), ("op_sel_hi", 1))
                for one, high in zip(sources, modifiers.get(which, (default,) * count))
                if one.kind in "vs"
            )

        def run(m):
            low, high = (function(*[source(m) for source in half]) for half in halves)
            if wide:
                m.write_v(dest, low)
                m.write_v(dest + 1, high)
            else:
                m.write_v(dest, low.view(U16).astype(U32) | high.view(U16).astype(U32) << U32(16))

        return run


_packed("v_pk_add_f32", "f32", 2, np.add)
_packed("v_pk_mul_f32", "f32", 2, np.multiply)
_packed("v_pk_fma_f32", "f32", 3, fma32)
_packed("v_pk_add_f16", "f16", 2, np.add)
_packed("v_pk_mul_f16", "f16", 2, np.multiply)
_packed("v_pk_max_f16", "f16", 2, np.fmax)
_packed("v_pk_min_f16", "f16", 2, np.fmin)
_packed("v_pk_add_u16", "u16", 2, np.add)
_packed("v_pk_sub_u16", "u16", 2, np.subtract, lambda a, b: np.maximum(a, b) - b)
_packed("v_pk_mul_lo_u16", "u16", 2, np.multiply)
_packed("v_pk_max_u16", "u16", 2, np.maximum)
_packed("v_pk_min_u16", "u16", 2, np.minimum)
_packed("v_pk_max_i16", "i16", 2, np.maximum)
_packed("v_pk_min_i16", "i16", 2, np.minimum)
_packed("v_pk_lshlrev_b16", "u16", 2, lambda a, b: b << (a & U16(15)))
_packed("v_pk_lshrrev_b16", "u16", 2, lambda a, b: b >> (a & U16(15)))
_packed("v_pk_ashrrev_i16", "i16", 2, lambda a, b: b >> (a & np.int16(15)))


@define("v_pk_mov_b32", "valu")
def _(instruction):
    """Low result: the half of source 0 that op_sel chooses; high: of source 1, by op_sel_hi as it applies to it."""
    dest, a, b = instruction.operands
    op_sel = instruction.modifiers.get("op_sel", (0, 0))
    low, high = (vector_source(Operand(x.kind, x.index + s), "u32") for x, s in zip((a, b), op_sel))

    def run(m):
        first, second = low(m).copy(), high(m).copy()
        m.write_v(dest.index, first)
        m.write_v(dest.index + 1, second)

    return run


# --- between lanes


@define("v_readfirstlane_b32", "valu")
def _(instruction):
    source, write = vector_source(instruction.operands[1], "u32"), scalar_dest(instruction.operands[0])

    def run(m):
        lane = m.active().argmax(1)  # lane 0 where none is active
        if m.undefined:
            m.undefined.between_lanes(m, instruction, lane)
        write(m, np.broadcast_to(source(m), (m.n, 64))[np.arange(m.n), lane])

    return run


@define("v_readlane_b32", "valu")
def _(instruction):
    dest, vector_, lane = instruction.operands
    source, select, write = vector_source(vector_, "u32"), scalar_source(lane, "u32"), scalar_dest(dest)

    def run(m):
        lanes = np.broadcast_to(select(m) & U32(63), (m.n,))
        if m.undefined:
            m.undefined.between_lanes(m, instruction, lanes)
        write(m, source(m)[np.arange(m.n), lanes])

    return run


@define("v_writelane_b32", "valu", reads_dest=True)
def _(instruction):
    dest, value, lane = instruction.operands
    source, select, register = scalar_source(value, "u32"), scalar_source(lane, "u32"), dest.index

    def run(m):
        lanes = np.broadcast_to(select(m) & U32(63), (m.n,))
        if m.undefined:
            m.undefined.between_lanes(m, instruction, lanes)
        m.v[register, m.wave_ids, lanes] = source(m)

    return run


def swap_rows(a: np.ndarray, b: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The odd groups of ``width`` lanes of a [n, 64] change places with the even groups of b."""
    a, b = a.reshape(-1, 32 // width, 2, width).copy(), b.reshape(-1, 32 // width, 2, width).copy()
    a[:, :, 1], b[:, :, 0] = b[:, :, 0].copy(), a[:, :, 1].copy()
    return a.reshape(-1, 64), b.reshape(-1, 64)


@define("v_permlane16_swap_b32 v_permlane32_swap_b32", "valu", reads_dest=True, writes_sources=True)
def _(instruction):
    a, b = (one.index for one in instruction.operands)
    width = int(instruction.name[10:12])

    def run(m):
        first, second = swap_rows(m.v[a, m.waves], m.v[b, m.waves], width)
        m.write_v(a, first)
        m.write_v(b, second)

    return run


@define("v_swap_b32", "valu", reads_dest=True, writes_sources=True)
def _(instruction):
    a, b = (one.index for one in instruction.operands)

    def run(m):
        first, second = m.v[a, m.waves].copy(), m.v[b, m.waves].copy()
        m.write_v(a, second)
        m.write_v(b, first)

    return run


define("v_nop", "none", dests=0)(lambda instruction: lambda m: None)
