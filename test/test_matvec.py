"""Route by route, without matrix units: what serves a few tokens on some GPUs, with tiles that they would not get here,
against the reference."""

import pytest
import torch

from forced_tiles import CASES, assert_like_the_reference
from helpers import BACKEND, DEVICE, small
from torch_mxfp8moe.configs import Gemm, Tiles

pytestmark = pytest.mark.skipif(
    BACKEND != "triton", reason=f"calls go to {BACKEND}; test_triton_interpreter.py runs them"
)

TILES = {
    f"{first}, {second}": Tiles(None, 1, Gemm(*first, 1), Gemm(*second, 1))
    for first, second in (((16, 256, 2), (32, 64, 4)), ((32, 64, 1), (64, 512, 2)))
}
CASES = CASES | {
    "expert map": (dict(G=9, K=5, id_dtype=torch.int64), dict()),
    "no tails": (dict(H=256, I=64, K=3), dict()),
    "biases and several pieces": (dict(H=288, I=160, bias_dtype=torch.bfloat16), dict()),
    "smallest": (dict(H=32, I=32, E=1, K=1), dict()),
}


@small
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_like_the_reference(case, tiles):
    """Every element; the same bits each time."""
    sizes, options = CASES[case]
    on_gpu = DEVICE.type == "cuda"  # the interpreter runs one program after the other
    for T in (1, 3) if on_gpu else (3,):
        assert_like_the_reference(dict(T=T, H=128, I=96, E=5, K=2) | sizes, options, repeats=int(on_gpu))
