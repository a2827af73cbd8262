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
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

import device
from helpers import PACKAGE, only_cpu, run_python
from shapes import Row, rows
from torch_mxfp8moe import configs

TOOLS = PACKAGE.parent / "tools"
if not TOOLS.exists():
    pytest.skip("needs the source tree", allow_module_level=True)
pytest.importorskip("triton", reason="needs Triton: pip install triton")
sys.path.insert(0, str(TOOLS))

import tune_gpu  # noqa: E402
from bench import timing, tuning  # noqa: E402
from bench.compiling import Task, compile_all  # noqa: E402
from bench.tuning import BASE, CALLS, GEMMS, Journal, PARTNERS, Point, Result, Search, Table, Tile, Trial, key  # noqa: E402

from torch_mxfp8moe.backends.triton.targets import Target  # noqa: E402

pytestmark = only_cpu

FILES = sorted((configs.FOLDER / "triton").glob("*.json"))
SHAPE = (64, 32, 4, 2)
GEMM = {"block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2}
OTHER = GEMM | {"num_stages": 3}


def point(T: int, shape=SHAPE, row: str = "A") -> Point:
    return Point(row, shape, T)


def trial(T: int = 1, part: str = "gemm1", block_m: int = 16, tile: dict = GEMM, **kwargs) -> Trial:
    return Trial(point(T, **kwargs), part, key({"block_m": block_m}), key({} if part == BASE else tile))


# Tiles as data


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_shipped_file_survives_reading_and_writing(path):
    """Byte for byte; and every rule is what its tiles say that it is."""
    text = path.read_text()
    assert tuning.dump(json.loads(text)) == text
    config = configs.parse(path.name, json.loads(text))
    assert tuning.json_of(config) == json.loads(text)
    for rule, tiles in zip(json.loads(text)["tiles"], config.tiles, strict=True):
        parts = [tuning.gemm_json(getattr(tiles, gemm)) for gemm in GEMMS]
        shared = tuning.normal({"block_m": rule["block_m"], "gather": tiles.gather, "kernels": tiles.kernels})
        assert parts == [rule[gemm] for gemm in GEMMS] and tuning.rule_json(tiles) == shared
        assert Tile.of_file(rule).json(rule["rows_per_expert"]) == rule
        assert dataclasses.replace(tuning.tiles_of(tuning.rule_json(tiles), *parts), rows_per_expert=None) == (
            dataclasses.replace(tiles, rows_per_expert=None)
        )


def test_a_file_with_shapes_survives():
    rule = {"rows_per_expert": None, "block_m": 16, "gemm1": GEMM, "gemm2": OTHER}
    shape = dict(zip(tuning.SIZES, SHAPE))
    shapes = [shape | {"tiles": [rule | {"rows_per_expert": 4}, rule]}, shape | {"topk": 3, "tiles": [rule]}]
    data = {"tiles": [rule], "shapes": shapes}
    text = tuning.dump(data)
    assert json.loads(text) == data == tuning.json_of(configs.parse("x", data))
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
    space = tuning.space_of("sm_90", {"gemm": {"gemm1": {"consumers": [1, 2]}, "rule": {"block_m": [64]}}})["gemm"]
    assert space["gemm1"]["consumers"] == (1, 2) and "consumers" not in space["gemm2"]
    assert space["rule"] == {"block_m": (64,)}
    search = Search(point(1), "gemm1", {"block_m": 64}, GEMM, space["gemm1"])
    assert GEMM | {"consumers": 2} in search.neighbours(GEMM) and GEMM in search.neighbours(GEMM | {"consumers": 2})


@pytest.mark.parametrize("arch", ("sm_90", "sm_100", "gfx942", "gfx950"))
def test_the_space_is_of_tiles_that_configs_take(arch):
    for kernels, space in tuning.space_of(arch).items():
        rules = tuning.rules_to_try(point(1), kernels, tuning.rules_of_space(kernels, space["rule"]), width=1e9)
        gathered = space["rule"]["block_m"] if "gather" in space["rule"] else ()
        assert tuple(rule["block_m"] for rule in rules if "gather" in rule) == gathered
        assert len(rules) == len(space["rule"]["block_m"]) + len(gathered)
        for rule, gemm in itertools.product(rules, GEMMS):
            partner = tuning.PARTNERS[kernels][gemm]
            assert tuning.normal(partner) == partner and tuning.fits(gemm, rule, partner)
            for values in itertools.product(*space[gemm].values()):
                tile = partner
                for name, value in zip(space[gemm], values):
                    tile = tuning.normal(tuning.changed(tile, name, value))
                if tuning.fits(gemm, rule, tile):
                    made = getattr(tuning.tiles_of(rule, **tuning.with_partner(gemm, rule, tile)), gemm)
                    assert tuning.gemm_json(made) == tile
                else:
                    assert kernels != "gemm"
    with pytest.raises(ValueError, match="a space has 'gem'; it takes gemm, "):
        tuning.space_of(arch, {"gem": {}})
    with pytest.raises(ValueError, match="the space of gemm has 'gem'; it takes rule, both, gemm1, gemm2"):
        tuning.space_of(arch, {"gemm": {"gem": {}}})


def test_a_tile_of_other_kernels_than_its_rule_is_not_taken():
    with pytest.raises(ValueError, match="its kernels are 'gemm', not 'hopper'"):
        tuning.tiles_of({"block_m": 64, "kernels": "hopper"}, GEMM, GEMM)


def test_rules_near_the_rows_of_an_expert():
    def rules(T, kernels="gemm", block_m=(16, 32, 64, 128)):
        choices = tuning.rules_of_space(kernels, {"block_m": block_m})
        return tuning.rules_to_try(point(T, (64, 32, 128, 4)), kernels, choices)

    near = lambda T: [rule["block_m"] for rule in rules(T)]
    assert [near(T) for T in (1, 640, 1024, 8192)] == [[16], [16, 32, 64], [16, 32, 64, 128], [64, 128]]
    assert near(1 << 20) == [128]
    assert rules(1 << 20, "hopper") == [{"block_m": 128, "kernels": "hopper"}]
    few = lambda T: rules(T, "matvec", (1,))
    assert few(32) == [{"block_m": 1, "kernels": "matvec"}] and few(33) == []
    assert tuning.rules_to_try(point(1), "hopper", []) == []


def test_tiles_without_room_are_not_tried():
    rule = {"block_m": 128, "kernels": "hopper"}
    known = tuning.PARTNERS["hopper"]["gemm1"]
    assert tuning.fits("gemm1", rule, known) and not tuning.fits("gemm1", rule, known | {"num_stages": 5})
    assert tuning.fits("gemm1", rule, known | {"num_stages": 8, "programs": 1})
    space = tuning.space_of("sm_90")["hopper"]["gemm1"]
    tried = Search(point(1), "gemm1", rule, known, space)
    tried.times[key(known)] = 1.0
    proposed = tried.propose()
    assert known | {"num_stages": 3} in proposed and known | {"programs": 3} not in proposed
    assert known | {"num_warps": 8, "block_n": 128} not in proposed  # together, and not two of its programs
    rule, tile = {"block_m": 1, "kernels": "matvec"}, {"block_n": 32, "block_k": 1024, "num_warps": 4, "num_stages": 1}
    assert tuning.fits("gemm2", rule, tile) and not tuning.fits("gemm1", rule, tile)
    assert tuning.fits("gemm1", rule, tile | {"num_warps": 8}) and tuning.fits(BASE, rule, {})


def test_turns_without_a_stage_for_each_are_not_tried():
    """The second product of a small intermediate size has one stage."""
    rule = {"block_m": 16, "kernels": "hopper"}
    turns = {"block_n": 64, "block_k": 256, "num_warps": 4, "num_stages": 8, "programs": 1, "turns": 2}
    seeds = [turns, turns | {"block_k": 128}]
    for intermediate, wanted in ((128, []), (256, seeds[1:]), (320, seeds)):
        search = Search(point(4, (2048, intermediate, 8, 2)), "gemm2", rule, {}, {})
        assert search.propose(seeds, descend=False) == wanted
    search = Search(point(4, (2048, 128, 8, 2)), "gemm1", rule, {}, {})
    assert search.propose([turns | {"block_n": 32}], descend=False)


@pytest.mark.parametrize(
    "block_m, warps, stages, programs, turns, fit",
    [(128, 4, 4, 2, 1, True), (16, 8, 4, 3, 1, False), (128, 8, 7, 1, 1, False), (32, 4, 8, 1, 2, True)],
)
def test_what_a_hopper_tile_holds_is_not_more_than_is_counted(block_m, warps, stages, programs, turns, fit):
    """Against what Triton says of both products."""
    from torch_mxfp8moe.backends.triton.launch import compile_offline

    rule = {"block_m": block_m, "kernels": "hopper"}
    for part, block_n in (("gemm1", 16 * warps), ("gemm2", 32 * warps)):
        tile = {"block_n": block_n, "block_k": 64, "num_warps": warps, "num_stages": stages, "programs": programs}
        tile |= {"turns": 2} if turns == 2 else {}
        gemms = {name: key(one) for name, one in tuning.with_partner(part, rule, tile).items()}
        task = Task(rows()["Qwen3-30B-A3B TP1"], (64,), "mxfp8", "sm_90", part, key(rule), **gemms)
        (kernel,) = compile_offline(task.launches(), Target("sm_90"))
        assert tuning.fits(part, rule, tile) == (programs * kernel.metadata.shared <= 227 << 10) == fit


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


@given(best=st.tuples(*(st.sampled_from(v) for v in tuning.space_of("sm_90")["gemm"]["gemm1"].values())))
def test_it_finds_a_minimum_that_fields_lead_to(best):
    space = tuning.space_of("sm_90")["gemm"]["gemm1"]

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
        trial(part=BASE): Result("ok", 7.0),
    }  # fmt: skip
    for one, result in results.items():
        journal.begin(one)
        journal.finish(one, result)
    assert Journal(path, stamp).results == journal.results == results
    assert Journal(path, None).stamp == stamp and Journal(path, None).results == results
    assert [result.usable for result in results.values()] == [12.5, None, None, 7.0]
    newer = Journal(path, stamp | {"source": "2"})
    assert newer.results == {} and newer.other == 8


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
    """In the place of a point on a GPU: calls whose time depends on fields alone, each product's beside the other's."""

    measured = []

    @staticmethod
    def us(T, rule, gemms):
        kernels = tuning.kernels_of(rule)
        us = 0.0 if kernels in ("mma", "matvec") else 5.0  # of launches that sort and combine
        for tile in gemms:
            us += 10.0 + abs(math.log2(tile["block_n"] / 128)) + tile["num_stages"] / 8 + rule["block_m"] / 64
            us += {"hopper": 2.0 if T == 16 else -2.0, "gemm": 0.0, "mma": -1.0, "matvec": -2.0}[kernels]
        return us

    def __init__(self, row, weights, T, activations, layout):
        self.T = T

    def measure(self, part, rule, tile, target, slow):
        self.measured.append((self.T, part, key(rule), key(tile)))
        if tile.get("num_stages") == 5:
            raise RuntimeError("out of resource")
        us = self.us(self.T, rule, tuning.with_partner(part, rule, tile).values())
        return Result("wrong", us, "planted") if tile.get("num_warps") == 8 else Result("ok", us)


