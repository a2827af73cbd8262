#!/usr/bin/env python
"""Measure Mxfp8Experts.update_weights in place beside a plain copy, and whether a captured graph honours it.

For each row of test/shapes.csv that is asked for, each layout that it fits, each order of the gate and up rows and each
kind of source (MXFP8 tensors, or bf16 ones, which are quantised), on the device: the time of one update of all experts,
with quartiles; the bytes that it has to move (source read, buffers written) over that time, beside the rate of a copy
of as many bytes as the buffers have, measured in the same way in the same run; and the memory that an update takes
while it runs. A time is of an eager call, from an idle device until the last byte is written: the host's part is in it.

Before that, a check: a call is captured in a CUDA graph while all weights are zeros, the weights are updated, and the
replay has to give, bit for bit, what the updated module gives eagerly and what a new module of the same weights gives.
A CPU has no graphs: there the call after the update is an eager one, and the program says so.

Exit status: 1 if a check failed.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test"))

from bench import machine, report, timing  # noqa: E402
from shapes import Row, rows  # noqa: E402
from terminal import progress  # noqa: E402
from torch_mxfp8moe import LAYOUTS, Mxfp8Experts, dequantize_1x32  # noqa: E402
from torch_mxfp8moe.experts import GATE_UP_ORDERS, halves  # noqa: E402

DEFAULT_ROWS = ("Qwen3-30B-A3B TP1", "MiniMax-M3 TP4")
SOURCES = ("mxfp8", "bf16")
TOKENS = 16
"""Of the call that is checked."""


@dataclasses.dataclass(frozen=True)
class Update:
    """One measurement: a line of the CSV file."""

    device: str
    row: str
    experts: int
    layout: str
    source: str
    gate_up_order: str
    bytes_moved: int
    """Of the source, once, and of the buffers, once."""
    us: float
    low: float
    """Quartiles."""
    high: float
    bytes_per_us: float
    copy_bytes_per_us: float
    """Read and written, of a plain copy."""
    extra_bytes: int | None
    """Memory allocated at the peak of an update, beside what was before; None where PyTorch does not count it (CPU)."""
    graph: bool
    """Whether the check was of the replay of a captured graph; of an eager call, if not."""
    honoured: bool
    """Whether that gave the new weights' result, bit for bit."""

    HEADER = (
        f"{'layout':<13} {'source':<6} {'gate and up':<12} {'ms':>9} {'25 %':>9} {'75 %':>9} {'GB/s':>8} "
        f"{'of a copy':>9} {'extra MiB':>9} new weights"
    )

    def __str__(self) -> str:
        extra = "" if self.extra_bytes is None else f"{self.extra_bytes / 2**20:.0f}"
        return (
            f"{self.layout:<13} {self.source:<6} {self.gate_up_order:<12} {self.us / 1e3:>9.3f} {self.low / 1e3:>9.3f} "
            f"{self.high / 1e3:>9.3f} {self.bytes_per_us / 1e3:>8.1f} "
            f"{self.bytes_per_us / self.copy_bytes_per_us:>9.0%} {extra:>9} "
            f"{'honoured' if self.honoured else 'NOT HONOURED'}"
        )


def measure(call: Callable[[], object], device: torch.device, repeat: int) -> timing.Time:
    """Microseconds of ``call`` on an idle device until its work is done."""
    samples = []
    for _ in range(repeat + 1):
        if device.type == "cpu":
            begin = time.perf_counter()
            call()
            samples.append((time.perf_counter() - begin) * 1e6)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1000)
    return timing.Time.of(samples[1:])


