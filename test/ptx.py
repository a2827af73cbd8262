"""Runs a kernel's PTX on the CPU, one warp's instruction at a time: of kernels that Triton's interpreter cannot run,
:mod:`torch_mxfp8moe.backends.triton.matvec_mma` and :mod:`~torch_mxfp8moe.backends.triton.hopper`.

It is strict where a GPU is not: an access outside of the tensors that it was given, a branch that lanes of a warp take
differently, shared memory that two write or read and nothing orders (:mod:`ptx_order`), a sum that is read while the
matrix unit works on it, warps that wait for each other, or an instruction that it does not know, is an error. Which
warp goes on, and when a copy or a product that is under way is done, is drawn at random. It shows nothing about time,
nor what ptxas makes of the text. Sums of the matrix unit are made in double precision and rounded once, ``ex2.approx``
and ``div.full`` are exact to the last bit or so.

Source of what instructions do: PTX ISA.
"""

import random
import re
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from ptx_order import Mbarrier, Meeting, Order

LANES = np.arange(32)
_OF_LETTER = {"b": "u", "u": "u", "s": "i", "f": "f"}


def dtype_of(name: str) -> np.dtype:
    """Of b32, s64, f32, pred, ..."""
    return np.dtype(bool) if name == "pred" else np.dtype(f"{_OF_LETTER[name[0]]}{int(name[1:]) // 8}")


def _e4m3_values() -> np.ndarray:
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    return codes.view(torch.float8_e4m3fn).half().numpy()


E4M3 = _e4m3_values()


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """fp32 -> codes, saturated."""
    values = torch.from_numpy(np.where(np.isnan(x), x, np.clip(x, -448, 448)))
    return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def to_bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)


