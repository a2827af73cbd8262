"""What the kernels need to know of an architecture."""

from dataclasses import dataclass
from functools import cache

import torch

MINIMUM_CUDA = 80
HIP_ARCHITECTURES = ("gfx942", "gfx950")
SCALED_ARCHITECTURES = ("sm_100", "sm_103", "gfx950")
"""Matrix units that take MXFP8 operands as they are."""


@dataclass(frozen=True)
class Target:
    """One architecture: ``sm_90``, ``gfx950``, ..."""

    arch: str
    operand: torch.dtype = torch.bfloat16
    """What MXFP8 values are held in where the matrix unit does not take them as such. bf16 and fp32 both hold them
    exactly; Triton's interpreter is right with fp32 only."""

    @property
    def capability(self) -> int:
        """90 for sm_90; 0 for AMD GPUs."""
        return int(self.arch.removeprefix("sm_")) if self.arch.startswith("sm_") else 0

    @property
    def scaled(self) -> bool:
        return self.arch in SCALED_ARCHITECTURES

    @property
    def native_e4m3(self) -> bool:
        """Converts ``float8_e4m3fn`` by an instruction (gfx942 knows another e4m3)."""
        return self.capability >= 89 or self.arch == "gfx950"

    @property
    def wgmma(self) -> bool:
        """Has warpgroup instructions, which read their left operand from registers while the program goes on."""
        return self.capability == 90

    @property
    def descriptors(self) -> bool:
        """Has a copy engine that takes tensor descriptors (TMA)."""
        return self.capability >= 90

    @property
    def overlaps(self) -> bool:
        """Whether the launches of a call overlap (:mod:`.overlap`). Later NVIDIA GPUs could as well; there it has not
        been run."""
        return self.capability == 90

    @property
    def why_not(self) -> str | None:
        """Why the kernels do not run there, or None if they do."""
        if self.capability and self.capability < MINIMUM_CUDA:
            return f"the GPU is {self.arch}; the kernels take sm_{MINIMUM_CUDA} and later"
        if not self.capability and self.arch not in HIP_ARCHITECTURES:
            return f"the GPU is {self.arch}; the kernels take {' and '.join(HIP_ARCHITECTURES)}"
        return None


INTERPRETED = Target("interpreter", torch.float32)
"""Triton's interpreter (TRITON_INTERPRET=1), on tensors of any device."""


def target_of(device: torch.device) -> Target:
    """The architecture of a GPU of this machine."""
    if torch.version.hip:
        return Target(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return Target(f"sm_{10 * major + minor}")


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; an H100's for tensors without one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
