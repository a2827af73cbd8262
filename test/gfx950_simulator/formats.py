"""The 8-bit floating-point formats of the matrix unit, by table: OCP "8-bit Floating Point Specification" (OFP8)."""

import numpy as np


def _decode(exponent_bits: int, bias: int, infinities: bool) -> np.ndarray:
    mantissa_bits = 7 - exponent_bits
    code = np.arange(256)
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = code & (1 << mantissa_bits) - 1
    fraction = mantissa / (1 << mantissa_bits)
    value = np.where(exponent == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, exponent - bias))
    top = exponent == (1 << exponent_bits) - 1
    if infinities:
        value = np.where(top, np.where(mantissa == 0, np.inf, np.nan), value)
    else:
        value = np.where(code & 0x7F == 0x7F, np.nan, value)
    return np.where(code >= 128, -value, value)


DECODE = {"fp8": _decode(4, 7, False), "bf8": _decode(5, 15, True)}
"""e4m3fn and e5m2: the value of each code, float64."""
LARGEST = {name: float(values[np.isfinite(values)].max()) for name, values in DECODE.items()}
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""e2m1."""


def encode(x: np.ndarray, format_: str) -> np.ndarray:
    """The code of the nearest value, ties to even; beyond the largest, NaN (e4m3) or infinity (e5m2)."""
    positive = DECODE[format_][:128]
    finite = int(np.isfinite(positive).sum())
    values = positive[:finite]
    magnitude = np.abs(x)
    upper = np.clip(np.searchsorted(values, magnitude), 1, finite - 1)
    lower = upper - 1
    middle = (values[lower] + values[upper]) / 2
    code = np.where((magnitude > middle) | ((magnitude == middle) & (upper % 2 == 0)), upper, lower)
    limit = values[-1] + (values[-1] - values[-2]) / 2
    overflow = (magnitude > limit) | ((magnitude == limit) & (finite % 2 == 0))
    code = np.where(overflow, finite, code)
    code = np.where(np.isnan(x), 0x7F, code)
    return (code | np.signbit(x) * 128).astype(np.uint8)
