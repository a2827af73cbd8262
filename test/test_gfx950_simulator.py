"""The gfx950 simulator: instructions against arithmetic done another way, then Triton's kernels, then ours."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from helpers import (
    FLOATS, MODES, assert_agrees, assert_equal, moe_inputs, only_cpu, randn, relative_l2, same_bytes, weights,
)  # fmt: skip
from torch_mxfp8moe import configs, reference
from torch_mxfp8moe.arguments import Preshuffle, QuantizePreshuffle
from torch_mxfp8moe.backends.triton import _interpreted

pytest.importorskip("triton", reason="needs Triton: pip install triton")
pytest.importorskip("numpy", "2.0")
if _interpreted():
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled", allow_module_level=True)

import gfx950_kernels as kernels  # noqa: E402
import gfx950_ops as ops  # noqa: E402
from gfx950_kernels import compile_, compile_text, execute, run  # noqa: E402
from gfx950_simulator import checks, formats, hazards, launch  # noqa: E402
from gfx950_simulator.assembly import AssemblyError, instruction, operand, parse  # noqa: E402
from gfx950_simulator.machine import Program, SimulationError  # noqa: E402
from torch_mxfp8moe.backends.triton import numerics  # noqa: E402

pytestmark = only_cpu

M32, M64 = 2**32 - 1, 2**64 - 1
ONES, FOUR_WAVES = np.ones(64, np.uint32), np.arange(256, dtype=np.uint32)


@pytest.fixture(scope="module", autouse=True)
def speed():
    launch.total.wave_instructions = launch.total.seconds = 0
    yield
    print(f"\ngfx950 simulator: {launch.total}")


# --- instructions: each case is the text and what it gives for the work-item's inputs a, b, c, as Python numbers


def signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def f32(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


def bits_of(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


def f16(bits: int) -> float:
    return float(np.uint16(bits & 0xFFFF).view(np.float16))


def f16_bits(x: float) -> int:
    return int(np.float16(x).view(np.uint16))


def nearest(exact: Fraction) -> int:
    """Bits of the float32 nearest to ``exact``, ties to even; ``exact`` is not 0 and within float32's range."""
    guess = np.float32(float(exact))
    candidates = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    best = min(candidates, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))
    return int(best.view(np.uint32))


def clamp(x: int, low: int, high: int) -> int:
    return max(low, min(high, x))


_EDGES = [0, 1, 2, 31, 32, 63, 0x7F, 0x80, 0xFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, M32]


def integers(seed: int) -> np.ndarray:
    """64 words: edge cases in an order of their own, then random."""
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(_EDGES), random.integers(0, 2**32, 48)]).astype(np.uint32)


def floats(seed: int, spread: float = 4.0) -> np.ndarray:
    """64 float32 of either sign over some binades, as words."""
    random = np.random.default_rng(seed)
    return (random.standard_normal(64) * 2 ** (spread * random.standard_normal(64))).astype(np.float32).view(np.uint32)


def shift(a: int) -> int:
    return a & 31


INTEGER = [
    ("v_mov_b32_e32 v10, v1", lambda a, b, c: a),
    ("v_mov_b32_e32 v10, 0x1234", lambda a, b, c: 0x1234),
    ("v_mov_b32_e32 v10, -7", lambda a, b, c: M32 - 6),
    ("v_not_b32_e32 v10, v1", lambda a, b, c: ~a),
    ("v_bfrev_b32_e32 v10, v1", lambda a, b, c: int(f"{a:032b}"[::-1], 2)),
    ("v_ffbh_u32_e32 v10, v1", lambda a, b, c: 32 - a.bit_length() if a else -1),
    ("v_ffbl_b32_e32 v10, v1", lambda a, b, c: (a & -a).bit_length() - 1 if a else -1),
    ("v_bcnt_u32_b32 v10, v1, v2", lambda a, b, c: a.bit_count() + b),
    ("v_add_u32_e32 v10, v1, v2", lambda a, b, c: a + b),
    ("v_add_u32_e64 v10, v1, v2 clamp", lambda a, b, c: min(a + b, M32)),
    ("v_sub_u32_e32 v10, v1, v2", lambda a, b, c: a - b),
    ("v_sub_u32_e64 v10, v1, v2 clamp", lambda a, b, c: max(a - b, 0)),
    ("v_subrev_u32_e32 v10, v1, v2", lambda a, b, c: b - a),
    ("v_add_i32 v10, v1, v2 clamp", lambda a, b, c: clamp(signed(a) + signed(b), -(2**31), 2**31 - 1)),
    ("v_mul_lo_u32 v10, v1, v2", lambda a, b, c: a * b),
    ("v_mul_hi_u32 v10, v1, v2", lambda a, b, c: a * b >> 32),
    ("v_mul_hi_i32 v10, v1, v2", lambda a, b, c: signed(a) * signed(b) >> 32),
    ("v_mul_u32_u24_e32 v10, v1, v2", lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF)),
    ("v_mul_i32_i24_e32 v10, v1, v2", lambda a, b, c: signed(a & 0xFFFFFF, 24) * signed(b & 0xFFFFFF, 24)),
    ("v_mad_u32_u24 v10, v1, v2, v3", lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c),
    ("v_mad_i32_i24 v10, v1, v2, v3", lambda a, b, c: signed(a & 0xFFFFFF, 24) * signed(b & 0xFFFFFF, 24) + c),
    ("v_and_b32_e32 v10, v1, v2", lambda a, b, c: a & b),
    ("v_or_b32_e32 v10, v1, v2", lambda a, b, c: a | b),
    ("v_xor_b32_e32 v10, v1, v2", lambda a, b, c: a ^ b),
    ("v_xnor_b32_e32 v10, v1, v2", lambda a, b, c: ~(a ^ b)),
    ("v_lshlrev_b32_e32 v10, v1, v2", lambda a, b, c: b << shift(a)),
    ("v_lshrrev_b32_e32 v10, v1, v2", lambda a, b, c: b >> shift(a)),
    ("v_ashrrev_i32_e32 v10, v1, v2", lambda a, b, c: signed(b) >> shift(a)),
    ("v_min_u32_e32 v10, v1, v2", lambda a, b, c: min(a, b)),
    ("v_max_u32_e32 v10, v1, v2", lambda a, b, c: max(a, b)),
    ("v_min_i32_e32 v10, v1, v2", lambda a, b, c: min(signed(a), signed(b))),
    ("v_max_i32_e32 v10, v1, v2", lambda a, b, c: max(signed(a), signed(b))),
    ("v_min3_u32 v10, v1, v2, v3", lambda a, b, c: min(a, b, c)),
    ("v_max3_i32 v10, v1, v2, v3", lambda a, b, c: max(map(signed, (a, b, c)))),
    ("v_med3_i32 v10, v1, v2, v3", lambda a, b, c: sorted(map(signed, (a, b, c)))[1]),
    ("v_med3_u32 v10, v1, v2, v3", lambda a, b, c: sorted((a, b, c))[1]),
    ("v_lshl_add_u32 v10, v1, v2, v3", lambda a, b, c: (a << shift(b)) + c),
    ("v_add_lshl_u32 v10, v1, v2, v3", lambda a, b, c: (a + b & M32) << shift(c)),
    ("v_lshl_or_b32 v10, v1, v2, v3", lambda a, b, c: a << shift(b) | c),
    ("v_and_or_b32 v10, v1, v2, v3", lambda a, b, c: a & b | c),
    ("v_or3_b32 v10, v1, v2, v3", lambda a, b, c: a | b | c),
    ("v_xad_u32 v10, v1, v2, v3", lambda a, b, c: (a ^ b) + c),
    ("v_add3_u32 v10, v1, v2, v3", lambda a, b, c: a + b + c),
    ("v_bfi_b32 v10, v1, v2, v3", lambda a, b, c: a & b | ~a & c),
    ("v_bfe_u32 v10, v1, v2, v3", lambda a, b, c: a >> shift(b) & (1 << shift(c)) - 1),
    ("v_bfe_i32 v10, v1, 5, 9", lambda a, b, c: signed(a >> 5 & 511, 9)),
    ("v_bfe_i32 v10, v1, 20, 31", lambda a, b, c: signed(a >> 20, 31)),
    ("v_bfm_b32 v10, v1, v2", lambda a, b, c: ((1 << shift(a)) - 1) << shift(b)),
    ("v_alignbit_b32 v10, v1, v2, v3", lambda a, b, c: (a << 32 | b) >> shift(c)),
    ("v_alignbyte_b32 v10, v1, v2, v3", lambda a, b, c: (a << 32 | b) >> 8 * (c & 3)),
    ("v_bitop3_b32 v10, v1, v2, v3 bitop3:0xca", lambda a, b, c: a & b | ~a & c),
    ("v_bitop3_b32 v10, v1, v2, v3 bitop3:0x96", lambda a, b, c: a ^ b ^ c),
    ("v_bitop3_b32 v10, v1, v2, v3 bitop3:0x40", lambda a, b, c: a & b & ~c),
    ("v_lshlrev_b16_e32 v10, v1, v2", lambda a, b, c: (b << (a & 15)) & 0xFFFF),
    ("v_ashrrev_i16_e32 v10, v1, v2", lambda a, b, c: signed(b & 0xFFFF, 16) >> (a & 15) & 0xFFFF),
    ("v_add_u16_e32 v10, v1, v2", lambda a, b, c: a + b & 0xFFFF),
    ("v_max_i16_e32 v10, v1, v2", lambda a, b, c: max(signed(a & 0xFFFF, 16), signed(b & 0xFFFF, 16)) & 0xFFFF),
    ("v_mbcnt_lo_u32_b32 v10, -1, 0\nv_mbcnt_hi_u32_b32 v10, -1, v10\nv_add_u32_e32 v10, v10, v1",
     lambda a, b, c, lane=None: a + lane),
    ("v_cvt_f32_ubyte2_e32 v10, v1", lambda a, b, c: bits_of(a >> 16 & 255)),
    ("v_cvt_f32_u32_e32 v10, v1", lambda a, b, c: bits_of(a)),
    ("v_cvt_f32_i32_e32 v10, v1", lambda a, b, c: bits_of(signed(a))),
]  # fmt: skip

SDWA = [
    ("v_or_b32_sdwa v10, v1, v2 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1 src1_sel:BYTE_0",
     lambda a, b, c: a >> 16 | b & 255),
    ("v_and_b32_sdwa v10, v1, v2 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_3 src1_sel:DWORD",
     lambda a, b, c: a >> 24 & b),
    ("v_lshlrev_b32_sdwa v10, v1, v2 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_1 src1_sel:WORD_0",
     lambda a, b, c: (b & 0xFFFF) << shift(a >> 8 & 255)),
    ("v_or_b32_sdwa v10, v1, v2 dst_sel:WORD_1 dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:DWORD",
     lambda a, b, c: (a | b) << 16),
    ("v_mov_b32_e32 v10, v3\ns_nop 1\nv_or_b32_sdwa v10, v1, v2 dst_sel:BYTE_1 dst_unused:UNUSED_PRESERVE "
     "src0_sel:DWORD src1_sel:BYTE_2", lambda a, b, c: (a | b >> 16 & 255) << 8 & 0xFF00 | c & ~0xFF00),
    ("v_add_u32_sdwa v10, sext(v1), v2 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_2 src1_sel:DWORD",
     lambda a, b, c: signed(a >> 16 & 255, 8) + b),
    ("v_max_u16_sdwa v10, v1, v2 dst_sel:WORD_1 dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:DWORD",
     lambda a, b, c: max(a & 0xFFFF, b & 0xFFFF) << 16),
    ("v_cvt_f32_f16_sdwa v10, v1 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1",
     lambda a, b, c: bits_of(f16(a >> 16)) if math.isfinite(f16(a >> 16)) else None),
]  # fmt: skip


def check(text: str, oracle, inputs: list[np.ndarray]) -> None:
    """oracle: a, b, c of a lane -> the result's word, in any range; None: not compared."""
    (got,) = execute(text, *inputs)
    takes_lane = "lane" in oracle.__code__.co_varnames[: oracle.__code__.co_argcount]
    for lane, values in enumerate(zip(*(x.tolist() for x in inputs))):
        want = oracle(*values, lane=lane) if takes_lane else oracle(*values)
        if want is not None:
            assert got[lane] == want & M32, f"{text}: {[hex(x) for x in values]}: {got[lane]:#x}, not {want & M32:#x}"


@pytest.mark.parametrize("text, oracle", INTEGER + SDWA, ids=lambda x: x.split()[0] if isinstance(x, str) else "")
def test_integer_instructions(text, oracle):
    check(text, oracle, [integers(i) for i in range(3)])


def test_perm():
    """v_perm_b32: bytes of two registers, their signs, and constants."""
    selects = np.array([int.from_bytes(np.random.default_rng(i).integers(0, 14, 4, np.uint8)) for i in range(64)])

    def oracle(a, b, c):
        octets = [*b.to_bytes(4, "little"), *a.to_bytes(4, "little")]
        signs = [255 * (octets[i] >> 7) for i in (1, 3, 5, 7)]
        table = [*octets, *signs, 0, 255]
        return int.from_bytes([table[s] for s in c.to_bytes(4, "little")], "little")

    check("v_perm_b32 v10, v1, v2, v3", oracle, [integers(0), integers(1), selects.astype(np.uint32)])


