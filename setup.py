"""Builds torch_mxfp8moe: `pip install --no-build-isolation .`, beside torch, setuptools, wheel and ninja.

The C++ extension is built on LibTorch's stable ABI and CPython's limited API: one binary for torch 2.11 and later and
for CPython 3.10 and later. Without a C++ compiler the package still installs, says so, and runs on the reference;
MXFP8MOE_EXTENSION=require makes that an error, =skip does not try.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
MODE = os.environ.get("MXFP8MOE_EXTENSION", "auto")
if MODE not in ("auto", "require", "skip"):
    sys.exit(f"MXFP8MOE_EXTENSION is '{MODE}'; it takes auto, require or skip")

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "torch_mxfp8moe builds against the torch that you run it with, and finds none. Install torch 2.11 or later "
        "first, then: pip install --no-build-isolation ."
    )

# GPU builds of torch bring the Triton that they need (under another name on AMD), CPU builds none.
TRITON = [] if torch.version.cuda or torch.version.hip else ["triton>=3.6,<3.10; sys_platform == 'linux'"]

LOUD = """
==============================================================================================
torch_mxfp8moe: THE C++ EXTENSION WAS NOT BUILT.
{reason}
The package is installed, but CPU tensors run on the plain-PyTorch reference, which is slow.
It takes a C++17 compiler (such as Debian's g++) and ninja; then install it again.
==============================================================================================
"""


class Build(BuildExtension):
    """PyTorch's build_ext, but a failure is not the end unless the extension is required."""

    def run(self):
        try:
            super().run()
        except (Exception, SystemExit) as error:
            if MODE == "require":
                raise
            message = LOUD.format(reason=f"{type(error).__name__}: {error}")
            print(message, file=sys.stderr)
            try:  # pip hides what a build prints
                Path("/dev/tty").write_text(message)
            except OSError:
                pass
            for extension in self.extensions:
                extension.optional = True


def extension() -> CppExtension:
    flags = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", f"-ffile-prefix-map={ROOT}=."]
    macros = [("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030A0000")]
    return CppExtension(
        "torch_mxfp8moe._C",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
        define_macros=macros,
        extra_compile_args={"cxx": flags},
        py_limited_api=True,
    )


setup(
    name="torch_mxfp8moe",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "torch_mxfp8moe/__init__.py").read_text()).group(1),
    description="Mixture-of-experts layers on MXFP8 expert weights, as PyTorch ops",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    install_requires=["torch>=2.11"],
    extras_require={
        "checkpoint": ["safetensors"],
        # As aiter v0.1.20 pins it. aiter itself comes from its sources: the package index's "aiter" is another project,
        # and its "amd-aiter" predates MXFP8 (docs/install.md).
        "rocm": ["flydsl==0.3.1; sys_platform == 'linux'"],
        "transformers": ["transformers>=5.20"],
        "test": [
            "pytest",
            "pytest-xdist",
            "expecttest",
            "hypothesis",
            "matplotlib",
            "numpy",
            "safetensors",
            "torchao==0.18.*",
            "transformers>=5.20",
            "torch-abi-audit; python_version >= '3.11'",
            "ruff==0.17.*",  # what these two find changes from version to version
            "pyrefly==1.4.*",
            *TRITON,
            # Of which gfx950_simulator takes LLVM's disassembler.
            "rocm-llvm-python>=7.2; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ]
    },
    entry_points={"vllm.general_plugins": ["torch_mxfp8moe = torch_mxfp8moe.integrations.vllm:register"]},
    packages=find_packages(include=["torch_mxfp8moe*"]),
    package_data={"torch_mxfp8moe": ["configs/triton/*.json", "py.typed", "_C.pyi"]},
    ext_modules=[] if MODE == "skip" else [extension()],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
