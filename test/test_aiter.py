"""The aiter backend without aiter and without an AMD GPU: what is refused and why, and every argument of every call.

aiter is the stand-in of ``aiter_stand_in.py``. Nothing here ran on a gfx950.
"""

import dataclasses
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # which looks at the machine: before tests pretend another
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import aiter_stand_in
import device
import shapes
import torch_mxfp8moe
from helpers import (
    E4M3,
    E8M0,
    OPS,
    PACKAGE,
    as_bytes,
    assert_agrees,
    check_op,
    error_of,
    moe_inputs,
    only_cpu,
    relative_l2,
    run_python,
    same_bytes,
)
from test_triton import needs_triton, on_gpu
from torch_mxfp8moe import dispatch, reference
from torch_mxfp8moe.arguments import FusedMoe
from torch_mxfp8moe.backends import aiter as backend
from torch_mxfp8moe.backends import registered, triton
from torch_mxfp8moe.backends.aiter import probe, rules, tuned
from torch_mxfp8moe.backends.aiter.routes import routes

pytestmark = only_cpu

SILU = dict(swiglu_alpha=1.0, swiglu_beta=0.0, swiglu_limit=None)
CLAMPED = SILU | dict(swiglu_limit=0.75)
OAI = dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=0.75)
"""The three activations, with limits low enough that they limit something in the tests."""


ROUTES = backend.Routes.of
"""The real one, which launches the kernel."""


def shuffled(inputs: dict, pad_to: int = 1) -> dict:
    """The same call with weights in aiter's layout."""
    result = dict(inputs, layout="aiter_gfx950")
    for name, gate_up in (("w1", True), ("w2", False)):
        result[name], result[f"{name}_scale"] = torch_mxfp8moe.preshuffle(
            inputs[name], inputs[f"{name}_scale"], layout="aiter_gfx950", gate_up=gate_up, pad_to=pad_to
        )
    return result


