#!/usr/bin/env python
"""Choose the tiles of the Triton kernels for this GPU and write torch_mxfp8moe/configs/triton/<arch>.json.

For every row of test/shapes.csv, or of a file of your own (--shapes), that is asked for and every token count, for all
kernels that take its calls and each block_m that may suit it, the tile of each of the two products of a layer is tuned
by itself: from the configured tile, and from what is good for other points, one field is changed at a time as long as
that helps. What is timed is the whole call, the other product having a tile that stays the same. Candidates are
compiled in many processes before they are timed. Before a time is believed every element of the layer's output is
compared with the reference op's, and the bytes of several runs with one another, from memory that was filled with NaN:
there are tiles that are fast and wrong.

Every result goes at once to a file of JSON lines (--journal). A second run picks it up, where the GPU, Triton, the
kernels' source and a row's name and sizes are the same; a candidate that crashed the process or hung is not tried
again, and the run goes on. At the end, or when --minutes are over, the winners are reduced to as few rules as stay
within --within percent of the best of each point: default rules for all shapes, and rules of a shape's own where those
cost it more. Below rules of kernels that do not take every call there are the best ones for calls that pass over them.

--candidates tries the tiles of a list and no others, which takes minutes where the search takes a day. What is shipped
for H100 came from tools/bench/candidates/sm_90.json.

--write measures nothing: it makes the file from a journal, and needs no GPU.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test"))

import torch_mxfp8moe  # noqa: E402
from bench import timing, tuning  # noqa: E402
from bench.compiling import Task, compile_all, settle_keys  # noqa: E402
from bench.peers import in_layout  # noqa: E402
from bench.tuning import BASE, GEMMS, Journal, Json, Point, Result, Search, Table, Tile, Trial, key  # noqa: E402
from options import add_rows, check_counts, read_json, settle_rows  # noqa: E402
from shapes import Row, rows  # noqa: E402
from terminal import progress  # noqa: E402
from torch_mxfp8moe import configs  # noqa: E402
from torch_mxfp8moe.layouts import LAYOUTS  # noqa: E402

TOKENS = (1, 2, 3, 4, 5, 6, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Close together where few tokens decide which kernel takes a call: rules from 2, 4 and 8 cost up to 20 % between."""

RUNS = 5
"""Of each candidate that is compared."""

HANG = 60.0
"""Seconds after which a candidate is taken to hang."""

RESTART = 75
"""Exit status of a worker that has to be started again: a candidate hung, or left the GPU unusable."""

MOST_CALLS = 64
"""In a graph."""

SLOW = 1.15
"""A call's time over that with the best tile, above which one is not looked into; of products alone it is more."""

UNTIL = "MXFP8MOE_TUNE_UNTIL"
"""Set for workers: the time when they end."""

TOKEN_ERROR, ELEMENT_ERROR = 1e-2, 0.05
"""Largest relative L2 of a token, and largest error of an element over the root mean square of its token, of a right
tile: the output's bf16 makes 2 to 4e-3 of the first, and a wrong 64 columns of a tile's K some 4e-2."""

FLIPS, GROSS = 4e-3, 0.1
"""Share of tokens that may be further off, by up to GROSS: sums in another order round a value between the products to
its other neighbour in MXFP8 now and then, which is much to a token if the value is large. Tiles that are wrong in some
runs only are found by comparing runs, which allows nothing."""


def what_is_wrong(outs: list[torch.Tensor], want: torch.Tensor) -> str:
    """Of several runs' outputs [T, H] and the fp32 reference: "" if nothing is."""
    first = outs[0]
    for i, out in enumerate(outs[1:], 2):
        different = (out.view(torch.uint8) != first.view(torch.uint8)).view(*out.shape, -1).any(-1)
        if different.any():
            return f"run {i} differs from the first in {int(different.sum())} of {out.numel()} elements"
    error, size = (first.float() - want).abs(), want.norm(dim=1)
    bound = ELEMENT_ERROR / want.shape[1] ** 0.5 * size[:, None] + want.abs() * 2**-6
    far = (error > bound).any(1)
    of_token = error.norm(dim=1) / size.clamp(min=1e-30)
    off = far | ~(of_token <= TOKEN_ERROR)  # NaN is off
    if off.sum() > int(FLIPS * len(want)) or not bool((of_token <= GROSS).all()):
        worst = float(of_token.nan_to_num(torch.inf).max())
        return f"{int(off.sum())} of {len(want)} tokens are off, by up to {worst:.1e}"
    return ""


def weight_bytes(row: Row) -> int:
    """Of a row's w1 and w2."""
    return 3 * row.local * row.hidden * row.intermediate


