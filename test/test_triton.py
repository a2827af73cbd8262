"""The Triton backend beside its results: how it takes a call apart."""

import pytest
import torch

from helpers import BACKEND, OPS, moe_inputs, same_bytes, small

pytestmark = pytest.mark.skipif(BACKEND != "triton", reason=f"calls go to {BACKEND}")


@small
def test_many_tokens_are_served_in_parts(monkeypatch):
    """Where the workspace would be too large a call takes its tokens in turns, here one at a time: the same bits."""
    from torch_mxfp8moe.backends.triton import fused_moe

    inputs = moe_inputs(T=5, K=3, bias_dtype=torch.float32) | dict(num_tokens=torch.tensor(4, dtype=torch.int32))
    want = OPS.fused_moe(**inputs)
    monkeypatch.setattr(fused_moe, "WORKSPACE", 1)
    assert same_bytes(OPS.fused_moe(**inputs), want) and want[3].ne(0).any()
