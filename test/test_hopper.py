"""The product of sm_90 in which one warp loads, as far as it takes no GPU: assembly in it, what checks the machine code
that becomes of it, and its PTX, executed by test/ptx.py."""

import re
from dataclasses import replace

import pytest
import torch

import ptx
import sass
from forced_tiles import warp_specialized
from helpers import assert_agrees, assert_equal, moe_inputs, only_cpu
from torch_mxfp8moe import reference
from torch_mxfp8moe.arguments import FusedMoe
from torch_mxfp8moe.configs import Tiles

pytestmark = only_cpu

OTHER_WIDTH = """
        /*14f0*/                   ULEA UR9, UR5, UR6, 0xd ;
        /*1510*/                   USHF.R.U32.HI UR8, URZ, 0x4, UR9 ;
        /*1560*/                   USGXT.U32 UR8, UR8, 0xe ;
        /*1770*/              @P4  BRA `(.L_x_18) ;
        /*17e0*/                   UMOV UR22, UR8 ;
        /*17f0*/                   UMOV UR23, 0x40000040 ;
        /*1800*/                   UIADD3 UR10, UP0, UR8, 0x2, URZ ;
        /*1820*/                   UMOV UR5, URZ ;
        /*1830*/                   UIADD3.X UR11, UR5, 0x40000040, URZ, UP0, !UPT ;
        /*1850*/                   UIADD3.64 UR30, UR10, 0x2, URZ ;
        /*1860*/                   UIADD3.64 UR26, UR10, 0x4, URZ ;
        /*1e70*/                   HGMMA.64x32x16.F32.BF16 R40, R68, gdesc[UR20], RZ, !UPT ;
        /*1fa0*/                   HGMMA.64x32x16.F32.BF16 R40, R64, gdesc[UR8], R40 ;
        /*2290*/                   HGMMA.64x32x16.F32.BF16 R40, R60, gdesc[UR28], R40 ;
        /*23f0*/                   HGMMA.64x32x16.F32.BF16 R40, R56, gdesc[UR24], R40, gsb0 ;
        /*2440*/                   HGMMA.64x32x16.F32.BF16 R24, R84, gdesc[UR20], RZ, !UPT ;
        /*2450*/                   HGMMA.64x32x16.F32.BF16 R24, R80, gdesc[UR8], R24 ;
        /*2460*/                   HGMMA.64x32x16.F32.BF16 R24, R76, gdesc[UR28], R24 ;
        /*2470*/                   HGMMA.64x32x16.F32.BF16 R24, R72, gdesc[UR24], R24, gsb0 ;
        /*5350*/                   EXIT ;
.L_x_18:
        /*53b0*/                   UMOV UR22, UR8 ;
        /*53c0*/                   UMOV UR23, 0x40000040 ;
        /*53d0*/                   UIADD3 UR8, UP0, UR10, 0x2, URZ ;
        /*53f0*/                   UMOV UR30, UR22 ;
        /*5400*/                   UMOV UR31, UR23 ;
        /*5410*/                   UMOV UR26, UR8 ;
        /*5980*/                   UIADD3.X UR9, UR11, URZ, URZ, UP0, !UPT ;
        /*59b0*/                   UIADD3 UR8, UP0, UR10, 0x4, URZ ;
        /*59e0*/                   UMOV UR27, UR9 ;
        /*59f0*/                   HGMMA.64x64x16.F32.BF16 R56, R104, gdesc[UR20], RZ, !UPT ;
        /*5a00*/                   UIADD3.X UR9, UR11, URZ, URZ, UP0, !UPT ;
        /*5a20*/                   UMOV UR22, UR8 ;
        /*5a60*/                   UMOV UR23, UR9 ;
        /*5cb0*/                   HGMMA.64x64x16.F32.BF16 R56, R108, gdesc[UR8], R56 ;
        /*6000*/                   HGMMA.64x64x16.F32.BF16 R56, R112, gdesc[UR24], R56 ;
        /*6010*/                   HGMMA.64x64x16.F32.BF16 R56, R116, gdesc[UR20], R56, gsb0 ;
        /*6060*/                   HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR28], RZ, !UPT ;
        /*6070*/                   HGMMA.64x64x16.F32.BF16 R24, R92, gdesc[UR8], R24 ;
        /*6080*/                   HGMMA.64x64x16.F32.BF16 R24, R96, gdesc[UR24], R24 ;
        /*6090*/                   HGMMA.64x64x16.F32.BF16 R24, R100, gdesc[UR20], R24, gsb0 ;
        /*9380*/                   EXIT ;
"""
"""What ptxas 12.8 made of the first step of both widths, the instructions for operand addresses and the products only:
the second width takes UR10 and UR11, the second operand's, which only the first one computes."""


