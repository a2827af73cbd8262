"""Who serves a call, and why the others do not.

``backend="auto"`` takes the first backend, in the order of preference of :func:`.backends.registered`, that is usable
here and supports the call. Naming one that cannot serve the call is an error with its reason. Probing never raises: a
probe that fails is a "no" with the failure as its reason.
"""

from dataclasses import dataclass
from functools import wraps

import torch

from .arguments import Call, Dequantize, FusedMoe, Preshuffle, Quantize, QuantizePreshuffle
from .backends import Backend, registered


def _unavailable(backend: Backend) -> str | None:
    try:
        return backend.why_unavailable()
    except Exception as error:
        return f"asking whether it is available raised {type(error).__name__}: {error}"


def _why_not(backend: Backend, call: Call) -> str | None:
    reason = _unavailable(backend)
    if reason:
        return reason
    try:
        return backend.why_not(call)
    except Exception as error:
        return f"asking whether it serves the call raised {type(error).__name__}: {error}"


def _note(backend: Backend, call: Call) -> str | None:
    try:
        return backend.note(call)
    except Exception as error:
        return f"asking for notes raised {type(error).__name__}: {error}"


@dataclass(frozen=True)
class BackendStatus:
    """One backend on this machine."""

    name: str
    usable: bool
    reason: str | None
    """Why it is not usable; None if it is."""
    description: str

    def __str__(self) -> str:
        return f"{self.name:<10} {'usable' if self.usable else f'not usable: {self.reason}'} ({self.description})"


def backends() -> dict[str, BackendStatus]:
    """Every backend by name, in the order in which ``backend="auto"`` asks them: usable here, or why not.

    Usable means that the backend can serve some call on this machine; :func:`explain` answers for one call.
    """
    result = {}
    for name, backend in registered().items():
        reason = _unavailable(backend)
        result[name] = BackendStatus(name, reason is None, reason, backend.description)
    return result


@dataclass(frozen=True)
class Explanation:
    """Which backend serves one call, and every reason for which the others do not. ``str()`` gives it to read."""

    call: str
    backend: str | None
    """The name of the backend that serves the call; None if none does, and then the call itself raises."""
    reasons: dict[str, str]
    """Of every other backend: why it does not serve this call."""
    note: str | None = None
    """What to know of the backend's way with this call."""

    def __str__(self) -> str:
        lines = [f"{self.call}: served by {self.backend}" if self.backend else f"{self.call}: no backend serves it"]
        lines += [f"  note: {self.note}"] if self.note else []
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def _described(call: Call) -> str:
    if isinstance(call, FusedMoe):
        return (
            f"fused_moe on {call.device}, T={call.tokens} H={call.hidden} I={call.intermediate} E={call.experts} "
            f"K={call.topk}, layout {call.layout}, activations {call.activation_dtype}"
        )
    return f"{call.op} on {call.device}"


def explain_call(call: Call) -> Explanation:
    """:func:`explain` for checked arguments."""
    wanted = known_backend(call)
    chosen, reasons = None, {}
    for name, backend in registered().items():
        reason = _why_not(backend, call)
        if reason is None and wanted not in ("auto", name):
            reason = f"the call names backend '{wanted}'"
        elif reason is None and chosen is not None:
            reason = f"it could, but '{chosen}' comes first"
        if reason is None:
            chosen = name
        else:
            reasons[name] = reason
    return Explanation(_described(call), chosen, reasons, chosen and _note(registered()[chosen], call))


def known_backend(call: Call) -> str:
    """The backend that ``call`` asks for: 'auto' or a registered name."""
    wanted = getattr(call, "backend", "auto")
    if wanted != "auto" and wanted not in registered():
        names = ", ".join(map(repr, registered()))
        raise ValueError(f"{call.op}: backend is {wanted!r}; it takes 'auto', {names}")
    return wanted


def select(call: Call) -> Backend:
    """The backend that serves ``call``; raises ``NotImplementedError`` with every reason if there is none.

    The backends are asked once for each kind of call: neither they nor the machine change their minds.
    """
    backend = call.kind.backend
    if backend is None:
        backend = call.kind.backend = _first(call)
    return backend


def _first(call: Call) -> Backend:
    wanted = known_backend(call)
    for name, backend in registered().items():
        if wanted in ("auto", name) and _why_not(backend, call) is None:
            return backend
    reasons = explain_call(call).reasons
    if wanted != "auto":
        raise NotImplementedError(f"{call.op}: backend '{wanted}' does not serve this call: {reasons[wanted]}")
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise NotImplementedError(f"{call.op}: no backend serves this call: {listed}")


def _without_gradients(function):
    """``torch.no_grad()(function)``, which costs nothing where gradients are off already."""

    @wraps(function)
    def called(call):
        if not torch.is_grad_enabled():
            return function(call)
        with torch.no_grad():
            return function(call)

    return called


@_without_gradients
def quantize_1x32(call: Quantize) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes the outputs of a checked call, allocated here if it has none."""
    if call.out_data is None:
        call.out_data = torch.empty(call.x.shape, dtype=torch.float8_e4m3fn, device=call.device)
        call.out_scale = torch.empty(call.scale_shape, dtype=torch.uint8, device=call.device)
    select(call).quantize_1x32(call)
    return call.outputs


@_without_gradients
def dequantize_1x32(call: Dequantize) -> torch.Tensor:
    """The result of a checked call."""
    return select(call).dequantize_1x32(call)


@_without_gradients
def preshuffle(call: Preshuffle) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes the outputs of a checked call, allocated here if it has none."""
    if call.out_weight is None:
        call.out_weight = call.weight.new_empty(call.weight_shape)
        call.out_scale = call.scale.new_empty(call.scale_shape, dtype=torch.uint8)
    select(call).preshuffle(call)
    return call.outputs


@_without_gradients
def quantize_preshuffle(call: QuantizePreshuffle) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes the outputs of a checked call, allocated here if it has none."""
    if call.out_weight is None:
        call.out_weight = torch.empty(call.weight_shape, dtype=torch.float8_e4m3fn, device=call.device)
        call.out_scale = torch.empty(call.scale_shape, dtype=torch.uint8, device=call.device)
    select(call).quantize_preshuffle(call)
    return call.outputs


@_without_gradients
def fused_moe(call: FusedMoe) -> torch.Tensor:
    """The output of a checked call, written to its ``out`` if it has one."""
    backend = select(call)
    if call.out is None:
        return backend.new_fused_moe(call)
    backend.fused_moe(call)
    return call.out
