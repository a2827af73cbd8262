#!/usr/bin/env python
"""Measure the CPU kernels against this machine's own limits and against expert loops in PyTorch.

Prints four tables: decode against the memory read bandwidth, prefill against torch.mm in fp32, fused_moe against loops
over experts in plain PyTorch on bf16 and fp32 weights, and the cost of a call and of preshuffle. Each limit is measured
in the same run. Medians; the experts that decode touches rotate, so that no cache holds them.
"""

import argparse
import ctypes
import platform
import statistics
import sys
import time

import torch

import torch_mxfp8moe
from terminal import progress
from torch_mxfp8moe import extension


def median_seconds(call, repeat: int = 5, at_least: float = 0.3) -> float:
    """Median wall time of ``call(i)``, i = 0, 1, ...: at least ``repeat`` calls and ``at_least`` seconds of them."""
    call(0)
    times = []
    while len(times) < repeat or sum(times) < at_least:
        start = time.perf_counter()
        call(len(times) + 1)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Layer:
    """Random MXFP8 experts of E, H, I, and routings of T tokens to K of them that rotate over all experts."""

    def __init__(self, experts: int, hidden: int, intermediate: int, topk: int):
        self.experts, self.hidden, self.intermediate, self.topk = experts, hidden, intermediate, topk
        self.w1, self.w1_scale = self._weight(2 * intermediate, hidden)
        self.w2, self.w2_scale = self._weight(hidden, intermediate)
        self.expert_bytes = 3 * hidden * intermediate

    def _weight(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        data = torch.randint(0, 0x7F, (self.experts, rows, columns), dtype=torch.uint8)
        data |= torch.randint(0, 2, data.shape, dtype=torch.uint8) << 7
        return data.view(torch.float8_e4m3fn), torch.full((self.experts, rows, columns // 32), 114, dtype=torch.uint8)

    def routing(self, tokens: int, turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        """topk_weights, topk_ids: random distinct experts per token; a lone token's follow on from the last turn's."""
        if tokens == 1:
            ids = (torch.arange(self.topk) + turn * self.topk).unsqueeze(0) % self.experts
        else:
            ids = torch.rand(tokens, self.experts).topk(self.topk).indices
        return torch.rand(tokens, self.topk), ids

    def run(self, x, routing):
        return torch.ops.mxfp8moe.fused_moe(x, self.w1, self.w1_scale, self.w2, self.w2_scale, *routing)

    def dequantized(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch_mxfp8moe.dequantize_1x32(self.w1, self.w1_scale, dtype),
            torch_mxfp8moe.dequantize_1x32(self.w2, self.w2_scale, dtype),
        )


def expert_loop(x, w1, w2, topk_weights, topk_ids):
    """The same layer as a loop over the experts that are touched, on weights [E, 2I, H] and [E, H, I] of x's dtype."""
    out = torch.zeros_like(x)
    for expert in topk_ids.unique().tolist():
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ w1[expert].T).chunk(2, dim=-1)
        y = (torch.nn.functional.silu(gate) * up) @ w2[expert].T
        out.index_add_(0, token, y * topk_weights[token, slot, None].to(y.dtype))
    return out


def bandwidth() -> float:
    """Bytes per second of reading memory with every thread, by PyTorch's sum over 1 GiB of int64."""
    memory = torch.ones(1 << 27, dtype=torch.int64)
    return memory.nbytes / median_seconds(lambda i: memory.sum(), 7)


def decode(layer: Layer, tokens: int) -> tuple[float, float]:
    """Seconds per call, and bytes per second counted on the fp8 bytes of the experts touched."""
    x = torch.randn(tokens, layer.hidden, dtype=torch.bfloat16)
    routings = [layer.routing(tokens, turn) for turn in range(64)]
    touched = statistics.mean(ids.unique().numel() for _, ids in routings)
    seconds = median_seconds(lambda i: layer.run(x, routings[i % 64]), 32, 1.0)
    return seconds, touched * layer.expert_bytes / seconds


def peak_memory(call) -> float | None:
    """Bytes by which ``call`` raises the process' memory at its peak; None where Linux' /proc does not tell."""

    def status(key: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier calls freed
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")  # resets the high-water mark
        before = status("VmRSS")
        call()
        return status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048, help="H (default: Qwen3-30B-A3B's, 2048)")
    parser.add_argument("--intermediate", type=int, default=768, help="I (default 768)")
    parser.add_argument("--experts", type=int, default=128, help="E (default 128)")
    parser.add_argument("--topk", type=int, default=8, help="K (default 8)")
    parser.add_argument("--prefill-experts", type=int, default=16, help="E of the prefill measurement (default 16)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (default: PyTorch's)")
    parser.add_argument("--max-tokens", type=int, default=512, help="largest T of the comparison (default 512)")
    args = parser.parse_args()
    if extension.MODULE is None:
        sys.exit(f"nothing to measure: {extension.WHY_MISSING}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    print(f"{processor()}, {args.threads} threads, {extension.MODULE.capability()} kernels, torch {torch.__version__}")
    print(f"H={args.hidden} I={args.intermediate} E={args.experts} K={args.topk}, bf16 in and out")
    with torch.inference_mode():
        progress("weights")
        layer = Layer(args.experts, args.hidden, args.intermediate, args.topk)

        progress("read bandwidth")
        limit = bandwidth()
        print(f"\ndecode: memory reads {limit / 1e9:.1f} GB/s\n{'T':>4} {'ms':>9} {'GB/s':>7} {'of reads':>9}")
        for tokens in (1, 8):
            progress(f"decode T={tokens}")
            seconds, rate = decode(layer, tokens)
            print(f"{tokens:>4} {seconds * 1e3:>9.3f} {rate / 1e9:>7.1f} {rate / limit:>9.0%}")

        progress("prefill")
        square = torch.randn(2048, 2048)
        peak = 2 * 2048**3 / median_seconds(lambda i: torch.mm(square, square), 9)
        small = Layer(args.prefill_experts, args.hidden, args.intermediate, min(args.topk, args.prefill_experts))
        x, routing = torch.randn(512, args.hidden, dtype=torch.bfloat16), small.routing(512, 0)
        seconds = median_seconds(lambda i: small.run(x, routing), 7)
        rate = 512 * small.topk * 2 * small.expert_bytes / seconds
        print(f"\nprefill, {small.experts} experts: torch.mm fp32 {peak / 1e9:.1f} GFLOP/s")
        print(f"{'T':>4} {'ms':>9} {'GFLOP/s':>8} {'of mm':>6}")
        print(f"{512:>4} {seconds * 1e3:>9.1f} {rate / 1e9:>8.1f} {rate / peak:>6.0%}")

        print("\nfused_moe against a loop over experts in PyTorch, ms and how many times the loop's speed")
        print(f"{'T':>4} {'fused_moe':>10} {'bf16 loop':>10} {'':>6} {'fp32 loop':>10} {'':>6}")
        tokens, table = 1, {}
        sizes = [1 << n for n in range(10) if 1 << n <= args.max_tokens]
        for name, dtype in (("fused", None), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
            weights = layer.dequantized(dtype) if dtype else None
            for tokens in sizes:
                progress(f"{name} T={tokens}")
                x = torch.randn(tokens, args.hidden).to(dtype or torch.bfloat16)
                routings = [layer.routing(tokens, turn) for turn in range(32)]

                def call(i, x=x, weights=weights, routings=routings):
                    routing = routings[i % 32]
                    return expert_loop(x, *weights, *routing) if weights else layer.run(x, routing)

                table[name, tokens] = median_seconds(call, 5, 0.5)
            del weights
        for tokens in sizes:
            ours, bf16, fp32 = (table[name, tokens] * 1e3 for name in ("fused", "bf16", "fp32"))
            print(f"{tokens:>4} {ours:>10.2f} {bf16:>10.2f} {bf16 / ours:>5.1f}x {fp32:>10.2f} {fp32 / ours:>5.1f}x")

        x, routing = torch.randn(256, args.hidden, dtype=torch.bfloat16), layer.routing(256, 0)
        layer.run(x, routing)  # touches the weights
        peak = peak_memory(lambda: layer.run(x, routing))
        if peak is not None:
            print(f"\nmemory beside inputs at T=256, output included: {peak / 2**20:.1f} MiB")

        progress("overhead")
        tiny = Layer(1, 32, 32, 1)
        weights = (tiny.w1, tiny.w1_scale, tiny.w2, tiny.w2_scale)
        print()
        for tokens, what in ((0, "no token, so no kernel"), (1, "T=1 H=32 I=32, kernel included")):
            call = (torch.randn(tokens, 32), *weights, torch.rand(tokens, 1), torch.zeros(tokens, 1, dtype=torch.long))
            op = torch.ops.mxfp8moe.fused_moe
            thousand = median_seconds(lambda i, op=op, call=call: [op(*call) for _ in range(1000)], 15)
            print(f"a call of {what}: {thousand * 1e3:.1f} us")

        print(f"\n{'preshuffle':<12} {'ms':>8} {'copy ms':>8} {'ratio':>6}")
        for name, gate_up in (("w1", True), ("w2", False)):
            weight, scale = getattr(layer, name), getattr(layer, f"{name}_scale")
            if torch_mxfp8moe.LAYOUTS["aiter_gfx950"].why_not(*weight.shape[1:], gate_up):
                continue
            progress(f"preshuffle {name}")
            out = torch_mxfp8moe.preshuffle(weight, scale, layout="aiter_gfx950", gate_up=gate_up)

            def copy(i):
                out[0].view(torch.uint8).copy_(weight.view(torch.uint8))
                out[1].view(-1).copy_(scale.view(-1))

            def shuffle(i):
                torch_mxfp8moe.preshuffle(weight, scale, layout="aiter_gfx950", gate_up=gate_up, out=out)

            ours, plain = median_seconds(shuffle, 9), median_seconds(copy, 9)
            print(f"{name:<12} {ours * 1e3:>8.1f} {plain * 1e3:>8.1f} {ours / plain:>6.2f}")
    progress("")


if __name__ == "__main__":
    main()
