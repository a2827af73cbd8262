"""``fused_moe`` of a few tokens, each route by itself as in :mod:`.matvec`, with products on sm_90's matrix unit.

On the vector units a code takes six instructions, and with a few tokens these are as much of the time as memory is.
With a warp's ``mma.sync``, 16 weight rows by 8 columns by 16 of K, it takes less than three: two codes are one
conversion away from the fp16 that it multiplies. Its registers have to be what lanes read, so it is written in Gluon
and assembly:

- A warp takes CHUNK columns of 16 rows at a time. A lane reads 16 neighbouring codes of a row at once; the order of K
  is the one that results.
- The 8 columns are a chunk's 8 blocks: column b of the right operand has the activations of block b, and zeros in the
  place of all others. So the unit sums each block by itself, with e4m3 values on both sides, which fp16 has exactly,
  and scales multiply the sums.
- A lane rounds the activations that the right operand has in its own registers.
- Two chunks are under way for each warp. One that has been multiplied makes room for the next but one, in the same
  registers: if a next chunk had its own and moved over, the move would wait for its loads.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import constexpr_function

from ...configs import MMA_COLUMNS, MMA_ROWS
from .matvec import OF_ROUTES, OF_TOKENS
from .numerics import BLOCK, factor, scale_byte, swiglu
from .overlap import take_over, wait_for_launch_before
from .routing import local_experts

CHUNK = tl.constexpr(MMA_COLUMNS)
"""Columns that a warp multiplies at a time: a block for each column of the product."""

UP_ROWS, DOWN_ROWS = map(tl.constexpr, MMA_ROWS)
"""Output columns of a program. Of w1 a product has 8 gate rows and 8 up rows."""

MOST_ROUTES = 32
"""Of a token, so that each lane looks up the expert of one. Two chunks for each warp are whole turns of as many routes,
so a last turn asks no lane beyond these either."""


def _product_assembly(bf16: bool) -> str:
    """64 columns of a product: of operands of four registers each, in this order, codes of rows g and of rows g + 8,
    activations for the first and for the second two codes of each register, and sums, to which the products are
    added."""
    lines = [
        ".reg .b16 low, high, h0, h1;",
        ".reg .b32 a0, a1, a2, a3;",
        ".reg .f32 f0, f1, s0, s1, s2, s3;",
        *(f"mov.f32 s{i}, ${20 + i};" for i in range(4)),
    ]
    for word in range(4):
        for row in range(2):
            lines += [
                f"mov.b32 {{low, high}}, ${4 + 4 * row + word};",
                f"cvt.rn.f16x2.e4m3x2 a{row}, low;",
                f"cvt.rn.f16x2.e4m3x2 a{row + 2}, high;",
            ]
            for half in (f"a{row}", f"a{row + 2}") if bf16 else ():
                lines += [
                    f"mov.b32 {{h0, h1}}, {half};",
                    "cvt.f32.f16 f0, h0;",
                    "cvt.f32.f16 f1, h1;",
                    f"cvt.rn.bf16x2.f32 {half}, f1, f0;",
                ]
        kind = "bf16.bf16" if bf16 else "f16.f16"
        lines.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.f32 {{s0, s1, s2, s3}}, {{a0, a1, a2, a3}}, "
            f"{{${12 + word}, ${16 + word}}}, {{s0, s1, s2, s3}};"
        )
    lines += [f"mov.f32 ${i}, s{i};" for i in range(4)]
    return "{\n" + "\n".join(lines) + "\n}"


_PRODUCT = gl.constexpr({bf16: _product_assembly(bf16) for bf16 in (False, True)})

_ENCODE = gl.constexpr(
    """{
    .reg .b16 two;
    cvt.rn.satfinite.e4m3x2.f32 two, $3, $2;
    cvt.rn.f16x2.e4m3x2 $0, two;
    cvt.rn.satfinite.e4m3x2.f32 two, $5, $4;
    cvt.rn.f16x2.e4m3x2 $1, two;
    }"""
)
"""Four values -> as fp16, rounded to e4m3, the first and the second two."""

_TO_BF16 = gl.constexpr(
    """{
    cvt.rn.bf16x2.f32 $0, $3, $2;
    cvt.rn.bf16x2.f32 $1, $5, $4;
    }"""
)
"""The same in bf16."""

_DECODE = gl.constexpr(
    """{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
    }"""
)
"""Four codes -> as fp16, the first and the second two."""

_FROM_FP16 = gl.constexpr(
    """{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2;
    cvt.f32.f16 $0, low;
    cvt.f32.f16 $1, high;
    }"""
)

_FOUR_WORDS = "ld.global.L2::256B.v4.b32 {$0, $1, $2, $3}, [$4];"
_WORDS = gl.constexpr(_FOUR_WORDS)
_WORDS_WHERE = gl.constexpr(
    f"""{{
    .reg .pred there;
    setp.ne.b32 there, $5, 0;
    mov.b32 $0, 0;
    mov.b32 $1, 0;
    mov.b32 $2, 0;
    mov.b32 $3, 0;
    @there {_FOUR_WORDS}
    }}"""
)
"""Four words from an address on, all of them or where a number is not 0, and zeros elsewhere. If they are not in the L2
cache 256 bytes are brought there: the same lanes, or their neighbours, read the others right after."""

_NEIGHBOUR = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;")
"""What the other of the two lanes has that share a block."""

_FROM_OWNERS = gl.constexpr(
    """{
    .reg .b32 lane;
    mov.u32 lane, %laneid;
    and.b32 lane, lane, 3;
    shl.b32 lane, lane, 3;
    shfl.sync.idx.b32 $0, $2, lane, 0x1f, 0xffffffff;
    add.u32 lane, lane, 6;
    shfl.sync.idx.b32 $1, $2, lane, 0x1f, 0xffffffff;
    }"""
)
"""What lanes have that round blocks 2 t and 2 t + 1."""

_OF_LANE = gl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;")

_LOCAL_ONES = gl.constexpr(
    """{
    .reg .b32 ones, nth;
    .reg .pred local;
    setp.ge.s32 local, $2, 0;
    vote.sync.ballot.b32 ones, local, 0xffffffff;
    mov.u32 nth, %laneid;
    add.u32 nth, nth, 1;
    fns.b32 $0, ones, 0, nth;
    popc.b32 $1, ones;
    }"""
)
"""Of what each lane has, lane k gets the place of the k-th that is not negative, -1 beyond the last, and how many there
are."""


@constexpr_function
def _layout(warps, *registers):
    """[warps, 8, 4, *registers]: lane 4 g + t of a warp has all of [:, g, t]. In the products it has rows g and g + 8
    of the weight, column g of the right operand, and columns 2 t and 2 t + 1 of the result."""
    n = len(registers)
    return gl.BlockedLayout(
        [1, 1, 1, *registers], [1, 8, 4, *[1] * n], [warps, *[1] * (n + 2)], list(range(n + 2, -1, -1))
    )


@constexpr_function
def _rank(layout):
    return len(layout.order)


@constexpr_function
def _kept(layout, axes):
    """The layout of what has only these axes of one with ``layout``."""
    for axis in reversed(range(len(layout.order))):
        if axis not in axes:
            layout = gl.SliceLayout(axis, layout)
    return layout


@gluon.jit
def _along(AXIS: gl.constexpr, SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """Each element's place along an axis."""
    place = gl.arange(0, SIZE, layout=_kept(LAYOUT, (AXIS,)))
    for axis in gl.static_range(_rank(LAYOUT)):
        if axis != AXIS:
            place = gl.expand_dims(place, axis)
    return place


