"""Expert and tensor parallelism against one rank: gloo with 2 and 4 processes, NCCL with 2 GPUs if there are two."""

import functools
import json
import os
import re
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import device
import torch_mxfp8moe
from helpers import PACKAGE, Capture, assert_agrees, assert_equal, error_of, moe_inputs, same_bytes
from ranks import Ranks
from torch_mxfp8moe import Mxfp8Experts, SharedExpert, distributed, sharding

GPT_OSS = dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=7.0)
TOKENS = ("hidden_states", "topk_weights", "topk_ids", "hidden_states_scale")
PATHS = ("allgather", "alltoall", "capacity", "allreduce", "tp")

nccl_why_not = (
    f"needs two GPUs that PyTorch can use, and --device cuda: there are {torch.cuda.device_count()}"
    if torch.cuda.device_count() < 2 or device.NAME != "cuda"
    else None
)
gloo_why_not = None if device.NAME == "cpu" else "gloo: the ranks' tensors are on the CPU"


def needs(backend: str):
    why_not = nccl_why_not if backend == "nccl" else gloo_why_not
    return pytest.mark.skipif(why_not is not None, reason=str(why_not))


def groups(*names: str):
    """Parameters of the fixture ``ranks``."""
    return [pytest.param(name, marks=needs(name.split("-")[0])) for name in names]


every_group = pytest.mark.parametrize("ranks", groups("gloo-2", "gloo-4", "nccl-2"), indirect=True)
two_ranks = pytest.mark.parametrize("ranks", groups("gloo-2", "nccl-2"), indirect=True)
four_ranks = pytest.mark.parametrize("ranks", groups("gloo-4", "nccl-2"), indirect=True)

pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def pools():
    """Ranks by name, started when a test asks for them."""
    started = {}
    yield started
    for pool in started.values():
        pool.close()


@pytest.fixture
def ranks(request, pools):
    if request.param not in pools:
        backend, world_size = request.param.split("-")
        pools[request.param] = Ranks(backend, int(world_size))
    pools[request.param].world_size = int(request.param.split("-")[1])
    return pools[request.param]


# --- on the ranks


def to(device, tensors: dict) -> dict:
    return {name: x.to(device) for name, x in tensors.items()}


def layer(seed: int = 0, shared: int = 0, skewed: bool = False, hostile: bool = False, **sizes) -> dict:
    """The arguments of a call on one device. With ``shared`` the last slots go to the last experts, at weight 1."""
    sizes = dict(T=13, H=96, I=160, E=6, K=3, bias_dtype=torch.float32) | sizes
    inputs = moe_inputs(seed=seed, **sizes)
    ids = inputs["topk_ids"]
    if skewed:
        ids.fill_(1)  # of the first rank, twice and more: the others' experts get nothing
        ids[::2, 0] = 0
    if hostile:
        ids[::3, 0] = -1
        ids[1::4, 1] = torch.iinfo(ids.dtype).max
        ids[2::5, -1] = torch.iinfo(ids.dtype).min
        ids[3::5, 0] = 2**32 + 1 if ids.dtype is torch.int64 else sizes["E"]
        ids[5] = -1
    for i in range(shared):
        ids[:, -1 - i], inputs["topk_weights"][:, -1 - i] = sizes["E"] - 1 - i, 1
    return inputs