def small(T: int = 5, H: int = 256, I: int = 128, **options) -> dict:
    return shuffled(moe_inputs(T, H, I, **options))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """``machine(arch, **what install takes)``: the backends as they would be on a machine with that GPU and aiter."""
    monkeypatch.syspath_prepend(tmp_path)
    aiter_stand_in.forget()

    def build(arch: str | None = "gfx950", installed: bool = True, hip: str | None = "7.2", **what) -> backend.Aiter:
        if installed:
            aiter_stand_in.install(tmp_path, **what)
        importlib.invalidate_caches()
        properties = SimpleNamespace(gcnArchName=f"{arch}:sramecc+:xnack-", multi_processor_count=256)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: arch is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(arch is not None))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        for name in (*probe.SETTINGS, "AITER_CONFIG_FMOE", "TRITON_INTERPRET"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(backend, "_architecture", probe.architecture)
        monkeypatch.setattr(triton, "_target_of", triton.target_of)
        monkeypatch.setattr(backend.TRITON, "why_unavailable", lambda: None)
        here = {"aiter": backend.Aiter(), "triton": backend.TRITON, "reference": registered()["reference"]}
        monkeypatch.setattr(dispatch, "registered", lambda: here)
        return here["aiter"]

    yield build
    aiter_stand_in.forget()


@pytest.fixture
def served(machine, monkeypatch):
    """``served(**what install takes)``: aiter serves calls on CPU tensors, and computes; returns its list of calls.

    The routes come from their definition instead of the kernel, which the tests further down hold to it.
    """

    def build(behaviour=aiter_stand_in.compute, **what) -> list[dict]:
        assert machine(**what).why_unavailable() is None  # which is asked once
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(backend, "_architecture", lambda device: "gfx950")
        monkeypatch.setattr(backend.Routes, "of", lambda self, call: defined_routes(call))
        monkeypatch.setattr(aiter_stand_in, "behaviour", behaviour)
        aiter_stand_in.calls.clear()
        return aiter_stand_in.calls

    return build


def defined_routes(call: FusedMoe):
    return routes(call.topk_ids, call.topk_weights, call.expert_map, call.num_tokens, call.experts)


# --- whether there is an aiter to call


@pytest.mark.parametrize("version", aiter_stand_in.SUPPORTED)
def test_usable(machine, version):
    """From the first release with MXFP8 to the last interface that was read."""
    assert machine(version=version).why_unavailable() is None
    assert torch_mxfp8moe.backends()["aiter"].usable
    assert torch_mxfp8moe.explain(**on_gpu_call()).backend == "aiter"


def on_gpu_call(**options) -> dict:
    """A call on a GPU that need not be there; ``options``: of the call or of ``moe_inputs``."""
    sizes = {name: options.pop(name) for name in list(options) if len(name) == 1 or name == "dtype"}
    inputs = small(**sizes) | options
    tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    return inputs | on_gpu(tensors)


def test_a_build_without_rocm(machine):
    reason = machine(hip=None).why_unavailable()
    assert reason == "PyTorch is built without ROCm; aiter's MXFP8 kernels are for gfx950"
    assert "aiter" not in sys.modules


def test_without_a_gpu(machine):
    assert machine(arch=None).why_unavailable() == "there is no GPU that PyTorch can use"
    assert "aiter" not in sys.modules


@pytest.mark.parametrize("arch", ("gfx942", "gfx90a", "gfx1250", "gfx1100"))
def test_another_gpu(machine, arch):
    assert machine(arch).why_unavailable() == f"the GPU is {arch}; aiter's MXFP8 kernels are for gfx950"
    assert "aiter" not in sys.modules


def test_without_aiter(machine, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "aiter" else find(name))
    assert_expected_inline(
        machine(installed=False).why_unavailable(),
        """aiter is not installed; it is built from source (https://github.com/ROCm/aiter, v0.1.17 or later): the package index's 'aiter' is another project and its 'amd-aiter' predates MXFP8""",  # noqa: E501
    )


def test_the_package_indexs_aiter_is_recognised(machine, tmp_path):
    """It imports; nobody needs to import it to tell."""
    (tmp_path / "aiter").mkdir()
    (tmp_path / "aiter" / "__init__.py").write_text("raise AssertionError('imported')")
    aiter_stand_in.metadata(tmp_path, "aiter", "0.13.20191203")
    reason = machine(installed=False).why_unavailable()
    assert reason == (
        f"the module 'aiter' in {tmp_path}/aiter/__init__.py is the package index's 'aiter' 0.13.20191203, "
        "asynchronous iterators, not AMD's (https://github.com/ROCm/aiter, v0.1.17 or later); uninstall it"
    )
    assert "aiter" not in sys.modules


@pytest.mark.parametrize("name", ("aiter.py", "aiter/notes.txt"))
def test_something_else_called_aiter(machine, tmp_path, name):
    """A module, and a folder that happens to lie on the path."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    reason = machine(installed=False).why_unavailable()
    assert f"in {tmp_path}/aiter" in reason and "is something else, not AMD's" in reason


def test_the_package_indexs_amd_aiter_is_too_old(machine):
    assert_expected_inline(
        machine(version="0.1.7.post2").why_unavailable(),
        """aiter 0.1.7.post2 is too old: its fused_moe takes no swiglu_limit, gate_mode; MXFP8 came with v0.1.17 (https://github.com/ROCm/aiter, v0.1.17 or later)""",  # noqa: E501
    )


def test_gate_mode_alone_does_not_make_mxfp8(machine):
    """v0.1.14 to v0.1.16: what vLLM's probe takes for enough."""
    assert_expected_inline(
        machine(version="0.1.14").why_unavailable(),
        """aiter 0.1.14 is too old: it has no kernel flydsl_moe1_afp8_wfp8_bf16_t32x128x256_w2_gui; MXFP8 came with v0.1.17 (https://github.com/ROCm/aiter, v0.1.17 or later)""",  # noqa: E501
    )


def test_without_flydsl(machine):
    reason = machine(version="0.1.20", flydsl=None).why_unavailable()
    assert reason.startswith("flydsl is not installed, ")


@pytest.mark.parametrize("version, flydsl", [("0.1.17", "0.3.1"), ("0.1.20", "0.2.4"), ("0.1.20", "0.4.2")])
def test_another_flydsl_than_aiter_asks_for(machine, version, flydsl):
    want = aiter_stand_in.FLYDSL[version]
    assert machine(version=version, flydsl=flydsl).why_unavailable() == (
        f"flydsl is {flydsl}; the installed aiter takes {want}"
    )
    assert "aiter" not in sys.modules


def test_the_flydsl_that_aiter_asks_for_in_another_build(machine):
    assert machine(version="0.1.20", flydsl="0.3.1+rocm7.2").why_unavailable() is None


def test_a_flydsl_without_kernels_for_this_gpu(machine):
    files = {"aiter/ops/flydsl/utils.py": "is_flydsl_available = lambda: False"}
    assert machine(files=files).why_unavailable() == "aiter says that flydsl has no kernels for this GPU"


@pytest.mark.parametrize("error", ("RuntimeError('no GPU')", "AssertionError()", "ImportError('libamdhip64.so')"))
@pytest.mark.parametrize("name", ("aiter/__init__.py", "aiter/fused_moe.py", "aiter/ops/flydsl/moe_kernels.py"))
def test_an_aiter_that_does_not_import(machine, name, error):
    reason = machine(files={name: f"raise {error}"}).why_unavailable()
    kind, text = error[:-1].split("(")
    text = text.strip("'")
    assert reason == f"importing {name[:-3].replace('/', '.').removesuffix('.__init__')} raised {kind}: {text}"


@pytest.mark.parametrize(
    "files, text",
    [
        ({"aiter/fused_moe.py": ""}, "has no function aiter.fused_moe.fused_moe"),
        ({"aiter/__init__.py": "class ActivationType: Silu = 0\nclass QuantType: No = 0"}, "no attribute 'Swiglu'"),
        ({"aiter/ops/flydsl/moe_common.py": "class GateMode: pass"}, "no attribute 'INTERLEAVE'"),
        ({"aiter/ops/flydsl/moe_common.py": None}, "importing aiter.ops.flydsl.moe_common raised ModuleNotFoundError"),
        ({"aiter/ops/flydsl/moe_kernels.py": ""}, "no attribute 'get_flydsl_kernel_params'"),
    ],
    ids=("function", "activations", "gate mode", "module", "kernels"),
)
def test_another_interface_is_a_no(machine, files, text):
    if "aiter/__init__.py" in files:
        files["aiter/fused_moe.py"] = f"def fused_moe({', '.join(probe.PARAMETERS)}): pass"
    machine(files=files)
    status = torch_mxfp8moe.backends()["aiter"]
    assert not status.usable and text in status.reason
    assert torch_mxfp8moe.explain(**on_gpu_call()).backend == "triton"


@pytest.mark.parametrize("missing", probe.PARAMETERS)
def test_a_parameter_that_is_gone_is_a_no(machine, missing):
    names = ", ".join(name for name in probe.PARAMETERS if name != missing)
    reason = machine(files={"aiter/fused_moe.py": f"def fused_moe({names}): pass"}).why_unavailable()
    assert f"its fused_moe takes no {missing}; " in reason


@pytest.mark.parametrize("missing", probe.KERNELS)
def test_a_kernel_that_is_gone_is_a_no(machine, monkeypatch, missing):
    monkeypatch.setattr(aiter_stand_in, "KERNELS", tuple(k for k in aiter_stand_in.KERNELS if k != missing))
    assert f"it has no kernel {missing}; " in machine().why_unavailable()


@pytest.mark.parametrize("name", probe.SETTINGS)
def test_a_setting_of_aiter_that_changes_results_is_a_no(machine, monkeypatch, name):
    here = machine()
    usual, does = probe.SETTINGS[name]
    monkeypatch.setenv(name, "10"[int(usual)])
    assert here.why_unavailable() == f"the environment has {name}={'10'[int(usual)]}, which {does}; unset it"
    monkeypatch.setenv(name, usual)
    assert backend.Aiter().why_unavailable() is None


def test_without_triton(machine, monkeypatch):
    here = machine()
    monkeypatch.setattr(backend.TRITON, "why_unavailable", lambda: "Triton is not installed")
    assert here.why_unavailable() == "its routes take a Triton kernel, and: Triton is not installed"


def test_nothing_is_imported_before_it_is_asked_for():
    """A fresh interpreter on a machine with a gfx950 and everything installed."""
    code = """
import importlib, sys, tempfile
from pathlib import Path
from types import SimpleNamespace
import torch
import torch._dynamo
before = set(sys.modules)
import torch_mxfp8moe
from helpers import moe_inputs
torch_mxfp8moe.fused_moe(**moe_inputs())
names = lambda: sorted({"aiter", "flydsl", "triton"} & (set(sys.modules) - before))
print(names())
import aiter_stand_in
folder = tempfile.mkdtemp()
aiter_stand_in.install(Path(folder))
sys.path.insert(0, folder)
torch_mxfp8moe.fused_moe(**moe_inputs())
torch_mxfp8moe.explain(**moe_inputs(), backend="cpu")
print(names())
torch.version.hip = "7.2"
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_properties = lambda device: SimpleNamespace(gcnArchName="gfx950:sramecc+:xnack-")
from torch_mxfp8moe.backends import registered
registered.cache_clear()
for module in [name for name in sys.modules if name.startswith("torch_mxfp8moe.backends.")]:
    del sys.modules[module]
torch_mxfp8moe.backends()
print("aiter" in names())
"""
    assert run_python(code, TRITON_INTERPRET="0").splitlines() == ["[]", "[]", "True"]


# --- whether it serves a call


def refusal(**options) -> str:
    """Why aiter does not serve such a call; what ``auto`` takes instead reads the same weights."""
    inputs = on_gpu_call(**options)
    explained = torch_mxfp8moe.explain(**inputs)
    assert explained.backend == "triton", explained
    named = torch_mxfp8moe.explain(**inputs, backend="aiter")
    assert named.backend is None and named.reasons["aiter"] == explained.reasons["aiter"]
    return explained.reasons["aiter"]


@pytest.mark.parametrize("options", (SILU, CLAMPED, OAI, OAI | dict(swiglu_limit=7.0)))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_what_it_serves(machine, options, dtype):
    machine()
    assert torch_mxfp8moe.explain(**on_gpu_call(dtype=dtype), **options, out_dtype=torch.bfloat16).backend == "aiter"


def test_explain_text(machine):
    machine(version="0.1.17")
    assert_expected_inline(
        str(torch_mxfp8moe.explain(**on_gpu_call())),
        """\
fused_moe on cuda:0, T=5 H=256 I=128 E=4 K=2, layout aiter_gfx950, activations mxfp8: served by aiter
  note: aiter has no tuned kernel for T=5 H=256 I=128 E=4 K=2 on 256 compute units and chooses one by a rule of thumb; such shapes have faulted (https://github.com/ROCm/aiter/issues/5049)
  not triton: it could, but 'aiter' comes first
  not reference: it could, but 'aiter' comes first""",  # noqa: E501
    )


def test_explain_text_of_a_refusal(machine):
    machine()
    assert_expected_inline(
        str(torch_mxfp8moe.explain(**on_gpu_call(swiglu_alpha=1.702, swiglu_beta=1.0))),
        """\
fused_moe on cuda:0, T=5 H=256 I=128 E=4 K=2, layout aiter_gfx950, activations mxfp8: served by triton
  not aiter: it limits gpt-oss's SwiGLU to 7 where the call has no swiglu_limit
  not reference: it could, but 'triton' comes first""",
    )


def test_a_named_aiter_that_is_not_there_says_why(machine):
    machine("gfx942")
    with pytest.raises(RuntimeError) as error:
        torch_mxfp8moe.fused_moe(**small(), backend="aiter")
    assert str(error.value) == (
        "fused_moe: backend 'aiter' does not serve this call: the GPU is gfx942; aiter's MXFP8 kernels are for gfx950"
    )


def test_tensors_of_another_device(machine):
    machine()
    reasons = torch_mxfp8moe.explain(**small(), backend="reference").reasons
    assert reasons["aiter"] == "the tensors are on cpu, not an AMD GPU; it takes gfx950"


def test_it_computes_fused_moe_only(machine):
    here = machine()
    from torch_mxfp8moe.arguments import Dequantize, Preshuffle, Quantize

    x, data, scale = torch.zeros(1, 32), torch.zeros(2, 64, 32, dtype=E4M3), torch.zeros(2, 64, 1, dtype=torch.uint8)
    for call in (
        Quantize(x), Dequantize(data, scale, torch.float32), Preshuffle(data, scale, "row_major", True)
    ):  # fmt: skip
        assert here.why_not(call) == "it computes fused_moe only"


def test_weights_in_another_layout(machine):
    """Never reshuffled; the reason says how to, and how I becomes one that aiter does not floor."""
    machine()
    for I in (128, 192):
        explained = torch_mxfp8moe.explain(**on_gpu(moe_inputs(4, 256, I)))
        assert explained.backend == "triton"
        assert_expected_inline(
            explained.reasons["aiter"],
            """it reads weights in layout 'aiter_gfx950', not 'row_major': preshuffle them once, at load, with pad_to=128 if I is not divisible by that""",  # noqa: E501
        )


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(out_dtype=torch.float16), "it writes bfloat16, not float16"),
        (dict(out_dtype=torch.float32), "it writes bfloat16, not float32"),
        (
            dict(dtype=torch.float32, out_dtype=torch.bfloat16),
            "it takes hidden_states of bfloat16 or float16, not float32",
        ),
        (dict(activation_dtype="bf16"), "it rounds activations to MXFP8, not to bf16"),
        (dict(K=1, apply_router_weight_on_input=True), "it has no kernel for apply_router_weight_on_input"),
        (OAI | dict(swiglu_limit=None), "it limits gpt-oss's SwiGLU to 7 where the call has no swiglu_limit"),
        (OAI | dict(swiglu_limit=1e-60), "it takes a swiglu_limit of zero in fp32, 1e-60, for none"),
        (SILU | dict(swiglu_limit=1e-60), "it takes a swiglu_limit of zero in fp32, 1e-60, for none"),
        (dict(T=1, E=1, K=127), "its kernels take at most 126 experts per token, not 127"),
        (dict(T=1, E=1, K=1, H=8448), "its kernels take H of at most 8192, not 8448"),
        (dict(T=1, E=1, K=1, I=8320), "its kernels take I of at most 8192, not 8320"),
    ],
)
def test_refusals(machine, options, reason):
    machine()
    assert refusal(**options) == reason


