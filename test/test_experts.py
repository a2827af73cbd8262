"""``Mxfp8Experts``: what it computes, how it is made, moved, saved, sharded and updated; never silently wrong."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import torch_mxfp8moe
from device import DEVICE
from helpers import (
    BACKEND,
    E4M3,
    E8M0,
    as_bytes,
    assert_agrees,
    error_of,
    moe_inputs,
    only_cpu,
    rand,
    randn,
    same_bytes,
)
from torch_mxfp8moe import LAYOUTS, Mxfp8Experts, SharedExpert, dispatch, experts, fused_moe
from torch_mxfp8moe import expert_parallel_map, reference, tensor_parallel_range
from torch_mxfp8moe.backends import Backend
from torch_mxfp8moe.experts import GATE_UP_ORDERS

OAI = dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=7.0)
WEIGHTS = ("w1", "w2", "w1_scale", "w2_scale", "w1_bias", "w2_bias")


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def layer(E=4, H=256, I=128, T=6, K=2, bias=False, seed=0, **sizes) -> tuple[dict, dict]:  # noqa: E741
    """(weights, routed tokens) of a layer, by argument name."""
    inputs = moe_inputs(T, H, I, E, K, seed=seed, bias_dtype=torch.float32 if bias else None, **sizes)
    weights = {name: inputs.pop(name) for name in WEIGHTS if name in inputs}
    return weights, inputs


def module_bytes(module: Mxfp8Experts) -> dict[str, torch.Tensor]:
    return {name: as_bytes(x) for name, x in module.named_buffers()}


def same_buffers(*modules: Mxfp8Experts) -> bool:
    first, *rest = (dict(module.named_buffers()) for module in modules)
    return all(first.keys() == x.keys() and all(same_bytes(first[n], x[n]) for n in first) for x in rest)


def interleaved(x: torch.Tensor) -> torch.Tensor:
    """Gate rows then up rows along dimension 1 -> gate and up rows in turn."""
    gate, up = x.view(torch.uint8 if x.itemsize == 1 else x.dtype).chunk(2, 1)
    return torch.stack([gate, up], 2).flatten(1, 2).view(x.dtype)


# --- construction


def test_of_mxfp8_holds_what_it_is_given():
    weights, tokens = layer(bias=True)
    module = Mxfp8Experts.from_weights(**weights, **OAI)
    assert same_bytes(module(**tokens), fused_moe(**tokens, **weights, **OAI))
    for name, x in weights.items():
        assert same_bytes(getattr(module, name), x)
        assert name.endswith("bias") or getattr(module, name).data_ptr() == x.data_ptr(), "a copy"
    assert not list(module.parameters())


def test_a_part_of_larger_memory_is_copied():
    """Or the rest of it would stay, and be pickled."""
    weights, _ = layer()
    larger = {name: torch.cat([x.view(torch.uint8)] * 2).view(x.dtype)[: len(x)] for name, x in weights.items()}
    module = Mxfp8Experts.from_weights(**larger)
    for name, x in larger.items():
        assert same_bytes(getattr(module, name), x)
        assert getattr(module, name).untyped_storage().nbytes() == x.nbytes


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_of_high_precision_quantises(dtype):
    w1, w2 = randn(3, 64, 96, dtype=dtype), randn(3, 96, 32, dtype=dtype)
    for mode in ("rceil", "floor"):
        module = Mxfp8Experts.from_weights(w1.requires_grad_(), w2, scale_rounding=mode)
        for x, name in ((w1, "w1"), (w2, "w2")):
            data, scale = torch_mxfp8moe.quantize_1x32(x.detach(), mode)
            assert same_bytes(getattr(module, name), data) and same_bytes(getattr(module, f"{name}_scale"), scale)


def test_of_transposed_weights():
    """As gpt-oss in Transformers has them: [E, in, out]."""
    w1, w2 = randn(3, 96, 64), randn(3, 32, 96)
    module = Mxfp8Experts.from_weights(w1.transpose(1, 2), w2.transpose(1, 2))
    plain = Mxfp8Experts.from_weights(w1.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous())
    assert same_buffers(module, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_interleaved_gate_and_up(layout):
    weights, tokens = layer(bias=True)
    want = Mxfp8Experts.from_weights(**weights, layout=layout)
    other = {name: interleaved(x) if name.startswith("w1") else x for name, x in weights.items()}
    assert not same_bytes(other["w1"], weights["w1"])
    module = Mxfp8Experts.from_weights(**other, gate_up_order="interleaved", layout=layout)
    assert same_buffers(module, want)
    module.update_weights(**weights)
    module.update_weights(**other, gate_up_order="interleaved")
    assert same_buffers(module, want)
    high = [torch_mxfp8moe.dequantize_1x32(other[n], other[f"{n}_scale"], torch.bfloat16) for n in ("w1", "w2")]
    module = Mxfp8Experts.from_weights(*high, gate_up_order="interleaved", layout=layout)
    high = [torch_mxfp8moe.dequantize_1x32(weights[n], weights[f"{n}_scale"], torch.bfloat16) for n in ("w1", "w2")]
    assert same_buffers(module, Mxfp8Experts.from_weights(*high, layout=layout))


def test_typed_scales():
    weights, _ = layer()
    typed = {name: x.view(E8M0) if name.endswith("scale") else x for name, x in weights.items()}
    assert same_buffers(Mxfp8Experts.from_weights(**typed), Mxfp8Experts.from_weights(**weights))


def test_an_empty_module_gives_zeros_until_it_is_filled():
    weights, tokens = layer(bias=True)
    module = Mxfp8Experts(4, 256, 128, bias=True, bias_dtype=torch.float32, device=DEVICE)
    assert not module(**tokens).any()
    module.update_weights(**weights)
    assert same_bytes(module(**tokens), fused_moe(**tokens, **weights))


def test_one_bias_alone_leaves_the_other_zero():
    weights, tokens = layer(bias=True)
    del weights["w1_bias"]
    module = Mxfp8Experts.from_weights(**weights)
    assert not module.w1_bias.any()
    assert same_bytes(module(**tokens), fused_moe(**tokens, **weights))


def test_every_option_reaches_the_op():
    weights, tokens = layer(K=1)
    options = dict(OAI, apply_router_weight_on_input=True, activation_dtype="bf16", backend="reference")
    module = Mxfp8Experts.from_weights(**weights, **options)
    count = torch.tensor(4, dtype=torch.int32)
    out = torch.empty(6, 256)
    got = module(**tokens, num_tokens=count, out=out)
    want = fused_moe(**tokens, **weights, **options, num_tokens=count, out_dtype=out.dtype)
    assert got is out and same_bytes(got, want)
    assert not got[4:].any() and got[:4].all(1).all()
    data, scale = torch_mxfp8moe.quantize_1x32(tokens["hidden_states"])
    mxfp8 = tokens | dict(hidden_states=data, hidden_states_scale=scale)
    got = module(**mxfp8, out_dtype=torch.float32)
    assert same_bytes(got, fused_moe(**mxfp8, **weights, **options, out_dtype=torch.float32))


@pytest.mark.parametrize("backend", (BACKEND, "reference"))
def test_its_arguments_are_those_of_explain_and_warmup(backend):
    weights, tokens = layer()
    arguments = Mxfp8Experts.from_weights(**weights, backend=backend).arguments(**tokens)
    assert torch_mxfp8moe.explain(**arguments).backend == backend
    torch_mxfp8moe.warmup([1, 3], **arguments)


# --- layouts


@pytest.mark.parametrize("I", (96, 128, 160))
@pytest.mark.parametrize("bias", (False, True))
def test_layouts_compute_the_same(I, bias):  # noqa: E741
    """I 96 and 160 are padded to 128 and 256 in aiter's layout, biases too."""
    weights, tokens = layer(I=I, bias=bias)
    plain = Mxfp8Experts.from_weights(**weights, layout="row_major")
    module = Mxfp8Experts.from_weights(**weights, layout="aiter_gfx950")
    assert module.layout == "aiter_gfx950" and module.w2.shape[2] % 128 == 0 and module.local_intermediate_size == I
    assert_agrees(module(**tokens), plain(**tokens))
    for got, want in zip(module.row_major(), plain.row_major(), strict=True):
        assert same_bytes(got, want)
    data, scale = torch_mxfp8moe.preshuffle(
        weights["w1"], weights["w1_scale"], layout="aiter_gfx950", gate_up=True, pad_to=128
    )
    assert same_bytes(module.w1, data) and same_bytes(module.w1_scale, scale)
    before = copy.deepcopy(module)
    module.set_layout("row_major")
    assert same_buffers(module, plain)
    module.set_layout("aiter_gfx950")
    assert same_buffers(module, before)


