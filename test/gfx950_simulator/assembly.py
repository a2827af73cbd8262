"""From the assembly text of a kernel (``asm["amdgcn"]``) to instructions and what its descriptor and metadata say.

The syntax is that of LLVM's "Syntax of AMDGPU Instruction Operands/Modifiers" and "Code Object V5 Metadata" pages
(https://llvm.org/docs/AMDGPUUsage.html).
"""

import re
import struct
from dataclasses import dataclass, field

AGPR = 256
"""Register numbers: v0-v255 are 0-255, a0-a255 follow."""
VCC, M0, EXEC = 106, 124, 126
"""SGPR numbers of special registers, as in the encoding of a scalar operand (CDNA4 ISA, section 5.1)."""

_NAMED = {"vcc": (VCC, 2), "vcc_lo": (VCC, 1), "vcc_hi": (VCC + 1, 1), "m0": (M0, 1), "exec": (EXEC, 2),
          "exec_lo": (EXEC, 1), "exec_hi": (EXEC + 1, 1)}  # fmt: skip
_REGISTER = re.compile(r"([vsa])(?:(\d+)|\[(\d+)(?::(\d+))?\])$")
_FLOAT = re.compile(r"[+-]?\d+\.\d+(?:e[+-]?\d+)?$")
_FLAGS = {"offen", "idxen", "lds", "sc0", "sc1", "nt", "glc", "slc", "clamp", "gds", "row_mirror", "row_half_mirror"}


class AssemblyError(ValueError):
    """Text that this parser does not know."""


@dataclass(frozen=True)
class Operand:
    """One operand: registers (``v``, ``s``), a constant (``imm``: its value) or a word (``off``, a label, ...)."""

    kind: str
    index: int = 0
    count: int = 1
    value: float | int | str = 0
    neg: bool = False
    abs: bool = False
    sext: bool = False

    @property
    def registers(self) -> range:
        return range(self.index, self.index + self.count)


@dataclass(eq=False)
class Instruction:
    """One instruction. ``name`` is the mnemonic without its encoding (``_e32``, ``_dpp``, ...)."""

    index: int
    place: str
    """Where its code has it: ``line 12`` of a text, ``byte 0x3c`` of a code object."""
    text: str
    name: str
    encoding: str
    operands: tuple[Operand, ...]
    modifiers: dict
    target: int | None = None
    """The index that a branch goes to."""

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(eq=False)
class Code:
    """One kernel."""

    name: str
    instructions: list[Instruction]
    descriptor: dict[str, int]
    """The ``.amdhsa_`` directives, without that prefix."""
    arguments: list[dict]
    """Of the metadata: offset, size and value_kind of each argument."""
    preload_entry: int | None
    """Where a wave starts that got its arguments in SGPRs: 256 bytes after the entry."""
    metadata: dict[str, int] = field(default_factory=dict)
    """What else the metadata have of numbers: registers, spills, sizes."""
    aligned: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By instruction of a text before which the assembler puts ``s_nop 0`` until it is at a multiple of so many bytes:
    these, and how many bytes it may fill at most."""

    @property
    def registers(self) -> int:
        """VGPRs a wave has, AGPRs not counted."""
        return self.descriptor["accum_offset"]

    @property
    def threads(self) -> int:
        """Work-items of a workgroup, at most."""
        return self.metadata["max_flat_workgroup_size"]


def _split(text: str, separator: str) -> list[str]:
    """Like str.split, but not inside brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if character == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def _number(text: str) -> int | float | None:
    if _FLOAT.match(text):
        return float(text)
    try:
        return int(text, 0)
    except ValueError:
        return None


def operand(text: str) -> Operand:
    neg = abs_ = sext = False
    if text.startswith("sext("):
        text, sext = text[5:-1], True
    if text.startswith("neg("):  # of a constant
        text, neg = text[4:-1], True
    if text.startswith("-") and _number(text) is None:
        text, neg = text[1:], True
    if text.startswith("|"):
        text, abs_ = text[1:-1], True
    modifiers = dict(neg=neg, abs=abs_, sext=sext)
    if text in _NAMED:
        return Operand("s", *_NAMED[text], **modifiers)
    register = _REGISTER.match(text)
    if register:
        file, single, first, last = register.groups()
        index = int(single or first)
        count = 1 if last is None else int(last) - index + 1
        return Operand("s" if file == "s" else "v", index + AGPR * (file == "a"), count, **modifiers)
    number = _number(text)
    if number is not None:
        return Operand("imm", value=number, **modifiers)
    if text == "src_scc":
        raise AssemblyError("src_scc is not modelled")
    return Operand("word", value=text)


