#!/usr/bin/env python
"""Run aiter's MoE kernels, as gfx950 machine code, in the simulator on weights from ``preshuffle``; needs no GPU.

    python tools/prove_aiter.py                 # every case, and for some of them every wrong layout
    python tools/prove_aiter.py --cases GLM     # cases with that in their names
    python tools/prove_aiter.py --list
    python tools/prove_aiter.py --tables        # no numbers: what the checks say to every kernel of aiter's tables

Weights and scales come from ``preshuffle(layout="aiter_gfx950")``, launches from aiter's own host code, machine code
from FlyDSL; test/gfx950_simulator executes it with all its checks (test/aiter_gfx950.py says how, and what stands in
for aiter's HIP kernels). Compared are

- stage 1 with float64 on the same operands, its result rounded as aiter rounds it;
- stage 2 with float64 on the codes and scales that stage 1 left;
- the layer with this package's reference op on the weights as they were, row by row.

Then each layout is got wrong once: the same comparison has to fail by a wide margin.

Exits with 0 if all of this holds, with 1 if not, and with 77 if there is no aiter with MXFP8 kernels to import and
nothing was compared. Run it with a Python that has torch, numpy, aiter (https://github.com/ROCm/aiter) and the flydsl
that aiter pins.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "test")]

from aiter_gfx950 import (  # noqa: E402
    Aiter, NoAiter, Sorted, place, quantize, quantize_fused, sort_routes, sort_scales,
)  # fmt: skip
from gfx950_simulator import launch as simulator  # noqa: E402

import torch_mxfp8moe  # noqa: E402
from torch_mxfp8moe.formats import SCALE_ONE  # noqa: E402

SKIPPED = 77

SILU = dict(swiglu_alpha=1.0, swiglu_beta=0.0, swiglu_limit=None)
SWIGLU_OAI = dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=7.0)
"""MiniMax-M3's and gpt-oss's."""


@dataclass(frozen=True)
class Case:
    """A layer, and the kernels that compute it by aiter's names for them."""

    name: str
    stage1: str
    stage2: str
    swiglu: dict
    H: int
    I: int
    E: int
    topk: int
    T: int
    away: int = 0
    """Experts on other ranks, from E on; all routes of the first token go there."""
    pad_to: int = 1
    """Of ``preshuffle``."""
    wrong_layouts: bool = False
    """Are tried too."""
    unordered: bool = False
    """Waves of stage 1 read from LDS what another's load to it need not have brought yet (docs/aiter_proof.md)."""
    past_ids: bool = False
    """Stage 2 reads past the end of the sorted ids as aiter allocates them."""


