"""Runs a kernel's PTX on the CPU, one warp's instruction at a time: of what Triton makes of kernels without TMA, wgmma
and mbarriers, such as those of :mod:`torch_mxfp8moe.backends.triton.matvec_mma`, which Triton's interpreter cannot run.

It is strict where a GPU is not: an access outside of the tensors that it was given, a branch that lanes of a warp take
differently, shared memory that is written and read by two warps without a barrier between, or an instruction that it
does not know, is an error. It shows nothing about time, nor what ptxas makes of the text. Sums of ``mma.sync`` are made
in double precision and rounded once, ``ex2.approx`` and ``div.full`` are exact to the last bit or so.

Source of what instructions do: PTX ISA.
"""

import re
from collections.abc import Iterator

import numpy as np
import torch

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
        flat = torch.empty(0, dtype=torch.uint8)
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


def statements(ptx: str) -> tuple[list[tuple], dict[str, int]]:
    """Of the only function: (predicate, its negation, opcode, operands), and where labels stand."""
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
    code, labels = [], {}
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        if match := re.fullmatch(r"(\$\w+):", line):
            labels[match[1]] = len(code)
            continue
        if line in ("", "{", "}", "(", ")") or line.startswith("."):
            continue
        for one in filter(None, (part.strip() for part in line.split(";"))):
            if one.startswith("."):
                continue
            predicate, negated, opcode, rest = re.fullmatch(
                r"(?:@(?:(!)?(%?\w+))\s+)?([\w.]+)\s*(.*)", one, re.S
            ).group(2, 1, 3, 4)  # fmt: skip
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)
            code.append((predicate, bool(negated), opcode, [x.strip() for x in operands]))
    return code, labels


def listed(operand: str) -> list[str]:
    return [x.strip() for x in operand.strip("{} ").split(",")]


