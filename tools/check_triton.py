#!/usr/bin/env python
"""Compile the Triton kernels with several versions of Triton, side by side, for every architecture; needs no GPU.

    python tools/check_triton.py                                  # every version, of each tile and kernel one
    python tools/check_triton.py --scope all --versions 3.9.0     # all that test_triton_compile.py has
    python tools/check_triton.py test/test_triton.py              # other tests as well

Installs each version into a folder of its own (no dependencies, nothing else is touched), runs
test/test_triton_compile.py and the tests named on the command line with it, and prints a table. Exits with 1 if a
version could not be installed or a test failed. Run it with the Python that has torch, pytest and this package.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "triton"
VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
COMPILE_TESTS = "test/test_triton_compile.py"


class NotInstalled(Exception):
    """A version of Triton could not be installed; says why."""


def install(version: str, folder: Path = FOLDER) -> Path:
    """The folder that has Triton ``version``, installed there unless it is."""
    target = folder / version
    if (target / "triton").exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        into = ["--no-compile", "--no-deps", "--target", f"{staging}/{version}"]
        done = subprocess.run([*pip, *into, f"triton=={version}"], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["pip said nothing"]
            raise NotInstalled(f"triton=={version} cannot be installed: {said[-1]}")
        (Path(staging) / version).rename(target)
    return target


@dataclass
class Row:
    """One architecture's results with one version."""

    kernels: int = 0
    tests: int = 0
    skipped: int = 0
    failures: int = 0
    seconds: float = 0.0


def run(triton: Path, scope: str, tests: tuple[str, ...] = ()) -> tuple[dict[str, Row], str]:
    """Results by architecture ('-' for tests of none) with the Triton in folder ``triton``, and what pytest printed."""
    path = [str(triton), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "MXFP8MOE_COMPILE": scope}
    environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest = [sys.executable, "-m", "pytest", "-c", "test/pytest.ini", "--rootdir", ".", "-q", "--tb=short"]
        done = subprocess.run(
            [*pytest, "-o", "junit_family=xunit1", f"--junitxml={report}", COMPILE_TESTS, *tests],
            env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        rows = defaultdict(Row)
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            properties = {p.get("name"): p.get("value") for p in case.iter("property")}
            row = rows[properties.get("target", "-")]
            if case.find("skipped") is not None:
                row.skipped += 1
                continue
            row.kernels += int(properties.get("kernels", 0))
            row.tests += 1
            row.failures += case.find("failure") is not None or case.find("error") is not None
            row.seconds += float(case.get("time"))
    if done.returncode and not any(row.failures for row in rows.values()):
        rows["-"].failures += 1  # pytest itself failed
    return dict(rows), done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="more tests to run, as pytest takes them, from the sources' root")
    parser.add_argument("--versions", nargs="+", default=VERSIONS, metavar="V", help=f"default: {' '.join(VERSIONS)}")
    parser.add_argument("--scope", choices=("few", "usual", "all"), default="few", help="how much to compile")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the versions are (default: build/triton)")
    args = parser.parse_args()
    failed = []
    print(
        f"{'triton':<8} {'target':<7} {'kernels':>7} {'tests':>6} {'skipped':>7} {'failures':>8} {'seconds':>8}",
        flush=True,
    )
    for version in args.versions:
        start = time.perf_counter()
        try:
            rows, output = run(install(version, args.folder.resolve()), args.scope, tuple(args.tests))
        except NotInstalled as error:
            print(f"{version:<8} {error}", flush=True)
            failed.append(str(error))
            continue
        for target, row in sorted(rows.items()):
            print(
                f"{version:<8} {target:<7} {row.kernels:>7} {row.tests:>6} {row.skipped:>7} "
                f"{row.failures:>8} {row.seconds:>8.1f}",
                flush=True,
            )
        print(
            f"{version:<8} {'all':<7} {'':>7} {'':>6} {'':>7} {'':>8} {time.perf_counter() - start:>8.1f}", flush=True
        )
        if any(row.failures for row in rows.values()):
            failed.append(f"\n== triton {version}\n{output}")
    sys.exit("\n".join(failed) or 0)


if __name__ == "__main__":
    main()
