"""On a GPU: what a serving loop does with the ops. Graphs, streams, threads, compiled models, warm-up."""

import pytest
import torch

import torch_mxfp8moe
from gpu import needs_gpu, on_gpu
from helpers import OPS, aot_inductor_why_not, assert_agrees, moe_inputs, run_python, same_bytes
from torch_mxfp8moe import LAYOUTS, Mxfp8Experts, reference
from torch_mxfp8moe.arguments import FusedMoe
from torch_mxfp8moe.backends.triton import BACKEND

pytestmark = needs_gpu

GPT_OSS = dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=7.0)


def sample(T: int = 40, seed: int = 0, **sizes) -> dict:
    """Inputs on the GPU with everything that may change in place: biases, an expert map, a token count."""
    sizes = dict(H=160, I=96, E=5, K=3, G=9, bias_dtype=torch.float32) | sizes
    inputs = on_gpu(moe_inputs(T=T, seed=seed, **sizes))
    generator = torch.Generator().manual_seed(seed)
    inputs["expert_map"] = torch.randperm(9, generator=generator, device="cpu").int().sub(4).cuda()
    inputs["num_tokens"] = torch.tensor([T - seed % 3], dtype=torch.int32, device="cuda")
    return inputs


def hostile(inputs: dict) -> None:
    """Ids that are not experts, in place."""
    ids = inputs["topk_ids"]
    ids[::3, 0] = -1
    ids[1::4, 1] = torch.iinfo(ids.dtype).max
    ids[2::5, -1] = torch.iinfo(ids.dtype).min


def captured(function, stream=None) -> torch.cuda.CUDAGraph:
    """``function`` as a graph, after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph


# --- graphs


@pytest.mark.parametrize("id_dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("scaled", (False, True), ids=("", "scaled"))
@pytest.mark.parametrize("T", (1, 7, 40, 300))
def test_a_graph_sees_everything_that_changes_in_place(T, scaled, id_dtype):
    """Tokens, ids, routing weights, expert weights, scales, biases, the map and the token count of every replay."""
    static = sample(T, scaled=scaled, id_dtype=id_dtype)
    out = torch.empty(T, 160, dtype=torch.bfloat16, device="cuda")
    results = []

    def step():
        results[:] = [OPS.fused_moe(**static, **GPT_OSS), OPS.fused_moe(**static, activation_dtype="bf16")]
        OPS.fused_moe.out(**static, out=out)

    graph = captured(step)
    for seed in range(1, 6):
        fresh = sample(T, seed=seed, scaled=scaled, id_dtype=id_dtype)
        if seed % 2 == 0:
            hostile(fresh)
        for name, x in fresh.items():
            static[name].copy_(x)
        for x in (*results, out):
            x.fill_(float("nan"))
        graph.replay()
        assert same_bytes(results[0], OPS.fused_moe(**fresh, **GPT_OSS))
        assert same_bytes(results[1], OPS.fused_moe(**fresh, activation_dtype="bf16"))
        assert same_bytes(out, OPS.fused_moe(**fresh))
        assert_agrees(out, reference.fused_moe(**fresh))


@pytest.mark.parametrize("T, replays", ((1, 3000), (17, 4000), (64, 2000), (300, 1000)))
def test_ten_thousand_replays(T, replays):
    """Fresh tokens and routing each time, at MiniMax-M3's TP8 size with 16 experts: the eager call's bits."""
    torch.manual_seed(T)
    H, I, E, K = 6144, 384, 16, 4  # noqa: E741
    w1, w1_scale = OPS.quantize_1x32(torch.randn(E, 2 * I, H, device="cuda") * H**-0.5)
    w2, w2_scale = OPS.quantize_1x32(torch.randn(E, H, I, device="cuda") * I**-0.5)
    x = torch.empty(T, H, dtype=torch.bfloat16, device="cuda")
    ids = torch.empty(T, K, dtype=torch.int32, device="cuda")
    routing = torch.empty(T, K, device="cuda")

    def fresh(i):
        x.normal_()
        routing.uniform_()
        popularity = torch.rand(E, device="cuda") * (i % 4)  # from uniform to skewed
        ids.copy_((torch.rand(T, E, device="cuda") + popularity).topk(K).indices)
        if i % 7 == 0:
            ids.random_(-3, E + 3)

    call = lambda: OPS.fused_moe(x, w1, w1_scale, w2, w2_scale, routing, ids, **GPT_OSS)  # noqa: E731
    results = []
    fresh(0)
    graph = captured(lambda: results.append(call()))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(replays):
        fresh(i)
        graph.replay()
        wrong += (results[-1].view(torch.int16) != call().view(torch.int16)).any()
    assert wrong.item() == 0


def test_two_calls_in_one_graph():
    """The second call reads the first one's result; they share no scratch memory that matters."""
    static = sample(33)
    results = []

    def step():
        first = OPS.fused_moe(**static)
        results[:] = [first, OPS.fused_moe(**static | dict(hidden_states=first))]

    graph = captured(step)
    for seed in range(1, 5):
        fresh = sample(33, seed=seed)
        for name, x in fresh.items():
            static[name].copy_(x)
        graph.replay()
        first = OPS.fused_moe(**fresh)
        assert same_bytes(results[0], first)
        assert same_bytes(results[1], OPS.fused_moe(**fresh | dict(hidden_states=first)))


