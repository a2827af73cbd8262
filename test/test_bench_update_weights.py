"""tools/bench_update_weights.py at small sizes: what it measures, checks and writes; on a GPU with captured graphs."""

import csv
import sys

import pytest
import torch

import device
from device import DEVICE
from helpers import PACKAGE
from torch_mxfp8moe import Mxfp8Experts

TOOLS = PACKAGE.parent / "tools"
if not TOOLS.exists():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(TOOLS))

import bench_update_weights as program  # noqa: E402

pytestmark = pytest.mark.skipif(device.NAME == "interpreter", reason="times of the interpreter say nothing")

SMALL = ["--device", DEVICE.type, "--experts", "4", "--shrink", "8", "--repeat", "2"]


def lines(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_source_order_and_layout(tmp_path, capsys):
    """gpt-oss with its biases too; H = 320 fits no aiter_gfx950, and that is said."""
    out = tmp_path / "updates.csv"
    rows = ["Qwen3-30B-A3B TP1", "gpt-oss-120b TP1"]
    assert program.main([*SMALL, "--rows", *rows, "--csv", str(out)]) == 0
    printed = capsys.readouterr().out
    assert ("no CUDA graphs on a CPU" in printed) == (DEVICE.type == "cpu")
    assert printed.count("not measured: Mxfp8Experts: layout is 'aiter_gfx950'; the experts do not fit") == 4
    found = lines(out)
    assert len(found) == 12 and all(line["honoured"] == "True" for line in found)
    assert {line["graph"] for line in found} == {str(DEVICE.type == "cuda")}
    assert all((line["extra_bytes"] == "") == (DEVICE.type == "cpu") for line in found)
    E, H, I = 4, 256, 64  # noqa: E741
    held = 3 * E * H * I * 33 // 32
    padded = 3 * E * H * 128 + E * H * 256 // 32 + E * H * 8  # I of 128; eight columns of scales each
    by = {(line["layout"], line["source"]): int(line["bytes_moved"]) for line in found if line["row"] == rows[0]}
    assert by == {
        ("row_major", "mxfp8"): 2 * held,
        ("row_major", "bf16"): 2 * 3 * E * H * I + held,
        ("aiter_gfx950", "mxfp8"): held + padded,
        ("aiter_gfx950", "bf16"): 2 * 3 * E * H * I + padded,
    }
    for line in found:
        assert 0 < float(line["low"]) <= float(line["us"]) <= float(line["high"])
        assert float(line["bytes_per_us"]) == pytest.approx(int(line["bytes_moved"]) / float(line["us"]))


@pytest.mark.parametrize("wrong", ("nothing", "one weight", "new storage"))
def test_an_update_that_is_not_honoured(wrong, monkeypatch, capsys):
    """Weights that stay, in part or where the graph reads them, are found, and end the program with 1."""
    update = Mxfp8Experts.update_weights

    def updated(self, **given):
        if wrong == "one weight":
            update(self, **{name: x for name, x in given.items() if not name.startswith("w2")} | half(given))
        elif wrong == "new storage":
            self.w1 = self.w1.clone()
            update(self, **given)

    def half(given):
        order = given["gate_up_order"]
        return dict(w2=given["w2"].view(torch.uint8).flip(0).view(given["w2"].dtype),
                    w2_scale=given["w2_scale"], gate_up_order=order)  # fmt: skip

    monkeypatch.setattr(Mxfp8Experts, "update_weights", updated)
    only = ["--rows", "Qwen3-30B-A3B TP1", "--sources", "mxfp8", "--gate-up-order", "concatenated"]
    honoured = wrong == "new storage" and DEVICE.type == "cpu"  # no graph reads the old one
    assert program.main([*SMALL, *only]) == (0 if honoured else 1)
    assert ("NOT HONOURED" in capsys.readouterr().out) != honoured


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--repeat", "0"], "--repeat is 0; it takes 1 or more"),
        (["--shrink", "-2"], "--shrink is -2; it takes 1 or more"),
        (["--rows", "DeepSeek-V3 EP8"], "invalid choice"),
        (["--layouts", "column_major"], "invalid choice"),
    ),
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.parse(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
