"""``quantize_1x32``: the bytes are torchao's; Inf and NaN are carried on; any shape and row stride."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
import torch_mxfp8moe
from device import DEVICE
from helpers import E4M3, E8M0, FLOATS, MODES, OPS, as_bytes, check_op, generator, kernels, randn, same_bytes, small
from torch_mxfp8moe import formats, reference
from torch_mxfp8moe.arguments import Quantize
from torch_mxfp8moe.backends import registered

QUANTIZERS = {
    "op": lambda x, mode: OPS.quantize_1x32(x, scale_rounding=mode),
    "reference": reference.quantize_1x32,
}


@pytest.fixture(params=QUANTIZERS)
def quantize(request):
    return QUANTIZERS[request.param]


def blocks_of(amax: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """[N] magnitudes -> [N, 32] blocks whose largest magnitude they are, at any place and of either sign.

    The others are anything from the largest down to far below what the scale resolves, with zeros of both signs.
    """
    g, n, amax = generator(seed), len(amax), amax.cpu()
    with torch.device(g.device):
        factor = torch.rand(n, 32, generator=g, dtype=torch.float64)
        factor *= 2.0 ** -torch.randint(0, 24, (n, 32), generator=g)
        factor[:, 1::8] = 0
        factor[:, 3::8] = 2.0 ** -torch.randint(0, 20, (n, 4), generator=g).double()  # ties
        sign = torch.randint(0, 2, (n, 32), generator=g) * 2 - 1
        values = torch.copysign(amax.double().unsqueeze(1) * factor, sign).to(amax.dtype)
        place = torch.randint(0, 32, (n, 1), generator=g)
        return values.scatter(1, place, amax.unsqueeze(1) * sign[:, :1].to(amax.dtype)).to(DEVICE)


def every_exponent(mantissas) -> torch.Tensor:
    """fp32 values of each biased exponent from 0 (subnormal) to 254 with each of the mantissas."""
    bits = torch.arange(255, dtype=torch.int32).unsqueeze(1) << 23 | torch.as_tensor(mantissas, dtype=torch.int32)
    return bits.reshape(-1).view(torch.float32)


def magnitudes(dtype: torch.dtype) -> torch.Tensor:
    """Every positive finite bf16 or fp16; for fp32 a few thousand of them at each exponent's corners and at random."""
    if dtype is not torch.float32:
        values = torch.arange(1, 2**15, dtype=torch.int16).view(dtype)
        return values[values.isfinite()]
    corners = [0, 1, 2, 0x400000, 0x5FFFFF, 0x600000, 0x600001, 0x77FFFF, 0x780000, 0x780001, 0x7FFFFE, 0x7FFFFF]
    at_random = torch.randint(0, 2**23, (40,), generator=generator(1), device="cpu").tolist()
    values = every_exponent(corners + at_random)
    return values[values > 0]


