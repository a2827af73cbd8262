"""test/shapes.py's reading of files: what a row is made of, what is wrong; and the options of programs for them."""

import argparse
import csv
import sys

import pytest
from expecttest import assert_expected_inline

from helpers import PACKAGE, error_of, only_cpu
from shapes import SHAPES, rows
from torch_mxfp8moe import configs

TOOLS = PACKAGE.parent / "tools"

pytestmark = only_cpu
needs_tools = pytest.mark.skipif(not TOOLS.exists(), reason="needs the source tree")

NEEDED = "model,hidden,intermediate,experts,topk\n"


@pytest.fixture
def read(tmp_path):
    """``read(text)``: the rows of a new file with it."""
    count = iter(range(100))

    def read(text: str, encoding: str = "utf-8"):
        path = tmp_path / f"{next(count)}.csv"
        path.write_bytes(text.encode(encoding))
        return rows(path)

    return read


def test_a_line_with_what_is_needed_is_a_whole_model(read):
    """With the op's own defaults."""
    ((name, row),) = read(NEEDED + "Mine,4096,1536,64,6\n").items()
    assert name == row.name == "Mine" and row.shape == (4096, 1536, 64, 6)
    assert row.local == 64 and not row.bias and not row.shared
    call = row.call(3, "meta")
    defaults = {field: type(call).__dataclass_fields__[field].default for field in row.options}
    assert row.options == defaults and len(defaults) == 3


def test_what_a_rank_has(read):
    columns = NEEDED.strip() + ",parallel,per_rank_intermediate\n"
    lines = ("TP4,", "TP8,224", ",224", "EP8,", "EP6 (11 local experts),", "TP2 (8 local experts),", "TP1,")
    found = read(columns + "".join(f"M{i},4096,1536,64,6,{line}\n" for i, line in enumerate(lines)))
    assert {name: (row.intermediate, row.local) for name, row in found.items()} == {
        "M0 TP4": (384, 64), "M1 TP8": (224, 64), "M2": (224, 64), "M3 EP8": (1536, 8), "M4 EP6": (1536, 11),
        "M5 TP2": (768, 8), "M6 TP1": (1536, 64),
    }  # fmt: skip
    assert read("model,hidden,experts,topk,per_rank_intermediate\nM,64,4,2,96")["M"].intermediate == 96


def test_what_is_said_is_taken(read):
    text = "bias, topk ,model,experts,hidden,intermediate,swiglu_alpha,swiglu_beta,swiglu_limit\r\n"
    text += 'yes,3,"A, B",4, 64 ,32,1.702,1,7e0\r\n\r\nno,4,C + fused shared expert,4,64,32,,,\r\n'
    first, second = read(text, "utf-8-sig").values()
    assert (first.name, first.bias, first.topk, first.hidden) == ("A, B", True, 3, 64)
    assert first.options == dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=7.0)
    assert second.shared and not second.bias and second.options["swiglu_limit"] is None


def test_sizes_are_worked_out_as_the_shipped_file_has_them(tmp_path):
    """What parallel says of a rank, against the column that says it."""
    lines = list(csv.DictReader(SHAPES.open()))
    path = tmp_path / "without.csv"
    with path.open("w", newline="") as file:
        columns = [name for name in lines[0] if name != "per_rank_intermediate"]
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(line | {"parallel": line["parallel"].split()[0]} for line in lines)
    assert rows(path) == rows()


