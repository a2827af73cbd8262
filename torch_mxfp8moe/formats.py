"""The MXFP8 number format: 32 ``float8_e4m3fn`` codes that share one E8M0 scale byte.

Constants and bit tricks that every implementation shares. The format is OCP Microscaling Formats (MX) v1.0
(https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf), sections 5.2 and 6.3.
"""

import ctypes
import math
from typing import overload

import torch

BLOCK = 32
"""Values along the last dimension that share one scale byte."""

E4M3_MAX = 448.0
"""Largest finite ``float8_e4m3fn``, 1.75 * 2^8."""

E4M3_NAN = 0x7F
"""The NaN code written to blocks that held Inf or NaN (0xFF is the other one)."""

SCALE_NAN = 0xFF
"""The scale byte that means NaN."""

SCALE_ONE = 0x7F
"""The scale byte of 1.0: byte b means 2^(b - 127). Padding uses it."""

SCALE_ROUNDINGS = ("rceil", "floor", "ceil", "even")
"""torchao's ``ScaleCalculationMode`` names in lower case."""

SCALE_DTYPES = (torch.uint8, torch.float8_e8m0fnu)
"""dtypes in which a tensor of scale bytes is taken. The ops return uint8."""

HIGH_PRECISION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""dtypes that quantise to MXFP8, and to which it dequantises."""


def rceil_slack(exponent: int) -> int:
    """Mantissa excess, in ulp, that ``rceil`` does not see at a biased fp32 ``exponent`` of ``amax / 448``.

    ``rceil`` is 2^ceil(log2(amax / 448)) with log2 taken in fp32, as torchao's ``_to_mx_rceil`` does. Just above a
    power of two 2^k the fp32 log2 rounds back to k, so up to this many ulp above 2^k still count as 2^k:
    log2(1 + j 2^-23) < half the fp32 spacing above k, that is j < ln(2) / 2 * 2^floor(log2 |k|). The largest value
    of such a block then saturates at 448 instead of rounding to it, which is the same code. Exponent 0 (amax / 448
    subnormal) is counted in units of 2^-149 above 2^-127, the point between scale bytes 0 and 1.
    """
    if exponent == 0:
        return rceil_slack(1) // 2  # the same distance in twice the ulp: subnormals in [2^-127, 2^-126) have 22 bits
    k = exponent - 127
    distance = k if k >= 0 else -k - 1  # the fp32 spacing between k and the next value up
    return 0 if distance == 0 else int(2 ** math.floor(math.log2(distance)) * math.log(2) / 2)


RCEIL_SLACK = tuple(rceil_slack(exponent) for exponent in range(255))
"""``rceil_slack`` of each biased exponent of a finite fp32."""


def rounded_to_fp32(value: float) -> float:
    """What a kernel computes with where it is given ``value``; infinite beyond fp32's range."""
    return ctypes.c_float(value).value


@overload
def as_bytes(scale: torch.Tensor) -> torch.Tensor: ...
@overload
def as_bytes(scale: None) -> None: ...
def as_bytes(scale: torch.Tensor | None) -> torch.Tensor | None:
    """A ``float8_e8m0fnu`` or uint8 scale tensor, viewed as uint8; anything else as it is."""
    if isinstance(scale, torch.Tensor) and scale.dtype is torch.float8_e8m0fnu:
        return scale.view(torch.uint8)
    return scale
