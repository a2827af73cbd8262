"""A kernel launch as data: compiled before anything runs, for the GPU here or offline for one that is not there."""

import threading
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .targets import INTERPRETED, Target


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a Triton kernel."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict
    """By parameter name: tensors, tensor descriptors, numbers and constants."""
    options: dict = field(default_factory=dict)
    """Compiler options: num_warps, num_stages, ..."""

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)

    def compiled(self) -> CompiledKernel:
        """The kernel that :meth:`run` will launch, compiled if it has not been."""
        kernel = self.kernel.warmup(grid=self.grid, **self.arguments, **self.options)
        return kernel.result() if hasattr(kernel, "result") else kernel


_compiled: set[tuple] = set()
"""What is known to compile and load: see :func:`run`."""


def _key(launch: Launch, device: torch.device) -> tuple:
    """Equal for launches that run the same machine code; constants have names in capitals."""
    facts = []
    for name, value in launch.arguments.items():
        if isinstance(value, TensorDescriptor):
            facts.append((value.base.dtype, *value.block_shape))
        elif isinstance(value, torch.Tensor):
            facts.append((value.dtype, value.data_ptr() % 16 == 0))
        elif value is None or name.isupper():
            facts.append(value)
    return launch.kernel, device, *facts, *launch.options.items()


def run(op: str, launches: list[Launch], device: torch.device, target: Target) -> None:
    """Launch all of ``launches`` on ``device``, or, if one of them cannot be compiled or loaded, none.

    Raises NotImplementedError, which names ``op``, the kernel and what the compiler said.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            key = _key(launch, device)
            if key not in _compiled and target is not INTERPRETED:
                try:
                    launch.compiled().run  # which loads it
                except Exception as error:
                    raise NotImplementedError(
                        f"{op}: backend 'triton' cannot compile {launch.kernel.__name__} for {target.arch} with "
                        f"{launch.options}: {type(error).__name__}: {error}"
                    ) from error
                _compiled.add(key)
        for launch in launches:
            launch.run()


class _OfflineDriver:
    """Stands for a GPU that is not there; Triton only asks it what to compile for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target  # the key of Triton's cache of kernels

    def get_current_stream(self, device) -> int:
        return 0


_offline = threading.Lock()


def compile_offline(launches: Iterable[Launch], target: Target) -> list[CompiledKernel]:
    """Each of ``launches`` as machine code for ``target``; needs no GPU, and the tensors may be on ``meta``."""
    if target.capability:
        gpu = GPUTarget("cuda", target.capability, 32)
    else:
        gpu = GPUTarget("hip", target.arch, 64)
    with _offline:
        driver.set_active(_OfflineDriver(gpu))
        try:
            return [launch.compiled() for launch in launches]
        finally:
            try:
                driver.reset_active()
            except RuntimeError:  # there is no GPU here; the next who needs one is told so
                driver.set_active(None)
