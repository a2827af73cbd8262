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

ROWS = rows()
TILES = [(dtype, rule) for dtype in ("mxfp8", "bf16") for rule in range(len(configs.load("gfx950", dtype).tiles))]

every_kernel = pytest.mark.parametrize("dtype, rule", TILES)
every_model = pytest.mark.parametrize("name", ROWS)


def compiled(name: str, dtype: str, rule: int) -> list:
    """All kernels of a call of 64 tokens with bf16 outputs; Triton's cache has them the second time."""
    call = ROWS[name].call(64, "meta", activation_dtype=dtype).with_out()
    return compile_offline(ops.bound_launches(call, configs.load("gfx950", dtype).tiles[rule]), ops.TARGET)


@every_kernel
@every_model
def test_wait_states(name, dtype, rule):
    """Every instruction is one that the simulator knows, on registers that the kernel has, and the wait states are
    there; a warning tells of those that LLVM is known to leave out."""
    for kernel in compiled(name, dtype, rule):
        check_wait_states(Program(parse(kernel.asm["amdgcn"])))


@pytest.mark.skipif(code_object.missing() is not None, reason=str(code_object.missing()))
@every_kernel
@every_model
def test_code_object_is_the_text(name, dtype, rule):
    """What other tests find in the text, of wait states, registers, spills and instructions, they find in what a GPU
    would be given."""
    for kernel in compiled(name, dtype, rule):
        code, text = code_object.read(kernel.asm["hsaco"]), parse(kernel.asm["amdgcn"])
        assert code_object.differences(code, text) == []
