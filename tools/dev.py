#!/usr/bin/env python3
"""Set everything up and run the demo or the tests: needs Python 3.10 or later and a package index, nothing installed.

    python3 tools/dev.py demo [arguments of tools/demo/run.py]
    python3 tools/dev.py test [arguments of pytest]

Makes a virtual environment in .venv, installs torch there unless the Python that runs this has torch 2.11 or later
already (then that one is used), builds the package into this checkout and runs the command. A second run only builds
what changed. Without arguments, test runs all tests, file by file over the cores. Environment: MXFP8MOE_TORCH is the
requirement to install torch by (default torch==2.13.0), MXFP8MOE_EXTENSION as in setup.py.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "mxfp8moe-ready"
TORCH = os.environ.get("MXFP8MOE_TORCH", "torch==2.13.0")
BUILD = ["setuptools>=77", "wheel", "ninja"]
EXTRAS = {"demo": ["numpy", "safetensors"], "test": []}
COMMANDS = {
    "demo": [str(ROOT / "tools/demo/run.py")],
    "test": ["-m", "pytest", "-c", str(ROOT / "test/pytest.ini"), "--rootdir", str(ROOT)],
}
PROCESSES = min(os.cpu_count() or 1, 8)  # of the tests, with up to 2 GB each
ARGUMENTS = {
    "demo": [],
    "test": ["test", "-n", str(PROCESSES), "--dist", "loadfile", "--no-loadscope-reorder"],  # in conftest.py's order
}
"""Where the command line has none."""


def step(text: str) -> None:
    print(f"== {text}", flush=True)


def run(*command: str, **kwargs) -> None:
    try:
        subprocess.run([str(part) for part in command], check=True, **kwargs)
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed with exit status {error.returncode}: {' '.join(map(str, error.cmd))}")


def pip(*arguments: str) -> None:
    # Without --no-compile pip compiles every module of torch and the rest, most of which nothing here imports.
    quiet = ("--quiet", "--disable-pip-version-check", "--no-compile")
    run(PYTHON, "-m", "pip", "install", *quiet, *arguments, cwd=ROOT)


def torch_of_this_python() -> Path | None:
    """The folder in which the running Python finds a torch of 2.11 or later, if it does."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    try:
        version = (folder / "version.py").read_text().split("__version__ = ", 1)[1].splitlines()[0].strip("'\"")
        major, minor = (int(part) for part in version.split(".")[:2])
    except (OSError, IndexError, ValueError):
        return None
    return folder.parent if (major, minor) >= (2, 11) else None


def make_environment() -> None:
    if sys.prefix != sys.base_prefix and Path(sys.prefix).resolve() == VENV:
        return
    if not PYTHON.exists():
        step(f"virtual environment in {VENV}")
        try:
            subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        except subprocess.CalledProcessError:
            shutil.rmtree(VENV, ignore_errors=True)
            sys.exit("this Python cannot make virtual environments; on Debian and Ubuntu install python3-venv")
        found = torch_of_this_python()
        if found:
            step(f"using the torch in {found}")
            site = subprocess.run(
                [str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                check=True, capture_output=True, text=True,
            ).stdout.strip()  # fmt: skip
            (Path(site) / "torch-of-the-parent.pth").write_text(f"{found}\n")
    if subprocess.run([str(PYTHON), "-c", "import torch"], capture_output=True).returncode:
        step(f"installing {TORCH}")
        pip(TORCH)


def state(command: str) -> str:
    """What the environment was made of: changes when it has to be made again."""
    digest = hashlib.sha256(f"{TORCH} {os.environ.get('MXFP8MOE_EXTENSION')} {BUILD} {EXTRAS}".encode())
    for path in sorted([ROOT / "setup.py", ROOT / "torch_mxfp8moe/__init__.py", *(ROOT / "csrc").rglob("*.*")]):
        digest.update(path.read_bytes())
    return f"{command} {digest.hexdigest()}"


def build(command: str) -> None:
    wanted = state(command)
    done = STAMP.read_text().splitlines() if STAMP.exists() else []
    if wanted in done:
        return
    step("building torch_mxfp8moe")
    pip(*BUILD)
    target = ".[test]" if command == "test" else "."
    pip("--no-build-isolation", "--editable", target, *EXTRAS[command])
    run(PYTHON, "-c", "from torch_mxfp8moe.extension import WHY_MISSING as why; print('!! ' + why) if why else None")
    STAMP.write_text("\n".join([line for line in done if line.split()[1] == wanted.split()[1]] + [wanted]) + "\n")


def main() -> None:
    if sys.version_info < (3, 10):
        sys.exit(f"Python 3.10 or later is needed; this is {sys.version.split()[0]}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=sorted(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed on")
    args = parser.parse_args()
    make_environment()
    build(args.command)
    step(f"{args.command}")
    os.chdir(ROOT)
    rest = args.arguments or ARGUMENTS[args.command]
    sys.exit(subprocess.run([str(PYTHON), *COMMANDS[args.command], *rest]).returncode)


if __name__ == "__main__":
    main()
