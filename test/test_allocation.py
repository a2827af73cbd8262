"""Memory that is allocated past PyTorch's dispatcher is what ``torch.empty_strided`` gives."""

from types import SimpleNamespace

import pytest
import torch

from device import DEVICE
from torch_mxfp8moe.allocation import allocator


def not_built(shape, strides, dtype):
    raise RuntimeError("PyTorch compiled without support for the specified device.")


@pytest.fixture(params=("there", "not there", "not built"))
def empty(request, monkeypatch):
    device = torch.empty(0, device=DEVICE).device
    name = f"_empty_strided_{device.type}"
    inductors = getattr(torch._C._dynamo.guards, name, None)
    if request.param != "there":
        instead = SimpleNamespace(**{name: not_built} if request.param == "not built" else {})
        monkeypatch.setattr(torch._C._dynamo, "guards", instead)
    found = allocator.__wrapped__(device)
    assert (found is inductors) == (request.param == "there")
    return found


@pytest.mark.parametrize("mode", (torch.inference_mode, torch.no_grad, torch.enable_grad))
@pytest.mark.parametrize("shape, strides", (((3, 5), (5, 1)), ((0, 4), (4, 1)), ((7,), (1,)), ((), ())), ids=str)
@pytest.mark.parametrize("dtype", (torch.int32, torch.float32, torch.uint8))
def test_new_memory(empty, mode, shape, strides, dtype):
    with mode():
        first, second = (empty(shape, strides, dtype) for _ in range(2))
        want = torch.empty_strided(shape, strides, dtype=dtype, device=DEVICE)
    for name in ("shape", "dtype", "device", "requires_grad"):
        assert getattr(first, name) == getattr(want, name), name
    assert first.stride() == want.stride() and first.is_inference() == want.is_inference()
    assert first.untyped_storage().nbytes() == want.untyped_storage().nbytes()
    assert not first.numel() or first.data_ptr() != second.data_ptr()
