"""Route by route, without matrix units: what serves a few tokens on some GPUs, with tiles that they would not get here,
against the reference."""

import pytest
import torch

from helpers import BACKEND, DEVICE, OPS, assert_agrees, moe_inputs, same_bytes, small
from torch_mxfp8moe import configs, reference
from torch_mxfp8moe.configs import Gemm, Tiles

pytestmark = pytest.mark.skipif(
    BACKEND != "triton", reason=f"calls go to {BACKEND}; test_triton_interpreter.py runs them"
)

TILES = {
    f"{first}, {second}": Tiles(None, 1, Gemm(*first, 1), Gemm(*second, 1))
    for first, second in (((16, 256, 2), (32, 64, 4)), ((32, 64, 1), (64, 512, 2)))
}
CASES = {
    "plain": (dict(), dict()),
    "bf16 activations": (dict(), dict(activation_dtype="bf16")),
    "fp32": (dict(dtype=torch.float32, weight_dtype=torch.bfloat16), dict()),
    "MXFP8 input": (dict(scaled=True), dict(out_dtype=torch.float32)),
    "biases and limits": (
        dict(bias_dtype=torch.float32), dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=0.5)
    ),
    "router weight on the input": (dict(K=1, bias_dtype=torch.bfloat16), dict(apply_router_weight_on_input=True)),
    "expert map": (dict(G=9, K=5, id_dtype=torch.int64), dict()),
    "no tails": (dict(H=256, I=64, K=3), dict()),
    "biases and several pieces": (dict(H=288, I=160, bias_dtype=torch.bfloat16), dict()),
    "smallest": (dict(H=32, I=32, E=1, K=1), dict()),
}  # fmt: skip


@pytest.fixture
def tiles(request, monkeypatch):
    """These for every call."""
    monkeypatch.setattr(configs, "choose", lambda *args, **kwargs: TILES[request.param])
    return TILES[request.param]


@small
@pytest.mark.parametrize("tiles", TILES, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_like_the_reference(case, tiles):
    """Every element; the same bits each time."""
    sizes, options = CASES[case]
    for T in (1, 3) if DEVICE.type == "cuda" else (3,):
        inputs = moe_inputs(**dict(T=T, H=128, I=96, E=5, K=2) | sizes, seed=T)
        if "G" in sizes:
            entries = torch.tensor([3, -1, 0, 4, 7, 1, -5, -1, 2], dtype=torch.int32, device=DEVICE)
            inputs |= dict(expert_map=entries, num_tokens=torch.tensor(T - T // 3, dtype=torch.int32, device=DEVICE))
        got = OPS.fused_moe(**inputs, **options, backend="triton")
        assert_agrees(got, reference.fused_moe(**inputs, **options))
        if DEVICE.type == "cuda":  # the interpreter runs one program after the other
            assert same_bytes(got, OPS.fused_moe(**inputs, **options, backend="triton"))
