"""Wrong arguments: each is an error that names the op, the argument, what it got and what it takes; nothing crashes."""

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from expecttest import assert_expected_inline
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_mxfp8moe
from device import DEVICE
from helpers import BACKEND, E4M3, E8M0, ERRORS, OPS, as_bytes, error_of, moe_inputs, randn, run_python

NAN, INF = float("nan"), float("inf")


def valid() -> dict[str, tuple[Callable, dict]]:
    """A valid call of every op and overload, by name: the op and its arguments."""
    moe = moe_inputs(T=4, H=64, I=32, E=3, K=2)
    data, scale = torch_mxfp8moe.quantize_1x32(randn(4, 64))
    shuffle = dict(weight=moe["w1"], scale=moe["w1_scale"], layout="row_major", gate_up=True)
    outputs = dict(out_weight=torch.empty_like(moe["w1"]), out_scale=torch.empty_like(moe["w1_scale"]))
    rows = dict(x=randn(3, 64, 64), layout="row_major", gate_up=True)
    return {
        "quantize_1x32": (OPS.quantize_1x32, dict(x=randn(4, 64))),
        "quantize_1x32.out": (
            OPS.quantize_1x32.out,
            dict(x=randn(4, 64), out_data=torch.empty_like(data), out_scale=torch.empty_like(scale)),
        ),
        "dequantize_1x32": (OPS.dequantize_1x32, dict(data=data, scale=scale, dtype=torch.float32)),
        "preshuffle": (OPS.preshuffle, shuffle),
        "preshuffle.out": (OPS.preshuffle.out, shuffle | outputs),
        "quantize_preshuffle": (OPS.quantize_preshuffle, rows),
        "quantize_preshuffle.out": (OPS.quantize_preshuffle.out, rows | outputs),
        "fused_moe": (OPS.fused_moe, moe),
        "fused_moe.out": (OPS.fused_moe.out, moe | dict(out=torch.zeros(4, 64))),
    }


CALLS = valid()


def message(name: str, **wrong) -> str:
    """Of the error that a call raises with some arguments wrong; the same whether C++ or Python is asked first.

    It calls the device that is tested cpu, whatever it is.
    """
    op, arguments = CALLS[name]
    arguments = arguments | wrong
    text = error_of(lambda: op(**arguments))
    if name.startswith("fused_moe") and "backend" not in wrong:
        assert error_of(lambda: op(**arguments, backend="reference")) == text
    return text.replace(str(DEVICE), "cpu")


def messages(name: str, *changes: dict) -> str:
    return "\n".join(message(name, **wrong) for wrong in changes)


def argument(name: str, key: str) -> torch.Tensor:
    return CALLS[name][1][key]


def every_second_column(x: torch.Tensor) -> torch.Tensor:
    """The same shape with a last stride of 2."""
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


def padded_rows(x: torch.Tensor) -> torch.Tensor:
    """The same shape with gaps between the rows."""
    return torch.cat([x.view(torch.uint8), x.view(torch.uint8)], -1)[..., : x.shape[-1]].view(x.dtype)


def wrong_dtypes(name: str, key: str, *dtypes: torch.dtype) -> list[dict]:
    return [{key: torch.empty(argument(name, key).shape, dtype=dtype)} for dtype in dtypes]


# --- messages


def test_quantize_1x32():
    x = argument("quantize_1x32", "x")
    assert_expected_inline(
        messages(
            "quantize_1x32",
            *wrong_dtypes("quantize_1x32", "x", torch.int32, torch.float64, E4M3, torch.complex64),
            dict(x=None),
            dict(x=torch.tensor(1.0)),
            dict(x=x[:, :33]),
            dict(x=x[:, :31].contiguous()),
            dict(x=every_second_column(x)),
            dict(x=x[:1, :1].expand(4, 64)),
            dict(x=x.to_sparse()),
            dict(x=x.cpu().to_mkldnn()),
            dict(scale_rounding="RCEIL"),
            dict(scale_rounding=""),
        ),
        """\
quantize_1x32: x has dtype int32; it takes bfloat16, float16 or float32
quantize_1x32: x has dtype float64; it takes bfloat16, float16 or float32
quantize_1x32: x has dtype float8_e4m3fn; it takes bfloat16, float16 or float32
quantize_1x32: x has dtype complex64; it takes bfloat16, float16 or float32
quantize_1x32: x is None; it takes a tensor of bfloat16, float16 or float32
quantize_1x32: x has 0 dimensions; it takes 1 or more, [..., C]
quantize_1x32: x has 33 columns; it takes a last dimension divisible by 32
quantize_1x32: x has 31 columns; it takes a last dimension divisible by 32
quantize_1x32: x has strides [128, 2]; it takes a last stride of 1 (call .contiguous())
quantize_1x32: x has strides [0, 0]; it takes a last stride of 1 (call .contiguous())
quantize_1x32: x has layout torch.sparse_coo; it takes torch.strided
quantize_1x32: x has layout torch._mkldnn; it takes torch.strided
quantize_1x32: scale_rounding is 'RCEIL'; it takes 'rceil', 'floor', 'ceil' or 'even'
quantize_1x32: scale_rounding is ''; it takes 'rceil', 'floor', 'ceil' or 'even'""",
    )


def test_quantize_1x32_out():
    x, out_data, out_scale = (argument("quantize_1x32.out", key) for key in ("x", "out_data", "out_scale"))
    shared = torch.empty(4 * 64 + 4 * 2, dtype=torch.uint8)
    both = dict(out_data=shared[: 4 * 64].view(4, 64).view(E4M3), out_scale=shared[4 * 64 - 1 : -1].view(4, 2))
    assert_expected_inline(
        messages(
            "quantize_1x32.out",
            *wrong_dtypes("quantize_1x32.out", "x", torch.float64),
            dict(x=x[:, :33]),
            dict(scale_rounding="RCEIL"),
            *wrong_dtypes("quantize_1x32.out", "out_data", torch.uint8, torch.bfloat16),
            *wrong_dtypes("quantize_1x32.out", "out_scale", torch.int8, torch.float32),
            dict(out_data=None),
            dict(out_scale=None),
            dict(out_data=None, out_scale=None),
            dict(out_data=out_data[:3]),
            dict(out_data=out_data[0]),
            dict(out_scale=out_scale[:, :1]),
            dict(out_scale=out_scale.unsqueeze(0)),
            dict(out_data=padded_rows(out_data)),
            dict(out_data=out_data[:1].expand(4, -1)),
            dict(out_scale=padded_rows(out_scale)),
            dict(out_scale=every_second_column(out_scale)),
            dict(out_data=out_data.to("meta")),
            dict(out_scale=out_scale.to("meta")),
            dict(out_scale=out_scale.to_sparse()),
            dict(out_data=x.view(torch.uint8).flatten()[-256:].view(4, 64).view(E4M3)),
            dict(out_scale=x.view(torch.uint8).flatten()[:8].view(4, 2)),
            dict(out_scale=out_data.view(torch.uint8).flatten()[8:16].view(4, 2)),
            both,
        ),
        """\
quantize_1x32: x has dtype float64; it takes bfloat16, float16 or float32
quantize_1x32: x has 33 columns; it takes a last dimension divisible by 32
quantize_1x32: scale_rounding is 'RCEIL'; it takes 'rceil', 'floor', 'ceil' or 'even'
quantize_1x32: out_data has dtype uint8; it takes float8_e4m3fn
quantize_1x32: out_data has dtype bfloat16; it takes float8_e4m3fn
quantize_1x32: out_scale has dtype int8; it takes uint8 or float8_e8m0fnu
quantize_1x32: out_scale has dtype float32; it takes uint8 or float8_e8m0fnu
quantize_1x32: out_data is None; it takes a tensor of float8_e4m3fn
quantize_1x32: out_scale is None; it takes a tensor of uint8 or float8_e8m0fnu
quantize_1x32: out_data and out_scale are None; they take tensors
quantize_1x32: out_data has shape [3, 64]; it takes [4, 64] (the shape of x)
quantize_1x32: out_data has 1 dimensions; it takes [4, 64] (the shape of x)
quantize_1x32: out_scale has shape [4, 1]; it takes [4, 2] (the shape of x, C/32 for C)
quantize_1x32: out_scale has 3 dimensions; it takes [4, 2] (the shape of x, C/32 for C)
quantize_1x32: out_data has strides [128, 1]; it takes contiguous memory
quantize_1x32: out_data has strides [0, 1]; it takes contiguous memory
quantize_1x32: out_scale has strides [4, 1]; it takes contiguous memory
quantize_1x32: out_scale has strides [4, 2]; it takes a last stride of 1 (call .contiguous())
quantize_1x32: out_data is on meta; it takes the device of x, cpu
quantize_1x32: out_scale is on meta; it takes the device of x, cpu
quantize_1x32: out_scale has layout torch.sparse_coo; it takes torch.strided
quantize_1x32: out_data shares memory with x; it takes memory of its own, since inputs are read while it is written
quantize_1x32: out_scale shares memory with x; it takes memory of its own, since inputs are read while it is written
quantize_1x32: out_scale shares memory with out_data; it takes memory of its own, since inputs are read while it is written
quantize_1x32: out_scale shares memory with out_data; it takes memory of its own, since inputs are read while it is written""",
    )


