#!/usr/bin/env python
"""Run aiter's own MoE kernels, as gfx950 machine code, in the simulator on weights from ``preshuffle``; needs no GPU.

    python tools/prove_aiter.py                      # every case, then the negative controls
    python tools/prove_aiter.py --cases "SiLU"       # the cases whose name has that in it
    python tools/prove_aiter.py --list

aiter's host code prepares each launch (kernel, sizes, arguments) and FlyDSL compiles it for gfx950; the launch itself is
caught, and test/gfx950_simulator executes the assembly with all its checks. Weights and scales come from this package's
``preshuffle(layout="aiter_gfx950")``. aiter's HIP kernels, which sort tokens and quantise activations, are stood in for
by the rules below. Compared are:

- stage 1 with float64 on the same operands, activation and rounding as aiter's epilogue does them;
- stage 2 with float64 on the codes and scales that stage 1 left;
- the layer's output with this package's reference op, row by row.

Then each layout is taken wrongly once, and the same comparison has to fail by a wide margin.

Exits with 0 if all hold, 1 if one does not, 77 if there is no aiter with MXFP8 kernels to import (nothing was compared
then). Run it with a Python that has torch, numpy and this package's sources, aiter (https://github.com/ROCm/aiter) and
the flydsl that it pins on its path.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "test")]

from gfx950_simulator import launch as simulator  # noqa: E402

from torch_mxfp8moe import reference  # noqa: E402

SKIPPED = 77
ENVIRONMENT = {
    "AITER_AOT_IMPORT": "1",  # aiter: do not build HIP kernels on import
    "COMPILE_ONLY": "1",  # FlyDSL, here and below
    "FLYDSL_DUMP_IR": "1",
    "FLYDSL_GPU_ARCH": "gfx950",
    "FLYDSL_RUNTIME_ENABLE_CACHE": "0",
}

SILU = dict(swiglu_alpha=1.0, swiglu_beta=0.0, swiglu_limit=None)
SWIGLU_OAI = dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=7.0)
"""MiniMax-M3's and gpt-oss's."""


@dataclass(frozen=True)
class Case:
    """A layer and the kernels, by aiter's names, that compute it."""

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
    """Experts on other ranks, from E on; the first token has only such ones."""
    controls: bool = False
    """Wrong layouts are tried too."""
    past_ids: bool = False
    """Stage 2 reads past the end of the sorted ids that aiter allocates."""


