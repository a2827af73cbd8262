"""The search for tiles without the GPU: what is tried next, what was measured, what of it goes into a file.

A tile is held as what a tile file holds of it: a ``rule`` (what both products share, such as block_m), and a ``gemm``
(what is one product's own), dicts of JSON values. ``configs`` checks them; that a field exists is written there and in
the space that is searched, nowhere here. A rule also says which ``kernels`` it is for (``configs.Tiles.kernels``; not
said: "gemm"), which in files its other fields tell.

What is measured is always a whole call, since its launches overlap and find in L2 what others left. Under a rule each
product's tile is tuned by itself, beside a tile of the other one that is always the same (``PARTNERS``). ``base`` is
the call with partners for both. What a tile adds to it or takes from it is counted as if it did so beside any other,
which is not quite so: beside a slow partner more of it is hidden.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from itertools import combinations, product
from pathlib import Path

from torch_mxfp8moe import configs
from torch_mxfp8moe.configs import Config, Gemm, Tiles

GEMMS = ("gemm1", "gemm2")
BASE = "base"
PARTS = (BASE, *GEMMS)
"""Of a call, what has a time of its own."""

LIMIT = "rows_per_expert"
Json = dict[str, object]

CALLS = (("hopper", "mma", "matvec", "gemm"), ("matvec", "gemm"), ("gemm",))
"""The kernels that calls are admitted to: there are calls of each of these, and no others (``fused_moe.admits``)."""

MATVEC_ROWS = 1
"""Rows per expert beyond which a route by itself is not tried, and does not go into a file."""

ROOM = {8: 1, 16: 4}
"""Of small tiles of "hopper", by block_m, the most rows per expert that they are tried for. Points are measured with
uniform routing; with another one a popular expert takes many of them (docs/hopper.md: with Zipf routing, T = 64 lost 4
to 10 percent by 8 slots in the place of 16)."""

_MATVEC = {
    "rule": {"block_m": (1,)},
    "both": {
        "block_n": (2, 4, 8, 16, 32, 64), "block_k": (128, 256, 512, 1024, 2048, 4096), "num_warps": (1, 2, 4, 8),
    },
}  # fmt: skip


def _mma(rows: int, warps: int) -> Json:
    """With so many warps, for one of the products."""
    return {"mma": True, "block_n": rows, "block_k": configs.MMA_COLUMNS * warps, "num_warps": warps}


SPACES = {
    "sm_": {
        "gemm": {
            "rule": {"block_m": (16, 32, 64, 128)},
            "both": {
                "block_n": (32, 64, 128, 256), "block_k": (64, 128, 256), "num_warps": (4, 8),
                "num_stages": (2, 3, 4, 5), "descriptors": (False, True),
            },
        },
        "hopper": {
            "rule": {"block_m": (8, 16, 32, 64, 128), "gather": (False, True)},
            "both": {
                "block_k": (64, 128, 256), "num_stages": (2, 3, 4, 5, 6, 7, 8), "programs": (1, 2, 3), "turns": (1, 2),
            },
            "gemm1": {"width": tuple({"num_warps": w, "block_n": n} for w, n in ((4, 32), (4, 64), (8, 128)))},
            "gemm2": {"width": tuple({"num_warps": w, "block_n": n} for w, n in ((4, 64), (4, 128), (8, 256)))},
        },
        "mma": {"rule": {"block_m": (1,)}, "both": {"maxnreg": (0, 128)}}
        | {part: {"width": tuple(_mma(rows, warps) for warps in (1, 2, 4, 8, 16))}
           for part, rows in zip(GEMMS, configs.MMA_ROWS)},
        "matvec": _MATVEC,
    },
    "gfx": {
        "gemm": {
            "rule": {"block_m": (16, 32, 64, 128, 256)},
            "both": {
                "block_n": (32, 64, 128, 256), "block_k": (64, 128, 256), "num_warps": (4, 8), "num_stages": (2, 3, 4),
                "matrix_instr_nonkdim": (0, 16, 32), "waves_per_eu": (0, 1, 2),
            },
        },
        "matvec": _MATVEC,
    },
}  # fmt: skip
"""What is tried, by the beginning of an architecture's name and the kernels: values in order, of rules and of each
product. ``gemm1`` and ``gemm2`` beside ``both`` hold what is one product's alone. A value that is a dict is of several
fields, which change together."""

_HOPPER = {"block_k": 64, "num_warps": 4, "num_stages": 4, "programs": 2}
PARTNERS: dict[str, dict[str, Json]] = {
    "gemm": dict.fromkeys(GEMMS, {"block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2}),
    "hopper": {"gemm1": {"block_n": 64, **_HOPPER}, "gemm2": {"block_n": 128, **_HOPPER}},
    "mma": {part: _mma(rows, 4) | {"num_stages": 1} for part, rows in zip(GEMMS, configs.MMA_ROWS)},
    "matvec": dict.fromkeys(GEMMS, {"block_n": 16, "block_k": 512, "num_warps": 4, "num_stages": 1}),
}  # fmt: skip
"""The tile of a product that is not being tuned, under any rule; where a search begins if nothing is configured."""


def space_of(arch: str, more: dict | None = None) -> dict[str, dict[str, dict[str, tuple]]]:
    """The space of ``arch`` by kernels, each as ``rule``, ``gemm1`` and ``gemm2``; what ``more`` names replaces what is
    there."""
    base = next(space for start, space in SPACES.items() if arch.startswith(start))
    if unknown := (more or {}).keys() - base:
        raise ValueError(f"a space has {min(unknown)!r}; it takes {', '.join(base)}")
    result = {}
    for kernels, space in base.items():
        parts = {name: dict(space.get(name, {})) for name in ("rule", "both", *GEMMS)}
        for name, values in (more or {}).get(kernels, {}).items():
            if name not in parts:
                raise ValueError(f"the space of {kernels} has {name!r}; it takes {', '.join(parts)}")
            parts[name] |= values
        both = parts.pop("both")
        result[kernels] = {name: {k: tuple(v) for k, v in ((both | own) if name in GEMMS else own).items()}
                           for name, own in parts.items()}  # fmt: skip
    return result


def changed(tile: Json, name: str, value: object) -> Json:
    """``tile`` with a value of the space."""
    return tile | (value if isinstance(value, dict) else {name: value})


_DEFAULTS = {f.name: f.default for kind in (Tiles, Gemm) for f in fields(kind) if f.default is not MISSING} | {
    "matrix_instr_nonkdim": 0, "waves_per_eu": 0, "maxnreg": 0, "kernels": "gemm",
}  # fmt: skip
"""Of fields, and of compiler options: 0 leaves the choice to the compiler."""


def gemm_json(gemm: Gemm) -> Json:
    """As a file holds it."""
    own = {f.name: getattr(gemm, f.name) for f in fields(Gemm) if f.name != "options"} | gemm.options
    return normal(own)


def rule_json(tiles: Tiles) -> Json:
    """What the products of ``tiles`` share, as a file holds it."""
    shared = {f.name: getattr(tiles, f.name) for f in fields(Tiles) if f.name not in (LIMIT, *GEMMS)}
    return normal(shared | {"kernels": tiles.kernels})


def normal(part: Json) -> Json:
    """A rule or a gemm without what is as it would be anyway, so that equal ones are equal, and files short."""
    return {name: value for name, value in part.items() if name not in _DEFAULTS or value != _DEFAULTS[name]}


def kernels_of(rule: Json) -> str:
    return rule.get("kernels", "gemm")


def file_rule(limit: float | None, rule: Json, gemm1: Json, gemm2: Json) -> Json:
    """A rule as files hold it."""
    shared = {name: value for name, value in rule.items() if name != "kernels"}
    return {LIMIT: limit, **shared, "gemm1": gemm1, "gemm2": gemm2}


def tiles_of(rule: Json, gemm1: Json, gemm2: Json) -> Tiles:
    """Raises ValueError where ``configs`` does not take them, or takes them for other kernels than ``rule`` says."""
    tiles = configs.rule("candidate", file_rule(None, rule, gemm1, gemm2))
    if tiles.kernels != kernels_of(rule):
        raise ValueError(f"candidate: its kernels are {tiles.kernels!r}, not {kernels_of(rule)!r}")
    return tiles


def taken(rule: Json, gemms: dict[str, Json]) -> bool:
    """Whether :func:`tiles_of` takes them."""
    try:
        tiles_of(rule, **gemms)
    except ValueError:
        return False
    return True


def with_partner(part: str, rule: Json, tile: Json) -> dict[str, Json]:
    """Tiles of both products for measuring one part, which has ``tile``."""
    return PARTNERS[kernels_of(rule)] | ({part: tile} if part in GEMMS else {})


def fits(part: str, rule: Json, tile: Json) -> bool:
    """Whether there is room for what the tile holds, as far as that is known without compiling. Of "hopper", of whose
    fields not all go together: and whether configs takes it."""
    kernels = kernels_of(rule)
    if part == BASE:
        return True
    if kernels == "hopper":
        if not taken(rule, with_partner(part, rule, tile)):
            return False
        rows, turns = tile["block_n"] * (2 if part == "gemm1" else 1), tile.get("turns", 1)
        # Of shared memory: a ring of activations (bf16), weights and barriers; 1 KiB a warp for what the ending turns;
        # what one of two groups of warps hands to the other.
        stage = tile["block_k"] * (2 * rule["block_m"] + rows) + 64
        handed = 4 * rows * rule["block_m"] * (turns - 1)
        return tile["programs"] * (tile["num_stages"] * stage + 1024 * tile["num_warps"] + handed) <= 227 << 10
    if kernels == "matvec":
        # Of registers: each 4 codes of a piece take two of a lane's, for this piece and the next one. 128, of NVIDIA's
        # 255 and 32 lanes; AMD GPUs would have room for more.
        rows = tile["block_n"] * (2 if part == "gemm1" else 1)
        return rows * tile["block_k"] <= 32 * tile["num_warps"] * 4 * 64
    return True


def can_run(part: str, rule: Json, tile: Json, shape: Sequence[int]) -> bool:
    """Whether there is room for a tile, and weights of ``shape`` have a stage for each of its turns."""
    if not fits(part, rule, tile):
        return False
    if part == BASE or kernels_of(rule) != "hopper":
        return True
    at = GEMMS.index(part)
    return shape[at] > tiles_of(rule, **with_partner(part, rule, tile)).more_than[at]


def key(tile: Json) -> str:
    return json.dumps(tile, sort_keys=True)


@dataclass(frozen=True)
class Point:
    """What is tuned for: a shape of tile files and a number of tokens."""

    row: str
    """The name of one of a file of shapes."""
    shape: tuple[int, int, int, int]
    """hidden, intermediate, experts (the global ones), topk."""
    T: int

    @property
    def layer(self) -> tuple[str, tuple[int, int, int, int]]:
        """What points of all T share. Rows of several files may have one name."""
        return self.row, self.shape

    @property
    def rows(self) -> float:
        """Rows per expert, by which files choose."""
        return self.T * self.shape[3] / self.shape[2]

    def served_by(self, tiles: Tiles) -> bool:
        """Whether a rule is for its calls, as far as their number of rows goes."""
        return tiles.serves(self.T, self.shape[3], self.shape[2])


@dataclass(frozen=True)
class Trial:
    """A tile for one part of one point's calls, under a rule."""

    point: Point
    part: str
    """One of PARTS."""
    rule: str
    tile: str
    """Keys; the base has an empty tile."""

    @property
    def kernels(self) -> str:
        return kernels_of(json.loads(self.rule))

    def json(self) -> Json:
        point = dict(row=self.point.row, shape=self.point.shape, T=self.point.T)
        return {**point, "part": self.part, "rule": json.loads(self.rule), "tile": json.loads(self.tile)}

    @staticmethod
    def of(entry: Json) -> "Trial":
        point = Point(entry["row"], tuple(entry["shape"]), entry["T"])
        return Trial(point, entry["part"], key(entry["rule"]), key(entry["tile"]))


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
    """For one part of one point's calls under one rule: coordinate descent through the space, one field at a time from
    the best so far, begun at what is configured and at whatever is good for others."""

    def __init__(self, point: Point, part: str, rule: Json, start: Json, space: dict[str, tuple]):
        self.point, self.part, self.rule, self.start, self.space = point, part, rule, start, space
        self.times: dict[str, float | None] = {}
        """Microseconds by key of every tile that was tried; None: not usable."""

    def trial(self, tile: Json) -> Trial:
        return Trial(self.point, self.part, key(self.rule), key(tile))

    @property
    def best(self) -> tuple[Json, float] | None:
        usable = [(us, name) for name, us in self.times.items() if us is not None]
        if not usable:
            return None
        us, name = min(usable)
        return json.loads(name), us

    def neighbours(self, tile: Json) -> Iterable[Json]:
        for name, values in self.space.items():
            for value in values:
                if (other := normal(changed(tile, name, value))) != tile:
                    yield other

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
        new = [json.loads(name) for name in dict.fromkeys(map(key, wanted)) if name not in self.times]
        return [tile for tile in new if can_run(self.part, self.rule, tile, self.point.shape)]


