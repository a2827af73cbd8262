"""On sm_90: the product in which one warp loads, with tiles that small calls would not get, against the reference."""

import pytest
import torch

from forced_tiles import CASES, assert_like_the_reference, warp_specialized
from gpu import needs_sm_90, on_gpu
from helpers import OPS, assert_agrees, assert_equal, moe_inputs, random_bytes
from torch_mxfp8moe import reference

pytestmark = needs_sm_90


TILES = {
    f"{block_m} slots, {first}, {second}{', gathered' * gather}": warp_specialized(block_m, first, second, gather)
    for block_m, first, second, gather in (
        (128, (128, 64, 4, 3, 2), (128, 64, 4, 4, 2), False),
        (128, (128, 64, 4, 4, 2), (128, 64, 4, 3, 2), False),
        (128, (256, 64, 8, 4, 1), (256, 64, 8, 5, 1), False),
        (64, (128, 256, 4, 3, 1), (128, 128, 4, 3, 2), False),
        (32, (64, 256, 4, 3, 2), (128, 256, 4, 2, 2), False),
        (16, (256, 128, 8, 3, 1), (64, 128, 4, 5, 3), False),
        (8, (64, 256, 4, 4, 2), (64, 256, 4, 2, 4), False),
        (8, (64, 128, 4, 8, 1, 2), (64, 128, 4, 2, 2, 2), False),
        (32, (64, 256, 4, 6, 1, 2), (128, 64, 4, 4, 2, 2), False),
        (16, (128, 128, 4, 6, 1, 2), (64, 128, 4, 4, 1, 2), False),
        (128, (128, 64, 4, 4, 2), (128, 64, 4, 4, 2), True),
        (128, (256, 64, 8, 6, 1), (128, 64, 4, 4, 2), True),
        (64, (256, 128, 8, 4, 1), (128, 64, 4, 4, 2), True),
        (64, (128, 64, 4, 4, 2), (128, 64, 4, 4, 2), True),
        (64, (128, 128, 4, 4, 1), (128, 64, 4, 4, 2), True),
        (16, (64, 256, 4, 6, 1), (128, 64, 4, 4, 2), True),
    )
}
CASES = CASES | {
    "smallest": (dict(H=64, I=32, E=1, K=1), dict()),
    "steps of all kinds": (dict(H=320, I=192), dict()),
    "half a step": (dict(H=448, I=96), dict()),
    "half a step, biases and limits": (
        dict(H=2880, I=224, bias_dtype=torch.float32),
        dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=0.5),
    ),
    "half a step, bf16 activations": (dict(H=128, I=352), dict(activation_dtype="bf16")),
    "several words of scale bytes": (dict(H=1280, I=768), dict()),
    "an odd number of stages": (dict(H=768, I=384), dict()),
}


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_like_the_reference(case, tiles):
    """Every element, for experts with few and many tokens; the same bits each time."""
    sizes, options = CASES[case]
    for size, gemm in ((sizes.get("H", 512), tiles.gemm1), (sizes.get("I", 256), tiles.gemm2)):
        if size <= gemm.more_than:
            pytest.skip(f"the tile takes more than {gemm.more_than} columns")
    for T in (1, 7, 70, 200, 300, 700) if tiles.block_m == 128 else (1, 7, 70, 200, 300):
        assert_like_the_reference(dict(T=T, H=512, I=256, E=5, K=2) | sizes, options, repeats=3, to=on_gpu)


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES, indirect=True)
def test_what_lies_beyond_a_weight_does_not_matter(tiles):
    """NaN in the last columns of a row, and behind them: it stays in the outputs that the row is for."""
    inputs = moe_inputs(T=70, H=576, I=288, E=5, K=2)
    for name, rows in (("w1_scale", ()), ("w2_scale", (0, 5, 575))):
        for row in rows:
            inputs[name][:, row, -1] = 255
            inputs[name][:, row - 1, 0] = 255
    inputs["w1_scale"][3, 287, -1] = inputs["w1_scale"][3, 288, 0] = 255  # the last gate row, and the first one of up
    inputs = on_gpu(inputs)
    want = reference.fused_moe(**inputs)
    assert want.isnan().any(0).sum() > 6 and not want.isnan().all(0).all()
    assert_agrees(OPS.fused_moe(**inputs, backend="triton"), want)


