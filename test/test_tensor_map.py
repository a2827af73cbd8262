"""Tensor maps with another L2 promotion than Triton's: which descriptors get one, and what becomes of Triton's own."""

import ctypes
import inspect
from types import SimpleNamespace

import pytest
import torch

from gpu import needs_sm_90, on_gpu
from helpers import OPS, moe_inputs

pytest.importorskip("triton", reason="needs Triton: pip install triton")
from torch_mxfp8moe.backends.triton import _interpreted  # noqa: E402

if _interpreted():
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled", allow_module_level=True)

from test_triton_compile import M3, SHAPES, moe  # noqa: E402
from torch_mxfp8moe.backends.triton import fused_moe, tensor_map  # noqa: E402
from torch_mxfp8moe.backends.triton.hopper import warpgroup_gemm_kernel  # noqa: E402
from torch_mxfp8moe.backends.triton.launch import Descriptor, Operand, compile_offline  # noqa: E402
from torch_mxfp8moe.backends.triton.targets import Target  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.runtime import driver  # noqa: E402

SIZE = 128
"""Of a tensor map, in bytes."""


def triton_makes(descriptor, metadata) -> list:
    """A kernel's arguments, of a descriptor, as Triton's launcher gets them."""
    rest = [None] * (len(inspect.signature(nvidia.make_tensordesc_arg).parameters) - 2)
    return nvidia.make_tensordesc_arg(descriptor, metadata, *rest)


@pytest.fixture
def product():
    """The arguments of a product of :mod:`.hopper`, and by name what Triton knows of its descriptors."""
    call = moe(**SHAPES[M3] | dict(T=64))
    launches = fused_moe.plan(call, Target("sm_90")).bind(call.inputs | {"out": call.out}, call.device)
    launch = next(launch for launch in launches if launch.kernel is warpgroup_gemm_kernel)
    (kernel,) = compile_offline([launch], Target("sm_90"))
    return launch.arguments, dict(zip(("x", "w"), kernel.metadata.tensordesc_meta, strict=True))


@pytest.fixture
def made(monkeypatch):
    """What Triton asked its C code to make, with maps of zeros instead; whose memory they are, ``_place`` tells."""
    asked, maps = [], []

    def fill(*arguments):
        asked.append(arguments)
        maps.append(ctypes.create_string_buffer(SIZE))
        return maps[-1]

    utils = SimpleNamespace(fill_tma_descriptor=fill, fill_tma_descriptor_tiled=fill)
    before = driver._active
    driver.set_active(SimpleNamespace(utils=utils))
    monkeypatch.setattr(tensor_map, "_place", ctypes.addressof)
    yield SimpleNamespace(asked=asked, maps=maps)
    driver.set_active(before)


def encoder(monkeypatch, before: bytes, promoted: bytes = b"\x56" * SIZE) -> list:
    """CUDA gives ``before`` for 128 bytes, and ``promoted`` for 256; returned: what it was asked."""
    asked = []

    def encode(*what):
        asked.append(what)
        return {128: before, 256: promoted}[what[-1]]

    monkeypatch.setattr(tensor_map, "_encoder", lambda: encode)
    return asked


def test_weights_are_promoted_and_activations_are_not(product):
    arguments, _ = product
    assert arguments["w"].l2_promotion == 256 and not hasattr(arguments["x"], "l2_promotion")


def test_a_map_becomes_the_promoted_one_once(product, made, monkeypatch):
    """Which every later launch gets again."""
    arguments, metadata = product
    w = arguments["w"]
    asked = encoder(monkeypatch, b"\0" * SIZE)
    first = triton_makes(w, metadata["w"])
    assert first[0] is made.maps[0] and first[0].raw == b"\x56" * SIZE
    assert first[1:] == [*w.shape, *w.strides]
    assert triton_makes(w, metadata["w"]) == first and len(made.maps) == 1
    (address, swizzle, element, dtype, block, shape, strides, padding) = made.asked[0]
    assert padding == 0
    assert asked == [(dtype, element, address, shape, strides, block, swizzle, size) for size in (256, 128)]
    first.clear()  # which Triton may do with what it gets
    assert len(triton_makes(w, dict(metadata["w"]))) == 9 and len(made.maps) == 1
    # Another kernel's tile may be another one.
    assert triton_makes(w, metadata["w"] | dict(block_size=[1, 1, 64, 64]))[0] is made.maps[1]


