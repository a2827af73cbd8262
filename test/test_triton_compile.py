"""Every bundled Triton kernel as machine code for every architecture, compiled with no GPU: what it is made of.

Nothing runs here: right instructions and no spills are shown, right results are not. MXFP8MOE_COMPILE says how much is
compiled: ``few`` (of each tile and kernel one), ``usual`` (the default), ``all`` (all shapes of shapes.csv, dtypes and
layouts). ``tools/check_triton.py`` runs it with other versions of Triton.
"""

import os
import re
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

import torch_mxfp8moe
from helpers import E4M3, FLOATS, MODES
from shapes import rows
from torch_mxfp8moe import configs
from torch_mxfp8moe.arguments import FusedMoe, Preshuffle, QuantizePreshuffle
from torch_mxfp8moe.backends.triton import _interpreted
from torch_mxfp8moe.backends.triton.targets import Target
from torch_mxfp8moe.configs import Gemm, Tiles

pytest.importorskip("triton", reason="needs Triton: pip install triton")
if _interpreted():
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled", allow_module_level=True)

import machine_code  # noqa: E402
import sass  # noqa: E402
from gfx950_simulator import assembly, code_object  # noqa: E402
from test_gpu_hopper import TILES  # noqa: E402
from torch_mxfp8moe.backends.triton import preshuffle, quantize  # noqa: E402
from torch_mxfp8moe.backends.triton.fused_moe import BESIDE_ROUNDING, FEW_ROUTES, MANY_ROUTES, admits, plan  # noqa: E402
from torch_mxfp8moe.backends.triton.gemm import grouped_gemm_kernel  # noqa: E402
from torch_mxfp8moe.backends.triton.hopper import warpgroup_gemm_kernel  # noqa: E402
from torch_mxfp8moe.backends.triton.launch import compile_offline  # noqa: E402
from torch_mxfp8moe.backends.triton.matvec import down_kernel, gate_up_kernel  # noqa: E402
from torch_mxfp8moe.backends.triton.matvec_mma import down_mma_kernel, gate_up_mma_kernel  # noqa: E402
from torch_mxfp8moe.backends.triton.routing import (  # noqa: E402
    combine_kernel, count_kernel, count_round_kernel, dispatch_kernel, place_kernel, route_kernel, route_round_kernel,
    sum_kernel,
)  # fmt: skip

ARCHS = tuple(machine_code.SHARED)
SCOPES = ("few", "usual", "all")
SCOPE = SCOPES.index(os.environ.get("MXFP8MOE_COMPILE", "usual"))


