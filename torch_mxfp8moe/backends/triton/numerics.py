"""The MXFP8 number format inside Triton kernels: scale bytes, codes and values.

All but ``encode_natively`` is integer arithmetic on the bits of fp32: it gives the same bytes on every GPU, needs no
fp8 type (sm_80 has none), and does not depend on how a compiler divides or rounds. The definition is
:mod:`torch_mxfp8moe.reference`.
"""

import triton
import triton.language as tl

from ... import formats

BLOCK = tl.constexpr(formats.BLOCK)
SCALE_NAN = tl.constexpr(formats.SCALE_NAN)
SCALE_ONE = tl.constexpr(formats.SCALE_ONE)
E4M3_NAN = tl.constexpr(formats.E4M3_NAN)

assert formats.E4M3_MAX == 1.75 * 2**8  # what the bit patterns below are made for
MAX_EXPONENT = tl.constexpr(8)
MAX_MANTISSA = tl.constexpr(0x600000)
MAX_CODE = tl.constexpr(0x7E)

HELD_TIMES = tl.constexpr(2.0**3)
"""Activations that are held as bf16 are held times this, and weights divided by it: MXFP8 values are multiples of
2^-136, bf16 ones of 2^-133, and it is among activations that tiny ones have few bits above that."""

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter."""


def rceil_excess(exponent: int) -> int:
    """How far above 1.75 a block's largest mantissa may be, in ulp, without its scale going up by one.

    ``exponent`` is the biased one of amax / 448, where amax has a mantissa of 1.75 or more. With M its mantissa as an
    integer, fl(4 M / 7) > 2^23 + slack is, since 4 M / 7 is never half way between two integers, the same as
    8 (M - 1.75 * 2^23) > 14 slack + 7. At exponent 0: M 2^7 / 448 >= 2^22 + slack + 1/2, a tie goes to even, so up.
    """
    slack = formats.rceil_slack(exponent)
    if exponent == 0:
        return -(-(448 * slack + 224) // 128) - 1
    return (14 * slack + 7) // 8


_DISTANCES = range(1, 128)
_STEPS = [d for d in _DISTANCES if rceil_excess(127 + d) != rceil_excess(126 + d)]
RCEIL_STEPS = tl.constexpr(len(_STEPS))
RCEIL_FROM = tl.constexpr(tuple(_STEPS))
RCEIL_EXCESS = tl.constexpr(tuple(rceil_excess(127 + d) for d in _STEPS))
"""Of an exponent k without bias, and of -k - 1: from k = RCEIL_FROM[i] on, the excess is RCEIL_EXCESS[i]."""
RCEIL_EXCESS_0 = tl.constexpr(rceil_excess(0))
"""Of the biased exponent 0."""

assert all(rceil_excess(127 + d) == rceil_excess(126 - d) for d in range(126)) and rceil_excess(127) == 0


@triton.jit
def block_amax(x):
    """x [N, 32] fp32 -> the bits of each block's largest magnitude [N] int32; above 0x7F7FFFFF for Inf and NaN."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def scale_byte(amax, ROUNDING: tl.constexpr):
    """Bits of amax, int32 of any shape -> E8M0 byte, int32. ROUNDING as in :func:`..reference.scale_bytes`."""
    if ROUNDING == "rceil":
        exponent = (amax >> 23) - MAX_EXPONENT
        distance = exponent - 127
        distance ^= distance >> 31
        limit = amax & 0  # zeros, in Gluon as well
        for i in tl.static_range(RCEIL_STEPS):
            limit = tl.where(distance >= RCEIL_FROM[i], RCEIL_EXCESS[i], limit)
        limit = tl.where(exponent == 0, RCEIL_EXCESS_0, limit)
        up = (exponent >= 0) & ((amax & 0x7FFFFF) - MAX_MANTISSA > limit)
        byte = tl.maximum(exponent, 0) + up.to(tl.int32)
    else:
        bits = amax
        if ROUNDING == "even":
            bits += 1 << 19
        byte = bits >> 23
        if ROUNDING == "ceil":
            byte += ((bits & 0x7FFFFF) > 0).to(tl.int32)
        byte = tl.maximum(byte - MAX_EXPONENT, 0)
    return tl.where(amax >= 0x7F800000, SCALE_NAN, byte)


@triton.jit
def encode(x, byte):
    """x [N, 32] fp32, byte [N, 1] int32 -> e4m3 codes [N, 32] int32 of x * 2^(127 - byte), saturated."""
    scaled = x * ((254 - byte) << 23).to(tl.float32, bitcast=True)
    bits = scaled.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 4 bits of exponent and 3 of mantissa, rounded by a carry; e4m3's bias is 120 below that of fp32.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count multiples of 2^-9, which is the fp32 spacing from 2^14 up.
    subnormal = (tl.abs(scaled) + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
    code = tl.where(magnitude < (121 << 23), subnormal, tl.minimum(normal, MAX_CODE))
    code |= (bits >> 24) & 0x80
    return tl.where(byte == SCALE_NAN, E4M3_NAN, code)


@triton.jit
def encode_natively(x, byte):
    """:func:`encode` by the GPU's own conversion, which rounds the same way, -> uint8. byte: of rounding ``rceil``,
    after which nothing rounds to more than the largest code."""
    scaled = x * ((254 - byte) << 23).to(tl.float32, bitcast=True)
    scaled = tl.where(byte == SCALE_NAN, float("nan"), scaled)
    return scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def decode(code):
    """e4m3 codes, int32 -> their values, fp32."""
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == E4M3_NAN, float("nan"), value)
    sign = (code & 0x80) << 24  # -value is 0 - value in Triton, which is +0 for the code of -0
    return (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def encoded(x, byte, NATIVE_E4M3: tl.constexpr):
    """x [N, 32] fp32, byte [N, 1] int32 of rounding ``rceil`` -> codes, uint8, by an instruction if there is one."""
    return encode_natively(x, byte) if NATIVE_E4M3 else encode(x, byte).to(tl.uint8)


@triton.jit
def decoded(code, NATIVE_E4M3: tl.constexpr):
    """Codes, uint8 -> their values, fp32, by an instruction if there is one."""
    return code.to(tl.float8e4nv, bitcast=True).to(tl.float32) if NATIVE_E4M3 else decode(code.to(tl.int32))


@triton.jit
def factor(byte):
    """E8M0 bytes, int32 -> 2^(byte - 127), fp32; NaN for 255."""
    bits = tl.where(byte == 0, 0x400000, byte << 23)
    return tl.where(byte == SCALE_NAN, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x, of a float type, in ``dtype``, rounded to nearest even.

    By integers in Triton's interpreter, which (3.6 to 3.9) truncates what becomes bf16 and loses bf16's subnormals.
    """
    if INTERPRETED:
        if x.dtype == tl.bfloat16:
            x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        if dtype == tl.bfloat16:
            bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
            bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
            x = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def swiglu(gate, up, alpha, beta, limit, LIMITED: tl.constexpr):
    """gate * sigmoid(alpha * gate) * (up + beta), fp32; LIMITED: of a gate at most, an up within, ``limit``."""
    if LIMITED:  # comparisons that keep NaN
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate / (1.0 + tl.exp(-alpha * gate)) * (up + beta)
