"""tools/bench_gpu.py as far as it goes without a GPU: its arguments, its peers' arithmetic, what it writes."""

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
import time

import pytest
import torch
from expecttest import assert_expected_inline

import device
from helpers import PACKAGE, only_cpu, relative_l2, run_python
from shapes import SHAPES, Row, rows
from torch_mxfp8moe import configs

TOOLS = PACKAGE.parent / "tools"
if not TOOLS.exists():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(TOOLS))

import bench_gpu  # noqa: E402
from bench import report, timing  # noqa: E402
from bench.report import HOST, STEP, WHOLE, Comparison, Figure  # noqa: E402

pytestmark = only_cpu
TILES = configs.FOLDER / "triton"
CANDIDATES = TOOLS / "bench" / "candidates" / "sm_90.json"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton")
WHY_NOT = device.why_not("interpreter")
needs_interpreter = pytest.mark.skipif(WHY_NOT is not None, reason=f"needs Triton's interpreter: {WHY_NOT}")
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib: pip install matplotlib"
)

SMALL = Row("small", 64, 32, 6, 6, 2, False, False, dict(swiglu_alpha=1.0, swiglu_beta=0.0, swiglu_limit=None))
PARTS = dataclasses.replace(
    SMALL, name="parts", local=3, bias=True, options=dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=0.5)
)
"""Half of the experts are here, in another order than their ids; every option."""


def whole(peer: str, T: int, us: float, row: str = "A", routing: str = "uniform") -> Figure:
    times = dict(us=us, low=us - 1, high=us + 2, floor=us / 2, operations=us * 3e6)
    return Figure(row, routing, T, peer, WHOLE, **times, error_mxfp8=2e-3, error_bf16=4e-2)


PLANTED = [
    whole("mxfp8", 1, 40.0), whole("bf16", 1, 50.0), whole("humming", 1, 48.0),
    Figure("A", "uniform", 1, "humming", "gemms", 30.0, 29.0, 31.5, 20.0, 1.2e8),
    Figure("A", "uniform", 1, "mxfp8", STEP + "route", 2.5),
    Figure("A", "uniform", 1, "mxfp8", STEP + "gemm w1", 25.25),
    Figure("A", "uniform", 1, "mxfp8", HOST, 151.0),
    whole("mxfp8", 64, 100.0), whole("humming", 64, 90.0), whole("bf16", 64, 90.0),
    whole("mxfp8", 64, 50.0, row="B", routing="zipf"),
]  # fmt: skip


# What it is told


def test_defaults():
    args = bench_gpu.parse([])
    assert args.tokens == [1, 4, 16, 64, 256, 1024, 4096, 8192] and args.repeat == 41 and args.by_name == []
    assert args.peers == ["mxfp8", "bf16", "humming", "grouped_mm", "dot_scaled"] and args.routing == ["uniform"]
    assert args.rows and args.rows.items() <= rows().items()