def test_what_is_wrong_with_a_file(read):
    def said(*text: str) -> str:
        return error_of(lambda: read(*text)).partition(".csv")[2]

    columns = NEEDED.strip() + ",parallel,bias,swiglu_alpha,swiglu_limit\n"
    lines = (
        "M,4096,1536,64x,6,,,,", "M,,1536,64,6,,,,", "M,4100,1536,64,6,,,,", "M,4096,0,64,6,,,,",
        "M,4096,96,64,6,TP2,,,", "M,4096,96,8,9,,,,", "M,4096,96,8,0,,,,", "M,4096,96,0,1,,,,", ",4096,96,8,1,,,,",
        "M,4096,96,8,1,DP4,,,", "M,4096,96,8,1,EP3,,,", "M,4096,96,8,1,EP2 (9 local experts),,,",
        "M,4096,96,8,1,,true,,", "M,4096,96,8,1,,,nan,", "M,4096,96,8,1,,,,0", "M,4096,96,8,1",
        "M,4096,96,8,1,,,,,,", "M,4096,96,8,1,TP1,,,\nM,2048,96,8,1,TP1,,,",
    )  # fmt: skip
    messages = [said(f"{columns}First,4096,96,8,1,,,,\n{line}") for line in lines]
    messages += [said("model;hidden;intermediate;experts;topk\nM;64;32;4;2")]
    messages += [said(text) for text in ("", NEEDED, "model,hidden,experts,topk\n", "model," + NEEDED, 200_000 * "M")]
    messages += [said(NEEDED + "M\xe4,64,32,4,2", "latin-1")]
    assert_expected_inline(
        "\n".join(messages),
        """\
:3: experts is '64x'; it takes a whole number > 0
:3: hidden is ''; it takes a positive multiple of 32
:3: hidden is '4100'; it takes a positive multiple of 32
:3: intermediate is '0'; it takes a positive multiple of 32
:3: intermediate is '96'; it takes a positive multiple of 64, 32 for each of 2 ranks
:3: topk is '9'; it takes 1 to 8, the number of experts
:3: topk is '0'; it takes 1 to 8, the number of experts
:3: experts is '0'; it takes a whole number > 0
:3: model is ''; it takes a name
:3: parallel is 'DP4'; it takes TPn, EPn, EPn (m local experts) or nothing
:3: parallel is 'EP3' of 8 experts; it takes 'EP3 (m local experts)'
:3: parallel has 9 local experts; it takes 1 to 8
:3: bias is 'true'; it takes yes or no
:3: swiglu_alpha is 'nan'; it takes a finite number
:3: swiglu_limit is '0'; it takes a finite number > 0 or nothing
:3: has more or fewer values than there are columns
:3: has more or fewer values than there are columns
:4: there is a row 'M TP1' above; each takes a name of its own
:1: there is a column 'model;hidden;intermediate;experts;topk'; it takes model, hidden, intermediate, experts, topk, and may have parallel, swiglu_alpha, swiglu_beta, swiglu_limit, bias, per_rank_intermediate, shared_experts, gate_up_in_checkpoint, each once
:1: there is no column 'model'; it takes model, hidden, intermediate, experts, topk, and may have parallel, swiglu_alpha, swiglu_beta, swiglu_limit, bias, per_rank_intermediate, shared_experts, gate_up_in_checkpoint, each once
: there is no row; it takes one or more
:1: there is no column 'intermediate'; it takes model, hidden, intermediate, experts, topk, and may have parallel, swiglu_alpha, swiglu_beta, swiglu_limit, bias, per_rank_intermediate, shared_experts, gate_up_in_checkpoint, each once
:1: there is a column 'model'; it takes model, hidden, intermediate, experts, topk, and may have parallel, swiglu_alpha, swiglu_beta, swiglu_limit, bias, per_rank_intermediate, shared_experts, gate_up_in_checkpoint, each once
: field larger than field limit (131072); it takes CSV in UTF-8
: 'utf-8' codec can't decode byte 0xe4 in position 40: invalid continuation byte; it takes CSV in UTF-8""",  # noqa: E501
    )


@needs_tools
def test_rows_of_a_file_or_of_the_shipped_one(tmp_path, capsys):
    sys.path.insert(0, str(TOOLS))
    import options

    path = tmp_path / "mine.csv"
    path.write_text(NEEDED + "A,64,32,4,2\nB,64,32,4,2\n")

    def chosen(*argv: str, default=("GLM-5 TP4",)):
        parser = argparse.ArgumentParser(prog="it")
        options.add_rows(parser, default)
        args = parser.parse_args(argv)
        options.settle_rows(parser, args)
        return args.rows

    shipped, mine = rows(), rows(path)
    assert chosen() == {"GLM-5 TP4": shipped["GLM-5 TP4"]} and chosen(default=()) == chosen("--rows", "all") == shipped
    assert chosen("--shapes", str(path)) == chosen("--rows", "all", "--shapes", str(path)) == mine
    assert list(chosen("--shapes", str(path), "--rows", "B", "B")) == ["B"]

    def said(*argv: str) -> str:
        with pytest.raises(SystemExit) as error:
            chosen(*argv)
        assert error.value.code == 2
        return capsys.readouterr().err.split("it: ")[-1].strip().replace(str(tmp_path), "")

    (tmp_path / "wrong.csv").write_text(NEEDED + "A,64,32,4,5\n")
    assert_expected_inline(
        "\n".join((
            said("--shapes", str(path), "--rows", "GLM-5 TP4"),
            said("--rows", "all", "GLM-5 TP4"),
            said("--shapes", str(tmp_path / "wrong.csv")),
            said("--shapes", str(tmp_path / "none.csv")),
        )),
        """\
error: --rows: there is no row 'GLM-5 TP4'; there are A, B
error: --rows all goes without other rows
error: argument --shapes: /wrong.csv:2: topk is '5'; it takes 1 to 4, the number of experts
error: argument --shapes: [Errno 2] No such file or directory: '/none.csv'""",
    )  # fmt: skip


@needs_tools
def test_shapes_that_nothing_is_tuned_for():
    """Those that docs/hopper.md has figures of: by the default rules, of which they are to say something."""
    others = rows(TOOLS / "bench" / "others.csv")
    assert len(others) == 19
    assert not {row.shape for row in others.values()} & set(configs.load("sm_90").shapes)
