"""Weight layouts: the order in which the bytes of an expert weight and its scales lie in memory.

A layout is one index permutation of the weight and one of the scales, for each of the two weights of an expert. It
is written here once; the reference applies it with ``view`` and ``permute``, the C++ kernel with the offset tables of
:meth:`Permutation.offsets`, and ``fused_moe`` on plain PyTorch undoes it with :meth:`Layout.restore`.

Named dimensions: E experts, R rows of an expert's weight, C its columns, Cs columns of its scales. For the gate and up
projections (``gate_up=True``, w1) R = 2I and C = H, all gate rows before all up rows; for the down projection (w2)
R = H and C = I. Cs = C / 32, rounded up to what the layout asks for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from .formats import BLOCK, SCALE_ONE, as_bytes

__all__ = ["AITER_GFX950", "LAYOUTS", "Layout", "Permutation", "ROW_MAJOR", "pad_intermediate", "padded_intermediate"]

Digit = tuple[int, int, int]
"""(divisor, size, stride) of one mixed-radix digit of an index; see :meth:`Permutation.strides`."""


@dataclass(frozen=True)
class Permutation:
    """View a [E, R, C] tensor as ``split(E, R, C)``, permute by ``order``; memory then holds the result's order."""

    split: Callable[[int, int, int], tuple[int, ...]]
    order: tuple[int, ...]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [E, R, C] -> the same elements, permuted, flat."""
        return x.reshape(self.split(*x.shape)).permute(self.order).reshape(-1)

    def invert(self, x: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        """The inverse of :meth:`apply`: x of any shape -> [E, R, C] = ``shape``."""
        split = self.split(*shape)
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return x.reshape([split[d] for d in self.order]).permute(inverse).reshape(shape)

    def strides(self, shape: tuple[int, int, int]) -> tuple[tuple[Digit, ...], tuple[Digit, ...]]:
        """The permutation as arithmetic: where element (r, c) of an expert goes. Experts lie R * C apart.

        Returns the mixed-radix digits of r and those of c: (divisor, size, stride), the fastest last. An index
        contributes ``index // divisor % size * stride`` for each of its digits.
        """
        split = self.split(*shape)
        stride, strides = 1, {}
        for d in reversed(self.order):
            strides[d] = stride
            stride *= split[d]
        dimensions = [d for d in reversed(range(len(split))) if split[d] > 1]

        def digits_of(length: int) -> tuple[Digit, ...]:
            digits, divisor = [(1, 1, 0)] if length == 1 else [], 1
            while divisor < length:
                d = dimensions.pop(0)
                size = min(split[d], length // divisor)  # the slowest dimension of r may hold e as well
                digits.append((divisor, size, strides[d]))
                divisor *= size
            return tuple(reversed(digits))

        columns = digits_of(shape[2])
        return digits_of(shape[1]), columns

    def offsets(self, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The permutation as two tables: element (e, r, c) goes to ``rows[e, r] + columns[c // run] + c % run``.

        Any permutation that splits rows and columns apart has this form. Returns rows [E, R] and columns [C / run],
        int64 on the CPU, and ``run``, how many neighbours along a row stay neighbours.
        """
        return _offsets(self, tuple(shape))


