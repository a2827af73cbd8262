"""What must not reach aiter: everything that it refuses late, drops or computes wrongly.

aiter checks little of this itself; where a limit comes from is said beside it. Files are those of
https://github.com/ROCm/aiter at commit e4048607a5.
"""

from functools import cache

import torch

from ...arguments import FusedMoe
from ...formats import rounded_to_fp32

LAYOUT = "aiter_gfx950"

LARGEST_ROW = 8192
"""Of H and of I: what the activation quantiser takes, csrc/kernels/quant_kernels.cu; second stages "v2" too."""

MOST_TOKENS = 2**24
"""A sorted id has 24 bits for the token (csrc/include/moe_sorting_opus.h)."""

MOST_ROUTES = 126
"""A sorted id has 8 bits for the slot, which the quantiser reads as signed; one slot more is added, and one is the
sort's own."""

ALIGNMENT = 16
"""Bytes that a kernel reads at a time."""

LARGEST_BYTES = 2**32
"""What a kernel addresses of one tensor by 32-bit offsets, aiter/ops/flydsl/kernels/mixed_moe_gemm_2stage_common.py."""

LARGEST_TILE = 128
"""Rows that the sort pads an expert to, at most."""

ACTIVATIONS = {"Silu": (1.0, 0.0), "Swiglu": (1.702, 1.0)}
"""swiglu_alpha and swiglu_beta that aiter has, by the name of its ActivationType; both are constants there."""


@cache
def activation(alpha: float, beta: float) -> str | None:
    """The name of aiter's ActivationType for a SwiGLU; None if it has none."""
    for name, numbers in ACTIVATIONS.items():
        if (rounded_to_fp32(alpha), rounded_to_fp32(beta)) == tuple(map(rounded_to_fp32, numbers)):
            return name
    return None


def aligned(x: torch.Tensor) -> bool:
    """Whether kernels can read ``x`` from its first byte on; True for a fake one."""
    return type(x) not in (torch.Tensor, torch.nn.Parameter) or x.data_ptr() % ALIGNMENT == 0


def _largest(call: FusedMoe) -> tuple[int, str]:
    """Bytes and name of the largest tensor that aiter addresses with 32 bits."""
    slots = call.topk + 1
    sorted_rows = call.tokens * slots + (call.experts + 1) * LARGEST_TILE
    return max(
        (call.w1.numel(), "w1"),
        (call.w2.numel(), "w2"),
        (2 * call.tokens * call.hidden, "the output"),
        (sorted_rows * call.intermediate, "the intermediate"),
    )


def why_not(call: FusedMoe) -> str | None:
    """Why aiter on a gfx950 does not compute ``call``, or None if it does."""
    if call.layout != LAYOUT:
        return (
            f"it reads weights in layout '{LAYOUT}', not '{call.layout}': preshuffle them once, at load, with "
            "pad_to=128 if I is not divisible by that"
        )
    if call.hidden_states_scale is not None:
        return "it quantises hidden_states itself and ignores hidden_states_scale"
    if call.hidden_states.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes hidden_states of bfloat16 or float16, not {str(call.hidden_states.dtype)[6:]}"
    if call.result_dtype is not torch.bfloat16:
        return f"it writes bfloat16, not {str(call.result_dtype)[6:]}"
    if call.activation_dtype != "mxfp8":
        return f"it rounds activations to MXFP8, not to {call.activation_dtype}"
    if call.apply_router_weight_on_input:
        return "it has no kernel for apply_router_weight_on_input"
    if call.w1_bias is not None or call.w2_bias is not None:
        return "its tuned kernels drop w1_bias and w2_bias"
    name, limit = activation(call.swiglu_alpha, call.swiglu_beta), call.swiglu_limit
    if name is None:
        return (
            "it has swiglu_alpha, swiglu_beta of 1, 0 and of 1.702, 1, not of "
            f"{call.swiglu_alpha:g}, {call.swiglu_beta:g}"
        )
    if name == "Swiglu" and limit is None:
        return "it limits gpt-oss's SwiGLU to 7 where the call has no swiglu_limit"
    if limit is not None and rounded_to_fp32(limit) == 0:
        return f"it takes a swiglu_limit of zero in fp32, {limit:g}, for none"
    for symbol, size in (("H", call.hidden), ("I", call.intermediate)):
        if size > LARGEST_ROW:
            return f"its kernels take {symbol} of at most {LARGEST_ROW}, not {size}"
    if call.topk > MOST_ROUTES:
        return f"its kernels take at most {MOST_ROUTES} experts per token, not {call.topk}"
    if call.tokens >= MOST_TOKENS:
        return f"its kernels take fewer than {MOST_TOKENS} tokens, not {call.tokens}"
    for name in ("w1", "w1_scale", "w2", "w2_scale"):
        if not aligned(getattr(call, name)):
            return f"its kernels read {ALIGNMENT} bytes at a time, and {name} is not aligned to that"
    size, what = _largest(call)
    if size >= LARGEST_BYTES:
        return f"its kernels address less than {LARGEST_BYTES} bytes of a tensor, and {what} has {size}"
    return None
