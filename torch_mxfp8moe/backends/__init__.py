"""The backends: who can compute the ops, asked by name and in order of preference.

A backend is one module ``torch_mxfp8moe/backends/<name>/`` that defines ``BACKEND``, an object of a class derived from
:class:`Backend`. Nothing else needs to know of it: the registry finds the module, and the module imports its vendor's
package only inside the functions that are asked about it. A "no" is always a string that says why.
"""

import importlib
import pkgutil
from functools import cache

import torch

from ..arguments import Call, Dequantize, FusedMoe, Preshuffle, Quantize, QuantizePreshuffle

__all__ = ["Backend", "registered"]


class Backend:
    """One implementation of the ops. Each method may assume what ``why_not`` of the same call has granted."""

    name: str
    priority: int
    """``backend="auto"`` asks the backend with the highest number first. (CPU tensors go to the C++ kernels, where they
    are built, before anybody is asked.)"""
    description: str
    """One line for the table of backends."""

    def why_unavailable(self) -> str | None:
        """Why this backend cannot be used on this machine at all, or None if it can."""
        raise NotImplementedError

    def why_not(self, call: Call) -> str | None:
        """Why this backend does not serve ``call``, whose arguments are valid, or None if it does."""
        raise NotImplementedError

    def quantize_1x32(self, call: Quantize) -> None:
        """Writes ``call.out_data`` and ``call.out_scale``."""
        raise NotImplementedError

    def dequantize_1x32(self, call: Dequantize) -> torch.Tensor:
        """-> [..., C] in ``call.dtype``."""
        raise NotImplementedError

    def preshuffle(self, call: Preshuffle) -> None:
        """Writes ``call.out_weight`` and ``call.out_scale``."""
        raise NotImplementedError

    def quantize_preshuffle(self, call: QuantizePreshuffle) -> None:
        """Writes ``call.out_weight`` and ``call.out_scale``."""
        raise NotImplementedError

    def fused_moe(self, call: FusedMoe) -> None:
        """Writes ``call.out``."""
        raise NotImplementedError

    def new_fused_moe(self, call: FusedMoe) -> torch.Tensor:
        """-> [T, H], for a call without ``out``: for those who allocate their result themselves."""
        call = call.with_out()
        self.fused_moe(call)
        assert call.out is not None
        return call.out

    def note(self, call: Call) -> str | None:
        """What ``explain`` says of a call that this backend serves, or None."""
        return None


class Unloadable(Backend):
    """Stands for a backend whose module cannot be imported."""

    priority = -1
    description = "does not load"

    def __init__(self, name: str, error: Exception):
        self.name, self.reason = name, f"importing it raised {type(error).__name__}: {error}"

    def why_unavailable(self) -> str | None:
        return self.reason

    def why_not(self, call: Call) -> str | None:
        return self.reason


def _load(name: str) -> Backend:
    try:
        return importlib.import_module(f"{__name__}.{name}").BACKEND
    except Exception as error:
        return Unloadable(name, error)


@cache
def registered() -> dict[str, Backend]:
    """Every backend of this package by name, the most preferred first."""
    backends = [_load(info.name) for info in pkgutil.iter_modules(__path__)]
    return {backend.name: backend for backend in sorted(backends, key=lambda backend: -backend.priority)}