@only_cpu
def test_auto_says_what_it_chose():
    weights, _ = layer()
    assert_expected_inline(
        str(Mxfp8Experts.from_weights(**weights, **OAI)).replace(BACKEND, "cpu"),
        """Mxfp8Experts(num_experts=4, hidden_size=256, intermediate_size=128, layout='row_major' (auto on cpu: cpu serves 'row_major', reference serves 'aiter_gfx950'), swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=7.0)""",
    )
    assert_expected_inline(
        Mxfp8Experts(4, 96, 96).layout_reason.replace(BACKEND, "cpu"),
        """auto on cpu: cpu serves 'row_major', not 'aiter_gfx950': layout 'aiter_gfx950' takes hidden sizes divisible by 256, not 96""",
    )


class Shuffled(Backend):
    """A backend that reads aiter's layout only, and computes by the reference."""

    name = "shuffled"
    description = "aiter's layout"

    def why_unavailable(self):
        return None

    def why_not(self, call):
        fits = call.layout == "aiter_gfx950" and call.w1_bias is None and call.device == DEVICE
        return None if fits else "another call"


@pytest.fixture
def shuffled(monkeypatch):
    """A machine whose most preferred backend reads aiter's layout, for calls without biases."""
    backends = {"shuffled": Shuffled()} | dispatch.registered()
    for module in (dispatch, experts):
        monkeypatch.setattr(module, "registered", lambda: backends)


def test_auto_takes_the_layout_of_the_most_preferred_backend(shuffled):
    weights, _ = layer(bias=True)
    assert Mxfp8Experts.from_weights(**weights).layout == "row_major"
    weights, _ = layer()
    module = Mxfp8Experts.from_weights(**weights)
    assert module.layout == "aiter_gfx950"
    assert same_buffers(module, Mxfp8Experts.from_weights(**weights, layout="aiter_gfx950"))
    assert Mxfp8Experts.from_weights(**weights, backend="reference").layout == "row_major"
    assert Mxfp8Experts(4, 256, 96, device=DEVICE).layout == "aiter_gfx950"


def test_auto_follows_the_device(shuffled):
    weights, _ = layer(bias=False)
    want = Mxfp8Experts.from_weights(**weights, layout="aiter_gfx950")
    module = Mxfp8Experts(4, 256, 128, device="meta")
    assert module.layout == "row_major"
    module.to_empty(device=DEVICE)
    assert module.layout == "aiter_gfx950" and module.w1_scale.shape == want.w1_scale.shape
    module.update_weights(**weights)
    assert same_buffers(module, want)
    fixed = Mxfp8Experts(4, 256, 128, device="meta", layout="row_major").to_empty(device=DEVICE)
    assert fixed.layout == "row_major"
    module.to("meta")
    assert module.layout == "aiter_gfx950"


