"""The ops of namespace ``mxfp8moe``: their schemas, registration and typed entry points.

The schemas are defined here and nowhere else. Each op has a fake kernel (:mod:`.fake`), a Python kernel for every
device that asks :mod:`.dispatch` who serves the call, and on the CPU, if the extension is there, a C++ kernel that
PyTorch's dispatcher reaches without Python. Autograd falls through: the ops are inference only, and say so where an
input needs a gradient.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version

from . import dispatch, fake
from . import extension as extension  # loads the C++ kernels, if they are there
from .arguments import Dequantize, FusedMoe, Preshuffle, Quantize, QuantizePreshuffle
from .formats import as_bytes

NAMESPACE = "mxfp8moe"

_FUSED_MOE_ARGUMENTS = (
    "Tensor hidden_states, Tensor w1, Tensor w1_scale, Tensor w2, Tensor w2_scale, Tensor topk_weights, "
    "Tensor topk_ids, *, Tensor? hidden_states_scale=None, Tensor? w1_bias=None, Tensor? w2_bias=None, "
    "Tensor? expert_map=None, Tensor? num_tokens=None, float swiglu_alpha=1.0, float swiglu_beta=0.0, "
    'float? swiglu_limit=None, bool apply_router_weight_on_input=False, str layout="row_major", '
    'str activation_dtype="mxfp8", str backend="auto"'
)
_QUANTIZE_ARGUMENTS = 'Tensor x, *, str scale_rounding="rceil"'
_ARRANGEMENT = "str layout, bool gate_up, int pad_to=1"
_PRESHUFFLE_ARGUMENTS = f"Tensor weight, Tensor scale, *, {_ARRANGEMENT}"
_QUANTIZE_PRESHUFFLE_ARGUMENTS = f"{_QUANTIZE_ARGUMENTS}, {_ARRANGEMENT}"

SCHEMAS = {
    "quantize_1x32": f"({_QUANTIZE_ARGUMENTS}) -> (Tensor data, Tensor scale)",
    "quantize_1x32.out": f"({_QUANTIZE_ARGUMENTS}, Tensor(a!) out_data, Tensor(b!) out_scale) -> ()",
    "dequantize_1x32": "(Tensor data, Tensor scale, *, ScalarType dtype) -> Tensor",
    "preshuffle": f"({_PRESHUFFLE_ARGUMENTS}) -> (Tensor weight, Tensor scale)",
    "preshuffle.out": f"({_PRESHUFFLE_ARGUMENTS}, Tensor(a!) out_weight, Tensor(b!) out_scale) -> ()",
    "quantize_preshuffle": f"({_QUANTIZE_PRESHUFFLE_ARGUMENTS}) -> (Tensor weight, Tensor scale)",
    "quantize_preshuffle.out": f"({_QUANTIZE_PRESHUFFLE_ARGUMENTS}, Tensor(a!) out_weight, Tensor(b!) out_scale) -> ()",
    "fused_moe": f"({_FUSED_MOE_ARGUMENTS}, ScalarType? out_dtype=None) -> Tensor",
    "fused_moe.out": f"({_FUSED_MOE_ARGUMENTS}, Tensor(a!) out) -> ()",
}
"""Schema by op name, without the name. What the public ops take and return."""

# What the C++ kernels call where they do not serve a call themselves: the Python kernel's results, then its error's
# text as UTF-8 bytes, empty if there was none. (No exception crosses the stable ABI, and torch_call_dispatcher of torch
# 2.13 mixes up results of different types.)
_REFUSED_SCHEMAS = {
    "_refused_quantize_1x32": (
        f"({_QUANTIZE_ARGUMENTS}, Tensor(a!)? out_data=None, Tensor(b!)? out_scale=None) -> (Tensor, Tensor, Tensor)"
    ),
    "_refused_dequantize_1x32": "(Tensor data, Tensor scale, *, ScalarType dtype) -> (Tensor, Tensor)",
    "_refused_fused_moe": (
        f"({_FUSED_MOE_ARGUMENTS}, ScalarType? out_dtype=None, Tensor(a!)? out=None) -> (Tensor, Tensor)"
    ),
}
# A private C++ kernel that Python calls.
_EXTENSION_SCHEMAS = {"_scatter_rows": "(Tensor source, Tensor rows, Tensor columns, Tensor(a!) out) -> ()"}


def _quantize_1x32(x, *, scale_rounding="rceil", out_data=None, out_scale=None):
    return dispatch.quantize_1x32(Quantize(x, scale_rounding, out_data, out_scale).check_once())


def _quantize_1x32_out(x, *, scale_rounding="rceil", out_data, out_scale):
    dispatch.quantize_1x32(Quantize(x, scale_rounding, out_data, out_scale).check_once(writes_out=True))
    increment_version((out_data, out_scale))


def _dequantize_1x32(data, scale, *, dtype):
    return dispatch.dequantize_1x32(Dequantize(data, scale, dtype).check_once())


def _preshuffle(weight, scale, *, layout, gate_up, pad_to=1):
    return dispatch.preshuffle(Preshuffle(weight, scale, layout, gate_up, pad_to).check_once())


def _preshuffle_out(weight, scale, *, layout, gate_up, pad_to=1, out_weight, out_scale):
    call = Preshuffle(weight, scale, layout, gate_up, pad_to, out_weight, out_scale)
    dispatch.preshuffle(call.check_once(writes_out=True))
    increment_version((out_weight, out_scale))


def _quantize_preshuffle(x, *, scale_rounding="rceil", layout, gate_up, pad_to=1):
    return dispatch.quantize_preshuffle(QuantizePreshuffle(x, layout, gate_up, scale_rounding, pad_to).check_once())


def _quantize_preshuffle_out(x, *, scale_rounding="rceil", layout, gate_up, pad_to=1, out_weight, out_scale):
    call = QuantizePreshuffle(x, layout, gate_up, scale_rounding, pad_to, out_weight, out_scale)
    dispatch.quantize_preshuffle(call.check_once(writes_out=True))
    increment_version((out_weight, out_scale))


def _fused_moe(*args, **kwargs):
    return dispatch.fused_moe(FusedMoe(*args, **kwargs).check_once())


def _fused_moe_out(*args, out, **kwargs):
    dispatch.fused_moe(FusedMoe(*args, **kwargs, out=out).check_once(writes_out=True))
    increment_version(out)


def _or_error(kernel, outputs):
    """``kernel`` with ``outputs`` tensors as a kernel that returns them and its error's text (see _REFUSED_SCHEMAS)."""

    def wrapped(*args, **kwargs):
        nothing = torch.empty(0, dtype=torch.uint8)
        try:
            result = kernel(*args, **kwargs)
        except Exception as error:
            text = (str(error) or type(error).__name__).encode()
            return *(nothing for _ in range(outputs)), torch.frombuffer(bytearray(text), dtype=torch.uint8)
        if any(kwargs.get(name) is not None for name in ("out", "out_data")):
            return *(nothing for _ in range(outputs)), nothing  # the caller holds them
        return *(result if outputs > 1 else (result,)), nothing

    return wrapped


