""":func:`.routes.routes` as one small Triton kernel: nothing is read on the host, under graph capture either."""

import torch
import triton
import triton.language as tl

from ...arguments import FusedMoe
from ..triton.launch import Launch, Operand, Plan
from ..triton.routing import local_experts

PAIRS_PER_PROGRAM = 2048
"""Pairs of routes of one token that a program compares."""


@triton.jit(
    do_not_specialize=["tokens", "ids_stride", "weights_stride", "known"],
    do_not_specialize_on_alignment=["topk_ids", "topk_weights", "expert_map", "num_tokens"],
)
def routes_kernel(
    topk_ids, topk_weights, expert_map, num_tokens, ids, weights, mask,
    tokens: "i32", ids_stride: "i64", weights_stride: "i64", known: "i64",
    EXPERTS: tl.constexpr, EXPERTS_POW2: tl.constexpr, TOPK: tl.constexpr, SLOTS_POW2: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """N tokens a program; the first one writes the mask [E + 1] as well, which is then never stale."""
    if tl.program_id(0) == 0:
        expert = tl.arange(0, EXPERTS_POW2)
        tl.store(mask + expert, (expert < EXPERTS).to(tl.int32), mask=expert <= EXPERTS)
    token = tl.program_id(0) * N + tl.arange(0, N)
    k = tl.arange(0, SLOTS_POW2)
    there = (token < tokens)[:, None] & (k < TOPK)[None, :]
    route = tl.where(there, token[:, None] * TOPK + k[None, :], tokens * TOPK)
    local = local_experts(
        topk_ids, expert_map, num_tokens, route, tokens * TOPK, ids_stride, 0, known, EXPERTS, TOPK
    )  # fmt: skip
    row = token.to(tl.int64)[:, None]
    weight = tl.load(topk_weights + row * weights_stride + k[None, :], mask=there, other=0.0).to(tl.float32)
    same = local[:, :, None] == local[:, None, :]
    total = tl.sum(tl.where(same, weight[:, None, :], 0.0), 2)
    earlier = same & (k[None, None, :] < k[None, :, None])
    live = (local >= 0) & (tl.sum(earlier.to(tl.int32), 2) == 0) & (total != 0)
    to = row * (TOPK + 1) + k[None, :]
    within = (token < tokens)[:, None] & (k <= TOPK)[None, :]
    tl.store(ids + to, tl.where(live, local, EXPERTS), mask=within)
    tl.store(weights + to, tl.where(live, total, 0.0), mask=within)


def plan(call: FusedMoe) -> Plan:
    """What writes ``ids``, ``weights`` and ``mask`` for ``call`` and all calls of the same kind."""

    def given(name: str) -> Operand | None:
        tensor = getattr(call, name)
        return None if tensor is None else Operand(name, tensor.dtype)

    slots = triton.next_power_of_2(call.topk + 1)
    tokens = max(1, PAIRS_PER_PROGRAM // slots**2)
    arguments = dict(
        topk_ids=given("topk_ids"), topk_weights=given("topk_weights"), expert_map=given("expert_map"),
        num_tokens=given("num_tokens"), ids=Operand("ids", torch.int32), weights=Operand("weights", torch.float32),
        mask=Operand("mask", torch.int32), tokens=call.tokens, ids_stride=call.topk_ids.stride(0),
        weights_stride=call.topk_weights.stride(0), known=call.global_experts, EXPERTS=call.experts,
        EXPERTS_POW2=triton.next_power_of_2(call.experts + 1), TOPK=call.topk, SLOTS_POW2=slots, N=tokens,
    )  # fmt: skip
    options = dict(num_warps=4 if tokens > 1 else 16)  # one token alone has up to 8 times as many pairs
    return Plan([Launch(routes_kernel, (triton.cdiv(call.tokens, tokens),), arguments, options)])
