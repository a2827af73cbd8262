"""From the ELF code object of a kernel (``asm["hsaco"]``), which is what a GPU would be given, to what
``assembly.parse`` makes of its text.

The formats are those of LLVM's "User Guide for AMDGPU Backend" (https://llvm.org/docs/AMDGPUUsage.html: "ELF Code
Object", "Kernel Descriptor", "Code Object V5 Metadata") and of MessagePack. Instructions are decoded by the LLVM in
AMD's package rocm-llvm-python, of which nothing but that library is used: it takes neither ROCm nor a GPU.
"""

import ctypes
import functools
import importlib.metadata
import struct
from dataclasses import dataclass

from .assembly import AssemblyError, Code, Instruction, instruction

PACKAGE, LIBRARY = "rocm-llvm-python", "rocm/llvm/librocmllvm.so"

_MACHINE, _GFX950 = 224, 0x4F
"""EM_AMDGPU, and EF_AMDGPU_MACH_AMDGCN_GFX950 in the lowest byte of e_flags."""
_NOTE, _METADATA = 7, 32
"""SHT_NOTE, and the type of the note that holds the metadata."""
_DYNSYM = 11
_PRELOADED = 256
"""Where a wave starts that got its arguments in SGPRs, after the entry."""


class NoDisassembler(Exception):
    """Says why no instruction can be decoded."""


# --- instructions


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(importlib.metadata.distribution(PACKAGE).locate_file(LIBRARY)))
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        raise NoDisassembler(f"needs LLVM's disassembler: pip install {PACKAGE} ({error})") from None
    for part in ("TargetInfo", "TargetMC", "Disassembler"):
        getattr(library, f"LLVMInitializeAMDGPU{part}")()
    create, decode = library.LLVMCreateDisasmCPU, library.LLVMDisasmInstruction
    create.restype, decode.restype = ctypes.c_void_p, ctypes.c_size_t
    text, pointer = ctypes.c_char_p, ctypes.c_void_p
    create.argtypes = [text, text, pointer, ctypes.c_int, pointer, pointer]
    decode.argtypes = [pointer, text, ctypes.c_uint64, ctypes.c_uint64, text, ctypes.c_size_t]
    return library


@functools.cache
def _context() -> int:
    context = _library().LLVMCreateDisasmCPU(b"amdgcn-amd-amdhsa", b"gfx950", None, 0, None, None)
    if not context:
        raise NoDisassembler(f"the LLVM in {PACKAGE} does not know gfx950")
    return context


def missing() -> str | None:
    """Why code objects cannot be read here; None if they can."""
    try:
        _context()
    except NoDisassembler as error:
        return str(error)


def disassemble(code: bytes) -> list[tuple[int, str]]:
    """Where in ``code`` each instruction is, and its text; a branch's operand is its distance in words, 16 bits."""
    decode, context, text = _library().LLVMDisasmInstruction, _context(), ctypes.create_string_buffer(512)
    found, at = [], 0
    while at < len(code):
        window = code[at : at + 20]  # no instruction is longer
        size = decode(context, window, len(window), at, text, len(text))
        if not size:
            raise AssemblyError(f"byte {at:#x}: {window[:8].hex()} is no instruction")
        found.append((at, " ".join(text.value.decode().split())))
        at += size
    return found


def _instructions(code: bytes) -> list[Instruction]:
    lines = disassemble(code)
    index = {at: i for i, (at, _) in enumerate(lines)}
    instructions = []
    for at, text in lines:
        goal = None
        if text.startswith(("s_branch", "s_cbranch")):
            name, words = text.split()
            goal = at + 4 + 4 * (int(words) - (int(words) >> 15 << 16))
            text = f"{name} {goal:#x}"
        instructions.append(instruction(len(instructions), f"byte {at:#x}", text))
        if goal is not None:
            if goal not in index:
                raise AssemblyError(f"{instructions[-1]}: no instruction begins there")
            instructions[-1].target = index[goal]
    return instructions


# --- the file


@dataclass(frozen=True)
class _Section:
    kind: int
    address: int
    offset: int
    size: int
    link: int


