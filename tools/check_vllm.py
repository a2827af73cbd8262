#!/usr/bin/env python
"""Run the vLLM plugin's tests beside a real vLLM, on the CPU; needs no GPU.

    python tools/check_vllm.py
    python tools/check_vllm.py -k layer                           # arguments of pytest

Installs vLLM into a folder of its own (1.3 GB), without its dependencies but for those that importing its MoE layers,
quantization configs and model config takes: no other torch, nothing else is touched. Runs test/with_vllm/cases.py
there with vLLM's CPU platform; vLLM's compiled parts, which want CUDA, do not load and are not needed. Exits with 1 if
vLLM could not be installed or a test failed. Run it with the Python, 3.11 or later, that has torch, pytest and this
package.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "vllm"
VERSION = "0.33.0"
ALONE = (
    f"vllm=={VERSION}",
    "apache-tvm-ffi==0.1.11",
    "compressed-tensors==0.17.0",
    "xgrammar==0.2.8",
)
"""Packages without their dependencies: those would be another torch, or have no use here."""
WITH_DEPENDENCIES = (
    "aiohttp>=3.14.4",
    "blake3",
    "cachetools",
    "cbor2",
    "cloudpickle",
    "einops",
    "fastapi>=0.133.0,<0.137.0",
    "llguidance>=1.7.0,<1.8.0",
    "loguru",
    "msgspec",
    "numpy",
    "openai>=2.25.0",
    "oss-harmony>=0.0.11",
    "partial-json-parser",
    "pillow>=13.0.0",
    "prometheus_client>=0.18.0",
    "psutil",
    "py-cpuinfo",
    "pybase64",
    "pydantic>=2.12.0",
    "pyzmq>=25.0.0",
    "regex",
    "requests>=2.33.0",
    "transformers>=5.16.1,<5.21.0",
    "uvloop",
)
"""As vLLM requires them; none depends on torch."""


class NotInstalled(Exception):
    """vLLM could not be installed; says why."""


def install(folder: Path = FOLDER) -> Path:
    """The folder that has vLLM, installed there unless it is."""
    target = folder / VERSION
    if target.exists():
        return target
    if sys.version_info < (3, 11):
        raise NotInstalled(f"vLLM {VERSION} takes Python 3.11 or later; this is {sys.version.split()[0]}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        for packages, options in ((WITH_DEPENDENCIES, []), (ALONE, ["--no-deps"])):
            command = [*pip, *options, "--target", f"{staging}/site", *packages]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = (done.stderr or done.stdout).strip().splitlines() or ["pip said nothing"]
                raise NotInstalled(f"vLLM {VERSION} cannot be installed: {said[-1]}")
        (Path(staging) / "site").rename(target)
    return target


def run(site: Path, arguments: list[str], **kwargs) -> subprocess.CompletedProcess:
    """pytest on test/with_vllm/cases.py with the vLLM in folder ``site``."""
    path = [str(ROOT), str(ROOT / "test"), str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "VLLM_TARGET_DEVICE": "cpu"}
    pytest = [sys.executable, "-m", "pytest", "-c", "test/pytest.ini", "--rootdir", ".", "-o", "python_files=cases.py"]
    return subprocess.run([*pytest, *arguments, "test/with_vllm/cases.py"], env=environment, cwd=ROOT, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where vLLM is (default: build/vllm)")
    args, rest = parser.parse_known_args()
    try:
        site = install(args.folder.resolve())
    except NotInstalled as error:
        sys.exit(str(error))
    sys.exit(run(site, rest).returncode)


if __name__ == "__main__":
    main()
