"""The grouped matrix product on sm_90: one warp loads, one or two warpgroups multiply.

The same product as :mod:`.gemm`'s ``upcast``, with the same operands and results, written in Gluon, where Triton leaves
the order of things to us. What it does beyond the plain kernel:

- A loader warp keeps a ring of stages full by TMA, so that no other warp waits for an address or a barrier of the
  block. It takes tiles from a counter, since multiprocessors are not equally fast, and tells the other warps of them.
- A warpgroup has two products of 64 weight rows under way. While the matrix unit works on one, the other's weights
  become bf16 in registers, in five instructions a pair, from codes that a lane reads 16 at a time.
- A lane's 16 codes are neighbours in memory, which the matrix instruction's operand is not: the product runs over K in
  another order within each 64, ``PRODUCT_ORDER``, in which the activations are stored.
- The rest of an expert that fills at most half a tile takes a product of half the width.
- Few rows of an expert take a tile of half as many weight rows: its two products are those of every other step.
- Of the activations it loads no more than such a product takes: a full tile's are twice as many bytes as its weights.
- TURNS is 2: two groups of warps share a tile, each with the products of every other stage. One tile at a time on a
  multiprocessor ends in half the time of one of two, which is what the last tiles of a launch cost.
- GATHER: beside the loader, two warps fetch the row of each slot's token, which nobody has to copy to the slot before.
  TMA can not, and leaves more to the others.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import constexpr_function
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .memory import PRODUCT_ORDER, in_product_order
from .numerics import BLOCK, HELD_TIMES, factor, scale_byte
from .overlap import take_over

load_async = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the latter until Triton 3.7

gather_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # likewise

GATHERING = tl.constexpr(2)
"""The warps that do."""

STEP = tl.constexpr(64)
"""Columns that are multiplied at a time."""

BOX = tl.constexpr(128)
"""The most columns of codes that a copy takes: as many as a swizzle has bytes. Copies of one stage follow each other at
once, so that memory is read in longer pieces."""


@constexpr_function
def slots_of_a_copy(block_m):
    """Of a tile's ``block_m``: products are of one copy, or of two."""
    return block_m // 2 if block_m > 16 else block_m


GATE_AND_UP = (3, 2, 5, 1, 4, 0)
"""PRODUCT_ORDER of 32 gate rows and 32 up rows, but that a lane has both (bit 5) of a column."""


@constexpr_function
def _row_order(gate_up, halved):
    """In which order the matrix instruction takes 64 weight rows, written as PRODUCT_ORDER is."""
    return (5, 4, 3, 2, 1, 0) if not gate_up else GATE_AND_UP if halved else PRODUCT_ORDER


@constexpr_function
def _row_steps(rows, order):
    """How far apart in the weight those rows of a tile are whose positions differ in bit 0, 1, ..."""
    return [1 << order[5 - bit] for bit in range(6)] + [1 << bit for bit in range(6, rows.bit_length() - 1)]


@constexpr_function
def _blocks_layout(rows, order):
    """[rows, 2, 32], rows by MXFP8 blocks: what a lane must hold of a tile of codes, for the matrix instruction's left
    operand, if K is in product order and rows are in ``order``."""
    row = [[step, 0, 0] for step in _row_steps(rows, order)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], row[3]],
        lane_bases=[[0, 0, 16], [0, 1, 0], *row[:3]],
        warp_bases=row[4:],
        block_bases=[],
        shape=[rows, 2, 32],
    )


@constexpr_function
def _codes_layout(rows, columns, order):
    """The same of [rows, 64], or of two of them side by side."""
    row = [[step, 0] for step in _row_steps(rows, order)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], row[3], *([[0, 64]] if columns == 128 else [])],
        lane_bases=[[0, 16], [0, 32], *row[:3]],
        warp_bases=row[4:],
        block_bases=[],
        shape=[rows, columns],
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
_SCALES = gl.constexpr({count: scale_assembly(count) for count in (2, 4, 8)})


