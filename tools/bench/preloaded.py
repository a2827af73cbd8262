"""Imported by the process that compilations are forked from: makes a plan, which imports what is imported late, and
settles the keys of kernels."""

from shapes import rows

from .compiling import Task, settle_keys
from .tuning import key

_TILE = key({"block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2})
_ROW = rows()["Qwen3-30B-A3B TP4"]
Task(_ROW, (1,), "mxfp8", "sm_90", "gemm1", key({"block_m": 16}), _TILE, _TILE).launches()
settle_keys()