@pytest.fixture
def file(tmp_path):
    """Shapes of a user's own: "Mine TP4", and one that is named as one of test/shapes.csv and is not that."""
    path = tmp_path / "mine.csv"
    lines = "Mine,1024,1024,32,4,TP4", "GLM-5,1024,1024,32,4,TP4"
    path.write_text("\n".join(("model,hidden,intermediate,experts,topk,parallel", *lines)))
    return path


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    """``tuner(until)``: a tuner on a pretended sm_90, and its journal, both new, on the same file."""
    row = dataclasses.replace(rows()["Qwen3-30B-A3B TP1"], name="small")
    weights = type(row).weights
    monkeypatch.setattr(
        type(row), "weights", lambda self, device="cuda": weights(self, device) if device == "meta" else {}
    )
    monkeypatch.setattr(tune_gpu, "Measured", Fake)
    gemms = [{"gemm1": one, "gemm2": one} for one in (GEMM | {"block_k": 256}, PARTNERS["matvec"]["gemm1"])]
    rules = [
        {"rows_per_expert": 0.25, "block_m": 1} | gemms[1],
        {"rows_per_expert": 8, "block_m": 16} | gemms[0],
        {"rows_per_expert": None, "block_m": 64} | PARTNERS["hopper"],
        {"rows_per_expert": None, "block_m": 32} | gemms[0],
    ]
    config = configs.parse("configured", {"tiles": rules})
    monkeypatch.setattr(configs, "load", lambda *_: config)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    compiled = []

    def compile_all(tasks, jobs):
        for task in tasks:
            compiled.append(task)
            yield task, "no registers" if '"descriptors"' in task.gemm1 + task.gemm2 else ""

    monkeypatch.setattr(tune_gpu, "compile_all", compile_all)
    Fake.measured.clear()

    def build(*argv: str):
        args = tune_gpu.parse(["--journal", str(tmp_path / "j.jsonl"), "--tokens", "16", "64", *argv])
        journal = Journal(args.journal, {"gpu": "X"})
        one = tune_gpu.Tuner(args, journal, Target("sm_90"), time.time() + 100)
        return one, row, one.searches(row), compiled

    return build


