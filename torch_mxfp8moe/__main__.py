"""``python -m torch_mxfp8moe``: an environment and backend report to paste into a bug report.

Prints versions, devices, what each backend says of itself and who serves each kind of call, and the config files. What
cannot be found out is reported as such, with the error; the report itself never fails. Where the package cannot even be
imported, run this file instead: ``python .../torch_mxfp8moe/__main__.py``.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator

PACKAGES = ("torch", "triton", "pytorch-triton-rocm", "amd-aiter", "aiter", "flydsl", "numpy", "transformers", "vllm")
"""Distributions whose versions matter to whoever reads the report."""

VARIABLES = (
    "MXFP8MOE_", "TRITON_", "AITER_", "FLYDSL_", "CUDA_VISIBLE_", "HIP_VISIBLE_", "ROCR_VISIBLE_", "OMP_", "NCCL_",
)  # fmt: skip
"""What the names of environment variables start with that change what runs."""


def _system() -> Iterator[str]:
    yield f"Python {platform.python_version()} ({sys.executable}), {platform.platform()}"
    for name in PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name}: not installed"
    for name, value in sorted(os.environ.items()):
        if name.startswith(VARIABLES):
            yield f"{name}={value}"


def _torch() -> Iterator[str]:
    import torch

    toolkits = {"CUDA": torch.version.cuda, "HIP": torch.version.hip}
    built = [f"{name} {version}" for name, version in toolkits.items() if version]
    yield f"torch {torch.__version__} for {', '.join(built) or 'CPUs only'}, {torch.__file__}"
    yield f"CPU: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield "GPUs: none that PyTorch can use"
    for i in range(count):
        gpu = torch.cuda.get_device_properties(i)
        arch = getattr(gpu, "gcnArchName", "") if torch.version.hip else f"sm_{gpu.major}{gpu.minor}"
        yield f"GPU {i}: {gpu.name}, {arch}, {gpu.total_memory / 2**30:.0f} GiB"


def _package() -> Iterator[str]:
    import torch_mxfp8moe
    from torch_mxfp8moe import extension

    yield f"torch_mxfp8moe {torch_mxfp8moe.__version__}, {torch_mxfp8moe.__file__}"
    if extension.MODULE is None:
        yield f"C++ kernels: {extension.WHY_MISSING}"
    else:
        limited = "abi3" in str(extension.MODULE.__file__)
        abi = "LibTorch's stable ABI, " + ("CPython's limited API" if limited else "the C API of this Python only")
        yield f"C++ kernels: {extension.MODULE.__file__} ({abi}); they use {extension.MODULE.capability()}"


def _backends() -> Iterator[str]:
    from torch_mxfp8moe import backends

    yield from map(str, backends().values())


def _calls() -> Iterator[str]:
    """Who serves a small call of each kind, on each kind of device here, and why the others do not."""
    import torch

    from torch_mxfp8moe.arguments import ACTIVATION_DTYPES, FusedMoe
    from torch_mxfp8moe.dispatch import explain_call
    from torch_mxfp8moe.layouts import LAYOUTS

    E, H, I, K = 2, 256, 128, 1
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        def zeros(*shape, dtype=torch.uint8):
            return torch.zeros(shape, dtype=dtype, device=device)

        for layout in LAYOUTS.values():
            scales = [zeros(*layout.scale_shape(E, rows, columns)) for rows, columns in ((2 * I, H), (H, I))]
            w1, w2 = (zeros(E, *shape, dtype=torch.float8_e4m3fn) for shape in ((2 * I, H), (H, I)))
            routes = zeros(1, K, dtype=torch.float32), zeros(1, K, dtype=torch.int32)
            for activation_dtype in ACTIVATION_DTYPES:
                x = zeros(1, H, dtype=torch.bfloat16)
                tensors = (x, w1, scales[0], w2, scales[1], *routes)
                call = FusedMoe(*tensors, layout=layout.name, activation_dtype=activation_dtype).check()
                yield from str(explain_call(call)).splitlines()


def _configs() -> Iterator[str]:
    import torch

    from torch_mxfp8moe import configs

    for path in sorted((configs.FOLDER / "triton").glob("*.json")):
        name, _, activation_dtype = path.stem.partition("-")
        try:
            config = configs.load(name, activation_dtype or "mxfp8")
            yield f"{path}: {len(config.tiles)} rules, {len(config.shapes)} shapes of their own"
        except Exception as error:
            yield f"{path}: does not load: {type(error).__name__}: {error}"
    if torch.cuda.is_available():
        from torch_mxfp8moe.backends.triton import BACKEND

        arch = BACKEND.target(torch.device("cuda", torch.cuda.current_device())).arch
        yield f"this GPU's: {configs.ALIKE.get(arch, arch)}.json, or default.json if there is none"


PARTS = {
    "system": _system,
    "PyTorch": _torch,
    "package": _package,
    "backends, in the order in which they are asked": _backends,
    "calls": _calls,
    "tuned tiles": _configs,
}


def _lines(part: Callable[[], Iterator[str]]) -> Iterator[str]:
    """What ``part`` says; its error, where it stops at one."""
    try:
        yield from part()
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        yield f"!! {type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        if isinstance(error, KeyboardInterrupt):
            raise


def report() -> str:
    """The whole report, as text."""
    lines = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for title, part in PARTS.items():
            lines += [f"== {title}", *(f"  {line}" for line in _lines(part))]
    if caught:
        lines += ["== warnings", *(f"  {warning.category.__name__}: {warning.message}" for warning in caught)]
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m torch_mxfp8moe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(report())


if __name__ == "__main__":
    main()
