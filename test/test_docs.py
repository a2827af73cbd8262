"""The pages in docs/: their code runs as it stands, and what they show is what the programs print."""

import linecache
import re
import sys

import pytest
import torch

import device
import torch_mxfp8moe as mx
from helpers import TOLERANCE, only_cpu, run_python
from pages import ROOT, blocks
from shapes import rows
from torch_mxfp8moe import extension

DOCS = ROOT / "docs"

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="needs the source tree")


@only_cpu
@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Files are there, headings too; and the README leads to every page, itself or through another."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            file, _, heading = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            if heading:
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


@only_cpu
def test_every_page_is_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        reached.add(page)
        links = re.findall(r"\]\(([\w./]+\.md)", page.read_text())
        todo += {(page.parent / link).resolve() for link in links} - reached
    assert {path.resolve() for path in DOCS.glob("*.md")} <= reached


def run(page: str) -> dict:
    """Every Python block of a page, in order, in one namespace, which is returned."""
    names = {"__name__": page}
    for number, code in enumerate(blocks(DOCS / page)):
        file = f"{page}, block {number + 1}"
        linecache.cache[file] = len(code), None, code.splitlines(keepends=True), file  # for tracebacks
        exec(compile(code, file, "exec"), names)
    return names


@only_cpu
def test_shapes_of_a_model_of_your_own(tmp_path):
    (text,) = blocks(DOCS / "gpu.md", "csv")
    (tmp_path / "my_model.csv").write_text(text)
    found = rows(tmp_path / "my_model.csv")
    assert {name: (row.intermediate, row.local) for name, row in found.items()} == {
        "MyModel TP4": (384, 64), "MyModel EP8": (1536, 8),
    }  # fmt: skip


@pytest.mark.skipif(device.NAME == "interpreter", reason="the page is about a GPU's graphs or a CPU's kernels")
def test_serving(capsys):
    names = run("serving.md")
    assert "served by" in capsys.readouterr().out
    graphs = {step.graph is not None for step in names["steps"].values()}
    assert graphs == {torch.cuda.is_available()}
    step = names["steps"][32]
    assert step.num_tokens.item() == 20 and not step.out[20:].any() and step.out[:20].any(1).all()


DENSE = """
import sys
from pathlib import Path

import torch

import torch_mxfp8moe
from helpers import OPS, assert_agrees, error_of, moe_inputs, same_bytes
from torch_mxfp8moe import backends, reference

package = sys.modules["torch_mxfp8moe.backends"]
package.__path__.append(sys.argv[1])
assert list(backends()).index("triton") < list(backends()).index("dense") < list(backends()).index("reference")
options = dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=7.0)
cases = {
    "plain": (moe_inputs(T=3), {}),
    "no tokens": (moe_inputs(T=0), {}),
    "fp32, bf16 activations": (moe_inputs(T=9, dtype=torch.float32), dict(activation_dtype="bf16")),
    "MXFP8, biases": (moe_inputs(T=9, scaled=True, bias_dtype=torch.bfloat16), options),
    "hostile": (moe_inputs(T=9, G=7, id_dtype=torch.int64), dict(out_dtype=torch.float32)),
}
hostile = cases["hostile"][0]
hostile["topk_ids"][::2, 0] = torch.tensor([-1, 2**32 + 3, 7, 2**63 - 1, -(2**63)])
hostile["expert_map"] = torch.tensor([-1, 3, 0, 2, -1, 1, 9], dtype=torch.int32)
hostile["num_tokens"] = torch.tensor([8], dtype=torch.int32)
for name, (inputs, more) in cases.items():
    got = OPS.fused_moe(**inputs, **more, backend="dense")
    assert_agrees(got, reference.fused_moe(**inputs, **more))
    assert same_bytes(got, OPS.fused_moe(**inputs, **more, backend="dense"))
inputs = moe_inputs(T=4)
inputs["topk_ids"][:] = torch.tensor([0, 1], dtype=torch.int32)
want = OPS.fused_moe(**inputs, backend="dense")
inputs["w1_scale"][3] = 255  # an expert that nobody asks
assert same_bytes(OPS.fused_moe(**inputs, backend="dense"), want)
print(torch_mxfp8moe.explain(**moe_inputs(T=3), backend="dense"))
for wrong in (dict(layout="aiter_gfx950"), dict(apply_router_weight_on_input=True), {}):
    T, K = (1025, 2) if not wrong else (3, 1)
    sizes = dict(H=256, I=128) if "layout" in wrong else {}
    inputs = moe_inputs(T=T, K=K, **sizes)
    if "layout" in wrong:
        for w, gate_up in (("w1", True), ("w2", False)):
            pair = inputs[w], inputs[w + "_scale"]
            inputs[w], inputs[w + "_scale"] = OPS.preshuffle(*pair, gate_up=gate_up, **wrong)
    print(error_of(lambda: OPS.fused_moe(**inputs, **wrong, backend="dense")))
"""


