"""Where the elements of a weight lie: :mod:`torch_mxfp8moe.layouts` as arithmetic in a kernel."""

import triton
import triton.language as tl

from ...layouts import Permutation


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
