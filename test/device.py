"""Where the ops run in the tests: pytest's ``--device``, in its process and in those that tests start.

- ``cpu``: CPU tensors, the C++ kernels (the reference, where they are not built).
- ``cuda``: tensors on the GPU, which PyTorch calls cuda on AMD too; our Triton kernels.
- ``interpreter``: CPU tensors; our Triton kernels in Triton's interpreter, as if there were no C++ kernels.

To be imported before ``torch_mxfp8moe`` and Triton are.
"""

import importlib.util
import os
import sys

import numpy as np
import torch
from numpy.lib import NumpyVersion

NAME = os.environ.get("MXFP8MOE_TEST_DEVICE", "cpu")
DEVICE = torch.device("cuda", 0) if NAME == "cuda" else torch.device("cpu")
"""Of every tensor that a test gives to an op, unless the test says otherwise."""

if NAME == "cuda":
    torch.set_default_device(DEVICE)  # for what tests make; the ops' kernels do not see it
elif NAME == "interpreter":
    assert "triton" not in sys.modules, "Triton reads TRITON_INTERPRET when it is imported"
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["MXFP8MOE_TEST_WITHOUT_EXTENSION"] = "1"
    sys.modules["torch_mxfp8moe._C"] = None  # which makes importing it an ImportError


def why_not(name: str) -> str | None:
    """Why a run with ``--device name`` is not possible here, or None if it is."""
    if name == "cuda" and not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no GPU"
    if name == "interpreter":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install triton)"
        import triton

        if NumpyVersion(triton.__version__) < "3.7.0" and NumpyVersion(np.__version__) >= "2.4.0":
            return f"the interpreter of Triton {triton.__version__} takes NumPy before 2.4; this is {np.__version__}"
    return None
