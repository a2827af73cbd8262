"""Who is measured: ``fused_moe`` in its modes, and others that compute the same layer.

A peer is made for one row of test/shapes.csv and its weights; ``bind`` makes it ready for one set of tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import torch_mxfp8moe
from torch_mxfp8moe.arguments import FusedMoe
from torch_mxfp8moe.configs import Config, Gemm, Tiles


@dataclass(frozen=True)
class Bound:
    """One call of a peer."""

    run: Callable[[], object]
    """Everything, from tokens and routing to ``out``. It can be captured in a CUDA graph."""
    out: torch.Tensor
    """[T, H] bf16."""
    steps: list[tuple[str, Callable[[], object]]] = field(default_factory=list)
    """What ``run`` does, one after the other: each can be run again by itself once ``run`` has."""
    parts: dict[str, Callable[[], object]] = field(default_factory=dict)
    """Parts of ``run`` that are worth a time of their own, under the same conditions as the whole."""


def in_order(steps: list[Callable[[], object]], out: torch.Tensor, **parts: Callable[[], object]) -> Bound:
    """A call that does ``steps``, which are named by their functions."""

    def run():
        for step in steps:
            step()

    return Bound(run, out, [(step.__name__, step) for step in steps], parts)


def label(launch) -> str:
    """The name of a plan's launch: its kernel's, and which of the layer's weights it reads. The launches of a call that
    goes through in parts share names."""
    from torch_mxfp8moe.backends.triton.launch import Descriptor, Operand

    operands = (x.operand if isinstance(x, Descriptor) else x for x in launch.arguments.values())
    sources = {x.source for x in operands if isinstance(x, Operand)}
    return " ".join([launch.kernel.__name__.removesuffix("_kernel"), *(w for w in ("w1", "w2") if w in sources)])


class Peer:
    """One way to compute the layer of ``row`` with ``weights`` (shapes.Row, and what its ``weights`` gives)."""

    activations: str
    """What the first product's activations are rounded to, the reference's ``activation_dtype``."""

    def __init__(self, row, weights: dict):
        self.row, self.weights = row, weights

    def prepare(self, token_counts: list[int]) -> None:
        """What takes long and is not measured, such as compiling."""

    def bind(self, tokens: dict) -> Bound:
        """``tokens``: what shapes.Row.tokens gives."""
        raise NotImplementedError


def in_layout(weights: dict, layout: str) -> dict:
    """What shapes.Row.weights gives, in another layout."""
    if layout == "row_major":
        return weights
    weights = dict(weights)
    for name, gate_up in (("w1", True), ("w2", False)):
        pair = name, f"{name}_scale"
        weights |= zip(pair, torch_mxfp8moe.preshuffle(*map(weights.get, pair), layout=layout, gate_up=gate_up))
    return weights


class Ours(Peer):
    """The plan of the Triton backend, with the configured tiles or those of ``config``."""

    def __init__(
        self, row, weights: dict, activations: str = "mxfp8", layout: str = "row_major", config: Config | None = None
    ):
        super().__init__(row, in_layout(weights, layout))
        self.activations, self.layout, self.config = activations, layout, config

    def plan(self, call: FusedMoe, target):
        from torch_mxfp8moe.backends.triton.fused_moe import choose, plan

        return plan(call, target, choose(call, target, self.config))

    def call(self, tokens: dict) -> FusedMoe:
        options = dict(self.row.options, activation_dtype=self.activations, layout=self.layout)
        return FusedMoe(**tokens, **self.weights, **options).check().with_out()

    def bind(self, tokens: dict) -> Bound:
        from torch_mxfp8moe.backends.triton import BACKEND

        call = self.call(tokens)
        target = BACKEND.target(call.device)
        plan, memory = self.plan(call, target), call.inputs | {"out": call.out}
        launches = plan.bind(memory, call.device)
        return Bound(
            run=lambda: plan.run("fused_moe", memory, call.device, target),
            out=call.out,
            steps=[(label(launch), bound.run) for launch, bound in zip(plan.launches, launches)],
        )


class DotScaled(Ours):
    """The same launches with the scaling left to tl.dot_scaled, in tiles that suit gfx950: what a Triton kernel written
    for matrix units that take MXFP8 does on other GPUs."""

    def plan(self, call: FusedMoe, target):
        from torch_mxfp8moe.backends.triton.fused_moe import plan
        from torch_mxfp8moe.backends.triton.targets import Target

        class Scaled(Target):
            scaled = True

        gemm1, gemm2 = Gemm(64, 128, 8, 2), Gemm(128, 128, 8, 2)
        return plan(call, Scaled(target.arch), Tiles(None, 64, gemm1, gemm2))


class GroupedMm(Peer):
    """``torch.nn.functional.grouped_mm`` on bf16 weights, the rest of the layer in plain PyTorch."""

    activations = "bf16"

    def __init__(self, row, weights: dict):
        super().__init__(row, weights)
        self.matrices = {
            name: torch_mxfp8moe.dequantize_1x32(weights[name], weights[f"{name}_scale"], torch.bfloat16).mT
            for name in ("w1", "w2")
        }  # [E, H, 2I], [E, I, H]

    def bind(self, tokens: dict) -> Bound:
        x, ids, routing = tokens["hidden_states"], tokens["topk_ids"], tokens["topk_weights"]
        expert_map, biases = self.weights.get("expert_map"), [self.weights.get(f"w{i}_bias") for i in (1, 2)]
        options, E = self.row.options, self.row.local
        experts = torch.arange(E, device=x.device, dtype=torch.int32)
        limit, now = options["swiglu_limit"], {}
        out = torch.empty_like(x)

        def sort():
            expert = ids.flatten() if expert_map is None else expert_map[ids.flatten()]
            expert = torch.where(expert < 0, E, expert)  # of other ranks: behind all others
            now["expert"], now["order"] = expert.sort(stable=True)
            now["ends"] = torch.searchsorted(now["expert"], experts, right=True, out_int32=True)
            now["rows"] = x[now["order"] // ids.shape[1]]

        def product(i: int, rows: torch.Tensor) -> torch.Tensor:
            y = torch.nn.functional.grouped_mm(rows, self.matrices[f"w{i}"], offs=now["ends"])
            return y if biases[i - 1] is None else y + biases[i - 1][now["expert"].clamp(max=E - 1)]

        def gemm1():
            now["inner"] = product(1, now["rows"])

        def swiglu():
            gate, up = now["inner"].chunk(2, dim=-1)
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            now["h"] = gate * torch.sigmoid(options["swiglu_alpha"] * gate) * (up + options["swiglu_beta"])

        def gemm2():
            now["terms"] = product(2, now["h"])

        def add():
            terms = now["terms"] * routing.flatten()[now["order"], None].to(x.dtype)
            if expert_map is not None:
                terms = torch.where((now["expert"] < E)[:, None], terms, 0)  # grouped_mm leaves their rows unwritten
            terms = torch.empty_like(terms).index_copy_(0, now["order"], terms)
            torch.sum(terms.view(*ids.shape, -1), 1, dtype=out.dtype, out=out)

        return in_order([sort, gemm1, swiglu, gemm2, add], out)