def _modifier(text: str) -> tuple[str, object]:
    name, _, value = text.partition(":")
    if not value:
        return name, True
    if value.startswith("["):
        return name, tuple(int(number, 0) for number in value[1:-1].split(","))
    number = _number(value)
    return name, value if number is None else number


def _is_modifier(text: str) -> bool:
    return text in _FLAGS or (":" in text and not _REGISTER.match(text.strip("-|")))


def instruction(index: int, place: str, text: str) -> Instruction:
    mnemonic, _, rest = text.partition(" ")
    encoding = ""
    for suffix in ("e64_dpp", "e32", "e64", "dpp", "sdwa"):
        if mnemonic.endswith("_" + suffix):
            encoding = suffix
            break
    name = mnemonic.removesuffix("_" + encoding) if encoding else mnemonic
    if name == "s_waitcnt":
        counts = re.findall(r"(\w+)\((\d+)\)", rest)
        if not counts:
            raise AssemblyError(f"{place}: {text}: a count that is not written as vmcnt(), lgkmcnt() or expcnt()")
        return Instruction(index, place, text, name, "", (), {kind: int(count) for kind, count in counts})
    operands, modifiers = [], {}
    for part in _split(rest, ","):
        for i, word in enumerate(_split(part, " ")):
            if i > 0 or _is_modifier(word):
                key, value = _modifier(word)
                modifiers[key] = value
            else:
                operands.append(operand(word))
    return Instruction(index, place, text, name, encoding, tuple(operands), modifiers)


def _metadata_arguments(text: str) -> list[dict]:
    block = re.search(r"^    \.args:\s*\n((?:      .*\n)*)", text, re.M)
    arguments = []
    for line in block.group(1).splitlines() if block else []:
        key, _, value = line[8:].partition(":")
        if line.startswith("      - "):
            arguments.append({})
        value = value.strip()
        arguments[-1][key.strip().removeprefix(".")] = int(value) if value.isdigit() else value
    return arguments


def parse(text: str) -> Code:
    """The kernel in ``text``, which holds one."""
    instructions, labels, descriptor, aligned = [], {}, {}, {}
    name, done = "", False
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split(";")[0].strip()
        if not line or line.startswith("//"):
            continue
        if line.startswith(".amdgcn_target") and "gfx950" not in line:
            raise AssemblyError(f"the code is for another architecture: {line}")
        if line.startswith(".amdhsa_kernel"):
            name, done = line.split()[1], True
        elif line.startswith(".amdhsa_") and done:
            key, _, value = line.removeprefix(".amdhsa_").partition(" ")
            descriptor[key] = int(value, 0) if _number(value) is not None else value
        elif re.match(r"[\w.$]+:", line):
            labels[line.partition(":")[0]] = len(instructions)
        elif line.startswith(".p2align") and not done:
            power, _, most = (*line.split()[1:], "", "")[:3]
            size = 1 << int(power.strip(","))
            aligned[len(instructions)] = size, int(most or size)
        elif not line.startswith(".") and not done:
            instructions.append(instruction(len(instructions), f"line {number}", line.replace("\t", " ")))
    if not name:
        raise AssemblyError("there is no .amdhsa_kernel in the text")
    for one in instructions:
        if one.name.startswith(("s_branch", "s_cbranch")):
            one.target = labels[one.operands[0].value]
    preload = next((one.target for one in instructions[:8] if one.name == "s_branch"), None)
    if not descriptor.get("user_sgpr_kernarg_preload_length") or aligned.get(preload, (0, 0))[0] != 256:
        preload = None
    metadata = {key: int(value) for key, value in re.findall(r"^  [ -] \.(\w+):\s*(\d+)$", text, re.M)}
    return Code(name, instructions, descriptor, _metadata_arguments(text), preload, metadata, aligned)


def float_bits(value: float, size: int) -> int:
    """The bits of a float constant in an operand of 2, 4 or 8 bytes."""
    code = {2: "e", 4: "f", 8: "d"}[size]
    return int.from_bytes(struct.pack("<" + code, value), "little")
