"""Small ragged calls of every op, with hostile ids, for compute-sanitizer: test_gpu_sanitizer.py runs it under one."""

import torch

from gpu import on_gpu
from helpers import OPS, assert_agrees, moe_inputs
from torch_mxfp8moe import reference

SIZES = (
    dict(T=1, H=96, I=32, E=3, K=2),
    dict(T=3, H=352, I=160, E=64, K=2, bias_dtype=torch.float16),
    dict(T=2, H=288, I=320, E=40, K=1, scaled=True),
    dict(T=7, H=160, I=96, E=5, K=3, G=9, bias_dtype=torch.float32),
    dict(T=33, H=288, I=192, E=9, K=4, scaled=True),
    dict(T=130, H=96, I=160, E=4, K=1, id_dtype=torch.int64, weight_dtype=torch.bfloat16),
    dict(T=260, H=96, I=32, E=2, K=2, dtype=torch.float32),
    dict(T=7, H=320, I=96, E=5, K=3, bias_dtype=torch.float32),
    dict(T=40, H=64, I=32, E=4, K=2),
    dict(T=260, H=128, I=224, E=2, K=2),
)
"""From few to many rows an expert: each of the default tile rules serves one, also where sm_90's tiles are larger than
the weights."""


def main() -> None:
    for i, sizes in enumerate(SIZES):
        inputs = on_gpu(moe_inputs(**sizes, seed=i))
        ids = inputs["topk_ids"]
        ids[::3, 0] = -1
        ids[1::4, -1] = torch.iinfo(ids.dtype).max
        ids[2::5, 0] = torch.iinfo(ids.dtype).min
        if "G" in sizes:
            inputs["expert_map"] = torch.tensor([2, -1, 0, 77, 1, -5, 4, 3, 2**31 - 1], dtype=torch.int32).cuda()
            inputs["num_tokens"] = torch.tensor(sizes["T"] - 2, dtype=torch.int32).cuda()
        on_input = sizes["K"] == 1
        for options in (dict(swiglu_limit=7.0, swiglu_alpha=1.702, swiglu_beta=1.0), dict(activation_dtype="bf16")):
            options = options | dict(apply_router_weight_on_input=on_input, out_dtype=torch.float32)
            assert_agrees(OPS.fused_moe(**inputs, **options), reference.fused_moe(**inputs, **options))
    for C in (32, 96, 2880):
        for mode in ("rceil", "floor", "ceil", "even"):
            data, scale = OPS.quantize_1x32(torch.randn(37, C, device="cuda").bfloat16(), scale_rounding=mode)
            apart = torch.randn(4, 3, 5, C, device="cuda").transpose(1, 2)
            data, scale = OPS.quantize_1x32(apart, scale_rounding=mode)
            OPS.quantize_1x32.out(apart, scale_rounding=mode, out_data=data, out_scale=scale)
        OPS.dequantize_1x32(data, scale, dtype=torch.float16)
    for R, C, gate_up in ((192, 96, True), (96, 224, False)):
        weight, scale = OPS.quantize_1x32(torch.randn(3, R, C, device="cuda"))
        OPS.preshuffle(weight, scale, layout="row_major", gate_up=gate_up, pad_to=128)
        x = torch.randn(3, R, C, device="cuda").bfloat16()
        OPS.quantize_preshuffle(x, layout="row_major", gate_up=gate_up, pad_to=128)
    turns = torch.randn(3, 128, 2, 256, device="cuda").transpose(1, 2)
    OPS.quantize_preshuffle(turns, layout="aiter_gfx950", gate_up=True, pad_to=256)
    weight, scale = OPS.quantize_1x32(torch.randn(3, 256, 256, device="cuda"))
    OPS.preshuffle(weight, scale, layout="aiter_gfx950", gate_up=True, pad_to=256)
    torch.cuda.synchronize()
    print("all calls done")


if __name__ == "__main__":
    main()