def test_dequantize_1x32():
    data, scale = argument("dequantize_1x32", "data"), argument("dequantize_1x32", "scale")
    assert_expected_inline(
        messages(
            "dequantize_1x32",
            *wrong_dtypes("dequantize_1x32", "data", torch.uint8, torch.float8_e5m2, torch.float32),
            *wrong_dtypes("dequantize_1x32", "scale", torch.int8, torch.float32),
            dict(data=None),
            dict(scale=None),
            *(dict(dtype=dtype) for dtype in (torch.float64, torch.int8, E4M3)),
            dict(data=data[0, 0]),
            dict(data=data[:, :48]),
            dict(scale=scale[:, :1]),
            dict(scale=scale[:3]),
            dict(scale=scale[0]),
            dict(scale=scale.unsqueeze(0)),
            dict(data=every_second_column(data.view(torch.uint8)).view(E4M3)),
            dict(scale=every_second_column(scale)),
            dict(scale=scale.to("meta")),
            dict(scale=scale.to_sparse()),
        ),
        """\
dequantize_1x32: data has dtype uint8; it takes float8_e4m3fn
dequantize_1x32: data has dtype float8_e5m2; it takes float8_e4m3fn
dequantize_1x32: data has dtype float32; it takes float8_e4m3fn
dequantize_1x32: scale has dtype int8; it takes uint8 or float8_e8m0fnu
dequantize_1x32: scale has dtype float32; it takes uint8 or float8_e8m0fnu
dequantize_1x32: data is None; it takes a tensor of float8_e4m3fn
dequantize_1x32: scale is None; it takes a tensor of uint8 or float8_e8m0fnu
dequantize_1x32: dtype is float64; it takes bfloat16, float16 or float32
dequantize_1x32: dtype is int8; it takes bfloat16, float16 or float32
dequantize_1x32: dtype is float8_e4m3fn; it takes bfloat16, float16 or float32
dequantize_1x32: data has 0 dimensions; it takes 1 or more, [..., C]
dequantize_1x32: data has 48 columns; it takes a last dimension divisible by 32
dequantize_1x32: scale has shape [4, 1]; it takes [4, 2] (the shape of data, C/32 for C)
dequantize_1x32: scale has shape [3, 2]; it takes [4, 2] (the shape of data, C/32 for C)
dequantize_1x32: scale has 1 dimensions; it takes [4, 2] (the shape of data, C/32 for C)
dequantize_1x32: scale has 3 dimensions; it takes [4, 2] (the shape of data, C/32 for C)
dequantize_1x32: data has strides [128, 2]; it takes a last stride of 1 (call .contiguous())
dequantize_1x32: scale has strides [4, 2]; it takes a last stride of 1 (call .contiguous())
dequantize_1x32: scale is on meta; it takes the device of data, cpu
dequantize_1x32: scale has layout torch.sparse_coo; it takes torch.strided""",
    )


def test_preshuffle():
    weight, scale = argument("preshuffle", "weight"), argument("preshuffle", "scale")
    assert_expected_inline(
        messages(
            "preshuffle",
            *wrong_dtypes("preshuffle", "weight", torch.uint8, torch.bfloat16),
            *wrong_dtypes("preshuffle", "scale", torch.int8, torch.float32),
            dict(weight=None),
            dict(scale=None),
            dict(layout="aiter"),
            dict(weight=weight[0]),
            dict(weight=weight[None]),
            dict(weight=weight[:, :, :48]),
            dict(weight=weight[:, :, :0], scale=scale[:, :, :0]),
            dict(weight=weight[:, :0], scale=scale[:, :0]),
            dict(weight=weight[:, :32], scale=scale[:, :32]),
            dict(weight=weight[:, :33], scale=scale[:, :33], gate_up=False),
            dict(weight=weight[:, :48], scale=scale[:, :48], gate_up=False),
            dict(scale=scale[0]),
            dict(scale=scale[:2]),
            dict(scale=scale[:, :32]),
            dict(scale=scale[:, :, :1]),
            dict(weight=padded_rows(weight)),
            dict(weight=weight[::2], scale=scale[::2]),
            dict(scale=padded_rows(scale)),
            dict(scale=scale.to("meta")),
            *(dict(pad_to=pad_to) for pad_to in (0, -1, -32, 33, 48, 2**40, 2**62)),
            dict(layout="aiter_gfx950"),
            dict(layout="aiter_gfx950", pad_to=128),
            dict(weight=weight.view(torch.uint8).to_sparse()),
        ),
        """\
preshuffle: weight has dtype uint8; it takes float8_e4m3fn
preshuffle: weight has dtype bfloat16; it takes float8_e4m3fn
preshuffle: scale has dtype int8; it takes uint8 or float8_e8m0fnu
preshuffle: scale has dtype float32; it takes uint8 or float8_e8m0fnu
preshuffle: weight is None; it takes a tensor of float8_e4m3fn
preshuffle: scale is None; it takes a tensor of uint8 or float8_e8m0fnu
preshuffle: layout is 'aiter'; it takes 'row_major' or 'aiter_gfx950'
preshuffle: weight has 2 dimensions; it takes 3, [E, 2I, H]
preshuffle: weight has 4 dimensions; it takes 3, [E, 2I, H]
preshuffle: weight has 48 columns; it takes a last dimension divisible by 32
preshuffle: weight has shape [3, 64, 0]; it takes no empty rows or columns
preshuffle: weight has shape [3, 0, 64]; it takes no empty rows or columns
preshuffle: weight has 32 rows; it takes 2I rows, I divisible by 32, when gate_up is True
preshuffle: weight has 33 rows; it takes H rows, H divisible by 32
preshuffle: weight has 48 rows; it takes H rows, H divisible by 32
preshuffle: scale has 2 dimensions; it takes [3, 64, 2] (the shape of weight, C/32 for C)
preshuffle: scale has shape [2, 64, 2]; it takes [3, 64, 2] (the shape of weight, C/32 for C)
preshuffle: scale has shape [3, 32, 2]; it takes [3, 64, 2] (the shape of weight, C/32 for C)
preshuffle: scale has shape [3, 64, 1]; it takes [3, 64, 2] (the shape of weight, C/32 for C)
preshuffle: weight has strides [8192, 128, 1]; it takes contiguous memory
preshuffle: weight has strides [8192, 64, 1]; it takes contiguous memory
preshuffle: scale has strides [256, 4, 1]; it takes contiguous memory
preshuffle: scale is on meta; it takes the device of weight, cpu
preshuffle: pad_to is 0; it takes 1 or a positive multiple of 32, at most 65536
preshuffle: pad_to is -1; it takes 1 or a positive multiple of 32, at most 65536
preshuffle: pad_to is -32; it takes 1 or a positive multiple of 32, at most 65536
preshuffle: pad_to is 33; it takes 1 or a positive multiple of 32, at most 65536
preshuffle: pad_to is 48; it takes 1 or a positive multiple of 32, at most 65536
preshuffle: pad_to is 1099511627776; it takes 1 or a positive multiple of 32, at most 65536
preshuffle: pad_to is 4611686018427387904; it takes 1 or a positive multiple of 32, at most 65536
preshuffle: weight does not fit: layout 'aiter_gfx950' takes hidden sizes divisible by 256, not 64; pad_to rounds the intermediate size up
preshuffle: weight does not fit: layout 'aiter_gfx950' takes hidden sizes divisible by 256, not 64; pad_to rounds the intermediate size up
preshuffle: weight has dtype uint8; it takes float8_e4m3fn""",
    )


