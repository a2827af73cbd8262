"""The search for tiles without the GPU: what is tried next, what was measured, what of it goes into a file.

A tile is held as what a tile file holds of it: a ``rule`` (what both products share, such as block_m), and a ``gemm``
(what is one product's own), dicts of JSON values. ``configs`` checks them; that a field exists is written there and in
the space that is searched, nowhere here.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import product
from pathlib import Path

from torch_mxfp8moe import configs
from torch_mxfp8moe.configs import Gemm, Tiles

GEMMS = ("gemm1", "gemm2")
LIMIT = "rows_per_expert"
Json = dict[str, object]

SPACES = {
    "sm_": {
        "rule": {"block_m": (16, 32, 64, 128)},
        "gemm": {
            "block_n": (32, 64, 128, 256), "block_k": (64, 128, 256), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5),
            "descriptors": (False, True),
        },
    },
    "gfx": {
        "rule": {"block_m": (16, 32, 64, 128, 256)},
        "gemm": {
            "block_n": (32, 64, 128, 256), "block_k": (64, 128, 256), "num_warps": (4, 8), "num_stages": (2, 3, 4),
            "matrix_instr_nonkdim": (0, 16, 32), "waves_per_eu": (0, 1, 2),
        },
    },
}  # fmt: skip
"""What is tried, by the beginning of an architecture's name: values in order, of rules and of each product. ``gemm1``
and ``gemm2`` beside ``gemm`` hold what is one product's alone."""


def space_of(arch: str, more: dict | None = None) -> dict[str, dict[str, tuple]]:
    """The space of ``arch`` as ``rule``, ``gemm1`` and ``gemm2``; what ``more`` names replaces what is there."""
    base = next(space for start, space in SPACES.items() if arch.startswith(start))
    parts = {name: dict(base.get(name, {})) for name in ("rule", "gemm", *GEMMS)}
    for name, values in (more or {}).items():
        if name not in parts:
            raise ValueError(f"a space has {name!r}; it takes {', '.join(parts)}")
        parts[name] |= values
    shared = parts.pop("gemm")
    return {name: {k: tuple(v) for k, v in ((shared | own) if name in GEMMS else own).items()}
            for name, own in parts.items()}  # fmt: skip


_DEFAULTS = {f.name: f.default for kind in (Tiles, Gemm) for f in fields(kind) if f.default is not MISSING} | {
    "matrix_instr_nonkdim": 0, "waves_per_eu": 0,
}  # fmt: skip
"""Of fields, and of compiler options: 0 leaves the choice to the compiler."""


def gemm_json(gemm: Gemm) -> Json:
    """As a file holds it."""
    own = {f.name: getattr(gemm, f.name) for f in fields(Gemm) if f.name != "options"} | gemm.options
    return normal(own)


def rule_json(tiles: Tiles) -> Json:
    """What the products of ``tiles`` share, as a file holds it."""
    return normal({f.name: getattr(tiles, f.name) for f in fields(Tiles) if f.name not in (LIMIT, *GEMMS)})


def normal(part: Json) -> Json:
    """A rule or a gemm without what is as it would be anyway, so that equal ones are equal, and files short."""
    return {name: value for name, value in part.items() if name not in _DEFAULTS or value != _DEFAULTS[name]}


def tiles_of(rule: Json, gemm1: Json, gemm2: Json) -> Tiles:
    """Raises ValueError where ``configs`` does not take them."""
    return configs.rule("candidate", {LIMIT: None, **rule, "gemm1": gemm1, "gemm2": gemm2})


def key(tile: Json) -> str:
    return json.dumps(tile, sort_keys=True)


@dataclass(frozen=True)
class Point:
    """What is tuned for: a shape of tile files and a number of tokens."""

    row: str
    """Of test/shapes.csv."""
    shape: tuple[int, int, int, int]
    """hidden, intermediate, experts (the global ones), topk."""
    T: int

    @property
    def rows(self) -> float:
        """Rows per expert, by which files choose."""
        return self.T * self.shape[3] / self.shape[2]


