"""Tensor maps (TMA) with another L2 promotion than the one that Triton gives them.

A copy that misses the L2 cache has it read as many bytes from memory as the copy's tensor map says
(``CUtensorMapL2promotion``), if it needs that many or not. Triton (3.6 to 3.9) says 128, and has no way to ask for
another number. So its function that makes a kernel's argument of a descriptor is wrapped: for a descriptor that
:func:`promote` was told of, and for no other, the map's bytes become those that CUDA gives for that number, provided
that they are what it gives for 128. Where they are not, or there is no such function, the map stays Triton's, with
which the same is computed, slower.

Source: CUDA driver API, ``cuTensorMapEncodeTiled``.
"""

import ctypes
from collections.abc import Sequence
from functools import cache, wraps
from typing import Any

from triton.backends.nvidia import driver as nvidia

_TRITONS = 128
"""The bytes that Triton's maps promote to."""

_PROMOTIONS = {128: 2, 256: 3}
"""``CUtensorMapL2promotion``, by bytes."""

_MAP_BYTES = 128
"""Of a ``CUtensorMap``."""


def promote(descriptor: Any, size: int) -> None:
    """Have copies of a descriptor, Triton's or Gluon's, bring ``size`` bytes to L2 when they miss it: 128 or 256."""
    assert size in _PROMOTIONS
    _wrap_triton()
    descriptor.l2_promotion = size
    descriptor.made = None, None


@cache
def _wrap_triton() -> None:
    """Wrap the function of Triton that makes tensor maps, once."""
    module: Any = nvidia
    make = getattr(module, "make_tensordesc_arg", None)
    if make is None:
        return

    @wraps(make)
    def with_promotion(descriptor, *rest, **named):
        size = getattr(descriptor, "l2_promotion", None)
        metadata = rest[0] if rest else None
        if size is None or metadata is None:
            return make(descriptor, *rest, **named)
        known_for, arguments = descriptor.made
        if known_for != metadata:  # Triton makes one for every launch
            arguments = make(descriptor, *rest, **named)
            _set_promotion(arguments[0], descriptor, metadata, size)
            descriptor.made = metadata, arguments
        return list(arguments)

    module.make_tensordesc_arg = with_promotion


def _place(tensor_map: Any) -> int | None:
    """The address of the ``CUtensorMap`` in Triton's object, whose last member it is; None if that is too small."""
    size = type(tensor_map).__basicsize__
    return id(tensor_map) + size - _MAP_BYTES if size > _MAP_BYTES else None


def _described(descriptor: Any, metadata: dict) -> tuple:
    """What Triton's map of a descriptor says, as :func:`_encode` is told of it."""
    return (
        nvidia.TMA_DTYPE_DEVICE_TO_HOST[metadata["elem_type"]], metadata["elem_size"], descriptor.base.data_ptr(),
        descriptor.shape, descriptor.strides, metadata["block_size"], metadata["swizzle"],
    )  # fmt: skip


def _set_promotion(tensor_map: Any, descriptor: Any, metadata: dict, size: int) -> None:
    """Make of Triton's map of a descriptor one that promotes to ``size`` bytes, if it is what it should be."""
    encode, place = _encoder(), _place(tensor_map)
    if encode is None or place is None:
        return
    try:
        what = _described(descriptor, metadata)
    except (AttributeError, KeyError):  # a later Triton's, who calls them otherwise
        return
    promoted = encode(*what, size)
    if promoted and ctypes.string_at(place, _MAP_BYTES) == encode(*what, _TRITONS):
        ctypes.memmove(place, promoted, _MAP_BYTES)


@cache
def _encoder():
    """:func:`_encode` by this machine's driver, or None."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError):
        return None

    def encode(*what):
        return _encode(function, *what)

    return encode


def _encode(
    function, dtype: int, element: int, address: int, shape: Sequence[int], strides: Sequence[int],
    block: Sequence[int], swizzle: int, size: int,
) -> bytes:  # fmt: skip
    """A ``CUtensorMap``, or nothing if CUDA does not take it. Strides are in elements of ``element`` bytes, lengths
    begin with the outermost; beyond the tensor there are zeros."""
    rank = len(shape)
    room = ctypes.create_string_buffer(2 * _MAP_BYTES)
    at = -(-ctypes.addressof(room) // _MAP_BYTES) * _MAP_BYTES
    status = function(
        ctypes.c_void_p(at), dtype, rank, ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * rank)(*(element * stride for stride in reversed(strides[:-1])), 0),
        (ctypes.c_uint32 * rank)(*reversed(block)), (ctypes.c_uint32 * rank)(*[1] * rank),
        0, swizzle, _PROMOTIONS[size], 0,
    )  # fmt: skip
    return b"" if status else ctypes.string_at(at, _MAP_BYTES)
