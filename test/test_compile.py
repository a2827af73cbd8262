"""The ops in compiled, exported and packaged graphs: one node each, no recompiling per token count, the eager bits."""

import io
import shutil

import pytest
import torch
from expecttest import assert_expected_inline
from torch._dynamo.decorators import mark_unbacked

import device
import torch_mxfp8moe
from helpers import E8M0, FLOATS, MODES, OPS, Capture, aot_inductor_why_not, moe_inputs, randn, run_python, same_bytes

TOKEN_COUNTS = (8, 4, 3, 1, 0, 2)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))), reason="Inductor needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


WEIGHTS = {name: x for name, x in moe_inputs(bias_dtype=torch.float32).items() if name.startswith("w")}


def tokens(T: int, **sizes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden_states, topk_weights, topk_ids of T tokens."""
    inputs = moe_inputs(T=T, seed=T, **sizes)
    return inputs["hidden_states"], inputs["topk_weights"], inputs["topk_ids"]


def moe(x, topk_weights, topk_ids, **options):
    return torch_mxfp8moe.fused_moe(x, topk_weights=topk_weights, topk_ids=topk_ids, **WEIGHTS, **options)


def moe_out(x, topk_weights, topk_ids):
    out = torch.empty_like(x)
    moe(x, topk_weights, topk_ids, out=out)
    return torch.mul(out, 2)  # traced the same with and without a default device, which out * 2 is not


def pipeline(x, topk_weights, topk_ids):
    """All ops that a forward pass may hold."""
    data, scale = torch_mxfp8moe.quantize_1x32(x)
    out = moe(data, topk_weights, topk_ids, hidden_states_scale=scale)
    moe(x, topk_weights, topk_ids, out=out)
    return out + torch_mxfp8moe.dequantize_1x32(data, scale, x.dtype)


# --- one node in the graph


def captured(function, *args) -> str:
    capture = Capture()
    want = function(*args)
    got = torch.compile(function, backend=capture, fullgraph=True)(*args)
    got, want = ((x,) if isinstance(x, torch.Tensor) else x for x in (got, want))
    assert all(same_bytes(a, b) for a, b in zip(got, want, strict=True))
    return capture.nodes()


def test_nodes_of_quantize_and_dequantize():
    def function(x):
        data, scale = torch_mxfp8moe.quantize_1x32(x)
        return torch_mxfp8moe.dequantize_1x32(data, scale, torch.bfloat16)

    assert_expected_inline(
        captured(function, randn(3, 64)),
        """\
call_function mxfp8moe.quantize_1x32
call_function <built-in function getitem>
call_function <built-in function getitem>
call_function mxfp8moe.dequantize_1x32""",
    )


def quantized_into(x):
    """What is written, and the buffers around it."""
    data, scale = torch.zeros(5, 64, dtype=torch.uint8), torch.zeros(5, 2, dtype=torch.uint8)
    torch_mxfp8moe.quantize_1x32(x, out=(data[1:4].view(torch.float8_e4m3fn), scale[1:4]))
    return torch.add(data, 1), torch.add(scale, 1)


def test_nodes_of_quantize_out():
    assert_expected_inline(
        captured(quantized_into, randn(3, 64)),
        """\
call_function <built-in method zeros>
call_function <built-in method zeros>
call_function <built-in function getitem>
call_method view
call_function <built-in function getitem>
call_function mxfp8moe.quantize_1x32.out
call_function <built-in method add>
call_function <built-in method add>""",
    )


@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=needs_compiler)))
def test_quantize_out_in_a_compiled_graph(backend):
    """Into buffers of the graph and into those of its caller, which a graph may read before and after."""

    def function(x, data, scale):
        before = torch.add(scale, 1)
        torch_mxfp8moe.quantize_1x32(torch.mul(x, 2), out=(data, scale))
        return before, torch.add(scale, 1), *quantized_into(x)

    x = randn(3, 64)
    outputs = [[torch.zeros(3, 64).to(torch.float8_e4m3fn), torch.zeros(3, 2).byte()] for _ in range(2)]
    want = function(x, *outputs[0])
    got = torch.compile(function, backend=backend, fullgraph=True)(x, *outputs[1])
    assert all(same_bytes(a, b) for a, b in zip(got, want, strict=True))
    assert all(same_bytes(*pair) for pair in zip(*outputs, strict=True))
    assert all(x._version for x in outputs[1]) and outputs[1][1].any()


def test_nodes_of_preshuffle():
    def function(weight, scale):
        return torch_mxfp8moe.preshuffle(weight, scale, layout="aiter_gfx950", gate_up=False, pad_to=128)

    weight, scale = torch_mxfp8moe.quantize_1x32(randn(2, 256, 96))
    assert_expected_inline(
        captured(function, weight, scale),
        """\
call_function mxfp8moe.preshuffle
call_function <built-in function getitem>
call_function <built-in function getitem>""",
    )


def test_nodes_of_preshuffle_out():
    def function(weight, scale):
        out = torch.empty_like(weight), torch.empty_like(scale)
        return torch_mxfp8moe.preshuffle(weight, scale, layout="row_major", gate_up=True, out=out)

    weight, scale = torch_mxfp8moe.quantize_1x32(randn(2, 64, 96))
    assert_expected_inline(
        captured(function, weight, scale),
        """\
call_function <built-in method empty_like>
call_function <built-in method empty_like>
call_function mxfp8moe.preshuffle.out""",
    )


def test_nodes_of_quantize_preshuffle():
    """Of rows that take turns, as the module gives them to it."""

    def function(x):
        halves = x.view(2, 96, 2, 256).transpose(1, 2)
        options = dict(layout="aiter_gfx950", gate_up=True, pad_to=128)
        weight, scale = torch_mxfp8moe.quantize_preshuffle(halves, **options)
        out = torch.empty_like(weight), torch.empty_like(scale)
        torch_mxfp8moe.quantize_preshuffle(halves, "ceil", **options, out=out)
        return weight, scale, *out

    assert_expected_inline(
        captured(function, randn(2, 192, 256, dtype=torch.bfloat16)),
        """\
call_method view
call_method transpose
call_function mxfp8moe.quantize_preshuffle
call_function <built-in function getitem>
call_function <built-in function getitem>
call_function <built-in method empty_like>
call_function <built-in method empty_like>
call_function mxfp8moe.quantize_preshuffle.out""",
    )


def test_nodes_of_fused_moe():
    assert_expected_inline(
        captured(moe, *tokens(4)),
        """call_function mxfp8moe.fused_moe""",
    )


def test_nodes_of_fused_moe_out():
    assert_expected_inline(
        captured(moe_out, *tokens(4)),
        """\
call_function <built-in method empty_like>
call_function mxfp8moe.fused_moe.out
call_function <built-in method mul>""",
    )


def test_nodes_of_fused_moe_with_all_arguments():
    def function(x, topk_weights, topk_ids, expert_map, num_tokens):
        return moe(
            x, topk_weights, topk_ids, expert_map=expert_map, num_tokens=num_tokens, swiglu_limit=7.0,
            swiglu_alpha=1.702, swiglu_beta=1.0, activation_dtype="bf16", backend="reference", out_dtype=torch.float32,
        )  # fmt: skip

    extra = torch.tensor([3, 1, -1, 0], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    assert_expected_inline(
        captured(function, *tokens(4), *extra),
        """call_function mxfp8moe.fused_moe""",
    )


def test_nodes_of_fused_moe_with_e8m0_scales():
    """The typed entry point takes a view before the op; the op sees uint8."""

    def function(x, topk_weights, topk_ids, w1_scale, w2_scale):
        weights = WEIGHTS | dict(w1_scale=w1_scale, w2_scale=w2_scale)
        return torch_mxfp8moe.fused_moe(x, topk_weights=topk_weights, topk_ids=topk_ids, **weights)

    scales = WEIGHTS["w1_scale"].view(E8M0), WEIGHTS["w2_scale"].view(E8M0)
    assert_expected_inline(
        captured(function, *tokens(4), *scales),
        """\
call_method view
call_method view
call_function mxfp8moe.fused_moe""",
    )


# --- token counts


def quantize_out(x):
    data, scale = torch.empty(x.shape, dtype=torch.float8_e4m3fn), torch.empty(x.shape[0], 2, dtype=torch.uint8)
    torch_mxfp8moe.quantize_1x32(x, out=(data, scale))
    return torch.add(scale, 1)


FUNCTIONS = {
    "quantize_1x32": lambda x, *_: torch_mxfp8moe.quantize_1x32(x)[0],
    "quantize_1x32.out": lambda x, *_: quantize_out(x),
    "dequantize_1x32": lambda x, *_: torch_mxfp8moe.dequantize_1x32(*torch_mxfp8moe.quantize_1x32(x)),
    "fused_moe": moe,
    "fused_moe.out": moe_out,
    "pipeline": pipeline,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dynamic, compiles", ((None, 4), (True, 3)))
def test_token_counts_do_not_recompile(name, dynamic, compiles):
    """Static, dynamic, and PyTorch's own specialisation of 1 and of 0; nothing more."""
    capture = Capture()
    function = torch.compile(FUNCTIONS[name], backend=capture, fullgraph=True, dynamic=dynamic)
    for T in (*TOKEN_COUNTS, 5, 64, 130, 1, 0):
        assert same_bytes(function(*tokens(T)), FUNCTIONS[name](*tokens(T)))
    assert len(capture.graphs) <= compiles


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_compile_with_an_unbacked_token_count(name):
    capture = Capture()
    function = torch.compile(FUNCTIONS[name], backend=capture, fullgraph=True)
    for T in TOKEN_COUNTS:
        args = tokens(T)
        for x in args:
            mark_unbacked(x, 0)
        assert same_bytes(function(*args), FUNCTIONS[name](*tokens(T)))
    assert len(capture.graphs) == 1


@needs_compiler
def test_one_inductor_compile_with_an_unbacked_token_count():
    torch._dynamo.utils.counters.clear()
    function = torch.compile(pipeline, fullgraph=True)
    for T in TOKEN_COUNTS:
        args = tokens(T)
        for x in args:
            mark_unbacked(x, 0)
        assert same_bytes(function(*args), pipeline(*tokens(T)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_token_count_that_does_not_fit_is_an_error_in_the_graph():
    """What can only be checked when the graph runs, is."""
    function = torch.compile(moe, backend="aot_eager", fullgraph=True, dynamic=True)
    x, topk_weights, topk_ids = tokens(6)
    function(x, topk_weights, topk_ids)
    with pytest.raises(Exception, match="topk_ids has shape"):
        function(x[:5], topk_weights, topk_ids)


# --- the eager bits


@needs_compiler
@pytest.mark.parametrize("name", FUNCTIONS)
def test_inductor_gives_the_eager_bits(name):
    function = torch.compile(FUNCTIONS[name], fullgraph=True)
    for T in TOKEN_COUNTS:
        assert same_bytes(function(*tokens(T)), FUNCTIONS[name](*tokens(T)))


@needs_compiler
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_inductor_compiles_both_forms_with_either_scale_dtype(dtype):
    def function(x, topk_weights, topk_ids, weights):
        out = torch.empty_like(x)
        torch_mxfp8moe.fused_moe(x, topk_weights=topk_weights, topk_ids=topk_ids, **weights, out=out)
        return out * 2 + torch_mxfp8moe.fused_moe(x, topk_weights=topk_weights, topk_ids=topk_ids, **weights)

    as_e8m0 = {name: x.view(E8M0) if name.endswith("scale") else x for name, x in WEIGHTS.items()}
    args = tokens(5, dtype=dtype)
    want = function(*args, WEIGHTS)
    for weights in (WEIGHTS, as_e8m0):
        assert same_bytes(torch.compile(function, fullgraph=True)(*args, weights), want)


@needs_compiler
def test_inductor_writes_out_into_rows_of_a_graph_input():
    """A buffer that lives outside the graph; what is beside those rows stays. (Dynamo takes no strided ``out=``.)"""

    def function(buffer, x, topk_weights, topk_ids):
        moe(x, topk_weights, topk_ids, out=buffer[1:-1])
        return buffer * 2

    args = tokens(5)
    buffers = [torch.full((7, 64), 3.0, dtype=torch.bfloat16) for _ in range(2)]
    want = function(buffers[0], *args)
    got = torch.compile(function, fullgraph=True)(buffers[1], *args)
    assert same_bytes(*buffers) and same_bytes(got, want)
    assert buffers[0][[0, -1]].eq(3).all() and not buffers[0][1:-1].eq(3).all()


@needs_compiler
def test_inductor_keeps_the_strides_that_the_op_is_given():
    """Non-contiguous rows that a fused graph produces, and a result that is used transposed."""

    def function(x, topk_weights, topk_ids):
        wide = torch.cat([x * 2, x + 1], 1)
        return moe(wide[:, 32:96], topk_weights, topk_ids).t().contiguous(), OPS.quantize_1x32(wide[:, 32:])[1]

    args = tokens(6, dtype=torch.float32)
    for got, want in zip(torch.compile(function, fullgraph=True)(*args), function(*args), strict=True):
        assert same_bytes(got, want)


@needs_compiler
def test_inductor_on_preshuffle():
    weight, scale = torch_mxfp8moe.quantize_1x32(randn(2, 256, 96))

    def function(weight, scale):
        first = torch_mxfp8moe.preshuffle(weight, scale, layout="aiter_gfx950", gate_up=False, pad_to=128)
        out = torch.empty_like(first[0]), torch.empty_like(first[1])
        torch_mxfp8moe.preshuffle(weight, scale, layout="aiter_gfx950", gate_up=False, pad_to=128, out=out)
        return *first, *out

    want = function(weight, scale)
    for view in (scale, scale.view(E8M0)):
        for a, b in zip(torch.compile(function, fullgraph=True)(weight, view), want, strict=True):
            assert same_bytes(a, b)


@needs_compiler
def test_inductor_on_quantize_preshuffle():
    """Of rows that the graph makes, which it may not lay out in another way, into buffers of its own and a caller's."""
    options = dict(layout="aiter_gfx950", gate_up=True, pad_to=128)

    def function(x, weight, scale):
        halves = torch.mul(x, 2).view(2, 96, 2, 256).transpose(1, 2)
        torch_mxfp8moe.quantize_preshuffle(halves, **options, out=(weight, scale))
        return torch_mxfp8moe.quantize_preshuffle(halves, "floor", **options)

    x = randn(2, 192, 256, dtype=torch.bfloat16)
    written = [[torch.empty_like(part) for part in function(x, *OPS.quantize_preshuffle(x, **options))] for _ in "ab"]
    want = function(x, *written[0])
    got = torch.compile(function, fullgraph=True)(x, *written[1])
    assert all(same_bytes(*pair) for pair in zip((*got, *written[1]), (*want, *written[0]), strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_options_reach_the_op(mode):
    x = randn(4, 64)

    def function(x):
        return OPS.quantize_1x32(x, scale_rounding=mode)

    for got, want in zip(torch.compile(function, backend="aot_eager", fullgraph=True)(x), function(x), strict=True):
        assert same_bytes(got, want)


@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode, torch.enable_grad))
@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=needs_compiler)))
def test_grad_modes(backend, context):
    with context():
        args = tokens(4)
        function = torch.compile(pipeline, backend=backend, fullgraph=True)
        for T in (4, 6, 1):
            assert same_bytes(function(*tokens(T)), pipeline(*tokens(T)))
        assert not function(*args).requires_grad