def test_preshuffle_out():
    weight, scale = argument("preshuffle.out", "weight"), argument("preshuffle.out", "scale")
    out_weight, out_scale = argument("preshuffle.out", "out_weight"), argument("preshuffle.out", "out_scale")
    shared = torch.empty(weight.numel() + scale.numel(), dtype=torch.uint8)
    both = dict(
        out_weight=shared[: weight.numel()].view(weight.shape).view(E4M3),
        out_scale=shared[weight.numel() - 1 : -1].view(scale.shape),
    )
    assert_expected_inline(
        messages(
            "preshuffle.out",
            *wrong_dtypes("preshuffle.out", "out_weight", torch.uint8, torch.bfloat16),
            *wrong_dtypes("preshuffle.out", "out_scale", torch.int8, torch.float32),
            dict(out_weight=None),
            dict(out_scale=None),
            dict(out_weight=out_weight[:2]),
            dict(out_weight=out_weight[0]),
            dict(out_scale=out_scale.flatten(0, 1)),
            dict(pad_to=128),
            dict(out_weight=padded_rows(out_weight)),
            dict(out_scale=padded_rows(out_scale)),
            dict(out_weight=out_weight[:1].expand(3, -1, -1)),
            dict(out_weight=out_weight.to("meta")),
            dict(out_scale=out_scale.to("meta")),
            dict(out_weight=weight),
            dict(out_scale=scale),
            dict(out_scale=weight.view(torch.uint8).view(-1)[: scale.numel()].view(scale.shape)),
            both,
        ),
        """\
preshuffle: out_weight has dtype uint8; it takes float8_e4m3fn
preshuffle: out_weight has dtype bfloat16; it takes float8_e4m3fn
preshuffle: out_scale has dtype int8; it takes uint8 or float8_e8m0fnu
preshuffle: out_scale has dtype float32; it takes uint8 or float8_e8m0fnu
preshuffle: out_weight is None; it takes a tensor of float8_e4m3fn
preshuffle: out_scale is None; it takes a tensor of uint8 or float8_e8m0fnu
preshuffle: out_weight has shape [2, 64, 64]; it takes [3, 64, 64] (E, R, C, I rounded up to pad_to)
preshuffle: out_weight has 2 dimensions; it takes [3, 64, 64] (E, R, C, I rounded up to pad_to)
preshuffle: out_scale has 2 dimensions; it takes [3, 64, 2] (the layout's scale shape)
preshuffle: out_weight has shape [3, 64, 64]; it takes [3, 256, 64] (E, R, C, I rounded up to pad_to)
preshuffle: out_weight has strides [8192, 128, 1]; it takes contiguous memory
preshuffle: out_scale has strides [256, 4, 1]; it takes contiguous memory
preshuffle: out_weight has strides [0, 64, 1]; it takes contiguous memory
preshuffle: out_weight is on meta; it takes the device of weight, cpu
preshuffle: out_scale is on meta; it takes the device of weight, cpu
preshuffle: out_weight shares memory with weight; it takes memory of its own, since inputs are read while it is written
preshuffle: out_scale shares memory with scale; it takes memory of its own, since inputs are read while it is written
preshuffle: out_scale shares memory with weight; it takes memory of its own, since inputs are read while it is written
preshuffle: out_scale shares memory with out_weight; it takes memory of its own, since inputs are read while it is written""",
    )


def test_quantize_preshuffle():
    x = argument("quantize_preshuffle", "x")
    assert_expected_inline(
        messages(
            "quantize_preshuffle",
            *wrong_dtypes("quantize_preshuffle", "x", torch.float64, E4M3),
            dict(x=None),
            dict(scale_rounding="RCEIL"),
            dict(layout="aiter"),
            dict(x=x[0]),
            dict(x=x[None, None]),
            dict(x=x[0], gate_up=False),
            dict(x=x.unflatten(1, (2, 32)), gate_up=False),
            dict(x=x.unflatten(1, (1, 64))),
            dict(x=x.unflatten(1, (32, 2))),
            dict(x=x[:, :, :48]),
            dict(x=x[:, :, :0]),
            dict(x=x[:, :0]),
            dict(x=x[:, :32]),
            dict(x=x.unflatten(1, (2, 32))[:, :, :16]),
            dict(x=x[:, :48], gate_up=False),
            dict(x=every_second_column(x)),
            dict(x=x.to_sparse()),
            dict(pad_to=33),
            dict(layout="aiter_gfx950", pad_to=128),
        ),
        """\
quantize_preshuffle: x has dtype float64; it takes bfloat16, float16 or float32
quantize_preshuffle: x has dtype float8_e4m3fn; it takes bfloat16, float16 or float32
quantize_preshuffle: x is None; it takes a tensor of bfloat16, float16 or float32
quantize_preshuffle: scale_rounding is 'RCEIL'; it takes 'rceil', 'floor', 'ceil' or 'even'
quantize_preshuffle: layout is 'aiter'; it takes 'row_major' or 'aiter_gfx950'
quantize_preshuffle: x has 2 dimensions; it takes 3, [E, 2I, H], or 4, [E, 2, I, H]
quantize_preshuffle: x has 5 dimensions; it takes 3, [E, 2I, H], or 4, [E, 2, I, H]
quantize_preshuffle: x has 2 dimensions; it takes 3, [E, H, I]
quantize_preshuffle: x has 4 dimensions; it takes 3, [E, H, I]
quantize_preshuffle: x has shape [3, 1, 64, 64]; it takes [E, 2, I, H]
quantize_preshuffle: x has shape [3, 32, 2, 64]; it takes [E, 2, I, H]
quantize_preshuffle: x has 48 columns; it takes a last dimension divisible by 32
quantize_preshuffle: x has shape [3, 64, 0]; it takes no empty rows or columns
quantize_preshuffle: x has shape [3, 0, 64]; it takes no empty rows or columns
quantize_preshuffle: x has 32 rows; it takes 2I rows, I divisible by 32, when gate_up is True
quantize_preshuffle: x has 32 rows; it takes 2I rows, I divisible by 32, when gate_up is True
quantize_preshuffle: x has 48 rows; it takes H rows, H divisible by 32
quantize_preshuffle: x has strides [8192, 128, 2]; it takes a last stride of 1 (call .contiguous())
quantize_preshuffle: x has layout torch.sparse_coo; it takes torch.strided
quantize_preshuffle: pad_to is 33; it takes 1 or a positive multiple of 32, at most 65536
quantize_preshuffle: x does not fit: layout 'aiter_gfx950' takes hidden sizes divisible by 256, not 64; pad_to rounds the intermediate size up""",
    )


def test_quantize_preshuffle_out():
    name = "quantize_preshuffle.out"
    x, out_weight, out_scale = (argument(name, key) for key in ("x", "out_weight", "out_scale"))
    assert_expected_inline(
        messages(
            name,
            *wrong_dtypes(name, "out_weight", torch.uint8, torch.bfloat16),
            *wrong_dtypes(name, "out_scale", torch.int8),
            dict(out_weight=None),
            dict(out_scale=None),
            dict(out_weight=None, out_scale=None),
            dict(out_weight=out_weight[:2]),
            dict(out_scale=out_scale.flatten(0, 1)),
            dict(pad_to=128),
            dict(out_weight=padded_rows(out_weight)),
            dict(out_scale=padded_rows(out_scale)),
            dict(out_weight=out_weight.to("meta")),
            dict(out_scale=out_scale.to("meta")),
            dict(out_weight=x.view(torch.uint8).flatten()[-out_weight.numel() :].view(out_weight.shape).view(E4M3)),
            dict(out_scale=x.view(torch.uint8).flatten()[: out_scale.numel()].view(out_scale.shape)),
            dict(out_scale=out_weight.view(torch.uint8).flatten()[: out_scale.numel()].view(out_scale.shape)),
        ),
        """\
quantize_preshuffle: out_weight has dtype uint8; it takes float8_e4m3fn
quantize_preshuffle: out_weight has dtype bfloat16; it takes float8_e4m3fn
quantize_preshuffle: out_scale has dtype int8; it takes uint8 or float8_e8m0fnu
quantize_preshuffle: out_weight is None; it takes a tensor of float8_e4m3fn
quantize_preshuffle: out_scale is None; it takes a tensor of uint8 or float8_e8m0fnu
quantize_preshuffle: out_weight and out_scale are None; they take tensors
quantize_preshuffle: out_weight has shape [2, 64, 64]; it takes [3, 64, 64] (E, R, C, I rounded up to pad_to)
quantize_preshuffle: out_scale has 2 dimensions; it takes [3, 64, 2] (the layout's scale shape)
quantize_preshuffle: out_weight has shape [3, 64, 64]; it takes [3, 256, 64] (E, R, C, I rounded up to pad_to)
quantize_preshuffle: out_weight has strides [8192, 128, 1]; it takes contiguous memory
quantize_preshuffle: out_scale has strides [256, 4, 1]; it takes contiguous memory
quantize_preshuffle: out_weight is on meta; it takes the device of x, cpu
quantize_preshuffle: out_scale is on meta; it takes the device of x, cpu
quantize_preshuffle: out_weight shares memory with x; it takes memory of its own, since inputs are read while it is written
quantize_preshuffle: out_scale shares memory with x; it takes memory of its own, since inputs are read while it is written
quantize_preshuffle: out_scale shares memory with out_weight; it takes memory of its own, since inputs are read while it is written""",
    )


