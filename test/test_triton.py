"""The Triton backend without a GPU: whom it serves, why not, and what happens when a kernel does not compile."""

import importlib.util
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # which looks for Triton: before tests replace it
from expecttest import assert_expected_inline
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_mxfp8moe
from helpers import E4M3, moe_inputs, only_cpu, run_python
from shapes import rows
from torch_mxfp8moe import configs, dispatch
from torch_mxfp8moe.arguments import Dequantize, FusedMoe, Preshuffle, Quantize, QuantizePreshuffle
from torch_mxfp8moe.backends import registered
from torch_mxfp8moe.backends import triton as backend
from torch_mxfp8moe.backends.triton.targets import Target, target_of

pytestmark = only_cpu

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or backend._interpreted(),
    reason="needs Triton, and that it compiles (no TRITON_INTERPRET): pip install triton",
)


@pytest.fixture
def machine(monkeypatch):
    """``machine(arch, triton)``: a new backend as it would be on a machine with that GPU and version of Triton."""

    def build(arch: str | None = "sm_90", triton: str | None = "3.6.0") -> backend.Triton:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: arch is not None)
        if arch is not None and arch.startswith("gfx"):
            properties = SimpleNamespace(gcnArchName=f"{arch}:sramecc+:xnack-")
            monkeypatch.setattr(torch.version, "hip", "7.0")
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        elif arch is not None:
            capability = divmod(int(arch.removeprefix("sm_")), 10)
            monkeypatch.setattr(torch.version, "hip", None)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(backend, "_target_of", target_of)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if triton is None else object())
        if triton is not None:
            monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton))
        here = {"triton": backend.Triton(), "reference": registered()["reference"]}
        monkeypatch.setattr(dispatch, "registered", lambda: here)
        return here["triton"]

    return build


def on_gpu(inputs: dict, *names: str) -> dict:
    """``inputs``, those of ``names`` (default: all) as tensors of a GPU that need not be there."""
    with FakeTensorMode():
        return inputs | {
            name: torch.empty(inputs[name].shape, dtype=inputs[name].dtype, device="cuda") for name in names or inputs
        }


# --- whether it is usable


def test_usable(machine):
    assert machine().why_unavailable() is None
    assert torch_mxfp8moe.backends()["triton"].usable


def test_without_a_gpu(machine):
    assert machine(arch=None).why_unavailable() == "there is no GPU that PyTorch can use"


def test_without_triton(machine):
    assert_expected_inline(
        machine(triton=None).why_unavailable(),
        """Triton is not installed; it comes with PyTorch's GPU builds, or: pip install triton""",
    )


@pytest.mark.parametrize("version", ("2.3.1", "3.5.1", "3.5.1+git4e2f"))
def test_triton_too_old(machine, version):
    assert machine(triton=version).why_unavailable() == f"Triton is {version}; the kernels take 3.6 or later"
    assert str(torch_mxfp8moe.backends()["triton"]).startswith(f"triton     not usable: Triton is {version}; ")


@pytest.mark.parametrize("version", ("3.6.0", "3.6.0+gitc5d8", "3.9.0", "3.10.0", "4.0.0"))
def test_triton_new_enough(machine, version):
    assert machine(triton=version).why_unavailable() is None


def test_triton_that_does_not_import(machine, monkeypatch):
    machine()
    monkeypatch.setitem(sys.modules, "triton", None)
    status = torch_mxfp8moe.backends()["triton"]
    assert not status.usable and "ModuleNotFoundError: import of triton halted" in status.reason


def test_the_package_imports_no_triton():
    """Nor does a table of the backends or a call on the CPU where there is no GPU."""
    code = """
import sys
import torch
import torch._dynamo  # which looks for Triton: before tests replace it
before = "triton" in sys.modules
import torch_mxfp8moe
print(before or "triton" not in sys.modules)
torch_mxfp8moe.quantize_1x32(torch.randn(2, 64))
torch.cuda.is_available = lambda: False
print(torch_mxfp8moe.backends()["triton"].reason)
print(before or "triton" not in sys.modules)
"""
    assert run_python(code, TRITON_INTERPRET="0") == "True\nthere is no GPU that PyTorch can use\nTrue\n"


# --- whether it serves a call


