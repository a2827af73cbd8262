"""aiter's MXFP8 MoE kernels in the simulator: its own host code prepares each launch, FlyDSL compiles the kernel for
gfx950, and instead of being launched it is executed on CPU tensors. What aiter does in HIP kernels, sorting routes and
quantising activations, is stood in for by the same rules in torch.

aiter: https://github.com/ROCm/aiter, of 2026-08. The order of arguments, grids and rules are those of
aiter/ops/flydsl/moe_kernels.py, aiter/ops/flydsl/kernels/mxmoe_dispatcher.py, aiter/fused_moe.py and
csrc/include/mx_quant_utils.h.
"""

import contextlib
import io
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from gfx950_simulator.assembly import parse
from gfx950_simulator.checks import LdsOrder, Unordered, all_checks
from gfx950_simulator.launch import Device, Kernel

# --- stand-ins for HIP kernels


@dataclass
class Sorted:
    """Routes in the order in which the kernels take them."""

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
    def routes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row, token and slot of each route."""
        row = torch.arange(int(self.valid[0]))
        token, slot = self.ids[row] & 0xFFFFFF, self.ids[row] >> 24
        real = token < self.valid[1]
        return row[real], token[real], slot[real]

    def unwritten(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Where (bool, by byte) one of these tensors holds what aiter leaves undefined; None if it is none of them."""
        end = int(self.valid[0])
        for x, start in ((self.ids, end), (self.weights, end), (self.experts, end // self.block)):
            if tensor is x:
                return (torch.arange(len(x)) >= start).repeat_interleave(x.itemsize)


def sort_routes(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: int, block: int, whole_blocks: bool = False
) -> Sorted:
    """By expert, then by token. An expert's rows are filled up to a multiple of ``block``, experts without any have
    none; ids of ``experts`` and more are another rank's.

    Buffers have the sizes that aiter allocates; what it does not write is 0x7FFFFFFF or NaN here. whole_blocks: the
    last block, which aiter's allocation cuts off, has room too.
    """
    tokens, topk = topk_ids.shape
    rows = tokens * topk + experts * block - topk
    blocks = -(-rows // block)
    rows = blocks * block if whole_blocks else rows
    ids, weights = torch.full((rows,), 0x7FFFFFFF, dtype=torch.int32), torch.full((rows,), torch.nan)
    expert_of_block = torch.full((blocks,), 0x7FFFFFFF, dtype=torch.int32)
    row = 0
    for expert in range(experts):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        end, padded = row + len(token), row + -(-len(token) // block) * block
        ids[row:end], weights[row:end] = (slot << 24 | token).int(), topk_weights[token, slot].float()
        ids[end:padded], weights[end:padded] = topk << 24 | tokens, 0
        expert_of_block[row // block : padded // block] = expert
        row = padded
    return Sorted(ids, weights, expert_of_block, torch.tensor([row, tokens], dtype=torch.int32), block)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., C] -> e4m3 codes [..., C], E8M0 bytes [..., C/32]: the scale is the power of two at or above amax / 448,
    where amax is at least 1e-10."""
    blocks = x.float().unflatten(-1, (-1, 32))
    bits = (blocks.abs().amax(-1).clamp(min=1e-10) * torch.tensor(1 / 448)).view(torch.int32)
    byte = (bits >> 23) + ((bits & 0x7FFFFF) > 0).int()
    return _codes(blocks, byte), byte.to(torch.uint8)


def quantize_fused(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as the epilogue of a stage 1 whose name ends in ``_fp8`` does it: the scale is 2^-8 times amax rounded
    to a power of two, up from a mantissa of 1.5."""
    blocks = x.float().unflatten(-1, (-1, 32))
    byte = ((blocks.abs().amax(-1).view(torch.int32) + 0x400000 >> 23) - 8).clamp(min=0)
    return _codes(blocks, byte), byte.to(torch.uint8)


def _codes(blocks: torch.Tensor, byte: torch.Tensor) -> torch.Tensor:
    scaled = torch.ldexp(blocks, 127 - byte.unsqueeze(-1)).clamp(-448, 448)
    return scaled.to(torch.float8_e4m3fn).flatten(-2)


def place(row: torch.Tensor, column: torch.Tensor, columns: int) -> torch.Tensor:
    """Where the scale byte of (sorted row, block of 32) lies in a matrix of ``columns``, a multiple of 8: in tiles of
    32 rows x 8 blocks, in which the four bytes that a lane needs together are neighbours."""
    within = column % 4 * 64 + row % 16 * 4 + column % 8 // 4 * 2 + row % 32 // 16
    return row // 32 * 32 * columns + column // 8 * 256 + within


def sort_scales(scale: torch.Tensor, routes: Sorted, padding: int = 0xFF) -> torch.Tensor:
    """Scale bytes [T, C/32] of tokens or [T, topk, C/32] of routes in sorted order; ``padding``, by default NaN, where
    no route is."""
    columns = -(-scale.shape[-1] // 8) * 8
    result = torch.full((-(-len(routes.ids) // 32) * 32 * columns,), padding, dtype=torch.uint8)
    row, token, slot = routes.routes
    where = place(row.unsqueeze(-1), torch.arange(scale.shape[-1]), columns)
    result[where] = scale[token] if scale.dim() == 2 else scale[token, slot]
    return result.view(-1, columns)


# --- aiter


class NoAiter(Exception):
    """Says why there is nothing to execute."""


@dataclass
class Launch:
    """What aiter's host code was about to launch."""

    text: str
    """Assembly."""
    values: list
    """Arguments; addresses of the host as integers."""


class Aiter:
    """aiter's two stages on CPU tensors.

    ``case`` has the kernels' names, ``stage1`` and ``stage2``, the sizes T, H, E, topk and ``I`` (padded), and
    ``swiglu``: alpha, beta and limit.
    """

    ENVIRONMENT = {
        "AITER_AOT_IMPORT": "1",  # aiter: build no HIP kernels on import
        "COMPILE_ONLY": "1",  # FlyDSL, here and below
        "FLYDSL_DUMP_IR": "1",
        "FLYDSL_GPU_ARCH": "gfx950",
        "FLYDSL_RUNTIME_ENABLE_CACHE": "0",
    }

    def __init__(self):
        os.environ |= self.ENVIRONMENT
        try:
            import flydsl.compiler
            from aiter.ops.flydsl import moe_kernels
            from aiter.ops.flydsl.kernels import mxmoe_dispatcher
            from aiter.ops.flydsl.mxfp4_kname import parse_flydsl_v2_gemm2_kernel
        except Exception as error:  # without ROCm, or with another project's aiter, this fails in many ways
            found = getattr(sys.modules.get("aiter"), "__file__", None)
            where = f"; the module 'aiter' is {found}" if found else ""
            why = f"{type(error).__name__}: {error}{where}"
            raise NoAiter(f"aiter's FlyDSL kernels cannot be imported ({why})") from None
        self.compiler, self.kernels, self.dispatcher = flydsl.compiler, moe_kernels, mxmoe_dispatcher
        self.parse_v2 = parse_flydsl_v2_gemm2_kernel
        self.version = f"flydsl {flydsl.__version__}"
        self.tables = sorted((Path(moe_kernels.__file__).parents[2] / "configs").rglob("*_mxfp8_tuned_fmoe.csv"))
        """Which kernels aiter takes for which sizes."""
        self.workgroups: int | None = None
        """How many of each launch are executed; None: all."""
        self.unordered: list[str] = []
        """What the simulator found about the order of waves in LDS; the kernels were run without that check then."""
        self._texts: dict = {}

    def parameters(self, name: str) -> dict:
        """What aiter makes of a kernel's name."""
        found = self.parse_v2(name) or self.kernels.get_flydsl_kernel_params(name)
        if found is None:
            raise NoAiter(f"this aiter has no kernel {name}")
        return found

    def _assembly(self, compile_, kernel, arguments) -> str:
        if kernel not in self._texts:
            with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, FLYDSL_DUMP_DIR=folder):
                with contextlib.redirect_stdout(io.StringIO()):
                    compile_(kernel, *arguments)
                found = list(Path(folder).rglob("*_final_isa.s"))
                if len(found) != 1:
                    raise RuntimeError(f"FlyDSL left {len(found)} files of assembly, not one")
                self._texts[kernel] = found[0].read_text()
        return self._texts[kernel]

    @contextlib.contextmanager
    def _caught(self):
        """A list that gets each launch that aiter's host code makes."""
        launches, original = [], self.compiler.compile

        def compile_(kernel, *arguments):
            *values, _stream = (x.pointer.value or 0 if hasattr(x, "pointer") else x for x in arguments)
            launches.append(Launch(self._assembly(original, kernel, arguments), values))

        stream = mock.patch.object(torch.cuda, "current_stream", lambda *_: 0)
        with mock.patch.object(self.compiler, "compile", compile_), stream:
            yield launches

    def stage1(self, case, a, a_scale, w1, w1_scale, routes: Sorted) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codes and sorted scales of the activations between the stages, or those activations in bf16 and None."""
        kernel = self.parameters(case.stage1)
        names = "tile_m tile_n tile_k a_dtype b_dtype out_dtype waves_per_eu b_nt gate_mode xcd_swizzle k_wave"
        with self._caught() as launches:
            result = self.kernels.flydsl_moe_stage1(
                a, w1, routes.ids, routes.experts, routes.valid, topk=case.topk, w1_scale=w1_scale, a1_scale=a_scale,
                act="silu" if case.swiglu["swiglu_alpha"] == 1 else "swiglu", swiglu_limit=case.swiglu["swiglu_limit"],
                use_async_copy=True, v2_output_layout=self.parse_v2(case.stage2) is not None, **_of(kernel, names),
            )  # fmt: skip
        (launch,) = launches
        out, out_scale = result if isinstance(result, tuple) else (result, None)
        _tokens, n, _k, blocks = launch.values[11:15]
        types = "*u8 " * 11 + "i32 " * 4 + "fp32 " * 5
        outputs = [out] if out_scale is None else [out, out_scale]
        inputs = [a, w1, a_scale, w1_scale, routes.ids, routes.experts, routes.valid]
        self._execute(launch, types, (n // kernel["tile_n"], blocks), inputs, outputs, routes)
        return out, out_scale

    def stage2(self, case, a2, a2_scale, w2, w2_scale, routes: Sorted) -> torch.Tensor:
        """The layer's output."""
        out = torch.zeros(case.T, case.H, dtype=torch.bfloat16)
        terms = torch.empty(case.T, case.topk, case.H, dtype=torch.bfloat16)
        reduces = "_reduce" in case.stage2  # one kernel leaves the terms, another one adds them up
        kernel = self.parameters(case.stage2)
        with self._caught() as launches:
            if self.parse_v2(case.stage2):
                self.dispatcher.mxfp4_moe_gemm2(
                    inter_sorted_quant=a2.view(torch.uint8), inter_sorted_shuffled_scale=a2_scale.view(torch.uint8),
                    w2_u8=w2.view(torch.uint8), w2_scale_u8=w2_scale, sorted_expert_ids=routes.experts,
                    cumsum_tensor=routes.valid, sorted_token_ids=routes.ids, sorted_weights=routes.weights,
                    out=terms if reduces else out, M_logical=case.T, max_sorted=len(a2), NE=case.E, D_HIDDEN=case.H,
                    D_INTER=case.I, topk=case.topk, BM=kernel["tile_m"], BN=kernel["tile_n"], BK=kernel["tile_k"],
                    SBM=kernel["sort_block_m"], g2_bf16_lds=kernel["bf16_lds"], g2_spart=kernel["spart"],
                    **_of(kernel, "use_nt a_dtype b_dtype epilog persist"),
                )  # fmt: skip
                if reduces:
                    self.kernels._run_moe_reduction(terms, out, case.T, case.topk, case.H)
                *pointers, tokens, max_blocks, blocks, I, H, pad_k, pad_n, to, to_scale = launches[0].values
                launches[0].values = [*pointers, tokens, max_blocks, I, H, pad_k, pad_n, to, to_scale, blocks]
                types = "*u8 " * 8 + "i32 " * 6 + "*u8 " * 2 + "i32"
                grid = (blocks * (H // kernel["tile_n"]),)
            else:
                names = ("tile_m tile_n tile_k a_dtype b_dtype out_dtype mode sort_block_m waves_per_eu"
                         " use_async_copy cu_num_mul b_nt persist xcd_swizzle")  # fmt: skip
                self.kernels.flydsl_moe_stage2(
                    a2, w2, routes.ids, routes.experts, routes.valid, out=out, topk=case.topk, w2_scale=w2_scale,
                    a2_scale=a2_scale, sorted_weights=routes.weights, **_of(kernel, names),
                )  # fmt: skip
                if reduces:  # aiter's own tensor of terms is gone
                    launches[0].values[0] = launches[1].values[0] = terms.data_ptr()
                types = "*u8 " * 10 + "i32 " * 4
                _tokens, H, _k, blocks = launches[0].values[10:]
                grid = (H // kernel["tile_n"], blocks)
        inputs = [a2, w2, a2_scale, w2_scale, routes.ids, routes.experts, routes.weights, routes.valid]
        if reduces:
            self._execute(launches[0], types, grid, inputs, [terms], routes)
            blocks = -(-case.H // (8 * parse(launches[1].text).threads))
            self._execute(launches[1], "*u8 " * 5 + "i32", (case.T, blocks), [terms], [out], routes)
        else:
            self._execute(launches[0], types, grid, [*inputs, out], [], routes)
        return out

    def _execute(self, launch: Launch, types: str, grid: tuple[int, ...], *others) -> None:
        if self.workgroups:
            grid = (min(grid[0], self.workgroups), *(1 for _ in grid[1:]))
        arguments = launch, types, grid, *others
        try:
            execute(*arguments, all_checks())
        except Unordered as error:
            self.unordered.append(str(error))
            execute(*arguments, [one for one in all_checks() if not isinstance(one, LdsOrder)])


def _of(kernel: dict, names: str) -> dict:
    return {name: kernel[name] for name in names.split() if name in kernel}


def execute(
    launch: Launch, types: str, grid: tuple[int, ...], inputs: list[torch.Tensor], outputs: list[torch.Tensor],
    routes: Sorted, checks: list,
) -> None:  # fmt: skip
    """Run a kernel on host tensors.

    ``outputs`` hold nothing defined before. Afterwards they hold NaN where nothing was stored, not something undefined:
    kernels pack values of a route's row and of one that fills up into one register, which the simulator follows as a
    whole.
    """
    for x in outputs:
        x.view(torch.uint8).fill_(0xFF)
    known = {x.data_ptr(): x for x in (*inputs, *outputs)} | {0: torch.empty(0)}
    parameters = [(f"argument {i}", type_) for i, type_ in enumerate(types.split())]
    arguments = {
        name: known[value] if type_ == "*u8" else value
        for (name, type_), value in zip(parameters, launch.values, strict=True)
    }
    device = Device({name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}, outputs)
    for x in inputs:
        unwritten = routes.unwritten(x)
        if unwritten is not None and any(x is y for y in arguments.values()):
            device.undefine(x, unwritten.numpy())
    device.launch(Kernel.of_text(launch.text, parameters), arguments, grid, checks)
    device.memory.copy_back()
