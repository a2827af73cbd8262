"""Sample inputs and checks that the tests share."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

import device  # before torch_mxfp8moe
import torch_mxfp8moe
from device import DEVICE
from torch_mxfp8moe import extension

HERE = Path(__file__).resolve().parent
PACKAGE = Path(torch_mxfp8moe.__file__).resolve().parent
OPS = torch.ops.mxfp8moe

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
E4M3 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu
MODES = ("rceil", "floor", "ceil", "even")

ERRORS = (ValueError, TypeError, NotImplementedError, RuntimeError)
"""What a wrong call may raise, by the contract; an AttributeError, for instance, is a defect."""

BACKEND = "triton" if device.NAME != "cpu" else "cpu" if extension.MODULE is not None else "reference"
"""What serves every call on ``DEVICE`` that names no other."""

only_cpu = pytest.mark.skipif(device.NAME != "cpu", reason="says nothing about another device")

needs_extension = pytest.mark.skipif(
    BACKEND != "cpu", reason=f"needs the C++ kernels: {extension.WHY_MISSING or f'calls go to {BACKEND}'}"
)

kernels = pytest.mark.kernels
"""On tests that reach the CPU kernels: run again for each instruction set (``test_extension.py``)."""

small = pytest.mark.small
"""On tests that are quick in Triton's interpreter too: together every argument (``test_triton_interpreter.py``)."""

TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float32: 2e-3}
"""Relative L2 of a bundled backend against the reference, by output dtype."""


def generator(seed: int) -> torch.Generator:
    """On the CPU, whatever the device: a seed gives the same values everywhere."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=generator(seed), device="cpu") * scale).to(DEVICE, dtype)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(seed), device="cpu").to(DEVICE)


def weights(E: int, R: int, C: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert weights [E, R, C] e4m3fn and scales [E, R, C/32] uint8, as a checkpoint would hold them."""
    return torch_mxfp8moe.reference.quantize_1x32(randn(E, R, C, seed=seed, scale=C**-0.5))


def random_bytes(*shape: int, seed: int = 0, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator(seed), device="cpu").to(DEVICE)


