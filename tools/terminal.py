"""What the programs beside this one write to a terminal."""

import sys


def progress(text: str) -> None:
    """A line on stderr in the place of the last one; nothing where stderr is no terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
