#!/usr/bin/env python
"""Count what the matrix products of fused_moe keep busy on gfx950 (MI350X, MI355X). STATIC: nothing runs, no GPU.

    python tools/report_gfx950.py                                     # the shipped tiles, MiniMax-M3's experts
    python tools/report_gfx950.py --rows all --rules 2                # the last rule for every row of test/shapes.csv
    python tools/report_gfx950.py --tile 256,128,128,4,2,matrix_instr_nonkdim=16   # block_m, _n, _k, warps, stages
    python tools/report_gfx950.py --times                             # and the time that the counts allow, at best
    python tools/report_gfx950.py --alternatives                      # prefill's first product where I is 192

For each product: the loop of its machine code that holds the matrix instructions; the clocks of one trip of a workgroup
that each unit of its compute unit (CU) is busy, and the busiest; the clocks of 256 rows of an expert; bytes loaded from
global memory with a byte or two a lane; registers and LDS, how many workgroups a CU takes, and the bytes of weights
that it has under way. Busy clocks are lower bounds of time: dependences, latency, bank conflicts and cache misses are
not modelled.
"""

import argparse
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test"))

import machine_code  # noqa: E402
from gfx950_simulator.assembly import Instruction, parse  # noqa: E402
from gfx950_simulator.hazards import violations  # noqa: E402
from gfx950_simulator.machine import Program  # noqa: E402
from shapes import Row, rows  # noqa: E402
from torch_mxfp8moe import configs  # noqa: E402
from torch_mxfp8moe.backends.triton.fused_moe import plan  # noqa: E402
from torch_mxfp8moe.backends.triton.launch import Launch, compile_offline  # noqa: E402
from torch_mxfp8moe.backends.triton.targets import Target  # noqa: E402
from torch_mxfp8moe.configs import Gemm, Tiles  # noqa: E402

TARGET = Target("gfx950")

# --- the machine, as public documents have it
# ISA: https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/instruction-set-architectures/\
#      amd-instinct-cdna4-instruction-set-architecture.pdf
# white paper: https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/white-papers/\
#      amd-cdna-4-architecture-whitepaper.pdf
# profiler: https://rocm.docs.amd.com/projects/rocprofiler-compute, "CDNA performance model"

CUS, LDS = 256, 160 << 10
"""https://rocm.docs.amd.com/en/latest/reference/gpu-specs.html, MI355X."""
CLOCK, HBM = 2.4e9, 8e12
"""Hz at most, and bytes a second (white paper, MI355X)."""
SIMDS, LANES, WAVES = 4, 64, 8
"""Of a CU; lanes of a wave; waves that a SIMD takes (profiler, "Pipeline descriptions")."""
REGISTERS, REGISTER_STEP = 512, 8
"""Vector registers of a SIMD by lane, accumulation registers included, and in what steps waves take them (ISA)."""
FLOP = {"f8f6f4": 2048, "bf16": 1024, "f16": 1024}
"""Of a SIMD's matrix unit in a clock, with operands of 8 bits for the first: the ISA's passes of 4 clocks, which agree
with the white paper's 5.0 and 2.5 PFLOP/s."""
VECTOR, SCALAR, SLOW = 4, 4, 16
"""Clocks that an instruction takes of a SIMD, which is 16 lanes wide (profiler); of its turn at the scalar unit, which
four SIMDs share; a transcendental one, at a quarter of the rate."""
LDS_BYTES, L1_BYTES, ADDRESSES = 128, 64, 16
"""In a clock, of a CU: bytes of LDS, read or written (white paper: reads), bytes of the vector L1 cache and lanes whose
addresses are taken (profiler, "Vector L1 cache")."""
LATENCY = 0.9e-6
"""Seconds that a load from HBM takes under load, an assumption; times HBM and over the CUs it is ENOUGH."""
ENOUGH = 28 << 10
"""Bytes of weights that a CU should have under way for memory never to wait."""

WIDTHS = {
    "byte": 1, "u8": 1, "i8": 1, "b8": 1, "short": 2, "u16": 2, "b16": 2, "dword": 4, "b32": 4, "dwordx2": 8, "b64": 8,
    "dwordx3": 12, "b96": 12, "dwordx4": 16, "b128": 16,
}  # fmt: skip
UNITS = ("MFMA", "VALU", "SALU", "LDS", "VMEM")


