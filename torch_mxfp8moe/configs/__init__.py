"""Tuned values as data: JSON files, read once, checked when they are read.

``triton/<arch>.json`` (``sm_90.json``, ``gfx950.json``; ``default.json`` for an architecture that has none) holds the
tile sizes of the Triton kernels, and ``triton/<arch>-bf16.json``, if it is there, those for bf16 activations, where
that is another matrix instruction::

    {"tiles": [RULE, ...], "shapes": [{"hidden": H, "intermediate": I, "experts": E, "topk": K, "tiles": [RULE, ...]}]}

    RULE = {"rows_per_expert": 16, "block_m": 16, "gemm1": GEMM, "gemm2": GEMM, "gather": true}
    GEMM = {"block_n": 64, "block_k": 128, "num_warps": 4, "num_stages": 4, "descriptors": true, ...}

Of the rules of a shape, if it is listed, and then those of ``tiles``, the first one serves a call whose tokens * topk /
experts is at most ``rows_per_expert`` (experts: the global ones under an expert map), or that has one token, if it
serves each route by itself; the last rule has null there and serves the rest. Rules of kernels that do not take every
call are passed over by those that they do not take (:func:`..backends.triton.fused_moe.admits`): rules whose GEMMs have
``programs`` (sm_90; H is a multiple of 64), and rules with block_m 1, in which each route is served by itself, with
``mma`` in both GEMMs on the matrix unit (sm_90; :mod:`..backends.triton.matvec_mma`) and else on the vector units
(:mod:`..backends.triton.matvec`); num_stages is 1. The choice depends on shapes and dtypes only, never on where tokens
are routed. Keys that GEMM has beyond those of :class:`Gemm` are handed to Triton's compiler as options.
``tools/tune_gpu.py`` writes these files.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent

MOST_IN_TURNS = 32
"""Slots of a tile whose stages two groups of warps take in turns."""

MMA_COLUMNS = 256
MMA_ROWS = 8, 16
"""With ``mma``, the columns of K that a warp takes at a time, and the output columns of a program, of w1 and of w2."""

ALIKE = {"sm_103": "sm_100"}
"""Architectures that take the files of another one."""


@dataclass(frozen=True)
class Gemm:
    """The tile of one grouped product, and how it is compiled."""

    block_n: int
    """Rows of the weight, which are output columns. w1: that many gate rows and as many up rows."""
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    """Load through tensor descriptors (TMA)."""
    programs: int = 0
    """Not 0: of the warp-specialized kernel, of which a multiprocessor runs that many programs at a time. num_warps,
    the warps that multiply, is 4 or 8, block_n 16 (w1) or 32 (w2) for each of them, and block_k 64, 128 or 256. Or the
    tile is halved: with 4 warps block_n is 32 (w1) or 64 (w2), and block_k not 64."""
    turns: int = 1
    """2: of the warp-specialized kernel, in which two groups of 4 warps take a tile's stages in turns. There are two or
    more, num_stages is even, and block_m at most MOST_IN_TURNS."""
    mma: bool = False
    """Of routes that are served by themselves (block_m 1): on the matrix unit. block_n is one of MMA_ROWS, and block_k
    MMA_COLUMNS for each warp."""
    options: dict = field(default_factory=dict, hash=False)

    @property
    def more_than(self) -> int:
        """How many columns weights must have more than, for a stage for each turn."""
        return (self.turns - 1) * self.block_k


@dataclass(frozen=True)
class Tiles:
    """The tiles of one call of ``fused_moe``."""

    rows_per_expert: float | None
    block_m: int
    """Routes of one expert that a tile takes; 1: no tiles, each route by itself."""
    gemm1: Gemm
    gemm2: Gemm
    gather: bool = False
    """With programs: gemm1 reads activations where their tokens are; they are not copied for each expert before. It has
    1 turn."""

    @property
    def kernels(self) -> str:
        """Which ones they are for: "mma", "matvec", "hopper", or those for every call, "gemm"."""
        if self.block_m == 1:
            return "mma" if self.gemm1.mma else "matvec"
        return "hopper" if self.gemm1.programs else "gemm"

    def serves(self, tokens: int, topk: int, experts: int) -> bool:
        """Whether the rule is for calls of that many. A token's experts are all different: alone it shares no weights,
        however few experts there are."""
        limit = self.rows_per_expert
        return limit is None or tokens * topk <= limit * experts or self.block_m == 1 and tokens == 1

    @property
    def more_than(self) -> tuple[int, int]:
        """What H and I must be more than."""
        return self.gemm1.more_than, self.gemm2.more_than


@dataclass(frozen=True)
class Config:
    """One file."""

    tiles: tuple[Tiles, ...]
    shapes: dict[tuple[int, int, int, int], tuple[Tiles, ...]]
    """By (hidden, intermediate, experts, topk)."""

    def rules(self, shape: tuple[int, int, int, int]) -> tuple[Tiles, ...]:
        """Of a shape, in their order."""
        return self.shapes.get(shape, ()) + self.tiles

    def choose(
        self, *, tokens: int, hidden: int, intermediate: int, experts: int, topk: int,
        admits: Callable[[Tiles], bool] = lambda tiles: tiles.kernels == "gemm",
    ) -> Tiles:  # fmt: skip
        """The tiles of a call with these sizes; ``experts`` are those that the tokens spread over. ``admits`` says
        whether the kernels that some tiles are for take the call."""
        for tiles in self.rules((hidden, intermediate, experts, topk)):
            if tiles.serves(tokens, topk, experts) and admits(tiles):
                return tiles
        raise AssertionError("the last rule has no limit")


def _power_of_two(where: str, name: str, value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high or value & (value - 1):
        raise ValueError(f"{where}: {name} is {value!r}; it takes a power of two from {low} to {high}")
    return value


def _gemm(where: str, data: dict, rows_a_warp: int, mma_rows: int, block_m: int) -> Gemm:
    data = dict(data)
    by_route = block_m == 1
    tile = Gemm(
        block_n=_power_of_two(where, "block_n", data.pop("block_n", None), 2 if by_route else 32, 256),
        block_k=_power_of_two(where, "block_k", data.pop("block_k", None), 32, 4096 if by_route else 512),
        num_warps=_power_of_two(where, "num_warps", data.pop("num_warps", None), 1, 16),
        num_stages=data.pop("num_stages", None),
        descriptors=data.pop("descriptors", False),
        programs=data.pop("programs", 0),
        turns=data.pop("turns", 1),
        mma=data.pop("mma", False),
        options=data,
    )
    most = 1 if by_route else 8
    if type(tile.num_stages) is not int or not 1 <= tile.num_stages <= most:
        raise ValueError(f"{where}: num_stages is {tile.num_stages!r}; it takes 1 to {most}")
    if not isinstance(tile.descriptors, bool):
        raise ValueError(f"{where}: descriptors is {tile.descriptors!r}; it takes true or false")
    if type(tile.programs) is not int or not 0 <= tile.programs <= 8:
        raise ValueError(f"{where}: programs is {tile.programs!r}; it takes 0 to 8")
    if tile.programs:
        sizes = tile.num_warps, tile.block_n, tile.block_k
        takes = [(warps, rows_a_warp * warps, k) for warps in (4, 8) for k in (64, 128, 256)]
        takes += [(4, 2 * rows_a_warp, k) for k in (128, 256)]  # halved
        if sizes not in takes:
            raise ValueError(f"{where}: num_warps, block_n and block_k are {sizes}; with programs it takes {takes}")
        if tile.num_stages < 2:  # a stage is given back when the next one is at work
            raise ValueError(f"{where}: num_stages is {tile.num_stages}; with programs it takes 2 to 8")
    if type(tile.turns) is not int or not 1 <= tile.turns <= 2:
        raise ValueError(f"{where}: turns is {tile.turns!r}; it takes 1 or 2")
    if tile.turns == 2 and not (tile.programs and tile.num_warps == 4 and tile.num_stages % 2 == 0):
        raise ValueError(f"{where}: turns is 2; with it programs is not 0, num_warps is 4 and num_stages even")
    if not isinstance(tile.mma, bool) or tile.mma and not by_route:
        raise ValueError(f"{where}: mma is {tile.mma!r}; true takes block_m 1")
    sizes = tile.num_warps, tile.block_n, tile.block_k
    takes = tile.num_warps, mma_rows, MMA_COLUMNS * tile.num_warps
    if tile.mma and sizes != takes:
        raise ValueError(f"{where}: num_warps, block_n and block_k are {sizes}; with mma it takes {takes}")
    return tile


def rule(where: str, data: dict) -> Tiles:
    """One rule, checked by itself; ``where`` is its name in errors."""
    if set(data) - {"gather"} != {"rows_per_expert", "block_m", "gemm1", "gemm2"}:
        takes = "rows_per_expert, block_m, gemm1 and gemm2, and may have gather"
        raise ValueError(f"{where}: has the keys {sorted(data)}; it takes {takes}")
    block_m = data["block_m"]
    if type(block_m) is not int or block_m not in (1, 8, 16, 32, 64, 128, 256):
        raise ValueError(f"{where}: block_m is {block_m!r}; it takes 1 or a power of two from 8 to 256")
    gemm1 = _gemm(f"{where}, gemm1", data["gemm1"], 16, MMA_ROWS[0], block_m)
    gemm2 = _gemm(f"{where}, gemm2", data["gemm2"], 32, MMA_ROWS[1], block_m)
    if (gemm1.programs > 0) != (gemm2.programs > 0) or gemm1.programs and not 8 <= block_m <= 128:
        raise ValueError(f"{where}: with programs in one gemm they are in both, and block_m is 8 to 128")
    if gemm1.mma != gemm2.mma:
        raise ValueError(f"{where}: with mma in one gemm it is in both")
    gather = data.get("gather", False)
    if type(gather) is not bool or gather and not (gemm1.programs and gemm1.turns == 1):
        raise ValueError(f"{where}: gather is {gather!r}; true takes programs, and 1 turn in gemm1")
    if block_m > MOST_IN_TURNS and max(gemm1.turns, gemm2.turns) > 1:
        raise ValueError(f"{where}: block_m is {block_m}; with turns it takes 8 to {MOST_IN_TURNS}")
    if block_m == 8 and not gemm1.programs:
        raise ValueError(f"{where}: block_m is 8; without programs it takes 1 or a power of two from 16 to 256")
    return Tiles(data["rows_per_expert"], block_m, gemm1, gemm2, gather)


def _rules(where: str, rules: list[dict], for_all: bool) -> tuple[Tiles, ...]:
    """``for_all``: there are no others after them."""
    result = []
    before = {}  # by the calls that a rule is for, the last limit
    for i, data in enumerate(rules):
        here = f"{where}, rule {i}"
        tiles = rule(here, data)
        rows, kernels, last = tiles.rows_per_expert, tiles.kernels, i == len(rules) - 1
        limit = before.get((kernels, tiles.more_than), 0.0)
        if rows is None:
            fits = last or kernels != "gemm" and limit < math.inf
        else:
            fits = not (last and for_all) and type(rows) in (int, float) and rows > limit
        if not fits:
            raise ValueError(f"{here}: rows_per_expert is {rows!r}; it takes rising numbers, and null in the last rule")
        before[kernels, tiles.more_than] = math.inf if rows is None else rows
        result.append(tiles)
    if not result:
        raise ValueError(f"{where}: there is no rule; it takes one or more")
    if for_all and result[-1].kernels != "gemm":
        raise ValueError(f"{where}: the last rule has programs or block_m 1; it serves every call, so it has neither")
    return tuple(result)


def parse(where: str, data: dict) -> Config:
    """The content of a file, checked; ``where`` is its name in errors."""
    if set(data) - {"tiles", "shapes"} or "tiles" not in data:
        raise ValueError(f"{where}: has the keys {sorted(data)}; it takes tiles and shapes")
    shapes = {}
    for shape in data.get("shapes", []):
        key = tuple(shape.get(name) for name in ("hidden", "intermediate", "experts", "topk"))
        if set(shape) != {"hidden", "intermediate", "experts", "topk", "tiles"} or key in shapes:
            raise ValueError(f"{where}: shape {shape} has other keys than it takes, or is there twice")
        if any(type(size) is not int or size <= 0 for size in key):
            raise ValueError(f"{where}: shape {key} takes positive whole numbers")
        shapes[key] = _rules(f"{where}, shape {key}", shape["tiles"], for_all=False)
    return Config(_rules(where, data["tiles"], for_all=True), shapes)


@cache
def load(arch: str, activation_dtype: str = "mxfp8") -> Config:
    """The Triton kernels' tiles on ``arch``."""
    arch = ALIKE.get(arch, arch)
    paths = [FOLDER / "triton" / f"{name}.json" for name in (f"{arch}-{activation_dtype}", arch, "default")]
    path = next(path for path in paths if path.exists())
    return parse(path.name, json.loads(path.read_text()))


def choose(arch: str, activation_dtype: str, **call) -> Tiles:
    """What :meth:`Config.choose` gives, with the file for ``arch``."""
    return load(arch, activation_dtype).choose(**call)
