"""Kernel launches as data: built from what a call's sizes and dtypes are, compiled before anything runs, kept.

A :class:`Plan` is what serves all calls that differ in memory and values only (``Call.kind``). It is bound to
tensors for Triton's interpreter and for compiling without a GPU; on a GPU it holds compiled kernels and hands them
addresses, which costs the host a few microseconds a launch instead of Triton's own way of finding the kernel again.
"""

import threading
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ...allocation import allocator
from .targets import INTERPRETED, Target

WORKSPACE = "workspace"
_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
BUFFER_OFFSETS_WRAP = _VERSION < (3, 8)
"""Loops over whole tiles that Triton pipelines begin with a negative offset in a register, and LLVM adds to it by the
instruction's constant: for a buffer load on AMD GPUs that is a number near 2^32, beyond the buffer, and it loads 0."""
STAGES_SPILL = _VERSION < (3, 7)
"""A stage that waits in registers is too much for the largest tile of gfx950's first product, where K has a tail and
values a limit: four words of a lane go to memory."""

ALIGNMENT = 256
"""Of the pieces of a workspace, in bytes; that of PyTorch's allocations is at least this."""


@dataclass(frozen=True)
class Operand:
    """Memory that a kernel is given."""

    source: str
    """The name of the call's tensor, or ``WORKSPACE``."""
    dtype: torch.dtype
    """What its elements are taken as."""
    rows: tuple[int, int] | None = None
    """First row and number of rows of the tensor; None: all."""
    shape: tuple[int, ...] = ()
    """Of a piece of the workspace."""
    offset: int = 0
    """Of a piece of the workspace, in bytes."""

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def tensor(self, memory: dict[str, torch.Tensor]) -> torch.Tensor:
        base = memory[self.source]
        if self.source == WORKSPACE:
            return base[self.offset : self.offset + self.bytes].view(self.dtype).view(self.shape)
        base = base.view(self.dtype)
        return base if self.rows is None else base[self.rows[0] : sum(self.rows)]


@dataclass(frozen=True)
class Descriptor:
    """A tensor descriptor (TMA) of an operand."""

    operand: Operand
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    swizzle: int = 0
    """For a Gluon kernel, which is told how shared memory is laid out: the width of the swizzle, in bytes."""
    l2_promotion: int | None = None
    """How many bytes a copy that misses the L2 cache brings there (:mod:`.tensor_map`); None: as Triton has it."""

    def of(self, base) -> Any:
        """Triton's descriptor, or Gluon's. ``base``: a tensor, or an :class:`_Address`."""
        whole = base, list(self.shape), list(self.strides), list(self.block)
        if self.swizzle:
            from triton.experimental import gluon

            layout = gluon.language.NVMMASharedLayout(self.swizzle, 8 * base.dtype.itemsize, len(self.shape))
            descriptor = gluon.nvidia.hopper.TensorDescriptor(*whole, layout)
        else:
            descriptor = TensorDescriptor(*whole)
        if self.l2_promotion is not None:
            from .tensor_map import promote

            promote(descriptor, self.l2_promotion)
        return descriptor

    def tensor(self, memory: dict[str, torch.Tensor]) -> Any:
        return self.of(self.operand.tensor(memory))


class _Address:
    """As much of a tensor as a descriptor is made from."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype):
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a Triton kernel."""

    kernel: Any
    """A ``triton.JITFunction``."""
    grid: tuple[int, ...]
    arguments: dict
    """By parameter name: operands and descriptors (or, bound, tensors), numbers and constants."""
    options: dict = field(default_factory=dict)
    """Compiler options: num_warps, num_stages, ..."""
    buffers: bool = True
    """Whether loads may be buffer instructions on AMD GPUs."""
    dependent: bool = False
    """Whether it starts before the launch before it has ended, and waits for that by itself (:mod:`.overlap`)."""
    to_lds: bool | None = None
    """Whether a pipelined loop's loads go straight to LDS on AMD GPUs; if not, a stage waits in registers. None: as
    Triton has it (3.6 and 3.7 not, 3.8 and 3.9 on gfx950)."""

    def bound(self, memory: dict[str, torch.Tensor]) -> "Launch":
        """The same on tensors."""
        arguments = {
            name: value.tensor(memory) if isinstance(value, (Operand, Descriptor)) else value
            for name, value in self.arguments.items()
        }
        return replace(self, arguments=arguments)

    @contextmanager
    def _knobs(self):
        """Triton's settings that it is compiled with."""
        with knobs.amd.scope():
            if not self.buffers:
                knobs.amd.use_buffer_ops = False
            if self.to_lds is not None:
                knobs.amd.use_async_copy = self.to_lds
            yield

    @property
    def _options(self) -> dict:
        return self.options | ({"launch_pdl": True} if self.dependent else {})

    def run(self) -> None:
        """Launch it the way Triton does, once bound."""
        with self._knobs():
            self.kernel[self.grid](**self.arguments, **self._options)

    def compiled(self) -> CompiledKernel:
        """The machine code, compiled if it has not been; of a bound launch."""
        with self._knobs():
            kernel = self.kernel.warmup(grid=self.grid, **self.arguments, **self._options)
            return kernel.result() if hasattr(kernel, "result") else kernel


