"""Hugging Face Transformers: experts of its models on our op. Importing this module imports Transformers, 5.20 or
later, and registers the experts implementation ``"mxfp8moe"``.

>>> from torch_mxfp8moe.integrations.transformers import convert_experts_
>>> model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
>>> convert_experts_(model)  # its experts are MXFP8 from here on
>>> model.set_experts_implementation("mxfp8moe")  # or, without converting: by name, see experts_forward

Inference only, as the op is: call models under ``torch.no_grad()`` or ``torch.inference_mode()`` (``generate`` does).
"""

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..experts import E4M3, GATE_UP_ORDERS, Mxfp8Experts, halves
from ..formats import BLOCK, SCALE_DTYPES
from ..ops import fused_moe, quantize_1x32

__all__ = [
    "ConvertedExperts",
    "IMPLEMENTATION",
    "convert_experts_",
    "experts_forward",
    "register",
    "swiglu_options",
    "why_not",
]

logger = logging.getLogger(__name__)

IMPLEMENTATION = "mxfp8moe"
"""For ``set_experts_implementation`` and ``from_pretrained(experts_implementation=...)``."""


ExpertsModule = Any
"""A ``nn.Module`` with what Transformers' decorator ``use_experts_implementation`` gives it. (To type checkers every
attribute that a class of modules does not declare is a tensor or a module.)"""


def _order(experts: ExpertsModule) -> str:
    return GATE_UP_ORDERS[0 if experts.is_concatenated else 1]


def _number(experts: ExpertsModule, *names: str) -> float | None:
    found = (getattr(experts, name, None) for name in names)
    return next((float(x) for x in found if isinstance(x, (int, float))), None)


@torch.no_grad()
def swiglu_options(experts: ExpertsModule) -> dict[str, Any]:
    """``swiglu_alpha``, ``swiglu_beta`` and ``swiglu_limit`` with which the op computes what the experts' gate does.

    The names of a class's attributes only suggest: what counts is that its ``_apply_gate`` gives the op's values, on
    inputs on both sides of the limit.

    Raises:
        NotImplementedError: no SwiGLU that the op has gives them.
    """
    alpha = _number(experts, "swiglu_alpha", "alpha")
    limit = _number(experts, "swiglu_limit", "limit")
    candidates = [(a, b, l) for a, b in ((1.0, 0.0), (alpha, 1.0)) for l in (None, limit)]
    near = torch.linspace(-3, 3, 61, dtype=torch.float64, device="cpu") * (limit or 8.0)
    far = torch.tensor([1e2, 1e3, 1e4], dtype=torch.float64, device="cpu")  # a clamp under another name shows
    values = torch.cat([-far, near, far])
    gate, up = (x.reshape(1, -1) for x in torch.meshgrid(values, values, indexing="ij"))
    gate_up = torch.cat([gate, up], -1) if experts.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
    try:
        got = experts._apply_gate(gate_up)
    except Exception as error:
        raise NotImplementedError(f"{type(experts).__name__}: trying its gate raised {type(error).__name__}: {error}")
    for a, b, l in candidates:
        if a is None:
            continue
        g, u = (gate, up) if l is None else (gate.clamp(max=l), up.clamp(-l, l))
        if got.shape == g.shape and torch.allclose(got.double(), g * torch.sigmoid(a * g) * (u + b), 1e-5, 1e-5):
            return dict(swiglu_alpha=a, swiglu_beta=b, swiglu_limit=l)
    raise NotImplementedError(
        f"{type(experts).__name__}: its gate is no g * sigmoid(alpha * g) * (u + beta) with a clamp before it"
    )


def why_not(experts: ExpertsModule) -> str | None:
    """Why the op does not compute these experts, a module of a class with Transformers' decorator
    ``use_experts_implementation``, or None if it does."""
    if not experts.has_gate:
        return "they have no gate"
    if getattr(experts, "has_post_expert_norm", False):
        return "each expert's result is normalised before the sum"
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if gate_up.dtype == E4M3:
        takes = tuple(getattr(experts, "block_size", None) or ())
        if takes != (1, BLOCK):
            return f"their weights have one scale per block of {list(takes)}; MXFP8 has one per [1, {BLOCK}]"
        if getattr(experts, "activation_scheme", "dynamic") != "dynamic":
            return f"their activation scheme is {experts.activation_scheme}; MXFP8's is dynamic"
        if experts.gate_up_proj_scale_inv.dtype not in SCALE_DTYPES:
            return f"their scales are {str(experts.gate_up_proj_scale_inv.dtype)[6:]}; MXFP8's are uint8 or E8M0"
    elif gate_up.itemsize == 1:
        return f"their weights are {str(gate_up.dtype)[6:]}"
    hidden, inner = (down.shape[2], down.shape[1]) if experts.is_transposed else down.shape[1:]
    if hidden % BLOCK or inner % BLOCK:
        return f"hidden size {hidden} and intermediate size {inner} have to be divisible by {BLOCK}"
    try:
        swiglu_options(experts)
    except NotImplementedError as error:
        return str(error)
    return None


def _weights(experts: ExpertsModule) -> dict[str, Any]:
    """The arguments of ``Mxfp8Experts.from_weights``: views of the module's parameters."""
    tensors = dict(w1=experts.gate_up_proj, w2=experts.down_proj)
    if experts.is_transposed:
        tensors = {name: x.transpose(1, 2) for name, x in tensors.items()}
    if experts.gate_up_proj.dtype == E4M3:
        tensors |= dict(w1_scale=experts.gate_up_proj_scale_inv, w2_scale=experts.down_proj_scale_inv)
    if experts.has_bias:
        tensors |= dict(w1_bias=experts.gate_up_proj_bias, w2_bias=experts.down_proj_bias)
    return tensors