def unit(name: str) -> str:
    """Which unit an instruction keeps busy: one of UNITS, or ``other`` (waits, barriers, branches)."""
    if name.startswith("v_mfma"):
        return "MFMA"
    if name.startswith("v_"):
        return "VALU"
    if name.startswith("ds_"):
        return "LDS"
    if name.startswith(("global_", "buffer_", "flat_", "scratch_")):
        return "VMEM"
    control = r"s_(waitcnt|barrier|nop|branch|cbranch|setprio|sched|endpgm|sleep)"
    return "other" if re.match(control, name) else "SALU"


def width(one: Instruction) -> int:
    """Bytes of a lane that a memory or LDS instruction moves."""
    parts = one.name.replace("ubyte", "byte").replace("sbyte", "byte").replace("ushort", "short").split("_")
    size = next(WIDTHS[part] for part in parts if part in WIDTHS)
    return size * (2 if "read2" in one.name or "write2" in one.name else 1)


def to_lds(one: Instruction) -> bool:
    """A load that writes LDS itself."""
    return "load_lds" in one.name or "lds" in one.modifiers


def flop(one: Instruction) -> int:
    """Of a matrix instruction: v_mfma[_scale]_f32_MxNxK_type."""
    m, n, k = map(int, one.name.split("f32_")[1].split("_")[0].split("x"))
    return 2 * m * n * k


def clocks(one: Instruction) -> dict[str, float]:
    """How long the instruction of one wave keeps each unit busy: the SIMD's, or the CU's for LDS and VMEM."""
    kind = unit(one.name)
    if kind == "MFMA":
        return {kind: flop(one) / FLOP[one.name.split("_")[-1]]}
    if kind == "VALU":
        slow = one.name.startswith(("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_"))
        return {kind: SLOW if slow else VECTOR}
    if kind == "SALU":
        return {kind: SCALAR}
    if kind == "LDS":
        return {kind: LANES * max(width(one), 4) / LDS_BYTES}
    if kind == "VMEM":
        busy = {kind: max(LANES / ADDRESSES, LANES * width(one) / L1_BYTES)}
        return busy | ({"LDS": LANES * max(width(one), 4) / LDS_BYTES} if to_lds(one) else {})
    return {}


def matrix_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The innermost loop with the most matrix instructions. Few trips are unrolled: then all up to the last one."""
    loops = [
        instructions[one.target : one.index + 1]
        for one in instructions
        if one.target is not None and one.target <= one.index
    ]
    inner = [loop for loop in loops if not any(a is not loop and a[0] in loop and a[-1] in loop for a in loops)]
    matrix = [one for one in instructions if unit(one.name) == "MFMA"]
    best = max(inner, key=lambda loop: sum(one in matrix for one in loop), default=[])
    return best if any(one in matrix for one in best) else instructions[: matrix[-1].index + 1]


def resident(code: machine_code.Code, warps: int) -> int:
    """Workgroups of ``warps`` waves that a CU takes at once."""
    step = -(-code.registers // REGISTER_STEP) * REGISTER_STEP
    by_registers = min(WAVES, REGISTERS // step) * SIMDS // warps
    return min(by_registers, LDS // code.shared if code.shared else WAVES)


@dataclass(frozen=True)
class Report:
    """What one product's machine code says. Of the loop, by trip."""

    rows: int
    """Of weights in a tile."""
    tiles: int
    """That take all columns of the result."""
    block_m: int
    block_k: int
    depth: int
    """Columns of K, all trips."""
    warps: int
    ahead: int
    """Stages whose loads are under way at once."""
    counts: Counter
    """Instructions of one wave by unit."""
    busy: dict[str, float]
    """Clocks of a CU's units for one workgroup; all SIMDs that have waves work at once."""
    k: float
    """Columns of K."""
    unrolled: bool
    """There is no loop; what is counted is all trips at once."""
    after: float
    """Clocks of the vector unit after the loop, once a workgroup."""
    narrow: Counter
    """Loads of less than 4 bytes a lane, by name."""
    code: machine_code.Code
    accumulation: int
    """Accumulation registers, of the registers."""
    hazards: int
    """Wait states that the compiler left out (gfx950_simulator.hazards)."""

    @property
    def busiest(self) -> str:
        return max(self.busy, key=self.busy.get)

    @property
    def workgroups(self) -> int:
        """Of a CU."""
        return resident(self.code, self.warps)

    @property
    def whole(self) -> float:
        """Clocks of a CU for 256 rows of an expert, tiles that are not full included: of the busiest unit in the loop,
        and of the vector unit after it."""
        return self.tiles * 256 / self.block_m * (self.depth / self.k * max(self.busy.values()) + self.after)

    @property
    def in_flight(self) -> int:
        """Bytes of weights that a CU has under way: all stages but the one that is multiplied if loads go straight to
        LDS, else those of one stage, which registers hold."""
        return min(self.ahead * self.block_k, self.depth) * self.rows * self.workgroups


