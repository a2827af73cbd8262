"""``fused_moe`` as a list of kernel launches: route, dispatch, two products, combine."""

import ctypes
import math

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import configs
from ...arguments import FusedMoe
from ...configs import Gemm, Tiles
from ...formats import BLOCK, as_bytes
from ...layouts import LAYOUTS
from .gemm import grouped_gemm_kernel
from .launch import Launch
from .memory import order
from .routing import combine_kernel, dispatch_kernel, route_kernel
from .targets import Target

WORKSPACE = 1 << 30
"""Bytes of intermediates, about, beyond which a call takes its tokens in parts."""

FEW_ROUTES = 1024
ROUTES_PER_STEP = 4096
BLOCKS_PER_PROGRAM = 32
COLUMNS_PER_PROGRAM = 1024


def _fp32(value: float) -> float:
    """Rounded to fp32; infinite beyond its range."""
    return ctypes.c_float(value).value


def tiles_bound(routes: int, experts: int, block_m: int) -> int:
    """The most tiles of ``block_m`` slots that ``routes`` can need, wherever they go."""
    return min(routes, (routes + experts * (block_m - 1)) // block_m)


class _Part:
    """The launches for tokens ``first`` to ``first + tokens`` of a call, and the memory between them."""

    def __init__(self, call: FusedMoe, target: Target, tiles: Tiles, first: int, tokens: int):
        self.call, self.target, self.tiles = call, target, tiles
        self.first, self.tokens = first, tokens
        self.routes = tokens * call.topk
        self.scaled = target.scaled and call.activation_dtype == "mxfp8"
        self.tiles_bound = tiles_bound(self.routes, call.experts, tiles.block_m)
        self.weight_on_input = call.apply_router_weight_on_input

        row_dtype = torch.uint8 if self.scaled else target.operand
        term_dtype = torch.float32 if call.result_dtype is torch.float32 else torch.bfloat16
        shape = (self.routes, call.hidden)
        # Rows are dead when terms are written: one buffer holds both.
        shared = self._empty(self.routes * call.hidden * max(row_dtype.itemsize, term_dtype.itemsize), torch.uint8)
        self.rows, self.terms = (
            shared[: self.routes * call.hidden * dtype.itemsize].view(dtype).view(shape)
            for dtype in (row_dtype, term_dtype)
        )
        self.inner = self._empty((self.routes, call.intermediate), row_dtype)
        self.rows_scale = self.inner_scale = None
        if self.scaled:
            self.rows_scale = self._empty((self.routes, call.hidden // BLOCK), torch.uint8)
            self.inner_scale = self._empty((self.routes, call.intermediate // BLOCK), torch.uint8)
        self.slots, self.sorted_routes = self._empty((2, self.routes), torch.int32)
        self.offsets = self._empty(call.experts + 1, torch.int32)
        self.tile_list = self._empty((self.tiles_bound, 2), torch.int32)

    def _empty(self, shape, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.call.device)

    def _of(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """This part's tokens of x [T, ...]."""
        return None if x is None else x[self.first : self.first + self.tokens]

    def launches(self) -> list[Launch]:
        call = self.call
        return [
            self._route(),
            self._dispatch(),
            self._gemm(self.tiles.gemm1, self.rows, self.rows_scale, call.w1, call.w1_scale, call.w1_bias, True),
            self._gemm(self.tiles.gemm2, self.inner, self.inner_scale, call.w2, call.w2_scale, call.w2_bias, False),
            self._combine(),
        ]

    def _route(self) -> Launch:
        call = self.call
        ids = self._of(call.topk_ids)
        return Launch(
            route_kernel,
            (call.experts,),
            dict(
                topk_ids=ids, expert_map=call.expert_map, num_tokens=call.num_tokens, slots=self.slots,
                routes=self.sorted_routes, offsets=self.offsets, routes_total=self.routes, ids_stride=ids.stride(0),
                first_token=self.first, known=call.global_experts,
                EXPERTS=call.experts, TOPK=call.topk, N=FEW_ROUTES if self.routes <= FEW_ROUTES else ROUTES_PER_STEP,
            ),
            dict(num_warps=8),
        )  # fmt: skip

    def _dispatch(self) -> Launch:
        call = self.call
        x, x_scale = self._of(call.hidden_states), self._of(call.hidden_states_scale)
        if x_scale is not None:
            x, x_scale = x.view(torch.uint8), as_bytes(x_scale)
        parts = triton.cdiv(call.hidden // BLOCK, BLOCKS_PER_PROGRAM)
        return Launch(
            dispatch_kernel,
            (call.experts + self.tokens * parts,),
            dict(
                x=x, x_scale=x_scale, slots=self.slots, offsets=self.offsets, rows=self.rows,
                rows_scale=self.rows_scale, tiles=self.tile_list, x_stride=x.stride(0),
                x_scale_stride=0 if x_scale is None else x_scale.stride(0), tiles_bound=self.tiles_bound, H=call.hidden,
                EXPERTS=call.experts, EXPERTS_POW2=triton.next_power_of_2(call.experts), TOPK=call.topk,
                BLOCK_M=self.tiles.block_m, MXFP8=call.activation_dtype == "mxfp8", N=BLOCKS_PER_PROGRAM,
            ),
        )  # fmt: skip

    def _gemm(self, tile: Gemm, x, x_scale, w, w_scale, bias, gate_up: bool) -> Launch:
        call, layout = self.call, LAYOUTS[self.call.layout]
        experts, rows, columns = w.shape
        n = rows // 2 if gate_up else rows
        block_k = min(tile.block_k, triton.next_power_of_2(columns))
        out, out_scale = (self.inner, self.inner_scale) if gate_up else (self.terms, None)
        w = w.view(torch.uint8)
        descriptors = tile.descriptors and self.target.descriptors and call.layout == "row_major" and not self.scaled
        descriptors = descriptors and w.data_ptr() % 16 == 0
        if descriptors:
            x_operand = TensorDescriptor(x, list(x.shape), list(x.stride()), [self.tiles.block_m, block_k])
            halves = rows // n
            w_operand = TensorDescriptor(
                w, [experts, halves, n, columns], [rows * columns, n * columns, columns, 1],
                [1, halves, tile.block_n, block_k],
            )  # fmt: skip
        else:
            x_operand, w_operand = x, w
        weights = self._of(call.topk_weights) if gate_up and self.weight_on_input else None
        limit = math.inf if call.swiglu_limit is None else _fp32(call.swiglu_limit)
        scale_shape = (experts, rows, layout.padded_scale_columns(columns))
        return Launch(
            grouped_gemm_kernel,
            (self.tiles_bound * triton.cdiv(n, tile.block_n),),
            dict(
                x=x_operand, x_scale=x_scale, w=w_operand, w_scale=as_bytes(w_scale), bias=bias, out=out,
                out_scale=out_scale, tiles=self.tile_list, offsets=self.offsets, routes=self.sorted_routes,
                topk_weights=weights, weights_stride=0 if weights is None else weights.stride(0),
                alpha=_fp32(call.swiglu_alpha), beta=_fp32(call.swiglu_beta), limit=limit, K=columns, N=n,
                **order("", layout.weight[gate_up], (experts, rows, columns)),
                **order("SCALE_", layout.scale[gate_up], scale_shape),
                GATE_UP=gate_up, MXFP8=call.activation_dtype == "mxfp8", LIMITED=math.isfinite(limit),
                SCALED=self.scaled, NATIVE_E4M3=self.target.native_e4m3, WGMMA=self.target.wgmma,
                DESCRIPTORS=descriptors,
                BLOCK_M=self.tiles.block_m, BLOCK_N=tile.block_n, BLOCK_K=block_k,
            ),
            dict(num_warps=tile.num_warps, num_stages=tile.num_stages, **tile.options),
        )  # fmt: skip

    def _combine(self) -> Launch:
        call, out, weights = self.call, self._of(self.call.out), self._of(self.call.topk_weights)
        return Launch(
            combine_kernel,
            (self.tokens * triton.cdiv(call.hidden, COLUMNS_PER_PROGRAM),),
            dict(
                terms=self.terms, slots=self.slots, topk_weights=weights, out=out, weights_stride=weights.stride(0),
                out_stride=out.stride(0), H=call.hidden, TOPK=call.topk, WEIGHTED=not self.weight_on_input,
                N=COLUMNS_PER_PROGRAM,
            ),
        )  # fmt: skip


def plan(call: FusedMoe, target: Target, tiles: Tiles | None = None):
    """Yields, for each part of the tokens of ``call``, the launches that compute it, in order."""
    if call.tokens == 0:
        return
    if tiles is None:
        tiles = configs.choose(
            target.arch, tokens=call.tokens, hidden=call.hidden, intermediate=call.intermediate,
            experts=max(call.experts, call.global_experts),
            topk=call.topk,
        )  # fmt: skip
    size = 4 if torch.float32 in (call.result_dtype, target.operand) else 2
    token_bytes = call.topk * (size * call.hidden + 2 * call.intermediate)
    step = max(1, WORKSPACE // token_bytes)
    for first in range(0, call.tokens, step):
        yield _Part(call, target, tiles, first, min(step, call.tokens - first)).launches()