def test_choices():
    args = bench_gpu.parse("--quick --peers humming bf16 mxfp8 bf16 --layouts row_major aiter_gfx950".split())
    assert args.tokens == [1, 64, 8192] and args.repeat == 11
    assert args.peers == ["humming", "bf16", "bf16@aiter_gfx950", "mxfp8", "mxfp8@aiter_gfx950"]
    assert bench_gpu.parse(["--rows", "all"]).rows == rows()
    assert bench_gpu.parse(["--quick", "--tokens", "7", "7", "3"]).tokens == [7, 3]
    args = bench_gpu.parse(["--peers", "humming", "mxfp8", "--tiles", f"{TILES}/sm_90.json", f"{TILES}/default.json"])
    assert args.peers == ["humming", "mxfp8", "mxfp8:sm_90", "mxfp8:default"]
    assert args.tiles["mxfp8:sm_90"] == configs.load("sm_90")
    assert args.by_name == args.peers


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--tokens 4 0", "--tokens takes numbers from 1 on, not 0"),
        ("--repeat 4", "--repeat is 4; it takes 5 or more"),
        ("--rows Qwen3-30B-A3B", "--rows: there is no row 'Qwen3-30B-A3B'; there are MiniMax-M3 TP4, "),
        ("--rows all GLM-5", "--rows all goes without other rows"),
        ("--shapes nowhere.csv", "argument --shapes: [Errno 2] No such file or directory: 'nowhere.csv'"),
        ("--peers marlin", "invalid choice: 'marlin'"),
        ("--tiles nowhere.json", "argument --tiles: nowhere.json: [Errno 2] No such file or directory"),
        (f"--tiles {SHAPES}", f"argument --tiles: {SHAPES}: Expecting value: line 1 column 1"),
        (f"--tiles {CANDIDATES}", f"argument --tiles: {CANDIDATES}: "),
        (f"--tiles {TILES}/sm_90.json {TILES}/../triton/sm_90.json", "--tiles takes files of different names"),
    ],
)
def test_what_it_refuses(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        bench_gpu.parse(argv.split())
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as error:
        bench_gpu.parse(["--picture", "x.svg"])
    assert error.value.code == 2 and "--picture needs matplotlib" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, str(TOOLS / "bench_gpu.py"), "--csv", str(tmp_path / "x.csv")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "x.csv").exists()
    assert done.stderr == "nothing to measure: there is no GPU that PyTorch can use\n"


# What is measured


def test_zipf_routing_follows_its_law():
    """The expert of rank r (counted from 1) in proportion to 1 / r; the K of a token are different ones."""
    torch.manual_seed(0)
    row = dataclasses.replace(SMALL, experts=32, local=32, topk=1)
    ids = row.tokens(200_000, "zipf", "cpu")["topk_ids"]
    share = ids.flatten().bincount(minlength=32).double() / ids.numel()
    law = 1 / torch.arange(1, 33, dtype=torch.float64)
    assert float((share / (law / law.sum()) - 1).abs().max()) < 0.06  # four deviations of the rarest one
    ids = dataclasses.replace(row, topk=4).tokens(1000, "zipf", "cpu")["topk_ids"]
    assert all(len(set(one)) == 4 for one in ids.tolist())


def test_work_counts_what_is_here():
    tokens = dict(topk_ids=torch.tensor([[0, 1], [3, 1], [4, 5]], dtype=torch.int32))
    assert bench_gpu.work(SMALL, tokens, None) == (5, 6)
    here = torch.tensor([-1, 2, -1, 0, -1, -1], dtype=torch.int32)
    assert bench_gpu.work(SMALL, tokens, here) == (2, 3)


def test_floor():
    """Bytes where there are few routes, operations where there are many."""
    limits = timing.Ceilings(copy=1e6, rate=1e9, launch=1.0)
    weights = 2 * 3 * 64 * 32 * 33 / 32
    assert bench_gpu.floor(SMALL, [(1, 2), (3, 2)], 1, limits) == ((weights + 4 * 64) / 1e6, 6 * 2 * 64 * 32)
    least, operations = bench_gpu.floor(SMALL, [(6, 10**9)], 10**3, limits)
    assert least == operations / 1e9


@needs_triton
def test_launches_are_named_by_their_kernels_and_weights(monkeypatch):
    from bench.peers import label

    from torch_mxfp8moe.backends.triton import fused_moe
    from torch_mxfp8moe.backends.triton.targets import Target

    call = SMALL.call(8, "meta").with_out()
    for arch, first, product in (("sm_80", "dispatch", "grouped_gemm"), ("sm_90", "route_round", "warpgroup_gemm")):
        one = [first, f"{product} w1", f"{product} w2", "combine"]
        assert [label(launch) for launch in fused_moe.plan(call, Target(arch)).launches] == one
    monkeypatch.setattr(fused_moe, "LARGEST_WORKSPACE", 1500)
    assert [label(launch) for launch in fused_moe.plan(call, Target("sm_90")).launches][:8] == one * 2


def test_quartiles():
    assert timing.Time.of([5.0, 1.0, 2.0, 4.0, 3.0]) == timing.Time(3.0, 2.0, 4.0)
    assert timing.Time.of([7.0]) == timing.Time(7.0, 7.0, 7.0)


