"""Wait states that software has to put between dependent instructions: checked on the code, along every path.

Hardware of this family does not hold back a vector instruction that comes too soon after a matrix instruction, or one
that reads an SGPR too soon after a vector instruction wrote it; the program has to place other instructions, or s_nop,
between the two. One instruction is one wait state, ``s_nop n`` is n + 1. The rules here are those of AMD's "CDNA3" and
"CDNA4 Instruction Set Architecture" reference guides (section 4.5 on manually inserted wait states, and the table of
dependencies of matrix instructions in chapter 7), with the numbers that LLVM's hazard recognizer uses for gfx950, where
a matrix instruction of 4 passes and more needs one state more than on gfx942
(https://github.com/llvm/llvm-project/commit/1188b1ff7b95).

What is checked, with the wait states that are needed; N is the passes of a matrix instruction, of 4 clocks each:

- matrix instruction writes a VGPR, then
  a vector ALU, memory or LDS instruction reads or writes it, or a matrix instruction reads it as A or B: N + 4
  (N = 2: 5); a matrix instruction reads it as C: N + 2 (N = 2: 3), but 0 (N = 2: 2) if C is exactly what the same kind
  of instruction wrote (https://github.com/llvm/llvm-project/pull/218363); of an instruction on float32 operands N + 2
  and N instead of N + 4 and N + 2;
- matrix instruction reads a VGPR as C, then a vector ALU instruction writes it: N - 1;
- vector ALU instruction writes a VGPR, then a matrix instruction reads it: 2; DPP reads it: 2; v_readlane or
  v_readfirstlane reads it: 1; v_permlane*_swap reads it: 2;
- vector ALU instruction writes an SGPR or VCC, then a vector ALU instruction reads it: 2 (as a constant or condition);
  v_readlane or v_writelane takes it as lane: 4; a memory instruction reads it: 5; v_div_fmas reads VCC: 4;
- vector ALU instruction writes EXEC, then DPP: 5; a matrix instruction, v_readlane, v_readfirstlane or v_writelane: 4;
- a transcendental instruction writes a VGPR, then another vector ALU instruction reads it: 1;
- SDWA, or an instruction with op_sel for its destination, writes part of a VGPR, then a vector ALU instruction reads
  it: 1;
- scalar instruction writes M0, then a load to LDS uses it: 1;
- a store of more than 64 bits, then a vector ALU instruction overwrites its data: 2 (buffers with a register as offset:
  1, https://github.com/llvm/llvm-project/pull/197267).

LLVM knows these numbers, but up to September 2026 looked back no further than 19 states, and so missed a use that is
exactly 19 states after an instruction of 16 passes, where gfx950 takes 20
(https://github.com/llvm/llvm-project/pull/222040). Triton's releases of before have that defect: whether a kernel is
hit depends on how it happens to be scheduled.

Not checked: s_setreg and s_getreg, dot-product instructions, float64 matrix instructions.
"""

import warnings
from dataclasses import dataclass

from .assembly import EXEC, M0, VCC, Instruction
from .machine import Program, SimulationError
from .operands import SGPR

LOOKBACK = 20
"""More wait states than any rule asks for."""

_VALU = ("valu", "trans")
_MEMORY = ("vmem", "ds")


def passes(instruction: Instruction) -> int:
    """Of a matrix instruction (CDNA4 ISA, table of passes)."""
    shape = instruction.name.split("f32_")[1]
    if "f8f6f4" in shape:  # formats of 8 bits take twice the time of the smaller ones
        narrow = all(instruction.modifiers.get(key, 0) >= 2 for key in ("cbsz", "blgp"))
        return {"16": 8, "32": 16}[shape[:2]] // (2 if narrow else 1)
    if shape.endswith("_f32"):
        return {"16x16x4": 8, "32x32x2": 16}[shape.rpartition("_")[0]]
    return {"16": 4, "32": 8}[shape[:2]]


def _sgemm(instruction: Instruction) -> bool:
    """Whether a matrix instruction takes float32 operands, which is another unit than that of the narrow formats."""
    return instruction.name.endswith("_f32")


def _wait_states(instruction: Instruction) -> int:
    return instruction.operands[0].value + 1 if instruction.name == "s_nop" else 1


def _registers(operands) -> set[int]:
    return {register for one in operands if one.kind == "v" for register in one.registers}


def _partial(instruction: Instruction) -> bool:
    if instruction.encoding == "sdwa":
        return instruction.modifiers.get("dst_sel", "DWORD") != "DWORD"
    op_sel = instruction.modifiers.get("op_sel", ())
    return instruction.unit in _VALU and len(op_sel) == 4 and bool(op_sel[3])


