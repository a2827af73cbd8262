"""Runs compiled Triton kernels on tensors, as the host would: arguments, grid, one launch after the other."""

import struct
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from . import code_object
from .assembly import parse
from .checks import all_checks
from .hazards import check_wait_states
from .machine import Machine, Observer, Program, SimulationError
from .memory import WRITTEN, DeviceMemory

_FORMATS = {"i1": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q",
            "fp32": "f", "f32": "f", "fp64": "d", "f64": "d"}  # fmt: skip


@dataclass
class Kernel:
    """What is executed, and what its launcher has to know.

    Of what Triton compiles that is the ELF code object, as a GPU gets it, or, where nothing is installed that decodes
    one, with a warning, the assembly text that it is made from.
    """

    program: Program
    parameters: list[tuple[str, str]]
    """Name and Triton type of each run-time argument, in order."""
    warps: int
    lds_bytes: int

    @classmethod
    def of(cls, compiled, text: str | None = None) -> "Kernel":
        """Of Triton's CompiledKernel; ``text`` is assembly to execute instead."""
        parameters = [(name, type_) for name, type_ in compiled.src.signature.items() if type_ != "constexpr"]
        if text is None and (why := code_object.missing()):
            text = compiled.asm["amdgcn"]
            warnings.warn(f"assembly text is executed and not the code object: {why}", stacklevel=2)
        program = Program(parse(text) if text else code_object.read(compiled.asm["hsaco"]))
        check_wait_states(program)
        return cls(program, parameters, compiled.metadata.num_warps, compiled.metadata.shared)

    @classmethod
    def of_text(cls, text: str, parameters: list[tuple[str, str]]) -> "Kernel":
        """Of any compiler's assembly whose metadata gives the size of a workgroup and whose LDS is all static."""
        program = Program(parse(text))
        check_wait_states(program)
        code = program.code
        return cls(program, parameters, code.threads // 64, code.descriptor["group_segment_fixed_size"])


@dataclass
class Statistics:
    """How much was executed, and how fast."""

    wave_instructions: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.wave_instructions / max(self.seconds, 1e-9)
        return f"{self.wave_instructions:,} wave-instructions in {self.seconds:.2f} s, {rate:,.0f} a second"


total = Statistics()
"""Of this process."""


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The whole storage, shared with the tensor."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last one."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.itemsize


def _hidden(kernel: Kernel, grid: tuple[int, int, int]) -> dict[str, int]:
    """Arguments that the runtime adds, by their kind (LLVM, "Code Object V5 Metadata"), as far as they are known."""
    values = {"hidden_dynamic_lds_size": kernel.lds_bytes, "hidden_grid_dims": 3}
    for axis, count, size in zip("xyz", grid, (64 * kernel.warps, 1, 1)):
        values |= {f"hidden_block_count_{axis}": count, f"hidden_group_size_{axis}": size}
        values |= {f"hidden_remainder_{axis}": 0, f"hidden_global_offset_{axis}": 0}
    return values


class Device:
    """Simulated device memory that holds the storages of host tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor], uninitialised: Iterable[torch.Tensor] = ()):
        """uninitialised: tensors whose content is not defined yet; a kernel that uses a byte of it is in error."""
        undefined = {x.untyped_storage().data_ptr() for x in uninitialised}
        self._names: dict[int, str] = {}
        allocations = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self._names:
                self._names[storage.data_ptr()] = name
                allocations[name] = _bytes_of(tensor), storage.data_ptr() not in undefined
        self.memory = DeviceMemory(allocations)

    def address(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return 0
        return self.memory.address(self._names[storage.data_ptr()], tensor.data_ptr() - storage.data_ptr())

    def undefine(self, tensor: torch.Tensor, which: np.ndarray) -> None:
        """The bytes ``which`` (bool) of a contiguous tensor hold nothing defined."""
        start = self.address(tensor) - self.memory.BASE
        self.memory.state[start : start + tensor.nbytes][which] &= ~np.uint8(WRITTEN)

    def launch(
        self, kernel: Kernel, arguments: dict, grid: tuple[int, ...], observers: list[Observer] | None = None,
        preload: bool = True,
    ) -> Statistics:  # fmt: skip
        """arguments: by name, as for Triton; those that the kernel was compiled for are left out.

        observers: all checks by default. preload: start where hardware starts that puts arguments into SGPRs.
        """
        segment, written, granted = self._segment(kernel, arguments, (*grid, 1, 1)[:3])
        address, size = self.memory.set_arguments(segment, written), len(segment)
        self.memory.grant([*granted, (address, size)])
        machine = Machine(
            kernel.program, self.memory, grid, kernel.warps, kernel.lds_bytes, address,
            all_checks() if observers is None else observers, preload,
        )  # fmt: skip
        start = time.perf_counter()
        machine.run()
        done = Statistics(machine.executed, time.perf_counter() - start)
        total.wave_instructions += done.wave_instructions
        total.seconds += done.seconds
        return done

    def _segment(
        self, kernel: Kernel, arguments: dict, grid: tuple[int, int, int]
    ) -> tuple[bytes, np.ndarray, list[tuple[int, int]]]:
        """The argument segment, which of its bytes are defined, and what memory (address, bytes) it points to."""
        code = kernel.program.code
        size = -(-code.descriptor["kernarg_size"] // 64) * 64  # scalar loads may be wider than what they are for
        segment, written, granted = bytearray(size), np.zeros(size, bool), []
        hidden = _hidden(kernel, grid)
        parameters = iter(kernel.parameters)
        for place in code.arguments:
            kind = place["value_kind"]
            name, type_ = (None, None) if kind.startswith("hidden") else next(parameters, (None, None))
            if kind.startswith("hidden"):
                if kind not in hidden:
                    continue
                content = hidden[kind].to_bytes(place["size"], "little")
            elif name is None:  # scratch memory that Triton passes to every kernel, and few use
                content = bytes(place["size"])
            elif type_.startswith("*"):
                address = self.address(arguments[name])
                granted.append((address, _extent(arguments[name])))
                content = struct.pack("<Q", address)
            else:
                content = struct.pack("<" + _FORMATS[type_], arguments[name])
            if place["size"] != len(content):
                raise SimulationError(f"{code.name}: argument {name} of type {type_} has {place['size']} bytes")
            segment[place["offset"] : place["offset"] + len(content)] = content
            written[place["offset"] : place["offset"] + len(content)] = True
        return bytes(segment), written, [(address, size) for address, size in granted if size]


def simulate(
    launches: list, target, inputs: Iterable[torch.Tensor], observers=all_checks, texts: dict[int, str] | None = None
) -> list[Statistics]:
    """Compile a list of the package's ``Launch`` for ``target`` and execute it, in order, on the launches' tensors.

    inputs: tensors that hold something before the first launch; all others hold nothing defined. Afterwards the tensors
    hold what the kernels wrote. texts: assembly to execute instead of what launch i compiles to. Returns what each
    launch took.
    """
    from torch_mxfp8moe.backends.triton.launch import compile_offline

    kernels = [
        Kernel.of(compiled, (texts or {}).get(i)) for i, compiled in enumerate(compile_offline(launches, target))
    ]
    tensors = {
        f"{name} of launch {i}, {launch.kernel.__name__}": value
        for i, launch in enumerate(launches)
        for name, value in launch.arguments.items()
        if isinstance(value, torch.Tensor)
    }
    known = {x.untyped_storage().data_ptr() for x in inputs}
    uninitialised = [x for x in tensors.values() if x.untyped_storage().data_ptr() not in known]
    device = Device(tensors, uninitialised)
    statistics = [
        device.launch(kernel, launch.arguments, launch.grid, observers()) for launch, kernel in zip(launches, kernels)
    ]
    device.memory.copy_back()
    return statistics
