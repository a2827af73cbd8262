"""Which row goes to which expert, and back: everything of ``fused_moe`` but its two matrix products.

A route is one (token, k) pair, numbered token * K + k. ``route_kernel`` gives every route that reaches a local expert a
slot, such that the slots of one expert are neighbours, in the order of the routes: a counting sort that never tells the
host anything and gives the same slots every time. Each of its programs reads all routes, twice;
of many, ``count_kernel``, ``sum_kernel`` and ``place_kernel`` do the same in parts. ``dispatch_kernel`` rounds the
activations and copies them to their slots, so that the products read and write contiguous rows. Where the first product
reads each token's row where it is, rounding does not depend on routes, and ``route_round_kernel`` or
``count_round_kernel`` does both at once. ``combine_kernel`` sums the results.
"""

import triton
import triton.language as tl

from .memory import to_product_order
from .numerics import BLOCK, HELD_TIMES, block_amax, cast, decoded, encoded, factor, scale_byte
from .overlap import take_over, wait_for_launch_before


_of_routes = triton.jit(
    do_not_specialize=["routes_total", "ids_stride", "first_token", "known", "tiles_bound"],
    do_not_specialize_on_alignment=["topk_ids", "expert_map", "num_tokens"],
)
"""A kernel that finds slots."""


@triton.jit
def local_experts(
    topk_ids, expert_map, num_tokens, route, routes_total, ids_stride, first_token, known,
    EXPERTS: tl.constexpr, TOPK: tl.constexpr,
):  # fmt: skip
    """The local expert of each of ``route`` [N], int32, -1 where it adds nothing. Ids are checked before any cast."""
    token = route // TOPK
    within = route < routes_total
    ids = tl.load(topk_ids + token.to(tl.int64) * ids_stride + route % TOPK, mask=within, other=-1)
    valid = (ids >= 0) & (ids < known)
    local = tl.where(valid, ids, 0).to(tl.int32)
    if expert_map is not None:
        local = tl.load(expert_map + local, mask=valid, other=-1)
        valid &= (local >= 0) & (local < EXPERTS)
    if num_tokens is not None:
        valid &= token + first_token < tl.load(num_tokens)
    return tl.where(valid, local, -1)


@triton.jit
def _count(local, EXPERTS_POW2: tl.constexpr):
    """How many routes reach each expert, [EXPERTS_POW2], from the local expert of each."""
    return tl.histogram(tl.maximum(local, 0), EXPERTS_POW2, mask=local >= 0)


@triton.jit
def _store_offsets(offsets, start, end, EXPERTS: tl.constexpr, EXPERTS_POW2: tl.constexpr):
    """Where each expert's slots begin, and where the last one's end, [EXPERTS + 1]."""
    expert = tl.arange(0, EXPERTS_POW2)
    tl.store(offsets + expert, start, mask=expert < EXPERTS)
    tl.store(offsets + EXPERTS, tl.max(end, 0))


@triton.jit
def _bounds(offsets, EXPERTS: tl.constexpr, EXPERTS_POW2: tl.constexpr):
    """Each expert's first slot, and the first one after it, [EXPERTS_POW2]; 0 for experts that there are not."""
    expert = tl.arange(0, EXPERTS_POW2)
    start = tl.load(offsets + expert, mask=expert < EXPERTS, other=0)
    return start, tl.load(offsets + expert + 1, mask=expert < EXPERTS, other=0)


@triton.jit
def _count_routes(local, EXPERTS_POW2: tl.constexpr):
    """What :func:`_bounds` returns, from the local expert of each route."""
    count = _count(local, EXPERTS_POW2)
    end = tl.cumsum(count, 0)
    return end - count, end


