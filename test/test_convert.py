"""``tools/convert.py``: families, forms, the error report, interruption and resumption."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import torch_mxfp8moe
from helpers import PACKAGE, only_cpu, randn, same_bytes
from torch_mxfp8moe.checkpoint import FORMS, Checkpoint, CheckpointError, load_experts

TOOLS = Path(__file__).parent.parent / "tools"
SPEC = importlib.util.spec_from_file_location("tools_convert", TOOLS / "convert.py")  # the demo has one too
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)

pytestmark = only_cpu

E, H, I = 3, 64, 32  # noqa: E741
FAMILIES = {
    "Qwen3-MoE": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "DeepSeek, GLM": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "Mixtral, MiniMax": ("block_sparse_moe", ("w1", "w3", "w2")),
}


def source(folder: Path, family: str = "Qwen3-MoE", layers: int = 2) -> Path:
    """A bf16 checkpoint: one file for each layer, and one for the rest."""
    folder.mkdir()
    block, matrices = FAMILIES[family]
    files = {"other.safetensors": {"model.embed_tokens.weight": randn(5, H), "model.norm.weight": randn(H)}}
    for layer in range(layers):
        prefix, tensors = f"model.layers.{layer}.{block}", {}
        for expert in range(E):
            for seed, matrix in enumerate(matrices):
                shape = (H, I) if seed == 2 else (I, H)
                name = f"{prefix}.experts.{expert}.{matrix}.weight"
                tensors[name] = randn(*shape, seed=layer * 100 + expert * 10 + seed, dtype=torch.bfloat16)
        tensors[f"{prefix}.gate.weight"] = randn(E, H, dtype=torch.bfloat16)
        if "DeepSeek" in family:
            for matrix in matrices:
                tensors[f"{prefix}.shared_experts.{matrix}.weight"] = randn(I, H, dtype=torch.bfloat16)
        files[f"layer-{layer}.safetensors"] = tensors
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))
    (folder / "config.json").write_text(json.dumps(dict(hidden_size=H, hidden_act="silu", model_type="moe")))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_families_and_forms(form, family, tmp_path):
    folder, out = source(tmp_path / "bf16", family), tmp_path / "mxfp8"
    result = tool.convert(folder, out, form, progress=None)
    with Checkpoint(out) as checkpoint:
        assert checkpoint.form.name == form and list(checkpoint.layers) == list(result)
        assert all(checkpoint.open(file).get_slice(name) for name, file in checkpoint.files.items())
    before, after = tensors_of(folder), tensors_of(out)
    for name, x in before.items():
        if ".experts." in name:
            data, scale = torch_mxfp8moe.quantize_1x32(x)
            assert same_bytes(after.pop(name), data)
            assert same_bytes(after.pop(name.removesuffix("weight") + FORMS[form].scale), scale)
        else:
            assert same_bytes(after.pop(name), x)
    assert not after
    for name, module in load_experts(out).items():
        for x, y in zip(module.row_major(), load_experts(folder)[name].row_major(), strict=True):
            assert same_bytes(x, y)
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    ignored = next(value for key, value in quantization.items() if key in ("ignored_layers", "ignore", "exclude"))
    assert f"{list(result)[0]}.gate" in ignored and "model.embed_tokens" in ignored
    assert not any(".experts." in name for name in ignored)
    assert ("shared_experts" in str(ignored)) == ("DeepSeek" in family)
    assert (out / "tokenizer.json").exists() and not (out / tool.STATE).exists()


def test_stacked_experts_are_written_one_by_one(tmp_path):
    folder = tmp_path / "bf16"
    folder.mkdir()
    w1, w2 = randn(E, 2 * I, H, dtype=torch.bfloat16), randn(E, H, I, dtype=torch.bfloat16)
    layer = "model.layers.0.mlp"
    tensors = {f"{layer}.experts.gate_up_proj": w1, f"{layer}.experts.down_proj": w2}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(hidden_size=H)))
    tool.convert(folder, tmp_path / "out", progress=None)
    assert f"{layer}.experts.2.up_proj.weight" in tensors_of(tmp_path / "out")
    want = torch_mxfp8moe.Mxfp8Experts.from_weights(w1, w2)
    for x, y in zip(load_experts(tmp_path / "out")[layer].row_major(), want.row_major(), strict=True):
        assert same_bytes(x, y)
    tensors[f"{layer}.experts.gate_up_proj"] = randn(E, H, 4 * I)  # [E, in, out], as gpt-oss has it
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        tool.convert(folder, tmp_path / "again", progress=None)
    assert str(error.value) == (
        f"{folder}/model.safetensors: tensor {layer}.experts.gate_up_proj is F32 [3, 64, 128]; expected BF16 or F16 or "
        "F32 [3, 64, 64]"
    )
    assert not (tmp_path / "again").exists()


def test_gate_and_up_rows_in_turn(tmp_path):
    """As the loader takes them in a gpt-oss checkpoint, the biases too."""
    folder = tmp_path / "bf16"
    folder.mkdir()
    stem = "model.layers.0.mlp.experts"
    shapes = {"gate_up_proj": (2 * I, H), "down_proj": (H, I), "gate_up_proj_bias": (2 * I,), "down_proj_bias": (H,)}
    tensors = {f"{stem}.{name}": randn(E, *shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(model_type="gpt_oss", hidden_size=H)))
    tool.convert(folder, tmp_path / "out", progress=None)
    (want,), (got,) = (load_experts(path).values() for path in (folder, tmp_path / "out"))
    for (name, x), (_, y) in zip(want.named_buffers(), got.named_buffers(), strict=True):
        assert same_bytes(x, y), name


@pytest.mark.parametrize("mode", ("rceil", "floor"))
def test_the_report(mode, tmp_path):
    folder = source(tmp_path / "bf16")
    reports = {
        report: tool.convert(folder, tmp_path / report, scale_rounding=mode, report=report, progress=None)
        for report in tool.SAMPLED
    }
    before = tensors_of(folder)
    for layer, numbers in reports["all"].items():
        wrong = whole = 0
        for name, x in before.items():
            if name.startswith(f"{layer}.experts."):
                got = torch_mxfp8moe.dequantize_1x32(*torch_mxfp8moe.quantize_1x32(x, mode)).double()
                wrong, whole = wrong + (got - x).square().sum().item(), whole + x.double().square().sum().item()
        assert numbers["relative_l2"] == pytest.approx((wrong / whole) ** 0.5, rel=1e-4)
        assert numbers["snr_db"] == pytest.approx(10 * torch.tensor(whole / wrong).log10().item(), rel=1e-4)
        assert reports["sample"][layer]["relative_l2"] == pytest.approx(numbers["relative_l2"], rel=0.2)
    assert reports["none"] == {} and not (tmp_path / "none" / tool.REPORT).exists()
    assert json.loads((tmp_path / "all" / tool.REPORT).read_text())["layers"] == reports["all"]


def test_the_report_is_json_whatever_the_weights_are(tmp_path):
    """Weights that MXFP8 holds exactly have an infinite SNR, and one that is NaN has none."""
    folder = source(tmp_path / "bf16")
    for layer, value in enumerate((1.0, math.nan)):
        path = folder / f"layer-{layer}.safetensors"
        tensors = {name: torch.full_like(x, value) for name, x in load_file(path).items()}
        save_file(tensors, path)
    exact, nan = tool.convert(folder, tmp_path / "out", progress=None).values()
    assert exact == dict(relative_l2=0.0, snr_db=math.inf) and math.isnan(nan["relative_l2"])

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    layers = json.loads((tmp_path / "out" / tool.REPORT).read_text(), parse_constant=refuse)["layers"]
    assert list(layers.values()) == [dict(relative_l2=0.0, snr_db=None), dict(relative_l2=None, snr_db=None)]


def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch):
    folder, out = source(tmp_path / "bf16"), tmp_path / "out"
    want = tool.convert(folder, tmp_path / "at once", progress=None)
    converted, plain = [], tool.convert_file

    def dies(checkpoint, file, *rest):
        if len(converted) == 2:
            (out / f"{file}.tmp").write_bytes(b"half of it")
            raise KeyboardInterrupt
        converted.append(file)
        return plain(checkpoint, file, *rest)

    monkeypatch.setattr(tool, "convert_file", dies)
    with pytest.raises(KeyboardInterrupt):
        tool.convert(folder, out, progress=None)
    assert not (out / "config.json").exists()

    def counts(checkpoint, file, *rest):
        converted.append(file)
        return plain(checkpoint, file, *rest)

    monkeypatch.setattr(tool, "convert_file", counts)
    assert tool.convert(folder, out, progress=None) == want
    assert sorted(converted) == ["layer-0.safetensors", "layer-1.safetensors", "other.safetensors"]
    for path in (tmp_path / "at once").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert not list(out.glob("*.tmp"))


def test_what_was_finished_otherwise_is_done_again(tmp_path, monkeypatch):
    """Another form, or a source that has changed since."""
    folder, out = source(tmp_path / "bf16", layers=1), tmp_path / "out"
    monkeypatch.setattr(tool.shutil, "rmtree", lambda path: None)  # as if interrupted at the end
    tool.convert(folder, out, "mxfp8", progress=None)
    tool.convert(folder, out, "modelopt", progress=None)
    assert not any(name.endswith("_inv") for name in tensors_of(out))
    path = folder / "layer-0.safetensors"
    changed = {name: x + 1 for name, x in load_file(path).items()}
    save_file(changed, path)
    os.utime(path, ns=(0, 1))
    tool.convert(folder, out, "modelopt", progress=None)
    name = next(name for name in changed if ".experts." in name)
    assert same_bytes(tensors_of(out)[name], torch_mxfp8moe.quantize_1x32(changed[name])[0])


def test_a_folder_that_was_converted_into_before(tmp_path, monkeypatch):
    """While it is not whole it has no config.json, and what another checkpoint left there is not taken for its own."""
    folder, out = source(tmp_path / "bf16"), tmp_path / "out"
    tool.convert(folder, out, progress=None)

    def dies(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tool, "convert_file", dies)
        with pytest.raises(KeyboardInterrupt):
            tool.convert(folder, out, scale_rounding="floor", progress=None)
    with pytest.raises(CheckpointError, match="config.json is missing"):
        load_experts(out)
    (folder / "tokenizer.json").write_text('{"changed": true}')
    tool.convert(folder, out, progress=None)
    assert (out / "tokenizer.json").read_text() == '{"changed": true}'

    single = tmp_path / "single"
    single.mkdir()
    save_file(load_file(folder / "layer-0.safetensors"), single / "model.safetensors")
    (single / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        tool.convert(single, out, progress=None)
    assert str(error.value) == f"{out} has layer-0.safetensors, of another checkpoint; expected an empty folder"
    for path in out.glob("*.safetensors"):
        path.unlink()
    tool.convert(single, out, progress=None)
    assert list(load_experts(out)) == ["model.layers.0.mlp"]


def test_what_cannot_be_converted(tmp_path):
    folder = source(tmp_path / "bf16")
    tool.convert(folder, tmp_path / "out", progress=None)
    for wrong, text in (
        ((folder, folder), "expected another folder"),
        ((tmp_path / "out", tmp_path / "again"), "already MXFP8, of form 'mxfp8'"),
        ((tmp_path / "nothing", tmp_path / "again"), "config.json is missing"),
    ):
        with pytest.raises(CheckpointError, match=text):
            tool.convert(*wrong, progress=None)


@pytest.mark.parametrize("to", (None, torch.zeros(I, H + 32), torch.zeros(2, I, H), torch.zeros(()), "int32"), ids=repr)
def test_nothing_is_written_of_a_checkpoint_that_is_not_whole(to, tmp_path):
    folder, path = source(tmp_path / "bf16"), tmp_path / "bf16" / "layer-1.safetensors"
    name = "model.layers.1.mlp.experts.1.up_proj.weight"
    tensors = load_file(path)
    tensors[name] = tensors[name].int() if to == "int32" else to
    save_file({key: x for key, x in tensors.items() if x is not None}, path)
    with pytest.raises(CheckpointError) as error:
        tool.convert(folder, tmp_path / "out", progress=None)
    assert str(error.value).startswith(f"{path}: tensor {name} is ")
    assert f"expected BF16 or F16 or F32 [{I}, {H}]" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_index_says_which_file_a_tensor_is_from(tmp_path):
    """What else a file holds is not converted; a file outside the folder is never written."""
    folder = source(tmp_path / "bf16")
    name = next(name for name in load_file(folder / "layer-0.safetensors") if ".experts." in name)
    stale = load_file(folder / "other.safetensors") | {name: torch.zeros(I, H)}
    save_file(stale, folder / "other.safetensors")
    tool.convert(folder, tmp_path / "out", progress=None)
    assert name not in load_file(tmp_path / "out" / "other.safetensors")
    assert tensors_of(tmp_path / "out")[name].float().any()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = "../bf16/layer-0.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="the index names ../bf16/layer-0.safetensors; expected files inside"):
        tool.convert(folder, tmp_path / "deeper" / "out", progress=None)
    assert not (tmp_path / "deeper").exists()


def test_the_command(tmp_path):
    folder = source(tmp_path / "bf16")
    command = [sys.executable, str(TOOLS / "convert.py"), str(folder), str(tmp_path / "out"), "--form", "quark"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0].startswith("model.layers.0.mlp ") and "dB" in lines[0]
    command[2:4] = str(tmp_path / "out"), str(tmp_path / "again")
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and done.stderr.startswith("convert: ") and "already MXFP8" in done.stderr