def test_every_op_is_captured():
    weight, scale = OPS.quantize_1x32(torch.randn(3, 256, 512, device="cuda"))
    x = torch.randn(9, 512, device="cuda")
    out = torch.empty_like(weight), torch.empty(3 * 256, 16, dtype=torch.uint8, device="cuda")
    lies = torch.randn(2, 3, 2, 512, device="cuda").transpose(1, 2)  # rows that take three strides
    codes = torch.empty(lies.shape, dtype=weight.dtype, device="cuda"), torch.empty(2, 2, 3, 16).byte().cuda()
    turns = torch.randn(3, 128, 2, 512, device="cuda").transpose(1, 2)  # gate and up rows
    into = torch.empty_like(weight), torch.empty_like(out[1])
    options = dict(layout="aiter_gfx950", gate_up=True)
    results = []

    def step():
        OPS.quantize_preshuffle.out(turns, **options, out_weight=into[0], out_scale=into[1])
        OPS.quantize_1x32.out(lies, out_data=codes[0], out_scale=codes[1])
        data = OPS.quantize_1x32(x)
        OPS.preshuffle.out(weight, scale, **options, out_weight=out[0], out_scale=out[1])
        results[:] = [*data, OPS.dequantize_1x32(*data, dtype=torch.bfloat16)]

    graph = captured(step)
    for _ in range(3):
        x.normal_()
        lies.normal_()
        turns.normal_()
        fresh = OPS.quantize_1x32(torch.randn(3, 256, 512, device="cuda"))
        weight.copy_(fresh[0])
        scale.copy_(fresh[1])
        graph.replay()
        assert all(map(same_bytes, codes, reference.quantize_1x32(lies)))
        data = reference.quantize_1x32(x)
        assert same_bytes(results[0], data[0]) and same_bytes(results[1], data[1])
        assert same_bytes(results[2], reference.dequantize_1x32(*data, torch.bfloat16))
        assert all(map(same_bytes, out, reference.preshuffle(*fresh, **options)))
        assert all(map(same_bytes, into, reference.quantize_preshuffle(turns, **options)))


def module_weights(seed: int, high_precision: bool) -> dict:
    """Of a layer of 6 experts, H 256, I 96, with biases, on the GPU."""
    inputs = on_gpu(moe_inputs(H=256, I=96, E=6, bias_dtype=torch.bfloat16, seed=seed))
    weights = {name: x for name, x in inputs.items() if name.startswith("w")}
    if high_precision:
        for name in ("w1", "w2"):
            weights[name] = OPS.dequantize_1x32(weights[name], weights.pop(f"{name}_scale"), dtype=torch.bfloat16)
    return weights