def copies_of(row: Row) -> int:
    """How many copies of a row's weights take turns, for them to be more than the last-level cache holds."""
    return math.ceil(timing.FLUSH_BYTES / weight_bytes(row))


def calls_of(row: Row, T: int) -> int:
    """How many calls of T tokens take turns, for what they read of weights to be more than that too."""
    share = 1 - (1 - row.topk / row.experts) ** T  # of the experts, that a call reaches
    return max(timing.calls_of(T), min(MOST_CALLS, math.ceil(timing.FLUSH_BYTES / (share * weight_bytes(row)))))


class Measured:
    """The calls of one point on this GPU, and what they must give. ``weights``: copies, which they take in turns."""

    def __init__(self, row: Row, weights: list[dict], T: int, activations: str, layout: str = "row_major"):
        options = dict(activation_dtype=activations, layout=layout)
        turns = zip(range(calls_of(row, T)), cycle(weights))
        self.calls = [row.call(T, weights=own, **options).with_out() for _, own in turns]
        call = self.calls[0]
        self.want = torch_mxfp8moe.reference.fused_moe(**call.inputs, **row.options, **options, out_dtype=torch.float32)

    def measure(self, part: str, rule: Json, tile: Json, target, slow: float) -> Result:
        """A time of a call with ``tile`` for a part. Above ``slow`` microseconds it is not checked."""
        from torch_mxfp8moe.backends.triton.fused_moe import plan
        from torch_mxfp8moe.backends.triton.launch import WORKSPACE

        made = plan(self.calls[0], target, tuning.tiles_of(rule, **tuning.with_partner(part, rule, tile)))
        bound, workspaces = [], []
        for call in self.calls:
            workspaces.append(torch.empty(made.workspace, dtype=torch.uint8, device=call.device))
            memory = call.inputs | {"out": call.out, WORKSPACE: workspaces[-1]}
            bound.append([launch.bound(memory) for launch in made.launches])
        functions = [lambda launches=launches: [launch.run() for launch in launches] for launches in bound]
        for call in functions:
            call()
        us = timing.in_one_graph(functions, 3)
        if us > slow:
            return Result("slow", us)
        outs = []
        for _ in range(RUNS):
            workspaces[0].fill_(255)
            self.calls[0].out.fill_(torch.nan)
            functions[0]()
            outs.append(self.calls[0].out.clone())
        wrong = what_is_wrong(outs, self.want)
        return Result("wrong", us, wrong) if wrong else Result("ok", timing.in_one_graph(functions, 9))


