"""Launches of a call that overlap: programmatic dependent launch, on sm_90.

A launch that is ``dependent`` (:class:`.launch.Launch`) starts when every program of the one before it has called
:func:`let_next_start`, or ended, as soon as there is room: where programs of that one have ended, before the last of
them has. So it begins with what does not depend on that one, weights above all, and then calls
:func:`wait_for_launch_before`, after which all that the one before wrote can be read.

Every program of these launches waits, and lets the next one start no sooner than that. So when a launch starts, all but
the one before it have ended. What those wrote it may read at once; it writes nothing before it has waited.

Source: PTX ISA, ``griddepcontrol``. Triton has the same as ``tl.extra.cuda.gdc_wait``, where it is built for NVIDIA
GPUs.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_launch_before():
    """Until it has ended and all that it wrote can be read. Nothing, in a launch that is not dependent."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def let_next_start():
    """For this program; after :func:`wait_for_launch_before`."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def take_over(OVERLAP: tl.constexpr):
    """Both, where launches overlap."""
    if OVERLAP:
        wait_for_launch_before()
        let_next_start()
