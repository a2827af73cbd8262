"""``preshuffle`` and ``preshuffle.out``: the layouts' bytes, padding that changes no result, writing in place."""

import pytest
import torch

import torch_mxfp8moe
from helpers import (
    E4M3,
    E8M0,
    OPS,
    assert_agrees,
    check_op,
    error_of,
    moe_inputs,
    random_bytes,
    same_bytes,
    small,
)
from test_layouts import scale_address, weight_address
from torch_mxfp8moe import LAYOUTS, reference

CASES = {
    # layout, gate_up, E, rows, columns, pad_to
    "row_major w1": ("row_major", True, 3, 128, 96, 1),
    "row_major w2": ("row_major", False, 3, 96, 64, 1),
    "row_major w1, I 96 to 128": ("row_major", True, 2, 192, 64, 128),
    "row_major w2, I 96 to 128": ("row_major", False, 2, 64, 96, 128),
    "row_major w1, no padding needed": ("row_major", True, 2, 128, 32, 64),
    "aiter w1": ("aiter_gfx950", True, 3, 256, 256, 1),
    "aiter w2, 4 scale columns": ("aiter_gfx950", False, 3, 256, 128, 1),
    "aiter w2, 12 scale columns": ("aiter_gfx950", False, 1, 256, 384, 1),
    "aiter w1, I 192 to 256": ("aiter_gfx950", True, 2, 384, 512, 256),
    "aiter w2, I 192 to 256": ("aiter_gfx950", False, 2, 512, 192, 256),
    "aiter w1, I 96 to 128": ("aiter_gfx950", True, 1, 192, 256, 128),
    "no experts": ("aiter_gfx950", True, 0, 256, 256, 1),
}


