"""The definitions once more: numpy float64, one value or one route at a time, sharing nothing with the package."""

import numpy as np
import torch


def _decode_code(code: int) -> float:
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


E4M3_VALUES = np.array([_decode_code(code) for code in range(256)])
"""The value of every e4m3fn code."""

SCALE_VALUES = np.array([2.0 ** (byte - 127) for byte in range(255)] + [np.nan])
"""The value of every E8M0 byte."""


def array(x: torch.Tensor) -> np.ndarray:
    """A tensor's values as float64; its bytes, if it holds e4m3fn codes or scale bytes."""
    x = x.cpu()
    if x.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
        return x.contiguous().view(torch.uint8).numpy()
    return x.numpy() if x.dtype in (torch.uint8, torch.int32, torch.int64) else x.double().numpy()


def decode(data: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """MXFP8 data [..., C] and scale [..., C/32] -> exact values."""
    return E4M3_VALUES[array(data)] * np.repeat(SCALE_VALUES[array(scale)], 32, axis=-1)


def encode(x: np.ndarray) -> np.ndarray:
    """x -> nearest e4m3fn code, ties to the even code, saturated at 448; sign kept on zeros."""
    magnitudes = E4M3_VALUES[:127]
    ties = (magnitudes[:-1] + magnitudes[1:]) / 2
    code = np.searchsorted(ties, np.abs(x), side="left")
    tie = np.abs(x) == np.append(ties, np.inf)[code]
    code = code + (tie & (code % 2 == 1))
    return (code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def mxfp8(x: np.ndarray) -> np.ndarray:
    """x [..., C] -> x rounded to MXFP8 with the smallest power-of-two scales that saturate nothing."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    amax = np.abs(blocks).max(-1, keepdims=True)
    byte = (amax > 448 * SCALE_VALUES[:-1]).sum(-1, keepdims=True)
    rounded = E4M3_VALUES[encode(blocks / SCALE_VALUES[byte])] * SCALE_VALUES[byte]
    return np.where(np.isfinite(amax), rounded, np.nan).reshape(x.shape)


def round_to(x: np.ndarray, mantissa_bits: int, min_exponent: int, largest: float) -> np.ndarray:
    """x rounded to nearest even in a binary float format with subnormals and infinities; values as float64."""
    exponent = np.frexp(x)[1] - 1
    quantum = np.ldexp(1.0, np.maximum(exponent, min_exponent) - mantissa_bits)
    rounded = np.round(x / quantum) * quantum
    return np.where(np.abs(rounded) > largest, np.copysign(np.inf, x), rounded)


FORMATS = {
    torch.float32: (23, -126, float(np.finfo(np.float32).max)),
    torch.float16: (10, -14, 65504.0),
    torch.bfloat16: (7, -126, 255 * 2.0**120),
}
"""The arguments of ``round_to`` for each dtype."""


def bf16(x: np.ndarray) -> np.ndarray:
    return round_to(x, *FORMATS[torch.bfloat16])


def fused_moe(
    *,
    hidden_states,
    w1,
    w1_scale,
    w2,
    w2_scale,
    topk_weights,
    topk_ids,
    hidden_states_scale=None,
    w1_bias=None,
    w2_bias=None,
    expert_map=None,
    num_tokens=None,
    swiglu_alpha=1.0,
    swiglu_beta=0.0,
    swiglu_limit=None,
    apply_router_weight_on_input=False,
    activation_dtype="mxfp8",
) -> np.ndarray:
    """out [T, H] in float64, of weights in checkpoint order."""
    activation = {"mxfp8": mxfp8, "bf16": bf16}[activation_dtype]
    gate_up, down = decode(w1, w1_scale), decode(w2, w2_scale)
    routing = array(topk_weights.float())
    experts, hidden, intermediate = down.shape
    out = np.zeros((len(hidden_states), hidden))
    for t in range(len(hidden_states)):
        if num_tokens is not None and t >= num_tokens.item():
            break
        if hidden_states_scale is not None:
            x = decode(hidden_states[t], hidden_states_scale[t])
        else:
            x = activation(array(hidden_states[t]))
        for k, expert in enumerate(topk_ids[t].tolist()):
            if expert_map is not None:
                expert = expert_map[expert].item() if 0 <= expert < len(expert_map) else -1
            if not 0 <= expert < experts:
                continue
            p = np.array([row @ x for row in gate_up[expert]])
            if w1_bias is not None:
                p = p + array(w1_bias[expert])
            if apply_router_weight_on_input:
                p = p * routing[t, k]
            g, u = p[:intermediate], p[intermediate:]
            if swiglu_limit is not None:
                g, u = np.minimum(g, swiglu_limit), np.maximum(np.minimum(u, swiglu_limit), -swiglu_limit)
            h = g / (1 + np.exp(-swiglu_alpha * g)) * (u + swiglu_beta)
            y = down[expert] @ activation(h.astype(np.float32).astype(np.float64))
            if w2_bias is not None:
                y = y + array(w2_bias[expert])
            out[t] += y if apply_router_weight_on_input else routing[t, k] * y
    return out