Candidates = dict[str, dict[str, dict[str, list[Json]]]]
"""Tiles by kernels, by the key of a rule, and by part."""


def candidates_of(rules: Sequence[Json]) -> Candidates:
    """From rules as tile files have them. Raises ValueError where ``configs`` does not take one."""
    result: Candidates = {}
    for i, rule in enumerate(rules):
        tiles = configs.rule(f"candidate {i}", {LIMIT: None, **rule})
        shared = rule_json(tiles)
        parts = result.setdefault(tiles.kernels, {}).setdefault(key(shared), {name: [] for name in GEMMS})
        for name in GEMMS:
            if (tile := gemm_json(getattr(tiles, name))) not in parts[name]:
                parts[name].append(tile)
    return result


def has_room(point: Point, rule: Json) -> bool:
    """Whether a rule's tile is large enough for routing that is not uniform."""
    return kernels_of(rule) != "hopper" or point.rows <= ROOM.get(rule["block_m"], math.inf)


def rules_of_space(kernels: str, space: dict[str, tuple]) -> list[Json]:
    """All that ``configs`` takes."""
    choices = [normal(dict(zip(space, values)) | {"kernels": kernels}) for values in product(*space.values())]
    return [rule for rule in choices if taken(rule, PARTNERS[kernels])]


