"""Times of GPU work, as replays of CUDA graphs."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

FLUSH_BYTES = 512 << 20
"""Twice the largest last-level cache of the GPUs that are measured (256 MiB; an H100's L2 has 50 MB)."""

FLUSHES = ("read", "write", "none")


@dataclass(frozen=True)
class Time:
    """Microseconds of one thing: the median, and the quartiles around it."""

    us: float
    low: float
    high: float

    @staticmethod
    def of(samples: Sequence[float]) -> "Time":
        if len(samples) == 1:
            return Time(*samples * 3)
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        return Time(middle, low, high)


def calls_of(T: int) -> int:
    """How many calls of T tokens take turns in a measurement: few tokens reach few experts, whose weights L2 could
    hold."""
    return 16 if T <= 64 else 4 if T <= 1024 else 2


def capture(functions: Iterable[Callable[[], object]], pool=None) -> torch.cuda.CUDAGraph:
    """One graph of all ``functions``, in order, each of which has run once before (so that all is compiled)."""
    functions = list(functions)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for function in functions:
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for function in functions:
            function()
    return graph


def in_one_graph(functions: list[Callable[[], object]], repeat: int = 9) -> float:
    """Median microseconds of one of ``functions``, all of which are captured in one graph: no launch of a graph is in
    it, and what each finds in L2 is what the others left."""
    graph = capture(functions)
    times = []
    for _ in range(repeat + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(functions))
    return statistics.median(times[2:])


class Flush:
    """Drives everything else out of L2.

    ``read``: by reading, after which L2 holds clean lines, as after the weights of other layers were read. ``write``:
    by writing, as most benchmarks do; the lines that the timed work displaces must then go to memory first, which costs
    it up to the L2's size over the bandwidth. ``none``: not at all.
    """

    def __init__(self, kind: str):
        self.kind = kind
        count = FLUSH_BYTES // 4 if kind != "none" else 0
        self.buffer = torch.zeros(count, dtype=torch.int32, device="cuda")
        self.largest = torch.zeros((), dtype=torch.int32, device="cuda")

    def __call__(self) -> None:
        if self.kind == "read":
            torch.amax(self.buffer, 0, out=self.largest)
        elif self.kind == "write":
            self.buffer.zero_()


def sample(
    graphs: dict[str, list[torch.cuda.CUDAGraph]], rounds: int, flush: Flush, most_us: float = 400_000
) -> dict[str, Time]:
    """Time of a replay of each of ``graphs``, which take turns, so that what the GPU's clock does happens to all.

    Each name has several graphs, of other routings and experts, which take turns as well. L2 is flushed before each
    replay, outside of the events. A name whose replays would take more than ``most_us`` together gets fewer rounds, 5
    at least.
    """
    pairs = {name: [] for name in graphs}
    wanted = {}
    for i in range(-2, rounds):  # the first two warm up; the last of them tells how many rounds there is time for
        for name, own in graphs.items():
            if i >= 0 and len(pairs[name]) >= wanted[name]:
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush()
            start.record()
            own[i % len(own)].replay()
            end.record()
            if i >= 0:
                pairs[name].append((start, end))
            elif i == -1:
                end.synchronize()
                first = start.elapsed_time(end) * 1000
                wanted[name] = max(5, min(rounds, int(most_us / max(first, 1.0))))
        torch.cuda.synchronize()
    return {name: Time.of([s.elapsed_time(e) * 1000 for s, e in own]) for name, own in pairs.items()}


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches."""

    copy: float
    """Bytes per microsecond that a kernel copies, read and written."""
    rate: float
    """bf16 operations per microsecond of an 8192^3 product."""
    launch: float
    """Microseconds between the events around a graph of one kernel that does next to nothing: in every time."""


def _copy_rate() -> float:
    source = torch.randn(1 << 29, device="cuda")
    out = torch.empty_like(source)
    return 2 * source.nbytes / in_one_graph([lambda: torch.neg(source, out=out)] * 3)


def ceilings(flush: Flush) -> Ceilings:
    copy = _copy_rate()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / in_one_graph([lambda: torch.mm(a, b)] * 3)
    one = torch.zeros(1, device="cuda")
    launch = sample({"": [capture([lambda: one.add_(1)])]}, 30, flush)[""].us
    return Ceilings(copy, rate, launch)
