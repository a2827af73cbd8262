"""What the ops compute, in plain PyTorch: the definition that every backend is held to. Runs on any device."""

import torch

from .formats import BLOCK, E4M3_MAX, E4M3_NAN, RCEIL_SLACK, SCALE_NAN, as_bytes, rounded_to_fp32
from .layouts import LAYOUTS, pad_intermediate

__all__ = [
    "dequantize_1x32",
    "fused_moe",
    "local_experts",
    "preshuffle",
    "quantize_1x32",
    "quantize_preshuffle",
    "scale_bytes",
    "swiglu",
]


def scale_bytes(amax: torch.Tensor, scale_rounding: str) -> torch.Tensor:
    """The E8M0 byte of blocks whose largest magnitude is ``amax`` (fp32, any shape), as int32 of the same shape.

    The modes are those of torchao's ``ScaleCalculationMode``: ``rceil`` 2^ceil(log2(amax / 448)), with what fp32 log2
    does not resolve left out (:func:`.formats.rceil_slack`); ``floor`` 2^(floor(log2 amax) - 8), OCP MX v1.0 section
    6.3; ``ceil`` 2^(ceil(log2 amax) - 8); ``even`` the same after rounding amax to three mantissa bits and then down.
    An amax that is Inf or NaN gives 255.
    """
    if scale_rounding == "rceil":
        # By a tensor: on a GPU, PyTorch multiplies by the reciprocal of a number instead of dividing by it.
        bits = (amax / torch.full_like(amax, E4M3_MAX)).view(torch.int32)
        exponent, mantissa = bits >> 23, bits & 0x7FFFFF
        slack = torch.tensor((*RCEIL_SLACK, 0), dtype=torch.int32, device=amax.device)[exponent.clamp(0, 255)]
        byte = torch.where(exponent > 0, exponent + (mantissa > slack).int(), (mantissa > (1 << 22) + slack).int())
    else:
        bits = amax.view(torch.int32)
        if scale_rounding == "even":
            bits = bits + (1 << 19)
        byte = bits >> 23
        if scale_rounding == "ceil":
            byte = byte + ((bits & 0x7FFFFF) > 0).int()
        byte = (byte - 8).clamp(min=0)
    return torch.where(amax.isfinite(), byte, SCALE_NAN)


@torch.no_grad()
def quantize_1x32(x: torch.Tensor, scale_rounding: str = "rceil") -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., C] bf16, fp16 or fp32 -> data [..., C] ``float8_e4m3fn``, scale [..., C/32] uint8.

    data = x / 2^(scale - 127), rounded to nearest even and saturated at 448. A block that holds Inf or NaN becomes
    scale 0xFF and 32 NaN codes.
    """
    blocks = x.float().unflatten(-1, (x.shape[-1] // BLOCK, BLOCK))
    scale = scale_bytes(blocks.abs().amax(-1), scale_rounding)
    inverse = ((254 - scale).clamp(min=0) << 23).view(torch.float32)  # 2^(127 - scale)
    data = (blocks * inverse.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    data = torch.where(scale.unsqueeze(-1) == SCALE_NAN, E4M3_NAN, data)
    return data.flatten(-2).view(torch.float8_e4m3fn), scale.to(torch.uint8)


@torch.no_grad()
def dequantize_1x32(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """data [..., C] ``float8_e4m3fn``, scale [..., C/32] -> data * 2^(scale - 127) as [..., C] ``dtype``.

    fp32 holds every product exactly, from 2^-136 up, but those that overflow to infinity; scale 255 and the NaN codes
    give NaN. bf16 and fp16 are rounded once from there.
    """
    factor = as_bytes(scale).contiguous().view(torch.float8_e8m0fnu).float()
    blocks = data.float().unflatten(-1, (data.shape[-1] // BLOCK, BLOCK))
    return (blocks * factor.unsqueeze(-1)).flatten(-2).to(dtype).contiguous()


@torch.no_grad()
def preshuffle(
    weight: torch.Tensor, scale: torch.Tensor, *, layout: str, gate_up: bool, pad_to: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [E, R, C] and scale [E, R, C/32] in checkpoint order -> both in ``layout``, I rounded up to ``pad_to``."""
    padded = pad_intermediate(weight, scale, gate_up, pad_to)
    weight, scale = LAYOUTS[layout].arrange(*padded, gate_up)
    return weight.clone(), scale.clone()