@pytest.mark.parametrize(
    "rows, columns, stages, turns",
    [(128, 64, 3, 1), (128, 64, 4, 1), (128, 128, 2, 1), (128, 256, 3, 1), (64, 256, 4, 1), (64, 256, 4, 2),
     (128, 64, 4, 2)],
)  # fmt: skip
@pytest.mark.parametrize(
    "K, column",
    [(K, K - left) for K in (64, 128, 256, 320, 2048) for left in (64, 27, 128, 91, 155, 219) if left <= K],
)
def test_every_code_with_every_scale(K, column, rows, columns, stages, turns):
    """A weight's row holds one code; what it is multiplied with is 1, so that the product is its value."""
    from torch_mxfp8moe.backends.triton.hopper import warpgroup_gemm_kernel
    from torch_mxfp8moe.backends.triton.launch import Descriptor, Launch, Operand
    from torch_mxfp8moe.backends.triton.memory import PRODUCT_ORDER

    if K <= (turns - 1) * columns:
        pytest.skip(f"the tile takes more than {(turns - 1) * columns} columns")
    box = min(columns, 128)
    E, N = 64, 1024
    codes = torch.zeros(E, 1, N, K, dtype=torch.uint8, device="cuda")
    scale = random_bytes(E, N, K // 32, low=4, high=255).cuda()  # which are not rare: what is rare comes from value
    value = torch.arange(2**16, device="cuda").view(E, N)
    codes[:, 0, :, column] = (value % 256).to(torch.uint8)
    scale[:, :, column // 32] = (value // 256).to(torch.uint8)
    position = sum((column >> bit & 1) << 5 - i for i, bit in enumerate(PRODUCT_ORDER))
    x = torch.zeros(E, K, dtype=torch.bfloat16, device="cuda")
    x[:, column // 64 * 64 + position] = 8.0
    out = torch.empty(E, N, device="cuda")
    experts = torch.arange(E + 1, dtype=torch.int32, device="cuda")
    counters = torch.zeros(2, 2, dtype=torch.int32, device="cuda")
    arguments = dict(
        x=Descriptor(Operand("x", x.dtype), (E, K), (K, 1), (16, 64), swizzle=128).of(x),
        w=Descriptor(Operand("w", codes.dtype), codes.shape, codes.stride(), (1, 1, rows, box), swizzle=box).of(codes),
        w_scale=scale, bias=None, out=out, tiles=torch.stack((experts[:-1], experts[:-1]), 1).contiguous(),
        offsets=experts, routes=experts, topk_weights=None, counters=counters,
        count=E * N // rows, weights_stride=0, alpha=1.0, beta=0.0, limit=0.0, K=K, N=N, GATE_UP=False, MXFP8=False,
        LIMITED=False, BLOCK_M=16, BLOCK_N=rows, COLUMNS=columns, STAGES=stages, TURNS=turns,
        GATHER=False, TOPK=1, OVERLAP=True,
    )  # fmt: skip
    launch = Launch(warpgroup_gemm_kernel, (100,), arguments, dict(num_warps=4, maxnreg=128))
    data = codes[:, 0, :, column].contiguous().view(torch.float8_e4m3fn)
    want = reference.dequantize_1x32(codes.view(E, N, K).view(data.dtype), scale, torch.float32)[:, :, column]
    for _ in range(2):  # which it can be: it leaves the counters as they were
        out.fill_(-7.0)
        launch.run()
        assert_equal(out, (want / 8).bfloat16().float() * 8)  # held divided by 8: the smallest lose their last bits
        assert not counters.any()
