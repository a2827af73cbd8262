"""The rows of shapes.csv, one rank's experts of real models, at full size: weights, activations, routing, calls."""

import csv
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

import torch_mxfp8moe
from torch_mxfp8moe.arguments import FusedMoe


@dataclass(frozen=True)
class Row:
    """One row."""

    name: str
    """Model and how it is split, such as "MiniMax-M3 TP4"."""
    hidden: int
    intermediate: int
    experts: int
    """Global ones."""
    local: int
    topk: int
    bias: bool
    shared: bool
    """The last expert is a fused shared one: every token goes there at weight 1."""
    options: dict

    def smaller(self, shrink: int = 1, experts: int | None = None) -> "Row":
        """The row with H and I divided by ``shrink``, and with at most so many local experts and global ones."""
        sizes = {}
        if shrink > 1:
            for name in ("hidden", "intermediate"):
                sizes[name] = max(64, getattr(self, name) // shrink // 64 * 64)
        if experts is not None:
            sizes |= {name: min(experts, getattr(self, name)) for name in ("experts", "local", "topk")}
        return replace(self, **sizes)

    def weights(self, device: str = "cuda") -> dict:
        """Expert weights, biases and expert map; scales vary from block to block."""
        result = {}
        for name, R, C in (("w1", 2 * self.intermediate, self.hidden), ("w2", self.hidden, self.intermediate)):
            data = torch.empty(self.local, R, C, dtype=torch.float8_e4m3fn, device=device)
            scale = torch.empty(self.local, R, C // 32, dtype=torch.uint8, device=device)
            if device != "meta":
                for expert in range(self.local):
                    spread = torch.randn(R, C // 32, 1, device=device).mul_(0.7).exp2_() * C**-0.5
                    values = torch.randn(R, C // 32, 32, device=device) * spread
                    data[expert], scale[expert] = torch_mxfp8moe.quantize_1x32(values.view(R, C))
            result |= {name: data, f"{name}_scale": scale}
            if self.bias:
                result[f"{name}_bias"] = torch.randn(self.local, R, device=device, dtype=torch.bfloat16) * 0.5
        if self.local < self.experts:  # local experts are spread over the ids, in an order that is not theirs
            expert_map = torch.full((self.experts,), -1, dtype=torch.int32, device=device)
            places = torch.randperm(self.experts, device=device)[: self.local]
            expert_map[places] = torch.arange(self.local, dtype=torch.int32, device=device)
            result["expert_map"] = expert_map
        return result

    def tokens(self, T: int, routing: str = "uniform", device: str = "cuda") -> dict:
        """Activations and routing of T tokens.

        ``routing``: "uniform"; "zipf" (the expert of rank r drawn in proportion to 1 / r); "one" (expert 5 gets every
        token, few of the others get any); "few" (all tokens go to 2 K experts, the others get nothing).
        """
        scores = -torch.empty(T, self.experts, device=device).exponential_().log()  # Gumbel: top-k samples by weight
        ranks = torch.arange(1, self.experts + 1, device=device, dtype=torch.float32)
        if routing == "zipf":
            scores -= ranks.log()
        elif routing == "one":
            scores -= 16 * ranks / self.experts
            scores[:, 5 % self.experts] = torch.inf
        elif routing == "few":
            scores[:, torch.randperm(self.experts, device=device)[: 2 * self.topk]] += 1000
        elif routing != "uniform":
            raise ValueError(f"routing is {routing!r}")
        ids = scores.topk(self.topk, 1).indices.int()
        weights = torch.rand(T, self.topk, device=device) + 0.1
        weights /= weights.sum(1, keepdim=True)
        if self.shared:
            ids[:, -1], weights[:, -1] = self.experts - 1, 1
        x = torch.randn(T, self.hidden, device=device, dtype=torch.bfloat16)
        return dict(hidden_states=x, topk_weights=weights, topk_ids=ids)

    def call(self, T: int, device: str = "cuda", weights: dict | None = None, routing: str = "uniform", **options):
        """A checked call of ``fused_moe`` with T tokens."""
        weights = self.weights(device) if weights is None else weights
        return FusedMoe(**self.tokens(T, routing, device), **weights, **self.options, **options).check()


@cache
def rows() -> dict[str, Row]:
    """Every row by name."""
    result = {}
    with (Path(__file__).parent / "shapes.csv").open() as file:
        for line in csv.DictReader(file):
            parallel, experts = line["parallel"], int(line["experts"])
            name = f"{line['model']} {parallel.split()[0]}"
            result[name] = Row(
                name=name,
                hidden=int(line["hidden"]),
                intermediate=int(line["per_rank_intermediate"]),
                experts=experts,
                local=int(parallel.split("(")[1].split()[0]) if "local" in parallel else experts,
                topk=int(line["topk"]),
                bias=line["bias"] == "yes",
                shared="fused shared" in line["model"],
                options=dict(
                    swiglu_alpha=float(line["swiglu_alpha"]),
                    swiglu_beta=float(line["swiglu_beta"]),
                    swiglu_limit=float(line["swiglu_limit"]) if line["swiglu_limit"] else None,
                ),
            )
    return result
