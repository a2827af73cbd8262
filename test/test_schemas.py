"""The schemas as PyTorch holds them, and what serves each op on the CPU."""

import pytest
import torch
from expecttest import assert_expected_inline

from helpers import OPS, needs_extension
from torch_mxfp8moe import ops


def one_argument_a_line(schema: torch.FunctionSchema) -> str:
    arguments, returns = str(schema).split(" -> ")
    return arguments.replace("(", "(\n    ", 1).replace(", ", ",\n    ")[:-1] + f"\n) -> {returns}"


def test_quantize_1x32():
    assert_expected_inline(
        str(OPS.quantize_1x32.default._schema),
        """mxfp8moe::quantize_1x32(Tensor x, *, str scale_rounding="rceil") -> (Tensor data, Tensor scale)""",
    )


def test_quantize_1x32_out():
    assert_expected_inline(
        one_argument_a_line(OPS.quantize_1x32.out._schema),
        """\
mxfp8moe::quantize_1x32.out(
    Tensor x,
    *,
    str scale_rounding="rceil",
    Tensor(a!) out_data,
    Tensor(b!) out_scale
) -> ()""",
    )


def test_dequantize_1x32():
    assert_expected_inline(
        str(OPS.dequantize_1x32.default._schema),
        """mxfp8moe::dequantize_1x32(Tensor data, Tensor scale, *, ScalarType dtype) -> Tensor""",
    )


def test_preshuffle():
    assert_expected_inline(
        one_argument_a_line(OPS.preshuffle.default._schema),
        """\
mxfp8moe::preshuffle(
    Tensor weight,
    Tensor scale,
    *,
    str layout,
    bool gate_up,
    int pad_to=1
) -> (Tensor weight, Tensor scale)""",
    )


def test_preshuffle_out():
    assert_expected_inline(
        one_argument_a_line(OPS.preshuffle.out._schema),
        """\
mxfp8moe::preshuffle.out(
    Tensor weight,
    Tensor scale,
    *,
    str layout,
    bool gate_up,
    int pad_to=1,
    Tensor(a!) out_weight,
    Tensor(b!) out_scale
) -> ()""",
    )


def test_quantize_preshuffle():
    assert_expected_inline(
        one_argument_a_line(OPS.quantize_preshuffle.default._schema),
        """\
mxfp8moe::quantize_preshuffle(
    Tensor x,
    *,
    str scale_rounding="rceil",
    str layout,
    bool gate_up,
    int pad_to=1
) -> (Tensor weight, Tensor scale)""",
    )


def test_quantize_preshuffle_out():
    assert_expected_inline(
        one_argument_a_line(OPS.quantize_preshuffle.out._schema),
        """\
mxfp8moe::quantize_preshuffle.out(
    Tensor x,
    *,
    str scale_rounding="rceil",
    str layout,
    bool gate_up,
    int pad_to=1,
    Tensor(a!) out_weight,
    Tensor(b!) out_scale
) -> ()""",
    )


def test_fused_moe():
    assert_expected_inline(
        one_argument_a_line(OPS.fused_moe.default._schema),
        """\
mxfp8moe::fused_moe(
    Tensor hidden_states,
    Tensor w1,
    Tensor w1_scale,
    Tensor w2,
    Tensor w2_scale,
    Tensor topk_weights,
    Tensor topk_ids,
    *,
    Tensor? hidden_states_scale=None,
    Tensor? w1_bias=None,
    Tensor? w2_bias=None,
    Tensor? expert_map=None,
    Tensor? num_tokens=None,
    float swiglu_alpha=1.,
    float swiglu_beta=0.,
    float? swiglu_limit=None,
    bool apply_router_weight_on_input=False,
    str layout="row_major",
    str activation_dtype="mxfp8",
    str backend="auto",
    ScalarType? out_dtype=None
) -> Tensor""",
    )


def test_fused_moe_out():
    assert_expected_inline(
        one_argument_a_line(OPS.fused_moe.out._schema),
        """\
mxfp8moe::fused_moe.out(
    Tensor hidden_states,
    Tensor w1,
    Tensor w1_scale,
    Tensor w2,
    Tensor w2_scale,
    Tensor topk_weights,
    Tensor topk_ids,
    *,
    Tensor? hidden_states_scale=None,
    Tensor? w1_bias=None,
    Tensor? w2_bias=None,
    Tensor? expert_map=None,
    Tensor? num_tokens=None,
    float swiglu_alpha=1.,
    float swiglu_beta=0.,
    float? swiglu_limit=None,
    bool apply_router_weight_on_input=False,
    str layout="row_major",
    str activation_dtype="mxfp8",
    str backend="auto",
    Tensor(a!) out
) -> ()""",
    )


def test_nothing_else_is_public():
    names = {name.removeprefix("mxfp8moe::") for name in torch._C._dispatch_get_all_op_names() if "mxfp8moe::" in name}
    assert {name for name in names if not name.startswith("_")} == set(ops.SCHEMAS)


@needs_extension
@pytest.mark.parametrize("name", sorted(name for name in ops.SCHEMAS if "preshuffle" not in name))
def test_cpp_serves_cpu_tensors(name):
    """A kernel of PyTorch's dispatcher under the key CPU: no Python on the way."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mxfp8moe::{name}", "CPU")