@torch.no_grad()
def quantize_preshuffle(
    x: torch.Tensor, scale_rounding: str = "rceil", *, layout: str, gate_up: bool, pad_to: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [E, R, C], or [E, 2, I, H] if ``gate_up``, bf16, fp16 or fp32 -> :func:`preshuffle` of what
    :func:`quantize_1x32` makes of it."""
    rows = x.flatten(1, 2) if x.dim() == 4 else x
    return preshuffle(*quantize_1x32(rows, scale_rounding), layout=layout, gate_up=gate_up, pad_to=pad_to)


def swiglu(gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None) -> torch.Tensor:
    """gate * sigmoid(alpha * gate) * (up + beta), with gate <= limit and |up| <= limit if there is a limit.

    alpha 1, beta 0 is SwiGLU (Shazeer, https://arxiv.org/abs/2002.05202); 1.702, 1 and limit 7 is gpt-oss's
    (https://github.com/openai/gpt-oss, gpt_oss/torch/model.py).
    """
    if limit is not None:
        limit = rounded_to_fp32(limit)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


def local_experts(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_tokens: torch.Tensor | None, experts: int
) -> torch.Tensor:
    """topk_ids [T, K] of global ids -> the local expert of each route, -1 for a route that adds nothing; int64 [T, K].

    A route adds nothing if its id is negative or not below G, if ``expert_map`` [G] gives it no local expert, or if
    its row is not below ``num_tokens``.
    """
    ids = topk_ids.long()
    known = experts if expert_map is None else expert_map.shape[0]
    valid = (ids >= 0) & (ids < known)
    if expert_map is not None:
        if known == 0:
            return torch.full_like(ids, -1)
        ids = expert_map.long()[ids.where(valid, 0)]
        valid &= (ids >= 0) & (ids < experts)
    if num_tokens is not None:
        valid &= (torch.arange(ids.shape[0], device=ids.device) < num_tokens.reshape(())).unsqueeze(-1)
    return ids.where(valid, -1)


def _matmul(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x [M, C] @ w [R, C].T in fp32; summed in float64, so that no TF32 or bf16 setting of PyTorch touches it."""
    return (x.double() @ w.double().T).float()


@torch.no_grad()
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
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A mixture-of-experts feed-forward layer on MXFP8 expert weights; see ``torch_mxfp8moe.fused_moe`` for shapes."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        if activation_dtype == "bf16":
            return x.to(torch.bfloat16).float()
        return dequantize_1x32(*quantize_1x32(x.float()))

    if hidden_states_scale is not None:
        x = dequantize_1x32(hidden_states, hidden_states_scale)
        out_dtype = out_dtype or torch.bfloat16
    else:
        x = rounded(hidden_states)
        out_dtype = out_dtype or hidden_states.dtype
    w1, w1_scale = LAYOUTS[layout].restore(w1, w1_scale, gate_up=True)
    w2, w2_scale = LAYOUTS[layout].restore(w2, w2_scale, gate_up=False)
    tokens, hidden = x.shape
    topk = topk_ids.shape[1]
    routing = topk_weights.float()
    expert_of = local_experts(topk_ids, expert_map, num_tokens, w1.shape[0])

    terms = x.new_zeros(tokens, topk, hidden)
    for expert in expert_of[expert_of >= 0].unique().tolist():
        token, slot = (expert_of == expert).nonzero(as_tuple=True)
        weight = routing[token, slot].unsqueeze(-1)
        projected = _matmul(x[token], dequantize_1x32(w1[expert], w1_scale[expert]))
        if w1_bias is not None:
            projected += w1_bias[expert].float()
        if apply_router_weight_on_input:
            projected *= weight
        gate, up = projected.chunk(2, dim=-1)
        h = rounded(swiglu(gate, up, swiglu_alpha, swiglu_beta, swiglu_limit))
        y = _matmul(h, dequantize_1x32(w2[expert], w2_scale[expert]))
        if w2_bias is not None:
            y += w2_bias[expert].float()
        terms[token, slot] = y if apply_router_weight_on_input else weight * y

    out = x.new_zeros(tokens, hidden)
    for slot in range(topk):
        out += terms[:, slot]
    return out.to(out_dtype)