def of_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Memory:
    """Global memory: these tensors, at their addresses."""

    def __init__(self, tensors: list[torch.Tensor]):
        pieces = {x.data_ptr(): self._bytes(x) for x in tensors}
        self.start = np.array(sorted(pieces), dtype=np.uint64)
        self.bytes = [pieces[int(at)] for at in self.start]
        self.end = self.start + np.array([len(x) for x in self.bytes], dtype=np.uint64)

    @staticmethod
    def _bytes(x: torch.Tensor) -> np.ndarray:
        elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
        start = x.storage_offset() * x.element_size()
        flat = torch.empty(0, dtype=torch.uint8, device="cpu")
        return flat.set_(x.untyped_storage(), start, (elements * x.element_size(),)).numpy()

    def find(self, address: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """By tensor: which of the addresses are of it, its bytes, and where in them."""
        assert not (address % np.uint64(size)).any(), f"an address is no multiple of {size}"
        piece = np.searchsorted(self.start, address, side="right") - 1
        inside = (piece >= 0) & (address + np.uint64(size) <= self.end[piece])
        assert inside.all(), f"{size} bytes at {int(address[~inside][0]):#x} are of no tensor"
        for one in np.unique(piece):
            own = np.flatnonzero(piece == one)
            yield own, self.bytes[one], (address[own] - self.start[one]).astype(int)


def statements(ptx: str) -> tuple[list[tuple], dict]:
    """Of the only function, or of inline assembly: (predicate, its negation, opcode, operands), and where labels stand.
    A label within braces, which inline assembly has, is known there only."""
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :] if ".entry" in ptx else ptx
    code, labels, tables = [], {}, {}
    scopes, opened, table, label = [0], 0, None, ""
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        if line == "{":
            opened += 1
            scopes.append(opened)
            continue
        if line == "}":
            scopes.pop()
            if not scopes:
                break
            continue
        if match := re.match(r"(\$?\w+):", line):
            label = match[1]
            labels[label if label.startswith("$") else (scopes[-1], label)] = len(code)
            line = line[match.end() :].strip()
        if line == ".branchtargets":
            table = tables[label] = []
            continue
        if table is not None:
            table.append(line.rstrip(",;"))
            table = None if line.endswith(";") else table
            continue
        if line in ("", "(", ")") or line.startswith("."):
            continue
        for one in filter(None, (part.strip() for part in line.split(";"))):
            if one.startswith("."):
                continue
            match = re.fullmatch(r"(?:@(?:(!)?(%?\w+))\s+)?([\w.:]+)\s*(.*)", one)
            assert match, f"{one!r} is no instruction"
            negated, predicate, opcode, rest = match.groups()
            operands = [x.strip() for x in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
            if opcode.startswith("bra") and not operands[0].startswith("$"):
                operands = [(scopes[-1], operands[0])]
            code.append((predicate, bool(negated), opcode.replace("::cta", ""), operands))
    return code, labels | tables


def listed(operand: str) -> list[str]:
    return [x.strip() for x in operand.strip("{} ").split(",")]


class Warp:
    """One of a program's."""

    width = 32
    """Its lanes."""

    def __init__(self, program: "Program", number: int):
        self.program, self.number = program, number
        self.registers: dict[str, np.ndarray] = {}
        self.products: deque = deque()
        """Of the matrix unit, under way: (group, what it does, registers of the sum, of the left operand)."""
        self.group = 0
        self.copies: deque = deque()
        """``cp.async``, and arrivals after them."""

    def read(self, name: str, kind: str) -> np.ndarray:
        dtype = dtype_of(kind)
        special = {
            "%tid.x": LANES + 32 * self.number, "%laneid": LANES, "%ctaid.x": np.full(32, self.program.index),
            "%nctaid.x": np.full(32, self.program.count), "global_smem": np.zeros(32, int),
        }  # fmt: skip
        if name in special:
            return special[name].astype(dtype)
        if match := re.fullmatch(r"\w+_param_(\d+)", name):
            return np.full(32, int(match[1])).astype(dtype)
        assert not any(name in total for _, _, total, _ in self.products), f"{name} is a sum that is under way"
        if name in self.registers:
            value = self.registers[name]
            return value.view(dtype) if value.dtype.itemsize == dtype.itemsize else value.astype(dtype)
        if name.startswith("0f"):
            return np.full(self.width, int(name[2:], 16), np.uint32).view(np.float32)
        number = int(name.removesuffix("U"), 0)
        if kind == "pred":
            return np.full(self.width, bool(number))
        size = 8 * dtype.itemsize
        return np.full(self.width, number % (1 << size), f"u{size // 8}").view(dtype)

    def write(self, name: str, value: np.ndarray, mask: np.ndarray) -> None:
        value = np.ascontiguousarray(value)
        if value.dtype != bool:
            value = value.view(f"u{value.dtype.itemsize}")
        assert not any(name in total or name in left for _, _, total, left in self.products), f"{name} is in use"
        old = self.registers.get(name)
        if old is None or old.dtype != value.dtype:
            old = np.zeros_like(value)
        self.registers[name] = np.where(mask, value, old)

    def address(self, operand: str, kind: str) -> np.ndarray:
        base, _, offset = operand.strip("[] ").partition("+")
        return self.read(base.strip(), kind) + np.array(int(offset or 0), dtype=dtype_of(kind))

    def run(self) -> Iterator[Callable[[], bool] | None]:
        """Stops wherever others may go on, or have to: with what it waits for."""
        code, labels = self.program.code, self.program.labels
        at = 0
        with np.errstate(all="ignore"):
            while True:
                predicate, negated, opcode, operands = code[at]
                at += 1
                mask = np.ones(self.width, bool) if predicate is None else self.read(predicate, "pred") ^ negated
                name = opcode.split(".")[0]
                if name in ("bra", "ret"):
                    assert mask.all() or not mask.any(), f"lanes go different ways: {code[at - 1]}"
                    if mask.all():
                        if name == "ret":
                            return
                        at = labels[operands[0]]
                elif name == "brx":
                    index = self.read(operands[0], "u32")
                    assert (index == index[0]).all()
                    at = labels[labels[operands[1]][index[0]]]
                elif name in ("bar", "barrier"):
                    if "warp" not in opcode:
                        assert mask.all()
                        threads = int(operands[1]) if len(operands) > 1 else 32 * self.program.warps
                        yield self.program.meeting(int(operands[0])).come(self.number, threads // 32)
                elif opcode.startswith("mbarrier.try_wait.parity"):
                    barrier = self.program.mbarrier(self.address(operands[1], "u32"))
                    parity = int(self.read(operands[2], "u32")[0])
                    yield partial(barrier.passed, parity)
                    barrier.learn(self.number)
                    self.write(operands[0], mask, mask)
                elif opcode.startswith("wgmma.wait_group"):
                    while self.products and self.products[0][0] < self.group - int(operands[0]):
                        self.finish_product()
                elif name not in ("griddepcontrol", "setmaxnreg"):
                    self.step(opcode, operands, mask)
                    if name in ("mbarrier", "cp", "fence", "atom"):
                        yield None

    def step(self, opcode: str, operands: list[str], mask: np.ndarray) -> None:
        name, *how = opcode.split(".")
        kind = how[-1] if how else ""
        if name in ("ld", "st"):
            return self._move(name, how, operands, mask)
        if name == "mov" and operands[0].startswith("{"):
            parts = listed(operands[0])
            value = self.read(operands[1], kind)
            value = value.view(f"u{value.dtype.itemsize // len(parts)}").reshape(self.width, -1)
            for part, one in enumerate(parts):
                self.write(one, value[:, part], mask)
            return
        if name == "mov" and operands[1].startswith("{"):
            parts = listed(operands[1])
            part = f"b{8 * dtype_of(kind).itemsize // len(parts)}"
            value = np.stack([self.read(one, part) for one in parts], 1)
            self.write(operands[0], value.view(dtype_of(kind)).reshape(self.width), mask)
            return
        if name in ("mma", "wgmma"):
            return self._multiply(how, operands) if name == "mma" else self._send_product(how, operands)
        if name in ("mbarrier", "cp", "fence", "atom", "elect", "stmatrix", "ldmatrix"):
            return getattr(self, f"_{name}")(how, operands, mask)
        if name == "cvt":
            return self.write(operands[0], self._converted(how, operands[1:]), mask)
        if name == "cvta":
            return self.write(operands[0], self.read(operands[1], "u64"), mask)
        if name in ("shfl", "vote", "redux"):
            assert mask.all()
            return self.write(operands[0], self._across(name, how, operands[1:]), mask)
        self.write(operands[0], self._computed(name, how, kind, operands[1:]), mask)

    def _mbarrier(self, how: list[str], operands: list[str], mask: np.ndarray) -> None:
        if not mask.any():
            return
        place = self.address(operands[how[0] == "arrive"], "u32")
        if how[0] == "init":
            return self.program.new_mbarrier(place, int(self.read(operands[1], "u32")[0]))
        barrier = self.program.mbarrier(place)
        assert how[0] == "arrive" and operands[0] == "_", how
        if how[1] == "expect_tx":
            assert mask.sum() == 1
            barrier.expect(int(self.read(operands[2], "u32")[mask][0]))
        barrier.arrive(int(mask.sum()), self.program.order.publish(self.number))

    def _elect(self, how: list[str], operands: list[str], mask: np.ndarray) -> None:
        number, predicate = operands[0].split("|")
        if number != "_":
            self.write(number, np.zeros(32, np.uint32), mask)
        self.write(predicate, LANES == 0, mask)

    def _fence(self, how: list[str], operands: list[str], mask: np.ndarray) -> None:
        assert how[:2] == ["proxy", "async"], how
        self.program.order.fence(self.number)

    def _atom(self, how: list[str], operands: list[str], mask: np.ndarray) -> None:
        """Of one lane."""
        assert how[0] == "global" and how[-1] == "u32" and mask.sum() <= 1, how
        for own, data, start in self.program.memory.find(self.address(operands[1], "u64")[mask], 4):
            word = data[start[0] : start[0] + 4].view("u4")
            old, by = word.copy(), self.read(operands[2], "u32")[mask]
            word[:] = old + by if how[-2] == "add" else np.where(old >= by, 0, old + 1)
            self.write(operands[0], np.full(32, old[0], np.uint32), mask)

    def _cp(self, how: list[str], operands: list[str], mask: np.ndarray) -> None:
        program, order = self.program, self.program.order
        if how[:3] == ["async", "mbarrier", "arrive"]:
            assert mask.all() and how[3] == "noinc"
            barrier, clock = program.mbarrier(self.address(operands[0], "u32")), order.publish(self.number)
            self.copies.append(lambda: barrier.arrive(32, np.maximum(clock, order.copied[self.number])))
        elif how[:2] == ["async", "cg"]:
            size = int(operands[2], 0)
            to, of = self.address(operands[0], "u32")[mask], self.address(operands[1], "u64")
            count = self.read(operands[3], "u32") if len(operands) > 3 else np.full(32, size)
            assert np.isin(count[mask], (0, size)).all()
            there = mask & (count > 0)
            values = np.zeros((32, size), np.uint8)
            for own, data, start in program.memory.find(of[there], size) if there.any() else ():
                values[LANES[there][own]] = data[start[:, None] + np.arange(size)]
            where, clock = (to[:, None] + np.arange(size, dtype=to.dtype)).astype(int), order.clock[self.number].copy()

            def copy() -> None:
                order.copy(where.ravel(), clock, by=self.number)
                program.shared[where] = values[mask]

            self.copies.append(copy)
        elif "prefetch" in how:
            if mask.any():
                size = int(self.read(operands[1], "u32")[mask][0])
                assert size % 16 == 0
                ends = self.address(operands[0], "u64")[mask][:1] + np.array([0, size - 16], np.uint64)
                list(program.memory.find(ends, 16))
        else:
            assert how[:3] == ["async", "bulk", "tensor"] and how[5] == "global", how
            if mask.any():
                assert mask.sum() == 1
                self._copy_box(operands, mask)

    def _copy_box(self, operands: list[str], mask: np.ndarray) -> None:
        program, order = self.program, self.program.order
        which, coordinates = operands[1].strip("[] ").split(",", 1)
        descriptor = program.params[int(self.read(which, "u64")[mask][0])]
        first = [int(self.read(one, "s32")[mask][0]) for one in reversed(listed(coordinates.strip()))]
        box = descriptor.box(first)
        rows = box.reshape(-1, box.shape[-1])
        where = int(self.address(operands[0], "u32")[mask][0]) + np.arange(rows.size).reshape(rows.shape)
        where = swizzled(where, descriptor.swizzle)
        barrier = program.mbarrier(self.address(operands[2], "u32"))
        clock = order.clock[self.number].copy()

        def copy() -> None:
            known = order.copy(where.ravel(), clock)
            program.shared[where] = rows
            barrier.complete(rows.size, known)

        program.boxes.append(copy)

    def _matrices(self, how: list[str], place: str) -> list[np.ndarray]:
        """Where in shared memory the bytes of the matrices of ``ldmatrix`` and ``stmatrix`` are, [8, 16] each."""
        assert how[:3] == ["sync", "aligned", "m8n8"] and how[-2:] == ["shared", "b16"], how
        rows = self.address(place, "u32").astype(int).reshape(4, 8, 1) + np.arange(16)
        return list(rows[: int(how[3][1:])])

    def _stmatrix(self, how: list[str], operands: list[str], mask: np.ndarray) -> None:
        assert mask.all()
        for where, name in zip(self._matrices(how, operands[0]), listed(operands[1]), strict=True):
            matrix = self.read(name, "b32").view("u2").reshape(8, 8)
            self.program.order.access(self.number, where.ravel(), True)
            self.program.shared[where] = np.ascontiguousarray(matrix.T if "trans" in how else matrix).view("u1")

    def _ldmatrix(self, how: list[str], operands: list[str], mask: np.ndarray) -> None:
        assert mask.all()
        for where, name in zip(self._matrices(how, operands[1]), listed(operands[0]), strict=True):
            self.program.order.access(self.number, where.ravel(), False)
            matrix = self.program.shared[where].view("u2")
            self.write(name, np.ascontiguousarray(matrix.T if "trans" in how else matrix).view("u4").reshape(32), mask)

    def _send_product(self, how: list[str], operands: list[str]) -> None:
        if how[0] == "commit_group":
            self.group += 1
            return
        if how[0] == "fence":
            return
        assert how[:3] == ["mma_async", "sync", "aligned"] and how[4] == "f32" and how[5] == how[6], how
        assert operands[-3:] == ["1", "1", "0"], operands[2:]  # nothing negated, the right operand with rows of K
        columns, type_ = int(re.fullmatch(r"m64n(\d+)k16", how[3])[1]), how[5]
        total, left = listed(operands[0]), listed(operands[1])
        a = left_operand([self.read(one, "b32") for one in left], type_)
        descriptor = self.read(operands[2], "u64")
        keep = self.read(operands[3], "pred")
        assert (descriptor == descriptor[0]).all() and (keep == keep[0]).all()
        where = right_operand(int(descriptor[0]), columns)

        def multiply() -> None:
            self.program.order.read_by_matrix_unit(self.number, where.ravel())
            b = to_float64(self.program.shared[where].view("u2")[..., 0], type_)
            product = a @ b
            for i, name in enumerate(total):
                own = product[LANES // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (LANES % 4) + i % 2]
                if keep[0]:
                    own = own + self.read(name, "f32")
                self.write(name, own.astype(np.float32), np.ones(32, bool))

        self.products.append((self.group, multiply, set(total), set(left)))

    def finish_product(self) -> None:
        """The next one."""
        _, multiply, total, _ = self.products.popleft()
        waiting, self.products = self.products, deque()
        with np.errstate(all="ignore"):
            multiply()
        self.products = waiting

    def _move(self, name: str, how: list[str], operands: list[str], mask: np.ndarray) -> None:
        space, kind = how[0], how[-1]
        count = int(how[-2][1:]) if how[-2].startswith("v") else 1
        registers, place = (operands[0], operands[1]) if name == "ld" else (operands[1], operands[0])
        registers = listed(registers)
        dtype = dtype_of(kind)
        size = count * dtype.itemsize
        if space == "param":
            value = self.program.params[int(re.search(r"param_(\d+)", place)[1])]
            return self.write(registers[0], np.full(32, value, np.array(value).dtype).view(dtype), mask)
        if name == "st":
            values = np.stack([self.read(one, kind) for one in registers], 1)
        else:
            values = np.stack([self.registers.get(one, np.zeros(32, dtype)).astype(dtype) for one in registers], 1)
        values = np.ascontiguousarray(values).view("u1").reshape(32, size)
        if space == "global":
            found = self.program.memory.find(self.address(place, "u64")[mask], size)
        else:
            assert space == "shared", space
            at = self.address(place, "u32")[mask]
            assert not (at % size).any(), f"an address is no multiple of {size}"
            where = (at[:, None] + np.arange(size, dtype=at.dtype)).astype(int)
            # Several warps may write the same.
            if name == "ld" or (self.program.shared[where] != values[mask]).any():
                self.program.order.access(self.number, where.ravel(), name == "st")
            found = [(np.arange(len(at)), self.program.shared, at.astype(int))]
        lanes = LANES[mask]
        for own, data, start in found:
            where = start[:, None] + np.arange(size)
            if name == "st":
                data[where] = values[lanes[own]]
            else:
                values[lanes[own]] = data[where]
        if name == "ld":
            for i, one in enumerate(registers):
                own = np.ascontiguousarray(values[:, i * dtype.itemsize : (i + 1) * dtype.itemsize]).view(dtype)[:, 0]
                # A byte's register has 16 bits.
                self.write(one, own.astype("u2") if dtype.itemsize == 1 else own, mask)

    def _multiply(self, how: list[str], operands: list[str]) -> None:
        assert how[:5] == ["sync", "aligned", "m16n8k16", "row", "col"] and how[5] == how[8] == "f32", how
        d, a, b, c = map(listed, operands)
        g, t = LANES // 4, LANES % 4

        def values(name: str) -> np.ndarray:
            return to_float64(self.read(name, "b32").view("u2").reshape(32, 2), how[6])

        left = left_operand([self.read(one, "b32") for one in a], how[6])
        right, total = np.zeros((16, 8)), np.zeros((16, 8))
        for i, name in enumerate(b):
            for half in range(2):
                right[2 * t + 8 * i + half, g] = values(name)[:, half]
        for i, name in enumerate(c):
            total[g + 8 * (i // 2), 2 * t + i % 2] = self.read(name, "f32")
        total = (total + left @ right).astype(np.float32)
        for i, name in enumerate(d):
            self.write(name, total[g + 8 * (i // 2), 2 * t + i % 2], np.ones(32, bool))

    def _converted(self, how: list[str], operands: list[str]) -> np.ndarray:
        to, of = how[-2:]
        if (to, of) == ("f16x2", "e4m3x2"):
            pair = self.read(operands[0], "b16").view("u1").reshape(32, 2)
            return E4M3[pair].reshape(64).view("u4")
        if (to, of) == ("e4m3x2", "f32"):
            assert "satfinite" in how
            return np.stack([to_e4m3(self.read(one, "f32")) for one in reversed(operands)], 1).view("u2").reshape(32)
        if (to, of) == ("bf16x2", "f32"):
            return np.stack([to_bf16(self.read(one, "f32")) for one in reversed(operands)], 1).view("u4").reshape(32)
        if (to, of) == ("bf16", "f32"):
            return to_bf16(self.read(operands[0], "f32"))
        if (to, of) == ("f32", "bf16"):
            return of_bf16(self.read(operands[0], "b16"))
        assert to in ("f16", "f32") and of in ("f16", "f32") or to[0] in "us" and of[0] in "us", (to, of)
        value = self.read(operands[0], of)
        return value.astype(dtype_of(to))

    def _across(self, name: str, how: list[str], operands: list[str]) -> np.ndarray:
        if name == "vote" and how[1] == "any":
            return np.full(self.width, self.read(operands[0], "pred").any())
        if name == "vote":
            assert how[:2] == ["sync", "ballot"]
            bits = self.read(operands[0], "pred").astype(np.uint64) << LANES.astype(np.uint64)
            return np.full(32, bits.sum(), np.uint32)
        if name == "redux":
            assert how[1] == "max"
            return np.full(32, self.read(operands[0], how[2]).max())
        value, lane = self.read(operands[0], "b32"), self.read(operands[1], "u32").astype(int)
        assert int(operands[2], 0) == 31 and how[1] in ("idx", "bfly"), how
        return value[lane & 31 if how[1] == "idx" else LANES ^ lane]

    def _computed(self, name: str, how: list[str], kind: str, operands: list[str]) -> np.ndarray:
        if kind in ("u16x2", "f16x2", "bf16x2", "bf16"):
            return self._computed_in_16_bits(name, kind, operands)
        if name == "prmt":
            a, b, selector = (self.read(one, "b32") for one in operands)
            both = np.stack([a, b], 1).view("u1").reshape(self.width, 8)
            chosen = np.stack([selector >> np.uint32(4 * i) for i in range(4)], 1)
            assert not (chosen & 8).any(), "a byte's sign is not known"
            return np.take_along_axis(both, (chosen & 7).astype(int), 1).view("u4").reshape(self.width)
        if name == "setp" and len(how) == 3:  # and another predicate
            assert how[1] == "and"
            return self._computed("setp", [how[0], kind], kind, operands[:2]) & self.read(operands[2], "pred")
        if name == "bfe" and kind == "s32":
            value, (start, length) = self.read(operands[0], "s32"), (int(one) for one in operands[1:])
            return value << np.int32(32 - start - length) >> np.int32(32 - length)
        if name == "selp":
            a, b, p = (self.read(one, k) for one, k in zip(operands, (kind, kind, "pred")))
            return np.where(p, a, b)
        if name in ("shl", "shr"):
            value, by = self.read(operands[0], kind), self.read(operands[1], "u32").astype(int)
            bits = 8 * value.dtype.itemsize
            moved = (value << np.minimum(by, bits - 1).astype(value.dtype)) if name == "shl" else (
                value >> np.minimum(by, bits - 1).astype(value.dtype))  # fmt: skip
            gone = (by >= bits) & (name == "shl" or value.dtype.kind == "u")
            return np.where(gone, np.zeros_like(value), moved)
        if name == "bfe":
            value, start, length = (self.read(one, "u32").astype(np.uint64) for one in operands)
            return ((value >> start) & ((np.uint64(1) << length) - np.uint64(1))).astype(np.uint32)
        if name == "popc":
            return np.array([int(x).bit_count() for x in self.read(operands[0], "u32")], np.uint32)
        if name == "fns":
            ones, base, nth = (self.read(one, "b32") for one in operands)
            assert (base == 0).all() and (nth > 0).all()
            places = [[i for i in range(32) if int(one) >> i & 1] for one in ones]
            found = [own[n - 1] if n <= len(own) else 0xFFFFFFFF for own, n in zip(places, nth)]
            return np.array(found, np.uint32)
        values = [self.read(one, kind) for one in operands]
        if name in ("mul", "mad") and how[0] in ("wide", "hi", "lo") and kind[0] in "us":
            bits = 8 * dtype_of(kind).itemsize
            assert bits <= 32 or how[0] == "lo", how
            long = values[0].dtype.kind + "8"
            product = values[0].astype(long) * values[1].astype(long)  # modulo 2^64, which is all that lo asks for
            if how[0] == "hi":
                product >>= np.array(bits, long)
            bits *= 2 if how[0] == "wide" else 1
            if name == "mad":
                product += self.read(operands[2], f"{kind[0]}{bits}").astype(long)
            return product.astype(f"{long[0]}{bits // 8}")
        if name == "setp":
            a, b = values
            compare = {
                "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
                "ge": np.greater_equal,
            }  # fmt: skip
            return compare[how[0]](a, b)
        unary = dict(mov=lambda a: a, neg=lambda a: -a, abs=np.abs, ex2=np.exp2, rcp=np.reciprocal)
        unary["not"] = np.invert
        if name in unary:
            return unary[name](values[0])
        binary = {
            "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
            "xor": np.bitwise_xor, "max": np.maximum, "min": np.minimum, "div": np.divide,
        }  # fmt: skip
        if name in binary:
            return binary[name](*values)
        assert (name, *how) == ("fma", "rn", "f32"), f"{name}.{'.'.join(how)} is not known"
        return (values[0].astype(np.float64) * values[1] + values[2]).astype(np.float32)


    def _computed_in_16_bits(self, name: str, kind: str, operands: list[str]) -> np.ndarray:
        """Both halves of a register, or one number."""
        whole = "b32" if kind.endswith("x2") else "b16"
        values = [self.read(one, whole).view("u2") for one in operands]
        if kind == "u16x2":
            result = {"add": np.add, "max": np.maximum, "min": np.minimum}[name](*values)
        else:
            assert name == "mul", name
            a, b = (to_float64(value, kind.removesuffix("x2")).astype(np.float32) for value in values)
            result = (a * b).astype(np.float16) if kind == "f16x2" else to_bf16(a * b)  # exact in fp32
        return np.ascontiguousarray(result).view(dtype_of(whole))


def to_float64(bits: np.ndarray, type_: str) -> np.ndarray:
    """fp16 or bf16."""
    assert type_ in ("f16", "bf16"), type_
    return (bits.view(np.float16) if type_ == "f16" else of_bf16(bits)).astype(np.float64)


def left_operand(registers: list[np.ndarray], type_: str) -> np.ndarray:
    """A warp's part of it, [16, 16]."""
    left = np.zeros((16, 16))
    for i, register in enumerate(registers):
        values = to_float64(register.view("u2").reshape(32, 2), type_)
        for half in range(2):
            left[LANES // 4 + 8 * (i % 2), 2 * (LANES % 4) + 8 * (i // 2) + half] = values[:, half]
    return left


def swizzled(address: np.ndarray, width: int) -> np.ndarray:
    """Where in shared memory that is whose place without a swizzle of that width is ``address``."""
    return address ^ ((address >> 7 & width // 16 - 1) << 4) if width > 16 else address


def right_operand(descriptor: int, columns: int) -> np.ndarray:
    """[16, columns, 2]: the two bytes of each element."""
    start, stride, mode = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4, descriptor >> 62
    assert mode == 1 and not descriptor >> 49 & 7, "a swizzle of 128 bytes, from a multiple of 1024 on"
    k, n = np.arange(16)[:, None], np.arange(columns)[None, :]
    address = start + n // 8 * stride + n % 8 * 128 + 2 * k
    return swizzled(address, 128)[..., None] + np.arange(2)


class Boxes:
    """What copies a descriptor's boxes."""

    def __init__(self, descriptor):
        whole = torch.as_strided(descriptor.base, tuple(descriptor.shape), tuple(descriptor.strides))
        self.data = whole.view(torch.int16 if whole.dtype.itemsize == 2 else torch.uint8).numpy()
        self.size, self.swizzle = descriptor.block_shape, descriptor.layout.swizzle_byte_width

    def box(self, first: list[int]) -> np.ndarray:
        """As bytes; zeros beyond the tensor."""
        result = np.zeros(self.size, self.data.dtype)
        inside = [(max(at, 0), min(at + size, end)) for at, size, end in zip(first, self.size, self.data.shape)]
        if all(low < high for low, high in inside):
            to = tuple(slice(low - at, high - at) for at, (low, high) in zip(first, inside))
            result[to] = self.data[tuple(slice(*one) for one in inside)]
        return result.view("u1")


class Program:
    """One of a launch's."""

    def __init__(self, code, labels, params, memory, shared: int, index: int, count: int, warps: int):
        self.code, self.labels, self.params, self.memory = code, labels, params, memory
        self.index, self.count, self.warps = index, count, warps
        self.shared = np.full(max(shared, 1), 0xFF, np.uint8)
        self.order = Order(len(self.shared), warps)
        self.meetings: dict[int, Meeting] = {}
        self.mbarriers: dict[int, Mbarrier] = {}
        self.boxes: list[Callable[[], None]] = []
        """Copies that are under way."""

    def meeting(self, number: int) -> Meeting:
        return self.meetings.setdefault(number, Meeting(self.order))

    def new_mbarrier(self, place: np.ndarray, count: int) -> None:
        self.mbarriers[int(place[0])] = Mbarrier(self.order, count)

    def mbarrier(self, place: np.ndarray) -> Mbarrier:
        assert (place == place[0]).all()
        return self.mbarriers[int(place[0])]

    def run(self, chance: random.Random) -> None:
        warps = [Warp(self, i) for i in range(self.warps)]
        running = {warp: warp.run() for warp in warps}
        waits: dict[Warp, Callable[[], bool] | None] = dict.fromkeys(warps)
        while running:
            ready = [warp for warp in running if waits[warp] is None or waits[warp]()]
            under_way = [partial(self.boxes.pop, i) for i in range(len(self.boxes))]
            under_way += [warp.copies.popleft for warp in warps if warp.copies]
            under_way += [warp.finish_product for warp in warps if warp.products]
            assert ready or under_way, "all warps wait"
            chosen = chance.randrange(len(ready) + len(under_way))
            if chosen >= len(ready):
                copy = under_way[chosen - len(ready)]()
                if copy is not None:
                    copy()
                continue
            warp = ready[chosen]
            try:
                waits[warp] = next(running[warp])
            except StopIteration:
                assert not warp.products, "products that nobody waited for"
                del running[warp]
        assert not self.boxes, "copies that nobody waited for"


def evaluate(assembly: str, inputs: list[np.ndarray], outputs: int) -> dict[str, np.ndarray]:
    """The registers that inline assembly leaves: its ``outputs`` are $0, ...; ``inputs`` come next, 32 bits of any
    number of lanes, which are one warp."""
    program = Program(*statements(f"{assembly}\nret;"), [], Memory([]), 0, 0, 1, 1)
    warp = Warp(program, 0)
    warp.width = len(inputs[0])
    warp.registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    assert not list(warp.run()), "it waits for others"
    return warp.registers


def run(text: str, kernel, launch, seed: int = 0) -> None:
    """The text of a bound launch on CPU tensors, of which ``compile_offline`` made ``kernel``; one program after the
    other."""
    code, labels = statements(text)
    as_bits = {"i64": np.int64, "i32": np.int32, "fp32": np.float32}
    params, tensors = [], []
    for name, kind in kernel.src.signature.items():
        value = launch.arguments.get(name)
        if isinstance(value, torch.Tensor):
            params.append(np.uint64(value.data_ptr()))
            tensors.append(value)
        elif kind.startswith("tensordesc"):
            params += [Boxes(value), *map(np.int32, value.shape), *map(np.int64, value.strides)]
        elif kind != "constexpr":
            params.append(as_bits[kind](value))
    memory = Memory(tensors)
    warps = int(re.search(r"\.reqntid (\d+)", text)[1]) // 32
    chance = random.Random(seed)
    for index in range(launch.grid[0]):
        program = Program(code, labels, params, memory, kernel.metadata.shared, index, launch.grid[0], warps)
        program.run(chance)
