"""What needs no run to be found: lint (ruff) and types (pyrefly), both configured in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pytest

from helpers import PACKAGE, only_cpu
from pages import ROOT

pytestmark = [only_cpu, pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the source tree")]


def check(*command: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    """A checker of this environment (the extra ``test`` brings it), run in ``folder``."""
    return subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True)


def types(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    found = ("--python-interpreter-path", sys.executable, "--output-format", "min-text")
    return check("pyrefly", "check", *found, *arguments, folder=folder)


def test_lint():
    done = check("ruff", "check", "--no-cache", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_types():
    done = types()
    assert done.returncode == 0, done.stdout + done.stderr


CALLER = """
import torch, torch_mxfp8moe as mx

def layer(x: torch.Tensor, ids: torch.Tensor, experts: mx.Mxfp8Experts) -> torch.Tensor:
    data, scale = mx.quantize_1x32(x, "even")
    out: torch.Tensor = mx.fused_moe(x, data, scale, data, scale, x, ids, swiglu_limit=7.0, out_dtype=torch.float32)
    name: str | None = mx.explain(x, data, scale, data, scale, x, ids).backend
    mx.warmup([1, 2], x, data, scale, data, scale, x, ids)
    return out + experts.w1.float() + len(name or "")
"""


def test_callers_get_the_types(tmp_path):
    """The package says that it is typed, and its types tell a wrong call from a right one."""
    (tmp_path / "right.py").write_text(CALLER)
    (tmp_path / "wrong.py").write_text(CALLER.replace("swiglu_limit=7.0", 'swiglu_limit="7"').replace('"even"', "3"))
    (tmp_path / "pyrefly.toml").write_text(f"search-path = ['{PACKAGE.parent}']")
    done = types("right.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = types("wrong.py", folder=tmp_path)
    assert done.returncode == 1 and done.stdout.count("[bad-argument-type]") == 2, done.stdout + done.stderr
    assert (PACKAGE / "py.typed").exists()
