#!/usr/bin/env python3
"""Write the API reference, docs/api.md: signatures and docstrings of the public names, as they stand in the source.

The public names are those in __all__ of the package and of the modules that users import by name. Nothing is
imported, so that the page is the same on every machine.
"""

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "torch_mxfp8moe"
MODULES = ("checkpoint", "distributed", "sharding", "layouts", "reference", "backends", "arguments",
           "integrations.transformers", "integrations.vllm")  # fmt: skip
"""Those of the package that users, and writers of backends, import by name."""

TITLE = f"""# API reference

Written by `python tools/reference.py` from the docstrings of `{PACKAGE}`: change those, and run it again.
"""

SECTIONS = ("Args", "Returns", "Raises")

Definition = ast.FunctionDef | ast.ClassDef


@dataclass
class Entry:
    """One name of the page."""

    name: str
    """Below the package: ``fused_moe``, ``checkpoint.Checkpoint.load``."""
    signature: str
    doc: str
    attributes: list["Entry"] = field(default_factory=list)
    methods: list["Entry"] = field(default_factory=list)


def source(module: str) -> Path:
    """The file of a module below the package; the package's own for ``""``."""
    path = ROOT / PACKAGE / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def header(function: ast.FunctionDef, lines: list[str], name: str) -> str:
    """``name(...) -> ...`` as the source has it, without ``self`` and ``cls``."""
    text = textwrap.dedent("\n".join(lines[function.lineno - 1 : function.body[0].lineno - 1]))
    text = re.sub(r"\s*# (fmt|pyrefly):.*", "", text).rstrip().removesuffix(":")
    text = re.sub(r"^def \w+\((\s*)(self|cls)(,\s*|(?=\)))", r"def (\1", text)
    return re.sub(r"^def \w*", name, text, count=1)


def decorators(node: Definition) -> set[str]:
    return {ast.unparse(decorator).split("(")[0].split(".")[-1] for decorator in node.decorator_list}


def documented(body: list[ast.stmt]) -> Iterator[tuple[str, str, str]]:
    """(name, the rest of its line, docstring) of assignments that a string follows, as attribute docstrings do."""
    for statement, following in zip(body, body[1:]):
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if not is_text or not isinstance(following.value.value, str):
            continue
        if isinstance(statement, ast.AnnAssign):
            target, rest = statement.target, f": {ast.unparse(statement.annotation)}"
        elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, rest = statement.targets[0], ""
            if isinstance(statement.value, ast.Constant | ast.Tuple) and len(ast.unparse(statement.value)) < 80:
                rest = f" = {ast.unparse(statement.value)}"
        else:
            continue
        name = ast.unparse(target).removeprefix("self.")
        if not name.startswith("_"):
            yield name, rest, inspect.cleandoc(following.value.value)


def of_class(node: ast.ClassDef, lines: list[str], name: str) -> Entry:
    functions = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
    if "__init__" in functions:
        signature = header(functions["__init__"], lines, name)
    elif "dataclass" in decorators(node):
        fields = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]
        fields = [text for text in fields if not text.startswith("_") and "ClassVar" not in text]
        signature = f"{name}({', '.join(fields)})"
        if len(signature) > 100:
            signature = "\n    ".join([f"{name}(", *(f"{text}," for text in fields)]) + "\n)"
    else:
        signature = f"{name}({', '.join(ast.unparse(base) for base in node.bases)})"
    entry = Entry(name, signature.removesuffix(" -> None"), ast.get_docstring(node) or "")
    attributes = list(documented(node.body))
    attributes += documented(functions["__init__"].body) if "__init__" in functions else []
    entry.attributes = [Entry(f"{name}.{own}", f"{own}{rest}", doc) for own, rest, doc in attributes]
    for own, function in functions.items():
        doc = ast.get_docstring(function)
        if doc and not own.startswith("_"):
            signature = header(function, lines, own)
            if decorators(function) & {"property", "cached_property"}:
                entry.attributes.append(Entry(f"{name}.{own}", signature.replace("() ->", ":"), doc))
            else:
                entry.methods.append(Entry(f"{name}.{own}", signature, doc))
    return entry