def rules_to_try(point: Point, kernels: str, choices: Sequence[Json], width: float = 4.0) -> list[Json]:
    """Those of ``choices`` whose block_m is not far from the rows that an expert gets: at most ``width`` times as many,
    not less than a ``width``-th, and the nearest one in any case. "mma" and "matvec", which have no tiles of rows: if
    there are few. Of those that have room."""
    choices = [rule for rule in choices if has_room(point, rule)]
    if not choices or kernels in ("mma", "matvec") and point.rows > MATVEC_ROWS:
        return []
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

    @staticmethod
    def of_file(rule: Json) -> "Tile":
        tiles = configs.rule("rule", rule)
        return Tile.of(rule_json(tiles), *(gemm_json(getattr(tiles, name)) for name in GEMMS))

    def json(self, limit: float | None) -> Json:
        return file_rule(limit, *map(json.loads, (self.rule, self.gemm1, self.gemm2)))

    @cached_property
    def block_m(self) -> int:
        return json.loads(self.rule)["block_m"]

    @cached_property
    def kernels(self) -> str:
        return kernels_of(json.loads(self.rule))

    @cached_property
    def parts(self) -> dict[str, str]:
        """The key of each part's tile."""
        return {"gemm1": self.gemm1, "gemm2": self.gemm2, BASE: key({})}


