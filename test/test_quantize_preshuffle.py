"""``quantize_preshuffle``: the bytes of ``quantize_1x32`` and ``preshuffle`` in turn, of rows that lie in any way."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torch_mxfp8moe
from device import DEVICE
from helpers import E4M3, E8M0, FLOATS, MODES, OPS, as_bytes, check_op, error_of, kernels, randn, same_bytes, small
from test_preshuffle import CASES, expected
from test_quantize import blocks_of, magnitudes
from torch_mxfp8moe import reference
from torch_mxfp8moe.arguments import QuantizePreshuffle
from torch_mxfp8moe.backends import registered


def in_sequence(x: torch.Tensor, scale_rounding: str = "rceil", **options) -> tuple[torch.Tensor, torch.Tensor]:
    """By the two ops that the one stands for."""
    data, scale = OPS.quantize_1x32(x, scale_rounding=scale_rounding)
    data, scale = (part.flatten(1, 2) if part.dim() == 4 else part for part in (data, scale))
    return OPS.preshuffle(data, scale, **options)


@pytest.fixture(params=CASES)
def case(request):
    """x [E, R, C] with a block of each kind in it, and options."""
    layout, gate_up, E, R, C, pad_to = CASES[request.param]
    x = randn(E, R, C, seed=3, dtype=torch.bfloat16)
    if E:
        x[-1, R // 2, :32] = 0.0
        x[-1, R // 2 + 1, :32] = -0.0
        x[0, R // 2 - 1, -1], x[0, 0, 0], x[-1, -1, -32] = float("inf"), float("nan"), float("-inf")
    return x, dict(layout=layout, gate_up=gate_up, pad_to=pad_to)


@small
def test_bytes(case):
    """Those of the two ops, of the reference, and of the layout by arithmetic, padding included."""
    x, options = case
    before = x.clone()
    want = in_sequence(x, **options)
    if x.numel():
        by_arithmetic = expected(*reference.quantize_1x32(x), **options)
        assert all(same_bytes(*pair) for pair in zip(want, by_arithmetic, strict=True))
    for name, call in {
        "op": OPS.quantize_preshuffle,
        "typed": torch_mxfp8moe.quantize_preshuffle,
        "reference": reference.quantize_preshuffle,
    }.items():
        got = call(x, **options)
        assert all(same_bytes(*pair) for pair in zip(got, want, strict=True)), name
        assert all(part.is_contiguous() for part in got), name
    assert same_bytes(x, before)


@kernels
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_magnitude(dtype, mode):
    """All of them in weights that both layouts take, some twice to fill the last expert."""
    blocks = blocks_of(magnitudes(dtype))
    x = blocks.repeat(2, 1)[: -(-len(blocks) // 2048) * 2048].view(-1, 256, 256)
    for options in (dict(layout="row_major", gate_up=True, pad_to=96), dict(layout="aiter_gfx950", gate_up=False)):
        got = OPS.quantize_preshuffle(x, scale_rounding=mode, **options)
        assert all(same_bytes(*pair) for pair in zip(got, in_sequence(x, mode, **options), strict=True))


@small
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_rounding_of_every_dtype(dtype, mode):
    """The typed entry point, by position, and the op. Of values for which the roundings differ."""
    x = randn(2, 64, 96, seed=7).to(dtype)
    options = dict(layout="row_major", gate_up=False, pad_to=64)
    want = in_sequence(x, mode, **options)
    for got in (
        torch_mxfp8moe.quantize_preshuffle(x, mode, **options),
        OPS.quantize_preshuffle(x, scale_rounding=mode, **options),
        reference.quantize_preshuffle(x, mode, **options),
    ):
        assert all(same_bytes(*pair) for pair in zip(got, want, strict=True))
    if mode != "rceil":
        assert not same_bytes(want[1], in_sequence(x, **options)[1])


@pytest.mark.parametrize("layout", (pytest.param("row_major", marks=small), "aiter_gfx950"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_that_lie_in_any_way(layout, dtype):
    """Experts, halves and rows with strides of their own, at any alignment: the bytes of the contiguous rows."""
    E, I, C = (2, 32, 64) if layout == "row_major" else (2, 128, 256)  # noqa: E741
    buffer = randn(4 * E * 2 * I * C + 7, dtype=dtype)
    whole = buffer[: E * 2 * I * C].view(E, 2 * I, C)
    inputs = {
        "halves": whole.unflatten(1, (2, I)),
        "rows that take turns": whole.unflatten(1, (I, 2)).transpose(1, 2),
        "unaligned": buffer[3:][: E * 2 * I * C].view(E, 2 * I, C),
        "odd row stride": buffer.as_strided((E, 2 * I, C), (2 * I * (C + 3), C + 3, 1)),
        "columns of wider rows": buffer[: 4 * E * 2 * I * C].view(E, 2 * I, 4 * C)[:, :, C : 2 * C],
        "rows of each half": buffer[: 4 * E * 2 * I * C].view(E, 2, 4 * I, C)[:, :, I : 2 * I],
        "every second expert": buffer[: 2 * E * 2 * I * C].view(2 * E, 2 * I, C)[::2],
        "one expert for all": whole[:1].expand(E, -1, -1),
        "one row for all": whole[:1, :1].expand(E, 2 * I, -1),
        "overlapping rows": buffer.as_strided((E, 2, I, C), (8, 16, 1, 1)),
    }
    for name, x in inputs.items():
        for gate_up in (True, False) if x.dim() == 3 else (True,):
            options = dict(layout=layout, gate_up=gate_up)
            want = in_sequence(x.contiguous(), **options)
            for call in (OPS.quantize_preshuffle, reference.quantize_preshuffle):
                got = call(x, **options)
                assert all(same_bytes(*pair) for pair in zip(got, want, strict=True)), (name, gate_up)


@small
@kernels
@given(
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from((1, 32, 64, 96)),
    st.sampled_from(FLOATS),
    st.sampled_from(MODES),
    st.sampled_from((torch.uint8, E8M0)),
    st.integers(0, 2**31),
)
def test_out_writes_existing_memory(E, rows, blocks, gate_up, halves, pad_to, dtype, mode, scale_dtype, seed):
    """Slices of larger buffers, full of other bytes before; nothing beside them changes, and x does not."""
    R = 32 * rows * (2 if gate_up else 1)
    x = randn(E, R, 32 * blocks + 5, seed=seed, dtype=dtype, scale=2.0 ** (seed % 30 - 15))[..., 5:]
    x = x.unflatten(1, (2, R // 2)) if gate_up and halves else x
    options = dict(layout="row_major", gate_up=gate_up, pad_to=pad_to)
    before, want = x.clone(), reference.quantize_preshuffle(x, mode, **options)
    buffers = [torch.full((part.numel() + 70,), 0xAB, dtype=torch.uint8, device=DEVICE) for part in want]
    out = [b[35 : 35 + part.numel()].view(part.shape) for b, part in zip(buffers, want, strict=True)]
    written = dict(out_weight=out[0].view(E4M3), out_scale=out[1].view(scale_dtype))
    assert OPS.quantize_preshuffle.out(x, scale_rounding=mode, **options, **written) is None
    assert same_bytes(written["out_weight"], want[0]) and same_bytes(out[1], want[1])
    assert all((b[:35] == 0xAB).all() and (b[-35:] == 0xAB).all() for b in buffers)
    assert same_bytes(x, before)


@given(st.binary(min_size=64 * 32, max_size=64 * 32), st.sampled_from(FLOATS), st.sampled_from(MODES))
def test_any_bits(raw, dtype, mode):
    """Any bit pattern at all, NaNs with payloads included."""
    x = torch.frombuffer(bytearray(raw), dtype=dtype).clone().to(DEVICE).view(1, -1, 32).repeat(1, 4, 1)[:, :64]
    options = dict(layout="row_major", gate_up=True, pad_to=64)
    got, want = (call(x, mode, **options) for call in (torch_mxfp8moe.quantize_preshuffle, in_sequence))
    assert all(same_bytes(*pair) for pair in zip(got, want, strict=True))


def test_typed_out_returns_what_it_was_given(case):
    x, options = case
    want = in_sequence(x, "even", **options)
    out = want[0].clone().zero_(), want[1].clone().zero_().view(E8M0)
    got = torch_mxfp8moe.quantize_preshuffle(x, "even", **options, out=out)
    assert got[0] is out[0] and got[1] is out[1]
    assert same_bytes(out[0], want[0]) and same_bytes(out[1].view(torch.uint8), want[1])


def test_out_on_the_reference(case):
    """Which serves no CPU tensor where the C++ kernels are there, but is what they are held to."""
    x, options = case
    want = in_sequence(x, "ceil", **options)
    out = torch.empty_like(want[0]), torch.empty_like(want[1]).view(E8M0)
    call = QuantizePreshuffle(x, scale_rounding="ceil", **options, out_weight=out[0], out_scale=out[1])
    registered()["reference"].quantize_preshuffle(call.check(writes_out=True))
    assert same_bytes(out[0], want[0]) and same_bytes(out[1].view(torch.uint8), want[1])


@small
def test_input_seen_through_a_negative_view():
    x, options = randn(2, 64, 64), dict(layout="row_major", gate_up=True)
    got, want = OPS.quantize_preshuffle(x._neg_view(), **options), OPS.quantize_preshuffle(-x, **options)
    assert all(same_bytes(*pair) for pair in zip(got, want, strict=True))


def test_same_bytes_for_every_thread_count(case):
    x, options = case
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(torch.cat([as_bytes(part) for part in OPS.quantize_preshuffle(x, **options)]))
    assert same_bytes(*results)


@pytest.mark.parametrize(
    "gate_up, rows, columns, pad_to, names",
    (
        (True, 384, 256, 1, "intermediate sizes divisible by 128, not 192"),
        (True, 256, 288, 1, "hidden sizes divisible by 256, not 288"),
        (False, 256, 64, 96, "intermediate sizes divisible by 128, not 96"),
    ),
)
def test_aiter_refuses_sizes_that_its_kernels_floor(gate_up, rows, columns, pad_to, names):
    x, options = randn(2, rows, columns), dict(layout="aiter_gfx950", gate_up=gate_up, pad_to=pad_to)
    message = error_of(lambda: OPS.quantize_preshuffle(x, **options))
    assert message.startswith("quantize_preshuffle: x does not fit: ") and names in message and "pad_to" in message


@pytest.mark.parametrize("halves", (False, True))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck(dtype, mode, halves):
    x = randn(2, 64, 96, dtype=dtype)
    x = x.unflatten(1, (32, 2)).transpose(1, 2) if halves else x
    check_op(
        OPS.quantize_preshuffle.default, (x,), dict(scale_rounding=mode, layout="row_major", gate_up=True, pad_to=96)
    )


@pytest.mark.parametrize("scale_dtype", (torch.uint8, E8M0), ids=str)
def test_opcheck_out(case, scale_dtype):
    x, options = case
    out_weight, out_scale = (as_bytes(part).view(part.shape).zero_() for part in in_sequence(x, **options))
    x = x.nan_to_num(posinf=1.0, neginf=-1.0)  # opcheck compares values, and NaN is none
    outputs = dict(out_weight=out_weight.view(E4M3), out_scale=out_scale.view(scale_dtype))
    check_op(OPS.quantize_preshuffle.out, (x,), options | outputs)
