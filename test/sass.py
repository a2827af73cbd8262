"""The machine code of the product in which one warp loads (sm_90): are the matrix unit's right operands where they lie?
And of the PTX that it is made of: do its warps tell each other only of what is done?

ptxas 12.8 gave one width of a tile the operand addresses of the other, in code that looks right one instruction at a
time. So it is run, as far as addresses go: the uniform registers, which hold them, along random paths. What comes from
elsewhere (parameters, memory, other registers) and what decides a branch are random numbers, since a step's operands
must lie as they do whatever these are.
"""

import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

STEP = [0, 2, 4, 6]
"""Where a step's right operands begin, for one of its two products: 16 columns of bf16 apart, in 16 bytes."""

WALKS = 100
"""At least, and ten times as many at most, if some of a product's instructions are met by few."""
LENGTH = 1500
"""Of a walk, in instructions that matter."""

MASK = 0xFFFFFFFF

MATTERS = re.compile(r"HGMMA|BRA|BRX|EXIT|STL|LDL")
"""Instructions whose names say that they do."""


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str | None
    """The predicate that it depends on, with a ``!`` before it if negated."""
    name: str
    operands: tuple[str, ...]


def disassemble(cubin: bytes) -> str:
    """A listing, by the program that comes with Triton."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Of a listing what concerns uniform registers, by way of others and of what is spilled as well, and where in it
    labels are."""
    lines = []
    for line in text.splitlines():
        if match := re.match(r"(\.L_x_\d+):", line):
            lines.append(match[1])
        elif match := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            operands = tuple(operand.replace(".reuse", "") for operand in re.split(r",\s*", match[4]))
            lines.append(Instruction(int(match[1], 16), match[2], match[3], operands))
    kept = {line.operands[1] for line in lines if isinstance(line, Instruction) and line.name == "R2UR"}
    code, labels = [], {}
    for line in lines:
        if isinstance(line, str):
            labels[line] = len(code)
        elif MATTERS.match(line.name) or line.operands[0] in kept or line.operands[0].startswith("U"):
            code.append(line)
    return code, labels


def conditions(instruction: Instruction) -> list[str]:
    """What has to be true for an instruction to do anything."""
    found = [instruction.guard] if instruction.guard else []
    if instruction.name.startswith("BRA"):
        found += [operand for operand in instruction.operands if re.fullmatch(r"!?UP\w", operand)]
    return found


def target(branch: Instruction, labels: dict[str, int]) -> int:
    """Where a branch goes."""
    return labels[re.search(r"\.L_x_\d+", branch.operands[-1])[0]]


def words(name: str) -> int:
    """How many registers an instruction reads or writes at a time."""
    return 4 if ".128" in name else 2 if re.search(r"\.(64|WIDE)\b", name) else 1


def spilled(name: str, register: str, address: str) -> Iterator[tuple[str, str]]:
    """Of an instruction that stores or loads what is spilled: each register, and the word of the stack."""
    first = int(re.fullmatch(r"\[R1(?:\+(0x[0-9a-f]+))?\]", address)[1] or "0", 16)
    for i in range(words(name)):
        yield register if register == "RZ" else f"R{int(register[1:]) + i}", f"[{first + 4 * i:#x}]"