class Elf:
    def __init__(self, data: bytes):
        self.data = data
        if data[:6] != b"\x7fELF\x02\x01":
            raise AssemblyError("this is no 64-bit little-endian ELF file")
        (machine,), (flags,) = self.unpack("<H", 18), self.unpack("<I", 48)
        if (machine, flags & 0xFF) != (_MACHINE, _GFX950):
            raise AssemblyError(f"the code is for another architecture: machine {machine}, flags {flags:#x}")
        (offset,), (count,) = self.unpack("<Q", 40), self.unpack("<H", 60)
        self.sections = [
            _Section(kind, *rest) for kind, *rest in (self.unpack("<4xI8xQQQI", offset + 64 * i) for i in range(count))
        ]

    def unpack(self, form: str, offset: int) -> tuple:
        try:
            return struct.unpack_from(form, self.data, offset)
        except struct.error:
            raise AssemblyError(f"the ELF file ends at byte {len(self.data)}, before what is at {offset}") from None

    def at(self, address: int, size: int) -> bytes:
        """What is loaded to ``address``."""
        for one in self.sections:
            if one.address and one.kind == 1 and one.address <= address and address + size <= one.address + one.size:
                start = one.offset + address - one.address
                return self.data[start : start + size]
        raise AssemblyError(f"no section is loaded to {address:#x}")

    def symbols(self) -> dict[str, tuple[int, int]]:
        """Address and size of the symbols that a loader sees."""
        (table,) = (one for one in self.sections if one.kind == _DYNSYM)
        names, result = self.sections[table.link], {}
        for offset in range(table.offset + 24, table.offset + table.size, 24):
            name, address, size = self.unpack("<I4xQQ", offset)
            start = names.offset + name
            result[self.data[start : self.data.index(b"\0", start)].decode()] = address, size
        return result

    def metadata(self) -> dict:
        for one in self.sections:
            if one.kind == _NOTE:
                name, size, kind = self.unpack("<III", one.offset)
                start = one.offset + 12 + -(-name // 4) * 4
                if kind == _METADATA:
                    return message(self.data[start : start + size], 0)[0]
        raise AssemblyError("there is no metadata in the ELF file")


def message(data: bytes, at: int) -> tuple[object, int]:
    """The MessagePack value at byte ``at``, and where the next one is: maps, arrays, strings, integers, booleans."""
    kind, at = data[at], at + 1
    if kind < 0x80:
        return kind, at
    if kind in (0xC2, 0xC3):
        return kind == 0xC3, at
    if 0xCC <= kind <= 0xD3:
        size = 1 << (kind & 3)
        return int.from_bytes(data[at : at + size], "big", signed=kind >= 0xD0), at + size
    wide = {0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}.get(kind, 0)
    if wide:
        count, at = int.from_bytes(data[at : at + wide], "big"), at + wide
    else:
        count = kind & (0x1F if 0xA0 <= kind < 0xC0 else 0x0F)
    if 0xA0 <= kind < 0xC0 or 0xD9 <= kind <= 0xDB:
        return data[at : at + count].decode(), at + count
    if 0x90 <= kind < 0xA0 or kind in (0xDC, 0xDD):
        items = []
        for _ in range(count):
            item, at = message(data, at)
            items.append(item)
        return items, at
    if kind < 0x90 or kind in (0xDE, 0xDF):
        result = {}
        for _ in range(count):
            key, at = message(data, at)
            result[key], at = message(data, at)
        return result, at
    raise AssemblyError(f"metadata of type {kind:#x}")


# --- the kernel

_FIELDS = {
    "rsrc1": {
        "float_round_mode_32": (12, 2), "float_round_mode_16_64": (14, 2), "float_denorm_mode_32": (16, 2),
        "float_denorm_mode_16_64": (18, 2), "dx10_clamp": (21, 1), "ieee_mode": (23, 1), "fp16_overflow": (26, 1),
    },
    "rsrc2": {
        "enable_private_segment": (0, 1), "user_sgpr_count": (1, 5), "system_sgpr_workgroup_id_x": (7, 1),
        "system_sgpr_workgroup_id_y": (8, 1), "system_sgpr_workgroup_id_z": (9, 1),
        "system_sgpr_workgroup_info": (10, 1), "system_vgpr_workitem_id": (11, 2),
        "exception_fp_ieee_invalid_op": (24, 1), "exception_fp_denorm_src": (25, 1),
        "exception_fp_ieee_div_zero": (26, 1), "exception_fp_ieee_overflow": (27, 1),
        "exception_fp_ieee_underflow": (28, 1), "exception_fp_ieee_inexact": (29, 1),
        "exception_int_div_zero": (30, 1),
    },
    "rsrc3": {"tg_split": (16, 1)},
    "properties": {
        "user_sgpr_private_segment_buffer": (0, 1), "user_sgpr_dispatch_ptr": (1, 1), "user_sgpr_queue_ptr": (2, 1),
        "user_sgpr_kernarg_segment_ptr": (3, 1), "user_sgpr_dispatch_id": (4, 1),
        "user_sgpr_private_segment_size": (6, 1), "uses_dynamic_stack": (11, 1),
    },
    "preload": {"user_sgpr_kernarg_preload_length": (0, 7), "user_sgpr_kernarg_preload_offset": (7, 9)},
}  # fmt: skip
"""Where in the kernel descriptor what an ``.amdhsa_`` directive sets is: first bit and bits."""


def _descriptor(data: bytes) -> tuple[dict[str, int], int]:
    """What the directives of the text say, and the distance from here to the entry."""
    lds, scratch, arguments, entry = struct.unpack_from("<III4xq", data)
    words = dict(zip(("rsrc3", "rsrc1", "rsrc2", "properties", "preload"), struct.unpack_from("<IIIHH", data, 44)))
    result = dict(
        group_segment_fixed_size=lds, private_segment_fixed_size=scratch, kernarg_size=arguments,
        accum_offset=4 * (words["rsrc3"] & 0x3F) + 4, next_free_vgpr=8 * (words["rsrc1"] & 0x3F) + 8,
    )  # fmt: skip
    for word, fields in _FIELDS.items():
        result |= {name: words[word] >> first & (1 << bits) - 1 for name, (first, bits) in fields.items()}
    return result, entry


def read(data: bytes) -> Code:
    """The kernel in a code object, which holds one. ``next_free_vgpr`` of its descriptor is rounded up to the 8 in
    which registers are handed out."""
    elf = Elf(data)
    symbols = elf.symbols()
    kernels = [name for name in symbols if name.endswith(".kd")]
    if len(kernels) != 1:
        raise AssemblyError(f"the code object holds {len(kernels)} kernels, not one")
    name = kernels[0].removesuffix(".kd")
    address, size = symbols[name]
    descriptor, entry = _descriptor(elf.at(*symbols[kernels[0]]))
    if symbols[kernels[0]][0] + entry != address:
        raise AssemblyError(f"the descriptor's entry is not {name}")
    instructions = _instructions(elf.at(address, size))
    preload = None
    if descriptor["user_sgpr_kernarg_preload_length"]:
        preload = next((one.index for one in instructions if one.place == f"byte {_PRELOADED:#x}"), None)
        if preload is None:
            raise AssemblyError(f"no instruction begins {_PRELOADED} bytes after the entry, where waves start")
    (about,) = elf.metadata()["amdhsa.kernels"]
    arguments = [{key.removeprefix("."): value for key, value in one.items()} for one in about.get(".args", ())]
    numbers = {key.removeprefix("."): value for key, value in about.items() if type(value) is int}
    return Code(name, instructions, descriptor, arguments, preload, numbers)


# --- beside the text


def differences(code: Code, text: Code) -> list[str]:
    """In what a code object is not the text that it is said to be made from: each instruction's name, encoding,
    operands, modifiers and where it branches to, the descriptor, the metadata.

    Only the code object has the ``s_nop 0`` with which the assembler fills up where the text asks for alignment, and
    only the text has directives that the assembler uses up (``reserve_vcc``, SGPRs: gfx950 has a fixed number of them).
    """
    found, pairs, text_index, at = [], [], {}, 0
    for i, b in enumerate(text.instructions):
        size, most = text.aligned.get(i, (1, 0))
        filled = 0
        if at < len(code.instructions):
            gap = -int(code.instructions[at].place.split()[1], 0) % size
            filled = gap // 4 if gap <= most else 0
        fill = code.instructions[at : at + filled]
        found += [f"{one} is not to fill up before {b}" for one in fill if one.text != "s_nop 0"]
        text_index |= dict.fromkeys(range(at, at + filled + 1), i)
        at += filled + 1
        pairs += zip(code.instructions[at - 1 : at], [b])
    if at != len(code.instructions):
        found.append(f"{len(code.instructions)} instructions are not {len(text.instructions)} and what fills up")
    what = lambda one, target: (one.name, one.encoding, one.operands if target is None else target, one.modifiers)
    found += [f"{a} is not {b}" for a, b in pairs if what(a, text_index.get(a.target)) != what(b, b.target)]
    if text_index.get(code.preload_entry) != text.preload_entry:
        found.append("another second entry")
    used_up = {"next_free_sgpr", "reserve_vcc", "reserve_xnack_mask"}
    wanted = {key: value for key, value in text.descriptor.items() if key not in used_up}
    wanted["next_free_vgpr"] = -(-wanted["next_free_vgpr"] // 8) * 8
    for key, value in (wanted | text.metadata).items():
        there = (code.metadata if key in text.metadata else code.descriptor).get(key)
        if there != value:
            found.append(f"{key} {there} is not {value}")
    places = lambda code: [(one["offset"], one["size"], one["value_kind"]) for one in code.arguments]
    if places(code) != places(text) or code.name != text.name:
        found.append("other arguments, or another name")
    return found