def read(launch: Launch, kernel) -> Report:
    """launch: of the product that ``kernel`` is compiled from."""
    code = machine_code.read(kernel, "gfx950")
    program = parse(code.text)
    loop = matrix_loop(program.instructions)
    a, warps = launch.arguments, launch.options["num_warps"]
    simds = min(SIMDS, warps * max(1, resident(code, warps)))
    counts, busy = Counter(), dict.fromkeys(UNITS, 0.0)
    for one in loop:
        counts[unit(one.name)] += 1
        for name, time in clocks(one).items():
            busy[name] += time * (warps if name in ("LDS", "VMEM") else warps / simds)
    weight_rows = (2 if a["GATE_UP"] else 1) * a["BLOCK_N"]
    work = sum(flop(one) for one in loop if unit(one.name) == "MFMA") * warps
    return Report(
        rows=weight_rows, tiles=ceil(a["N"] / a["BLOCK_N"]), block_m=a["BLOCK_M"], block_k=a["BLOCK_K"],
        depth=a["K"], warps=warps,
        ahead=launch.options["num_stages"] - 1 if any(map(to_lds, program.instructions)) else 1,
        counts=counts, busy=busy, k=work / (2 * weight_rows * a["BLOCK_M"]),
        unrolled=loop[-1].target != loop[0].index,
        after=sum(clocks(one).get("VALU", 0) for one in program.instructions[loop[-1].index + 1 :]) * warps / simds,
        narrow=Counter(
            one.name for one in loop
            if unit(one.name) in ("LDS", "VMEM") and width(one) < 4 and ("load" in one.name or "read" in one.name)
        ),
        code=code, accumulation=int(re.search(r"\.agpr_count: +(\d+)", code.text)[1]),
        hazards=len(violations(Program(program))),
    )  # fmt: skip


def products(row: Row, tiles: Tiles, dtype: str = "mxfp8", tokens: int = 64) -> list[Launch]:
    """Both products of a layer, on tensors without memory."""
    call = row.call(tokens, "meta", activation_dtype=dtype).with_out()
    return plan(call, TARGET, tiles).bind(call.inputs | {"out": call.out}, call.device)[2:4]


def reports(row: Row, tiles: Tiles, dtype: str = "mxfp8") -> list[Report]:
    launches = products(row, tiles, dtype)
    return [read(*both) for both in zip(launches, compile_offline(launches, TARGET))]


def describe(gemm: Gemm, r: Report) -> str:
    options = "".join(f" {name}={value}" for name, value in gemm.options.items())
    return f"{r.block_m} x {r.rows} x {r.block_k}, {r.warps}w {gemm.num_stages}s{options}"


HEADER = [
    "row", "product", "tile: tokens x rows x K", *UNITS, "busiest", "instructions", "narrow loads", "VALU after",
    "256 rows", "registers", "stack", "LDS KiB", "workgroups", "in flight KiB", "hazards",
]  # fmt: skip
LEGEND = f"""Of one trip of the loop (unrolled: of all trips). MFMA: clocks of a CU for a workgroup; VALU to VMEM:
theirs, in parts of MFMA's. Instructions: {", ".join((*UNITS, "other"))}, of one wave. Narrow loads: of less than
4 bytes a lane. VALU after: clocks behind the loop. 256 rows: clocks of a CU for so many rows of an expert and all
columns, in loops by their busiest unit, and behind them. Workgroups: of a CU. In flight: KiB of weights of a CU; at
decode it takes {ENOUGH >> 10}. Hazards: missing wait states."""