def test_peers_take_turns_and_slow_ones_fewer(monkeypatch):
    """Each after a flush that is not in its time; the graphs of a peer rotate; 5 rounds at least."""
    now, order = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    class Graph:
        def __init__(self, name, ms):
            self.name, self.ms = name, ms

        def replay(self):
            order.append(self.name)
            now[0] += self.ms

    def flush():
        order.append("flush")
        now[0] += 1000

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    graphs = {"fast": [Graph("a", 1.0), Graph("b", 2.0)], "slow": [Graph("c", 90.0)]}
    times = timing.sample(graphs, 8, flush, most_us=200_000)
    assert times == {"fast": timing.Time(1500, 1000, 2000), "slow": timing.Time(90_000, 90_000, 90_000)}
    assert set(order[::2]) == {"flush"}
    assert "".join(order[1::2]) == "acbc" + "acbcacbcac" + "bab"  # two to warm up; then eight and five


@pytest.mark.parametrize("row", (SMALL, PARTS), ids=lambda row: row.name)
def test_the_layer_around_grouped_mm(row):
    from bench.peers import GroupedMm

    torch.manual_seed(0)
    weights, tokens = row.weights("cpu"), row.tokens(9, "uniform", "cpu")
    bound = GroupedMm(row, weights).bind(tokens)
    bound.run()
    want = bench_gpu.torch_mxfp8moe.reference.fused_moe(**tokens, **weights, **row.options, activation_dtype="bf16")
    assert relative_l2(bound.out, want) < 1e-2
    assert [name for name, _ in bound.steps] == ["sort", "gemm1", "swiglu", "gemm2", "add"]


HUMMING = """
import sys, types
import torch
from test_bench_gpu import PARTS, SMALL, relative_l2
from bench import glue
import torch_mxfp8moe

# glue.Align: every local route once, in blocks of one expert, in which padding names no route
for T, few in ((5, True), (1, True), (400, False)):
    for row in (SMALL, PARTS):
        torch.manual_seed(T)
        expert_map = row.weights("cpu").get("expert_map")
        ids = row.tokens(T, "zipf", "cpu")["topk_ids"]
        local = ids.flatten() if expert_map is None else expert_map[ids.flatten()]
        glue.AT_ONCE = 1024 if few else 16
        for block in (8, 24, 96):
            align = glue.Align(ids, expert_map, row.local, block)
            for _ in range(3):  # again, with what the last run left
                align.sorted_routes.fill_(-7)
                align()
                total = int(align.padded_total)
                counts = local[local >= 0].long().bincount(minlength=row.local)
                assert total == int((-(-counts // block) * block).sum()) <= align.sorted_routes.numel()
                blocks = align.sorted_routes[:total].view(-1, block)
                assert sorted(blocks[blocks < ids.numel()].tolist()) == (local >= 0).nonzero().flatten().tolist()
                for expert, routes in zip(align.block_experts.tolist(), blocks):
                    real = routes[routes < ids.numel()]
                    assert len(real) and (local[real] == expert).all() and (routes >= 0).all()
                    assert (routes[len(real):] == ids.numel()).all()

# bench.humming_peer on a stand-in for Humming that reads the same arguments
names = ("forward", "schema", "transform", "tune")
forward, schema, transform, tune = (types.ModuleType(f"humming.{name}") for name in names)

class Schema:
    @staticmethod
    def from_config(config):
        assert config == {"quant_method": "modelopt", "quant_algo": "mxfp8"}
        return Schema()

    def convert_humming(self, tensors, *, shape_n_stacks, shape_k_stacks, param_dtype, num_experts, device):
        assert tuple(tensors["weight"].shape) == (num_experts, *shape_n_stacks, *shape_k_stacks)
        return self, tensors

def prepare_and_transform(tensors, *, shape_n, shape_k, weight_schema, num_experts, pad_n_to_multiple,
                          pad_k_to_multiple, has_bias, torch_dtype, device):
    values = torch_mxfp8moe.dequantize_1x32(tensors["weight"], tensors["weight_scale"], torch.bfloat16)
    assert has_bias == ("bias" in tensors)
    return types.SimpleNamespace(n=shape_n), {"weight": values} | ({"bias": tensors["bias"]} if has_bias else {})

asked = []

def heuristics(config, shape_m=None, gemm_type="dense"):
    assert gemm_type == "indexed"
    asked.append(shape_m)
    return {"block_shape": (24 if config.n == 64 and DIFFERENT else 8, 128, 64)}

def humming_forward(config, inputs, weight, bias=None, outputs=None, sorted_ids=None, expert_ids=None,
                    num_tokens_padded=None, locks=None, top_k=1, valid_shape_m=0, compute_config=None,
                    tuning_config=None):
    assert locks.dtype == torch.int32 and compute_config == {"gemm_type": "indexed"}
    assert outputs.shape[0] == inputs.shape[0] * top_k
    block = tuning_config["block_shape"][0]
    for expert, routes in zip(expert_ids.tolist(), sorted_ids[: int(num_tokens_padded)].view(-1, block)):
        real = routes[routes < inputs.shape[0] * top_k].long()
        y = inputs[real // top_k].float() @ weight[expert].float().T
        outputs[real] = (y if bias is None else y + bias[expert].float()).to(outputs.dtype)

forward.humming_forward, schema.BaseWeightSchema = humming_forward, Schema
transform.prepare_and_transform_humming_tensors, tune.get_heuristics_config = prepare_and_transform, heuristics
for module in (types.ModuleType("humming"), forward, schema, transform, tune):
    sys.modules[module.__name__] = module

from bench.humming_peer import Humming

for row in (SMALL, PARTS):
    for T, DIFFERENT in ((7, False), (7, True), (70, True)):
        torch.manual_seed(T)
        weights, tokens = row.weights("cpu"), row.tokens(T, "uniform", "cpu")
        peer = Humming(row, weights)
        bound = peer.bind(tokens)
        bound.run()
        want = torch_mxfp8moe.reference.fused_moe(**tokens, **weights, **row.options, activation_dtype="bf16")
        assert relative_l2(bound.out, want) < 1e-2, (row.name, T, relative_l2(bound.out, want))
        assert asked[-1] == peer.routes(T) == -(-T * 2 * row.local // 6)
        assert list(bound.parts) == ["gemms"]
print("right")
"""


