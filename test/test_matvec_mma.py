"""On sm_90: route by route on the matrix unit, with tiles that small calls would not get, against the reference."""

import pytest
import torch

from forced_tiles import CASES, assert_like_the_reference
from gpu import needs_gpu, on_gpu
from helpers import OPS, assert_agrees, assert_equal, moe_inputs, random_bytes, same_bytes
from torch_mxfp8moe import reference
from torch_mxfp8moe.configs import Gemm, Tiles

pytestmark = [
    needs_gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an sm_90 GPU"
    ),
]


def tiles(up: int, down: int, **options) -> Tiles:
    """With so many warps each."""
    return Tiles(
        None,
        1,
        *(Gemm(n, 256 * warps, warps, 1, mma=True, options=options) for n, warps in ((8, up), (16, down))),
    )


TILES = {
    "1 and 2 warps": tiles(1, 2),
    "2 and 1 warps": tiles(2, 1),
    "4 and 8 warps": tiles(4, 8),
    "16 and 4 warps, few registers": tiles(16, 4, maxnreg=128),
    "8 and 16 warps": tiles(8, 16),
}
CASES = CASES | {
    "smallest": (dict(H=32, I=32, E=1, K=1), dict()),
    "whole chunks": (dict(H=2048, I=512), dict()),
    "an odd number of trips": (dict(H=768, I=768, K=3), dict()),
    "odd numbers of scale bytes": (dict(H=288, I=96), dict()),
    "odd numbers of scale bytes, bf16 activations": (dict(H=544, I=160), dict(activation_dtype="bf16")),
    "MXFP8 input, odd numbers of scale bytes": (dict(H=352, I=224, scaled=True), dict()),
    "many routes": (dict(E=40, K=32, I=64), dict()),
    "few local routes of many": (dict(G=9, K=8, I=544), dict()),
    "MXFP8 input, bf16 activations": (dict(scaled=True), dict(activation_dtype="bf16")),
    "fp16": (dict(dtype=torch.float16), dict()),
    "half a chunk, biases": (dict(H=2880, I=384, bias_dtype=torch.bfloat16), dict()),
}


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_like_the_reference(case, tiles):
    """Every element; the same bits each time."""
    sizes, options = CASES[case]
    for T in (1, 3, 9):
        assert_like_the_reference(dict(T=T, H=512, I=256, E=5, K=2) | sizes, options, repeats=3, to=on_gpu)


@pytest.mark.parametrize("tiles", [TILES["1 and 2 warps"], TILES["4 and 8 warps"]], indirect=True)
@pytest.mark.parametrize("scaled", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_rows_at_any_address(dtype, scaled, tiles):
    """The same bytes as for rows that are aligned."""
    inputs = on_gpu(moe_inputs(T=4, H=320, I=96, E=5, K=2, dtype=dtype, scaled=scaled))
    want = OPS.fused_moe(**inputs, backend="triton")
    x = inputs["hidden_states"]
    for first, stride in ((0, 321), (1, 336), (3, 327)):
        wide = torch.zeros(4, stride + 8, dtype=torch.float32, device="cuda").to(x.dtype)
        inputs["hidden_states"] = wide.as_strided((4, 320), (stride, 1), first).copy_(x)
        assert same_bytes(OPS.fused_moe(**inputs, backend="triton"), want), (first, stride)


@pytest.mark.parametrize("tiles", [TILES["1 and 2 warps"], TILES["16 and 4 warps, few registers"]], indirect=True)
@pytest.mark.parametrize("activation_dtype", ("mxfp8", "bf16"))
def test_every_code_with_every_scale(activation_dtype, tiles):
    """Each of 65536 up rows of w1 holds one code with one scale byte, in some column; a token is 1 there, so that up is
    the weight's value. Gate is 200 by its bias."""
    from torch_mxfp8moe.backends.triton.launch import Launch
    from torch_mxfp8moe.backends.triton.matvec_mma import gate_up_mma_kernel

    E, N, H = 64, 1024, 544
    for column in (0, 7, 31, 32, 100, 255, 256, 511, 543):
        codes = torch.zeros(E, 2 * N, H, dtype=torch.uint8, device="cuda")
        scale = random_bytes(E, 2 * N, H // 32, low=0, high=255).cuda()
        value = torch.arange(2**16, device="cuda").view(E, N)
        codes[:, N:, column] = (value % 256).to(torch.uint8)
        scale[:, N:, column // 32] = (value // 256).to(torch.uint8)
        x = torch.zeros(1, H, dtype=torch.bfloat16, device="cuda")
        x[0, column] = 1.0
        bias = torch.zeros(E, 2 * N, device="cuda")
        bias[:, :N] = 200.0  # gate * sigmoid(gate) = 200
        inner = torch.full((E, N), -7.0, device="cuda")
        ids = torch.arange(E, dtype=torch.int32, device="cuda").view(E, 1)
        arguments = dict(
            x=x.expand(E, H), x_scale=None, w=codes, w_scale=scale, bias=bias, inner=inner, topk_ids=ids,
            expert_map=None, num_tokens=None, topk_weights=None, x_stride=0, x_scale_stride=0, routes_total=E,
            ids_stride=1, first_token=0, known=E, weights_stride=0, alpha=1.0, beta=0.0, limit=0.0, H=H, N=N, EXPERTS=E,
            TOPK=1, MXFP8=activation_dtype == "mxfp8", LIMITED=False, OVERLAP=False,
        )  # fmt: skip
        Launch(gate_up_mma_kernel, (E * N // 8,), arguments, dict(num_warps=tiles.gemm1.num_warps)).run()
        data = codes[:, N:].contiguous().view(torch.float8_e4m3fn)
        weight = reference.dequantize_1x32(data, scale[:, N:].contiguous(), torch.float32)[:, :, column]
        assert_equal(inner, 200.0 * weight)


@pytest.mark.parametrize("tiles", [TILES["2 and 1 warps"], TILES["8 and 16 warps"]], indirect=True)
def test_nan_and_infinity_stay_in_their_token_and_row(tiles):
    inputs = moe_inputs(T=5, H=576, I=288, E=5, K=2)
    inputs["hidden_states"][1, 40] = torch.inf
    inputs["hidden_states"][2, 575] = torch.nan
    inputs["w1_scale"][0, 7, -1] = 255
    for row in (0, 5, 575):
        inputs["w2_scale"][:, row, -1] = 255
    inputs = on_gpu(inputs)
    want = reference.fused_moe(**inputs)
    assert want.isnan()[1:3].all() and not want.isnan()[0].all() and not want.isnan()[3:].all()
    assert_agrees(OPS.fused_moe(**inputs, backend="triton"), want)
