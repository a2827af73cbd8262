#!/usr/bin/env python
"""Measure strong scaling of one mixture-of-experts layer: the same tokens on 1, 2, ... GPUs, by every path.

For each row of test/shapes.csv that is asked for, each number of tokens T (of all ranks together) and each number of
ranks: microseconds of the whole layer by each path of torch_mxfp8moe.distributed, and of its collectives alone on
buffers of the same bytes; on one rank, of fused_moe without any collective, which the speedups refer to. Paths without
host reads are timed as replays of a CUDA graph, all-to-all with exact sizes eagerly. A time is the median over calls of
the slowest rank's; every result is compared with one rank's. With --device cpu: gloo, wall time, the sizes divided.

--model FILE measures nothing: from the one-rank times in a file that --json wrote it predicts other numbers of GPUs, by
the formulas of docs/distributed.md.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test"))

import torch_mxfp8moe  # noqa: E402
from shapes import rows  # noqa: E402
from terminal import progress  # noqa: E402
from torch_mxfp8moe import distributed, sharding  # noqa: E402

DEFAULT_ROWS = ("Qwen3-30B-A3B TP1", "MiniMax-M3 TP4")
TOKENS = (64, 256, 1024, 4096, 8192)
PATHS = ("ep_allgather", "ep_alltoall", "ep_alltoall_capacity", "ep_allreduce", "tp")
EAGER = ("ep_alltoall",)


class Timer:
    """Times a function on all ranks of a group."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, repeat: int):
        self.group, self.device, self.repeat = group, device, repeat

    def _slowest(self, times: list[float]) -> float:
        """Median over calls of the slowest rank's microseconds."""
        times = torch.tensor(times, dtype=torch.float64, device=self.device)
        dist.all_reduce(times, dist.ReduceOp.MAX, group=self.group)
        return statistics.median(times.tolist())

    def __call__(self, function, eager: bool = False) -> float:
        for _ in range(3):
            function()
        if self.device.type == "cpu":
            return self._slowest([self._wall(function) for _ in range(self.repeat)])
        torch.cuda.synchronize()
        calls = 1 if eager else 4
        if not eager:
            graph = torch.cuda.CUDAGraph()
            dist.barrier(self.group)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                for _ in range(calls):
                    function()
            function = graph.replay
            function()
        times = []
        for _ in range(self.repeat):
            dist.barrier(self.group)  # ranks start together
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / calls)
        return self._slowest(times)

    def _wall(self, function) -> float:
        dist.barrier(self.group)
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e6