@dataclass(frozen=True)
class Trial:
    """A tile for one product of one point, under a rule."""

    point: Point
    gemm: str
    """gemm1 or gemm2."""
    rule: str
    tile: str
    """Keys."""

    def json(self) -> Json:
        point = dict(row=self.point.row, shape=self.point.shape, T=self.point.T)
        return {**point, "gemm": self.gemm, "rule": json.loads(self.rule), "tile": json.loads(self.tile)}

    @staticmethod
    def of(entry: Json) -> "Trial":
        point = Point(entry["row"], tuple(entry["shape"]), entry["T"])
        return Trial(point, entry["gemm"], key(entry["rule"]), key(entry["tile"]))


@dataclass(frozen=True)
class Result:
    status: str
    """ok, wrong (results), failed (to compile or to start), slow (too slow to be worth a check), crashed."""
    us: float | None = None
    note: str = ""

    @property
    def usable(self) -> float | None:
        """Microseconds, of what may go into a file."""
        return self.us if self.status == "ok" else None


class Journal:
    """Results in a file of JSON lines that is only appended to, so that a run that ends at any moment loses nothing.

    ``stamp`` says what results hold for (the GPU, the compiler, the kernels' source); others are passed over, and
    ``other`` counts them. None: that of the last line. A trial that was begun and not finished took the process with
    it, or hung: it counts as crashed.
    """

    def __init__(self, path: Path, stamp: Json | None):
        self.path, self.other = path, 0
        self.results: dict[Trial, Result] = {}
        text = path.read_text() if path.exists() else ""
        entries = []
        for line in text.splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue  # cut off in the middle of writing
        if text and not text.endswith("\n"):
            self._append("\n")
        self.stamp = stamp if stamp is not None else entries[-1]["stamp"] if entries else {}
        for entry in entries:
            if entry["stamp"] != self.stamp:
                self.other += 1
            elif entry["status"] == "begun":
                self.results[Trial.of(entry)] = Result("crashed", note="did not come back")
            else:
                self.results[Trial.of(entry)] = Result(*(entry[name] for name in ("status", "us", "note")))

    def _append(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text)

    def begin(self, trial: Trial) -> None:
        self._append(json.dumps({"stamp": self.stamp, **trial.json(), "status": "begun"}) + "\n")

    def finish(self, trial: Trial, result: Result) -> None:
        self.results[trial] = result
        line = {"stamp": self.stamp, **trial.json(), "status": result.status, "us": result.us, "note": result.note}
        self._append(json.dumps(line) + "\n")