_KERNELS = {
    "quantize_1x32": (_quantize_1x32, fake.quantize_1x32),
    "quantize_1x32.out": (_quantize_1x32_out, fake.quantize_1x32_out),
    "dequantize_1x32": (_dequantize_1x32, fake.dequantize_1x32),
    "preshuffle": (_preshuffle, fake.preshuffle),
    "preshuffle.out": (_preshuffle_out, fake.preshuffle_out),
    "quantize_preshuffle": (_quantize_preshuffle, fake.quantize_preshuffle),
    "quantize_preshuffle.out": (_quantize_preshuffle_out, fake.quantize_preshuffle_out),
    "fused_moe": (_fused_moe, fake.fused_moe),
    "fused_moe.out": (_fused_moe_out, fake.fused_moe_out),
}
_REFUSED_KERNELS = {
    "_refused_quantize_1x32": _or_error(_quantize_1x32, 2),
    "_refused_dequantize_1x32": _or_error(_dequantize_1x32, 1),
    "_refused_fused_moe": _or_error(_fused_moe, 1),
}


def _no_transform(name):
    """The kernel of ``name`` inside torch.func transforms, which would otherwise go past the op with zero gradients."""

    def refuse(*args, **kwargs):
        raise NotImplementedError(f"{name}: there is no rule for torch.func transforms (grad, vjp, jvp, vmap)")

    return refuse


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _name, _schema in (SCHEMAS | _REFUSED_SCHEMAS | _EXTENSION_SCHEMAS).items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
for _name, (_kernel, _fake_kernel) in _KERNELS.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    _library.impl(_name, _no_transform(_name), "FuncTorchDynamicLayerFrontMode")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake_kernel, lib=_library)
for _name, _kernel in _REFUSED_KERNELS.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


