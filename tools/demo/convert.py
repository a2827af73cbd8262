#!/usr/bin/env python3
"""Turn a bf16 checkpoint of the demo model into the two that the repository holds.

OUT/mxfp8 is complete: experts in MXFP8 (`torch.ops.mxfp8moe.quantize_1x32`), the rest in bf16.
OUT/bf16 has the same experts in bf16; its index takes all other tensors from OUT/mxfp8.
"""

import argparse
import json
import shutil
from pathlib import Path

import checkpoint

HERE = Path(__file__).parent


def convert(source: Path, out: Path) -> None:
    """Write out/mxfp8 and out/bf16 from the bf16 checkpoint in source (which may be out/bf16 itself)."""
    cfg, quantization = checkpoint.read_config(source)
    if quantization:
        raise ValueError(f"{source} is quantised already; a bf16 checkpoint is needed")
    tensors = checkpoint.read_tensors(source)
    for kind in ("mxfp8", "bf16"):
        (out / kind).mkdir(parents=True, exist_ok=True)
        if (source / "tokenizer.json").resolve() != (out / kind / "tokenizer.json").resolve():
            shutil.copyfile(source / "tokenizer.json", out / kind / "tokenizer.json")

    checkpoint.write_config(out / "mxfp8", cfg, quantised=True)
    checkpoint.write_tensors(out / "mxfp8", checkpoint.quantise_experts(tensors))

    experts = {k: v for k, v in tensors.items() if checkpoint.is_expert(k)}
    checkpoint.write_config(out / "bf16", cfg)
    checkpoint.write_tensors(out / "bf16", experts, "experts.safetensors")
    index = {
        "metadata": {"total_size": sum(v.nbytes for v in tensors.values())},
        "weight_map": {k: "experts.safetensors" if k in experts else "../mxfp8/model.safetensors" for k in tensors},
    }
    (out / "bf16" / "model.safetensors.index.json").write_text(json.dumps(index, indent=0, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bf16", type=Path, default=HERE / "weights" / "bf16", metavar="DIR", help="what to convert")
    parser.add_argument("--out", type=Path, default=HERE / "weights", metavar="DIR", help="where the two folders go")
    args = parser.parse_args()
    convert(args.bf16, args.out)
    for path in sorted(args.out.glob("*/*.safetensors")):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
