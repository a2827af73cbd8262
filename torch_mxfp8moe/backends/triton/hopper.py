"""The grouped matrix product on sm_90: one warp loads, one or two warpgroups multiply.

The same product as :mod:`.gemm`'s ``upcast``, with the same operands and results, written in Gluon, where Triton leaves
the order of things to us. What it does beyond the plain kernel:

- A loader warp keeps a ring of tiles full by TMA, so that no other warp waits for an address or a barrier of the block.
- A warpgroup has two products of 64 weight rows under way. While the matrix unit works on one, the other's weights
  become bf16 in registers, in five instructions a pair, from codes that a lane reads 16 at a time.
- A lane's 16 codes are neighbours in memory, which the matrix instruction's operand is not: the product runs over K in
  another order within each 64, ``PRODUCT_ORDER``, in which the activations are stored.
- The rest of an expert that fills at most half a tile takes a product of half the width.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import constexpr_function
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .memory import PRODUCT_ORDER, in_product_order
from .numerics import BLOCK, HELD_TIMES, factor, scale_byte

load_async = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the latter until Triton 3.7

COLUMNS = tl.constexpr(64)
"""Of K in a stage."""


@constexpr_function
def _row_steps(rows, permuted):
    """How far apart in the weight those rows of a tile are whose positions differ in bit 0, 1, ..."""
    within = [1 << (PRODUCT_ORDER[5 - bit] if permuted else bit) for bit in range(6)]
    return within + [1 << bit for bit in range(6, rows.bit_length() - 1)]


@constexpr_function
def _blocks_layout(rows, permuted):
    """[rows, 2, 32], rows by MXFP8 blocks: what a lane must hold of a tile of codes, for the matrix instruction's left
    operand, if K is in product order; ``permuted``: and rows as well."""
    row = [[step, 0, 0] for step in _row_steps(rows, permuted)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], row[3]],
        lane_bases=[[0, 0, 16], [0, 1, 0], *row[:3]],
        warp_bases=row[4:],
        block_bases=[],
        shape=[rows, 2, 32],
    )


@constexpr_function
def _codes_layout(rows, permuted):
    """The same of [rows, 64]."""
    row = [[step, 0] for step in _row_steps(rows, permuted)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], row[3]],
        lane_bases=[[0, 16], [0, 32], *row[:3]],
        warp_bases=row[4:],
        block_bases=[],
        shape=[rows, 64],
    )


def _upcast_assembly(half: str) -> str:
    """Four codes, as their values times the bf16 in one ``half`` of a register. Each step but the last is exact, and
    keeps NaN."""
    return f"""{{
    .reg .b16 low, high, h0, h1, h2, h3;
    .reg .b32 first, second, scale;
    .reg .f32 f0, f1, f2, f3;
    mov.b32 {{low, high}}, $2;
    cvt.rn.f16x2.e4m3x2 first, low;
    cvt.rn.f16x2.e4m3x2 second, high;
    mov.b32 {{h0, h1}}, first;
    mov.b32 {{h2, h3}}, second;
    cvt.f32.f16 f0, h0;
    cvt.f32.f16 f1, h1;
    cvt.f32.f16 f2, h2;
    cvt.f32.f16 f3, h3;
    cvt.rn.bf16x2.f32 first, f1, f0;
    cvt.rn.bf16x2.f32 second, f3, f2;
    mov.b32 {{low, high}}, $3;
    mov.b32 scale, {{{half}, {half}}};
    mul.bf16x2 $0, first, scale;
    mul.bf16x2 $1, second, scale;
    }}"""


_UPCAST = gl.constexpr(tuple(_upcast_assembly(half) for half in ("low", "high")))


def scale_assembly(count: int) -> str:
    """Scale bytes of a lane, four in each of ``count`` registers, as 2^(byte - 127) / HELD_TIMES in bf16, NaN for 255.

    Of four the lane needs two, which become the halves of a register; the last input is ``prmt``'s selector of them.
    bf16's bits are (byte - 3) << 7 where that is a normal number. It is not from 3 down, nor for 255; a warp that meets
    one of these, which are rare, takes the longer way, which is exact for all.
    """
    used = [f"used{i}" for i in range(count)]
    lines = [
        f".reg .b32 {', '.join(used)}, above, most, value;",
        ".reg .b32 fours, ones, eighths, last;",
        ".reg .b16 low, high;",
        ".reg .pred rare;",
        "mov.b32 fours, 0xfffcfffc;",  # minus 4
        "mov.b32 most, 0;",
    ]
    for i, byte in enumerate(used):
        lines += [
            f"prmt.b32 {byte}, ${count + i}, 0, ${2 * count};",
            f"add.u16x2 above, {byte}, fours;",  # from 0 to 250, or rare
            "max.u16x2 most, most, above;",
            f"mad.lo.u32 ${i}, {byte}, 0x80, {-0x01800180 & 0xFFFFFFFF:#x};",
        ]
    lines += [
        "mov.b32 {low, high}, most;",
        "max.u16 low, low, high;",
        "setp.gt.u16 rare, low, 250;",
        "vote.sync.any.pred rare, rare, 0xffffffff;",
        "@!rare bra.uni done;",
        "mov.b32 ones, 0x00010001;",
        "mov.b32 last, 0x00fe00fe;",
        "mov.b32 eighths, 0x3e003e00;",
    ]
    for i, byte in enumerate(used):
        lines += [
            f"shl.b32 value, {byte}, 7;",  # 2^(byte - 127); 0 and Inf for 0 and 255
            "mul.bf16x2 value, value, eighths;",
            f"min.u16x2 above, {byte}, ones;",
            "mad.lo.u32 value, above, -8, value;",  # 8 less where byte is not 0
            f"max.u16x2 above, {byte}, last;",
            "mad.lo.u32 value, above, 0x40, value;",  # 254 * 0x40 more, and 0x40 where it is 255
            f"add.u32 ${i}, value, {0x00080008 - 0x3F803F80 & 0xFFFFFFFF:#x};",
        ]
    return "{\n" + "\n".join([*lines, "done:"]) + "\n}"


assert HELD_TIMES.value == 8  # which the numbers above are made for
_SCALES = gl.constexpr({count: scale_assembly(count) for count in (4, 8)})


@gluon.jit
def _scale_values(word0, word1, selector, STEPS: gl.constexpr):
    """Words of scale bytes of STEPS steps, [rows, 2] for each product, -> what ``_upcast`` takes for two steps at a
    time: of the first product and then of the second."""
    if STEPS == 4:
        return gl.inline_asm_elementwise(
            _SCALES[8], "=&r," * 8 + "r," * 9 + "r",
            [word0.to(gl.int32), (word0 >> 32).to(gl.int32), word1.to(gl.int32), (word1 >> 32).to(gl.int32), selector],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            _SCALES[4], "=&r," * 4 + "r," * 5 + "r", [word0.to(gl.int32), word1.to(gl.int32), selector],
            dtype=(gl.int32, gl.int32), is_pure=True, pack=2,
        )  # fmt: skip


@gluon.jit
def _upcast(codes, scale, HALF: gl.constexpr, PERMUTED: gl.constexpr, LAYOUT: gl.constexpr):
    """Codes [rows, 64], scales [rows, 2] in one half of int32 -> their values, divided by HELD_TIMES, in bf16,
    [rows, 64] with K, and rows if PERMUTED, in product order."""
    rows: gl.constexpr = codes.shape[0]
    codes = gl.reshape(codes, (rows, 2, 32))
    codes = gl.convert_layout(codes, _blocks_layout(rows, PERMUTED), assert_trivial=True)
    codes, scale = gl.broadcast(codes, gl.expand_dims(scale, 2))
    value = gl.inline_asm_elementwise(
        _UPCAST[HALF], "=r,=r,r,r,r,r,r", [codes, scale], dtype=gl.bfloat16, is_pure=True, pack=4
    )  # fmt: skip
    if PERMUTED:
        value = gl.reshape(value, (rows // 64, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2))
        value = gl.permute(value, (0, 3, 4, 5, 1, 2, 6, 9, 10, 11, 7, 8, 12))
    else:
        value = gl.permute(gl.reshape(value, (rows, 2, 2, 2, 2, 2, 2)), (0, 3, 4, 5, 1, 2, 6))
    return gl.convert_layout(gl.reshape(value, (rows, 64)), LAYOUT, assert_trivial=True)


_PREFETCH = gl.constexpr(
    """{
    .reg .pred one;
    elect.sync _|one, 0xffffffff;
    @one cp.async.bulk.prefetch.L2.global [$1], $2;
    mov.b32 $0, 0;
    }"""
)
"""Bytes from an address on to the L2 cache, both multiples of 16."""


@gluon.jit
def _load(
    x, w, w_scale, ring, tiles, count,
    K: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr,
    BYTES: gl.constexpr,
):  # fmt: skip
    """The loader: for each tile of this program, the operands of all its stages. The other warps read scale bytes
    themselves, for the first steps without anything to do meanwhile: these are sent for as well."""
    x_ring, w_ring, full, empty = ring
    column_tiles: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), count, gl.num_programs(0)):
        tile = index // column_tiles
        expert = gl.load(tiles + 2 * tile)
        if expert >= 0:
            first = gl.load(tiles + 2 * tile + 1)
            n = index % column_tiles * BLOCK_N
            scales = w_scale + (expert.to(gl.int64) * (HALVES * N) + n) * (K // BLOCK)
            size = gl.minimum(N - n, BLOCK_N) * (K // BLOCK)
            for half in gl.static_range(HALVES):
                gl.inline_asm_elementwise(
                    _PREFETCH, "=r,l,r", [(scales + half * (N * (K // BLOCK))).to(gl.int64, bitcast=True), size],
                    dtype=gl.int32, is_pure=False, pack=1,
                )  # fmt: skip
            for k in range(0, K, COLUMNS):
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(full.index(stage), BYTES)
                load_async(w, [expert, 0, n, k], full.index(stage), w_ring.index(stage))
                load_async(x, [first, k], full.index(stage), x_ring.index(stage))
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1


@gluon.jit
def _scale_rows(
    row, SKIPPED: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, WHOLE: gl.constexpr, PERMUTED: gl.constexpr
):
    """GROUP rows, SKIPPED after ``row``, as their distances from it, [GROUP, 2], each twice. Those from ROWS on have 0;
    there are none if WHOLE."""
    layout: gl.constexpr = gl.SliceLayout(2, _blocks_layout(GROUP, PERMUTED))
    rows = SKIPPED + gl.arange(0, GROUP, layout=gl.SliceLayout(1, layout))
    if not WHOLE:
        rows = gl.where(row + rows < ROWS, rows, 0)
    return gl.expand_dims(rows, 1) + gl.zeros([GROUP, 2], gl.int32, layout)


@gluon.jit
def _multiply(
    ring, scales, rows0, rows1, trips, stage, phase,
    M: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr,
    PERMUTED: gl.constexpr,
):  # fmt: skip
    """The two products [GROUP, M] fp32 of a tile, and the next stage and phase. A word of scale bytes lasts for STEPS
    stages."""
    x_ring, w_ring, full, empty = ring
    TOTAL: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[GROUP // 16, 1], instr_shape=[16, M, 16]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=TOTAL, k_width=2)
    CODES: gl.constexpr = _codes_layout(GROUP, PERMUTED)
    # Stages that are the same in each trip are known to the compiler.
    FIXED: gl.constexpr = STEPS % STAGES == 0
    total0 = gl.zeros([GROUP, M], gl.float32, TOTAL)
    total1 = warpgroup_mma_init(gl.zeros([GROUP, M], gl.float32, TOTAL))
    left1 = gl.zeros([GROUP, COLUMNS], gl.bfloat16, LEFT)
    # Of a step's two bytes a lane needs that of its block, and each in 16 bits.
    layout: gl.constexpr = gl.SliceLayout(2, _blocks_layout(GROUP, PERMUTED))
    block = gl.expand_dims(gl.arange(0, 2, layout=gl.SliceLayout(0, layout)), 0)
    selector = gl.zeros([GROUP, 2], gl.int32, layout) + (0x4040 if STEPS == 1 else 0x4240) + 0x0101 * block
    word0 = gl.load(scales + rows0)
    word1 = gl.load(scales + rows1)
    for i in range(trips):
        values = _scale_values(word0, word1, selector, STEPS)
        for step in gl.static_range(STEPS):
            if step == STEPS // 2:  # when half of the registers that values takes are free
                ahead = scales + gl.minimum(i + 1, trips - 1)
                word0 = gl.load(ahead + rows0)
                word1 = gl.load(ahead + rows1)
            at = step % STAGES if FIXED else stage
            before = (step + STAGES - 1) % STAGES if FIXED else gl.where(stage > 0, stage - 1, STAGES - 1)
            mbarrier.wait(full.index(at), phase)
            right = x_ring.index(at).slice(0, M).permute((1, 0))
            codes = w_ring.index(at).reshape((2 * GROUP, COLUMNS))
            codes0 = codes.slice(0, GROUP).load(CODES)
            codes1 = codes.slice(GROUP, GROUP).load(CODES)
            # left0 and left1 are handed through the waits, since the matrix unit reads them until then.
            left0 = _upcast(codes0, values[step // 2], step % 2, PERMUTED, LEFT)
            total0 = warpgroup_mma(left0, right, total0, is_async=True)
            total1, left1 = warpgroup_mma_wait(1, [total1, left1])
            left1 = _upcast(codes1, values[(STEPS + 1) // 2 + step // 2], step % 2, PERMUTED, LEFT)
            total1 = warpgroup_mma(left1, right, total1, is_async=True)
            total0, left0 = warpgroup_mma_wait(1, [total0, left0])
            mbarrier.arrive(empty.index(before), count=1, pred=i + step > 0)
            if FIXED:
                if step % STAGES == STAGES - 1:
                    phase ^= 1
            else:
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
    total1, left1 = warpgroup_mma_wait(0, [total1, left1])
    mbarrier.arrive(empty.index(STAGES - 1 if FIXED else gl.where(stage > 0, stage - 1, STAGES - 1)), count=1)
    return total0, total1, stage, phase


@gluon.jit
def _one_plus_exp(x):
    """1 + e^x, fp32, the same bits as with ``gl.exp``, which takes care of an e^x too small to count."""
    power = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=gl.float32, is_pure=True, pack=1
    )  # fmt: skip
    return 1.0 + power


@gluon.jit
def _with_bias(total, bias, row, rows, PERMUTED: gl.constexpr):
    """total [rows of a tile, M] + what its rows have in bias [rows]; ``row``: the first one."""
    position = gl.arange(0, total.shape[0], layout=gl.SliceLayout(1, total.type.layout))
    if PERMUTED:
        position = in_product_order(position)
    row += position
    return total + gl.load(bias + gl.where(row < rows, row, 0)).to(gl.float32)[:, None]


@gluon.jit
def _mxfp8(value):
    """value [N, M] fp32, rows in product order -> rounded to MXFP8 in blocks of 32 rows, times HELD_TIMES."""
    WARPS: gl.constexpr = value.shape[0] // 16
    M: gl.constexpr = value.shape[1]
    # A warp has 16 rows. Of their positions bit 3 tells a lane's two from each other, bit 2 one block of 64 rows from
    # the other.
    blocks = gl.reshape(value, (WARPS // 4, 4, 2, 2, 4, M))
    amax = gl.max(gl.max(blocks.to(gl.int32, bitcast=True) & 0x7FFFFFFF, axis=2), axis=3)
    # One scale for a thread at a time, where all of a block's would have the same ones.
    layout: gl.constexpr = gl.BlockedLayout([1, 4, 1, 1], [1, 1, 1, 32], [WARPS // 4, 1, 2, 2], [3, 2, 1, 0])
    byte = scale_byte(gl.max(gl.convert_layout(amax, layout), axis=1), "rceil")
    held = factor(byte) * HELD_TIMES
    held = gl.convert_layout(held, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, blocks.type.layout))))
    held = gl.expand_dims(gl.expand_dims(gl.expand_dims(held, 1), 2), 4)
    # 2^(127 - byte) from 2^(byte - 124), modulo 2^32; what it is for NaN does not matter.
    inverse = (-(255 << 23) - held.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)
    result = (blocks * inverse).to(gl.float8e4nv).to(gl.float32) * held
    return gl.convert_layout(gl.reshape(result, value.shape), value.type.layout, assert_trivial=True)


@gluon.jit
def _store(out, value, first, end, column, N: gl.constexpr):
    """value [columns, M], transposed, to out [R, N] from slot ``first`` and ``column`` on; ``end`` is where another
    expert's slots begin."""
    C: gl.constexpr = value.shape[0]
    M: gl.constexpr = value.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [C // 16, 1], [1, 0])
    value = gl.convert_layout(gl.permute(value, (1, 0)), layout)
    slot = first + gl.arange(0, M, layout=gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, C, layout=gl.SliceLayout(0, layout))
    within = (slot < end)[:, None] & (columns < N)[None, :]
    gl.store(out + (slot.to(gl.int64)[:, None] * N + columns[None, :]), value, mask=within)


@gluon.jit
def _finish(
    total0, total1, ending, expert, first, end, column,
    N: gl.constexpr, GATE_UP: gl.constexpr, MXFP8: gl.constexpr, LIMITED: gl.constexpr,
    BIASED: gl.constexpr, WEIGHTED: gl.constexpr,
):  # fmt: skip
    """What becomes of a tile's products, as in :func:`.gemm.grouped_gemm_kernel`."""
    bias, out, routes, topk_weights, weights_stride, alpha, beta, limit = ending
    if GATE_UP:
        if BIASED:
            bias += expert.to(gl.int64) * (2 * N)
            total0 = _with_bias(total0, bias, column, N, True)
            total1 = _with_bias(total1, bias + N, column, N, True)
        if WEIGHTED:
            slot = first + gl.arange(0, total0.shape[1], layout=gl.SliceLayout(0, total0.type.layout))
            route = gl.load(routes + slot, mask=slot < end, other=0).to(gl.int64)
            weight = gl.load(topk_weights + route * weights_stride, mask=slot < end, other=0.0).to(gl.float32)
            total0 *= weight[None, :]
            total1 *= weight[None, :]
        if LIMITED:  # comparisons that keep NaN
            total0 = gl.where(total0 > limit, limit, total0)
            total1 = gl.where(total1 > limit, limit, gl.where(total1 < -limit, -limit, total1))
        result = total0 / _one_plus_exp(-alpha * total0) * (total1 + beta)
        result = _mxfp8(result) if MXFP8 else result.to(gl.bfloat16).to(gl.float32) * HELD_TIMES
        _store(out, result.to(gl.bfloat16), first, end, column, N)
    else:
        if BIASED:
            bias += expert.to(gl.int64) * N
            total0 = _with_bias(total0, bias, column, N, False)
            total1 = _with_bias(total1, bias, column + total0.shape[0], N, False)
        _store(out, total0.to(out.dtype.element_ty), first, end, column, N)
        _store(out, total1.to(out.dtype.element_ty), first, end, column + total0.shape[0], N)


@gluon.jit
def _tile(
    ring, w_scale, ending, steps, expert, first, end, n, stage, phase,
    K: gl.constexpr, N: gl.constexpr, M: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    GATE_UP: gl.constexpr, MXFP8: gl.constexpr, LIMITED: gl.constexpr, BIASED: gl.constexpr, WEIGHTED: gl.constexpr,
):  # fmt: skip
    """A tile of M slots; the next stage and phase."""
    ROWS: gl.constexpr = 2 * N if GATE_UP else N
    WHOLE: gl.constexpr = N % (GROUP if GATE_UP else 2 * GROUP) == 0
    STEPS: gl.constexpr = 4 if K % 256 == 0 else 2 if K % 128 == 0 else 1
    WORD: gl.constexpr = gl.int64 if STEPS == 4 else gl.int32 if STEPS == 2 else gl.int16
    WORDS: gl.constexpr = K // COLUMNS // STEPS
    scales = (w_scale + (expert.to(gl.int64) * ROWS + n) * (K // BLOCK)).to(gl.pointer_type(WORD), bitcast=True)
    rows0 = _scale_rows(n, 0, GROUP, ROWS, WHOLE, GATE_UP) * WORDS
    rows1 = _scale_rows(n, N if GATE_UP else GROUP, GROUP, ROWS, WHOLE, GATE_UP) * WORDS
    total0, total1, stage, phase = _multiply(
        ring, scales, rows0, rows1, steps // STEPS, stage, phase, M, GROUP, STAGES, STEPS, GATE_UP
    )  # fmt: skip
    _finish(total0, total1, ending, expert, first, end, n, N, GATE_UP, MXFP8, LIMITED, BIASED, WEIGHTED)
    return stage, phase


@gluon.jit
def _compute(
    ring, w_scale, ending, steps, tiles, offsets, count,
    K: gl.constexpr, N: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, GATE_UP: gl.constexpr, MXFP8: gl.constexpr, LIMITED: gl.constexpr, BIASED: gl.constexpr,
    WEIGHTED: gl.constexpr,
):  # fmt: skip
    """The other warps: each tile of this program."""
    column_tiles: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    stage = 0
    phase = 0
    pairs = tiles.to(gl.pointer_type(gl.int64), bitcast=True)
    pair = gl.load(pairs + gl.program_id(0) // column_tiles)
    for index in range(gl.program_id(0), count, gl.num_programs(0)):
        expert = pair.to(gl.int32)
        first = (pair >> 32).to(gl.int32)
        pair = gl.load(pairs + gl.minimum(index + gl.num_programs(0), count - 1) // column_tiles)
        if expert >= 0:
            end = gl.load(offsets + expert + 1)
            n = index % column_tiles * BLOCK_N
            if BLOCK_M > 16 and end - first <= BLOCK_M // 2:
                stage, phase = _tile(
                    ring, w_scale, ending, steps, expert, first, end, n, stage, phase,
                    K, N, BLOCK_M // 2, GROUP, STAGES, GATE_UP, MXFP8, LIMITED, BIASED, WEIGHTED,
                )  # fmt: skip
            else:
                stage, phase = _tile(
                    ring, w_scale, ending, steps, expert, first, end, n, stage, phase,
                    K, N, BLOCK_M, GROUP, STAGES, GATE_UP, MXFP8, LIMITED, BIASED, WEIGHTED,
                )  # fmt: skip


@gluon.jit(do_not_specialize=["weights_stride", "count"], do_not_specialize_on_alignment=["topk_weights"])
def warpgroup_gemm_kernel(
    x, w, w_scale, bias, out, tiles, offsets, routes, topk_weights, count: "i32",
    weights_stride: "i64", alpha: "fp32", beta: "fp32", limit: "fp32",
    K: gl.constexpr, N: gl.constexpr, GATE_UP: gl.constexpr, MXFP8: gl.constexpr, LIMITED: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th of ``count`` tiles: BLOCK_M slots of one expert by 16 output columns for
    each warp (GATE_UP) or 32.

    x: a descriptor of rows [R, K] bf16, times HELD_TIMES, K in product order; w: one of codes [E, 2, N, K] (GATE_UP) or
    [E, 1, N, K], with w_scale [E, 2 N or N, K/32]; the rest as in :func:`.gemm.grouped_gemm_kernel`. GATE_UP: N of out
    is in product order.
    """
    GROUP: gl.constexpr = 16 * gl.num_warps()
    HALVES: gl.constexpr = 2 if GATE_UP else 1
    BLOCK_N: gl.constexpr = 2 * GROUP // HALVES
    BYTES: gl.constexpr = BLOCK_M * COLUMNS * 2 + 2 * GROUP * COLUMNS
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, COLUMNS], x.layout)
    w_ring = gl.allocate_shared_memory(gl.uint8, [STAGES, 1, HALVES, BLOCK_N, COLUMNS], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    BIASED: gl.constexpr = bias is not None
    WEIGHTED: gl.constexpr = topk_weights is not None
    ring = (x_ring, w_ring, full, empty)
    ending = (
        bias if BIASED else w_scale, out, routes, topk_weights if WEIGHTED else w_scale,
        weights_stride, alpha, beta, limit,
    )  # fmt: skip
    steps = x.shape[1] // COLUMNS
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    ring, w_scale, ending, steps, tiles, offsets, count,
                    K, N, BLOCK_M, BLOCK_N, GROUP, STAGES, GATE_UP, MXFP8, LIMITED, BIASED, WEIGHTED,
                ),
            ),
            (_load, (x, w, w_scale, ring, tiles, count, K, N, BLOCK_N, HALVES, STAGES, BYTES)),
        ],
        [1],
        [24],
    )  # fmt: skip