def shares(T: int, world_size: int, uneven: bool) -> list[int]:
    """Tokens of each rank: the last one has none, and one has one, if they are uneven."""
    if not uneven:
        assert T % world_size == 0
        return [T // world_size] * world_size
    return [T - 1, 0] if world_size == 2 else [T - 2, 1, 0][: world_size - 1] + [1]


def bind(path: str, inputs: dict, group, counts: list[int], shared: int = 0):
    """(function, arguments, rows): ``path`` on this rank's weights and tokens, and which rows of the whole it gives."""
    rank, n = group.rank(), group.size()
    weights = {name: x for name, x in inputs.items() if name.startswith("w")}
    call = {name: x for name, x in inputs.items() if name in TOKENS} | dict(group=group)
    if path == "tp":
        return distributed.fused_moe_tp, call | sharding.tensor_parallel_shard(weights, rank, n), slice(None)
    routed, where = inputs["w1"].shape[0] - shared, inputs["w1"].device
    call |= sharding.expert_parallel_shard(weights, rank, n, num_shared_experts=shared)
    call["expert_map"] = sharding.expert_parallel_map(routed, rank, n, num_shared_experts=shared, device=where)
    call["num_shared_experts"] = shared
    if path == "allreduce":
        return distributed.fused_moe_ep_allreduce, call, slice(None)
    start = sum(counts[:rank])
    rows = slice(start, start + counts[rank])
    call |= {name: inputs[name][rows] for name in TOKENS if name in inputs}
    if path == "allgather":
        call["max_tokens"] = None if len(set(counts)) == 1 else max(counts) + 1
        return distributed.fused_moe_ep_allgather, call, rows
    call["expert_owner"] = sharding.expert_parallel_owner(routed, n, device=where)
    call["capacity"] = max(counts) if path == "capacity" else None
    return distributed.fused_moe_ep_alltoall, call, rows


def run_path(path: str, inputs: dict, group, counts: list[int], shared: int = 0, **options):
    """(what ``path`` gives this rank, which rows of the whole those are)."""
    function, call, rows = bind(path, inputs, group, counts, shared)
    return function(**call, **options), rows


def agrees(group, device, *, path, uneven=True, shared=0, options={}, reduce_dtype=None, **sizes):
    """The path's result equals one rank's within the contract's tolerance."""
    T = 13 if uneven else 12
    inputs = to(device, layer(T=T, shared=shared, **sizes))
    counts = shares(len(inputs["topk_ids"]), group.size(), uneven)
    want = torch_mxfp8moe.fused_moe(**inputs, **options)
    options = options | dict(reduce_dtype=reduce_dtype)
    got, rows = run_path(path, inputs, group, counts, shared, **options)
    assert_agrees(got, want[rows])
    unrouted = ~((inputs["topk_ids"] >= 0) & (inputs["topk_ids"] < inputs["w1"].shape[0])).any(1)
    assert not got[unrouted[rows]].any()
    again, _ = run_path(path, inputs, group, counts, shared, **options)
    assert same_bytes(got, again)


# --- against one rank


@every_group
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation_dtype", ("mxfp8", "bf16"))
def test_ranks_together_give_what_one_gives(ranks, path, activation_dtype):
    """Uneven tokens, a rank with none; biases; gpt-oss's SwiGLU; ids that are no experts, of both dtypes."""
    for id_dtype in (torch.int32, torch.int64):
        options = dict(activation_dtype=activation_dtype, **GPT_OSS)
        ranks(agrees, path=path, hostile=True, id_dtype=id_dtype, options=options)


@every_group
@pytest.mark.parametrize("path", PATHS)
def test_ranks_whose_experts_get_nothing(ranks, path):
    ranks(agrees, path=path, skewed=True, uneven=ranks.world_size == 4)


@every_group
@pytest.mark.parametrize("path", PATHS)
def test_a_shared_expert_counts_once(ranks, path):
    ranks(agrees, path=path, shared=1, E=7)
    ranks(agrees, path=path, shared=2, E=8, K=4, uneven=False)


@four_ranks
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_other_dtypes_of_the_hidden_states(ranks, path, dtype):
    for activation_dtype in ("mxfp8", "bf16"):
        ranks(agrees, path=path, dtype=dtype, options=dict(activation_dtype=activation_dtype))
    ranks(agrees, path=path, dtype=dtype, options=dict(out_dtype=torch.bfloat16), reduce_dtype=torch.float32)


@four_ranks
@pytest.mark.parametrize("path", PATHS)
def test_hidden_states_that_arrive_quantised(ranks, path):
    ranks(agrees, path=path, scaled=True)


@four_ranks
@pytest.mark.parametrize("path", PATHS)
def test_router_weights_on_the_input(ranks, path):
    ranks(agrees, path=path, K=1, options=dict(apply_router_weight_on_input=True))


# --- bit for bit


def exact_parts(group, device):
    """The all-gather path: each rank's part by hand, added."""
    inputs = to(device, layer(T=12))
    weights = {name: x for name, x in inputs.items() if name.startswith("w")}
    tokens = {name: x for name, x in inputs.items() if name in TOKENS}
    n, rank = group.size(), group.rank()
    parts = []
    for r in range(n):
        held = sharding.expert_parallel_shard(weights, r, n)
        expert_map = sharding.expert_parallel_map(6, r, n, device=device)
        parts.append(torch_mxfp8moe.fused_moe(**tokens, **held, expert_map=expert_map))
    own = slice(rank * 12 // n, (rank + 1) * 12 // n)
    got, _ = run_path("allgather", inputs, group, [12 // n] * n)
    if n == 2:
        assert_equal(got, sum(parts)[own])
    alltoall, _ = run_path("alltoall", inputs, group, [12 // n] * n)
    exact = sum(part.float() for part in parts)[own]
    assert_agrees(got, exact.to(got.dtype))
    if torch.device(device).type == "cpu":  # rows do not depend on the others: the products are the same ones
        assert_equal(alltoall, exact.to(got.dtype))
    ids, first = inputs["topk_ids"][own], sharding.expert_parallel_range(6, 0, n)[1]
    alone = (ids < first).all(1)
    assert_equal(got[alone], parts[0][own][alone])


@every_group
def test_what_a_rank_adds_is_fused_moe_on_its_experts(ranks):
    ranks(exact_parts)


def dispatch_is_lossless(group, device, path, activation_dtype, dtype):
    inputs = to(device, layer(dtype=dtype))
    counts = shares(13, group.size(), True)
    quantized = (False, None) if activation_dtype == "bf16" else (False, True, None)
    results = [
        run_path(path, inputs, group, counts, quantize_dispatch=q, activation_dtype=activation_dtype)[0]
        for q in quantized
    ]
    assert same_bytes(*results)


@two_ranks
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("path", ("allgather", "alltoall", "capacity"))
def test_the_bytes_that_are_sent_change_no_bit(ranks, path, dtype):
    for activation_dtype in ("mxfp8", "bf16"):
        ranks(dispatch_is_lossless, path=path, activation_dtype=activation_dtype, dtype=dtype)


@needs("gloo")
@pytest.mark.parametrize("ranks", (2, 8, 32))
def test_rounding_at_every_hop_of_a_ring_stays_within_the_tolerance(ranks):
    """Many ranks' parts, added one after the other: in bf16 for experts, and for slices on up to 8 ranks."""
    inputs = moe_inputs(T=64, H=256, I=1024, E=32, K=8)
    weights = {name: x for name, x in inputs.items() if name.startswith("w")}
    tokens = {name: x for name, x in inputs.items() if name in TOKENS}
    want = torch_mxfp8moe.reference.fused_moe(**inputs)

    def parts(**options):
        for rank in range(ranks):
            held = sharding.expert_parallel_shard(weights, rank, ranks)
            expert_map = sharding.expert_parallel_map(32, rank, ranks)
            slices = sharding.tensor_parallel_shard(weights, rank, ranks)
            yield (
                torch_mxfp8moe.fused_moe(**tokens, **held, expert_map=expert_map),
                torch_mxfp8moe.fused_moe(**tokens, **slices, **options),
            )

    experts, slices = map(sum, zip(*parts(out_dtype=torch.float32 if ranks > 8 else None)))
    assert_agrees(experts, want)
    assert_agrees(slices.to(want.dtype), want)


# --- token counts on the device, capacity


def changing_num_tokens(group, device, path):
    inputs = to(device, layer(T=12))
    n, rank = group.size(), group.rank()
    num_tokens = torch.zeros(1, dtype=torch.int32, device=device)
    for real in ([3] * n, [0] * n, list(range(n)), [12] * n):
        num_tokens.fill_(real[rank])
        got, rows = run_path(path, inputs, group, [12 // n] * n, num_tokens=num_tokens)
        want = torch_mxfp8moe.fused_moe(**inputs)[rows]
        want[real[rank] :] = 0
        assert_agrees(got, want)
        assert not got[real[rank] :].any()


@two_ranks
@pytest.mark.parametrize("path", ("allgather", "alltoall", "capacity"))
def test_num_tokens_differs_from_rank_to_rank(ranks, path):
    ranks(changing_num_tokens, path=path)


def too_little_capacity(group, device):
    n = group.size()
    inputs = to(device, layer(T=12, skewed=True, K=1))  # all of them to the first rank
    function, call, rows = bind("capacity", inputs, group, [12 // n] * n)
    got = function(**call | dict(capacity=2))
    assert_agrees(got[:2], torch_mxfp8moe.fused_moe(**inputs)[rows][:2])
    assert got[2:].isnan().all()


@two_ranks
def test_tokens_beyond_the_capacity_are_nan(ranks):
    ranks(too_little_capacity)


# --- placement


def scattered_placement(group, device, path):
    """Experts 0, 2, 4 on the last rank, 1, 3, 5 spread over the others, in falling order."""
    n, rank = group.size(), group.rank()
    owner = [n - 1 if e % 2 == 0 else (e // 2) % (n - 1) for e in range(6)]
    held = [e for e in reversed(range(6)) if owner[e] == rank]
    expert_map = torch.full((6,), -1, dtype=torch.int32)
    expert_map[held] = torch.arange(len(held), dtype=torch.int32)
    inputs = to(device, layer(T=12))
    function, call, rows = bind(path, inputs, group, [12 // n] * n)
    for name in (name for name in inputs if name.startswith("w")):
        x = inputs[name]
        call[name] = x[held] if x.itemsize > 1 else x.view(torch.uint8)[held].view(x.dtype)
    call["expert_map"] = expert_map.to(device)
    found = distributed.gather_expert_owner(expert_map.to(device), group)
    assert found.tolist() == owner and found.dtype is torch.int32
    if path == "alltoall":
        call["expert_owner"] = found
    assert_agrees(function(**call), torch_mxfp8moe.fused_moe(**inputs)[rows])
    message = error_of(lambda: distributed.gather_expert_owner(torch.zeros(2, dtype=torch.int32, device=device)))
    assert message == f"expert_map: expert 0 is held by the ranks {list(range(n))}; it takes exactly one"


@four_ranks
@pytest.mark.parametrize("path", ("allgather", "alltoall"))
def test_experts_that_are_not_placed_in_order(ranks, path):
    ranks(scattered_placement, path=path)


# --- the experts' module


def module_agrees(group, device, path):
    """The module of a rank, with a fused shared expert, through ``path``."""
    n, rank = group.size(), group.rank()
    inputs = to(device, layer(T=12))
    weights = {name: x for name, x in inputs.items() if name.startswith("w")}
    tokens = {name: x for name, x in inputs.items() if name in TOKENS}
    tokens["topk_ids"] = tokens["topk_ids"] % 5
    shared = SharedExpert(**GPT_OSS)
    want = Mxfp8Experts.from_weights(**weights, shared=shared, **GPT_OSS, device=device)(**tokens)
    held = dict(tp_rank=rank, tp_size=n) if path == "tp" else dict(ep_rank=rank, ep_size=n)
    module = Mxfp8Experts.from_weights(**weights, shared=shared, **GPT_OSS, **held, device=device)
    rows, extra = slice(None), {}
    if path in ("allgather", "alltoall"):
        rows = slice(12 // n * rank, 12 // n * (rank + 1))
    if path == "alltoall":
        extra["expert_owner"] = sharding.expert_parallel_owner(5, n, device=device)
    function = getattr(distributed, "fused_moe_tp" if path == "tp" else f"fused_moe_ep_{path}")
    arguments = distributed.arguments_of(module, **{name: x[rows] for name, x in tokens.items()})
    assert_agrees(function(**arguments, **extra, group=group), want[rows])


@four_ranks
@pytest.mark.parametrize("path", ("allgather", "alltoall", "allreduce", "tp"))
def test_modules_on_ranks_give_what_one_gives(ranks, path):
    ranks(module_agrees, path=path)


# --- who holds what


@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2))
@settings(max_examples=50)
def test_every_expert_and_every_block_has_one_rank(parts, size, shared):
    if parts < size:
        assert "ep_size is" in error_of(lambda: sharding.expert_parallel_range(parts, 0, size))
        assert "tp_size is" in error_of(lambda: sharding.tensor_parallel_range(32 * parts, 0, size))
        return
    owner = sharding.expert_parallel_owner(parts, size)
    experts, columns = [], []
    for rank in range(size):
        held = range(*sharding.expert_parallel_range(parts, rank, size))
        experts += held
        expert_map = sharding.expert_parallel_map(parts, rank, size, num_shared_experts=shared)
        ids = (expert_map >= 0).nonzero().flatten().tolist()
        assert ids == [*held, *range(parts, parts + shared)]
        assert expert_map[ids].tolist() == list(range(len(ids)))
        assert (owner[held.start : held.stop] == rank).all() and (owner == rank).sum() == len(held)
        columns += range(*sharding.tensor_parallel_range(32 * parts, rank, size))
    assert experts == list(range(parts)) and columns == list(range(32 * parts))


def test_shards_are_slices_of_the_weights():
    weights = {name: x for name, x in moe_inputs(I=96, E=5, bias_dtype=torch.float32).items() if name.startswith("w")}
    parts = [sharding.tensor_parallel_shard(weights, rank, 2) for rank in range(2)]
    assert [part["w2"].shape[2] for part in parts] == [32, 64]
    for name, x in weights.items():
        halves = [part[name].view(torch.uint8) if x.itemsize == 1 else part[name] for part in parts]
        if name == "w2_bias":
            assert all(torch.equal(half, x) for half in halves)
            continue
        if name.startswith("w1"):
            halves = [half.unflatten(1, (2, -1)) for half in halves]
        whole = torch.cat(halves, 2)
        whole = whole.flatten(1, 2) if name.startswith("w1") else whole
        assert same_bytes(whole.view(x.dtype), x)
    message = error_of(lambda: sharding.tensor_parallel_range(48, 0, 1))
    assert message == "tensor_parallel_range: an intermediate size of 48 is given; it takes a multiple of 32"
    message = error_of(lambda: sharding.expert_parallel_range(4, 2, 2))
    assert message == "expert_parallel_map: ep_rank is 2; it takes 0 to ep_size - 1, 1"


# --- the host


class Host(TorchDispatchMode):
    """The operations of a call by name, and after how many of them the host read a tensor."""

    def __init__(self):
        super().__init__()
        self.names, self.reads = [], []

    def __enter__(self):
        tolist = torch.Tensor.tolist
        self.patch = mock.patch.object(torch.Tensor, "tolist", lambda x: self.reads.append(len(self.names)) or tolist(x))
        self.patch.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patch.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(func):
            self.reads.append(len(self.names))
        self.names.append(func.name().split("::")[1])
        return func(*args, **(kwargs or {}))


def on_the_host(group, device, path):
    function, call, _ = bind(path, to(device, layer(T=12)), group, [6, 6])
    with torch.inference_mode():
        function(**call)
        with Host() as host:
            function(**call)
    return host.reads, host.names


@two_ranks
def test_exact_alltoall_reads_once_when_all_else_is_queued(ranks):
    """The device works while the host waits for the split sizes; what is left to queue then depends on them. The other
    paths read nothing. No rank masks rows for shared experts where there are none."""
    for path in PATHS:
        for reads, names in ranks(on_the_host, path=path):
            assert len(reads) == (path == "alltoall"), path
            if reads:
                after = names[reads[0] :]
                assert "fused_moe" in after and after.count("all_to_all_single") == 2
                early = {"cat", "pad", "sort.stable", "sort", "scatter.src", "cumsum", "quantize_1x32", "arange", "full"}
                assert early & set(names) and not early & set(after)
                assert len(after) <= 32, after
            if path in ("allreduce", "tp"):
                assert not {"arange", "remainder.Scalar", "where.ScalarOther"} & set(names), path


# --- graphs of a compiler


def one_graph(group, device, path):
    """One graph, the eager bits, no recompiling for other token counts; its collectives."""
    torch._dynamo.reset()
    torch._dynamo.config.capture_scalar_outputs = path == "alltoall"
    capture = Capture()
    inputs = to(device, layer(T=20 * group.size()))
    counts = [20] * group.size()
    function, call, _ = bind(path, inputs, group, counts)
    weights = {name: x for name, x in call.items() if name not in TOKENS}
    weights["group"] = None if path == "tp" else group  # the default group is found in a compiled graph too
    compiled = torch.compile(lambda **tokens: function(**weights, **tokens), backend=capture, fullgraph=True)
    with torch.inference_mode():
        for T in (6, 5, 20, 9, 2):
            tokens = {name: x[:T] for name, x in call.items() if name in TOKENS}
            assert same_bytes(compiled(**tokens), function(**weights, **tokens))
    torch._dynamo.config.capture_scalar_outputs = False
    assert len(capture.graphs) == 2, "the first token count, and all others"
    calls = [str(node.target) for node in capture.graphs[-1].graph.nodes if node.op == "call_function"]
    kept = [name for name in calls if "c10d" in name or "mxfp8moe" in name]
    return "\n".join(re.sub("_c10d_functional|mxfp8moe", "", name) for name in kept if "wait_tensor" not in name)


@two_ranks
def test_one_graph_in_a_compiled_model(ranks):
    graphs = {path: ranks(one_graph, path=path) for path in PATHS}
    assert all(first == second for first, second in graphs.values())
    assert_expected_inline("\n".join(f"-- {path}\n{nodes}" for path, (nodes, _) in graphs.items()), """\
-- allgather
.quantize_1x32
.all_gather_into_tensor
.fused_moe
.reduce_scatter_tensor
-- alltoall
.quantize_1x32
.all_to_all_single
.all_to_all_single
.fused_moe
.all_to_all_single
-- capacity
.quantize_1x32
.all_to_all_single
.fused_moe
.all_to_all_single
-- allreduce
.fused_moe
.all_reduce
-- tp
.fused_moe
.all_reduce""")


def inductor(group, device, path):
    torch._dynamo.reset()

    function, call, _ = bind(path, to(device, layer(T=12)), group, [6, 6])

    def step(call):
        return function(**call | dict(hidden_states=call["hidden_states"] * 2)) + 1

    with torch.inference_mode():
        assert_agrees(torch.compile(step, fullgraph=True)(call), step(call))


@two_ranks
@pytest.mark.parametrize("path", ("allgather", "capacity", "tp"))
def test_inductor(ranks, path):
    ranks(inductor, path=path)


# --- errors


def wrong_calls(group, device):
    """Every rank raises, before anything is sent: the group works on afterwards."""
    _, call, _ = bind("allreduce", to(device, layer(T=4)), group, [])
    call.pop("num_shared_experts")
    owner = sharding.expert_parallel_owner(6, group.size(), device=device)
    gather, exchange = distributed.fused_moe_ep_allgather, distributed.fused_moe_ep_alltoall
    grad = call["hidden_states"].clone().requires_grad_()
    wrong = {
        "w2": lambda: gather(**call | dict(w2=call["w2"][:1])),
        "out": lambda: gather(**call, out=torch.empty_like(call["hidden_states"])),
        "group": lambda: gather(**call | dict(group="tp")),
        "max_tokens": lambda: gather(**call, max_tokens=3),
        "shared": lambda: gather(**call, num_shared_experts=6),
        "shared below 0": lambda: distributed.fused_moe_ep_allreduce(**call, num_shared_experts=-1),
        "no map": lambda: gather(**call | dict(expert_map=None)),
        "no map, compiled": lambda: torch.compile(gather, backend="eager")(**call | dict(expert_map=None)),
        "no map, shared": lambda: exchange(
            **call | dict(expert_map=None), expert_owner=owner, num_shared_experts=1
        ),
        "no map, allreduce": lambda: distributed.fused_moe_ep_allreduce(**call | dict(expert_map=None)),
        "quantize": lambda: gather(**call, quantize_dispatch=True, activation_dtype="bf16"),
        "owner": lambda: exchange(**call, expert_owner=owner[:5]),
        "owner's dtype": lambda: exchange(**call, expert_owner=owner.float()),
        "capacity": lambda: exchange(**call, expert_owner=owner, capacity=0),
        "grad": lambda: gather(**call | dict(hidden_states=grad), activation_dtype="bf16"),
        "grad, compiled": lambda: torch.compile(gather, backend="eager")(
            **call | dict(hidden_states=grad), activation_dtype="bf16"
        ),
    }
    messages = [f"{name}: {error_of(function).splitlines()[0]}" for name, function in wrong.items()]
    agrees(group, device, path="alltoall")
    return "\n".join(messages)


@two_ranks
def test_wrong_calls_say_what_they_take(ranks):
    first, second = ranks(wrong_calls)
    assert first == second
    assert_expected_inline(first.replace("cuda:0", "cpu"), """\
w2: fused_moe: w2 has shape [1, 96, 160]; it takes [3, 96, 160] (E, H, I of w1 [E, 2I, H])
out: out is given; it takes none: the result of a collective is a new tensor
group: group is a str; it takes a torch.distributed.ProcessGroup that this process is in, or None for the default one, after init_process_group
max_tokens: max_tokens is 3; it takes 4 or more, T of this rank
shared: num_shared_experts is 6; it takes 0 to 5, fewer than the ids of expert_map
shared below 0: num_shared_experts is -1; it takes 0 to 5, fewer than the ids of expert_map
no map: expert_map is None; it takes a tensor, int32 [G]
no map, compiled: expert_map is None; it takes a tensor, int32 [G]
no map, shared: expert_map is None; it takes a tensor, int32 [G]
no map, allreduce: expert_map is None; it takes a tensor, int32 [G]
quantize: quantize_dispatch is True with bf16 activations; it takes activation_dtype 'mxfp8'
owner: expert_owner has shape [5]; it takes [6], the ids of expert_map that are no shared experts
owner's dtype: expert_owner has dtype float32; it takes int32 or int64
capacity: capacity is 0; it takes 1 or more tokens, or None
grad: fused_moe is inference only and has no gradient, but an input requires one; call it under torch.no_grad() or torch.inference_mode(), or detach its inputs
grad, compiled: fused_moe is inference only and has no gradient, but an input requires one; call it under torch.no_grad() or torch.inference_mode(), or detach its inputs""")


def dies(group, device, path):
    """After a call that went well the last rank is gone; the others call again."""
    inputs = to(device, layer(T=12))
    run_path(path, inputs, group, [12 // group.size()] * group.size())
    if group.rank() == group.size() - 1:
        os._exit(7)
    run_path(path, inputs, group, [12 // group.size()] * group.size())
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        time.sleep(300)  # the watchdog's turn: a kernel that waits for a dead rank ends with the process


@pytest.mark.parametrize("ranks", groups("gloo-4", "nccl-2"), ids=str)
@pytest.mark.parametrize("path", ("allgather", "alltoall", "tp"))
def test_a_rank_that_dies_ends_the_others(ranks, path):
    backend, world_size = ranks.split("-")
    pool = Ranks(backend, int(world_size), timeout=5 if backend == "gloo" else 15)
    try:
        pool.start(dies, path=path)
        results = [pool.result(rank, 60 if backend == "gloo" else 200) for rank in range(int(world_size))]
        assert results[-1] == (None, 7)
        assert all(fine is not True for fine, _ in results[:-1]), results
        if backend == "gloo":  # the error reaches the caller
            assert all("RuntimeError" in what for fine, what in results[:-1]), results
    finally:
        pool.close()


def is_late(group, device):
    """The last rank does not come; the others do not wait longer than the group's timeout."""
    if group.rank() == group.size() - 1:
        time.sleep(8)
        return None
    start = time.monotonic()
    message = error_of(lambda: run_path("allgather", to(device, layer(T=12)), group, [12 // group.size()] * 2))
    assert "imed out" in message, message
    return time.monotonic() - start


@needs("gloo")
def test_a_rank_that_does_not_come_is_not_waited_for_longer_than_the_timeout():
    pool = Ranks("gloo", 2, timeout=2)
    try:
        waited, _ = pool(is_late)
        assert 1 < waited < 7
    finally:
        pool.close()


# --- graphs of a GPU


def captured_paths(group, device):
    """Each path without host reads as a CUDA graph: other tokens, routing and counts in the same buffers."""
    n, rank = group.size(), group.rank()
    T, most = 24 * n, 24
    static = to(device, layer(T=T, E=8, H=256))
    num_tokens = torch.full((1,), most, dtype=torch.int32, device=device)
    steps, graphs = {}, {}
    for path in ("allgather", "capacity", "allreduce", "tp"):
        function, call, rows = bind(path, static, group, [most] * n)  # views of what changes in place
        call |= dict(num_tokens=num_tokens) if path in ("allgather", "capacity") else {}
        steps[path] = functools.partial(function, **call), rows
    for path, (step, _) in steps.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the watchdog's thread asks events meanwhile
            out = step()
        graphs[path] = graph, out
    for seed in range(20):
        fresh = to(device, layer(T=T, E=8, H=256, seed=seed, hostile=seed % 2 == 1, skewed=seed % 5 == 4))
        for name in TOKENS[:3]:
            static[name].copy_(fresh[name])
        num_tokens.fill_((seed + 7 * rank) % (most + 1))
        for path, (graph, out) in graphs.items():
            step, rows = steps[path]
            graph.replay()
            assert same_bytes(out, step()), (path, seed)
            want = torch_mxfp8moe.fused_moe(**static)[rows]
            if path in ("allgather", "capacity"):
                want[int(num_tokens) :] = 0
            assert_agrees(out, want)
    torch.cuda.synchronize()


@pytest.mark.parametrize("ranks", groups("nccl-2"), indirect=True)
def test_captured_in_graphs(ranks):
    ranks(captured_paths)


# --- the tool


@needs("gloo")
def test_the_benchmark_measures_and_models(tmp_path):
    tool, file = PACKAGE.parent / "tools/bench_distributed.py", tmp_path / "scaling.json"
    row = "Qwen3-30B-A3B TP1"
    run = [sys.executable, "-W", "ignore", str(tool)]
    measure = ["--device", "cpu", "--shrink", "16", "--tokens", "8", "--repeat", "1", "--rows", row, "--json", str(file)]
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    for arguments in (measure, ["--model", str(file)]):
        done = subprocess.run(
            [*run, *arguments], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
    assert "8: " in done.stdout and "64: I is too small" in done.stdout
    results = json.loads(file.read_text())["results"]
    assert [(r["ranks"], r["path"]) for r in results] == [
        (1, "fused_moe"), *((2, path) for path in ("ep_allgather", "ep_alltoall", "ep_alltoall_capacity", "ep_allreduce", "tp"))
    ]  # fmt: skip
    assert all(r["us"] > 0 and r["speedup"] > 0 and r.get("error", 0) < 5e-3 for r in results)
