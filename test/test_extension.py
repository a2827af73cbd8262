"""The compiled part: that it is there, and that each instruction set in it gives the same results."""

import os
import subprocess
import sys

import pytest

from helpers import HERE, PACKAGE, needs_extension, run_python
from torch_mxfp8moe import backends, extension

WITHOUT = "MXFP8MOE_TEST_WITHOUT_EXTENSION"


def test_the_extension_is_there():
    """Fails where it is missing, so that a run that tested only the reference cannot look like one of everything."""
    if os.environ.get(WITHOUT) == "1":
        pytest.skip(f"{WITHOUT}=1")
    assert extension.MODULE is not None, f"{extension.WHY_MISSING} (or set {WITHOUT}=1 to test the reference alone)"


def test_backend_tells_whether_it_is_there():
    status = backends()["cpu"]
    assert status.usable == (extension.MODULE is not None) and status.reason == extension.WHY_MISSING


@needs_extension
def test_capability_is_the_best_that_the_processor_runs():
    wanted = os.environ.get("MXFP8MOE_CPU_CAPABILITY")
    names = extension.MODULE.capabilities()
    assert names[-1] == "portable" and set(names) <= {"avx512", "avx2", "portable"}
    assert extension.MODULE.capability() == (wanted or names[0])


@needs_extension
def test_unknown_capability_is_an_error_that_names_the_known_ones():
    code = """
import torch, torch_mxfp8moe
try:
    torch_mxfp8moe.quantize_1x32(torch.zeros(32))
except RuntimeError as error:
    print(error)
"""
    message = run_python(code, MXFP8MOE_CPU_CAPABILITY="sse9")
    names = ", ".join(extension.MODULE.capabilities())
    assert message.strip() == f"MXFP8MOE_CPU_CAPABILITY is 'sse9'; it takes what this processor runs: {names}"


@needs_extension
@pytest.mark.parametrize("capability", ("avx512", "avx2", "portable"))
def test_kernels_of_each_instruction_set(capability):
    """The tests marked ``kernels`` again, in a process that uses another instruction set."""
    if capability not in extension.MODULE.capabilities():
        pytest.skip(f"this processor does not run {capability}")
    if capability == extension.MODULE.capability():
        pytest.skip(f"{capability} is what all other tests use here")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "kernels", "-p", "no:cacheprovider", str(HERE)],
        env=os.environ
        | {
            "MXFP8MOE_CPU_CAPABILITY": capability,
            "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
