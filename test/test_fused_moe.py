"""``fused_moe``: the reference against a float64 loop, the backends against the reference, the contract's edges."""

import csv
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import device
import oracle
import torch_mxfp8moe
from device import DEVICE
from helpers import (
    BACKEND,
    E8M0,
    ERRORS,
    FLOATS,
    HERE,
    OPS,
    as_bytes,
    assert_agrees,
    check_op,
    kernels,
    moe_inputs,
    rand,
    random_bytes,
    relative_l2,
    same_bytes,
    small,
)
from torch_mxfp8moe import configs, reference
from torch_mxfp8moe.arguments import FusedMoe

TOKENS = (0, 1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65, 130)
ROUTING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GPT_OSS = dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=7.0)


def fused_moe(inputs: dict, **options) -> torch.Tensor:
    """The op. Naming the backend that is tested has to give the same bits."""
    result = OPS.fused_moe(**inputs, **options)
    if device.NAME != "interpreter":  # slow
        assert same_bytes(result, OPS.fused_moe(**inputs, **options, backend=BACKEND))
    return result


def assert_like_reference(inputs: dict, **options) -> torch.Tensor:
    got = fused_moe(inputs, **options)
    assert got.is_contiguous()
    assert_agrees(got, reference.fused_moe(**inputs, **options))
    return got


# --- the reference against an independent loop


def assert_like_oracle(inputs: dict, **options) -> None:
    """The reference in fp32 is the float64 loop, but for what a rounding to MXFP8 that flips makes of fp32's errors."""
    got = oracle.array(reference.fused_moe(**inputs, **options, out_dtype=torch.float32))
    want = oracle.fused_moe(**inputs, **options)
    errors = np.linalg.norm(got - want, axis=1) / np.maximum(np.linalg.norm(want, axis=1), 1e-30)
    assert np.median(errors) <= 1e-6 and relative_l2(torch.from_numpy(got), torch.from_numpy(want)) <= 2e-3
    assert np.array_equal((got == 0).all(1), (want == 0).all(1))


ORACLE_CASES = {
    "plain": (dict(), dict()),
    "bf16 activations": (dict(), dict(activation_dtype="bf16")),
    "fp32 input": (dict(dtype=torch.float32), dict()),
    "fp16 input, int64 ids": (dict(dtype=torch.float16, id_dtype=torch.int64), dict()),
    "MXFP8 input": (dict(scaled=True), dict()),
    "MXFP8 input, bf16 intermediate": (dict(scaled=True), dict(activation_dtype="bf16")),
    "gpt-oss with biases": (dict(bias_dtype=torch.bfloat16), GPT_OSS),
    "clamped SwiGLU": (dict(), dict(swiglu_limit=0.5)),
    "router weight on the input": (dict(K=1, bias_dtype=torch.float32), dict(apply_router_weight_on_input=True)),
    "fp64 routing weights and biases": (dict(weight_dtype=torch.float64, bias_dtype=torch.float64), dict()),
    "many experts per token": (dict(E=6, K=6, H=96, I=96), dict(swiglu_limit=10.0)),
    "one token": (dict(T=1, H=32, I=32, E=1, K=1), dict()),
}


@pytest.mark.parametrize("case", ORACLE_CASES)
def test_reference_is_the_definition(case):
    sizes, options = ORACLE_CASES[case]
    assert_like_oracle(moe_inputs(**dict(T=7, H=96, I=64, E=5, K=2) | sizes, seed=3), **options)


def test_reference_of_routes_that_add_nothing():
    inputs = moe_inputs(T=9, G=8, E=3, K=2, id_dtype=torch.int64)
    inputs["topk_ids"][1] = -1
    inputs["topk_ids"][2, 1] = 2**32 + 3
    inputs["topk_ids"][3] = torch.tensor([8, -(2**63)])
    expert_map = torch.tensor([2, -1, 0, -1, 1, 7, -5, -1], dtype=torch.int32)
    assert_like_oracle(inputs | dict(expert_map=expert_map))
    assert_like_oracle(inputs | dict(expert_map=expert_map, num_tokens=torch.tensor(6, dtype=torch.int32)))
    assert_like_oracle(inputs)


@settings(max_examples=30)
@given(st.data())
def test_reference_is_the_definition_for_any_combination(data):
    K = data.draw(st.integers(1, 4), "K")
    limit = data.draw(st.none() | st.floats(0.01, 20), "limit")
    inputs = moe_inputs(
        T=data.draw(st.integers(0, 6), "T"),
        H=32 * data.draw(st.integers(1, 3), "H / 32"),
        I=32 * data.draw(st.integers(1, 3), "I / 32"),
        E=data.draw(st.integers(1, 5), "E"),
        K=K,
        G=7 if (local := data.draw(st.booleans(), "expert map")) else None,
        dtype=data.draw(st.sampled_from(FLOATS), "dtype"),
        id_dtype=data.draw(st.sampled_from((torch.int32, torch.int64)), "ids"),
        weight_dtype=data.draw(st.sampled_from(ROUTING_DTYPES), "routing"),
        bias_dtype=data.draw(st.none() | st.sampled_from(ROUTING_DTYPES), "biases"),
        scaled=data.draw(st.booleans(), "scaled"),
        seed=data.draw(st.integers(0, 10**6), "seed"),
    )
    if local:
        entries = data.draw(st.lists(st.integers(-2, 6), min_size=7, max_size=7), "entries")
        inputs["expert_map"] = torch.tensor(entries, dtype=torch.int32)
    if inputs["hidden_states"].shape[0] == 0:
        assert reference.fused_moe(**inputs).shape == (0, inputs["w1"].shape[2])
        return
    assert_like_oracle(
        inputs,
        swiglu_alpha=data.draw(st.floats(-2, 4), "alpha"),
        swiglu_beta=data.draw(st.floats(-1, 2), "beta"),
        swiglu_limit=limit,
        apply_router_weight_on_input=K == 1 and data.draw(st.booleans(), "on input"),
        activation_dtype=data.draw(st.sampled_from(("mxfp8", "bf16")), "activations"),
    )


@pytest.mark.parametrize("precision", ("highest", "high", "medium"))
def test_reference_does_not_depend_on_matmul_precision(precision):
    inputs = moe_inputs(T=40, H=128, I=96, K=3, dtype=torch.float32)
    want = reference.fused_moe(**inputs)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=precision == "medium"):
            assert same_bytes(reference.fused_moe(**inputs), want)
    finally:
        torch.set_float32_matmul_precision(before)


