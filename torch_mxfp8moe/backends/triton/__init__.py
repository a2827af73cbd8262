"""Our own Triton kernels: every call, on NVIDIA sm_80 and later, gfx942 and gfx950.

``routing`` and ``gemm`` hold the kernels of ``fused_moe``, ``fused_moe`` the order in which they are launched,
``quantize`` and ``preshuffle`` those of the other ops, ``numerics`` the number format, ``launch`` how kernels are
compiled, kept and launched, ``targets`` what differs between architectures. This module imports Triton only when it is
asked for something.
"""

import importlib.util
import os
from functools import cache

import torch

from ...arguments import Call, Dequantize, FusedMoe, Preshuffle, Quantize, QuantizePreshuffle
from ...formats import as_bytes
from .. import Backend
from .targets import INTERPRETED, Target, target_of

MINIMUM = (3, 6)
"""The first version of Triton that the kernels compile with."""

LARGEST_EXPERT = 2**31
"""Elements of one expert's weight, which a kernel counts with 32 bits."""

_target_of = cache(target_of)


def _interpreted() -> bool:
    """Whether Triton runs kernels in Python (it reads this when it is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


class Triton(Backend):
    name = "triton"
    priority = 50
    description = "bundled Triton kernels for NVIDIA GPUs from sm_80 on, gfx942 and gfx950"

    @cache
    def why_unavailable(self) -> str | None:  # pyrefly: ignore[bad-override-mutable-attribute]  (@cache)
        if not _interpreted() and not torch.cuda.is_available():
            return "there is no GPU that PyTorch can use"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed; it comes with PyTorch's GPU builds, or: pip install triton"
        import triton

        version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
        if version < MINIMUM:
            return f"Triton is {triton.__version__}; the kernels take {'.'.join(map(str, MINIMUM))} or later"
        return None

    def target(self, device: torch.device) -> Target:
        """The architecture that kernels for ``device`` are compiled for."""
        return INTERPRETED if _interpreted() else _target_of(device)

    def why_not(self, call: Call) -> str | None:
        if not _interpreted():
            if call.device.type != "cuda":
                return f"the tensors are on {call.device}, not on a GPU"
            reason = self.target(call.device).why_not
            if reason:
                return reason
        if isinstance(call, (FusedMoe, Preshuffle, QuantizePreshuffle)):
            shapes = (call.w1.shape, call.w2.shape) if isinstance(call, FusedMoe) else (call.weight_shape,)
            largest = max(rows * columns for _, rows, columns in shapes)
            if largest >= LARGEST_EXPERT:
                return f"a weight has {largest} elements an expert; it takes fewer than {LARGEST_EXPERT}"
        return None

    def _run(self, call: Call, memory: dict[str, torch.Tensor], make) -> None:
        """Run, on the tensors ``memory``, the plan that ``make(target)`` made for the first call like this one."""
        known = call.kind.plans.get(self.name)
        if known is None:
            target = self.target(call.device)
            known = call.kind.plans[self.name] = make(target), target
        plan, target = known
        plan.run(call.op, memory, call.device, target)

    def quantize_1x32(self, call: Quantize) -> None:
        from .quantize import STRIDES, quantize, rows

        data, scale = call.outputs
        if scale.numel():
            x = rows(call.x, STRIDES)
            self._run(call, dict(x=x, data=data, scale=scale), lambda _: quantize(x, call.scale_rounding))

    def dequantize_1x32(self, call: Dequantize) -> torch.Tensor:
        from .quantize import dequantize, rows

        out = torch.empty(call.data.shape, dtype=call.dtype, device=call.device)
        if out.numel():
            data, scale = rows(call.data, 1), rows(as_bytes(call.scale), 1)
            self._run(call, dict(data=data, scale=scale, out=out), lambda _: dequantize(data, scale, call.dtype))
        return out

    def preshuffle(self, call: Preshuffle) -> None:
        from .preshuffle import preshuffle

        if call.weight.numel():
            out_weight, out_scale = call.outputs
            memory = dict(weight=call.weight, scale=call.scale, out_weight=out_weight, out_scale=out_scale)
            self._run(call, memory, lambda _: preshuffle(call))

    def quantize_preshuffle(self, call: QuantizePreshuffle) -> None:
        from .preshuffle import quantize_preshuffle

        if call.x.numel():
            out_weight, out_scale = call.outputs
            memory = dict(x=call.x, out_weight=out_weight, out_scale=out_scale)
            self._run(call, memory, lambda _: quantize_preshuffle(call))

    def fused_moe(self, call: FusedMoe) -> None:
        from .fused_moe import plan

        if call.tokens:
            assert call.out is not None
            self._run(call, call.inputs | {"out": call.out}, lambda target: plan(call, target))


BACKEND = Triton()
