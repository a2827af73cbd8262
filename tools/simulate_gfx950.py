#!/usr/bin/env python
"""Run a call of fused_moe as gfx950 machine code, on the CPU, and compare it with the reference. Needs no GPU.

Compiles the Triton kernels for gfx950, executes the code objects that come out (the assembly text, with a warning,
where rocm-llvm-python is not installed) in the simulator under test/gfx950_simulator with all of its checks (bounds,
undefined values, wait counts and wait states, order of waves in LDS), and prints, kernel by kernel, how many
instructions of waves were executed and how fast, then the error. Small sizes: about a million instructions of waves a
second.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test"))

import gfx950_ops  # noqa: E402
from gfx950_simulator import launch  # noqa: E402
from helpers import as_bytes, moe_inputs, relative_l2  # noqa: E402
from torch_mxfp8moe import LAYOUTS, reference  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("tokens", 33, "T"), ("hidden", 512, "H"), ("intermediate", 256, "I"), ("experts", 6, "E"), ("topk", 3, "K"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    parser.add_argument("--layout", default="row_major", choices=list(LAYOUTS), help="of the weights")
    parser.add_argument("--activation-dtype", default="mxfp8", choices=("mxfp8", "bf16"))
    parser.add_argument("--swiglu-limit", type=float, help="clamp, with alpha 1.702 and beta 1 as gpt-oss has them")
    args = parser.parse_args()
    import triton

    inputs = moe_inputs(T=args.tokens, H=args.hidden, I=args.intermediate, E=args.experts, K=args.topk)
    for name, gate_up in (("w1", True), ("w2", False)):
        both = inputs[name], inputs[f"{name}_scale"]
        inputs |= dict(zip((name, f"{name}_scale"), reference.preshuffle(*both, layout=args.layout, gate_up=gate_up)))
    options = dict(layout=args.layout, activation_dtype=args.activation_dtype)
    if args.swiglu_limit is not None:
        options |= dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=args.swiglu_limit)
    call = gfx950_ops.moe_call(inputs, **options)
    print(f"gfx950, simulated; Triton {triton.__version__}; T={args.tokens} H={args.hidden} I={args.intermediate} "
          f"E={args.experts} K={args.topk}, {args.layout}, {args.activation_dtype}")  # fmt: skip
    launches = gfx950_ops.bound_launches(call)
    statistics = launch.simulate(launches, gfx950_ops.TARGET, call.inputs.values())
    for one, what in zip(launches, statistics):
        print(f"  {one.kernel.__name__:<20} {what}")
    print(f"  {'all':<20} {launch.total}")
    want = reference.fused_moe(**inputs, **options)
    same = float((as_bytes(call.out) == as_bytes(want)).double().mean())
    print(f"relative L2 error {relative_l2(call.out, want):.1e}, {same:.1%} of the bytes equal")
    return 0 if relative_l2(call.out, want) <= 5e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