@needs_interpreter
def test_the_kernels_around_humming_and_how_it_is_called():
    path = f"import sys; sys.path[:0] = [{str(TOOLS)!r}]\n"
    assert run_python(path + HUMMING, TRITON_INTERPRET="1") == "right\n"


@needs_triton
def test_the_kernels_around_humming_compile_for_a_gpu():
    from torch_mxfp8moe.backends.triton.launch import Launch, compile_offline
    from torch_mxfp8moe.backends.triton.targets import Target

    from bench import glue

    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def record(*args, num_warps=4, **constants):
                names = [p.name for p in self.kernel.params]
                arguments = dict(zip(names, args)) | constants
                launches.append(Launch(self.kernel, grid, arguments, dict(num_warps=num_warps)))

            return record

    with pytest.MonkeyPatch.context() as patch:
        for name in ("align_few", "count", "lay_out", "scatter", "swiglu", "weighted_sum"):
            patch.setattr(glue, f"{name}_kernel", Recorder(getattr(glue, f"{name}_kernel")))
        for T in (1, 1000):
            ids = torch.empty(T, 8, dtype=torch.int32, device="meta")
            x, out = (torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in ((8 * T, 1536), (T, 768)))
            glue.Align(ids, None, 128, 8)()
            glue.swiglu(x, x.new_empty(8 * T, 768), 1.702, 1.0, 7.0)
            glue.weighted_sum(x.new_empty(8 * T, 768), ids, ids.flatten(), ids.float(), out, 128)
    assert len(launches) == 3 + 5
    for code in compile_offline(launches, Target("sm_90")):
        assert code.metadata.shared <= 227 << 10 and ".target sm_90a" in code.asm["ptx"]