# Kernels that aiter's tuned tables name for these models and token counts, and its choice where no row fits; sizes are
# cut.
CASES = (
    Case("MiniMax-M3 decode: SwiGLU-OAI", "flydsl_moe1_afp8_wfp8_bf16_t32x64x256_w4_gui_kw2_fp8",
         "flydsl_moe2_layout_afp8_wfp8_bf16_t32x128x256_atomic_nt_sbm32", SWIGLU_OAI, 512, 256, 4, 2, 13,
         controls=True),
    Case("MiniMax-M3 decode, one token", "flydsl_moe1_afp8_wfp8_bf16_t32x64x256_w2_gui_kw2_fp8",
         "flydsl_moe2_layout_afp8_wfp8_bf16_t32x128x128_atomic_nt_sbm32", SWIGLU_OAI, 1024, 384, 8, 4, 1),
    Case("MiniMax-M3 decode, sums apart", "flydsl_moe1_afp8_wfp8_bf16_t32x128x256_w2_gui_fp8",
         "flydsl_moe2_layout_afp8_wfp8_bf16_t32x128x128_reduce_nt_sbm32", SWIGLU_OAI, 512, 384, 4, 2, 13),
    Case("MiniMax-M3 prefill, 64 rows", "flydsl_moe1_afp8_wfp8_bf16_t64x128x256_w2_gui_fp8",
         "flydsl_moe2_layout_afp8_wfp8_bf16_t64x128x128_atomic_nt_sbm64", SWIGLU_OAI, 512, 384, 4, 2, 100),
    Case("MiniMax-M3 prefill, 128 rows", "flydsl_moe1_afp8_wfp8_bf16_t128x128x256_w2_bnt0_gui_fp8",
         "flydsl_moe2_layout_afp8_wfp8_bf16_t64x128x128_atomic_sbm128", SWIGLU_OAI, 512, 256, 3, 2, 150),
    Case("MiniMax-M3 prefill, 128 x 256", "flydsl_moe1_afp8_wfp8_bf16_t128x256x256_w4_bnt0_gui_xcd4_fp8",
         "flydsl_moe2_layout_afp8_wfp8_bf16_t64x128x128_reduce_sbm128", SWIGLU_OAI, 512, 256, 2, 2, 150),
    Case("MiniMax-M3, expert parallel", "flydsl_moe1_afp8_wfp8_bf16_t32x64x256_w4_gui_fp8",
         "flydsl_moe2_layout_afp8_wfp8_bf16_t32x256x256_atomic_nt_sbm32", SWIGLU_OAI, 512, 256, 4, 2, 30, 4),
    Case("GLM-5 decode: SiLU", "flydsl_moe1_afp8_wfp8_bf16_t32x64x256_w3_gui_fp8",
         "flydsl_moe2_afp8_wfp8_bf16_t32x128x128_atomic_bnt2", SILU, 512, 256, 6, 3, 9),
    Case("GLM-5 decode, sums apart", "flydsl_moe1_afp8_wfp8_bf16_t32x64x256_gui_xcd4_kw2_fp8",
         "flydsl_moe2_afp8_wfp8_bf16_t32x128x256_reduce", SILU, 512, 256, 6, 3, 9),
    Case("GLM-5 prefill, 64 rows, bf16 between", "flydsl_moe1_afp8_wfp8_bf16_t64x128x256_w4_bnt0_gui",
         "flydsl_moe2_afp8_wfp8_bf16_t64x128x256_atomic_bnt2_persist", SILU, 512, 512, 4, 2, 100),
    Case("GLM-5 prefill, 128 rows", "flydsl_moe1_afp8_wfp8_bf16_t128x128x256_w4_gui_fp8",
         "flydsl_moe2_afp8_wfp8_bf16_t64x128x128_atomic_sbm128", SILU, 512, 256, 3, 2, 150, past_ids=True),
    Case("not in a table: SiLU, limit 10", "flydsl_moe1_afp8_wfp8_bf16_t32x128x256_w2_gui",
         "flydsl_moe2_afp8_wfp8_bf16_t32x128x256_atomic_bnt2", SILU | dict(swiglu_limit=10.0), 512, 256, 4, 2, 13,
         controls=True),
)  # fmt: skip


# --- stand-ins for aiter's HIP kernels


