"""The wait states that software has to keep on gfx950, in what every model of shapes.csv and every tile of the
configuration compile to. No run, no GPU; what else the code has to be is in test_triton_compile.py."""

import pytest
import torch

from helpers import only_cpu
from shapes import rows
from torch_mxfp8moe import configs
from torch_mxfp8moe.arguments import FusedMoe
from torch_mxfp8moe.backends.triton import _interpreted

pytest.importorskip("triton", reason="needs Triton: pip install triton")
pytest.importorskip("numpy", "2.0")
if _interpreted():
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled", allow_module_level=True)

import gfx950_ops as ops  # noqa: E402
from gfx950_simulator.assembly import parse  # noqa: E402
from gfx950_simulator.hazards import check_wait_states  # noqa: E402
from gfx950_simulator.machine import Program  # noqa: E402
from torch_mxfp8moe.backends.triton.launch import compile_offline  # noqa: E402

pytestmark = only_cpu

ROWS = rows()


@pytest.mark.parametrize("rule", range(len(configs.load("gfx950", "mxfp8").tiles)))
@pytest.mark.parametrize("name", ROWS)
def test_wait_states(name, rule):
    """Every instruction is one that the simulator knows, and the wait states are there; a warning tells of those that
    LLVM is known to leave out."""
    row, tokens = ROWS[name], 64

    def empty(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tokens, columns, dtype=dtype, device="meta")

    call = FusedMoe(
        hidden_states=empty(row.hidden, torch.bfloat16), **row.weights("meta"), **row.options,
        topk_weights=empty(row.topk, torch.float32), topk_ids=empty(row.topk, torch.int32),
        out=empty(row.hidden, torch.bfloat16),
    )  # fmt: skip
    launches = ops.bound_launches(call, configs.load("gfx950", "mxfp8").tiles[rule])
    for compiled in compile_offline(launches, ops.TARGET):
        check_wait_states(Program(parse(compiled.asm["amdgcn"])))
