"""docs/api.md is what tools/reference.py writes of the docstrings."""

import re
import subprocess
import sys

import pytest

from helpers import only_cpu
from pages import ROOT

PAGE = ROOT / "docs" / "api.md"

pytestmark = [only_cpu, pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> str:
    """What the program writes, run as a user would, with nothing installed."""
    path = tmp_path_factory.mktemp("reference") / "api.md"
    subprocess.run([sys.executable, "-S", str(ROOT / "tools" / "reference.py"), "--out", str(path)], check=True)
    return path.read_text()


def test_the_page_is_up_to_date(written):
    assert PAGE.read_text() == written, "docs/api.md is not what the docstrings say: run python tools/reference.py"


def test_every_link_has_its_heading_and_every_heading_is_one(written):
    anchors = [re.sub(r"[^\w-]", "", name.lower()) for name in re.findall(r"^#+ `(.*)`$", written, re.MULTILINE)]
    assert len(set(anchors)) == len(anchors) > 80
    links = set(re.findall(r"\]\(#([^)]*)\)", written))
    assert links <= set(anchors), links - set(anchors)


def test_nothing_of_a_docstrings_markup_is_left(written):
    prose = re.sub(r"```.*?```", "", written, flags=re.DOTALL)
    for markup in (r":\w+:`", r">>>", r"^(Args|Returns|Raises):", "````?"):
        assert not re.search(markup, prose, re.MULTILINE), markup
    assert written.count("```") % 2 == 0


def test_every_public_name_is_there(written):
    import torch_mxfp8moe
    from torch_mxfp8moe import arguments, backends, checkpoint, distributed, layouts, reference, sharding

    for name in set(torch_mxfp8moe.__all__) - {"reference"}:
        assert f"### `{name}`\n" in written, name
    for module in (arguments, checkpoint, distributed, layouts, reference, sharding):
        for name in module.__all__:
            assert f"### `{module.__name__.removeprefix('torch_mxfp8moe.')}.{name}`\n" in written, name
            assert hasattr(module, name)
    assert "#### `backends.Backend.why_not`\n" in written and backends().keys()