def public(tree: ast.Module) -> list[str]:
    """A module's ``__all__``."""
    return next(ast.literal_eval(node.value) for node in tree.body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")  # fmt: skip


def entries(module: str, prefix: str, names: set[str]) -> list[Entry]:
    """The definitions of ``names`` in a module, in its order. Exits where one has no docstring."""
    text = source(module).read_text()
    tree, lines = ast.parse(text), text.splitlines()
    found = []
    for node in tree.body:
        if isinstance(node, Definition) and node.name in names:
            name = prefix + node.name
            is_class = isinstance(node, ast.ClassDef)
            doc = ast.get_docstring(node) or ""
            found.append(of_class(node, lines, name) if is_class else Entry(name, header(node, lines, name), doc))
    for own, rest, doc in documented(tree.body):
        if own in names:
            found.append(Entry(prefix + own, prefix + own + rest, doc))
    missing = names - {entry.name.removeprefix(prefix) for entry in found if entry.doc}
    if missing:
        sys.exit(f"reference: {source(module)} has no docstring of {', '.join(sorted(missing))}")
    return found


def exported() -> list[Entry]:
    """The package's public names where they are defined, the ops first."""
    tree = ast.parse(source("").read_text())
    names = set(public(tree))
    imports = {node.module: names & {alias.name for alias in node.names}
               for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}  # fmt: skip
    modules = sorted(imports, key=lambda module: module != "ops")
    return [entry for module in modules for entry in entries(module, "", imports[module])]


def anchor(name: str) -> str:
    """GitHub's for a heading of ``name`` in backticks."""
    return re.sub(r"[^\w-]", "", name.lower())


def markdown(doc: str, links: dict[str, str]) -> str:
    """A docstring as Markdown: roles become links, sections lists, examples blocks of code."""

    def role(match: re.Match) -> str:
        path = match[1].removeprefix(f"{PACKAGE}.").lstrip(".")
        known = links.get(path) or links.get(path.split(".")[-1])
        name = path.split(".")[-1] if known else path
        return f"[`{name}`](#{known})" if known else f"`{name}`"

    doc = re.sub(r":(?:\w+):`([^`]+)`", role, doc.strip()).replace("``", "`")
    lines: list[str] = []
    section, code = "", False
    for line in doc.splitlines():
        if code != line.startswith((">>>", "...")) and (code or line.startswith(">>>")):
            lines.append("```" if code else "```python")
            code = not code
        if line.removesuffix(":") in SECTIONS and line.endswith(":"):
            section = line.removesuffix(":")
            lines += [f"**{section}**", ""]
        elif section and line.startswith(" " * 4):
            item = re.match(r" {4}([^:\s`][^:`]*?): (.*)", line)
            if section == "Returns":
                lines.append(line.strip())
            elif line.startswith(" " * 8):
                lines.append("  " + line.strip())
            else:
                lines.append(f"- `{item[1]}`: {item[2]}" if item else f"- {line.strip()}")
        else:
            section = section if not line.strip() else ""
            lines.append(line[4:] if code else line)
    return "\n".join(lines + ["```"] * code)


def text(entry: Entry, links: dict[str, str], level: int = 3) -> Iterator[str]:
    yield f"{'#' * level} `{entry.name}`"
    yield f"```python\n{entry.signature}\n```"
    if entry.doc:
        yield markdown(entry.doc, links)
    items = (f"- `{one.signature}`: {markdown(one.doc, links)}".replace("\n", "\n  ") for one in entry.attributes)
    yield "\n".join(items)
    for method in entry.methods:
        yield from text(method, links, level + 1)


def page() -> str:
    """The whole reference."""
    sections = {PACKAGE: exported()}
    for module in MODULES:
        names = set(public(ast.parse(source(module).read_text())))
        sections[f"{PACKAGE}.{module}"] = entries(module, f"{module}.", names)
    links: dict[str, str] = {}
    for found in sections.values():
        for entry in found:
            for one in (entry, *entry.methods):
                for name in (one.name, one.name.split(".")[-1], ".".join(one.name.split(".")[-2:])):
                    links.setdefault(name, anchor(one.name))
    parts = [TITLE.strip()]
    parts.append("\n".join(f"- [`{title}`](#{anchor(title)}): " + ", ".join(
        f"[`{entry.name.split('.')[-1]}`](#{anchor(entry.name)})" for entry in found
    ) for title, found in sections.items()))  # fmt: skip
    for title, found in sections.items():
        parts.append(f"## `{title}`")
        module = title.removeprefix(PACKAGE).lstrip(".")
        parts.append(markdown(ast.get_docstring(ast.parse(source(module).read_text())) or "", links))
        for entry in found:
            parts += text(entry, links)
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "api.md", help="the page (default docs/api.md)")
    args = parser.parse_args()
    args.out.write_text(page())


if __name__ == "__main__":
    main()
