"""What equal calls have in common is found once, and never taken for what another call is."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st

from device import DEVICE
from helpers import E4M3, FLOATS, OPS, assert_equal, error_of, moe_inputs, only_cpu, run_python
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
    """C++ tells apart what Python does, and nothing else; to DLPack a tensor on ``meta`` is no tensor."""
    described = {}
    for group in map(tuple, lists):
        number = extension.MODULE.signature(group)
        if any(x is not None and x.device.type == "meta" for x in group):
            assert number is None
        else:
            assert described.setdefault(number, arguments._described(group)) == arguments._described(group)
    assert None not in described and len(set(described.values())) == len(described)


DTYPES = {dtype for name in dir(torch) if isinstance(dtype := getattr(torch, name), torch.dtype)}


def test_every_dtype_is_another_one():
    """Also those that DLPack has one name for."""
    signatures = {dtype: arguments._signature((torch.empty(2, dtype=dtype),)) for dtype in DTYPES}
    known = [signature for signature in signatures.values() if signature is not None]
    assert len(set(known)) == len(known)
    assert all(signatures[dtype] is not None for dtype in (*FLOATS, E4M3, torch.uint8, torch.int32, torch.int64))


def test_what_changes_in_place_is_another_call():
    """And what is equal is the same one, wherever it lies: nothing that is known of a tensor is kept with it."""
    x, memory = torch.zeros(4, 6, device=DEVICE), torch.zeros(25, device=DEVICE)
    changes = [
        lambda: None,
        lambda: x.t_(),
        lambda: x.resize_(3, 4),
        lambda: x.unsqueeze_(0),
        lambda: setattr(x, "data", torch.zeros(4, 6, dtype=torch.bfloat16, device=DEVICE)),
        lambda: x.set_(memory.untyped_storage(), 1, (4, 6)),
        lambda: x.as_strided_((4, 6), (0, 1), 0),
    ]
    signatures = []
    for change in changes:
        change()
        signatures.append(arguments._signature((x,)))
    assert len(set(signatures)) == len(changes) and None not in signatures
    x.data = memory[:24].view(4, 6)
    assert arguments._signature((x,)) == signatures[0]


@only_cpu
def test_a_call_prints_what_is_checked_of_its_tensors():
    call = Preshuffle(torch.zeros(1, 64, 32).to(E4M3).mT, torch.eye(2).to_sparse(), "row_major", True)
    assert_expected_inline(
        str(call),
        """\
Preshuffle(weight=float8_e4m3fn [1, 32, 64] strides [2048, 1, 32] on cpu, scale=float32 [2, 2] torch.sparse_coo on cpu, layout='row_major', gate_up=True, pad_to=1, out_weight=None, out_scale=None)""",  # noqa: E501
    )


@built
def test_what_has_no_number():
    x = torch.eye(3)
    for odd in (x.to_sparse(), x.to_sparse_csr(), torch.nested.nested_tensor([x, x])):
        assert extension.MODULE.signature((x, odd)) is None and arguments._described((x, odd)) is None
    assert extension.MODULE.signature((x, "x")) is None
    with pytest.raises(TypeError, match="takes a tuple of tensors"):
        extension.MODULE.signature([x])


@built
def test_a_number_is_never_given_twice():
    """Nor when there are so many that they are forgotten; threads get the same ones."""
    x = torch.zeros(())
    number = extension.MODULE.signature
    first = number((x,))
    others = [number((x.expand(i),)) for i in range(1 << 16)]
    assert len({first, *others}) == len(others) + 1
    again = number((x,))
    assert again not in others and again != first
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda _: number((x,)), range(100))) == {again}


WITHOUT_EXCHANGE = """
import ctypes, sys
import torch

class Exchange(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("pointers", ctypes.c_void_p * 6)]

if sys.argv[1] == "none":
    del torch.Tensor.__dlpack_c_exchange_api__
elif sys.argv[1] == "not one":
    torch.Tensor.__dlpack_c_exchange_api__ = 0
else:
    exchange, name = Exchange(int(sys.argv[1]), 0), b"dlpack_exchange_api"
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    torch.Tensor.__dlpack_c_exchange_api__ = new(ctypes.addressof(exchange), name, None)

from torch_mxfp8moe import arguments, extension
assert extension.MODULE.capability()
assert arguments._signature is arguments._described
"""


@built
@only_cpu
@pytest.mark.parametrize("found", ("none", "not one", "1", "2"))
def test_a_pytorch_whose_tensors_cpp_cannot_read(found):
    """It has no exchange API, or one of another version, or one of this version that describes no tensors."""
    run_python(WITHOUT_EXCHANGE, found)


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
@pytest.mark.parametrize("numbered", (False, pytest.param(True, marks=built)))
def test_with_and_without_the_extension(monkeypatch, numbered):
    assert arguments._signature is (arguments._described if extension.MODULE is None else extension.MODULE.signature)
    monkeypatch.setattr(arguments, "_signature", extension.MODULE.signature if numbered else arguments._described)
    inputs = odd_inputs()
    want = reference.fused_moe(**inputs, **ODD)
    for _ in range(2):
        assert_equal(OPS.fused_moe(**inputs, **ODD), want)
    assert len(arguments._kinds) == 1