def test_fused_moe_weights():
    w1, w1_scale, w2, w2_scale = (argument("fused_moe", key) for key in ("w1", "w1_scale", "w2", "w2_scale"))
    narrow = dict(w1=w1[:, :, :32].contiguous(), w1_scale=w1_scale[:, :, :1].contiguous())
    assert_expected_inline(
        messages(
            "fused_moe",
            *(dict([(key, None)]) for key in ("w1", "w1_scale", "w2", "w2_scale")),
            *wrong_dtypes("fused_moe", "w1", torch.bfloat16, torch.float8_e5m2),
            *wrong_dtypes("fused_moe", "w1_scale", torch.float32),
            *wrong_dtypes("fused_moe", "w2", torch.uint8),
            *wrong_dtypes("fused_moe", "w2_scale", E4M3),
            dict(w1=w1[0]),
            dict(w1=w1[:0]),
            dict(w1=w1[:, :0]),
            dict(w1=w1[:, :, :0]),
            dict(w1=w1[:, :32]),
            dict(w1=w1[:, :, :48]),
            dict(w1=w1[:2]),
            dict(w2=w2[:2]),
            dict(w2=w2[:, :32]),
            dict(w2=w2[0]),
            dict(w2=w2.transpose(1, 2)),
            narrow,
            dict(w1_scale=w1_scale[:, :32]),
            dict(w1_scale=w1_scale[:, :, :1]),
            dict(w1_scale=w1_scale.flatten(0, 1)),
            dict(w2_scale=w2_scale[:2]),
            dict(w2_scale=w2_scale[..., 0]),
            dict(w1=padded_rows(w1)),
            dict(w1_scale=padded_rows(w1_scale)),
            dict(w2=w2[:1].expand(3, -1, -1)),
            dict(w2_scale=w2_scale[:1].expand(3, -1, -1)),
            dict(w2=w2.to("meta")),
            dict(w1_scale=w1_scale.to("meta")),
            dict(w2_scale=w2_scale.to_sparse()),
            dict(layout="aiter_gfx950"),
            dict(layout="rowmajor"),
        ),
        """\
fused_moe: w1 is None; it takes a tensor of float8_e4m3fn
fused_moe: w1_scale is None; it takes a tensor of uint8 or float8_e8m0fnu
fused_moe: w2 is None; it takes a tensor of float8_e4m3fn
fused_moe: w2_scale is None; it takes a tensor of uint8 or float8_e8m0fnu
fused_moe: w1 has dtype bfloat16; it takes float8_e4m3fn
fused_moe: w1 has dtype float8_e5m2; it takes float8_e4m3fn
fused_moe: w1_scale has dtype float32; it takes uint8 or float8_e8m0fnu
fused_moe: w2 has dtype uint8; it takes float8_e4m3fn
fused_moe: w2_scale has dtype float8_e4m3fn; it takes uint8 or float8_e8m0fnu
fused_moe: w1 has 2 dimensions; it takes 3, [E, 2I, H]
fused_moe: w1 has shape [0, 64, 64]; it takes at least one expert
fused_moe: w1 has shape [3, 0, 64]; it takes an intermediate size above 0
fused_moe: w1 has shape [3, 64, 0]; it takes a hidden size above 0
fused_moe: w1 has shape [3, 32, 64]; it takes an intermediate size divisible by 32, [E, 2I, H]
fused_moe: w1 has shape [3, 64, 48]; it takes a hidden size divisible by 32, [E, 2I, H]
fused_moe: w2 has shape [3, 64, 32]; it takes [2, 64, 32] (E, H, I of w1 [E, 2I, H])
fused_moe: w2 has shape [2, 64, 32]; it takes [3, 64, 32] (E, H, I of w1 [E, 2I, H])
fused_moe: w2 has shape [3, 32, 32]; it takes [3, 64, 32] (E, H, I of w1 [E, 2I, H])
fused_moe: w2 has 2 dimensions; it takes [3, 64, 32] (E, H, I of w1 [E, 2I, H])
fused_moe: w2 has shape [3, 32, 64]; it takes [3, 64, 32] (E, H, I of w1 [E, 2I, H])
fused_moe: w2 has shape [3, 64, 32]; it takes [3, 32, 32] (E, H, I of w1 [E, 2I, H])
fused_moe: w1_scale has shape [3, 32, 2]; it takes [3, 64, 2] (for these weights in layout 'row_major')
fused_moe: w1_scale has shape [3, 64, 1]; it takes [3, 64, 2] (for these weights in layout 'row_major')
fused_moe: w1_scale has 2 dimensions; it takes [3, 64, 2] (for these weights in layout 'row_major')
fused_moe: w2_scale has shape [2, 64, 1]; it takes [3, 64, 1] (for these weights in layout 'row_major')
fused_moe: w2_scale has 2 dimensions; it takes [3, 64, 1] (for these weights in layout 'row_major')
fused_moe: w1 has strides [8192, 128, 1]; it takes contiguous memory
fused_moe: w1_scale has strides [256, 4, 1]; it takes contiguous memory
fused_moe: w2 has strides [0, 32, 1]; it takes contiguous memory
fused_moe: w2_scale has strides [0, 1, 1]; it takes contiguous memory
fused_moe: w2 is on meta; it takes the device of hidden_states, cpu
fused_moe: w1_scale is on meta; it takes the device of hidden_states, cpu
fused_moe: w2_scale has layout torch.sparse_coo; it takes torch.strided
fused_moe: w1 has shape [3, 64, 64]: layout 'aiter_gfx950' takes hidden sizes divisible by 256, not 64
fused_moe: layout is 'rowmajor'; it takes 'row_major' or 'aiter_gfx950'""",
    )


def test_fused_moe_biases():
    b1, b2 = randn(3, 64), randn(3, 64)
    assert_expected_inline(
        messages(
            "fused_moe",
            dict(w1_bias=b1.int()),
            dict(w2_bias=b2.to(E4M3)),
            dict(w1_bias=b1[:, :32].contiguous()),
            dict(w1_bias=b1[:2]),
            dict(w1_bias=b1[0]),
            dict(w2_bias=b2[:1]),
            dict(w2_bias=b2.flatten()),
            dict(w1_bias=every_second_column(b1)),
            dict(w2_bias=b2[:1].expand(3, 64)),
            dict(w2_bias=b2.to("meta")),
        ),
        """\
fused_moe: w1_bias has dtype int32; it takes float32, bfloat16, float16 or float64
fused_moe: w2_bias has dtype float8_e4m3fn; it takes float32, bfloat16, float16 or float64
fused_moe: w1_bias has shape [3, 32]; it takes [3, 64] (E, 2I)
fused_moe: w1_bias has shape [2, 64]; it takes [3, 64] (E, 2I)
fused_moe: w1_bias has 1 dimensions; it takes [3, 64] (E, 2I)
fused_moe: w2_bias has shape [1, 64]; it takes [3, 64] (E, H)
fused_moe: w2_bias has 1 dimensions; it takes [3, 64] (E, H)
fused_moe: w1_bias has strides [128, 2]; it takes a last stride of 1 (call .contiguous())
fused_moe: w2_bias has strides [0, 1]; it takes contiguous memory
fused_moe: w2_bias is on meta; it takes the device of hidden_states, cpu""",
    )


