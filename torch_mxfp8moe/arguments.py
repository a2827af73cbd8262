"""The arguments of each op, checked: one dataclass per op, whose ``check`` raises before any kernel starts.

Every message names the argument, what it got and what it takes. The same checks run for real tensors and for fake ones
with symbolic sizes: conditions on sizes go through ``torch._check_*``, so that a traced token count stays symbolic.

What calls of one kind have in common is found once (:class:`Kind`): the host would spend most of an eager call on it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import extension
from .formats import BLOCK, HIGH_PRECISION_DTYPES, SCALE_DTYPES, SCALE_ROUNDINGS
from .layouts import LAYOUTS, Layout, padded_intermediate

if TYPE_CHECKING:
    from typing_extensions import Self

    from .backends import Backend

__all__ = ["Call", "Dequantize", "FusedMoe", "Kind", "Preshuffle", "Quantize", "QuantizePreshuffle"]

ROUTING_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""dtypes of ``topk_weights`` and of the biases."""

ACTIVATION_DTYPES = ("mxfp8", "bf16")

MAX_PAD = 65536
"""Largest ``pad_to``: beyond any hardware's tile, and far from sizes that overflow."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def either(options) -> str:
    """Dtypes or other values, as errors name what is taken."""
    names = [_name(o) if isinstance(o, torch.dtype) else repr(o) for o in options]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


ALIGNMENT = 16
"""Bytes; whether a tensor lies at a multiple of them is part of what a call is."""

REMEMBERED = 4096
"""How many kinds of valid calls are kept. When there are more, all are forgotten."""


class Kind:
    """What valid calls have in common that differ only in the values of their tensors and in where these lie."""

    __slots__ = ("backend", "plans")

    def __init__(self):
        self.backend: Backend | None = None
        """What :mod:`.dispatch` keeps: who serves the calls."""
        self.plans: dict[str, Any] = {}
        """What each backend keeps, by its name."""


_kinds: dict[tuple, Kind] = {}


def _described(tensors: tuple[torch.Tensor | None, ...]) -> tuple | None:
    """All that is checked of tensors but memory and gradients.

    None if one of them is not a plain strided tensor.
    """
    result = []
    for x in tensors:
        if x is None:
            result.append(None)
            continue
        if type(x) not in (torch.Tensor, torch.nn.Parameter) or x.layout is not torch.strided:
            return None
        try:
            result.append((x.dtype, x.device, x.data_ptr() % ALIGNMENT == 0, x.shape, x.stride()))
        except RuntimeError:  # nested and functional tensors, for instance
            return None
    return tuple(result)


_signature = getattr(extension.MODULE, "signature", _described)
"""The same as a number, which C++ has in a sixth of the time, where it can read tensors."""


def _getter(names: Sequence[str]) -> staticmethod:
    """A function of an object: the tuple of its attributes ``names``."""
    get = attrgetter(*names)
    return staticmethod(get if len(names) > 1 else lambda call: (get(call),))


class Call:
    """Base of the ops' arguments, a dataclass for each. ``op`` is the op's name in messages."""

    op = "op"
    kind: Kind
    """Of a checked call."""

    _names: ClassVar[tuple[str, ...]]
    _tensors: ClassVar[Callable[["Call"], tuple[torch.Tensor | None, ...]]]
    _options: ClassVar[Callable[["Call"], tuple]]

    def __init_subclass__(cls):
        names = cls._names = tuple(cls.__annotations__)
        tensors = [name for name, type_ in cls.__annotations__.items() if "Tensor" in str(type_)]
        cls._tensors, cls._options = _getter(tensors), _getter([name for name in names if name not in tensors])

    def __repr__(self) -> str:
        """Tensors by what is checked of them; their values would fill screens."""

        def text(value: object) -> str:
            if not isinstance(value, torch.Tensor):
                return repr(value)
            lies = f"strides {list(value.stride())}" if value.layout is torch.strided else value.layout
            return f"{_name(value.dtype)} {list(value.shape)} {lies} on {value.device}"

        values = (f"{name}={text(getattr(self, name))}" for name in self._names)
        return f"{type(self).__name__}({', '.join(values)})"

    @property
    def device(self) -> torch.device:
        """Of the call's tensors."""
        raise NotImplementedError

    def check(self, writes_out: bool = False) -> "Self":
        """Raises unless the call is valid; returns it. ``writes_out``: of a call to an op's ``.out`` form."""
        self._check_kind(writes_out)
        self._check_memory()
        self._inference_only()
        self.kind = Kind()
        return self

    def check_once(self, writes_out: bool = False) -> "Self":
        """:meth:`check`, but what calls of one kind have in common is checked for the first of them only.

        For arguments as kernels get them: tensors that have memory.
        """
        if is_compiling():  # this frame by itself, where Dynamo gave up on the caller's
            return self.check(writes_out)
        signature = _signature(self._tensors(self))
        if signature is None:
            return self.check(writes_out)
        key = (type(self), writes_out, signature, self._options(self))
        known = _kinds.get(key)
        if known is None:
            self.check(writes_out)
            if len(_kinds) >= REMEMBERED:
                _kinds.clear()
            _kinds[key] = self.kind
        else:
            self.kind = known
            self._check_memory()
            if torch.is_grad_enabled():
                self._inference_only()
        return self

    def _check_kind(self, writes_out: bool) -> None:
        """Everything that equal signatures have in common."""
        raise NotImplementedError

    def _check_memory(self) -> None:
        """The rest but gradients: that outputs share no memory with inputs."""

    def _value(self, condition, name: str, got: object, takes: str) -> None:
        torch._check_value(condition, lambda: f"{self.op}: {name} {got}; it takes {takes}")

    def _dtype(self, name: str, tensor: torch.Tensor | None, options: tuple[torch.dtype, ...]) -> torch.Tensor:
        """The tensor."""
        if tensor is None:
            raise TypeError(f"{self.op}: {name} is None; it takes a tensor of {either(options)}")
        if tensor.dtype not in options:
            raise TypeError(f"{self.op}: {name} has dtype {_name(tensor.dtype)}; it takes {either(options)}")
        return tensor

    def _rank(self, name: str, tensor: torch.Tensor, dims: str) -> None:
        rank = len(dims.split(","))
        self._value(tensor.dim() == rank, name, f"has {tensor.dim()} dimensions", f"{rank}, [{dims}]")

    def _shape(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], dims: str) -> None:
        takes = f"[{', '.join(map(str, shape))}] ({dims})"
        self._value(tensor.dim() == len(shape), name, f"has {tensor.dim()} dimensions", takes)
        for got, want in zip(tensor.shape, shape):
            self._value(got == want, name, f"has shape {list(tensor.shape)}", takes)

    def _blocks(self, name: str, tensor: torch.Tensor) -> None:
        """Whole blocks along the last dimension."""
        columns = tensor.shape[-1]
        self._value(columns % BLOCK == 0, name, f"has {columns} columns", f"a last dimension divisible by {BLOCK}")

    def _one_of(self, name: str, value: str, options) -> None:
        if value not in options:
            raise ValueError(f"{self.op}: {name} is {value!r}; it takes {either(options)}")

    def _strided(self, name: str, tensor: torch.Tensor) -> None:
        """Plain dense memory, last stride 1; anything before that may have any stride."""
        if tensor.layout is not torch.strided:
            raise TypeError(f"{self.op}: {name} has layout {tensor.layout}; it takes torch.strided")
        if tensor.dim() and tensor.shape[-1] != 1:
            got = f"has strides {list(tensor.stride())}"
            self._value(tensor.stride(-1) == 1, name, got, "a last stride of 1 (call .contiguous())")

    def _contiguous(self, name: str, tensor: torch.Tensor) -> None:
        self._strided(name, tensor)
        self._value(tensor.is_contiguous(), name, f"has strides {list(tensor.stride())}", "contiguous memory")

    def _same_device(self, first: str, **tensors: torch.Tensor) -> None:
        device = tensors[first].device
        for name, tensor in tensors.items():
            if tensor.device != device:
                raise ValueError(f"{self.op}: {name} is on {tensor.device}; it takes the device of {first}, {device}")

    def _inference_only(self) -> None:
        if not torch.is_grad_enabled():
            return
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                f"{self.op} is inference only and has no tangent, but forward_ad.dual_level() is open; "
                "call it under torch.no_grad() with inputs that are no dual numbers"
            )
        if any(t is not None and t.requires_grad for t in self._tensors(self)):
            raise RuntimeError(
                f"{self.op} is inference only and has no gradient, but an input requires one; "
                "call it under torch.no_grad() or torch.inference_mode(), or detach its inputs"
            )

    def _not_overlapping(self, name: str, out: torch.Tensor, **inputs: torch.Tensor | None) -> None:
        if not _has_memory(out):
            return
        first, end = _extent(out)
        for other, tensor in inputs.items():
            if tensor is None or not _has_memory(tensor):
                continue
            start, stop = _extent(tensor)
            if start < end and first < stop and overlap(out, tensor):
                raise ValueError(
                    f"{self.op}: {name} shares memory with {other}; it takes memory of its own, since inputs are read "
                    "while it is written"
                )