class Table:
    """What was measured of points: the time of a tile is the base's, and what each product's tile changes of it."""

    def __init__(self, results: dict[Trial, Result], kernels: Sequence[str] = CALLS[0]):
        self.kernels = kernels
        """Those that the calls are admitted to."""
        self.times: dict[Point, dict[tuple[str, str], dict[str, float]]] = {}
        """Microseconds by point, then by (rule, part), then by tile."""
        for trial, result in results.items():
            if result.usable is not None:
                parts = self.times.setdefault(trial.point, {})
                parts.setdefault((trial.rule, trial.part), {})[trial.tile] = result.usable
        self.least = {point: self.us(point, best[0]) for point in self.times if (best := self.best(point))}
        """Microseconds of the fastest tile, of points where there is one."""

    def us(self, point: Point, tile: Tile) -> float | None:
        measured = self.times[point]
        times = {part: measured.get((tile.rule, part), {}).get(name) for part, name in tile.parts.items()}
        if None in times.values():
            return None
        us = times["gemm1"] + times["gemm2"] - times[BASE]
        return us if us > 0 else None  # times that contradict each other

    def best(self, point: Point, within: float = 0.0) -> list[Tile]:
        """The tiles of each rule whose products are its fastest there, the fastest first; with ``within`` those alone
        that are at most that share slower than the first."""
        found = []
        for rule in dict.fromkeys(rule for rule, _ in self.times[point]):
            products = [self.times[point].get((rule, name)) for name in GEMMS]
            if all(products):
                tile = Tile(rule, *(min(times, key=times.get) for times in products))
                if self.us(point, tile) is not None:
                    found.append(tile)
        found.sort(key=lambda tile: self.us(point, tile))
        if not found:
            return []
        least = self.us(point, found[0])
        return [tile for tile in found if self.us(point, tile) <= least * (1 + within)]

    def candidates(self, points: Iterable[Point], within: float) -> list[Tile]:
        """All that are :meth:`best` somewhere."""
        return list(dict.fromkeys(tile for point in points for tile in self.best(point, within)))

    def over_best(self, point: Point, tile: Tile) -> float | None:
        """The time of ``tile`` over that of the fastest, None where it was not measured."""
        us, least = self.us(point, tile), self.least.get(point)
        return None if us is None or least is None else us / least