@pytest.mark.skipif(importlib.util.find_spec("humming") is None, reason="needs humming-kernels: pip install it")
def test_humming_takes_what_it_is_given():
    """The functions exist and take these arguments; nothing is run."""
    code = """
import inspect
from humming.forward import humming_forward
from humming.kernel.humming import HummingKernel
from humming.schema import BaseWeightSchema
from humming.transform import prepare_and_transform_humming_tensors
from humming.tune import get_heuristics_config

names = lambda f: set(inspect.signature(f).parameters)
assert {"inputs", "outputs", "weight", "weight_scale", "bias", "sorted_ids", "expert_ids", "num_tokens_padded", "locks",
        "top_k", "valid_shape_m", "compute_config", "tuning_config"} <= names(humming_forward)
assert {"shape_n", "shape_k", "weight_schema", "num_experts", "pad_n_to_multiple", "pad_k_to_multiple", "has_bias",
        "torch_dtype", "device"} <= names(prepare_and_transform_humming_tensors)
assert {"shape_n_stacks", "shape_k_stacks", "param_dtype", "num_experts", "device"} <= names(
    BaseWeightSchema.convert_humming
)
assert {"shape_m", "gemm_type"} <= names(get_heuristics_config)
assert {"layer_config", "compute_config", "tuning_config"} <= names(HummingKernel.prepare_kernels)
assert BaseWeightSchema.from_config({"quant_method": "modelopt", "quant_algo": "mxfp8"})
print("right")
"""
    assert run_python(code, HUMMING_DISABLE_PARALLEL_BUILD="1").endswith("right\n")


class Replay:
    """In the place of a CUDA graph."""

    def __init__(self, functions):
        self.functions = list(functions)
        self.replay()

    def replay(self):
        for function in self.functions:
            function()


