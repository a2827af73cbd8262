#!/usr/bin/env python3
"""Compile the kernels for gfx950 with several versions of Triton, execute them in the simulator and check them.

    python3 tools/check_gfx950.py [3.6.0 3.7.1 ...]

Each version is installed by pip into a folder of its own under build/triton, once; the tests (test_gfx950_*.py) then
run with it, in the Python that runs this, which needs torch, numpy, pytest and hypothesis. No GPU is used. Prints what
each version gave; the exit status is that of the worst.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
TESTS = ("test_gfx950_simulator.py", "test_gfx950_mutations.py", "test_gfx950_gates.py")


def installed(version: str) -> Path:
    """The folder that holds this version of Triton."""
    folder = ROOT / "build" / "triton" / version
    if not (folder / "triton").exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            folder,
            f"triton=={version}",
        ]
        subprocess.run(command, check=True)
    return folder


def check(version: str, arguments: list[str]) -> tuple[int, str]:
    """The exit status of the tests, and what they said of themselves in a line or two."""
    folder = installed(version)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "test", folder)))
    environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder.with_name(f"cache-{version}"))}
    tests = [str(ROOT / "test" / name) for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "test/pytest.ini"), "--rootdir", str(ROOT), "-q", "-s"]
    result = subprocess.run([*command, *tests, *arguments], env=environment, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    told = [line for line in lines if line.startswith("gfx950 ")]
    defects = len(set(re.findall(r"CompilerDefect: (.*)", result.stdout)))
    if defects:
        told.append(f"{defects} wait states that LLVM leaves out (test/gfx950_simulator/hazards.py)")
    if result.returncode:
        print(result.stdout[-20000:], result.stderr[-5000:], sep="\n", file=sys.stderr)
    return result.returncode, "; ".join([lines[-1] if lines else "nothing ran", *told])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="arguments for pytest")
    options = parser.parse_args()
    worst = 0
    for version in options.versions:
        status, told = check(version, options.pytest)
        print(f"Triton {version}: {told}", flush=True)
        worst = max(worst, status)
    sys.exit(worst)


if __name__ == "__main__":
    main()