@pytest.mark.parametrize(
    "arch, sizes, options, kernels",
    [
        ("sm_90", {}, (), ["gemm", "hopper", "mma", "matvec"]),
        ("sm_90", {"hidden": 2080}, (), ["gemm", "mma", "matvec"]),
        ("sm_90", {}, ("--layout", "aiter_gfx950"), ["gemm"]),
        ("sm_100", {}, (), ["gemm", "matvec"]),
        ("gfx950", {}, ("--activations", "bf16"), ["gemm", "matvec"]),
    ],
)
def test_which_kernels_are_tuned(tmp_path, arch, sizes, options, kernels):
    args = tune_gpu.parse(["--journal", str(tmp_path / "j"), "--tokens", "4", "4096", *options])
    one, row = tune_gpu.Tuner(args, None, Target(arch), 0), dataclasses.replace(rows()["Qwen3-30B-A3B TP1"], **sizes)
    searches = one.searches(row)
    assert one.admitted(row) == kernels
    of = lambda T: {tuning.kernels_of(search.rule) for search in searches if search.point.T == T}
    assert of(4) == set(kernels) and of(4096) == set(kernels) - {"mma", "matvec"}
    for search in searches:
        assert tuning.fits(search.part, search.rule, search.start)
        tuning.tiles_of(search.rule, **tuning.with_partner(search.part, search.rule, search.start))


def test_candidates_are_tried_and_nothing_else(tuner, tmp_path):
    """Each product by itself, under each rule near the rows of a point; what is configured as well."""
    near, far = {"block_m": 16, "gemm1": GEMM, "gemm2": GEMM}, {"block_m": 128, "gemm1": GEMM, "gemm2": GEMM}
    other = near | {"gemm1": GEMM | {"num_warps": 8}, "rows_per_expert": 3}
    (tmp_path / "list.json").write_text(json.dumps([near, other, far]))
    one, row, searches, _ = tuner("--candidates", str(tmp_path / "list.json"))
    one.tune(row, searches, [], time.time() + 100, descend=False)
    for search in searches:
        tried = {key(tile) for tile in one.listed(search.rule, search.part)}
        assert set(search.times) == {key(search.start)} | tried
        assert len(tried) == (2 if search.part == "gemm1" else search.part == "gemm2") or search.rule["block_m"] != 16
    assert {search.rule["block_m"] for search in searches if tuning.kernels_of(search.rule) == "gemm"} >= {16}
    shipped = tune_gpu.read_rules(str(TOOLS / "bench" / "candidates" / "sm_90.json"))
    assert set(tuning.candidates_of(shipped)) == set(tuning.CALLS[0])


@pytest.mark.parametrize(
    "text, said",
    [("{", "Expecting"), ('[{"block_m": 16}]', "candidate 0: has the keys"), ("[1]", "not a mapping"), ("1", "int")],
)
def test_wrong_candidates(tmp_path, capsys, text, said):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(SystemExit):
        tune_gpu.parse(["--candidates", str(tmp_path / "list.json")])
    assert said in capsys.readouterr().err


def test_a_search_begins_at_what_is_configured(tmp_path):
    """And of each point the configured rule's are the first: the base, then both products."""
    args = tune_gpu.parse(["--journal", str(tmp_path / "j"), "--tokens", "1", "256", "512"])
    one = tune_gpu.Tuner(args, None, Target("sm_90"), 0)
    searches = one.searches(rows()["MiniMax-M3 TP4"])
    for T in args.tokens:
        tiles = configs.choose(
            "sm_90", "mxfp8", tokens=T, hidden=6144, intermediate=768, experts=128, topk=4, admits=lambda tiles: True
        )
        base, first, second = [search for search in searches if search.point.T == T][:3]
        assert base.rule == first.rule == second.rule == tuning.rule_json(tiles)
        assert (base.part, base.start, first.part, second.part) == (BASE, {}, *GEMMS)
        assert (first.start, second.start) == (tuning.gemm_json(tiles.gemm1), tuning.gemm_json(tiles.gemm2))


def test_a_row_is_tuned_and_a_second_run_measures_nothing(tuner, capsys):
    one, row, searches, compiled = tuner()
    one.tune(row, searches, [], time.time() + 100)
    assert {tuning.kernels_of(search.rule) for search in searches} == {"gemm", "hopper", "mma", "matvec"}
    for search in searches:
        best, us = search.best
        kernels = tuning.kernels_of(search.rule)
        gemms = tuning.with_partner(search.part, search.rule, best)
        assert us == Fake.us(search.point.T, search.rule, gemms.values())
        if search.part == BASE:
            assert best == {} and gemms == PARTNERS[kernels]
        elif kernels == "gemm":
            assert best == {"block_n": 128, "block_k": best["block_k"], "num_warps": 4, "num_stages": 2}
        elif kernels == "matvec":
            assert search.point.T == 16 and best["block_n"] >= 32 and best["num_stages"] == 1
        elif kernels == "mma":
            assert search.point.T == 16 and best["block_n"] == {"gemm1": 8, "gemm2": 16}[search.part]
            tried = {tile["num_warps"] for tile in map(json.loads, search.times)}
            assert tried == {1, 2, 4, 8, 16} and {"maxnreg" in name for name in search.times} == {False, True}
        else:
            wide = {"gemm1": 64, "gemm2": 128}[search.part]
            assert (best["block_n"], best["num_stages"], best["num_warps"]) == (wide, 2, 4)
    parts = {}
    for search in searches:
        parts.setdefault((search.point, key(search.rule)), []).append(search.part)
    assert all(own == list(tuning.PARTS) for own in parts.values())  # of all kernels
    found = Table(one.journal.results)
    for at in found.times:
        for best in found.best(at, 9.0):  # of each rule; a call with both products' best tiles was not measured itself
            rule, *gemms = map(json.loads, (best.rule, best.gemm1, best.gemm2))
            assert found.us(at, best) == Fake.us(at.T, rule, gemms)
    assert len(set(Fake.measured)) == len(Fake.measured) > 50
    said = capsys.readouterr().out
    assert "wrong: small T=16 gemm1" in said and ": planted" in said
    statuses = {result.status for result in one.journal.results.values()}
    assert statuses == {"ok", "wrong", "failed"}
    for task in compiled:  # one for all token counts that want it
        assert set(task.tokens) <= {16, 64} and task.arch == "sm_90"
    assert any(task.tokens == (16, 64) for task in compiled)
    assert len({(task.part, task.rule, task.gemm1, task.gemm2, task.tokens) for task in compiled}) == len(compiled)

    bests, counts = [search.best for search in searches], (len(Fake.measured), len(compiled))
    one, row, searches, compiled = tuner()
    one.tune(row, searches, [], time.time() + 100)
    assert [search.best for search in searches] == bests and (len(Fake.measured), len(compiled)) == counts


