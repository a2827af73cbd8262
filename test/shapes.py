"""The rows of shapes.csv, one rank's experts of real models, at full size: weights, activations, routing, calls. Files
of other models, with the same columns, are read as well."""

import csv
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

import torch_mxfp8moe
from torch_mxfp8moe.arguments import FusedMoe
from torch_mxfp8moe.formats import BLOCK


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
    options: dict = field(hash=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(hidden, intermediate, experts, topk), by which files of tiles have rules for it."""
        return self.hidden, self.intermediate, self.experts, self.topk

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


SHAPES = Path(__file__).parent / "shapes.csv"
NEEDED = ("model", "hidden", "intermediate", "experts", "topk")
"""Columns; per_rank_intermediate does in the place of intermediate."""

DEFAULTS = {
    "parallel": "", "swiglu_alpha": "1", "swiglu_beta": "0", "swiglu_limit": "", "bias": "no",
    "per_rank_intermediate": "", "shared_experts": "", "gate_up_in_checkpoint": "",
}  # fmt: skip
"""Of other columns, where they are missing or empty. The last two are not read."""

PARALLEL = re.compile(r"((TP|EP)([1-9]\d*))(?: \((\d+) local experts\))?|")


@cache
def rows(path: Path = SHAPES) -> dict[str, Row]:
    """Every row of a CSV file by name, which is its model and its TPn or EPn.

    Raises ValueError that names the file, the line and what would be right; OSError.
    """
    result = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or ()]
            takes = f"it takes {', '.join(NEEDED)}, and may have {', '.join(DEFAULTS)}, each once"
            for name in columns:
                if name not in (*NEEDED, *DEFAULTS) or columns.count(name) > 1:
                    raise ValueError(f"{path}:1: there is a column {name!r}; {takes}")
            for name in NEEDED:
                instead = "per_rank_intermediate" if name == "intermediate" else name
                if name not in columns and instead not in columns:
                    raise ValueError(f"{path}:1: there is no column {name!r}; {takes}")
            for line in reader:
                try:
                    row = _row(line)
                    if row.name in result:
                        raise ValueError(f"there is a row {row.name!r} above; each takes a name of its own")
                except ValueError as error:
                    raise ValueError(f"{path}:{reader.line_num}: {error}") from None
                result[row.name] = row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: {error}; it takes CSV in UTF-8") from None
    if not result:
        raise ValueError(f"{path}: there is no row; it takes one or more")
    return result


def _row(line: dict[str, str]) -> Row:
    """From the values of a line by column."""
    if None in line or None in line.values():
        raise ValueError("has more or fewer values than there are columns")
    values = DEFAULTS | {name: value.strip() for name, value in line.items() if value.strip()}

    def get(column: str, kind, wants: str, right: Callable[..., bool] = lambda value: True):
        text = values.get(column, "")
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not right(value):
            raise ValueError(f"{column} is {text!r}; it takes {wants}")
        return value

    def blocks(column: str, ranks: int = 1) -> int:
        each = "" if ranks == 1 else f", {BLOCK} for each of {ranks} ranks"
        wants = f"a positive multiple of {BLOCK * ranks}{each}"
        return get(column, int, wants, lambda size: size > 0 and size % (BLOCK * ranks) == 0)

    model = get("model", str, "a name", bool)
    parallel = get("parallel", PARALLEL.fullmatch, "TPn, EPn, EPn (m local experts) or nothing")
    split, kind, ranks, local = parallel[1], parallel[2], int(parallel[3] or 1), parallel[4]
    experts = get("experts", int, "a whole number > 0", lambda count: count > 0)
    if kind == "EP" and local is None and experts % ranks:
        raise ValueError(f"parallel is {split!r} of {experts} experts; it takes '{split} (m local experts)'")
    local = int(local or (experts // ranks if kind == "EP" else experts))
    if not 0 < local <= experts:
        raise ValueError(f"parallel has {local} local experts; it takes 1 to {experts}")
    if values["per_rank_intermediate"]:
        intermediate = blocks("per_rank_intermediate")
    else:
        shards = ranks if kind == "TP" else 1
        intermediate = blocks("intermediate", shards) // shards
    finite, positive = "a finite number", "a finite number > 0 or nothing"
    return Row(
        name=f"{model} {split}" if split else model,
        hidden=blocks("hidden"),
        intermediate=intermediate,
        experts=experts,
        local=local,
        topk=get("topk", int, f"1 to {experts}, the number of experts", lambda count: 0 < count <= experts),
        bias=get("bias", str, "yes or no", ("yes", "no").__contains__) == "yes",
        shared="fused shared" in model,
        options=dict(
            swiglu_alpha=get("swiglu_alpha", float, finite, math.isfinite),
            swiglu_beta=get("swiglu_beta", float, finite, math.isfinite),
            swiglu_limit=get("swiglu_limit", float, positive, lambda x: 0 < x < math.inf)
            if values["swiglu_limit"]
            else None,
        ),
    )
