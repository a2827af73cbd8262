"""Who serves a call: ``backends()``, ``explain()``, named backends, a backend added as one module, clean imports."""

import sys

import pytest
import torch
from expecttest import assert_expected_inline

import torch_mxfp8moe
from device import DEVICE
from helpers import (
    BACKEND,
    ERRORS,
    OPS,
    error_of,
    moe_inputs,
    needs_extension,
    only_cpu,
    randn,
    run_python,
    same_bytes,
    small,
)
from torch_mxfp8moe import dispatch, extension, reference

REGISTERED = sys.modules["torch_mxfp8moe.backends"].registered


@pytest.fixture
def only_bundled(monkeypatch):
    """The registry with nothing but ``cpu`` and ``reference``, whatever else this package or this machine has."""
    bundled = {name: REGISTERED()[name] for name in ("cpu", "reference")}
    monkeypatch.setattr(dispatch, "registered", lambda: bundled)


FAKE_BACKEND = """
import torch
from torch_mxfp8moe.backends import Backend

class Fake(Backend):
    name = "fake"
    priority = 75
    description = "sevens"
    unavailable = None
    refusal = None

    def why_unavailable(self):
        if isinstance(self.unavailable, Exception):
            raise self.unavailable
        return self.unavailable

    def why_not(self, call):
        if isinstance(self.refusal, Exception):
            raise self.refusal
        return self.refusal

    def fused_moe(self, call):
        call.out.fill_(7)

BACKEND = Fake()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """One more module in the package's folder of backends, and nothing else: the registry finds it."""
    package = sys.modules["torch_mxfp8moe.backends"]
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "__init__.py").write_text(FAKE_BACKEND)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    REGISTERED.cache_clear()
    yield REGISTERED()["fake"]
    sys.modules.pop("torch_mxfp8moe.backends.fake", None)
    vars(package).pop("fake", None)
    REGISTERED.cache_clear()


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A module in the package's folder of backends whose import raises."""
    package = sys.modules["torch_mxfp8moe.backends"]
    (tmp_path / "broken.py").write_text("raise RuntimeError('no driver')")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    REGISTERED.cache_clear()
    yield
    REGISTERED.cache_clear()


# --- what is usable here


def test_a_backend_that_does_not_load_is_a_no_with_its_reason(broken):
    status = torch_mxfp8moe.backends()["broken"]
    assert not status.usable and status.reason == "importing it raised RuntimeError: no driver"
    explained = torch_mxfp8moe.explain(**moe_inputs())
    assert explained.backend == BACKEND and explained.reasons["broken"] == status.reason


@needs_extension
def test_an_instruction_set_that_the_processor_lacks_is_a_no():
    code = "import torch_mxfp8moe; print(torch_mxfp8moe.backends()['cpu'].reason)"
    reason = run_python(code, MXFP8MOE_CPU_CAPABILITY="sse9")
    assert "MXFP8MOE_CPU_CAPABILITY is 'sse9'; it takes what this processor runs: " in reason


def test_backends_lists_all_in_order_of_preference():
    status = torch_mxfp8moe.backends()
    assert list(status)[-1] == "reference" and "cpu" in status
    for name, entry in status.items():
        assert entry.name == name and entry.description
        assert entry.usable == (entry.reason is None) and (entry.usable or len(entry.reason) > 10)
    assert status["reference"].usable


@needs_extension
def test_backends_text(only_bundled):
    assert_expected_inline(
        "\n".join(map(str, torch_mxfp8moe.backends().values())),
        """\
cpu        usable (C++ kernels for CPU tensors)
reference  usable (plain PyTorch, the definition; any device, slow)""",
    )


def test_backends_text_without_the_extension(only_bundled, monkeypatch):
    monkeypatch.setattr(extension, "WHY_MISSING", "the C++ extension was not built: here would be how to")
    assert_expected_inline(
        "\n".join(map(str, torch_mxfp8moe.backends().values())),
        """\
cpu        not usable: the C++ extension was not built: here would be how to (C++ kernels for CPU tensors)
reference  usable (plain PyTorch, the definition; any device, slow)""",
    )


# --- who serves one call


@needs_extension
def test_explain_text(only_bundled):
    inputs = moe_inputs(T=3, H=256, I=128, K=2)
    explained = torch_mxfp8moe.explain(**inputs)
    assert explained.backend == "cpu" and set(explained.reasons) == {"reference"}
    assert_expected_inline(
        str(explained),
        """\
fused_moe on cpu, T=3 H=256 I=128 E=4 K=2, layout row_major, activations mxfp8: served by cpu
  not reference: it could, but 'cpu' comes first""",
    )


