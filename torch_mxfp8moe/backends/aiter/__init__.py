"""AMD's aiter, whose FlyDSL kernels compute MXFP8 experts on gfx950 (MI350X, MI355X).

aiter computes much that it is not made for without a word. So ``rules`` keeps from it what it would get wrong,
``routes`` (on the GPU: ``kernel``) gives it ids that cannot be wrong, and ``probe`` takes no version's word for what
the installed aiter can do; ``tuned`` reads which kernels it was tuned for. This module imports aiter, flydsl and Triton
only when it is asked on a machine that has a gfx950.
"""

from functools import cache

import torch

from ... import extension
from ...arguments import Call, FusedMoe
from ...formats import as_bytes
from .. import Backend
from ..triton import BACKEND as TRITON
from . import probe, rules, tuned

_architecture = cache(probe.architecture)


def _empty_routes(topk_ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for ids, weights and mask (see ``routes``) on the device of topk_ids [T, K]."""
    device, (tokens, topk) = topk_ids.device, topk_ids.shape
    shape, strides = (tokens, topk + 1), (topk + 1, 1)  # torch.empty takes longer
    ids = torch.empty_strided(shape, strides, dtype=torch.int32, device=device)
    weights = torch.empty_strided(shape, strides, dtype=torch.float32, device=device)
    mask = torch.empty_strided((experts + 1,), (1,), dtype=torch.int32, device=device)
    return ids, weights, mask


def _empty_routes_at_once(topk_ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same by the C++ kernel, one call instead of three."""
    return torch.ops.mxfp8moe._new_routes.default(topk_ids, experts)


_new_routes = _empty_routes if extension.MODULE is None else _empty_routes_at_once


class Aiter(Backend):
    name = "aiter"
    priority = 60
    description = "AMD's aiter, FlyDSL kernels for gfx950"

    def __init__(self):
        self.interface = cache(probe.load)

    @cache
    def why_unavailable(self) -> str | None:  # pyrefly: ignore[bad-override-mutable-attribute]  (@cache)
        try:
            self.interface()
        except probe.Unusable as unusable:
            return str(unusable)
        reason = TRITON.why_unavailable()
        return f"its routes take a Triton kernel, and: {reason}" if reason else None

    def why_not(self, call: Call) -> str | None:
        if not isinstance(call, FusedMoe):
            return "it computes fused_moe only"
        arch = _architecture(call.device)
        if arch != probe.ARCHITECTURE:
            return f"the tensors are on {call.device}, {arch or 'not an AMD GPU'}; it takes {probe.ARCHITECTURE}"
        return rules.why_not(call)

    def note(self, call: Call) -> str | None:
        return tuned.note(call) if isinstance(call, FusedMoe) else None

    def _routes(self, call: FusedMoe) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids [T, K + 1], weights [T, K + 1], mask [E + 1]; see ``routes``."""
        device, topk_ids, topk_weights = call.device, call.topk_ids, call.topk_weights
        ids, weights, mask = _new_routes(topk_ids, call.experts)
        memory = {"topk_ids": topk_ids, "topk_weights": topk_weights, "ids": ids, "weights": weights, "mask": mask}
        if call.expert_map is not None:
            memory["expert_map"] = call.expert_map
        if call.num_tokens is not None:
            memory["num_tokens"] = call.num_tokens
        plan = call.kind.plans.get(self.name)
        if plan is None:
            from .kernel import plan as make

            plan = call.kind.plans[self.name] = make(call)
        plan.run(f"{call.op}, for backend 'aiter'", memory, device, TRITON.target(device))
        return ids, weights, mask

    def new_fused_moe(self, call: FusedMoe) -> torch.Tensor:
        if not call.tokens:
            return call.hidden_states.new_empty((0, call.hidden), dtype=call.result_dtype)
        device = call.device
        if device.index is None or device.index == torch.cuda.current_device():
            return self._computed(call)
        with torch.cuda.device(device):
            return self._computed(call)

    def _computed(self, call: FusedMoe) -> torch.Tensor:
        aiter = self.interface()
        ids, weights, mask = self._routes(call)
        x = call.hidden_states
        if not x.is_contiguous() or not rules.aligned(x):
            x = x.clone(memory_format=torch.contiguous_format)
        # aiter asks the tensors themselves whether they are shuffled. They are; the caller's are left as they are.
        w1, w2 = call.w1.detach(), call.w2.detach()
        for weight in (w1, w2):
            setattr(weight, "is_shuffled", True)
        return aiter.fused_moe(
            x,
            w1,
            w2,
            weights,
            ids,
            expert_mask=mask,
            activation=aiter.activations[rules.activation(call.swiglu_alpha, call.swiglu_beta)],
            quant_type=aiter.quant_type,
            w1_scale=as_bytes(call.w1_scale),
            w2_scale=as_bytes(call.w2_scale),
            dtype=torch.bfloat16,
            swiglu_limit=call.swiglu_limit,
            gate_mode=aiter.gate_mode,
        )

    def fused_moe(self, call: FusedMoe) -> None:
        assert call.out is not None
        call.out.copy_(self.new_fused_moe(call))  # aiter allocates its result and takes no other


BACKEND = Aiter()
