#!/usr/bin/env python
"""Measure fused_moe on this GPU beside others that compute the same layer, and beside this GPU's own limits.

For each row of test/shapes.csv, or of a file of your own (--shapes), each routing and each token count that is asked
for: microseconds of the whole layer by every peer, with quartiles; the floor (bytes that must move over the copy
bandwidth, or operations over the bf16 rate, both measured first in the same run); the error of each against the
reference with the activations that it uses; where the time of one call goes, step by step. Then the ratio of Humming's
time to ours at each point and the geometric mean.

The peers, all in this process, taking turns: mxfp8 and bf16, fused_moe with activations of either kind; humming, where
the package humming-kernels is installed (bf16 activations; the sorting, SwiGLU and sum around its two products are
tools/bench/glue.py, and its products are timed alone as well); grouped_mm, torch.nn.functional.grouped_mm on bf16
weights in plain PyTorch; dot_scaled, our launches with the scaling left to tl.dot_scaled; with --tiles, mxfp8 with the
tiles of other files, each as mxfp8:NAME, and the ratio of mxfp8's time to it. A time is that of a replay of
a CUDA graph of one call, L2 flushed before it; routings and experts rotate. Each step is timed alone, in one graph of
many; together they may take longer than the call, in which they overlap.

Exit status: 1 if a point of ours is below 0.98 of Humming's speed (or if there is no GPU), 2 if a peer that was asked
for by name could not be measured, 3 if an error ended the run, which then reports what it has.
"""

import argparse
import statistics
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test"))

import torch_mxfp8moe  # noqa: E402
from bench import report, timing  # noqa: E402
from bench.peers import Bound, DotScaled, GroupedMm, Ours, Peer  # noqa: E402
from bench.report import HOST, STEP, WHOLE, Figure  # noqa: E402
from options import add_rows, check_counts, read_json, settle_rows  # noqa: E402
from shapes import Row  # noqa: E402
from terminal import progress  # noqa: E402
from torch_mxfp8moe import configs  # noqa: E402
from torch_mxfp8moe.layouts import LAYOUTS  # noqa: E402

DEFAULT_ROWS = ("MiniMax-M3 TP4", "Qwen3-30B-A3B TP1")
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
QUICK_TOKENS = (1, 64, 8192)
OURS = ("mxfp8", "bf16")
PEERS = (*OURS, "humming", "grouped_mm", "dot_scaled")
ROUTINGS = ("uniform", "zipf", "one", "few")


def work(row: Row, tokens: dict, expert_map: torch.Tensor | None) -> tuple[int, int]:
    """(local experts that any token goes to, local routes) of one call."""
    expert = tokens["topk_ids"].flatten()
    if expert_map is not None:
        expert = expert_map[expert]
    expert = expert[expert >= 0]
    return expert.unique().numel(), expert.numel()


def floor(row: Row, works: list[tuple[int, int]], T: int, ceilings: timing.Ceilings) -> tuple[float, float]:
    """(microseconds that the weights of the experts touched, activations and results take at least, or the products;
    operations of the products), means over calls."""
    touched, routes = (statistics.mean(column) for column in zip(*works))
    weights = touched * 3 * row.hidden * row.intermediate * 33 / 32
    operations = 6 * routes * row.hidden * row.intermediate
    return max((weights + 4 * T * row.hidden) / ceilings.copy, operations / ceilings.rate), operations


def tile_file(path: str) -> tuple[str, configs.Config]:
    """The name of its peer, and what is in it."""
    file = Path(path)
    return f"mxfp8:{file.stem}", read_json(path, partial(configs.parse, file.name))


def maker(name: str, tiles: dict[str, configs.Config]):
    """What makes the peer ``name``, from a row and its weights. ``tiles``: of those that have a file of their own."""
    if name in tiles:
        return partial(Ours, config=tiles[name])
    if name in ("grouped_mm", "dot_scaled"):
        return {"grouped_mm": GroupedMm, "dot_scaled": DotScaled}[name]
    if name == "humming":
        from bench.humming_peer import Humming

        return Humming
    activations, _, layout = name.partition("@")
    return partial(Ours, activations=activations, layout=layout or "row_major")


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


