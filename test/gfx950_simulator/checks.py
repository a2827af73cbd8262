"""What a program must not do although an emulator that completes everything at once gives the right result.

Each check is an observer of the machine, independent of the others. :mod:`.hazards` holds one more, which needs no run.
"""

import numpy as np

from .assembly import EXEC, VCC, Instruction
from .machine import Access, Machine, Observer, SimulationError
from .matrix import output_map
from .operands import SGPR, lanes_of, masks_of, register_name
from .vector import swap_rows

ALL_BITS = np.uint32(0xFFFFFFFF)


class Undefined(Observer):
    """Values that nobody wrote: registers before their first write, memory bytes before theirs.

    They may be copied, loaded, computed with and kept in LDS and scratch, as long as nothing comes of it: an undefined
    address, branch, EXEC, or value stored to global memory is an error. Followed by register and lane (a result is
    undefined where a source is), and by bit in SGPRs, which hold a lane's condition in each.
    """

    tracks_undefined = True
    _PER_LANE = {"v_cndmask_b32", "v_addc_co_u32", "v_subb_co_u32", "v_subbrev_co_u32", "v_div_fmas_f32"}
    """Instructions whose last operand, or VCC, is a condition for each lane."""
    _LOW_FROM_LOW = {"v_mad_u64_u32", "v_mad_i64_i32", "v_lshl_add_u64", "v_lshlrev_b64", "v_mov_b64"}
    """Instructions of 64 bits whose low result does not depend on the high words of their sources."""

    def start(self, machine: Machine) -> None:
        waves = machine.wave_count
        self.v = np.ones((machine.v.shape[0], waves, 64), bool)
        self.s = np.full((waves, 128), ALL_BITS)
        self.s64 = self.s.view(np.uint64)
        self.scc = np.ones(waves, bool)
        self.clear = [False] * (SGPR + 128)
        """Whether a register has no undefined value in any wave."""
        for register in machine.initial_v:
            self.v[register] = False
            self.clear[register] = True
        for register in (*machine.initial_s, EXEC, EXEC + 1):
            self.s[:, register] = 0
            self.clear[SGPR + register] = True

    # --- for memory instructions

    def lanes(self, m: Machine, register: int) -> np.ndarray | None:
        """Undefined lanes [n, 64] of a VGPR; None: none."""
        return None if self.clear[register] else self.v[register, m.waves]

    def put(self, m: Machine, register: int, undefined: np.ndarray | None, written: np.ndarray | None = None) -> None:
        """Of what is written to a VGPR in the active lanes, and of those in ``written``, these lanes are undefined."""
        if undefined is None and self.clear[register]:
            return
        new = np.zeros((m.n, 64), bool) if undefined is None else np.broadcast_to(undefined, (m.n, 64))
        for mask in (m.mask, written):
            if mask is not None:
                new = np.where(mask, new, self.v[register, m.waves])
        self.v[register, m.waves] = new
        self.clear[register] = not self.v[register].any()

    def put_scalar(self, m: Machine, register: int, undefined: np.ndarray | int) -> None:
        """register: without SGPR added; undefined: bits [n]."""
        if register in (EXEC, EXEC + 1) and np.any(undefined):
            raise SimulationError(f"{m.program.code.name}, {m.current}: EXEC becomes undefined")
        self.s[m.waves, register] = undefined
        self.clear[SGPR + register] = not self.s[:, register].any()

    def loaded(self, m, register, undefined, rows, lanes, keep) -> None:
        """undefined [k] or None: of what a load put into (rows, lanes); keep: what was there remains in part."""
        if undefined is None and (self.clear[register] or keep):
            return
        new = np.zeros((m.n, 64), bool)
        if undefined is not None:
            new[rows, lanes] = undefined
        if keep:
            new |= self.v[register, m.waves]
        self.put(m, register, new)

    def loaded_scalar(self, m, register, count, unwritten) -> None:
        bits = np.zeros((m.n, count), np.uint32)
        if unwritten is not None:
            bits = np.where(unwritten, np.uint8(255), np.uint8(0)).view(np.uint32)
        for i in range(count):
            self.put_scalar(m, register + i, bits[:, i])

    def require(self, m, instruction, register, rows, lanes, what) -> None:
        if not self.clear[register]:
            self.report(m, instruction, rows, lanes, self.v[register, m.waves][rows, lanes], what)

    def report(self, m, instruction, rows, lanes, undefined, what) -> None:
        """Raise if any of ``undefined`` [k] is set."""
        if undefined.any():
            first = int(np.flatnonzero(undefined)[0])
            raise SimulationError(
                f"{m.program.code.name}, {instruction}: {what} is undefined: it comes from a register or memory that "
                f"nobody wrote; {m.where(int(rows[first]), int(lanes[first]))}, {int(undefined.sum())} lanes in all"
            )

    def require_scalar(self, m, instruction, registers, what) -> None:
        for register in registers:
            if not self.clear[SGPR + register] and self.s[m.waves, register].any():
                raise SimulationError(f"{m.program.code.name}, {instruction}: {what} is undefined: s{register}")

    # --- for all others

    def before(self, m: Machine, instruction: Instruction) -> None:
        clear, unit = self.clear, instruction.unit
        if unit in ("vmem", "ds", "smem", "none"):
            return
        if unit == "flow":
            if instruction.name.startswith("s_cbranch"):
                self._branch(m, instruction)
            return
        sources_clear = True
        for register in instruction.matters:
            if not clear[register]:
                sources_clear = False
                break
        if unit == "salu":
            self._scalar(m, instruction, sources_clear)
            return
        if instruction.name in ("v_readlane_b32", "v_readfirstlane_b32", "v_writelane_b32"):
            return  # which lane is known when they are executed: see between_lanes
        if sources_clear:
            for register in instruction.writes:
                if not clear[register]:
                    if register >= SGPR:
                        self.put_scalar(m, register - SGPR, 0)
                    elif unit == "mfma":
                        self.v[register, m.waves] = False
                        clear[register] = not self.v[register].any()
                    else:
                        self.put(m, register, None, self._written(m, instruction))
        elif unit == "mfma":
            self._matrix(m, instruction)
        elif instruction.writes_sources:
            a, b = (operand.index for operand in instruction.operands)
            new = self.v[b, m.waves], self.v[a, m.waves]
            if "swap_b32" in instruction.name and instruction.name != "v_swap_b32":
                new = swap_rows(*new[::-1], int(instruction.name[10:12]))
            for register, undefined in zip((a, b), [x.copy() for x in new]):
                self.put(m, register, undefined)
        else:
            self._vector(m, instruction)

    def _written(self, m: Machine, instruction: Instruction) -> np.ndarray | None:
        return instruction.written(m) if instruction.written else None

    def _vector(self, m: Machine, instruction: Instruction) -> None:
        undefined, high_only = np.zeros((m.n, 64), bool), np.zeros((m.n, 64), bool)
        condition, name = (), instruction.name
        wide = [one for one in instruction.operands[1:] if one.kind == "v" and one.count == 2]
        high_words = {one.index + 1 for one in wide} if name in self._LOW_FROM_LOW else ()
        if name in self._PER_LANE:
            condition = (VCC, VCC + 1) if name == "v_div_fmas_f32" else tuple(instruction.operands[-1].registers)
            undefined |= lanes_of(self.s64[m.waves, condition[0] // 2])
        if name == "v_cndmask_b32" and instruction.encoding in ("e32", "e64"):
            taken = lanes_of(m.s64[m.waves, condition[0] // 2])
            for operand, lanes in zip(instruction.operands[1:3], (~taken, taken)):
                if operand.kind == "v":
                    undefined |= self.v[operand.index, m.waves] & lanes
                elif operand.kind == "s":
                    undefined |= (self.s[m.waves, operand.index, None] != 0) & lanes
        else:
            for register in instruction.matters:
                if self.clear[register] or register - SGPR in condition:
                    continue
                if register >= SGPR:
                    undefined |= self.s[m.waves, register - SGPR, None] != 0
                    continue
                lanes = self.v[register, m.waves]
                if instruction.lane_map and register == instruction.operands[1].index:
                    source, exists, bound = instruction.lane_map
                    moved = lanes[:, source] & exists
                    if m.mask is not None:
                        moved = moved & m.mask[:, source]
                    lanes = moved if register not in map(self._index, instruction.operands[2:]) else moved | lanes
                if register in high_words:
                    high_only |= lanes
                else:
                    undefined |= lanes
        written = self._written(m, instruction)
        low = undefined
        undefined = low | high_only
        for register in instruction.writes:
            if register < SGPR:
                self.put(m, register, low if register == instruction.operands[0].index else undefined, written)
        pairs = sorted(register - SGPR for register in instruction.writes if register >= SGPR)
        if pairs:
            bits = masks_of(undefined & m.active()).view(np.uint32).reshape(-1, 2)
            for i, register in enumerate(pairs[:2]):
                self.put_scalar(m, register, bits[:, i])

    @staticmethod
    def _index(operand) -> int:
        return operand.index if operand.kind == "v" else -1

    def _matrix(self, m: Machine, instruction: Instruction) -> None:
        dest, a, b, c, *scales = instruction.operands
        sides = []
        for i, operand in enumerate((a, b)):
            used = [*operand.registers, *(scales[i].registers if scales else ())]
            lanes = self.v[used][:, m.waves].any(0)
            sides.append(instruction.matrix_rows(lanes))  # [n, dim]
        row, column = output_map(instruction.dim)
        undefined = sides[0][:, row] | sides[1][:, column]
        if c.kind == "v":
            undefined |= self.v[c.index : c.index + c.count, m.waves].swapaxes(0, 1)
        for i, register in enumerate(dest.registers):
            self.v[register, m.waves] = undefined[:, i]
            self.clear[register] = not self.v[register].any()

    def between_lanes(self, m: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
        """Of v_readlane, v_readfirstlane and v_writelane, with the lane of each wave."""
        dest, source = instruction.operands[:2]
        if instruction.name == "v_writelane_b32":
            undefined = self.s[m.waves, source.index] != 0 if source.kind == "s" else False
            self.v[dest.index, m.wave_ids, lanes] = undefined
            self.clear[dest.index] = not self.v[dest.index].any()
        else:
            undefined = False if self.clear[source.index] else self.v[source.index, m.wave_ids, lanes]
            self.put_scalar(m, dest.index, np.where(undefined, ALL_BITS, np.uint32(0)))

    def _scalar(self, m: Machine, instruction: Instruction, sources_clear: bool) -> None:
        name = instruction.name
        reads_scc = name.startswith(("s_cselect", "s_addc", "s_subb_", "s_cmov"))
        if sources_clear and not (reads_scc and self.scc[m.waves].any()):
            for register in instruction.writes:
                if not self.clear[register]:
                    self.put_scalar(m, register - SGPR, 0)
            if instruction.writes_scc:
                self.scc[m.waves] = False
            return
        operands = instruction.operands[1:]
        bitwise = {"s_and_b64": 0, "s_and_b32": 0, "s_or_b64": 1, "s_or_b32": 1, "s_andn2_b64": 2, "s_andn2_b32": 2,
                   "s_and_saveexec_b64": 0, "s_or_saveexec_b64": 1}.get(name)  # fmt: skip
        if bitwise is not None or name in ("s_mov_b64", "s_mov_b32", "s_xor_b64", "s_not_b64"):
            undefined_scc = np.zeros(m.n, bool)
            for half in range(len(instruction.operands[0].registers)):
                parts = [self._half(m, operand, half) for operand in operands]
                if "saveexec" in name:
                    parts.append((m.s[m.waves, EXEC + half], np.zeros(m.n, np.uint32)))
                undefined = parts[0][1]
                if len(parts) == 2:
                    (a, ua), (b, ub) = parts
                    a, b = (a, b) if bitwise == 0 else (~a, ~b) if bitwise == 1 else (a, ~b)
                    if bitwise is None:
                        undefined = ua | ub
                    else:
                        undefined = (ua & (b | ub)) | (ub & (a | ua))
                if "saveexec" in name:
                    if undefined.any():
                        raise SimulationError(f"{m.program.code.name}, {instruction}: EXEC becomes undefined")
                    self.put_scalar(m, instruction.operands[0].index + half, 0)
                else:
                    self.put_scalar(m, instruction.operands[0].index + half, undefined)
                undefined_scc |= undefined != 0
        else:
            anything = self.scc[m.waves].copy() if reads_scc else np.zeros(m.n, bool)
            for register in instruction.reads:
                if register >= SGPR:
                    anything |= self.s[m.waves, register - SGPR] != 0
            for register in instruction.writes:
                self.put_scalar(m, register - SGPR, np.where(anything, ALL_BITS, np.uint32(0)))
            undefined_scc = anything
        if instruction.writes_scc:
            self.scc[m.waves] = undefined_scc

    def _half(self, m: Machine, operand, half: int) -> tuple[np.ndarray, np.ndarray]:
        """Value and undefined bits [n] of one register of an operand."""
        if operand.kind == "s":
            return m.s[m.waves, operand.index + half], self.s[m.waves, operand.index + half]
        value = int(operand.value) >> 32 * half & 0xFFFFFFFF if isinstance(operand.value, int) else 0
        return np.full(m.n, value, np.uint32), np.zeros(m.n, np.uint32)

    def _branch(self, m: Machine, instruction: Instruction) -> None:
        if "scc" in instruction.name:
            undefined = self.scc[m.waves].any()
        elif "vcc" in instruction.name:
            bits = self.s64[m.waves, VCC // 2]
            undefined = ((bits != 0) & (m.s64[m.waves, VCC // 2] & ~bits == 0)).any()
        else:
            return
        if undefined:
            raise SimulationError(f"{m.program.code.name}, {instruction}: a branch on an undefined condition")


class _Counters:
    """What a wave has issued and what s_waitcnt has told it is complete, as ordinals.

    vmcnt counts vector memory instructions, loads and stores alike, which complete in the order of issue; lgkmcnt
    counts LDS instructions, which do too, and scalar loads, which do not: with one outstanding only lgkmcnt(0) says
    anything (CDNA4 ISA, section 4.4 on s_waitcnt). Flat instructions count in both.
    """

    def __init__(self, machine: Machine):
        zeros = lambda: np.zeros(machine.wave_count, np.int64)
        self.issued = {"vmcnt": zeros(), "lgkmcnt": zeros()}
        self.done = {"vmcnt": zeros(), "lgkmcnt": zeros()}
        self.last_scalar = zeros()

    @staticmethod
    def of(instruction: Instruction) -> tuple[str, ...]:
        if instruction.name.startswith("flat_"):
            return ("vmcnt", "lgkmcnt")
        return {"vmem": ("vmcnt",), "ds": ("lgkmcnt",), "smem": ("lgkmcnt",)}.get(instruction.unit, ())

    def issue(self, m: Machine, instruction: Instruction) -> None:
        for counter in self.of(instruction):
            self.issued[counter][m.waves] += 1
            if counter == "vmcnt":  # 6 bits: one more is not issued before the oldest of 63 has arrived
                done = self.done[counter]
                done[m.waves] = np.maximum(done[m.waves], self.issued[counter][m.waves] - 63)
            if instruction.unit == "smem":
                self.last_scalar[m.waves] = self.issued[counter][m.waves]

    def wait(self, m: Machine, instruction: Instruction) -> None:
        for counter, done in self.done.items():
            if counter not in instruction.modifiers:
                continue
            allowed = instruction.modifiers[counter]
            reached = self.issued[counter][m.waves] - allowed
            if counter == "lgkmcnt" and allowed:
                reached = np.where(self.last_scalar[m.waves] > done[m.waves], 0, reached)
            done[m.waves] = np.maximum(done[m.waves], reached)


class WaitCounts(Observer):
    """A register is read or written before the s_waitcnt that guarantees that a load into it has arrived."""

    def start(self, machine: Machine) -> None:
        self.counters = _Counters(machine)
        self.pending: dict[int, dict[str, np.ndarray]] = {}
        """By register and counter: the ordinal [waves] of the last load into it; 0: none."""

    def before(self, m: Machine, instruction: Instruction) -> None:
        if self.pending:
            for register in instruction.reads:
                if register in self.pending:
                    self._check(m, instruction, register, "read", ())
            for register in instruction.writes:
                if register in self.pending:
                    in_order = () if instruction.unit == "smem" else self.counters.of(instruction)
                    self._check(m, instruction, register, "written", in_order)

    def _check(self, m, instruction, register, what, except_for) -> None:
        for counter, ordinals in self.pending[register].items():
            late = ordinals[m.waves] > self.counters.done[counter][m.waves]
            if late.any() and counter not in except_for:
                raise SimulationError(
                    f"{m.program.code.name}, {instruction}: {register_name(register)} is {what} before a wait on "
                    f"{counter} guarantees that the load into it is complete; {m.where(int(np.flatnonzero(late)[0]))}"
                )

    def after(self, m: Machine, instruction: Instruction) -> None:
        counters = self.counters.of(instruction)
        if counters:
            self.counters.issue(m, instruction)
            for register in instruction.writes:
                for counter in counters:
                    ordinals = self.pending.setdefault(register, {}).setdefault(
                        counter, np.zeros(m.wave_count, np.int64)
                    )
                    ordinals[m.waves] = self.counters.issued[counter][m.waves]
        elif instruction.name == "s_waitcnt":
            self.counters.wait(m, instruction)
            for register, by_counter in list(self.pending.items()):
                for counter, ordinals in list(by_counter.items()):
                    if (ordinals <= self.counters.done[counter]).all():
                        del by_counter[counter]
                if not by_counter:
                    del self.pending[register]


class Unordered(SimulationError):
    """What LdsOrder finds: the result may be right here, where waves take turns, and is left to chance elsewhere."""


class LdsOrder(Observer):
    """Waves of a workgroup that touch the same byte of LDS, one of them writing it, with nothing that orders them.

    What orders is: the first one's s_waitcnt, then an s_barrier of both. Data that a load brings straight to LDS may be
    used by the wave itself after its s_waitcnt. Lanes of one instruction may not write different values to one byte.
    Writing a byte the value that it has conflicts with nobody, and atomics do not conflict with each other.
    """

    def start(self, machine: Machine) -> None:
        if machine.warps > 16:
            raise SimulationError("more than 16 waves in a workgroup")
        size = machine.lds.data.size
        self.reads = np.zeros(size, np.uint16)
        """By byte: the waves of the workgroup, a bit each, that read it since the last barrier or have not waited."""
        self.writes = np.zeros(size, np.uint16)
        self.loads = np.zeros(size, np.int32)
        """By byte: the number of the direct load that wrote it last."""
        self.counters = _Counters(machine)
        self.recent: list[tuple[str, np.ndarray, int, np.ndarray, np.ndarray]] = []
        """Accesses since the last barrier, and those still outstanding: table, first bytes, count, waves, ordinals."""
        self.bit = np.uint16(1) << (np.arange(machine.wave_count) % machine.warps).astype(np.uint16)
        self.epoch = np.zeros(machine.wave_count, np.int64)
        """Barriers passed."""
        never = np.iinfo(np.int64).max
        self.never = never
        self.load_wave, self.load_ordinal = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self.load_done = np.full(1, -1, np.int64)
        """By number of a direct load: the barriers its wave had passed when it knew that it was complete."""
        self.visible_below = 1
        """Direct loads with smaller numbers are complete, and all waves know it."""

    def _bytes(self, name: str, index: np.ndarray, nbytes: int) -> np.ndarray:
        """Entries [k, nbytes] of a table for the bytes at index [k]."""
        table = getattr(self, name)
        return table[index[:, None] + np.arange(nbytes)] if nbytes > 1 else table[index][:, None]

    def access(self, m: Machine, instruction: Instruction, access: Access) -> None:
        if access.space != "lds" or access.index.size == 0:
            return
        if access.kind == "lost":
            self._report(m, instruction, access, access.changed.any(1), "another lane stores another value with it")
        index, nbytes, waves = access.index, access.nbytes, access.waves
        own = self.bit[waves][:, None]
        direct = instruction.unit == "vmem"
        if access.kind != "atomic":
            others = self._bytes("writes", index, nbytes)
            if access.kind == "store":
                others = others | self._bytes("reads", index, nbytes)
                others = np.where(access.changed, others, np.uint16(0))
            conflict = others & ~own
            if conflict.any():
                why = "no wait and barrier after the access by another wave"
                self._report(m, instruction, access, conflict.any(1), why)
        numbers = self._bytes("loads", index, nbytes)
        if numbers.max() >= self.visible_below:
            visible = np.where(
                self.load_wave[numbers] == waves[:, None],
                self.load_done[numbers] < self.never,
                self.load_done[numbers] < self.epoch[waves][:, None],
            )
            if direct:  # of one wave they complete in order
                visible |= self.load_wave[numbers] == waves[:, None]
            if not visible.all():
                self._report(m, instruction, access, ~visible.all(1), "no wait and barrier after a load to it")
        if direct:
            self._mark_direct(m, index, nbytes, waves)
        else:
            table = "reads" if access.kind == "load" else "writes"
            self._mark(m, table, index, nbytes, waves)
            self.recent.append((table, index, nbytes, waves, self.counters.issued["lgkmcnt"][waves] + 1))

    def _mark(self, m: Machine, name: str, index: np.ndarray, nbytes: int, waves: np.ndarray) -> None:
        table = getattr(self, name)
        places = index[:, None] + np.arange(nbytes)
        for warp in range(m.warps):
            of_warp = waves % m.warps == warp
            if of_warp.any():
                chosen = places[of_warp]
                table[chosen] |= np.uint16(1 << warp)

    def _mark_direct(self, m: Machine, index: np.ndarray, nbytes: int, waves: np.ndarray) -> None:
        loading = np.unique(waves)
        first = self.load_wave.size
        number = np.zeros(m.wave_count, np.int32)
        number[loading] = first + np.arange(loading.size)
        self.load_wave = np.append(self.load_wave, loading)
        self.load_ordinal = np.append(self.load_ordinal, self.counters.issued["vmcnt"][loading] + 1)
        self.load_done = np.append(self.load_done, np.full(loading.size, self.never))
        self.loads[index[:, None] + np.arange(nbytes)] = number[waves][:, None]

    def _report(self, m, instruction, access, wrong, why) -> None:
        first = int(np.flatnonzero(wrong)[0])
        wave = int(access.waves[first])
        byte = int(access.index[first] - m.lds_base[wave])
        raise Unordered(
            f"{m.program.code.name}, {instruction}: {access.kind} of LDS byte {byte}: {why}; "
            f"workgroup {int(m.workgroups[m.workgroup_of[wave]])}, wave {wave % m.warps}, "
            f"{int(wrong.sum())} lanes in all"
        )

    def after(self, m: Machine, instruction: Instruction) -> None:
        if self.counters.of(instruction):
            self.counters.issue(m, instruction)
        elif instruction.name == "s_waitcnt":
            self.counters.wait(m, instruction)
            open_ = np.flatnonzero(self.load_done == self.never)
            wave = self.load_wave[open_]
            complete = self.load_ordinal[open_] <= self.counters.done["vmcnt"][wave]
            self.load_done[open_[complete]] = self.epoch[wave[complete]]

    def barrier(self, m: Machine, waves: np.ndarray) -> None:
        """All bytes are free again, but those of accesses that their wave has not waited for."""
        self.epoch[waves] += 1
        groups = np.unique(m.workgroup_of[waves])
        stride = m.lds.size // m.workgroups.size
        for table in (self.reads, self.writes):
            table[: m.lds.size].reshape(-1, stride)[groups] = 0
        recent, self.recent = self.recent, []
        passed = np.zeros(m.wave_count, bool)
        passed[waves] = True
        for table, index, nbytes, by, ordinals in recent:
            open_ = (ordinals > self.counters.done["lgkmcnt"][by]) | ~passed[by]
            if open_.any():
                self.recent.append((table, index[open_], nbytes, by[open_], ordinals[open_]))
                self._mark(m, table, index[open_], nbytes, by[open_])
        hidden = self.load_done >= self.epoch[self.load_wave]
        self.visible_below = int(hidden.argmax()) if hidden.any() else hidden.size


def all_checks() -> list[Observer]:
    """New checkers for one launch."""
    return [Undefined(), WaitCounts(), LdsOrder()]