def cloned(weights: dict) -> dict:
    """For a module that updates shall not write through to ``weights``."""
    return {name: x.clone() for name, x in weights.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("high_precision", (False, True), ids=("mxfp8", "bf16"))
@pytest.mark.parametrize("where", ("cuda", "cpu", "pinned"))
def test_a_graph_honours_update_weights(layout, high_precision, where):
    """All experts, one of them, some out of order: the replay gives the updated module's eager bits, and those of a
    new module. New weights may lie on the host."""
    tokens = on_gpu(moe_inputs(T=33, H=256, I=96, E=6, K=3))
    tokens = {name: x for name, x in tokens.items() if not name.startswith("w")}
    weights = module_weights(0, high_precision)
    module = Mxfp8Experts.from_weights(**cloned(weights), layout=layout, **GPT_OSS)
    out = torch.empty(33, 256, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        graph = captured(lambda: module(**tokens, out=out))
        for seed, ids in enumerate((None, [4], [5, 0, 2]), 1):
            rows = list(range(6)) if ids is None else ids
            fresh = module_weights(seed, high_precision)
            given = {name: x.view(torch.uint8)[rows].view(x.dtype) for name, x in fresh.items()}
            for name, x in given.items():
                weights[name].view(torch.uint8)[rows] = x.view(torch.uint8)
            if where != "cuda":
                given = {name: x.cpu() for name, x in given.items()}
            if where == "pinned":
                given = {name: x.pin_memory() for name, x in given.items()}
            graph.replay()
            before = out.clone()
            module.update_weights(**given, experts=ids)
            out.fill_(float("nan"))
            graph.replay()
            assert same_bytes(out, module(**tokens))
            assert same_bytes(out, Mxfp8Experts.from_weights(**cloned(weights), layout=layout, **GPT_OSS)(**tokens))
            assert not same_bytes(out, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("high_precision", (False, True), ids=("mxfp8", "bf16"))
def test_an_update_is_queued_and_captured(layout, high_precision):
    """It waits for nothing, whatever experts are named, so that a graph may hold it as well."""
    weights, fresh = module_weights(0, high_precision), module_weights(1, high_precision)
    module = Mxfp8Experts.from_weights(**cloned(weights), layout=layout)
    updates = (
        fresh,
        fresh | dict(gate_up_order="interleaved"),
        fresh | dict(experts=[5, 4, 3, 2, 1, 0]),
        {name: x[:2] for name, x in fresh.items()} | dict(experts=[3, 1]),
        {name: x.cpu().pin_memory() for name, x in fresh.items()},
    )
    for given in updates:
        module.update_weights(**given)  # whatever is compiled
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for given in updates:
            module.update_weights(**given)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = captured(lambda: module.update_weights(**fresh))
    want = Mxfp8Experts.from_weights(**cloned(fresh), layout=layout)
    module.update_weights(**weights)
    graph.replay()
    for name, x in module.named_buffers():
        assert same_bytes(x, want.get_buffer(name)), name


def test_captured_on_a_stream_of_ones_own_into_a_slice():
    static = sample(20)
    buffer = torch.zeros(24, 400, dtype=torch.bfloat16, device="cuda")
    out = buffer[2:22, 131:291]
    stream = torch.cuda.Stream()
    graph = captured(lambda: OPS.fused_moe.out(**static, out=out), stream=stream)
    fresh = sample(20, seed=4)
    for name, x in fresh.items():
        static[name].copy_(x)
    graph.replay()
    assert same_bytes(out, OPS.fused_moe(**fresh))
    out.zero_()
    assert (buffer == 0).all()


def test_a_graph_takes_memory_from_its_own_pool_alone():
    """What a capture allocates lies in the graph's pool, and a replay allocates nothing."""
    static = sample(300)
    first = captured(lambda: OPS.fused_moe(**static))  # PyTorch's first capture allocates for its random numbers
    first.replay()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    segments = lambda: {s["address"]: tuple(s["segment_pool_id"]) for s in torch.cuda.memory_snapshot()}  # noqa: E731
    graph, results = torch.cuda.CUDAGraph(), []
    before = segments()
    with torch.cuda.graph(graph):
        results.append(OPS.fused_moe(**static))
    new = {address: pool for address, pool in segments().items() if address not in before}
    assert new and set(new.values()) == {tuple(graph.pool())}
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated


@pytest.mark.parametrize("out_dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("T", (1, 64, 1000))
def test_memory_beside_inputs_and_output_is_what_the_plan_says(T, out_dtype):
    """PyTorch's own count of a call (tools/workspace.py prints the plan's)."""
    from torch_mxfp8moe.backends.triton.fused_moe import plan

    inputs = sample(T, H=2048, I=768, E=8, K=4)
    out = torch.empty(T, 2048, dtype=out_dtype, device="cuda")
    planned = plan(FusedMoe(**inputs, out=out), BACKEND.target(out.device)).workspace
    OPS.fused_moe.out(**inputs, out=out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    OPS.fused_moe.out(**inputs, out=out)
    rounding = 1 << 21  # what the caching allocator may add to a large block
    assert planned <= torch.cuda.max_memory_allocated() - before <= planned + rounding


# --- the host does not wait


def test_no_call_waits_for_the_gpu():
    """PyTorch raises at each of its own synchronisations; CI shows besides that no data is read (test_triton.py)."""
    inputs, x = sample(50), torch.randn(64, 512, device="cuda")
    rows = torch.randn(2, 256, 256, device="cuda")
    weight, scale = OPS.quantize_1x32(rows)
    scaled = sample(50, scaled=True)
    shuffle = dict(layout="aiter_gfx950", gate_up=True, pad_to=256)

    def calls():
        OPS.dequantize_1x32(*OPS.quantize_1x32(x), dtype=torch.float32)
        OPS.preshuffle(weight, scale, **shuffle)
        OPS.quantize_preshuffle(rows, **shuffle)
        OPS.fused_moe(**inputs, **GPT_OSS)
        OPS.fused_moe(**scaled, out_dtype=torch.float32)
        OPS.fused_moe.out(**inputs, out=torch.empty_like(inputs["hidden_states"]))

    before = torch.cuda.get_sync_debug_mode()
    calls()
    try:
        torch.cuda.set_sync_debug_mode("error")
        calls()
        with pytest.raises(RuntimeError):  # the mode is on
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_calls_are_queued_behind_a_busy_gpu():
    """Sixty calls return while the GPU is still busy with what was queued before them."""
    inputs = sample(50)
    OPS.fused_moe(**inputs)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    for _ in range(60):
        OPS.fused_moe(**inputs)
    done.record()
    assert not done.query()
    done.synchronize()


# --- streams and threads


def test_two_streams_at_once():
    """Two streams run calls of different sizes at once, many times; each result is the one it has alone."""
    cases = [sample(300, seed=1), sample(64, seed=2)]
    want = [OPS.fused_moe(**inputs) for inputs in cases]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    got = ([], [])
    for _ in range(50):
        for inputs, stream, results in zip(cases, streams, got):
            with torch.cuda.stream(stream):
                results.append(OPS.fused_moe(**inputs))
    torch.cuda.synchronize()
    for results, result in zip(got, want):
        assert all(same_bytes(x, result) for x in results)


def test_threads_that_start_together():
    """Eight threads make their first calls, of the same kinds, at the same moment: all compile, all are right."""
    code = """
import threading
from concurrent.futures import ThreadPoolExecutor
import torch
from gpu import on_gpu
from helpers import OPS, moe_inputs, same_bytes
from torch_mxfp8moe import LAYOUTS, Mxfp8Experts, reference

cases = [on_gpu(moe_inputs(T=T, H=96, I=96, E=5, K=3, seed=T)) for T in (1, 33)]
want = [reference.fused_moe(**inputs, out_dtype=torch.float32) for inputs in cases]
barrier = threading.Barrier(8)

def work(i):
    torch.cuda.set_device(0)
    barrier.wait()
    with torch.cuda.stream(torch.cuda.Stream()):
        results = [OPS.fused_moe(**cases[i % 2], out_dtype=torch.float32) for _ in range(5)]
        torch.cuda.current_stream().synchronize()
    return results

with ThreadPoolExecutor(8) as pool:
    for i, results in enumerate(pool.map(work, range(8))):
        for x in results:
            assert (x - want[i % 2]).norm() <= 2e-3 * want[i % 2].norm()
        assert same_bytes(*results)
print("done")
"""
    assert run_python(code).strip() == "done"


# --- warm-up


def test_warmup_leaves_nothing_to_compile():
    """In a fresh process: nothing is compiled after warmup, whatever the values, and calls in a graph work at once."""
    code = """
import torch, triton
import torch_mxfp8moe
from test_gpu_serving import GPT_OSS, captured, hostile, sample
from helpers import OPS, same_bytes

compiled = []
triton.knobs.runtime.jit_cache_hook = lambda *args, **kwargs: compiled.append(kwargs["repr"]) and None
counts = (0, 1, 7, 40, 300)
inputs = sample(5)
torch_mxfp8moe.warmup(counts, **inputs, **GPT_OSS)
warm = len(compiled)
assert warm >= 10, compiled
for T in counts:
    fresh = sample(T, seed=T)
    hostile(fresh)
    stretched = torch.zeros(T, 200, dtype=torch.bfloat16, device="cuda")[:, 20:180]
    stretched.copy_(fresh["hidden_states"])
    weights = {name: x for name, x in inputs.items() if name.startswith("w")}  # what warmup was given
    want = OPS.fused_moe(**fresh | weights, **GPT_OSS)
    assert same_bytes(OPS.fused_moe(**fresh | weights | dict(hidden_states=stretched), **GPT_OSS), want)
    out = torch.zeros(T, 333, dtype=torch.bfloat16, device="cuda")[:, 1:161]
    OPS.fused_moe.out(**fresh | weights, **GPT_OSS, out=out)
    assert same_bytes(out.contiguous(), want)
    graph, results = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        results.append(OPS.fused_moe(**fresh | weights, **GPT_OSS))
    graph.replay()
    assert same_bytes(results[0], want)
assert len(compiled) == warm, compiled[warm:]
OPS.fused_moe(**sample(40, H=192), **GPT_OSS)
assert len(compiled) > warm  # the hook works
print("done")
"""
    assert run_python(code).strip() == "done"


# --- compiled models


class Layer(torch.nn.Module):
    """A router and experts, as a model would call them."""

    def __init__(self):
        super().__init__()
        inputs = moe_inputs(H=160, I=96, E=6, K=2)
        for name in ("w1", "w1_scale", "w2", "w2_scale"):
            self.register_buffer(name, inputs[name])
        self.router = torch.nn.Linear(160, 6)
        self.cuda()

    def forward(self, x):
        weights, ids = self.router(x.float()).softmax(-1).topk(2)
        result = torch_mxfp8moe.fused_moe(x, self.w1, self.w1_scale, self.w2, self.w2_scale, weights, ids, **GPT_OSS)
        return x + result


@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
@pytest.mark.parametrize("dynamic", (None, True))
def test_compiled_models(mode, dynamic):
    """Whole graph, few compilations for many token counts, the eager result."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    layer = Layer()
    step = torch.compile(layer, fullgraph=True, mode=mode, dynamic=dynamic)
    with torch.inference_mode():
        for T in (8, 8, 8, 4, 3, 1, 1, 1, 64, 130, 5, 8):
            x = torch.randn(T, 160, device="cuda", dtype=torch.bfloat16)
            want = layer(x)
            got = step(x).clone()
            # Inductor may compute the router in another order; the experts' result follows from its ids and weights.
            assert_agrees(got, want, 1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    torch._dynamo.reset()


def test_compiled_calls_give_the_eager_bits():
    torch._dynamo.reset()
    step = torch.compile(lambda inputs: OPS.fused_moe(**inputs, **GPT_OSS), fullgraph=True, mode="reduce-overhead")
    with torch.inference_mode():
        for i in range(5):
            inputs = sample(40, seed=i)
            assert same_bytes(step(inputs), OPS.fused_moe(**inputs, **GPT_OSS))
    torch._dynamo.reset()


def test_aot_inductor(tmp_path):
    """Exported with a symbolic token count, packaged, loaded in a fresh process: the eager result."""
    if aot_inductor_why_not():
        pytest.skip(aot_inductor_why_not())
    layer = Layer()
    x = torch.randn(8, 160, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("T", min=2, max=512)},))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "layer.pt2"))
        cases = [torch.randn(T, 160, device="cuda", dtype=torch.bfloat16) for T in (8, 3, 200)]
        torch.save([(x.cpu(), layer(x).cpu()) for x in cases], tmp_path / "cases.pt")
    code = """
import sys
import torch
import torch_mxfp8moe
from helpers import assert_agrees
layer = torch._inductor.aoti_load_package(sys.argv[1])
for x, want in torch.load(sys.argv[2]):
    assert_agrees(layer(x.cuda()), want.cuda(), 1e-2)
print("done")
"""
    assert run_python(code, str(path), str(tmp_path / "cases.pt")).strip() == "done"


# --- who serves, and errors


def test_the_triton_backend_serves_gpu_tensors(monkeypatch):
    """By default and for every op; the reference is not called."""
    status = torch_mxfp8moe.backends()
    assert status["triton"].usable
    inputs = sample(9)
    explained = torch_mxfp8moe.explain(**inputs)
    assert explained.backend == "triton" and explained.reasons["reference"] == "it could, but 'triton' comes first"

    def called(*args, **kwargs):
        raise AssertionError("the reference was called")

    for name in ("fused_moe", "quantize_1x32", "dequantize_1x32", "preshuffle", "quantize_preshuffle"):
        monkeypatch.setattr(reference, name, called)
    OPS.fused_moe(**inputs)
    data, scale = OPS.quantize_1x32(torch.randn(2, 256, 256, device="cuda"))
    OPS.dequantize_1x32(data, scale, dtype=torch.float32)
    OPS.preshuffle(data, scale, layout="aiter_gfx950", gate_up=True)
    OPS.quantize_preshuffle(torch.randn(2, 256, 256, device="cuda"), layout="aiter_gfx950", gate_up=True)


@pytest.mark.parametrize("name", ("w1", "w2_scale", "topk_ids", "expert_map", "num_tokens", "w1_bias"))
def test_tensors_of_two_devices(name):
    """A CPU tensor beside CUDA ones is named, and so is the other way round."""
    inputs = sample(5)
    with pytest.raises(ValueError, match=f"fused_moe: {name} is on cpu; it takes the device of hidden_states, cuda:0"):
        OPS.fused_moe(**inputs | {name: inputs[name].cpu()})
    on_cpu = {k: x.cpu() for k, x in inputs.items()}
    with pytest.raises((ValueError, RuntimeError), match=f"{name} is on cuda:0; it takes the device of hidden_states"):
        OPS.fused_moe(**on_cpu | {name: inputs[name]})


def test_backends_for_other_devices_say_so():
    inputs = sample(5)
    with pytest.raises(NotImplementedError, match="backend 'cpu' does not serve this call: the tensors are on cuda:0"):
        OPS.fused_moe(**inputs, backend="cpu")
    on_cpu = {name: x.cpu() for name, x in inputs.items()}
    with pytest.raises((NotImplementedError, RuntimeError), match="backend 'triton' does not serve this call"):
        OPS.fused_moe(**on_cpu, backend="triton")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one():
    assert torch.cuda.current_device() == 0
    inputs = sample(40)
    want = OPS.fused_moe(**inputs)
    there = {name: x.to("cuda:1") for name, x in inputs.items()}
    got = OPS.fused_moe(**there)
    assert got.device.index == 1 and torch.cuda.current_device() == 0
    assert same_bytes(got.cpu(), want.cpu())
