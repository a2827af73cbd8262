"""Cases for ``tools/check_vllm.py``, which runs them beside a real vLLM, on CPU tensors and vLLM's CPU platform. Not
collected elsewhere: importing vLLM changes settings of PyTorch for the whole process."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.fused_moe import config as moe_configs
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.oracle import fp8, mxfp8
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Static128BlockSym, kMxfp8Dynamic, kMxfp8Static

import torch_mxfp8moe
import torch_mxfp8moe.integrations.vllm as plugin
from helpers import assert_equal, moe_inputs, relative_l2
from torch_mxfp8moe.backends import registered

registered_ways = plugin.register()
from torch_mxfp8moe.integrations.vllm.experts import Mxfp8MoeExperts, swiglu  # noqa: E402

STANDARD = mk.FusedMoEActivationFormat.Standard
LAYERS = {
    "silu": dict(activation="silu"),
    "clamped silu": dict(activation="silu", swiglu_limit=1.0),
    "limit of 0.0": dict(activation="silu", swiglu_limit=0.0),
    "swiglu-oai": dict(
        activation="swigluoai_uninterleave", swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=1.0
    ),
}  # fmt: skip


def moe_config(E=4, K=2, H=64, I=32, *, activation=MoEActivation.SILU, parallel=(), **options):  # noqa: E741
    ranks = dict(
        tp_size=1, pcp_size=1, dp_size=1, ep_size=1, tp_rank=0, pcp_rank=0, dp_rank=0, ep_rank=0, sp_size=1,
        use_ep=False, all2all_backend="allgather_reducescatter", enable_eplb=False,
    ) | dict(parallel)  # fmt: skip
    sizes = dict(
        num_experts=E, experts_per_token=K, hidden_dim=H, intermediate_size=I, num_local_experts=E,
        num_logical_experts=E, device="cpu", routing_method=moe_configs.RoutingMethodType.TopK,
        in_dtype=torch.bfloat16,
    )  # fmt: skip
    return moe_configs.FusedMoEConfig(
        **sizes | options, activation=activation, moe_parallel_config=moe_configs.FusedMoEParallelConfig(**ranks)
    )


def kernel(config, inputs, **options):
    """vLLM's modular kernel with our experts, made by vLLM's functions for backend TRITON_MXFP8."""
    backend = fp8.Fp8MoeBackend.TRITON_MXFP8
    quant = fp8.make_fp8_moe_quant_config(
        fp8_backend=backend, w1_scale=inputs["w1_scale"], w2_scale=inputs["w2_scale"], a1_scale=None, a2_scale=None,
        w1_bias=inputs.get("w1_bias"), w2_bias=inputs.get("w2_bias"), block_shape=[1, 32], **options,
    )  # fmt: skip
    return fp8.make_fp8_moe_kernel(quant, config, Mxfp8MoeExperts, backend)


def run_kernel(kernel, inputs, activation=MoEActivation.SILU, expert_map=None, on_input=False, experts=-1):
    return kernel.apply(
        inputs["hidden_states"], inputs["w1"], inputs["w2"], inputs["topk_weights"], inputs["topk_ids"],
        activation=activation, global_num_experts=experts, expert_map=expert_map,
        apply_router_weight_on_input=on_input,
    )  # fmt: skip


def test_both_ways_are_registered():
    assert registered_ways == {"--moe-backend triton": None, "--quantization mxfp8moe": None}


def test_the_entry_point_is_what_vllm_loads(tmp_path):
    """In a fresh process, through vLLM's own loader; twice, as its processes may."""
    installed = tmp_path / "plugin-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    entry_point = "torch_mxfp8moe = torch_mxfp8moe.integrations.vllm:register"
    (installed / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{entry_point}\n")
    code = """
import vllm.logger
import vllm.plugins
vllm.logger._configure_vllm_root_logger()  # as vLLM's processes do before they load plugins
vllm.plugins.load_general_plugins()
vllm.plugins.plugins_loaded = False
vllm.plugins.load_general_plugins()
from vllm.model_executor.layers.fused_moe.oracle import mxfp8
classes = mxfp8._mxfp8_backend_to_kernel_cls(mxfp8.Fp8MoeBackend.TRITON_MXFP8)
print([cls.__name__ for cls in classes])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "['Mxfp8MoeExperts', 'Mxfp8NativeTritonExperts']" in done.stdout, done.stderr[-3000:]
    assert "torch_mxfp8moe serves MXFP8 experts with --moe-backend triton" in done.stdout + done.stderr


def test_the_recorded_base_class_is_vllms():
    assert plugin._why_not_experts() is None
    assert not Mxfp8MoeExperts.__abstractmethods__ and issubclass(Mxfp8MoeExperts, mk.FusedMoEExpertsModular)


@pytest.mark.parametrize("change", ["abstract", "apply", "oracle", "name"])
def test_another_vllm_is_left_alone(monkeypatch, change):
    base = mk.FusedMoEExpertsModular
    ours = mxfp8._mxfp8_backend_to_kernel_cls
    if change == "abstract":
        monkeypatch.setattr(base, "__abstractmethods__", base.__abstractmethods__ | {"_supports_more"})
        reason = "other abstract methods than in vLLM 0.33: _supports_more"
    elif change == "apply":
        monkeypatch.setattr(base, "apply", lambda self, output, hidden_states: None)
        reason = "FusedMoEExpertsModular.apply takes self, output, hidden_states; known is "
    elif change == "oracle":
        monkeypatch.setattr(mxfp8, "_mxfp8_backend_to_kernel_cls", lambda backend, config: [])
        reason = "no function _mxfp8_backend_to_kernel_cls(backend)"
    else:
        monkeypatch.setattr(mxfp8, "_mxfp8_backend_to_kernel_cls", ours.__wrapped__)
        monkeypatch.setitem(mxfp8._BACKEND_NAME_MAP, "triton", fp8.Fp8MoeBackend.MARLIN)
        reason = "--moe-backend triton does not mean TRITON_MXFP8"
    before = mxfp8._mxfp8_backend_to_kernel_cls
    said = []
    monkeypatch.setattr(plugin.logger, "handle", lambda record: said.append((record.levelname, record.getMessage())))
    ways = plugin.register.__wrapped__()
    assert reason in ways["--moe-backend triton"]
    text = f"torch_mxfp8moe does nothing for --moe-backend triton in vLLM 0.33.0: {ways['--moe-backend triton']}"
    assert ("WARNING", text) in said
    assert mxfp8._mxfp8_backend_to_kernel_cls is before


# --- which class vLLM selects


def selected(**options):
    return mxfp8.select_mxfp8_moe_backend(moe_config(**options))


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_vllm_selects_our_class(name):
    assert selected(moe_backend=name) == (fp8.Fp8MoeBackend.TRITON_MXFP8, Mxfp8MoeExperts)


REFUSED = {
    "activation": (dict(activation=MoEActivation.SWIGLUOAI), "MoEActivation.SWIGLUOAI activation"),
    "size": (dict(I=48), "I=48: both have to be divisible by 32"),
    "lora": (dict(is_lora_enabled=True), "LoRA"),
    "batched": (
        dict(parallel=dict(use_ep=True, dp_size=2, all2all_backend="deepep_low_latency")), "activation format"
    ),
    "passthrough": (dict(parallel=dict(all2all_backend="passthrough")), "parallel config"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_do_not_support_is_refused_with_a_reason(case):
    options, reason = REFUSED[case]
    with pytest.raises(ValueError, match="No supported MXFP8 expert class"):
        selected(moe_backend="triton", **options)
    config = moe_config(**options)
    arrives = mk.FusedMoEActivationFormat.BatchedExperts if case == "batched" else STANDARD
    supported, said = Mxfp8MoeExperts.is_supported_config(
        Mxfp8MoeExperts, config, kMxfp8Static, kMxfp8Dynamic, arrives
    )
    assert not supported and reason in said


def test_other_weights_are_refused():
    assert not Mxfp8MoeExperts.is_supported_config(
        Mxfp8MoeExperts, moe_config(), kFp8Static128BlockSym, kMxfp8Dynamic, STANDARD
    )[0]


def test_on_amd_it_takes_naming_it(monkeypatch):
    """What vLLM has there has run on the card; ours has not."""
    import torch_mxfp8moe.integrations.vllm.experts as experts

    monkeypatch.setattr(type(experts.current_platform), "is_rocm", lambda self: True)
    ask = lambda name: Mxfp8MoeExperts.is_supported_config(  # noqa: E731
        Mxfp8MoeExperts, moe_config(moe_backend=name), kMxfp8Static, kMxfp8Dynamic, STANDARD
    )
    assert ask("triton") == (True, None)
    assert not ask("auto")[0] and "--moe-backend triton" in ask("auto")[1]


def test_never_the_reference(monkeypatch):
    for name, backend in registered().items():
        if name != "reference":
            monkeypatch.setattr(backend, "why_unavailable", lambda: "not today")
    assert not Mxfp8MoeExperts._supports_current_device()
    monkeypatch.undo()
    for name in ("aiter", "triton", "cpu"):
        monkeypatch.setattr(registered()[name], "why_not", lambda call: "not this one")
    supported, reason = Mxfp8MoeExperts.is_supported_config(
        Mxfp8MoeExperts, moe_config(), kMxfp8Static, kMxfp8Dynamic, STANDARD
    )
    assert not supported and "not cpu: not this one" in reason


# --- the experts in vLLM's modular kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 7])
def test_the_modular_kernel_gives_the_op(tokens, dtype):
    inputs = moe_inputs(T=tokens, dtype=dtype)
    got = run_kernel(kernel(moe_config(in_dtype=dtype), inputs), inputs)
    assert_equal(got, torch_mxfp8moe.fused_moe(**inputs))


def test_no_tokens():
    inputs = moe_inputs(T=0)
    assert run_kernel(kernel(moe_config(), inputs), inputs).shape == (0, 64)


@pytest.mark.parametrize("limit", [None, 0.0, 0.5])
@pytest.mark.parametrize("activation", [MoEActivation.SILU, MoEActivation.SWIGLUOAI_UNINTERLEAVE])
def test_activations(activation, limit):
    inputs = moe_inputs()
    options = dict(swiglu_limit=limit, gemm1_alpha=1.702, gemm1_beta=1.0)
    got = run_kernel(kernel(moe_config(activation=activation), inputs, **options), inputs, activation)
    oai = activation != MoEActivation.SILU  # which has no alpha and beta, whatever the config says
    want = dict(swiglu_alpha=1.702, swiglu_beta=1.0) if oai else {}
    assert_equal(got, torch_mxfp8moe.fused_moe(**inputs, **want, swiglu_limit=limit or None))
    unclamped = torch_mxfp8moe.fused_moe(**inputs, **want)
    assert torch.equal(got, unclamped) == (not limit)


def test_an_activation_that_the_op_has_not():
    with pytest.raises(NotImplementedError, match="no activation gelu"):
        swiglu(MoEActivation.GELU, None, None, None)


def test_biases():
    inputs = moe_inputs(bias_dtype=torch.float32)
    got = run_kernel(kernel(moe_config(has_bias=True), inputs), inputs)
    assert_equal(got, torch_mxfp8moe.fused_moe(**inputs))
    without = {name: x for name, x in inputs.items() if not name.endswith("bias")}
    with pytest.raises(NotImplementedError, match="does not hand to the kernel"):
        kernel(moe_config(has_bias=True), without)


def test_router_weight_on_input():
    """vLLM multiplies the hidden states in its prepare step, as its Triton experts expect it."""
    inputs = moe_inputs(T=7, K=1)
    inputs["topk_weights"] = inputs["topk_weights"] * 0.25
    got = run_kernel(kernel(moe_config(K=1), inputs), inputs, on_input=True)
    weighted = inputs["hidden_states"] * inputs["topk_weights"].bfloat16()
    ones = torch.ones_like(inputs["topk_weights"])
    assert_equal(got, torch_mxfp8moe.fused_moe(**inputs | dict(hidden_states=weighted, topk_weights=ones)))
    own = torch_mxfp8moe.fused_moe(**inputs, apply_router_weight_on_input=True)
    assert relative_l2(got, own) < 0.05  # the op's own way, but for the rounding of activations that are a quarter


@pytest.mark.parametrize("ranks", [2, 4])
def test_expert_parallel_ranks_sum_to_the_whole(ranks):
    """With the -1 maps that vLLM makes."""
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    inputs = moe_inputs(T=33, E=8, K=3)
    whole = torch_mxfp8moe.fused_moe(**inputs)
    total = torch.zeros_like(whole, dtype=torch.float32)
    for rank in range(ranks):
        local, expert_map, _ = determine_expert_map(ranks, rank, 8)
        held = expert_map >= 0
        part = {name: x[held] if name.startswith("w") else x for name, x in inputs.items()}
        parallel = dict(ep_size=ranks, ep_rank=rank, use_ep=True)
        config = moe_config(8, 3, num_local_experts=local, parallel=parallel)
        total += run_kernel(kernel(config, part), part, expert_map=expert_map, experts=8).float()
    assert relative_l2(total, whole.float()) < 1e-2


def test_activations_that_arrive_quantised():
    inputs = moe_inputs(T=9)
    experts = kernel(moe_config(), inputs).fused_experts
    data, scale = torch_mxfp8moe.quantize_1x32(inputs["hidden_states"])
    output = torch.empty(9, 64, dtype=torch.bfloat16)
    nothing = torch.empty(0)
    experts.apply(
        output, data, inputs["w1"], inputs["w2"], inputs["topk_weights"], inputs["topk_ids"], MoEActivation.SILU, 4,
        None, scale, None, nothing, nothing, None, False,
    )  # fmt: skip
    assert_equal(output, torch_mxfp8moe.fused_moe(**inputs))


def test_output_may_be_a_workspace(monkeypatch):
    """As where vLLM takes it from its workspace manager: allocated together, and used again by the next call."""
    from vllm.v1.worker.workspace import init_workspace_manager

    inputs = moe_inputs(T=9)
    ours = kernel(moe_config(), inputs)
    monkeypatch.setattr(type(mk.current_platform), "is_cpu", lambda self: False)
    copy = lambda self, output, fused_out, *_: output.copy_(fused_out)  # noqa: E731
    monkeypatch.setattr(MoEPrepareAndFinalizeNoDPEPModular, "finalize", copy)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # which wants a GPU
    init_workspace_manager(torch.device("cpu"))
    monkeypatch.setattr(torch.Tensor, "is_contiguous", lambda self: False)  # no alias of the caller's output
    first = run_kernel(ours, inputs)
    second = run_kernel(ours, inputs)
    monkeypatch.undo()
    want = torch_mxfp8moe.fused_moe(**inputs)
    assert_equal(first, want)
    assert_equal(second, want)


# --- layers that vLLM makes and loads


@pytest.fixture(scope="module")
def world():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield


CHECKPOINTS = {
    "minimax": {"quant_method": "mxfp8", "ignored_layers": []},
    "modelopt": {
        "quant_method": "modelopt",
        "quantization": {"quant_algo": "MXFP8", "kv_cache_quant_algo": None, "exclude_modules": []},
    },
}


def layer_of(quant_config, inputs, moe_backend="auto", **options):
    """A MoE layer that vLLM makes, its weights loaded per expert through vLLM's loader."""
    from vllm.config import get_current_vllm_config

    get_current_vllm_config().kernel_config.moe_backend = moe_backend
    experts, rows, hidden = inputs["w1"].shape
    runner = FusedMoEFactory(
        num_experts=experts, top_k=inputs["topk_ids"].shape[1], hidden_size=hidden, intermediate_size=rows // 2,
        params_dtype=torch.bfloat16, quant_config=quant_config, prefix=f"layer{layer_of.count}.experts", **options,
    )  # fmt: skip
    layer_of.count += 1
    layer = runner.routed_experts
    halves = {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, rows)}
    tensors = []
    for e in range(experts):
        for suffix, w1, w2 in (("weight", "w1", "w2"), ("weight_scale", "w1_scale", "w2_scale")):
            tensors += [(f"{e}.{name}.{suffix}", inputs[w1][e, half]) for name, half in halves.items()]
            tensors.append((f"{e}.down_proj.{suffix}", inputs[w2][e]))
    assert len(list(layer.load_weights(tensors))) == len(tensors)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