@pytest.mark.parametrize("alpha, beta", [(1.702, 0.0), (1.0, 1.0), (1.701, 1.0), (1.702, 0.999), (2.0, 0.0)])
def test_another_swiglu_is_refused(machine, alpha, beta):
    machine()
    reason = refusal(swiglu_alpha=alpha, swiglu_beta=beta, swiglu_limit=7.0)
    assert reason == f"it has swiglu_alpha, swiglu_beta of 1, 0 and of 1.702, 1, not of {alpha:g}, {beta:g}"


def test_numbers_that_are_equal_in_fp32_are(machine):
    machine()
    alpha = torch.tensor(1.702).item()
    assert alpha != 1.702
    assert torch_mxfp8moe.explain(**on_gpu_call(**OAI | dict(swiglu_alpha=alpha))).backend == "aiter"


@pytest.mark.parametrize("name", ("w1_bias", "w2_bias"))
def test_biases_are_refused(machine, name):
    machine()
    bias = on_gpu({name: moe_inputs(5, 256, 128, bias_dtype=torch.float32)[name]})
    assert refusal(**bias) == "its tuned kernels drop w1_bias and w2_bias"


@pytest.mark.parametrize("name", ("w1", "w1_scale", "w2", "w2_scale"))
def test_weights_that_are_not_aligned_are_refused(served, name):
    served()
    inputs = small()
    moved = torch.empty(inputs[name].numel() + 8, dtype=torch.uint8)[8:].view(inputs[name].dtype)
    moved = moved.view(inputs[name].shape).copy_(inputs[name])
    assert moved.data_ptr() % 16 == 8
    assert torch_mxfp8moe.explain(**inputs).backend == "aiter"
    explained = torch_mxfp8moe.explain(**inputs | {name: moved})
    assert explained.backend == "reference"  # on tensors of the CPU
    assert explained.reasons["aiter"] == f"its kernels read 16 bytes at a time, and {name} is not aligned to that"


def test_hidden_states_that_are_quantised_are_refused(machine):
    machine()
    x = on_gpu({k: v for k, v in moe_inputs(5, 256, 128, scaled=True).items() if k.startswith("hidden_states")})
    assert refusal(**x) == "it quantises hidden_states itself and ignores hidden_states_scale"


def on_meta(T: int, H: int, I: int, E: int, K: int) -> FusedMoe:
    """A call of any size, without memory."""
    scale_shape = torch_mxfp8moe.LAYOUTS["aiter_gfx950"].scale_shape

    def empty(*shape, dtype=torch.uint8):
        return torch.empty(shape, dtype=dtype, device="meta")

    return FusedMoe(
        empty(T, H, dtype=torch.bfloat16), empty(E, 2 * I, H, dtype=E4M3), empty(*scale_shape(E, 2 * I, H)),
        empty(E, H, I, dtype=E4M3), empty(*scale_shape(E, H, I)), empty(T, K, dtype=torch.float32),
        empty(T, K, dtype=torch.int32), layout="aiter_gfx950",
    ).check()  # fmt: skip