@gluon.jit
def _scale_values(word0, word1, selector, STEPS: gl.constexpr, HALVED: gl.constexpr):
    """Words of scale bytes of STEPS steps, [rows, 2] for each product, -> what ``_upcast`` takes for two steps at a
    time: of the first product and then of the second. HALVED: both have the same rows."""
    if HALVED and STEPS == 4:
        return gl.inline_asm_elementwise(
            _SCALES[4], "=&r," * 4 + "r," * 5 + "r",
            [word0.to(gl.int32), (word0 >> 32).to(gl.int32), selector],
            dtype=(gl.int32, gl.int32), is_pure=True, pack=2,
        )  # fmt: skip
    elif HALVED:
        values = gl.inline_asm_elementwise(
            _SCALES[2], "=&r," * 2 + "r," * 3 + "r", [word0, selector], dtype=gl.int32, is_pure=True, pack=2
        )  # fmt: skip
        return (values, values)
    elif STEPS == 4:
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
def _upcast(codes, scale, HALF: gl.constexpr, ORDER: gl.constexpr, LAYOUT: gl.constexpr):
    """Codes [rows, 64], scales [rows, 2] in one half of int32 -> their values, divided by HELD_TIMES, in bf16,
    [rows, 64] with K in product order, and rows in ORDER."""
    rows: gl.constexpr = codes.shape[0]
    codes = gl.reshape(codes, (rows, 2, 32))
    codes = gl.convert_layout(codes, _blocks_layout(rows, ORDER), assert_trivial=True)
    codes, scale = gl.broadcast(codes, gl.expand_dims(scale, 2))
    value = gl.inline_asm_elementwise(
        _UPCAST[HALF], "=r,=r,r,r,r,r,r", [codes, scale], dtype=gl.bfloat16, is_pure=True, pack=4
    )  # fmt: skip
    value = gl.reshape(value, (rows // 64, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2))
    value = gl.permute(
        value,
        (
            0, 6 - ORDER[0], 6 - ORDER[1], 6 - ORDER[2], 6 - ORDER[3], 6 - ORDER[4], 6 - ORDER[5],
            9, 10, 11, 7, 8, 12,
        ),
    )  # fmt: skip
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

_TAKE = gl.constexpr(
    """{
    .reg .pred one;
    .reg .b32 lane;
    mov.u32 lane, %laneid;
    setp.eq.u32 one, lane, 0;
    mov.b32 $0, 0;
    @one atom.global.relaxed.gpu.add.u32 $0, [$1], 1;
    }"""
)
_GIVE = gl.constexpr("shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;")
"""A number from a counter, which counts on: in the first lane of a warp, and then in all of them."""

_FINISH = gl.constexpr(
    """{
    .reg .pred one, last;
    .reg .b32 lane, before;
    mov.u32 lane, %laneid;
    setp.eq.u32 one, lane, 0;
    mov.b32 before, 0;
    @one atom.global.acq_rel.gpu.inc.u32 before, [$1+4], $2;
    setp.eq.and.u32 last, before, $2, one;
    @last st.global.u32 [$1], 0;
    mov.b32 $0, 0;
    }"""
)
"""The last program that comes by, whose number is the last one's, sets the counter to 0; so is then the one after it,
in which programs were counted."""


@gluon.jit
def _put(ring, stage, value):
    """A number to tell the other warps, from the loader."""
    ring.index(stage).store(gl.full([1], value, ring.dtype, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def _get(ring, stage):
    """A number from the loader."""
    return gl.max(ring.index(stage).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), axis=0)


@gluon.jit
def _load_weights(w, ring, full, expert, n, k, stage, COLUMNS: gl.constexpr, pred):
    """A stage's: the columns from ``k`` on of the rows from ``n`` on."""
    box: gl.constexpr = min(COLUMNS, BOX)
    for i in gl.static_range(COLUMNS // box):
        at = ring.index(stage * (COLUMNS // box) + i)
        load_async(w, [expert, 0, n, k + i * box], full.index(stage), at, pred=pred)


@gluon.jit
def _load(
    x, w, w_scale, ring, work, tiles, offsets, counters, count,
    K: gl.constexpr, N: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, COLUMNS: gl.constexpr,
    HALVES: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, GATHER: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The loader: for each tile of this program, the operands of all its stages, and with them which tile it is; a last
    stage, for each of those who take turns, says that there is no other. The other warps read scale bytes themselves,
    for the first steps without anything to do meanwhile: these are sent for as well. GATHER: others load activations,
    once they are told which tile a stage is of.

    A program's first tile is the one of its number. The next is taken when one is nearly loaded: no sooner, for the
    last ones to go to whoever is first, and no later, for it to be known in time.

    The other warps do nothing before they are told of a tile, so that waiting for the launch before is the loader's
    part. Of the second product's first tile it loads weights meanwhile; that tile was listed before the first
    product."""
    x_ring, w_ring, full, empty = ring
    pairs, columns, ends, told, copied = work
    counter = (counters + 2 * (HALVES - 1)).to(gl.int64, bitcast=True)
    BYTES: gl.constexpr = HALVES * BLOCK_N * COLUMNS
    COPY: gl.constexpr = slots_of_a_copy(BLOCK_M)
    column_tiles: gl.constexpr = ((whole_steps(N) if HALVES == 2 else N) + BLOCK_N - 1) // BLOCK_N
    stage = 0
    phase = 1
    padded: gl.constexpr = (K + COLUMNS - 1) // COLUMNS * COLUMNS
    take: gl.constexpr = max(padded - 1024, 0)
    give: gl.constexpr = max(padded - 512, 0)
    tiles = tiles.to(gl.pointer_type(gl.int64), bitcast=True)
    index = gl.program_id(0)
    AHEAD: gl.constexpr = min(STAGES, padded // COLUMNS) if OVERLAP and HALVES == 1 else 0
    if AHEAD == 0:
        take_over(OVERLAP)
    pair = gl.load(tiles + index // column_tiles)
    end = gl.load(offsets + gl.maximum(pair.to(gl.int32) + 1, 0))
    if AHEAD > 0:
        if pair.to(gl.int32) >= 0:
            for early in gl.static_range(AHEAD):
                n = index % column_tiles * BLOCK_N
                _load_weights(w, w_ring, full, pair.to(gl.int32), n, early * COLUMNS, early, COLUMNS, True)
        take_over(OVERLAP)
    loaded = AHEAD
    while index < count:
        own = pair
        expert = own.to(gl.int32)
        first = (own >> 32).to(gl.int32)
        slots = end - first
        column_tile = index % column_tiles
        n = column_tile * BLOCK_N
        index = count  # there are no tiles after one that nobody needs
        taken = 0
        if expert >= 0:
            row = gl.minimum(n, N - BLOCK)  # a tile may be beyond N
            scales = w_scale + (expert.to(gl.int64) * (HALVES * N) + row) * (K // BLOCK)
            size = gl.minimum(N - row, BLOCK_N) * (K // BLOCK)
            for half in gl.static_range(HALVES):
                gl.inline_asm_elementwise(
                    _PREFETCH, "=r,l,r", [(scales + half * (N * (K // BLOCK))).to(gl.int64, bitcast=True), size],
                    dtype=gl.int32, is_pure=False, pack=1,
                )  # fmt: skip
            for k in range(0, K, COLUMNS):
                if k == take:
                    taken = gl.inline_asm_elementwise(
                        _TAKE, "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1
                    )  # fmt: skip
                mbarrier.wait(empty.index(stage), phase)
                _put(pairs, stage, own)
                _put(columns, stage, column_tile)
                _put(ends, stage, first + slots)
                if GATHER:
                    mbarrier.arrive(told.index(stage), count=1)
                    mbarrier.expect(full.index(stage), BYTES)
                elif COPY == BLOCK_M:
                    mbarrier.expect(full.index(stage), BYTES + COPY * COLUMNS * 2)
                else:
                    mbarrier.expect(full.index(stage), BYTES + COPY * COLUMNS * 2, pred=slots <= COPY)
                    mbarrier.expect(full.index(stage), BYTES + BLOCK_M * COLUMNS * 2, pred=slots > COPY)
                if AHEAD == 0:
                    _load_weights(w, w_ring, full, expert, n, k, stage, COLUMNS, True)
                else:
                    _load_weights(w, w_ring, full, expert, n, k, stage, COLUMNS, loaded <= 0)
                    loaded -= 1
                if not GATHER:
                    for i in gl.static_range(COLUMNS // STEP):
                        at = x_ring.index(stage * (COLUMNS // STEP) + i)
                        for slot in gl.static_range(0, BLOCK_M, COPY):
                            load_async(
                                x, [first + slot, k + i * STEP], full.index(stage), at.slice(slot, COPY),
                                pred=slot == 0 or slots > slot,
                            )  # fmt: skip
                if k == give:
                    taken = gl.inline_asm_elementwise(
                        _GIVE, "=r,r", [taken], dtype=gl.int32, is_pure=False, pack=1
                    )  # fmt: skip
                    index = gl.num_programs(0) + taken
                    pair = gl.load(tiles + gl.minimum(index, count - 1) // column_tiles)
                    end = gl.load(offsets + gl.maximum(pair.to(gl.int32) + 1, 0))
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
    gl.inline_asm_elementwise(
        _FINISH, "=r,l,r", [counter, gl.num_programs(0) - 1], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip
    for _ in gl.static_range(TURNS):
        mbarrier.wait(empty.index(stage), phase)
        _put(pairs, stage, gl.to_tensor(-1).to(gl.int64))
        if GATHER:
            mbarrier.arrive(told.index(stage), count=1)
        mbarrier.arrive(full.index(stage), count=1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1


@gluon.jit
def _rows_of_slots(routes, slot, end, K: gl.constexpr, TOPK: gl.constexpr):
    """Where the row of each slot's token begins, in eights of columns; -1 from ``end`` on."""
    within = slot < end
    route = gl.load(routes + slot, mask=within, other=0)
    return gl.where(within, route // TOPK * (K // 8), -1)


@gluon.jit
def _gather_step(tile, x, row, k, K: gl.constexpr, COLUMNS: gl.constexpr):
    """64 columns from ``k`` on, of which rows; zeros for -1."""
    # As if it were another one each time, or it would be kept as an address and a condition: registers are few.
    row = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [row], dtype=gl.int32, is_pure=False, pack=1)
    there = row >= 0
    if K % COLUMNS != 0:
        there = there & (k < K)
    column = gl.arange(0, STEP, layout=gl.SliceLayout(0, row.type.layout.parent))
    begin = row.to(gl.uint32, bitcast=True).to(gl.int64) * 8
    gather_async(tile, (x + k) + column[None, :] + begin[:, None], there[:, None])


@gluon.jit
def _gather(
    x, ring, work, routes,
    K: gl.constexpr, BLOCK_M: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, TOPK: gl.constexpr,
):  # fmt: skip
    """Beside the loader: the activations of all its stages, the row of each slot's token, zeros after an expert's; half
    of a tile that is at most half full."""
    x_ring, w_ring, full, empty = ring
    pairs, columns, ends, told, copied = work
    COPY: gl.constexpr = slots_of_a_copy(BLOCK_M)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    slot = gl.arange(0, COPY, layout=gl.SliceLayout(1, layout))
    stage = 0
    phase = 0
    mbarrier.wait(told.index(stage), phase)
    pair = _get(pairs, stage)
    while pair >= 0:
        first = (pair >> 32).to(gl.int32)
        end = _get(ends, stage)
        row0 = _rows_of_slots(routes, first + slot, end, K, TOPK)
        row1 = row0
        if COPY < BLOCK_M:
            row1 = _rows_of_slots(routes, first + COPY + slot, end, K, TOPK)
        for k in range(0, K, COLUMNS):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            for i in gl.static_range(COLUMNS // STEP):
                tile = x_ring.index(stage * (COLUMNS // STEP) + i)
                _gather_step(tile.slice(0, COPY), x, row0, k + i * STEP, K, COLUMNS)
                if COPY < BLOCK_M:
                    if end - first > COPY:
                        _gather_step(tile.slice(COPY, COPY), x, row1, k + i * STEP, K, COLUMNS)
            async_copy.mbarrier_arrive(copied.index(stage), increment_count=False)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        mbarrier.wait(told.index(stage), phase)
        pair = _get(pairs, stage)
    async_copy.mbarrier_arrive(copied.index(stage), increment_count=False)


@gluon.jit
def _pass_on(ring, work, K: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr):
    """Beside the loader: tells the other warps of each stage that is gathered, once a fence has made it visible to the
    matrix unit. A fence waits for all that its warp has under way, which is nothing here."""
    x_ring, w_ring, full, empty = ring
    pairs, columns, ends, told, copied = work
    stage = 0
    phase = 0
    mbarrier.wait(copied.index(stage), phase)
    while _get(pairs, stage) >= 0:
        for _ in range(0, K, COLUMNS):
            mbarrier.wait(copied.index(stage), phase)
            fence_async_shared()
            mbarrier.arrive(full.index(stage), count=1)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        mbarrier.wait(copied.index(stage), phase)
    mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _scale_rows(
    row, SKIPPED: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, WHOLE: gl.constexpr, ORDER: gl.constexpr,
    UP: gl.constexpr,
):  # fmt: skip
    """GROUP rows, SKIPPED after ``row``, as their distances from it, [GROUP, 2], each twice. Those from ROWS on have 0;
    there are none if WHOLE. UP is not 0: half of them are that many rows further on."""
    layout: gl.constexpr = gl.SliceLayout(2, _blocks_layout(GROUP, ORDER))
    rows = SKIPPED + gl.arange(0, GROUP, layout=gl.SliceLayout(1, layout))
    if UP > 0:
        rows = rows % (GROUP // 2) + rows // (GROUP // 2) * UP
    if not WHOLE:
        rows = gl.where(row + rows < ROWS, rows, 0)
    return gl.expand_dims(rows, 1) + gl.zeros([GROUP, 2], gl.int32, layout)


@gluon.jit
def _steps(codes):
    """Codes of one or two steps, one [rows, 64] for each."""
    rows: gl.constexpr = codes.shape[0]
    if codes.shape[1] == STEP:
        return (codes, codes)
    else:
        return gl.split(gl.permute(gl.reshape(codes, (rows, 2, STEP)), (0, 2, 1)))


@constexpr_function
def _word_steps(columns_total, columns, turns):
    """For how many steps a word of scale bytes lasts: 8 bytes for 4; for no more than a stage if they are taken in
    turns, or the last one is not full."""
    if turns == 2 or columns_total % columns != 0:
        return columns // STEP.value
    return next(steps for steps in (4, 2, 1) if columns_total % (steps * STEP.value) == 0)


@constexpr_function
def whole_steps(columns):
    """How many columns rows have in memory whose columns are in product order."""
    return -(-columns // STEP.value) * STEP.value


@constexpr_function
def _piece_bytes(columns_total, steps):
    """Of scale bytes, how many can be read at once of a word for ``steps``: every row begins at a multiple of that."""
    return next(size for size in (8, 4, 2, 1) if size <= 2 * steps and columns_total // BLOCK.value % size == 0)


@gluon.jit
def _scale_words(scales, rows, word, K: gl.constexpr, STEPS: gl.constexpr):
    """A word of scale bytes of each row, the one for STEPS steps from ``word`` * STEPS on. Where the weight has no more
    columns they repeat its row's last ones: any would do for codes that are 0, but for NaN that the row does not have.
    """
    SIZE: gl.constexpr = _piece_bytes(K, STEPS)
    PIECES: gl.constexpr = 2 * STEPS // SIZE
    if PIECES == 1:
        return gl.load(scales + word + rows)
    else:
        LAST: gl.constexpr = K // BLOCK // SIZE - 1
        WORD: gl.constexpr = gl.int64 if STEPS == 4 else gl.int32
        words = gl.load(scales + word * PIECES + rows).to(WORD)
        for i in gl.static_range(1, PIECES):
            piece = gl.load(scales + gl.minimum(word * PIECES + i, LAST) + rows)
            words |= piece.to(WORD) << (8 * SIZE * i)
        return words


@gluon.jit
def _both_words(scales, rows0, rows1, word, K: gl.constexpr, STEPS: gl.constexpr, HALVED: gl.constexpr):
    """:func:`_scale_words` of both products. HALVED: they have the same rows."""
    word0 = _scale_words(scales, rows0, word, K, STEPS)
    word1 = word0 if HALVED else _scale_words(scales, rows1, word, K, STEPS)
    return word0, word1


@gluon.jit
def _before(stage, STAGES: gl.constexpr, TURNS: gl.constexpr):
    """The stage of the turn before."""
    return gl.where(stage >= TURNS, stage - TURNS, stage + (STAGES - TURNS))


@gluon.jit
def _multiply(
    ring, scales, rows0, rows1, word0, word1, trips, skipped, stage, phase,
    K: gl.constexpr, M: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, COLUMNS: gl.constexpr,
    STEPS: gl.constexpr, ORDER: gl.constexpr, HALVED: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """The two products [GROUP, M] fp32 of a tile, and the next stage and phase. A word of scale bytes lasts for STEPS
    steps; word0 and word1 are the first ones. HALVED: of the same rows, one of every other step. TURNS is 2: of every
    other stage."""
    x_ring, w_ring, full, empty = ring
    TOTAL: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[GROUP // 16, 1], instr_shape=[16, M, 16]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=TOTAL, k_width=2)
    box: gl.constexpr = min(COLUMNS, BOX)
    gl.static_assert(not HALVED or COLUMNS > STEP, "a halved tile takes two steps at a time")
    CODES: gl.constexpr = _codes_layout(GROUP, box, ORDER)
    PARTS: gl.constexpr = COLUMNS // STEP
    # Stages that are the same in each trip are known to the compiler.
    FIXED: gl.constexpr = STEPS // PARTS % STAGES == 0
    # So many trips before their use, scale bytes are read; a wide product leaves no registers for more.
    AHEAD: gl.constexpr = 2 if M <= 64 else 1
    LAST: gl.constexpr = 1 if HALVED else 0  # of the steps that a pass of the loop below takes
    total0 = gl.zeros([GROUP, M], gl.float32, TOTAL)
    total1 = warpgroup_mma_init(gl.zeros([GROUP, M], gl.float32, TOTAL))
    left1 = gl.zeros([GROUP, STEP], gl.bfloat16, LEFT)
    # Of a step's two bytes a lane needs that of its block, and each in 16 bits.
    layout: gl.constexpr = gl.SliceLayout(2, _blocks_layout(GROUP, ORDER))
    block = gl.expand_dims(gl.arange(0, 2, layout=gl.SliceLayout(0, layout)), 0)
    selector = gl.zeros([GROUP, 2], gl.int32, layout) + (0x4040 if STEPS == 1 else 0x4240) + 0x0101 * block
    if AHEAD == 2:
        ahead = gl.minimum(1, trips - 1) * TURNS + skipped
        next0, next1 = _both_words(scales, rows0, rows1, ahead, K, STEPS, HALVED)
    for i in range(trips):
        values = _scale_values(word0, word1, selector, STEPS, HALVED)
        if AHEAD == 2:
            word0 = next0
            word1 = next1
            ahead = gl.minimum(i + 2, trips - 1) * TURNS + skipped
            next0, next1 = _both_words(scales, rows0, rows1, ahead, K, STEPS, HALVED)
        for step in gl.static_range(0, STEPS, 2 if HALVED else 1):
            if AHEAD == 1 and step == STEPS // 2:  # when half of the registers that values takes are free
                ahead = gl.minimum(i + 1, trips - 1) * TURNS + skipped
                word0, word1 = _both_words(scales, rows0, rows1, ahead, K, STEPS, HALVED)
            at = step // PARTS % STAGES if FIXED else stage
            before = (step // PARTS + STAGES - 1) % STAGES if FIXED else _before(stage, STAGES, TURNS)
            if step % PARTS == 0:
                mbarrier.wait(full.index(at), phase)
            if step % (box // STEP) == 0:
                codes = w_ring.index(at * (COLUMNS // box) + step % PARTS // (box // STEP))
                codes = codes.reshape(((1 if HALVED else 2) * GROUP, box))
                parts0 = _steps(codes.slice(0, GROUP).load(CODES))
                parts1 = parts0 if HALVED else _steps(codes.slice(GROUP, GROUP).load(CODES))
            x_tile = x_ring.index(at * PARTS + step % PARTS).slice(0, M).permute((1, 0))
            # left0 and left1 are handed through the waits, since the matrix unit reads them until then.
            left0 = _upcast(parts0[step % (box // STEP)], values[step // 2], step % 2, ORDER, LEFT)
            total0 = warpgroup_mma(left0, x_tile, total0, is_async=True)
            total1, left1 = warpgroup_mma_wait(1, [total1, left1])
            if step % PARTS == 0:
                mbarrier.arrive(empty.index(before), count=1, pred=i + step > 0)
            if HALVED:
                x_tile = x_ring.index(at * PARTS + step % PARTS + 1).slice(0, M).permute((1, 0))
                left1 = _upcast(parts0[1], values[step // 2], 1, ORDER, LEFT)
            else:
                left1 = _upcast(
                    parts1[step % (box // STEP)], values[(STEPS + 1) // 2 + step // 2], step % 2, ORDER, LEFT
                )  # fmt: skip
            total1 = warpgroup_mma(left1, x_tile, total1, is_async=True)
            total0, left0 = warpgroup_mma_wait(1, [total0, left0])
            if FIXED:
                if (step + LAST) % (PARTS * STAGES) == PARTS * STAGES - 1:
                    phase ^= 1
            elif (step + LAST) % PARTS == PARTS - 1:
                stage += TURNS
                if stage >= STAGES:
                    stage -= STAGES
                    phase ^= 1
    total1, left1 = warpgroup_mma_wait(0, [total1, left1])
    mbarrier.arrive(empty.index(STAGES - 1 if FIXED else _before(stage, STAGES, TURNS)), count=1)
    return total0, total1, stage, phase


def one_plus_power_assembly(last: str) -> str:
    """1 + 2^x, and what ``last`` makes of it."""
    return f"""{{
    .reg .f32 power;
    ex2.approx.ftz.f32 power, $1;
    add.rn.f32 power, power, 0f3F800000;
    {last}.f32 $0, power;
    }}"""


_ONE_PLUS_POWER = gl.constexpr(tuple(one_plus_power_assembly(last) for last in ("mov", "rcp.approx.ftz")))
"""The number itself, or its reciprocal, which is 0 where it would be below 2^-126."""


@gluon.jit
def _swish(x, alpha, RECIPROCAL: gl.constexpr):
    """x / (1 + e^(-alpha x)), fp32; RECIPROCAL: as a product."""
    result = gl.inline_asm_elementwise(
        _ONE_PLUS_POWER[RECIPROCAL], "=f,f", [alpha * x * -1.4426950408889634],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
    return x * result if RECIPROCAL else x / result


@gluon.jit
def _rows(total, PERMUTED: gl.constexpr):
    """Of total [rows of a tile, M] each row's number in the tile. PERMUTED: they are in product order, 32 of them
    without the bit that they share."""
    position = gl.arange(0, total.shape[0], layout=gl.SliceLayout(1, total.type.layout))
    if PERMUTED and total.shape[0] == 32:
        position = in_product_order((position & -4) * 2 + position % 4)
    elif PERMUTED:
        position = in_product_order(position)
    return position


@gluon.jit
def _with_bias(total, bias, row, rows, PERMUTED: gl.constexpr):
    """total [rows of a tile, M] + what its rows have in bias [rows]; ``row``: the first one. PERMUTED: of
    :func:`_rows`."""
    row += _rows(total, PERMUTED)
    return total + gl.load(bias + gl.where(row < rows, row, 0)).to(gl.float32)[:, None]


@gluon.jit
def _one_block_mxfp8(value):
    """value [32, M] fp32 -> each column rounded to MXFP8, times HELD_TIMES."""
    amax = gl.max(value.to(gl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    byte = scale_byte(amax, "rceil")
    # 2^(127 - byte); what it is for NaN does not matter.
    inverse = ((254 - byte) << 23).to(gl.float32, bitcast=True)
    return (value * inverse[None, :]).to(gl.float8e4nv).to(gl.float32) * (factor(byte) * HELD_TIMES)[None, :]


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
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [gl.num_warps(), 1], [1, 0])
    value = gl.convert_layout(gl.permute(value, (1, 0)), layout)
    slot = first + gl.arange(0, M, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, C, layout=gl.SliceLayout(0, layout))
    if C == 32:  # every other 4 of 64
        columns = column // 64 * 64 + (columns & -4) * 2 + column % 64 // 8 + columns % 4
    else:
        columns += column
    within = (slot < end)[:, None] & (columns < N)[None, :]
    gl.store(out + (slot.to(gl.int64)[:, None] * N + columns[None, :]), value, mask=within)


@gluon.jit
def _finish(
    total0, total1, ending, expert, first, end, column,
    N: gl.constexpr, GATE_UP: gl.constexpr, MXFP8: gl.constexpr, LIMITED: gl.constexpr,
    BIASED: gl.constexpr, WEIGHTED: gl.constexpr, RECIPROCAL: gl.constexpr, HALVED: gl.constexpr,
):  # fmt: skip
    """What becomes of a tile's products, as in :func:`.gemm.grouped_gemm_kernel`."""
    bias, out, routes, topk_weights, weights_stride, alpha, beta, limit = ending
    if HALVED and GATE_UP:  # of a lane's two rows one is gate's
        M: gl.constexpr = total0.shape[1]
        total0, total1 = gl.split(gl.permute(gl.reshape(total0, (4, 2, 8, M)), (0, 2, 3, 1)))
        total0 = gl.reshape(total0, (32, M))
        total1 = gl.reshape(total1, (32, M))
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
        result = _swish(total0, alpha, RECIPROCAL) * (total1 + beta)
        if MXFP8 and HALVED:
            result = _one_block_mxfp8(result)
        elif MXFP8:
            result = _mxfp8(result)
        else:
            result = result.to(gl.bfloat16).to(gl.float32) * HELD_TIMES
        if N % STEP != 0:
            result = gl.where((column + _rows(result, True) < N)[:, None], result, 0.0)
        _store(out, result.to(gl.bfloat16), first, end, column, whole_steps(N))
    else:
        if BIASED:
            bias += expert.to(gl.int64) * N
            total0 = _with_bias(total0, bias, column, N, False)
            if not HALVED:
                total1 = _with_bias(total1, bias, column + total0.shape[0], N, False)
        _store(out, total0.to(out.dtype.element_ty), first, end, column, N)
        if not HALVED:
            _store(out, total1.to(out.dtype.element_ty), first, end, column + total0.shape[0], N)


@gluon.jit
def _scales_of_tile(
    w_scale, expert, n, K: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr,
    STEPS: gl.constexpr, GATE_UP: gl.constexpr,
):  # fmt: skip
    """Where the scale bytes of a tile begin, as a pointer to pieces of a word, and how many pieces further on those of
    each row of its products do."""
    ROWS: gl.constexpr = 2 * N if GATE_UP else N
    HALVED: gl.constexpr = BLOCK_N * (2 if GATE_UP else 1) == GROUP
    ORDER: gl.constexpr = _row_order(GATE_UP, HALVED)
    WHOLE: gl.constexpr = N % max(BLOCK_N, STEP) == 0
    SIZE: gl.constexpr = _piece_bytes(K, STEPS)
    PIECE: gl.constexpr = gl.int64 if SIZE == 8 else gl.uint32 if SIZE == 4 else gl.uint16 if SIZE == 2 else gl.uint8
    PIECES: gl.constexpr = K // BLOCK // SIZE
    scales = (w_scale + (expert.to(gl.int64) * ROWS + n) * (K // BLOCK)).to(gl.pointer_type(PIECE), bitcast=True)
    rows0 = _scale_rows(n, 0, GROUP, ROWS, WHOLE, ORDER, N if GATE_UP and HALVED else 0) * PIECES
    rows1 = rows0
    if not HALVED:
        rows1 = _scale_rows(n, N if GATE_UP else GROUP, GROUP, ROWS, WHOLE, ORDER, 0) * PIECES
    return scales, rows0, rows1


@gluon.jit
def _own_words(number, steps, STEPS: gl.constexpr, TURNS: gl.constexpr, TURN: gl.constexpr):
    """Of the words of scale bytes of tile ``number``: how many are this group's, and how many come before its first."""
    trips = (steps + STEPS - 1) // STEPS
    skipped = 0
    if TURNS == 2:  # of an odd number of stages one more is the turn of whoever takes the first
        skipped = (number * trips + TURN) & 1
        trips = (trips + 1 - skipped) // 2
    return trips, skipped


@gluon.jit
def _first_words(
    work, w_scale, steps, stage, number,
    K: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr, STEPS: gl.constexpr,
    GATE_UP: gl.constexpr, TURNS: gl.constexpr, TURN: gl.constexpr,
):  # fmt: skip
    """Of the tile that begins with a full stage, the first words of scale bytes. Where that says that there is no other
    tile, some that there are."""
    pairs, columns, ends, told, copied = work
    pair = _get(pairs, stage)
    n = _get(columns, stage) * BLOCK_N
    _, skipped = _own_words(number, steps, STEPS, TURNS, TURN)
    scales, rows0, rows1 = _scales_of_tile(
        w_scale, gl.where(pair >= 0, pair.to(gl.int32), 0), gl.where(pair >= 0, n, 0),
        K, N, BLOCK_N, GROUP, STEPS, GATE_UP,
    )  # fmt: skip
    HALVED: gl.constexpr = BLOCK_N * (2 if GATE_UP else 1) == GROUP
    return _both_words(scales, rows0, rows1, skipped, K, STEPS, HALVED)


@gluon.jit
def _tile(
    ring, exchange, work, w_scale, ending, steps, expert, first, end, n, words, stage, phase, number,
    K: gl.constexpr, N: gl.constexpr, M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr,
    COLUMNS: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr, GATE_UP: gl.constexpr, MXFP8: gl.constexpr,
    LIMITED: gl.constexpr, BIASED: gl.constexpr, WEIGHTED: gl.constexpr, RECIPROCAL: gl.constexpr,
    EARLY: gl.constexpr, TURNS: gl.constexpr, TURN: gl.constexpr,
):  # fmt: skip
    """A tile of M slots; the next one's stage and phase, which is full. EARLY: ``words`` are the tile's first ones of
    scale bytes, and then the next one's, which are under way while products become what they are for."""
    HALVED: gl.constexpr = BLOCK_N * (2 if GATE_UP else 1) == GROUP
    ORDER: gl.constexpr = _row_order(GATE_UP, HALVED)
    trips, skipped = _own_words(number, steps, STEPS, TURNS, TURN)
    scales, rows0, rows1 = _scales_of_tile(w_scale, expert, n, K, N, BLOCK_N, GROUP, STEPS, GATE_UP)
    word0, word1 = words if EARLY else _both_words(scales, rows0, rows1, skipped, K, STEPS, HALVED)
    total0, total1, stage, phase = _multiply(
        ring, scales, rows0, rows1, word0, word1, trips, skipped, stage, phase,
        K, M, GROUP, STAGES, COLUMNS, STEPS, ORDER, HALVED, TURNS,
    )  # fmt: skip
    if EARLY:
        mbarrier.wait(ring[2].index(stage), phase)
        words = _first_words(
            work, w_scale, steps, stage, number + 1, K, N, BLOCK_N, GROUP, STEPS, GATE_UP, TURNS, TURN
        )  # fmt: skip
    if HALVED:
        total0 += total1
    if TURNS == 2:
        buffer, sent, received = exchange
        at0 = buffer.index(0).slice(0, M, dim=1)
        at1 = buffer.index(0 if HALVED else 1).slice(0, M, dim=1)
        if TURN == 1:
            mbarrier.wait(received, number & 1 ^ 1)
            at0.store(total0)
            if not HALVED:
                at1.store(total1)
            mbarrier.arrive(sent, count=1)
        else:
            mbarrier.wait(sent, number & 1)
            total0 += at0.load(total0.type.layout)
            if not HALVED:
                total1 += at1.load(total1.type.layout)
            mbarrier.arrive(received, count=1)
    if TURN == 0:
        _finish(
            total0, total1, ending, expert, first, end, n,
            N, GATE_UP, MXFP8, LIMITED, BIASED, WEIGHTED, RECIPROCAL, HALVED,
        )  # fmt: skip
    if not EARLY:
        mbarrier.wait(ring[2].index(stage), phase)
    return words, stage, phase


@gluon.jit
def _compute(
    ring, exchange, work, w_scale, ending, steps,
    K: gl.constexpr, N: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr,
    COLUMNS: gl.constexpr, STAGES: gl.constexpr, GATE_UP: gl.constexpr, MXFP8: gl.constexpr, LIMITED: gl.constexpr,
    BIASED: gl.constexpr, WEIGHTED: gl.constexpr, RECIPROCAL: gl.constexpr, EARLY: gl.constexpr,
    TURNS: gl.constexpr, TURN: gl.constexpr,
):  # fmt: skip
    """The other warps: each tile that the loader tells of. TURNS is 2: of all stages those of ``TURN``, whatever tiles
    they are of."""
    x_ring, w_ring, full, empty = ring
    pairs, columns, ends, told, copied = work
    STEPS: gl.constexpr = _word_steps(K, COLUMNS, TURNS)
    stage = TURN
    phase = 0
    number = 0
    mbarrier.wait(full.index(stage), phase)
    words = ()
    if EARLY:
        words = _first_words(work, w_scale, steps, stage, number, K, N, BLOCK_N, GROUP, STEPS, GATE_UP, TURNS, TURN)
    pair = _get(pairs, stage)
    while pair >= 0:
        expert = pair.to(gl.int32)
        first = (pair >> 32).to(gl.int32)
        n = _get(columns, stage) * BLOCK_N
        end = _get(ends, stage)
        if BLOCK_M > 16 and end - first <= BLOCK_M // 2:
            words, stage, phase = _tile(
                ring, exchange, work, w_scale, ending, steps, expert, first, end, n, words, stage, phase, number,
                K, N, BLOCK_M // 2, BLOCK_N, GROUP, COLUMNS, STAGES, STEPS, GATE_UP, MXFP8, LIMITED, BIASED, WEIGHTED,
                RECIPROCAL, EARLY, TURNS, TURN,
            )  # fmt: skip
        else:
            words, stage, phase = _tile(
                ring, exchange, work, w_scale, ending, steps, expert, first, end, n, words, stage, phase, number,
                K, N, BLOCK_M, BLOCK_N, GROUP, COLUMNS, STAGES, STEPS, GATE_UP, MXFP8, LIMITED, BIASED, WEIGHTED,
                RECIPROCAL, EARLY, TURNS, TURN,
            )  # fmt: skip
        number += 1
        pair = _get(pairs, stage)


@gluon.jit(do_not_specialize=["weights_stride", "count"], do_not_specialize_on_alignment=["topk_weights"])
def warpgroup_gemm_kernel(
    x, w, w_scale, bias, out, tiles, offsets, routes, topk_weights, counters, count: "i32",
    weights_stride: "i64", alpha: "fp32", beta: "fp32", limit: "fp32",
    K: gl.constexpr, N: gl.constexpr, GATE_UP: gl.constexpr, MXFP8: gl.constexpr, LIMITED: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    GATHER: gl.constexpr, TOPK: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """``count`` tiles, one program for one after another: BLOCK_M slots of one expert by BLOCK_N output columns, 16 for
    each warp (GATE_UP) or 32, or half of that.

    counters [2, 2]: zeros, before and afterwards; a row for GATE_UP and one for not. COLUMNS: of a stage. TURNS: how
    many groups of warps take a tile's stages in turns.
    x: a descriptor of rows [R, K] bf16, times HELD_TIMES, K in product order, ``slots_of_a_copy`` at a time; GATHER: a
    pointer to such rows [T, K], of which slot s reads routes[s] // TOPK; w: a descriptor of codes [E, 2, N, K]
    (GATE_UP) or [E, 1, N, K], with w_scale [E, 2 N or N, K/32]; the rest as in :func:`.gemm.grouped_gemm_kernel`. Rows
    in product order are of ``whole_steps`` columns, zeros where there is no other; GATE_UP: so are out's.
    """
    GROUP: gl.constexpr = 16 * gl.num_warps()
    HALVES: gl.constexpr = 2 if GATE_UP else 1
    gl.static_assert(K % BLOCK == 0, "of the last stage a part may be beyond K, where copies give zeros")
    x_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES * (COLUMNS // STEP), BLOCK_M, STEP], x_layout)
    box: gl.constexpr = min(COLUMNS, BOX)
    w_ring = gl.allocate_shared_memory(gl.uint8, [STAGES * (COLUMNS // box), 1, HALVES, BLOCK_N, box], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    scalars: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    work = (
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], scalars),
        gl.allocate_shared_memory(gl.int32, [STAGES, 1], scalars),
        gl.allocate_shared_memory(gl.int32, [STAGES, 1], scalars),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()) if GATHER else full,
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()) if GATHER else full,
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2 if GATHER else 1)
        mbarrier.init(empty.index(i), count=1)
        if GATHER:
            mbarrier.init(work[3].index(i), count=1)
            mbarrier.init(work[4].index(i), count=32 * GATHERING)
    BIASED: gl.constexpr = bias is not None
    WEIGHTED: gl.constexpr = topk_weights is not None
    ring = (x_ring, w_ring, full, empty)
    exchange = ring
    if TURNS == 2:
        gl.static_assert(STAGES % 2 == 0, "a place in the ring is always the same group's")
        gl.static_assert(K > COLUMNS, "each group has a stage of each tile")
        products: gl.constexpr = 1 if HALVES * BLOCK_N == GROUP else 2
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
        exchange = (
            gl.allocate_shared_memory(gl.float32, [products, GROUP, BLOCK_M], plain),
            gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
            gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        )
        mbarrier.init(exchange[1], count=1)
        mbarrier.init(exchange[2], count=1)
    ending = (
        bias if BIASED else w_scale, out, routes, topk_weights if WEIGHTED else w_scale,
        weights_stride, alpha, beta, limit,
    )  # fmt: skip
    steps = (w.shape[3] + STEP - 1) // STEP
    # With fewer slots memory is the limit: the next tile is not there yet, and waiting for it would come first. Four
    # warps with gate and up have no registers for it.
    EARLY: gl.constexpr = BLOCK_M > 64 and (gl.num_warps() == 8 or not GATE_UP)
    # Shorter than a division. With this form of a tile Triton 3.9 would keep six words of a lane in memory for it.
    RECIPROCAL: gl.constexpr = GATHER or BLOCK_M <= 64 or STAGES != 4
    if TURNS == 2:
        gl.warp_specialize(
            [
                (
                    _compute,
                    (
                        ring, exchange, work, w_scale, ending, steps,
                        K, N, BLOCK_M, BLOCK_N, GROUP, COLUMNS, STAGES, GATE_UP, MXFP8, LIMITED, BIASED, WEIGHTED,
                        RECIPROCAL, EARLY, 2, 0,
                    ),
                ),
                (
                    _compute,
                    (
                        ring, exchange, work, w_scale, ending, steps,
                        K, N, BLOCK_M, BLOCK_N, GROUP, COLUMNS, STAGES, GATE_UP, MXFP8, LIMITED, BIASED, WEIGHTED,
                        RECIPROCAL, EARLY, 2, 1,
                    ),
                ),
                (
                    _load,
                    (
                        x, w, w_scale, ring, work, tiles, offsets, counters, count,
                        K, N, BLOCK_M, BLOCK_N, COLUMNS, HALVES, STAGES, TURNS, False, OVERLAP,
                    ),
                ),
            ],
            [4, 1],
            # For products on both sides ptxas counts on no more registers than the least that any of these has.
            [200, 96],
        )  # fmt: skip
    elif GATHER:
        gl.warp_specialize(
            [
                (
                    _compute,
                    (
                        ring, exchange, work, w_scale, ending, steps,
                        K, N, BLOCK_M, BLOCK_N, GROUP, COLUMNS, STAGES, GATE_UP, MXFP8, LIMITED, BIASED, WEIGHTED,
                        RECIPROCAL, EARLY, 1, 0,
                    ),
                ),
                (_gather, (x, ring, work, routes, K, BLOCK_M, COLUMNS, STAGES, TOPK)),
                (
                    _load,
                    (
                        x, w, w_scale, ring, work, tiles, offsets, counters, count,
                        K, N, BLOCK_M, BLOCK_N, COLUMNS, HALVES, STAGES, 1, True, OVERLAP,
                    ),
                ),
                (_pass_on, (ring, work, K, COLUMNS, STAGES)),
            ],
            [GATHERING, 1, 1],
            # With 56 the products of 128 slots have too few left, and each waits for the one before.
            [40, 40, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _compute,
                    (
                        ring, exchange, work, w_scale, ending, steps,
                        K, N, BLOCK_M, BLOCK_N, GROUP, COLUMNS, STAGES, GATE_UP, MXFP8, LIMITED, BIASED, WEIGHTED,
                        RECIPROCAL, EARLY, 1, 0,
                    ),
                ),
                (
                    _load,
                    (
                        x, w, w_scale, ring, work, tiles, offsets, counters, count,
                        K, N, BLOCK_M, BLOCK_N, COLUMNS, HALVES, STAGES, TURNS, False, OVERLAP,
                    ),
                ),
            ],
            [1],
            [24],
        )  # fmt: skip