def test_wrong_arguments_are_errors_while_tracing():
    def function(x, topk_weights, topk_ids):
        return moe(x, topk_weights, topk_ids, swiglu_limit=-3.0)

    with pytest.raises(Exception, match="fused_moe: swiglu_limit is -3.0"):
        torch.compile(function, backend="eager", fullgraph=True)(*tokens(4))


# --- export and packages


class Model(torch.nn.Module):
    """Everything that a serving process would package."""

    def __init__(self, dequantize: bool = True):
        super().__init__()
        self.dequantize = dequantize
        for name, x in WEIGHTS.items():
            self.register_buffer(name, x)

    def forward(self, x, topk_weights, topk_ids):
        weights = {name: getattr(self, name) for name in WEIGHTS}
        data, scale = torch_mxfp8moe.quantize_1x32(x)
        options = dict(topk_weights=topk_weights, topk_ids=topk_ids, **weights)
        first = torch_mxfp8moe.fused_moe(data, hidden_states_scale=scale, swiglu_limit=7.0, **options)
        out = torch.empty_like(x)
        torch_mxfp8moe.fused_moe(x + first, activation_dtype="bf16", out=out, **options)
        return out + torch_mxfp8moe.dequantize_1x32(data, scale, x.dtype) if self.dequantize else out