@pytest.mark.parametrize(
    "text, oracle",
    [
        ("v_lshlrev_b64 v[10:11], v3, v[1:2]", lambda x, c: x << (c & 63)),
        ("v_lshrrev_b64 v[10:11], v3, v[1:2]", lambda x, c: x >> (c & 63)),
        ("v_ashrrev_i64 v[10:11], v3, v[1:2]", lambda x, c: signed(x, 64) >> (c & 63)),
        ("v_lshl_add_u64 v[10:11], v[1:2], 3, v[1:2]", lambda x, c: (x << 3) + x),
        ("v_mad_u64_u32 v[10:11], s[20:21], v1, v3, v[1:2]", lambda x, c: (x & M32) * c + x),
        ("v_mov_b64_e32 v[10:11], v[1:2]", lambda x, c: x),
        ("v_add_co_u32_e32 v10, vcc, v1, v3\ns_nop 1\nv_addc_co_u32_e32 v11, vcc, 0, v2, vcc", lambda x, c: x + c),
        ("v_sub_co_u32_e32 v10, vcc, v1, v3\ns_nop 1\nv_subbrev_co_u32_e32 v11, vcc, 0, v2, vcc", lambda x, c: x - c),
        ("v_sub_co_u32_e64 v10, s[20:21], v1, v3\ns_nop 1\nv_subb_co_u32_e64 v11, s[20:21], v2, 0, s[20:21]",
         lambda x, c: x - c),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)  # fmt: skip
def test_64_bit_instructions(text, oracle):
    low, high, c = (integers(i) for i in range(3))
    results = execute(text, low, high, c, outputs=("v10", "v11"))
    for lane, (a, b, s) in enumerate(zip(low.tolist(), high.tolist(), c.tolist())):
        assert int(results[0][lane]) | int(results[1][lane]) << 32 == oracle(a | b << 32, s) & M64


FLOAT = [
    ("v_add_f32_e32 v10, v1, v2", lambda a, b, c: nearest(a + b)),
    ("v_sub_f32_e32 v10, v1, v2", lambda a, b, c: nearest(a - b)),
    ("v_mul_f32_e32 v10, v1, v2", lambda a, b, c: nearest(a * b)),
    ("v_mul_f32_e64 v10, -v1, |v2|", lambda a, b, c: nearest(-a * abs(b))),
    ("v_add_f32_e64 v10, v1, v2 mul:2", lambda a, b, c: nearest((a + b) * 2)),
    ("v_add_f32_e64 v10, v1, 0.5 clamp", lambda a, b, c: nearest(min(max(a + Fraction(1, 2), 0), 1)) if
     a + Fraction(1, 2) > 0 else 0),
    ("v_max_f32_e32 v10, v1, v2", lambda a, b, c: nearest(max(a, b))),
    ("v_min_f32_e32 v10, v1, v2", lambda a, b, c: nearest(min(a, b))),
    ("v_max3_f32 v10, v1, v2, v3", lambda a, b, c: nearest(max(a, b, c))),
    ("v_med3_f32 v10, v1, v2, v3", lambda a, b, c: nearest(sorted((a, b, c))[1])),
    ("v_fma_f32 v10, v1, v2, v3", lambda a, b, c: nearest(a * b + c)),
    ("v_fma_f32 v10, v1, -v2, v3", lambda a, b, c: nearest(-a * b + c)),
    ("v_mov_b32_e32 v10, v3\nv_fmac_f32_e32 v10, v1, v2", lambda a, b, c: nearest(a * b + c)),
    ("v_fmamk_f32 v10, v1, 0x40400000, v2", lambda a, b, c: nearest(a * 3 + b)),
    ("v_fmaak_f32 v10, v1, v2, 0x40400000", lambda a, b, c: nearest(a * b + 3)),
    ("v_ldexp_f32 v10, v1, 7", lambda a, b, c: nearest(a * 128)),
    ("v_cvt_i32_f32_e32 v10, v1", lambda a, b, c: clamp(int(a), -(2**31), 2**31 - 1)),
    ("v_cvt_u32_f32_e32 v10, v1", lambda a, b, c: clamp(int(a), 0, M32)),
    ("v_cmp_lt_f32_e32 vcc, v1, v2\ns_nop 1\nv_cndmask_b32_e32 v10, v1, v2, vcc", lambda a, b, c: nearest(max(a, b))),
]  # fmt: skip


@pytest.mark.parametrize("text, oracle", FLOAT, ids=lambda x: x.split()[0] if isinstance(x, str) else "")
@pytest.mark.parametrize("seed", range(3))
def test_float_instructions(text, oracle, seed):
    """Against exact rational arithmetic, rounded once."""
    inputs = [floats(3 * seed + i) for i in range(3)]
    (got,) = execute(text, *inputs)
    for lane, words in enumerate(zip(*(x.tolist() for x in inputs))):
        want = oracle(*(Fraction(f32(word)) for word in words))
        assert got[lane] == want & M32, f"{text}: {[f32(x) for x in words]}: {f32(int(got[lane]))}"


def test_fma_of_close_ties():
    """Sums that float64 rounds to half way between two float32."""
    one = np.float32(1 + 2**-23)
    a = np.full(64, one).view(np.uint32)
    c = np.array([s * np.float32(2.0 ** -(60 + i)) for i in range(32) for s in (1, -1)], np.float32).view(np.uint32)
    b = np.full(64, np.float32(2**-1 + 2**-24)).view(np.uint32)
    (got,) = execute("v_fma_f32 v10, v1, v2, v3", a, b, c)
    want = [nearest(Fraction(f32(x)) * Fraction(f32(y)) + Fraction(f32(z))) for x, y, z in zip(a, b, c)]
    assert got.tolist() == want


HALF_SOURCE = [
    ("v_fma_mix_f32 v10, v1, v2, v3", lambda a, b, c: (a[2], b[2], c[2])),
    ("v_fma_mix_f32 v10, v1, v2, v3 op_sel_hi:[1,0,0]", lambda a, b, c: (a[0], b[2], c[2])),
    ("v_fma_mix_f32 v10, v1, v2, v3 op_sel:[1,0,0] op_sel_hi:[1,0,0]", lambda a, b, c: (a[1], b[2], c[2])),
    ("v_fma_mix_f32 v10, v1, v2, v3 op_sel:[0,1,0] op_sel_hi:[0,1,1]", lambda a, b, c: (a[2], b[1], c[0])),
    ("v_fma_mix_f32 v10, -v1, |v2|, -|v3| op_sel:[1,0,1] op_sel_hi:[1,1,1]",
     lambda a, b, c: (-a[1], abs(b[0]), -abs(c[1]))),
    ("v_fma_mix_f32 v10, |v1|, -v2, neg(1.0) op_sel_hi:[0,1,0]", lambda a, b, c: (abs(a[2]), -b[0], -1)),
    ("s_mov_b32 s20, 0x3c004200\nv_fma_mix_f32 v10, v1, s20, v3 op_sel_hi:[1,1,0]", lambda a, b, c: (a[0], 3, c[2])),
]  # fmt: skip


@pytest.mark.parametrize("text, chosen", HALF_SOURCE, ids=range(len(HALF_SOURCE)))
@pytest.mark.parametrize("seed", range(2))
def test_fma_of_halves(text, chosen, seed):
    """Against exact arithmetic, rounded once, on words that are a float32 and two float16, some of these subnormal."""
    random = np.random.default_rng(seed)
    halves = random.integers(1, 31 << 10, (3, 64, 2)) | random.integers(0, 2, (3, 64, 2)) << 15
    halves[:, ::3, :] &= 0x83FF  # subnormal
    halves[:, :, 1] = np.clip(halves[:, :, 1] & 0x7FFF, 0x2C00, 0x5000) | halves[:, :, 1] & 0x8000  # middling float32
    words = (halves[..., 0] | halves[..., 1] << 16).astype(np.uint32)
    (got,) = execute(text, *words)
    for lane in range(64):
        sources = [[Fraction(f16(int(x))), Fraction(f16(int(x) >> 16)), Fraction(f32(x))] for x in words[:, lane]]
        a, b, c = chosen(*sources)
        assert got[lane] == nearest(a * b + c), f"{text}: {words[:, lane]}"


def test_fma_of_special_halves():
    """NaN, infinities, zeros of both signs; results that float32 holds as subnormals; a clamp; what is no such form."""
    a = np.array([0x0000, 0x8000, 0x3C00, 0xBC00, 0x7C00, 0xFC00, 0x7E00, 0x0001] * 8, np.uint32)  # the last: 2^-24
    b = np.array([bits_of(x) for x in (1.0, -1.0, 0.0, math.inf, math.nan, 2.0**-110, 1.5 * 2.0**-125, -2.0**127)],
                 np.uint32).repeat(8)  # fmt: skip
    body = """
    v_fma_mix_f32 v10, v1, v2, neg(0) op_sel_hi:[1,0,0]
    v_fma_mix_f32 v11, v1, v2, 0 op_sel_hi:[1,0,0]
    v_fma_mix_f32 v12, v1, v2, 0.5 op_sel_hi:[1,0,0] clamp"""
    product, sum_, clamped = (x.view(np.float32) for x in execute(body, a, b, outputs=("v10", "v11", "v12")))
    with np.errstate(all="ignore"):
        values = a.astype(np.uint16).view(np.float16).astype(np.float64), b.view(np.float32).astype(np.float64)
        want = (values[0] * values[1]).astype(np.float32)  # exact but for subnormals, which round once
        want_clamped = np.clip(np.nan_to_num((values[0] * values[1] + 0.5), nan=0), 0, 1).astype(np.float32)
    assert np.isnan(want).any() and np.isinf(want).any() and (np.abs(want[want != 0]) < 2**-126).any()
    np.testing.assert_array_equal(product, want)
    np.testing.assert_array_equal(np.signbit(product), np.where(np.isnan(want), np.signbit(product), np.signbit(want)))
    np.testing.assert_array_equal(sum_, want)
    assert not np.signbit(sum_[sum_ == 0]).any() and np.signbit(product[product == 0]).any()
    np.testing.assert_array_equal(clamped, want_clamped)
    for wrong in ("v_fma_mix_f32 v10, v1, v2, 1.0 op_sel_hi:[0,0,1]", "v_fma_mix_f32 v10, v1, v2, v1 op_sel:[1,0,0]"):
        with pytest.raises(AssemblyError, match="v_fma_mix_f32"):
            execute(wrong, a, b)


def test_special_values():
    """NaN, infinities, signed zeros and denormals through max, min and class."""
    words = [bits_of(x) for x in (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 2.0**-140, -(2.0**-140))]
    a = np.array([x for x in words for _ in words], np.uint32)[:64]
    b = np.array([x for _ in words for x in words], np.uint32)[:64]
    body = """
    v_max_f32_e32 v10, v1, v2
    v_min_f32_e32 v11, v1, v2
    v_maximum3_f32 v12, v1, v2, v2
    v_mov_b32_e32 v20, 0x1a8
    v_cmp_class_f32_e64 s[20:21], v1, v20
    s_nop 1
    v_cndmask_b32_e64 v13, 0, 1, s[20:21]
    v_add_f32_e32 v14, 0, v1"""
    high, low, top, kind, kept = execute(body, a, b, outputs=("v10", "v11", "v12", "v13", "v14"))
    for lane, (x, y) in enumerate(zip(map(f32, a), map(f32, b))):
        if math.isnan(x) or math.isnan(y):
            other = [v for v in (x, y) if not math.isnan(v)]
            assert math.isnan(f32(top[lane]))
            if other:
                assert f32(high[lane]) == f32(low[lane]) == other[0]
        else:
            assert (f32(high[lane]), f32(low[lane]), f32(top[lane])) == (max(x, y), min(x, y), max(x, y))
        # 0x1a8: -normal, -0 (5)... of the ten classes: bits 3, 5, 7, 8
        normal, denormal = abs(x) >= 2**-126 and math.isfinite(x), 0 < abs(x) < 2**-126
        wanted = (normal and x != 0) or (x == 0 and math.copysign(1, x) < 0) or (denormal and x > 0)
        assert kind[lane] == wanted, x
        if denormal:
            assert kept[lane] == a[lane]


@pytest.mark.parametrize(
    "name, function",
    [("rcp", lambda x: 1 / x), ("rsq", lambda x: 1 / math.sqrt(abs(x))), ("sqrt", lambda x: math.sqrt(abs(x))),
     ("log", lambda x: math.log2(abs(x))), ("exp", lambda x: 2.0**x)],
)  # fmt: skip
def test_transcendental_instructions(name, function):
    x = floats(7)
    absolute = "|v1|" if name in ("rsq", "sqrt", "log") else "v1"
    (got,) = execute(f"v_{name}_f32_e64 v10, {absolute}", x)
    want = np.array([function(f32(word)) if f32(word) < 128 else math.inf for word in x])
    want = np.where(np.abs(want) < 2**-126, 0, want)
    np.testing.assert_allclose(got.view(np.float32), want, rtol=1.2e-7)


def test_division():
    """The sequence that LLVM expands a division into rounds correctly, also where it has to be scaled."""
    random = np.random.default_rng(0)
    a, b = ((random.standard_normal(64) * 2.0 ** random.integers(-140, 127, 64)).astype(np.float32) for _ in range(2))
    a[:8], b[:8] = [0, 1, -1, np.inf, np.nan, 3, 0, np.inf], [1, 0, 0, 2, 1, np.inf, 0, np.inf]
    body = """
    v_div_scale_f32 v20, s[20:21], v2, v2, v1
    v_div_scale_f32 v23, vcc, v1, v2, v1
    v_rcp_f32_e32 v21, v20
    s_nop 0
    v_fma_f32 v22, -v20, v21, 1.0
    v_fmac_f32_e32 v21, v22, v21
    v_mul_f32_e32 v24, v23, v21
    v_fma_f32 v25, -v20, v24, v23
    v_fmac_f32_e32 v24, v25, v21
    v_fma_f32 v20, -v20, v24, v23
    v_div_fmas_f32 v20, v20, v21, v24
    v_div_fixup_f32 v10, v20, v2, v1"""
    (got,) = execute(body, a.view(np.uint32), b.view(np.uint32))
    with np.errstate(all="ignore"):
        want = a / b
    normal = ~(np.abs(want) < 2**-126)
    np.testing.assert_array_equal(got.view(np.float32)[normal], want[normal])
    np.testing.assert_allclose(got.view(np.float32)[~normal], want[~normal], rtol=0, atol=2**-149)


PACKED = [
    ("v_pk_add_f32 v[10:11], v[1:2], v[3:4]", lambda a, b, c, d: (a + c, b + d)),
    ("v_pk_mul_f32 v[10:11], v[1:2], v[3:4] op_sel_hi:[0,1]", lambda a, b, c, d: (a * c, a * d)),
    ("v_pk_mul_f32 v[10:11], v[1:2], v[3:4] op_sel:[1,0]", lambda a, b, c, d: (b * c, b * d)),
    ("v_pk_mul_f32 v[10:11], v[1:2], 2.0 op_sel_hi:[1,0] neg_lo:[0,1] neg_hi:[1,0]",
     lambda a, b, c, d: (-a * 2, -b * 2)),
    ("v_pk_fma_f32 v[10:11], v[1:2], v[3:4], v[1:2] op_sel_hi:[1,0,1]", lambda a, b, c, d: (a * c + a, b * c + b)),
    ("v_pk_mov_b32 v[10:11], v[1:2], v[3:4] op_sel:[1,0]", lambda a, b, c, d: (b, c)),
]  # fmt: skip


@pytest.mark.parametrize("text, oracle", PACKED, ids=lambda x: x.split()[0] if isinstance(x, str) else "")
def test_packed_instructions(text, oracle):
    inputs = [floats(20 + i) for i in range(4)]
    results = execute(text, *inputs, outputs=("v10", "v11"))
    for lane, words in enumerate(zip(*inputs)):
        want = oracle(*(Fraction(f32(word)) for word in words))
        assert [int(x[lane]) for x in results] == [nearest(x) for x in want]


def test_16_bit_packed_instructions():
    a, b = integers(1), integers(2)
    add, low = execute("v_pk_add_u16 v10, v1, v2\nv_pk_max_i16 v11, v1, v2 op_sel:[0,1] op_sel_hi:[0,1]", a, b,
                       outputs=("v10", "v11"))  # fmt: skip
    halves = lambda x: (int(x) & 0xFFFF, int(x) >> 16)
    for lane in range(64):
        (a0, a1), (b0, b1) = halves(a[lane]), halves(b[lane])
        assert halves(add[lane]) == (a0 + b0 & 0xFFFF, a1 + b1 & 0xFFFF)
        largest = max(signed(a0, 16), signed(b1, 16)) & 0xFFFF
        assert halves(low[lane]) == (largest, largest)
    difference, low = execute("v_pk_sub_u16 v10, v1, v2 clamp\nv_pk_sub_u16 v11, v1, 8 clamp", a, b,
                              outputs=("v10", "v11"))  # fmt: skip
    for lane in range(64):
        assert halves(low[lane]) == (max(0, halves(a[lane])[0] - 8), halves(a[lane])[1])
        assert halves(difference[lane]) == tuple(max(0, x - y) for x, y in zip(halves(a[lane]), halves(b[lane])))


def test_conversions():
    """bf16, fp16 and fp8 by torch's conversions."""
    x, y = floats(1), floats(2)
    body = """
    v_cvt_pk_bf16_f32 v10, v1, v2
    v_cvt_pk_f16_f32 v11, v1, v2
    v_cvt_f16_f32_e32 v12, v1
    v_mov_b32_e32 v13, 0
    v_mov_b32_e32 v20, 0x41000000
    v_cvt_scalef32_pk_fp8_f32 v13, v1, v2, v20
    v_cvt_scalef32_pk_fp8_f32 v13, v2, v1, v20 op_sel:[0,0,0,1]
    s_nop 0
    v_cvt_scalef32_pk_f32_fp8 v[14:15], v13, v20
    v_cvt_scalef32_pk_f32_fp8 v[16:17], v13, v20 op_sel:[1,0,0]
    v_cvt_scalef32_pk_bf16_fp8 v18, v13, v20 op_sel:[1,0,0]"""
    outputs = [f"v{i}" for i in range(10, 19)]
    bf16, half, single, fp8, *back = execute(body, x, y, outputs=outputs)
    a, b = (torch.from_numpy(z.view(np.float32).copy()) for z in (x, y))
    pair = lambda u, v, dtype: np.stack([z.to(dtype).view(torch.int16).numpy().view(np.uint16) for z in (u, v)], 1)
    np.testing.assert_array_equal(bf16.view(np.uint16).reshape(-1, 2), pair(a, b, torch.bfloat16))
    np.testing.assert_array_equal(half.view(np.uint16).reshape(-1, 2), pair(a, b, torch.float16))
    np.testing.assert_array_equal(single, pair(a, b, torch.float16)[:, 0])
    codes = torch.stack([a / 8, b / 8, b / 8, a / 8], 1).to(torch.float8_e4m3fn)
    inside = (torch.stack([a, b, b, a], 1).abs() / 8 < 448).numpy()
    got = fp8.view(np.uint8).reshape(-1, 4)
    np.testing.assert_array_equal(got[inside], codes.view(torch.uint8).numpy()[inside])
    values = (codes.float() * 8).numpy()
    for i, column in enumerate(back[:4]):
        np.testing.assert_array_equal(column.view(np.float32)[inside[:, i]], values[inside[:, i], i])
    both = inside.all(1)
    want = torch.from_numpy(values[:, 2:]).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(back[4].view(np.uint16).reshape(-1, 2)[both], want[both])


def test_conversions_that_saturate():
    """FP16_OVFL of the MODE register, which Triton sets: beyond the largest number comes that one, and NaN stays."""
    x = np.array([448, -449, 1e9, -1e9, np.nan, 464, -480, 3] * 8, np.float32).view(np.uint32)
    convert = "v_mov_b32_e32 v{0}, 0\nv_cvt_scalef32_pk_fp8_f32 v{0}, v1, v1, 1.0"
    saturate = "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), {}"
    body = [convert.format(10), saturate.format(1), convert.format(11), saturate.format(0), convert.format(12)]
    found = execute("\n".join(body), x, outputs=("v10", "v11", "v12"))
    before, there, after = (out.view(np.uint8)[::4][:8] for out in found)
    assert there.tolist() == [0x7E, 0xFE, 0x7E, 0xFE, 0x7F, 0x7E, 0xFE, 0x44]
    assert before.tolist() == after.tolist() == [0x7E, 0xFE, 0x7F, 0xFF, 0x7F, 0x7E, 0xFF, 0x44]
    for wrong in ("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 4), 1", saturate.format(1) + "\nv_cvt_f16_f32_e32 v10, v1"):
        with pytest.raises((AssemblyError, SimulationError), match="not modelled"):
            execute(wrong, x)


@pytest.mark.parametrize("format_, dtype", [("fp8", torch.float8_e4m3fn), ("bf8", torch.float8_e5m2)])
def test_fp8_tables(format_, dtype):
    """All codes decode as torch decodes them, and all fp16 values encode so, but what overflows."""
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(formats.DECODE[format_], codes.view(dtype).double().numpy())
    values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    limit = torch.finfo(dtype).max
    values = values[values.abs() <= limit]
    got = formats.encode(values.double().numpy(), format_)
    np.testing.assert_array_equal(got, values.float().to(dtype).view(torch.uint8).numpy())


# --- conditions, lanes and flow


def test_conditions():
    """Compares write a bit for each active lane and 0 for the others; VOP3 takes any pair of SGPRs."""
    a, b = integers(3), integers(4)
    body = """
    v_cmp_gt_u32_e64 s[20:21], v1, v2
    v_cmp_lt_i32_e32 vcc, v1, v2
    s_nop 1
    v_cndmask_b32_e64 v10, v1, -v2, s[20:21]
    v_cndmask_b32_e32 v11, v1, v2, vcc
    s_mov_b64 exec, 0xff00ff
    v_cmp_ne_u32_e64 s[22:23], v1, 0
    s_mov_b64 exec, -1
    s_nop 4
    v_mov_b32_e32 v12, s22
    v_mov_b32_e32 v13, s23"""
    high, low, word0, word1 = execute(body, a, b, outputs=("v10", "v11", "v12", "v13"))
    np.testing.assert_array_equal(high, np.where(a > b, b ^ 0x80000000, a))
    np.testing.assert_array_equal(low, np.where(a.view(np.int32) < b.view(np.int32), b, a))
    active = [i for i in range(64) if 0xFF00FF >> i & 1 and a[i]]
    assert set(word0) == {sum(1 << i for i in active)} and set(word1) == {0}


def test_exec_masks_writes_and_memory():
    a, b = integers(5), integers(6)
    body = """
    v_mov_b32_e32 v10, v1
    v_mov_b32_e32 v11, v1
    s_mov_b64 exec, 0xf0f0f0f0
    v_mov_b32_e32 v10, v2
    global_load_dword v11, v200, s[4:5] offset:256
    s_waitcnt vmcnt(0)"""
    mixed, loaded = execute(body, a, b, outputs=("v10", "v11"))
    want = np.where([0xF0F0F0F0 >> i & 1 for i in range(64)], b, a)
    np.testing.assert_array_equal(mixed, want)
    np.testing.assert_array_equal(loaded, want)


DPP = {
    "quad_perm:[2,3,0,1]": lambda i: i // 4 * 4 + (i + 2) % 4,
    "row_shl:4": lambda i: i + 4 if i % 16 + 4 < 16 else None,
    "row_shr:8": lambda i: i - 8 if i % 16 >= 8 else None,
    "row_ror:8": lambda i: i // 16 * 16 + (i - 8) % 16,
    "row_mirror": lambda i: i // 16 * 16 + 15 - i % 16,
    "row_half_mirror": lambda i: i // 8 * 8 + 7 - i % 8,
    "row_bcast:15": lambda i: i // 16 * 16 - 1 if i >= 16 else None,
    "row_bcast:31": lambda i: 31 if i >= 32 else None,
    "row_newbcast:5": lambda i: i // 16 * 16 + 5,
    "wave_shr:1": lambda i: i - 1 if i else None,
}


@pytest.mark.parametrize("control", DPP)
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("masks", [(15, 15), (10, 15), (15, 6)])
def test_dpp(control, bound, masks):
    a, b = integers(7), integers(8)
    rows, banks = masks
    text = f"v_mov_b32_e32 v10, v2\ns_nop 1\nv_mov_b32_dpp v10, v1 {control} row_mask:{rows:#x} bank_mask:{banks:#x}"
    (got,) = execute(text + " bound_ctrl:1" * bound, a, b)
    for i in range(64):
        source = DPP[control](i)
        enabled = rows >> i // 16 & 1 and banks >> i % 16 // 4 & 1
        want = b[i] if not enabled else a[source] if source is not None else 0 if bound else b[i]
        assert got[i] == want, i


def test_dpp_of_inactive_lanes():
    """A source lane that EXEC leaves out counts as missing."""
    a, b = integers(9), integers(10)
    body = """
    v_mov_b32_e32 v10, v2
    s_mov_b64 exec, 0x55555555
    s_nop 4
    v_add_u32_dpp v10, v1, v1 {} row_mask:0xf bank_mask:0xf"""
    for control, source in (("quad_perm:[1,1,3,3]", 1), ("quad_perm:[0,0,2,2]", 0)):
        (got,) = execute(body.format(control), a, b)
        for i in range(64):
            active = i < 32 and i % 2 == 0
            assert got[i] == ((int(a[i]) * 2 & M32) if active and source == 0 else b[i])


def test_lane_exchanges():
    a, b = integers(11), integers(12)
    order = np.random.default_rng(0).permutation(64).astype(np.uint32)
    body = """
    v_lshlrev_b32_e32 v20, 2, v3
    ds_bpermute_b32 v10, v20, v1
    ds_permute_b32 v11, v20, v1
    ds_swizzle_b32 v12, v1 offset:swizzle(SWAP,16)
    ds_swizzle_b32 v13, v1 offset:swizzle(BITMASK_PERM,"01pi0")
    v_mov_b32_e32 v14, v1
    v_mov_b32_e32 v15, v2
    v_mov_b32_e32 v16, v1
    v_mov_b32_e32 v17, v2
    s_nop 1
    v_permlane16_swap_b32_e32 v14, v15
    v_permlane32_swap_b32_e32 v16, v17
    s_waitcnt lgkmcnt(0)
    v_readlane_b32 s20, v1, 37
    v_readfirstlane_b32 s21, v2
    v_mov_b32_e32 v18, 0
    v_writelane_b32 v18, s20, 9
    s_nop 1
    v_mov_b32_e32 v19, s21"""
    got = execute(body, a, b, order, outputs=[f"v{i}" for i in range(10, 20)])
    lane = np.arange(64)
    np.testing.assert_array_equal(got[0], a[order])
    np.testing.assert_array_equal(got[1][order], a)
    np.testing.assert_array_equal(got[2], a[lane ^ 16])
    np.testing.assert_array_equal(got[3], a[lane // 32 * 32 + (8 | lane & 4 | (lane & 2 ^ 2))])
    odd = lane // 16 % 2 == 1
    np.testing.assert_array_equal(got[4], np.where(odd, b[lane - 16], a))
    np.testing.assert_array_equal(got[5], np.where(odd, b, a[(lane + 16) % 64]))
    np.testing.assert_array_equal(got[6], np.where(lane < 32, a, b[lane - 32]))
    np.testing.assert_array_equal(got[7], np.where(lane < 32, a[(lane + 32) % 64], b))
    np.testing.assert_array_equal(got[8], np.where(lane == 9, a[37], 0))
    assert set(got[9]) == {b[0]}


SCALAR = [
    ("s_add_u32 s20, s10, s11\ns_addc_u32 s21, s12, s13", lambda a, b: a + b),
    ("s_sub_u32 s20, s10, s11\ns_subb_u32 s21, s12, s13", lambda a, b: a - b),
    ("s_and_b64 s[20:21], s[14:15], s[16:17]", lambda a, b: a & b),
    ("s_andn2_b64 s[20:21], s[14:15], s[16:17]", lambda a, b: a & ~b),
    ("s_or_b64 s[20:21], s[14:15], s[16:17]", lambda a, b: a | b),
    ("s_xor_b64 s[20:21], s[14:15], s[16:17]", lambda a, b: a ^ b),
    ("s_not_b64 s[20:21], s[14:15]", lambda a, b: ~a),
    ("s_lshl_b64 s[20:21], s[14:15], 13", lambda a, b: a << 13),
    ("s_lshr_b64 s[20:21], s[14:15], s11", lambda a, b: a >> (b & 63)),
    ("s_ashr_i64 s[20:21], s[14:15], s11", lambda a, b: signed(a, 64) >> (b & 63)),
    ("s_mul_i32 s20, s10, s11\ns_mul_hi_u32 s21, s10, s11", lambda a, b: (a & M32) * (b & M32)),
    ("s_mul_hi_i32 s20, s10, s11\ns_mov_b32 s21, 0", lambda a, b: signed(a & M32) * signed(b & M32) >> 32 & M32),
    ("s_mov_b64 s[20:21], -3", lambda a, b: -3),
    ("s_movk_i32 s20, 0xffc0\ns_mov_b32 s21, -1", lambda a, b: -64),
    ("s_mov_b32 s20, s10\ns_addk_i32 s20, 0xfff0\ns_mov_b32 s21, 0", lambda a, b: a - 16 & M32),
    ("s_mov_b32 s20, s10\ns_mulk_i32 s20, 0x7\ns_mov_b32 s21, 0", lambda a, b: a * 7 & M32),
    ("s_bfe_u32 s20, s10, 0x90005\ns_bfe_i32 s21, s10, 0x80004",
     lambda a, b: (a >> 5 & 511) | (signed(a >> 4 & 255, 8) & M32) << 32),
    ("s_cmp_lt_i32 s10, s11\ns_cselect_b64 s[20:21], s[14:15], s[16:17]",
     lambda a, b: a if signed(a & M32) < signed(b & M32) else b),
    ("s_cmp_ge_u32 s10, s11\ns_cselect_b32 s20, s10, s11\ns_mov_b32 s21, 0", lambda a, b: max(a & M32, b & M32)),
    ("s_cmpk_gt_i32 s10, 0xfffe\ns_cselect_b32 s20, 1, 2\ns_mov_b32 s21, 0",
     lambda a, b: 1 if signed(a & M32) > -2 else 2),
    ("s_bitcmp1_b32 s10, 4\ns_cselect_b32 s20, 1, 0\ns_mov_b32 s21, s10\ns_bitset1_b32 s21, 3\ns_bitset0_b32 s21, 0",
     lambda a, b: (a >> 4 & 1) | ((a & M32 | 8) & ~1) << 32),
    ("s_max_i32 s20, s10, s11\ns_min_u32 s21, s10, s11",
     lambda a, b: max(signed(a & M32), signed(b & M32)) & M32 | min(a & M32, b & M32) << 32),
    ("s_lshl3_add_u32 s20, s10, s11\ns_abs_i32 s21, s10",
     lambda a, b: ((a << 3) + b & M32) | (abs(signed(a & M32)) & M32) << 32),
    ("s_bcnt1_i32_b64 s20, s[14:15]\ns_ff1_i32_b64 s21, s[14:15]",
     lambda a, b: a.bit_count() | ((a & -a).bit_length() - 1 & M32) << 32),
    ("s_brev_b32 s20, s10\ns_flbit_i32_b32 s21, s10",
     lambda a, b: int(f"{a & M32:032b}"[::-1], 2) | (32 - (a & M32).bit_length() if a & M32 else M32) << 32),
    ("s_pack_ll_b32_b16 s20, s10, s11\ns_sext_i32_i16 s21, s10",
     lambda a, b: (a & 0xFFFF | b << 16 & 0xFFFF0000) | (signed(a & 0xFFFF, 16) & M32) << 32),
]  # fmt: skip


@pytest.mark.parametrize("text, oracle", SCALAR, ids=lambda x: x.split()[0] if isinstance(x, str) else "")
def test_scalar_instructions(text, oracle):
    """On 4 waves with operands of their own: a in s10, s12 and s[14:15], b in s11, s13 and s[16:17]."""
    values = np.concatenate([integers(i) for i in range(4)])
    setup = "\n".join(
        f"v_readlane_b32 s{register}, v1, {lane}"
        for register, lane in ((10, 0), (12, 1), (11, 2), (13, 3), (14, 0), (15, 1), (16, 2), (17, 3))
    )
    low, high = execute(f"{setup}\ns_nop 4\n{text}", values, outputs=("s20", "s21"), waves=4)
    for wave in range(4):
        a0, a1, b0, b1 = map(int, values[wave * 64 : wave * 64 + 4])
        want = oracle(a0 | a1 << 32, b0 | b1 << 32) & M64
        assert int(low[wave * 64]) | int(high[wave * 64]) << 32 == want


def test_saveexec_and_divergent_branches():
    """Waves and lanes of one workgroup that go different ways and meet again."""
    values = np.arange(256, dtype=np.uint32)
    body = """
    v_mov_b32_e32 v10, 0
    v_readfirstlane_b32 s20, v1
    s_nop 3
    s_cmp_lt_u32 s20, 0x80
    s_cbranch_scc0 .LBB0_2
    v_cmp_gt_u32_e32 vcc, 10, v1
    s_and_saveexec_b64 s[22:23], vcc
    s_cbranch_execz .LBB0_1
    v_add_u32_e32 v10, 0x64, v1
.LBB0_1:
    s_or_b64 exec, exec, s[22:23]
    s_branch .LBB0_4
.LBB0_2:
    s_mov_b32 s21, 0
.LBB0_3:
    v_add_u32_e32 v10, v10, v1
    s_add_i32 s21, s21, 1
    s_lshr_b32 s22, s20, 6
    s_cmp_lt_u32 s21, s22
    s_cbranch_scc1 .LBB0_3
.LBB0_4:
    v_add_u32_e32 v10, 1, v10"""
    (got,) = execute(body, values, waves=4)
    want = [1 + (x + 100 if x < 10 else x * (x // 64) if x >= 128 else 0) for x in range(256)]
    assert got.tolist() == want


# --- memory


def test_loads_and_stores_of_all_widths():
    """global_*: what sub-dword loads extend, what d16 forms keep, and wide accesses."""
    a = integers(13)
    body = """
    v_lshlrev_b32_e32 v20, 2, v0
    global_load_ubyte v10, v20, s[4:5] offset:1
    global_load_sbyte v11, v20, s[4:5] offset:2
    global_load_ushort v12, v20, s[4:5] offset:2
    global_load_sshort v13, v20, s[4:5]
    v_mov_b32_e32 v14, v1
    v_mov_b32_e32 v15, v1
    global_load_short_d16_hi v14, v20, s[4:5]
    global_load_ubyte_d16 v15, v20, s[4:5] offset:3
    v_min_u32_e32 v20, 60, v0
    v_lshlrev_b32_e32 v20, 2, v20
    global_load_dwordx4 v[16:19], v20, s[4:5]
    s_waitcnt vmcnt(0)"""
    got = execute(body, a, outputs=[f"v{i}" for i in range(10, 20)])
    for i, x in enumerate(a.tolist()):
        octets = x.to_bytes(4, "little")
        assert got[0][i] == octets[1] and got[1][i] == signed(octets[2], 8) & M32
        assert got[2][i] == x >> 16 and got[3][i] == signed(x & 0xFFFF, 16) & M32
        assert got[4][i] == (x & 0xFFFF) | (x & 0xFFFF) << 16
        assert got[5][i] == x & 0xFFFF0000 | octets[3]
        assert [int(got[6 + j][i]) for j in range(4)] == [int(y) for y in a[min(i, 60) : min(i, 60) + 4]]


def test_buffers():
    """Offsets beyond num_records read zeros and store nothing; soffset and the constant offset add up."""
    a = integers(14)
    body = """
    s_mov_b32 s8, s4
    s_and_b32 s9, s5, 0xffff
    s_movk_i32 s10, 0xc0
    s_mov_b32 s11, 0x27000
    s_mov_b32 s12, 8
    v_lshlrev_b32_e32 v20, 2, v0
    buffer_load_dword v10, v20, s[8:11], 0 offen
    v_min_u32_e32 v21, 40, v0
    v_lshlrev_b32_e32 v21, 2, v21
    buffer_load_dword v11, v21, s[8:11], s12 offen offset:4
    s_mov_b32 s13, s6
    s_mov_b32 s16, s6
    s_and_b32 s17, s7, 0xffff
    s_movk_i32 s18, 0x80
    s_mov_b32 s19, 0x27000
    v_mov_b32_e32 v22, 7
    global_store_dword v20, v22, s[6:7]
    buffer_store_dword v1, v20, s[16:19], 0 offen
    s_waitcnt vmcnt(0)
    global_load_dword v12, v20, s[6:7]
    s_waitcnt vmcnt(0)"""
    first, second, stored = execute(body, a, outputs=("v10", "v11", "v12"))
    lane = np.arange(64)
    np.testing.assert_array_equal(first, np.where(lane < 48, a, 0))
    np.testing.assert_array_equal(second, a[np.minimum(lane, 40) + 3])
    np.testing.assert_array_equal(stored, np.where(lane < 32, a, 7))


def test_lds():
    """Every width, pairs with strides, sub-dword forms, and between waves after a barrier."""
    a = np.concatenate([integers(i) for i in range(4)])
    body = """
    v_lshlrev_b32_e32 v20, 2, v0
    ds_write_b32 v20, v1
    s_waitcnt lgkmcnt(0)
    s_barrier
    v_xor_b32_e32 v21, 0x3fc, v20
    ds_read_b32 v10, v21
    ds_read_u8 v11, v20 offset:1
    ds_read_i16 v12, v20 offset:2
    v_and_b32_e32 v22, 0xff, v20
    ds_read2_b32 v[13:14], v22 offset1:1
    ds_read2st64_b32 v[15:16], v22 offset1:2
    v_and_b32_e32 v23, 0x3f0, v20
    ds_read_b128 v[24:27], v23
    ds_read_b96 v[28:30], v23
    ds_read_b64 v[32:33], v23 offset:8
    s_waitcnt lgkmcnt(0)
    s_barrier
    ds_write_b16 v20, v1 offset:1024
    ds_write_b16_d16_hi v20, v1 offset:1026
    s_waitcnt lgkmcnt(0)
    ds_read_b32 v17, v20 offset:1024
    s_waitcnt lgkmcnt(0)"""
    outputs = ["v10", "v11", "v12", "v13", "v14", "v15", "v16", "v24", "v25", "v26", "v27", "v28", "v30", "v32", "v33"]
    got = execute(body, a, outputs=[*outputs, "v17"], waves=4, lds=2052)
    lane = np.arange(256)
    np.testing.assert_array_equal(got[0], a[::-1])
    np.testing.assert_array_equal(got[1], a >> 8 & 255)
    np.testing.assert_array_equal(got[2], (a.view(np.int32) >> 16).view(np.uint32))
    low = lane % 64
    for column, index in zip(got[3:7], (low, low + 1, low, low + 128)):
        np.testing.assert_array_equal(column, a[index])
    four = lane // 4 * 4
    for column, offset in zip(got[7:15], (0, 1, 2, 3, 0, 2, 2, 3)):
        np.testing.assert_array_equal(column, a[four + offset])
    np.testing.assert_array_equal(got[15], a)


def test_memory_with_no_active_lane():
    """Nothing happens, whatever the addresses."""
    body = """
    v_mov_b32_e32 v10, v1
    v_mov_b32_e32 v20, -1
    s_mov_b64 exec, 0
    global_load_dword v10, v20, s[4:5]
    s_waitcnt vmcnt(0)
    ds_write_b128 v20, v[20:23]
    ds_read_b64 v[10:11], v20
    s_waitcnt lgkmcnt(0)
    global_store_short v20, v1, s[6:7]
    global_atomic_add v10, v20, v1, s[4:5] sc0
    ds_add_u32 v20, v1
    s_waitcnt vmcnt(0) lgkmcnt(0)
    v_add_u32_e32 v10, 5, v10
    v_cmp_eq_u32_e32 vcc, v1, v1
    s_mov_b64 exec, -1
    s_nop 4
    v_mov_b32_e32 v12, vcc_lo"""
    kept, condition = execute(body, ONES, outputs=("v10", "v12"), lds=16)
    assert set(kept) == {1} and set(condition) == {0}


@pytest.mark.parametrize("bits", [16, 8])
def test_transposed_lds_reads(bits):
    """16 lanes read rows of 16 elements each from addresses of their own and get columns."""
    random = np.random.default_rng(bits)
    dtype = {16: np.uint16, 8: np.uint8}[bits]
    rows = 64 // bits
    tile = random.integers(0, 2**bits, (4, rows, 16)).astype(dtype)  # by group of 16 lanes
    words = tile.view(np.uint32).reshape(-1)
    body = f"""
    v_lshlrev_b32_e32 v20, 3, v0
    ds_write_b64 v20, v[1:2]
    s_waitcnt lgkmcnt(0)
    ds_read_b64_tr_b{bits} v[10:11], v20
    s_waitcnt lgkmcnt(0)"""
    low, high = execute(body, words[0::2], words[1::2], outputs=("v10", "v11"), lds=512)
    got = np.stack([low, high], 1).view(dtype).reshape(4, 16, rows)
    np.testing.assert_array_equal(got, tile.swapaxes(1, 2))


def test_loads_straight_to_lds():
    a = np.concatenate([integers(i) for i in range(4)])
    body = """
    v_readfirstlane_b32 s20, v0
    s_nop 3
    s_lshl_b32 s20, s20, 2
    s_add_i32 m0, s20, 16
    v_xor_b32_e32 v20, 4, v200
    global_load_lds_dword v20, s[4:5]
    s_waitcnt vmcnt(0)
    v_add_u32_e32 v21, 16, v200
    s_barrier
    ds_read_b32 v10, v21
    s_waitcnt lgkmcnt(0)"""
    (got,) = execute(body, a, waves=4, lds=1056)
    np.testing.assert_array_equal(got, a[np.arange(256) ^ 1])


def test_scratch():
    """Each lane has memory of its own."""
    a, b = integers(15), integers(16)
    body = """
    scratch_store_dwordx2 off, v[1:2], off offset:8
    s_waitcnt vmcnt(0)
    s_mov_b32 s20, 4
    scratch_load_dword v10, off, s20 offset:8
    scratch_load_dword v11, off, off offset:8
    s_waitcnt vmcnt(0)"""
    got = execute(body, a, b, outputs=("v10", "v11"), scratch=16)
    np.testing.assert_array_equal(got, [b, a])


def test_atomics():
    """Lanes that hit the same word, with and without the value before, in global memory and LDS."""
    a = np.random.default_rng(0).integers(0, 1000, 64).astype(np.uint32)
    body = """
    v_mov_b32_e32 v20, 0
    v_mov_b32_e32 v21, 0
    global_store_dwordx2 v20, v[20:21], s[6:7]
    s_waitcnt vmcnt(0)
    global_atomic_add v10, v20, v1, s[6:7] sc0
    global_atomic_umax v20, v1, s[6:7] offset:4
    s_waitcnt vmcnt(0)
    global_load_dwordx2 v[11:12], v20, s[6:7]
    ds_write_b32 v20, v20
    s_waitcnt lgkmcnt(0)
    v_cvt_f32_u32_e32 v22, v1
    ds_add_f32 v20, v22
    s_waitcnt lgkmcnt(0)
    ds_read_b32 v13, v20
    s_waitcnt vmcnt(0) lgkmcnt(0)"""
    before, total, largest, sum_ = execute(body, a, outputs=("v10", "v11", "v12", "v13"), lds=4)
    np.testing.assert_array_equal(before, np.cumsum(a) - a)
    assert set(total) == {a.sum()} and set(largest) == {a.max()}
    assert set(sum_.view(np.float32)) == {float(a.sum())}


# --- the matrix unit, from its definition, element by element


def scaled_mfma(a, b, a_scale, b_scale, dim: int) -> np.ndarray:
    """D [dim, dim] of operands a, b [64, 32] codes by lane and byte and scales [64] by lane, for the same byte.

    The statement of the maps, not the simulator's: which lane and byte hold A[i][k], and which lane its scale.
    """
    k_size, table = 2048 // dim, torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    left, right = np.zeros((dim, k_size)), np.zeros((dim, k_size))
    for matrix, codes, scales in ((left, a, a_scale), (right, b, b_scale)):
        for i in range(dim):
            for k in range(k_size):
                chunk = k // 16
                lane = dim * (chunk % (64 // dim)) + i
                byte = chunk // (64 // dim) * 16 + k % 16
                matrix[i, k] = table[codes[lane, byte]] * 2.0 ** (int(scales[dim * (k // 32) + i]) - 127)
    return left @ right.T


@pytest.mark.parametrize("dim", [16, 32])
@pytest.mark.parametrize("a_byte, b_byte", [(0, 0), (1, 2), (2, 3), (3, 1)])
def test_scaled_mfma(dim, a_byte, b_byte):
    random = np.random.default_rng(dim + a_byte)
    a, b = (random.integers(0, 0x7F, (64, 32)).astype(np.uint8) | random.integers(0, 2, (64, 32), np.uint8) << 7
            for _ in range(2))  # fmt: skip
    scales = random.integers(120, 135, (2, 64, 4)).astype(np.uint8)
    words = [*a.view(np.uint32).T, *b.view(np.uint32).T, *scales.view(np.uint32)[..., 0]]
    count = dim * dim // 64
    setup = "\n".join(f"v_mov_b32_e32 v{30 + i}, 0" for i in range(count))
    low, high = (f"[{a_byte >> s & 1},{b_byte >> s & 1},0]" for s in (0, 1))
    text = (f"v_mfma_scale_f32_{dim}x{dim}x{2048 // dim}_f8f6f4 v[30:{29 + count}], v[1:8], v[9:16], "
            f"v[30:{29 + count}], v17, v18 op_sel:{low} op_sel_hi:{high}")  # fmt: skip
    out = execute(f"{setup}\ns_nop 1\n{text}", *words, outputs=[f"v{30 + i}" for i in range(count)])
    want = scaled_mfma(a, b, scales[0, :, a_byte], scales[1, :, b_byte], dim)
    groups = 64 // dim
    for row in range(dim):
        for column in range(dim):
            register, lane = row // (4 * groups) * 4 + row % 4, row // 4 % groups * dim + column
            assert f32(out[register][lane]) == pytest.approx(want[row, column], rel=1e-6)


def test_scaled_mfma_of_nan_scale():
    ones = np.full(64, 0x38383838, np.uint32)  # e4m3 1.0
    scale = np.full(64, 127, np.uint32)
    bad = scale.copy()
    bad[5] = 255
    text = "v_mfma_scale_f32_32x32x64_f8f6f4 v[30:45], v[1:8], v[9:16], 0, v17, v18 op_sel_hi:[0,0,0]"
    out = execute(text, *[ones] * 16, bad, scale, outputs=[f"v{30 + i}" for i in range(16)])
    values = np.array(out).view(np.float32)
    row = np.array([[i // 4 * 8 + lane // 32 * 4 + i % 4 for lane in range(64)] for i in range(16)])
    assert np.isnan(values[row == 5]).all() and (values[row != 5] == 64).all()


# --- text


def test_unknown_instruction():
    with pytest.raises(AssemblyError, match=r"line \d+: v_frobnicate_b32 v1, v2: this instruction is not known"):
        execute("v_frobnicate_b32 v1, v2")


def test_code_that_is_not_modelled():
    text = compile_text(kernels.grid_kernel, dict(out="*i32"), {}).asm["amdgcn"]
    with pytest.raises(AssemblyError, match="another architecture"):
        Program(parse(text.replace("gfx950", "gfx942")))
    with pytest.raises(SimulationError, match="mode denorm_mode_32 other than 3"):
        Program(parse(text.replace("float_denorm_mode_32 3", "float_denorm_mode_32 0")))


def test_operands():
    assert operand("a[4:7]").registers == range(260, 264)
    assert operand("-|v3|").neg and operand("-|v3|").abs and operand("-|v3|").index == 3
    assert operand("neg(0)").neg and operand("neg(0)").value == 0
    assert operand("-1").value == -1 and operand("0x10").value == 16 and operand("-0.5").value == -0.5
    one = instruction(0, "", "buffer_load_dwordx4 v16, s[12:15], 0 offen offset:16 lds")
    assert one.modifiers == {"offen": True, "offset": 16, "lds": True} and len(one.operands) == 3
    assert instruction(0, "", "s_waitcnt vmcnt(3) lgkmcnt(0)").modifiers == {"vmcnt": 3, "lgkmcnt": 0}


# --- Triton's kernels


def test_vector_add():
    """Masked loads and stores: what lies beyond n is no part of the tensors."""
    kernel = compile_(kernels.add_kernel, dict(x="*fp32", y="*fp32", out="*fp32", n="i32"), dict(BLOCK=256))
    x, y, out = randn(1000, seed=1), randn(1000, seed=2), torch.empty(1000)
    run(kernel, dict(x=x, y=y, out=out, n=1000), (4,), ["out"])
    assert torch.equal(out, x + y)


def test_argument_preload_and_its_fallback():
    """The entry of a kernel whose arguments are in SGPRs, and the one that loads them first, give the same."""
    kernel = compile_(kernels.add_kernel, dict(x="*fp32", y="*fp32", out="*fp32", n="i32"), dict(BLOCK=256))
    assert kernel.program.code.preload_entry is not None
    x, y = randn(300, seed=1), randn(300, seed=2)
    for preload in (True, False):
        out = torch.empty(300)
        device = launch.Device(dict(x=x, y=y, out=out), [out])
        device.launch(kernel, dict(x=x, y=y, out=out, n=300), (2,), preload=preload)
        device.memory.copy_back()
        assert torch.equal(out, x + y)


@pytest.mark.parametrize("warps", (1, 4))
def test_kernel_of_text(warps):
    """Whoever compiled it: the size of a workgroup is in the metadata."""
    types = dict(x="*fp32", y="*fp32", out="*fp32", n="i32")
    text = compile_text(kernels.add_kernel, types, dict(BLOCK=256), num_warps=warps).asm["amdgcn"]
    kernel = launch.Kernel.of_text(text, list(types.items()))
    assert (kernel.warps, kernel.lds_bytes) == (warps, 0)
    x, y, out = randn(300, seed=1), randn(300, seed=2), torch.empty(300)
    run(kernel, dict(x=x, y=y, out=out, n=300), (2,), ["out"])
    assert torch.equal(out, x + y)


def test_grid():
    """Workgroup ids of a grid of three dimensions, which is a part of the arguments that Triton adds."""
    kernel = compile_(kernels.grid_kernel, dict(out="*i32"), {})
    out = torch.empty(2 * 3 * 5, dtype=torch.int32)
    run(kernel, dict(out=out), (2, 3, 5), ["out"])
    want = [x + 16 * y + 256 * z for z in range(5) for y in range(3) for x in range(2)]
    assert out.tolist() == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax(dtype):
    name = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    kernel = compile_(kernels.softmax_kernel, dict(x=name, out="*fp32", columns="i32"), dict(BLOCK=512))
    x, out = randn(5, 300, dtype=dtype, scale=3), torch.empty(5, 300)
    run(kernel, dict(x=x, out=out, columns=300), (5,), ["out"])
    torch.testing.assert_close(out, x.float().softmax(1), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("name, dtype", [("i32", torch.int32), ("i64", torch.int64), ("fp32", torch.float32)])
def test_reductions_and_scan(name, dtype, warps):
    """DPP inside a wave, LDS between waves."""
    pointers = dict.fromkeys(("x", "total", "largest", "running"), f"*{name}") | dict(position="*i32")
    kernel = compile_(kernels.reduce_kernel, pointers, dict(BLOCK=512), num_warps=warps)
    x = (randn(512, seed=3) * 100).to(dtype)
    total, largest = torch.empty(1, dtype=dtype), torch.empty(1, dtype=dtype)
    position = torch.empty(1, dtype=torch.int32)
    running = torch.empty(512, dtype=dtype)
    outputs = dict(total=total, largest=largest, position=position, running=running)
    run(kernel, dict(x=x, **outputs), (1,), outputs)
    exact = x.double().cumsum(0)
    tolerance = 0 if dtype != torch.float32 else 1e-5 * float(x.double().abs().sum())
    assert abs(total.double() - exact[-1]) <= tolerance and (running.double() - exact).abs().max() <= tolerance
    assert largest == x.max() and position == x.argmax()


@pytest.mark.parametrize("name, dtype", [("i32", torch.int32), ("fp32", torch.float32), ("i16", torch.int16)])
def test_sort(name, dtype):
    kernel = compile_(kernels.sort_kernel, dict(x=f"*{name}", out=f"*{name}"), dict(BLOCK=512))
    x, out = (randn(512) * 1000).to(dtype), torch.empty(512, dtype=dtype)
    run(kernel, dict(x=x, out=out), (1,), ["out"])
    assert torch.equal(out, x.sort().values)


def test_global_atomics():
    pointers = dict(x="*i32", counts="*i32", sums="*fp32", n="i32")
    kernel = compile_(kernels.histogram_kernel, pointers, dict(BLOCK=256))
    x = torch.randint(0, 100, (1000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    counts, sums = torch.zeros(16, dtype=torch.int32), torch.zeros(16)
    run(kernel, dict(x=x, counts=counts, sums=sums, n=1000), (4,), [])
    assert torch.equal(counts, torch.bincount(x % 16, minlength=16).int())
    assert torch.equal(sums, torch.zeros(16).index_add_(0, x % 16, x.float()))


DOTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8e4nv": torch.float8_e4m3fn,
        "fp8e5": torch.float8_e5m2}  # fmt: skip


@pytest.mark.parametrize("name", DOTS)
@pytest.mark.parametrize(
    "options", [dict(), dict(matrix_instr_nonkdim=16), dict(num_warps=8, num_stages=2)], ids=["32", "16", "8 warps"]
)
def test_dot(name, options):
    """Pipelined, with loads straight to LDS and transposed reads where Triton uses them."""
    M, N, K = 64, 64, 256
    pointers = dict(a=f"*{name}", b=f"*{name}", out="*fp32")
    constants = dict(K=K, M=M, N=N, BLOCK_K=64)
    kernel = compile_(kernels.dot_kernel, pointers, constants, pointers, **options)
    assert any(one.name.startswith("v_mfma") for one in kernel.program.instructions)
    a, b, out = randn(M, K, seed=1, dtype=DOTS[name]), randn(K, N, seed=2, dtype=DOTS[name]), torch.empty(M, N)
    run(kernel, dict(a=a, b=b, out=out), (1,), ["out"])
    assert relative_l2(out, a.double() @ b.double()) < 3e-7


def test_spills():
    """A kernel that is given fewer registers than it needs keeps the rest in scratch."""
    M, N, K = 128, 128, 512
    pointers = dict(a="*bf16", b="*bf16", out="*fp32")
    constants = dict(K=K, M=M, N=N, BLOCK_K=64)
    kernel = compile_(kernels.dot_kernel, pointers, constants, pointers, waves_per_eu=5)
    assert any(one.name.startswith("scratch_load") for one in kernel.program.instructions)
    a, b, out = randn(M, K, seed=1).bfloat16(), randn(K, N, seed=2).bfloat16(), torch.empty(M, N)
    run(kernel, dict(a=a, b=b, out=out), (1,), ["out"])
    assert relative_l2(out, a.double() @ b.double()) < 3e-7


@pytest.mark.parametrize("options, shape", [(dict(), "32x32x64"), (dict(matrix_instr_nonkdim=16), "16x16x128")])
@pytest.mark.parametrize("warps", [4, 8])
def test_dot_scaled(options, shape, warps):
    """Against float64 on the dequantised operands: only the order of the sum differs."""
    M, N, K = 64, 128, 512
    pointers = dict(a="*u8", a_scale="*u8", b="*u8", b_scale="*u8", out="*fp32")
    constants = dict(K=K, M=M, N=N, BLOCK_K=256)
    kernel = compile_(kernels.dot_scaled_kernel, pointers, constants, pointers, num_warps=warps, **options)
    matrix = {one.name for one in kernel.program.instructions if one.unit == "mfma"}
    assert matrix == {f"v_mfma_scale_f32_{shape}_f8f6f4"}
    spread = torch.exp2(randn(M, K // 32, seed=3) * 4).repeat_interleave(32, 1)
    a, a_scale = reference.quantize_1x32(randn(M, K, seed=1) * spread)
    b, b_scale = reference.quantize_1x32(randn(N, K, seed=2))
    out = torch.empty(M, N)
    tensors = dict(a=a.view(torch.uint8), a_scale=a_scale, b=b.view(torch.uint8), b_scale=b_scale, out=out)
    run(kernel, tensors, (1,), ["out"])
    want = reference.dequantize_1x32(a, a_scale).double() @ reference.dequantize_1x32(b, b_scale).double().T
    assert relative_l2(out, want) < 1e-7


# --- the package's kernels, as the host launches them


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize(mode, dtype):
    """Bytes equal, over all exponents, with zeros, Inf and NaN; rows that lie apart."""
    base = randn(7, 128, seed=1) * torch.exp2(randn(7, 4, seed=2) * 30).repeat_interleave(32, 1)
    base[2, 5], base[3, 40], base[4, 70:], base[5] = math.inf, math.nan, 0, 0
    x = base.to(dtype)[:, :96]
    spread = torch.cat([x, x, x])[:18].unflatten(0, (2, 3, 3)).transpose(1, 2)  # rows that take three strides
    for rows in (x, spread):
        got = ops.quantize_1x32(rows, mode)
        assert all(same_bytes(a, b) for a, b in zip(got, reference.quantize_1x32(rows, mode)))


def hostile_blocks(blocks: int, binades: int = 272, lowest: int = -148) -> torch.Tensor:
    """[blocks, 32] fp32: blocks of all magnitudes, values up to 2^-24 of the largest, ties, blocks at the edge of a
    scale byte, subnormals, zeros of both signs, Inf and NaN."""
    x = torch.exp2(randn(blocks, 32, seed=1).abs() * -6) * randn(blocks, 32, seed=2).sign()
    x[::2] = (x[::2] * 2**12).round() / 2**12
    x[::3, 0] = 1.75 * (1 + torch.arange(len(x[::3])) % 64 * 2.0**-23)
    x *= torch.exp2(torch.arange(blocks) % binades + float(lowest))[:, None]
    x[::97, 3:9] = torch.tensor([0.0, -0.0, 0.0, -0.0, 1e-45, -1e-45])
    x[5::271], x[7::271, 4], x[11::271, 5], x[13::271, 6] = -0.0, -float("nan"), float("inf"), -float("inf")
    return x


def test_quantize_natively():
    """The bytes that the first product ends with."""
    blocks = 4096
    x = hostile_blocks(blocks)
    data, scale = torch.empty(blocks, 32, dtype=torch.uint8), torch.empty(blocks, dtype=torch.uint8)
    pointers = dict(x="*fp32", data="*u8", scale="*u8")
    kernel = compile_(kernels.quantize_natively_kernel, pointers, dict(N=256), pointers)
    assert any("cvt_scalef32_pk_fp8_f32" in one.name for one in kernel.program.instructions)
    for first in range(0, blocks, 256):
        part = slice(first, first + 256)
        run(kernel, dict(x=x[part], data=data[part], scale=scale[part]), (1,), ["data", "scale"])
    want, want_scale = reference.quantize_1x32(x)
    assert torch.equal(scale, want_scale[:, 0]) and (scale == 255).any() and (scale == 0).any()
    assert torch.equal(data, want.view(torch.uint8))


def dispatched(x: torch.Tensor, x_scale: torch.Tensor | None = None, **options) -> tuple[torch.Tensor, ...]:
    """Rows of x [T, H], and their scale bytes or None, as the first product gets them; one route a token."""
    T, H = x.shape
    inputs = moe_inputs(T=T, H=H, I=32, E=3, K=1) | dict(hidden_states=x)
    inputs |= {} if x_scale is None else dict(hidden_states_scale=x_scale)
    call = ops.moe_call(inputs, torch.bfloat16, **options)
    launches = ops.bound_launches(call)[:2]
    assert [one.kernel.__name__ for one in launches] == ["route_kernel", "dispatch_kernel"]
    launch.simulate(launches, ops.TARGET, call.inputs.values())
    arguments = launches[1].arguments
    slots, scale = arguments["slots"].long(), arguments["rows_scale"]
    return arguments["rows"][slots], None if scale is None else scale[slots]


@pytest.mark.parametrize("H", [256, 1088])
@pytest.mark.parametrize("dtype", FLOATS)
def test_dispatch_rounds_as_defined(dtype, H):
    """Codes and scale bytes are equal; more and fewer blocks than a program's 32, and some over."""
    blocks = 2176 // (H // 32) * (H // 32)
    reach = dict(binades=42, lowest=-25) if dtype is torch.float16 else {}
    x = hostile_blocks(blocks, **reach).to(dtype).view(-1, H)
    codes, scale = dispatched(x)
    want, want_scale = reference.quantize_1x32(x)
    assert torch.equal(scale, want_scale) and (scale == 255).any() and scale.unique().numel() > 30
    assert torch.equal(codes, want.view(torch.uint8))
    assert {0x00, 0x80, 0x01, 0x81, 0x7E, 0xFE, 0x7F} <= set(codes.unique().tolist())


@pytest.mark.parametrize("activation_dtype", ["mxfp8", "bf16"])
def test_dispatch_of_every_code(activation_dtype):
    """Activations that arrive quantised: their bytes, or, for a product in bf16, their values, under each scale."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256).view(256, 256).view(torch.float8_e4m3fn)
    scale = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 8).contiguous()
    rows, rows_scale = dispatched(codes, scale, activation_dtype=activation_dtype)
    if activation_dtype == "mxfp8":
        assert torch.equal(rows, codes.view(torch.uint8)) and torch.equal(rows_scale, scale)
    else:
        want = reference.dequantize_1x32(codes, scale, torch.float32).double() * numerics.HELD_TIMES.value
        assert_equal(rows.double(), want.to(torch.bfloat16).double())


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize(dtype):
    """All codes under scales at both ends and NaN."""
    data = torch.arange(256, dtype=torch.uint8).repeat(5, 1).view(torch.float8_e4m3fn)
    scale = torch.tensor([0, 1, 100, 127, 130, 160, 254, 255], dtype=torch.uint8).repeat(5, 1)
    assert_equal(ops.dequantize_1x32(data, scale, dtype), reference.dequantize_1x32(data, scale, dtype))


@pytest.mark.parametrize("gate_up", [True, False])
@pytest.mark.parametrize("layout", ["row_major", "aiter_gfx950"])
def test_preshuffle(layout, gate_up):
    weight, scale = weights(3, *((2 * 192, 256) if gate_up else (256, 192)))
    want = reference.preshuffle(weight, scale, layout=layout, gate_up=gate_up, pad_to=128)
    call = Preshuffle(weight, scale, layout, gate_up, 128, *(torch.empty_like(x) for x in want))
    ops.preshuffle(call)
    assert same_bytes(call.out_weight, want[0]) and same_bytes(call.out_scale, want[1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gate_up", [True, False])
@pytest.mark.parametrize("layout", ["row_major", "aiter_gfx950"])
def test_quantize_preshuffle(layout, gate_up, dtype):
    """Padded, in every rounding; the gate and up rows take turns."""
    reach = dict(binades=42, lowest=-25) if dtype is torch.float16 else {}
    x = hostile_blocks(2 * 384 * 8, **reach).to(dtype).view(2, *((192, 2, 256) if gate_up else (512, 192)))
    x = x.transpose(1, 2) if gate_up else x
    for mode in MODES:
        options = dict(layout=layout, gate_up=gate_up, pad_to=128)
        want = reference.quantize_preshuffle(x, mode, **options)
        out_weight, out_scale = (torch.empty_like(part) for part in want)
        call = QuantizePreshuffle(x, scale_rounding=mode, **options, out_weight=out_weight, out_scale=out_scale)
        ops.quantize_preshuffle(call.check(writes_out=True))
        assert same_bytes(out_weight, want[0]) and same_bytes(out_scale, want[1]), mode
        assert (out_scale == 255).any() and out_scale.unique().numel() > 30


def simulated_moe(inputs: dict, tiles=None, **options) -> torch.Tensor:
    return ops.fused_moe(ops.moe_call(inputs, **options), tiles)


def check_moe(inputs: dict, tiles=None, **options) -> None:
    assert_agrees(simulated_moe(inputs, tiles, **options), reference.fused_moe(**inputs, **options))


CLAMPED = dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=7.0)
MOE = {
    "one token": (dict(T=1, H=256, I=192, E=9, K=4), {}),
    "few tokens, K tail": (dict(T=7, H=160, I=96, E=5, K=3), CLAMPED),
    "ragged": (dict(T=33, H=256, I=192, E=9, K=3), CLAMPED),
    "many rows": (dict(T=130, H=160, I=96, E=3, K=2), {}),
    "many rows, clamp": (dict(T=130, H=256, I=192, E=4, K=2), CLAMPED),
    "fp32": (dict(T=33, H=160, I=96, E=5, K=3, dtype=torch.float32), {}),
    "fp16, biases": (dict(T=7, H=256, I=192, E=3, K=2, dtype=torch.float16, bias_dtype=torch.bfloat16), CLAMPED),
    "MXFP8 activations": (dict(T=33, H=160, I=96, E=4, K=2, scaled=True, id_dtype=torch.int64), {}),
    "fp32 from MXFP8": (dict(T=7, H=256, I=192, E=3, K=2, scaled=True), dict(out_dtype=torch.float32)),
    "bf16 activations": (dict(T=33, H=160, I=96, E=3, K=2), dict(activation_dtype="bf16")),
    "weight on input": (dict(T=7, H=160, I=96, E=4, K=1), dict(apply_router_weight_on_input=True)),
}


@pytest.mark.parametrize("name", MOE)
def test_fused_moe(name):
    sizes, options = MOE[name]
    check_moe(moe_inputs(**sizes), **options)


@pytest.mark.parametrize("T", [1, 33, 130])
def test_fused_moe_in_aiter_layout(T):
    inputs = moe_inputs(T=T, H=256, I=256, E=3, K=2)
    for name, gate_up in (("w1", True), ("w2", False)):
        both = inputs[name], inputs[f"{name}_scale"]
        arranged = reference.preshuffle(*both, layout="aiter_gfx950", gate_up=gate_up)
        inputs |= dict(zip((name, f"{name}_scale"), arranged))
    check_moe(inputs, layout="aiter_gfx950", **CLAMPED)


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_fused_moe_of_hostile_ids(id_dtype):
    """Ids that name no expert are never an address; a token without one gets zeros."""
    inputs = moe_inputs(T=33, H=160, I=96, E=3, K=3, id_dtype=id_dtype)
    ids = inputs["topk_ids"]
    ids[0], ids[1, 0], ids[2, 1], ids[3, 2] = -1, torch.iinfo(id_dtype).max, torch.iinfo(id_dtype).min, 3
    if id_dtype is torch.int64:
        ids[4, 0], ids[5, 1] = 2**32 + 1, 2**31
    ids[6] = 1  # the same expert three times
    out = simulated_moe(inputs)
    assert_agrees(out, reference.fused_moe(**inputs))
    assert not out[0].any()


def mapped_inputs() -> dict:
    """Some global experts are elsewhere, some map entries are no expert, and num_tokens is 20 of 33."""
    inputs = moe_inputs(T=33, H=160, I=96, E=3, K=3, G=9)
    inputs["expert_map"] = torch.tensor([2, -1, 0, -7, 1, 3, 2**31 - 1, -(2**31), -1], dtype=torch.int32)
    inputs["num_tokens"] = torch.tensor([20], dtype=torch.int32)
    return inputs


def test_fused_moe_with_expert_map():
    """Rows from num_tokens on are zeros."""
    inputs = mapped_inputs()
    out = simulated_moe(inputs)
    assert_agrees(out, reference.fused_moe(**inputs))
    assert not out[20:].any() and out[:20].any()


def test_fused_moe_of_many_routes(monkeypatch):
    """Slots found in parts, with ids that name no expert and an expert map, are those that are found at once."""
    inputs = mapped_inputs()
    inputs["topk_ids"][0, 0] = -1
    call = ops.moe_call(inputs)

    def slots(kernels: list[str]) -> list[torch.Tensor]:
        launches = ops.bound_launches(call)[: len(kernels)]
        assert [one.kernel.__name__ for one in launches] == kernels
        launch.simulate(launches, ops.TARGET, call.inputs.values())
        slots, routes, offsets = (launches[-1].arguments[name] for name in ("slots", "routes", "offsets"))
        return [slots, routes[: offsets[-1]], offsets]

    want = slots(["route_kernel"])
    monkeypatch.setattr(ops.fused_moe_launches, "MANY_ROUTES", 0)
    monkeypatch.setattr(ops.fused_moe_launches, "PARTS_PER_STEP", 1)
    got = slots(["count_kernel", "sum_kernel", "place_kernel"])
    assert all(map(torch.equal, got, want)) and 0 < want[2][-1] < 60 and want[0].min() == -1


def test_fused_moe_of_nan():
    """A NaN stays in its token."""
    inputs = moe_inputs(T=7, H=160, I=96, E=3, K=2)
    inputs["hidden_states"][2, 33] = math.nan
    out = simulated_moe(inputs)
    assert out.isnan().any(1).tolist() == [i == 2 for i in range(7)]
    assert_agrees(out, reference.fused_moe(**inputs))


TILES = [(kind, i) for kind in ("mxfp8", "bf16") for i in range(len(configs.load("gfx950", kind).tiles))]


@pytest.mark.parametrize("activation_dtype, rule", TILES)
def test_every_tile_of_the_configuration(activation_dtype, rule):
    """On a ragged problem with a tail in K."""
    tiles = configs.load("gfx950", activation_dtype).tiles[rule]
    check_moe(moe_inputs(T=45, H=288, I=160, E=3, K=2), tiles, activation_dtype=activation_dtype, **CLAMPED)


@pytest.mark.parametrize("H, I", [(256, 192), (288, 128)])
def test_prefill_tile_of_more_than_its_rows(H, I):
    """Whole tiles and a last one, of two experts, with biases; two waves take the first product where I is 192."""
    tiles = configs.load("gfx950", "mxfp8").tiles[-1]
    inputs = moe_inputs(T=300, H=H, I=I, E=2, K=1, bias_dtype=torch.bfloat16)
    inputs["topk_ids"][:] = (torch.arange(300) > 270)[:, None]
    call = ops.moe_call(inputs, **CLAMPED)
    assert ops.bound_launches(call, tiles)[2].options["num_warps"] == (2 if I == 192 else 4)
    check_moe(inputs, tiles, **CLAMPED)


@pytest.mark.parametrize("sizes", [dict(H=1280, I=128), dict(H=128, I=1280), dict(H=128, I=1152),
                                   dict(H=1280, I=192), dict(H=1216, I=128)])  # fmt: skip
@pytest.mark.parametrize("activation_dtype, rule", TILES)
def test_every_tile_over_many_trips(activation_dtype, rule, sizes):
    """Loops that run, of each product, from the first byte of each buffer on; with a tail of K where it is 1152 or
    1216; with N that prefill's tile of the first product does not divide where I is 192."""
    tiles = configs.load("gfx950", activation_dtype).tiles[rule]
    check_moe(moe_inputs(T=5, **sizes, E=1, K=1), tiles, activation_dtype=activation_dtype)


# --- the checks, each with what it has to catch and the same without the fault


def fails(match: str, body: str, *inputs: np.ndarray, **options) -> None:
    with pytest.raises(SimulationError, match=match):
        execute(body, *inputs, **options)


def test_bounds():
    """An error names the instruction, the place, the buffer and the lane."""
    fails(r"line \d+: global_load_dword v10, v20, s\[4:5\]: load of 4 bytes outside every buffer.*byte 256 of 'source'"
          r", which has 256\); workgroup 0, wave 0, lane 63, 1 in all",
          "v_add_u32_e32 v20, 4, v200\nglobal_load_dword v10, v20, s[4:5]\ns_waitcnt vmcnt(0)", ONES)  # fmt: skip
    fails("store of 2 bytes outside.*byte 1024 of 'out'", "global_store_short v200, v1, s[6:7] offset:1020", ONES,
          outputs=["v1"] * 4)  # fmt: skip
    fails("outside every buffer.*LDS byte 256 of 256", "ds_write_b32 v200, v1 offset:4", ONES, lds=256)
    fails("load.*outside every.*scratch of 8 bytes", "scratch_load_dword v10, off, off offset:8", ONES, scratch=8)
    fails("outside every buffer", "s_load_dword s20, s[4:5], 0x100", ONES)


@pytest.mark.parametrize(
    "match, body",
    [
        ("an address is undefined", "global_load_dword v10, v30, s[4:5]"),
        ("what is stored is undefined", "v_add_u32_e32 v10, v1, v30"),
        ("what is stored is undefined.*32 lanes", "s_mov_b32 exec_hi, 0\nv_mov_b32_e32 v10, v1"),
        ("what is stored is undefined.*lane 4, 60 lanes",
         "s_mov_b64 exec, 1\nv_mov_b32_e32 v31, v1\ns_mov_b64 exec, -1\ns_nop 4\nv_mov_b32_dpp v10, v31 "
         "quad_perm:[0,0,0,0] row_mask:0xf bank_mask:0xf bound_ctrl:1"),
        ("a branch on an undefined condition", "s_cmp_eq_u32 s40, 0\ns_cbranch_scc1 .LBB0_0\n.LBB0_0:"),
        ("a branch on an undefined condition",
         "v_cmp_eq_u32_e32 vcc, v1, v30\ns_nop 1\ns_cbranch_vccz .LBB0_0\n.LBB0_0:"),
        ("EXEC becomes undefined", "v_cmp_eq_u32_e32 vcc, v1, v30\ns_and_saveexec_b64 s[20:21], vcc"),
        ("an address is undefined: s30", "s_load_dword s20, s[30:31], 0x0"),
        ("what is stored is undefined", "ds_write_b8 v200, v1\nds_read_u16 v10, v200\ns_waitcnt lgkmcnt(0)"),
        ("what is stored is undefined", "scratch_load_dword v10, off, off\ns_waitcnt vmcnt(0)"),
        ("what is stored is undefined", "global_load_dword v10, v200, s[6:7]\ns_waitcnt vmcnt(0)"),
        ("what is stored is undefined", "v_readfirstlane_b32 s20, v30\ns_nop 3\nv_mov_b32_e32 v10, s20"),
        ("what is stored is undefined",
         "v_mfma_f32_32x32x2_f32 v[40:55], v1, v30, 0\ns_nop 15\ns_nop 1\nv_mov_b32_e32 v10, v41"),
    ],
)  # fmt: skip
def test_undefined_values(match, body):
    fails(match, body, ONES, lds=256, scratch=4)


def test_undefined_parts_of_a_tensor():
    kernel = compile_(kernels.add_kernel, dict(x="*fp32", y="*fp32", out="*fp32", n="i32"), dict(BLOCK=64))
    x, y, out = randn(64, seed=1), randn(64, seed=2), torch.empty(64)

    def added(n: int) -> None:
        device = launch.Device(dict(x=x, y=y, out=out), [out])
        device.undefine(y, np.arange(256) >= 4 * 40)
        device.launch(kernel, dict(x=x, y=y, out=out, n=n), (1,))
        device.memory.copy_back()

    added(40)
    assert torch.equal(out[:40], (x + y)[:40])
    with pytest.raises(SimulationError, match="what is stored is undefined.*lane 40, 1 lanes in all"):
        added(41)


def test_undefined_values_that_nothing_comes_of():
    """Copied, kept in LDS, masked off: no error."""
    body = """
    v_mov_b32_e32 v20, v30
    ds_write_b32 v200, v20
    s_waitcnt lgkmcnt(0)
    ds_read_b32 v21, v200
    s_mov_b64 s[20:21], 0
    s_mov_b64 s[22:23], -1
    v_cmp_eq_u32_e32 vcc, v1, v30
    s_and_b64 s[24:25], vcc, s[20:21]
    s_waitcnt lgkmcnt(0)
    v_cndmask_b32_e64 v10, v21, v1, s[22:23]
    v_cndmask_b32_e64 v11, v1, v21, s[24:25]
    v_pk_mul_f32 v[12:13], v[1:2], 1.0 op_sel_hi:[0,0]
    s_mov_b32 exec_hi, 0
    ds_write_b32 v200, v30
    s_mov_b64 exec, -1"""
    got = execute(body, ONES, outputs=("v10", "v11", "v13"), lds=256)
    assert (np.array(got) == 1).all()


@pytest.mark.parametrize(
    "match, body",
    [
        ("v10 is read before a wait on vmcnt", "global_load_dword v10, v200, s[4:5]\nv_mov_b32_e32 v10, v10"),
        ("v11 is read before a wait on vmcnt",
         "global_load_dword v10, v200, s[4:5]\nglobal_load_dword v11, v200, s[4:5]\ns_waitcnt vmcnt(1)\n"
         "v_add_u32_e32 v10, v10, v11"),
        ("v10 is written before a wait on vmcnt", "global_load_dword v10, v200, s[4:5]\nv_mov_b32_e32 v10, 0"),
        ("v20 is read before a wait on lgkmcnt",
         "ds_write_b32 v200, v1\ns_waitcnt lgkmcnt(0)\nds_read_b32 v20, v200\nv_mov_b32_e32 v10, v20"),
        ("v20 is read before a wait on lgkmcnt", "ds_bpermute_b32 v20, v200, v1\ns_waitcnt vmcnt(0)\n"
         "v_mov_b32_e32 v10, v20"),
        ("s20 is read before a wait on lgkmcnt", "s_load_dword s20, s[4:5], 0x0\ns_mov_b32 s21, s20"),
        ("s20 is read before a wait on lgkmcnt",  # two scalar loads may come back in either order
         "s_load_dword s20, s[4:5], 0x0\ns_load_dword s22, s[4:5], 0x0\ns_waitcnt lgkmcnt(1)\ns_mov_b32 s21, s20"),
        ("v20 is read before a wait on lgkmcnt",  # a scalar load among LDS loads makes their count say nothing
         "ds_bpermute_b32 v20, v200, v1\ns_load_dword s22, s[4:5], 0x0\ns_waitcnt lgkmcnt(1)\nv_mov_b32_e32 v10, v20"),
        ("v10 is read before a wait on lgkmcnt",  # a flat load counts in both
         "v_mov_b32_e32 v20, s4\nv_mov_b32_e32 v21, s5\nflat_load_dword v10, v[20:21]\ns_waitcnt vmcnt(0)\n"
         "v_mov_b32_e32 v10, v10"),
        ("v10 is read before a wait on vmcnt",
         "v_mov_b32_e32 v20, 0\nglobal_store_dword v20, v1, s[6:7]\nglobal_atomic_add v10, v20, v1, s[6:7] sc0\n"
         "v_mov_b32_e32 v10, v10"),
    ],
)  # fmt: skip
def test_wait_counts(match, body):
    fails(match, body, ONES, lds=256)
    execute(body, ONES, lds=256, observers=[])  # nothing but the check objects
    waits = "\n".join(f"{line}\ns_waitcnt vmcnt(0) lgkmcnt(0)" for line in body.split("\n"))
    if "v10" in body:
        execute(waits, ONES, lds=256)


def test_wait_counts_in_order():
    """Loads and stores of vector memory complete in order, LDS instructions too: a count may leave later ones out."""
    body = """
    global_load_dword v10, v200, s[4:5]
    global_load_dword v11, v200, s[4:5]
    global_store_dword v200, v1, s[6:7]
    s_waitcnt vmcnt(2)
    v_add_u32_e32 v12, 1, v10
    ds_write_b32 v200, v1
    ds_read_b32 v13, v200
    ds_bpermute_b32 v14, v200, v1
    s_waitcnt lgkmcnt(1)
    v_add_u32_e32 v13, 1, v13
    s_waitcnt vmcnt(0) lgkmcnt(0)"""
    got = execute(body, ONES, outputs=("v11", "v12", "v13", "v14"), lds=256)
    assert [x[0] for x in got] == [1, 2, 2, 1]


def test_no_more_loads_are_under_way_than_are_counted():
    """With 63 of them no further one is issued, so that the oldest needs no wait."""
    later = ["global_load_dword v11, v200, s[4:5]"] * 63
    body = ["global_load_dword v10, v200, s[4:5]", *later, "v_add_u32_e32 v12, 1, v10", "s_waitcnt vmcnt(0)"]
    assert execute("\n".join(body), ONES, outputs=("v12",))[0][0] == 2
    del body[1]
    fails("v10 is read before a wait on vmcnt", "\n".join(body), ONES)


A, B = "v[1:4]", "v[5:8]"
HAZARDS = [
    # what it is, the instructions with {} where the wait states have to be, and how many
    ("result of a matrix instruction",
     f"v_mfma_f32_32x32x16_bf16 v[40:55], {A}, {B}, 0{{}}\nv_mov_b32_e32 v10, v40", 12),
    ("result of a matrix instruction",
     f"v_mfma_f32_16x16x32_bf16 v[40:43], {A}, {B}, 0{{}}\nv_mov_b32_e32 v10, v43", 8),
    ("result of a matrix instruction", "v_mfma_f32_32x32x2_f32 v[40:55], v1, v2, 0{}\nv_mov_b32_e32 v10, v40", 18),
    ("result of a matrix instruction",
     "v_mfma_f32_32x32x64_f8f6f4 v[40:55], v[1:8], v[9:16], 0{}\nglobal_store_dword v200, v40, s[6:7]", 20),
    ("result of a matrix instruction",
     "v_mfma_f32_16x16x128_f8f6f4 v[40:43], v[1:8], v[9:16], 0{}\nv_mov_b32_e32 v41, 0", 12),
    ("reads a result as A, B",
     f"v_mfma_f32_16x16x32_bf16 v[40:43], {A}, {B}, 0{{}}\nv_mfma_f32_16x16x32_bf16 v[50:53], v[40:43], v[5:8], 0", 8),
    ("reads a result as C", f"v_mfma_f32_16x16x32_bf16 v[40:43], {A}, {B}, 0{{}}\n"
     f"v_mfma_f32_16x16x32_bf16 v[50:53], {A}, {B}, v[42:45]", 6),
    ("reads a result as C", f"v_mfma_f32_16x16x32_bf16 v[40:43], {A}, {B}, 0{{}}\n"
     "v_mfma_f32_16x16x16_bf16 v[40:43], v[1:2], v[5:6], v[40:43]", 6),
    ("reads a result as C", f"v_mfma_f32_16x16x32_bf16 v[40:43], {A}, {B}, 0{{}}\n"
     f"v_mfma_f32_16x16x32_bf16 v[40:43], {A}, {B}, v[40:43]", 0),
    ("C of a matrix instruction is overwritten",
     f"v_mfma_f32_32x32x16_bf16 v[40:55], {A}, {B}, v[60:75]{{}}\nv_mov_b32_e32 v60, 0", 7),
    ("reads what a vector instruction wrote",
     f"v_mov_b32_e32 v1, 0{{}}\nv_mfma_f32_32x32x16_bf16 v[40:55], {A}, {B}, 0", 2),
    ("DPP reads", "v_mov_b32_e32 v1, 0{}\nv_mov_b32_dpp v10, v1 row_shr:1 row_mask:0xf bank_mask:0xf", 2),
    ("v_permlane reads", "v_mov_b32_e32 v1, 0{}\nv_permlane16_swap_b32_e32 v1, v2", 2),
    ("read of a lane", "v_mov_b32_e32 v1, 0{}\nv_readlane_b32 s20, v1, 3", 1),
    ("transcendental", "v_rcp_f32_e32 v10, v1{}\nv_mul_f32_e32 v10, v10, v1", 1),
    ("written in part", "v_mov_b32_e32 v10, v1\nv_or_b32_sdwa v10, v1, v2 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE "
     "src0_sel:DWORD src1_sel:DWORD{}\nv_mov_b32_e32 v11, v10", 1),
    ("DPP after a vector instruction wrote EXEC",
     "v_cmpx_eq_u32_e32 v1, v2{}\nv_mov_b32_dpp v10, v1 row_shr:1 row_mask:0xf bank_mask:0xf", 5),
    ("EXEC was written", "v_cmpx_eq_u32_e32 v1, v2{}\nv_readfirstlane_b32 s20, v1", 4),
    ("reads an SGPR that one wrote", "v_cmp_eq_u32_e64 s[20:21], v1, v2{}\nv_cndmask_b32_e64 v10, v1, v2, s[20:21]", 2),
    ("reads an SGPR that one wrote", "v_readfirstlane_b32 s20, v1{}\nv_mov_b32_e32 v10, s20", 2),
    ("memory instruction reads an SGPR", "v_readfirstlane_b32 s4, v1{}\nglobal_load_dword v10, v200, s[4:5]", 5),
    ("v_div_fmas reads VCC", "v_cmp_eq_u32_e32 vcc, v1, v2{}\nv_div_fmas_f32 v10, v1, v2, v1", 4),
    ("lane number", "v_readfirstlane_b32 s20, v1{}\nv_readlane_b32 s21, v2, s20", 4),
    ("uses M0", "s_mov_b32 m0, 0{}\nglobal_load_lds_dword v200, s[4:5]", 1),
    ("data of a store", "global_store_dwordx4 v200, v[1:4], s[6:7]{}\nv_mov_b32_e32 v3, 0", 2),
]  # fmt: skip


@pytest.mark.parametrize("what, body, states", HAZARDS, ids=lambda x: str(x).split("\n")[0][:24])
def test_wait_states(what, body, states):
    """Exactly as many as the table says are enough, also when the path leads around a loop."""
    enough = f"\ns_nop {states - 1}" if states else ""
    kernels.snippet(body.format(enough), 16, [])
    if states:
        short = f"\ns_nop {states - 2}" if states > 1 else ""
        with pytest.raises(SimulationError, match=f"{states - 1} wait states after .*takes {states}.*{what}"):
            if states == 20:  # what LLVM misses: a warning, see below
                raise_as_error(body.format(short))
            kernels.snippet(body.format(short), 16, [])
        first, then = body.split("{}\n")
        looped = f"s_branch .LBB0_2\n.LBB0_1:\n{then}\ns_branch .LBB0_3\n.LBB0_2:\n{first}\ns_branch .LBB0_1\n.LBB0_3:"
        if states > 2:
            with pytest.raises(SimulationError, match=f"1 wait states after .*takes {states}"):
                kernels.snippet(looped, 16, [])


def test_wait_states_of_overwritten_results():
    """What another instruction has written since is no result of the first."""
    body = """
    v_mfma_f32_16x16x4_f32 v[44:47], v1, v2, v[60:63]
    s_nop 1
    v_mfma_f32_16x16x4_f32 v[42:45], v1, v2, v[64:67]
    v_mfma_f32_16x16x4_f32 v[40:43], v1, v2, v[42:45]"""
    kernels.snippet(body, 2, [])
    with pytest.raises(SimulationError, match="reads a result as C"):
        kernels.snippet(body.replace("v[42:45], v1", "v[41:44], v1"), 2, [])


def raise_as_error(body: str) -> None:
    with pytest.warns(hazards.CompilerDefect) as caught:
        kernels.snippet(body, 16, [])
    raise SimulationError(str(caught[0].message))


def test_order_in_lds():
    write, wait, barrier = "ds_write_b32 v200, v1", "s_waitcnt lgkmcnt(0)", "s_barrier"
    read_other = "v_xor_b32_e32 v20, 0x100, v200\nds_read_b32 v10, v20\ns_waitcnt lgkmcnt(0)"
    lines = lambda *parts: "\n".join(parts)
    options = dict(waves=4, lds=1024)
    (got,) = execute(lines(write, wait, barrier, read_other), FOUR_WAVES, **options)
    assert (got == FOUR_WAVES ^ 64).all()
    fails("load of LDS byte.*no wait and barrier.*another wave", lines(write, wait, read_other), FOUR_WAVES, **options)
    fails("load of LDS byte.*no wait and barrier", lines(write, barrier, read_other), FOUR_WAVES, **options)
    overwrite = "ds_write_b32 v200, v200"
    safe = lines(write, wait, barrier, read_other)
    execute(lines(safe, barrier, overwrite, wait), FOUR_WAVES, **options)
    fails("store of LDS byte.*no wait and barrier", lines(safe, overwrite, wait), FOUR_WAVES, **options)
    late = lines(write, wait, barrier, "v_xor_b32_e32 v20, 0x100, v200\nds_read_b32 v10, v20", barrier, overwrite, wait)
    fails("store of LDS byte.*no wait and barrier", late, FOUR_WAVES, **options)
    same = lines("v_mov_b32_e32 v20, 0", "ds_write_b32 v20, v2", wait, barrier, "ds_read_b32 v10, v20", wait)
    execute(same, FOUR_WAVES, FOUR_WAVES * 0 + 7, **options)  # all waves write one value to one place
    fails("LDS byte 0: another lane stores another value", same.replace("v2", "v1"), FOUR_WAVES, FOUR_WAVES, **options)
    with pytest.raises(checks.Unordered):  # an error of its own, so that one can go on without this check
        execute(lines(write, wait, read_other), FOUR_WAVES, **options)
    others = [one for one in checks.all_checks() if not isinstance(one, checks.LdsOrder)]
    execute(lines(write, wait, read_other), FOUR_WAVES, observers=others, **options)


def test_order_of_loads_to_lds():
    load = """
    v_readfirstlane_b32 s20, v200
    s_nop 3
    s_mov_b32 m0, s20
    s_nop 0
    global_load_lds_dword v200, s[4:5]"""
    own, other = (f"v_xor_b32_e32 v20, {x}, v200\nds_read_b32 v10, v20\ns_waitcnt lgkmcnt(0)" for x in ("0", "0x100"))
    lines = lambda *parts: "\n".join(parts)
    options = dict(waves=4, lds=1024)
    assert (execute(lines(load, "s_waitcnt vmcnt(0)", own), FOUR_WAVES, **options)[0] == FOUR_WAVES).all()
    got = execute(lines(load, "s_waitcnt vmcnt(0)\ns_barrier", other), FOUR_WAVES, **options)
    assert (got[0] == FOUR_WAVES ^ 64).all()
    for body in (lines(load, own), lines(load, "s_waitcnt vmcnt(0)", other), lines(load, "s_barrier", other),
                 lines(load, "s_barrier\ns_waitcnt vmcnt(0)", other)):  # fmt: skip
        fails("load of LDS byte.*no wait and barrier after a load to it", body, FOUR_WAVES, **options)
    again = lines(load, "s_waitcnt vmcnt(0)\ns_barrier", other, "{}v_xor_b32_e32 v21, 0x80, v200",
                  "global_load_lds_dword v21, s[4:5]\ns_waitcnt vmcnt(0)")  # fmt: skip
    execute(again.format("s_barrier\n"), FOUR_WAVES, **options)
    fails("store of LDS byte.*another wave", again.format(""), FOUR_WAVES, **options)


def test_divergent_barriers():
    """A wave that ends or waits elsewhere while others of its workgroup wait."""
    body = """
    v_readfirstlane_b32 s20, v0
    s_nop 3
    s_cmp_eq_u32 s20, 0
    s_cbranch_scc1 .LBB0_1
    s_barrier
    {}
.LBB0_1:
    {}
.LBB0_2:
    s_nop 0"""
    fails("divergent barrier", body.format("", ""), FOUR_WAVES, outputs=[], waves=4)
    fails("divergent barrier", body.format("s_branch .LBB0_2", "s_barrier"), FOUR_WAVES, outputs=[], waves=4)
    execute(body.format("", "").replace("scc1", "execz"), FOUR_WAVES, outputs=[], waves=4)