# Kernels that aiter's tuned tables name for these models and token counts, and those it takes where they have no row;
# sizes are cut.
CASES = (
    Case("MiniMax-M3 decode", "flydsl_moe1_afp8_wfp8_bf16_t32x64x256_w4_gui_kw2_fp8",
         "flydsl_moe2_layout_afp8_wfp8_bf16_t32x128x256_atomic_nt_sbm32", SWIGLU_OAI, 512, 256, 4, 2, 13,
         wrong_layouts=True),
    Case("MiniMax-M3 decode, one token", "flydsl_moe1_afp8_wfp8_bf16_t32x64x256_w2_gui_kw2_fp8",
         "flydsl_moe2_layout_afp8_wfp8_bf16_t32x128x128_atomic_nt_sbm32", SWIGLU_OAI, 1024, 384, 8, 4, 1),
    Case("MiniMax-M3 decode, terms apart", "flydsl_moe1_afp8_wfp8_bf16_t32x128x256_w2_gui_fp8",
         "flydsl_moe2_layout_afp8_wfp8_bf16_t32x128x128_reduce_nt_sbm32", SWIGLU_OAI, 512, 384, 4, 2, 13),
    Case("MiniMax-M3 decode, full H and I", "flydsl_moe1_afp8_wfp8_bf16_t32x64x256_w4_gui_kw2_fp8",
         "flydsl_moe2_layout_afp8_wfp8_bf16_t32x128x256_reduce_nt_sbm32", SWIGLU_OAI, 6144, 768, 4, 3, 4),
    Case("MiniMax-M3 decode, full H and I, 128 columns", "flydsl_moe1_afp8_wfp8_bf16_t32x128x256_w2_gui_fp8",
         "flydsl_moe2_layout_afp8_wfp8_bf16_t32x128x256_atomic_nt_sbm32", SWIGLU_OAI, 6144, 768, 4, 3, 8,
         unordered=True),
    Case("MiniMax-M3 prefill, 64 rows", "flydsl_moe1_afp8_wfp8_bf16_t64x128x256_w2_gui_fp8",
         "flydsl_moe2_layout_afp8_wfp8_bf16_t64x128x128_atomic_nt_sbm64", SWIGLU_OAI, 512, 384, 4, 2, 100),
    Case("MiniMax-M3 prefill, 128 rows", "flydsl_moe1_afp8_wfp8_bf16_t128x128x256_w2_bnt0_gui_fp8",
         "flydsl_moe2_layout_afp8_wfp8_bf16_t64x128x128_atomic_sbm128", SWIGLU_OAI, 512, 256, 3, 2, 150),
    Case("MiniMax-M3 prefill, 128 x 256", "flydsl_moe1_afp8_wfp8_bf16_t128x256x256_w4_bnt0_gui_xcd4_fp8",
         "flydsl_moe2_layout_afp8_wfp8_bf16_t64x128x128_reduce_sbm128", SWIGLU_OAI, 512, 256, 2, 2, 150),
    Case("MiniMax-M3, expert parallel", "flydsl_moe1_afp8_wfp8_bf16_t32x64x256_w4_gui_fp8",
         "flydsl_moe2_layout_afp8_wfp8_bf16_t32x256x256_atomic_nt_sbm32", SWIGLU_OAI, 512, 256, 4, 2, 30, away=4),
    Case("GLM-5 decode", "flydsl_moe1_afp8_wfp8_bf16_t32x64x256_w3_gui_fp8",
         "flydsl_moe2_afp8_wfp8_bf16_t32x128x128_atomic_bnt2", SILU, 512, 256, 6, 3, 9),
    Case("GLM-5 decode, terms apart", "flydsl_moe1_afp8_wfp8_bf16_t32x64x256_gui_xcd4_kw2_fp8",
         "flydsl_moe2_afp8_wfp8_bf16_t32x128x256_reduce", SILU, 512, 256, 6, 3, 9),
    Case("GLM-5 prefill, 64 rows, bf16 between", "flydsl_moe1_afp8_wfp8_bf16_t64x128x256_w4_bnt0_gui",
         "flydsl_moe2_afp8_wfp8_bf16_t64x128x256_atomic_bnt2_persist", SILU, 512, 512, 4, 2, 100),
    Case("GLM-5 prefill, 128 rows", "flydsl_moe1_afp8_wfp8_bf16_t128x128x256_w4_gui_fp8",
         "flydsl_moe2_afp8_wfp8_bf16_t64x128x128_atomic_sbm128", SILU, 512, 256, 3, 2, 150, past_ids=True),
    Case("no row, SiLU with a limit", "flydsl_moe1_afp8_wfp8_bf16_t32x128x256_w2_gui",
         "flydsl_moe2_afp8_wfp8_bf16_t32x128x256_atomic_bnt2", SILU | dict(swiglu_limit=1.0), 512, 256, 4, 2, 13,
         wrong_layouts=True),
    Case("no row, I = 192 padded to 256", "flydsl_moe1_afp8_wfp8_bf16_t32x128x256_w2_gui",
         "flydsl_moe2_afp8_wfp8_bf16_t32x128x256_atomic_bnt2", SWIGLU_OAI, 512, 192, 4, 2, 13, pad_to=256),
)  # fmt: skip

