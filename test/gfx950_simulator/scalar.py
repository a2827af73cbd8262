"""Scalar instructions and control flow: SOP1, SOP2, SOPC, SOPK and SOPP.

Semantics: AMD, "CDNA4 Instruction Set Architecture" reference guide, chapters 4 (program flow) and 5 (scalar ALU).
"""

from collections.abc import Callable

import numpy as np

from .assembly import EXEC, VCC, AssemblyError, Operand
from .operands import DTYPES, SGPR, TABLE, Definition, define, scalar_dest, scalar_source

U32, I32, U64, I64 = np.uint32, np.int32, np.uint64, np.int64
_VCC, _EXEC = (SGPR + VCC, SGPR + VCC + 1), (SGPR + EXEC, SGPR + EXEC + 1)


def scalar(names: str, signature: str, scc: Callable | str | None = None) -> Callable:
    """Enter a function of arrays [waves]: ``signature`` is ``"u32 = u32, u32"``; ``scc``: None (kept), ``nonzero`` (the
    result is not 0) or ``returned`` (the function gives the result and SCC)."""
    result, _, types = signature.partition(" = ")
    types = types.split(", ")
    size = np.dtype(DTYPES[result]).itemsize

    def enter(function):
        def build(instruction):
            dest, *operands = instruction.operands
            if len(operands) != len(types):
                raise AssemblyError(f"{instruction}: {len(operands)} sources where {len(types)} are expected")
            sources = [scalar_source(one, type_) for one, type_ in zip(operands, types)]
            write = scalar_dest(dest, size)

            def run(m):
                values = function(*[source(m) for source in sources])
                if scc == "returned":
                    values, m.scc[m.waves] = values
                elif scc == "nonzero":
                    m.scc[m.waves] = values != 0
                write(m, values)

            return run

        for name in names.split():
            TABLE[name] = Definition(build, "salu", writes_scc=scc is not None)
        return function

    return enter


def _carried(total):
    """The low word of a sum, and whether it is all."""
    return total.astype(U32), total > U64(0xFFFFFFFF)


def _unsigned_add(a, b):
    return _carried(np.asarray(a).astype(U64) + b)


def _unsigned_subtract(a, b):
    return a - b, np.less(a, b)


def _signed(function: Callable) -> Callable:
    """SCC is the overflow."""

    def compute(a, b):
        exact = function(np.asarray(a).astype(I64), np.asarray(b).astype(I64))
        result = exact.astype(I32)
        return result, result != exact

    return compute


scalar("s_add_u32", "u32 = u32, u32", "returned")(_unsigned_add)
scalar("s_sub_u32", "u32 = u32, u32", "returned")(_unsigned_subtract)
scalar("s_add_i32", "i32 = i32, i32", "returned")(_signed(np.add))
scalar("s_sub_i32", "i32 = i32, i32", "returned")(_signed(np.subtract))
scalar("s_mul_i32", "i32 = i32, i32")(np.multiply)
scalar("s_mul_hi_u32", "u32 = u32, u32")(lambda a, b: (np.asarray(a).astype(U64) * b >> U64(32)).astype(U32))
scalar("s_mul_hi_i32", "i32 = i32, i32")(lambda a, b: (np.asarray(a).astype(I64) * b >> 32).astype(I32))
scalar("s_min_u32", "u32 = u32, u32", "returned")(lambda a, b: (np.minimum(a, b), a < b))
scalar("s_max_u32", "u32 = u32, u32", "returned")(lambda a, b: (np.maximum(a, b), a > b))
scalar("s_min_i32", "i32 = i32, i32", "returned")(lambda a, b: (np.minimum(a, b), a < b))
scalar("s_max_i32", "i32 = i32, i32", "returned")(lambda a, b: (np.maximum(a, b), a > b))
scalar("s_abs_i32", "i32 = i32", "nonzero")(np.abs)
scalar("s_sext_i32_i16", "i32 = u32")(lambda a: a.astype(np.int16).astype(I32))
scalar("s_sext_i32_i8", "i32 = u32")(lambda a: a.astype(np.int8).astype(I32))
scalar("s_mov_b32", "u32 = u32")(lambda a: a)
scalar("s_mov_b64", "u64 = u64")(lambda a: a)
scalar("s_brev_b32", "u32 = u32")(lambda a: _reverse(a))
scalar("s_pack_ll_b32_b16", "u32 = u32, u32")(lambda a, b: a & U32(0xFFFF) | b << U32(16))
scalar("s_pack_lh_b32_b16", "u32 = u32, u32")(lambda a, b: a & U32(0xFFFF) | b & U32(0xFFFF0000))
scalar("s_pack_hh_b32_b16", "u32 = u32, u32")(lambda a, b: a >> U32(16) | b & U32(0xFFFF0000))
scalar("s_bfm_b32", "u32 = u32, u32")(lambda a, b: ((U32(1) << (a & U32(31))) - U32(1)) << (b & U32(31)))
scalar("s_ashr_i32", "i32 = i32, u32", "nonzero")(lambda a, b: a >> (b & U32(31)).astype(I32))
scalar("s_ashr_i64", "i64 = i64, u32", "nonzero")(lambda a, b: a >> (b & U32(63)).astype(I64))
for _n in (1, 2, 3, 4):
    scalar(f"s_lshl{_n}_add_u32", "u32 = u32, u32", "returned")(
        lambda a, b, n=_n: _carried((np.asarray(a).astype(U64) << U64(n)) + b)
    )


