#!/usr/bin/env python
"""Measure the first call of fused_moe after warmup beside later ones.

For each row of test/shapes.csv, or of a file of your own (--shapes), a new process makes the weights and calls
torch_mxfp8moe.warmup for all token counts. Then, for each count, the same call many times over, L2 flushed before each:
microseconds of the GPU, which is kept busy until the host has launched everything, and of the host until the call
returns. On a CPU the two are one.

Exit status: 1 if a first call takes more than 5 percent longer on the GPU than the median of later ones.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test"))

import torch_mxfp8moe  # noqa: E402
from bench import machine, timing  # noqa: E402
from bench.report import Csv  # noqa: E402
from options import add_rows, check_counts, settle_rows  # noqa: E402

TOKENS = (1, 16, 256, 1024, 8192)
ROWS = ("MiniMax-M3 TP4", "Qwen3-30B-A3B TP1")
MOST = 1.05
"""Of the first call's time over that of later ones."""
BUSY = 10_000_000
"""Clocks for which the GPU is kept busy before a call, about 5 ms."""


@dataclass(frozen=True)
class Figure:
    """One call after warmup: microseconds."""

    row: str
    T: int
    first: float
    low: float
    """Quartiles and median of later calls."""
    later: float
    high: float
    first_host: float
    later_host: float

    @property
    def ratio(self) -> float:
        return self.first / self.later


def timed(call, flush: timing.Flush | None) -> tuple[float, float]:
    """Microseconds of one call: of the GPU (of the host, without one), and of the host until it returns."""
    if flush is None:
        begin = time.perf_counter()
        call()
        us = (time.perf_counter() - begin) * 1e6
        return us, us
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush()
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY)
    start.record()
    begin = time.perf_counter()
    call()
    host = (time.perf_counter() - begin) * 1e6
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000, host


def measure(args: argparse.Namespace) -> list[Figure]:
    """The figures of one row, in this process."""
    ((name, row),) = args.rows.items()
    row = row.smaller(args.shrink)
    torch.manual_seed(0)
    flush = timing.Flush("read") if args.device == "cuda" else None
    with torch.inference_mode():
        weights = row.weights(args.device)
        inputs = {T: row.tokens(T, device=args.device) for T in args.tokens}
        torch_mxfp8moe.warmup(args.tokens, **inputs[args.tokens[0]], **weights, **row.options)
        if flush is not None:
            timed(lambda: None, flush)  # the clocks, and the kernels around a call
        result = []
        for T, own in inputs.items():
            times = [
                timed(lambda own=own: torch_mxfp8moe.fused_moe(**own, **weights, **row.options), flush)
                for _ in range(args.repeat + 1)
            ]
            later = timing.Time.of([us for us, _ in times[1:]])
            hosts = [host for _, host in times]
            result.append(
                Figure(name, T, times[0][0], later.low, later.us, later.high, hosts[0],
                       statistics.median(hosts[1:]))
            )  # fmt: skip
    return result


def table(figures: list[Figure]) -> str:
    lines = [f"{'T':>6} {'first':>9} {'later':>9} {'25 %':>9} {'75 %':>9} {'ratio':>6} {'host':>9} {'later':>9}"]
    for f in figures:
        mark = "!" if f.ratio > MOST else ""
        lines.append(
            f"{f.T:>6} {f.first:>9.1f} {f.later:>9.1f} {f.low:>9.1f} {f.high:>9.1f} {f.ratio:>6.3f}"
            f" {f.first_host:>9.1f} {f.later_host:>9.1f}{mark}"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_rows(parser, ROWS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS,
                        help=f"token counts (default {' '.join(map(str, TOKENS))})")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=21, help="later calls (default 21)")
    parser.add_argument("--shrink", type=int, default=1, help="divide H and I by this (default 1)")
    machine.add_device(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    settle_rows(parser, args)
    for name in ("tokens", "repeat", "shrink"):
        counts = getattr(args, name)
        check_counts(parser, f"--{name}", [counts] if isinstance(counts, int) else counts)
    machine.check_device(parser, args.device)
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.worker:
        print(json.dumps([asdict(figure) for figure in measure(args)]))
        return 0
    print(machine.described(args.device), flush=True)
    csv, worst = Csv(args.csv, Figure), 0.0
    for name in args.rows:
        command = [sys.executable, "-W", "ignore", __file__, *argv, "--worker", "--rows", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures = [Figure(**one) for one in json.loads(done.stdout.splitlines()[-1])]
        csv.write(figures)
        print(f"\n{name}: us\n{table(figures)}", flush=True)
        worst = max(worst, *(figure.ratio for figure in figures))
    print(f"\nfirst calls take {worst:.3f} of later ones' time at the most")
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