def test_a_run_that_was_cut_off_goes_on(tuner, tmp_path):
    one, row, searches, _ = tuner()
    one.tune(row, searches, [], time.time() + 100)
    whole = set(Fake.measured)
    lines = (tmp_path / "j.jsonl").read_text().splitlines(keepends=True)
    left = lines[: len(lines) // 2]
    left = left[:-1] if '"begun"' in left[-1] else left  # which would count as crashed
    (tmp_path / "j.jsonl").write_text("".join(left))
    Fake.measured.clear()
    one, row, searches, _ = tuner()
    before = {t for t, r in one.journal.results.items() if r.status != "failed" or "RuntimeError" in r.note}
    one.tune(row, searches, [], time.time() + 100)
    known = {(t.point.T, t.part, t.rule, t.tile) for t in before}
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
    tried = [(search.point.T, search.part, key(search.rule)) for search in searches if search.times]
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
    count = Fake.measured.count((bad.point.T, bad.part, bad.rule, bad.tile))
    one, row, searches, _ = tuner()
    one.tune(row, searches, [], time.time() + 100)
    assert count == Fake.measured.count((bad.point.T, bad.part, bad.rule, bad.tile)) == 1


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
args = SimpleNamespace(space=None, candidates=None)
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
        assert f"{name}: all launches, us" in said
    config = configs.parse("file", json.loads(out.read_text()))
    assert config.shapes == {}
    assert_expected_inline(
        listed(json.loads(out.read_text())["tiles"]),
        """\
1: matvec 1, 64 x 128 2 1 0, 64 x 128 1 1 0
None: hopper 16, 64 x 128 4 2 1, 128 x 128 4 2 1
None: gemm 16, 128 x 256 4 2 0, 128 x 256 4 2 0""",
    )
    assert "calls take 1.0" in said and "was not measured" not in said
    Fake.measured.clear()
    assert tune_gpu.work(one.args) == 0 and not Fake.measured
    assert configs.parse("file", json.loads(out.read_text())) == config


def test_a_whole_run_of_rows_of_a_file(tuner, file, monkeypatch, tmp_path, capsys):
    """Into the package's file for this GPU, which is not there yet: with the rules by which such calls were served."""
    from torch_mxfp8moe.backends import triton as backend

    served = tuning.json_of(configs.load("sm_90", "bf16"))
    (tmp_path / "triton").mkdir()
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "X")
    monkeypatch.setattr(backend.BACKEND, "target", lambda device: Target("sm_90"))
    monkeypatch.setenv(tune_gpu.UNTIL, str(time.time() + 100))
    options = ["--tokens", "16", "64", "--activations", "bf16", "--journal", str(tmp_path / "j.jsonl")]
    monkeypatch.setattr(sys, "argv", ["tune_gpu.py", "--shapes", str(file), "--rows", "Mine TP4", *options])
    assert tune_gpu.main() == 0
    said = capsys.readouterr().out
    assert "Mine TP4: all launches, us" in said and "default rules (kept), 1 shapes of their own" in said
    written = json.loads((tmp_path / "triton" / "sm_90-bf16.json").read_text())
    assert written["tiles"] == served["tiles"]
    assert [one[name] for one in written["shapes"] for name in tuning.SIZES] == [1024, 256, 32, 4]
    points = {trial.point.layer for trial in Journal(tmp_path / "j.jsonl", None).results}
    assert points == {("Mine TP4", (1024, 256, 32, 4))}


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
    """From the microseconds of calls with one tile for both products, by point, block_m and a name; the name is the
    tile's num_stages. A base takes block_m microseconds; each product's tile makes half of the difference."""
    results = {}
    for (at, block_m, stages), us in times.items():
        rule = key({"block_m": block_m})
        for gemm in GEMMS:
            results[Trial(at, gemm, rule, key(GEMM | {"num_stages": int(stages)}))] = Result("ok", (block_m + us) / 2)
        results[Trial(at, BASE, rule, key({}))] = Result("ok", float(block_m))
    return Table(results, CALLS[-1])


def tile(block_m: int, stages: int) -> Tile:
    gemm = GEMM | {"num_stages": stages}
    return Tile.of({"block_m": block_m}, gemm, gemm)


def listed(rules: list[dict]) -> str:
    """A line for each rule: limit, kernels, block_m, and both products' block_n by block_k, warps, stages, programs."""
    lines = []
    for rule in rules:
        tiles = configs.rule("", rule)
        gemms = ", ".join(
            f"{gemm.block_n} x {gemm.block_k} {gemm.num_warps} {gemm.num_stages} {gemm.programs}"
            for gemm in (tiles.gemm1, tiles.gemm2)
        )
        lines.append(f"{tiles.rows_per_expert}: {tiles.kernels} {tiles.block_m}, {gemms}")
    return "\n".join(lines)


def told(rules: list[dict]) -> list[tuple]:
    return [(rule["rows_per_expert"], rule["block_m"], rule["gemm1"]["num_stages"]) for rule in rules]


