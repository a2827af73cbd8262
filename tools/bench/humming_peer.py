"""Humming (package humming-kernels): what vLLM runs an MXFP8 checkpoint with on sm_90, in the order that vLLM does.

Its indexed grouped products, compiled at run time, take bf16 activations and MXFP8 weights; the sorting, SwiGLU and the
sum around them are those of ``glue``. Which schedule serves how many routes is what Humming's own heuristics say.
"""

import json
import math

import torch

from . import glue
from .peers import Bound, Peer, in_order

SCHEMA = {"quant_method": "modelopt", "quant_algo": "mxfp8"}
INDEXED = {"gemm_type": "indexed"}
LOCKS = 2048
"""Counters for products that are split along K, in int32; as many as Humming's own layer has."""

MULTIPLE_N, MULTIPLE_K = 128, 64
"""What sizes are padded to for its schedules on sm_90 to exist; all rows of test/shapes.csv but gpt-oss's have them."""


class _Product:
    """One of the two products: weights in Humming's form, and its kernel for a number of routes."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None):
        from humming.schema import BaseWeightSchema
        from humming.transform import prepare_and_transform_humming_tensors

        (E, N, K), device = weight.shape, weight.device
        tensors = {"weight": weight, "weight_scale": scale}
        if bias is not None:
            tensors["bias"] = bias.bfloat16()
        schema, tensors = BaseWeightSchema.from_config(SCHEMA).convert_humming(
            tensors, shape_n_stacks=[N], shape_k_stacks=[K], param_dtype=torch.bfloat16, num_experts=E, device=device
        )
        self.config, self.tensors = prepare_and_transform_humming_tensors(
            tensors, shape_n=N, shape_k=K, weight_schema=schema, num_experts=E, pad_n_to_multiple=MULTIPLE_N,
            pad_k_to_multiple=MULTIPLE_K, has_bias=bias is not None, torch_dtype=torch.bfloat16, device=device,
        )  # fmt: skip

    def schedule(self, routes: int) -> dict:
        """What Humming's heuristics choose for that many local routes."""
        from humming.tune import get_heuristics_config

        return get_heuristics_config(self.config, shape_m=routes, **INDEXED)

    def compile(self, counts: list[int]) -> None:
        """The kernels for these numbers of routes, at once."""
        from humming.kernel.humming import HummingKernel

        different = {json.dumps(self.schedule(routes), sort_keys=True): self.schedule(routes) for routes in counts}
        schedules = [[i, i + 1, schedule] for i, schedule in enumerate(different.values())]  # ranges that none asks for
        HummingKernel.prepare_kernels(self.config.to_str(), json.dumps(INDEXED), json.dumps(schedules))

    def __call__(self, x, out, align: glue.Align, locks, topk: int, routes: int) -> None:
        """x [rows, K]; out [routes, N], of which rows of routes without a slot are not written."""
        from humming.forward import humming_forward

        humming_forward(
            self.config, inputs=x, outputs=out, **self.tensors, sorted_ids=align.sorted_routes,
            expert_ids=align.block_experts, num_tokens_padded=align.padded_total, locks=locks, top_k=topk,
            valid_shape_m=routes, compute_config=INDEXED, tuning_config=self.schedule(routes),
        )  # fmt: skip


class Humming(Peer):
    activations = "bf16"

    def __init__(self, row, weights: dict):
        super().__init__(row, weights)
        self.products = [
            _Product(weights[name], weights[f"{name}_scale"], weights.get(f"{name}_bias")) for name in ("w1", "w2")
        ]
        self.locks = torch.zeros(LOCKS, dtype=torch.int32, device=weights["w1"].device)

    def routes(self, tokens: int) -> int:
        """How many of the routes are expected here, which chooses the schedule."""
        return math.ceil(tokens * self.row.topk * self.row.local / self.row.experts)

    def prepare(self, token_counts: list[int]) -> None:
        for product in self.products:
            product.compile([self.routes(T) for T in token_counts])

    def bind(self, tokens: dict) -> Bound:
        x, ids, routing = tokens["hidden_states"], tokens["topk_ids"], tokens["topk_weights"]
        row, expert_map = self.row, self.weights.get("expert_map")
        (T, H), I, E = x.shape, row.intermediate, row.local
        routes, count = T * row.topk, self.routes(T)
        inner, h, terms = (x.new_empty(routes, width) for width in (2 * I, I, H))
        out = torch.empty_like(x)
        blocks = [product.schedule(count)["block_shape"][0] for product in self.products]
        aligns = [glue.Align(ids, expert_map, E, block) for block in dict.fromkeys(blocks)]
        first, second = aligns[0], aligns[-1]
        w1, w2 = self.products
        options = [row.options[f"swiglu_{name}"] for name in ("alpha", "beta", "limit")]

        def align():
            for one in aligns:
                one()

        def gemm1():
            w1(x, inner, first, self.locks, row.topk, count)

        def swiglu():
            glue.swiglu(inner, h, *options)

        def gemm2():
            w2(h, terms, second, self.locks, 1, count)

        def add():
            glue.weighted_sum(terms, ids, expert_map, routing, out, E)

        def gemms():
            gemm1()
            gemm2()

        return in_order([align, gemm1, swiglu, gemm2, add], out, gemms=gemms)
