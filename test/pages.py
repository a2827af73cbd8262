"""The code in Markdown pages."""

import re
from pathlib import Path

from helpers import HERE

ROOT = HERE.parent


def blocks(page: Path, language: str = "python") -> list[str]:
    """The code blocks of a page in one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def section(page: Path, title: str) -> str:
    """The first Python block below a heading of level 2."""
    text = page.read_text().split(f"## {title}", 1)[1]
    return re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
