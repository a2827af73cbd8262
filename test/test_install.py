"""Installing from source where something is missing: loud, and as useful as it can be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import only_cpu

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "torch_mxfp8moe")

pytestmark = [only_cpu, pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")]


def install(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """``pip install`` of a copy of the sources, without isolation, into ``folder/site``."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-v"]
    return subprocess.run(
        [*pip, "--target", str(folder / "site"), str(folder / "source")],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


NO_COMPILER = dict(CC="/no/compiler/here", CXX="/no/compiler/here")


def test_without_a_compiler_it_installs_says_so_and_runs_on_the_reference(tmp_path):
    done = install(tmp_path, MXFP8MOE_EXTENSION="auto", **NO_COMPILER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "THE C++ EXTENSION WAS NOT BUILT" in done.stdout + done.stderr
    installed = tmp_path / "site" / "torch_mxfp8moe"
    assert (installed / "py.typed").exists() and (installed / "configs" / "triton" / "default.json").exists()
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]  # an editable install here
import torch, torch_mxfp8moe
x = torch.randn(2, 64)
data, scale = torch.ops.mxfp8moe.quantize_1x32(x)
print(torch_mxfp8moe.__file__)
print(torch_mxfp8moe.backends()["cpu"].reason)
print((torch_mxfp8moe.dequantize_1x32(data, scale) - x).norm() < 0.05 * x.norm())
try:
    torch_mxfp8moe.quantize_1x32(x[:, :33])
except ValueError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    file, reason, close, error = run.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert reason.startswith("the C++ extension was not built: install a C++17 compiler") and reason in run.stderr
    assert close == "tensor(True)"
    assert error == "quantize_1x32: x has 33 columns; it takes a last dimension divisible by 32"


def test_a_required_extension_that_cannot_be_built_is_an_error(tmp_path):
    done = install(tmp_path, MXFP8MOE_EXTENSION="require", **NO_COMPILER)
    assert done.returncode != 0 and not (tmp_path / "site" / "torch_mxfp8moe").exists()


def test_an_unknown_mode_is_an_error(tmp_path):
    done = install(tmp_path, MXFP8MOE_EXTENSION="perhaps")
    assert done.returncode != 0
    assert "MXFP8MOE_EXTENSION is 'perhaps'; it takes auto, require or skip" in done.stdout + done.stderr


def test_without_torch_the_message_says_what_to_do(tmp_path):
    """An interpreter that hides torch, as an isolated build does."""
    code = """
import sys
sys.modules["torch"] = None
__file__ = sys.argv[1]
sys.argv = ["setup.py", "--version"]
exec(open(__file__).read())
"""
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "setup.py")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Install torch 2.11 or later first, then: pip install --no-build-isolation ." in " ".join(
        done.stderr.split()
    )