def test_fused_moe_hidden_states():
    x = argument("fused_moe", "hidden_states")
    codes, scale = torch_mxfp8moe.quantize_1x32(x)
    assert_expected_inline(
        messages(
            "fused_moe",
            dict(hidden_states=None),
            dict(hidden_states=x.double()),
            dict(hidden_states=x.int()),
            dict(hidden_states=codes),
            dict(hidden_states=codes.view(torch.uint8), hidden_states_scale=scale),
            dict(hidden_states_scale=scale),
            dict(hidden_states=x[0]),
            dict(hidden_states=x[None]),
            dict(hidden_states=x[:, :32]),
            dict(hidden_states=torch.cat([x, x], 1)),
            dict(hidden_states=x[:3]),
            dict(hidden_states=every_second_column(x)),
            dict(hidden_states=x[:, :1].expand(4, 64)),
            dict(hidden_states=x.to_sparse()),
            dict(hidden_states=x.to("meta")),
            dict(hidden_states=codes, hidden_states_scale=scale.float()),
            dict(hidden_states=codes, hidden_states_scale=scale[:, :1]),
            dict(hidden_states=codes, hidden_states_scale=scale[:3]),
            dict(hidden_states=codes, hidden_states_scale=scale[0]),
            dict(hidden_states=codes, hidden_states_scale=every_second_column(scale)),
            dict(hidden_states=codes, hidden_states_scale=scale.to("meta")),
        ),
        """\
fused_moe: hidden_states is None; it takes a tensor of bfloat16, float16 or float32
fused_moe: hidden_states has dtype float64; it takes bfloat16, float16 or float32
fused_moe: hidden_states has dtype int32; it takes bfloat16, float16 or float32
fused_moe: hidden_states has dtype float8_e4m3fn; it takes hidden_states_scale beside it
fused_moe: hidden_states has dtype uint8; it takes float8_e4m3fn
fused_moe: hidden_states has dtype bfloat16; it takes float8_e4m3fn
fused_moe: hidden_states has 1 dimensions; it takes 2, [T, H]
fused_moe: hidden_states has 3 dimensions; it takes 2, [T, H]
fused_moe: hidden_states has shape [4, 32]; it takes [T, 64]
fused_moe: hidden_states has shape [4, 128]; it takes [T, 64]
fused_moe: topk_ids has shape [4, 2]; it takes [3, 2] (T of hidden_states, K)
fused_moe: hidden_states has strides [128, 2]; it takes a last stride of 1 (call .contiguous())
fused_moe: hidden_states has strides [64, 0]; it takes a last stride of 1 (call .contiguous())
fused_moe: hidden_states has layout torch.sparse_coo; it takes torch.strided
fused_moe: w1 is on cpu; it takes the device of hidden_states, meta
fused_moe: hidden_states_scale has dtype float32; it takes uint8 or float8_e8m0fnu
fused_moe: hidden_states_scale has shape [4, 1]; it takes [4, 2] (T, H/32)
fused_moe: hidden_states_scale has shape [3, 2]; it takes [4, 2] (T, H/32)
fused_moe: hidden_states_scale has 1 dimensions; it takes [4, 2] (T, H/32)
fused_moe: hidden_states_scale has strides [4, 2]; it takes a last stride of 1 (call .contiguous())
fused_moe: hidden_states_scale is on meta; it takes the device of hidden_states, cpu""",
    )


def test_fused_moe_routing():
    weights, ids = argument("fused_moe", "topk_weights"), argument("fused_moe", "topk_ids")
    assert_expected_inline(
        messages(
            "fused_moe",
            dict(topk_weights=None),
            dict(topk_ids=None),
            dict(topk_weights=weights.int()),
            dict(topk_weights=weights.to(E4M3)),
            *(dict(topk_ids=ids.to(dtype)) for dtype in (torch.int16, torch.uint8, torch.float32, torch.bool)),
            dict(topk_ids=ids[0]),
            dict(topk_weights=weights[0]),
            dict(topk_ids=ids[:3]),
            dict(topk_weights=weights[:3]),
            dict(topk_ids=ids[:, :1]),
            dict(topk_weights=weights[:, :1]),
            dict(topk_weights=weights[:, :0], topk_ids=ids[:, :0]),
            dict(topk_ids=every_second_column(ids)),
            dict(topk_weights=weights.t().contiguous().t()),
            dict(topk_weights=weights.to("meta")),
            dict(topk_ids=ids.to("meta")),
            dict(topk_ids=ids.to_sparse()),
            dict(expert_map=torch.zeros(5, dtype=torch.int64)),
            dict(expert_map=torch.zeros(5, 1, dtype=torch.int32)),
            dict(expert_map=torch.tensor(1, dtype=torch.int32)),
            dict(expert_map=torch.zeros(10, dtype=torch.int32)[::2]),
            dict(expert_map=torch.zeros(5, dtype=torch.int32, device="meta")),
            dict(num_tokens=torch.tensor(3)),
            dict(num_tokens=torch.tensor([3, 3], dtype=torch.int32)),
            dict(num_tokens=torch.empty(0, dtype=torch.int32)),
            dict(num_tokens=torch.tensor(3, dtype=torch.int32, device="meta")),
            dict(num_tokens=torch.tensor(3.0)),
        ),
        """\
fused_moe: topk_weights is None; it takes a tensor of float32, bfloat16, float16 or float64
fused_moe: topk_ids is None; it takes a tensor of int32 or int64
fused_moe: topk_weights has dtype int32; it takes float32, bfloat16, float16 or float64
fused_moe: topk_weights has dtype float8_e4m3fn; it takes float32, bfloat16, float16 or float64
fused_moe: topk_ids has dtype int16; it takes int32 or int64
fused_moe: topk_ids has dtype uint8; it takes int32 or int64
fused_moe: topk_ids has dtype float32; it takes int32 or int64
fused_moe: topk_ids has dtype bool; it takes int32 or int64
fused_moe: topk_ids has 1 dimensions; it takes 2, [T, K]
fused_moe: topk_weights has 1 dimensions; it takes [4, 2] (the shape of topk_ids, T, K)
fused_moe: topk_ids has shape [3, 2]; it takes [4, 2] (T of hidden_states, K)
fused_moe: topk_weights has shape [3, 2]; it takes [4, 2] (the shape of topk_ids, T, K)
fused_moe: topk_weights has shape [4, 2]; it takes [4, 1] (the shape of topk_ids, T, K)
fused_moe: topk_weights has shape [4, 1]; it takes [4, 2] (the shape of topk_ids, T, K)
fused_moe: topk_ids has shape [4, 0]; it takes at least one expert per token
fused_moe: topk_ids has strides [4, 2]; it takes a last stride of 1 (call .contiguous())
fused_moe: topk_weights has strides [1, 4]; it takes a last stride of 1 (call .contiguous())
fused_moe: topk_weights is on meta; it takes the device of hidden_states, cpu
fused_moe: topk_ids is on meta; it takes the device of hidden_states, cpu
fused_moe: topk_ids has layout torch.sparse_coo; it takes torch.strided
fused_moe: expert_map has dtype int64; it takes int32
fused_moe: expert_map has 2 dimensions; it takes 1, [G]
fused_moe: expert_map has 0 dimensions; it takes 1, [G]
fused_moe: expert_map has strides [2]; it takes a last stride of 1 (call .contiguous())
fused_moe: expert_map is on meta; it takes the device of hidden_states, cpu
fused_moe: num_tokens has dtype int64; it takes int32
fused_moe: num_tokens has shape [2]; it takes one element
fused_moe: num_tokens has shape [0]; it takes one element
fused_moe: num_tokens is on meta; it takes the device of hidden_states, cpu
fused_moe: num_tokens has dtype float32; it takes int32""",
    )


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a second device")
def test_a_tensor_on_the_cpu_beside_those_on_the_gpu():
    """Also one of a single element, which PyTorch's own ops would take from the CPU."""
    for name, (op, arguments) in valid().items():
        if name.startswith("fused_moe"):
            E = len(arguments["w1"])
            arguments |= dict(
                w1_bias=randn(E, 64), w2_bias=randn(E, 64), expert_map=torch.arange(E, dtype=torch.int32),
                num_tokens=torch.tensor(4, dtype=torch.int32),
            )  # fmt: skip
        first, *rest = (key for key, x in arguments.items() if isinstance(x, torch.Tensor))
        for key in rest:
            text = error_of(lambda: op(**arguments | {key: arguments[key].cpu()}))
            assert text == f"{name.split('.')[0]}: {key} is on cpu; it takes the device of {first}, {DEVICE}"