def tables_of(results: dict[Trial, Result]) -> list[Table]:
    """A table for each of ``CALLS`` that some rows' calls belong to, in that order, of these rows and kernels.

    Calls of a layer are admitted to what was tried for them. Points without a tile that serves every call are left out,
    and what was tried without room (:func:`has_room`), such as what was configured.
    """
    results = {trial: result for trial, result in results.items() if has_room(trial.point, json.loads(trial.rule))}
    of = lambda kernels: {trial: result for trial, result in results.items() if trial.kernels in kernels}
    served = set(Table(of(CALLS[-1])).least)
    tables = []
    for kernels in CALLS:
        layers = {trial.point.layer for trial in of(kernels[:1])}
        own = {trial: r for trial, r in of(kernels).items() if trial.point in served and trial.point.layer in layers}
        tables.append(Table(own, kernels))
    return [table for table in tables if table.times]


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
    per_rule: float = 0.0, unknown: float = 1.3,
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


def merged(chains: Sequence[list[Json]]) -> list[Json]:
    """The rules of a file. ``chains``: rules for calls that are admitted to fewer and fewer kernels; those of a file's
    default rules end with one for "gemm" alone.

    Up to each limit in turn there is the rule of the first chain, and, unless that serves every call, the next chain's
    for those that pass over it, until one serves every call. So limits rise for each kind of kernels, and the last rule
    is of "gemm" if a chain is. Then rules are joined as long as every call has the same tile as before.
    """
    chains = [[(_end(rule), Tile.of_file(rule)) for rule in chain] for chain in chains]
    ends = sorted({end for chain in chains for end, _ in chain})
    rules = []
    for end in ends:
        known = set()
        for chain in chains:
            tile = next((tile for limit, tile in chain if limit >= end), None)
            if tile is not None and not known & {tile.kernels, "gemm"}:
                known.add(tile.kernels)
                rules.append((end, tile))
    return [tile.json(None if end == math.inf else end) for end, tile in _joined(rules, ends)]


def _end(rule: Json) -> float:
    """The most rows per expert that a rule is good for."""
    most = MATVEC_ROWS if rule["block_m"] == 1 else math.inf
    return most if rule[LIMIT] is None else min(rule[LIMIT], most)