def _pair(op: str, out: object, names: str) -> Sequence[torch.Tensor]:
    """``out`` of ``op``, which is two tensors; for Python, which would unpack other things as well."""
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError(f"{op}: out is a {type(out).__name__}; it takes two tensors, ({names})")
    return out


def quantize_1x32(
    x: torch.Tensor, scale_rounding: str = "rceil", *, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to MXFP8: blocks of 32 along the last dimension share one power-of-two scale.

    Args:
        x: [..., C] bf16, fp16 or fp32, C divisible by 32; last stride 1, any other strides.
        scale_rounding: how a block's scale follows from its largest magnitude: ``"rceil"`` (2^ceil(log2(amax / 448)),
            never saturates; aiter, vLLM and torchao's default), ``"floor"`` (OCP MX v1.0), ``"ceil"`` or ``"even"``.
            The bytes are those of torchao's ``to_mx``.
        out: write to these two tensors, (data, scale) as below, instead of new ones. They share no memory with x or
            with each other; the scale may be ``float8_e8m0fnu``.

    Returns:
        data [..., C] ``float8_e4m3fn`` and scale [..., C/32] uint8, both contiguous: x is about
        ``data * 2^(scale - 127)``. A block that holds Inf or NaN becomes scale 255 and 32 NaN codes. These are ``out``
        if it was given.

    Raises:
        TypeError, ValueError (RuntimeError from the C++ kernel): an argument is not as above; ``out`` is as it was.
        RuntimeError: x or ``out`` requires a gradient and grad mode is on.
    """
    if out is None:
        return torch.ops.mxfp8moe.quantize_1x32(x, scale_rounding=scale_rounding)
    data, scale = _pair("quantize_1x32", out, "data, scale")
    torch.ops.mxfp8moe.quantize_1x32.out(x, scale_rounding=scale_rounding, out_data=data, out_scale=as_bytes(scale))
    return out


def dequantize_1x32(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values that MXFP8 data stand for: ``data * 2^(scale - 127)``, correctly rounded to ``dtype``.

    Args:
        data: [..., C] ``float8_e4m3fn``, C divisible by 32; last stride 1.
        scale: [..., C/32] uint8 or ``float8_e8m0fnu``; last stride 1.
        dtype: bf16, fp16 or fp32.

    Returns:
        [..., C] ``dtype``, contiguous. fp32 is exact wherever fp32 can hold the value and infinite beyond; scale 255
        gives NaN.

    Raises:
        TypeError, ValueError (RuntimeError from the C++ kernel): an argument is not as above.
    """
    return torch.ops.mxfp8moe.dequantize_1x32(data, as_bytes(scale), dtype=dtype)


def preshuffle(
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    layout: str,
    gate_up: bool,
    pad_to: int = 1,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring expert weights from checkpoint order into the layout that a backend reads.

    Args:
        weight: ``float8_e4m3fn``, contiguous: [E, 2I, H], gate rows then up rows, if ``gate_up``; [E, H, I] if not.
        scale: uint8 or ``float8_e8m0fnu``, contiguous: the shape of weight with its last dimension divided by 32.
        layout: ``"row_major"`` or ``"aiter_gfx950"`` (see :mod:`torch_mxfp8moe.layouts`).
        gate_up: whether weight holds the gate and up projections (w1) or the down projection (w2).
        pad_to: round I up to a multiple of this (1, or a multiple of 32) with zero weights of scale 1.0, which
            changes no result. Give both weights the same, and pad biases with zeros to match.
        out: write to these two tensors, (weight, scale), instead of new ones.

    Returns:
        weight with I rounded up, its shape otherwise kept, and scale as uint8: [E, R, C/32] for ``row_major``,
        [E * R, C/32 rounded up to a multiple of 8] for ``aiter_gfx950``. These are ``out`` if it was given.

    Raises:
        TypeError, ValueError: an argument is not as above, or the sizes do not fit the layout: ``aiter_gfx950`` takes
            H divisible by 256 and I divisible by 128.
    """
    scale = as_bytes(scale)
    if out is None:
        return torch.ops.mxfp8moe.preshuffle(weight, scale, layout=layout, gate_up=gate_up, pad_to=pad_to)
    out_weight, out_scale = _pair("preshuffle", out, "weight, scale")
    torch.ops.mxfp8moe.preshuffle.out(
        weight, scale, layout=layout, gate_up=gate_up, pad_to=pad_to, out_weight=out_weight,
        out_scale=as_bytes(out_scale),
    )  # fmt: skip
    return out


def quantize_preshuffle(
    x: torch.Tensor,
    scale_rounding: str = "rceil",
    *,
    layout: str,
    gate_up: bool,
    pad_to: int = 1,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise expert weights straight into the layout that a backend reads: the bytes of :func:`preshuffle` of
    :func:`quantize_1x32`, in one pass on a GPU.

    Args:
        x: bf16, fp16 or fp32: [E, 2I, H], gate rows then up rows, or [E, 2, I, H], so that a view of rows that take
            turns will do, if ``gate_up``; [E, H, I] if not. Last stride 1, any other strides.
        scale_rounding: as :func:`quantize_1x32` takes it.
        layout, gate_up, pad_to: as :func:`preshuffle` takes them.
        out: write to these two tensors, (weight, scale), instead of new ones. They share no memory with x or with each
            other; the scale may be ``float8_e8m0fnu``.

    Returns:
        weight and scale as :func:`preshuffle` returns them. These are ``out`` if it was given.

    Raises:
        TypeError, ValueError: an argument is not as above, or the sizes do not fit the layout; ``out`` is as it was.
        RuntimeError: x or ``out`` requires a gradient and grad mode is on.
    """
    options = dict(scale_rounding=scale_rounding, layout=layout, gate_up=gate_up, pad_to=pad_to)
    if out is None:
        return torch.ops.mxfp8moe.quantize_preshuffle(x, **options)
    out_weight, out_scale = _pair("quantize_preshuffle", out, "weight, scale")
    torch.ops.mxfp8moe.quantize_preshuffle.out(x, **options, out_weight=out_weight, out_scale=as_bytes(out_scale))
    return out


def fused_moe(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w1_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    hidden_states_scale: torch.Tensor | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
    swiglu_alpha: float = 1.0,
    swiglu_beta: float = 0.0,
    swiglu_limit: float | None = None,
    apply_router_weight_on_input: bool = False,
    layout: str = "row_major",
    activation_dtype: str = "mxfp8",
    backend: str = "auto",
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A mixture-of-experts feed-forward layer: every token through its top-k experts, summed with routing weights.

    For token t and its k-th expert e: (g, u) = w1[e] x + w1_bias[e], h = g * sigmoid(alpha * g) * (u + beta),
    out[t] = sum over k of topk_weights[t, k] * (w2[e] h + w2_bias[e]). Sums are taken in fp32.

    T tokens, H hidden size, I intermediate size, E local experts, G global experts, K experts per token.

    Args:
        hidden_states: [T, H] bf16, fp16 or fp32; or ``float8_e4m3fn`` with ``hidden_states_scale``.
        w1: [E, 2I, H] ``float8_e4m3fn``, gate rows then up rows; w1_scale: [E, 2I, H/32] uint8 or ``float8_e8m0fnu``.
        w2: [E, H, I] ``float8_e4m3fn``; w2_scale: [E, H, I/32]. All four contiguous, in ``layout``.
        topk_weights: [T, K] fp32, bf16, fp16 or fp64, used as fp32.
        topk_ids: [T, K] int32 or int64, global expert ids. An id that is negative, not below G or not local adds
            nothing to its token.
        hidden_states_scale: [T, H/32] scale bytes of hidden states that arrive quantised.
        w1_bias: [E, 2I], w2_bias: [E, H], fp32, bf16, fp16 or fp64, in checkpoint order whatever the layout.
        expert_map: [G] int32, the local expert of each global id, -1 for one held elsewhere. Without it the ids are
            local.
        num_tokens: int32, one element: rows from there on give zeros and cost next to nothing.
        swiglu_alpha, swiglu_beta: 1, 0 is SwiGLU; 1.702, 1 is gpt-oss's.
        swiglu_limit: clamps g to at most this and u to plus or minus this; None clamps nothing.
        apply_router_weight_on_input: multiply g and u by the routing weight instead of the result; K must be 1.
        layout: the order of the weights' bytes, as ``preshuffle`` made it.
        activation_dtype: what activations are rounded to before each product: ``"mxfp8"`` or ``"bf16"``.
        backend: ``"auto"`` or the name of one (``torch_mxfp8moe.backends()``).
        out_dtype: bf16, fp16 or fp32; that of hidden_states by default, bf16 if those are MXFP8.
        out: [T, H], written instead of a new tensor; its dtype is then the output's.

    Returns:
        [T, H]. A token with no local expert gets exact zeros. The same call gives the same bits every time.

    Raises:
        TypeError, ValueError, NotImplementedError (RuntimeError from the C++ kernel): an argument is not as above, or
            no backend serves the call; ``torch_mxfp8moe.explain`` tells why.
        RuntimeError: an input requires a gradient and grad mode is on.
    """
    options = dict(
        hidden_states_scale=as_bytes(hidden_states_scale),
        w1_bias=w1_bias,
        w2_bias=w2_bias,
        expert_map=expert_map,
        num_tokens=num_tokens,
        swiglu_alpha=swiglu_alpha,
        swiglu_beta=swiglu_beta,
        swiglu_limit=swiglu_limit,
        apply_router_weight_on_input=apply_router_weight_on_input,
        layout=layout,
        activation_dtype=activation_dtype,
        backend=backend,
    )
    tensors = (hidden_states, w1, as_bytes(w1_scale), w2, as_bytes(w2_scale), topk_weights, topk_ids)
    if out is None:
        return torch.ops.mxfp8moe.fused_moe(*tensors, **options, out_dtype=out_dtype)
    if out_dtype is not None and isinstance(out, torch.Tensor) and out_dtype != out.dtype:
        raise ValueError(f"fused_moe: out_dtype is {out_dtype}; it takes None or that of out, {out.dtype}")
    torch.ops.mxfp8moe.fused_moe.out(*tensors, **options, out=out)
    return out


def explain(*args, **kwargs) -> dispatch.Explanation:
    """Which backend serves a call of :func:`fused_moe` with these arguments, and why each of the others does not.

    Takes the arguments of :func:`fused_moe`; computes nothing. Raises what the call would raise for arguments that no
    backend could take. ``print(explain(...))`` is meant to be read; ``.backend`` and ``.reasons`` to be used.
    """
    return dispatch.explain_call(FusedMoe(*args, **kwargs).check())


def warmup(tokens: Iterable[int], *args, **kwargs) -> None:
    """Compile and load all that calls of :func:`fused_moe` with these token counts need, so that no request waits.

    Runs one call for each count, on the device of the weights, with made-up activations and routing, and waits for the
    last one. Kernels are chosen by sizes, dtypes and options, never by values: what is compiled here serves every
    later call that differs from these arguments only in values, strides and the token counts of this list. Call it
    before CUDA graphs are captured.

    Args:
        tokens: the token counts that will be used, such as the buckets of a serving engine's graphs.
        *args, **kwargs: the arguments of one call of :func:`fused_moe`, of any token count. ``out`` is not written.

    Raises:
        What the call raises, and ValueError for a negative token count.
    """
    call = FusedMoe(*args, **kwargs).check()
    arguments: dict[str, Any] = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
    for count in tokens:
        if count < 0:
            raise ValueError(f"warmup: tokens has {count}; it takes counts of 0 or more")
        with torch.no_grad():
            replaced: dict[str, Any] = {
                name: torch.zeros((count, x.shape[1]), dtype=x.dtype, device=x.device)
                for name, x in call.inputs.items()
                if name in ("hidden_states", "hidden_states_scale", "topk_weights", "topk_ids")
            }
            # Spread over the experts, as tokens are.
            routes = torch.arange(count * call.topk, device=call.device).view(count, call.topk)
            replaced["topk_ids"] = (routes % call.global_experts).to(call.topk_ids.dtype)
            if call.out is not None:
                replaced["out"] = torch.empty((count, call.hidden), dtype=call.out.dtype, device=call.device)
            # The op, not its Python kernel: on the CPU PyTorch's dispatcher has another kernel for it.
            fused_moe(**{**arguments, **replaced})
    if call.device.type == "cuda":
        torch.cuda.synchronize(call.device)
