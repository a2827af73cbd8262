#!/usr/bin/env python3
"""Measure loading against safetensors alone, and converting against a plain dtype cast, on this machine.

Writes a checkpoint of random bf16 experts to a temporary folder, converts it, loads the result, and does beside each
the least that could be done: cast the same files to float8_e4m3fn, and read the same bytes with safetensors. Files are
in the page cache for both, if it holds them (--folder /dev/shm makes sure). Best of --repeat.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from convert import convert
from safetensors import safe_open
from safetensors.torch import save_file

from torch_mxfp8moe import Mxfp8Experts
from torch_mxfp8moe.checkpoint import load_experts


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_new_process(name: str, folder: Path, threads: int) -> float:
    """Seconds of a way to read: memory that a process has written before is quicker to write again."""
    command = [sys.executable, __file__, "--read", name, "--folder", str(folder), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def table(rows: dict, sizes: dict, repeat: int, unit: str) -> None:
    """The best of ``repeat`` turns through all rows: a machine that is busy for a while is so for all of them."""
    times = {name: [] for name in rows}
    for _ in range(repeat):
        for name, measured in rows.items():
            times[name].append(measured())
    for name, taken in times.items():
        print(f"{name:<38} {min(taken):7.3f} s {sizes[name] / min(taken) / 1e9:7.2f} GB/s of {unit}", flush=True)


def write(folder: Path, layers: int, experts: int, hidden: int, intermediate: int) -> int:
    """Random bf16 experts, one file for each layer; how many bytes."""
    weight_map, size = {}, 0
    for layer in range(layers):
        tensors = {}
        for expert in range(experts):
            for matrix in ("gate_proj", "up_proj", "down_proj"):
                shape = (hidden, intermediate) if matrix == "down_proj" else (intermediate, hidden)
                name = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"
                tensors[name] = (torch.randn(shape) * 0.02).bfloat16()
        file = f"model-{layer:05}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(x.nbytes for x in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))
    (folder / "config.json").write_text(json.dumps(dict(hidden_size=hidden)))
    return size


def read_alone(folder: Path) -> None:
    """Every tensor's bytes, from safetensors to memory of their own."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensors[name] = file.get_tensor(name).clone()


def cast(folder: Path, out: Path) -> None:
    """Every tensor to float8_e4m3fn, file by file."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).to(torch.float8_e4m3fn) for name in file.keys()}
        save_file(tensors, out / path.name)


TP, EP = dict(tp_rank=1, tp_size=4), dict(ep_rank=1, ep_size=4)
READS = {
    # what to call, and what part of the bytes it needs
    "safetensors alone": (read_alone, 1),
    "load_experts": (lambda folder: load_experts(folder, progress=None), 1),
    "load_experts, 1 of 4 tensor parallel": (lambda folder: load_experts(folder, progress=None, **TP), 4),
    "load_experts, 1 of 4 expert parallel": (lambda folder: load_experts(folder, progress=None, **EP), 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=4, default=(4, 32, 2048, 768), metavar=("L", "E", "H", "I"),
                        help="layers, experts, hidden, intermediate size (default 4 32 2048 768, 1.2 GB)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument("--repeat", type=int, default=5, help="turns through each table")
    parser.add_argument("--folder", type=Path, help="where the temporary folders go, such as /dev/shm")
    parser.add_argument("--read", choices=READS, help="only print the seconds that this takes on the folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.read:
        Mxfp8Experts(1, 32, 32)  # whatever is imported late
        print(seconds(lambda: READS[args.read][0](args.folder)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, out, plain = (Path(folder) / name for name in ("bf16", "mxfp8", "cast"))
        for path in (source, plain):
            path.mkdir()
        size = write(source, *args.sizes)
        print(f"{size / 1e9:.2f} GB of bf16 experts, {args.threads} threads")
        rows = {"cast to float8": lambda: seconds(lambda: cast(source, plain))}
        for report in ("none", "sample", "all"):
            rows[f"convert, report {report}"] = lambda report=report: seconds(
                lambda: convert(source, out, report=report, progress=None)
            )
        table(rows, dict.fromkeys(rows, size), args.repeat, "bf16")
        size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        rows = {name: lambda name=name: in_new_process(name, out, args.threads) for name in READS}
        table(rows, {name: size / share for name, (_, share) in READS.items()}, args.repeat, "MXFP8")


if __name__ == "__main__":
    main()
