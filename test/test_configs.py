"""The shipped tile files, and what a wrong one is told."""

import json

import pytest
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

from torch_mxfp8moe import configs

FILES = sorted((configs.FOLDER / "triton").glob("*.json"))
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950")
DTYPES = ("mxfp8", "bf16")

GEMM = {"block_n": 64, "block_k": 128, "num_warps": 4, "num_stages": 2}
RULE = {"rows_per_expert": 16, "block_m": 16, "gemm1": GEMM, "gemm2": GEMM}
LAST = RULE | {"rows_per_expert": None}
VECTOR = {"block_n": 8, "block_k": 1024, "num_warps": 1, "num_stages": 1}
BY_ROUTE = {"rows_per_expert": 2, "block_m": 1, "gemm1": VECTOR, "gemm2": VECTOR}
SHAPE = {"hidden": 64, "intermediate": 32, "experts": 4, "topk": 2, "tiles": [LAST]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_shipped_file_obeys_the_rules(path):
    config = configs.parse(path.name, json.loads(path.read_text()))
    for rules in (config.tiles, *config.shapes.values()):
        for kernels, more_than in {(tiles.kernels, tiles.more_than) for tiles in rules}:
            alike = [tiles for tiles in rules if (tiles.kernels, tiles.more_than) == (kernels, more_than)]
            limits = [tiles.rows_per_expert for tiles in alike]
            assert kernels != "gemm" or limits[-1] is None
            assert limits[:-1] == sorted(set(limits[:-1]))
            assert [tiles.block_m for tiles in alike] == sorted(tiles.block_m for tiles in alike)
        for tiles in rules:
            for gemm in (tiles.gemm1, tiles.gemm2):
                # With less, no matrix unit takes whole blocks: bf16 instructions instead.
                assert gemm.num_warps >= 4 or tiles.block_m == 1
                assert set(gemm.options) <= {"waves_per_eu", "matrix_instr_nonkdim", "kpack", "maxnreg", "num_ctas"}


def test_every_file_is_of_an_architecture():
    names = {path.stem.removesuffix("-bf16") for path in FILES}
    assert names <= {"default", *ARCHS} and {"default", "sm_90", "sm_100", "gfx950"} <= names


def test_which_file_serves(monkeypatch, tmp_path):
    (tmp_path / "triton").mkdir()
    for i, name in enumerate(("default", "sm_90", "gfx950", "gfx950-bf16", "sm_100")):
        (tmp_path / "triton" / f"{name}.json").write_text(json.dumps({"tiles": [LAST | {"block_m": 16 << i}]}))
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs.load.cache_clear()
    served = {
        (arch, dtype): configs.load(arch, dtype).tiles[0].block_m
        for arch in ("sm_80", "sm_90", "gfx950", "sm_103") for dtype in DTYPES
    }  # fmt: skip
    configs.load.cache_clear()
    assert served == {
        ("sm_80", "mxfp8"): 16, ("sm_80", "bf16"): 16,
        ("sm_90", "mxfp8"): 32, ("sm_90", "bf16"): 32,
        ("gfx950", "mxfp8"): 64, ("gfx950", "bf16"): 128,
        ("sm_103", "mxfp8"): 256, ("sm_103", "bf16"): 256,
    }  # fmt: skip


def test_the_first_rule_that_is_wide_enough_serves(monkeypatch):
    rules = [LAST | {"rows_per_expert": rows, "block_m": m} for rows, m in ((2.5, 16), (8, 32), (None, 64))]
    shape = SHAPE | {"tiles": [LAST | {"rows_per_expert": 3, "block_m": 128}]}
    config = configs.parse("here", {"tiles": rules, "shapes": [shape]})
    monkeypatch.setattr(configs, "load", lambda *_: config)

    def block_m(tokens, topk=2, experts=4, hidden=128):
        sizes = dict(tokens=tokens, topk=topk, experts=experts, hidden=hidden, intermediate=32)
        return configs.choose("any", "mxfp8", **sizes).block_m

    assert [block_m(t) for t in (1, 5, 6, 16, 17, 10**9)] == [16, 16, 32, 32, 64, 64]
    assert [block_m(5, topk=3), block_m(6, experts=5)] == [32, 16]
    assert [block_m(t, hidden=64) for t in (1, 6, 7, 10**9)] == [128, 128, 32, 64]  # a shape that is listed


def test_one_token_goes_by_routes_however_few_experts_there_are(monkeypatch):
    config = configs.parse("here", {"tiles": [BY_ROUTE | {"rows_per_expert": 0.1}, LAST]})
    monkeypatch.setattr(configs, "load", lambda *_: config)

    def block_m(tokens, **sizes):
        sizes = dict(tokens=tokens, hidden=64, intermediate=32) | sizes
        return configs.choose("any", "mxfp8", **sizes, admits=lambda tiles: True).block_m

    assert [block_m(t, topk=2, experts=4) for t in (1, 2)] == [1, 16]
    assert [block_m(t, topk=2, experts=40) for t in (1, 2, 3)] == [1, 1, 16]
    config = configs.parse("here", {"tiles": [RULE | {"rows_per_expert": 0.1}, LAST | {"block_m": 32}]})
    assert block_m(1, topk=2, experts=4) == 32  # not by any other rule


@given(
    arch=st.sampled_from(ARCHS), dtype=st.sampled_from(DTYPES), tokens=st.integers(1, 2**31),
    hidden=st.integers(1, 256), intermediate=st.integers(1, 256), experts=st.integers(1, 1024), topk=st.integers(1, 64),
)  # fmt: skip
def test_any_sizes_are_served_and_more_tokens_take_no_smaller_tile(
    arch, dtype, tokens, hidden, intermediate, experts, topk
):
    sizes = dict(hidden=32 * hidden, intermediate=32 * intermediate, experts=experts, topk=topk)
    few, more = (configs.choose(arch, dtype, tokens=t, **sizes) for t in (tokens, 2 * tokens))
    assert few.block_m <= more.block_m
    assert few == configs.choose(arch, dtype, tokens=tokens, **sizes)


def with_programs(rows_per_expert, block_m: int = 64, **others) -> dict:
    tiles = dict(num_warps=4, block_k=64, num_stages=3, programs=2) | others
    gemm1, gemm2 = ({"block_n": n * tiles["num_warps"]} | tiles for n in (16, 32))
    return {"rows_per_expert": rows_per_expert, "block_m": block_m, "gemm1": gemm1, "gemm2": gemm2}


def test_rules_for_some_calls_are_passed_over_by_others(monkeypatch):
    rules = [
        BY_ROUTE,
        RULE,
        with_programs(30, 64),
        with_programs(None, 128),
        RULE | {"rows_per_expert": 20, "block_m": 32},
        LAST,
    ]
    config = configs.parse("here", {"tiles": rules})
    monkeypatch.setattr(configs, "load", lambda *_: config)

    def chosen(tokens, *admitted):
        sizes = dict(tokens=tokens, topk=1, experts=1, hidden=256, intermediate=256)
        tiles = configs.choose("any", "mxfp8", **sizes, admits=lambda tiles: tiles.kernels in admitted)
        return tiles.block_m, tiles.gemm1.programs

    assert [chosen(T, "gemm") for T in (2, 16, 17, 21)] == [(16, 0), (16, 0), (32, 0), (16, 0)]
    both = "gemm", "hopper"
    assert [chosen(T, *both) for T in (16, 17, 30, 31, 10**9)] == [(16, 0), (64, 2), (64, 2), (128, 2), (128, 2)]
    assert [chosen(T, "gemm", "matvec") for T in (1, 2, 3, 17)] == [(1, 0), (1, 0), (16, 0), (32, 0)]


def wrong(change) -> str:
    """What is said about a file with two rules and a shape after ``change`` to it."""
    data = json.loads(json.dumps({"tiles": [RULE, LAST], "shapes": [SHAPE]}))
    configs.parse("file.json", data)
    change(data)
    with pytest.raises(ValueError) as error:
        configs.parse("file.json", data)
    return str(error.value)


def test_unknown_keys():
    assert_expected_inline(
        wrong(lambda data: data.update(tile=[])),
        """file.json: has the keys ['shapes', 'tile', 'tiles']; it takes tiles and shapes""",
    )
    assert_expected_inline(
        wrong(lambda data: data.pop("tiles")), """file.json: has the keys ['shapes']; it takes tiles and shapes"""
    )
    assert_expected_inline(
        wrong(lambda data: data["tiles"][0].update(block_n=64)),
        """\
file.json, rule 0: has the keys ['block_m', 'block_n', 'gemm1', 'gemm2', 'rows_per_expert']; \
it takes rows_per_expert, block_m, gemm1 and gemm2, and may have gather""",
    )


def test_rules_that_do_not_serve_everything():
    assert_expected_inline(
        wrong(lambda data: data["tiles"].clear()), """file.json: there is no rule; it takes one or more"""
    )
    assert_expected_inline(
        wrong(lambda data: data["tiles"].pop()),
        """file.json, rule 0: rows_per_expert is 16; it takes rising numbers, and null in the last rule""",
    )
    assert_expected_inline(
        wrong(lambda data: data["tiles"].reverse()),
        """file.json, rule 0: rows_per_expert is None; it takes rising numbers, and null in the last rule""",
    )
    assert_expected_inline(
        wrong(lambda data: data["tiles"].insert(0, data["tiles"][0])),
        """file.json, rule 1: rows_per_expert is 16; it takes rising numbers, and null in the last rule""",
    )
    assert_expected_inline(
        wrong(lambda data: data["shapes"][0]["tiles"].clear()),
        """file.json, shape (64, 32, 4, 2): there is no rule; it takes one or more""",
    )


def test_rules_for_the_matrix_unit_that_do_not_fit():
    def said(block_m=1, both=True, **others):
        up, down = (dict(block_n=n, block_k=1024, num_warps=4, num_stages=1, mma=True) for n in (8, 16))
        rule = dict(
            rows_per_expert=1, block_m=block_m, gemm1=up | others, gemm2=down if both else down | {"mma": False}
        )
        return wrong(lambda data: data.update(tiles=[rule, LAST]))

    assert_expected_inline(
        said(block_n=16),
        """\
file.json, rule 0, gemm1: num_warps, block_n and block_k are (4, 16, 1024); with mma it takes (4, 8, 1024)""",
    )
    assert_expected_inline(
        said(num_warps=8),
        """\
file.json, rule 0, gemm1: num_warps, block_n and block_k are (8, 8, 1024); with mma it takes (8, 8, 2048)""",
    )
    assert_expected_inline(said(mma=1), """file.json, rule 0, gemm1: mma is 1; true takes block_m 1""")
    assert_expected_inline(
        said(block_m=16, block_n=32, block_k=128), """file.json, rule 0, gemm1: mma is True; true takes block_m 1"""
    )
    assert_expected_inline(said(both=False), """file.json, rule 0: with mma in one gemm it is in both""")


def test_rules_with_programs_that_do_not_fit():
    def said(*rules):
        return wrong(lambda data: data.update(tiles=list(rules)))

    assert_expected_inline(
        said(RULE, with_programs(None)),
        """file.json: the last rule has programs or block_m 1; it serves every call, so it has neither""",
    )
    assert_expected_inline(
        said(with_programs(None), with_programs(30), LAST),
        """file.json, rule 1: rows_per_expert is 30; it takes rising numbers, and null in the last rule""",
    )
    assert_expected_inline(
        said(with_programs(30) | {"gemm2": GEMM}, LAST),
        """file.json, rule 0: with programs in one gemm they are in both, and block_m is 8 to 128""",
    )
    assert_expected_inline(
        said(with_programs(30, 256), LAST),
        """file.json, rule 0: with programs in one gemm they are in both, and block_m is 8 to 128""",
    )
    assert_expected_inline(
        said(with_programs(30, programs=9), LAST), """file.json, rule 0, gemm1: programs is 9; it takes 0 to 8"""
    )
    assert_expected_inline(
        said(with_programs(30, num_stages=1), LAST),
        """file.json, rule 0, gemm1: num_stages is 1; with programs it takes 2 to 8""",
    )
    for others in (dict(num_stages=3), dict(num_warps=8, num_stages=4)):
        assert_expected_inline(
            said(with_programs(30, turns=2, **others), LAST),
            """file.json, rule 0, gemm1: turns is 2; with it programs is not 0, num_warps is 4 and num_stages even""",
        )
    assert_expected_inline(
        said(with_programs(30, turns=2, num_stages=4), LAST),
        """file.json, rule 0: block_m is 64; with turns it takes 8 to 32""",
    )
    assert_expected_inline(
        said(with_programs(30, turns=3), LAST), """file.json, rule 0, gemm1: turns is 3; it takes 1 or 2"""
    )
    assert_expected_inline(
        said(with_programs(30, 32, turns=2, num_stages=4) | {"gather": True}, LAST),
        """file.json, rule 0: gather is True; true takes programs, and 1 turn in gemm1""",
    )
    assert_expected_inline(
        said(RULE | {"gather": True}, LAST),
        """file.json, rule 0: gather is True; true takes programs, and 1 turn in gemm1""",
    )
    assert_expected_inline(
        said(with_programs(30, block_k=32), LAST),
        """\
file.json, rule 0, gemm1: num_warps, block_n and block_k are (4, 64, 32); \
with programs it takes [(4, 64, 64), (4, 64, 128), (4, 64, 256), (8, 128, 64), (8, 128, 128), (8, 128, 256), \
(4, 32, 128), (4, 32, 256)]""",
    )


@pytest.mark.parametrize("value", ("16", True, [16], float("nan")), ids=repr)
def test_rows_that_are_no_number(value):
    said = wrong(lambda data: data["tiles"][0].update(rows_per_expert=value))
    takes = "it takes rising numbers, and null in the last rule"
    assert said == f"file.json, rule 0: rows_per_expert is {value!r}; {takes}"


def test_a_shape_with_another_key():
    said = wrong(lambda data: data["shapes"][0].update(tokens=1))
    assert said.startswith("file.json: shape {'hidden': 64, 'intermediate': 32, ")
    assert said.endswith("'tokens': 1} has other keys than it takes, or is there twice")


def test_a_shape_twice():
    assert wrong(lambda data: data["shapes"].append(SHAPE)).endswith("has other keys than it takes, or is there twice")


def test_a_shape_without_a_size():
    assert wrong(lambda data: data["shapes"][0].pop("topk")).endswith("has other keys than it takes, or is there twice")


@pytest.mark.parametrize("value", ("4", 4.0, 0, True), ids=repr)
def test_a_shape_with_a_size_that_no_call_has(value):
    said = wrong(lambda data: data["shapes"][0].update(experts=value))
    assert said == f"file.json: shape (64, 32, {value!r}, 2) takes positive whole numbers"


def test_tiles_that_no_kernel_has():
    for name, value, message in (
        ("block_n", 48, "file.json, rule 0, gemm1: block_n is 48; it takes a power of two from 32 to 256"),
        ("block_n", 16, "file.json, rule 0, gemm1: block_n is 16; it takes a power of two from 32 to 256"),
        ("block_n", None, "file.json, rule 0, gemm1: block_n is None; it takes a power of two from 32 to 256"),
        ("block_k", 64.0, "file.json, rule 0, gemm1: block_k is 64.0; it takes a power of two from 32 to 512"),
        ("num_warps", True, "file.json, rule 0, gemm1: num_warps is True; it takes a power of two from 1 to 16"),
        ("num_stages", 0, "file.json, rule 0, gemm1: num_stages is 0; it takes 1 to 8"),
        ("num_stages", True, "file.json, rule 0, gemm1: num_stages is True; it takes 1 to 8"),
        ("descriptors", 1, "file.json, rule 0, gemm1: descriptors is 1; it takes true or false"),
    ):
        assert wrong(lambda data: data["tiles"][0]["gemm1"].update({name: value})) == message
    said = wrong(lambda data: data["tiles"][1].update(block_m=8))
    assert said == "file.json, rule 1: block_m is 8; without programs it takes 1 or a power of two from 16 to 256"
    said = wrong(lambda data: data["tiles"][1].update(block_m=4))
    assert said == "file.json, rule 1: block_m is 4; it takes 1 or a power of two from 8 to 256"
    said = wrong(lambda data: data["tiles"].insert(0, BY_ROUTE | {"gemm2": VECTOR | {"num_stages": 2}}))
    assert said == "file.json, rule 0, gemm2: num_stages is 2; it takes 1 to 1"
    said = wrong(lambda data: data["tiles"].insert(0, BY_ROUTE | {"gemm1": VECTOR | {"block_n": 1}}))
    assert said == "file.json, rule 0, gemm1: block_n is 1; it takes a power of two from 2 to 256"