class Tuner:
    """One row at a time: its searches, in rounds; a round's candidates are compiled together, then measured."""

    def __init__(self, args, journal: Journal, target, until: float):
        self.args, self.journal, self.target, self.until = args, journal, target, until
        self.space = tuning.space_of(target.arch, args.space)
        self.candidates = tuning.candidates_of(args.candidates) if args.candidates else None

    def admitted(self, row: Row) -> list[str]:
        """The kernels that take the row's calls."""
        from torch_mxfp8moe.backends.triton.fused_moe import admits

        weights = in_layout(row.weights("meta"), self.args.layout)
        call = row.call(1, "meta", weights, activation_dtype=self.args.activations, layout=self.args.layout)
        result = []
        for kernels, space in self.space.items():
            rule = {"block_m": space["rule"]["block_m"][0], "kernels": kernels}
            if admits(call, self.target, tuning.tiles_of(rule, **tuning.PARTNERS[kernels])):
                result.append(kernels)
        return result

    def searches(self, row: Row) -> list[Search]:
        """Of each point those for the configured rule come first."""
        config, admitted = configs.load(self.target.arch, self.args.activations), self.admitted(row)
        rules = [tiles for tiles in config.rules(row.shape) if tiles.kernels in admitted]
        result = []
        for T in self.args.tokens:
            point = Point(row.name, row.shape, T)
            serving = [tiles for tiles in rules if point.served_by(tiles)]
            for kernels in dict.fromkeys([*(tiles.kernels for tiles in serving), *admitted]):
                space = self.space[kernels]
                now = [tiles for tiles in serving if tiles.kernels == kernels][:1]
                if self.candidates is None:
                    choices = tuning.rules_of_space(kernels, space["rule"])
                else:
                    choices = [json.loads(name) for name in self.candidates.get(kernels, {})]
                tried = [*map(tuning.rule_json, now), *tuning.rules_to_try(point, kernels, choices)]
                begin = now or [tiles for tiles in rules if tiles.kernels == kernels][-1:]
                for rule in map(json.loads, dict.fromkeys(map(key, tried))):
                    for part in tuning.PARTS:
                        if part == BASE:
                            result.append(Search(point, part, rule, {}, {}))
                            continue
                        starts = [tuning.gemm_json(getattr(tiles, part)) for tiles in begin]
                        if not now or rule != tuning.rule_json(now[0]):
                            starts = self.listed(rule, part) + starts
                        starts.append(tuning.PARTNERS[kernels][part])
                        start = next(tile for tile in starts if tuning.can_run(part, rule, tile, row.shape))
                        result.append(Search(point, part, rule, start, space[part]))
        return result

    def listed(self, rule: Json, part: str) -> list[Json]:
        """The candidates under a rule."""
        return (self.candidates or {}).get(tuning.kernels_of(rule), {}).get(key(rule), {}).get(part, [])

    def seeds(self, search: Search, others: list[Search], most: int) -> list[Json]:
        """The best tiles of the nearest other points, for the same part under the same rule; or the candidates."""
        if self.candidates is not None:
            return [search.start, *self.listed(search.rule, search.part)]
        alike = [o for o in others if (o.part, o.rule) == (search.part, search.rule) and o is not search and o.best]
        alike.sort(key=lambda o: abs(o.point.rows - search.point.rows) / (o.point.rows + search.point.rows))
        return [o.best[0] for o in alike[:most]]

    def tune(self, row: Row, searches: list[Search], known: list[Search], until: float, descend: bool = True) -> None:
        """Goes on with ``searches`` until ``until``. ``known``: those of other rows, whose best tiles are tried too;
        without ``descend`` nothing else is."""
        points, weights = {}, None
        for number in range(1, 1000):
            todo, remembered = self.batch(row, searches, known, descend)
            if not todo and not remembered:
                break
            count, done = sum(map(len, todo.values())), 0
            if todo and weights is None:
                progress(f"weights of {row.name}")
                weights = [in_layout(row.weights(), self.args.layout)]
                weights += [{name: x.clone() for name, x in weights[0].items()} for _ in range(copies_of(row) - 1)]
            for task, failed in compile_all(todo, self.args.jobs):
                for search, tile in todo[task]:
                    done += 1
                    T, where = search.point.T, f"{row.name}, round {number}, {done} of {count}"
                    progress(f"{where}: T={T} {search.part} {key(tile)}")
                    if time.time() > until:
                        return
                    if failed:
                        result = Result("failed", note=failed)
                        self.journal.finish(search.trial(tile), result)
                    else:
                        if T not in points:
                            points[T] = Measured(row, weights, T, self.args.activations, self.args.layout)
                        result = self.attempt(search.trial(tile), points[T], search, tile)
                    search.times[key(tile)] = result.usable
                    if result.status == "wrong":
                        progress("")
                        print(
                            f"wrong: {row.name} T={T} {search.part} {key(search.rule)} {key(tile)}: {result.note}",
                            flush=True,
                        )

    def batch(self, row: Row, searches: list[Search], known: list[Search], descend: bool):
        """What to compile, and for each what to measure of it; and whether the journal knew some of what was wanted."""
        wanted, remembered = [], False
        for search in searches:
            seeds = self.seeds(search, [*searches, *known], 3 if descend else 12)
            wanted += [(i, search, tile) for i, tile in enumerate(search.propose(seeds, descend))]
        wanted.sort(key=lambda one: one[0])  # each search's first ones first: time may be short
        todo: dict[tuple, list[tuple[Search, Json]]] = {}
        for _, search, tile in wanted:
            result = self.journal.results.get(search.trial(tile))
            if result is not None:
                search.times[key(tile)] = result.usable
                remembered = True
            else:
                todo.setdefault((search.part, key(search.rule), key(tile)), []).append((search, tile))
        return {self.task(row, own): own for own in todo.values()}, remembered

    def task(self, row: Row, own: list[tuple[Search, Json]]) -> Task:
        search, tile = own[0]
        gemms = {name: key(one) for name, one in tuning.with_partner(search.part, search.rule, tile).items()}
        tokens = tuple(search.point.T for search, _ in own)
        options = dict(activations=self.args.activations, layout=self.args.layout, arch=self.target.arch)
        options |= dict(part=search.part)
        return Task(row, tokens, **options, rule=key(search.rule), **gemms)

    def attempt(self, trial: Trial, point: Measured, search: Search, tile: Json) -> Result:
        """Measures; ends the process if the candidate hangs or leaves the GPU unusable."""
        slow = SLOW * search.best[1] if search.best else float("inf")
        self.journal.begin(trial)
        watch = threading.Timer(HANG, os._exit, (RESTART,))
        watch.start()
        try:
            result = point.measure(search.part, search.rule, tile, self.target, slow)
        except Exception as error:
            result = Result("failed", note=f"{type(error).__name__}: {error}"[:500])
            try:
                torch.cuda.synchronize()
            except Exception:
                self.journal.finish(trial, Result("crashed", note=result.note))
                os._exit(RESTART)
        finally:
            watch.cancel()
        self.journal.finish(trial, result)
        return result