# --- shared experts

LIMITED = dict(swiglu_limit=0.5)


def with_shared(S=1, **sizes) -> tuple[dict, dict, dict]:
    """(weights of 4 + S experts, tokens, the same tokens with the shared routes added by hand)."""
    weights, tokens = layer(E=4 + S, G=4, **sizes)
    T = tokens["topk_ids"].shape[0]
    by_hand = tokens | dict(
        topk_ids=torch.cat([tokens["topk_ids"], torch.arange(4, 4 + S, dtype=torch.int32).expand(T, S)], 1),
        topk_weights=torch.cat([tokens["topk_weights"], torch.full((T, S), 0.4)], 1),
    )
    return weights, tokens, by_hand


@pytest.mark.parametrize("S", (1, 2))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shared_expert_is_one_more_slot(S, layout):
    weights, tokens, by_hand = with_shared(S)
    shared = SharedExpert(count=S, routing_weight=0.4, **LIMITED)
    module = Mxfp8Experts.from_weights(**weights, shared=shared, layout=layout, **LIMITED)
    assert (module.num_experts, module.num_shared, len(module.w1)) == (4, S, 4 + S)
    want = fused_moe(**by_hand, **weights, **LIMITED)
    assert_agrees(module(**tokens), want)
    assert same_bytes(module(**by_hand, add_shared=False), module(**tokens))
    # Written apart, as checkpoints hold them.
    module = Mxfp8Experts(4, 256, 128, shared=shared, layout=layout, device=DEVICE, **LIMITED)
    module.update_weights(**{name: x[:4] for name, x in weights.items()})
    module.update_weights(**{name: x[4:] for name, x in weights.items()}, experts=range(4, 4 + S))
    assert same_bytes(module(**by_hand, add_shared=False), module(**tokens)) and module(**tokens).any()
    assert_agrees(module(**tokens), want)


def test_ids_keep_their_dtype():
    module = Mxfp8Experts(4, 256, 128, shared=SharedExpert(2), device=DEVICE)
    for dtype in (torch.int32, torch.int64):
        weights, ids = module.add_shared(rand(3, 2).bfloat16(), torch.zeros(3, 2, dtype=dtype))
        assert ids.dtype is dtype and ids[:, 2:].tolist() == [[4, 5]] * 3
        assert weights.dtype is torch.bfloat16 and (weights[:, 2:] == 1).all()
    assert module.add_shared(rand(0, 2), torch.zeros(0, 2, dtype=torch.int32))[1].shape == (0, 4)


def test_a_shared_expert_of_another_activation_is_refused():
    weights, _, _ = with_shared()
    assert_expected_inline(
        "\n".join(
            error_of(lambda: Mxfp8Experts.from_weights(**weights, shared=shared, **options))
            for shared, options in (
                (SharedExpert(), dict(swiglu_limit=10.0)),
                (SharedExpert(), OAI),
                (SharedExpert(**OAI), {}),
                (SharedExpert(), dict(apply_router_weight_on_input=True)),
                (SharedExpert(0), {}),
            )
        ),
        """\
Mxfp8Experts: shared.swiglu_limit is None; it takes 10.0, that of the routed experts: fused, both are computed alike. Compute this shared expert apart
Mxfp8Experts: shared.swiglu_alpha is 1.0; it takes 1.702, that of the routed experts: fused, both are computed alike. Compute this shared expert apart
Mxfp8Experts: shared.swiglu_alpha is 1.702; it takes 1.0, that of the routed experts: fused, both are computed alike. Compute this shared expert apart
Mxfp8Experts: shared is given with apply_router_weight_on_input, which takes one expert per token
Mxfp8Experts: shared.count is 0; it takes 1 or more""",
    )


# --- parallelism


