"""What equal calls have in common is found once, and never taken for what another call is."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

from device import DEVICE
from helpers import E4M3, FLOATS, OPS, assert_equal, error_of, moe_inputs, only_cpu
from torch_mxfp8moe import arguments, extension, reference
from torch_mxfp8moe.arguments import FusedMoe, Preshuffle

built = pytest.mark.skipif(extension.MODULE is None, reason=f"{extension.WHY_MISSING}")


@st.composite
def tensors(draw) -> torch.Tensor | None:
    """None, or a tensor of few sizes, strides, dtypes and places in memory: many draws are equal."""
    if draw(st.booleans()):
        return None
    sizes = draw(st.lists(st.integers(0, 2), max_size=3))
    strides = [draw(st.sampled_from((0, 1, 4))) for _ in sizes]
    dtype = draw(st.sampled_from((*FLOATS, E4M3, torch.uint8)))
    device = draw(st.sampled_from((DEVICE, "meta")))
    offset = draw(st.sampled_from((0, 1, 16)))
    memory = torch.zeros(128, dtype=torch.uint8, device=device).view(dtype)
    x = memory.as_strided(sizes, strides, offset)
    return torch.nn.Parameter(x, requires_grad=False) if draw(st.booleans()) else x


@built
@given(st.lists(st.lists(tensors(), max_size=3), min_size=2, max_size=8))
def test_numbers_stand_for_descriptions(lists):
    """The C++ kernel tells apart what Python does, and nothing else."""
    numbers = [arguments._numbered(tensors) for tensors in lists]
    descriptions = [arguments._described(tensors) for tensors in lists]
    for i, number in enumerate(numbers):
        assert [number == other for other in numbers] == [descriptions[i] == other for other in descriptions]


@only_cpu
def test_a_call_prints_what_is_checked_of_its_tensors():
    call = Preshuffle(torch.zeros(1, 64, 32).to(E4M3).mT, torch.eye(2).to_sparse(), "row_major", True)
    assert_expected_inline(
        str(call),
        """\