def test_the_time_of_a_tile():
    a = point(1)
    one = table({(a, 16, "2"): 10.0, (a, 16, "3"): 10.1, (a, 32, "2"): 10.15, (a, 32, "4"): 15.0})
    assert one.best(a) == [tile(16, 2)] and one.best(a, 0.02) == [tile(16, 2), tile(32, 2)]
    assert one.over_best(a, tile(16, 3)) == pytest.approx(1.01) and one.over_best(a, tile(16, 4)) is None
    wrong = Table(
        {trial(): Result("wrong", 1.0), trial(part="gemm2"): Result("ok", 1.0), trial(part=BASE): Result("ok", 1.0)}
    )
    assert wrong.best(point(1)) == []


def test_the_time_of_a_tile_is_the_bases_and_what_products_change_of_it():
    a, rule = point(1), key({"block_m": 16})
    measured = {
        (BASE, key({})): 30.0, ("gemm1", key(GEMM)): 31.0, ("gemm1", key(OTHER)): 26.0,
        ("gemm2", key(GEMM)): 28.0, ("gemm2", key(OTHER)): 33.0,
    }  # fmt: skip

    def of(times):
        return Table({Trial(a, part, rule, name): Result("ok", us) for (part, name), us in times.items()})

    one, tiles = of(measured), [Tile.of({"block_m": 16}, *both) for both in itertools.product((GEMM, OTHER), repeat=2)]
    assert [one.us(a, tile) for tile in tiles] == [29.0, 34.0, 24.0, 29.0]
    assert one.best(a) == [tiles[2]] and one.least == {a: 24.0}
    for missing in ((BASE, key({})), ("gemm1", key(OTHER)), ("gemm2", key(GEMM))):
        assert of({trial: us for trial, us in measured.items() if trial != missing}).us(a, tiles[2]) is None
    for base, us in ((53.0, 1.0), (54.0, None), (55.0, None)):  # 26 and 28, of calls that differ from it in one product
        one = of(measured | {(BASE, key({})): base})
        assert one.us(a, tiles[2]) == us and one.best(a) == ([] if us is None else [tiles[2]])
        assert one.least == ({} if us is None else {a: us}) and (one.over_best(a, tiles[2]) is None) == (us is None)
        assert one.us(a, tiles[1]) == 64.0 - base  # whatever other tiles' times say


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
    assert len(soft(math.log(1.3) * 1.1)) == 1 and len(soft(math.log(1.3) * 0.9)) == 2  # 1.3 times the best


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
    data = tuning.file_of([table(times)], 0.02, old)
    assert told(data["tiles"]) == [(None, 16, 2)]
    kept, special = data["shapes"]
    assert kept == old["shapes"][0]  # not tuned now; A's are not needed any more
    assert special["hidden"] == 256 and told(special["tiles"]) == [(4, 16, 2), (36, 16, 3)]
    configs.parse("file", data)
    keep = tuning.file_of([table(times)], 0.02, {"tiles": [tile(16, 3).json(None)]}, keep_default=True)
    assert told(keep["tiles"]) == [(None, 16, 3)] and len(keep["shapes"]) == 3


