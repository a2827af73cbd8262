"""Inference only: where an input needs a gradient the call, or backward, says so; none is ever silently missing."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import torch_mxfp8moe
from helpers import OPS, error_of, moe_inputs, needs_extension, randn, same_bytes

MESSAGE = "inference only"
NO_TRANSFORM = "no rule for torch.func transforms"
REFUSED = (RuntimeError, NotImplementedError)


def cases() -> dict:
    """(op, arguments, name of a floating-point argument) of every op and overload."""
    x = randn(4, 64)
    moe = moe_inputs(bias_dtype=torch.float32)
    scaled = moe_inputs(scaled=True)
    data, scale = torch_mxfp8moe.quantize_1x32(x)
    shuffle = dict(weight=moe["w1"], scale=moe["w1_scale"], layout="row_major", gate_up=True)
    out = dict(out_weight=torch.empty_like(moe["w1"]), out_scale=torch.empty_like(moe["w1_scale"]))
    rows = dict(x=randn(*moe["w1"].shape), layout="row_major", gate_up=True)
    calls = {
        "quantize_1x32": (OPS.quantize_1x32.default, dict(x=x), ("x",)),
        "quantize_1x32.out": (
            OPS.quantize_1x32.out,
            dict(x=x, out_data=torch.empty_like(data), out_scale=torch.empty_like(scale)),
            ("x", "out_data"),
        ),
        "dequantize_1x32": (OPS.dequantize_1x32.default, dict(data=data, scale=scale, dtype=torch.float32), ("data",)),
        "preshuffle": (OPS.preshuffle.default, shuffle, ("weight",)),
        "preshuffle.out": (OPS.preshuffle.out, shuffle | out, ("weight", "out_weight")),
        "quantize_preshuffle": (OPS.quantize_preshuffle.default, rows, ("x",)),
        "quantize_preshuffle.out": (OPS.quantize_preshuffle.out, rows | out, ("x", "out_weight")),
        "fused_moe": (
            OPS.fused_moe.default, moe, ("hidden_states", "topk_weights", "w1", "w2", "w1_bias", "w2_bias"),
        ),
        "fused_moe on the reference": (
            OPS.fused_moe.default, moe | dict(backend="reference"), ("hidden_states", "topk_weights", "w1", "w2_bias"),
        ),
        "fused_moe.out": (
            OPS.fused_moe.out,
            moe | dict(out=torch.empty(4, 64)),
            ("hidden_states", "topk_weights", "w1", "w2", "w1_bias", "w2_bias", "out"),
        ),
        "fused_moe of MXFP8": (OPS.fused_moe.default, scaled, ("hidden_states",)),
    }  # fmt: skip
    return {f"{call}, {name}": (op, args, name) for call, (op, args, names) in calls.items() for name in names}


CASES = cases()


def needing(arguments: dict, name: str) -> dict:
    """The arguments with a gradient needed for one of them, as a leaf."""
    return arguments | {name: torch.nn.Parameter(arguments[name].detach().clone())}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_eager(case):
    op, arguments, name = case
    with pytest.raises(REFUSED, match=MESSAGE) as error:
        op(**needing(arguments, name))
    assert str(error.value).startswith(op._schema.name.removeprefix("mxfp8moe::")) and "no_grad" in str(error.value)


def test_eager_of_what_a_graph_computed(case):
    """Not a leaf: a tensor that has a grad_fn."""
    op, arguments, name = case
    with pytest.raises(REFUSED, match=MESSAGE):
        op(**arguments | {name: needing(arguments, name)[name].view_as(arguments[name])})


@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode))
@pytest.mark.parametrize("name", [name for name, (_, _, argument) in CASES.items() if not argument.startswith("out")])
def test_eager_without_grad_mode(name, context):
    """Parameters may need gradients as long as grad mode is off; the result is the same."""
    op, arguments, name = CASES[name]
    want = op(**arguments)
    with context():
        got = op(**needing(arguments, name))
    for a, b in zip(as_tuple(got), as_tuple(want), strict=True):
        assert same_bytes(a, b) and not a.requires_grad


def as_tuple(result) -> tuple:
    return () if result is None else (result,) if isinstance(result, torch.Tensor) else tuple(result)


def test_grad_mode_inside_no_grad(case):
    op, arguments, name = case
    with torch.no_grad(), torch.enable_grad(), pytest.raises(REFUSED, match=MESSAGE):
        op(**needing(arguments, name))


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_compiled(case, backend):
    op, arguments, name = case

    def function(tensor):
        return op(**arguments | {name: tensor})

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    with pytest.raises(REFUSED, match=MESSAGE):
        compiled(needing(arguments, name)[name])


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_compiled_without_need_first(case, backend):
    """A graph that was compiled for an input without gradients does not serve one with."""
    op, arguments, name = case
    compiled = torch.compile(lambda tensor: op(**arguments | {name: tensor}), backend=backend)
    compiled(arguments[name])
    with pytest.raises(REFUSED, match=MESSAGE):
        compiled(needing(arguments, name)[name])
    with torch.no_grad():
        compiled(needing(arguments, name)[name])


MOE = moe_inputs(dtype=torch.float32)


def residual(x):
    """``x + fused_moe(x)``: with a gradient silently missing, this would train, wrongly."""
    return x + torch_mxfp8moe.fused_moe(**MOE | dict(hidden_states=x))


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_residual_does_not_train_wrongly(backend):
    x = randn(4, 64).requires_grad_()
    linear = torch.nn.Linear(64, 64)
    for function in (residual, lambda x: residual(linear(x.detach())), lambda x: residual(x * 2)):
        for call in (function, torch.compile(function, backend=backend, fullgraph=True)):
            with pytest.raises(REFUSED, match=MESSAGE):
                call(x)
    assert x.grad is None


@pytest.mark.parametrize("compiled", (False, True))
def test_detached_inputs_let_the_rest_train(compiled):
    x = randn(4, 64).requires_grad_()

    def function(x):
        return x * 3 + residual(x.detach())

    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    function(x).sum().backward()
    assert x.grad.eq(3).all()


@pytest.mark.parametrize("reentrant", (True, False))
def test_activation_checkpointing(reentrant):
    """Its first pass runs without grad mode; then backward raises."""
    x = randn(4, 64).requires_grad_()
    with pytest.raises(REFUSED, match=MESSAGE):
        checkpoint(residual, x, use_reentrant=reentrant).sum().backward()


def test_exported_program():
    class Residual(torch.nn.Module):
        forward = staticmethod(residual)

    module = torch.export.export(Residual(), (randn(4, 64),)).module()
    module(randn(4, 64))
    with pytest.raises(REFUSED, match=MESSAGE):
        module(randn(4, 64).requires_grad_())


def test_a_write_to_what_backward_saved():
    """Out variants count their writes: backward then raises, instead of a gradient of what was written since."""
    moe = moe_inputs(dtype=torch.float32)
    out = torch.randn(4, 64)
    loss = (torch.ones(64).requires_grad_() * out).sum()
    OPS.fused_moe.out(**moe, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("context", (torch.enable_grad, torch.no_grad, torch.inference_mode))
def test_writes_are_counted(context, backend):
    """For an output, for the tensor that it is a view of, in every mode."""
    moe, buffer = moe_inputs(), torch.zeros(3, 6, 64)
    data, scale = torch_mxfp8moe.quantize_1x32(buffer)
    shuffle = dict(weight=moe["w1"], scale=moe["w1_scale"], layout="row_major", gate_up=True)
    shuffled, arranged = ((torch.empty_like(moe["w1"]), torch.empty_like(moe["w1_scale"])) for _ in range(2))
    wrong = error_of(lambda: OPS.fused_moe.out(**moe, out=buffer[0, :3]))
    assert "out has shape" in wrong and buffer._version == 0
    with context():
        OPS.fused_moe.out(**moe, backend=backend, out=buffer[1, :4])
        OPS.quantize_1x32.out(torch.ones(6, 64), out_data=data[1], out_scale=scale[1])
        OPS.preshuffle.out(**shuffle, out_weight=shuffled[0], out_scale=shuffled[1])
        rows, written = randn(*moe["w1"].shape), dict(out_weight=arranged[0], out_scale=arranged[1])
        OPS.quantize_preshuffle.out(rows, layout="row_major", gate_up=True, **written)
    assert all(x._version >= 1 for x in (buffer, data, scale, *shuffled, *arranged))
    assert all(x._version == 0 for x in moe.values())


def test_outputs_that_count_nothing():
    """Tensors made in inference mode have no counter; they may be written outside of it."""
    moe = moe_inputs()
    with torch.inference_mode():
        out = torch.zeros(4, 64)
        data, scale = torch_mxfp8moe.quantize_1x32(torch.zeros(4, 64))
    OPS.fused_moe.out(**moe, out=out)
    OPS.quantize_1x32.out(torch.ones(4, 64), out_data=data, out_scale=scale)
    assert out.any() and data.view(torch.uint8).any()


def test_function_transforms(case):
    """torch.func's gradients wrap their tensors, which then do not look as if they needed one inside."""
    op, arguments, name = case

    def function(tensor):
        result = op(**arguments | {name: tensor})
        return (tensor if result is None else as_tuple(result)[0]).float().sum()

    for transform in (torch.func.grad(function), lambda tensor: torch.func.vjp(function, tensor)):
        with pytest.raises(REFUSED, match=NO_TRANSFORM):
            transform(arguments[name])


def test_forward_mode(case):
    """A tangent is not dropped either."""
    op, arguments, name = case
    x = arguments[name]
    with forward_ad.dual_level(), pytest.raises(REFUSED, match=MESSAGE):
        op(**arguments | {name: forward_ad.make_dual(x, torch.ones_like(x))})


def test_jvp():
    with pytest.raises(REFUSED, match=f"{NO_TRANSFORM}|{MESSAGE}"):
        torch.func.jvp(residual, (randn(4, 64),), (randn(4, 64),))


@needs_extension
def test_decoding_pays_nothing_for_it():
    """The C++ kernel sees to it: no Python runs in a call whose inputs need no gradients."""
    import sys

    inputs = moe_inputs()
    call = OPS.fused_moe.default
    args = tuple(inputs.values())
    called = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_filename) if event == "call" else None)
    try:
        call(*args)
    finally:
        sys.setprofile(None)
    assert [file for file in called if "torch_mxfp8moe" in file] == []