@needs_extension
def test_explain_text_of_a_layout_that_only_the_reference_takes(only_bundled):
    inputs = moe_inputs(T=3, H=256, I=128)
    for name, gate_up in (("w1", True), ("w2", False)):
        inputs[name], inputs[f"{name}_scale"] = OPS.preshuffle(
            inputs[name], inputs[f"{name}_scale"], layout="aiter_gfx950", gate_up=gate_up
        )
    assert_expected_inline(
        str(torch_mxfp8moe.explain(**inputs, layout="aiter_gfx950")),
        """\
fused_moe on cpu, T=3 H=256 I=128 E=4 K=2, layout aiter_gfx950, activations mxfp8: served by reference
  not cpu: it reads weights in layout 'row_major', not 'aiter_gfx950'""",
    )
    explained = torch_mxfp8moe.explain(**inputs, layout="aiter_gfx950", backend="cpu")
    assert explained.backend is None
    assert_expected_inline(
        str(explained),
        """\
fused_moe on cpu, T=3 H=256 I=128 E=4 K=2, layout aiter_gfx950, activations mxfp8: no backend serves it
  not cpu: it reads weights in layout 'row_major', not 'aiter_gfx950'
  not reference: the call names backend 'cpu'""",
    )
    assert_expected_inline(
        error_of(lambda: OPS.fused_moe(**inputs, layout="aiter_gfx950", backend="cpu")),
        """\
fused_moe: backend 'cpu' does not serve this call: it reads weights in layout 'row_major', not 'aiter_gfx950'""",
    )


@only_cpu
def test_explain_text_of_a_named_backend(only_bundled, monkeypatch):
    monkeypatch.setattr(extension, "WHY_MISSING", None)
    assert_expected_inline(
        str(torch_mxfp8moe.explain(**moe_inputs(), backend="reference", activation_dtype="bf16")),
        """\
fused_moe on cpu, T=4 H=64 I=32 E=4 K=2, layout row_major, activations bf16: served by reference
  not cpu: the call names backend 'reference'""",
    )


def test_explain_text_off_the_cpu(only_bundled, monkeypatch):
    """The meta device stands for any that is not a CPU."""
    monkeypatch.setattr(extension, "WHY_MISSING", None)
    inputs = {name: x.to("meta") for name, x in moe_inputs().items()}
    assert_expected_inline(
        str(torch_mxfp8moe.explain(**inputs)),
        """\
fused_moe on meta, T=4 H=64 I=32 E=4 K=2, layout row_major, activations mxfp8: served by reference
  not cpu: the tensors are on meta, not on the CPU""",
    )


@only_cpu
def test_explain_text_without_the_extension(only_bundled, monkeypatch):
    monkeypatch.setattr(extension, "WHY_MISSING", "the C++ extension was not built: here would be how to")
    assert_expected_inline(
        str(torch_mxfp8moe.explain(**moe_inputs())),
        """\
fused_moe on cpu, T=4 H=64 I=32 E=4 K=2, layout row_major, activations mxfp8: served by reference
  not cpu: the C++ extension was not built: here would be how to""",
    )


@small
def test_explain_names_what_the_tests_on_this_device_are_about():
    explained = torch_mxfp8moe.explain(**moe_inputs())
    assert explained.backend == BACKEND and str(explained).startswith(f"fused_moe on {DEVICE}, T=4 ")
    if DEVICE.type != "cpu":
        assert explained.reasons["cpu"] == f"the tensors are on {DEVICE}, not on the CPU"


def test_explain_raises_what_the_call_raises():
    inputs = moe_inputs()
    for wrong in (dict(backend="cuda"), dict(layout="sorted"), dict(swiglu_limit=-1.0)):
        message = error_of(lambda: torch_mxfp8moe.explain(**inputs, **wrong))
        assert message == error_of(lambda: OPS.fused_moe(**inputs, **wrong))


def test_explain_computes_nothing():
    """It answers for fake tensors too, and reads no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = moe_inputs()
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(x) for name, x in inputs.items()}
        explained = torch_mxfp8moe.explain(**fakes)
    assert explained.backend == torch_mxfp8moe.explain(**inputs).backend


def test_a_named_backend_serves_the_call():
    """And shows that it does: the reference's bits for its name."""
    inputs = moe_inputs(T=6, dtype=torch.float32)
    assert same_bytes(OPS.fused_moe(**inputs, backend="reference"), reference.fused_moe(**inputs))


@small
@pytest.mark.skipif(BACKEND == "reference", reason="calls go to the reference")
def test_a_backend_does_not_run_the_reference(monkeypatch):
    inputs = moe_inputs(bias_dtype=torch.float32)

    def called(*args, **kwargs):
        raise AssertionError("the reference was called")

    for name in ("fused_moe", "quantize_1x32", "dequantize_1x32", "preshuffle", "quantize_preshuffle"):
        monkeypatch.setattr(reference, name, called)
    for backend in ("auto", BACKEND):
        OPS.fused_moe(**inputs, backend=backend)
    data, scale = OPS.quantize_1x32(randn(2, 64))
    OPS.dequantize_1x32(data, scale, dtype=torch.float32)
    OPS.preshuffle(inputs["w1"], inputs["w1_scale"], layout="row_major", gate_up=True)
    for pad_to in (1, 64):
        OPS.quantize_preshuffle(randn(2, 64, 64), layout="row_major", gate_up=True, pad_to=pad_to)
    with pytest.raises(ERRORS + (AssertionError,), match="the reference was called"):
        OPS.fused_moe(**inputs, backend="reference")


