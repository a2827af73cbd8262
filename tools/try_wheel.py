#!/usr/bin/env python3
"""Build the wheel once, from the source archive, and try it under several Pythons and versions of torch.

    python tools/try_wheel.py                                        # this Python, with its own torch
    python tools/try_wheel.py python3.10:torch==2.11.0 python3.13:torch==2.14.1

Each try has a fresh environment, PYTHON or PYTHON:REQUIREMENT. Without a requirement PYTHON's own torch is used; with
one it is installed from the package index, where a build for GPUs takes several GB. What a try runs: the import, the
ops on the C++ kernels against the reference, out variants, opcheck, a whole compiled graph, an export. Prints a row for
each, with the SHA-256 of the ops' bytes, which has to be the same in all; ends with status 1 where one failed or
differs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TRY = """
import hashlib, io, sys
import torch, torch_mxfp8moe as mx
from torch_mxfp8moe import extension

def fail(reason):
    sys.exit(f"{reason}, Python {sys.version.split()[0]}, torch {torch.__version__}")

if extension.MODULE is None:
    fail(extension.WHY_MISSING)
generator = torch.Generator().manual_seed(0)
randn = lambda *shape: torch.randn(*shape, generator=generator)
source = randn(4, 128, 64)
w1, w2 = mx.quantize_1x32(source), mx.quantize_1x32(randn(4, 64, 64) / 8)
call = (randn(5, 64).bfloat16(), *w1, *w2, torch.rand(5, 2, generator=generator), torch.arange(10).view(5, 2) % 4)
out, want = mx.fused_moe(*call), mx.reference.fused_moe(*call)
if mx.explain(*call).backend != "cpu" or (out - want).norm() > 5e-3 * want.norm():
    fail("the C++ kernels do not serve the call, or not well")
given = torch.empty_like(out), torch.empty_like(w1[0]), torch.empty_like(w1[1])
mx.fused_moe(*call, out=given[0])
mx.quantize_1x32(source, out=given[1:])
same = all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(given, (out, *w1)))
if not same or any(x._version != 1 for x in given):
    fail("out variants write something else, or their writes are not counted")

class Layer(torch.nn.Module):
    def forward(self, x):
        return torch.ops.mxfp8moe.fused_moe(x * 1, *call[1:]) + 1

with torch.no_grad():
    checks = ("test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.mxfp8moe.fused_moe.default, call, test_utils=checks)
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")(call[0])
    file = io.BytesIO()
    torch.export.save(torch.export.export(Layer(), (call[0],)), file)
    exported = torch.export.load(io.BytesIO(file.getvalue())).module()(call[0])
if not torch.equal(compiled, out + 1) or not torch.equal(exported, out + 1):
    fail("a compiled or exported graph gives another result")
digest = hashlib.sha256()
for x in (*w1, *w2, out):
    digest.update(bytes(x.view(torch.uint8).flatten().tolist()))  # no NumPy
print(sys.version.split()[0], torch.__version__, extension.MODULE.capability(), digest.hexdigest()[:16])
"""


def run(*command: str | Path, folder: Path = ROOT, **environment: str) -> str:
    """What a command printed; raises RuntimeError with the end of it where it fails."""
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    if done.returncode:
        said = (done.stdout[-3000:] + done.stderr[-3000:]).strip()
        shown = (str(part).strip().partition("\n")[0] for part in command[:4])
        raise RuntimeError(f"{' '.join(shown)} ... failed:\n{said}")
    return done.stdout


def build_source_archive(source: Path, folder: Path) -> Path:
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, folder, folder=source)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def build_wheel(archive: Path, folder: Path) -> Path:
    """The wheel of a source archive, with the C++ kernels in it, by this Python and its torch."""
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-q")
    run(*pip, "--wheel-dir", folder, archive, MXFP8MOE_EXTENSION="require")
    (wheel,) = folder.glob("*.whl")
    return wheel


def try_wheel(wheel: Path, python: str, requirement: str | None, folder: Path) -> list[str]:
    """Python, torch, instruction set and digest of a try in a new environment; raises RuntimeError where it fails."""
    run(python, "-m", "venv", folder)
    own = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = (own, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    if requirement:
        run(*pip, requirement)
    else:
        torch = run(python, "-c", "import torch; print(torch.__path__[0])").strip()
        site = run(own, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        (Path(site) / "torch-of-the-parent.pth").write_text(f"{Path(torch).parent}\n")
    run(*pip, "--no-deps", "--force-reinstall", wheel)
    # From the environment's folder, with no PYTHONPATH: a checkout must not be what is imported.
    return run(own, "-c", TRY, folder=folder, PYTHONPATH="").split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", metavar="PYTHON[:REQUIREMENT]", help="default: this Python")
    parser.add_argument("--wheel", type=Path, help="try this one instead of building it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = args.wheel or build_wheel(build_source_archive(ROOT, Path(folder)), Path(folder))
        print(f"{wheel.name}, {wheel.stat().st_size / 1e3:.0f} kB")
        print("| Python | torch | instruction set | SHA-256 of the results |\n| --- | --- | --- | --- |")
        digests = set()
        for number, environment in enumerate(args.environments or [sys.executable]):
            python, _, requirement = environment.partition(":")
            try:
                row = try_wheel(wheel, python, requirement or None, Path(folder) / str(number))
            except (RuntimeError, OSError) as error:
                print(f"{environment}: {error}")
                row = ["failed"]
            else:
                print(f"| {' | '.join(row)} |", flush=True)
            digests.add(row[-1])
    sys.exit("failed" in digests or len(digests) != 1)


if __name__ == "__main__":
    main()