SHAPES = {
    name: dict(
        H=row.hidden, I=row.intermediate, E=row.local, G=row.experts, K=row.topk, bias=row.bias,
        swiglu_limit=row.options["swiglu_limit"],
    )
    for name, row in rows().items()
}  # fmt: skip
"""shapes.csv: what :func:`moe` takes, by model and parallelism."""
M3, M3_TP8, QWEN_TP4, GPT_OSS = "MiniMax-M3 TP4", "MiniMax-M3 TP8", "Qwen3-30B-A3B TP4", "gpt-oss-120b TP1"


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def moe(
    H: int, I: int, E: int, K: int, *, T: int = 64, G: int | None = None, bias: bool = False, scaled: bool = False,
    x_dtype=torch.bfloat16, out_dtype=None, id_dtype=torch.int32, weight_dtype=torch.float32, padded: bool = False,
    layout: str = "row_major", **options,
) -> FusedMoe:  # fmt: skip
    """A call on tensors without memory; ``padded`` adds num_tokens, ``scaled`` gives x that is MXFP8 already."""
    scale_shape = torch_mxfp8moe.LAYOUTS[layout].scale_shape
    if bias:
        options |= dict(w1_bias=empty(E, 2 * I), w2_bias=empty(E, H))
    return FusedMoe(
        empty(T, H, dtype=E4M3 if scaled else x_dtype),
        empty(E, 2 * I, H, dtype=E4M3), empty(*scale_shape(E, 2 * I, H), dtype=torch.uint8),
        empty(E, H, I, dtype=E4M3), empty(*scale_shape(E, H, I), dtype=torch.uint8),
        empty(T, K, dtype=weight_dtype), empty(T, K, dtype=id_dtype),
        hidden_states_scale=empty(T, H // 32, dtype=torch.uint8) if scaled else None,
        expert_map=None if G in (None, E) else empty(G, dtype=torch.int32),
        num_tokens=empty(1, dtype=torch.int32) if padded else None,
        layout=layout, out=empty(T, H, dtype=out_dtype or (torch.bfloat16 if scaled else x_dtype)), **options,
    ).check()  # fmt: skip


GEMMS = ("gemm1", "gemm2")

KERNELS = {
    "gemm": [route_kernel, dispatch_kernel, grouped_gemm_kernel, grouped_gemm_kernel, combine_kernel],
    "hopper": [route_kernel, dispatch_kernel, warpgroup_gemm_kernel, warpgroup_gemm_kernel, combine_kernel],
    "mma": [gate_up_mma_kernel, down_mma_kernel],
    "matvec": [gate_up_kernel, down_kernel],
}
"""Of a layer, by what ``Tiles.kernels`` names."""
ROUTING = [route_kernel], [count_kernel, sum_kernel, place_kernel], []
"""Before the dispatch kernel: mostly; of many routes; of few, but not on AMD GPUs."""


def launches(call: FusedMoe, arch: str, tiles: Tiles) -> list:
    """Those of a layer."""
    parts = plan(call, Target(arch), tiles).bind(call.inputs | {"out": call.out}, call.device)
    expected = KERNELS[tiles.kernels]
    routes = call.tokens * call.topk
    if tiles.gather:
        many = [count_round_kernel, sum_kernel, place_kernel]
        expected = (many if routes > BESIDE_ROUNDING[1] else [route_round_kernel]) + expected[2:]
    elif expected[0] is route_kernel:
        first = ROUTING[1 if routes > MANY_ROUTES else -1 if routes <= FEW_ROUTES and not arch.startswith("gfx") else 0]
        expected = first + expected[1:]
    assert [part.kernel for part in parts] == expected
    return parts


def products(call: FusedMoe, arch: str, tiles: Tiles) -> list:
    """The two that multiply."""
    return [part for part in launches(call, arch, tiles) if "w" in part.arguments]


@cache
def _code(kernel, arch: str) -> machine_code.Code:
    if arch == "gfx950" and code_object.missing() is None:  # or test_gfx950_gates.py skips, and says so
        code, text = code_object.read(kernel.asm["hsaco"]), assembly.parse(kernel.asm["amdgcn"])
        assert code_object.differences(code, text) == []
    return machine_code.read(kernel, arch)


def compiled(launches: list, arch: str, record, stack: int = 0) -> list[machine_code.Code]:
    """``launches`` as code, checked; what equals an earlier one is compiled once. Products may use ``stack`` bytes."""
    record("target", arch)
    record("kernels", len(launches))
    kernels = compile_offline(launches, Target(arch))
    codes = [_code(kernel, arch) for kernel in kernels]
    for launch, kernel, code in zip(launches, kernels, codes):
        if launch.kernel is grouped_gemm_kernel:
            arguments = launch.arguments
            try:
                trips = -(-arguments["K"] // arguments["BLOCK_K"])
                machine_code.check_gemm(code, arguments["SCALED"], arguments["DESCRIPTORS"], stack, trips)
            except AssertionError as error:
                tile = {name: arguments[name] for name in ("GATE_UP", "BLOCK_M", "BLOCK_N", "BLOCK_K", "N", "K")}
                raise AssertionError(f"{tile} {launch.options}: {error}") from None
        elif launch.kernel is warpgroup_gemm_kernel:
            arguments = launch.arguments
            # Words of a tile's own, which no loop that multiplies needs.
            many = arguments["GATHER"] and arguments["BLOCK_M"] == 128 and launch.options["num_warps"] == 4
            stack = 56 if many else 0
            machine_code.check_gemm(code, scaled=False, descriptors=True, stack=stack)
            halved = arguments["BLOCK_N"] * (1 + arguments["GATE_UP"]) == 16 * launch.options["num_warps"]
            apart = 128 * arguments["BLOCK_M"] if halved else 0  # the next 64 columns' activations
            listing = sass.disassemble(kernel.asm["cubin"])
            sass.check_right_operands(listing, apart)
            sass.check_loops_without_spills(listing)
            sass.check_told_in_order(kernel.asm["ptx"])
            programs = (1 << 16) // (launch.options["maxnreg"] * 32 * code.warps)
            assert programs * code.shared <= machine_code.SHARED[arch], f"{programs} do not fit: {code.summary}"
        elif launch.kernel in (gate_up_mma_kernel, down_mma_kernel):
            # With as many registers as for two programs of 8 warps, w2's may keep some of a loop's own words in memory.
            machine_code.check(code, 40 if "maxnreg" in launch.options else 0)
            check_route_by_route(kernel.asm["ptx"], launch)
        else:  # down_kernel may keep a word or two, stored before its loop, for after it
            machine_code.check(code, 16 if launch.kernel is down_kernel else 0)
    return codes


def check_route_by_route(ptx: str, launch) -> None:
    """Of :mod:`.matvec_mma`: two chunks take 32 products. A lane reads 16 codes at once, 8 times for each, and 16 bytes
    of activations; and scale bytes in pairs: as bytes that the loop carries on they would be put into one register,
    which waits for them."""
    assert ptx.count("mma.sync") == 32
    assert ptx.count("ld.global.L2::256B.v4.b32") >= 2 * 8
    assert ptx.count("ld.global.v4.b32") >= 2
    if launch.kernel is down_mma_kernel and launch.arguments["N"] % 64 == 0:
        assert "ld.global.b16" in ptx and not re.search(r"ld\.global\S*\.b8", ptx)


def chosen(call: FusedMoe, arch: str, tiles: Tiles) -> bool:
    """Whether calls like this one get those tiles with the most tokens that these are for."""
    rows = 1e6 if tiles.rows_per_expert is None else tiles.rows_per_expert
    sizes = dict(
        tokens=int(rows * max(call.experts, call.global_experts) / call.topk), hidden=call.hidden,
        intermediate=call.intermediate, experts=max(call.experts, call.global_experts), topk=call.topk,
    )  # fmt: skip
    return tiles == configs.choose(arch, call.activation_dtype, **sizes, admits=lambda x: admits(call, Target(arch), x))


def gemm_cases():
    """(arch, rule, activation dtype, layout, shape) of everything that this scope compiles."""
    for arch, dtype in product(ARCHS, ("mxfp8", "bf16")):
        rules = configs.load(arch, dtype).tiles
        for (rule, tiles), layout, shape in product(enumerate(rules), torch_mxfp8moe.LAYOUTS, SHAPES):
            sizes = SHAPES[shape]
            if torch_mxfp8moe.LAYOUTS[layout].why_not(2 * sizes["I"], sizes["H"], True):
                continue
            call = moe(**sizes, layout=layout, activation_dtype=dtype)
            if not admits(call, Target(arch), tiles):
                continue
            hopper = tiles.kernels == "hopper"
            if hopper and not chosen(call, arch, tiles):
                continue
            last = rule == len(rules) - 1
            if layout != "row_major":  # the architecture it is made for, and one more
                scope = 1 if shape == M3 and arch == "gfx950" else 1 if shape == M3 and arch == "sm_90" and last else 2
            elif dtype == "mxfp8":
                more = hopper if shape in (M3_TP8, QWEN_TP4) else shape == GPT_OSS
                scope = 0 if shape == M3 else 1 if more or shape == QWEN_TP4 and last else 2
            elif shape == GPT_OSS:  # its K tail and biases take most registers; mxfp8 is another kernel if it is scaled
                scope = 0 if last else 1 if Target(arch).scaled else 2
            else:
                scope = 2
            if scope <= SCOPE:
                yield pytest.param(arch, rule, dtype, layout, shape, id=f"{arch}-{rule}-{dtype}-{layout}-{shape}")


@pytest.mark.parametrize("arch, rule, dtype, layout, shape", list(gemm_cases()))
def test_products(arch, rule, dtype, layout, shape, record_property):
    """Both products of a layer, with the tiles that are shipped."""
    call = moe(**SHAPES[shape], layout=layout, activation_dtype=dtype)
    both = products(call, arch, configs.load(arch, dtype).tiles[rule])
    stack = 0
    if layout == "aiter_gfx950" and not arch.startswith("gfx"):
        stack = 512  # weights in another GPU's layout are served, without the descriptors that the tiles are made for
    compiled(both, arch, record_property, stack=stack)


@pytest.mark.parametrize("arch", ARCHS)
def test_products_of_listed_shapes(arch, record_property):
    """The tiles that a file has for certain shapes only: each with the first of them, or, in scope "all", with all."""
    both, met = [], set()
    for dtype in ("mxfp8", "bf16"):
        for (H, I, E, K), rules in configs.load(arch, dtype).shapes.items():
            for tiles in rules:
                for part, gemm in zip(products(moe(H, I, E, K, activation_dtype=dtype), arch, tiles), GEMMS):
                    tile = dtype, tiles.block_m, tiles.gather, gemm, getattr(tiles, gemm)
                    if SCOPE == 2 or tile not in met:
                        both.append(part)
                    met.add(tile)
    if not both:
        pytest.skip(f"the tiles of {arch} are the same for all shapes")
    compiled(both, arch, record_property)


@pytest.mark.parametrize(
    "tiles, sizes",
    [
        pytest.param(tiles, sizes, id=f"{tiles}-{sizes}")
        for tiles, sizes in product(TILES, ((256, 768), (128, 224), (64, 320)))
        if SCOPE == 2 or sizes == (256, 768) or (SCOPE and tiles == next(iter(TILES)))
    ],
)
def test_tiles_of_the_gpu_tests(tiles, sizes, record_property):
    """sm_90, one warp loads: with tiles and K of all kinds, the latter from one step on."""
    H, I = sizes
    call = moe(H, I, 5, 2)
    if not admits(call, Target("sm_90"), TILES[tiles]):
        pytest.skip("the tiles take other H and I")
    compiled(products(call, "sm_90", TILES[tiles]), "sm_90", record_property)


ARGUMENTS = (
    dict(H=6144, I=768, E=128, K=4, T=8),
    dict(H=4096, I=256, E=288, K=8, T=1024, x_dtype=torch.float32, id_dtype=torch.int64, padded=True, bias=True),
    dict(H=2880, I=2880, E=16, G=128, K=1, scaled=True, weight_dtype=torch.float64, apply_router_weight_on_input=True),
    dict(H=3072, I=192, E=256, K=8, T=1024, x_dtype=torch.float16, weight_dtype=torch.float16, activation_dtype="bf16"),
)
"""Between them, every branch of the kernels that depends on an argument."""


@pytest.mark.parametrize(
    "arch, case",
    [
        (arch, case)
        for arch, case in product(ARCHS, range(len(ARGUMENTS)))
        if SCOPE == 2 or (case == 0 and SCOPE) or (case <= 3 * SCOPE and arch in ("sm_90", "gfx950"))
    ],
)
def test_whole_layer(arch, case, record_property):
    call = moe(**ARGUMENTS[case])
    rules = configs.load(arch, call.activation_dtype).tiles
    for kernels in {tiles.kernels for tiles in rules} - {"hopper"}:
        first = next(tiles for tiles in rules if tiles.kernels == kernels)
        compiled(launches(call, arch, first), arch, record_property)


@pytest.mark.parametrize("T, kernel", ((64, route_round_kernel), (2048, count_round_kernel)), ids=("few", "many"))
def test_one_kernel_for_rows_at_any_address(T, kernel):
    """Of activations and of the output: words where they are aligned to them, elements where they are not, so that
    nothing is compiled when the first tensor comes that is not aligned as those of ``warmup`` were."""
    H, tiles = 1024, next(tiles for tiles in TILES.values() if tiles.gather)

    def code(start: int, stride: int) -> list:
        call = moe(H=H, I=256, E=32, K=4, T=T)
        x, out = (empty(T * stride + start).as_strided((T, H), (stride, 1), start) for _ in range(2))
        assert x.data_ptr() % 16 == 2 * start % 16
        parts = launches(replace(call, hidden_states=x, out=out).check(), "sm_90", tiles)
        parts = [part for part in parts if part.kernel in (kernel, combine_kernel)]
        return compile_offline(parts, Target("sm_90"))

    aligned, not_aligned = code(0, H), code(1, H + 3)
    assert len(aligned) == 2 and [one.hash for one in aligned] == [one.hash for one in not_aligned]
    rounding, combine = (one.asm["ptx"] for one in aligned)
    assert rounding.count("ld.global.v4.b32") == 1 and rounding.count("ld.global.b16") == 8
    assert combine.count("st.global.v4.b32") == 1 and combine.count("st.global.b16") == 8


@pytest.mark.skipif(SCOPE < 2, reason="compiles for minutes: MXFP8MOE_COMPILE=all")
@pytest.mark.parametrize("arch, shape", list(product(ARCHS, SHAPES if SCOPE == 2 else [M3])))
def test_routing_of_all_dtypes(arch, shape, record_property):
    parts = []
    ids, weights = (torch.int32, torch.int64), (*FLOATS, torch.float64)
    for T, id_dtype, padded in product((8, 1024), ids, (False, True)):
        call = moe(**SHAPES[shape], T=T, id_dtype=id_dtype, padded=padded)
        parts += launches(call, arch, configs.load(arch).tiles[-1])[:1]
    for x_dtype, activation_dtype in product((*FLOATS, E4M3), ("mxfp8", "bf16")):
        x = dict(scaled=True) if x_dtype is E4M3 else dict(x_dtype=x_dtype)
        for tiles in configs.load(arch, activation_dtype).tiles:
            if tiles.block_m == 1:
                continue
            for T in (8, 1024):
                layer = launches(moe(**SHAPES[shape], T=T, activation_dtype=activation_dtype, **x), arch, tiles)
                parts += [launch for launch in layer if launch.kernel is dispatch_kernel]
    for weight_dtype, out_dtype in product(weights, FLOATS):
        call = moe(**SHAPES[shape], weight_dtype=weight_dtype, out_dtype=out_dtype)
        parts += launches(call, arch, configs.load(arch).tiles[-1])[-1:]
    compiled(parts, arch, record_property)


@pytest.mark.parametrize("arch", ARCHS)
def test_quantize_and_dequantize(arch, record_property):
    parts, device = [], torch.device("meta")
    memory = dict(data=empty(64, 2880, dtype=E4M3), scale=empty(64, 90, dtype=torch.uint8))
    for mode, dtype in product(MODES, FLOATS):
        if SCOPE == 2 or (mode == "rceil") + (dtype is torch.bfloat16) + SCOPE >= 2:
            x = empty(64, 2880, dtype=dtype)
            parts += quantize.quantize(x, mode).bind(memory | {"x": x}, device)
            apart = empty(4, 8, 2, 2880, dtype=dtype).transpose(1, 2)
            parts += quantize.quantize(apart, mode).bind(memory | {"x": apart}, device)
    for dtype in FLOATS if SCOPE else (torch.bfloat16,):
        data, scale = (memory[name] for name in ("data", "scale"))
        parts += quantize.dequantize(data, scale, dtype).bind(memory | {"out": empty(64, 2880, dtype=dtype)}, device)
    assert len(parts) >= 2
    compiled(parts, arch, record_property)


@pytest.mark.parametrize("arch", ARCHS)
def test_preshuffle(arch, record_property):
    parts = []
    layouts = tuple(torch_mxfp8moe.LAYOUTS)[-1 if SCOPE == 0 else 0 :]
    for layout, (gate_up, R, C) in product(layouts, ((True, 1536, 6144), (False, 6144, 768))):
        call = Preshuffle(
            empty(128, R, C, dtype=E4M3), empty(128, R, C // 32, dtype=torch.uint8), layout, gate_up
        ).check()
        memory = dict(
            weight=call.weight, scale=call.scale,
            out_weight=empty(*call.weight_shape, dtype=E4M3), out_scale=empty(*call.scale_shape, dtype=torch.uint8),
        )  # fmt: skip
        parts += preshuffle.preshuffle(call).bind(memory, call.device)
    assert len(parts) == 4 * len(layouts)
    compiled(parts, arch, record_property)


@pytest.mark.parametrize("arch", ARCHS)
def test_quantize_preshuffle(arch, record_property):
    """Of both weights, padded and not; rows that take turns. Values are read and codes written by 16 bytes, the most
    that one instruction moves."""
    parts = []
    for layout, mode, dtype in product(torch_mxfp8moe.LAYOUTS, MODES, FLOATS):
        if SCOPE < 2 and (layout == "aiter_gfx950") + (mode == "rceil") + (dtype is torch.bfloat16) + SCOPE < 3:
            continue
        for gate_up, x, pad_to in (
            (True, empty(128, 1536, 6144, dtype=dtype), 1),
            (True, empty(128, 192, 2, 2048, dtype=dtype).transpose(1, 2), 128),
            (False, empty(128, 2048, 192, dtype=dtype), 128),
        ):
            call = QuantizePreshuffle(x, layout, gate_up, mode, pad_to).check()
            memory = dict(
                x=x, out_weight=empty(*call.weight_shape, dtype=E4M3),
                out_scale=empty(*call.scale_shape, dtype=torch.uint8),
            )  # fmt: skip
            parts += preshuffle.quantize_preshuffle(call).bind(memory, call.device)
    assert len(parts) >= 3
    load, store, wide = r"(global|buffer)_load_", r"(global|buffer)_store_", r"dwordx4"
    if arch.startswith("sm_"):
        load, store, wide = r"ld\.global", r"st\.global", r"\S*\.v4\.b32"
    for code in compiled(parts, arch, record_property):
        assert code.count(load + wide) == code.count(load) > 0 and code.count(store + wide), code.summary


usual = pytest.mark.skipif(SCOPE < 1, reason="of each kernel one: MXFP8MOE_COMPILE=few")


@usual
@pytest.mark.parametrize("arch", ARCHS)
def test_weights_beyond_32_bits(arch, record_property):
    """Offsets of an expert are 64-bit numbers where all experts together pass 2^31 elements."""
    call = moe(H=7168, I=3072, E=384, K=6)
    assert call.w1.numel() > 2**33
    tiles = next(tiles for tiles in configs.load(arch).tiles if tiles.kernels == "gemm")
    both = products(call, arch, tiles)
    for launch, code in zip(both, compiled(both, arch, record_property)):
        strides = [launch.arguments["SCALE_EXPERT_STRIDE"]]
        if not launch.arguments["DESCRIPTORS"]:  # whose coordinates are not multiplied by anything
            strides.append(launch.arguments["EXPERT_STRIDE"])
        for stride in strides:
            assert f"constant {stride} : i64" in code.ttir and f"constant {stride} : i32" not in code.ttir


@usual
@pytest.mark.parametrize("arch", ARCHS)
def test_rows_beyond_32_bits_apart(arch, record_property):
    """Experts, halves and rows of x at distances of 64 bits each."""
    strides = 2**35, 2**34, 2**32 + 64
    x = torch.empty_strided((2, 2, 128, 256), (*strides, 1), dtype=torch.bfloat16, device="meta")
    call = QuantizePreshuffle(x, "aiter_gfx950", True).check()
    memory = dict(
        x=x, out_weight=empty(*call.weight_shape, dtype=E4M3), out_scale=empty(*call.scale_shape, dtype=torch.uint8)
    )
    (code,) = compiled(preshuffle.quantize_preshuffle(call).bind(memory, call.device), arch, record_property)
    for stride in strides:
        assert f"constant dense<{stride}> : tensor<16xi64>" in code.ttir or f"constant {stride} : i64" in code.ttir


def _tiles(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int = 2) -> Tiles:
    gemm = Gemm(block_n, block_k, num_warps, num_stages)
    return Tiles(None, block_m, gemm, gemm)


@usual
@pytest.mark.parametrize(
    "arch, dtype, tiles, complaint",
    [
        ("gfx950", "mxfp8", _tiles(32, 32, 128, 1), "v_mfma_scale.* it is not: .*v_mfma_f32_.*bf16"),
        ("gfx950", "bf16", _tiles(128, 128, 128, 8), "spills: "),
        ("gfx942", "bf16", _tiles(64, 64, 64, 4, 8), "too much shared memory: "),
        ("sm_100", "mxfp8", _tiles(32, 32, 128, 4), r"mxf8f6f4\S* it is not: .*(kind::f16|mma\.sync)"),
        ("sm_100", "mxfp8", _tiles(128, 64, 128, 4), "spills: "),
    ],
    ids=["falls back to bf16", "AMD spills", "AMD shared", "decomposed", "NVIDIA spills"],
)
def test_the_checks_see_bad_tiles(arch, dtype, tiles, complaint, record_property):
    """What compilers do silently with tiles that are not shipped."""
    call = moe(**SHAPES[GPT_OSS], activation_dtype=dtype)
    with pytest.raises(AssertionError, match=complaint):
        compiled(products(call, arch, tiles)[:1], arch, record_property)