@dataclass
class Sorted:
    """Routes in the order in which aiter's kernels take them."""

    ids: torch.Tensor
    """int32 [rows]: slot << 24 | token; topk << 24 | T in rows that fill up a block."""
    weights: torch.Tensor
    """fp32 [rows]."""
    experts: torch.Tensor
    """int32: the expert of each block of rows."""
    valid: torch.Tensor
    """int32 [2]: rows that hold something, and tokens."""
    block: int

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row, token and slot of each route."""
        row = torch.arange(int(self.valid[0]))
        token, slot = self.ids[row] & 0xFFFFFF, self.ids[row] >> 24
        real = token < self.valid[1]
        return row[real], token[real], slot[real]

    def unwritten(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What aiter leaves undefined: tensors and where (bool, by element)."""
        end = int(self.valid[0])
        ends = (self.ids, end), (self.weights, end), (self.experts, end // self.block)
        return [(x, torch.arange(len(x)) >= end) for x, end in ends]


def sort_routes(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: int, block: int, whole_blocks: bool = False
) -> Sorted:
    """By expert, then by token; an expert's rows are filled up to a multiple of ``block``, experts without any have
    none; ids of ``experts`` and more are another rank's. The buffers have the sizes that aiter allocates; what it does
    not write is 0x7FFFFFFF or NaN here. whole_blocks: the last block, which aiter cuts off, has room too."""
    tokens, topk = topk_ids.shape
    rows = tokens * topk + experts * block - topk
    if whole_blocks:
        rows = -(-rows // block) * block
    result = Sorted(
        torch.full((rows,), 0x7FFFFFFF, dtype=torch.int32),
        torch.full((rows,), torch.nan),
        torch.full((-(-rows // block),), 0x7FFFFFFF, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        block,
    )
    row = 0
    for expert in range(experts):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        end = row + len(token)
        padded = row + -(-len(token) // block) * block
        result.ids[row:end], result.weights[row:end] = (slot << 24 | token).int(), topk_weights[token, slot].float()
        result.ids[end:padded], result.weights[end:padded] = topk << 24 | tokens, 0
        result.experts[row // block : padded // block] = expert
        row = padded
    result.valid[0], result.valid[1] = row, tokens
    return result


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., C] -> e4m3 codes and E8M0 bytes as aiter's quantiser gives them: the scale is the power of two at or
    above amax / 448, where amax is at least 1e-10; codes are saturated."""
    blocks = x.float().unflatten(-1, (-1, 32))
    bits = (blocks.abs().amax(-1).clamp(min=1e-10) * torch.tensor(1 / 448)).view(torch.int32)
    byte = (bits >> 23) + ((bits & 0x7FFFFF) > 0).int()
    return _codes(blocks, byte), byte.to(torch.uint8)


def quantize_fused(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as the epilogue of a ``_fp8`` stage 1 does it: the scale is 2^-8 times amax rounded to a power of two,
    up from a mantissa of 1.5."""
    blocks = h.float().unflatten(-1, (-1, 32))
    byte = ((blocks.abs().amax(-1).view(torch.int32) + 0x400000 >> 23) - 8).clamp(min=0)
    return _codes(blocks, byte), byte.to(torch.uint8)


def _codes(blocks: torch.Tensor, byte: torch.Tensor) -> torch.Tensor:
    scaled = torch.ldexp(blocks, 127 - byte.unsqueeze(-1)).clamp(-448, 448)
    return scaled.to(torch.float8_e4m3fn).flatten(-2)


def place(row: torch.Tensor, column: torch.Tensor, columns: int) -> torch.Tensor:
    """Where aiter's kernels look for the scale byte of (sorted row, block of 32) in a matrix of ``columns``, a multiple
    of 8: tiles of 32 rows x 8 blocks, in which four bytes that a lane needs together are neighbours."""
    within = column % 4 * 64 + row % 16 * 4 + column % 8 // 4 * 2 + row % 32 // 16
    return row // 32 * 32 * columns + column // 8 * 256 + within


def sort_scales(scale: torch.Tensor, routes: Sorted, by_slot: bool) -> torch.Tensor:
    """Scale bytes [T, C/32], or [T, topk, C/32] if ``by_slot``, in sorted order; 0xFF, NaN, where no route is."""
    columns = -(-scale.shape[-1] // 8) * 8
    rows = -(-len(routes.ids) // 32) * 32
    result = torch.full((rows * columns,), 0xFF, dtype=torch.uint8)
    row, token, slot = routes.rows
    where = place(row.unsqueeze(-1), torch.arange(scale.shape[-1]), columns)
    result[where] = scale[token, slot] if by_slot else scale[token]
    return result.view(rows, columns)


# --- aiter's launches, caught and executed


class NoAiter(Exception):
    """Says why nothing can be compared."""


@dataclass
class Launch:
    """What aiter's host code was about to launch."""

    text: str
    """Assembly."""
    values: list
    """Arguments, pointers of the host as integers."""


class Aiter:
    """aiter's two stages, compiled for gfx950, as functions on CPU tensors."""

    def __init__(self):
        os.environ |= ENVIRONMENT
        try:
            import flydsl.compiler
            from aiter.ops.flydsl import moe_kernels
            from aiter.ops.flydsl.kernels import mxmoe_dispatcher
            from aiter.ops.flydsl.mxfp4_kname import parse_flydsl_v2_gemm2_kernel
        except Exception as error:  # an aiter without ROCm fails in many ways
            found = getattr(sys.modules.get("aiter"), "__file__", None)
            where = f" (the module aiter is {found})" if found else ""
            raise NoAiter(f"aiter's FlyDSL kernels cannot be imported: {type(error).__name__}: {error}{where}") from error
        self.compiler, self.kernels, self.dispatcher = flydsl.compiler, moe_kernels, mxmoe_dispatcher
        self.parse_v2 = parse_flydsl_v2_gemm2_kernel
        self.version = f"flydsl {flydsl.__version__}, aiter in {Path(moe_kernels.__file__).parents[3]}"
        self._texts: dict = {}
        self._undefined: list[tuple[torch.Tensor, torch.Tensor]] = []

    def undefine(self, tensor: torch.Tensor, which: torch.Tensor) -> None:
        """The elements ``which`` (bool, as ``tensor``) are what aiter leaves undefined."""
        self._undefined.append((tensor, which.unsqueeze(-1).expand(*which.shape, tensor.itemsize).flatten().numpy()))

    def parameters(self, name: str) -> dict:
        found = self.kernels.get_flydsl_kernel_params(name)
        if found is None:
            raise NoAiter(f"this aiter has no kernel {name}")
        return found

    @contextlib.contextmanager
    def _caught(self):
        """A list that gets a Launch for each that aiter's host code makes."""
        launches = []

        def compile_(kernel, *arguments):
            if kernel not in self._texts:
                with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, FLYDSL_DUMP_DIR=folder):
                    with contextlib.redirect_stdout(io.StringIO()):
                        original(kernel, *arguments)
                    found = sorted(Path(folder).rglob("*_final_isa.s"))
                    if len(found) != 1:
                        raise RuntimeError(f"FlyDSL left {len(found)} assembly files, not one")
                    self._texts[kernel] = found[0].read_text()
            values = [x.pointer.value or 0 if hasattr(x, "pointer") else x for x in arguments[:-1]]  # not the stream
            launches.append(Launch(self._texts[kernel], values))

        original = self.compiler.compile
        with (
            mock.patch.object(self.compiler, "compile", compile_),
            mock.patch.object(torch.cuda, "current_stream", lambda *_: 0),
        ):
            yield launches

    def stage1(self, case: Case, a, a_scale, w1, w1_scale, routes: Sorted) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codes and sorted scales of the activations between the stages, or those activations in bf16 and None."""
        kernel = self.parameters(case.stage1)
        with self._caught() as launches:
            result = self.kernels.flydsl_moe_stage1(
                a, w1, routes.ids, routes.experts, routes.valid, topk=case.topk, w1_scale=w1_scale, a1_scale=a_scale,
                act="silu" if case.swiglu["swiglu_alpha"] == 1 else "swiglu", swiglu_limit=case.swiglu["swiglu_limit"],
                use_async_copy=True, v2_output_layout=self.parse_v2(case.stage2) is not None,
                **_taken(kernel, "tile_m tile_n tile_k a_dtype b_dtype out_dtype waves_per_eu b_nt gate_mode xcd_swizzle"
                                 " k_wave"),
            )  # fmt: skip
        out, out_scale = result if isinstance(result, tuple) else (result, None)
        (caught,) = launches
        inputs = [a, w1, a_scale, w1_scale, routes.ids, routes.experts, routes.valid]
        outputs = [out] if out_scale is None else [out, out_scale]
        _, n, _, blocks = caught.values[11:15]
        self._simulate(
            caught, "*u8 " * 11 + "i32 " * 4 + "fp32 " * 5, (n // kernel["tile_n"], blocks), inputs, outputs
        )  # fmt: skip
        return out, out_scale

    def stage2(self, case: Case, a2, a2_scale, w2, w2_scale, routes: Sorted) -> torch.Tensor:
        """The layer's output; where a kernel adds terms up that others left, from what those left."""
        out = torch.zeros(case.T, case.H, dtype=torch.bfloat16)
        terms = torch.empty(case.T, case.topk, case.H, dtype=torch.bfloat16)
        inputs = [a2, w2, a2_scale, w2_scale, routes.ids, routes.experts, routes.weights, routes.valid]
        kernel = self.parse_v2(case.stage2)
        reduces = "_reduce" in case.stage2
        target, (summed, stored) = (terms, ([], [terms])) if reduces else (out, ([out], []))
        with self._caught() as launches:
            if kernel:
                self.dispatcher.mxfp4_moe_gemm2(
                    inter_sorted_quant=a2.view(torch.uint8), inter_sorted_shuffled_scale=a2_scale.view(torch.uint8),
                    w2_u8=w2.view(torch.uint8), w2_scale_u8=w2_scale, sorted_expert_ids=routes.experts,
                    cumsum_tensor=routes.valid, sorted_token_ids=routes.ids, sorted_weights=routes.weights, out=target,
                    M_logical=case.T, max_sorted=len(a2), NE=case.E, D_HIDDEN=case.H, D_INTER=case.I, topk=case.topk,
                    BM=kernel["tile_m"], BN=kernel["tile_n"], BK=kernel["tile_k"], SBM=kernel["sort_block_m"],
                    g2_bf16_lds=kernel["bf16_lds"], g2_spart=kernel["spart"],
                    **_taken(kernel, "use_nt a_dtype b_dtype epilog persist"),
                )  # fmt: skip
                *pointers, tokens, max_blocks, blocks, I, H, pad_k, pad_n, to, to_scale = launches[0].values
                launches[0].values = [*pointers, tokens, max_blocks, I, H, pad_k, pad_n, to, to_scale, blocks]
                types = "*u8 " * 8 + "i32 " * 6 + "*u8 " * 2 + "i32"
                grid = (blocks * (H // kernel["tile_n"]),)
                if reduces:
                    self.kernels._run_moe_reduction(terms, out, case.T, case.topk, case.H)
            else:
                kernel = self.parameters(case.stage2)
                self.kernels.flydsl_moe_stage2(
                    a2, w2, routes.ids, routes.experts, routes.valid, out=out, topk=case.topk, w2_scale=w2_scale,
                    a2_scale=a2_scale, sorted_weights=routes.weights,
                    **_taken(kernel, "tile_m tile_n tile_k a_dtype b_dtype out_dtype mode sort_block_m waves_per_eu"
                                     " use_async_copy cu_num_mul b_nt persist xcd_swizzle"),
                )  # fmt: skip
                types = "*u8 " * 10 + "i32 " * 4
                _, H, _, blocks = launches[0].values[10:]
                grid = (H // kernel["tile_n"], blocks)
                if reduces:  # aiter's buffer between the two launches is gone
                    launches[0].values[0] = launches[1].values[0] = terms.data_ptr()
        self._simulate(launches[0], types, grid, inputs + summed, stored)
        if reduces:
            self._simulate(launches[1], "*u8 " * 5 + "i32", (case.T, 1), [terms], [out])
        return out

    def _simulate(self, launch: Launch, types: str, grid: tuple[int, ...], inputs: list, outputs: list = ()) -> None:
        """Execute on host tensors; ``outputs`` hold nothing defined before, and where nothing is stored then, NaN: in
        the kernels' registers values of a route and of a row that fills up share a register, which the simulator
        follows as a whole."""
        for x in outputs:
            x.view(torch.uint8).fill_(0xFF)
        parameters = [(f"argument {i}", type_) for i, type_ in enumerate(types.split())]
        kernel = simulator.Kernel.of_text(launch.text, parameters)
        known = {x.data_ptr(): x for x in (*inputs, *outputs)} | {0: torch.empty(0)}
        arguments = {
            name: known[value] if type_ == "*u8" else value
            for (name, type_), value in zip(parameters, launch.values, strict=True)
        }
        tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        device = simulator.Device(tensors, outputs)
        for tensor, which in self._undefined:
            if any(tensor is x for x in inputs):
                device.undefine(tensor, which)
        device.launch(kernel, arguments, grid)
        device.memory.copy_back()


def _taken(kernel: dict, names: str) -> dict:
    return {name: kernel[name] for name in names.split() if name in kernel}


# --- comparisons


def problem(case: Case) -> dict:
    """Arguments of ``fused_moe``, weights in checkpoint order."""
    generator = torch.Generator().manual_seed(case.T)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    result = {"hidden_states": randn(case.T, case.H).to(torch.bfloat16)}
    for name, rows, columns in (("w1", 2 * case.I, case.H), ("w2", case.H, case.I)):
        spread = torch.exp2(0.7 * randn(case.E, rows, columns // 32, 1)) * columns**-0.5
        values = (randn(case.E, rows, columns // 32, 32) * spread).flatten(-2)
        result[name], result[f"{name}_scale"] = reference.quantize_1x32(values)
    scores = randn(case.T, case.E + case.away)
    if case.away:
        scores[0, : case.E] = -torch.inf
    result["topk_ids"] = scores.topk(case.topk).indices.int()
    result["topk_weights"] = torch.rand(case.T, case.topk, generator=generator) + 0.1
    return result


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """L2, to the size of y; infinite if x is not finite."""
    if torch.equal(x, y.to(x.dtype)):
        return 0.0
    error = ((x.double() - y.double()).norm() / y.double().norm()).item()
    return error if error == error else float("inf")


def matmul(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.double() @ reference.dequantize_1x32(w, scale).double().T


@dataclass
class Operands:
    """What the two stages of one case take, as aiter's host code gives it; a negative control changes one."""

    a: torch.Tensor
    a_scale: torch.Tensor
    w1: torch.Tensor
    w1_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    routes: Sorted


class Proof:
    """One case."""

    def __init__(self, aiter: Aiter, case: Case):
        self.aiter, self.case, self.given = aiter, case, problem(case)
        given = self.given
        self.data, self.scale = quantize(given["hidden_states"])
        routes = self.sorted(whole_blocks=case.past_ids)
        w1, w1_scale = reference.preshuffle(given["w1"], given["w1_scale"], layout="aiter_gfx950", gate_up=True)
        w2, w2_scale = reference.preshuffle(given["w2"], given["w2_scale"], layout="aiter_gfx950", gate_up=False)
        a_scale = sort_scales(self.scale, routes, by_slot=False)
        self.operands = Operands(self.data, a_scale, w1, w1_scale, w2, w2_scale, routes)
        self.h = self._h()

    def sorted(self, whole_blocks: bool) -> Sorted:
        block = self.aiter.parameters(self.case.stage1)["tile_m"]
        given = self.given
        routes = sort_routes(given["topk_ids"], given["topk_weights"], self.case.E, block, whole_blocks)
        for tensor, which in routes.unwritten():
            self.aiter.undefine(tensor, which)
        return routes

    def _h(self) -> torch.Tensor:
        """Activations between the stages in float64 [T, topk, I], not rounded."""
        given, x = self.given, reference.dequantize_1x32(self.data, self.scale)
        result = torch.zeros(self.case.T, self.case.topk, self.case.I, dtype=torch.float64)
        for expert in range(self.case.E):
            token, slot = (given["topk_ids"] == expert).nonzero(as_tuple=True)
            gate, up = matmul(x[token], given["w1"][expert], given["w1_scale"][expert]).chunk(2, -1)
            alpha, beta, limit = self.case.swiglu.values()
            result[token, slot] = reference.swiglu(gate, up, alpha, beta, limit)
        return result

    def stage1(self, operands: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.aiter.stage1(
            self.case, operands.a, operands.a_scale, operands.w1, operands.w1_scale, operands.routes
        )  # fmt: skip

    def rounded(self, between: tuple) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Codes [T, topk, I] and scale bytes that stage 2 gets, and stage 1's error to the same rounding of float64."""
        out, out_scale = between
        if out_scale is None:
            error = relative(out, self.h)
            return *quantize(out), error
        row, token, slot = self.operands.routes.rows
        data = torch.zeros(self.h.shape, dtype=torch.uint8)
        data[token, slot] = out.view(torch.uint8)[row] if out.dim() == 2 else out.view(torch.uint8)[token, slot]
        columns = torch.arange(self.case.I // 32)
        scale = torch.zeros(*self.h.shape[:2], len(columns), dtype=torch.uint8)
        scale[token, slot] = out_scale.view(torch.uint8).flatten()[
            place(row.unsqueeze(-1), columns, out_scale.shape[1])
        ]  # fmt: skip
        data = data.view(torch.float8_e4m3fn)
        expected = reference.dequantize_1x32(*quantize_fused(self.h))
        return data, scale, relative(reference.dequantize_1x32(data, scale), expected)

    def stage2(self, operands: Operands, between: tuple) -> torch.Tensor:
        out, out_scale = between
        if out_scale is None:
            out, scale = quantize(out)
            out_scale = sort_scales(scale, operands.routes, by_slot=True)
        return self.aiter.stage2(self.case, out, out_scale, operands.w2, operands.w2_scale, operands.routes)

    def expected2(self, data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Stage 2 in float64 [T, H]."""
        given, h = self.given, reference.dequantize_1x32(data, scale)
        result = torch.zeros(self.case.T, self.case.H, dtype=torch.float64)
        for expert in range(self.case.E):
            token, slot = (given["topk_ids"] == expert).nonzero(as_tuple=True)
            y = matmul(h[token, slot], given["w2"][expert], given["w2_scale"][expert])
            result.index_add_(0, token, y * given["topk_weights"][token, slot].unsqueeze(-1))
        return result

    def run(self) -> list["Row"]:
        """Both stages and the layer."""
        rows = []

        def measured(kernel: str, limit: float, compute: Callable):
            before = replace(simulator.total)
            start = time.perf_counter()
            result, error = compute()
            rows.append(
                Row(self.case, kernel, error, limit, time.perf_counter() - start,
                    simulator.total.wave_instructions - before.wave_instructions)
            )  # fmt: skip
            return result

        def first():
            between = self.stage1(self.operands)
            *operands, error = self.rounded(between)
            return (between, operands), error

        between, operands = measured(self.case.stage1, STAGE1_LIMIT, first)

        def second():
            out = self.stage2(self.operands, between)
            return out, relative(out, self.expected2(*operands))

        out = measured(self.case.stage2, STAGE2_LIMIT, second)

        def layer():
            expected = reference.fused_moe(**self.given, **self.case.swiglu)
            return None, max(relative(x, y) for x, y in zip(out, expected))

        measured("the layer, worst row", LAYER_LIMIT, layer)
        return rows

    def past_ids(self) -> str | None:
        """What the simulator says to stage 2 with sorted ids of the size that aiter allocates."""
        operands = replace(self.operands, routes=self.sorted(whole_blocks=False))
        try:
            self.stage2(operands, self.stage1(operands))
        except simulator.SimulationError as error:
            return str(error)

    def controls(self) -> list["Row"]:
        """Wrong layouts, one at a time, and what they do to the stage that reads them."""
        good, given, case = self.operands, self.given, self.case
        between = self.stage1(good)
        data, scale, _ = self.rounded(between)
        expected = self.expected2(data, scale)
        halves = lambda x: x.view(case.E, 2, case.I, -1)
        swapped = {name: halves(given[name]).flip(1).reshape(given[name].shape) for name in ("w1", "w1_scale")}
        w1_swapped, w1_scale_swapped = reference.preshuffle(*swapped.values(), layout="aiter_gfx950", gate_up=True)
        # As if w1 were one matrix: the order of tiles is right, gate and up do not alternate.
        w1_apart, w1_scale_apart = reference.preshuffle(
            given["w1"], given["w1_scale"], layout="aiter_gfx950", gate_up=False
        )  # fmt: skip
        rows_alternate = lambda x: halves(x).transpose(1, 2).reshape(x.shape)
        w1_rows, w1_scale_rows = reference.preshuffle(
            rows_alternate(given["w1"]), rows_alternate(given["w1_scale"]), layout="aiter_gfx950", gate_up=False
        )  # fmt: skip
        flat = lambda name: given[name].flatten(0, 1)
        route = good.routes.rows

        def in_rows(scale: torch.Tensor, by_slot: bool) -> torch.Tensor:
            result = torch.full((len(good.routes.ids) + 31, -(-scale.shape[-1] // 8) * 8), 0xFF, dtype=torch.uint8)
            row, token, slot = route
            result[row, : scale.shape[-1]] = scale[token, slot] if by_slot else scale[token]
            return result

        token_order = sort_scales(self.scale, replace(good.routes, ids=torch.arange(len(good.routes.ids))), False)
        first = {
            "w1 row-major": dict(w1=given["w1"]),
            "w1 and scales, gate and up apart": dict(w1=w1_apart, w1_scale=w1_scale_apart),
            "w1 and scales, gate and up alternate by rows": dict(w1=w1_rows, w1_scale=w1_scale_rows),
            "w1 and scales, up before gate": dict(w1=w1_swapped, w1_scale=w1_scale_swapped),
            "w1_scale row-major": dict(w1_scale=flat("w1_scale")),
            "w1_scale, gate and up apart": dict(w1_scale=w1_scale_apart),
            "a1_scale in the order of tokens": dict(a_scale=token_order),
            "a1_scale row-major": dict(a_scale=in_rows(self.scale, False)),
        }
        second = {
            "w2 row-major": dict(w2=given["w2"]),
            "w2_scale row-major": dict(w2_scale=flat("w2_scale")),
        }
        between_rows = between[0] if between[1] is not None else data, in_rows(scale, True)
        rows = []
        for name, change in first.items():
            rows.append(self._control(name, lambda o: self.rounded(self.stage1(o))[2], change))
        for name, change in second.items():
            rows.append(self._control(name, lambda o: relative(self.stage2(o, between), expected), change))
        wrong = lambda o: relative(self.stage2(o, between_rows), expected)
        return [*rows, self._control("a2_scale row-major", wrong, {})]

    def _control(self, name: str, error_of: Callable, change: dict) -> "Row":
        start, before = time.perf_counter(), simulator.total.wave_instructions
        error = error_of(replace(self.operands, **change))
        executed = simulator.total.wave_instructions - before
        return Row(self.case, name, error, WRONG_LAYOUT_LIMIT, time.perf_counter() - start, executed, wrong=True)


STAGE1_LIMIT = 3e-3
STAGE2_LIMIT = 6e-3
LAYER_LIMIT = 6.3e-2
WRONG_LAYOUT_LIMIT = 0.3


@dataclass
class Row:
    """One comparison."""

    case: Case
    what: str
    error: float
    limit: float
    seconds: float
    instructions: int
    wrong: bool = False
    """The limit is one that the error has to exceed."""

    @property
    def holds(self) -> bool:
        return self.error > self.limit if self.wrong else self.error <= self.limit

    def __str__(self) -> str:
        c = self.case
        sizes = f"{c.H:>5} {c.I:>5} {c.E:>3} {c.topk:>4} {c.T:>5}"
        relation = (">" if self.wrong else "<=") + f" {self.limit:g}"
        verdict = "" if self.holds else "  FAILS"
        return f"{self.what:<66} {sizes} {self.error:>9.2e} {relation:>9} {self.seconds:>7.1f} {self.instructions:>11,}{verdict}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", metavar="TEXT", help="only the cases whose name has TEXT in it")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    args = parser.parse_args()
    cases = [case for case in CASES if args.cases in case.name]
    if args.list or not cases:
        print(*(case.name for case in CASES), sep="\n")
        return 0 if args.list else f"no case has {args.cases!r} in its name"
    try:
        aiter = Aiter()
    except NoAiter as error:
        print(f"SKIPPED, nothing was compared: {error}", file=sys.stderr)
        return SKIPPED
    print(f"{aiter.version}; simulated, no GPU")
    print(f"{'kernel':<66} {'H':>5} {'I':>5} {'E':>3} {'topk':>4} {'T':>5} {'error':>9} {'limit':>9} {'s':>7} {'wave-instr':>11}")
    failed = 0
    for case in cases:
        print(f"-- {case.name}", flush=True)
        proof = Proof(aiter, case)
        for row in proof.run():
            print(row, flush=True)
            failed += not row.holds
        if case.past_ids:
            found = proof.past_ids()
            print(f"with sorted ids as aiter allocates them: {found or 'NOTHING FOUND, which is new'}")
            failed += found is None
    for case in [case for case in cases if case.controls]:
        print(f"-- wrong layouts: {case.name}")
        for row in Proof(aiter, case).controls():
            print(row, flush=True)
            failed += not row.holds
    print(simulator.total)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