# --- the op against the reference


@dataclass(frozen=True)
class Shape:
    """A row of shapes.csv cut down: K, SwiGLU and biases as they are, an odd fraction of H and I, fewer experts."""

    name: str
    sizes: dict
    options: dict

    @property
    def inputs(self) -> dict:
        return moe_inputs(**self.sizes)


CUT = {192: 192, 256: 64, 384: 160, 512: 288, 768: 96, 1536: 224, 2048: 128, 2880: 352}
"""Per-rank intermediate sizes of shapes.csv and what stands for them: most are not divisible by 128."""


@cache
def shapes() -> dict[str, Shape]:
    result = {}
    with (HERE / "shapes.csv").open() as file:
        for row in csv.DictReader(file):
            per_rank = int(row["per_rank_intermediate"])
            K, E = int(row["topk"]), int(row["experts"])
            expert_parallel = row["parallel"].startswith("EP")
            sizes = dict(
                H=-(-int(row["hidden"]) // 1024) * 32,
                I=CUT[per_rank],
                E=K + 3 + E % 2,
                K=K,
                G=4 * K if expert_parallel else None,
                bias_dtype=torch.bfloat16 if row["bias"] == "yes" else None,
            )
            options = dict(
                swiglu_alpha=float(row["swiglu_alpha"]),
                swiglu_beta=float(row["swiglu_beta"]),
                swiglu_limit=float(row["swiglu_limit"]) if row["swiglu_limit"] else None,
            )
            name = f"{row['model']}, I={per_rank} {row['parallel'].split()[0]}"
            result[name] = Shape(name, sizes, options)
    return result


def expert_map_of(sizes: dict) -> dict:
    """An expert map for inputs with G global experts: every other one is local, in reverse order."""
    G, E = sizes["G"], sizes["E"]
    if G is None:
        return {}
    expert_map = torch.full((G,), -1, dtype=torch.int32)
    local = torch.arange(0, G, 2)[:E]
    expert_map[local] = torch.arange(len(local), dtype=torch.int32).flip(0)
    return dict(expert_map=expert_map)


@pytest.mark.parametrize("T", [pytest.param(T, marks=kernels) if T in (1, 3, 17, 65) else T for T in TOKENS])
@pytest.mark.parametrize("name", shapes())
def test_shapes(name, T):
    """Every row at every token count; input and output dtypes, id dtypes and activations take turns."""
    shape = shapes()[name]
    turn = list(shapes()).index(name) + TOKENS.index(T)
    sizes = shape.sizes | dict(T=T, dtype=FLOATS[turn % 3], id_dtype=(torch.int32, torch.int64)[turn % 2], seed=turn)
    inputs = moe_inputs(**sizes) | expert_map_of(sizes)
    if "fused shared" in name:  # the last expert takes every token, at weight 1
        inputs["topk_ids"][:, -1] = sizes["E"] - 1
        inputs["topk_weights"][:, -1] = 1
    inputs["hidden_states"] *= 8 if shape.options["swiglu_limit"] else 1  # so that the clamp is met
    for activation in ("mxfp8", "bf16"):
        for out_dtype in {FLOATS[turn // 3 % 3], torch.float32}:
            got = assert_like_reference(inputs, **shape.options, activation_dtype=activation, out_dtype=out_dtype)
            assert got.shape == (T, sizes["H"]) and got.dtype == out_dtype


def test_shapes_meet_the_clamp():
    """The clamp of the rows that have one changes their results."""
    for shape in shapes().values():
        if shape.options["swiglu_limit"]:
            inputs = moe_inputs(**shape.sizes | dict(T=9))
            inputs["hidden_states"] *= 8
            clamped = reference.fused_moe(**inputs, **shape.options)
            free = reference.fused_moe(**inputs, **shape.options | dict(swiglu_limit=None))
            assert relative_l2(clamped, free) > 0.02, shape.name


@pytest.mark.parametrize("T", (1, 19))
@pytest.mark.parametrize("H, I", ((2048, 768), (2048, 192), (1440, 2880), (2880, 96), (32, 4096)))
def test_whole_rows(H, I, T):  # noqa: E741
    """Real lengths of rows, with two experts."""
    inputs = moe_inputs(T=T, H=H, I=I, E=2, K=2)
    activation = "mxfp8" if T == 1 else "bf16"
    assert_like_reference(inputs, activation_dtype=activation, out_dtype=torch.float32)


@kernels
@pytest.mark.parametrize("T, E, K", ((300, 2, 2), (515, 3, 1), (257, 40, 8), (64, 64, 1), (3, 2, 40), (4, 300, 6)))
def test_many_tokens_or_routes(T, E, K):
    inputs = moe_inputs(T=T, H=64, I=96, E=E, K=K)
    assert_like_reference(inputs, **GPT_OSS)
    assert_like_reference(inputs, activation_dtype="bf16", out_dtype=torch.float32)


@kernels
@pytest.mark.parametrize("H, I", ((32, 32), (32, 96), (96, 32), (160, 352), (352, 160), (288, 224)))
def test_odd_sizes(H, I):  # noqa: E741
    for T in (1, 4, 5, 6, 11, 18):
        inputs = moe_inputs(T=T, H=H, I=I, E=3, K=2, bias_dtype=torch.float32, seed=T)
        for activation in ("mxfp8", "bf16"):
            assert_like_reference(inputs, **GPT_OSS, activation_dtype=activation, out_dtype=torch.float32)


@small
@kernels
@pytest.mark.parametrize("activation", ("mxfp8", "bf16"))
@pytest.mark.parametrize("out_dtype", (None, *FLOATS), ids=str)
@pytest.mark.parametrize("scaled", (False, True), ids=("", "scaled"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(dtype, scaled, out_dtype, activation):
    """Without ``out_dtype`` the result has that of the hidden states, bf16 if those are MXFP8."""
    inputs = moe_inputs(T=5, H=96, I=64, dtype=dtype, scaled=scaled)
    got = assert_like_reference(inputs, activation_dtype=activation, out_dtype=out_dtype)
    assert got.dtype == (out_dtype or (torch.bfloat16 if scaled else dtype))


@kernels
@pytest.mark.parametrize("seed", [pytest.param(seed, marks=small) if seed < 6 else seed for seed in range(20)])
def test_random_combinations(seed):
    """Arguments at random, all at once."""
    rng = np.random.default_rng(seed)
    choice = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    sizes = dict(
        T=choice(*TOKENS[1:]),
        H=32 * choice(1, 2, 3, 5, 8),
        I=32 * choice(1, 2, 3, 5, 6),
        E=choice(1, 2, 5, 9),
        K=choice(1, 1, 2, 4, 8),
        G=choice(None, 16),
        dtype=choice(*FLOATS),
        id_dtype=choice(torch.int32, torch.int64),
        weight_dtype=choice(*ROUTING_DTYPES),
        bias_dtype=choice(None, *ROUTING_DTYPES),
        scaled=choice(True, False),
        seed=seed,
    )
    inputs = moe_inputs(**sizes)
    if sizes["G"]:
        inputs["expert_map"] = torch.tensor(rng.integers(-2, sizes["E"] + 2, sizes["G"], dtype=np.int32))
    if choice(True, False):
        inputs["num_tokens"] = torch.tensor(rng.integers(0, sizes["T"] + 1), dtype=torch.int32)
    assert_like_reference(
        inputs,
        swiglu_alpha=choice(1.0, 1.702),
        swiglu_beta=choice(0.0, 1.0),
        swiglu_limit=choice(None, 7.0, 0.1),
        apply_router_weight_on_input=sizes["K"] == 1 and choice(True, False),
        activation_dtype=choice("mxfp8", "bf16"),
        out_dtype=choice(None, *FLOATS),
    )


@small
@kernels
@pytest.mark.parametrize("activation", ("mxfp8", "bf16"))
@pytest.mark.parametrize("alpha, beta", ((0.0, 0.0), (-1.702, -1.0), (50.0, 3.0), (1e4, 1.0), (1.0, 1e3)))
def test_extreme_activations(alpha, beta, activation):
    """sigmoid at arguments where exp overflows."""
    inputs = moe_inputs(T=6, H=96, I=64, dtype=torch.float32)
    inputs["hidden_states"] *= 30
    assert_like_reference(inputs, swiglu_alpha=alpha, swiglu_beta=beta, activation_dtype=activation)


@small
@kernels
@pytest.mark.parametrize("magnitude", (1e-38, 1e-30, 1e-18, 1e10, 1e17))
def test_extreme_magnitudes(magnitude):
    """MXFP8 scales at the ends of their range, sums that are subnormal or nearly overflow."""
    inputs = moe_inputs(T=6, H=96, I=64, dtype=torch.float32)
    inputs["hidden_states"] *= magnitude
    assert_like_reference(inputs)
    assert_like_reference(inputs, swiglu_beta=1.0)
    assert_like_reference(inputs, swiglu_limit=1e-3)


@small
def test_limits_beyond_fp32():
    """Options are used as fp32: a huge limit clamps nothing, one that rounds to zero clamps all of ``up`` to it."""
    inputs = moe_inputs(T=6, dtype=torch.float32)
    assert same_bytes(assert_like_reference(inputs, swiglu_limit=1e300), fused_moe(inputs))
    assert assert_like_reference(inputs, swiglu_limit=1e-320).eq(0).all()
    assert_like_reference(inputs, swiglu_limit=1e-320, swiglu_beta=1.0)
    assert_like_reference(inputs, swiglu_alpha=1e39, swiglu_limit=7.0)


# --- arguments one by one


@small
@pytest.mark.parametrize("dtype", ROUTING_DTYPES, ids=str)
def test_routing_weights_and_biases_are_used_as_fp32(dtype):
    inputs = moe_inputs(T=5, weight_dtype=dtype, bias_dtype=dtype)
    names = ("topk_weights", "w1_bias", "w2_bias")
    got = assert_like_reference(inputs)
    assert same_bytes(got, fused_moe(inputs | {name: inputs[name].float() for name in names}))
    for name in names[1:]:
        without = assert_like_reference({n: x for n, x in inputs.items() if n != name})
        assert relative_l2(without, got) > 0.05


@kernels
@pytest.mark.parametrize("bias", (None, torch.float32), ids=str)
@pytest.mark.parametrize("activation", ("mxfp8", "bf16"))
@pytest.mark.parametrize("T", (1, pytest.param(6, marks=small), 40))
def test_router_weight_on_input(T, activation, bias):
    inputs = moe_inputs(T=T, K=1, bias_dtype=bias)
    inputs["topk_weights"] = rand(T, 1, seed=1) + 0.7
    got = assert_like_reference(inputs, apply_router_weight_on_input=True, activation_dtype=activation)
    assert relative_l2(fused_moe(inputs, activation_dtype=activation), got) > 0.01
    inputs["topk_weights"].fill_(1)
    plain = assert_like_reference(inputs, activation_dtype=activation)
    assert same_bytes(plain, fused_moe(inputs, apply_router_weight_on_input=True, activation_dtype=activation))


@small
def test_hidden_states_that_arrive_quantised():
    """The op's own quantiser made them: then the result is that of the call that quantises, bit for bit."""
    inputs = moe_inputs(T=9, H=96, I=64)
    x, scale = OPS.quantize_1x32(inputs["hidden_states"])
    scaled = inputs | dict(hidden_states=x, hidden_states_scale=scale)
    for out_dtype in FLOATS:
        assert same_bytes(fused_moe(inputs, out_dtype=out_dtype), fused_moe(scaled, out_dtype=out_dtype))
    assert_like_reference(scaled, activation_dtype="bf16")


@small
@kernels
def test_any_scale_of_hidden_states():
    """Codes and scales that no quantiser makes: scales from 2^-47 to 2^33, zeros, subnormals, a NaN in one row."""
    inputs = moe_inputs(T=8, H=96, I=64)
    codes = random_bytes(8, 96)
    inputs["hidden_states"] = torch.where(codes % 128 == 127, 0, codes).view(torch.float8_e4m3fn)
    inputs["hidden_states_scale"] = random_bytes(8, 3, low=80, high=160)
    assert_like_reference(inputs, out_dtype=torch.float32)
    clean = fused_moe(inputs, swiglu_limit=7.0)
    inputs["hidden_states_scale"][3, 1] = 255
    inputs["hidden_states"].view(torch.uint8)[5, 40] = 0x7F
    got = assert_like_reference(inputs, swiglu_limit=7.0)
    assert got[[3, 5]].isnan().all()
    rest = [0, 1, 2, 4, 6, 7]
    assert same_bytes(got[rest], clean[rest])


HOSTILE = {
    torch.int64: (-1, 4, 5, -2, 2**31 - 1, 2**31, 2**31 + 1, 2**32, 2**32 + 3, -(2**32) + 1, 2**63 - 1, -(2**63)),
    torch.int32: (-1, 4, 5, -2, 2**31 - 1, -(2**31), -(2**31) + 1, 2**16, 2**24 + 1),
}


@small
@kernels
@pytest.mark.parametrize("mapped", (False, True), ids=("", "expert map"))
@pytest.mark.parametrize("id_dtype", HOSTILE, ids=str)
def test_hostile_ids(id_dtype, mapped):
    """Each before and after a good route, and alone: as if the route were not there, zeros if it is alone."""
    bad = torch.tensor(HOSTILE[id_dtype], dtype=id_dtype)
    n = len(bad)
    inputs = moe_inputs(T=3 * n, E=4, K=2, id_dtype=id_dtype, dtype=torch.float32)
    if mapped:
        inputs["expert_map"] = torch.tensor([3, 2, 1, 0], dtype=torch.int32)
    clean = dict(inputs, topk_weights=inputs["topk_weights"].clone())
    inputs["topk_ids"] = inputs["topk_ids"].clone()
    for group, slot in ((0, 0), (1, 1), (2, 0), (2, 1)):
        rows = slice(group * n, (group + 1) * n)
        inputs["topk_ids"][rows, slot] = bad
        clean["topk_weights"][rows, slot] = 0
    for options in (dict(), dict(activation_dtype="bf16", swiglu_limit=7.0)):
        got = assert_like_reference(inputs, **options)
        assert_agrees(got, fused_moe(clean, **options), 1e-6)
        assert as_bytes(got[2 * n :]).eq(0).all() and (got[: 2 * n].abs().sum(1) > 0).all()


@small
def test_hostile_ids_with_hostile_weights():
    """What a route that adds nothing would be weighted with does not matter."""
    inputs = moe_inputs(T=8, K=2)
    inputs["topk_ids"][:, 1] = -1
    want = fused_moe(inputs)
    for value in (float("nan"), float("inf"), 3e38):
        inputs["topk_weights"][:, 1] = value
        assert same_bytes(assert_like_reference(inputs), want)


@pytest.mark.parametrize("id_dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("bias", (None, torch.float32), ids=str)
@pytest.mark.parametrize("T", (1, pytest.param(9, marks=small), 70))
def test_expert_map_shards_sum_to_the_whole(T, bias, id_dtype):
    """12 experts dealt to three ranks in any order: the sum of their results is that of one rank with all of them."""
    whole = moe_inputs(T=T, E=12, K=4, bias_dtype=bias, id_dtype=id_dtype)
    want = assert_like_reference(whole, out_dtype=torch.float32)
    order = rand(12, seed=T).argsort()
    total = torch.zeros_like(want)
    for mine in (order[:5], order[5:6], order[6:]):
        expert_map = torch.full((12,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(len(mine), dtype=torch.int32)
        names = [name for name in whole if name.startswith("w")]
        shard = whole | {name: whole[name][mine] for name in names} | dict(expert_map=expert_map)
        part = assert_like_reference(shard, out_dtype=torch.float32)
        idle = ~torch.isin(whole["topk_ids"], mine).any(1)
        assert as_bytes(part[idle]).eq(0).all() and (part[~idle] != 0).any(1).all()
        total += part
    assert_agrees(total, want)


@small
def test_expert_map_with_entries_that_are_no_local_expert():
    E = 4
    inputs = moe_inputs(T=40, E=E, G=12, K=3)
    entries = [0, E, E + 1, -2, 2**31 - 1, -(2**31), 3, 2**24, 1, -1, 2**16, 2]
    hostile = torch.tensor(entries, dtype=torch.int32)
    tame = torch.where((hostile >= 0) & (hostile < E), hostile, -1)
    got = assert_like_reference(inputs | dict(expert_map=hostile))
    assert same_bytes(got, fused_moe(inputs | dict(expert_map=tame)))


@small
def test_expert_maps_that_hold_nothing_or_repeat():
    inputs = moe_inputs(T=6, E=4, K=2)
    for empty in (torch.full((4,), -1, dtype=torch.int32), torch.empty(0, dtype=torch.int32)):
        assert as_bytes(assert_like_reference(inputs | dict(expert_map=empty))).eq(0).all()
    assert_like_reference(inputs | dict(expert_map=torch.tensor([1, 1, 1, 0], dtype=torch.int32)))
    one = inputs | dict(expert_map=torch.tensor([2], dtype=torch.int32))  # G < E
    assert_like_reference(one)


@small
@kernels
def test_tokens_without_a_local_route_give_exact_zeros():
    """+0.0 in every dtype, whatever their hidden states; with all tokens so, too."""
    for out_dtype in FLOATS:
        inputs = moe_inputs(T=5, bias_dtype=torch.float32)
        inputs["topk_ids"][[1, 3]] = -1
        inputs["hidden_states"][1] = float("nan")
        got = assert_like_reference(inputs, out_dtype=out_dtype)
        assert as_bytes(got[[1, 3]]).eq(0).all() and got[[0, 2, 4]].isfinite().all()
        inputs["topk_ids"].fill_(99)
        assert as_bytes(fused_moe(inputs, out_dtype=out_dtype)).eq(0).all()


@small
@kernels
@pytest.mark.parametrize("E", (4, 64))  # few rows for each of many experts may be other kernels' calls
def test_weights_of_routes_that_go_nowhere_do_not_matter(E):
    inputs = moe_inputs(T=3, E=E, K=4, bias_dtype=torch.float32)
    inputs["topk_ids"][0, 1], inputs["topk_ids"][1, 0] = -1, 10**6
    inputs["topk_weights"][0, 1], inputs["topk_weights"][1, 0] = float("nan"), float("inf")
    assert assert_like_reference(inputs).isfinite().all()
    inputs["topk_weights"][2, 3] = float("-inf")
    entries = torch.arange(E, dtype=torch.int32)
    entries[inputs["topk_ids"][2, 3].item()] = -1
    assert assert_like_reference(inputs | dict(expert_map=entries))[2].isfinite().all()


@kernels
@pytest.mark.parametrize("shape", ((), (1,), (1, 1)), ids=str)
@pytest.mark.parametrize("n", (0, 1, pytest.param(5, marks=small), 11, 12, 50, -1, -(2**31), 2**31 - 1))
def test_num_tokens(n, shape):
    """Rows from there on give zeros, even if they hold NaN and hostile ids; those before are not touched by it."""
    T = 12
    inputs = moe_inputs(T=T, bias_dtype=torch.float32)
    rows = min(max(n, 0), T)
    want = reference.fused_moe(**{k: v[:rows] if v.shape[0] == T else v for k, v in inputs.items()})
    inputs["hidden_states"][rows:] = float("nan")
    inputs["topk_weights"][rows:] = float("inf")
    inputs["topk_ids"][rows:, 0] = -7
    got = assert_like_reference(inputs | dict(num_tokens=torch.full(shape, n, dtype=torch.int32)))
    assert as_bytes(got[rows:]).eq(0).all()
    assert_agrees(got[:rows], want)


@small
def test_num_tokens_is_read_from_the_tensor_each_time():
    inputs = moe_inputs(T=6) | dict(num_tokens=torch.tensor(6, dtype=torch.int32))
    for n in (6, 2, 0, 4):
        inputs["num_tokens"].fill_(n)
        assert (fused_moe(inputs) != 0).any(1).sum() == n


@pytest.mark.parametrize("T", (1, pytest.param(7, marks=small), 66))
def test_duplicate_ids_each_count(T):
    inputs = moe_inputs(T=T, E=4, K=4, dtype=torch.float32)
    inputs["topk_ids"][:] = inputs["topk_ids"][:, :1]
    got = assert_like_reference(inputs)
    once = inputs | dict(topk_ids=inputs["topk_ids"][:, :1], topk_weights=inputs["topk_weights"].sum(1, keepdim=True))
    assert_agrees(got, fused_moe(once), 1e-5)


@kernels
@pytest.mark.parametrize("T", (pytest.param(5, marks=small), 64, 131))
def test_skewed_routing(T):
    """All tokens to one expert; all but one; one expert each."""
    inputs = moe_inputs(T=T, E=8, K=2)
    for first in (torch.full((T,), 5), torch.tensor([5] * (T - 1) + [2]), torch.arange(T) % 8):
        for second in (torch.full((T,), 5), torch.full((T,), 7), torch.full((T,), -1)):
            inputs["topk_ids"] = torch.stack([first, second], 1)
            assert_like_reference(inputs)


@kernels
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ("mxfp8", "bf16"))
@pytest.mark.parametrize("T", (1, pytest.param(3, marks=small), 12, 40))
def test_nan_stays_in_its_row(T, activation, dtype):
    """A NaN, or an Inf, in one token's input or routing weight; all other rows keep their bits."""
    inputs = moe_inputs(T=T, E=3, H=96, I=96, dtype=dtype)
    clean = fused_moe(inputs, activation_dtype=activation)
    others = torch.arange(T) != T // 2
    for name in ("hidden_states", "topk_weights"):
        for value in (float("nan"), float("inf"), float("-inf")):
            changed = dict(inputs, **{name: inputs[name].clone()})
            changed[name][T // 2, 1] = value
            got = assert_like_reference(changed, activation_dtype=activation)
            assert same_bytes(got[others], clean[others])
            if value != value or (name, activation) == ("hidden_states", "mxfp8"):
                assert got[T // 2].isnan().all()


@kernels
@pytest.mark.parametrize("activation", ("mxfp8", "bf16"))
@pytest.mark.parametrize("T", (1, pytest.param(2, marks=small), 12, 40))
def test_nan_in_weights(T, activation):
    """NaN codes and NaN scales reach the tokens routed to that expert, and there only what they are multiplied into."""
    inputs = moe_inputs(T=T, E=3, K=1, H=96, I=96)
    clean = fused_moe(inputs, activation_dtype=activation)
    hit = inputs["topk_ids"][:, 0] == inputs["topk_ids"][0, 0]
    expert = inputs["topk_ids"][0, 0]
    for name, value in (("w1", 0x7F), ("w1", 0xFF), ("w2", 0xFF), ("w1_scale", 0xFF), ("w2_scale", 0xFF)):
        for row, column in ((5, 1), (70, 2), (95, 0)):
            changed = dict(inputs, **{name: inputs[name].clone()})
            changed[name].view(torch.uint8)[expert, row, column] = value
            got = assert_like_reference(changed, activation_dtype=activation)
            assert same_bytes(got[~hit], clean[~hit])
            if name.startswith("w1"):
                assert got[hit].isnan().all()
            else:
                assert got[hit][:, row].isnan().all() and got[hit].isnan().sum() == hit.sum()


@kernels
@pytest.mark.parametrize("T", (pytest.param(1, marks=small), 13))
def test_every_scale_and_code_of_weights(T):
    """Weights of any bytes but NaN, scales from 2^-20 to 2^20: what they decode to is what is multiplied."""
    inputs = moe_inputs(T=T, H=256, I=128, E=2, K=2, dtype=torch.float32)
    for i, name in enumerate(("w1", "w2")):
        codes = random_bytes(*inputs[name].shape, seed=i)
        inputs[name] = torch.where(codes % 128 == 127, 0, codes).view(torch.float8_e4m3fn)
        scale = inputs[f"{name}_scale"]
        inputs[f"{name}_scale"] = random_bytes(*scale.shape, seed=i + 2, low=107, high=148)
    assert_like_reference(inputs)
    assert_like_reference(inputs, activation_dtype="bf16")


@small
@kernels
def test_scales_at_both_ends():
    """Scale bytes where a factor 2^(b - 127) is subnormal, close to overflow, or gives infinities."""
    for byte, finite in ((0, True), (1, True), (240, True), (253, False), (254, False)):
        inputs = moe_inputs(T=4, dtype=torch.float32)
        inputs["w2_scale"].fill_(byte)
        got = assert_like_reference(inputs)
        assert got.isfinite().all() == finite and (byte < 200 or got.abs().max() > 1e33 or not finite)


# --- memory, strides, entry points


@kernels
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("T", (1, pytest.param(5, marks=small), 40))
def test_out_writes_a_slice(T, dtype):
    """Columns of a larger buffer at an odd offset; everything beside them keeps its bytes."""
    inputs = moe_inputs(T=T, H=96, dtype=torch.float32)
    want = fused_moe(inputs, out_dtype=dtype)
    buffer = torch.full((T + 2, 171), 7.0, dtype=dtype)
    out = buffer[1:-1, 37 : 37 + 96]
    for backend in ("auto", BACKEND, "reference"):
        out.fill_(float("nan"))
        assert OPS.fused_moe.out(**inputs, out=out, backend=backend) is None
        assert_agrees(out, want)
        assert backend not in ("auto", BACKEND) or same_bytes(out, want)
    out.fill_(7.0)
    assert (buffer == 7).all()


@small
@pytest.mark.skipif(BACKEND != "triton", reason=f"calls go to {BACKEND}")
def test_many_tokens_are_served_in_parts(monkeypatch):
    """Where intermediates would be too large a call takes its tokens in turns, here one at a time: the same bits."""
    from torch_mxfp8moe import arguments
    from torch_mxfp8moe.backends.triton import fused_moe as launches

    inputs = moe_inputs(T=5, K=3, bias_dtype=torch.float32) | dict(num_tokens=torch.tensor(4, dtype=torch.int32))
    want = OPS.fused_moe(**inputs)
    monkeypatch.setattr(launches, "LARGEST_WORKSPACE", 1)
    arguments._kinds.clear()
    assert same_bytes(OPS.fused_moe(**inputs), want) and want[3].ne(0).any()
    (kind,) = arguments._kinds.values()
    plan, _ = kind.plans["triton"]
    assert len(plan.launches) == 5 * (5 if torch.version.hip else 4)


@small
@pytest.mark.skipif(BACKEND != "triton", reason=f"calls go to {BACKEND}")
@pytest.mark.parametrize("T, per_part", ((1, 32), (5, 4), (24, 8)))
def test_slots_of_many_routes(T, per_part, monkeypatch):
    """Found in parts, the sums over which take several steps: the same bits, through an expert map too."""
    from torch_mxfp8moe import arguments
    from torch_mxfp8moe.backends.triton import fused_moe as launches

    entries = torch.tensor([2, -1, 0, 9, 4, -3, 1, -1, 3], dtype=torch.int32)
    inputs = moe_inputs(T=T, K=3, E=5, G=9, id_dtype=torch.int64)
    inputs["topk_ids"][-1, 0] = 2**40
    inputs |= dict(expert_map=entries, num_tokens=torch.tensor(T - T // 5, dtype=torch.int32))
    tiles = launches.configs.load("default").tiles[-1]
    monkeypatch.setattr(launches.configs, "choose", lambda *args, **options: tiles)
    arguments._kinds.clear()
    want = OPS.fused_moe(**inputs)
    for name, value in dict(FEW_ROUTES=0, MANY_ROUTES=0, ROUTES_PER_PART=per_part, PARTS_PER_STEP=2).items():
        monkeypatch.setattr(launches, name, value)
    arguments._kinds.clear()
    assert same_bytes(OPS.fused_moe(**inputs), want) and want.ne(0).any()
    (kind,) = arguments._kinds.values()
    names = [launch.kernel.__name__ for launch in kind.plans["triton"][0].launches]
    assert names[:4] == ["count_kernel", "sum_kernel", "place_kernel", "dispatch_kernel"]
    arguments._kinds.clear()


@small
@pytest.mark.skipif(BACKEND != "triton", reason=f"calls go to {BACKEND}")
@pytest.mark.skipif(torch.version.hip is not None, reason="rows are copied on AMD GPUs")
@pytest.mark.parametrize("at_once", (True, False))
@pytest.mark.parametrize(
    "options",
    (
        dict(),
        dict(scaled=True, padded=True),
        dict(activation_dtype="bf16", mapped=True),
        dict(mapped=True, padded=True),
    ),
    ids=str,
)
def test_rows_rounded_beside_routes(options, at_once, monkeypatch):
    """Where the first product reads each token's row where it is: slots and tiles are those that are found when rows
    are copied, and the row of each token that a local expert takes is what would have been copied, to the bit."""
    from torch_mxfp8moe.backends.triton import BACKEND as triton_backend
    from torch_mxfp8moe.backends.triton import fused_moe as launches
    from torch_mxfp8moe.backends.triton.launch import WORKSPACE

    options = dict(options)
    scaled, mapped, padded = (options.pop(name, False) for name in ("scaled", "mapped", "padded"))
    T, K, E, H = 13, 3, 5, 192
    inputs = moe_inputs(T=T, K=K, E=E, G=9 if mapped else E, H=H, scaled=scaled, id_dtype=torch.int64)
    if mapped:
        inputs["topk_ids"][-1, 0] = 2**40
        inputs["topk_ids"][2] = 1
        inputs["expert_map"] = torch.tensor([2, -1, 0, 9, 4, -3, 1, -1, 3], dtype=torch.int32, device=DEVICE)
    if padded:
        inputs["num_tokens"] = torch.tensor(T - 2, dtype=torch.int32, device=DEVICE)
    call = FusedMoe(**inputs, **options).check().with_out()
    gemms = (configs.Gemm(rows, 128, 4, 4, programs=2) for rows in (32, 64))
    copied = configs.Tiles(None, 8, *gemms)
    monkeypatch.setattr(launches, "ROUTES_PER_PART", 8)
    monkeypatch.setattr(launches, "PARTS_PER_STEP", 2)

    def found(tiles, *kernels):
        plan = launches.plan(call, triton_backend.target(DEVICE), tiles)
        workspace = torch.full((plan.workspace,), 255, dtype=torch.uint8, device=DEVICE)
        memory = call.inputs | {"out": call.out, WORKSPACE: workspace}
        bound = [launch.bound(memory) for launch in plan.launches[: len(kernels)]]
        assert tuple(launch.kernel.__name__ for launch in bound) == kernels
        for launch in bound:
            launch.run()
        names = "slots", "routes", "offsets", "tiles", "rows", "counters"
        return [next(one.arguments[name] for one in bound if name in one.arguments) for name in names]

    slots, routes, offsets, listed, rows, _ = found(copied, "dispatch_kernel")
    if not at_once:
        monkeypatch.setattr(launches, "BESIDE_ROUNDING", (0, 0))
    front = ["route_round_kernel"] if at_once else ["count_round_kernel", "sum_kernel", "place_kernel"]
    own = found(replace(copied, gather=True), *front)
    count = int(offsets[-1])
    assert 0 < count and (count < T * K) == (mapped or padded)
    assert torch.equal(own[0], slots) and torch.equal(own[1][:count], routes[:count])
    assert torch.equal(own[2], offsets) and torch.equal(own[3], listed) and not own[5].any()
    for slot in range(count):
        assert same_bytes(own[4][routes[slot] // K], rows[slot])
    idle = (slots.view(T, K) < 0).all(1)
    assert idle.any() == (mapped or padded)
    assert (own[4][idle].contiguous().view(torch.uint8) == 255).all()  # nothing was written


def test_out_of_no_tokens():
    inputs = moe_inputs(T=0)
    out = torch.empty(0, 64)
    OPS.fused_moe.out(**inputs, out=out)
    assert fused_moe(inputs).shape == (0, 64)


@kernels
@pytest.mark.parametrize("scaled", (False, True), ids=("", "scaled"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("T", (1, pytest.param(6, marks=small), 40))
def test_strides_and_alignment(T, dtype, scaled):
    """Activations and routing as slices of wider, unaligned buffers; one row for all tokens."""
    inputs = moe_inputs(T=T, dtype=dtype, scaled=scaled, id_dtype=torch.int64)
    want = fused_moe(inputs)

    def sliced(x):
        wide = torch.zeros(T, x.shape[1] + 5, dtype=torch.float32).to(x.dtype)
        wide[:, 3:-2] = x
        return wide[:, 3:-2]

    def unaligned(x):
        flat = torch.zeros(T * x.shape[1] + 1, dtype=torch.float32).to(x.dtype)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)

    names = [name for name in inputs if not name.startswith("w")]
    for change in (sliced, unaligned):
        changed = inputs | {name: change(inputs[name]) for name in names}
        assert same_bytes(fused_moe(changed), want), change.__name__
    repeated = inputs | {name: inputs[name][:1].expand(T, -1) for name in names}
    assert_agrees(fused_moe(repeated), want[:1].expand(T, -1), 1e-2 if dtype is not torch.float32 else 1e-6)


@small
@kernels
def test_unaligned_weights():
    inputs = moe_inputs(T=9, bias_dtype=torch.float32)
    want = fused_moe(inputs)
    for name in [name for name in inputs if name.startswith("w")]:
        flat = torch.zeros(inputs[name].numel() + 1, dtype=torch.float32).to(inputs[name].dtype)
        flat[1:].view(torch.uint8).copy_(inputs[name].contiguous().view(torch.uint8).flatten())
        assert same_bytes(fused_moe(inputs | {name: flat[1:].view(inputs[name].shape)}), want), name


@small
def test_one_column_routing_of_any_stride():
    """[T, 1] tensors whose last stride is not 1, and one token whose row stride is 0."""
    inputs = moe_inputs(T=6, K=3)
    one = inputs | dict(topk_ids=inputs["topk_ids"][:, 1:2], topk_weights=inputs["topk_weights"][:, 2:])
    want = fused_moe(one)
    strange = {n: torch.as_strided(one[n].t().contiguous(), (6, 1), (1, 6)) for n in ("topk_ids", "topk_weights")}
    assert same_bytes(fused_moe(one | strange), want)
    first = {name: x[:1] if x.shape[0] == 6 else x for name, x in inputs.items()}
    row = {n: first[n].as_strided(first[n].shape, (0, 1)) for n in ("topk_ids", "topk_weights", "hidden_states")}
    assert same_bytes(fused_moe(first | row), fused_moe(first))


def test_typed_entry_point_takes_both_scale_dtypes():
    inputs = moe_inputs(T=5, scaled=True)
    want = fused_moe(inputs)
    scales = [name for name in inputs if name.endswith("scale")]
    assert len(scales) == 3
    for names in ([], scales, scales[:1], scales[1:]):
        views = inputs | {name: inputs[name].view(E8M0) for name in names}
        assert same_bytes(torch_mxfp8moe.fused_moe(**views), want)
        assert same_bytes(fused_moe(views), want)
    out = torch.empty(5, 64, dtype=torch.float32)
    assert torch_mxfp8moe.fused_moe(**inputs, out=out) is out
    assert_agrees(out, fused_moe(inputs, out_dtype=torch.float32), 1e-6)
    assert torch_mxfp8moe.fused_moe(**inputs, out=out, out_dtype=torch.float32) is out


@pytest.mark.parametrize("backend", (pytest.param("auto", marks=small), "reference"))
def test_weights_in_the_aiter_layout(backend):
    """The same result as in checkpoint order; on a CPU, and wherever it is named, that of the reference."""
    inputs = moe_inputs(T=6, H=256, I=128, bias_dtype=torch.float32)
    want = reference.fused_moe(**inputs, **GPT_OSS)
    shuffled = dict(inputs)
    for name, gate_up in (("w1", True), ("w2", False)):
        shuffled[name], shuffled[f"{name}_scale"] = OPS.preshuffle(
            inputs[name], inputs[f"{name}_scale"], layout="aiter_gfx950", gate_up=gate_up
        )
    options = dict(GPT_OSS, layout="aiter_gfx950", backend=backend)
    got = OPS.fused_moe(**shuffled, **options)
    assert_agrees(got, want)
    served_by = "triton" if (backend, BACKEND) == ("auto", "triton") else "reference"
    assert torch_mxfp8moe.explain(**shuffled, **options).backend == served_by
    assert served_by != "reference" or same_bytes(got, want)


@small
def test_inputs_keep_their_bytes():
    inputs = moe_inputs(T=9, bias_dtype=torch.float32, scaled=True)
    inputs["expert_map"] = torch.tensor([1, 0, 2, 3], dtype=torch.int32)
    inputs["num_tokens"] = torch.tensor(7, dtype=torch.int32)
    before = {name: x.clone() for name, x in inputs.items()}
    fused_moe(inputs)
    OPS.fused_moe.out(**inputs, out=torch.empty(9, 64))
    for name, x in inputs.items():
        assert same_bytes(x, before[name]), name


# --- the same bits every time


@pytest.mark.parametrize("activation", ("mxfp8", "bf16"))
@pytest.mark.parametrize("T", (1, 2, 8, 17, 64, 130))
@pytest.mark.parametrize("backend", (pytest.param("auto", marks=kernels), "reference"))
def test_same_bits_every_time_and_for_every_thread_count(backend, T, activation):
    inputs = moe_inputs(T=T, H=160, I=352, E=6, K=3, bias_dtype=torch.bfloat16)
    results = []
    for threads in (2, 2, 1, 3, 5, 8, 1):
        torch.set_num_threads(threads)
        garbage = torch.full((T * 160 * 8,), float("nan"))  # what was in the memory before does not matter
        del garbage
        results.append(OPS.fused_moe(**inputs, activation_dtype=activation, backend=backend, **GPT_OSS))
    if backend == "reference":  # torch's own matmul may sum in another order for another number of threads
        results = [results[0], results[1]]
    assert same_bytes(*results)


def test_calls_from_two_threads_at_once():
    """Two callers do not disturb each other."""
    from concurrent.futures import ThreadPoolExecutor

    calls = [moe_inputs(T=T, H=96, I=96, E=5, K=3, seed=T) for T in (1, 7, 33, 64)]
    want = [OPS.fused_moe(**inputs) for inputs in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(8):
            got = list(pool.map(lambda inputs: OPS.fused_moe(**inputs), calls))
            assert all(same_bytes(a, b) for a, b in zip(got, want, strict=True))


# --- warm-up


class Calls(TorchDispatchMode):
    """Runs what it sees; keeps the overload of ``fused_moe``, the token count and the largest id of every call."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (OPS.fused_moe.default, OPS.fused_moe.out):
            ids = args[6]
            self.seen.append((func._overloadname, len(args[0]), int(ids.max()) if ids.numel() else None))
        return func(*args, **kwargs or {})


@small
@pytest.mark.parametrize("overload", ("default", "out"))
@pytest.mark.parametrize("backend", ("auto", BACKEND, "reference"))
def test_warmup_runs_the_op_once_for_each_count(backend, overload):
    """By the way that later calls take, and without a change to anything that it was given."""
    inputs = moe_inputs(T=5, scaled=True, bias_dtype=torch.float32) | dict(num_tokens=torch.tensor(4).int())
    before = {name: x.clone() for name, x in inputs.items()}
    out = torch.full((5, 64), 7.0)
    options = dict(GPT_OSS, backend=backend) | (dict(out=out) if overload == "out" else {})
    with Calls() as calls:
        torch_mxfp8moe.warmup(iter((0, 1, 3)), **inputs, **options)
    assert calls.seen == [(overload, 0, None), (overload, 1, 1), (overload, 3, 3)]
    assert (out == 7).all()
    for name, x in inputs.items():
        assert same_bytes(x, before[name]), name


@small
def test_warmup_takes_what_the_typed_entry_point_takes():
    inputs = moe_inputs(T=2)
    e8m0 = {name: x.view(E8M0) if name.endswith("scale") else x for name, x in inputs.items()}
    torch_mxfp8moe.warmup([1], **e8m0, out_dtype=torch.float32)
    with torch.inference_mode():
        torch_mxfp8moe.warmup([1], *(e8m0[name] for name in inputs))


@small
def test_warmup_raises_what_the_call_raises():
    inputs = moe_inputs(T=2)
    with pytest.raises(ValueError, match=r"^warmup: tokens has -1; it takes counts of 0 or more$"):
        torch_mxfp8moe.warmup([1, -1], **inputs)
    with pytest.raises(ValueError, match=r"^fused_moe: layout is 'diagonal'; it takes"):
        torch_mxfp8moe.warmup([], **inputs, layout="diagonal")
    with pytest.raises(ERRORS, match="fused_moe: backend is 'abacus'; it takes 'auto', "):
        torch_mxfp8moe.warmup([1], **inputs, backend="abacus")
    with pytest.raises(RuntimeError, match="^fused_moe is inference only and has no gradient"):
        torch_mxfp8moe.warmup([1], **inputs | dict(topk_weights=inputs["topk_weights"].requires_grad_()))


# --- opcheck


OPCHECK_CASES = {
    "plain": (dict(), dict()),
    "no tokens": (dict(T=0), dict()),
    "one token": (dict(T=1), dict()),
    "fp32": (dict(dtype=torch.float32), dict(out_dtype=torch.float16)),
    "fp16, int64": (dict(dtype=torch.float16, id_dtype=torch.int64), dict(activation_dtype="bf16")),
    "biases": (dict(bias_dtype=torch.bfloat16), GPT_OSS),
    "fp64 biases and routing": (dict(bias_dtype=torch.float64, weight_dtype=torch.float64), dict()),
    "fp16 routing": (dict(bias_dtype=torch.float16, weight_dtype=torch.float16), dict()),
    "MXFP8 input": (dict(scaled=True), dict()),
    "router weight on input": (dict(K=1), dict(apply_router_weight_on_input=True)),
    "reference by name": (dict(), dict(backend="reference")),
}


@pytest.mark.parametrize("overload", ("default", "out"))
@pytest.mark.parametrize("case", OPCHECK_CASES)
def test_opcheck(case, overload):
    sizes, options = OPCHECK_CASES[case]
    inputs = moe_inputs(**dict(H=32) | sizes)
    if overload == "out":
        options = dict(options)
        dtype = options.pop("out_dtype", torch.bfloat16)
        options["out"] = torch.empty(inputs["hidden_states"].shape, dtype=dtype)
    tensors = list(inputs.items())
    args, rest = tuple(x for _, x in tensors[:7]), dict(tensors[7:])
    check_op(getattr(OPS.fused_moe, overload), args, rest | options)


@pytest.mark.parametrize("overload", ("default", "out"))
def test_opcheck_of_all_tensors(overload):
    inputs = moe_inputs(T=5, G=6, scaled=True, bias_dtype=torch.float32)
    inputs |= dict(expert_map=torch.tensor([0, -1, 1, 2, 3, -1], dtype=torch.int32), num_tokens=torch.tensor([4]).int())
    options = dict(out=torch.empty(5, 80)[:, 16:]) if overload == "out" else {}
    tensors = list(inputs.items())
    check_op(getattr(OPS.fused_moe, overload), tuple(x for _, x in tensors[:7]), dict(tensors[7:]) | options)


def test_opcheck_of_e8m0_scales():
    inputs = moe_inputs(T=5)
    inputs |= {name: inputs[name].view(E8M0) for name in ("w1_scale", "w2_scale")}
    check_op(OPS.fused_moe.default, tuple(inputs.values()))