def moe_inputs(
    T: int = 4,
    H: int = 64,
    I: int = 32,  # noqa: E741
    E: int = 4,
    K: int = 2,
    *,
    G: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    id_dtype: torch.dtype = torch.int32,
    weight_dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype | None = None,
    scaled: bool = False,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The tensors of a ``fused_moe`` call, by argument name.

    ids are drawn from G (default E) global experts, each token's K distinct where there are enough; ``bias_dtype``
    adds both biases; ``scaled`` gives hidden states that are MXFP8 already.
    """
    seed *= 100
    ids = rand(T, max(G or E, K), seed=seed).argsort(1)[:, :K] % (G or E)
    routing = rand(T, K, seed=seed + 1) + 0.1
    w1, w1_scale = weights(E, 2 * I, H, seed + 2)
    w2, w2_scale = weights(E, H, I, seed + 3)
    inputs = dict(
        hidden_states=randn(T, H, seed=seed + 4, dtype=dtype),
        w1=w1,
        w1_scale=w1_scale,
        w2=w2,
        w2_scale=w2_scale,
        topk_weights=(routing / routing.sum(1, keepdim=True)).to(weight_dtype),
        topk_ids=ids.to(id_dtype),
    )
    if scaled:
        x, scale = torch_mxfp8moe.reference.quantize_1x32(inputs["hidden_states"])
        inputs |= dict(hidden_states=x, hidden_states_scale=scale)
    if bias_dtype is not None:
        inputs |= dict(
            w1_bias=randn(E, 2 * I, seed=seed + 5, dtype=bias_dtype, scale=0.5),
            w2_bias=randn(E, H, seed=seed + 6, dtype=bias_dtype, scale=0.5),
        )
    return inputs


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor of any dtype and strides, flat."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bytes(*tensors: torch.Tensor) -> bool:
    first, *rest = tensors
    return all(
        first.dtype == x.dtype and first.shape == x.shape and torch.equal(as_bytes(first), as_bytes(x)) for x in rest
    )


def assert_equal(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same values, dtype and shape; a NaN equals any NaN."""
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||, 0 where both are zero or empty."""
    error, size = (got.double() - want.double()).norm(), want.double().norm()
    return 0.0 if error == 0 else float(error / size)


def assert_agrees(got: torch.Tensor, want: torch.Tensor, tolerance: float | None = None) -> None:
    """The same shape and dtype, NaN and Inf in the same places, values within ``tolerance`` (the contract's)."""
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    assert torch.equal(got.isfinite(), want.isfinite())
    error = relative_l2(got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0))
    assert error <= (tolerance or TOLERANCE[want.dtype]), f"relative L2 {error:.2e}"


def error_of(call: Callable[[], object]) -> str:
    """The message of the error that ``call`` raises, which has to be of a type that the contract allows."""
    try:
        result = call()
    except ERRORS as error:
        return str(error)
    pytest.fail(f"no error, but a result of type {type(result).__name__}")


def check_op(op, args: tuple, kwargs: dict | None = None) -> None:
    """``torch.library.opcheck``, also for ops with fp8 inputs.

    Its ``test_schema`` cannot compare those ("mul_cpu_reduced_float not implemented for 'Float8_e4m3fn'"); for them
    what it would look at is compared by bytes here: inputs that the schema does not call mutable keep their bytes and
    strides, and no output shares memory with an input.
    """
    kwargs = kwargs or {}
    utilities = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    tensors = {a.name: x for a, x in zip(op._schema.arguments, args) if isinstance(x, torch.Tensor)}
    tensors |= {name: x for name, x in kwargs.items() if isinstance(x, torch.Tensor)}
    if not any(x.is_floating_point() and x.itemsize == 1 for x in tensors.values()):
        utilities = ("test_schema", *utilities)
    results = opcheck(op, args, kwargs, test_utils=utilities)
    assert set(results.values()) == {"SUCCESS"}, results

    mutable = {a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    before = {name: (x.stride(), as_bytes(x).clone()) for name, x in tensors.items()}
    result = op(*args, **kwargs)
    for name, (stride, data) in before.items():
        assert tensors[name].stride() == stride, name
        assert name in mutable or torch.equal(as_bytes(tensors[name]), data), f"{name} was written to"
    outputs = [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)
    assert len(outputs) == len(op._schema.returns)
    storages = [x.untyped_storage().data_ptr() for x in (*tensors.values(), *outputs) if x.numel()]
    inputs = [x.untyped_storage().data_ptr() for x in tensors.values() if x.numel()]
    assert len(set(storages)) == len(set(inputs)) + sum(x.numel() > 0 for x in outputs), "an output shares memory"


@cache
def aot_inductor_why_not() -> str | None:
    """Why AOTInductor itself does not work here on ``DEVICE``, or None: a package of x + 1 is loaded and run, in a
    process that may crash. (One machine's ``CXX`` links a second C++ library into every package: all crash.)"""
    code = """
import sys
import torch

class Plus(torch.nn.Module):
    def forward(self, x):
        return x + 1

x = torch.ones(3, device=sys.argv[1])
with torch.no_grad():
    program = torch.export.export(Plus(), (x,))
    package = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program))
assert package(x).tolist() == [2, 2, 2]
"""
    done = subprocess.run([sys.executable, "-c", code, str(DEVICE)], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return f"AOTInductor does not run a package of x + 1 here: exit status {done.returncode} {last}"


def run_python(code: str, *args: str, timeout: float = 300, **env: str) -> str:
    """``code`` in a fresh interpreter that finds this package and these tests; what it printed.

    Fails, with what it wrote, if it does not exit with 0 (a crash included).
    """
    path = os.pathsep.join([str(PACKAGE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env=os.environ | {"PYTHONPATH": path} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


class Capture:
    """A compiler backend that keeps the graphs it is given and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return graph.forward

    def nodes(self) -> str:
        """The calls of the only graph, in order."""
        (graph,) = self.graphs
        calls = [node for node in graph.graph.nodes if node.op.startswith("call")]
        return "\n".join(f"{node.op} {re.sub(' of type object at .*', '>', str(node.target))}" for node in calls)
