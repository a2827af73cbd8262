#!/usr/bin/env python3
"""Measure what each scale rounding of MXFP8 does to the trained model of tools/demo: the table of docs/numerics.md.

For every mode of quantize_1x32: the error of the expert weights, how many values saturate (their magnitude is beyond
the largest that their block's scale can hold), and the perplexity of the model on held-out text with its experts
quantised so. The op rounds activations to MXFP8 with rceil, whatever the weights' mode; the last row leaves them bf16.
All other arithmetic is fp32.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

DEMO = Path(__file__).resolve().parent / "demo"
sys.path.insert(0, str(DEMO))

import checkpoint  # noqa: E402
from model import Model, mean_loss  # noqa: E402
from terminal import progress  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

from torch_mxfp8moe import Mxfp8Experts, dequantize_1x32, quantize_1x32  # noqa: E402
from torch_mxfp8moe.formats import BLOCK, E4M3_MAX, SCALE_ROUNDINGS  # noqa: E402


def weights(model: Model) -> list[torch.Tensor]:
    """Every expert weight of a model in bf16, as [blocks, 32] fp32."""
    experts = [layer.block_sparse_moe.experts for layer in model.layers]
    return [w.detach().float().reshape(-1, BLOCK) for e in experts for w in (e.w1, e.w2)]


def weight_error(model: Model, mode: str) -> tuple[float, float]:
    """Relative L2 of all expert weights together, and the share of values that saturate."""
    wrong = whole = saturated = count = 0.0
    for blocks in weights(model):
        data, scale = quantize_1x32(blocks, mode)
        wrong += (dequantize_1x32(data, scale) - blocks).square().sum(dtype=torch.float64).item()
        whole += blocks.square().sum(dtype=torch.float64).item()
        largest = E4M3_MAX * torch.exp2(scale.float() - 127)
        saturated += (blocks.abs() > largest).sum().item()
        count += blocks.numel()
    return math.sqrt(wrong / whole), saturated / count


def quantised(folder: Path, mode: str, activation_dtype: str) -> Model:
    """The bf16 model in fp32, its experts in MXFP8."""
    model = checkpoint.load_model(folder, dtype=torch.float32)
    for layer in model.layers:
        experts = layer.block_sparse_moe.experts
        layer.block_sparse_moe.experts = Mxfp8Experts.from_weights(
            experts.w1.detach(), experts.w2.detach(), scale_rounding=mode, activation_dtype=activation_dtype
        )
    return model


@torch.no_grad()
def rows(folder: Path, ids: torch.Tensor | None) -> list[str]:
    """The table, in Markdown: a row without MXFP8, then one for each mode. Without ``ids`` no perplexities."""
    model = checkpoint.load_model(folder, dtype=torch.float32)
    table = ["| weights | activations | relative L2 of the weights | SNR | saturated values |", "|" + " --- |" * 5]
    if ids is not None:
        before = math.exp(mean_loss(model, ids))
        table = [table[0] + " perplexity | of bf16 |", table[1] + " --- |" * 2]
    table.append("| bf16 | fp32 | 0 | | |" + ("" if ids is None else f" {before:.4f} | 100.00 % |"))
    for mode, activations in [*((mode, "mxfp8") for mode in SCALE_ROUNDINGS), (SCALE_ROUNDINGS[0], "bf16")]:
        error, saturated = weight_error(model, mode)
        row = f"| `{mode}` | {activations} | {error:.4f} | {-20 * math.log10(error):.2f} dB | {saturated:.2%} |"
        row = row.replace("% |", " % |")
        if ids is not None:
            progress(f"perplexity, {mode}, {activations}")
            perplexity = math.exp(mean_loss(quantised(folder, mode, activations), ids))
            row += f" {perplexity:.4f} | {perplexity / before * 100:.2f} % |"
        table.append(row)
    progress("")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=DEMO / "weights" / "bf16", help="a bf16 checkpoint of the demo")
    parser.add_argument("--heldout", type=Path, default=DEMO / "heldout.txt", help="text for the perplexity")
    parser.add_argument("--heldout-kb", type=int, default=0, metavar="KB", help="measure on so much text; 0: all")
    args = parser.parse_args()
    text = args.heldout.read_bytes()[: args.heldout_kb * 1000 or None].decode("utf-8", "ignore")
    ids = torch.tensor(Tokenizer.load(args.weights / "tokenizer.json").encode(text))
    print(f"{len(ids)} tokens of {args.heldout.name}, torch {torch.__version__} on the CPU")
    print("\n".join(rows(args.weights, ids)))


if __name__ == "__main__":
    main()
