"""The C++ backend where its numbers are not the question: binary compatibility, memory, threads, large calls."""

import os
import subprocess
import sys

import pytest
import torch

from helpers import generator, needs_extension, randn, run_python, weights
from torch_mxfp8moe import extension

pytestmark = needs_extension


@pytest.mark.skipif(sys.version_info < (3, 11), reason="torch-abi-audit takes Python 3.11")
def test_stable_abi():
    """One binary for torch 2.11 and later and CPython 3.10 and later: torch-abi-audit reads its symbols."""
    audit = [sys.executable, "-m", "torch_abi_audit.cli", extension.MODULE.__file__]
    report = subprocess.run(audit, capture_output=True, text=True).stdout
    lines = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in report.splitlines())}
    assert (lines["Torch ABI"], lines["Min torch"], lines["CPython ABI"]) == ("STABLE", "2.11.0", "abi3"), report


MEMORY = """
import torch, torch_mxfp8moe

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

def weight(rows, columns):
    data = torch.randint(0, 0x7F, (E, rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return data, torch.full((E, rows, columns // 32), 114, dtype=torch.uint8)

T, H, I, E, K = 256, 2048, 768, 128, 8
w1, w2 = weight(2 * I, H), weight(H, I)
x, ids, routing = torch.randn(T, H).bfloat16(), torch.rand(T, E).topk(K).indices, torch.rand(T, K)
out = torch.zeros_like(x)
torch_mxfp8moe.fused_moe(x[:1], *w1, *w2, routing[:1], ids[:1], out=out[:1])  # loads what is loaded once
with open("/proc/self/clear_refs", "w") as control:
    control.write("5")
before = status("VmRSS")
torch_mxfp8moe.fused_moe(x, *w1, *w2, routing, ids, out=out)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' /proc/self/clear_refs")
def test_memory_of_qwen3_30b():
    """At T = 256, under 64 MiB beside inputs and output: the weights (604 MB as fp8) are never expanded."""
    assert 1 < float(run_python(MEMORY)) < 64


def test_many_tokens_are_served_in_parts():
    """Scratch memory is bounded: past about 1,300 tokens of these sizes a call takes its tokens in turns."""
    T, H, I, E, K = 1400, 2048, 32, 2, 8  # noqa: E741
    tensors = (
        randn(T, H, seed=3),
        *weights(E, 2 * I, H, 1),
        *weights(E, H, I, 2),
        torch.rand(T, K, generator=generator(4)),
        torch.randint(-1, E, (T, K), generator=generator(5)),
    )
    out = torch.ops.mxfp8moe.fused_moe(*tensors, backend="cpu")
    expected = torch.ops.mxfp8moe.fused_moe(*tensors, backend="reference")
    assert ((out - expected).norm(dim=1) / expected.norm(dim=1)).max() < 2e-3
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(out, torch.ops.mxfp8moe.fused_moe(*tensors)), threads
    finally:
        torch.set_num_threads(before)


def test_scatter_rows_refuses_offsets_outside():
    source, out = torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    columns = torch.tensor([0, 16])
    torch.ops.mxfp8moe._scatter_rows(source, torch.tensor([0, 32]), columns, out)
    for rows in (torch.tensor([0, 33]), torch.tensor([-1, 32])):
        with pytest.raises(RuntimeError, match="outside of out"):
            torch.ops.mxfp8moe._scatter_rows(source, rows, columns, out)
