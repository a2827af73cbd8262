"""The static report on gfx950: its counts against ones that are made by hand."""

import sys
from pathlib import Path

import pytest

from torch_mxfp8moe.backends.triton import _interpreted

pytest.importorskip("triton", reason="needs Triton: pip install triton")
if _interpreted():
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import report_gfx950 as report  # noqa: E402
from gfx950_simulator.assembly import instruction, parse  # noqa: E402
from shapes import rows  # noqa: E402
from torch_mxfp8moe import configs  # noqa: E402

LOOP = """
  v_mov_b32_e32 v1, 0
.LBB0_1:
  v_mfma_scale_f32_16x16x128_f8f6f4 v[8:11], v[16:23], v[24:31], v[8:11], v2, v3 op_sel_hi:[0,0,0]
.LBB0_2:
  ds_read_b128 v[16:19], v4
  ds_read_u8 v2, v4 offset:64
  global_load_dwordx4 v[20:23], v5, s[4:5]
  buffer_load_dwordx4 v6, s[8:11], 0 offen lds
  v_exp_f32_e32 v7, v7
  v_mfma_scale_f32_16x16x128_f8f6f4 v[8:11], v[16:23], v[24:31], v[8:11], v2, v3 op_sel_hi:[0,0,0]
  v_mfma_scale_f32_32x32x64_f8f6f4 v[32:47], v[16:23], v[24:31], v[32:47], v2, v3 op_sel_hi:[0,0,0]
  v_mfma_f32_32x32x16_bf16 v[32:47], v[16:19], v[24:27], v[32:47]
  s_waitcnt vmcnt(0)
  s_barrier
  s_add_i32 s0, s0, 1
  s_cbranch_scc1 .LBB0_2
  s_cbranch_vccnz .LBB0_1
  v_mov_b32_e32 v1, 0
  s_endpgm
.amdhsa_kernel loop
.end_amdhsa_kernel
"""


def test_the_loop_with_the_matrix_instructions_is_found():
    loop = report.matrix_loop(parse(LOOP).instructions)
    assert [loop[0].name, loop[-1].name, len(loop)] == ["ds_read_b128", "s_cbranch_scc1", 12]


def test_without_a_loop_all_trips_are_counted():
    straight = LOOP.replace("  s_cbranch_scc1 .LBB0_2\n", "").replace("  s_cbranch_vccnz .LBB0_1\n", "")
    assert report.matrix_loop(parse(straight).instructions)[-1].name == "v_mfma_f32_32x32x16_bf16"


@pytest.mark.parametrize(
    "text, clocks",
    [
        ("v_mfma_scale_f32_16x16x128_f8f6f4 v[8:11], v[16:23], v[24:31], v[8:11], v2, v3", {"MFMA": 32}),
        ("v_mfma_scale_f32_32x32x64_f8f6f4 v[0:15], v[16:23], v[24:31], v[0:15], v2, v3", {"MFMA": 64}),
        ("v_mfma_f32_16x16x32_bf16 v[8:11], v[16:19], v[24:27], v[8:11]", {"MFMA": 16}),
        ("v_add_u32_e32 v1, v2, v3", {"VALU": 4}),
        ("v_exp_f32_e32 v1, v2", {"VALU": 16}),
        ("s_add_i32 s0, s0, 1", {"SALU": 4}),
        ("s_barrier", {}),
        ("ds_read_b128 v[0:3], v4", {"LDS": 8}),
        ("ds_read_u8 v0, v4", {"LDS": 2}),
        ("ds_read2_b64 v[0:3], v4 offset1:1", {"LDS": 8}),
        ("ds_read_b64_tr_b8 v[0:1], v4", {"LDS": 4}),
        ("global_load_dwordx4 v[0:3], v4, s[0:1]", {"VMEM": 16}),
        ("global_load_ubyte v0, v4, s[0:1]", {"VMEM": 4}),
        ("global_load_lds_dwordx4 v4, s[0:1]", {"VMEM": 16, "LDS": 8}),
        ("buffer_load_dwordx4 v6, s[8:11], 0 offen lds", {"VMEM": 16, "LDS": 8}),
    ],
)
def test_clocks(text, clocks):
    assert report.clocks(instruction(0, "", text)) == clocks


def test_a_shipped_tile():
    """128 x 128 x 128 on 4 waves: 2 * 128^3 flop a trip, 4 SIMDs of 2048 flop a clock, and every operand byte once."""
    tile = report.tile("128,128,128,4,2,matrix_instr_nonkdim=16")
    _, second = report.reports(rows()["Qwen3-235B-A22B TP1"], tile)
    assert not second.unrolled and second.k == 128
    assert second.busy["MFMA"] == 2 * 128**3 / (4 * 2048) == 512 and second.counts["MFMA"] == 16
    assert second.busy["VMEM"] >= 2 * 128 * 128 / 64
    assert second.workgroups in (1, 2) and second.in_flight == 128 * 128 * second.workgroups
    assert second.hazards == 0 and second.code.stack == 0


def test_the_prefill_tile_is_bound_by_the_matrix_unit():
    """In the loops of both products; and what the first has after its loop is short beside it."""
    tiles = configs.load("gfx950", "mxfp8").tiles[-1]
    for one in report.reports(rows()["MiniMax-M3 TP4"], tiles):
        assert one.busiest == "MFMA" and not one.narrow and one.block_m == one.rows == 256
        assert one.after < one.depth / one.k * one.busy["MFMA"] / 6


NARROW = sorted(name for name, row in rows().items() if row.intermediate == 192)


@pytest.mark.parametrize("name", NARROW)
def test_the_prefill_tile_of_narrow_experts_is_bound_by_the_matrix_unit(name):
    """Where a tile of 128 columns would be half empty: two workgroups of two waves on a CU, of no more work than there
    is, and in fewer clocks than the tiles that LDS or empty columns hold up."""
    one, _ = report.reports(rows()[name], configs.load("gfx950", "mxfp8").tiles[-1])
    assert one.busiest == "MFMA" and (one.block_m, one.rows, one.tiles) == (256, 128, 3)
    assert (one.warps, one.workgroups) == (2, 2) and one.code.stack == 0 and one.hazards == 0
    assert one.busy["MFMA"] == 2 * 256 * 128 * 128 / (4 * 2048)
    if name == report.NARROW:
        others = [report.alternative(rows()[name], *report.ALTERNATIVES[tile]) for tile in
                  ("256 x 256, the second half empty", "256 x 128")]  # fmt: skip
        assert all(one.whole < 0.9 * other.whole for other in others) and others[1].busiest == "LDS"


def test_waves_that_are_alone_on_a_cu():
    """Two waves leave two SIMDs without work, unless there is room for another workgroup of theirs."""
    alone, paired = (
        report.alternative(rows()[report.NARROW], 256, 64, 2, to_lds, 16) for to_lds in (True, False)
    )  # fmt: skip
    assert (alone.workgroups, paired.workgroups) == (1, 2)
    assert alone.busy["MFMA"] == 2 * paired.busy["MFMA"] and alone.whole > 1.5 * paired.whole