def collectives(path: str, row, T: int, n: int, group, device):
    """The collectives of ``path`` alone, on buffers of the bytes that it sends; None where that depends on routing."""
    c10d, wait, name = torch.ops._c10d_functional, torch.ops._c10d_functional.wait_tensor, group.group_name
    width = -(-(row.hidden * 33 // 32 + 8 * row.topk) // distributed.ROW_ALIGNMENT) * distributed.ROW_ALIGNMENT
    tokens = torch.zeros(T // n, width, dtype=torch.uint8, device=device)
    sums = torch.zeros(T, row.hidden, dtype=torch.bfloat16, device=device)
    if path == "ep_allgather":
        def run():
            wait(c10d.all_gather_into_tensor(tokens, n, name))
            return wait(c10d.reduce_scatter_tensor(sums, "sum", n, name))
    elif path == "ep_alltoall_capacity":
        def run():
            wait(c10d.all_to_all_single(tokens.repeat(n, 1), [T // n] * n, [T // n] * n, name))
            return wait(c10d.all_to_all_single(sums, [T // n] * n, [T // n] * n, name))
    elif path in ("ep_allreduce", "tp"):
        def run():
            return wait(c10d.all_reduce(sums, "sum", name))
    else:
        return None
    return run


def bind(path: str, row, weights: dict, tokens: dict, rank: int, n: int, group, device):
    """(function, which rows of the whole it gives)."""
    if path == "tp":
        held = sharding.tensor_parallel_shard(weights, rank, n)
        return functools.partial(distributed.fused_moe_tp, **tokens, **held, **row.options, group=group), slice(None)
    held = sharding.expert_parallel_shard(weights, rank, n)
    held["expert_map"] = sharding.expert_parallel_map(row.experts, rank, n, device=device)
    call = row.options | held | dict(group=group)
    if path == "ep_allreduce":
        return functools.partial(distributed.fused_moe_ep_allreduce, **tokens, **call), slice(None)
    T = len(tokens["topk_ids"])
    own = slice(T * rank // n, T * (rank + 1) // n)
    call |= {name: x[own] for name, x in tokens.items()}
    if path == "ep_allgather":
        return functools.partial(distributed.fused_moe_ep_allgather, **call), own
    call["expert_owner"] = sharding.expert_parallel_owner(row.experts, n, device=device)
    call["capacity"] = T // n if path == "ep_alltoall_capacity" else None
    return functools.partial(distributed.fused_moe_ep_alltoall, **call), own


@torch.inference_mode()
def on_rank(rank: int, n: int, args, store: str, out: str) -> None:
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    options = dict(init_method=f"file://{store}", rank=rank, world_size=n, timeout=timedelta(seconds=120))
    if args.device == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, **options)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // n))
        dist.init_process_group("gloo", **options)
    group = dist.group.WORLD
    timer = Timer(group, device, args.repeat)
    results = []
    for name in args.rows:
        row = rows()[name].smaller(args.shrink)
        torch.manual_seed(0)
        weights = row.weights(str(device))
        for T in args.tokens:
            torch.manual_seed(T)
            tokens = row.tokens(T, args.routing, str(device))
            for x in (*weights.values(), *tokens.values()):  # the same on every rank, whatever made them
                if n > 1:
                    dist.broadcast(x if x.itemsize > 1 else x.view(torch.uint8), 0)
            whole = functools.partial(torch_mxfp8moe.fused_moe, **tokens, **weights, **row.options)
            want = whole()
            if n == 1:
                results.append(dict(row=name, T=T, ranks=1, path="fused_moe", us=timer(whole)))
                continue
            for path in args.paths:
                if rank == 0:
                    progress(f"{name} T={T}, {n} ranks, {path}")
                function, own = bind(path, row, weights, tokens, rank, n, group, device)
                got, part = function().float(), want[own].float()
                error = ((got - part).norm() / part.norm()).reshape(1)
                dist.all_reduce(error, dist.ReduceOp.MAX)
                result = dict(row=name, T=T, ranks=n, path=path, error=float(error))
                result["us"] = timer(function, eager=path in EAGER)
                alone = collectives(path, row, T, n, group, device)
                result["collectives_us"] = timer(alone) if alone else None
                results.append(result)
                del function
        del weights
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@dataclasses.dataclass(frozen=True)
class Links:
    """What the model assumes. 1e3 bytes per microsecond are 1 GB/s."""

    node: int = 8
    """GPUs that share fast links."""
    inside: float = 450e3
    """Bytes per microsecond that a GPU sends inside a node: NVLink 4 of an H100, 900 GB/s both ways together."""
    outside: float = 50e3
    """Bytes per microsecond that a GPU sends to other nodes: one 400 Gbit/s adapter for each GPU, as in a DGX H100."""
    efficiency: float = 0.75
    """What a collective gets of that."""
    start_inside: float = 15.0
    """Microseconds that a collective takes for nothing, in a node."""
    start_outside: float = 30.0
    """The same between nodes."""


def predicted(path: str, row, T: int, n: int, alone_us: float, links: Links) -> tuple[float, float]:
    """(microseconds of the layer, of them of the collectives) on n ranks, by docs/distributed.md."""
    row_bytes, sum_bytes = row.hidden * 33 / 32 + 8 * row.topk, 2 * row.hidden
    inside, outside = links.inside * links.efficiency, links.outside * links.efficiency
    nodes = -(-n // links.node)
    local = min(n, links.node)
    if path.startswith("ep_alltoall"):
        reached = n * (1 - (1 - 1 / n) ** row.topk) if path == "ep_alltoall" else n  # ranks that a token goes to
        each = T / n * reached / n * (row_bytes + sum_bytes)  # bytes from one rank to one other, there and back
        moved = max(each * (local - 1) / inside, each * (n - local) / outside)
        count = 3 if path == "ep_alltoall" else 2
    else:
        one = T * (row_bytes + sum_bytes) if path == "ep_allgather" else 2 * T * sum_bytes
        # What comes into a rank of one node; and what comes into a node, through the adapters of all its ranks.
        moved = max(one * (n - 1) / n / inside, one * (nodes - 1) / nodes / (outside * local))
        count = 2 if path == "ep_allgather" else 1
    collectives = count * (links.start_inside if nodes == 1 else links.start_outside) + moved
    return alone_us / n + collectives, collectives


def model(file: Path, ranks: list[int]) -> None:
    measured = json.loads(file.read_text())
    print(f"model from one rank's times on {measured['machine']}; {Links()}")
    times = {(r["row"], r["T"], r["ranks"], r["path"]): r["us"] for r in measured["results"]}
    for name in dict.fromkeys(name for name, *_ in times):
        print(f"\n{name}: microseconds (of the collectives), speedup over one rank; measured where it was")
        for T in sorted({T for row, T, n, _ in times if row == name and n == 1}):
            alone = times[name, T, 1, "fused_moe"]
            print(f"  T = {T}, one rank {alone:.0f}")
            for path in PATHS:
                cells = []
                for n in ranks:
                    if path == "tp" and rows()[name].intermediate // 32 < n:
                        cells.append(f"{n}: I is too small")
                        continue
                    us, of_them = predicted(path, rows()[name], T, n, alone, Links())
                    got = times.get((name, T, n, path))
                    cells.append(f"{n}: {us:.0f} ({of_them:.0f}), {alone / us:.1f}x" + (f" [{got:.0f}]" if got else ""))
                print(f"    {path:<21} " + "   ".join(f"{cell:<24}" for cell in cells))


def report(results: list[dict], args) -> None:
    """A table for each row: microseconds, and how many times as fast as one rank."""
    alone = {(r["row"], r["T"]): r["us"] for r in results if r["ranks"] == 1}
    for name in args.rows:
        print(f"\n{name}, {args.routing} routing")
        print(f"{'T':>6} {'ranks':>6} {'path':<22} {'us':>10} {'speedup':>8} {'collectives':>12} {'error':>9}")
        for r in (r for r in results if r["row"] == name):
            base = alone.get((name, r["T"]))
            r["speedup"] = base / r["us"] if base else None
            cells = f"{r['speedup']:>8.2f}" if base else f"{'':>8}"
            alone_us = r.get("collectives_us")
            cells += f" {alone_us:>12.1f}" if alone_us else f" {'':>12}"
            cells += f" {r['error']:>9.1e}" if "error" in r else ""
            print(f"{r['T']:>6} {r['ranks']:>6} {r['path']:<22} {r['us']:>10.1f} {cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=DEFAULT_ROWS, metavar="ROW",
                        choices=[name for name, row in rows().items() if row.local == row.experts and not row.shared],
                        help="rows of test/shapes.csv, without fused shared experts; the I of a row is what the ranks "
                        "share under tensor parallelism (default: " + ", ".join(DEFAULT_ROWS) + ")")  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="token counts of all ranks together")
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2), help="numbers of ranks (default 1 2)")
    parser.add_argument("--paths", nargs="+", default=PATHS, choices=PATHS)
    parser.add_argument("--routing", default="uniform", choices=("uniform", "zipf", "one", "few"))
    parser.add_argument("--repeat", type=int, default=15, help="timed calls of each (default 15)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shrink", type=int, default=1, help="divide H and I by this, for a try on a CPU")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--model", type=Path, metavar="FILE", help="predict 2, 8 and 64 GPUs from the times in FILE")
    args = parser.parse_args()
    if args.model:
        return model(args.model, [2, 8, 64])
    most = max(args.ranks)
    if args.device == "cuda" and torch.cuda.device_count() < most:
        sys.exit(f"nothing to measure: {most} GPUs are asked for, and PyTorch can use {torch.cuda.device_count()}")
    for T in args.tokens:
        if any(T % n for n in args.ranks):
            sys.exit(f"--tokens {T} cannot be shared evenly by --ranks {' '.join(map(str, args.ranks))}")
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {os.cpu_count()} cores, gloo"
    machine = f"{where}, torch {torch.__version__}"
    print(machine, flush=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for n in sorted(args.ranks):
            out = str(Path(folder) / f"results{n}")
            mp.spawn(on_rank, (n, args, str(Path(folder) / f"store{n}"), out), n)
            results += json.loads(Path(out).read_text())
            progress("")
    results.sort(key=lambda r: (args.rows.index(r["row"]), r["T"], r["ranks"]))
    report(results, args)
    if args.json:
        args.json.write_text(json.dumps(dict(machine=machine, routing=args.routing, results=results), indent=1) + "\n")


if __name__ == "__main__":
    main()
