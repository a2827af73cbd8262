"""A stand-in for AMD's aiter: packages on disk with aiter's real interface, which record what they are called with.

Parameter names, defaults, enum values and kernel names are those of https://github.com/ROCm/aiter at the tags that are
named; v0.1.20 is the last release, e4048607a5 (2026-08-22) what was read last. :func:`compute` is aiter's arithmetic in
aiter's numbering, with what it does silently wrong done wrong here too. It shows that a call is what aiter wants as far
as that was read; it is no proof that aiter computes it.
"""

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch

from torch_mxfp8moe import reference

_FIRST = (
    "hidden_states, w1, w2, topk_weight, topk_ids, expert_mask=None, activation=ActivationType.Silu, "
    "quant_type=QuantType.No, doweight_stage1=False, w1_scale=None, w2_scale=None, a1_scale=None, a2_scale=None, "
    "block_size_M=None, num_local_tokens=None, moe_sorting_dispatch_policy=0, dtype=None, hidden_pad=0, "
    "intermediate_pad=0, bias1=None, bias2=None"
)
_SHARED = "shared_w1=None, shared_w2=None, shared_w1_scale=None, shared_w2_scale=None, shared_expert_id=-1"
_GATE_MODE = "gate_mode='separated'"

SIGNATURES = {
    "0.1.7.post2": _FIRST,
    "0.1.14": f"{_FIRST}, splitk=0, swiglu_limit=0.0, {_GATE_MODE}",
    "0.1.17": f"{_FIRST}, splitk=0, swiglu_limit=None, {_GATE_MODE}",
    "0.1.19": f"{_FIRST}, splitk=0, swiglu_limit=None, beta=None, linear_beta=None, {_GATE_MODE}",
    "0.1.20": f"{_FIRST}, splitk=0, swiglu_limit=None, beta=None, linear_beta=None, {_GATE_MODE}, {_SHARED}",
    "e4048607a5": (
        f"{_FIRST}, splitk=0, swiglu_limit=None, beta=None, linear_beta=None, {_GATE_MODE}, {_SHARED}, "
        "stage2_scatter=None"
    ),
}
"""Of ``aiter.fused_moe.fused_moe``, by version."""

SUPPORTED = ("0.1.17", "0.1.19", "0.1.20", "e4048607a5")

FLYDSL = {"0.1.7.post2": None, "0.1.14": "0.1.9", "0.1.17": "0.2.2", "0.1.19": "0.2.4", "0.1.20": "0.3.1"}
"""The flydsl that a version's metadata asks for (0.1.9 stands for any: MXFP8 is not there yet)."""

KERNELS = ("flydsl_moe1_afp8_wfp8_bf16_t32x128x256_w2_gui", "flydsl_moe2_afp8_wfp8_bf16_t32x128x128_atomic")

_FILES = {
    "aiter/__init__.py": """
        from enum import Enum

        class ActivationType(Enum):
            No = -1
            Silu = 0
            Gelu = 1
            Swiglu = 2
            Situv2 = 3  # from v0.1.19 on

        class QuantType(Enum):
            No = 0
            per_Tensor = 1
            per_Token = 2
            per_1x32 = 3
            per_1x128 = 4
    """,
    "aiter/fused_moe.py": """
        import aiter_stand_in
        from aiter import ActivationType, QuantType

        def fused_moe({signature}):
            return aiter_stand_in.receive(dict(locals()))
    """,
    "aiter/ops/__init__.py": "",
    "aiter/ops/flydsl/__init__.py": "",
    "aiter/ops/flydsl/utils.py": """
        def is_flydsl_available():
            return True
    """,
    "aiter/ops/flydsl/moe_common.py": """
        from enum import Enum

        class GateMode(str, Enum):
            SEPARATED = "separated"
            MOCK_GATE_ONLY = "mock_gate_only"
            GATE_ONLY = "gate_only"
            INTERLEAVE = "interleave"
    """,
    "aiter/ops/flydsl/moe_kernels.py": """
        def get_flydsl_kernel_params(name):
            return dict(stage=int(name[10])) if name in {kernels} else None
    """,
    "flydsl/__init__.py": "",
}


