"""The layouts: golden tables of where each byte goes, the formulas written another way, inverses, offset tables."""

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

from helpers import E4M3, only_cpu, random_bytes
from torch_mxfp8moe import LAYOUTS
from torch_mxfp8moe.layouts import pad_intermediate, padded_intermediate

pytestmark = only_cpu

AITER = LAYOUTS["aiter_gfx950"]


def weight_address(e: int, r: int, c: int, rows: int, columns: int, gate_up: bool) -> int:
    """Where aiter's kernels read weight[e, r, c], by arithmetic: tiles of 16 rows x 64 bytes, 1024 bytes each.

    In a tile the 16-byte piece of each row lie together. A tile of gate rows is followed by that of its up rows.
    """
    half, n = divmod(r, rows // 2) if gate_up else (0, r)
    tile_row = 2 * (n // 16) + half if gate_up else n // 16
    tile = (e * rows // 16 + tile_row) * (columns // 64) + c // 64
    return tile * 1024 + c % 64 // 16 * 256 + n % 16 * 16 + c % 16


def scale_address(e: int, r: int, y: int, rows: int, padded: int, gate_up: bool) -> int:
    """Where aiter's kernels read scale[e, r, y]: ``mx_scale_shuffle_idx`` of its csrc/include/mx_quant_utils.h.

    For w1 the rows of gate and up alternate in groups of 16 first.
    """
    if gate_up:
        half, n = divmod(r, rows // 2)
        r = n // 16 * 32 + half * 16 + n % 16
    x = e * rows + r
    return x // 32 * 32 * padded + y // 8 * 256 + y % 4 * 64 + x % 16 * 4 + y % 8 // 4 * 2 + x % 32 // 16


def table(permutation, rows: int, columns: int, step: int = 1) -> str:
    """What lies where in one expert's tensor: ``row:column`` of every ``step``-th place, 16 places to a line."""
    order = permutation.apply(torch.arange(rows * columns).view(1, rows, columns)).tolist()
    entries = [f"{source // columns}:{source % columns}" for source in order[::step]]
    return "\n".join(" ".join(entries[i : i + 16]) for i in range(0, len(entries), 16))


def test_golden_gate_up_weight():
    """16 gate rows, then 16 up rows, 64 columns; each entry stands for 16 neighbouring bytes."""
    assert_expected_inline(
        table(AITER.weight[True], 32, 64, step=16),
        """\
0:0 1:0 2:0 3:0 4:0 5:0 6:0 7:0 8:0 9:0 10:0 11:0 12:0 13:0 14:0 15:0
0:16 1:16 2:16 3:16 4:16 5:16 6:16 7:16 8:16 9:16 10:16 11:16 12:16 13:16 14:16 15:16
0:32 1:32 2:32 3:32 4:32 5:32 6:32 7:32 8:32 9:32 10:32 11:32 12:32 13:32 14:32 15:32
0:48 1:48 2:48 3:48 4:48 5:48 6:48 7:48 8:48 9:48 10:48 11:48 12:48 13:48 14:48 15:48
16:0 17:0 18:0 19:0 20:0 21:0 22:0 23:0 24:0 25:0 26:0 27:0 28:0 29:0 30:0 31:0
16:16 17:16 18:16 19:16 20:16 21:16 22:16 23:16 24:16 25:16 26:16 27:16 28:16 29:16 30:16 31:16
16:32 17:32 18:32 19:32 20:32 21:32 22:32 23:32 24:32 25:32 26:32 27:32 28:32 29:32 30:32 31:32
16:48 17:48 18:48 19:48 20:48 21:48 22:48 23:48 24:48 25:48 26:48 27:48 28:48 29:48 30:48 31:48""",
    )


def test_golden_down_weight():
    """16 rows, 128 columns; each entry stands for 16 neighbouring bytes."""
    assert_expected_inline(
        table(AITER.weight[False], 16, 128, step=16),
        """\
0:0 1:0 2:0 3:0 4:0 5:0 6:0 7:0 8:0 9:0 10:0 11:0 12:0 13:0 14:0 15:0
0:16 1:16 2:16 3:16 4:16 5:16 6:16 7:16 8:16 9:16 10:16 11:16 12:16 13:16 14:16 15:16
0:32 1:32 2:32 3:32 4:32 5:32 6:32 7:32 8:32 9:32 10:32 11:32 12:32 13:32 14:32 15:32
0:48 1:48 2:48 3:48 4:48 5:48 6:48 7:48 8:48 9:48 10:48 11:48 12:48 13:48 14:48 15:48
0:64 1:64 2:64 3:64 4:64 5:64 6:64 7:64 8:64 9:64 10:64 11:64 12:64 13:64 14:64 15:64
0:80 1:80 2:80 3:80 4:80 5:80 6:80 7:80 8:80 9:80 10:80 11:80 12:80 13:80 14:80 15:80
0:96 1:96 2:96 3:96 4:96 5:96 6:96 7:96 8:96 9:96 10:96 11:96 12:96 13:96 14:96 15:96
0:112 1:112 2:112 3:112 4:112 5:112 6:112 7:112 8:112 9:112 10:112 11:112 12:112 13:112 14:112 15:112""",
    )


def test_golden_gate_up_scale():
    """16 gate rows, then 16 up rows, 8 columns."""
    assert_expected_inline(
        table(AITER.scale[True], 32, 8),
        """\
0:0 16:0 0:4 16:4 1:0 17:0 1:4 17:4 2:0 18:0 2:4 18:4 3:0 19:0 3:4 19:4
4:0 20:0 4:4 20:4 5:0 21:0 5:4 21:4 6:0 22:0 6:4 22:4 7:0 23:0 7:4 23:4
8:0 24:0 8:4 24:4 9:0 25:0 9:4 25:4 10:0 26:0 10:4 26:4 11:0 27:0 11:4 27:4
12:0 28:0 12:4 28:4 13:0 29:0 13:4 29:4 14:0 30:0 14:4 30:4 15:0 31:0 15:4 31:4
0:1 16:1 0:5 16:5 1:1 17:1 1:5 17:5 2:1 18:1 2:5 18:5 3:1 19:1 3:5 19:5
4:1 20:1 4:5 20:5 5:1 21:1 5:5 21:5 6:1 22:1 6:5 22:5 7:1 23:1 7:5 23:5
8:1 24:1 8:5 24:5 9:1 25:1 9:5 25:5 10:1 26:1 10:5 26:5 11:1 27:1 11:5 27:5
12:1 28:1 12:5 28:5 13:1 29:1 13:5 29:5 14:1 30:1 14:5 30:5 15:1 31:1 15:5 31:5
0:2 16:2 0:6 16:6 1:2 17:2 1:6 17:6 2:2 18:2 2:6 18:6 3:2 19:2 3:6 19:6
4:2 20:2 4:6 20:6 5:2 21:2 5:6 21:6 6:2 22:2 6:6 22:6 7:2 23:2 7:6 23:6
8:2 24:2 8:6 24:6 9:2 25:2 9:6 25:6 10:2 26:2 10:6 26:6 11:2 27:2 11:6 27:6
12:2 28:2 12:6 28:6 13:2 29:2 13:6 29:6 14:2 30:2 14:6 30:6 15:2 31:2 15:6 31:6
0:3 16:3 0:7 16:7 1:3 17:3 1:7 17:7 2:3 18:3 2:7 18:7 3:3 19:3 3:7 19:7
4:3 20:3 4:7 20:7 5:3 21:3 5:7 21:7 6:3 22:3 6:7 22:7 7:3 23:3 7:7 23:7
8:3 24:3 8:7 24:7 9:3 25:3 9:7 25:7 10:3 26:3 10:7 26:7 11:3 27:3 11:7 27:7
12:3 28:3 12:7 28:7 13:3 29:3 13:7 29:7 14:3 30:3 14:7 30:7 15:3 31:3 15:7 31:7""",
    )


def test_golden_down_scale():
    """32 rows, 8 columns."""
    assert_expected_inline(
        table(AITER.scale[False], 32, 8),
        """\
0:0 16:0 0:4 16:4 1:0 17:0 1:4 17:4 2:0 18:0 2:4 18:4 3:0 19:0 3:4 19:4
4:0 20:0 4:4 20:4 5:0 21:0 5:4 21:4 6:0 22:0 6:4 22:4 7:0 23:0 7:4 23:4
8:0 24:0 8:4 24:4 9:0 25:0 9:4 25:4 10:0 26:0 10:4 26:4 11:0 27:0 11:4 27:4
12:0 28:0 12:4 28:4 13:0 29:0 13:4 29:4 14:0 30:0 14:4 30:4 15:0 31:0 15:4 31:4
0:1 16:1 0:5 16:5 1:1 17:1 1:5 17:5 2:1 18:1 2:5 18:5 3:1 19:1 3:5 19:5
4:1 20:1 4:5 20:5 5:1 21:1 5:5 21:5 6:1 22:1 6:5 22:5 7:1 23:1 7:5 23:5
8:1 24:1 8:5 24:5 9:1 25:1 9:5 25:5 10:1 26:1 10:5 26:5 11:1 27:1 11:5 27:5
12:1 28:1 12:5 28:5 13:1 29:1 13:5 29:5 14:1 30:1 14:5 30:5 15:1 31:1 15:5 31:5
0:2 16:2 0:6 16:6 1:2 17:2 1:6 17:6 2:2 18:2 2:6 18:6 3:2 19:2 3:6 19:6
4:2 20:2 4:6 20:6 5:2 21:2 5:6 21:6 6:2 22:2 6:6 22:6 7:2 23:2 7:6 23:6
8:2 24:2 8:6 24:6 9:2 25:2 9:6 25:6 10:2 26:2 10:6 26:6 11:2 27:2 11:6 27:6
12:2 28:2 12:6 28:6 13:2 29:2 13:6 29:6 14:2 30:2 14:6 30:6 15:2 31:2 15:6 31:6
0:3 16:3 0:7 16:7 1:3 17:3 1:7 17:7 2:3 18:3 2:7 18:7 3:3 19:3 3:7 19:7
4:3 20:3 4:7 20:7 5:3 21:3 5:7 21:7 6:3 22:3 6:7 22:7 7:3 23:3 7:7 23:7
8:3 24:3 8:7 24:7 9:3 25:3 9:7 25:7 10:3 26:3 10:7 26:7 11:3 27:3 11:7 27:7
12:3 28:3 12:7 28:7 13:3 29:3 13:7 29:7 14:3 30:3 14:7 30:7 15:3 31:3 15:7 31:7""",
    )


@pytest.mark.parametrize("gate_up", (True, False))
@pytest.mark.parametrize("E, R, C", ((1, 32, 64), (3, 64, 128), (2, 96, 320)))
def test_aiter_weight_address(E, R, C, gate_up):
    weight = random_bytes(E, R, C)
    arranged = AITER.weight[gate_up].apply(weight)
    address = [weight_address(e, r, c, R, C, gate_up) for e in range(E) for r in range(R) for c in range(C)]
    assert torch.equal(arranged[address], weight.flatten())


@pytest.mark.parametrize("gate_up", (True, False))
@pytest.mark.parametrize("E, R, C", ((1, 32, 256), (3, 64, 128), (2, 96, 640), (1, 256, 64)))
def test_aiter_scale_address(E, R, C, gate_up):
    """What no scale goes to holds 0x7F."""
    weight, scale = torch.zeros(E, R, C, dtype=torch.uint8).view(E4M3), random_bytes(E, R, C // 32, high=0x7F)
    _, arranged = AITER.arrange(weight, scale, gate_up)
    padded = -(-C // 256) * 8
    assert arranged.shape == (E * R, padded) and arranged.dtype == torch.uint8
    want = torch.full((E * R * padded,), 0x7F, dtype=torch.uint8)
    for e in range(E):
        for r in range(R):
            for y in range(C // 32):
                want[scale_address(e, r, y, R, padded, gate_up)] = scale[e, r, y]
    assert torch.equal(arranged.flatten(), want)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 4).map(lambda n: 32 * n), st.integers(1, 5).map(lambda n: 64 * n))


@given(st.sampled_from(sorted(LAYOUTS)), shapes, st.booleans(), st.integers(0, 2**31))
def test_restore_undoes_arrange(name, shape, gate_up, seed):
    layout = LAYOUTS[name]
    E, R, C = shape
    weight, scale = random_bytes(E, R, C, seed=seed), random_bytes(E, R, C // 32, seed=seed + 1)
    arranged = layout.arrange(weight.view(E4M3), scale, gate_up)
    assert arranged[0].shape == weight.shape and arranged[1].shape == layout.scale_shape(E, R, C)
    back_weight, back_scale = layout.restore(*arranged, gate_up)
    assert torch.equal(back_weight.view(torch.uint8), weight) and torch.equal(back_scale, scale)


@given(st.sampled_from(sorted(LAYOUTS)), shapes, st.booleans(), st.booleans())
def test_offsets_are_the_permutation(name, shape, gate_up, of_scale):
    """``offsets`` are tables for ``apply``: element (e, r, c) goes to rows[e, r] + columns[c // run] + c % run."""
    permutation = (LAYOUTS[name].scale if of_scale else LAYOUTS[name].weight)[gate_up]
    E, R, C = shape
    if of_scale:
        shape = (E, R, C // 8)
    x = torch.arange(E * R * shape[2]).view(shape)
    rows, columns, run = permutation.offsets(shape)
    assert rows.shape == (E, R) and columns.shape == (shape[2] // run,)
    c = torch.arange(shape[2])
    places = rows.unsqueeze(-1) + columns[c // run] + c % run
    flat = torch.full((x.numel(),), -1)
    flat[places.flatten()] = x.flatten()
    assert torch.equal(flat, permutation.apply(x))
    assert torch.equal(permutation.invert(flat, shape), x)


def test_row_major_is_the_identity():
    layout = LAYOUTS["row_major"]
    weight, scale = random_bytes(2, 64, 96), random_bytes(2, 64, 3)
    for gate_up in (True, False):
        data, scales = layout.arrange(weight.view(E4M3), scale, gate_up)
        assert torch.equal(data.view(torch.uint8), weight) and torch.equal(scales, scale)
    assert layout.weight[True].offsets((2, 64, 96))[2] == 96


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_sizes_that_a_layout_takes(name):
    """Exactly the multiples it declares, of H and of I, whichever of the two is the rows."""
    layout = LAYOUTS[name]
    for gate_up in (True, False):
        for hidden in range(32, 1025, 32):
            for intermediate in range(32, 513, 32):
                rows, columns = (2 * intermediate, hidden) if gate_up else (hidden, intermediate)
                takes = name == "row_major" or (hidden % 256 == 0 and intermediate % 128 == 0)
                assert (layout.why_not(rows, columns, gate_up) is None) == takes
    assert_expected_inline(
        f"{AITER.why_not(256, 128, True)}\n{AITER.why_not(256, 192, False)}",
        """\
layout 'aiter_gfx950' takes hidden sizes divisible by 256, not 128
layout 'aiter_gfx950' takes intermediate sizes divisible by 128, not 192""",
    )


@given(shapes, st.integers(1, 8), st.booleans(), st.integers(0, 2**31))
def test_padding_of_the_intermediate_size(shape, multiple, gate_up, seed):
    """Zeros with scale 0x7F behind each half's rows (w1) or each row (w2); everything else stays where it was."""
    (E, I, H), pad_to = shape, 32 * multiple  # noqa: E741
    padded = -(-I // pad_to) * pad_to
    shape = (E, 2 * I, H) if gate_up else (E, H, I)
    weight, scale = random_bytes(*shape, seed=seed), random_bytes(*shape[:2], shape[2] // 32, seed=seed + 1)
    data, scales = pad_intermediate(weight.view(E4M3), scale, gate_up, pad_to)
    want_shape = (E, 2 * padded, H) if gate_up else (E, H, padded)
    assert padded_intermediate(shape, gate_up, pad_to) == data.shape == want_shape
    assert scales.shape == (*want_shape[:2], want_shape[2] // 32)
    for got, was, filler in ((data.view(torch.uint8), weight, 0), (scales, scale, 0x7F)):
        if gate_up:
            got, was = got.view(E, 2, padded, -1), was.view(E, 2, I, -1)
            assert torch.equal(got[:, :, :I], was) and (got[:, :, I:] == filler).all()
        else:
            assert torch.equal(got[..., : was.shape[2]], was) and (got[..., was.shape[2] :] == filler).all()
