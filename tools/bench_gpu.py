#!/usr/bin/env python
"""Measure fused_moe's Triton kernels on this GPU, beside this GPU's own limits and a plain dot_scaled kernel.

For each row of test/shapes.csv that is asked for and each token count: microseconds of the whole call, and of each of
its kernels; of the same call with a matrix product that leaves the scaling to tl.dot_scaled (what a Triton kernel
written for gfx950 does on other GPUs); the floor (bytes that must move over the copy bandwidth, or operations over the
bf16 rate, measured in the same run); the error against the reference; the host's time for an eager call. Times are
medians of CUDA-graph replays over calls whose routing and experts rotate, so that L2 does not hold the weights.
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test"))

import torch_mxfp8moe  # noqa: E402
from shapes import Row, rows  # noqa: E402
from terminal import progress  # noqa: E402
from torch_mxfp8moe.backends.triton import BACKEND  # noqa: E402
from torch_mxfp8moe.configs import Gemm, Tiles  # noqa: E402

DEFAULT_ROWS = ("MiniMax-M3 TP4", "Qwen3-30B-A3B TP1")
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
KERNELS = ("route", "dispatch", "gemm1", "gemm2", "combine")


def microseconds(functions: list, repeat: int = 9) -> float:
    """Median time of one of ``functions``, all of which are captured in one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for function in functions:
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    times = []
    for i in range(repeat + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(functions))
    return statistics.median(times[2:])


def ceilings() -> tuple[float, float]:
    """Bytes per microsecond of a copy (by a kernel), read and written, and bf16 operations per microsecond of an 8192^3
    product."""
    source = torch.randn(1 << 29, device="cuda")
    out = torch.empty_like(source)
    copy = 2 * source.nbytes / microseconds([lambda: torch.neg(source, out=out)] * 3)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return copy, 2 * 8192**3 / microseconds([lambda: torch.mm(a, b)] * 3)


def floor(row: Row, calls: list, copy: float, rate: float) -> float:
    """Microseconds that the weights of the experts touched, activations and results take at least, or the products."""
    touched = statistics.mean(call.topk_ids.unique().numel() for call in calls)
    T, routes = calls[0].tokens, calls[0].tokens * row.topk
    weights = touched * 3 * row.hidden * row.intermediate * 33 / 32
    return max((weights + 4 * T * row.hidden) / copy, 6 * routes * row.hidden * row.intermediate / rate)


def naive_plan(call):
    """The same launches with tl.dot_scaled on codes and scale bytes, in tiles that suit gfx950."""
    from torch_mxfp8moe.backends.triton.fused_moe import plan
    from torch_mxfp8moe.backends.triton.targets import Target

    class DotScaled(Target):
        scaled = True

    gemm1, gemm2 = Gemm(64, 128, 8, 2), Gemm(128, 128, 8, 2)
    return plan(call, DotScaled(BACKEND.target(call.device).arch), Tiles(None, 64, gemm1, gemm2))


def runner(plan, call):
    """A function that runs ``plan`` on ``call``."""
    memory = call.inputs | {"out": call.out}
    return lambda: plan.run("fused_moe", memory, call.device, BACKEND.target(call.device))


