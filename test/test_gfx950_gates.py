"""What gfx950 gets compiled to, for every model of shapes.csv and every tile of the configuration: no run, no GPU."""

import csv
import importlib.util

import pytest
import torch

from helpers import HERE
from torch_mxfp8moe import configs
from torch_mxfp8moe.arguments import FusedMoe

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import gfx950_ops as ops
from gfx950_simulator.assembly import parse
from gfx950_simulator.hazards import check_wait_states
from gfx950_simulator.machine import Program
from torch_mxfp8moe.backends.triton.launch import compile_offline

LDS = 160 * 1024
VGPRS = 512
"""Of a SIMD, for one wave; what a kernel of 256 threads may have at most."""

with (HERE / "shapes.csv").open() as file:
    MODELS = list(csv.DictReader(file))


def meta_call(model: dict, tokens: int = 64) -> FusedMoe:
    """A call at the model's per-rank sizes, on tensors without memory."""
    H, I, E, K = (int(model[name]) for name in ("hidden", "per_rank_intermediate", "experts", "topk"))
    limit = float(model["swiglu_limit"]) if model["swiglu_limit"] else None

    def empty(*shape, dtype=torch.uint8):
        return torch.empty(shape, dtype=dtype, device="meta")

    return FusedMoe(
        empty(tokens, H, dtype=torch.bfloat16),
        empty(E, 2 * I, H, dtype=torch.float8_e4m3fn), empty(E, 2 * I, H // 32),
        empty(E, H, I, dtype=torch.float8_e4m3fn), empty(E, H, I // 32),
        empty(tokens, K, dtype=torch.float32), empty(tokens, K, dtype=torch.int32),
        swiglu_alpha=float(model["swiglu_alpha"]), swiglu_beta=float(model["swiglu_beta"]), swiglu_limit=limit,
        out=empty(tokens, H, dtype=torch.bfloat16),
    )  # fmt: skip


@pytest.mark.parametrize("rule", range(len(configs.load("gfx950", "mxfp8").tiles)))
@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model['model']} {model['parallel']}")
def test_compiled_kernels(model, rule):
    """The matrix unit takes MXFP8 as it is, nothing spills, LDS suffices, every instruction is one that the simulator
    knows, and the wait states are there (a warning tells of those that LLVM is known to leave out)."""
    launches = ops.bound_launches(meta_call(model), configs.load("gfx950", "mxfp8").tiles[rule])
    for launch, compiled in zip(launches, compile_offline(launches, ops.TARGET)):
        program = Program(parse(compiled.asm["amdgcn"]))
        matrix = {one.name for one in program.instructions if one.unit == "mfma"}
        if "gemm" in launch.kernel.__name__:
            assert matrix and all(name.startswith("v_mfma_scale_f32_") for name in matrix), matrix
        else:
            assert not matrix
        assert program.code.descriptor["private_segment_fixed_size"] == 0, "spills or a stack"
        assert ".vgpr_spill_count: 0" in compiled.asm["amdgcn"]
        assert program.code.descriptor["next_free_vgpr"] <= VGPRS
        assert compiled.metadata.shared <= LDS
        check_wait_states(program)