@gluon.jit
def _of_lanes(x, LAYOUT: gl.constexpr):
    """x [warps, 8, 4], for all registers of LAYOUT."""
    x = gl.convert_layout(x, _kept(LAYOUT, (0, 1, 2)), assert_trivial=True)
    for axis in gl.static_range(3, _rank(LAYOUT)):
        x = gl.expand_dims(x, axis)
    return x


@gluon.jit
def _halves(x):
    """Of a tensor [warps, 8, 4, 2, ...]: the first and the second half."""
    if len(x.shape) == 6:
        x = gl.permute(x, (0, 1, 2, 4, 5, 3))
    else:
        x = gl.permute(x, (0, 1, 2, 4, 3))
    return gl.split(x)


@gluon.jit
def _codes(words, mask, ALL: gl.constexpr):
    """Four words from each of ``words`` [warps, 8, 4, 2, 4] on, pointers, [warps, 8, 4, 2, 4, 4] int32; zeros where not
    ``mask``, unless ALL. Of weights, which no launch writes: the compiler may read them when it likes."""
    WARPS: gl.constexpr = gl.num_warps()
    address = words.to(gl.int64, bitcast=True)
    if ALL:
        w0, w1, w2, w3 = gl.inline_asm_elementwise(
            _WORDS, "=r,=r,=r,=r,l", [address],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        w0, w1, w2, w3 = gl.inline_asm_elementwise(
            _WORDS_WHERE, "=&r,=&r,=&r,=&r,l,r", [address, mask.to(gl.int32)],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    codes = gl.reshape(gl.join(gl.join(w0, w2), gl.join(w1, w3)), (WARPS, 8, 4, 2, 4, 4))
    return gl.convert_layout(codes, _layout(WARPS, 2, 4, 4), assert_trivial=True)


@gluon.jit
def _weights(
    w, w_scale, expert, chunk, n, there,
    K: gl.constexpr, ROWS: gl.constexpr, APART: gl.constexpr, ALL: gl.constexpr,
):  # fmt: skip
    """Of a chunk: words of codes [warps, 8, 4, 2, 4, 4] of rows n + g and APART beyond, 16 codes of each 64 columns,
    and the pairs of scale bytes of a lane's columns of the product, [warps, 8, 4, 2] int32.

    w [E, ROWS, K], w_scale [E, ROWS, K/32]; expert, chunk, there: [warps, 8, 4]; zeros where not ``there`` (ALL: it is
    everywhere), and beyond K.
    """
    WARPS: gl.constexpr = gl.num_warps()
    LANES: gl.constexpr = _layout(WARPS)
    F: gl.constexpr = _layout(WARPS, 2, 4)
    row = n + _along(1, 8, LANES)
    t = _along(2, 4, LANES)
    first = expert.to(gl.int64) * (ROWS * (K // 4)) + (row * (K // 4) + chunk * (CHUNK // 4) + 4 * t)
    at = _of_lanes(first, F) + (APART * (K // 4) * _along(3, 2, F) + 16 * _along(4, 4, F))
    words = w.to(gl.pointer_type(gl.int32), bitcast=True) + at
    column = _of_lanes(chunk * CHUNK + 16 * t, F) + 64 * _along(4, 4, F)
    mask, words = gl.broadcast(_of_lanes(there, F) & (column < K), words)
    codes = _codes(words, mask, ALL)
    block = chunk * (CHUNK // BLOCK) + 2 * t
    P: gl.constexpr = _layout(WARPS, 2)
    there &= block < K // BLOCK
    # A pair as a number: bytes side by side in a register would have to be put there, which waits for them.
    if K % (2 * BLOCK) == 0:
        first = expert.to(gl.int64) * (ROWS * (K // (2 * BLOCK))) + (row * (K // (2 * BLOCK)) + block // 2)
        at = _of_lanes(first, P) + APART * (K // (2 * BLOCK)) * _along(3, 2, P)
        mask, at = gl.broadcast(_of_lanes(there, P), at)
        pairs = w_scale.to(gl.pointer_type(gl.uint16), bitcast=True) + at
        pair = gl.load(pairs, mask=mask, other=0).to(gl.int32)
    else:
        first = expert.to(gl.int64) * (ROWS * (K // BLOCK)) + (row * (K // BLOCK) + block)
        at = _of_lanes(first, P) + APART * (K // BLOCK) * _along(3, 2, P)
        mask, at = gl.broadcast(_of_lanes(there, P), at)
        second = mask & (_of_lanes(block, P) + 1 < K // BLOCK)
        pair = gl.load(w_scale + at, mask=mask, other=0).to(gl.int32)
        pair |= gl.load(w_scale + at + 1, mask=second, other=0).to(gl.int32) << 8
    return codes, pair


@gluon.jit
def _own(chunk, there, K: gl.constexpr):
    """Where the 16 columns begin that a lane rounds, those of block g of a chunk that lanes 0 and 1, or 2 and 3, of its
    four have; and whether it is one of these."""
    LANES: gl.constexpr = _layout(gl.num_warps())
    g = _along(1, 8, LANES)
    t = _along(2, 4, LANES)
    column = chunk * CHUNK + g // 2 * 64 + t * 16
    return column, there & (column < K) & (t // 2 == g % 2)


@gluon.jit
def _as_words(value):
    """value [warps, 8, 4, N, 2 or 4], unsigned and of 16 or 8 bits -> words of them, [warps, 8, 4, N] int32."""
    value = value.to(gl.int32)
    if value.shape[4] == 4:
        value = gl.reshape(value, (value.shape[0], 8, 4, value.shape[3], 2, 2))
        low, high = gl.split(value)
        value = low | high << 8
    low, high = gl.split(value)
    return low | high << 16


@gluon.jit
def _words_at_once(row, column, own, PER_WORD: gl.constexpr):
    """16 elements from ``column`` [warps, 8, 4] on of an aligned row, as words [warps, 8, 4, 16 / PER_WORD]."""
    COUNT: gl.constexpr = 16 // PER_WORD
    L: gl.constexpr = _layout(gl.num_warps(), COUNT)
    words = gl.multiple_of(row.to(gl.pointer_type(gl.int32), bitcast=True), 16)
    mask, at = gl.broadcast(_of_lanes(own, L), _of_lanes(column // 16 * COUNT, L) + _along(3, COUNT, L))
    return gl.load(words + at, mask=mask, other=0)


@gluon.jit
def _words_by_element(row, column, own, PER_WORD: gl.constexpr):
    """The same of any row."""
    COUNT: gl.constexpr = 16 // PER_WORD
    bits: gl.constexpr = gl.int32 if PER_WORD == 1 else gl.uint16 if PER_WORD == 2 else gl.uint8
    L: gl.constexpr = _layout(gl.num_warps(), COUNT, PER_WORD)
    at = _of_lanes(column, L) + (PER_WORD * _along(3, COUNT, L) + _along(4, PER_WORD, L))
    mask, at = gl.broadcast(_of_lanes(own, L), at)
    value = gl.load(row.to(gl.pointer_type(bits), bitcast=True) + at, mask=mask, other=0)
    value = gl.reshape(value, (gl.num_warps(), 8, 4, COUNT)) if PER_WORD == 1 else _as_words(value)
    return gl.convert_layout(value, _layout(gl.num_warps(), COUNT), assert_trivial=True)


@gluon.jit
def _activations(row, chunk, there, K: gl.constexpr):
    """Of a row of any type, a pointer, what a lane rounds (:func:`_own`), as words [warps, 8, 4, 4 or 8 or 16]; zeros
    where it is another lane's."""
    PER_WORD: gl.constexpr = 32 // row.dtype.element_ty.primitive_bitwidth
    column, own = _own(chunk, there, K)
    if row.to(gl.int64, bitcast=True) % 16 == 0:
        words = _words_at_once(row, column, own, PER_WORD)
    else:
        words = _words_by_element(row, column, own, PER_WORD)
    return words


@gluon.jit
def _values(words, dtype: gl.constexpr):
    """Words of elements of a float type -> their values, [warps, 8, 4, 16] fp32."""
    WARPS: gl.constexpr = gl.num_warps()
    if dtype == gl.float32:
        value = words.to(gl.float32, bitcast=True)
    else:
        if dtype == gl.bfloat16:
            low = (words << 16).to(gl.float32, bitcast=True)
            high = (words & -65536).to(gl.float32, bitcast=True)
        else:
            low, high = gl.inline_asm_elementwise(
                _FROM_FP16, "=f,=f,r", [words], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
            )  # fmt: skip
        value = gl.reshape(gl.join(low, high), (WARPS, 8, 4, 16))
    return gl.convert_layout(value, _layout(WARPS, 16), assert_trivial=True)


@gluon.jit
def _twos(value, ASSEMBLY: gl.constexpr):
    """value [warps, 8, 4, 16] fp32 -> words of the first and of the second two of each 4, [warps, 8, 4, 4]."""
    WARPS: gl.constexpr = gl.num_warps()
    even, odd = gl.split(gl.reshape(value, (WARPS, 8, 4, 4, 2, 2)))
    v0, v2 = gl.split(even)
    v1, v3 = gl.split(odd)
    first, second = gl.inline_asm_elementwise(
        ASSEMBLY, "=r,=r,f,f,f,f", [v0, v1, v2, v3], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )  # fmt: skip
    L: gl.constexpr = _layout(WARPS, 4)
    return gl.convert_layout(first, L, assert_trivial=True), gl.convert_layout(second, L, assert_trivial=True)


@gluon.jit
def _rounded(value, MXFP8: gl.constexpr):
    """value [warps, 8, 4, 16] fp32, what each lane rounds -> for the right operand, words of the first and of the
    second two of each 4 [warps, 8, 4, 4], fp16 of MXFP8's codes, or else bf16; and the factors of a lane's two columns
    of the product, [warps, 8, 4] each."""
    if MXFP8:
        amax = gl.max(value.to(gl.int32, bitcast=True) & 0x7FFFFFFF, axis=3)
        other = gl.inline_asm_elementwise(_NEIGHBOUR, "=r,r", [amax], dtype=gl.int32, is_pure=True, pack=1)
        byte = scale_byte(gl.maximum(amax, other), "rceil")
        # 2^(127 - byte); what it is for NaN does not matter.
        inverse = ((254 - byte) << 23).to(gl.float32, bitcast=True)
        first, second = _twos(value * gl.expand_dims(inverse, 3), _ENCODE)
        factor0, factor1 = gl.inline_asm_elementwise(
            _FROM_OWNERS, "=r,=r,r", [factor(byte)], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
        )  # fmt: skip
    else:
        first, second = _twos(value, _TO_BF16)
        factor0 = gl.full([gl.num_warps(), 8, 4], 1.0, gl.float32, gl.SliceLayout(3, _layout(gl.num_warps(), 16)))
        factor1 = factor0
    return first, second, factor0, factor1


@gluon.jit
def _sums(codes, pair, first, second, factor0, factor1, BF16: gl.constexpr):
    """What :func:`_weights` and :func:`_rounded` give -> sums of blocks times both factors, [warps, 8, 4, 2] for the
    two rows of a lane: of two blocks, of which four lanes have all eight."""
    WARPS: gl.constexpr = gl.num_warps()
    L: gl.constexpr = _layout(WARPS, 4)
    own = _along(1, 8, L) // 2
    total = gl.full([WARPS, 8, 4, 4], 0.0, gl.float32, L)
    row0, row1 = _halves(codes)
    for step in gl.static_range(4):
        a0, a1 = _halves(gl.reshape(row0, (WARPS, 8, 4, 2, 2, 4)))
        b0, b1 = _halves(gl.reshape(row1, (WARPS, 8, 4, 2, 2, 4)))
        if step // 2 == 1:
            a0 = a1
            b0 = b1
        a0, a1 = _halves(a0)
        b0, b1 = _halves(b0)
        if step % 2 == 1:
            a0 = a1
            b0 = b1
        total = gl.inline_asm_elementwise(
            _PRODUCT[BF16], "=f,=f,=f,=f," + "r," * 16 + "f,f,f,f",
            [
                gl.convert_layout(a0, L, assert_trivial=True), gl.convert_layout(b0, L, assert_trivial=True),
                gl.where(own == step, first, 0), gl.where(own == step, second, 0), total,
            ],
            dtype=gl.float32, is_pure=True, pack=4,
        )  # fmt: skip
    even, odd = gl.split(gl.reshape(total, (WARPS, 8, 4, 2, 2)))
    P: gl.constexpr = _layout(WARPS, 2)
    even = gl.convert_layout(even, P, assert_trivial=True) * _of_lanes(factor0, P)
    odd = gl.convert_layout(odd, P, assert_trivial=True) * _of_lanes(factor1, P)
    return even * factor(pair & 0xFF) + odd * factor(pair >> 8)


@gluon.jit
def _rows(total):
    """The sums of whole rows, [8, 2]."""
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [gl.num_warps(), 1], [1, 0])
    return gl.convert_layout(gl.sum(gl.sum(total, axis=2), axis=0), layout)


@gluon.jit
def _multiplied(codes, pair, words, x_pair, DTYPE: gl.constexpr, SCALED: gl.constexpr, MXFP8: gl.constexpr):
    """:func:`_sums` of a chunk of w1. SCALED: the activations are codes, with pairs of scale bytes."""
    if SCALED:
        first, second = gl.inline_asm_elementwise(
            _DECODE, "=r,=r,r", [words], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )  # fmt: skip
        return _sums(codes, pair, first, second, factor(x_pair & 0xFF), factor(x_pair >> 8), False)
    else:
        first, second, factor0, factor1 = _rounded(_values(words, DTYPE), MXFP8)
        return _sums(codes, pair, first, second, factor0, factor1, not MXFP8)


@gluon.jit
def _scales_of(x_scale, chunk, H: gl.constexpr):
    """Of a row of scale bytes, the pair of a lane's columns of the product, [warps, 8, 4] int32."""
    block = chunk * (CHUNK // BLOCK) + 2 * _along(2, 4, _layout(gl.num_warps()))
    block, chunk = gl.broadcast(block, chunk)
    low = gl.load(x_scale + block, mask=block < H // BLOCK, other=0).to(gl.int32)
    return low | gl.load(x_scale + block + 1, mask=block + 1 < H // BLOCK, other=0).to(gl.int32) << 8


@gluon.jit
def _operands_of_w1(
    row, x_scale, w, w_scale, chunk, n, H: gl.constexpr, N: gl.constexpr, ALL: gl.constexpr
):  # fmt: skip
    """All that a chunk takes."""
    there = chunk < (H + CHUNK - 1) // CHUNK
    codes, pair = _weights(w, w_scale, chunk * 0, chunk, n, there, H, 2 * N, N, ALL)
    words = _activations(row, chunk, there, H)
    x_pair = chunk
    if x_scale is not None:
        x_pair = _scales_of(x_scale, chunk, H)
    return codes, pair, words, x_pair


@gluon.jit(**OF_ROUTES)
def gate_up_mma_kernel(
    x, x_scale, w, w_scale, bias, inner, topk_ids, expert_map, num_tokens, topk_weights,
    x_stride: "i64", x_scale_stride: "i64", routes_total: "i32", ids_stride: "i64", first_token: "i64", known: "i64",
    weights_stride: "i64", alpha: "fp32", beta: "fp32", limit: "fp32",
    H: gl.constexpr, N: gl.constexpr, EXPERTS: gl.constexpr, TOPK: gl.constexpr, MXFP8: gl.constexpr,
    LIMITED: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """:func:`.matvec.gate_up_kernel`, one program for UP_ROWS columns of a route; its warps take chunks in turns."""
    take_over(OVERLAP)
    WARPS: gl.constexpr = gl.num_warps()
    TRIPS: gl.constexpr = (H + CHUNK * WARPS - 1) // (CHUNK * WARPS)
    ALL: gl.constexpr = H % (CHUNK * WARPS) == 0 and TRIPS % 2 == 0
    route = gl.program_id(0) // (N // UP_ROWS)
    n = gl.program_id(0) % (N // UP_ROWS) * UP_ROWS
    same: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    experts = local_experts(
        topk_ids, expert_map, num_tokens, route + gl.arange(0, 1, layout=same), routes_total, ids_stride, first_token,
        known, EXPERTS, TOPK,
    )  # fmt: skip
    expert = gl.max(experts, 0).to(gl.int64)
    if expert >= 0:
        token = (route // TOPK).to(gl.int64)
        row = x + token * x_stride
        if x_scale is not None:
            x_scale += token * x_scale_stride
        w += expert * (2 * N * H)
        w_scale += expert * (2 * N * (H // BLOCK))
        SCALED: gl.constexpr = x_scale is not None
        DTYPE: gl.constexpr = x.dtype.element_ty
        chunk = _along(0, WARPS, _layout(WARPS))
        chunk, _ = gl.broadcast(chunk, _along(1, 8, _layout(WARPS)) + _along(2, 4, _layout(WARPS)))
        codes0, pair0, words0, x_pair0 = _operands_of_w1(row, x_scale, w, w_scale, chunk, n, H, N, ALL)
        codes1, pair1, words1, x_pair1 = _operands_of_w1(row, x_scale, w, w_scale, chunk + WARPS, n, H, N, ALL)
        total = gl.full([WARPS, 8, 4, 2], 0.0, gl.float32, _layout(WARPS, 2))
        for trip in range(0, TRIPS, 2):
            total += _multiplied(codes0, pair0, words0, x_pair0, DTYPE, SCALED, MXFP8)
            if trip + 2 < TRIPS:
                codes0, pair0, words0, x_pair0 = _operands_of_w1(
                    row, x_scale, w, w_scale, chunk + (trip + 2) * WARPS, n, H, N, ALL
                )  # fmt: skip
            total += _multiplied(codes1, pair1, words1, x_pair1, DTYPE, SCALED, MXFP8)
            if trip + 2 < TRIPS:
                codes1, pair1, words1, x_pair1 = _operands_of_w1(
                    row, x_scale, w, w_scale, chunk + (trip + 3) * WARPS, n, H, N, ALL
                )  # fmt: skip
        gate, up = gl.split(_rows(total))
        column = n + gl.arange(0, UP_ROWS, layout=gate.type.layout)
        if bias is not None:
            gate += gl.load(bias + expert * (2 * N) + column).to(gl.float32)
            up += gl.load(bias + expert * (2 * N) + N + column).to(gl.float32)
        if topk_weights is not None:
            weight = gl.load(topk_weights + token * weights_stride + route % TOPK).to(gl.float32)
            gate *= weight
            up *= weight
        gl.store(inner + route.to(gl.int64) * N + column, swiglu(gate, up, alpha, beta, limit, LIMITED))


@gluon.jit
def _of_route(value, place):
    """Of what lane k has for the k-th of a token's routes, [warps, 8, 4], that of each lane's ``place``."""
    return gl.inline_asm_elementwise(_OF_LANE, "=r,r,r", [value, place], dtype=value.dtype, is_pure=True, pack=1)


@gluon.jit
def _weights_of_w2(w, w_scale, mine, chunk, n, H: gl.constexpr, N: gl.constexpr):
    """Of each warp's chunk of all those of a token's routes: codes and pairs of scale bytes (:func:`_weights`)."""
    PIECES: gl.constexpr = (N + CHUNK - 1) // CHUNK
    expert = _of_route(mine, chunk // PIECES)
    return _weights(w, w_scale, gl.maximum(expert, 0), chunk % PIECES, n, expert >= 0, N, H, 8, False)


@gluon.jit
def _inner(inner, mine, route, chunk, N: gl.constexpr):
    """Of the same chunk, what each lane rounds, [warps, 8, 4, 16] fp32. inner [TOPK, N]."""
    PIECES: gl.constexpr = (N + CHUNK - 1) // CHUNK
    L: gl.constexpr = _layout(gl.num_warps(), 16)
    column, own = _own(chunk % PIECES, _of_route(mine, chunk // PIECES) >= 0, N)
    at = _of_lanes(_of_route(route, chunk // PIECES) * N + column, L) + _along(3, 16, L)
    mask, at = gl.broadcast(_of_lanes(own, L), at)
    return gl.load(inner + at, mask=mask, other=0)


@gluon.jit
def _weighted(codes, pair, value, weight, chunk, N: gl.constexpr, MXFP8: gl.constexpr):
    """:func:`_sums` of a chunk of w2, times its route's weight."""
    PIECES: gl.constexpr = (N + CHUNK - 1) // CHUNK
    first, second, factor0, factor1 = _rounded(value, MXFP8)
    sums = _sums(codes, pair, first, second, factor0, factor1, not MXFP8)
    P: gl.constexpr = _layout(gl.num_warps(), 2)
    return sums * _of_lanes(_of_route(weight, chunk // PIECES), P)


@gluon.jit(**OF_TOKENS)
def down_mma_kernel(
    inner, w, w_scale, bias, out, topk_ids, expert_map, num_tokens, topk_weights,
    routes_total: "i32", ids_stride: "i64", first_token: "i64", known: "i64", weights_stride: "i64", out_stride: "i64",
    H: gl.constexpr, N: gl.constexpr, EXPERTS: gl.constexpr, TOPK: gl.constexpr, MXFP8: gl.constexpr,
    WEIGHTED: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """:func:`.matvec.down_kernel`, one program for DOWN_ROWS columns of a token; its warps take the chunks of all its
    routes in turns, and their sums are added at the end, each time in the same order."""
    WARPS: gl.constexpr = gl.num_warps()
    LANES: gl.constexpr = _layout(WARPS)
    PIECES: gl.constexpr = (N + CHUNK - 1) // CHUNK
    token = gl.program_id(0) // (H // DOWN_ROWS)
    n = gl.program_id(0) % (H // DOWN_ROWS) * DOWN_ROWS
    first = token * TOPK
    chunk, route = gl.broadcast(_along(0, WARPS, LANES), 4 * _along(1, 8, LANES) + _along(2, 4, LANES))
    mine = local_experts(
        topk_ids, expert_map, num_tokens, first + route, first + TOPK, ids_stride, first_token, known, EXPERTS, TOPK
    )  # fmt: skip
    weight = gl.full([WARPS, 8, 4], 1.0, gl.float32, LANES)
    if WEIGHTED:
        weights = topk_weights + token.to(gl.int64) * weights_stride
        weight = gl.load(weights + route, mask=mine >= 0, other=0.0).to(gl.float32)  # others are whatever they are
    trips = (PIECES * TOPK + WARPS - 1) // WARPS
    if expert_map is not None or num_tokens is not None:  # those that go nowhere take no turns
        route, local = gl.inline_asm_elementwise(
            _LOCAL_ONES, "=r,=r,r", [mine], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )  # fmt: skip
        mine = gl.where(route >= 0, _of_route(mine, route), -1)
        weight = _of_route(weight, route)
        trips = (PIECES * gl.max(gl.max(gl.max(local, 2), 1), 0) + WARPS - 1) // WARPS
    codes0, pair0 = _weights_of_w2(w, w_scale, mine, chunk, n, H, N)
    codes1, pair1 = _weights_of_w2(w, w_scale, mine, chunk + WARPS, n, H, N)
    if OVERLAP:
        wait_for_launch_before()
    inner += first.to(gl.int64) * N
    value0 = _inner(inner, mine, route, chunk, N)
    value1 = _inner(inner, mine, route, chunk + WARPS, N)
    total = gl.full([WARPS, 8, 4, 2], 0.0, gl.float32, _layout(WARPS, 2))
    for trip in range(0, trips, 2):
        total += _weighted(codes0, pair0, value0, weight, chunk, N, MXFP8)
        if trip + 2 < trips:
            codes0, pair0 = _weights_of_w2(w, w_scale, mine, chunk + 2 * WARPS, n, H, N)
            value0 = _inner(inner, mine, route, chunk + 2 * WARPS, N)
        total += _weighted(codes1, pair1, value1, weight, chunk + WARPS, N, MXFP8)
        if trip + 2 < trips:
            codes1, pair1 = _weights_of_w2(w, w_scale, mine, chunk + 3 * WARPS, n, H, N)
            value1 = _inner(inner, mine, route, chunk + 3 * WARPS, N)
        chunk += 2 * WARPS
    result = _rows(total)
    Q: gl.constexpr = result.type.layout
    row = n + _along(0, 8, Q) + 8 * _along(1, 2, Q)
    if bias is not None:
        for k in range(TOPK):
            expert = gl.max(gl.max(gl.max(gl.where(route == k, mine, -1), 2), 1), 0)
            if expert >= 0:
                term = gl.load(bias + expert.to(gl.int64) * H + row).to(gl.float32)
                if WEIGHTED:
                    term *= gl.load(weights + k).to(gl.float32)
                result += term
    gl.store(out + token.to(gl.int64) * out_stride + row, result.to(out.dtype.element_ty))
