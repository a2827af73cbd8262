"""``fused_moe`` of a few tokens: each route by itself, on the vector units, in two launches.

With one or two rows per expert a matrix unit has nothing to gain, and what takes the time is reading weights. So there
is no sorting and no padding: a program of the first launch takes one route and a few columns of its expert, a program
of the second one token and a few columns of all its experts. Each reads its weights once, the next piece already under
way while it works on this one, rounds the activations itself, and sums in fp32.
"""

import triton
import triton.language as tl

from .numerics import BLOCK, block_amax, cast, decode, decoded, encoded, factor, scale_byte, swiglu
from .overlap import take_over, wait_for_launch_before
from .routing import local_experts

PIECE = tl.constexpr(16)
"""Codes that a lane reads at once; they share a scale byte."""

OF_ROUTES = dict(
    do_not_specialize=[
        "x_stride",
        "x_scale_stride",
        "routes_total",
        "ids_stride",
        "first_token",
        "known",
        "weights_stride",
    ],
    do_not_specialize_on_alignment=["x", "x_scale", "topk_ids", "expert_map", "num_tokens", "topk_weights"],
)
OF_TOKENS = dict(
    do_not_specialize=["routes_total", "ids_stride", "first_token", "known", "weights_stride", "out_stride"],
    do_not_specialize_on_alignment=["topk_ids", "expert_map", "num_tokens", "topk_weights", "out"],
)
"""What one compiled kernel of the first launch, and one of the second, is good for any value of."""

WORD = tl.constexpr(4)
"""Codes of one register, in which they stay from one trip of a loop to the next."""

_VALUES = tl.constexpr(
    """{
    .reg .b16 low, high, h0, h1, h2, h3;
    .reg .b32 first, second;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 first, low;
    cvt.rn.f16x2.e4m3x2 second, high;
    mov.b32 {h0, h1}, first;
    mov.b32 {h2, h3}, second;
    cvt.f32.f16 $0, h0;
    cvt.f32.f16 $1, h1;
    cvt.f32.f16 $2, h2;
    cvt.f32.f16 $3, h3;
    }"""
)
"""Of a word's codes, the values."""


@triton.jit
def _local_expert(
    topk_ids, expert_map, num_tokens, route, routes_total, ids_stride, first_token, known,
    EXPERTS: tl.constexpr, TOPK: tl.constexpr,
):  # fmt: skip
    """:func:`.routing.local_experts` of one route, int64."""
    experts = local_experts(
        topk_ids, expert_map, num_tokens, route + tl.arange(0, 1), routes_total, ids_stride, first_token, known,
        EXPERTS, TOPK,
    )  # fmt: skip
    return tl.max(experts, 0).to(tl.int64)


