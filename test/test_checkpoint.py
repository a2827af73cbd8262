"""Experts from checkpoint folders: every form, naming and part of a model; what is wrong is an error that says where."""

import json
import re
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from safetensors.torch import load_file, save_file

import torch_mxfp8moe
from device import DEVICE
from helpers import E8M0, FLOATS, error_of, only_cpu, randn, run_python, same_bytes
from torch_mxfp8moe import LAYOUTS, Mxfp8Experts, SharedExpert
from torch_mxfp8moe.checkpoint import FORMS, Checkpoint, CheckpointError, load_experts

pytestmark = only_cpu

G, H, I = 3, 256, 96  # noqa: E741
LAYER = "model.layers.{}.mlp"
STYLES = {"proj": ("gate_proj", "up_proj", "down_proj"), "w": ("w1", "w3", "w2")}


def quantised(seed: int, experts: int = G, inner: int = I) -> dict[str, torch.Tensor]:
    """w1, w1_scale, w2, w2_scale of a layer."""
    w1, s1 = torch_mxfp8moe.reference.quantize_1x32(randn(experts, 2 * inner, H, seed=seed).cpu())
    w2, s2 = torch_mxfp8moe.reference.quantize_1x32(randn(experts, H, inner, seed=seed + 50).cpu())
    return dict(w1=w1, w1_scale=s1, w2=w2, w2_scale=s2)


def named(layer: str, weights: dict[str, torch.Tensor], scale: str, style: str = "proj") -> dict[str, torch.Tensor]:
    """A layer's tensors under published names, one by one."""
    tensors = {}
    for kind, suffix in (("", "weight"), ("_scale", scale)):
        for expert in range(len(weights["w1"])):
            gate, up = weights[f"w1{kind}"][expert].chunk(2)
            for matrix, x in zip(STYLES[style], (gate, up, weights[f"w2{kind}"][expert]), strict=True):
                tensors[f"{layer}.experts.{expert}.{matrix}.{suffix}"] = x.contiguous()
    return tensors


def write(folder: Path, tensors: dict, quantization: dict | None, files: int = 2, **config) -> Path:
    """A folder with the tensors spread over files, whatever belongs together."""
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    weight_map = {name: f"model-{i % files}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def model(folder: Path, form: str = "mxfp8", style: str = "proj", layers=(0, 2, 10), **config) -> Path:
    tensors = {"model.embed_tokens.weight": torch.zeros(4, H)}
    for layer in layers:
        tensors |= named(LAYER.format(layer), quantised(layer), FORMS[form].scale, style)
    return write(folder, tensors, FORMS[form].config(["lm_head"]), **config)


def same_buffers(a: Mxfp8Experts, b: Mxfp8Experts) -> bool:
    a, b = (dict(module.named_buffers()) for module in (a, b))
    return a.keys() == b.keys() and all(same_bytes(a[name], b[name]) for name in a)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, style, tmp_path):
    seen = []
    layers = load_experts(
        model(tmp_path / "model", form, style), device=DEVICE, progress=lambda *facts: seen.append(facts)
    )
    assert list(layers) == [LAYER.format(i) for i in (0, 2, 10)]
    assert seen == [(i, 3, name) for i, name in enumerate(layers, 1)]
    for i, name in zip((0, 2, 10), layers):
        assert same_buffers(layers[name], Mxfp8Experts.from_weights(**quantised(i), device=DEVICE))


def test_forms_as_they_are_published(tmp_path):
    """quantization_configs of others: ModelOpt's own file, mixed compressed-tensors, Quark's list, a text_config."""
    group = dict(num_bits=8, type="float", strategy="group", group_size=32)
    published = {
        "mxfp8": dict(quant_method="mxfp8", ignored_layers=[]),
        "modelopt": dict(quant_method="modelopt", quant_algo="MXFP8", ignore=["lm_head"], producer=dict(name="modelopt")),
        "compressed-tensors": dict(
            quant_method="compressed-tensors",
            format="mixed-precision",
            config_groups=dict(group_0=dict(format="mxfp8-quantized", weights=group, targets=["Linear"])),
        ),
        "quark": dict(
            quant_method="quark",
            global_quant_config=dict(
                weight=[dict(dtype="fp8_e4m3", qscheme="per_group", group_size=32, scale_format="e8m0")]
            ),
        ),
    }
    for name, config in published.items():
        folder = write(tmp_path / name, {}, config)
        assert Checkpoint(folder).form.name == name
        folder = write(tmp_path / f"{name}-text", {}, None, text_config=dict(quantization_config=config))
        assert Checkpoint(folder).form.name == name
    folder = write(tmp_path / "own", {}, None)
    (folder / "hf_quant_config.json").write_text(json.dumps(dict(quantization=dict(quant_algo="MXFP8", group_size=32))))
    assert Checkpoint(folder).form.name == "modelopt"
    assert Checkpoint(write(tmp_path / "none", {}, None)).form is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", (dict(), dict(tp_size=3), dict(ep_size=2), dict(tp_size=2, ep_size=3)), ids=str)