class Warp:
    """One of a program's."""

    def __init__(self, program: "Program", number: int):
        self.program, self.number = program, number
        self.registers: dict[str, np.ndarray] = {}

    def read(self, name: str, kind: str) -> np.ndarray:
        dtype = dtype_of(kind)
        special = {
            "%tid.x": LANES + 32 * self.number, "%laneid": LANES, "%ctaid.x": np.full(32, self.program.index),
            "%nctaid.x": np.full(32, self.program.count), "global_smem": np.zeros(32, int),
        }  # fmt: skip
        if name in special:
            return special[name].astype(dtype)
        if name in self.registers:
            value = self.registers[name]
            return value.view(dtype) if value.dtype.itemsize == dtype.itemsize else value.astype(dtype)
        if name.startswith("0f"):
            return np.full(32, int(name[2:], 16), np.uint32).view(np.float32)
        number = int(name, 0)
        if kind == "pred":
            return np.full(32, bool(number))
        size = 8 * dtype.itemsize
        return np.full(32, number % (1 << size), f"u{size // 8}").view(dtype)

    def write(self, name: str, value: np.ndarray, mask: np.ndarray) -> None:
        value = np.ascontiguousarray(value)
        if value.dtype != bool:
            value = value.view(f"u{value.dtype.itemsize}")
        old = self.registers.get(name)
        if old is None or old.dtype != value.dtype:
            old = np.zeros_like(value)
        self.registers[name] = np.where(mask, value, old)

    def address(self, operand: str, kind: str) -> np.ndarray:
        base, _, offset = operand.strip("[] ").partition("+")
        return self.read(base.strip(), kind) + np.array(int(offset or 0), dtype=dtype_of(kind))

    def run(self) -> Iterator[None]:
        """Stops at each barrier."""
        code, labels = self.program.code, self.program.labels
        at = 0
        with np.errstate(all="ignore"):
            while True:
                predicate, negated, opcode, operands = code[at]
                at += 1
                mask = np.ones(32, bool) if predicate is None else self.read(predicate, "pred") ^ negated
                name = opcode.split(".")[0]
                if name in ("bra", "ret"):
                    assert mask.all() or not mask.any(), f"lanes go different ways: {code[at - 1]}"
                    if mask.all():
                        if name == "ret":
                            return
                        at = labels[operands[0]]
                elif name == "bar":
                    yield
                elif name != "griddepcontrol":
                    self.step(opcode, operands, mask)

    def step(self, opcode: str, operands: list[str], mask: np.ndarray) -> None:
        name, *how = opcode.split(".")
        kind = how[-1] if how else ""
        if name in ("ld", "st"):
            return self._move(name, how, operands, mask)
        if name == "mov" and operands[0].startswith("{"):
            value = self.read(operands[1], kind).view("u2").reshape(32, -1)
            for part, one in enumerate(listed(operands[0])):
                self.write(one, value[:, part], mask)
            return
        if name == "mov" and operands[1].startswith("{"):
            parts = [self.read(one, "b16") for one in listed(operands[1])]
            self.write(operands[0], np.stack(parts, 1).view("u4").reshape(32), mask)
            return
        if name == "mma":
            return self._multiply(how, operands)
        if name == "cvt":
            return self.write(operands[0], self._converted(how, operands[1:]), mask)
        if name in ("shfl", "vote", "redux"):
            assert mask.all()
            return self.write(operands[0], self._across(name, how, operands[1:]), mask)
        self.write(operands[0], self._computed(name, how, kind, operands[1:]), mask)

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
            self.program.guard(self.number, at, size, name == "st")
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
            halves = self.read(name, "b32").view("u2").reshape(32, 2)
            return (halves.view(np.float16) if how[6] == "f16" else of_bf16(halves)).astype(np.float64)

        left, right, total = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        for i, name in enumerate(a):
            for half in range(2):
                left[g + 8 * (i % 2), 2 * t + 8 * (i // 2) + half] = values(name)[:, half]
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
        unary = dict(mov=lambda a: a, neg=lambda a: -a, abs=np.abs, ex2=np.exp2)
        unary["not"] = np.invert
        if name in unary:
            return unary[name](values[0])
        binary = {
            "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
            "xor": np.bitwise_xor, "max": np.maximum, "min": np.minimum, "div": np.divide,
        }  # fmt: skip
        if name in binary:
            return binary[name](*values)
        assert name == "fma", f"{name}.{'.'.join(how)} is not known"
        return (values[0].astype(np.float64) * values[1] + values[2]).astype(np.float32)


class Program:
    """One of a launch's."""

    SEVERAL = -2
    """Warps have read there."""

    def __init__(self, code, labels, params, memory, shared: int, index: int, count: int):
        self.code, self.labels, self.params, self.memory = code, labels, params, memory
        self.index, self.count = index, count
        self.shared = np.full(max(shared, 1), 0xFF, np.uint8)
        self.writer = np.full(len(self.shared), -1)
        self.reader = np.full(len(self.shared), -1)

    def guard(self, warp: int, at: np.ndarray, size: int, writes: bool) -> None:
        """Since the last barrier nobody else may have written what is read, or read or written what is written."""
        where = (at[:, None] + np.arange(size, dtype=at.dtype)).ravel().astype(int)
        for others in (self.writer[where], *([self.reader[where]] if writes else [])):
            assert np.isin(others, (-1, warp)).all(), "two warps at one place of shared memory, and no barrier"
        if writes:
            self.writer[where] = warp
        else:
            self.reader[where] = np.where(np.isin(self.reader[where], (-1, warp)), warp, self.SEVERAL)

    def run(self, warps: int) -> None:
        running = [Warp(self, i).run() for i in range(warps)]
        while running:
            left = [warp for warp in running if next(warp, "ended") is None]
            assert len(left) in (0, len(running)), "not all warps come to a barrier"
            running = left
            self.writer[:] = self.reader[:] = -1


def run(text: str, kernel, launch) -> None:
    """The text of a bound launch on CPU tensors, of which ``compile_offline`` made ``kernel``."""
    code, labels = statements(text)
    given = [launch.arguments[name] for name, kind in kernel.src.signature.items() if kind != "constexpr"]
    kinds = [kind for kind in kernel.src.signature.values() if kind != "constexpr"]
    as_bits = {"i64": np.int64, "i32": np.int32, "fp32": np.float32}
    params = [
        np.uint64(x.data_ptr()) if isinstance(x, torch.Tensor) else as_bits[kind](x) for x, kind in zip(given, kinds)
    ]
    memory = Memory([x for x in given if isinstance(x, torch.Tensor)])
    for index in range(launch.grid[0]):
        program = Program(code, labels, params, memory, kernel.metadata.shared, index, launch.grid[0])
        program.run(kernel.metadata.num_warps)