@given(
    tp=st.integers(1, 3),
    ep=st.integers(1, 3),
    blocks=st.integers(3, 5),
    E=st.integers(3, 5),
    S=st.integers(0, 2),
    T=st.integers(0, 7),
    bias=st.booleans(),
    order=st.sampled_from(experts.GATE_UP_ORDERS),
    layout=st.sampled_from(list(LAYOUTS)),
    high_precision=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_the_sum_over_ranks(tp, ep, blocks, E, S, T, bias, order, layout, high_precision, seed):
    """Any tensor- and expert-parallel ranks add up to the whole; made at once, or empty and then updated."""
    hidden = 256 if layout == "aiter_gfx950" else 64
    weights, tokens = layer(E + S, hidden, 32 * blocks, T, bias=bias, seed=seed, G=E)
    if high_precision:
        for name in ("w1", "w2"):
            scale = weights.pop(f"{name}_scale")
            weights[name] = torch_mxfp8moe.dequantize_1x32(weights[name], scale, torch.bfloat16)
    shared = SharedExpert(S) if S else None
    want = Mxfp8Experts.from_weights(**weights, shared=shared)(**tokens, out_dtype=torch.float32)
    given = {n: interleaved(x) if n[:2] == "w1" and order == "interleaved" else x for n, x in weights.items()}
    total = torch.zeros_like(want)
    for tp_rank in range(tp):
        for ep_rank in range(ep):
            ranks = dict(tp_rank=tp_rank, tp_size=tp, ep_rank=ep_rank, ep_size=ep)
            options = dict(shared=shared, layout=layout, **ranks)
            module = Mxfp8Experts.from_weights(**given, gate_up_order=order, **options)
            total += module(**tokens, out_dtype=torch.float32)
            assert (module.w2_bias is not None) == (bias and tp_rank == 0)
            empty = Mxfp8Experts(E, hidden, 32 * blocks, bias=bias, bias_dtype=torch.float32, device=DEVICE, **options)
            empty.update_weights(**given, gate_up_order=order)
            assert same_buffers(empty, module)
    assert_agrees(total, want)


def test_ranks_take_their_own_part():
    """With tensor parallelism, a rank's slice alone; with expert parallelism, the experts that are named."""
    weights, _ = layer(I=128)
    whole = Mxfp8Experts.from_weights(**weights, tp_rank=1, tp_size=2, ep_rank=1, ep_size=2)
    module = Mxfp8Experts(4, 256, 128, tp_rank=1, tp_size=2, ep_rank=1, ep_size=2, device=DEVICE)
    assert module.expert_ids == [2, 3] and module.tp_range == (64, 128)
    part = {}
    for name in ("w1", "w1_scale"):
        part[name] = weights[name].view(torch.uint8).view(4, 2, 128, -1)[2:, :, 64:].flatten(1, 2)
    part["w2"], part["w2_scale"] = weights["w2"].view(torch.uint8)[2:, :, 64:], weights["w2_scale"][2:, :, 2:]
    part = {name: x.view(weights[name].dtype) for name, x in part.items()}
    module.update_weights(**part, experts=[2, 3])
    assert same_buffers(module, whole)


def test_ranges():
    assert [tensor_parallel_range(768, r, 4) for r in range(4)] == [(0, 192), (192, 384), (384, 576), (576, 768)]
    ranges = [tensor_parallel_range(2880, r, 8) for r in range(8)]
    assert [stop - start for start, stop in ranges] == [352, 352, 352, 384] * 2
    assert [stop for _, stop in ranges[:-1]] == [start for start, _ in ranges[1:]]
    assert [expert_parallel_map(5, r, 3).tolist() for r in range(3)] == [
        [0, 1, -1, -1, -1], [-1, -1, 0, 1, -1], [-1, -1, -1, -1, 0]
    ]  # fmt: skip


def test_any_distribution_of_experts():
    weights, tokens = layer(E=5)
    total = torch.zeros(6, 256)
    for expert_map in ([1, -1, 0, -1, 2], [-1, 1, -1, 0, -1]):
        module = Mxfp8Experts.from_weights(**weights, expert_map=torch.tensor(expert_map, dtype=torch.int32))
        assert module.num_local_experts == max(expert_map) + 1
        total += module(**tokens, out_dtype=torch.float32)
        other = Mxfp8Experts.from_weights(**weights, expert_map=torch.tensor(expert_map, dtype=torch.int32))
        for tensor in (other.w1, other.w2):
            tensor.view(torch.uint8).zero_()
        ids = [4, 1, 0, 3, 2]
        other.update_weights(**{n: x.view(torch.uint8)[ids].view(x.dtype) for n, x in weights.items()}, experts=ids)
        assert same_buffers(module, other)
    assert_agrees(total, fused_moe(**tokens, **weights, out_dtype=torch.float32))


def test_a_shared_expert_counts_once():
    """Split over the ranks that see the same tokens; whole on each where tokens differ."""
    weights, tokens, by_hand = with_shared(T=7)
    shared = SharedExpert(routing_weight=0.4)
    ranks = [Mxfp8Experts.from_weights(**weights, shared=shared, ep_rank=r, ep_size=3) for r in range(3)]
    total = sum(rank(**tokens, out_dtype=torch.float32) for rank in ranks)
    assert_agrees(total, fused_moe(**by_hand, **weights, out_dtype=torch.float32))
    routes = [rank.add_shared(tokens["topk_weights"], tokens["topk_ids"])[1][:, -1].tolist() for rank in ranks]
    assert routes == [[4, -1, -1, 4, -1, -1, 4], [-1, 4, -1, -1, 4, -1, -1], [-1, -1, 4, -1, -1, 4, -1]]
    for rank in ranks:
        ids = rank.add_shared(tokens["topk_weights"], tokens["topk_ids"], every_token=True)[1]
        assert ids[:, -1].tolist() == [4] * 7


# --- updates


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("high_precision", (False, True), ids=("mxfp8", "bf16"))
def test_updates_write_the_same_storage(layout, high_precision):
    weights, tokens = layer(I=96, bias=True)
    fresh, _ = layer(I=96, bias=True, seed=1)
    if high_precision:
        for name in ("w1", "w2"):
            fresh[name] = torch_mxfp8moe.dequantize_1x32(fresh[name], fresh.pop(f"{name}_scale"), torch.bfloat16)
    module = Mxfp8Experts.from_weights(**weights, layout=layout)
    want = Mxfp8Experts.from_weights(**fresh, layout=layout)
    where = {name: x.data_ptr() for name, x in module.named_buffers()}
    objects = dict(module.named_buffers())

    single, some = copy.deepcopy(module), copy.deepcopy(module)
    module.update_weights(**fresh)
    assert same_buffers(module, want)
    assert {name: x.data_ptr() for name, x in module.named_buffers()} == where
    assert all(x is objects[name] for name, x in module.named_buffers())
    assert same_bytes(module(**tokens), want(**tokens))
    module.update_weights(w2=fresh["w2"], w2_scale=fresh.get("w2_scale"))
    assert same_buffers(module, want)

    for expert in range(4):
        before = copy.deepcopy(single)
        single.update_weights(**{name: x[expert] for name, x in fresh.items()}, experts=expert)
        for x, y, z in zip(single.row_major(), before.row_major(), want.row_major()):
            assert same_bytes(x[: expert + 1], z[: expert + 1]) and same_bytes(x[expert + 1 :], y[expert + 1 :])
    assert same_buffers(single, want)

    for ids in ([3, 0], [1], [2]):  # out of order, with a gap; one as a row of several
        some.update_weights(**{name: torch.stack([x[e] for e in ids]) for name, x in fresh.items()}, experts=ids)
    assert same_buffers(some, want)


class Calls(TorchDispatchMode):
    """The names of what is called, and which of them return views."""

    def __init__(self):
        super().__init__()
        self.names, self.views = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.views.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("high_precision", (False, True), ids=("mxfp8", "bf16"))
def test_an_update_is_vectorised_over_experts(layout, high_precision):
    counts = []
    for E in (2, 16):
        weights, _ = layer(E=E)
        if high_precision:
            weights = dict(w1=randn(E, 256, 256), w2=randn(E, 256, 128))
        module = Mxfp8Experts.from_weights(**weights, layout=layout)
        with Calls() as calls:
            module.update_weights(**weights)
        counts.append(calls.names)
    assert counts[0] == counts[1] and any("mxfp8moe" in n or "copy_" in n for n in counts[0])


class Moved(TorchDispatchMode):
    """The element size of whatever is copied with strides or by index, and what is quantised."""

    def __init__(self):
        super().__init__()
        self.sizes, self.quantised = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        source = args[1] if name == "copy_" else args[0] if args else None
        strided = name in ("copy_", "contiguous", "flatten") and not source.is_contiguous()
        if strided or name in ("index", "index_copy_"):
            self.sizes.append(source.element_size())
        if name == "quantize_preshuffle":
            self.quantised.append(source)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_rearranged_moves_in_words(layout):
    """Not byte by byte, which is slow on a GPU: interleaved rows, parts of the intermediate size, experts by id."""
    weights, _ = layer(I=256)
    part = dict(tp_rank=1, tp_size=2)
    other = {name: interleaved(x) if name.startswith("w1") else x for name, x in weights.items()}
    backwards = {name: x.view(torch.uint8).flip(0).view(x.dtype) for name, x in weights.items()}
    cases = (
        (dict(weights), {}, part),
        (other, dict(gate_up_order="interleaved"), {}),
        (other, dict(gate_up_order="interleaved"), part),
        (backwards, dict(experts=[3, 2, 1, 0]), {}),
        ({name: x[::2].contiguous() for name, x in backwards.items()}, dict(experts=[3, 1]), {}),
    )
    for source, options, split in cases:
        want = Mxfp8Experts.from_weights(**weights, layout=layout, **split)
        module = Mxfp8Experts.from_weights(**weights, layout=layout, **split)
        with Moved() as moved:
            module.update_weights(**source, **options)
        assert same_buffers(module, want)
        assert moved.sizes and min(moved.sizes) >= 4, (options, split, moved.sizes)  # scales of I = 128: 4 bytes a row


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", GATE_UP_ORDERS)
@pytest.mark.parametrize("split", ({}, dict(tp_rank=1, tp_size=2), dict(ep_rank=1, ep_size=2)), ids=str)
@pytest.mark.parametrize("experts", (None, (2, 3), (1, 2, 3), (3,)), ids=str)
def test_high_precision_is_rounded_where_it_lies(layout, order, split, experts):
    """Whole or in part, one op reads what was given and writes the buffers: nothing else touches data."""
    w1, w2 = randn(4, 512, 256, dtype=torch.bfloat16), randn(4, 256, 256, dtype=torch.bfloat16)
    module = Mxfp8Experts(4, 256, 256, layout=layout, **split, device=DEVICE)
    want = Mxfp8Experts(4, 256, 256, layout=layout, **split, device=DEVICE)
    ids = range(4) if experts is None else experts
    part = {name: x[ids[0] :] for name, x in dict(w1=w1, w2=w2).items()}
    data = {name: reference.quantize_1x32(x) for name, x in part.items()}
    for name, (codes, scale) in data.items():
        want.update_weights(**{name: codes, f"{name}_scale": scale}, experts=ids, gate_up_order=order)
    with Calls() as calls, Moved() as moved:
        module.update_weights(**part, experts=experts, gate_up_order=order)
    assert same_buffers(module, want)
    within = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in (w1, w2)]
    assert all(first <= x.data_ptr() < end for x, (first, end) in zip(moved.quantised, within, strict=True))
    assert [name for name in calls.names if name not in calls.views] == ["mxfp8moe.quantize_preshuffle.out"] * 2


