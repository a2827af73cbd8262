"""Memory instructions: scalar loads, global, flat, buffer and scratch memory, LDS, loads straight to LDS, atomics.

Semantics: AMD, "CDNA4 Instruction Set Architecture" reference guide, chapters 8 (scalar memory), 9 (vector memory
buffers), 10 (flat, global and scratch memory) and 11 (LDS).
"""

import re
from collections.abc import Callable

import numpy as np

from .assembly import M0, AssemblyError, Instruction, Operand
from .operands import DTYPES, SGPR, define, scalar_source, vector_source
from .vector import bf16_bits

U32, U64, I64 = np.uint32, np.uint64, np.int64
LANE = np.arange(64)

# --- how registers hold what memory holds: suffix -> (bytes, how a load extends it, whether a store takes bits 31:16)

_LOADS = {
    "ubyte": (1, "u8"), "sbyte": (1, "i8"), "ushort": (2, "u16"), "sshort": (2, "i16"), "dword": (4, ""),
    "dwordx2": (8, ""), "dwordx3": (12, ""), "dwordx4": (16, ""), "ubyte_d16": (1, "u8 low"),
    "ubyte_d16_hi": (1, "u8 high"), "sbyte_d16": (1, "i8 low"), "sbyte_d16_hi": (1, "i8 high"),
    "short_d16": (2, "u16 low"), "short_d16_hi": (2, "u16 high"),
}  # fmt: skip
_STORES = {"byte": (1, False), "byte_d16_hi": (1, True), "short": (2, False), "short_d16_hi": (2, True),
           "dword": (4, False), "dwordx2": (8, False), "dwordx3": (12, False), "dwordx4": (16, False)}  # fmt: skip
_LDS_LOADS = {
    "u8": (1, "u8"), "i8": (1, "i8"), "u16": (2, "u16"), "i16": (2, "i16"), "b32": (4, ""), "b64": (8, ""),
    "b96": (12, ""), "b128": (16, ""), "u8_d16": (1, "u8 low"), "u8_d16_hi": (1, "u8 high"), "i8_d16": (1, "i8 low"),
    "i8_d16_hi": (1, "i8 high"), "u16_d16": (2, "u16 low"), "u16_d16_hi": (2, "u16 high"),
}  # fmt: skip
_LDS_STORES = {"b8": (1, False), "b8_d16_hi": (1, True), "b16": (2, False), "b16_d16_hi": (2, True), "b32": (4, False),
               "b64": (8, False), "b96": (12, False), "b128": (16, False)}  # fmt: skip


def _put(m, register: int, data: np.ndarray, unwritten: np.ndarray | None, extend: str, rows, lanes) -> None:
    """Bytes [k, nbytes] that were loaded for (rows, lanes) to registers."""
    undefined = None
    if extend:
        kind, _, half = extend.partition(" ")
        dtype = np.dtype({"u8": "u1", "i8": "i1", "u16": "u2", "i16": "i2"}[kind])
        words = np.ascontiguousarray(data).view(dtype).astype(np.int32).view(U32)
        if half:
            old = m.v[register, m.wave_ids[rows], lanes][:, None]
            low, high = (old, words) if half == "high" else (words, old >> U32(16))
            words = low & U32(0xFFFF) | high << U32(16)
    else:
        words = np.ascontiguousarray(data).view(U32)
    if unwritten is not None:
        undefined = unwritten.reshape(len(words), words.shape[1], -1).any(2)
    whole = len(words) == m.n * 64
    for i in range(words.shape[1]):
        if whole:
            m.v[register + i, m.waves] = words[:, i].reshape(m.n, 64)
        else:
            m.v[register + i, m.wave_ids[rows], lanes] = words[:, i]
        if m.undefined:
            keep = extend.endswith(("low", "high"))
            m.undefined.loaded(m, register + i, None if undefined is None else undefined[:, i], rows, lanes, keep)