def _reverse(a: np.ndarray) -> np.ndarray:
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F)):
        a = (a >> U32(shift) & U32(mask)) | (a & U32(mask)) << U32(shift)
    return np.asarray(a).byteswap()


for _bits, _dtype in (("32", U32), ("64", U64)):
    for _name, _function in (
        ("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor), ("andn2", lambda a, b: a & ~b),
        ("orn2", lambda a, b: a | ~b), ("nand", lambda a, b: ~(a & b)), ("nor", lambda a, b: ~(a | b)),
        ("xnor", lambda a, b: ~(a ^ b)),
    ):  # fmt: skip
        scalar(f"s_{_name}_b{_bits}", f"u{_bits} = u{_bits}, u{_bits}", "nonzero")(_function)
        if _bits == "64":

            def _saveexec(instruction, function=_function):
                """dest = EXEC, then EXEC = function(source, EXEC)."""
                source, write = scalar_source(instruction.operands[1], "u64"), scalar_dest(instruction.operands[0], 8)

                def run(m):
                    old = m.s64[m.waves, EXEC // 2].copy()
                    new = np.broadcast_to(function(source(m), old), old.shape).copy()
                    write(m, old)
                    m.s64[m.waves, EXEC // 2] = new
                    m.scc[m.waves] = new != 0
                    m.exec_changed()

                return run

            TABLE[f"s_{_name}_saveexec_b64"] = Definition(_saveexec, "salu", writes_scc=True, implicit=_EXEC)
    _mask = _dtype(int(_bits) - 1)
    scalar(f"s_not_b{_bits}", f"u{_bits} = u{_bits}", "nonzero")(lambda a: ~a)
    scalar(f"s_lshl_b{_bits}", f"u{_bits} = u{_bits}, u32", "nonzero")(
        lambda a, b, mask=_mask, dtype=_dtype: a << (b.astype(dtype) & mask)
    )
    scalar(f"s_lshr_b{_bits}", f"u{_bits} = u{_bits}, u32", "nonzero")(
        lambda a, b, mask=_mask, dtype=_dtype: a >> (b.astype(dtype) & mask)
    )
    scalar(f"s_bcnt1_i32_b{_bits}", f"u32 = u{_bits}", "nonzero")(lambda a: np.bitwise_count(a).astype(U32))
    scalar(f"s_ff1_i32_b{_bits}", f"i32 = u{_bits}")(
        lambda a, one=_dtype(1): np.where(a == 0, I32(-1), np.bitwise_count((a & (~a + one)) - one).astype(I32))
    )
    scalar(f"s_flbit_i32_b{_bits}", f"i32 = u{_bits}")(
        lambda a, bits=int(_bits): np.array([bits - int(x).bit_length() if x else -1 for x in np.atleast_1d(a)], I32)
    )


@scalar("s_bfe_u32", "u32 = u32, u32", "nonzero")
def _(a, field):
    width = np.minimum(field >> U32(16) & U32(127), U32(32)).astype(U64)
    return (np.asarray(a).astype(U64) >> (field & U32(31)).astype(U64) & ((U64(1) << width) - U64(1))).astype(U32)


@scalar("s_bfe_i32", "i32 = i32, u32", "nonzero")
def _(a, field):
    width = np.minimum(field >> U32(16) & U32(127), U32(32)).astype(I64)
    up = np.where(width == 0, I64(63), I64(64) - width)
    value = (np.asarray(a).astype(I64) >> (field & U32(31)).astype(I64)) << up >> up
    return np.where(width == 0, I64(0), value).astype(I32)


def _carry(name: str, function: Callable) -> None:
    @define(name, "salu", writes_scc=True)
    def _(instruction):
        a, b = (scalar_source(one, "u32") for one in instruction.operands[1:])
        write = scalar_dest(instruction.operands[0])

        def run(m):
            total = function(np.asarray(a(m)).astype(I64), np.asarray(b(m)).astype(I64), m.scc[m.waves].astype(I64))
            m.scc[m.waves] = (total < 0) | (total > 0xFFFFFFFF)
            write(m, np.broadcast_to(total.astype(U32), (m.n,)))

        return run


_carry("s_addc_u32", lambda a, b, c: a + b + c)
_carry("s_subb_u32", lambda a, b, c: a - b - c)


def _short(number: Operand, signed: bool = True) -> np.generic:
    """The 16-bit constant of a SOPK instruction, which the text may give as 0xffc0."""
    value = int(number.value) & 0xFFFF
    return I32(value - 0x10000 if signed and value >= 0x8000 else value)


@define("s_movk_i32", "salu")
def _(instruction):
    dest, number = instruction.operands
    value, write = _short(number), scalar_dest(dest)
    return lambda m: write(m, value)


@define("s_addk_i32 s_mulk_i32", "salu", reads_dest=True, writes_scc=True)
def _(instruction):
    dest, number = instruction.operands
    value = I64(_short(number))
    source, write, adds = scalar_source(dest, "i32"), scalar_dest(dest), instruction.name == "s_addk_i32"

    def run(m):
        exact = source(m).astype(I64) + value if adds else source(m).astype(I64) * value
        result = exact.astype(I32)
        if adds:
            m.scc[m.waves] = result != exact
        write(m, result)

    return run


for _bits in ("32", "64"):

    @define(f"s_cselect_b{_bits}", "salu")
    def _(instruction, bits=_bits):
        a, b = (scalar_source(one, f"u{bits}") for one in instruction.operands[1:])
        write = scalar_dest(instruction.operands[0], int(bits) // 8)
        return lambda m: write(m, np.where(m.scc[m.waves], a(m), b(m)))

    @define(f"s_cmov_b{_bits}", "salu", reads_dest=True)
    def _(instruction, bits=_bits):
        old, new = (scalar_source(one, f"u{bits}") for one in instruction.operands)
        write = scalar_dest(instruction.operands[0], int(bits) // 8)
        return lambda m: write(m, np.where(m.scc[m.waves], new(m), old(m)))


@define("s_bitset0_b32 s_bitset1_b32", "salu", reads_dest=True)
def _(instruction):
    old, bit = (scalar_source(one, "u32") for one in instruction.operands)
    write, sets = scalar_dest(instruction.operands[0]), instruction.name == "s_bitset1_b32"

    def run(m):
        mask = U32(1) << (bit(m) & U32(31))
        write(m, old(m) | mask if sets else old(m) & ~mask)

    return run


def _compare(names: str, type_: str, function: Callable) -> None:
    @define(names, "salu", dests=0, writes_scc=True)
    def _(instruction):
        a, b = instruction.operands
        left, right = scalar_source(a, type_), scalar_source(b, type_)
        if instruction.name.startswith("s_cmpk"):
            value = _short(b, signed=type_ == "i32").astype(DTYPES[type_])
            right = lambda m: value

        def run(m):
            m.scc[m.waves] = function(left(m), right(m))

        return run


for _name, _function in (
    ("eq", np.equal), ("lg", np.not_equal), ("gt", np.greater), ("ge", np.greater_equal), ("lt", np.less),
    ("le", np.less_equal),
):  # fmt: skip
    for _type in ("i32", "u32"):
        _compare(f"s_cmp_{_name}_{_type} s_cmpk_{_name}_{_type}", _type, _function)
_compare("s_cmp_eq_u64", "u64", np.equal)
_compare("s_cmp_lg_u64", "u64", np.not_equal)
_compare("s_bitcmp0_b32", "u32", lambda a, b: (a >> (b & U32(31)) & U32(1)) == 0)
_compare("s_bitcmp1_b32", "u32", lambda a, b: (a >> (b & U32(31)) & U32(1)) == 1)


# --- flow


def _branch(name: str, condition: Callable, implicit: tuple[int, ...] = ()) -> None:
    @define(name, "flow", dests=0, implicit=implicit)
    def _(instruction):
        target = instruction.target
        following = instruction.index + 1

        def run(m):
            m.pc[m.waves] = np.where(condition(m), target, following)

        return run


_branch("s_branch", lambda m: True)
_branch("s_cbranch_scc0", lambda m: ~m.scc[m.waves])
_branch("s_cbranch_scc1", lambda m: m.scc[m.waves])
_branch("s_cbranch_vccz", lambda m: m.s64[m.waves, VCC // 2] == 0, _VCC)
_branch("s_cbranch_vccnz", lambda m: m.s64[m.waves, VCC // 2] != 0, _VCC)
_branch("s_cbranch_execz", lambda m: m.s64[m.waves, EXEC // 2] == 0, _EXEC)
_branch("s_cbranch_execnz", lambda m: m.s64[m.waves, EXEC // 2] != 0, _EXEC)


@define("s_endpgm", "flow", dests=0)
def _(instruction):
    def run(m):
        m.done[m.waves] = True

    return run


@define("s_setreg_imm32_b32", "salu", dests=0)
def _(instruction):
    """FP16_OVFL only, the way in which LLVM writes it."""
    register, value = (one.value for one in instruction.operands)
    if register != "hwreg(HW_REG_MODE, 23, 1)":
        raise AssemblyError(f"{instruction}: this register is not modelled")

    def run(m):
        m.saturates[m.waves] = bool(value)

    return run


define("s_barrier", "flow", dests=0)(lambda instruction: lambda m: m.at_barrier(instruction))
define(
    "s_waitcnt s_nop s_sleep s_setprio s_sethalt s_inst_prefetch s_icache_inv s_dcache_wb buffer_wbl2 buffer_inv "
    "buffer_wbinvl1",
    "none",
    dests=0,
)(lambda instruction: lambda m: None)