@functools.cache
def _say_that_each_call_quantises() -> None:
    logger.warning(
        "experts implementation '%s' on high-precision weights: they are quantised to MXFP8 at each call, which is "
        "slow; torch_mxfp8moe.integrations.transformers.convert_experts_(model) does it once",
        IMPLEMENTATION,
    )


@torch.compiler.assume_constant_result
def _options(experts: ExpertsModule) -> tuple[float | None, ...]:
    """The values of ``swiglu_options``, found once a module; while a graph is traced, they are constants of it."""
    found = experts.__dict__.get("_mxfp8moe_options")
    if found is None:
        reason = why_not(experts)
        if reason:
            raise NotImplementedError(f"experts implementation '{IMPLEMENTATION}': {reason}")
        if experts.gate_up_proj.dtype != E4M3:
            _say_that_each_call_quantises()
        found = experts.__dict__["_mxfp8moe_options"] = tuple(swiglu_options(experts).values())
    return found


def experts_forward(self: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What ``"mxfp8moe"`` names: the experts module ``self`` on :func:`torch_mxfp8moe.fused_moe`.

    MXFP8 weights, as Transformers loads them from checkpoints of ``quant_method: mxfp8`` on a GPU, are used as they lie
    there. High-precision weights are quantised **at each call**, with a warning: to see what MXFP8 does to a model,
    which stays as it is and can be switched back; :func:`convert_experts_` is for running one.

    Args:
        hidden_states: [T, H]; top_k_index, top_k_weights: [T, K]. An index that is no expert's, such as Transformers'
            mark for experts of another rank, adds nothing.

    Raises:
        NotImplementedError: the op does not compute these experts; says why.
        RuntimeError: gradients are wanted.
    """
    alpha, beta, limit = _options(self)
    tensors = _weights(self)
    if not self.is_concatenated:
        for name in ("w1", "w1_scale", "w1_bias"):
            if name in tensors:
                tensors[name] = halves(tensors[name], _order(self)).flatten(1, 2)
    if "w1_scale" not in tensors:
        for name in ("w1", "w2"):
            tensors[name], tensors[f"{name}_scale"] = quantize_1x32(tensors[name].contiguous())
    return fused_moe(
        hidden_states,
        topk_weights=top_k_weights,
        topk_ids=top_k_index,
        swiglu_alpha=alpha,
        swiglu_beta=beta,
        swiglu_limit=limit,
        **tensors,
    )


class ConvertedExperts(nn.Module):
    """:class:`torch_mxfp8moe.Mxfp8Experts` (attribute ``mxfp8``) in the place of a Transformers experts module."""

    def __init__(self, mxfp8: Mxfp8Experts):
        super().__init__()
        self.mxfp8 = mxfp8
        self.num_experts = mxfp8.num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.mxfp8(hidden_states, top_k_weights, top_k_index)


def _experts_modules(model: nn.Module) -> dict[str, ExpertsModule]:
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "_apply_gate") and hasattr(module, "is_concatenated") and hasattr(module, "down_proj")
    }


def _refuse_save_pretrained(*args, **kwargs):
    raise NotImplementedError(
        "the experts were converted by torch_mxfp8moe: from_pretrained would read such a checkpoint with new, random "
        "experts. Save state_dict(), or convert the original checkpoint's files"
    )


def convert_experts_(model: nn.Module, *, scale_rounding: str = "rceil", **options) -> list[str]:
    """Replace every experts module of a loaded model by one in MXFP8, in place, layer by layer.

    High-precision weights are quantised; MXFP8 ones (a checkpoint of ``quant_method: mxfp8`` that Transformers did not
    dequantise) are taken as they are. Each layer's old weights are freed before the next one is converted.
    ``save_pretrained`` raises from then on; ``state_dict`` and ``load_state_dict`` of converted models work.

    Args:
        model: any Transformers model whose experts classes have the decorator ``use_experts_implementation``.
        scale_rounding: as :func:`torch_mxfp8moe.quantize_1x32` takes it.
        **options: of :class:`torch_mxfp8moe.Mxfp8Experts`, such as ``layout``, ``activation_dtype`` and ``backend``.

    Returns:
        The names of the modules that were replaced, by :class:`ConvertedExperts`.

    Raises:
        ValueError: there are no such modules.
        NotImplementedError: the op does not compute one of them, or it has hooks (of tensor parallelism or of a device
            map over several devices), which would be lost. Nothing is changed then.
    """
    found = _experts_modules(model)
    if not found:
        raise ValueError(f"convert_experts_: {type(model).__name__} has no experts that Transformers calls by name")
    for name, experts in found.items():
        hooked = experts._forward_hooks or experts._forward_pre_hooks or hasattr(experts, "_hf_hook")
        reason = "it has hooks, which would be lost" if hooked else why_not(experts)
        if reason or not name:
            raise NotImplementedError(f"convert_experts_: {name or 'the model'}: {reason or 'it is an experts module'}")
    names = list(found)
    del found, experts
    for name in names:
        experts = model.get_submodule(name)
        converted = Mxfp8Experts.from_weights(
            **{key: x.detach() for key, x in _weights(experts).items()},
            gate_up_order=_order(experts),
            scale_rounding=scale_rounding,
            **{**swiglu_options(experts), **options},
        )
        del experts
        model.set_submodule(name, ConvertedExperts(converted).eval())
    if hasattr(model, "save_pretrained"):
        setattr(model, "save_pretrained", _refuse_save_pretrained)
    return names


def register() -> None:
    """Make ``"mxfp8moe"`` known to Transformers; importing this module does."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    ALL_FP8_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


register()