def test_a_file_is_made_of_a_journal_without_a_gpu(tmp_path, monkeypatch, capsys):
    path, out = tmp_path / "j.jsonl", tmp_path / "sm_90.json"
    journal = Journal(path, {"gpu": "X"})
    for name, row in rows().items():
        shape = (row.hidden, row.intermediate, row.experts, row.topk)
        for T in (1, 4096):
            for part in tuning.PARTS:
                for block_m in (16, 128):
                    us = 10.0 if (block_m == 16) == (T == 1) else 20.0
                    journal.finish(trial(T, part, block_m, shape=shape, row=name), Result("ok", us))
    command = ["tune_gpu.py", "--write", "--journal", str(path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    out.write_bytes((configs.FOLDER / "triton" / "sm_90.json").read_bytes())
    assert tune_gpu.main() == 0
    data = json.loads(out.read_text())
    assert [rule["block_m"] for rule in data["tiles"]] == [16, 128] and "shapes" not in data
    said = capsys.readouterr().out
    assert "2 default rules (new), 0 shapes" in said and "calls take 1.000 of the best" in said
    assert "results: 180 ok" in said and "rules of hopper, matvec, mma were there and are gone" in said

    short = tmp_path / "short.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    short.write_text("".join(line for line in lines if '"row": "GLM-5 TP4"' in line))
    monkeypatch.setattr(sys, "argv", [*command[:3], str(short), *command[4:]])
    out.write_text(tuning.dump({"tiles": [tile(16, 2).json(None)]}))
    assert tune_gpu.main() == 0
    assert "are gone" not in capsys.readouterr().out
    data = json.loads(out.read_text())
    assert told(data["tiles"]) == [(None, 16, 2)] and data["shapes"][0]["hidden"] == 6144  # one row leaves them alone


@pytest.mark.parametrize("default, kept", [((), True), (("--default", "replace"), False)])
def test_rows_of_a_file_leave_the_rules_of_others(tmp_path, monkeypatch, default, kept):
    """Also where the journal has rows of all the names of test/shapes.csv, in other sizes. Replaced if that is said."""
    path, out = tmp_path / "j.jsonl", tmp_path / "sm_90.json"
    journal = Journal(path, {"gpu": "X"})
    for name, part, T in itertools.product(rows(), tuning.PARTS, (1, 64)):
        journal.finish(trial(T, part, shape=(1024, 256, 32, 4), row=name), Result("ok", 10.0))
    old = json.loads((configs.FOLDER / "triton" / "sm_90.json").read_text())
    other = dict(zip(tuning.SIZES, (96, 32, 4, 2))) | {"tiles": [tile(16, 4).json(None)]}
    old["shapes"] = [other, *old.get("shapes", [])]
    out.write_text(tuning.dump(old))
    monkeypatch.setattr(sys, "argv", ["tune_gpu.py", "--write", "--journal", str(path), "--out", str(out), *default])
    assert tune_gpu.main() == 0
    data = json.loads(out.read_text())
    assert data["shapes"][: len(old["shapes"])] == old["shapes"] and (data["tiles"] == old["tiles"]) == kept
    mine = [shape for shape in data["shapes"] if shape["hidden"] == 1024]
    assert [told(shape["tiles"]) for shape in mine] == ([[(9, 16, 2)]] if kept else [])


PLAIN, WIDER = tile(16, 2), tile(64, 3)
SPECIAL = [Tile.of({"block_m": m, "kernels": "hopper"}, *PARTNERS["hopper"].values()) for m in (32, 64)]
BY_ROUTE = [
    Tile.of({"block_m": 1, "kernels": "matvec"}, *(one | {"block_k": k} for one in PARTNERS["matvec"].values()))
    for k in (256, 512)
]


def expected(chains: list[list[dict]], rows: float, kernels: tuple[str, ...]) -> Tile:
    """The tile of the first chain whose tile there takes the calls."""
    for chain in chains:
        for rule in chain:
            limit = math.inf if rule["rows_per_expert"] is None else rule["rows_per_expert"]
            if rows <= (min(limit, tuning.MATVEC_ROWS) if rule["block_m"] == 1 else limit):
                if Tile.of_file(rule).kernels in kernels:
                    return Tile.of_file(rule)
                break
    raise AssertionError("the last chain has a tile for all")


def served(rules: list[dict], rows: float, kernels: tuple[str, ...]) -> Tile:
    """As ``configs.choose`` does."""
    for tiles, rule in ((configs.rule("rule", rule), rule) for rule in rules):
        if (tiles.rows_per_expert is None or rows <= tiles.rows_per_expert) and tiles.kernels in kernels:
            return Tile.of_file(rule)
    raise AssertionError("the last rule has no limit")


@given(st.data())
def test_each_call_has_the_tile_of_its_chain(data):
    def chain(tiles):
        own = data.draw(st.lists(st.sampled_from(tiles), min_size=1, max_size=4))
        limits = st.sets(st.sampled_from((0.25, 0.5, 1, 2, 8, 50)), min_size=len(own) - 1, max_size=len(own) - 1)
        return [one.json(limit) for one, limit in zip(own, [*sorted(data.draw(limits)), None])]

    gemms = [PLAIN, WIDER]
    chains = [chain(gemms + BY_ROUTE + SPECIAL), chain(gemms + BY_ROUTE), chain(gemms)][data.draw(st.integers(0, 2)) :]
    rules = tuning.merged(chains)
    for many, kernels in itertools.product((0.1, 0.25, 0.3, 0.75, 1, 1.5, 5, 30, 1e9), CALLS):
        assert served(rules, many, kernels) == expected(chains, many, kernels)


def test_no_more_rules_than_calls_need():
    """A list as one would write it by hand, from what calls of each kind are served by."""
    gemms = [tile(m, 2) for m in (16, 32, 64, 128)]
    rules = [one.json(limit) for limit, one in (
        (0.0625, BY_ROUTE[0]), (0.25, BY_ROUTE[1]), (12, gemms[0]), (24, gemms[1]),
        (48, SPECIAL[0]), (None, SPECIAL[1]), (96, gemms[2]), (None, gemms[3]),
    )]  # fmt: skip
    assert tuning.merged([rules[:6], rules[:4] + rules[6:], rules[2:4] + rules[6:]]) == rules


def test_calls_that_pass_over_a_rule_have_the_best_one_below():
    """A's calls are taken by all kernels, B's not by "hopper"; both are by route for few rows."""
    results = {}
    times = {  # by T, 2 T / 4 rows per expert, of each tile
        1: {PLAIN: 12.0, SPECIAL[0]: 14.0, BY_ROUTE[0]: 9.0},
        16: {PLAIN: 30.0, WIDER: 40.0, SPECIAL[0]: 20.0},
        64: {PLAIN: 90.0, WIDER: 70.0, SPECIAL[0]: 60.0, SPECIAL[1]: 40.0},
        256: {PLAIN: 300.0, WIDER: 200.0, SPECIAL[1]: 150.0},
    }
    for T, (row, shape) in itertools.product(times, (("A", SHAPE), ("B", (128, 32, 4, 2)))):
        for one, us in times[T].items():
            if row == "A" or one.kernels != "hopper":
                for part, name in one.parts.items():
                    results[Trial(point(T, shape, row), part, one.rule, name)] = Result("ok", us)
    tables = tuning.tables_of(results)
    assert [(table.kernels, {p.row for p in table.times}) for table in tables] == list(
        zip(CALLS, ({"A"}, {"A", "B"}, {"A", "B"}))
    )
    data = tuning.file_of(tables, 0.02)
    assert "shapes" not in data
    assert_expected_inline(
        listed(data["tiles"]),
        """\
1: matvec 1, 16 x 256 4 1 0, 16 x 256 4 1 0
20: hopper 32, 64 x 64 4 4 2, 128 x 64 4 4 2
20: gemm 16, 64 x 64 4 2 0, 64 x 64 4 2 0
None: hopper 64, 64 x 64 4 4 2, 128 x 64 4 4 2
None: gemm 64, 64 x 64 4 3 0, 64 x 64 4 3 0""",
    )


def test_rows_of_one_name_and_other_sizes_are_not_one():
    """A row that was corrected in its file after it had been tuned: "hopper" takes the calls of its new sizes alone."""
    results, new = {}, (128, 64, 4, 2)
    for shape, one in ((SHAPE, PLAIN), (new, PLAIN), (new, SPECIAL[0])):
        for part, name in one.parts.items():
            results[Trial(point(1, shape), part, one.rule, name)] = Result("ok", 1.0)
    found = {table.kernels: {at.shape for at in table.times} for table in tuning.tables_of(results)}
    assert found == {CALLS[0]: {new}, CALLS[-1]: {SHAPE, new}}


def test_the_base_counts_for_all_kernels():
    """It may tell which are the fastest, and without it nothing is known of them."""
    a, results = point(1), {}
    for one, us, base in ((PLAIN, 20.0, 10.0), (BY_ROUTE[0], 21.0, 20.0)):
        for part, name in one.parts.items():
            results[Trial(a, part, one.rule, name)] = Result("ok", base if part == BASE else us)
    table = Table(results)
    assert (table.us(a, PLAIN), table.us(a, BY_ROUTE[0])) == (30.0, 22.0) and table.best(a, 0.4) == [BY_ROUTE[0], PLAIN]
    without = lambda one: {t: r for t, r in results.items() if t != Trial(a, BASE, one.rule, key({}))}
    for one, other in ((PLAIN, BY_ROUTE[0]), (BY_ROUTE[0], PLAIN)):
        assert Table(without(one)).us(a, one) is None and Table(without(one)).best(a, 0.4) == [other]
    assert tuning.tables_of(without(PLAIN)) == []  # a file of it would not serve every call
    assert [table.least for table in tuning.tables_of(without(BY_ROUTE[0]))] == [{a: 30.0}] * 2


@given(st.data())
def test_any_journal_gives_a_file_that_serves_every_call(data):
    """Whatever came of the trials, also if their times contradict each other, in whatever state it was left."""
    outcomes = st.sampled_from([Result("ok", us) for us in (10.0, 10.1, 13.0, 40.0)] * 2 + [Result("wrong", 1.0), None])
    results = {}
    for T, (row, shape) in itertools.product((1, 2, 16, 256), (("A", SHAPE), ("B", (128, 32, 4, 2)))):
        for one in (PLAIN, WIDER, *SPECIAL, *BY_ROUTE):
            admitted = one.kernels != "hopper" or row == "A"
            if admitted and (one.kernels != "matvec" or point(T).rows <= tuning.MATVEC_ROWS):
                for part, name in one.parts.items():
                    if (result := data.draw(outcomes)) is not None:
                        results[Trial(point(T, shape, row), part, one.rule, name)] = result
    tables = tuning.tables_of(results)
    if not tables:
        gemm = {t: r for t, r in results.items() if t.kernels == "gemm"}
        assert not Table(gemm).least
        return
    old = {"tiles": [WIDER.json(None)]}
    written = tuning.file_of(tables, 0.02, old, keep_default=data.draw(st.booleans()))
    config = configs.parse("file", json.loads(tuning.dump(written)))
    for rules in (config.tiles, *config.shapes.values()):
        assert all(tiles.rows_per_expert <= tuning.MATVEC_ROWS for tiles in rules if tiles.kernels == "matvec")
    for table in tables:
        for at in table.times:
            rules = tuning.rules_of(written, at.shape)
            one = served(rules, at.rows, table.kernels)
            assert one == tuning.chosen(rules, at, table.kernels)
            assert one.kernels in table.kernels and (one.kernels != "hopper" or at.row == "A")


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

    assert said(8, 0.05) == "" and said(9, 0.05).startswith("9 of 2000 tokens are off, by up to 5.")
    assert said(1, 0.2).startswith("1 of 2000 tokens are off, by up to 2.0e-01")


def test_no_call_finds_its_weights_in_a_cache():
    """What a graph's calls read of weights is more than a cache holds, with every row, unless they are too many."""
    for row in rows().values():
        copies, weights = tune_gpu.copies_of(row), sum(row.weights("meta")[name].nbytes for name in ("w1", "w2"))
        assert (copies - 1) * weights < timing.FLUSH_BYTES <= copies * weights
        for T in (1, 8, 64, 8192):
            calls = tune_gpu.calls_of(row, T)
            assert calls >= timing.calls_of(T)
            if T >= 64:
                assert calls >= copies
            if calls < tune_gpu.MOST_CALLS:
                experts = row.local * (1 - (1 - row.topk / row.experts) ** T)
                assert calls * experts * 3 * row.hidden * row.intermediate >= timing.FLUSH_BYTES
    small, large = rows()["Qwen3-30B-A3B TP4"], rows()["MiniMax-M3 TP4"]
    least = dataclasses.replace(small, intermediate=96)  # a call of one token reads 1 / 16 of 72 MiB
    assert [tune_gpu.copies_of(row) for row in (least, small, large)] == [8, 4, 1]
    assert [tune_gpu.calls_of(least, T) for T in (1, 8, 64, 1024)] == [64, 18, 16, 8]
    assert [tune_gpu.calls_of(small, T) for T in (1, 8, 64, 1024, 8192)] == [57, 16, 16, 4, 4]
    assert [tune_gpu.calls_of(large, T) for T in (1, 8, 64, 1024, 8192)] == [16, 16, 16, 4, 2]


def test_copies_of_weights_take_turns(monkeypatch):
    monkeypatch.setattr(tune_gpu, "calls_of", lambda row, T: 5)
    monkeypatch.setattr(tune_gpu.torch_mxfp8moe.reference, "fused_moe", lambda **_: None)
    row, tokens = rows()["Qwen3-30B-A3B TP4"].smaller(experts=8), Row.tokens
    monkeypatch.setattr(Row, "tokens", lambda self, T, routing, device: tokens(self, T, routing, "meta"))
    weights = [row.weights("meta") for _ in range(2)]
    calls = tune_gpu.Measured(row, weights, 3, "mxfp8").calls
    assert [call.w2 is weights[i % 2]["w2"] for i, call in enumerate(calls)] == [True] * 5


@pytest.mark.skipif(
    device.why_not("interpreter") is not None, reason=f"needs Triton's interpreter: {device.why_not('interpreter')}"
)
def test_measuring_looks_at_what_the_kernels_wrote():
    """In Triton's interpreter: a tile is right; a launch that is left out after the first run is seen, though what an
    earlier run had written was right. What is timed is whole calls, here as 1 us a launch and call."""
    code = f"""
import sys
sys.path.insert(0, {str(TOOLS)!r})
import torch
import tune_gpu
from bench import timing
from test_bench_gpu import PARTS
from torch_mxfp8moe.backends.triton import BACKEND, launch

tune_gpu.calls_of = lambda row, T: 2
one_launch, launches = launch.Launch.run, []
launch.Launch.run = lambda self: (launches.append(self.kernel), one_launch(self))
def in_one_graph(functions, repeat=9):
    launches.clear()
    functions[0]()
    return float(len(functions) * len(launches))
timing.in_one_graph = in_one_graph
tune_gpu.RUNS = 2
torch.manual_seed(0)
weights = [PARTS.weights("cpu")]
original = type(PARTS).tokens
type(PARTS).tokens = lambda self, T, routing="uniform", device="cpu": original(self, T, routing, "cpu")
type(PARTS).call = lambda self, T, weights, **options: tune_gpu.torch_mxfp8moe.arguments.FusedMoe(
    **self.tokens(T), **weights, **self.options, **options
).check()
target = BACKEND.target(torch.device("cpu"))
tile = {{"block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 2}}
for activations, part in (("bf16", "gemm2"), ("bf16", "base"), ("mxfp8", "gemm1")):
    point = tune_gpu.Measured(PARTS, weights, 9, activations)
    print(point.measure(part, {{"block_m": 16}}, tile, target, 9e9))
by_route = {{"block_n": 8, "block_k": 128, "num_warps": 1, "num_stages": 1}}
print(point.measure("gemm1", {{"block_m": 1, "kernels": "matvec"}}, by_route, target, 9e9))
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
    by_expert, by_route = (f"Result(status='ok', us={2.0 * launches}, note='')" for launches in (4, 2))
    assert right == [by_expert] * 3 + [by_route] and slow == "slow"
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
    """What fails there says so and costs nobody else anything; what does not is in the cache, also where the process
    to fork from was started before this one chose the cache."""
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_CACHE_DIR")
        multiprocessing.forkserver.ensure_running()
    tile = key(GEMM)
    fields = dict(row=rows()["Qwen3-30B-A3B TP4"], tokens=(4, 64), activations="mxfp8", arch="sm_90", part="gemm2")
    fields |= dict(rule=key({"block_m": 16}), gemm1=tile, gemm2=tile)
    good, crashing, endless = Task(**fields), Crashing(**fields), Endless(**fields)
    invalid = dataclasses.replace(good, gemm2=key(GEMM | {"block_n": 48}))
    done = dict(compile_all([invalid, crashing, good], jobs=1))
    assert done[good] == "" and done[crashing] == "the compiler ended with exit status 3"
    assert done[invalid].startswith("ValueError: candidate, gemm2: block_n is 48")
    assert dict(compile_all([endless], 1, seconds=1.0)) == {endless: "did not end in 1 s"}
    files = set(cache.rglob("*"))
    assert sum(path.suffix == ".cubin" for path in files) == 1  # one kernel for both token counts
    assert len(good.launches()) == 2


def test_a_row_of_a_file_is_compiled(cache, file):
    """In a process that has not read the file, which is gone by then."""
    args = tune_gpu.parse(["--shapes", str(file), "--tokens", "64"])
    file.unlink()
    assert list(args.rows) == ["Mine TP4", "GLM-5 TP4"]
    row, one = args.rows["Mine TP4"], tune_gpu.Tuner(args, None, Target("sm_90"), 0)
    tasks = [one.task(row, [(search, search.start)]) for search in one.searches(row)[:2]]
    assert [task.part for task in tasks] == [BASE, "gemm1"]
    assert dict(compile_all(tasks, jobs=2)) == dict.fromkeys(tasks, "")
    base, (launch,) = (task.launches() for task in tasks)
    assert launch.arguments["w_scale"].shape == (32, 512, 1024 // 32)
    scales = [each.arguments["w_scale"].shape for each in base if "w_scale" in each.arguments]
    assert scales == [(32, 512, 1024 // 32), (32, 1024, 256 // 32)]


def test_what_was_compiled_is_found_in_the_cache(tmp_path):
    """By a process that has used other kernels before, in another order than those that compiled."""
    code = f"""
import os, sys
sys.path.insert(0, {str(TOOLS)!r})
from pathlib import Path
from bench import tuning
from bench.compiling import Task, compile_all, settle_keys
from shapes import Row, rows
from bench.tuning import PARTNERS, key
from torch_mxfp8moe.backends.triton import quantize
from torch_mxfp8moe.backends.triton.launch import compile_offline
from torch_mxfp8moe.backends.triton.targets import Target

settle_keys()
for value in vars(quantize).values():
    getattr(value, "cache_key", None)
tasks = []
for kernels, block_m in (("mma", 1), ("matvec", 1), ("hopper", 16), ("gemm", 16)):
    rule = key(tuning.normal({{"block_m": block_m, "kernels": kernels}}))
    gemms = [key(tile) for tile in PARTNERS[kernels].values()]
    tasks.append(Task(rows()["Qwen3-30B-A3B TP4"], (4,), "mxfp8", "sm_90", "gemm1", rule, *gemms))
assert dict(compile_all(tasks, 1)) == dict.fromkeys(tasks, "")
folder = Path(os.environ["TRITON_CACHE_DIR"])
files = set(folder.rglob("*.cubin"))
for task in tasks:
    compile_offline(task.launches(), Target("sm_90"))
print(len(files), len(set(folder.rglob("*.cubin"))))
"""
    assert run_python(code, TRITON_CACHE_DIR=str(tmp_path)).split() == ["4", "4"]


@pytest.mark.parametrize("gemm", GEMMS)
def test_which_launches_are_of_a_product(gemm):
    task = Task(rows()["Qwen3-30B-A3B TP4"], (1,), "bf16", "sm_90", gemm, key({"block_m": 16}), key(GEMM), key(OTHER))
    (launch,) = task.launches()
    assert launch.options["num_stages"] == {"gemm1": 2, "gemm2": 3}[gemm]
    (other,) = dataclasses.replace(task, layout="aiter_gfx950", row=rows()["Qwen3-30B-A3B TP1"]).launches()
    numbers = lambda launch: {name: x for name, x in launch.arguments.items() if isinstance(x, (int, tuple, bool))}
    assert other.kernel is launch.kernel and numbers(other) != numbers(launch)


@pytest.mark.parametrize("kernels", PARTNERS)
def test_launches_of_each_part(kernels):
    by_route = kernels in ("mma", "matvec")
    rule = {"block_m": 1 if by_route else 16, "kernels": kernels}
    gemms = {name: key(tile) for name, tile in PARTNERS[kernels].items()}
    task = Task(rows()["Qwen3-30B-A3B TP1"], (1,), "mxfp8", "sm_90", "", key(rule), **gemms)
    names = lambda part: [one.kernel.__name__ for one in dataclasses.replace(task, part=part).launches()]
    products = {
        "gemm": ["grouped_gemm_kernel"] * 2, "hopper": ["warpgroup_gemm_kernel"] * 2,
        "mma": ["gate_up_mma_kernel", "down_mma_kernel"], "matvec": ["gate_up_kernel", "down_kernel"],
    }[kernels]  # fmt: skip
    assert names("gemm1") + names("gemm2") == products
    assert names(BASE) == (products if by_route else ["dispatch_kernel", *products, "combine_kernel"])


# What it is told


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--tokens", "0"], "--tokens takes numbers from 1 on, not 0"),
        (["--within", "0"], "--within is 0; it takes more than 0 and less than 100 percent"),
        (["--space", '{"gem": {}}'], "--space: a space has 'gem'; it takes gemm, hopper, mma, matvec"),
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
