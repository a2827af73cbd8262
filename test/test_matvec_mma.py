"""Route by route on sm_90's matrix unit, with tiles that small calls would not get, against the reference: on a GPU,
and without one its PTX, executed by test/ptx.py."""

import re
from itertools import cycle

import pytest
import torch

import ptx
from forced_tiles import CASES, assert_like_the_reference
from gpu import needs_sm_90, on_gpu
from helpers import DEVICE, OPS, assert_agrees, assert_equal, moe_inputs, random_bytes, same_bytes
from torch_mxfp8moe import reference
from torch_mxfp8moe.arguments import FusedMoe
from torch_mxfp8moe.configs import Gemm, Tiles



pytest.importorskip("triton", reason="needs Triton: pip install triton")
from torch_mxfp8moe.backends.triton import _interpreted  # noqa: E402

without_gpu = pytest.mark.skipif(
    DEVICE.type != "cpu" or _interpreted(), reason="compiled for CPU tensors, with TRITON_INTERPRET not set"
)


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


@needs_sm_90
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_like_the_reference(case, tiles):
    """Every element; the same bits each time."""
    sizes, options = CASES[case]
    for T in (1, 3, 9):
        assert_like_the_reference(dict(T=T, H=512, I=256, E=5, K=2) | sizes, options, repeats=3, to=on_gpu)


@needs_sm_90
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


@needs_sm_90
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


@needs_sm_90
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


# Without a GPU


def execute(inputs: dict, tiles: Tiles, options: dict, change=lambda ptx: ptx) -> torch.Tensor:
    """What both kernels' PTX makes of a call, with ``change`` to it."""
    from torch_mxfp8moe.backends.triton import fused_moe
    from torch_mxfp8moe.backends.triton.launch import compile_offline
    from torch_mxfp8moe.backends.triton.targets import Target

    call = FusedMoe(**inputs, **options).check().with_out()
    launches = fused_moe.plan(call, Target("sm_90"), tiles).bind(call.inputs | {"out": call.out}, call.device)
    for launch in launches:
        if "inner" in launch.arguments and "out" not in launch.arguments:
            launch.arguments["inner"].fill_(torch.nan)  # what is there before, of routes that go nowhere too
    call.out.fill_(torch.nan)
    for launch, kernel in zip(launches, compile_offline(launches, Target("sm_90"))):
        ptx.run(change(kernel.asm["ptx"]), kernel, launch)
    return call.out


EXECUTED = {
    "plain": (dict(), dict()),
    "several trips": (dict(T=1, H=544, K=1), dict()),
    "whole chunks, several for each route": (dict(T=1, H=512, I=288), dict()),
    "bf16 activations": (dict(), dict(activation_dtype="bf16")),
    "fp32, rows at odd addresses": (dict(dtype=torch.float32), dict()),
    "rows at odd addresses": (dict(), dict()),
    "MXFP8 input, rows at odd addresses": (dict(scaled=True), dict(out_dtype=torch.float32)),
    "fp16, biases and limits": (
        dict(dtype=torch.float16, bias_dtype=torch.float32),
        dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=0.5),
    ),
    "router weight on the input": (
        dict(K=1, weight_dtype=torch.bfloat16, id_dtype=torch.int64), dict(apply_router_weight_on_input=True)
    ),
    "expert map, biases, tokens that are none": (dict(T=3, G=9, K=4, bias_dtype=torch.bfloat16), dict()),
    "most routes": (dict(T=1, H=64, I=32, E=40, K=32), dict()),
}  # fmt: skip


@without_gpu
@pytest.mark.parametrize("case, warps", list(zip(EXECUTED, cycle(((1, 2), (4, 1))))))
def test_executed(case, warps):
    sizes, options = EXECUTED[case]
    inputs = moe_inputs(**dict(T=2, H=288, I=32, E=5, K=2) | sizes)
    if inputs["topk_ids"].shape[1] > 1:
        inputs["topk_ids"][0, 3:-1] = -1
        inputs["topk_ids"][0, -1] = -7
        inputs["topk_weights"][0, -1] = torch.nan  # of a route that goes nowhere
    if "G" in sizes:
        inputs["expert_map"] = torch.tensor([3, -1, 0, 4, 7, 1, -5, -1, 2], dtype=torch.int32)
        inputs["num_tokens"] = torch.tensor(2, dtype=torch.int32)
        inputs["topk_weights"][2] = torch.inf
    if "odd" in case:
        x = inputs["hidden_states"]
        wide = torch.zeros(len(x), x.shape[1] + 3, dtype=torch.float32).to(x.dtype)
        inputs["hidden_states"] = wide[:, 1:-2].copy_(x)
    want = reference.fused_moe(**inputs, **options)
    assert want[0].isfinite().all() and want[0].any()
    assert_agrees(execute(inputs, tiles(*warps), options), want)


MUTATIONS = {
    "another lane's factor": ("add.u32 lane, lane, 6;", "add.u32 lane, lane, 2;", "relative L2"),
    "rows of a product exchanged": (r"\{a0, a1, a2, a3\}", "{a1, a0, a3, a2}", "relative L2"),
    "no barrier": (r"\tbar\.sync[^\n]*\n", "", "nothing orders them"),
    "masks turned around": (r"@(%p\d+) (ld\.global\.v4)", r"@!\1 \2", "relative L2|of no tensor"),
    "an unknown instruction": (r"fma\.rn\.f32", "fma.rp.f32", "is not known"),
}


@without_gpu
def test_the_emulator_is_on_the_cpu():
    """Whatever the default device is: with that of a GPU, this file could not be imported."""
    with torch.device("meta"):
        assert (ptx._e4m3_values().view("u2") == ptx.E4M3.view("u2")).all()


@without_gpu
@pytest.mark.parametrize("name", MUTATIONS)
def test_what_execution_finds(name):
    """Errors that are planted in the text."""
    pattern, replacement, message = MUTATIONS[name]
    inputs = moe_inputs(T=1, H=288, I=32, E=5, K=2)
    planted = []

    def change(text):
        changed, count = re.subn(pattern, replacement, text)
        planted.append(count)
        return changed

    with pytest.raises(AssertionError, match=message):
        assert_agrees(execute(inputs, tiles(2, 2), {}, change), reference.fused_moe(**inputs))
    assert any(planted)