def test_other_descriptors_stay_as_they_are(product, made, monkeypatch):
    arguments, metadata = product
    asked = encoder(monkeypatch, b"\0" * SIZE)
    for _ in range(2):
        assert triton_makes(arguments["x"], metadata["x"])[0].raw == b"\0" * SIZE
    assert len(made.maps) == 2 and asked == []


def test_a_map_that_is_not_what_it_should_be_stays(product, made, monkeypatch):
    arguments, metadata = product
    encoder(monkeypatch, b"\1" * SIZE)
    assert triton_makes(arguments["w"], metadata["w"])[0].raw == b"\0" * SIZE
    encoder(monkeypatch, b"")  # CUDA did not take it
    w = arguments["w"]
    assert triton_makes(w, metadata["w"] | dict(block_size=[1, 1, 64, 64]))[0].raw == b"\0" * SIZE
    encoder(monkeypatch, b"\0" * SIZE, b"")
    assert triton_makes(w, metadata["w"] | dict(block_size=[1, 1, 16, 64]))[0].raw == b"\0" * SIZE
    monkeypatch.setattr(tensor_map, "_encoder", lambda: None)
    assert triton_makes(w, metadata["w"] | dict(block_size=[1, 1, 32, 64]))[0].raw == b"\0" * SIZE
    assert len(made.maps) == 4


def test_where_triton_tells_other_things_its_map_stays(product, made, monkeypatch):
    arguments, metadata = product
    asked = encoder(monkeypatch, b"\0" * SIZE)
    tensor_map._set_promotion(ctypes.create_string_buffer(SIZE), arguments["w"], {}, 256)
    monkeypatch.undo()
    assert tensor_map._place(0) is None  # of what has no room for one
    then = encoder(monkeypatch, b"\0" * SIZE)
    tensor_map._set_promotion(0, arguments["w"], metadata["w"], 256)
    assert asked == then == []


def test_triton_launches_with_what_is_wrapped(product):
    """By its source: the function that launches a kernel with descriptors looks up the one that is replaced."""
    assert nvidia.make_tensordesc_arg.__wrapped__.__module__ == nvidia.__name__
    assert "make_tensordesc_arg" in inspect.getsource(nvidia.wrap_handle_tensordesc)


def test_what_cuda_is_asked_for():
    """Lengths and strides from the innermost on, strides in bytes and without the innermost."""
    asked = []

    def function(at, dtype, rank, address, shape, strides, block, steps, interleave, swizzle, promotion, fill):
        asked.append((dtype, rank, address.value, *map(list, (shape, strides, block, steps))))
        asked.append((interleave, swizzle, promotion, fill))
        assert at.value % 64 == 0
        ctypes.memset(at.value, 7, SIZE)
        return status

    status = 0
    what = 9, 2, 4096, [5, 40, 64], [2560, 64, 1], [1, 8, 32], 3
    assert tensor_map._encode(function, *what, 256) == b"\7" * SIZE
    assert asked == [(9, 3, 4096, [64, 40, 5], [128, 5120, 0], [32, 8, 1], [1, 1, 1]), (0, 3, 3, 0)]
    status = 1
    assert tensor_map._encode(function, *what, 128) == b""
    assert asked[3] == (0, 3, 2, 0)


@needs_sm_90
def test_on_a_gpu_cuda_gives_the_same_map_and_takes_the_other(monkeypatch):
    """Of a call's weights: the map was Triton's, and now is the one that CUDA gives for 256 bytes."""
    seen = []
    replace = tensor_map._set_promotion

    def spy(made, descriptor, metadata, size):
        before = ctypes.string_at(tensor_map._place(made), SIZE)
        replace(made, descriptor, metadata, size)
        seen.append((descriptor, metadata, before, ctypes.string_at(tensor_map._place(made), SIZE)))

    monkeypatch.setattr(tensor_map, "_set_promotion", spy)
    # Sizes that no other test has, whose plan would have its maps.
    OPS.fused_moe(**on_gpu(moe_inputs(T=70, H=832, I=416, E=5, K=2)), backend="triton")
    assert len(seen) == 2
    for descriptor, metadata, before, after in seen:
        encode, what = tensor_map._encoder(), tensor_map._described(descriptor, metadata)
        assert before == encode(*what, 128) != encode(*what, 256) == after


def test_a_descriptor_of_triton_itself_is_not_promoted():
    """Of the plain kernel, whose maps Triton's launcher makes as it always did."""
    x = torch.empty(64, 64, dtype=torch.uint8, device="meta")
    made = Descriptor(Operand("x", x.dtype), (64, 64), (64, 1), (16, 64)).of(x)
    assert not hasattr(made, "l2_promotion")
