"""Whether the gfx950 simulator and its checks notice when one instruction of a compiled kernel is wrong.

Each mutation changes one line of the assembly that Triton emitted: caught means that the result is wrong or that a
check raised. The list is fixed; which line a pattern finds depends on Triton's version, and a version whose code has no
such line leaves the mutation out.
"""

import re
from dataclasses import dataclass

import pytest

from helpers import only_cpu
from torch_mxfp8moe.backends.triton import _interpreted

pytest.importorskip("triton", reason="needs Triton: pip install triton")
pytest.importorskip("numpy", "2.0")
if _interpreted():
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled", allow_module_level=True)

from gfx950_mutants import SUBJECTS, subject  # noqa: E402
from gfx950_simulator.assembly import AssemblyError  # noqa: E402
from gfx950_simulator.machine import SimulationError  # noqa: E402

pytestmark = only_cpu

ENOUGH = 40
"""Mutations that have to be there and caught, whatever the version of Triton."""


@dataclass(frozen=True)
class Mutation:
    """In the ``which``-th line of a kernel's code that matches ``pattern``: old -> new; no ``old``: no line."""

    kernel: str
    pattern: str
    which: int = 0
    old: str = ""
    new: str | object = ""
    unchanged: str = ""
    """Why the mutant does the same as the original, for one that does."""

    def __str__(self) -> str:
        what = (
            "gone" if not self.old else f"{self.old} -> {self.new}" if isinstance(self.new, str) else self.new.__name__
        )
        return f"{self.kernel}: {self.pattern} #{self.which} {what}"

    def apply(self, text: str) -> str | None:
        """The mutant; None if the code has no such line."""
        lines = text.split("\n")
        end = next(i for i, line in enumerate(lines) if line.startswith(".Lfunc_end"))
        # what comes before is executed only where arguments are not preloaded
        start = next((i for i, line in enumerate(lines) if line.startswith(".LBB0_0:")), 0)
        found = [i for i in range(start, end) if re.match(rf"\s+{self.pattern}", lines[i])]
        if not -len(found) <= self.which < len(found):
            return None
        at = found[self.which]
        if not self.old:
            lines[at] = ""
        else:
            changed = re.sub(self.old, self.new, lines[at], count=1)
            if changed == lines[at]:
                return None
            lines[at] = changed
        return "\n".join(lines)


def flip_op_sel(side: int):
    """The other byte of the low or high half of operand A's (0) or B's (1) scale."""

    def flipped(match: re.Match) -> str:
        bits = [int(x) for x in match.group(1).split(",")] if match.group(1) else [0, 0, 0]
        bits[side] ^= 1
        return f" op_sel:{bits} op_sel_hi".replace(", ", ",")

    flipped.__name__ = f"op_sel of {'AB'[side]} flipped"
    return flipped


def flip_op_sel_hi(match: re.Match) -> str:
    return f"op_sel_hi:[{1 - int(match.group(1))}"


def plus(step: int):
    def moved(match: re.Match) -> str:
        return f"offset:{int(match.group(1)) + step}"

    moved.__name__ = f"offset + {step}"
    return moved


OP_SEL, OFFSET, SCALED, MFMA = r"(?: op_sel:\[([\d,]+)\])? op_sel_hi", r"offset:(\d+)", "v_mfma_scale", "v_mfma"
AB = r"(\S+), (v\[[\d:]+\]), (v\[[\d:]+\]),"
SCALES = r"(v\d+), (v\d+)(?= op_sel)"

