"""tools/measure_folding.py: its matrix unit, and what it finds of a small layer."""

import pytest
import torch

from helpers import only_cpu, same_bytes
from pages import ROOT
from shapes import rows
from torch_mxfp8moe import reference

pytestmark = [only_cpu, pytest.mark.skipif(not (ROOT / "tools").exists(), reason="needs the source tree")]


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import measure_folding

    return measure_folding


def test_folding(program):
    """One scale for each 128, and values of which only small ones move, and not far; again it changes nothing."""
    torch.manual_seed(0)
    data, scale = reference.quantize_1x32(torch.randn(64, 512) * torch.exp2(torch.randn(64, 512) * 4))
    scale[0, :4], scale[1, 5] = torch.tensor([0, 3, 200, 127]), 255
    data[2, 128:160] = 0.0
    folded = program.fold(data, scale)
    four = folded[1].unflatten(-1, (-1, 4))
    assert (four == four[..., :1]).all() and folded[1][1, 4] == 255
    before, after = (
        reference.dequantize_1x32(*pair, torch.float32).double().view(256, 128) for pair in ((data, scale), folded)
    )
    assert after[5].isnan().all()
    before, after = (torch.cat((values[:5], values[6:])) for values in (before, after))
    largest, moved = before.abs().amax(-1, keepdim=True), before != after
    assert moved.any() and ((after - before).abs() <= largest * 2**-17).all()
    assert not (moved & (before.abs() >= largest * 2**-13)).any()
    assert all(map(same_bytes, program.fold(*folded), folded))


@pytest.mark.parametrize(
    "products, total, want",
    (
        ([(1, 1)] * 32, 0, 32),
        ([(256, 1), (2**-5, 1)], 0, 256 + 2**-5),  # 13 bits below 2^8
        ([(256, 1), (2**-6, 1)], 0, 256),
        ([(256, 1), (-1.875 * 2**-5, 1)], 0, 256 - 2**-5),  # toward zero
        ([(448, 448), (1, 1)], 0, 448 * 448),
        ([(1, 2**-9)], 4096, 4096),  # the sum so far is aligned as well
        ([(0.5, 1)], 4096, 4096.5),
        ([(256, 1)] * 31 + [(2**-5, 1)], 0, 256 * 31),  # and the sum is cut again: 2^12 leaves 2^-1
        ([], 3, 3),
    ),
)
def test_the_unit(program, products, total, want):
    x, w = torch.zeros(1, 32), torch.zeros(1, 32)
    for i, pair in enumerate(products):
        x[0, i], w[0, i] = pair
    for sign in (1, -1):
        got = program.unit_sum(x * sign, w, torch.full((1, 1), float(total) * sign), 13)
        assert got.item() == want * sign
    exact = total + sum(a * b for a, b in products)
    assert program.unit_sum(x, w, torch.full((1, 1), float(total)), 40).item() == exact


def test_a_layer(program):
    """Enough bits are exact; with 13 the first product moves h across, and the second alone stays under the bound."""
    row = rows()["Qwen3-30B-A3B TP4"].smaller(shrink=4)
    torch.manual_seed(0)
    layer = program.Layer(row, "gauss", "gauss", 32, 13)
    error = {way.name: layer.errors(way)[1] for way in program.WAYS}
    assert error["not folded, fp32 sums"] < 1e-5
    assert 5e-5 < error["the second product only, every 128"] < 1e-3 < error["folded, promoted every 128"] < 0.1
    layer.bits = 40
    assert layer.errors(program.WAYS[-1])[1] < 1e-5
    assert layer.errors(program.Way("exact")) == (0, 0)