def extra_memory(call: Callable[[], object], device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_rate(size: int, device: torch.device, repeat: int) -> float:
    """Bytes per microsecond, read and written, of copying ``size`` bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    out = torch.empty_like(source)
    return 2 * size / measure(lambda: out.copy_(source), device, repeat).us


def interleaved(x: torch.Tensor) -> torch.Tensor:
    """All gate rows then all up rows [E, 2I, ...] -> gate and up rows in turn."""
    data = x.view(torch.uint8) if x.itemsize == 1 else x
    return torch.stack(halves(data, "concatenated").unbind(1), 2).flatten(1, 2).view(x.dtype)


def sources(weights: dict[str, torch.Tensor], kind: str, gate_up_order: str) -> dict[str, torch.Tensor]:
    """What ``update_weights`` is given, of MXFP8 weights [E, 2I, H] (concatenated) and [E, H, I]."""
    given = dict(weights)
    if kind == "bf16":
        for name in ("w1", "w2"):
            given[name] = dequantize_1x32(given[name], given.pop(f"{name}_scale"), torch.bfloat16)
    if gate_up_order == "interleaved":
        given |= {name: interleaved(x) for name, x in given.items() if name.startswith("w1")}
    return given


def same_bytes(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def honours(module: Mxfp8Experts, update: Callable[[], None], new: Mxfp8Experts, tokens: dict) -> bool:
    """Whether a call that was captured before ``update`` gives, after it, what ``module`` gives eagerly and ``new``
    does; and something else than before. On a CPU the call is an eager one."""
    out = torch.empty_like(tokens["hidden_states"])

    def call():
        module(**tokens, out=out)

    graph = timing.capture([call]) if out.is_cuda else None
    call()
    before = out.clone()
    update()
    out.fill_(torch.nan)
    graph.replay() if graph else call()
    return same_bytes(out, module(**tokens)) and same_bytes(out, new(**tokens)) and not same_bytes(out, before)


def measured(row: Row, given: dict, layout: str, kind: str, order: str, rate: float, tokens: dict, args) -> Update:
    """One point. Raises ValueError if the row does not fit the layout."""
    device, options = torch.device(args.device), row.options | dict(layout=layout)
    sizes = row.local, row.hidden, row.intermediate
    module = Mxfp8Experts(*sizes, bias=row.bias, device=device, **options)

    def update():
        module.update_weights(**given, gate_up_order=order)

    honoured = honours(module, update, Mxfp8Experts.from_weights(**given, gate_up_order=order, **options), tokens)
    t = measure(update, device, args.repeat)
    moved = sum(x.nbytes for x in (*given.values(), *module.buffers()))
    return Update(
        args.device, row.name, row.local, layout, kind, order, moved, t.us, t.low, t.high, moved / t.us, rate,
        extra_memory(update, device), device.type != "cpu", honoured,
    )  # fmt: skip


def bench(row: Row, args, csv: report.Csv) -> bool:
    """Measures and prints a row; whether every check passed."""
    progress(f"{row.name}: weights")
    weights, tokens = row.weights(args.device), row.tokens(TOKENS, device=args.device)
    size = sum(x.nbytes for x in weights.values())
    progress(f"{row.name}: copy")
    rate = copy_rate(size, torch.device(args.device), args.repeat)
    progress("")
    print(f"\n{row.name}: {row.local} experts, {size / 1e9:.2f} GB; a copy moves {rate / 1e3:.1f} GB/s")
    print(Update.HEADER, flush=True)
    right = True
    for kind in args.sources:
        for order in args.gate_up_order:
            given = sources(weights, kind, order)
            for layout in args.layouts:
                progress(f"{row.name}: {layout}, {kind}, {order}")
                try:
                    figure = measured(row, given, layout, kind, order, rate, tokens, args)
                except ValueError as error:
                    progress("")
                    print(f"{layout:<13} {kind:<6} {order:<12} not measured: {error}", flush=True)
                    continue
                progress("")
                print(figure, flush=True)
                csv.write([figure])
                right &= figure.honoured
    return right


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    names = [name for name, row in rows().items() if row.local == row.experts]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=DEFAULT_ROWS, choices=names, metavar="ROW",
                        help="rows of test/shapes.csv that hold all experts: " + ", ".join(names) +
                        " (default: " + ", ".join(DEFAULT_ROWS) + ")")  # fmt: skip
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS), help="(default all)")
    parser.add_argument("--sources", nargs="+", default=SOURCES, choices=SOURCES, help="(default both)")
    parser.add_argument("--gate-up-order", nargs="+", default=GATE_UP_ORDERS, choices=GATE_UP_ORDERS,
                        help="of the source's rows (default both)")  # fmt: skip
    machine.add_device(parser)
    parser.add_argument("--repeat", type=int, default=21, help="timed updates of each (default 21)")
    parser.add_argument("--experts", type=int, help="at most so many experts of each row, for a try on a CPU")
    parser.add_argument("--shrink", type=int, default=1, help="divide H and I by this, for a try on a CPU")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the figures there, each as soon as it is known")
    args = parser.parse_args(argv)
    for name in ("repeat", "experts", "shrink"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; it takes 1 or more")
    machine.check_device(parser, args.device)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    print(machine.described(args.device))
    if args.device == "cpu":
        print("no CUDA graphs on a CPU: each update is checked by an eager call instead of a replay")
    csv, right = report.Csv(args.csv, Update), True
    with torch.inference_mode():
        for name in args.rows:
            torch.manual_seed(0)
            row = rows()[name].smaller(args.shrink, args.experts)
            right &= bench(row, args, csv)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