def on_the_cpu(monkeypatch, *argv: str, humming=None):
    """A Bench whose peers run here; ``humming`` in the place of that peer."""
    device = "cpu"
    for name in ("weights", "tokens"):
        original = getattr(Row, name)
        monkeypatch.setattr(Row, name, functools.wraps(original)(functools.partialmethod(original, device=device)))
    monkeypatch.setattr(timing, "Flush", lambda kind: lambda: None)
    monkeypatch.setattr(timing, "ceilings", lambda flush: timing.Ceilings(1e4, 1e6, 1.0))
    monkeypatch.setattr(timing, "capture", lambda functions, pool=None: Replay(functions))

    def sample(graphs, rounds, flush):
        result = {}
        for name, own in graphs.items():
            start = time.perf_counter()
            own[0].replay()
            us = (time.perf_counter() - start) * 1e6
            result[name] = timing.Time(us, us, us)
        return result

    monkeypatch.setattr(timing, "sample", sample)
    monkeypatch.setattr(timing, "in_one_graph", lambda functions, repeat=9: [f() for f in functions] and 1.5)
    for name in ("synchronize", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    original = bench_gpu.maker
    made = lambda name, tiles: humming if name == "humming" else original(name, tiles)
    monkeypatch.setattr(bench_gpu, "maker", made)
    return bench_gpu.Bench(bench_gpu.parse(list(argv)))


@needs_interpreter
def test_ours_in_the_interpreter(tmp_path):
    """Both modes, another layout, tiles of a file, steps by the plan, and the error of each against its own
    reference."""
    vector = {"block_n": 8, "block_k": 256, "num_warps": 4, "num_stages": 1}
    by_route = {"rows_per_expert": 2, "block_m": 1, "gemm1": vector, "gemm2": vector}
    file = tmp_path / "by_route.json"
    file.write_text(json.dumps({"tiles": [by_route, *json.loads((TILES / "default.json").read_text())["tiles"]]}))
    code = f"""
import sys
sys.path.insert(0, {str(TOOLS)!r})
import pytest, torch
from test_bench_gpu import HOST, SMALL, STEP, WHOLE, bench_gpu, dataclasses, on_the_cpu

row = dataclasses.replace(SMALL, hidden=256, intermediate=128, experts=3, local=3)
with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
    bench = on_the_cpu(patch, "--tokens", "3", "--tiles", {str(file)!r})
    patch.setattr(bench_gpu.timing, "calls_of", lambda T: 1)
    bench.args.peers = ["mxfp8", "bf16@aiter_gfx950", "mxfp8:by_route"]
    bench.row(row)
for f in bench.figures:
    own, other = (f.error_mxfp8, f.error_bf16) if f.peer.startswith("mxfp8") else (f.error_bf16, f.error_mxfp8)
    assert f.part != WHOLE or own < 5e-3 < other, f
for peer in bench.args.peers:
    print(*(f.part.removeprefix(STEP) for f in bench.figures if f.peer == peer and f.part.startswith(STEP)), sep=", ")
print([f.peer for f in bench.figures if f.part == WHOLE], [f.peer for f in bench.figures if f.part == HOST])
"""
    *said, last = run_python(code, TRITON_INTERPRET="1").splitlines()[-4:]
    sorted_routes = "dispatch, grouped_gemm w1, grouped_gemm w2, combine"
    assert said == [sorted_routes, sorted_routes, "gate_up w1, down w2"]
    assert last == "['mxfp8', 'bf16@aiter_gfx950', 'mxfp8:by_route'] ['mxfp8']"


class Broken(bench_gpu.Peer):
    activations = "bf16"

    def bind(self, tokens):
        raise AssertionError("no such schedule")


def test_a_peer_that_fails_loses_nobody_elses_figures(monkeypatch, capsys, tmp_path):
    file = tmp_path / "all.csv"
    peers = ("--peers", "humming", "grouped_mm")
    bench = on_the_cpu(monkeypatch, *peers, "--tokens", "1", "5", "--csv", str(file), humming=Broken)
    bench.row(SMALL)
    assert list(bench.failed) == ["humming"]
    said = capsys.readouterr().out
    assert said.count("!! humming cannot be measured; small, uniform, T=1: AssertionError: no such schedule (") == 1
    figures = [f for f in bench.figures if f.part == WHOLE]
    assert [(f.T, f.peer) for f in figures] == [(1, "grouped_mm"), (5, "grouped_mm")]
    assert all(f.error_bf16 < 1e-2 < f.error_mxfp8 and f.floor > 0 for f in figures)
    assert [f.part for f in bench.figures[1:6]] == [STEP + s for s in ("sort", "gemm1", "swiglu", "gemm2", "add")]
    assert report.read(file) == bench.figures
    assert bench_gpu.finish(bench.figures, bench.args, "", bench.failed) == 2  # it was asked for by name
    bench.args.by_name = []
    assert bench_gpu.finish(bench.figures, bench.args, "", bench.failed) == 0


def test_rows_of_a_file_are_measured(monkeypatch, tmp_path):
    """All of them, from the sizes to the figures, and no others."""
    path = tmp_path / "mine.csv"
    path.write_text("model,hidden,intermediate,experts,topk,parallel\nA,64,32,4,2,\nA,64,64,4,2,TP2\n")
    bench = on_the_cpu(monkeypatch, "--peers", "grouped_mm", "--tokens", "3", "--shapes", str(path))
    for row in bench.args.rows.values():
        bench.row(row)
    first, second = [f for f in bench.figures if f.part == WHOLE]
    assert (first.row, second.row) == ("A", "A TP2") and first.operations == second.operations == 6 * 3 * 2 * 64 * 32


def test_one_of_ours_that_fails_ends_the_run(monkeypatch):
    bench = on_the_cpu(monkeypatch, "--peers", "mxfp8", "--tokens", "1")
    monkeypatch.setattr(bench_gpu, "Ours", Broken)
    monkeypatch.setattr(Broken, "__init__", lambda self, *args, **kwargs: None)
    with pytest.raises(AssertionError, match="no such schedule"):
        bench.row(SMALL)


# What it writes


def test_the_table_of_a_point():
    activations = {"mxfp8": "mxfp8", "bf16": "bf16", "humming": "bf16"}
    assert_expected_inline(
        report.point_table([f for f in PLANTED if f.T == 1], activations),
        """\
     T                             us      25 %      75 %  x floor  TFLOP/s    error
     1 floor                     20.0
     1 mxfp8                     40.0      39.0      42.0     2.00        3  2.0e-03
     1 bf16                      50.0      49.0      52.0     2.00        3  4.0e-02
     1 humming                   48.0      47.0      50.0     2.00        3  4.0e-02
     1 humming, gemms            30.0      29.0      31.5
       mxfp8: route 2.5, gemm w1 25.2, (host 151)""",
    )


def test_the_comparison():
    comparison = Comparison.of(PLANTED, ["mxfp8", "bf16"])
    assert comparison.ratios == {
        ("A", "uniform", "mxfp8"): {1: 1.2, 64: 0.9},
        ("A", "uniform", "bf16"): {1: 0.96, 64: 1.0},
    }
    assert comparison.mean("mxfp8") == pytest.approx((1.2 * 0.9) ** 0.5)
    assert comparison.below == [("A", "uniform", "mxfp8", 64, 0.9), ("A", "uniform", "bf16", 1, 0.96)]
    assert_expected_inline(
        str(comparison),
        """\
humming's time over ours: above 1, ours is faster; ! marks what is below 0.98
                                                             T       1      64    mean
A, uniform                                   mxfp8               1.200  0.900!   1.039
A, uniform                                   bf16               0.960!   1.000   0.980
geometric mean of mxfp8 over 2 points: 1.039
geometric mean of bf16 over 2 points: 0.980
BELOW 0.98: mxfp8, A, uniform, T=64: 0.900
BELOW 0.98: bf16, A, uniform, T=1: 0.960""",
    )


def test_tiles_of_a_file_are_compared_with_the_configured_ones(capsys):
    figures = [whole("mxfp8", T, 40.0) for T in (1, 2)]
    figures += [whole("mxfp8:mine", T, us) for T, us in ((1, 32.0), (2, 50.0))]
    assert bench_gpu.finish(figures, bench_gpu.parse([]), "", {}) == 0
    assert_expected_inline(
        capsys.readouterr().out,
        """\

no ratios: humming was not measured

mxfp8's time over the file's: above 1, the file's is faster; ! marks what is below 0.98
                                                             T       1       2    mean
A, uniform                                   mxfp8:mine          1.250  0.800!   1.000
geometric mean of mxfp8:mine over 2 points: 1.000
BELOW 0.98: mxfp8:mine, A, uniform, T=2: 0.800
""",
    )


def test_the_exit_status(capsys):
    args = bench_gpu.parse([])
    assert bench_gpu.finish(PLANTED, args, "", {}) == 1
    faster = [f for f in PLANTED if f.peer != "bf16" and f.T == 1]
    assert bench_gpu.finish(faster, args, "", {}) == 0
    assert "BELOW 0.98: mxfp8, A, uniform, T=64: 0.900" in capsys.readouterr().out
    assert bench_gpu.finish([f for f in PLANTED if f.peer != "humming"], args, "", {}) == 0
    assert "no ratios: humming was not measured" in capsys.readouterr().out


def test_figures_survive_the_file(tmp_path):
    path = tmp_path / "figures.csv"
    csv = report.Csv(path)
    csv.write(PLANTED[:3])
    assert report.read(path) == PLANTED[:3]  # while the run goes on
    csv.write(PLANTED[3:])
    assert report.read(path) == PLANTED


def test_a_file_is_compared_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "figures.csv"
    report.Csv(path).write(PLANTED)
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--read", str(path)])
    assert bench_gpu.main() == 1
    assert str(Comparison.of(PLANTED, ["mxfp8", "bf16"])) in capsys.readouterr().out


@needs_matplotlib
def test_the_picture(tmp_path):
    """A curve with its points for each peer of each of the two panels, and their floors."""
    import re

    path = tmp_path / "times.svg"
    report.picture(PLANTED, path, "some GPU")
    text = path.read_text()
    assert text.lstrip().startswith("<?xml") and len(re.findall(r'<g id="axes_\d+">', text)) == 2
    for words in ("some GPU", "A, uniform", "B, zipf", "humming", "microseconds"):
        assert f"<!-- {words} -->" in text
