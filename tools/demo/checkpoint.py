"""Checkpoints in safetensors: bf16, and MXFP8 as published for MiniMax-M3 (`torch_mxfp8moe.checkpoint.FORMS`).

A folder holds config.json, tokenizer.json and either model.safetensors or, where the tensors are spread over files,
model.safetensors.index.json. Expert N of a layer is `experts.N.w1` (gate), `.w3` (up), `.w2` (down).
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import Config, Model
from torch_mxfp8moe import quantize_1x32
from torch_mxfp8moe.checkpoint import FORMS, Checkpoint

EXPERTS = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
FORM = FORMS["mxfp8"]
NOT_QUANTISED = ["lm_head", "model.embed_tokens", "self_attn", "block_sparse_moe.gate"]


def write_config(folder: Path, cfg: Config, quantised: bool = False) -> None:
    config = {"model_type": "tiny_moe", "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    config |= dataclasses.asdict(cfg)
    if quantised:
        config["quantization_config"] = FORM.config(NOT_QUANTISED)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_config(folder: Path) -> tuple[Config, dict | None]:
    """The model's sizes, and the quantization_config if there is one."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {folder} is not a checkpoint folder")
    config = json.loads(path.read_text())
    fields = {f.name: config[f.name] for f in dataclasses.fields(Config) if f.name in config}
    return Config(**fields), config.get("quantization_config")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder."""
    index = Path(folder) / "model.safetensors.index.json"
    files = {"model.safetensors"}
    weight_map = None
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        files = set(weight_map.values())
    tensors = {}
    for name in files:
        path = Path(folder) / name
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: the checkpoint in {folder} is not complete")
        found = load_file(path)
        tensors |= found if weight_map is None else {k: v for k, v in found.items() if weight_map.get(k) == name}
    return tensors


def write_tensors(folder: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> None:
    """One file, replaced as a whole: its old content may still be mapped by the tensors that are written."""
    temporary = folder / f"{name}.tmp"
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    temporary.replace(folder / name)


def is_expert(name: str) -> bool:
    return ".block_sparse_moe.experts." in name


def stacked(tensors: dict[str, Tensor], layer: int, cfg: Config) -> tuple[Tensor, Tensor]:
    """One layer's experts: w1 [E, 2I, H] (gate rows, then up rows) and w2 [E, H, I]."""

    def get(expert: int, matrix: str) -> Tensor:
        name = EXPERTS.format(layer=layer, expert=expert, matrix=matrix)
        if name not in tensors:
            raise ValueError(f"the checkpoint has no tensor {name}")
        return tensors[name]

    experts = range(cfg.num_local_experts)
    w1 = torch.stack([torch.cat((get(e, "w1"), get(e, "w3"))) for e in experts])
    return w1, torch.stack([get(e, "w2") for e in experts])


def export_bf16(model: Model) -> dict[str, Tensor]:
    """All tensors of a model with bf16 experts, in bf16 and under their published names."""
    tensors = {}
    for name, value in model.state_dict().items():
        if ".experts." not in name:
            tensors[f"model.{name}"] = value.detach().to("cpu", torch.bfloat16)
    for i, layer in enumerate(model.layers):
        experts = layer.block_sparse_moe.experts
        w1, w2 = (w.detach().to("cpu", torch.bfloat16) for w in (experts.w1, experts.w2))
        for expert in range(w1.shape[0]):
            gate, up = w1[expert].chunk(2)
            for matrix, value in (("w1", gate), ("w3", up), ("w2", w2[expert])):
                tensors[EXPERTS.format(layer=i, expert=expert, matrix=matrix)] = value
    return tensors


def quantise_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with every expert weight in MXFP8."""
    out = {}
    for name, value in tensors.items():
        if is_expert(name):
            out[name], out[name.removesuffix("weight") + FORM.scale] = quantize_1x32(value)
        else:
            out[name] = value
    return out


def load_model(folder: Path, device: str = "cpu", backend: str = "auto", dtype: torch.dtype = torch.bfloat16) -> Model:
    """A model from a checkpoint of either kind. What the checkpoint holds in bf16 is held, and computed with, in
    dtype; MXFP8 experts are `torch_mxfp8moe.Mxfp8Experts` on `backend`."""
    cfg, quantization = read_config(folder)
    tensors = read_tensors(folder)
    with torch.device("meta"):
        model = Model(cfg)
    state = {k.removeprefix("model."): v.to(dtype) for k, v in tensors.items() if not is_expert(k)}
    if quantization:
        with Checkpoint(folder) as checkpoint:
            for i, layer in enumerate(model.layers):
                name = f"model.layers.{i}.block_sparse_moe"
                layer.block_sparse_moe.experts = checkpoint.load(name, backend=backend, device=device)
    else:
        for i in range(cfg.num_hidden_layers):
            w1, w2 = stacked(tensors, i, cfg)
            prefix = f"layers.{i}.block_sparse_moe.experts"
            state |= {f"{prefix}.w1": w1.to(dtype), f"{prefix}.w2": w2.to(dtype)}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    missing = [m for m in missing if not (quantization and ".experts." in m)]
    if missing or unexpected:
        raise ValueError(f"{folder}: tensors missing {missing[:5]}, not expected {unexpected[:5]}")
    model.rope = Model(dataclasses.replace(cfg, num_hidden_layers=0)).rope  # fp32, and computed rather than stored
    return model.to(device).eval().requires_grad_(False)