def assert_torchao(x: torch.Tensor, mode: str, data: torch.Tensor, scale: torch.Tensor) -> None:
    """The bytes are those of torchao's ``to_mx``, on a CPU; at scale byte 0, where it differs, the contract's."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    x, data, scale = x.cpu(), data.cpu(), scale.cpu()
    high = x.float() if x.dtype is torch.float16 else x  # torchao takes no fp16
    want_scale, want_data = to_mx(high.contiguous(), E4M3, 32, ScaleCalculationMode[mode.upper()])
    want_scale = want_scale.view(torch.uint8).reshape(scale.shape)
    torch.testing.assert_close(scale, want_scale, rtol=0, atol=0)
    want_data = want_data.view(torch.uint8).reshape(data.shape).clone().unflatten(-1, (-1, 32))
    lowest = want_scale == 0
    at_lowest = x.double().unflatten(-1, (-1, 32))[lowest]
    want_data[lowest] = torch.from_numpy(oracle.encode(at_lowest.numpy() * 2.0**127))
    torch.testing.assert_close(data.view(torch.uint8), want_data.flatten(-2), rtol=0, atol=0)


@kernels
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", (*FLOATS[:2], pytest.param(torch.float32, marks=small)), ids=str)
def test_bytes_of_torchao_at_every_magnitude(quantize, dtype, mode):
    x = blocks_of(magnitudes(dtype))
    data, scale = quantize(x, mode)
    assert (data.dtype, scale.dtype) == (E4M3, torch.uint8)
    lowest, highest = (95, 134) if dtype is torch.float16 else (0, 246)
    assert scale.min() == lowest and scale.max() >= highest
    assert_torchao(x, mode, data, scale)


@kernels
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mantissa", (0, 0x400000, 0x600000, 0x780000, 0x800000), ids=hex)
def test_bytes_of_torchao_around_each_boundary(quantize, mode, mantissa):
    """30 ulp to both sides of where a mode rounds up, at each exponent; fp32 log2 blurs ``rceil``'s boundary so far."""
    around = torch.arange(mantissa - 30, mantissa + 31)
    amax = every_exponent(around[(around >= 0) & (around < 2**23)])
    x = blocks_of(amax, seed=mantissa)
    assert_torchao(x, mode, *quantize(x, mode))


def test_slack_is_what_log2_blurs():
    """``rceil_slack`` is needed: somewhere it differs from the exact ceiling, and never by more than 30 ulp."""
    assert max(formats.RCEIL_SLACK) == 22 and formats.rceil_slack(127) == formats.rceil_slack(126) == 0
    amax = every_exponent(torch.arange(0x600001, 0x600001 + 30)).clamp(min=1e-30)
    exact = torch.tensor([int((float(a) > 448 * oracle.SCALE_VALUES[:-1]).sum()) for a in amax])
    assert (reference.scale_bytes(amax, "rceil") != exact).any()


@small
@kernels
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", (float("inf"), float("-inf"), float("nan")))
def test_blocks_with_inf_or_nan(quantize, dtype, mode, value):
    """They become scale 0xFF and 32 NaN codes, whatever else they hold; their neighbours are untouched."""
    x = randn(32, 3 * 32, dtype=dtype)
    clean = quantize(x, mode)
    x[range(32), range(32, 64)] = value  # each place of the middle block once
    data, scale = quantize(x, mode)
    assert (scale[:, 1] == 0xFF).all()
    assert data[:, 32:64].float().isnan().all()
    for block in (0, 2):
        assert same_bytes(scale[:, block], clean[1][:, block])
        assert same_bytes(data[:, 32 * block :][:, :32], clean[0][:, 32 * block :][:, :32])


@small
@kernels
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zero_blocks(quantize, dtype, mode):
    """Byte 0 and zeros that keep their sign."""
    x = torch.zeros(2, 64, dtype=dtype)
    x[1] = -0.0
    data, scale = quantize(x, mode)
    assert scale.eq(0).all()
    assert data.view(torch.uint8)[0].eq(0).all() and data.view(torch.uint8)[1].eq(0x80).all()


@small
@kernels
@pytest.mark.parametrize("mode", ("floor", "even"))
def test_saturates(quantize, mode):
    """Modes that round the scale down saturate at 448 instead of overflowing to NaN."""
    x = torch.full((1, 32), 1.9)
    x[0, 1] = -1.9
    data, scale = quantize(x, mode)
    assert data.float()[0, :2].tolist() == [448.0, -448.0] and scale.item() == 119


@kernels
@given(
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(0, 6),
    st.sampled_from(FLOATS),
    st.sampled_from(MODES),
    st.integers(0, 2**31),
    st.floats(2**-126, 2**100),
)
def test_any_shape_and_magnitude(lead, blocks, dtype, mode, seed, scale):
    """1-D to 4-D, empty ones too: the op's bytes are the reference's, its results are contiguous."""
    x = randn(*lead, 32 * blocks, seed=seed, scale=scale).nan_to_num().to(dtype)
    data, scale = OPS.quantize_1x32(x, scale_rounding=mode)
    assert data.shape == x.shape and scale.shape == (*lead, blocks)
    assert data.is_contiguous() and scale.is_contiguous()
    want_data, want_scale = reference.quantize_1x32(x, mode)
    assert same_bytes(data, want_data) and same_bytes(scale, want_scale)


