#!/usr/bin/env python3
"""Draw where layout aiter_gfx950 puts weights and scales: docs/layouts.svg, from torch_mxfp8moe.layouts.

Each panel is one expert's tensor in checkpoint order, small enough to show. The number in a cell is its place in
memory, in cells; cells of one colour lie together there.
"""

import argparse
import colorsys
from dataclasses import dataclass
from pathlib import Path

import torch

from torch_mxfp8moe.layouts import AITER_GFX950, Permutation

OUT = Path(__file__).resolve().parent.parent / "docs" / "layouts.svg"

TILE, SHOWN = 16, (0, 1, 2, 15)
"""Of every 16 rows these are drawn."""

WIDTH, HEIGHT, SPACE = 34, 14, 8
LEFT, TOP, MARGIN = 60, 60, 20


@dataclass(frozen=True)
class Panel:
    """A tensor, [rows, columns] bytes, in cells of ``cell`` neighbouring bytes."""

    title: str
    permutation: Permutation
    rows: int
    columns: int
    cell: int
    run: int
    """Cells that get one colour."""
    halves: bool
    """Gate rows, then up rows."""

    def places(self) -> torch.Tensor:
        """[rows, columns / cell]: where each cell lies in memory, in cells."""
        place = torch.empty(self.rows * self.columns, dtype=torch.long)
        index = torch.arange(self.rows * self.columns).view(1, self.rows, self.columns)
        place[self.permutation.apply(index)] = torch.arange(index.numel())
        return place.view(self.rows, -1, self.cell)[..., 0] // self.cell


def panels() -> list[Panel]:
    weight, scale = AITER_GFX950.weight, AITER_GFX950.scale
    return [
        Panel("w1: 16 bytes a cell", weight[True], 64, 128, 16, 64, True),
        Panel("w2: 16 bytes a cell", weight[False], 64, 128, 16, 64, False),
        Panel("w1_scale: 1 byte a cell", scale[True], 64, 8, 1, 4, True),
        Panel("w2_scale: 1 byte a cell", scale[False], 64, 8, 1, 4, False),
    ]


def colour(place: int, run: int) -> str:
    """Neighbouring runs differ in hue, so that where one ends shows."""
    red, green, blue = colorsys.hls_to_rgb(place // run * 137 % 360 / 360, 0.82, 0.6)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def drawn(panel: Panel, x: int, y: int) -> list[str]:
    places = panel.places().tolist()
    result = [
        f'<text x="{x}" y="{y - 34}" class="title">{panel.title}</text>',
        f'<text x="{x}" y="{y - 20}" class="left">column</text>',
    ]
    for column in range(len(places[0])):
        result.append(f'<text x="{x + column * WIDTH + WIDTH // 2}" y="{y - 8}">{column * panel.cell}</text>')
    for i, row in enumerate(row for row in range(panel.rows) if row % TILE in SHOWN):
        half = ("gate", "up")[row * 2 // panel.rows] if panel.halves else "row"
        number = row % (panel.rows // 2) if panel.halves else row
        top = y + i * HEIGHT + i // len(SHOWN) * SPACE
        result.append(f'<text x="{x - 6}" y="{top + 10}" class="right">{half} {number}</text>')
        for column, place in enumerate(places[row]):
            left = x + column * WIDTH
            fill = colour(place, panel.run)
            result.append(f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="{fill}"/>')
            result.append(f'<text x="{left + WIDTH // 2}" y="{top + 10}">{place}</text>')
    return result


STYLE = """
text { font: 9px sans-serif; fill: #222; text-anchor: middle } rect { stroke: #fff }
.left { text-anchor: start } .right { text-anchor: end }
.title { font-size: 12px; font-weight: bold; text-anchor: start }
"""


def svg() -> str:
    across = LEFT + 8 * WIDTH + MARGIN
    down = TOP + 4 * (len(SHOWN) * HEIGHT + SPACE)
    size = 2 * across, 2 * down + MARGIN
    result = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}">',
        f"<style>{STYLE}</style>",
        f'<rect width="{size[0]}" height="{size[1]}" fill="#fff"/>',
    ]
    for i, panel in enumerate(panels()):
        result += drawn(panel, LEFT + i % 2 * across, TOP + i // 2 * down)
    return "\n".join([*result, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the picture (default docs/layouts.svg)")
    args = parser.parse_args()
    args.out.write_text(svg())


if __name__ == "__main__":
    main()