STAGE1_LIMIT = 1e-3
"""Relative L2: what is computed agrees to fp32, so that few values round another way."""
STAGE2_LIMIT = 6e-3
"""bf16 output: terms and their sums are rounded to it."""
LAYER_LIMIT = 6.3e-2
"""Of each row: the activations between the stages are rounded by other rules than the reference op's."""
WRONG_LIMIT = 0.3
"""What the error has to exceed."""


@dataclass
class Row:
    """A comparison."""

    case: Case
    what: str
    error: float
    limit: float
    seconds: float
    instructions: int
    wrong: bool = False
    """The error has to exceed the limit."""

    HEADER = f"{'':<62} {'H':>5} {'I':>4} {'E':>2} {'topk':>4} {'T':>4} {'error':>8} {'limit':>8} {'s':>5} wave-instr."

    @property
    def holds(self) -> bool:
        return self.error > self.limit if self.wrong else self.error <= self.limit

    def __str__(self) -> str:
        c, relation = self.case, ">" if self.wrong else "<="
        sizes = f"{c.H:>5} {c.I:>4} {c.E:>2} {c.topk:>4} {c.T:>4}"
        limit = f"{relation} {self.limit:g}"
        counts = f"{self.seconds:>5.1f} {self.instructions:>11,}"
        return f"{self.what:<62} {sizes} {self.error:>8.2g} {limit:>8} {counts}{'' if self.holds else '  FAILS'}"


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """L2, by the size of y; 0 for two that are zero, infinite where x is not finite."""
    difference, size = (x.double() - y.double()).norm().item(), y.double().norm().item()
    if difference == 0:
        return 0.0
    return difference / size if size and difference == difference else float("inf")