MUTATIONS = [
    # the matrix instruction: scale bytes, operands, accumulator
    *[Mutation("dot_scaled", SCALED, i, OP_SEL, flip_op_sel(side)) for i in (0, -1) for side in (0, 1)],
    Mutation("dot_scaled", SCALED, 1, r"op_sel_hi:\[(\d)", flip_op_sel_hi),
    *[Mutation("dot_scaled", SCALED, i, SCALES, r"\2, \1") for i in (0, 2)],
    *[Mutation("dot_scaled", SCALED, i, AB, r"\1, \3, \2,") for i in (0, -1)],
    Mutation("dot_scaled", SCALED, 3, r"([va]\[\d+:\d+\]), (v\d+, v\d+)", r"0, \2"),
    Mutation("dot_scaled", SCALED, 1, r"$", " cbsz:1"),
    Mutation("dot_scaled", SCALED, 2),
    *[Mutation("gemm1", SCALED, i, OP_SEL, flip_op_sel(side)) for i, side in ((0, 0), (1, 1))],
    Mutation("gemm1", SCALED, -1, AB, r"\1, \3, \2,"),
    Mutation("gemm2", SCALED, 0, SCALES, r"\2, \1"),
    Mutation("gemm2", SCALED, -1, AB, r"\1, \3, \2,"),
    Mutation("dot", MFMA, 0, AB, r"\1, \3, \2,"),
    Mutation("dot", MFMA, -1, r"([va]\[\d+:\d+\])$", "0"),
    # waits
    *[Mutation("dot_scaled", r"s_waitcnt vmcnt", i) for i in (0, 1)],
    *[Mutation("dot_scaled", r"s_waitcnt lgkmcnt", i) for i in (0, -1)],
    Mutation("dot", r"s_waitcnt vmcnt", 0),
    Mutation("dot", r"s_waitcnt lgkmcnt", -1),
    Mutation("reduce", r"s_waitcnt vmcnt", 0),
    *[Mutation("reduce", r"s_waitcnt lgkmcnt", i) for i in (1, -1)],
    Mutation("quantize", r"s_waitcnt vmcnt", 0, r"vmcnt\(\d+\)", "vmcnt(15)"),
    Mutation("route", r"s_waitcnt vmcnt", 0),
    Mutation("quantize_preshuffle", r"s_waitcnt vmcnt", -1),
    Mutation("gemm1", r"s_waitcnt vmcnt", -1),
    # barriers and wait states
    *[Mutation("dot", r"s_barrier", i) for i in (0, 1, -1)],
    *[Mutation("reduce", r"s_barrier", i) for i in (0, -1)],
    Mutation("quantize_preshuffle", r"s_barrier", 0),
    Mutation("gemm1", r"s_barrier", -1),
    *[Mutation("reduce", r"s_nop", i) for i in (0, -1)],
    Mutation("dot", r"s_nop", -1),
    Mutation("dot_scaled", r"s_nop 1[0-9]", -1, r"s_nop \d+", "s_nop 3"),
    # addresses
    Mutation("dot_scaled", r"ds_read_b128.*offset", 0, OFFSET, plus(16)),
    Mutation("dot_scaled", r"ds_read_b128.*offset", 1, OFFSET, plus(4)),
    Mutation("dot_scaled", r"ds_read_b128.*offset", 2, OFFSET, plus(1024)),
    Mutation("dot_scaled", r"ds_read_u8.*offset", 0, OFFSET, plus(1)),
    Mutation("dot_scaled", r"ds_write_b8.*offset", 0, OFFSET, plus(2)),
    Mutation("dot_scaled", r"global_load_ubyte", 0, r"$", " offset:1"),
    Mutation("dot_scaled", r"global_store_dwordx4", 0, r"off( offset:\d+)?", "off offset:32"),
    Mutation("dot", r"ds_read_b64_tr_b16.*offset", 0, OFFSET, plus(8)),
    Mutation("dot", r"(global|buffer)_load_(lds_)?dwordx4", 0, r"off\b", "off offset:16"),
    Mutation("dot", r"ds_read_b64_tr_b16", 1, "b64_tr_b16", "b64"),
    Mutation("reduce", r"ds_read_b32", 0, r"$", " offset:4"),
    Mutation("reduce", r"buffer_store_dword ", 0, "offen", "offen offset:4"),
    Mutation("quantize", r"buffer_load_dword", 0, r"offen( offset:\d+)?", "offen offset:4"),
    Mutation("quantize", r"buffer_store_byte", 0, r"offen( offset:\d+)?", "offen offset:1"),
    Mutation("quantize_preshuffle", r"buffer_load_dwordx4", 0, r"offen( offset:\d+)?", "offen offset:64"),
    Mutation("quantize_preshuffle", r"buffer_store_dwordx4", 0, r"offen( offset:\d+)?", "offen offset:16"),
    Mutation("quantize_preshuffle", r"buffer_store_byte", 0, r"offen( offset:\d+)?", "offen offset:1"),
    Mutation("gemm1", r"buffer_load_dwordx4", 0, "offen", "offen offset:16"),
    Mutation("gemm2", r"buffer_load_ubyte", 0, r"offen( offset:\d+)?", "offen offset:1"),
    # arithmetic, lanes, flow
    Mutation("reduce", r"v_add_u32_dpp.*row_shr:8", 0, "row_shr:8", "row_shr:4"),
    Mutation("reduce", r"v_add_u32_dpp.*row_bcast:31", 0, "row_bcast:31", "row_bcast:15"),
    Mutation("reduce", r"v_mov_b32_dpp.*row_bcast:15", 0, "row_bcast:15", "row_bcast:31"),
    Mutation("reduce", r"v_readlane_b32.*63", 0, "63", "62"),
    Mutation("reduce", r"v_cndmask_b32_e64", -1, r"(v\d+), (v\d+), (?=s|vcc)", r"\2, \1, "),
    Mutation("quantize", r"v_max_i32", 0, "v_max", "v_min"),
    Mutation("quantize_preshuffle", r"v_max_i32", -1, "v_max", "v_min"),
    Mutation("dot_scaled", r"v_perm_b32", 0, r"(v\d+), (v\d+), (?=s|v)", r"\2, \1, "),
    Mutation("route", r"v_cmp_gt_i32", 0, "_gt_", "_le_"),
    Mutation("route", r"s_cbranch_scc1", -1, "scc1", "scc0"),
    Mutation("gemm1", r"v_exp_f32", 0, "v_exp", "v_log"),
    Mutation(
        "gemm1",
        r"v_div_fixup_f32",
        0,
        r"(v\d+), (v\d+)$",
        r"\2, \1",
        unchanged="of finite operands that are not 0 it takes the signs, in either order",
    ),
    Mutation("gemm1", r"v_div_fmas_f32", 0, r"(v\d+), (v\d+), (v\d+), (v\d+)$", r"\1, \2, \4, \3"),
    Mutation("gemm1", r"v_pk_mul_f32", 0, r"op_sel_hi:\[\d", "op_sel:[1,0] op_sel_hi:[1"),
    *[Mutation("combine", r"v_(pk_)?fma", i) for i in (0, -1)],
    Mutation("dispatch", r"v_cvt_scalef32_pk_fp8_f32", 0, r"(v\d+), (v\d+), 1\.0", r"\2, \1, 1.0"),
    Mutation("dispatch", r"v_cvt_scalef32_pk_fp8_f32", 1, r"op_sel:\[0,0,0,1\]", "op_sel:[0,0,0,0]"),
    Mutation("dispatch", r"v_cvt_scalef32_pk_fp8_f32", 1, r"1\.0", "2.0"),
    Mutation("dispatch", r"v_cmp_gt_i32", -1, "_gt_", "_le_"),  # the first are for mantissas longer than its bf16's
]


