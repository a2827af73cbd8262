#!/usr/bin/env python3
"""Convert a checkpoint's experts from bf16 to MXFP8, in one of the published forms, and report each layer's error.

SOURCE is a folder of safetensors files with experts named as in Qwen3-MoE, DeepSeek, GLM, Mixtral or MiniMax
(experts.N.gate_proj or experts.N.w1, ...), or stacked (experts.gate_up_proj [E, 2I, H], gate rows before up rows, or in
turn if config.json says gpt_oss; they are written one by one). Every other tensor is copied as it is. Each output file
is written beside its name and then renamed, config.json last: run the same command again after an interruption, and
files that are finished are not converted again.
"""

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from torch_mxfp8moe import dequantize_1x32, quantize_1x32
from torch_mxfp8moe.checkpoint import FORMS, INDEX, Checkpoint, CheckpointError, expert_of, show_progress, stacked_of
from torch_mxfp8moe.experts import halves
from torch_mxfp8moe.formats import SCALE_ROUNDINGS

STATE = "mxfp8_conversion"
"""Folder in the output that holds, while it is not whole, what each finished file is."""

REPORT = "mxfp8_report.json"

SAMPLED = {"all": 1, "sample": 16, "none": 0}
"""Of how many rows one is measured, by --report."""


def error_of(weight: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, every: int) -> tuple[float, float]:
    """(sum of squared errors, sum of squares) of every ``every``-th row."""
    want = weight[::every].float()
    got = dequantize_1x32(data[::every], scale[::every])
    return float((got - want).square_().sum(dtype=torch.float64)), float(want.square().sum(dtype=torch.float64))