def test_operands_of_the_other_width_are_seen():
    branch = "        /*1770*/              @P4  BRA `(.L_x_18) ;\n"
    second = re.search(r"(?s) +/\*1800.*?1830.*?\n", OTHER_WIDTH)[0]
    sass.check_right_operands(OTHER_WIDTH.replace(second, "").replace(branch, second + branch))
    with pytest.raises(AssertionError, match="the operands at 0x59f0, 0x5cb0"):
        sass.check_right_operands(OTHER_WIDTH)
    with pytest.raises(AssertionError, match="no path came by .*0x59f0"):
        sass.check_right_operands(OTHER_WIDTH.replace(branch, ""))


@pytest.mark.parametrize("old, new", [("UR10, 0x2", "UR10, 0x4"), ("UR8, 0x2", "UR8, 0x0"), ("URZ, UP0", "0x1, UP0")])
def test_wrong_distances_are_seen(old, new):
    one_width = OTHER_WIDTH[: OTHER_WIDTH.index(".L_x_18:\n")].replace("BRA `(.L_x_18)", "NOP")
    sass.check_right_operands(one_width)
    with pytest.raises(AssertionError, match="the operands at 0x1e70, 0x1fa0"):
        sass.check_right_operands(one_width.replace(old, new))


def test_operands_by_way_of_the_stack_are_followed():
    one_width = OTHER_WIDTH[: OTHER_WIDTH.index(".L_x_18:\n")].replace("BRA `(.L_x_18)", "NOP")
    moved = "UMOV UR22, UR8 ;"
    spilled = "MOV R200, UR8 ;\nSTL.64 [R1+0x18], R200 ;\nMOV R200, 0x7 ;\nLDL R200, [R1+0x18] ;\nR2UR UR22, R200 ;"
    lines = "\n".join(f"        /*17e{i}*/                   {line}" for i, line in enumerate(spilled.split("\n")))
    through = re.sub(rf" +/\*17e0\*/ +{re.escape(moved)}", lines, one_width)
    assert through != one_width
    sass.check_right_operands(through)
    with pytest.raises(AssertionError, match="the operands at 0x1e70, 0x1fa0"):
        sass.check_right_operands(through.replace("LDL R200, [R1+0x18]", "LDL R200, [R1+0x1c]"))


LOOPS = """
.L_x_1:
        /*0010*/                   STL [R1], R4 ;
.L_x_2:
        /*0020*/               @P0 BRA `(.L_x_3) ;
.L_x_4:
        /*0030*/                   HGMMA.64x32x16.F32.BF16 R40, R68, gdesc[UR20], R40, gsb0 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   LDL R4, [R1] ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_4) ;
"""


def test_spills_of_a_loop_that_multiplies_are_seen():
    sass.check_loops_without_spills(LOOPS)
    spilled = LOOPS.replace("gsb0 ;\n", "gsb0 ;\n        /*0038*/                   LDL R5, [R1+0x4] ;\n")
    with pytest.raises(AssertionError, match="spills: .*LDL R5"):
        sass.check_loops_without_spills(spilled)
    with pytest.raises(AssertionError, match="no loop multiplies"):
        sass.check_loops_without_spills(LOOPS.replace("HGMMA", "FFMA"))


