"""``Mxfp8Experts``: the experts of one mixture-of-experts layer, held in MXFP8, as an ``nn.Module``.

Sizes: G routed experts of the model, S shared experts fused behind them, E of these on this rank, H hidden size, I
intermediate size (of this rank, under tensor parallelism), T tokens, K experts per token.
"""

import json
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import ROUTING_WEIGHT_DTYPES, FusedMoe, either
from .backends import registered
from .dispatch import explain_call, known_backend
from .formats import BLOCK, HIGH_PRECISION_DTYPES, SCALE_DTYPES, SCALE_ROUNDINGS
from .layouts import LAYOUTS, ROW_MAJOR, padded_intermediate
from .ops import fused_moe, preshuffle, quantize_preshuffle
from .sharding import check_rank, expert_parallel_map, tensor_parallel_range

GATE_UP_ORDERS = ("concatenated", "interleaved")
"""Rows of w1: all gate rows then all up rows, or gate and up rows in turn, as gpt-oss has them."""

E4M3 = torch.float8_e4m3fn

_WEIGHTS = {"w1": True, "w2": False}
"""The weights' names: whether they hold the gate and up projections."""

_STATE = "_extra_state"
_FORMAT = 1
"""Version of what ``get_extra_state`` writes."""


@dataclass(frozen=True)
class SharedExpert:
    """A shared expert that is computed as ``count`` more experts of the routed ones' size, which every token gets.

    A shared expert of n times the routed intermediate size is n experts. Its activation is stated, so that one that
    differs from the routed experts' is refused: fused, both are computed alike.
    """

    count: int = 1
    """Its intermediate size divided by the routed experts'."""
    routing_weight: float = 1.0
    """Its weight in the sum: 1, or 1 / routed_scaling_factor where the model scales the sum afterwards."""
    swiglu_alpha: float = 1.0
    swiglu_beta: float = 0.0
    swiglu_limit: float | None = None


def check_source(gate_up_order: str, scale_rounding: str) -> None:
    """Raises ValueError unless these say how weights are given and how they are quantised."""
    for name, value, takes in (
        ("gate_up_order", gate_up_order, GATE_UP_ORDERS),
        ("scale_rounding", scale_rounding, SCALE_ROUNDINGS),
    ):
        if value not in takes:
            raise ValueError(f"Mxfp8Experts: {name} is {value!r}; it takes {either(takes)}")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        got = "None" if value is None else f"a {type(value).__name__}"
        raise TypeError(f"Mxfp8Experts: {name} is {got}; it takes a tensor")


def _expert_id(value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"Mxfp8Experts: experts has {value!r}; it takes integers") from None


def halves(w1: Tensor, gate_up_order: str, dim: int = 1) -> Tensor:
    """Split ``dim``, the 2I rows of w1 in either order, into (2, I). A view."""
    if gate_up_order == "concatenated":
        return w1.unflatten(dim, (2, -1))
    return w1.unflatten(dim, (-1, 2)).transpose(dim, dim + 1)


def _as_slice(indices: list[int]) -> slice | None:
    """Consecutive indices as a slice."""
    if indices == list(range(indices[0], indices[0] + len(indices))):
        return slice(indices[0], indices[0] + len(indices))
    return None


def _arrangement(layout: str, gate_up: bool) -> dict[str, Any]:
    """The options by which an op brings a row-major weight into ``layout``, I rounded up to what that takes."""
    return dict(layout=layout, gate_up=gate_up, pad_to=LAYOUTS[layout].intermediate_multiple)


