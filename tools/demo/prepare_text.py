#!/usr/bin/env python3
"""Make the text that the demo model is trained on: Jane Austen's six novels, in the public domain.

The novels come from the R package `janeaustenr`, which Debian packages as `r-cran-janeaustenr`. Its data file is
read here directly; R is not needed.

    apt-get download r-cran-janeaustenr && python tools/demo/prepare_text.py r-cran-janeaustenr_*.deb

Writes train.txt, valid.txt (chooses the checkpoint while training) and heldout.txt (never seen by training; the
demo's perplexity is measured on it). Each novel is cut at chapter headings: the last chapters, about 3 % of the
novel, are held out, the 2 % before them are for validation.
"""

import argparse
import re
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

RDB = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
HEADING = re.compile(r"^(?:CHAPTER|Chapter|VOLUME|Volume)\b.{0,12}$", re.M)


def character_vector(data: bytes) -> list[str]:
    """The strings of one serialised R character vector (XDR format, version 3)."""
    if data[:2] != b"X\n":
        raise ValueError("not a serialised R object in XDR format")
    (name_length,) = struct.unpack_from(">i", data, 14)  # after three version numbers: the native encoding's name
    at = 18 + name_length
    kind, count = struct.unpack_from(">ii", data, at)
    if kind & 0xFF != 16:
        raise ValueError(f"expected a character vector (type 16), found type {kind & 0xFF}")
    at += 8
    strings = []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", data, at)
        at += 8
        strings.append(data[at : at + max(length, 0)].decode("utf-8"))
        at += max(length, 0)
    return strings


def novels(rdb: bytes) -> list[str]:
    """Every novel in an R lazy-load database: records of a length and a zlib stream each."""
    found, at = [], 0
    while at < len(rdb):
        stream = zlib.decompressobj()
        lines = character_vector(stream.decompress(rdb[at + 4 :]))
        at = len(rdb) - len(stream.unused_data)
        found.append(unwrap(lines))
    return found


def unwrap(lines: list[str]) -> str:
    """One line per paragraph, one empty line between paragraphs, plain ASCII punctuation."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(line.rstrip() for line in lines))
    text = "\n\n".join(" ".join(p.split()) for p in paragraphs if p.strip())
    for fancy, plain in {"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "_": ""}.items():
        text = text.replace(fancy, plain)
    return text + "\n\n"


def split(text: str, heldout: float = 0.03, valid: float = 0.02) -> tuple[str, str, str]:
    """Cut a novel at chapter headings into (train, valid, heldout)."""
    headings = [m.start() for m in HEADING.finditer(text)]

    def last_heading_before(share: float) -> int:
        return max(h for h in headings if h <= len(text) * (1 - share))

    cut = last_heading_before(heldout)
    first = max(h for h in headings if h < min(cut, len(text) * (1 - heldout - valid) + 1))
    return text[:first], text[first:cut], text[cut:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the .deb of r-cran-janeaustenr, or its Rdata.rdb")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to (this one)")
    args = parser.parse_args()

    if args.package.suffix == ".deb":
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["dpkg-deb", "-x", args.package, folder], check=True)
            rdb = (Path(folder) / RDB).read_bytes()
    else:
        rdb = args.package.read_bytes()

    parts = [split(text) for text in novels(rdb)]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, texts in zip(("train", "valid", "heldout"), zip(*parts, strict=True), strict=True):
        path = args.out / f"{name}.txt"
        path.write_text("".join(texts), encoding="utf-8")
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