@small
@kernels
@given(st.binary(min_size=32 * 4, max_size=32 * 4), st.sampled_from(FLOATS), st.sampled_from(MODES))
def test_any_bits(raw, dtype, mode):
    """Any bit pattern at all, NaNs with payloads included."""
    x = torch.frombuffer(bytearray(raw), dtype=dtype).clone().to(DEVICE)
    for got, want in zip(OPS.quantize_1x32(x, scale_rounding=mode), reference.quantize_1x32(x, mode), strict=True):
        assert same_bytes(got, want)


@small
@kernels
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides_and_alignment(quantize, dtype):
    """Rows at any distance and any alignment, transposed leading dimensions, one row for all."""
    buffer = randn(6 * 5 * 200 + 7, dtype=dtype)
    inputs = {
        "row stride": buffer[: 5 * 200].view(5, 200)[:, 64:160],
        "odd row stride, unaligned": buffer[1:].as_strided((5, 64), (67, 1)),
        "transposed": buffer[3:][: 6 * 5 * 64].view(6, 5, 64).transpose(0, 1),
        "overlapping rows": buffer.as_strided((9, 64), (16, 1)),
        "one row for all": buffer[:32].expand(4, 3, 32),
        "4-D": buffer[: 2 * 3 * 2 * 96].view(2, 3, 2, 96)[:, ::2, :, 32:],
    }
    for name, x in inputs.items():
        assert name == "4-D" or not x.is_contiguous() or x.storage_offset() % 2
        for got, want in zip(quantize(x, "rceil"), quantize(x.contiguous(), "rceil"), strict=True):
            assert got.is_contiguous() and same_bytes(got, want), name


@small
def test_input_seen_through_a_negative_view(quantize):
    x = randn(3, 64)
    for got, want in zip(quantize(x._neg_view(), "rceil"), quantize(-x, "rceil"), strict=True):
        assert same_bytes(got, want)


