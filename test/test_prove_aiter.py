"""What tools/prove_aiter.py is made of, as far as it needs no aiter; the program itself needs one."""

import importlib.util
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import oracle
from helpers import only_cpu
from torch_mxfp8moe.layouts import AITER_GFX950

PROGRAM = Path(__file__).resolve().parent.parent / "tools" / "prove_aiter.py"
if not PROGRAM.exists():
    pytest.skip("needs the source tree", allow_module_level=True)
pytest.importorskip("numpy", "2.0")

import aiter_gfx950 as rules  # noqa: E402

spec = importlib.util.spec_from_file_location("prove_aiter", PROGRAM)
prove_aiter = importlib.util.module_from_spec(spec)
sys.modules["prove_aiter"] = prove_aiter  # dataclasses look their module up
spec.loader.exec_module(prove_aiter)

pytestmark = only_cpu


# --- stand-ins against brute force


def routing(T, topk, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(T, experts, generator=generator).topk(topk).indices.int()
    return ids, torch.rand(T, topk, generator=generator)


@pytest.mark.parametrize("T, topk, known, local, block", [(1, 1, 1, 1, 32), (13, 2, 4, 4, 32), (70, 3, 9, 5, 64),
                                                          (5, 2, 8, 3, 32), (129, 1, 2, 2, 128)])  # fmt: skip
@pytest.mark.parametrize("whole_blocks", (False, True))
def test_sort_routes(T, topk, known, local, block, whole_blocks):
    ids, weights = routing(T, topk, known)
    found = rules.sort_routes(ids, weights, local, block, whole_blocks)
    expected, experts = [], []
    for expert in range(local):
        of_expert = [(t, k) for t in range(T) for k in range(topk) if ids[t, k] == expert]
        while len(of_expert) % block:
            of_expert.append((T, topk))
        expected += of_expert
        experts += [expert] * (len(of_expert) // block)
    end = len(expected)
    assert found.valid.tolist() == [end, T]
    assert found.ids[:end].tolist() == [slot * 2**24 + token for token, slot in expected]
    assert found.weights[:end].tolist() == [weights[t, k].item() if t < T else 0.0 for t, k in expected]
    assert found.experts[: len(experts)].tolist() == experts
    rows = T * topk + local * block - topk
    assert len(found.ids) == (math.ceil(rows / block) * block if whole_blocks else rows) >= end
    assert len(found.experts) == math.ceil(rows / block)
    routes = [(row, t, k) for row, (t, k) in enumerate(expected) if t < T]
    assert list(zip(*map(torch.Tensor.tolist, found.routes))) == routes


def test_what_sorting_leaves_undefined():
    found = rules.sort_routes(*routing(5, 2, 4), 4, 32)
    end = int(found.valid[0])
    for x, first in ((found.ids, end), (found.weights, end), (found.experts, end // 32)):
        assert found.unwritten(x).tolist() == [i // 4 >= first for i in range(4 * len(x))]
    assert found.unwritten(found.valid) is None


def test_place_is_the_order_of_plain_scales():
    """That of w2's scales, of which the layout's permutation is another definition."""
    rows, columns = 96, 16
    x = torch.arange(rows * columns).view(1, rows, columns)
    placed = torch.empty(rows * columns, dtype=torch.long)
    placed[rules.place(torch.arange(rows)[:, None], torch.arange(columns), columns)] = x[0]
    assert placed.equal(AITER_GFX950.scale[False].apply(x))


@pytest.mark.parametrize("by_slot", (False, True))
def test_sort_scales(by_slot):
    ids, weights = routing(7, 2, 3)
    routes = rules.sort_routes(ids, weights, 3, 32)
    scale = torch.randint(0, 255, (7, 2, 9) if by_slot else (7, 9), dtype=torch.uint8)
    found = rules.sort_scales(scale, routes).flatten()
    assert len(found) == math.ceil(len(routes.ids) / 32) * 32 * 16
    left = torch.ones(len(found), dtype=torch.bool)
    for row, token, slot in zip(*map(torch.Tensor.tolist, routes.routes)):
        for column in range(9):
            where = rules.place(torch.tensor(row), torch.tensor(column), 16)
            assert found[where] == (scale[token, slot, column] if by_slot else scale[token, column])
            left[where] = False
    assert (found[left] == 0xFF).all() and left.any()


def blocks_of_every_size() -> torch.Tensor:
    """[n, 64], amax next to every power of two, to 1.5 and to 1.75 times it."""
    generator = torch.Generator().manual_seed(0)
    amax = torch.tensor([m * 2.0**e for e in range(-30, 100) for m in (1, 1.25, 1.4999999, 1.5, 1.75, 1.7500001, 1.99)])
    x = torch.randn(len(amax), 64, generator=generator).clamp(-1, 1) * amax[:, None]
    x[:, 5], x[:, 40] = amax, -amax
    return x


@pytest.mark.parametrize("quantize", (rules.quantize, rules.quantize_fused))
def test_quantize(quantize):
    x = blocks_of_every_size()
    data, scale = quantize(x)
    for value, byte in zip(x.flatten(0).view(-1, 32), scale.flatten().tolist()):
        amax = Fraction(value.abs().max().item())
        if quantize is rules.quantize:  # the smallest that saturates nothing, at least that of 1e-10
            assert byte == next(b for b in range(255) if max(amax, Fraction(1e-10)) <= 448 * Fraction(2) ** (b - 127))
        else:  # from 3 / 4 of a power of two on, that one
            assert byte == next(b for b in range(255) if amax < Fraction(3, 2) * Fraction(2) ** (b - 127 + 8))
    scaled = x.double().numpy() / oracle.SCALE_VALUES[scale.numpy().repeat(32, 1)]
    assert (oracle.encode(scaled) == data.view(torch.uint8).numpy()).all()


def test_quantize_zeros():
    data, scale = rules.quantize(torch.zeros(1, 32))
    assert scale.item() == 85 and not data.view(torch.uint8).any()
    data, scale = rules.quantize_fused(torch.zeros(1, 32))
    assert scale.item() == 0 and not data.view(torch.uint8).any()


# --- launches


class Compiler:
    """Stands in for flydsl.compiler."""

    def __init__(self, files: int = 1):
        self.files, self.compiled = files, 0

    def compile(self, kernel, *arguments):
        self.compiled += 1
        for i in range(self.files):
            folder = Path(os.environ["FLYDSL_DUMP_DIR"]) / f"{kernel}_{i}"
            folder.mkdir(parents=True)
            (folder / "21_final_isa.s").write_text(f"assembly of {kernel}")


def aiter_with(compiler: Compiler) -> rules.Aiter:
    aiter = object.__new__(rules.Aiter)
    aiter.compiler, aiter._texts, aiter.unordered, aiter.workgroups = compiler, {}, [], None
    return aiter


def test_launches_are_caught():
    compiler = Compiler()
    aiter = aiter_with(compiler)
    pointer = lambda value: SimpleNamespace(pointer=SimpleNamespace(value=value))
    with aiter._caught() as launches:
        for kernel in ("one", "other", "one"):
            stream = torch.cuda.current_stream()
            compiler.compile(kernel, pointer(4096), pointer(None), 7, 2.5, stream)
    assert [one.text for one in launches] == ["assembly of one", "assembly of other", "assembly of one"]
    assert all(one.values == [4096, 0, 7, 2.5] for one in launches)
    assert compiler.compiled == 2 and "FLYDSL_DUMP_DIR" not in os.environ
    assert compiler.compile.__func__ is Compiler.compile


@pytest.mark.parametrize("files", (0, 2))
def test_assembly_that_is_missing_or_ambiguous(files):
    aiter = aiter_with(Compiler(files))
    with pytest.raises(RuntimeError, match=f"left {files} files of assembly"), aiter._caught():
        aiter.compiler.compile("kernel", 0)


def test_execute():
    """Addresses of host tensors become the simulator's; what aiter left unwritten in the routes is undefined."""
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    import gfx950_kernels as kernels
    from gfx950_simulator.checks import all_checks
    from gfx950_simulator.machine import SimulationError

    types = dict(x="*fp32", y="*fp32", out="*fp32", n="i32")
    text = kernels.compile_text(kernels.add_kernel, types, dict(BLOCK=64)).asm["amdgcn"]
    routes = rules.sort_routes(*routing(5, 2, 4), 4, 32)
    x, out, end = torch.randn(len(routes.weights)), torch.empty(len(routes.weights)), int(routes.valid[0])

    def run(n: int, y: torch.Tensor) -> None:
        launch = rules.Launch(text, [x.data_ptr(), y.data_ptr(), out.data_ptr(), n])
        rules.execute(launch, "*u8 *u8 *u8 i32", (3,), [x, routes.weights], [out], routes, all_checks())

    run(end, routes.weights)
    assert out[:end].equal((x + routes.weights)[:end]) and out[end:].isnan().all()
    with pytest.raises(SimulationError, match="what is stored is undefined"):
        run(end + 1, routes.weights)
    with pytest.raises(KeyError):  # an address that is none of the tensors'
        run(end, torch.zeros(4))


def test_what_is_left_to_chance_is_told_and_run_without_the_check(monkeypatch):
    aiter, calls = aiter_with(Compiler()), []

    def execute(launch, types, grid, *others):
        calls.append((grid, [type(one).__name__ for one in others[-1]]))
        if "LdsOrder" in calls[-1][1]:
            raise rules.Unordered("two waves")

    monkeypatch.setattr(rules, "execute", execute)
    aiter._execute(None, "", (9, 4), [], [], None)
    aiter.workgroups = 2
    aiter._execute(None, "", (9, 4), [], [], None)
    everything, rest = ["Undefined", "WaitCounts", "LdsOrder"], ["Undefined", "WaitCounts"]
    assert calls == [((9, 4), everything), ((9, 4), rest), ((2, 1), everything), ((2, 1), rest)]
    assert aiter.unordered == ["two waves"] * 2


# --- the comparison


def test_relative():
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])
    assert prove_aiter.relative(x, y) == pytest.approx(34**-0.5)
    assert prove_aiter.relative(x, x) == prove_aiter.relative(0 * x, 0 * x) == 0
    assert prove_aiter.relative(x * torch.nan, x) == prove_aiter.relative(x, 0 * x) == math.inf


def test_rows_hold_or_fail():
    case = prove_aiter.CASES[0]
    for error, wrong, holds in ((1e-4, False, True), (math.inf, False, False), (0.1, False, False), (0.1, True, False),
                                (1.0, True, True), (math.inf, True, True)):  # fmt: skip
        row = prove_aiter.Row(case, "kernel", error, 0.5 if wrong else 1e-3, 1.0, 1000, wrong)
        assert row.holds == holds and ("FAILS" in str(row)) != holds


# --- the program without aiter


def test_tables(tmp_path, capsys):
    """Each kernel once for each H, I and block, and what the checks say to it; a kernel that they stop is one of it."""

    class Tables:
        tables, unordered, parse_v2 = [tmp_path / "one.csv", tmp_path / "two.csv"], [], staticmethod(lambda name: None)

        def stage1(self, case, a, a_scale, w1, w1_scale, routes):
            assert self.workgroups == 2 and a.shape == (case.T, case.H) and w1.shape == (case.E, 2 * case.I, case.H)
            if case.stage1 == "early":
                self.unordered.append("two waves")

        def stage2(self, case, a2, a2_scale, w2, w2_scale, routes):
            assert a2.shape == (case.T, case.topk, case.I) and w2.shape == (case.E, case.H, case.I)
            if case.I == 512:
                raise prove_aiter.simulator.SimulationError("outside")

    header = "token,model_dim,inter_dim,block_m,act_type,kernelName1,kernelName2\n"
    for table, lines in zip(Tables.tables, (["1,512,256,32,Silu,fine,k", "2,512,256,32,Silu,early,k"],
                                            ["4,512,512,64,ActivationType.Swiglu,fine,k"])):  # fmt: skip
        table.write_text(header + "\n".join(lines) + "\n")
    prove_aiter.check_tables(Tables())
    *found, last = (line.split(maxsplit=9) for line in capsys.readouterr().out.splitlines())
    found = [(name, int(I), int(token[:-1]), " ".join(says)) for name, _, _, _, I, _, _, _, token, *says in found]
    assert found == [
        ("fine", 256, 1, "nothing"), ("k", 256, 1, "nothing"), ("early", 256, 2, "two waves"),
        ("fine", 512, 4, "nothing"), ("k", 512, 4, "outside"),
    ]  # fmt: skip
    assert " ".join(last) == "5 kernels; the checks say nothing to 3"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The program where ``folder`` comes first on the path."""
    code = f"import sys, runpy; sys.path.insert(0, {str(folder)!r}); sys.argv[0] = {str(PROGRAM)!r}\n"
    code += f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=PROGRAM.parent)


@pytest.mark.parametrize(
    "content, why",
    [
        ("raise ImportError('no ROCm here')", "ImportError: no ROCm here"),
        ("raise RuntimeError('ROCm version file not found')", "RuntimeError: ROCm version file not found"),
        ("async def anext(iterator): ...", "the module 'aiter' is {folder}"),  # the package index's: iterators
    ],
)
def test_without_aiter_it_says_so_and_compares_nothing(tmp_path, content, why):
    (tmp_path / "aiter.py").write_text(content)
    (tmp_path / "flydsl").mkdir()
    for name in ("__init__.py", "compiler.py"):
        (tmp_path / "flydsl" / name).touch()
    done = run(tmp_path)
    assert done.returncode == prove_aiter.SKIPPED == 77 and not done.stdout
    assert done.stderr.startswith("SKIPPED, nothing was compared: ") and why.format(folder=tmp_path) in done.stderr


def test_options(tmp_path):
    done = run(tmp_path, "--list")
    assert done.returncode == 0 and done.stdout.splitlines() == [case.name for case in prove_aiter.CASES]
    done = run(tmp_path, "--cases", "nothing")
    assert done.returncode == 2 and "no case has 'nothing' in its name" in done.stderr