def source_hash(folder: Path) -> str:
    """Of the Python files in ``folder``: results hold for the kernels they were taken with."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Search:
    """For one product of one point under one rule: coordinate descent through the space, one field at a time from the
    best so far, begun at what is configured and at whatever is good for others."""

    def __init__(self, point: Point, gemm: str, rule: Json, start: Json, space: dict[str, tuple]):
        self.point, self.gemm, self.rule, self.start, self.space = point, gemm, rule, start, space
        self.times: dict[str, float | None] = {}
        """Microseconds by key of every tile that was tried; None: not usable."""

    def trial(self, tile: Json) -> Trial:
        return Trial(self.point, self.gemm, key(self.rule), key(tile))

    @property
    def best(self) -> tuple[Json, float] | None:
        usable = [(us, name) for name, us in self.times.items() if us is not None]
        if not usable:
            return None
        us, name = min(usable)
        return json.loads(name), us

    def neighbours(self, tile: Json) -> Iterable[Json]:
        full = _DEFAULTS | tile
        for name, values in self.space.items():
            for value in values:
                if value != full.get(name):
                    yield normal(tile | {name: value})

    def propose(self, seeds: Sequence[Json] = (), descend: bool = True) -> list[Json]:
        """What to try now, nothing of it tried before; empty when the search has ended. Without ``descend`` it goes no
        steps of its own."""
        if not descend:
            wanted = list(seeds)
        elif not self.times:
            wanted = [self.start, *seeds]
        elif self.best is None:
            wanted = [*seeds, *self.neighbours(self.start)]
        else:
            wanted = [*seeds, *self.neighbours(self.best[0])]
        return [json.loads(name) for name in dict.fromkeys(map(key, wanted)) if name not in self.times]


def rules_to_try(point: Point, space: dict[str, tuple], width: float = 4.0) -> list[Json]:
    """Rules whose block_m is not far from the rows that an expert gets: at most ``width`` times as many, not less than
    a ``width``-th, and the nearest one in any case."""
    choices = [dict(zip(space, values)) for values in product(*space.values())]
    nearest = min((rule["block_m"] for rule in choices), key=lambda m: abs(math.log(m / max(point.rows, 1))))
    near = lambda m: m == nearest or point.rows / width <= m <= max(point.rows, 1) * width
    return [rule for rule in choices if near(rule["block_m"])]


@dataclass(frozen=True)
class Tile:
    """A rule of a file without its limit, hashable."""

    rule: str
    gemm1: str
    gemm2: str

    @staticmethod
    def of(rule: Json, gemm1: Json, gemm2: Json) -> "Tile":
        return Tile(key(rule), key(gemm1), key(gemm2))

    def json(self, limit: float | None) -> Json:
        return {LIMIT: limit, **json.loads(self.rule), "gemm1": json.loads(self.gemm1), "gemm2": json.loads(self.gemm2)}

    @property
    def block_m(self) -> int:
        return json.loads(self.rule)["block_m"]


class Table:
    """What was measured of all points: the time of a tile is that of its two products."""

    def __init__(self, results: dict[Trial, Result]):
        self.times: dict[Point, dict[tuple[str, str], dict[str, float]]] = {}
        """Microseconds by point, then by (rule, product), then by tile."""
        for trial, result in results.items():
            if result.usable is not None:
                products = self.times.setdefault(trial.point, {})
                products.setdefault((trial.rule, trial.gemm), {})[trial.tile] = result.usable

    def us(self, point: Point, tile: Tile) -> float | None:
        products = self.times[point]
        one, two = (products.get((tile.rule, name), {}).get(getattr(tile, name)) for name in GEMMS)
        return None if one is None or two is None else one + two

    def best(self, point: Point, within: float = 0.0) -> list[Tile]:
        """The tiles of each rule whose products are its fastest there, the fastest first; with ``within`` those alone
        that are at most that share slower than the first."""
        found = []
        for rule in dict.fromkeys(rule for rule, _ in self.times[point]):
            products = [self.times[point].get((rule, name)) for name in GEMMS]
            if all(products):
                gemm1, gemm2 = (min(times, key=times.get) for times in products)
                found.append(Tile(rule, gemm1, gemm2))
        found.sort(key=lambda tile: self.us(point, tile))
        if not found:
            return []
        least = self.us(point, found[0])
        return [tile for tile in found if self.us(point, tile) <= least * (1 + within)]

    def over_best(self, point: Point, tile: Tile) -> float | None:
        """The time of ``tile`` over that of the fastest, None where it was not measured."""
        us, best = self.us(point, tile), self.best(point)
        return us / self.us(point, best[0]) if us is not None and best else None


def limit_between(low: float, high: float) -> float:
    """A readable number from ``low`` on, below ``high``: where one rule ends and the next begins."""
    middle = math.sqrt(low * high)
    for digits in (1, 2, 3, 6):
        rounded = float(f"{middle:.{digits}g}")
        if low <= rounded < high:
            return int(rounded) if rounded == int(rounded) else rounded
    return low


def reduce(
    points: Sequence[Point], tiles: Sequence[Tile], cost: Callable[[Point, Tile], float | None], within: float | None,
    per_rule: float = 0.0, unknown: float = 2.0,
) -> list[Json] | None:  # fmt: skip
    """Rules for ``points``, in order of their limits, whose block_m never falls.

    With ``within``: as few as there can be with each point's cost (time over the best there) at most 1 + within, and of
    these the least costly; None if there are none. Without: those whose logarithms of costs, with ``per_rule`` for each
    rule, have the least sum; where a tile was not measured it costs ``unknown``.
    """
    limits = sorted({point.rows for point in points})
    groups = [[point for point in points if point.rows == rows] for rows in limits]
    heights = sorted({tile.block_m for tile in tiles})
    most = math.inf if within is None else 1 + within + 1e-9

    def until(tile: Tile) -> list[tuple[int, float]]:
        """Before each group: the points up to there that the tile may not serve, and the logarithms of its costs."""
        result = [(0, 0.0)]
        for group in groups:
            bad, spent = result[-1]
            for point in group:
                c = cost(point, tile)
                bad += within is not None and (c is None or c > most)
                spent += math.log(unknown if c is None else c)
            result.append((bad, spent))
        return result

    sums = {tile: until(tile) for tile in tiles}
    rank = (lambda option: option[1] + per_rule * option[0]) if within is None else (lambda option: option[:2])
    # (number of rules, sum of logarithms, rules) of the first j groups, the last rule of height m at most.
    best = {(0, m): (0, 0.0, ()) for m in heights}
    for j in range(1, len(groups) + 1):
        for place, m in enumerate(heights):
            options = [best[j, heights[place - 1]]] if place and (j, heights[place - 1]) in best else []
            for i in (i for i in range(j) if (i, m) in best):
                count, spent, rules = best[i, m]
                for tile in tiles:
                    (bad, before), (bad_too, after) = sums[tile][i], sums[tile][j]
                    if tile.block_m == m and bad == bad_too:
                        options.append((count + 1, spent + after - before, (*rules, (j, tile))))
            if options:
                best[j, m] = min(options, key=rank)
    if (len(groups), heights[-1]) not in best:
        return None
    rules = best[len(groups), heights[-1]][2]
    ends = [limit_between(limits[j - 1], limits[j]) if j < len(limits) else None for j, _ in rules]
    return [tile.json(end) for end, (_, tile) in zip(ends, rules)]


def file_of(table: Table, within: float, old: Json | None = None, keep_default: bool = False) -> Json:
    """The content of a tile file: default rules, and shapes of their own where those cost more than ``within``.

    ``old``: a file whose shapes that were not tuned now stay, and whose default rules do too with ``keep_default``.
    """
    points = [point for point in table.times if table.best(point)]
    tiles = list(dict.fromkeys(tile for point in points for tile in table.best(point, within)))
    cost = table.over_best
    if keep_default:
        rules = old["tiles"]
    else:
        rules = reduce(points, tiles, cost, None, per_rule=math.log1p(within) * max(1.0, len(points) / 10))
    shapes = {tuple(shape[name] for name in SIZES): shape for shape in (old or {}).get("shapes", [])}
    for shape in dict.fromkeys(point.shape for point in points):
        own = [point for point in points if point.shape == shape]
        costs = [cost(point, chosen(rules, point)) for point in own]
        shapes.pop(shape, None)
        if any(c is None or c > 1 + within for c in costs):
            here = list(dict.fromkeys(tile for point in own for tile in table.best(point, max(within, 0.25))))
            special = reduce(own, here, cost, within) or reduce(own, here, cost, None)
            shapes[shape] = {**dict(zip(SIZES, shape)), "tiles": special}
    return {"tiles": rules} | ({"shapes": list(shapes.values())} if shapes else {})


SIZES = ("hidden", "intermediate", "experts", "topk")


def chosen(rules: list[Json], point: Point) -> Tile:
    """The one of a file's ``rules`` that serves a point."""
    rule = next(rule for rule in rules if rule[LIMIT] is None or point.rows <= rule[LIMIT])
    shared = {name: value for name, value in rule.items() if name not in (LIMIT, *GEMMS)}
    return Tile.of(normal(shared), normal(rule["gemm1"]), normal(rule["gemm2"]))


def dump(data: Json) -> str:
    """A tile file's text: a rule a line."""
    lines = lambda rules, indent: ",\n".join(indent + json.dumps(rule) for rule in rules)
    text = '{\n  "tiles": [\n' + lines(data["tiles"], "    ") + "\n  ]"
    if data.get("shapes"):
        blocks = []
        for shape in data["shapes"]:
            sizes = ", ".join(f'"{name}": {shape[name]}' for name in SIZES)
            blocks.append("    {" + sizes + ', "tiles": [\n' + lines(shape["tiles"], "      ") + "\n    ]}")
        text += ',\n  "shapes": [\n' + ",\n".join(blocks) + "\n  ]"
    return text + "\n}\n"