def line(name: str, product: int, gemm: Gemm, r: Report) -> list[str]:
    share = [f"{r.busy[u] / r.busy['MFMA']:.0%}" for u in UNITS[1:]]
    return [
        name, str(product), describe(gemm, r),
        f"{r.busy['MFMA']:.0f}" + " (unrolled)" * r.unrolled, *share, r.busiest,
        " ".join(f"{r.counts[u]}" for u in (*UNITS, "other")),
        " ".join(f"{count}x {kind}" for kind, count in r.narrow.items()) or "none",
        f"{r.after:.0f}", f"{r.whole:.0f}", f"{r.code.registers} ({r.accumulation} acc)", str(r.code.stack),
        f"{r.code.shared / 1024:.1f}", str(r.workgroups), f"{r.in_flight / 1024:.0f}", str(r.hazards),
    ]  # fmt: skip


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


# --- where a tile of 128 columns of each half would be half empty

NARROW = "Qwen3-30B-A3B TP4"
ALTERNATIVES = {
    "256 x 256, the second half empty": (256, 128, 4, None, 16),
    "256 x 128": (256, 64, 4, None, 16),
    "256 x 128, 32 x 32 x 64 instructions": (256, 64, 4, None, 32),
    "256 x 128, 8 waves": (256, 64, 8, None, 16),
    "256 x 128, 2 waves": (256, 64, 2, None, 16),
    "256 x 128, 2 waves, a stage in registers": (256, 64, 2, False, 16),
    "256 x 64": (256, 32, 4, None, 16),
    "128 x 256, the second half empty": (128, 128, 4, None, 16),
    "128 x 128": (128, 64, 4, None, 16),
    "128 x 128, 2 waves, a stage in registers": (128, 64, 2, False, 16),
}
"""Tiles of prefill's first product: rows, columns of each half, waves, ``Launch.to_lds``, matrix_instr_nonkdim."""


def alternative(row: Row, block_m: int, block_n: int, warps: int, to_lds: bool | None, nonkdim: int) -> Report:
    """Of the first product, with a tile that the launches of a layer need not choose."""
    gemm = Gemm(block_n, 128, warps, 2, options=dict(matrix_instr_nonkdim=nonkdim))
    launch = products(row, Tiles(None, block_m, gemm, gemm))[0]
    arguments = launch.arguments | dict(BLOCK_N=block_n, WAVES=2 if block_m >= 128 and warps == 4 else 1)
    launch = replace(launch, arguments=arguments, options=launch.options | dict(num_warps=warps), to_lds=to_lds)
    launch.kernel.device_caches.clear()  # which do not know to_lds
    return read(launch, *compile_offline([launch], TARGET))


def alternative_lines() -> list[list[str]]:
    result = []
    for name, tile in ALTERNATIVES.items():
        r = alternative(rows()[NARROW], *tile)
        trip = r.busy[r.busiest]
        result.append([
            name, str(r.tiles), str(r.workgroups), *(f"{r.busy[u] / r.busy['MFMA']:.0%}" for u in ("LDS", "VMEM")),
            f"{trip:.0f} ({r.busiest})", f"{r.after:.0f}", f"{r.whole:.0f}", str(r.code.stack),
        ])  # fmt: skip
    return result


ALTERNATIVE_HEADER = ["tile", "tiles", "workgroups", "LDS", "VMEM", "clocks a trip", "VALU after", "256 rows", "stack"]

# --- times

AITER = {
    "MiniMax-M3 + fused shared expert TP4": {1: 25.6, 16: 182.6, 64: 294.9, 256: 303.7, 1024: 342.7, 8192: 1073.9},
    "GLM-5 + fused shared expert TP4": {1: 27.0, 16: 181.5, 64: 351.2, 256: 409.2, 1024: 474.8, 8192: 1516.1},
}
"""Microseconds of both products in the tuning files of https://github.com/ROCm/aiter at commit e4048607a5."""
TOKENS = (1, 16, 64, 256, 1024, 8192)


def times(row: Row, tokens: int, r: Report, launch: Launch) -> dict[str, float]:
    """Seconds, by what takes them, of one product: routes spread evenly over the experts."""
    a = launch.arguments
    routes = tokens * row.topk * row.local / row.experts
    experts = min(row.local, routes)
    tiles = experts * ceil(routes / experts / r.block_m)
    groups = ceil(tiles) * ceil(a["N"] / a["BLOCK_N"])
    trips = ceil(a["K"] / r.k)
    halves = 2 if a["GATE_UP"] else 1
    weights = experts * halves * a["N"] * a["K"] * 33 / 32
    activations = routes * (a["K"] * 33 / 32 + a["N"] * (33 / 32 if halves == 2 else 2))
    cus = min(groups, CUS)
    busy = {name: trips * clocks + (r.after if name == "VALU" else 0) for name, clocks in r.busy.items()}
    found = {name: ceil(groups / CUS) * clocks / CLOCK for name, clocks in busy.items()}
    under_way = cus * min(r.in_flight, r.in_flight / r.workgroups * ceil(groups / CUS))
    found["HBM"] = (weights + activations) / HBM
    found["latency"] = weights / under_way * LATENCY if under_way else 0.0
    return found


