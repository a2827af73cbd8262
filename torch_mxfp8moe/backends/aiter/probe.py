"""Whether this machine has an aiter that knows MXFP8, found out without trusting a version string.

What was read: https://github.com/ROCm/aiter, tags v0.1.14 to v0.1.20 and commit e4048607a5 (2026-08-22). ``gate_mode``
came with v0.1.14, MXFP8 kernels with v0.1.17, so the first does not tell of the second.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ARCHITECTURE = "gfx950"

SOURCE = "https://github.com/ROCm/aiter, v0.1.17 or later"

PARAMETERS = (
    "hidden_states", "w1", "w2", "topk_weight", "topk_ids", "expert_mask", "activation", "quant_type", "w1_scale",
    "w2_scale", "dtype", "swiglu_limit", "gate_mode",
)  # fmt: skip
"""What ``aiter.fused_moe.fused_moe`` is given; whatever else it takes keeps its default."""

KERNELS = ("flydsl_moe1_afp8_wfp8_bf16_t32x128x256_w2_gui", "flydsl_moe2_afp8_wfp8_bf16_t32x128x128_atomic")
"""What an untuned shape takes for few tokens, one kernel of each stage: an aiter that knows them knows MXFP8."""

SETTINGS = {
    "AITER_MOE_A8W4_BYPASS_QUANT": ("0", "lets aiter take all scales of the activations for 1"),
    "AITER_FLYDSL_STAGE2_FP8": ("0", "lets aiter round what it sums to fp8, beyond what this package promises"),
    "AITER_FLYDSL_FORCE": ("1", "keeps aiter from its FlyDSL kernels, the only ones it has for MXFP8"),
}
"""Environment variables of aiter that change results: the value that does not (the default), and what others do."""


class Unusable(Exception):
    """There is no aiter to call; says why."""


@dataclass(frozen=True)
class Interface:
    """What is called, and the values that it is called with."""

    fused_moe: Callable[..., torch.Tensor]
    activations: dict[str, object]
    """aiter's ActivationType by its name there: ``Silu`` and ``Swiglu``."""
    quant_type: object
    """QuantType.per_1x32."""
    gate_mode: str
    """GateMode.INTERLEAVE, which every fp8-activation kernel assumes whatever it is told."""


def architecture(device: torch.device) -> str | None:
    """``gfx950``, for instance; None if ``device`` is no AMD GPU."""
    if device.type != "cuda" or torch.version.hip is None:
        return None
    return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_machine() -> None:
    if torch.version.hip is None:
        raise Unusable(f"PyTorch is built without ROCm; aiter's MXFP8 kernels are for {ARCHITECTURE}")
    if not torch.cuda.is_available():
        raise Unusable("there is no GPU that PyTorch can use")
    found = {str(architecture(torch.device("cuda", i))) for i in range(torch.cuda.device_count())}
    if ARCHITECTURE not in found:
        raise Unusable(f"the GPU is {', '.join(sorted(found))}; aiter's MXFP8 kernels are for {ARCHITECTURE}")
    for name, (value, does) in SETTINGS.items():
        if os.environ.get(name, value) != value:
            raise Unusable(f"the environment has {name}={os.environ[name]}, which {does}; unset it")


def _check_installed() -> None:
    """What can be told before anything of aiter runs."""
    spec = importlib.util.find_spec("aiter")
    if spec is None:
        raise Unusable(
            f"aiter is not installed; it is built from source ({SOURCE}): the package index's 'aiter' is another "
            "project and its 'amd-aiter' predates MXFP8"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "fused_moe.py").exists() for folder in folders):
        where = spec.origin or ", ".join(map(str, folders))
        version = _version("aiter")
        what = f"the package index's 'aiter' {version}, asynchronous iterators" if version else "something else"
        raise Unusable(f"the module 'aiter' in {where} is {what}, not AMD's ({SOURCE}); uninstall it")
    if importlib.util.find_spec("flydsl") is None:
        raise Unusable("flydsl is not installed, which aiter's MXFP8 kernels are written in; aiter's setup names one")
    pin = flydsl_pin()
    installed = _version("flydsl")
    if pin and installed and installed.split("+")[0] != pin:
        raise Unusable(f"flydsl is {installed}; the installed aiter takes {pin}")


def flydsl_pin() -> str | None:
    """The version of flydsl that the installed aiter requires; None if it says none (a checkout on the path)."""
    try:
        requirements = importlib.metadata.requires("amd-aiter") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    for requirement in requirements:
        if match := re.match(r"flydsl\s*\(?==\s*([\w.]+)", requirement):
            return match.group(1)
    return None


def _import(name: str):
    try:
        return importlib.import_module(name)
    except Exception as error:  # RuntimeError and AssertionError too, where there is no GPU or no compiler
        raise Unusable(f"importing {name} raised {type(error).__name__}: {error}") from error


def interface() -> Interface:
    """The installed aiter's, wherever it runs; raises :class:`Unusable`. Imports aiter."""
    _check_installed()
    version = _version("amd-aiter")
    this = f"aiter {version}" if version else "the installed aiter"
    too_old = f"MXFP8 came with v0.1.17 ({SOURCE})"
    enums, function = _import("aiter"), _import("aiter.fused_moe")
    fused_moe = getattr(function, "fused_moe", None)
    if not callable(fused_moe):
        raise Unusable(f"{this} has no function aiter.fused_moe.fused_moe; {too_old}")
    lacks = [name for name in PARAMETERS if name not in inspect.signature(fused_moe).parameters]
    if lacks:
        raise Unusable(f"{this} is too old: its fused_moe takes no {', '.join(lacks)}; {too_old}")
    flydsl, common = _import("aiter.ops.flydsl.utils"), _import("aiter.ops.flydsl.moe_common")
    if not flydsl.is_flydsl_available():
        raise Unusable("aiter says that flydsl has no kernels for this GPU")
    kernels = _import("aiter.ops.flydsl.moe_kernels")
    for kernel in KERNELS:
        if kernels.get_flydsl_kernel_params(kernel) is None:
            raise Unusable(f"{this} is too old: it has no kernel {kernel}; {too_old}")
    try:
        return Interface(
            fused_moe,
            {name: getattr(enums.ActivationType, name) for name in ("Silu", "Swiglu")},
            enums.QuantType.per_1x32,
            common.GateMode.INTERLEAVE.value,
        )
    except AttributeError as error:
        raise Unusable(f"{this} names its enums in another way: {error}") from error


def load() -> Interface:
    """:func:`interface` on a machine with a gfx950. Raises :class:`Unusable`; imports aiter only if there is one."""
    _check_machine()
    return interface()
