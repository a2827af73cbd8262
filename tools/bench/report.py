"""What bench_gpu.py writes: figures as CSV (other programs' too), tables, the comparison with Humming, a picture."""

import csv
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

BASE = "humming"
"""The peer that ours are compared with."""

LEAST = 0.98
"""The least share of that peer's speed that no point may fall below."""

WHOLE = ""
"""The part that is the whole call."""

STEP, HOST = "step: ", "host"
"""Parts: a step of the call by itself (in one graph with the same step of other calls), and the host's time for an
eager call."""


@dataclass(frozen=True)
class Figure:
    """One time: a line of the CSV file."""

    row: str
    routing: str
    T: int
    peer: str
    part: str
    us: float
    low: float | None = None
    """Quartiles."""
    high: float | None = None
    floor: float | None = None
    """Microseconds that the bytes or the operations of the call take at least."""
    operations: float | None = None
    """Of the products of the call, of all local routes."""
    error_mxfp8: float | None = None
    """Relative L2 of the output against the reference with activations rounded to MXFP8."""
    error_bf16: float | None = None
    """The same with activations rounded to bf16."""


class Csv:
    """A CSV file to which every figure, a dataclass of type ``kind``, is written as soon as there is one."""

    def __init__(self, path: Path | None, kind: type = Figure):
        self.file = path and path.open("w", newline="")
        if self.file:
            self.writer = csv.DictWriter(self.file, [field.name for field in fields(kind)])
            self.writer.writeheader()

    def write(self, figures: list) -> None:
        if self.file:
            self.writer.writerows(asdict(figure) for figure in figures)
            self.file.flush()


def read(path: Path) -> list[Figure]:
    """The figures in a file that :class:`Csv` wrote."""
    kinds = {field.name: field.type for field in fields(Figure)}
    with path.open(newline="") as file:
        return [
            Figure(**{
                name: text if kinds[name] is str else int(text) if kinds[name] is int else float(text) if text else None
                for name, text in line.items()
            })
            for line in csv.DictReader(file)
        ]  # fmt: skip


def point_table(figures: list[Figure], activations: dict[str, str]) -> str:
    """The figures of one point (a row, a routing, a T). ``activations``: what each peer rounds them to, which is the
    reference that its error is against."""
    lines = [f"{'T':>6} {'':<20} {'us':>9} {'25 %':>9} {'75 %':>9} {'x floor':>8} {'TFLOP/s':>8} {'error':>8}"]
    for f in figures:
        if f.part.startswith(STEP) or f.part == HOST:
            continue
        error = f.error_mxfp8 if activations.get(f.peer) == "mxfp8" else f.error_bf16
        name = f.peer if f.part == WHOLE else f"{f.peer}, {f.part}"
        line = f"{f.T:>6} {name:<20} {f.us:>9.1f} {f.low:>9.1f} {f.high:>9.1f}"
        if f.part == WHOLE:
            line += f" {f.us / f.floor:>8.2f} {f.operations / f.us / 1e6:>8.0f} {error:>8.1e}"
        lines.append(line)
    floor = next((f.floor for f in figures if f.floor), None)
    if floor:
        lines.insert(1, f"{figures[0].T:>6} {'floor':<20} {floor:>9.1f}")
    for peer in dict.fromkeys(f.peer for f in figures):
        own = [f for f in figures if f.peer == peer]
        steps = [f"{f.part.removeprefix(STEP)} {f.us:.1f}" for f in own if f.part.startswith(STEP)]
        steps += [f"(host {f.us:.0f})" for f in own if f.part == HOST]
        if steps:
            lines.append(f"       {peer}: {', '.join(steps)}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Comparison:
    """The ratios of one peer's time to those of others: above 1, they are faster."""

    ratios: dict[tuple[str, str, str], dict[int, float]]
    """By (row, routing, peer), then by T."""
    base: str = BASE
    """Whose time is above the line."""
    whose: str = "ours"
    """Times below it, in words."""

    @staticmethod
    def of(figures: list[Figure], ours: list[str], base: str = BASE, whose: str = "ours") -> "Comparison":
        whole = {(f.row, f.routing, f.peer, f.T): f.us for f in figures if f.part == WHOLE}
        ratios = {}
        for (row, routing, peer, T), us in whole.items():
            other = whole.get((row, routing, base, T))
            if peer in ours and other:
                ratios.setdefault((row, routing, peer), {})[T] = other / us
        return Comparison(ratios, base, whose)

    @property
    def below(self) -> list[tuple[str, str, str, int, float]]:
        """The points below :data:`LEAST`."""
        return [(*key, T, r) for key, by_T in self.ratios.items() for T, r in sorted(by_T.items()) if r < LEAST]

    def mean(self, peer: str) -> float | None:
        """The geometric mean over all points of a peer."""
        logs = [math.log(r) for (*_, name), by_T in self.ratios.items() if name == peer for r in by_T.values()]
        return math.exp(sum(logs) / len(logs)) if logs else None

    def __str__(self) -> str:
        if not self.ratios:
            return f"no ratios: {self.base} was not measured"
        tokens = sorted({T for by_T in self.ratios.values() for T in by_T})
        lines = [
            f"{self.base}'s time over {self.whose}: above 1, {self.whose} is faster; ! marks what is below {LEAST}",
            f"{'T':>62}" + "".join(f"{T:>8}" for T in tokens) + f"{'mean':>8}",
        ]
        for (row, routing, peer), by_T in self.ratios.items():
            cells = (f"{by_T[T]:.3f}" + ("!" if by_T[T] < LEAST else "") if T in by_T else "" for T in tokens)
            mean = math.exp(sum(map(math.log, by_T.values())) / len(by_T))
            where = f"{row}, {routing}"
            lines.append(f"{where:<44} {peer:<17}" + "".join(f"{cell:>8}" for cell in cells) + f"{mean:>8.3f}")
        for peer in dict.fromkeys(peer for *_, peer in self.ratios):
            count = sum(len(by_T) for (*_, name), by_T in self.ratios.items() if name == peer)
            lines.append(f"geometric mean of {peer} over {count} points: {self.mean(peer):.3f}")
        for row, routing, peer, T, ratio in self.below:
            lines.append(f"BELOW {LEAST}: {peer}, {row}, {routing}, T={T}: {ratio:.3f}")
        return "\n".join(lines)


def picture(figures: list[Figure], path: Path, title: str) -> None:
    """Time over T of every peer, and the floor, an axes for each row and routing; takes matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    whole = [f for f in figures if f.part == WHOLE]
    panels = list(dict.fromkeys((f.row, f.routing) for f in whole))
    peers = list(dict.fromkeys(f.peer for f in whole))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(6.4 * columns, 4.8 * lines), squeeze=False)
    for panel, ax in zip(panels, axes.flat):
        here = [f for f in whole if (f.row, f.routing) == panel]
        floors = dict(sorted((f.T, f.floor) for f in here))
        ax.plot(list(floors), list(floors.values()), "k--", label="floor")
        for i, peer in enumerate(peers):
            own = sorted((f.T, f.us) for f in here if f.peer == peer)
            if own:
                ax.plot(*zip(*own), "o-", color=f"C{i}", markersize=3, label=peer)
        ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds", title=", ".join(panel))
        ax.set_xticks(list(floors), map(str, floors), minor=False)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    for ax in list(axes.flat)[len(panels) :]:
        ax.remove()
    axes.flat[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
