"""tools/bench_first_call.py at a small size: what it measures, prints and writes, and when it is not content."""

import csv
import sys

import pytest

import device
from device import DEVICE
from helpers import PACKAGE

TOOLS = PACKAGE.parent / "tools"
if not TOOLS.exists():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(TOOLS))

import bench_first_call as program  # noqa: E402
from bench_first_call import Figure  # noqa: E402

pytestmark = pytest.mark.skipif(device.NAME == "interpreter", reason="times of the interpreter say nothing")

ROW = "Qwen3-30B-A3B TP4"


def test_both_counts_of_a_row(tmp_path, capfd, monkeypatch):
    """In a process of its own; whether a busy machine is content is not asked."""
    monkeypatch.setattr(program, "MOST", float("inf"))
    out = tmp_path / "first.csv"
    options = ["--device", DEVICE.type, "--rows", ROW, "--shrink", "16", "--tokens", "1", "3", "--repeat", "4"]
    assert program.main([*options, "--csv", str(out)]) == 0
    printed = capfd.readouterr().out
    with out.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(line["row"], line["T"]) for line in found] == [(ROW, "1"), (ROW, "3")]
    worst = max(float(line["first"]) / float(line["later"]) for line in found)
    assert f"first calls take {worst:.3f} of later ones' time" in printed
    for line in found:
        assert 0 < float(line["low"]) <= float(line["later"]) <= float(line["high"])
        assert float(line["first"]) > 0 < float(line["first_host"])


def test_a_slow_first_call_is_marked(monkeypatch, capsys):
    figures = [
        Figure(ROW, 1, 104.0, 99.0, 100.0, 101.0, 50.0, 40.0),
        Figure(ROW, 8, 106.0, 99.0, 100.0, 101.0, 1.0, 1.0),
    ]
    assert [line[-1] == "!" for line in program.table(figures).splitlines()] == [False, False, True]

    class Done:
        stdout = program.json.dumps([program.asdict(figure) for figure in figures])

    monkeypatch.setattr(program.subprocess, "run", lambda *args, **kwargs: Done)
    assert program.main(["--device", DEVICE.type, "--rows", ROW]) == 1
    assert "first calls take 1.060 of later ones' time at the most" in capsys.readouterr().out


@pytest.mark.parametrize("option", ("--tokens", "--repeat", "--shrink"))
def test_counts_from_1_on(option, capsys):
    with pytest.raises(SystemExit):
        program.main(["--device", DEVICE.type, option, "0"])
    assert f"error: {option} takes numbers from 1 on, not 0" in capsys.readouterr().err