def _restored(weight: Tensor, scale: Tensor, layout: str, gate_up: bool, intermediate: int) -> tuple[Tensor, Tensor]:
    """The inverse of ``preshuffle`` by an :func:`_arrangement`: contiguous, row-major, without padding."""
    weight, scale = LAYOUTS[layout].restore(weight, scale, gate_up)
    weight = weight.view(torch.uint8)
    if gate_up:
        weight, scale = (halves(x, "concatenated")[:, :, :intermediate].flatten(1, 2) for x in (weight, scale))
    else:
        weight, scale = weight[..., :intermediate], scale[..., : intermediate // BLOCK]
    return weight.contiguous().view(E4M3), scale.contiguous()


class Mxfp8Experts(nn.Module):
    """The experts of one MoE layer in MXFP8: ``forward`` is :func:`torch_mxfp8moe.fused_moe` on buffers of the module.

    Inference only: weights are buffers, without gradients. They start as zeros; :meth:`from_weights` makes a module
    of weights, :meth:`update_weights` writes new ones in place.

    Buffers: ``w1`` [E, 2I, H] and ``w2`` [E, H, I] ``float8_e4m3fn`` and ``w1_scale``, ``w2_scale`` uint8, in
    ``layout`` (I rounded up to what it takes); ``w1_bias`` [E, 2I], ``w2_bias`` [E, H] or None; ``expert_map`` int32
    [G + S] or None. No conversion to another dtype (``.half()``, ``.to(dtype)``) touches any but the biases.

    Args:
        num_experts: G.
        hidden_size: H.
        intermediate_size: of the whole model, also under tensor parallelism.
        bias: whether there are biases.
        bias_dtype: fp32, bf16, fp16 or fp64.
        shared: the shared expert that is fused behind the routed ones, as ids G to G + S - 1. ``forward`` adds its
            routes.
        layout: the order of the weights' bytes, a name of :data:`torch_mxfp8moe.LAYOUTS`; or ``"auto"``, which takes
            the one that the most preferred backend of the device serves, row_major where it makes no difference. The
            attribute ``layout`` says which, ``layout_reason`` why.
        swiglu_alpha, swiglu_beta, swiglu_limit, apply_router_weight_on_input, activation_dtype, backend: as
            :func:`torch_mxfp8moe.fused_moe` takes them.
        tp_rank, tp_size: this rank holds ``tensor_parallel_range`` of the intermediate size of every expert; the sum
            over ranks is the result. w2's biases are held, and added, by rank 0 alone.
        ep_rank, ep_size: this rank holds ``expert_parallel_map`` of the experts; the sum over ranks is the result. A
            shared expert is held by every rank, which computes it for the tokens t with t % ep_size == ep_rank.
        expert_map: [G] int32, another distribution: the local expert of each, -1 for one held elsewhere; each local
            expert once.
        device: of the buffers.

    Raises:
        ValueError, TypeError: an argument is not as above, the sizes do not fit the layout, or the shared expert's
            activation differs.
    """

    w1: Tensor
    w1_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    w1_bias: Tensor | None
    w2_bias: Tensor | None
    expert_map: Tensor | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        bias_dtype: torch.dtype = torch.bfloat16,
        shared: SharedExpert | None = None,
        layout: str = "auto",
        swiglu_alpha: float = 1.0,
        swiglu_beta: float = 0.0,
        swiglu_limit: float | None = None,
        apply_router_weight_on_input: bool = False,
        activation_dtype: str = "mxfp8",
        backend: str = "auto",
        tp_rank: int = 0,
        tp_size: int = 1,
        ep_rank: int = 0,
        ep_size: int = 1,
        expert_map: Tensor | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        device = torch.device(device) if device is not None else torch.get_default_device()
        for name, rank, size in (("tp", tp_rank, tp_size), ("ep", ep_rank, ep_size)):
            check_rank("Mxfp8Experts", name, rank, size)
        if intermediate_size % BLOCK or intermediate_size <= 0:
            raise ValueError(
                f"Mxfp8Experts: intermediate_size is {intermediate_size}; it takes a multiple of {BLOCK} above 0"
            )
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.tp_rank, self.tp_size, self.ep_rank, self.ep_size = tp_rank, tp_size, ep_rank, ep_size
        self.bias, self.bias_dtype = bias, bias_dtype
        self.shared = shared
        self.options: dict[str, Any] = dict(
            swiglu_alpha=swiglu_alpha,
            swiglu_beta=swiglu_beta,
            swiglu_limit=swiglu_limit,
            apply_router_weight_on_input=apply_router_weight_on_input,
            activation_dtype=activation_dtype,
            backend=backend,
        )
        """What every call of ``fused_moe`` gets, beside tensors and layout."""
        self.tp_range = tensor_parallel_range(intermediate_size, tp_rank, tp_size)
        self._check_shared()
        if expert_map is None and ep_size > 1:
            expert_map = expert_parallel_map(num_experts, ep_rank, ep_size)
        self.num_local_experts = num_experts if expert_map is None else self._check_expert_map(expert_map)
        if expert_map is not None:
            behind = self.num_local_experts + torch.arange(self.num_shared, dtype=torch.int32, device=expert_map.device)
            expert_map = torch.cat([expert_map, behind])
            expert_map = expert_map if device.type == "meta" else expert_map.to(device)
        known_backend(self._call("meta", ROW_MAJOR.name).check())  # sizes and options, before anything is allocated
        self.layout = self._decide(layout, device)
        self._allocate(device)
        self.register_buffer("expert_map", expert_map)

    # --- sizes

    @property
    def num_shared(self) -> int:
        """S."""
        return self.shared.count if self.shared else 0

    @property
    def local_intermediate_size(self) -> int:
        """I: this rank's part of the intermediate size, without the layout's padding."""
        return self.tp_range[1] - self.tp_range[0]

    @property
    def expert_ids(self) -> list[int]:
        """The global id of each local expert, shared ones included. Reads ``expert_map`` on the host."""
        if self.expert_map is None:
            return list(range(self.num_experts + self.num_shared))
        local = {slot: expert for expert, slot in enumerate(self.expert_map.tolist()) if slot >= 0}
        return [local[slot] for slot in range(len(local))]

    def _shape(self, layout: str, gate_up: bool) -> tuple[int, int, int]:
        """Of w1 or w2 in a layout."""
        experts, hidden = self.num_local_experts + self.num_shared, self.hidden_size
        inner = self.local_intermediate_size
        shape = (experts, 2 * inner, hidden) if gate_up else (experts, hidden, inner)
        return padded_intermediate(shape, gate_up, LAYOUTS[layout].intermediate_multiple)

    def _why_not(self, layout: str, gate_up: bool) -> str | None:
        return LAYOUTS[layout].why_not(*self._shape(layout, gate_up)[1:], gate_up)

    def _buffer_shapes(self, layout: str | None = None) -> Iterator[tuple[str, tuple[int, ...] | None, torch.dtype]]:
        """(name, shape, dtype) of every buffer but ``expert_map``; no shape for a bias that is not there."""
        layout = layout or self.layout
        for name, gate_up in _WEIGHTS.items():
            shape = self._shape(layout, gate_up)
            yield name, shape, E4M3
            yield f"{name}_scale", LAYOUTS[layout].scale_shape(*shape), torch.uint8
        for name, gate_up in _WEIGHTS.items():
            held = self.bias and (gate_up or self.tp_rank == 0)
            yield f"{name}_bias", self._shape(layout, gate_up)[:2] if held else None, self.bias_dtype

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """The buffers of w1 or w2: the weight and its scales."""
        return self.get_buffer(name), self.get_buffer(f"{name}_scale")

    def _allocate(self, device: torch.device) -> None:
        for name, shape, dtype in self._buffer_shapes():
            self.register_buffer(name, None if shape is None else torch.zeros(shape, dtype=dtype, device=device))

    def _to_empty(self, device: torch.device) -> None:
        """From the meta device to another, in its layout if that is up to us; for those who write every weight."""
        if self._auto:
            self.layout = self._decide("auto", device)
        for name, shape, dtype in self._buffer_shapes():
            if shape is not None:
                make = torch.zeros if name.endswith("bias") else torch.empty
                self._buffers[name] = make(shape, dtype=dtype, device=device)
        if self.expert_map is not None:
            self.expert_map = self.expert_map.to(device)

    # --- what the arguments have to be

    def _check_shared(self) -> None:
        if self.shared is None:
            return
        if self.shared.count < 1:
            raise ValueError(f"Mxfp8Experts: shared.count is {self.shared.count}; it takes 1 or more")
        for name in ("swiglu_alpha", "swiglu_beta", "swiglu_limit"):
            got, takes = getattr(self.shared, name), self.options[name]
            if got != takes:
                raise ValueError(
                    f"Mxfp8Experts: shared.{name} is {got}; it takes {takes}, that of the routed experts: fused, both "
                    "are computed alike. Compute this shared expert apart"
                )
        if self.options["apply_router_weight_on_input"]:
            raise ValueError(
                "Mxfp8Experts: shared is given with apply_router_weight_on_input, which takes one expert per token"
            )

    def _check_expert_map(self, expert_map: Tensor) -> int:
        """How many experts are local."""
        _check_tensor("expert_map", expert_map)
        if expert_map.dtype is not torch.int32 or expert_map.shape != (self.num_experts,):
            got = f"{str(expert_map.dtype)[6:]} {list(expert_map.shape)}"
            raise ValueError(f"Mxfp8Experts: expert_map is {got}; it takes int32 [{self.num_experts}]")
        slots = sorted(slot for slot in expert_map.tolist() if slot != -1)
        if not slots or slots != list(range(len(slots))):
            raise ValueError(f"Mxfp8Experts: expert_map has local experts {slots}; it takes each of 0 to E - 1 once")
        return len(slots)

    # --- layout

    def _call(self, device: torch.device | str, layout: str) -> FusedMoe:
        """A call of one token on weights like these. Not on the meta device, its tensors are one element each."""

        def like(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            if torch.device(device).type == "meta":
                return torch.empty(shape, dtype=dtype, device=device)
            return torch.empty(1, dtype=dtype, device=device).expand(shape)

        tensors: dict[str, Any] = {
            name: like(shape, dtype) for name, shape, dtype in self._buffer_shapes(layout) if shape is not None
        }
        tensors["hidden_states"] = like((1, self.hidden_size), torch.bfloat16)
        tensors["topk_weights"], tensors["topk_ids"] = like((1, 1), torch.float32), like((1, 1), torch.int32)
        return FusedMoe(**tensors, **self.options, layout=layout)

    def _choice(self, device: torch.device) -> tuple[str, str]:
        """The layout for a device, and why."""
        preference = list(registered())
        served, refused = {}, []
        for layout in LAYOUTS:
            reason = self._why_not(layout, True) or self._why_not(layout, False)
            if reason:
                refused.append(f"not '{layout}': {reason}")
                continue
            backend = explain_call(self._call(device, layout)).backend
            if backend:
                served[layout] = backend
        best = min(served, key=lambda layout: preference.index(served[layout]), default=ROW_MAJOR.name)
        by = [f"{backend} serves '{layout}'" for layout, backend in served.items()] or ["nobody serves any"]
        return best, f"auto on {device}: {', '.join(by + refused)}"

    def _decide(self, layout: str, device: torch.device) -> str:
        """The layout that ``layout`` means on a device; keeps whether that is up to us, and why."""
        if layout != "auto" and layout not in LAYOUTS:
            takes = ", ".join(map(repr, ("auto", *LAYOUTS)))
            raise ValueError(f"Mxfp8Experts: layout is {layout!r}; it takes {takes}")
        choice, reason = self._choice(device) if layout == "auto" else (layout, "as asked for")
        why_not = self._why_not(choice, True) or self._why_not(choice, False)
        if why_not:
            raise ValueError(f"Mxfp8Experts: layout is {layout!r}; the experts do not fit: {why_not}")
        self._auto, self.layout_reason = layout == "auto", reason
        return choice

    def set_layout(self, layout: str = "auto") -> None:
        """Bring the weights into another layout, or with ``"auto"`` into the device's.

        New buffers where the layout changes: what captured the old ones has to be captured again. One weight at a time
        is held twice.
        """
        new = self._decide(layout, self.w1.device)
        if new == self.layout:
            return
        for name, gate_up in _WEIGHTS.items():
            moved = self._relaid(*self._pair(name), self.layout, new, gate_up)
            self._buffers[name], self._buffers[f"{name}_scale"] = moved
        if self.w1_bias is not None:
            self._buffers["w1_bias"] = self._repadded(self.w1_bias, new)
        self.layout = new

    @torch.no_grad()
    def _relaid(self, weight: Tensor, scale: Tensor, old: str, new: str, gate_up: bool) -> tuple[Tensor, Tensor]:
        restored = _restored(weight, scale, old, gate_up, self.local_intermediate_size)
        return restored if new == ROW_MAJOR.name else preshuffle(*restored, **_arrangement(new, gate_up))

    @torch.no_grad()
    def _repadded(self, w1_bias: Tensor, layout: str) -> Tensor:
        """w1_bias [E, 2I], padded for one layout -> padded for another."""
        inner = self.local_intermediate_size
        extra = self._shape(layout, True)[1] // 2 - inner
        return F.pad(halves(w1_bias, "concatenated")[..., :inner], (0, extra)).flatten(1)

    def row_major(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w1 [E, 2I, H], w1_scale, w2 [E, H, I], w2_scale in checkpoint order, without padding.

        The buffers themselves where they lie so already, else new tensors.
        """

        def restored(name: str) -> tuple[Tensor, Tensor]:
            if self.layout == ROW_MAJOR.name:
                return self._pair(name)
            return _restored(*self._pair(name), self.layout, _WEIGHTS[name], self.local_intermediate_size)

        return *restored("w1"), *restored("w2")

    # --- weights

    @classmethod
    def from_weights(
        cls,
        w1: Tensor,
        w2: Tensor,
        *,
        w1_scale: Tensor | None = None,
        w2_scale: Tensor | None = None,
        w1_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        gate_up_order: str = "concatenated",
        scale_rounding: str = "rceil",
        device: torch.device | str | None = None,
        **options,
    ) -> "Mxfp8Experts":
        """A module of weights, high-precision (they are quantised) or in MXFP8.

        Tensors are those of the whole layer; the module keeps what its rank holds. MXFP8 weights that need no change
        (layout row_major, the whole of a storage) are held as they are, not copied.

        Args:
            w1: [G, 2I, H] bf16, fp16 or fp32; or ``float8_e4m3fn`` with ``w1_scale`` [G, 2I, H/32] uint8 or
                ``float8_e8m0fnu``. With ``shared``, the shared expert's rows are the last of G + S.
            w2: [G, H, I] likewise, with ``w2_scale`` [G, H, I/32].
            w1_bias: [G, 2I], w2_bias: [G, H].
            gate_up_order: of the rows of w1 and w1_bias: ``"concatenated"``, all gate rows then all up rows, or
                ``"interleaved"``, gate and up rows in turn (gpt-oss).
            scale_rounding: as :func:`torch_mxfp8moe.quantize_1x32` takes it.
            device: of the module; by default that of w1.
            **options: of the constructor.

        Raises:
            ValueError, TypeError: an argument is not as above.
        """
        _check_tensor("w1", w1)
        _check_tensor("w2", w2)
        if w1.dim() != 3:
            raise ValueError(f"Mxfp8Experts: w1 has {w1.dim()} dimensions; it takes 3, [G, 2I, H]")
        device = torch.device(device) if device is not None else w1.device
        shared = options.get("shared")
        experts, rows, hidden = w1.shape
        bias = w1_bias if w1_bias is not None else w2_bias
        options["bias"] = bias is not None
        if bias is not None:
            options.setdefault("bias_dtype", bias.dtype)
        self = cls(experts - (shared.count if shared else 0), hidden, rows // 2, device="meta", **options)
        if self._auto:
            self.layout = self._decide("auto", device)
            self._allocate(torch.device("meta"))
        tensors = dict(w1=w1, w2=w2, w1_scale=w1_scale, w2_scale=w2_scale, w1_bias=w1_bias, w2_bias=w2_bias)
        with torch.inference_mode(False), torch.no_grad():  # buffers that can be written in either mode
            self._write(tensors, None, gate_up_order, scale_rounding, new_on=device)
            for name, buffer in self._buffers.items():
                if buffer is not None and buffer.device != device and name != "expert_map":  # the bias not given
                    self._buffers[name] = torch.zeros_like(buffer, device=device)
            if self.expert_map is not None:
                self.expert_map = self.expert_map.to(device)
        return self

    def update_weights(
        self,
        w1: Tensor | None = None,
        w2: Tensor | None = None,
        *,
        w1_scale: Tensor | None = None,
        w2_scale: Tensor | None = None,
        w1_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        experts: int | Iterable[int] | None = None,
        gate_up_order: str = "concatenated",
        scale_rounding: str = "rceil",
    ) -> None:
        """Write new weights into the buffers, whose storage stays: captured graphs compute with the new ones.

        Takes what :meth:`from_weights` takes, on any device; what is not given stays. Vectorised over experts: one
        pass over the weights. Queued on the current stream: the host does
        not wait, but where there is an ``expert_map``, which it reads. So what is given stays as it is until the
        stream has passed, tensors in pinned memory too.

        Args:
            experts: which experts the rows are: None for all G, or all G + S; an id (tensors then have no dimension
                for experts, or one of 1); or distinct ids, one for each row. Ids of experts that this rank does not
                hold are skipped. The shared expert's are G to G + S - 1.
            (tensors): with tensor parallelism, of the whole intermediate size or of this rank's part.

        Raises:
            ValueError, TypeError: an argument is not as above; nothing is written then.
        """
        tensors = dict(w1=w1, w2=w2, w1_scale=w1_scale, w2_scale=w2_scale, w1_bias=w1_bias, w2_bias=w2_bias)
        if isinstance(experts, int):
            shapes = dict(w1=2, w1_scale=2, w2=2, w2_scale=2, w1_bias=1, w2_bias=1)
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor) and tensor.dim() == shapes[name]:
                    tensors[name] = tensor.unsqueeze(0)
            experts = [experts]
        with torch.inference_mode():  # in which buffers made in either mode can be written
            self._write(tensors, experts, gate_up_order, scale_rounding)

    def _write(
        self,
        given: dict[str, Tensor | None],
        experts: Iterable[int] | None,
        gate_up_order: str,
        scale_rounding: str,
        new_on: torch.device | None = None,
    ) -> None:
        """``update_weights``; ``new_on``: into new buffers on a device, or those given if nothing has to be changed."""
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        check_source(gate_up_order, scale_rounding)
        for name, tensor in tensors.items():
            _check_tensor(name, tensor)
        if not tensors:
            raise ValueError("Mxfp8Experts: no tensor is given")
        rows, slots = self._places(tensors, experts)
        views = {}
        for name in sorted(tensors):
            views[name] = self._view(name, tensors, gate_up_order)
        if slots is None:
            return
        for name in views:
            if name in _WEIGHTS:
                self._write_weight(name, views[name], views.get(f"{name}_scale"), rows, slots, scale_rounding, new_on)
            elif name.endswith("bias"):
                self._write_bias(name, views[name], rows, slots, new_on)

    def _places(self, tensors: dict[str, Tensor], experts: Iterable[int] | None):
        """(rows, slots): which rows of the given tensors go to which local experts; slices, or index tensors."""
        counts = {name: tensor.shape[0] if tensor.dim() else 0 for name, tensor in tensors.items()}
        count = next(iter(counts.values()))
        every = self.num_experts + self.num_shared
        ids = range(count) if experts is None else [_expert_id(e) for e in experts]
        if experts is None and count not in (self.num_experts, every):
            takes = f"{self.num_experts}, all experts" + (f", or {every}, shared ones too" if self.num_shared else "")
            raise ValueError(f"Mxfp8Experts: {next(iter(counts))} has {count} experts; it takes {takes}")
        for name, got in counts.items():
            if got != len(ids):
                takes = f"{len(ids)}, as many as {'the others' if experts is None else 'are named'}"
                raise ValueError(f"Mxfp8Experts: {name} has {got} experts; it takes {takes}")
        wrong = [e for e in ids if not 0 <= e < every]
        if wrong or len(set(ids)) != len(ids):
            raise ValueError(f"Mxfp8Experts: experts is {list(ids)}; it takes distinct ids from 0 to {every - 1}")
        slot_of = {expert: slot for slot, expert in enumerate(self.expert_ids)}
        # In the order of slots, whatever that of the rows: consecutive ones are then written as one.
        pairs = sorted((slot_of[e], row) for row, e in enumerate(ids) if e in slot_of)
        if not pairs:
            return None, None
        slots, rows = map(list, zip(*pairs))
        return tuple(_as_slice(x) or torch.tensor(x, device="cpu") for x in (rows, slots))

    def _view(self, name: str, tensors: dict[str, Tensor], gate_up_order: str) -> Tensor:
        """This rank's part of a given tensor: w1's as [n, 2, I, C], w1_bias [n, 2, I], w2's [n, H, C], w2_bias [n, H];
        bytes, if they are bytes. A view."""
        tensor = tensors[name]
        if tensor.layout is not torch.strided:
            raise TypeError(f"Mxfp8Experts: {name} has layout {tensor.layout}; it takes torch.strided")
        if tensor.is_meta and not self.w1.is_meta:
            raise ValueError(f"Mxfp8Experts: {name} is on meta, without values; it takes a tensor that has them")
        of, _, kind = name.partition("_")
        gate_up = _WEIGHTS[of]
        if kind == "bias":
            if not self.bias:
                raise ValueError(f"Mxfp8Experts: {name} is given; these experts have no biases")
            takes = ROUTING_WEIGHT_DTYPES
        elif kind == "scale":
            if of not in tensors:
                raise ValueError(f"Mxfp8Experts: {name} is given without {of}")
            takes = SCALE_DTYPES
        else:
            takes = (E4M3,) if f"{of}_scale" in tensors else HIGH_PRECISION_DTYPES
        if tensor.dtype not in takes:
            listed = ", ".join(str(dtype)[6:] for dtype in takes)
            with_scale = f" without {of}_scale" if takes is HIGH_PRECISION_DTYPES else ""
            raise TypeError(f"Mxfp8Experts: {name} has dtype {str(tensor.dtype)[6:]}{with_scale}; it takes {listed}")
        block = BLOCK if kind == "scale" else 1
        whole, inner, hidden = self.intermediate_size, self.local_intermediate_size, self.hidden_size
        shapes = {
            size: ((2 * size, hidden // block) if gate_up else (hidden, size // block))[: 1 if kind == "bias" else 2]
            for size in (whole, inner)
        }
        size = next((size for size, shape in shapes.items() if tuple(tensor.shape[1:]) == shape), None)
        if size is None:
            wants = " or ".join(str(["E", *shape]).replace("'", "") for shape in dict.fromkeys(shapes.values()))
            raise ValueError(f"Mxfp8Experts: {name} has shape {list(tensor.shape)}; it takes {wants}")
        first, last = self.tp_range if size == whole else (0, inner)
        if kind != "bias" and tensor.itemsize == 1:
            tensor = tensor.view(torch.uint8)
        if gate_up:
            return halves(tensor, gate_up_order)[:, :, first:last]
        return tensor if kind == "bias" else tensor[..., first // block : last // block]

    def _write_weight(self, name: str, data: Tensor, scale: Tensor | None, rows, slots, scale_rounding, new_on) -> None:
        gate_up, device = _WEIGHTS[name], new_on or self.get_buffer(name).device
        arrangement = _arrangement(self.layout, gate_up)
        data = _rows(data, rows).to(device, non_blocking=True)
        if scale is None:
            data = data if data.stride(-1) == 1 else data.contiguous()
            arrange = partial(quantize_preshuffle, data, scale_rounding, **arrangement)
        else:
            scale = _rows(scale, rows).to(device, non_blocking=True)
            if self.layout == ROW_MAJOR.name and not new_on:
                for out, values in zip(self._pair(name), (data, scale)):
                    out = out.view(torch.uint8)
                    _put(out.unflatten(1, (2, -1)) if gate_up else out, slots, values)
                return
            # As checkpoints hold them; views where they lie so.
            data, scale = (_contiguous(x).flatten(1, 2) if gate_up else _contiguous(x) for x in (data, scale))
            if self.layout == ROW_MAJOR.name:  # memory of their own, not a part of something larger
                data, scale = (x if x.nbytes == x.untyped_storage().nbytes() else x.clone() for x in (data, scale))
                self._buffers[name], self._buffers[f"{name}_scale"] = data.view(E4M3), scale
                return
            arrange = partial(preshuffle, data.view(E4M3), scale, **arrangement)
        if new_on:
            self._buffers[name], self._buffers[f"{name}_scale"] = arrange()
            return
        weight, scales = self._pair(name)
        scales = scales.view(weight.shape[0], -1)
        if isinstance(slots, slice):
            weight, scales = weight[slots], scales[slots]
            arrange(out=(weight, scales.view(LAYOUTS[self.layout].scale_shape(*weight.shape))))
            return
        data, scale = arrange()
        _put(weight.view(torch.uint8), slots, data.view(torch.uint8))
        _put(scales, slots, scale.view(data.shape[0], -1))

    def _write_bias(self, name: str, bias: Tensor, rows, slots, new_on: torch.device | None) -> None:
        buffer = self._buffers[name]
        if buffer is None:  # w2's, which another rank adds
            return
        if new_on:
            buffer = self._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=new_on)
        bias = _rows(bias, rows).to(buffer.device, buffer.dtype, non_blocking=True)
        if name == "w1_bias":
            bias = F.pad(bias, (0, buffer.shape[1] // 2 - bias.shape[-1])).flatten(1)
        _put(buffer, slots, bias)

    # --- forward

    def add_shared(self, topk_weights: Tensor, topk_ids: Tensor, every_token: bool = False) -> tuple[Tensor, Tensor]:
        """topk_weights, topk_ids [T, K] -> [T, K + S], the shared expert's routes behind the others.

        Under expert parallelism a token's are those of rank t % ep_size, and -1 on the others, for ranks that all see
        the same tokens; with ``every_token`` each rank computes them for all its tokens, for ranks whose tokens differ.
        """
        tokens, first, last = topk_ids.shape[0], self.num_experts, self.num_experts + self.num_shared
        ids = torch.arange(first, last, dtype=topk_ids.dtype, device=topk_ids.device).expand(tokens, -1)
        if self.ep_size > 1 and not every_token:
            token = torch.arange(tokens, device=topk_ids.device).unsqueeze(1)
            ids = ids.masked_fill(token % self.ep_size != self.ep_rank, -1)
        assert self.shared is not None
        weights = F.pad(topk_weights, (0, self.num_shared), value=self.shared.routing_weight)
        return weights, torch.cat([topk_ids, ids], 1)

    def arguments(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        hidden_states_scale: Tensor | None = None,
        num_tokens: Tensor | None = None,
        add_shared: bool = True,
    ) -> dict:
        """The arguments of :func:`torch_mxfp8moe.fused_moe` for a call of this module, also those that
        :func:`torch_mxfp8moe.explain` and, behind the token counts, :func:`torch_mxfp8moe.warmup` take."""
        if self.shared and add_shared:
            topk_weights, topk_ids = self.add_shared(topk_weights, topk_ids)
        return dict(
            hidden_states=hidden_states,
            w1=self.w1,
            w1_scale=self.w1_scale,
            w2=self.w2,
            w2_scale=self.w2_scale,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            hidden_states_scale=hidden_states_scale,
            w1_bias=self.w1_bias,
            w2_bias=self.w2_bias,
            expert_map=self.expert_map,
            num_tokens=num_tokens,
            layout=self.layout,
            **self.options,
        )

    def forward(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        hidden_states_scale: Tensor | None = None,
        num_tokens: Tensor | None = None,
        add_shared: bool = True,
        out_dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Every token through its experts; with parallelism this rank's part, to be summed over the ranks.

        Args:
            hidden_states: [T, H] bf16, fp16 or fp32; or ``float8_e4m3fn`` with ``hidden_states_scale`` [T, H/32].
            topk_weights: [T, K], topk_ids: [T, K] int32 or int64, global ids.
            num_tokens: int32, one element: rows from there on are padding and give zeros.
            add_shared: with a shared expert, whether to add its routes; False if they are there already
                (:meth:`add_shared`) or not wanted.
            out_dtype, out: as :func:`torch_mxfp8moe.fused_moe` takes them.

        Returns:
            [T, H].
        """
        call = self.arguments(
            hidden_states,
            topk_weights,
            topk_ids,
            hidden_states_scale=hidden_states_scale,
            num_tokens=num_tokens,
            add_shared=add_shared,
        )
        return fused_moe(**call, out_dtype=out_dtype, out=out)

    # --- what nn.Module does with buffers

    def __getstate__(self) -> dict:
        """Weights as bytes: what pickle writes of float8 storages, it does not read (torch 2.13)."""
        state = super().__getstate__()
        weights = {name: self.get_buffer(name).view(torch.uint8) for name in _WEIGHTS}
        return state | dict(_buffers=self._buffers | weights)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for name in _WEIGHTS:
            self._buffers[name] = self.get_buffer(name).view(E4M3)

    def _apply(self, fn, recurse=True):
        """``.to``, ``.cuda``, ``.half`` and the like: MXFP8 bytes and ``expert_map`` are moved, never converted; with
        layout ``"auto"`` the weights are brought into the layout of the new device."""
        before = self.w1.device

        def keep_values(tensor: Tensor) -> Tensor:
            if tensor.dtype is torch.int32:  # expert_map: its values, also where fn gives memory without any
                moved = fn(tensor)
                return tensor if moved is tensor or moved.device.type == "meta" else tensor.to(moved.device)
            if tensor.itemsize > 1:  # a bias
                return fn(tensor)
            moved = fn(tensor.view(torch.uint8))
            if moved.dtype is not torch.uint8:
                raise TypeError(f"Mxfp8Experts: MXFP8 weights cannot be converted to {str(moved.dtype)[6:]}")
            return moved.view(tensor.dtype)

        super()._apply(keep_values, recurse)
        if self.w1_bias is not None:
            self.bias_dtype = self.w1_bias.dtype
        if self._auto and self.w1.device.type != "meta" and self.w1.device != before:
            self.set_layout("auto")
        return self

    def get_extra_state(self) -> Tensor:
        """What a state_dict's tensors are: JSON as uint8, so that every format that holds tensors holds it."""
        text = json.dumps(dict(version=_FORMAT, layout=self.layout, **self._identity()), sort_keys=True)
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing more: ``_load_from_state_dict`` has read it."""

    def _identity(self) -> dict:
        """What a state_dict and the module that loads it have to have in common."""
        return dict(
            num_experts=self.num_experts,
            num_shared=self.num_shared,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            tp=[self.tp_rank, self.tp_size],
            ep=[self.ep_rank, self.ep_size],
        )

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        named = [f"{prefix}{name}" for name in self._buffers if f"{prefix}{name}" in own]
        if named and prefix + _STATE not in own:
            error_msgs.append(
                f"{named[0]}: {prefix}{_STATE} is missing, which says in what layout it is; tensors of a checkpoint go "
                "through from_weights or update_weights"
            )
            return
        if prefix + _STATE in own:
            state = _parsed(own[prefix + _STATE])
            if state is None:
                error_msgs.append(
                    f"{prefix}{_STATE} is not what a state_dict of Mxfp8Experts has, a JSON object in bytes of uint8"
                )
                return
            wrong = [
                f"{prefix}{name} is {state.get(name)} in the state_dict; the module takes {value}"
                for name, value in dict(version=_FORMAT, **self._identity()).items()
                if state.get(name) != value
            ]
            key = f"{prefix}expert_map"
            if named and (key in own) != (self.expert_map is not None):
                wrong.append(
                    f"{key} is in the state_dict; the module has none, and its experts lie in another order"
                    if key in own
                    else f"{key} is missing in the state_dict, whose experts lie in another order than the module's"
                )
            for name, _, dtype in self._buffer_shapes():
                got = own.get(prefix + name)
                if got is not None and not name.endswith("bias") and got.dtype is not dtype:
                    wrong.append(f"{prefix}{name} has dtype {str(got.dtype)[6:]}; it takes {str(dtype)[6:]}")
            layout, takes = state.get("layout"), list(LAYOUTS)  # JSON has values that a dict cannot be asked for
            if layout not in takes:
                wrong.append(f"{prefix}layout is {layout!r} in the state_dict; it takes {takes}")
            elif layout != self.layout and not wrong:
                wrong += self._why_not_convert(own, prefix, layout)
            if wrong:
                error_msgs.extend(wrong)
                return
            if layout != self.layout:
                self._convert_state(own, prefix, state["layout"])
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _why_not_convert(self, own: dict[str, Tensor], prefix: str, layout: str) -> list[str]:
        """What keeps a state_dict's tensors from being brought from ``layout`` into the module's."""
        wrong = []
        for weight in _WEIGHTS:
            for name, other in ((weight, f"{weight}_scale"), (f"{weight}_scale", weight)):
                if prefix + name not in own and prefix + other in own:
                    wrong.append(
                        f"{prefix}{name} is missing in the state_dict, which has {other} in layout '{layout}'; the "
                        f"module takes '{self.layout}'"
                    )
        for name, shape, _ in self._buffer_shapes(layout):
            got = own.get(prefix + name)
            if got is not None and shape is not None and got.shape != shape:
                wrong.append(
                    f"{prefix}{name} has shape {list(got.shape)}; it takes {list(shape)} in layout '{layout}'"
                )
        return wrong

    def _convert_state(self, own: dict[str, Tensor], prefix: str, layout: str) -> None:
        """Bring a state_dict's tensors from ``layout`` into the module's."""
        for name, gate_up in _WEIGHTS.items():
            keys = f"{prefix}{name}", f"{prefix}{name}_scale"
            if all(key in own for key in keys):
                weight, scale = (own[key] for key in keys)
                moved = self._relaid(weight, scale, layout, self.layout, gate_up)
                own |= dict(zip(keys, moved))
        key = f"{prefix}w1_bias"
        if key in own and self.w1_bias is not None:
            own[key] = self._repadded(own[key], self.layout)

    def extra_repr(self) -> str:
        parts = [
            f"num_experts={self.num_experts}",
            f"hidden_size={self.hidden_size}",
            f"intermediate_size={self.intermediate_size}",
            f"layout='{self.layout}' ({self.layout_reason})",
        ]
        parts += [f"bias={self.bias}"] if self.bias else []
        parts += [f"shared={self.shared}"] if self.shared else []
        parts += [f"tp={self.tp_rank}/{self.tp_size}"] if self.tp_size > 1 else []
        held = f" ({self.num_local_experts} of {self.num_experts} experts)"
        parts += [f"ep={self.ep_rank}/{self.ep_size}{held}"] if self.expert_map is not None else []
        defaults = dict(swiglu_alpha=1.0, swiglu_beta=0.0, swiglu_limit=None, apply_router_weight_on_input=False,
                        activation_dtype="mxfp8", backend="auto")  # fmt: skip
        parts += [f"{name}={value!r}" for name, value in self.options.items() if value != defaults[name]]
        return ", ".join(parts)


def _parsed(extra_state: object) -> dict | None:
    """What ``get_extra_state`` wrote, or None for anything else."""
    if not isinstance(extra_state, Tensor) or extra_state.dtype is not torch.uint8 or extra_state.is_meta:
        return None
    try:
        state = json.loads(bytes(extra_state.tolist()))
    except ValueError:
        return None
    return state if isinstance(state, dict) else None


def _words(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of bytes as the widest integers that all of their rows divide into. What PyTorch copies with strides or
    by index it copies element by element, on a GPU one byte at a time if that is what an element is."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        size = dtype.itemsize
        if all(
            x.itemsize == 1 and x.stride(-1) == 1
            and not any(n % size for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))
            for x in tensors
        ):  # fmt: skip
            return tuple(x.view(dtype) for x in tensors)
    return tensors


def _contiguous(x: Tensor) -> Tensor:
    """``x.contiguous()``."""
    return _words(x)[0].contiguous().view(x.dtype)


def _rows(tensor: Tensor, index) -> Tensor:
    """``tensor[index]``, by a slice or by an index tensor on any device."""
    if isinstance(index, slice):
        return tensor[index]
    return _words(tensor)[0][index.to(tensor.device, non_blocking=True)].view(tensor.dtype)


def _put(out: Tensor, index, values: Tensor) -> None:
    """out[index] = values, of one dtype or bytes both."""
    out, values = _words(out, values)
    if isinstance(index, slice):
        out[index].copy_(values)
    else:
        out.index_copy_(0, index.to(out.device, non_blocking=True), values.contiguous())
