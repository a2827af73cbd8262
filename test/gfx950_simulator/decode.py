"""Gives each instruction what executing and checking it takes: its function, its unit, the registers it touches."""

from . import matrix, memory_access, scalar, vector  # noqa: F401  (they fill the table)
from .assembly import EXEC, M0, AssemblyError, Instruction
from .operands import SGPR, TABLE, registers


def decode(instruction: Instruction) -> None:
    """Sets ``run``, ``unit``, ``reads`` and ``writes`` (register numbers, SGPRs from SGPR on), and ``matters``: those
    of ``reads`` that have a part in the result."""
    definition = TABLE.get(instruction.name)
    if definition is None:
        raise AssemblyError(f"{instruction}: this instruction is not known")
    instruction.returns = instruction.lane_map = instruction.written = instruction.matters = None
    try:
        instruction.run = definition.build(instruction)
    except AssemblyError as error:
        raise error if instruction.text in str(error) else AssemblyError(f"{instruction}: {error}") from error
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise AssemblyError(f"{instruction}: form is not known ({type(error).__name__}: {error})") from error
    instruction.unit, instruction.writes_scc = definition.unit, definition.writes_scc
    instruction.writes_sources = definition.writes_sources
    dests, operands = definition.dests, list(instruction.operands)
    to_lds = bool(instruction.modifiers.get("lds"))
    if to_lds:
        dests = 0
    elif instruction.returns is not None and instruction.name.startswith(("global", "flat")):
        dests = 1
    writes = [number for one in operands[:dests] for number in registers(one)]
    reads = [number for one in operands[dests:] for number in registers(one)]
    if instruction.name.startswith("buffer_atomic") and instruction.returns is not None:
        writes = registers(instruction.returns)
    if definition.reads_dest:
        reads += registers(operands[0])
    if definition.writes_sources:
        writes += registers(operands[1])
    reads += definition.implicit
    if to_lds:
        reads.append(SGPR + M0)
    if "saveexec" in instruction.name or instruction.name.startswith("v_cmpx"):
        writes += [SGPR + EXEC, SGPR + EXEC + 1]
    instruction.reads, instruction.writes = tuple(dict.fromkeys(reads)), tuple(dict.fromkeys(writes))
    if instruction.encoding == "sdwa" and instruction.modifiers.get("dst_unused") == "UNUSED_PRESERVE":
        instruction.reads += instruction.writes
    instruction.matters = instruction.matters or instruction.reads
