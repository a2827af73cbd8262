"""What a compiled Triton kernel is made of: its instructions, registers, spills and shared memory."""

import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton
from triton.backends.nvidia.compiler import get_ptxas

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10}
"""Bytes of shared memory that one program may have."""

SCALARS = 16
"""So many scalar registers of AMD GPUs may be kept in a vector register, at an instruction each: whether they are too
many changes with every version of the compiler."""

SCALED_MMA = {"sm_100": r"tcgen05\.mma\S*kind::mxf8f6f4\.block_scale", "gfx950": r"v_mfma_scale_f32_\d+x\d+x\d+_f8f6f4"}
BF16_MMA = {
    "sm_80": r"mma\.sync\S*\.f32\.bf16\.bf16\.f32",
    "sm_90": r"wgmma\.mma_async\S*\.f32\.bf16\.bf16",
    "sm_100": r"tcgen05\.mma\S*kind::f16",
    "gfx942": r"v_mfma_f32_\w*bf16",
    "gfx950": r"v_mfma_f32_\w*bf16",
}
ANY_MMA = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)\S*"
ATOMIC = r"(?m)^\s*(?:@!?%?\w+\s+)?((?:atom|red)\.\S+)|\b((?:global|flat|buffer|ds)_\w*(?:atomic|add_f|add_rtn_f)\w*)"
ORDERLESS = r"atom\.(?:\w+\.)*(?:shared|global)\.(?:\w+\.)*(?:add|inc)\.[us]32"
"""Sums of integers: counts in shared memory, and the counters by which programs share tiles."""


@dataclass(frozen=True)
class Code:
    """One kernel for one architecture."""

    arch: str
    text: str
    """PTX, or AMD's assembly."""
    ttir: str
    """Empty for a Gluon kernel."""
    registers: int
    """Of a thread; on AMD GPUs vector registers, accumulation registers included."""
    stack: int
    """Bytes of memory that a thread has for what it could not keep in registers; 0 without spills."""
    scalars: int
    """Scalar registers of AMD GPUs that are kept in lanes of a vector register, since they are too many; not memory."""
    shared: int
    warps: int
    matrix: tuple[str, ...]
    """Every matrix instruction."""

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.text))

    @property
    def summary(self) -> str:
        kinds = " ".join(f"{self.matrix.count(kind)}x {kind}" for kind in dict.fromkeys(self.matrix)) or "none"
        memory = f"stack {self.stack}, scalars kept in vectors {self.scalars}, shared {self.shared}"
        return f"{self.arch}: {self.registers} registers, {memory}; matrix: {kinds}"


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
    return done.stdout + done.stderr


def _one(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    assert len(found) == 1, f"{pattern} is there {len(found)} times"
    return int(found[0])


def read(kernel, arch: str) -> Code:
    """The code of a ``triton.compiler.CompiledKernel`` for ``arch``."""
    scalars = 0
    if arch.startswith("sm_"):
        text = kernel.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = _run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        registers, stack = (_one(rf"\b{name}:(\d+)", usage) for name in ("REG", "STACK"))
        stack += _one(r"\bLOCAL:(\d+)", usage)
    else:
        text = kernel.asm["amdgcn"]
        registers = _one(r"\.vgpr_count: +(\d+)", text)
        stack = _one(r"\.private_segment_fixed_size: +(\d+)", text) + 4 * _one(r"\.vgpr_spill_count: +(\d+)", text)
        scalars = _one(r"\.sgpr_spill_count: +(\d+)", text)
    return Code(
        arch=arch, text=text, ttir=kernel.asm.get("ttir", ""), registers=registers, stack=stack, scalars=scalars,
        shared=kernel.metadata.shared, warps=kernel.metadata.num_warps, matrix=tuple(re.findall(ANY_MMA, text)),
    )  # fmt: skip


def check(code: Code, stack: int = 0) -> None:
    """What holds for every kernel: it fits, a thread spills at most ``stack`` bytes, no result depends on the order
    of atomics."""
    assert code.shared <= SHARED[code.arch], f"too much shared memory: {code.summary}"
    assert code.stack <= stack and code.scalars <= SCALARS, f"spills: {code.summary}"
    if code.arch.startswith("sm_"):
        assert code.registers * 32 * code.warps <= 65536, f"too many registers: {code.summary}"
        assert not code.count(r"\btrap;"), f"the compiler gave up: {code.summary}"
    else:
        assert code.registers * -(-code.warps // 4) <= 512, f"too many registers: {code.summary}"
    atomics = {"".join(found) for found in re.findall(ATOMIC, code.text)}
    assert all(re.fullmatch(ORDERLESS, name) for name in atomics), f"atomics: {atomics}"


def check_gemm(code: Code, scaled: bool, descriptors: bool, stack: int = 0, trips: int = 2) -> None:
    """The matrix unit does what the strategy says, and nothing else; loads run ahead of it, if its loop has more
    than one trip."""
    wanted = (SCALED_MMA if scaled else BF16_MMA)[code.arch]
    assert code.matrix and all(re.match(wanted, kind) for kind in code.matrix), f"{wanted} it is not: {code.summary}"
    check(code, stack)
    if descriptors:
        assert code.count(r"cp\.async\.bulk\.tensor"), f"no TMA: {code.summary}"
    elif code.arch.startswith("sm_") and trips > 1:
        assert code.count(r"cp\.async\.c[ag]"), f"no cp.async: {code.summary}"
    if code.arch == "sm_90":
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(code.text)
            file.flush()
            log = _run(get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null")
        assert "serialized" not in log, log
