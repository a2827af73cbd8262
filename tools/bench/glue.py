"""What a peer that brings only grouped products needs around them: the routes sorted into blocks, SwiGLU, the sum.

These are not part of torch_mxfp8moe. They do what vLLM's kernels do around Humming, in Triton, and are timed by
themselves as well, so that nobody's products are judged by them.
"""

import torch
import triton
import triton.language as tl

AT_ONCE = 1024
"""Routes that one program sorts by itself; more take three launches."""


@triton.jit
def _local(topk_ids, expert_map, route, within, EXPERTS: tl.constexpr):
    """The local expert of each route, EXPERTS where there is none."""
    expert = tl.load(topk_ids + route, mask=within, other=-1).to(tl.int32)
    valid = within & (expert >= 0)
    if expert_map is not None:
        expert = tl.load(expert_map + expert, mask=valid, other=-1)
        valid &= expert >= 0
    return tl.where(valid, expert, EXPERTS)


@triton.jit
def _lay_out(
    count, sorted_routes, block_experts, padded_total, cursor, routes_total, blocks_bound,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """From the routes of each expert, count [BINS]: where its slots begin (to ``cursor``), the expert of each block,
    the padding of its last block, the sum."""
    expert = tl.arange(0, BINS)
    count = tl.where(expert < EXPERTS, count, 0)
    padded = (count + BLOCK - 1) // BLOCK * BLOCK
    end = tl.cumsum(padded, 0)
    start = end - padded
    tl.store(cursor + expert, start, mask=expert < EXPERTS)
    tl.store(padded_total, tl.sum(padded))
    lane = tl.arange(0, 64)
    for first in range(0, blocks_bound, 64):
        block = first + lane
        owner = tl.sum((end[:, None] <= (block * BLOCK)[None, :]).to(tl.int32), 0)
        tl.store(block_experts + block, tl.minimum(owner, EXPERTS - 1), mask=block < blocks_bound)
    step = tl.arange(0, 8)
    for first in range(0, BLOCK, 8):
        slot = (start + count)[:, None] + first + step[None, :]
        tl.store(sorted_routes + slot, tl.zeros_like(slot) + routes_total, mask=slot < end[:, None])


@triton.jit
def align_few_kernel(
    topk_ids, expert_map, sorted_routes, block_experts, padded_total, cursor, routes_total, blocks_bound,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr, BINS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """All of the sorting in one program of N routes."""
    route = tl.arange(0, N)
    expert = _local(topk_ids, expert_map, route, route < routes_total, EXPERTS)
    _lay_out(
        tl.histogram(expert, BINS), sorted_routes, block_experts, padded_total, cursor, routes_total, blocks_bound,
        BLOCK, EXPERTS, BINS,
    )  # fmt: skip
    tl.debug_barrier()  # the cursors are written
    slot = tl.atomic_add(cursor + expert, 1, mask=expert < EXPERTS)
    tl.store(sorted_routes + slot, route, mask=expert < EXPERTS)


@triton.jit
def count_kernel(topk_ids, expert_map, counts, routes_total, EXPERTS: tl.constexpr, N: tl.constexpr):
    route = tl.program_id(0) * N + tl.arange(0, N)
    expert = _local(topk_ids, expert_map, route, route < routes_total, EXPERTS)
    tl.atomic_add(counts + expert, 1, mask=expert < EXPERTS)


@triton.jit
def lay_out_kernel(
    counts, sorted_routes, block_experts, padded_total, cursor, routes_total, blocks_bound,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """One program. Leaves ``counts`` zero for the next call."""
    expert = tl.arange(0, BINS)
    count = tl.load(counts + expert, mask=expert < EXPERTS, other=0)
    tl.store(counts + expert, tl.zeros_like(count), mask=expert < EXPERTS)
    _lay_out(
        count, sorted_routes, block_experts, padded_total, cursor, routes_total, blocks_bound, BLOCK, EXPERTS, BINS
    )


@triton.jit
def scatter_kernel(topk_ids, expert_map, sorted_routes, cursor, routes_total, EXPERTS: tl.constexpr, N: tl.constexpr):
    route = tl.program_id(0) * N + tl.arange(0, N)
    expert = _local(topk_ids, expert_map, route, route < routes_total, EXPERTS)
    slot = tl.atomic_add(cursor + expert, 1, mask=expert < EXPERTS)
    tl.store(sorted_routes + slot, route, mask=expert < EXPERTS)


class Align:
    """Routes sorted by expert, each expert's padded to blocks of ``block``: what vLLM's moe_align_block_size gives.

    topk_ids [T, K] int32, contiguous, and expert_map [G] int32 or None are read in each run. ``sorted_routes`` [slots]
    int32: token * K + k, or T * K for padding; ``block_experts`` [blocks] int32; ``padded_total`` [1] int32: slots in
    use. Routes to no local expert get no slot.
    """

    def __init__(self, topk_ids: torch.Tensor, expert_map: torch.Tensor | None, experts: int, block: int):
        self.topk_ids, self.expert_map, self.experts, self.block = topk_ids, expert_map, experts, block
        routes = topk_ids.numel()
        slots = min(routes + experts * (block - 1), routes * block)
        self.blocks_bound = -(-slots // block)
        make = lambda size: torch.zeros(size, dtype=torch.int32, device=topk_ids.device)
        self.sorted_routes, self.block_experts = make(self.blocks_bound * block), make(self.blocks_bound)
        self.padded_total, self.cursor, self.counts = make(1), make(experts), make(experts)

    def __call__(self) -> None:
        routes, bins = self.topk_ids.numel(), triton.next_power_of_2(self.experts + 1)
        out = (self.sorted_routes, self.block_experts, self.padded_total, self.cursor, routes, self.blocks_bound)
        sizes = dict(BLOCK=self.block, EXPERTS=self.experts, BINS=bins)
        if routes <= AT_ONCE:
            N = max(32, triton.next_power_of_2(routes))
            align_few_kernel[(1,)](self.topk_ids, self.expert_map, *out, **sizes, N=N, num_warps=8)
            return
        grid, ids = (triton.cdiv(routes, 256),), (self.topk_ids, self.expert_map)
        count_kernel[grid](*ids, self.counts, routes, EXPERTS=self.experts, N=256)
        lay_out_kernel[(1,)](self.counts, *out, **sizes, num_warps=8)
        scatter_kernel[grid](*ids, self.sorted_routes, self.cursor, routes, EXPERTS=self.experts, N=256)


@triton.jit
def swiglu_kernel(
    x, out, rows, alpha, beta, limit, I: tl.constexpr, LIMITED: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr
):
    """x [rows, 2I] -> out [rows, I]: gate * sigmoid(alpha * gate) * (up + beta), both clamped if LIMITED."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * N + tl.arange(0, N)
    within = (row < rows)[:, None] & (column < I)[None, :]
    at = x + row[:, None] * (2 * I) + column[None, :]
    gate = tl.load(at, mask=within, other=0.0).to(tl.float32)
    up = tl.load(at + I, mask=within, other=0.0).to(tl.float32)
    if LIMITED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    value = gate / (1.0 + tl.exp(-alpha * gate)) * (up + beta)
    tl.store(out + row[:, None] * I + column[None, :], value.to(out.dtype.element_ty), mask=within)


def swiglu(x: torch.Tensor, out: torch.Tensor, alpha: float, beta: float, limit: float | None) -> None:
    rows, I = out.shape
    N = min(1024, triton.next_power_of_2(I))
    ROWS = max(1, min(2048 // N, rows // 512))  # more rows a program only where there are enough programs
    ROWS = 1 << (ROWS.bit_length() - 1)
    swiglu_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(I, N))](
        x, out, rows, alpha, beta, limit or 0.0, I=I, LIMITED=limit is not None, ROWS=ROWS, N=N
    )


@triton.jit
def weighted_sum_kernel(
    terms, topk_ids, expert_map, topk_weights, out,
    H: tl.constexpr, TOPK: tl.constexpr, EXPERTS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    for k in tl.static_range(TOPK):
        route = token * TOPK + k
        expert = _local(topk_ids, expert_map, route, route >= 0, EXPERTS)
        if expert < EXPERTS:
            term = tl.load(terms + route * H + column, mask=column < H, other=0.0).to(tl.float32)
            total += term * tl.load(topk_weights + route).to(tl.float32)
    tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=column < H)


def weighted_sum(
    terms: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None, topk_weights: torch.Tensor,
    out: torch.Tensor, experts: int,
) -> None:  # fmt: skip
    """out [T, H] = the sum over k of topk_weights [T, K] * terms [T * K, H], of routes to local experts."""
    (T, H), N = out.shape, 1024
    weighted_sum_kernel[(T, triton.cdiv(H, N))](
        terms, topk_ids, expert_map, topk_weights, out, H=H, TOPK=topk_ids.shape[1], EXPERTS=experts, N=N
    )
