"""``fused_moe`` as a list of kernel launches: route, dispatch, two products, combine; of a few tokens, two products."""

import math
from dataclasses import replace
from functools import partial

import torch
import triton

from ... import configs
from ...arguments import FusedMoe
from ...configs import Config, Gemm, Tiles
from ...formats import BLOCK, rounded_to_fp32
from ...layouts import LAYOUTS
from .gemm import grouped_gemm_kernel
from .launch import ALIGNMENT, BUFFER_OFFSETS_WRAP, STAGES_SPILL, WORKSPACE, Descriptor, Launch, Operand, Plan
from .matvec import down_kernel, gate_up_kernel
from .memory import order
from .routing import (
    combine_kernel, count_kernel, count_round_kernel, dispatch_kernel, place_kernel, route_kernel, route_round_kernel,
    sum_kernel,
)  # fmt: skip
from .targets import HIP_ARCHITECTURES, Target, multiprocessors

LARGEST_WORKSPACE = 1 << 30
"""Bytes of intermediates, about, beyond which a call takes its tokens in parts."""

FEW_ROUTES = 512
"""Whose slots each program of the dispatch kernel finds by itself."""

MANY_ROUTES = 4096
"""More of them get their slots in parts of ROUTES_PER_PART, whose counts are summed PARTS_PER_STEP at a time."""

ROUTES_PER_PART = 64
PARTS_PER_STEP = 512

ROUTES_PER_STEP = 1024, 4096
"""Of the kernel that finds the slots of all others: the first if these are all."""

BESIDE_ROUNDING = 1024, 2048
"""Likewise of the kernel that rounds rows as well, whose routes are the second at most; more take registers that those
who round have then too few of, and are MANY_ROUTES to it."""

BLOCKS_PER_PROGRAM = 32
COLUMNS_PER_PROGRAM = 1024


