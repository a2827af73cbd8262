"""On a GPU: real models' expert layers at full size, and the number format on many values, against the reference."""

from functools import partial

import pytest
import torch

from gpu import needs_gpu
from helpers import MODES, OPS, assert_agrees, same_bytes
from shapes import rows
from torch_mxfp8moe import configs, reference

pytestmark = needs_gpu

TOKENS = (0, 1, 2, 3, 16, 17, 64, 65, 255, 256, 1000, 8192)
FEW_TOKENS = (1, 64, 1000)
IN_FULL = (
    "MiniMax-M3 TP4",
    "MiniMax-M3 TP8",
    "Qwen3-30B-A3B TP1",
    "Qwen3-30B-A3B TP4",
    "Hy4-preview TP8",
    "gpt-oss-120b TP1",
)
"""Rows that run with every one of ``TOKENS``; the others run with a few."""


def last_tokens(row):
    """The largest T, up to 8192, of each tile that an H100's file has for calls of ``row``."""
    sizes = dict(hidden=row.hidden, intermediate=row.intermediate, experts=row.experts, topk=row.topk)
    choose = partial(configs.choose, "sm_90", "mxfp8", **sizes, admits=lambda tiles: True)
    return list({choose(tokens=T): T for T in range(1, 8193)}.values())


def cases(tokens_of):
    """(row, T); one process runs those of a row, whose weights it makes once."""
    return [
        pytest.param(name, T, marks=pytest.mark.xdist_group(name))
        for name, row in rows().items()
        for T in tokens_of(row)
    ]


@pytest.fixture(scope="module")
def layer(request):
    """A row and its weights."""
    row = rows()[request.param]
    needed = 3.2 * row.local * row.intermediate * row.hidden + 8e9
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"{row.name} needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")
    torch.manual_seed(0)
    yield row, row.weights()
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    "layer, T", cases(lambda row: TOKENS if row.name in IN_FULL else FEW_TOKENS), indirect=["layer"], scope="module"
)
def test_full_size(layer, T):
    """Every element, in bf16 and fp32, for both activation dtypes, uniform and very skewed routing; the same bits in
    three runs."""
    row, weights = layer
    bf16, fp32 = torch.bfloat16, torch.float32
    for routing, out_dtype, activation in (
        ("uniform", bf16, "mxfp8"), ("uniform", fp32, "bf16"), ("one", fp32, "mxfp8"), ("few", bf16, "mxfp8"),
    ):  # fmt: skip
        inputs = row.tokens(T, routing) | weights
        options = row.options | dict(activation_dtype=activation, out_dtype=out_dtype)
        got = OPS.fused_moe(**inputs, **options, backend="triton")
        assert_agrees(got, reference.fused_moe(**inputs, **options))
        for _ in range(2):
            assert same_bytes(got, OPS.fused_moe(**inputs, **options))


@pytest.mark.parametrize("layer, T", cases(last_tokens), indirect=["layer"], scope="module")
def test_every_tile(layer, T):
    """Every element of a call with each tile of the file that a row's calls take, for both activation dtypes; the same
    bits in three runs."""
    row, weights = layer
    inputs = row.tokens(T) | weights
    for activation in MODES:
        options = row.options | dict(activation_dtype=activation)
        got = OPS.fused_moe(**inputs, **options, backend="triton")
        assert_agrees(got, reference.fused_moe(**inputs, **options))
        for _ in range(2):
            assert same_bytes(got, OPS.fused_moe(**inputs, **options))


def test_the_sum_of_expert_parallel_ranks_is_the_whole():
    """Four ranks with a permuted map each, at Qwen3-30B's size."""
    row = rows()["Qwen3-30B-A3B TP1"]
    weights = row.weights()
    inputs = row.tokens(200, "one")
    whole = OPS.fused_moe(**inputs, **weights, **row.options, out_dtype=torch.float32)
    order = torch.randperm(row.experts, device="cuda")
    total = torch.zeros_like(whole)
    for mine in order.chunk(4):
        expert_map = torch.full((row.experts,), -1, dtype=torch.int32, device="cuda")
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32, device="cuda")
        local = {name: x[mine] for name, x in weights.items()}
        total += OPS.fused_moe(**inputs, **local, **row.options, expert_map=expert_map, out_dtype=torch.float32)
    assert_agrees(total, whole)


def test_a_weight_of_more_than_2_31_elements():
    """Experts whose bytes lie beyond 2^31 (and 2^32), in both layouts' checkpoint order; the last ones are right."""
    E, H, I = 72, 7168, 4352  # noqa: E741
    assert E * 2 * I * H > 2**32
    gate_up = torch.randn(2 * I, H, device="cuda") * H**-0.5
    down = torch.randn(H, I, device="cuda") * I**-0.5
    sizes = dict(device="cuda", dtype=torch.float8_e4m3fn)
    w1, w2 = torch.zeros(E, 2 * I, H, **sizes), torch.zeros(E, H, I, **sizes)
    w1_scale = torch.full((E, 2 * I, H // 32), 127, dtype=torch.uint8, device="cuda")
    w2_scale = torch.full((E, H, I // 32), 127, dtype=torch.uint8, device="cuda")
    for expert in (0, 33, E - 1):
        w1[expert], w1_scale[expert] = OPS.quantize_1x32(gate_up * (expert + 1))
        w2[expert], w2_scale[expert] = OPS.quantize_1x32(down)
    for T in (3, 40, 300):
        x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
        ids = torch.tensor([0, 33, E - 1, 7], device="cuda").repeat(T, 1)
        routing = torch.rand(T, 4, device="cuda")
        inputs = dict(hidden_states=x, w1=w1, w1_scale=w1_scale, w2=w2, w2_scale=w2_scale, topk_weights=routing,
                      topk_ids=ids)  # fmt: skip
        got = OPS.fused_moe(**inputs, backend="triton")
        assert_agrees(got, reference.fused_moe(**inputs))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_quantize_gives_the_cpu_kernels_bytes(dtype):
    """10^8 fp32 values (and 10^7 of each 16-bit dtype) of all magnitudes, in every rounding."""
    rounds, size = (25, 2**22) if dtype is torch.float32 else (3, 2**22)
    generator = torch.Generator().manual_seed(1)
    for i in range(rounds):
        # Blocks around every power of two, values below their largest by all factors, and now and then any bits at all.
        exponent = torch.randint(-149, 128, (size // 32, 1), generator=generator, device="cpu").float()
        below = torch.rand(size // 32, 32, generator=generator, device="cpu") * (i % 5) * 4
        x = torch.randn(size // 32, 32, generator=generator, device="cpu") * torch.exp2(exponent - below)
        if i % 5 == 4:
            bits = torch.randint(-(2**31), 2**31, x.shape, generator=generator, device="cpu", dtype=torch.int32)
            x = bits.view(torch.float32)
        if i % 5 == 0:  # just around the points where the scale changes
            ulp = torch.randint(-30, 31, (size // 32,), generator=generator, device="cpu", dtype=torch.int32)
            x[:, 0] = (torch.exp2(exponent[:, 0]) * 1.75).view(torch.int32).add_(ulp).view(torch.float32)
        x = x.to(dtype)
        on_gpu = x.cuda()
        for mode in MODES if i < 10 else ("rceil",):
            want = OPS.quantize_1x32(x, scale_rounding=mode)
            got = OPS.quantize_1x32(on_gpu, scale_rounding=mode)
            assert same_bytes(got[0].cpu(), want[0]) and same_bytes(got[1].cpu(), want[1]), (i, mode)