def test_an_unknown_backend_is_an_error(only_bundled):
    for name in ("cuda", "", "CPU", "auto "):
        message = error_of(lambda: OPS.fused_moe(**moe_inputs(), backend=name))
        assert message == f"fused_moe: backend is {name!r}; it takes 'auto', 'cpu', 'reference'"


# --- one module is a backend


def test_a_new_module_is_found_and_listed(fake):
    names = list(torch_mxfp8moe.backends())
    assert names.index("cpu") < names.index("fake") < names.index("reference")
    assert torch_mxfp8moe.backends()["fake"].usable


def test_a_new_module_serves_calls_that_name_it(fake):
    inputs = moe_inputs(T=3)
    assert OPS.fused_moe(**inputs, backend="fake").eq(7).all()
    out = torch.zeros(3, 64)
    OPS.fused_moe.out(**inputs, backend="fake", out=out)
    assert out.eq(7).all()
    explained = torch_mxfp8moe.explain(**inputs, backend="fake")
    assert explained.backend == "fake" and explained.reasons["reference"] == "the call names backend 'fake'"


def test_a_backend_that_comes_first_is_taken(fake, monkeypatch):
    """What "auto" asks first; the CPU's own kernels, which PyTorch's dispatcher calls, stay first on a CPU."""
    monkeypatch.setattr(extension, "WHY_MISSING", "not here")
    explained = torch_mxfp8moe.explain(**moe_inputs())
    assert explained.backend == "fake"
    assert explained.reasons["reference"] == "it could, but 'fake' comes first"
    assert explained.reasons["cpu"] == "not here"


def test_a_backend_that_refuses_is_not_taken_silently(fake):
    inputs = moe_inputs(T=3)
    type(fake).refusal = "it only serves Tuesdays"
    assert torch_mxfp8moe.explain(**inputs).reasons["fake"] == "it only serves Tuesdays"
    message = error_of(lambda: OPS.fused_moe(**inputs, backend="fake"))
    assert message == "fused_moe: backend 'fake' does not serve this call: it only serves Tuesdays"


@pytest.mark.parametrize("error", (ImportError("no such driver"), AssertionError(), RuntimeError("bad GPU")), ids=repr)
@pytest.mark.parametrize("where", ("unavailable", "refusal"))
def test_an_exception_while_probing_is_a_reason(fake, where, error):
    """Nothing raises, the backend is left out, and the reason says what happened."""
    setattr(type(fake), where, error)
    inputs = moe_inputs(T=3)
    text = f"raised {type(error).__name__}: {error}"
    explained = torch_mxfp8moe.explain(**inputs)
    assert explained.backend == BACKEND and explained.reasons["fake"].endswith(text)
    status = torch_mxfp8moe.backends()["fake"]
    assert status.usable == (where == "refusal") and (status.usable or status.reason.endswith(text))
    assert text in error_of(lambda: OPS.fused_moe(**inputs, backend="fake"))
    assert OPS.fused_moe(**inputs).isfinite().all()


# --- imports


@only_cpu
def test_nothing_imports_another_backends_package():
    """In a fresh interpreter nobody so much as looks for triton, aiter, flydsl or torchao."""
    code = """
import importlib.abc, sys
import torch

looked_for = []

class Recorder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("triton", "aiter", "flydsl", "torchao"):
            looked_for.append(name)

sys.meta_path.insert(0, Recorder())
import torch_mxfp8moe
data, scale = torch_mxfp8moe.quantize_1x32(torch.ones(2, 64, 32))
torch_mxfp8moe.dequantize_1x32(data, scale)
torch_mxfp8moe.preshuffle(data, scale, layout="row_major", gate_up=True)
torch_mxfp8moe.quantize_preshuffle(torch.ones(2, 64, 32), layout="row_major", gate_up=True)
down, down_scale = data[:, :32].contiguous(), scale[:, :32].contiguous()
torch_mxfp8moe.fused_moe(torch.ones(1, 32), data, scale, down, down_scale, torch.ones(1, 1), torch.ones(1, 1).int())
print(looked_for)
torch_mxfp8moe.backends()
print(set(looked_for) - {"triton"})
"""
    assert run_python(code).split() == ["[]", "set()"]


@only_cpu
def test_import_is_light():
    """Importing adds neither the compiler stack nor numpy's test modules to what torch itself loads."""
    code = """
import sys
import torch
loaded = set(sys.modules)
import torch_mxfp8moe
new = {name.split(".")[0] for name in set(sys.modules) - loaded} - set(sys.stdlib_module_names) - {"torch_mxfp8moe"}
print(sorted(new), any(name.startswith("torch._inductor") for name in set(sys.modules) - loaded))
"""
    assert run_python(code).strip() == "[] False"
