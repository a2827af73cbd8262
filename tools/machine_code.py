#!/usr/bin/env python
"""Print what the shipped tiles of the Triton products compile to, as the table in docs/machine_code.md. Needs no GPU.

For each architecture, activation dtype, tile rule and product: the tile, the matrix instruction and how often it stands
in the code, registers a thread of MiniMax-M3 at TP4 and of gpt-oss (biases, a tail in K), stack, shared memory.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test"))

import machine_code  # noqa: E402
from shapes import rows  # noqa: E402
from torch_mxfp8moe import configs  # noqa: E402
from torch_mxfp8moe.backends.triton.fused_moe import admits, plan  # noqa: E402
from torch_mxfp8moe.backends.triton.launch import compile_offline  # noqa: E402
from torch_mxfp8moe.backends.triton.targets import Target  # noqa: E402

ROWS = ("MiniMax-M3 TP4", "gpt-oss-120b TP1")


def products(arch: str, dtype: str, tiles: configs.Tiles) -> list[list[machine_code.Code]]:
    """Of each row of ROWS that the kernel takes, the code of both products."""
    target, result = Target(arch), []
    for name in ROWS:
        call = rows()[name].call(64, "meta", activation_dtype=dtype, out_dtype=torch.bfloat16).with_out()
        if not admits(call, target, tiles):
            continue
        launches = plan(call, target, tiles).bind(call.inputs | {"out": call.out}, call.device)
        launches = [launch for launch in launches if "w" in launch.arguments]
        result.append([machine_code.read(kernel, arch) for kernel in compile_offline(launches, target)])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(machine_code.SHARED), choices=list(machine_code.SHARED))
    args = parser.parse_args()
    import triton

    print(f"Triton {triton.__version__}\n")
    print("| target | activations | product | tile | matrix instruction | registers | stack | shared |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for arch in args.arch:
        files = {dtype: configs.load(arch, dtype).tiles for dtype in ("mxfp8", "bf16")}
        alike = files["mxfp8"] == files["bf16"] and not Target(arch).scaled
        for dtype in ("mxfp8",) if alike else files:
            for tiles in files[dtype]:
                codes = products(arch, dtype, tiles)
                for i, tile in enumerate((tiles.gemm1, tiles.gemm2)):
                    both = [code[i] for code in codes]
                    instruction = "none"
                    if both[0].matrix:
                        name = both[0].matrix[0].rstrip(".").split(".cta_group")[0].replace(".sync.aligned", "")
                        instruction = f"{len(both[0].matrix)}x `{name}`"
                    weight_rows = tile.block_n * (2 if i == 0 else 1)
                    options = "".join(f", {name} {value}" for name, value in tile.options.items())
                    if tile.programs:
                        options += f", warp-specialized, {tile.programs} at a time"
                        options += ", twice, in turns" * (tile.turns == 2) + ", gathered" * (tiles.gather and i == 0)
                    cells = (
                        arch, "both" if alike else dtype, i + 1,
                        f"{tiles.block_m} x {weight_rows} x {tile.block_k}, {tile.num_warps} warps, "
                        f"{tile.num_stages} stages{options}",
                        instruction,
                        " / ".join(str(code.registers) for code in both),
                        " / ".join(str(code.stack) for code in both),
                        f"{both[0].shared >> 10} KiB",
                    )  # fmt: skip
                    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
