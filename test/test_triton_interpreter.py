"""The Triton kernels without a GPU: their index arithmetic and numerics in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest

import device
from helpers import HERE, PACKAGE, only_cpu

pytestmark = only_cpu


def test_triton_is_there():
    """Fails where it could be, so that a run that left out the Triton kernels cannot look like one of everything."""
    if sys.platform != "linux":
        pytest.skip(f"there is no Triton for {sys.platform}")
    assert importlib.util.find_spec("triton") is not None, "pip install triton"


def test_kernels():
    """The tests marked ``small``: every argument of every op, at sizes that the interpreter is quick with."""
    why_not = device.why_not("interpreter")
    if why_not:
        pytest.skip(why_not)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--device", "interpreter", "-m", "small", "-q", "-x", "-p", "no:cacheprovider"]
        + ["-c", str(HERE / "pytest.ini"), str(HERE)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
