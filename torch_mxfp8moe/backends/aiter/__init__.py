"""AMD's aiter, whose FlyDSL kernels compute MXFP8 experts on gfx950 (MI350X, MI355X).

aiter computes much that it is not made for without a word. So ``rules`` keeps from it what it would get wrong,
``routes`` (on the GPU: ``kernel``) gives it ids that cannot be wrong, and ``probe`` takes no version's word for what
the installed aiter can do; ``tuned`` reads which kernels it was tuned for. This module imports aiter, flydsl and Triton
only when it is asked on a machine that has a gfx950.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ...allocation import allocator
from ...arguments import Call, FusedMoe
from ...formats import as_bytes
from .. import Backend
from ..triton import BACKEND as TRITON
from . import probe, rules, tuned

if TYPE_CHECKING:
    from ..triton.launch import Plan

_architecture = cache(probe.architecture)


class Routes:
    """The ids, weights and mask that aiter gets (see ``routes``), for calls of one kind."""

    def __init__(self, call: FusedMoe):
        self.device, self.empty = call.device, allocator(call.device)
        slots = call.topk + 1
        self.shape, self.strides, self.mask_shape = (call.tokens, slots), (slots, 1), (call.experts + 1,)
        self.plan: Plan | None = None
        self.target: Any = None

    def of(self, call: FusedMoe) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids [T, K + 1], weights [T, K + 1], mask [E + 1], on the current device; in new memory each time."""
        ids = self.empty(self.shape, self.strides, torch.int32)
        weights = self.empty(self.shape, self.strides, torch.float32)
        mask = self.empty(self.mask_shape, (1,), torch.int32)
        memory = {
            "topk_ids": call.topk_ids, "topk_weights": call.topk_weights, "ids": ids, "weights": weights, "mask": mask,
        }  # fmt: skip
        if call.expert_map is not None:
            memory["expert_map"] = call.expert_map
        if call.num_tokens is not None:
            memory["num_tokens"] = call.num_tokens
        if self.plan is None:
            from .kernel import plan

            self.target, self.plan = TRITON.target(self.device), plan(call)  # the plan last: threads look for it
        self.plan.run_here("fused_moe, for backend 'aiter'", memory, self.device, self.target)
        return ids, weights, mask


class Prepared:
    """What is found once for calls of one kind."""

    def __init__(self, call: FusedMoe):
        self.device, self.tokens, self.routes = call.device, call.tokens, Routes(call)
        x = call.hidden_states
        self.copies = not x.is_contiguous() or not rules.aligned(x)
        """Whether aiter cannot read hidden_states as they lie."""
        self.views = torch.float8_e8m0fnu in (call.w1_scale.dtype, call.w2_scale.dtype)
        """Whether a scale is not uint8."""
        self.activation = rules.activation(call.swiglu_alpha, call.swiglu_beta)


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

    def new_fused_moe(self, call: FusedMoe) -> torch.Tensor:
        prepared = call.kind.plans.get(self.name)
        if prepared is None:
            prepared = call.kind.plans[self.name] = Prepared(call)
        if not prepared.tokens:
            return call.hidden_states.new_empty((0, call.hidden), dtype=call.result_dtype)
        index = prepared.device.index
        if index is not None and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self.new_fused_moe(call)
        aiter = self.interface()
        ids, weights, mask = prepared.routes.of(call)
        x = call.hidden_states
        if prepared.copies:
            x = x.clone(memory_format=torch.contiguous_format)
        # aiter asks the tensors themselves whether they are shuffled. They are; the caller's are left as they are.
        # (``data`` is a quicker ``detach()``, and no gradient gets here that it could lose.)
        w1, w2 = call.w1.data, call.w2.data
        setattr(w1, "is_shuffled", True)
        setattr(w2, "is_shuffled", True)
        w1_scale, w2_scale = call.w1_scale, call.w2_scale
        if prepared.views:
            w1_scale, w2_scale = as_bytes(w1_scale), as_bytes(w2_scale)
        return aiter.fused_moe(
            x,
            w1,
            w2,
            weights,
            ids,
            expert_mask=mask,
            activation=aiter.activations[prepared.activation],
            quant_type=aiter.quant_type,
            w1_scale=w1_scale,
            w2_scale=w2_scale,
            dtype=torch.bfloat16,
            swiglu_limit=call.swiglu_limit,
            gate_mode=aiter.gate_mode,
        )

    def fused_moe(self, call: FusedMoe) -> None:
        assert call.out is not None
        call.out.copy_(self.new_fused_moe(call))  # aiter allocates its result and takes no other


BACKEND = Aiter()
