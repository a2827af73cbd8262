#!/usr/bin/env python
"""For somebody with an MI350X or MI355X: settle what could not be settled without one. Writes one file to send back.

Runs, each as a program of its own with its output in the file: what the machine is; the tests of the ops on the GPU;
small calls on the GPU against the same machine code in the simulator, bit by bit (rounding and order inside the matrix
unit, and whether repeated calls agree); the benchmark. A step that fails or takes too long does not end the others.
Needs this checkout, a ROCm build of PyTorch with its Triton, and what `pip install .[test]` brings. Takes 20 to 60
minutes, most of it compiling for the tests.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("machine", "tests", "simulator", "benchmark")


def machine() -> None:
    """What the file is from."""
    import torch
    import triton

    import torch_mxfp8moe

    print(f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, HIP {torch.version.hip}, Triton {triton.__version__}")
    for i in range(torch.cuda.device_count()):
        print(torch.cuda.get_device_properties(i))
    print(*torch_mxfp8moe.backends().values(), sep="\n")
    commit = subprocess.run(["git", "log", "-1", "--format=%H"], cwd=ROOT, capture_output=True, text=True)
    print(f"torch_mxfp8moe {torch_mxfp8moe.__version__} {commit.stdout.strip()}")


def simulator(device: str = "cuda", backend: str = "triton", tokens: tuple[int, ...] = (1, 7, 33, 130)) -> None:
    """Small calls of ``backend`` on ``device`` and in the simulator, on the same inputs."""
    sys.path.insert(0, str(ROOT / "test"))
    import gfx950_ops
    import torch
    from helpers import as_bytes, moe_inputs, relative_l2

    from torch_mxfp8moe import fused_moe, reference

    print(f"{'call':<58} {'bytes as simulated':>18} {'rel. L2':>9} {'to reference':>13} {'50 runs alike':>14}")
    for layout in ("row_major", "aiter_gfx950"):
        for T in tokens:
            for activation in ("mxfp8", "bf16"):
                inputs = moe_inputs(T=T, H=512, I=256, E=5, K=3, seed=T)
                for name, gate_up in (("w1", True), ("w2", False)):
                    both = inputs[name], inputs[f"{name}_scale"]
                    arranged = reference.preshuffle(*both, layout=layout, gate_up=gate_up)
                    inputs |= dict(zip((name, f"{name}_scale"), arranged))
                options = dict(layout=layout, activation_dtype=activation, out_dtype=torch.float32, swiglu_limit=7.0)
                want = reference.fused_moe(**inputs, **options)
                simulated = gfx950_ops.fused_moe(gfx950_ops.moe_call(inputs, **options))
                there = {name: x.to(device) for name, x in inputs.items()}
                runs = [fused_moe(**there, **options, backend=backend).cpu() for _ in range(50)]
                same = float((as_bytes(runs[0]) == as_bytes(simulated)).double().mean())
                alike = all(torch.equal(as_bytes(runs[0]), as_bytes(x)) for x in runs)
                print(
                    f"T={T} H=512 I=256 E=5 K=3, {layout}, {activation:<29} {same:>12.2%} "
                    f"{relative_l2(runs[0], simulated):>9.1e} {relative_l2(runs[0], want):>13.1e} {alike!s:>14}",
                    flush=True,
                )


def command(step: str) -> list[str]:
    if step == "tests":
        pytest = ["-m", "pytest", "-c", "test/pytest.ini", "--rootdir", ".", "-q", "--tb=short", "--device", "cuda"]
        return [sys.executable, *pytest, "test"]
    if step == "benchmark":
        return [sys.executable, "tools/bench_gpu.py"]
    return [sys.executable, __file__, "--step", step]


def why_not(arch_wanted: str) -> str | None:
    """Why this machine cannot settle anything, or None if it can."""
    try:
        import torch
        import triton  # noqa: F401

        import torch_mxfp8moe  # noqa: F401
    except ImportError as error:
        return f"{error}; this takes torch, Triton and this package"
    if not torch.cuda.is_available():
        return "there is no GPU that PyTorch can use"
    arch = getattr(torch.cuda.get_device_properties(0), "gcnArchName", "an NVIDIA GPU").split(":")[0]
    return None if arch_wanted in (arch, "any") else f"the first GPU is {arch}, not {arch_wanted}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("settle_gfx950.txt"), help="the file (default %(default)s)")
    parser.add_argument("--arch", default="gfx950", help="another GPU than gfx950 to try this on, or 'any'")
    parser.add_argument("--minutes", type=float, default=60, help="after which a step is ended (default 60)")
    parser.add_argument("--step", choices=STEPS, help="only this step, to the terminal")
    args = parser.parse_args()
    reason = why_not(args.arch)
    if args.step in ("machine", "simulator"):
        {"machine": machine, "simulator": simulator}[args.step]()
        return 0
    if reason:
        print(f"nothing to settle here: {reason}", file=sys.stderr)
        return 2
    if args.step:
        return subprocess.run(command(args.step), cwd=ROOT).returncode
    failed = []
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with args.out.open("w") as file:
        for step in STEPS:
            print(f"{step} ...", flush=True)
            file.write(f"== {step}\n")
            file.flush()
            start = time.time()
            try:
                done = subprocess.run(
                    command(step), cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=file,
                    stderr=subprocess.STDOUT, timeout=60 * args.minutes,
                )  # fmt: skip
                status = f"exit status {done.returncode}"
            except subprocess.TimeoutExpired:
                status = f"ended after {args.minutes:g} minutes"
            if status != "exit status 0":
                failed.append(step)
            file.write(f"== {step}: {status}, {time.time() - start:.0f} s\n\n")
            print(f"  {status}")
    print(f"please send back {args.out}" + (f" (these did not end well: {', '.join(failed)})" if failed else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