@pytest.mark.parametrize(
    "largest, sizes",
    [
        ("w1", dict(T=1, H=8192, I=2048, E=128, K=8)),
        ("the output", dict(T=2**19, H=4096, I=128, E=8, K=1)),
        ("the intermediate", dict(T=2**18, H=256, I=2048, E=8, K=8)),
    ],
)
def test_what_32_bits_do_not_address_is_refused(largest, sizes):
    assert f" bytes of a tensor, and {largest} has " in rules.why_not(on_meta(**sizes))
    name = "E" if largest == "w1" else "T"
    assert rules.why_not(on_meta(**sizes | {name: sizes[name] // 2})) is None


def test_the_number_of_tokens_fits_24_bits():
    assert rules.why_not(on_meta(2**24, 256, 128, 1, 1)) == "its kernels take fewer than 16777216 tokens, not 16777216"


def test_sizes_that_it_would_floor_never_get_there(machine):
    """The layout itself refuses them, when weights are prepared and in every call."""
    machine()
    inputs = moe_inputs(2, 256, 192)
    assert_expected_inline(
        error_of(lambda: shuffled(inputs)),
        """preshuffle: weight does not fit: layout 'aiter_gfx950' takes intermediate sizes divisible by 128, not 192; pad_to rounds the intermediate size up""",  # noqa: E501
    )
    assert "takes intermediate sizes divisible by 128, not 192" in error_of(
        lambda: torch_mxfp8moe.explain(**inputs | dict(layout="aiter_gfx950"))
    )
    assert "takes hidden sizes divisible by 256, not 384" in error_of(lambda: small(H=384))


# --- what it is called with


KINDS = {
    "plain": {},
    "fp16": dict(dtype=torch.float16),
    "int64 ids": dict(id_dtype=torch.int64),
    "bf16 weights": dict(weight_dtype=torch.bfloat16),
    "fp64 weights": dict(weight_dtype=torch.float64),
    "one expert": dict(K=1),
    "all experts": dict(K=4),
    "no token": dict(T=0),
    "one token": dict(T=1),
}


def check_arguments(arguments: dict, inputs: dict, **options) -> None:
    """Every argument of one recorded call of aiter, given those of ours."""
    import aiter

    a = dict(arguments)
    x = a.pop("hidden_states")
    assert torch.equal(x, inputs["hidden_states"]) and x.dtype == inputs["hidden_states"].dtype
    assert x.is_contiguous() and x.data_ptr() % 16 == 0
    for name in ("w1", "w2"):
        got, scale = a.pop(name), a.pop(f"{name}_scale")
        assert got.data_ptr() == inputs[name].data_ptr() and got.dtype is E4M3 and got.shape == inputs[name].shape
        assert got.is_shuffled is True and not hasattr(inputs[name], "is_shuffled")
        assert scale.data_ptr() == inputs[f"{name}_scale"].data_ptr() and scale.dtype is torch.uint8
        assert scale.dim() == 2 and scale.shape[0] == got.shape[0] * got.shape[1]
    experts = inputs["w1"].shape[0]
    ids, weights, mask = a.pop("topk_ids"), a.pop("topk_weight"), a.pop("expert_mask")
    T, K = inputs["topk_ids"].shape
    assert ids.shape == weights.shape == (T, K + 1) and ids.is_contiguous() and weights.is_contiguous()
    assert (ids.dtype, weights.dtype, mask.dtype) == (torch.int32, torch.float32, torch.int32)
    assert mask.tolist() == [1] * experts + [0]
    assert ids.min() >= 0 and ids.max() <= experts and (ids[:, K] == experts).all() and (weights[:, K] == 0).all()
    local = reference.local_experts(inputs["topk_ids"], inputs.get("expert_map"), inputs.get("num_tokens"), experts)
    assert torch.equal(ids[:, :K].long(), torch.where(local < 0, experts, local))
    assert torch.equal(weights[:, :K], inputs["topk_weights"].float().where(local >= 0, 0))
    oai = options.get("swiglu_alpha") == 1.702
    assert a.pop("activation") is (aiter.ActivationType.Swiglu if oai else aiter.ActivationType.Silu)
    assert a.pop("quant_type") is aiter.QuantType.per_1x32
    assert a.pop("swiglu_limit") == options.get("swiglu_limit")
    gate_mode = a.pop("gate_mode")
    assert gate_mode == "interleave" and type(gate_mode) is str
    assert a.pop("dtype") is torch.bfloat16
    defaults = dict(doweight_stage1=False, moe_sorting_dispatch_policy=0, hidden_pad=0, intermediate_pad=0, splitk=0)
    defaults |= dict(shared_expert_id=-1)
    assert a == {name: defaults.get(name) for name in a}  # whatever is left


@pytest.mark.parametrize("version", aiter_stand_in.SUPPORTED)
@pytest.mark.parametrize("options", (SILU, CLAMPED, OAI), ids=("silu", "clamped", "oai"))
@pytest.mark.parametrize("kind", KINDS)
def test_every_argument(served, version, options, kind):
    calls = served(version=version)
    inputs = small(**KINDS[kind])
    out = OPS.fused_moe(**inputs, **options, out_dtype=torch.bfloat16)
    want = reference.fused_moe(**inputs, **options, out_dtype=torch.bfloat16)
    assert_agrees(out, want)
    if kind == "no token":
        assert not calls and out.shape == (0, 256)
    else:
        (arguments,) = calls
        check_arguments(arguments, inputs, **options)


def test_the_tests_limits_limit(served):
    served()
    inputs = small()
    assert relative_l2(OPS.fused_moe(**inputs, **SILU), OPS.fused_moe(**inputs, **CLAMPED)) > 0.01


def test_scales_of_either_dtype(served):
    calls = served()
    inputs = small()
    typed = {name: inputs[name].view(E8M0) for name in ("w1_scale", "w2_scale")}
    OPS.fused_moe(**inputs | typed)
    check_arguments(calls[0], inputs)


def test_out_is_written_and_nothing_else_is(served):
    calls = served()
    inputs = small()
    buffer = torch.full((5, 300), 7.0, dtype=torch.bfloat16)
    before = {name: as_bytes(x).clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    OPS.fused_moe.out(**inputs, out=buffer[:, :256])
    assert_agrees(buffer[:, :256], reference.fused_moe(**inputs))
    assert (buffer[:, 256:] == 7).all()
    check_arguments(calls[0], inputs)
    for name, was in before.items():
        assert torch.equal(as_bytes(inputs[name]), was), name


def test_without_out_nothing_is_copied(served):
    """The result is the tensor that aiter allocated."""
    made = []

    def keep(arguments):
        made.append(aiter_stand_in.empty(arguments))
        return made[0]

    served(keep)
    out = OPS.fused_moe(**small())
    assert out.untyped_storage().data_ptr() == made[0].untyped_storage().data_ptr()


def test_strided_and_misaligned_activations(served):
    """aiter gets a contiguous, aligned copy; routing tensors come from the routes anyway."""
    calls = served()
    inputs = small()
    strided = dict(inputs)
    for name in ("hidden_states", "topk_ids", "topk_weights"):
        wide = torch.zeros(5, inputs[name].shape[1] + 3, dtype=inputs[name].dtype)
        wide[:, 1:-2] = inputs[name]
        strided[name] = wide[:, 1:-2]
    padded = torch.zeros(5, 264, dtype=torch.bfloat16)[:, :256].copy_(inputs["hidden_states"])
    assert padded.data_ptr() % 16 == 0
    misaligned = torch.empty(5 * 256 + 1, dtype=torch.bfloat16)[1:].view(5, 256).copy_(inputs["hidden_states"])
    assert misaligned.is_contiguous() and misaligned.data_ptr() % 16
    for call in (strided, dict(inputs, hidden_states=padded), dict(inputs, hidden_states=misaligned)):
        assert same_bytes(OPS.fused_moe(**call), OPS.fused_moe(**inputs))
    for arguments in calls:
        check_arguments(arguments, inputs)


def test_parameters_and_views_of_weights(served):
    """What loses Python attributes loses nothing here, and gets none."""
    calls = served()
    inputs = small()
    parameters = {name: torch.nn.Parameter(inputs[name], requires_grad=False) for name in ("w1", "w2")}
    views = {name: inputs[name].view(-1).view(inputs[name].shape) for name in ("w1", "w2")}
    for weights in (parameters, views):
        assert_agrees(OPS.fused_moe(**inputs | weights), reference.fused_moe(**inputs))
        check_arguments(calls[-1], inputs | weights)


@pytest.mark.parametrize("with_out", (False, True))
@pytest.mark.parametrize("options", (SILU, OAI), ids=("silu", "oai"))
def test_compiled(served, options, with_out):
    """One opaque node in a full graph; the arguments are those of an eager call, for any number of tokens."""
    calls = served()
    torch._dynamo.reset()
    graphs = []

    def compile_and_keep(graph, example):
        compiled = torch._dynamo.lookup_backend("aot_eager")(graph, example)  # may ask for another graph
        graphs.append(graph)
        return compiled

    @torch.compile(fullgraph=True, backend=compile_and_keep, dynamic=True)
    def step(**tensors):
        return torch_mxfp8moe.fused_moe(**tensors, **options, layout="aiter_gfx950") * 1

    for T in (5, 3, 8):
        inputs = small(T)
        layout = inputs.pop("layout")
        out = dict(out=torch.empty(T, 256, dtype=torch.bfloat16)) if with_out else {}
        with torch.no_grad():
            got = step(**inputs, **out)
        assert_agrees(got, reference.fused_moe(**inputs, **options, layout=layout))
        assert not with_out or same_bytes(got, out["out"])
        check_arguments(calls[-1], inputs, **options)
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes if "mxfp8moe" in str(node.target)]
    assert targets == [f"mxfp8moe.fused_moe{'.out' if with_out else ''}"] and len(calls) == 3


@pytest.mark.parametrize("with_out", (False, True))
def test_opcheck(served, with_out):
    served()
    inputs = small(G=6) | dict(expert_map=torch.tensor([3, -1, 0, 1, -1, 2], dtype=torch.int32), backend="aiter")
    names = ("hidden_states", "w1", "w1_scale", "w2", "w2_scale", "topk_weights", "topk_ids")
    positional = tuple(inputs.pop(name) for name in names)
    if with_out:
        check_op(OPS.fused_moe.out, positional, inputs | dict(out=torch.zeros(5, 256, dtype=torch.bfloat16)))
    else:
        check_op(OPS.fused_moe.default, positional, inputs)


def test_fake_tensors_do_not_reach_it(served):
    calls = served()
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for k, x in small().items()}
        out = OPS.fused_moe(**fakes, backend="aiter")
        OPS.fused_moe.out(**fakes, out=out)
    assert out.shape == (5, 256) and out.dtype is torch.bfloat16 and not calls


def test_nothing_is_read_on_the_host(served):
    """Nor copied: beside allocations PyTorch makes aliases in a call, which graph capture takes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    ran = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ran.append(str(function))
            return function(*args, **kwargs or {})

    result = torch.zeros(5, 256, dtype=torch.bfloat16)
    served(lambda arguments: result)
    here = dispatch.registered()["aiter"]
    call = FusedMoe(**small(G=8), expert_map=torch.arange(8).int() - 4, num_tokens=torch.tensor([5]).int()).check()
    prepared = call.kind.plans["aiter"] = backend.Prepared(call)
    prepared.routes.plan = SimpleNamespace(run_here=lambda *arguments: ran.append("routes"))
    with pytest.MonkeyPatch.context() as patch, Recorder(), torch.no_grad():
        patch.setattr(backend.Routes, "of", ROUTES)
        assert here.why_not(call) is None and here.new_fused_moe(call) is result
    assert ran == ["routes"] + ["aten.detach.default"] * 2


@pytest.mark.parametrize("G", (None, 8))
def test_memory_of_routes(G):
    """New in each call, of the shapes and dtypes of the definition; the kernel gets it beside what the call has."""
    call, launched = FusedMoe(**small(G=G)), []
    if G:
        call.expert_map, call.num_tokens = torch.arange(G).int() - 4, torch.tensor([5]).int()
    routes = backend.Routes(call)
    routes.plan = SimpleNamespace(run_here=lambda op, memory, device, target: launched.append((memory, device)))
    first, second = ROUTES(routes, call), ROUTES(routes, call)
    for x, other, y in zip(first, second, defined_routes(call), strict=True):
        assert (x.shape, x.stride(), x.dtype, x.device) == (y.shape, y.stride(), y.dtype, y.device)
        assert x.data_ptr() != other.data_ptr()
    given = ["topk_ids", "topk_weights"] + ["expert_map", "num_tokens"] * bool(G)
    for written, (memory, on) in zip((first, second), launched, strict=True):
        want = {name: getattr(call, name) for name in given} | dict(zip(("ids", "weights", "mask"), written))
        assert on == call.device and memory.keys() == want.keys() and all(memory[name] is want[name] for name in want)


def test_a_gpu_that_is_not_the_current_one(served, monkeypatch):
    """aiter launches on the current device."""
    current, ran = [1], []

    def behaviour(arguments):
        ran.append(current[-1])
        return aiter_stand_in.empty(arguments)

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.append(1)

    served(behaviour)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    for index, want in ((1, [1]), (0, [1, 0, 1])):
        call = FusedMoe(**small()).check()
        monkeypatch.setattr(FusedMoe, "device", torch.device("cuda", index))
        dispatch.registered()["aiter"].new_fused_moe(call)
        assert current == want and ran.pop() == index


# --- what aiter does silently wrong


def test_hostile_ids_never_reach_it(served):
    calls = served()
    inputs = small(T=6, K=4, id_dtype=torch.int64)
    big = torch.iinfo(torch.int64)
    inputs["topk_ids"] = torch.tensor(
        [[2**32 + 3, 1, -1, 2], [big.min, big.max, 4, 0], [2**31, -(2**31), 2**63 - 2**32, 3],
         [0, 1, 2, 3], [5, 6, 7, 8], [-5, 2, 2**32, 1]]
    )  # fmt: skip
    assert_agrees(OPS.fused_moe(**inputs), reference.fused_moe(**inputs))
    check_arguments(calls[0], inputs)
    small_ids = inputs | dict(topk_ids=torch.tensor([[torch.iinfo(torch.int32).min, 3, 2**31 - 1, -1]] * 6).int())
    assert_agrees(OPS.fused_moe(**small_ids), reference.fused_moe(**small_ids))
    with pytest.raises(AssertionError, match="an id outside of expert_mask"):  # what those ids would meet there
        aiter_stand_in.compute(calls[0] | dict(topk_ids=inputs["topk_ids"].int()))


def test_hostile_expert_maps(served):
    calls = served()
    inputs = small(T=16, G=6, K=4)
    inputs["expert_map"] = torch.tensor([4, -1, 3, 2**31 - 1, 0, -(2**31)], dtype=torch.int32)
    assert_agrees(OPS.fused_moe(**inputs), reference.fused_moe(**inputs))
    check_arguments(calls[0], inputs)


def zero_weights(inputs: dict) -> dict:
    weights = inputs["topk_weights"].clone()
    weights[::2, 0] = 0.0
    weights[1, 0] = -0.0
    return inputs | dict(topk_weights=weights)


def test_a_weight_of_zero_leaves_the_rest_of_its_token_alone(served):
    """aiter's quantiser would store zeros for the token, next to its other route's values."""
    calls = served()
    inputs = zero_weights(small())
    assert_agrees(OPS.fused_moe(**inputs), reference.fused_moe(**inputs))
    ids, weights = calls[0]["topk_ids"], calls[0]["topk_weight"]
    assert ((weights == 0) == (ids == 4)).all()
    handed_over = calls[0] | dict(topk_ids=inputs["topk_ids"], topk_weight=inputs["topk_weights"], expert_mask=None)
    assert relative_l2(aiter_stand_in.compute(handed_over), reference.fused_moe(**inputs)) > 0.3


@pytest.mark.parametrize("weight_dtype", (torch.float64, torch.float32))
def test_a_weight_that_is_zero_in_fp32_is_zero(served, weight_dtype):
    calls = served()
    inputs = small(weight_dtype=weight_dtype)
    inputs["topk_weights"][0, 0] = 1e-300 if weight_dtype is torch.float64 else 0
    OPS.fused_moe(**inputs)
    assert calls[0]["topk_ids"][0, 0] == 4


def test_routes_of_one_token_to_the_same_expert_all_count(served):
    """aiter's sort has one place for each pair of a token and an expert."""
    calls = served()
    inputs = small(T=4, K=3)
    inputs["topk_ids"] = torch.tensor([[1, 1, 1], [0, 2, 0], [3, 1, 1], [0, 1, 2]], dtype=torch.int32)
    want = reference.fused_moe(**inputs)
    assert_agrees(OPS.fused_moe(**inputs), want)
    assert calls[0]["topk_ids"].tolist() == [[1, 4, 4, 4], [0, 2, 4, 4], [3, 1, 4, 4], [0, 1, 2, 4]]
    handed_over = calls[0] | dict(topk_ids=inputs["topk_ids"], topk_weight=inputs["topk_weights"], expert_mask=None)
    assert relative_l2(aiter_stand_in.compute(handed_over), want) > 0.1


def test_an_unmarked_weight_would_be_read_in_another_layout(served):
    """What a lost ``is_shuffled`` gives; the calls above all have it."""
    calls = served()
    inputs = small()
    want = OPS.fused_moe(**inputs)
    for name in ("w1", "w2"):
        calls[0][name] = calls[0][name].view(calls[0][name].shape)
        assert not hasattr(calls[0][name], "is_shuffled")
    scales = {name: calls[0][name].view(4, -1, calls[0][name].shape[1])[..., : c // 32]
              for name, c in (("w1_scale", 256), ("w2_scale", 128))}  # fmt: skip
    assert relative_l2(aiter_stand_in.compute(calls[0] | scales), want) > 1


@pytest.mark.parametrize("options", (OAI, CLAMPED), ids=("oai", "clamped"))
def test_the_limit_is_never_left_to_a_default(served, options):
    """Under aiter's Swiglu None and 0 mean 7, under its Silu no limit."""
    calls = served()
    inputs = small()
    want = OPS.fused_moe(**inputs, **options)
    assert calls[0]["swiglu_limit"] == options["swiglu_limit"]
    assert relative_l2(aiter_stand_in.compute(calls[0] | dict(swiglu_limit=None)), want) > 0.01


def test_a_nan_stays_in_its_row(served):
    served()
    inputs = small()
    inputs["topk_weights"][2, 1] = torch.nan
    out = OPS.fused_moe(**inputs)
    assert out[2].isnan().all() and out[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("I", (128, 192))
def test_padded_weights_change_nothing(served, I):
    """I = 192, as tensor parallelism cuts it, is rounded up once, at load; nothing is padded in a call."""
    calls = served()
    inputs = moe_inputs(5, 256, I)
    padded = shuffled(inputs, pad_to=256)
    assert_agrees(OPS.fused_moe(**padded), reference.fused_moe(**inputs))
    assert calls[0]["w2"].data_ptr() == padded["w2"].data_ptr() and calls[0]["w2"].shape == (4, 256, 256)
    assert calls[0]["intermediate_pad"] == 0  # the padding is zeros that it may read


# --- routing


@pytest.mark.parametrize("ranks", (1, 2, 4))
@pytest.mark.parametrize("options", (SILU, OAI), ids=("silu", "oai"))
def test_expert_parallel_ranks_sum_to_the_whole(served, ranks, options):
    """Local experts in an order that is not that of the ids; aiter numbers them by the running sum of its mask."""
    calls = served()
    G, K = 8, 3
    inputs = moe_inputs(7, 256, 128, E=G, K=K, dtype=torch.float16)
    whole = reference.fused_moe(**inputs, **options, out_dtype=torch.float32)
    order = torch.randperm(G, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(7, 256)
    for rank in range(ranks):
        held = order[rank * G // ranks : (rank + 1) * G // ranks]
        expert_map = torch.full((G,), -1, dtype=torch.int32)
        expert_map[held] = torch.arange(len(held), dtype=torch.int32)
        part = inputs | {name: inputs[name][held] for name in ("w1", "w1_scale", "w2", "w2_scale")}
        part = shuffled(part) | dict(expert_map=expert_map)
        total += OPS.fused_moe(**part, **options, out_dtype=torch.bfloat16).float()
        check_arguments(calls[-1], part, **options)
    assert relative_l2(total, whole) < 5e-3
    if ranks > 1:
        by_mask = calls[-1] | dict(  # what two conversions of one map would have given
            topk_ids=inputs["topk_ids"], topk_weight=inputs["topk_weights"], expert_mask=(expert_map >= 0).int()
        )
        want = reference.fused_moe(**part, **options, out_dtype=torch.bfloat16)
        assert relative_l2(aiter_stand_in.compute(by_mask), want) > 0.1


def test_a_map_and_a_token_count_that_change_in_place(served):
    calls = served()
    inputs = small(T=9, G=8)
    inputs |= dict(expert_map=torch.full((8,), -1, dtype=torch.int32), num_tokens=torch.tensor([9], dtype=torch.int32))
    for shift, count in ((0, 9), (3, 4), (4, 0)):
        inputs["expert_map"].fill_(-1)[shift : shift + 4] = torch.arange(4, dtype=torch.int32)
        inputs["num_tokens"].fill_(count)
        out = OPS.fused_moe(**inputs)
        assert_agrees(out, reference.fused_moe(**inputs))
        assert (out[count:] == 0).all() and (calls[-1]["topk_ids"][count:] == 4).all()


def test_a_token_without_a_local_expert_is_zero(served):
    served()
    inputs = small(T=3)
    inputs["topk_ids"] = torch.tensor([[-1, 9], [0, 1], [4, 4]], dtype=torch.int32)
    out = OPS.fused_moe(**inputs)
    assert (out[[0, 2]] == 0).all() and (out[1] != 0).any()


# Weights whose sums are exact in any order.
WEIGHTS = st.sampled_from((0.0, -0.0, 0.5, -0.5, 1.0, 0.25, -1.0, float("nan"), float("inf"), 2.0**-140))


@st.composite
def routings(draw):
    T, K, E = draw(st.integers(0, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    wide = draw(st.booleans())
    hostile = (-1, E, -(2**31), 2**31 - 1, *((2**32 + 1, 2**63 - 1, -(2**63)) if wide else ()))
    ids = st.one_of(st.integers(0, E + 3), st.sampled_from(hostile))
    rows = draw(st.lists(st.lists(ids, min_size=K, max_size=K), min_size=T, max_size=T))
    weights = draw(st.lists(st.lists(WEIGHTS, min_size=K, max_size=K), min_size=T, max_size=T))
    entries = st.one_of(st.integers(-1, E), st.sampled_from((-(2**31), 2**31 - 1)))
    expert_map = draw(st.none() | st.lists(entries, min_size=0, max_size=E + 3))
    count = draw(st.none() | st.integers(-1, T + 1))
    return (
        torch.tensor(rows, dtype=torch.int64 if wide else torch.int32).view(T, K),
        torch.tensor(weights, dtype=torch.float32).view(T, K),
        None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32),
        None if count is None else torch.tensor([count], dtype=torch.int32),
        E,
    )


@given(routings())
def test_the_routes_definition(case):
    """One route at a time, in Python."""
    topk_ids, topk_weights, expert_map, num_tokens, E = case
    ids, weights, mask = routes(*case)
    T, K = topk_ids.shape
    assert mask.tolist() == [1] * E + [0]
    assert ids.dtype is torch.int32 and weights.dtype is torch.float32 and ids.shape == weights.shape == (T, K + 1)
    for t in range(T):
        sums, first = {}, {}
        for k in range(K):
            expert = topk_ids[t, k].item()
            if expert_map is not None:
                expert = expert_map[expert].item() if 0 <= expert < len(expert_map) else -1
            if 0 <= expert < E and (num_tokens is None or t < num_tokens.item()):
                sums[expert] = sums.get(expert, 0.0) + topk_weights[t, k].item()
                first.setdefault(expert, k)
        want_ids, want_weights = [E] * (K + 1), [0.0] * (K + 1)
        for expert, k in first.items():
            if sums[expert] != 0:
                want_ids[k], want_weights[k] = expert, sums[expert]
        assert ids[t].tolist() == want_ids
        torch.testing.assert_close(weights[t], torch.tensor(want_weights), rtol=0, atol=0, equal_nan=True)


INTERPRETED = """
import torch
from hypothesis import given, settings
import test_aiter
from torch_mxfp8moe.arguments import Kind
from torch_mxfp8moe.backends import aiter
from torch_mxfp8moe.backends.aiter.routes import routes

settings.load_profile("repeatable")
seen = []

class Call:
    op, device = "fused_moe", torch.device("cpu")

@given(test_aiter.routings())
def compare(case):
    call = Call()
    call.kind = Kind()
    call.topk_ids, call.topk_weights, call.expert_map, call.num_tokens, call.experts = case
    (call.tokens, call.topk) = call.topk_ids.shape
    call.global_experts = call.experts if call.expert_map is None else len(call.expert_map)
    if call.tokens:
        seen.append(call.topk)
        for got, want in zip(aiter.Routes(call).of(call), routes(*case), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)

compare()
print(len(seen) > 50, len(set(seen)) > 4)
"""


def interpreted(code: str, *args: str) -> list[str]:
    """The words that ``code`` prints, with Triton's interpreter."""
    reason = device.why_not("interpreter")
    if reason:
        pytest.skip(reason)
    return run_python(code, *args, TRITON_INTERPRET="1").split()


def test_the_kernel_is_its_definition():
    """In Triton's interpreter."""
    code = "from conftest import settings\n" + INTERPRETED
    assert interpreted(code) == ["True", "True"]


WHOLE = """
import sys
import torch
import aiter_stand_in, torch_mxfp8moe
import test_aiter
from helpers import OPS, assert_agrees
from torch_mxfp8moe import reference
from torch_mxfp8moe.backends import aiter, registered
from pathlib import Path

aiter_stand_in.install(Path(sys.argv[1]))
sys.path.insert(0, sys.argv[1])
here = registered()["aiter"]
aiter.probe._check_machine = lambda: None
aiter._architecture = lambda device: "gfx950"
for name, kind in test_aiter.KINDS.items():
    inputs = test_aiter.small(**kind)
    for name, columns in (("topk_ids", 11), ("topk_weights", 13)):
        T, K = inputs[name].shape
        wide = torch.zeros(T, columns, dtype=inputs[name].dtype)
        wide[:, 3 : 3 + K] = inputs[name]
        inputs[name] = wide[:, 3 : 3 + K]
    want = reference.fused_moe(**inputs, out_dtype=torch.bfloat16)
    assert_agrees(OPS.fused_moe(**inputs, out_dtype=torch.bfloat16, backend="aiter"), want)
inputs = test_aiter.small(T=9, G=8) | dict(num_tokens=torch.tensor(7, dtype=torch.int32))
inputs["expert_map"] = torch.tensor([-1, 2, -1, 0, 3, -1, 1, -1], dtype=torch.int32)
assert_agrees(OPS.fused_moe(**inputs, backend="aiter"), reference.fused_moe(**inputs))
print(len(aiter_stand_in.calls))
"""


def test_the_whole_call_with_the_kernel(tmp_path):
    """From the op through the interpreted kernel to the stand-in."""
    calls = len(KINDS)  # none for no token, and one more at the end
    assert interpreted(WHOLE, str(tmp_path)) == [str(calls)]


@needs_triton
@pytest.mark.parametrize("id_dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("T, K, E", [(1, 4, 128), (64, 5, 129), (4096, 8, 288), (3, 1, 1), (17, 126, 896)])
def test_the_kernel_compiles_for_gfx950(T, K, E, id_dtype):
    import machine_code
    from torch_mxfp8moe.backends.aiter.kernel import plan
    from torch_mxfp8moe.backends.triton.launch import compile_offline
    from torch_mxfp8moe.backends.triton.targets import Target

    def empty(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device="meta")

    call = dataclasses.replace(on_meta(T, 256, 128, E, K), topk_ids=empty(T, K, dtype=id_dtype))
    made = dict(ids=empty(T, K + 1), weights=empty(T, K + 1, dtype=torch.float32), mask=empty(E + 1))
    for maps in ({}, dict(expert_map=empty(2 * E), num_tokens=empty(1))):
        call = dataclasses.replace(call, **maps)
        (kernel,) = compile_offline(plan(call).bind(call.inputs | made, call.device), Target("gfx950"))
        machine_code.check(machine_code.read(kernel, "gfx950"))


@needs_triton
@pytest.mark.parametrize("maps", (False, True))
@pytest.mark.parametrize("id_dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("T, K, E", [(5, 2, 4), (9, 8, 16), (3, 5, 129), (2, 33, 40), (1, 1, 1)])
def test_the_kernel_on_gfx950(T, K, E, id_dtype, maps):
    """Its machine code, simulated: the routes are those of the definition, bit for bit."""
    pytest.importorskip("numpy", "2.0")
    import gfx950_ops
    from torch_mxfp8moe.backends.aiter.kernel import plan

    generator = torch.Generator().manual_seed(T * K * E)
    topk_ids = torch.randint(-2, E + 5, (T, K), generator=generator, dtype=id_dtype)
    if id_dtype is torch.int64:
        topk_ids[0, 0] = 2**32
    choices = torch.tensor([0.0, -0.0, 0.5, -0.5, 1.0, torch.inf, torch.nan, 2.0**-149, 0.25])
    inputs = dict(topk_ids=topk_ids, topk_weights=choices[torch.randint(9, (T, K), generator=generator)])
    if maps:
        expert_map = torch.randint(-1, E + 2, (E + 3,), generator=generator, dtype=torch.int32)
        inputs |= dict(expert_map=expert_map, num_tokens=torch.tensor([T - 1], dtype=torch.int32))
    names = ("hidden_states", "w1", "w1_scale", "w2", "w2_scale")
    sizes = on_meta(T, 256, 128, E, K)
    weights = {name: torch.empty(getattr(sizes, name).shape, dtype=getattr(sizes, name).dtype) for name in names}
    call = FusedMoe(**weights, **inputs, layout="aiter_gfx950").check()
    want = routes(topk_ids, inputs["topk_weights"], call.expert_map, call.num_tokens, E)
    made = {name: torch.empty_like(x) for name, x in zip(("ids", "weights", "mask"), want, strict=True)}
    gfx950_ops.run(plan(call), inputs, made)
    for name, expected in zip(made, want):
        torch.testing.assert_close(made[name], expected, rtol=0, atol=0, equal_nan=True, msg=name)


# --- its tables


COLUMNS = (
    "gfx,cu_num,token,model_dim,inter_dim,expert,topk,act_type,dtype,q_dtype_a,q_dtype_w,q_type,use_g1u1,"
    "doweight_stage1,kernelName1,kernelName2,_tag"
)
TYPES = "ActivationType.Silu,torch.bfloat16,torch.float8_e4m3fn,torch.float8_e4m3fn,QuantType.per_1x32,1,0"


def test_tuned_shapes(machine, tmp_path):
    """Which row serves a call, and that ``explain`` says when there is none."""
    folder = tmp_path / "aiter" / "configs" / "model_configs"
    folder.mkdir(parents=True)
    rows = [
        f"gfx950,256,8,256,128,4,2,{TYPES},one,two,",
        f"gfx950,256,8,256,128,4,2,{TYPES},later,later,",
        f"gfx950,256,16,256,128,4,2,{TYPES.replace('1x32', '1x128')},other,other,",
        f"gfx942,256,16,256,128,4,2,{TYPES},other,other,",
        f"gfx950,256,16,256,128,4,2,{TYPES.replace('bfloat16', 'float16')},other,other,",
        f"gfx950,256,16,256,128,4,2,{TYPES},other,other,flydsl_fallback",
        f"gfx950,256,32768,256,128,4,2,{TYPES},large,large,",
    ]
    (folder / "some_mxfp8_tuned_fmoe.csv").write_text("\n".join([COLUMNS, *rows]) + "\n")
    (folder / "some_mxfp8_untuned_fmoe.csv").write_text(COLUMNS + f"\ngfx950,256,1,256,128,4,2,{TYPES},no,no,\n")
    machine()
    tuned.table.cache_clear()
    found = tuned.table(tuple(tuned.files()))
    sizes = dict(hidden=256, intermediate=128, experts=4, topk=2)
    for tokens, want in [(5, "one"), (8, "one"), (4, None), (9, None), (1, None), (40000, "large"), (200000, "large")]:
        row = tuned.lookup(found, 256, tokens, **sizes)
        assert (row and row.stage1) == want, tokens
    assert tuned.lookup(found, 304, 8, **sizes) is None
    assert torch_mxfp8moe.explain(**on_gpu_call(T=5)).note is None
    assert "no tuned kernel for T=9 H=256 I=128 E=4 K=2 " in torch_mxfp8moe.explain(**on_gpu_call(T=9)).note


@pytest.mark.parametrize(
    "tokens, bucket",
    [(1, 1), (2, 2), (3, 4), (17, 32), (16385, 32768), (32768, 32768), (131071, 32768), (10**6, 131072)],
)
def test_token_counts_of_the_tables(tokens, bucket):
    assert tuned.bucket(tokens) == bucket


def test_a_table_that_cannot_be_read_is_a_note(machine, monkeypatch):
    machine()
    monkeypatch.setenv("AITER_CONFIG_FMOE", "/nowhere.csv")
    explained = torch_mxfp8moe.explain(**on_gpu_call())
    assert explained.backend == "aiter" and "raised FileNotFoundError" in explained.note


# --- the program that holds a real aiter against all this


PROGRAM = Path(__file__).resolve().parent.parent / "tools" / "check_aiter.py"
needs_program = pytest.mark.skipif(not PROGRAM.exists(), reason="needs the source tree")

SHUFFLES = """
    import torch
    from test_layouts import scale_address, weight_address

    def shuffle_weight(x, layout=(16, 16), use_int4=False, is_guinterleave=False, gate_up=False):
        out, (E, R, C) = torch.empty_like(x).view(torch.uint8).flatten(), x.shape
        at = [weight_address(e, r, c, R, C, gate_up) for e in range(E) for r in range(R) for c in range(C)]
        out[at] = x.view(torch.uint8).flatten()
        return out.view(x.dtype).view(x.shape)

    def shuffle_scale(src, experts_cnt=None, is_guinterleave=False, gate_up=False):
        R, C = src.shape
        padded = -(-C // 8) * 8
        E = experts_cnt or 1
        out = torch.randint(256, (R * padded,), dtype=torch.uint8)
        if gate_up:
            out.fill_(0x7F)
        rows = [(e, r) for e in range(E) for r in range(R // E)]
        at = [scale_address(e, r, y, R // E, padded, gate_up) for e, r in rows for y in range(C)]
        out[at] = src.flatten()
        return out.view(R, padded)
"""
"""aiter's functions, written as arithmetic; what it leaves uninitialised is random."""


@pytest.fixture
def program(machine, monkeypatch):
    """The program as a module, for two small shapes instead of those of shapes.csv."""
    spec = importlib.util.spec_from_file_location("check_aiter", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    row = SimpleNamespace(name="small", hidden=256, intermediate=192, local=4, topk=2)
    other = SimpleNamespace(name="refused", hidden=320, intermediate=128, local=4, topk=2)
    monkeypatch.setattr(shapes, "rows", lambda: {"small": row, "refused": other})
    return module


@needs_program
def test_the_program_skips_loudly(program, machine, monkeypatch, capsys):
    find = importlib.util.find_spec
    machine(installed=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "aiter" else find(name))
    assert program.check(256) == program.SKIPPED != 0
    assert capsys.readouterr().err.startswith("SKIPPED, nothing was checked: aiter is not installed; ")


@needs_program
@pytest.mark.parametrize("version", aiter_stand_in.SUPPORTED)
def test_the_program_takes_an_aiter_that_fits(program, machine, version, capsys):
    """On a machine without a GPU."""
    machine(arch=None, hip=None, version=version, files={"aiter/ops/shuffle.py": SHUFFLES})
    assert program.check(256) == 0
    said = capsys.readouterr().out
    assert ", none unknown here" in said and "layouts of 1 shapes compared" in said
    assert "refused: layout 'aiter_gfx950' takes hidden sizes divisible by 256, not 320" in said


@needs_program
@pytest.mark.parametrize(
    "name, old, new, complaint",
    [
        ("aiter/__init__.py", "Swiglu = 2", "Swiglu = 4", "ActivationType.Swiglu is 4, not 2"),
        ("aiter/__init__.py", "per_1x32 = 3", "per_1x32 = 7", "QuantType.per_1x32 is 7, not 3"),
        ("aiter/ops/flydsl/moe_common.py", '"interleave"', '"gugu"', "GateMode.INTERLEAVE is 'gugu'"),
        ("aiter/fused_moe.py", "fused_moe(", "fused_moe(layout_of_w3, ", "without a default, layout_of_w3"),
        ("aiter/ops/shuffle.py", "R, C, gate_up)", "R, C, False)", "small w1: "),
        ("aiter/ops/shuffle.py", "R // E, padded, gate_up)", "R // E, padded, False)", "small w1_scale: "),
        ("aiter/ops/shuffle.py", "out[at] = src", "out[at[::-1]] = src", "small w2_scale: "),
    ],
)
def test_the_program_finds_what_does_not_fit(program, machine, name, old, new, complaint, capsys):
    files = {"aiter/ops/shuffle.py": SHUFFLES}
    text = (aiter_stand_in._FILES | files)[name]
    assert old in text
    machine(files=files | {name: text.replace(old, new)})
    assert program.check(256) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG: ")]
    assert any(complaint in line for line in wrong), wrong


@needs_program
@needs_triton
def test_the_program_measures_the_host():
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--overhead"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr
    whole, low, high, own = map(float, re.search(
        r"([\d.]+) \(([\d.]+) to ([\d.]+)\) beyond the stand-in's ([\d.]+)", done.stdout
    ).groups())  # fmt: skip
    assert 0 < low <= whole <= high and own > 0
    parts = re.findall(r"^ +(-?[\d.]+)  .", done.stdout, re.MULTILINE)
    assert len(parts) == 7 and all(float(part) < whole for part in parts), done.stdout


@pytest.mark.skipif(not (PACKAGE.parent / "setup.py").exists(), reason="needs the source tree")
def test_no_extra_installs_the_wrong_aiter():
    """Neither name of the package index is AMD's aiter with MXFP8: none may come to be declared. flydsl is, pinned."""
    declared = {}
    with pytest.MonkeyPatch.context() as patch:
        import setuptools

        patch.setattr(setuptools, "setup", declared.update)
        patch.setattr(sys, "argv", ["setup.py"])
        runpy.run_path(str(PACKAGE.parent / "setup.py"))
    extras = declared["extras_require"]
    names = [*declared["install_requires"], *(name for extra in extras.values() for name in extra)]
    assert len(names) > 5 and not [name for name in (*names, *extras) if "aiter" in name]
    assert [name for name in names if "flydsl" in name] == extras["rocm"]
    assert re.fullmatch(r"flydsl==[\d.]+; sys_platform == 'linux'", *extras["rocm"])