layer_of.count = 0


def op_options(options):
    numbers = (options.get(f"swiglu_{name}") for name in ("alpha", "beta", "limit"))
    return swiglu(MoEActivation(options["activation"]), *numbers)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("option", ["--moe-backend triton", "--quantization mxfp8moe"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_a_layer_loaded_by_vllm(world, checkpoint, option, options):
    inputs = moe_inputs(T=5, H=64, I=96, E=4)
    named = option.startswith("--quant")
    quant = get_quantization_config("mxfp8moe" if named else "mxfp8").from_config(CHECKPOINTS[checkpoint])
    layer = layer_of(quant, inputs, "auto" if named else "triton", **options)
    assert type(layer.quant_method.moe_kernel.fused_experts) is Mxfp8MoeExperts
    assert type(layer.quant_method).__name__ == ("Mxfp8MoeMethod" if named else "ModelOptMxFp8FusedMoE")
    got = layer.forward_modular(inputs["hidden_states"], inputs["topk_weights"], inputs["topk_ids"])
    assert_equal(got, torch_mxfp8moe.fused_moe(**inputs, **op_options(options)))


def test_weights_in_the_layout_of_the_device(world, monkeypatch):
    """Where aiter_gfx950 is what the device takes: laid out while loading, and read so."""
    monkeypatch.setattr(torch_mxfp8moe.Mxfp8Experts, "_choice", lambda self, device: ("aiter_gfx950", "for the test"))
    inputs = moe_inputs(T=5, H=256, I=96, E=4)
    layer = layer_of(get_quantization_config("mxfp8moe").from_config(CHECKPOINTS["minimax"]), inputs)
    assert layer.quant_method.moe_kernel.fused_experts.layout == "aiter_gfx950"
    assert layer.w13_weight.shape == (4, 256, 256) and layer.w13_weight_scale.shape == (4 * 256, 8)  # I padded to 128
    got = layer.forward_modular(inputs["hidden_states"], inputs["topk_weights"], inputs["topk_ids"])
    assert relative_l2(got, torch_mxfp8moe.fused_moe(**inputs)) < 5e-3


def test_quantization_that_cannot_be_served_says_why(world):
    quant = get_quantization_config("mxfp8moe").from_config(CHECKPOINTS["minimax"])
    with pytest.raises(ValueError, match="--quantization mxfp8moe: torch_mxfp8moe does not serve this layer: .*GELU"):
        layer_of(quant, moe_inputs(), activation="gelu")
    with pytest.raises(ValueError, match="--moe-backend is 'marlin'"):
        layer_of(quant, moe_inputs(), "marlin", activation="silu")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_which_checkpoints_the_quantization_takes(checkpoint):
    """Only by its name: vLLM asks every registered config about every checkpoint."""
    config = get_quantization_config("mxfp8moe")
    ask = lambda form, user: config.override_quantization_method(form, user, hf_config=None)  # noqa: E731
    assert ask(CHECKPOINTS[checkpoint], "mxfp8moe") == "mxfp8moe"
    assert ask(CHECKPOINTS[checkpoint], None) is None and ask(CHECKPOINTS[checkpoint], "mxfp8") is None
    assert ask({"quant_method": "fp8"}, "mxfp8moe") is None and ask({}, "mxfp8moe") is None


@pytest.mark.parametrize("user", [None, "mxfp8moe"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_vllms_model_config_takes_the_name(tmp_path, checkpoint, user):
    """ModelConfig reads a checkpoint's config.json and agrees with ``--quantization mxfp8moe``."""
    from vllm.config import ModelConfig

    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1, vocab_size=64)
    moe = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, num_key_value_heads=2, head_dim=32)
    config = dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", torch_dtype="bfloat16", **sizes, **moe,
        max_position_embeddings=128, quantization_config=CHECKPOINTS[checkpoint],
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    got = ModelConfig(model=str(tmp_path), quantization=user, skip_tokenizer_init=True, dtype="bfloat16").quantization
    assert got == (user or {"minimax": "mxfp8", "modelopt": "modelopt_mxfp8"}[checkpoint])