def install(folder: Path, version: str = "e4048607a5", flydsl: str | None = "", files: dict | None = None) -> None:
    """Writes aiter ``version`` and flydsl to ``folder``, with the metadata that an installed release has.

    ``flydsl``: its version, None for none at all; by default what aiter asks for. ``files``: contents instead of those
    above, None for no such file. e4048607a5 is a checkout on the path: it has no metadata.
    """
    pin = FLYDSL.get(version)
    flydsl = pin or "0.3.1" if flydsl == "" else flydsl
    kernels = KERNELS if version in SUPPORTED else ()
    for name, text in (_FILES | (files or {})).items():
        if text is not None and not (flydsl is None and name.startswith("flydsl")):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            text = textwrap.dedent(text).replace("{signature}", SIGNATURES[version])
            path.write_text(text.replace("{kernels}", repr(kernels)))
    if version in FLYDSL:
        metadata(folder, "amd-aiter", version, f"flydsl=={pin}" if pin else "pandas")
    if flydsl is not None:
        metadata(folder, "flydsl", flydsl)


def metadata(folder: Path, distribution: str, version: str, *requires: str) -> None:
    """What pip leaves of an installed distribution."""
    path = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    path.mkdir(parents=True, exist_ok=True)
    lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
    (path / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {name}" for name in requires)]) + "\n")


def forget() -> None:
    """Nothing of aiter or flydsl is imported any more."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("aiter", "flydsl")]:
        del sys.modules[name]


calls: list[dict] = []
"""The arguments of every call, by name."""

behaviour: Callable[[dict], torch.Tensor]
"""What a call returns: :func:`compute` or :func:`empty`."""


def receive(arguments: dict) -> torch.Tensor:
    calls.append(arguments)
    return behaviour(arguments)


def empty(arguments: dict) -> torch.Tensor:
    """The right shape and dtype."""
    x = arguments["hidden_states"]
    return x.new_zeros(x.shape, dtype=arguments["dtype"] or x.dtype)


def _sorted(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ids [T, K] -> the local expert of each route, -1 for a masked one, as the sort sees it.

    Local experts are numbered by the running sum of the mask, and of the routes of one token to one expert all but the
    last are lost. No id is checked there; here one outside the mask, which would be an access outside of it, raises.
    """
    assert ids.min() >= 0 and ids.max() < mask.numel(), "an id outside of expert_mask"
    local = (mask.cumsum(0) - 1)[ids.long()].where(mask[ids.long()] != 0, -1)
    lost = (ids.unsqueeze(2) == ids.unsqueeze(1)).triu(1).any(2)
    return local.where(~lost, -1)


def compute(arguments: dict) -> torch.Tensor:
    """Reference arithmetic on what aiter reads, at its own places, of its arguments."""
    a = dict(arguments)
    x, w1, w2, ids, weights = (a[name] for name in ("hidden_states", "w1", "w2", "topk_ids", "topk_weight"))
    assert a["quant_type"].name == "per_1x32" and x.dtype in (torch.bfloat16, torch.float16)
    dtype = a["dtype"] or x.dtype
    assert dtype in (torch.bfloat16, torch.float16), f"Fused_moe unsupported out dtype: {dtype}"
    if a["doweight_stage1"]:
        raise NotImplementedError("doweight_stage1")
    assert ids.dtype is torch.int32 and weights.dtype is torch.float32, "read as int32 and fp32 whatever they are"
    assert all(a[name].is_contiguous() for name in ("topk_ids", "topk_weight", "hidden_states")), "read as contiguous"
    shuffled = getattr(w1, "is_shuffled", False) or getattr(w2, "is_shuffled", False)
    experts = w1.shape[0]
    mask = a["expert_mask"] if a["expert_mask"] is not None else torch.ones(experts, dtype=torch.int32)
    local = _sorted(ids, mask)
    zero = ((weights == 0) & (local >= 0)).any(1)  # the quantiser's zeros win the race for the token's row
    x = x.masked_fill(zero.unsqueeze(1), 0)
    swiglu = a["activation"].name == "Swiglu"
    limit = a["swiglu_limit"] or (7.0 if swiglu else None)
    return reference.fused_moe(
        x, w1, a["w1_scale"], w2, a["w2_scale"], weights, local,
        swiglu_alpha=1.702 if swiglu else 1.0, swiglu_beta=1.0 if swiglu else 0.0, swiglu_limit=limit,
        # Tuned kernels take any weights for shuffled ones; not marked ones of other shapes go elsewhere and raise.
        layout="aiter_gfx950" if shuffled else "row_major", out_dtype=dtype,
    )  # fmt: skip


behaviour = compute