class Registers(dict):
    """Numbers of 32 bits (UR, R, and words of the stack by their distance) and truth values (UP, P) by name, random
    until they are written."""

    def __init__(self, choose: random.Random):
        super().__init__(URZ=0, RZ=0, UPT=True, PT=True)
        self.choose = choose

    def __missing__(self, name: str) -> int:
        value = self[name] = self.choose.getrandbits(1 if "P" in name else 32)
        return value

    def true(self, operand: str) -> bool:
        return bool(self[operand.lstrip("!")]) != operand.startswith("!")

    def value(self, operand: str) -> int:
        sign, name = re.fullmatch(r"([-~]?)(.*)", operand).groups()
        value = int(name, 16) if name[0] == "0" else self[name]
        return (-value if sign == "-" else ~value if sign == "~" else value) & MASK

    def pair(self, operand: str) -> int:
        """A register and the next, or a number, as 64 bits."""
        if number := re.fullmatch(r"UR(\d+)", operand):
            return self[operand] | self[f"UR{int(number[1]) + 1}"] << 32
        return 0 if operand == "URZ" else int(operand, 16)

    def forget(self, instruction: Instruction) -> None:
        """What an instruction writes that is not computed here."""
        wide = words(instruction.name)
        for operand in instruction.operands[:2]:  # a predicate may come second
            if number := re.fullmatch(r"(U?R)(\d+)", operand):
                for i in range(wide):
                    self.pop(f"{number[1]}{int(number[2]) + i}", None)
            elif not re.fullmatch(r"UP\d", operand):
                break
            else:
                self.pop(operand, None)
            if number:
                wide = 0


def _signed(value: int) -> int:
    return value - (value >> 31 << 32)


COMPARE = {
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b, "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
}  # fmt: skip


def execute(instruction: Instruction, registers: Registers) -> None:
    """One instruction's effect on registers."""
    name, (to, *rest) = instruction.name, instruction.operands
    get, kind = registers.value, name.split(".")
    if kind[0] in ("UMOV", "MOV", "R2UR") or (name in ("IMAD.U32", "IMAD.MOV.U32") and rest[:2] == ["RZ", "RZ"]):
        registers[to] = get(rest[-1] if kind[0] == "IMAD" else rest[0])
    elif kind[0] == "STL":
        for register, word in spilled(name, rest[0], to):
            registers[word] = registers[register]
    elif kind[0] == "LDL":
        for register, word in spilled(name, to, rest[0]):
            registers[register] = registers[word]
    elif name == "UIADD3.64":
        total = sum(registers.pair(operand) for operand in rest)
        registers[to], registers[f"UR{int(to[2:]) + 1}"] = total & MASK, total >> 32 & MASK
    elif kind[0] == "UIADD3":
        carries = [rest.pop(0) for _ in range(2) if re.fullmatch("UP[0-6T]", rest[0])]
        total = sum(map(get, rest[:3])) + (kind[1:] == ["X"] and registers.true(rest[3]))
        registers[to] = total & MASK
        if carries and carries[0] != "UPT":
            registers[carries[0]] = total > MASK
    elif kind[0] == "USEL":
        registers[to] = get(rest[0] if registers.true(rest[2]) else rest[1])
    elif name == "ULEA" and len(rest) == 3:
        registers[to] = (get(rest[0]) << int(rest[2], 16)) + get(rest[1]) & MASK
    elif name == "USHF.L.U32":
        registers[to] = get(rest[0]) << min(get(rest[1]), 32) & MASK
    elif name == "USHF.R.U32.HI":
        registers[to] = get(rest[2]) >> min(get(rest[1]), 32)
    elif name == "USGXT.U32":
        registers[to] = get(rest[0]) & (1 << int(rest[1], 16)) - 1
    elif name == "ULOP3.LUT" and to != "URZ" and not to.startswith("UP"):
        a, b, c = map(get, rest[:3])
        table = int(rest[3], 16)
        terms = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1]
        registers[to] = sum(terms) & MASK  # of which no two have a bit in common
    elif name == "UIMAD":
        registers[to] = get(rest[0]) * get(rest[1]) + get(rest[2]) & MASK
    elif kind[0] == "UISETP" and rest[-1] == "UPT" and kind[-1] == "AND":
        a, b = (get(operand) if "U32" in kind else _signed(get(operand)) for operand in rest[1:3])
        result = COMPARE[kind[1]](a, b)
        for predicate, value in ((to, result), (rest[0], not result)):
            if predicate != "UPT":
                registers[predicate] = value
    else:
        registers.forget(instruction)


