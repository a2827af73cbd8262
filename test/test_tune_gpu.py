"""tools/tune_gpu.py as far as it goes without a GPU: the search, what is remembered, what is written, what is wrong."""

import dataclasses
import itertools
import json
import math
import multiprocessing.forkserver
import os
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import device
from helpers import PACKAGE, only_cpu, run_python
from shapes import rows
from torch_mxfp8moe import configs

TOOLS = PACKAGE.parent / "tools"
if not TOOLS.exists():
    pytest.skip("needs the source tree", allow_module_level=True)
pytest.importorskip("triton", reason="needs Triton: pip install triton")
sys.path.insert(0, str(TOOLS))

import tune_gpu  # noqa: E402
from bench import tuning  # noqa: E402
from bench.compiling import Task, compile_all  # noqa: E402
from bench.tuning import GEMMS, Journal, Point, Result, Search, Table, Tile, Trial, key  # noqa: E402

from torch_mxfp8moe.backends.triton.targets import Target  # noqa: E402

pytestmark = only_cpu

FILES = sorted((configs.FOLDER / "triton").glob("*.json"))
SHAPE = (64, 32, 4, 2)
GEMM = {"block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2}
OTHER = GEMM | {"num_stages": 3}


def point(T: int, shape=SHAPE, row: str = "A") -> Point:
    return Point(row, shape, T)


def trial(T: int = 1, gemm: str = "gemm1", block_m: int = 16, tile: dict = GEMM, **kwargs) -> Trial:
    return Trial(point(T, **kwargs), gemm, key({"block_m": block_m}), key(tile))


# Tiles as data


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_shipped_file_survives_reading_and_writing(path):
    """Byte for byte; and every rule is what its tiles say that it is."""
    text = path.read_text()
    assert tuning.dump(json.loads(text)) == text
    config = configs.parse(path.name, json.loads(text))
    for rule, tiles in zip(json.loads(text)["tiles"], config.tiles, strict=True):
        parts = [tuning.gemm_json(getattr(tiles, gemm)) for gemm in GEMMS]
        assert parts == [rule[gemm] for gemm in GEMMS] and tuning.rule_json(tiles) == {"block_m": rule["block_m"]}
        assert dataclasses.replace(tuning.tiles_of(tuning.rule_json(tiles), *parts), rows_per_expert=None) == (
            dataclasses.replace(tiles, rows_per_expert=None)
        )


def test_a_file_with_shapes_survives():
    rule = {"rows_per_expert": None, "block_m": 16, "gemm1": GEMM, "gemm2": OTHER}
    shape = dict(zip(tuning.SIZES, SHAPE))
    shapes = [shape | {"tiles": [rule | {"rows_per_expert": 4}, rule]}, shape | {"topk": 3, "tiles": [rule]}]
    data = {"tiles": [rule], "shapes": shapes}
    text = tuning.dump(data)
    assert json.loads(text) == data and configs.parse("x", json.loads(text)) == configs.parse("x", data)
    assert all(len(line) < 330 for line in text.splitlines()) and text.count("\n") == 14


def test_fields_that_others_add_need_nothing_here(monkeypatch):
    """A field of a dataclass of configs, and a value of it in the space."""
    Gemm = dataclasses.make_dataclass(
        "Gemm", [("consumers", int, dataclasses.field(default=1))], bases=(configs.Gemm,), frozen=True
    )
    monkeypatch.setattr(tuning, "Gemm", Gemm)
    monkeypatch.setattr(tuning, "_DEFAULTS", tuning._DEFAULTS | {"consumers": 1})
    tile = Gemm(64, 64, 4, 2, consumers=2, options={"maxnreg": 168})
    assert tuning.gemm_json(tile) == GEMM | {"consumers": 2, "maxnreg": 168}
    assert tuning.gemm_json(dataclasses.replace(tile, consumers=1, options={})) == GEMM
    space = tuning.space_of("sm_90", {"gemm1": {"consumers": [1, 2]}, "rule": {"block_m": [64]}})
    assert space["gemm1"]["consumers"] == (1, 2) and "consumers" not in space["gemm2"]
    assert space["rule"] == {"block_m": (64,)}
    search = Search(point(1), "gemm1", {"block_m": 64}, GEMM, space["gemm1"])
    assert GEMM | {"consumers": 2} in search.neighbours(GEMM) and GEMM in search.neighbours(GEMM | {"consumers": 2})


@pytest.mark.parametrize("arch", ("sm_90", "sm_100", "gfx942", "gfx950"))
def test_the_space_is_of_tiles_that_configs_take(arch):
    space = tuning.space_of(arch)
    for rule in tuning.rules_to_try(point(1), space["rule"], width=1e9):
        for gemm in GEMMS:
            for values in itertools.product(*space[gemm].values()):
                tile = tuning.normal(dict(zip(space[gemm], values)))
                made = getattr(tuning.tiles_of(rule, tile, tile), gemm)
                assert tuning.gemm_json(made) == tile
    with pytest.raises(ValueError, match="a space has 'gem'; it takes rule, gemm, gemm1, gemm2"):
        tuning.space_of(arch, {"gem": {}})


def test_rules_near_the_rows_of_an_expert():
    space = {"block_m": (16, 32, 64, 128)}
    near = lambda T: [rule["block_m"] for rule in tuning.rules_to_try(point(T, (64, 32, 128, 4)), space)]
    assert [near(T) for T in (1, 640, 1024, 8192)] == [[16], [16, 32, 64], [16, 32, 64, 128], [64, 128]]
    assert near(1 << 20) == [128]


# The search


def run(search: Search, time_of, seeds=()) -> int:
    """To its end; -> how many tiles were tried."""
    for _ in range(100):
        wanted = search.propose(seeds)
        if not wanted:
            return len(search.times)
        assert len(set(map(key, wanted))) == len(wanted) and not set(map(key, wanted)) & set(search.times)
        for tile in wanted:
            search.times[key(tile)] = time_of(tile)
    raise AssertionError("does not end")


@given(best=st.tuples(*(st.sampled_from(v) for v in tuning.space_of("sm_90")["gemm1"].values())))
def test_it_finds_a_minimum_that_fields_lead_to(best):
    space = tuning.space_of("sm_90")["gemm1"]

    def time_of(tile):
        full = {"descriptors": False} | tile
        return 1.0 + sum(
            abs(space[name].index(full[name]) - space[name].index(want)) for name, want in zip(space, best)
        )

    search = Search(point(1), "gemm1", {"block_m": 16}, GEMM, space)
    tried = run(search, time_of)
    assert search.best == (tuning.normal(dict(zip(space, best))), 1.0)
    assert tried < math.prod(map(len, space.values())) / 3


def test_where_nothing_is_usable_it_goes_on_from_the_start_and_ends():
    space = {"num_stages": (2, 3, 4), "num_warps": (4, 8)}
    search = Search(point(1), "gemm1", {"block_m": 16}, GEMM, space)
    assert run(search, lambda tile: None) == 4 and search.best is None
    search = Search(point(1), "gemm1", {"block_m": 16}, GEMM, space)
    assert run(search, lambda tile: None if tile == GEMM else 5.0 - tile["num_stages"]) == 5
    assert search.best == (GEMM | {"num_stages": 4}, 1.0)


def test_seeds_are_tried_and_nothing_else_if_it_is_not_to_descend():
    search = Search(point(1), "gemm1", {"block_m": 16}, GEMM, {"num_warps": (4, 8)})
    assert search.propose([OTHER]) == [GEMM, OTHER] and search.propose([OTHER], descend=False) == [OTHER]
    search.times[key(OTHER)] = 1.0
    assert search.propose([OTHER], descend=False) == []


# What is remembered


def test_a_journal_is_read_again(tmp_path):
    path, stamp = tmp_path / "j.jsonl", {"gpu": "X", "source": "1"}
    journal = Journal(path, stamp)
    results = {
        trial(): Result("ok", 12.5), trial(tile=OTHER): Result("wrong", 3.0, "2 of 9 elements are wrong"),
        trial(64, "gemm2", 64): Result("failed", note="out of resource"),
    }  # fmt: skip
    for one, result in results.items():
        journal.begin(one)
        journal.finish(one, result)
    assert Journal(path, stamp).results == journal.results == results
    assert Journal(path, None).stamp == stamp and Journal(path, None).results == results
    assert [result.usable for result in results.values()] == [12.5, None, None]
    newer = Journal(path, stamp | {"source": "2"})
    assert newer.results == {} and newer.other == 6


def test_a_trial_that_never_came_back_and_a_line_cut_off(tmp_path):
    path, stamp = tmp_path / "j.jsonl", {"gpu": "X"}
    journal = Journal(path, stamp)
    journal.finish(trial(), Result("ok", 1.0))
    journal.begin(trial(4))
    with path.open("a") as file:
        file.write('{"stamp": {"gpu"')
    again = Journal(path, stamp)
    assert again.results == {trial(): Result("ok", 1.0), trial(4): Result("crashed", note="did not come back")}
    again.finish(trial(16), Result("ok", 2.0))
    assert Journal(path, stamp).results[trial(16)] == Result("ok", 2.0)


def test_the_source_hash_is_of_what_the_files_hold(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    first = tuning.source_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert tuning.source_hash(tmp_path) == first
    (tmp_path / "a.py").write_text("x = 2")
    assert tuning.source_hash(tmp_path) != first


class Fake:
    """In the place of a point on a GPU: a time that depends on fields alone."""

    measured = []

    def __init__(self, row, weights, T, activations, layout):
        self.T = T

    def measure(self, gemm, rule, tile, target, slow):
        self.measured.append((self.T, gemm, key(rule), key(tile)))
        if tile["num_stages"] == 5:
            raise RuntimeError("out of resource")
        us = 10.0 + abs(math.log2(tile["block_n"] / 128)) + tile["num_stages"] / 8 + rule["block_m"] / 64
        return Result("wrong", us, "planted") if tile["num_warps"] == 8 else Result("ok", us)


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    """``tuner(until)``: a tuner on a pretended sm_90, and its journal, both new, on the same file."""
    row = dataclasses.replace(rows()["Qwen3-30B-A3B TP1"], name="small")
    monkeypatch.setattr(type(row), "weights", lambda self: None)
    monkeypatch.setattr(tune_gpu, "Measured", Fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    compiled = []

    def compile_all(tasks, jobs):
        for task in tasks:
            compiled.append(task)
            yield task, "no registers" if json.loads(getattr(task, task.gemm)).get("descriptors") else ""

    monkeypatch.setattr(tune_gpu, "compile_all", compile_all)
    Fake.measured.clear()

    def build(*argv: str):
        args = tune_gpu.parse(["--journal", str(tmp_path / "j.jsonl"), "--tokens", "16", "64", *argv])
        journal = Journal(args.journal, {"gpu": "X"})
        one = tune_gpu.Tuner(args, journal, Target("sm_90"), time.time() + 100)
        return one, row, one.searches(row), compiled

    return build


def test_a_row_is_tuned_and_a_second_run_measures_nothing(tuner, capsys):
    one, row, searches, compiled = tuner()
    one.tune(row, searches, [], time.time() + 100)
    for search in searches:
        best, us = search.best
        assert best == {"block_n": 128, "block_k": best["block_k"], "num_warps": 4, "num_stages": 2}
    assert len(set(Fake.measured)) == len(Fake.measured) > 50
    said = capsys.readouterr().out
    assert "wrong: small T=16 gemm1" in said and ": planted" in said
    statuses = {result.status for result in one.journal.results.values()}
    assert statuses == {"ok", "wrong", "failed"}
    for task in compiled:  # one for all token counts that want it
        assert set(task.tokens) <= {16, 64} and getattr(task, task.gemm) != "" and task.arch == "sm_90"
    assert any(task.tokens == (16, 64) for task in compiled)
    assert len({(task.gemm, task.rule, task.gemm1, task.gemm2, task.tokens) for task in compiled}) == len(compiled)

    bests, counts = [search.best for search in searches], (len(Fake.measured), len(compiled))
    one, row, searches, compiled = tuner()
    one.tune(row, searches, [], time.time() + 100)
    assert [search.best for search in searches] == bests and (len(Fake.measured), len(compiled)) == counts


def test_a_run_that_was_cut_off_goes_on(tuner, tmp_path):
    one, row, searches, _ = tuner()
    one.tune(row, searches, [], time.time() + 100)
    whole = set(Fake.measured)
    lines = (tmp_path / "j.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "j.jsonl").write_text("".join(lines[: len(lines) // 2]))
    Fake.measured.clear()
    one, row, searches, _ = tuner()
    before = {t for t, r in one.journal.results.items() if r.status != "failed" or "RuntimeError" in r.note}
    one.tune(row, searches, [], time.time() + 100)
    known = {(t.point.T, t.gemm, t.rule, t.tile) for t in before}
    assert not known & set(Fake.measured) and known | set(Fake.measured) == whole


def test_it_ends_when_the_time_is_over(tuner):
    one, row, searches, _ = tuner()
    one.tune(row, searches, [], time.time() - 1)
    assert not Fake.measured and not one.journal.results


def test_tiles_that_are_good_elsewhere_are_tried(tuner):
    one, row, searches, _ = tuner()
    rule = searches[0].rule
    elsewhere = Search(point(1024, row="B"), "gemm1", rule, GEMM, {})
    good = GEMM | {"block_n": 256, "maxnreg": 100}
    elsewhere.times[key(good)] = 1.0
    one.tune(row, searches, [elsewhere], time.time() + 100, descend=False)
    tried = [(search.point.T, search.gemm, key(search.rule)) for search in searches if search.times]
    assert sorted(tried) == [(16, "gemm1", key(rule)), (64, "gemm1", key(rule))]
    assert sorted(Fake.measured) == [(*one, key(good)) for one in sorted(tried)]


def test_a_candidate_that_breaks_the_gpu_ends_the_worker_and_is_not_tried_again(tuner, monkeypatch):
    class Ended(BaseException):
        pass

    def leave(status):
        raise Ended(status)

    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    one, row, searches, _ = tuner()
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Ended, match="75"):
        one.tune(row, searches, [], time.time() + 100)
    left = Journal(one.journal.path, one.journal.stamp).results
    (bad,) = [trial for trial, result in left.items() if result.status == "crashed"]
    assert json.loads(bad.tile)["num_stages"] == 5
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    count = Fake.measured.count((bad.point.T, bad.gemm, bad.rule, bad.tile))
    one, row, searches, _ = tuner()
    one.tune(row, searches, [], time.time() + 100)
    assert count == Fake.measured.count((bad.point.T, bad.gemm, bad.rule, bad.tile)) == 1


def test_a_candidate_that_hangs_ends_the_worker(tmp_path):
    """In a process of its own, which the watch ends while the main thread waits."""
    code = f"""
import sys, time
sys.path.insert(0, {str(TOOLS)!r})
import tune_gpu
from types import SimpleNamespace
from pathlib import Path
from test_tune_gpu import GEMM, Search, point, Journal
tune_gpu.HANG = 0.2
args = SimpleNamespace(space=None)
tuner = tune_gpu.Tuner(args, Journal(Path(sys.argv[1]), {{"gpu": "X"}}), SimpleNamespace(arch="sm_90"), 0)
search = Search(point(1), "gemm1", {{"block_m": 16}}, GEMM, {{}})
hang = SimpleNamespace(measure=lambda *args: time.sleep(60))
try:
    tuner.attempt(search.trial(GEMM), hang, search, GEMM)
finally:
    print("came back")
"""
    path = os.pathsep.join([str(PACKAGE.parent), os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, str(tmp_path / "j.jsonl")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (75, ""), done.stderr
    assert Journal(tmp_path / "j.jsonl", {"gpu": "X"}).results == {trial(): Result("crashed", note="did not come back")}


def test_a_whole_run(tuner, monkeypatch, tmp_path, capsys):
    """All that a worker does, on a pretended GPU: two rows, both turns, the tables and the file."""
    from torch_mxfp8moe.backends import triton as backend

    out, names = tmp_path / "sm_90.json", ["Qwen3-30B-A3B TP1", "GLM-5 TP4"]
    one, *_ = tuner("--rows", *names, "--out", str(out))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "X")
    monkeypatch.setattr(backend.BACKEND, "target", lambda device: Target("sm_90"))
    monkeypatch.setenv(tune_gpu.UNTIL, str(time.time() + 100))
    assert tune_gpu.work(one.args) == 0
    said = capsys.readouterr().out
    for name in names:
        assert f"{name}: both products, us" in said
    config = configs.parse("file", json.loads(out.read_text()))
    assert config.shapes == {} and all(tiles.gemm1.num_stages == 2 and tiles.block_m == 16 for tiles in config.tiles)
    assert "the products take 1.0" in said and "was not measured" not in said
    Fake.measured.clear()
    assert tune_gpu.work(one.args) == 0 and not Fake.measured
    assert configs.parse("file", json.loads(out.read_text())) == config


def test_workers_follow_one_another(tmp_path):
    args = tune_gpu.parse(["--journal", str(tmp_path / "j.jsonl"), "--minutes", "5"])

    def runs(*statuses: int, grows: bool = True):
        left, untils = list(statuses), []

        def run(env):
            untils.append(env[tune_gpu.UNTIL])
            if grows:
                Journal(args.journal, {}).begin(trial(len(left)))
            return left.pop(0)

        result = tune_gpu.supervise(args, run)
        assert len(set(untils)) == 1 and 250 < float(untils[0]) - time.time() <= 300
        return result, left

    assert runs(75, -11, 75, 0) == (0, [])
    assert runs(1, 0) == (1, [0])
    assert runs(75, 75, 0, grows=False) == (1, [0])


# What is written


def table(times: dict[tuple[Point, int, str], float]) -> Table:
    """From the microseconds of each product, by point, block_m and a name; the name is the tile's num_stages."""
    results = {}
    for (at, block_m, stages), us in times.items():
        for gemm in GEMMS:
            results[Trial(at, gemm, key({"block_m": block_m}), key(GEMM | {"num_stages": int(stages)}))] = Result(
                "ok", us
            )
    return Table(results)


def tile(block_m: int, stages: int) -> Tile:
    gemm = GEMM | {"num_stages": stages}
    return Tile.of({"block_m": block_m}, gemm, gemm)


def told(rules: list[dict]) -> list[tuple]:
    return [(rule["rows_per_expert"], rule["block_m"], rule["gemm1"]["num_stages"]) for rule in rules]


def test_the_time_of_a_tile():
    a = point(1)
    one = table({(a, 16, "2"): 10.0, (a, 16, "3"): 10.1, (a, 32, "2"): 10.15, (a, 32, "4"): 15.0})
    assert one.best(a) == [tile(16, 2)] and one.best(a, 0.02) == [tile(16, 2), tile(32, 2)]
    assert one.over_best(a, tile(16, 3)) == pytest.approx(1.01) and one.over_best(a, tile(16, 4)) is None
    wrong = Table({trial(): Result("wrong", 1.0), trial(gemm="gemm2"): Result("ok", 1.0)})
    assert wrong.best(point(1)) == []


def test_one_rule_where_one_tile_is_good_enough_everywhere():
    a, b = point(1), point(64)
    one = table({(a, 16, "2"): 10.0, (a, 16, "3"): 10.15, (b, 16, "2"): 30.0, (b, 16, "3"): 20.0})
    tiles = [tile(16, 2), tile(16, 3)]
    assert told(tuning.reduce([a, b], tiles, one.over_best, 0.02)) == [(None, 16, 3)]
    assert told(tuning.reduce([a, b], tiles, one.over_best, 0.01)) == [(4, 16, 2), (None, 16, 3)]


def test_a_tile_that_was_not_measured_there_does_not_serve():
    a, b = point(1), point(64)
    one = table({(a, 16, "2"): 10.0, (b, 16, "3"): 20.0})
    assert len(tuning.reduce([a, b], [tile(16, 2), tile(16, 3)], one.over_best, 0.02)) == 2
    assert tuning.reduce([a, b], [tile(16, 2)], one.over_best, 0.02) is None
    soft = lambda per_rule: tuning.reduce([a, b], [tile(16, 2), tile(16, 3)], one.over_best, None, per_rule)
    assert len(soft(math.log(2) * 1.1)) == 1 and len(soft(math.log(2) * 0.9)) == 2  # it counts as twice the best


def test_block_m_never_falls():
    """Where the fastest tiles would let it, something else within the bound is found, or none."""
    a, b = point(1), point(64)
    times = {(a, 64, "2"): 10.0, (b, 32, "2"): 20.0, (a, 32, "2"): 12.0, (b, 64, "2"): 20.3}
    one, tiles = table(times), [tile(32, 2), tile(64, 2)]
    assert told(tuning.reduce([a, b], tiles, one.over_best, 0.02)) == [(None, 64, 2)]
    assert tuning.reduce([a, b], tiles, one.over_best, 0.01) is None


@given(st.data())
def test_reduction_against_every_choice(data):
    """Few points and tiles, all ways to give each point a tile: the fewest rules within the bound, and their cost."""
    points = [point(T) for T in data.draw(st.sets(st.sampled_from((1, 4, 16, 64, 256)), min_size=1, max_size=4))]
    points.sort(key=lambda p: p.rows)
    drawn = st.sets(st.tuples(st.sampled_from((16, 32)), st.integers(2, 4)), min_size=1, max_size=4)
    tiles = [tile(*one) for one in data.draw(drawn)]
    costs = {(p, t): data.draw(st.sampled_from((1.0, 1.01, 1.05, None))) for p in points for t in tiles}
    rules = tuning.reduce(points, tiles, lambda p, t: costs[p, t], 0.02)
    found = []
    for choice in itertools.product(tiles, repeat=len(points)):
        within = all((costs[p, t] or 9) <= 1.02 for p, t in zip(points, choice))
        if within and all(x.block_m <= y.block_m for x, y in itertools.pairwise(choice)):
            changes = 1 + sum(x != y for x, y in itertools.pairwise(choice))
            found.append((changes, sum(math.log(costs[p, t]) for p, t in zip(points, choice))))
    if rules is None:
        assert not found
        return
    served = [tuning.chosen(rules, p) for p in points]
    configs.parse("file", {"tiles": rules})
    assert (len(rules), pytest.approx(sum(math.log(costs[p, t]) for p, t in zip(points, served)))) == min(found)


@given(st.floats(1e-3, 1e4), st.floats(1.0001, 1e4))
def test_limits_are_between(low, factor):
    assert low <= tuning.limit_between(low, low * factor) < low * factor


def test_limits_are_readable():
    assert [tuning.limit_between(*p) for p in ((0.5, 32), (2, 8), (10, 11), (0.03125, 0.125))] == [4, 4, 10, 0.06]


def test_only_shapes_that_need_them_get_rules_of_their_own():
    """A and B agree; C wants another tile for many tokens."""
    shapes = {"A": (64, 32, 4, 2), "B": (128, 32, 4, 2), "C": (256, 32, 4, 2)}
    times = {}
    for name, shape in shapes.items():
        for T in (1, 64):
            for stages in "23":
                good = stages == ("3" if name == "C" and T == 64 else "2")
                times[point(T, shape, name), 16, stages] = 10.0 if good else 14.0
    own = [
        dict(zip(tuning.SIZES, shape)) | {"tiles": [tile(16, 5).json(None)]} for shape in ((1, 1, 1, 1), shapes["A"])
    ]
    old = {"tiles": [], "shapes": own}
    data = tuning.file_of(table(times), 0.02, old)
    assert told(data["tiles"]) == [(None, 16, 2)]
    kept, special = data["shapes"]
    assert kept == old["shapes"][0]  # not tuned now; A's are not needed any more
    assert special["hidden"] == 256 and told(special["tiles"]) == [(4, 16, 2), (None, 16, 3)]
    configs.parse("file", data)
    keep = tuning.file_of(table(times), 0.02, {"tiles": [tile(16, 3).json(None)]}, keep_default=True)
    assert told(keep["tiles"]) == [(None, 16, 3)] and len(keep["shapes"]) == 3


def test_a_file_is_made_of_a_journal_without_a_gpu(tmp_path, monkeypatch, capsys):
    path, out = tmp_path / "j.jsonl", tmp_path / "sm_90.json"
    journal = Journal(path, {"gpu": "X"})
    for name, row in rows().items():
        shape = (row.hidden, row.intermediate, row.experts, row.topk)
        for T in (1, 4096):
            for gemm in GEMMS:
                for block_m in (16, 128):
                    us = 10.0 if (block_m == 16) == (T == 1) else 20.0
                    journal.finish(trial(T, gemm, block_m, shape=shape, row=name), Result("ok", us))
    command = ["tune_gpu.py", "--write", "--journal", str(path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    assert tune_gpu.main() == 0
    data = json.loads(out.read_text())
    assert [rule["block_m"] for rule in data["tiles"]] == [16, 128] and "shapes" not in data
    said = capsys.readouterr().out
    assert "2 default rules (new), 0 shapes" in said and "take 1.000 of the best" in said
    assert "results: 120 ok" in said

    short = tmp_path / "short.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    short.write_text("".join(line for line in lines if '"row": "GLM-5 TP4"' in line))
    monkeypatch.setattr(sys, "argv", [*command[:3], str(short), *command[4:]])
    out.write_text(tuning.dump({"tiles": [tile(16, 2).json(None)]}))
    assert tune_gpu.main() == 0
    data = json.loads(out.read_text())
    assert told(data["tiles"]) == [(None, 16, 2)] and data["shapes"][0]["hidden"] == 6144  # one row leaves them alone


# What is wrong


def test_what_a_right_output_may_differ_by():
    want = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    want[3] = 0  # a token without experts
    outs = [(want * (1 + 2e-3 * torch.randn(64, 512))).bfloat16()] * 3
    assert tune_gpu.what_is_wrong(outs, want) == ""
    other = outs[0].clone()
    other[5, 7] = torch.nextafter(other[5, 7], torch.tensor(9.0, dtype=torch.bfloat16))
    assert tune_gpu.what_is_wrong([outs[0], other], want) == "run 2 differs from the first in 1 of 32768 elements"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda out: out.__setitem__((5, 7), torch.nan), "by up to inf"),
        (lambda out: out.__setitem__((5, slice(0, 16)), 0), "by up to 1."),
        (lambda out: out.__setitem__((5, 7), out[5, 7] + 0.2), "by up to 9."),
        (lambda out: out.__setitem__((3, 0), 1e-3), "by up to 1.0e+27"),
        (lambda out: out[9].mul_(1.015), "by up to 1.5e-02"),
        (lambda out: out[9].add_(0.03), "by up to 3.0e-02"),
    ],
    ids=("nan", "a hole", "an element", "not zero", "scaled", "shifted"),
)
def test_what_is_seen(spoil, message):
    want = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    want[3] = 0
    out = want.bfloat16()
    spoil(out)
    said = tune_gpu.what_is_wrong([out, out], want)
    assert said.startswith("1 of 64 tokens are off, ") and message in said


def test_few_tokens_of_many_may_be_rounded_the_other_way():
    want = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0))

    def said(count, error):
        out = want.clone()
        out[:count] *= 1 + error
        return tune_gpu.what_is_wrong([out.bfloat16()] * 2, want)

    assert said(2, 0.05) == "" and said(3, 0.05).startswith("3 of 2000 tokens are off, by up to 5.")
    assert said(1, 0.2).startswith("1 of 2000 tokens are off, by up to 2.0e-01")


@pytest.mark.skipif(
    device.why_not("interpreter") is not None, reason=f"needs Triton's interpreter: {device.why_not('interpreter')}"
)
def test_measuring_looks_at_what_the_kernels_wrote():
    """In Triton's interpreter: a tile is right; a launch that is left out after the first run is seen, though what an
    earlier run had written was right."""
    code = f"""
import sys
sys.path.insert(0, {str(TOOLS)!r})
import torch
import tune_gpu
from bench import timing
from test_bench_gpu import PARTS
from torch_mxfp8moe.backends.triton import BACKEND, launch

timing.calls_of = lambda T: 2
timing.in_one_graph = lambda functions, repeat=9: (functions[0](), float(len(functions)))[1]
tune_gpu.RUNS = 2
torch.manual_seed(0)
weights = PARTS.weights("cpu")
original = type(PARTS).tokens
type(PARTS).tokens = lambda self, T, routing="uniform", device="cpu": original(self, T, routing, "cpu")
type(PARTS).call = lambda self, T, weights, **options: tune_gpu.torch_mxfp8moe.arguments.FusedMoe(
    **self.tokens(T), **weights, **self.options, **options
).check()
target = BACKEND.target(torch.device("cpu"))
tile = {{"block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 2}}
for activations, gemm in (("bf16", "gemm2"), ("mxfp8", "gemm1")):
    point = tune_gpu.Measured(PARTS, weights, 9, activations)
    print(point.measure(gemm, {{"block_m": 16}}, tile, target, 9e9))
print(point.measure("gemm1", {{"block_m": 16}}, tile, target, 1.0).status)

run, count = launch.Launch.run, [0]
def sometimes(self):
    count[0] += self.kernel.__name__ == "grouped_gemm_kernel" and self.arguments["GATE_UP"]
    if count[0] != 5 or not self.arguments.get("GATE_UP"):
        run(self)
launch.Launch.run = sometimes
print(point.measure("gemm1", {{"block_m": 16}}, tile, target, 9e9).note)
"""
    *right, slow, wrong = run_python(code, TRITON_INTERPRET="1").splitlines()
    assert right == ["Result(status='ok', us=2.0, note='')"] * 2 and slow == "slow"
    assert wrong.startswith("run 2 differs from the first in ")


# Compiling


class Crashing(Task):
    def launches(self):
        os._exit(3)


class Endless(Task):
    def launches(self):
        time.sleep(60)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A Triton cache of its own, here and in the processes that compile."""
    from triton import knobs

    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch, knobs.cache.scope():
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield folder


def test_compiling_in_processes(cache, monkeypatch):
    """What fails there says so and costs nobody else anything; what does not is found in the cache, also where the
    process to fork from was started before this one chose the cache."""
    from torch_mxfp8moe.backends.triton.launch import compile_offline

    with monkeypatch.context() as patch:
        patch.delenv("TRITON_CACHE_DIR")
        multiprocessing.forkserver.ensure_running()
    tile = key(tune_gpu.PARTNER)
    fields = dict(row="Qwen3-30B-A3B TP4", tokens=(4, 64), activations="mxfp8", arch="sm_90", gemm="gemm2")
    fields |= dict(rule=key({"block_m": 16}), gemm1=tile, gemm2=tile)
    good, crashing, endless = Task(**fields), Crashing(**fields), Endless(**fields)
    invalid = dataclasses.replace(good, gemm2=key(tune_gpu.PARTNER | {"block_n": 48}))
    done = dict(compile_all([invalid, crashing, good], jobs=1))
    assert done[good] == "" and done[crashing] == "the compiler ended with exit status 3"
    assert done[invalid].startswith("ValueError: candidate, gemm2: block_n is 48")
    assert dict(compile_all([endless], 1, seconds=1.0)) == {endless: "did not end in 1 s"}
    files = set(cache.rglob("*"))
    assert sum(path.suffix == ".cubin" for path in files) == 1  # one kernel for both token counts
    launches = good.launches()
    assert len(launches) == 2 and compile_offline(launches, Target("sm_90")) and set(cache.rglob("*")) == files


@pytest.mark.parametrize("gemm", GEMMS)
def test_which_launches_are_of_a_product(gemm):
    task = Task("Qwen3-30B-A3B TP4", (1,), "bf16", "sm_90", gemm, key({"block_m": 16}), key(GEMM), key(OTHER))
    (launch,) = task.launches()
    assert launch.options["num_stages"] == {"gemm1": 2, "gemm2": 3}[gemm]
    (other,) = dataclasses.replace(task, layout="aiter_gfx950", row="Qwen3-30B-A3B TP1").launches()
    numbers = lambda launch: {name: x for name, x in launch.arguments.items() if isinstance(x, (int, tuple, bool))}
    assert other.kernel is launch.kernel and numbers(other) != numbers(launch)


# What it is told


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--tokens", "0"], "--tokens takes numbers from 1 on, not 0"),
        (["--within", "0"], "--within is 0; it takes more than 0 and less than 100 percent"),
        (["--space", '{"gem": {}}'], "--space: a space has 'gem'; it takes rule, gemm, gemm1, gemm2"),
        (["--space", "{"], "argument --space: invalid"),
        (["--write"], "--write needs --out"),
        (["--write", "--out", "x", "--journal", "/nowhere/j"], "--write: there is no journal /nowhere/j"),
    ],
    ids=lambda one: "" if isinstance(one, list) else one[:20],
)
def test_what_it_refuses(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        tune_gpu.parse(argv)
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, str(TOOLS / "tune_gpu.py"), "--journal", str(tmp_path / "j.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / "j.jsonl").exists()
    assert done.stderr == "nothing to tune for: there is no GPU that PyTorch can use\n"
