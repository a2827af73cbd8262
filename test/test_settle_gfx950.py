"""tools/settle_gfx950.py as far as it goes without the GPU that it is for."""

import subprocess
import sys

import pytest
import torch

from helpers import PACKAGE, only_cpu
from torch_mxfp8moe.backends.triton import _interpreted

pytest.importorskip("triton", reason="needs Triton: pip install triton")
if _interpreted():
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled", allow_module_level=True)

TOOLS = PACKAGE.parent / "tools"
if not TOOLS.exists():
    pytest.skip("needs the source tree", allow_module_level=True)

pytestmark = only_cpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    out = tmp_path / "out.txt"
    command = [sys.executable, str(TOOLS / "settle_gfx950.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not out.exists()
    assert done.stderr == "nothing to settle here: there is no GPU that PyTorch can use\n"


def test_the_comparison_with_the_simulator(monkeypatch, capsys):
    """The reference in the place of a GPU: other sums, so not quite the same bytes; the same ones in all runs."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import settle_gfx950

    settle_gfx950.simulator("cpu", "reference", tokens=(7,))
    _, *lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4
    for line in lines:
        *_, same, to_simulated, to_reference, alike = line.split()
        assert 1 < float(same.removesuffix("%")) < 100 and 0 < float(to_simulated) < 2e-3
        assert to_reference == "0.0e+00" and alike == "True"
