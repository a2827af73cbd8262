"""The vLLM plugin: what can be said without vLLM; the rest, ``with_vllm/cases.py``, runs beside a real one where it is
installed or may be."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from helpers import PACKAGE, only_cpu, run_python
from torch_mxfp8moe.integrations import vllm as plugin

pytestmark = only_cpu

ROOT = Path(__file__).resolve().parent.parent
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@needs_sources
def test_the_entry_point(tmp_path):
    """setup.py names a function that is there."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"MXFP8MOE_EXTENSION": "skip"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    points = metadata.PathDistribution(tmp_path / "torch_mxfp8moe.egg-info").entry_points
    (point,) = points.select(group="vllm.general_plugins")
    assert point.load() is plugin.register


def test_without_vllm_it_does_nothing_and_says_so():
    """In a fresh interpreter: the module is light, and what vLLM would call raises nothing."""
    code = """
import logging, sys
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(levelname)s %(message)s")
from torch_mxfp8moe.integrations.vllm import register
assert "vllm" not in sys.modules
sys.modules["vllm"] = None
ways = register()
assert register() is ways
assert all("looking at vLLM raised ModuleNotFoundError" in reason for reason in ways.values()), ways
print(*ways)
"""
    out = run_python(code)
    assert out.count("WARNING torch_mxfp8moe does nothing for --") == 2
    assert out.splitlines()[-1] == "--moe-backend triton --quantization mxfp8moe"


def test_a_vllm_that_lacks_the_parts_is_left_alone():
    code = """
import sys, types
for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.layers.fused_moe"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
sys.modules["vllm"].__version__ = "0.99"
kernel = types.ModuleType("modular_kernel")
sys.modules["vllm.model_executor.layers.fused_moe.modular_kernel"] = kernel
from torch_mxfp8moe.integrations.vllm import register
class FusedMoEExpertsModular:
    __abstractmethods__ = frozenset({"apply"})
for attributes in ({}, {"FusedMoEExpertsModular": FusedMoEExpertsModular}):
    vars(kernel).update(attributes)
    print(register.__wrapped__()["--moe-backend triton"])
"""
    missing, other = run_python(code).splitlines()
    assert missing.startswith("looking at vLLM raised AttributeError: ")
    assert other.startswith("FusedMoEExpertsModular has other abstract methods than in vLLM 0.33: ")


def test_the_experts_class_is_written_for_the_recorded_base_class():
    """Read, not imported: the methods and parameters that vLLM 0.33 calls, which cases.py compares with vLLM's own."""
    tree = ast.parse((PACKAGE / "integrations" / "vllm" / "experts.py").read_text())
    (cls,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Mxfp8MoeExperts"]
    assert [ast.unparse(base) for base in cls.bases] == ["mk.FusedMoEExpertsModular"]
    methods = {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}
    assert plugin.ABSTRACT_METHODS <= set(methods)
    for name, parameters in plugin.PARAMETERS.items():
        assert tuple(argument.arg for argument in methods[name].args.args) == parameters, name


def test_beside_vllm():
    """Real classes, real loading, CPU tensors; installed into build/vllm (1.3 GB) where that is allowed."""
    program = ROOT / "tools" / "check_vllm.py"
    if not program.exists():
        pytest.skip("needs the source tree")
    spec = importlib.util.spec_from_file_location("check_vllm", program)
    check_vllm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_vllm)
    if not (check_vllm.FOLDER / check_vllm.VERSION).exists() and os.environ.get("MXFP8MOE_TEST_VLLM") != "1":
        pytest.skip("installs vLLM, 1.3 GB: MXFP8MOE_TEST_VLLM=1 allows it, and tools/check_vllm.py does it")
    try:
        site = check_vllm.install()
    except check_vllm.NotInstalled as error:
        pytest.skip(str(error))
    done = check_vllm.run(site, ["-q", "-p", "no:cacheprovider"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 50 and "skipped" not in done.stdout