class _Ready:
    """A launch whose kernel is compiled and loaded, waiting for addresses."""

    def __init__(self, launch: Launch, kernel: CompiledKernel, memory: dict[str, torch.Tensor]):
        self.kernel = kernel
        self.launch = kernel[(*launch.grid, 1, 1)[:3]]
        self.arguments = [launch.arguments[name] for name in launch.kernel.arg_names]
        self.pointers, self.described = [], []
        places = {name: place for place, name in enumerate(memory)}
        for i, argument in enumerate(self.arguments):
            if isinstance(argument, (Operand, Descriptor)):
                operand = argument.operand if isinstance(argument, Descriptor) else argument
                offset = operand.tensor(memory).data_ptr() - memory[operand.source].data_ptr()
                if operand is argument:
                    self.pointers.append((i, places[operand.source], offset))
                else:
                    self.described.append((i, places[operand.source], offset, argument))
        self.descriptors = {}

    def _descriptor(self, i: int, descriptor: Descriptor, address: int) -> TensorDescriptor:
        """Argument i; the last one made for it, if that was for the same address."""
        known = self.descriptors.get(i)
        if known is None or known.base.address != address:
            known = self.descriptors[i] = descriptor.of(_Address(address, descriptor.operand.dtype))
        return known

    def run(self, addresses: list[int], stream: int) -> None:
        """``addresses``: of the tensors of ``memory``, in its order."""
        arguments = self.arguments.copy()
        for i, place, offset in self.pointers:
            arguments[i] = addresses[place] + offset
        for i, place, offset, descriptor in self.described:
            arguments[i] = self._descriptor(i, descriptor, addresses[place] + offset)
        self.launch(*arguments, stream=stream)


class Plan:
    """The launches of a call, in order, and the memory that they need beside the call's tensors."""

    def __init__(self, launches: Sequence[Launch], workspace: int = 0):
        self.launches = launches
        self.workspace = workspace
        """Bytes."""
        self._ready = None

    def _with_workspace(self, memory: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        if not self.workspace:
            return memory
        return memory | {WORKSPACE: allocator(device)((self.workspace,), (1,), torch.uint8)}

    def bind(self, memory: dict[str, torch.Tensor], device: torch.device) -> list[Launch]:
        """The launches on the tensors ``memory`` and a new workspace, all on ``device``, the current one."""
        memory = self._with_workspace(memory, device)
        return [launch.bound(memory) for launch in self.launches]

    def _prepare(self, op: str, memory: dict[str, torch.Tensor], target: Target) -> list[_Ready]:
        ready = []
        for launch in self.launches:
            try:
                kernel = launch.bound(memory).compiled()
                kernel.run  # which loads it
            except Exception as error:
                raise NotImplementedError(
                    f"{op}: backend 'triton' cannot compile {launch.kernel.__name__} for {target.arch} with "
                    f"{launch.options}: {type(error).__name__}: {error}"
                ) from error
            ready.append(_Ready(launch, kernel, memory))
        return ready

    def run(self, op: str, memory: dict[str, torch.Tensor], device: torch.device, target: Target) -> None:
        """:meth:`run_here`, whichever device is the current one."""
        if device.index is None or device.index == torch.cuda.current_device():
            self.run_here(op, memory, device, target)
        else:
            with torch.cuda.device(device):
                self.run_here(op, memory, device, target)

    def run_here(self, op: str, memory: dict[str, torch.Tensor], device: torch.device, target: Target) -> None:
        """Launch all on the tensors ``memory`` of the current device, or, if one cannot be compiled or loaded, none.

        ``memory`` has the same names in the same order each time. Raises NotImplementedError, which names ``op``, the
        kernel and what the compiler said.
        """
        if target is INTERPRETED:
            for launch in self.bind(memory, device):
                launch.run()
            return
        memory = self._with_workspace(memory, device)
        if self._ready is None:
            active: Any = driver.active  # a GPUDriver, which its base does not say
            self._current_stream = active.get_current_stream
            self._ready = self._prepare(op, memory, target)  # last: another thread may look for it
        addresses = [x.data_ptr() for x in memory.values()]
        stream = self._current_stream(device.index)
        for launch in self._ready:
            launch.run(addresses, stream)


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


@contextmanager
def offline(target: Target):
    """Triton compiles for ``target``, with no GPU. Meanwhile nothing else of this process may launch a kernel, since
    Triton knows one driver at a time."""
    if target.capability:
        gpu = GPUTarget("cuda", target.capability, 32)
    else:
        gpu = GPUTarget("hip", target.arch, 64)
    with _offline:
        before: Any = driver._active  # None if nobody needed a driver yet; reset_active() would look for a GPU
        stand_in: Any = _OfflineDriver(gpu)
        driver.set_active(stand_in)
        try:
            yield
        finally:
            driver.set_active(before)


def compile_offline(launches: Iterable[Launch], target: Target) -> list[CompiledKernel]:
    """Each of ``launches``, bound, as machine code for ``target``; needs no GPU, and tensors may be on ``meta``."""
    with offline(target):
        return [launch.compiled() for launch in launches]