def test_fused_moe_options():
    assert_expected_inline(
        messages(
            "fused_moe",
            *(dict(swiglu_alpha=value) for value in (NAN, INF, -INF)),
            *(dict(swiglu_beta=value) for value in (NAN, INF)),
            *(dict(swiglu_limit=value) for value in (NAN, INF, 0.0, -7.0, -INF)),
            dict(activation_dtype="fp8"),
            dict(activation_dtype=""),
            dict(apply_router_weight_on_input=True),
            *(dict(out_dtype=dtype) for dtype in (torch.float64, torch.int8, E4M3)),
        ),
        """\
fused_moe: swiglu_alpha is nan; it takes a finite number
fused_moe: swiglu_alpha is inf; it takes a finite number
fused_moe: swiglu_alpha is -inf; it takes a finite number
fused_moe: swiglu_beta is nan; it takes a finite number
fused_moe: swiglu_beta is inf; it takes a finite number
fused_moe: swiglu_limit is nan; it takes None or a finite number > 0
fused_moe: swiglu_limit is inf; it takes None or a finite number > 0
fused_moe: swiglu_limit is 0.0; it takes None or a finite number > 0
fused_moe: swiglu_limit is -7.0; it takes None or a finite number > 0
fused_moe: swiglu_limit is -inf; it takes None or a finite number > 0
fused_moe: activation_dtype is 'fp8'; it takes 'mxfp8' or 'bf16'
fused_moe: activation_dtype is ''; it takes 'mxfp8' or 'bf16'
fused_moe: apply_router_weight_on_input is True with 2 experts per token; it takes one expert per token (K = 1)
fused_moe: out_dtype is float64; it takes bfloat16, float16 or float32
fused_moe: out_dtype is int8; it takes bfloat16, float16 or float32
fused_moe: out_dtype is float8_e4m3fn; it takes bfloat16, float16 or float32""",
    )


def test_fused_moe_out():
    out, x = argument("fused_moe.out", "out"), argument("fused_moe.out", "hidden_states")
    assert_expected_inline(
        messages(
            "fused_moe.out",
            dict(out=None),
            dict(out=out.double()),
            dict(out=out.to(E4M3)),
            dict(out=out[0]),
            dict(out=out[:3]),
            dict(out=out[:, :32]),
            dict(out=every_second_column(out)),
            dict(out=out[:1].expand(4, 64)),
            dict(out=torch.zeros(400).as_strided((4, 64), (63, 1))),
            dict(out=out.to("meta")),
            dict(out=out.to_sparse()),
            dict(out=x),
        ),
        """\
fused_moe: out is None; it takes a tensor
fused_moe: out has dtype float64; it takes bfloat16, float16 or float32
fused_moe: out has dtype float8_e4m3fn; it takes bfloat16, float16 or float32
fused_moe: out has 1 dimensions; it takes [4, 64] (T, H)
fused_moe: out has shape [3, 64]; it takes [4, 64] (T, H)
fused_moe: out has shape [4, 32]; it takes [4, 64] (T, H)
fused_moe: out has strides [128, 2]; it takes a last stride of 1 (call .contiguous())
fused_moe: out has strides [0, 1]; it takes a row stride of 64 or more
fused_moe: out has strides [63, 1]; it takes a row stride of 64 or more
fused_moe: out is on meta; it takes the device of hidden_states, cpu
fused_moe: out has layout torch.sparse_coo; it takes torch.strided
fused_moe: out shares memory with hidden_states; it takes memory of its own, since inputs are read while it is written""",
    )


def overlapping() -> dict[str, dict]:
    """Calls of ``fused_moe.out`` whose out shares bytes with an input, by that input's name."""
    inputs = moe_inputs(T=4, H=64, I=32, E=3, K=2, bias_dtype=torch.float32, scaled=True)
    inputs |= dict(expert_map=torch.arange(3, dtype=torch.int32), num_tokens=torch.tensor([4], dtype=torch.int32))
    result = {}
    for name, tensor in inputs.items():
        size = tensor.numel() * tensor.itemsize
        for place in (0, 4 * 64 * 2 - 8):  # the input begins where out does, and near its end
            memory = torch.zeros(place + size + 4 * 64 * 2, dtype=torch.uint8)
            part = memory[place : place + size].view(tensor.dtype).view(tensor.shape)
            part.view(torch.uint8).copy_(tensor.view(torch.uint8)) if tensor.dim() else part.copy_(tensor)
            out = memory[: 4 * 64 * 2].view(torch.bfloat16).view(4, 64)
            result[f"{name} at {place}"] = inputs | {name: part, "out": out}
    return result


OVERLAPPING = overlapping()


@pytest.mark.parametrize("case", OVERLAPPING)
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_out_that_overlaps_an_input(case, backend):
    arguments = OVERLAPPING[case]
    before = as_bytes(arguments["out"]).clone()
    text = error_of(lambda: OPS.fused_moe.out(**arguments, backend=backend))
    assert text.startswith(f"fused_moe: out shares memory with {case.split()[0]}; it takes memory of its own")
    assert torch.equal(as_bytes(arguments["out"]), before)


def test_out_beside_an_input_in_one_buffer():
    """Columns and rows that alternate with the input's do not overlap it."""
    inputs = moe_inputs(T=4, H=64, I=32, E=3, K=2)
    want = OPS.fused_moe(**inputs)
    columns = torch.zeros(4, 128, dtype=torch.bfloat16)
    rows = torch.zeros(8, 64, dtype=torch.bfloat16)
    for x, out in ((columns[:, :64], columns[:, 64:]), (columns[:, 64:], columns[:, :64]), (rows[::2], rows[1::2])):
        x.copy_(inputs["hidden_states"])
        OPS.fused_moe.out(**inputs | dict(hidden_states=x), out=out)
        assert torch.equal(out, want)
    buffer = torch.zeros(4, 96, dtype=torch.bfloat16)
    for x, out in ((buffer[:, :64], buffer[:, 32:]), (buffer[:, 32:], buffer[:, :64])):
        text = error_of(lambda: OPS.fused_moe.out(**inputs | dict(hidden_states=x), out=out))
        assert "out shares memory with hidden_states" in text


def test_backend_and_layout_that_do_not_fit():
    inputs = moe_inputs(T=2, H=256, I=128)
    name = "nothing"
    text = error_of(lambda: OPS.fused_moe(**inputs, backend=name))
    assert text.startswith("fused_moe: backend is 'nothing'; it takes 'auto', ")
    shuffled, mislabelled = dict(inputs), inputs | dict(layout="aiter_gfx950")
    for weight, gate_up in (("w1", True), ("w2", False)):
        shuffled[weight], shuffled[f"{weight}_scale"] = OPS.preshuffle(
            inputs[weight], inputs[f"{weight}_scale"], layout="aiter_gfx950", gate_up=gate_up
        )
    assert_expected_inline(
        "\n".join([error_of(lambda: OPS.fused_moe(**shuffled)), error_of(lambda: OPS.fused_moe(**mislabelled))]),
        """\
fused_moe: w1_scale has 2 dimensions; it takes [4, 256, 8] (for these weights in layout 'row_major')
fused_moe: w1_scale has 3 dimensions; it takes [1024, 8] (for these weights in layout 'aiter_gfx950')""",
    )


