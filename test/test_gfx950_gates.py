"""What holds of the gfx950 code of every model of shapes.csv and every tile of the configuration: it is known, keeps to
its registers and the wait states, and its code object is what its text says. No run, no GPU; what else the code has to
be is in test_triton_compile.py."""

import pytest

from helpers import only_cpu
from shapes import rows
from torch_mxfp8moe import configs
from torch_mxfp8moe.backends.triton import _interpreted

pytest.importorskip("triton", reason="needs Triton: pip install triton")
pytest.importorskip("numpy", "2.0")
if _interpreted():
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled", allow_module_level=True)

import gfx950_ops as ops  # noqa: E402
from gfx950_simulator import code_object  # noqa: E402
from gfx950_simulator.assembly import parse  # noqa: E402
from gfx950_simulator.hazards import check_wait_states  # noqa: E402
from gfx950_simulator.machine import Program  # noqa: E402
from torch_mxfp8moe.backends.triton.launch import compile_offline  # noqa: E402

pytestmark = only_cpu

CALLS = [
    (name, dtype, rule)
    for name in rows()
    for dtype in ("mxfp8", "bf16")
    for rule in range(len(configs.load("gfx950", dtype).tiles))
]
_had = set()


@pytest.fixture(scope="module", params=CALLS, ids=lambda call: "-".join(map(str, call)))
def kernels(request) -> list[tuple]:
    """Those of a call of 64 tokens with bf16 outputs that no call before had (routing is the same for many tiles):
    (kernel, its text parsed)."""
    name, dtype, rule = request.param
    call = rows()[name].call(64, "meta", activation_dtype=dtype).with_out()
    found = compile_offline(ops.bound_launches(call, configs.load("gfx950", dtype).tiles[rule]), ops.TARGET)
    assert len(found) == 5
    new = {kernel.hash: kernel for kernel in found if kernel.hash not in _had}
    _had.update(new)
    return [(kernel, parse(kernel.asm["amdgcn"])) for kernel in new.values()]


def test_wait_states(kernels):
    """Every instruction is one that the simulator knows, on registers that the kernel has, and the wait states are
    there; a warning tells of those that LLVM is known to leave out."""
    for _, text in kernels:
        check_wait_states(Program(text))


@pytest.mark.skipif(code_object.missing() is not None, reason=str(code_object.missing()))
def test_code_object_is_the_text(kernels):
    """What other tests find in the text, of wait states, registers, spills and instructions, they find in what a GPU
    would be given."""
    for kernel, text in kernels:
        assert code_object.differences(code_object.read(kernel.asm["hsaco"]), text) == []