def expert_weights(name: str, tensor: torch.Tensor, gate_up_order: str) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(layer, name, weight [out, in]) of each expert's matrix in a tensor; nothing for one that is no expert's."""
    if match := expert_of(name):
        yield match["layer"], name, tensor
    elif match := stacked_of(name):
        gate_up = match["matrix"] == "gate_up_proj"
        parts = ("gate_proj", "up_proj") if gate_up else ("down_proj",)
        for expert, rows in enumerate(tensor):
            for part, weight in zip(parts, halves(rows, gate_up_order, 0) if gate_up else (rows,)):
                yield match["layer"], f"{match['layer']}.experts.{expert}.{part}.weight", weight


def convert_file(checkpoint: Checkpoint, file: str, out: Path, form: str, scale_rounding: str, every: int) -> dict:
    """Writes one file; what the index and the report have to know of it."""
    from safetensors.torch import save_file

    tensors, errors, linear = {}, {}, []
    source = checkpoint.open(file)
    for name in source.keys():
        if checkpoint.files.get(name) != file:  # the index takes it from another
            continue
        tensor = source.get_tensor(name)
        experts = list(expert_weights(name, tensor, checkpoint.gate_up_order))
        if not experts:
            tensors[name] = tensor
            if name.endswith(".weight") and tensor.dim() == 2:
                linear.append(name.removesuffix(".weight"))
        for layer, key, weight in experts:
            data, scale = quantize_1x32(weight, scale_rounding)
            tensors[key] = data
            tensors[key.removesuffix("weight") + FORMS[form].scale] = scale
            if every:
                wrong, whole = error_of(weight, data, scale, every)
                before = errors.get(layer, (0.0, 0.0))
                errors[layer] = before[0] + wrong, before[1] + whole
    path, temporary = out / file, out / f"{file}.tmp"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)
    return dict(sizes={name: x.nbytes for name, x in tensors.items()}, errors=errors, linear=linear)


def convert(
    source: Path, out: Path, form: str = "mxfp8", scale_rounding: str = "rceil", report: str = "sample",
    progress=show_progress,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Convert a folder; relative_l2 and snr_db of each layer. Raises CheckpointError for a folder that is not fit."""
    if source.resolve() == out.resolve():
        raise CheckpointError(f"{out} is the source; expected another folder")
    with Checkpoint(source) as checkpoint:
        if checkpoint.form:
            raise CheckpointError(f"{source / 'config.json'}: already MXFP8, of form '{checkpoint.form.name}'")
        if not checkpoint.layers:
            raise CheckpointError(f"{source}: no tensor is named as an expert's, such as experts.0.gate_proj.weight")
        files = sorted(set(checkpoint.files.values()))
        outside = [file for file in files if Path(file).is_absolute() or ".." in Path(file).parts]
        if outside:
            raise CheckpointError(f"{source}: the index names {outside[0]}; expected files inside the folder")
        for layer in checkpoint.layers:
            checkpoint.check_layer(layer)
        others = sorted(str(path.relative_to(out)) for path in out.rglob("*.safetensors"))
        others = [file for file in others if file not in files]
        if others:  # which some loaders read whether an index names them or not
            raise CheckpointError(f"{out} has {others[0]}, of another checkpoint; expected an empty folder")
        state = out / STATE
        state.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", INDEX):  # of an earlier conversion: not whole until this one is
            (out / name).unlink(missing_ok=True)
        finished = []
        for number, file in enumerate(files):
            facts = os.stat(source / file)
            asked = dict(form=form, scale_rounding=scale_rounding, report=report, size=facts.st_size,
                         modified=facts.st_mtime_ns)  # fmt: skip
            note = state / f"{number}.json"
            done = json.loads(note.read_text()) if note.exists() and (out / file).exists() else {}
            if done.get("asked") != asked or done.get("file") != file:
                note.unlink(missing_ok=True)
                done = convert_file(checkpoint, file, out, form, scale_rounding, SAMPLED[report])
                done |= dict(asked=asked, file=file)
                temporary = note.with_suffix(".tmp")
                temporary.write_text(json.dumps(done))
                os.replace(temporary, note)
            finished.append(done)
            if progress:
                progress(number + 1, len(files), file)
        config = dict(checkpoint.config)
        layers = checkpoint.layers
    ignored = sorted({name for done in finished for name in done["linear"]})
    config["quantization_config"] = FORMS[form].config(ignored)
    weight_map = {name: done["file"] for done in finished for name in done["sizes"]}
    for path in source.iterdir():  # tokenizer and the like
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", INDEX):
            shutil.copyfile(path, out / path.name)
    if files != ["model.safetensors"]:
        total = sum(size for done in finished for size in done["sizes"].values())
        index = dict(metadata=dict(total_size=total), weight_map=dict(sorted(weight_map.items())))
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    result = {}
    for layer in layers:
        wrong, whole = (sum(done["errors"].get(layer, (0, 0))[i] for done in finished) for i in (0, 1))
        if whole:
            relative = math.sqrt(wrong / whole)
            result[layer] = dict(relative_l2=relative, snr_db=-20 * math.log10(relative) if relative else math.inf)
    if report != "none":
        finite = {  # JSON has no infinity and no NaN
            layer: {name: value if math.isfinite(value) else None for name, value in numbers.items()}
            for layer, numbers in result.items()
        }
        about = dict(form=form, scale_rounding=scale_rounding, rows=f"every {SAMPLED[report]}", layers=finite)
        (out / REPORT).write_text(json.dumps(about, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")  # last: a folder with it is whole
    shutil.rmtree(state)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with config.json and safetensors files")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--form", default="mxfp8", choices=FORMS, help="of the output (default mxfp8, as MiniMax-M3)")
    parser.add_argument("--scale-rounding", default="rceil", choices=SCALE_ROUNDINGS, help="default rceil")
    parser.add_argument("--report", default="sample", choices=SAMPLED,
                        help="measure the error of all rows, of one in 16 (default), or of none")  # fmt: skip
    args = parser.parse_args()
    try:
        result = convert(args.source, args.out, args.form, args.scale_rounding, args.report)
    except CheckpointError as error:
        sys.exit(f"convert: {error}")
    for layer, numbers in result.items():
        print(f"{layer:<44} relative L2 {numbers['relative_l2']:.5f}  SNR {numbers['snr_db']:6.2f} dB")


if __name__ == "__main__":
    main()