def test_what_cannot_be_viewed_is_rounded_first():
    """Experts with gaps between them, or values that lie apart."""
    w1, w2 = randn(4, 256, 256, dtype=torch.bfloat16), randn(4, 128, 256, dtype=torch.bfloat16).transpose(1, 2)
    want = Mxfp8Experts.from_weights(w1, w2.contiguous())
    module = Mxfp8Experts(4, 256, 128, device=DEVICE)
    for ids in ([3, 0], [1, 2]):
        module.update_weights(w1[ids], torch.stack([w2[e] for e in ids]), experts=ids)
    assert same_buffers(module, want)
    whole = Mxfp8Experts(4, 256, 128, device=DEVICE)
    whole.update_weights(w1, w2)
    assert same_buffers(whole, want)


def test_updates_in_and_out_of_inference_mode():
    weights, _ = layer()
    with torch.inference_mode():
        module = Mxfp8Experts.from_weights(**weights)
        inside = Mxfp8Experts(4, 256, 128, device=DEVICE)
    inside.update_weights(**weights)
    with torch.inference_mode():
        module.update_weights(**weights)
    module.update_weights(**weights)
    assert same_buffers(module, inside)


def test_what_a_failed_update_leaves():
    weights, _ = layer(bias=True)
    module = Mxfp8Experts.from_weights(**weights)
    before = copy.deepcopy(module)
    fresh, _ = layer(bias=True, seed=1)
    half = {name: x[:2] for name, x in fresh.items()}
    high = randn(*fresh["w2"].shape, dtype=torch.bfloat16)
    other = Mxfp8Experts.from_weights(**{n: x for n, x in weights.items() if "bias" not in n})
    calls = [
        lambda: module.update_weights(),
        lambda: module.update_weights(**half),
        lambda: module.update_weights(**fresh | half),
        lambda: module.update_weights(**half, experts=[0, 4]),
        lambda: module.update_weights(**half, experts=[0, 0]),
        lambda: module.update_weights(**half, experts=[0]),
        lambda: module.update_weights(**half, experts=[0.5, 1.5]),
        lambda: module.update_weights(**half, experts=torch.tensor([0.0, 1.0], device="cpu")),
        lambda: module.update_weights(fresh["w1"], fresh["w2"]),
        lambda: module.update_weights(w1_scale=fresh["w1_scale"]),
        lambda: module.update_weights(**fresh | dict(w2_scale=fresh["w2_scale"].int())),
        lambda: module.update_weights(**fresh | dict(w2=fresh["w2"][:, :-1])),
        lambda: module.update_weights(**fresh | dict(w2_scale=fresh["w2_scale"][..., :-1])),
        lambda: module.update_weights(**fresh | dict(w1_bias=fresh["w1_bias"].to(E4M3))),
        lambda: module.update_weights(**fresh, gate_up_order="up_first"),
        lambda: module.update_weights(**fresh, scale_rounding="up"),
        lambda: module.update_weights(**fresh | dict(w2=high, w2_scale=None), scale_rounding="up"),
        lambda: module.update_weights(**fresh | dict(w2=fresh["w2"].to("meta"))),
        lambda: module.update_weights(**fresh | dict(w2=high.to_sparse(), w2_scale=None)),
        lambda: module.update_weights(**fresh | dict(w2_bias=fresh["w2_bias"].tolist())),
        lambda: other.update_weights(**fresh),
    ]
    messages = "\n".join(error_of(call) for call in calls)
    assert_expected_inline(
        messages,
        """\
Mxfp8Experts: no tensor is given
Mxfp8Experts: w1 has 2 experts; it takes 4, all experts
Mxfp8Experts: w1 has 2 experts; it takes 4, all experts
Mxfp8Experts: experts is [0, 4]; it takes distinct ids from 0 to 3
Mxfp8Experts: experts is [0, 0]; it takes distinct ids from 0 to 3
Mxfp8Experts: w1 has 2 experts; it takes 1, as many as are named
Mxfp8Experts: experts has 0.5; it takes integers
Mxfp8Experts: experts has tensor(0.); it takes integers
Mxfp8Experts: w1 has dtype float8_e4m3fn without w1_scale; it takes bfloat16, float16, float32
Mxfp8Experts: w1_scale is given without w1
Mxfp8Experts: w2_scale has dtype int32; it takes uint8, float8_e8m0fnu
Mxfp8Experts: w2 has shape [4, 255, 128]; it takes [E, 256, 128]
Mxfp8Experts: w2_scale has shape [4, 256, 3]; it takes [E, 256, 4]
Mxfp8Experts: w1_bias has dtype float8_e4m3fn; it takes float32, bfloat16, float16, float64
Mxfp8Experts: gate_up_order is 'up_first'; it takes 'concatenated' or 'interleaved'
Mxfp8Experts: scale_rounding is 'up'; it takes 'rceil', 'floor', 'ceil' or 'even'
Mxfp8Experts: scale_rounding is 'up'; it takes 'rceil', 'floor', 'ceil' or 'even'
Mxfp8Experts: w2 is on meta, without values; it takes a tensor that has them
Mxfp8Experts: w2 has layout torch.sparse_coo; it takes torch.strided
Mxfp8Experts: w2_bias is a list; it takes a tensor
Mxfp8Experts: w1_bias is given; these experts have no biases""",
    )
    assert same_buffers(module, before)


