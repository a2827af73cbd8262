"""Kernels to mutate for the test of the gfx950 simulator: each runs a given assembly text and says whether the result
is right."""

import warnings
from functools import cache

import gfx950_kernels as kernels
import gfx950_ops as ops
import torch
from gfx950_simulator import launch

from helpers import TOLERANCE, moe_inputs, randn, relative_l2, same_bytes
from torch_mxfp8moe import reference
from torch_mxfp8moe.arguments import QuantizePreshuffle
from torch_mxfp8moe.backends.triton import preshuffle as preshuffle_launches
from torch_mxfp8moe.backends.triton import quantize as quantize_launches
from torch_mxfp8moe.backends.triton.launch import compile_offline


class Subject:
    """A compiled kernel, its input, and what it has to give."""

    def text(self) -> str:
        return self.compiled.asm["amdgcn"]

    def right(self, text: str) -> bool:
        """Whether ``text`` in the kernel's place gives the right result; raises what the simulator raises."""
        raise NotImplementedError


class Dot(Subject):
    """bf16, pipelined, transposed reads of LDS."""

    def __init__(self):
        M, N, K = 64, 64, 256
        pointers = dict(a="*bf16", b="*bf16", out="*fp32")
        constants = dict(K=K, M=M, N=N, BLOCK_K=64)
        self.compiled = kernels.compile_text(kernels.dot_kernel, pointers, constants, pointers)
        self.inputs = dict(a=randn(M, K, seed=1, dtype=torch.bfloat16), b=randn(K, N, seed=2, dtype=torch.bfloat16))
        self.want = self.inputs["a"].double() @ self.inputs["b"].double()

    def right(self, text: str) -> bool:
        out = torch.empty(self.want.shape)
        kernels.run(launch.Kernel.of(self.compiled, text), self.inputs | dict(out=out), (1,), ["out"])
        return relative_l2(out, self.want) < 3e-7


class DotScaled(Subject):
    """MXFP8, K in four steps, scales that differ by block."""

    def __init__(self):
        M, N, K = 64, 64, 512
        pointers = dict(a="*u8", a_scale="*u8", b="*u8", b_scale="*u8", out="*fp32")
        constants = dict(K=K, M=M, N=N, BLOCK_K=128)
        self.compiled = kernels.compile_text(kernels.dot_scaled_kernel, pointers, constants, pointers)
        spread = [torch.exp2(randn(64, K // 32, seed=seed) * 2).repeat_interleave(32, 1) for seed in (3, 4)]
        a, b = (reference.quantize_1x32(randn(64, K, seed=seed) * x) for seed, x in zip((1, 2), spread))
        self.inputs = dict(a=a[0].view(torch.uint8), a_scale=a[1], b=b[0].view(torch.uint8), b_scale=b[1])
        self.want = reference.dequantize_1x32(*a).double() @ reference.dequantize_1x32(*b).double().T

    right = Dot.right


class Reduce(Subject):
    """Sum, maximum, its position and running sum by four waves."""

    def __init__(self):
        pointers = dict.fromkeys(("x", "total", "largest", "position", "running"), "*i32")
        self.compiled = kernels.compile_text(kernels.reduce_kernel, pointers, dict(BLOCK=512), num_warps=4)
        self.x = (randn(512, seed=3) * 100).int()

    def right(self, text: str) -> bool:
        x = self.x
        outputs = {name: torch.empty(1, dtype=torch.int32) for name in ("total", "largest", "position")}
        outputs["running"] = torch.empty(512, dtype=torch.int32)
        kernels.run(launch.Kernel.of(self.compiled, text), dict(x=x) | outputs, (1,), outputs)
        want = x.sum(), x.max(), x.argmax(), x.cumsum(0)
        return all(bool((got == right).all()) for got, right in zip(outputs.values(), want))


class QuantizeBlocks(Subject):
    """``quantize_1x32`` of a ragged number of blocks."""

    def __init__(self):
        self.x = randn(21, 160, seed=1) * torch.exp2(randn(21, 5, seed=2) * 20).repeat_interleave(32, 1)
        self.x[3, 40], self.x[5, :32] = float("nan"), 0
        self.want = reference.quantize_1x32(self.x)
        memory = dict(x=self.x, data=self.want[0], scale=self.want[1])
        launches = quantize_launches.quantize(self.x, "rceil").bind(memory, ops.CPU)
        (self.compiled,) = compile_offline(launches, ops.TARGET)

    def right(self, text: str) -> bool:
        got = ops.quantize_1x32(self.x, "rceil", texts={0: text})
        return all(same_bytes(a, b) for a, b in zip(got, self.want))


class QuantizeInto(Subject):
    """``quantize_preshuffle`` of rows that take turns, padded."""

    def __init__(self):
        self.x = randn(1, 64, 2, 256, seed=1) * torch.exp2(randn(1, 64, 2, 8, seed=2) * 20).repeat_interleave(32, -1)
        self.x[0, 3, 0, 40], self.x[0, 5, 1, :32] = float("nan"), 0
        self.call = QuantizePreshuffle(self.x.transpose(1, 2), "aiter_gfx950", True, pad_to=128).check()
        self.want = reference.quantize_preshuffle(self.call.x, layout="aiter_gfx950", gate_up=True, pad_to=128)
        memory = dict(x=self.call.x, out_weight=self.want[0], out_scale=self.want[1])
        (self.compiled,) = compile_offline(
            preshuffle_launches.quantize_preshuffle(self.call).bind(memory, ops.CPU), ops.TARGET
        )

    def right(self, text: str) -> bool:
        self.call.out_weight, self.call.out_scale = (torch.empty_like(x) for x in self.want)
        ops.quantize_preshuffle(self.call, texts={0: text})
        return all(same_bytes(a, b) for a, b in zip(self.call.outputs, self.want))


class Moe(Subject):
    """One of the launches of ``fused_moe``, the others as they are."""

    def __init__(self, which: int):
        self.which = which
        self.inputs = moe_inputs(T=33, H=256, I=192, E=3, K=2, dtype=torch.float32)
        self.inputs["topk_ids"][::4, 0] = -1
        self.options = dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=1.0)
        self.want = reference.fused_moe(**self.inputs, **self.options)
        launches = ops.bound_launches(ops.moe_call(self.inputs, **self.options))
        self.compiled = compile_offline(launches, ops.TARGET)[which]

    def right(self, text: str) -> bool:
        out = ops.fused_moe(ops.moe_call(self.inputs, **self.options), texts={self.which: text})
        return relative_l2(out, self.want) <= TOLERANCE[torch.float32] and bool(out.isfinite().all())


SUBJECTS = {
    "dot": Dot, "dot_scaled": DotScaled, "reduce": Reduce, "quantize": QuantizeBlocks,
    "quantize_preshuffle": QuantizeInto,
    "route": lambda: Moe(0), "dispatch": lambda: Moe(1), "gemm1": lambda: Moe(2), "gemm2": lambda: Moe(3),
    "combine": lambda: Moe(4),
}  # fmt: skip


@cache
def subject(name: str) -> Subject:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SUBJECTS[name]()