def host_time(row: Row, weights: dict, tokens: dict) -> float:
    """Microseconds of the host for an eager call, median."""
    times = []
    for i in range(60):
        start = time.perf_counter()
        torch_mxfp8moe.fused_moe(**tokens, **weights, **row.options)
        times.append((time.perf_counter() - start) * 1e6)
        if i % 10 == 9:
            torch.cuda.synchronize()
    return statistics.median(times)


class Bench:
    """The measurements: ``figures`` grows, and so does the CSV file; ``failed`` says whom it could not measure."""

    def __init__(self, args):
        self.args = args
        self.figures: list[Figure] = []
        self.failed: dict[str, str] = {}
        self.csv = report.Csv(args.csv)
        self.flush = timing.Flush(args.flush)
        self.ceilings = timing.ceilings(self.flush)

    def attempt(self, name: str, where: str, function):
        """What ``function`` returns. If it raises, the peer ``name`` is out from here on, and the reason is printed; it
        does not end the run, unless the peer is one of ours or has left the GPU unusable."""
        try:
            return function()
        except Exception as error:
            progress("")
            last = traceback.extract_tb(error.__traceback__)[-1]
            self.failed[name] = f"{where}: {type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
            print(f"!! {name} cannot be measured; {self.failed[name]}", flush=True)
            torch.cuda.synchronize()  # raises if there is nothing left to measure on
            if name.partition("@")[0] in OURS:
                raise
            return None

    def row(self, row: Row) -> None:
        progress(f"weights of {row.name}")
        weights = row.weights()
        peers: dict[str, Peer] = {}
        for name in self.args.peers:
            if name in self.failed:
                continue
            progress(f"{row.name}: {name} makes its weights and compiles")
            peer = self.attempt(name, row.name, lambda: maker(name, self.args.tiles)(row, weights))
            if peer and self.attempt(name, row.name, lambda: peer.prepare(self.args.tokens) or True):
                peers[name] = peer
        for routing in self.args.routing:
            progress("")
            print(f"\n{row.name}, {routing} routing", flush=True)
            for T in self.args.tokens:
                self.point(row, weights, peers, routing, T)

    def point(self, row: Row, weights: dict, peers: dict[str, Peer], routing: str, T: int) -> None:
        where = f"{row.name}, {routing}, T={T}"
        tokens = [row.tokens(T, routing) for _ in range(timing.calls_of(T))]
        works = [work(row, one, weights.get("expert_map")) for one in tokens]
        least, operations = floor(row, works, T, self.ceilings)

        bounds: dict[str, list[Bound]] = {}
        graphs: dict[tuple[str, str], list[torch.cuda.CUDAGraph]] = {}
        pool = torch.cuda.graph_pool_handle()
        for name, peer in list(peers.items()):
            progress(f"{where}: {name} compiles")

            def ready():
                own = [peer.bind(one) for one in tokens]
                captured = {WHOLE: [timing.capture([bound.run], pool) for bound in own]}
                for part in own[0].parts:
                    captured[part] = [timing.capture([bound.parts[part]], pool) for bound in own]
                torch.cuda.synchronize()
                return own, captured

            made = self.attempt(name, where, ready)
            if made is None:
                del peers[name]
                continue
            bounds[name] = made[0]
            graphs |= {(name, part): own for part, own in made[1].items()}

        progress(f"{where}: errors")
        want = {
            a: torch_mxfp8moe.reference.fused_moe(
                **tokens[0], **weights, **row.options, activation_dtype=a, out_dtype=torch.float32
            )
            for a in ("mxfp8", "bf16")
        }
        errors = {}
        for name in bounds:
            graphs[name, WHOLE][0].replay()
            errors[name] = {f"error_{a}": relative_l2(bounds[name][0].out, w) for a, w in want.items()}
        del want

        progress(f"{where}: times")
        figures, activations = [], {name: peers[name].activations for name in bounds}
        for (name, part), t in timing.sample(graphs, self.args.repeat, self.flush).items():
            more = errors[name] if part == WHOLE else {}
            times = dict(us=t.us, low=t.low, high=t.high, floor=least, operations=operations)
            figures.append(Figure(row.name, routing, T, name, part, **times, **more))
        del graphs
        for name, own in bounds.items():
            progress(f"{where}: steps of {name}")
            figures += self.attempt(name, where, lambda: self.steps(row, routing, T, name, own)) or []
            if name in self.failed:
                del peers[name]
        if "mxfp8" in bounds:
            figures.append(Figure(row.name, routing, T, "mxfp8", HOST, host_time(row, weights, tokens[0])))
        progress("")
        print(report.point_table(figures, activations), flush=True)
        self.figures += figures
        self.csv.write(figures)

    def steps(self, row: Row, routing: str, T: int, name: str, own: list[Bound]) -> list[Figure]:
        """Each step by itself; those that have the same name (of a call in parts) together."""
        for bound in own:
            for _, run in bound.steps:
                run()
        totals = {}
        for i, (step, _) in enumerate(own[0].steps):
            us = timing.in_one_graph([bound.steps[i][1] for bound in own], 5)
            totals[step] = totals.get(step, 0) + us
        return [Figure(row.name, routing, T, name, STEP + step, us) for step, us in totals.items()]