def tiles_bound(routes: int, experts: int, block_m: int) -> int:
    """The most tiles of ``block_m`` slots that ``routes`` can need, wherever they go."""
    return min(routes, (routes + experts * (block_m - 1)) // block_m)


def _fitted(tile: Gemm, columns: int) -> Gemm:
    """A warp-specialized kernel's tile for weights of that many columns, in as much shared memory."""
    if tile.turns == 2 and tile.programs == 1 and tile.num_stages >= 4 and columns % 128:
        # Every other row begins in the middle of a line of L2, which takes turns 3 to 11 % longer than two programs.
        tile = replace(tile, turns=1, programs=2, num_stages=tile.num_stages // 2)
    if tile.block_k == 256 and tile.turns == 1 and 8 * (-columns % 256 - -columns % 128) > columns:
        # The half of the last stage that would be empty is more than an eighth of the columns. Smaller stages take
        # about as much memory when they are more.
        tile = replace(tile, block_k=128, num_stages=(3 * tile.num_stages + 1) // 2)
    return tile


class _Part:
    """The launches for tokens ``first`` to ``first + tokens`` of a call, and the memory between them."""

    def __init__(self, call: FusedMoe, target: Target, tiles: Tiles, first: int, tokens: int):
        self.call, self.target, self.tiles = call, target, tiles
        self.first, self.tokens = first, tokens
        self.routes = tokens * call.topk
        self.weight_on_input = call.apply_router_weight_on_input
        self.workspace = 0

    def launches(self) -> list[Launch]:
        raise NotImplementedError

    def overlapping(self) -> list[Launch]:
        """:meth:`launches`, each but the first of which starts while the one before ends, where they can."""
        overlaps = self.target.overlaps
        return [
            replace(launch, arguments=launch.arguments | dict(OVERLAP=overlaps), dependent=overlaps and i > 0)
            for i, launch in enumerate(self.launches())
        ]

    def _scratch(self, dtype: torch.dtype, *shape: int) -> Operand:
        """The next piece of the workspace."""
        operand = Operand(WORKSPACE, dtype, shape=shape, offset=self.workspace)
        self.workspace += -(-operand.bytes // ALIGNMENT) * ALIGNMENT
        return operand

    def _given(self, name: str, by_token: bool = False, codes: bool = False) -> Operand:
        """A tensor of the call; ``by_token``: this part's tokens of it; ``codes``: as bytes."""
        dtype = torch.uint8 if codes else getattr(self.call, name).dtype
        return Operand(name, dtype, (self.first, self.tokens) if by_token else None)

    def _if_given(self, name: str, **how: bool) -> Operand | None:
        """:meth:`_given`, or None for a tensor that the call does not have."""
        return None if getattr(self.call, name) is None else self._given(name, **how)

    def _hidden_states(self) -> dict:
        """What a kernel is told of the activations."""
        call, scale = self.call, self.call.hidden_states_scale
        return dict(
            x=self._given("hidden_states", by_token=True, codes=scale is not None),
            x_scale=self._if_given("hidden_states_scale", by_token=True, codes=True),
            x_stride=call.hidden_states.stride(0), x_scale_stride=0 if scale is None else scale.stride(0),
        )  # fmt: skip

    def _routing(self) -> dict:
        """What a kernel is told of where tokens go."""
        call = self.call
        return dict(
            topk_ids=self._given("topk_ids", by_token=True), expert_map=self._if_given("expert_map"),
            num_tokens=self._if_given("num_tokens"), routes_total=self.routes, ids_stride=call.topk_ids.stride(0),
            first_token=self.first, known=call.global_experts, EXPERTS=call.experts, TOPK=call.topk,
        )  # fmt: skip

    def _swiglu(self) -> dict:
        """What a kernel is told of the activation function and the rounding after it."""
        call = self.call
        limit = math.inf if call.swiglu_limit is None else rounded_to_fp32(call.swiglu_limit)
        return dict(
            alpha=rounded_to_fp32(call.swiglu_alpha), beta=rounded_to_fp32(call.swiglu_beta), limit=limit,
            LIMITED=math.isfinite(limit),
        )  # fmt: skip

    def _weight(self, on: bool) -> dict:
        """The routing weights, if they are ``on``."""
        return dict(
            topk_weights=self._given("topk_weights", by_token=True) if on else None,
            weights_stride=self.call.topk_weights.stride(0) if on else 0,
        )

    def _weights(self, name: str) -> dict:
        """The experts' weight of that name, with its scales and biases."""
        return dict(
            w=self._given(name, codes=True), w_scale=self._given(f"{name}_scale", codes=True),
            bias=self._if_given(f"{name}_bias"),
        )  # fmt: skip


class _RouteByRoute(_Part):
    """With the kernels of :mod:`.matvec`, or of :mod:`.matvec_mma`."""

    def launches(self) -> list[Launch]:
        call, up, down = self.call, self.tiles.gemm1, self.tiles.gemm2
        assert call.out is not None
        inner = self._scratch(torch.float32, self.routes, call.intermediate)
        common = self._routing() | dict(
            inner=inner, H=call.hidden, N=call.intermediate, MXFP8=call.activation_dtype == "mxfp8"
        )
        return [
            self._product(
                up, gate_up_kernel, self.routes, call.intermediate,
                common | self._hidden_states() | self._weights("w1") | self._swiglu()
                | self._weight(self.weight_on_input),
            ),
            self._product(
                down, down_kernel, self.tokens, call.hidden,
                common | self._weights("w2") | self._weight(True)
                | dict(
                    out=self._given("out", by_token=True), out_stride=call.out.stride(0),
                    WEIGHTED=not self.weight_on_input,
                ),
            ),
        ]  # fmt: skip

    def _product(self, tile: Gemm, kernel, count: int, columns: int, arguments: dict) -> Launch:
        """``count`` times so many columns, by a kernel of :mod:`.matvec` or its counterpart on the matrix unit."""
        options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages, **tile.options)
        if tile.mma:
            from .matvec_mma import down_mma_kernel, gate_up_mma_kernel

            kernel = gate_up_mma_kernel if kernel is gate_up_kernel else down_mma_kernel
        else:
            arguments |= dict(NATIVE_E4M3=self.target.native_e4m3, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k)
        return Launch(kernel, (count * triton.cdiv(columns, tile.block_n),), arguments, options)


class _Sorted(_Part):
    """With routes sorted by expert, for matrix units."""

    def __init__(self, call: FusedMoe, target: Target, tiles: Tiles, first: int, tokens: int):
        super().__init__(call, target, tiles, first, tokens)
        self.few = self.routes <= FEW_ROUTES and target.arch not in HIP_ARCHITECTURES
        """Whether no kernel before the dispatch kernel gives routes their slots."""
        self.scaled = target.scaled and call.activation_dtype == "mxfp8"
        self.tiles_bound = tiles_bound(self.routes, call.experts, tiles.block_m)
        self.specialized = tiles.kernels == "hopper"
        """Whether the products are those of :mod:`.hopper`."""

        row_dtype = torch.uint8 if self.scaled else target.operand
        term_dtype = torch.float32 if call.result_dtype is torch.float32 else torch.bfloat16
        # Rows are dead when terms are written: one piece of memory holds both.
        start = self.workspace
        self.rows = self._scratch(row_dtype, self.tokens if tiles.gather else self.routes, call.hidden)
        after_rows, self.workspace = self.workspace, start
        self.terms = self._scratch(term_dtype, self.routes, call.hidden)
        self.workspace = max(self.workspace, after_rows)
        columns = call.intermediate
        if self.specialized:
            from .hopper import whole_steps

            columns = whole_steps(columns)
        self.inner = self._scratch(row_dtype, self.routes, columns)
        self.rows_scale = self.inner_scale = None
        if self.scaled:
            self.rows_scale = self._scratch(torch.uint8, self.routes, call.hidden // BLOCK)
            self.inner_scale = self._scratch(torch.uint8, self.routes, call.intermediate // BLOCK)
        self.slots = self._scratch(torch.int32, self.routes)
        self.sorted_routes = self._scratch(torch.int32, self.routes)
        self.offsets = self._scratch(torch.int32, call.experts + 1)
        self.tile_list = self._scratch(torch.int32, self.tiles_bound, 2)
        self.counters = self._scratch(torch.int32, 2, 2) if self.specialized else None
        self.experts_pow2 = triton.next_power_of_2(call.experts)

    def launches(self) -> list[Launch]:
        gemm = self._specialized_gemm if self.specialized else self._gemm
        return [
            *(self._route_and_round() if self.tiles.gather else [*self._route(), self._dispatch()]),
            gemm(self.tiles.gemm1, self.rows, self.rows_scale, "w1", True),
            gemm(self.tiles.gemm2, self.inner, self.inner_scale, "w2", False),
            self._combine(),
        ]

    @property
    def _places(self) -> dict:
        """What is written of where routes go."""
        return dict(slots=self.slots, routes=self.sorted_routes, offsets=self.offsets)

    def _listing(self) -> dict:
        """What a kernel is told that lists tiles."""
        return dict(tiles=self.tile_list, tiles_bound=self.tiles_bound, BLOCK_M=self.tiles.block_m)

    def _route(self) -> list[Launch]:
        options = dict(num_warps=8)
        if self.few:
            return []
        if self.routes <= MANY_ROUTES:
            step = ROUTES_PER_STEP[self.routes > ROUTES_PER_STEP[0]]
            arguments = self._routing() | self._places | dict(N=step)
            return [Launch(route_kernel, (self.call.experts,), arguments, options)]
        counts = self._counts()
        arguments = self._routing() | dict(counts=counts, EXPERTS_POW2=self.experts_pow2, N=ROUTES_PER_PART)
        return [Launch(count_kernel, counts.shape[:1], arguments, options), *self._from_counts(counts)]

    def _counts(self) -> Operand:
        """How many routes of each part reach each expert."""
        return self._scratch(torch.int32, triton.cdiv(self.routes, ROUTES_PER_PART), self.experts_pow2)

    def _from_counts(self, counts: Operand, **tiles) -> list[Launch]:
        """The launches that give slots, from the counts of each part of the routes; and list ``tiles``."""
        parts, columns = counts.shape[0], min(4, self.experts_pow2)
        before = self._scratch(torch.int32, parts + 1, self.experts_pow2)
        sizes = dict(EXPERTS_POW2=self.experts_pow2)
        options = dict(num_warps=8)
        return [
            Launch(
                sum_kernel,
                (self.experts_pow2 // columns,),
                sizes | dict(counts=counts, before=before, parts=parts, ROWS=PARTS_PER_STEP, COLUMNS=columns),
                options,
            ),
            Launch(
                place_kernel,
                (parts,),
                self._routing() | sizes | self._places | dict(tiles=None, tiles_bound=0, BLOCK_M=0) | tiles
                | dict(before=before, N=ROUTES_PER_PART),
                options,
            ),
        ]  # fmt: skip

    def _route_and_round(self) -> list[Launch]:
        """Where rounded rows are not copied to slots."""
        experts, programs = self.call.experts, self._programs_that_round
        both = self._routing() | self._rounding() | dict(rows=self.rows, EXPERTS_POW2=self.experts_pow2)
        few, most = BESIDE_ROUNDING
        if self.routes <= most:
            arguments = both | self._places | self._listing()
            arguments |= dict(counters=self.counters, ROUTES=few if self.routes <= few else most)
            return [Launch(route_round_kernel, (experts + programs,), arguments)]
        counts = self._counts()
        parts = counts.shape[0]
        arguments = both | dict(counts=counts, counters=self.counters, parts=parts, ROUTES=ROUTES_PER_PART)
        return [
            Launch(count_round_kernel, (parts + programs,), arguments),
            *self._from_counts(counts, **self._listing()),
        ]

    @property
    def _programs_that_round(self) -> int:
        return self.tokens * triton.cdiv(self.call.hidden // BLOCK, BLOCKS_PER_PROGRAM)

    def _rounding(self) -> dict:
        """What a kernel is told that rounds activations."""
        call = self.call
        return self._hidden_states() | dict(
            H=call.hidden, TOPK_POW2=triton.next_power_of_2(call.topk), MXFP8=call.activation_dtype == "mxfp8",
            NATIVE_E4M3=self.target.native_e4m3, N=BLOCKS_PER_PROGRAM,
        )  # fmt: skip

    def _dispatch(self) -> Launch:
        return Launch(
            dispatch_kernel,
            (self.call.experts + self._programs_that_round,),
            self._routing() | self._rounding() | self._places | self._listing()
            | dict(
                rows=self.rows, rows_scale=self.rows_scale, counters=self.counters, EXPERTS_POW2=self.experts_pow2,
                ROUTES=max(32, triton.next_power_of_2(self.routes)) if self.few else 0,
                IN_PRODUCT_ORDER=self.specialized,
            ),
        )  # fmt: skip

    def _ending(self, gate_up: bool) -> dict:
        """What a product's kernel is told of what follows the product."""
        swiglu = self._swiglu()
        return self._weight(gate_up and self.weight_on_input) | swiglu | dict(
            offsets=self.offsets, tiles=self.tile_list, routes=self.sorted_routes, GATE_UP=gate_up,
            MXFP8=gate_up and self.call.activation_dtype == "mxfp8", LIMITED=gate_up and swiglu["LIMITED"],
        )  # fmt: skip

    def _specialized_gemm(self, tile: Gemm, x: Operand, x_scale: Operand | None, name: str, gate_up: bool) -> Launch:
        # Other GPUs' builds of Triton need not have what it imports.
        from .hopper import slots_of_a_copy, warpgroup_gemm_kernel

        experts, rows, columns = getattr(self.call, name).shape
        halves = 2 if gate_up else 1
        n = rows // halves
        count = self.tiles_bound * triton.cdiv(self.inner.shape[1] if gate_up else n, tile.block_n)
        tile = _fitted(tile, columns)
        box = min(tile.block_k, 128)
        weights = self._weights(name)
        weights["w"] = Descriptor(
            weights["w"], (experts, halves, n, columns), (rows * columns, n * columns, columns, 1),
            (1, halves, tile.block_n, box), swizzle=box, l2_promotion=256,
        )  # fmt: skip
        gather = gate_up and self.tiles.gather
        slots = slots_of_a_copy(self.tiles.block_m)
        threads = 32 * (tile.turns * tile.num_warps + 4)  # Triton gives the one warp that loads the room of four
        return Launch(
            warpgroup_gemm_kernel,
            (min(count, tile.programs * multiprocessors(self.call.device)),),
            dict(
                x=x if gather else Descriptor(x, x.shape, (x.shape[1], 1), (slots, 64), swizzle=128),
                **weights, out=self.inner if gate_up else self.terms, counters=self.counters, count=count,
                **self._ending(gate_up), K=columns, N=n,
                BLOCK_M=self.tiles.block_m, BLOCK_N=tile.block_n, COLUMNS=tile.block_k, STAGES=tile.num_stages,
                TURNS=tile.turns, GATHER=gather, TOPK=self.call.topk,
            ),
            dict(num_warps=tile.num_warps, maxnreg=2**16 // (tile.programs * threads) // 8 * 8, **tile.options),
        )  # fmt: skip

    def _gemm(self, tile: Gemm, x: Operand, x_scale: Operand | None, name: str, gate_up: bool) -> Launch:
        call, layout = self.call, LAYOUTS[self.call.layout]
        weight = getattr(call, name)
        experts, rows, columns = weight.shape
        halves = 2 if gate_up else 1
        n = rows // halves
        block_k = min(tile.block_k, triton.next_power_of_2(columns))
        out, out_scale = (self.inner, self.inner_scale) if gate_up else (self.terms, None)
        weights = self._weights(name)
        descriptors = tile.descriptors and self.target.descriptors and call.layout == "row_major" and not self.scaled
        descriptors = descriptors and weight.data_ptr() % 16 == 0
        x_from = x
        if descriptors:
            x_from = Descriptor(x, x.shape, (columns, 1), (self.tiles.block_m, block_k))
            weights["w"] = Descriptor(
                weights["w"], (experts, halves, n, columns), (rows * columns, n * columns, columns, 1),
                (1, halves, tile.block_n, block_k),
            )  # fmt: skip
        # On AMD GPUs a wave's 64 lanes hold the rows of an operand (that many) several times, each with other blocks.
        rows_of_instruction = tile.options.get("matrix_instr_nonkdim", 64)
        # Through that order and another layout's at once, Triton sees no neighbours and fetches weights byte by byte.
        reorder = self.scaled and call.layout == "row_major"
        groups = min(64 // rows_of_instruction, block_k // BLOCK) if reorder else 1
        # In the simulator few trips and tails of K are right with buffer loads, and tails are not without (3.6.0).
        whole = columns % block_k == 0 and columns // block_k > tile.num_stages
        x_left = self.scaled and not self.target.capability
        block_n, num_warps, to_lds = tile.block_n, tile.num_warps, None
        if x_left and block_n > 64 and n < 2 * block_n and -n % block_n >= block_n // 2:
            # Less work than with a last tile that is half empty, where there is but one before it. Half the waves, each
            # with as large a part, for two workgroups of a CU; LDS has room for both if it holds one stage of each.
            block_n, num_warps, to_lds = block_n // 2, num_warps // 2, False
        elif STAGES_SPILL and x_left and gate_up and self.tiles.block_m >= 256 and columns % block_k:
            to_lds = True if call.swiglu_limit is not None else None
        scale_shape = (experts, rows, layout.padded_scale_columns(columns))
        return Launch(
            grouped_gemm_kernel,
            (self.tiles_bound * triton.cdiv(n, block_n),),
            dict(
                x=x_from, x_scale=x_scale, **weights, out=out, out_scale=out_scale,
                **self._ending(gate_up), K=columns, N=n,
                **order("", layout.weight[gate_up], (experts, rows, columns)),
                **order("SCALE_", layout.scale[gate_up], scale_shape),
                SCALED=self.scaled, X_LEFT=x_left, NATIVE_E4M3=self.target.native_e4m3, WGMMA=self.target.wgmma,
                DESCRIPTORS=descriptors,
                BLOCK_M=self.tiles.block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUPS=groups,
                # as Triton divides such tiles
                WAVES=2 if x_left and gate_up and self.tiles.block_m >= 128 and num_warps >= 4 else 1,
            ),
            dict(num_warps=num_warps, num_stages=tile.num_stages, **tile.options),
            buffers=not (BUFFER_OFFSETS_WRAP and whole), to_lds=to_lds,
        )  # fmt: skip

    def _combine(self) -> Launch:
        call = self.call
        assert call.out is not None
        return Launch(
            combine_kernel,
            (self.tokens * triton.cdiv(call.hidden, COLUMNS_PER_PROGRAM),),
            self._weight(True)
            | dict(
                terms=self.terms, slots=self.slots, out=self._given("out", by_token=True),
                out_stride=call.out.stride(0), H=call.hidden, TOPK=call.topk, WEIGHTED=not self.weight_on_input,
                WORDS=self.target.arch not in HIP_ARCHITECTURES, N=COLUMNS_PER_PROGRAM,
            ),
        )  # fmt: skip


def admits(call: FusedMoe, target: Target, tiles: Tiles) -> bool:
    """Whether the kernels that ``tiles`` are for take the call.

    Those of :mod:`.matvec` read words of codes, :mod:`.matvec_mma` pairs of scale bytes as well, :mod:`.hopper` copies
    of 16 bytes and whole steps of hidden states.
    """
    if tiles.kernels == "gemm":
        return True
    tensors = (call.w1, call.w2) + (() if tiles.kernels == "matvec" else (call.w1_scale, call.w2_scale))
    if call.layout != "row_major" or any(tensor.data_ptr() % 16 for tensor in tensors):
        return False
    if tiles.kernels == "matvec":
        return True
    if target.capability != 90:
        return False
    if tiles.kernels == "mma":
        from .matvec_mma import MOST_ROUTES

        return call.topk <= MOST_ROUTES
    if call.hidden <= tiles.gemm1.more_than or call.intermediate <= tiles.gemm2.more_than:
        return False
    return call.hidden % 64 == 0


def choose(call: FusedMoe, target: Target, config: Config | None = None) -> Tiles:
    """The tiles of ``call``: those of ``config``, or the configured ones."""
    pick = partial(configs.choose, target.arch, call.activation_dtype) if config is None else config.choose
    return pick(
        tokens=call.tokens, hidden=call.hidden, intermediate=call.intermediate,
        experts=max(call.experts, call.global_experts), topk=call.topk,
        admits=lambda tiles: admits(call, target, tiles),
    )  # fmt: skip


def plan(call: FusedMoe, target: Target, tiles: Tiles | None = None) -> Plan:
    """What computes ``call`` and all calls of the same kind; ``tiles`` instead of the configured ones."""
    tiles = choose(call, target) if tiles is None else tiles
    size = 4 if torch.float32 in (call.result_dtype, target.operand) else 2
    token_bytes = call.topk * (size * call.hidden + 2 * call.intermediate)
    step = max(1, LARGEST_WORKSPACE // token_bytes)
    kind = _RouteByRoute if tiles.block_m == 1 else _Sorted
    parts = [kind(call, target, tiles, first, min(step, call.tokens - first)) for first in range(0, call.tokens, step)]
    launches = [launch for part in parts for launch in part.overlapping()]
    return Plan(launches, max((part.workspace for part in parts), default=0))
