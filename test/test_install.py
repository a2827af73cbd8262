"""Installing from source where something is missing: loud, and as useful as it can be."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

from helpers import needs_extension, only_cpu
from torch_mxfp8moe import extension

ROOT = Path(__file__).resolve().parent.parent
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
SOURCES = (*FILES, "csrc", "torch_mxfp8moe")

pytestmark = [only_cpu, pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")]


def copied(folder: Path) -> Path:
    """A copy of what a release is made of, in ``folder/source``; nothing compiled."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    return folder / "source"


def install(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """``pip install`` of a copy of the sources, without isolation, into ``folder/site``."""
    source = copied(folder)
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-v"]
    return subprocess.run(
        [*pip, "--target", str(folder / "site"), str(source)],
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


@needs_extension
def test_the_source_archive_builds_a_wheel_that_works(tmp_path):
    """As tools/try_wheel.py does it for any Python and torch: here for this one, in an environment of its own."""
    sys.path.insert(0, str(ROOT / "tools"))
    import try_wheel

    source = copied(tmp_path)
    archive = try_wheel.build_source_archive(source, tmp_path)
    with tarfile.open(archive) as file:
        held = {str(Path(*Path(name).parts[1:])) for name in file.getnames()}
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert {name for name in files if "egg-info" not in name} <= held and not any("test" in name for name in held)
    wheel = try_wheel.build_wheel(archive, tmp_path)
    version = metadata.version("torch_mxfp8moe")
    assert wheel.name.startswith(f"torch_mxfp8moe-{version}-cp310-abi3-")
    with zipfile.ZipFile(wheel) as file:
        package = {name for name in file.namelist() if name.startswith("torch_mxfp8moe/")}
    assert package == {name for name in files if name.startswith("torch_mxfp8moe/")} | {"torch_mxfp8moe/_C.abi3.so"}
    python, torch_version, capability, digest = try_wheel.try_wheel(wheel, sys.executable, None, tmp_path / "venv")
    assert (python, torch_version) == (sys.version.split()[0], torch.__version__)
    assert capability == extension.MODULE.capability() and len(digest) == 16


def test_extras(tmp_path):
    """The docs name the flydsl of the extra with aiter's release, and the changelog has this version."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=copied(tmp_path), env=os.environ | {"MXFP8MOE_EXTENSION": "skip"}, check=True)
    built = metadata.PathDistribution(tmp_path / "torch_mxfp8moe.egg-info")
    extras = set(built.metadata.get_all("Provides-Extra"))
    assert extras == {"checkpoint", "rocm", "test", "transformers"}
    (pin,) = [text.split(";")[0] for text in built.requires if "flydsl" in text]
    install_page = (ROOT / "docs" / "install.md").read_text()
    assert all(f"`{name}`" in install_page for name in extras) and f"`{pin}`" in install_page
    assert f"## {built.version}" in (ROOT / "CHANGELOG.md").read_text()


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
