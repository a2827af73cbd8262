"""The state of a launch's waves, and the loop that executes them.

All waves that are at the same instruction execute it at once: registers are arrays over (register, wave, lane), and an
instruction is a function on rows of them. Of the waves that can run, those with the smallest program counter run first,
one basic block at a time, so that waves that took different sides of a branch meet again where the sides join.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .assembly import AGPR, EXEC, Code, Instruction
from .decode import decode
from .memory import ACCESSIBLE, WRITTEN, DeviceMemory, Memory
from .operands import lanes_of

LANES = 64
VGPRS = 512
SGPRS = 128
WAVES_AT_ONCE = 128
"""Workgroups are executed in batches of about that many waves: the state of more does not fit into caches."""


class SimulationError(Exception):
    """Something that a kernel must not do; names the instruction and where it can, wave, lane and address."""


@dataclass
class Access:
    """What one instruction does to one memory, by lane."""

    space: str
    """``global``, ``lds`` or ``scratch``."""
    kind: str
    """``load``, ``store``, ``atomic``, or ``lost``: a store that another lane of the same instruction overwrote."""
    index: np.ndarray
    """First bytes [k], in the memory's own numbering."""
    nbytes: int
    waves: np.ndarray
    """The wave of each, [k]."""
    changed: np.ndarray | None = None
    """Of a store: which bytes [k, nbytes] are not what was there before."""


class Observer:
    """Sees what waves do. A checker overrides what it needs and raises SimulationError."""

    tracks_undefined = False

    def start(self, machine: "Machine") -> None: ...

    def before(self, machine: "Machine", instruction: Instruction) -> None: ...

    def access(self, machine: "Machine", instruction: Instruction, access: Access) -> None: ...

    def after(self, machine: "Machine", instruction: Instruction) -> None: ...

    def barrier(self, machine: "Machine", waves: np.ndarray) -> None: ...


def _overriding(observers: list[Observer], method: str) -> list[Callable]:
    return [getattr(one, method) for one in observers if getattr(type(one), method) is not getattr(Observer, method)]


class Program:
    """Code, decoded: what each instruction does, and where basic blocks end."""

    def __init__(self, code: Code):
        self.code = code
        for name, value in (("denorm_mode_32", 3), ("denorm_mode_16_64", 3), ("round_mode_32", 0)):
            if code.descriptor.get(f"float_{name}", value) != value:
                raise SimulationError(f"{code.name}: floating-point mode {name} other than {value} is not modelled")
        self.instructions = code.instructions
        for instruction in self.instructions:
            decode(instruction)
        self._check_registers()
        names = {instruction.name for instruction in self.instructions}
        if "s_setreg_imm32_b32" in names and any(name.endswith("_f16_f32") for name in names):
            raise SimulationError(f"{code.name}: conversions to float16 that saturate are not modelled")
        leaders = {i.target for i in self.instructions if i.target is not None}
        leaders |= {i.index + 1 for i in self.instructions if i.unit == "flow"}
        ends = sorted(leaders | {len(self.instructions)})
        self.block_end = {}
        end = 0
        for i in range(len(self.instructions)):
            while ends[end] <= i:
                end += 1
            self.block_end[i] = ends[end]

    def _check_registers(self) -> None:
        """A wave is handed out as many VGPRs and AGPRs as the descriptor says: others are not its own."""
        code = self.code
        agprs = code.descriptor.get("next_free_vgpr", VGPRS) - code.registers
        for one in self.instructions:
            for number in (*one.reads, *one.writes):
                if code.registers <= number < AGPR or AGPR + agprs <= number < VGPRS:
                    name = f"v{number}" if number < AGPR else f"a{number - AGPR}"
                    raise SimulationError(
                        f"{code.name}, {one}: {name} is beyond the {code.registers} VGPRs and {max(0, agprs)} AGPRs "
                        "that the kernel asks for"
                    )