def needed(first: Instruction, then: Instruction) -> tuple[int, str]:
    """Wait states that ``then`` has to be away from ``first``, and why; 0: none."""
    found = [(0, "")]
    vector_then, memory_then, matrix_then = then.unit in _VALU, then.unit in _MEMORY, then.unit == "mfma"
    written = {register for register in first.writes if register < SGPR}
    scalars = {register - SGPR for register in first.writes if register >= SGPR}
    reads, writes = set(then.reads), set(then.writes)
    if first.unit == "mfma":
        n = passes(first)
        late = n + 2 if _sgemm(first) else n + 4 if n > 2 else 5
        if matrix_then:
            a, b, c = then.operands[1:4]
            if written & _registers((a, b, *then.operands[4:])):
                found.append((late, "a matrix instruction reads a result as A, B or scale"))
            if c.kind == "v" and written & set(c.registers):
                exact = c.registers == first.operands[0].registers and first.name == then.name
                states = 0 if _sgemm(first) and not _sgemm(then) else n if _sgemm(first) else n + 2 if n > 2 else 3
                found.append(((2 if n == 2 else 0) if exact else states, "a matrix instruction reads a result as C"))
        elif vector_then or memory_then:
            if written & (reads | writes):
                found.append((late, "use of the result of a matrix instruction"))
            c = first.operands[3]
            if vector_then and c.kind == "v" and writes & set(c.registers) and not _sgemm(first):
                found.append((n - 1, "C of a matrix instruction is overwritten"))
    if first.unit in _VALU:
        lane_access = then.name in ("v_readlane_b32", "v_readfirstlane_b32", "v_writelane_b32")
        if matrix_then and written & reads:
            found.append((2, "a matrix instruction reads what a vector instruction wrote"))
        if then.lane_map and then.operands[1].index in written:
            found.append((2, "DPP reads what a vector instruction wrote"))
        if then.name.startswith("v_permlane") and written & reads:
            found.append((2, "v_permlane reads what a vector instruction wrote"))
        if then.name in ("v_readlane_b32", "v_readfirstlane_b32") and written & reads:
            found.append((1, "a read of a lane of what a vector instruction wrote"))
        if first.unit == "trans" and then.unit == "valu" and written & reads:
            found.append((1, "use of a transcendental result"))
        if _partial(first) and vector_then and written & reads:
            found.append((1, "use of a register that was written in part"))
        if {EXEC, EXEC + 1} & scalars:
            if then.lane_map:
                found.append((5, "DPP after a vector instruction wrote EXEC"))
            if matrix_then or lane_access:
                found.append((4, "EXEC was written by a vector instruction"))
        read_scalars = {register - SGPR for register in then.reads if register >= SGPR}
        if scalars & read_scalars:
            if vector_then:
                found.append((2, "a vector instruction reads an SGPR that one wrote"))
            if then.unit == "vmem":
                found.append((5, "a memory instruction reads an SGPR that a vector instruction wrote"))
            if then.name == "v_div_fmas_f32" and {VCC, VCC + 1} & scalars:
                found.append((4, "v_div_fmas reads VCC"))
            if then.name in ("v_readlane_b32", "v_writelane_b32") and then.operands[2].kind == "s":
                if then.operands[2].index in scalars:
                    found.append((4, "a lane number that a vector instruction wrote"))
    if first.unit == "salu" and M0 in scalars and SGPR + M0 in then.reads and then.unit == "vmem":
        found.append((1, "a load to LDS uses M0"))
    if first.unit == "vmem" and "store_dwordx" in first.name and vector_then:
        data = first.operands[0 if first.name.startswith("buffer") else 1]
        offset_register = first.name.startswith("buffer") and first.operands[3].kind == "s"
        if data.count > 2 and set(data.registers) & writes:
            found.append((1 if offset_register else 2, "the data of a store are overwritten"))
    return max(found)


@dataclass(frozen=True)
class Violation:
    """Two instructions that some path brings too close together."""

    first: Instruction
    then: Instruction
    distance: int
    needed: int
    why: str

    @property
    def known(self) -> bool:
        """Whether it is the one that LLVM's look-back of 19 states misses."""
        return (self.distance, self.needed) == (19, 20)

    def __str__(self) -> str:
        return f"{self.then}: {self.distance} wait states after {self.first}, which takes {self.needed}: {self.why}"


class CompilerDefect(UserWarning):
    """Code that breaks a rule in a way that is known of its compiler."""


def violations(program: Program) -> list[Violation]:
    """Each pair of instructions that some path brings closer together than a rule allows."""
    instructions = program.instructions
    before: dict[int, list[int]] = {i: [] for i in range(len(instructions) + 1)}
    for one in instructions:
        if one.name not in ("s_branch", "s_endpgm"):
            before[one.index + 1].append(one.index)
        if one.target is not None:
            before[one.target].append(one.index)
    found = []
    for then in instructions:
        if then.unit not in ("valu", "trans", "mfma", "vmem", "ds"):
            continue
        nearest: dict[int, int] = {}
        """By instruction: the fewest wait states from it to ``then``."""
        open_ = [(index, 0) for index in before[then.index]]
        while open_:
            index, distance = open_.pop()
            if nearest.get(index, LOOKBACK) <= distance:
                continue
            nearest[index] = distance
            further = distance + _wait_states(instructions[index])
            open_ += [(earlier, further) for earlier in before[index]]
        for index, distance in nearest.items():
            states, why = needed(instructions[index], then)
            if distance < states:
                found.append(Violation(instructions[index], then, distance, states, why))
    return found


def check_wait_states(program: Program) -> None:
    """Raises if a rule is broken; warns of what LLVM is known to miss."""
    found = violations(program)
    for one in found:
        if not one.known:
            raise SimulationError(f"{program.code.name}: {len(found)} violated wait states, one of them: {one}")
        warnings.warn(f"{program.code.name}: {one}", CompilerDefect, stacklevel=2)