def test_typed_entry_points():
    """What the wrappers look at themselves before the op does."""
    inputs = moe_inputs(T=4, H=64, I=32, E=3, K=2)
    shuffle = dict(layout="row_major", gate_up=True)
    lines = [
        error_of(lambda: torch_mxfp8moe.quantize_1x32(None)),
        error_of(lambda: torch_mxfp8moe.quantize_1x32(torch.zeros(2, 32), out=inputs["w1"])),
        error_of(lambda: torch_mxfp8moe.quantize_1x32(torch.zeros(2, 32), out=(inputs["w1"], None))),
        error_of(lambda: torch_mxfp8moe.dequantize_1x32(inputs["w1"], None)),
        error_of(lambda: torch_mxfp8moe.preshuffle(inputs["w1"], None, **shuffle)),
        error_of(lambda: torch_mxfp8moe.preshuffle(inputs["w1"], inputs["w1_scale"], **shuffle, out=inputs["w1"])),
        error_of(lambda: torch_mxfp8moe.preshuffle(inputs["w1"], inputs["w1_scale"], **shuffle, out=(inputs["w1"],))),
        error_of(lambda: torch_mxfp8moe.quantize_preshuffle(None, **shuffle)),
        error_of(lambda: torch_mxfp8moe.quantize_preshuffle(randn(3, 64, 64), **shuffle, out=inputs["w1"])),
        error_of(lambda: torch_mxfp8moe.fused_moe(**inputs | dict(w1_scale=None))),
        error_of(lambda: torch_mxfp8moe.fused_moe(**inputs, out=torch.empty(4, 64), out_dtype=torch.float16)),
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
quantize_1x32: x is None; it takes a tensor of bfloat16, float16 or float32
quantize_1x32: out is a Tensor; it takes two tensors, (data, scale)
quantize_1x32: out_scale is None; it takes a tensor of uint8 or float8_e8m0fnu
dequantize_1x32: scale is None; it takes a tensor of uint8 or float8_e8m0fnu
preshuffle: scale is None; it takes a tensor of uint8 or float8_e8m0fnu
preshuffle: out is a Tensor; it takes two tensors, (weight, scale)
preshuffle: out is a tuple; it takes two tensors, (weight, scale)
quantize_preshuffle: x is None; it takes a tensor of bfloat16, float16 or float32
quantize_preshuffle: out is a Tensor; it takes two tensors, (weight, scale)
fused_moe: w1_scale is None; it takes a tensor of uint8 or float8_e8m0fnu
fused_moe: out_dtype is torch.float16; it takes None or that of out, torch.float32""",
    )
    for wrong in ("text", 3, [1.0], inputs):
        for call in (
            lambda: torch_mxfp8moe.quantize_1x32(wrong),
            lambda: torch_mxfp8moe.dequantize_1x32(inputs["w1"], wrong),
            lambda: torch_mxfp8moe.fused_moe(**inputs | dict(w2_scale=wrong)),
            lambda: torch_mxfp8moe.fused_moe(**inputs, hidden_states_scale=wrong),
            lambda: torch_mxfp8moe.fused_moe(**inputs, out=wrong),
        ):
            assert "Expected a value of type" in error_of(call)


# --- after an error


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_out_is_as_it_was_after_an_error(backend):
    """For an error found last, in the largest call."""
    op, arguments = CALLS["fused_moe.out"]
    out = torch.full((4, 64), 5.0)
    for wrong in (dict(swiglu_limit=-1.0), dict(topk_ids=argument("fused_moe", "topk_ids")[:3]), dict(backend="x")):
        error_of(lambda: op(**dict(arguments, out=out, backend=backend) | wrong))
        assert (out == 5).all()
    op, arguments = CALLS["quantize_1x32.out"]
    outputs = [torch.full_like(arguments[key].view(torch.uint8), 5) for key in ("out_data", "out_scale")]
    named = dict(out_data=outputs[0].view(E4M3), out_scale=outputs[1])
    for wrong in (dict(scale_rounding="x"), dict(x=randn(3, 64)), dict(out_scale=outputs[1][:3])):
        error_of(lambda: op(**arguments | named | wrong))
        assert all((x == 5).all() for x in outputs)
    op, arguments = CALLS["preshuffle.out"]
    outputs = [torch.full_like(arguments[key].view(torch.uint8), 5) for key in ("out_weight", "out_scale")]
    named = dict(out_weight=outputs[0].view(E4M3), out_scale=outputs[1])
    for wrong in (dict(pad_to=33), dict(scale=arguments["scale"][:2]), dict(pad_to=128), dict(layout="x")):
        error_of(lambda: op(**arguments | named | wrong))
        assert all((x == 5).all() for x in outputs)
    op, arguments = CALLS["quantize_preshuffle.out"]
    for wrong in (dict(pad_to=33), dict(x=arguments["x"][:2]), dict(pad_to=128), dict(scale_rounding="x")):
        error_of(lambda: op(**arguments | named | wrong))
        assert all((x == 5).all() for x in outputs)


def test_the_fake_kernels_raise_the_same():
    """What tracing sees is what running would say."""
    changes = {
        "quantize_1x32": [dict(x=randn(3, 33)), dict(scale_rounding="up"), dict(x=randn(2, 32).double())],
        "quantize_1x32.out": [
            dict(out_data=torch.zeros(4, 32).to(E4M3)), dict(out_scale=torch.zeros(2, 4).byte().t()),
            dict(out_data=None), dict(out_data=None, out_scale=None),
        ],
        "dequantize_1x32": [dict(scale=torch.zeros(4, 3).byte()), dict(dtype=torch.float64)],
        "preshuffle": [dict(pad_to=33), dict(layout="aiter_gfx950"), dict(scale=torch.zeros(3, 64, 1).byte())],
        "preshuffle.out": [
            dict(out_scale=torch.zeros(3, 64, 1).byte()), dict(pad_to=64), dict(out_weight=None, out_scale=None),
        ],
        "quantize_preshuffle": [dict(pad_to=33), dict(scale_rounding="up"), dict(x=torch.zeros(3, 4, 16, 64))],
        "quantize_preshuffle.out": [
            dict(out_scale=torch.zeros(3, 64, 1).byte()), dict(pad_to=64), dict(out_weight=None, out_scale=None),
        ],
        "fused_moe": [
            dict(hidden_states=randn(4, 32)), dict(topk_ids=torch.zeros(4, 1).int()), dict(swiglu_limit=NAN),
            dict(apply_router_weight_on_input=True), dict(backend="x"), dict(layout="x"), dict(w1_bias=randn(3, 32)),
        ],
        "fused_moe.out": [
            dict(out=torch.zeros(4, 65)[:, :64].double()), dict(out=torch.zeros(5, 64)), dict(out=None),
        ],
    }  # fmt: skip
    for name, wrong_calls in changes.items():
        op, arguments = CALLS[name]
        for wrong in wrong_calls:
            text = error_of(lambda: op(**arguments | wrong))
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fakes = arguments | wrong
                fakes |= {k: mode.from_tensor(x) for k, x in fakes.items() if isinstance(x, torch.Tensor)}
                assert error_of(lambda: op(**fakes)) == text


# --- thousands of wrong calls


ALL_DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
ALLOWED = {
    "x": (torch.bfloat16, torch.float16, torch.float32),
    "hidden_states": (torch.bfloat16, torch.float16, torch.float32),
    "out": (torch.bfloat16, torch.float16, torch.float32),
    **dict.fromkeys(("data", "weight", "w1", "w2", "out_weight", "out_data"), (E4M3,)),
    **dict.fromkeys(("scale", "w1_scale", "w2_scale", "out_scale", "hidden_states_scale"), (torch.uint8, E8M0)),
    **dict.fromkeys(
        ("topk_weights", "w1_bias", "w2_bias"), (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ),
    "topk_ids": (torch.int32, torch.int64),
    "expert_map": (torch.int32,),
    "num_tokens": (torch.int32,),
}
OPTIONAL = ("w1_bias", "w2_bias", "expert_map", "num_tokens", "hidden_states_scale")
OPTIONS = {
    "scale_rounding": ("RCEIL", "", "round", "\0", "é" * 40),
    "dtype": (torch.float64, torch.int8, E4M3, torch.bool, torch.complex64),
    "layout": ("", "ROW_MAJOR", "aiter", "aiter_gfx942", "row_major\0", "x" * 1000),
    "pad_to": (0, -1, -32, 2, 31, 33, 48, 2**40, 2**62, -(2**63)),
    "swiglu_alpha": (NAN, INF, -INF),
    "swiglu_beta": (NAN, INF, -INF),
    "swiglu_limit": (NAN, INF, -INF, 0.0, -0.0, -1e-30, -7.0),
    "activation_dtype": ("", "fp8", "MXFP8", "bf16 ", "float32"),
    "backend": ("", "AUTO", "cuda", "cpu\0", "reference "),
    "out_dtype": (torch.float64, torch.int32, E4M3, E8M0, torch.bool),
}
"""Values that are wrong in any call, by option."""

NO_TENSORS = (3, 1.5, "tensor", [1.0, 2.0], {"a": 1}, object())


def random_call(rng: random.Random) -> tuple[str, Callable, dict]:
    """A valid call at random: (name, op, arguments)."""
    name = rng.choice(list(CALLS))
    op = CALLS[name][0]
    seed = rng.randrange(10**6)
    H, I = 32 * rng.randint(1, 4), 32 * rng.randint(1, 4)  # noqa: E741
    if name.startswith("fused_moe"):
        K, E = rng.randint(1, 4), rng.randint(1, 5)
        arguments = moe_inputs(
            T=rng.randint(0, 5), H=H, I=I, E=E, K=K, G=(G := rng.choice((None, 6))), dtype=rng.choice(ALLOWED["x"]),
            id_dtype=rng.choice(ALLOWED["topk_ids"]), weight_dtype=rng.choice(ALLOWED["topk_weights"]),
            bias_dtype=rng.choice((None, *ALLOWED["w1_bias"])), scaled=rng.random() < 0.3, seed=seed,
        )  # fmt: skip
        arguments["topk_ids"][rng.random() < 0.5 :] += rng.choice((0, 0, -10, 2**31 - 10, 5))
        if G:
            arguments["expert_map"] = torch.randint(-2, E + 2, (G,), dtype=torch.int32)
        if rng.random() < 0.3:
            arguments["num_tokens"] = torch.tensor(rng.randint(-2, 7), dtype=torch.int32)
        if rng.random() < 0.3:
            arguments |= dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=7.0, activation_dtype="bf16")
        if name.endswith("out"):
            shape = arguments["hidden_states"].shape
            arguments["out"] = torch.full(shape, 5.0, dtype=rng.choice(ALLOWED["out"]))
        if rng.random() < 0.3:
            arguments["backend"] = "reference"
    elif name.startswith("quantize_1x32"):
        arguments = dict(x=randn(rng.randint(0, 4), H, seed=seed, dtype=rng.choice(ALLOWED["x"])))
        if name.endswith("out"):
            data, scale = torch_mxfp8moe.quantize_1x32(arguments["x"])
            arguments |= dict(out_data=data, out_scale=scale)
    elif name == "dequantize_1x32":
        data, scale = torch_mxfp8moe.quantize_1x32(randn(rng.randint(0, 4), H, seed=seed))
        arguments = dict(data=data, scale=scale, dtype=rng.choice(ALLOWED["x"]))
    else:
        gate_up = rng.random() < 0.5
        shape = (2 * I, H) if gate_up else (H, I)
        x = randn(rng.randint(1, 3), *shape, seed=seed)
        arguments = dict(layout="row_major", gate_up=gate_up)
        if rng.random() < 0.5:
            arguments["pad_to"] = 32 * rng.randint(1, 4)
        if name.startswith("quantize"):
            arguments["x"] = x.to(rng.choice(ALLOWED["x"]))
        else:
            arguments["weight"], arguments["scale"] = torch_mxfp8moe.quantize_1x32(x)
        if name.endswith("out"):
            shuffled = getattr(torch_mxfp8moe, name.removesuffix(".out"))(**arguments)
            arguments |= dict(out_weight=shuffled[0].clone(), out_scale=shuffled[1].clone())
    return name, op, arguments


def of_another_dtype(x: torch.Tensor, key: str, rng: random.Random) -> torch.Tensor:
    wrong = [dtype for dtype in ALL_DTYPES if dtype not in (*ALLOWED[key], E4M3 if key == "hidden_states" else None)]
    return torch.empty(x.shape, dtype=rng.choice(wrong))


def of_another_rank(x: torch.Tensor, key: str, rng: random.Random) -> torch.Tensor | None:
    if key in ("x", "num_tokens"):  # any rank but 0; any rank
        return None if key == "num_tokens" else x.flatten()[:1].squeeze(0) if x.numel() else None
    scalar = x.reshape(-1)[:1].squeeze() if x.numel() else x[None]
    return rng.choice((x.unsqueeze(0), x.unsqueeze(-1), x[None, None], scalar))


def of_another_size(x: torch.Tensor, key: str, rng: random.Random) -> torch.Tensor | None:
    """Contiguous, one dimension more or less, or much more. A map may have any size."""
    if key == "expert_map":
        return None
    if key == "num_tokens":
        return torch.zeros(rng.choice((0, 2, 100)), dtype=x.dtype)
    dim = x.dim() - 1 if key == "x" else rng.randrange(x.dim())
    if key in ("weight", "scale") and dim == 0 and x.shape[0] == 0:
        return None
    shape = list(x.shape)
    shape[dim] += rng.choice((1, -1, 7, 1000)) if shape[dim] > 1 else rng.choice((1, 7, 1000))
    return torch.zeros(shape, dtype=torch.uint8).to(x.dtype)


def of_another_stride(x: torch.Tensor, key: str, rng: random.Random) -> torch.Tensor | None:
    """A last stride of 2 or, for a tensor of more than one column, of 0; for weights gaps between rows."""
    if key == "num_tokens" or x.shape[-1] < 2 or x.numel() < 2:
        return None
    memory = torch.zeros(2 * x.numel() + 64, dtype=torch.uint8).to(x.dtype)
    strides = [2 * s for s in x.stride()]
    if rng.random() < 0.3:
        strides[-1] = 0
    return memory.as_strided(x.shape, strides)


def on_another_device(x: torch.Tensor, key: str, rng: random.Random) -> torch.Tensor | None:
    return None if key == "x" else x.to("meta")


def of_another_layout(x: torch.Tensor, key: str, rng: random.Random) -> torch.Tensor | None:
    if x.dim() < 2 or x.dtype in (E4M3, E8M0):
        return None
    return x.to_sparse()


def nothing(x: torch.Tensor, key: str, rng: random.Random):
    return rng.choice(NO_TENSORS) if key in OPTIONAL else rng.choice((None, *NO_TENSORS))


KINDS = (
    of_another_dtype,
    of_another_rank,
    of_another_size,
    of_another_stride,
    on_another_device,
    of_another_layout,
    nothing,
)


def mistakes(name: str, arguments: dict, rng: random.Random) -> Iterator[tuple[str, object]]:
    """One or more arguments and what to give for them: a mistake that no other argument could make right."""
    tensors = [key for key, x in arguments.items() if isinstance(x, torch.Tensor)]
    options = [a.name for a in CALLS[name][0]._schema.arguments] if hasattr(CALLS[name][0], "_schema") else []
    options = options or [a.name for a in CALLS[name][0].default._schema.arguments]
    options = [key for key in options if key in OPTIONS]
    if rng.random() < 0.3:
        key = rng.choice(options)
        yield key, rng.choice(OPTIONS[key])
        return
    while True:
        key, kind = rng.choice(tensors), rng.choice(KINDS)
        wrong = kind(arguments[key], key, rng)
        if wrong is not None or kind is nothing:
            yield key, wrong
            break
    while rng.random() < 0.3:  # more, of kinds that do not make up for the first
        key = rng.choice(tensors)
        yield key, rng.choice((of_another_dtype, nothing))(arguments[key], key, rng)


def described(x: object) -> str:
    if not isinstance(x, torch.Tensor):
        return repr(x)[:80]
    strides = x.stride() if x.layout is torch.strided else x.layout
    return f"<{x.dtype} {tuple(x.shape)} {strides} {x.device}>"


def throw(seed: int, count: int) -> dict[str, int]:
    """``count`` calls, one in ten of them valid; raises AssertionError where one does not end as it should."""
    rng = random.Random(seed)
    outcomes = {"valid": 0, "refused": 0}
    for number in range(count):
        name, op, arguments = random_call(rng)
        if rng.random() < 0.1:
            op(**arguments)
            outcomes["valid"] += 1
            continue
        wrong = dict(mistakes(name, arguments, rng))
        watched = {k: (v, as_bytes(v).clone()) for k, v in arguments.items() if isinstance(v, torch.Tensor)}
        where = f"call {number} of seed {seed}: {name}, wrong: {[(k, described(x)) for k, x in wrong.items()]}"
        try:
            op(**arguments | wrong)
        except ERRORS as error:
            text = str(error)
            named = any(key in text for key in wrong) or "is on" in text
            assert name.split(".")[0] in text and named, f"{where}: {text}"
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        else:
            raise AssertionError(f"{where}: no error")
        for key, (tensor, before) in watched.items():
            assert torch.equal(as_bytes(tensor), before), f"{where}: {key} was written to"
        outcomes["refused"] += 1
    return outcomes


@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_wrong_calls(seed):
    """In a process of their own, so that a crash is a failure with a message instead of the end of the run."""
    count = 200 if BACKEND == "triton" else 1500  # every new shape of a valid call compiles kernels
    code = f"import faulthandler, test_bad_input; faulthandler.enable(); print(test_bad_input.throw({seed}, {count}))"
    outcomes = eval(run_python(code))
    assert outcomes["refused"] > 0.8 * count and outcomes["valid"] > 0.05 * count


def test_mistakes_are_of_every_kind():
    """The generator above reaches each argument of each op with each kind of mistake that it has for it."""
    rng = random.Random(0)
    seen = set()
    for _ in range(1500):
        name, _, arguments = random_call(rng)
        seen |= {(name, key) for key, _ in mistakes(name, arguments, rng)}
    for name, (op, _) in CALLS.items():
        schema = op._schema if hasattr(op, "_schema") else op.default._schema
        for a in schema.arguments:
            if a.name not in ("gate_up", "apply_router_weight_on_input"):
                assert (name, a.name) in seen, (name, a.name)
