"""New memory past PyTorch's dispatcher, by the functions that Inductor's compiled graphs call: in less than half of the
time that ``torch.empty_strided`` takes."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch


@cache
def allocator(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]:
    """``empty(shape, strides, dtype)``: a new tensor on ``device``, which has to be the current one of its type."""
    internals: Any = torch._C
    try:  # nothing promises that it is there, or that it was built for this device
        empty = getattr(internals._dynamo.guards, f"_empty_strided_{device.type}")
        empty((0,), (1,), torch.uint8)
    except (AttributeError, RuntimeError):
        return partial(_empty, device)
    return empty


def _empty(
    device: torch.device, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)