def _joined(rules: list[tuple[float, Tile]], ends: list[float]) -> list[tuple[float, Tile]]:
    """Of two rules with one tile one with the later limit is enough, at the place of either, if all calls then have the
    tiles that they had."""

    def served(rules: list[tuple[float, Tile]]) -> list[Tile]:
        return [
            next((tile for end, tile in rules if rows <= end and tile.kernels in kernels), None)
            for kernels in CALLS for rows in ends
        ]  # fmt: skip

    for i, j in combinations(range(len(rules)), 2):
        if rules[i][1] == rules[j][1]:
            without = [*rules[:i], *rules[i + 1 : j], *rules[j + 1 :]]
            for place in (i, j - 1):
                fewer = [*without[:place], rules[j], *without[place:]]
                if served(fewer) == served(rules):
                    return _joined(fewer, ends)
    return rules


def file_of(tables: Sequence[Table], within: float, old: Json | None = None, keep_default: bool = False) -> Json:
    """The content of a tile file: default rules, and shapes of their own where those cost more than ``within``.

    A shape's own rules are for the calls that most kernels take; others pass over them, to the default rules. They go
    as far as the default rules cost too much; beyond, these know more.

    ``tables``: those of :func:`tables_of`, at least one. ``old``: a file whose shapes that were not tuned now stay, and
    whose default rules do too with ``keep_default``.
    """
    if keep_default:
        rules = old["tiles"]
    else:
        chains = []
        for table in tables:
            points = list(table.times)
            per_rule = math.log1p(within) * max(1.0, len(points) / 10)
            chains.append(reduce(points, table.candidates(points, within), table.over_best, None, per_rule))
        rules = merged(chains)
    shapes = {tuple(shape[name] for name in SIZES): shape for shape in (old or {}).get("shapes", [])}
    for shape in dict.fromkeys(point.shape for table in tables for point in table.times):
        table = next(table for table in tables if any(point.shape == shape for point in table.times))
        points = [point for point in table.times if point.shape == shape]
        costs = {point: table.over_best(point, chosen(rules, point, table.kernels)) for point in points}
        shapes.pop(shape, None)
        if dear := [point.rows for point, c in costs.items() if c is None or c > 1 + within]:
            beyond = min((point.rows for point in points if point.rows > max(dear)), default=1.25 * max(dear))
            points = [point for point in points if point.rows <= max(dear)]
            here = table.candidates(points, max(within, 0.25))
            chain = reduce(points, here, table.over_best, within) or reduce(points, here, table.over_best, None)
            chain[-1][LIMIT] = limit_between(max(dear), beyond)
            shapes[shape] = {**dict(zip(SIZES, shape)), "tiles": merged([chain])}
    return {"tiles": rules} | ({"shapes": list(shapes.values())} if shapes else {})


SIZES = ("hidden", "intermediate", "experts", "topk")


def json_of(config: Config) -> Json:
    """As a file holds it."""
    listed = lambda rules: [
        file_rule(tiles.rows_per_expert, rule_json(tiles), *(gemm_json(getattr(tiles, name)) for name in GEMMS))
        for tiles in rules
    ]
    shapes = [{**dict(zip(SIZES, shape)), "tiles": listed(rules)} for shape, rules in config.shapes.items()]
    return {"tiles": listed(config.tiles)} | ({"shapes": shapes} if shapes else {})


def rules_of(data: Json, shape: tuple[int, int, int, int]) -> list[Json]:
    """Of a file, those for a shape, in their order, as :meth:`configs.Config.rules`."""
    own = (one["tiles"] for one in data.get("shapes", []) if tuple(one[name] for name in SIZES) == shape)
    return [*next(own, []), *data["tiles"]]


def chosen(rules: list[Json], point: Point, kernels: Sequence[str] = CALLS[0]) -> Tile:
    """The one of a file's ``rules`` that serves a point's calls, which are admitted to ``kernels``."""
    tiles = ((rule, configs.rule("rule", rule)) for rule in rules)
    return next(Tile.of_file(rule) for rule, one in tiles if point.served_by(one) and one.kernels in kernels)


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
