"""The README's examples run as they stand."""

import torch

from helpers import moe_inputs, randn
from pages import ROOT, section

README = ROOT / "README.md"


def test_the_api_in_ten_lines(capsys):
    code = section(README, "The API in ten lines")
    assert len(code.strip().splitlines()) <= 12
    tokens, hidden, intermediate, experts, topk = 5, 256, 128, 4, 2
    names = {
        "gate_up_weights": torch.randn(experts, 2 * intermediate, hidden).bfloat16(),
        "down_weights": torch.randn(experts, hidden, intermediate).bfloat16(),
        "hidden_states": torch.randn(tokens, hidden).bfloat16(),
        "topk_weights": torch.rand(tokens, topk),
        "topk_ids": torch.randint(experts, (tokens, topk)),
    }
    exec(code, names)
    assert names["out"].shape == (tokens, hidden) and names["out"].isfinite().all()
    assert names["shuffled_scale"].shape == (experts * 2 * intermediate, hidden // 32)
    assert "served by" in capsys.readouterr().out


def test_the_serving_loop():
    code = section(README, "A compiled serving loop")
    assert len(code.strip().splitlines()) <= 15
    inputs = moe_inputs(T=5)
    prompt, router = inputs["hidden_states"], randn(64, 4)
    weights = [inputs[name] for name in ("w1", "w1_scale", "w2", "w2_scale")]
    steps = []

    class Model:
        @staticmethod
        def decode_step(tokens, cache):
            topk = (tokens.float() @ router).softmax(-1).topk(2)
            return torch.ops.mxfp8moe.fused_moe(tokens, *cache, topk.values, topk.indices) + 1

    def sample(logits):
        steps.append(logits)
        return prompt[: len(steps) + 1]

    exec(code, dict(torch=torch, model=Model, prompt=prompt, cache=weights, length=4, sample=sample))
    assert [len(logits) for logits in steps] == [5, 2, 3, 4]
    with torch.inference_mode():
        assert torch.equal(steps[-1], Model.decode_step(prompt[:4], weights))