@_of_routes
def route_kernel(
    topk_ids, expert_map, num_tokens, slots, routes, offsets,
    routes_total: "i32", ids_stride: "i64", first_token: "i64", known: "i64",
    EXPERTS: tl.constexpr, TOPK: tl.constexpr, N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program an expert. Writes slots [R] (-1: adds nothing), routes [R] by slot, offsets [E + 1] in slots."""
    take_over(OVERLAP)
    expert = tl.program_id(0)
    lane = tl.arange(0, N)
    before = tl.zeros([N], tl.int32)
    own = tl.zeros([N], tl.int32)
    for start in range(0, routes_total, N):
        local = local_experts(
            topk_ids, expert_map, num_tokens, start + lane, routes_total, ids_stride, first_token, known, EXPERTS, TOPK
        )  # fmt: skip
        before += ((local >= 0) & (local < expert)).to(tl.int32)
        own += (local == expert).to(tl.int32)
    slot = tl.sum(before)
    tl.store(offsets + expert, slot)
    if expert == EXPERTS - 1:
        tl.store(offsets + EXPERTS, slot + tl.sum(own))
    for start in range(0, routes_total, N):
        route = start + lane
        local = local_experts(
            topk_ids, expert_map, num_tokens, route, routes_total, ids_stride, first_token, known, EXPERTS, TOPK
        )  # fmt: skip
        mine = local == expert
        rank = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(routes + slot + rank - 1, route, mask=mine)
        tl.store(slots + route, slot + rank - 1, mask=mine)
        if expert == 0:
            tl.store(slots + route, -1, mask=(route < routes_total) & (local < 0))
        slot += tl.sum(mine.to(tl.int32))


@triton.jit
def _count_part(
    topk_ids, expert_map, num_tokens, counts, routes_total, ids_stride, first_token, known,
    EXPERTS: tl.constexpr, EXPERTS_POW2: tl.constexpr, TOPK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """How many of the N routes of the part that has the program's number reach each expert, to its row of counts
    [parts, EXPERTS_POW2]."""
    part = tl.program_id(0)
    local = local_experts(
        topk_ids, expert_map, num_tokens, part * N + tl.arange(0, N), routes_total, ids_stride, first_token, known,
        EXPERTS, TOPK,
    )  # fmt: skip
    tl.store(counts + part * EXPERTS_POW2 + tl.arange(0, EXPERTS_POW2), _count(local, EXPERTS_POW2))


@_of_routes
def count_kernel(
    topk_ids, expert_map, num_tokens, counts,
    routes_total: "i32", ids_stride: "i64", first_token: "i64", known: "i64",
    EXPERTS: tl.constexpr, EXPERTS_POW2: tl.constexpr, TOPK: tl.constexpr, N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program a part of N routes. Writes counts [parts, EXPERTS_POW2]: how many of the part reach each expert."""
    take_over(OVERLAP)
    _count_part(
        topk_ids, expert_map, num_tokens, counts, routes_total, ids_stride, first_token, known,
        EXPERTS, EXPERTS_POW2, TOPK, N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["parts"])
def sum_kernel(
    counts, before, parts: "i32",
    EXPERTS_POW2: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program for COLUMNS experts. Writes before [parts + 1, EXPERTS_POW2]: of the parts before each, the sum of
    ``counts``, and in the last row that of all."""
    take_over(OVERLAP)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, parts, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        at = row * EXPERTS_POW2 + column[None, :]
        count = tl.load(counts + at, mask=row < parts, other=0)
        tl.store(before + at, total[None, :] + tl.cumsum(count, 0) - count, mask=row < parts)
        total += tl.sum(count, 0)
    tl.store(before + parts * EXPERTS_POW2 + column, total)


@triton.jit
def _list_tiles(
    expert, start, end, tiles, tiles_bound, EXPERTS: tl.constexpr, EXPERTS_POW2: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The tiles of one expert: (expert, first slot) for each BLOCK_M of its slots, after the experts before; of the
    last one, what is left of the list as well."""
    others = tl.arange(0, EXPERTS_POW2)
    count = (end - start + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(others < expert, count, 0))
    own = tl.sum(tl.where(others == expert, count, 0))
    slot = tl.sum(tl.where(others == expert, start, 0))
    lane = tl.arange(0, 128)
    for i in range(0, own, 128):
        tile = i + lane
        tl.store(tiles + 2 * (first + tile), expert, mask=tile < own)
        tl.store(tiles + 2 * (first + tile) + 1, slot + tile * BLOCK_M, mask=tile < own)
    if expert == EXPERTS - 1:
        for tile in range(first + own, tiles_bound, 128):
            tl.store(tiles + 2 * (tile + lane), -1, mask=tile + lane < tiles_bound)


@_of_routes
def place_kernel(
    topk_ids, expert_map, num_tokens, before, slots, routes, offsets, tiles,
    routes_total: "i32", ids_stride: "i64", first_token: "i64", known: "i64", tiles_bound: "i32",
    EXPERTS: tl.constexpr, EXPERTS_POW2: tl.constexpr, TOPK: tl.constexpr, BLOCK_M: tl.constexpr, N: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """After :func:`sum_kernel`, one program a part. Writes what :func:`route_kernel` does, and ``tiles``, if they are
    given, as :func:`dispatch_kernel` does."""
    part = tl.program_id(0)
    lane = tl.arange(0, N)
    route = part * N + lane
    local = local_experts(
        topk_ids, expert_map, num_tokens, route, routes_total, ids_stride, first_token, known, EXPERTS, TOPK
    )  # fmt: skip
    take_over(OVERLAP)
    expert = tl.arange(0, EXPERTS_POW2)
    count = tl.load(before + tl.num_programs(0) * EXPERTS_POW2 + expert)
    end = tl.cumsum(count, 0)
    if part == 0:
        _store_offsets(offsets, end - count, end, EXPERTS, EXPERTS_POW2)
    if tiles is not None:
        for listed in range(part, EXPERTS, tl.num_programs(0)):
            _list_tiles(listed, end - count, end, tiles, tiles_bound, EXPERTS, EXPERTS_POW2, BLOCK_M)
    first = end - count + tl.load(before + part * EXPERTS_POW2 + expert)
    earlier = (local[None, :] == local[:, None]) & (lane[None, :] < lane[:, None])
    slot = tl.gather(first, tl.maximum(local, 0), 0) + tl.sum(earlier.to(tl.int32), 1)
    tl.store(slots + route, tl.where(local >= 0, slot, -1), mask=route < routes_total)
    tl.store(routes + slot, route, mask=local >= 0)


@triton.jit
def _slots(local, token, TOPK: tl.constexpr, TOPK_POW2: tl.constexpr, ROUTES: tl.constexpr):
    """The slots [TOPK_POW2] of a token's routes, -1 where it adds nothing, from the local expert of each route."""
    others = tl.arange(0, ROUTES)[None, :]
    route = token * TOPK + tl.arange(0, TOPK_POW2)
    own = tl.sum(tl.where(others == route[:, None], local[None, :], 0), axis=1)
    earlier = (local[None, :] < own[:, None]) | (local[None, :] == own[:, None]) & (others < route[:, None])
    slot = tl.sum(((local[None, :] >= 0) & earlier).to(tl.int32), axis=1)
    return tl.where(own >= 0, slot, -1)


@triton.jit
def _aligned(row):
    """Whether an address is one of 16 bytes. What is then said to be (``tl.multiple_of``) must be computed anew: it is
    said of that value wherever it is used."""
    return row.to(tl.int64) % 16 == 0


@triton.jit
def _of_blocks(block, H: tl.constexpr):
    """The columns [N, 32] of blocks [N], and which of them H has."""
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return index, (block < H // BLOCK)[:, None] & (index < H)


@triton.jit
def _rounded(
    values, x_scale, token, block, x_scale_stride,
    H: tl.constexpr, HELD: tl.constexpr, MXFP8: tl.constexpr, NATIVE_E4M3: tl.constexpr,
):  # fmt: skip
    """values [N, 32] of blocks ``block`` [N] of a token, rounded to MXFP8, or else to bf16 -> the same times HELD_TIMES
    if HELD, or else codes, and scale bytes [N] (of bf16 there are none). x_scale: of values that are MXFP8 already, or
    None."""
    byte = block
    if x_scale is not None:
        byte = tl.load(x_scale + token * x_scale_stride + block, mask=block < H // BLOCK, other=0).to(tl.int32)
        code = values
    elif MXFP8:
        values = cast(values, tl.float32)
        byte = scale_byte(block_amax(values), "rceil")
        code = encoded(values, byte[:, None], NATIVE_E4M3)
    if not HELD:
        result = code
    elif MXFP8 or x_scale is not None:
        result = decoded(code, NATIVE_E4M3) * HELD_TIMES * factor(byte)[:, None]
    else:
        result = cast(cast(values, tl.bfloat16), tl.float32) * HELD_TIMES
    return result, byte


@triton.jit
def _reordered(values, first, N: tl.constexpr):
    """values [N, 32] of the blocks from ``first`` on -> [N / 2, 64] in product order, and where in a row they go."""
    index = first * BLOCK + tl.arange(0, N // 2)[:, None] * 64 + tl.arange(0, 64)[None, :]
    return to_product_order(values), index


_of_routes_and_rows = triton.jit(
    do_not_specialize=[
        "x_stride",
        "x_scale_stride",
        "tiles_bound",
        "routes_total",
        "ids_stride",
        "first_token",
        "known",
        "parts",
    ],
    do_not_specialize_on_alignment=["x", "x_scale", "topk_ids", "expert_map", "num_tokens"],
)
"""A kernel that reads both."""


@_of_routes_and_rows
def dispatch_kernel(
    x, x_scale, topk_ids, expert_map, num_tokens, slots, routes, offsets, rows, rows_scale, tiles, counters,
    x_stride: "i64", x_scale_stride: "i64", tiles_bound: "i32",
    routes_total: "i32", ids_stride: "i64", first_token: "i64", known: "i64",
    H: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_POW2: tl.constexpr, TOPK: tl.constexpr, TOPK_POW2: tl.constexpr,
    ROUTES: tl.constexpr, BLOCK_M: tl.constexpr, MXFP8: tl.constexpr, IN_PRODUCT_ORDER: tl.constexpr,
    NATIVE_E4M3: tl.constexpr, N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs 0..E-1 list the tiles [tiles_bound, 2] of their experts (-1: none); each other one takes N blocks of a
    token of x [T, H], rounds them (:func:`_rounded`) and copies them to the slots of the token's routes.

    ROUTES is not 0: no more routes than that, and they have no slots yet: each program finds the ones that it needs,
    and they, ``routes`` and ``offsets`` are written as by :func:`route_kernel`.
    Rows are written as codes and rows_scale if there is one, else as bf16, times HELD_TIMES; IN_PRODUCT_ORDER: H is,
    and a multiple of 64.
    """
    take_over(OVERLAP)
    pid = tl.program_id(0)
    if ROUTES:
        local = local_experts(
            topk_ids, expert_map, num_tokens, tl.arange(0, ROUTES), routes_total, ids_stride, first_token, known,
            EXPERTS, TOPK,
        )  # fmt: skip
    if pid < EXPERTS:
        if counters is not None:
            if pid == 0:
                tl.store(counters + tl.arange(0, 4), 0)
        if ROUTES:
            start, end = _count_routes(local, EXPERTS_POW2)
            if pid == 0:
                _store_offsets(offsets, start, end, EXPERTS, EXPERTS_POW2)
        else:
            start, end = _bounds(offsets, EXPERTS, EXPERTS_POW2)
        _list_tiles(pid, start, end, tiles, tiles_bound, EXPERTS, EXPERTS_POW2, BLOCK_M)
    else:
        parts: tl.constexpr = (H // BLOCK + N - 1) // N
        token = ((pid - EXPERTS) // parts).to(tl.int64)
        last = -1
        if ROUTES:
            k_index = tl.arange(0, TOPK_POW2)
            own_slots = _slots(local, token.to(tl.int32), TOPK, TOPK_POW2, ROUTES)
            own_slots = tl.where(k_index < TOPK, own_slots, -1)
            last = tl.max(own_slots, 0)
            if (pid - EXPERTS) % parts == 0:
                route = token.to(tl.int32) * TOPK + k_index
                tl.store(slots + route, own_slots, mask=k_index < TOPK)
                tl.store(routes + own_slots, route, mask=own_slots >= 0)
        else:
            for k in tl.static_range(TOPK):
                last = tl.maximum(last, tl.load(slots + token * TOPK + k))
        if last >= 0:
            first = (pid - EXPERTS) % parts * N
            block = first + tl.arange(0, N)
            index, within = _of_blocks(block, H)
            values = tl.load(x + token * x_stride + index, mask=within, other=0)
            result, byte = _rounded(
                values, x_scale, token, block, x_scale_stride, H, rows_scale is None, MXFP8, NATIVE_E4M3
            )
            result = result.to(rows.dtype.element_ty)
            if IN_PRODUCT_ORDER:
                result, index = _reordered(result, first, N)
            for k in tl.static_range(TOPK):
                if ROUTES:
                    slot = tl.sum(tl.where(k_index == k, own_slots, 0), 0).to(tl.int64)
                else:
                    slot = tl.load(slots + token * TOPK + k).to(tl.int64)
                if slot >= 0:
                    tl.store(rows + slot * H + index, result, mask=index < H)
                    if rows_scale is not None:
                        tl.store(rows_scale + slot * (H // BLOCK) + block, byte.to(tl.uint8), mask=block < H // BLOCK)


@triton.jit
def _round_row(
    program, x, x_scale, topk_ids, expert_map, num_tokens, rows, x_stride, x_scale_stride,
    routes_total, ids_stride, first_token, known,
    H: tl.constexpr, EXPERTS: tl.constexpr, TOPK: tl.constexpr, TOPK_POW2: tl.constexpr, MXFP8: tl.constexpr,
    NATIVE_E4M3: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """N blocks of a token of x [T, H], rounded (:func:`_rounded`), to the token's row of rows [T, H]: bf16, times
    HELD_TIMES, in product order; by words where x is aligned to them. Where it may be that none of a token's routes
    reaches a local expert, nothing is written for those."""
    parts: tl.constexpr = (H // BLOCK + N - 1) // N
    token = (program // parts).to(tl.int64)
    local = 0
    if expert_map is not None or num_tokens is not None:
        k_index = tl.arange(0, TOPK_POW2)
        local = local_experts(
            topk_ids, expert_map, num_tokens, token.to(tl.int32) * TOPK + k_index, routes_total, ids_stride,
            first_token, known, EXPERTS, TOPK,
        )  # fmt: skip
        local = tl.max(tl.where(k_index < TOPK, local, -1), 0)
    if local >= 0:
        first = program % parts * N
        block = first + tl.arange(0, N)
        index, within = _of_blocks(block, H)
        if _aligned(x + token * x_stride):
            values = tl.load(tl.multiple_of(x + token * x_stride, 16) + index, mask=within, other=0)
        else:
            values = tl.load(x + token * x_stride + index, mask=within, other=0)
        result, _ = _rounded(values, x_scale, token, block, x_scale_stride, H, True, MXFP8, NATIVE_E4M3)
        result, index = _reordered(result.to(rows.dtype.element_ty), first, N)
        tl.store(rows + token * H + index, result, mask=index < H)


@_of_routes_and_rows
def route_round_kernel(
    x, x_scale, topk_ids, expert_map, num_tokens, slots, routes, offsets, rows, tiles, counters,
    x_stride: "i64", x_scale_stride: "i64", tiles_bound: "i32",
    routes_total: "i32", ids_stride: "i64", first_token: "i64", known: "i64",
    H: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_POW2: tl.constexpr, TOPK: tl.constexpr, TOPK_POW2: tl.constexpr,
    ROUTES: tl.constexpr, BLOCK_M: tl.constexpr, MXFP8: tl.constexpr, NATIVE_E4M3: tl.constexpr, N: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Of up to ROUTES routes: programs 0..E-1 write what those of :func:`route_kernel` and of :func:`dispatch_kernel`
    do for their experts, the others round rows (:func:`_round_row`)."""
    take_over(OVERLAP)
    pid = tl.program_id(0)
    if pid < EXPERTS:
        route = tl.arange(0, ROUTES)
        local = local_experts(
            topk_ids, expert_map, num_tokens, route, routes_total, ids_stride, first_token, known, EXPERTS, TOPK
        )  # fmt: skip
        start, end = _count_routes(local, EXPERTS_POW2)
        if pid == 0:
            tl.store(counters + tl.arange(0, 4), 0)
            _store_offsets(offsets, start, end, EXPERTS, EXPERTS_POW2)
            tl.store(slots + route, -1, mask=(route < routes_total) & (local < 0))
        _list_tiles(pid, start, end, tiles, tiles_bound, EXPERTS, EXPERTS_POW2, BLOCK_M)
        mine = local == pid
        slot = tl.sum(tl.where(tl.arange(0, EXPERTS_POW2) == pid, start, 0))
        slot += tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(routes + slot, route, mask=mine)
        tl.store(slots + route, slot, mask=mine)
    else:
        _round_row(
            pid - EXPERTS, x, x_scale, topk_ids, expert_map, num_tokens, rows, x_stride, x_scale_stride,
            routes_total, ids_stride, first_token, known, H, EXPERTS, TOPK, TOPK_POW2, MXFP8, NATIVE_E4M3, N,
        )  # fmt: skip


@_of_routes_and_rows
def count_round_kernel(
    x, x_scale, topk_ids, expert_map, num_tokens, rows, counts, counters, parts: "i32",
    x_stride: "i64", x_scale_stride: "i64",
    routes_total: "i32", ids_stride: "i64", first_token: "i64", known: "i64",
    H: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_POW2: tl.constexpr, TOPK: tl.constexpr, TOPK_POW2: tl.constexpr,
    ROUTES: tl.constexpr, MXFP8: tl.constexpr, NATIVE_E4M3: tl.constexpr, N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs 0..parts-1 write what those of :func:`count_kernel` do, for ROUTES routes each, the others round rows
    (:func:`_round_row`)."""
    take_over(OVERLAP)
    pid = tl.program_id(0)
    if pid < parts:
        if pid == 0:
            tl.store(counters + tl.arange(0, 4), 0)
        _count_part(
            topk_ids, expert_map, num_tokens, counts, routes_total, ids_stride, first_token, known,
            EXPERTS, EXPERTS_POW2, TOPK, ROUTES,
        )  # fmt: skip
    else:
        _round_row(
            pid - parts, x, x_scale, topk_ids, expert_map, num_tokens, rows, x_stride, x_scale_stride,
            routes_total, ids_stride, first_token, known, H, EXPERTS, TOPK, TOPK_POW2, MXFP8, NATIVE_E4M3, N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["weights_stride", "out_stride"], do_not_specialize_on_alignment=["topk_weights", "out"])
def combine_kernel(
    terms, slots, topk_weights, out, weights_stride: "i64", out_stride: "i64",
    H: tl.constexpr, TOPK: tl.constexpr, WEIGHTED: tl.constexpr, WORDS: tl.constexpr, N: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [T, H] = the sum over k = 0..K-1, in this order and in fp32, of weight * the term in the route's slot. WORDS:
    write words to rows that are aligned to them."""
    if OVERLAP:
        wait_for_launch_before()
    parts: tl.constexpr = (H + N - 1) // N
    token = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.program_id(0) % parts * N + tl.arange(0, N)
    within = column < H
    total = tl.zeros([N], tl.float32)
    for k in tl.static_range(TOPK):  # without a branch, so that all loads are under way at once
        slot = tl.load(slots + token * TOPK + k).to(tl.int64)
        term = tl.load(terms + slot * H + column, mask=column < tl.where(slot >= 0, H, 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(topk_weights + token * weights_stride + k).to(tl.float32)
            term *= tl.where(slot >= 0, weight, 0.0)
        total += term
    result = cast(total, out.dtype.element_ty)
    if WORDS:
        if _aligned(out + token * out_stride):
            tl.store(tl.multiple_of(out + token * out_stride, 16) + column, result, mask=within)
        else:
            tl.store(out + token * out_stride + column, result, mask=within)
    else:
        tl.store(out + token * out_stride + column, result, mask=within)
