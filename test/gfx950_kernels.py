"""What the tests of the gfx950 simulator execute: snippets of assembly and small Triton kernels."""

from collections.abc import Iterable

import numpy as np
import torch
import triton
import triton.language as tl
from gfx950_simulator.assembly import parse
from gfx950_simulator.checks import all_checks
from gfx950_simulator.hazards import check_wait_states
from gfx950_simulator.launch import Device, Kernel
from gfx950_simulator.machine import Program
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torch_mxfp8moe.backends.triton import numerics

GFX950 = GPUTarget("hip", "gfx950", 64)

# --- assembly

_DESCRIPTOR = """
.amdhsa_kernel snippet
  .amdhsa_private_segment_fixed_size {scratch}
  .amdhsa_kernarg_size 16
  .amdhsa_user_sgpr_count 2
  .amdhsa_user_sgpr_kernarg_segment_ptr 1
  .amdhsa_system_sgpr_workgroup_id_x 1
  .amdhsa_system_sgpr_workgroup_id_y 0
  .amdhsa_system_sgpr_workgroup_id_z 0
  .amdhsa_accum_offset 256
.end_amdhsa_kernel
.amdgpu_metadata
amdhsa.kernels:
  - .agpr_count:     0
    .args:
      - .offset:         0
        .size:           8
        .value_kind:     global_buffer
      - .offset:         8
        .size:           8
        .value_kind:     global_buffer
    .name:           snippet
.end_amdgpu_metadata
"""


def snippet(body: str, inputs: int, outputs: Iterable[str], waves: int = 1, lds: int = 0, scratch: int = 0) -> Kernel:
    """A kernel that loads its inputs, dwords by work-item, to v1, v2, ..., runs ``body`` and stores the registers
    ``outputs``. s[4:5] and s[6:7] hold the addresses of input and output, v0 the work-item's number, v200 that by 4."""
    step = 256 * waves
    lines = ["snippet:", "s_load_dwordx4 s[4:7], s[0:1], 0x0", "v_lshlrev_b32_e32 v200, 2, v0"]
    lines += ["v_mov_b32_e32 v201, v200", "s_waitcnt lgkmcnt(0)"]
    for i in range(inputs):
        lines += [f"global_load_dword v{i + 1}, v201, s[4:5]", f"v_add_u32_e32 v201, {step}, v201"]
    lines += ["v_mov_b32_e32 v201, v200", "s_waitcnt vmcnt(0)", *body.strip().splitlines()]
    lines += ["s_mov_b64 exec, -1", "s_waitcnt vmcnt(0) lgkmcnt(0)", "s_nop 15", "s_nop 7"]
    for register in outputs:
        lines += [f"v_mov_b32_e32 v202, {register}" if register[0] == "s" else "s_nop 0"]
        source = "v202" if register[0] == "s" else register
        lines += [f"global_store_dword v201, {source}, s[6:7]", f"v_add_u32_e32 v201, {step}, v201"]
    program = Program(parse("\n".join([*lines, "s_endpgm", _DESCRIPTOR.format(scratch=scratch)])))
    check_wait_states(program)
    return Kernel(program, [("source", "*i32"), ("out", "*i32")], waves, lds)


def execute(
    body: str, *inputs: np.ndarray, outputs: Iterable[str] = ("v10",), waves: int = 1, lds: int = 0, scratch: int = 0,
    groups: int = 1, observers=None,
) -> list[np.ndarray]:  # fmt: skip
    """Run ``body`` (see :func:`snippet`) on uint32 inputs [waves * 64]; the outputs, likewise."""
    outputs = list(outputs)
    words = np.concatenate([np.asarray(x, np.uint32) for x in inputs] or [np.zeros(1, np.uint32)])
    source = torch.from_numpy(words.view(np.int32).copy())
    out = torch.empty(max(1, len(outputs)) * waves * 64, dtype=torch.int32)
    device = Device({"source": source, "out": out}, [out])
    kernel = snippet(body, len(inputs), outputs, waves, lds, scratch)
    device.launch(kernel, {"source": source, "out": out}, (groups,), all_checks() if observers is None else observers)
    device.memory.copy_back()
    return list(out.numpy().view(np.uint32).reshape(-1, waves * 64)[: len(outputs)])


