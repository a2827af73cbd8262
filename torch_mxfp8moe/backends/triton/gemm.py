"""The grouped matrix product: rows in slots, sorted by expert, times each expert's weight.

One kernel for both products of a layer and for every architecture. The weight is the left operand (so that the unit's
larger side lies along its rows, however few tokens there are) and never leaves MXFP8 outside registers. What differs
between architectures is one strategy:

- ``upcast``: weights become bf16 in registers, activations are bf16 in memory, a 16-bit matrix unit multiplies. Every
  e4m3 value times a power of two is a bf16 value, so what is multiplied is the MXFP8 value, exactly (activations all of
  them, being held times ``HELD_TIMES``; weights those that are multiples of 2^-130, all with scale bytes from 6 on).
- ``scaled``: both operands stay codes and scale bytes, and the matrix unit takes them as they are (gfx950, sm_100).
  On gfx950 the activations are the left operand (X_LEFT): a lane then holds neighbouring columns of a result, which
  share a scale byte, and codes are made by an instruction.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .memory import offset
from .numerics import BLOCK, HELD_TIMES, block_amax, cast, decoded, encoded, factor, scale_byte, swiglu
from .overlap import take_over


@triton.jit
def _upcast(codes, byte, dtype: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    """codes [N, K] uint8, byte [N, K/32] uint8 -> their values, divided by HELD_TIMES, [N, K] in ``dtype``."""
    value = decoded(codes, NATIVE_E4M3)
    blocks = tl.reshape(value, (codes.shape[0], codes.shape[1] // BLOCK, BLOCK))
    blocks *= (factor(byte.to(tl.int32)) * (1.0 / HELD_TIMES))[:, :, None]
    return tl.reshape(blocks, codes.shape).to(dtype)


@triton.jit
def _columns(BLOCK_K: tl.constexpr, GROUPS: tl.constexpr):
    """Which column of a tile of K each position of the product takes, [BLOCK_K]: any order will do, if both operands
    have it. Of GROUPS lanes that give a matrix instruction its scale bytes, each holds those of blocks that lie GROUPS
    positions apart: here these are neighbours in memory, and the bytes one word."""
    column = tl.arange(0, BLOCK_K)
    if GROUPS > 1:
        block = column // BLOCK
        column = (block % GROUPS * (BLOCK_K // BLOCK // GROUPS) + block // GROUPS) * BLOCK + column % BLOCK
    return column


@triton.jit
def _in_columns_order(byte, GROUPS: tl.constexpr):
    """Scale bytes [rows, blocks] of neighbouring blocks -> in the order of :func:`_columns`."""
    if GROUPS > 1:
        split = tl.reshape(byte, (byte.shape[0], GROUPS, byte.shape[1] // GROUPS))
        byte = tl.reshape(tl.permute(split, (0, 2, 1)), byte.shape)
    return byte


@triton.jit
def _by_wave(position, BLOCK_N: tl.constexpr, WAVES: tl.constexpr):
    """Which of BLOCK_N columns each position of a result takes. WAVES waves take 16 positions each by turns: here these
    are 16 after 16 columns, so that a block of 32 is one wave's."""
    group = position // 16
    return (group % WAVES * (BLOCK_N // 16 // WAVES) + group // WAVES) * 16 + position % 16


@triton.jit
def _weight_tile(
    w, expert, n, row_offset, k, K: tl.constexpr, COLUMNS: tl.constexpr, COLUMN_DIGITS: tl.constexpr,
    ROWS_TILE: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTOR: tl.constexpr, GROUPS: tl.constexpr,
    X_LEFT: tl.constexpr,
):  # fmt: skip
    """Codes [ROWS_TILE, BLOCK_K] uint8 from column k on, X_LEFT: transposed; expert and n for a descriptor, row_offset
    for a pointer."""
    if DESCRIPTOR:
        codes = tl.reshape(w.load([expert, 0, n, k]), (ROWS_TILE, BLOCK_K))
    else:
        column = k + _columns(BLOCK_K, GROUPS)
        at = offset(column, COLUMNS, COLUMN_DIGITS)
        if X_LEFT:
            pointers = w + (row_offset[None, :] + at[:, None])
            mask = (column < K)[:, None]
        else:
            pointers = w + (row_offset[:, None] + at[None, :])
            mask = (column < K)[None, :]
        codes = tl.load(pointers, mask=mask if K % BLOCK_K else None, other=0 if K % BLOCK_K else None)
    return codes


@triton.jit
def _scale_tile(
    scale, row_offset, k, K: tl.constexpr, COLUMNS: tl.constexpr, COLUMN_DIGITS: tl.constexpr, BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Scale bytes [rows, BLOCK_K / 32] from column k on; TAIL: where they may be beyond K, and are then the byte of
    2^-127, whose codes are zeros."""
    block = k // BLOCK + tl.arange(0, BLOCK_K // BLOCK)
    pointers = scale + (row_offset[:, None] + offset(block, COLUMNS, COLUMN_DIGITS)[None, :])
    return tl.load(pointers, mask=(block < K // BLOCK)[None, :] if TAIL else None, other=0 if TAIL else None)


@triton.jit
def _multiply(
    codes, byte, x, x_scale, total, SCALED: tl.constexpr, X_LEFT: tl.constexpr, NATIVE_E4M3: tl.constexpr,
    WGMMA: tl.constexpr,
):  # fmt: skip
    """total [BLOCK_N, BLOCK_M] fp32 + weight tile times x [BLOCK_K, BLOCK_M]; X_LEFT: all of them transposed.

    WGMMA: the instruction goes on reading its left operand from registers after it was issued. In a loop, Triton (seen
    in 3.6) waits for it one trip later, and the next trip's conversions may be given the same registers before that:
    wrong results, now and then. A use of the sum makes it wait here; the use is a move that the assembler drops.
    """
    if X_LEFT:
        total = tl.dot_scaled(x, x_scale, "e4m3", codes, byte, "e4m3", total)
    elif SCALED:
        total = tl.dot_scaled(codes, byte, "e4m3", x, x_scale, "e4m3", total)
    else:
        total = tl.dot(_upcast(codes, byte, x.dtype, NATIVE_E4M3), x, total, input_precision="ieee")
        if WGMMA:
            total = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=f,f", [total], dtype=tl.float32, is_pure=True, pack=1
            )
    return total


@triton.jit
def _finish(
    total, bias, out, out_scale, routes, topk_weights, weights_stride, expert, n, weight_row, slot, first, end, alpha,
    beta, limit, N: tl.constexpr, GATE_UP: tl.constexpr, MXFP8: tl.constexpr, LIMITED: tl.constexpr,
    SCALED: tl.constexpr, X_LEFT: tl.constexpr, NATIVE_E4M3: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WAVES: tl.constexpr,
):  # fmt: skip
    """What :func:`grouped_gemm_kernel` does with a tile's product, ``total`` as :func:`_multiply` gives it."""
    halves: tl.constexpr = 2 if GATE_UP else 1
    if bias is not None:
        added = tl.load(bias + expert.to(tl.int64) * (halves * N) + weight_row).to(tl.float32)
        total += added[None, :] if X_LEFT else added[:, None]
    if X_LEFT:
        total = tl.trans(total)
        # Written another way than in the caller, for the compiler not to hold it, in yet another layout, in its loop.
        slot = first - BLOCK_M + tl.arange(BLOCK_M, 2 * BLOCK_M)
    if topk_weights is not None:
        route = tl.load(routes + slot, mask=slot < end, other=0).to(tl.int64)
        weight = tl.load(topk_weights + route * weights_stride, mask=slot < end, other=0.0).to(tl.float32)
        total *= weight[None, :]
    if GATE_UP:
        gate, up = tl.split(tl.permute(tl.reshape(total, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
        if LIMITED and SCALED:  # comparisons of many values at once take more scalar registers than AMD GPUs have
            gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
            up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
            up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
        if X_LEFT:  # without the steps that make exp and division exact in their last bits
            total = libdevice.fast_dividef(gate, 1.0 + libdevice.fast_expf(-alpha * gate)) * (up + beta)
        else:
            total = swiglu(gate, up, alpha, beta, limit, LIMITED and not SCALED)

    column = n + tl.arange(0, BLOCK_N)
    result = tl.trans(total)
    if WAVES > 1:  # columns in memory's order again
        result = tl.reshape(result, (BLOCK_M, BLOCK_N // 16 // WAVES, WAVES, 16))
        result = tl.reshape(tl.permute(result, (0, 2, 1, 3)), (BLOCK_M, BLOCK_N))
    pointers = slot.to(tl.int64)[:, None] * N + column[None, :]
    within = (slot < end)[:, None] & (column < N)[None, :]
    if GATE_UP and MXFP8:
        blocks = tl.reshape(result, (BLOCK_M * BLOCK_N // BLOCK, BLOCK))
        byte = scale_byte(block_amax(blocks), "rceil")
        code = encoded(blocks, byte[:, None], NATIVE_E4M3)
        if out_scale is not None:
            block = n // BLOCK + tl.arange(0, BLOCK_N // BLOCK)
            tl.store(
                out_scale + slot.to(tl.int64)[:, None] * (N // BLOCK) + block[None, :],
                tl.reshape(byte, (BLOCK_M, BLOCK_N // BLOCK)).to(tl.uint8),
                mask=(slot < end)[:, None] & (block < N // BLOCK)[None, :],
            )
            result = tl.reshape(code, (BLOCK_M, BLOCK_N))
        else:
            result = tl.reshape(decoded(code, NATIVE_E4M3) * HELD_TIMES * factor(byte)[:, None], (BLOCK_M, BLOCK_N))
    elif GATE_UP:
        result = cast(cast(result, tl.bfloat16), tl.float32) * HELD_TIMES
    tl.store(out + pointers, cast(result, out.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["weights_stride"], do_not_specialize_on_alignment=["topk_weights"])
def grouped_gemm_kernel(
    x, x_scale, w, w_scale, bias, out, out_scale, tiles, offsets, routes, topk_weights,
    weights_stride: "i64", alpha: "fp32", beta: "fp32", limit: "fp32",
    K: tl.constexpr, N: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr, ROWS: tl.constexpr, ROW_DIGITS: tl.constexpr, COLUMNS: tl.constexpr,
    COLUMN_DIGITS: tl.constexpr, SCALE_EXPERT_STRIDE: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_ROW_DIGITS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, SCALE_COLUMN_DIGITS: tl.constexpr,
    GATE_UP: tl.constexpr, MXFP8: tl.constexpr, LIMITED: tl.constexpr, SCALED: tl.constexpr,
    X_LEFT: tl.constexpr, NATIVE_E4M3: tl.constexpr, WGMMA: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUPS: tl.constexpr, WAVES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program a tile: BLOCK_M slots of one expert by BLOCK_N output columns.

    x [R, K] bf16, times HELD_TIMES, or codes with x_scale [R, K/32]; w: expert weights [E, N or 2N, K] in any layout
    (ROWS, COLUMNS, ... say where their elements lie), bias [E, N or 2N] or None. GATE_UP: N columns of silu(gate) * up,
    rounded to MXFP8 or bf16 and held as x is; the routing weight multiplies gate and up if ``topk_weights`` is there.
    Otherwise the product itself.
    """
    take_over(OVERLAP)
    pid = tl.program_id(0)
    column_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = pid // column_tiles
    expert = tl.load(tiles + 2 * tile)
    if expert >= 0:
        first = tl.load(tiles + 2 * tile + 1)
        end = tl.load(offsets + expert + 1)
        n = pid % column_tiles * BLOCK_N
        halves: tl.constexpr = 2 if GATE_UP else 1
        rows: tl.constexpr = halves * BLOCK_N

        # Rows of the weight in this tile: BLOCK_N from each half.
        position = tl.arange(0, rows) % BLOCK_N
        if WAVES > 1:
            position = _by_wave(position, BLOCK_N, WAVES)
        in_half = n + position
        weight_row = tl.arange(0, rows) // BLOCK_N * N + tl.where(in_half < N, in_half, 0)
        w_row = offset(weight_row, ROWS, ROW_DIGITS)
        s_row = offset(weight_row, SCALE_ROWS, SCALE_ROW_DIGITS)
        scales = w_scale + expert.to(tl.int64) * SCALE_EXPERT_STRIDE
        weights = w if DESCRIPTORS else w + expert.to(tl.int64) * EXPERT_STRIDE
        slot = first + tl.arange(0, BLOCK_M)
        safe_slot = tl.where(slot < end, slot, first).to(tl.int64)

        total = tl.zeros([BLOCK_M, rows] if X_LEFT else [rows, BLOCK_M], tl.float32)
        if not SCALED:
            byte = _scale_tile(scales, s_row, 0, K, SCALE_COLUMNS, SCALE_COLUMN_DIGITS, BLOCK_K, True)
        for k in tl.range(0, K, BLOCK_K):
            if SCALED:  # Pipelined by the compiler; carried from trip to trip, they crash Triton 3.6 and 3.7 on sm_100.
                byte = _scale_tile(scales, s_row, k, K, SCALE_COLUMNS, SCALE_COLUMN_DIGITS, BLOCK_K, K % BLOCK_K > 0)
                byte = _in_columns_order(byte, GROUPS)
            else:  # Small loads that the compiler does not pipeline: the next trip's are under way during this one.
                byte_next = _scale_tile(
                    scales, s_row, k + BLOCK_K, K, SCALE_COLUMNS, SCALE_COLUMN_DIGITS, BLOCK_K, True
                )  # fmt: skip
            k_index = k + _columns(BLOCK_K, GROUPS)
            if DESCRIPTORS:
                x_tile = x.load([first, k]).T
            elif X_LEFT:
                x_tile = tl.load(
                    x + (safe_slot[:, None] * K + k_index[None, :]),
                    mask=(k_index < K)[None, :] if K % BLOCK_K else None, other=0 if K % BLOCK_K else None,
                )  # fmt: skip
            else:
                x_tile = tl.load(
                    x + (safe_slot[None, :] * K + k_index[:, None]),
                    mask=(k_index < K)[:, None] if K % BLOCK_K else None, other=0 if K % BLOCK_K else None,
                )  # fmt: skip
            if SCALED:
                block = k // BLOCK + tl.arange(0, BLOCK_K // BLOCK)
                x_byte = tl.load(
                    x_scale + (safe_slot[:, None] * (K // BLOCK) + block[None, :]),
                    mask=(block < K // BLOCK)[None, :] if K % BLOCK_K else None, other=0 if K % BLOCK_K else None,
                )  # fmt: skip
                x_byte = _in_columns_order(x_byte, GROUPS)
            else:
                x_byte = 0
            codes = _weight_tile(
                weights, expert, n, w_row, k, K, COLUMNS, COLUMN_DIGITS, rows, BLOCK_K, DESCRIPTORS, GROUPS, X_LEFT
            )  # fmt: skip
            total = _multiply(codes, byte, x_tile, x_byte, total, SCALED, X_LEFT, NATIVE_E4M3, WGMMA)
            if not SCALED:
                byte = byte_next

        # By a condition that always holds, a long end is a block of its own: scheduled together with the loop's last
        # trip it has more instructions, and more values than registers hold (Triton 3.6).
        ends = end > first if X_LEFT and GATE_UP and (LIMITED or K % BLOCK_K > 0) else True
        if ends:
            _finish(
                total, bias, out, out_scale, routes, topk_weights, weights_stride, expert, n, weight_row, slot, first,
                end, alpha, beta, limit, N, GATE_UP, MXFP8, LIMITED, SCALED, X_LEFT, NATIVE_E4M3, BLOCK_M, BLOCK_N,
                WAVES,
            )  # fmt: skip