def measure(row: Row, weights: dict, T: int, routing: str, copy: float, rate: float) -> dict:
    from torch_mxfp8moe.backends.triton.fused_moe import plan

    count = 16 if T <= 64 else 4 if T <= 1024 else 2
    calls = [row.call(T, weights=weights, routing=routing).with_out() for _ in range(count)]
    target = BACKEND.target(calls[0].device)
    plans = [plan(call, target) for call in calls]
    result = dict(row=row.name, routing=routing, T=T, floor=floor(row, calls, copy, rate))
    result["fused_moe"] = microseconds([runner(p, call) for p, call in zip(plans, calls)])
    if T * row.topk * row.hidden < 2**30:  # one part: each kernel alone, on what the kernels before it left
        bound = [p.bind(call.inputs | {"out": call.out}, call.device) for p, call in zip(plans, calls)]
        for launches in bound:
            for launch in launches:
                launch.run()
        for i, name in enumerate(KERNELS):
            result[name] = microseconds([launches[i].run for launches in bound])
    call = calls[0]
    runner(plans[0], call)()
    options = row.options | dict(out_dtype=torch.float32)
    want = torch_mxfp8moe.reference.fused_moe(**call.inputs, **options)
    result["error"] = float((call.out.float() - want).norm() / want.norm())
    naive = [runner(naive_plan(call), call) for call in calls]
    result["dot_scaled"] = microseconds(naive, 3)
    host = []
    for i in range(60):
        start = time.perf_counter()
        torch_mxfp8moe.fused_moe(**call.inputs, **row.options)
        host.append((time.perf_counter() - start) * 1e6)
        if i % 10 == 9:
            torch.cuda.synchronize()
    result["host"] = statistics.median(host)
    return result


def memory_bound(copy: float) -> None:
    """quantize_1x32, dequantize_1x32 and preshuffle, in bytes moved over time."""
    x = torch.randn(1 << 14, 1 << 14, device="cuda", dtype=torch.bfloat16)
    data, scale = torch_mxfp8moe.quantize_1x32(x)
    weight, weight_scale = data.view(16, 1 << 10, 1 << 14), scale.view(16, 1 << 10, 1 << 9)
    kwargs = dict(layout="aiter_gfx950", gate_up=True)
    out = torch_mxfp8moe.preshuffle(weight, weight_scale, **kwargs)
    small = data.nbytes + scale.nbytes

    def shuffle():
        torch_mxfp8moe.preshuffle(weight, weight_scale, out=out, **kwargs)

    cases = {
        "quantize_1x32 of bf16": (x.nbytes + small, lambda: torch_mxfp8moe.quantize_1x32(x)),
        "dequantize_1x32 to bf16": (x.nbytes + small, lambda: torch_mxfp8moe.dequantize_1x32(data, scale, x.dtype)),
        "preshuffle to aiter_gfx950": (2 * small, shuffle),
    }
    print(f"\n{'':<28} {'us':>8} {'TB/s':>6} {'of a copy':>10}")
    for name, (moved, call) in cases.items():
        us = microseconds([call] * 3)
        print(f"{name:<28} {us:>8.1f} {moved / us / 1e6:>6.2f} {moved / us / copy:>10.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=DEFAULT_ROWS, choices=list(rows()), metavar="ROW",
                        help="rows of test/shapes.csv: " + ", ".join(rows()))  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="token counts")
    parser.add_argument("--routing", default="uniform", choices=("uniform", "zipf", "one", "few"))
    parser.add_argument("--csv", type=Path, help="write the figures to this file as well")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("nothing to measure: there is no GPU that PyTorch can use")
    import triton

    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}")
    results = []
    with torch.inference_mode():
        copy, rate = ceilings()
        print(f"copy {copy / 1e6:.2f} TB/s, bf16 8192^3 product {rate / 1e6:.0f} TFLOP/s; microseconds:")
        for name in args.rows:
            row = rows()[name]
            progress(f"weights of {name}")
            weights = row.weights()
            columns = ("floor", "fused_moe", *KERNELS, "dot_scaled", "host")
            print(f"\n{name}, {args.routing} routing")
            print(f"{'T':>5}" + "".join(f"{c:>11}" for c in columns) + f"{'error':>9}")
            for T in args.tokens:
                progress(f"{name} T={T}")
                result = measure(row, weights, T, args.routing, copy, rate)
                results.append(result)
                progress("")
                cells = "".join(f"{result[c]:>11.1f}" if c in result else f"{'':>11}" for c in columns)
                print(f"{T:>5}{cells}{result['error']:>9.1e}", flush=True)
            del weights
        memory_bound(copy)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(results[0]))
            writer.writeheader()
            writer.writerows(results)


if __name__ == "__main__":
    main()