@pytest.mark.parametrize("arch", ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950"))
def test_served(machine, arch):
    machine(arch)
    assert torch_mxfp8moe.explain(**on_gpu(moe_inputs())).backend == "triton"


@pytest.mark.parametrize(
    "arch, takes",
    [
        ("sm_60", "sm_80 and later"),
        ("sm_75", "sm_80 and later"),
        ("gfx90a", "gfx942 and gfx950"),
        ("gfx1100", "gfx942 and gfx950"),
    ],
)
def test_another_gpu_is_refused_with_the_reason(machine, arch, takes):
    machine(arch)
    explained = torch_mxfp8moe.explain(**on_gpu(moe_inputs()))
    assert explained.backend == "reference"
    assert explained.reasons == {"triton": f"the GPU is {arch}; the kernels take {takes}"}
    named = torch_mxfp8moe.explain(**on_gpu(moe_inputs()), backend="triton")
    assert named.backend is None and named.reasons["triton"] == explained.reasons["triton"]


def test_explain_text_of_a_gpu_that_is_too_old(machine):
    machine("sm_75")
    assert_expected_inline(
        str(torch_mxfp8moe.explain(**on_gpu(moe_inputs()), backend="triton")),
        """\
fused_moe on cuda:0, T=4 H=64 I=32 E=4 K=2, layout row_major, activations mxfp8: no backend serves it
  not triton: the GPU is sm_75; the kernels take sm_80 and later
  not reference: the call names backend 'triton'""",
    )


def test_tensors_of_the_cpu_are_refused(machine):
    machine()
    assert_expected_inline(
        torch_mxfp8moe.explain(**moe_inputs()).reasons["triton"], """the tensors are on cpu, not on a GPU"""
    )
    with pytest.raises(RuntimeError) as error:  # NotImplementedError, but where it comes from C++
        torch_mxfp8moe.fused_moe(**moe_inputs(), backend="triton")
    assert_expected_inline(
        str(error.value),
        """fused_moe: backend 'triton' does not serve this call: the tensors are on cpu, not on a GPU""",
    )


def test_an_expert_beyond_32_bits_is_refused(machine):
    machine()
    inputs = moe_inputs(T=1, E=1, K=1)

    def explained(rows):
        with FakeTensorMode():
            sizes = dict(w1=(1, rows, 32768), w2=(1, 32768, rows // 2))
            weights = {name: torch.empty(size, dtype=E4M3, device="cuda") for name, size in sizes.items()}
            scales = {
                f"{name}_scale": torch.empty(*size[:2], size[2] // 32, dtype=torch.uint8, device="cuda")
                for name, size in sizes.items()
            }
            x = torch.empty(1, 32768, dtype=torch.bfloat16, device="cuda")
        return torch_mxfp8moe.explain(**on_gpu(inputs) | weights | scales | dict(hidden_states=x))

    assert explained(65536 - 64).backend == "triton"
    assert_expected_inline(
        explained(65536).reasons["triton"],
        """a weight has 2147483648 elements an expert; it takes fewer than 2147483648""",
    )


def test_an_expert_that_is_padded_beyond_32_bits_is_refused(machine):
    machine()
    options = dict(layout="row_major", gate_up=True)
    with FakeTensorMode():
        x = torch.empty(1, 64, 32768, dtype=torch.bfloat16, device="cuda")
        weight, scale = x.to(E4M3), torch.empty(1, 64, 1024, dtype=torch.uint8, device="cuda")
        for pad_to, served in ((32768 - 32, True), (32768, False)):
            for call in (
                Preshuffle(weight, scale, **options, pad_to=pad_to),
                QuantizePreshuffle(x, **options, pad_to=pad_to),
            ):
                explained = dispatch.explain_call(call.check())
                assert (explained.backend == "triton") == served
                assert served or "a weight has 2147483648 elements an expert" in explained.reasons["triton"]


@pytest.mark.parametrize("name", [name for name in moe_inputs() if name != "hidden_states"])
def test_a_tensor_on_another_device_is_an_error(machine, name):
    machine()
    inputs = on_gpu(moe_inputs(), *(other for other in moe_inputs() if other != name))
    with pytest.raises(ValueError) as error:
        torch_mxfp8moe.explain(**inputs)
    assert str(error.value) == f"fused_moe: {name} is on cpu; it takes the device of hidden_states, cuda:0"


# --- compiling


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A module with a kernel that compiles and one that does not. (Triton reads kernels from files.)"""
    (tmp_path / "two_kernels.py").write_text("""
import triton
import triton.language as tl

@triton.jit
def good_kernel(x):
    tl.store(x, 1.0)

@triton.jit
def bad_kernel(x, N: tl.constexpr):
    tl.static_assert(N == 16, "no such tile")
    tl.store(x, 1.0)
""")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("two_kernels")
    del sys.modules["two_kernels"]


@needs_triton
@pytest.mark.parametrize("arch", ("sm_90", "gfx950"))
@pytest.mark.parametrize("bad", (0, 1, 2))
def test_nothing_is_launched_if_one_kernel_does_not_compile(kernels, monkeypatch, arch, bad):
    from torch_mxfp8moe.backends.triton.launch import Launch, Operand, Plan, offline

    class Loaded:
        run = None

        def __getitem__(self, grid):
            return lambda *arguments, stream: launched.append(grid)

    launched = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    compiled = Launch.compiled

    def loaded(self):  # loading takes a GPU
        assert compiled(self).asm
        return Loaded()

    monkeypatch.setattr(Launch, "compiled", loaded)
    x = Operand("x", torch.float32)
    launches = [Launch(kernels.good_kernel, (1,), dict(x=x), dict(num_warps=n)) for n in (1, 2, 4)]
    arguments = "some_op", dict(x=torch.empty(1, device="meta")), torch.device("cuda", 0), Target(arch)
    with offline(Target(arch)):
        Plan(launches).run(*arguments)
        assert len(launched) == 3
        launched.clear()
        launches[bad] = Launch(kernels.bad_kernel, (1,), dict(x=x, N=8), dict(num_warps=4))
        plan = Plan(launches)
        for _ in range(2):  # the second call does not take it for compiled
            with pytest.raises(NotImplementedError) as error:
                plan.run(*arguments)
            assert launched == []
            said = str(error.value)
            assert said.startswith(
                f"some_op: backend 'triton' cannot compile bad_kernel for {arch} with {{'num_warps': 4}}: "
            )
            assert "no such tile" in said


@needs_triton
def test_compiling_offline_leaves_the_driver_as_it_was(kernels):
    from triton.runtime import driver

    from torch_mxfp8moe.backends.triton.launch import Launch, compile_offline

    x = torch.empty(1, device="meta")
    good = Launch(kernels.good_kernel, (1,), dict(x=x))
    bad = Launch(kernels.bad_kernel, (1,), dict(x=x, N=8))
    before, mine = driver._active, object()
    try:
        for active in (before, mine):
            driver.set_active(active)
            for arch, text in (("sm_80", r"\.target sm_80\b"), ("gfx942", r"\.amdgcn_target \".*gfx942\"")):
                (kernel,) = compile_offline([good], Target(arch))
                assert re.search(text, kernel.asm["ptx" if arch == "sm_80" else "amdgcn"])
                assert driver._active is active
                with pytest.raises(Exception, match="no such tile"):
                    compile_offline([good, bad], Target(arch))
                assert driver._active is active
    finally:
        driver.set_active(before)


# --- the host's part of a call


@needs_triton
@pytest.mark.parametrize("to_lds", (None, True, False))
@pytest.mark.parametrize("buffers", (True, False))
def test_a_launch_that_triton_makes_itself_is_compiled_in_the_same_way(buffers, to_lds):
    """Tools time single launches so; without buffer loads where they would read zeros (``BUFFER_OFFSETS_WRAP``), and
    with a stage where there is room for it."""
    from triton import knobs

    from torch_mxfp8moe.backends.triton.launch import Launch

    class Kernel:
        def __getitem__(self, grid):
            return lambda: seen.append(settings())

    def settings():
        return knobs.amd.use_buffer_ops, knobs.amd.use_async_copy

    before, seen = settings(), []
    Launch(Kernel(), (1,), {}, buffers=buffers, to_lds=to_lds).run()
    assert seen == [(before[0] and buffers, before[1] if to_lds is None else to_lds)] and settings() == before


@needs_triton
@pytest.mark.parametrize("arch", ("sm_90", "gfx950"))
def test_the_host_reads_no_data(monkeypatch, arch):
    """Everything that the host does in a call, the first and the later ones, on tensors without memory: whatever would
    read a value, and so wait for the GPU, raises there. (HIP does not report such a call while a graph is captured.)"""
    from torch_mxfp8moe.backends.triton.launch import Launch, offline

    launched = []

    class Kernel:
        run = None

        def __init__(self, launch):
            self.launch = launch

        def __getitem__(self, grid):
            return lambda *arguments, stream: launched.append(self.launch.kernel.__name__)

    here = backend.Triton()
    monkeypatch.setattr(Launch, "compiled", lambda self: Kernel(self))
    monkeypatch.setattr(backend.Triton, "target", lambda self, device: Target(arch))
    monkeypatch.setattr(backend.Triton, "why_unavailable", lambda self: None)
    monkeypatch.setattr(backend.Triton, "why_not", lambda self, call: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(dispatch, "registered", lambda: {"triton": here})

    def without_memory(inputs):
        return {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}

    layer = ["route_kernel", "dispatch_kernel", "grouped_gemm_kernel", "grouped_gemm_kernel", "combine_kernel"]
    if arch == "sm_90":
        layer[2:4] = 2 * ["warpgroup_gemm_kernel"]
    at_once, many = layer, ["count_kernel", "sum_kernel", "place_kernel", *layer[1:]]
    if arch == "sm_90":  # with more than 4 rows per expert, or H as small as here, rows are read where tokens are
        at_once = ["route_round_kernel", *layer[2:]]
        many = ["count_round_kernel", "sum_kernel", "place_kernel", *layer[2:]]
    one = ["gate_up_mma_kernel", "down_mma_kernel"] if arch == "sm_90" else at_once
    expected = {1: one, 40: at_once, 900: at_once, 3000: many}
    cases = [
        moe_inputs(T=T, G=33, E=5, K=2, bias_dtype=torch.float32, scaled=scaled)
        | dict(expert_map=torch.zeros(33, dtype=torch.int32), num_tokens=torch.zeros(1, dtype=torch.int32))
        for T in expected
        for scaled in (False, True)
    ]
    with offline(Target(arch)):
        for inputs in map(without_memory, cases):
            with pytest.raises((RuntimeError, NotImplementedError)):
                inputs["num_tokens"].item()
            for options in (dict(), dict(swiglu_limit=7.0, activation_dtype="bf16", out_dtype=torch.float32)):
                for _ in range(2):
                    launched.clear()
                    dispatch.fused_moe(FusedMoe(**inputs, **options).check())
                    assert launched == expected[len(inputs["topk_ids"])]
        launched.clear()
        x = torch.empty(5, 7, 64, device="meta")
        data, scale = dispatch.quantize_1x32(Quantize(x).check())
        dispatch.dequantize_1x32(Dequantize(data, scale, torch.bfloat16).check())
        weight = torch.empty(2, 256, 256, device="meta", dtype=E4M3)
        scale = torch.empty(2, 256, 8, device="meta", dtype=torch.uint8)
        dispatch.preshuffle(Preshuffle(weight, scale, "aiter_gfx950", True, 256).check())
        rows = torch.empty(2, 2, 128, 256, device="meta", dtype=torch.bfloat16)
        for _ in range(2):
            dispatch.quantize_preshuffle(QuantizePreshuffle(rows, "aiter_gfx950", True).check())
        quantized = 2 * ["quantize_preshuffle_kernel"]
        assert launched == ["quantize_kernel", "dequantize_kernel", *2 * ["preshuffle_kernel"], *quantized]


@needs_triton
def test_kernels_take_what_they_can_read():
    """Weights of other layouts and at any address are for the plain kernel."""
    from torch_mxfp8moe.backends.triton.fused_moe import admits

    def taken(H=128, I=64, shifted=(), arch="sm_90", **options):  # noqa: E741
        inputs = moe_inputs(T=1, H=H, I=I) | options
        for name in shifted:
            buffer = torch.empty(inputs[name].numel() + 16, dtype=inputs[name].dtype)
            start = next(start for start in range(16) if buffer[start:].data_ptr() % 16 == 1)
            inputs[name] = buffer[start : start + inputs[name].numel()].view(inputs[name].shape)
        call = FusedMoe(**inputs).check()
        rules = {tiles.kernels: tiles for tiles in configs.load("sm_90").tiles}
        return [kernels for kernels, tiles in rules.items() if admits(call, Target(arch), tiles)]

    assert sorted(taken()) == ["gemm", "hopper", "matvec", "mma"]
    specialized = [tiles for tiles in configs.load("sm_90").tiles if tiles.kernels == "hopper"]
    alone, in_turns = (next(tiles for tiles in specialized if tiles.gemm1.turns == turns) for turns in (1, 2))
    for H, I in ((64, 32), (256, 96), (320, 32), (768, 256)):  # noqa: E741
        call = FusedMoe(**moe_inputs(T=1, H=H, I=I)).check()
        assert admits(call, Target("sm_90"), alone)
        assert admits(call, Target("sm_90"), in_turns) == (H > 256)  # of whose stages both groups have some
    assert taken(H=96) == taken(H=32) == ["mma", "matvec", "gemm"]
    assert taken(arch="sm_100") == ["matvec", "gemm"]
    assert taken(shifted=["w1_scale"]) == ["matvec", "gemm"]
    assert taken(shifted=["w1"]) == taken(shifted=["w2"]) == ["gemm"]
    assert taken(H=256, I=128, layout="aiter_gfx950", **aiter_scales(256, 128)) == ["gemm"]


@needs_triton
@pytest.mark.parametrize(
    "columns, in_turns, by_one",
    (
        (128, None, (128, 6)),
        (192, None, (256, 4)),
        (256, None, (256, 4)),
        (320, (1, 128, 6), (128, 6)),
        (384, (2, 256, 8), (128, 6)),
        (448, (1, 256, 4), (256, 4)),
        (576, (1, 128, 6), (128, 6)),
        (640, (2, 256, 8), (128, 6)),
        (896, (2, 256, 8), (128, 6)),
        (1152, (2, 256, 8), (256, 4)),
        (2880, (1, 256, 4), (256, 4)),
        (2944, (2, 256, 8), (256, 4)),
    ),
)
def test_stages_suit_the_columns(columns, in_turns, by_one):
    """No last stage is half empty where an eighth of the work is to be had, of as few columns as it takes for that, but
    of those taken in turns; there are no turns where rows are not whole lines of 128 bytes. Of both products, with
    tiles that have turns and with others: (turns, columns, stages), (columns, stages)."""
    from torch_mxfp8moe.backends.triton.fused_moe import plan

    inputs = moe_inputs(T=4, H=columns, I=columns, E=2)
    call = FusedMoe(**{name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()})
    call = call.check().with_out()

    def launched(**tile):
        tiles = configs.Tiles(None, 8, *(configs.Gemm(rows, 256, 4, **tile) for rows in (32, 64)))
        launches = plan(call, Target("sm_90"), tiles).bind(call.inputs | {"out": call.out}, call.device)
        of = [launch for launch in launches if launch.kernel.__name__ == "warpgroup_gemm_kernel"]
        return [tuple(one.arguments[name] for name in ("TURNS", "COLUMNS", "STAGES")) for one in of], [
            (one.grid, one.options) for one in of
        ]

    stages, as_one = launched(num_stages=4, programs=2)
    assert stages == [(1, *by_one)] * 2
    if in_turns is not None:
        stages, as_turns = launched(num_stages=8, programs=1, turns=2)
        assert stages == [in_turns] * 2
        assert (as_turns == as_one) == (in_turns[0] == 1)


def aiter_scales(H: int, I: int, E: int = 4) -> dict:  # noqa: E741
    """Scales of the shapes that the layout has."""
    shape = torch_mxfp8moe.LAYOUTS["aiter_gfx950"].scale_shape
    sizes = dict(w1_scale=shape(E, 2 * I, H), w2_scale=shape(E, H, I))
    return {name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()}


@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950"))
@needs_triton
def test_workspace_of_a_large_layer(arch):
    """MiniMax-M3 at TP4: under 16 MiB for 64 tokens and under 1 GiB for 8192, with any output dtype; and bounded."""
    from torch_mxfp8moe.backends.triton.fused_moe import LARGEST_WORKSPACE, plan

    row = rows()["MiniMax-M3 TP4"]
    for dtype in (torch.bfloat16, torch.float32):
        sizes = {}
        for T in (64, 8192, 10**6):
            sizes[T] = plan(row.call(T, "meta", out_dtype=dtype).with_out(), Target(arch)).workspace
        assert sizes[64] < 16 * 2**20 and sizes[8192] < 2**30 and sizes[10**6] < 1.02 * LARGEST_WORKSPACE


# --- rows


@needs_triton
@pytest.mark.parametrize(
    "shape, stride, strides",
    (
        ((64,), (1,), 1),
        ((1, 1, 64), (7, 3, 1), 1),
        ((2, 3, 64), (3 * 80, 80, 1), 1),
        ((5, 3, 64), (0, 0, 1), 1),
        ((2, 3, 64), (0, 80, 1), 2),
        ((2, 2, 3, 64), (6 * 64, 64, 2 * 64, 1), 3),  # gate and up rows in turn
        ((2, 1, 3, 64), (6 * 64, 64, 2 * 64, 1), 1),
        ((2, 3, 2, 3, 64), (96 * 64, 24 * 64, 9 * 64, 2 * 64, 1), 4),
    ),
)
def test_rows_are_copied_only_if_too_many_strides_describe_them(shape, stride, strides):
    from torch_mxfp8moe.backends.triton.quantize import STRIDES, rows

    x = torch.randn(20000).as_strided(shape, stride)
    for most in (1, STRIDES):
        got = rows(x, most)
        assert torch.equal(got.reshape(shape), x)
        assert got.dim() - 1 == (strides if strides <= most else 1)
        assert (got.data_ptr() == x.data_ptr()) == (strides <= most)
