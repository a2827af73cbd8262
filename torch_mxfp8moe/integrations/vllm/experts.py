"""The experts of vLLM's modular kernel on :func:`torch_mxfp8moe.fused_moe`. Imports vLLM."""

import logging
from functools import cache
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey, kMxfp8Dynamic, kMxfp8Static
from vllm.platforms import current_platform

from ...dispatch import backends
from ...formats import BLOCK
from ...layouts import ROW_MAJOR
from ...ops import explain, fused_moe
from . import logger

SLOW = "reference"
"""The backend that serves anything, too slowly for an engine and reading from the host."""


@cache
def say_once(level: int, text: str) -> None:
    logger.log(level, text)


def swiglu(
    activation: MoEActivation, alpha: float | None, beta: float | None, limit: float | None
) -> dict[str, Any]:
    """vLLM's activation as the arguments of ``fused_moe``.

    SILU ignores alpha and beta, as all of vLLM's kernels do; SWIGLUOAI_UNINTERLEAVE has them, 1 and 0 where they are
    not given. A limit of 0.0 means none, as None does.
    """
    if activation == MoEActivation.SILU:
        alpha, beta = 1.0, 0.0
    elif activation != MoEActivation.SWIGLUOAI_UNINTERLEAVE:
        raise NotImplementedError(f"torch_mxfp8moe has no activation {activation.value}")
    return dict(
        swiglu_alpha=1.0 if alpha is None else float(alpha),
        swiglu_beta=0.0 if beta is None else float(beta),
        swiglu_limit=float(limit) if limit else None,
    )


def serving_backend(config: FusedMoEConfig) -> tuple[str | None, str]:
    """Which of our backends computes a layer of this config with row-major weights, and :func:`explain`'s text."""
    experts, hidden, inner = config.num_local_experts, config.hidden_dim, config.intermediate_size_per_partition
    if hidden % BLOCK or inner % BLOCK:
        return None, f"sizes H={hidden}, I={inner}: both have to be divisible by {BLOCK}"
    with FakeTensorMode(), torch.device(torch.device(config.device).type):
        topk = config.experts_per_token
        call = explain(
            torch.empty(1, hidden, dtype=config.in_dtype),
            torch.empty(experts, 2 * inner, hidden, dtype=torch.float8_e4m3fn),
            torch.empty(experts, 2 * inner, hidden // BLOCK, dtype=torch.uint8),
            torch.empty(experts, hidden, inner, dtype=torch.float8_e4m3fn),
            torch.empty(experts, hidden, inner // BLOCK, dtype=torch.uint8),
            torch.empty(1, topk),
            torch.empty(1, topk, dtype=torch.int32),
            **swiglu(config.activation, config.swiglu_alpha, config.swiglu_beta, config.swiglu_limit),
        )
    return call.backend, str(call)


class Mxfp8MoeExperts(mk.FusedMoEExpertsModular):
    """MXFP8 experts, weights as checkpoints hold them or in ``layout``, the whole layer in one op.

    The op quantises the activations, applies the routing weights and sums over a token's experts, writing ``output``
    and nothing else of vLLM's: it asks for no workspace, so that ``output`` may be one.
    """

    layout = ROW_MAJOR.name
    """Of the weights that ``apply`` gets."""

    def __init__(self, moe_config, quant_config, max_num_tokens=None, num_dispatchers=None):
        super().__init__(moe_config, quant_config, max_num_tokens, num_dispatchers)
        if moe_config.has_bias and (quant_config.w1_bias is None or quant_config.w2_bias is None):
            raise NotImplementedError(
                "torch_mxfp8moe: the model's experts have biases, which this quantization method of vLLM does not hand "
                "to the kernel"
            )

    # --- what vLLM asks before it takes the class

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return any(status.usable for name, status in backends().items() if name != SLOW)

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
        return (weight_key, activation_key) == (kMxfp8Static, kMxfp8Dynamic)

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in (MoEActivation.SILU, MoEActivation.SWIGLUOAI_UNINTERLEAVE)

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        """Not with MoRI and passthrough, which want aiter's experts or those that communicate themselves."""
        return not (moe_parallel_config.use_mori_kernels or moe_parallel_config.use_passthrough_all2all)

    @classmethod
    def why_not(cls, moe_config, weight_key, activation_key, activation_format) -> str | None:
        """Why this class does not serve a layer, or None if it does. Says in the log who computes it."""
        supported, reason = mk.FusedMoEExpertsModular.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )
        if not supported:
            return reason
        backend, text = serving_backend(moe_config)
        if backend in (None, SLOW):
            return text
        say_once(logging.INFO, f"torch_mxfp8moe serves MXFP8 experts: {text.splitlines()[0]}")
        return None

    @staticmethod
    def is_supported_config(cls, moe_config, weight_key, activation_key, activation_format):
        named = moe_config.moe_backend != "auto"
        if current_platform.is_rocm() and not named:
            reason = "it has not run on an AMD GPU yet, so there it takes naming it: --moe-backend triton"
        else:
            reason = cls.why_not(moe_config, weight_key, activation_key, activation_format)
        if reason:
            level = logging.WARNING if named else logging.INFO
            say_once(level, f"torch_mxfp8moe does not serve MXFP8 experts: {reason}")
        return reason is None, reason

    # --- what vLLM asks of an instance

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self, M, N, K, topk, global_num_experts, local_num_experts, expert_tokens_meta, activation
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (0,), (0,), (M, K)

    def apply(
        self,
        output,
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        activation,
        global_num_experts,
        expert_map,
        a1q_scale,
        a2_scale,
        workspace13,
        workspace2,
        expert_tokens_meta,
        apply_router_weight_on_input,
    ) -> None:
        if apply_router_weight_on_input:
            # vLLM's prepare step has multiplied the hidden states by it already: what is left is a plain sum.
            topk_weights = torch.ones_like(topk_weights)
        config = self.activation_config
        fused_moe(
            hidden_states,
            w1,
            self.w1_scale,
            w2,
            self.w2_scale,
            topk_weights,
            topk_ids,
            hidden_states_scale=a1q_scale,
            w1_bias=self.w1_bias,
            w2_bias=self.w2_bias,
            expert_map=expert_map,
            **swiglu(activation, config.alpha, config.beta, config.clamp_limit),
            layout=self.layout,
            out=output,
        )
