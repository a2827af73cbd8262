"""vLLM's experts on our ops: a plugin of the group ``vllm.general_plugins``, which vLLM calls in each of its processes.

Two ways in, each by a name that the user gives (docs/vllm.md):

- ``--moe-backend triton``: :class:`.experts.Mxfp8MoeExperts` goes in front of vLLM's own class, for every MXFP8 format
  that vLLM loads. vLLM has no registry for this; the function that lists the classes is wrapped.
- ``--quantization mxfp8moe``: a quantisation config registered under a name of its own, for ModelOpt and MiniMax-style
  checkpoints, with weights in the layout that suits the device.

Whatever vLLM is installed, registering raises nothing: a way whose parts are not as expected is left alone and the log
says why.
"""

import functools
import importlib
import inspect
import logging

__all__ = ["QUANTIZATION", "register"]

logger = logging.getLogger("vllm.plugins.torch_mxfp8moe")  # below "vllm", whose handlers vLLM sets up

QUANTIZATION = "mxfp8moe"
"""The name for ``--quantization``."""

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"

ABSTRACT_METHODS = frozenset({
    "_supports_activation",
    "_supports_current_device",
    "_supports_no_act_and_mul",
    "_supports_parallel_config",
    "_supports_quant_scheme",
    "activation_format",
    "apply",
    "finalize_weight_and_reduce_impl",
    "workspace_shapes",
})  # fmt: skip
"""What vLLM 0.33's FusedMoEExpertsModular leaves to be defined."""

PARAMETERS = {
    "__init__": ("self", "moe_config", "quant_config", "max_num_tokens", "num_dispatchers"),
    "is_supported_config": ("cls", "moe_config", "weight_key", "activation_key", "activation_format"),
    "workspace_shapes": (
        "self", "M", "N", "K", "topk", "global_num_experts", "local_num_experts", "expert_tokens_meta", "activation",
    ),
    "apply": (
        "self", "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts",
        "expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2", "expert_tokens_meta",
        "apply_router_weight_on_input",
    ),
}  # fmt: skip
"""The parameters of methods of vLLM 0.33's FusedMoEExpertsModular, as vLLM passes them."""


def _why_not_experts() -> str | None:
    """Why our experts class does not fit this vLLM's base class, or None if it does."""
    base = importlib.import_module(f"{_FUSED_MOE}.modular_kernel").FusedMoEExpertsModular
    if base.__abstractmethods__ != ABSTRACT_METHODS:
        others = sorted(base.__abstractmethods__ ^ ABSTRACT_METHODS)
        return f"FusedMoEExpertsModular has other abstract methods than in vLLM 0.33: {', '.join(others)}"
    for name, takes in PARAMETERS.items():
        got = tuple(inspect.signature(getattr(base, name)).parameters)
        if got != takes:
            return f"FusedMoEExpertsModular.{name} takes {', '.join(got)}; known is {', '.join(takes)}"
    return None


def _register_moe_backend() -> str | None:
    """Put our class in front of those of ``--moe-backend triton``; why not, or None."""
    oracle = importlib.import_module(f"{_FUSED_MOE}.oracle.mxfp8")
    kernel_classes = getattr(oracle, "_mxfp8_backend_to_kernel_cls", None)
    if getattr(kernel_classes, "torch_mxfp8moe", False):
        return None
    if kernel_classes is None or tuple(inspect.signature(kernel_classes).parameters) != ("backend",):
        return "oracle.mxfp8 has no function _mxfp8_backend_to_kernel_cls(backend)"
    if "_mxfp8_backend_to_kernel_cls" not in oracle._select_kernel_cls.__code__.co_names:
        return "oracle.mxfp8._select_kernel_cls does not ask _mxfp8_backend_to_kernel_cls"
    row_major = oracle.Fp8MoeBackend.TRITON_MXFP8  # vLLM leaves its weights as checkpoints hold them
    if oracle._BACKEND_NAME_MAP["triton"] is not row_major:
        return "--moe-backend triton does not mean TRITON_MXFP8"

    @functools.wraps(kernel_classes)
    def with_ours(backend):
        from .experts import Mxfp8MoeExperts

        classes = kernel_classes(backend)
        return [Mxfp8MoeExperts, *classes] if backend is row_major else classes

    setattr(with_ours, "torch_mxfp8moe", True)
    setattr(oracle, "_mxfp8_backend_to_kernel_cls", with_ours)
    return None


def _register_quantization() -> str | None:
    """Register ``--quantization mxfp8moe``; why not, or None."""
    quantization = importlib.import_module("vllm.model_executor.layers.quantization")
    if QUANTIZATION in quantization.QUANTIZATION_METHODS:
        return None
    from .quantization import Mxfp8MoeConfig

    quantization.register_quantization_config(QUANTIZATION)(Mxfp8MoeConfig)
    return None


@functools.cache
def register() -> dict[str, str | None]:
    """What vLLM calls. By the option that takes each way: why it is not registered, None if it is.

    Registers once a process, raises nothing and starts no GPU.
    """
    ways = {"--moe-backend triton": _register_moe_backend, f"--quantization {QUANTIZATION}": _register_quantization}
    try:
        version = importlib.import_module("vllm").__version__
        unfit = _why_not_experts()
    except Exception as error:
        version, unfit = "unknown", f"looking at vLLM raised {type(error).__name__}: {error}"
    result = {}
    for option, way in ways.items():
        try:
            reason = unfit or way()
        except Exception as error:
            reason = f"registering it raised {type(error).__name__}: {error}"
        result[option] = reason
        if reason:
            logger.warning("torch_mxfp8moe does nothing for %s in vLLM %s: %s", option, version, reason)
        else:
            logger.info("torch_mxfp8moe serves MXFP8 experts with %s", option)
    return result