def layer(case: Case) -> dict:
    """Arguments of ``fused_moe``; weights as in a checkpoint."""
    generator = torch.Generator().manual_seed(1000 * case.T + case.I)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    result = {"hidden_states": (3 * randn(case.T, case.H)).to(torch.bfloat16)}  # so that limits are reached
    for name, rows, columns in (("w1", 2 * case.I, case.H), ("w2", case.H, case.I)):
        spread = torch.exp2(0.7 * randn(case.E, rows, columns // 32, 1)) * columns**-0.5
        values = (randn(case.E, rows, columns // 32, 32) * spread).flatten(-2)
        result[name], result[f"{name}_scale"] = torch_mxfp8moe.quantize_1x32(values)
    scores = randn(case.T, case.E + case.away)
    if case.away:
        scores[0, : case.E] = -torch.inf
    result["topk_ids"] = scores.topk(case.topk).indices.int()
    result["topk_weights"] = torch.rand(case.T, case.topk, generator=generator) + 0.1
    return result


def aiter_order(weight: torch.Tensor, scale: torch.Tensor, gate_up: bool, pad_to: int = 1):
    return torch_mxfp8moe.preshuffle(weight, scale, layout="aiter_gfx950", gate_up=gate_up, pad_to=pad_to)


def values_of(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch_mxfp8moe.dequantize_1x32(data, scale, torch.float32).double()


@dataclass
class Operands:
    """What the kernels of a case take."""

    a: torch.Tensor
    a_scale: torch.Tensor
    w1: torch.Tensor
    w1_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    routes: Sorted


Between = tuple[torch.Tensor, torch.Tensor | None]
"""What stage 1 leaves: see ``Aiter.stage1``."""


class Proof:
    """One case: its operands, aiter's results on them, and what these should be."""

    def __init__(self, aiter: Aiter, case: Case):
        self.aiter, self.case, self.given = aiter, case, layer(case)
        given = self.given
        w1, w1_scale = aiter_order(given["w1"], given["w1_scale"], True, case.pad_to)
        w2, w2_scale = aiter_order(given["w2"], given["w2_scale"], False, case.pad_to)
        self.padded = replace(case, I=w2.shape[2])
        self.a, self.a_scale = quantize(given["hidden_states"])
        routes = self.sorted(whole_blocks=case.past_ids)
        self.operands = Operands(self.a, sort_scales(self.a_scale, routes), w1, w1_scale, w2, w2_scale, routes)
        self.h = self.expected_h()

    def sorted(self, whole_blocks: bool) -> Sorted:
        block = self.aiter.parameters(self.case.stage1)["tile_m"]
        return sort_routes(self.given["topk_ids"], self.given["topk_weights"], self.case.E, block, whole_blocks)

    def by_expert(self):
        """Expert, and token and slot of each of its routes."""
        for expert in range(self.case.E):
            yield expert, *(self.given["topk_ids"] == expert).nonzero(as_tuple=True)

    # --- aiter

    def stage1(self, operands: Operands) -> Between:
        o = operands
        return self.aiter.stage1(self.padded, o.a, o.a_scale, o.w1, o.w1_scale, o.routes)

    def stage2(self, operands: Operands, between: Between) -> torch.Tensor:
        out, out_scale = between
        if out_scale is None:
            out, scale = quantize(out)
            out_scale = sort_scales(scale, operands.routes)
        return self.aiter.stage2(self.padded, out, out_scale, operands.w2, operands.w2_scale, operands.routes)

    def codes(self, between: Between) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [T, topk, I] and scale bytes that stage 2 gets; zeros for routes to other ranks."""
        out, out_scale = between
        if out_scale is None:
            return quantize(out)
        row, token, slot = self.operands.routes.routes
        data = torch.zeros(self.h.shape, dtype=torch.uint8)
        data[token, slot] = out.view(torch.uint8)[row] if out.dim() == 2 else out.view(torch.uint8)[token, slot]
        scale = torch.zeros(*self.h.shape[:2], self.padded.I // 32, dtype=torch.uint8)
        where = place(row.unsqueeze(-1), torch.arange(scale.shape[-1]), out_scale.shape[1])
        scale[token, slot] = out_scale.view(torch.uint8).flatten()[where]
        return data.view(torch.float8_e4m3fn), scale

    # --- what it should be

    def expected_h(self) -> torch.Tensor:
        """Activations between the stages, not rounded: float64 [T, topk, I]."""
        given, x = self.given, values_of(self.a, self.a_scale)
        alpha, beta, limit = self.case.swiglu.values()
        result = torch.zeros(self.case.T, self.case.topk, self.padded.I, dtype=torch.float64)
        for expert, token, slot in self.by_expert():
            gate, up = (x[token] @ values_of(given["w1"][expert], given["w1_scale"][expert]).T).chunk(2, -1)
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            result[token, slot, : self.case.I] = gate * torch.sigmoid(alpha * gate) * (up + beta)
        return result

    def expected_out(self, between: Between) -> torch.Tensor:
        """float64 [T, H] of what stage 1 left."""
        given, h = self.given, values_of(*self.codes(between))[..., : self.case.I]
        result = torch.zeros(self.case.T, self.case.H, dtype=torch.float64)
        for expert, token, slot in self.by_expert():
            y = h[token, slot] @ values_of(given["w2"][expert], given["w2_scale"][expert]).T
            result.index_add_(0, token, y * given["topk_weights"][token, slot].unsqueeze(-1))
        return result

    def stage1_error(self, between: Between) -> float:
        if between[1] is None:
            _row, token, slot = self.operands.routes.routes
            return relative(between[0][token, slot], self.h[token, slot].to(torch.bfloat16))
        return relative(values_of(*self.codes(between)), values_of(*quantize_fused(self.h)))

    # --- comparisons

    def measured(
        self, what: str, compute: Callable, error_of: Callable, limit: float, wrong=False
    ) -> tuple[Row, object]:
        start, before = time.perf_counter(), simulator.total.wave_instructions
        result = compute()
        seconds, instructions = time.perf_counter() - start, simulator.total.wave_instructions - before
        return Row(self.case, what, error_of(result), limit, seconds, instructions, wrong), result

    def run(self):
        """A row for each stage and one for the layer."""
        case, good = self.case, self.operands
        row, between = self.measured(case.stage1, lambda: self.stage1(good), self.stage1_error, STAGE1_LIMIT)
        yield row
        expected = self.expected_out(between)
        row, out = self.measured(
            case.stage2, lambda: self.stage2(good, between), lambda out: relative(out, expected), STAGE2_LIMIT
        )  # fmt: skip
        yield row
        reference = torch_mxfp8moe.fused_moe(**self.given, **case.swiglu, backend="reference")
        yield Row(case, "the layer, its worst row", max(map(relative, out, reference)), LAYER_LIMIT, 0, 0)

    def past_ids(self) -> str | None:
        """What the simulator says to sorted ids of the size that aiter allocates."""
        operands = replace(self.operands, routes=self.sorted(whole_blocks=False))
        try:
            self.stage2(operands, self.stage1(operands))
        except simulator.SimulationError as error:
            return str(error)

    def row_major(self, scale: torch.Tensor) -> torch.Tensor:
        """What ``sort_scales`` gives, but for the order of bytes."""
        rows, columns = sort_scales(scale, self.operands.routes).shape
        result = torch.full((rows, columns), SCALE_ONE, dtype=torch.uint8)
        row, token, slot = self.operands.routes.routes
        result[row, : scale.shape[-1]] = scale[token] if scale.dim() == 2 else scale[token, slot]
        return result

    def wrong_layouts(self):
        """A row for each."""
        good, given, case = self.operands, self.given, self.case
        w1, w1_scale = given["w1"], given["w1_scale"]
        halves = lambda x: x.view(torch.uint8).view(case.E, 2, case.I, -1)
        like = lambda x, y: x.reshape(y.shape).view(y.dtype)
        up_first = [like(halves(x).flip(1), x) for x in (w1, w1_scale)]
        by_rows = [like(halves(x).transpose(1, 2), x) for x in (w1, w1_scale)]
        both = lambda pair: dict(zip(("w1", "w1_scale"), pair))
        apart = both(aiter_order(w1, w1_scale, False))
        tokens_in_order = replace(good.routes, ids=torch.arange(len(good.routes.ids)))
        for name, change in {
            "w1 row-major": dict(w1=w1),
            "w1 and its scales, gate and up apart": apart,
            "w1 and its scales, gate and up alternate by single rows": both(aiter_order(*by_rows, False)),
            "w1 and its scales, up before gate": both(aiter_order(*up_first, True)),
            "w1_scale row-major": dict(w1_scale=w1_scale.flatten(0, 1)),
            "w1_scale, gate and up apart": dict(w1_scale=apart["w1_scale"]),
            "a1_scale in the order of tokens": dict(a_scale=sort_scales(self.a_scale, tokens_in_order, SCALE_ONE)),
            "a1_scale row-major": dict(a_scale=self.row_major(self.a_scale)),
        }.items():  # fmt: skip
            operands = replace(good, **change)
            yield self.measured(name, lambda: self.stage1(operands), self.stage1_error, WRONG_LIMIT, True)[0]
        between = self.stage1(good)
        expected = self.expected_out(between)
        error_of = lambda out: relative(out, expected)
        for name, change in {
            "w2 row-major": dict(w2=given["w2"]),
            "w2_scale row-major": dict(w2_scale=given["w2_scale"].flatten(0, 1)),
        }.items():
            operands = replace(good, **change)
            yield self.measured(name, lambda: self.stage2(operands, between), error_of, WRONG_LIMIT, True)[0]
        data, scale = self.codes(between)
        a2 = data if between[1] is None else between[0]
        compute = lambda: self.aiter.stage2(self.padded, a2, self.row_major(scale), good.w2, good.w2_scale, good.routes)
        yield self.measured("a2_scale row-major", compute, error_of, WRONG_LIMIT, True)[0]


def check_tables(aiter: Aiter) -> None:
    """Each kernel that aiter's tuned MXFP8 tables name, compiled for the table's H and I: what the simulator's checks
    say to two of its workgroups. Operands are all ones."""
    E, topk, T = 2, 2, 4
    ones = lambda *shape: torch.full(shape, 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = lambda *shape: torch.full(shape, SCALE_ONE, dtype=torch.uint8)
    aiter.workgroups, seen, silent = 2, set(), 0
    for table in aiter.tables:
        for line in csv.DictReader(table.open()):
            H, I, block = (int(line[name]) for name in ("model_dim", "inter_dim", "block_m"))
            swiglu = SWIGLU_OAI if "Swiglu" in line["act_type"] else SILU
            case = Case("", line["kernelName1"], line["kernelName2"], swiglu, H, I, E, topk, T)
            routes = sort_routes(torch.arange(topk).expand(T, topk), torch.ones(T, topk), E, block, whole_blocks=True)
            columns, rows = -(-I // 256) * 8, len(routes.ids)
            a_scale = sort_scales(scales(T, H // 32), routes)
            a2 = ones(rows, I) if aiter.parse_v2(case.stage2) else ones(T, topk, I)
            for kernel, run in (
                (case.stage1, lambda: aiter.stage1(
                    case, ones(T, H), a_scale, ones(E, 2 * I, H), scales(E * 2 * I, H // 32), routes)),
                (case.stage2, lambda: aiter.stage2(
                    case, a2, scales(rows + 255, columns), ones(E, H, I), scales(E * H, columns), routes)),
            ):  # fmt: skip
                if (kernel, H, I, block) in seen:
                    continue
                seen.add((kernel, H, I, block))
                aiter.unordered.clear()
                try:
                    run()
                    found = "; ".join(aiter.unordered) or "nothing"
                except simulator.SimulationError as error:
                    found = str(error)
                silent += found == "nothing"
                print(f"{kernel:<66} H {H} I {I} block {block:>3} T {line['token']:>5}: {found}", flush=True)
    print(f"{len(seen)} kernels; the checks say nothing to {silent}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", metavar="TEXT", help="only the cases that have TEXT in their names")
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    parser.add_argument("--tables", action="store_true", help="run the checks on the kernels of aiter's tables")
    args = parser.parse_args()
    cases = [case for case in CASES if args.cases in case.name]
    if args.list:
        print(*(case.name for case in CASES), sep="\n")
        return 0
    if not cases:
        parser.error(f"no case has {args.cases!r} in its name")
    try:
        aiter = Aiter()
        for case in cases:
            aiter.parameters(case.stage1), aiter.parameters(case.stage2)
    except NoAiter as error:
        print(f"SKIPPED, nothing was compared: {error}", file=sys.stderr)
        return SKIPPED
    print(f"gfx950 machine code in a simulator, no GPU; {aiter.version}", flush=True)
    if args.tables:
        check_tables(aiter)
        return 0
    print(Row.HEADER)
    failures = 0

    def show(rows) -> None:
        nonlocal failures
        for row in rows:
            print(row, flush=True)
            failures += not row.holds

    for case in cases:
        print(f"-- {case.name}", flush=True)
        proof = Proof(aiter, case)
        aiter.unordered.clear()
        show(proof.run())
        if aiter.unordered or case.unordered:
            known = "" if aiter.unordered and case.unordered else "  FAILS: this is new"
            print(f"without the check of order in LDS, which says: {aiter.unordered or 'nothing'}{known}")
            failures += bool(known)
        if case.past_ids:
            found = proof.past_ids()
            print(f"with sorted ids as aiter allocates them: {found or 'nothing is found  FAILS: this is new'}")
            failures += found is None
        if case.wrong_layouts:
            print(f"-- {case.name}, wrong layouts")
            show(proof.wrong_layouts())
    print(f"{simulator.total}; {failures or 'no'} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
