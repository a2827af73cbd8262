"""Options that programs beside this one share."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shapes import DEFAULTS, NEEDED, Row, rows


def _rows_of(path: str) -> dict[str, Row]:
    try:
        return rows(Path(path))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_rows(parser: argparse.ArgumentParser, default: Sequence[str] = ()) -> None:
    """--shapes and --rows, for :func:`settle_rows`. ``default``: rows of test/shapes.csv; empty: all."""
    values = ", ".join(f"{name} {value}" for name, value in DEFAULTS.items() if value)
    parser.add_argument("--shapes", type=_rows_of, metavar="FILE",
                        help="rows of your own in the place of test/shapes.csv's: a CSV file with its columns. It "
                        f"takes {', '.join(NEEDED)} of the whole model. parallel (TP4, EP8, EP8 (32 local experts)) "
                        "says what one rank has of that: all, where it is missing or empty. per_rank_intermediate, "
                        "where it is there, does in the place of intermediate. The others, where they are missing or "
                        f"empty: {values}, no swiglu_limit. 'fused shared' in model: every token goes to the last "
                        "expert. A row's name is model and its TPn or EPn")  # fmt: skip
    usual = f"all of a --shapes file, else {', '.join(default)}" if default else "all"
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW",
                        help=f"rows by name, or all (default: {usual}). In test/shapes.csv: "
                        + ", ".join(rows()))  # fmt: skip
    parser.set_defaults(default_rows=default)


def settle_rows(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Makes ``args.rows`` a dict, the rows that are asked for by name."""
    known = args.shapes or rows()
    names = args.rows or (args.default_rows if args.shapes is None else ()) or ["all"]
    if names == ["all"]:
        names = known
    elif "all" in names:
        parser.error("--rows all goes without other rows")
    for name in names:
        if name not in known:
            parser.error(f"--rows: there is no row {name!r}; there are {', '.join(known)}")
    args.rows = {name: known[name] for name in names}


def read_json(path: str, check: Callable[[Any], Any]) -> Any:
    """What ``check`` makes of a JSON file, for an option's type: what either objects to ends the program, with the
    file's name."""
    try:
        return check(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from None


def check_counts(parser: argparse.ArgumentParser, option: str, counts: Sequence[int]) -> None:
    """Ends the program unless all that an option was given are from 1 on."""
    if any(count < 1 for count in counts):
        parser.error(f"{option} takes numbers from 1 on, not {min(counts)}")