@triton.jit
def _weights(w, w_scale, row, k, ROWS: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """From column k on, words of codes [rows, BLOCK_K / WORD], and the scale byte of each PIECE of them; zeros for rows
    from ROWS on, which there are if it is no multiple of BLOCK_N."""
    word = k // WORD + tl.arange(0, BLOCK_K // WORD)
    piece = k // PIECE + tl.arange(0, BLOCK_K // PIECE)
    words = w.to(tl.pointer_type(tl.int32)) + (row[:, None] * (K // WORD) + word[None, :])
    scales = w_scale + (row[:, None] * (K // BLOCK) + (piece // (BLOCK // PIECE))[None, :])
    if ROWS % BLOCK_N == 0 and K % BLOCK_K == 0:
        return tl.load(words), tl.load(scales).to(tl.int32)
    else:
        within = (row < ROWS)[:, None]
        return (
            tl.load(words, mask=within & (word < K // WORD)[None, :], other=0),
            tl.load(scales, mask=within & (piece < K // PIECE)[None, :], other=0).to(tl.int32),
        )


@triton.jit
def _activations(x, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A row from column k on, in blocks, [BLOCK_K / BLOCK, BLOCK], zeros beyond K."""
    index = k + tl.arange(0, BLOCK_K // BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return tl.load(x + index, mask=index < K if K % BLOCK_K else None, other=0 if K % BLOCK_K else None)


@triton.jit
def _rounded(x, MXFP8: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    """x [N, 32], blocks of any float type -> rounded to MXFP8, or else to bf16, fp32."""
    x = cast(x, tl.float32)
    if MXFP8:
        byte = scale_byte(block_amax(x), "rceil")
        result = decoded(encoded(x, byte[:, None], NATIVE_E4M3), NATIVE_E4M3) * factor(byte)[:, None]
    else:
        result = cast(cast(x, tl.bfloat16), tl.float32)
    return result


@triton.jit
def _products(words, byte, x, NATIVE: tl.constexpr):
    """Of words [rows, BLOCK_K / WORD] and x [BLOCK_K / BLOCK, BLOCK] fp32, the sum of each PIECE, [rows,
    BLOCK_K / PIECE]."""
    if NATIVE:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            _VALUES, "=f,=f,=f,=f,r", [words], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        w0, w1, w2, w3 = (
            decode(words & 0xFF), decode(words >> 8 & 0xFF), decode(words >> 16 & 0xFF), decode(words >> 24 & 0xFF)
        )  # fmt: skip
    value = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [rows, words, 2, 2]
    value = (
        tl.reshape(value, (words.shape[0], byte.shape[1], PIECE)) * tl.reshape(x, (byte.shape[1], PIECE))[None, :, :]
    )
    return tl.sum(value, axis=2) * factor(byte)


@triton.jit(**OF_ROUTES)
def gate_up_kernel(
    x, x_scale, w, w_scale, bias, inner, topk_ids, expert_map, num_tokens, topk_weights,
    x_stride: "i64", x_scale_stride: "i64", routes_total: "i32", ids_stride: "i64", first_token: "i64", known: "i64",
    weights_stride: "i64", alpha: "fp32", beta: "fp32", limit: "fp32",
    H: tl.constexpr, N: tl.constexpr, EXPERTS: tl.constexpr, TOPK: tl.constexpr, MXFP8: tl.constexpr,
    LIMITED: tl.constexpr, NATIVE_E4M3: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_N columns of a route: inner [R, N] fp32 = silu(gate) * up, for routes to a local expert.

    x [T, H], with x_scale [T, H/32] if it is MXFP8 already; w [E, 2 N, H] and w_scale [E, 2 N, H/32], row-major; bias
    [E, 2 N] or None; topk_weights: None unless they multiply gate and up.
    """
    take_over(OVERLAP)
    parts: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    route = tl.program_id(0) // parts
    n = tl.program_id(0) % parts * BLOCK_N
    expert = _local_expert(
        topk_ids, expert_map, num_tokens, route, routes_total, ids_stride, first_token, known, EXPERTS, TOPK
    )  # fmt: skip
    if expert >= 0:
        token = (route // TOPK).to(tl.int64)
        x += token * x_stride
        if x_scale is not None:
            x_scale += token * x_scale_stride
        w += expert * (2 * N * H)
        w_scale += expert * (2 * N * (H // BLOCK))
        position = tl.arange(0, 2 * BLOCK_N)
        # Gate rows, then up rows; those of columns from N on are none.
        row = tl.where(n + position % BLOCK_N < N, position // BLOCK_N * N + n + position % BLOCK_N, 2 * N)
        total = tl.zeros([2 * BLOCK_N, BLOCK_K // PIECE], tl.float32)
        words, byte = _weights(w, w_scale, row, 0, 2 * N, H, 2 * BLOCK_N, BLOCK_K)
        values = _activations(x, 0, H, BLOCK_K)
        for k in range(0, H, BLOCK_K):
            words_next, byte_next, values_next = words, byte, values
            if k + BLOCK_K < H:
                words_next, byte_next = _weights(w, w_scale, row, k + BLOCK_K, 2 * N, H, 2 * BLOCK_N, BLOCK_K)
                values_next = _activations(x, k + BLOCK_K, H, BLOCK_K)
            if x_scale is not None:
                block = k // BLOCK + tl.arange(0, BLOCK_K // BLOCK)
                x_byte = tl.load(x_scale + block, mask=block < H // BLOCK, other=0).to(tl.int32)
                operand = decoded(values, NATIVE_E4M3) * factor(x_byte)[:, None]
            else:
                operand = _rounded(values, MXFP8, NATIVE_E4M3)
            total += _products(words, byte, operand, NATIVE_E4M3)
            words, byte, values = words_next, byte_next, values_next
        result = tl.sum(total, axis=1)
        if bias is not None:
            result += tl.load(bias + expert * (2 * N) + row, mask=row < 2 * N, other=0).to(tl.float32)
        if topk_weights is not None:
            result *= tl.load(topk_weights + token * weights_stride).to(tl.float32)
        gate, up = tl.split(tl.trans(tl.reshape(result, (2, BLOCK_N))))
        column = n + tl.arange(0, BLOCK_N)
        tl.store(
            inner + route.to(tl.int64) * N + column, swiglu(gate, up, alpha, beta, limit, LIMITED), mask=column < N
        )


@triton.jit(**OF_TOKENS)
def down_kernel(
    inner, w, w_scale, bias, out, topk_ids, expert_map, num_tokens, topk_weights,
    routes_total: "i32", ids_stride: "i64", first_token: "i64", known: "i64", weights_stride: "i64", out_stride: "i64",
    H: tl.constexpr, N: tl.constexpr, EXPERTS: tl.constexpr, TOPK: tl.constexpr, MXFP8: tl.constexpr,
    WEIGHTED: tl.constexpr, NATIVE_E4M3: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_N columns of a token: out [T, H] = the sum over its local experts, in the order of k, of
    routing weight (WEIGHTED) times what w [E, H, N], w_scale [E, H, N/32] and bias [E, H] or None make of
    inner [R, N]."""
    parts: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    pieces: tl.constexpr = (N + BLOCK_K - 1) // BLOCK_K
    token = tl.program_id(0) // parts
    row = tl.program_id(0) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    first = token * TOPK
    expert = _local_expert(
        topk_ids, expert_map, num_tokens, first, routes_total, ids_stride, first_token, known, EXPERTS, TOPK
    )  # fmt: skip
    # Read again even where it is the same: of two names for one value, Triton (seen in 3.6) carries one through a loop.
    following = _local_expert(
        topk_ids, expert_map, num_tokens, first + (1 // pieces if TOPK > 1 else 0), routes_total, ids_stride,
        first_token, known, EXPERTS, TOPK,
    )  # fmt: skip
    total = tl.zeros([BLOCK_N, BLOCK_K // PIECE], tl.float32)
    biases = tl.zeros([BLOCK_N], tl.float32)
    at = tl.maximum(expert, 0)  # weights that nobody asked for, of a route that goes nowhere
    words, byte = _weights(w + at * (H * N), w_scale + at * (H * (N // BLOCK)), row, 0, H, N, BLOCK_N, BLOCK_K)
    if OVERLAP:
        wait_for_launch_before()  # later, in the loop's first trip, it takes longer
    inner += first.to(tl.int64) * N
    values = _activations(inner, 0, N, BLOCK_K)  # of a route that goes nowhere: what was there, and not used
    for i in range(TOPK * pieces):
        # What comes two pieces later, and the weights of the next one, are under way during this one.
        after = _local_expert(
            topk_ids, expert_map, num_tokens, first + tl.minimum((i + 2) // pieces, TOPK - 1), routes_total, ids_stride,
            first_token, known, EXPERTS, TOPK,
        )  # fmt: skip
        words_next, byte_next, values_next = words, byte, values
        if (i + 1 < TOPK * pieces) & (following >= 0):
            words_next, byte_next = _weights(
                w + following * (H * N), w_scale + following * (H * (N // BLOCK)), row, (i + 1) % pieces * BLOCK_K,
                H, N, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            values_next = _activations(inner + (i + 1) // pieces * N, (i + 1) % pieces * BLOCK_K, N, BLOCK_K)
        if expert >= 0:
            operand = _rounded(values, MXFP8, NATIVE_E4M3)
            products = _products(words, byte, operand, NATIVE_E4M3)
            weight = 1.0
            if WEIGHTED:
                weight = tl.load(topk_weights + token.to(tl.int64) * weights_stride + i // pieces).to(tl.float32)
            total += products * weight
            if bias is not None:
                if i % pieces == 0:
                    terms = tl.load(bias + expert * H + row, mask=row < H, other=0).to(tl.float32)
                    biases += terms * weight
        words, byte, values = words_next, byte_next, values_next
        expert = following
        following = after
    result = tl.sum(total, axis=1) + biases
    tl.store(out + token.to(tl.int64) * out_stride + row, cast(result, out.dtype.element_ty), mask=row < H)
