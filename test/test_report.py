"""``python -m torch_mxfp8moe``: what to paste into a bug report, on sound and on broken installations."""

import subprocess
import sys

import pytest
import torch

import torch_mxfp8moe
from helpers import PACKAGE, only_cpu, run_python
from torch_mxfp8moe import __main__ as main
from torch_mxfp8moe import configs, dispatch
from torch_mxfp8moe.backends import Unloadable, registered

RUN = "import runpy; runpy.run_module('torch_mxfp8moe', run_name='__main__')"


def parts(text: str) -> dict[str, str]:
    """Title -> what is below it."""
    return {part.split("\n", 1)[0]: part.partition("\n")[2] for part in text.split("== ")[1:]}


def test_the_report_says_what_is_here():
    said = parts(run_python(RUN, MXFP8MOE_SOMETHING="3"))
    assert list(said)[: len(main.PARTS)] == list(main.PARTS)
    assert f"torch {torch.__version__}" in said["PyTorch"]
    assert "MXFP8MOE_SOMETHING=3" in said["system"]
    assert f"torch_mxfp8moe {torch_mxfp8moe.__version__}, {PACKAGE}" in said["package"]
    for status in torch_mxfp8moe.backends().values():
        assert str(status) in said["backends, in the order in which they are asked"]
    for layout in torch_mxfp8moe.LAYOUTS:
        for activation_dtype in ("mxfp8", "bf16"):
            assert f"layout {layout}, activations {activation_dtype}: served by " in said["calls"]
    for path in (PACKAGE / "configs/triton").glob("*.json"):
        assert f"{path}: " in said["tuned tiles"]
    assert "!!" not in "".join(said.values())


@only_cpu
def test_it_reports_packages_that_are_broken(tmp_path):
    """Modules that cannot be imported, and no C++ kernels."""
    for name in ("triton", "aiter", "flydsl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise OSError('{name} is broken')\n")
    # as if there were a GPU, so that somebody asks Triton
    broken = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
sys.modules["torch_mxfp8moe._C"] = None
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
{RUN}
"""
    said = parts(run_python(broken, MXFP8MOE_TEST_WITHOUT_EXTENSION="1"))
    assert list(said)[: len(main.PARTS)] == list(main.PARTS)
    asked = said["backends, in the order in which they are asked"]
    assert "asking whether it is available raised OSError: triton is broken" in asked
    assert "C++ kernels: the C++ extension was not built" in said["package"]
    assert "!! " in said["PyTorch"]  # there is no GPU 0
    assert "served by reference" in said["calls"]


def test_it_reports_a_config_that_is_broken_and_a_backend_that_does_not_load(tmp_path, monkeypatch):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "sm_90.json").write_text("{")
    (tmp_path / "triton" / "sm_80.json").write_text('{"tiles": []}')
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs.load.cache_clear()
    unloadable = Unloadable("vendor", ImportError("libvendor.so: cannot open shared object file"))
    everybody = dict(registered(), vendor=unloadable)
    monkeypatch.setattr(dispatch, "registered", lambda: everybody)
    said = parts(main.report())
    configs.load.cache_clear()
    assert "sm_90.json: does not load: JSONDecodeError" in said["tuned tiles"]
    assert "sm_80.json: does not load: ValueError: sm_80.json: there is no rule" in said["tuned tiles"]
    reason = "importing it raised ImportError: libvendor.so: cannot open shared object file"
    assert f"vendor     not usable: {reason}" in said["backends, in the order in which they are asked"]
    assert f"not vendor: {reason}" in said["calls"]


def test_a_part_that_fails_does_not_end_the_report(monkeypatch):
    def broken():
        yield "so far"
        raise SystemExit("no more")

    monkeypatch.setitem(main.PARTS, "PyTorch", broken)
    said = parts(main.report())
    assert said["PyTorch"].startswith("  so far\n  !! SystemExit: no more (")
    assert "served by" in said["calls"]


@pytest.mark.parametrize("torch_is", ("missing", "broken"))
def test_the_file_runs_where_torch_does_not(torch_is, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libtorch.so is not there')\n")
    command = [sys.executable, "-S", str(PACKAGE / "__main__.py")]
    path = str(tmp_path) if torch_is == "broken" else ""
    done = subprocess.run(command, env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = parts(done.stdout)
    assert list(said) == list(main.PARTS)
    expected = "ImportError: libtorch.so is not there" if torch_is == "broken" else "No module named 'torch'"
    assert expected in said["PyTorch"] and "!!" in said["package"]
