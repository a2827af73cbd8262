"""The compiled part (``csrc``), for type checkers."""

import torch

def capability() -> str:
    """The instruction set in use: 'avx512', 'avx2' or 'portable'."""

def capabilities() -> list[str]:
    """The instruction sets that this processor runs, the best first."""

def signature(tensors: tuple[torch.Tensor | None, ...]) -> int | None:
    """A number for sizes, strides, dtypes, devices and alignment to 16 bytes: the same for equal ones, never for
    others. None if one of the tensors is not memory with strides.

    Not there if PyTorch has no DLPack exchange API of version 1.
    """