def row_table(name: str, searches: list[Search]) -> str:
    """What calls take of each point with the tiles that are configured and with the best ones, microseconds of all
    launches."""
    table = Table({s.trial(json.loads(t)): Result("ok", us) for s in searches for t, us in s.times.items() if us})
    lines = [f"\n{name}: all launches, us", f"{'T':>6} {'configured':>11} {'best':>9}  tile"]
    for point in dict.fromkeys(search.point for search in searches):
        own = [search for search in searches if search.point == point]
        starts = {search.part: search.start for search in own if search.rule == own[0].rule}
        now, best = None, []
        if point in table.times:
            now = table.us(point, Tile.of(own[0].rule, *map(starts.get, GEMMS)))
            best = table.best(point)[:1]
        before = "-" if now is None else f"{now:.1f}"
        after = f"{table.least[point]:.1f}" if best else "-"
        tile = "".join(f"  {tile.rule} {tile.gemm1} {tile.gemm2}" for tile in best)
        lines.append(f"{point.T:>6} {before:>11} {after:>9}{tile}")
    return "\n".join(lines)


def write(args, journal: Journal, served: Json | None = None) -> None:
    """The tile file from the results. ``served``: what stands for the old one where there is none."""
    old = json.loads(args.out.read_text()) if args.out.exists() else served
    tables = tuning.tables_of(journal.results)
    if not tables:
        sys.exit(f"nothing to write: {args.journal} has no usable result of kernels that serve every call")
    missing = {(row.name, row.shape) for row in rows().values()}
    missing -= {point.layer for table in tables for point in table.times}
    keep = bool(missing) and old is not None if args.default is None else args.default == "keep"
    if keep and old is None:
        sys.exit(f"--default keep: there is no {args.out}")
    data = tuning.file_of(tables, args.within / 100, old, keep)
    configs.parse(args.out.name, data)
    args.out.write_text(tuning.dump(data))
    counts: dict[str, int] = {}
    for result in journal.results.values():
        counts[result.status] = counts.get(result.status, 0) + 1
    kept = "kept" if keep else "new"
    print(
        f"\n{args.out}: {len(data['tiles'])} default rules ({kept}), {len(data.get('shapes', []))} shapes of their own"
    )
    if gone := kernels_in(old or {}) - kernels_in(data):
        print(f"rules of {', '.join(sorted(gone))} were there and are gone")
    print("results: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    worst = 1.0
    for table in tables:
        for point in table.times:
            cost = table.over_best(point, tuning.chosen(tuning.rules_of(data, point.shape), point, table.kernels))
            worst = max(worst, cost or 1.0)
            if cost is None or cost > 1 + args.within / 100:
                said = "was not measured" if cost is None else f"takes {cost:.3f}"
                print(f"{point.row} T={point.T}, calls that take {', '.join(table.kernels)}: its rule {said}")
    print(f"calls take {worst:.3f} of the best tiles' time at the most")


def kernels_in(data: Json) -> set[str]:
    """Those that a tile file has rules for."""
    lists = [data.get("tiles", []), *(shape["tiles"] for shape in data.get("shapes", []))]
    return {Tile.of_file(rule).kernels for rules in lists for rule in rules}


def work(args, served: Json | None = None) -> int:
    """Tunes on this GPU, until all is done or the time is over. ``served``: as of :func:`write`."""
    import triton

    from torch_mxfp8moe.backends import triton as backend

    settle_keys()
    torch.manual_seed(0)
    stamp = stamp_of(args, triton.__version__, Path(backend.__file__).parent)
    journal = Journal(args.journal, stamp)
    if journal.other:
        print(f"{args.journal}: {journal.other} lines are of another GPU, compiler or source and are passed over")
    until = float(os.environ[UNTIL])
    tuner = Tuner(args, journal, backend.BACKEND.target(torch.device("cuda", 0)), until)
    searches = {name: tuner.searches(row) for name, row in args.rows.items()}
    start, left = time.time(), until - time.time()
    with torch.inference_mode():
        # Then what turned out good elsewhere is tried everywhere, for rules to share, in the last fifth of the time.
        # Candidates: rows that a share of the time was too short for go on in what is left.
        passes = ((True, start + 0.8 * left), (False, until)) if tuner.candidates is None else ((False, until),) * 2
        for number, (descend, end) in enumerate(passes):
            for i, (name, row) in enumerate(args.rows.items()):
                share = (end - time.time()) / (len(args.rows) - i)
                if share <= 0:
                    continue
                known = [search for other in args.rows if other != name for search in searches[other]]
                tuner.tune(row, searches[name], known, time.time() + share, descend)
                progress("")
                if number == 0:
                    print(row_table(name, searches[name]), flush=True)
    write(args, journal, served)
    return 0


def stamp_of(args, triton_version: str, folder: Path) -> Json:
    return dict(
        gpu=torch.cuda.get_device_name(), triton=triton_version, activations=args.activations, layout=args.layout,
        source=tuning.source_hash(folder),
    )  # fmt: skip


def supervise(args, run: Callable[[dict], int]) -> int:
    """Runs workers, one after another, for as long as each leaves something behind."""
    env = os.environ | {UNTIL: str(time.time() + 60 * args.minutes)}
    size = -1
    while True:
        status = run(env)
        now = args.journal.stat().st_size if args.journal.exists() else 0
        if status == RESTART or status < 0:
            if now == size:
                print(f"two workers in turn ended with {status} and no result", file=sys.stderr)
                return 1
            size = now
            continue
        return status


def read_rules(path: str) -> list[Json]:
    """Rules in a JSON file, checked."""

    def check(rules):
        tuning.candidates_of(rules)
        return rules

    return read_json(path, check)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_rows(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="token counts")
    parser.add_argument("--activations", default="mxfp8", choices=("mxfp8", "bf16"),
                        help="activation_dtype of the calls; bf16 has a file of its own (default mxfp8)")  # fmt: skip
    parser.add_argument("--layout", default="row_major", choices=list(LAYOUTS), help="of the weights")
    parser.add_argument("--minutes", type=float, default=600, help="after which it writes what it has (default 600)")
    parser.add_argument("--within", type=float, default=1.0, metavar="PERCENT",
                        help="what rules may cost over the best tile of each point (default 1)")  # fmt: skip
    parser.add_argument("--journal", type=Path, default=Path("tune_gpu.jsonl"), metavar="FILE",
                        help="results, read and appended to (default %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="the tile file (default: the package's, for this GPU)")
    parser.add_argument("--default", choices=("keep", "replace"),
                        help="what becomes of the file's rules for all shapes (without it: they are replaced if every "
                        "row of test/shapes.csv was tuned)")  # fmt: skip
    parser.add_argument("--space", type=json.loads, metavar="JSON",
                        help="values to try in the place of the program's, by kernels and field: "
                        '{"gemm": {"rule": {"block_m": [16]}, "both": {"num_stages": [3]}, "gemm1": {}}}')  # fmt: skip
    parser.add_argument("--candidates", type=read_rules, metavar="FILE",
                        help="try the tiles in this list of rules and no others; as tile files have them, but that "
                        "rows_per_expert may be left out")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at once (default: one a core)")
    parser.add_argument("--write", action="store_true", help="only make the file, --out, from the journal")
    args = parser.parse_args(argv)
    settle_rows(parser, args)
    check_counts(parser, "--tokens", args.tokens)
    if not 0 < args.within < 100:
        parser.error(f"--within is {args.within:g}; it takes more than 0 and less than 100 percent")
    try:
        tuning.space_of("sm_90", args.space)
    except (ValueError, TypeError, AttributeError) as error:
        parser.error(f"--space: {error}")
    if args.write and args.out is None:
        parser.error("--write needs --out")
    if args.write and not args.journal.exists():
        parser.error(f"--write: there is no journal {args.journal}")
    args.tokens = sorted(set(args.tokens))
    return args


def main() -> int:
    args = parse()
    if args.write:
        write(args, Journal(args.journal, None))
        return 0
    if not torch.cuda.is_available():
        sys.exit("nothing to tune for: there is no GPU that PyTorch can use")
    if UNTIL not in os.environ:
        return supervise(args, lambda env: subprocess.call([sys.executable, *sys.argv], env=env))
    served = None
    if args.out is None:
        from torch_mxfp8moe.backends.triton import BACKEND

        arch = BACKEND.target(torch.device("cuda", 0)).arch
        name = arch if args.activations == "mxfp8" else f"{arch}-{args.activations}"
        args.out = configs.FOLDER / "triton" / f"{name}.json"
        served = tuning.json_of(configs.load(arch, args.activations))  # by another file, until this one is there
    return work(args, served)


if __name__ == "__main__":
    sys.exit(main())