@pytest.fixture(params=CASES)
def case(request):
    layout, gate_up, E, R, C, pad_to = CASES[request.param]
    weight, scale = random_bytes(E, R, C, seed=1).view(E4M3), random_bytes(E, R, C // 32, seed=2)
    return weight, scale, dict(layout=layout, gate_up=gate_up, pad_to=pad_to)


def expected(weight, scale, layout, gate_up, pad_to):
    """The bytes by arithmetic, one element at a time."""
    E, R, C = weight.shape
    step = 2 * pad_to if gate_up else pad_to
    rows, columns = (-(-R // step) * step, C) if gate_up else (R, -(-C // step) * step)
    padded = columns // 32 if layout == "row_major" else -(-columns // 256) * 8

    def place(e, r, c, width, address):
        if gate_up and r >= R // 2:
            r += (rows - R) // 2
        if layout == "row_major":
            return (e * rows + r) * width + c
        return address(e, r, c, rows, width, gate_up)

    data = torch.zeros(E * rows * columns, dtype=torch.uint8)
    data[[place(e, r, c, columns, weight_address) for e in range(E) for r in range(R) for c in range(C)]] = weight.view(
        torch.uint8
    ).flatten()
    scales = torch.full((E * rows * padded,), 0x7F, dtype=torch.uint8)
    scales[[place(e, r, y, padded, scale_address) for e in range(E) for r in range(R) for y in range(C // 32)]] = (
        scale.flatten()
    )
    shape = (E, rows, padded) if layout == "row_major" else (E * rows, padded)
    return data.view(E, rows, columns).view(E4M3), scales.view(shape)


@small
def test_bytes(case):
    weight, scale, options = case
    if weight.numel() == 0:
        want = reference.preshuffle(weight, scale, **options)
        assert want[0].shape == weight.shape and want[1].shape == (0, 8)
    else:
        want = expected(weight, scale, **options)
    before = weight.clone(), scale.clone()
    calls = {
        "op": lambda: OPS.preshuffle(weight, scale, **options),
        "op, e8m0": lambda: OPS.preshuffle(weight, scale.view(E8M0), **options),
        "typed": lambda: torch_mxfp8moe.preshuffle(weight, scale, **options),
        "typed, e8m0": lambda: torch_mxfp8moe.preshuffle(weight, scale.view(E8M0), **options),
        "reference": lambda: reference.preshuffle(weight, scale, **options),
    }
    for name, call in calls.items():
        got = call()
        assert same_bytes(got[0], want[0]) and same_bytes(got[1], want[1]), name
        assert got[0].is_contiguous() and got[1].is_contiguous()
    assert same_bytes(weight, before[0]) and same_bytes(scale, before[1])


@pytest.mark.parametrize("scale_dtype", (torch.uint8, E8M0), ids=str)
def test_out_writes_existing_memory(case, scale_dtype):
    """Slices of larger buffers, full of other bytes before; nothing beside them changes. Twice, as in an update."""
    weight, scale, options = case
    shapes = [x.shape for x in reference.preshuffle(weight, scale, **options)]
    buffers = [torch.full((n.numel() + 70,), 0xAB, dtype=torch.uint8) for n in shapes]
    out = [b[35 : 35 + n.numel()].view(n) for b, n in zip(buffers, shapes, strict=True)]
    out_weight, out_scale = out[0].view(E4M3), out[1].view(scale_dtype)
    for seed in (5, 6):
        fresh = random_bytes(*weight.shape, seed=seed).view(E4M3)
        assert OPS.preshuffle.out(fresh, scale, **options, out_weight=out_weight, out_scale=out_scale) is None
        want = reference.preshuffle(fresh, scale, **options)
        assert same_bytes(out_weight, want[0]) and same_bytes(out_scale.view(torch.uint8), want[1])
    for buffer, shape in zip(buffers, shapes, strict=True):
        assert (buffer[:35] == 0xAB).all() and (buffer[35 + shape.numel() :] == 0xAB).all()


def test_typed_out_returns_what_it_was_given(case):
    weight, scale, options = case
    want = reference.preshuffle(weight, scale, **options)
    out = want[0].clone().zero_(), want[1].clone().zero_().view(E8M0)
    got = torch_mxfp8moe.preshuffle(weight, scale.view(E8M0), **options, out=out)
    assert got[0] is out[0] and got[1] is out[1]
    assert same_bytes(out[0], want[0]) and same_bytes(out[1].view(torch.uint8), want[1])


def test_results_do_not_alias_inputs(case):
    """Also for ``row_major``, where nothing moves."""
    weight, scale, options = case
    got = OPS.preshuffle(weight, scale, **options)
    before = [x.clone() for x in got]
    weight.view(torch.uint8).bitwise_xor_(0xFF)
    scale.bitwise_xor_(0xFF)
    assert same_bytes(got[0], before[0]) and same_bytes(got[1], before[1])


def test_same_bytes_for_every_thread_count(case):
    weight, scale, options = case
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(OPS.preshuffle(weight, scale, **options))
    for part in zip(*results, strict=True):
        assert same_bytes(*part)


@pytest.mark.parametrize("bias", (None, torch.float32), ids=("no bias", "bias"))
@pytest.mark.parametrize("pad_to", (128, 256))
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_padding_changes_no_result(layout, pad_to, bias):
    """fused_moe on weights whose I was rounded up, biases padded to match, against the weights as they were."""
    I = 96  # noqa: E741
    inputs = moe_inputs(T=5, H=256, I=I, E=3, K=2, dtype=torch.float32, bias_dtype=bias)
    options = dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=7.0)
    want = reference.fused_moe(**inputs, **options)
    padded = dict(inputs)
    for name, gate_up in (("w1", True), ("w2", False)):
        padded[name], padded[f"{name}_scale"] = OPS.preshuffle(
            inputs[name], inputs[f"{name}_scale"], layout=layout, gate_up=gate_up, pad_to=pad_to
        )
    assert padded["w1"].shape == (3, 2 * pad_to, 256) and padded["w2"].shape == (3, 256, pad_to)
    if bias:
        halves = inputs["w1_bias"].view(3, 2, I)
        padded["w1_bias"] = torch.nn.functional.pad(halves, (0, pad_to - I)).reshape(3, 2 * pad_to)
    assert_agrees(reference.fused_moe(**padded, **options, layout=layout), want, 1e-6)
    assert_agrees(OPS.fused_moe(**padded, **options, layout=layout), want)


@pytest.mark.parametrize(
    "gate_up, rows, columns, pad_to, names",
    (
        (True, 256, 128, 1, "hidden sizes divisible by 256, not 128"),
        (True, 384, 256, 1, "intermediate sizes divisible by 128, not 192"),
        (True, 256, 288, 1, "hidden sizes divisible by 256, not 288"),
        (False, 256, 192, 1, "intermediate sizes divisible by 128, not 192"),
        (False, 384, 128, 1, "hidden sizes divisible by 256, not 384"),
        (False, 256, 64, 96, "intermediate sizes divisible by 128, not 96"),
    ),
)
def test_aiter_refuses_sizes_that_its_kernels_floor(gate_up, rows, columns, pad_to, names):
    weight, scale = random_bytes(2, rows, columns).view(E4M3), random_bytes(2, rows, columns // 32)
    options = dict(layout="aiter_gfx950", gate_up=gate_up, pad_to=pad_to)
    message = error_of(lambda: OPS.preshuffle(weight, scale, **options))
    assert message.startswith("preshuffle: weight") and names in message and "pad_to" in message


def test_opcheck(case):
    weight, scale, options = case
    weight = torch.where(weight.view(torch.uint8) % 128 == 127, 0, weight.view(torch.uint8)).view(E4M3)
    for view in (scale, scale.clamp(max=254).view(E8M0)):
        check_op(OPS.preshuffle.default, (weight, view), options)
    out = [torch.empty_like(x) for x in reference.preshuffle(weight, scale, **options)]
    check_op(OPS.preshuffle.out, (weight, scale), dict(options, out_weight=out[0], out_scale=out[1]))