def _take(m, operand: Operand, nbytes: int, high: bool, rows, lanes) -> tuple[np.ndarray, np.ndarray | None]:
    """Bytes [k, nbytes] to store from registers, and which have no defined value."""
    count = max(1, nbytes // 4)
    words = np.stack([m.v[operand.index + i, m.waves][rows, lanes] for i in range(count)], 1)
    if high:
        words >>= U32(16)
    undefined = None
    if m.undefined:
        parts = [m.undefined.lanes(m, operand.index + i) for i in range(count)]
        if any(part is not None for part in parts):
            empty = np.zeros((m.n, 64), bool)
            chosen = np.stack([(empty if part is None else part)[rows, lanes] for part in parts], 1)
            undefined = np.repeat(chosen, min(4, nbytes), 1) if chosen.any() else None
    return words.view(np.uint8)[:, :nbytes], undefined


# --- scalar loads


def _scalar_load(count: int) -> None:
    @define("s_load_dword" + (f"x{count}" if count > 1 else ""), "smem")
    def _(instruction):
        dest, base, offset = instruction.operands
        address, add = scalar_source(base, "u64"), scalar_source(offset, "u32")
        fixed = instruction.modifiers.get("offset", 0)
        needed = [*base.registers, *(offset.registers if offset.kind == "s" else ())]

        def run(m):
            if m.undefined:
                m.undefined.require_scalar(m, instruction, needed, "an address")
            index = np.broadcast_to((address(m) + add(m) + U64(fixed) & ~U64(3)).view(I64) - m.memory.BASE, (m.n,))
            data, unwritten = m.load(instruction, "global", index, 4 * count, np.arange(m.n))
            m.s[m.waves, dest.index : dest.index + count] = np.ascontiguousarray(data).view(U32)
            if m.undefined:
                m.undefined.loaded_scalar(m, dest.index, count, unwritten)

        return run


for _count in (1, 2, 4, 8, 16):
    _scalar_load(_count)


# --- addresses: functions of the machine that give (index [k], rows, lanes, in range [k] or None)


def _required(m, instruction: Instruction, operand: Operand, rows, lanes) -> None:
    if m.undefined:
        for register in operand.registers if operand.kind == "v" else ():
            m.undefined.require(m, instruction, register, rows, lanes, "an address")
        if operand.kind == "s":
            m.undefined.require_scalar(m, instruction, list(operand.registers), "an address")


def _global_address(instruction: Instruction, vaddr: Operand, saddr: Operand | None) -> Callable:
    offset = I64(instruction.modifiers.get("offset", 0))
    scalar = saddr is not None and saddr.kind == "s"
    vector = vector_source(vaddr, "u32" if scalar else "u64")
    base = scalar_source(saddr, "u64") if scalar else None

    def address(m):
        rows, lanes = m.active_lanes
        _required(m, instruction, vaddr, rows, lanes)
        where = np.broadcast_to(vector(m), (m.n, 64)).astype(I64)
        if scalar:
            _required(m, instruction, saddr, rows, lanes)
            where = where + base(m).view(I64)[:, None]
        return (where + (offset - m.memory.BASE))[rows, lanes], rows, lanes, None

    return address


def _buffer_address(instruction: Instruction, operands: list[Operand], nbytes: int) -> Callable:
    """Of a raw buffer: base + offset + soffset, where offset + soffset beyond num_records reads 0, stores nothing."""
    vaddr, resource, soffset = operands
    modifiers = instruction.modifiers
    if modifiers.get("idxen"):
        raise AssemblyError(f"{instruction}: structured buffers are not modelled")
    fixed = I64(modifiers.get("offset", 0))
    voffset = vector_source(vaddr, "u32") if modifiers.get("offen") else lambda m: np.zeros((1, 1), U32)
    words = [scalar_source(Operand("s", resource.index + i), "u32") for i in range(3)]
    scalar = scalar_source(soffset, "u32")

    def address(m):
        rows, lanes = m.active_lanes
        for operand in (vaddr, resource, soffset):
            _required(m, instruction, operand, rows, lanes)
        low, high, records = (word(m).astype(I64)[:, None] for word in words)
        within = np.broadcast_to(voffset(m), (m.n, 64)).astype(I64) + fixed
        within = within + (scalar(m).astype(I64)[:, None] if soffset.kind == "s" else I64(scalar(m)))
        base = low | (high & 0xFFFF) << 32
        index = (base + within - m.memory.BASE)[rows, lanes]
        inside = (within + nbytes <= records)[rows, lanes]
        return index, rows, lanes, None if inside.all() else inside

    return address


def _scratch_address(instruction: Instruction, vaddr: Operand, saddr: Operand) -> Callable:
    offset = I64(instruction.modifiers.get("offset", 0))
    parts = [vector_source(one, "u32") for one in (vaddr, saddr) if one.kind in "vs"]

    def address(m):
        rows, lanes = m.active_lanes
        within = np.full((m.n, 64), offset)
        for part in parts:
            within = within + part(m).astype(I64)
        outside = (within < 0) | (within >= m.scratch_bytes)
        index = np.where(outside, -1, within + m.scratch_base[m.waves])
        return index[rows, lanes], rows, lanes, None

    return address


def _lds_address(instruction: Instruction, vaddr: Operand, offset: int, nbytes: int) -> Callable:
    source = vector_source(vaddr, "u32")

    def address(m):
        rows, lanes = m.active_lanes
        _required(m, instruction, vaddr, rows, lanes)
        within = (np.broadcast_to(source(m), (m.n, 64)).astype(I64) + offset)[rows, lanes]
        return _lds_index(m, within, nbytes, rows, lanes), rows, lanes, None

    return address


def _lds_index(m, within: np.ndarray, nbytes: int, rows: np.ndarray, lanes: np.ndarray) -> np.ndarray:
    """Addresses [k] in a workgroup's LDS -> indices in that of all workgroups."""
    index = m.lds_base[m.wave_ids[rows]] + within
    inside = (within >= 0) & (within + nbytes <= m.lds_bytes)
    if not inside.all():
        m.outside_lds(within, nbytes, rows, lanes, ~inside)
    return index


# --- loads and stores


def _loader(instruction: Instruction, space: str, address: Callable, dest: int, nbytes: int, extend: str) -> Callable:
    def run(m):
        index, rows, lanes, inside = address(m)
        if inside is None:
            data, unwritten = m.load(instruction, space, index, nbytes, rows, lanes)
        else:
            data, unwritten = np.zeros((index.size, nbytes), np.uint8), None
            read, missing = m.load(instruction, space, index[inside], nbytes, rows[inside], lanes[inside])
            data[inside] = read
            if missing is not None:
                unwritten = np.zeros(data.shape, bool)
                unwritten[inside] = missing
        _put(m, dest, data, unwritten, extend, rows, lanes)

    return run


def _storer(
    instruction: Instruction, space: str, address: Callable, data: Operand, nbytes: int, high: bool
) -> Callable:
    def run(m):
        index, rows, lanes, inside = address(m)
        if inside is not None:
            index, rows, lanes = index[inside], rows[inside], lanes[inside]
        values, undefined = _take(m, data, nbytes, high, rows, lanes)
        if undefined is not None and space == "global":
            m.undefined.report(m, instruction, rows, lanes, undefined.any(1), "what is stored")
        m.store(instruction, space, index, values, rows, lanes, undefined)

    return run


def _lds_loader(instruction: Instruction, address: Callable, nbytes: int) -> Callable:
    """Memory to LDS: lane i's bytes go to M0 + offset + i * nbytes."""
    offset = instruction.modifiers.get("offset", 0)

    def run(m):
        index, rows, lanes, inside = address(m)
        if m.undefined:
            m.undefined.require_scalar(m, instruction, [M0], "an LDS address")
        data, unwritten = np.zeros((index.size, nbytes), np.uint8), np.zeros((index.size, nbytes), bool)
        chosen = np.ones(index.size, bool) if inside is None else inside
        read, missing = m.load(instruction, "global", index[chosen], nbytes, rows[chosen], lanes[chosen])
        data[chosen] = read
        if missing is not None:
            unwritten[chosen] = missing
        within = m.s[m.waves, M0].astype(I64)[rows] + offset + lanes * nbytes
        to = _lds_index(m, within, nbytes, rows, lanes)
        m.store(instruction, "lds", to, data, rows, lanes, unwritten if missing is not None else None)

    return run


for _name, (_nbytes, _extend) in _LOADS.items():

    @define(f"global_load_{_name} flat_load_{_name}", "vmem")
    def _(instruction, nbytes=_nbytes, extend=_extend):
        dest, vaddr, *saddr = instruction.operands
        address = _global_address(instruction, vaddr, saddr[0] if saddr else None)
        return _loader(instruction, "global", address, dest.index, nbytes, extend)

    @define(f"scratch_load_{_name}", "vmem")
    def _(instruction, nbytes=_nbytes, extend=_extend):
        dest, vaddr, saddr = instruction.operands
        return _loader(instruction, "scratch", _scratch_address(instruction, vaddr, saddr), dest.index, nbytes, extend)

    @define(f"buffer_load_{_name}", "vmem")
    def _(instruction, nbytes=_nbytes, extend=_extend):
        if instruction.modifiers.get("lds"):
            return _lds_loader(instruction, _buffer_address(instruction, instruction.operands, nbytes), nbytes)
        dest, *address = instruction.operands
        address = _buffer_address(instruction, address, nbytes)
        return _loader(instruction, "global", address, dest.index, nbytes, extend)


for _name, (_nbytes, _high) in _STORES.items():

    @define(f"global_store_{_name} flat_store_{_name}", "vmem", dests=0)
    def _(instruction, nbytes=_nbytes, high=_high):
        vaddr, data, *saddr = instruction.operands
        address = _global_address(instruction, vaddr, saddr[0] if saddr else None)
        return _storer(instruction, "global", address, data, nbytes, high)

    @define(f"scratch_store_{_name}", "vmem", dests=0)
    def _(instruction, nbytes=_nbytes, high=_high):
        vaddr, data, saddr = instruction.operands
        return _storer(instruction, "scratch", _scratch_address(instruction, vaddr, saddr), data, nbytes, high)

    @define(f"buffer_store_{_name}", "vmem", dests=0)
    def _(instruction, nbytes=_nbytes, high=_high):
        data, *address = instruction.operands
        return _storer(instruction, "global", _buffer_address(instruction, address, nbytes), data, nbytes, high)


for _name, _nbytes in (("dword", 4), ("dwordx3", 12), ("dwordx4", 16)):

    @define(f"global_load_lds_{_name}", "vmem", dests=0, implicit=(SGPR + M0,))
    def _(instruction, nbytes=_nbytes):
        vaddr, *saddr = instruction.operands
        return _lds_loader(instruction, _global_address(instruction, vaddr, saddr[0] if saddr else None), nbytes)


# --- LDS

for _name, (_nbytes, _extend) in _LDS_LOADS.items():

    @define(f"ds_read_{_name}", "ds")
    def _(instruction, nbytes=_nbytes, extend=_extend):
        dest, vaddr = instruction.operands
        address = _lds_address(instruction, vaddr, instruction.modifiers.get("offset", 0), nbytes)
        return _loader(instruction, "lds", address, dest.index, nbytes, extend)


for _name, (_nbytes, _high) in _LDS_STORES.items():

    @define(f"ds_write_{_name}", "ds", dests=0)
    def _(instruction, nbytes=_nbytes, high=_high):
        vaddr, data = instruction.operands
        address = _lds_address(instruction, vaddr, instruction.modifiers.get("offset", 0), nbytes)
        return _storer(instruction, "lds", address, data, nbytes, high)


def _offsets(instruction: Instruction, nbytes: int) -> list[int]:
    unit = nbytes * (64 if "st64" in instruction.name else 1)
    return [instruction.modifiers.get(f"offset{i}", 0) * unit for i in range(2)]


for _bits in (32, 64):

    @define(f"ds_read2_b{_bits} ds_read2st64_b{_bits}", "ds")
    def _(instruction, nbytes=_bits // 8):
        dest, vaddr = instruction.operands
        addresses = [_lds_address(instruction, vaddr, offset, nbytes) for offset in _offsets(instruction, nbytes)]

        def run(m):
            found = [address(m) for address in addresses]
            loaded = [m.load(instruction, "lds", index, nbytes, rows, lanes) for index, rows, lanes, _ in found]
            for i, ((data, unwritten), (_, rows, lanes, _)) in enumerate(zip(loaded, found)):
                _put(m, dest.index + i * nbytes // 4, data, unwritten, "", rows, lanes)

        return run

    @define(f"ds_write2_b{_bits} ds_write2st64_b{_bits}", "ds", dests=0)
    def _(instruction, nbytes=_bits // 8):
        vaddr, *data = instruction.operands
        stores = [
            _storer(instruction, "lds", _lds_address(instruction, vaddr, offset, nbytes), one, nbytes, False)
            for offset, one in zip(_offsets(instruction, nbytes), data)
        ]

        def run(m):
            for store in stores:
                store(m)

        return run


for _bits in (16, 8, 4):

    @define(f"ds_read_b64_tr_b{_bits}", "ds")
    def _(instruction, bits=_bits):
        """Each 16 lanes read 16 x 64 bits: a matrix of 64 / bits rows of 16 elements; lane i gets column i."""
        dest, vaddr = instruction.operands
        address = _lds_address(instruction, vaddr, instruction.modifiers.get("offset", 0), 8)
        rows_, element = 64 // bits, {16: np.uint16, 8: np.uint8, 4: np.uint8}[bits]

        def transposed(data):
            groups = np.ascontiguousarray(data).view(element)
            if bits == 4:
                groups = np.stack((groups & 15, groups >> 4), -1)
            columns = groups.reshape(-1, rows_, 16).swapaxes(1, 2)
            if bits == 4:
                columns = columns[..., 0::2] | columns[..., 1::2] << 4
            return np.ascontiguousarray(columns).view(np.uint8).reshape(-1, 8)

        def run(m):
            if m.mask is not None:
                raise AssemblyError("a transposed read with inactive lanes")
            index, rows, lanes, _ = address(m)
            data, unwritten = m.load(instruction, "lds", index, 8, rows, lanes)
            if unwritten is not None:
                unwritten = transposed(unwritten * np.uint8(255)) != 0
            _put(m, dest.index, transposed(data), unwritten, "", rows, lanes)

        return run


# --- between lanes, through the LDS crossbar


def _crossbar(m, dest: int, data: int, source: np.ndarray, valid: np.ndarray) -> None:
    """Lane i of ``dest`` gets lane source[:, i] [n, 64] of ``data``, or 0 where that is not valid."""
    rows = np.arange(m.n)[:, None]
    values = np.where(valid, m.v[data, m.waves][rows, source], U32(0))
    if m.undefined:
        lanes = m.undefined.lanes(m, data)
        m.undefined.put(m, dest, None if lanes is None else lanes[rows, source] & valid)
    m.write_v(dest, values)


@define("ds_bpermute_b32", "ds")
def _(instruction):
    dest, address, data = instruction.operands
    source, offset = vector_source(address, "u32"), U32(instruction.modifiers.get("offset", 0))

    def run(m):
        lanes = np.broadcast_to((source(m) + offset >> U32(2) & U32(63)).astype(I64), (m.n, 64))
        valid = np.ones((m.n, 64), bool) if m.mask is None else np.take_along_axis(m.mask, lanes, 1)
        _crossbar(m, dest.index, data.index, lanes, valid)

    return run


@define("ds_permute_b32", "ds")
def _(instruction):
    dest, address, data = instruction.operands
    target, offset = vector_source(address, "u32"), U32(instruction.modifiers.get("offset", 0))

    def run(m):
        lanes = np.broadcast_to((target(m) + offset >> U32(2) & U32(63)).astype(I64), (m.n, 64))
        source, valid = np.zeros((m.n, 64), I64), np.zeros((m.n, 64), bool)
        rows, active = m.active_lanes
        source[rows, lanes[rows, active]] = active
        valid[rows, lanes[rows, active]] = True
        _crossbar(m, dest.index, data.index, source, valid)

    return run


def swizzle_lanes(offset: int | str) -> np.ndarray:
    """The lane that each lane reads: of its 4 (QUAD_PERM) or of its 32, ((lane & and) | or) ^ xor."""
    and_, or_, xor = 31, 0, 0
    if isinstance(offset, int):
        if offset & 0x8000:
            quad = np.array([offset >> 2 * i & 3 for i in range(4)])
            return LANE // 4 * 4 + quad[LANE % 4]
        and_, or_, xor = offset & 31, offset >> 5 & 31, offset >> 10 & 31
    else:
        mode, *numbers = re.match(r"swizzle\((.*)\)", offset).group(1).split(",")
        if mode == "BITMASK_PERM":
            pattern = numbers[0].strip('"')
            and_ = int("".join("01"[c in "pi"] for c in pattern), 2)
            or_ = int("".join("01"[c == "1"] for c in pattern), 2)
            xor = int("".join("01"[c == "i"] for c in pattern), 2)
        elif mode == "QUAD_PERM":
            return LANE // 4 * 4 + np.array([int(x) for x in numbers])[LANE % 4]
        elif mode == "SWAP":
            xor = int(numbers[0])
        elif mode == "REVERSE":
            xor = int(numbers[0]) - 1
        elif mode == "BROADCAST":
            size, lane = map(int, numbers)
            and_, or_ = 31 & ~(size - 1), lane
        else:
            raise AssemblyError(f"ds_swizzle mode {mode} is not known")
    within = LANE % 32
    return LANE // 32 * 32 + (((within & and_) | or_) ^ xor)


@define("ds_swizzle_b32", "ds")
def _(instruction):
    dest, data = instruction.operands
    lanes = swizzle_lanes(instruction.modifiers["offset"])

    def run(m):
        valid = np.ones((m.n, 64), bool) if m.mask is None else m.mask[:, lanes]
        _crossbar(m, dest.index, data.index, np.broadcast_to(lanes, (m.n, 64)), valid)

    return run


# --- atomics


def _pair(function: Callable, decode: Callable, encode: Callable) -> Callable:
    """Of words that hold two 16-bit elements."""

    def compute(old, new):
        halves = [encode(function(decode(old >> U32(s)), decode(new >> U32(s)))) for s in (0, 16)]
        return halves[0] | halves[1] << U32(16)

    return compute


_BF16 = (lambda w: (w << U32(16)).view(np.float32), bf16_bits)
_F16 = (lambda w: w.astype(np.uint16).view(np.float16), lambda x: x.view(np.uint16).astype(U32))
_OPERATIONS = {
    "add": ("u32", np.add), "sub": ("u32", np.subtract), "smin": ("i32", np.minimum), "umin": ("u32", np.minimum),
    "smax": ("i32", np.maximum), "umax": ("u32", np.maximum), "and": ("u32", np.bitwise_and),
    "or": ("u32", np.bitwise_or), "xor": ("u32", np.bitwise_xor), "swap": ("u32", lambda a, b: b),
    "add_f32": ("f32", np.add), "pk_add_bf16": ("u32", _pair(np.add, *_BF16)),
    "pk_add_f16": ("u32", _pair(np.add, *_F16)), "add_x2": ("u64", np.add), "and_x2": ("u64", np.bitwise_and),
    "or_x2": ("u64", np.bitwise_or), "xor_x2": ("u64", np.bitwise_xor), "swap_x2": ("u64", lambda a, b: b),
    "smin_x2": ("i64", np.minimum), "smax_x2": ("i64", np.maximum), "umin_x2": ("u64", np.minimum),
    "umax_x2": ("u64", np.maximum), "add_f64": ("f64", np.add), "max_f64": ("f64", np.fmax),
    "min_f64": ("f64", np.fmin), "cmpswap": ("u32", None), "cmpswap_x2": ("u64", None),
}  # fmt: skip
_LDS_OPERATIONS = {
    "add_u32": "add", "sub_u32": "sub", "min_i32": "smin", "min_u32": "umin", "max_i32": "smax", "max_u32": "umax",
    "and_b32": "and", "or_b32": "or", "xor_b32": "xor", "add_f32": "add_f32", "add_u64": "add_x2",
    "pk_add_bf16": "pk_add_bf16", "pk_add_f16": "pk_add_f16",
}  # fmt: skip


def _atomic(
    instruction: Instruction, space: str, address: Callable, data: Operand, operation: str, dest: Operand | None
) -> Callable:
    """Lanes act one after the other, from the first on. dest: where the value before goes, if anywhere."""
    type_, function = _OPERATIONS[operation]
    dtype = np.dtype(DTYPES[type_])
    compares = function is None
    nbytes = dtype.itemsize * (2 if compares else 1)

    def run(m):
        index, rows, lanes, inside = address(m)
        if inside is not None:
            index, rows, lanes = index[inside], rows[inside], lanes[inside]
        values, undefined = _take(m, data, nbytes, False, rows, lanes)
        if undefined is not None:
            m.undefined.report(m, instruction, rows, lanes, undefined.any(1), "what is added")
        values = np.ascontiguousarray(values).view(dtype)
        before = np.zeros(index.size, dtype)
        unwritten = np.zeros((index.size, dtype.itemsize), bool)
        left = np.arange(index.size)
        while left.size:
            _, first = np.unique(index[left], return_index=True)
            now = left[first]
            old, missing = m.load(instruction, space, index[now], dtype.itemsize, rows[now], lanes[now], "atomic")
            if missing is not None:
                unwritten[now] = missing
            old = np.ascontiguousarray(old).view(dtype)[:, 0]
            before[now] = old
            if compares:
                new = np.where(old == values[now, 1], values[now, 0], old)
            else:
                new = function(old, values[now, 0]).astype(dtype)
            octets = np.ascontiguousarray(new[:, None]).view(np.uint8)
            m.store(instruction, space, index[now], octets, rows[now], lanes[now], missing, kind="atomic")
            left = np.delete(left, first)
        if dest is not None:
            octets = before[:, None].view(np.uint8)
            _put(m, dest.index, octets, unwritten if unwritten.any() else None, "", rows, lanes)

    return run


for _name in _OPERATIONS:

    @define(f"global_atomic_{_name} flat_atomic_{_name}", "vmem", dests=0)
    def _(instruction, name=_name):
        operands = list(instruction.operands)
        dest = operands.pop(0) if instruction.modifiers.get("sc0") else None
        instruction.returns = dest
        vaddr, data, *saddr = operands
        address = _global_address(instruction, vaddr, saddr[0] if saddr else None)
        return _atomic(instruction, "global", address, data, name, dest)

    @define(f"buffer_atomic_{_name}", "vmem", dests=0)
    def _(instruction, name=_name):
        data, *address = instruction.operands
        dest = data if instruction.modifiers.get("sc0") else None
        instruction.returns = dest
        size = np.dtype(DTYPES[_OPERATIONS[name][0]]).itemsize
        return _atomic(instruction, "global", _buffer_address(instruction, address, size), data, name, dest)


for _name, _operation in _LDS_OPERATIONS.items():
    _size = np.dtype(DTYPES[_OPERATIONS[_operation][0]]).itemsize

    @define(f"ds_{_name}", "ds", dests=0)
    def _(instruction, operation=_operation, size=_size):
        vaddr, data = instruction.operands
        address = _lds_address(instruction, vaddr, instruction.modifiers.get("offset", 0), size)
        return _atomic(instruction, "lds", address, data, operation, None)

    @define("ds_" + _name.replace("_", "_rtn_", 1), "ds")
    def _(instruction, operation=_operation, size=_size):
        dest, vaddr, data = instruction.operands
        address = _lds_address(instruction, vaddr, instruction.modifiers.get("offset", 0), size)
        return _atomic(instruction, "lds", address, data, operation, dest)