Preshuffle(weight=float8_e4m3fn [1, 32, 64] strides [2048, 1, 32] on cpu, scale=float32 [2, 2] torch.sparse_coo on cpu, layout='row_major', gate_up=True, pad_to=1, out_weight=None, out_scale=None)""",  # noqa: E501
    )


@built
def test_what_is_not_strided_has_no_number():
    x = torch.eye(3)
    for odd in (x.to_sparse(), x.to_sparse_csr()):
        assert arguments._numbered([x, odd]) is None and arguments._described([x, odd]) is None


@built
def test_a_number_is_never_given_twice():
    """Nor when there are so many that they are forgotten; threads get the same ones."""
    x = torch.zeros(())
    first = arguments._numbered([x])
    others = [arguments._numbered([x.expand(i)]) for i in range(1 << 16)]
    assert len({first, *others}) == len(others) + 1
    again = arguments._numbered([x])
    assert again not in others and again != first
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda _: arguments._numbered([x]), range(100))) == {again}


def counted(monkeypatch, owner, name: str) -> list:
    """What grows with every call of the function ``name`` of ``owner``."""
    calls, function = [], getattr(owner, name)

    def wrapped(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)
    return calls


ODD = dict(layout="aiter_gfx950")
"""Options of calls that come to Python on any device."""


def odd_inputs(**options) -> dict:
    inputs = moe_inputs(H=256, I=128, **options)
    for name, gate_up in (("w1", True), ("w2", False)):
        scale = f"{name}_scale"
        inputs[name], inputs[scale] = reference.preshuffle(inputs[name], inputs[scale], layout=ODD["layout"],
                                                           gate_up=gate_up)  # fmt: skip
    return inputs


def test_each_kind_is_checked_once_whatever_the_values(monkeypatch):
    checked = counted(monkeypatch, FusedMoe, "_check_kind")
    signed = counted(monkeypatch, arguments, "_signature")
    for seed in range(3):
        inputs = odd_inputs(seed=seed)
        assert_equal(OPS.fused_moe(**inputs, **ODD), OPS.fused_moe(**inputs, **ODD))
    assert len(checked) == 1 and len(signed) == 6
    x = inputs["hidden_states"]
    wide, shifted = torch.zeros(4, 512, dtype=x.dtype, device=x.device), torch.zeros(4 * 256 + 1, dtype=x.dtype).to(x)
    others = [
        dict(hidden_states=wide[:, :256].copy_(x)),
        dict(hidden_states=shifted[1:].view(4, 256).copy_(x)),
        dict(hidden_states=x.float()),
        dict(topk_ids=inputs["topk_ids"].long()),
        dict(expert_map=torch.arange(4, dtype=torch.int32, device=x.device)),
        dict(num_tokens=torch.tensor([4], dtype=torch.int32, device=x.device)),
        dict(swiglu_limit=7.0),
        dict(activation_dtype="bf16"),
        dict(backend="reference"),
        dict(out_dtype=torch.float32),
    ]
    for n, other in enumerate(others):
        for _ in range(2):
            OPS.fused_moe(**inputs | other, **ODD)
        assert len(checked) == n + 2, other
    for n in range(2):
        OPS.fused_moe.out(**inputs, **ODD, out=torch.empty_like(x))
    assert len(checked) == len(others) + 2


def test_preshuffle_finds_its_kind_once(monkeypatch):
    checked = counted(monkeypatch, Preshuffle, "_check_kind")
    signed = counted(monkeypatch, arguments, "_signature")
    inputs = moe_inputs(H=256, I=128)
    given = inputs["w1"], inputs["w1_scale"]
    want = reference.preshuffle(*given, layout="aiter_gfx950", gate_up=True)
    for n in range(2):
        got = OPS.preshuffle(*given, layout="aiter_gfx950", gate_up=True)
        assert_equal(got[1], want[1])
        assert len(checked) == 1 and len(signed) == n + 1


def test_memory_and_gradients_are_checked_in_every_call():
    inputs, memory = odd_inputs(), torch.zeros(4 * 256 + 8, dtype=torch.bfloat16, device=DEVICE)
    x, out = memory[8:].view(4, 256), torch.zeros(4, 256, dtype=torch.bfloat16, device=DEVICE)
    inputs["hidden_states"] = x.copy_(inputs["hidden_states"])
    OPS.fused_moe.out(**inputs, **ODD, out=out)
    overlapping = error_of(lambda: OPS.fused_moe.out(**inputs, **ODD, out=memory[:-8].view(4, 256)))
    assert overlapping.startswith("fused_moe: out shares memory with hidden_states")
    weights = inputs["topk_weights"].clone()
    OPS.fused_moe(**inputs | dict(topk_weights=weights), **ODD)
    weights.requires_grad_()
    message = error_of(lambda: OPS.fused_moe(**inputs | dict(topk_weights=weights), **ODD))
    assert message.startswith("fused_moe is inference only and has no gradient")
    with torch.no_grad():
        OPS.fused_moe(**inputs | dict(topk_weights=weights), **ODD)


def test_a_wrong_call_is_wrong_every_time():
    inputs = odd_inputs()
    for wrong in (dict(swiglu_limit=-1.0), dict(topk_ids=inputs["topk_ids"][:2]), dict(w2=None)):
        assert len({error_of(lambda: OPS.fused_moe(**inputs | wrong, **ODD)) for _ in range(3)}) == 1
    assert not arguments._kinds


def test_not_more_kinds_are_kept_than_said(monkeypatch):
    monkeypatch.setattr(arguments, "REMEMBERED", 3)
    for T in range(1, 8):
        OPS.fused_moe(**odd_inputs(T=T), **ODD)
        assert 1 <= len(arguments._kinds) <= 3


@only_cpu
@pytest.mark.parametrize("signature", ("_described", pytest.param("_numbered", marks=built)))
def test_with_and_without_the_extension(monkeypatch, signature):
    monkeypatch.setattr(arguments, "_signature", getattr(arguments, signature))
    inputs = odd_inputs()
    want = reference.fused_moe(**inputs, **ODD)
    for _ in range(2):
        assert_equal(OPS.fused_moe(**inputs, **ODD), want)
    assert len(arguments._kinds) == 1