def test_parts_of_a_model(layout, ranks, tmp_path):
    folder = model(tmp_path / "model", layers=(1,))
    whole = quantised(1)
    for tp_rank in range(ranks.get("tp_size", 1)):
        for ep_rank in range(ranks.get("ep_size", 1)):
            options = ranks | dict(tp_rank=tp_rank, ep_rank=ep_rank, layout=layout)
            with Checkpoint(folder) as checkpoint:
                got = checkpoint.load(LAYER.format(1), device=DEVICE, **options)
            assert same_buffers(got, Mxfp8Experts.from_weights(**whole, device=DEVICE, **options))


def test_a_rank_reads_its_part_alone(tmp_path, monkeypatch):
    """Of each file's tensors: only this rank's experts, and of those only its rows and columns."""
    folder = model(tmp_path / "model", layers=(1,))
    read = {}

    class Counting:
        def __init__(self, name, tensor):
            self.name, self.tensor = name, tensor

        def __getattr__(self, name):
            return getattr(self.tensor, name)

        def __getitem__(self, index):
            part = self.tensor[index]
            read[self.name] = read.get(self.name, 0) + part.nbytes
            return part

    plain = Checkpoint._slice
    monkeypatch.setattr(Checkpoint, "_slice", lambda self, name, *rest: Counting(name, plain(self, name, *rest)))
    with Checkpoint(folder) as checkpoint:
        module = checkpoint.load(LAYER.format(1), tp_rank=1, tp_size=3, ep_rank=1, ep_size=3)
    assert {name.split(".experts.")[1].split(".")[0] for name in read} == {"1"} and len(read) == 6
    assert sum(read.values()) == sum(x.nbytes for name, x in module.named_buffers() if name != "expert_map")


def test_typed_scales_and_one_file(tmp_path):
    tensors = named(LAYER.format(0), quantised(0), "weight_scale_inv")
    tensors = {name: x.view(E8M0) if x.dtype is torch.uint8 else x for name, x in tensors.items()}
    folder = write(tmp_path / "model", tensors, FORMS["mxfp8"].config([]), files=1)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-0.safetensors").rename(folder / "model.safetensors")
    assert same_buffers(load_experts(folder)[LAYER.format(0)], Mxfp8Experts.from_weights(**quantised(0), device="cpu"))


@pytest.mark.parametrize("suffix", ("", ".weight"))
@pytest.mark.parametrize("tp_size", (1, 3))
@pytest.mark.parametrize("order", ("concatenated", "interleaved"))
def test_stacked_experts(suffix, tp_size, order, tmp_path):
    weights, layer = quantised(4), LAYER.format(0)
    given = dict(weights)
    if order == "interleaved":
        for name in ("w1", "w1_scale"):
            halves = weights[name].view(torch.uint8).chunk(2, 1)
            given[name] = torch.stack(halves, 2).flatten(1, 2).view(weights[name].dtype)
    scale = ".weight_scale_inv" if suffix else "_scale_inv"
    tensors = {}
    for name, matrix in (("w1", "gate_up_proj"), ("w2", "down_proj")):
        tensors[f"{layer}.experts.{matrix}{suffix}"] = given[name]
        tensors[f"{layer}.experts.{matrix}{scale}"] = given[f"{name}_scale"]
    tensors[f"{layer}.experts.gate_up_proj_bias"] = randn(G, 2 * I, seed=1).cpu()
    tensors[f"{layer}.experts.down_proj_bias"] = randn(G, H, seed=2).cpu()
    folder = write(tmp_path / "model", tensors, FORMS["mxfp8"].config([]), hidden_size=H)
    for rank in range(tp_size):
        options = dict(tp_rank=rank, tp_size=tp_size, gate_up_order=order)
        got = load_experts(folder, device=DEVICE, bias_dtype=torch.float32, **options)[layer]
        want = Mxfp8Experts.from_weights(
            **given,
            w1_bias=tensors[f"{layer}.experts.gate_up_proj_bias"],
            w2_bias=tensors[f"{layer}.experts.down_proj_bias"],
            device=DEVICE,
            **options,
        )
        assert same_buffers(got, want)


