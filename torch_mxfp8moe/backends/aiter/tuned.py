"""Which kernels aiter was tuned for: its tables, read the way in which it looks them up.

A shape that they do not have takes a kernel chosen by a rule of thumb. Several such shapes faulted in the field
(https://github.com/ROCm/aiter/issues/5049, /4783), so ``explain`` says it; it is no reason to refuse a call.
"""

import csv
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ...arguments import FusedMoe
from .probe import ARCHITECTURE

TIERS = (32768, 131072)
"""From the first on, token counts are rounded down to one of these; below, up to a power of two."""


@dataclass(frozen=True)
class Kernels:
    """One row of a table."""

    stage1: str
    stage2: str


def bucket(tokens: int) -> int:
    """The token count that the tables have for ``tokens``."""
    if tokens < TIERS[0]:
        return 1 << max(tokens - 1, 0).bit_length()
    return max(tier for tier in TIERS if tokens >= tier)


def files() -> list[Path]:
    """aiter's tables of experts, found without importing it: those of AITER_CONFIG_FMOE, or all that it brings."""
    if named := os.environ.get("AITER_CONFIG_FMOE"):
        return [Path(name) for name in named.split(os.pathsep)]
    spec = importlib.util.find_spec("aiter")
    folders = [Path(folder) / "configs" for folder in (spec.submodule_search_locations if spec else None) or ()]
    return sorted(path for folder in folders for path in folder.rglob("*tuned_fmoe*.csv") if "untuned" not in path.name)


@cache
def table(paths: tuple[Path, ...]) -> dict[tuple[int, ...], Kernels]:
    """MXFP8 rows by (compute units, tokens, H, I, E, K); the first of equal ones, as aiter takes it."""
    wanted = {
        "dtype": "torch.bfloat16", "q_dtype_a": "torch.float8_e4m3fn", "q_dtype_w": "torch.float8_e4m3fn",
        "q_type": "QuantType.per_1x32", "use_g1u1": "1", "doweight_stage1": "0",
    }  # fmt: skip
    result: dict[tuple[int, ...], Kernels] = {}
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                fits = all(row.get(name) == value for name, value in wanted.items())
                if fits and row.get("gfx", ARCHITECTURE) == ARCHITECTURE and row.get("_tag") != "flydsl_fallback":
                    columns = ("cu_num", "token", "model_dim", "inter_dim", "expert", "topk")
                    key = tuple(int(row[name]) for name in columns)
                    result.setdefault(key, Kernels(row["kernelName1"], row["kernelName2"]))
    return result


def lookup(rows: dict, units: int, tokens: int, hidden: int, intermediate: int, experts: int, topk: int):
    """The row of these sizes, or of a lower tier; None if there is none."""
    first = bucket(tokens)
    for size in (first, *(tier for tier in reversed(TIERS) if tier < first and first in TIERS)):
        if found := rows.get((units, size, hidden, intermediate, experts, topk)):
            return found
    return None


def note(call: FusedMoe) -> str | None:
    """What to know of ``call`` before aiter serves it; None if it is tuned for its sizes."""
    units = torch.cuda.get_device_properties(call.device).multi_processor_count
    sizes = dict(tokens=call.tokens, hidden=call.hidden, intermediate=call.intermediate, experts=call.experts)
    if lookup(table(tuple(files())), units, **sizes, topk=call.topk):
        return None
    return (
        f"aiter has no tuned kernel for T={call.tokens} H={call.hidden} I={call.intermediate} E={call.experts} "
        f"K={call.topk} on {units} compute units and chooses one by a rule of thumb; such shapes have faulted "
        "(https://github.com/ROCm/aiter/issues/5049)"
    )
