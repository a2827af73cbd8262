"""``dequantize_1x32``: every combination of scale byte and code, correctly rounded; shapes and strides."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
import torch_mxfp8moe
from helpers import E4M3, E8M0, FLOATS, OPS, assert_equal, check_op, kernels, random_bytes, same_bytes, small
from torch_mxfp8moe import reference

DEQUANTIZERS = {
    "op": lambda data, scale, dtype: OPS.dequantize_1x32(data, scale, dtype=dtype),
    "reference": reference.dequantize_1x32,
}


@pytest.fixture(params=DEQUANTIZERS)
def dequantize(request):
    return DEQUANTIZERS[request.param]


def every_combination() -> tuple[torch.Tensor, torch.Tensor]:
    """data [256, 256], in each row every code; scale [256, 8], each row another byte."""
    byte = torch.arange(256, dtype=torch.uint8)
    return byte.repeat(256, 1).view(E4M3), byte.unsqueeze(1).repeat(1, 8)


@small
@kernels
@pytest.mark.parametrize("scale_dtype", (torch.uint8, E8M0), ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_scale_and_code(dequantize, dtype, scale_dtype):
    data, scale = every_combination()
    got = dequantize(data, scale.view(scale_dtype), dtype)
    assert got.dtype == dtype
    exact = oracle.decode(data, scale)
    want = oracle.round_to(exact, *oracle.FORMATS[dtype])
    values = oracle.array(got)
    np.testing.assert_array_equal(values, want)
    signed = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(values)[signed], np.signbit(exact)[signed])
    if dtype is torch.float32:  # exact wherever fp32 can hold it
        held = np.abs(exact) < 2.0**128
        np.testing.assert_array_equal(values[held], exact[held])
    assert got[255].isnan().all() and got[:, [0x7F, 0xFF]].isnan().all()
    assert got[:255].isnan().sum() == 2 * 255


@kernels
@given(st.lists(st.integers(0, 4), max_size=3), st.integers(0, 5), st.sampled_from(FLOATS), st.integers(0, 2**31))
def test_any_shape(lead, blocks, dtype, seed):
    data = random_bytes(*lead, 32 * blocks, seed=seed).view(E4M3)
    scale = random_bytes(*lead, blocks, seed=seed + 1)
    got = OPS.dequantize_1x32(data, scale, dtype=dtype)
    assert got.shape == data.shape and got.is_contiguous()
    assert_equal(got, reference.dequantize_1x32(data, scale, dtype))


@small
@kernels
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides_and_alignment(dequantize, dtype):
    data, scale = random_bytes(6, 4, 163).view(E4M3), random_bytes(6, 4, 9, high=255)
    inputs = {
        "row stride, unaligned": (data[0, :, 1:129], scale[0, :, 3:7]),
        "transposed": (data[:, :, :64].transpose(0, 1), scale[:, :, :2].transpose(0, 1)),
        "one row for all": (data[0, 0, :32].expand(5, 32), scale[0, 0, :1].expand(5, 1)),
        "one block each, scale column": (data[0, :, 5:37], scale[0, :, 2:3]),
    }
    for name, (d, s) in inputs.items():
        assert not d.is_contiguous() or not s.is_contiguous(), name
        got = dequantize(d, s, dtype)
        assert got.is_contiguous(), name
        assert_equal(got, dequantize(d.contiguous(), s.contiguous(), dtype))


@small
def test_typed_entry_point():
    data, scale = random_bytes(3, 64).view(E4M3), random_bytes(3, 2)
    for dtype in FLOATS:
        for view in (scale, scale.view(E8M0)):
            got = torch_mxfp8moe.dequantize_1x32(data, view, dtype)
            assert_equal(got, reference.dequantize_1x32(data, scale, dtype))
    assert torch_mxfp8moe.dequantize_1x32(data, scale).dtype == torch.float32


@kernels
def test_same_bytes_for_every_thread_count():
    data, scale = every_combination()
    results = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        results.append(OPS.dequantize_1x32(data, scale, dtype=torch.bfloat16))
    assert same_bytes(*results)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale_dtype", (torch.uint8, E8M0), ids=str)
@pytest.mark.parametrize("shape", ((4, 64), (32,), (0, 64), (3, 2, 32)), ids=str)
def test_opcheck(dtype, scale_dtype, shape):
    data = random_bytes(*shape, high=0x7F).view(E4M3)
    scale = random_bytes(*shape[:-1], shape[-1] // 32, low=100, high=140).view(scale_dtype)
    check_op(OPS.dequantize_1x32.default, (data, scale), dict(dtype=dtype))


def test_opcheck_strided():
    data, scale = random_bytes(6, 4, 96, high=0x7F).view(E4M3), random_bytes(6, 4, 3, low=100, high=140)
    for d, s in ((data.transpose(0, 1), scale.transpose(0, 1)), (data[..., 32:], scale[..., 1:])):
        check_op(OPS.dequantize_1x32.default, (d, s), dict(dtype=torch.float32))