@only_cpu
def test_writing_a_backend(tmp_path):
    """The page's backend, put where the registry looks, in a fresh interpreter."""
    page = DOCS / "writing_a_backend.md"
    (module,), (shown,) = blocks(page), blocks(page, "text")
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "__init__.py").write_text(module)
    printed = run_python(DENSE, str(tmp_path))
    if extension.MODULE is not None and torch.version.cuda is torch.version.hip is None:
        assert printed.startswith(shown)
    refused = "fused_moe: backend 'dense' does not serve this call: "
    assert printed.splitlines()[-3:] == [
        f"{refused}it reads weights in layout 'row_major', not 'aiter_gfx950'",
        f"{refused}it applies routing weights to the result only",
        f"{refused}1025 tokens for 4 experts are 4100 pairs; it takes 4096",
    ]


def test_numerics(capsys):
    """The example prints what the page says, and a call differs from the reference as little as it promises."""
    names = run("numerics.md")
    (shown,) = blocks(DOCS / "numerics.md", "text")
    printed = capsys.readouterr().out
    assert printed.startswith(shown)
    distance = (names["got"] - names["want"]).norm() / names["want"].norm()
    assert distance <= TOLERANCE[torch.float32]
    assert 0.04 < float(printed.split()[-1]) < 0.052


@only_cpu
def test_the_table_of_roundings():
    """What the page says of the weights is measured again; perplexities on a part of the text, within 1 %."""
    sys.path.insert(0, str(ROOT / "tools"))
    import measure_rounding as program

    folder = ROOT / "tools" / "demo" / "weights" / "bf16"
    page = (DOCS / "numerics.md").read_text()
    table = page[page.index("| weights | activations") :].split("\n\n")[0].splitlines()

    def cells(line: str) -> list[str]:
        return [cell.strip() for cell in line.strip("|").split("|")]

    measured = program.rows(folder, None)
    assert [cells(line)[:5] for line in table] == [cells(line) for line in measured]
    text = (ROOT / "tools" / "demo" / "heldout.txt").read_bytes()[:6000].decode("utf-8", "ignore")
    ids = torch.tensor(program.Tokenizer.load(folder / "tokenizer.json").encode(text))
    for line in (*program.rows(folder, ids)[2:], *table[2:]):
        assert 99 < float(cells(line)[6].removesuffix(" %")) < 101, line
    moved = same = 0
    for blocks_ in program.weights(program.checkpoint.load_model(folder)):
        rceil, ceil = (mx.dequantize_1x32(*mx.quantize_1x32(blocks_, mode)) for mode in ("rceil", "ceil"))
        moved, same = moved + (rceil != ceil).sum().item(), same + (rceil == ceil).sum().item()
    assert f"{moved / (moved + same):.3%}".replace("%", " %") in page


def test_layouts():
    run("layouts.md")


@only_cpu
def test_the_drawing_of_the_layout(tmp_path):
    """It is what the program draws; and its numbers are right by the op, and by aiter's closed form for scales."""
    sys.path.insert(0, str(ROOT / "tools"))
    import draw_layouts as program

    assert (DOCS / "layouts.svg").read_text() == program.svg(), "run python tools/draw_layouts.py"
    w1, w2, w1_scale, w2_scale = (panel.places() for panel in program.panels())
    for places in (w1, w2, w1_scale, w2_scale):
        assert sorted(places.flatten().tolist()) == list(range(512))
    for row in range(64):
        for column in range(8):
            k, group, within = column // 4, column % 4, row % 16
            assert w2[row, column] == row // 16 * 128 + k * 64 + group * 16 + within
            half, tile = row // 32, row % 32 // 16
            assert w1[row, column] == (2 * tile + half) * 128 + k * 64 + group * 16 + within
            scale = lambda x: x // 32 * 256 + column % 4 * 64 + x % 16 * 4 + column // 4 * 2 + x % 32 // 16
            assert w2_scale[row, column] == scale(row)
            assert w1_scale[row, column] == scale((2 * tile + half) * 16 + within)
    # The corner of a real weight: what preshuffle makes of one whose bytes are their cell's number.
    H, I = 256, 128  # noqa: E741
    cells = torch.arange(H * I // 16, dtype=torch.int32)
    ids = torch.stack([cells % 120, cells // 120], -1).to(torch.uint8).repeat(1, 8).view(1, H, I)
    there, _ = mx.preshuffle(
        ids.view(torch.float8_e4m3fn), torch.zeros(1, H, I // 32, dtype=torch.uint8), layout="aiter_gfx950",
        gate_up=False,
    )  # fmt: skip
    there = there.view(torch.uint8).view(-1, 16)[:, :2].int()
    order = there[:, 0] + 120 * there[:, 1]
    for row in range(64):
        assert torch.equal(order[w2[row]], torch.arange(8, dtype=torch.int32) + 8 * row)