# --- what nn.Module does


def test_conversions_move_and_never_cast():
    weights, tokens = layer(bias=True)
    module = Mxfp8Experts.from_weights(**weights, ep_rank=1, ep_size=2)
    want = module_bytes(copy.deepcopy(module))
    for convert in (
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.float(),
        lambda m: m.to(DEVICE, torch.float32),
    ):
        assert convert(module) is module
        got = module_bytes(module)
        assert all(torch.equal(got[n], want[n]) for n in want if "bias" not in n)
    assert module.w1_bias.dtype is torch.float32
    assert module.half().w1_bias.dtype is module.bias_dtype is torch.float16
    assert "MXFP8 weights cannot be converted to float32" in error_of(lambda: module.type(torch.float32))
    assert module.w1.dtype is E4M3 and module.w1_scale.dtype is torch.uint8
    assert all(torch.equal(x, want[n]) for n, x in module_bytes(module).items() if "bias" not in n)


def test_expert_map_survives_memory_without_values():
    module = Mxfp8Experts(5, 256, 128, ep_rank=1, ep_size=2, shared=SharedExpert(), device="meta")
    module.to_empty(device=DEVICE)
    assert module.expert_map.tolist() == [-1, -1, -1, 0, 1, 2] and module.expert_map.device == module.w1.device
    assert module.to_empty(device=DEVICE).expert_map.tolist() == [-1, -1, -1, 0, 1, 2]


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))), ids=("deepcopy", "pickle"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies(copied, layout):
    weights, tokens = layer(bias=True)
    module = Mxfp8Experts.from_weights(**weights, layout=layout, ep_rank=1, ep_size=2, **OAI)
    other = copied(module)
    assert same_buffers(module, other) and same_bytes(module(**tokens), other(**tokens))
    assert str(module) == str(other)
    other.w1.view(torch.uint8).zero_()
    assert module.w1.view(torch.uint8).any()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert same_buffers(torch.load(file, weights_only=False), module)


# --- state_dict


def saved(module: torch.nn.Module) -> dict:
    """Its state_dict by way of a file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("of", LAYOUTS)
@pytest.mark.parametrize("assign", (False, True), ids=("copied", "assigned"))
def test_state_dict_of_any_layout(of, to, assign):
    weights, tokens = layer(I=96, bias=True)
    ranks = dict(tp_rank=0, tp_size=2, ep_rank=1, ep_size=2, shared=SharedExpert())
    source = Mxfp8Experts.from_weights(**weights, layout=of, **ranks)
    state = saved(torch.nn.Sequential(source))
    assert all(isinstance(x, torch.Tensor) for x in state.values())
    module = Mxfp8Experts(3, 256, 96, layout=to, device=DEVICE, bias=True, bias_dtype=torch.float32, **ranks)
    where = {name: x.data_ptr() for name, x in module.named_buffers()}
    model = torch.nn.Sequential(module)
    assert not any(model.load_state_dict(state, assign=assign))
    assert same_buffers(module, Mxfp8Experts.from_weights(**weights, layout=to, **ranks))
    assert assign or {name: x.data_ptr() for name, x in module.named_buffers()} == where
    assert module.layout == to
    assert_agrees(module(**tokens), source(**tokens))


def test_a_state_dict_is_never_taken_wrongly():
    weights, _ = layer()
    source = torch.nn.Sequential(Mxfp8Experts.from_weights(**weights, layout="aiter_gfx950"))
    state = saved(source)
    unnamed = {name: x for name, x in state.items() if "extra" not in name}
    cast = {name: x.bfloat16() if x.dtype is E4M3 else x for name, x in state.items()}
    other = saved(torch.nn.Sequential(Mxfp8Experts.from_weights(**weights, tp_rank=1, tp_size=2)))
    sizes = saved(torch.nn.Sequential(Mxfp8Experts.from_weights(**layer(I=256)[0])))
    modules = [Mxfp8Experts(4, 256, 128, layout=layout, device=DEVICE) for layout in LAYOUTS]
    every = {name: x.bfloat16() for name, x in state.items()}
    listed = state | {"0._extra_state": torch.tensor(list(b"[]"), dtype=torch.uint8)}
    garbled = state | {"0._extra_state": torch.tensor([255, 1], dtype=torch.uint8)}
    order = torch.tensor([1, 0, 3, 2], dtype=torch.int32)
    mapped = saved(torch.nn.Sequential(Mxfp8Experts.from_weights(**weights, expert_map=order)))
    texts = []
    for bad, strict in (
        (unnamed, True), (unnamed, False), (cast, False), (every, True), (listed, True), (garbled, True),
        (other, False), (sizes, False), (mapped, False),
    ):  # fmt: skip
        for module in modules:
            before = copy.deepcopy(module)
            text = error_of(lambda: torch.nn.Sequential(module).load_state_dict(bad, strict=strict))
            assert same_buffers(module, before)
        texts.append(text.split(":\n\t", 1)[1].split("\n\tsize mismatch")[0])
    assert_expected_inline("\n".join(texts), """\
0.w1: 0._extra_state is missing, which says in what layout it is; tensors of a checkpoint go through from_weights or update_weights
0.w1: 0._extra_state is missing, which says in what layout it is; tensors of a checkpoint go through from_weights or update_weights
0.w1 has dtype bfloat16; it takes float8_e4m3fn
	0.w2 has dtype bfloat16; it takes float8_e4m3fn
0._extra_state is not what a state_dict of Mxfp8Experts has, a JSON object in bytes of uint8
0._extra_state is not what a state_dict of Mxfp8Experts has, a JSON object in bytes of uint8
0._extra_state is not what a state_dict of Mxfp8Experts has, a JSON object in bytes of uint8
0.tp is [1, 2] in the state_dict; the module takes [0, 1]
0.intermediate_size is 256 in the state_dict; the module takes 128
0.expert_map is in the state_dict; the module has none, and its experts lie in another order""")
    module = Mxfp8Experts(4, 256, 128, expert_map=order, device=DEVICE)
    before = copy.deepcopy(module)
    assert "expert_map is missing in the state_dict" in error_of(lambda: module.load_state_dict(saved(source[0]), False))
    assert same_buffers(module, before)
    model = torch.nn.Sequential(modules[list(LAYOUTS).index("aiter_gfx950")])
    assert model.load_state_dict({}, strict=False).missing_keys[-1] == "0._extra_state"
    del state["0.w2"]
    assert "Missing key(s) in state_dict: \"0.w2\"" in error_of(lambda: model.load_state_dict(state))


@pytest.mark.parametrize("of, to", itertools.permutations(LAYOUTS, 2))
def test_what_cannot_be_brought_into_the_modules_layout(of, to):
    """Weights without their scales, or of other sizes: their bytes would lie in the wrong order."""
    state = Mxfp8Experts.from_weights(**layer(I=96, bias=True)[0], layout=of).state_dict()
    module = Mxfp8Experts(4, 256, 96, layout=to, device=DEVICE, bias=True, bias_dtype=torch.float32)
    before = copy.deepcopy(module)
    for name, beside in (("w1", "w1_scale"), ("w1_scale", "w1"), ("w2", "w2_scale"), ("w2_scale", "w2")):
        partial = {key: x for key, x in state.items() if key != name}
        assert f"{name} is missing in the state_dict, which has {beside} in layout '{of}'" in error_of(
            lambda: module.load_state_dict(partial, strict=False)
        )
    for name in ("w1", "w2", "w2_scale", "w1_bias"):
        shape, cut = list(state[name].shape), state | {name: state[name][1:]}
        got = f"{name} has shape {list(cut[name].shape)}; it takes {shape} in layout '{of}'"
        assert got in error_of(lambda: module.load_state_dict(cut, strict=False))
    assert same_buffers(module, before)


# --- compiled and exported


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("shared", (None, SharedExpert()), ids=("routed", "shared"))
def test_compiles_to_one_graph(shared, fresh_compiler):
    weights, tokens = layer()
    module = Mxfp8Experts.from_weights(**weights, shared=shared, ep_rank=0, ep_size=2)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if "mxfp8moe" in str(node.target)])
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    for T in (6, 5, 3):
        some = layer(T=T)[1]
        assert same_bytes(compiled(**some), module(**some))
    assert graphs == [["mxfp8moe.fused_moe"]]
    module.update_weights(**layer(seed=3)[0])
    assert same_bytes(compiled(**tokens), module(**tokens)) and len(graphs) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exports(layout, fresh_compiler):
    weights, tokens = layer(bias=True)
    options = dict(shared=SharedExpert(), ep_rank=1, ep_size=2, layout=layout)
    module = Mxfp8Experts.from_weights(**weights, **options)
    T = torch.export.Dim("T", min=1, max=256)
    program = torch.export.export(module, (), tokens, dynamic_shapes={name: {0: T} for name in tokens})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program, torch.export.load(file)):
        for count in (6, 2):
            some = {name: x[:count] for name, x in tokens.items()}
            assert same_bytes(exported.module()(**some), module(**some))


# --- errors


def test_wrong_construction():
    weights, _ = layer()
    sizes = 4, 256, 128
    calls = [
        lambda: Mxfp8Experts(4, 256, 100),
        lambda: Mxfp8Experts(4, 250, 128),
        lambda: Mxfp8Experts(0, 256, 128),
        lambda: Mxfp8Experts(*sizes, layout="aiter"),
        lambda: Mxfp8Experts(4, 96, 128, layout="aiter_gfx950"),
        lambda: Mxfp8Experts(*sizes, swiglu_limit=0.0),
        lambda: Mxfp8Experts(*sizes, activation_dtype="fp8"),
        lambda: Mxfp8Experts(*sizes, backend="cuda"),
        lambda: Mxfp8Experts(*sizes, tp_rank=2, tp_size=2),
        lambda: Mxfp8Experts(*sizes, ep_rank=-1, ep_size=2),
        lambda: Mxfp8Experts(*sizes, tp_rank=0, tp_size=5),
        lambda: Mxfp8Experts(*sizes, ep_rank=0, ep_size=5),
        lambda: Mxfp8Experts(*sizes, expert_map=torch.tensor([0, 1, 1, -1], dtype=torch.int32)),
        lambda: Mxfp8Experts(*sizes, expert_map=torch.tensor([0, 1, 2], dtype=torch.int32)),
        lambda: Mxfp8Experts(*sizes, expert_map=torch.tensor([0, 1, 2, 3])),
        lambda: Mxfp8Experts(*sizes, expert_map=[0, 1, 2, 3]),
        lambda: Mxfp8Experts.from_weights(None, weights["w2"]),
        lambda: Mxfp8Experts.from_weights(randn(4, 256, 256), None),
        lambda: Mxfp8Experts.from_weights(weights["w1"][0], weights["w2"]),
        lambda: Mxfp8Experts.from_weights(weights["w1"], weights["w2"]),
        lambda: Mxfp8Experts.from_weights(**weights | dict(w2=weights["w2"][:3])),
        lambda: Mxfp8Experts.from_weights(**weights | dict(w1_scale=weights["w1_scale"][:, :, :-1])),
        lambda: Mxfp8Experts(*sizes, device=DEVICE).set_layout("column_major"),
    ]
    assert_expected_inline("\n".join(error_of(call) for call in calls), """\
Mxfp8Experts: intermediate_size is 100; it takes a multiple of 32 above 0
fused_moe: w1 has shape [4, 256, 250]; it takes a hidden size divisible by 32, [E, 2I, H]
fused_moe: w1 has shape [0, 256, 256]; it takes at least one expert
Mxfp8Experts: layout is 'aiter'; it takes 'auto', 'row_major', 'aiter_gfx950'
Mxfp8Experts: layout is 'aiter_gfx950'; the experts do not fit: layout 'aiter_gfx950' takes hidden sizes divisible by 256, not 96
fused_moe: swiglu_limit is 0.0; it takes None or a finite number > 0
fused_moe: activation_dtype is 'fp8'; it takes 'mxfp8' or 'bf16'
fused_moe: backend is 'cuda'; it takes 'auto', 'cpu', 'aiter', 'triton', 'reference'
Mxfp8Experts: tp_rank is 2; it takes 0 to tp_size - 1, 1
Mxfp8Experts: ep_rank is -1; it takes 0 to ep_size - 1, 1
tensor_parallel_range: tp_size is 5; it takes at most 4, the blocks of 32 in an intermediate size of 128
expert_parallel_map: ep_size is 5; it takes at most 4, one expert each
Mxfp8Experts: expert_map has local experts [0, 1, 1]; it takes each of 0 to E - 1 once
Mxfp8Experts: expert_map is int32 [3]; it takes int32 [4]
Mxfp8Experts: expert_map is int64 [4]; it takes int32 [4]
Mxfp8Experts: expert_map is a list; it takes a tensor
Mxfp8Experts: w1 is None; it takes a tensor
Mxfp8Experts: w2 is None; it takes a tensor
Mxfp8Experts: w1 has 2 dimensions; it takes 3, [G, 2I, H]
Mxfp8Experts: w1 has dtype float8_e4m3fn without w1_scale; it takes bfloat16, float16, float32
Mxfp8Experts: w2 has 3 experts; it takes 4, as many as the others
Mxfp8Experts: w1_scale has shape [4, 256, 7]; it takes [E, 256, 8]
Mxfp8Experts: layout is 'column_major'; it takes 'auto', 'row_major', 'aiter_gfx950'""")