def outcome(mutation: Mutation) -> str:
    """``right``, ``wrong``, ``reported`` or ``absent``."""
    kernel = subject(mutation.kernel)
    mutant = mutation.apply(kernel.text())
    if mutant is None:
        return "absent"
    try:
        return "right" if kernel.right(mutant) else "wrong"
    except (SimulationError, AssemblyError):
        return "reported"


@pytest.mark.parametrize("name", SUBJECTS)
def test_originals(name):
    assert subject(name).right(subject(name).text())


@pytest.mark.filterwarnings("ignore::gfx950_simulator.hazards.CompilerDefect")
def test_mutations():
    results = {str(mutation): (mutation, outcome(mutation)) for mutation in MUTATIONS}
    assert len(results) == len(MUTATIONS), "a mutation is listed twice"
    missed = [name for name, (mutation, got) in results.items() if got == "right" and not mutation.unchanged]
    assert not missed, "not caught:\n" + "\n".join(missed)
    counts = dict.fromkeys(("wrong", "reported", "right", "absent"), 0)
    for name, (mutation, got) in results.items():
        counts[got] += 1
        assert not mutation.unchanged or got in ("right", "absent"), f"said to change nothing, but caught: {name}"
    print(f"\ngfx950 mutations: {counts}")
    assert counts["wrong"] + counts["reported"] >= ENOUGH
