"""What the tests on a GPU share."""

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")

needs_sm_90 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an sm_90 GPU"
)


def on_gpu(inputs: dict) -> dict:
    """The same tensors on the GPU."""
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
