"""On an NVIDIA GPU: NVIDIA's compute-sanitizer finds no bad access and no race in any kernel."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

from gpu import needs_gpu
from helpers import HERE, PACKAGE

SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH')}{os.pathsep}{CUDA_HOME or ''}/bin")

pytestmark = [
    needs_gpu,
    pytest.mark.skipif(bool(torch.version.hip), reason="compute-sanitizer is for NVIDIA GPUs"),
    pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin"),
]

PLANTED = """
import torch, triton, triton.language as tl

@triton.jit
def reach(x, N: tl.constexpr):
    tl.store(x + 4096 + tl.arange(0, N), 1.0)

x = torch.zeros(64, device="cuda")
reach[(1,)](x, 64)
torch.cuda.synchronize()
"""


OPTIONS = {"memcheck": (), "racecheck": ("--kernel-name-exclude", "kernel_substring=warpgroup_gemm")}
"""racecheck does not follow what orders the warps of hopper.py's kernel, a barrier that some wait at and others arrive
at, and mbarriers: it reports Triton's own hand-over of work to the groups of warps, at the lines of the kernel's head
and of ``warp_specialize``, and every number that the loader tells. test/sass.py checks the order instead,
in the compiled code."""


def sanitized(tool: str, *command: str) -> tuple[int, str]:
    """Exit status and output of a Python program under a tool; every allocation of its own, so that bounds are real."""
    path = os.pathsep.join([str(PACKAGE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [SANITIZER, "--tool", tool, *OPTIONS[tool], "--error-exitcode", "99", sys.executable, *command],
        env=os.environ | {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("tool", ("memcheck", "racecheck"))
def test_sanitizer_is_silent(tool):
    status, text = sanitized(tool, str(HERE / "sanitizer_calls.py"))
    assert status == 0 and "all calls done" in text, text[-6000:]


def test_sanitizer_sees_a_planted_write(tmp_path):
    """The check above can fail: a store past the end of a tensor is reported."""
    (tmp_path / "reach.py").write_text(PLANTED)
    status, text = sanitized("memcheck", str(tmp_path / "reach.py"))
    assert status != 0 and "Invalid __global__ write" in text, text[-4000:]