@lru_cache(maxsize=64)
def _offsets(permutation: Permutation, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
    experts, rows, columns = shape
    row_digits, column_digits = permutation.strides(shape)

    def offset(length: int, digits: tuple[Digit, ...]) -> torch.Tensor:
        index = torch.arange(length)
        return sum((index // divisor % size * stride for divisor, size, stride in digits), torch.zeros_like(index))

    row = torch.arange(experts).unsqueeze(1) * (rows * columns) + offset(rows, row_digits)
    column = offset(columns, column_digits)
    _, size, stride = column_digits[-1]
    run = size if stride == 1 else 1
    return row, column[::run].contiguous(), run


@dataclass(frozen=True)
class Layout:
    """One memory layout of expert weights; see the module's docstring for E, R, C and Cs."""

    name: str
    weight: dict[bool, Permutation]
    """By ``gate_up``: the permutation of the weight's [E, R, C]."""
    scale: dict[bool, Permutation]
    """By ``gate_up``: the permutation of the scale's [E, R, Cs]."""
    flat_scale: bool
    """Scales are returned as [E * R, Cs] instead of [E, R, Cs]."""
    scale_columns: int
    """Cs is a multiple of this; what is added holds the byte 0x7F (1.0)."""
    hidden_multiple: int
    """H must be divisible by this."""
    intermediate_multiple: int
    """I must be divisible by this."""

    def why_not(self, rows: int, columns: int, gate_up: bool) -> str | None:
        """Why an expert weight of [rows, columns] cannot be held in this layout, or None if it can."""
        hidden, intermediate = (columns, rows // 2) if gate_up else (rows, columns)
        for name, size, multiple in (
            ("hidden", hidden, self.hidden_multiple),
            ("intermediate", intermediate, self.intermediate_multiple),
        ):
            if size % multiple:
                return f"layout '{self.name}' takes {name} sizes divisible by {multiple}, not {size}"
        return None

    def padded_scale_columns(self, columns: int) -> int:
        """Cs for a weight with C ``columns``."""
        return -(-(columns // BLOCK) // self.scale_columns) * self.scale_columns

    def scale_shape(self, experts: int, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of the scale tensor of a weight [experts, rows, columns]."""
        scale_columns = self.padded_scale_columns(columns)
        return (experts * rows, scale_columns) if self.flat_scale else (experts, rows, scale_columns)

    def arrange(self, weight: torch.Tensor, scale: torch.Tensor, gate_up: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """weight [E, R, C] e4m3fn and scale [E, R, C/32], checkpoint order -> both in this layout; scale as uint8."""
        experts, rows, columns = weight.shape
        padding = self.padded_scale_columns(columns) - columns // BLOCK
        padded = torch.nn.functional.pad(as_bytes(scale), (0, padding), value=SCALE_ONE)
        data = self.weight[gate_up].apply(weight.view(torch.uint8)).reshape(weight.shape).view(weight.dtype)
        return data, self.scale[gate_up].apply(padded).reshape(self.scale_shape(experts, rows, columns))

    def restore(self, weight: torch.Tensor, scale: torch.Tensor, gate_up: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of :meth:`arrange`; the padding of the scales is dropped."""
        experts, rows, columns = weight.shape
        padded = (experts, rows, self.padded_scale_columns(columns))
        data = self.weight[gate_up].invert(weight.view(torch.uint8), (experts, rows, columns)).view(weight.dtype)
        return data, self.scale[gate_up].invert(as_bytes(scale), padded)[..., : columns // BLOCK]


_identity = {gate_up: Permutation(lambda e, r, c: (e, r, c), (0, 1, 2)) for gate_up in (True, False)}

ROW_MAJOR = Layout(
    name="row_major",
    weight=_identity,
    scale=_identity,
    flat_scale=False,
    scale_columns=1,
    hidden_multiple=BLOCK,
    intermediate_multiple=BLOCK,
)
"""Checkpoint order: w1 [E, 2I, H], w2 [E, H, I], scales [E, R, C/32]."""

AITER_GFX950 = Layout(
    name="aiter_gfx950",
    # The order in which a wave's lanes read MFMA operands: tiles of 16 rows x 64 bytes, in them [k 4][row 16][16
    # bytes]; w1's gate and up rows alternate in tiles of 16.
    weight={
        True: Permutation(lambda e, r, c: (e, 2, r // 32, 16, c // 64, 4, 16), (0, 2, 1, 4, 5, 3, 6)),
        False: Permutation(lambda e, r, c: (e, r // 16, 16, c // 64, 4, 16), (0, 1, 3, 4, 2, 5)),
    },
    # Four scale bytes that one lane needs together: two 128-wide halves of k times gate/up (w1) or two row tiles (w2).
    scale={
        True: Permutation(lambda e, r, c: (e, 2, r // 32, 16, c // 8, 2, 4), (0, 2, 4, 6, 3, 5, 1)),
        False: Permutation(lambda e, r, c: (e * r // 32, 2, 16, c // 8, 2, 4), (0, 3, 5, 2, 4, 1)),
    },
    flat_scale=True,
    scale_columns=8,
    hidden_multiple=256,
    intermediate_multiple=128,
)
"""aiter's FlyDSL kernels on gfx950: the bytes of its ``shuffle_weight`` and ``shuffle_scale`` for per_1x32 fp8 with
interleaved gate and up (https://github.com/ROCm/aiter, aiter/ops/shuffle.py and aiter/utility/fp4_utils.py)."""

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (ROW_MAJOR, AITER_GFX950)}
"""Every layout by name."""


def padded_intermediate(weight_shape: Sequence[int], gate_up: bool, pad_to: int) -> tuple[int, int, int]:
    """The shape [E, R, C] of a weight whose intermediate size I is rounded up to a multiple of ``pad_to``."""
    experts, rows, columns = weight_shape
    if gate_up:
        return experts, -(-rows // (2 * pad_to)) * 2 * pad_to, columns
    return experts, rows, -(-columns // pad_to) * pad_to


def pad_intermediate(
    weight: torch.Tensor, scale: torch.Tensor, gate_up: bool, pad_to: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round I up to a multiple of ``pad_to`` with zero weights whose scale is 1.0; changes no result.

    weight [E, R, C], scale [E, R, C/32] in checkpoint order; the rows of each half grow for w1, the columns for w2.
    """
    experts, rows, columns = weight.shape
    _, padded_rows, padded_columns = padded_intermediate(weight.shape, gate_up, pad_to)
    data, scale = weight.view(torch.uint8), as_bytes(scale)
    if gate_up:
        extra = (padded_rows - rows) // 2
        data = torch.nn.functional.pad(data.reshape(experts, 2, rows // 2, columns), (0, 0, 0, extra))
        scale = torch.nn.functional.pad(
            scale.reshape(experts, 2, rows // 2, columns // BLOCK), (0, 0, 0, extra), value=SCALE_ONE
        )
    else:
        extra = padded_columns - columns
        data = torch.nn.functional.pad(data, (0, extra))
        scale = torch.nn.functional.pad(scale, (0, extra // BLOCK), value=SCALE_ONE)
    shape = (experts, padded_rows, padded_columns)
    return data.reshape(shape).view(weight.dtype), scale.reshape(*shape[:2], padded_columns // BLOCK)
