"""The lowest and the highest version of Triton that the kernels are for, beside the one that is installed."""

import importlib.util
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parent.parent / "tools" / "check_triton.py"
if not PROGRAM.exists():
    pytest.skip("needs the source tree", allow_module_level=True)

spec = importlib.util.spec_from_file_location("check_triton", PROGRAM)
check_triton = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_triton)

SIMULATED = ("test/test_gfx950_simulator.py",)


@pytest.mark.parametrize("version", (check_triton.VERSIONS[0], check_triton.VERSIONS[-1]))
def test_the_kernels_compile(version):
    """Of each tile and kernel one, and for gfx950 what they compute; ``tools/check_triton.py`` has the other versions
    and the rest.

    Without a package index this cannot be found out, which is no defect of the kernels: skipped, with pip's reason.
    The program, whose only task this is, fails then.
    """
    if pytest.importorskip("triton", reason="needs Triton: pip install triton").__version__ == version:
        pytest.skip("the version that is installed: test_triton_compile.py and the simulator's tests are all of this")
    try:
        folder = check_triton.install(version)
    except check_triton.NotInstalled as error:
        pytest.skip(str(error))
    rows, output = check_triton.run(folder, "few", SIMULATED)
    assert not any(row.failures for row in rows.values()), output
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950"):
        assert rows[arch].kernels >= 12, output


def test_a_version_that_there_is_not_is_reported(tmp_path):
    with pytest.raises(check_triton.NotInstalled, match="triton==0.0.1 cannot be installed: ERROR: "):
        check_triton.install("0.0.1", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_version_that_runs_is_the_one_asked_for(tmp_path):
    """A folder that comes first: here one whose Triton says that it is imported."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('this is the one')")
    rows, output = check_triton.run(tmp_path, "few")
    assert sum(row.failures for row in rows.values()) == 1 and "this is the one" in output