LOADER = """
 st.shared.b64  [%r60+100416], %rd3;
 bar.warp.sync  -1;
 @%p9 mbarrier.arrive.expect_tx.shared.b64 _, [%r40], 24576;
 ld.shared.v4.b32  {%r312, %r314, %r315, %r316}, [%r420+49152];
 bar.sync  0, 128;
 @%p47 mbarrier.arrive.shared::cta.b64 _, [%r338];
"""


@pytest.mark.parametrize(
    "meeting, of", [(" bar.warp.sync  -1;\n", "st.shared.b64"), (" bar.sync  0, 128;\n", "ld.shared.v4")]
)
def test_what_is_told_too_early_is_seen(meeting, of):
    sass.check_told_in_order(LOADER)
    with pytest.raises(AssertionError, match=f"tells of what line . does: {of}"):
        sass.check_told_in_order(LOADER.replace(meeting, ""))
    with pytest.raises(AssertionError, match="nothing is told"):
        sass.check_told_in_order(meeting)


@pytest.mark.parametrize("block", (0, 1))
@pytest.mark.parametrize("count", (2, 4, 8))
def test_scale_bytes(count, block):
    """Every pair of bytes in every register, with bytes of the other block that do not matter, as bf16."""
    hopper = pytest.importorskip("torch_mxfp8moe.backends.triton.hopper", reason="needs Triton: pip install triton")
    assembly = hopper.scale_assembly(count)
    byte = torch.arange(256)
    want = torch.where(byte == 255, float("nan"), 2.0 ** (byte - 130).double()).bfloat16()  # HELD_TIMES is 2^3
    usual = (byte > 3) & (byte < 255)
    selector = torch.tensor(0x4240 + 0x0101 * block)

    def check(pairs: torch.Tensor, branch: bool) -> None:
        """pairs [count, lanes, 2]"""
        junk = torch.randint(0, 2**32, pairs.shape[:2], generator=torch.Generator().manual_seed(0))
        words = junk & (0x00FF00FF << 8 * (1 - block)) | (pairs[..., 0] | pairs[..., 1] << 16) << 8 * block
        selectors = [selector.expand(words.shape[1])] * 2
        registers = ptx.evaluate(assembly, [x.to(torch.uint32).numpy() for x in (*words, *selectors)], count)
        assert registers["rare"].any() != branch
        halves = torch.stack([torch.from_numpy(registers[f"${i}"].view("u2")).view(-1, 2) for i in range(count)])
        assert_equal(halves.view(torch.bfloat16), want[pairs])

    for tried, branch in ((byte[usual], True), (byte, False)):
        pairs = torch.cartesian_prod(tried, tried)
        check(torch.stack([pairs.roll(7 * i, 0) for i in range(count)]), branch)
    for rare in byte[~usual]:  # a single one is enough
        for i in range(2 * count):
            pairs = torch.full((2 * count,), 127)
            pairs[i] = rare
            check(pairs.view(count, 1, 2), False)


@pytest.mark.parametrize("last, power", [("mov", 1), ("rcp.approx.ftz", -1)])
def test_one_plus_power(last, power):
    """Of all exponents, an infinity and NaN as well: no infinity becomes NaN."""
    hopper = pytest.importorskip("torch_mxfp8moe.backends.triton.hopper", reason="needs Triton: pip install triton")
    x = torch.tensor([-float("inf"), float("inf"), float("nan"), *torch.linspace(-150, 125, 1101)])
    registers = ptx.evaluate(hopper.one_plus_power_assembly(last), [x.view(torch.uint32).numpy()], 1)
    result = torch.from_numpy(registers["$0"].view("f4"))
    torch.testing.assert_close(result, ((1 + x.double().exp2()) ** power).float(), rtol=3e-7, atol=0, equal_nan=True)
    assert result[:2].tolist() == [1, float("inf") if power == 1 else 0] and result[2].isnan()