class Machine:
    """Executes one launch."""

    def __init__(
        self, program: Program, memory: DeviceMemory, grid: tuple[int, ...], warps: int, lds_bytes: int,
        kernarg: int, observers: list[Observer] = (), preload: bool = False,
    ):  # fmt: skip
        """kernarg: address of the argument segment. preload: start as firmware does that puts arguments in SGPRs."""
        self.program, self.memory = program, memory
        self.descriptor = program.code.descriptor
        self.grid = (*grid, 1, 1)[:3]
        self.warps, self.lds_bytes, self.kernarg = warps, lds_bytes, kernarg
        self.scratch_bytes = self.descriptor["private_segment_fixed_size"]
        self.observers = list(observers)
        self.undefined = next((one for one in self.observers if one.tracks_undefined), None)
        self.preload = preload and program.code.preload_entry is not None
        self.executed = 0
        """Wave-instructions."""
        self._before = _overriding(self.observers, "before")
        self._after = _overriding(self.observers, "after")
        self._access = _overriding(self.observers, "access")
        self._barrier = _overriding(self.observers, "barrier")

    def run(self) -> None:
        groups = int(np.prod(self.grid))
        step = max(1, WAVES_AT_ONCE // self.warps)
        with np.errstate(all="ignore"):
            for first in range(0, groups, step):
                self._start(np.arange(first, min(first + step, groups)))
                self._run()

    # --- the state of a batch

    def _start(self, workgroups: np.ndarray) -> None:
        self.workgroups = workgroups
        self.wave_count = waves = workgroups.size * self.warps
        self.workgroup_of = np.repeat(np.arange(workgroups.size), self.warps)
        self.v = np.full((VGPRS, waves, LANES), 0xDEADBEEF, np.uint32)
        self.vi, self.vf = self.v.view(np.int32), self.v.view(np.float32)
        self.s = np.full((waves, SGPRS), 0xDEADBEEF, np.uint32)
        self.si, self.sf, self.s64 = self.s.view(np.int32), self.s.view(np.float32), self.s.view(np.uint64)
        self.scc = np.zeros(waves, bool)
        self.saturates = np.zeros(waves, bool)
        """FP16_OVFL of the MODE register: what becomes 8 bits wide is at most the largest number."""
        self.pc = np.zeros(waves, np.int64)
        self.done, self.waiting = np.zeros(waves, bool), np.zeros(waves, bool)
        stride = -(-self.lds_bytes // 16) * 16 + 16
        self.lds = Memory(stride * workgroups.size)
        self.lds_base = self.workgroup_of * stride
        for start in range(0, self.lds.size, stride):
            self.lds.state[start : start + self.lds_bytes] = ACCESSIBLE
        self.scratch = Memory(waves * LANES * self.scratch_bytes)
        self.scratch.state[: self.scratch.size] = ACCESSIBLE
        self.scratch_base = (np.arange(waves)[:, None] * LANES + np.arange(LANES)) * self.scratch_bytes
        self.spaces = {"global": self.memory, "lds": self.lds, "scratch": self.scratch}

        self.initial_v, self.initial_s = set(), set()
        self.s64[:, EXEC // 2] = np.uint64(2**64 - 1)
        self._launch_registers()
        self.group(np.arange(waves))
        for observer in self.observers:
            observer.start(self)

    def _launch_registers(self) -> None:
        """What hardware puts into registers before the first instruction.

        Initial kernel execution state, https://llvm.org/docs/AMDGPUUsage.html: user SGPRs in a fixed order, then
        preloaded arguments, then workgroup ids; v0 holds the work-item ids, 10 bits each.
        """
        kernel, next_ = self.descriptor, 0

        def put(values) -> None:
            nonlocal next_
            self.s[:, next_] = values
            self.initial_s.add(next_)
            next_ += 1

        for name, size in (("private_segment_buffer", 4), ("dispatch_ptr", 2), ("queue_ptr", 2)):
            next_ += size * kernel.get(f"user_sgpr_{name}", 0)  # not modelled: they hold nothing defined
        if kernel["user_sgpr_kernarg_segment_ptr"]:
            put(self.kernarg & 0xFFFFFFFF)
            put(self.kernarg >> 32)
        next_ += 2 * kernel.get("user_sgpr_dispatch_id", 0) + kernel.get("user_sgpr_private_segment_size", 0)
        if self.preload:
            length, offset = kernel["user_sgpr_kernarg_preload_length"], kernel["user_sgpr_kernarg_preload_offset"]
            index = self.kernarg - self.memory.BASE + 4 * offset
            for word in self.memory.data[index : index + 4 * length].view(np.uint32):
                put(word)
            self.pc[:] = self.program.code.preload_entry
        next_ = kernel["user_sgpr_count"]
        x, y, _ = self.grid
        ids = self.workgroups[self.workgroup_of]
        for name, values in zip("xyz", (ids % x, ids // x % y, ids // (x * y))):
            if kernel[f"system_sgpr_workgroup_id_{name}"]:
                put(values)
        first = (np.arange(self.wave_count) % self.warps * LANES)[:, None]
        self.v[0] = first + np.arange(LANES)
        self.initial_v.add(0)

    # --- the waves that execute

    def group(self, waves: np.ndarray) -> None:
        """Make ``waves`` (rising) the ones that execute."""
        self.wave_ids, self.n = waves, waves.size
        contiguous = waves[-1] - waves[0] + 1 == waves.size
        self.waves = slice(int(waves[0]), int(waves[-1]) + 1) if contiguous else waves
        self.exec_changed()

    def exec_changed(self) -> None:
        exec_ = self.s64[self.waves, EXEC // 2]
        self.mask = None if (exec_ == np.uint64(2**64 - 1)).all() else lanes_of(exec_)
        """Active lanes [n, 64]; None: all."""
        self._active = None

    def active(self) -> np.ndarray:
        return np.ones((self.n, LANES), bool) if self.mask is None else self.mask

    def write_v(self, register: int, values: np.ndarray, mask: np.ndarray | None = None) -> None:
        """32-bit ``values`` (of any shape that broadcasts) to the active lanes, and of those to ``mask``."""
        if mask is None:
            mask = self.mask
        elif self.mask is not None:
            mask = mask & self.mask
        values = values.view(np.uint32)
        if mask is None:
            self.v[register, self.waves] = values
        elif isinstance(self.waves, slice):
            np.copyto(self.v[register, self.waves], values, where=mask)
        else:
            self.v[register, self.waves] = np.where(mask, values, self.v[register, self.waves])

    # --- memory

    @property
    def active_lanes(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows, lanes) of the active lanes."""
        if self._active is None:
            self._active = self.active().nonzero()
        return self._active

    def touch(
        self, instruction: Instruction, space: str, kind: str, index: np.ndarray, nbytes: int, rows: np.ndarray,
        lanes: np.ndarray | None,
    ) -> np.ndarray:  # fmt: skip
        """Check an access to ``nbytes`` at each of index [k] by (rows, lanes); its bytes' states [k, nbytes]."""
        memory = self.spaces[space]
        outside = (index < 0) | (index > memory.size - nbytes)
        if outside.any():
            self._out_of_bounds(instruction, space, kind, index, nbytes, rows, lanes, outside)
        states = memory.states(index, nbytes)
        if not (states & ACCESSIBLE).all():
            wrong = ~(states & ACCESSIBLE).all(1)
            self._out_of_bounds(instruction, space, kind, index, nbytes, rows, lanes, wrong)
        return states

    def observe(self, instruction, space, kind, index, nbytes, rows, changed=None) -> None:
        if self._access:
            access = Access(space, kind, index, nbytes, self.wave_ids[rows], changed)
            for hook in self._access:
                hook(self, instruction, access)

    def load(
        self, instruction, space, index, nbytes, rows, lanes=None, kind="load"
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Bytes [k, nbytes], and which of them nobody wrote (None: none)."""
        states = self.touch(instruction, space, kind, index, nbytes, rows, lanes)
        self.observe(instruction, space, kind, index, nbytes, rows)
        unwritten = (states & WRITTEN) == 0
        return self.spaces[space].read(index, nbytes), unwritten if unwritten.any() else None

    def store(self, instruction, space, index, values, rows, lanes, undefined=None, kind="store") -> None:
        """values [k, nbytes]; undefined: which of these bytes have no defined value (None: all have)."""
        memory, nbytes = self.spaces[space], values.shape[1]
        states = self.touch(instruction, space, kind, index, nbytes, rows, lanes)
        changed = None
        if space == "lds" and self._access:
            changed = (memory.read(index, nbytes) != values) | ((states & WRITTEN) == 0)
        self.observe(instruction, space, kind, index, nbytes, rows, changed)
        memory.write(index, values)
        if changed is not None:
            lost = memory.read(index, nbytes) != values
            if lost.any():
                self.observe(instruction, space, "lost", index, nbytes, rows, lost)
        if undefined is not None:
            memory.mark(index, ~undefined)
        elif not (states & WRITTEN).all():
            memory.mark(index, np.ones_like(states, bool))

    def outside_lds(self, within, nbytes, rows, lanes, wrong) -> None:
        """An access to LDS at addresses [k] of which some are outside."""
        index = within + self.lds_base[self.wave_ids[rows]]
        self._out_of_bounds(self.current, "lds", "access", index, nbytes, rows, lanes, wrong)

    def where(self, row: int, lane: int | None = None) -> str:
        wave = int(self.wave_ids[row])
        workgroup = int(self.workgroups[self.workgroup_of[wave]])
        text = f"workgroup {workgroup}, wave {wave % self.warps}"
        return text if lane is None else f"{text}, lane {lane}"

    def _out_of_bounds(self, instruction, space, kind, index, nbytes, rows, lanes, wrong) -> None:
        first = int(np.flatnonzero(wrong)[0])
        row, lane = int(rows[first]), None if lanes is None else int(lanes[first])
        address = int(index[first])
        if space == "global":
            place = self.memory.describe(self.memory.BASE + address)
        elif space == "lds":
            place = f"LDS byte {address - int(self.lds_base[self.wave_ids[row]])} of {self.lds_bytes}"
        else:
            place = f"scratch of {self.scratch_bytes} bytes a lane"
        raise SimulationError(
            f"{self.program.code.name}, {instruction}: {kind} of {nbytes} bytes outside every buffer that the kernel "
            f"was given: {place}; {self.where(row, lane)}, {int(wrong.sum())} in all"
        )

    # --- the loop

    def _run(self) -> None:
        instructions, block_end = self.program.instructions, self.program.block_end
        before, after = self._before, self._after
        while True:
            running = ~(self.done | self.waiting)
            if not running.any():
                if self.waiting.any():
                    wave = int(np.flatnonzero(self.waiting)[0])
                    raise SimulationError(
                        f"{self.program.code.name}: divergent barrier: a wave waits at "
                        f"{instructions[self.pc[wave] - 1]} and the others of its workgroup have ended"
                    )
                return
            pc = int(self.pc[running].min())
            waves = np.flatnonzero(running & (self.pc == pc))
            if waves.size != self.n or not np.array_equal(waves, self.wave_ids):
                self.group(waves)
            end = block_end[pc]
            self.pc[self.waves] = end
            self.executed += self.n * (end - pc)
            for instruction in instructions[pc:end]:
                self.current = instruction
                try:
                    for hook in before:
                        hook(self, instruction)
                    instruction.run(self)
                    for hook in after:
                        hook(self, instruction)
                except SimulationError:
                    raise
                except Exception as error:
                    raise SimulationError(
                        f"{self.program.code.name}, {instruction}: {type(error).__name__}: {error}"
                    ) from error

    def at_barrier(self, instruction: Instruction) -> None:
        """The executing waves arrive; a workgroup goes on when all of its waves have."""
        self.waiting[self.waves] = True
        shape = self.workgroups.size, self.warps
        waiting, done = self.waiting.reshape(shape), self.done.reshape(shape)
        pc = self.pc.reshape(shape)
        if (waiting & (pc != pc.max(1, where=waiting, initial=0)[:, None])).any():
            raise SimulationError(
                f"{self.program.code.name}, {instruction}: divergent barrier: waves wait at different ones"
            )
        if (done.any(1) & waiting.any(1)).any():
            raise SimulationError(
                f"{self.program.code.name}, {instruction}: divergent barrier: waves of the workgroup have ended"
            )
        complete = waiting.all(1)
        waiting[complete] = False
        released = np.flatnonzero(np.repeat(complete, self.warps))
        if released.size:
            for hook in self._barrier:
                hook(self, released)
