"""The demo model in tools/demo: its checkpoints, its quality through the op, its compiled decode step."""

import sys
from pathlib import Path

import pytest
import torch

DEMO = Path(__file__).resolve().parent.parent / "tools" / "demo"
sys.path.insert(0, str(DEMO))

import checkpoint  # noqa: E402
import convert  # noqa: E402
import run  # noqa: E402
from model import mean_loss  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

import torch_mxfp8moe  # noqa: E402
from helpers import only_cpu  # noqa: E402

pytestmark = only_cpu

WEIGHTS = DEMO / "weights"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(WEIGHTS / "mxfp8" / "tokenizer.json")


def test_checkpoint_has_the_published_form():
    cfg, quantization = checkpoint.read_config(WEIGHTS / "mxfp8")
    assert quantization["quant_method"] == "mxfp8" and quantization["weight_block_size"] == [1, 32]
    tensors = checkpoint.read_tensors(WEIGHTS / "mxfp8")
    shapes = {"w1": (cfg.intermediate_size, cfg.hidden_size), "w2": (cfg.hidden_size, cfg.intermediate_size)}
    shapes["w3"] = shapes["w1"]
    assert cfg.num_local_experts >= 16 and cfg.hidden_size % 32 == 0 and cfg.intermediate_size % 32 == 0
    for layer in range(cfg.num_hidden_layers):
        for expert in range(cfg.num_local_experts):
            for matrix, (rows, columns) in shapes.items():
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}"
                weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"]
                assert weight.dtype == torch.float8_e4m3fn and weight.shape == (rows, columns)
                assert scale.dtype == torch.uint8 and scale.shape == (rows, columns // 32)


def test_checkpoint_is_the_bf16_one_quantised(tmp_path):
    """Bit for bit, config.json included."""
    convert.convert(WEIGHTS / "bf16", tmp_path)
    stored, made = checkpoint.read_tensors(WEIGHTS / "mxfp8"), checkpoint.read_tensors(tmp_path / "mxfp8")
    assert stored.keys() == made.keys()
    assert all(torch.equal(stored[k].view(torch.uint8), made[k].view(torch.uint8)) for k in stored)
    for kind in ("bf16", "mxfp8"):
        assert (tmp_path / kind / "config.json").read_text() == (WEIGHTS / kind / "config.json").read_text()
    original, copy = checkpoint.read_tensors(WEIGHTS / "bf16"), checkpoint.read_tensors(tmp_path / "bf16")
    assert original.keys() == copy.keys() and all(torch.equal(original[k], copy[k]) for k in original)


@pytest.mark.parametrize("kind", ("bf16", "mxfp8"))
def test_w1_is_gate_and_w3_is_up(kind):
    cfg, _ = checkpoint.read_config(WEIGHTS / kind)
    tensors = checkpoint.read_tensors(WEIGHTS / kind)
    experts = checkpoint.load_model(WEIGHTS / kind).layers[1].block_sparse_moe.experts
    name = "model.layers.1.block_sparse_moe.experts.5"
    assert torch.equal(experts.w1[5, : cfg.intermediate_size].float(), tensors[f"{name}.w1.weight"].float())
    assert torch.equal(experts.w1[5, cfg.intermediate_size :].float(), tensors[f"{name}.w3.weight"].float())
    assert torch.equal(experts.w2[5].float(), tensors[f"{name}.w2.weight"].float())


def test_incomplete_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        checkpoint.load_model(tmp_path)
    cfg, _ = checkpoint.read_config(WEIGHTS / "mxfp8")
    tensors = checkpoint.read_tensors(WEIGHTS / "mxfp8")
    checkpoint.write_config(tmp_path, cfg, quantised=True)
    gone = "model.layers.2.block_sparse_moe.experts.3.w2.weight_scale_inv"
    checkpoint.write_tensors(tmp_path, {k: v for k, v in tensors.items() if k != gone})
    with pytest.raises(ValueError, match=f"tensor {gone} is missing; expected U8"):
        checkpoint.load_model(tmp_path)


def test_tokenizer_round_trip(tokenizer):
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:20000]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids).decode() == text and len(ids) < len(text) / 2.5
    odd = "naïve — £5\t日本\r\n\n x"
    assert tokenizer.decode(tokenizer.encode(odd)).decode() == odd


@torch.no_grad()
def test_perplexity_within_one_percent(tokenizer):
    torch.set_num_threads(1)
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:12000]
    ids = torch.tensor(tokenizer.encode(text))
    loss = {}
    for kind in ("bf16", "mxfp8"):
        model = checkpoint.load_model(WEIGHTS / kind, dtype=torch.float32)
        loss[kind] = mean_loss(model, ids)
    assert loss["bf16"] < 3.0  # nats per token; 6.9 before training
    assert run.within(torch.tensor(loss["mxfp8"] - loss["bf16"]).exp().item())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bf16", "mxfp8"])
def test_decode_compiles_to_one_graph(tokenizer, kind):
    """One graph for all positions, one op per MoE layer, and the logits of the uncached model."""
    torch.compiler.reset()
    torch.set_num_threads(1)
    model = checkpoint.load_model(WEIGHTS / kind, dtype=torch.float32)
    step, graphs = run.compiled_step(model, "aot_eager")
    ids = torch.tensor(tokenizer.encode("It is a truth universally acknowledged, that a single man"))
    cache = model.new_cache()
    logits = torch.stack([step(token.view(1, 1), torch.tensor([i]), cache) for i, token in enumerate(ids)])
    assert len(graphs) == 1
    assert run.op_nodes(graphs) == (len(model.layers) if kind == "mxfp8" else 0)
    expected = model(ids[None])[0]
    assert (logits - expected).norm() < 5e-3 * expected.norm()


def test_explanation_names_a_backend():
    model = checkpoint.load_model(WEIGHTS / "mxfp8")
    assert run.explain(model, "auto").backend in torch_mxfp8moe.backends()
    assert run.explain(model, "reference").backend == "reference"