# The whole kernel, executed


def in_product_order(x: torch.Tensor) -> torch.Tensor:
    """Of [R, N], N a multiple of 64."""
    from torch_mxfp8moe.backends.triton.memory import in_product_order

    return x[:, in_product_order.fn(torch.arange(x.shape[1]))]


def list_routes(call: FusedMoe, block_m: int) -> dict[str, torch.Tensor]:
    """What the kernels of routing write, for local experts and routes that all go somewhere."""
    ids = call.topk_ids.flatten().long()
    end = ids.bincount(minlength=call.experts).cumsum(0)
    offsets = torch.cat((end.new_zeros(1), end))
    experts = range(call.experts)
    tiles = [(expert, slot) for expert in experts for slot in range(offsets[expert], offsets[expert + 1], block_m)]
    return dict(routes=ids.argsort(stable=True), offsets=offsets, tiles=torch.tensor(tiles))


def execute(tiles: Tiles, inputs: dict, options: dict, seed: int = 0, change=lambda text: text) -> torch.Tensor:
    """What both products' PTX makes of a call, with ``change`` to it; what comes before and after them is PyTorch's.
    Two programs have all tiles."""
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    from torch_mxfp8moe.backends.triton import fused_moe
    from torch_mxfp8moe.backends.triton.launch import compile_offline
    from torch_mxfp8moe.backends.triton.targets import Target

    target = Target("sm_90")
    call = FusedMoe(**inputs, **options).check().with_out()
    launches = fused_moe.plan(call, target, tiles).bind(call.inputs | {"out": call.out}, call.device)
    launches = [launch for launch in launches if launch.kernel.__name__ == "warpgroup_gemm_kernel"]
    first = launches[0].arguments
    lists = list_routes(call, tiles.block_m)
    first["tiles"].fill_(-1)
    for name, values in lists.items():
        first[name][: len(values)] = values
    first["counters"].zero_()
    x = call.hidden_states.float()
    if call.activation_dtype == "mxfp8":
        x = reference.dequantize_1x32(*reference.quantize_1x32(call.hidden_states), torch.float32)
    routes = lists["routes"]
    x = in_product_order(8 * x).bfloat16()  # HELD_TIMES is 2^3
    if tiles.gather:
        first["x"].copy_(x)
    else:
        first["x"].base.copy_(x[routes // call.topk])
    for launch, kernel in zip(launches, compile_offline(launches, target)):
        launch.arguments["out"].fill_(torch.nan)  # which is where x was, of the second one
        text = change(kernel.asm["ptx"])
        ptx.run(text, kernel, replace(launch, grid=(min(2, *launch.grid),)), seed)
        assert not first["counters"].any()
    terms = torch.empty(len(routes), call.hidden)
    terms[routes] = launches[1].arguments["out"].float()
    terms = terms.view(-1, call.topk, call.hidden)
    if not call.apply_router_weight_on_input:
        terms = terms * call.topk_weights.float()[..., None]
    return terms.sum(1).to(call.result_dtype)


EIGHT_SLOTS = warp_specialized(8, (64, 128, 4, 3, 2), (64, 128, 4, 3, 2))
TURNS = warp_specialized(16, (64, 128, 4, 4, 1, 2), (64, 128, 4, 4, 1, 2))
FULL_AND_HALF_FULL = warp_specialized(32, (128, 64, 4, 4, 2), (128, 64, 4, 3, 2))
GATHERED = warp_specialized(32, (128, 64, 4, 4, 2), (128, 64, 4, 4, 2), gather=True)
EIGHT_WARPS = warp_specialized(64, (256, 64, 8, 3, 1), (256, 64, 8, 4, 1), gather=True)
MANY_SLOTS = warp_specialized(128, (256, 64, 8, 3, 1), (128, 64, 4, 4, 2), gather=True)
EXECUTED = {
    "8 slots": (EIGHT_SLOTS, dict(T=5, H=256, I=128, E=3, K=2), {}),
    "8 slots, bf16 activations, half a step": (
        EIGHT_SLOTS, dict(T=3, H=320, I=96, E=2, K=2), dict(activation_dtype="bf16")
    ),
    "turns": (TURNS, dict(T=4, H=384, I=192, E=2, K=2), {}),
    "turns, fp32, an odd number of stages": (TURNS, dict(T=3, H=320, I=192, E=2, K=1, dtype=torch.float32), {}),
    "full and half full": (
        FULL_AND_HALF_FULL, dict(T=40, H=192, I=64, E=2, K=1, bias_dtype=torch.float32),
        dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=0.5),
    ),
    "gathered": (GATHERED, dict(T=20, H=192, I=64, E=2, K=2), {}),
    "gathered, router weight on the input": (
        GATHERED, dict(T=20, H=256, I=96, E=1, K=1, weight_dtype=torch.bfloat16),
        dict(apply_router_weight_on_input=True),
    ),
    "gathered, eight warps": (EIGHT_WARPS, dict(T=36, H=192, I=160, E=2, K=2), {}),
    "many slots, the next tile's scales early": (MANY_SLOTS, dict(T=90, H=320, I=160, E=3, K=2), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", EXECUTED)
def test_executed(case):
    tiles, sizes, options = EXECUTED[case]
    inputs = moe_inputs(**sizes)
    inputs["w1_scale"][0, ::7, 1] = torch.arange(4, dtype=torch.uint8).repeat(99)[: len(inputs["w1_scale"][0, ::7])]
    want = reference.fused_moe(**inputs, **options)
    assert want.isfinite().all() and want.any()
    first = execute(tiles, inputs, options)
    assert_agrees(first, want)
    assert_equal(execute(tiles, inputs, options, seed=1), first)


MUTATIONS = {
    "a stage given back before all have read it": (GATHERED, r"\tbar\.sync[^\n]*\n", "", "nothing orders them"),
    "not waited for a product": (EIGHT_SLOTS, r"wait_group\.sync\.aligned 1", "wait_group.sync.aligned 2", "is in use"),
    "not waited for a stage": (
        EIGHT_SLOTS, r"mbarrier\.try_wait\S* complete, ", "setp.eq.u32 complete, 0, 0; //", "nothing orders them"
    ),
    "no fence": (GATHERED, r"fence\.proxy\.async[^\n]*\n", "", "no fence"),
    "more bytes": (EIGHT_SLOTS, r"(expect_tx\S* _, \[\S+\]), (\d+)", r"\1, 1\2", "all warps wait"),
    "fewer arrivals": (GATHERED, r"(mbarrier\.init\S* \[\S+\]), 64", r"\1, 32", "nothing orders them"),
    "more arrivals": (EIGHT_SLOTS, r"(mbarrier\.init\S* \[\S+\]), 1", r"\1, 2", "all warps wait"),
    "another scale": (EIGHT_SLOTS, r"(mad\.lo\.u32 \S+ \w+), 0x80,", r"\1, 0x40,", "relative L2"),
    "a row that there is not": (EIGHT_SLOTS, r"min\.s32", "max.s32", "are of no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_execution_finds(name):
    """Errors that are planted in the text."""
    tiles, pattern, replacement, message = MUTATIONS[name]
    inputs = moe_inputs(T=20, H=192, I=64, E=1, K=1) if tiles.gather else moe_inputs(T=3, H=640, I=64, E=1, K=1)
    want = reference.fused_moe(**inputs)
    assert_agrees(execute(tiles, inputs, {}), want)
    with pytest.raises(AssertionError, match=message):  # which no text does that has nothing to change
        assert_agrees(execute(tiles, inputs, {}, change=lambda text: re.sub(pattern, replacement, text)), want)
