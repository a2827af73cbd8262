#!/usr/bin/env python3
"""Measure what folding MXFP8 to one power of two per 128 values does to a layer: the tables of docs/folding.md.

Folded operands can go through the fp8 matrix unit of an H100 without being widened, with one scaling in fp32 for each
128 products. Two errors come with it: values that one power of two for 128 cannot hold are rounded again, and the unit
adds with few bits. This emulates both on the CPU, against the same MXFP8 values multiplied exactly.

The unit, as it is known: the products of one instruction (32) and what it adds to are brought to the largest exponent
among them, bits that lie more than --bits below it are dropped, and so are those of the sum.

The layer is that of fused_moe with one expert: product, SwiGLU, MXFP8 rounding, product; fp32 output, relative L2.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test"))

from shapes import Row, rows  # noqa: E402
from terminal import progress  # noqa: E402

from torch_mxfp8moe import reference  # noqa: E402
from torch_mxfp8moe.formats import BLOCK, SCALE_NAN  # noqa: E402
from torch_mxfp8moe.layouts import pad_intermediate  # noqa: E402
from torch_mxfp8moe.reference import quantize_1x32 as quantized  # noqa: E402

GROUP = 128


@dataclass(frozen=True)
class Way:
    """How a layer is computed."""

    name: str
    folded: tuple[str, ...] = ()
    """Which operands are folded: x and w1 of the first product, h and w2 of the second."""
    unit: tuple[int, int] = (0, 0)
    """For each product the products of the fp8 unit between two sums in fp32; 0: exact; FP32: all in fp32."""


ALL = ("x", "w1", "h", "w2")

FP32 = -1

WAYS = (
    Way("not folded, fp32 sums", (), (FP32, FP32)),
    Way("folded, fp32 sums", ALL, (FP32, FP32)),
    Way("folded, promoted every 128", ALL, (GROUP, GROUP)),
    Way("every 64 in the first product", ALL, (64, GROUP)),
    Way("every 32 in the first product", ALL, (BLOCK, GROUP)),
    Way("not folded, every 32 in both", (), (BLOCK, BLOCK)),
    Way("the second product only, every 128", ("h", "w2"), (FP32, GROUP)),
)


def fold(data: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP8 values whose four blocks in each 128 have one scale: data [..., C] e4m3fn and scale [..., C/32] uint8, C
    divisible by 128 -> the same shapes.

    The scale is a power of two from 2^-127 on that takes none of the 128 values beyond 448; the least one, where the
    largest has a normal code. Codes are rounded to nearest even, which moves those that become subnormal: by 2^-10 of
    the scale or less, which is under 2^-17 of the largest of the 128. A block of zeros asks for no scale, whatever its
    own. One with scale 255 makes the four 255.
    """
    codes, scale = data.view(torch.uint8), scale.int()
    largest = (codes & 0x7F).unflatten(-1, (-1, BLOCK)).amax(-1).int()
    # A code above 0 is at most 1.75 * 2^((code + 1 >> 3) - 7): 15 there is 448 itself.
    needed = torch.where(largest == 0, 0, scale - 15 + (largest + 1 >> 3)).clamp(0, SCALE_NAN - 1)
    needed = torch.where(scale == SCALE_NAN, SCALE_NAN, needed)
    shared = needed.unflatten(-1, (-1, GROUP // BLOCK)).amax(-1).repeat_interleave(GROUP // BLOCK, -1)
    shift = (scale - shared).clamp(-64, 15)  # 2^-64 makes 0 of any code, as less would; above 15 all codes are 0
    values = data.float().unflatten(-1, (-1, BLOCK)) * torch.exp2(shift.float()).unsqueeze(-1)
    return values.flatten(-2).to(data.dtype), shared.to(torch.uint8)


def _power(x: torch.Tensor) -> torch.Tensor:
    """2^floor(log2 |x|), 0 for 0; fp32."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def unit_sum(x: torch.Tensor, w: torch.Tensor, total: torch.Tensor, bits: int) -> torch.Tensor:
    """total [M, N] + x [M, 32] w [N, 32]^T as one instruction of the unit computes it."""
    largest = (_power(x)[:, None] * _power(w)[None]).amax(-1).maximum(_power(total))
    quantum = (largest * 2.0**-bits).clamp(min=2.0**-126)
    terms = (x[:, None] * w[None] / quantum.unsqueeze(-1)).trunc_()
    total = (terms.sum(-1) + (total / quantum).trunc_()) * quantum
    quantum = (_power(total) * 2.0**-bits).clamp(min=2.0**-126)
    return (total / quantum).trunc_() * quantum


def product(x, w, interval: int, bits: int) -> torch.Tensor:
    """x [M, K] times w [N, K]^T, each (data, scale), fp32; ``interval`` as in :class:`Way`."""
    if interval <= 0:
        dtype = torch.float32 if interval == FP32 else torch.float64
        values = [reference.dequantize_1x32(*operand).to(dtype) for operand in (x, w)]
        return (values[0] @ values[1].T).float()
    (x, x_scale), (w, w_scale) = x, w
    x, w = x.float(), w.float()
    x_factor, w_factor = (torch.exp2(scale.float() - 127) for scale in (x_scale, w_scale))
    total = torch.zeros(len(x), len(w))
    for first in range(0, len(w), 256):
        part = slice(first, first + 256)
        for k in range(0, x.shape[1], interval):
            partial = torch.zeros_like(total[:, part])
            for at in range(k, min(k + interval, x.shape[1]), BLOCK):
                columns = slice(at, at + BLOCK)
                partial = unit_sum(x[:, columns], w[part, columns], partial, bits)
            total[:, part] += partial * (x_factor[:, None, k // BLOCK] * w_factor[None, part, k // BLOCK])
    return total


def values(kind: str, *shape: int) -> torch.Tensor:
    """Values of one of KINDS, fp32."""
    x = torch.randn(shape)
    if kind in ("t3", "t2"):
        x /= torch.distributions.Chi2(float(kind[1])).sample(shape).div_(float(kind[1])).sqrt_()
    elif kind == "lognormal":
        x = torch.randn(shape).mul_(1.5).exp_() * x.sign()
    elif kind == "blocks":  # each block of 32 with a spread of its own, up to 2^20 within 128
        smaller = torch.exp2(torch.rand(*shape[:-1], shape[-1] // BLOCK, 1) * -20)
        x = (x.unflatten(-1, (-1, BLOCK)) * smaller).flatten(-2)
    elif kind == "columns":  # one column in 64 is larger, by up to 2^20
        x *= torch.where(torch.rand(shape[-1]) < 1 / 64, torch.exp2(torch.rand(shape[-1]) * 20), 1)
    return x


KINDS = {
    "gauss": "Gaussian",
    "t3": "Student t, 3 degrees of freedom",
    "t2": "Student t, 2 degrees of freedom",
    "lognormal": "log-normal, sigma 1.5, either sign",
    "blocks": "Gaussian, each block of 32 times 2^-u, u in 0 to 20",
    "columns": "Gaussian, one column in 64 times 2^u, u in 0 to 20",
}
"""Distributions of the weights; activations are Gaussian, or those with larger columns if --activations says so."""


class Layer:
    """One expert and some tokens."""

    def __init__(self, row: Row, kind: str, activations: str, tokens: int, bits: int):
        self.bits, self.options = bits, row.options
        w1 = values(kind, 2 * row.intermediate, row.hidden)
        x = values(activations, tokens, row.hidden)
        w1 *= 2 / (x.double() @ w1.double().T).square().mean().sqrt().float()  # gates of a size that SwiGLU bends
        fill = (0, -row.hidden % GROUP)  # products of H that is no multiple are exactly these
        x, w1 = (torch.nn.functional.pad(operand, fill) for operand in (x, w1))
        self.x = quantized(x)
        self.w1 = pad_intermediate(*quantized(w1[None]), True, GROUP)
        self.w2 = pad_intermediate(*quantized(values(kind, 1, row.hidden, row.intermediate)), False, GROUP)
        self.w1, self.w2 = (tuple(part[0] for part in pair) for pair in (self.w1, self.w2))
        self.w1_folded, self.w2_folded = fold(*self.w1), fold(*self.w2)
        self.exact_h, self.exact = self.run(Way("exact"))

    def run(self, way: Way) -> tuple[torch.Tensor, torch.Tensor]:
        """The first product, [tokens, 2 I], and the layer's output."""
        x = fold(*self.x) if "x" in way.folded else self.x
        w1 = self.w1_folded if "w1" in way.folded else self.w1
        projected = product(x, w1, way.unit[0], self.bits)
        options = self.options
        h = quantized(
            reference.swiglu(
                *projected.chunk(2, -1), options["swiglu_alpha"], options["swiglu_beta"], options["swiglu_limit"]
            )
        )
        return projected, self.second(h, way)

    def second(self, h, way: Way) -> torch.Tensor:
        """The second product of an intermediate."""
        h = fold(*h) if "h" in way.folded else h
        return product(h, self.w2_folded if "w2" in way.folded else self.w2, way.unit[1], self.bits)

    def errors(self, way: Way) -> tuple[float, float]:
        """Relative L2 of the first product and of the layer's output."""
        projected, out = self.run(way)
        return tuple(((got - want).double().norm() / want.double().norm()).item()
                     for got, want in ((projected, self.exact_h), (out, self.exact)))  # fmt: skip


def sizes() -> list[str]:
    """The first row of each that are the same layer."""
    layers = {}
    for name, row in rows().items():
        layers.setdefault((row.hidden, row.intermediate, *row.options.values()), name)
    return list(layers.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=sizes(), choices=list(rows()), metavar="ROW",
                        help="rows of test/shapes.csv (default all that differ)")  # fmt: skip
    parser.add_argument("--weights", nargs="+", default=list(KINDS), choices=list(KINDS), help="(default all)")
    parser.add_argument("--activations", default="gauss", choices=("gauss", "columns"), help="(default gauss)")
    parser.add_argument("--tokens", type=int, default=64, help="rows of the products (default 64)")
    parser.add_argument("--bits", type=int, default=13, help="that the unit keeps below the first (default 13)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.tokens} tokens, activations: {KINDS[args.activations]}; the unit keeps {args.bits} bits.\n"
          "Relative L2 of the output, then, in brackets, that of the first product.\n")  # fmt: skip
    head = ["shape", "weights", "w2's values moved", *(way.name for way in WAYS)]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head), flush=True)
    for name in args.rows:
        row = rows()[name]
        for kind in args.weights:
            progress(f"{name}, {kind}")
            torch.manual_seed(0)
            layer = Layer(row, kind, args.activations, args.tokens, args.bits)
            before, after = (reference.dequantize_1x32(*pair) for pair in (layer.w2, layer.w2_folded))
            cells = [name, kind, f"{(before != after).float().mean().item():.2%}"]
            cells += [f"{out:.1e} ({first:.0e})" for first, out in map(layer.errors, WAYS)]
            progress("")
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
