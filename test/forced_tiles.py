"""What the tests of kernels for some calls share: calls of all kinds, and the fixture ``tiles`` (conftest.py)."""

import torch

from helpers import OPS, assert_agrees, moe_inputs, same_bytes
from torch_mxfp8moe import reference
from torch_mxfp8moe.configs import Gemm, Tiles

CASES = {
    "plain": (dict(), dict()),
    "bf16 activations": (dict(), dict(activation_dtype="bf16")),
    "fp32": (dict(dtype=torch.float32, weight_dtype=torch.bfloat16), dict()),
    "MXFP8 input": (dict(scaled=True), dict(out_dtype=torch.float32)),
    "biases and limits": (
        dict(bias_dtype=torch.float32), dict(swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=0.5)
    ),
    "router weight on the input": (dict(K=1, bias_dtype=torch.bfloat16), dict(apply_router_weight_on_input=True)),
    "expert map": (dict(G=9, id_dtype=torch.int64), dict()),
}  # fmt: skip
"""Sizes and dtypes of :func:`helpers.moe_inputs`, and options of the call."""


def assert_like_the_reference(sizes: dict, options: dict, repeats: int, to=lambda inputs: inputs) -> None:
    """Every element, and the same bits in as many repeats. With G: through a map that is not a permutation, and some of
    the tokens only. ``to``: moves the inputs."""
    T, inputs = sizes["T"], moe_inputs(**sizes, seed=sizes["T"])
    if "G" in sizes:
        entries = torch.tensor([3, -1, 0, 4, 7, 1, -5, -1, 2], dtype=torch.int32)
        inputs |= dict(expert_map=entries, num_tokens=torch.tensor(T - max(T // 5, T > 1), dtype=torch.int32))
    inputs = to(inputs)
    got = OPS.fused_moe(**inputs, **options, backend="triton")
    assert_agrees(got, reference.fused_moe(**inputs, **options))
    for _ in range(repeats):
        assert same_bytes(got, OPS.fused_moe(**inputs, **options, backend="triton"))


def warp_specialized(block_m: int, first: tuple, second: tuple, gather: bool = False) -> Tiles:
    """Of the kernel in which one warp loads. Each product: weight rows of a tile, columns of a stage, warps, stages,
    programs, turns if they are two."""
    gemms = (
        Gemm(rows // halves, columns, warps, stages, True, *others)
        for halves, (rows, columns, warps, stages, *others) in ((2, first), (1, second))
    )
    return Tiles(None, block_m, *gemms, gather=gather)
