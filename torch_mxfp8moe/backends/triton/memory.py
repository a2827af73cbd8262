"""Where elements lie: a weight's (:mod:`torch_mxfp8moe.layouts`, as arithmetic in a kernel), and those of rows."""

import triton
import triton.language as tl

from ...layouts import Permutation

PRODUCT_ORDER = (3, 2, 1, 5, 4, 0)
"""The order in which :mod:`.hopper` multiplies 64 columns: the bits of a column's number, from the highest bit of its
position down."""


def order(prefix: str, permutation: Permutation, shape: tuple[int, int, int]) -> dict:
    """Constants that tell a kernel where the elements of a permuted [E, R, C] tensor lie; their names begin with
    ``prefix``."""
    rows, columns = permutation.strides(shape)
    return {
        f"{prefix}EXPERT_STRIDE": shape[1] * shape[2],
        f"{prefix}ROWS": tuple(number for digit in rows for number in digit),
        f"{prefix}ROW_DIGITS": len(rows),
        f"{prefix}COLUMNS": tuple(number for digit in columns for number in digit),
        f"{prefix}COLUMN_DIGITS": len(columns),
    }


@triton.jit
def offset(index, DIGITS: tl.constexpr, COUNT: tl.constexpr):
    """Where ``index`` along one axis of a weight lies in memory: DIGITS has (divisor, size, stride) for each of COUNT
    mixed-radix digits of the index, the fastest last (:meth:`torch_mxfp8moe.layouts.Permutation.strides`)."""
    total = index * 0
    for i in tl.static_range(COUNT):
        digit = index // DIGITS[3 * i]
        if i > 0:
            digit = digit % DIGITS[3 * i + 1]
        total += digit * DIGITS[3 * i + 2]
    return total


@triton.jit
def in_product_order(position):
    """The column that is at ``position``, or the row."""
    return (position & -64) | (position & 1) | (position >> 3 & 7) << 1 | (position >> 1 & 3) << 4


@triton.jit
def to_product_order(values):
    """values [N, 32], blocks of neighbouring columns, N even -> [N / 2, 64], each 64 of them in product order."""
    half: tl.constexpr = values.shape[0] // 2
    return tl.reshape(tl.permute(tl.reshape(values, (half, 2, 2, 2, 2, 2, 2)), (0, 3, 4, 5, 1, 2, 6)), (half, 64))


assert PRODUCT_ORDER == (3, 2, 1, 5, 4, 0)  # which these two are made for