@pytest.mark.parametrize("S", (1, 2))
@pytest.mark.parametrize("tp_size", (1, 3))
def test_a_shared_expert(S, tp_size, tmp_path):
    """Of S times the routed size: S experts, each a part of its rows and columns."""
    layer, routed, shared = LAYER.format(0), quantised(0), quantised(7, 1, S * I)
    tensors = named(layer, routed, "weight_scale_inv")
    apart = named(layer, shared, "weight_scale_inv")
    tensors |= {name.replace(".experts.0.", ".shared_experts."): x for name, x in apart.items()}
    folder = write(tmp_path / "model", tensors, FORMS["mxfp8"].config([]))
    both = {}
    for name, x in shared.items():
        x, block = x.view(torch.uint8)[0], 32 if name == "w2_scale" else 1
        parts = x.unflatten(0, (2, S, I)).transpose(0, 1).flatten(1, 2) if name[:2] == "w1" else (
            x.unflatten(1, (S, I // block)).transpose(0, 1)
        )  # fmt: skip
        both[name] = torch.cat([routed[name].view(torch.uint8), parts]).view(routed[name].dtype)
    for rank in range(tp_size):
        options = dict(shared=SharedExpert(S), tp_rank=rank, tp_size=tp_size)
        got = load_experts(folder, **options)[layer]
        assert same_buffers(got, Mxfp8Experts.from_weights(**both, device="cpu", **options))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tp_size", (1, 3))
@pytest.mark.parametrize("layout", ("row_major", "aiter_gfx950"))
def test_a_shared_expert_in_high_precision(layout, tp_size, dtype, tmp_path):
    """As the converter leaves it."""
    layer, routed = LAYER.format(0), quantised(0)
    w1, w2 = randn(1, 2 * I, H, dtype=dtype).cpu(), randn(1, H, I, seed=1, dtype=dtype).cpu()
    high = dict(zip(("gate_proj", "up_proj", "down_proj"), (*w1[0].chunk(2), w2[0]), strict=True))
    tensors = named(layer, routed, "weight_scale_inv") | {
        f"{layer}.shared_experts.{name}.weight": x.contiguous() for name, x in high.items()
    }
    folder = write(tmp_path / "model", tensors, FORMS["mxfp8"].config([]))
    both = {}
    for name, x in (("w1", w1), ("w2", w2)):
        for key, part in zip((name, f"{name}_scale"), torch_mxfp8moe.quantize_1x32(x, "floor")):
            whole = [routed[key].view(torch.uint8), part.view(torch.uint8)]
            both[key] = torch.cat(whole).view(routed[key].dtype)
    for rank in range(tp_size):
        options = dict(shared=SharedExpert(), tp_rank=rank, tp_size=tp_size, layout=layout)
        got = load_experts(folder, scale_rounding="floor", **options)[layer]
        assert same_buffers(got, Mxfp8Experts.from_weights(**both, device="cpu", **options))
    bias = f"{layer}.shared_experts.up_proj.bias"
    folder = write(tmp_path / "biased", tensors | {bias: torch.zeros(I, dtype=dtype)}, FORMS["mxfp8"].config([]))
    assert f"tensor {bias} would be left out" in error_of(lambda: load_experts(folder, shared=SharedExpert()))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_checkpoint_that_is_not_quantised_is_quantised(dtype, tmp_path):
    layer = LAYER.format(0)
    w1, w2 = randn(G, 2 * I, H, dtype=dtype).cpu(), randn(G, H, I, seed=1, dtype=dtype).cpu()
    tensors = {}
    for expert in range(G):
        gate, up = w1[expert].chunk(2)
        for matrix, x in zip(STYLES["w"], (gate, up, w2[expert]), strict=True):
            tensors[f"{layer}.experts.{expert}.{matrix}.weight"] = x.contiguous()
    folder = write(tmp_path / "model", tensors, None)
    options = dict(tp_rank=1, tp_size=3, scale_rounding="floor")
    got = load_experts(folder, device=DEVICE, **options)[layer]
    assert same_buffers(got, Mxfp8Experts.from_weights(w1, w2, device=DEVICE, **options))


def test_the_demo_model():
    weights = Path(__file__).parent.parent / "tools/demo/weights"
    mxfp8, bf16 = (load_experts(weights / kind) for kind in ("mxfp8", "bf16"))
    assert len(mxfp8) == 4
    assert all(same_buffers(mxfp8[name], bf16[name]) for name in mxfp8)


def test_importing_needs_no_safetensors(tmp_path):
    folder = model(tmp_path / "model", layers=(0,))
    printed = run_python(
        """
import sys
sys.modules["safetensors"] = None
import torch_mxfp8moe, torch_mxfp8moe.checkpoint
try:
    torch_mxfp8moe.checkpoint.load_experts(sys.argv[1])
except ImportError as error:
    print(error)
""",
        str(folder),
    )
    assert printed == "reading checkpoints takes safetensors: pip install safetensors\n"


# --- what is wrong


def config(folder: Path, **changes) -> None:
    """Changes config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewritten(folder: Path, name: str, tensor: torch.Tensor | None) -> Path:
    """The folder with one tensor replaced, or left out of its file."""
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = {key: x.clone() for key, x in load_file(folder / file).items()}
    tensors[name] = tensor
    save_file({key: x for key, x in tensors.items() if x is not None}, folder / file)
    return folder


def added(folder: Path, name: str, tensor: torch.Tensor) -> Path:
    """The folder with one tensor more, in a file of its own."""
    save_file({name: tensor}, folder / "more.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = "more.safetensors"
    path.write_text(json.dumps(index))
    return folder


def test_errors_name_file_tensor_and_what_was_expected(tmp_path):
    layer = LAYER.format(0)
    down = f"{layer}.experts.0.down_proj.weight"
    up, scale = f"{layer}.experts.1.up_proj.weight", f"{layer}.experts.1.up_proj.weight_scale_inv"
    texts = []

    def wrong(change, **options):
        folder = model(tmp_path / str(len(texts)), layers=(0,))
        change(folder)
        with pytest.raises(CheckpointError) as error:
            load_experts(folder, **options)
        texts.append(str(error.value).replace(str(folder), "FOLDER"))

    def unnamed(folder, name):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        del index["weight_map"][name]
        path.write_text(json.dumps(index))

    def cut(folder, to):
        path = folder / "model-0.safetensors"
        path.write_bytes(path.read_bytes()[:to])

    wrong(lambda folder: rewritten(folder, up, None))
    wrong(lambda folder: unnamed(folder, up))
    wrong(lambda folder: unnamed(folder, down))
    wrong(lambda folder: unnamed(folder, scale))
    wrong(lambda folder: rewritten(folder, scale, torch.zeros(I, H // 16, dtype=torch.uint8)))
    wrong(lambda folder: rewritten(folder, scale, torch.zeros(I, H // 32)))
    wrong(lambda folder: rewritten(folder, up, torch.zeros(I, H, dtype=torch.bfloat16)))
    wrong(lambda folder: rewritten(folder, up, torch.zeros(I, H - 32).to(torch.float8_e4m3fn)))
    wrong(lambda folder: cut(folder, -100))
    wrong(lambda folder: cut(folder, 100))
    wrong(lambda folder: cut(folder, 5))
    wrong(lambda folder: (folder / "model-1.safetensors").unlink())
    wrong(lambda folder: (folder / "config.json").unlink())
    wrong(lambda folder: (folder / "config.json").write_text("{"))
    wrong(lambda folder: config(folder, quantization_config=dict(quant_method="fp8", weight_block_size=[128, 128])))
    wrong(lambda folder: config(folder, swiglu_limit=7.0))
    wrong(lambda folder: config(folder, hidden_act="gelu"))
    wrong(lambda folder: config(folder, num_local_experts=G + 1))
    wrong(lambda folder: config(folder, text_config=dict(n_routed_experts=G + 3)))
    wrong(lambda folder: None, shared=SharedExpert())
    wrong(lambda folder: added(folder, up.replace("weight", "bias"), torch.zeros(I)))
    wrong(lambda folder: rewritten(folder, down, torch.zeros(H).to(torch.float8_e4m3fn)))
    wrong(lambda folder: (folder / "config.json").write_text("[]"))
    wrong(lambda folder: config(folder, quantization_config="mxfp8"))
    wrong(lambda folder: config(folder, text_config="mxfp8"))
    wrong(lambda folder: (folder / "model.safetensors.index.json").write_text("{}"))
    wrong(lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map={up: None}))))
    for name in ("model-1.safetensors", "config.json"):
        wrong(lambda folder, name=name: ((folder / name).unlink(), (folder / name).mkdir()))
    texts = [re.sub("file: .*; expected", "file: (what safetensors says); expected", text) for text in texts]
    assert_expected_inline("\n".join(texts), """\
FOLDER/model-1.safetensors: tensor model.layers.0.mlp.experts.1.up_proj.weight is missing; expected F8_E4M3 [96, 256]: the index names this file for it
FOLDER: tensor model.layers.0.mlp.experts.1.up_proj.weight is missing; expected F8_E4M3 [96, 256]
FOLDER: tensor model.layers.0.mlp.experts.0.down_proj.weight is missing; expected [H, I]
FOLDER: tensor model.layers.0.mlp.experts.1.up_proj.weight_scale_inv is missing; expected U8 or F8_E8M0 [96, 8], beside model.layers.0.mlp.experts.1.up_proj.weight in FOLDER/model-1.safetensors
FOLDER/model-0.safetensors: tensor model.layers.0.mlp.experts.1.up_proj.weight_scale_inv is U8 [96, 16]; expected U8 or F8_E8M0 [96, 8]
FOLDER/model-0.safetensors: tensor model.layers.0.mlp.experts.1.up_proj.weight_scale_inv is F32 [96, 8]; expected U8 or F8_E8M0 [96, 8]
FOLDER/model-1.safetensors: tensor model.layers.0.mlp.experts.1.up_proj.weight is BF16 [96, 256]; expected F8_E4M3 [96, 256]
FOLDER/model-1.safetensors: tensor model.layers.0.mlp.experts.1.up_proj.weight is F8_E4M3 [96, 224]; expected F8_E4M3 [96, 256]
FOLDER/model-0.safetensors, 12036 bytes, is truncated or no safetensors file: (what safetensors says); expected 12136 bytes, as its header says
FOLDER/model-0.safetensors, 100 bytes, is truncated or no safetensors file: (what safetensors says); expected 8 bytes that give the length of a header of JSON, and that header
FOLDER/model-0.safetensors, 5 bytes, is truncated or no safetensors file: (what safetensors says); expected 8 bytes that give the length of a header of JSON, and that header
FOLDER/model-1.safetensors is missing; the checkpoint's index names it
FOLDER/config.json is missing; a checkpoint folder has one
FOLDER/config.json is no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)
FOLDER/config.json: quantization_config is {'quant_method': 'fp8'}; expected one of MXFP8: quant_method 'mxfp8', 'modelopt' with quant_algo 'MXFP8', 'compressed-tensors' with format 'mxfp8-quantized', or 'quark' with fp8_e4m3 weights per_group of 32 and scale_format 'e8m0'
FOLDER/config.json: the activation is {'swiglu_limit': 7.0}, not plain SwiGLU; expected swiglu_alpha, swiglu_beta and swiglu_limit to be given
FOLDER/config.json: the activation is {'hidden_act': 'gelu'}, not plain SwiGLU; expected swiglu_alpha, swiglu_beta and swiglu_limit to be given
FOLDER: tensor model.layers.0.mlp.experts.3.down_proj.weight is missing; expected 4 experts, config.json's num_local_experts
FOLDER: tensor model.layers.0.mlp.experts.3.down_proj.weight is missing; expected 6 experts, config.json's n_routed_experts
FOLDER: tensor model.layers.0.mlp.shared_experts.gate_proj.weight is missing; expected F8_E4M3 [96, 256]
FOLDER/more.safetensors: tensor model.layers.0.mlp.experts.1.up_proj.bias would be left out; expected no biases but stacked ones, experts.gate_up_proj_bias and experts.down_proj_bias
FOLDER/model-1.safetensors: tensor model.layers.0.mlp.experts.0.down_proj.weight is F8_E4M3 [256]; expected 2 dimensions, [H, I]
FOLDER/config.json is a list; expected a JSON object
FOLDER/config.json: quantization_config is 'mxfp8'; expected a JSON object
FOLDER/config.json: text_config is 'mxfp8'; expected a JSON object
FOLDER/model.safetensors.index.json: weight_map is None; expected a JSON object
FOLDER/model.safetensors.index.json: weight_map has None for model.layers.0.mlp.experts.1.up_proj.weight; expected a file's name
FOLDER/model-1.safetensors is missing; the checkpoint's index names it
FOLDER/config.json is missing; a checkpoint folder has one""")


@pytest.mark.parametrize(
    "other",
    (
        dict(quant_method="compressed-tensors", config_groups=dict(W8A8=["Linear"])),
        dict(quant_method="compressed-tensors", format=["float-quantized"]),
        dict(quant_method="compressed-tensors", config_groups=["W8A8"]),
        dict(quant_method="quark", global_quant_config=dict(weight=[])),
        dict(quant_method="quark", global_quant_config=dict(weight="fp8_e4m3")),
        dict(quant_method="quark", global_quant_config=["fp8_e4m3"]),
        dict(quant_method=["mxfp8"]),
        dict(quant_algo="MIXED_PRECISION"),
    ),
    ids=str,
)
def test_a_format_that_is_not_known_whatever_it_has_in_its_config(other, tmp_path):
    folder = write(tmp_path / "model", {}, other)
    assert error_of(lambda: Checkpoint(folder)).startswith(f"{folder}/config.json: quantization_config is ")


def test_a_layer_without_experts(tmp_path):
    with Checkpoint(model(tmp_path / "model", layers=(0, 2))) as checkpoint:
        assert error_of(lambda: checkpoint.load("model.layers.1.mlp")) == (
            f"{checkpoint.folder}: model.layers.1.mlp has no experts; expected one of model.layers.0.mlp, "
            "model.layers.2.mlp"
        )


@pytest.mark.parametrize("hidden, inner", ((H, 48), (40, I)))
def test_sizes_that_are_no_whole_blocks(hidden, inner, tmp_path):
    shapes = dict(gate_proj=(inner, hidden), up_proj=(inner, hidden), down_proj=(hidden, inner))
    tensors = {f"mlp.experts.0.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    folder = write(tmp_path / "model", tensors, None, files=1)
    assert error_of(lambda: load_experts(folder)) == (
        f"{folder}/model-0.safetensors: tensor mlp.experts.0.down_proj.weight is F32 [{hidden}, {inner}]; expected "
        "whole blocks of 32"
    )


@pytest.mark.parametrize("suffix", ("", ".weight"))
def test_stacked_tensors_that_would_be_taken_wrongly(suffix, tmp_path):
    weights, layer = quantised(0), LAYER.format(0)
    tensors = {
        f"{layer}.experts.{matrix}{suffix if kind == '' else kind}": weights[name + kind.removesuffix("_inv")]
        for name, matrix in (("w1", "gate_up_proj"), ("w2", "down_proj"))
        for kind in ("", "_scale_inv")
    }
    if suffix:
        tensors = {name.replace("_scale_inv", ".weight_scale_inv"): x for name, x in tensors.items()}
    folder = write(tmp_path / "model", tensors, FORMS["mxfp8"].config([]), files=1)
    assert load_experts(folder)[layer].num_experts == G
    config(folder, num_experts=G + 1)
    assert f"down_proj{suffix} is of {G} experts; expected {G + 1} experts, config.json's num_experts" in error_of(
        lambda: load_experts(folder)
    )
    config(folder, num_experts=G)
    assert error_of(lambda: load_experts(folder, gate_up_order="interleave")) == (
        "Mxfp8Experts: gate_up_order is 'interleave'; it takes 'concatenated' or 'interleaved'"
    )
    assert "scale_rounding is 'up'" in error_of(lambda: load_experts(folder, scale_rounding="up"))
    added(folder, f"{layer}.experts.down_proj.bias", torch.zeros(G, H))
    assert "experts.down_proj.bias would be left out" in error_of(lambda: load_experts(folder))
    rewritten(folder, f"{layer}.experts.gate_up_proj{suffix}", torch.zeros(()).to(torch.float8_e4m3fn))
    assert f"gate_up_proj{suffix} is F8_E4M3 []; expected 3 dimensions, [E, 2I, H]" in error_of(
        lambda: load_experts(folder)
    )


def test_a_given_activation_is_taken(tmp_path):
    folder = model(tmp_path / "model", layers=(0,), swiglu_limit=7.0)
    module = load_experts(folder, swiglu_limit=7.0)[LAYER.format(0)]
    assert module.options["swiglu_limit"] == 7.0
    assert "swiglu_limit" in error_of(lambda: load_experts(folder))