def memory_bound(copy: float) -> None:
    """What quantises and rearranges, in bytes moved over time."""
    x = torch.randn(1 << 14, 1 << 14, device="cuda", dtype=torch.bfloat16)
    data, scale = torch_mxfp8moe.quantize_1x32(x)
    weight, weight_scale = data.view(16, 1 << 10, 1 << 14), scale.view(16, 1 << 10, 1 << 9)
    kwargs = dict(layout="aiter_gfx950", gate_up=True)
    out = torch_mxfp8moe.preshuffle(weight, weight_scale, **kwargs)
    small = data.nbytes + scale.nbytes

    def shuffle():
        torch_mxfp8moe.preshuffle(weight, weight_scale, out=out, **kwargs)

    def quantize_shuffle():
        torch_mxfp8moe.quantize_preshuffle(x.view(weight.shape), out=out, **kwargs)

    cases = {
        "quantize_1x32 of bf16": (x.nbytes + small, lambda: torch_mxfp8moe.quantize_1x32(x)),
        "dequantize_1x32 to bf16": (x.nbytes + small, lambda: torch_mxfp8moe.dequantize_1x32(data, scale, x.dtype)),
        "preshuffle to aiter_gfx950": (2 * small, shuffle),
        "quantize_preshuffle of bf16": (x.nbytes + small, quantize_shuffle),
    }
    print(f"\n{'':<28} {'us':>8} {'TB/s':>6} {'of a copy':>10}")
    for name, (moved, call) in cases.items():
        us = timing.in_one_graph([call] * 3)
        print(f"{name:<28} {us:>8.1f} {moved / us / 1e6:>6.2f} {moved / us / copy:>10.0%}")


