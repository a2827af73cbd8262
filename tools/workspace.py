#!/usr/bin/env python
"""Print how much GPU memory fused_moe takes beside its inputs and its output, for real models and token counts.

The sizes are those that the Triton backend allocates, read off its plan for an architecture; no GPU is needed. On a
GPU, test_gpu_serving.py holds PyTorch's own count against them.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test"))

from options import add_rows, settle_rows  # noqa: E402

TOKENS = (1, 16, 64, 256, 1024, 8192, 32768)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90", help="sm_80, sm_90, sm_100, gfx942 or gfx950 (default sm_90)")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="token counts")
    add_rows(parser)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the output")
    args = parser.parse_args()
    settle_rows(parser, args)

    from torch_mxfp8moe.backends.triton.fused_moe import plan
    from torch_mxfp8moe.backends.triton.targets import Target

    print(f"MiB beside inputs and output, {args.arch}, {args.dtype} output; T =")
    print(f"{'':<36}" + "".join(f"{T:>9}" for T in args.tokens))
    for name, row in args.rows.items():
        sizes = []
        for T in args.tokens:
            call = row.call(T, "meta", out_dtype=getattr(torch, args.dtype))
            sizes.append(plan(call.with_out(), Target(args.arch)).workspace / 2**20)
        print(f"{name:<36}" + "".join(f"{size:>9.1f}" for size in sizes))


if __name__ == "__main__":
    main()