def _has_memory(x: torch.Tensor) -> bool:
    """Whether x is not a fake tensor, nor another one without memory of its own; of these some count as parameters."""
    return type(x) is torch.Tensor or issubclass(type(x), torch.nn.Parameter)


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """First byte of x and first byte after it."""
    first = x.data_ptr()
    if x.is_contiguous():
        return first, first + x.nbytes
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return first, first + (last + 1) * x.element_size()


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether tensors with memory may share a byte: exact for column slices of one buffer, else by their extents."""
    if a.device != b.device or a.device.type == "meta" or 0 in (a.numel(), b.numel()):
        return False
    (a_first, a_end), (b_first, b_end) = _extent(a), _extent(b)
    if a_end <= b_first or b_end <= a_first:
        return False
    if a.dim() == b.dim() == 2:
        pitch = a.stride(0) * a.element_size()
        a_width, b_width = (x.shape[1] * x.element_size() for x in (a, b))
        if pitch == b.stride(0) * b.element_size() and max(a_width, b_width) <= pitch:
            distance = (b_first - a_first) % pitch
            return distance < a_width or pitch - distance < b_width
    return True


@dataclass(eq=False, repr=False)
class Quantize(Call):
    """``quantize_1x32``: x [..., C]."""

    x: torch.Tensor
    scale_rounding: str = "rceil"
    out_data: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None

    op = "quantize_1x32"

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Of the result."""
        *lead, columns = self.x.shape
        return (*lead, columns // BLOCK)

    @property
    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``out_data`` and ``out_scale`` of a call that has them, as every call that reaches a backend does."""
        assert self.out_data is not None and self.out_scale is not None
        return self.out_data, self.out_scale

    def _check_kind(self, writes_out: bool) -> None:
        if writes_out and self.out_data is None and self.out_scale is None:
            raise TypeError(f"{self.op}: out_data and out_scale are None; they take tensors")
        self._dtype("x", self.x, HIGH_PRECISION_DTYPES)
        self._value(self.x.dim() >= 1, "x", "has 0 dimensions", "1 or more, [..., C]")
        self._blocks("x", self.x)
        self._strided("x", self.x)
        self._one_of("scale_rounding", self.scale_rounding, SCALE_ROUNDINGS)
        if self.out_data is None and self.out_scale is None:
            return
        out_data = self._dtype("out_data", self.out_data, (torch.float8_e4m3fn,))
        out_scale = self._dtype("out_scale", self.out_scale, SCALE_DTYPES)
        self._shape("out_data", out_data, tuple(self.x.shape), "the shape of x")
        self._shape("out_scale", out_scale, self.scale_shape, "the shape of x, C/32 for C")
        self._contiguous("out_data", out_data)
        self._contiguous("out_scale", out_scale)
        self._same_device("x", x=self.x, out_data=out_data, out_scale=out_scale)

    def _check_memory(self) -> None:
        if self.out_data is not None:
            out_data, out_scale = self.outputs
            self._not_overlapping("out_data", out_data, x=self.x)
            self._not_overlapping("out_scale", out_scale, x=self.x, out_data=out_data)


@dataclass(eq=False, repr=False)
class Dequantize(Call):
    """``dequantize_1x32``: data [..., C], scale [..., C/32]."""

    data: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype

    op = "dequantize_1x32"

    @property
    def device(self) -> torch.device:
        return self.data.device

    def _check_kind(self, writes_out: bool) -> None:
        self._dtype("data", self.data, (torch.float8_e4m3fn,))
        self._dtype("scale", self.scale, SCALE_DTYPES)
        if self.dtype not in HIGH_PRECISION_DTYPES:
            raise TypeError(f"{self.op}: dtype is {_name(self.dtype)}; it takes {either(HIGH_PRECISION_DTYPES)}")
        self._value(self.data.dim() >= 1, "data", "has 0 dimensions", "1 or more, [..., C]")
        self._blocks("data", self.data)
        *lead, columns = self.data.shape
        self._shape("scale", self.scale, (*lead, columns // BLOCK), "the shape of data, C/32 for C")
        self._strided("data", self.data)
        self._strided("scale", self.scale)
        self._same_device("data", data=self.data, scale=self.scale)


class _IntoLayout(Call):
    """What the ops that write a weight in a layout have in common, beside the fields that each of them has."""

    layout: str
    gate_up: bool
    pad_to: int
    out_weight: torch.Tensor | None
    out_scale: torch.Tensor | None

    @property
    def sources(self) -> dict[str, torch.Tensor]:
        """What is read, by name, the weight first."""
        raise NotImplementedError

    @property
    def source_shape(self) -> Sequence[int]:
        """[E, R, C] of what is given (see ``layouts``)."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(iter(self.sources.values())).device

    @property
    def arrangement(self) -> Layout:
        return LAYOUTS[self.layout]

    @cached_property
    def weight_shape(self) -> tuple[int, int, int]:
        """Of the result: [E, R, C], I rounded up."""
        return padded_intermediate(self.source_shape, self.gate_up, self.pad_to)

    @cached_property
    def scale_matrix(self) -> tuple[int, int, int]:
        """Of the result's scales as their layout arranges them: [E, R, C/32], padded."""
        experts, rows, columns = self.weight_shape
        return experts, rows, self.arrangement.padded_scale_columns(columns)

    @cached_property
    def scale_shape(self) -> tuple[int, ...]:
        """Of the result."""
        return self.arrangement.scale_shape(*self.weight_shape)

    @property
    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``out_weight`` and ``out_scale`` of a call that has them, as every call that reaches a backend does."""
        assert self.out_weight is not None and self.out_scale is not None
        return self.out_weight, self.out_scale

    def _check_given_outputs(self, writes_out: bool) -> None:
        if writes_out and self.out_weight is None and self.out_scale is None:
            raise TypeError(f"{self.op}: out_weight and out_scale are None; they take tensors")

    def _check_sizes(self, name: str, tensor: torch.Tensor) -> None:
        """Of what is given: whole blocks, as many as both weights of an expert have."""
        self._blocks(name, tensor)
        _, rows, columns = self.source_shape
        got = f"has shape {list(tensor.shape)}"
        self._value(columns > 0, name, got, "no empty rows or columns")
        self._value(rows > 0, name, got, "no empty rows or columns")
        if self.gate_up:
            takes = f"2I rows, I divisible by {BLOCK}, when gate_up is True"
            self._value(rows % (2 * BLOCK) == 0, name, f"has {rows} rows", takes)
        else:
            self._value(rows % BLOCK == 0, name, f"has {rows} rows", f"H rows, H divisible by {BLOCK}")

    def _check_fit(self, name: str, tensor: torch.Tensor, writes_out: bool) -> None:
        """That the layout takes what is given, padded, and the outputs what comes of it."""
        valid_pad = self.pad_to == 1 or (0 < self.pad_to <= MAX_PAD and self.pad_to % BLOCK == 0)
        self._value(valid_pad, "pad_to", f"is {self.pad_to}", f"1 or a positive multiple of {BLOCK}, at most {MAX_PAD}")
        _, rows, columns = self.weight_shape
        reason = self.arrangement.why_not(rows, columns, self.gate_up)
        if reason:
            raise ValueError(f"{self.op}: {name} does not fit: {reason}; pad_to rounds the intermediate size up")
        if writes_out:
            out_weight = self._dtype("out_weight", self.out_weight, (torch.float8_e4m3fn,))
            out_scale = self._dtype("out_scale", self.out_scale, SCALE_DTYPES)
            self._shape("out_weight", out_weight, self.weight_shape, "E, R, C, I rounded up to pad_to")
            self._shape("out_scale", out_scale, self.scale_shape, "the layout's scale shape")
            self._contiguous("out_weight", out_weight)
            self._contiguous("out_scale", out_scale)
            self._same_device(name, **{name: tensor, "out_weight": out_weight, "out_scale": out_scale})

    def _check_memory(self) -> None:
        if self.out_weight is not None:
            out_weight, out_scale = self.outputs
            self._not_overlapping("out_weight", out_weight, **self.sources)
            self._not_overlapping("out_scale", out_scale, **self.sources, out_weight=out_weight)


@dataclass(eq=False, repr=False)
class Preshuffle(_IntoLayout):
    """``preshuffle``: weight [E, R, C] and scale [E, R, C/32] in checkpoint order (see ``layouts`` for E, R, C)."""

    weight: torch.Tensor
    scale: torch.Tensor
    layout: str
    gate_up: bool
    pad_to: int = 1
    out_weight: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None

    op = "preshuffle"

    @property
    def sources(self) -> dict[str, torch.Tensor]:
        return dict(weight=self.weight, scale=self.scale)

    @property
    def source_shape(self) -> Sequence[int]:
        return self.weight.shape

    def _check_kind(self, writes_out: bool) -> None:
        self._check_given_outputs(writes_out)
        self._dtype("weight", self.weight, (torch.float8_e4m3fn,))
        self._dtype("scale", self.scale, SCALE_DTYPES)
        self._one_of("layout", self.layout, LAYOUTS)
        self._rank("weight", self.weight, "E, 2I, H" if self.gate_up else "E, H, I")
        self._check_sizes("weight", self.weight)
        experts, rows, columns = self.weight.shape
        self._shape("scale", self.scale, (experts, rows, columns // BLOCK), "the shape of weight, C/32 for C")
        self._contiguous("weight", self.weight)
        self._contiguous("scale", self.scale)
        self._same_device("weight", weight=self.weight, scale=self.scale)
        self._check_fit("weight", self.weight, writes_out)


@dataclass(eq=False, repr=False)
class QuantizePreshuffle(_IntoLayout):
    """``quantize_preshuffle``: x [E, R, C], rows in checkpoint order (see ``layouts``), or [E, 2, I, H], the halves
    of the gate and up rows."""

    x: torch.Tensor
    layout: str
    gate_up: bool
    scale_rounding: str = "rceil"
    pad_to: int = 1
    out_weight: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None

    op = "quantize_preshuffle"

    @property
    def sources(self) -> dict[str, torch.Tensor]:
        return dict(x=self.x)

    @property
    def source_shape(self) -> Sequence[int]:
        if self.x.dim() == 3:
            return self.x.shape
        experts, halves, rows, columns = self.x.shape
        return experts, halves * rows, columns

    @property
    def by_halves(self) -> torch.Tensor:
        """x as [E, 2, I, H] if it holds gate and up rows, as [E, 1, H, I] if not. A view."""
        return self.x if self.x.dim() == 4 else self.x.unflatten(1, (2 if self.gate_up else 1, -1))

    def _check_kind(self, writes_out: bool) -> None:
        self._check_given_outputs(writes_out)
        self._dtype("x", self.x, HIGH_PRECISION_DTYPES)
        self._one_of("scale_rounding", self.scale_rounding, SCALE_ROUNDINGS)
        self._one_of("layout", self.layout, LAYOUTS)
        if self.gate_up:
            got, takes = f"has {self.x.dim()} dimensions", "3, [E, 2I, H], or 4, [E, 2, I, H]"
            self._value(self.x.dim() in (3, 4), "x", got, takes)
            if self.x.dim() == 4:
                self._value(self.x.shape[1] == 2, "x", f"has shape {list(self.x.shape)}", "[E, 2, I, H]")
        else:
            self._rank("x", self.x, "E, H, I")
        self._check_sizes("x", self.x)
        self._strided("x", self.x)
        self._check_fit("x", self.x, writes_out)


@dataclass(eq=False, repr=False)
class FusedMoe(Call):
    """``fused_moe``; see ``ops.fused_moe`` for what each argument is."""

    hidden_states: torch.Tensor
    w1: torch.Tensor
    w1_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    hidden_states_scale: torch.Tensor | None = None
    w1_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    expert_map: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None
    swiglu_alpha: float = 1.0
    swiglu_beta: float = 0.0
    swiglu_limit: float | None = None
    apply_router_weight_on_input: bool = False
    layout: str = "row_major"
    activation_dtype: str = "mxfp8"
    backend: str = "auto"
    out_dtype: torch.dtype | None = None
    out: torch.Tensor | None = None

    op = "fused_moe"

    @property
    def device(self) -> torch.device:
        return self.hidden_states.device

    @property
    def tokens(self):
        """T, an int or a symbolic one."""
        return self.hidden_states.shape[0]

    @property
    def hidden(self) -> int:
        """H."""
        return self.w1.shape[2]

    @property
    def intermediate(self) -> int:
        """I, padding included."""
        return self.w2.shape[2]

    @property
    def experts(self) -> int:
        """E, the local experts."""
        return self.w1.shape[0]

    @property
    def global_experts(self) -> int:
        """How many experts the ids may name: G with an expert map, E without."""
        return self.experts if self.expert_map is None else self.expert_map.shape[0]

    @property
    def topk(self) -> int:
        """K."""
        return self.topk_ids.shape[1]

    @property
    def result_dtype(self) -> torch.dtype:
        if self.out is not None:
            return self.out.dtype
        if self.out_dtype is not None:
            return self.out_dtype
        return torch.bfloat16 if self.hidden_states_scale is not None else self.hidden_states.dtype

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Every tensor that the call reads, by the name of its argument."""
        names = (
            "hidden_states", "w1", "w1_scale", "w2", "w2_scale", "topk_weights", "topk_ids",
            "hidden_states_scale", "w1_bias", "w2_bias", "expert_map", "num_tokens",
        )  # fmt: skip
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def with_out(self) -> "FusedMoe":
        """The same call with a new output, if it has none. Its kind stays: the output follows from the rest."""
        if self.out is not None:
            return self
        call = object.__new__(FusedMoe)
        call.__dict__.update(self.__dict__)
        call.out = self.hidden_states.new_empty((self.tokens, self.hidden), dtype=self.result_dtype)
        return call

    def _check_kind(self, writes_out: bool) -> None:
        if writes_out and self.out is None:
            raise TypeError(f"{self.op}: out is None; it takes a tensor")
        self._check_weights()
        self._check_activations()
        self._check_routing()
        self._check_options()
        self._same_device("hidden_states", **self.inputs)
        if self.out is not None:
            self._check_out(self.out)

    def _check_memory(self) -> None:
        if self.out is not None:
            self._not_overlapping("out", self.out, **self.inputs)

    def _check_weights(self) -> None:
        self._one_of("layout", self.layout, LAYOUTS)
        layout = LAYOUTS[self.layout]
        for name in ("w1", "w2"):
            self._dtype(name, getattr(self, name), (torch.float8_e4m3fn,))
            self._dtype(f"{name}_scale", getattr(self, f"{name}_scale"), SCALE_DTYPES)
        self._rank("w1", self.w1, "E, 2I, H")
        experts, rows, hidden = self.w1.shape
        got = f"has shape {list(self.w1.shape)}"
        self._value(experts > 0, "w1", got, "at least one expert")
        self._value(hidden > 0, "w1", got, "a hidden size above 0")
        self._value(hidden % BLOCK == 0, "w1", got, f"a hidden size divisible by {BLOCK}, [E, 2I, H]")
        self._value(rows > 0, "w1", got, "an intermediate size above 0")
        self._value(rows % (2 * BLOCK) == 0, "w1", got, f"an intermediate size divisible by {BLOCK}, [E, 2I, H]")
        intermediate = rows // 2
        self._shape("w2", self.w2, (experts, hidden, intermediate), "E, H, I of w1 [E, 2I, H]")
        for gate_up, shape in ((True, (rows, hidden)), (False, (hidden, intermediate))):
            reason = layout.why_not(*shape, gate_up)
            if reason:
                raise ValueError(f"{self.op}: {'w1' if gate_up else 'w2'} {got}: {reason}")
            name = "w1_scale" if gate_up else "w2_scale"
            scale_shape = layout.scale_shape(experts, *shape)
            self._shape(name, getattr(self, name), scale_shape, f"for these weights in layout '{self.layout}'")
        for name in ("w1", "w1_scale", "w2", "w2_scale"):
            self._contiguous(name, getattr(self, name))
        for name, size in (("w1_bias", rows), ("w2_bias", hidden)):
            bias = getattr(self, name)
            if bias is not None:
                self._dtype(name, bias, ROUTING_WEIGHT_DTYPES)
                self._shape(name, bias, (experts, size), "E, 2I" if name == "w1_bias" else "E, H")
                self._contiguous(name, bias)

    def _check_activations(self) -> None:
        x, scale = self.hidden_states, self.hidden_states_scale
        if scale is None and x is not None and x.dtype is torch.float8_e4m3fn:
            raise TypeError(f"{self.op}: hidden_states has dtype float8_e4m3fn; it takes hidden_states_scale beside it")
        self._dtype("hidden_states", x, HIGH_PRECISION_DTYPES if scale is None else (torch.float8_e4m3fn,))
        self._rank("hidden_states", x, "T, H")
        self._value(x.shape[1] == self.hidden, "hidden_states", f"has shape {list(x.shape)}", f"[T, {self.hidden}]")
        self._strided("hidden_states", x)
        if scale is not None:
            self._dtype("hidden_states_scale", scale, SCALE_DTYPES)
            self._shape("hidden_states_scale", scale, (x.shape[0], self.hidden // BLOCK), "T, H/32")
            self._strided("hidden_states_scale", scale)

    def _check_routing(self) -> None:
        self._dtype("topk_weights", self.topk_weights, ROUTING_WEIGHT_DTYPES)
        self._dtype("topk_ids", self.topk_ids, (torch.int32, torch.int64))
        self._rank("topk_ids", self.topk_ids, "T, K")
        topk = self.topk_ids.shape[1]
        self._value(topk > 0, "topk_ids", f"has shape {list(self.topk_ids.shape)}", "at least one expert per token")
        self._shape("topk_ids", self.topk_ids, (self.tokens, topk), "T of hidden_states, K")
        self._shape("topk_weights", self.topk_weights, (self.tokens, topk), "the shape of topk_ids, T, K")
        self._strided("topk_ids", self.topk_ids)
        self._strided("topk_weights", self.topk_weights)
        if self.expert_map is not None:
            self._dtype("expert_map", self.expert_map, (torch.int32,))
            self._rank("expert_map", self.expert_map, "G")
            self._contiguous("expert_map", self.expert_map)
        if self.num_tokens is not None:
            self._dtype("num_tokens", self.num_tokens, (torch.int32,))
            shape = list(self.num_tokens.shape)
            self._value(self.num_tokens.numel() == 1, "num_tokens", f"has shape {shape}", "one element")

    def _check_options(self) -> None:
        for name in ("swiglu_alpha", "swiglu_beta"):
            value = getattr(self, name)
            self._value(math.isfinite(value), name, f"is {value}", "a finite number")
        limit = self.swiglu_limit
        if limit is not None:
            self._value(
                math.isfinite(limit) and limit > 0, "swiglu_limit", f"is {limit}", "None or a finite number > 0"
            )
        self._one_of("activation_dtype", self.activation_dtype, ACTIVATION_DTYPES)
        if self.apply_router_weight_on_input:
            got = f"is True with {self.topk} experts per token"
            self._value(self.topk == 1, "apply_router_weight_on_input", got, "one expert per token (K = 1)")
        if self.out_dtype is not None and self.out_dtype not in HIGH_PRECISION_DTYPES:
            takes = either(HIGH_PRECISION_DTYPES)
            raise TypeError(f"{self.op}: out_dtype is {_name(self.out_dtype)}; it takes {takes}")

    def _check_out(self, out: torch.Tensor) -> None:
        self._dtype("out", out, HIGH_PRECISION_DTYPES)
        self._shape("out", out, (self.tokens, self.hidden), "T, H")
        self._strided("out", out)
        self._same_device("hidden_states", hidden_states=self.hidden_states, out=out)
        if isinstance(self.tokens, int) and self.tokens > 1:
            got, takes = f"has strides {list(out.stride())}", f"a row stride of {self.hidden} or more"
            self._value(out.stride(0) >= self.hidden, "out", got, takes)