def finish(figures: list[Figure], args, title: str, failed: dict[str, str]) -> int:
    """Prints what is of all points, draws; -> the exit status."""
    ours = [name for name in dict.fromkeys(f.peer for f in figures) if name.partition("@")[0] in OURS]
    comparison = report.Comparison.of(figures, ours)
    print(f"\n{comparison}")
    if tiled := [name for name in dict.fromkeys(f.peer for f in figures) if ":" in name]:
        print("", report.Comparison.of(figures, tiled, "mxfp8", "the file's"), sep="\n")
    for name, reason in failed.items():
        print(f"!! {name} is missing from some or all points: {reason}")
    if args.picture and figures:
        report.picture(figures, args.picture, title)
    return 1 if comparison.below else 2 if set(failed) & set(args.by_name) else 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_rows(parser, DEFAULT_ROWS)
    parser.add_argument("--tokens", type=int, nargs="+", help=f"token counts (default {' '.join(map(str, TOKENS))})")
    parser.add_argument("--routing", nargs="+", default=["uniform"], choices=ROUTINGS,
                        help="where tokens go; zipf: expert r in proportion to 1 / r; one: all to one expert as well; "
                        "few: all to 2 K experts (default uniform)")  # fmt: skip
    parser.add_argument("--peers", nargs="+", choices=PEERS, help=f"whom to measure (default {' '.join(PEERS)})")
    parser.add_argument("--layouts", nargs="+", default=["row_major"], choices=list(LAYOUTS),
                        help="of the weights of mxfp8 and bf16, each of which is then measured once for each layout, "
                        "as mxfp8@LAYOUT where it is not row_major (default row_major)")  # fmt: skip
    parser.add_argument("--tiles", nargs="+", type=tile_file, default=[], metavar="FILE",
                        help="tile files of mxfp8 activations, as tune_gpu.py makes them, to measure beside the "
                        "configured one")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=41, help="timed replays of each; fewer of slow ones (default 41)")
    parser.add_argument("--flush", default="read", choices=timing.FLUSHES,
                        help="drive L2 out by reading, which leaves it clean; by writing, which makes the timed call "
                        "pay for the write-back; or not (default read)")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help=f"T = {' '.join(map(str, QUICK_TOKENS))} unless --tokens says otherwise, 11 replays, no "
                        "other ops")  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the figures there, each as soon as it is known")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw times over T to this SVG file (matplotlib)")
    parser.add_argument("--read", type=Path, metavar="FILE", help="measure nothing: ratios and picture of a --csv file")
    args = parser.parse_args(argv)
    settle_rows(parser, args)
    check_counts(parser, "--tokens", args.tokens or ())
    if args.repeat < 5:
        parser.error(f"--repeat is {args.repeat}; it takes 5 or more")
    if args.picture:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("--picture needs matplotlib (pip install matplotlib); --read draws a --csv file elsewhere")
    args.tokens = list(dict.fromkeys(args.tokens or (QUICK_TOKENS if args.quick else TOKENS)))
    args.repeat = min(args.repeat, 11) if args.quick else args.repeat
    names = list(dict.fromkeys(args.peers or PEERS))
    if len(args.tiles) > len(dict(args.tiles)):
        parser.error("--tiles takes files of different names")
    args.tiles = dict(args.tiles)
    args.by_name = [*(args.peers or []), *args.tiles]
    args.peers = [
        name if layout == "row_major" else f"{name}@{layout}"
        for name in names
        for layout in (args.layouts if name in OURS else ["row_major"])
    ] + list(args.tiles)
    return args


def main() -> int:
    args = parse()
    if args.read:
        return finish(report.read(args.read), args, args.read.stem, {})
    if not torch.cuda.is_available():
        sys.exit("nothing to measure: there is no GPU that PyTorch can use")
    import triton

    torch.manual_seed(0)
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}"
    print(machine)
    stopped = None
    with torch.inference_mode():
        progress("this GPU's limits")
        bench = Bench(args)
        limits = bench.ceilings
        progress("")
        print(
            f"copy {limits.copy / 1e6:.2f} TB/s, bf16 8192^3 product {limits.rate / 1e6:.0f} TFLOP/s; in every time: "
            f"{limits.launch:.1f} us for a graph of one small kernel. L2 flush: {args.flush}",
            flush=True,
        )
        try:
            for row in args.rows.values():
                bench.row(row)
            if not args.quick:
                memory_bound(limits.copy)
        except (Exception, KeyboardInterrupt) as error:  # what was measured so far is worth its tables
            traceback.print_exc()
            stopped = error
    status = finish(bench.figures, args, machine, bench.failed)
    if stopped is not None:
        print(f"!! stopped early: {type(stopped).__name__}: {stopped}")
        return 3
    return status


if __name__ == "__main__":
    sys.exit(main())