def walk(code: list[Instruction], labels: dict[str, int], choose: random.Random) -> Iterator[tuple[int, int, int]]:
    """Of each matrix instruction on a path: its address, and both halves of its right operand's descriptor."""
    registers, at = Registers(choose), 0
    for _ in range(LENGTH):
        instruction = code[at]
        at += 1
        if instruction.name.startswith("HGMMA"):
            number = int(re.search(r"gdesc\[UR(\d+)\]", " ".join(instruction.operands))[1])
            yield instruction.address, registers[f"UR{number + 2}"], registers[f"UR{number + 3}"]
            continue
        if not all(
            registers.true(condition) if re.search("UP|PT", condition) else choose.getrandbits(1)
            for condition in conditions(instruction)
        ):
            continue
        if instruction.name == "EXIT":
            return
        if instruction.name.startswith("BRA"):
            at = target(instruction, labels)
        elif instruction.name == "BRX":  # to what a group of warps does
            at = labels[choose.choice(re.findall(r"\.L_x_\d+", " ".join(instruction.operands)))]
        else:
            execute(instruction, registers)


def check_right_operands(text: str, apart: int = 0) -> None:
    """Each step of a product's listing, on every path that is tried, takes the right operands that it should; those of
    the second product begin ``apart`` bytes after those of the first."""
    step = STEP + [begin + apart // 16 for begin in STEP]
    code, labels = parse(text)
    missed, choose = {line.address for line in code if line.name.startswith("HGMMA")}, random.Random(0)
    assert missed
    for number in range(10 * WALKS):
        if number >= WALKS and not missed:
            return
        met = list(walk(code, labels, choose))
        for i in range(0, len(met) - len(step) + 1, len(step)):
            addresses, low, high = zip(*met[i : i + len(step)])
            begin = [number - low[0] & MASK for number in low]
            assert begin == step and len(set(high)) == 1, (
                f"the operands at {', '.join(f'{address:#x}' for address in addresses)} are {begin} from the first one"
            )
            missed -= set(addresses)
    raise AssertionError(f"no path came by the matrix instructions at {[f'{a:#x}' for a in sorted(missed)]}")


def check_loops_without_spills(text: str) -> None:
    """A loop that multiplies keeps nothing in memory."""
    code, labels = parse(text)
    loops = []
    for at, instruction in enumerate(code):
        # A branch without a condition goes back from waiting for a stage.
        if instruction.name.startswith("BRA") and conditions(instruction):
            begin = target(instruction, labels)
            if any(line.name.startswith("HGMMA") for line in code[begin:at]):
                loops.append((begin, at))
    inner = [(a, b) for a, b in loops if not any(a <= c and d < b for c, d in loops)]
    assert inner, "no loop multiplies"
    for begin, end in inner:
        for line in code[begin:end]:
            assert not re.match("STL|LDL", line.name), (
                f"the loop at {code[begin].address:#x} spills: {line.name} {', '.join(line.operands)}"
            )


MET = re.compile(r"\b(?:bar\.warp\.sync|bar\.sync|barrier\.sync)\b")
TELLS = re.compile(r"(?<!cp\.async\.)\bmbarrier\.arrive\b")  # of a copy, each lane tells for itself
TOUCHES = re.compile(r"\b(?:ld|st)\.shared\b")


def check_told_in_order(ptx: str) -> None:
    """Between a warp's own reads and writes of shared memory and the mbarrier by which others learn of them, its lanes,
    or the warps of its group, meet: else one lane tells what another has not done."""
    touched, told = None, 0
    for number, line in enumerate(ptx.splitlines(), 1):
        if MET.search(line):
            touched = None
        elif TOUCHES.search(line):
            touched = number, line.strip()
        elif TELLS.search(line):
            told += 1
            assert touched is None, f"line {number} tells of what line {touched[0]} does: {touched[1]}"
    assert told, "nothing is told"