# --- Triton


def compile_(kernel, signature: dict, constants: dict, aligned: Iterable[str] = (), **options) -> Kernel:
    """signature: Triton types of the run-time arguments; aligned: pointers that are divisible by 16."""
    return Kernel.of(compile_text(kernel, signature, constants, aligned, **options))


def compile_text(kernel, signature: dict, constants: dict, aligned: Iterable[str] = (), **options):
    """Triton's CompiledKernel."""
    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return triton.compile(ASTSource(kernel, types, values, attributes), target=GFX950, options=options)


def run(kernel: Kernel, arguments: dict, grid: tuple[int, ...], outputs: Iterable[str], observers=None) -> None:
    """Execute on tensors; those named in ``outputs`` hold nothing defined before."""
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    device = Device(tensors, [tensors[name] for name in outputs])
    device.launch(kernel, arguments, grid, observers)
    device.memory.copy_back()


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    tl.store(out + index, tl.load(x + index, mask=mask) + tl.load(y + index, mask=mask), mask=mask)


@triton.jit
def grid_kernel(out):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    number = x + tl.num_programs(0) * (y + tl.num_programs(1) * z)
    tl.store(out + number, x + 16 * y + 256 * z)


@triton.jit
def softmax_kernel(x, out, columns, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    value = tl.load(x + row * columns + index, mask=index < columns, other=-float("inf"))
    value = tl.exp(value - tl.max(value, 0))
    tl.store(out + row * columns + index, value / tl.sum(value, 0), mask=index < columns)


@triton.jit
def reduce_kernel(x, total, largest, position, running, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    value = tl.load(x + index)
    tl.store(total, tl.sum(value, 0))
    tl.store(largest, tl.max(value, 0))
    tl.store(position, tl.argmax(value, 0))
    tl.store(running + index, tl.cumsum(value, 0))


@triton.jit
def sort_kernel(x, out, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, tl.sort(tl.load(x + index)))


@triton.jit
def histogram_kernel(x, counts, sums, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + index, mask=index < n, other=0)
    tl.atomic_add(counts + value % 16, 1, mask=index < n)
    tl.atomic_add(sums + value % 16, value.to(tl.float32), mask=index < n)


@triton.jit
def dot_kernel(a, b, out, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    row, column, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(a + row[:, None] * K + start + k[None, :])
        right = tl.load(b + (start + k)[:, None] * N + column[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + row[:, None] * N + column[None, :], total)


@triton.jit
def dot_scaled_kernel(
    a, a_scale, b, b_scale, out, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a [M, K], b [N, K] e4m3 codes with E8M0 bytes by 32."""
    row, column, k, block = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 32)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(a + row[:, None] * K + start + k[None, :])
        right = tl.load(b + column[None, :] * K + (start + k)[:, None])
        left_scale = tl.load(a_scale + row[:, None] * (K // 32) + start // 32 + block[None, :])
        right_scale = tl.load(b_scale + column[:, None] * (K // 32) + start // 32 + block[None, :])
        total = tl.dot_scaled(left, left_scale, "e4m3", right, right_scale, "e4m3", total)
    tl.store(out + row[:, None] * N + column[None, :], total)


@triton.jit
def quantize_natively_kernel(x, data, scale, N: tl.constexpr):
    """N blocks of 32, as the first product ends (gemm.py)."""
    block = tl.arange(0, N)
    index = block[:, None] * numerics.BLOCK + tl.arange(0, numerics.BLOCK)[None, :]
    values = tl.load(x + index)
    byte = numerics.scale_byte(numerics.block_amax(values), "rceil")
    tl.store(data + index, numerics.encode_natively(values, byte[:, None]))
    tl.store(scale + block, byte.to(tl.uint8))
