"""``--quantization mxfp8moe``: ModelOpt and MiniMax-style MXFP8 checkpoints as vLLM loads them, with experts on our op
in the layout that suits the device. Imports vLLM."""

import logging

from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEActivationFormat
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.quantization.modelopt import ModelOptMxFp8Config, ModelOptMxFp8FusedMoE
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp8Dynamic, kMxfp8Static
from vllm.model_executor.utils import replace_parameter

from ...experts import Mxfp8Experts
from ...layouts import ROW_MAJOR
from . import QUANTIZATION
from .experts import Mxfp8MoeExperts, say_once, swiglu


class Mxfp8MoeMethod(ModelOptMxFp8FusedMoE):
    """Loads as its base does; the experts are ours, their weights laid out for the device when they are loaded.

    Raises:
        ValueError: ours do not serve the layer, for a reason that is named, or ``--moe-backend`` asks for others.
    """

    def __init__(self, quant_config, moe_config):
        super(ModelOptMxFp8FusedMoE, self).__init__(moe_config)  # past its choice of a kernel
        self.quant_config, self.weight_block_size = quant_config, [1, 32]
        self.mxfp8_backend = Fp8MoeBackend.TRITON_MXFP8  # whose weights vLLM leaves as they are
        self.experts_cls = Mxfp8MoeExperts
        if moe_config.moe_backend not in ("auto", "triton"):
            raise ValueError(
                f"--quantization {QUANTIZATION} has experts of its own; --moe-backend is '{moe_config.moe_backend}', "
                "it takes 'auto' or 'triton'"
            )
        batched = moe_config.moe_parallel_config.use_batched_activation_format
        arrives = FusedMoEActivationFormat.BatchedExperts if batched else FusedMoEActivationFormat.Standard
        reason = Mxfp8MoeExperts.why_not(moe_config, kMxfp8Static, kMxfp8Dynamic, arrives)
        if reason:
            raise ValueError(f"--quantization {QUANTIZATION}: torch_mxfp8moe does not serve this layer: {reason}")

    def process_weights_after_loading(self, layer):
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        self._check_weight_dtypes(layer)
        config = self.moe
        experts = Mxfp8Experts.from_weights(
            layer.w13_weight.data,
            layer.w2_weight.data,
            w1_scale=layer.w13_weight_scale.data,
            w2_scale=layer.w2_weight_scale.data,
            **swiglu(config.activation, config.swiglu_alpha, config.swiglu_beta, config.swiglu_limit),
        )
        if experts.layout != ROW_MAJOR.name:
            replace_parameter(layer, "w13_weight", experts.w1)
            replace_parameter(layer, "w2_weight", experts.w2)
            replace_parameter(layer, "w13_weight_scale", experts.w1_scale)
            replace_parameter(layer, "w2_weight_scale", experts.w2_scale)
        super().process_weights_after_loading(layer)
        self.moe_kernel.fused_experts.layout = experts.layout
        say_once(logging.INFO, f"torch_mxfp8moe: weights in layout {experts.layout} ({experts.layout_reason})")


class Mxfp8MoeConfig(ModelOptMxFp8Config):
    """ModelOpt's MXFP8 config with :class:`Mxfp8MoeMethod` for experts; only where the user asks for it by name."""

    FusedMoEMethodCls = Mxfp8MoeMethod

    def get_name(self):
        return QUANTIZATION

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg, user_quant, hf_config=None):
        if user_quant != QUANTIZATION or not hf_quant_cfg:
            return None
        algorithm = cls._extract_modelopt_quant_algo(hf_quant_cfg) or ""
        if "MXFP8" in algorithm.upper() or hf_quant_cfg.get("quant_method") == "mxfp8":
            return QUANTIZATION
        return None
