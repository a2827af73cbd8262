"""The programs in tools/: each says what it does and what it takes, also where it could not run."""

import ast
import subprocess
import sys

import pytest

from helpers import HERE, only_cpu
from pages import ROOT

TOOLS = ROOT / "tools"
PROGRAMS = sorted(path for path in TOOLS.rglob("*.py") if '__name__ == "__main__"' in path.read_text())

pytestmark = [only_cpu, pytest.mark.skipif(not TOOLS.exists(), reason="needs the source tree")]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: str(path.relative_to(TOOLS)))
def test_help(program):
    done = subprocess.run([sys.executable, str(program), "--help"], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr
    says = " ".join(ast.get_docstring(ast.parse(program.read_text())).split("\n\n")[0].split())
    assert done.stdout.startswith("usage: ") and says in " ".join(done.stdout.split())
    assert "-h, --help" in done.stdout