def exported(strict: bool = True, unbounded: bool = True, dequantize: bool = True):
    T = torch.export.Dim("T") if unbounded else torch.export.Dim("T", min=1, max=256)
    return torch.export.export(Model(dequantize), tokens(8), dynamic_shapes=[{0: T}] * 3, strict=strict)


@pytest.mark.parametrize("unbounded", (True, False))
@pytest.mark.parametrize("strict", (True, False))
def test_export_with_a_dynamic_token_count(strict, unbounded):
    """Saved and loaded, scales as uint8."""
    program = exported(strict, unbounded)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for module in (program.module(), torch.export.load(file).module()):
        for T in (8, 3, 17, 1, 130):
            assert same_bytes(module(*tokens(T)), Model()(*tokens(T)))


def test_exported_graph():
    assert_expected_inline(
        "\n".join(str(node.target) for node in exported().graph.nodes if node.op == "call_function"),
        """\
mxfp8moe.quantize_1x32.default
<built-in function getitem>
<built-in function getitem>
mxfp8moe.fused_moe.default
aten.empty_like.default
aten.add.Tensor
mxfp8moe.fused_moe.out
mxfp8moe.dequantize_1x32.default
aten.add.Tensor""",
    )


@needs_compiler
def test_aot_inductor_package(tmp_path):
    """Built, loaded and run here, and in a process that has imported nothing else but this package.

    AOTInductor of torch 2.11 hands an op's ScalarType to it in the numbering of exported programs (13, its bfloat16, is
    c10's QUInt8), so that dequantize_1x32, whose dtype is one, has to be left out there.
    """
    if device.NAME == "cuda" and aot_inductor_why_not():
        pytest.skip(aot_inductor_why_not())
    dequantize = torch.__version__ >= (2, 12)
    model = Model(dequantize)
    with torch.no_grad():
        program = exported(dequantize=dequantize)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for T in (8, 3, 1, 17, 0, 130):
        assert same_bytes(package(*tokens(T)), model(*tokens(T)))
    args, expected = tmp_path / "args.pt", tmp_path / "expected.pt"
    torch.save(tokens(5), args)
    torch.save(model(*tokens(5)), expected)
    code = """
import sys
import device  # where this process runs its ops
import torch, torch_mxfp8moe
package, args, expected = sys.argv[1:]
print(torch.equal(torch._inductor.aoti_load_package(package)(*torch.load(args)), torch.load(expected)))
"""
    assert run_python(code, path, str(args), str(expected)).strip() == "True"