def outputs_within(x: torch.Tensor, scale_dtype: torch.dtype = torch.uint8):
    """Buffers full of 0xAB, and outputs for x in the middle of them."""
    shapes = x.shape, (*x.shape[:-1], x.shape[-1] // 32)
    buffers = [torch.full((math.prod(shape) + 70,), 0xAB, dtype=torch.uint8, device=DEVICE) for shape in shapes]
    data, scale = (b[35 : b.numel() - 35].view(shape) for b, shape in zip(buffers, shapes, strict=True))
    return buffers, data.view(E4M3), scale.view(scale_dtype)


@small
@kernels
@given(
    st.lists(st.integers(0, 4), max_size=4),
    st.integers(0, 4),
    st.permutations(range(4)),
    st.integers(1, 3),
    st.sampled_from(FLOATS),
    st.sampled_from((torch.uint8, E8M0)),
    st.sampled_from(MODES),
    st.integers(0, 2**31),
)
def test_out_writes_existing_memory(lead, blocks, order, step, dtype, scale_dtype, mode, seed):
    """Rows of any strides into slices of larger buffers: the reference's bytes, and nothing beside them changes."""
    x = randn(*(step * n for n in lead), 32 * blocks + 5, seed=seed, dtype=dtype)
    x = x[(*(slice(None, None, step) for _ in lead), slice(5, None))]
    x = x.permute(*(i for i in order if i < len(lead)), -1)
    before = x.clone()
    buffers, data, scale = outputs_within(x, scale_dtype)
    assert OPS.quantize_1x32.out(x, scale_rounding=mode, out_data=data, out_scale=scale) is None
    want_data, want_scale = reference.quantize_1x32(x, mode)
    assert same_bytes(data, want_data) and same_bytes(scale.view(torch.uint8), want_scale)
    assert all((b[:35] == 0xAB).all() and (b[-35:] == 0xAB).all() for b in buffers)
    assert same_bytes(x, before)


@small
def test_typed_out_returns_what_it_was_given():
    x = randn(3, 64)
    for scale_dtype in (torch.uint8, E8M0):
        _, data, scale = outputs_within(x, scale_dtype)
        got = torch_mxfp8moe.quantize_1x32(x, "even", out=(data, scale))
        assert got[0] is data and got[1] is scale
        want = reference.quantize_1x32(x, "even")
        assert same_bytes(data, want[0]) and same_bytes(scale.view(torch.uint8), want[1])


def test_out_on_the_reference():
    """Which serves no CPU tensor where the C++ kernels are there, but is what they are held to."""
    x = randn(3, 4, 64).transpose(0, 1)
    _, data, scale = outputs_within(x, E8M0)
    registered()["reference"].quantize_1x32(Quantize(x, "ceil", data, scale).check(writes_out=True))
    want = reference.quantize_1x32(x, "ceil")
    assert same_bytes(data, want[0]) and same_bytes(scale.view(torch.uint8), want[1])


def test_typed_entry_point():
    x = randn(3, 64)
    for mode in MODES:
        for got, want in zip(torch_mxfp8moe.quantize_1x32(x, mode), reference.quantize_1x32(x, mode), strict=True):
            assert same_bytes(got, want)
    assert same_bytes(torch_mxfp8moe.quantize_1x32(x)[1], reference.quantize_1x32(x, "rceil")[1])


@kernels
def test_same_bytes_for_every_thread_count():
    x = randn(257, 96, dtype=torch.bfloat16)
    results = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        results.append(torch.cat([as_bytes(part) for part in OPS.quantize_1x32(x)]))
    assert same_bytes(*results)


@small
def test_round_trip_is_exact_on_what_mxfp8_holds():
    """Values of one block's own format come back bit for bit, in every mode that does not round the scale down."""
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32)
    codes = torch.where(codes % 128 == 127, 0x7E, codes)
    codes[:, 0] = 0x7E  # 448 in each block: the scale is then the one these values had
    for byte in (1, 100, 127, 200, 240):
        scale = torch.full((8, 1), byte, dtype=torch.uint8)
        x = torch.tensor(oracle.decode(codes.view(E4M3), scale)).float()
        data, got_scale = OPS.quantize_1x32(x)
        assert torch.equal(got_scale, scale) and torch.equal(data.view(torch.uint8), codes)
        back = OPS.dequantize_1x32(data, got_scale.view(E8M0), dtype=torch.float32)
        assert torch.equal(back, x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", ((4, 64), (32,), (2, 0, 64), (3, 2, 32)), ids=str)
def test_opcheck(dtype, mode, shape):
    check_op(OPS.quantize_1x32.default, (randn(*shape, dtype=dtype),), dict(scale_rounding=mode))


@pytest.mark.parametrize("scale_dtype", (torch.uint8, E8M0), ids=str)
@pytest.mark.parametrize("shape", ((4, 64), (32,), (2, 0, 64), (3, 2, 32)), ids=str)
def test_opcheck_out(shape, scale_dtype):
    x = randn(*shape, dtype=torch.bfloat16)
    data, scale = (torch.empty_like(x) for x in reference.quantize_1x32(x))
    data.view(torch.uint8).zero_()  # opcheck compares values, and NaN is none
    check_op(OPS.quantize_1x32.out, (x,), dict(out_data=data, out_scale=scale.zero_().view(scale_dtype)))


def test_opcheck_strided():
    x = randn(3, 4, 96)
    for view in (x[..., 32:], x.transpose(0, 1), x[:, :1].expand(3, 4, 96), x[..., :32].transpose(0, 1)):
        check_op(OPS.quantize_1x32.default, (view,))