def time_lines(row: Row, dtype: str) -> list[list[str]]:
    result = []
    for tokens in TOKENS:
        tiles = configs.choose(
            "gfx950", dtype, tokens=tokens, hidden=row.hidden, intermediate=row.intermediate, experts=row.experts,
            topk=row.topk,
        )  # fmt: skip
        launches = products(row, tiles, dtype, tokens)
        found = [times(row, tokens, *both) for both in zip(reports(row, tiles, dtype), launches)]
        routes = tokens * row.topk * row.local / row.experts
        # Dispatch reads a token and writes its rows; combine reads as many and writes the token.
        other = (tokens * row.hidden * 4 + routes * row.hidden * (33 / 32 + 2)) / HBM
        limits = [max(one, key=one.get) for one in found]
        aiter = AITER.get(row.name, {}).get(tokens)
        result.append([
            row.name, str(tokens), *(f"{max(one.values()) * 1e6:.1f} ({name})" for one, name in zip(found, limits)),
            f"{other * 1e6:.1f}", f"{(sum(max(one.values()) for one in found) + other) * 1e6:.1f}", str(aiter or "-"),
        ])  # fmt: skip
    return result


TIME_HEADER = ["row", "tokens", "product 1, us", "product 2, us", "dispatch and combine, us", "sum, us",
               "aiter's two products, us"]  # fmt: skip


def tile(text: str) -> Tiles:
    """--tile's argument."""
    numbers = [int(part) for part in text.split(",") if "=" not in part]
    if len(numbers) != 5:
        raise argparse.ArgumentTypeError("it takes block_m,block_n,block_k,num_warps,num_stages[,option=number]...")
    options = {name: int(value) for name, _, value in (p.partition("=") for p in text.split(",") if "=" in p)}
    gemm = Gemm(*numbers[1:], options=options)
    return Tiles(None, numbers[0], gemm, gemm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["MiniMax-M3 + fused shared expert TP4"]
    parser.add_argument("--rows", nargs="+", default=default, help="of test/shapes.csv, 'MODEL PARALLEL', or all")
    parser.add_argument("--rules", nargs="+", type=int, help="of the shipped tiles, from 0 (default: all)")
    parser.add_argument("--tile", type=tile, action="append", help="instead of the shipped ones; for both products")
    parser.add_argument("--activations", choices=("mxfp8", "bf16"), default="mxfp8", help="activation_dtype")
    parser.add_argument("--alternatives", action="store_true", help=f"{NARROW}'s first product at prefill, by tile")
    parser.add_argument("--times", action="store_true", help="a second table: microseconds, at best, next to aiter's")
    args = parser.parse_args()
    if args.alternatives:
        print(f"STATIC: nothing ran. gfx950, Triton {triton.__version__}, first product of {NARROW}.\n")
        print(table(ALTERNATIVE_HEADER, alternative_lines()))
        return
    chosen = [rows()[name] for name in (rows() if args.rows == ["all"] else args.rows)]
    rules = configs.load("gfx950", args.activations).tiles
    tiles = args.tile or [rules[i] for i in (args.rules or range(len(rules)))]
    lines = [
        line(row.name, i + 1, (one.gemm1, one.gemm2)[i], report)
        for row in chosen for one in tiles for i, report in enumerate(reports(row, one, args.activations))
    ]  # fmt: skip
    print(f"STATIC: nothing ran. gfx950, Triton {triton.__version__}, {args.activations} activations.\n")
    print(LEGEND + "\n")
    print(table(HEADER, lines))
    if args.times:
        print("\nAt best, by these counts: an ESTIMATE, nothing ran. aiter's: its own measurements.\n")
        print(table(TIME_HEADER, [one for row in chosen for one in time_lines(row, args.activations)]))


if __name__ == "__main__":
    main()
